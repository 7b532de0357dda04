"""Perplexity against transformers' own loss, and the text that it is measured on."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_models import SMALL

from m3.models.loader import load_model
from m3.quantize import perplexity as module
from m3.quantize.perplexity import mixed_text, negative_log_likelihood, perplexity


def test_perplexity_equals_the_loss_of_transformers(llama, monkeypatch):
    monkeypatch.setattr(module, "ROWS", 7)  # several blocks of rows, the last one partial
    model = load_model(llama[0])
    passages = [torch.randint(0, SMALL["vocab_size"], (length,)).tolist() for length in (2, 8, 33)]
    total = 0.0
    with torch.no_grad():
        for passage in passages:
            ids = torch.tensor([passage])
            total += float(llama[1].double()(ids, labels=ids).loss) * (len(passage) - 1)
    llama[1].float()
    calls = []
    got = perplexity(model, passages, lambda *call: calls.append(call))
    assert got == pytest.approx(math.exp(total / (1 + 7 + 32)), rel=1e-5)
    assert calls == [(1, 3), (2, 3), (3, 3)]


def test_one_token_has_no_likelihood(llama):
    with pytest.raises(ValueError, match="perplexity: tokens: want 2 or more; got 1"):
        negative_log_likelihood(load_model(llama[0]), [1])


def test_the_text_is_mixed():
    passages = mixed_text()
    assert len(passages) == 6
    assert all(800 < len(passage) < 2500 for passage in passages)
    assert sum("def " in passage for passage in passages) == 1
    assert sum("mmol/L" in passage or "mmHg" in passage for passage in passages) == 2
