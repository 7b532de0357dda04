"""Numbers and figure of bench/fusion.py: rewards of each model in both departments, differences, curves over epochs.

Intervals: 95 %, percentiles of a bootstrap that resamples seeds and cases, jointly over what is compared; of entropies
and divergences, which are means over tokens, of the seeds alone.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench import learning, record
from bench.fusion import ARMS, CURVE, DONE, LOSSES, MOPDS, REWARD, Plan, read_curve
from m3.train.metrics import METRICS, read_metrics
from m3.train.tasks.consult import DEPARTMENTS

ROWS = record.RESULTS / "train" / "fusion.jsonl"  # not a row of kernels: the report of those reads the folder above
COLUMNS = (*DEPARTMENTS, "both")
EXPERTS = "experts, each at home"
CLOSENESS = ("entropy", "teacher_entropy", "forward_kl", "reverse_kl", "nll", "nll_seen")
COMPARED = ("forward_kl", "reverse_kl", "entropy", "overfit")
Interval = tuple[float, float, float]  # mean and 95 %


@dataclasses.dataclass(frozen=True, kw_only=True)
class FusionRow:
    """One model over the seeds, on the held-out cases.

    Args:
        arm: of bench/fusion.py; with "@ n" a distillation after n epochs.
        reward: by department, and the mean of both. over_start, over_experts: differences case by case; the expert is
            that of the case's department. by_seed: of ``reward``.
        closeness: means of both departments, in nats a token, on the experts' own held-out trajectories. ``taught``:
            share of the tokens with a gradient, in the epoch before.
        seconds: of the processor, of one run.
    """

    arm: str
    seeds: tuple[int, ...]
    cases: int
    steps: tuple[int, ...]
    tokens: tuple[int, ...]
    seconds: tuple[float, ...]
    reward: Mapping[str, Interval]
    over_start: Mapping[str, Interval]
    over_experts: Mapping[str, Interval]
    by_seed: Mapping[str, tuple[float, ...]]
    closeness: Mapping[str, Interval]
    commit: str
    dirty: bool
    machine: Mapping[str, object]
    date: str
    command: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Found:
    """``rewards``: (seeds, cases, 3), as COLUMNS. ``closeness``: name to (seeds,). ``told``: of each run."""

    rewards: np.ndarray
    closeness: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    told: Sequence[Mapping[str, Any]] = ()


# -- what is done -----------------------------------------------------------------------------------------------------
def columns(rewards: Mapping[str, Sequence[Sequence[float]]]) -> np.ndarray:
    """(seeds, cases, 3) of the rewards of each department, (seeds, cases)."""
    chest, belly = (np.array(rewards[name]) for name in DEPARTMENTS)
    return np.stack([chest, belly, (chest + belly) / 2], axis=-1)


def averaged(lines: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """Closeness of one line a seed: means of both departments; "overfit": nll of held-out tokens less nll_seen."""
    found = {
        name: np.array([np.mean([line[f"{name}/{department}"] for department in DEPARTMENTS]) for line in lines])
        for name in CLOSENESS
    }
    return found | {"overfit": found["nll"] - found["nll_seen"]}


def read(out: Path, arm: str, seeds: Sequence[int | None]) -> Found:
    """A model at its end; seed None: the one that there is."""
    told = [json.loads((out / (arm if seed is None else f"{arm}-{seed}") / DONE).read_text("utf-8")) for seed in seeds]
    rewards = {name: [[row[REWARD] for row in one["values"][name]] for one in told] for name in DEPARTMENTS}
    near = [one["closeness"] for one in told if "closeness" in one]
    return Found(rewards=columns(rewards), closeness=averaged(near) if near else {}, told=told)


def curves(out: Path, loss: str, seeds: Sequence[int]) -> dict[int, Found]:
    """A distillation, by epoch."""
    runs = [read_curve(out / f"{loss}-{seed}" / CURVE) for seed in seeds]
    steps = [read_metrics(out / f"{loss}-{seed}" / METRICS) for seed in seeds]
    found = {}
    for lines in zip(*runs, strict=True):
        rewards = {name: [line["rewards"][name] for line in lines] for name in DEPARTMENTS}
        closeness, epoch = averaged(lines), int(lines[0]["epoch"])
        if epoch:
            closeness["taught"] = np.array([taught(one, lines[0]["step"], epoch) for one in steps])
        found[epoch] = Found(rewards=columns(rewards), closeness=closeness)
    return found


def taught(metrics: Sequence[Mapping[str, float]], step: int, epoch: int) -> float:
    """Share of the tokens that had a gradient, in the epoch that ended with ``step``."""
    last = [line for line in metrics if step - step // epoch < line["step"] <= step]
    return sum(line["rows_differentiated"] for line in last) / sum(line["tokens"] for line in last)


def collected(out: Path, seeds: Sequence[int]) -> dict[str, Found]:
    """All models by their names, in the order of the stages."""
    found = {learning.START: read(out, learning.START, [None])}
    for name in DEPARTMENTS:
        found[f"expert-{name}"] = read(out, f"expert-{name}", seeds)
    home = [found[f"expert-{name}"].rewards[:, :, at] for at, name in enumerate(DEPARTMENTS)]
    found[EXPERTS] = Found(rewards=np.stack([*home, np.mean(home, axis=0)], axis=-1))
    for loss in LOSSES:
        by_epoch = {epoch: one for epoch, one in curves(out, loss, seeds).items() if epoch}
        last = max(by_epoch)
        by_epoch[last] = dataclasses.replace(by_epoch[last], told=read(out, loss, seeds).told)
        found |= {f"{loss} @ {epoch}": one for epoch, one in by_epoch.items()}
    for arm in ARMS:
        if all((out / f"{arm}-{seed}" / DONE).is_file() for seed in seeds):
            found[arm] = read(out, arm, seeds)
    return found


# -- numbers ----------------------------------------------------------------------------------------------------------
def intervals(values: np.ndarray, names: Sequence[str] = COLUMNS) -> dict[str, Interval]:
    """(mean, low, high) of each of the last axis of (seeds, cases, names)."""
    low, high = np.percentile(learning.resampled(values), [2.5, 97.5], axis=0)
    mean = values.mean((0, 1))
    return {
        name: (round(float(mean[at]), 4), round(float(low[at]), 4), round(float(high[at]), 4))
        for at, name in enumerate(names)
    }


def near(one: Found) -> dict[str, Interval]:
    if not one.closeness:
        return {}
    return intervals(np.stack(list(one.closeness.values()), axis=-1)[:, None], list(one.closeness))


def rows(out: Path, seeds: Sequence[int], command: str) -> list[FusionRow]:
    found = collected(out, seeds)
    commit, dirty = record.commit()
    base, home = found[learning.START].rewards, found[EXPERTS].rewards
    return [
        FusionRow(
            arm=arm,
            seeds=tuple(seeds) if arm != learning.START else (),
            cases=2 * one.rewards.shape[1],
            steps=tuple(told["steps"] for told in one.told),
            tokens=tuple(told["tokens"] for told in one.told if "tokens" in told),
            seconds=tuple(round(told["seconds"], 1) for told in one.told if "seconds" in told),
            reward=intervals(one.rewards),
            over_start=intervals(one.rewards - base),
            over_experts=intervals(one.rewards - home),
            by_seed={
                name: tuple(round(float(mean), 4) for mean in one.rewards.mean(1)[:, at])
                for at, name in enumerate(COLUMNS)
            },
            closeness=near(one),
            commit=commit,
            dirty=dirty,
            machine=record.machine(),
            date=record.now(),
            command=command,
        )
        for arm, one in found.items()
    ]


def against(found: Mapping[str, Found]) -> dict[str, dict[str, Interval]]:
    """Differences that the paper's table asks for, seed by seed and case by case; those that are there."""
    epochs = sorted({int(arm.split(" @ ")[1]) for arm in found if " @ " in arm})
    last = {loss: f"{loss} @ {epochs[-1]}" for loss in LOSSES}
    pairs = [(f"clip_forward @ {epoch}", f"forward @ {epoch}") for epoch in epochs]
    pairs += [(f"{loss}+{name}", last[loss]) for name in MOPDS for loss in LOSSES]
    pairs += [
        ("clip_forward+mopd", other) for other in ("forward+mopd", "clip_forward+alpha0", f"{learning.START}+mopd")
    ]
    return {
        f"{one} - {other}": less(found[one], found[other]) for one, other in pairs if one in found and other in found
    }


