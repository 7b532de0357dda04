"""``python -m bench.facts``: what does the fact-aware reward buy? The paper's Fig. 12 at small scale, by arm and seed.

Task: m3/train/tasks/advise.py.

    start         a small decoder from random weights, on answers of mediocre scripted writers
    arms          none, naive at several alphas, fact_aware (m3/train/tasks/advise_rl.py): same start, as many updates
    scripted T    a writer who names what is usual for the medicine where it holds with a chance of T or more: what can
                  be had without knowing the hidden answers, at every price
    held out      questions that no training has seen; noise the same for every model

Runs are resumable: what is done under ``--out`` is not done again. Intervals: 95 %, percentiles of a bootstrap that
resamples seeds and questions, jointly over what is compared; rates are of all claims of a resample.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import random
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench import record
from bench.learning import Values, resampled
from m3.rewards import fact_aware
from m3.train.loop import MODEL, TrainConfig, train
from m3.train.metrics import METRICS, read_metrics
from m3.train.optim import OptimConfig
from m3.train.policy_model import PolicyModel
from m3.train.stage import Source
from m3.train.tasks.advise import ASPECTS, CORE, WORDS, Score, every_question, good, score, text, write
from m3.train.tasks.advise_policy import ScriptedSource, decoder
from m3.train.tasks.advise_rl import COUNTS, MEASURES, AdviseConfig, AdviseSource, counts, evaluate, measures
from m3.train.tasks.consult_policy import write_tokenizer

START, HELD_OUT = "start", "held_out.json"
START_STEPS = 300
START_OPTIM = OptimConfig(lr=2e-3, warmup=20, schedule="cosine")
MAX_TOKENS = 1024  # of a microbatch: attention of packed sequences is quadratic in it
ANSWERS = 2  # to each held-out question
ALPHAS = (0.25, 1.0, 4.0)  # of Eq 9, which the paper does not give
Interval = tuple[float, float, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class FactsRow:
    """One arm over its seeds: mean and 95 % interval of each measure on the held-out questions.

    ``seconds``: of the processor, of one run. ``against``: difference to ``fact_aware``, seed by seed.
    """

    arm: str
    seeds: tuple[int, ...]
    steps: int
    lr: float
    tokens: tuple[int, ...]
    seconds: tuple[float, ...]
    questions: int
    held_out: Mapping[str, Interval]
    against: Mapping[str, Interval]
    by_seed: Mapping[str, tuple[float, ...]]
    commit: str
    dirty: bool
    machine: Mapping[str, object]
    date: str
    command: str


# -- runs -------------------------------------------------------------------------------------------------------------
def learn(source: Source, model: PolicyModel, config: TrainConfig, out: Path) -> float:
    """Train to the end; seconds of the processor."""
    begun = time.process_time()

    def told(done: int, steps: int, values: Mapping[str, float]) -> None:
        if done % 20 == 0:
            keys = ("loss", "reward", "hallucination", "claims", "peripheral", "steps")
            seen = " ".join(f"{key} {values[key]:.3f}" for key in keys if key in values)
            print(f"{out.name} {done} {seen} {time.process_time() - begun:.0f} s", flush=True)

    outcome = asyncio.run(train(source, model, config, out, decode=text, progress=told))
    if outcome.model is None:
        sys.exit(128 + (outcome.signal or 0))
    write_tokenizer(outcome.model, WORDS, "<s>")
    return time.process_time() - begun


def start(out: Path) -> Path:
    """The folder of the model that all arms start from; made if it is not there."""
    folder = out / START
    if not (folder / HELD_OUT).is_file():
        config = TrainConfig(steps=START_STEPS, max_tokens=MAX_TOKENS, optim=START_OPTIM, checkpoint_every=100)
        model = decoder()
        note(folder, model, learn(ScriptedSource(), model, config, folder), 0)
    return folder / MODEL


def config_of(arm: str, seed: int) -> AdviseConfig:
    """Of an arm as it is named here: naive has its alpha behind a colon."""
    name, _, alpha = arm.partition(":")
    facts = fact_aware.Config(alpha=float(alpha)) if alpha else fact_aware.Config()
    return AdviseConfig(arm=name, seed=seed, facts=facts)


def run(out: Path, arm: str, seed: int, steps: int, lr: float) -> None:
    """One run of an arm, unless it is there."""
    folder = out / folder_of(arm, seed)
    if (folder / HELD_OUT).is_file():
        return
    model = PolicyModel.load(start(out))
    config = TrainConfig(
        steps=steps, max_tokens=MAX_TOKENS, optim=OptimConfig(lr=lr), checkpoint_every=40, samples_every=40, seed=seed
    )
    seconds = learn(AdviseSource(model, config_of(arm, seed)), model, config, folder)
    note(folder, model, seconds, int(read_metrics(folder / METRICS)[-1]["tokens_so_far"]))


def folder_of(arm: str, seed: int) -> str:
    return f"{arm.replace(':', '_')}-{seed}"


def note(folder: Path, model: PolicyModel, seconds: float, tokens: int) -> None:
    """The held-out counts of a model, by question."""
    questions = every_question(held_out=True)
    values = values_of(asyncio.run(evaluate(model, questions * ANSWERS)), len(questions))
    told = {"values": values.tolist(), "seconds": seconds, "tokens": tokens}
    (folder / HELD_OUT).write_text(json.dumps(told), encoding="utf-8")


def values_of(scores: Sequence[Score], questions: int) -> Values:
    """(questions, COUNTS): means over the answers to each; answers to all questions one after the other."""
    return np.array([counts(one) for one in scores]).reshape(-1, questions, len(COUNTS)).mean(0)


def scripted(least: float) -> Values:
    """(1, questions, COUNTS) of the writer who takes no greater risk."""
    questions = every_question(held_out=True)
    answers = [write(question, good(least), random.Random(question.id)) for question in questions]
    return values_of([score(*pair) for pair in zip(questions, answers, strict=True)], len(questions))[None]


# -- numbers ----------------------------------------------------------------------------------------------------------
def measured(means: np.ndarray) -> np.ndarray:
    """(..., MEASURES) of (..., COUNTS)."""
    flat = [list(measures(dict(zip(COUNTS, row, strict=True))).values()) for row in means.reshape(-1, len(COUNTS))]
    return np.array(flat).reshape(*means.shape[:-1], len(MEASURES))


def intervals(values: Values, minus: Values | None = None) -> dict[str, Interval]:
    """(mean, low, high) of each measure, or of a difference: the same seeds and questions are drawn for both."""
    mean, draws = measured(values.mean((0, 1))), measured(resampled(values))
    if minus is not None:
        mean, draws = mean - measured(minus.mean((0, 1))), draws - measured(resampled(minus))
    low, high = np.percentile(draws, [2.5, 97.5], axis=0)
    return {
        name: (round(float(mean[at]), 4), round(float(low[at]), 4), round(float(high[at]), 4))
        for at, name in enumerate(MEASURES)
    }


def rows(out: Path, arms: Sequence[str], seeds: Sequence[int], steps: int, lr: float) -> list[FactsRow]:
    """Of what is done: scripted writers, the start, the arms."""
    commit, dirty = record.commit()
    told = {arm: [read(out / folder_of(arm, seed)) for seed in seeds] for arm in arms}
    told[START] = [read(out / START)]
    values = {arm: np.array([one["values"] for one in runs]) for arm, runs in told.items()}
    values |= {f"scripted {least:g}": scripted(least) for least in sorted({ASPECTS[at].usual for at in CORE})}
    ours = values.get("fact_aware")
    return [
        FactsRow(
            arm=arm,
            seeds=tuple(seeds) if arm in arms else (),
            steps=steps if arm in arms else 0,
            lr=lr,
            tokens=tuple(one["tokens"] for one in told.get(arm, ())),
            seconds=tuple(round(one["seconds"], 1) for one in told.get(arm, ())),
            questions=found.shape[1],
            held_out=intervals(found),
            against={} if ours is None or arm == "fact_aware" else intervals(ours, np.broadcast_to(found, ours.shape)),
            by_seed={
                name: tuple(round(float(one), 4) for one in measured(found.mean(1))[:, at])
                for at, name in enumerate(MEASURES)
            },
            commit=commit,
            dirty=dirty,
            machine=record.machine(),
            date=record.now(),
            command=f"python -m bench.facts {shlex.join(sys.argv[1:])}",
        )
        for arm, found in sorted(values.items(), key=lambda pair: _place(pair[0], arms))
    ]


def _place(arm: str, arms: Sequence[str]) -> tuple[int, int, str]:
    return (2, list(arms).index(arm), "") if arm in arms else (int(arm == START), 0, arm)


def read(folder: Path) -> dict[str, Any]:
    """What ``note`` wrote."""
    return json.loads((folder / HELD_OUT).read_text("utf-8"))


def table(found: Mapping[str, Mapping[str, Interval]], form: str = ".3f") -> str:
    """Markdown of intervals by row and measure."""
    lines = ["| | " + " | ".join(MEASURES).replace("_", " ") + " |", "|---" * (len(MEASURES) + 1) + "|"]
    for name, row in found.items():
        cells = [f"{mean:{form}} ({low:{form}}, {high:{form}})" for mean, low, high in row.values()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(out: Path, found: Sequence[FactsRow], shown: Sequence[str], path: Path) -> None:
    """Curves of training over updates, for the arms that are ``shown``; and all arms in the plane of the trade-off."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 4, figsize=(15, 3.8), constrained_layout=True)
    by_arm = {row.arm: row for row in found}
    for axis, name in zip(axes, ("reward", "hallucination", "claims"), strict=False):
        for colour, arm in enumerate(shown):
            runs = [read_metrics(out / folder_of(arm, seed) / METRICS) for seed in by_arm[arm].seeds]
            curves = np.array([[line[name] for line in one] for one in runs])
            smooth = np.array([np.convolve(one, np.ones(5) / 5, mode="valid") for one in curves])
            at = np.arange(smooth.shape[1]) + 3
            axis.plot(at, smooth.T, color=f"C{colour}", linewidth=0.4, alpha=0.6)
            axis.plot(at, smooth.mean(0), color=f"C{colour}", linewidth=1.8, label=arm)
        axis.set_title(f"{name}, training")
        axis.set_xlabel("updates")
    axes[0].legend()
    plane = axes[3]
    lines = {"naive": "C1", "scripted": "C7"}
    for kind, colour in lines.items():
        points = [at(row) for row in found if row.arm.startswith(kind)]
        plane.plot(*zip(*sorted(points), strict=True), color=colour, linewidth=0.8, zorder=0)
    colours = {"none": "C0", "fact_aware": "C2", START: "black"}
    for row in found:
        x, y = at(row)
        colour = colours.get(row.arm) or lines[row.arm.split(":")[0].split(" ")[0]]
        error = [[[abs(value[0] - value[side])] for side in (1, 2)] for value in both(row)]
        plane.errorbar(x, y, xerr=error[0], yerr=error[1], fmt="o", markersize=4, color=colour, linewidth=0.8)
        plane.annotate(row.arm, (x, y), textcoords="offset points", xytext=(4, 3), fontsize=7)
    plane.set_title("held out, 95 % intervals")
    plane.set_xlabel("hallucination")
    plane.set_ylabel("reward")
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=85)


