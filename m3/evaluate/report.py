"""Consultations as one self-contained page: scores, and for each turn what it earned and what it violated.

Everything shown comes from records: trajectories, the checklist's items with the turn that met them, spans of the step
verifier (gamma of a turn, Eq 7), orders, the diagnosis. The page needs no network and no script.
"""

from __future__ import annotations

import dataclasses
import io
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jinja2

from m3.environment.case import Case, Phase
from m3.environment.trajectory import Message, Trajectory
from m3.evaluate import scanbench
from m3.rewards import checklist, exam_choice
from m3.rewards.spans import SpanReward, step_gammas
from m3.rewards.stage_rewards import PARTS, rule_rewards
from m3.rewards.step_verifier import StepVerifier
from m3.rewards.verdict import UnjudgedError
from m3.text.words import word_spans

DISCLAIMER = (
    "Research software: not a medical device, not for the care of patients. Cases are synthetic unless said otherwise; "
    "scores by rules are no HealthBench or ScanBench scores."
)
TEMPLATE = Path(__file__).parent.parent / "data" / "consultations.html.jinja"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Credited:
    """A consultation and all that verifiers by rules say of it. ``rewards``: of stages; None where none can be told."""

    case: Case
    trajectory: Trajectory
    coverage: checklist.CoverageScore | None
    stations: scanbench.ConsultationScore
    spans: tuple[SpanReward, ...]
    gammas: tuple[float, ...]
    rewards: dict[Phase, float | None]
    problems: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Figures, met items and spans; no text of the consultation."""
        stations = {name: self.stations.value(name) for name in scanbench.STATIONS}
        return {
            "case": self.case.id,
            "policy": self.trajectory.policy,
            "rollout": self.trajectory.rollout,
            "seed": self.trajectory.seed,
            "turns": self.trajectory.turns,
            "ended": self.trajectory.ended,
            "checklist": None if self.coverage is None else self.coverage.score,
            "met": [] if self.coverage is None else list(self.coverage.met),
            "stations": stations,
            "rewards": {str(phase): value for phase, value in self.rewards.items()},
            "gammas": list(self.gammas),
            "spans": [dataclasses.asdict(span) for span in self.spans],
            "problems": list(self.problems),
            "judge": "scripted",
        }


def _station(name: str) -> Callable[[Credited], float | None]:
    return lambda one: one.stations.value(name)


def _stage(phase: Phase) -> Callable[[Credited], float | None]:
    return lambda one: one.rewards[phase]


FIGURES: dict[str, Callable[[Credited], float | None]] = {
    **{f"station by rules: {name}": _station(name) for name in scanbench.STATIONS},
    "checklist, all stages (Eq 1)": lambda one: None if one.coverage is None else one.coverage.score,
    **{f"stage reward: {phase}": _stage(phase) for phase in PARTS},
    "mean factor of a step (Eq 7)": lambda one: sum(one.gammas) / max(len(one.gammas), 1),
    "turns": lambda one: float(one.trajectory.turns),
}


def credit(case: Case, trajectory: Trajectory, verifier: StepVerifier | None = None) -> Credited:
    """Score a consultation by rules: checklist, stations, stage rewards, steps.

    Raises:
        ValueError: the trajectory is of another case.
    """
    trajectory = checklist.annotate(case, trajectory)
    reached = {message.phase for message in trajectory.of("assistant") if not message.meta.get("snippet")}
    problems: list[str] = []
    coverage = None
    try:
        coverage = checklist.coverage(case, trajectory)
    except UnjudgedError as error:
        problems.append(str(error))
    rewards: dict[Phase, float | None] = {}
    for phase, reward in rule_rewards().items():
        rewards[phase] = None
        if phase in reached:
            try:
                rewards[phase] = reward.score(case, trajectory).reward
            except UnjudgedError as error:
                problems.append(str(error))
    spans = (verifier or StepVerifier()).verify(case, trajectory)
    return Credited(
        case=case,
        trajectory=trajectory,
        coverage=coverage,
        stations=scanbench.score(case, trajectory),
        spans=tuple(spans),
        gammas=tuple(step_gammas(spans, trajectory.turns)),
        rewards=rewards,
        problems=tuple(problems),
    )


def render(credited: Sequence[Credited], title: str, subtitle: str) -> str:
    """The page, one HTML text."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        title=title,
        subtitle=subtitle,
        disclaimer=DISCLAIMER,
        summary=_summary(credited),
        figures=_figures(credited),
        consultations=[_view(one, n) for n, one in enumerate(credited)],
    )


