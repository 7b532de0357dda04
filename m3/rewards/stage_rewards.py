"""Default rewards G_k of the four stages (Eq 4), by rules: the weighted mean of what a stage is there for.

    inquiry        Eq 1 over the checklist's items of the inquiry
    differential   the right diagnosis is on the list; so are those that must be excluded; items of the checklist
    lab            weighted F1 of the examinations ordered; items of the checklist
    diagnosis      hierarchical ICD-10-CM credit; items of the checklist: what must be done, and must not

A part that a case has nothing for is left out and the others weigh more. A veto committed in a stage makes its reward
0. Each G_k lies in [0, 1], and V_k of the gate (Eq 6) is G_k. With a step verifier the spans of a stage come along;
they do not change G_k, which SPAR wants unpenalised.

That each stage has its own reward: Baichuan-M3, arXiv 2602.06570, on the segmented pipeline; parts, weights ours.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Mapping, Sequence

from m3.environment.case import Case, Phase
from m3.environment.segment import StageScore
from m3.environment.trajectory import Trajectory
from m3.rewards import diagnosis, exam_choice
from m3.rewards.checklist import coverage
from m3.rewards.diagnosis import Reference
from m3.rewards.step_verifier import StepVerifier
from m3.rewards.verdict import UnjudgedError

MAX_LISTED = 10  # lines of a differential that count, as stages.INSTRUCTIONS says
LINE = diagnosis.Config(listed=2, claimed=4, asides=1, further=4)  # of a line: one disease, perhaps with a second name


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """One of the things a stage is rewarded for. ``value`` in [0, 1]; None: this case has nothing for it."""

    name: str
    weight: float
    value: float | None
    outcome: str = ""  # what it was made of, for a reader


def inquiry_parts(case: Case, trajectory: Trajectory) -> list[Part]:
    """The checklist alone."""
    return [_checklist(case, trajectory, Phase.inquiry, 1.0)]


def differential_parts(case: Case, trajectory: Trajectory) -> list[Part]:
    """What the list holds; its order is not scored, and lines after the tenth are not read."""
    lines = _lines(_said(trajectory, Phase.differential))[:MAX_LISTED]
    found = case.diagnosis
    reference = Reference(label=found.label, synonyms=found.synonyms, acceptable=found.acceptable)
    right = max((diagnosis.score(reference, line, LINE).acceptable for line in lines), default=0.0)
    exclude = [entry.label for entry in found.differential if entry.must_exclude and entry.label]
    listed = [
        name for name in exclude if any(diagnosis.score(Reference(label=name), line, LINE).correct for line in lines)
    ]
    share = len(listed) / len(exclude) if exclude else None
    return [
        Part(name="right_diagnosis", weight=0.5, value=right),
        Part(name="must_exclude", weight=0.3, value=share, outcome=f"{len(listed)} of {len(exclude)}"),
        _checklist(case, trajectory, Phase.differential, 0.2),
    ]


def lab_parts(case: Case, trajectory: Trajectory) -> list[Part]:
    """The examinations ordered."""
    wanted = any(exam.need in ("essential", "optional") for exam in case.exams)
    scored = exam_choice.weighted_f1(case, _said(trajectory, Phase.lab)) if wanted else None
    missed = "" if scored is None else f"missed: {', '.join(scored.missed) or 'none'}"
    return [
        Part(name="weighted_f1", weight=0.8, value=None if scored is None else scored.f1, outcome=missed),
        _checklist(case, trajectory, Phase.lab, 0.2),
    ]


def diagnosis_parts(case: Case, trajectory: Trajectory) -> list[Part]:
    """The diagnosis and what is advised. A credit below 0 (off the branch) is 0 here; without a code, words decide."""
    scored = diagnosis.score(case, _said(trajectory, Phase.diagnosis))
    credit = scored.acceptable if scored.credit is None else max(0.0, scored.credit)
    return [
        Part(name="diagnosis", weight=0.6, value=credit, outcome=f"{scored.reading}, {scored.rule}"),
        _checklist(case, trajectory, Phase.diagnosis, 0.4),
    ]


PARTS: Mapping[Phase, Callable[[Case, Trajectory], list[Part]]] = {
    Phase.inquiry: inquiry_parts,
    Phase.differential: differential_parts,
    Phase.lab: lab_parts,
    Phase.diagnosis: diagnosis_parts,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RuleReward:
    """The ``StageReward`` of one stage's parts; ``verifier``: whose spans come along."""

    phase: Phase
    verifier: StepVerifier | None = None

    @property
    def name(self) -> str:
        """What scores depend on."""
        return f"rules of {self.phase}" + (f", steps by {self.verifier.name}" if self.verifier else "")

    async def __call__(self, case: Case, trajectory: Trajectory, phase: Phase) -> StageScore:
        """Score a stage.

        Raises:
            UnjudgedError: the case has nothing to score this stage by.
        """
        return await asyncio.to_thread(self._with_spans, case, trajectory, phase)

    def _with_spans(self, case: Case, trajectory: Trajectory, phase: Phase) -> StageScore:
        score = self.score(case, trajectory)
        if self.verifier is None:
            return score
        return dataclasses.replace(score, spans=tuple(self.verifier.verify(case, trajectory, phase)))

    def score(self, case: Case, trajectory: Trajectory) -> StageScore:
        """The same without spans."""
        parts = PARTS[self.phase](case, trajectory)
        told = [(part.weight, part.value) for part in parts if part.value is not None]
        if not told:
            raise UnjudgedError(f"stage reward: case {case.id!r} has nothing to score the stage {self.phase} by")
        vetoed = any(part.outcome.startswith("vetoed") for part in parts)
        reward = 0.0 if vetoed else sum(w * v for w, v in told) / sum(w for w, _ in told)
        return StageScore(reward=reward, outcomes={part.name: _outcome(part) for part in parts})


def rule_rewards(verifier: StepVerifier | None = None) -> dict[Phase, RuleReward]:
    """The default rewards of all stages."""
    return {phase: RuleReward(phase=phase, verifier=verifier) for phase in PARTS}


def _outcome(part: Part) -> str:
    value = "nothing to score" if part.value is None else f"{part.value:.6g}"
    return f"{value} ({part.outcome})" if part.outcome else value


def _checklist(case: Case, trajectory: Trajectory, phase: Phase, weight: float) -> Part:
    try:
        found = coverage(case, trajectory, phases={phase})
    except UnjudgedError:
        return Part(name="checklist", weight=weight, value=None)
    met = sum(one.met for one in found.items if one.item.points > 0)
    wanted = sum(one.item.points > 0 and not one.given for one in found.items)
    told = f"vetoed: {', '.join(found.vetoed)}" if found.vetoed else f"{met} of {wanted} met"
    return Part(name="checklist", weight=weight, value=found.value, outcome=told)


def _said(trajectory: Trajectory, phase: Phase) -> str:
    return "\n".join(message.content for message in trajectory.of("assistant", phase))


def _lines(text: str) -> Sequence[str]:
    """Lines of a list without their marks."""
    found = []
    for line in text.splitlines():
        words = line.strip().lstrip("-*•–").strip()
        head, _, rest = words.partition(" ")
        found.append(rest.strip() if head.strip("().:").isdigit() else words)
    return [line for line in found if line]
