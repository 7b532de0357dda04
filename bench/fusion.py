"""``python -m bench.fusion``: two experts fused into one student, stage by stage, as in the paper's Table 4.

Task: m3/train/tasks/consult.py. Of each seed, from one start (bench/learning.py):

    expert-chest, expert-belly   SPAR on consultations of one department
    store                        trajectories of each expert in its own department, with its log-probabilities
    forward, clip_forward        the start, distilled from that store: the same samples in the same order
    forward+mopd, ...            MOPD from each of the two, and from the start; alpha0: without the outcome's advantage

Held out are cases that no training has seen. A distillation is measured as it goes on: reward, the student's entropy,
its divergence from each expert in both directions on trajectories of the expert over held-out cases. Runs are
resumable: what is done under ``--out`` is not done again. Numbers and figure: bench/fusion_report.py.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import learning
from m3.algorithms import mopd
from m3.train.loop import MODEL, TrainConfig, train
from m3.train.metrics import METRICS, read_metrics
from m3.train.offline_distill import OfflineDistill, OfflineDistillConfig
from m3.train.optim import OptimConfig
from m3.train.policy_model import PolicyModel
from m3.train.stage import Source
from m3.train.streams import Sample, microbatches, pack
from m3.train.tasks.consult import DEPARTMENTS, draw_cases, text
from m3.train.tasks.consult_policy import roll_out, sample_of, write_tokenizer
from m3.train.tasks.consult_rl import MEASURES, ConsultConfig, ConsultSource
from m3.train.tasks.open_consult import StudentSource
from m3.train.teacher_rollouts import roll_out as fill
from m3.train.teachers import ModelTeacher
from m3.train.trajectory_store import TrajectoryStore

LOSSES = ("forward", "clip_forward")
MOPDS = {"mopd": 1.0, "alpha0": 0.0}  # alpha
ARMS = (*(f"{first}+mopd" for first in LOSSES), "clip_forward+alpha0", f"{learning.START}+mopd")
CURVE, DONE = "curve.jsonl", "done.json"
REWARD = list(MEASURES).index("reward")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Sizes of the experiment.

    Args:
        expert_tokens, mopd_tokens: drawn in a run.
        trajectories: of each expert. epochs: over them. batch: trajectories of a step.
        cases: held out, of each department.
        measured: epochs after which a distillation is measured.
        expert_lr, mopd_lr, distill_lr: rates; of the losses each its own.
    """

    expert_tokens: int = 120_000
    mopd_tokens: int = 40_000
    trajectories: int = 256
    epochs: int = 10
    batch: int = 32
    cases: int = 128
    measured: tuple[int, ...] = (1, 2, 3, 5, 7, 10)
    expert_lr: float = 5e-4
    mopd_lr: float = 2e-4
    distill_lr: Mapping[str, float] = dataclasses.field(default_factory=lambda: dict.fromkeys(LOSSES, 3e-4))

    @property
    def epoch_steps(self) -> int:
        return len(DEPARTMENTS) * self.trajectories // self.batch


# -- runs -------------------------------------------------------------------------------------------------------------
def learn(
    source: Source,
    model: PolicyModel,
    config: TrainConfig,
    out: Path,
    *,
    teachers: Mapping[str, PolicyModel] | None = None,
    watch: Callable[[int], None] = lambda step: None,
) -> dict[str, Any]:
    """Train to the end, ``watch`` after each step; steps, and seconds of the processor without those of ``watch``."""
    begun, watched = time.process_time(), 0.0

    def told(done: int, steps: int, values: Mapping[str, float]) -> None:
        nonlocal watched
        at = time.process_time()
        watch(done)
        watched += time.process_time() - at
        if done % 20 == 0:
            seen = " ".join(f"{key} {values[key]:.3f}" for key in ("loss", "reward", "entropy") if key in values)
            print(f"{out.name} {done} {seen} {time.process_time() - begun:.0f} s", flush=True)

    outcome = asyncio.run(train(source, model, config, out, teachers=teachers, decode=text, progress=told))
    if outcome.model is None:
        sys.exit(128 + (outcome.signal or 0))
    write_tokenizer(outcome.model)
    last = read_metrics(out / METRICS)[-1]
    return {
        "steps": outcome.step,
        "tokens": int(last.get("tokens_so_far", 0)),
        "seconds": time.process_time() - begun - watched,
    }


def training(steps: int, lr: float, seed: int, **more: Any) -> TrainConfig:
    return TrainConfig(
        steps=steps, max_tokens=learning.MAX_TOKENS, optim=OptimConfig(lr=lr), checkpoint_every=50, samples_every=50,
        tensorboard=False, seed=seed, **more,
    )  # fmt: skip


