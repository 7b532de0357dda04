"""Round a weight to INT4: the nearest grid point, with the range taken from the group or searched for least error.

    q = clamp(rint(w / s) + z, 0, 15),   W = (q - z) * s,   one s and z for each row and group of columns

    minmax   symmetric: s = 2 max|w| / 15, z = 8 (round-to-nearest, "RTN", as in GPTQ and AutoGPTQ)
             asymmetric: s = the least that covers min(w, 0) .. max(w, 0) with z in 1..15
    mse      least sum of (w - W)^2 over a grid of ranges (symmetric: of both signs, so that the 16th value serves the
             longer side, as ggml's Q4_0 does; asymmetric: of three zero points), s refitted by least squares to the
             integers of each, s = sum(w v) / sum(v v) with v = q - z, and refined twice. Never worse than minmax.
    weighted the same search for the least sum of (w^2 + mean w^2) (w - W)^2: large weights count more, as in ggml's
             quantisers. Never worse than minmax by that measure.

Scales are rounded to scale_dtype before anything is rounded or compared with them. Zero points of 0 and 16 are not
used, so that the result can be exported to every format of convert.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from m3kernels.checks import has_data, refuse
from m3kernels.dispatch import offered
from m3kernels.int4.types import SCALE_DTYPES, SYMMETRIC_ZERO, Int4Weight, check_group_size, num_groups

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
METHODS = ("minmax", "mse", "weighted")
CHUNK = 1 << 17  # weights rounded at a time: three fp32 buffers of it stay in a CPU's second-level cache
RATIOS = tuple(0.64 + 0.06 * step for step in range(8))  # searched scales, as multiples of the min-max one
REFINEMENTS = 2
SMALLEST_ZERO, LARGEST_ZERO = 1, 15
LARGEST_Q = 15


def smallest_scale(dtype: torch.dtype) -> float:
    """Smaller scales are raised to this: the least number of fp16; the least normal one of bf16 and fp32."""
    return 2.0**-24 if dtype == torch.float16 else torch.finfo(dtype).smallest_normal


def storable(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """scales (fp32) rounded to dtype, their size kept between the smallest and the largest it holds; fp32."""
    sizes = scales.abs().clamp(max=torch.finfo(dtype).max).to(dtype).float().clamp(min=smallest_scale(dtype))
    return torch.copysign(sizes, scales)


def grid_points(w: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """q - z (R, G, g) of the grid points nearest to w (R, G, g), in w's dtype; scales and zeros are (R, G)."""
    low = -zeros.to(w.dtype)[..., None]
    return torch.clamp((w / scales.to(w.dtype)[..., None]).round_(), low, low + LARGEST_Q)


def importance(w: Tensor, counts: Tensor) -> Tensor:
    """(R, G, g): w^2 + its mean over the group's counts (G,) columns, which leaves out the padding."""
    squares = w * w
    return squares + (squares.sum(-1) / counts)[..., None]


def squared_error(w: Tensor, scales: Tensor, zeros: Tensor, counts: Tensor | None) -> Tensor:
    """(R, G) fp64: sum over the group of (w - W)^2, weighted by importance where counts are given."""
    w64 = w.double()
    error = (w64 - grid_points(w, scales, zeros).double() * scales.double()[..., None]).square_()
    return (error if counts is None else error * importance(w64, counts)).sum(-1)


def minmax_range(w: Tensor, symmetric: bool) -> Tensor:
    """(R, G) fp32 scales that cover each group, not yet rounded; 1 for a group of zeros."""
    if symmetric:
        scales = w.abs().amax(-1) * (2 / 15)
    else:
        low, high = w.amin(-1).clamp(max=0), w.amax(-1).clamp(min=0)
        # Divided by tensors: by a number, torch on a GPU multiplies by its reciprocal, and the bits are others.
        steps, upper_steps = high.new_full((), LARGEST_Q), high.new_full((), LARGEST_Q - SMALLEST_ZERO)
        scales = torch.maximum(high / steps - low / steps, high / upper_steps)
    return torch.where(scales > 0, scales, 1.0)


