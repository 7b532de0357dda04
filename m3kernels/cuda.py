"""What the CUDA rooms share: which tensors the built kernels take, the current stream, counters that stay zero.

Built for the emulated device of the tests, the module computes on CPU tensors: then those are what the rooms take.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from m3kernels import _cuda_ext
from m3kernels.checks import refuse

EMULATED: bool = _cuda_ext.build_info()["emulated"]
OLDEST = (8, 0)  # compute capability

_counters: dict[tuple[int, int], Tensor] = {}


def refusal(tensor: Tensor) -> str:
    """ "" if the built kernels can compute on the tensor's device, else why not."""
    if EMULATED:
        return "" if tensor.is_cpu else "emulated kernels take CPU tensors"
    if not tensor.is_cuda:
        return f"needs CUDA tensors, not {tensor.device.type}"
    capability = torch.cuda.get_device_capability(tensor.device)
    if torch.version.hip is not None or capability < OLDEST:
        return "needs an NVIDIA GPU of compute capability 8.0 or newer"
    return ""


def stream(tensor: Tensor) -> int:
    """Address of the current stream of the tensor's device."""
    return 0 if EMULATED else torch.cuda.current_stream(tensor.device).cuda_stream


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Makes the tensor's device the current one where it is not: a launch goes to the current device."""
    if EMULATED or torch.cuda.current_device() == tensor.device.index:
        return contextlib.nullcontext()
    return torch.cuda.device(tensor.device)


def span(op: str, name: str, tensor: Tensor | None, dtype: torch.dtype, like: Tensor) -> tuple[int, int]:
    """(address, elements) of a contiguous tensor of the given dtype on the device of ``like``; (0, 0) for None."""
    if tensor is None:
        return 0, 0
    if tensor.dtype != dtype or tensor.device != like.device or not tensor.is_contiguous():
        raise refuse(op, name, f"contiguous {str(dtype).removeprefix('torch.')} on {like.device}", tensor)
    return tensor.data_ptr(), tensor.numel()


def counters(tensor: Tensor, count: int) -> Tensor:
    """``count`` int32 zeros on the tensor's device for kernels that leave zeros behind; shared by calls on one stream.

    While a graph is captured, and more are needed than there are, a new tensor is made for that graph alone.
    """
    key = (-1 if EMULATED else tensor.device.index, stream(tensor))
    kept = _counters.get(key)
    if kept is None or kept.numel() < count:
        with torch.inference_mode(False):
            kept = torch.zeros(max(count, 4096), dtype=torch.int32, device=tensor.device)
        if EMULATED or not torch.cuda.is_current_stream_capturing():
            _counters[key] = kept
    return kept
