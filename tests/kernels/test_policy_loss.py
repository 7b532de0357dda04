"""The policy_loss ops in every room: values, gradients, metrics, invariances, opcheck, edge sizes, hostile memory."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from m3kernels.policy_loss import (
    METRICS,
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
from m3kernels.testing import check_error, surrounded_by_nan, uninitialized_is_nan

ROOMS = ("reference", "cpu")
every_room = pytest.mark.parametrize("backend", ROOMS, indirect=True)
every_room_and_triton = pytest.mark.parametrize("backend", (*ROOMS, "triton"), indirect=True)
native = pytest.mark.parametrize("backend", ("cpu",), indirect=True)
every_dtype = pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)

HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": dict(bias=True),
    "temperature": dict(temperature=0.7),
    "temperatures": dict(temperature="each"),
    "softcap": dict(softcap=2.0),
    "scale": dict(logit_scale=0.3),
    "everything": dict(bias=True, temperature="each", softcap=3.0, logit_scale=1.7),
}
SPECS: dict[str, dict[str, Any]] = {
    "token": {},
    "step": dict(ratio_level="step", clip_low=0.01, clip_high=0.02),
    "sequence": dict(ratio_level="sequence", clip_low=3e-4, clip_high=4e-4, aggregation="sequence_mean"),
    "dual": dict(dual_clip=1.5, aggregation="constant", constant_length=40),
    "one_sided": dict(clip="one_sided", clip_high=0.1, kl_coef=0.2, kl_estimator="k1"),
    "no_clip": dict(clip="none", kl_coef=0.3, kl_estimator="k2", kl_in="reward"),
    "kl_loss": dict(kl_coef=0.3, kl_ratio_weighted=True),
    "kl_sequence": dict(kl_coef=0.3, ratio_level="sequence", kl_ratio_weighted=True),
    "entropy": dict(entropy_coef=0.05),
    "truncated": dict(sampler_level="token", sampler_high=1.1),
    "masked": dict(sampler_level="token", sampler_mode="mask", sampler_low=0.8, sampler_high=1.2),
    "sequence_truncated": dict(sampler_level="sequence", sampler_high=1.5, ratio_level="step"),
}
every_spec = pytest.mark.parametrize("spec", SPECS)


def in_rooms(cases: Iterable[str], triton: tuple[str, ...], name: str) -> pytest.MarkDecorator:
    """Every case in every room, and a few in Triton's interpreter, which is slow (test_policy_loss_triton.py: more)."""
    pairs = [(room, case) for room in ROOMS for case in cases] + [("triton", case) for case in triton]
    return pytest.mark.parametrize(("backend", name), pairs, indirect=["backend"])


STREAMS = ("advantages", "old_logprobs", "ref_logprobs", "sampler_logprobs", "mask", "segment_ids", "cu_seqlens")


def inputs(rows: int = 53, size: int = 24, vocabulary: int = 301, **options: Any) -> dict[str, Any]:
    return make_inputs(rows, size, vocabulary, **{"sequences": 4, "density": 0.7, **options})


def streams(case: dict[str, Any]) -> dict[str, Any]:
    return {name: case[name] for name in STREAMS}


def head_of(options: dict[str, Any], rows: int) -> dict[str, Any]:
    """Keyword arguments of a head, without its bias."""
    found = {key: value for key, value in options.items() if key != "bias"}
    if found.get("temperature") == "each":
        found["temperature"] = torch.linspace(0.5, 2.0, max(rows, 1))[:rows]
    return found


def leaves(case: dict[str, Any], dtype: torch.dtype | None = None) -> list[Tensor]:
    """hidden, weight and, if there is one, bias, as fresh leaves."""
    tensors = [case[key] for key in ("hidden", "weight", "bias") if case[key] is not None]
    return [x.to(dtype or x.dtype, copy=True).requires_grad_() for x in tensors]


