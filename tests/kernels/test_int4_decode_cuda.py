"""The CUDA product of few rows: values, the order of additions, row invariance, hostile memory; emulated or not."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear, silu

import m3kernels
from m3kernels.int4 import Int4Weight
from m3kernels.int4.reference import TOLERANCE, gemm64, make_inputs, stored_weight
from m3kernels.testing import bitwise_equal, check_error, surrounded_by_nan

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
EPILOGUES = {"store": 0, "float": 1, "gated": 2}
pytestmark = [pytest.mark.usefixtures("cuda_module")] + ([pytest.mark.gpu] if DEVICE == "cuda" else [])
emulated = pytest.mark.skipif(DEVICE == "cuda", reason="plays devices, which only the emulated module can")
every_half = pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)


class Device(NamedTuple):
    capability: int
    multiprocessors: int
    seed: int


PLAYED = [(80, 3, 1), (80, 16, 2), (90, 1, 3), (90, 4, 4), (90, 16, 5), (120, 8, 6)]
DEVICES = [Device(*played) for played in PLAYED]


def play(device: Device) -> None:
    if DEVICE == "cpu":
        import emulated_cuda

        emulated_cuda.configure(*device)


@pytest.fixture(params=DEVICES if DEVICE == "cpu" else [None], ids=str)
def device(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.param is not None:
        play(request.param)
    yield
    play(Device(90, 4, 0))


def span(tensor: Tensor | None) -> tuple[int, int]:
    return (0, 0) if tensor is None else (tensor.data_ptr(), tensor.numel())


def ints(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def decode(
    x: Tensor,
    weight: Int4Weight,
    *,
    rows: int | None = None,
    row_index: Tensor | None = None,
    offsets: Tensor | None = None,
    bias: Tensor | None = None,
    epilogue: str = "store",
    plan: tuple[int, int, int] | None = None,
) -> Tensor:
    """y, in memory that was NaN before; asserts that nothing beyond y was written and that the counters are zero."""
    ext: Any = m3kernels._cuda_ext
    rows = len(x) if rows is None else rows
    n, k = weight.out_features, weight.in_features
    plan = plan or ext.int4_plan(n, k, offsets is not None)
    experts = weight.num_experts or 1
    floats, counts = ext.int4_decode_sizes(rows, experts, n, k, offsets is not None, plan, EPILOGUES[epilogue])
    workspace = torch.full((floats,), torch.nan, device=DEVICE)
    counters = torch.zeros(counts, dtype=torch.int32, device=DEVICE)
    columns = n // 2 if epilogue == "gated" else n
    memory = torch.full(
        (rows + 4, columns), torch.nan, dtype=torch.float32 if epilogue == "float" else x.dtype, device=DEVICE
    )
    y = memory[2 : rows + 2]
    packed = (span(weight.qweight), span(weight.scales), span(weight.zeros), TYPES[weight.scales.dtype], experts, n, k)
    arguments = (span(x), TYPES[x.dtype], len(x), rows, span(row_index), (*packed, weight.group_size, weight.first_k))
    stream = torch.cuda.current_stream().cuda_stream if DEVICE == "cuda" else 0
    ext.int4_product(
        "decode", *arguments, span(offsets), span(bias), EPILOGUES[epilogue], span(y), span(workspace), span(counters),
        plan, stream,
    )  # fmt: skip
    assert not counters.any()
    assert memory[:2].isnan().all() and memory[rows + 2 :].isnan().all()
    return y


def inputs(m: int, n: int, k: int, **options: Any) -> tuple[Tensor, Int4Weight, Tensor | None]:
    x, weight, bias = make_inputs(m, n, k, **options)
    return x.to(DEVICE), weight.to(DEVICE), None if bias is None else bias.to(DEVICE)


def exact64(x: Tensor, weight: Int4Weight, epilogue: str = "store", bias: Tensor | None = None) -> Tensor:
    y = gemm64(x, weight, "exact")
    if epilogue == "gated":
        gate, up = y.chunk(2, dim=-1)
        return silu(gate) * up
    return y if bias is None else y + bias.double()


def in_torch(x: Tensor, weight: Int4Weight, epilogue: str = "store", bias: Tensor | None = None) -> Tensor:
    if epilogue == "float":
        x = x.float()
    y = linear(x, stored_weight(weight).to(x.dtype), bias)
    if epilogue == "gated":
        gate, up = y.chunk(2, dim=-1)
        return silu(gate) * up
    return y


# -- values -----------------------------------------------------------------------------------------------------------
CASES: dict[str, dict[str, Any]] = {
    "one_by_one": dict(m=1, n=1, k=1, group_size=32),
    "one_tile": dict(m=1, n=64, k=16, group_size=16),
    "group_16": dict(m=3, n=66, k=200, group_size=16),
    "group_32_bias": dict(m=8, n=65, k=333, group_size=32, bias=True),
    "group_48": dict(m=9, n=63, k=501, group_size=48),
    "group_128_many_splits": dict(m=2, n=64, k=4096, group_size=128),
    "group_192": dict(m=13, n=100, k=1000, group_size=192, bias=True),
    "per_channel": dict(m=16, n=130, k=739, group_size=-1, bias=True),
    "symmetric": dict(m=17, n=136, k=1024, group_size=64, symmetric=True),
    "two_chunks": dict(m=33, n=192, k=520, group_size=128, bias=True),
    "bf16_scales": dict(m=5, n=72, k=264, group_size=32, scale_dtype=torch.bfloat16),
    "fp32_scales": dict(m=24, n=70, k=264, group_size=32, scale_dtype=torch.float32),
}


@every_half
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_values(case, dtype):
    x, weight, bias = inputs(**case, dtype=dtype)
    y = decode(surrounded_by_nan(x, 72), weight, bias=bias)
    check_error(y, exact64(x, weight, bias=bias), in_torch(x, weight, bias=bias), TOLERANCE)


def test_values_on_every_device(device):
    x, weight, bias = inputs(3, 130, 1600, group_size=128, bias=True, dtype=torch.bfloat16)
    y = decode(x, weight, bias=bias)
    check_error(y, exact64(x, weight, bias=bias), in_torch(x, weight, bias=bias), TOLERANCE)


@pytest.mark.parametrize("epilogue", ("float", "gated"))
def test_epilogues(device, epilogue):
    dtype = torch.float16 if epilogue == "float" else torch.bfloat16
    x, weight, _ = inputs(5, 256, 600, group_size=64, dtype=dtype)
    y = decode(x, weight, epilogue=epilogue)
    check_error(y, exact64(x, weight, epilogue), in_torch(x, weight, epilogue), TOLERANCE)


def test_a_slice_that_starts_inside_a_group():
    x, weight, _ = inputs(4, 96, 1024, group_size=128, dtype=torch.bfloat16)
    sliced = weight.slice_in(208, 976)
    part = x[:, 208:976].contiguous()
    check_error(decode(part, sliced), exact64(part, sliced), in_torch(part, sliced), TOLERANCE)


@every_half
def test_every_nibble_with_every_zero(dtype):
    q = torch.arange(16, dtype=torch.uint8).repeat(64, 1)
    zeros = torch.arange(64, dtype=torch.uint8)[:, None] % 17
    weight = Int4Weight.pack(q, torch.ones(64, 1), zeros, group_size=16).to(DEVICE)
    x = torch.eye(16, dtype=dtype, device=DEVICE)
    assert torch.equal(decode(x, weight, epilogue="float").cpu(), (q.float() - zeros.float()).t())


def test_rows_of_x_that_are_not_aligned():
    x, weight, _ = inputs(4, 64, 128, group_size=64, dtype=torch.bfloat16)
    shifted = torch.full((x.numel() + 1,), torch.nan, dtype=x.dtype, device=DEVICE)[1:].view(x.shape).copy_(x)
    assert bitwise_equal(decode(shifted, weight), decode(x, weight))


def test_row_index():
    x, weight, _ = inputs(6, 64, 256, group_size=64, dtype=torch.float16)
    y = decode(x, weight)
    index = [5, 0, 0, -1, 3, 6, 2**31 - 1, -(2**31), 1, 2]
    gathered = decode(x, weight, rows=len(index), row_index=ints(index))
    wanted = [y[i] if 0 <= i < 6 else torch.zeros_like(y[0]) for i in index]
    assert torch.equal(gathered, torch.stack(wanted))


def test_nan_and_infinity_stay_in_their_row():
    x, weight, _ = inputs(9, 64, 256, group_size=64, dtype=torch.float16)
    clean = decode(x, weight)
    x[2, 17], x[8, 255] = torch.inf, torch.nan
    y = decode(x, weight)
    keep = [0, 1, 3, 4, 5, 6, 7]
    assert not y[2].isfinite().any() and y[8].isnan().all()
    assert bitwise_equal(y[keep], clean[keep])


# -- the order of additions -------------------------------------------------------------------------------------------
def in_order(x: Tensor, weight: Int4Weight, plan: tuple[int, int, int]) -> np.ndarray:
    """(rows, N) fp32 by csrc/int4/plan.h, the matrix unit adding column by column (as the emulated one does)."""
    part_tiles, split_parts, splits = plan
    q, scales, zeros = weight.unpack()
    group = weight.group_index().numpy()
    u = (q.float() - zeros.float()[:, torch.from_numpy(group)]).numpy()
    scale, values = scales.float().numpy(), x.float().numpy()
    tiles = -(-weight.in_features // 16)
    total = None
    for s in range(splits):
        split = None
        for p in range(s * split_parts, min((s + 1) * split_parts, -(-tiles // part_tiles))):
            part = np.zeros((len(x), weight.out_features), np.float32)
            stop = min((p + 1) * part_tiles * 16, weight.in_features)
            for which, run in itertools.groupby(range(p * part_tiles * 16, stop), key=lambda column: group[column]):
                r = np.zeros_like(part)
                for column in run:
                    r += values[:, column, None] * u[None, :, column]
                wide = scale[None, :, which].astype(np.longdouble) * r + part.astype(np.longdouble)
                part = wide.astype(np.float32)
            split = part if split is None else split + part
        total = split if total is None else total + split
    return total


@emulated
@pytest.mark.parametrize("plan", [(3, 4, 2), (5, 4, 1), (1, 4, 5), (2, 4, 3), (17, 4, 1)], ids=str)
def test_additions_are_those_of_the_plan(device, plan):
    x, weight, _ = inputs(3, 70, 270, group_size=48, dtype=torch.bfloat16)
    plan = (plan[0], plan[1], -(-17 // (plan[0] * plan[1])))
    assert np.array_equal(decode(x, weight, epilogue="float", plan=plan).numpy(), in_order(x, weight, plan))


ROWS = (1, 2, 7, 8, 9, 15, 16, 17, 24, 31, 32, 33, 40, 63, 64, 65, 70)


@pytest.mark.parametrize("rows", ROWS)
def test_a_row_is_the_same_among_any_others(rows):
    x, weight, bias = inputs(70, 100, 144, group_size=32, bias=True, dtype=torch.bfloat16)
    whole = decode(x, weight, bias=bias)
    assert bitwise_equal(decode(x[:rows], weight, bias=bias), whole[:rows])
    assert bitwise_equal(decode(x[70 - rows :].contiguous(), weight, bias=bias), whole[70 - rows :])


def test_a_row_is_the_same_among_any_others_when_splits_meet(device):
    x, weight, _ = inputs(35, 100, 320, group_size=32, dtype=torch.bfloat16)
    whole = decode(x, weight, plan=(1, 4, 5))
    for rows in (1, 9, 17, 34):
        assert bitwise_equal(decode(x[:rows], weight, plan=(1, 4, 5)), whole[:rows])


@emulated
def test_the_bits_are_those_of_the_plan_on_every_device():
    x, weight, _ = inputs(11, 64, 2048, group_size=128, dtype=torch.float16)
    results = []
    for device in DEVICES:
        play(device)
        results.append(decode(x, weight, epilogue="float", plan=(8, 4, 4)))
    play(Device(90, 4, 0))
    assert all(bitwise_equal(result, results[0]) for result in results)


def test_sixteen_splits_meet_in_the_workspace(device):
    x, weight, _ = inputs(2, 64, 1024, group_size=64, dtype=torch.float16)
    y = decode(x, weight, plan=(1, 4, 16))
    check_error(y, exact64(x, weight), in_torch(x, weight), TOLERANCE)


# -- grouped ----------------------------------------------------------------------------------------------------------
def bounds(counts: list[int]) -> list[int]:
    return [0, *itertools.accumulate(counts)]


def by_expert(
    x: Tensor, weight: Int4Weight, counts: list[int], compute: Callable[[Tensor, Int4Weight], Tensor]
) -> Tensor:
    pairs = itertools.pairwise(bounds(counts))
    return torch.cat([compute(x[a:b], weight.expert(e)) for e, (a, b) in enumerate(pairs) if a < b])


COUNTS: dict[str, list[int]] = {
    "one_expert": [5],
    "first_and_last_empty": [0, 3, 1, 0, 9, 0],
    "a_row_each": [1] * 7,
    "one_has_all": [0, 0, 40, 0],
    "uneven": [2, 37, 0, 8, 1],
    "seventy_experts": [1 if e % 9 == 4 else 0 for e in range(70)],
}


@pytest.mark.parametrize("epilogue", ("store", "gated"))
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_grouped(counts, epilogue):
    n, dtype = (128, torch.bfloat16) if epilogue == "gated" else (80, torch.float16)
    x, weight, _ = inputs(sum(counts), n, 144, group_size=32, experts=len(counts), dtype=dtype)
    y = decode(x, weight, offsets=ints(bounds(counts)), epilogue=epilogue)
    exact = by_expert(x, weight, counts, lambda rows, expert: exact64(rows, expert, epilogue))
    check_error(y, exact, by_expert(x, weight, counts, lambda a, b: in_torch(a, b, epilogue)), TOLERANCE)


def test_grouped_rows_have_the_bits_of_the_dense_product(device):
    counts = [3, 0, 20, 1]
    x, weight, _ = inputs(24, 192, 400, group_size=64, experts=4, dtype=torch.bfloat16)
    plan = m3kernels._cuda_ext.int4_plan(192, 400, True)
    y = decode(x, weight, offsets=ints(bounds(counts)))
    assert bitwise_equal(y, by_expert(x, weight, counts, lambda rows, expert: decode(rows, expert, plan=plan)))


def test_grouped_rows_are_gathered():
    x, weight, _ = inputs(3, 64, 144, group_size=32, experts=3, dtype=torch.float16)
    index = [0, 2, 1, 1, 0, 2, 99]
    y = decode(x, weight, rows=7, row_index=ints(index), offsets=ints([0, 2, 2, 7]))
    gathered = torch.cat([x[index[:6]], torch.zeros_like(x[:1])])
    assert bitwise_equal(y, decode(gathered, weight, offsets=ints([0, 2, 2, 7])))


HOSTILE: dict[str, list[int]] = {
    "beyond": [0, 5, 900, 2**31 - 1],
    "negative": [-(2**31), -7, 3, 12],
    "decreasing": [12, 8, 4, 0],
    "overlapping": [0, 12, 0, 12],
    "short": [4, 5, 5, 6],
}


@pytest.mark.parametrize("offsets", HOSTILE.values(), ids=HOSTILE)
def test_hostile_offsets_touch_no_foreign_memory(offsets):
    x, weight, _ = inputs(12, 64, 64, group_size=32, experts=3, dtype=torch.bfloat16)
    clamped = [min(max(offset, 0), 12) for offset in offsets]
    y = decode(x, weight, offsets=ints(offsets))
    covered = {row for a, b in itertools.pairwise(clamped) for row in range(a, b)}
    assert y[[row for row in range(12) if row not in covered]].isnan().all()


# -- the border -------------------------------------------------------------------------------------------------------
def test_no_rows():
    x, weight, _ = inputs(0, 64, 64, group_size=32, dtype=torch.float16)
    assert decode(x, weight).shape == (0, 64)


def test_values_of_the_border():
    x, weight, bias = inputs(3, 192, 64, group_size=32, bias=True, dtype=torch.float16)
    with pytest.raises(ValueError, match=r"int4_product: n: want a multiple of 128"):
        decode(x, weight, epilogue="gated")
    with pytest.raises(ValueError, match=r"int4_product: plan: want 1 splits"):
        decode(x, weight, plan=(1, 4, 2))
    with pytest.raises(ValueError, match=r"int4_product: row_index: want 7 elements; got 2"):
        decode(x, weight, rows=7, row_index=ints([0, 1]))
    with pytest.raises(ValueError, match=r"int4_product: x: want 7 rows where there is no row_index; got 3"):
        decode(x, weight, rows=7)
    with pytest.raises(ValueError, match=r"int4_product: bias: want 192 elements; got 191"):
        decode(x, weight, bias=bias[:191])
    with pytest.raises(ValueError, match=r"int4_product: bias: want none"):
        decode(x, weight, bias=bias, epilogue="float")
    with pytest.raises(ValueError, match=r"int4_product: offsets: want 2 elements; got 3"):
        decode(x, weight, offsets=ints([0, 1, 3]))
