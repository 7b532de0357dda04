"""Rows to prose: tables for the terminal, the acceptance lines, docs/benchmarks.md and its plots."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from bench import record
from bench.record import GemmRow, LossRow, Row, Triple

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OURS = ("m3_int8", "m3_int16", "m3_exact")


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


def case_table(rows: Sequence[GemmRow]) -> str:
    """One shape, M and thread count: every arm, fastest first; arms without a time last, with the reason."""
    lines = []
    default = "m3_exact" if any(row.device == "cuda" for row in rows) else "m3_int16"
    for row in sorted(timed(rows), key=lambda row: row.median_s or 0.0):
        assert row.median_s is not None and row.p20_s is not None and row.p80_s is not None
        over = (row.ratios or {}).get(default)
        faster = "" if over is None else f"{over[0]:.2f}"
        lines.append(
            (
                f"{row.arm} ({note})" if (note := row.isa or row.launch) else row.arm,
                f"{time_text(row.median_s)} ({row.p20_s * 1e3:.3f} - {row.p80_s * 1e3:.3f})",
                f"{row.gmacs:.1f}",
                f"{row.gbytes_s:.1f}",
                share(row.read_share) if row.m <= 4 else "",
                share(row.peak_share),
                f"{row.error:.1e}",
                faster,
            )
        )
    for row in rows:
        if row.gate != "passed":
            error = error_text(row.error) if row.gate == "failed" else ""
            lines.append((row.arm, why_untimed(row), "", "", "", "", error, ""))
    header = ("arm", "time (p20 - p80)", "GMAC/s", "GB/s", "of read", "of peak", "error", f"over {default}")
    return table(header, lines)


def cases(rows: Iterable[GemmRow]) -> list[tuple[tuple[str, str, int, int], list[GemmRow]]]:
    """[((op, shape, threads of the case, m), rows)] in order of appearance."""
    found: dict[tuple[str, str, int, int], list[GemmRow]] = {}
    for row in rows:
        found.setdefault((row.op, row.shape, row.case_threads, row.m), []).append(row)
    return list(found.items())


def tables(rows: Iterable[GemmRow]) -> str:
    """Text for the terminal."""
    parts = []
    for (op, shape, threads, m), members in cases(rows):
        read = next((f", read {row.read_gbytes_s:.1f} GB/s" for row in members if row.read_gbytes_s), "")
        parts.append(f"\n{op} {shape}, M = {m}, {threads} thread(s){read}\n{case_table(members)}")
    return "\n".join(parts)


# -- acceptance -------------------------------------------------------------------------------------------------------
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


INT8_OVER_ORT = {"4096x4096": {1: 1.15, 4: 1.6, 16: 1.6, 128: 1.6}, "4096x12288": {1: 1.5, 4: 1.5, 16: 1.5, 128: 1.5}}
READ_SHARE = {"4096x4096": {1: 0.85}}
INT16_OVER_EXACT = {1: 2.5, 4: 2.5}
EXACT_OVER_EXACT = {1: 1.8, 4: 1.8, 128: 1.0}
TWO_THREADS = {16: 1.8, 128: 1.8}


def fastest(rows: Iterable[GemmRow], accept: Callable[[GemmRow], bool]) -> GemmRow | None:
    """The peer of least median time among those accepted."""
    peers = [row for row in timed(rows) if not row.arm.startswith("m3_") and accept(row)]
    return min(peers, key=lambda row: row.median_s or 0.0, default=None)


def acceptance(rows: Iterable[GemmRow]) -> list[Line]:
    """What was promised for 4096 x 4096 and 4096 x 12288 at group 128 on one thread, and for two threads over one."""
    lines = []
    for (op, shape, threads, m), members in cases(rows):
        if op == "int4_gemm" and shape in INT8_OVER_ORT and threads in (1, 2):
            lines += case_lines(shape, threads, m, members)
    return lines


def case_lines(shape: str, threads: int, m: int, members: Sequence[GemmRow]) -> list[Line]:
    """The promises about one shape, thread count and M."""
    ours = {row.arm: row for row in timed(members)}

    def line(arm: str, what: str, peer: str | None, want: float) -> Line:
        ratios = ours[arm].ratios if arm in ours else None
        value = None if ratios is None or peer is None else ratios.get(peer)
        got, p20, p80 = value if value is not None else (None, None, None)
        named = {"shape": shape, "threads": threads, "case": str(m), "what": f"{arm} {what}", "peer": peer or "none"}
        return Line(**named, want=want, got=got, p20=p20, p80=p80)

    if threads == 2:
        return [line(arm, "over one thread", f"{arm}@1t", TWO_THREADS[m]) for arm in OURS if m in TWO_THREADS]
    ort = fastest(members, lambda row: row.arm.startswith("ort_a4"))
    lossy = fastest(members, lambda row: row.lossy)
    exact = fastest(members, lambda row: not row.lossy)
    lines = []
    if m in INT8_OVER_ORT[shape]:
        lines.append(line("m3_int8", "over ONNX Runtime level 4", ort and ort.arm, INT8_OVER_ORT[shape][m]))
    if m in READ_SHARE.get(shape, {}):
        got = ours["m3_int8"].read_share if "m3_int8" in ours else None
        what, want = "m3_int8 of read bandwidth", READ_SHARE[shape][m]
        lines.append(Line(shape=shape, threads=1, case=str(m), what=what, peer="read", want=want, got=got))
    if m >= 4:
        lines.append(line("m3_int16", "over the best lossy peer", lossy and lossy.arm, 1.0))
    if m in INT16_OVER_EXACT:
        lines.append(line("m3_int16", "over the best exact peer", exact and exact.arm, INT16_OVER_EXACT[m]))
    if m in EXACT_OVER_EXACT:
        lines.append(line("m3_exact", "over the best exact peer", exact and exact.arm, EXACT_OVER_EXACT[m]))
    return lines


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


# -- policy loss ------------------------------------------------------------------------------------------------------
UNIT_GOALS = {1.0: 3.2, 0.4: 1.3}  # fp32 products that m3_one_pass may take, by density
TILE_BYTES = 64 << 20  # default workspace of m3_one_pass on a CPU
BF16_OVER = {"torch": 15.0, "trl": 15.0}
AHEAD, SMALLER = 1.3, 3.0  # of every rival: in time without more memory, or in memory without more time
EQUAL = 1.05  # two figures no further apart than this count as equal
ACCEPTED_HEADS = ("smollm2-135m.t1024", "qwen3-0.6b.t256")
LONG_HEADS = ("narrow.t8192", "narrow.t65536")
LONG_GROWTH = 1.1


def is_product(row: LossRow) -> bool:
    return row.arm.startswith("gemm")


def loss_cases(rows: Iterable[LossRow]) -> list[tuple[tuple[str, str, float, int], list[LossRow]]]:
    """[((shape, dtype, density, threads of the case), rows)] in order of appearance."""
    found: dict[tuple[str, str, float, int], list[LossRow]] = {}
    for row in rows:
        found.setdefault((row.shape, row.dtype, row.density, row.case_threads), []).append(row)
    return list(found.items())


def triple_text(value: Triple | None) -> str:
    return "" if value is None else f"{value[0]:.2f} ({value[1]:.2f} - {value[2]:.2f})"


def mebibytes(count: int | None) -> str:
    return "" if count is None else f"{count / 2**20:.0f}"


def loss_case_table(rows: Sequence[LossRow]) -> str:
    """One head, dtype, density and thread count: every arm, fastest first; those without a time last, with why."""
    lines = []
    for row in sorted(timed(rows), key=lambda row: row.median_s or 0.0):
        assert row.median_s is not None
        over = (row.ratios or {}).get("m3_one_pass")
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
    header = ["arm", "time", "fp32 units", "bf16 units", "peak MiB", "workspace MiB", "error", "over m3_one_pass"]
    empty = [not any(line[column] for line in lines) for column in range(len(header))]
    kept = [column for column, nothing in enumerate(empty) if not nothing]
    return table([header[column] for column in kept], ([line[column] for column in kept] for line in lines))


def loss_tables(rows: Iterable[LossRow]) -> str:
    """Text for the terminal."""
    parts = []
    for (shape, dtype, density, threads), members in loss_cases(rows):
        where = "on the GPU" if members[0].device == "cuda" else f"{threads} thread(s)"
        parts.append(f"\n{shape}, {dtype}, density {density}, {where}\n{loss_case_table(members)}")
    return "\n".join(parts)


def loss_acceptance(rows: Iterable[LossRow]) -> list[Line]:
    """What was promised of the policy loss on a CPU, for the heads of the acceptance run and the long batch."""
    rows = [row for row in rows if row.device == "cpu"]
    lines = []
    for (shape, dtype, density, threads), members in loss_cases(rows):
        if shape in ACCEPTED_HEADS and density in UNIT_GOALS:
            place = {"shape": shape, "threads": threads, "case": f"{dtype} {density}"}
            lines += loss_case_lines(place, {row.arm: row for row in timed(members)}, dtype, density)
    return lines + long_lines(rows)


def loss_case_lines(place: Mapping[str, Any], arms: Mapping[str, LossRow], dtype: str, density: float) -> list[Line]:
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
    what, want = "m3_one_pass peak beyond fp32 dW, MiB", TILE_BYTES / 2**20
    lines.append(Line(**place, what=what, peer="one tile budget", want=want, at_most=True, got=beyond))
    return lines + rival_lines(place, arms)


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


def loss_plot(rows: Sequence[LossRow], stem: Path) -> list[Path]:
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


def loss_parts(rows: Sequence[LossRow], slug: str, out: Path) -> list[str]:
    """Policy loss: the promises if measured, then each head."""
    parts = []
    lines = loss_acceptance(rows)
    if lines:
        parts.append(f"### Promises of the policy loss\n{acceptance_table(lines, 'case')}")
    for shape in dict.fromkeys(row.shape for row in rows):
        members = [row for row in rows if row.shape == shape]
        first = members[0]
        sizes = f"T = {first.tokens} in {first.sequences} sequences, D = {first.hidden}, V = {first.vocabulary}"
        parts.append(f"### {first.op} {shape}\n\n{sizes}.\n")
        if any(row.peak_bytes and not is_product(row) for row in timed(members)):
            stem = f"{first.op}-{shape}-{slug}"
            loss_plot(members, out.parent / out.stem / stem)
            parts.append(f"![time against memory]({out.stem}/{stem}.png) ([SVG]({out.stem}/{stem}.svg))\n")
        for (_, dtype, density, threads), case in loss_cases(members):
            where = "on the GPU" if first.device == "cuda" else f"{threads} thread(s)"
            parts.append(f"**{dtype}, density {density}, {where}**\n\n{loss_case_table(case)}\n")
    return parts


# -- docs/benchmarks.md -----------------------------------------------------------------------------------------------
OPENING = """# Benchmarks

