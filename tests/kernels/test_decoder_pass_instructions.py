"""Each instruction of the native pass alone: against its formula in fp64, or bit for bit against the op that it is."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from decoder_pass_cases import EPS
from torch import Tensor

from m3kernels.decoder import linear
from m3kernels.decoder.program import Batch, Cache, Columns, Program
from m3kernels.decoder.run_torch import TorchPass
from m3kernels.int4 import int4_gemm, int4_moe
from m3kernels.int4.quantize import quantize_weight
from m3kernels.spec_decode import tree_attention
from m3kernels.testing import bitwise_equal, relative_error

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CACHES = (*DTYPES, torch.int8)
ROWS, LIMIT = 7, 5e-7  # relative error of a formula of few operations in fp32

Build = Callable[..., Columns]


def batch_of(rows: int, **given: Tensor) -> Batch:
    """Rows of one request whose tokens and positions are their numbers."""
    ends = torch.tensor([0, rows], dtype=torch.int32)
    numbers = torch.arange(rows)
    facts = {"tokens": numbers, "positions": numbers, "slots": numbers, "picked": numbers} | given
    return Batch(
        **facts,
        cu_seqlens=ends,
        cache_seqlens=ends[1:].clone(),
        block_table=torch.zeros(1, 1, dtype=torch.int32),
        causal=1,
    )


def through(build: Build, *inputs: Tensor, native: bool = True, batch: Batch | None = None) -> Tensor:
    """What ``build(program, *columns of the inputs)`` leaves in the columns that it returns. The inputs lie in the
    middle of wider buffers."""
    program = Program(rotated=2)
    program.angles(torch.ones(64, 1), torch.zeros(64, 1))
    places = [program.buffer(x.shape[1] + 8).part(5, x.shape[1]) for x in inputs]
    for place in places:
        program.load(place)
    program.store(build(program, *places))
    batch = batch or batch_of(ROWS)
    return program.run(batch, inputs)[0] if native else TorchPass(program).run(batch, inputs)[0]


def middle(program: Program, width: int) -> Columns:
    return program.buffer(width + 5).part(2, width)


# -- rows from place to place -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_embed(dtype: torch.dtype) -> None:
    table, tokens = torch.randn(11, 37).to(dtype), torch.tensor([10, 0, 3, 3, 9, 1, 10])

    def build(program: Program) -> Columns:
        to = middle(program, 37)
        program.embed(to, table)
        return to

    assert bitwise_equal(through(build, batch=batch_of(ROWS, tokens=tokens)), table[tokens].float())


def test_copy_and_add() -> None:
    x, y = torch.randn(ROWS, 19), torch.randn(ROWS, 19)

    def build(program: Program, first: Columns, second: Columns) -> Columns:
        to = middle(program, 19)
        program.copy(to, first)
        program.add(to, second)
        program.add(to, to)
        return to

    assert bitwise_equal(through(build, x, y), 2 * (x + y))


def test_pick() -> None:
    x, picked = torch.randn(ROWS, 19), torch.tensor([6, 0, 0, 5])

    def build(program: Program, source: Columns) -> Columns:
        to = program.buffer(24, picked=True).part(3, 19)
        program.pick(to, source)
        return to

    assert bitwise_equal(through(build, x, batch=batch_of(ROWS, picked=picked)), x[picked])


@pytest.mark.parametrize("width", (1, 15, 16, 17, 576))
def test_norm(width: int) -> None:
    x, weight = torch.randn(ROWS, width) * 10, torch.randn(width)

    def build(program: Program, source: Columns) -> Columns:
        program.norm(source, source, weight, EPS)
        return source

    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double()
    assert relative_error(through(build, x), exact).max < LIMIT
    assert relative_error(through(build, x, native=False), exact).max < LIMIT


@pytest.mark.parametrize("width", (1, 16, 37))
def test_silu_mul(width: int) -> None:
    x = torch.randn(ROWS, 2 * width) * 4
    x[0, :width] = 100.0
    x[1, :width] = -100.0

    def build(program: Program, source: Columns) -> Columns:
        to = middle(program, width)
        program.silu_mul(to, source)
        return to

    gate, up = x.double().chunk(2, -1)
    assert relative_error(through(build, x), torch.nn.functional.silu(gate) * up).max < LIMIT


# -- products ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("bias", (False, True))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dense_is_linear(dtype: torch.dtype, bias: bool) -> None:
    x, weight, add = torch.randn(ROWS, 33), torch.randn(21, 33).to(dtype), torch.randn(21) if bias else None

    def build(program: Program, source: Columns) -> Columns:
        to = middle(program, 21)
        program.linear(to, source, weight, add)
        return to

    assert bitwise_equal(through(build, x), linear(x, weight, add))


@pytest.mark.parametrize("activations", ("auto", "exact", "int16", "int8"))
@pytest.mark.parametrize("group_size", (-1, 16, 32, 48))
@pytest.mark.parametrize("symmetric", (True, False))
def test_int4_is_int4_gemm(symmetric: bool, group_size: int, activations: str) -> None:
    x, add = torch.randn(ROWS, 70), torch.randn(67)
    weight = quantize_weight(torch.randn(67, 70), group_size=group_size, symmetric=symmetric)

    def build(program: Program, source: Columns) -> Columns:
        to = middle(program, 67)
        program.linear(to, source, weight, add, activations=activations)
        return to

    assert bitwise_equal(through(build, x), int4_gemm(x, weight, add, activations=activations))


# -- experts ----------------------------------------------------------------------------------------------------------
def routed(scores: Tensor, top_k: int, rescale: bool) -> tuple[Tensor, Tensor]:
    """(ids, weights) of the experts with the largest scores, ties to the lower."""
    ids = scores.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    weights = scores.double().softmax(-1).gather(1, ids)
    return ids, weights / weights.sum(-1, keepdim=True) if rescale else weights


def experts64(x: Tensor, w13: Tensor, w2: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    gate, up = torch.einsum("td,tkid->tki", x.double(), w13.double()[ids]).chunk(2, -1)
    y = torch.einsum("tki,tkdi->tkd", torch.nn.functional.silu(gate) * up, w2.double()[ids])
    return (y * weights[..., None]).sum(1)


SCORES = {
    "random": torch.randn(ROWS, 5, generator=torch.Generator().manual_seed(1)),
    "ties": torch.tensor([[0.5, 2.0, 0.5, 2.0, 2.0]]).repeat(ROWS, 1),
    "all_the_same": torch.zeros(ROWS, 5),
    "far_apart": torch.tensor([[-1e30, 0.0, 90.0, -90.0, 1e30]]).repeat(ROWS, 1),
    "some_infinite": torch.tensor([[-torch.inf, 0.0, 1.0, -torch.inf, 2.0]]).repeat(ROWS, 1),
}


def moe(w13: object, w2: object, top_k: int, rescale: bool, activations: str = "auto") -> Build:
    def build(program: Program, source: Columns, scores: Columns) -> Columns:
        whole, to = program.buffer(source.width), program.buffer(source.width)
        program.copy(whole, source)
        program.moe(to, whole, scores, w13, w2, top_k=top_k, rescale=rescale, activations=activations)  # type: ignore[arg-type]
        return to

    return build


@pytest.mark.parametrize("rescale", (False, True))
@pytest.mark.parametrize("top_k", (1, 2, 5))
@pytest.mark.parametrize("case", SCORES)
def test_dense_experts(case: str, top_k: int, rescale: bool) -> None:
    x, w13, w2 = torch.randn(ROWS, 24), torch.randn(5, 18, 24), torch.randn(5, 24, 9)
    exact = experts64(x, w13, w2, *routed(SCORES[case], top_k, rescale))
    build = moe(w13, w2, top_k, rescale)
    assert relative_error(through(build, x, SCORES[case]), exact).max < LIMIT
    assert relative_error(through(build, x, SCORES[case], native=False), exact).max < LIMIT


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_experts_of_halves(dtype: torch.dtype) -> None:
    x, w13, w2 = torch.randn(ROWS, 24), torch.randn(5, 18, 24).to(dtype), torch.randn(5, 24, 9).to(dtype)
    exact = experts64(x, w13, w2, *routed(SCORES["random"], 2, True))
    assert relative_error(through(moe(w13, w2, 2, True), x, SCORES["random"]), exact).max < LIMIT


@pytest.mark.parametrize("activations", ("exact", "int16", "int8"))
@pytest.mark.parametrize("case", SCORES)
def test_int4_experts_are_int4_moe(case: str, activations: str) -> None:
    x = torch.randn(ROWS, 48)
    w13, w2 = (quantize_weight(torch.randn(5, *sizes), group_size=16) for sizes in ((40, 48), (48, 20)))
    ids, weights = routed(SCORES[case], 3, True)
    found = through(moe(w13, w2, 3, True, activations), x, SCORES[case])
    want = int4_moe(x, w13, w2, ids, weights.float(), activations=activations)
    assert relative_error(found, want).max < LIMIT  # the weights alone differ, in their last bits


@pytest.mark.parametrize("native", (True, False))
@pytest.mark.parametrize("held", ("dense", "int4"))
def test_a_score_that_is_nan_spoils_its_row_only(held: str, native: bool) -> None:
    x, scores = torch.randn(ROWS, 48), torch.randn(ROWS, 5)
    w13, w2 = torch.randn(5, 40, 48), torch.randn(5, 48, 20)
    pair = (quantize_weight(w13, group_size=16), quantize_weight(w2, group_size=16)) if held == "int4" else (w13, w2)
    clean = through(moe(*pair, 2, True), x, scores, native=native)
    scores[3, 4] = torch.nan
    found = through(moe(*pair, 2, True), x, scores, native=native)
    assert found[3].isnan().all()
    others = [0, 1, 2, 4, 5, 6]
    assert bitwise_equal(found[others], clean[others])


# -- attention --------------------------------------------------------------------------------------------------------
def empty_cache(kv: torch.dtype, kv_heads: int, size: int, page_size: int = 4, pages: int = 6) -> Cache:
    sizes = (pages, page_size, kv_heads, size)
    scales = [torch.zeros(sizes[:3]) for _ in range(2)] if kv == torch.int8 else []
    return Cache(torch.zeros(sizes, dtype=kv), torch.zeros(sizes, dtype=kv), *scales)


def held(x: Tensor, kv: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """x (rows, heads, size) as a cache holds it."""
    if kv != torch.int8:
        return x.to(kv), None
    most = x.abs().amax(-1)
    return (x * torch.where(most > 0, 127 / most, 0.0)[..., None]).round().to(torch.int8), most / 127


@pytest.mark.parametrize("norms", (False, True))
@pytest.mark.parametrize(("rotated", "size", "heads", "kv_heads"), ((16, 16, 4, 2), (6, 20, 3, 1), (2, 5, 2, 2)))
def test_rotate(rotated: int, size: int, heads: int, kv_heads: int, norms: bool) -> None:
    x = torch.randn(ROWS, (heads + 2 * kv_heads) * size)
    angle = torch.randn(9, rotated // 2)
    weights = [torch.randn(size), torch.randn(size)] if norms else [None, None]
    positions, slots = torch.tensor([8, 0, 3, 3, 1, 2, 7]), torch.tensor([23, 0, 5, 4, 9, 11, 12])
    cache = empty_cache(torch.float32, kv_heads, size)
    program = Program(rotated=rotated)
    program.angles(angle.cos(), angle.sin())
    source = program.buffer(x.shape[1] + 3).part(1, x.shape[1])
    program.load(source)
    program.rotate(source, program.cache(cache), heads, *weights, EPS)
    program.store(source)
    found = program.run(rotating(positions, slots), (x,))[0]

    parts = list(x.double().unflatten(1, (-1, size)).split((heads, kv_heads, kv_heads), 1))
    half = rotated // 2
    cos, sin = (table.double()[positions][:, None] for table in (angle.cos(), angle.sin()))
    for which, weight in enumerate(weights):
        if weight is not None:
            scale = (parts[which].square().mean(-1, keepdim=True) + EPS).rsqrt()
            parts[which] = parts[which] * scale * weight.double()
        a, b, rest = parts[which].split((half, half, size - rotated), -1)
        parts[which] = torch.cat((a * cos - b * sin, b * cos + a * sin, rest), -1)
    assert relative_error(found, torch.cat(parts, 1).flatten(1)).max < LIMIT
    for got, want in ((cache.keys, parts[1]), (cache.values, parts[2])):
        flat = got.flatten(0, 1)
        assert relative_error(flat[slots], want).max < LIMIT
        assert flat.abs().sum(dim=(1, 2)).count_nonzero() == ROWS


def rotating(positions: Tensor, slots: Tensor) -> Batch:
    batch = batch_of(ROWS, positions=positions, slots=slots)
    batch.block_table = torch.zeros(1, 2, dtype=torch.int32)
    return batch


@pytest.mark.parametrize("kv", CACHES, ids=str)
def test_what_a_cache_holds(kv: torch.dtype) -> None:
    """Rounded to nearest, ties to even; int8: the largest of a head is 127, zeros have scale 0, a nan is not lost."""
    x = torch.randn(ROWS, 3, 2, 8)  # query, key, value of two heads
    x[1], x[2, :, 0, 3] = 0.0, torch.nan
    x[4], x[5, :, 1, 2] = 2.0**-20, 1e-42
    cache = empty_cache(kv, 2, 8)
    program = Program(rotated=2)
    program.angles(torch.ones(64, 1), torch.zeros(64, 1))
    source = program.buffer(48)
    program.load(source)
    program.rotate(source, program.cache(cache), 2)
    numbers = torch.arange(ROWS)
    program.run(rotating(numbers, numbers + 8), (x.flatten(1),))
    for got, scale, want in ((cache.keys, cache.k_scale, x[:, 1]), (cache.values, cache.v_scale, x[:, 2])):
        values, scales = held(want, kv)
        rows = got.flatten(0, 1)[8 : 8 + ROWS]
        if scales is None or scale is None:
            assert torch.equal(rows.nan_to_num(-7.0), values.nan_to_num(-7.0))
            continue
        numbered = ~scales.isnan()
        torch.testing.assert_close(scale.flatten(0, 1)[8 : 8 + ROWS], scales, rtol=2e-7, atol=0, equal_nan=True)
        assert torch.equal(rows[numbered], values[numbered])


@pytest.mark.parametrize("gate", (None, "head", "element"))
@pytest.mark.parametrize("kv", CACHES, ids=str)
def test_attend_is_tree_attention(kv: torch.dtype, gate: str | None) -> None:
    """Two causal requests and two trees, one of which has fewer queries than nodes."""
    heads, kv_heads, size, rows = 4, 2, 12, 13
    cache = empty_cache(kv, kv_heads, size, pages=16)
    for tensor in (cache.keys, cache.values):
        tensor.copy_(torch.randn(tensor.shape) * (40 if kv == torch.int8 else 1))
    for scale in (cache.k_scale, cache.v_scale):
        if scale is not None:
            scale.uniform_(0.01, 0.03)
    q = torch.randn(rows, heads * size)
    width = {None: 1, "head": heads, "element": heads * size}[gate]
    gates = torch.randn(rows, width)
    cu, seqlens = torch.tensor([0, 5, 6, 11, 13]), torch.tensor([9, 13, 11, 4])
    tree_lens = torch.tensor([5, 1, 5, 3])
    masks = torch.tensor([1, 3, 5, 11, 17, 3, 6]).int()[:, None]
    table = torch.randperm(16).view(4, 4)
    program = Program(rotated=2)
    program.angles(torch.ones(1, 1), torch.zeros(1, 1))
    source, extra = program.buffer(heads * size + 7).part(3, heads * size), program.buffer(width + 2).part(2, width)
    to = program.buffer(heads * size)
    program.load(source)
    program.load(extra)
    program.attend(to, source, program.cache(cache), heads, 0.3, extra if gate else None)
    program.store(to)
    zeros = torch.zeros(rows, dtype=torch.int64)
    batch = Batch(
        tokens=zeros, positions=zeros, slots=zeros, cu_seqlens=cu.int(), cache_seqlens=seqlens.int(),
        block_table=table.int(), picked=zeros[:0], causal=2, tree_lens=tree_lens.int(), mask_bits=masks,
    )  # fmt: skip
    found = program.run(batch, (q, gates))[0]

    gates = gates.view(rows, heads, *([size] if gate == "element" else [])) if gate else None
    scales = {} if cache.k_scale is None else {"k_scale": cache.k_scale, "v_scale": cache.v_scale}
    for first, last, mask in ((0, 2, None), (2, 4, masks)):
        start, stop = int(cu[first]), int(cu[last])
        trees = {} if mask is None else {"mask_bits": mask, "tree_lens": tree_lens[first:last].int()}
        want = tree_attention(
            q[start:stop].unflatten(1, (heads, size)), cache.keys, cache.values, table[first:last].int(),
            seqlens[first:last].int(), cu_seqlens_q=cu[first : last + 1].int() - start, softmax_scale=0.3,
            gate=None if gates is None else gates[start:stop], **scales, **trees,
        )  # fmt: skip
        assert bitwise_equal(found[start:stop], want.flatten(1))


def test_an_attention_scale_may_be_anything_finite() -> None:
    assert math.isfinite(float(through(lambda program, x: attended(program, x, -1e30), torch.ones(ROWS, 4)).sum()))


def attended(program: Program, source: Columns, scale: float) -> Columns:
    cache, to = empty_cache(torch.float32, 1, 4, page_size=8), program.buffer(4)
    program.attend(to, source, program.cache(cache), 1, scale)
    return to
