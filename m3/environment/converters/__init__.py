"""Other projects' clinical data as cases, recorded consultations and rubrics, with a report of what was lost.

``convert(name, path)`` reads one of ``FORMATS``. Nothing is invented: what a source does not say is null, "unknown" or
absent, and every case is valid ``m3.case/v1``. A row is converted, skipped for a named reason, or malformed: then it is
named by file, line and field and counted, or with ``strict`` it ends the conversion. The data is the user's to bring.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import gzip
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from m3.environment.case import Case, write_cases
from m3.environment.converters import agentclinic, craft_md, ddxplus, healthbench, kqa, mediq, primock57
from m3.environment.converters.loss import MALFORMED, MAX_PROBLEMS, LossReport, SkippedRow, Tally, report
from m3.environment.trajectory import Trajectory, write_trajectories
from m3.rewards.rubric import HealthBenchRow, write_healthbench
from m3kernels.checks import refuse

__all__ = ["FORMATS", "Conversion", "Format", "LossReport", "convert"]

Row = Mapping[str, Any]
Made = Case | Trajectory | HealthBenchRow
AGAIN = "the same again"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conversion:
    """What came out of a file; the parts that a format does not give are empty."""

    cases: tuple[Case, ...] = ()
    trajectories: tuple[Trajectory, ...] = ()
    rows: tuple[HealthBenchRow, ...] = ()
    report: LossReport

    def write(self, folder: str | Path) -> tuple[Path, ...]:
        """Write cases.jsonl, trajectories.jsonl and rows.jsonl, as far as there are any, and loss.json; their paths."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        written = []
        if self.cases:
            write_cases(folder / "cases.jsonl", self.cases)
            written.append(folder / "cases.jsonl")
        if self.trajectories:
            write_trajectories(folder / "trajectories.jsonl", self.trajectories)
            written.append(folder / "trajectories.jsonl")
        if self.rows:
            write_healthbench(folder / "rows.jsonl", self.rows)
            written.append(folder / "rows.jsonl")
        loss = folder / "loss.json"
        loss.write_text(json.dumps(self.report.to_json(), ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
        return (*written, loss)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Format:
    """One source. ``gives``: of "cases", "trajectories", "rows"; ``input``: what the path is."""

    name: str
    licence: str
    gives: tuple[str, ...]
    input: str
    caveats: tuple[str, ...]
    read: Callable[[Path], Iterator[tuple[str, Row | str]]]  # (where, a row, or what is wrong with it)
    make: Callable[[Path], Callable[[Row, Tally], Iterable[Made]]]  # a converter of rows, new for each file


def convert(name: str, path: str | Path, *, limit: int | None = None, strict: bool = False) -> Conversion:
    """Convert a file of a known format.

    Args:
        name: of ``FORMATS``.
        path: a .jsonl or .jsonl.gz file; of ddxplus the folder of its two files.
        limit: read at most so many rows (of ddxplus: sample at most so many cases); None: all.
        strict: the first malformed row ends the conversion.
    Raises:
        ValueError: an unknown format; with ``strict`` a malformed row, by file, line and field.
        OSError: no such file.
    """
    if name not in FORMATS:
        raise refuse("convert", "name", f"one of {', '.join(FORMATS)}", repr(name))
    if limit is not None and limit < 1:
        raise refuse("convert", "limit", "1 or more, or None", limit)
    form, path = FORMATS[name], Path(path)
    make, tally = form.make(path), Tally()
    made: list[Made] = []
    seen: set[str] = set()
    skipped: collections.Counter[str] = collections.Counter()
    problems: list[str] = []
    converted = 0
    for where, row in itertools.islice(form.read(path), limit):
        own = Tally()
        try:
            if isinstance(row, str):
                raise ValueError(row)
            found = list(make(row, own))
        except SkippedRow as reason:
            skipped[str(reason)] += 1
            continue
        except ValueError as error:
            if strict:
                raise ValueError(f"{where}: {error}") from error
            skipped[MALFORMED] += 1
            if len(problems) < MAX_PROBLEMS:
                problems.append(f"{where}: {error}")
            continue
        ids = {_identity(one) for one in found}
        if ids & seen:
            skipped[AGAIN] += 1
            continue
        seen |= ids
        made += found
        tally.add(own)
        converted += 1
    return Conversion(
        cases=tuple(one for one in made if isinstance(one, Case)),
        trajectories=tuple(one for one in made if isinstance(one, Trajectory)),
        rows=tuple(one for one in made if isinstance(one, HealthBenchRow)),
        report=report(
            tally,
            name=name,
            path=path,
            licence=form.licence,
            converted=converted,
            skipped=skipped,
            problems=tuple(problems),
            caveats=form.caveats,
        ),
    )


def _identity(made: Made) -> str:
    if isinstance(made, Trajectory):
        return f"trajectory {made.case} {made.policy} {made.rollout}"
    return f"case {made.id}" if isinstance(made, Case) else f"row {made.prompt_id}"


def _lines(path: Path) -> Iterator[tuple[str, Row | str]]:
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
        for line, text in enumerate(file, 1):
            if not text.strip():
                continue
            try:
                row = json.loads(text)
            except json.JSONDecodeError as error:
                yield f"{path}:{line}", f"want JSON; {error.msg}"
                continue
            yield f"{path}:{line}", row if isinstance(row, dict) else f"want an object; got {type(row).__name__}"


def _one(make: Callable[[Row, Tally], Made], path: Path) -> Callable[[Row, Tally], Iterable[Made]]:
    return lambda row, tally: (make(row, tally),)


def _primock57(path: Path) -> Callable[[Row, Tally], Iterable[Made]]:
    return primock57.converted


def _craft_md(path: Path) -> Callable[[Row, Tally], Iterable[Made]]:
    """The case comes with its first trajectory."""
    known: dict[str, list[str]] = {}

    def make(row: Row, tally: Tally) -> list[Made]:
        trajectory = craft_md.trajectory_of(row, tally)
        says = [row["answer"], *row["facts"]]
        if trajectory.case not in known:
            case = craft_md.case_of(row, tally)
            known[trajectory.case] = says
            return [case, trajectory]
        if known[trajectory.case] != says:
            raise ValueError(f"case_id: want one answer and one list of facts for {row['case_id']!r}; got others")
        return [trajectory]

    return make


def _ddxplus_rows(path: Path) -> Iterator[tuple[str, Row | str]]:
    yield from ddxplus.rows(path, ddxplus.Config())


def _ddxplus(path: Path) -> Callable[[Row, Tally], Iterable[Made]]:
    evidences, config = ddxplus.read_evidences(path), ddxplus.Config()
    return lambda row, tally: (ddxplus.case_of(row, evidences, config, tally),)


def _format(name: str, source: Any, gives: tuple[str, ...], make: Any, **more: Any) -> tuple[str, Format]:
    fields = {"input": "a .jsonl or .jsonl.gz file", "read": _lines, **more}
    return name, Format(name=name, licence=source.LICENCE, caveats=source.CAVEATS, gives=gives, make=make, **fields)


FORMATS: Mapping[str, Format] = MappingProxyType(
    dict(
        (
            _format("agentclinic", agentclinic, ("cases",), functools.partial(_one, agentclinic.case_of)),
            _format("mediq", mediq, ("cases",), functools.partial(_one, mediq.case_of)),
            _format("primock57", primock57, ("cases", "trajectories"), _primock57),
            _format(
                "ddxplus",
                ddxplus,
                ("cases",),
                _ddxplus,
                read=_ddxplus_rows,
                input=f"a folder with {ddxplus.CONDITIONS} and {ddxplus.EVIDENCES}",
            ),
            _format("craft_md", craft_md, ("cases", "trajectories"), _craft_md),
            _format("kqa", kqa, ("rows",), functools.partial(_one, kqa.row_of)),
            _format("healthbench", healthbench, ("rows",), functools.partial(_one, healthbench.row_of)),
        )
    )
)
