"""The INT4 ops in every room: values, error classes, gradients, opcheck, edge sizes, hostile memory, invariance."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from m3kernels.int4 import Int4Weight, int4_dequantize, int4_gemm, int4_grouped_gemm, int4_moe
from m3kernels.int4.ops import flat
from m3kernels.int4.reference import (
    ACTIVATION_ERROR,
    TOLERANCE,
    activation_blocks,
    gemm64,
    make_inputs,
    round_activations,
    stored_weight,
)
from m3kernels.int4.types import pack_groups, pack_nibbles
from m3kernels.testing import bitwise_equal, check_error, relative_error, surrounded_by_nan, uninitialized_is_nan

ROOMS = ("reference", "cpu")
every_room = pytest.mark.parametrize("backend", ROOMS, indirect=True)
every_room_and_triton = pytest.mark.parametrize("backend", (*ROOMS, "triton"), indirect=True)


def rooms_and_cases(cases: Iterable[str], triton: tuple[str, ...]) -> pytest.MarkDecorator:
    """Every case in every room, and a few in Triton's interpreter, which is slow (more in test_int4_triton.py)."""
    pairs = [(room, case) for room in ROOMS for case in cases] + [("triton", case) for case in triton]
    return pytest.mark.parametrize(("backend", "case"), pairs, indirect=["backend"])


every_mode = pytest.mark.parametrize("activations", ("exact", "int16", "int8"))
every_dtype = pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
rounded_modes = pytest.mark.parametrize("activations", ("int16", "int8"))

CASES: dict[str, dict[str, Any]] = {
    "one_by_one": dict(m=1, n=1, k=1, group_size=32),
    "one_tile": dict(m=2, n=64, k=16, group_size=16),
    "partial_tiles": dict(m=3, n=77, k=205, group_size=64),
    "partial_group": dict(m=4, n=130, k=176, group_size=128),
    "group_32": dict(m=5, n=65, k=160, group_size=32),
    "group_48": dict(m=7, n=63, k=151, group_size=48),
    "group_128": dict(m=16, n=128, k=384, group_size=128),
    "group_192": dict(m=3, n=40, k=400, group_size=192),
    "per_channel": dict(m=6, n=96, k=337, group_size=-1),
    "symmetric": dict(m=8, n=96, k=256, group_size=64, symmetric=True),
    "act_order": dict(m=9, n=72, k=200, group_size=64, act_order=True),
    "bias": dict(m=4, n=70, k=130, group_size=64, bias=True),
    "bf16_scales": dict(m=5, n=66, k=144, group_size=64, scale_dtype=torch.bfloat16),
    "fp32_scales": dict(m=5, n=66, k=144, group_size=64, scale_dtype=torch.float32, symmetric=True),
    "rows_37": dict(m=37, n=80, k=272, group_size=128, act_order=True, bias=True),
    "rows_130": dict(m=130, n=72, k=160, group_size=32, symmetric=True),
    "smollm2_down": dict(m=2, n=576, k=1536, group_size=64),
}
every_case = pytest.mark.parametrize("case", CASES)


def dense(weight: Int4Weight) -> Tensor:
    """W (..., N, K) fp64 in original column order."""
    stored = stored_weight(weight)
    if weight.perm is None:
        return stored
    inverse = weight.perm.long().argsort(-1).unsqueeze(-2)
    return stored.gather(-1, inverse.expand_as(stored))


def exact64(x: Tensor, weight: Int4Weight, bias: Tensor | None = None) -> Tensor:
    y = x.double() @ dense(weight).T
    return y if bias is None else y + bias.double()


def torch_linear(x: Tensor, weight: Int4Weight, bias: Tensor | None = None) -> Tensor:
    return torch.nn.functional.linear(x, dense(weight).to(x.dtype), bias)


def rounded(x: Tensor, weight: Int4Weight, activations: str) -> Tensor:
    """x as an integer mode sees it, fp64, in original column order."""
    if weight.perm is not None:
        order = weight.perm.long()
        values = round_activations(x[:, order], blocks_of(weight), activations)
        return torch.empty_like(values).index_copy_(1, order, values)
    return round_activations(x, blocks_of(weight), activations)


def blocks_of(weight: Int4Weight) -> list[tuple[int, int, int]]:
    return activation_blocks(weight.in_features, weight.group_size, weight.first_k)


