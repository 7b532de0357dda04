"""Inputs of the drop-in set: candidates as a draft model makes them, random trees and chains with laws and coins.

Probabilities and coins are multiples of a power of two, so that every sum is exact in fp32 in any order: boundaries of
the cumulative mass are hit exactly, and results must be equal, not close.
"""

from __future__ import annotations

import random
from typing import Any, NamedTuple

import torch
from torch import Tensor

from m3kernels import spec_decode
from m3kernels.testing import bitwise_equal

GARBAGE = -77  # what the caller's buffers hold before a call
LARGEST = 1 - 2.0**-24  # fp32 below 1
GRAIN = 256  # probabilities and coins are multiples of 1 / GRAIN


# -- building ---------------------------------------------------------------------------------------------------------
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
    "1024": (1, 20, 7, 1024),
}
MODES = {"full": 0, "queries": 1, "packed": 2}


def buffers(chosen: Selection, mode: int) -> dict[str, Tensor]:
    """Outputs of a build, as a caller prepares them."""
    requests, nodes = len(chosen.parent_list), chosen.nodes
    if mode == 2:
        width = 1 if nodes <= 8 else 2 if nodes <= 16 else -(-nodes // 32) * 4
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
