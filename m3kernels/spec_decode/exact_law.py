"""The oracle of losslessness: the law of what a verifier emits, integrated exactly over its coins. No sampling.

A verifier that takes its coins as inputs is a step function of each of them. So the interval of a coin in which a child
is accepted, or a token emitted, can be found by bisection, and the probability of a sequence of tokens is the product
of the lengths of the intervals that lead to it. ``exact_law`` does this with any verifier, as a black box;
``target_law`` says what it must give: the law of plain sampling, cut where the tree ends.

    total_variation(exact_law(...), target_law(...)) <= (number of breakpoints) * resolution     iff lossless
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Law = dict[tuple[int, ...], float]  # emitted tokens -> probability
# (R, N) coins and (R,) final coins, fp64 -> (R, S) emitted tokens, -1 after the last: R runs of one request
Verifier = Callable[[Tensor, Tensor], Tensor]


def total_variation(a: Law, b: Law) -> float:
    """Half the sum of absolute differences: 0 for equal laws, 1 for disjoint ones."""
    return sum(abs(a.get(tokens, 0.0) - b.get(tokens, 0.0)) for tokens in a.keys() | b.keys()) / 2


def children_of(node: int, next_token: Sequence[int], next_sibling: Sequence[int]) -> list[int]:
    """Children of a node, elder siblings first."""
    found, child = [], next_token[node]
    while child >= 0:
        found.append(child)
        child = next_sibling[child]
    return found


def target_law(
    probs: Tensor, candidates: Tensor, next_token: Tensor, next_sibling: Tensor, width: int | None = None
) -> Law:
    """What a lossless verification of one tree emits: samples of the target until one is not in the tree.

    Args:
        probs: (N, V) the target's law after each node. candidates, next_token, next_sibling: (N,).
        width: at most width - 1 drafts are accepted; default N.
    Returns: emitted tokens -> probability; sequences of probability 0 are left out.
    """
    law: Law = {}
    links = next_token.tolist(), next_sibling.tolist()
    most = len(candidates) if width is None else width

    def descend(node: int, emitted: tuple[int, ...], mass: float) -> None:
        following: dict[int, int] = {}
        if len(emitted) + 1 < most:
            for child in children_of(node, *links):
                following.setdefault(int(candidates[child]), child)
        for token, p in enumerate(probs[node].double().tolist()):
            if p <= 0:
                continue
            if token in following:
                descend(following[token], (*emitted, token), mass * p)
            else:
                law[(*emitted, token)] = law.get((*emitted, token), 0.0) + mass * p

    descend(0, (), 1.0)
    return law


def exact_law(
    verify: Verifier,
    candidates: Tensor,
    next_token: Tensor,
    next_sibling: Tensor,
    *,
    resolution: float = 2.0**-40,
    coin_of: str = "node",
) -> Law:
    """The law of what ``verify`` emits for one tree.

    Args:
        verify: runs the verifier with given coins, many times in one call.
        candidates, next_token, next_sibling: (N,) of the tree.
        resolution: width to which breakpoints are found; 2**-23 for a verifier whose coins are fp32.
        coin_of: "node": coins[i] decides which child of node i is accepted; "child": coins[i] whether node i is.
    Returns: emitted tokens -> probability.
    Raises:
        ValueError: coin_of is neither; or a decision that was taken changes with a later coin, so that the verifier is
        not a walk.
    """
    if coin_of not in ("node", "child"):
        raise ValueError(f"exact_law: coin_of: want 'node' or 'child'; got {coin_of!r}")
    nodes = len(candidates)
    links = next_token.tolist(), next_sibling.tolist()
    law: Law = {}

    def outcomes(coins: Tensor, index: int, values: list[float]) -> list[tuple[int, ...]]:
        """Emitted tokens as one coin (index N: the final one) takes the given values."""
        rows = coins.repeat(len(values), 1)
        rows[:, index] = torch.tensor(values, dtype=torch.float64)
        emitted = verify(rows[:, :nodes], rows[:, nodes])
        return [tuple(token for token in row if token != -1) for row in emitted.tolist()]

    def steps(coins: Tensor, index: int, label: Callable[[tuple[int, ...]], int]) -> list[tuple[int, float, float]]:
        """(label, low, high) of the intervals of one coin, ascending."""
        last = 1.0 - resolution
        grid = [i / 16 for i in range(16)] + [last]
        probes = list(zip(grid, map(label, outcomes(coins, index, grid)), strict=True))
        while True:
            pairs = list(itertools.pairwise(probes))
            middles = [(a[0] + b[0]) / 2 for a, b in pairs if a[1] != b[1] and b[0] - a[0] > resolution]
            if not middles:
                break
            probes += zip(middles, map(label, outcomes(coins, index, middles)), strict=True)
            probes.sort()
            probes = _ends_of_runs(probes)
        found: list[tuple[int, float, float]] = []
        for value, name in probes:
            if found and found[-1][0] == name:
                found[-1] = (name, found[-1][1], value)
            else:
                found.append((name, value, value))
        bounds = [0.0, *((a[2] + b[1]) / 2 for a, b in itertools.pairwise(found)), 1.0]
        return [(name, low, high) for (name, _, _), low, high in zip(found, bounds[:-1], bounds[1:], strict=True)]

    def descend(node: int, depth: int, coins: Tensor, mass: float) -> None:
        children = children_of(node, *links)
        by_token = {int(candidates[child]): child for child in reversed(children)}

        def followed(emitted: tuple[int, ...]) -> int:
            return by_token.get(emitted[depth], -1) if len(emitted) > depth + 1 else -1

        rest = [(coins, mass)]
        for index in [node] if coin_of == "node" else children:
            undecided = []
            for state, weight in rest:
                for child, low, high in steps(state, index, followed):
                    inside = state.clone()
                    inside[index] = (low + high) / 2
                    if child >= 0 and (coin_of == "node" or child == index):
                        descend(child, depth + 1, inside, weight * (high - low))
                    else:
                        undecided.append((inside, weight * (high - low)))
            rest = undecided
        for state, weight in rest:
            for token, low, high in steps(state, nodes, lambda emitted: emitted[depth] if emitted else -1):
                inside = state.clone()
                inside[nodes] = (low + high) / 2
                emitted = outcomes(inside, nodes, [float(inside[nodes])])[0]
                if len(emitted) > depth + 1 or (emitted[depth] if emitted else -1) != token:
                    raise ValueError(
                        f"exact_law: verify: want a walk; got {emitted} after a rejection at depth {depth}"
                    )
                law[emitted] = law.get(emitted, 0.0) + weight * (high - low)

    descend(0, 0, torch.full((nodes + 1,), 0.5, dtype=torch.float64), 1.0)
    return law


def _ends_of_runs(probes: list[tuple[float, int]]) -> list[tuple[float, int]]:
    """Sorted probes without those inside a run of one label."""
    return [
        probe
        for i, probe in enumerate(probes)
        if i in (0, len(probes) - 1) or not probes[i - 1][1] == probe[1] == probes[i + 1][1]
    ]