Generated by `python -m bench report` from `bench/results/*.jsonl`; do not edit. Reproduce: `python -m bench int4
--preset acceptance` (two reference shapes), `python -m bench int4` (more shapes), `python -m bench policy_loss
--preset acceptance`, `python -m bench policy_loss --preset long`, `bash bench/gpu.sh` (a GPU machine).

## How to read the tables

INT4. Every arm of a table ran in one process on the same inputs, in interleaved rounds: each round
visits each arm once, in shuffled order, and each visit takes the next of several copies of the weight, so that
weights come from memory and not from cache. Times are medians over rounds, with the 20th and 80th percentile; ratios
are medians of the ratios within a round. An arm has a time only if its error passed its gate: relative RMS error
against fp64, at most 1e-5 for exact arms, 5e-5 for int16 activations, 8e-3 for int8 activations, 1e-2 for bf16; twice
that for a layer of experts. Our weights lie in huge pages, where Int4Weight.pack puts them; other libraries place
theirs as they do (with `--malloc-huge-pages` also there). GB/s counts the bytes of the INT4 weight with its scales,
the same for every arm; "of read" compares it with the read bandwidth of the machine, measured between the arms of the
same rounds, 80th percentile (on a GPU: with the bandwidth of a copy); "of peak" compares multiply-accumulates with
the measured peak for the operands of that arm's inner product (fp32, bf16, int16 or int8). "Over m3_int16" (on a GPU
m3_exact): how many times as fast as our default mode this arm is. x and the result are fp32, except in bf16 arms, whose
conversions are not timed; on a GPU everything is bf16.

