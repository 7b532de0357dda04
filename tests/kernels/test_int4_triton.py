"""The Triton room of int4: run on a GPU where there is one, else by the interpreter; and compiled for GPUs not present.

The interpreter multiplies with numpy: that a row is bitwise the same for every tile and neighbour is tested here for
our own arithmetic around the dot product; on a GPU the same tests cover the matrix units.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from triton_costs import costs, run_uninterpreted, target

from m3kernels.dispatch import BackendError
from m3kernels.int4 import Int4Weight, int4_dequantize, int4_gemm, int4_grouped_gemm, int4_moe
from m3kernels.int4.ops import flat
from m3kernels.int4.reference import TOLERANCE, gemm64, make_inputs, stored_weight
from m3kernels.int4.types import pack_groups
from m3kernels.testing import bitwise_equal, check_error, surrounded_by_nan, uninitialized_is_nan
from m3kernels.triton_compile import SHARED_LIMIT, TARGETS

triton = pytest.importorskip("triton", reason="Triton is not installed")
_triton = pytest.importorskip("m3kernels.int4._triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BUDGET = json.loads((Path(__file__).parent / "int4_triton_budget.json").read_text())
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA GPU")
half_and_single = pytest.mark.parametrize("dtype", (torch.float16, torch.float32), ids=str)
every_dtype = pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float32), ids=str)


def in_triton(test: Callable[..., None]) -> Callable[..., None]:
    """Forces the Triton room, and marks the test as a GPU test where there is a GPU."""
    forced = pytest.mark.parametrize("backend", ["int4=triton"], indirect=True)(test)
    return pytest.mark.gpu(forced) if DEVICE == "cuda" else forced


def inputs(m: int, n: int, k: int, **options: Any) -> tuple[Tensor, Int4Weight, Tensor | None]:
    x, weight, bias = make_inputs(m, n, k, **options)
    return x.to(DEVICE), weight.to(DEVICE), None if bias is None else bias.to(DEVICE)


def exact64(x: Tensor, weight: Int4Weight, bias: Tensor | None = None) -> Tensor:
    y = gemm64(x, weight, "exact")
    return y if bias is None else y + bias.double()


def dense(weight: Int4Weight) -> Tensor:
    """W (..., N, K) fp64 in original column order."""
    stored = stored_weight(weight)
    if weight.perm is None:
        return stored
    return stored.gather(-1, weight.perm.long().argsort(-1).unsqueeze(-2).expand_as(stored))


def in_torch(x: Tensor, weight: Int4Weight, bias: Tensor | None = None) -> Tensor:
    """The product in x's dtype with the dequantised weight in that dtype."""
    return torch.nn.functional.linear(x, dense(weight).to(x.dtype), bias)


# -- values -----------------------------------------------------------------------------------------------------------
CASES: dict[str, dict[str, Any]] = {
    "one_by_one": dict(m=1, n=1, k=1, group_size=32),
    "three_weight_tiles": dict(m=3, n=130, k=200, group_size=128),
    "symmetric": dict(m=5, n=70, k=150, group_size=64, symmetric=True),
    "group_32": dict(m=2, n=65, k=100, group_size=32),
    "group_48": dict(m=2, n=63, k=101, group_size=48),
    "group_192": dict(m=2, n=40, k=230, group_size=192),
    "per_channel": dict(m=4, n=64, k=139, group_size=-1),
    "act_order": dict(m=3, n=33, k=140, group_size=64, act_order=True),
    "bias": dict(m=4, n=70, k=64, group_size=64, bias=True),
    "bf16_scales": dict(m=2, n=64, k=80, group_size=64, scale_dtype=torch.bfloat16),
    "fp32_scales": dict(m=2, n=64, k=80, group_size=64, scale_dtype=torch.float32),
    "two_token_tiles": dict(m=67, n=20, k=96, group_size=128, bias=True),
    "two_splits": dict(m=2, n=20, k=1030, group_size=128, bias=True),
}


@in_triton
@half_and_single
@pytest.mark.parametrize("case", CASES)
def test_gemm(backend: str, dtype: torch.dtype, case: str) -> None:
    x, weight, bias = inputs(**CASES[case], dtype=dtype)
    check_error(int4_gemm(x, weight, bias), exact64(x, weight, bias), in_torch(x, weight, bias), TOLERANCE)


