"""What a conversion kept and what it lost, counted: the report that goes with every converted file.

A row is converted, skipped for a named reason, or malformed. Of a converted row every field is kept or dropped; fields
of the case that the source does not give and the schema wants are defaults, counted too.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

MALFORMED = "malformed"
MAX_PROBLEMS = 20  # malformed rows that are named one by one; the others are counted; ours


class SkippedRow(Exception):  # noqa: N818 - no error: the row is sound and outside what is converted
    """The row is sound and cannot be converted; the message is the reason, under which it is counted."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossReport:
    """Counts are of rows for ``skipped``; of fields, sentences or entries for ``kept``, ``dropped``, ``defaults``.

    ``provenance``: from a field of the case to how often which author wrote it ("facts (rule)"). ``problems``: the
    first malformed rows, each by file, line and field.
    """

    format: str
    source: str
    licence: str
    read: int
    converted: int
    skipped: Mapping[str, int]
    kept: Mapping[str, int]
    dropped: Mapping[str, int]
    defaults: Mapping[str, int]
    provenance: Mapping[str, int]
    problems: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The report as JSON."""
        return dataclasses.asdict(self)

    def rows(self) -> Iterator[tuple[str, str, str]]:
        """(what, which, how many or why), for a table."""
        yield "rows", "read", str(self.read)
        yield "rows", "converted", str(self.converted)
        for what in ("skipped", "kept", "dropped", "defaults", "provenance"):
            for name, count in getattr(self, what).items():
                yield what, name, str(count)
        for problem in self.problems:
            yield MALFORMED, problem, ""
        for warning in self.warnings:
            yield "warning", warning, ""

    def table(self) -> Any:
        """The report as a ``rich.table.Table``."""
        from rich.table import Table

        table = Table("what", "which", "count", title=f"{self.format}: {self.source} ({self.licence})")
        for row in self.rows():
            table.add_row(*row)
        return table


class Tally:
    """Counts in the making. A row counts into its own tally, which is added when the row is converted."""

    def __init__(self) -> None:
        self.kept: collections.Counter[str] = collections.Counter()
        self.dropped: collections.Counter[str] = collections.Counter()
        self.defaults: collections.Counter[str] = collections.Counter()
        self.provenance: collections.Counter[str] = collections.Counter()
        self.warnings: collections.Counter[str] = collections.Counter()

    def add(self, other: Tally) -> None:
        """Count in what another counted."""
        for name, counter in vars(self).items():
            counter.update(getattr(other, name))

    def fields(self, row: Mapping[str, Any], kept: Iterable[str]) -> None:
        """Count each field of a row that holds anything: kept if it is one of ``kept`` (dotted) or below one.

        A field of which nothing is kept is counted as a whole, whatever is in it.
        """
        self._fields(row, frozenset(kept), "")

    def _fields(self, row: Mapping[str, Any], kept: frozenset[str], above: str) -> None:
        for key, value in row.items():
            name = f"{above}{key}"
            if value in (None, "", [], {}):
                continue
            if name in kept:
                self.kept[name] += 1
            elif isinstance(value, Mapping) and any(one.startswith(f"{name}.") for one in kept):
                self._fields(value, kept, f"{name}.")
            else:
                self.dropped[name] += 1


def field(row: Mapping[str, Any], name: str, kind: type) -> Any:
    """The value of a dotted field.

    Raises:
        ValueError: names the field; it is missing or of another type.
    """
    value: Any = row
    for part in name.split("."):
        if not isinstance(value, Mapping) or part not in value:
            raise ValueError(f"{name}: want {_KINDS[kind]}; it is missing")
        value = value[part]
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(f"{name}: want {_KINDS[kind]}; got {type(value).__name__}")
    return value


_KINDS = {str: "text", dict: "an object", list: "a list", int: "a whole number"}


def texts(row: Mapping[str, Any], name: str) -> list[str]:
    """The value of a dotted field that is a list of texts; ValueError names the entry that is none."""
    found = field(row, name, list)
    for i, one in enumerate(found):
        if not isinstance(one, str):
            raise ValueError(f"{name}.{i}: want text; got {type(one).__name__}")
    return found


def report(
    tally: Tally,
    *,
    name: str,
    path: Path,
    licence: str,
    converted: int,
    skipped: Mapping[str, int],
    problems: tuple[str, ...],
    caveats: tuple[str, ...],
) -> LossReport:
    """The report of a tally, names in order."""
    warnings = tuple(f"{warning} ({count})" if count > 1 else warning for warning, count in tally.warnings.items())
    return LossReport(
        format=name,
        source=path.name,
        licence=licence,
        read=converted + sum(skipped.values()),
        converted=converted,
        skipped=dict(sorted(skipped.items())),
        kept=dict(sorted(tally.kept.items())),
        dropped=dict(sorted(tally.dropped.items())),
        defaults=dict(sorted(tally.defaults.items())),
        provenance=dict(sorted(tally.provenance.items())),
        problems=problems,
        warnings=(*caveats, *warnings),
    )
