"""The divergences of the Triton tile kernels of policy_loss: run on a GPU, or interpreted where there is none.

Exact values are those of the plain-torch tile kernels in fp64, of the definitions, and of autograd.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from triton_tiles import (
    DEVICE,
    cloned,
    divergence_gradient_inputs,
    divergence_inputs,
    doubled,
    every_dtype,
    every_kind,
    in_triton,
    two_parts,
)

from m3kernels.policy_loss import tiles
from m3kernels.policy_loss.reference import TOLERANCE
from m3kernels.testing import bitwise_equal, check_error, relative_error, uninitialized_is_nan

pytest.importorskip("triton", reason="Triton is not installed")
_triton = pytest.importorskip("m3kernels.policy_loss._triton")

# The interpreter computes both sides of a select: an infinite logit meets the branch not taken.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")

DIVERGENCE: dict[str, dict[str, Any]] = {
    "one_by_one": dict(rows=1, columns=1),
    "odd": dict(rows=3, columns=131),
    "two_blocks": dict(rows=2, columns=2051),
    "two_spans": dict(rows=2, columns=32771),
}


@in_triton
@every_dtype
@every_kind
@pytest.mark.parametrize("case", DIVERGENCE)
def test_divergence(kind: str, beta: float, dtype: torch.dtype, case: str) -> None:
    arguments = divergence_inputs(**DIVERGENCE[case], kind=kind, beta=beta, dtype=dtype)
    exact, torchs = list(map(doubled, arguments)), list(map(cloned, arguments))
    tiles.divergence(*exact)
    tiles.divergence(*torchs)
    with uninitialized_is_nan():
        _triton.divergence(*arguments)
    check_error(arguments[-2], exact[-2], torchs[-2], TOLERANCE)
    check_error(arguments[-1], exact[-1], torchs[-1], TOLERANCE)


def defined_divergence(student: Tensor, teacher: Tensor, kind: str, beta: float) -> Tensor:
    """(R,), from all logits of a row at once."""
    log_p, log_t = student.log_softmax(1), teacher.log_softmax(1)
    p, t = log_p.exp(), log_t.exp()
    log_m = (beta * t + (1 - beta) * p).log()
    terms = {
        "forward": t * (log_t - log_p),
        "reverse": p * (log_p - log_t),
        "js": beta * t * (log_t - log_m) + (1 - beta) * p * (log_p - log_m),
    }
    return terms[kind].sum(1)


@in_triton
@every_kind
def test_divergence_of_tiles_is_that_of_the_distributions(kind: str, beta: float) -> None:
    student, teacher = 2 * torch.randn(2, 3, 200, device=DEVICE)
    lses = [part for z in (student, teacher) for part in two_parts(z.double().logsumexp(1))]
    value, center = torch.zeros(2, 3, device=DEVICE)
    for start, stop in ((0, 90), (90, 200)):
        _triton.divergence(student[:, start:stop], teacher[:, start:stop], *lses, kind, beta, value, center)
    exact = defined_divergence(student.double(), teacher.double(), kind, beta)
    check_error(value, exact, defined_divergence(student, teacher, kind, beta), TOLERANCE)


@in_triton
@every_kind
def test_divergence_where_probabilities_vanish(kind: str, beta: float) -> None:
    """Both models, the student alone, the teacher alone: infinite where the definition is, and no nan."""
    arguments = divergence_inputs(3, 20, kind, beta, torch.float32)
    student, teacher, *_, value, center = arguments
    student[0, :5] = teacher[0, :5] = -torch.inf
    student[1, :5] = -torch.inf
    teacher[2, :5] = -torch.inf
    exact, torchs = list(map(doubled, arguments)), list(map(cloned, arguments))
    tiles.divergence(*exact)
    tiles.divergence(*torchs)
    _triton.divergence(*arguments)
    infinite = {"forward": [False, True, False], "reverse": [False, False, True], "js": [False] * 3}[kind]
    assert value.isinf().tolist() == infinite
    check_error(value, exact[-2], torchs[-2], TOLERANCE)
    check_error(center, exact[-1], torchs[-1], TOLERANCE)


@in_triton
def test_js_of_nearly_equal_models_keeps_its_digits() -> None:
    """Logits of 60 and a difference of 1e-3: formed from logarithms of p and m apart, the terms would be noise."""
    student = 60 * torch.rand(2, 500, device=DEVICE)
    teacher = student + 1e-3 * torch.randn(2, 500, device=DEVICE)
    exact_lses = [z.double().logsumexp(1) for z in (student, teacher)]
    lses = [part for lse in exact_lses for part in two_parts(lse)]
    center, weight = torch.zeros(2, device=DEVICE), torch.ones(2, device=DEVICE)
    out = torch.empty_like(student)
    _triton.divergence_gradient(student, teacher, None, *lses, "js", 0.5, center, weight, 1.0, 0.0, None, out)
    log_p, log_t = (z.double() - lse[:, None] for z, lse in zip((student, teacher), exact_lses, strict=True))
    exact = log_p.exp() * 0.5 * -torch.log1p(0.5 * torch.expm1(log_t - log_p))
    assert relative_error(out, exact).rms < 1e-2


DIVERGENCE_GRADIENT: dict[str, dict[str, Any]] = {
    "one_by_one": dict(rows=1, columns=1),
    "odd": dict(rows=3, columns=131),
    "two_blocks": dict(rows=2, columns=2051),
    "softcap": dict(rows=3, columns=61, softcap=30.0),
    "temperature": dict(rows=3, columns=61, temperature=True, logit_scale=-0.7),
    "everything": dict(rows=6, columns=2055, some=[5, 1], softcap=30.0, temperature=True, logit_scale=0.6),
}


@in_triton
@every_dtype
@every_kind
@pytest.mark.parametrize("case", DIVERGENCE_GRADIENT)
def test_divergence_gradient(kind: str, beta: float, dtype: torch.dtype, case: str) -> None:
    arguments = divergence_gradient_inputs(**DIVERGENCE_GRADIENT[case], kind=kind, beta=beta, dtype=dtype)
    exact, torchs = list(map(doubled, arguments)), list(map(cloned, arguments))
    tiles.divergence_gradient(*exact)
    tiles.divergence_gradient(*torchs)
    _triton.divergence_gradient(*arguments)
    check_error(arguments[-1], exact[-1], torchs[-1], TOLERANCE)


@in_triton
@every_kind
def test_divergence_gradient_in_place(kind: str, beta: float) -> None:
    arguments = divergence_gradient_inputs(3, 2051, kind, beta, torch.float32, softcap=30.0)
    _triton.divergence_gradient(*arguments)
    student = arguments[0]
    _triton.divergence_gradient(*arguments[:-1], student)
    assert bitwise_equal(student, arguments[-1])


@in_triton
@every_kind
def test_divergence_gradient_is_autograd(kind: str, beta: float) -> None:
    student, teacher = 2 * torch.randn(2, 3, 200, device=DEVICE)
    weight = torch.randn(3, device=DEVICE)

    leaf = student.double().requires_grad_()
    (weight * defined_divergence(leaf, teacher.double(), kind, beta)).sum().backward()
    assert leaf.grad is not None

    def by_tiles(room: Any) -> Tensor:
        lses = [part for z in (student, teacher) for part in two_parts(z.double().logsumexp(1))]
        out = torch.empty_like(student)
        value, center = torch.zeros(2, 3, device=DEVICE)
        room.divergence(student, teacher, *lses, kind, beta, value, center)
        room.divergence_gradient(student, teacher, None, *lses, kind, beta, center, weight, 1.0, 0.0, None, out)
        return out

    check_error(by_tiles(_triton), leaf.grad, by_tiles(tiles), TOLERANCE)


@in_triton
@pytest.mark.parametrize(("kind", "beta"), (("forward", 0.0), ("reverse", 0.0)))
def test_divergence_gradient_of_models_that_all_but_agree(kind: str, beta: float) -> None:
    """Probabilities 1e-6 apart, logits 512 apart: what rounding takes from log sum exp is more than the difference."""
    arguments = divergence_gradient_inputs(4, 2000, kind, beta, torch.float32)
    base = (arguments[0] * 2**14).round() / 2**14  # so that 512 more is exact
    arguments[0], arguments[1] = base + 512, base + torch.randint(-1, 2, base.shape, device=DEVICE) * 2.0**-20
    student, teacher = (z.double().logsumexp(1) for z in arguments[:2])
    arguments[9], nothing = torch.zeros(4, device=DEVICE), torch.zeros(4, device=DEVICE)  # center
    exact = list(map(doubled, arguments))
    exact[3:7] = student, nothing.double(), teacher, nothing.double()
    tiles.divergence_gradient(*exact)
    arguments[3:7] = *two_parts(student), *two_parts(teacher)
    _triton.divergence_gradient(*arguments)
    found = relative_error(arguments[-1], exact[-1]).rms
    arguments[4] = arguments[6] = nothing
    _triton.divergence_gradient(*arguments)
    assert found < 0.1 * relative_error(arguments[-1], exact[-1]).rms
