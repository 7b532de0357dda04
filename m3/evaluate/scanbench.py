"""The three stations of a consultation scored: inquiry, examinations, diagnosis; and the score against its length.

- Station 1, inquiry: the share of the checklist's inquiry items that were met, by level and by SCAN dimension (Safety,
  Clarity, Association, Normative). Easy boilerplate is left out: items of section "demographic", and items whose facts
  all stand in the opening line or are volunteered by the patient, for no question earns them.
- Station 2, examinations: weighted F1 over the 38 categories (m3/rewards/exam_choice.py).
- Station 3, diagnosis: hierarchical ICD-10-CM credit (m3/rewards/diagnosis.py).

Means are over cases, of each case's mean over its rollouts; intervals are of a seeded bootstrap over cases. A station
that a consultation never reached, or that its case cannot score, is left out and counted.

What is shown is no ScanBench score unless a language model or a person judged station 1: by a scripted judge it reads
"n/a: scripted judge", and its figures are called scripted station scores. The 303 cases of the original were never
released, so no figure here compares with the paper's. Source: Baichuan-M3, arXiv 2602.06570, ScanBench.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Protocol, TypeVar

import numpy as np

from m3.environment.case import Case, ChecklistItem, Disclosure, Phase
from m3.environment.trajectory import Trajectory
from m3.rewards import checklist, diagnosis, exam_choice
from m3kernels.checks import refuse

Key = TypeVar("Key")
STATIONS = ("inquiry", "lab", "diagnosis")
NOT_AVAILABLE = "n/a: scripted judge"


class InquiryJudge(Protocol):
    """Who says which items of a checklist a consultation met."""

    @property
    def name(self) -> str:
        """As reports call it."""

    @property
    def scripted(self) -> bool:
        """Whether rules judge, no language model and no person."""

    def met(self, case: Case, trajectory: Trajectory) -> Collection[str]:
        """Ids of the inquiry items met. Raises UnjudgedError where it cannot tell."""
        ...


@dataclasses.dataclass(frozen=True)
class ScriptedJudge:
    """The rules of m3/rewards/checklist.py."""

    name: str = "scripted"
    scripted: bool = True

    def met(self, case: Case, trajectory: Trajectory) -> Collection[str]:
        return checklist.coverage(case, trajectory, phases=(Phase.inquiry,)).met


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """How scores are made and gathered."""

    exam_choice: exam_choice.Config = dataclasses.field(default_factory=exam_choice.Config)
    diagnosis: diagnosis.Config = dataclasses.field(default_factory=diagnosis.Config)
    least_share: float = 0.1  # the paper: bins of turns under 10 % of the samples are dropped
    turns_per_bin: int = 2  # ours
    resamples: int = 1000  # ours
    interval: float = 0.95  # ours
    seed: int = 0

    def __post_init__(self) -> None:
        if self.turns_per_bin < 1 or self.resamples < 1:
            raise refuse("scanbench.Config", "turns_per_bin", "turns_per_bin >= 1 and resamples >= 1", str(self))
        if not 0 <= self.least_share <= 1 or not 0 < self.interval < 1:
            raise refuse("scanbench.Config", "least_share", "least_share in [0, 1], interval in (0, 1)", str(self))


@dataclasses.dataclass(frozen=True, kw_only=True)
class InquiryScore:
    """``value``: share of the items met; the same by level, dimension and section. ``left_out``: boilerplate, ids."""

    value: float
    by_level: Mapping[int, float]
    by_dimension: Mapping[str, float]
    by_section: Mapping[str, float]
    met: tuple[str, ...]
    missed: tuple[str, ...]
    left_out: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConsultationScore:
    """One consultation. A station is None where ``unscored`` says why."""

    case: str
    department: str
    policy: str
    rollout: int
    turns: int  # exchanges of the inquiry
    inquiry: InquiryScore | None
    lab: exam_choice.ExamScore | None
    diagnosis: diagnosis.DiagnosisScore | None
    unscored: Mapping[str, str]

    def value(self, station: str) -> float | None:
        """The station's number: share, F1 or credit."""
        if station not in STATIONS:
            raise refuse("scanbench", "station", f"of {STATIONS}", repr(station))
        if station == "inquiry":
            return None if self.inquiry is None else self.inquiry.value
        if station == "lab":
            return None if self.lab is None else self.lab.f1
        return None if self.diagnosis is None else self.diagnosis.credit


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mean:
    """A mean over ``cases`` and its bootstrap interval [low, high]; ``consultations``: how many went in."""

    mean: float
    low: float
    high: float
    cases: int
    consultations: int

    def __str__(self) -> str:
        return f"{100 * self.mean:.1f} [{100 * self.low:.1f}, {100 * self.high:.1f}]"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TurnBin:
    """Consultations of ``first`` to ``last`` exchanges: how many, and their mean with its standard error."""

    first: int
    last: int
    count: int
    mean: float
    error: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """Scores of many consultations. A station without any scored consultation has no entry in ``stations``."""

    judge: str
    scripted: bool
    consultations: tuple[ConsultationScore, ...]
    stations: Mapping[str, Mean]
    by_department: Mapping[str, Mapping[str, Mean]]
    by_level: Mapping[int, Mean]
    by_dimension: Mapping[str, Mean]
    unscored: Mapping[str, int]  # "station: reason" to a count

    def scanbench(self, station: str) -> str:
        """The station's ScanBench score, or "n/a: scripted judge"; "n/a" where nothing was scored."""
        if station not in STATIONS:
            raise refuse("scanbench", "station", f"of {STATIONS}", repr(station))
        if self.scripted:
            return NOT_AVAILABLE
        return str(self.stations[station]) if station in self.stations else "n/a"

    def lines(self) -> list[str]:
        """The report as text, a line each."""
        name = "scripted station score" if self.scripted else "station score"
        found = [f"ScanBench {station}: {self.scanbench(station)}" for station in STATIONS]
        found += [f"{name}, {key}: {mean} ({mean.cases} cases)" for key, mean in self.stations.items()]
        found += [f"  level {level}: {mean}" for level, mean in sorted(self.by_level.items())]
        found += [f"  dimension {key}: {mean}" for key, mean in sorted(self.by_dimension.items())]
        for department, means in sorted(self.by_department.items()):
            found.append(f"  {department}: " + ", ".join(f"{key} {mean}" for key, mean in means.items()))
        found += [f"not scored, {reason}: {count}" for reason, count in sorted(self.unscored.items())]
        return found


