"""linear_logprobs, the two-phase path, distillation, and the registered ops of the family, in every room."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from policy_loss_cases import (
    HEADS,
    SPECS,
    STREAMS,
    every_dtype,
    every_room,
    every_room_and_triton,
    every_spec,
    head_of,
    in_rooms,
    inputs,
    leaves,
    logits_in_torch,
    native,
    run,
    streams,
)
from torch import Tensor

from m3kernels.policy_loss import (
    DistillSpec,
    LossSpec,
    linear_distill_loss,
    linear_logprobs,
    linear_logprobs_backward,
    linear_policy_loss,
    losses,
    policy_loss_from_logprobs,
)
from m3kernels.policy_loss.reference import TOLERANCE, make_inputs
from m3kernels.testing import check_error, relative_error


# -- log-probabilities ------------------------------------------------------------------------------------------------
@in_rooms(HEADS, ("softcap",), "head")
@pytest.mark.parametrize("save_logits", (True, False))
def test_logprobs_and_their_gradients(backend, head, save_logits):
    case, options = inputs(bias=HEADS[head].get("bias", False)), head_of(HEADS[head], 53)
    ids = torch.randint(0, 301, (53, 3))
    ids[:, 1] = ids[:, 0]
    up = [torch.randn(53, 3), *(torch.randn(53) for _ in range(3))]

    def ours(x: list[Tensor]) -> list[Tensor]:
        bias = x[2] if len(x) > 2 else None
        return list(
            linear_logprobs(x[0], x[1], ids, bias=bias, entropy=True, sum_sq=True, save_logits=save_logits, **options)
        )

    def in_torch(x: list[Tensor]) -> list[Tensor]:
        z = logits_in_torch(x, **options)
        logp = z.log_softmax(-1)
        p = logp.exp()
        return [logp.gather(1, ids), z.logsumexp(-1), -(p * logp).sum(-1), p.square().sum(-1)]

    found = outputs_and_gradients(ours, leaves(case), up)
    exact = outputs_and_gradients(in_torch, leaves(case, torch.float64), up)
    same = outputs_and_gradients(in_torch, leaves(case), up)
    for actual, best, theirs in zip(found, exact, same, strict=True):
        check_error(actual, best, theirs, TOLERANCE)


def outputs_and_gradients(function: Any, x: list[Tensor], up: list[Tensor]) -> list[Tensor]:
    outputs = function(x)
    sum((y * g.to(y.dtype)).sum() for y, g in zip(outputs, up, strict=True)).backward()
    return [*(y.detach() for y in outputs), *(leaf.grad for leaf in x)]


@native
@every_dtype
@pytest.mark.parametrize("rows", (0, 1, 1030))
def test_logprobs_of_many_rows(backend, dtype, rows):
    case = make_inputs(rows, 6, 40, dtype=dtype)
    x = leaves(case)
    found = linear_logprobs(*x, case["ids"])
    found.logprobs.sum().backward()
    exact = leaves(case, torch.float64)
    logp = F.linear(*exact).log_softmax(-1).gather(1, case["ids"][:, None])[:, 0]
    logp.sum().backward()
    torch.testing.assert_close(found.logprobs.double(), logp.detach(), rtol=1e-6, atol=3e-6)
    assert (found.logprobs <= 0).all()
    assert found.entropy is None
    half = 1e-5 if dtype == torch.float32 else 2**-8
    torch.testing.assert_close(x[1].grad.double(), exact[1].grad, rtol=half, atol=half * float(rows) ** 0.5)


@every_room
def test_logprobs_are_never_positive(backend):
    """Where one logit dwarfs the others, log p is 0 and not a rounding error above it."""
    hidden, weight = torch.eye(4) * 30, torch.eye(4) * torch.tensor([1.0, 3.0, 10.0, 1e3])
    logprobs = linear_logprobs(hidden, weight, torch.arange(4)).logprobs
    assert (logprobs <= 0).all()
    assert logprobs[3] == 0


@native
def test_gradients_of_confident_tokens(backend):
    """With p of the ids from 0.96 to 1 - 2e-5, the gradient c (1 - p) is no less exact than that of fp32 torch."""
    weight = torch.randn(64, 32)
    hidden = weight * (torch.linspace(12.0, 18.0, 64) / weight.square().sum(1))[:, None]

    def in_torch(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        x = hidden.to(dtype, copy=True).requires_grad_()
        logprobs = (x @ weight.to(dtype).T).log_softmax(-1).diagonal()
        logprobs.sum().backward()
        return x.grad, logprobs.detach()  # type: ignore[return-value]

    x = hidden.clone().requires_grad_()
    linear_logprobs(x, weight, torch.arange(64)).logprobs.sum().backward()
    exact, logprobs = in_torch(torch.float64)
    assert -0.1 < logprobs.min() < logprobs.max() < 0
    assert relative_error(x.grad, exact).rms < relative_error(in_torch(torch.float32)[0], exact).rms


@every_room
@pytest.mark.parametrize("scale", (1e4, 1e-6))
def test_extreme_logits(backend, scale):
    case = inputs(20)
    x = leaves({**case, "hidden": case["hidden"] * scale})
    found = linear_logprobs(x[0], x[1], case["ids"][:20], entropy=True)
    logp = (x[0].double() @ x[1].double().T).log_softmax(-1)
    torch.testing.assert_close(
        found.logprobs.double(), logp.gather(1, case["ids"][:, None])[:, 0], rtol=1e-5, atol=1e-5
    )
    found.logprobs.sum().backward()
    assert x[1].grad.isfinite().all()


@every_room
def test_backward_as_a_function(backend):
    case = inputs(bias=True)
    x, up = leaves(case), torch.randn(53)
    found = linear_logprobs(x[0], x[1], case["ids"], bias=x[2], temperature=0.8, softcap=4.0)
    (found.logprobs * up).sum().backward()
    fixed, lse = [leaf.detach() for leaf in x], found.lse.detach()
    grads = linear_logprobs_backward(*fixed[:2], case["ids"], lse, up, bias=fixed[2], temperature=0.8, softcap=4.0)
    torch.testing.assert_close(list(grads), [leaf.grad for leaf in x], rtol=1e-4, atol=1e-6)


@every_room
@every_spec
def test_two_phases_agree_with_one(backend, spec):
    case, loss_spec = inputs(), LossSpec(**SPECS[spec])
    x = leaves(case)
    found = linear_logprobs(x[0], x[1], case["ids"], entropy=True)
    loss, metrics = policy_loss_from_logprobs(found.logprobs, spec=loss_spec, entropy=found.entropy, **streams(case))
    loss.backward()
    one = run(case, spec=loss_spec)
    torch.testing.assert_close(loss.detach(), one[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close([leaf.grad for leaf in x], one[1], rtol=1e-4, atol=1e-6)
    assert float(metrics["ratio_mean"]) == pytest.approx(float(one[2]["ratio_mean"]), rel=1e-5)


# -- distillation -----------------------------------------------------------------------------------------------------
@in_rooms(("forward", "reverse", "js"), ("js",), "kind")
@pytest.mark.parametrize("head", ("plain", "everything"))
@pytest.mark.parametrize("rows_of_logits", (5, 1000))
def test_divergence_from_a_teachers_head(backend, kind, head, rows_of_logits):
    options = head_of(HEADS[head], 53)
    case = inputs(bias=head == "everything")
    teacher = make_inputs(53, 10, 301, seed=7)
    spec = DistillSpec(divergence=kind, beta=0.3)
    found = distill(
        case, spec, rows_of_logits, **options, teacher_hidden=teacher["hidden"], teacher_weight=teacher["weight"]
    )
    temperature = options.get("temperature", 1.0)
    exact, same = (
        divergence_in_torch(case, teacher, kind, dtype, temperature, options)
        for dtype in (torch.float64, torch.float32)
    )
    for actual, best, theirs in zip(found, exact, same, strict=True):
        check_error(actual, best, theirs, TOLERANCE)


def distill(case: dict[str, Any], spec: DistillSpec, rows_of_logits: int, **options: Any) -> list[Tensor]:
    x = leaves(case)
    bias = x[2] if len(x) > 2 else None
    loss, _ = linear_distill_loss(
        x[0], x[1], mask=case["mask"], spec=spec, bias=bias, workspace_bytes=8 * 301 * rows_of_logits, **options
    )
    loss.backward()
    return [loss.detach(), *(leaf.grad for leaf in x)]  # type: ignore[list-item]


def divergence_in_torch(
    case: dict[str, Any], teacher: dict[str, Any], kind: str, dtype: torch.dtype, temperature: Any, options: Any
) -> list[Tensor]:
    x = leaves(case, dtype)
    log_p = logits_in_torch(x, **options).log_softmax(-1)
    scale = temperature[:, None].to(dtype) if isinstance(temperature, Tensor) else temperature
    log_t = (teacher["hidden"].to(dtype) @ teacher["weight"].to(dtype).T / scale).log_softmax(-1)
    p, t = log_p.exp(), log_t.exp()
    if kind == "forward":
        each = (t * (log_t - log_p)).sum(-1)
    elif kind == "reverse":
        each = (p * (log_p - log_t)).sum(-1)
    else:
        m = (0.3 * t + 0.7 * p).log()
        each = 0.3 * (t * (log_t - m)).sum(-1) + 0.7 * (p * (log_p - m)).sum(-1)
    loss = each[case["mask"]].mean()
    loss.backward()
    return [loss.detach(), *(leaf.grad for leaf in x)]  # type: ignore[list-item]


@every_room
@pytest.mark.parametrize("rows_of_logits", (16, 1000))
def test_clip_forward_has_a_gradient_only_below_the_teacher(backend, rows_of_logits):
    case = inputs()
    x = leaves(case)
    loss, metrics = linear_distill_loss(
        x[0], x[1], case["ids"], case["old_logprobs"], case["mask"], workspace_bytes=4 * 301 * rows_of_logits
    )
    loss.backward()
    y = leaves(case, torch.float64)
    logp = (y[0] @ y[1].T).log_softmax(-1).gather(1, case["ids"][:, None])[:, 0]
    below = (logp < case["old_logprobs"].double()) & case["mask"]
    exact = (-logp * below).sum() / case["mask"].sum()
    exact.backward()
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close([leaf.grad.double() for leaf in x], [leaf.grad for leaf in y], rtol=1e-4, atol=1e-6)
    assert metrics["rows_differentiated"] == below.sum()
    assert below.sum() < case["mask"].sum()


@every_room
@pytest.mark.parametrize("kind", ("forward", "reverse", "js"))
def test_top_ids_with_one_bucket_for_the_rest(backend, kind):
    case = inputs(vocabulary=40)
    log_t = (make_inputs(53, 24, 40, seed=5)["hidden"] @ case["weight"].T).log_softmax(-1)
    teacher, ids = log_t.topk(6)
    x = leaves(case)
    loss, _ = linear_distill_loss(x[0], x[1], ids, teacher, case["mask"], DistillSpec(divergence=kind, beta=0.3))
    loss.backward()
    y = leaves(case, torch.float64)
    p = (y[0] @ y[1].T).softmax(-1)
    rest = torch.ones(53, 40, dtype=torch.float64).scatter_(1, ids, 0.0)
    p = torch.cat([p.gather(1, ids), (p * rest).sum(1, keepdim=True)], 1)
    t = torch.cat([teacher.double().exp(), (log_t.double().exp() * rest).sum(1, keepdim=True)], 1)
    m = 0.3 * t + 0.7 * p
    each = {
        "forward": t * (t / p).log(),
        "reverse": p * (p / t).log(),
        "js": 0.3 * t * (t / m).log() + 0.7 * p * (p / m).log(),
    }[kind].sum(1)
    exact = each[case["mask"]].mean()
    exact.backward()
    torch.testing.assert_close(loss.double(), exact, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close([leaf.grad.double() for leaf in x], [leaf.grad for leaf in y], rtol=1e-3, atol=1e-5)


def test_divergences_are_zero_at_the_teacher():
    case = inputs()
    for_student = dict(teacher_hidden=case["hidden"], teacher_weight=case["weight"])
    found = distill(case, DistillSpec(divergence="js"), 1000, **for_student)
    assert abs(float(found[0])) < 1e-6
    assert found[1].abs().max() < 1e-7


# -- the registered ops -----------------------------------------------------------------------------------------------
def op_calls() -> dict[str, tuple[Any, ...]]:
    """Arguments of each registered op, tensors or not, as the public functions give them."""
    x = inputs(10, 6, 30, bias=True)
    t = torch.linspace(0.5, 1.5, 10)
    head, ids, weight = (x["hidden"], x["weight"]), x["ids"][:, None], x["mask"].float()
    on = torch.arange(10)
    spec = LossSpec(ratio_level="step", kl_coef=0.1, sampler_level="token", entropy_coef=0.1).to_text()
    given = (x["advantages"], x["old_logprobs"], x["ref_logprobs"], x["sampler_logprobs"], None, on // 5, on // 2)
    return {
        "linear_logprobs": (*head, ids, x["bias"], t, 1.5, 3.0, 0, True, True, True, 1 << 20),
        "linear_logprobs_backward": (
            *head, ids, None, t, torch.full((10,), 4.0), torch.zeros(10), torch.empty(0), weight, weight, None,
            torch.rand(10, 1), torch.rand(10, 1),
            1.0, 0.0, 0, True, True, False,
        ),
        "linear_policy_loss": (
            *head, ids, x["bias"], t, weight, *given, 1.0, 2.0, spec, True, True, True, False, 1 << 20,
        ),
        "linear_distill_loss": (
            *head, x["bias"], t, weight, *head, None, 1.0, 0.0, 1.0, 0.0, "js", 0.5, True, True, True, False, 1 << 20,
        ),
    }  # fmt: skip


@every_room_and_triton
@pytest.mark.parametrize("op", op_calls())
def test_opcheck(backend, op):
    torch.library.opcheck(getattr(torch.ops.m3kernels, op).default, op_calls()[op])


@native
def test_compiles_whole(backend):
    case = inputs()
    del case["cu_seqlens"]

    def step(hidden: Tensor, weight: Tensor) -> Tensor:
        rest = {name: case[name] for name in STREAMS if name != "cu_seqlens"}
        return linear_policy_loss(hidden, weight, case["ids"], spec=LossSpec(ratio_level="step"), **rest)[0]

    x, y = leaves(case), leaves(case)
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)(*x)
    compiled.backward()
    eager = step(*y)
    eager.backward()
    torch.testing.assert_close([compiled, x[1].grad], [eager, y[1].grad])


def test_a_spec_is_its_text():
    spec = LossSpec(
        ratio_level="sequence", dual_clip=4.0, sampler_level="token", aggregation="constant", constant_length=9
    )
    assert losses.from_text(spec.to_text()) == spec
    assert losses.from_text(DistillSpec(divergence="js", beta=0.25).to_text()) == DistillSpec(
        divergence="js", beta=0.25
    )
