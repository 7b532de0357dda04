"""The two CUDA products for many rows: "many" (mma, the order of additions of csrc/int4/plan.h) and "wgmma" (sm_90).

Run on the emulated device, or on a GPU where there is one. The emulated matrix unit adds in fp32 one column after the
other, so there "many" must match a restatement of plan.h bit for bit; elsewhere the error rule holds.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from m3kernels.int4 import Int4Weight
from m3kernels.int4.reference import TOLERANCE, gemm64, make_inputs, stored_weight
from m3kernels.int4.types import pack_groups
from m3kernels.testing import bitwise_equal, check_error, surrounded_by_nan

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
STORE, FLOAT, GATED = 0, 1, 2
NUMBER = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
NONE = (0, 0)
pytestmark = [pytest.mark.usefixtures("cuda_module"), *([pytest.mark.gpu] if GPU else [])]
both = pytest.mark.parametrize("which", ("many", "wgmma"))
half = pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)


def configure(multiprocessors: int, seed: int, capability: int = 90) -> None:
    """The device that is played; a GPU is what it is."""
    if not GPU:
        import emulated_cuda

        emulated_cuda.configure(capability, multiprocessors, seed)


def span(tensor: Tensor | None) -> tuple[int, int]:
    return NONE if tensor is None else (tensor.data_ptr(), tensor.numel())


def product(
    which: str,
    x: Tensor,
    weight: Int4Weight,
    *,
    bias: Tensor | None = None,
    offsets: list[int] | None = None,
    row_index: Tensor | None = None,
    rows: int | None = None,
    epilogue: int = STORE,
    plan: tuple[int, int, int] | None = None,
) -> Tensor:
    """y, which lies inside a larger buffer that nothing else may be written to; values never written are nan."""
    from m3kernels import _cuda_ext

    if which == "wgmma" and GPU and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("wgmma is sm_90 alone")
    n, k, experts = weight.out_features, weight.in_features, weight.num_experts or 1
    rows = len(x) if rows is None else rows
    columns = n // 2 if epilogue == GATED else n
    dtype = torch.float32 if epilogue == FLOAT else x.dtype
    margin = 64
    buffer = torch.full((rows * columns + 2 * margin,), torch.nan, dtype=dtype, device=DEVICE)
    y = buffer[margin : margin + rows * columns]
    bounds = None if offsets is None else torch.tensor(offsets, dtype=torch.int32, device=DEVICE)
    _cuda_ext.int4_product(
        which,
        span(x),
        NUMBER[x.dtype],
        len(x),
        rows,
        span(row_index),
        (
            span(weight.qweight),
            span(weight.scales),
            span(weight.zeros),
            NUMBER[weight.scales.dtype],
            experts,
            n,
            k,
            weight.group_size,
            weight.first_k,
        ),
        span(bounds),
        span(bias),
        epilogue,
        span(y),
        NONE,
        NONE,
        plan or _cuda_ext.int4_plan(n, k, offsets is not None),
        torch.cuda.current_stream().cuda_stream if GPU else 0,
    )
    assert buffer[:margin].isnan().all() and buffer[margin + rows * columns :].isnan().all()
    return y.view(rows, columns)


def inputs(m: int, n: int, k: int, **options: Any) -> tuple[Tensor, Int4Weight, Tensor | None]:
    x, weight, bias = make_inputs(m, n, k, **options)
    return x.to(DEVICE), weight.to(DEVICE), None if bias is None else bias.to(DEVICE)


def exact64(x: Tensor, weight: Int4Weight, bias: Tensor | None = None) -> Tensor:
    y = gemm64(x, weight, "exact")
    return y if bias is None else y + bias.double()


def in_torch(x: Tensor, weight: Int4Weight, bias: Tensor | None = None) -> Tensor:
    return torch.nn.functional.linear(x, stored_weight(weight).to(x.dtype), bias)


def in_order_of_plan(x: Tensor, weight: Int4Weight, plan: tuple[int, int, int]) -> Tensor:
    """csrc/int4/plan.h in numpy: fp32, where mma adds the products of a tile to r one after the other."""
    q, scales, zeros = (part.cpu() for part in weight.unpack())
    group = weight.group_index().cpu()
    centred = (q.float() - zeros.float()[:, group]).numpy()
    values, rows = scales.float().numpy(), x.float().cpu().numpy()
    k_tiles = -(-weight.in_features // 16)
    part_tiles, split_parts, splits = plan
    total: Any = None
    for split in range(splits):
        split_sum: Any = None
        for p in range(split * split_parts, (split + 1) * split_parts):
            tiles = range(p * part_tiles, min((p + 1) * part_tiles, k_tiles))
            if not tiles:
                continue
            part = np.zeros((len(rows), len(q)), np.float32)
            r = np.zeros_like(part)
            for tile in tiles:
                for column in range(tile * 16, min(tile * 16 + 16, weight.in_features)):
                    r += rows[:, column, None] * centred[None, :, column]
                here = int(group[tile * 16])
                if tile + 1 == tiles.stop or int(group[(tile + 1) * 16]) != here:
                    part = (np.longdouble(values[None, :, here]) * r + part).astype(np.float32)
                    r = np.zeros_like(part)
            split_sum = part if split_sum is None else split_sum + part
        total = split_sum if total is None else total + split_sum
    return torch.from_numpy(total).to(DEVICE)


# -- values -----------------------------------------------------------------------------------------------------------
CASES: dict[str, dict[str, Any]] = {
    "one_by_one": dict(m=1, n=1, k=1, group_size=32),
    "one_row": dict(m=1, n=64, k=512, group_size=128),
    "odd_sizes": dict(m=65, n=130, k=200, group_size=128, bias=True),
    "columns_not_of_eight": dict(m=100, n=66, k=101, group_size=48, bias=True),
    "symmetric": dict(m=130, n=128, k=160, group_size=64, symmetric=True, bias=True),
    "per_channel": dict(m=70, n=64, k=139, group_size=-1),
    "group_32": dict(m=66, n=136, k=512, group_size=32),
    "bf16_scales": dict(m=66, n=64, k=80, group_size=64, scale_dtype=torch.bfloat16),
    "fp32_scales": dict(m=66, n=64, k=80, group_size=64, scale_dtype=torch.float32),
    "more_stages_than_a_ring": dict(m=66, n=70, k=1096, group_size=128),
    "many_tiles": dict(m=257, n=200, k=200, group_size=64, bias=True),
}


@both
@half
@pytest.mark.parametrize("case", CASES)
def test_values(which: str, dtype: torch.dtype, case: str) -> None:
    x, weight, bias = inputs(**CASES[case], dtype=dtype)
    y = product(which, x, weight, bias=bias)
    check_error(y, exact64(x, weight, bias), in_torch(x, weight, bias), TOLERANCE)


PLANS: dict[str, tuple[int, tuple[int, int, int] | None]] = {  # columns of W; a plan of its own, or the device's
    "device": (1030, None),
    "one_part": (300, (19, 1, 1)),
    "uneven_parts": (200, (2, 3, 3)),
    "splits_of_one_part": (200, (5, 1, 3)),
    "one_split": (200, (4, 4, 1)),
}


@pytest.mark.skipif(GPU, reason="the order inside a matrix instruction is the emulated device's")
@half
@pytest.mark.parametrize("multiprocessors", (1, 132), ids=("large_tiles", "small_tiles"))
@pytest.mark.parametrize("name", PLANS)
def test_many_keeps_the_order_of_the_plan(dtype: torch.dtype, multiprocessors: int, name: str) -> None:
    from m3kernels import _cuda_ext

    configure(multiprocessors, seed=5, capability=80)
    k, plan = PLANS[name]
    x, weight, _ = inputs(70, 66, k, group_size=48, dtype=dtype)
    plan = plan or _cuda_ext.int4_plan(66, k, False)
    y = product("many", x, weight, plan=plan, epilogue=FLOAT)
    assert bitwise_equal(y, in_order_of_plan(x, weight, plan))
    assert bitwise_equal(product("many", x, weight, plan=plan), y.to(dtype))


@both
@half
@pytest.mark.parametrize(("start", "stop"), ((48, 149), (144, 145)))
def test_slice_that_starts_inside_a_group(which: str, dtype: torch.dtype, start: int, stop: int) -> None:
    _, whole, _ = inputs(1, 70, 200, group_size=128)
    x, part = torch.randn(67, stop - start, device=DEVICE).to(dtype), whole.slice_in(start, stop)
    check_error(product(which, x, part), exact64(x, part), in_torch(x, part), TOLERANCE)


@both
@half
@pytest.mark.parametrize("zero", (0, 16))
def test_extreme_zeros(which: str, dtype: torch.dtype, zero: int) -> None:
    """Every u - z is +-1 or 0 while z is far from the middle: sums that cancel keep their precision."""
    q = torch.randint(0, 2, (70, 96), dtype=torch.uint8) + (14 if zero == 16 else 0)
    scales, zeros = torch.rand(70, 3) + 0.5, torch.full((70, 3), zero, dtype=torch.uint8)
    weight = Int4Weight.pack(q, scales.half(), zeros, group_size=32).to(DEVICE)
    x = torch.randn(3, 96, device=DEVICE).to(dtype)
    check_error(product(which, x, weight), exact64(x, weight), in_torch(x, weight), TOLERANCE)


@pytest.mark.parametrize("scale_dtype", (torch.float16, torch.float32), ids=str)
def test_wgmma_rounds_a_weight_as_torch_does(scale_dtype: torch.dtype) -> None:
    """Where all x share a sign, the errors of a group's scale do not cancel: a scale rounded by itself would show."""
    x, weight, _ = inputs(66, 64, 256, group_size=256, scale_dtype=scale_dtype, dtype=torch.bfloat16)
    x = x.abs()
    y = product("wgmma", x, weight, epilogue=FLOAT)
    rounded = x.double() @ stored_weight(weight).float().bfloat16().double().T
    torch.testing.assert_close(y.double(), rounded, rtol=0, atol=2e-5 * float(rounded.abs().max()))


