"""The drop-in set against SGLang 0.5.23's own kernels (sglang_peer.py), call by call, entry by entry.

Probabilities and coins are multiples of a power of two, so that every sum is exact in fp32 in any order: boundaries of
the cumulative mass are hit exactly, and the results must be equal, not close. Real-valued rows are compared as well.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import random
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from sglang_peer import call, interpreted, native, on_device
from torch import Tensor

from m3kernels import spec_decode
from m3kernels.testing import bitwise_equal

ROOMS = ("reference", "cpu")
every_room = pytest.mark.parametrize("backend", ROOMS, indirect=True)
GARBAGE = -77  # what the caller's buffers hold before a call
LARGEST = 1 - 2.0**-24  # fp32 below 1
GRAIN = 256  # probabilities and coins are multiples of 1 / GRAIN


@pytest.fixture(scope="module")
def cuda_sources(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return native(tmp_path_factory.mktemp("sglang_native"))


@pytest.fixture(scope="module")
def triton_sources(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], ModuleType]:
    return interpreted(tmp_path_factory.mktemp("sglang_triton"))


# -- candidates and trees ---------------------------------------------------------------------------------------------
class Selection(NamedTuple):
    """What build_tree_kernel_efficient reads."""

    parent_list: Tensor
    selected_index: Tensor
    verified_seq_len: Tensor
    topk: int
    depth: int
    nodes: int


def expand(rng: random.Random, topk: int, depth: int, nodes: int) -> tuple[list[int], list[int]]:
    """(parent_list, selected) of one request as a draft model makes them: scores fall along every path."""
    scores = sorted((-rng.random() for _ in range(topk)), reverse=True)
    candidates, parents, frontier = list(scores), [-1, *range(topk)], list(scores)
    for step in range(1, depth):
        grown = [score - rng.random() for score in frontier for _ in range(topk)]
        best = sorted(range(len(grown)), key=lambda i: -grown[i])[:topk]
        if step + 1 < depth:
            parents += [i + len(candidates) for i in best]
        candidates, frontier = candidates + grown, [grown[i] for i in best]
    order = sorted(range(len(candidates)), key=lambda i: -candidates[i])
    return parents[: topk * (depth - 1) + 1], sorted(order[: nodes - 1])


def selections(seed: int, requests: int, topk: int, depth: int, nodes: int) -> Selection:
    rng = random.Random(seed)
    lists, selected = zip(*(expand(rng, topk, depth, nodes) for _ in range(requests)), strict=True)
    width = topk * (depth - 1) + 1 if depth > 1 else 0
    lengths = torch.tensor([rng.randrange(9) for _ in range(requests)])
    parent_list = torch.tensor([row[:width] for row in lists], dtype=torch.int64).view(requests, width)
    chosen = torch.tensor(selected, dtype=torch.int64).view(requests, nodes - 1)
    return Selection(parent_list, chosen, lengths, topk, depth, nodes)


SHAPES = {
    "root": (3, 4, 3, 1),
    "one_draft": (2, 1, 1, 2),
    "one_step": (3, 8, 1, 5),
    "chain": (3, 1, 7, 8),
    "pairs": (4, 2, 3, 7),
    "eight": (5, 4, 4, 8),
    "nine": (2, 4, 4, 9),
    "sixteen": (4, 4, 4, 16),
    "seventeen": (3, 3, 5, 17),
    "thirty_two": (3, 8, 5, 32),
    "sixty": (2, 10, 7, 60),
}
every_shape = pytest.mark.parametrize("shape", SHAPES)
MODES = {"full": 0, "queries": 1, "packed": 2}


def buffers(chosen: Selection, mode: int) -> dict[str, Tensor]:
    """Outputs of a build, as a caller prepares them."""
    requests, nodes = len(chosen.parent_list), chosen.nodes
    if mode == 2:
        width = 1 if nodes <= 8 else 2 if nodes <= 16 else 4
        mask = torch.zeros(requests * nodes * width, dtype=torch.uint8)
    else:
        prefix = int(chosen.verified_seq_len.sum()) if mode == 0 else 0
        mask = torch.ones(nodes * (prefix + requests * nodes), dtype=torch.bool)
    positions = torch.full((requests * nodes,), GARBAGE)
    index = torch.full((requests, nodes), GARBAGE)
    links = torch.full((2, requests, nodes), -1)
    return {
        "tree_mask": mask,
        "positions": positions,
        "retrive_index": index,
        "retrive_next_token": links[0].clone(),
        "retrive_next_sibling": links[1].clone(),
    }


def sizes(chosen: Selection, mode: int) -> tuple[int, int, int, int]:
    return chosen.topk, chosen.depth, chosen.nodes, mode


def ours(chosen: Selection, mode: int) -> dict[str, Tensor]:
    out = buffers(chosen, mode)
    spec_decode.build_tree_kernel_efficient(*chosen[:3], *out.values(), *sizes(chosen, mode))
    return out


def check_equal(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert {name: bitwise_equal(mine[name], theirs[name]) for name in theirs} == dict.fromkeys(theirs, True)


# -- building ---------------------------------------------------------------------------------------------------------
@every_room
@pytest.mark.parametrize(
    ("shape", "mode"),
    [(shape, mode) for shape in SHAPES for mode in MODES if mode != "packed" or SHAPES[shape][3] <= 32],
)
def test_build_equals_the_cuda_kernel(backend: str, shape: str, mode: str, cuda_sources: ctypes.CDLL) -> None:
    chosen = selections(0, *SHAPES[shape])
    theirs = buffers(chosen, MODES[mode])
    call(cuda_sources.build_tree, len(chosen.parent_list), *chosen[:3], *theirs.values(), *sizes(chosen, MODES[mode]))
    check_equal(ours(chosen, MODES[mode]), theirs)


@every_room
@pytest.mark.parametrize("shape", ("root", "one_step", "pairs"))
@pytest.mark.parametrize("mode", ("full", "queries"))
def test_build_equals_the_triton_kernel(
    backend: str, shape: str, mode: str, triton_sources: Callable[[str], ModuleType]
) -> None:
    chosen = selections(1, *SHAPES[shape])
    check_equal(ours(chosen, MODES[mode]), triton_build(triton_sources, shape, mode))


@functools.cache
def triton_build(triton_sources: Callable[[str], ModuleType], shape: str, mode: str) -> dict[str, Tensor]:
    chosen = selections(1, *SHAPES[shape])
    return run_triton_build(triton_sources, chosen, MODES[mode])


def run_triton_build(triton_sources: Callable[[str], ModuleType], chosen: Selection, mode: int) -> dict[str, Tensor]:
    out = buffers(chosen, mode)
    moved = on_device(*chosen[:3], *out.values())
    triton_sources("spec_tree").sgl_build_tree_kernel_triton(*moved, *sizes(chosen, mode))
    return {name: value.cpu() for name, value in zip(out, moved[3:], strict=True)}


@every_room
def test_build_passes_over_a_node_without_a_selected_parent(
    backend: str, triton_sources: Callable[[str], ModuleType]
) -> None:
    """Candidate 4 hangs under 0 and candidate 12 under 11: neither is selected. 8 hangs under 1 and 17 under 8."""
    parent_list = torch.tensor([[-1, 0, 1, 2, 11, 8, 4]])
    selected = torch.tensor([[1, 4, 8, 12, 17]])
    chosen = Selection(parent_list, selected, torch.tensor([3]), 3, 3, 6)
    mine = ours(chosen, 1)
    check_equal(mine, run_triton_build(triton_sources, chosen, 1))
    assert mine["retrive_next_token"].tolist() == [[1, 3, -1, 5, -1, -1]]
    assert mine["retrive_next_sibling"].tolist() == [[-1] * 6]
    assert mine["positions"].tolist() == [3, 4, 4, 5, 4, 6]


@every_room
@every_shape
def test_reconstruct_equals_the_cuda_kernel(backend: str, shape: str, cuda_sources: ctypes.CDLL) -> None:
    chosen = selections(2, *SHAPES[shape])
    built = ours(chosen, 1)
    theirs, mine = (
        {name: torch.full_like(value, GARBAGE) for name, value in list(built.items())[1:]} for _ in range(2)
    )
    requests = len(chosen.parent_list)
    call(
        cuda_sources.reconstruct,
        *(requests, built["tree_mask"], chosen.verified_seq_len, *theirs.values(), chosen.nodes),
    )
    spec_decode.reconstruct_indices_from_tree_mask(
        built["tree_mask"], chosen.verified_seq_len, *mine.values(), requests, chosen.nodes
    )
    check_equal(mine, theirs)
    check_equal(mine, {name: built[name] for name in mine})


@every_room
@pytest.mark.parametrize("nodes", (1, 2, 5, 8, 13))
def test_reconstruct_equals_the_triton_kernel_on_any_mask(
    backend: str, nodes: int, triton_sources: Callable[[str], ModuleType]
) -> None:
    requests = 4
    mask = torch.rand(requests * nodes * nodes, generator=torch.Generator().manual_seed(nodes)) < 0.4
    lengths = torch.arange(requests) * 3
    theirs, mine = (
        [torch.full((requests * nodes,), GARBAGE), *torch.full((3, requests, nodes), GARBAGE).unbind()]
        for _ in range(2)
    )
    reconstruct = triton_sources("reconstruct_tree").reconstruct_indices_from_tree_mask_triton
    moved = on_device(mask, lengths, *theirs)
    reconstruct(*moved, requests, nodes)
    spec_decode.reconstruct_indices_from_tree_mask(mask, lengths, *mine, requests, nodes)
    assert [bitwise_equal(a, b.cpu()) for a, b in zip(mine, moved[2:], strict=True)] == [True] * 4


# -- walking ----------------------------------------------------------------------------------------------------------
class Walks(NamedTuple):
    """Random trees with laws and coins; predicts, accept_index and accept_token_num are made for every call."""

    candidates: Tensor
    retrive_index: Tensor
    retrive_next_token: Tensor
    retrive_next_sibling: Tensor
    uniform_samples: Tensor
    uniform_samples_for_final_sampling: Tensor
    target_probs: Tensor

    @property
    def links(self) -> tuple[Tensor, ...]:
        return self[:4]

    @property
    def coins(self) -> tuple[Tensor, Tensor]:
        return self[4:6]


def dyadic(generator: torch.Generator, *shape: int) -> Tensor:
    """Laws (..., V) fp32 of multiples of 1 / GRAIN, many of them equal or zero."""
    *rows, vocabulary = shape
    count = 1
    for size in rows:
        count *= size
    weights = torch.rand(count, vocabulary, generator=generator) ** 4 + 1e-9
    tokens = torch.multinomial(weights, GRAIN, replacement=True, generator=generator)
    counts = torch.zeros(count, vocabulary).scatter_add_(1, tokens, torch.ones(count, GRAIN))
    return (counts / GRAIN).view(*shape)


def coins_of(generator: torch.Generator, *shape: int) -> Tensor:
    """Multiples of 1 / GRAIN, a tenth of them 0 and a tenth the largest fp32 below 1."""
    coins = torch.randint(GRAIN, shape, generator=generator) / GRAIN
    kind = torch.randint(10, shape, generator=generator)
    return torch.where(kind == 0, 0.0, torch.where(kind == 1, LARGEST, coins))


def walks(seed: int, requests: int, nodes: int, vocabulary: int, bushy: float, smooth: bool = False) -> Walks:
    """Trees whose node i hangs under a random elder (bushy 1), under node i - 1 (bushy 0), or either.

    Tokens are drawn with repetition, half of them from their parent's law; node ids are shuffled across requests.
    """
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    if smooth:
        laws = (torch.randn(requests, nodes, vocabulary, generator=generator) * 5).softmax(-1)
        coins = [torch.rand(size, generator=generator) for size in ((requests, nodes), (requests,))]
    else:
        laws = dyadic(generator, requests, nodes, vocabulary)
        coins = [coins_of(generator, *size) for size in ((requests, nodes), (requests,))]
    likely = torch.multinomial(laws.flatten(0, 1), nodes, replacement=True, generator=generator).tolist()
    candidates, next_token, next_sibling = torch.full((3, requests, nodes), -1).unbind()
    for b in range(requests):
        youngest: dict[int, int] = {}
        candidates[b, 0] = rng.randrange(vocabulary)
        for i in range(1, nodes):
            parent = rng.randrange(i) if rng.random() < bushy else i - 1
            sure = rng.random() < 0.7
            candidates[b, i] = likely[b * nodes + parent][i] if sure else rng.randrange(vocabulary)
            if parent in youngest:
                next_sibling[b, youngest[parent]] = i
            else:
                next_token[b, parent] = i
            youngest[parent] = i
    index = torch.randperm(requests * nodes, generator=generator).view(requests, nodes)
    return Walks(candidates, index, next_token, next_sibling, *coins, laws)


def outputs(case: Walks, width: int) -> dict[str, Tensor]:
    requests, nodes = case.candidates.shape
    return {
        "predicts": torch.full((requests * nodes,), GARBAGE, dtype=torch.int32),
        "accept_index": torch.full((requests, width), GARBAGE, dtype=torch.int32),
        "accept_token_num": torch.full((requests,), GARBAGE, dtype=torch.int32),
    }


TREES: dict[str, dict[str, Any]] = {
    "root": dict(nodes=1, vocabulary=5, bushy=1.0),
    "pair": dict(nodes=2, vocabulary=3, bushy=1.0),
    "chain": dict(nodes=7, vocabulary=6, bushy=0.0),
    "bush": dict(nodes=8, vocabulary=7, bushy=1.0),
    "mixed": dict(nodes=12, vocabulary=16, bushy=0.6),
    "thirty_two": dict(nodes=32, vocabulary=9, bushy=0.7),
    "hundred": dict(nodes=100, vocabulary=40, bushy=0.9),
    "one_token": dict(nodes=5, vocabulary=1, bushy=0.8),
    "large_rows": dict(nodes=6, vocabulary=2501, bushy=0.8),
}
every_tree = pytest.mark.parametrize("tree", TREES)
WIDTHS = {"one": 1, "two": 2, "four": 4, "nodes": 0}  # slots of a path; 0: as many as nodes
every_width = pytest.mark.parametrize("width", WIDTHS)


def requests_of(backend: str, tree: str) -> int:
    return {"reference": 6, "cpu": 60}[backend] if tree not in ("hundred", "large_rows") else 5


@every_room
@every_tree
@every_width
def test_greedy_walk_equals_the_cuda_kernel(backend: str, tree: str, width: str, cuda_sources: ctypes.CDLL) -> None:
    case = walks(3, requests_of(backend, tree), **TREES[tree])
    slots = WIDTHS[width] or case.candidates.shape[1]
    target = torch.empty_like(case.candidates).view(-1)
    target[case.retrive_index.view(-1)] = case.target_probs.argmax(-1).view(-1)
    target = target.view(case.candidates.shape)
    mine, theirs = outputs(case, slots), outputs(case, slots)
    spec_decode.verify_tree_greedy(*mine.values(), *case.links, target)
    requests, nodes = case.candidates.shape
    call(cuda_sources.verify_greedy, requests, *theirs.values(), *case.links, target, slots, nodes)
    check_equal(mine, theirs)


@every_room
@pytest.mark.parametrize("tree", ("root", "chain", "bush"))
def test_greedy_walk_equals_the_triton_kernel(
    backend: str, tree: str, triton_sources: Callable[[str], ModuleType]
) -> None:
    case = walks(4, 6, **TREES[tree])
    requests, nodes = case.candidates.shape
    case = case._replace(retrive_index=torch.arange(requests * nodes).view(requests, nodes))
    target, slots = case.target_probs.argmax(-1), min(5, nodes)
    mine, theirs = outputs(case, slots), outputs(case, slots)
    spec_decode.verify_tree_greedy(*mine.values(), *case.links, target)
    moved = on_device(*theirs.values(), *case.links, target)
    triton_sources("spec_tree").verify_tree_greedy_triton(*moved)
    check_equal(mine, {name: value.cpu() for name, value in zip(theirs, moved[:3], strict=True)})


# -- trees by the target's probabilities ------------------------------------------------------------------------------
def run_tree_sampler(
    case: Walks, width: int, cuda_sources: ctypes.CDLL, draft: Tensor, single: float, enough: float
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(ours, theirs): everything that is written."""
    mine, theirs = outputs(case, width), outputs(case, width)
    my_draft, their_draft = draft.clone(), draft.clone()
    spec_decode.tree_speculative_sampling_target_only(
        *mine.values(), *case.links, *case.coins, case.target_probs, my_draft, single, enough
    )
    requests, nodes, vocabulary = case.target_probs.shape
    call(
        cuda_sources.sample_tree,
        *(requests, *theirs.values(), *case.links, *case.coins, case.target_probs, their_draft),
        *(width, nodes, vocabulary, single, enough),
    )
    return {**mine, "draft_probs": my_draft}, {**theirs, "draft_probs": their_draft}


