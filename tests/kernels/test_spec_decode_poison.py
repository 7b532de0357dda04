"""Memory that must not matter: outputs never written, what lies around the inputs, rows and keys that are not needed.

That a row is not read is seen in two ways: whatever it holds, the result is the same; and its pages, which the kernel
maps on the first access, stay unmapped.
"""

from __future__ import annotations

import mmap
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from m3kernels.spec_decode import Verified, tree_attention, tree_verify
from m3kernels.testing import bitwise_equal, uninitialized_is_nan
from tests.kernels.spec_decode_batches import (
    BATCHES,
    IN_TRITON,
    PAGE,
    VERIFICATIONS,
    B,
    Batch,
    N,
    attention,
    each_room,
    each_room_and_triton,
    every_batch,
)

NAN = float("nan")


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    assert len(found) == len(expected)
    return all(map(bitwise_equal, found, expected))


# -- outputs and surroundings -----------------------------------------------------------------------------------------
@each_room_and_triton
@every_batch
def test_every_element_of_a_result_is_written(backend: str, name: str) -> None:
    expected = BATCHES[name]()
    with uninitialized_is_nan():
        found = BATCHES[name]()
    assert same(found, expected)
    assert not any(x.isnan().any() for x in expected if x.is_floating_point())


def surrounded(x: Tensor, margin: int = 67) -> Tensor:
    """A contiguous copy of x inside a larger buffer of nan, or of the largest integers."""
    worst = NAN if x.is_floating_point() else torch.iinfo(x.dtype).max
    buffer = torch.full((x.numel() + 2 * margin,), worst, dtype=x.dtype)
    return buffer[margin : margin + x.numel()].view(x.shape).copy_(x)


@pytest.mark.parametrize("backend", (IN_TRITON,), indirect=True)
@pytest.mark.parametrize("name", ("draft_first", "finalize", "attention_causal", "coupled", "target_only", "commit"))
def test_an_interpreted_room_keeps_to_its_memory(backend: str, name: str) -> None:
    expected = BATCHES[name]()
    with uninitialized_is_nan():
        found = BATCHES[name].changed(surrounded)()
    assert same(found, expected)


def between_rows(x: Tensor) -> Tensor:
    """The same with nan, or the largest integers, after every row."""
    worst = NAN if x.is_floating_point() else torch.iinfo(x.dtype).max
    return torch.cat((x, x.new_full((*x.shape[:-1], 19), worst)), -1)[..., : x.shape[-1]]


@each_room_and_triton
@pytest.mark.parametrize("place", (surrounded, between_rows))
@every_batch
def test_nothing_around_the_inputs_is_used(backend: str, name: str, place: Callable[[Tensor], Tensor]) -> None:
    assert same(BATCHES[name].changed(place)(), BATCHES[name]())


# -- verification: rows that the walk does not visit ------------------------------------------------------------------
POISONS = {"nan": NAN, "largest": 3e38, "infinite": float("inf"), "lowest": -float("inf")}


def poisoned(batch: Batch, path: Tensor, poison: float) -> Batch:
    """The batch with poison in every row of logits and draft_probs off the path, and other bits allowed there."""
    visited = torch.zeros(B, N + 1, dtype=torch.bool).scatter_(1, path.long() % (N + 1), True)[:, :N]
    rows = dict(batch.rows)
    for key in ("logits", "draft_probs"):
        if key in rows:
            rows[key] = rows[key].masked_fill(~visited[..., None], poison)
    if "grammar_bits" in rows:
        rows["grammar_bits"] = rows["grammar_bits"] ^ torch.where(visited, 0, -1).int()[..., None]
    return Batch(op=batch.op, rows=rows, shared=batch.shared)


@each_room_and_triton
@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("name", VERIFICATIONS)
def test_rows_off_the_path_do_not_matter(backend: str, name: str, poison: str) -> None:
    expected = BATCHES[name]()
    batch = poisoned(BATCHES[name], expected[1], POISONS[poison])
    assert not same(list(batch.rows.values()), list(BATCHES[name].rows.values()))
    assert same(batch(), expected)


@each_room
@pytest.mark.parametrize("name", VERIFICATIONS)
def test_rows_on_the_path_matter(backend: str, name: str) -> None:
    """The same poison in the row of the root gives another result: the test above can fail."""
    expected = BATCHES[name]()
    batch = poisoned(BATCHES[name], torch.full_like(expected[1], -1), NAN)
    assert bool((batch()[0] == -1).all())


@each_room_and_triton
@pytest.mark.parametrize("name", [name for name in VERIFICATIONS if "coins" in BATCHES[name].rows])
def test_coins_of_nodes_off_the_path_do_not_matter(backend: str, name: str) -> None:
    expected = BATCHES[name]()
    visited = torch.zeros(B, N + 1, dtype=torch.bool).scatter_(1, expected[1].long() % (N + 1), True)[:, :N]
    rows = dict(BATCHES[name].rows)
    rows["coins"] = rows["coins"].where(visited, 0.875)
    assert same(Batch(op=tree_verify, rows=rows, shared=BATCHES[name].shared)(), expected)


