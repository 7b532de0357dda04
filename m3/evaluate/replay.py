"""Recorded consultations scored without any model: outcome, facts told, questions, repetition, and what rewards tell.

Two formats, one a line, plain or gzipped: ``m3.trajectory/v1`` (with the cases they are of), and CRAFT-MD replays:
{case_id, doctor, trial, answer, frq, frq_eval, facts, turns: [{role: doctor | patient, text}]}, where ``answer`` is the
reference, ``frq`` what the doctor answered when asked for the diagnosis, ``frq_eval`` a recorded grader's 0 or 1, -1
or null where there is no verdict.

- A fact is *told* if at least ``told`` of its content words' stems are in one message of the patient: lexical recall.
- A question is a sentence that ends in a question mark; near duplicates are those of m3/text/likeness.py.
- A *group* is all trials of one doctor on one case: the rollouts of GRPO. Where a reward is the same for all of them,
  its advantages are all 0 and the group teaches nothing.
- The code of a reference that is only a label is looked up in ICD-10-CM (a draft, no coder's work).
"""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from m3.environment.case import Case, Phase
from m3.environment.trajectory import SCHEMA, Message, Trajectory
from m3.evaluate.scanbench import Mean, mean_over_cases
from m3.rewards import diagnosis
from m3.rewards.spans import SpanReward
from m3.text.jsonl import read_objects
from m3.text.likeness import near_duplicates, questions
from m3.text.words import content_stems
from m3kernels.checks import refuse

