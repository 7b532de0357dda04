"""GPTQ against a restatement column by column in fp64, and what it is for: less error than rounding to nearest."""

from __future__ import annotations

import pytest
import torch
from quantize_layers import layer_of, tokens_of

from m3.quantize.gptq import GptqConfig, Hessian, Prepared, quantise_block, quantise_linear
from m3.quantize.scheme import Scheme, nearest


def correlated(tokens=400, columns=80):
    mix = torch.randn(columns, columns, dtype=torch.float64)
    return (torch.randn(tokens, columns, dtype=torch.float64) @ (mix + 2 * torch.ones(columns, columns))).float()


def textbook(weight, hessian, group_size, symmetric, damping, perm):
    """(codes in stored order, scales, zeros): GPTQ as the paper has it, one column at a time, the inverse Hessian
    updated by Gaussian elimination. Ranges: min-max of the weights when the group begins."""
    w, h = weight.double()[:, perm].clone(), hessian.double()[perm][:, perm].clone()
    k = w.shape[1]
    width = k if group_size == -1 else group_size
    h += damping * h.diagonal().mean() * torch.eye(k)
    inverse = torch.linalg.inv(h)
    codes, scales, zeros = torch.empty(w.shape), [], []
    for column in range(k):
        if column % width == 0:
            found = nearest(w[:, column : column + width].float(), Scheme(group_size=-1, symmetric=symmetric))
            scale, zero = found.scales[:, 0].double(), found.zeros
            zero = torch.full_like(scale, 8) if zero is None else zero[:, 0].double()
            scales.append(scale)
            zeros.append(zero)
        q = (torch.round(w[:, column] / scale) + zero).clamp(0, 15)
        codes[:, column] = q
        error = (w[:, column] - (q - zero) * scale) / inverse[column, column]
        w[:, column:] -= error[:, None] * inverse[column, column:]
        inverse = inverse - torch.outer(inverse[:, column], inverse[column]) / inverse[column, column]
    return codes.to(torch.uint8), torch.stack(scales, 1), torch.stack(zeros, 1)


@pytest.mark.parametrize("act_order", [False, True], ids=["in-order", "act-order"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize(
    "group_size", [16, 48, 160, -1]
)  # 128 is no multiple of 48; the last group has 32 or 16 columns
def test_gptq_equals_the_textbook(group_size, symmetric, act_order):
    weight, x = torch.randn(12, 176), correlated(300, 176)
    hessian = x.double().T @ x.double()
    config = GptqConfig(act_order=act_order, start="minmax")
    prepared = Prepared.of(hessian, config)
    got = quantise_linear(weight, prepared, Scheme(group_size=group_size, symmetric=symmetric), "minmax")
    perm = hessian.diagonal().argsort(descending=True, stable=True) if act_order else torch.arange(176)
    codes, scales, zeros = textbook(weight, hessian, group_size, symmetric, 0.01, perm)
    assert (got.perm is None) == (not act_order)
    if act_order:
        assert got.perm.tolist() == perm.tolist()
    # A tie, or a scale at the border of two fp16 numbers, may fall the other way and change its row from there on.
    same = (got.codes == codes).all(1) & (got.scales.double() == scales).all(1)
    if got.zeros is not None:
        same &= (got.zeros == zeros).all(1)
    assert int(same.sum()) >= 10


@pytest.mark.parametrize("act_order", [False, True], ids=["in-order", "act-order"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
def test_less_output_error_than_nearest(symmetric, act_order):
    weight, x = torch.randn(32, 80), correlated()
    scheme = Scheme(group_size=32, symmetric=symmetric)
    prepared = Prepared.of(x.T @ x, GptqConfig(act_order=act_order))
    got = quantise_linear(weight, prepared, scheme, "minmax")

    def error(rounded):
        return float((x @ (rounded.dequantized() - weight).T).square().sum())

    assert error(got) < 0.5 * error(nearest(weight, scheme))


def test_inputs_that_are_always_zero_round_to_nearest():
    weight, x = torch.randn(8, 32), correlated(100, 32)
    x[:, 16:] = 0.0
    prepared = Prepared.of(x.T @ x, GptqConfig())
    got = quantise_linear(weight, prepared, Scheme(group_size=16), "minmax")
    assert torch.equal(got.codes[:, 16:], nearest(weight, Scheme(group_size=16)).codes[:, 16:])


def test_few_tokens_are_damped():
    weight, x = torch.randn(8, 64), torch.randn(3, 64)
    got = quantise_linear(weight, Prepared.of(x.T @ x, GptqConfig()), Scheme(group_size=32), "minmax")
    assert bool(torch.isfinite(got.dequantized()).all())


def test_no_token_at_all_is_rounding_to_nearest():
    weight = torch.randn(8, 64)
    got = quantise_linear(weight, Prepared.of(torch.zeros(64, 64), GptqConfig()), Scheme(group_size=32), "minmax")
    assert torch.equal(got.codes, nearest(weight, Scheme(group_size=32)).codes)


def test_hidden_states_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="gptq: inputs: want finite hidden states"):
        Prepared.of(torch.full((4, 4), torch.nan), GptqConfig())


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"damping": 0.0}, "damping"), ({"start": "best"}, "start"), ({"batch": 0}, "batch"), ({"least_tokens": -1}, "b")],
)
def test_settings_out_of_contract(fields, message):
    with pytest.raises(ValueError, match=f"GptqConfig: {message}"):
        GptqConfig(**fields)


