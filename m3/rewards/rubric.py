"""Rubrics: signed clauses that a judge finds met or not met, the reward they give, and HealthBench's files of them.

    R_task = ( sum_i w_i a_i - sum_{i: w_i < 0} w_i ) / sum_i |w_i|        in [0, 1]          (Eq 1)

with w_i in [-10, 10], not 0, and a_i in {0, 1}. Source: Baichuan-M3, arXiv 2602.06570, on the rubric verifier. It is 1
where every positive clause is met and no negative one, 0 where it is the other way round; nothing met gives the share
of the negative weights, and with negative weights alone it is 1 minus the share of them that is met. An empty response
is judged like any other. HealthBench's own arithmetic, which may be negative, is m3/evaluate/healthbench.py.

A file of HealthBench (openai/simple-evals ee3b031) has one JSON object a line: ``example_tags``, ``prompt``,
``prompt_id``, ``rubrics`` of ``criterion``, ``points``, ``tags``, and more, which is kept as it is.
"""

from __future__ import annotations

import collections
import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from m3.environment.case import Case, Phase
from m3.rewards.verdict import Outcome, UnjudgedError, Verdict
from m3.text.jsonl import read_objects
from m3kernels.checks import refuse

MAX_POINTS = 10  # the paper, on Eq 1; HealthBench has the same
ID_TAG = "id:"  # the last tag of a clause in a file, where its id is not its place in the list


@dataclasses.dataclass(frozen=True, kw_only=True)
class RubricItem:
    """One clause. Positive points reward what it says, negative ones punish it; an integer stays one when written."""

    id: str
    criterion: str
    points: float
    tags: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        number = isinstance(self.points, (int, float)) and not isinstance(self.points, bool)
        if not number or not 0 < abs(self.points) <= MAX_POINTS:
            raise refuse("RubricItem", f"points of {self.id!r}", "a number in [-10, 10], not 0", repr(self.points))
        if not self.criterion.strip():
            raise refuse("RubricItem", f"criterion of {self.id!r}", "text", repr(self.criterion))
        if len(set(self.tags)) != len(self.tags):
            raise refuse("RubricItem", f"tags of {self.id!r}", "each tag once", repr(self.tags))

    def __str__(self) -> str:
        """As a judge is shown it: "[points] criterion", HealthBench's form."""
        return f"[{self.points}] {self.criterion}"

    @property
    def wanted(self) -> bool:
        """Whether meeting it is good."""
        return self.points > 0


@dataclasses.dataclass(frozen=True)
class Rubric:
    """Clauses for one context, each id once. It may be empty; a reward of an empty one is refused."""

    items: tuple[RubricItem, ...]
    _: dataclasses.KW_ONLY
    id: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "items", tuple(self.items))
        repeated = [one for one, n in collections.Counter(item.id for item in self.items).items() if n > 1]
        if repeated:
            raise refuse(f"Rubric {self.id!r}", "items", "each id once", repr(repeated[0]))


@dataclasses.dataclass(frozen=True, kw_only=True)
class RubricScore:
    """``reward`` of Eq 1 over the ``judged`` clauses; ``left_out``: how many were not judged, by outcome."""

    reward: float
    judged: int
    left_out: Mapping[Outcome, int]


def rubric_reward(points: Sequence[float], met: Sequence[bool]) -> float:
    """R_task (Eq 1) in [0, 1].

    Args:
        points: the weights w_i, in [-10, 10], none 0.
        met: a_i of each.
    Raises:
        ValueError: no clause at all, a weight out of range, an a_i that is neither true nor false (the name of an
            outcome is text, and so "true"), or lists of different length.
    """
    if not len(points):
        raise refuse("rubric_reward", "points", "one clause or more", "no rubric")
    if len(points) != len(met):
        raise refuse("rubric_reward", "met", f"{len(points)} of them, one a clause", f"{len(met)}")
    for weight in points:
        if not 0 < abs(weight) <= MAX_POINTS:
            raise refuse("rubric_reward", "points", "numbers in [-10, 10], none 0", weight)
    for is_met in met:
        if is_met not in (False, True):
            raise refuse("rubric_reward", "met", "true or false of each clause", repr(is_met))
    reached = sum(weight for weight, is_met in zip(points, met, strict=True) if is_met)
    reward = (reached - sum(weight for weight in points if weight < 0)) / sum(abs(weight) for weight in points)
    return min(1.0, max(0.0, reward))  # rounding of fractional weights alone can leave [0, 1]


