"""TRL's trainer over linear_logprobs: the seam is where the plug-in takes it to be, and training is what it was.

Two steps of the stock trainer and of ours from one tiny random model, on the CPU: same generations, losses, weights.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("trl", reason="trl is not installed")
import trl
import trl.trainer.utils as seam
from datasets import Dataset
from trl.kernels import ChunkedLogProbFunction
from trl_cases import tiny_model, tokenizer

from m3.plugins import trl as plugin


def parameters(function: Any) -> list[tuple[str, Any]]:
    return [(name, p.default) for name, p in inspect.signature(function).parameters.items()]


# -- the contract -----------------------------------------------------------------------------------------------------
def test_projection_is_called_as_ours_is_written():
    """The names and order of TRL's function, and where it is looked up; our default outputs are those we can serve."""
    wanted = parameters(ChunkedLogProbFunction.forward)[1:]
    assert [name for name, _ in parameters(plugin.Projection.apply)] == [name for name, _ in wanted]
    assert parameters(plugin.Projection.apply)[:-1] == wanted[:-1]
    assert seam._ChunkedLogProbFunction is ChunkedLogProbFunction
    body = inspect.getsource(seam.add_fused_lm_head)
    assert "_ChunkedLogProbFunction.apply(" in body
    assert "compact = _use_triton(hidden_states.device)" in body


def test_trainer_has_the_method_that_ours_wraps():
    names = [name for name, _ in parameters(trl.GRPOTrainer._get_per_token_logps_and_entropies)]
    assert names[:7] == [
        "self",
        "model",
        "input_ids",
        "attention_mask",
        "logits_to_keep",
        "batch_size",
        "compute_entropy",
    ]
    assert plugin.GRPOTrainer.__mro__[1:3] == (plugin.LinearLogprobs, trl.GRPOTrainer)


def test_seam_is_closed_after_use_and_after_an_error():
    before = seam._ChunkedLogProbFunction, seam._use_triton
    with pytest.raises(KeyError), plugin.projection():
        assert seam._ChunkedLogProbFunction is plugin.Projection
        raise KeyError
    assert (seam._ChunkedLogProbFunction, seam._use_triton) == before


# -- the projection ---------------------------------------------------------------------------------------------------
HEADS = {
    "plain": {},
    "temperature": dict(temperature=0.7),
    "softcap_and_scale": dict(final_logit_softcapping=2.0, logit_scale=1.5),
    "bias": dict(bias=True),
}


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_projection_is_that_of_trl(head):
    settings = dict(bias=None, temperature=1.0, chunk_size=16) | head
    hidden, weight = torch.randn(13, 12, requires_grad=True), torch.randn(37, 12, requires_grad=True)
    bias = torch.randn(37, requires_grad=True) if settings.pop("bias") else None
    targets = torch.randint(37, (13,))
    leaves = [hidden, weight, *([bias] if bias is not None else [])]
    upstream, grads = (torch.randn(13), torch.randn(13)), []
    found = []
    for function in (plugin.Projection, ChunkedLogProbFunction):
        outputs = function.apply(
            hidden, weight, bias, targets, settings["temperature"], settings["chunk_size"],
            settings.get("final_logit_softcapping"), settings.get("logit_scale", 1.0), ("entropy", "log_sum_sq_probs"),
        )  # fmt: skip
        found.append(outputs[:3])
        grads.append(torch.autograd.grad(outputs[:2], leaves, upstream))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


def test_projection_follows_autocast():
    hidden, weight, targets = torch.randn(5, 8), torch.randn(11, 8), torch.randint(11, (5,))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = plugin.Projection.apply(hidden, weight, None, targets, 1.0, 16)[0]
    rounded = plugin.Projection.apply(hidden.bfloat16(), weight.bfloat16(), None, targets, 1.0, 16)[0]
    assert found.dtype == torch.float32
    assert found.equal(rounded)


