"""Which linears stay in bf16: one that is made bad is found, budgets hold, bytes are those of a checkpoint."""

from __future__ import annotations

import pytest
import torch
from quantize_layers import layer_of, tokens_of

from m3.quantize.scheme import Scheme, nearest
from m3.quantize.sensitivity import Unit, budget_of, int4_bytes, kept, layer_units
from m3kernels.int4.convert import to_gptq

SCHEME = Scheme(group_size=32)
EXPERT = ("gate", "up", "down")
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
BAD = {  # family, the linear, what feeds its inputs, its unit
    "v": ("llama", "self_attn.v_proj", "input_layernorm.weight", QKV),
    "down": ("qwen3", "mlp.down_proj", "mlp.up_proj", ("mlp.down_proj",)),
    "expert": ("qwen3_moe", "mlp.experts.2.up_proj", "post_attention_layernorm.weight", None),
}


def rounded_of(block):
    return {name: nearest(weight, SCHEME) for name, weight in block.weights.items()}


def units_with(folder, family, bad, feeds, factor=40):
    """Outliers that meet inputs of 0: they do nothing but take the range of their groups, whose weights become 0."""
    torch.manual_seed(2)
    block, inputs = layer_of(folder, family), tokens_of(3, 11)
    (block.rest if feeds in block.rest else block.weights)[feeds][::32] = 0
    block.weights[bad][:, ::32] *= factor
    return layer_units(block, 7, inputs, rounded_of(block), batch=2)


@pytest.mark.parametrize(("family", "bad", "feeds", "linears"), BAD.values(), ids=BAD)
def test_a_linear_that_rounds_badly_shows_in_its_unit_alone(tmp_path, family, bad, feeds, linears):
    good, units = units_with(tmp_path, family, bad, feeds, 1), units_with(tmp_path, family, bad, feeds)
    worse = [after for before, after in zip(good, units, strict=True) if after.error > 1.001 * before.error]
    assert len(worse) == 1
    assert worse[0].error > 2 * next(one.error for one in good if one.linears == worse[0].linears)
    assert worse[0].linears == (linears or tuple(f"mlp.experts.{e}.{n}_proj" for e in range(6) for n in EXPERT))
    assert worse[0].layer == 7


@pytest.mark.parametrize("name", ["v", "down"])
def test_it_is_kept_first(tmp_path, name):
    family, bad, feeds, linears = BAD[name]
    units = units_with(tmp_path, family, bad, feeds)
    cost = next(one.extra_bytes for one in units if bad in one.linears)
    assert [one.linears for one in kept(units, cost)] == [linears]


def test_the_error_of_a_unit_is_that_of_the_layers_output(tmp_path):
    torch.manual_seed(3)
    block, inputs = layer_of(tmp_path, "qwen3_moe"), tokens_of(3, 9)
    rounded = rounded_of(block)
    units = layer_units(block, 0, inputs, rounded, batch=2)
    assert [len(unit.linears) for unit in units] == [3, 1, 18]
    wanted = block.forward(inputs)
    for unit in units:
        got = block.replaced({name: rounded[name].dequantized() for name in unit.linears}).forward(inputs)
        error = float((got - wanted).square().sum() / wanted.square().sum())
        assert unit.error == pytest.approx(error, rel=1e-4)


@pytest.mark.parametrize("symmetric", [True, False])
def test_bytes_are_those_of_the_stored_tensors(symmetric):
    weight = torch.randn(24, 80)
    rounded = nearest(weight, Scheme(group_size=32, symmetric=symmetric))
    stored = to_gptq(rounded.to_int4())
    assert int4_bytes(rounded) == sum(tensor.numel() * tensor.element_size() for tensor in stored.values())


def unit(layer, error, cost):
    return Unit(layer=layer, linears=("mlp.down_proj",), error=error, int4_bytes=100, bf16_bytes=100 + cost)


def test_the_budget_goes_to_error_per_byte():
    units = [unit(0, 0.1, 100), unit(1, 0.4, 1000), unit(2, 0.05, 10), unit(3, 0.0, 5), unit(4, 0.2, 200)]
    assert [one.layer for one in kept(units, 310)] == [2, 0, 4]
    assert [one.layer for one in kept(units, 309)] == [2, 0]
    assert [one.layer for one in kept(units, 1100)] == [2, 0, 4]
    assert [one.layer for one in kept(units, 10**6)] == [2, 0, 4, 1]  # one without error never
    assert kept(units, 0) == []


def test_budgets_are_shares_or_sizes():
    units = [unit(0, 0.1, 100)] * 4
    assert [budget_of(text, units) for text in ("5%", "0%", "12B", "1.5KB", "2mb", "1GB")] == [
        20, 0, 12, 1500, 2_000_000, 10**9,
    ]  # fmt: skip


@pytest.mark.parametrize("text", ["", "5", "%", "-1%", "x MB", "nan%", "inf%"])
def test_other_budgets_are_refused(text):
    with pytest.raises(ValueError, match="--keep-budget: want a share or a size"):
        budget_of(text, [unit(0, 0.1, 100)])


def test_a_linear_that_was_not_rounded_is_named(tmp_path):
    block = layer_of(tmp_path, "llama")
    rounded = rounded_of(block)
    del rounded["mlp.up_proj"]
    with pytest.raises(ValueError, match=r"every linear of layer 2; got no mlp.up_proj"):
        layer_units(block, 2, tokens_of(1, 4), rounded)


def test_hidden_states_that_are_not_finite_are_named(tmp_path):
    block = layer_of(tmp_path, "llama")
    with pytest.raises(ValueError, match=r"layer 2: self_attn\.q_proj: want a finite error"):
        layer_units(block, 2, torch.full((1, 4, 64), float("inf")), rounded_of(block))
