"""The one wording of a broken contract: ``op: argument: want ...; got ...``."""

from __future__ import annotations

import torch
from torch import Tensor


def describe(value: object) -> str:
    """A short, safe description of what a caller passed: shape and dtype for tensors, value or type for the rest."""
    if isinstance(value, Tensor):
        device = "" if value.device.type == "cpu" else f" on {value.device}"
        return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}{device}"
    if value is None or isinstance(value, (bool, int, float, str, tuple, torch.dtype, torch.device)):
        return repr(value)[:200]
    return type(value).__name__


def refuse(op: str, argument: str, want: str, got: object) -> ValueError:
    """The error to raise for a caller's mistake; ``got`` is described unless it is already a string."""
    return ValueError(f"{op}: {argument}: want {want}; got {got if isinstance(got, str) else describe(got)}")
