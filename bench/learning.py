"""``python -m bench.learning``: does TaskRL learn, and what does SPAR's credit buy? By arm and seed.

Task: m3/train/tasks/consult.py.

    start      a small decoder from random weights, on consultations of mediocre scripted physicians
    arms       grpo, global_penalty, spar (m3/train/tasks/consult_rl.py): the same start, the same drawn tokens
    held out   cases that no training has seen; one consultation each, noise the same for every model

Runs are resumable: what is done under ``--out`` is not done again. Intervals: 95 %, percentiles of a bootstrap that
resamples seeds and cases, jointly over what is compared. Rows and a figure of the curves go to a document.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench import record
from m3.train.loop import MODEL, TrainConfig, train
from m3.train.metrics import METRICS, read_metrics
from m3.train.optim import OptimConfig
from m3.train.policy_model import PolicyModel
from m3.train.stage import Source
from m3.train.tasks.consult import GOOD, Habits, Score, consult, draw_cases, text
from m3.train.tasks.consult_policy import ScriptedSource, decoder, write_tokenizer
from m3.train.tasks.consult_rl import ARMS, MEASURES, ConsultConfig, ConsultSource, evaluate

DOCUMENT = record.ROOT / "docs" / "experiments"
START, RANDOM = "start", "random weights"
HELD_OUT = "held_out.json"
START_STEPS = 400
START_OPTIM = OptimConfig(lr=2e-3, warmup=20, schedule="cosine")
MAX_TOKENS = 1024  # of a microbatch
DRAWS = 2000  # of the bootstrap
Values = np.ndarray  # (seeds, cases, measures)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LearningRow:
    """One arm over its seeds: mean and 95 % interval of each measure on the held-out cases.

    ``seconds``: of the processor, of one run. ``over_start``: difference to the start, case by case.
    """

    arm: str
    seeds: tuple[int, ...]
    steps: tuple[int, ...]
    tokens: tuple[int, ...]
    seconds: tuple[float, ...]
    cases: int
    held_out: Mapping[str, tuple[float, float, float]]
    over_start: Mapping[str, tuple[float, float, float]]
    by_seed: Mapping[str, tuple[float, ...]]
    commit: str
    dirty: bool
    machine: Mapping[str, object]
    date: str
    command: str


# -- runs -------------------------------------------------------------------------------------------------------------
def learn(source: Source, model: PolicyModel, config: TrainConfig, out: Path, name: str) -> float:
    """Train to the end; seconds of the processor."""
    begun = time.process_time()

    def told(done: int, steps: int, values: Mapping[str, float]) -> None:
        if done % 10 == 0:
            keys = ("loss", "reward", "repeat_score", "logical_score", "turns")
            seen = " ".join(f"{key} {values[key]:.3f}" for key in keys if key in values)
            print(f"{name} {done} {seen} {time.process_time() - begun:.0f} s", flush=True)

    outcome = asyncio.run(train(source, model, config, out, decode=text, progress=told))
    if outcome.model is None:
        sys.exit(128 + (outcome.signal or 0))
    write_tokenizer(outcome.model)
    return time.process_time() - begun


def start(out: Path) -> Path:
    """The folder of the model that all arms start from; made if it is not there."""
    folder = out / START
    if not (folder / HELD_OUT).is_file():
        config = TrainConfig(steps=START_STEPS, max_tokens=MAX_TOKENS, optim=START_OPTIM, checkpoint_every=100)
        model = decoder()
        seconds = learn(ScriptedSource(), model, config, folder, START)
        note(folder, model, seconds, steps=START_STEPS)
    return folder / MODEL


def run(out: Path, arm: str, seed: int, tokens: int, lr: float) -> None:
    """One run of an arm, unless it is there."""
    folder = out / f"{arm}-{seed}"
    if (folder / HELD_OUT).is_file():
        return
    model = PolicyModel.load(start(out))
    source = ConsultSource(model, ConsultConfig(arm=arm, tokens=tokens, seed=seed))
    optim = OptimConfig(lr=lr)
    config = TrainConfig(
        steps=100_000, max_tokens=MAX_TOKENS, optim=optim, checkpoint_every=25, samples_every=25, seed=seed
    )
    seconds = learn(source, model, config, folder, f"{arm}-{seed}")
    last = read_metrics(folder / METRICS)[-1]
    note(folder, model, seconds, steps=int(last["step"]), tokens=int(last["tokens_so_far"]))


def note(folder: Path, model: PolicyModel, seconds: float, **more: Any) -> None:
    """The held-out scores of a model, by case."""
    scores = asyncio.run(evaluate(model, held_out()))
    told = {"values": values_of(scores).tolist(), "seconds": seconds, **more}
    (folder / HELD_OUT).write_text(json.dumps(told), encoding="utf-8")


def held_out(count: int = 256) -> list[Any]:
    return draw_cases(count, "held out", held_out=True)


def values_of(scores: Sequence[Score]) -> Values:
    """(cases, measures)."""
    return np.array([[measure(score) for measure in MEASURES.values()] for score in scores])


# -- numbers ----------------------------------------------------------------------------------------------------------
def resampled(values: Values, seed: int = 0) -> np.ndarray:
    """(DRAWS, measures) means of seeds and cases drawn with replacement; the same draws for equal shapes."""
    chance = np.random.default_rng(seed)
    seeds, cases, measures = values.shape
    found = np.empty((DRAWS, measures))
    for index in range(DRAWS):
        some = values[chance.integers(seeds, size=seeds)].mean(0)
        found[index] = some[chance.integers(cases, size=cases)].mean(0)
    return found


def intervals(values: Values) -> dict[str, tuple[float, float, float]]:
    """(mean, low, high) of each measure."""
    low, high = np.percentile(resampled(values), [2.5, 97.5], axis=0)
    mean = values.mean((0, 1))
    return {
        name: (round(float(mean[at]), 4), round(float(low[at]), 4), round(float(high[at]), 4))
        for at, name in enumerate(MEASURES)
    }


def read(out: Path, arm: str, seeds: Sequence[int]) -> tuple[Values, list[dict[str, Any]]]:
    told = [json.loads((out / f"{arm}-{seed}" / HELD_OUT).read_text("utf-8")) for seed in seeds]
    return np.array([one["values"] for one in told]), told


def rows(out: Path, arms: Sequence[str], seeds: Sequence[int]) -> list[LearningRow]:
    """Of what is done: scripted physicians, random weights, the start, the arms, and differences of arms to SPAR."""
    commit, dirty = record.commit()
    first = json.loads((out / START / HELD_OUT).read_text("utf-8"))
    base = np.array([first["values"]])
    random = values_of(asyncio.run(evaluate(decoder(), held_out())))[None]
    found: list[tuple[str, Values, list[dict[str, Any]]]] = [
        ("scripted, good", scripted(GOOD), []),
        ("scripted, mediocre", scripted(Habits()), []),
        (RANDOM, random, []),
        (START, base, [first]),
        *((arm, *read(out, arm, seeds)) for arm in arms),
    ]
    return [
        LearningRow(
            arm=arm,
            seeds=tuple(seeds) if arm in arms else (),
            steps=tuple(one["steps"] for one in told),
            tokens=tuple(one["tokens"] for one in told if "tokens" in one),
            seconds=tuple(round(one["seconds"], 1) for one in told),
            cases=values.shape[1],
            held_out=intervals(values),
            over_start=intervals(values - base),
            by_seed={
                name: tuple(round(float(one), 4) for one in values.mean(1)[:, at]) for at, name in enumerate(MEASURES)
            },
            commit=commit,
            dirty=dirty,
            machine=record.machine(),
            date=record.now(),
            command=f"python -m bench.learning {shlex.join(sys.argv[1:])}",
        )
        for arm, values, told in found
    ]


def scripted(habits: Habits) -> Values:
    import random

    return values_of([consult(case, habits, random.Random(f"physician {case.id}"))[1] for case in held_out()])[None]


def table(found: Mapping[str, Mapping[str, tuple[float, float, float]]], form: str = ".3f") -> str:
    """Markdown of intervals by row and measure."""
    lines = [
        "| | " + " | ".join(name.replace("_", " ") for name in MEASURES) + " |",
        "|---" * (len(MEASURES) + 1) + "|",
    ]
    for name, row in found.items():
        cells = [f"{mean:{form}} ({low:{form}}, {high:{form}})" for mean, low, high in row.values()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def against(
    out: Path, arms: Sequence[str], seeds: Sequence[int], other: str = "spar"
) -> dict[str, dict[str, tuple[float, float, float]]]:
    """``other`` minus each arm, seed by seed and case by case."""
    mine, _ = read(out, other, seeds)
    return {f"{other} - {arm}": intervals(mine - read(out, arm, seeds)[0]) for arm in arms if arm != other}


def draw(out: Path, arms: Sequence[str], seeds: Sequence[int], path: Path) -> None:
    """Curves of training over drawn tokens: thin lines the runs, thick ones their mean."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = ("reward", "repeat_score", "logical_score", "turns", "diagnosis", "phrasing_score")
    figure, axes = pyplot.subplots(2, 3, figsize=(10, 5.5), sharex=True, constrained_layout=True)
    for at, name in enumerate(shown):
        axis = axes.flat[at]
        for colour, arm in enumerate(arms):
            runs = [read_metrics(out / f"{arm}-{seed}" / METRICS) for seed in seeds]
            curves = [([line["tokens_so_far"] for line in one], [line[name] for line in one]) for one in runs]
            grid = np.linspace(max(one[0][0] for one in curves), min(one[0][-1] for one in curves), 60)
            for tokens, values in curves:
                axis.plot(np.array(tokens) / 1000, values, color=f"C{colour}", linewidth=0.4, alpha=0.5)
            mean = np.mean([np.interp(grid, tokens, values) for tokens, values in curves], axis=0)
            axis.plot(grid / 1000, mean, color=f"C{colour}", linewidth=1.8, label=arm.replace("_", " "))
        axis.set_title(name.replace("_", " "))
        axis.grid(alpha=0.3)
    for axis in axes[1]:
        axis.set_xlabel("thousand drawn tokens")
    axes.flat[0].legend()
    figure.savefig(path, dpi=90)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--tokens", type=int, default=100_000, help="drawn in each run (default: 100000)")
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--document", type=Path, help=f"write spar_small.jsonl and .png there, as {DOCUMENT}")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for seed in arguments.seeds:
        for arm in arguments.arms:
            run(arguments.out, arm, seed, arguments.tokens, arguments.lr)
    found = rows(arguments.out, arguments.arms, arguments.seeds)
    print(table({row.arm: row.held_out for row in found}), end="\n\n")
    print(table({f"{row.arm} - {START}": row.over_start for row in found if row.arm in arguments.arms}, "+.3f"))
    if "spar" in arguments.arms:
        print("\n" + table(against(arguments.out, arguments.arms, arguments.seeds), "+.3f"))
    if arguments.document is not None:
        lines = [json.dumps(dataclasses.asdict(row)) + "\n" for row in found]
        (arguments.document / "spar_small.jsonl").write_text("".join(lines), encoding="utf-8")
        draw(arguments.out, arguments.arms, arguments.seeds, arguments.document / "spar_small.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