@every_room
@every_tree
@every_width
def test_tree_sampler_equals_the_cuda_kernel(backend: str, tree: str, width: str, cuda_sources: ctypes.CDLL) -> None:
    case = walks(5, requests_of(backend, tree), **TREES[tree])
    zeros = torch.zeros_like(case.target_probs)
    slots = WIDTHS[width] or case.candidates.shape[1]
    mine, theirs = run_tree_sampler(case, slots, cuda_sources, zeros, 1.0, 1.0)
    check_equal(mine, theirs)
    without = outputs(case, slots)
    spec_decode.tree_speculative_sampling_target_only(*without.values(), *case.links, *case.coins, case.target_probs)
    check_equal(without, {name: theirs[name] for name in without})


@every_room
@pytest.mark.parametrize(
    ("single", "enough"), ((0.0, 0.0), (0.25, 1.0), (1.0, 0.5), (0.5, 0.75)), ids=("none", "single", "acc", "both")
)
def test_thresholds_below_one_accept_as_the_cuda_kernel(
    backend: str, single: float, enough: float, cuda_sources: ctypes.CDLL
) -> None:
    case = walks(6, requests_of(backend, "mixed"), **TREES["mixed"])
    zeros = torch.zeros_like(case.target_probs)
    check_equal(*run_tree_sampler(case, 6, cuda_sources, zeros, single, enough))


