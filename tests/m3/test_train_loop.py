"""The loop: what a killed run, a signal, a full disk, a number that is not finite leave, and what a step is made of."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import multiprocessing
import os
import resource
import signal
from pathlib import Path

import pytest
import torch
from train_cases import (
    OBJECTIVES,
    PRELOADED,
    STREAMS,
    DrawnSource,
    config,
    draw_samples,
    run,
    run_apart,
    with_one_thread,
)

from m3.train import checkpoint, objective
from m3.train.loop import MODEL, train
from m3.train.metrics import load_batch, read_metrics
from m3.train.optim import OptimConfig
from m3.train.policy_model import PolicyModel
from m3.train.stage import NonFiniteError, Objective, StepBatch
from m3kernels.policy_loss import LossSpec

one_thread = pytest.fixture(autouse=True, scope="module")(with_one_thread)

UPDATES = {"spar": {"minibatches": 2, "epochs": 2}, "mopd": {}, "clip-forward-kl": {}}


@pytest.fixture(scope="module")
def processes():
    """Processes that begin with everything imported: they fork from a server."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def apart(processes, folder: Path, out: Path, name: str, at: dict[int, int] | None = None, **changes) -> int | None:
    process = processes.Process(target=run_apart, args=(str(folder), str(out), name, at or {}, changes))
    process.start()
    process.join()
    return process.exitcode


def left(out: Path) -> dict[str, bytes]:
    """What must be the same, byte for byte."""
    last = out / "checkpoints" / "step-000006"
    files = [last / "model.safetensors", last / "optimizer.safetensors", last / "state.json", out / "metrics.jsonl"]
    return {path.name: path.read_bytes() for path in (*files, out / MODEL / "model.safetensors")}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, processes, llama):
    """By objective, what a run of six steps leaves; made when first asked for."""
    made: dict[str, dict[str, bytes]] = {}

    def of(name: str) -> dict[str, bytes]:
        if name not in made:
            out = tmp_path_factory.mktemp(name)
            assert apart(processes, llama[0], out, name, **UPDATES[name]) == 0
            made[name] = left(out)
        return made[name]

    return of


# -- interrupted ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "at"), [("spar", 5), ("clip-forward-kl", 3), pytest.param("mopd", 4, marks=pytest.mark.slow)]
)
def test_six_steps_are_three_kill_three(processes, unbroken, llama, tmp_path, name, at):
    assert apart(processes, llama[0], tmp_path, name, {at: signal.SIGKILL}, **UPDATES[name]) == -9
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000003"]
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == at
    assert apart(processes, llama[0], tmp_path, name, **UPDATES[name]) == 0
    assert left(tmp_path) == unbroken(name)


