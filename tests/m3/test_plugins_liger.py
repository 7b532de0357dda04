"""Our functions with Liger's signatures: what Liger gives, we give; and advantages of tokens besides.

Values, gradients and metrics against the package itself; its compiler is off, which changes none of them.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest
import torch

from m3.plugins.liger import FusedLinearGRPOLoss, fused_linear_scaled_cross_entropy

liger = pytest.importorskip("liger_kernel.chunked_loss.grpo_loss", reason="liger-kernel is not installed")
from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction  # noqa: E402

Liger = liger.LigerFusedLinearGRPOLoss
B, T, D, V = 4, 9, 12, 37


def batch(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """A padded batch whose ratios leave the clip range on both sides; the third sequence has one token."""
    hidden, weight = torch.randn(B, T, D).to(dtype), torch.randn(V, D).to(dtype)
    ids = torch.randint(V, (B, T))
    here = (hidden.float() @ weight.float().T).log_softmax(-1).gather(2, ids[..., None])[..., 0]
    mask = torch.arange(T) < torch.tensor([[9], [5], [1], [7]])
    return dict(
        _input=hidden.requires_grad_(),
        lin_weight=weight.requires_grad_(),
        selected_token_ids=ids,
        attention_mask=mask.long(),
        advantages=torch.tensor([1.0, -0.7, 0.4, -1.3]),
        bias=torch.zeros(V).to(dtype).requires_grad_(),
        ref_per_token_logps=here + 0.5 * torch.randn(B, T),
        old_per_token_logps=here + 0.3 * torch.randn(B, T),
    )


def run(
    loss: torch.nn.Module, call: dict[str, Any]
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...], list[torch.Tensor]]:
    value, metrics = loss(**call)
    return (
        value.detach(),
        metrics,
        list(torch.autograd.grad(value, [call[n] for n in ("_input", "lin_weight", "bias")])),
    )


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Largest error over the largest value."""
    return ((found.double() - wanted.double()).abs().max() / wanted.double().abs().max().clamp(min=1e-30)).item()


def same(ours: torch.nn.Module, theirs: torch.nn.Module, call: dict[str, Any], metrics: int = 2) -> None:
    found, wanted = run(ours, call), run(theirs, call)
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-5, atol=1e-6)
    assert len(found[1]) == len(wanted[1])
    torch.testing.assert_close(found[1][:metrics], wanted[1][:metrics], rtol=1e-5, atol=1e-6)
    assert max(relative(*pair) for pair in zip(found[2], wanted[2], strict=True)) < 1e-5


# -- the contract -----------------------------------------------------------------------------------------------------
def parameters(function: Any) -> list[tuple[str, Any]]:
    return [(name, p.default) for name, p in inspect.signature(function).parameters.items()]


@pytest.mark.parametrize("method", ["__init__", "forward"])
def test_loss_has_the_signature_of_liger(method):
    assert parameters(getattr(FusedLinearGRPOLoss, method)) == parameters(getattr(Liger, method))


def test_cross_entropy_has_the_signature_of_liger():
    wanted = parameters(LigerFusedLinearScaledCrossEntropyFunction.apply)
    assert parameters(fused_linear_scaled_cross_entropy) == wanted


# -- the loss ---------------------------------------------------------------------------------------------------------
SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "grpo": dict(loss_type="grpo"),
    "bnpo": dict(loss_type="bnpo"),
    "dr_grpo": dict(loss_type="dr_grpo", max_completion_length=16),
    "cispo": dict(loss_type="cispo", epsilon_high=1.2),
    "sapo": dict(loss_type="sapo"),
    "sapo_without_kl": dict(loss_type="sapo", beta=0.0, sapo_temperature_pos=2.0),
    "without_kl": dict(beta=0.0),
    "without_reference": dict(use_ref_model=False),
    "clip_higher": dict(epsilon_low=0.1, epsilon_high=0.28),
    "delta": dict(delta=1.5),
    "temperature": dict(temperature=0.7),
    "bias_correction": dict(use_bias_correction_kl=True, loss_type="grpo"),
    "sequence": dict(importance_sampling_level="sequence"),
    "sequence_grpo": dict(importance_sampling_level="sequence", loss_type="grpo", epsilon_low=0.03, epsilon_high=0.04),
    "sequence_dr_grpo": dict(importance_sampling_level="sequence", loss_type="dr_grpo", max_completion_length=16),
    "luspo": dict(importance_sampling_level="sequence", loss_type="luspo", beta=0.0),
}