def is_boilerplate(case: Case, item: ChecklistItem) -> bool:
    """Whether an inquiry item is left out: demographic, or given without a question (module docstring)."""
    given = set(case.opening_facts) | {fact.id for fact in case.facts if fact.disclosure == Disclosure.volunteer}
    return item.section == "demographic" or (bool(item.facts) and set(item.facts) <= given)


def score(
    case: Case, trajectory: Trajectory, *, judge: InquiryJudge | None = None, config: Config | None = None
) -> ConsultationScore:
    """The three stations of one consultation.

    Raises:
        ValueError: the trajectory is of another case.
        UnjudgedError: the judge could not judge.
    """
    if trajectory.case != case.id:
        raise refuse("scanbench.score", "trajectory", f"one of case {case.id!r}", repr(trajectory.case))
    config, judge = config or Config(), judge or ScriptedJudge()
    unscored: dict[str, str] = {}
    said = {phase: [m.content for m in trajectory.of("assistant", phase)] for phase in Phase}

    inquiry = None
    items = [item for item in case.items(Phase.inquiry) if item.points > 0]
    counted = [item for item in items if not is_boilerplate(case, item)]
    if not said[Phase.inquiry]:
        unscored["inquiry"] = "not reached"
    elif not counted:
        unscored["inquiry"] = "the case has no item to ask for"
    else:
        inquiry = _inquiry(items, counted, set(judge.met(case, trajectory)))

    lab = None
    if not said[Phase.lab]:
        unscored["lab"] = "not reached"
    elif not {"essential", "optional"} & set(exam_choice.needs(case).values()):
        unscored["lab"] = "the case says of no examination that it is needed"
    else:
        lab = exam_choice.weighted_f1(case, "\n".join(said[Phase.lab]), config.exam_choice)

    found = None
    if not said[Phase.diagnosis]:
        unscored["diagnosis"] = "not reached"
    elif case.diagnosis.icd10cm is None:
        unscored["diagnosis"] = "the case has no ICD-10-CM code"
    else:
        found = diagnosis.score(case, said[Phase.diagnosis][-1], config.diagnosis)
    return ConsultationScore(
        case=case.id,
        department=case.department,
        policy=trajectory.policy,
        rollout=trajectory.rollout,
        turns=len(said[Phase.inquiry]),
        inquiry=inquiry,
        lab=lab,
        diagnosis=found,
        unscored=unscored,
    )


def _inquiry(items: Sequence[ChecklistItem], counted: Sequence[ChecklistItem], met: set[str]) -> InquiryScore:
    def shares(key: Callable[[ChecklistItem], Key]) -> dict[Key, float]:
        groups: dict[Key, list[bool]] = {}
        for item in counted:
            groups.setdefault(key(item), []).append(item.id in met)
        return {group: sum(hits) / len(hits) for group, hits in groups.items()}

    return InquiryScore(
        value=sum(item.id in met for item in counted) / len(counted),
        by_level=shares(lambda item: item.level),
        by_dimension=shares(lambda item: item.dimension),
        by_section=shares(lambda item: item.section),
        met=tuple(item.id for item in counted if item.id in met),
        missed=tuple(item.id for item in counted if item.id not in met),
        left_out=tuple(item.id for item in items if item not in counted),
    )


