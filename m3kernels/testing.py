"""Yardsticks for kernels, for tests, benchmarks and users: errors against fp64, bitwise equality, hostile memory.

err_rms = rms(actual - exact) / rms(exact),   err_max = max|actual - exact| / max|exact|
rule:   err(actual) <= c * err(torch in the same dtype) + eps,   for both; c and eps from the family's TOLERANCE
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Error(NamedTuple):
    """Relative error of a tensor: 0 if empty, inf where only one of actual and expected is finite."""

    rms: float
    max: float


def relative_error(actual: Tensor, expected: Tensor) -> Error:
    """Error of actual against expected, both taken as fp64. Equal elements (inf and nan included) have error 0."""
    if actual.shape != expected.shape:
        raise ValueError(f"relative_error: actual: want {tuple(expected.shape)}; got {tuple(actual.shape)}")
    a, e = actual.detach().double(), expected.detach().double()
    same = (a == e) | (a.isnan() & e.isnan())
    difference = torch.where(same, 0.0, a - e).abs()
    difference = torch.where(difference.isfinite(), difference, torch.inf)
    if not difference.numel() or not difference.any():
        return Error(0.0, 0.0)
    finite = torch.where(e.isfinite(), e, 0.0)
    rms = difference.square().mean().sqrt() / finite.square().mean().sqrt()
    return Error(float(rms), float(difference.max() / finite.abs().max()))


def check_error(
    actual: Tensor, exact64: Tensor, same_dtype_torch: Tensor, tolerance: Mapping[str, float], extra: float = 0.0
) -> None:
    """AssertionError unless actual keeps the error rule of this module, RMS and max.

    Args:
        actual: the kernel's result. exact64: the same in fp64. same_dtype_torch: what torch computes in actual's dtype.
        tolerance: {"c": ..., "eps": ...}, from the family's reference.
        extra: relative error that the kernel states besides (rounded activations).
    """
    assert actual.dtype == same_dtype_torch.dtype, f"want {same_dtype_torch.dtype}; got {actual.dtype}"
    ours, theirs = relative_error(actual, exact64), relative_error(same_dtype_torch, exact64)
    for name, our, their in zip(Error._fields, ours, theirs, strict=True):
        bound = tolerance["c"] * their + tolerance["eps"] + extra
        assert our <= bound, f"{name} error: want at most {bound:.3g} (torch: {their:.3g}); got {our:.3g}"


def bitwise_equal(a: Tensor, b: Tensor) -> bool:
    """Same shape, dtype and bits: tells -0 from 0 and does not tell a nan from itself."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(
        a.detach().contiguous().view(-1).view(torch.uint8), b.detach().contiguous().view(-1).view(torch.uint8)
    )


@contextlib.contextmanager
def uninitialized_is_nan() -> Iterator[None]:
    """Inside, torch.empty and its kin hold nan (integers: their largest value), so that a value never written shows."""
    settings: Any = torch.utils.deterministic
    deterministic, fill = torch.are_deterministic_algorithms_enabled(), settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    settings.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic)
        settings.fill_uninitialized_memory = fill


def surrounded_by_nan(x: Tensor, margin: int = 67) -> Tensor:
    """A contiguous copy of x that lies inside a larger buffer of nan, so that a read beyond its ends shows."""
    buffer = torch.full((x.numel() + 2 * margin,), torch.nan, dtype=x.dtype, device=x.device)
    inside = buffer[margin : margin + x.numel()].view(x.shape)
    return inside.copy_(x)
