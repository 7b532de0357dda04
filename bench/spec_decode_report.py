"""Rows of tree drafting and verification to prose: tables of an op, and the promises."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from bench.record import SpecRow
from bench.tables import Line, acceptance_table, error_text, share, table, timed, why_untimed

SMALL_GOALS = {  # milliseconds a request
    "verify.n8.v49152.greedy": 0.1,
    "verify.n8.v49152.coupled.filtered": 0.25,
    "verify.n8.v49152.target_only.filtered": 0.25,
}
LARGE = "verify.n32.v151936."
FASTER, SMALLER = 5.0, 20.0  # than softmax of all rows
OURS = ("m3", "m3_cuda")  # what others are compared with, on the CPU and on a GPU
PAGE_BYTES = 4096  # a peak is a number of pages, and at least one


def where(row: SpecRow) -> str:
    return f"{row.case_threads} thread(s)" if row.device == "cpu" else "on the GPU, L2 flushed"


def cases(rows: Iterable[SpecRow]) -> list[tuple[tuple[str, int], list[SpecRow]]]:
    """[((case, threads), rows)] in order of appearance."""
    found: dict[tuple[str, int], list[SpecRow]] = {}
    for row in rows:
        found.setdefault((row.shape, row.case_threads), []).append(row)
    return list(found.items())


def short_time(seconds: float) -> str:
    return f"{seconds * 1e6:.1f} us" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"


def mebibytes(count: int | None) -> str:
    return "" if count is None else f"{count / 2**20:.1f}"


def ratio_text(row: SpecRow) -> str:
    """How many times as fast ours is."""
    value = next((row.ratios[name] for name in OURS if name in row.ratios), None) if row.ratios else None
    return "" if value is None or value[0] == 0 else f"{1 / value[0]:.2f}"


def case_lines(rows: Sequence[SpecRow]) -> list[tuple[str, ...]]:
    """The arms of one case, in the order they were measured."""
    lines = []
    for row in rows:
        visited = "" if row.visited is None else f"{row.visited:.1f}"
        if row.median_s is None or row.p20_s is None or row.p80_s is None:
            lines.append((row.shape, row.arm, why_untimed(row), "", "", "", visited, "", error_text(row.error)))
            continue
        around = f" ({short_time(row.p20_s)} - {short_time(row.p80_s)})"
        each = short_time(row.median_s / row.requests)
        ours = row.arm.startswith("m3")
        lines.append(
            (
                row.shape,
                f"{row.arm} ({row.launch})" if row.launch else row.arm,
                short_time(row.median_s) + around,
                each if row.requests > 1 else "",
                ratio_text(row),
                share(row.roofline_share) if ours else "",
                visited if ours else "",
                mebibytes(row.peak_bytes),
                error_text(row.error),
            )
        )
    return lines


def op_table(rows: Sequence[SpecRow]) -> str:
    """All cases of one op."""
    lines = [line for _, members in cases(rows) for line in case_lines(members)]
    header = [
        "case",
        "arm",
        "time (p20 - p80)",
        "a request",
        "m3 ahead",
        "of roofline",
        "rows visited",
        "peak MiB",
        "error",
    ]
    kept = [column for column in range(len(header)) if any(line[column] for line in lines)]
    return table([header[column] for column in kept], ([line[column] for column in kept] for line in lines))


def tables(rows: Iterable[SpecRow]) -> str:
    """Text for the terminal."""
    parts = []
    for (shape, _), members in cases(rows):
        read = next((f", read {row.read_gbytes_s:.1f} GB/s" for row in members if row.read_gbytes_s), "")
        parts.append(f"\n{shape}, {where(members[0])}{read}\n{op_table(members)}")
    return "\n".join(parts)


# -- promises ---------------------------------------------------------------------------------------------------------
def acceptance(rows: Iterable[SpecRow]) -> list[Line]:
    """What was promised of verification on one thread."""
    lines = []
    for (shape, threads), members in cases(row for row in rows if row.device == "cpu"):
        arms = {row.arm: row for row in timed(members)}
        ours, peer = arms.get("m3"), arms.get("torch_all_rows")
        place: dict[str, Any] = {"shape": shape, "threads": threads, "case": members[0].mode or ""}
        if threads != 1:
            continue
        if shape in SMALL_GOALS:
            got = per_request(ours)
            what = "tree_verify, ms a request"
            lines.append(Line(**place, what=what, peer="goal", want=SMALL_GOALS[shape], at_most=True, **got))
        elif shape.startswith(LARGE):
            value = (ours.ratios or {}).get("torch_all_rows") if ours else None
            got = dict(zip(("got", "p20", "p80"), value or (None,) * 3, strict=True))
            lines.append(Line(**place, what="times as fast", peer="torch_all_rows", want=FASTER, **got))
            if members[0].mode != "greedy":
                memory = None
                if ours and peer and ours.peak_bytes is not None and peer.peak_bytes is not None:
                    memory = peer.peak_bytes / max(ours.peak_bytes, PAGE_BYTES)
                lines.append(Line(**place, what="times less memory", peer="torch_all_rows", want=SMALLER, got=memory))
    return lines


def per_request(row: SpecRow | None) -> dict[str, float | None]:
    """Milliseconds a request: got, p20, p80."""
    times = (None,) * 3 if row is None else (row.median_s, row.p20_s, row.p80_s)
    scaled = [None if time is None or row is None else time * 1e3 / row.requests for time in times]
    return dict(zip(("got", "p20", "p80"), scaled, strict=True))


def gate_lines(rows: Iterable[SpecRow]) -> list[str]:
    """What the output gate of attention adds, a line a case."""
    found = []
    for (shape, threads), members in cases(rows):
        arms = {row.arm: row for row in timed(members)}
        value = (arms["m3"].ratios or {}).get("m3_gated") if {"m3", "m3_gated"} <= set(arms) else None
        if value:
            found.append((shape, str(threads), f"{value[0] - 1:+.1%} ({value[1] - 1:+.1%} - {value[2] - 1:+.1%})"))
    return [] if not found else [table(("case", "threads", "gated over plain (p20 - p80)"), found)]


def sections(rows: Sequence[SpecRow]) -> list[str]:
    """Tree drafting and verification: the promises if measured, then each op."""
    parts = []
    lines = acceptance(rows)
    if lines:
        parts.append(f"### Promises of tree verification\n{acceptance_table(lines, 'mode')}")
    for op in dict.fromkeys(row.op for row in rows):
        for threads in sorted({row.case_threads for row in rows if row.op == op}):
            members = [row for row in rows if (row.op, row.case_threads) == (op, threads)]
            parts.append(f"### {op}, {where(members[0])}\n\n{op_table(members)}\n")
        gates = gate_lines(row for row in rows if row.op == op)
        parts += [f"What the gate costs:\n\n{text}\n" for text in gates]
    return parts
