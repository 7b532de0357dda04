"""The one wording of a broken contract: ``op: argument: want ...; got ...``."""

from __future__ import annotations

from typing import TypeGuard

import torch
from torch import Tensor


def is_strided(value: object) -> TypeGuard[Tensor]:
    """Whether value is a tensor with strides: not a sparse one."""
    return isinstance(value, Tensor) and value.layout == torch.strided


def has_data(value: object) -> TypeGuard[Tensor]:
    """Whether value is a strided tensor whose elements can be read: not on the meta device."""
    return is_strided(value) and not value.is_meta


def describe(value: object) -> str:
    """A short, safe description of what a caller passed: shape and dtype for tensors, value or type for the rest."""
    if isinstance(value, Tensor):
        layout = "" if value.layout == torch.strided else f" {value.layout}"
        device = "" if value.device.type == "cpu" else f" on {value.device}"
        return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}{layout.replace('torch.', '')}{device}"
    if value is None or isinstance(value, (bool, int, float, str, tuple, torch.dtype, torch.device)):
        return repr(value)[:200]
    return type(value).__name__


def refuse(op: str, argument: str, want: str, got: object) -> ValueError:
    """The error to raise for a caller's mistake; ``got`` is described unless it is already a string."""
    return ValueError(f"{op}: {argument}: want {want}; got {got if isinstance(got, str) else describe(got)}")
