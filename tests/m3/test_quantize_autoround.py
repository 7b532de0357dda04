"""AutoRound: its gradients by autograd, its start, what it keeps, and that what it optimises is what is packed."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from quantize_layers import layer_of, tokens_of

from m3.quantize.autoround import AutoRoundConfig, LearntRounding, WholeLayer, quantise_block
from m3.quantize.block import Block
from m3.quantize.scheme import Scheme, nearest
from m3kernels.int4 import int4_dequantize, quantize_weight

WEIGHTS = {
    "plain": lambda: torch.randn(6, 80),
    "tiny": lambda: torch.randn(6, 80) * 1e-7,  # scales are subnormal numbers of fp16
    "zero-group": lambda: torch.randn(6, 80).index_fill_(1, torch.arange(32), 0.0),
    "outlier-row": lambda: torch.randn(6, 80) * torch.tensor([1.0, 1e4, 1, 1, 1, 1])[:, None],
}


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return layer_of(tmp_path_factory.mktemp("dense"), "llama")


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    return layer_of(tmp_path_factory.mktemp("experts"), "qwen3_moe")


def loss_of(block, found, inputs, targets):
    other = block.replaced({name: one.dequantized() for name, one in found.items()})
    return float((other.forward(inputs) - targets).square().sum())


class RintThrough(torch.autograd.Function):
    """rint whose derivative is 1."""

    @staticmethod
    def forward(_, x):
        return x.round()

    @staticmethod
    def backward(_, grad):
        return grad


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("group_size", [32, -1])
def test_gradients_are_those_of_the_formula(group_size, symmetric):
    weight, wanted = torch.randn(4, 80), torch.randn(4, 80)
    start = nearest(weight, Scheme(group_size=group_size, symmetric=symmetric, scale_dtype=torch.float32), "mse")
    one = LearntRounding(weight, start)
    one.offsets.uniform_(-0.5, 0.5)
    one.ratios.uniform_(0.6, 1.2)  # many weights are clamped
    one.render()
    (one.weight - wanted).square().sum().backward()
    at_offset, at_ratio = one.gradients(slice(None))

    offsets, ratios = one.offsets.clone().requires_grad_(), one.ratios.clone().requires_grad_()
    scales = ratios * one.first_scales
    points = torch.clamp(RintThrough.apply(one.dense / scales + offsets), one.low, one.low + 15)
    dense = (points * scales).flatten(1)[:, :80]
    (dense - wanted).square().sum().backward()
    torch.testing.assert_close(dense, one.weight)
    torch.testing.assert_close(at_offset * scales.abs(), offsets.grad)
    torch.testing.assert_close(at_ratio, ratios.grad, rtol=1e-4, atol=1e-4)
    assert int((offsets.grad == 0).sum()) > 5


def test_a_step_goes_against_the_signs_and_stays_in_bounds():
    weight = torch.randn(3, 32)
    one = LearntRounding(weight, nearest(weight, Scheme(group_size=16)))
    one.weight.grad = torch.randn(3, 32)
    at_offset, at_ratio = one.gradients(slice(None))
    one.step(0.25, 0.125)
    assert torch.equal(one.offsets, -0.25 * at_offset.sign())
    assert torch.equal(one.ratios, 1 - 0.125 * at_ratio.sign())
    assert one.weight.grad is None
    for _ in range(20):
        one.weight.grad = torch.full((3, 32), 1.0)
        one.step(0.25, 0.125)
    assert float(one.offsets.abs().max()) == 0.5
    assert 0.5 <= float(one.ratios.min()) <= float(one.ratios.max()) <= 1.5


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("group_size", [16, 64, -1])
@pytest.mark.parametrize("make", WEIGHTS.values(), ids=WEIGHTS)
def test_what_is_optimised_is_what_is_packed(make, group_size, symmetric):
    weight = make()
    one = LearntRounding(weight, nearest(weight, Scheme(group_size=group_size, symmetric=symmetric), "weighted"))
    one.weight.grad = torch.randn(6, 80)
    one.step(0.3, 0.3)
    rounded = one.rounded()
    assert torch.equal(rounded.dequantized(), one.weight.detach())
    assert torch.equal(int4_dequantize(rounded.to_int4(), torch.float32), one.weight.detach())
    assert rounded.scales.dtype == torch.float16
    assert bool((rounded.scales != 0).all())


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("group_size", [32, 64, -1])
def test_nothing_learnt_is_rounding_to_nearest(dense, group_size, symmetric):
    scheme = Scheme(group_size=group_size, symmetric=symmetric)
    hidden = tokens_of(2, 6)
    found = quantise_block(dense, hidden, hidden, scheme, AutoRoundConfig(iterations=0, start="minmax"))
    for name, rounded in found.items():
        packed = quantize_weight(dense.weights[name], group_size=group_size, symmetric=symmetric)
        assert torch.equal(rounded.dequantized(), int4_dequantize(packed, torch.float32))


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
def test_a_layer_is_much_closer_than_rounded_to_nearest(dense, symmetric):
    inputs, scheme = tokens_of(8, 16), Scheme(group_size=32, symmetric=symmetric)
    targets, told = dense.forward(inputs), []
    config = AutoRoundConfig(iterations=40, batch=4)
    found = quantise_block(dense, inputs, targets, scheme, config, lambda *call: told.append(call))
    assert tuple(found) == dense.linears
    assert told == [(done, 40) for done in range(1, 41)]
    rtn = {name: nearest(weight, scheme) for name, weight in dense.weights.items()}
    assert loss_of(dense, found, inputs, targets) < 0.5 * loss_of(dense, rtn, inputs, targets)
    fresh = tokens_of(8, 16)
    assert loss_of(dense, found, fresh, dense.forward(fresh)) < loss_of(dense, rtn, fresh, dense.forward(fresh))


def test_the_same_seed_gives_the_same_integers(dense):
    inputs, scheme = tokens_of(6, 8), Scheme(group_size=32)
    config = AutoRoundConfig(iterations=5, batch=2)
    found = [quantise_block(dense, inputs, dense.forward(inputs), scheme, config) for _ in range(2)]
    other = quantise_block(dense, inputs, dense.forward(inputs), scheme, dataclasses.replace(config, seed=1))
    for name in dense.linears:
        assert torch.equal(found[0][name].codes, found[1][name].codes)
        assert torch.equal(found[0][name].scales, found[1][name].scales)
    assert any(not torch.equal(found[0][name].codes, other[name].codes) for name in dense.linears)


def test_steps_that_make_it_worse_are_not_kept(dense):
    inputs, scheme = tokens_of(4, 8), Scheme(group_size=32)
    config = AutoRoundConfig(iterations=6, batch=4, learning_rate=50.0)
    found = quantise_block(dense, inputs, dense.forward(inputs), scheme, config)
    start = {name: nearest(weight, scheme, "weighted") for name, weight in dense.weights.items()}
    assert loss_of(dense, found, inputs, dense.forward(inputs)) <= loss_of(dense, start, inputs, dense.forward(inputs))


def test_targets_pull_where_inputs_differ(dense):
    """From a quantised prefix: the layer sees inputs that are off and is to give what it would of the right ones."""
    right, scheme = tokens_of(8, 16), Scheme(group_size=32)
    off, targets = right + 0.3 * torch.randn(1, 1, 64), dense.forward(right)
    config = AutoRoundConfig(iterations=40, batch=4)
    aware = quantise_block(dense, off, targets, scheme, config)
    blind = quantise_block(dense, right, targets, scheme, config)
    assert loss_of(dense, aware, off, targets) < loss_of(dense, blind, off, targets)


@pytest.mark.parametrize("apart", [False, True], ids=["together", "apart"])
def test_experts_are_closer_than_rounded_to_nearest(experts, apart):
    inputs, scheme = tokens_of(8, 16), Scheme(group_size=32)
    targets, told = experts.forward(inputs), []
    config = AutoRoundConfig(iterations=15, batch=4, apart=apart)
    found = quantise_block(experts, inputs, targets, scheme, config, lambda *call: told.append(call))
    assert tuple(found) == experts.linears
    assert told[-1] == (15 * 7, 15 * 7) if apart else told[-1] == (15, 15)
    rtn = {name: nearest(weight, scheme) for name, weight in experts.weights.items()}
    assert loss_of(experts, found, inputs, targets) < 0.7 * loss_of(experts, rtn, inputs, targets)


@pytest.mark.parametrize("apart", [False, True], ids=["together", "apart"])
def test_an_expert_without_tokens_is_where_it_started_unless_it_is_given_some(experts, apart):
    rest = {**experts.rest, "mlp.gate.weight": experts.rest["mlp.gate.weight"].clone()}
    block = Block(experts.config, experts.weights, rest)
    inputs, scheme, name = tokens_of(4, 8), Scheme(group_size=32), "mlp.experts.2.up_proj"
    x = block.attend(inputs)[1]
    rest["mlp.gate.weight"][2] = -10 * x.mean(0)  # never among the best two
    assert int(block.routing(inputs).tokens_per_expert()[2]) == 0
    config = AutoRoundConfig(iterations=6, batch=4, apart=apart)
    start = nearest(block.weights[name], scheme, "weighted")
    found = quantise_block(block, inputs, block.forward(inputs), scheme, config)
    assert torch.equal(found[name].codes, start.codes)
    config = dataclasses.replace(config, least_tokens=8)
    found = quantise_block(block, inputs, block.forward(inputs), scheme, config)
    assert not torch.equal(found[name].codes, start.codes)


def test_extra_tokens_are_wanted_as_the_experts_make_them(experts):
    inputs = tokens_of(3, 8)
    task = WholeLayer(experts, inputs, experts.forward(inputs), AutoRoundConfig(least_tokens=24))
    assert float(task.all_losses(experts.weights, 2).max()) < 1e-6
    assert bool(task.extra.any())


WRONG = {
    "none": (lambda x: (x[:0], x[:0]), "want one sequence or more"),
    "count": (lambda x: (x, x[:1]), "as many of each"),
    "lengths": (lambda x: ([x[0], x[1, :3]], x), "all of one shape"),
    "width": (lambda x: (x[..., :60], x[..., :60]), "one shape"),
    "nan": (lambda x: (x.clone().fill_(torch.nan), x), "want finite hidden states"),
    "inf-target": (lambda x: (x, x.clone().fill_(torch.inf)), "want finite hidden states"),
}


@pytest.mark.parametrize(("spoil", "message"), WRONG.values(), ids=WRONG)
def test_sequences_out_of_contract(dense, spoil, message):
    inputs, targets = spoil(tokens_of(2, 6))
    with pytest.raises(ValueError, match=f"autoround: inputs, targets: .*{message}"):
        quantise_block(dense, inputs, targets, Scheme(group_size=32), AutoRoundConfig(iterations=1))


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"iterations": -1}, "iterations"), ({"batch": 0}, "iterations, batch"), ({"start": "best"}, "start")],
)
def test_settings_out_of_contract(fields, message):
    with pytest.raises(ValueError, match=f"AutoRoundConfig: {message}"):
        AutoRoundConfig(**fields)
