"""The plain loop: one sequence, one token after another, by torch. What the engine is compared with."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from m3.models.decoder import Decoder
from m3kernels.checks import refuse


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen. temperature 0 is greedy; top_p keeps the smallest set of tokens that holds p."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    max_tokens: int = 256

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < 100:
            raise refuse("Sampling", "temperature", "0 <= temperature < 100", self.temperature)
        if not 0 < self.top_p <= 1:
            raise refuse("Sampling", "top_p", "0 < top_p <= 1", self.top_p)
        if self.max_tokens < 1:
            raise refuse("Sampling", "max_tokens", "at least 1", self.max_tokens)


def choose(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Index drawn from logits (V,)."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    probs = (logits.float() / sampling.temperature).softmax(dim=-1)
    if sampling.top_p < 1:
        ordered, ids = probs.sort(descending=True)
        keep = ordered.cumsum(0) - ordered < sampling.top_p  # the first token is always kept
        probs = torch.zeros_like(probs).index_copy_(0, ids[keep], ordered[keep])
    return int(torch.multinomial(probs, 1, generator=generator))


@torch.inference_mode()
def generate(model: Decoder, prompt: Sequence[int], sampling: Sampling) -> Iterator[int]:
    """Yields the new tokens; stops at an end-of-sequence token (not yielded) or after max_tokens.

    Raises:
        ValueError: an empty prompt, a token outside the vocabulary, or more tokens than the model's context.
    """
    config = model.config
    if not prompt or min(prompt) < 0 or max(prompt) >= config.vocab_size:
        raise refuse("generate", "prompt", f"one or more tokens in 0..{config.vocab_size - 1}", f"{list(prompt)[:8]}")
    room = config.max_position_embeddings - len(prompt)
    if room < 1:
        raise refuse("generate", "prompt", f"fewer than {config.max_position_embeddings} tokens", f"{len(prompt)}")
    count = min(sampling.max_tokens, room)
    device = model.embedding.device
    generator = torch.Generator(device).manual_seed(sampling.seed)
    cache = model.new_cache(len(prompt) + count)
    logits = model(torch.tensor([list(prompt)], device=device), cache, last_only=True)
    for index in range(count):
        token = choose(logits[0, -1], sampling, generator)
        if token in config.eos_token_ids:
            return
        yield token
        if index + 1 < count:
            logits = model(torch.tensor([[token]], device=device), cache)
