"""What the tests of several ranks run in each of their processes."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from m3.train import objective
from m3.train.distributed import Relayed, Together, joined
from m3.train.loop import Alone, Outcome, train
from m3.train.objective import MetricSum
from m3.train.policy_model import LoraConfig, PolicyModel, whole
from m3.train.stage import Source, StepBatch
from m3.train.streams import pack
from tests.m3.train_cases import OBJECTIVES, STREAMS, DrawnSource, config, draw_samples

PASSES: dict[str, dict[str, Any]] = {
    "spar": {},
    "clip-forward-kl": {},
    "mopd": {},
    "ppo-three-samples": {"objective": "ppo", "lengths": (9, 4, 7)},
    "constant-one-sample": {"objective": "constant", "lengths": (9,)},
    "spar-lora": {"objective": "spar", "lora": LoraConfig(rank=4)},
    "mopd-gradient-checkpointing": {"objective": "mopd", "gradient_checkpointing": True},
}


def one_pass(folder: Path, ranks: Alone | Together, name: str) -> tuple[dict[str, float], dict[str, Tensor]]:
    """(loss, metrics, fingerprint of what is frozen; gradients, log-probabilities, weights with adapters merged)."""
    case = {"objective": name, "lengths": (9, 4, 17, 12, 6), **PASSES[name]}
    samples = draw_samples(name, case.pop("lengths"))
    aim = OBJECTIVES[case.pop("objective")]
    torch.manual_seed(0)  # adapters are drawn
    model = PolicyModel.load(folder, **case)
    for key, parameter in model.trained():
        if ".lora_B" in key:
            torch.nn.init.normal_(parameter, std=0.1)
    if isinstance(ranks, Together):
        ranks.shard(model)
    kept = dict(model.trained())
    mine = ranks.microbatches(samples, 24)
    found = {sample.id: model.logprobs(pack([sample])) for sample in samples}  # all ranks, of all samples
    sums = MetricSum()
    for part in mine:
        loss, metrics = objective.loss(aim, model, pack(part), objective.normaliser(aim, samples))
        loss.backward()
        sums.add(float(loss.detach()), metrics)
    sums = ranks.summed(sums)
    tensors = {f"gradient {key}": whole(one.grad) for key, one in kept.items() if one.grad is not None}
    tensors |= {f"logprobs {key}": value for key, value in found.items()}
    tensors |= {f"weight {key}": value for key, value in model.tensors().items()}
    return {"loss": sums.loss, **sums.values(), "frozen": float(int(model.frozen()[:8] or "0", 16))}, tensors


class SteadySource(DrawnSource):
    """Batches that do not follow from the weights' last bits."""

    async def updated(self, step: int, version: int) -> None:
        await super().updated(step, version)
        self.seen = 0.0


class SpoiltSource(SteadySource):
    """An advantage of the shortest sample of step 2, which one rank alone is dealt, is nan."""

    async def batch(self, step: int) -> StepBatch | None:
        batch = await super().batch(step)
        if step == 2 and batch is not None:
            batch.samples[1].advantages[batch.samples[1].mask > 0] = float("nan")  # type: ignore[index]
        return batch


class FailingSource(SteadySource):
    """Has no third batch."""

    async def batch(self, step: int) -> StepBatch | None:
        if step == 2:
            raise ValueError("the patient has left")
        return await super().batch(step)


class SlowSource(SteadySource):
    """Its third batch takes ten minutes; a signal comes meanwhile."""

    async def batch(self, step: int) -> StepBatch | None:
        found = await super().batch(step)
        if step in self.at:
            await asyncio.sleep(600)
        return found


SOURCES = {
    "drawn": DrawnSource,
    "steady": SteadySource,
    "spoilt": SpoiltSource,
    "failing": FailingSource,
    "slow": SlowSource,
}


def one_run(folder: Path, out: Path, ranks: Alone | Together, job: Mapping[str, Any]) -> Outcome:
    """A run of a source by its name; ``at``: the step at which rank 0 gets SIGTERM."""
    torch.manual_seed(0)
    model = PolicyModel.load(folder)
    if isinstance(ranks, Together):
        ranks.shard(model)
    at = {job["at"]: 15} if "at" in job and ranks.rank == 0 else {}
    aim = OBJECTIVES[job["objective"]]
    streams = tuple(name for name in STREAMS if name not in job.get("lacking", ()))
    own = SOURCES[job["source"]](aim, model, at=at, streams=streams)
    source: Source = own
    if job.get("relayed") and isinstance(ranks, Together):
        source = Relayed(ranks, aim, own if ranks.rank == 0 else None, model=model)
    teachers = {}
    for seed, domain in enumerate(job.get("teachers", ()), 1):
        teachers[domain] = PolicyModel.load(folder)
        torch.manual_seed(seed)
        torch.nn.init.normal_(teachers[domain].head.weight, std=0.2)
        if isinstance(ranks, Together):
            ranks.shard(teachers[domain])
    return asyncio.run(train(source, model, config(**job.get("changes", {})), out, ranks=ranks, teachers=teachers))


def work(folder: str, out: str, jobs: Mapping[str, Mapping[str, Any]]) -> None:
    """Jobs of this process by name, passes or runs, one after the other; each leaves a file of each rank in ``out``."""
    torch.set_num_threads(1)
    with joined() as ranks:
        for name, job in jobs.items():
            place = Path(out) / job.get("folder", name)
            place.mkdir(parents=True, exist_ok=True)
            if "source" not in job:
                torch.save(one_pass(Path(folder), ranks, name), place / f"{ranks.rank}.pt")
                continue
            try:
                ended: dict[str, Any] = dataclasses.asdict(one_run(Path(folder), place, ranks, job))
            except (RuntimeError, ValueError) as error:
                ended = {"error": str(error)}
            (Path(out) / name).mkdir(exist_ok=True)
            (Path(out) / name / f"ended-{ranks.rank}.json").write_text(json.dumps(ended, default=str))


def rank(number: int, size: int, port: int, folder: str, out: str, jobs: Mapping[str, Mapping[str, Any]]) -> None:
    """``work`` as torchrun starts it."""
    place = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in place.items()}
    work(folder, out, jobs)


if __name__ == "__main__":  # folder, out, jobs
    work(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))
