"""The CUDA room of int4: values against fp64, bits against numbers of rows, hostile ids and memory, what it refuses.

Runs on a GPU where there is one, else on the emulated device, whose orders come from a seed.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from m3kernels.dispatch import BackendError
from m3kernels.int4 import Int4Weight, int4_dequantize, int4_gemm, int4_grouped_gemm, int4_moe, reference
from m3kernels.int4.ops import flat
from m3kernels.int4.reference import TOLERANCE, gemm64, make_inputs, stored_weight
from m3kernels.int4.types import pack_groups, pack_nibbles
from m3kernels.testing import bitwise_equal, check_error, surrounded_by_nan, uninitialized_is_nan

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALVES = (torch.bfloat16, torch.float16)
pytestmark = [
    pytest.mark.parametrize("backend", ["int4=cuda"], indirect=True),
    *([pytest.mark.gpu] if DEVICE == "cuda" else []),
]
halves = pytest.mark.parametrize("dtype", HALVES, ids=str)
either_promise = pytest.mark.parametrize("row_invariant", (True, False), ids=("row_invariant", "free"))
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA GPU")
emulated = pytest.mark.skipif(DEVICE == "cuda", reason="chooses the emulated device")


def configure(**options: int) -> None:
    if DEVICE == "cpu":
        import emulated_cuda

        emulated_cuda.configure(**options)


def inputs(m: int, n: int, k: int, **options: Any) -> tuple[Tensor, Int4Weight, Tensor | None]:
    x, weight, bias = make_inputs(m, n, k, **options)
    return x.to(DEVICE), weight.to(DEVICE), None if bias is None else bias.to(DEVICE)


def dense(weight: Int4Weight) -> Tensor:
    """W (..., N, K) fp64 in original column order."""
    stored = stored_weight(weight)
    if weight.perm is None:
        return stored
    return stored.gather(-1, weight.perm.long().argsort(-1).unsqueeze(-2).expand_as(stored))


def exact64(x: Tensor, weight: Int4Weight, bias: Tensor | None = None) -> Tensor:
    y = gemm64(x, weight, "exact")
    return y if bias is None else y + bias.double()


def in_torch(x: Tensor, weight: Int4Weight, bias: Tensor | None = None) -> Tensor:
    return torch.nn.functional.linear(x, dense(weight).to(x.dtype), bias)


# -- values -----------------------------------------------------------------------------------------------------------
CASES: dict[str, dict[str, Any]] = {
    "one_by_one": dict(m=1, n=1, k=1, group_size=32),
    "decode": dict(m=3, n=130, k=400, group_size=128, bias=True),
    "symmetric": dict(m=5, n=70, k=150, group_size=64, symmetric=True),
    "group_48": dict(m=2, n=63, k=101, group_size=48),
    "per_channel": dict(m=4, n=64, k=139, group_size=-1, bias=True),
    "act_order": dict(m=3, n=33, k=140, group_size=64, act_order=True),
    "seven_tiles_of_few_rows": dict(m=9, n=390, k=96, group_size=32),
    "seven_tiles_of_some_rows": dict(m=33, n=390, k=96, group_size=32),
    "seven_tiles_of_many_rows": dict(m=70, n=390, k=96, group_size=32),
    "most_of_decode": dict(m=64, n=65, k=130, group_size=32),
    "many_rows": dict(m=70, n=65, k=130, group_size=32, act_order=True, bias=True),
}


@halves
@either_promise
@pytest.mark.parametrize("case", CASES)
def test_gemm(backend: str, dtype: torch.dtype, row_invariant: bool, case: str) -> None:
    x, weight, bias = inputs(**CASES[case], dtype=dtype)
    y = int4_gemm(x, weight, bias, row_invariant=row_invariant)
    check_error(y, exact64(x, weight, bias), in_torch(x, weight, bias), TOLERANCE)


@halves
@pytest.mark.parametrize("scale_dtype", (torch.float32, torch.bfloat16), ids=str)
def test_gemm_with_other_scales(backend: str, dtype: torch.dtype, scale_dtype: torch.dtype) -> None:
    x, weight, _ = inputs(5, 70, 200, group_size=64, dtype=dtype, scale_dtype=scale_dtype)
    check_error(int4_gemm(x, weight), exact64(x, weight), in_torch(x, weight), TOLERANCE)


@emulated
@either_promise
@pytest.mark.parametrize("capability", (80, 90, 100, 120))
@pytest.mark.parametrize("m", (7, 90))
def test_gemm_on_every_architecture(backend: str, row_invariant: bool, capability: int, m: int) -> None:
    configure(capability=capability, multiprocessors=3, seed=m)
    x, weight, bias = inputs(m, 70, 200, group_size=64, dtype=torch.bfloat16, bias=True)
    y = int4_gemm(x, weight, bias, row_invariant=row_invariant)
    check_error(y, exact64(x, weight, bias), in_torch(x, weight, bias), TOLERANCE)


@emulated
def test_gemm_that_runs_as_a_dense_product(backend: str) -> None:
    """More rows than the packed kernels are fast for: dequantised, columns in stored order, and torch's product."""
    configure(capability=100)
    x, weight, bias = inputs(300, 65, 96, group_size=32, dtype=torch.bfloat16, act_order=True, bias=True)
    y = int4_gemm(x, weight, bias, row_invariant=False)
    check_error(y, exact64(x, weight, bias), in_torch(x, weight, bias), TOLERANCE)


