"""What the tests of training share: samples drawn from seeds, a source of them, runs in processes to be killed."""

from __future__ import annotations

import asyncio
import os
import random
import socket
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from m3.algorithms import clip_forward_kl, mopd, spar
from m3.train import checkpoint
from m3.train.loop import Outcome, TrainConfig, train
from m3.train.optim import OptimConfig
from m3.train.policy_model import PolicyModel
from m3.train.stage import Objective, StepBatch
from m3.train.streams import Sample
from m3kernels.policy_loss import LossSpec

PRELOADED = [  # by the server that processes fork from: what a run imports late
    "tests.m3.train_cases", "transformers.models.llama.modeling_llama", "safetensors.torch", "torch._dynamo",
    "tests.m3.distributed_runs", "torch.distributed.fsdp",
]  # fmt: skip
VOCABULARY = 99  # of tiny_models
OBJECTIVES = {
    "spar": Objective(spec=spar.loss_spec()),
    "clip-forward-kl": Objective(spec=clip_forward_kl.loss_spec()),
    "mopd": Objective(spec=mopd.loss_spec(), on_policy=True),
    "ppo": Objective(spec=LossSpec(kl_coef=0.1, entropy_coef=0.01, sampler_level="token", ratio_level="step")),
    "constant": Objective(spec=LossSpec(aggregation="constant", constant_length=16)),
}
STREAMS = ("sampler_logprobs", "old_logprobs", "ref_logprobs", "teacher_logprobs", "advantages")


def draw_sample(seed: str, tokens: int, *, streams: tuple[str, ...] = STREAMS, temperature: float = 1.0) -> Sample:
    """A prompt of two tokens, then turns of the policy (steps 0, 1, ...) and of another, of one to five tokens."""
    chance = random.Random(seed)
    steps, step = [-1, -1], 0
    while len(steps) < tokens:
        steps += [step] * chance.randint(1, 5) + [-1] * chance.randint(1, 3)
        step += 1
    steps = steps[:tokens]
    values = {name: torch.tensor([chance.gauss(-4.6, 0.8) for _ in range(tokens)]) for name in STREAMS}
    values["advantages"] = values["advantages"] + 4.6
    return Sample(
        id=seed,
        ids=torch.tensor([chance.randrange(VOCABULARY) for _ in range(tokens)]),
        mask=torch.tensor([0.0 if one < 0 else chance.choice((1.0, 1.0, 0.5)) for one in steps]),
        steps=torch.tensor(steps),
        reward=chance.random(),
        temperature=temperature,
        domain=chance.choice(("inquiry", "general")),
        **{name: values[name] for name in streams},
    )


def draw_samples(seed: str = "a", lengths: tuple[int, ...] = (9, 4, 17, 12, 6), **more: Any) -> list[Sample]:
    return [draw_sample(f"{seed}-{index}", tokens, **more) for index, tokens in enumerate(lengths)]


class DrawnSource:
    """Batches that follow from all batches before, and from the weights: what is not restored shows."""

    stubborn = False  # the signal comes again when the batch is given up

    def __init__(
        self,
        objective: Objective,
        model: PolicyModel,
        *,
        batches: int = 1000,
        streams: tuple[str, ...] = STREAMS,
        at: Mapping[int, int] | None = None,  # the signal that this process gets while a step's batch is made
    ) -> None:
        self.objective, self.model, self.batches, self.streams, self.at = objective, model, batches, streams, at or {}
        self.memory, self.seen, self.versions = 0, 0.0, [0]

    async def batch(self, step: int) -> StepBatch | None:
        if step >= self.batches:
            return None
        noise = int(torch.randint(1000, ()))  # torch's generator is restored too
        samples = draw_samples(f"{step}-{self.memory}-{noise}-{self.seen:.9f}", streams=self.streams)
        self.memory += int(samples[0].ids.sum())
        if step in self.at:
            os.kill(os.getpid(), self.at[step])
            try:
                await asyncio.sleep(0.05)
            finally:
                if self.stubborn:
                    os.kill(os.getpid(), self.at[step])
        return StepBatch(step=step, samples=samples, metrics={"memory": self.memory, "draw_seconds": 0.5})

    async def updated(self, step: int, version: int) -> None:
        self.versions.append(version)
        self.seen = float(self.model.tensors()["model.norm.weight"].double().sum())

    def state(self) -> Mapping[str, Any]:
        return {"memory": self.memory}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.memory = state["memory"]

    async def close(self) -> None:
        pass


def config(**changes: Any) -> TrainConfig:
    found: dict[str, Any] = dict(
        steps=6, max_tokens=24, optim=OptimConfig(lr=1e-3, warmup=2, schedule="cosine", weight_decay=0.1),
        checkpoint_every=3, samples_every=2, tensorboard=False,
    )  # fmt: skip
    return TrainConfig(**{**found, **changes})


def run(folder: Path, out: Path, objective: str, *, at: Mapping[int, int] | None = None, **changes: Any) -> Outcome:
    """A run of six steps of the model in ``folder``."""
    model = PolicyModel.load(folder)
    source = DrawnSource(OBJECTIVES[objective], model, at=at)
    source.stubborn = changes.pop("stubborn", False)
    return asyncio.run(train(source, model, config(**changes), out, decode=str))


def with_one_thread() -> Iterator[None]:
    """Body of a fixture: products this small gain nothing from a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


# -- in a process of its own ------------------------------------------------------------------------------------------
def run_apart(folder: str, out: str, objective: str, at: dict[int, int], changes: dict[str, Any]) -> None:
    """``run`` with one thread; exits as a program would."""
    torch.set_num_threads(1)
    ended = run(Path(folder), Path(out), objective, at=at, **changes)
    sys.exit(0 if ended.signal is None else 128 + ended.signal)


def state(step: int, size: int, *, moments: int | None = None, text: int = 0) -> checkpoint.State:
    """All of its numbers are ``step``: ``size`` weights, as many moments unless told otherwise, and a text."""
    moment = checkpoint.moment(step, {"step": step, "text": "x" * text})
    filled = torch.full((size if moments is None else moments,), float(step))
    return checkpoint.State(
        moment=moment,
        updates=step,
        model={"weight": torch.full((size,), float(step))},
        optimizer={"weight|exp_avg": filled, "weight|step": torch.tensor(float(step))},
        run={"step": step},
        machine=checkpoint.machine(),
    )


def write_until_killed(folder: str, size: int) -> None:
    """One checkpoint after another, each a step further than the newest."""
    newest = checkpoint.latest(folder)
    step = 0 if newest is None else checkpoint.load(newest).moment.step
    while True:
        step += 1
        checkpoint.write(folder, state(step, size))