def test_the_weights_moved_and_every_step_has_its_line(unbroken, llama):
    lines = [json.loads(line) for line in unbroken("spar")["metrics.jsonl"].splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert len({line["memory"] for line in lines}) == 6 and all(line["grad_norm"] > 0 for line in lines)
    assert unbroken("spar")["model.safetensors"] != (llama[0] / "model.safetensors").read_bytes()


def test_sigterm_gives_the_batch_up_checkpoints_and_ends_with_143(processes, unbroken, llama, tmp_path):
    assert apart(processes, llama[0], tmp_path, "clip-forward-kl", {4: signal.SIGTERM}) == 143
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-000003", "step-000004"]
    assert not (tmp_path / MODEL).exists()
    assert apart(processes, llama[0], tmp_path, "clip-forward-kl") == 0
    assert left(tmp_path) == unbroken("clip-forward-kl")


def test_sigint_is_heard_and_the_handlers_are_given_back(llama, tmp_path):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    ended = run(llama[0], tmp_path, "mopd", at={1: signal.SIGINT})
    assert (ended.step, ended.signal, ended.model) == (1, signal.SIGINT, None)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    assert checkpoint.latest(tmp_path / "checkpoints").name == "step-000001"


def test_a_signal_during_an_update_lets_the_step_end(llama, tmp_path):
    model = PolicyModel.load(llama[0])
    source = DrawnSource(OBJECTIVES["mopd"], model)

    def heard_in_the_second_step(*call: object) -> None:
        if source.versions[-1] == 1:
            os.kill(os.getpid(), signal.SIGTERM)
            source.versions.append(-1)

    model.register_forward_hook(heard_in_the_second_step)
    ended = asyncio.run(train(source, model, config(), tmp_path))
    assert (ended.step, ended.signal) == (2, signal.SIGTERM)
    assert checkpoint.load(tmp_path / "checkpoints" / "step-000002").updates == 2


def test_a_signal_while_a_checkpoint_is_written_lets_it_end(llama, tmp_path, monkeypatch):
    own = checkpoint.write

    def heard(*call, **more):
        os.kill(os.getpid(), signal.SIGTERM)
        return own(*call, **more)

    monkeypatch.setattr(checkpoint, "write", heard)
    ended = run(llama[0], tmp_path, "mopd")
    assert (ended.step, ended.signal) == (3, signal.SIGTERM)
    assert checkpoint.load(tmp_path / "checkpoints" / "step-000003").updates == 3


def test_a_second_signal_ends_the_process_at_once(processes, llama, tmp_path):
    """The second comes while the source gives its batch up: nothing more is written."""
    assert apart(processes, llama[0], tmp_path, "mopd", {4: signal.SIGTERM}, stubborn=True) == -signal.SIGTERM
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000003"]


def test_another_number_of_threads_is_told(llama, tmp_path):
    run(llama[0], tmp_path, "mopd", steps=1, optim=OptimConfig())
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        with pytest.warns(UserWarning, match=f"'threads': {threads}.*last bits may differ"):
            run(llama[0], tmp_path, "mopd", steps=2, optim=OptimConfig())
    finally:
        torch.set_num_threads(threads)


def test_a_run_with_other_settings_is_refused(llama, tmp_path):
    run(llama[0], tmp_path, "mopd", steps=1)
    with pytest.raises(ValueError, match=r"settings of this one; it has .*steps = 1"):
        run(llama[0], tmp_path, "mopd", steps=2)
    with pytest.raises(ValueError, match=r"objective = .policy ratio_level=.token. clip=.none."):
        run(llama[0], tmp_path, "spar", steps=1)


def test_a_finished_run_ends_at_once_with_the_same_weights(llama, tmp_path):
    first = run(llama[0], tmp_path, "mopd", steps=2)
    weights = (first.model / "model.safetensors").read_bytes()
    assert run(llama[0], tmp_path, "mopd", steps=2) == first
    assert (first.model / "model.safetensors").read_bytes() == weights
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 2


def test_the_end_of_the_source_is_the_end(llama, tmp_path):
    model = PolicyModel.load(llama[0])
    source = DrawnSource(OBJECTIVES["mopd"], model, batches=2)
    seen = []
    ended = asyncio.run(
        train(source, model, config(), tmp_path, progress=lambda done, steps, metrics: seen.append((done, steps)))
    )
    assert (ended.step, ended.signal) == (2, None)
    assert seen == [(1, 6), (2, 6)] and source.versions == [0, 1, 2]
    loaded = PolicyModel.load(ended.model)
    assert all(torch.equal(value, loaded.tensors()[name]) for name, value in model.tensors().items())


def test_what_a_source_raises_ends_the_run_with_a_checkpoint(llama, tmp_path):
    model = PolicyModel.load(llama[0])

    class Failing(DrawnSource):
        async def batch(self, step: int) -> StepBatch | None:
            if step == 2:
                raise ConnectionError("the judge is gone")
            return await super().batch(step)

    with pytest.raises(ConnectionError, match="the judge is gone"):
        asyncio.run(train(Failing(OBJECTIVES["mopd"], model), model, config(), tmp_path))
    assert checkpoint.latest(tmp_path / "checkpoints").name == "step-000002"
    assert run(llama[0], tmp_path, "mopd").step == 6


def test_a_full_disk_ends_the_run_and_leaves_the_last_checkpoint(llama, tmp_path):
    run(llama[0], tmp_path, "mopd", steps=3, optim=OptimConfig())
    before = {path.name: path.read_bytes() for path in (tmp_path / "checkpoints" / "step-000003").iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before["model.safetensors"]) - 1, hard))
    try:
        with pytest.raises(OSError, match="too large"):
            run(llama[0], tmp_path, "mopd", steps=6, optim=OptimConfig())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    left = list((tmp_path / "checkpoints").iterdir())
    assert [path.name for path in left] == ["step-000003"]
    assert {path.name: path.read_bytes() for path in left[0].iterdir()} == before
    assert run(llama[0], tmp_path, "mopd", steps=6, optim=OptimConfig()).step == 6


# -- numbers that are not finite --------------------------------------------------------------------------------------
class SpoiltSource(DrawnSource):
    """One value of the third batch is not a number."""

    stream = "advantages"

    async def batch(self, step: int) -> StepBatch | None:
        found = await super().batch(step)
        if step == 2:
            sample = found.samples[1]
            place = int(sample.mask.nonzero()[0, 0])
            getattr(sample, self.stream)[place] = torch.nan
        return found


