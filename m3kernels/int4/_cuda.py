"""CUDA room of the int4 family: bf16 and fp16 products on NVIDIA GPUs of compute capability 8.0 and newer.

A product is one launch: of the kernel that crossovers.py names. int4_moe is four: routing, the two products, the sum
over a token's experts; act-order adds a gather of columns before a product. Nothing is read back on the host, and
nothing here allocates but results, workspaces and counters: calls can be captured in a CUDA graph. The exceptions are
pack_tiles and quantize_tiles, which load weights.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from m3kernels import _cuda_ext, cuda
from m3kernels.checks import refuse
from m3kernels.int4.crossovers import crossover
from m3kernels.int4.types import TILE_K, TILE_N, ceil_div, num_groups

TYPE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
HALVES = (torch.bfloat16, torch.float16)
PRODUCTS = ("int4_gemm", "int4_grouped_gemm", "int4_moe")
STORE, FLOAT, GATED = 0, 1, 2  # epilogues: y in x's dtype with bias; y in fp32; silu(gate) * up in x's dtype
MOST_EXPERTS = 2048  # that the routing kernel counts
NIBBLES = {"bytes": 0, "rows": 1, "columns": 2, "pairs": 3}  # where nibbles lie before they are in tiles: convert.py


def unsupported(op: str, first: Tensor, *args: Any) -> str:
    reason = cuda.refusal(first)
    if reason or op not in PRODUCTS:
        return reason
    if first.dtype not in HALVES:
        return "computes bf16 and fp16; fp32 is the Triton room's"
    if args[-1] in ("int16", "int8"):
        return f"activations {args[-1]!r}: the CUDA room rounds no activations: only 'exact' ('auto')"
    if op == "int4_moe" and len(args[2]) > MOST_EXPERTS:
        return f"routes at most {MOST_EXPERTS} experts"
    return ""


def _span(tensor: Tensor | None, dtype: torch.dtype | None = None) -> tuple[int, int]:
    """(address, elements) of a contiguous tensor of the given dtype; (0, 0) for None."""
    if tensor is None:
        return 0, 0
    if not tensor.is_contiguous() or (dtype is not None and tensor.dtype != dtype):
        raise refuse("m3kernels::int4", "tensor", f"contiguous {dtype or ''}", tensor)
    return tensor.data_ptr(), tensor.numel()


class Weight(NamedTuple):
    """A packed weight as an op receives it."""

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

    @property
    def spans(self) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
        return _span(self.qweight, torch.int32), _span(self.scales), _span(self.zeros, torch.uint8)

    @property
    def numbers(self) -> tuple[int, int, int, int, int]:
        return self.experts or 1, self.out_features, self.in_features, self.group_size, self.first_k


def kernel_name(x: Tensor, weight: Weight, rows: int, row_invariant: bool) -> str:
    """What crossovers.py says for the current device. A scale of another type may have no place in fp16: not for wgmma,
    which puts scales into the weight's 16 bits."""
    kernel = crossover(_cuda_ext.capability(), rows, weight.experts, row_invariant).kernel
    wide = x.dtype == torch.float16 and weight.scales.dtype != torch.float16
    return "many" if kernel == "wgmma" and wide else kernel


# -- pieces -----------------------------------------------------------------------------------------------------------
def product(
    kernel: str,
    x: Tensor,
    weight: Weight,
    rows: int,
    epilogue: int,
    *,
    bias: Tensor | None = None,
    row_index: Tensor | None = None,
    offsets: Tensor | None = None,
) -> Tensor:
    """(rows, N) of x's dtype or fp32, or (rows, N / 2), by ``epilogue``; row i reads row ``row_index[i]`` of x."""
    n, k, grouped = weight.out_features, weight.in_features, offsets is not None
    y = torch.empty(
        rows, n // 2 if epilogue == GATED else n, dtype=torch.float32 if epilogue == FLOAT else x.dtype, device=x.device
    )
    plan = _cuda_ext.int4_plan(n, k, grouped)
    workspace, counters = None, (0, 0)
    if kernel == "decode":
        floats, count = _cuda_ext.int4_decode_sizes(rows, weight.experts or 1, n, k, grouped, plan, epilogue)
        if floats:
            workspace = torch.empty(floats, dtype=torch.float32, device=x.device)
        if count:
            counters = cuda.counters(x, count).data_ptr(), count
    _cuda_ext.int4_product(
        kernel,
        _span(x),
        TYPE[x.dtype],
        len(x),
        rows,
        _span(row_index, torch.int32),
        (*weight.spans, TYPE[weight.scales.dtype], *weight.numbers),
        _span(offsets, torch.int32),
        _span(bias, x.dtype),
        epilogue,
        _span(y),
        _span(workspace),
        counters,
        plan,
        cuda.stream(x),
    )
    return y


