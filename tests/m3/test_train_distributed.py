"""Several ranks: losses, gradients and runs are those of one process; checkpoints go from one number to another."""

from __future__ import annotations

import importlib.util
import json
import math
import multiprocessing
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import make_checkpoint
from train_cases import PRELOADED, draw_samples, free_port, with_one_thread

from m3.train.distributed import dealt
from m3.train.loop import Alone
from m3.train.metrics import read_metrics
from tests.m3.distributed_runs import PASSES, one_pass, one_run, rank

one_thread = pytest.fixture(autouse=True, scope="module")(with_one_thread)

TWICE = {"minibatches": 2, "epochs": 2}
RUN = {"objective": "spar", "source": "steady", "lacking": ["old_logprobs"], "changes": TWICE}
TAUGHT = {
    "objective": "mopd", "source": "steady", "lacking": ["teacher_logprobs", "ref_logprobs"],
    "teachers": ["general", "inquiry"], "changes": {"steps": 2, "max_tokens": 12},
}  # fmt: skip
JOBS: dict[str, dict[str, Any]] = {
    "begun-by-two": {**RUN, "at": 2},
    "failing": {**RUN, "source": "failing", "relayed": True},
}
STAGES = ("spar", "clip-forward-kl", "mopd")
EXACT = {"objective": "mopd", "source": "drawn"}
LONG_JOBS: dict[str, dict[str, Any]] = {
    "whole": RUN,
    "begun-by-one": {**RUN, "relayed": True},
    "given-up": {**RUN, "source": "slow", "relayed": True, "at": 2},
    "taught": TAUGHT,
    "spoilt": {"objective": "spar", "source": "spoilt"},
    "exact": EXACT,
    "halved": {**EXACT, "at": 3},
    "halved-resumed": {**EXACT, "folder": "halved"},
}
HAS_PEFT = importlib.util.find_spec("peft") is not None
needs_peft = pytest.mark.skipif(not HAS_PEFT, reason="needs peft")


@pytest.fixture(scope="module")
def one(llama, tmp_path_factory) -> Path:
    """The run of one process."""
    out = tmp_path_factory.mktemp("one")
    one_run(llama[0], out / "whole", Alone(), RUN)
    return out


@pytest.fixture(scope="module")
def two(llama, tmp_path_factory) -> Path:
    """The jobs of two ranks, done by one pair of processes."""
    out = tmp_path_factory.mktemp("two")
    together(llama[0], out, {name: PASSES[name] for name in STAGES} | JOBS)
    return out