def metrics_alike(settings: dict[str, Any]) -> int:
    """How many metrics, from the first, mean the same: not the KL under bias correction, not the share of cispo."""
    if settings.get("use_bias_correction_kl"):
        return 0
    return 1 if settings.get("loss_type") == "cispo" else 2


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("old", [True, False], ids=["off_policy", "on_policy"])
def test_loss_is_that_of_liger(settings, old):
    call = batch() if old else {**batch(), "old_per_token_logps": None}
    same(FusedLinearGRPOLoss(**settings), Liger(compiled=False, **settings), call, metrics_alike(settings))


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "cispo", "sapo"])
@pytest.mark.parametrize("shape", [(B, T), (B, 1), (B,)], ids=str)
def test_sampler_ratio(loss_type, shape):
    settings = dict(loss_type=loss_type, epsilon_high=1.2 if loss_type == "cispo" else 0.2)
    call = {**batch(), "vllm_is_ratio": torch.rand(shape) + 0.5}
    same(FusedLinearGRPOLoss(**settings), Liger(compiled=False, **settings), call, metrics_alike(settings))


@pytest.mark.parametrize("items", [50, torch.tensor(50), 0.5], ids=["int", "tensor", "less_than_one"])
def test_tokens_of_the_whole_batch(items):
    same(FusedLinearGRPOLoss(), Liger(compiled=False), {**batch(), "num_items_in_batch": items})


def test_reference_from_its_hidden_states():
    call = {**batch(), "ref_per_token_logps": None, "ref_input": torch.randn(B, T, D), "ref_weight": torch.randn(V, D)}
    call["ref_bias"] = torch.randn(V)
    same(FusedLinearGRPOLoss(temperature=1.3), Liger(compiled=False, temperature=1.3), call)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "bnpo"])
def test_empty_sequence_counts_as_it_does_in_liger(loss_type):
    call = batch()
    call["attention_mask"] = call["attention_mask"] * torch.tensor([[1], [0], [1], [1]])
    same(FusedLinearGRPOLoss(loss_type=loss_type), Liger(compiled=False, loss_type=loss_type), call)


def test_bf16():
    """Both accumulate the gradients in fp32 and round once a sequence or once; each is near the fp32 gradient."""
    call = batch(torch.bfloat16)
    wide = {
        name: value.detach().float().requires_grad_() if name in ("_input", "lin_weight", "bias") else value
        for name, value in call.items()
    }
    exact = run(FusedLinearGRPOLoss(), wide)[2]
    ours, theirs = (run(loss, call)[2] for loss in (FusedLinearGRPOLoss(), Liger(compiled=False)))
    for found, other, wanted in zip(ours, theirs, exact, strict=True):
        assert relative(found, wanted) <= max(1.5 * relative(other, wanted), 2**-8)


def test_hidden_states_in_bf16_over_weights_in_fp32():
    """As under autocast: the head is rounded to bf16 as Liger rounds it, and its gradient comes in fp32."""
    call = {**batch(), "_input": batch()["_input"].detach().bfloat16().requires_grad_()}
    found, wanted = run(FusedLinearGRPOLoss(), call), run(Liger(compiled=False), call)
    torch.testing.assert_close(found[0], wanted[0], rtol=2e-2, atol=2e-3)
    assert [grad.dtype for grad in found[2]] == [torch.bfloat16, torch.float32, torch.float32]
    assert max(relative(*pair) for pair in zip(found[2], wanted[2], strict=True)) < 2e-2


def test_upstream_gradient_is_honoured():
    call = batch()
    value, _ = FusedLinearGRPOLoss()(**call)
    (once,) = torch.autograd.grad(value, call["_input"])
    value, _ = FusedLinearGRPOLoss()(**call)
    (thrice,) = torch.autograd.grad(3 * value, call["_input"])
    torch.testing.assert_close(thrice, 3 * once)


# -- what Liger does not take -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_advantages_of_tokens(level):
    """Each token is moved by its own advantage, under a sequence ratio too."""
    call = {**batch(), "advantages": torch.randn(B, T), "old_per_token_logps": None, "ref_per_token_logps": None}
    loss = FusedLinearGRPOLoss(beta=0.0, use_ref_model=False, loss_type="bnpo", importance_sampling_level=level)
    value, _, grads = run(loss, call)
    logits = call["_input"] @ call["lin_weight"].T
    logps = logits.log_softmax(-1).gather(2, call["selected_token_ids"][..., None])[..., 0]
    mask = call["attention_mask"]
    wanted = -(call["advantages"] * logps * mask).sum() / mask.sum()
    torch.testing.assert_close(value, -(call["advantages"] * mask).sum() / mask.sum())
    torch.testing.assert_close(grads[:2], list(torch.autograd.grad(wanted, [call["_input"], call["lin_weight"]])))


