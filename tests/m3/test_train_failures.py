"""What can break a run: what ends it says why, loses no step that was done, and leaves what goes on exactly."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import make_checkpoint
from train_cases import OBJECTIVES, DrawnSource, config, draw_sample, run, with_one_thread

from m3.train import checkpoint, objective
from m3.train.loop import Outcome, train
from m3.train.metrics import load_batch, read_metrics
from m3.train.optim import OptimConfig
from m3.train.policy_model import LoraConfig, PolicyModel
from m3.train.stage import NonFiniteError, StepBatch

one_thread = pytest.fixture(autouse=True, scope="module")(with_one_thread)

STEADY = OptimConfig(lr=1e-3)  # of a run whose length is not part of it
THIRD = 2  # the step whose batch is spoilt


def left(out: Path, step: int) -> dict[str, bytes]:
    files = [path for path in (out / "checkpoints" / f"step-{step:06d}").iterdir() if path.name != "manifest.json"]
    return {path.name: path.read_bytes() for path in (*files, out / "metrics.jsonl")}


@contextlib.contextmanager
def no_file_over(size: int) -> Iterator[None]:
    """As on a disk with so many bytes left."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class Spoilt(DrawnSource):
    """The third batch is not what it should be."""

    what = ""

    async def batch(self, step: int) -> StepBatch | None:
        found = await super().batch(step)
        if step != THIRD or found is None:
            return found
        samples, metrics = list(found.samples), dict(found.metrics)
        if self.what == "empty":
            samples = []
        elif self.what == "masked":
            samples = [dataclasses.replace(one, mask=torch.zeros_like(one.mask)) for one in samples]
        elif self.what == "metric":
            metrics["turns"] = float("nan")
        elif self.what == "reward":
            samples[1] = dataclasses.replace(samples[1], reward=float("inf"))
        elif self.what == "advantage":
            place = int(samples[1].mask.nonzero()[0, 0])
            samples[1].advantages[place] = torch.inf  # type: ignore[index]
        return StepBatch(step=step, samples=samples, metrics=metrics)

    async def updated(self, step: int, version: int) -> None:
        if self.what == "refresh" and version == THIRD:
            raise ConnectionError("the engine is gone")
        await super().updated(step, version)


def spoilt(folder: Path, out: Path, what: str) -> Outcome:
    model = PolicyModel.load(folder)
    source = Spoilt(OBJECTIVES["mopd"], model)
    source.what = what
    return asyncio.run(train(source, model, config(steps=4, checkpoint_every=10, optim=STEADY), out))


# -- what ends a run --------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def unbroken(llama, tmp_path_factory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("unbroken")
    assert spoilt(llama[0], out, "").step == 4
    return left(out, 4)


@pytest.mark.parametrize(
    ("what", "kind", "told"),
    [
        ("empty", ValueError, "at least 1 samples; got 0"),
        ("masked", ValueError, "mask: want a token that counts in some sample; got none in 5"),
        ("metric", ValueError, "metrics: turns: want a finite number; got nan"),
        ("reward", ValueError, r"metrics: reward of '2-.*': want a finite number; got inf"),
        ("advantage", NonFiniteError, r"step 3: train: advantages: want finite numbers.*failed-step-000003.pt"),
        ("refresh", ConnectionError, "the engine is gone"),
    ],
)
def test_the_steps_before_are_kept_and_gone_on_from(llama, tmp_path, unbroken, what, kind, told):
    """No checkpoint was due: the one of the steps that were done is written before the error is raised."""
    with pytest.raises(kind, match=told):
        spoilt(llama[0], tmp_path, what)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000002"]
    assert spoilt(llama[0], tmp_path, "").step == 4
    assert left(tmp_path, 4) == unbroken
    if what == "advantage":
        samples, why = load_batch(tmp_path / "failed-step-000003.pt")
        assert [bool(one.advantages.isinf().any()) for one in samples] == [False, True, False, False, False]
        assert "advantages" in why


