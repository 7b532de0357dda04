"""Every error of the native CPU tile kernels of policy_loss, with its message: what memory safety rests on."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from m3kernels import _cpu_ext
from m3kernels.policy_loss import _cpu
from m3kernels.policy_loss.tiles import State, new_state

Z = torch.randn(3, 8)
IDS = torch.zeros(3, 2, dtype=torch.int64)


def vector(n: int = 3) -> Tensor:
    return torch.zeros(n)


def state(**change: Tensor) -> State:
    return new_state(3, 2, entropy=True, sum_sq=True, like=Z)._replace(**change)


GOOD: dict[str, dict[str, Any]] = {
    "statistics": dict(
        logits=Z.clone(), ids=IDS, first=0, bias=vector(8), logit_scale=1.0, softcap=0.0,
        inverse_temperature=vector(), state=state(),
    ),
    "gradient": dict(
        logits=Z, rows=None, ids=IDS, first=0, lse=vector(), lse_low=vector(), base=vector(), slope=vector(),
        square=vector(), picked=torch.zeros(3, 2), complement=torch.zeros(3, 2), logit_scale=1.0, softcap=0.0,
        inverse_temperature=vector(), out=torch.zeros(3, 8),
    ),
    "divergence": dict(
        student=Z, teacher=Z, student_lse=vector(), student_low=vector(), teacher_lse=vector(), teacher_low=vector(),
        kind="js", beta=0.5, value=vector(), center=vector(),
    ),
    "divergence_gradient": dict(
        student=Z, teacher=Z, rows=None, student_lse=vector(), student_low=vector(), teacher_lse=vector(),
        teacher_low=vector(), kind="js", beta=0.5, center=vector(), weight=vector(), logit_scale=1.0, softcap=0.0,
        inverse_temperature=vector(), out=torch.zeros(3, 8),
    ),
}  # fmt: skip
OVERLAP = torch.zeros(64)
ERRORS: dict[str, tuple[str, dict[str, Any], str]] = {
    "logits-dtype": ("statistics", dict(logits=Z.double()), "logits: want a matrix of float32; got (3, 8) float64"),
    "logits-vector": ("statistics", dict(logits=vector()), "logits: want a matrix of float32; got (3,) float32"),
    "logits-columns": (
        "statistics", dict(logits=torch.zeros(8, 3).t()), "logits: want contiguous rows; got a column stride of 3"
    ),
    "logits-rows": (
        "statistics", dict(logits=Z[:1].expand(3, 8)),
        "logits: want rows that lie one after another, under 2**40 elements; got 0",
    ),
    "ids-dtype": ("statistics", dict(ids=IDS.int()), "ids: want contiguous int64; got (3, 2) int32"),
    "ids-vector": ("statistics", dict(ids=IDS[:, 0].contiguous()), "ids: want (n, K) int64; got (3,) int64"),
    "ids-rows": ("statistics", dict(ids=IDS[:2]), "ids: want 6 elements; got 4"),
    "ids-strided": ("statistics", dict(ids=IDS.t().contiguous().t()), "ids: want contiguous int64; got (3, 2) int64"),
    "first": ("statistics", dict(first=-1), "first: want at least 0; got -1"),
    "bias": ("statistics", dict(bias=vector(7)), "bias: want 8 elements; got 7"),
    "temperature": (
        "statistics", dict(inverse_temperature=vector(4)), "inverse_temperature: want 3 elements; got 4"
    ),
    "temperature-expanded": (
        "statistics", dict(inverse_temperature=torch.ones(1).expand(3)),
        "inverse_temperature: want contiguous float32; got (3,) float32",
    ),
    "maximum": ("statistics", dict(state=state(maximum=vector(2))), "maximum: want 3 elements; got 2"),
    "total": ("statistics", dict(state=state(total=vector(2))), "total: want 3 elements; got 2"),
    "total-dtype": (
        "statistics", dict(state=state(total=vector().double())), "total: want contiguous float32; got (3,) float64"
    ),
    "picked": ("statistics", dict(state=state(picked=torch.zeros(3, 1))), "picked: want 6 elements; got 3"),
    "weighted": ("statistics", dict(state=state(weighted=vector(2))), "weighted: want 3 elements; got 2"),
    "squared": ("statistics", dict(state=state(squared=vector(2))), "squared: want 3 elements; got 2"),
    "gradient-row-high": (
        "gradient", dict(rows=torch.tensor([0, 3, 1])), "rows: want values in 0..2; got 3"
    ),
    "gradient-row-low": ("gradient", dict(rows=torch.tensor([0, -1, 1])), "rows: want values in 0..2; got -1"),
    "gradient-rows-short": ("gradient", dict(rows=torch.tensor([0, 1])), "rows: want 3 elements; got 2"),
    "gradient-rows-dtype": (
        "gradient", dict(rows=torch.tensor([0, 1, 2], dtype=torch.int32)),
        "rows: want contiguous int64; got (3,) int32",
    ),
    "gradient-out-rows": ("gradient", dict(out=torch.zeros(2, 8)), "out: want 3 rows; got 2"),
    "gradient-out-columns": ("gradient", dict(out=torch.zeros(3, 7)), "out: want (3, 8); got (3, 7)"),
    "gradient-out-dtype": (
        "gradient", dict(out=torch.zeros(3, 8, dtype=torch.bfloat16)),
        "out: want a matrix of float32; got (3, 8) bfloat16",
    ),
    "gradient-out-expanded": (
        "gradient", dict(out=torch.zeros(8).expand(3, 8)),
        "out: want rows that lie one after another, under 2**40 elements; got 0",
    ),
    "gradient-overlap": (
        "gradient", dict(logits=OVERLAP[:24].view(3, 8), out=OVERLAP[8:32].view(3, 8)),
        "out: want memory apart from logits, or the same; got an overlap",
    ),
    "gradient-overlap-of-rows": (
        "gradient",
        dict(logits=OVERLAP[:24].view(3, 8), rows=torch.tensor([2, 1, 0]), out=OVERLAP[:24].view(3, 8)),
        "out: want memory apart from logits; got an overlap",
    ),
    "gradient-overlap-of-one-row": (
        "gradient",
        dict(
            logits=OVERLAP[:8].expand(1, 8), out=OVERLAP[4:12].view(1, 8), ids=IDS[:1], lse=vector(1),
            lse_low=vector(1), base=vector(1), slope=None, square=None, picked=torch.zeros(1, 2),
            complement=torch.zeros(1, 2), inverse_temperature=None,
        ),
        "out: want memory apart from logits, or the same; got an overlap",
    ),
    "gradient-lse": ("gradient", dict(lse=vector(2)), "lse: want 3 elements; got 2"),
    "gradient-lse-low": ("gradient", dict(lse_low=vector(2)), "lse_low: want 3 elements; got 2"),
    "gradient-base": ("gradient", dict(base=vector(2)), "base: want 3 elements; got 2"),
    "gradient-slope": ("gradient", dict(slope=vector(2)), "slope: want 3 elements; got 2"),
    "gradient-square": ("gradient", dict(square=vector(2)), "square: want 3 elements; got 2"),
    "gradient-picked": ("gradient", dict(picked=torch.zeros(3, 3)), "picked: want 6 elements; got 9"),
    "gradient-complement": ("gradient", dict(complement=torch.zeros(3, 1)), "complement: want 6 elements; got 3"),
    "gradient-ids": ("gradient", dict(ids=IDS[:1]), "ids: want 6 elements; got 2"),
    "gradient-temperature": (
        "gradient", dict(inverse_temperature=vector(1)), "inverse_temperature: want 3 elements; got 1"
    ),
    "teacher": ("divergence", dict(teacher=torch.zeros(3, 9)), "teacher: want (3, 8); got (3, 9)"),
    "student-lse": ("divergence", dict(student_lse=vector(1)), "student_lse: want 3 elements; got 1"),
    "student-low": ("divergence", dict(student_low=vector(1)), "student_low: want 3 elements; got 1"),
    "teacher-lse": ("divergence", dict(teacher_lse=vector(1)), "teacher_lse: want 3 elements; got 1"),
    "teacher-low": ("divergence", dict(teacher_low=vector(1)), "teacher_low: want 3 elements; got 1"),
    "value": ("divergence", dict(value=vector(1)), "value: want 3 elements; got 1"),
    "center": ("divergence", dict(center=vector(1)), "center: want 3 elements; got 1"),
    "beta": ("divergence", dict(beta=1.0), "beta: want 0 < beta < 1; got 1"),
    "kind": ("divergence", dict(kind="jeffreys"), "kind: want forward, reverse or js; got jeffreys"),
    "divergence-row": ("divergence_gradient", dict(rows=torch.tensor([9, 0, 0])), "rows: want values in 0..2; got 9"),
    "divergence-weight": ("divergence_gradient", dict(weight=vector(1)), "weight: want 3 elements; got 1"),
    "divergence-center": ("divergence_gradient", dict(center=vector(1)), "center: want 3 elements; got 1"),
    "divergence-out": ("divergence_gradient", dict(out=torch.zeros(3, 7)), "out: want (3, 8); got (3, 7)"),
    "divergence-overlap": (
        "divergence_gradient", dict(teacher=OVERLAP[:24].view(3, 8), out=OVERLAP[4:28].view(3, 8)),
        "out: want memory apart from teacher, or the same; got an overlap",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_border_refuses(name: str) -> None:
    function, change, message = ERRORS[name]
    with pytest.raises(ValueError, match=f"^{re.escape(f'{function}: {message}')}$"):
        getattr(_cpu, function)(**{**GOOD[function], **change})


@pytest.mark.parametrize("function", GOOD)
def test_border_accepts_what_the_errors_change(function: str) -> None:
    getattr(_cpu, function)(**GOOD[function])


@pytest.mark.parametrize("threads", (0, 4097))
def test_border_refuses_a_number_of_threads(threads: int) -> None:
    vectors = [(vector().data_ptr(), 3)] * 6
    matrix = (Z.data_ptr(), 3, 8, 8)
    with pytest.raises(ValueError, match=re.escape(f"divergence: threads: want 1..4096; got {threads}")):
        _cpu_ext.policy_loss_divergence(matrix, matrix, *vectors[:4], 0, 0.5, *vectors[4:], threads)


@pytest.mark.parametrize(
    ("matrix", "message"),
    (
        ((0, 3, 8, 8), "student: want memory; got none"),
        ((8, -1, 8, 8), "student: want sizes in 0 .. 2**40 - 1; got (-1, 8)"),
        ((8, 3, 2**40, 2**40), "student: want sizes in 0 .. 2**40 - 1; got (3, 1099511627776)"),
        ((8, 3, 8, 2**39), "student: want rows that lie one after another, under 2**40 elements; got 549755813888"),
    ),
    ids=("no-memory", "negative", "columns", "stride"),
)
def test_border_refuses_a_matrix(matrix: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"divergence: {message}")):
        _cpu_ext.policy_loss_divergence(matrix, matrix, *[(8, 3)] * 4, 0, 0.5, (8, 3), (8, 3), 1)
