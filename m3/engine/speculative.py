"""Drafting for requests that decode: a tree for each, from the draft model and the target's hidden states.

Row q of the draft's cache stands for token q + 1 and the hidden state of token q, at the slot of token q: the cache
uses the pages of the target's. Rows are computed from the target's hidden states ("extend") once both are known; a step
of drafting adds rows of nodes after them ("grow"), which the next extend overwrites. While the engine decodes plainly,
hidden states wait, and are caught up with in one pass.

Where a prompt's beginning is shared, its last row may stem from another request's next token: that can cost a draft,
never change a token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from m3.engine.config import Shape, Speculation
from m3.engine.passes import DraftPass
from m3.engine.request import Request
from m3.engine.rows import RowBuilder
from m3kernels.spec_decode import draft_topk, tree_budget, tree_finalize
from m3kernels.spec_decode.types import BITS, Tree

MOST_PENDING = 32  # hidden states that wait while nothing is drafted


@dataclasses.dataclass
class _Known:
    """What is known of a request: rows of the draft's cache that are done, and hidden states of the tokens after."""

    done: int
    pending: list[Tensor] = dataclasses.field(default_factory=list)
    count: int = 0  # rows of pending


class Drafter:
    """The draft's side of every request."""

    def __init__(self, draft: DraftPass, config: Speculation, page_size: int) -> None:
        self.draft, self.config, self.page_size = draft, config, page_size
        self.device = draft.device
        self._known: dict[str, _Known] = {}

    # -- hidden states ------------------------------------------------------------------------------------------------
    def begin(self, request: Request, start: int) -> None:
        """The target is about to compute tokens from ``start`` on; rows before it are in shared pages."""
        self._known[request.id] = _Known(done=start)

    def forget(self, id: str) -> None:
        self._known.pop(id, None)

    def note(self, request: Request, hidden: Tensor) -> None:
        """(rows, aux width) hidden states of the tokens that the target has just computed, in order.

        They may wait long: no view of a step's, all of which it would keep.
        """
        known = self._known[request.id]
        known.pending.append(hidden)
        known.count += len(hidden)

    def catch_up(self, requests: Sequence[Request], least: int = MOST_PENDING) -> None:
        """Compute the rows of requests for which more than ``least`` hidden states wait; the last goes on waiting.

        It is what the next tree begins with.
        """
        late = [request for request in requests if self._known[request.id].count > least]
        if late:
            self._extend(late, draw=False)

    def _extend(self, requests: Sequence[Request], *, draw: bool) -> list[Tensor]:
        rows = RowBuilder(self.page_size, self.device)
        hidden: list[Tensor] = []
        for request in requests:
            known = self._known[request.id]
            count = known.count if draw else known.count - 1
            tokens = request.tokens[known.done + 1 : known.done + 1 + count]
            assert len(tokens) == count > 0, f"request {request.id}: {len(tokens)} tokens for {count} hidden states"
            rows.add(request, tokens, known.done)
            waiting = torch.cat(known.pending)
            hidden.append(waiting[:count])
            known.pending = [] if draw else [waiting[count:].clone()]
            known.done, known.count = known.done + count, known.count - count
            if draw:
                rows.picked.append(len(rows.tokens) - 1)
        given = torch.cat(hidden) if len(hidden) > 1 else hidden[0]
        return self.draft.extend.run(rows.batch(len(requests)), (given.contiguous(),))

    # -- trees --------------------------------------------------------------------------------------------------------
    def trees(
        self,
        requests: Sequence[Request],
        shape: Shape,
        noise: dict[str, Tensor] | None,
        costs: tuple[Tensor, float] | None,
        experts: tuple[int, int],
    ) -> Tree:
        """A tree for each request, rooted at its last token, which the target has not computed yet.

        Args:
            noise: temperature and seed of each request where drafts are ranked with the target's own noise.
            costs: of a target pass, for a budget of nodes; None keeps shape.nodes. experts: (experts of a layer, those
                a token is routed to), (0, 0) for a dense model.
        """
        count, k = len(requests), shape.topk
        logits, hidden = self._extend(requests, draw=True)
        scores = torch.zeros(count, 1, device=self.device)
        nodes, width = hidden[:, None], hidden.shape[1]
        tokens_of, scores_of = [], []
        parents = [torch.full((count, 1), -1, dtype=torch.int64, device=self.device)]
        words = -(-max(shape.expanded, 1) // BITS)
        bits = torch.zeros(count, 1, words, dtype=torch.int32, device=self.device)
        for step in range(shape.steps):
            found = draft_topk(
                logits.view(count, -1, logits.shape[1]) if noise is None else self._cooled(logits, count, noise),
                scores,
                k=k,
                step=step,
                d2t=self.draft.d2t,
                **({} if noise is None else self._noise(requests, noise, step)),
            )
            tokens_of.append(found.tokens.flatten(1))
            scores_of.append(found.cum_scores.flatten(1))
            parents.append(found.parents)
            scores = found.next_scores
            if step + 1 == shape.steps:
                break
            source = found.src_row.long()
            nodes = nodes.gather(1, source[..., None].expand(-1, -1, width))
            bits = bits.gather(1, source[..., None].expand(-1, -1, words)).contiguous()
            for j in range(k):
                place = step * k + j
                value = 1 << (place % BITS)
                bits[:, j, place // BITS] |= value - (1 << BITS) if value >= 1 << (BITS - 1) else value
            logits, hidden = self._grow(requests, found.next_ids, nodes, bits, step, k)
            nodes = hidden.view(count, k, width)
        lists = torch.cat(scores_of, 1), torch.cat(tokens_of, 1), torch.cat(parents[:-1], 1)
        bonus = torch.tensor([request.tokens[-1] for request in requests], device=self.device)
        seq_lens = torch.tensor([len(request.tokens) - 1 for request in requests], device=self.device)
        budget = None
        if costs is not None:
            table, expert_cost = costs
            table = table.to(self.device)
            budget = tree_budget(
                lists[0], table, num_experts=experts[0], topk_experts=experts[1], expert_cost=expert_cost
            ).clamp(max=shape.nodes)
        return tree_finalize(*lists, bonus, seq_lens, topk=k, num_nodes=shape.nodes, budget=budget)

    def _cooled(self, logits: Tensor, count: int, noise: dict[str, Tensor]) -> Tensor:
        return logits.view(count, -1, logits.shape[1]) / noise["temperature"][:, None, None]

    def _noise(self, requests: Sequence[Request], noise: dict[str, Tensor], step: int) -> dict[str, Any]:
        positions = [len(request.tokens) + step for request in requests]
        return {"seed": noise["seed"], "position": torch.tensor(positions, device=self.device)}

    def _grow(
        self, requests: Sequence[Request], tokens: Tensor, hidden: Tensor, bits: Tensor, step: int, k: int
    ) -> list[Tensor]:
        """(logits, hidden) of the k nodes of every request; after its done rows and earlier nodes."""
        rows = RowBuilder(self.page_size, self.device)
        for request, chosen in zip(requests, tokens.tolist(), strict=True):
            done = self._known[request.id].done
            first = done + step * k
            rows.add_nodes(request, chosen, [done + step] * k, first, first + k)
        rows.picked = list(range(len(rows.tokens)))
        batch = rows.batch(0, [(step + 1) * k] * len(requests), bits.flatten(0, 1))
        return self.draft.grow.run(batch, (hidden.flatten(0, 1).contiguous(),))
