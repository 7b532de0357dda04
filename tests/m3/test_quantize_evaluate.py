"""Perplexity, KL and their intervals against their definitions; hidden states in files."""

from __future__ import annotations

import math
import resource

import pytest
import torch

from m3.quantize.evaluate import Tally
from m3.quantize.states import States, write_states


def logits_of(rows, vocabulary=11, seed=0):
    return 2 * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed))


def same(hidden):
    return hidden


def test_against_the_definitions():
    tally, kl, loss, equal, count = Tally(), 0.0, [0.0, 0.0], 0.0, 0
    for seed, length in ((1, 2), (2, 9), (3, 300)):  # 300: more rows than are held at a time
        full = logits_of(length, seed=seed)
        other = full + 0.3 * logits_of(length, seed=seed + 9)
        tokens = torch.randint(11, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
        tally.add(full, other, (same, same), tokens)
        p, q = (one.double().log_softmax(-1) for one in (full, other))
        for row, token in enumerate(tokens[1:]):
            loss[0] -= float(p[row, token])
            loss[1] -= float(q[row, token])
            kl += float((p[row].exp() * (p[row] - q[row])).sum())
            equal += float(p[row].argmax() == q[row].argmax())
            count += 1
    found = tally.result()
    assert (found.tokens, found.passages) == (count, 3)
    assert found.perplexity.mean == pytest.approx(math.exp(loss[0] / count), rel=1e-6)
    assert found.perplexity_quantised.mean == pytest.approx(math.exp(loss[1] / count), rel=1e-6)
    assert found.kl.mean == pytest.approx(kl / count, rel=1e-5)
    assert found.same_top.mean == pytest.approx(equal / count)
    assert found.kl.low < found.kl.mean < found.kl.high


def test_a_model_beside_itself():
    tally = Tally()
    tally.add(logits_of(5), logits_of(5), (same, same), [1, 2, 3, 4, 5])
    found = tally.result()
    assert (found.kl.mean, found.kl.high, found.same_top.low) == (0.0, 0.0, 1.0)
    assert found.perplexity == found.perplexity_quantised


def test_an_interval_holds_the_mean_it_estimates():
    inside = 0
    for run in range(40):
        tally = Tally()
        for passage in range(30):
            scale = float(torch.rand(1, generator=torch.Generator().manual_seed(1000 * run + passage)))
            full = torch.zeros(3, 2)
            tally.add(full, full + torch.tensor([scale, 0.0]), (same, same), [0, 0, 0])
        kl = tally.result().kl
        inside += kl.low < 0.0407 < kl.high  # the mean over scales in [0, 1): log(cosh(scale / 2))
    assert 33 <= inside <= 40


def test_no_passage_and_short_ones_are_refused():
    with pytest.raises(ValueError, match="passages: want one or more"):
        Tally().result()
    with pytest.raises(ValueError, match="tokens: want 2 or more"):
        Tally().add(logits_of(1), logits_of(1), (same, same), [3])


def test_states_come_back(tmp_path):
    sequences = [torch.randn(length, 6) for length in (3, 1, 4)]
    write_states(tmp_path / "states.bin", iter(sequences))
    found = States(tmp_path / "states.bin", (3, 1, 4), 6)
    assert len(found) == 3
    assert all(torch.equal(one, other) for one, other in zip(found, sequences, strict=True))
    assert torch.equal(found[1:][1], sequences[2])


def test_states_of_another_size_are_refused(tmp_path):
    write_states(tmp_path / "states.bin", [torch.zeros(3, 6)])
    with pytest.raises(ValueError, match="want 96 bytes; got 72"):
        States(tmp_path / "states.bin", (4,), 6)


def test_a_full_disk_names_the_file(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"File too large: '.*states.bin'"):
            write_states(tmp_path / "states.bin", [torch.zeros(100, 6)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not (tmp_path / "states.bin").exists()
