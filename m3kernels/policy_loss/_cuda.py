"""CUDA room of the policy_loss family: tile kernels around cuBLAS products, for NVIDIA GPUs from Ampere on.

Each of the four functions is one pass over a tile at the speed of memory. Logits may be float32, bfloat16 or float16,
gradients of their dtype, or of any if they are float32; arithmetic is fp32, and a result is rounded once. Where
``statistics`` transforms 16-bit logits it sums the rounded values, those that the gradient will see. A row's sums are
formed in runs of UNIT columns and joined in an order that depends on the columns alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from m3kernels import _cuda_ext
from m3kernels.checks import refuse
from m3kernels.cuda import counters, on_device, refusal, span, stream
from m3kernels.policy_loss.passes import ops
from m3kernels.policy_loss.schedule import Tiles
from m3kernels.policy_loss.tiles import State

KIND = {"forward": 0, "reverse": 1, "js": 2}
TYPE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
UNIT: int = _cuda_ext.policy_loss_unit
SHARED_ROWS = 4096  # fewer rows than this may each be computed by several blocks

Span = tuple[int, int]  # address, elements
Matrix = tuple[int, int, int, int]  # address, rows, columns, elements from row to row


def unsupported(op: str, hidden: Tensor, *args: Any) -> str:
    if hidden.dtype not in TYPE:
        return f"computes float32, bfloat16 and float16, not {str(hidden.dtype).removeprefix('torch.')}"
    return refusal(hidden)


def _matrix(op: str, name: str, tensor: Tensor, like: Tensor) -> tuple[Matrix, int]:
    """((address, rows, columns, elements from row to row), number of the type) of a matrix with contiguous rows."""
    if tensor.dtype not in TYPE or tensor.device != like.device or tensor.ndim != 2:
        raise refuse(op, name, f"a matrix of float32, bfloat16 or float16 on {like.device}", tensor)
    rows, columns = tensor.shape
    stride, step = tensor.stride()
    if columns > 1 and step != 1:
        raise refuse(op, name, "contiguous rows", f"a column stride of {step}")
    return (tensor.data_ptr(), rows, columns, stride), TYPE[tensor.dtype]


def _ids(op: str, ids: Tensor, first: int, like: Tensor) -> tuple[Span, int, int]:
    if ids.ndim != 2:
        raise refuse(op, "ids", "(n, K) int64", ids)
    return span(op, "ids", ids, torch.int64, like), ids.shape[1], first


def _rows(op: str, rows: Tensor | None, like: Tensor) -> Span | None:
    return None if rows is None else span(op, "rows", rows, torch.int64, like)


def _kind(op: str, kind: str) -> int:
    if kind not in KIND:
        raise refuse(op, "kind", "forward, reverse or js", kind)
    return KIND[kind]


def _sums(logits: Tensor, each: int) -> Tensor:
    """Memory for ``each`` numbers per unit of every row."""
    rows, columns = logits.shape
    return torch.empty(rows * -(-columns // UNIT) * each, dtype=torch.float32, device=logits.device)


def _workspace(part: Tensor) -> tuple[Span, Span]:
    zeros = counters(part, SHARED_ROWS)
    return (part.data_ptr(), part.numel()), (zeros.data_ptr(), SHARED_ROWS)


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
    part = _sums(logits, 4)
    with on_device(logits):
        _cuda_ext.policy_loss_statistics(
            _matrix("statistics", "logits", logits, logits),
            _ids("statistics", ids, first, logits),
            span("statistics", "bias", bias, torch.float32, logits),
            (
                logit_scale,
                softcap,
                span("statistics", "inverse_temperature", inverse_temperature, torch.float32, logits),
            ),
            *(span("statistics", name, tensor, torch.float32, logits) for name, tensor in state._asdict().items()),
            _workspace(part),
            stream(logits),
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
    with on_device(logits):
        _cuda_ext.policy_loss_gradient(
            _matrix("gradient", "logits", logits, logits),
            _rows("gradient", rows, logits),
            _ids("gradient", ids, first, logits),
            span("gradient", "lse", lse, torch.float32, logits),
            span("gradient", "lse_low", lse_low, torch.float32, logits),
            span("gradient", "base", base, torch.float32, logits),
            span("gradient", "slope", slope, torch.float32, logits),
            span("gradient", "square", square, torch.float32, logits),
            span("gradient", "picked", picked, torch.float32, logits),
            span("gradient", "complement", complement, torch.float32, logits),
            (logit_scale, softcap, span("gradient", "inverse_temperature", inverse_temperature, torch.float32, logits)),
            _matrix("gradient", "out", out, logits),
            stream(logits),
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
    part = _sums(student, 2)
    with on_device(student):
        _cuda_ext.policy_loss_divergence(
            _matrix("divergence", "student", student, student),
            _matrix("divergence", "teacher", teacher, student),
            span("divergence", "student_lse", student_lse, torch.float32, student),
            span("divergence", "student_low", student_low, torch.float32, student),
            span("divergence", "teacher_lse", teacher_lse, torch.float32, student),
            span("divergence", "teacher_low", teacher_low, torch.float32, student),
            _kind("divergence", kind),
            beta,
            span("divergence", "value", value, torch.float32, student),
            span("divergence", "center", center, torch.float32, student),
            _workspace(part),
            stream(student),
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
    op = "divergence_gradient"
    with on_device(student):
        _cuda_ext.policy_loss_divergence_gradient(
            _matrix(op, "student", student, student),
            _matrix(op, "teacher", teacher, student),
            _rows(op, rows, student),
            span(op, "student_lse", student_lse, torch.float32, student),
            span(op, "student_low", student_low, torch.float32, student),
            span(op, "teacher_lse", teacher_lse, torch.float32, student),
            span(op, "teacher_low", teacher_low, torch.float32, student),
            _kind(op, kind),
            beta,
            span(op, "center", center, torch.float32, student),
            span(op, "weight", weight, torch.float32, student),
            (logit_scale, softcap, span(op, "inverse_temperature", inverse_temperature, torch.float32, student)),
            _matrix(op, "out", out, student),
            stream(student),
        )


# -- the ops ----------------------------------------------------------------------------------------------------------
def empty(elements: int, like: Tensor) -> Tensor:
    """Fresh fp32 memory on the device of ``like``."""
    return torch.empty(elements, dtype=torch.float32, device=like.device)


def give_back(buffer: Tensor) -> None:
    """torch's allocator keeps what a call frees for the next."""


linear_logprobs, linear_logprobs_backward, linear_policy_loss, linear_distill_loss = ops(
    Tiles(statistics, gradient, divergence, divergence_gradient, empty, empty, give_back)
)
