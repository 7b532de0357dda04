"""The bench of an update on a tiny model: arms agree on gradients before they have a time, and a wrong one has none."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl", reason="trl is not installed")
from trl_cases import WORDS, tiny_model, tokenizer

from bench import train

SHAPE = train.Shape(context=20, lengths=(40, 35, 28, 24), rollouts=2, drawn=4, patient=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    found = tmp_path_factory.mktemp("tiny")
    tiny_model().save_pretrained(found)
    tokenizer().save_pretrained(found)
    return str(found)


@pytest.fixture(scope="module")
def rows(folder: str) -> list[train.TrainRow]:
    return train.measure(folder, train.Plan(rounds=2, memory=False), "inquiry", SHAPE, lambda text: None)


def test_every_arm_has_the_gradients_of_trl(rows):
    assert [row.arm for row in rows] == list(train.ARMS)
    assert [row.gate for row in rows] == ["passed"] * 4
    assert all(row.error < 1e-5 for row in rows)


def test_rows_hold_what_was_measured(rows):
    ours = rows[0]
    assert (ours.tokens, ours.clock, ours.rounds) == (127, "processor", 2)
    assert ours.tokens_per_s == pytest.approx(127 / ours.median_s)
    assert set(ours.faster) == {"trl", "trl_1", "spar_trl"}
    assert "| inquiry | m3" in train.table(rows)


def test_consultation_has_steps_between_the_patients_words():
    shape = train.Shape(context=64, lengths=(152,), drawn=24, patient=40)
    one = train.Consultation.draw(shape, 0, len(WORDS))
    drawn = one.mask.tolist()
    assert drawn[:64] == [0] * 64
    assert drawn[64:152] == [1] * 24 + [0] * 40 + [1] * 24
    assert len({round(float(value), 5) for value in one.advantages[one.mask > 0]}) == 2
    assert not one.advantages[one.mask == 0].any()


def test_rollouts_share_their_context_alone():
    batch = [train.Consultation.draw(SHAPE, place, len(WORDS)) for place in range(4)]
    assert batch[0].ids[:20].equal(batch[1].ids[:20]) and batch[2].ids[:20].equal(batch[3].ids[:20])
    assert not batch[0].ids[:20].equal(batch[2].ids[:20])
    assert not batch[0].ids[20:28].equal(batch[1].ids[20:28])


def test_every_consultation_of_a_batch_ends_with_the_policys_words():
    ends = [
        bool(train.Consultation.draw(shape, place, len(WORDS)).mask[-1])
        for shape in train.SHAPES.values()
        for place in range(len(shape.lengths))
    ]
    assert all(ends)


def test_padding_keeps_contexts_and_completions_apart():
    shape = train.Shape(context=10, lengths=(20, 12))
    batch = [train.Consultation.draw(shape, place, len(WORDS)) for place in range(2)]
    batch[1] = dataclasses.replace(batch[1], context=6)
    found = train.padded(batch, pad=0)
    assert found["prompt_mask"].tolist() == [[1] * 10, [0] * 4 + [1] * 6]
    assert found["completion_mask"].tolist() == [[1] * 10, [1] * 6 + [0] * 4]
    assert found["prompt_ids"][1, 4:].equal(batch[1].ids[:6])
    assert found["advantages"][0].equal(batch[0].advantages[10:])


def test_arm_with_another_gradient_has_no_time(folder, monkeypatch):
    def wrong(self: Any) -> dict[str, torch.Tensor]:
        return {name: 1.01 * one.grad for name, one in self.model.trained()}

    monkeypatch.setattr(train.Ours, "named", wrong)
    plan = train.Plan(rounds=1, memory=False, arms=("m3", "trl"))
    ours, theirs = train.measure(folder, plan, "inquiry", SHAPE, lambda text: None)
    assert ours.gate == "failed: gradients differ by 1.0e-02"
    assert ours.median_s is None
    assert theirs.gate == "passed"


def test_missing_gradient_is_no_number():
    class Empty(train.UpdateArm):
        def named(self) -> dict[str, torch.Tensor]:
            return {}

    assert math.isnan(train.error_of(Empty(), {"weight": torch.ones(1)}))


@pytest.mark.slow
def test_peak_is_of_a_process_of_its_own(folder, tmp_path: Path):
    whole, update = train.peak("m3", folder, SHAPE, 1, 512)
    assert whole > update > 0