def gather(
    x: Tensor, perm: Tensor, rows: int, row_index: Tensor | None = None, offsets: Tensor | None = None
) -> Tensor:
    """x in the order in which a weight stores its columns, (rows, K): act-order, of each row's expert."""
    experts = len(perm) if perm.ndim == 2 else 1
    y = x.new_empty(rows, x.shape[1])
    index, bounds = _span(row_index, torch.int32), _span(offsets, torch.int32)
    table = _span(perm, torch.int32)
    _cuda_ext.int4_gather(_span(x), len(x), x.shape[1], index, rows, table, bounds, experts, _span(y), cuda.stream(x))
    return y


def route(topk_ids: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """offsets (E + 1,), row_token (T k,), slot_row (T, k), int32: rows sorted by expert, stable; slot_row -1: no row.

    A slot whose expert does not exist has no row; as many rows at the end belong to no expert.
    """
    tokens, topk = topk_ids.shape
    offsets, row_token, workspace = (
        torch.empty(size, dtype=torch.int32, device=topk_ids.device)
        for size in (experts + 1, tokens * topk, _cuda_ext.int4_route_workspace(tokens, topk, experts))
    )
    slot_row = torch.empty_like(topk_ids, dtype=torch.int32)
    _cuda_ext.int4_route(
        _span(topk_ids, torch.int64),
        tokens,
        topk,
        experts,
        _span(offsets),
        _span(row_token),
        _span(slot_row),
        _span(workspace),
        (cuda.counters(topk_ids, 1).data_ptr(), 1),
        cuda.stream(topk_ids),
    )
    return offsets, row_token, slot_row


def combine(rows: Tensor, slot_row: Tensor, topk_weights: Tensor, dtype: torch.dtype) -> Tensor:
    """y[t] = sum_j topk_weights[t, j] * rows[slot_row[t, j]], in order of j, in fp32: (T, D) of dtype."""
    tokens, topk = slot_row.shape
    y = rows.new_empty(tokens, rows.shape[1], dtype=dtype)
    weights, places = _span(topk_weights, torch.float32), _span(slot_row, torch.int32)
    _cuda_ext.int4_combine(
        _span(rows), places, weights, tokens, topk, rows.shape[1], _span(y), TYPE[dtype], cuda.stream(rows)
    )
    return y


def gate(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """silu(gate) * up of fp32 rows (R, 2 I), gate first: (R, I) of dtype."""
    columns = rows.shape[1] // 2
    y = rows.new_empty(len(rows), columns, dtype=dtype)
    _cuda_ext.int4_gate(_span(rows), len(rows), columns, _span(y), TYPE[dtype], cuda.stream(rows))
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
    rows = len(x)
    if not rows:
        return x.new_empty(0, out_features)
    weight = Weight(qweight, scales, zeros, perm, out_features, in_features, group_size, first_k)
    with cuda.on_device(x):
        kernel = kernel_name(x, weight, rows, row_invariant)
        if perm is not None:
            x = gather(x, perm, rows)
        if kernel == "dense":
            return torch.nn.functional.linear(x, dequantize(weight._replace(perm=None), x.dtype), bias)
        return product(kernel, x, weight, rows, STORE, bias=bias)


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
    rows = len(x)
    if not rows:
        return x.new_empty(0, out_features)
    weight = Weight(qweight, scales, zeros, perm, out_features, in_features, group_size, first_k)
    with cuda.on_device(x):
        kernel = kernel_name(x, weight, rows, row_invariant)
        offsets = offsets.to(torch.int32)
        if perm is not None:
            x = gather(x, perm, rows, offsets=offsets)
        return product(kernel, x, weight, rows, STORE, offsets=offsets)


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
    rows, experts, two_i = topk_ids.numel(), len(w13_qweight), 2 * intermediate_size
    if not rows:
        return torch.zeros_like(x)
    w13 = Weight(w13_qweight, w13_scales, w13_zeros, w13_perm, two_i, hidden_size, group_size, w13_first_k)
    w2 = Weight(w2_qweight, w2_scales, w2_zeros, w2_perm, hidden_size, intermediate_size, group_size, w2_first_k)
    with cuda.on_device(x):
        kernel = kernel_name(x, w13, rows, row_invariant)
        offsets, row_token, slot_row = route(topk_ids, experts)
        source, index = (x, row_token) if w13.perm is None else (gather(x, w13.perm, rows, row_token, offsets), None)
        if intermediate_size % TILE_N == 0:
            hidden = product(kernel, source, w13, rows, GATED, row_index=index, offsets=offsets)
        else:  # gate and up of one column lie in different places of their tiles
            hidden = gate(product(kernel, source, w13, rows, FLOAT, row_index=index, offsets=offsets), x.dtype)
        if w2.perm is not None:
            hidden = gather(hidden, w2.perm, rows, offsets=offsets)
        return combine(product(kernel, hidden, w2, rows, FLOAT, offsets=offsets), slot_row, topk_weights, x.dtype)


def dequantize(weight: Weight, dtype: torch.dtype) -> Tensor:
    """(..., N, K) of dtype, columns in original order."""
    inverse = None if weight.perm is None else weight.perm.argsort(-1)
    device, sizes = weight.qweight.device, (weight.out_features, weight.in_features)
    y = torch.empty(*weight.qweight.shape[:-3], *sizes, dtype=dtype, device=device)
    qweight, scales, zeros = weight.spans
    kind, stream = TYPE[weight.scales.dtype], cuda.stream(y)
    _cuda_ext.int4_dequantize(
        qweight, scales, kind, zeros, _span(inverse), *weight.numbers, _span(y), TYPE[dtype], stream
    )
    return y


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
    with cuda.on_device(qweight):
        return dequantize(weight, dtype)


# -- weights, with the bits of types.py, convert.py and quantize.py ---------------------------------------------------
def pack_tiles(source: Tensor, nibbles: str, out_features: int, in_features: int, perm: Tensor | None) -> Tensor:
    """(..., Nt, Kt, 128) int32 tiles of q (..., N, K) uint8, or of int32 words; NIBBLES names where a nibble lies."""
    lead = source.shape[:-2] if nibbles == "bytes" else ()
    sizes = ceil_div(out_features, TILE_N), ceil_div(in_features, TILE_K), 128
    source = source.contiguous()
    tiles = torch.empty(*lead, *sizes, dtype=torch.int32, device=source.device)
    experts, table = lead.numel() if lead else 1, _span(perm, torch.int32)
    with cuda.on_device(source):
        _cuda_ext.int4_pack(
            _span(source),
            NIBBLES[nibbles],
            experts,
            out_features,
            in_features,
            table,
            _span(tiles),
            cuda.stream(source),
        )
    return tiles


def quantize_tiles(
    w: Tensor, group_size: int, symmetric: bool, scale_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """(tiles, scales, zeros or None) of w (..., N, K), as "minmax" rounds it; None: w is not finite or too large."""
    *lead, n, k = w.shape
    w, device = w.contiguous(), w.device
    tiles = torch.empty(*lead, ceil_div(n, TILE_N), ceil_div(k, TILE_K), 128, dtype=torch.int32, device=device)
    shape = (*lead, ceil_div(n, TILE_N), num_groups(k, group_size), TILE_N)
    scales = torch.empty(shape, dtype=scale_dtype, device=device)
    zeros = None if symmetric else torch.empty(shape, dtype=torch.uint8, device=device)
    problem = torch.zeros(1, dtype=torch.int32, device=device)
    with cuda.on_device(w):
        _cuda_ext.int4_quantize(
            _span(w),
            TYPE[w.dtype],
            lead[0] if lead else 1,
            n,
            k,
            group_size,
            _span(tiles),
            _span(scales),
            TYPE[scale_dtype],
            _span(zeros),
            _span(problem),
            cuda.stream(w),
        )
    return None if problem.item() else (tiles, scales, zeros)
