"""Checkpoints: killed at any moment, on a full disk, damaged, and what comes back."""

from __future__ import annotations

import json
import multiprocessing
import random
import resource
import time

import pytest
import torch
from train_cases import PRELOADED, state, write_until_killed

from m3.train import checkpoint
from m3.train.optim import OptimConfig, Optimizer
from m3.train.policy_model import PolicyModel

KILLS, SIZE = 10, 500_000


@pytest.fixture(scope="module")
def processes():
    """Processes that begin with everything imported: they fork from a server."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def is_whole(found: checkpoint.State, step: int, size: int) -> bool:
    weights = {*found.model["weight"].tolist(), *found.optimizer["weight|exp_avg"].tolist()}
    told = {found.moment.step, found.updates, found.moment.source["step"], found.run["step"]}
    return weights | told == {step} and len(found.model["weight"]) == size


def test_killed_at_ten_moments_of_writing_there_is_always_one_to_load(processes, tmp_path):
    """The process does nothing but write; it is killed a little after a file of a checkpoint came to be."""
    chance, steps, torn = random.Random(0), [0], 0
    checkpoint.write(tmp_path, state(1, SIZE))
    for _ in range(KILLS):
        process = processes.Process(target=write_until_killed, args=(str(tmp_path), SIZE))
        process.start()
        while process.is_alive() and checkpoint.finished(tmp_path)[0][0] <= steps[-1] + 1:
            time.sleep(0.001)
        files = chance.randint(0, len(checkpoint.FILES))
        while process.is_alive() and len(list(tmp_path.glob(".writing-*/*"))) < files:
            time.sleep(0.0005)
        time.sleep(chance.uniform(0.0, 0.004))
        process.kill()
        process.join()
        assert process.exitcode == -9
        torn += any(path.name.startswith(".") for path in tmp_path.iterdir())
        newest = checkpoint.latest(tmp_path)
        found = checkpoint.load(newest)
        steps.append(found.moment.step)
        assert is_whole(found, steps[-1], SIZE)
    assert steps == sorted(set(steps)) and torn >= 3


@pytest.mark.parametrize(
    "sizes",
    [dict(size=9_000), dict(size=10, moments=9_000), dict(size=10, text=40_000)],
    ids=["model", "optimizer", "state"],
)
def test_a_full_disk_leaves_the_older_one_and_nothing_else(tmp_path, sizes):
    """No file may have more than 30 kB: the write fails at another file each time."""
    checkpoint.write(tmp_path, state(1, 100))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))
    try:
        with pytest.raises(OSError, match="too large"):
            checkpoint.write(tmp_path, state(2, **sizes))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]
    assert is_whole(checkpoint.load(checkpoint.latest(tmp_path)), 1, 100)


@pytest.mark.parametrize("file", checkpoint.FILES)
@pytest.mark.parametrize("damage", ["flipped", "cut", "gone"])
def test_a_damaged_one_is_named_and_never_loaded(tmp_path, file, damage):
    checkpoint.write(tmp_path, state(1, 50))
    path = checkpoint.write(tmp_path, state(2, 50)) / file
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    {"flipped": lambda: path.write_bytes(data), "cut": lambda: path.write_bytes(data[:-1]), "gone": path.unlink}[
        damage
    ]()
    with pytest.raises(ValueError, match=rf"step-000002/{file}: want the file of the manifest"):
        checkpoint.load(path.parent)
    with pytest.warns(checkpoint.DamagedCheckpointWarning, match=file):
        assert checkpoint.latest(tmp_path).name == "step-000001"


@pytest.mark.parametrize("text", [None, "", "{", "[]"], ids=["none", "empty", "torn", "list"])
def test_one_without_a_manifest_is_never_loaded(tmp_path, text):
    path = checkpoint.write(tmp_path, state(1, 50))
    (path / "manifest.json").unlink()
    if text is not None:
        (path / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match="step-000001/"):
        checkpoint.load(path)
    with pytest.warns(checkpoint.DamagedCheckpointWarning):
        assert checkpoint.latest(tmp_path) is None


def test_the_newest_are_kept_and_a_damaged_later_one_does_not_count(tmp_path):
    for step in (1, 2, 3, 9):
        checkpoint.write(tmp_path, state(step, 10), keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000003", "step-000009"]
    (tmp_path / "step-000009" / "manifest.json").write_text("{}")
    checkpoint.write(tmp_path, state(4, 10), keep=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000004", "step-000009"]
    checkpoint.write(tmp_path, state(9, 10), keep=2)
    assert is_whole(checkpoint.load(checkpoint.latest(tmp_path)), 9, 10)


def test_what_a_killed_process_left_is_swept(tmp_path):
    (tmp_path / ".writing-step-000007").mkdir()
    (tmp_path / ".removing-step-000001").mkdir()
    (tmp_path / "other").mkdir()
    checkpoint.write(tmp_path, state(1, 10))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "step-000001"]


@pytest.mark.parametrize("folder", ["absent", "."])
def test_there_is_none_to_begin_with(tmp_path, folder):
    assert checkpoint.latest(tmp_path / folder) is None


def test_weights_moments_and_generators_come_back(llama, tmp_path):
    model = PolicyModel.load(llama[0])
    optimizer = Optimizer(model, OptimConfig(lr=1e-2))
    loss = sum(one.square().sum() for _, one in model.trained())
    loss.backward()
    optimizer.step(1e-2)
    torch.manual_seed(5)
    random.seed(5)
    moment = checkpoint.moment(3, {"cursor": [1, 2]})
    path = checkpoint.write(tmp_path, checkpoint.state_of(model, optimizer, moment, {"a": 1}))
    drawn = torch.rand(3), random.random()

    other = PolicyModel.load(llama[0])
    resumed = Optimizer(other, OptimConfig(lr=1e-2))
    found = checkpoint.load(path)
    checkpoint.restore(found, other, resumed)
    assert (found.moment.step, dict(found.moment.source), dict(found.run)) == (3, {"cursor": [1, 2]}, {"a": 1})
    assert found.machine["threads"] == torch.get_num_threads() and resumed.updates == 1
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(model.trained(), other.trained(), strict=True))
    moments = optimizer.tensors()
    assert len(moments) == 3 * len(list(model.trained()))
    assert all(torch.equal(value, resumed.tensors()[name]) for name, value in moments.items())
    assert torch.equal(torch.rand(3), drawn[0]) and random.random() == drawn[1]


def test_a_state_of_another_model_is_refused_and_changes_nothing(llama, tmp_path):
    model = PolicyModel.load(llama[0])
    optimizer = Optimizer(model, OptimConfig())
    before = {name: one.clone() for name, one in model.trained()}
    with pytest.raises(ValueError, match="the parameters of the run's own model"):
        checkpoint.restore(state(1, 10), model, optimizer)
    assert all(torch.equal(before[name], one) for name, one in model.trained())


def test_another_format_is_refused(tmp_path):
    path = checkpoint.write(tmp_path, state(1, 10))
    told = json.loads((path / "state.json").read_text()) | {"format": 2}
    (path / "state.json").write_text(json.dumps(told))
    manifest = {file: checkpoint._described(path / file) for file in checkpoint.FILES}
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="format: want 1, of this version"):
        checkpoint.load(path)


def test_an_export_takes_the_place_of_the_one_before(llama, tmp_path):
    model = PolicyModel.load(llama[0])
    (llama[0] / "tokenizer.json").write_text("{}")
    checkpoint.export(model, tmp_path / "model")
    with torch.no_grad():
        model.head.weight.mul_(2)
    checkpoint.export(model, tmp_path / "model")
    (llama[0] / "tokenizer.json").unlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
    assert (tmp_path / "model" / "tokenizer.json").read_text() == "{}"
    assert torch.equal(PolicyModel.load(tmp_path / "model").head.weight, model.head.weight)