@in_triton
@pytest.mark.parametrize("case", ("three_weight_tiles", "act_order", "bias", "bf16_scales"))
def test_gemm_bf16(backend: str, case: str) -> None:
    x, weight, bias = inputs(**CASES[case], dtype=torch.bfloat16)
    check_error(int4_gemm(x, weight, bias), exact64(x, weight, bias), in_torch(x, weight, bias), TOLERANCE)


@in_triton
@half_and_single
@pytest.mark.parametrize(("start", "stop"), ((48, 149), (128, 200), (144, 145)))
def test_slice_that_starts_inside_a_group(backend: str, dtype: torch.dtype, start: int, stop: int) -> None:
    _, whole, _ = inputs(1, 70, 200, group_size=128)
    x, part = torch.randn(3, stop - start, device=DEVICE).to(dtype), whole.slice_in(start, stop)
    assert torch.equal(stored_weight(part), stored_weight(whole)[:, start:stop])
    check_error(int4_gemm(x, part), exact64(x, part), in_torch(x, part), TOLERANCE)


@in_triton
@every_dtype
@pytest.mark.parametrize("zero", (0, 16))
def test_extreme_zeros(backend: str, dtype: torch.dtype, zero: int) -> None:
    """Every u - z is +-1 or 0 while z is far from the middle: sums that cancel keep their precision."""
    q = torch.randint(0, 2, (70, 96), dtype=torch.uint8) + (14 if zero == 16 else 0)
    scales, zeros = torch.rand(70, 3) + 0.5, torch.full((70, 3), zero, dtype=torch.uint8)
    weight = Int4Weight.pack(q, scales.half(), zeros, group_size=32).to(DEVICE)
    x = torch.randn(3, 96, device=DEVICE).to(dtype)
    check_error(int4_gemm(x, weight), exact64(x, weight), in_torch(x, weight), TOLERANCE)


# -- row-invariance, determinism --------------------------------------------------------------------------------------
@in_triton
@half_and_single
def test_tile_and_grid_change_no_bit(backend: str, dtype: torch.dtype) -> None:
    """Compared in fp32, where a sum in another order would show."""
    x, packed, bias = inputs(18, 20, 1030, group_size=128, bias=True, dtype=dtype)
    weight = _triton.Weight(*flat(packed))
    assert weight.plan(dtype).splits == 2
    operand = _triton.arrange(x, weight)
    choices = [(tile, split) for tile in _triton.TILES[dtype] for split in (True, False)]
    results = [_triton.product(operand, weight, 18, torch.float32, bias=bias, choice=t, split=s) for t, s in choices]
    assert all(bitwise_equal(result, results[0]) for result in results)
    alone = _triton.product(_triton.arrange(x[17:], weight), weight, 1, torch.float32, bias=bias)
    assert bitwise_equal(alone, results[0][17:])


@in_triton
@every_dtype
def test_gemm_is_row_invariant(backend: str, dtype: torch.dtype) -> None:
    x, weight, _ = inputs(37, 70, 72, group_size=64, dtype=dtype)
    y = int4_gemm(x, weight)
    assert bitwise_equal(int4_gemm(x, weight), y)
    alone = torch.cat([int4_gemm(x[i : i + 1], weight) for i in range(0, 37, 9)])
    assert bitwise_equal(alone, y[::9])
    order = torch.randperm(37)
    assert bitwise_equal(int4_gemm(x[order], weight), y[order])
    neighbours = torch.cat((torch.full((50, 72), 100.0, dtype=dtype, device=DEVICE), x[5:20]))
    assert bitwise_equal(int4_gemm(neighbours, weight)[50:], y[5:20])


@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")
@in_triton
@half_and_single
@pytest.mark.parametrize("value", (torch.nan, torch.inf))
def test_what_is_not_finite_stays_in_its_row(backend: str, dtype: torch.dtype, value: float) -> None:
    x, weight, _ = inputs(5, 70, 130, group_size=64, dtype=dtype)
    clean = int4_gemm(x, weight)
    x[2, 129] = value
    y = int4_gemm(x, weight)
    assert bitwise_equal(y[[0, 1, 3, 4]], clean[[0, 1, 3, 4]])
    assert not y[2].isfinite().any()