def test_projection_of_no_rows_stays_joined_to_the_model():
    """A micro-batch without a label contributes a gradient of 0 instead of failing."""
    hidden, weight = torch.randn(5, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
    logprobs, entropy, *_ = plugin.Projection.apply(
        hidden[:0], weight, None, torch.zeros(0, dtype=torch.int64), 1.0, 16
    )
    (logprobs.sum() + entropy.sum()).backward()
    assert logprobs.shape == entropy.shape == (0,)
    assert not hidden.grad.any()
    assert not weight.grad.any()


def test_projection_refuses_a_head_that_does_not_outlive_the_forward_pass(monkeypatch):
    monkeypatch.setattr(plugin, "is_deepspeed_zero3_enabled", lambda: True)
    message = "Projection: weight: want a head that outlives the forward pass; got one under DeepSpeed ZeRO-3"
    with pytest.raises(ValueError, match=re.escape(message)):
        plugin.Projection.apply(torch.zeros(1, 2), torch.zeros(3, 2), None, torch.zeros(1), 1.0, 16)


def test_projection_refuses_what_it_cannot_give():
    message = "Projection: outputs: want of ['entropy', 'log_probs', 'log_sum_sq_probs']; got ['mean_logits']"
    with pytest.raises(ValueError, match=re.escape(message)):
        plugin.Projection.apply(
            torch.zeros(1, 2), torch.zeros(3, 2), None, torch.zeros(1), 1.0, 16, None, 1.0, ("mean_logits",)
        )


# -- training ---------------------------------------------------------------------------------------------------------
def vowels(completions: list[str], **_: Any) -> list[float]:
    return [sum(letter in "aeiou" for letter in text) / 6 for text in completions]


def train(kind: type, folder: Path, **settings: Any) -> tuple[list[dict[str, Any]], list[Tensor]]:
    """(log of each step, weights after) of two steps of a trainer."""
    stated: dict[str, Any] = dict(
        max_steps=2,
        logging_steps=1,
        per_device_train_batch_size=8,
        num_generations=4,
        max_completion_length=6,
        learning_rate=1e-2,
        seed=5,
    )
    quiet: dict[str, Any] = dict(report_to="none", use_cpu=True, save_strategy="no", disable_tqdm=True, bf16=False)
    arguments = trl.GRPOConfig(output_dir=str(folder), **quiet | stated | settings)
    tiny_model().save_pretrained(folder / "model")
    prompts = Dataset.from_dict({"prompt": ["abcd", "xy", "KJIHG", "q"]})
    trainer = kind(str(folder / "model"), vowels, arguments, prompts, processing_class=tokenizer())
    trainer.train()
    return trainer.state.log_history[:-1], [weight.detach() for weight in trainer.model.parameters()]


SETTINGS = {
    "default": ({}, []),
    "kl": (dict(beta=0.1), ["kl"]),
    "old_policy": (dict(num_iterations=2, epsilon=0.02), ["clip_ratio/low_mean", "clip_ratio/high_mean"]),
    "entropy_bonus": (dict(entropy_coef=0.05, loss_type="grpo"), ["policy_loss"]),
    "entropy_mask_and_temperature": (dict(top_entropy_quantile=0.5, temperature=0.8), []),
    "accumulation": (dict(per_device_train_batch_size=4, gradient_accumulation_steps=2), []),
}


def logged(log: list[dict[str, Any]], names: list[str]) -> Tensor:
    return torch.tensor([[step[name] for name in names] for step in log])


@pytest.mark.parametrize(("settings", "names"), SETTINGS.values(), ids=SETTINGS)
def test_two_steps_are_those_of_the_stock_trainer(tmp_path, settings, names):
    (ours, weights), (stock, wanted) = (
        train(kind, tmp_path, **settings) for kind in (plugin.GRPOTrainer, trl.GRPOTrainer)
    )
    names = ["loss", "grad_norm", "entropy", *names]
    assert len(ours) == 2
    torch.testing.assert_close(logged(ours, names), logged(stock, names), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weights, wanted, rtol=1e-4, atol=1e-5)
    moved = zip(weights, tiny_model().parameters(), strict=True)
    assert max((after - before).abs().max().item() for after, before in moved) > 1e-2, "the steps changed the model"


def test_step_under_bf16_autocast(tmp_path):
    """One step only: the generations of the next part as soon as weights differ by a rounding."""
    (ours, _), (stock, _) = (
        train(kind, tmp_path, bf16=True, max_steps=1) for kind in (plugin.GRPOTrainer, trl.GRPOTrainer)
    )
    names = ["entropy", "grad_norm"]
    torch.testing.assert_close(logged(ours, names), logged(stock, names), rtol=1e-2, atol=0.0)


def test_trainer_projects_tokens_of_completions_alone(tmp_path, monkeypatch):
    """Every projection of a step goes through ours; prompts, and what follows the end of a completion, do not."""
    rows, apply = [], plugin.Projection.apply

    def counted(hidden: Tensor, *args: Any) -> Any:
        rows.append(len(hidden))
        return apply(hidden, *args)

    monkeypatch.setattr(plugin.Projection, "apply", staticmethod(counted))
    log, _ = train(plugin.GRPOTrainer, tmp_path, max_completion_length=16)
    lengths = [round(8 * step["completions/mean_length"]) for step in log]
    assert rows == lengths
    assert min(lengths) < 8 * 16, "some completion ended"


def test_mixin_serves_a_trainer_of_ones_own(tmp_path):
    class Trainer(plugin.LinearLogprobs, trl.GRPOTrainer):
        pass

    (mine, _), (ours, _) = (train(kind, tmp_path) for kind in (Trainer, plugin.GRPOTrainer))
    assert logged(mine, ["loss", "grad_norm", "entropy"]).equal(logged(ours, ["loss", "grad_norm", "entropy"]))
