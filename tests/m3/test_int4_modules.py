"""Int4Linear and Int4Experts: values, state_dict, moving, and fusing rows."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from m3.models.int4_experts import Int4Experts
from m3.models.int4_linear import Int4Linear, can_concat, concat_out
from m3kernels.int4 import Int4Weight, int4_dequantize, int4_gemm, int4_moe
from m3kernels.int4.reference import make_inputs


@pytest.mark.parametrize("bias", [True, False])
def test_from_linear_computes_with_the_rounded_weight(bias):
    linear = nn.Linear(80, 40, bias=bias)
    int4 = Int4Linear.from_linear(linear, group_size=32, method="minmax", activations="exact")
    x = torch.randn(2, 5, 80)
    weight = int4_dequantize(int4.weight.int4, torch.float32)
    assert float((weight - linear.weight.detach()).abs().max()) <= float(linear.weight.detach().abs().max()) / 7.5
    torch.testing.assert_close(int4(x), nn.functional.linear(x, weight, linear.bias).detach(), rtol=1e-5, atol=1e-5)


def test_activations_are_passed_on():
    x, weight, _ = make_inputs(3, 64, 64)
    assert torch.equal(Int4Linear(weight, activations="int8")(x), int4_gemm(x, weight, activations="int8"))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("act_order", [True, False])
def test_state_dict_brings_group_size_and_symmetry_along(symmetric, act_order):
    x, weight, bias = make_inputs(3, 72, 80, group_size=32, symmetric=symmetric, act_order=act_order, bias=True)
    other = make_inputs(3, 72, 80, group_size=64, symmetric=not symmetric, seed=1)[1]
    source, target = Int4Linear(weight, bias), Int4Linear(other, torch.zeros(72))
    target.load_state_dict(source.state_dict())
    assert target.weight.int4.group_size == 32
    assert target.weight.int4.symmetric == symmetric
    assert torch.equal(target(x), source(x))


def test_state_dict_of_another_size_is_refused():
    small, large = (Int4Linear(make_inputs(1, n, 64)[1]) for n in (64, 72))
    with pytest.raises(
        ValueError, match=r"weight.meta: want experts, out, in = \(None, 64, 64\); got \(None, 72, 64\)"
    ):
        small.load_state_dict(large.state_dict())


def test_a_cast_of_the_model_leaves_packed_weights_alone():
    x, weight, bias = make_inputs(3, 64, 64, bias=True)
    module = Int4Linear(weight, bias)
    cast = copy.deepcopy(module).to(torch.bfloat16)
    assert cast.weight.int4.scales.dtype == torch.float16
    assert cast.bias.dtype == torch.bfloat16
    assert torch.equal(cast(x.bfloat16()), int4_gemm(x.bfloat16(), weight, bias.bfloat16()))
    assert torch.equal(module(x), int4_gemm(x, weight, bias))


def test_experts_equal_the_op():
    x, w13, _ = make_inputs(7, 96, 64, group_size=32, experts=5)
    w2 = make_inputs(1, 64, 48, group_size=32, experts=5, seed=1)[1]
    ids, weights = torch.randint(0, 5, (7, 2)), torch.rand(7, 2)
    source = Int4Experts(w13, w2)
    assert torch.equal(source(x, ids, weights), int4_moe(x, w13, w2, ids, weights))
    target = Int4Experts(w13, make_inputs(1, 64, 48, group_size=32, experts=5, seed=2)[1])
    target.load_state_dict(source.state_dict())
    assert torch.equal(target(x, ids, weights), source(x, ids, weights))
    assert source.num_experts == 5


@pytest.mark.parametrize("rows", [(64, 128), (40, 72), (64, 1)], ids=["whole-tiles", "odd", "one-row"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("act_order", [True, False])
def test_concat_out_is_the_concatenation_of_outputs(rows, symmetric, act_order):
    parts = [make_inputs(1, n, 96, group_size=32, symmetric=symmetric, act_order=act_order, seed=7)[1] for n in rows]
    if act_order:
        perm = torch.randperm(96).int()
        parts = [Int4Weight(**{**vars(part), "perm": perm}) for part in parts]
    x = torch.randn(4, 96)
    whole = concat_out(parts)
    assert whole.out_features == sum(rows)
    assert torch.equal(int4_gemm(x, whole), torch.cat([int4_gemm(x, part) for part in parts], dim=-1))


@pytest.mark.parametrize(
    "changes",
    [{"k": 64}, {"group_size": 64}, {"symmetric": True}, {"scale_dtype": torch.float32}, {"act_order": True}],
    ids=lambda changes: next(iter(changes)),
)
def test_weights_of_different_formats_are_not_fused(changes):
    def weight(k: int = 96, group_size: int = 32, **rest: object) -> Int4Weight:
        return make_inputs(1, 64, k, group_size=group_size, **rest)[1]

    assert not can_concat([weight(), weight(**changes)])
    with pytest.raises(ValueError, match="concat_out: weights: want the same K, groups, symmetry"):
        concat_out([weight(), weight(**changes)])


def test_constructors_refuse_the_other_kind():
    plain, stack = make_inputs(1, 64, 64)[1], make_inputs(1, 64, 64, experts=2)[1]
    with pytest.raises(ValueError, match="Int4Linear: weight: want an Int4Weight without experts"):
        Int4Linear(stack)
    with pytest.raises(ValueError, match="Int4Experts: w2: want an Int4Weight with experts"):
        Int4Experts(stack, plain)
