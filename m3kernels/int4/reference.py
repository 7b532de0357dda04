"""INT4 GEMM in plain torch, fp64: the contract that every other room is tested against.

    exact:        y[m, n] = sum_k x[m, k] * (u[n, k] - z[n, g]) * s[n, g] + bias[n],      g = group(k)
    int16, int8:  x is first rounded per row and activation block b: q = rint(x * (L / max|x_b|)), L = 32767 or 127;
                  y[m, n] = sum_b s[n, g] * (max|x_b| / L) * sum_{k in b} q[m, k] * (u[n, k] - z[n, g]) + bias[n]

An activation block is a run of whole 16-column tiles inside one group, at most 128 columns, counted from the start of
the group (or of the weight). With act-order, x is gathered by ``perm`` first. A row that rounding would hurt (see
``rows_to_compute_exactly``) is computed exactly instead: the choice depends on that row alone, so results are
row-invariant.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from m3kernels.int4.types import TILE_K, Int4Weight, ceil_div, check_perm

ACTIVATIONS = ("auto", "exact", "int16", "int8")  # "auto" here is exact
LIMIT = {"int16": 32767.0, "int8": 127.0}
BLOCK_K = 128  # columns of an activation block at most: 128 * 15 * 32767 stays far inside int32
OUTLIER_RATIO = 1024.0  # int16 only: max|x| over the mean of the others, beyond which a row is computed exactly
SMALLEST_MAX = 1e-30  # a block with a smaller maximum that is not 0 cannot be scaled in fp32

# Error of a result against fp64, as a multiple c of the error of torch in the same dtype on the same dequantised
# weights, plus eps relative to the largest |y|: RMS and max. fp32 torch sums in another order, hence 1.5.
TOLERANCE = {"c": 1.5, "eps": 1e-6}
# Relative error (RMS over RMS) that rounding the activations may add on rows without outliers, against exact.
ACTIVATION_ERROR = {"int16": 5e-5, "int8": 8e-3}


def make_inputs(
    m: int,
    n: int,
    k: int,
    *,
    group_size: int = 128,
    symmetric: bool = False,
    act_order: bool = False,
    experts: int | None = None,
    dtype: torch.dtype = torch.float32,
    scale_dtype: torch.dtype = torch.float16,
    bias: bool = False,
    seed: int = 0,
) -> tuple[Tensor, Int4Weight, Tensor | None]:
    """(x (m, k), weight (n, k) or E of them, bias (n,) or None): Gaussian x, uniform nibbles, spread scales."""
    from m3kernels.int4.types import num_groups

    generator = torch.Generator().manual_seed(seed)
    lead = () if experts is None else (experts,)
    groups = num_groups(k, group_size)
    q = torch.randint(0, 16, (*lead, n, k), generator=generator, dtype=torch.uint8)
    scales = (torch.rand(*lead, n, groups, generator=generator) * 0.02 + 0.001).to(scale_dtype)
    zeros = None if symmetric else torch.randint(0, 17, (*lead, n, groups), generator=generator, dtype=torch.uint8)
    perm = torch.rand(*lead, k, generator=generator).argsort(-1).int() if act_order else None
    weight = Int4Weight.pack(q, scales, zeros, group_size=group_size, perm=perm)
    x = torch.randn(m, k, generator=generator).to(dtype)
    return x, weight, torch.randn(n, generator=generator).to(dtype) if bias else None


def unsupported(op: str, *args: object) -> str:
    return ""


def activation_blocks(in_features: int, group_size: int, first_k: int = 0) -> list[tuple[int, int, int]]:
    """[(start column, stop column, group)] of the activation blocks, in order; columns padded to 16 are cut off."""
    blocks: list[tuple[int, int, int]] = []
    for tile in range(ceil_div(in_features, TILE_K)):
        start = tile * TILE_K
        group = 0 if group_size == -1 else (first_k + start) // group_size - first_k // group_size
        stop = min(start + TILE_K, in_features)
        if blocks and blocks[-1][2] == group and start - blocks[-1][0] < BLOCK_K:
            blocks[-1] = (blocks[-1][0], stop, group)
        else:
            blocks.append((start, stop, group))
    return blocks


def rows_to_compute_exactly(x: Tensor, blocks: list[tuple[int, int, int]], activations: str) -> Tensor:
    """(M,) bool: rows with a block that is not finite, too small to scale, or (int16) whose maximum dwarfs the rest."""
    bad = torch.zeros(x.shape[0], dtype=torch.bool, device=x.device)
    for start, stop, _ in blocks:
        block = x[:, start:stop].float().abs()
        top, total = block.amax(1), block.sum(1)
        bad |= ~torch.isfinite(total) | ((top > 0) & (top < SMALLEST_MAX))
        if activations == "int16":
            bad |= top * (stop - start - 1) > OUTLIER_RATIO * (total - top)
    return bad


def round_activations(x: Tensor, blocks: list[tuple[int, int, int]], activations: str) -> Tensor:
    """x rounded to the integer grid of each (row, block), as fp64 values; rows computed exactly are left alone."""
    limit = LIMIT[activations]
    rounded = x.double().clone()
    for start, stop, _ in blocks:
        block = x[:, start:stop].float()
        top = block.abs().amax(1, keepdim=True)
        inverse = torch.where(top > 0, torch.full_like(top, limit) / top, 0.0)  # scalar / tensor is two roundings
        rounded[:, start:stop] = torch.round(block * inverse).double() * (top / limit).double()
    keep = rows_to_compute_exactly(x, blocks, activations)
    return torch.where(keep[:, None], x.double(), rounded)


def weight_of(
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    perm: Tensor | None,
    out_features: int,
    in_features: int,
    group_size: int,
    first_k: int,
) -> Int4Weight:
    """The Int4Weight that an op's flat arguments came from."""
    return Int4Weight(
        qweight=qweight,
        scales=scales,
        zeros=zeros,
        perm=perm,
        out_features=out_features,
        in_features=in_features,
        group_size=group_size,
        first_k=first_k,
    )