def test_a_nan_in_a_stream_stops_the_run_with_the_batch_saved(llama, tmp_path):
    model = PolicyModel.load(llama[0])
    source = SpoiltSource(OBJECTIVES["spar"], model)
    with pytest.raises(NonFiniteError, match=r"step 3: train: advantages.*failed-step-000003.pt"):
        asyncio.run(train(source, model, config(checkpoint_every=1), tmp_path))
    samples, why = load_batch(tmp_path / "failed-step-000003.pt")
    assert "advantages" in why and len(samples) == 5
    assert [bool(sample.advantages.isnan().any()) for sample in samples] == [False, True, False, False, False]
    newest = checkpoint.latest(tmp_path / "checkpoints")
    saved = checkpoint.load(newest)
    assert newest.name == "step-000002"
    assert all(torch.equal(saved.model[name], one) for name, one in model.trained())


def test_a_loss_that_is_not_finite_stops_the_run_before_its_update(llama, tmp_path):
    model = PolicyModel.load(llama[0])
    source = DrawnSource(OBJECTIVES["spar"], model)
    with torch.no_grad():
        model.causal.model.norm.weight[0] = torch.inf
    before = {name: one.clone() for name, one in model.trained()}
    with pytest.raises(NonFiniteError, match=r"step 1: loss: want a finite number; got nan in microbatch 0"):
        asyncio.run(train(source, model, config(), tmp_path))
    assert all(torch.equal(before[name], one) for name, one in model.trained())
    assert len(load_batch(tmp_path / "failed-step-000001.pt")[0]) == 5


# -- what a step is made of -------------------------------------------------------------------------------------------
def one_step(folder: Path, out: Path, spec: Objective, streams: tuple[str, ...], **more) -> tuple[PolicyModel, dict]:
    """(model, metrics) after one step; with such an eps an update does not magnify the rounding of small gradients."""
    model = PolicyModel.load(folder)
    source = DrawnSource(spec, model, streams=streams)
    changes = {name: more.pop(name) for name in ("minibatches", "epochs", "max_tokens") if name in more}
    optim = OptimConfig(lr=1e-3, eps=1e-3)
    asyncio.run(train(source, model, config(steps=1, optim=optim, **changes), out, **more))
    return model, read_metrics(out / "metrics.jsonl")[0]


def without(*names: str) -> tuple[str, ...]:
    return tuple(name for name in STREAMS if name not in names)


def test_old_logprobs_are_taken_once_before_the_first_update(llama, tmp_path):
    """At the second pass the ratio is that of the moved policy to the one before: not 1, and clipped."""
    spec = Objective(spec=LossSpec(clip_low=1e-6, clip_high=1e-6))
    one, first = one_step(llama[0], tmp_path / "one", spec, without("old_logprobs"))
    two, both = one_step(llama[0], tmp_path / "two", spec, without("old_logprobs"), epochs=2)
    assert first["ratio_max"] == 1 and first["clip_low"] == first["clip_high"] == 0
    assert both["ratio_max"] > 1.001 and both["clip_low"] + both["clip_high"] > 0.1
    assert any(not torch.equal(a, b) for (_, a), (_, b) in zip(one.trained(), two.trained(), strict=True))


def test_a_second_update_of_mopd_is_relative_to_the_policy_as_it_is_then(llama, tmp_path):
    """Two passes over a batch, against two steps that are each given it: A_t and w_t are those of pi, not of old_pi."""
    samples = draw_samples("m", streams=without("old_logprobs"))

    class Same(DrawnSource):
        async def batch(self, step: int) -> StepBatch | None:
            return StepBatch(step=step, samples=samples)

    made = []
    for steps, epochs in ((1, 2), (2, 1)):
        model = PolicyModel.load(llama[0])
        settings = config(steps=steps, epochs=epochs, optim=OptimConfig(lr=1e-2, eps=1e-3))
        asyncio.run(train(Same(OBJECTIVES["mopd"], model), model, settings, tmp_path / f"{epochs}"))
        made.append(model)
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(*(one.trained() for one in made), strict=True))