Verify = Callable[[Case | None, Trajectory], Sequence[SpanReward]]
REDUNDANT = "redundant_question"
_EVERY_FACT = frozenset(
    content_stems("patient patient's reports history physical examination presents year-old man woman")
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """``told``: share of a fact's stems in one message of the patient; ours."""

    told: float = 0.6
    diagnosis: diagnosis.Config = dataclasses.field(default_factory=diagnosis.Config)

    def __post_init__(self) -> None:
        if not 0 < self.told <= 1:
            raise refuse("replay.Config", "told", "a number in (0, 1]", self.told)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recorded:
    """One recorded consultation. ``graded``: a recorded grader's verdict of ``answer``, None without one."""

    trajectory: Trajectory
    reference: diagnosis.Reference
    answer: str
    facts: tuple[str, ...]
    graded: bool | None = None
    case: Case | None = None

    @property
    def doctor(self) -> str:
        """Who consulted."""
        return self.trajectory.policy


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scored:
    """What was found in one. ``credit``: hierarchical, None where the reference has no code."""

    case: str
    doctor: str
    trial: int
    diagnosis: diagnosis.DiagnosisScore
    graded: bool | None
    fact_recall: float | None
    questions: int
    duplicates: int
    asking_turns: int
    redundant_turns: int | None

    @property
    def credit(self) -> float | None:
        """Of ICD-10-CM."""
        return self.diagnosis.credit


@dataclasses.dataclass(frozen=True, kw_only=True)
class Agreement:
    """Of the lexical scorer with the recorded grader; ``share`` has an interval over cases."""

    count: int
    share: Mean
    true_positives: int
    false_positives: int
    false_negatives: int

    @property
    def precision(self) -> float | None:
        """Of "correct"; None where the scorer never said so."""
        said = self.true_positives + self.false_positives
        return self.true_positives / said if said else None

    @property
    def recall(self) -> float | None:
        """Of the grader's 1; None where there is none."""
        graded = self.true_positives + self.false_negatives
        return self.true_positives / graded if graded else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Doctor:
    """Means of one doctor's consultations. Shares are in [0, 1]; None where nothing could be told.

    ``equal_*``: share of groups of two or more trials in which that reward is the same for all.
    """

    name: str
    consultations: int
    graded: float | None
    correct: float
    credit: float | None
    fact_recall: float | None
    questions: float  # a consultation
    asking_turns: float  # a consultation
    duplicate_questions: float | None  # share of the questions
    redundant_turns: float | None  # share of the asking turns, by the step verifier
    equal_graded: float | None
    equal_correct: float | None
    equal_credit: float | None
    equal_fact_recall: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """All of a file. ``tau_*``: Kendall's tau-b of two rankings of the doctors, None under two doctors."""

    doctors: tuple[Doctor, ...]
    scored: tuple[Scored, ...]
    agreement: Agreement | None
    tau_outcome: float | None  # the scorer's shares of correct against the grader's
    tau_redundancy: float | None  # the step verifier's redundant turns against near-duplicate questions
    seconds: float

    @property
    def rate(self) -> float:
        """Consultations scored a second, reading included."""
        return len(self.scored) / self.seconds


def read_recorded(path: str | Path, cases: Iterable[Case] = ()) -> Iterator[Recorded]:
    """Recorded consultations of a ``.jsonl`` or ``.jsonl.gz`` file.

    Args:
        path: the file.
        cases: those that trajectories of ``m3.trajectory/v1`` are of.
    Raises:
        ValueError: names file and line of what is neither format, or is of an unknown case.
    """
    known = {case.id: case for case in cases}
    for place, row in read_objects(path):
        try:
            yield _of_trajectory(row, known) if row.get("schema") == SCHEMA else of_craft_md(row)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            what = f"missing field {error}" if isinstance(error, KeyError) else str(error)
            raise ValueError(f"{place}: want {SCHEMA} or a CRAFT-MD replay; {what}") from error


def _of_trajectory(row: Mapping[str, Any], cases: Mapping[str, Case]) -> Recorded:
    trajectory = Trajectory.from_json(row)
    if trajectory.case not in cases:
        raise refuse("replay", "case", "one of the cases given", repr(trajectory.case))
    case = cases[trajectory.case]
    said = trajectory.of("assistant", Phase.diagnosis)
    return Recorded(
        trajectory=trajectory,
        reference=diagnosis.reference_of(case),
        answer=said[-1].content if said else "",
        facts=tuple(fact.text for fact in case.facts),
        case=case,
    )


def of_craft_md(row: Mapping[str, Any]) -> Recorded:
    """One CRAFT-MD replay. Raises KeyError, TypeError: a field is missing or malformed."""
    messages = recorded_messages((said["role"], said["text"]) for said in row["turns"])
    return Recorded(
        trajectory=Trajectory(
            case=row["case_id"],
            case_version=1,
            policy=row["doctor"],
            seed=0,
            rollout=row["trial"],
            mode="recorded",
            messages=messages,
        ),
        reference=_reference(row["answer"]),
        answer=row["frq"] or "",  # null: the doctor gave none
        facts=tuple(re.sub(r"^\d+\.\s*", "", fact) for fact in row["facts"]),
        graded=_GRADES.get(row.get("frq_eval", -1)),  # -1: the grader could not tell
    )


def recorded_messages(turns: Iterable[tuple[str, str]]) -> tuple[Message, ...]:
    """(role, text) of a recorded dialogue, role "doctor" or "patient", as messages of the inquiry.

    Where the doctor speaks first, its opening is turn 0. A turn begins where the patient speaks after the doctor.
    """
    messages: list[Message] = []
    turn = 0
    for speaker, text in turns:
        role = "assistant" if speaker == "doctor" else "user"
        if role == "user" and messages and messages[-1].role == "assistant":
            turn += 1
        messages.append(Message(role=role, content=text, turn=turn, phase=Phase.inquiry))
    return tuple(messages)


_GRADES: Mapping[object, bool] = {0: False, 1: True}


def _reference(label: str) -> diagnosis.Reference:
    code, _ = diagnosis.look_up(label, diagnosis.Config().found)
    return diagnosis.Reference(label=label, code=code)


def fact_recall(facts: Sequence[str], trajectory: Trajectory, config: Config | None = None) -> float | None:
    """The share of facts that the patient told, by their words; None without a fact that has words."""
    config = config or Config()
    told = [set(content_stems(message.content)) for message in trajectory.of("user")]
    wanted = [stems for fact in facts if (stems := set(content_stems(fact)) - _EVERY_FACT)]
    if not wanted:
        return None
    return sum(any(len(stems & said) >= config.told * len(stems) for said in told) for stems in wanted) / len(wanted)


def score(recorded: Recorded, *, verify: Verify | None = None, config: Config | None = None) -> Scored:
    """One consultation; ``verify``: a step verifier, by whose spans redundant turns are counted."""
    config = config or Config()
    trajectory = recorded.trajectory
    said = [message for message in trajectory.of("assistant") if message.phase == Phase.inquiry]
    asked = [questions(message.content) for message in said]
    every = [question for some in asked for question in some]
    spans = None if verify is None else verify(recorded.case, trajectory)
    return Scored(
        case=trajectory.case,
        doctor=recorded.doctor,
        trial=trajectory.rollout,
        diagnosis=diagnosis.score(recorded.reference, recorded.answer, config.diagnosis),
        graded=recorded.graded,
        fact_recall=fact_recall(recorded.facts, trajectory, config),
        questions=len(every),
        duplicates=len(near_duplicates(every)),
        asking_turns=sum(bool(some) for some in asked),
        redundant_turns=None if spans is None else len({one.turn for one in spans if one.criterion == REDUNDANT}),
    )


def evaluate(recorded: Iterable[Recorded], *, verify: Verify | None = None, config: Config | None = None) -> Report:
    """All of a file's consultations, and the doctors compared.

    Raises:
        ValueError: nothing recorded.
    """
    began = time.perf_counter()
    scored = tuple(score(one, verify=verify, config=config) for one in recorded)
    if not scored:
        raise refuse("replay.evaluate", "recorded", "at least one consultation", "none")
    names = dict.fromkeys(one.doctor for one in scored)
    doctors = tuple(_doctor(name, [one for one in scored if one.doctor == name]) for name in names)
    return Report(
        doctors=doctors,
        scored=scored,
        agreement=agreement(scored),
        tau_outcome=_tau_of(doctors, "correct", "graded"),
        tau_redundancy=_tau_of(doctors, "redundant_turns", "duplicate_questions"),
        seconds=time.perf_counter() - began,
    )


def agreement(scored: Sequence[Scored]) -> Agreement | None:
    """Of the scorer with the grader where there is one; None without any graded consultation."""
    pairs = [(one.case, one.diagnosis.correct, one.graded) for one in scored if one.graded is not None]
    share = mean_over_cases([(case, float(correct == graded)) for case, correct, graded in pairs])
    if share is None:
        return None
    return Agreement(
        count=len(pairs),
        share=share,
        true_positives=sum(correct and graded for _, correct, graded in pairs),
        false_positives=sum(correct and not graded for _, correct, graded in pairs),
        false_negatives=sum(graded and not correct for _, correct, graded in pairs),
    )


def _doctor(name: str, scored: Sequence[Scored]) -> Doctor:
    asked = sum(one.questions for one in scored)
    turns = sum(one.asking_turns for one in scored)
    redundant = [one.redundant_turns for one in scored if one.redundant_turns is not None]
    return Doctor(
        name=name,
        consultations=len(scored),
        graded=_mean([one.graded for one in scored]),
        correct=sum(one.diagnosis.correct for one in scored) / len(scored),
        credit=_mean([one.credit for one in scored]),
        fact_recall=_mean([one.fact_recall for one in scored]),
        questions=asked / len(scored),
        asking_turns=turns / len(scored),
        duplicate_questions=sum(one.duplicates for one in scored) / asked if asked else None,
        redundant_turns=sum(redundant) / turns if redundant and turns else None,
        equal_graded=_equal(scored, lambda one: one.graded),
        equal_correct=_equal(scored, lambda one: one.diagnosis.correct),
        equal_credit=_equal(scored, lambda one: one.credit),
        equal_fact_recall=_equal(scored, lambda one: one.fact_recall),
    )


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _equal(scored: Sequence[Scored], reward: Callable[[Scored], float | None]) -> float | None:
    """Share of groups of two or more in which a reward has no variance; None without such a group."""
    groups: dict[str, list[float]] = {}
    for one in scored:
        if (value := reward(one)) is not None:
            groups.setdefault(one.case, []).append(value)
    kept = [values for values in groups.values() if len(values) > 1]
    return sum(len(set(values)) == 1 for values in kept) / len(kept) if kept else None


def kendall_tau(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Kendall's tau-b of two rankings in [-1, 1]; None where one of them has no order.

    Raises:
        ValueError: they differ in length.
    """
    if len(one) != len(other):
        raise refuse("kendall_tau", "other", f"{len(one)} numbers", f"{len(other)}")
    signs = [(_sign(one[i] - one[j]), _sign(other[i] - other[j])) for i in range(len(one)) for j in range(i)]
    ordered = sum(a != 0 for a, _ in signs) * sum(b != 0 for _, b in signs)
    return sum(a * b for a, b in signs) / ordered**0.5 if ordered else None


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)


def _tau_of(doctors: Sequence[Doctor], one: str, other: str) -> float | None:
    pairs = [(getattr(doctor, one), getattr(doctor, other)) for doctor in doctors]
    known = [pair for pair in pairs if None not in pair]
    return kendall_tau([a for a, _ in known], [b for _, b in known])


COLUMNS = (
    ("doctor", "name"),
    ("consultations", "consultations"),
    ("graded correct", "graded"),
    ("scored correct", "correct"),
    ("ICD credit", "credit"),
    ("fact recall", "fact_recall"),
    ("asking turns", "asking_turns"),
    ("questions", "questions"),
    ("near-duplicate questions", "duplicate_questions"),
    ("redundant turns (verifier)", "redundant_turns"),
    ("equal groups: grader", "equal_graded"),
    ("equal groups: scorer", "equal_correct"),
    ("equal groups: ICD credit", "equal_credit"),
    ("equal groups: fact recall", "equal_fact_recall"),
)


def table(report: Report) -> list[list[str]]:
    """The doctors' rows under a row of headings, as text: shares in per cent."""
    counts = {"asking_turns", "questions"}
    rows = [[heading for heading, _ in COLUMNS]]
    for doctor in report.doctors:
        row = []
        for _, field in COLUMNS:
            value = getattr(doctor, field)
            if isinstance(value, float):
                value = f"{value:.1f}" if field in counts else f"{100 * value:.1f} %"
            row.append("n/a" if value is None else str(value))
        rows.append(row)
    return rows


def lines(report: Report) -> list[str]:
    """What stands below the table."""
    found = []
    if (agreed := report.agreement) is not None:
        found.append(
            f"the diagnosis scorer agrees with the recorded grader on {agreed.share} % of cases (95 % interval over"
            f" {agreed.share.cases} cases; {agreed.count} consultations; precision {_figure(agreed.precision)},"
            f" recall {_figure(agreed.recall)})"
        )
    readings = [str(one.diagnosis.reading) for one in report.scored]
    counts = ", ".join(f"{reading} {readings.count(reading)}" for reading in sorted(set(readings)))
    found.append(f"answers by what they claim: {counts}")
    found.append(f"Kendall's tau, scored against graded correct: {_figure(report.tau_outcome)}")
    found.append(f"Kendall's tau, redundant turns against near-duplicate questions: {_figure(report.tau_redundancy)}")
    found.append(f"{len(report.scored)} consultations in {report.seconds:.1f} s, {report.rate:.0f} a second")
    return found


def _figure(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.3f}"
