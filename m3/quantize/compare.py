"""Put a model and its INT4 forms side by side: bytes, perplexity, decode speed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from m3.engine.config import EngineConfig
from m3.engine.core import EngineCore
from m3.engine.speed import decode_speed
from m3.models.decoder import Decoder
from m3.models.tokenizer import Tokenizer
from m3.quantize.perplexity import mixed_text, perplexity
from m3.quantize.round_to_nearest import Sizes, sizes

PROMPT, TOKENS = 64, 33  # of a run whose speed counts


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
    """One Row for ``full`` and one for each of ``int4``, in that order. Speeds: the best of rounds."""
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
    cores = [EngineCore(model, EngineConfig(num_pages=16)) for model in models]
    prompt = passages[0][:PROMPT]
    for _ in range(rounds):
        for index, core in enumerate(cores):
            speeds[index] = max(speeds[index], decode_speed(core, [prompt], TOKENS).tokens_per_second)
            step()
    return [
        Row(sizes=sizes(model), perplexity=ppl, tokens_per_second=speed)
        for model, ppl, speed in zip(models, perplexities, speeds, strict=True)
    ]
