"""tree_budget: the best of all choices, by trying them all; dearer tokens, experts, batches; the trees it leads to."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from m3kernels.spec_decode import Tree, draft_topk, tree_budget, tree_finalize
from m3kernels.spec_decode.reference import expected_experts

CURVES = {
    "flat": lambda m: torch.ones_like(m),
    "linear": lambda m: 1 + 0.07 * m,
    "steps": lambda m: 1 + (m / 4).ceil() * 0.4,
    "wall": lambda m: torch.where(m > 5, 50.0, 1.0),
    "convex": lambda m: 1 + 0.02 * m**2,
    "falling": lambda m: 3 - 0.01 * m,
}
every_curve = pytest.mark.parametrize("curve", CURVES)


def costs(curve: str, most: int = 40) -> Tensor:
    return CURVES[curve](torch.arange(most + 1, dtype=torch.float64))


def random_scores(requests: int, count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return -3 * torch.rand(requests, count, generator=generator)


# -- the best choice --------------------------------------------------------------------------------------------------
def worth(scores: Tensor, nodes: tuple[int, ...], cost: Tensor) -> float:
    """Expected tokens per cost if request b keeps its best nodes[b] - 1 candidates."""
    gains = scores.double().exp().sort(dim=1, descending=True).values
    tokens = sum(1 + float(gains[b, : n - 1].sum()) for b, n in enumerate(nodes))
    return tokens / float(cost[sum(nodes)])


def best_worth(scores: Tensor, cost: Tensor) -> float:
    """The same, maximised over every number of nodes of every request."""
    requests, count = scores.shape
    choices = itertools.product(range(1, count + 2), repeat=requests)
    return max(worth(scores, nodes, cost) for nodes in choices if sum(nodes) < len(cost))


@every_curve
@pytest.mark.parametrize(("requests", "count"), ((1, 9), (2, 6), (3, 4), (4, 2)))
def test_no_choice_is_better(curve: str, requests: int, count: int) -> None:
    scores, cost = random_scores(requests, count, seed=count), costs(curve)
    found = tree_budget(scores, cost)
    assert worth(scores, tuple(found.tolist()), cost) == pytest.approx(best_worth(scores, cost), rel=1e-12)


def test_no_choice_is_better_with_experts() -> None:
    scores, cost = random_scores(3, 4), costs("linear")
    whole = cost + 0.3 * expected_experts(torch.arange(len(cost)), 8, 2)
    found = tree_budget(scores, cost, num_experts=8, topk_experts=2, expert_cost=0.3)
    assert worth(scores, tuple(found.tolist()), whole) == pytest.approx(best_worth(scores, whole), rel=1e-12)
    assert torch.equal(found, tree_budget(scores, whole))


@pytest.mark.parametrize("unit", (1e-9, 1 / 3, 1e9))
def test_the_unit_of_cost_does_not_matter(unit: float) -> None:
    scores, cost = random_scores(3, 12), costs("convex")
    assert torch.equal(tree_budget(scores, cost * unit), tree_budget(scores, cost))
    assert torch.equal(tree_budget(scores, cost.float()), tree_budget(scores, cost))


def test_tokens_that_cost_nothing_are_all_taken() -> None:
    assert tree_budget(random_scores(3, 7), costs("flat")).tolist() == [8, 8, 8]


def test_tokens_that_cost_as_much_as_a_pass_are_not_taken() -> None:
    cost = torch.arange(41).double()
    assert tree_budget(random_scores(2, 7) - 0.01, cost).tolist() == [1, 1]


def test_the_table_ends_the_choice() -> None:
    assert tree_budget(random_scores(1, 30), torch.ones(9)).tolist() == [8]
    assert tree_budget(random_scores(5, 30), torch.ones(6)).tolist() == [1] * 5


# -- monotone ---------------------------------------------------------------------------------------------------------
PRICES = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0, 1000.0)


def falls(nodes: list[int]) -> bool:
    return all(a >= b for a, b in itertools.pairwise(nodes))


def test_dearer_tokens_give_smaller_trees() -> None:
    scores = random_scores(2, 20)
    nodes = [int(tree_budget(scores, 1 + price * torch.arange(80.0)).sum()) for price in PRICES]
    assert nodes[0] == 42 and nodes[-1] == 2 and len(set(nodes)) > 4 and falls(nodes)


def with_experts(price: float, **experts: int) -> int:
    """Nodes of a batch by the price of one expert; a pass costs 1 and a token 0.07 besides."""
    return int(tree_budget(random_scores(2, 20), costs("linear"), **experts, expert_cost=price).sum())


def test_experts_that_no_two_tokens_share_are_a_price_of_tokens() -> None:
    nodes = [with_experts(price, num_experts=10**6, topk_experts=1) for price in PRICES]
    assert nodes[-1] == 2 and len(set(nodes)) > 3 and falls(nodes)


def test_experts_that_all_tokens_share_are_a_price_of_the_pass() -> None:
    nodes = [with_experts(price, num_experts=4, topk_experts=4) for price in PRICES]
    assert nodes[-1] == 40 and len(set(nodes)) > 3 and falls(nodes[::-1])


def test_a_better_draft_gives_larger_trees() -> None:
    scores = random_scores(1, 20)
    nodes = [int(tree_budget(scores * factor, costs("linear"))) for factor in (0.1, 0.5, 1.0, 2.0, 8.0)]
    assert len(set(nodes)) > 2 and falls(nodes)


# -- experts ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("experts", "chosen", "tokens"), ((8, 2, 1), (8, 2, 5), (32, 4, 9), (6, 6, 3), (128, 8, 16)))
def test_expected_experts_are_those_of_a_simulation(experts: int, chosen: int, tokens: int) -> None:
    runs = 4000
    routed = torch.rand(runs, tokens, experts).topk(chosen, dim=-1).indices.flatten(1)
    read = torch.zeros(runs, experts).scatter_(1, routed, 1.0).sum(1).double()
    error = 5 * float(read.std()) / math.sqrt(runs) + 1e-9
    assert float(read.mean()) == pytest.approx(
        float(expected_experts(torch.tensor(tokens), experts, chosen)), abs=error
    )


# -- batches ----------------------------------------------------------------------------------------------------------
def test_requests_share_one_table() -> None:
    """The pass holds 8 tokens at one price: the likeliest candidates of the whole batch get the places."""
    cost = torch.where(torch.arange(40) > 8, 100.0, 1.0)
    scores = torch.tensor([[-0.1, -0.2, -0.3, -2.0], [-1.0, -1.1, -3.0, -4.0], [-5.0, -6.0, -7.0, -8.0]])
    assert tree_budget(scores, cost).tolist() == [4, 3, 1]
    assert tree_budget(scores[:1], cost).tolist() == [5]
    assert tree_budget(scores.flip(0), cost).tolist() == [1, 3, 4]


def test_a_fuller_batch_leaves_less_for_each_request() -> None:
    cost, one = costs("steps", 400), random_scores(1, 20)
    nodes = [int(tree_budget(one.expand(requests, -1), cost)[0]) for requests in (1, 2, 4, 8, 16)]
    assert falls(nodes) and nodes[0] > nodes[-1]


def test_equal_candidates_go_to_the_first_request() -> None:
    cost = torch.where(torch.arange(40) > 5, 100.0, 1.0)
    assert tree_budget(torch.full((3, 4), -1.0), cost).tolist() == [3, 1, 1]


@pytest.mark.parametrize(("requests", "count"), ((0, 5), (0, 0), (3, 0)))
def test_nothing_to_choose_from(requests: int, count: int) -> None:
    assert tree_budget(torch.zeros(requests, count), costs("flat")).tolist() == [1] * requests


@pytest.mark.parametrize("worthless", (float("nan"), -float("inf"), -1e30))
def test_impossible_candidates_are_not_taken(worthless: float) -> None:
    scores = torch.tensor([[-0.1, worthless, -0.2], [worthless, worthless, -0.3]])
    assert tree_budget(scores, costs("linear")).tolist() == [3, 2]


# -- trees ------------------------------------------------------------------------------------------------------------
def drafted(requests: int, k: int, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, tokens and parent list of a draft whose logits are random."""
    scores, tokens, parents = [], [], [torch.full((requests, 1), -1)]
    frontier = torch.zeros(requests, 1)
    for step in range(steps):
        drafts = draft_topk(torch.randn(requests, frontier.shape[1], 50) * 4, frontier, k=k, step=step)
        scores.append(drafts.cum_scores.flatten(1))
        tokens.append(drafts.tokens.flatten(1))
        parents.append(drafts.parents)
        frontier = drafts.next_scores
    return torch.cat(scores, 1), torch.cat(tokens, 1), torch.cat(parents[:-1], 1)


