"""A request's result depends on that request alone, bit for bit: not on its batch, threads, strides or runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from m3kernels.spec_decode import draft_topk, tree_attention, tree_finalize, tree_verify
from m3kernels.spec_decode.reference import make_inputs
from m3kernels.testing import bitwise_equal
from tests.kernels.spec_decode_batches import (
    BATCHES,
    POSITION,
    SEED,
    SLOWLY_IN_TRITON,
    VERIFICATIONS,
    B,
    N,
    V,
    each_room,
    each_room_and_triton,
    every_batch,
    padded_trees,
)

only_cpu = pytest.mark.parametrize("backend", ("spec_decode=cpu",), indirect=True)


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    assert len(found) == len(expected)
    return all(map(bitwise_equal, found, expected))


# -- the batch --------------------------------------------------------------------------------------------------------
def test_the_batches_are_worth_testing() -> None:
    """Drafts are accepted and rejected; trees differ in size; a row allows no token."""
    found = [BATCHES[name]() for name in VERIFICATIONS]
    lengths = torch.stack([length for _, _, length, _ in found])
    assert bool((lengths.amax(0) > 0)[[0, 2, 3]].all()) and bool((lengths[:, 1] == 0).all())
    assert len(lengths.unique()) > 2
    assert all(tokens[2].tolist()[1] == -1 and length[2] == 1 for tokens, _, length, _ in found)


@each_room_and_triton
@every_batch
def test_a_request_alone_gives_what_it_gives_in_a_batch(backend: str, name: str) -> None:
    batch = BATCHES[name]
    whole = batch()
    alone = [batch.of(slice(b, b + 1))() for b in range(B)]
    assert same([torch.cat(parts) for parts in zip(*alone, strict=True)], whole)


@each_room
@every_batch
def test_the_order_of_requests_does_not_matter(backend: str, name: str) -> None:
    batch, order = BATCHES[name], [2, 0, 3, 1]
    assert same(batch.of(order)(), [x[order] for x in batch()])


@each_room
@pytest.mark.parametrize("name", [name for name in BATCHES if not name.startswith("commit")])
def test_a_request_may_come_often(backend: str, name: str) -> None:
    batch, order = BATCHES[name], [3, 3, 0, 3, 0, 0, 1]
    assert same(batch.of(order)(), [x[order] for x in batch()])


@each_room_and_triton
@every_batch
def test_no_requests_give_empty_results(backend: str, name: str) -> None:
    batch = BATCHES[name]
    found, whole = batch.of(slice(0, 0))(), batch()
    assert [(x.shape, x.dtype) for x in found] == [((0, *x.shape[1:]), x.dtype) for x in whole]


# -- the machine ------------------------------------------------------------------------------------------------------
@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@each_room
@every_batch
def test_two_runs_give_the_same(backend: str, name: str) -> None:
    assert same(BATCHES[name](), BATCHES[name]())


@only_cpu
@pytest.mark.parametrize("count", (1, 2, 3, 5))
@every_batch
def test_threads_do_not_matter(backend: str, name: str, count: int, threads: Callable[[int], None]) -> None:
    threads(4)
    expected = BATCHES[name]()
    threads(count)
    assert same(BATCHES[name](), expected)


def spread(x: Tensor) -> Tensor:
    """Every second element of a larger tensor, in the dimension before the last."""
    return x.repeat_interleave(2, -2)[..., ::2, :] if x.ndim > 1 else x.repeat_interleave(2)[::2]


def turned(x: Tensor) -> Tensor:
    """Dimensions in memory the other way round, the last one aside."""
    order = [*range(x.ndim - 2, -1, -1), x.ndim - 1]
    return x.permute(order).contiguous().permute(order) if x.ndim > 1 else x.clone()


def shifted(x: Tensor) -> Tensor:
    """At an odd address, each row followed by something else."""
    wide = torch.cat((x[..., :1], x, x[..., :1], x[..., :1]), -1)
    return wide[..., 1 : 1 + x.shape[-1]]


def columns(x: Tensor) -> Tensor:
    """The last dimension with the largest stride."""
    return x.mT.contiguous().mT if x.ndim > 1 else x


LAYOUTS = {"spread": spread, "turned": turned, "shifted": shifted, "columns": columns}


# Caches that are changed in place have a contiguous last dimension.
LAID_OUT = [(name, layout) for name in BATCHES for layout in LAYOUTS if layout != "columns" or "commit" not in name]


@each_room
@pytest.mark.parametrize(("name", "layout"), LAID_OUT)
def test_strides_do_not_matter(backend: str, name: str, layout: str) -> None:
    assert same(BATCHES[name].changed(LAYOUTS[layout])(), BATCHES[name]())


@pytest.mark.parametrize("backend", (SLOWLY_IN_TRITON,), indirect=True)
@every_batch
def test_strides_do_not_matter_when_interpreted(backend: str, name: str) -> None:
    assert same(BATCHES[name].changed(turned)(), BATCHES[name]())


@each_room
def test_one_row_may_stand_for_all(backend: str) -> None:
    """Logits expanded over requests and nodes: strides of 0."""
    given = padded_trees()
    row = given["logits"][:1, :1]
    expected = tree_verify(**{**given, "logits": row.repeat(B, N, 1)}, seed=SEED, position=POSITION)
    found = tree_verify(**{**given, "logits": row.expand(B, N, V)}, seed=SEED, position=POSITION)
    assert all(map(bitwise_equal, found, expected))


# -- dtypes -----------------------------------------------------------------------------------------------------------
@each_room_and_triton
@pytest.mark.parametrize("name", [*VERIFICATIONS, "draft", "draft_noise"])
def test_logits_that_both_dtypes_hold_give_the_same(backend: str, name: str) -> None:
    """bf16 values within the range of fp16, as fp16 and as fp32."""
    wide, narrow = BATCHES[name], BATCHES[name]
    logits = narrow.rows["logits"].bfloat16()
    narrow = narrow.of(slice(None))
    narrow.rows["logits"] = logits.half()
    wide = wide.of(slice(None))
    wide.rows["logits"] = logits.float()
    assert torch.equal(narrow.rows["logits"].float().nan_to_num(), wide.rows["logits"].nan_to_num())
    assert same(narrow(), wide())


@each_room
@pytest.mark.parametrize("name", [*VERIFICATIONS, "draft", "draft_noise"])
def test_logits_in_bf16_give_what_they_give_in_fp32(backend: str, name: str) -> None:
    narrow, wide = BATCHES[name].of(slice(None)), BATCHES[name].of(slice(None))
    narrow.rows["logits"] = narrow.rows["logits"].bfloat16()
    wide.rows["logits"] = narrow.rows["logits"].float()
    assert same(narrow(), wide())


# -- sizes ------------------------------------------------------------------------------------------------------------
LONG_WALKS = [("spec_decode=cpu", mode) for mode in ("greedy", "target_only", "coupled")]
LONG_WALKS += [("spec_decode=reference", "greedy")]


@pytest.mark.parametrize(("backend", "mode"), LONG_WALKS, indirect=["backend"])
def test_a_chain_of_1024_nodes_is_walked_to_its_end(backend: str, mode: str) -> None:
    """A target that is sure of every token follows the draft for 1023 steps; one slot is the bonus token's."""
    nodes, vocabulary = 1024, 3
    tokens = torch.arange(nodes) % vocabulary
    logits = torch.nn.functional.one_hot((tokens + 1) % vocabulary, vocabulary).float() * 200
    index = torch.arange(1, nodes + 1)
    child = index.where(index < nodes, -1)
    links = (tokens[None], child[None], torch.full((1, nodes), -1))
    found = tree_verify(logits[None], *links, mode=mode, seed=SEED[:1], position=POSITION[:1], logprobs="raw")
    assert found.accept_length.item() == nodes - 1
    assert torch.equal(found.accept_index[0], torch.arange(nodes).int())
    assert torch.equal(found.tokens[0], (tokens + 1) % vocabulary)
    assert found.bonus_token.item() == nodes % vocabulary and not found.logprobs.any()