def run(case: dict[str, Any], dtype: torch.dtype | None = None, **options: Any) -> tuple[Tensor, list[Tensor], Any]:
    """(loss, gradients, metrics) of linear_policy_loss."""
    x = leaves(case, dtype)
    bias = x[2] if len(x) > 2 else None
    loss, metrics = linear_policy_loss(x[0], x[1], case["ids"], bias=bias, **{**streams(case), **options})
    loss.backward()
    return loss.detach(), [leaf.grad for leaf in x], metrics  # type: ignore[misc]


def logits_in_torch(x: list[Tensor], temperature: Any = 1.0, softcap: float = 0.0, logit_scale: float = 1.0) -> Tensor:
    z = F.linear(x[0], x[1], x[2] if len(x) > 2 else None) * logit_scale
    z = softcap * torch.tanh(z / softcap) if softcap else z
    scale = temperature[:, None].to(z.dtype) if isinstance(temperature, Tensor) else temperature
    return z / scale


def run_in_torch(case: dict[str, Any], dtype: torch.dtype, spec: LossSpec, **head: Any) -> tuple[Tensor, list[Tensor]]:
    """(loss, gradients) with full logits and autograd, all in dtype; log-softmax in fp32 for halves, as trainers do."""
    x = leaves(case, dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    logp = logits_in_torch(x, **head).to(wide).log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    chosen = logp.gather(1, case["ids"][:, None])[:, 0]
    loss, _ = policy_loss_from_logprobs(chosen, spec=spec, entropy=entropy, **streams(case))
    loss.backward()
    return loss.detach(), [leaf.grad for leaf in x]  # type: ignore[misc]


def check_run(actual: Any, case: dict[str, Any], spec: LossSpec, dtype: torch.dtype, **head: Any) -> None:
    """The error rule on the loss and on every gradient."""
    loss, grads, _ = actual
    exact_loss, exact = run_in_torch(case, torch.float64, spec, **head)
    torch_loss, in_torch = run_in_torch(case, dtype, spec, **head)
    scale = torch.ones(1)  # a loss near 0 is a sum that cancels: what rounding does to it is relative to its terms
    check_error(loss + scale, exact_loss + scale.double(), torch_loss + scale, TOLERANCE)
    for ours, theirs, best in zip(grads, in_torch, exact, strict=True):
        check_error(ours, best, theirs, TOLERANCE)


# -- values and gradients ---------------------------------------------------------------------------------------------
@in_rooms(SPECS, ("token", "kl_sequence"), "spec")
def test_every_spec(backend, spec):
    case, loss_spec = inputs(), LossSpec(**SPECS[spec])
    check_run(run(case, spec=loss_spec), case, loss_spec, torch.float32)


@in_rooms(HEADS, ("everything",), "head")
def test_every_head(backend, head):
    case, options = inputs(bias=HEADS[head].get("bias", False)), head_of(HEADS[head], 53)
    spec = LossSpec(entropy_coef=0.01)
    check_run(run(case, spec=spec, **options), case, spec, torch.float32, **options)


@native
@every_dtype
@pytest.mark.parametrize("rows_of_logits", (7, 16, 1000))
def test_every_dtype(backend, dtype, rows_of_logits):
    case, spec = inputs(dtype=dtype, bias=True), LossSpec(ratio_level="step", entropy_coef=0.01)
    found = run(case, spec=spec, workspace_bytes=4 * 301 * rows_of_logits)
    assert [grad.dtype for grad in found[1]] == [dtype] * 3
    check_run(found, case, spec, dtype)


@native
@pytest.mark.parametrize("rows", (1, 2, 15, 16, 17, 33))
@pytest.mark.parametrize("vocabulary", (1, 2, 129, 1500))
def test_odd_sizes(backend, rows, vocabulary):
    case, spec = inputs(rows, 5, vocabulary, sequences=1, density=1.0), LossSpec()
    check_run(run(case, spec=spec), case, spec, torch.float32)


@every_room_and_triton
def test_several_tiles_of_the_vocabulary(backend):
    case, spec = inputs(9, 8, 8192 + 77, sequences=2), LossSpec(ratio_level="sequence")
    check_run(run(case, spec=spec), case, spec, torch.float32)


@every_room
@pytest.mark.parametrize("rows", (0, 6))
def test_no_token_counts(backend, rows):
    case = inputs(rows, density=0.0, sequences=1, bias=True)
    loss, grads, metrics = run(case, spec=LossSpec(aggregation="sequence_mean"))
    assert loss == 0
    assert [grad.shape for grad in grads] == [(rows, 24), (301, 24), (301,)]
    assert not any(grad.any() for grad in grads)
    assert not any(metrics.values())


@every_room
@pytest.mark.parametrize("wanted", ((True, False, False), (False, True, False), (False, False, True)), ids=str)
def test_only_the_gradients_asked_for(backend, wanted):
    case = inputs(bias=True)
    x = [leaf.requires_grad_(want) for leaf, want in zip(leaves(case), wanted, strict=True)]
    loss, _ = linear_policy_loss(x[0], x[1], case["ids"], bias=x[2], **streams(case))
    loss.backward()
    expected = run(case)[1]
    for leaf, want, grad in zip(x, wanted, expected, strict=True):
        assert (leaf.grad is not None) == want
        assert not want or torch.equal(leaf.grad, grad)


@every_room
def test_without_grad_mode_the_loss_is_the_same(backend):
    case = inputs()
    with torch.no_grad():
        loss, _ = linear_policy_loss(case["hidden"], case["weight"], case["ids"], **streams(case))
    assert loss == run(case)[0]
    assert not loss.requires_grad


@every_room
def test_in_inference_mode(backend):
    with torch.inference_mode():
        case = inputs()
        loss, _ = linear_policy_loss(case["hidden"], case["weight"], case["ids"], **streams(case))
    assert loss == run(inputs())[0]


@native
def test_under_autocast_products_stay_in_fp32(backend):
    case = inputs()
    expected = run(case)
    with torch.autocast("cpu", torch.bfloat16):
        found = run(case)
    assert torch.equal(found[0], expected[0])
    assert all(torch.equal(a, b) for a, b in zip(found[1], expected[1], strict=True))


def test_fp64_is_served_by_the_reference():
    case, spec = inputs(), LossSpec(ratio_level="step")
    loss, grads, _ = run(case, torch.float64, spec=spec)
    exact, exact_grads = run_in_torch(case, torch.float64, spec)
    assert loss.dtype == grads[0].dtype == torch.float64
    torch.testing.assert_close([loss, *grads], [exact, *exact_grads], rtol=1e-12, atol=1e-14)


# -- upstream gradient and accumulation -------------------------------------------------------------------------------
@every_room
@pytest.mark.parametrize("factor", (0.0, -2.5, 1e3))
def test_the_upstream_gradient_is_honoured(backend, factor):
    case = inputs(bias=True)
    x = leaves(case)
    loss, _ = linear_policy_loss(x[0], x[1], case["ids"], bias=x[2], **streams(case))
    (factor * loss).backward()
    torch.testing.assert_close([leaf.grad for leaf in x], [factor * grad for grad in run(case)[1]])


@native
def test_a_second_backward_pass_is_refused(backend):
    case = inputs()
    x = leaves(case)
    loss, _ = linear_policy_loss(x[0], x[1], case["ids"], **streams(case))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"backward: want one call.*Compute the loss again"):
        loss.backward()