def less(one: Found, other: Found) -> dict[str, Interval]:
    """One model less another: rewards, and closeness where both have it."""
    told = intervals(one.rewards - other.rewards)
    if one.closeness and other.closeness:
        gaps = [one.closeness[name] - other.closeness[name] for name in COMPARED]
        told |= intervals(np.stack(gaps, axis=-1)[:, None], COMPARED)
    return told


# -- for a reader -----------------------------------------------------------------------------------------------------
def cell(value: Interval | None, form: str) -> str:
    return "" if value is None else f"{value[0]:{form}} ({value[1]:{form}}, {value[2]:{form}})"


def table(found: Mapping[str, Mapping[str, Interval]], form: str = ".3f") -> str:
    """Markdown of intervals by row and column; columns in the order in which they come first."""
    names = list(dict.fromkeys(name for row in found.values() for name in row))
    lines = ["| | " + " | ".join(name.replace("_", " ") for name in names) + " |", "|---" * (len(names) + 1) + "|"]
    lines += [
        f"| {arm} | " + " | ".join(cell(row.get(name), form) for name in names) + " |" for arm, row in found.items()
    ]
    return "\n".join(lines)


def tables(out: Path, seeds: Sequence[int], made: Sequence[FusionRow]) -> str:
    """As they stand in the document: the stages, the distillations by epoch, the differences."""
    epochs = [row.arm for row in made if " @ " in row.arm]
    last = [[arm for arm in epochs if arm.startswith(f"{loss} @")][-1] for loss in LOSSES]
    stages = {
        row.arm: {**row.reward, "both - start": row.over_start["both"], "both - experts": row.over_experts["both"]}
        for row in made
        if row.arm not in epochs or row.arm in last
    }
    shown = (*COMPARED, "taught")
    curve = {
        row.arm: {"reward": row.reward["both"], **{name: row.closeness[name] for name in shown}}
        for row in made
        if row.arm in epochs
    }
    differences = against(collected(out, seeds))
    return "\n\n".join([table(stages), table(curve), table(differences, "+.3f")])