@each_room
def test_the_last_of_1023_siblings_is_found(backend: str) -> None:
    nodes = vocabulary = 1024
    links = torch.full((2, 1, nodes), -1)
    links[0, 0, 0] = 1
    links[1, 0, 1:-1] = torch.arange(2, nodes)
    logits = torch.zeros(1, nodes, vocabulary)
    logits[0, 0, 1023] = logits[0, 1023, 7] = 300.0
    tokens = torch.arange(nodes)[None]
    found = tree_verify(logits, tokens, *links, seed=SEED[:1], position=POSITION[:1], width=3)
    assert found.accept_index.tolist() == [[0, 1023, -1]] and found.tokens.tolist() == [[1023, 7, -1]]


@each_room
def test_a_tree_of_1024_nodes_is_built(backend: str) -> None:
    """One step of 1023 candidates, and as many of a chain: stars and chains of the largest size."""
    nodes = 1024
    scores, tokens = -torch.arange(nodes - 1.0)[None], torch.arange(nodes - 1)[None] + 5
    star = tree_finalize(scores, tokens, torch.tensor([[-1]]), SEED[:1], POSITION[:1], topk=nodes - 1, num_nodes=nodes)
    assert torch.equal(star.candidates[0, 1:], tokens[0]) and not star.parents[0, 1:].any()
    assert star.next_sibling[0].tolist() == [-1, *range(2, nodes), -1]
    assert torch.equal(star.positions[0, 1:], POSITION[:1].expand(nodes - 1) + 1)
    parents = torch.arange(-1, nodes - 2)[None]
    chain = tree_finalize(scores, tokens, parents, SEED[:1], POSITION[:1], topk=1, num_nodes=nodes)
    assert chain.next_token[0].tolist() == [*range(1, nodes), -1] and bool((chain.next_sibling == -1).all())
    assert torch.equal(chain.positions[0], POSITION[0] + torch.arange(nodes))
    bits = (chain.mask_bits[0, :, :, None] >> torch.arange(32).int()) & 1
    assert torch.equal(bits.flatten(1).bool(), torch.ones(nodes, nodes, dtype=torch.bool).tril())


