"""The CUDA tree attention: on a GPU, or on the emulated device where there is none; against fp64 and against itself."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from m3kernels.dispatch import BackendError
from m3kernels.spec_decode import tree_attention
from m3kernels.spec_decode.reference import TOLERANCE
from m3kernels.testing import bitwise_equal, check_error, surrounded_by_nan, uninitialized_is_nan
from tests.kernels.spec_decode_attention_cases import Paged, Request, dense, make_request
from tests.kernels.test_spec_decode_int8 import quantized

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
in_cuda = pytest.mark.parametrize("backend", ("spec_decode=cuda",), indirect=True)
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
BF16, FP16 = torch.bfloat16, torch.float16


def play(capability: int = 90, multiprocessors: int = 4, seed: int = 0) -> None:
    """Choose the device that is emulated; a GPU stays what it is."""
    if DEVICE == "cpu":
        import emulated_cuda

        emulated_cuda.configure(capability, multiprocessors, seed)


def there(call: dict[str, Any]) -> dict[str, Any]:
    return {name: x.to(DEVICE) if isinstance(x, Tensor) else x for name, x in call.items()}


def run(call: dict[str, Any], **options: Any) -> Tensor:
    with uninitialized_is_nan():
        return tree_attention(**there({**call, **options})).cpu()


def attend(*requests: Request, page_size: int = 16, seed: int = 0, **options: Any) -> list[Tensor]:
    paged = Paged.of(list(requests), page_size=page_size, seed=seed)
    out = run(paged.call, **options)
    return [out[a:b] for a, b in zip(paged.offsets, paged.offsets[1:], strict=False)]


def check(request: Request, out: Tensor, window: int = 0) -> None:
    check_error(out, dense(request, torch.float64, window), dense(request, out.dtype, window), TOLERANCE)


# name: dtype, prefix and queries of each request, and options of make_request and of the call
CASES: dict[str, tuple[torch.dtype, list[tuple[int, int]], dict[str, Any], dict[str, Any]]] = {
    "one_key": (BF16, [(0, 1)], dict(heads=(1, 1), size=16), dict(page_size=1)),
    "decode": (BF16, [(70, 1), (64, 1), (0, 1)], dict(heads=(16, 1), size=128, gate="head"), dict(page_size=5)),
    "causal": (FP16, [(65, 20), (0, 5), (3, 1)], dict(heads=(3, 1), size=80), dict(page_size=16)),
    "causal_window": (BF16, [(130, 20), (100, 2)], dict(heads=(8, 2), size=64, gate="element"), dict(window=50)),
    "tree": (BF16, [(60, 18), (130, 5)], dict(heads=(6, 1), size=128, tree=True, gate="element"), dict(page_size=64)),
    "tree_of_one_head": (FP16, [(20, 9)], dict(heads=(2, 2), size=64, tree=True), dict(page_size=1)),
    "tree_beyond_two_tiles": (FP16, [(63, 70), (1, 66)], dict(heads=(2, 1), size=64, tree=True), dict(page_size=5)),
    "tree_window": (BF16, [(70, 8), (3, 4)], dict(heads=(20, 1), size=64, tree=True, gate="head"), dict(window=9)),
    "two_splits": (FP16, [(508, 6), (1030, 1)], dict(heads=(16, 1), size=64, tree=True), dict(page_size=64)),
    "large_heads": (BF16, [(90, 7), (30, 2)], dict(heads=(6, 2), size=256, tree=True, gate="head"), dict(page_size=16)),
    "large_heads_gathered": (FP16, [(31, 40)], dict(heads=(3, 1), size=200, tree=True), dict(page_size=5)),
}


def case_of(name: str) -> tuple[list[Request], dict[str, Any]]:
    dtype, sizes, given, options = CASES[name]
    return [make_request(*size, seed=i, **given).to(dtype, dtype) for i, size in enumerate(sizes)], options


@in_cuda
@pytest.mark.parametrize("capability", (80, 90))
@pytest.mark.parametrize("name", CASES)
def test_values(backend: str, name: str, capability: int) -> None:
    requests, options = case_of(name)
    play(capability, seed=len(name) + capability)
    for request, out in zip(requests, attend(*requests, **options), strict=True):
        check(request, out, options.get("window", 0))


@in_cuda
@pytest.mark.parametrize("name", ("decode", "tree", "causal", "two_splits", "large_heads"))
def test_every_order_of_a_device_gives_the_same(backend: str, name: str) -> None:
    """Also few and many multiprocessors: splits in turn, or each in a block and joined; blocks of few and many rows."""
    requests, options = case_of(name)
    found = []
    for seed, multiprocessors in enumerate((1, 1000, 4)):
        play(80 + 10 * (seed % 2), multiprocessors, seed)
        found.append(torch.cat(attend(*requests, **options)))
    assert all(bitwise_equal(other, found[0]) for other in found[1:])


@in_cuda
@pytest.mark.parametrize("name", ("tree", "tree_of_one_head", "tree_beyond_two_tiles", "tree_window", "two_splits"))
def test_a_node_gives_what_decoding_its_path_gives(backend: str, name: str) -> None:
    """Alone and as the last tokens of a causal chunk; in pages of another size and place, on another device."""
    requests, options = case_of(name)
    out = attend(*requests, **options)[0]
    window = dict(window=options.get("window", 0))
    for node in sorted({0, len(out) // 2, len(out) - 1}):
        play(80, 1 + 50 * (node % 2), seed=node)
        alone = attend(requests[0].along(node, 1), page_size=7, seed=node, **window)[0]
        assert bitwise_equal(alone[0], out[node])
        queries = min(3, len(requests[0].path(node)))
        chunk = attend(requests[0].along(node, queries), page_size=3, seed=node, **window)[0]
        assert bitwise_equal(chunk[-1], out[node])


@in_cuda
@pytest.mark.parametrize("name", ("causal", "causal_window", "tree", "large_heads"))
def test_a_request_alone_gives_what_it_gives_in_a_batch(backend: str, name: str) -> None:
    requests, options = case_of(name)
    together = attend(*requests, **options)
    play(90, 1000, seed=5)
    for request, out in zip(requests, together, strict=True):
        assert bitwise_equal(attend(request, **{**options, "page_size": 1})[0], out)


@in_cuda
@pytest.mark.parametrize("tree", (True, False), ids=("tree", "causal"))
@pytest.mark.parametrize("heads", ((4, 2), (16, 1)), ids=str)
def test_values_of_others_are_not_seen(backend: str, tree: bool, heads: tuple[int, int]) -> None:
    """Infinite values in the last slot, that of the last query, leave the other rows as they were."""
    request = make_request(31, 6, tree=tree, size=64, heads=heads).to(BF16, BF16)
    before = attend(request)[0]
    values = request.values.clone()
    values[-1] = torch.inf
    after = attend(dataclasses.replace(request, values=values))[0]
    others = [node for node in range(6) if 5 not in request.path(node)]
    assert len(others) == 5 and bitwise_equal(after[others], before[others])
    assert not after[-1].isfinite().any()


@in_cuda
@pytest.mark.parametrize("tree", (True, False), ids=("tree", "causal"))
def test_queries_may_be_some_nodes_of_a_tree(backend: str, tree: bool) -> None:
    request = make_request(40, 12, tree=True, size=64).to(FP16, FP16)
    paged = Paged.of([request])
    whole = run(paged.call)
    some = {**paged.call, "q": paged.call["q"][5:9], "mask_bits": paged.call["mask_bits"][5:9]}  # type: ignore[index]
    some |= dict(cu_seqlens_q=torch.tensor([0, 4]), tree_lens=torch.tensor([12]))
    assert bitwise_equal(run(some), whole[5:9])


# -- int8 caches ------------------------------------------------------------------------------------------------------
@in_cuda
@pytest.mark.parametrize("dtype", (BF16, FP16), ids=str)
@pytest.mark.parametrize(
    "options",
    (
        dict(prefix=130, queries=5, size=128, heads=(4, 1), tree=True, gate="head"),
        dict(prefix=70, queries=20, size=64, heads=(6, 2)),
        dict(prefix=63, queries=70, size=16, heads=(1, 1), tree=True),
        dict(prefix=600, queries=1, size=80, heads=(16, 1)),
        dict(prefix=40, queries=3, size=256, heads=(4, 1), tree=True),
    ),
    ids=lambda options: f"{options['size']}",
)
def test_integers_with_scales(backend: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    play(90, seed=options["size"])
    request = make_request(**options)
    request = dataclasses.replace(request, q=request.q.to(dtype))
    if request.gate is not None:
        request = dataclasses.replace(request, gate=request.gate.to(dtype))
    call = quantized(request, page_size=5)
    out = run(call.call)
    theirs = call.exact.to(dtype, dtype)
    check_error(out, dense(call.exact, torch.float64), dense(theirs, dtype), TOLERANCE)
    for node in {0, len(out) - 1}:
        alone = quantized(request.along(node, 1), page_size=3, seed=node)
        assert bitwise_equal(run(alone.call)[0], out[node])


# -- what must not matter ---------------------------------------------------------------------------------------------
@in_cuda
@pytest.mark.parametrize("block", (-1, 10**6, -(2**31)))
@pytest.mark.parametrize("int8", (False, True), ids=("floats", "integers"))
def test_a_row_over_an_impossible_block_is_nan(backend: str, block: int, int8: bool) -> None:
    request = make_request(20, 2, size=64, tree=True)
    call = quantized(dataclasses.replace(request, q=request.q.to(FP16))).call if int8 else None
    call = call or dict(Paged.of([request.to(FP16, FP16)]).call)
    call["block_table"] = call["block_table"].clone()
    call["block_table"][0, 0] = block
    assert run(call).isnan().all()
    assert run(call, window=3).isfinite().all()


@in_cuda
@pytest.mark.parametrize("lengths", ([-1, 20], [1, 20], [10**6, 20], [2**31 - 1, 20]), ids=str)
def test_impossible_lengths_give_nan(backend: str, lengths: list[int]) -> None:
    paged = Paged.of([make_request(18, 2, size=64, seed=i).to(BF16, BF16) for i in range(2)])
    call = dict(paged.call)
    room = torch.ops.m3kernels.tree_attention
    order = ("q", "k_cache", "v_cache", "block_table", "cache_seqlens", "cu_seqlens_q")
    wanted = run(call)
    call["cache_seqlens"] = torch.tensor(lengths, dtype=torch.int32)
    given = there(call)
    out = room(*(given[name] for name in order), None, None, 64**-0.5, 0).cpu()
    assert out[:2].isnan().all() and bitwise_equal(out[2:], wanted[2:])


@in_cuda
@pytest.mark.parametrize("cu", ([0, 9, 4], [-5, 2, 4], [0, 2**31 - 1, 4], [3, 3, 3]), ids=str)
def test_impossible_bounds_of_requests_are_survived(backend: str, cu: list[int]) -> None:
    paged = Paged.of([make_request(18, 2, size=64, seed=i).to(BF16, BF16) for i in range(2)])
    given = there({**paged.call, "cu_seqlens_q": torch.tensor(cu, dtype=torch.int32)})
    order = ("q", "k_cache", "v_cache", "block_table", "cache_seqlens", "cu_seqlens_q")
    assert torch.ops.m3kernels.tree_attention(*(given[name] for name in order), None, None, 0.125, 0).shape == (
        4,
        4,
        64,
    )


@in_cuda
def test_a_request_without_queries_and_a_query_without_keys(backend: str) -> None:
    requests = [make_request(5, 2, size=64, seed=1), make_request(7, 0, size=64), make_request(0, 3, size=64, seed=2)]
    requests = [request.to(FP16, FP16) for request in requests]
    found = attend(*requests)
    check(requests[0], found[0])
    check(requests[2], found[2])
    paged = Paged.of(requests[2:], mask=True)
    paged.call["mask_bits"][0] = 0  # type: ignore[index]
    assert not run(paged.call)[0].any()


@in_cuda
@pytest.mark.parametrize("scale", (-0.3, 0.0, 2.0))
def test_scales_of_scores(backend: str, scale: float) -> None:
    request = make_request(40, 3, size=64).to(FP16, FP16)
    turned = dataclasses.replace(request, q=request.q * (scale * 8))
    exact, theirs = dense(turned, torch.float64), dense(turned, FP16)
    check_error(attend(request, softmax_scale=scale)[0], exact, theirs, TOLERANCE)


@in_cuda
def test_strides_do_not_matter(backend: str) -> None:
    call = dict(Paged.of([make_request(20, 3, size=64, gate="element").to(BF16, BF16)]).call)
    wanted = run(call)
    for name in ("q", "k_cache", "v_cache"):
        x = call[name].transpose(0, 1).contiguous()
        margin = torch.full((*x.shape[:-1], 16), torch.nan, dtype=x.dtype)
        call[name] = torch.cat((x, margin), -1)[..., :64].transpose(0, 1)
    assert bitwise_equal(run(call), wanted)
    call["q"] = surrounded_by_nan(call["q"].contiguous())  # at an odd address
    assert bitwise_equal(run(call), wanted)


# -- what is refused --------------------------------------------------------------------------------------------------
@in_cuda
@pytest.mark.parametrize(
    ("dtype", "cache_dtype", "size", "why"),
    (
        (torch.float32, torch.float32, 64, "queries of bfloat16 or float16, not float32"),
        (BF16, FP16, 64, "caches of the type of q, or int8, not float16"),
        (BF16, BF16, 264, "heads of at most 256 elements, a multiple of 8, not 264"),
        (BF16, BF16, 36, "heads of at most 256 elements, a multiple of 8, not 36"),
    ),
)
def test_refusals(backend: str, dtype: torch.dtype, cache_dtype: torch.dtype, size: int, why: str) -> None:
    with pytest.raises(BackendError, match=why):
        attend(make_request(3, 2, size=size).to(dtype, cache_dtype))


@in_cuda
def test_caches_at_odd_addresses_are_refused(backend: str) -> None:
    call = dict(Paged.of([make_request(3, 2, size=64).to(BF16, BF16)]).call)
    flat = torch.zeros(call["k_cache"].numel() + 1, dtype=BF16)
    call["k_cache"] = flat[1:].view(call["k_cache"].shape)
    with pytest.raises(BackendError, match="rows of caches at multiples of 16 bytes"):
        run(call)


@in_cuda
def test_a_table_with_gaps_is_not_read_as_if_it_had_none(backend: str) -> None:
    """The public function closes gaps; the room refuses them: its own copy would be freed before the kernel ran."""
    from m3kernels.spec_decode import _cuda

    call = there(Paged.of([make_request(70, 1, heads=(2, 1), size=64, seed=0).to(BF16, BF16)], page_size=16).call)
    table = call["block_table"].repeat(1, 2)[:, ::2]
    absent = {"mask_bits": None, "gate": None, "softmax_scale": 0.125, "window": 0}
    with pytest.raises(ValueError, match="tree_attention: block_table: want contiguous int32 on"):
        _cuda.tree_attention(**{**absent, **call, "block_table": table})
