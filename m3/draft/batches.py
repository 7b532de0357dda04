"""Training batches of responses with the teacher's states: padded rows of similar length, in an order of its own seed.

A batch has (B, T) tokens and what the target said of them. Row j of a response is a *lesson* if the target's likeliest
token there, x_{j+1}, belongs to the response: the draft learns it at every step i of the training-time test from the
position j - 1 - i, which has seen everything up to x_j by then.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from m3.draft.hidden import StateCache
from m3.draft.store import Response

WINDOW = 64  # responses that are sorted by length together


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """Padded responses. Padding lies at the right; L lessons of all rows, one after another."""

    tokens: Tensor  # (B, T) int64
    mask: Tensor  # (B, T) bool, True at real tokens
    aux: Tensor  # (B, T, n D) fp16
    rows: Tensor  # (L,) int64: j in the flattened (B T)
    final: Tensor  # (L, D) fp16: the target's last hidden state at j
    best: Tensor  # (L,) int64: its likeliest next token


def make_batch(responses: Sequence[Response], cache: StateCache) -> Batch:
    """The responses as one batch. Needs their states in the cache."""
    length = max(len(one.prompt) + len(one.response) - 1 for one in responses)
    states = [cache.get(one.group, one.index) for one in responses]
    tokens = torch.zeros(len(responses), length, dtype=torch.int64)
    mask = torch.zeros(len(responses), length, dtype=torch.bool)
    aux = torch.zeros(len(responses), length, states[0].aux.shape[1], dtype=torch.float16)
    rows, final, best = [], [], []
    for row, (one, state) in enumerate(zip(responses, states, strict=True)):
        count = len(state.best)
        tokens[row, :count] = torch.tensor((one.prompt + one.response)[:count])
        mask[row, :count] = True
        aux[row, :count] = state.aux
        lessons = torch.arange(len(one.prompt), count)
        rows.append(lessons + row * length)
        final.append(state.final[len(one.prompt) :])
        best.append(state.best[len(one.prompt) :].long())
    return Batch(tokens=tokens, mask=mask, aux=aux, rows=torch.cat(rows), final=torch.cat(final), best=torch.cat(best))


def lesson_rows(batch: Batch, step: int) -> Tensor:
    """(L,) int64: where in the flattened (B T) output of a step the lessons are answered."""
    return batch.rows - 1 - step


def length_of(one: Response) -> int:
    return len(one.prompt) + len(one.response) - 1


def packed(responses: Sequence[Response], batch_tokens: int) -> list[list[Response]]:
    """Consecutive responses in groups of at most ``batch_tokens`` tokens, padding included, or of one."""
    groups: list[list[Response]] = []
    longest = 0
    for one in responses:
        longest = max(longest, length_of(one))
        if not groups or longest * (len(groups[-1]) + 1) > batch_tokens:
            groups.append([])
            longest = length_of(one)
        groups[-1].append(one)
    return groups


class Order:
    """The batches of all epochs, a function of the responses and the seed alone."""

    def __init__(self, responses: Sequence[Response], *, batch_tokens: int, seed: int) -> None:
        self.responses, self.batch_tokens, self.seed = list(responses), batch_tokens, seed

    def epoch(self, number: int) -> list[list[Response]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        mixed = [self.responses[i] for i in torch.randperm(len(self.responses), generator=generator).tolist()]
        groups: list[list[Response]] = []
        for start in range(0, len(mixed), WINDOW):
            groups += packed(sorted(mixed[start : start + WINDOW], key=length_of), self.batch_tokens)
        return [groups[i] for i in torch.randperm(len(groups), generator=generator).tolist()]

    def following(self, skip: int) -> Iterator[tuple[int, list[Response]]]:
        """(epoch, batch) after the first ``skip`` batches, without end."""
        number = 0
        while True:
            groups = self.epoch(number)
            for group in groups[skip:]:
                yield number, group
            skip = max(0, skip - len(groups))
            number += 1


def draft_vocabulary(responses: Sequence[Response], cache: StateCache, size: int, vocab_size: int) -> Tensor:
    """(size,) ascending target ids: the most frequent in the responses and among what the target would have said.

    Ties go to the lower id, and so does what is left where there are fewer distinct tokens than places.
    """
    counts = torch.zeros(vocab_size, dtype=torch.int64)
    for one in responses:
        counts += torch.bincount(torch.tensor(one.response), minlength=vocab_size)
        best = cache.get(one.group, one.index).best[len(one.prompt) - 1 :]
        counts += torch.bincount(best.long(), minlength=vocab_size)
    return counts.sort(descending=True, stable=True).indices[: min(size, vocab_size)].sort().values