def stored_weight(weight: Int4Weight) -> Tensor:
    """(..., N, K) fp64 in stored column order, exact."""
    q, scales, zeros = weight.unpack()
    group = weight.group_index()
    return (q.double() - zeros.double()[..., group]) * scales.double()[..., group]


def gemm64(x: Tensor, weight: Int4Weight, activations: str) -> Tensor:
    """(M, K) x plain weight -> (M, N) fp64, a row at a time: a library's product of many rows sums in another order."""
    if weight.perm is not None:
        x = x.index_select(1, check_perm("int4_gemm", weight.perm, (weight.in_features,)).long())
    if activations in LIMIT:
        blocks = activation_blocks(weight.in_features, weight.group_size, weight.first_k)
        x = round_activations(x, blocks, activations)
    stored = stored_weight(weight)
    rows = [stored @ row for row in x.double()]
    return torch.stack(rows) if rows else stored.new_zeros(0, weight.out_features)


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
    weight = weight_of(qweight, scales, zeros, perm, out_features, in_features, group_size, first_k)
    y = gemm64(x, weight, activations)
    return (y if bias is None else y + bias.double()).to(x.dtype)


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
    weight = weight_of(qweight, scales, zeros, perm, out_features, in_features, group_size, first_k)
    bounds = itertools.pairwise(offsets.tolist())
    parts = [gemm64(x[a:b], weight.expert(e), activations) for e, (a, b) in enumerate(bounds)]
    return torch.cat(parts).to(x.dtype)


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
    two_i = 2 * intermediate_size
    w13 = weight_of(w13_qweight, w13_scales, w13_zeros, w13_perm, two_i, hidden_size, group_size, w13_first_k)
    w2 = weight_of(w2_qweight, w2_scales, w2_zeros, w2_perm, hidden_size, intermediate_size, group_size, w2_first_k)
    y = torch.zeros(len(x), hidden_size, dtype=torch.float64, device=x.device)
    for expert in topk_ids.unique().tolist():
        tokens, slots = (topk_ids == expert).nonzero(as_tuple=True)
        gate, up = gemm64(x[tokens], w13.expert(expert), activations).chunk(2, dim=-1)
        hidden = torch.nn.functional.silu(gate) * up
        if activations in LIMIT:
            hidden = hidden.float()  # the integer modes round an fp32 intermediate
        out = gemm64(hidden, w2.expert(expert), activations)
        y.index_add_(0, tokens, out * topk_weights[tokens, slots].double()[:, None])
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
    weight = weight_of(qweight, scales, zeros, perm, out_features, in_features, group_size, first_k)
    q, unpacked, points = weight.unpack()
    group = weight.group_index()
    values = (q.float() - points.float()[..., group]) * unpacked.float()[..., group]  # exact for fp16, bf16 scales
    if perm is not None:
        inverse = perm.long().argsort(-1)
        values = values.gather(-1, inverse.unsqueeze(-2).expand_as(values))
    return values.to(dtype)
