"""Native CPU room of the decoder family: AVX-512, AVX2, NEON or portable kernels, chosen at the first call.

The kernels take and give rows of fp32; rows of 16 bits are widened before and rounded after.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from m3kernels import _cpu_ext
from m3kernels.checks import refuse
from m3kernels.decoder.types import DTYPE_NAMES

TYPE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def unsupported(op: str, x: Tensor, *args: Any) -> str:
    return "" if x.is_cpu else f"needs CPU tensors, not {x.device.type}"


def _elements(name: str, tensor: Tensor | None) -> tuple[tuple[int, int], int]:
    """((address, elements), type) of a contiguous tensor; ((0, 0), 0) for None."""
    if tensor is None:
        return (0, 0), 0
    if not tensor.is_cpu or not tensor.is_contiguous() or tensor.dtype not in TYPE:
        raise refuse("m3kernels::linear", name, f"contiguous {DTYPE_NAMES} on cpu", tensor)
    return (tensor.data_ptr(), tensor.numel()), TYPE[tensor.dtype]


def _rows(tensor: Tensor) -> tuple[int, int, int, int]:
    """(address, rows, columns, elements from row to row) of an fp32 matrix whose rows are contiguous."""
    return tensor.data_ptr(), *tensor.shape, tensor.stride(0)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if not x.is_cpu or x.ndim != 2 or x.dtype not in TYPE or weight.ndim != 2:
        raise refuse("m3kernels::linear", "x", f"(M, K) {DTYPE_NAMES} on cpu, and weight (N, K)", x)
    wide = x.float()
    if wide.shape[1] > 1 and wide.stride(1) != 1:
        wide = wide.contiguous()
    y = torch.empty(len(x), len(weight))
    described = (*_elements("weight", weight), *weight.shape)
    _cpu_ext.decoder_linear(_rows(wide), described, _elements("bias", bias), _rows(y), torch.get_num_threads())
    return y.to(x.dtype)
