"""Stage 2: mixtures of domains, epochs, Eq 2 restated on a tiny model, and going on where it was."""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import json
from pathlib import Path

import pytest
import torch
from tiny_models import make_checkpoint

from m3.algorithms import clip_forward_kl
from m3.train import objective
from m3.train.loop import train
from m3.train.offline_distill import OfflineDistill, OfflineDistillConfig
from m3.train.policy_model import PolicyModel
from m3.train.stage import StepBatch
from m3.train.streams import Sample, pack
from m3.train.trajectory_store import TrajectoryStore
from tests.m3.train_cases import config, draw_samples, with_one_thread

one_thread = pytest.fixture(scope="module", autouse=True)(with_one_thread)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TrajectoryStore:
    """Nine samples of one domain in three shards, three of another in one."""
    store = TrajectoryStore(tmp_path_factory.mktemp("store"))
    for number in range(3):
        made = draw_samples(f"i{number}", (9, 4, 17), streams=("teacher_logprobs",), temperature=0.7)
        store.append("inquiry", made, teacher="a", state={})
    store.append("general", draw_samples("g", (5, 8, 6), streams=("teacher_logprobs",)), teacher="b", state={})
    return store


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("student")
    make_checkpoint(folder, "llama")
    return folder


def batches(source: OfflineDistill, first: int = 0, count: int = 1000) -> list[StepBatch]:
    async def go() -> list[StepBatch]:
        found = []
        for step in range(first, first + count):
            if (batch := await source.batch(step)) is None:
                break
            found.append(batch)
        return found

    return asyncio.run(go())


def names(found: list[StepBatch]) -> list[str]:
    return [sample.id for batch in found for sample in batch.samples]


# -- mixtures ---------------------------------------------------------------------------------------------------------
def test_each_domain_comes_once_an_epoch_in_another_order(store):
    source = OfflineDistill(store, OfflineDistillConfig(batch_size=5, epochs=3, weights={"inquiry": 1}))
    found = batches(source)
    assert [len(batch.samples) for batch in found] == [5, 5, 5, 5, 5, 2] and source.steps == 6
    order = names(found)
    epochs = [order[i : i + 9] for i in (0, 9, 18)]
    assert all(sorted(one) == sorted(f"i{shard}-{row}" for shard in range(3) for row in range(3)) for one in epochs)
    assert len({tuple(one) for one in epochs}) == 3
    assert found[-1].metrics["epoch"] == 3


@pytest.mark.parametrize(("weights", "share"), [(None, 0.75), ({"inquiry": 1, "general": 4}, 0.2)])
def test_the_mixture_has_its_weights(store, weights, share):
    source = OfflineDistill(store, OfflineDistillConfig(batch_size=50, epochs=100, weights=weights))
    counts = collections.Counter(sample.domain for batch in batches(source) for sample in batch.samples)
    assert counts.total() == 1200
    assert counts["inquiry"] / 1200 == pytest.approx(share, abs=0.04)  # three deviations


def test_another_seed_is_another_order(store):
    orders = {tuple(names(batches(OfflineDistill(store, OfflineDistillConfig(seed=seed))))) for seed in (0, 0, 1)}
    assert len(orders) == 2


@pytest.mark.parametrize("done", [0, 1, 3])
def test_it_goes_on_where_its_state_was_taken(store, done):
    settings = OfflineDistillConfig(batch_size=5, epochs=2)
    unbroken = OfflineDistill(store, settings)
    batches(unbroken, 0, done)
    again = OfflineDistill(store, settings)
    again.load_state(json.loads(json.dumps(unbroken.state())))
    assert names(batches(again, done)) == names(batches(unbroken, done)) != []


def test_metrics_by_hand(store):
    [batch] = batches(OfflineDistill(store, OfflineDistillConfig(batch_size=12)))
    told = [v for s in batch.samples if s.domain == "general" for v in s.teacher_logprobs[s.mask > 0].tolist()]
    assert batch.metrics["teacher_nll/general"] == pytest.approx(-sum(told) / len(told))
    counted = collections.Counter(sample.domain for sample in batch.samples)
    assert {name: batch.metrics[f"samples/{name}"] for name in ("general", "inquiry")} == counted
    assert batch.metrics["epoch"] == 1