@every_room
def test_tree_sampler_subtracts_what_the_caller_left_in_draft_probs(backend: str, cuda_sources: ctypes.CDLL) -> None:
    case = walks(7, requests_of(backend, "bush"), **TREES["bush"])
    draft = dyadic(torch.Generator().manual_seed(70), *case.target_probs.shape)
    check_equal(*run_tree_sampler(case, 5, cuda_sources, draft, 1.0, 1.0))


@every_room
def test_tree_sampler_equals_the_cuda_kernel_on_rows_without_mass(backend: str, cuda_sources: ctypes.CDLL) -> None:
    case = walks(8, 6, **TREES["bush"])
    case.target_probs[::2] = 0
    mine, theirs = run_tree_sampler(case, 4, cuda_sources, torch.zeros_like(case.target_probs), 1.0, 1.0)
    check_equal(mine, theirs)
    assert (mine["accept_token_num"][::2] == 0).all()


def test_tree_sampler_equals_the_cuda_kernel_on_real_rows(cuda_sources: ctypes.CDLL) -> None:
    case = walks(9, 200, nodes=16, vocabulary=1000, bushy=0.7, smooth=True)
    zeros = torch.zeros_like(case.target_probs)
    mine, theirs = run_tree_sampler(case, 6, cuda_sources, zeros, 1.0, 1.0)
    check_equal(mine, theirs)
    assert set(mine["accept_token_num"].tolist()) >= {0, 1, 2}


