"""What the tests of a draft share: a tiny target's responses with their states, in a folder of their own."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from m3.draft.generate import EngineGenerator, Request
from m3.draft.hidden import StateCache, teach
from m3.draft.store import HELD_OUT, TRAIN, Response
from m3.models.decoder import Decoder

AUX_LAYERS = (1, 2, 3)
MARK = "0" * 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Material:
    """Responses and where their states lie."""

    train: list[Response]
    held_out: list[Response]
    cache: StateCache


def random_prompts(count: int, vocabulary: int, seed: int = 0) -> list[list[int]]:
    """Prompts of 3 to 9 tokens."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 10, (count,), generator=generator).tolist()
    return [torch.randint(vocabulary, (length,), generator=generator).tolist() for length in lengths]


def make_material(
    model: Decoder, folder: Path, *, train: int = 12, held_out: int = 5, max_tokens: int = 20
) -> Material:
    """Greedy responses of the target to random prompts, with their states in ``folder``."""
    hidden_size = model.config.hidden_size
    cache = StateCache(folder, fingerprint=MARK, aux_layers=AUX_LAYERS, hidden_size=hidden_size)
    prompts = random_prompts(train + held_out, model.config.vocab_size)
    generator = EngineGenerator(model, batch=8)
    found: dict[int, Response] = {}
    for number, tokens in generator.generate([Request(prompt, 0.0, 0, max_tokens) for prompt in prompts]):
        group, index = (TRAIN, number) if number < train else (HELD_OUT, number - train)
        prompt, response = tuple(prompts[number]), tuple(tokens)
        found[number] = Response(group=group, index=index, prompt=prompt, response=response, temperature=0.0, seed=0)
    ordered = [found[number] for number in range(len(prompts))]
    teach(model, ordered, cache, AUX_LAYERS)
    return Material(train=ordered[:train], held_out=ordered[train:], cache=cache)