@pytest.fixture(scope="module")
def two_long(llama, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("two-long")
    assert one_run(llama[0], out / "begun-by-one", Alone(), {**RUN, "at": 3}).signal == signal.SIGTERM
    passes = {name: case for name, case in PASSES.items() if HAS_PEFT or "lora" not in case}
    together(llama[0], out, {name: passes[name] for name in passes if name not in STAGES} | LONG_JOBS)
    return out


def together(folder: Path, out: Path, jobs: dict[str, dict[str, Any]]) -> None:
    """The jobs, done by two ranks."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    port = free_port()
    ranks = [context.Process(target=rank, args=(number, 2, port, str(folder), str(out), jobs)) for number in (0, 1)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(240)
    assert [process.exitcode for process in ranks] == [0, 0]


def ended(out: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads((out / name / f"ended-{number}.json").read_text()) for number in (0, 1)]


def state(out: Path) -> dict[str, torch.Tensor]:
    """Weights and moments of the last checkpoint."""
    place = max((out / "checkpoints").iterdir())
    return load_file(place / "model.safetensors") | load_file(place / "optimizer.safetensors")


def assert_same_run(first: Path, second: Path) -> None:
    """Metrics, weights and moments but for rounding, which AdamW enlarges where a gradient is about 0."""
    ours, theirs = state(first), state(second)
    assert ours.keys() == theirs.keys()
    apart = {name: float((ours[name] - value).norm() / value.norm().clamp(min=1e-9)) for name, value in theirs.items()}
    assert max(apart.values()) < 1e-4, apart
    for left, right in zip(*(read_metrics(out / "metrics.jsonl") for out in (first, second)), strict=True):
        assert left == pytest.approx(right, rel=1e-3, abs=1e-5)


# -- a pass -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("number", [0, 1])
def test_losses_and_gradients_are_those_of_one_process(llama, two, name, number):
    assert_same_pass(llama[0], two, name, number)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=needs_peft if "lora" in name else ()) for name in PASSES if name not in STAGES]
)  # fmt: skip
@pytest.mark.parametrize("number", [0, 1])
def test_so_are_those_of_other_models_and_batches(llama, two_long, name, number):
    assert_same_pass(llama[0], two_long, name, number)


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1])
def test_so_are_those_of_a_mixture_of_experts(tmp_path, number):
    make_checkpoint(tmp_path / "moe", "qwen3_moe")
    (tmp_path / "two").mkdir()
    together(tmp_path / "moe", tmp_path / "two", {"mopd": PASSES["mopd"]})
    assert_same_pass(tmp_path / "moe", tmp_path / "two", "mopd", number)


def assert_same_pass(folder: Path, two: Path, name: str, number: int) -> None:
    values, tensors = one_pass(folder, Alone(), name)
    found, theirs = torch.load(two / name / f"{number}.pt", weights_only=True)
    assert found == pytest.approx(values, rel=1e-5, abs=1e-6)
    assert theirs.keys() == tensors.keys()
    apart = {key: float((theirs[key] - value).norm() / value.norm().clamp(min=1e-6)) for key, value in tensors.items()}
    assert max(apart.values()) < 2e-5, apart
    assert values["loss"] != 0
    assert sum(key.startswith("gradient") and bool(value.any()) for key, value in tensors.items()) > 20


# -- a run ------------------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_a_run_of_two_ranks_is_that_of_one_process(one, two_long):
    assert_same_run(two_long / "whole", one / "whole")


def test_one_process_goes_on_where_two_ranks_stopped(llama, one, two):
    out = two / "begun-by-two"
    assert [(end["step"], end["signal"], end["model"]) for end in ended(two, "begun-by-two")] == [(3, 15, None)] * 2
    assert one_run(llama[0], out, Alone(), RUN).step == 6
    assert_same_run(out, one / "whole")


@pytest.mark.slow
def test_two_ranks_go_on_where_one_process_stopped(one, two_long):
    two = two_long
    assert [end["step"] for end in ended(two, "begun-by-one")] == [6, 6]
    assert_same_run(two / "begun-by-one", one / "whole")
    exported, own = (load_file(out / "model" / "model.safetensors") for out in (two / "begun-by-one", one / "whole"))
    assert exported.keys() == own.keys()
    for name, tensor in own.items():
        torch.testing.assert_close(exported[name], tensor, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_an_interrupted_run_of_two_ranks_is_an_unbroken_one_bit_for_bit(two_long):
    unbroken, resumed = two_long / "exact", two_long / "halved"
    assert [end["step"] for end in ended(two_long, "halved-resumed")] == [6, 6]
    assert (resumed / "metrics.jsonl").read_bytes() == (unbroken / "metrics.jsonl").read_bytes()
    for name in ("model.safetensors", "optimizer.safetensors", "state.json"):
        place = Path("checkpoints", "step-000006", name)
        assert (resumed / place).read_bytes() == (unbroken / place).read_bytes()


@pytest.mark.slow
def test_what_one_rank_meets_stops_all(two_long):
    told = [end["error"] for end in ended(two_long, "spoilt")]
    assert sorted("advantages: want finite numbers" in text for text in told) == [False, True]
    assert sorted("another rank has stopped" in text for text in told) == [False, True]


@pytest.mark.slow
def test_teachers_that_are_sharded_judge_as_whole_ones(llama, two_long, tmp_path):
    one_run(llama[0], tmp_path, Alone(), TAUGHT)
    assert [end["step"] for end in ended(two_long, "taught")] == [2, 2]
    assert_same_run(two_long / "taught", tmp_path)


@pytest.mark.slow
def test_a_signal_while_rank_0_makes_a_batch_gives_it_up_on_all(two_long):
    assert [(end["step"], end["signal"]) for end in ended(two_long, "given-up")] == [(2, 15), (2, 15)]
    assert [path.name for path in (two_long / "given-up" / "checkpoints").iterdir()] == ["step-000002"]


def test_a_source_that_fails_on_rank_0_leaves_a_checkpoint(two):
    told = [end["error"] for end in ended(two, "failing")]
    again = "distributed: the source of rank 0: ValueError('the patient has left')"
    assert told == ["the patient has left", again]
    assert [path.name for path in (two / "failing" / "checkpoints").iterdir()] == ["step-000002"]


@pytest.mark.slow
def test_torchrun_starts_the_ranks(llama, one, tmp_path):
    begin = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    jobs = json.dumps({"whole": RUN})
    subprocess.run([*begin, "-m", "tests.m3.distributed_runs", str(llama[0]), str(tmp_path), jobs], check=True)
    assert_same_run(tmp_path / "whole", one / "whole")


# -- who gets what ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
@pytest.mark.parametrize("max_tokens", [1, 20, 1000])
def test_every_sample_is_dealt_once_and_ranks_march_in_step(ranks, max_tokens):
    samples = draw_samples("dealt", (9, 4, 17, 12, 6, 30, 3))
    parts = dealt(samples, max_tokens, ranks)
    flat = [sample for mine in parts for part in mine for sample in part]
    assert sorted(one.id for one in flat if one.drawn) == sorted(one.id for one in samples if one.drawn)
    assert math.isclose(sum(float(one.mask.sum()) for one in flat), sum(float(one.mask.sum()) for one in samples))
    assert len({len(mine) for mine in parts}) == 1
    assert all(len(part) == 1 or sum(one.tokens for one in part) <= max_tokens for mine in parts for part in mine)


def test_the_tokens_are_dealt_evenly():
    samples = draw_samples("even", (40, 10, 10, 10, 10, 9, 9, 2))
    held = [sum(one.tokens for part in mine for one in part) for mine in dealt(samples, 1000, 2)]
    assert held == [51, 49]  # 40 and four of 10 are even, then 9 and 2 against 9


def test_a_rank_without_samples_has_one_without_weight():
    samples = draw_samples("few", (9, 4))
    shares = dealt(samples, 100, 3)
    assert [part[0].id for (part,) in shares] == ["few-0", "few-1", "few-1"]
    assert [bool(part[0].drawn) for (part,) in shares] == [True, True, False]


def test_nothing_to_deal_is_refused():
    with pytest.raises(ValueError, match="distributed: samples, ranks: want at least one of each; got 0, 2"):
        dealt([], 100, 2)
