"""Rows of INT4 products of few rows to prose: C(M) / C(1) of each shape beside the roofline's, and the promises."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from bench.record import SkinnyRow
from bench.tables import Line, acceptance_table, error_text, table, time_text, timed, why_untimed

GOALS = {4: 1.5, 8: 2.7}  # C(M) / C(1) at most, with AVX2, weights streamed


def cases(rows: Iterable[SkinnyRow]) -> list[tuple[tuple[str, str], list[SkinnyRow]]]:
    """[((shape, memory), rows)] in order of appearance."""
    found: dict[tuple[str, str], list[SkinnyRow]] = {}
    for row in rows:
        found.setdefault((row.shape, row.memory), []).append(row)
    return list(found.items())


def cell(row: SkinnyRow | None) -> str:
    """C(M) / C(1), the roofline's in parentheses."""
    if row is None or row.growth is None:
        return "" if row is None else why_untimed(row)
    least = "" if row.least_growth is None else f" ({row.least_growth:.2f})"
    return f"{row.growth[0]:.2f}{least}"


def share_text(row: SkinnyRow | None) -> str:
    """Of the roofline: the least time over the time."""
    if row is None or not row.least_s or not row.median_s:
        return ""
    return f"{row.least_s / row.median_s:.0%}"


def case_table(rows: Sequence[SkinnyRow]) -> str:
    """One shape and store: a line per mode and instruction set."""
    ms = sorted({row.m for row in rows})
    lines = []
    for name, isa in dict.fromkeys((row.arm, row.isa) for row in rows):
        found = {row.m: row for row in rows if (row.arm, row.isa) == (name, isa)}
        one = found.get(1)
        first = "" if one is None else time_text(one.median_s) if one.median_s else why_untimed(one)
        shares = "/".join(share_text(found.get(m)) for m in ms)
        error = error_text(one.error) if one is not None and one.gate != "absent" else ""
        lines.append((f"{name} ({isa})", first, *(cell(found.get(m)) for m in ms if m > 1), shares, error))
    header = ("arm", "C(1)", *(f"C({m}) / C(1)" for m in ms if m > 1), "of the roofline, by M", "error")
    return table(header, lines)


def heading(rows: Sequence[SkinnyRow]) -> str:
    """What the table is about: sizes, where the weights lie, and what was measured to be possible."""
    first = rows[0]
    read = next((row.read_gbytes_s for row in rows if row.read_gbytes_s), None)
    peaks = {f"{row.arm} ({row.isa})": row.peak_gmacs for row in rows if row.peak_gmacs}
    told = "; peaks " + ", ".join(f"{name} {peak:.0f}" for name, peak in peaks.items()) + " GMAC/s" if peaks else ""
    where = f"{first.copies} copies of {first.weight_bytes / 1e6:.2f} MB, {first.memory}"
    return f"K = {first.k}, N = {first.n}, group {first.group_size}; {where}" + (
        f", read {read:.1f} GB/s{told}" if read else ""
    )


def tables(rows: Iterable[SkinnyRow]) -> str:
    """Text for the terminal."""
    return "\n".join(
        f"\n{shape}, {memory}: {heading(members)}\n{case_table(members)}" for (shape, memory), members in cases(rows)
    )


def acceptance(rows: Iterable[SkinnyRow]) -> list[Line]:
    """What was promised of few rows with AVX2, for each mode; the roofline stands where a peer would."""
    lines = []
    for row in rows:
        if row.isa == "avx2" and row.memory == "streamed" and row.m in GOALS:
            got = dict(zip(("got", "p20", "p80"), row.growth or (None,) * 3, strict=True))
            peer = "roofline" if row.least_growth is None else f"roofline {row.least_growth:.2f}"
            place = {"shape": row.shape, "threads": 1, "case": str(row.m), "what": f"{row.arm} C(M) / C(1)"}
            lines.append(Line(**place, peer=peer, want=GOALS[row.m], at_most=True, **got))
    return lines


def sections(rows: Sequence[SkinnyRow]) -> list[str]:
    """Few rows: the promises if measured, then each shape and store."""
    parts = []
    lines = acceptance(rows)
    if lines:
        parts.append(f"### Promises of few rows\n{acceptance_table(lines)}")
    for (shape, memory), members in cases(rows):
        parts.append(f"### Few rows, {shape}, {memory}\n\n{heading(members)}.\n\n{case_table(timed(members))}\n")
    return parts