@only_cpu
def test_attention_of_a_tree_of_1024_nodes_is_that_of_its_paths(backend: str) -> None:
    """The mask of a chain is the causal one; that of a star, a prefix and one key."""
    nodes, size = 1024, 8
    q, k, v = (torch.randn(nodes, 1, size) for _ in range(3))
    cache = (k.view(64, 16, 1, size), v.view(64, 16, 1, size), torch.arange(64)[None])
    bounds = dict(cache_seqlens=torch.tensor([nodes]), cu_seqlens_q=torch.tensor([0, nodes]))
    ones = torch.ones(nodes, nodes, dtype=torch.bool)
    causal = tree_attention(q, *cache, **bounds)
    assert bitwise_equal(tree_attention(q, *cache, mask_bits=packed(ones.tril()), **bounds), causal)
    alone = tree_attention(q, *cache, mask_bits=packed(torch.eye(nodes, dtype=torch.bool)), **bounds)
    torch.testing.assert_close(alone, v, rtol=0, atol=1e-6)


def packed(mask: Tensor) -> Tensor:
    """(N, ceil(N / 32)) int32 from (N, N) bool."""
    words = mask.long().unflatten(1, (-1, 32)) << torch.arange(32)
    return words.sum(-1).to(torch.int32)


@each_room_and_triton
@pytest.mark.parametrize("name", VERIFICATIONS)
def test_a_tree_of_one_node_is_a_sampler(backend: str, name: str) -> None:
    """Request 1 of the batch has a root alone: what it emits is what the root's row gives with no tree at all."""
    batch = BATCHES[name].of(slice(1, 2))
    found = batch()
    root = {key: x[:, :1] if x.ndim > 1 else x for key, x in batch.rows.items()}
    tokens, index, length, logprobs = tree_verify(**root, **{**batch.shared, "width": 1})
    assert found[2].item() == length.item() == 0 and index.item() == 0
    assert torch.equal(found[0][:, :1], tokens) and bitwise_equal(found[3][:, :1], logprobs)
    assert 0 <= int(tokens) < V and bool((found[0][:, 1:] == -1).all())


@each_room
@pytest.mark.parametrize("vocabulary", (1, 2, 31, 32, 33, 1023, 1025))
def test_a_vocabulary_of_any_size(backend: str, vocabulary: int) -> None:
    x = make_inputs(3, 4, vocabulary, seed=vocabulary)
    given = {name: x[name] for name in ("candidates", "next_token", "next_sibling")}
    given["logits"] = torch.randn(3, 4, vocabulary)
    greedy = tree_verify(**given, mode="greedy")
    top = given["logits"].argmax(-1)
    assert torch.equal(greedy.tokens[:, 0], top[:, 0])
    one = tree_verify(**given, seed=SEED[:3], position=POSITION[:3], top_k=torch.ones(3, dtype=torch.int64))
    assert torch.equal(one.tokens, greedy.tokens) and torch.equal(one.accept_index, greedy.accept_index)
    found = draft_topk(given["logits"][:, :1], torch.zeros(3, 1), k=vocabulary, step=0)
    assert torch.equal(found.tokens[:, 0, 0], top[:, 0])
    assert torch.equal(found.tokens[:, 0].sort(dim=1).values, torch.arange(vocabulary).expand(3, -1))
