"""Dense products in plain torch, fp64: the contract that every other room is tested against.

    y[m, n] = sum_k x[m, k] * weight[n, k] + bias[n]

Sums are rounded once, to x's dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Error of a result against fp64, as a multiple c of the error of torch in the same dtype, plus eps relative to the
# largest |y|: RMS and max. fp32 torch sums in another order, hence 1.5.
TOLERANCE = {"c": 1.5, "eps": 1e-6}


def make_inputs(
    m: int,
    n: int,
    k: int,
    *,
    dtype: torch.dtype = torch.float32,
    weight_dtype: torch.dtype | None = None,
    bias: bool = False,
    bias_dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(x (m, k), weight (n, k), bias (n,) or None), Gaussian; the weight has x's dtype unless another is named."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(m, k, generator=generator).to(dtype)
    weight = (torch.randn(n, k, generator=generator) * 0.1).to(weight_dtype or dtype)
    return x, weight, torch.randn(n, generator=generator).to(bias_dtype) if bias else None


def unsupported(op: str, *args: object) -> str:
    return ""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = x.double() @ weight.double().T
    return (y if bias is None else y + bias.double()).to(x.dtype)