def note(folder: Path, plan: Plan, model: PolicyModel, told: Mapping[str, Any]) -> None:
    """What a run came to: its held-out scores, by department and case."""
    found = {"values": scores(model, plan), **told}
    (folder / DONE).write_text(json.dumps(found), encoding="utf-8")


def is_done(folder: Path) -> bool:
    return (folder / DONE).is_file()


def start(out: Path, plan: Plan) -> Path:
    folder = learning.start(out)
    if not is_done(out / learning.START):
        note(out / learning.START, plan, PolicyModel.load(folder), {"steps": learning.START_STEPS})
    return folder


def expert(out: Path, plan: Plan, department: str, seed: int) -> Path:
    """The folder of the model of a department's expert."""
    folder = out / f"expert-{department}-{seed}"
    if not is_done(folder):
        model = PolicyModel.load(start(out, plan))
        config = ConsultConfig(arm="spar", tokens=plan.expert_tokens, seed=seed, department=department)
        told = learn(ConsultSource(model, config), model, training(100_000, plan.expert_lr, seed), folder)
        note(folder, plan, model, told)
    return folder / MODEL


def experts(out: Path, plan: Plan, seed: int) -> dict[str, PolicyModel]:
    found = {name: PolicyModel.load(expert(out, plan, name, seed)) for name in DEPARTMENTS}
    return {name: model.requires_grad_(False) for name, model in found.items()}


def stored(out: Path, plan: Plan, seed: int) -> TrajectoryStore:
    """The store of the experts' trajectories, filled."""
    store = TrajectoryStore(out / f"store-{seed}")
    for department, model in experts(out, plan, seed).items():
        config = ConsultConfig(cases=32, rollouts=2, seed=10_000 + seed, department=department)
        source, teacher = ConsultSource(model, config), ModelTeacher(model, f"expert-{department}-{seed}")
        asyncio.run(fill(source, teacher, store, domain=department, samples=plan.trajectories))
    return store


def distil(out: Path, plan: Plan, loss: str, seed: int, *, lr: float | None = None) -> Path:
    """The folder of the model distilled by a loss; ``lr``: another than the plan's, in a folder of its own."""
    folder = out / (f"{loss}-{seed}" if lr is None else f"{loss}-{lr:g}-{seed}")
    if not is_done(folder):
        teachers, model = experts(out, plan, seed), PolicyModel.load(start(out, plan))
        with stored(out, plan, seed) as store:
            config = OfflineDistillConfig(divergence=loss, batch_size=plan.batch, epochs=plan.epochs, seed=seed)
            source = OfflineDistill(store, config)
            gauge = Gauge(plan, teachers, store, folder / CURVE, model)
            if not gauge.path.is_file():
                gauge(0)
            settings = training(source.steps, plan.distill_lr[loss] if lr is None else lr, seed)
            told = learn(source, model, settings, folder, watch=gauge)
        note(folder, plan, model, told)
    return folder / MODEL


def mixed(out: Path, plan: Plan, first: str, name: str, seed: int) -> Path:
    """The folder of the model that MOPD makes of a distilled one (or of the start)."""
    folder = out / f"{first}+{name}-{seed}"
    if not is_done(folder):
        model = PolicyModel.load(start(out, plan) if first == learning.START else distil(out, plan, first, seed))
        teachers = experts(out, plan, seed)
        config = ConsultConfig(arm="spar", tokens=plan.mopd_tokens, seed=20_000 + seed)
        source = StudentSource(model, config, mopd.Config(alpha=MOPDS[name]))
        told = learn(source, model, training(100_000, plan.mopd_lr, seed), folder, teachers=teachers)
        with stored(out, plan, seed) as store:
            told["closeness"] = Gauge(plan, teachers, store, folder / CURVE, model).closeness()
        note(folder, plan, model, told)
    return folder / MODEL


# -- measures ---------------------------------------------------------------------------------------------------------
def scores(model: PolicyModel, plan: Plan) -> dict[str, list[list[float]]]:
    """(cases, measures) of each department; the cases and their noise are the same for every model."""
    found = {}
    for department in DEPARTMENTS:
        cases = draw_cases(plan.cases, "held out", held_out=True, department=department)
        found[department] = learning.values_of([one.score for one in roll_out(model, cases, "held out")]).tolist()
    return found


