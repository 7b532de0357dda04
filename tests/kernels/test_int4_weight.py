"""Int4Weight: the layout of csrc/int4/layout.h, packing, slices, stacks, persistence, and every documented error."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from m3kernels.int4 import Int4Weight, int4_dequantize
from m3kernels.int4.reference import make_inputs
from m3kernels.int4.types import pack_groups, pack_nibbles, unpack_groups, unpack_nibbles

quick = settings(max_examples=40, deadline=None)
GROUP_SIZES = (-1, 16, 32, 48, 64, 128)


def random_weight(n: int, k: int, group_size: int = 64, **kwargs: object) -> Int4Weight:
    return make_inputs(1, n, k, group_size=group_size, **kwargs)[1]  # type: ignore[arg-type]


def same(a: Int4Weight, b: Int4Weight) -> bool:
    fields = [(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a)]
    return all(
        torch.equal(x, y) if isinstance(x, Tensor) and isinstance(y, Tensor) else x is y or x == y for x, y in fields
    )


@st.composite
def weights(draw: st.DrawFn, experts: bool = False) -> Int4Weight:
    return random_weight(
        draw(st.integers(1, 150)),
        draw(st.integers(1, 300)),
        draw(st.sampled_from(GROUP_SIZES)),
        symmetric=draw(st.booleans()),
        act_order=draw(st.booleans()),
        experts=draw(st.integers(1, 3)) if experts else None,
        scale_dtype=draw(st.sampled_from((torch.float16, torch.bfloat16, torch.float32))),
        seed=draw(st.integers(0, 2**31 - 1)),
    )


# -- layout -----------------------------------------------------------------------------------------------------------
def nibble_by_layout_h(qweight: Tensor, n: int, k: int) -> int:
    """Nibble (n, k), found with the index maps of csrc/int4/layout.h."""
    tile = qweight[n // 64, k // 16].view(torch.uint8)
    a, h, g = n % 64 // 16, n % 16 // 8, n % 8
    t, o, e = k % 8 // 2, k % 2, k % 16 // 8
    byte = int(tile[t * 128 + ((g ^ (2 * t)) * 16) + 4 * a + (2 * o + e)])
    return byte >> 4 if h else byte & 15


def test_tiles_are_those_of_layout_h() -> None:
    q = torch.randint(0, 16, (70, 37), dtype=torch.uint8)
    packed = pack_nibbles(q)
    assert packed.shape == (2, 3, 128)
    read = torch.tensor([[nibble_by_layout_h(packed, n, k) for k in range(37)] for n in range(70)])
    assert torch.equal(read, q.long())


def test_groups_are_in_position_order() -> None:
    values = torch.arange(70 * 3).reshape(70, 3)
    packed = pack_groups(values)
    read = torch.tensor(
        [
            [int(packed[n // 64, g, 32 * (n >> 3 & 1) + 4 * (n & 7) + (n % 64 >> 4)]) for g in range(3)]
            for n in range(70)
        ]
    )
    assert torch.equal(read, values)


def test_padding_is_zero() -> None:
    packed, groups = pack_nibbles(torch.full((1, 1), 15, dtype=torch.uint8)), pack_groups(torch.ones(1, 1))
    assert packed.view(torch.uint8).sum() == 15 and groups.sum() == 1


def test_a_masked_word_is_a_pair_of_columns() -> None:
    q = torch.randint(0, 16, (64, 16), dtype=torch.uint8)
    words = pack_nibbles(q).view(-1)
    for g, t, a in ((0, 0, 0), (5, 3, 2), (7, 1, 3)):
        word = int(words[t * 32 + (g ^ (2 * t)) * 4 + a])
        row, column = 16 * a + g, 2 * t
        pairs = [(row, column), (row + 8, column), (row, column + 8), (row + 8, column + 8)]
        for shift, (n, k) in zip((0, 4, 8, 12), pairs, strict=True):
            masked = word >> shift & 0x000F000F
            assert (masked & 0xFFFF, masked >> 16) == (int(q[n, k]), int(q[n, k + 1]))


# -- pack, unpack, dequantize -----------------------------------------------------------------------------------------
@quick
@given(n=st.integers(1, 200), k=st.integers(1, 200), lead=st.sampled_from(((), (1,), (3,))), seed=st.integers(0, 99))
def test_pack_and_unpack_are_inverse(n: int, k: int, lead: tuple[int, ...], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randint(0, 16, (*lead, n, k), dtype=torch.uint8, generator=generator)
    values = torch.randn(*lead, n, 3, generator=generator)
    assert torch.equal(unpack_nibbles(pack_nibbles(q), n, k), q)
    assert torch.equal(unpack_groups(pack_groups(values), n), values)


@quick
@given(weight=weights(experts=True))
def test_unpack_gives_what_was_packed(weight: Int4Weight) -> None:
    q, scales, zeros = weight.unpack()
    stored = None if weight.symmetric else zeros
    again = Int4Weight.pack(q, scales, stored, group_size=weight.group_size, perm=weight.perm)
    assert same(again, weight)
    if weight.symmetric:
        assert (zeros == 8).all()


@quick
@given(weight=weights())
def test_dequantize_is_the_formula(weight: Int4Weight) -> None:
    q, scales, zeros = weight.unpack()
    group_size = weight.in_features if weight.group_size == -1 else weight.group_size
    group = torch.arange(weight.in_features) // group_size
    stored = (q.double() - zeros[:, group].double()) * scales[:, group].double()
    dense = torch.empty_like(stored)
    dense[:, torch.arange(weight.in_features) if weight.perm is None else weight.perm.long()] = stored
    assert torch.equal(int4_dequantize(weight, torch.float32), dense.float())
    assert torch.equal(int4_dequantize(weight), dense.float().to(scales.dtype))


# -- slices and stacks ------------------------------------------------------------------------------------------------
@quick
@given(weight=weights(experts=True), data=st.data())
def test_slice_out_is_the_slice_of_the_dense_weight(weight: Int4Weight, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, weight.out_features - 1))
    stop = data.draw(st.integers(start + 1, weight.out_features))
    part = weight.slice_out(start, stop)
    assert part.out_features == stop - start
    assert torch.equal(int4_dequantize(part), int4_dequantize(weight)[..., start:stop, :])


@quick
@given(weight=weights(experts=True), data=st.data())
def test_slice_in_is_the_slice_of_the_dense_weight(weight: Int4Weight, data: st.DataObject) -> None:
    weight = weight.without_perm()
    first = data.draw(st.integers(0, (weight.in_features - 1) // 16)) * 16
    part = weight.slice_in(first, weight.in_features)
    start = data.draw(st.integers(0, (part.in_features - 1) // 16)) * 16
    stop = data.draw(st.integers(start + 1, part.in_features))
    twice = part.slice_in(start, stop)
    assert torch.equal(int4_dequantize(twice), int4_dequantize(weight)[..., first + start : first + stop])


@quick
@given(weight=weights(), data=st.data())
def test_select_out_is_index_select(weight: Int4Weight, data: st.DataObject) -> None:
    rows = torch.tensor(data.draw(st.lists(st.integers(0, weight.out_features - 1), min_size=1, max_size=90)))
    assert torch.equal(int4_dequantize(weight.select_out(rows)), int4_dequantize(weight)[rows])


@quick
@given(weight=weights(experts=True), data=st.data())
def test_stack_and_expert_are_inverse(weight: Int4Weight, data: st.DataObject) -> None:
    experts = [weight.expert(index) for index in range(weight.num_experts or 0)]
    assert same(Int4Weight.stack(experts), weight)
    start = data.draw(st.integers(0, len(experts) - 1))
    assert same(weight.slice_experts(start, len(experts)).expert(0), experts[start])


def test_folding_act_order_into_the_producer() -> None:
    producer, consumer = random_weight(96, 80), random_weight(40, 96, act_order=True)
    assert consumer.perm is not None
    x = torch.randn(3, 80)
    direct = (x @ int4_dequantize(producer, torch.float32).T) @ int4_dequantize(consumer, torch.float32).T
    folded = producer.select_out(consumer.perm)
    hidden = x @ int4_dequantize(folded, torch.float32).T
    assert torch.allclose(
        hidden @ int4_dequantize(consumer.without_perm(), torch.float32).T, direct, rtol=1e-5, atol=1e-5
    )


def test_whole_tiles_are_views() -> None:
    weight = random_weight(256, 256)
    parts = (weight.slice_out(64, 192), weight.slice_out(0, 100))
    assert all(part.scales.untyped_storage().data_ptr() == weight.scales.untyped_storage().data_ptr() for part in parts)


# -- persistence ------------------------------------------------------------------------------------------------------
@quick
@given(weight=weights(experts=True), prefix=st.sampled_from(("", "layers.0.")))
def test_state_dict_round_trip(weight: Int4Weight, prefix: str) -> None:
    assert same(Int4Weight.from_state_dict(weight.state_dict(prefix), prefix), weight)


def test_state_dict_keeps_a_slice_that_starts_inside_a_group() -> None:
    part = random_weight(40, 192, 128).slice_in(48, 160)
    again = Int4Weight.from_state_dict(part.state_dict())
    assert again.first_k == 48 and same(again, part)


# -- facts ------------------------------------------------------------------------------------------------------------
def test_facts_of_a_weight() -> None:
    weight = random_weight(100, 200, 64, symmetric=True)
    assert (weight.num_experts, weight.symmetric, weight.num_groups) == (None, True, 4)
    assert weight.nbytes == 2 * 13 * 512 + 2 * 4 * 64 * 2
    assert repr(weight) == "Int4Weight(100 x 200, group 64, symmetric, torch.float16 scales)"


# -- errors -----------------------------------------------------------------------------------------------------------
Q, S, Z = (
    torch.zeros(4, 40, dtype=torch.uint8),
    torch.ones(4, 2, dtype=torch.float16),
    torch.zeros(4, 2, dtype=torch.uint8),
)
W = Int4Weight.pack(Q, S, Z, group_size=32)
STACK = Int4Weight.stack([W, W])
ORDERED = dataclasses.replace(W, perm=torch.arange(40, dtype=torch.int32))
FIELDS = {f.name: getattr(W, f.name) for f in dataclasses.fields(W)}

PACK_ERRORS = {
    "q_dtype": (dict(q=Q.int()), "Int4Weight.pack: q: want (N, K) or (E, N, K) uint8, not empty; got (4, 40) int32"),
    "q_empty": (dict(q=Q[:0]), "Int4Weight.pack: q: want (N, K) or (E, N, K) uint8, not empty; got (0, 40) uint8"),
    "q_range": (dict(q=Q + 16), "Int4Weight.pack: q: want values in 0..15; got 16"),
    "group_size": (
        dict(group_size=20),
        "Int4Weight.pack: group_size: want -1 or a positive multiple of 16 (32, 64, 128); got 20",
    ),
    "scales_shape": (
        dict(scales=S[:, :1]),
        "Int4Weight.pack: scales: want (4, 2) float16, bfloat16 or float32; got (4, 1) float16",
    ),
    "scales_dtype": (
        dict(scales=S.double()),
        "Int4Weight.pack: scales: want (4, 2) float16, bfloat16 or float32; got (4, 2) float64",
    ),
    "zeros_dtype": (dict(zeros=Z.int()), "Int4Weight.pack: zeros: want (4, 2) uint8; got (4, 2) int32"),
    "zeros_range": (dict(zeros=Z + 17), "Int4Weight.pack: zeros: want values in 0..16; got 17"),
    "perm_shape": (dict(perm=torch.arange(39)), "Int4Weight.pack: perm: want (40,) int32; got (39,) int64"),
    "perm_repeats": (
        dict(perm=torch.zeros(40, dtype=torch.int32)),
        "Int4Weight.pack: perm: want a permutation of 0..39; got repeated or out-of-range values",
    ),
}
FIELD_ERRORS = {
    "out_features": (dict(out_features=0), "Int4Weight: out_features: want an int in 1 .. 2**31 - 1; got 0"),
    "in_features": (dict(in_features=True), "Int4Weight: in_features: want an int in 1 .. 2**31 - 1; got True"),
    "first_k": (dict(first_k=8), "Int4Weight: first_k: want a multiple of 16 in 0 .. 2**31 - 1; got 8"),
    "qweight": (
        dict(qweight=W.qweight[:, :2]),
        "Int4Weight: qweight: want (1, 3, 128) int32 on cpu; got (1, 2, 128) int32",
    ),
    "qweight_sparse": (
        dict(qweight=W.qweight.to_sparse()),
        "Int4Weight: qweight: want (1, 3, 128) int32 on cpu; got (1, 3, 128) int32 sparse_coo",
    ),
    "scales": (
        dict(scales=None),
        "Int4Weight: scales: want (1, 2, 64) float16 or bfloat16 or float32 on cpu; got None",
    ),
    "zeros": (dict(zeros=FIELDS["scales"]), "Int4Weight: zeros: want (1, 2, 64) uint8 on cpu; got (1, 2, 64) float16"),
    "perm": (dict(perm=torch.arange(40)), "Int4Weight: perm: want (40,) int32 on cpu; got (40,) int64"),
}
METHOD_ERRORS = {
    "slice_out": (
        lambda: W.slice_out(3, 3),
        "Int4Weight.slice_out: start, stop: want 0 <= start < stop <= 4; got (3, 3)",
    ),
    "slice_in_start": (lambda: W.slice_in(8, 40), "Int4Weight.slice_in: start: want a multiple of 16; got 8"),
    "slice_in_act_order": (lambda: ORDERED.slice_in(0, 16), "Int4Weight.slice_in: self: want no act-order permutation"),
    "select_out": (
        lambda: W.select_out(torch.tensor([4])),
        "Int4Weight.select_out: rows: want values in 0..3; got [4]",
    ),
    "select_out_dtype": (
        lambda: W.select_out(torch.tensor([0.5])),
        "Int4Weight.select_out: rows: want (R,) int32 or int64, not empty; got (1,) float32",
    ),
    "stack_nothing": (
        lambda: Int4Weight.stack([]),
        "Int4Weight.stack: weights: want one or more plain Int4Weight; got []",
    ),
    "stack_unlike": (
        lambda: Int4Weight.stack([W, ORDERED]),
        "Int4Weight.stack: weights[1]: want like weights[0], Int4Weight(4 x 40, group 32, asymmetric",
    ),
    "stack_one": (
        lambda: Int4Weight.stack(W),
        "Int4Weight.stack: weights: want a list of plain Int4Weight; got Int4Weight",
    ),  # type: ignore[arg-type]
    "expert_type": (lambda: STACK.expert("1"), "Int4Weight.expert: index: want 0 <= index < 2; got 1"),  # type: ignore[arg-type]
    "expert_of_plain": (lambda: W.expert(0), "Int4Weight.expert: index: want 0 <= index < 0; got 0"),
    "expert": (lambda: STACK.expert(2), "Int4Weight.expert: index: want 0 <= index < 2; got 2"),
    "slice_experts": (lambda: W.slice_experts(0, 1), "start, stop: want 0 <= start < stop <= 0; got (0, 1)"),
    "state_missing": (
        lambda: Int4Weight.from_state_dict({"meta": torch.zeros(4)}, ""),
        "Int4Weight.from_state_dict: qweight: want a strided tensor; got None",
    ),
    "state_meta": (
        lambda: Int4Weight.from_state_dict({**W.state_dict(), "meta": torch.zeros(3)}),
        "Int4Weight.from_state_dict: meta: want (4,) int64; got (3,) float32",
    ),
    "state_perm": (
        lambda: Int4Weight.from_state_dict({**W.state_dict(), "perm": torch.full((40,), 99, dtype=torch.int32)}),
        "Int4Weight.from_state_dict: perm: want a permutation of 0..39; got repeated or out-of-range values",
    ),
}


@pytest.mark.parametrize("name", PACK_ERRORS)
def test_pack_refuses(name: str) -> None:
    change, message = PACK_ERRORS[name]
    with pytest.raises(ValueError, match=re.escape(message)):
        Int4Weight.pack(**{**dict(q=Q, scales=S, zeros=Z, group_size=32), **change})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", FIELD_ERRORS)
def test_fields_refuse(name: str) -> None:
    change, message = FIELD_ERRORS[name]
    with pytest.raises(ValueError, match=re.escape(message)):
        Int4Weight(**{**FIELDS, **change})


@pytest.mark.parametrize("name", METHOD_ERRORS)
def test_methods_refuse(name: str) -> None:
    call, message = METHOD_ERRORS[name]
    with pytest.raises(ValueError, match=re.escape(message)):
        call()
