"""INT4 GEMM, grouped GEMM, MoE and dequantise in Triton, for NVIDIA and AMD GPUs; interpreted on CPU tensors.

    Y^T = W X^T,   y[m, n] = sum over the splits of K, in order, of p[m, n], + bias[n],
    p[m, n] = sum over the blocks b of a split, in order, of s[n, g(b)] * sum_{k in b} (u[n, k] - z[n, g(b)]) * x[m, k]

The packed tile is read as int32 words and never permuted. A program owns two tiles (128 rows of W): 64 words high, and
each word holds row 8h + g of its 16-row sub-tile for h = 0, 1, so that a shift by ``8b + 4h`` gives a 64-row operand
whose columns are k = 16*kt + 2t + (0, 8, 1, 9)[b]. The order of a contraction is free: ``_arrange_kernel`` brings x
into that order once, applies act-order and pads K with zeros. Operands are integers of at most 5 bits, exact in fp16
and bf16: the weight is not rounded, and scales meet the fp32 accumulator, one block of K at a time (a block lies in one
group). Unpacking is elementwise, so it happens in the registers of the matrix operand. To keep it so with 16-bit x, a
zero z enters as ``sum (u - 8) * x + (8 - z) * sum x``, both in fp32; hence an infinite x may give nan instead of inf.

Row-invariance. The block of K, the splits of K and the order in which blocks and splits are added depend on the shape
of the weight and the dtype alone. Split grids (few rows) leave fp32 partials that a second kernel adds in split order;
the other grids (many rows) accumulate one split after the other and add each to the total in the same order. The weight
operand is 64 rows high for every number of tokens, hence one kind of matrix instruction. fma is written where it is
meant and contraction is off. Nothing is atomic.

Interpreted (TRITON_INTERPRET=1), bf16 is computed as fp32: the interpreter's own bf16 arithmetic is wrong.
"""
# In kernels, `if SPLIT:` decides at compile time and the next `if` at run time; SIM300 takes COMPUTE for a constant.
# ruff: noqa: SIM102, SIM300

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from m3kernels.int4.types import TILE_K, TILE_N, ceil_div
from m3kernels.triton_compile import CompileCase

INTERPRET: bool = triton.knobs.runtime.interpret  # read once: @triton.jit below decides by it

PROGRAM_N = 2 * TILE_N  # rows of W per program
TARGET_PROGRAMS = 512  # about four programs on each of an H100's 132 processors
MIN_SPLIT_K = 512  # columns per split at least: four stages of loads in flight
ACTIVE_EXPERTS = 8  # experts assumed busy when the splits of a grouped product are planned
GROUP_M = 8  # token tiles that share weight tiles while they are in L2
COLUMNS = 256  # per program of the elementwise kernels


class Tile(NamedTuple):
    """How one launch is cut: tokens per program, warps, pipeline stages."""

    block_m: int
    num_warps: int
    num_stages: int


# By compute dtype, smallest first; each row ends with the largest whose accumulators stay in registers. Eight warps
# would need an operand of 128 rows: on 64, Triton's wgmma layout lets both warp groups compute the same.
TILES = {
    torch.float16: (Tile(16, 4, 4), Tile(32, 4, 3)),
    torch.bfloat16: (Tile(16, 4, 4), Tile(32, 4, 3)),
    torch.float32: (Tile(16, 4, 2), Tile(32, 8, 2)),
}
BLOCK_K = {torch.float16: (128, 64, 32, 16), torch.bfloat16: (128, 64, 32, 16), torch.float32: (32, 16)}  # same reason


class Plan(NamedTuple):
    """How K is cut: a function of the weight's shape and the dtype only, never of the number of rows."""

    block_k: int  # columns per step, all of one group
    k_blocks: int
    split_blocks: int  # steps per split

    @property
    def splits(self) -> int:
        return ceil_div(self.k_blocks, self.split_blocks)

    @property
    def padded_k(self) -> int:
        return self.k_blocks * self.block_k


