"""Tokens of experts: against the router's own choices; which sequences are picked, and what is forced."""

from __future__ import annotations

import pytest
import torch
from tiny_models import make_checkpoint

from m3.models.loader import load_model
from m3.quantize.coverage import Coverage, ExpertTokens, count, counts_of, draw, pick


@pytest.fixture(scope="module")
def every_other(tmp_path_factory):
    folder = tmp_path_factory.mktemp("moe")
    return folder, make_checkpoint(folder, "qwen3_moe-every-other")


def test_counts_are_the_choices_of_transformers_router(every_other):
    folder, theirs = every_other
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(99, (13,), generator=generator) for _ in range(11)]
    found = count(load_model(folder), ids)
    assert found.layers == (1,)
    assert found.tokens == 143
    with torch.no_grad():
        logits = theirs(torch.stack(ids), output_router_logits=True).router_logits[0]
    chosen = logits.float().softmax(-1).topk(2).indices.view(11, 26)
    assert found.counts[:, 0].tolist() == [torch.bincount(row, minlength=6).tolist() for row in chosen]


def test_counts_of_two_sequences():
    ids = torch.tensor([[0, 2], [2, 1], [3, 2], [3, 1]])
    assert counts_of(ids, 2, 5).tolist() == [[1, 1, 2, 0, 0], [0, 1, 1, 2, 0]]


def test_a_model_without_experts_is_refused(llama):
    with pytest.raises(ValueError, match="a model with experts"):
        count(load_model(llama[0]), [torch.tensor([1, 2])])


def coverage_of(rows, tokens=100):
    return Coverage(layers=(3,), counts=torch.tensor(rows)[:, None], tokens=tokens)


def test_what_serves_rare_experts_is_picked_first():
    rows = [[9, 1, 0], [10, 0, 0], [8, 1, 1], [5, 0, 5], [9, 1, 0]]
    coverage = coverage_of(rows)
    assert pick(coverage, 2, 5) == [3, 0]  # 5 + 5, then one of the second expert's
    assert pick(coverage, 4, 5) == [3, 0, 2, 4]
    assert pick(coverage, 5, 0) == [0, 1, 2, 3, 4]  # nothing is asked for: as they come
    assert coverage.some([3, 0]).total().tolist() == [[14, 1, 5]]
    assert coverage.some([3, 0]).tokens == 40


@pytest.mark.parametrize("samples", [0, 6])
def test_as_many_as_there_are_can_be_picked(samples):
    with pytest.raises(ValueError, match=r"samples: want 1..5"):
        pick(coverage_of([[1, 1]] * 5), samples, 1)


def test_what_is_missing_is_forced():
    coverage = coverage_of([[9, 1, 0], [7, 2, 1]], tokens=20)
    assert coverage.forced(4).tolist() == [[0, 1, 3]]
    assert coverage.forced(50).tolist() == [[4, 17, 19]]  # there are no more tokens than that
    assert coverage.experts(4)[1] == ExpertTokens(layer=3, expert=1, routed=3, forced=1)
    assert [expert.forced_share for expert in coverage.experts(4)] == [0, 0.25, 0.75]


def test_the_same_map_is_the_same_file(tmp_path):
    coverage = coverage_of([[9, 1, 0], [7, 2, 1]])
    for name in ("a.png", "b.png"):
        draw(coverage, tmp_path / name, least=5)
    draw(coverage, tmp_path / "other.png", least=2)
    data = (tmp_path / "a.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert data == (tmp_path / "b.png").read_bytes()
    assert data != (tmp_path / "other.png").read_bytes()
