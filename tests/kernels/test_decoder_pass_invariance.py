"""What must change no bit of a row: the rows beside it, how a prompt is cut, pages, threads, memory nobody wrote.

Dense and INT4 products, dense and INT4 experts, every dtype of the caches.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import pytest
import torch
from decoder_pass_cases import HISTORY, TREE, Chunk, Paging, Shape, decoder, make_batch, play, run_pass, words
from torch import Tensor

from m3kernels.decoder.program import Program
from m3kernels.testing import bitwise_equal

KV = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.int8}
HELD = {
    "dense": Shape(weights="bf16", layers=2),
    "int4": Shape(weights="int4", gate="head", norms=True),
    "dense_experts": Shape(experts=5, gate="element"),
    "int4_experts": Shape(experts=5, weights="int4", symmetric=False),
}
SHAPES = {
    f"{held}-{kv}": Shape(**(vars(shape) | {"kv": dtype}))
    for held, shape in HELD.items()
    for kv, dtype in KV.items()
    if not shape.experts or kv in ("fp32", "int8")
}
PROMPT = words(0, 40)


@pytest.fixture
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """torch's thread count for the test."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(params=SHAPES)
def shape(request: pytest.FixtureRequest) -> Shape:
    return SHAPES[request.param]


def in_passes(program: Program, passes: Sequence[Sequence[Chunk]], paging: Paging | None = None) -> list[Tensor]:
    """Both outputs over the rows of all passes, one after another."""
    found = [run_pass(program, chunks, paging) for chunks in passes]
    return [torch.cat(parts) for parts in zip(*found, strict=True)]


def cut(*sizes: int) -> list[list[Chunk]]:
    """The prompt in chunks of these sizes, a pass each."""
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [[Chunk(0, start, PROMPT[start : start + size])] for start, size in zip(starts, sizes, strict=True)]


# -- other rows -------------------------------------------------------------------------------------------------------
CUTS = {"whole": (40,), "halves": (20, 20), "last_alone": (39, 1), "uneven": (1, 2, 3, 5, 7, 22), "tokens": (1,) * 40}


def test_a_prompt_cut_anyhow(shape: Shape) -> None:
    found = {name: in_passes(decoder(shape), cut(*sizes)) for name, sizes in CUTS.items()}
    same = {name: all(map(bitwise_equal, outputs, found["whole"])) for name, outputs in found.items()}
    assert same == dict.fromkeys(CUTS, True)


MANY = Paging(pages=120, requests=40)
PROMPTS = [Chunk(request, 0, words(request, 1 + request % 7)) for request in range(40)]
NEXT = [Chunk(chunk.request, len(chunk.tokens), words(100 + chunk.request, 1)) for chunk in PROMPTS]


def test_a_row_alone_and_among_others(shape: Shape) -> None:
    """Forty requests decode together, in batches of every smaller size up to eight, and one by one, in other orders."""
    together, alone = (decoder(shape, pages=MANY.pages) for _ in range(2))
    for program in (together, alone):
        run_pass(program, PROMPTS, MANY)
    whole = run_pass(together, NEXT, MANY)
    starts = [0, 1, 3, 6, 10, 15, 21, 28, 36, 40]
    batches = [NEXT[start:stop] for start, stop in itertools.pairwise(starts)]
    assert all(map(bitwise_equal, in_passes(alone, batches, MANY), whole))
    backwards = [output.flip(0) for output in run_pass(alone, NEXT[::-1], MANY)]
    assert all(map(bitwise_equal, backwards, whole))
    singles = in_passes(alone, [[chunk] for chunk in NEXT[::5]], MANY)
    assert all(bitwise_equal(single, output[::5].contiguous()) for single, output in zip(singles, whole, strict=True))


def test_a_mixed_batch_is_its_parts(shape: Shape) -> None:
    """Prefill, decode and trees of one pass, each alone."""
    mixed, parts = decoder(shape), decoder(shape)
    play(mixed)
    play(parts)
    chunks = [chunk for chunk in HISTORY[1] if chunk.parents is None] + [c for c in HISTORY[1] if c.parents is not None]
    whole = run_pass(mixed, HISTORY[1])
    assert all(map(bitwise_equal, in_passes(parts, [[chunk] for chunk in chunks]), whole))