GROUPED: dict[str, dict[str, Any]] = {
    "even": dict(bounds=[0, 4, 8, 12], n=70, k=200, group_size=64),
    "empty_experts": dict(bounds=[0, 0, 7, 7, 12, 12], n=65, k=130, group_size=32),
    "act_order": dict(bounds=[0, 1, 9], n=33, k=100, group_size=48, act_order=True),
    "more_rows_than_decode": dict(bounds=[0, 70, 150], n=40, k=96, group_size=96),
    "one_busy_expert": dict(bounds=[0, 0, 100, 100, 101], n=40, k=96, group_size=96),
    "seven_tiles": dict(bounds=[0, 9, 29], n=390, k=64, group_size=32),
    "no_rows": dict(bounds=[0, 0, 0], n=64, k=96, group_size=32),
}


@halves
@either_promise
@pytest.mark.parametrize("case", GROUPED)
def test_grouped_gemm(backend: str, dtype: torch.dtype, row_invariant: bool, case: str) -> None:
    shape = dict(GROUPED[case])
    bounds = shape.pop("bounds")
    x, weight, _ = inputs(bounds[-1], experts=len(bounds) - 1, dtype=dtype, **shape)
    y = int4_grouped_gemm(x, weight, torch.tensor(bounds, device=DEVICE), row_invariant=row_invariant)
    parts = [(x[a:b], weight.expert(e)) for e, (a, b) in enumerate(itertools.pairwise(bounds))]
    expected, baseline = (torch.cat([f(*part) for part in parts]) for f in (exact64, in_torch))
    check_error(y, expected, baseline, TOLERANCE)


def moe_inputs(
    tokens: int, hidden: int, intermediate: int, experts: int, top_k: int, dtype: torch.dtype, **options: Any
) -> tuple[Tensor, Int4Weight, Int4Weight, Tensor, Tensor]:
    options = {"group_size": 32} | options
    x, w13, _ = inputs(tokens, 2 * intermediate, hidden, experts=experts, dtype=dtype, **options)
    _, w2, _ = inputs(1, hidden, intermediate, experts=experts, seed=1, **options)
    scores, ids = torch.randn(tokens, experts).softmax(-1).topk(top_k)
    return x, w13, w2, ids.to(DEVICE), scores.to(DEVICE)


def moe_in_torch(x: Tensor, w13: Tensor, w2: Tensor, ids: Tensor, scores: Tensor) -> Tensor:
    """int4_moe on dense weights, token by token, in the dtype of the weights."""
    y = torch.zeros(len(x), w2.shape[1], dtype=w2.dtype, device=x.device)
    for t in range(len(x)):
        for e, score in zip(ids[t].tolist(), scores[t].to(w2.dtype), strict=True):
            gate, up = (w13[e] @ x[t].to(w2.dtype)).chunk(2)
            y[t] += score * (w2[e] @ (torch.nn.functional.silu(gate) * up))
    return y