# -- chains -----------------------------------------------------------------------------------------------------------
def chains(seed: int, requests: int, slots: int, vocabulary: int) -> tuple[Walks, Tensor]:
    """Chains whose drafts come from a draft's law, mostly; and that law (B, slots - 1, V)."""
    case = walks(seed, requests, slots, vocabulary, bushy=0.0)
    generator = torch.Generator().manual_seed(seed + 1)
    draft = (dyadic(generator, requests, slots - 1, vocabulary) + case.target_probs[:, : slots - 1]) / 2
    if slots > 1:
        drawn = torch.multinomial(draft.flatten(0, 1), 1, generator=generator).view(requests, slots - 1)
        wild = torch.rand(drawn.shape, generator=generator) < 0.1
        case.candidates[:, 1:] = torch.where(wild, case.candidates[:, 1:], drawn)
    return case, draft


CHAINS = {"root": (3, 1, 4), "one": (16, 2, 5), "four": (16, 5, 8), "long": (4, 9, 3), "two_tiles": (2, 3, 5000)}


@every_room
@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("block_verification", (False, True), ids=("token", "block"))
def test_chain_sampler_equals_the_triton_kernel(
    backend: str, chain: str, block_verification: bool, triton_sources: Callable[[str], ModuleType]
) -> None:
    case, draft = chains(10, *CHAINS[chain])
    check_equal(
        run_chain(case, draft, block_verification), triton_chain(triton_sources, chain, 0.0, block_verification)
    )