def test_hessian_is_of_the_linear_that_was_asked_for():
    hessian = Hessian("self_attn.o_proj", 2)
    hessian.see("self_attn.q_proj", torch.ones(5, 3))
    hessian.see("self_attn.o_proj", torch.tensor([[1.0, 2.0], [0.0, 1.0]]))
    assert hessian.total.tolist() == [[1.0, 2.0], [2.0, 5.0]]


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3_moe"])
def test_a_layer_is_closer_than_rounded_to_nearest(family, tmp_path):
    block = layer_of(tmp_path, family)
    hidden = tokens_of(8, 24)
    scheme, told = Scheme(group_size=32), []
    found = quantise_block(block, hidden, None, scheme, GptqConfig(batch=3), lambda *call: told.append(call))
    assert tuple(found) == block.linears
    assert told[-1] == (len(block.linears), len(block.linears))

    def error(rounded):
        other = block.replaced({name: one.dequantized() for name, one in rounded.items()})
        return float((other.forward(hidden) - block.forward(hidden)).square().sum())

    assert error(found) < 0.8 * error({name: nearest(w.float(), scheme) for name, w in block.weights.items()})


def test_later_linears_see_the_rounded_earlier_ones(tmp_path):
    block = layer_of(tmp_path, "llama")
    hidden, scheme = tokens_of(4, 24), Scheme(group_size=32)
    found = quantise_block(block, hidden, None, scheme, GptqConfig())
    first = {name: found[name].dequantized() for name in block.linears[:3]}
    hessian = Hessian("self_attn.o_proj", block.weights["self_attn.o_proj"].shape[1])
    block.forward(hidden, first, see=hessian.see)
    prepared = Prepared.of(hessian.total, GptqConfig())
    want = quantise_linear(block.weights["self_attn.o_proj"], prepared, scheme, "mse")
    assert torch.equal(found["self_attn.o_proj"].codes, want.codes)


def test_rare_experts_get_the_likeliest_tokens(tmp_path):
    block = layer_of(tmp_path, "qwen3_moe")
    hidden, scheme = tokens_of(1, 12), Scheme(group_size=32)
    routing = block.routing(hidden)
    rare = int(routing.tokens_per_expert().argmin())
    assert int(routing.tokens_per_expert()[rare]) < 12
    config = GptqConfig(least_tokens=12, sequential=False)
    found = quantise_block(block, hidden, None, scheme, config)
    x = block.attend(hidden)[1]  # 12 of 12 tokens
    name = f"mlp.experts.{rare}.up_proj"
    want = quantise_linear(block.weights[name], Prepared.of(x.double().T @ x.double(), config), scheme, "mse")
    assert float((found[name].dequantized() - want.dequantized()).abs().max()) < 1e-3
    few = quantise_block(block, hidden, None, scheme, GptqConfig(sequential=False))
    assert not torch.equal(few[name].codes, found[name].codes)
