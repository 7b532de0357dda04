"""Rows to prose: docs/benchmarks.md and its plots; of INT4 also the tables for the terminal and the promises."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from pathlib import Path

from bench import engine_report, policy_loss_report, record, serving_report, skinny_report, spec_decode_report
from bench.record import EngineRow, GemmRow, LossRow, Row, ServingRow, SkinnyRow, SpecRow
from bench.tables import Line, acceptance_table, error_text, save, share, table, time_text, timed, why_untimed

OURS = ("m3_int8", "m3_int16", "m3_exact")


def case_table(rows: Sequence[GemmRow]) -> str:
    """One shape, M and thread count: every arm, fastest first; arms without a time last, with the reason."""
    lines = []
    default = "m3_cuda" if any(row.device == "cuda" for row in rows) else "m3_int16"
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


def kind(row: GemmRow) -> str:
    """What of a GPU tells rows of one shape apart: the dtype of x and the way of timing; of a CPU nothing."""
    return "" if row.timing is None else f"{row.x_dtype}, {row.timing}"


def where(row: GemmRow) -> str:
    return f"{row.case_threads} thread(s)" if row.timing is None else f"on the GPU, {kind(row)}"


def tables(rows: Iterable[GemmRow]) -> str:
    """Text for the terminal."""
    parts = []
    for _, same in groupby(sorted(rows, key=kind), key=kind):
        for (op, shape, _, m), members in cases(same):
            read = next((f", read {row.read_gbytes_s:.1f} GB/s" for row in members if row.read_gbytes_s), "")
            parts.append(f"\n{op} {shape}, M = {m}, {where(members[0])}{read}\n{case_table(members)}")
    return "\n".join(parts)


# -- acceptance -------------------------------------------------------------------------------------------------------
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


# -- docs/benchmarks.md -----------------------------------------------------------------------------------------------
OPENING = """# Benchmarks

Generated by `python -m bench report` from `bench/results/*.jsonl`; do not edit. Reproduce: `python -m bench int4
--preset acceptance` (two reference shapes), `python -m bench int4` (more shapes), `python -m bench skinny --preset
acceptance`, `python -m bench policy_loss --preset acceptance`, `python -m bench policy_loss --preset long`, `python -m
bench spec_decode --preset acceptance`, `bash bench/gpu.sh` (a GPU machine).

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
m3_cuda): how many times as fast as our default mode this arm is. x and the result are fp32, except in bf16 arms, whose
conversions are not timed. On a GPU x and the result are bf16 or fp16; "cold": L2 flushed before every product,
"rotation": a CUDA graph of products with more weights than L2 holds (`bench/gpu_timing.py`).

Arms: `m3_*` ours by activation mode (`@isa`: a forced instruction set; `@1t`: one thread); `ort_aL` ONNX Runtime
MatMulNBits, accuracy level L, blocks of the group size (`_b32`: of 32); `ov` OpenVINO (`_int8`: dynamic quantisation
of the activations); `ark_*` auto-round-lib by compute type; `ggml_q4_0` ggml, plain or repacked; `torch_int4_bf16`
torch's INT4 op; `torch_fp32`, `torch_bf16` matmul of the dequantised weight.

