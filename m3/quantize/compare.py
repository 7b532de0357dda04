"""Put a model and its INT4 forms side by side: bytes, perplexity, decode speed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from m3.models.decoder import Decoder
from m3.models.generate import decode_speed
from m3.models.tokenizer import Tokenizer
from m3.quantize.perplexity import mixed_text, perplexity
from m3.quantize.round_to_nearest import Sizes, sizes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """What was measured on one form of a model."""

    sizes: Sizes
    perplexity: float
    tokens_per_second: float


def compare(
    full: Decoder,
    int4: Sequence[Decoder],
    tokenizer: Tokenizer,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Row]:
    """One Row for ``full`` and one for each of ``int4``, in that order. Speeds are the best of interleaved rounds."""
    models = [full, *int4]
    passages = [tokenizer.encode(passage) for passage in mixed_text()]
    rounds = 3
    total = len(models) * (len(passages) + rounds)
    done = 0

    def step(*_: int) -> None:
        nonlocal done
        done += 1
        progress(done, total)

    perplexities = [perplexity(model, passages, step) for model in models]
    speeds = [0.0] * len(models)
    for _ in range(rounds):
        for index, model in enumerate(models):
            speeds[index] = max(speeds[index], decode_speed(model, repeats=1))
            step()
    return [
        Row(sizes=sizes(model), perplexity=ppl, tokens_per_second=speed)
        for model, ppl, speed in zip(models, perplexities, speeds, strict=True)
    ]
