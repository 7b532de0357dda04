"""What an INT4 weight is before it is packed: the scheme that is asked for, and the integers that a method found.

    W[n, perm[j]] = (codes[n, j] - zeros[n, j // group_size]) * scales[n, j // group_size],   codes in 0..15

Every method (round-to-nearest, GPTQ, AutoRound) returns this. The product of a 4-bit integer and an fp16 or bf16 scale
is exact in fp32: ``dequantized`` is bitwise the weight that a method optimised and that a kernel multiplies with.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from m3kernels.checks import refuse
from m3kernels.int4 import Int4Weight
from m3kernels.int4.quantize import METHODS, quantize_weight
from m3kernels.int4.types import SCALE_DTYPES, SYMMETRIC_ZERO, check_group_size, num_groups


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scheme:
    """group_size: columns that share a scale, -1 (all) or a multiple of 16; K need not be a multiple of it."""

    group_size: int = 128
    symmetric: bool = True  # zero point 8 for all, and none stored
    scale_dtype: torch.dtype = torch.float16

    def __post_init__(self) -> None:
        check_group_size("Scheme", self.group_size)
        if not isinstance(self.symmetric, bool):
            raise refuse("Scheme", "symmetric", "True or False", self.symmetric)
        if self.scale_dtype not in SCALE_DTYPES:
            raise refuse("Scheme", "scale_dtype", "float16, bfloat16 or float32", self.scale_dtype)

    def groups(self, in_features: int) -> int:
        """G, the last of them possibly partial."""
        return num_groups(in_features, self.group_size)

    def width(self, in_features: int) -> int:
        """Columns of a whole group."""
        return in_features if self.group_size == -1 else self.group_size


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Rounded:
    """A quantised linear weight (N, K).

    codes: (N, K) uint8 in 0..15, in stored order. scales: (N, G) of the scheme's dtype; negative ones are allowed.
    zeros: (N, G) uint8 in 1..15, None means 8. perm: (K,) int32, act-order: stored column j is input perm[j].
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None = None
    perm: Tensor | None = None
    group_size: int

    def to_int4(self) -> Int4Weight:
        """Packed. Raises ValueError for tensors out of contract."""
        return Int4Weight.pack(self.codes, self.scales, self.zeros, group_size=self.group_size, perm=self.perm)

    def dequantized(self) -> Tensor:
        """W (N, K) fp32, columns in the order of the inputs; exact for scales of 16 bits."""
        width = self.codes.shape[1] if self.group_size == -1 else self.group_size
        scales = spread(self.scales.float(), width, self.codes.shape[1])
        zeros = SYMMETRIC_ZERO if self.zeros is None else spread(self.zeros.float(), width, self.codes.shape[1])
        stored = (self.codes.float() - zeros) * scales
        if self.perm is None:
            return stored
        return torch.empty_like(stored).index_copy_(1, self.perm.long(), stored)


def nearest(weight: Tensor, scheme: Scheme, method: str = "minmax") -> Rounded:
    """Round-to-nearest of a dense (N, K) weight, as m3kernels.int4.quantize_weight (whose errors are raised).

    Args:
        method: "minmax", or the range searched by "mse" or "weighted".
    """
    if method not in METHODS:
        raise refuse("nearest", "method", " or ".join(map(repr, METHODS)), method)
    packed = quantize_weight(
        weight,
        group_size=scheme.group_size,
        symmetric=scheme.symmetric,
        method=method,
        scale_dtype=scheme.scale_dtype,
    )
    codes, scales, zeros = packed.unpack()
    return Rounded(codes=codes, scales=scales, zeros=None if scheme.symmetric else zeros, group_size=scheme.group_size)


def spread(values: Tensor, width: int, columns: int) -> Tensor:
    """(N, G) values of groups -> (N, columns) values of columns; the last group may be partial."""
    return values.repeat_interleave(width, dim=1)[:, :columns]