# -- edges and hostile memory -----------------------------------------------------------------------------------------
@in_triton
def test_no_rows(backend: str) -> None:
    x, weight, _ = inputs(0, 70, 200)
    assert int4_gemm(x, weight).shape == (0, 70)
    rows, experts, _ = inputs(0, 64, 96, group_size=32, experts=2)
    offsets = torch.zeros(3, dtype=torch.int64, device=DEVICE)
    assert int4_grouped_gemm(rows, experts, offsets).shape == (0, 64)


@in_triton
@half_and_single
def test_padding_and_uninitialised_memory_are_not_read(backend: str, dtype: torch.dtype) -> None:
    x, weight, bias = inputs(3, 70, 200, group_size=64, bias=True, act_order=True, dtype=dtype)
    y = int4_gemm(x, weight, bias)
    assert bias is not None and weight.zeros is not None
    row_exists = pack_groups(torch.ones(70, weight.num_groups, device=DEVICE)).bool()
    hostile = dataclasses.replace(
        weight,
        scales=surrounded_by_nan(torch.where(row_exists, weight.scales, torch.nan)),
        zeros=torch.where(row_exists, weight.zeros, 255),
    )
    with uninitialized_is_nan():
        again = int4_gemm(surrounded_by_nan(x), hostile, surrounded_by_nan(bias))
    assert bitwise_equal(again, y)


# -- grouped, mixture of experts, dequantise --------------------------------------------------------------------------
GROUPED: dict[str, dict[str, Any]] = {
    "even": dict(bounds=[0, 2, 4], n=70, k=100, group_size=64),
    "empty_experts": dict(bounds=[0, 0, 7, 7, 9, 9], n=65, k=130, group_size=32),
    "more_than_a_tile": dict(bounds=[0, 19, 20, 37], n=20, k=96, group_size=128, symmetric=True),
    "act_order": dict(bounds=[0, 1, 4], n=33, k=100, group_size=48, act_order=True),
    "two_splits": dict(bounds=[0, 2, 3], n=20, k=1030, group_size=128),
}


@in_triton
@half_and_single
@pytest.mark.parametrize("case", GROUPED)
def test_grouped_gemm(backend: str, dtype: torch.dtype, case: str) -> None:
    shape = dict(GROUPED[case])
    bounds = shape.pop("bounds")
    x, weight, _ = inputs(bounds[-1], experts=len(bounds) - 1, dtype=dtype, **shape)
    with uninitialized_is_nan():
        y = int4_grouped_gemm(x, weight, torch.tensor(bounds, device=DEVICE))
    rows = [(x[a:b], weight.expert(e)) for e, (a, b) in enumerate(itertools.pairwise(bounds))]
    expected, torchs = (torch.cat([function(*row) for row in rows]) for function in (exact64, in_torch))
    check_error(y, expected, torchs, TOLERANCE)


def moe_inputs(
    tokens: int, hidden: int, intermediate: int, experts: int, top_k: int, dtype: torch.dtype, **options: Any
) -> tuple[Tensor, Int4Weight, Int4Weight, Tensor, Tensor]:
    x, w13, _ = inputs(tokens, 2 * intermediate, hidden, experts=experts, dtype=dtype, **options)
    _, w2, _ = inputs(1, hidden, intermediate, experts=experts, seed=1, **options)
    scores, ids = torch.randn(tokens, experts, device=DEVICE).softmax(-1).topk(top_k)
    return x, w13, w2, ids, scores


def moe_in_torch(x: Tensor, w13: Int4Weight, w2: Int4Weight, ids: Tensor, scores: Tensor, dtype: torch.dtype) -> Tensor:
    """int4_moe token by token in ``dtype``, on weights dequantised to it."""
    gates_and_ups, downs = (dense(weight.to("cpu")).to(dtype) for weight in (w13, w2))
    y = torch.zeros(len(x), w2.out_features, dtype=dtype)
    for t, slot in itertools.product(range(len(x)), range(ids.shape[1])):
        e, score = int(ids[t, slot]), scores[t, slot].cpu().to(dtype)
        gate, up = (gates_and_ups[e] @ x[t].cpu().to(dtype)).chunk(2)
        y[t] += score * (downs[e] @ (torch.nn.functional.silu(gate) * up))
    return y.to(DEVICE)