MOE: dict[str, dict[str, Any]] = {
    "gated": dict(tokens=5, hidden=48, intermediate=64, experts=4, top_k=2),
    "gate_apart": dict(tokens=9, hidden=70, intermediate=37, experts=5, top_k=3, group_size=48),
    "one_token": dict(tokens=1, hidden=33, intermediate=17, experts=3, top_k=1),
    "five_tiles": dict(tokens=30, hidden=290, intermediate=320, experts=2, top_k=2),
    "symmetric": dict(tokens=6, hidden=64, intermediate=128, experts=5, top_k=2, group_size=128, symmetric=True),
    "act_order": dict(tokens=6, hidden=96, intermediate=64, experts=4, top_k=2, act_order=True),
    "many_rows": dict(tokens=90, hidden=48, intermediate=64, experts=2, top_k=2),
    "no_token": dict(tokens=0, hidden=32, intermediate=32, experts=2, top_k=2),
}


@halves
@either_promise
@pytest.mark.parametrize("case", MOE)
def test_moe(backend: str, dtype: torch.dtype, row_invariant: bool, case: str) -> None:
    x, w13, w2, ids, scores = moe_inputs(**MOE[case], dtype=dtype)
    y = int4_moe(x, w13, w2, ids, scores, row_invariant=row_invariant)
    w13_dense, w2_dense = dense(w13), dense(w2)
    expected = moe_in_torch(x, w13_dense, w2_dense, ids, scores)
    check_error(y, expected, moe_in_torch(x, w13_dense.to(dtype), w2_dense.to(dtype), ids, scores), TOLERANCE)


@halves
def test_gradients(backend: str, dtype: torch.dtype) -> None:
    x, weight, bias = inputs(6, 70, 130, group_size=64, act_order=True, dtype=dtype, bias=True)
    assert bias is not None
    x, bias, dy = x.view(3, 2, 130).requires_grad_(), bias.requires_grad_(), torch.randn(3, 2, 70).to(x)
    int4_gemm(x, weight, bias, row_invariant=False).backward(dy)
    assert x.grad is not None and bias.grad is not None
    check_error(x.grad, dy.double() @ dense(weight), dy @ dense(weight).to(dtype), TOLERANCE)
    check_error(bias.grad, dy.double().sum((0, 1)), dy.view(-1, 70).sum(0), TOLERANCE)


# -- row-invariance ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("m", "dtype"), list(zip((1, 15, 17, 64, 65, 100), 3 * HALVES, strict=True)), ids=str)
def test_every_number_of_rows_gives_the_same_rows(backend: str, m: int, dtype: torch.dtype) -> None:
    x, weight, bias = inputs(130, 65, 200, group_size=48, dtype=dtype, bias=True)
    whole = int4_gemm(x, weight, bias)
    configure(seed=m)
    assert bitwise_equal(int4_gemm(x[:m], weight, bias), whole[:m])
    assert bitwise_equal(int4_gemm(x[130 - m :], weight, bias), whole[130 - m :])


def test_grouped_rows_do_not_see_each_other(backend: str) -> None:
    x, weight, _ = inputs(150, 40, 96, group_size=32, experts=2, dtype=torch.bfloat16)
    whole = int4_grouped_gemm(x, weight, torch.tensor([0, 70, 150], device=DEVICE))
    few = int4_grouped_gemm(x[67:75], weight, torch.tensor([0, 3, 8], device=DEVICE))
    assert bitwise_equal(few, whole[67:75])


@pytest.mark.parametrize("case", ("gated", "gate_apart", "many_rows"))
def test_a_token_does_not_see_the_others(backend: str, case: str) -> None:
    x, w13, w2, ids, scores = moe_inputs(**MOE[case], dtype=torch.bfloat16)
    y = int4_moe(x, w13, w2, ids, scores)
    order = torch.randperm(len(x))[:12].to(DEVICE)
    assert bitwise_equal(int4_moe(x[order], w13, w2, ids[order], scores[order]), y[order])


@pytest.mark.parametrize("case", ("decode", "many_rows"))
@either_promise
def test_runs_agree(backend: str, case: str, row_invariant: bool) -> None:
    x, weight, bias = inputs(**CASES[case], dtype=torch.bfloat16)
    y = int4_gemm(x, weight, bias, row_invariant=row_invariant)
    for seed in (1, 2):
        configure(seed=seed)
        assert bitwise_equal(int4_gemm(x, weight, bias, row_invariant=row_invariant), y)


