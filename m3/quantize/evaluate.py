"""What quantisation costs on held-out text: perplexity of both models, and KL of one from the other.

    ppl = exp(mean over tokens of -log p(token | before)),    KL = mean over tokens of sum_v p(v) (log p(v) - log q(v))

with p the model as it was, q the quantised one; both in nats, log-softmax in fp32, sums in fp64. The intervals hold 95%
of the means of passages drawn again with replacement: tokens of one passage are no independent draws, passages are.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from m3.models.decoder import Decoder
from m3.quantize.perplexity import ROWS
from m3kernels.checks import refuse

DRAWS, SEED = 2000, 0  # of the bootstrap
Head = Callable[[Tensor], Tensor]  # (T, D) hidden states after the last layer -> (T, V) logits


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean with its 95% interval."""

    mean: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """Both models on the same tokens. same_top: share of tokens whose likeliest next token is the same in both."""

    tokens: int
    passages: int
    perplexity: Estimate  # of the model as it was
    perplexity_quantised: Estimate
    kl: Estimate  # nats per token
    same_top: Estimate

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> Comparison:
        """The comparison that dataclasses.asdict made these of."""
        read: dict[str, Any] = {
            name: Estimate(**value) if isinstance(value, dict) else value for name, value in fields.items()
        }
        return cls(**read)


class Tally:
    """Sums over passages of what a Comparison is made of."""

    def __init__(self) -> None:
        self._rows: list[list[float]] = []  # a passage: tokens, -log p, -log q, KL, same top

    @torch.inference_mode()
    def add(self, full: Tensor, quantised: Tensor, heads: tuple[Head, Head], tokens: Sequence[int]) -> None:
        """One passage of n tokens, by the hidden states (n, D) of both models after the last layer, and their heads.

        Raises ValueError: fewer than two tokens, or hidden states that do not fit.
        """
        if len(tokens) < 2 or full.shape != quantised.shape or len(full) != len(tokens):
            got = f"{len(tokens)} tokens, states {tuple(full.shape)} and {tuple(quantised.shape)}"
            raise refuse("evaluate", "tokens", "2 or more, and a state for each", got)
        target = torch.tensor(list(tokens[1:]), device=full.device)
        sums = torch.zeros(4, dtype=torch.float64)
        for start in range(0, len(target), ROWS):
            wanted = target[start : start + ROWS]
            stop = start + len(wanted)
            log_p, log_q = (
                head(hidden[start:stop]).float().log_softmax(-1)
                for head, hidden in zip(heads, (full, quantised), strict=True)
            )
            rows = (
                -log_p.gather(1, wanted[:, None]),
                -log_q.gather(1, wanted[:, None]),
                (log_p.exp() * (log_p - log_q)).sum(-1),
                log_p.argmax(-1) == log_q.argmax(-1),
            )
            sums += torch.stack([one.double().sum() for one in rows]).cpu()
        self._rows.append([float(len(target)), *sums.tolist()])

    def result(self) -> Comparison:
        """Over all passages so far. Raises ValueError if there is none."""
        if not self._rows:
            raise refuse("evaluate", "passages", "one or more", "none")
        table = np.array(self._rows)
        drawn = np.random.default_rng(SEED).integers(len(table), size=(DRAWS, len(table)))
        again = table[drawn].sum(axis=1)

        def estimate(column: int, of: Callable[[float], float] = float) -> Estimate:
            means = again[:, column] / again[:, 0]
            low, high = np.quantile(means, (0.025, 0.975))
            mean = table[:, column].sum() / table[:, 0].sum()
            return Estimate(mean=of(float(mean)), low=of(float(low)), high=of(float(high)))

        return Comparison(
            tokens=int(table[:, 0].sum()),
            passages=len(table),
            perplexity=estimate(1, math.exp),
            perplexity_quantised=estimate(2, math.exp),
            kl=estimate(3),
            same_top=estimate(4),
        )


@torch.inference_mode()
def compare_models(
    full: Decoder,
    quantised: Decoder,
    passages: Sequence[Sequence[int]],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Comparison:
    """Two models that fit into memory together, on tokenised passages, each from its own start."""
    tally = Tally()
    for index, passage in enumerate(passages):
        hidden = []
        for model in (full, quantised):
            ids = torch.tensor([list(passage)], device=model.embedding.device)
            hidden.append(model.hidden(ids, model.new_cache(len(passage))))
        tally.add(hidden[0], hidden[1], (full.head, quantised.head), passage)
        progress(index + 1, len(passages))
    return tally.result()