def tree_of(budget: Tensor, k: int, draft: tuple[Tensor, Tensor, Tensor], num_nodes: int) -> Tree:
    ids = torch.arange(len(budget))
    return tree_finalize(*draft, ids, ids, topk=k, num_nodes=num_nodes, budget=budget)


@every_curve
@pytest.mark.parametrize(("k", "steps"), ((1, 6), (3, 4), (5, 3)))
def test_every_node_that_the_budget_keeps_has_its_ancestors(curve: str, k: int, steps: int) -> None:
    requests, draft = 4, drafted(4, k, steps)
    budget = tree_budget(draft[0], costs(curve, 60))
    num_nodes = int(budget.max())
    tree = tree_of(budget, k, draft, num_nodes)
    kept = torch.arange(num_nodes) < budget[:, None]
    assert torch.equal(tree.parents >= 0, kept & (torch.arange(num_nodes) > 0))
    assert torch.equal(tree.candidates >= 0, kept)
    assert torch.equal(tree.selected >= 0, kept[:, 1:])
    whole = tree_of(torch.full((requests,), num_nodes), k, draft, num_nodes)
    best = draft[0].sort(dim=1, descending=True, stable=True).indices
    for b in range(requests):
        n = int(budget[b])
        assert set(tree.selected[b, : n - 1].tolist()) == set(best[b, : n - 1].tolist())
        assert set(tree.selected[b, : n - 1].tolist()) <= set(whole.selected[b].tolist())


def test_a_budget_beyond_the_tree_is_the_whole_tree() -> None:
    draft = drafted(2, 3, 3)
    budget = tree_budget(draft[0], costs("flat", 100))
    assert budget.tolist() == [22, 22]
    found, whole = tree_of(budget, 3, draft, 9), tree_of(torch.tensor([9, 9]), 3, draft, 9)
    assert all(map(torch.equal, found, whole))