@every_room
def test_gradients_accumulate_over_micro_batches(backend):
    """Two halves of a batch with the whole batch's normaliser give the whole batch's loss and gradients."""
    case = inputs(sequences=1)
    bounds = torch.tensor([0, 20, 53])
    spec = LossSpec(ratio_level="sequence", aggregation="sequence_mean", entropy_coef=0.01)
    whole = run({**case, "cu_seqlens": bounds}, spec=spec)
    x = leaves(case)
    total = 0.0
    for part in (slice(0, 20), slice(20, 53)):
        some = {name: stream[part] for name, stream in streams(case).items() if name != "cu_seqlens"}
        loss, _ = linear_policy_loss(x[0][part], x[1], case["ids"][part], spec=spec, normaliser=2, **some)
        loss.backward()
        total += loss.item()
    assert total == pytest.approx(whole[0].item(), rel=1e-5)
    torch.testing.assert_close([leaf.grad for leaf in x], whole[1], rtol=1e-4, atol=1e-7)


@every_room
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16), ids=str)
def test_main_grad_is_added_to_in_fp32(backend, dtype):
    case = inputs(dtype=dtype)
    x = leaves(case)
    x[1].main_grad = torch.full_like(x[1], 2.0, dtype=torch.float32)
    loss, _ = linear_policy_loss(x[0], x[1], case["ids"], accumulate_main_grad=True, **streams(case))
    (3 * loss).backward()
    exact = run_in_torch(case, torch.float64, LossSpec())[1][1]
    torch.testing.assert_close(x[1].main_grad.double(), 2 + 3 * exact, rtol=1e-5, atol=1e-6)
    assert x[1].grad is None


