"""Sampling and generation on a tiny model; the exact law of top-p by enumeration."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tiny_models import SMALL

from m3.engine.config import EngineConfig
from m3.engine.core import EngineCore
from m3.engine.speed import decode_speed
from m3.models.generate import Sampling, choose, generate
from m3.models.loader import load_model

PROMPT = [3, 1, 4, 1, 5]


@pytest.fixture(scope="module")
def model(llama):
    return load_model(llama[0])


def test_greedy_equals_transformers(model, llama):
    want = torch.tensor([PROMPT])
    with torch.no_grad():
        for _ in range(20):
            want = torch.cat([want, llama[1](want).logits[:, -1:].argmax(-1)], dim=1)
    assert list(generate(model, PROMPT, Sampling(max_tokens=20))) == want[0, len(PROMPT) :].tolist()


def test_an_end_of_sequence_token_ends_it(model):
    tokens = list(generate(model, PROMPT, Sampling(max_tokens=20)))
    end = tokens[7]
    config = model.config
    model.config = dataclasses.replace(config, eos_token_ids=(98, end))
    stopped = list(generate(model, PROMPT, Sampling(max_tokens=20)))
    model.config = config
    assert stopped == tokens[: tokens.index(end)]


def test_context_bounds_the_answer(model):
    prompt = [1] * (SMALL["max_position_embeddings"] - 2)
    assert len(list(generate(model, prompt, Sampling(max_tokens=20)))) == 2


def test_one_token(model):
    assert list(generate(model, [7], Sampling(max_tokens=1))) == [int(model(torch.tensor([[7]])).argmax())]


def test_a_seed_repeats_itself_and_another_differs(model):
    def text(seed: int) -> list[int]:
        return list(generate(model, PROMPT, Sampling(temperature=1.5, seed=seed, max_tokens=24)))

    assert text(1) == text(1)
    assert text(1) != text(2)


@pytest.mark.parametrize(
    ("top_p", "law"),
    [(1.0, (0.1, 0.4, 0.3, 0.2)), (0.75, (0, 4 / 9, 3 / 9, 2 / 9)), (0.69, (0, 4 / 7, 3 / 7, 0)), (0.01, (0, 1, 0, 0))],
    ids=["all", "three", "two", "at-least-one"],
)
def test_top_p_has_the_right_law(top_p, law):
    logits = 2 * torch.tensor([0.1, 0.4, 0.3, 0.2], dtype=torch.float64).log()  # temperature 2 undoes the factor
    generator = torch.Generator().manual_seed(0)
    sampling = Sampling(temperature=2.0, top_p=top_p)
    draws = 4000
    counts = torch.bincount(torch.tensor([choose(logits, sampling, generator) for _ in range(draws)]), minlength=4)
    expected = torch.tensor(law, dtype=torch.float64) * draws
    assert counts[expected == 0].sum() == 0
    kept = expected > 0
    chi_square = float(((counts[kept] - expected[kept]) ** 2 / expected[kept]).sum())
    assert chi_square < 16.3  # 99.9 % quantile with 3 degrees of freedom


def test_decode_speed_counts_tokens_after_the_first_of_each_request(model, monkeypatch):
    core = EngineCore(model, EngineConfig(num_pages=16))
    ticks = iter(range(1000))
    monkeypatch.setattr("m3.engine.speed.time.perf_counter", lambda: float(next(ticks)))
    speed = decode_speed(core, [[5, 6, 7], [8, 9]], 4)
    assert (speed.tokens, speed.steps) == (6, 3)
    assert speed.tokens_per_second == 6 / speed.seconds


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], r"prompt: want one or more tokens in 0..98; got \[\]"),
        ([99], r"prompt: want one or more tokens in 0..98; got \[99\]"),
        ([-1], r"prompt: want one or more tokens in 0..98; got \[-1\]"),
        ([1] * 512, "prompt: want fewer than 512 tokens; got 512"),
    ],
    ids=["empty", "too-large", "negative", "too-long"],
)
def test_prompts_out_of_contract(model, prompt, message):
    with pytest.raises(ValueError, match=f"generate: {message}"):
        next(generate(model, prompt, Sampling()))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, r"temperature: want 0 <= temperature < 100; got -1.0"),
        ({"top_p": 0.0}, r"top_p: want 0 < top_p <= 1; got 0.0"),
        ({"max_tokens": 0}, r"max_tokens: want at least 1; got 0"),
    ],
)
def test_sampling_out_of_contract(settings, message):
    with pytest.raises(ValueError, match=f"Sampling: {message}"):
        Sampling(**settings)