# -- verification: pages that the kernel never mapped ------------------------------------------------------------------
PAGEMAP = Path("/proc/self/pagemap")
maps_pages = pytest.mark.skipif(
    sys.platform != "linux" or not PAGEMAP.exists() or mmap.PAGESIZE != 4096,
    reason="needs Linux's /proc/self/pagemap and pages of 4 KiB",
)
VOCABULARY = 32768  # a row of grammar_bits is one page, a row of logits 32


def unmapped(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros whose pages are mapped when they are first read or written."""
    count = torch.Size(shape).numel() * dtype.itemsize
    memory = mmap.mmap(-1, count, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def touched(x: Tensor) -> list[int]:
    """Rows of x (1, N, ...) of which a page was read or written."""
    pages = x[0, 0].numel() * x.element_size() // mmap.PAGESIZE
    with PAGEMAP.open("rb") as file:
        file.seek(x.data_ptr() // mmap.PAGESIZE * 8)
        words = struct.unpack(f"{x.shape[1] * pages}Q", file.read(x.shape[1] * pages * 8))
    present = [word >> 63 for word in words]
    return [row for row in range(x.shape[1]) if any(present[row * pages : (row + 1) * pages])]


def walked(mode: str, tokens: list[int], dtype: torch.dtype) -> tuple[Verified, Tensor, Tensor, Tensor]:
    """A walk along nodes 0, 2, 5 of a tree of 8 whose logits are all 0: result, logits, draft_probs, grammar_bits.

    Node 0 has children 1, 2, 3 (chain: 2 alone), node 2 has 4 and 5 (chain: 5 alone), node 5 has 6; 7 is a child of 1.
    tokens: what the walk draws at the three nodes.
    """
    nodes = 8
    logits, bits = unmapped((1, nodes, VOCABULARY), dtype), unmapped((1, nodes, VOCABULARY // 32), torch.int32)
    probs = unmapped((1, nodes, VOCABULARY), torch.float32)
    candidates = torch.tensor([[7, 11, tokens[0], 12, 13, tokens[1], 14, 15]])
    child = torch.tensor([[1, 7, 4, -1, -1, 6, -1, -1]])
    sibling = torch.tensor([[-1, 2, 3, -1, 5, -1, -1, -1]])
    if mode == "chain":
        child[0, 0], child[0, 2] = 2, 5
    coins = torch.zeros(1, nodes)
    if mode == "target_only":
        coins[0, 0], coins[0, 2], coins[0, 5] = 1.5 / VOCABULARY, 1.5 / VOCABULARY, 0.9
    if mode == "chain":
        probs[0, [0, 2, 5]] = 1 / VOCABULARY
        coins[0, 5] = 0.999
        probs[0, 5, 14] = 1.0
    bits[0, [0, 2, 5]] = -1
    drawn = dict(seed=torch.tensor([1]), position=torch.tensor([1]))
    if mode in ("target_only", "chain"):
        drawn = dict(coins=coins, final_coins=torch.tensor([0.5]))
    found = tree_verify(
        logits, candidates, child, sibling, mode=mode, grammar_bits=bits, logprobs="sampling", **drawn,
        draft_probs=probs if mode == "chain" else None,
    )  # fmt: skip
    return found, logits, probs, bits


def uniform_tokens(mode: str) -> list[int]:
    """What the mode draws after rows of zeros at depths 0, 1, 2."""
    if mode == "greedy":
        return [0, 0, 0]
    if mode != "coupled":
        return [21, 22, 23]
    one, alone = torch.zeros(3, 1, VOCABULARY), torch.full((3, 1), -1)
    return (
        tree_verify(one, alone, alone, alone, seed=torch.ones(3, dtype=torch.int64), position=torch.arange(1, 4))
        .tokens[:, 0]
        .tolist()
    )


@maps_pages
@each_room
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16), ids=("fp32", "fp16"))
@pytest.mark.parametrize("mode", ("greedy", "target_only", "chain", "coupled"))
def test_rows_off_the_path_are_not_read(backend: str, mode: str, dtype: torch.dtype) -> None:
    found, logits, probs, bits = walked(mode, uniform_tokens(mode), dtype)
    assert found.accept_index.tolist()[0][:3] == [0, 2, 5] and found.accept_length.item() == 2
    assert touched(logits) == [0, 2, 5]
    assert touched(bits) == [0, 2, 5]
    assert touched(probs) == ([0, 2, 5] if mode == "chain" else [])


# -- attention: keys that a query does not attend to ------------------------------------------------------------------
def attended(batch: Batch, b: int) -> set[int]:
    """Slots of request b that any of its queries attends to."""
    length, window = int(batch.rows["cache_seqlens"][b]), batch.shared["window"]
    tree = int(batch.rows["tree_lens"][b]) if "tree_lens" in batch.rows else N
    prefix, slots = length - tree, set()
    for i in range(N):
        own = [
            j for j in range(tree) if "mask_bits" not in batch.rows or int(batch.rows["mask_bits"][b, i, 0]) >> j & 1
        ]
        own = own if "mask_bits" in batch.rows else list(range(i + 1))
        row = [*range(prefix), *(prefix + j for j in own)]
        slots |= set(row[-window:] if window else row)
    return slots


def with_poisoned_keys(batch: Batch, poison: float) -> Batch:
    """The batch with poison in every slot of the caches (int8 ones: of their scales) that no query attends to."""
    needed = torch.zeros(batch.shared["k_cache"].shape[:2], dtype=torch.bool)
    for b in range(len(batch.rows["q"])):
        for slot in attended(batch, b):
            needed[batch.rows["block_table"][b, slot // PAGE], slot % PAGE] = True
    unused = ~needed[..., None]
    if "k_scale" in batch.shared:
        caches = {key: batch.shared[key].masked_fill(unused, poison) for key in ("k_scale", "v_scale")}
    else:
        caches = {key: batch.shared[key].masked_fill(unused[..., None], poison) for key in ("k_cache", "v_cache")}
    assert not bool(needed.all())
    return Batch(op=batch.op, rows=batch.rows, shared={**batch.shared, **caches})


ATTENTIONS = [name for name in BATCHES if name.startswith("attention")]


@each_room_and_triton
@pytest.mark.parametrize("poison", (NAN, float("inf"), 6e4))
@pytest.mark.parametrize("name", ATTENTIONS)
def test_keys_that_nobody_attends_to_do_not_matter(backend: str, name: str, poison: float) -> None:
    assert same(with_poisoned_keys(BATCHES[name], poison)(), BATCHES[name]())


@each_room_and_triton
@pytest.mark.parametrize("poison", (NAN, float("inf")))
def test_a_poisoned_key_spoils_those_who_attend_to_it_alone(backend: str, poison: float) -> None:
    """Each tree node in turn: its descendants and itself become nan, every other row stays as it was."""
    batch = attention(masked=True)
    expected, bits = batch()[0], batch.rows["mask_bits"][..., 0]
    j = 2
    caches = {key: batch.shared[key].clone() for key in ("k_cache", "v_cache")}
    for b in range(B):
        slot = int(batch.rows["cache_seqlens"][b]) - N + j
        for cache in caches.values():
            cache[batch.rows["block_table"][b, slot // PAGE], slot % PAGE] = poison
    found = Batch(op=tree_attention, rows=batch.rows, shared={**batch.shared, **caches})()[0]
    sees = (bits >> j) & 1 == 1
    assert bool(found[sees].isnan().all()) and 0 < int(sees.sum()) < sees.numel()
    assert bitwise_equal(found[~sees], expected[~sees])


@each_room_and_triton
@pytest.mark.parametrize("name", ATTENTIONS)
def test_block_ids_that_are_not_needed_do_not_matter(backend: str, name: str) -> None:
    """Impossible ones after the pages of each request, and more columns of them."""
    batch = BATCHES[name]
    rows = dict(batch.rows)
    wide = torch.full((B, 11), 2**31 - 1, dtype=torch.int32)
    used = torch.arange(7) < -(-rows["cache_seqlens"] // PAGE)[:, None]
    wide[:, :7] = rows["block_table"].where(used, -7)
    assert not bool(used.all())
    rows["block_table"] = wide
    assert same(Batch(op=batch.op, rows=rows, shared=batch.shared)(), batch())


@each_room
def test_mask_bits_beyond_the_queries_do_not_matter(backend: str) -> None:
    batch = BATCHES["attention_tree"]
    bits = batch.rows["mask_bits"] | -(1 << N)
    wide = torch.cat((bits, torch.full_like(bits, -1)), -1)
    rows = {**batch.rows, "mask_bits": wide}
    assert same(Batch(op=batch.op, rows=rows, shared=batch.shared)(), batch())


# -- commit: slots and pages that are not on a path -------------------------------------------------------------------
@each_room_and_triton
@pytest.mark.parametrize("name", ("commit", "commit_hidden"))
def test_a_commit_moves_the_path_and_nothing_else(backend: str, name: str) -> None:
    batch = BATCHES[name]
    before = batch.shared["k_caches"] + batch.shared["v_caches"]
    pages = batch()[-4:]
    for b in range(B):
        prefix, length = int(batch.rows["cache_seqlens"][b]), int(batch.rows["accept_length"][b])
        path = batch.rows["accept_index"][b, : length + 1].long()
        for cache, after in zip(before, pages, strict=True):
            keys = cache[batch.rows["block_table"][b].long()].flatten(0, 1)
            expected = keys.clone()
            expected[prefix : prefix + length + 1] = keys[prefix + path]
            assert bitwise_equal(after[b].flatten(0, 1), expected)


@each_room
def test_slots_of_a_path_after_its_end_do_not_matter(backend: str) -> None:
    batch = BATCHES["commit_hidden"]
    used = torch.arange(4) <= batch.rows["accept_length"][:, None]
    rows = {**batch.rows, "accept_index": batch.rows["accept_index"].where(used, 2**31 - 1)}
    assert same(Batch(op=batch.op, rows=rows, shared=batch.shared)(), batch())
