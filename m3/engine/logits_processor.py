"""What a request's parameters do to its rows of logits before a token is drawn: penalties, bias, ends, grammar.

For the logits z of a row, c(v) the count of token v in the answer so far:

    z(v) / p  where z(v) > 0, else z(v) p      for v in the prompt or the answer (repetition_penalty p; Keskar et al.,
                                               "CTRL", 2019, as transformers has it)
    z(v) - (c(v) f + [c(v) > 0] s)             frequency_penalty f, presence_penalty s (OpenAI's API)
    z(v) + b(v)                                logit_bias
    -inf                                       what ends the answer, before min_tokens; what the grammar forbids

A row belongs to a node of a tree, and its answer so far includes the path to the node. So every row is that of plain
decoding, bit for bit: the same few elementwise operations on the same numbers.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from m3.engine.request import Request, SamplingParams
from m3kernels.spec_decode.types import BITS


def is_plain(params: SamplingParams) -> bool:
    """Whether the rows of such a request are left as they are."""
    return not (
        params.frequency_penalty
        or params.presence_penalty
        or params.repetition_penalty != 1
        or params.logit_bias
        or params.min_tokens
        or params.grammar is not None
    )


class LogitsProcessor:
    """Adjusts the rows of one request. Its state is made of the request's tokens, and follows them.

    Args:
        ends: the model's end tokens. vocab_size: of the rows.
    """

    def __init__(self, request: Request, ends: Sequence[int], vocab_size: int, device: torch.device) -> None:
        params = request.params
        self.request, self.params, self.device = request, params, device
        self.words = -(-vocab_size // BITS)
        self.matcher = None if params.grammar is None else params.grammar.matcher()
        self.doubtful = False  # whether a limit was passed at some node; its empty set says nothing then
        self._read = len(request.prompt)  # tokens that are counted
        self._penalises = bool(params.frequency_penalty or params.presence_penalty or params.repetition_penalty != 1)
        self._slot: dict[int, int] = {}  # of the tokens that are counted: their place in the next two
        self._ids, self._counts = array("q"), array("f")
        if params.repetition_penalty != 1:
            for token in request.prompt:
                self._count(token, 0.0)
        ends = () if params.ignore_eos else ends
        self._ends = sorted(token for token in {*ends, *params.stop_token_ids} if 0 <= token < vocab_size)
        self._stops = sum(1 << token for token in self._ends)
        self._biased = torch.tensor([token for token, _ in params.logit_bias], dtype=torch.int64, device=device)
        self._bias = torch.tensor([bias for _, bias in params.logit_bias], dtype=torch.float32, device=device)

    @property
    def adjusts(self) -> bool:
        """Whether adjust() has something to do."""
        return self._penalises or bool(self.params.logit_bias) or self._owes(0)

    def follow(self) -> None:
        """Read what was drawn since the last call."""
        new = self.request.tokens[self._read :]
        self._read += len(new)
        if self._penalises:
            for token in new:
                self._count(token, 1.0)
        if self.matcher is not None and new:
            self.matcher.advance(new)

    def _count(self, token: int, more: float) -> None:
        slot = self._slot.setdefault(token, len(self._ids))
        if slot == len(self._ids):
            self._ids.append(token)
            self._counts.append(0.0)
        self._counts[slot] += more

    def _owes(self, depth: int) -> bool:
        """Whether the answer may not end after the nodes of this depth."""
        return self.request.drawn + depth < self.params.min_tokens

    # -- logits -------------------------------------------------------------------------------------------------------
    def adjust(self, rows: Tensor, candidates: Sequence[int], parents: Sequence[int]) -> None:
        """In place: (N, V) logits of the nodes of a tree, whose root is the request's last token.

        Args:
            candidates, parents: of the nodes, as in m3kernels.spec_decode.types.Tree.
        """
        if self._penalises:
            self._penalise(rows, candidates, parents)
        if self.params.logit_bias:
            rows.index_add_(1, self._biased, self._bias.expand(len(rows), -1))
        if self._ends and self.matcher is None and self._owes(0):
            depths = _depths(parents)
            early = torch.tensor([self._owes(depth) for depth in depths], device=self.device).nonzero()
            rows[early, torch.tensor(self._ends, device=self.device)] = -torch.inf

    def _penalise(self, rows: Tensor, candidates: Sequence[int], parents: Sequence[int]) -> None:
        params, known = self.params, len(self._ids)
        extra: dict[int, int] = {}  # slots of tokens that only the tree has
        paths: list[list[int]] = []
        for token, parent in zip(candidates, parents, strict=True):
            if parent < 0:
                paths.append([])
                continue
            slot = self._slot.get(token)
            paths.append([*paths[parent], extra.setdefault(token, known + len(extra)) if slot is None else slot])
        if known + len(extra) == 0:
            return
        ids = _tensor(self._ids + array("q", extra), torch.int64).to(self.device)
        base = _tensor(self._counts + array("f", [0.0] * len(extra)), torch.float32).to(self.device)
        counts = base.repeat(len(rows), 1)
        nodes = [node for node, path in enumerate(paths) for _ in path]
        if nodes:
            at = torch.tensor([nodes, [slot for path in paths for slot in path]], device=self.device)
            counts.index_put_((at[0], at[1]), torch.ones(len(nodes), device=self.device), accumulate=True)
        z = rows.index_select(1, ids)
        if params.repetition_penalty != 1:
            seen = (counts > 0) | (torch.arange(len(ids), device=self.device) < known)
            p = torch.tensor(params.repetition_penalty, dtype=z.dtype, device=self.device)
            z = z.where(~seen, torch.where(z > 0, z / p, z * p))
        z = z - (counts * params.frequency_penalty + (counts > 0) * params.presence_penalty)
        rows.index_copy_(1, ids, z)

    # -- tokens -------------------------------------------------------------------------------------------------------
    def bits(self, candidates: Sequence[int], parents: Sequence[int]) -> Tensor:
        """(N, words) int32, grammar_bits of tree_verify: what may follow each node; all, without a grammar.

        Rows of nodes that the grammar forbids, and below end tokens, are empty: no path leads there.
        """
        if self.matcher is None:
            return torch.full((len(candidates), self.words), -1, dtype=torch.int32, device=self.device)
        sets = [0] * len(candidates)
        children: list[list[int]] = [[] for _ in candidates]
        for node, parent in enumerate(parents):
            if parent >= 0:
                children[parent].append(node)
        self.doubtful = False
        self._visit(0, [], candidates, children, sets)
        written = b"".join(each.to_bytes(4 * self.words, "little") for each in sets)
        return torch.frombuffer(bytearray(written), dtype=torch.int32).view(-1, self.words).to(self.device)

    def _visit(
        self, node: int, path: list[int], candidates: Sequence[int], children: list[list[int]], sets: list[int]
    ) -> None:
        assert self.matcher is not None
        text, may_end = self.matcher.allowed()
        sets[node] = self._joined(text, may_end, len(path))
        self.doubtful = self.doubtful or self.matcher.error is not None
        for child in children[node]:
            token = candidates[child]
            if text >> token & 1:
                self.matcher.enter(token)
                self._visit(child, [*path, token], candidates, children, sets)
                self.matcher.leave(path)

    def _joined(self, text: int, may_end: bool, depth: int) -> int:
        """Tokens that go on and tokens that end; the former alone where the answer may not end, if there are any."""
        assert self.params.grammar is not None
        if self._owes(depth):
            text = text & ~self._stops or text
        if text and (self._owes(depth) or self.params.ignore_eos):
            may_end = False
        return text | self.params.grammar.ends if may_end else text


def _tensor(values: array[Any], dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(bytearray(values.tobytes()), dtype=dtype)


def _depths(parents: Sequence[int]) -> list[int]:
    """Nodes between each node and its root, the node included."""
    depths: list[int] = []
    for parent in parents:
        depths.append(0 if parent < 0 else depths[parent] + 1)
    return depths