def test_old_logprobs_of_the_trainer_are_those_that_a_sample_would_bring(llama, tmp_path):
    """Two minibatches without old log-probabilities, against the same with those of the untouched model."""
    spec = OBJECTIVES["spar"]

    class Filled(DrawnSource):
        async def batch(self, step: int) -> StepBatch | None:
            found = await super().batch(step)
            told = objective.with_logprobs("old_logprobs", found.samples, self.model)
            return dataclasses.replace(found, samples=told)

    model = PolicyModel.load(llama[0])
    source = Filled(spec, model, streams=without("old_logprobs"))
    small = config(steps=1, minibatches=2, optim=OptimConfig(lr=1e-3, eps=1e-3))
    asyncio.run(train(source, model, small, tmp_path / "told"))
    other, _ = one_step(llama[0], tmp_path / "own", spec, without("old_logprobs"), minibatches=2)
    for (name, a), (_, b) in zip(model.trained(), other.trained(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=3e-5, msg=name)


def test_the_reference_and_the_teachers_fill_what_is_missing(llama, tmp_path):
    """KL to the model itself is 0; to a teacher of the sample's domain it is not."""
    spec = Objective(spec=LossSpec(kl_coef=0.1))
    itself, other = PolicyModel.load(llama[0]), PolicyModel.load(llama[0])
    with torch.no_grad():
        other.head.weight.mul_(1.5)
    streams = without("old_logprobs", "ref_logprobs")
    _, same = one_step(llama[0], tmp_path / "same", spec, streams, reference=itself)
    teachers = {"inquiry": other, "general": itself}
    _, apart = one_step(llama[0], tmp_path / "apart", spec, streams, teachers=teachers)
    assert abs(same["kl"]) < 1e-9 and apart["kl"] > 1e-3
    _, distilled = one_step(
        llama[0], tmp_path / "distilled", OBJECTIVES["clip-forward-kl"], without("teacher_logprobs"),
        teachers={"inquiry": itself, "general": itself},
    )  # fmt: skip
    assert distilled["loss"] < 0.1 * same["tokens"]


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("spar", "advantages"),
        ("ppo", "ref_logprobs"),
        ("ppo", "sampler_logprobs"),
        ("clip-forward-kl", "teacher_logprobs"),
    ],
)
def test_a_stream_that_nobody_can_give_is_named(llama, tmp_path, name, missing):
    with pytest.raises(ValueError, match=f"train: {missing}: want a stream of every sample"):
        one_step(llama[0], tmp_path, OBJECTIVES[name], without(missing))


def test_microbatches_of_a_step_add_up(llama, tmp_path):
    one, whole = one_step(llama[0], tmp_path / "whole", OBJECTIVES["ppo"], STREAMS, max_tokens=1000)
    many, parts = one_step(llama[0], tmp_path / "parts", OBJECTIVES["ppo"], STREAMS, max_tokens=1)
    assert parts["tokens"] == whole["tokens"] and parts["ratio_max"] == pytest.approx(whole["ratio_max"], rel=1e-4)
    for name in ("loss", "grad_norm", "kl", "entropy", "sampler_weight", "clip_low"):
        assert parts[name] == pytest.approx(whole[name], rel=2e-4), name
    for (name, a), (_, b) in zip(one.trained(), many.trained(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=3e-5, msg=name)


def test_the_files_of_a_run(llama, tmp_path):
    run(llama[0], tmp_path, "spar", steps=2)
    names = ["checkpoints", "metrics.jsonl", "model", "run.lock", "samples", "timings.jsonl"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    text = (tmp_path / "samples" / "step-000002.txt").read_text()
    assert text.count("==== ") == 4 and "-- policy: step 0" in text and "advantage" in text
    metrics, timings = (read_metrics(tmp_path / name)[1] for name in ("metrics.jsonl", "timings.jsonl"))
    assert "draw_seconds" in timings and "draw_seconds" not in metrics
    assert timings["tokens_per_second"] > 0 and metrics["samples"] == 5 and metrics["tokens_packed"] == 48
    assert metrics["tokens"] == metrics["tokens_drawn"] < 48


def test_a_batch_of_too_few_samples_for_its_minibatches(llama, tmp_path):
    with pytest.raises(ValueError, match="at least 9 samples; got 5"):
        one_step(llama[0], tmp_path, OBJECTIVES["spar"], STREAMS, minibatches=9)


def test_a_source_that_gives_another_step_is_refused(llama, tmp_path):
    model = PolicyModel.load(llama[0])

    class Ahead(DrawnSource):
        async def batch(self, step: int) -> StepBatch | None:
            return await super().batch(step + 1)

    with pytest.raises(ValueError, match="want the batch of step 0; got that of 1"):
        asyncio.run(train(Ahead(OBJECTIVES["mopd"], model), model, config(), tmp_path))
