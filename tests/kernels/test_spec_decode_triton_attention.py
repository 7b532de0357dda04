"""The Triton tree attention: run on a GPU, or interpreted where there is none, against the reference and itself."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from triton_device import here, there
from triton_tiles import in_triton

from m3kernels.spec_decode import reference
from m3kernels.spec_decode.reference import TOLERANCE
from m3kernels.testing import bitwise_equal, check_error, surrounded_by_nan, uninitialized_is_nan

pytest.importorskip("triton", reason="Triton is not installed")
_triton = pytest.importorskip("m3kernels.spec_decode._triton")
triton_attention = pytest.importorskip("m3kernels.spec_decode.triton_attention")

# The interpreter computes both sides of a select: what is masked off meets the branch not taken.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow|divide by zero) encountered:RuntimeWarning")


def attention_inputs(
    lengths: tuple[int, ...],
    queries: tuple[int, ...],
    *,
    heads: int = 4,
    kv_heads: int = 2,
    head_size: int = 16,
    page_size: int = 16,
    dtype: torch.dtype = torch.float16,
    cache_dtype: torch.dtype | None = None,
    tree: bool = True,
    gate: str = "",
    window: int = 0,
) -> list[Any]:
    """Arguments of tree_attention: pages in random places, nan in slots beyond each request, ids of nothing beyond."""
    pages = [-(-length // page_size) for length in lengths]
    places = iter(torch.randperm(sum(pages) + 2).tolist())
    shape = (sum(pages) + 2, page_size, kv_heads, head_size)
    caches = [torch.randn(shape).to(cache_dtype or dtype) for _ in range(2)]
    block_table = torch.full((len(lengths), max(pages) + 1), 10**6, dtype=torch.int32)
    for b, length in enumerate(lengths):
        for page in range(pages[b]):
            block_table[b, page] = next(places)
            for cache in caches:
                cache[block_table[b, page], max(0, length - page * page_size) :] = torch.nan
    cu = torch.tensor([0, *itertools.accumulate(queries)], dtype=torch.int32)
    mask_bits = None
    if tree:
        words = -(-max(queries) // 32)
        parents = [torch.tensor([[-1, *(int(torch.randint(i, ())) for i in range(1, n))]]) for n in queries]
        mask_bits = torch.zeros(int(cu[-1]), words, dtype=torch.int32)
        for row, parent in zip(cu.tolist(), parents, strict=False):
            bits = reference.links(parent.int())[1][0]
            mask_bits[row : row + len(bits), : bits.shape[1]] = bits
    gates = {
        "": None,
        "headwise": torch.randn(int(cu[-1]), heads).to(dtype),
        "elementwise": torch.randn(int(cu[-1]), heads, head_size),
    }
    q = torch.randn(int(cu[-1]), heads, head_size).to(dtype)
    seqlens = torch.tensor(lengths, dtype=torch.int32)
    return [q, *caches, block_table, seqlens, cu, mask_bits, gates[gate], head_size**-0.5, window]


ATTENTION: dict[str, dict[str, Any]] = {
    "one_key": dict(lengths=(1,), queries=(1,), page_size=1, head_size=16),
    "fp32_headwise_gate": dict(lengths=(5, 9), queries=(2, 3), page_size=4, dtype=torch.float32, gate="headwise"),
    "causal_elementwise_gate": dict(
        lengths=(70, 33, 1), queries=(40, 5, 1), heads=6, head_size=24, tree=False, gate="elementwise"
    ),
    "two_words_of_mask": dict(lengths=(50, 70), queries=(33, 2), heads=3, kv_heads=1, page_size=1),
    "window": dict(lengths=(130, 70), queries=(5, 2), heads=3, kv_heads=3, head_size=32, window=20),
    "window_causal": dict(lengths=(130, 100), queries=(70, 2), kv_heads=1, tree=False, window=50),
    "two_splits": dict(lengths=(700, 515), queries=(3, 2), page_size=64),
    "fp32_queries_fp16_cache": dict(lengths=(20,), queries=(3,), dtype=torch.float32, cache_dtype=torch.float16),
    "bf16": dict(lengths=(20,), queries=(3,), dtype=torch.bfloat16),
    "head_of_80": dict(lengths=(20,), queries=(2,), head_size=80),
    "no_queries_in_one": dict(lengths=(7, 3, 5), queries=(2, 0, 3)),
}


def path_of(mask_bits: Tensor, row: int, nodes: int) -> list[int]:
    return [j for j in range(nodes) if int(mask_bits[row, j // 32]) >> (j % 32) & 1]


def in_torch(arguments: list[Any]) -> Tensor:
    """What torch's attention gives in the dtype of the queries, row by row."""
    q, k_cache, v_cache, table, seqlens, cu, mask_bits, gate, scale, window = arguments
    out, size = torch.zeros_like(q), k_cache.shape[1]
    for b, (start, stop) in enumerate(itertools.pairwise(cu.tolist())):
        for t in range(start, stop):
            prefix = int(seqlens[b]) - (stop - start)
            nodes = range(t - start + 1) if mask_bits is None else path_of(mask_bits, t, stop - start)
            slots = torch.tensor([*range(prefix), *(prefix + j for j in nodes)])[-window:]
            k, v = (cache[table[b, slots // size].long(), slots % size].to(q.dtype) for cache in (k_cache, v_cache))
            rows = (x.transpose(0, 1)[None] for x in (q[t : t + 1], k, v))
            out[t] = scaled_dot_product_attention(*rows, scale=scale, enable_gqa=True)[0, :, 0]
    return out if gate is None else (out * gate.float().sigmoid().view(*gate.shape[:2], -1)).to(q.dtype)


@in_triton
@pytest.mark.parametrize("case", ATTENTION)
def test_attention(case: str) -> None:
    arguments = attention_inputs(**ATTENTION[case])
    with uninitialized_is_nan():
        out = here(_triton.tree_attention(*there(arguments)))
    exact = reference.tree_attention(arguments[0].double(), *arguments[1:])
    check_error(out, exact, in_torch(arguments), TOLERANCE)


@in_triton
@pytest.mark.parametrize("case", ("two_splits",))
def test_attention_without_a_workspace_is_the_same(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = there(attention_inputs(**ATTENTION[case]))
    wanted = _triton.tree_attention(*arguments)
    monkeypatch.setattr(triton_attention, "WORKSPACE_BYTES", 0)
    assert bitwise_equal(_triton.tree_attention(*arguments), wanted)


@in_triton
@pytest.mark.parametrize("case", ("two_splits", "window", "fp32_headwise_gate", "head_of_80"))
def test_attention_of_a_node_is_that_of_its_token_decoded_alone(case: str) -> None:
    """The last node's path, laid out densely in pages of another size and place, decoded as one query."""
    arguments = attention_inputs(**ATTENTION[case])
    q, k_cache, v_cache, table, seqlens, cu, mask_bits, gate, scale, window = arguments
    out = here(_triton.tree_attention(*there(arguments)))
    start, nodes, length, size = int(cu[0]), int(cu[1] - cu[0]), int(seqlens[0]), k_cache.shape[1]
    path = path_of(mask_bits, start + nodes - 1, nodes)
    slots = torch.tensor([*range(length - nodes), *(length - nodes + j for j in path)])
    page_size, pages = 8, -(-len(slots) // 8)
    places = torch.randperm(pages + 3)[:pages].int()
    alone = []
    for cache in (k_cache, v_cache):
        dense = cache[table[0, slots // size].long(), slots % size]
        paged = torch.full((pages + 3, page_size, *cache.shape[2:]), torch.nan, dtype=cache.dtype)
        at = torch.arange(len(slots))
        paged[places[at // page_size].long(), at % page_size] = dense
        alone.append(paged)
    last = slice(start + nodes - 1, start + nodes)
    one = [q[last], *alone, places[None], torch.tensor([len(slots)]).int(), torch.tensor([0, 1]).int()]
    decoded = _triton.tree_attention(*there([*one, None, None if gate is None else gate[last], scale, window]))
    assert bitwise_equal(here(decoded)[0], out[start + nodes - 1])


@in_triton
@pytest.mark.parametrize("tree", (True, False), ids=("tree", "causal"))
def test_attention_does_not_see_values_of_others(tree: bool) -> None:
    """Infinite values in a slot that only the last query attends to leave the other rows as they were."""
    arguments = attention_inputs((37,), (6,), tree=tree)
    before = here(_triton.tree_attention(*there(arguments)))
    arguments[2][int(arguments[3][0, 36 // 16]), 36 % 16] = torch.inf
    after = here(_triton.tree_attention(*there(arguments)))
    assert bitwise_equal(after[:-1], before[:-1])
    assert not after[-1].isfinite().any()


@in_triton
@pytest.mark.parametrize("block", (-1, 10**6, -(2**31)))
def test_attention_over_an_impossible_block_is_nan(block: int) -> None:
    arguments = attention_inputs((20, 20), (2, 2))
    arguments[3][1, 0] = block
    out = here(_triton.tree_attention(*there(arguments)))
    assert out[2:].isnan().all()
    assert out[:2].isfinite().all()


@in_triton
def test_attention_of_strided_queries_and_caches() -> None:
    arguments = attention_inputs((20, 9), (3, 2))
    wanted = _triton.tree_attention(*there(arguments))
    for index in range(3):
        arguments[index] = surrounded_by_nan(arguments[index].transpose(0, 1).contiguous()).transpose(0, 1)
    assert bitwise_equal(_triton.tree_attention(*there(arguments)), wanted)