def run_chain(case: Walks, draft: Tensor, block_verification: bool) -> dict[str, Tensor]:
    out = outputs(case, case.candidates.shape[1])
    given = (*case.links, *case.coins, case.target_probs, draft)
    spec_decode.chain_speculative_sampling(*out.values(), *given, block_verification=block_verification)
    return out


def spoil(draft: Tensor, bad: float) -> Tensor:
    """Every second law, with every second probability replaced, unless bad is 0."""
    if bad != 0:
        draft[::2, :, ::2] = bad
    return draft


@functools.cache
def triton_chain(
    triton_sources: Callable[[str], ModuleType], chain: str, bad: float, block_verification: bool
) -> dict[str, Tensor]:
    case, draft = chains(10, *CHAINS[chain])
    out = outputs(case, case.candidates.shape[1])
    moved = on_device(*out.values(), *case.links, *case.coins, case.target_probs, spoil(draft, bad))
    sampler = triton_sources("reject_sampling").chain_speculative_sampling_triton
    with np.errstate(invalid="ignore"):  # coins that are 0 times inf, in the interpreter
        sampler(*moved, 1.0, 1.0, True, block_verification=block_verification)
    return {name: value.cpu() for name, value in zip(out, moved[:3], strict=True)}


@every_room
@pytest.mark.parametrize("bad", (torch.nan, torch.inf, -torch.inf, -0.25, 1.5), ids=str)
def test_chain_sampler_takes_what_is_no_probability_for_zero(
    backend: str, bad: float, triton_sources: Callable[[str], ModuleType]
) -> None:
    case, draft = chains(10, *CHAINS["four"])
    mine = run_chain(case, spoil(draft, bad), False)
    check_equal(mine, triton_chain(triton_sources, "four", bad, False))


