"""Converters: words written out by hand, bitwise round trips, the peers' own packers, and every documented error."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from m3kernels.int4 import (
    Int4Weight,
    from_autoround,
    from_awq,
    from_compressed_tensors,
    from_gptq,
    int4_dequantize,
    to_awq,
    to_compressed_tensors,
    to_gptq,
)
from m3kernels.int4.reference import make_inputs

quick = settings(max_examples=60, deadline=None)
SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def words(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randint(-(2**31), 2**31, shape, generator=generator).to(torch.int32)


def word(*nibbles: int) -> int:
    """Eight nibbles, lowest first, as a signed 32-bit number."""
    value = sum(nibble << (4 * i) for i, nibble in enumerate(nibbles))
    return value - 2**32 if value >= 2**31 else value


def nibble(words: Tensor, row: int, column: int, position: int) -> int:
    return int(words[row, column]) >> (4 * position) & 15


def same_tensors(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


@st.composite
def shapes(draw: st.DrawFn) -> dict[str, Any]:
    group_size = draw(st.sampled_from((-1, 16, 32, 48, 64, 128)))
    k, n = 8 * draw(st.integers(1, 30)), 8 * draw(st.integers(1, 12))
    return {
        "n": n,
        "k": k,
        "group_size": group_size,
        "groups": 1 if group_size == -1 else -(-k // group_size),
        "dtype": draw(st.sampled_from(SCALE_DTYPES)),
        "generator": torch.Generator().manual_seed(draw(st.integers(0, 10**6))),
    }


# -- GPTQ -------------------------------------------------------------------------------------------------------------
def test_gptq_words_by_hand() -> None:
    qweight = torch.zeros(2, 8, dtype=torch.int32)
    qweight[0, 2], qweight[1, 2] = word(1, 2, 3, 4, 5, 6, 7, 8), word(15, 14, 13, 12, 11, 10, 9, 0)
    qzeros = torch.tensor([[word(7, 7, 4, 7, 7, 7, 7, 15)]], dtype=torch.int32)
    scales = torch.full((1, 8), 0.5, dtype=torch.float16)
    v1 = from_gptq(qweight, scales, qzeros, group_size=16, version=1)
    q, _, zeros = v1.unpack()
    assert q[2].tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 15, 14, 13, 12, 11, 10, 9, 0]
    assert zeros[:, 0].tolist() == [8, 8, 5, 8, 8, 8, 8, 16]
    assert int4_dequantize(v1)[2].tolist() == [(value - 5) / 2 for value in q[2].tolist()]
    v2 = from_gptq(qweight, scales, qzeros, group_size=16, version=2)
    assert v2.unpack()[2][:, 0].tolist() == [7, 7, 4, 7, 7, 7, 7, 15]


@quick
@given(shape=shapes(), version=st.sampled_from((1, 2)), act_order=st.booleans())
def test_gptq_round_trip_is_bitwise(shape: dict[str, Any], version: int, act_order: bool) -> None:
    n, k, groups, generator = shape["n"], shape["k"], shape["groups"], shape["generator"]
    g_idx = (torch.arange(k) // (k if shape["group_size"] == -1 else shape["group_size"])).int()
    if act_order:
        g_idx = g_idx[torch.randperm(k, generator=generator)]
    tensors = {
        "qweight": words(generator, k // 8, n),
        "qzeros": words(generator, groups, n // 8),
        "scales": torch.randn(groups, n, generator=generator).to(shape["dtype"]),
        "g_idx": g_idx,
    }
    weight = from_gptq(**tensors, group_size=shape["group_size"], version=version)
    assert same_tensors(to_gptq(weight, version=version), tensors)


@quick
@given(shape=shapes(), version=st.sampled_from((1, 2)), data=st.data())
def test_gptq_dequantizes_as_its_formula(shape: dict[str, Any], version: int, data: st.DataObject) -> None:
    n, k, groups, generator = shape["n"], shape["k"], shape["groups"], shape["generator"]
    qweight, qzeros = words(generator, k // 8, n), words(generator, groups, n // 8)
    scales = torch.randn(groups, n, generator=generator).half()
    size = k if shape["group_size"] == -1 else shape["group_size"]
    g_idx = (torch.arange(k) // size)[torch.randperm(k, generator=generator)].int()
    weight = from_gptq(qweight, scales, qzeros, g_idx, group_size=shape["group_size"], version=version)
    i, j = data.draw(st.integers(0, n - 1)), data.draw(st.integers(0, k - 1))
    zero = nibble(qzeros, int(g_idx[j]), i // 8, i % 8) + (1 if version == 1 else 0)
    value = (nibble(qweight, j // 8, i, j % 8) - zero) * float(scales[g_idx[j], i])
    assert float(int4_dequantize(weight, torch.float32)[i, j]) == value


def test_gptq_act_order_is_a_stored_permutation() -> None:
    g_idx = torch.tensor([1, 0] * 16 + [2] * 8, dtype=torch.int32)
    tensors = (torch.zeros(5, 8, dtype=torch.int32), torch.ones(3, 8).half(), torch.zeros(3, 1, dtype=torch.int32))
    weight = from_gptq(*tensors, g_idx, group_size=16)
    assert weight.perm is not None
    assert weight.perm.tolist() == [*range(1, 32, 2), *range(0, 32, 2), *range(32, 40)]


def test_gptq_g_idx_in_order_or_absent_is_no_permutation() -> None:
    tensors = (torch.zeros(5, 8, dtype=torch.int32), torch.ones(3, 8).half(), torch.zeros(3, 1, dtype=torch.int32))
    ordered = from_gptq(*tensors, (torch.arange(40) // 16).int(), group_size=16)
    assert ordered.perm is None and from_gptq(*tensors, group_size=16).perm is None
    assert to_gptq(ordered)["g_idx"].tolist() == (torch.arange(40) // 16).tolist()


@pytest.mark.parametrize(
    ("symmetric", "stored", "kept"),
    ((None, 7, False), (True, 7, False), (False, 7, True), (None, 6, True), (False, 6, True)),
)
def test_gptq_symmetry(symmetric: bool | None, stored: int, kept: bool) -> None:
    qzeros = torch.full((1, 1), word(*[stored] * 8), dtype=torch.int32)
    weight = from_gptq(
        torch.zeros(2, 8, dtype=torch.int32), torch.ones(1, 8), qzeros, group_size=16, symmetric=symmetric
    )
    assert (weight.zeros is not None) == kept
    assert torch.equal(to_gptq(weight)["qzeros"], qzeros)


def test_strides_of_the_checkpoint_do_not_matter() -> None:
    weight = from_gptq(**to_gptq(make_inputs(1, 16, 8, group_size=16, symmetric=True)[1]), group_size=16)
    tensors = to_gptq(weight)
    spread = {name: tensor.repeat_interleave(2, dim=-1)[..., ::2] for name, tensor in tensors.items()}
    assert same_tensors(to_gptq(from_gptq(**spread, group_size=16)), tensors)
    transposed = {name: tensor.T.contiguous().T for name, tensor in tensors.items() if tensor.ndim == 2}
    assert same_tensors(to_gptq(from_gptq(**transposed, group_size=16)), tensors)


def test_a_slice_at_a_group_is_a_whole_weight_to_gptq() -> None:
    whole = make_inputs(1, 16, 160, group_size=32, symmetric=True)[1]
    part, tensors = to_gptq(whole.slice_in(64, 160)), to_gptq(whole)
    assert torch.equal(part["qweight"], tensors["qweight"][8:]) and torch.equal(part["scales"], tensors["scales"][2:])
    assert part["g_idx"].tolist() == (torch.arange(96) // 32).tolist()


# -- AWQ --------------------------------------------------------------------------------------------------------------
def test_awq_words_by_hand() -> None:
    qweight = torch.tensor([[word(0, 2, 4, 6, 1, 3, 5, 7)], [word(10, 12, 14, 0, 11, 13, 15, 1)]], dtype=torch.int32)
    qzeros = torch.tensor([[word(1, 3, 5, 7, 2, 4, 6, 8)]], dtype=torch.int32)
    weight = from_awq(qweight, qzeros, torch.ones(1, 8).half(), group_size=16)
    q, _, zeros = weight.unpack()
    assert q.T.tolist() == [[0, 1, 2, 3, 4, 5, 6, 7], [10, 11, 12, 13, 14, 15, 0, 1]]
    assert zeros[:, 0].tolist() == [1, 2, 3, 4, 5, 6, 7, 8]


@quick
@given(shape=shapes(), odd=st.integers(0, 7))
def test_awq_round_trip_is_bitwise(shape: dict[str, Any], odd: int) -> None:
    n, generator = shape["n"], shape["generator"]
    k = max(1, shape["k"] - odd)
    groups = 1 if shape["group_size"] == -1 else -(-k // shape["group_size"])
    tensors = {
        "qweight": words(generator, k, n // 8),
        "qzeros": words(generator, groups, n // 8),
        "scales": torch.randn(groups, n, generator=generator).to(shape["dtype"]),
    }
    assert same_tensors(to_awq(from_awq(**tensors, group_size=shape["group_size"])), tensors)


# -- compressed-tensors -----------------------------------------------------------------------------------------------
def test_compressed_tensors_words_by_hand() -> None:
    packed = torch.tensor([[word(8, 9, 7, 0, 15, 8, 8, 8), word(1, 2, 0, 0, 0, 0, 0, 0)]], dtype=torch.int32)
    scale, zero_point = (
        torch.full((1, 1), 0.25).bfloat16(),
        torch.tensor([[word(10, 0, 0, 0, 0, 0, 0, 0)]], dtype=torch.int32),
    )
    shape = torch.tensor([1, 10])
    symmetric = from_compressed_tensors(packed, scale, shape, group_size=32)
    assert symmetric.symmetric
    assert int4_dequantize(symmetric)[0].tolist() == [0, 0.25, -0.25, -2, 1.75, 0, 0, 0, -1.75, -1.5]
    asymmetric = from_compressed_tensors(packed, scale, shape, zero_point, group_size=32)
    assert int4_dequantize(asymmetric)[0].tolist() == [-0.5, -0.25, -0.75, -2.5, 1.25, -0.5, -0.5, -0.5, -2.25, -2.0]


@quick
@given(shape=shapes(), n=st.integers(1, 40), k=st.integers(1, 200), symmetric=st.booleans(), act_order=st.booleans())
def test_compressed_tensors_round_trip_is_bitwise(
    shape: dict[str, Any], n: int, k: int, symmetric: bool, act_order: bool
) -> None:
    kwargs = dict(group_size=shape["group_size"], symmetric=symmetric, act_order=act_order, scale_dtype=shape["dtype"])
    weight = make_inputs(1, n, k, seed=n * k, **kwargs)[1]
    if not symmetric:
        q, scales, zeros = weight.unpack()
        weight = Int4Weight.pack(q, scales, zeros.clamp(max=15), group_size=weight.group_size, perm=weight.perm)
    tensors = to_compressed_tensors(weight)
    again = from_compressed_tensors(**tensors, group_size=weight.group_size)
    assert same_tensors(to_compressed_tensors(again), tensors)
    assert torch.equal(int4_dequantize(again), int4_dequantize(weight))


@pytest.mark.parametrize("n, k, group_size", ((24, 128, 32), (13, 75, 16), (40, 200, -1), (1, 8, 16)))
@pytest.mark.parametrize("symmetric", (True, False))
def test_compressed_tensors_agrees_with_its_own_package(n: int, k: int, group_size: int, symmetric: bool) -> None:
    package = pytest.importorskip(
        "compressed_tensors.compressors.pack_quantized.helpers", reason="needs compressed-tensors"
    )
    groups = 1 if group_size == -1 else -(-k // group_size)
    q = torch.randint(-8, 8, (n, k), dtype=torch.int8)
    zero_point = (
        torch.zeros(n, groups, dtype=torch.int8) if symmetric else torch.randint(-8, 8, (n, groups), dtype=torch.int8)
    )
    scale = torch.rand(n, groups).half()
    theirs = {
        "weight_packed": package.pack_to_int32(q, 4),
        "weight_scale": scale,
        "weight_shape": torch.tensor([n, k]),
    }
    if not symmetric:
        theirs["weight_zero_point"] = package.pack_to_int32(zero_point, 4, packed_dim=0)
    weight = from_compressed_tensors(**theirs, group_size=group_size)
    assert same_tensors(to_compressed_tensors(weight), theirs)
    group = torch.arange(k) // (k if group_size == -1 else group_size)
    expected = (q.float() - zero_point.float()[:, group]) * scale.float()[:, group]
    assert torch.equal(int4_dequantize(weight, torch.float32), expected)


# -- AutoRound --------------------------------------------------------------------------------------------------------
SYMMETRIC = make_inputs(1, 16, 96, group_size=32, symmetric=True)[1]
_q, _s, _z = make_inputs(1, 16, 96, group_size=32)[1].unpack()
ASYMMETRIC = Int4Weight.pack(_q, _s, _z.clamp(1, 15), group_size=32)
ORDERED = Int4Weight.pack(_q, _s, _z.clamp(1, 15), group_size=32, perm=torch.arange(95, -1, -1, dtype=torch.int32))
CONFIG = dict(
    bits=4, group_size=32, sym=False, data_type="int", quant_method="auto-round", packing_format="auto_round:auto_gptq"
)
GPTQ_CONFIG = {**CONFIG, "quant_method": "gptq", "packing_format": None}
AUTOROUND = {
    "auto_gptq": (to_gptq(ASYMMETRIC), CONFIG),
    "auto_gptq_without_g_idx": ({k: v for k, v in to_gptq(ASYMMETRIC).items() if k != "g_idx"}, CONFIG),
    "gptqmodel": (to_gptq(ASYMMETRIC, version=2), {**CONFIG, "packing_format": "auto_round:gptqmodel"}),
    "auto_round": (to_gptq(ASYMMETRIC, version=2), {**CONFIG, "packing_format": "auto_round"}),
    "auto_awq": (to_awq(ASYMMETRIC), {**CONFIG, "packing_format": "auto_round:auto_awq"}),
    "gptq": (to_gptq(ASYMMETRIC), GPTQ_CONFIG),
    "gptq_v2": (to_gptq(ASYMMETRIC, version=2), {**GPTQ_CONFIG, "checkpoint_format": "gptq_v2"}),
    "awq": (to_awq(ASYMMETRIC), {**CONFIG, "quant_method": "awq"}),
    "awq_zero_point": (to_awq(ASYMMETRIC), {"bits": 4, "group_size": 32, "quant_method": "awq", "zero_point": True}),
}


@pytest.mark.parametrize("name", AUTOROUND)
def test_autoround(name: str) -> None:
    tensors, config = AUTOROUND[name]
    weight = from_autoround(tensors, config)
    assert torch.equal(int4_dequantize(weight), int4_dequantize(ASYMMETRIC))
    assert not weight.symmetric


def test_autoround_symmetric() -> None:
    weight = from_autoround(to_gptq(SYMMETRIC), {**CONFIG, "sym": True})
    assert weight.symmetric and torch.equal(weight.qweight, SYMMETRIC.qweight)


# -- errors -----------------------------------------------------------------------------------------------------------
def with_bad_scale(scales: Tensor, value: float) -> Tensor:
    return scales.clone().index_put_((torch.tensor(2), torch.tensor(5)), torch.tensor(value, dtype=scales.dtype))


GPTQ = {**to_gptq(ASYMMETRIC), "group_size": 32}
AWQ = {**to_awq(ASYMMETRIC), "group_size": 32}
COMPRESSED = {**to_compressed_tensors(ASYMMETRIC), "group_size": 32}
G_IDX = GPTQ["g_idx"]
TWICE = G_IDX.clone().index_fill_(0, torch.tensor([40]), 0)
FLOATS = "float16 or bfloat16 or float32"
IMPORT_ERRORS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "gptq_qweight_none": (from_gptq, dict(qweight=None), "qweight: want a tensor; got None"),
    "gptq_qweight_rank": (
        from_gptq,
        dict(qweight=G_IDX),
        "qweight: want (K/8, N) int32, strided, on cpu; got (96,) int32",
    ),
    "gptq_qweight_dtype": (
        from_gptq,
        dict(qweight=GPTQ["qweight"].long()),
        "qweight: want (K/8, N) int32, strided, on cpu; got (12, 16) int64",
    ),
    "gptq_qweight_empty": (
        from_gptq,
        dict(qweight=GPTQ["qweight"][:0]),
        "qweight: want (K/8, N) int32, strided, on cpu; got (0, 16) int32",
    ),
    "gptq_qweight_columns": (
        from_gptq,
        dict(qweight=GPTQ["qweight"][:, 1:]),
        "qweight: want (K/8, N) with N a multiple of 8; got (12, 15) int32",
    ),
    "gptq_scales_shape": (
        from_gptq,
        dict(scales=GPTQ["scales"].T),
        f"scales: want (3, 16) {FLOATS}, strided, on cpu; got (16, 3) float16",
    ),
    "gptq_scales_dtype": (
        from_gptq,
        dict(scales=GPTQ["scales"].double()),
        f"scales: want (3, 16) {FLOATS}, strided, on cpu; got (3, 16) float64",
    ),
    "gptq_scales_meta": (
        from_gptq,
        dict(scales=GPTQ["scales"].to("meta")),
        f"scales: want (3, 16) {FLOATS}, strided, on cpu; got (3, 16) float16 on meta",
    ),
    "gptq_scales_nan": (
        from_gptq,
        dict(scales=with_bad_scale(GPTQ["scales"], torch.nan)),
        "scales: want finite values; got nan at [2, 5]",
    ),
    "gptq_scales_inf": (
        from_gptq,
        dict(scales=with_bad_scale(GPTQ["scales"], -torch.inf)),
        "scales: want finite values; got -inf at [2, 5]",
    ),
    "gptq_qzeros_shape": (
        from_gptq,
        dict(qzeros=GPTQ["qzeros"][:2]),
        "qzeros: want (3, 2) int32, strided, on cpu; got (2, 2) int32",
    ),
    "gptq_g_idx_shape": (
        from_gptq,
        dict(g_idx=G_IDX[1:]),
        "g_idx: want (96,) int32 or int64, strided, on cpu; got (95,) int32",
    ),
    "gptq_g_idx_dtype": (
        from_gptq,
        dict(g_idx=G_IDX.float()),
        "g_idx: want (96,) int32 or int64, strided, on cpu; got (96,) float32",
    ),
    "gptq_g_idx_high": (from_gptq, dict(g_idx=G_IDX + 1), "g_idx: want values in 0..2; got 3 at [64]"),
    "gptq_g_idx_low": (from_gptq, dict(g_idx=G_IDX - 1), "g_idx: want values in 0..2; got -1 at [0]"),
    "gptq_g_idx_count": (
        from_gptq,
        dict(g_idx=TWICE),
        "g_idx: want 32 columns in every group (the last of 3 may have fewer); got 33 in group 0",
    ),
    "gptq_group_size": (
        from_gptq,
        dict(group_size=24),
        "group_size: want -1 or a positive multiple of 16 (32, 64, 128); got 24",
    ),
    "gptq_version": (from_gptq, dict(version=3), "version: want 1 or 2; got 3"),
    "gptq_symmetric": (from_gptq, dict(symmetric=True), "qzeros: want zero points of 8 (symmetric=True); got"),
    "gptq_symmetric_type": (from_gptq, dict(symmetric=1), "symmetric: want True, False or None; got 1"),
    "awq_qweight": (
        from_awq,
        dict(qweight=GPTQ["scales"]),
        "qweight: want (K, N/8) int32, strided, on cpu; got (3, 16) float16",
    ),
    "awq_qzeros": (
        from_awq,
        dict(qzeros=AWQ["qzeros"][:1]),
        "qzeros: want (3, 2) int32, strided, on cpu; got (1, 2) int32",
    ),
    "awq_scales": (
        from_awq,
        dict(scales=AWQ["scales"][:, :8]),
        f"scales: want (3, 16) {FLOATS}, strided, on cpu; got (3, 8) float16",
    ),
    "awq_scales_nan": (
        from_awq,
        dict(scales=with_bad_scale(AWQ["scales"], torch.inf)),
        "scales: want finite values; got inf at [2, 5]",
    ),
    "ct_shape_type": (from_compressed_tensors, dict(weight_shape=[16, 96]), "weight_shape: want a tensor; got list"),
    "ct_shape_size": (
        from_compressed_tensors,
        dict(weight_shape=torch.tensor([16])),
        "weight_shape: want (2,) int32 or int64, strided, on cpu; got (1,) int64",
    ),
    "ct_shape_values": (
        from_compressed_tensors,
        dict(weight_shape=torch.tensor([16, 97])),
        "weight_shape: want N, K with weight_packed (N, ceil(K/8)); got [16, 97] for (16, 12)",
    ),
    "ct_scale": (
        from_compressed_tensors,
        dict(weight_scale=COMPRESSED["weight_scale"][:, :1]),
        f"weight_scale: want (16, 3) {FLOATS}, strided, on cpu; got (16, 1) float16",
    ),
    "ct_zero_point": (
        from_compressed_tensors,
        dict(weight_zero_point=COMPRESSED["weight_zero_point"].T),
        "weight_zero_point: want (2, 3) int32, strided, on cpu; got (3, 2) int32",
    ),
    "ct_g_idx": (
        from_compressed_tensors,
        dict(weight_g_idx=G_IDX - G_IDX - 1),
        "weight_g_idx: want values in 0..2; got -1 at [0]",
    ),
}
GOOD = {from_gptq: GPTQ, from_awq: AWQ, from_compressed_tensors: COMPRESSED}
ALL_ZERO = Int4Weight.pack(_q, _s, torch.zeros_like(_z), group_size=32)
ALL_SIXTEEN = Int4Weight.pack(_q, _s, torch.full_like(_z, 16), group_size=32)
ODD = make_inputs(1, 15, 97, group_size=32, symmetric=True)[1]
EXPORT_ERRORS: dict[str, tuple[Any, Any, dict[str, Any], str]] = {
    "gptq_dense": (
        to_gptq,
        torch.ones(2),
        {},
        "weight: want a plain Int4Weight (export the experts of a stack one by one); got (2,) float32",
    ),
    "gptq_stack": (
        to_gptq,
        Int4Weight.stack([SYMMETRIC]),
        {},
        "weight: want a plain Int4Weight (export the experts of a stack one by one); got Int4Weight(1 x 16",
    ),
    "gptq_version": (to_gptq, SYMMETRIC, dict(version="1"), "version: want 1 or 2; got 1"),
    "gptq_rows": (to_gptq, ODD, {}, "weight: want out_features a multiple of 8; got 15"),
    "gptq_columns": (to_gptq, ODD.slice_out(0, 8), {}, "weight: want in_features a multiple of 8; got 97"),
    "gptq_v1_zero": (
        to_gptq,
        ALL_ZERO,
        {},
        "weight: want zero points in 1..16, which the format can hold; got 0 at [n, group] = [0, 0]",
    ),
    "gptq_v2_sixteen": (
        to_gptq,
        ALL_SIXTEEN,
        dict(version=2),
        "weight: want zero points in 0..15, which the format can hold; got 16 at [n, group] = [0, 0]",
    ),
    "gptq_slice": (
        to_gptq,
        SYMMETRIC.slice_in(16, 96),
        {},
        "weight: want a weight that starts at a group (first_k a multiple of 32); got first_k 16",
    ),
    "awq_rows": (to_awq, ODD, {}, "weight: want out_features a multiple of 8; got 15"),
    "awq_act_order": (
        to_awq,
        ORDERED,
        {},
        "weight: want no act-order: the format has no g_idx; got an act-order weight",
    ),
    "awq_sixteen": (
        to_awq,
        ALL_SIXTEEN,
        {},
        "weight: want zero points in 0..15, which the format can hold; got 16 at [n, group] = [0, 0]",
    ),
    "ct_sixteen": (
        to_compressed_tensors,
        ALL_SIXTEEN,
        {},
        "weight: want zero points in 0..15, which the format can hold; got 16 at",
    ),
    "ct_slice": (
        to_compressed_tensors,
        SYMMETRIC.slice_in(48, 96),
        {},
        "weight: want a weight that starts at a group (first_k a multiple of 32); got first_k 48",
    ),
}
AUTOROUND_ERRORS: dict[str, tuple[Any, Any, str]] = {
    "tensors": ([], {}, "tensors: want a mapping; got list"),
    "config": ({}, None, "quantization_config: want a mapping; got None"),
    "bits": ({}, dict(bits=8), "quantization_config['bits']: want 4; got 8"),
    "bits_float": ({}, dict(bits=4.0), "quantization_config['bits']: want 4; got 4.0"),
    "data_type": ({}, dict(data_type="nv_fp4"), "quantization_config['data_type']: want 'int' or None; got nv_fp4"),
    "act_bits": ({}, dict(act_bits=8), "quantization_config['act_bits']: want None or 16 or 32; got 8"),
    "quant_method": (
        {},
        dict(quant_method="gguf"),
        "quantization_config['quant_method']: want 'auto-round' or 'gptq' or 'awq'; got gguf",
    ),
    "packing_format": (
        {},
        dict(packing_format="auto_round:llm_compressor"),
        "quantization_config['packing_format']: want 'auto_round:auto_gptq' or",
    ),
    "sym": ({}, dict(sym=None), "quantization_config['sym']: want True or False; got None"),
    "missing": ({}, {}, "qweight: want a tensor; got None"),
    "group_size": (
        dict(qweight=G_IDX, qzeros=G_IDX, scales=G_IDX),
        dict(group_size=[128, 128]),
        "group_size: want -1 or a positive multiple of 16 (32, 64, 128); got list",
    ),
    "awq_g_idx": (
        {**AWQ, "g_idx": G_IDX},
        dict(packing_format="auto_round:auto_awq"),
        "g_idx: want no g_idx: AWQ has no act-order; got (96,) int32",
    ),
}


@pytest.mark.parametrize("name", IMPORT_ERRORS)
def test_import_refuses(name: str) -> None:
    function, change, message = IMPORT_ERRORS[name]
    with pytest.raises(ValueError, match="^" + re.escape(f"{function.__name__}: {message}")):
        function(**{**GOOD[function], **change})


@pytest.mark.parametrize("name", EXPORT_ERRORS)
def test_export_refuses(name: str) -> None:
    function, weight, kwargs, message = EXPORT_ERRORS[name]
    with pytest.raises(ValueError, match="^" + re.escape(f"{function.__name__}: {message}")):
        function(weight, **kwargs)


@pytest.mark.parametrize("name", AUTOROUND_ERRORS)
def test_autoround_refuses(name: str) -> None:
    tensors, change, message = AUTOROUND_ERRORS[name]
    config = {**CONFIG, **change} if isinstance(change, dict) else change
    with pytest.raises(ValueError, match="^" + re.escape(f"from_autoround: {message}")):
        from_autoround(tensors, config)
