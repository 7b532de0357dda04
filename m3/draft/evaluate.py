"""Acceptance length of a draft against the target's own greedy text: what an engine would see, without the engine.

The target's stored greedy continuation says which drafts it would accept. At each round every response drafts a tree
from its true prefix (draft keys made from the target's hidden states), the nodes that spell the continuation are
counted, and the text moves on by that many tokens and one more, the target's own. All responses go together.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from m3.draft.batches import Batch, make_batch
from m3.draft.hidden import StateCache
from m3.draft.store import Response
from m3.models.gated_eagle3 import GatedEagle3, KeyValue
from m3kernels.checks import refuse
from m3kernels.spec_decode import draft_topk, tree_finalize
from m3kernels.spec_decode.types import Drafts, Tree

Progress = Callable[[int, int], None]  # (tokens walked, in all)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """How trees are drafted: forward passes of the draft, nodes expanded at each, nodes kept with the root."""

    steps: int
    topk: int
    nodes: int

    def __str__(self) -> str:
        if self.topk == 1:
            return f"chain of {self.steps}"
        return f"tree ({self.steps}, {self.topk}, {self.nodes})"


CHAIN_3 = Shape(steps=3, topk=1, nodes=4)
TREE_8 = Shape(steps=4, topk=4, nodes=8)
SHAPES = (CHAIN_3, TREE_8, Shape(steps=5, topk=4, nodes=16), Shape(steps=5, topk=8, nodes=32))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Acceptance:
    """Rounds of drafting and the tokens that they gave, the target's own token of each round included."""

    shape: Shape
    rounds: int
    tokens: int
    by_response: tuple[tuple[int, int], ...]  # (rounds, tokens) of each

    @property
    def length(self) -> float:
        """Tokens a round."""
        return self.tokens / max(self.rounds, 1)


class Walk:
    """Greedy responses with the draft's keys for all of their positions: what every shape starts from."""

    def __init__(self, draft: GatedEagle3, responses: Sequence[Response], cache: StateCache) -> None:
        if not responses or any(one.temperature != 0 for one in responses):
            raise refuse("evaluate", "responses", "one or more, all of temperature 0", f"{len(responses)}")
        self.draft = draft
        batch: Batch = make_batch(responses, cache)
        device = draft.d2t.device
        self.texts = [one.prompt + one.response for one in responses]
        self.first = [len(one.prompt) for one in responses]  # the first root: what the prompt's last row gives
        tokens, aux = batch.tokens.to(device), batch.aux.to(device)
        length = tokens.shape[1]
        ahead = torch.nn.functional.pad(tokens[:, 1:], (0, 1))
        positions = torch.arange(1, length + 1, device=device)
        self.out, self.keys = draft.extend(draft.embed(ahead), draft.fuse(aux), positions)

    def tokens(self) -> int:
        """That a walk goes through: all of the responses but their first."""
        return sum(len(text) - 1 - first for text, first in zip(self.texts, self.first, strict=True))


@torch.no_grad()
def acceptance(walk: Walk, shape: Shape, progress: Progress = lambda done, total: None) -> Acceptance:
    """Walk all responses with trees of one shape."""
    device = walk.draft.d2t.device
    roots = list(walk.first)  # position of the last token that was emitted
    rounds, total = [0] * len(roots), walk.tokens()
    while True:
        live = [row for row, root in enumerate(roots) if root < len(walk.texts[row]) - 1]
        progress(sum(roots) - sum(walk.first), total)
        if not live:
            break
        at = torch.tensor([roots[row] for row in live], device=device)
        bonus = torch.tensor([walk.texts[row][roots[row]] for row in live], device=device)
        tree = draft_tree(walk, torch.tensor(live, device=device), at, bonus, shape)
        for row, accepted in zip(live, matched(tree, [walk.texts[row][roots[row] :] for row in live]), strict=True):
            roots[row] = min(roots[row] + accepted + 1, len(walk.texts[row]) - 1)
            rounds[row] += 1
    by_response = [(count, root - first) for count, root, first in zip(rounds, roots, walk.first, strict=True)]
    return Acceptance(shape=shape, rounds=sum(rounds), tokens=total, by_response=tuple(by_response))


@torch.no_grad()
def draft_tree(walk: Walk, rows: Tensor, at: Tensor, bonus: Tensor, shape: Shape) -> Tree:
    """Trees after the tokens ``bonus`` at positions ``at`` of the responses ``rows``."""
    draft, topk = walk.draft, shape.topk
    requests, longest = len(rows), int(at.max())
    out = walk.out[rows, at - 1][:, None]  # (B, 1, D): the input was the root and the hidden state before it
    cache: KeyValue = (walk.keys[0][rows, :, :longest], walk.keys[1][rows, :, :longest])
    seen = (torch.arange(longest, device=rows.device) < at[:, None])[:, None]  # (B, 1, S)
    ancestors = torch.zeros(requests, 1, 0, dtype=torch.bool, device=rows.device)  # (B, F, nodes run so far)
    scores = torch.zeros(requests, 1, device=rows.device)
    found: list[Drafts] = []
    for step in range(shape.steps):
        found.append(draft_topk(draft.logits(out).float(), scores, k=topk, step=step, d2t=draft.d2t))
        if step + 1 == shape.steps:
            break
        last = found[-1]
        source = last.src_row.long()
        hidden = draft.feedback(out).gather(1, source[..., None].expand(-1, -1, out.shape[-1]))
        own = torch.eye(topk, dtype=torch.bool, device=rows.device).expand(requests, -1, -1)
        ancestors = torch.cat((ancestors.gather(1, source[..., None].expand(-1, -1, ancestors.shape[-1])), own), dim=-1)
        mask = torch.cat((seen.expand(-1, topk, -1), ancestors), dim=-1)[:, None]
        positions = (at + step + 1)[:, None, None].expand(-1, 1, topk)
        out, cache = draft.extend(draft.embed(last.next_ids), hidden, positions, cache, mask)
        scores = last.next_scores
    parents = [torch.full((requests, 1), -1, device=rows.device), *(one.parents for one in found[:-1])]
    return tree_finalize(
        torch.cat([one.cum_scores.flatten(1) for one in found], 1),
        torch.cat([one.tokens.flatten(1) for one in found], 1),
        torch.cat(parents, 1),
        bonus,
        at,
        topk=topk,
        num_nodes=shape.nodes,
    )


def matched(tree: Tree, texts: Sequence[Sequence[int]]) -> list[int]:
    """How many tokens of each text, after its first, the tree of the same number spells from its root."""
    found = []
    lists = (one.tolist() for one in (tree.candidates, tree.next_token, tree.next_sibling))
    for candidates, next_token, next_sibling, text in zip(*lists, texts, strict=True):
        node, depth = 0, 0
        while depth + 1 < len(text):
            child = next_token[node]
            while child >= 0 and candidates[child] != text[depth + 1]:
                child = next_sibling[child]
            if child < 0:
                break
            node, depth = child, depth + 1
        found.append(depth)
    return found


@torch.no_grad()
def evaluate(
    draft: GatedEagle3,
    responses: Sequence[Response],
    cache: StateCache,
    shapes: Sequence[Shape] = SHAPES,
    progress: Progress = lambda done, total: None,
) -> list[Acceptance]:
    """Acceptance of every shape on greedy responses whose states are in the cache."""
    walk = Walk(draft, responses, cache)
    each = walk.tokens()
    found: list[Acceptance] = []
    for number, shape in enumerate(shapes):

        def tell(done: int, total: int, before: int = number * each) -> None:
            progress(before + done, each * len(shapes))

        found.append(acceptance(walk, shape, tell))
    return found
