"""How far off rounded linears, and the hidden states that they make, are: squared error over squared size."""

from __future__ import annotations

import dataclasses

import torch.nn.functional as F
from torch import Tensor

from m3.quantize.states import States


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearError:
    """Squared error over squared size, of a weight and of its outputs on some tokens (None: no tokens came)."""

    weight: float
    output: float | None


def error_of(weight: Tensor, rounded: Tensor, inputs: Tensor | None) -> LinearError:
    """Of a weight (N, K) and what it was rounded to, on inputs (T, K)."""
    off = weight - rounded
    output = None
    if inputs is not None and len(inputs):
        output = ratio(F.linear(inputs, off), F.linear(inputs, weight))
    return LinearError(weight=ratio(off, weight), output=output)


def ratio(error: Tensor, whole: Tensor) -> float:
    """Squared error over squared size; 0 / 0 is 0."""
    size = float(whole.double().square().sum())
    return float(error.double().square().sum()) / size if size else 0.0


def distance(full: States, int4: States) -> float:
    """Of all states, squared error over squared size."""
    error = size = 0.0
    for one, other in zip(full, int4, strict=True):
        error += float((one - other).double().square().sum())
        size += float(one.double().square().sum())
    return error / size if size else 0.0
