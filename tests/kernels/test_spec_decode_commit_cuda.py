"""The CUDA commit of an accepted path: on a GPU, or on the emulated device; bits against what decoding would leave."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from m3kernels.spec_decode import tree_commit
from m3kernels.testing import bitwise_equal, uninitialized_is_nan

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
in_cuda = pytest.mark.parametrize("backend", ("spec_decode=cuda",), indirect=True)
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
PATH = torch.tensor([[0, 2, 5, 6, 9], [0, -1, -1, -1, -1], [0, 1, 2, -1, -1], [0, 4, 5, 6, 7]], dtype=torch.int32)
LENGTHS = (PATH >= 0).sum(1).int() - 1
PREFIXES = torch.tensor([0, 26, 3, 14], dtype=torch.int32)


def play(seed: int) -> None:
    if DEVICE == "cpu":
        import emulated_cuda

        emulated_cuda.configure(80 + 10 * (seed % 2), 4, seed)


def table(page_size: int) -> tuple[Tensor, int]:
    """Block table (4, pages) and pages of a cache."""
    width = -(-36 // page_size)
    pages = 4 * width + 3
    return torch.randperm(pages)[: 4 * width].view(4, width).int(), pages


def moved(cache: Tensor, block_table: Tensor) -> Tensor:
    """What plain decoding would have left."""
    after, size = cache.clone(), cache.shape[1]
    for b, (path, length, prefix) in enumerate(zip(PATH.tolist(), LENGTHS.tolist(), PREFIXES.tolist(), strict=True)):
        for j in range(length + 1):
            source, target = prefix + path[j], prefix + j
            after[block_table[b, target // size], target % size] = cache[block_table[b, source // size], source % size]
    return after


def between_others(x: Tensor) -> Tensor:
    """At an odd address, rows apart."""
    wide = torch.cat((x, x), -1)
    return wide.flatten()[1:-1].as_strided(x.shape, wide.stride())


LAYOUTS: dict[str, Any] = {
    "contiguous": lambda x: x,
    "heads_first": lambda x: x.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3),
    "odd_addresses": between_others,
}


@in_cuda
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32), ids=str)
@pytest.mark.parametrize(("page_size", "row"), ((1, 8), (5, 5), (16, 128)))
def test_rows_move_as_bits(backend: str, layout: str, dtype: torch.dtype, page_size: int, row: int) -> None:
    play(page_size + row)
    block_table, pages = table(page_size)
    caches = [LAYOUTS[layout](torch.randn(pages, page_size, 2, row).to(dtype)).to(DEVICE) for _ in range(6)]
    wanted = [moved(cache.cpu(), block_table) for cache in caches]
    path = (PATH.to(DEVICE), LENGTHS.to(DEVICE), caches[:3], caches[3:], block_table.to(DEVICE), PREFIXES.to(DEVICE))
    done = tree_commit(*path)
    assert [bitwise_equal(cache.cpu(), want) for cache, want in zip(caches, wanted, strict=True)] == [True] * 6
    assert done.cache_seqlens.tolist() == (PREFIXES + LENGTHS + 1).tolist() and done.hidden is None


@in_cuda
def test_integers_move_with_their_scales(backend: str) -> None:
    block_table, pages = table(4)
    caches = [torch.randint(-128, 128, (pages, 4, 2, 16), dtype=torch.int8, device=DEVICE) for _ in range(4)]
    scales = [torch.rand(pages, 4, 2, device=DEVICE) for _ in range(4)]
    scales[1] = torch.empty(2, 4, pages, device=DEVICE).permute(2, 1, 0).copy_(scales[1])
    wanted = [moved(x.cpu(), block_table) for x in (*caches, *scales)]
    path = (PATH.to(DEVICE), LENGTHS.to(DEVICE), caches[:2], caches[2:], block_table.to(DEVICE), PREFIXES.to(DEVICE))
    tree_commit(*path, k_scales=scales[:2], v_scales=scales[2:])
    assert [bitwise_equal(x.cpu(), want) for x, want in zip((*caches, *scales), wanted, strict=True)] == [True] * 8


@in_cuda
@pytest.mark.parametrize("columns", (1, 9, 64, 4104))
@pytest.mark.parametrize("layers", (0, 1))
def test_hidden_states_are_gathered(backend: str, columns: int, layers: int) -> None:
    play(columns)
    block_table, pages = table(16)
    caches = [torch.randn(pages, 16, 1, 8).half().to(DEVICE) for _ in range(2 * layers)]
    hidden = torch.randn(4, 10, columns).half()
    path = (PATH.to(DEVICE), LENGTHS.to(DEVICE), caches[:layers], caches[layers:], block_table.to(DEVICE))
    with uninitialized_is_nan():
        done = tree_commit(*path, PREFIXES.to(DEVICE), hidden.to(DEVICE))
    wanted = torch.zeros(4, 5, columns).half()
    for b, length in enumerate(LENGTHS.tolist()):
        wanted[b, : length + 1] = hidden[b, PATH[b, : length + 1].long()]
    assert done.hidden is not None and bitwise_equal(done.hidden.cpu(), wanted)
    assert done.cache_seqlens.tolist() == (PREFIXES + LENGTHS + 1).tolist()


@in_cuda
def test_a_model_of_many_layers(backend: str) -> None:
    """More caches than a launch has addresses for."""
    block_table, pages = table(16)
    caches = [torch.full((pages, 16, 1, 2), i).to(DEVICE) for i in torch.arange(450.0)]
    for cache in caches:
        cache += torch.randn(1).item() + torch.arange(cache.numel(), device=DEVICE).view(cache.shape)
    wanted = [moved(cache.cpu(), block_table) for cache in caches]
    path = (PATH.to(DEVICE), LENGTHS.to(DEVICE), caches[:225], caches[225:], block_table.to(DEVICE))
    tree_commit(*path, PREFIXES.to(DEVICE))
    assert all(bitwise_equal(cache.cpu(), want) for cache, want in zip(caches, wanted, strict=True))


@in_cuda
def test_a_long_path(backend: str) -> None:
    """More slots than a block has threads."""
    nodes = torch.arange(0, 600, 2, dtype=torch.int32)[None]
    cache = torch.randn(1, 700, 1, 8, device=DEVICE)
    before = cache.clone()
    given = (nodes.to(DEVICE), torch.tensor([299], dtype=torch.int32, device=DEVICE), [cache], [before.clone()])
    tree_commit(*given, torch.zeros(1, 1, dtype=torch.int32, device=DEVICE), torch.tensor([7], device=DEVICE))
    assert bitwise_equal(cache[0, 7:307], before[0, 7 + nodes[0].long().to(DEVICE)])
    assert bitwise_equal(cache[0, 307:], before[0, 307:]) and bitwise_equal(cache[0, :7], before[0, :7])


@in_cuda
@pytest.mark.parametrize("block", (-1, 19, -(2**31), 2**31 - 1))
def test_blocks_outside_the_cache_are_left_alone(backend: str, block: int) -> None:
    """Slots 0..15 of request 0 lie nowhere: nothing of it moves; the others move."""
    block_table, pages = table(16)
    assert pages <= 19
    block_table[0, 0] = block
    caches = [torch.randn(pages, 16, 1, 8).to(DEVICE) for _ in range(2)]
    wanted = [cache.cpu().clone() for cache in caches]
    for b in (2, 3):
        for cache in wanted:
            rows = cache[block_table[b].long()].flatten(0, 1)
            for j in range(int(LENGTHS[b]) + 1):
                target = int(PREFIXES[b]) + j
                cache[block_table[b, target // 16], target % 16] = rows[int(PREFIXES[b]) + int(PATH[b, j])]
    args = (PATH.to(DEVICE), LENGTHS.to(DEVICE), caches[:1], caches[1:], block_table.to(DEVICE), PREFIXES.to(DEVICE))
    torch.ops.m3kernels.tree_commit(*args, None)
    assert [bitwise_equal(cache.cpu(), want) for cache, want in zip(caches, wanted, strict=True)] == [True] * 2


@in_cuda
@pytest.mark.parametrize("field", ("prefix", "length", "node"))
@pytest.mark.parametrize("value", (-1, -(2**31), 2**31 - 1))
def test_impossible_paths_are_survived(backend: str, field: str, value: int) -> None:
    block_table, pages = table(16)
    path, lengths, prefixes = PATH.clone(), LENGTHS.clone(), PREFIXES.clone()
    if field == "prefix":
        prefixes[0] = value
    elif field == "length":
        lengths[0] = value
    else:
        path[0, 2] = value
    caches = [torch.randn(pages, 16, 1, 8).to(DEVICE) for _ in range(2)]
    untouched = sorted(set(range(pages)) - set(block_table.flatten().tolist()))
    before = [cache[untouched].clone() for cache in caches]
    args = (path.to(DEVICE), lengths.to(DEVICE), caches[:1], caches[1:], block_table.to(DEVICE), prefixes.to(DEVICE))
    torch.ops.m3kernels.tree_commit(*args, torch.randn(4, 10, 3).to(DEVICE))
    assert all(bitwise_equal(cache[untouched], old) for cache, old in zip(caches, before, strict=True))


@in_cuda
def test_no_requests(backend: str) -> None:
    none = torch.zeros(0, dtype=torch.int32, device=DEVICE)
    cache = torch.randn(2, 4, 1, 8, device=DEVICE)
    done = tree_commit(none.view(0, 3), none, [cache], [cache.clone()], none.view(0, 2), none)
    assert done.cache_seqlens.shape == (0,)
