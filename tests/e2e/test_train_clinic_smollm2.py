"""Training on the clinic for real: SmolLM2-135M-Instruct, our own cases, through the command; killed, and going on.

The model is far too small to consult; what is tested is that two steps of each stage run and that a run that is killed
with -9 ends as one that was not, bit for bit.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
RECIPES = Path(__file__).parents[2] / "m3" / "recipes" / "smollm2_cpu"
SMALL = (
    "optim.steps=2", "source.groups=1", "source.rollouts=2", "source.max_turns=2", "source.samples=2",
    "rollout.max_tokens=16", 'source.stages=["inquiry"]',
)  # fmt: skip
STAGES = {"task-rl": "task_rl", "offline-distill": "distill", "mopd": "mopd"}


def command(stage: str, out: Path) -> list[str]:
    recipe = str(RECIPES / f"{STAGES[stage]}.toml")
    return [sys.executable, "-m", "m3", "train", stage, "-c", recipe, "-o", str(out), "--threads", "1", *SMALL]


def kill_after(path: Path, process: subprocess.Popen[bytes]) -> None:
    """Kill -9 as soon as ``path`` is there."""
    deadline = time.monotonic() + 1200
    while not path.exists():
        assert process.poll() is None and time.monotonic() < deadline, "the path comes before the end"
        time.sleep(0.05)
    process.kill()
    assert process.wait() == -signal.SIGKILL


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_that_is_killed_goes_on_as_if_it_had_not_been(stage, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    subprocess.run(command(stage, whole), check=True)
    kill_after(parts / "checkpoints" / "step-000001", subprocess.Popen(command(stage, parts)))
    subprocess.run(command(stage, parts), check=True)
    files = ["metrics.jsonl", "samples/step-000001.txt", "samples/step-000002.txt", "model/model.safetensors"]
    assert [(parts / file).read_bytes() == (whole / file).read_bytes() for file in files] == [True] * 4
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    text = (whole / "samples" / "step-000001.txt").read_text()
    if stage == "task-rl":
        assert all(abs(line["sampler_gap"]) < 1e-4 for line in lines)
    if stage != "offline-distill":
        assert "You are the physician" in text
        assert all(line["sampler_weight"] == pytest.approx(1, abs=1e-3) for line in lines)
    for said in re.findall(r"-- policy: .*\n((?:(?!-- |====).*\n)*)", text):  # only what the policy drew counts
        assert "<|im_start|>" not in said and said.count("<|im_end|>") <= 1
