"""Seed-exactness on SmolLM2-135M-Instruct: text with a draft is that without, for every prompt, temperature and shape.

M3_TEST_PROMPTS: number of prompts (200). M3_TEST_DRAFT: a folder with a trained draft; without it one that starts from
the target's last layer, which accepts little.
"""

from __future__ import annotations

import os
import random
from functools import cache

import pytest
import torch
from engine_cases import Answer, Ask, Logits, together

from m3.draft.layouts import load_draft
from m3.draft.prompts import read_prompts
from m3.engine.config import EngineConfig, Shape, Speculation
from m3.engine.core import Draft, EngineCore
from m3.engine.request import Request, SamplingParams
from m3.models.decoder import Decoder
from m3.models.gated_eagle3 import GatedEagle3, GatedEagle3Config
from m3.models.hub import resolve
from m3.models.loader import load_model
from m3.models.tokenizer import Tokenizer
from m3.quantize.round_to_nearest import RoundConfig, quantize_model

pytestmark = pytest.mark.slow

NAME = "SmolLM2-135M-Instruct"
PROMPTS = int(os.environ.get("M3_TEST_PROMPTS", "200"))
FOLDER = os.environ.get("M3_TEST_DRAFT")
NEW_TOKENS, BATCH, BITWISE = 12, 16, 16
TEMPERATURES = (0.0, 0.7, 1.0)
SHAPES = (
    Shape.chain(3),
    Shape(steps=4, topk=4, nodes=8),
    Shape(steps=5, topk=4, nodes=16),
    Shape(steps=5, topk=8, nodes=32),
)
CONFIG = EngineConfig(num_pages=300, max_context=512, max_step_tokens=1024)


@cache
def model(weights: str) -> Decoder:
    loaded = load_model(resolve(NAME), dtype=torch.bfloat16 if weights == "bf16" else torch.float32)
    return quantize_model(loaded, RoundConfig(head=True, group_size=64)) if weights == "int4" else loaded


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer(resolve(NAME))


@cache
def draft() -> Draft:
    target = model("fp32")
    if FOLDER:
        config, tensors = load_draft(FOLDER, target.config)
        return Draft(config=config, tensors=tensors)
    config = GatedEagle3Config.for_target(target.config, draft_vocab_size=8192, gate="headwise")
    return Draft(config=config, tensors=GatedEagle3.warm_start(config, target, torch.arange(8192)).state_dict())


@cache
def prompts() -> list[list[int]]:
    """A third each: held-out topics, no template, training topics; longer shares fill up shorter ones."""
    found = read_prompts()
    kinds = [list(kind) for kind in (found.held_out, found.out_of_template, found.train)]
    texts = [kind[index] for index in range(max(map(len, kinds))) for kind in kinds if index < len(kind)]
    return [tokenizer().chat([{"role": "user", "content": text}]) for text in texts[:PROMPTS]]


def asked(temperature: float) -> list[Ask]:
    params = SamplingParams(temperature=temperature, max_tokens=NEW_TOKENS)
    return [Ask(prompt, params, 1000 + index) for index, prompt in enumerate(prompts())]


@cache
def plain(weights: str) -> dict[float, list[list[int]]]:
    """Tokens of plain decoding by temperature, in batches that are not those of the test."""
    core = EngineCore(model(weights), CONFIG)
    found = {}
    for temperature in TEMPERATURES:
        answers: list[Answer] = []
        cases = asked(temperature)
        for first in range(0, len(cases), 5):
            answers += together(core, cases[first : first + 5], first=first)
        found[temperature] = [answer.tokens for answer in answers]
    return found


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("weights", ["int4", "bf16", "fp32"])
def test_text_is_that_of_plain_sampling(weights, shape):
    """All prompts at all temperatures, mixed at random in batches that change."""
    cases = [(t, index, ask) for t in TEMPERATURES for index, ask in enumerate(asked(t))]
    random.Random(shape.nodes).shuffle(cases)
    speculation = Speculation(shapes=(shape,), adaptive=False)
    core = EngineCore(model(weights), CONFIG, draft=draft(), speculation=speculation)
    different = []
    for first in range(0, len(cases), BATCH):
        batch = cases[first : first + BATCH]
        answers = together(core, [ask for _, _, ask in batch], stagger=3)
        for (temperature, index, _), answer in zip(batch, answers, strict=True):
            want = plain(weights)[temperature][index]
            if tokenizer().decode(answer.tokens) != tokenizer().decode(want) or answer.tokens != want:
                different.append((temperature, index))
    assert different == []
    assert core.stats.accepted > 0


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("weights", ["int4", "bf16", "fp32"])
def test_greedy_logits_are_bitwise_those_of_plain_decoding(weights, shape):
    cases = asked(0.0)[:BITWISE]
    whole = [ask.prompt + tokens for ask, tokens in zip(cases, plain(weights)[0.0], strict=False)]

    def truth(request: Request) -> list[int]:
        return whole[int(request.id)]

    one = EngineCore(model(weights), CONFIG)
    want = Logits(one, truth)
    for index, ask in enumerate(cases):
        together(one, [ask], first=index)
    core = EngineCore(model(weights), CONFIG, draft=draft(), speculation=Speculation(shapes=(shape,), adaptive=False))
    got = Logits(core, truth)
    together(core, cases, stagger=2)
    assert want.rows.keys() <= got.rows.keys()
    assert [place for place, row in want.rows.items() if not torch.equal(got.rows[place], row)] == []
