"""What a run leaves to look at: lines of numbers, samples as text, a batch that failed."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from train_cases import draw_samples

from m3.train.metrics import RunLog, load_batch, read_metrics, sample_text, save_batch, told_by
from m3.train.streams import Sample

SAMPLE = Sample(
    id="case-1/inquiry/0",
    ids=torch.tensor([7, 8, 9, 10, 11, 12]),
    mask=torch.tensor([0.0, 0.0, 1.0, 1.0, 0.0, 1.0]),
    steps=torch.tensor([-1, -1, 0, 0, -1, 1]),
    advantages=torch.tensor([0.0, 0.0, 0.5, 0.5, 0.0, -0.25]),
    old_logprobs=torch.tensor([9.0, 9.0, -1.0, -2.0, 9.0, -3.0]),
    sampler_logprobs=torch.tensor([0.0, 0.0, -1.0, -1.5, 0.0, -2.5]),
    domain="inquiry",
    group="case-1",
    reward=0.75,
    gammas={0: 1.0, 1: 0.1},
    note={"violations": "redundant_question"},
)


def test_a_sample_reads_step_by_step():
    assert sample_text(SAMPLE, lambda ids: " ".join(map(str, ids))) == "\n".join(
        [
            "==== case-1/inquiry/0: domain inquiry, group case-1, rollout 0, reward 0.750, 3 of 6 tokens count",
            "     violations: redundant_question",
            "-- not counted: given, 2 tokens",
            "7 8",
            "-- policy: step 0, 2 tokens, gamma 1, advantage +0.500",
            "9 10",
            "-- not counted: given, 1 tokens",
            "11",
            "-- policy: step 1, 1 tokens, gamma 0.1, advantage -0.250",
            "12",
            "",
        ]
    )


def test_samples_tell_their_means_by_hand():
    bare = dataclasses.replace(SAMPLE, reward=0.25, advantages=-SAMPLE.advantages)
    told = told_by([SAMPLE, bare])
    assert told == {
        "samples": 2, "tokens_packed": 12, "tokens_drawn": 6, "reward": 0.5, "advantage": 0.0,
        "sampler_gap": pytest.approx(1 / 3),
    }  # fmt: skip


def test_what_some_samples_lack_has_no_mean():
    told = told_by([SAMPLE, dataclasses.replace(SAMPLE, advantages=None, sampler_logprobs=None, reward=None)])
    assert told == {"samples": 2, "tokens_packed": 12, "tokens_drawn": 6, "reward": 0.75}


def test_lines_after_the_step_and_torn_ones_are_dropped_at_a_resume(tmp_path):
    log = RunLog(tmp_path, tensorboard=False)
    for step in (1, 2, 3):
        log.step(step, {"loss": step / 3, "judge_seconds": 0.5}, {"tokens_per_second": 7.0})
    log.close()
    first = (tmp_path / "metrics.jsonl").read_bytes()
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 4, "lo')
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 3
    log = RunLog(tmp_path, tensorboard=False)
    log.begin(2)
    log.step(3, {"loss": 1.0}, {"tokens_per_second": 7.0})
    assert (tmp_path / "metrics.jsonl").read_bytes() == first
    assert read_metrics(tmp_path / "timings.jsonl")[0] == {"step": 1, "judge_seconds": 0.5, "tokens_per_second": 7.0}
    assert json.loads(first.splitlines()[0]) == {"step": 1, "loss": 1 / 3}


def test_a_run_has_one_writer(tmp_path):
    log = RunLog(tmp_path, tensorboard=False)
    with pytest.raises(ValueError, match="want a run that no process has open; got one that is going on"):
        RunLog(tmp_path, tensorboard=False)
    log.close()
    RunLog(tmp_path, tensorboard=False).close()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "3"])
def test_a_metric_is_a_finite_number(tmp_path, value):
    with pytest.raises(ValueError, match="metrics: reward: want a finite number"):
        RunLog(tmp_path, tensorboard=False).step(1, {"reward": value}, {})
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_failed_batch_comes_back_as_it_was(tmp_path):
    samples = [SAMPLE, *draw_samples()]
    save_batch(tmp_path / "failed.pt", samples, "loss: nan")
    found, why = load_batch(tmp_path / "failed.pt")
    assert why == "loss: nan" and [one.id for one in found] == [one.id for one in samples]
    for one, other in zip(found, samples, strict=True):
        assert torch.equal(one.ids, other.ids) and torch.equal(one.mask, other.mask)
        assert torch.equal(one.advantages, other.advantages)
        assert (one.gammas, one.note, one.reward) == (other.gammas, other.note, other.reward)


def test_tensorboard_has_the_numbers(tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="needs tensorboard")
    log = RunLog(tmp_path)
    log.begin(0)
    log.step(1, {"loss": 0.5}, {"tokens_per_second": 7.0})
    log.close()
    found = reader.EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    assert [(one.step, one.value) for one in found.Scalars("loss")] == [(1, 0.5)]
    assert [one.value for one in found.Scalars("tokens_per_second")] == [7.0]