class Gauge:
    """Measures a student at the epochs of a plan: a line of ``path`` each time.

    ``told``: consultations of each expert over held-out cases; ``laws``: its log-probabilities there; ``seen``: its
    trajectories in the first shard of the store.
    """

    def __init__(
        self, plan: Plan, teachers: Mapping[str, PolicyModel], store: TrajectoryStore, path: Path, model: PolicyModel
    ) -> None:
        self.plan, self.path, self.model = plan, path, model
        self.steps = {0, *(epoch * plan.epoch_steps for epoch in plan.measured)}
        self.told = {name: trajectories(teacher, plan, name) for name, teacher in teachers.items()}
        self.laws = {name: laws(teachers[name], samples) for name, samples in self.told.items()}
        self.seen = {
            name: [store.sample(shard, row) for row in range(shard.samples)]
            for name in teachers
            for shard in store.of(name)[:1]
        }

    def __call__(self, step: int) -> None:
        if step not in self.steps:
            return
        values = scores(self.model, self.plan)
        rewards = {name: [row[REWARD] for row in rows] for name, rows in values.items()}
        line = {"step": step, "epoch": step // self.plan.epoch_steps, "rewards": rewards, **self.closeness()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def closeness(self) -> dict[str, float]:
        """Of each department, in nats a token of the physician's: see ``divergences``; nll_seen: of stored tokens."""
        found: dict[str, float] = {}
        for name, samples in self.told.items():
            mine = laws(self.model, samples)
            found |= {f"{key}/{name}": value for key, value in divergences(self.laws[name], mine).items()}
            found[f"nll/{name}"] = nll(mine, samples)
            found[f"nll_seen/{name}"] = nll(laws(self.model, self.seen[name]), self.seen[name])
        return found


def trajectories(teacher: PolicyModel, plan: Plan, department: str) -> list[Sample]:
    """Consultations of an expert over the held-out cases of its department."""
    cases = draw_cases(plan.cases, "held out", held_out=True, department=department)
    return [
        sample_of(one.ids, one.score, name=f"{index}", prompted=one.prompted)
        for index, one in enumerate(roll_out(teacher, cases, "held-out trajectories"))
    ]


@torch.no_grad()
def laws(model: PolicyModel, samples: Sequence[Sample]) -> Tensor:
    """(N, V) fp64 log-probabilities of all words wherever the physician draws one of the N tokens."""
    found = []
    for part in microbatches(samples, learning.MAX_TOKENS):
        packed = pack(part)
        rows = (packed.mask[1:] > 0).nonzero()[:, 0]
        found.append((model.hidden(packed)[rows] @ model.head.weight.T).double().log_softmax(-1))
    return torch.cat(found)


def divergences(teacher: Tensor, student: Tensor) -> dict[str, float]:
    """Means over positions, of (N, V) log-probabilities: KL(teacher || student), KL(student || teacher), entropies."""
    t, s = teacher.exp(), student.exp()
    return {
        "forward_kl": float((t * (teacher - student)).sum(1).mean()),
        "reverse_kl": float((s * (student - teacher)).sum(1).mean()),
        "entropy": -float((s * student).sum(1).mean()),
        "teacher_entropy": -float((t * teacher).sum(1).mean()),
    }


def nll(law: Tensor, samples: Sequence[Sample]) -> float:
    ids = torch.cat([sample.ids[sample.mask > 0] for sample in samples])
    return -float(law.gather(1, ids[:, None]).mean())


def read_curve(path: Path) -> list[dict[str, Any]]:
    """Its lines by step; of a step that was done twice, the last."""
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    return sorted({line["step"]: line for line in lines}.values(), key=lambda line: line["step"])


# -- the command ------------------------------------------------------------------------------------------------------
def choose(out: Path, plan: Plan, rates: Sequence[float], seed: int) -> str:
    """Distil by each loss at each rate; the held-out reward and the expert's divergence by epoch, as text."""
    lines = []
    for lr in rates:
        for loss in LOSSES:
            distil(out, plan, loss, seed, lr=lr)
            for line in read_curve(out / f"{loss}-{lr:g}-{seed}" / CURVE):
                reward = sum(sum(values) for values in line["rewards"].values()) / (plan.cases * len(DEPARTMENTS))
                kl = sum(line[f"forward_kl/{name}"] for name in DEPARTMENTS) / len(DEPARTMENTS)
                lines.append(
                    f"{loss} {lr:g} epoch {line['epoch']}: reward {reward:.3f}, KL(expert || student) {kl:.4f}"
                )
    return "\n".join(lines)


def main() -> int:
    from bench import fusion_report as report

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS, help="the last stages")
    parser.add_argument("--choose", type=float, nargs="+", metavar="LR", help="try these rates of both losses, no more")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--document", type=Path, help=f"write fusion.png there, as {learning.DOCUMENT}, and {report.ROWS.name}"
    )
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    plan = Plan()
    if given.choose:
        print(choose(given.out, plan, given.choose, given.seeds[0]))
        return 0
    for arm in given.arms:
        for seed in given.seeds:
            first, _, name = arm.partition("+")
            mixed(given.out, plan, first, name, seed)
    made = report.rows(given.out, given.seeds, f"python -m bench.fusion {shlex.join(sys.argv[1:])}")
    print(report.tables(given.out, given.seeds, made))
    if given.document is not None:
        report.write(made)
        report.draw(given.out, given.seeds, given.document / "fusion.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