Policy loss. Every arm of a table computes the same thing from the same tensors in one process, in interleaved rounds:
the token-mean clipped loss (clip 0.2, one advantage a sequence, given old log-probabilities) of T tokens over a head of
V columns, and the gradients of hidden (T, D) and weight (V, D). "Density" is the share of the tokens whose mask is 1,
scattered; one of those in each sequence is clipped. Times are given in units: over that of one product (T, D) x (D, V)
of all T tokens by torch.mm in fp32 in the same round, and for bf16 also in bf16; three products per token that counts
are the least a schedule can take. Each timed run follows an untimed one of the same arm, so that memory which the host
of a virtual machine took back is there again. An arm has a time only if the loss and both gradients pass their gate
against fp64: relative RMS error at most 1e-5 in fp32, 1e-2 in bf16. "Peak" is the most memory that one run adds to a
process that holds the inputs, the gradients among it (a fresh process for each arm and its resident memory; on a GPU,
torch's allocations); "workspace" is the peak without the gradients returned. "Over m3_one_pass": how many times as
fast. "Closest rival": ours was to be 1.3 times as fast as every rival without more memory, or to need a third of its
memory without more time; the promise is shown for the rival that comes closest to having neither.

Arms: `m3_one_pass` linear_policy_loss with its default workspace, `_whole` with room for all logits; `m3_two_phase`
linear_logprobs and policy_loss_from_logprobs, logits formed again in the backward pass or `_saved`; `torch` all logits,
autograd, `torch_rows` of the tokens that count alone; `trl` ChunkedLogProbFunction (given the tokens that count);
`liger_loss` LigerFusedLinearGRPOLoss, all sequences in one chunk, its fastest setting; `liger_ce`
LigerFusedLinearScaledCrossEntropyFunction (on a CPU its torch fall-back); `verl` FusedLinearForPPO, `verl_triton`
linear_cross_entropy; `gemms` the three bare products of the tokens that count, `gemm_*` the units.

Few rows of INT4. C(M) is the time of int4_gemm with M rows on one thread, the public function, medians; C(M) / C(1) the
median of the ratios within a round; in parentheses what the roofline gives for it: the longer of reading the weight
once and of M * N * K multiply-accumulates at the peak of the instructions that this mode and instruction set multiply
with, over the same for one row. Scales, activations and taking nibbles apart are not in that bound; "of the roofline"
is the bound over the time. "Streamed": between two uses of a weight as many bytes go by as the model's INT4 weights
have (SmolLM2-135M, 56 MiB: beyond L2, not beyond a large L3) or 512 MiB (Qwen3-8B), as in decoding; "cached": a few
copies again and again, in L2, where reading hardly bounds and C(M) / C(1) tells the arithmetic alone. The gate also
demands that a row's bits do not depend on M.

Trees. `m3` is our op, public function, one thread. A visit computes several different batches (for attention, layers)
one after another; a time is that of one. Verification: `torch_all_rows` does what SGLang's verification does, on the
CPU: temperature and softmax of every row, top-k and top-p by topk, zeros for the draft's probabilities, then the walk
(our drop-in tree_speculative_sampling_target_only); greedily argmax of every row and verify_tree_greedy. In place of
mode "coupled" it draws from the same law by coins. "Filtered": top-k 20, top-p 0.95. An arm has a time only if it emits
the reference's tokens (share of requests that differ: 0; of torch_all_rows, which filters in fp32, at most 0.05). "Rows
visited" is the mean over requests. "Of roofline": the longer of reading what has to be read (the rows visited, the keys
and values attended to) at the read bandwidth measured between the arms, and of the multiplications of attention at the
fp32 peak, over the time; above 100 % the inputs came from cache. "Peak" as above.
Attention, fp32, page size 16, one request, relative RMS error at most 1e-5 against fp64: `m3_gated` with an elementwise
sigmoid gate; `torch_sdpa` scaled_dot_product_attention with an explicit mask (prefill: causal, without one) over keys
and values that lie one after another already, `torch_sdpa_gathered` over those it gathers from the pages first.
Drafting: `torch` is softmax, topk, products of path probabilities, topk and gathers. tree_finalize: `torch` is topk,
sort, gathers, and masks and links by comparison. tree_commit: `torch` copies slots by one indexed assignment a cache.

Servers. Every arm is a server, all of them up at once; a round visits each once, in shuffled order, with the same
prompts of tokens: each client sends a greedy completion whose end token is ignored, reads its stream, and sends the
next. "First token" runs from the request to the first piece of text; "a token" is the mean of a request over the tokens
after the first; "gap" lies between two pieces, which hold several tokens where a draft was accepted. "MB": resident
memory of the server's processes. Regret: as for engines, of the text that was sent.
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
    parts += skinny_report.sections([row for row in rows if isinstance(row, SkinnyRow)])
    parts += policy_loss_report.sections([row for row in rows if isinstance(row, LossRow)], slug, out)
    parts += spec_decode_report.sections([row for row in rows if isinstance(row, SpecRow)])
    parts += engine_report.sections([row for row in rows if isinstance(row, EngineRow)])
    parts += serving_report.sections([row for row in rows if isinstance(row, ServingRow)])
    return "\n".join(parts)


def gemm_parts(rows: Sequence[GemmRow], slug: str, out: Path) -> list[str]:
    """INT4: the promises if measured, then each shape."""
    parts = []
    lines = acceptance(row for row in rows if row.device == "cpu" and row.symmetric and not row.malloc_huge_pages)
    if lines:
        parts.append(f"### Promises\n{acceptance_table(lines)}")
    for (op, shape, asymmetric, huge, way), grouped in groupby(sorted(rows, key=shape_key), key=shape_key):
        members = list(grouped)
        about = ", with zero points" if asymmetric else ""
        first = members[0]
        layer = "" if first.experts is None else f", {first.experts} experts, top {first.topk}"
        about += ", all memory in huge pages" if huge else ""
        about += f", {way}" if way else ""
        parts.append(f"### {op} {shape}{about}\n\nK = {first.k}, N = {first.n}, group {first.group_size}{layer}.\n")
        drawn = [row for row in timed(members) if not row.arm.endswith("@1t")]
        if drawn:
            marks = ["asymmetric"] * asymmetric + ["huge-pages"] * huge + way.replace(",", "").split()
            stem = "-".join([op, shape, *marks, slug])
            plot(drawn, out.parent / out.stem / stem)
            parts.append(f"![time against M]({out.stem}/{stem}.png) ([SVG]({out.stem}/{stem}.svg))\n")
        for (_, _, _, m), case in cases(members):
            read = next((f", read {row.read_gbytes_s:.1f} GB/s" for row in case if row.read_gbytes_s), "")
            parts.append(f"**M = {m}, {where(case[0])}**{read}\n\n{case_table(case)}\n")
    return parts


def shape_key(row: GemmRow) -> tuple[str, str, bool, bool, str]:
    return row.op, row.shape, not row.symmetric, row.malloc_huge_pages, kind(row)
