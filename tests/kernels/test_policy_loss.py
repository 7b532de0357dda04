"""linear_policy_loss in every room: values, gradients, metrics, invariances, edge sizes, hostile memory."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from policy_loss_cases import (
    HEADS,
    SPECS,
    STREAMS,
    check_run,
    every_dtype,
    every_room,
    every_room_and_triton,
    every_spec,
    head_of,
    in_rooms,
    inputs,
    leaves,
    native,
    run,
    run_in_torch,
    streams,
)
from torch import Tensor

from m3kernels.policy_loss import METRICS, LossSpec, linear_policy_loss
from m3kernels.policy_loss.reference import TOLERANCE
from m3kernels.testing import check_error, surrounded_by_nan, uninitialized_is_nan


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
    """Eight cases of a size together: one number of fp32 torch may be exact by luck."""
    found, exact, same = [], [], []
    for seed in range(8):
        case = inputs(rows, 5, vocabulary, sequences=1, density=1.0, seed=seed)
        found.append(run(case)[1])
        exact.append(run_in_torch(case, torch.float64, LossSpec())[1])
        same.append(run_in_torch(case, torch.float32, LossSpec())[1])
    for ours, best, theirs in zip(*(map(torch.stack, zip(*x, strict=True)) for x in (found, exact, same)), strict=True):
        check_error(ours, best, theirs, TOLERANCE)


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
    with pytest.raises(
        ValueError, match=r"spec: want a function that returns losses \(\d+,\) floating point on cpu; got \(\) float32"
    ):
        run(inputs(), spec=lambda logprobs, tokens, entropy: logprobs.mean())
