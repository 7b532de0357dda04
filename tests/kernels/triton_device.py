"""Tensors to the device of the Triton kernels, and back."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from triton_tiles import DEVICE


def there(value: Any) -> Any:
    """value on the device of the kernels, with its strides."""
    if isinstance(value, (list, tuple)):
        return type(value)(map(there, value))
    return value.to(DEVICE) if isinstance(value, Tensor) else value


def here(value: Any) -> Any:
    return tuple(tensor.cpu() for tensor in value) if isinstance(value, tuple) else value.cpu()