def both(row: FactsRow) -> tuple[Interval, Interval]:
    return row.held_out["hallucination"], row.held_out["reward"]


def at(row: FactsRow) -> tuple[float, float]:
    """Its place in the plane of the trade-off."""
    return both(row)[0][0], both(row)[1][0]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--alphas", type=float, nargs="+", default=list(ALPHAS), help="of the naive penalty")
    parser.add_argument("--steps", type=int, default=120, help="updates of each run (default: 120)")
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--shown", type=float, default=1.0, help="alpha whose curve is drawn (default: 1)")
    parser.add_argument("--document", type=Path, help="write fact_aware.jsonl and .png there")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arms = ["none", *(f"naive:{alpha:g}" for alpha in arguments.alphas), "fact_aware"]
    for seed in arguments.seeds:
        for arm in arms:
            run(arguments.out, arm, seed, arguments.steps, arguments.lr)
    found = rows(arguments.out, arms, arguments.seeds, arguments.steps, arguments.lr)
    print(table({row.arm: row.held_out for row in found}), end="\n\n")
    print(table({f"fact_aware - {row.arm}": row.against for row in found if row.against}, "+.3f"))
    if arguments.document is not None:
        lines = [json.dumps(dataclasses.asdict(row)) + "\n" for row in found]
        (arguments.document / "fact_aware.jsonl").write_text("".join(lines), encoding="utf-8")
        shown = ["none", f"naive:{arguments.shown:g}", "fact_aware"]
        draw(arguments.out, found, shown, arguments.document / "fact_aware.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