# -- row-invariance, determinism --------------------------------------------------------------------------------------
@both
@half
def test_a_row_is_the_same_in_every_tile(which: str, dtype: torch.dtype) -> None:
    x, weight, _ = inputs(140, 136, 200, group_size=64, dtype=dtype)
    configure(1, seed=0)
    plan = (3, 3, 2)
    y = product(which, x, weight, epilogue=FLOAT, plan=plan)
    for rows, multiprocessors in ((1, 1), (64, 2), (65, 1), (100, 132)):
        configure(multiprocessors, seed=rows)
        assert bitwise_equal(product(which, x[-rows:], weight, epilogue=FLOAT, plan=plan), y[-rows:])
    order = torch.randperm(140)
    assert bitwise_equal(product(which, x[order].contiguous(), weight, epilogue=FLOAT, plan=plan), y[order])


@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")
@both
@pytest.mark.parametrize("value", (torch.nan, torch.inf))
def test_what_is_not_finite_stays_in_its_row(which: str, value: float) -> None:
    x, weight, _ = inputs(70, 70, 130, group_size=64, dtype=torch.bfloat16)
    clean = product(which, x, weight)
    x[2, 129] = value
    y = product(which, x, weight)
    rest = torch.arange(70) != 2
    assert bitwise_equal(y[rest], clean[rest])
    assert not y[2].isfinite().any()


