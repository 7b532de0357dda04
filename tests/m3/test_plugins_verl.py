"""verl's fused head over linear_logprobs: its own module calls ours once installed, and gets what its torch path gives.

And the advantages of m3.algorithms against verl's estimators, which share their conventions.
"""

from __future__ import annotations

import importlib
import inspect
import re
from typing import Any

import pytest
import torch

from m3.algorithms import dr_grpo, grpo
from m3.plugins import liger
from m3.plugins import verl as plugin

seam = pytest.importorskip(plugin.SEAM, reason="verl is not installed, or not wholly")

D, V = 12, 37


def parameters(function: Any) -> list[tuple[str, Any]]:
    return [(name, p.default) for name, p in inspect.signature(function).parameters.items()]


def head(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    hidden, weight = (torch.randn(*rows, D).to(dtype).requires_grad_() for rows in (shape, (V,)))
    return hidden, weight, torch.randint(V, shape)


@pytest.fixture
def installed(monkeypatch):
    monkeypatch.setattr(seam, plugin.VARIABLE, getattr(seam, plugin.VARIABLE))  # put back after the test
    plugin.install()


# -- the contract -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", ["__init__", "forward"])
def test_head_has_the_signature_of_verl(method):
    assert parameters(getattr(plugin.FusedLinearForPPO, method)) == parameters(getattr(seam.FusedLinearForPPO, method))


def test_install_puts_our_function_where_verl_looks(installed):
    assert getattr(seam, plugin.VARIABLE).apply is liger.fused_linear_scaled_cross_entropy


def test_install_says_so_where_there_is_no_seam(monkeypatch):
    monkeypatch.delattr(seam, plugin.VARIABLE)
    message = f"install: {plugin.SEAM}: want a variable {plugin.VARIABLE} (verl 0.9); got none"
    with pytest.raises(ImportError, match=re.escape(message)):
        plugin.install()


# -- values and gradients ---------------------------------------------------------------------------------------------
def outcome(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], temperature: float) -> tuple[Any, Any]:
    """Log-probabilities and entropies, and the gradient of a mixture of both."""
    hidden, weight, ids = inputs
    logprobs, entropy = module(hidden, weight, ids, temperature)
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(ids.shape, generator=generator).to(each.dtype) for each in (logprobs, entropy)]
    return (logprobs, entropy), torch.autograd.grad((logprobs, entropy), (hidden, weight), upstream)


SHAPES = {"packed": (13,), "padded": (3, 7), "one": (1,)}
HEADS = {"ours": plugin.FusedLinearForPPO, "theirs_installed": lambda: seam.FusedLinearForPPO(impl_backend="liger")}


@pytest.mark.parametrize("make", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_head_gives_what_verl_computes(installed, monkeypatch, make, shape, temperature):
    calls, ours = [], liger.linear_logprobs

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return ours(*args, **kwargs)

    monkeypatch.setattr(liger, "linear_logprobs", counted)
    monkeypatch.setattr(plugin, "linear_logprobs", counted)
    inputs = head(*shape)
    found = outcome(make(), inputs, temperature)
    assert len(calls) == 1
    torch.testing.assert_close(found, outcome(seam.FusedLinearForPPO(), inputs, temperature), rtol=1e-4, atol=1e-5)
    assert len(calls) == 1, "verl's torch path is its own"


def test_entropy_is_fp32_where_verl_rounds_it():
    inputs = head(64, dtype=torch.bfloat16)
    _, ours = plugin.FusedLinearForPPO()(*inputs)
    _, theirs = seam.FusedLinearForPPO()(*inputs)
    exact = torch.distributions.Categorical(logits=inputs[0].double() @ inputs[1].double().T).entropy()
    assert (ours.dtype, theirs.dtype) == (torch.float32, torch.bfloat16)
    assert (ours - exact).abs().max() < 1e-4 < (theirs - exact).abs().max()


ERRORS = {
    "hidden_states": (
        (torch.zeros(4), torch.zeros(V, D), torch.zeros(4)),
        "want (B, L, D) or (T, D); got (4,) float32",
    ),
    "input_ids": ((torch.zeros(4, D), torch.zeros(V, D), torch.zeros(2, 2)), "want (4,); got (2, 2) float32"),
}


@pytest.mark.parametrize(("name", "call", "message"), [(name, *each) for name, each in ERRORS.items()], ids=ERRORS)
def test_errors(name, call, message):
    with pytest.raises(ValueError, match=re.escape(f"FusedLinearForPPO: {name}: {message}")):
        plugin.FusedLinearForPPO()(*call)


# -- advantages -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("function", "divide"), [(grpo.advantages, True), (dr_grpo.advantages, False)])
def test_advantages_are_those_of_verl(function, divide):
    """Unbiased deviation, eps = 1e-6; of a group of equal rewards ours are exactly 0."""
    algorithms = pytest.importorskip("verl.trainer.ppo.core_algos", reason="verl is not installed wholly")
    rewards = torch.rand(5, 4, dtype=torch.float64)
    groups = importlib.import_module("numpy").arange(5).repeat(4)
    theirs, _ = algorithms.compute_grpo_outcome_advantage(
        rewards.reshape(20, 1).clone(), torch.ones(20, 1), groups, norm_adv_by_std_in_grpo=divide
    )
    torch.testing.assert_close(function(rewards).reshape(20, 1), theirs)


def test_group_of_one_is_judged_by_verl_and_refused_by_us():
    """Against a mean of 0 and a deviation of 1 its advantage is its reward: a baseline of nothing."""
    algorithms = pytest.importorskip("verl.trainer.ppo.core_algos", reason="verl is not installed wholly")
    rewards = torch.tensor([[0.75]])
    theirs, _ = algorithms.compute_grpo_outcome_advantage(rewards.clone(), torch.ones(1, 1), [0])
    assert theirs.item() == pytest.approx(0.75, abs=1e-5)
    with pytest.raises(ValueError, match=re.escape("grpo.advantages: rewards: want (P, R >= 2) floating; got (1, 1)")):
        grpo.advantages(rewards)