def test_a_node_of_a_tree_is_the_end_of_its_path(shape: Shape) -> None:
    """Each path of a tree, as a sequence without branches, gives the node's bits."""
    program, tree = decoder(shape), Chunk(0, 13, words(3, 7), TREE)
    run_pass(program, [Chunk(0, 0, PROMPT[:13])])
    nodes = run_pass(program, [tree])
    paths = [Chunk(0, 13, tuple(tree.tokens[node] for node in tree.path(last))) for last in range(len(TREE))]
    for_each = [run_pass(program, [path]) for path in paths]
    ends = [torch.stack([outputs[which][-1] for outputs in for_each]) for which in range(2)]
    assert all(map(bitwise_equal, ends, nodes))


def test_a_tree_node_by_node(shape: Shape) -> None:
    """A tree in one pass, and level by level with the nodes before in the cache."""
    program, tokens = decoder(shape), words(3, 7)
    run_pass(program, [Chunk(0, 0, PROMPT[:13])])
    whole = run_pass(program, [Chunk(0, 13, tokens, TREE)])
    levels = [(0, 1), (2, 3, 4), (5,), (6,)]
    steps = [[Chunk(0, 13, tokens[: nodes[-1] + 1], TREE[: nodes[-1] + 1], nodes)] for nodes in levels]
    assert all(map(bitwise_equal, in_passes(program, steps), whole))


def test_nan_in_one_request_stays_there(shape: Shape) -> None:
    program, others = decoder(shape), [chunk for chunk in HISTORY[0] if chunk.request]
    clean = run_pass(program, others)
    step = program.steps[0]
    (table,) = step.tensors
    assert table is not None
    used = {token for chunk in others for token in chunk.tokens}
    poison = next(token for token in range(len(table)) if token not in used)
    table[poison] = torch.nan
    found = run_pass(program, [Chunk(0, 0, (*PROMPT[:5], poison, *PROMPT[:3])), *others])
    assert all(bitwise_equal(output[9:], want) for output, want in zip(found, clean, strict=True))
    assert found[1][5].isnan().all()


# -- pages and memory -------------------------------------------------------------------------------------------------
PAGINGS = {
    "other_order": Paging(order=7),
    "pages_of_one": Paging(page_size=1, pages=160, order=2),
    "odd_pages": Paging(page_size=3, pages=60, order=3),
    "large_pages": Paging(page_size=32, pages=4),
    "a_page_of_all": Paging(page_size=64, pages=4, order=1),
}


def test_pages_of_any_size_in_any_order(shape: Shape) -> None:
    want = play(decoder(shape))
    found = {
        name: play(decoder(shape, pages=paging.pages, page_size=paging.page_size), paging=paging)
        for name, paging in PAGINGS.items()
    }
    same = {name: all(map(bitwise_equal, outputs, want)) for name, outputs in found.items()}
    assert same == dict.fromkeys(PAGINGS, True)


def test_slots_that_nobody_wrote_change_nothing(shape: Shape) -> None:
    """The caches of these tests start as nan; here as zeros, and as numbers."""
    want, found = play(decoder(shape)), []
    for value in (0, 3):
        program = decoder(shape)
        for cache in program.caches:
            for tensor in (cache.keys, cache.values, cache.k_scale, cache.v_scale):
                if tensor is not None:
                    tensor.fill_(value)
        found.append(play(program))
    assert all(map(bitwise_equal, found[0], want)) and all(map(bitwise_equal, found[1], want))


# -- threads ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("threads", (2, 3), indirect=True)
@pytest.mark.parametrize("held", HELD)
def test_threads_change_no_bit(held: str, threads: int) -> None:
    """Enough rows that every instruction is shared out."""
    paging = Paging(page_size=16, requests=2)
    passes = [[Chunk(0, 0, words(0, 300)), Chunk(1, 0, words(1, 250))]]
    passes.append([Chunk(0, 300, words(2, 1)), Chunk(1, 250, words(3, 7), TREE)])
    found = in_passes(decoder(HELD[held], page_size=16), passes, paging)
    torch.set_num_threads(1)
    assert all(map(bitwise_equal, in_passes(decoder(HELD[held], page_size=16), passes, paging), found))


def test_batches_are_what_they_say() -> None:
    """The masks and slots that these tests rest on."""
    batch = make_batch([Chunk(1, 6, (5, 6, 7), (-1, -1, 0)), Chunk(0, 2, (8,))], Paging())
    assert batch.tokens.tolist() == [8, 5, 6, 7] and batch.positions.tolist() == [2, 6, 6, 7]
    assert batch.mask_bits is not None and batch.mask_bits.tolist() == [[1], [2], [5]]
    assert batch.cache_seqlens.tolist() == [3, 9] and batch.cu_seqlens.tolist() == [0, 1, 4]
    table = Paging().table(1)
    assert batch.slots[1:].tolist() == [int(table[1]) * 4 + 2, int(table[1]) * 4 + 3, int(table[2]) * 4]