@pytest.mark.skipif(GPU, reason="orders are drawn on the emulated device")
@both
@pytest.mark.parametrize("seed", (1, 2))
def test_no_order_of_threads_changes_a_bit(which: str, seed: int) -> None:
    x, weight, _ = inputs(130, 130, 300, group_size=128, dtype=torch.bfloat16)
    results = []
    for multiprocessors, order in ((3, 0), (1, seed), (3, seed)):
        configure(multiprocessors, order)
        results.append(product(which, x, weight, epilogue=FLOAT, plan=(19, 1, 1)))
    assert bitwise_equal(results[0], results[1]) and bitwise_equal(results[0], results[2])


# -- gather, experts, gate --------------------------------------------------------------------------------------------
@both
def test_rows_by_index(which: str) -> None:
    x, weight, bias = inputs(40, 70, 136, group_size=64, bias=True, dtype=torch.float16)
    index = torch.randint(0, 40, (90,), dtype=torch.int32)
    index[[3, 70, 89]] = torch.tensor([-1, 40, 2**31 - 1], dtype=torch.int32)
    y = product(which, x, weight, bias=bias, row_index=index.to(DEVICE), rows=90)
    outside = (index < 0) | (index >= 40)
    padded = torch.where(outside[:, None].to(DEVICE), torch.zeros_like(x[:1]), x[index.clamp(0, 39).long()])
    assert bitwise_equal(y, product(which, padded.contiguous(), weight, bias=bias))


GROUPED: dict[str, dict[str, Any]] = {
    "few_rows_each": dict(bounds=[0, 3, 10], n=70, k=100, group_size=64),
    "empty_experts": dict(bounds=[0, 0, 70, 70, 71, 71], n=65, k=130, group_size=32),
    "more_than_a_tile": dict(bounds=[0, 140, 141, 280], n=136, k=96, group_size=128, symmetric=True),
    "more_than_a_warp_of_experts": dict(bounds=[0] * 20 + [5] * 20 + [5, 9], n=64, k=64, group_size=64),
}


