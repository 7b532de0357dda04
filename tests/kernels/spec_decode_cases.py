"""What the tests of the spec_decode family share: small trees, a second writing of a row's law, verifiers to judge."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import torch
from torch import Tensor

from m3kernels.spec_decode import tree_verify
from m3kernels.spec_decode.exact_law import Law, Verifier, target_law
from m3kernels.spec_decode.reference import links, make_inputs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """Parameters of one request."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def tensors(self, requests: int) -> dict[str, Tensor]:
        """As arguments of tree_verify, repeated for every request."""
        return {
            "temperature": torch.full((requests,), self.temperature),
            "top_k": torch.full((requests,), self.top_k, dtype=torch.int32),
            "top_p": torch.full((requests,), self.top_p),
            "min_p": torch.full((requests,), self.min_p),
        }


SAMPLINGS = {
    "plain": Sampling(),
    "warm": Sampling(temperature=1.7),
    "cold": Sampling(temperature=0.3),
    "top-k": Sampling(top_k=3),
    "top-p": Sampling(top_p=0.8),
    "min-p": Sampling(min_p=0.1),
    "all": Sampling(temperature=0.7, top_k=6, top_p=0.9, min_p=0.02),
}


def law_of_row(logits: list[float], sampling: Sampling) -> list[float]:
    """The law of one row, written a second time: sort, cut, cut, cut, normalise. Tokens that tie at a cut all stay."""
    top = max(logits)
    weights = [math.exp((z - top) / sampling.temperature) if z > -math.inf else 0.0 for z in logits]
    ranked = sorted(weights, reverse=True)
    if 0 < sampling.top_k < len(weights):
        weights = [w if w >= ranked[sampling.top_k - 1] else 0.0 for w in weights]
    if sampling.top_p < 1:
        total = math.fsum(weights)
        before = {w: math.fsum(other for other in weights if other > w) for w in set(weights)}
        weights = [w if before[w] < float(torch.tensor(sampling.top_p)) * total else 0.0 for w in weights]
    weights = [w if w >= float(torch.tensor(sampling.min_p)) * max(weights) else 0.0 for w in weights]
    total = math.fsum(weights)
    return [w / total for w in weights]


def laws_of_rows(logits: Tensor, sampling: Sampling) -> Tensor:
    """(N, V) fp64 from logits (N, V)."""
    return torch.tensor([law_of_row(row, sampling) for row in logits.double().tolist()], dtype=torch.float64)


@dataclasses.dataclass(frozen=True)
class SmallTree:
    """One tree with the logits of its nodes."""

    logits: Tensor  # (N, V)
    candidates: Tensor  # (N,)
    next_token: Tensor
    next_sibling: Tensor

    @property
    def shape(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.candidates, self.next_token, self.next_sibling

    def target(self, sampling: Sampling) -> Law:
        return target_law(laws_of_rows(self.logits, sampling), *self.shape)

    def verifier(self, mode: str, sampling: Sampling, **options: Any) -> Verifier:
        """tree_verify on this tree, as a function of its coins."""

        def run(coins: Tensor, final_coins: Tensor) -> Tensor:
            count = len(coins)
            given = [value.expand(count, *value.shape) for value in (self.logits, *self.shape)]
            more = {name: value.expand(count, *value.shape) for name, value in options.items()}
            drawn = {"coins": coins, "final_coins": final_coins}
            return tree_verify(*given, mode=mode, **sampling.tensors(count), **drawn, **more).tokens

        return run


def random_tree(seed: int, *, nodes: int = 8, vocabulary: int = 16, depth: int = 3) -> SmallTree:
    """A random tree; odd seeds have logits with many ties, every third seed tokens (and drafts) of probability 0."""
    x = make_inputs(1, nodes, vocabulary, depth=depth, sharpness=1.5, seed=seed)
    logits = x["logits"][0]
    if seed % 2:
        logits = logits.round()
    if seed % 3 == 0:
        generator = torch.Generator().manual_seed(seed)
        logits = logits.masked_fill(torch.rand(logits.shape, generator=generator) < 0.4, -torch.inf)
        logits[:, seed % vocabulary] = 0.0
    return SmallTree(logits, *(x[name][0] for name in ("candidates", "next_token", "next_sibling")))


def star(probs: list[float], tokens: list[int]) -> SmallTree:
    """A root whose children are the given tokens; every row has the law ``probs``."""
    nodes = len(tokens) + 1
    parents = torch.tensor([[-1, *[0] * len(tokens)]], dtype=torch.int32)
    _, _, next_token, next_sibling = links(parents)
    candidates = torch.tensor([0, *tokens])
    return SmallTree(torch.tensor(probs).log().expand(nodes, -1), candidates, next_token[0], next_sibling[0])


def chains(
    vocabulary: int, drafts: int, seed: int
) -> tuple[dict[tuple[int, ...], Tensor], dict[tuple[int, ...], Tensor]]:
    """(target logits, draft law) for every prefix of at most ``drafts`` tokens: a language model and its draft."""
    generator = torch.Generator().manual_seed(seed)
    prefixes = [
        prefix for length in range(drafts + 1) for prefix in itertools.product(range(vocabulary), repeat=length)
    ]
    target = {prefix: torch.randn(vocabulary, generator=generator) * 2 for prefix in prefixes}
    draft = {prefix: torch.rand(vocabulary, generator=generator).square() for prefix in prefixes}
    for row in draft.values():
        row[torch.randint(vocabulary, (1,), generator=generator)] = 0.0
        row /= row.sum()
    return target, draft


def completed(law: Law, rows: dict[tuple[int, ...], list[float]], length: int) -> Law:
    """The law of the first ``length`` tokens if plain sampling goes on where the emitted tokens end."""
    done: Law = {}
    todo = list(law.items())
    while todo:
        tokens, mass = todo.pop()
        if len(tokens) >= length:
            done[tokens[:length]] = done.get(tokens[:length], 0.0) + mass
        else:
            todo += [((*tokens, v), mass * p) for v, p in enumerate(rows[tokens]) if p > 0]
    return done