Arms: `m3_*` ours by activation mode (`@isa`: a forced instruction set; `@1t`: one thread); `ort_aL` ONNX Runtime
MatMulNBits, accuracy level L, blocks of the group size (`_b32`: of 32); `ov` OpenVINO (`_int8`: dynamic quantisation
of the activations); `ark_*` auto-round-lib by compute type; `ggml_q4_0` ggml, plain or repacked; `torch_int4_bf16`
torch's INT4 op; `torch_fp32`, `torch_bf16` matmul of the dequantised weight.

Policy loss. Every arm of a table computes the same thing from the same tensors in one process, in interleaved rounds:
the token-mean clipped loss (clip 0.2, one advantage a sequence, given old log-probabilities) of T tokens over a head of
V columns, and the gradients of hidden (T, D) and weight (V, D). "Density" is the share of the tokens whose mask is 1,
scattered; one of those in each sequence is clipped. Times are given in units: over that of one product (T, D) x (D, V)
of all T tokens by torch.mm in fp32 in the same round, and for bf16 also in bf16; three products per token that counts
are the least a schedule can take. Each timed run follows an untimed one of the same arm, so that memory which a virtual
machine's host took back is there again. An arm has a time only if the loss and both gradients pass their gate against fp64:
relative RMS error at most 1e-5 in fp32, 1e-2 in bf16. "Peak" is the most memory that one run adds to a process that
holds the inputs, the gradients among it (a fresh process for each arm and its resident memory; on a GPU, torch's
allocations); "workspace" is the peak without the gradients returned. "Over m3_one_pass": how many times as fast.

