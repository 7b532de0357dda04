"""tree_finalize and tree_commit in the reference and the native room, against their definition told in plain Python."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from native_tiles import set_threads
from torch import Tensor

from m3kernels.spec_decode import Tree, tree_commit, tree_finalize
from m3kernels.testing import bitwise_equal

ROOMS = ("reference", "cpu")
every_room = pytest.mark.parametrize("backend", ROOMS, indirect=True)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    yield from set_threads()


# -- tree_finalize ----------------------------------------------------------------------------------------------------
def drafts(
    seed: int, requests: int, topk: int, steps: int, *, falling: bool = True, values: int = 0, bad: float = 0.0
) -> dict[str, Tensor]:
    """Candidates of all steps, as draft_topk leaves them.

    Scores fall along a path, or are anything; from few values if ``values`` says how many; a part ``bad`` is no number.
    """
    rng = random.Random(seed)

    def score() -> float:
        return -rng.randrange(1, values + 1) / 4 if values else -rng.random()

    scores, lists = [], []
    for _ in range(requests):
        found = sorted((score() for _ in range(topk)), reverse=True)
        row, frontier = [-1, *range(topk)], list(found)
        for step in range(1, steps):
            grown = [(parent if falling else 0) + score() for parent in frontier for _ in range(topk)]
            best = sorted(range(len(grown)), key=lambda i: (-grown[i], i))[:topk]
            row += [len(found) + i for i in best] if step + 1 < steps else []
            found, frontier = found + grown, [grown[i] for i in best]
        scores.append([rng.choice([math.nan, -math.inf]) if rng.random() < bad else value for value in found])
        lists.append(row if steps > 1 else [])
    count = len(scores[0])
    return {
        "scores": torch.tensor(scores),
        "tokens": torch.tensor([[rng.randrange(1000) for _ in range(count)] for _ in range(requests)]),
        "parent_list": torch.tensor(lists, dtype=torch.int64).view(requests, -1),
        "bonus": torch.tensor([rng.randrange(1000) for _ in range(requests)]),
        "seq_lens": torch.tensor([rng.randrange(50) for _ in range(requests)]),
    }


def lineage(candidate: int, selected: list[int], parent_list: list[int], topk: int) -> list[int]:
    """This candidate, the one over it, and so on to a child of the root; empty if one of them was not selected."""
    found: list[int] = []
    while candidate in selected:
        found.append(candidate)
        if candidate < topk:
            return found
        candidate = parent_list[candidate // topk]
    return []


def expected(case: dict[str, Tensor], topk: int, num_nodes: int, budget: list[int] | None) -> dict[str, list[Any]]:
    """The definition: every node is a candidate; its ancestors are found by following parents, one by one."""
    out: dict[str, list[Any]] = {name: [] for name in Tree._fields}
    for b, scores in enumerate(case["scores"].tolist()):
        kept = num_nodes if budget is None else max(1, min(budget[b], num_nodes))
        rank = sorted(range(len(scores)), key=lambda i: (math.inf if math.isnan(scores[i]) else -scores[i], i))
        selected = sorted(rank[: kept - 1])
        paths = [[], *(lineage(s, selected, case["parent_list"][b].tolist(), topk) for s in selected)]
        paths += [[] for _ in range(num_nodes - len(paths))]
        place = {path[0]: node for node, path in enumerate(paths) if path}
        above = [[place[candidate] for candidate in path[1:]] + [0] * bool(path) for path in paths]
        parents = [row[0] if row else -1 for row in above]
        children = [[i for i in range(num_nodes) if parents[i] == node] for node in range(num_nodes)]
        follower = {elder: younger for row in children for elder, younger in itertools.pairwise(row)}
        words = -(-num_nodes // 32)
        seen = [{node, *row} for node, row in enumerate(above)]
        bits = [[sum(1 << j % 32 for j in row if j // 32 == w) for w in range(words)] for row in seen]
        tokens, length = case["tokens"][b].tolist(), int(case["seq_lens"][b])
        out["candidates"].append([int(case["bonus"][b]), *(tokens[path[0]] if path else -1 for path in paths[1:])])
        out["parents"].append(parents)
        out["mask_bits"].append([[w - 2**32 if w >= 2**31 else w for w in row] for row in bits])
        out["positions"].append([length + len(path) for path in paths])
        out["next_token"].append([row[0] if row else -1 for row in children])
        out["next_sibling"].append([follower.get(i, -1) for i in range(num_nodes)])
        out["selected"].append(selected + [-1] * (num_nodes - 1 - len(selected)))
    return out


DTYPES = {"parents": torch.int32, "mask_bits": torch.int32}


def check_tree(tree: Tree, wanted: dict[str, list[Any]]) -> None:
    assert {name: value.tolist() for name, value in tree._asdict().items()} == wanted
    assert [value.dtype for value in tree] == [DTYPES.get(name, torch.int64) for name in Tree._fields]


TREES: dict[str, dict[str, Any]] = {
    "root_alone": dict(topk=4, steps=3, num_nodes=1),
    "one_candidate": dict(topk=1, steps=1, num_nodes=2),
    "one_step": dict(topk=5, steps=1, num_nodes=4),
    "chain": dict(topk=1, steps=6, num_nodes=7),
    "pairs": dict(topk=2, steps=4, num_nodes=9),
    "eight": dict(topk=8, steps=5, num_nodes=32),
    "ten": dict(topk=10, steps=6, num_nodes=60),
    "a_word_and_one": dict(topk=4, steps=5, num_nodes=33),
    "more_nodes_than_candidates": dict(topk=2, steps=2, num_nodes=11),
    "ties": dict(topk=4, steps=4, num_nodes=17, values=2),
    "ties_everywhere": dict(topk=3, steps=4, num_nodes=14, values=1, falling=False),
    "rising_scores": dict(topk=4, steps=4, num_nodes=20, falling=False),
    "nan_and_infinite_scores": dict(topk=4, steps=4, num_nodes=24, bad=0.5),
    "nothing_but_nan": dict(topk=3, steps=3, num_nodes=8, bad=1.0),
    "budgets": dict(topk=4, steps=4, num_nodes=16, budget=[1, 2, 9, 16, -5, 99]),
    "budgets_and_rising_scores": dict(topk=3, steps=5, num_nodes=16, falling=False, budget=[3, 16, 0, 5, 8, 12]),
}
NO_DRAFT = ("num_nodes", "budget")


@every_room
@pytest.mark.parametrize("case", TREES)
def test_tree_is_that_of_the_definition(backend: str, case: str) -> None:
    options = TREES[case]
    given = drafts(1, 6, **{name: value for name, value in options.items() if name not in NO_DRAFT})
    budget = options.get("budget")
    topk, num_nodes = options["topk"], options["num_nodes"]
    tree = tree_finalize(
        **given, topk=topk, num_nodes=num_nodes, budget=None if budget is None else torch.tensor(budget)
    )
    check_tree(tree, expected(given, topk, num_nodes, budget))


@every_room
def test_tree_of_1024_nodes(backend: str) -> None:
    given = drafts(2, 1, topk=33, steps=3)
    tree = tree_finalize(**given, topk=33, num_nodes=1024)
    check_tree(tree, expected(given, 33, 1024, None))


@every_room
def test_no_requests(backend: str) -> None:
    given = {name: value[:0] for name, value in drafts(3, 1, topk=3, steps=2).items()}
    assert [tuple(value.shape) for value in tree_finalize(**given, topk=3, num_nodes=5)] == [
        *((0, 5), (0, 5), (0, 5, 1)),
        *((0, 5), (0, 5), (0, 5), (0, 4)),
    ]


@every_room
def test_no_candidates(backend: str) -> None:
    empty = torch.empty(2, 0, dtype=torch.int64)
    root = torch.tensor([7, 9])
    tree = tree_finalize(empty.float(), empty, empty, root, root * 2, topk=3, num_nodes=3)
    wanted = expected(
        {"scores": empty, "tokens": empty, "parent_list": empty, "bonus": root, "seq_lens": root * 2}, 3, 3, None
    )
    check_tree(tree, wanted)


@every_room
def test_zeros_of_either_sign_tie(backend: str) -> None:
    scores = torch.tensor([[-0.0, 0.0, -0.0, 0.0]])
    tokens = torch.tensor([[4, 5, 6, 7]])
    tree = tree_finalize(
        scores, tokens, torch.empty(1, 0, dtype=torch.int64), torch.tensor([3]), torch.tensor([0]), topk=4, num_nodes=3
    )
    assert tree.candidates.tolist() == [[3, 4, 5]]


@every_room
@pytest.mark.parametrize("column", (5, -1, 2**40), ids=("later", "none", "nowhere"))
def test_a_parent_that_cannot_be_leaves_padding(backend: str, column: int) -> None:
    """Candidate 2 hangs under candidate parent_list[1]: one that comes after it, none, or one that does not exist."""
    tree = tree_finalize(
        torch.zeros(1, 6),
        torch.arange(10, 16)[None],
        torch.tensor([[-1, column, 1]]),
        torch.tensor([1]),
        torch.tensor([20]),
        topk=2,
        num_nodes=7,
    )
    assert tree.parents.tolist() == [[-1, 0, 0, -1, -1, 2, 2]]
    assert tree.candidates.tolist() == [[1, 10, 11, -1, -1, 14, 15]]
    assert tree.positions.tolist() == [[20, 21, 21, 20, 20, 22, 22]]
    assert tree.mask_bits.flatten().tolist() == [0b1, 0b11, 0b101, 0b1000, 0b10000, 0b100101, 0b1000101]


@every_room
def test_candidates_beyond_the_list_of_parents_are_padding(backend: str) -> None:
    given = drafts(4, 2, topk=2, steps=3)
    given["parent_list"] = given["parent_list"][:, :2].clone()
    tree = tree_finalize(**given, topk=2, num_nodes=11)
    late = tree.selected // 2 >= 2
    assert bool(late.any())
    assert (tree.parents[:, 1:][late] == -1).all()


def test_a_request_does_not_depend_on_its_neighbours_or_threads(threads: Callable[[int], None]) -> None:
    given = drafts(5, 40, topk=8, steps=5)
    threads(1)
    alone = [
        tree_finalize(**{name: value[b : b + 1] for name, value in given.items()}, topk=8, num_nodes=64)
        for b in range(40)
    ]
    threads(3)
    together = tree_finalize(**given, topk=8, num_nodes=64)
    rows = [torch.cat(parts) for parts in zip(*alone, strict=True)]
    assert [bitwise_equal(a, b) for a, b in zip(rows, together, strict=True)] == [True] * len(rows)


# -- tree_commit ------------------------------------------------------------------------------------------------------
PAGES: dict[str, dict[str, Any]] = {
    "page_1": dict(page_size=1, prefixes=[0, 3, 11], lengths=[2, 0, 3]),
    "page_3": dict(page_size=3, prefixes=[2, 0, 7], lengths=[3, 1, 2]),
    "page_16": dict(page_size=16, prefixes=[15, 16, 31], lengths=[3, 2, 0]),
    "page_64": dict(page_size=64, prefixes=[60, 1, 63], lengths=[3, 3, 3]),
    "nothing_accepted": dict(page_size=4, prefixes=[5, 1, 8], lengths=[0, 0, 0]),
    "one_request": dict(page_size=4, prefixes=[6], lengths=[2]),
}
NODES, WIDTH = 9, 4


class Commit:
    """A paged cache of random keys and values, with accepted paths, and what plain decoding would have left in it."""

    def __init__(
        self, page_size: int, prefixes: list[int], lengths: list[int], layers: int, dtype: torch.dtype
    ) -> None:
        generator = torch.Generator().manual_seed(page_size)
        requests, per_request = len(prefixes), -(-(max(prefixes) + NODES) // page_size)
        pages = requests * per_request + 2
        self.block_table = torch.randperm(pages, generator=generator)[: requests * per_request].view(requests, -1).int()
        self.caches = [torch.randn(pages, page_size, 2, 3, generator=generator).to(dtype) for _ in range(2 * layers)]
        self.cache_seqlens = torch.tensor(prefixes, dtype=torch.int32)
        self.accept_length = torch.tensor(lengths, dtype=torch.int32)
        paths = [sorted(torch.randperm(NODES - 1, generator=generator)[:length].tolist()) for length in lengths]
        self.paths = [[0, *(node + 1 for node in path)] for path in paths]
        rows = [path + [-1] * (WIDTH - len(path)) for path in self.paths]
        self.accept_index = torch.tensor(rows, dtype=torch.int32)

    def slot(self, b: int, position: int) -> tuple[int, int]:
        page_size = self.caches[0].shape[1]
        return int(self.block_table[b, position // page_size]), position % page_size

    def wanted(self) -> list[Tensor]:
        moved = [cache.clone() for cache in self.caches]
        for new, old in zip(moved, self.caches, strict=True):
            for b, path in enumerate(self.paths):
                prefix = int(self.cache_seqlens[b])
                for j, node in enumerate(path):
                    new[self.slot(b, prefix + j)] = old[self.slot(b, prefix + node)]
        return moved

    def run(self, caches: list[Tensor], hidden: Tensor | None = None) -> Any:
        half = len(caches) // 2
        given = (self.accept_index, self.accept_length, caches[:half], caches[half:])
        return tree_commit(*given, self.block_table, self.cache_seqlens, hidden)


@every_room
@pytest.mark.parametrize("case", PAGES)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_commit_leaves_what_plain_decoding_would(backend: str, case: str, dtype: torch.dtype) -> None:
    commit = Commit(**PAGES[case], layers=3, dtype=dtype)
    wanted = commit.wanted()
    hidden = torch.randn(len(commit.paths), NODES, 5).to(dtype)
    committed = commit.run(commit.caches, hidden)
    assert [bitwise_equal(a, b) for a, b in zip(commit.caches, wanted, strict=True)] == [True] * 6
    lengths = commit.cache_seqlens + commit.accept_length + 1
    assert bitwise_equal(committed.cache_seqlens, lengths)
    rows = [
        torch.cat([row[path], row.new_zeros(WIDTH - len(path), 5)])
        for row, path in zip(hidden, commit.paths, strict=True)
    ]
    assert bitwise_equal(committed.hidden, torch.stack(rows))


@every_room
def test_commit_takes_strided_caches(backend: str) -> None:
    commit = Commit(**PAGES["page_3"], layers=1, dtype=torch.float16)
    wanted = commit.wanted()
    wide = torch.full((2, *commit.caches[0].shape[:2], 5, 7), torch.nan, dtype=torch.float16)
    views = [part[:, :, 1:5:2, 2:5].copy_(cache) for part, cache in zip(wide, commit.caches, strict=True)]
    swapped = [cache.permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3) for cache in commit.caches]
    commit.run(views)
    commit.run(swapped)
    assert [torch.equal(a, b) for a, b in zip([*views, *swapped], wanted * 2, strict=True)] == [True] * 4
    assert int(wide.isnan().sum()) == wide.numel() - 2 * commit.caches[0].numel()


@every_room
def test_commit_without_caches_gathers_hidden_states(backend: str) -> None:
    commit = Commit(**PAGES["page_3"], layers=1, dtype=torch.float32)
    hidden = torch.randn(3, NODES, 2)
    committed = commit.run([], hidden)
    assert committed.hidden[0, :4].equal(hidden[0, commit.paths[0]])
    assert commit.run([]).hidden is None


@every_room
def test_commit_of_no_requests(backend: str) -> None:
    cache = torch.ones(2, 4, 1, 3)
    empty = torch.empty(0, dtype=torch.int32)
    table = torch.empty(0, 3, dtype=torch.int32)
    committed = tree_commit(torch.empty(0, 4, dtype=torch.int32), empty, [cache], [cache.clone()], table, empty)
    assert committed.cache_seqlens.shape == (0,)
    assert (cache == 1).all()


@every_room
def test_commit_never_needs_blocks_beyond_the_path(backend: str) -> None:
    commit = Commit(page_size=2, prefixes=[4], lengths=[2], layers=1, dtype=torch.float32)
    needed = {(4 + node) // 2 for node in (*commit.paths[0], *range(3))}
    wanted = commit.wanted()
    impossible = [column for column in range(commit.block_table.shape[1]) if column not in needed]
    assert impossible
    commit.block_table[0, impossible] = torch.tensor([-(2**31), 2**31 - 1] * 8, dtype=torch.int32)[: len(impossible)]
    commit.run(commit.caches)
    assert [bitwise_equal(a, b) for a, b in zip(commit.caches, wanted, strict=True)] == [True, True]


def test_commit_does_not_depend_on_threads(threads: Callable[[int], None]) -> None:
    results = []
    for count in (1, 3):
        commit = Commit(page_size=16, prefixes=[9, 30, 2, 17], lengths=[3, 2, 3, 1], layers=40, dtype=torch.float32)
        commit.caches = [cache.repeat(1, 1, 8, 16) for cache in commit.caches]
        wanted = commit.wanted()
        threads(count)
        commit.run(commit.caches)
        results += [bitwise_equal(a, b) for a, b in zip(commit.caches, wanted, strict=True)]
    assert results == [True] * 160