# -- errors -----------------------------------------------------------------------------------------------------------
ERRORS = {
    "vespo": (
        dict(loss_type="vespo"),
        "loss_type: want 'grpo' or 'bnpo' or 'dr_grpo' or 'dapo' or 'cispo' or 'sapo' or",
    ),
    "luspo_of_tokens": (dict(loss_type="luspo"), "importance_sampling_level: want 'sequence' for loss_type='luspo'"),
    "level": (
        dict(importance_sampling_level="step"),
        "importance_sampling_level: want 'token' or 'sequence'; got ",
    ),
    "cispo_of_sequences": (
        dict(loss_type="cispo", importance_sampling_level="sequence"),
        "importance_sampling_level: want 'token' for loss_type='cispo'; got 'sequence'",
    ),
    "cispo_bound": (dict(loss_type="cispo"), "epsilon_high: want the bound of the ratio, >= 1, for loss_type='cispo'"),
    "dr_grpo_length": (
        dict(loss_type="dr_grpo"),
        "max_completion_length: want tokens, for loss_type='dr_grpo'; got None",
    ),
    "sapo_temperature": (
        dict(sapo_temperature_neg=0.0),
        "sapo_temperature_neg: want a finite number >= 1e-06; got 0.0",
    ),
}


@pytest.mark.parametrize(("settings", "message"), ERRORS.values(), ids=ERRORS)
def test_settings_that_are_refused(settings, message):
    with pytest.raises(ValueError, match=re.escape(f"FusedLinearGRPOLoss: {message}")):
        FusedLinearGRPOLoss(**settings)


def test_reference_is_wanted():
    message = "FusedLinearGRPOLoss: ref_per_token_logps: want a tensor, or ref_input and ref_weight, with use_ref_model"
    with pytest.raises(ValueError, match=re.escape(message)):
        FusedLinearGRPOLoss()(**{**batch(), "ref_per_token_logps": None})


def test_mask_is_wanted():
    with pytest.raises(ValueError, match=re.escape("FusedLinearGRPOLoss: attention_mask: want (B, T); got None")):
        FusedLinearGRPOLoss()(**{**batch(), "attention_mask": None})


# -- scaled cross-entropy ---------------------------------------------------------------------------------------------
def tokens(count: int = 13) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    target = torch.randint(V, (count,))
    target[::5] = -100
    return torch.randn(count, D, requires_grad=True), torch.randn(V, D, requires_grad=True), target


CALLS: dict[str, dict[str, Any]] = {
    "nll": {},
    "temperature": dict(temperature=0.6),
    "entropy": dict(return_entropy=True),
    "selected": dict(selected_token_ids=torch.tensor([5, 0, 5, V - 1])),
    "everything": dict(return_entropy=True, selected_token_ids=torch.tensor([1]), temperature=1.7),
    "other_ignore_index": dict(ignore_index=3),
    "tiles": dict(m_tiles_per_cluster=2),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_cross_entropy_is_that_of_liger(call):
    x, weight, target = tokens()
    target = target.where(target != -100, call.get("ignore_index", -100))
    found, wanted = (
        function(x, weight, target, **call)
        for function in (fused_linear_scaled_cross_entropy, LigerFusedLinearScaledCrossEntropyFunction.apply)
    )
    found, wanted = ([each] if torch.is_tensor(each) else list(each) for each in (found, wanted))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    upstream = [torch.randn_like(each) for each in wanted]
    grads = [torch.autograd.grad(each, [x, weight], upstream) for each in (found, wanted)]
    assert [relative(*pair) < 1e-5 for pair in zip(*grads, strict=True)] == [True, True]


@pytest.mark.parametrize("count", [0, 1])
def test_cross_entropy_of_no_valid_token_is_zero(count):
    x, weight = torch.randn(count, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
    nll, entropy = fused_linear_scaled_cross_entropy(x, weight, torch.full((count,), -100), return_entropy=True)
    (nll + entropy).sum().backward()
    assert nll.tolist() == entropy.tolist() == [0.0] * count
    assert not x.grad.any()
    assert not weight.grad.any()


CROSS_ENTROPY_ERRORS = {
    "target": (dict(target=torch.zeros(13)), "target: want (M,) int64; got (13,) float32"),
    "selected": (
        dict(selected_token_ids=torch.zeros(1, 1, dtype=torch.int64)),
        "selected_token_ids: want (K,) int64, or None; got (1, 1) int64",
    ),
}


@pytest.mark.parametrize(("change", "message"), CROSS_ENTROPY_ERRORS.values(), ids=CROSS_ENTROPY_ERRORS)
def test_cross_entropy_errors(change, message):
    x, weight, target = tokens()
    call = {**dict(_input=x, weight=weight, target=target), **change}
    with pytest.raises(ValueError, match=re.escape(f"fused_linear_scaled_cross_entropy: {message}")):
        fused_linear_scaled_cross_entropy(**call)