Arms: `m3_one_pass` linear_policy_loss with its default workspace, `_whole` with room for all logits; `m3_two_phase`
linear_logprobs and policy_loss_from_logprobs, logits formed again in the backward pass or `_saved`; `torch` all logits,
autograd, `torch_rows` of the tokens that count alone; `trl` ChunkedLogProbFunction (given the tokens that count);
`liger_loss` LigerFusedLinearGRPOLoss, all sequences in one chunk, its fastest setting; `liger_ce`
LigerFusedLinearScaledCrossEntropyFunction (on a CPU its torch fall-back); `verl` FusedLinearForPPO, `verl_triton`
linear_cross_entropy; `gemms` the three bare products of the tokens that count, `gemm_*` the units.
"""


def machine_text(rows: Sequence[Row]) -> str:
    """The machine of the last of the rows, and the last version of each package that any of them saw."""
    row, versions = rows[-1], {}
    for each in rows:
        told = each.machine.get("versions")
        versions |= told if isinstance(told, dict) else {}
    named = ", ".join(f"{name} {version}" for name, version in versions.items())
    where = f"{row.machine['gpu']}, host " if "gpu" in row.machine else ""
    return f"{where}{row.machine['cpu']}, {row.machine['cores']} cores; Python {row.machine['python']}, {named}"


def plot(rows: Sequence[GemmRow], stem: Path) -> list[Path]:
    """Time against M, an arm a line, a panel per thread count, with the machine's lower bounds; PNG and SVG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    threads = sorted({row.threads for row in rows})
    figure, axes = pyplot.subplots(1, len(threads), figsize=(7 * len(threads), 5.2), squeeze=False, sharey=True)
    names = list(dict.fromkeys(row.arm for row in rows))
    colours = {name: pyplot.get_cmap("tab20")(index % 20) for index, name in enumerate(names)}
    for axis, count in zip(axes[0], threads, strict=True):
        panel = [row for row in rows if row.threads == count]
        for name in names:
            line = sorted((row for row in panel if row.arm == name), key=lambda row: row.m)
            bold = name.startswith("m3_")
            axis.plot(
                [row.m for row in line],
                [row.median_s for row in line],
                label=name,
                color=colours[name],
                linewidth=2.4 if bold else 1.2,
                marker="o" if bold else ".",
            )
        for computes, dash in (("int8", ":"), ("fp32", "--"), ("bf16", "-.")):
            bounds = lower_bounds(panel, computes)
            if bounds and (computes != "bf16" or rows[0].device == "cuda"):
                label = f"bound: read, {computes} peak"
                axis.plot(*zip(*bounds, strict=True), color="black", linestyle=dash, label=label)
        title = "GPU" if rows[0].device == "cuda" else f"{count} thread(s)"
        axis.set(xscale="log", yscale="log", xlabel="M (rows of x)", title=title)
        axis.set_xticks(sorted({row.m for row in panel}), labels=[str(m) for m in sorted({row.m for row in panel})])
        axis.minorticks_off()
        axis.grid(True, which="both", alpha=0.25)
    axes[0][0].set_ylabel("seconds per product (median)")
    axes[0][-1].legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1))
    first = rows[0]
    figure.suptitle(f"{first.op} {first.shape}: K = {first.k}, N = {first.n}, group {first.group_size}")
    return save(figure, stem)


