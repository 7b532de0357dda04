"""Native CPU room of the policy_loss family: tile kernels for AVX-512, AVX2, NEON or any CPU, as the CPU can."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from m3kernels import _cpu_ext
from m3kernels.checks import refuse
from m3kernels.policy_loss.passes import ops
from m3kernels.policy_loss.schedule import Tiles
from m3kernels.policy_loss.tiles import State

KIND = {"forward": 0, "reverse": 1, "js": 2}
SERVED = (torch.float32, torch.bfloat16, torch.float16)


def unsupported(op: str, hidden: Tensor, *args: Any) -> str:
    if not hidden.is_cpu:
        return f"needs CPU tensors, not {hidden.device.type}"
    if hidden.dtype not in SERVED:
        return f"computes in float32, not {str(hidden.dtype).removeprefix('torch.')}"
    return ""


def _span(op: str, name: str, tensor: Tensor | None, dtype: torch.dtype = torch.float32) -> tuple[int, int]:
    """(address, elements) of a contiguous CPU tensor of the given dtype; (0, 0) for None."""
    if tensor is None:
        return 0, 0
    if tensor.dtype != dtype or not tensor.is_cpu or not tensor.is_contiguous():
        raise refuse(op, name, f"contiguous {str(dtype).removeprefix('torch.')}", tensor)
    return tensor.data_ptr(), tensor.numel()


def _matrix(op: str, name: str, tensor: Tensor) -> tuple[int, int, int, int]:
    """(address, rows, columns, elements from row to row) of a matrix whose rows are contiguous."""
    if tensor.dtype != torch.float32 or not tensor.is_cpu or tensor.ndim != 2:
        raise refuse(op, name, "a matrix of float32", tensor)
    rows, columns = tensor.shape
    stride, step = tensor.stride()
    if columns > 1 and step != 1:
        raise refuse(op, name, "contiguous rows", f"a column stride of {step}")
    return tensor.data_ptr(), rows, columns, stride


def _ids(op: str, ids: Tensor, first: int) -> tuple[tuple[int, int], int, int]:
    if ids.ndim != 2:
        raise refuse(op, "ids", "(n, K) int64", ids)
    return _span(op, "ids", ids, torch.int64), ids.shape[1], first


def _rows(op: str, rows: Tensor | None) -> tuple[int, int] | None:
    return None if rows is None else _span(op, "rows", rows, torch.int64)


def _kind(op: str, kind: str) -> int:
    if kind not in KIND:
        raise refuse(op, "kind", "forward, reverse or js", kind)
    return KIND[kind]


# -- tile kernels: the contract is tiles.py ---------------------------------------------------------------------------
def statistics(
    logits: Tensor,
    ids: Tensor,
    first: int,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float,
    inverse_temperature: Tensor | None,
    state: State,
) -> None:
    _cpu_ext.policy_loss_statistics(
        _matrix("statistics", "logits", logits),
        _ids("statistics", ids, first),
        _span("statistics", "bias", bias),
        (logit_scale, softcap, _span("statistics", "inverse_temperature", inverse_temperature)),
        _span("statistics", "maximum", state.maximum),
        _span("statistics", "total", state.total),
        _span("statistics", "picked", state.picked),
        _span("statistics", "weighted", state.weighted),
        _span("statistics", "squared", state.squared),
        torch.get_num_threads(),
    )


def gradient(
    logits: Tensor,
    rows: Tensor | None,
    ids: Tensor,
    first: int,
    lse: Tensor,
    lse_low: Tensor,
    base: Tensor,
    slope: Tensor | None,
    square: Tensor | None,
    picked: Tensor,
    complement: Tensor,
    logit_scale: float,
    softcap: float,
    inverse_temperature: Tensor | None,
    out: Tensor,
) -> None:
    _cpu_ext.policy_loss_gradient(
        _matrix("gradient", "logits", logits),
        _rows("gradient", rows),
        _ids("gradient", ids, first),
        _span("gradient", "lse", lse),
        _span("gradient", "lse_low", lse_low),
        _span("gradient", "base", base),
        _span("gradient", "slope", slope),
        _span("gradient", "square", square),
        _span("gradient", "picked", picked),
        _span("gradient", "complement", complement),
        (logit_scale, softcap, _span("gradient", "inverse_temperature", inverse_temperature)),
        _matrix("gradient", "out", out),
        torch.get_num_threads(),
    )


def divergence(
    student: Tensor,
    teacher: Tensor,
    student_lse: Tensor,
    student_low: Tensor,
    teacher_lse: Tensor,
    teacher_low: Tensor,
    kind: str,
    beta: float,
    value: Tensor,
    center: Tensor,
) -> None:
    _cpu_ext.policy_loss_divergence(
        _matrix("divergence", "student", student),
        _matrix("divergence", "teacher", teacher),
        _span("divergence", "student_lse", student_lse),
        _span("divergence", "student_low", student_low),
        _span("divergence", "teacher_lse", teacher_lse),
        _span("divergence", "teacher_low", teacher_low),
        _kind("divergence", kind),
        beta,
        _span("divergence", "value", value),
        _span("divergence", "center", center),
        torch.get_num_threads(),
    )


def divergence_gradient(
    student: Tensor,
    teacher: Tensor,
    rows: Tensor | None,
    student_lse: Tensor,
    student_low: Tensor,
    teacher_lse: Tensor,
    teacher_low: Tensor,
    kind: str,
    beta: float,
    center: Tensor,
    weight: Tensor,
    logit_scale: float,
    softcap: float,
    inverse_temperature: Tensor | None,
    out: Tensor,
) -> None:
    _cpu_ext.policy_loss_divergence_gradient(
        _matrix("divergence_gradient", "student", student),
        _matrix("divergence_gradient", "teacher", teacher),
        _rows("divergence_gradient", rows),
        _span("divergence_gradient", "student_lse", student_lse),
        _span("divergence_gradient", "student_low", student_low),
        _span("divergence_gradient", "teacher_lse", teacher_lse),
        _span("divergence_gradient", "teacher_low", teacher_low),
        _kind("divergence_gradient", kind),
        beta,
        _span("divergence_gradient", "center", center),
        _span("divergence_gradient", "weight", weight),
        (logit_scale, softcap, _span("divergence_gradient", "inverse_temperature", inverse_temperature)),
        _matrix("divergence_gradient", "out", out),
        torch.get_num_threads(),
    )


def advise_huge_pages(tensor: Tensor) -> None:
    """Ask Linux for 2 MiB pages under a contiguous CPU tensor before its first write: 1 page fault, not 512."""
    if tensor.is_cpu and tensor.is_contiguous():
        _cpu_ext.advise_huge_pages(tensor.data_ptr(), tensor.numel() * tensor.element_size())


# -- memory -----------------------------------------------------------------------------------------------------------
# Fresh memory costs more than what is computed in it: 192 MiB in 4 KiB pages take 70 ms, a tenth of the loss that fills
# them. So results ask for huge pages, and the last workspace is kept for the next call, if it is no larger than this.
SPARE_BYTES = 256 << 20
_spare: list[Tensor] = []  # at most one, contiguous fp32; taking it out makes it the taker's alone, in any thread


def empty(elements: int, like: Tensor) -> Tensor:
    with torch.inference_mode(False):  # a workspace outlives the mode it was made in
        buffer = torch.empty(elements, dtype=torch.float32)
    advise_huge_pages(buffer)
    return buffer


def borrow(elements: int, like: Tensor) -> Tensor:
    spare = _spare.pop() if _spare else None
    return spare if spare is not None and spare.numel() >= elements else empty(elements, like)


def give_back(buffer: Tensor) -> None:
    if 4 * buffer.numel() <= SPARE_BYTES:
        _spare[:] = [max([buffer, *_spare], key=Tensor.numel)]


# -- ops --------------------------------------------------------------------------------------------------------------
linear_logprobs, linear_logprobs_backward, linear_policy_loss, linear_distill_loss = ops(
    Tiles(statistics, gradient, divergence, divergence_gradient, empty, borrow, give_back)
)