def test_chain_sampler_has_sglangs_name_too() -> None:
    assert spec_decode.chain_speculative_sampling_triton is spec_decode.chain_speculative_sampling


# -- what is ours -----------------------------------------------------------------------------------------------------
@every_room
def test_the_tree_sampler_has_the_targets_law(backend: str) -> None:
    """Over a grid of coins that no breakpoint divides, each token after the root comes as often as its probability."""
    p = torch.tensor([5, 0, 3, 2, 4, 2]) / 16
    drafts, rest = [4, 1, 3], 10  # sixteenths that are left when all three are rejected
    grid = list(itertools.product(range(16), range(rest)))
    requests = len(grid)
    candidates = torch.tensor([[0, *drafts]]).expand(requests, 4)
    index = torch.arange(requests * 4).view(requests, 4)
    next_token = torch.tensor([[1, -1, -1, -1]]).expand(requests, 4)
    next_sibling = torch.tensor([[-1, 2, 3, -1]]).expand(requests, 4)
    coins = torch.tensor([(u + 0.5) / 16 for u, _ in grid])[:, None].expand(requests, 4)
    final = torch.tensor([(v + 0.5) / rest for _, v in grid])
    laws = p.expand(requests, 4, 6)
    case = Walks(candidates, index, next_token, next_sibling, coins, final, laws)
    out = outputs(case, 2)
    spec_decode.tree_speculative_sampling_target_only(*out.values(), *case.links, coins, final, laws)
    emitted = out["predicts"][index[:, 0]]
    assert (torch.bincount(emitted, minlength=6) / requests).tolist() == p.tolist()
    assert float((out["accept_token_num"] == 1).float().mean()) == float(p[drafts].sum())


