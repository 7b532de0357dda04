"""Trees of the CUDA room, on a GPU or on the emulated device: integers equal to the reference's."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from m3kernels.spec_decode import reference
from m3kernels.spec_decode.reference import make_inputs
from m3kernels.testing import uninitialized_is_nan

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []


@pytest.fixture(params=(1, 2))
def room(request: pytest.FixtureRequest, cuda_module: None) -> Iterator[ModuleType]:
    """The room, with two seeds of the orders that a device leaves open."""
    from m3kernels.spec_decode import _cuda

    if DEVICE == "cpu":
        import emulated_cuda

        emulated_cuda.configure(80, 4, request.param)
    yield _cuda


def there(values: list[Any]) -> list[Any]:
    return [value.to(DEVICE) if isinstance(value, Tensor) else value for value in values]


def equal(ours: Any, truth: Any) -> bool:
    return all(torch.equal(a.cpu(), b) for a, b in zip(ours, truth, strict=True))


def candidate_inputs(requests: int, topk: int, steps: int, nodes: int, *, budget: bool = False) -> list[Any]:
    """Scores that tie now and then, some of them nan."""
    count = topk + (steps - 1) * topk**2
    columns = [torch.full((requests, 1), -1)]
    for step in range(steps - 1):
        base, among = (0, topk) if step == 0 else (topk + (step - 1) * topk**2, topk**2)
        columns.append(torch.stack([base + torch.randperm(among)[:topk] for _ in range(requests)]))
    scores = (2 * torch.randn(requests, count)).round() / 2
    scores[0, :2] = torch.nan
    return [
        scores,
        torch.randint(0, 100, (requests, count)),
        torch.cat(columns, 1),
        torch.arange(requests) + 50,
        torch.arange(requests) * 3 + 7,
        torch.randint(-1, nodes + 3, (requests,)).int() if budget else None,
        topk,
        nodes,
    ]


TREES: dict[str, dict[str, Any]] = {
    "ties": dict(requests=2, topk=3, steps=3, nodes=8),
    "budget": dict(requests=5, topk=4, steps=3, nodes=33, budget=True),
    "root_alone": dict(requests=1, topk=2, steps=1, nodes=1),
    "more_nodes_than_candidates": dict(requests=1, topk=3, steps=2, nodes=40),
    "as_many_nodes_as_candidates": dict(requests=2, topk=3, steps=3, nodes=22),
    "more_candidates_than_threads": dict(requests=2, topk=24, steps=3, nodes=100),
    "more_candidates_than_are_kept_near": dict(requests=1, topk=48, steps=3, nodes=70),
    "many_nodes": dict(requests=1, topk=16, steps=5, nodes=1024),
}


@pytest.mark.parametrize("case", TREES)
def test_finalize(room: ModuleType, case: str) -> None:
    arguments = candidate_inputs(**TREES[case])
    with uninitialized_is_nan():
        got = room.tree_finalize(*there(arguments))
    assert equal(got, reference.tree_finalize(*arguments))


def test_finalize_of_parents_that_are_nowhere(room: ModuleType) -> None:
    arguments = candidate_inputs(2, 3, 4, 20)
    arguments[2][0, 3] = 10**9
    arguments[2][0, 4:6] = -7
    arguments[2][1, 5:] = 20
    assert equal(room.tree_finalize(*there(arguments)), reference.tree_finalize(*arguments))


def test_finalize_of_columns_that_share_a_parent(room: ModuleType) -> None:
    arguments = candidate_inputs(2, 4, 3, 30)
    arguments[2][:, 1:4] = 1
    assert equal(room.tree_finalize(*there(arguments)), reference.tree_finalize(*arguments))


def test_finalize_of_scores_of_every_kind(room: ModuleType) -> None:
    arguments = candidate_inputs(1, 4, 2, 12)
    kinds = [torch.inf, -torch.inf, torch.nan, 0.0, -0.0, 1e-45, -1e-45, torch.finfo(torch.float32).max]
    arguments[0][0, :16] = torch.tensor(kinds * 2)
    assert equal(room.tree_finalize(*there(arguments)), reference.tree_finalize(*arguments))


def test_finalize_refuses_sizes(room: ModuleType) -> None:
    arguments = candidate_inputs(2, 3, 3, 8)
    with pytest.raises(ValueError, match=r"tree_finalize: num_nodes: want 1..1024; got 0"):
        room.tree_finalize(*there([*arguments[:-1], 0]))
    with pytest.raises(ValueError, match="tree_finalize: tokens: want 42 elements; got 21"):
        room.tree_finalize(*there([arguments[0], arguments[1][0], *arguments[2:]]))


# -- the drop-in set --------------------------------------------------------------------------------------------------
def link_buffers(requests: int, nodes: int) -> list[Tensor]:
    return [torch.zeros(requests * nodes, dtype=torch.int64), *(torch.full((requests, nodes), -1) for _ in range(3))]


@pytest.mark.parametrize("nodes", (7, 11, 45))
@pytest.mark.parametrize("mode", (0, 1, 2))
def test_build_tree_and_back(room: ModuleType, mode: int, nodes: int) -> None:
    requests = 3
    arguments = candidate_inputs(requests, 4, 4, nodes)
    selected = reference.tree_finalize(*arguments)[-1]
    packed = {7: 1, 11: 2, 45: 8}[nodes]
    size = (nodes * (int(arguments[4].sum()) + nodes * requests), requests * nodes**2, requests * nodes * packed)[mode]
    results = []
    for ours in (True, False):
        buffers = [torch.full((size,), 0 if mode == 2 else 1, dtype=torch.uint8), *link_buffers(requests, nodes)]
        given = [arguments[2], selected, arguments[4], *buffers]
        given = there(given) if ours else given
        (room if ours else reference).build_tree_kernel_efficient(*given, 4, 3, nodes, mode)
        results.append(given[3:])
    assert equal(*results)
    if mode == 1:
        back, again = there(link_buffers(requests, nodes)), link_buffers(requests, nodes)
        room.reconstruct_indices_from_tree_mask(*there([results[1][0], arguments[4]]), *back, requests, nodes)
        reference.reconstruct_indices_from_tree_mask(results[1][0], arguments[4], *again, requests, nodes)
        assert equal(back, again)


def test_build_survives_trees_that_are_none(room: ModuleType) -> None:
    """Cycles, indices of nothing, lengths of nothing and a mask that is too small: bytes beyond it stay."""
    requests, nodes = 3, 9
    parent_list = torch.tensor([[-1, 5, 4, 2**40], [-1, -7, 3, 3], [-1, 0, 1, 2]])
    selected = torch.tensor([[4, 5, 2, 7, -1, 2**50, 10, 400], [5, 4, 8, 9, 3, 3, 1, 0], list(range(8))])
    lengths = torch.tensor([5, -(2**40), 2**61])
    whole = torch.full((4096,), 7, dtype=torch.uint8)
    for mode in (0, 1, 2):
        outer = whole.clone().to(DEVICE)
        room.build_tree_kernel_efficient(
            *there([parent_list, selected, lengths]),
            outer[64:200],
            *there(link_buffers(requests, nodes)),
            3,
            3,
            nodes,
            mode,
        )
        assert bool((outer[:64] == 7).all()) and bool((outer[200:] == 7).all())


def walk_inputs(*, width: int = 4) -> tuple[list[Tensor], list[Tensor]]:
    tree = make_inputs(3, 9, 40, sharpness=1.0)
    links = [tree["candidates"], torch.arange(27).view(3, 9), tree["next_token"], tree["next_sibling"]]
    outputs = [torch.full((27,), -7).int(), torch.full((3, width), -1).int(), torch.full((3,), -1).int()]
    predict = torch.randint(0, 40, (3, 9))
    for node in range(4):  # a child of each of the first nodes is what is predicted
        predict[:, node] = links[0].gather(1, links[2][:, node : node + 1].clamp(min=0))[:, 0]
    return outputs, [*links, predict]


@pytest.mark.parametrize("width", (1, 2, 4))
def test_verify_tree_greedy(room: ModuleType, width: int) -> None:
    outputs, given = walk_inputs(width=width)
    ours, truth = there([buffer.clone() for buffer in outputs]), [buffer.clone() for buffer in outputs]
    room.verify_tree_greedy(*ours, *there(given))
    reference.verify_tree_greedy(*truth, *given)
    assert equal(ours, truth)


def test_verify_tree_greedy_survives_links_and_places_of_nothing(room: ModuleType) -> None:
    outputs, given = walk_inputs(width=9)
    given[0].fill_(3)
    given[4].fill_(3)
    given[2][0], given[3][0] = 0, 0
    given[2][1], given[3][1] = 2**40, -9
    given[1][2] = 2**33
    given[1][1, 0] = -1
    whole = torch.full((3, 300), 7, dtype=torch.int32)
    ours = there([whole.clone(), *outputs[1:]])
    room.verify_tree_greedy(ours[0][1, 100:127], *ours[1:], *there(given))
    assert bool((ours[0][0] == 7).all()) and bool((ours[0][2] == 7).all())
    assert bool((ours[0][1, :100] == 7).all()) and bool((ours[0][1, 127:] == 7).all())
    assert bool((ours[2] < 9).all())


def test_verify_tree_greedy_takes_no_link_out_of_the_tree(room: ModuleType) -> None:
    outputs, given = walk_inputs(width=9)
    given[0].fill_(5)
    given[4].fill_(3)
    for node in (9, 10, 18):
        given[2].fill_(node)
        given[3].fill_(node)
        ours = there(outputs)
        room.verify_tree_greedy(*ours, *there(given))
        assert not ours[2].any()