def score_rubric(rubric: Rubric, verdicts: Iterable[Verdict], *, max_unjudged: float = 0.0) -> RubricScore:
    """Eq 1 from a judge's verdicts, matched by the id of the clause.

    Args:
        max_unjudged: share of the clauses in [0, 1) that may be left out where the judge did not judge them; then the
            reward is that of the others. 0, the default: all must be judged.
    Raises:
        UnjudgedError: more are unjudged than may be; the message counts outcomes by name.
        ValueError: a rubric without clauses, or verdicts that are not one a clause.
    """
    op = "score_rubric"
    if not rubric.items:
        raise refuse(op, "rubric", "one clause or more", f"no rubric ({rubric.id!r})")
    if not 0 <= max_unjudged < 1:
        raise refuse(op, "max_unjudged", "a share in [0, 1)", max_unjudged)
    outcomes = match_verdicts(rubric.items, verdicts)
    left_out = collections.Counter(outcome for outcome in outcomes if not outcome.judged)
    missing = left_out.total()
    if missing > max_unjudged * len(outcomes):
        counts = ", ".join(f"{outcome} {n}" for outcome, n in sorted(left_out.items()))
        raise UnjudgedError(f"rubric {rubric.id!r}: {missing} of {len(outcomes)} clauses unjudged: {counts}")
    kept = [(item.points, o is Outcome.met) for item, o in zip(rubric.items, outcomes, strict=True) if o.judged]
    reward = rubric_reward([points for points, _ in kept], [is_met for _, is_met in kept])
    return RubricScore(reward=reward, judged=len(kept), left_out=dict(left_out))


def match_verdicts(items: Sequence[RubricItem], verdicts: Iterable[Verdict]) -> list[Outcome]:
    """The outcome of each clause, in their order; ValueError where verdicts are not exactly one a clause."""
    verdicts = list(verdicts)
    found = {verdict.criterion: verdict.outcome for verdict in verdicts}
    wanted = [item.id for item in items]
    if len(verdicts) != len(wanted) or set(found) != set(wanted):
        odd = sorted(set(found) ^ set(wanted))
        what = f"{len(verdicts)} for {len(wanted)} clauses" + (f", differing in {odd[0]!r}" if odd else "")
        raise refuse("match_verdicts", "verdicts", "one a clause, by its id", what)
    return [found[one] for one in wanted]


def checklist_rubric(case: Case, phases: Iterable[Phase] | None = None) -> Rubric:
    """The checklist of a case as a rubric, of all stages or of some; level, dimension and the rest become tags."""
    kept = set(Phase) if phases is None else set(phases)
    items = []
    for entry in case.checklist:
        if entry.phase not in kept:
            continue
        tags = [f"level:{entry.level}", f"scan:{entry.dimension}", f"phase:{entry.phase}", f"kind:{entry.kind}"]
        if entry.section:
            tags.append(f"section:{entry.section}")
        items.append(RubricItem(id=entry.id, criterion=entry.criterion, points=entry.points, tags=tuple(tags)))
    return Rubric(tuple(items), id=case.id)


