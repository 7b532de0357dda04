"""Tree attention over a paged cache: every row is computed as if it were alone.

    out = sigmoid(gate) * sum_j softmax_j(scale * q . k_j) v_j      over the prefix and the attended tree slots

Keys are taken in order of logical position, CHUNK at a time; position p of a row is slot p of the prefix, or the
(p - prefix)-th of its attended tree slots. A chunk starts at a multiple of CHUNK and enters through the same two matrix
products whatever it holds: scores, then one term of ``acc = acc * alpha + p v`` that starts from zero. SPLIT positions
form a split with a softmax of its own; splits are joined in order, by ``_joint``, in whichever kernel. So the bits of a
row follow from its own q, gate and keys:
  - an element of a matrix product is a sum over one row of the left and one column of the right operand, in an order
    that the shape of the tile fixes; a launch has one tile shape for a head geometry and dtype, decoding or not;
  - positions outside a row enter its sums as zeros; where a neighbour's values could turn those into nan (they are not
    finite) or the slots differ (tree slots), the rows of one query go through the chunk on their own;
  - a row that has no key in a chunk or split keeps its state untouched.
A block id outside the cache makes the row nan and is not followed.

Rows of int8 caches are integers with one scale. The integers of keys enter the product as they are, which 16 bits hold
exactly, and the scale multiplies the score; the scale of a value multiplies its weight, where operands have the range
of fp32, and the value where they are fp16, which is rounded to fp16.
"""
# In kernels, `if TREE:` decides at compile time and the next `if` at run time; a tuple grows by +.
# ruff: noqa: SIM102, SIM108, RUF005
# The arguments of a Triton kernel have no Python type.
# mypy: disallow-untyped-defs=False
# mypy: disable-error-code="assignment"

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from m3kernels.spec_decode.triton_arithmetic import (
    INTERPRET,
    NOWHERE,
    TL_DTYPE,
    block,
    case,
    launch,
    request_of,
    round_to,
)
from m3kernels.triton_compile import CompileCase

SPLIT = 512  # positions per split: a context of 4096 is 8 programs a head
WORKSPACE_BYTES = 64 << 20  # of partial sums; beyond, a program goes through its splits one after the other
SINGLE, PARTIAL, SERIAL = (tl.constexpr(kind) for kind in range(3))
LOG2_E = 1.4426950408889634


class Tile(NamedTuple):
    """How one geometry is cut: rows (queries x heads of a group), positions per chunk, and how it is launched."""

    block_m: int
    chunk: int
    piece: int  # columns of a head taken together: bounds the operands and terms that registers hold
    num_warps: int
    num_stages: int


# By target; the largest tiles whose sums stay in registers. A tile of 64 rows reaches wgmma and tcgen05; there a second
# warp group shares the columns.
TILES = {
    "sm_80": {64: Tile(32, 32, 64, 8, 3), 128: Tile(32, 32, 64, 8, 3), 256: Tile(32, 32, 64, 8, 1)},
    "sm_90": {64: Tile(64, 64, 64, 4, 3), 128: Tile(64, 64, 64, 8, 3), 256: Tile(16, 32, 64, 8, 1)},
    "sm_100": {64: Tile(64, 64, 64, 8, 1), 128: Tile(64, 64, 64, 8, 1), 256: Tile(64, 64, 64, 8, 1)},
    "gfx942": {64: Tile(32, 32, 64, 4, 1), 128: Tile(32, 32, 64, 4, 1), 256: Tile(16, 32, 64, 4, 1)},
}
INT8_TILES = {  # where scales and conversions need registers
    "sm_80": {256: Tile(32, 16, 64, 8, 1)},
    "sm_90": {64: Tile(64, 32, 64, 8, 3), 128: Tile(64, 32, 64, 8, 1)},
    "sm_100": {256: Tile(64, 32, 64, 8, 1)},
    "gfx942": {},
}
EXACT_TILE = Tile(16, 16, 64, 8, 1)  # fp32 products, without matrix units


def tile(head_size: int, compute: torch.dtype, int8: bool, target: str) -> Tile:
    """A function of the head, the dtypes and the GPU only: never of the call."""
    if compute == torch.float32:
        return EXACT_TILE
    size = 64 if head_size <= 64 else 128 if head_size <= 128 else 256
    return INT8_TILES[target].get(size, TILES[target][size]) if int8 else TILES[target][size]


