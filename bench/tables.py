"""What every family's report is made of: Markdown tables, promises with their verdicts, figures as files."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from bench.record import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

AnyRow = TypeVar("AnyRow", bound=Row)


def timed(rows: Iterable[AnyRow]) -> list[AnyRow]:
    return [row for row in rows if row.gate == "passed"]


def why_untimed(row: Row) -> str:
    """What stands in a table in place of a time."""
    return f"none: error over {row.tolerance:.0e}" if row.gate == "failed" else row.gate


def error_text(error: float | None) -> str:
    return "not finite" if error is None else f"{error:.1e}"


def table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table with padded columns."""
    cells = [list(header), *map(list, lines)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(header))]
    padded = [f"| {' | '.join(map(str.ljust, line, widths))} |" for line in cells]
    return "\n".join([padded[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *padded[1:]])


def time_text(seconds: float) -> str:
    return f"{seconds * 1e3:.3f} ms" if seconds < 1 else f"{seconds:.2f} s"


def share(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


# -- promises ----------------------------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True, kw_only=True)
class Line:
    """One promise, and what was measured."""

    shape: str
    threads: int
    case: str  # M of a product; dtype and density of a loss
    what: str
    peer: str
    want: float
    at_most: bool = False  # the promise is an upper bound
    got: float | None  # None: not measured
    p20: float | None = None
    p80: float | None = None
    instead: bool = False  # another line, which passes, was promised as an alternative
    void: bool = False  # the figure does not count: what it presupposes does not hold

    @property
    def reached(self) -> bool:
        if self.got is None or self.void:
            return False
        return self.got <= self.want if self.at_most else self.got >= self.want

    @property
    def passed(self) -> bool:
        return self.reached or self.instead


def acceptance_table(lines: Sequence[Line], case: str = "M") -> str:
    """Want, got and pass or miss of each line; ``case`` heads the column of Line.case."""
    body = []
    for line in lines:
        got = "not measured" if line.got is None else f"{line.got:.2f}"
        around = "" if line.p20 is None or line.p80 is None else f" ({line.p20:.2f} - {line.p80:.2f})"
        verdict = "pass" if line.reached else "other line" if line.instead else "MISS"
        if line.peer == "read" and (line.got or 0) > 1.1:
            verdict = "void"  # the probe was held up: more than everything cannot be read
        want = f"<= {line.want:.2f}" if line.at_most else f"{line.want:.2f}"
        body.append((line.shape, str(line.threads), line.case, line.what, line.peer, want, got + around, verdict))
    missed = sum(not line.passed for line in lines)
    header = ("shape", "threads", case, "what", "against", "want", "got (p20 - p80)", "")
    return f"\n{table(header, body)}\n\n{len(lines) - missed} of {len(lines)} lines pass\n"


# -- figures -----------------------------------------------------------------------------------------------------------
def save(figure: Figure, stem: Path) -> list[Path]:
    """PNG and SVG, the same bytes for the same figure; the figure is closed."""
    from matplotlib import pyplot

    stem.parent.mkdir(parents=True, exist_ok=True)
    kinds = {"png": {"Software": None}, "svg": {"Date": None}}
    paths = []
    with pyplot.rc_context({"svg.hashsalt": stem.name}):  # else ids are drawn anew each time
        for kind, metadata in kinds.items():
            paths.append(stem.with_name(f"{stem.name}.{kind}"))
            figure.savefig(paths[-1], dpi=120, bbox_inches="tight", metadata=metadata)
    pyplot.close(figure)
    return paths