# -- the loss ---------------------------------------------------------------------------------------------------------
def restated(model: PolicyModel, samples: list[Sample], divergence: str) -> torch.Tensor:
    """Eq 2 token by token, one sequence at a time, from the model's own logits."""
    total, count = torch.zeros(()), 0.0
    for sample in samples:
        logits = model.causal(input_ids=sample.ids[None]).logits[0, :-1] / sample.temperature
        found = logits.log_softmax(-1).gather(1, sample.ids[1:, None])[:, 0]
        taught = torch.ones(len(found)) if divergence == "forward" else found.detach() < sample.teacher_logprobs[1:]
        total = total - (sample.mask[1:] * taught * found).sum()
        count += float(sample.mask.sum())
    return total / count


@pytest.mark.parametrize("divergence", ["clip_forward", "forward"])
def test_the_loss_of_a_batch_is_eq_2(store, folder, divergence):
    source = OfflineDistill(store, OfflineDistillConfig(divergence=divergence, batch_size=12))
    [batch] = batches(source)
    samples = list(batch.samples)
    stored = [store.sample(shard, row) for shard in store.shards for row in range(shard.samples)]
    by_id = {sample.id: sample for sample in stored}
    model = PolicyModel.load(folder)
    found, _ = objective.loss(source.objective, model, pack(samples), objective.normaliser(source.objective, samples))
    wanted = restated(model, [by_id[sample.id] for sample in samples], divergence)
    torch.testing.assert_close(found.detach(), wanted.detach(), atol=1e-5, rtol=1e-5)
    parameters = [parameter for _, parameter in model.trained()]
    for one, other in zip(torch.autograd.grad(found, parameters), torch.autograd.grad(wanted, parameters), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


def test_a_token_as_likely_as_under_its_teacher_is_not_taught(store, folder):
    model = PolicyModel.load(folder)
    [batch] = batches(OfflineDistill(store, OfflineDistillConfig(batch_size=12)))
    below = [
        dataclasses.replace(sample, teacher_logprobs=model.logprobs(pack([sample])) - 1e-3) for sample in batch.samples
    ]
    goal = objective.Objective(spec=clip_forward_kl.loss_spec())
    found, _ = objective.loss(goal, model, pack(below), 1.0)
    assert float(found.detach()) == 0


# -- refusals ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"divergence": "reverse"}, "divergence: want one of"),
        ({"batch_size": 0}, "batch_size: want at least 1"),
        ({"epochs": 0}, "epochs: want a number > 0"),
        ({"weights": {"inquiry": 0}}, "weights\\['inquiry'\\]: want a number > 0"),
        ({"weights": {"surgery": 1}}, "weights: want domains of the store, .*; got 'surgery'"),
    ],
)
def test_settings_that_cannot_be(store, settings, message):
    with pytest.raises(ValueError, match=message):
        OfflineDistill(store, OfflineDistillConfig(**settings))


def test_an_empty_store_is_refused(tmp_path):
    with pytest.raises(ValueError, match="want trajectories; got none"):
        OfflineDistill(TrajectoryStore(tmp_path))


def test_a_store_that_has_grown_is_another_run(tmp_path):
    with TrajectoryStore(tmp_path) as grows:
        grows.append("a", draw_samples("a", streams=("teacher_logprobs",)), teacher="a", state={})
        state = OfflineDistill(grows).state()
        OfflineDistill(grows).load_state(state)
        with pytest.raises(ValueError, match="seed = 1, where it was 0"):
            OfflineDistill(grows, OfflineDistillConfig(seed=1)).load_state(state)
        grows.append("a", draw_samples("b", streams=("teacher_logprobs",)), teacher="a", state={})
        with pytest.raises(ValueError, match="store = "):
            OfflineDistill(grows).load_state(state)


# -- the whole --------------------------------------------------------------------------------------------------------
def learn(folder: Path, store: TrajectoryStore, out: Path, steps: int) -> dict[str, torch.Tensor]:
    model = PolicyModel.load(folder)
    source = OfflineDistill(store, OfflineDistillConfig(batch_size=5, epochs=9))
    asyncio.run(train(source, model, config(steps=steps, optim=OPTIM), out, decode=str))
    return {name: tensor.clone() for name, tensor in model.tensors().items()}


OPTIM = dataclasses.replace(config().optim, schedule="constant")


def test_a_run_that_goes_on_is_one_that_was_not_interrupted(store, folder, tmp_path):
    learn(folder, store, tmp_path / "parts", 3)
    parts = learn(folder, store, tmp_path / "parts", 6)
    whole = learn(folder, store, tmp_path / "whole", 6)
    assert all(torch.equal(parts[name], whole[name]) for name in whole)
    lines = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("parts", "whole")]
    assert lines[0] == lines[1]
    rows = [json.loads(line) for line in lines[0].splitlines()]
    assert rows[5]["loss"] < rows[0]["loss"]