def plan(
    out_features: int,
    in_features: int,
    group_size: int,
    first_k: int,
    dtype: torch.dtype,
    experts: int | None = None,
) -> Plan:
    """Largest block of K that no group boundary cuts, and splits to fill a GPU at one row; dtype: of the operands."""
    block_k = next(
        size for size in BLOCK_K[dtype] if group_size == -1 or (group_size % size == 0 and first_k % size == 0)
    )
    k_blocks = ceil_div(in_features, block_k)
    programs = ceil_div(out_features, PROGRAM_N) * (1 if experts is None else min(experts, ACTIVE_EXPERTS))
    splits = max(1, min(TARGET_PROGRAMS // programs, in_features // MIN_SPLIT_K))
    return Plan(block_k, k_blocks, ceil_div(k_blocks, splits))


def tile(rows: int, dtype: torch.dtype) -> Tile:
    """The smallest tile that holds ``rows`` tokens, or the largest there is."""
    return next((choice for choice in TILES[dtype] if choice.block_m >= rows), TILES[dtype][-1])


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of the operands of the dot products for x of this dtype."""
    return torch.float32 if INTERPRET and dtype == torch.bfloat16 else dtype


TL_DTYPE = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


def unsupported(op: str, *args: Any) -> str:
    tensor = next(arg for arg in args if isinstance(arg, Tensor))
    if args[-1] in ("int16", "int8"):
        return f"activations {args[-1]!r}: the Triton room rounds no activations: only 'exact' ('auto')"
    if tensor.device.type == "cpu":
        return "" if INTERPRET else "CPU tensors need TRITON_INTERPRET=1, set before Triton is imported"
    if tensor.device.type != "cuda":
        return f"no Triton target for {tensor.device.type} tensors"
    if INTERPRET:
        return "TRITON_INTERPRET=1 interprets kernels: CPU tensors only"
    if torch.version.hip is None and torch.cuda.get_device_capability(tensor.device) < (8, 0):
        return "needs compute capability 8.0 or newer"
    return ""


# -- kernels ----------------------------------------------------------------------------------------------------------
@triton.jit
def _source_column(d, BLOCK_K: tl.constexpr):
    """Stored column k of W that arranged column d of x meets: the order in which ``_gemm_kernel`` contracts.

    A block is PLANES operands of KP columns. Column c of an operand is (dup, kt, t); its nibbles are byte
    b = dup * PLANES + plane of the word of k-tile kt, lane t. dup > 0 only where a block is shorter than 64 columns:
    a tensor-core operand needs 16 columns, so the same words are read again with other shifts.
    """
    KP: tl.constexpr = BLOCK_K // 4 if BLOCK_K > 64 else 16
    PLANES: tl.constexpr = BLOCK_K // KP
    TILES_K: tl.constexpr = BLOCK_K // 16
    within = d % BLOCK_K
    c = within % KP
    b = (c // (4 * TILES_K)) * PLANES + within // KP
    kt = (c // 4) % TILES_K
    return (d // BLOCK_K) * BLOCK_K + kt * 16 + 2 * (c % 4) + (b // 2) + 8 * (b % 2)


@triton.jit
def _store_sums(values, sums, program, row, rows, padded_k, BLOCK_K: tl.constexpr, COLUMNS: tl.constexpr):
    """Sum of each block of K among COLUMNS arranged values of one row, to sums[block, row]."""
    BLOCKS: tl.constexpr = COLUMNS // BLOCK_K
    block = program * BLOCKS + tl.arange(0, BLOCKS)
    total = tl.sum(values.to(tl.float32).reshape(BLOCKS, BLOCK_K), 1)
    tl.store(sums + block.to(tl.int64) * rows + row, total, mask=block * BLOCK_K < padded_k)


# Grid: (rows * column blocks). A program writes COLUMNS columns of one row of ``out`` (rows, padded_k): x of source row
# ``row_index[row]`` in contraction order, through ``perm`` (of the row's expert), zero beyond K; and its sum over each
# block of K into ``sums`` (k_blocks, rows).
@triton.jit
def _arrange_kernel(
    x,
    out,
    sums,
    row_index,
    row_expert,
    perm,
    rows,
    in_features,
    padded_k,
    BLOCK_K: tl.constexpr,
    COLUMNS: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    blocks = tl.cdiv(padded_k, COLUMNS)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    d = (tl.program_id(0) % blocks) * COLUMNS + tl.arange(0, COLUMNS)
    k = _source_column(d, BLOCK_K)
    mask = (d < padded_k) & (k < in_features)
    column = k
    if perm is not None:
        table = perm
        if row_expert is not None:
            table = perm + tl.load(row_expert + row).to(tl.int64) * in_features
        column = tl.load(table + k, mask=mask, other=0)
        mask &= (column >= 0) & (column < in_features)
    source = row
    if row_index is not None:
        source = tl.load(row_index + row).to(tl.int64)
    values = tl.load(x + source * in_features + column, mask=mask, other=0.0).to(COMPUTE)
    tl.store(out + row * padded_k + d, values, mask=d < padded_k)
    if sums is not None:
        _store_sums(values, sums, tl.program_id(0) % blocks, row, rows, padded_k, BLOCK_K, COLUMNS)


@triton.jit
def _magic(COMPUTE: tl.constexpr):
    """2**p of COMPUTE whose last mantissa bit is worth 1: or-ing u into its bits gives 2**p + u."""
    if COMPUTE == tl.float16:
        return 1024.0
    elif COMPUTE == tl.bfloat16:
        return 128.0
    else:
        return 8388608.0


@triton.jit
def _integers(words, shift, zero, COMPUTE: tl.constexpr):
    """u - z, exactly, in COMPUTE: ``zero`` is 2**p + z. Elementwise only, so it happens in the operand's registers."""
    u = (words >> shift) & 15
    if COMPUTE == tl.float16:
        value = (u | 0x6400).to(tl.int16).to(tl.float16, bitcast=True)
    elif COMPUTE == tl.bfloat16:
        value = (u | 0x4300).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        value = (u | 0x4B000000).to(tl.float32, bitcast=True)
    return value - zero


@triton.jit
def _block(
    acc,
    words,
    base_shift,
    xs_at,
    sums,
    sums_at,
    row_mask,
    scales,
    zeros,
    scale_at,
    tile_mask,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """acc + s * sum of (u - z) * x over one block of K, for the 64 rows of one h: (64, BLOCK_M) fp32."""
    KP: tl.constexpr = BLOCK_K // 4 if BLOCK_K > 64 else 16
    MAGIC: tl.constexpr = _magic(COMPUTE)
    zero = tl.full((64, 1), MAGIC + 8, COMPUTE)
    if zeros is not None:
        z = tl.load(zeros + scale_at, mask=tile_mask, other=8).to(tl.float32)
        if sums is None:
            zero = (MAGIC + z).to(COMPUTE)[:, None]
    part = tl.zeros((64, BLOCK_M), tl.float32)
    for plane in tl.static_range(BLOCK_K // KP):
        xs = tl.load(xs_at + plane * KP, mask=row_mask[None, :], other=0.0)  # (KP, BLOCK_M)
        values = _integers(words, base_shift + 8 * plane, zero, COMPUTE)  # (64, KP)
        part = tl.dot(values, xs, part, input_precision="ieee")
    if sums is not None:
        sum_x = tl.load(sums + sums_at, mask=row_mask, other=0.0)
        eight = tl.broadcast_to((8 - z)[:, None], (64, BLOCK_M))
        part = tl.fma(eight, tl.broadcast_to(sum_x[None, :], (64, BLOCK_M)), part)
    scale = tl.load(scales + scale_at, mask=tile_mask, other=0.0).to(tl.float32)
    return tl.fma(part, tl.broadcast_to(scale[:, None], (64, BLOCK_M)), acc)


@triton.jit
def _natural_rows(low, high, BLOCK_M: tl.constexpr):
    """Accumulators of rows (tile, g, a) for h = 0 and 1 -> (128, BLOCK_M) with row 64*tile + 16a + 8h + g."""
    both = tl.join(low, high).reshape(2, 8, 4, BLOCK_M, 2)
    return both.permute(0, 2, 4, 1, 3).reshape(128, BLOCK_M)


# Grid: one axis of (token tile, pair of weight tiles, split), split fastest, then GROUP_M token tiles.
# A program owns 128 rows of W, BLOCK_M tokens and one split (SPLIT) or all of them. Reads: the tiles and scales of its
# rows once per token tile, its tokens in contraction order. Writes: SPLIT: fp32 partials out[split, row, n]; otherwise
# out[row, n] in out's dtype, with bias. With ``offsets`` (experts + 1) the tiles are those of the experts in turn,
# found from ``offsets`` here: the grid has as many tiles as the worst case needs, the surplus returns.
# ``row_index`` names the row of x for each row of out. Words of W are the register operand: 64 rows, any BLOCK_M.
@triton.jit
def _gemm_kernel(
    x,
    sums,
    qweight,
    scales,
    zeros,
    bias,
    offsets,
    row_index,
    out,
    rows,
    x_rows,
    m_tiles,
    out_features,
    n_tiles,
    k_tiles,
    groups,
    group_tiles,
    first_tile,
    experts,
    k_blocks,
    split_blocks,
    splits,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
    GROUP_M: tl.constexpr,
    SPLIT: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    KP: tl.constexpr = BLOCK_K // 4 if BLOCK_K > 64 else 16
    PLANES: tl.constexpr = BLOCK_K // KP
    TILES_K: tl.constexpr = BLOCK_K // 16

    pid = tl.program_id(0)
    split = 0
    if SPLIT:
        split = pid % splits
        pid = pid // splits
    n_programs = tl.cdiv(n_tiles, 2)
    width = GROUP_M * n_programs
    first_m = (pid // width) * GROUP_M
    size = tl.minimum(m_tiles - first_m, GROUP_M)
    pid_m = first_m + (pid % width) % size
    pid_n = (pid % width) // size

    if offsets is not None:
        e = tl.arange(0, BLOCK_E)
        start = tl.load(offsets + e, mask=e < experts, other=0)
        stop = tl.load(offsets + e + 1, mask=e < experts, other=0)
        tiles = (tl.maximum(stop - start, 0) + BLOCK_M - 1) // BLOCK_M
        ends = tl.cumsum(tiles, 0)
        expert = tl.sum((ends <= pid_m).to(tl.int32), 0)
        if expert >= experts:
            return
        own = e == expert
        before = tl.sum(tl.where(own, ends - tiles, 0), 0)
        row0 = tl.sum(tl.where(own, start, 0), 0) + (pid_m - before) * BLOCK_M
        row_end = tl.minimum(tl.sum(tl.where(own, stop, 0), 0), rows)
        weight_tile = expert.to(tl.int64) * n_tiles
    else:
        row0 = pid_m.to(tl.int64) * BLOCK_M
        row_end = rows
        weight_tile = pid_n.to(tl.int64) * 0

    row = row0 + tl.arange(0, BLOCK_M)
    row_mask = (row >= 0) & (row < row_end)

    p = tl.arange(0, 64)
    c = tl.arange(0, KP)
    nt = pid_n * 2 + p // 32
    tile_mask = nt < n_tiles
    g = (p % 32) // 4
    t = c % 4
    kt = (c // 4) % TILES_K
    lane = (g[:, None] ^ (2 * t[None, :])) * 4 + (p % 4)[:, None]
    lane = tl.max_contiguous(tl.multiple_of(lane, (4, 1)), (4, 1))
    word_at = (p // 32)[:, None] * (k_tiles * 128) + (kt * 128 + t * 32)[None, :] + lane
    qweight += (weight_tile + pid_n * 2) * k_tiles * 128
    scale_row = (p // 32) * (groups * 64) + p % 32
    scales += (weight_tile + pid_n * 2) * groups * 64
    if zeros is not None:
        zeros += (weight_tile + pid_n * 2) * groups * 64
    x_stride = k_blocks * BLOCK_K
    sum_at = row
    if row_index is not None:
        sum_at = tl.load(row_index + row, mask=row_mask, other=0)
        x_at = sum_at[None, :] * x_stride + c[:, None]
    else:  # offsets from the first row of the tile fit in 32 bits
        x += row0 * x_stride
        x_at = tl.arange(0, BLOCK_M)[None, :] * x_stride + c[:, None]
    base_shift = 0
    if BLOCK_K < 64:
        base_shift = ((c // (4 * TILES_K)) * (8 * PLANES))[None, :]

    acc_low = tl.zeros((64, BLOCK_M), tl.float32)
    acc_high = tl.zeros((64, BLOCK_M), tl.float32)
    total_low = tl.zeros((64, BLOCK_M), tl.float32)
    total_high = tl.zeros((64, BLOCK_M), tl.float32)
    first_group = first_tile // group_tiles
    first_block = split * split_blocks
    last_block = k_blocks
    if SPLIT:
        last_block = tl.minimum(first_block + split_blocks, k_blocks)
    for block in range(first_block, last_block):
        tile_k = block * TILES_K
        group = (first_tile + tile_k) // group_tiles - first_group
        word_mask = tile_mask[:, None] & (tile_k + kt < k_tiles)[None, :]
        words = tl.load(qweight + tl.cast(tile_k, tl.int64) * 128 + word_at, mask=word_mask, other=0)
        xs_at = x + block * BLOCK_K + x_at
        scale_at = scale_row + group * 64
        sums_at = sum_at + tl.cast(block, tl.int64) * x_rows
        acc_low = _block(
            acc_low,
            words,
            base_shift,
            xs_at,
            sums,
            sums_at,
            row_mask,
            scales,
            zeros,
            scale_at,
            tile_mask,
            BLOCK_M,
            BLOCK_K,
            COMPUTE,
        )
        acc_high = _block(
            acc_high,
            words,
            base_shift + 4,
            xs_at,
            sums,
            sums_at,
            row_mask,
            scales,
            zeros,
            scale_at + 32,
            tile_mask,
            BLOCK_M,
            BLOCK_K,
            COMPUTE,
        )
        if not SPLIT:
            if (block + 1) % split_blocks == 0:
                total_low += acc_low
                total_high += acc_high
                acc_low = tl.zeros((64, BLOCK_M), tl.float32)
                acc_high = tl.zeros((64, BLOCK_M), tl.float32)

    y = _natural_rows(total_low + acc_low, total_high + acc_high, BLOCK_M)
    n = pid_n * 128 + tl.arange(0, 128)
    if bias is not None:
        y += tl.load(bias + n, mask=n < out_features, other=0.0).to(tl.float32)[:, None]
    out_at = out + (row[None, :] + tl.cast(split, tl.int64) * rows) * out_features + n[:, None]
    tl.store(out_at, y.to(out.dtype.element_ty), mask=(n < out_features)[:, None] & row_mask[None, :])


@triton.jit
def _sum_splits(partial, at, mask, stride, splits, COLUMNS: tl.constexpr):
    """Partials of one row added in split order, from zero."""
    total = tl.zeros((COLUMNS,), tl.float32)
    for split in range(splits):
        total += tl.load(partial + tl.cast(split, tl.int64) * stride + at, mask=mask, other=0.0)
    return total


# Grid: (rows * column blocks). A program adds the partials (splits, rows, N) of COLUMNS outputs and the bias.
@triton.jit
def _finish_kernel(partial, bias, out, rows, out_features, splits, COLUMNS: tl.constexpr):
    blocks = tl.cdiv(out_features, COLUMNS)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    n = (tl.program_id(0) % blocks) * COLUMNS + tl.arange(0, COLUMNS)
    mask = n < out_features
    at = row * out_features + n
    y = _sum_splits(partial, at, mask, tl.cast(rows, tl.int64) * out_features, splits, COLUMNS)
    if bias is not None:
        y += tl.load(bias + n, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + at, y.to(out.dtype.element_ty), mask=mask)


# Grid: (rows * column blocks). A program adds the partials of gate and up (splits, rows, 2I) and writes COLUMNS columns
# of silu(gate) * up in the contraction order of the next product, (rows, padded_k), zero beyond I, and their sums over
# each block of K, (k_blocks, rows).
@triton.jit
def _silu_mul_kernel(
    partial,
    out,
    sums,
    row_expert,
    perm,
    rows,
    intermediate_size,
    padded_k,
    splits,
    BLOCK_K: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    blocks = tl.cdiv(padded_k, COLUMNS)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    d = (tl.program_id(0) % blocks) * COLUMNS + tl.arange(0, COLUMNS)
    k = _source_column(d, BLOCK_K)
    mask = (d < padded_k) & (k < intermediate_size)
    column = k
    if perm is not None:
        table = perm + tl.load(row_expert + row).to(tl.int64) * intermediate_size
        column = tl.load(table + k, mask=mask, other=0)
        mask &= (column >= 0) & (column < intermediate_size)
    at = row * (2 * intermediate_size) + column
    stride = tl.cast(rows, tl.int64) * (2 * intermediate_size)
    gate = _sum_splits(partial, at, mask, stride, splits, COLUMNS)
    up = _sum_splits(partial, at + intermediate_size, mask, stride, splits, COLUMNS)
    hidden = (gate / (1.0 + tl.exp(-gate)) * up).to(out.dtype.element_ty)
    tl.store(out + row * padded_k + d, hidden, mask=d < padded_k)
    if sums is not None:
        _store_sums(hidden, sums, tl.program_id(0) % blocks, row, rows, padded_k, BLOCK_K, COLUMNS)


# Grid: (tokens * column blocks). A program adds the experts' outputs of one token, in slot order, in fp32:
# y[t] = sum_j weight[t, j] * sum_splits partial[:, slot_row[t, j]]. A slot whose expert does not exist adds nothing.
@triton.jit
def _combine_kernel(
    partial, slot_row, topk_ids, topk_weights, out, rows, hidden_size, topk, experts, splits, COLUMNS: tl.constexpr
):
    blocks = tl.cdiv(hidden_size, COLUMNS)
    token = (tl.program_id(0) // blocks).to(tl.int64)
    n = (tl.program_id(0) % blocks) * COLUMNS + tl.arange(0, COLUMNS)
    y = tl.zeros((COLUMNS,), tl.float32)
    for slot in range(topk):
        expert = tl.load(topk_ids + token * topk + slot)
        row = tl.load(slot_row + token * topk + slot)
        weight = tl.load(topk_weights + token * topk + slot)
        mask = n < tl.where((expert >= 0) & (expert < experts), hidden_size, 0)
        term = _sum_splits(partial, row * hidden_size + n, mask, tl.cast(rows, tl.int64) * hidden_size, splits, COLUMNS)
        y = tl.where(mask, tl.fma(term, tl.broadcast_to(weight, (COLUMNS,)), y), y)
    tl.store(out + token * hidden_size + n, y.to(out.dtype.element_ty), mask=n < hidden_size)


# Grid: (experts * rows * column blocks). A program writes COLUMNS columns of one row of W in original order:
# (u - z) * s in fp32, rounded once. ``inverse[k]`` is the stored column of original column k.
@triton.jit
def _dequantize_kernel(
    qweight,
    scales,
    zeros,
    inverse,
    out,
    out_features,
    in_features,
    n_tiles,
    k_tiles,
    groups,
    group_tiles,
    first_tile,
    COLUMNS: tl.constexpr,
):
    blocks = tl.cdiv(in_features, COLUMNS)
    row = (tl.program_id(0) // blocks).to(tl.int64)  # of all experts
    expert = row // out_features
    n = (row % out_features).to(tl.int32)
    column = (tl.program_id(0) % blocks) * COLUMNS + tl.arange(0, COLUMNS)
    mask = column < in_features
    k = column
    if inverse is not None:
        k = tl.load(inverse + expert * in_features + column, mask=mask, other=0).to(tl.int32)
    weight_tile = expert * n_tiles + n // 64
    a, h, g = (n % 64) // 16, (n % 16) // 8, n % 8
    t = (k % 8) // 2
    word = (weight_tile * k_tiles + k // 16) * 128 + t * 32 + (g ^ (2 * t)) * 4 + a
    shift = 16 * (k % 2) + 8 * ((k % 16) // 8) + 4 * h
    u = (tl.load(qweight + word, mask=mask, other=0) >> shift) & 15
    group = (first_tile + k // 16) // group_tiles - first_tile // group_tiles
    at = (weight_tile * groups + group) * 64 + 32 * h + 4 * g + a
    scale = tl.load(scales + at, mask=mask, other=0.0).to(tl.float32)
    zero = tl.full((COLUMNS,), 8.0, tl.float32)
    if zeros is not None:
        zero = tl.load(zeros + at, mask=mask, other=0).to(tl.float32)
    value = (u.to(tl.float32) - zero) * scale
    tl.store(out + row * in_features + column, value.to(out.dtype.element_ty), mask=mask)


# -- launches ---------------------------------------------------------------------------------------------------------
class Weight(NamedTuple):
    """A packed weight as an op receives it, and what follows from its shape."""

    qweight: Tensor
    scales: Tensor
    zeros: Tensor | None
    perm: Tensor | None
    out_features: int
    in_features: int
    group_size: int
    first_k: int

    @property
    def experts(self) -> int | None:
        return len(self.qweight) if self.qweight.ndim == 4 else None

    def plan(self, dtype: torch.dtype) -> Plan:
        return plan(self.out_features, self.in_features, self.group_size, self.first_k, dtype, self.experts)

    @property
    def tiles(self) -> tuple[int, int, int, int, int]:
        """n_tiles, k_tiles, groups, group_tiles, first_tile: the kernels' view of the layout."""
        n_tiles, k_tiles = self.qweight.shape[-3:-1]
        group_tiles = k_tiles if self.group_size == -1 else self.group_size // TILE_K
        first_tile = 0 if self.group_size == -1 else self.first_k // TILE_K
        return n_tiles, k_tiles, self.scales.shape[-2], group_tiles, first_tile


class Operand(NamedTuple):
    """x in the order in which a weight contracts it, (rows, padded_k), and its sums over blocks, (k_blocks, rows)."""

    x: Tensor
    sums: Tensor | None

    @classmethod
    def empty(cls, rows: int, weight: Weight, dtype: torch.dtype) -> Operand:
        dtype, device = compute_dtype(dtype), weight.qweight.device
        cut = weight.plan(dtype)
        x = torch.empty(rows, cut.padded_k, dtype=dtype, device=device)
        if weight.zeros is None or x.dtype == torch.float32:
            return cls(x, None)
        return cls(x, torch.empty(cut.k_blocks, rows, dtype=torch.float32, device=device))


def launch_options(choice: Tile, *, amd: bool) -> dict[str, Any]:
    """Options of a product. AMD: two stages for 64 KiB of shared memory, and one shape of MFMA for every tile."""
    options = {"num_warps": choice.num_warps, "num_stages": choice.num_stages, "enable_fp_fusion": False}
    if amd:
        options |= {"num_stages": min(choice.num_stages, 2), "matrix_instr_nonkdim": 16}
    return options


def arrange(x: Tensor, weight: Weight, row_index: Tensor | None = None, row_expert: Tensor | None = None) -> Operand:
    """x, or its rows ``row_index``, for ``weight``; ``row_expert`` chooses the permutation of each row."""
    rows = len(x) if row_index is None else len(row_index)
    operand = Operand.empty(rows, weight, x.dtype)
    cut = weight.plan(operand.x.dtype)
    _arrange_kernel[(rows * ceil_div(cut.padded_k, COLUMNS),)](
        x,
        operand.x,
        operand.sums,
        row_index,
        row_expert,
        weight.perm,
        rows,
        weight.in_features,
        cut.padded_k,
        BLOCK_K=cut.block_k,
        COLUMNS=COLUMNS,
        COMPUTE=TL_DTYPE[operand.x.dtype],
    )
    return operand


def product(
    operand: Operand,
    weight: Weight,
    rows: int,
    dtype: torch.dtype | None,
    *,
    bias: Tensor | None = None,
    offsets: Tensor | None = None,
    row_index: Tensor | None = None,
    choice: Tile | None = None,
    split: bool | None = None,
) -> Tensor:
    """(rows, N) of ``dtype``; or, with dtype None, fp32 partials (splits or 1, rows, N) for a kernel that adds them.

    ``choice`` and ``split`` (a grid over splits, or programs that go through all of them) do not change a bit of the
    result; None: by the number of rows.
    """
    cut, experts, out_features = weight.plan(operand.x.dtype), weight.experts or 0, weight.out_features
    choice = choice or tile(ceil_div(rows, experts) if experts else rows, operand.x.dtype)
    m_tiles = ceil_div(rows, choice.block_m)
    if experts:  # the worst case: every expert leaves one tile partly filled
        m_tiles = min(rows, rows // choice.block_m + experts)
    programs = m_tiles * ceil_div(out_features, PROGRAM_N)
    split = cut.splits > 1 and (programs < TARGET_PROGRAMS if split is None else split)
    device = operand.x.device
    if split or dtype is None:
        out = torch.empty(cut.splits if split else 1, rows, out_features, dtype=torch.float32, device=device)
    else:
        out = torch.empty(rows, out_features, dtype=dtype, device=device)
    _gemm_kernel[(programs * (cut.splits if split else 1),)](
        operand.x,
        operand.sums,
        weight.qweight,
        weight.scales,
        weight.zeros,
        None if split else bias,
        offsets,
        row_index,
        out,
        rows,
        len(operand.x),
        m_tiles,
        out_features,
        *weight.tiles,
        experts,
        cut.k_blocks,
        cut.split_blocks,
        cut.splits,
        BLOCK_M=choice.block_m,
        BLOCK_K=cut.block_k,
        BLOCK_E=triton.next_power_of_2(max(experts, 1)),
        GROUP_M=GROUP_M,
        SPLIT=split,
        COMPUTE=TL_DTYPE[operand.x.dtype],
        **launch_options(choice, amd=torch.version.hip is not None),
    )
    if not split or dtype is None:
        return out
    y = torch.empty(rows, out_features, dtype=dtype, device=device)
    _finish_kernel[(rows * ceil_div(out_features, COLUMNS),)](
        out, bias, y, rows, out_features, cut.splits, COLUMNS=COLUMNS, enable_fp_fusion=False
    )
    return y


# -- the ops ----------------------------------------------------------------------------------------------------------
def int4_gemm(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    perm: Tensor | None,
    bias: Tensor | None,
    out_features: int,
    in_features: int,
    group_size: int,
    first_k: int,
    row_invariant: bool,
    activations: str,
) -> Tensor:
    if not len(x):
        return x.new_empty(0, out_features)
    weight = Weight(qweight, scales, zeros, perm, out_features, in_features, group_size, first_k)
    return product(arrange(x, weight), weight, len(x), compute_dtype(x.dtype), bias=bias).to(x.dtype)


def int4_grouped_gemm(
    x: Tensor,
    offsets: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    perm: Tensor | None,
    out_features: int,
    in_features: int,
    group_size: int,
    first_k: int,
    row_invariant: bool,
    activations: str,
) -> Tensor:
    if not len(x):
        return x.new_empty(0, out_features)
    weight = Weight(qweight, scales, zeros, perm, out_features, in_features, group_size, first_k)
    row_expert = None
    if perm is not None:
        rows = torch.arange(len(x), device=x.device)
        row_expert = (torch.searchsorted(offsets, rows, right=True) - 1).clamp_(0, len(qweight) - 1)
    operand = arrange(x, weight, row_expert=row_expert)
    return product(operand, weight, len(x), compute_dtype(x.dtype), offsets=offsets).to(x.dtype)


def int4_moe(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    w13_qweight: Tensor,
    w13_scales: Tensor,
    w13_zeros: Tensor | None,
    w13_perm: Tensor | None,
    w2_qweight: Tensor,
    w2_scales: Tensor,
    w2_zeros: Tensor | None,
    w2_perm: Tensor | None,
    hidden_size: int,
    intermediate_size: int,
    group_size: int,
    w13_first_k: int,
    w2_first_k: int,
    row_invariant: bool,
    activations: str,
) -> Tensor:
    (tokens, topk), experts, device = topk_ids.shape, len(w13_qweight), x.device
    rows, two_i = tokens * topk, 2 * intermediate_size
    if not rows:
        return torch.zeros_like(x)
    w13 = Weight(w13_qweight, w13_scales, w13_zeros, w13_perm, two_i, hidden_size, group_size, w13_first_k)
    w2 = Weight(w2_qweight, w2_scales, w2_zeros, w2_perm, hidden_size, intermediate_size, group_size, w2_first_k)
    # Rows sorted by expert (stable), the row of each slot, and no value read on the host.
    sorted_ids, order = topk_ids.reshape(-1).sort(stable=True)
    offsets = torch.searchsorted(sorted_ids, torch.arange(experts + 1, device=device))
    row_token, row_expert = order // topk, sorted_ids.clamp(0, experts - 1)
    slot_row = torch.empty_like(order).scatter_(0, order, torch.arange(rows, device=device))

    if w13.perm is None:  # one copy of each token: the product gathers
        partial = product(arrange(x, w13), w13, rows, None, offsets=offsets, row_index=row_token)
    else:  # the order of columns depends on the expert: one copy for each slot
        partial = product(arrange(x, w13, row_token, row_expert), w13, rows, None, offsets=offsets)
    hidden = Operand.empty(rows, w2, x.dtype)
    cut = w2.plan(hidden.x.dtype)
    _silu_mul_kernel[(rows * ceil_div(cut.padded_k, COLUMNS),)](
        partial,
        hidden.x,
        hidden.sums,
        row_expert,
        w2.perm,
        rows,
        intermediate_size,
        cut.padded_k,
        len(partial),
        BLOCK_K=cut.block_k,
        COLUMNS=COLUMNS,
        enable_fp_fusion=False,
    )
    partial = product(hidden, w2, rows, None, offsets=offsets)
    y = torch.empty(tokens, hidden_size, dtype=compute_dtype(x.dtype), device=device)
    _combine_kernel[(tokens * ceil_div(hidden_size, COLUMNS),)](
        partial,
        slot_row,
        topk_ids,
        topk_weights,
        y,
        rows,
        hidden_size,
        topk,
        experts,
        len(partial),
        COLUMNS=COLUMNS,
        enable_fp_fusion=False,
    )
    return y.to(x.dtype)


def int4_dequantize(
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    perm: Tensor | None,
    out_features: int,
    in_features: int,
    group_size: int,
    first_k: int,
    dtype: torch.dtype,
) -> Tensor:
    weight = Weight(qweight, scales, zeros, perm, out_features, in_features, group_size, first_k)
    lead = qweight.shape[:-3]
    out = torch.empty(*lead, out_features, in_features, dtype=compute_dtype(dtype), device=qweight.device)
    _dequantize_kernel[((weight.experts or 1) * out_features * ceil_div(in_features, COLUMNS),)](
        qweight,
        scales,
        zeros,
        None if perm is None else perm.argsort(-1),
        out,
        out_features,
        in_features,
        *weight.tiles,
        COLUMNS=COLUMNS,
        enable_fp_fusion=False,
    )
    return out.to(dtype)


# -- what is compiled without a GPU -----------------------------------------------------------------------------------
def compile_cases(target: str) -> list[CompileCase]:
    """The launches that the compile test builds for a target: products by dtype, tile and block, other kernels once."""
    half, single = TILES[torch.bfloat16], TILES[torch.float32]
    return [
        product_case(target, half[0], 128, split=True, symmetric=False, dtype=torch.float16),
        product_case(target, half[-1], 128, split=False, symmetric=True, dtype=torch.float16),
        product_case(target, half[0], 128, split=True, symmetric=True),
        product_case(target, half[1], 64, split=True, symmetric=False),
        product_case(target, half[-1], 128, split=False, symmetric=False),
        product_case(target, half[-1], 32, split=False, symmetric=False),
        product_case(target, half[0], 16, split=True, symmetric=True),
        product_case(target, half[0], 128, split=True, symmetric=True, grouped=True),
        product_case(target, half[-1], 128, split=False, symmetric=False, grouped=True),
        product_case(target, single[0], 32, split=True, symmetric=False, dtype=torch.float32),
        product_case(target, single[-1], 32, split=False, symmetric=False, dtype=torch.float32),
        other_case(
            "arrange",
            _arrange_kernel,
            "x *bf16, out *bf16, sums *fp32, row_index *i64, row_expert *i64, perm *i32, rows i32, "
            "in_features i32:16, padded_k i32:16",
            BLOCK_K=128,
            COMPUTE=tl.bfloat16,
        ),
        other_case(
            "finish",
            _finish_kernel,
            "partial *fp32, bias *bf16, out *bf16, rows i32, out_features i32:16, splits i32",
        ),
        other_case(
            "silu_mul",
            _silu_mul_kernel,
            "partial *fp32, out *bf16, sums *fp32, row_expert *i64, perm *i32, rows i32, intermediate_size i32:16, "
            "padded_k i32:16, splits i32",
            BLOCK_K=128,
        ),
        other_case(
            "combine",
            _combine_kernel,
            "partial *fp32, slot_row *i64, topk_ids *i64, topk_weights *fp32, out *bf16, rows i32, hidden_size i32:16, "
            "topk i32, experts i32, splits i32",
        ),
        other_case(
            "dequantize",
            _dequantize_kernel,
            "qweight *i32, scales *fp16, zeros *u8, inverse *i64, out *bf16, out_features i32:16, in_features i32:16, "
            "n_tiles i32, k_tiles i32, groups i32, group_tiles i32, first_tile i32",
        ),
    ]


def product_case(
    target: str,
    choice: Tile,
    block_k: int,
    *,
    split: bool,
    symmetric: bool,
    grouped: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> CompileCase:
    """One launch of ``_gemm_kernel`` with fp16 scales."""
    name = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
    types = {
        "x": f"*{name}",
        "sums": None if symmetric or dtype == torch.float32 else "*fp32",
        "qweight": "*i32",
        "scales": "*fp16",
        "zeros": None if symmetric else "*u8",
        "bias": None if split or grouped else f"*{name}",
        "offsets": "*i64" if grouped else None,
        "row_index": "*i64" if grouped else None,
        "out": "*fp32" if split or grouped else f"*{name}",
        "out_features": "i32:16",
    }
    integers = "rows x_rows m_tiles n_tiles k_tiles groups group_tiles first_tile experts k_blocks split_blocks splits"
    constants = {"BLOCK_M": choice.block_m, "BLOCK_K": block_k, "BLOCK_E": 128 if grouped else 1, "GROUP_M": GROUP_M}
    kind = f"{'grouped' if grouped else 'dense'}_{name}_m{choice.block_m}_k{block_k}"
    return CompileCase(
        name=f"{kind}{'_split' if split else ''}_{'symmetric' if symmetric else 'asymmetric'}",
        kernel=_gemm_kernel,
        signature={k: v for k, v in types.items() if v is not None} | dict.fromkeys(integers.split(), "i32"),
        constants={k: v for k, v in types.items() if v is None}
        | constants
        | {"SPLIT": split, "COMPUTE": TL_DTYPE[dtype]},
        options=launch_options(choice, amd=target.startswith("gfx")),
        matrix_units=dtype != torch.float32,
    )


def other_case(name: str, kernel: Any, signature: str, **constants: Any) -> CompileCase:
    """One launch of an elementwise kernel; ``signature`` is "argument type, ..."."""
    types = dict(entry.split() for entry in signature.split(", "))
    return CompileCase(
        name, kernel, types, constants | {"COLUMNS": COLUMNS}, {"num_warps": 4, "enable_fp_fusion": False}
    )
