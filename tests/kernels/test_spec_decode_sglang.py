"""The drop-in set against SGLang 0.5.23's own kernels (sglang_peer.py), call by call, entry by entry.

Results must be equal: the probabilities of sglang_cases.py leave no room for rounding. Real-valued rows are compared
as well.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from types import ModuleType

import numpy as np
import pytest
import torch
from sglang_cases import (
    GARBAGE,
    MODES,
    SHAPES,
    TREES,
    Selection,
    Walks,
    buffers,
    chains,
    check_equal,
    dyadic,
    ours,
    outputs,
    selections,
    sizes,
    walks,
)
from sglang_peer import call, interpreted, native, on_device
from torch import Tensor

from m3kernels import spec_decode
from m3kernels.testing import bitwise_equal

ROOMS = ("reference", "cpu")
every_room = pytest.mark.parametrize("backend", ROOMS, indirect=True)
every_shape = pytest.mark.parametrize("shape", SHAPES)


@pytest.fixture(scope="module")
def cuda_sources(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return native(tmp_path_factory.mktemp("sglang_native"))


@pytest.fixture(scope="module")
def triton_sources(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], ModuleType]:
    return interpreted(tmp_path_factory.mktemp("sglang_triton"))


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