# -- hostile ids and memory -------------------------------------------------------------------------------------------
def moe_op(x: Tensor, w13: Int4Weight, w2: Int4Weight, ids: Tensor, scores: Tensor) -> Tensor:
    """The registered op, which the public checks of ids do not guard."""
    numbers = (w13.in_features, w2.in_features, w13.group_size, 0, 0)
    return torch.ops.m3kernels.int4_moe(x, ids, scores, *flat(w13)[:4], *flat(w2)[:4], *numbers, True, "auto")


@pytest.mark.parametrize("case", ("gated", "gate_apart", "act_order"))
def test_moe_leaves_out_experts_that_do_not_exist(backend: str, case: str) -> None:
    x, w13, w2, ids, scores = moe_inputs(**MOE[case], dtype=torch.bfloat16)
    y = moe_op(x, w13, w2, ids, scores)
    wrong, experts = ids.clone(), len(w13.qweight)
    wrong[0, :] = torch.tensor([-1, experts, 2**40])[: ids.shape[1]]
    wrong[1, 0] = -(2**63)
    silent = scores.clone()
    silent[1, 0] = 0
    with uninitialized_is_nan():
        found = moe_op(x, w13, w2, wrong, scores)
    assert (found[0] == 0).all()
    assert bitwise_equal(found[1] + 0, moe_op(x, w13, w2, ids, silent)[1] + 0)
    assert bitwise_equal(found[2:], y[2:])


@pytest.mark.parametrize(
    "bounds", ([-5, 2, 6], [0, 9, 6], [0, 2, 2**40], [3, 1, 0], [0, 2**31, -(2**31)]), ids=lambda bounds: str(bounds)
)
def test_grouped_gemm_survives_hostile_offsets(backend: str, bounds: list[int]) -> None:
    x, weight, _ = inputs(6, 70, 96, group_size=32, experts=2, dtype=torch.bfloat16)
    offsets = torch.tensor(bounds, device=DEVICE)
    y = torch.ops.m3kernels.int4_grouped_gemm(x, offsets, *flat(weight), True, "auto")
    assert y.shape == (6, 70)


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


@halves
@either_promise
@pytest.mark.parametrize("case", ("one_by_one", "group_48", "per_channel", "act_order", "many_rows"))
def test_gemm_reads_and_writes_only_what_is_its_own(
    backend: str, dtype: torch.dtype, row_invariant: bool, case: str
) -> None:
    x, weight, bias = inputs(**CASES[case], dtype=dtype)
    y = int4_gemm(x, weight, bias, row_invariant=row_invariant)
    around_bias = None if bias is None else surrounded_by_nan(bias)
    with uninitialized_is_nan():
        again = int4_gemm(surrounded_by_nan(x), with_poisoned_padding(weight), around_bias, row_invariant=row_invariant)
    assert bitwise_equal(again, y)


@pytest.mark.parametrize("case", ("gated", "gate_apart", "many_rows"))
def test_moe_reads_and_writes_only_what_is_its_own(backend: str, case: str) -> None:
    x, w13, w2, ids, scores = moe_inputs(**MOE[case], dtype=torch.bfloat16)
    y = int4_moe(x, w13, w2, ids, scores)
    around = surrounded_by_nan(x), with_poisoned_padding(w13), with_poisoned_padding(w2), ids, surrounded_by_nan(scores)
    with uninitialized_is_nan():
        assert bitwise_equal(int4_moe(*around), y)


def test_what_is_not_finite_stays_in_its_row(backend: str) -> None:
    x, weight, _ = inputs(5, 70, 200, group_size=64, dtype=torch.bfloat16)
    clean = int4_gemm(x, weight)
    x[2, 17] = torch.nan
    y = int4_gemm(x, weight)
    assert y[2].isnan().all() and bitwise_equal(y[[0, 1, 3, 4]], clean[[0, 1, 3, 4]])


@pytest.mark.parametrize("shift", range(1, 8))
def test_x_may_start_anywhere(backend: str, shift: int) -> None:
    """A contiguous x whose address only 2 divides."""
    x, weight, bias = inputs(3, 70, 200, group_size=64, dtype=torch.bfloat16, bias=True)
    buffer = torch.full((x.numel() + 16,), torch.nan, dtype=x.dtype, device=DEVICE)
    moved = buffer[shift : shift + x.numel()].view(x.shape).copy_(x)
    assert bitwise_equal(int4_gemm(moved, weight, bias), int4_gemm(x, weight, bias))