@both
@half
@pytest.mark.parametrize("case", GROUPED)
def test_experts(which: str, dtype: torch.dtype, case: str) -> None:
    options = dict(GROUPED[case])
    bounds = options.pop("bounds")
    configure(2, seed=7)
    x, weight, _ = inputs(bounds[-1], **options, experts=len(bounds) - 1, dtype=dtype)
    y = product(which, x, weight, offsets=bounds)
    pairs = [(weight.expert(e), x[a:b]) for e, (a, b) in enumerate(itertools.pairwise(bounds)) if a < b]
    exact = torch.cat([exact64(rows, expert) for expert, rows in pairs])
    check_error(y, exact, torch.cat([in_torch(rows, expert) for expert, rows in pairs]), TOLERANCE)


@both
@pytest.mark.parametrize("bounds", ([0, 90, 30, 70], [-5, 20, 2**31 - 1, 70], [70, 0, 0, -(2**31)], [-9, -8, 99, 98]))
def test_hostile_offsets_touch_nothing_else(which: str, bounds: list[int]) -> None:
    x, weight, _ = inputs(70, 66, 80, group_size=32, experts=3, dtype=torch.float16)
    y = product(which, x, weight, offsets=bounds)
    assert y.shape == (70, 66)  # and `product` has looked at what lies around it


def gated(y: Tensor) -> Tensor:
    gate, up = y.chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


@both
@half
@pytest.mark.parametrize("experts", (False, True), ids=("dense", "experts"))
def test_gate(which: str, dtype: torch.dtype, experts: bool) -> None:
    bounds = [0, 100, 100, 133]
    configure(2, seed=11)
    x, weight, _ = inputs(133, 384, 72, group_size=48, experts=3, dtype=dtype)
    x = x * 4
    if experts:
        y = product(which, x, weight, offsets=bounds, epilogue=GATED)
        whole = product(which, x, weight, offsets=bounds, epilogue=FLOAT)
    else:
        y = product(which, x, weight.expert(0), epilogue=GATED)
        whole = product(which, x, weight.expert(0), epilogue=FLOAT)
    expected = gated(whole.double())
    check_error(y, expected, gated(whole).to(dtype), TOLERANCE)
    if not experts:
        check_error(whole, exact64(x, weight.expert(0)), in_torch(x, weight.expert(0)).float(), TOLERANCE)


@both
def test_gate_wants_whole_tiles(which: str) -> None:
    x, weight, _ = inputs(70, 192, 80, group_size=32, dtype=torch.float16)
    with pytest.raises(ValueError, match="n: want a multiple of 128 for the gated epilogue; got 192"):
        product(which, x, weight, epilogue=GATED)


@pytest.mark.skipif(GPU, reason="plays other devices")
@pytest.mark.parametrize("capability", (80, 100))
def test_wgmma_wants_its_device(capability: int) -> None:
    configure(4, seed=0, capability=capability)
    x, weight, _ = inputs(70, 64, 80, group_size=32, dtype=torch.float16)
    with pytest.raises(RuntimeError, match=r"want a device of compute capability 9\.0"):
        product("wgmma", x, weight)


def test_plan_must_cover_the_weight() -> None:
    x, weight, _ = inputs(70, 64, 200, group_size=32, dtype=torch.float16)
    for plan in ((4, 3, 1), (0, 4, 1), (13, 0, 1), (13, 1, 2)):
        with pytest.raises(ValueError, match="plan: want"):
            product("many", x, weight, plan=plan)


# -- hostile memory ---------------------------------------------------------------------------------------------------
@both
@pytest.mark.parametrize("k", (200, 203), ids=("aligned", "unaligned"))
def test_padding_is_not_read(which: str, k: int) -> None:
    x, weight, bias = inputs(67, 70, k, group_size=64, bias=True, dtype=torch.bfloat16)
    y = product(which, x, weight, bias=bias)
    assert bias is not None and weight.zeros is not None
    row_exists = pack_groups(torch.ones(70, weight.num_groups, device=DEVICE)).bool()
    hostile = dataclasses.replace(
        weight,
        scales=surrounded_by_nan(torch.where(row_exists, weight.scales, torch.nan), 64),
        zeros=torch.where(row_exists, weight.zeros, 255),
    )
    margin = 67 if k % 8 else 64  # a base that is aligned, or not
    again = product(which, surrounded_by_nan(x, margin), hostile, bias=surrounded_by_nan(bias))
    assert bitwise_equal(again, y)
