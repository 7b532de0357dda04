"""The three stages through the command line: killed and gone on with, and by two ranks of torchrun."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file
from train_cases import free_port

from m3.train.loop import TrainConfig, train
from m3.train.metrics import read_metrics
from m3.train.optim import OptimConfig
from m3.train.tasks.consult_policy import ScriptedSource, decoder

pytestmark = pytest.mark.slow
STAGES = ("task-rl", "offline-distill", "mopd")
RECIPE = """
stage = "{stage}"
seed = 1
[model]
name = "{start}"
teachers = {teachers}
[source]
kind = "consult"
groups = 4
rollouts = 4
[optim]
steps = 6
lr = 1e-4
warmup = 2
minibatches = 2
[checkpoint]
every = 3
tensorboard = false
[scale]
max_tokens = 256
"""
RUN = [sys.executable, "-m", "m3"]


@pytest.fixture(scope="module")
def starts(tmp_path_factory) -> tuple[Path, Path]:
    """A decoder that earns rewards now and then, and one that has learnt for longer."""
    out = tmp_path_factory.mktemp("starts")
    model, found = decoder(), []
    for steps in (40, 20):
        config = TrainConfig(steps=steps, optim=OptimConfig(lr=3e-3), checkpoint_every=100, tensorboard=False)
        ended = asyncio.run(train(ScriptedSource(seed=steps, batch=32), model, config, out / f"{steps}"))
        assert ended.model is not None
        found.append(ended.model)
    return found[0], found[1]


@pytest.fixture
def recipe(starts, tmp_path):
    """The file of a stage's recipe."""

    def of(stage: str) -> Path:
        start, teacher = starts
        teachers = "{}" if stage == "task-rl" else f'{{ chest = "{teacher}", belly = "{start}" }}'
        path = tmp_path / f"{stage}.toml"
        path.write_text(RECIPE.format(stage=stage, start=start, teachers=teachers))
        return path

    return of


def begin(command: list[str], stage: str, recipe: Path, out: Path, *changes: str) -> subprocess.Popen[str]:
    told = [*command, "train", stage, "-c", str(recipe), "-o", str(out), *changes]
    return subprocess.Popen(
        told, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=240)
    return process.returncode, out, err


def two_ranks() -> list[str]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    return [*torchrun, "--master-port", str(free_port()), "-m", "m3"]


def until(path: Path, process: subprocess.Popen[str]) -> None:
    while not path.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)


def left(out: Path) -> dict[str, bytes]:
    """What must be the same, byte for byte."""
    last = out / "checkpoints" / "step-000006"
    named = ("model.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json")
    files = [*(last / name for name in named), out / "metrics.jsonl"]
    return {path.name: path.read_bytes() for path in files} | {
        "exported": (out / "model" / "model.safetensors").read_bytes()
    }


@pytest.mark.parametrize("stage", STAGES)
def test_six_steps_are_three_kill_three(recipe, tmp_path, stage):
    file = recipe(stage)
    assert ended(begin(RUN, stage, file, tmp_path / "whole"))[0] == 0
    process = begin(RUN, stage, file, tmp_path / "killed")
    until(tmp_path / "killed" / "checkpoints" / "step-000003", process)
    process.kill()
    assert ended(process)[0] == -9
    assert [path.name for path in (tmp_path / "killed" / "checkpoints").glob("step-*")] == ["step-000003"]
    assert ended(begin(RUN, stage, file, tmp_path / "killed"))[0] == 0
    assert left(tmp_path / "killed") == left(tmp_path / "whole")
    lines = read_metrics(tmp_path / "whole" / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6] and all(line["grad_norm"] > 0 for line in lines)


@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_of_torchrun_are_one_process_and_go_on_where_it_stopped(recipe, tmp_path, stage):
    """Six steps by one, by one and then two, by two and then one: but for rounding all are the same."""
    file = recipe(stage)
    runs = {"one": [RUN], "one-two": [RUN, two_ranks()], "two-one": [two_ranks(), RUN]}
    for name, commands in runs.items():
        steps = [[], []] if len(commands) == 1 else [["optim.steps=3"], []]
        for command, changes in zip(commands, steps, strict=False):
            code, out, err = ended(begin(command, stage, file, tmp_path / name, *changes))
            assert code == 0, err
            assert out.count("steps") == 1
    whole = {name: load_file(tmp_path / name / "model" / "model.safetensors") for name in runs}
    start = load_file(Path(file.read_text().split('name = "')[1].split('"')[0]) / "model.safetensors")
    for name in ("one-two", "two-one"):
        for key, value in whole["one"].items():
            moved = float((value - start[key]).norm())
            assert float((whole[name][key] - value).norm()) < 0.02 * moved, (name, key)
        pairs = zip(*(read_metrics(tmp_path / one / "metrics.jsonl") for one in ("one", name)), strict=True)
        for ours, theirs in pairs:
            assert theirs == pytest.approx(ours, rel=1e-3, abs=1e-5)


def test_sigterm_to_torchrun_leaves_a_checkpoint_and_the_same_command_goes_on(recipe, tmp_path):
    file = recipe("task-rl")
    process = begin(two_ranks(), "task-rl", file, tmp_path / "run", "optim.steps=1000")
    until(tmp_path / "run" / "checkpoints" / "step-000003", process)
    process.send_signal(signal.SIGTERM)
    assert ended(process)[0] != 0
    steps = len(read_metrics(tmp_path / "run" / "metrics.jsonl"))
    assert (tmp_path / "run" / "checkpoints" / f"step-{steps:06d}").exists()
    code, _, err = ended(begin(two_ranks(), "task-rl", file, tmp_path / "run", f"optim.steps={steps + 1}"))
    assert code == 0, err
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == steps + 1


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (["optim.lr=0.5"], "want the recipe that the run began with"),
        (["optim.steps=4"], "another run"),
        (["rollout.temperature=0"], "rollout.temperature"),
    ],
    ids=["rank 0 alone", "all ranks", "before they join"],
)
def test_what_ends_two_ranks_is_told_once(recipe, tmp_path, changes, told):
    file = recipe("offline-distill")
    first = ["optim.steps=1", "optim.schedule=linear"] if "steps" in changes[0] else ["optim.steps=1"]
    assert ended(begin(RUN, "offline-distill", file, tmp_path / "run", *first))[0] == 0
    if len(first) > 1:
        (tmp_path / "run" / "recipe.json").unlink()
    code, _, err = ended(begin(two_ranks(), "offline-distill", file, tmp_path / "run", *changes))
    assert code != 0
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and told in lines[0], err
    assert err.count("Traceback") <= 1, err  # torchrun's own