def minmax_zeros(w: Tensor, scales: Tensor, symmetric: bool) -> Tensor:
    """(R, G) uint8 zero points for scales already rounded."""
    if symmetric:
        return torch.full_like(scales, SYMMETRIC_ZERO, dtype=torch.uint8)
    return (-w.amin(-1).clamp(max=0) / scales).round_().clamp_(SMALLEST_ZERO, LARGEST_ZERO).to(torch.uint8)


def searched_range(
    w: Tensor, unit: Tensor, zeros: Tensor, symmetric: bool, dtype: torch.dtype, counts: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(scales (R, G) fp32 rounded to dtype, zeros (R, G) uint8) of least squared_error among the candidates.

    Works in units of the min-max scale, so that neither large nor small weights leave the range of fp32:
    error = sum(i x x) - 2 s sum(i x v) + s^2 sum(i v v), with x = w / unit and i the importance, if any.
    """
    x = w / unit[..., None]
    weights = None if counts is None else importance(x, counts)
    weighted_x = x if weights is None else x * weights
    points, product = torch.empty_like(x), torch.empty_like(x)
    energy = torch.mul(weighted_x, x, out=product).sum(-1)
    best_error = torch.full_like(unit, torch.inf)
    best_scales, best_zeros = torch.ones_like(unit), zeros

    def consider(inverse: Tensor | float, candidate_zeros: Tensor) -> None:
        nonlocal best_error, best_scales, best_zeros
        low = -candidate_zeros.float()[..., None]
        torch.mul(x, inverse, out=points).round_()
        torch.clamp(points, low, low + LARGEST_Q, out=points)
        xv = torch.mul(weighted_x, points, out=product).sum(-1)
        torch.mul(points, points, out=product)
        vv = (product if weights is None else product.mul_(weights)).sum(-1)
        scales = storable(xv / vv * unit, dtype) / unit  # nan where all points are 0: never less than best_error
        error = energy - 2 * scales * xv + scales * scales * vv
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scales = torch.where(better, scales, best_scales)
        best_zeros = torch.where(better, candidate_zeros, best_zeros)

    for shift in (0,) if symmetric else (-1, 0, 1):
        shifted = (zeros.short() + shift).clamp_(SMALLEST_ZERO, LARGEST_ZERO).to(torch.uint8)
        for sign in (1.0, -1.0) if symmetric else (1.0,):
            for ratio in RATIOS:
                consider(sign / ratio, shifted)
    for _ in range(REFINEMENTS):
        consider(1 / best_scales[..., None], best_zeros)
    return storable(best_scales * unit, dtype), best_zeros


def quantize_groups(
    w: Tensor, columns: int, symmetric: bool, method: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """w (R, G, g) fp32, ``columns`` of G g not padding -> (q (R, G, g) uint8, scales (R, G), zeros (R, G) uint8)."""
    unit = minmax_range(w, symmetric)
    scales = storable(unit, dtype)
    zeros = minmax_zeros(w, scales, symmetric)
    if method != "minmax":
        _, groups, size = w.shape
        starts = torch.arange(groups, device=w.device) * size
        counts = (columns - starts).clamp_(max=size) if method == "weighted" else None
        other_scales, other_zeros = searched_range(w, unit, zeros, symmetric, dtype, counts)
        better = squared_error(w, other_scales, other_zeros, counts) < squared_error(w, scales, zeros, counts)
        scales, zeros = torch.where(better, other_scales, scales), torch.where(better, other_zeros, zeros)
    q = (grid_points(w, scales, zeros) + zeros[..., None]).to(torch.uint8)
    return q, scales.to(dtype), zeros


def quantize_weight(
    weight: Tensor,
    *,
    group_size: int = 128,
    symmetric: bool = True,
    method: str = "minmax",
    scale_dtype: torch.dtype = torch.float16,
) -> Int4Weight:
    """The Int4Weight nearest to a dense weight, group by group. Deterministic; works on a few rows at a time.

    Args:
        weight: (N, K), or (E, N, K) for a stack of experts; fp32, bf16 or fp16, finite. No gradient flows.
        group_size: -1 (whole rows) or a multiple of 16; the last group of a row may be partial.
        symmetric: zero point 8 for all, and none stored; False: one of 1..15 for each row and group.
        method: "minmax" (fast), "mse" (least squared error) or "weighted" (least error weighted by w^2).
        scale_dtype: fp16, bf16 or fp32. Scales that would round to 0 become the least number that scale_dtype holds
            (its least normal number for bf16 and fp32).
    Returns:
        Int4Weight with scales of scale_dtype. minmax: |w - W| <= s (1/2 + 16 u) where s is a normal number of
            scale_dtype and u its rounding unit (2**-11 for fp16). mse, weighted: the sum that each
            searches for is, in every group, at most minmax's.
    Raises:
        ValueError: an argument out of contract, a weight that is not finite (with its index), or a group whose scale
            scale_dtype cannot hold.
    """
    op = "quantize_weight"
    check_group_size(op, group_size)
    if not isinstance(symmetric, bool):
        raise refuse(op, "symmetric", "True or False", symmetric)
    if method not in METHODS:
        raise refuse(op, "method", " or ".join(map(repr, METHODS)), method)
    if scale_dtype not in SCALE_DTYPES:
        raise refuse(op, "scale_dtype", "torch.float16, torch.bfloat16 or torch.float32", scale_dtype)
    if not has_data(weight) or weight.ndim not in (2, 3) or 0 in weight.shape or weight.dtype not in DTYPES:
        raise refuse(op, "weight", "(N, K) or (E, N, K) float32, bfloat16 or float16, strided, not empty", weight)

    *lead, k = weight.shape
    weight = weight.detach()
    if method == "minmax" and (native := offered(__package__, "quantize_tiles", weight)):
        found = native(weight, group_size, symmetric, scale_dtype)
        if found is not None:  # else a weight is out of contract: below it is found and named
            tiles, scales, zeros = found
            return Int4Weight(
                qweight=tiles,
                scales=scales,
                zeros=zeros,
                out_features=lead[-1],
                in_features=k,
                group_size=group_size,
            )
    groups = num_groups(k, group_size)
    size = k if groups == 1 else group_size
    rows = weight.reshape(-1, k)
    q = torch.empty(rows.shape, dtype=torch.uint8, device=weight.device)
    scales = torch.empty(len(rows), groups, dtype=scale_dtype, device=weight.device)
    zeros = torch.empty(len(rows), groups, dtype=torch.uint8, device=weight.device)
    step = max(1, CHUNK // (groups * size))
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        w = torch.nn.functional.pad(rows[part].float(), (0, groups * size - k)).unflatten(1, (groups, size))
        largest = w.abs().amax(-1)
        if not torch.isfinite(largest).all():
            _refuse_first(op, "finite values", ~torch.isfinite(rows[part]), rows[part], start, lead)
        limit = torch.finfo(scale_dtype).max * 7
        if (largest > limit).any():
            _refuse_first(
                op,
                f"|w| <= {limit:g}, so that scales fit {scale_dtype}",
                rows[part].abs() > limit,
                rows[part],
                start,
                lead,
            )
        values, scales[part], zeros[part] = quantize_groups(w, k, symmetric, method, scale_dtype)
        q[part] = values.flatten(1)[:, :k]
    return Int4Weight.pack(
        q.unflatten(0, lead),
        scales.unflatten(0, lead),
        None if symmetric else zeros.unflatten(0, lead),
        group_size=group_size,
    )


def _refuse_first(op: str, want: str, bad: Tensor, rows: Tensor, start: int, lead: list[int]) -> None:
    """Raise for the first bad weight, with its index in the tensor that the caller passed."""
    row, column = bad.nonzero()[0].tolist()
    index = (*divmod(start + row, lead[1]), column) if len(lead) == 2 else (start + row, column)
    raise refuse(op, "weight", want, f"{float(rows[row, column])} at {list(index)}")