def _summary(credited: Sequence[Credited]) -> dict[str, Any]:
    """Means of every score, a column for each policy."""
    policies = list(dict.fromkeys(one.trajectory.policy for one in credited))
    among = {policy: [one for one in credited if one.trajectory.policy == policy] for policy in policies}
    rows = [{"name": "consultations", "means": [str(len(among[policy])) for policy in policies]}]
    rows.append({"name": "ScanBench", "means": [scanbench.NOT_AVAILABLE for _ in policies]})
    for name, figure in FIGURES.items():
        means = []
        for policy in policies:
            told = [value for one in among[policy] if (value := figure(one)) is not None]
            means.append(f"{sum(told) / len(told):.3f}" if told else "n/a")
        rows.append({"name": name, "means": means})
    return {"policies": policies, "rows": rows}


def _figures(credited: Sequence[Credited]) -> list[dict[str, str]]:
    report = scanbench.gather([one.stations for one in credited], scanbench.ScriptedJudge())
    if not report.stations:
        return []
    file = io.StringIO()
    scanbench.plot_turns(report, file, format="svg")
    svg = file.getvalue()
    return [{"svg": svg[svg.index("<svg") :], "caption": "Station scores by rules against the number of exchanges."}]


def _view(one: Credited, n: int) -> dict[str, Any]:
    items = () if one.coverage is None else one.coverage.items
    turns = sorted({message.turn for message in one.trajectory.messages})
    return {
        "anchor": f"c{n}",
        "case": one.case.id,
        "department": one.case.department.replace("_", " "),
        "policy": one.trajectory.policy,
        "mode": one.trajectory.mode,
        "turns": one.trajectory.turns,
        "ended": one.trajectory.ended or "no record",
        "scores": [
            (name, "n/a" if (value := one.stations.value(name)) is None else f"{value:.2f}")
            for name in scanbench.STATIONS
        ],
        "problems": list(one.problems),
        "steps": [_step(one, turn) for turn in turns],
        "missed": [
            {"points": f"{score.item.points:+d}", "criterion": score.item.criterion, "level": score.item.level}
            for score in items
            if not score.met and not score.given and score.item.points > 0
        ],
        "exams": _exams(one),
        "diagnosis": _diagnosis(one),
    }


def _step(one: Credited, turn: int) -> dict[str, Any]:
    messages = [message for message in one.trajectory.messages if message.turn == turn]
    items = [score.item for score in (one.coverage.items if one.coverage else ()) if score.met and score.turn == turn]
    spans = [span for span in one.spans if span.turn == turn]
    return {
        "turn": turn,
        "phase": str(messages[-1].phase),
        "lines": [{"speaker": _speaker(message), "parts": _parts(message, spans)} for message in messages],
        "earned": [{"points": item.points, "criterion": item.criterion} for item in items],
        "violations": [f"{span.criterion.replace('_', ' ')}: {span.note}" for span in spans],
        "gamma": one.gammas[turn],
        "points": sum(item.points for item in items),
    }


def _speaker(message: Message) -> str:
    if message.role == "system" or message.meta.get("instruction"):
        return "instruction"
    return {"assistant": "physician", "user": "patient"}[message.role]


def _parts(message: Message, spans: Sequence[SpanReward]) -> list[dict[str, str]]:
    """The message cut where spans begin and end; each piece under the worst span that covers it."""
    text, words = message.content, word_spans(message.content)
    placed = []
    for span in spans if message.role == "assistant" else ():
        if span.token_start < span.token_end <= len(words):
            placed.append((words[span.token_start][0], words[span.token_end - 1][1], span))
    cuts = sorted({0, len(text), *(at for first, last, _ in placed for at in (first, last))})
    parts = []
    for first, last in itertools.pairwise(cuts):
        over = [span for begin, end, span in placed if begin <= first and last <= end]
        worst = min(over, key=lambda span: span.value, default=None)
        parts.append(
            {
                "text": text[first:last],
                "criterion": "" if worst is None else worst.criterion.replace("_", " "),
                "note": "" if worst is None else worst.note,
            }
        )
    return parts


def _exams(one: Credited) -> list[dict[str, str]]:
    said = "\n".join(message.content for message in one.trajectory.of("assistant", Phase.lab))
    if not said:
        return []
    ordered = {category: order.text for order in exam_choice.read_orders(said) for category in order.categories}
    rows = [
        {"name": exam.name, "need": exam.need, "ordered": ordered.get(exam.category, "")} for exam in one.case.exams
    ]
    wanted = {exam.category for exam in one.case.exams}
    others = {text for category, text in ordered.items() if category not in wanted}
    return rows + [{"name": text, "need": "not of this case", "ordered": text} for text in sorted(others)]


def _diagnosis(one: Credited) -> dict[str, str] | None:
    said = one.trajectory.of("assistant", Phase.diagnosis)
    if not said:
        return None
    found = one.stations.diagnosis
    wanted = one.case.diagnosis
    return {
        "said": said[-1].content,
        "wanted": f"{wanted.label} ({wanted.icd10cm or 'no code'})",
        "match": "n/a" if found is None else f"{found.rule}; ICD-10-CM {found.code or 'none'}, credit {found.credit}",
    }
