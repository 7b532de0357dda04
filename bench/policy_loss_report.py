"""Rows of the policy loss to prose: tables of a case, the promises, a figure of time against memory for each head."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.record import LossRow, Triple
from bench.tables import Line, acceptance_table, error_text, save, table, time_text, timed, why_untimed
from m3kernels.policy_loss.arguments import WORKSPACE, WORKSPACE_ROWS

UNIT_GOALS = {1.0: 3.2, 0.4: 1.3}  # fp32 products that m3_one_pass may take, by density
TILE_BYTES = 16 << 20  # beside the workspace: a tile of W, of dz, and dX
BF16_OVER = {"torch": 15.0, "trl": 15.0}
AHEAD, SMALLER = 1.3, 3.0  # of every rival: in time without more memory, or in memory without more time
EQUAL = 1.05  # two figures no further apart than this count as equal
ACCEPTED_HEADS = ("smollm2-135m.t1024", "qwen3-0.6b.t256")
LONG_HEADS = ("narrow.t8192", "narrow.t65536")
LONG_GROWTH = 1.1


def is_product(row: LossRow) -> bool:
    return row.arm.startswith("gemm")


def cases(rows: Iterable[LossRow]) -> list[tuple[tuple[str, str, float, int], list[LossRow]]]:
    """[((shape, dtype, density, threads of the case), rows)] in order of appearance."""
    found: dict[tuple[str, str, float, int], list[LossRow]] = {}
    for row in rows:
        found.setdefault((row.shape, row.dtype, row.density, row.case_threads), []).append(row)
    return list(found.items())


def triple_text(value: Triple | None) -> str:
    return "" if value is None else f"{value[0]:.2f} ({value[1]:.2f} - {value[2]:.2f})"


def mebibytes(count: int | None) -> str:
    return "" if count is None else f"{count / 2**20:.0f}"


def case_table(rows: Sequence[LossRow]) -> str:
    """One head, dtype, density and thread count: every arm, fastest first; those without a time last, with why."""
    lines = []
    ours = "m3_one_pass@cuda" if any(row.arm == "m3_one_pass@cuda" for row in rows) else "m3_one_pass"
    for row in sorted(timed(rows), key=lambda row: row.median_s or 0.0):
        assert row.median_s is not None
        over = (row.ratios or {}).get(ours)
        lines.append(
            (
                row.arm,
                time_text(row.median_s),
                triple_text(row.units),
                triple_text(row.units_bf16),
                mebibytes(row.peak_bytes),
                mebibytes(row.workspace_bytes),
                error_text(row.error),
                "" if over is None else f"{over[0]:.2f}",
            )
        )
    for row in rows:
        if row.gate != "passed":
            error = error_text(row.error) if row.gate == "failed" else ""
            lines.append((row.arm, why_untimed(row), "", "", "", "", error, ""))
    header = ["arm", "time", "fp32 units", "bf16 units", "peak MiB", "workspace MiB", "error", f"over {ours}"]
    empty = [not any(line[column] for line in lines) for column in range(len(header))]
    kept = [column for column, nothing in enumerate(empty) if not nothing]
    return table([header[column] for column in kept], ([line[column] for column in kept] for line in lines))


def tables(rows: Iterable[LossRow]) -> str:
    """Text for the terminal."""
    parts = []
    for (shape, dtype, density, threads), members in cases(rows):
        where = "on the GPU" if members[0].device == "cuda" else f"{threads} thread(s)"
        parts.append(f"\n{shape}, {dtype}, density {density}, {where}\n{case_table(members)}")
    return "\n".join(parts)


def acceptance(rows: Iterable[LossRow]) -> list[Line]:
    """What was promised of the policy loss on a CPU, for the heads of the acceptance run and the long batch."""
    rows = [row for row in rows if row.device == "cpu"]
    lines = []
    for (shape, dtype, density, threads), members in cases(rows):
        if shape in ACCEPTED_HEADS and density in UNIT_GOALS:
            place = {"shape": shape, "threads": threads, "case": f"{dtype} {density}"}
            lines += case_lines(place, {row.arm: row for row in timed(members)}, dtype, density)
    return lines + long_lines(rows)


def case_lines(place: Mapping[str, Any], arms: Mapping[str, LossRow], dtype: str, density: float) -> list[Line]:
    """The promises about one case."""
    ours, lines = arms.get("m3_one_pass"), []
    if dtype == "fp32":
        got = dict(zip(("got", "p20", "p80"), (ours and ours.units) or (None,) * 3, strict=True))
        what = "m3_one_pass in fp32 products"
        lines.append(Line(**place, what=what, peer="gemm_fp32", want=UNIT_GOALS[density], at_most=True, **got))
    else:
        for peer, want in BF16_OVER.items():
            value = (ours.ratios or {}).get(peer) if ours else None
            got = dict(zip(("got", "p20", "p80"), value or (None,) * 3, strict=True))
            lines.append(Line(**place, what="m3_one_pass over the peer", peer=peer, want=want, **got))
    beyond = None
    if ours and ours.peak_bytes is not None:
        d_weight = 4 * ours.vocabulary * ours.hidden  # accumulated in fp32
        beyond = (ours.peak_bytes - d_weight) / 2**20
    what, want = "m3_one_pass peak beyond fp32 dW, MiB", tile_budget(ours) / 2**20 if ours else 0.0
    lines.append(Line(**place, what=what, peer="one tile budget", want=want, at_most=True, got=beyond))
    return lines + rival_lines(place, arms)


def tile_budget(row: LossRow) -> int:
    """Bytes that linear_policy_loss may hold beside dW: its default workspace, and a tile."""
    return max(WORKSPACE["cpu"], 4 * WORKSPACE_ROWS * row.vocabulary) + TILE_BYTES


def rival_lines(place: Mapping[str, Any], arms: Mapping[str, LossRow]) -> list[Line]:
    """Of each rival ours was to be ahead: in time without more memory, or in memory without more time.

    Shown against the rival that comes closest to having neither, in both measures; what counts is the better of them.
    """
    ours = arms.get("m3_one_pass")
    rivals = {name: row for name, row in arms.items() if not name.startswith("m3_") and not is_product(row)}
    ratios = (ours.ratios if ours else None) or {}
    found = {
        name: (ratios[name], row.peak_bytes / ours.peak_bytes)
        for name, row in rivals.items()
        if ours and ours.peak_bytes and row.peak_bytes and name in ratios
    }
    if not found:
        return []
    faster = {name: time[0] / AHEAD if memory >= 1 / EQUAL else 0.0 for name, (time, memory) in found.items()}
    smaller = {name: memory / SMALLER if time[0] >= 1 / EQUAL else 0.0 for name, (time, memory) in found.items()}
    closest = min(found, key=lambda name: max(faster[name], smaller[name]))
    time, memory = found[closest]
    first = {
        "what": "time over the closest rival",
        "want": AHEAD,
        **dict(zip(("got", "p20", "p80"), time, strict=True)),
    }
    second = {"what": "or: memory of the closest rival", "want": SMALLER, "got": memory}
    return [
        Line(**place, peer=closest, **first, instead=smaller[closest] >= 1, void=faster[closest] == 0),
        Line(**place, peer=closest, **second, instead=faster[closest] >= 1, void=smaller[closest] == 0),
    ]


def long_lines(rows: Iterable[LossRow]) -> list[Line]:
    """The workspace of many tokens over that of few."""
    found = {(row.shape, row.case_threads): row for row in timed(rows) if row.arm == "m3_one_pass"}
    lines = []
    for threads in sorted({count for shape, count in found if shape in LONG_HEADS}):
        short, long = (found.get((shape, threads)) for shape in LONG_HEADS)
        sizes = [row.workspace_bytes if row else None for row in (short, long)]
        got = None if None in sizes else sizes[1] / sizes[0]
        what = "m3_one_pass workspace over that of T = 8192"
        case = "fp32 1.0" if long is None else f"{long.dtype} {long.density}"
        place = {"shape": LONG_HEADS[1], "threads": threads, "case": case}
        lines.append(Line(**place, what=what, peer=LONG_HEADS[0], want=LONG_GROWTH, at_most=True, got=got))
    return lines


def plot(rows: Sequence[LossRow], stem: Path) -> list[Path]:
    """Time in products against peak memory, an arm a point; columns dtype and density, rows thread counts."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    arms = [row for row in timed(rows) if row.peak_bytes and not is_product(row)]
    columns = list(dict.fromkeys((row.dtype, row.density) for row in arms))
    threads = sorted({row.case_threads for row in arms})
    size = (4.2 * len(columns), 3.6 * len(threads))
    figure, axes = pyplot.subplots(len(threads), len(columns), figsize=size, squeeze=False)
    names = list(dict.fromkeys(row.arm for row in arms))
    colours = {name: pyplot.get_cmap("tab20")(index % 20) for index, name in enumerate(names)}
    for (line, count), (column, (dtype, density)) in itertools.product(enumerate(threads), enumerate(columns)):
        axis, first = axes[line][column], arms[0]
        for row in arms:
            units = row.units or row.units_bf16
            if (row.case_threads, row.dtype, row.density) == (count, dtype, density) and units:
                mark = "*" if row.arm.startswith("m3_") else "o"
                options = {"color": colours[row.arm], "marker": mark, "s": 110 if mark == "*" else 45}
                axis.scatter((row.peak_bytes or 0) / 2**20, units[0], label=row.arm, **options)
        gradients = next(row.gradient_bytes for row in arms if (row.dtype, row.density) == (dtype, density))
        axis.axvline(gradients / 2**20, color="black", linestyle=":", label="gradients")
        if first.device == "cpu":
            axis.axhline(3 * density, color="black", linestyle="--", label="three products")
        where = "GPU" if first.device == "cuda" else f"{count} thread(s)"
        axis.set(xscale="log", yscale="log", title=f"{dtype}, density {density}, {where}")
        for scale in (axis.xaxis, axis.yaxis):
            scale.set_major_formatter("{x:g}")
            scale.set_minor_formatter("{x:g}")
        axis.tick_params(which="minor", labelsize=7)
        axis.set_xlabel("peak memory beyond the inputs, MiB")
        axis.grid(True, which="both", alpha=0.25)
    for line in axes:
        line[0].set_ylabel("time in products (T, D) x (D, V)")
    handles = {
        label: handle for axis in axes.flat for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    first = rows[0]
    figure.suptitle(f"{first.op} {first.shape}: T = {first.tokens}, D = {first.hidden}, V = {first.vocabulary}")
    figure.tight_layout()
    return save(figure, stem)


def sections(rows: Sequence[LossRow], slug: str, out: Path) -> list[str]:
    """Policy loss: the promises if measured, then each head."""
    parts = []
    lines = acceptance(rows)
    if lines:
        parts.append(f"### Promises of the policy loss\n{acceptance_table(lines, 'case')}")
    for shape in dict.fromkeys(row.shape for row in rows):
        members = [row for row in rows if row.shape == shape]
        first = members[0]
        sizes = f"T = {first.tokens} in {first.sequences} sequences, D = {first.hidden}, V = {first.vocabulary}"
        parts.append(f"### {first.op} {shape}\n\n{sizes}.\n")
        if any(row.peak_bytes and not is_product(row) for row in timed(members)):
            stem = f"{first.op}-{shape}-{slug}"
            plot(members, out.parent / out.stem / stem)
            parts.append(f"![time against memory]({out.stem}/{stem}.png) ([SVG]({out.stem}/{stem}.svg))\n")
        for (_, dtype, density, threads), case in cases(members):
            where = "on the GPU" if first.device == "cuda" else f"{threads} thread(s)"
            parts.append(f"**{dtype}, density {density}, {where}**\n\n{case_table(case)}\n")
    return parts
