"""The bench of calibration sets: its text, its measures on a tiny mixture of experts, its intervals."""

from __future__ import annotations

import dataclasses
import random

import numpy as np
import pytest
import torch

from bench import calibration, small_moe
from m3.models.loader import load_model
from m3.models.tokenizer import Tokenizer
from m3.quantize.scheme import Scheme, nearest


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """An untrained model with its tokenizer."""
    folder = tmp_path_factory.mktemp("moe")
    small_moe.write_tokenizer(folder)
    config = small_moe.SmallMoe(layers=2, hidden=32, experts=4, inner=32)
    small_moe.random_model(config, 0).save(folder)
    return folder


@pytest.fixture
def layers(model):
    return calibration.Layers(model)


def test_every_prompt_has_an_answer_of_its_domain():
    talk = small_moe.Talk()
    assert {kind: len(texts) > 100 for kind, texts in talk.texts.items()} == {
        (domain, language): True for domain in ("clinical", "reasoning", "general", "code") for language in ("en", "zh")
    }
    domain, prompt, answer = talk.draw(random.Random(5))
    assert any(prompt in talk.prompts[domain, lang] and answer in talk.texts[domain, lang] for lang in ("en", "zh"))
    assert small_moe.Talk().draw(random.Random(5)) == (domain, prompt, answer)


def test_sums_are_right():
    for line in small_moe.sums(1, 3)[0].split(". ")[1:-1]:
        left, right = line.split(" = ")
        a, sign, b = left.split()
        assert int(a) + (int(b) if sign == "+" else -int(b)) == int(right)


def test_the_tokenizer_gives_back_what_it_took(model):
    tokenizer = Tokenizer(model)
    text = "def f(x):\n    return 胸痛 + 1"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    ids = tokenizer.chat([{"role": "user", "content": "x"}])
    assert tokenizer.fast.decode(ids, skip_special_tokens=False) == "<|user|>x<|assistant|>"


def test_layers_are_the_model(model, layers):
    ids = torch.arange(3, 25).view(2, 11)
    want = load_model(model).forward(ids).log_softmax(-1)
    torch.testing.assert_close(layers.logprobs(ids, layers.blocks), want, atol=1e-4, rtol=1e-4)


def test_an_experts_error_is_its_own(layers):
    """One expert of one layer is rounded to nothing: its error is 1, that of others 0, of one without tokens nan."""
    ids = torch.randint(2048, (6, 30), generator=torch.Generator().manual_seed(0))
    exact = [dict.fromkeys(block.weights) for block in layers.blocks]
    for block, rounded in zip(layers.blocks, exact, strict=True):
        for name, weight in block.weights.items():
            rounded[name] = nearest(weight, Scheme(group_size=32))
            block.weights[name] = rounded[name].dequantized()
    down = "mlp.experts.2.down_proj"
    exact[1][down] = dataclasses.replace(exact[1][down], codes=torch.full_like(exact[1][down].codes, 8))
    errors = np.array(calibration.expert_errors(layers, exact, ids))
    few = np.array([layers.blocks[0].routing(layers.embed(ids)).tokens_per_expert().tolist()]) < calibration.FEW
    assert (np.isnan(errors[:1]) == few).all()
    assert errors[1, 2] == pytest.approx(1)
    errors[1, 2] = 0
    assert np.nansum(errors) == 0
    losses = calibration.losses(
        layers, [calibration.replaced(*pair) for pair in zip(layers.blocks, exact, strict=True)], ids
    )
    assert min(kl for kl, _, _ in losses) > 0
    assert calibration.losses(layers, layers.blocks, ids)[0][0] == 0


def test_intervals_weigh_tokens():
    values, weights = np.array([[2.0, 9.0], [2.0, 9.0]]), np.array([[1.0, 3.0], [1.0, 3.0]])
    mean, low, high = calibration.interval(values, weights)
    assert mean == 22 / 8
    assert (low, high) == (2, 3)