# -- the room ---------------------------------------------------------------------------------------------------------
def test_what_it_refuses(backend: str) -> None:
    x, weight, _ = inputs(2, 64, 64, group_size=32)
    with pytest.raises(BackendError, match="computes bf16 and fp16; fp32 is the Triton room's"):
        int4_gemm(x, weight)
    for activations in ("int16", "int8"):
        with pytest.raises(BackendError, match=f"activations '{activations}': the CUDA room rounds no activations"):
            int4_gemm(x.bfloat16(), weight, activations=activations)
    experts = make_inputs(1, 2, 1, group_size=16, experts=2049, symmetric=True)[1].to(DEVICE)
    ids, scores = torch.zeros(1, 1, dtype=torch.int64, device=DEVICE), torch.ones(1, 1, device=DEVICE)
    w2 = make_inputs(1, 1, 1, group_size=16, experts=2049, symmetric=True)[1].to(DEVICE)
    with pytest.raises(BackendError, match="routes at most 2048 experts"):
        int4_moe(x[:1, :1].bfloat16(), experts, w2, ids, scores)


def test_it_takes_the_arguments_of_the_reference(backend: str) -> None:
    room = importlib.import_module("m3kernels.int4._cuda")
    for op in ("int4_gemm", "int4_grouped_gemm", "int4_moe", "int4_dequantize"):
        wanted = list(inspect.signature(getattr(reference, op)).parameters)
        assert list(inspect.signature(getattr(room, op)).parameters) == wanted


def test_row_invariant_is_a_bool(backend: str) -> None:
    x, weight, _ = inputs(2, 64, 64, group_size=32, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="int4_gemm: row_invariant: want True or False; got 1"):
        int4_gemm(x, weight, row_invariant=1)  # type: ignore[arg-type]


def test_opcheck(backend: str) -> None:
    x, weight, bias = inputs(2, 20, 40, group_size=32, act_order=True, bias=True, dtype=torch.float16)
    qweight, scales, zeros, perm, *numbers = flat(weight)
    rows, stack, _ = inputs(3, 20, 32, group_size=32, experts=2, dtype=torch.float16)
    tokens, w13, w2, ids, scores = moe_inputs(2, 16, 16, 2, 1, torch.float16)
    ops = torch.ops.m3kernels
    torch.library.opcheck(ops.int4_gemm.default, (x, qweight, scales, zeros, perm, bias, *numbers, True, "auto"))
    offsets = torch.tensor([0, 1, 3], device=DEVICE)
    torch.library.opcheck(ops.int4_grouped_gemm.default, (rows, offsets, *flat(stack), False, "auto"))
    moe = (tokens, ids, scores, *flat(w13)[:4], *flat(w2)[:4], 16, 16, 32, 0, 0, True, "auto")
    torch.library.opcheck(ops.int4_moe.default, moe)
    torch.library.opcheck(ops.int4_dequantize.default, (*flat(weight), torch.float16))


@needs_gpu
@either_promise
@pytest.mark.parametrize("m", (3, 90))
def test_captured_in_a_graph(backend: str, row_invariant: bool, m: int) -> None:
    x, weight, _ = inputs(m, 130, 200, group_size=64, dtype=torch.bfloat16, act_order=True)
    tokens, w13, w2, ids, scores = moe_inputs(m, 64, 64, 4, 2, torch.bfloat16)

    def step() -> tuple[Tensor, Tensor, Tensor]:
        dequantised = int4_dequantize(weight)
        return (
            int4_gemm(x, weight, row_invariant=row_invariant),
            int4_moe(tokens, w13, w2, ids, scores, row_invariant=row_invariant),
            dequantised,
        )

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    x.copy_(torch.randn_like(x))
    tokens.copy_(torch.randn_like(tokens))
    ids.copy_((ids + 1) % 4)
    graph.replay()
    torch.cuda.synchronize()
    assert all(bitwise_equal(a, b) for a, b in zip(captured, step(), strict=True))
