"""What tests of the native CPU tile kernels of policy_loss share: the choice of an instruction set, hostile memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from m3kernels import _cpu_ext
from m3kernels.policy_loss.tiles import State

ISAS = ("avx512", "avx2", "neon", "scalar")  # those with tile kernels of their own
BUILT = [name for name in ISAS if name in _cpu_ext.build_info()["isas"]]


def use(name: str) -> Iterator[str]:
    """The body of a fixture: the instruction set is in use until the test is over."""
    if name not in _cpu_ext.isas():
        pytest.skip(f"this CPU does not run {name}")
    before = _cpu_ext.get_isa()
    _cpu_ext.set_isa(name)
    yield name
    _cpu_ext.set_isa(before)


def set_threads() -> Iterator[Callable[[int], None]]:
    """The body of a fixture: sets the number of threads, which is put back after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def converted(value: Any, dtype: torch.dtype) -> Any:
    """A copy, with floating tensors in dtype."""
    if isinstance(value, State):
        return State(*(converted(part, dtype) for part in value))
    if not isinstance(value, Tensor):
        return value
    return value.to(dtype, copy=True) if value.is_floating_point() else value.clone()


def padded(matrix: Tensor, pad: int) -> Tensor:
    """A copy with rows that lie `pad` elements of nan apart, inside more nan."""
    rows, columns = matrix.shape
    buffer = torch.full((rows + 2, columns + pad), torch.nan, dtype=matrix.dtype)
    inside = buffer[1 : rows + 1, :columns]
    return inside.copy_(matrix)


def margins(inside: Tensor) -> Tensor:
    """What lies around a matrix made by ``padded``."""
    around = inside._base.clone()
    around[1 : inside.shape[0] + 1, : inside.shape[1]] = torch.nan
    return around


def two_parts(exact: Tensor) -> tuple[Tensor, Tensor]:
    """An fp64 value as two of fp32: rounded, and what rounding took."""
    high = exact.float()
    return high, (exact - high).float()