def save(figure: Figure, stem: Path) -> list[Path]:
    """PNG and SVG, the same bytes for the same figure; the figure is closed."""
    from matplotlib import pyplot

    stem.parent.mkdir(parents=True, exist_ok=True)
    kinds = {"png": {"Software": None}, "svg": {"Date": None}}
    paths = []
    for kind, metadata in kinds.items():
        paths.append(stem.with_name(f"{stem.name}.{kind}"))
        figure.savefig(paths[-1], dpi=120, bbox_inches="tight", metadata=metadata)
    pyplot.close(figure)
    return paths


def lower_bounds(rows: Sequence[GemmRow], computes: str) -> list[tuple[int, float]]:
    """[(m, seconds)]: the longer of reading the INT4 weight once and multiplying at the peak for those operands.

    Of each ceiling the best measurement among the rows counts.
    """
    peak = max((row.peak_gmacs or 0.0 for row in rows if row.computes == computes), default=0.0)
    read = max((row.read_gbytes_s or 0.0 for row in rows), default=0.0)
    bounds = []
    for one in {row.m: row for row in sorted(rows, key=lambda row: row.m)}.values():
        if peak and read and one.weight_bytes and one.gmacs and one.median_s:
            bounds.append((one.m, max(one.weight_bytes / read / 1e9, one.gmacs * one.median_s / peak)))
    return bounds


def write(results: Path, out: Path) -> None:
    """Write ``out`` and, beside it, a folder of plots, from the last row of each key in results/*.jsonl.

    Raises ValueError: no rows, or a line that is none.
    """
    rows = record.latest(row for path in sorted(results.glob("*.jsonl")) for row in record.read(path))
    if not rows:
        raise ValueError(f"report: results: want at least one row in {results.name}/*.jsonl; got none")
    parts = [OPENING]
    machines = groupby(sorted(rows, key=machine_key), key=machine_key)
    for _, members in machines:
        parts.append(machine_section(list(members), out))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("\n".join(parts))


def machine_key(row: Row) -> tuple[str, str]:
    return row.device, str(row.machine.get("gpu") or row.machine["cpu"])


def machine_section(rows: Sequence[Row], out: Path) -> str:
    """The text of one machine: what it is; per family the promises if measured, each shape with plot and tables."""
    rows = sorted(rows, key=lambda row: row.date)
    last = rows[-1]
    commits = ", ".join(sorted({row.commit + (" (with changes)" if row.dirty else "") for row in rows}))
    parts = [f"## {machine_key(last)[1]}\n", f"{machine_text(rows)}. Commit {commits}; last run {last.date}.\n"]
    slug = re.sub(r"[^a-z0-9]+", "-", machine_key(last)[1].lower()).strip("-")
    parts += gemm_parts([row for row in rows if isinstance(row, GemmRow)], slug, out)
    parts += loss_parts([row for row in rows if isinstance(row, LossRow)], slug, out)
    return "\n".join(parts)


def gemm_parts(rows: Sequence[GemmRow], slug: str, out: Path) -> list[str]:
    """INT4: the promises if measured, then each shape."""
    parts = []
    lines = acceptance(row for row in rows if row.device == "cpu" and row.symmetric and not row.malloc_huge_pages)
    if lines:
        parts.append(f"### Promises\n{acceptance_table(lines)}")
    for (op, shape, asymmetric, huge), grouped in groupby(sorted(rows, key=shape_key), key=shape_key):
        members = list(grouped)
        kind = ", with zero points" if asymmetric else ""
        first = members[0]
        layer = "" if first.experts is None else f", {first.experts} experts, top {first.topk}"
        kind += ", all memory in huge pages" if huge else ""
        parts.append(f"### {op} {shape}{kind}\n\nK = {first.k}, N = {first.n}, group {first.group_size}{layer}.\n")
        drawn = [row for row in timed(members) if not row.arm.endswith("@1t")]
        if drawn:
            stem = f"{op}-{shape}{'-asymmetric' if asymmetric else ''}{'-huge-pages' if huge else ''}-{slug}"
            plot(drawn, out.parent / out.stem / stem)
            parts.append(f"![time against M]({out.stem}/{stem}.png) ([SVG]({out.stem}/{stem}.svg))\n")
        for (_, _, threads, m), case in cases(members):
            read = next((f", read {row.read_gbytes_s:.1f} GB/s" for row in case if row.read_gbytes_s), "")
            parts.append(f"**M = {m}, {threads} thread(s)**{read}\n\n{case_table(case)}\n")
    return parts


def shape_key(row: GemmRow) -> tuple[str, str, bool, bool]:
    return row.op, row.shape, not row.symmetric, row.malloc_huge_pages