MOE: dict[str, dict[str, Any]] = {
    "one_token": dict(tokens=1, hidden=33, intermediate=17, experts=3, top_k=1, group_size=32),
    "odd": dict(tokens=5, hidden=70, intermediate=101, experts=5, top_k=2, group_size=64),
    "symmetric": dict(tokens=3, hidden=64, intermediate=96, experts=2, top_k=2, group_size=128, symmetric=True),
    "act_order": dict(tokens=4, hidden=48, intermediate=40, experts=3, top_k=2, group_size=48, act_order=True),
}


@pytest.mark.parametrize("case", MOE)
@half_and_single
@in_triton
def test_moe(backend: str, dtype: torch.dtype, case: str) -> None:
    x, w13, w2, ids, scores = moe_inputs(**MOE[case], dtype=dtype)
    with uninitialized_is_nan():
        y = int4_moe(x, w13, w2, ids, scores)
    expected, torchs = (moe_in_torch(x, w13, w2, ids, scores, kind) for kind in (torch.float64, dtype))
    check_error(y, expected, torchs, TOLERANCE)


@in_triton
def test_moe_without_tokens_or_slots(backend: str) -> None:
    x, w13, w2, ids, scores = moe_inputs(2, 32, 32, 2, 1, torch.float16, group_size=32)
    assert int4_moe(x[:0], w13, w2, ids[:0], scores[:0]).shape == (0, 32)
    assert torch.equal(int4_moe(x, w13, w2, ids[:, :0], scores[:, :0]), torch.zeros_like(x))


@half_and_single
@in_triton
def test_moe_is_row_invariant(backend: str, dtype: torch.dtype) -> None:
    x, w13, w2, ids, scores = moe_inputs(19, 40, 32, 2, 1, dtype, group_size=64)
    y = int4_moe(x, w13, w2, ids, scores)
    order = torch.randperm(19)
    assert bitwise_equal(int4_moe(x[order], w13, w2, ids[order], scores[order]), y[order])
    assert bitwise_equal(int4_moe(x[18:], w13, w2, ids[18:], scores[18:]), y[18:])


@in_triton
@every_dtype
def test_dequantize(backend: str, dtype: torch.dtype) -> None:
    _, weight, _ = inputs(1, 66, 50, group_size=-1, symmetric=True)
    _, stack, _ = inputs(1, 33, 60, group_size=48, act_order=True, experts=2)
    assert bitwise_equal(int4_dequantize(weight, dtype), stored_weight(weight).float().to(dtype))
    assert bitwise_equal(int4_dequantize(stack, dtype), dense(stack).float().to(dtype))
    part = weight.slice_in(16, 49)
    assert bitwise_equal(int4_dequantize(part, dtype), stored_weight(part).float().to(dtype))


# -- the room ---------------------------------------------------------------------------------------------------------
@in_triton
def test_opcheck(backend: str) -> None:
    x, weight, bias = inputs(2, 20, 40, group_size=32, act_order=True, bias=True)
    qweight, scales, zeros, perm, *numbers = flat(weight)
    rows, stack, _ = inputs(3, 20, 32, group_size=32, experts=2)
    tokens, w13, w2, ids, scores = moe_inputs(2, 16, 16, 2, 1, torch.float32, group_size=32)
    ops = torch.ops.m3kernels
    torch.library.opcheck(ops.int4_gemm.default, (x, qweight, scales, zeros, perm, bias, *numbers, True, "auto"))
    offsets = torch.tensor([0, 1, 3], device=DEVICE)
    torch.library.opcheck(ops.int4_grouped_gemm.default, (rows, offsets, *flat(stack), True, "auto"))
    moe = (tokens, ids, scores, *flat(w13)[:4], *flat(w2)[:4], 16, 16, 32, 0, 0, True, "auto")
    torch.library.opcheck(ops.int4_moe.default, moe)
    torch.library.opcheck(ops.int4_dequantize.default, (*flat(weight), torch.float16))


