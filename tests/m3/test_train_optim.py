"""The optimiser: rates by hand, AdamW against its formula, the clip, and gradients that are not finite."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from train_cases import with_one_thread

from m3.train.optim import OptimConfig, Optimizer
from m3.train.policy_model import PolicyModel
from m3.train.stage import NonFiniteError

one_thread = pytest.fixture(autouse=True, scope="module")(with_one_thread)


@pytest.fixture
def model(llama) -> PolicyModel:
    return PolicyModel.load(llama[0])


def give_gradients(model: PolicyModel, seed: int, scale: float = 1.0) -> dict[str, Tensor]:
    """Random ones, put into the parameters; copies."""
    chance = torch.Generator().manual_seed(seed)
    for _, one in model.trained():
        one.grad = torch.randn(one.shape, generator=chance) * scale
    return {name: one.grad.clone() for name, one in model.trained()}


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ("constant", [1.0, 2.0, 3.0, 3.0, 3.0, 3.0, 3.0]),
        ("linear", [1.0, 2.0, 3.0, 2.5, 2.0, 1.5, 1.0]),
        ("cosine", [1.0, 2.0, 3.0, 2 + math.cos(math.pi / 4), 2.0, 2 - math.cos(math.pi / 4), 1.0]),
    ],
)
def test_rates_by_hand(schedule, rates):
    config = OptimConfig(lr=3.0, lr_end=1.0, warmup=2, schedule=schedule)
    assert [config.rate(update, 7) for update in range(7)] == pytest.approx(rates)
    assert config.rate(20, 7) == pytest.approx(rates[-1])


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"lr": 0.0}, "lr"),
        ({"lr_end": 1.0}, "lr_end"),
        ({"schedule": "step"}, "schedule"),
        ({"clip": -1.0}, "clip"),
        ({"warmup": -1}, "warmup"),
        ({"betas": (0.9, 1.0)}, "betas"),
    ],
)
def test_numbers_are_checked(wrong, named):
    with pytest.raises(ValueError, match=f"OptimConfig: .*{named}"):
        OptimConfig(**wrong)


def test_two_updates_are_those_of_the_formula(model):
    """AdamW in fp64; decay on matrices alone, no clip."""
    config = OptimConfig(lr=1e-2, betas=(0.8, 0.9), eps=1e-3, weight_decay=0.5, clip=0.0)
    optimizer = Optimizer(model, config)
    wanted = {name: one.detach().double() for name, one in model.trained()}
    first = {name: torch.zeros_like(one) for name, one in wanted.items()}
    second = {name: torch.zeros_like(one) for name, one in wanted.items()}
    for update, rate in ((1, 1e-2), (2, 5e-3)):
        gradients = give_gradients(model, update)
        norm = optimizer.step(rate)
        assert norm == pytest.approx(math.sqrt(sum(float(one.double().square().sum()) for one in gradients.values())))
        for name, gradient in gradients.items():
            g = gradient.double()
            first[name] = 0.8 * first[name] + 0.2 * g
            second[name] = 0.9 * second[name] + 0.1 * g * g
            moved = (first[name] / (1 - 0.8**update)) / ((second[name] / (1 - 0.9**update)).sqrt() + 1e-3)
            decay = 0.5 if g.ndim >= 2 else 0.0
            wanted[name] = wanted[name] * (1 - rate * decay) - rate * moved
    for name, one in model.trained():
        torch.testing.assert_close(one.detach().double(), wanted[name], rtol=0, atol=2e-6, msg=name)
    assert optimizer.updates == 2


def test_the_norm_is_clipped_and_told_as_it_was(model):
    plain = Optimizer(model, OptimConfig(clip=2.0))
    gradients = give_gradients(model, 0, scale=10.0)
    norm = plain.step(1e-9)
    for name, one in model.trained():
        torch.testing.assert_close(one.grad, gradients[name] * (2.0 / norm), rtol=1e-4, atol=1e-8, msg=name)


def test_a_norm_below_the_clip_is_left_bitwise(model):
    gradients = give_gradients(model, 0, scale=1e-5)
    Optimizer(model, OptimConfig(clip=2.0)).step(1e-9)
    assert all(torch.equal(one.grad, gradients[name]) for name, one in model.trained())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_gradient_that_is_not_finite_changes_nothing(model, bad):
    optimizer = Optimizer(model, OptimConfig())
    give_gradients(model, 0)
    optimizer.step(1e-3)
    before = {name: one.detach().clone() for name, one in model.trained()}
    moments = {name: one.clone() for name, one in optimizer.tensors().items()}
    give_gradients(model, 1)
    dict(model.trained())["model.layers.1.mlp.up_proj.weight"].grad[3, 5] = bad
    with pytest.raises(NonFiniteError, match=r"1 of 30 parameters, first 'model\.layers\.1\.mlp\.up_proj\.weight'"):
        optimizer.step(1e-3)
    assert all(torch.equal(before[name], one) for name, one in model.trained())
    assert all(torch.equal(moments[name], one) for name, one in optimizer.tensors().items())
    assert optimizer.updates == 1


def test_parameters_without_a_gradient_stay(model):
    optimizer = Optimizer(model, OptimConfig(weight_decay=0.5))
    give_gradients(model, 0)
    still = dict(model.trained())["model.embed_tokens.weight"]
    still.grad = None
    before = still.detach().clone()
    optimizer.step(1e-2)
    assert torch.equal(still, before) and "model.embed_tokens.weight|step" not in optimizer.tensors()


def test_a_resumed_optimiser_goes_on_bitwise(llama, model):
    other = PolicyModel.load(llama[0])
    one, two = Optimizer(model, OptimConfig(weight_decay=0.1)), Optimizer(other, OptimConfig(weight_decay=0.1))
    give_gradients(model, 0)
    one.step(1e-2)
    two.load({name: value.clone() for name, value in one.tensors().items()}, one.updates)
    other.load_state_dict(model.state_dict())
    for which, optimizer in ((model, one), (other, two)):
        give_gradients(which, 1)
        optimizer.step(1e-2)
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(model.trained(), other.trained(), strict=True))
    assert two.updates == 2


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("model.nothing|exp_avg", torch.zeros(3), "'model.nothing'"),
        ("model.norm.weight|exp_avg", torch.zeros(3), r"want \(64,\); got \(3,\)"),
    ],
)
def test_moments_of_another_model_are_refused(model, name, value, error):
    with pytest.raises(ValueError, match=error):
        Optimizer(model, OptimConfig()).load({name: value}, 1)


def test_a_model_that_does_not_learn_is_refused(model):
    with pytest.raises(ValueError, match="a parameter that learns; got none"):
        Optimizer(model.requires_grad_(False), OptimConfig())