@native
def test_main_grad_tells_who_asks_that_it_was_added(backend):
    case = inputs()
    x = leaves(case)
    x[1].main_grad, x[1].grad_added_to_main_grad = torch.zeros_like(x[1]), False
    loss, _ = linear_policy_loss(x[0], x[1], case["ids"], accumulate_main_grad=True, **streams(case))
    loss.backward()
    assert x[1].grad_added_to_main_grad
    assert x[1].grad.shape == x[1].shape


# -- invariances ------------------------------------------------------------------------------------------------------
@native
@every_spec
@pytest.mark.parametrize("rows_of_logits", (1, 20))
def test_the_workspace_changes_nothing(backend, spec, rows_of_logits):
    case, loss_spec = inputs(), LossSpec(**SPECS[spec])
    small = run(case, spec=loss_spec, workspace_bytes=4 * 301 * rows_of_logits)
    check_run(small, case, loss_spec, torch.float32)
    for name, value in run(case, spec=loss_spec)[2].items():
        if name != "rows_recomputed":
            torch.testing.assert_close(small[2][name], value, equal_nan=True, rtol=1e-5, atol=1e-6)


@native
def test_a_sequence_beyond_the_workspace_is_computed_twice_and_alone(backend):
    case = {**inputs(density=1.0), "cu_seqlens": torch.tensor([0, 5, 40, 53])}
    spec = LossSpec(ratio_level="sequence")
    metrics = run(case, spec=spec, workspace_bytes=4 * 301 * 16)[2]
    assert metrics["rows_recomputed"] == 35
    assert run(case, spec=LossSpec(), workspace_bytes=4 * 301 * 16)[2]["rows_recomputed"] == 0