@functools.cache
def target_of(device: torch.device) -> str:
    if torch.version.hip is not None:
        return "gfx942"
    major = 9 if device.type == "cpu" else torch.cuda.get_device_capability(device)[0]
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_80")


def compute_dtype(q: torch.dtype, cache: torch.dtype) -> torch.dtype:
    """Dtype of the operands of the matrix products: 16 bits only where nothing is rounded."""
    exact = cache in (q, torch.int8) and not (INTERPRET and q == torch.bfloat16)
    return q if exact else torch.float32


@triton.jit
def _tree_of(cu_seqlens, tree_lens, b):
    """Keys of request b after its prefix: those of its tree, or its queries."""
    if tree_lens is None:
        keys = tl.load(cu_seqlens + b + 1) - tl.load(cu_seqlens + b)
    else:
        keys = tl.load(tree_lens + b)
    return keys


# Grid: (rows of mask_bits). A program lists the tree slots that one row attends to, in order, and counts them.
@triton.jit
def _attended_kernel(mask_bits, cu_seqlens, tree_lens, slots, counts, requests, bits, BLOCK: tl.constexpr):
    t = tl.program_id(0).to(tl.int64)
    b = request_of(cu_seqlens, tl.program_id(0), requests, 1)
    tree = _tree_of(cu_seqlens, tree_lens, b)
    mask_bits += t * (bits // 32)
    slots += t * bits
    count = 0
    for start in range(0, bits, BLOCK):
        j = start + tl.arange(0, BLOCK)
        word = tl.load(mask_bits + j // 32, mask=j < bits, other=0)
        taken = ((word >> (j % 32)) & 1) * (j < tree).to(tl.int32)
        rank = count + tl.cumsum(taken, 0) - taken
        tl.store(slots + rank, j, mask=taken == 1)
        count += tl.sum(taken, 0)
    tl.store(counts + t, count)


@triton.jit
def _joint(total_m, total_norm, m, norm):
    """(m, norm, factors) of two splits together; where one holds nothing the other stays as it is: its factor is 1."""
    top = tl.where(norm == 0.0, total_m, tl.where(total_norm == 0.0, m, tl.maximum(total_m, m)))
    before = tl.where(total_norm == 0.0, 0.0, tl.exp2(total_m - top))
    after = tl.where(norm == 0.0, 0.0, tl.exp2(m - top))
    return top, total_norm * before + norm * after, before, after


@triton.jit
def _joint_acc(total, before, acc, after):
    joint = total * before[:, None] + acc * after[:, None]
    joint = tl.where(tl.broadcast_to((before == 0.0)[:, None], acc.shape), acc * after[:, None], joint)
    return tl.where(tl.broadcast_to((after == 0.0)[:, None], acc.shape), total * before[:, None], joint)


@triton.jit
def _finish(norm, acc, gate, gate_at, mask, GATE: tl.constexpr, dtype: tl.constexpr):
    """Normalised, gated and rounded: (rows, columns). A row without keys is 0. GATE 2: gate_at has the shape of acc."""
    out = tl.where(tl.broadcast_to((norm == 0.0)[:, None], acc.shape), 0.0, acc / norm[:, None])
    if GATE > 0:
        g = tl.load(gate + gate_at, mask=mask, other=0.0).to(tl.float32)
        out = out * (1.0 / (1.0 + tl.exp(-g)))
    return round_to(out, dtype)


@triton.jit
def _tile_of(row, real, column, head_size):
    """(offsets, mask) of columns of rows of ``head_size`` elements."""
    return row[:, None] * head_size + column[None, :], real[:, None] & (column < head_size)[None, :]


@triton.jit
def _rows_again(
    cu_seqlens, b, first, begin, active, kv_head, head_block, heads, group, HEADS: tl.constexpr, BLOCK_M: tl.constexpr
):  # fmt: skip
    """(rows of ``out``, whether they exist), from memory, so that they are not kept in registers through the loops."""
    again = tl.load(cu_seqlens + b, volatile=True)
    row = tl.arange(0, BLOCK_M) + (again - first)
    in_group = head_block * HEADS + row % HEADS
    real = (row // HEADS < active) & (in_group < group)
    return (again + begin + row // HEADS).to(tl.int64) * heads + kv_head * group + in_group, real


@triton.jit
def _slot_offsets(slot, wanted, block_table, page_size, pages, page_stride, slot_stride):
    """(offsets of cache slots, whether they can be read); ``wanted`` slots lie inside the table."""
    page = slot // page_size
    block_id = tl.load(block_table + page, mask=wanted, other=0)
    good = wanted & (block_id >= 0) & (block_id < pages)
    inside = slot - page * page_size
    return block_id.to(tl.int64) * page_stride + inside.to(tl.int64) * slot_stride, good


@triton.jit
def _value_scales(slot, wanted, block_table, v_scale, page_size, pages, v_scale_page, v_scale_slot):
    """Scales of int8 values of slots, None of others."""
    scales = None
    if v_scale is not None:
        at, good = _slot_offsets(slot, wanted, block_table, page_size, pages, v_scale_page, v_scale_slot)
        scales = tl.load(v_scale + at, mask=good, other=0.0)
    return scales


@triton.jit
def _values(v_cache, at, good, scales, column, head_size, COMPUTE: tl.constexpr):
    """Columns of values as operands of a product, in fp16 with their scales: (slots, columns)."""
    mask = good[:, None] & (column < head_size)[None, :]
    v = tl.load(v_cache + at[:, None] + column[None, :], mask=mask, other=0)
    if scales is not None:
        if tl.float16 == COMPUTE:
            v = v.to(tl.float32) * scales[:, None]
    return v.to(COMPUTE)


@triton.jit
def _chunk(
    q,
    m,
    norm,
    acc,
    rows,
    valid,
    slot,
    wanted,
    block_table,
    k_cache,
    v_cache,
    k_scale,
    v_scale,
    page_size,
    pages,
    k_page,
    k_slot,
    v_page,
    v_slot,
    k_scale_page,
    k_scale_slot,
    v_scale_page,
    v_scale_slot,
    scale,
    head_size,
    SHARED: tl.constexpr,
    PIECES: tl.constexpr,
    PIECE: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Online softmax of one chunk for rows ``rows``, whose keys in it are ``valid`` (SHARED: every row, every key)."""
    at, good = _slot_offsets(slot, wanted, block_table, page_size, pages, k_page, k_slot)
    s = tl.zeros((q[0].shape[0], slot.shape[0]), tl.float32)
    for i in tl.static_range(PIECES):
        column = i * PIECE + tl.arange(0, PIECE)
        in_head = (column < head_size)[:, None]
        if k_scale is None:
            k = tl.load(k_cache + at[None, :] + column[:, None], mask=good[None, :] & in_head, other=float("nan"))
            k = tl.where(in_head, k, 0.0)  # (PIECE, CHUNK)
        else:
            k = tl.load(k_cache + at[None, :] + column[:, None], mask=good[None, :] & in_head, other=0)
        s = tl.dot(q[i], k.to(COMPUTE), s, input_precision="ieee")
    s = s * scale
    if k_scale is not None:
        at, good = _slot_offsets(slot, wanted, block_table, page_size, pages, k_scale_page, k_scale_slot)
        s = s * tl.load(k_scale + at, mask=good, other=float("nan"))[None, :]
    if not SHARED:
        s = tl.where(valid, s, float("-inf"))
    top = tl.maximum(m, tl.max(s, 1))
    if not SHARED:
        top = tl.where(rows, top, 0.0)
    p = tl.exp2(s - top[:, None])
    alpha = tl.exp2(m - top)
    total = norm * alpha + tl.sum(p, 1)
    at, good = _slot_offsets(slot, wanted, block_table, page_size, pages, v_page, v_slot)
    scales = _value_scales(slot, wanted, block_table, v_scale, page_size, pages, v_scale_page, v_scale_slot)
    if scales is not None:
        if tl.float16 != COMPUTE:
            p = p * scales[None, :]
    joint = ()
    for i in tl.static_range(PIECES):
        v = _values(v_cache, at, good, scales, i * PIECE + tl.arange(0, PIECE), head_size, COMPUTE)
        term = tl.dot(p.to(COMPUTE), v, input_precision="ieee")
        term = tl.fma(acc[i], tl.broadcast_to(alpha[:, None], term.shape), term)
        if not SHARED:
            term = tl.where(tl.broadcast_to(rows[:, None], term.shape), term, acc[i])
        joint = joint + (term,)
    if not SHARED:
        top = tl.where(rows, top, m)
        total = tl.where(rows, total, norm)
    return top, total, joint


@triton.jit
def _finite_values(
    slot, wanted, block_table, v_cache, v_scale, page_size, pages, v_page, v_slot, v_scale_page, v_scale_slot,
    head_size, PIECES: tl.constexpr, PIECE: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Whether all values of a chunk, and their scales, are finite."""
    at, good = _slot_offsets(slot, wanted, block_table, page_size, pages, v_page, v_slot)
    scales = _value_scales(slot, wanted, block_table, v_scale, page_size, pages, v_scale_page, v_scale_slot)
    found = 0
    if scales is not None:
        found = tl.max(tl.where(tl.abs(scales) < float("inf"), 0, 1), 0)
    for i in tl.static_range(PIECES if v_scale is None or tl.float16 == COMPUTE else 0):
        v = _values(v_cache, at, good, scales, i * PIECE + tl.arange(0, PIECE), head_size, COMPUTE)
        infinite = tl.where(tl.abs(v.to(tl.float32)) < float("inf"), 0, 1)
        found += tl.max(tl.max(infinite, 1), 0)
    return found == 0


# Grid: (blocks of queries, kv heads * blocks of their query heads, splits if PARTIAL). A program owns BLOCK_M rows:
# BLOCK_M / HEADS queries of one request, each with HEADS query heads of one kv head; request b has room for blocks from
# cu[b] // queries + b on, the surplus returns. Reads the keys and values of its rows' positions: whole chunks of the
# shared prefix once, chunks where rows differ once if that is safe and the rows attend to the same slots, else once a
# query. PARTIAL: one split, its sums go to ``part`` (T, H, splits, D) and ``part_ml`` (T, H, splits, 2). SERIAL: all
# splits in order, their joint sum waits in ``part`` (T, H, D), and the rows of ``out``. SINGLE: there is one split.
@triton.jit(do_not_specialize=["requests", "window", "splits", "table_width"])
def _attention_kernel(
    q,
    k_cache,
    v_cache,
    k_scale,
    v_scale,
    block_table,
    cache_seqlens,
    cu_seqlens,
    tree_lens,
    slots,
    counts,
    gate,
    out,
    part,
    part_ml,
    requests,
    heads,
    group,
    head_size,
    page_size,
    pages,
    table_width,
    bits,
    window,
    splits,
    scale,
    q_token,
    q_head,
    k_page,
    k_slot,
    k_head,
    v_page,
    v_slot,
    v_head,
    k_scale_page,
    k_scale_slot,
    k_scale_head,
    v_scale_page,
    v_scale_slot,
    v_scale_head,
    GATE: tl.constexpr,
    KIND: tl.constexpr,
    TREE: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PIECES: tl.constexpr,
    PIECE: tl.constexpr,
    CHUNK: tl.constexpr,
    SPLIT: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    QUERIES: tl.constexpr = BLOCK_M // HEADS
    CHUNKS: tl.constexpr = SPLIT // CHUNK
    b = request_of(cu_seqlens, tl.program_id(0), requests, QUERIES)
    first = tl.load(cu_seqlens + b)
    queries = tl.load(cu_seqlens + b + 1) - first
    begin = (tl.program_id(0) - (first // QUERIES + b)) * QUERIES
    if QUERIES == 1:
        begin = tl.program_id(0) - first
    if begin >= queries:
        return
    head_blocks = tl.cdiv(group, HEADS)
    kv_head = tl.program_id(1) // head_blocks
    head_block = tl.program_id(1) % head_blocks

    length = tl.load(cache_seqlens + b)
    prefix = length - _tree_of(cu_seqlens, tree_lens, b)
    impossible = (prefix < 0) | (prefix > length) | (length > table_width * page_size)
    active = tl.minimum(queries - begin, QUERIES)
    row = tl.arange(0, BLOCK_M)
    query = row // HEADS
    in_group = head_block * HEADS + row % HEADS
    real = (query < active) & (in_group < group)
    head = kv_head * group + in_group
    t = (first + begin + query).to(tl.int64)
    if TREE:
        end = prefix + tl.load(counts + t, mask=real, other=0)
    else:
        end = prefix + begin + query + 1
    end = tl.where(real & (not impossible), end, 0)
    start = tl.maximum(end - window, 0) if window > 0 else end * 0
    tile_q = ()
    q_at = t * q_token + head.to(tl.int64) * q_head
    for c in tl.static_range(PIECES):
        d = c * PIECE + tl.arange(0, PIECE)
        mask = real[:, None] & (d < head_size)[None, :]
        tile_q = tile_q + (tl.load(q + q_at[:, None] + d[None, :], mask=mask, other=0.0).to(COMPUTE),)
    block_table += b.to(tl.int64) * table_width
    k_cache += kv_head.to(tl.int64) * k_head
    v_cache += kv_head.to(tl.int64) * v_head
    if k_scale is not None:
        k_scale += kv_head.to(tl.int64) * k_scale_head
        v_scale += kv_head.to(tl.int64) * v_scale_head

    # Chunks [first_chunk, shared), [shared, own), [own, last): some rows and keys; all rows, all keys; some again.
    last_position = tl.max(end, 0)
    first_chunk = tl.min(tl.where(real, start, NOWHERE), 0) // CHUNK
    last = tl.cdiv(last_position, CHUNK)
    common = tl.min(tl.where(real, end, NOWHERE), 0)
    if TREE:
        common = tl.minimum(common, prefix)
    shared = tl.minimum(tl.cdiv(tl.max(tl.where(real, start, 0), 0), CHUNK), last)
    own = tl.maximum(common // CHUNK, shared)

    low = tl.program_id(2) * CHUNKS if KIND == PARTIAL else (first_chunk // CHUNKS) * CHUNKS
    high = tl.minimum(low + CHUNKS, last) if KIND == PARTIAL else last
    if KIND == PARTIAL:
        if (low >= last) | (low + CHUNKS <= first_chunk):
            return

    total_m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total_norm = tl.zeros((BLOCK_M,), tl.float32)
    total_acc = ()
    for _ in tl.static_range(PIECES):
        total_acc = total_acc + (tl.zeros((BLOCK_M, PIECE), tl.float32),)
    for split in range(low, high, CHUNKS):
        m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        norm = tl.zeros((BLOCK_M,), tl.float32)
        acc = ()
        for _ in tl.static_range(PIECES):
            acc = acc + (tl.zeros((BLOCK_M, PIECE), tl.float32),)
        split_first = tl.maximum(split, first_chunk)
        split_last = tl.minimum(split + CHUNKS, last)
        for side in range(2):
            for chunk in range(tl.maximum(split_first, shared), tl.minimum(split_last, own) * side):
                position = chunk * CHUNK + tl.arange(0, CHUNK)
                m, norm, acc = _chunk(
                    tile_q, m, norm, acc, real, real[:, None], position, position >= 0, block_table, k_cache, v_cache,
                    k_scale, v_scale, page_size, pages, k_page, k_slot, v_page, v_slot, k_scale_page, k_scale_slot,
                    v_scale_page, v_scale_slot, scale, head_size, True, PIECES, PIECE, COMPUTE,
                )  # fmt: skip
            from_chunk = tl.maximum(split_first, own) if side == 1 else split_first
            to_chunk = split_last if side == 1 else tl.minimum(split_last, shared)
            for chunk in range(from_chunk, to_chunk):
                position = chunk * CHUNK + tl.arange(0, CHUNK)
                present = position < last_position
                together = True
                if TREE:
                    together = (chunk + 1) * CHUNK <= prefix
                if together:
                    together = _finite_values(
                        position, present, block_table, v_cache, v_scale, page_size, pages, v_page, v_slot,
                        v_scale_page, v_scale_slot, head_size, PIECES, PIECE, COMPUTE,
                    )  # fmt: skip
                for i in range(1 if together else active):
                    rows = real & (together | (query == i))
                    from_position = tl.min(tl.where(rows, start, NOWHERE), 0)
                    to_position = tl.max(tl.where(rows, end, 0), 0)
                    wanted = (position >= from_position) & (position < to_position)
                    slot = position
                    if TREE:
                        at = slots + (first + begin + i).to(tl.int64) * bits + (position - prefix)
                        in_tree = tl.load(at, mask=wanted & (position >= prefix), other=0)
                        slot = tl.where(position >= prefix, prefix + in_tree, position)
                    valid = (position[None, :] >= start[:, None]) & (position[None, :] < end[:, None])
                    some = rows & (start < (chunk + 1) * CHUNK) & (end > chunk * CHUNK)
                    m, norm, acc = _chunk(
                        tile_q, m, norm, acc, some, valid, slot, wanted, block_table, k_cache, v_cache,
                        k_scale, v_scale, page_size, pages, k_page, k_slot, v_page, v_slot, k_scale_page, k_scale_slot,
                        v_scale_page, v_scale_slot, scale, head_size, False, PIECES, PIECE, COMPUTE,
                    )  # fmt: skip
        if KIND == SERIAL:
            out_row, own_rows = _rows_again(
                cu_seqlens, b, first, begin, active, kv_head, head_block, heads, group, HEADS, BLOCK_M
            )
            if split > low:
                tl.debug_barrier()
                m, norm, before, after = _joint(total_m, total_norm, m, norm)
                joined = ()
                for c in tl.static_range(PIECES):
                    at, mask = _tile_of(out_row, own_rows, c * PIECE + tl.arange(0, PIECE), head_size)
                    joined = joined + (_joint_acc(tl.load(part + at, mask=mask, other=0.0), before, acc[c], after),)
                acc = joined
            if split + CHUNKS < high:
                for c in tl.static_range(PIECES):
                    at, mask = _tile_of(out_row, own_rows, c * PIECE + tl.arange(0, PIECE), head_size)
                    tl.store(part + at, acc[c], mask=mask)
        total_m, total_norm, total_acc = m, norm, acc

    out_row, own_rows = _rows_again(
        cu_seqlens, b, first, begin, active, kv_head, head_block, heads, group, HEADS, BLOCK_M
    )
    if KIND == PARTIAL:
        at = out_row * splits + tl.program_id(2)
        tl.store(part_ml + at * 2, total_m, mask=own_rows)
        tl.store(part_ml + at * 2 + 1, total_norm, mask=own_rows)
        for c in tl.static_range(PIECES):
            part_at, mask = _tile_of(at, own_rows, c * PIECE + tl.arange(0, PIECE), head_size)
            tl.store(part + part_at, total_acc[c], mask=mask)
    else:
        total_norm = tl.where(impossible, float("nan"), total_norm)
        for c in tl.static_range(PIECES):
            at, mask = _tile_of(out_row, own_rows, c * PIECE + tl.arange(0, PIECE), head_size)
            gate_at = at if GATE == 2 else tl.broadcast_to(out_row[:, None], mask.shape)
            rounded = _finish(total_norm, total_acc[c], gate, gate_at, mask, GATE, out.dtype.element_ty)
            tl.store(out + at, rounded, mask=mask)


# Grid: (rows, blocks of heads). A program joins the splits of one query's heads, in order, and writes ``out``.
@triton.jit(do_not_specialize=["requests", "window", "splits", "table_width"])
def _join_kernel(
    part,
    part_ml,
    cache_seqlens,
    cu_seqlens,
    tree_lens,
    counts,
    gate,
    out,
    requests,
    heads,
    head_size,
    page_size,
    table_width,
    window,
    splits,
    GATE: tl.constexpr,
    TREE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPLIT: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    b = request_of(cu_seqlens, tl.program_id(0), requests, 1)
    first = tl.load(cu_seqlens + b)
    length = tl.load(cache_seqlens + b)
    prefix = length - _tree_of(cu_seqlens, tree_lens, b)
    impossible = (prefix < 0) | (prefix > length) | (length > table_width * page_size)
    end = prefix + (tl.load(counts + t) if TREE else tl.program_id(0) - first + 1)
    if impossible:
        end = 0
    start = tl.maximum(end - window, 0) if window > 0 else 0
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    d = tl.arange(0, BLOCK_D)
    in_heads = head < heads
    mask = in_heads[:, None] & (d < head_size)[None, :]
    row = t * heads + head
    m = tl.full((BLOCK_H,), float("-inf"), tl.float32)
    norm = tl.zeros((BLOCK_H,), tl.float32)
    acc = tl.zeros((BLOCK_H, BLOCK_D), tl.float32)
    for split in range(start // SPLIT, tl.cdiv(end, SPLIT)):
        at = row * splits + split
        split_m = tl.load(part_ml + at * 2, mask=in_heads, other=0.0)
        split_norm = tl.load(part_ml + at * 2 + 1, mask=in_heads, other=0.0)
        split_acc = tl.load(part + at[:, None] * head_size + d[None, :], mask=mask, other=0.0)
        m, norm, before, after = _joint(m, norm, split_m, split_norm)
        acc = _joint_acc(acc, before, split_acc, after)
    norm = tl.where(impossible, float("nan"), norm)
    at = row[:, None] * head_size + d[None, :]
    gate_at = at if GATE == 2 else tl.broadcast_to(row[:, None], mask.shape)
    tl.store(out + at, _finish(norm, acc, gate, gate_at, mask, GATE, out.dtype.element_ty), mask=mask)


def tree_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    cu_seqlens_q: Tensor,
    mask_bits: Tensor | None,
    gate: Tensor | None,
    softmax_scale: float,
    window: int,
    tree_lens: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    tokens, heads, head_size = q.shape
    requests, table_width = block_table.shape
    pages, page_size, kv_heads, _ = k_cache.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if not out.numel():
        return out
    slots = counts = None
    bits = 0
    gate = None if gate is None else gate.contiguous()
    if mask_bits is not None:
        bits = mask_bits.shape[1] * 32
        slots = torch.empty(tokens, bits, dtype=torch.int32, device=q.device)
        counts = torch.empty(tokens, dtype=torch.int32, device=q.device)
        launch(
            _attended_kernel, (tokens,), q, mask_bits, cu_seqlens_q, tree_lens, slots, counts, requests, bits,
            BLOCK=block(bits, 1024), num_warps=1,
        )  # fmt: skip
    compute = compute_dtype(q.dtype, k_cache.dtype)
    group = heads // kv_heads
    plan = tile(head_size, compute, k_scale is not None, target_of(q.device))
    rows = min(triton.next_power_of_2(group), plan.block_m)  # heads of a query in a program
    queries = plan.block_m // rows
    splits = triton.cdiv(table_width * page_size, SPLIT)
    partial = splits > 1 and tokens * heads * splits * (head_size + 2) * 4 <= WORKSPACE_BYTES
    kind = PARTIAL if partial else SERIAL if splits > 1 else SINGLE
    part = part_ml = None
    if kind.value == SERIAL.value:
        part = torch.empty(tokens, heads, head_size, dtype=torch.float32, device=q.device)
    if kind.value == PARTIAL.value:
        part = torch.empty(tokens, heads, splits, head_size, dtype=torch.float32, device=q.device)
        part_ml = torch.empty(tokens, heads, splits, 2, dtype=torch.float32, device=q.device)
    scale = softmax_scale * LOG2_E
    gate_kind = 0 if gate is None else gate.ndim - 1
    block_d = block(head_size, 256)
    blocks = tokens if queries == 1 else tokens // queries + requests
    launch(
        _attention_kernel,
        (blocks, kv_heads * triton.cdiv(group, rows), splits if partial else 1),
        q, q, k_cache, v_cache, k_scale, v_scale, block_table, cache_seqlens, cu_seqlens_q, tree_lens, slots, counts,
        gate, out, part, part_ml, requests, heads, group, head_size, page_size, pages, table_width, bits, window,
        splits, scale,
        q.stride(0), q.stride(1), *k_cache.stride()[:3], *v_cache.stride()[:3],
        *(x for scales in (k_scale, v_scale) for x in ((None,) * 3 if scales is None else scales.stride())),
        GATE=gate_kind,
        KIND=kind.value,
        TREE=mask_bits is not None,
        HEADS=rows,
        BLOCK_M=plan.block_m,
        PIECES=triton.cdiv(block_d, plan.piece),
        PIECE=min(block_d, plan.piece),
        CHUNK=plan.chunk,
        SPLIT=SPLIT,
        COMPUTE=TL_DTYPE[compute],
        num_warps=plan.num_warps,
        num_stages=plan.num_stages,
    )  # fmt: skip
    if partial:
        block_h = block(heads, 4, 1)
        launch(
            _join_kernel,
            (tokens, triton.cdiv(heads, block_h)),
            q, part, part_ml, cache_seqlens, cu_seqlens_q, tree_lens, counts, gate, out,
            requests, heads, head_size, page_size, table_width, window, splits,
            GATE=gate_kind,
            TREE=mask_bits is not None,
            BLOCK_H=block_h,
            BLOCK_D=block_d,
            SPLIT=SPLIT,
            num_warps=4,
        )  # fmt: skip
    return out


# -- what is compiled without a GPU -----------------------------------------------------------------------------------
def cases(target: str) -> list[CompileCase]:
    """Launches of a decoding model (16 bits, heads of 128 and 64), of a prefill, of fp32, with everything and plain."""
    return [
        attention_case(target, "bf16", "bf16", 128, 4, kind=PARTIAL, tree=True, gate=2),
        attention_case(target, "bf16", "bf16", 128, 4, kind=SERIAL, tree=False, gate=0),
        attention_case(target, "fp16", "fp16", 64, 3, kind=PARTIAL, tree=True, gate=2),
        attention_case(target, "bf16", "bf16", 256, 8, kind=SERIAL, tree=True, gate=2),
        attention_case(target, "fp32", "fp32", 64, 4, kind=PARTIAL, tree=True, gate=2),
        attention_case(target, "fp32", "bf16", 256, 4, kind=SERIAL, tree=True, gate=2),
        attention_case(target, "bf16", "i8", 128, 4, kind=PARTIAL, tree=True, gate=2),
        attention_case(target, "fp16", "i8", 64, 3, kind=SERIAL, tree=False, gate=0),
        attention_case(target, "bf16", "i8", 256, 8, kind=SERIAL, tree=True, gate=2),
        attention_case(target, "fp32", "i8", 64, 4, kind=PARTIAL, tree=True, gate=2),
        join_case("bf16", 128, tree=True, gate=2),
        join_case("fp32", 64, tree=False, gate=0),
        case(
            "attended", _attended_kernel,
            "mask_bits *i32, cu_seqlens *i32, tree_lens *i32, slots *i32, counts *i32, requests i32, bits i32", 1,
            BLOCK=64,
        ),
    ]  # fmt: skip


def attention_case(
    target: str, q: str, cache: str, head_size: int, group: int, *, kind: tl.constexpr, tree: bool, gate: int
) -> CompileCase:
    names = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    exact = names[q] if cache in (q, "i8") else torch.float32
    plan = tile(head_size, exact, cache == "i8", target)
    extra = "tree_lens *i32, slots *i32, counts *i32, " if tree else ""
    extra += "k_scale *fp32, v_scale *fp32, " if cache == "i8" else ""
    extra += f"gate *{q}, " if gate else ""
    extra += "part *fp32, " if kind != SINGLE else ""
    extra += "part_ml *fp32, " if kind == PARTIAL else ""
    names_of = [f"{x}_scale_{stride}" for x in "kv" for stride in ("page", "slot", "head")] if cache == "i8" else []
    scale_strides = "".join(f", {name} i32" for name in names_of)
    made = case(
        f"attention_{q}_{cache}_{head_size}{'_tree' if tree else ''}_{('single', 'partial', 'serial')[kind.value]}",
        _attention_kernel,
        f"q *{q}, k_cache *{cache}, v_cache *{cache}, block_table *i32, cache_seqlens *i32, cu_seqlens *i32, {extra}"
        f"out *{q}, requests i32, heads i32, group i32, head_size i32:16, page_size i32:16, pages i32, "
        "table_width i32, bits i32:16, window i32, splits i32, scale fp32, q_token i32:16, q_head i32:16, "
        "k_page i32:16, k_slot i32:16, k_head i32:16, v_page i32:16, v_slot i32:16, v_head i32:16" + scale_strides,
        plan.num_warps,
        plan.num_stages,
        GATE=gate,
        KIND=kind.value,
        TREE=tree,
        HEADS=triton.next_power_of_2(group),
        BLOCK_M=plan.block_m,
        PIECES=triton.cdiv(head_size, plan.piece),
        PIECE=min(head_size, plan.piece),
        CHUNK=plan.chunk,
        SPLIT=SPLIT,
        COMPUTE=TL_DTYPE[exact],
    )
    return made._replace(matrix_units=exact != torch.float32 and (target != "sm_90" or plan.block_m == 64))


def join_case(dtype: str, head_size: int, *, tree: bool, gate: int) -> CompileCase:
    return case(
        f"join_{dtype}_{head_size}",
        _join_kernel,
        f"part *fp32, part_ml *fp32, cache_seqlens *i32, cu_seqlens *i32, "
        f"{'tree_lens *i32, counts *i32, ' if tree else ''}"
        f"{f'gate *{dtype}, ' if gate else ''}out *{dtype}, requests i32, heads i32, head_size i32:16, "
        "page_size i32:16, table_width i32, window i32, splits i32",
        GATE=gate,
        TREE=tree,
        BLOCK_H=4,
        BLOCK_D=head_size,
        SPLIT=SPLIT,
    )