def evaluate(
    cases: Iterable[Case],
    trajectories: Iterable[Trajectory],
    *,
    judge: InquiryJudge | None = None,
    config: Config | None = None,
) -> Report:
    """All consultations scored and gathered.

    Raises:
        ValueError: a trajectory of a case that is not among ``cases``, or no trajectory at all.
        UnjudgedError: the judge could not judge.
    """
    config, judge = config or Config(), judge or ScriptedJudge()
    known = {case.id: case for case in cases}
    scores = []
    for trajectory in trajectories:
        if trajectory.case not in known:
            raise refuse("scanbench.evaluate", "trajectories", "of the cases given", repr(trajectory.case))
        scores.append(score(known[trajectory.case], trajectory, judge=judge, config=config))
    if not scores:
        raise refuse("scanbench.evaluate", "trajectories", "at least one", "none")
    return gather(scores, judge, config)


def gather(scores: Sequence[ConsultationScore], judge: InquiryJudge, config: Config | None = None) -> Report:
    """Means and intervals over scored consultations."""
    config = config or Config()
    asked = [(one.case, one.inquiry) for one in scores if one.inquiry is not None]
    levels = sorted({level for _, inquiry in asked for level in inquiry.by_level})
    dimensions = sorted({dimension for _, inquiry in asked for dimension in inquiry.by_dimension})
    reasons = [f"{station}: {why}" for one in scores for station, why in one.unscored.items()]
    return Report(
        judge=judge.name,
        scripted=judge.scripted,
        consultations=tuple(scores),
        stations=_station_means(scores, config),
        by_department={
            department: _station_means([one for one in scores if one.department == department], config)
            for department in sorted({one.department for one in scores})
        },
        by_level=_means({key: [(case, one.by_level.get(key)) for case, one in asked] for key in levels}, config),
        by_dimension=_means(
            {key: [(case, one.by_dimension.get(key)) for case, one in asked] for key in dimensions}, config
        ),
        unscored={reason: reasons.count(reason) for reason in sorted(set(reasons))},
    )


def _station_means(scores: Sequence[ConsultationScore], config: Config) -> dict[str, Mean]:
    return _means({name: [(one.case, one.value(name)) for one in scores] for name in STATIONS}, config)


def _means(groups: Mapping[Key, Sequence[tuple[str, float | None]]], config: Config) -> dict[Key, Mean]:
    """Means of the groups that have a value."""
    found = {}
    for key, pairs in groups.items():
        mean = mean_over_cases([(case, value) for case, value in pairs if value is not None], config)
        if mean is not None:
            found[key] = mean
    return found


def mean_over_cases(values: Sequence[tuple[str, float]], config: Config | None = None) -> Mean | None:
    """The mean over cases of (case, value) pairs, and its percentile bootstrap interval over cases; None of nothing."""
    if not values:
        return None
    config = config or Config()
    by_case: dict[str, list[float]] = {}
    for case, value in values:
        by_case.setdefault(case, []).append(value)
    means = np.array([np.mean(by_case[case]) for case in sorted(by_case)])
    draws = np.random.default_rng(config.seed).integers(len(means), size=(config.resamples, len(means)))
    tail = 100 * (1 - config.interval) / 2
    low, high = np.percentile(means[draws].mean(axis=1), [tail, 100 - tail])
    return Mean(mean=float(means.mean()), low=float(low), high=float(high), cases=len(means), consultations=len(values))


def score_against_turns(
    scores: Sequence[ConsultationScore], station: str = "inquiry", config: Config | None = None
) -> tuple[TurnBin, ...]:
    """Means of a station by the number of exchanges; bins with less than ``least_share`` of the samples are dropped."""
    config = config or Config()
    binned: dict[int, list[float]] = {}
    for one in scores:
        if (value := one.value(station)) is not None:
            binned.setdefault(max(one.turns - 1, 0) // config.turns_per_bin, []).append(value)
    total = sum(len(values) for values in binned.values())
    return tuple(
        TurnBin(
            first=at * config.turns_per_bin + 1,
            last=(at + 1) * config.turns_per_bin,
            count=len(values),
            mean=float(np.mean(values)),
            error=float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0,
        )
        for at, values in sorted(binned.items())
        if len(values) >= config.least_share * total
    )


def plot_turns(
    report: Report, target: str | Path | IO[str], *, config: Config | None = None, format: str | None = None
) -> None:
    """A figure of each station's mean against the number of exchanges, by policy; the format: else of the suffix."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.2), layout="constrained")
    policies = sorted({one.policy for one in report.consultations})
    for axes, station in zip(figure.subplots(1, len(STATIONS), sharey=True), STATIONS, strict=True):
        for policy in policies:
            among = [one for one in report.consultations if one.policy == policy]
            bins = score_against_turns(among, station, config)
            middle = [(one.first + one.last) / 2 for one in bins]
            axes.errorbar(middle, [one.mean for one in bins], [one.error for one in bins], marker="o", label=policy)
        axes.set(title=station, xlabel="exchanges")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("scripted station score" if report.scripted else "station score")
    figure.axes[-1].legend(fontsize="small")
    figure.savefig(target, format=format)
