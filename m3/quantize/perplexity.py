"""Perplexity of a model on the mixed text that comes with the package (clinical, general, code; written for it).

    ppl = exp( mean over all tokens but the first of each passage of -log p(token | tokens before it in the passage) )

The text is small and ours: it ranks variants of one model against each other and is no public benchmark.
"""

from __future__ import annotations

import importlib.resources
import math
from collections.abc import Callable, Sequence

import torch

from m3.models.decoder import Decoder
from m3kernels.checks import refuse

PASSAGE_MARK = "\n%%\n"  # between passages of the text
ROWS = 256  # rows of logits held at a time: 256 x 49152 fp32 is 50 MB


def mixed_text() -> list[str]:
    """The passages of m3/data/mixed_text.txt."""
    text = importlib.resources.files("m3").joinpath("data", "mixed_text.txt").read_text(encoding="utf-8")
    return [passage.strip() + "\n" for passage in text.split(PASSAGE_MARK)]


@torch.inference_mode()
def negative_log_likelihood(model: Decoder, tokens: Sequence[int]) -> float:
    """Sum over tokens[1:] of -log p, in nats; log-softmax in fp32, the sum in fp64."""
    if len(tokens) < 2:
        raise refuse("perplexity", "tokens", "2 or more", f"{len(tokens)}")
    ids = torch.tensor([list(tokens)], device=model.embedding.device)
    hidden = model.hidden(ids[:, :-1], model.new_cache(len(tokens) - 1))
    total = 0.0
    for start in range(0, len(hidden), ROWS):
        logits = model.head(hidden[start : start + ROWS]).float()
        target = ids[0, 1 + start : 1 + start + len(logits)]
        total += float(torch.nn.functional.cross_entropy(logits, target, reduction="none").double().sum())
    return total


def perplexity(
    model: Decoder, passages: Sequence[Sequence[int]], progress: Callable[[int, int], None] = lambda done, total: None
) -> float:
    """Perplexity over tokenised passages, each scored from its own start."""
    total, count = 0.0, 0
    for index, passage in enumerate(passages):
        total += negative_log_likelihood(model, passage)
        count += len(passage) - 1
        progress(index + 1, len(passages))
    return math.exp(total / count)
