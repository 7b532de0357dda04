"""Integers of a quantised weight: what they stand for, packed and not."""

from __future__ import annotations

import pytest
import torch

from m3.quantize.scheme import Rounded, Scheme, nearest
from m3kernels.int4 import int4_dequantize, quantize_weight

WEIGHTS = {
    "plain": lambda: torch.randn(5, 80),
    "tiny": lambda: torch.randn(5, 80) * 1e-8,  # scales are subnormal numbers of fp16
    "zero-group": lambda: torch.randn(5, 80).index_fill_(1, torch.arange(32), 0.0),
    "outlier-row": lambda: torch.randn(5, 80) * torch.tensor([1.0, 1e4, 1, 1, 1])[:, None],
}


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("group_size", [32, 64, -1])
@pytest.mark.parametrize("make", WEIGHTS.values(), ids=WEIGHTS)
def test_nearest_is_quantize_weight(make, group_size, symmetric):
    weight = make()
    scheme = Scheme(group_size=group_size, symmetric=symmetric)
    rounded = nearest(weight, scheme)
    packed = quantize_weight(weight, group_size=group_size, symmetric=symmetric)
    assert torch.equal(rounded.dequantized(), int4_dequantize(packed, torch.float32))
    assert torch.equal(int4_dequantize(rounded.to_int4(), torch.float32), rounded.dequantized())
    assert (rounded.zeros is None) == symmetric


def test_permuted_columns_go_back_to_their_inputs():
    codes = torch.arange(32, dtype=torch.uint8).remainder(16).repeat(2, 1)
    scales = torch.tensor([[1.0, 0.5], [2.0, -1.0]], dtype=torch.float16)
    perm = torch.randperm(32, dtype=torch.int32)
    rounded = Rounded(codes=codes, scales=scales, perm=perm, group_size=16)
    dense = rounded.dequantized()
    at = int(perm[20])  # group 1, code 4
    assert dense[:, at].tolist() == [-2.0, 4.0]
    assert torch.equal(int4_dequantize(rounded.to_int4(), torch.float32), dense)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"group_size": 24}, "group_size"),
        ({"symmetric": 1}, "symmetric"),
        ({"scale_dtype": torch.float64}, "scale_dtype"),
    ],
)
def test_schemes_out_of_contract(fields, message):
    with pytest.raises(ValueError, match=f"Scheme: {message}"):
        Scheme(**fields)


def test_groups_of_a_width():
    assert (Scheme(group_size=64).groups(80), Scheme(group_size=-1).groups(80)) == (2, 1)
    assert (Scheme(group_size=64).width(80), Scheme(group_size=-1).width(80)) == (64, 80)