@in_triton
@pytest.mark.parametrize("activations", ("int16", "int8"))
def test_rounded_activations_are_refused(backend: str, activations: str) -> None:
    x, weight, _ = inputs(2, 20, 40, group_size=32)
    with pytest.raises(
        BackendError, match=f"triton: activations '{activations}': the Triton room rounds no activations"
    ):
        int4_gemm(x, weight, activations=activations)


def test_splits_depend_on_the_weight_alone() -> None:
    cut = _triton.plan(4096, 4096, 128, 0, torch.bfloat16)
    assert (cut.block_k, cut.k_blocks, cut.split_blocks, cut.splits) == (128, 32, 4, 8)
    assert _triton.plan(4096, 4096, 128, 64, torch.bfloat16).block_k == 64
    assert _triton.plan(576, 576, 32, 0, torch.bfloat16).block_k == 32
    assert _triton.plan(576, 576, 48, 0, torch.bfloat16).block_k == 16
    assert _triton.plan(151936, 4096, -1, 0, torch.float16).splits == 1


@pytest.mark.gpu
@needs_gpu
@in_triton
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize("options", (dict(group_size=128, symmetric=True), dict(group_size=32)), ids=str)
def test_a_real_size_on_a_gpu(backend: str, dtype: torch.dtype, options: dict[str, Any]) -> None:
    x, weight, bias = inputs(1100, 4096, 4096, bias=True, dtype=dtype, **options)
    y = int4_gemm(x, weight, bias)
    check_error(y, x.double() @ dense(weight).T + bias.double(), in_torch(x, weight, bias), TOLERANCE)  # type: ignore[union-attr]
    rows = (1, 2, 7, 16, 17, 32, 48, 64, 65, 128, 300)
    assert all(bitwise_equal(int4_gemm(x[:m], weight, bias), y[:m]) for m in rows)


@pytest.mark.gpu
@needs_gpu
@in_triton
def test_moe_is_captured_in_a_cuda_graph(backend: str) -> None:
    x, w13, w2, ids, scores = moe_inputs(16, 256, 192, 8, 2, torch.bfloat16, group_size=64)
    y = int4_moe(x, w13, w2, ids, scores)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = int4_moe(x, w13, w2, ids, scores)
    ids.copy_(ids.flip(0))
    graph.replay()
    assert bitwise_equal(captured, int4_moe(x, w13, w2, ids, scores))
    assert not bitwise_equal(captured, y)


# -- compiled for GPUs that are not here ------------------------------------------------------------------------------
MODULE = "m3kernels.int4._triton"


@pytest.mark.parametrize("target", TARGETS)
def test_every_case_has_a_budget(target: str) -> None:
    assert {case.name for case in _triton.compile_cases(target)} == set(BUDGET[target])


@pytest.mark.parametrize(("target", "case"), [target(each, case) for each in TARGETS for case in BUDGET[each]])
def test_compiles_within_its_budget(target: str, case: str) -> None:
    cost, budget = costs(MODULE, target)[case], BUDGET[target][case]
    assert cost["shared"] <= SHARED_LIMIT[target]
    claims_matrix_units = {case.name: case.matrix_units for case in _triton.compile_cases(target)}[case]
    assert (cost["matrix_instructions"] > 0) >= claims_matrix_units
    if triton.__version__ == BUDGET["triton"]:
        assert {name: cost[name] for name in budget if cost[name] > budget[name]} == {}


@pytest.mark.parametrize("target", [target(each) for each in ("sm_80", "sm_90", "gfx942")])
def test_nothing_spills(target: str) -> None:
    assert {case: cost["spills"] for case, cost in costs(MODULE, target).items() if cost["spills"]} == {}


def test_cpu_tensors_are_refused_without_the_interpreter() -> None:
    program = (
        "from m3kernels.int4 import _triton, ops, reference\n"
        "x, weight, bias = reference.make_inputs(1, 8, 16, group_size=16)\n"
        "tensors = ops.flat(weight)\n"
        "assert 'TRITON_INTERPRET=1' in _triton.unsupported('int4_gemm', x, *tensors, 'auto')\n"
        "assert 'TRITON_INTERPRET=1' in _triton.unsupported('int4_dequantize', *tensors, x.dtype)\n"
    )
    result = run_uninterpreted("-c", program)
    assert result.returncode == 0, result.stderr