# -- values -----------------------------------------------------------------------------------------------------------
def test_reference_is_the_formula() -> None:
    x, weight, bias = make_inputs(2, 5, 40, group_size=16, act_order=True, bias=True)
    q, scales, zeros = weight.unpack()
    assert weight.perm is not None and bias is not None
    y = bias.double().repeat(2, 1)
    for m, n, j in torch.cartesian_prod(torch.arange(2), torch.arange(5), torch.arange(40)).tolist():
        value = (int(q[n, j]) - int(zeros[n, j // 16])) * float(scales[n, j // 16])
        y[m, n] += float(x[m, int(weight.perm[j])]) * value
    assert torch.allclose(gemm64(x, weight, "exact") + bias.double(), y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("activations", "limit"), (("int16", 32767), ("int8", 127)))
def test_rounded_activations_lie_on_the_grid_of_their_block(activations: str, limit: int) -> None:
    x = torch.randn(5, 176)
    blocks = activation_blocks(176, 96, 16)
    assert blocks == [(0, 80, 0), (80, 176, 1)]
    y = round_activations(x, blocks, activations)
    for start, stop, _ in blocks:
        step = (x[:, start:stop].abs().amax(1, keepdim=True) / limit).double()
        multiples = y[:, start:stop] / step
        assert (multiples - multiples.round()).abs().max() < 1e-9
        assert ((y - x.double())[:, start:stop].abs() <= step * 0.51).all()


@pytest.mark.parametrize(
    ("size", "group_size", "first_k", "blocks"),
    (
        (300, 128, 0, [(0, 128, 0), (128, 256, 1), (256, 300, 2)]),
        (300, -1, 0, [(0, 128, 0), (128, 256, 0), (256, 300, 0)]),
        (200, 192, 0, [(0, 128, 0), (128, 192, 0), (192, 200, 1)]),
        (100, 128, 48, [(0, 80, 0), (80, 100, 1)]),
    ),
)
def test_activation_blocks(size: int, group_size: int, first_k: int, blocks: list[tuple[int, int, int]]) -> None:
    assert activation_blocks(size, group_size, first_k) == blocks


@every_dtype
@rooms_and_cases(CASES, triton=("partial_tiles",))
def test_gemm_exact(backend: str, dtype: torch.dtype, case: str) -> None:
    x, weight, bias = make_inputs(**CASES[case], dtype=dtype)
    y = int4_gemm(x, weight, bias, activations="exact")
    check_error(y, exact64(x, weight, bias), torch_linear(x, weight, bias), TOLERANCE)


@every_room
@every_dtype
@rounded_modes
@every_case
def test_gemm_on_rounded_activations(backend: str, dtype: torch.dtype, activations: str, case: str) -> None:
    x, weight, bias = make_inputs(**CASES[case], dtype=dtype)
    grid = rounded(x, weight, activations)
    y = int4_gemm(x, weight, bias, activations=activations)
    check_error(y, exact64(grid, weight, bias), torch_linear(grid.to(dtype), weight, bias), TOLERANCE)


@every_room
@rounded_modes
@every_case
def test_rounding_error_is_as_stated(backend: str, activations: str, case: str) -> None:
    x, weight, bias = make_inputs(**CASES[case])
    y = int4_gemm(x, weight, bias, activations=activations)
    assert relative_error(y, exact64(x, weight, bias)).rms <= ACTIVATION_ERROR[activations]


@every_room
def test_auto_errs_less_than_1e_4(backend: str) -> None:
    x, weight, bias = make_inputs(33, 200, 1000, bias=True)
    assert relative_error(int4_gemm(x, weight, bias), exact64(x, weight, bias)).rms < 1e-4


@every_room
@every_mode
def test_slice_that_starts_inside_a_group(backend: str, activations: str) -> None:
    x, whole, _ = make_inputs(5, 70, 400, group_size=128)
    part = whole.slice_in(48, 349)
    x = x[:, 48:349].contiguous()
    grid = x.double() if activations == "exact" else rounded(x, part, activations)
    expected = grid @ dense(whole)[:, 48:349].T
    check_error(int4_gemm(x, part, activations=activations), expected, torch_linear(grid.float(), part), TOLERANCE)


@every_room
def test_tensor_parallel_shards_add_up(backend: str) -> None:
    x, whole, _ = make_inputs(4, 100, 384, group_size=128)
    shards = [(start, start + 96) for start in range(0, 384, 96)]
    parts = [int4_gemm(x[:, a:b], whole.slice_in(a, b), activations="exact") for a, b in shards]
    y = torch.stack(parts).sum(0)
    check_error(y, exact64(x, whole), torch_linear(x, whole), TOLERANCE)
    columns = [int4_gemm(x, whole.slice_out(a, b), activations="exact") for a, b in ((0, 64), (64, 90), (90, 100))]
    check_error(torch.cat(columns, 1), exact64(x, whole), torch_linear(x, whole), TOLERANCE)


# -- rows that rounding would hurt ------------------------------------------------------------------------------------
@every_room
@pytest.mark.parametrize("factor", (1e5, 1e8, 1e20))
def test_a_row_with_an_outlier_is_exact(backend: str, factor: float) -> None:
    x, weight, _ = make_inputs(6, 90, 256, group_size=64)
    x[3, 17] = factor
    y = int4_gemm(x, weight, activations="int16")
    check_error(y[3], exact64(x[3], weight), torch_linear(x[3], weight), TOLERANCE)


@every_room
@pytest.mark.parametrize("factor", (1000.0, 2000.0, 5000.0))
def test_int16_error_with_a_channel_of_outliers(backend: str, factor: float) -> None:
    x, weight, _ = make_inputs(6, 90, 256, group_size=64)
    x[:, 17] *= factor
    y = int4_gemm(x, weight, activations="int16")
    grid = rounded(x, weight, "int16")
    check_error(y, exact64(grid, weight), torch_linear(grid.float(), weight), TOLERANCE)


@every_room
@rounded_modes
def test_zero_rows_and_tiny_rows(backend: str, activations: str) -> None:
    x, weight, bias = make_inputs(4, 70, 200, group_size=64, bias=True)
    x[0], x[1], x[2, :64] = 0.0, x[1] * 1e-33, 0.0
    grid = rounded(x, weight, activations)
    y = int4_gemm(x, weight, bias, activations=activations)
    assert torch.equal(y[0], bias) if bias is not None else False
    check_error(y, exact64(grid, weight, bias), torch_linear(grid.float(), weight, bias), TOLERANCE)


@every_room
@every_mode
@pytest.mark.parametrize("value", (torch.nan, torch.inf, -torch.inf))
def test_what_is_not_finite_stays_in_its_row(backend: str, activations: str, value: float) -> None:
    x, weight, _ = make_inputs(9, 70, 200, group_size=64)
    clean = int4_gemm(x, weight, activations=activations)
    x[4, 199] = value
    y = int4_gemm(x, weight, activations=activations)
    others = [0, 1, 2, 3, 5, 6, 7, 8]
    assert bitwise_equal(y[others], clean[others])
    assert not y[4].isfinite().any()


# -- row-invariance and determinism -----------------------------------------------------------------------------------
@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@every_room
@every_mode
@every_dtype
def test_gemm_is_row_invariant(
    backend: str, activations: str, dtype: torch.dtype, threads: Callable[[int], None]
) -> None:
    x, weight, bias = make_inputs(37, 150, 300, group_size=64, dtype=dtype, bias=True)
    threads(1)
    y = int4_gemm(x, weight, bias, activations=activations)
    alone = torch.cat([int4_gemm(row[None], weight, bias, activations=activations) for row in x])
    assert bitwise_equal(alone, y)
    order = torch.randperm(37)
    assert bitwise_equal(int4_gemm(x[order], weight, bias, activations=activations), y[order])
    neighbours = torch.cat((torch.randn(92, 300, dtype=dtype), x[5:20], torch.full((3, 300), 6e4, dtype=dtype)))
    assert bitwise_equal(int4_gemm(neighbours, weight, bias, activations=activations)[92:107], y[5:20])
    threads(2)
    assert bitwise_equal(int4_gemm(x, weight, bias, activations=activations), y)
    threads(5)
    assert bitwise_equal(int4_gemm(x, weight, bias, activations=activations), y)


@every_room
@every_mode
@pytest.mark.parametrize("m", (1, 2, 3, 4, 5, 7, 8, 9, 12, 15, 16, 17, 31, 33, 63, 65, 129))
def test_every_number_of_rows_gives_the_same_rows(backend: str, activations: str, m: int) -> None:
    x, weight, _ = make_inputs(129, 65, 144, group_size=48)
    whole = int4_gemm(x, weight, activations=activations)
    assert bitwise_equal(int4_gemm(x[:m], weight, activations=activations), whole[:m])


@every_room_and_triton
def test_gemm_is_deterministic(backend: str) -> None:
    x, weight, _ = make_inputs(5, 70, 200, group_size=64)
    assert bitwise_equal(int4_gemm(x, weight), int4_gemm(x, weight))


@every_room
@every_mode
def test_grouped_rows_are_those_of_the_plain_gemm(backend: str, activations: str) -> None:
    x, weight, _ = make_inputs(23, 70, 200, group_size=64, experts=4)
    bounds = [0, 5, 5, 6, 23]
    y = int4_grouped_gemm(x, weight, torch.tensor(bounds), activations=activations)
    plain = [int4_gemm(x[bounds[e] : bounds[e + 1]], weight.expert(e), activations=activations) for e in range(4)]
    assert bitwise_equal(y, torch.cat(plain))


@every_room
@every_mode
def test_moe_is_row_invariant(backend: str, activations: str, threads: Callable[[int], None]) -> None:
    x, w13, w2, ids, scores = moe_inputs(37, 48, 80, 5, 3)
    threads(1)
    y = int4_moe(x, w13, w2, ids, scores, activations=activations)
    alone = [
        int4_moe(x[t : t + 1], w13, w2, ids[t : t + 1], scores[t : t + 1], activations=activations) for t in range(37)
    ]
    assert bitwise_equal(torch.cat(alone), y)
    threads(2)
    order = torch.randperm(37)
    assert bitwise_equal(int4_moe(x[order], w13, w2, ids[order], scores[order], activations=activations), y[order])


# -- shapes, strides, edges -------------------------------------------------------------------------------------------
@every_room_and_triton
def test_no_rows(backend: str) -> None:
    x, weight, bias = make_inputs(0, 70, 200, bias=True)
    assert int4_gemm(x, weight, bias).shape == (0, 70)
    assert int4_gemm(x.view(3, 0, 200), weight).shape == (3, 0, 70)


@every_room
@every_mode
def test_leading_dimensions(backend: str, activations: str) -> None:
    x, weight, bias = make_inputs(12, 70, 200, bias=True)
    flat_y = int4_gemm(x, weight, bias, activations=activations)
    assert bitwise_equal(
        int4_gemm(x.view(2, 3, 2, 200), weight, bias, activations=activations), flat_y.view(2, 3, 2, 70)
    )
    assert bitwise_equal(int4_gemm(x[0], weight, bias, activations=activations), flat_y[0])


@every_room
@every_mode
def test_strides_do_not_matter(backend: str, activations: str) -> None:
    x, weight, bias = make_inputs(12, 70, 200, bias=True)
    y = int4_gemm(x, weight, bias, activations=activations)
    column_major = x.T.contiguous().T
    wide = torch.randn(12, 400)[:, ::2].copy_(x)
    strided_bias = torch.randn(140)[::2].copy_(bias) if bias is not None else None
    assert bitwise_equal(int4_gemm(column_major, weight, strided_bias, activations=activations), y)
    assert bitwise_equal(int4_gemm(wide, weight, bias, activations=activations), y)
    assert bitwise_equal(int4_gemm(x[3].expand(4, 200), weight, bias, activations=activations), y[[3, 3, 3, 3]])


@every_room
def test_results_share_no_storage_with_their_inputs(backend: str) -> None:
    x, weight, _ = make_inputs(2, 64, 64, group_size=64)
    before = x.clone()
    int4_gemm(x, weight).zero_()
    int4_dequantize(weight).zero_()
    assert torch.equal(x, before) and int4_dequantize(weight).any()


# -- hostile memory ---------------------------------------------------------------------------------------------------
def with_poisoned_padding(weight: Int4Weight) -> Int4Weight:
    """The same weight with nan scales, zeros of 255 and nibbles of 15 wherever the layout pads."""
    q, scales, zeros = weight.unpack()
    rows, columns = -weight.out_features % 64, -weight.in_features % 16
    pad = torch.nn.functional.pad
    return dataclasses.replace(
        weight,
        qweight=pack_nibbles(pad(q, (0, columns, 0, rows), value=15)),
        scales=pack_groups(pad(scales, (0, 0, 0, rows), value=torch.nan)),
        zeros=None if weight.zeros is None else pack_groups(pad(zeros, (0, 0, 0, rows), value=255)),
    )


@every_room
@every_mode
@every_dtype
@pytest.mark.parametrize("case", ("one_by_one", "partial_tiles", "per_channel", "act_order", "rows_37"))
def test_gemm_reads_and_writes_only_what_is_its_own(
    backend: str, activations: str, dtype: torch.dtype, case: str
) -> None:
    x, weight, bias = make_inputs(**CASES[case], dtype=dtype)
    y = int4_gemm(x, weight, bias, activations=activations)
    poisoned = with_poisoned_padding(weight)
    around_bias = None if bias is None else surrounded_by_nan(bias)
    with uninitialized_is_nan():
        again = int4_gemm(surrounded_by_nan(x), poisoned, around_bias, activations=activations)
    assert bitwise_equal(again, y)


@every_room
@every_mode
def test_experts_read_and_write_only_what_is_their_own(backend: str, activations: str) -> None:
    x, w13, w2, ids, scores = moe_inputs(7, 40, 56, 3, 2)
    y = int4_moe(x, w13, w2, ids, scores, activations=activations)
    with uninitialized_is_nan():
        again = int4_moe(
            surrounded_by_nan(x),
            with_poisoned_padding(w13),
            with_poisoned_padding(w2),
            ids,
            surrounded_by_nan(scores),
            activations=activations,
        )
    assert bitwise_equal(again, y)


@every_room
@every_mode
def test_experts_without_rows_are_not_read(backend: str, activations: str) -> None:
    x, weight, _ = make_inputs(6, 40, 64, group_size=32, experts=3)
    offsets = torch.tensor([0, 2, 2, 6])
    y = int4_grouped_gemm(x, weight, offsets, activations=activations)
    scales = weight.scales.clone()
    scales[1] = torch.nan
    again = int4_grouped_gemm(x, dataclasses.replace(weight, scales=scales), offsets, activations=activations)
    assert bitwise_equal(again, y)


# -- grouped and mixture of experts -----------------------------------------------------------------------------------
GROUPED: dict[str, dict[str, Any]] = {
    "even": dict(bounds=[0, 4, 8, 12], n=70, k=200, group_size=64),
    "empty_experts": dict(bounds=[0, 0, 7, 7, 12, 12], n=65, k=130, group_size=32),
    "one_expert": dict(bounds=[0, 3], n=64, k=96, group_size=-1),
    "no_rows": dict(bounds=[0, 0, 0], n=64, k=96, group_size=32),
    "act_order": dict(bounds=[0, 1, 9], n=33, k=100, group_size=48, act_order=True),
    "symmetric": dict(bounds=[0, 33, 40], n=100, k=256, group_size=128, symmetric=True),
}


@rooms_and_cases(GROUPED, triton=("empty_experts",))
@pytest.mark.parametrize("index", (torch.int32, torch.int64), ids=str)
def test_grouped_gemm_exact(backend: str, case: str, index: torch.dtype) -> None:
    shape = dict(GROUPED[case])
    bounds = shape.pop("bounds")
    x, weight, _ = make_inputs(bounds[-1], experts=len(bounds) - 1, **shape)
    y = int4_grouped_gemm(x, weight, torch.tensor(bounds, dtype=index), activations="exact")
    rows = [x[a:b] for a, b in itertools.pairwise(bounds)]
    expected = torch.cat([exact64(part, weight.expert(e)) for e, part in enumerate(rows)])
    check_error(
        y, expected, torch.cat([torch_linear(part, weight.expert(e)) for e, part in enumerate(rows)]), TOLERANCE
    )


def moe_inputs(
    tokens: int,
    hidden: int,
    intermediate: int,
    experts: int,
    top_k: int,
    *,
    dtype: torch.dtype = torch.float32,
    group_size: int = 32,
    **kwargs: Any,
) -> tuple[Tensor, Int4Weight, Int4Weight, Tensor, Tensor]:
    x, w13, _ = make_inputs(
        tokens, 2 * intermediate, hidden, group_size=group_size, experts=experts, dtype=dtype, **kwargs
    )
    _, w2, _ = make_inputs(1, hidden, intermediate, group_size=group_size, experts=experts, seed=1, **kwargs)
    scores, ids = torch.randn(tokens, experts).softmax(-1).topk(top_k)
    return x, w13, w2, ids, scores


def moe_by_token(x: Tensor, w13: Tensor, w2: Tensor, ids: Tensor, scores: Tensor) -> Tensor:
    """int4_moe on dense weights, token by token, in the dtype of the weights."""
    y = torch.zeros(len(x), w2.shape[1], dtype=w2.dtype)
    for t in range(len(x)):
        for e, score in zip(ids[t].tolist(), scores[t].to(w2.dtype), strict=True):
            gate, up = (w13[e] @ x[t].to(w2.dtype)).chunk(2)
            y[t] += score * (w2[e] @ (torch.nn.functional.silu(gate) * up))
    return y


MOE: dict[str, dict[str, Any]] = {
    "small": dict(tokens=5, hidden=48, intermediate=80, experts=4, top_k=2),
    "one_token": dict(tokens=1, hidden=33, intermediate=17, experts=3, top_k=1),
    "no_token": dict(tokens=0, hidden=32, intermediate=32, experts=2, top_k=2),
    "all_experts": dict(tokens=9, hidden=64, intermediate=32, experts=3, top_k=3),
    "odd": dict(tokens=23, hidden=70, intermediate=101, experts=7, top_k=3, group_size=48),
    "symmetric": dict(tokens=6, hidden=128, intermediate=192, experts=5, top_k=2, group_size=128, symmetric=True),
    "act_order": dict(tokens=6, hidden=96, intermediate=64, experts=4, top_k=2, act_order=True),
}


@rooms_and_cases(MOE, triton=("small", "no_token"))
def test_moe_exact(backend: str, case: str) -> None:
    x, w13, w2, ids, scores = moe_inputs(**MOE[case])
    y = int4_moe(x, w13, w2, ids, scores, activations="exact")
    w13_dense, w2_dense = dense(w13), dense(w2)
    expected = moe_by_token(x, w13_dense, w2_dense, ids, scores)
    check_error(y, expected, moe_by_token(x, w13_dense.float(), w2_dense.float(), ids, scores), TOLERANCE)


@every_room
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_moe_half_precision(backend: str, dtype: torch.dtype) -> None:
    x, w13, w2, ids, scores = moe_inputs(9, 64, 80, 4, 2, dtype=dtype)
    y = int4_moe(x, w13, w2, ids, scores.to(dtype), activations="exact")
    w13_dense, w2_dense = dense(w13), dense(w2)
    expected = moe_by_token(x, w13_dense, w2_dense, ids, scores.to(dtype))
    in_torch = moe_by_token(x, w13_dense.to(dtype), w2_dense.to(dtype), ids, scores.to(dtype))
    check_error(y, expected, in_torch, TOLERANCE)


@every_room
@rounded_modes
@pytest.mark.parametrize("case", MOE)
def test_moe_rounding_error_is_that_of_three_roundings(backend: str, activations: str, case: str) -> None:
    """Of gate, of up, and of silu(gate) * up."""
    x, w13, w2, ids, scores = moe_inputs(**MOE[case])
    y = int4_moe(x, w13, w2, ids, scores, activations=activations)
    expected = moe_by_token(x, dense(w13), dense(w2), ids, scores)
    assert relative_error(y, expected).rms <= 3 * ACTIVATION_ERROR[activations]


@every_room
def test_moe_counts_an_expert_named_twice_twice(backend: str) -> None:
    x, w13, w2, _, _ = moe_inputs(3, 32, 32, 2, 1)
    once = int4_moe(x, w13, w2, torch.ones(3, 1, dtype=torch.int64), torch.full((3, 1), 0.75), activations="exact")
    ids, scores = torch.ones(3, 2, dtype=torch.int32), torch.tensor([[0.5, 0.25]]).repeat(3, 1)
    twice = int4_moe(x, w13, w2, ids, scores, activations="exact")
    assert relative_error(twice, once.double()).max < 1e-6


# -- dequantize -------------------------------------------------------------------------------------------------------
@every_room_and_triton
@every_dtype
def test_dequantize(backend: str, dtype: torch.dtype) -> None:
    _, weight, _ = make_inputs(1, 70, 200, group_size=48, act_order=True)
    _, stack, _ = make_inputs(1, 33, 100, group_size=48, act_order=True, experts=3)
    assert bitwise_equal(int4_dequantize(weight, dtype), dense(weight).float().to(dtype))
    assert bitwise_equal(int4_dequantize(stack, dtype), dense(stack).float().to(dtype))


# -- gradients --------------------------------------------------------------------------------------------------------
@every_room
@every_dtype
@every_mode
def test_gradients_are_those_of_the_dense_product(backend: str, dtype: torch.dtype, activations: str) -> None:
    x, weight, bias = make_inputs(12, 70, 130, group_size=64, act_order=True, dtype=dtype, bias=True)
    assert bias is not None
    x, bias = x.view(3, 4, 130).requires_grad_(), bias.requires_grad_()
    dy = torch.randn(3, 4, 70).to(dtype)
    int4_gemm(x, weight, bias, activations=activations).backward(dy)
    assert x.grad is not None and bias.grad is not None
    check_error(x.grad, dy.double() @ dense(weight), dy @ dense(weight).to(dtype), TOLERANCE)
    check_error(bias.grad, dy.double().sum((0, 1)), dy.view(-1, 70).sum(0), TOLERANCE)


@every_room
def test_gradients_are_computed_only_where_wanted(backend: str) -> None:
    x, weight, bias = make_inputs(2, 40, 64, group_size=32, bias=True)
    assert bias is not None
    int4_gemm(x, weight, bias.requires_grad_()).sum().backward()
    assert x.grad is None and torch.equal(bias.grad, torch.full((40,), 2.0)) if bias.grad is not None else False
    with torch.no_grad():
        assert not int4_gemm(x.requires_grad_(), weight, bias).requires_grad


@every_room
def test_a_step_of_descent_lowers_the_loss(backend: str) -> None:
    x, weight, _ = make_inputs(6, 40, 64, group_size=32)
    target, x = torch.randn(6, 40), x.requires_grad_()
    loss = (int4_gemm(x, weight, activations="exact") - target).square().mean()
    (gradient,) = torch.autograd.grad(loss, x)
    direction = torch.randn_like(x)
    with torch.no_grad():
        up, down = ((int4_gemm(x + h * direction, weight, activations="exact") - target).double() for h in (0.5, -0.5))
    slope = (up.square().mean() - down.square().mean()).item()  # exact for a quadratic, whatever the step
    assert slope == pytest.approx((gradient * direction).double().sum().item(), rel=1e-4)


# -- torch.library and torch.compile ----------------------------------------------------------------------------------
@every_room
def test_opcheck(backend: str) -> None:
    x, weight, bias = make_inputs(5, 70, 130, group_size=64, act_order=True, bias=True)
    qweight, scales, zeros, perm, *numbers = flat(weight)
    rows, stack, _ = make_inputs(6, 40, 64, group_size=32, experts=3)
    tokens, w13, w2, ids, scores = moe_inputs(5, 48, 80, 4, 2)
    w13_tensors, w2_tensors = flat(w13)[:4], flat(w2)[:4]
    ops = torch.ops.m3kernels
    for activations in ("exact", "auto"):
        gemm = (x, qweight, scales, zeros, perm, bias, *numbers, True, activations)
        torch.library.opcheck(ops.int4_gemm.default, gemm)
        torch.library.opcheck(
            ops.int4_grouped_gemm.default, (rows, torch.tensor([0, 2, 2, 6]), *flat(stack), True, activations)
        )
        moe = (tokens, ids, scores, *w13_tensors, *w2_tensors, 48, 80, 32, 0, 0, True, activations)
        torch.library.opcheck(ops.int4_moe.default, moe)
    torch.library.opcheck(ops.int4_dequantize.default, (*flat(weight), torch.bfloat16))


@every_room
def test_compiles_without_a_graph_break(backend: str) -> None:
    x, weight, bias = make_inputs(5, 70, 130, group_size=64, bias=True)
    tokens, w13, w2, ids, scores = moe_inputs(5, 48, 80, 4, 2)

    def block(x: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        dense_weight = int4_dequantize(weight, torch.float32)
        return int4_gemm(torch.relu(x), weight, bias), x @ dense_weight.T, int4_moe(tokens, w13, w2, ids, scores)

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    assert all(bitwise_equal(a, b) for a, b in zip(compiled(x, tokens), block(x, tokens), strict=True))