# -- HealthBench's files ----------------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True, kw_only=True)
class HealthBenchRow:
    """One example: a conversation that awaits an answer, and the rubric of the answer. ``rest``: the other fields."""

    prompt_id: str
    prompt: tuple[Mapping[str, str], ...]
    rubric: Rubric
    example_tags: tuple[str, ...] = ()
    rest: Mapping[str, Any] = dataclasses.field(default_factory=dict, repr=False)

    def to_json(self) -> dict[str, Any]:
        """The JSON object; what was read comes back equal."""
        return {
            "example_tags": list(self.example_tags),
            "prompt": [dict(message) for message in self.prompt],
            "prompt_id": self.prompt_id,
            "rubrics": [item_to_json(item, place) for place, item in enumerate(self.rubric.items)],
            **self.rest,
        }

    @classmethod
    def from_json(cls, row: Any, where: str = "row") -> HealthBenchRow:
        """Raises ValueError: names ``where`` and the field."""
        fields = dict(_typed(row, dict, where, "(top)"))
        prompt_id = _typed(_take(fields, "prompt_id", where), str, where, "prompt_id")
        prompt = []
        for i, message in enumerate(_typed(_take(fields, "prompt", where), list, where, "prompt")):
            message = _typed(message, dict, where, f"prompt.{i}")
            for name in ("role", "content"):
                _typed(message.get(name), str, where, f"prompt.{i}.{name}")
            prompt.append(message)
        if not prompt:
            raise ValueError(f"{where}: prompt: want one message or more; got none")
        tags = _tags(_take(fields, "example_tags", where), where, "example_tags")
        items = [
            item_from_json(item, place, where, f"rubrics.{place}")
            for place, item in enumerate(_typed(_take(fields, "rubrics", where), list, where, "rubrics"))
        ]
        try:
            rubric = Rubric(tuple(items), id=prompt_id)
        except ValueError as error:
            raise ValueError(f"{where}: rubrics: {error}") from error
        return cls(prompt_id=prompt_id, prompt=tuple(prompt), rubric=rubric, example_tags=tags, rest=fields)


def item_to_json(item: RubricItem, place: int) -> dict[str, Any]:
    """A clause as HealthBench writes it; the id is a last tag where it is not its place in the list."""
    tags = list(item.tags) if item.id == str(place) else [*item.tags, ID_TAG + item.id]
    return {"criterion": item.criterion, "points": item.points, "tags": tags}


def item_from_json(row: Any, place: int, where: str, field: str) -> RubricItem:
    """The inverse of ``item_to_json``; ValueError names ``where`` and the field below ``field``."""
    fields = _typed(row, dict, where, field)
    criterion = _typed(fields.get("criterion"), str, where, f"{field}.criterion")
    tags = _tags(fields.get("tags"), where, f"{field}.tags")
    name = str(place)
    if tags and tags[-1].startswith(ID_TAG):
        name, tags = tags[-1].removeprefix(ID_TAG), tags[:-1]
    points: Any = fields.get("points")
    try:
        return RubricItem(id=name, criterion=criterion, points=points, tags=tags)
    except ValueError as error:
        raise ValueError(f"{where}: {field}: {error}") from error


def case_row(case: Case) -> HealthBenchRow:
    """A case as an example: the opening line awaits an answer that its checklist grades."""
    return HealthBenchRow(
        prompt_id=case.id,
        prompt=({"role": "user", "content": case.opening_line},),
        rubric=checklist_rubric(case),
        example_tags=(f"department:{case.department}", f"dataset:{case.dataset}"),
    )


def read_healthbench(path: str | Path) -> Iterator[HealthBenchRow]:
    """Rows of a HealthBench file, in order.

    Raises:
        ValueError: the first broken row, by file, line and field; a prompt_id that occurs twice.
    """
    seen: dict[str, str] = {}
    for place, row in read_objects(path):
        found = HealthBenchRow.from_json(row, place)
        if found.prompt_id in seen:
            again = f"{found.prompt_id!r}, also at {seen[found.prompt_id]}"
            raise ValueError(f"{place}: prompt_id: want an id used once; got {again}")
        seen[found.prompt_id] = place
        yield found


def write_healthbench(path: str | Path, rows: Iterable[HealthBenchRow]) -> int:
    """Write rows one a line; how many."""
    count = 0
    with Path(path).open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row.to_json(), ensure_ascii=False) + "\n")
            count += 1
    return count


def _take(fields: dict[str, Any], name: str, where: str) -> Any:
    if name not in fields:
        raise ValueError(f"{where}: {name}: want the field; it is missing")
    return fields.pop(name)


def _typed(value: Any, kind: type, where: str, field: str) -> Any:
    if not isinstance(value, kind):
        want = "an object" if kind is dict else "a list" if kind is list else "text"
        raise ValueError(f"{where}: {field}: want {want}; got {type(value).__name__}")
    return value


def _tags(value: Any, where: str, field: str) -> tuple[str, ...]:
    tags = tuple(_typed(tag, str, where, f"{field}.{i}") for i, tag in enumerate(_typed(value, list, where, field)))
    if len(set(tags)) != len(tags):
        raise ValueError(f"{where}: {field}: want each tag once; got {tags!r}")
    return tags