def write(made: Sequence[FusionRow], path: Path = ROWS) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(dataclasses.asdict(row)) + "\n" for row in made), encoding="utf-8")


def draw(out: Path, seeds: Sequence[int], path: Path) -> None:
    """Distillation over epochs: thin lines the seeds, thick ones their mean."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 3, figsize=(10, 5.5), sharex=True, constrained_layout=True)
    titles = {
        "chest": "held-out reward, chest", "belly": "held-out reward, belly", "entropy": "entropy of the student",
        "forward_kl": "KL(expert || student)", "reverse_kl": "KL(student || expert)",
        "overfit": "-log pi, held-out less stored",
    }  # fmt: skip
    labels = {"forward": "forward KL", "clip_forward": "Clip-Forward-KL"}
    for colour, loss in enumerate(LOSSES):
        by_epoch = curves(out, loss, seeds)
        epochs = list(by_epoch)
        for axis, name in zip(axes.flat, titles, strict=True):
            values = np.array(
                [
                    one.rewards[:, :, COLUMNS.index(name)].mean(1) if name in COLUMNS else one.closeness[name]
                    for one in by_epoch.values()
                ]
            )  # (epochs, seeds)
            axis.plot(epochs, values, color=f"C{colour}", linewidth=0.4, alpha=0.5)
            axis.plot(epochs, values.mean(1), color=f"C{colour}", linewidth=1.8, label=labels[loss])
    for at, name in enumerate(DEPARTMENTS):
        expert = read(out, f"expert-{name}", seeds).rewards[:, :, at].mean()
        axes.flat[at].axhline(expert, color="black", linewidth=0.8, linestyle="--", label="its expert")
    teacher = curves(out, LOSSES[0], seeds)[0].closeness["teacher_entropy"].mean()
    axes.flat[2].axhline(teacher, color="black", linewidth=0.8, linestyle="--", label="of the experts")
    for axis, (name, title) in zip(axes.flat, titles.items(), strict=True):
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3)
        if name in ("entropy", "forward_kl", "reverse_kl"):
            axis.set_yscale("log")
            axis.set_ylabel("nats a token")
    for axis in axes[1]:
        axis.set_xlabel(f"epochs of {Plan().trajectories * 2} trajectories")
    axes.flat[0].legend(fontsize=8)
    axes.flat[2].legend(fontsize=8)
    figure.savefig(path, dpi=90)