def test_an_update_that_was_taken_is_not_checkpointed_as_the_step_before(llama, tmp_path, monkeypatch):
    """The second minibatch of the first step fails: weights are those of no step."""
    model, calls = PolicyModel.load(llama[0]), []
    own = objective.loss

    def failing(*arguments: Any, **more: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise MemoryError("too many logits")
        return own(*arguments, **more)

    monkeypatch.setattr(objective, "loss", failing)
    settings = config(steps=4, minibatches=2, max_tokens=1000, checkpoint_every=10, optim=STEADY)
    with pytest.raises(MemoryError):
        asyncio.run(train(DrawnSource(OBJECTIVES["mopd"], model), model, settings, tmp_path))
    assert not (tmp_path / "checkpoints").exists()


# -- the folder of a run ----------------------------------------------------------------------------------------------
def test_a_run_whose_checkpoints_are_all_damaged_is_not_begun_anew(llama, tmp_path):
    run(llama[0], tmp_path, "mopd", steps=2, checkpoint_every=1, optim=STEADY)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    for path in (tmp_path / "checkpoints").glob("*/model.safetensors"):
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    with (
        pytest.warns(checkpoint.DamagedCheckpointWarning),
        pytest.raises(ValueError, match=r"want a checkpoint that is whole, or none.*; got 2 damaged"),
    ):
        run(llama[0], tmp_path, "mopd", steps=4, optim=STEADY)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_a_second_process_is_refused_before_it_reads_or_writes(llama, tmp_path):
    """The other run is of other settings: who has the lock is asked first."""
    model = PolicyModel.load(llama[0])

    class Nested(DrawnSource):
        async def batch(self, step: int) -> StepBatch | None:
            if step == 2:
                before = (tmp_path / "metrics.jsonl").read_bytes()
                with pytest.raises(ValueError, match="want a run that no process has open; got one that is going on"):
                    await train(DrawnSource(OBJECTIVES["spar"], model), model, config(), tmp_path)
                assert (tmp_path / "metrics.jsonl").read_bytes() == before
            return await super().batch(step)

    nested = Nested(OBJECTIVES["mopd"], model)
    assert asyncio.run(train(nested, model, config(steps=3, checkpoint_every=1), tmp_path)).step == 3


def test_a_run_that_could_not_begin_leaves_the_folder_free(llama, tmp_path):
    run(llama[0], tmp_path, "mopd", steps=1)
    for _ in range(2):
        with pytest.raises(ValueError, match="settings of this one"):
            run(llama[0], tmp_path, "spar", steps=1)
    assert run(llama[0], tmp_path, "mopd", steps=1).step == 1


def test_a_full_disk_during_the_export_is_named_and_leaves_the_model_before(llama, tmp_path):
    first = run(llama[0], tmp_path, "mopd", steps=2, optim=STEADY)
    weights = first.model / "model.safetensors"
    before = weights.read_bytes()
    with no_file_over(len(before) - 1), pytest.raises(OSError, match=rf"checkpoint: {tmp_path / 'model'}: .*too large"):
        run(llama[0], tmp_path, "mopd", steps=2, optim=STEADY)
    assert weights.read_bytes() == before and not list(tmp_path.glob(".*"))


def test_a_batch_that_cannot_be_saved_does_not_hide_why_the_run_ended(llama, tmp_path):
    """Room for the lines of metrics, but not for the batch."""
    with (
        no_file_over(2000),
        pytest.raises(NonFiniteError, match=r"step 1: .*advantages.*could not be saved: .*File too"),
    ):
        model = PolicyModel.load(llama[0])

        class Always(DrawnSource):
            async def batch(self, step: int) -> StepBatch | None:
                found = await super().batch(step)
                found.samples[0].advantages.fill_(torch.nan)  # type: ignore[union-attr]
                return found

        asyncio.run(train(Always(OBJECTIVES["spar"], model), model, config(), tmp_path))
    assert not list(tmp_path.glob("failed-*"))


def test_a_sample_named_in_no_unicode_is_written_all_the_same(llama, tmp_path):
    class Named(DrawnSource):
        async def batch(self, step: int) -> StepBatch | None:
            found = await super().batch(step)
            samples = [dataclasses.replace(one, id="\ud800 病例", note={"case": "\udfff"}) for one in found.samples]
            return dataclasses.replace(found, samples=samples)

        def state(self) -> dict[str, Any]:
            return {"memory": self.memory, "last": "\ud800 病例"}

    model = PolicyModel.load(llama[0])
    settings = config(steps=2, checkpoint_every=1)
    asyncio.run(train(Named(OBJECTIVES["mopd"], model), model, settings, tmp_path, decode=str))
    assert "病例" in (tmp_path / "samples" / "step-000002.txt").read_text(encoding="utf-8")
    newest = checkpoint.latest(tmp_path / "checkpoints")
    assert checkpoint.load(newest).moment.source["last"] == "\ud800 病例"


# -- what goes on exactly ---------------------------------------------------------------------------------------------
VARIANTS: dict[str, dict[str, Any]] = {
    "adapters": {"lora": LoraConfig(rank=2)},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "bf16": {"dtype": torch.bfloat16},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_other_models_go_on_bit_for_bit(llama, tmp_path, name):
    """Four steps, and two and two; ``keep`` is 1, and steps are added after the end."""
    if name == "adapters":
        pytest.importorskip("peft", reason="needs peft")
    for out, steps in (("whole", (4,)), ("parts", (2, 4))):
        for end in steps:
            torch.manual_seed(0)  # adapters are drawn
            model = PolicyModel.load(llama[0], **VARIANTS[name])
            settings = config(steps=end, keep=1, checkpoint_every=2, optim=STEADY)
            source = Steady(OBJECTIVES["spar"], model)
            assert asyncio.run(train(source, model, settings, tmp_path / out)).step == end
    assert left(tmp_path / "parts", 4) == left(tmp_path / "whole", 4)
    assert [path.name for path in (tmp_path / "parts" / "checkpoints").iterdir()] == ["step-000004"]


class Steady(DrawnSource):
    """Reads weights that adapters leave as they are, too."""

    async def updated(self, step: int, version: int) -> None:
        self.seen = float(sum(one.double().sum() for one in self.model.tensors().values()))


@pytest.mark.parametrize("tokens", [2, 200], ids=["two tokens", "more than a microbatch holds"])
def test_the_shortest_and_the_longest_sample(llama, tmp_path, tokens):
    """A sample of two tokens, the second drawn, and one longer than ``max_tokens``, beside others."""

    class Odd(DrawnSource):
        async def batch(self, step: int) -> StepBatch | None:
            found = await super().batch(step)
            odd = draw_sample("odd", tokens)
            if tokens == 2:
                odd = dataclasses.replace(odd, mask=torch.tensor([0.0, 1.0]), steps=torch.tensor([-1, 0]))
            return dataclasses.replace(found, samples=[odd, *found.samples])

    lines = []
    for out, most in (("small", 24), ("large", 1000)):
        model = PolicyModel.load(llama[0])
        settings = config(steps=1, max_tokens=most, optim=OptimConfig(lr=1e-3, eps=1e-3))
        asyncio.run(train(Odd(OBJECTIVES["ppo"], model), model, settings, tmp_path / out))
        lines += read_metrics(tmp_path / out / "metrics.jsonl")
    assert lines[0]["tokens"] == lines[1]["tokens"] and lines[0]["samples"] == 6
    assert lines[0]["loss"] == pytest.approx(lines[1]["loss"], rel=1e-4)
    assert lines[0]["grad_norm"] == pytest.approx(lines[1]["grad_norm"], rel=1e-3)


@pytest.mark.skipif(os.getuid() == 0, reason="nothing is read-only to this user")
def test_a_folder_that_is_read_only_is_named(llama, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError, match=r"run\.lock"):
        run(llama[0], tmp_path, "mopd", steps=1)


@pytest.mark.slow
def test_a_mixture_of_experts_goes_on_bit_for_bit(tmp_path):
    make_checkpoint(tmp_path / "moe", "qwen3_moe")
    for out, steps in (("whole", (4,)), ("parts", (2, 4))):
        for end in steps:
            model = PolicyModel.load(tmp_path / "moe")
            settings = config(steps=end, checkpoint_every=2, optim=STEADY)
            asyncio.run(train(DrawnSource(OBJECTIVES["spar"], model), model, settings, tmp_path / out))
    assert left(tmp_path / "parts", 4) == left(tmp_path / "whole", 4)