@every_room
@every_spec
def test_the_order_of_sequences_changes_nothing(backend, spec):
    case, loss_spec = inputs(), LossSpec(**SPECS[spec])
    bounds = case["cu_seqlens"].tolist()
    parts = [torch.arange(a, b) for a, b in itertools.pairwise(bounds)]
    order = torch.cat([parts[i] for i in (2, 0, 3, 1)])
    lengths = torch.tensor([0] + [len(parts[i]) for i in (2, 0, 3, 1)])
    moved = {k: v[order] if isinstance(v, Tensor) and len(v) == 53 else v for k, v in case.items()}
    moved["cu_seqlens"] = lengths.cumsum(0)
    loss, grads, _ = run(case, spec=loss_spec)
    other, other_grads, _ = run(moved, spec=loss_spec)
    torch.testing.assert_close(other, loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(other_grads[0], grads[0][order], rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(other_grads[1], grads[1], rtol=1e-4, atol=1e-6)


@every_room
@every_spec
def test_padded_and_packed_agree(backend, spec):
    case, loss_spec = inputs(60, density=0.6), LossSpec(**SPECS[spec])
    packed = run({**case, "cu_seqlens": torch.tensor([0, 20, 40, 60])}, spec=loss_spec)
    x = leaves(case)
    padded = {key: case[key].view(3, 20) for key in STREAMS if key != "cu_seqlens"}
    loss, _ = linear_policy_loss(x[0].view(3, 20, 24), x[1], case["ids"].view(3, 20), spec=loss_spec, **padded)
    loss.backward()
    assert torch.equal(loss, packed[0])
    assert torch.equal(x[1].grad, packed[1][1])


@native
@pytest.mark.parametrize("spec", ("token", "sequence"))
def test_deterministic(backend, spec):
    case, loss_spec = inputs(), LossSpec(**SPECS[spec])
    first, second = (run(case, spec=loss_spec, workspace_bytes=4 * 301 * 16) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))


@every_room
def test_sequence_advantages_are_their_tokens_advantages(backend):
    case = inputs()
    lengths = case["cu_seqlens"].diff()
    advantages = torch.tensor([0.5, -1.0, 2.0, 0.0])
    by_sequence = run({**case, "advantages": advantages})
    by_token = run({**case, "advantages": advantages.repeat_interleave(lengths)})
    assert torch.equal(by_sequence[0], by_token[0])
    assert torch.equal(by_sequence[1][1], by_token[1][1])


@every_room
def test_steps_are_runs_of_the_mask_unless_named(backend):
    case = inputs()
    mask = case["mask"]
    changes = torch.cat([torch.zeros(1, dtype=torch.bool), mask[1:] != mask[:-1]])
    spec = LossSpec(ratio_level="step")
    unnamed = run({**case, "segment_ids": None}, spec=spec)
    named = run({**case, "segment_ids": changes.cumsum(0)}, spec=spec)
    assert torch.equal(unnamed[0], named[0])


@every_room
def test_a_mask_of_numbers_weighs(backend):
    case = inputs()
    weights = case["mask"] * torch.rand(53)
    loss, grads, _ = run({**case, "mask": weights})
    exact, exact_grads = run_in_torch({**case, "mask": weights.double()}, torch.float64, LossSpec())
    torch.testing.assert_close([loss.double(), grads[1].double()], [exact, exact_grads[1]], rtol=1e-5, atol=1e-7)


@every_room
def test_nothing_is_read_where_the_mask_is_0(backend):
    case = inputs()
    hole = ~case["mask"]
    dirty = {**case, "ids": torch.where(hole, -7, case["ids"]), "hidden": case["hidden"].clone()}
    dirty["hidden"][hole] = torch.nan
    for name in ("advantages", "old_logprobs", "ref_logprobs", "sampler_logprobs"):
        dirty[name] = torch.where(hole, torch.nan, case[name])
    spec = LossSpec(ratio_level="sequence", kl_coef=0.1, sampler_level="token", entropy_coef=0.1)
    clean, found = run(case, spec=spec), run(dirty, spec=spec)
    assert torch.equal(found[0], clean[0])
    assert all(torch.equal(a, b) for a, b in zip(found[1], clean[1], strict=True))


@native
def test_hostile_memory(backend):
    case = inputs(bias=True)
    expected = run(case, workspace_bytes=4 * 301 * 16)
    for name in ("hidden", "weight", "bias", "advantages", "old_logprobs"):
        case[name] = surrounded_by_nan(case[name])
    with uninitialized_is_nan():
        found = run(case, workspace_bytes=4 * 301 * 16)
    assert torch.equal(found[0], expected[0])
    assert all(torch.equal(a, b) for a, b in zip(found[1], expected[1], strict=True))


# -- metrics ----------------------------------------------------------------------------------------------------------
@every_room_and_triton
def test_metrics(backend):
    case = inputs(density=0.5, vocabulary=31)
    spec = LossSpec(clip_low=0.1, clip_high=0.2, dual_clip=1.3, kl_coef=0.1, sampler_level="token", sampler_high=1.1)
    found = {name: float(value) for name, value in run(case, spec=spec)[2].items()}
    logp = (case["hidden"].double() @ case["weight"].double().T).log_softmax(-1)
    on = case["mask"]
    chosen = logp.gather(1, case["ids"][:, None])[:, 0][on]
    old, ref, sampler, a = (
        case[name][on].double() for name in ("old_logprobs", "ref_logprobs", "sampler_logprobs", "advantages")
    )
    ratio = (chosen - old).exp()
    clipped = ((ratio < 0.9) & (a < 0)) | ((ratio > 1.2) & (a > 0)) | ((ratio > 1.3) & (a < 0))
    expected = {
        "ratio_mean": ratio.mean(),
        "ratio_max": ratio.max(),
        "clip_low": ((ratio < 0.9) & (a < 0)).double().mean(),
        "clip_high": ((ratio > 1.2) & (a > 0)).double().mean(),
        "dual_clip": ((ratio > 1.3) & (a < 0)).double().mean(),
        "approx_kl": (ratio - 1 - ratio.log()).mean(),
        "kl": ((ref - chosen).exp() - (ref - chosen) - 1).mean(),
        "entropy": -(logp.exp() * logp).sum(-1)[on].mean(),
        "sampler_weight": (old - sampler).exp().clamp(max=1.1).mean(),
        "tokens": on.sum(),
        "rows_computed": on.sum(),
        "rows_differentiated": on.sum(),  # the KL term reaches the clipped rows too
        "rows_recomputed": 0.0,
    }
    assert list(found) == list(METRICS) == list(spec.metrics)
    assert clipped.any()
    assert found == pytest.approx({name: float(value) for name, value in expected.items()}, rel=1e-4, abs=1e-6)


@every_room
def test_rows_without_a_coefficient_are_not_differentiated(backend):
    case = {**inputs(density=1.0), "advantages": torch.zeros(53)}
    case["advantages"][[3, 50]] = 1.0
    found = run(case, spec=LossSpec(clip="none"))
    assert found[2]["rows_differentiated"] == 2
    assert found[1][0].any(1).nonzero()[:, 0].tolist() == [3, 50]
    check_run(found, case, LossSpec(clip="none"), torch.float32)


# -- a user's own loss ------------------------------------------------------------------------------------------------
@every_room
@pytest.mark.parametrize("rows_of_logits", (16, 1000))
def test_a_function_as_loss(backend, rows_of_logits):
    def soft_gate(logprobs: Tensor, tokens: Any, entropy: Tensor) -> Tensor:
        ratio = (logprobs - tokens.old_logprobs).exp()
        return -torch.sigmoid(3 * (ratio - 1)) * tokens.advantages - 0.1 * entropy

    case = inputs()
    loss, grads, _ = run(case, spec=soft_gate, workspace_bytes=4 * 301 * rows_of_logits)
    x = leaves(case, torch.float64)
    logp = (x[0] @ x[1].T).log_softmax(-1)
    chosen = logp.gather(1, case["ids"][:, None])[:, 0]
    values = soft_gate(chosen, Streams(case), -(logp.exp() * logp).sum(-1))
    exact = values[case["mask"]].mean()
    exact.backward()
    torch.testing.assert_close(loss.double(), exact.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grads[1].double(), x[1].grad, rtol=1e-4, atol=1e-6)


class Streams:
    """The streams of a case by attribute, in fp64."""

    def __init__(self, case: dict[str, Any]) -> None:
        self.old_logprobs, self.advantages = case["old_logprobs"].double(), case["advantages"].double()


@native
def test_a_function_that_needs_whole_sequences_says_so(backend):
    seen = []

    def whole(logprobs: Tensor, tokens: Any, entropy: Tensor) -> Tensor:
        seen.append(set(tokens.sequence.tolist()))
        return -logprobs * tokens.advantages

    whole.scope = "sequence"  # type: ignore[attr-defined]
    run({**inputs(), "cu_seqlens": torch.tensor([0, 20, 30, 53])}, spec=whole, workspace_bytes=4 * 301 * 20)
    assert seen == [{0}, {1}, {2}] or seen == [{0}, {1, 2}] or seen == [{0, 1}, {2}]


@native
def test_a_function_that_returns_a_scalar_is_refused(backend):
    with pytest.raises(ValueError, match=r"spec: want a function that returns losses \(\d+,\); got \(\) float32"):
        run(inputs(), spec=lambda logprobs, tokens, entropy: logprobs.mean())


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