@every_room
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_laws_in_half_precision_are_taken_as_they_are(backend: str, dtype: torch.dtype) -> None:
    case = walks(12, requests_of(backend, "mixed"), **TREES["mixed"])
    exact, half = outputs(case, 5), outputs(case, 5)
    spec_decode.tree_speculative_sampling_target_only(*exact.values(), *case.links, *case.coins, case.target_probs)
    laws = case.target_probs.to(dtype)
    draft = torch.zeros_like(laws)
    spec_decode.tree_speculative_sampling_target_only(*half.values(), *case.links, *case.coins, laws, draft)
    check_equal(half, exact)
    assert bitwise_equal(draft, draft.where(draft == 0, laws))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_every_half_precision_number_is_read_right(dtype: torch.dtype) -> None:
    """A row that holds all finite numbers of a dtype: the token drawn is that of the same row in fp32."""
    row = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    row = row.where(row.isfinite(), 0).abs()[None, None]
    coins = torch.rand(64, generator=torch.Generator().manual_seed(13))
    tree = torch.zeros(1, 1, dtype=torch.int64)
    drawn: dict[torch.dtype, list[int]] = {}
    for laws in (row, row.float()):
        for coin in coins:
            out = [torch.zeros(1, dtype=torch.int32), torch.zeros(1, 1, dtype=torch.int32)]
            args = (out[0], out[1], torch.zeros(1, dtype=torch.int32), tree, tree, tree - 1, tree - 1)
            spec_decode.tree_speculative_sampling_target_only(*args, torch.zeros(1, 1), coin[None], laws)
            drawn.setdefault(laws.dtype, []).append(int(out[0]))
    assert drawn[dtype] == drawn[torch.float32]


@every_room
def test_strided_arguments_give_what_contiguous_ones_give(backend: str) -> None:
    case, draft = chains(14, 7, 5, 33)

    def spread(value: Tensor) -> Tensor:
        """The same values with a gap behind every row, or every element of what has none."""
        wide = torch.full((*value.shape[:-1], 2 * value.shape[-1]), 99, dtype=value.dtype)
        return wide[..., : value.shape[-1]].copy_(value) if value.ndim == 3 else wide[..., ::2].copy_(value)

    given = (*case.links, *case.coins, case.target_probs)
    plain, strided = outputs(case, 5), outputs(case, 5)
    spec_decode.chain_speculative_sampling(*plain.values(), *given, draft)
    spec_decode.chain_speculative_sampling(*strided.values(), *map(spread, given), spread(draft))
    check_equal(strided, plain)
    spec_decode.tree_speculative_sampling_target_only(*plain.values(), *given)
    zeros = spread(torch.zeros_like(case.target_probs))
    spec_decode.tree_speculative_sampling_target_only(*strided.values(), *map(spread, given), zeros)
    check_equal(strided, plain)


@every_room
@pytest.mark.parametrize("mode", MODES)
def test_build_takes_1024_nodes(backend: str, mode: str) -> None:
    """Mask and links are the same in every mode; bits of 32 words a row."""
    nodes, topk, depth = 1024, 33, 33
    rng = random.Random(15)
    parents, selected = expand(rng, topk, depth, nodes)
    chosen = Selection(torch.tensor([parents]), torch.tensor([selected]), torch.tensor([2]), topk, depth, nodes)
    out = buffers(chosen, MODES["queries"])
    spec_decode.build_tree_kernel_efficient(*chosen[:3], *out.values(), *sizes(chosen, MODES["queries"]))
    square = out["tree_mask"].view(nodes, nodes)
    mask = torch.zeros(nodes * 32, dtype=torch.int32)
    if mode == "full":
        mask = torch.ones(nodes * (nodes + 2), dtype=torch.bool)
    elif mode == "queries":
        mask = torch.ones(nodes * nodes, dtype=torch.bool)
    again = {**buffers(chosen, 1), "tree_mask": mask}
    spec_decode.build_tree_kernel_efficient(*chosen[:3], *again.values(), *sizes(chosen, MODES[mode]))
    if mode == "packed":
        bits = (mask.view(nodes, 32, 1) >> torch.arange(32)) & 1
        assert torch.equal(bits.view(nodes, nodes).bool(), square)
    else:
        assert torch.equal(mask.view(nodes, -1)[:, -nodes:], square)
    links = {name: value for name, value in out.items() if name != "tree_mask"}
    check_equal({name: again[name] for name in links}, links)
    assert square.sum(1).max() > 4
