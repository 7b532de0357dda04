"""One SPAR update of SmolLM2-135M, ours against TRL's GRPOTrainer on the same batch: tokens a second, peak memory.

Work of every arm: forward, backward, clip of the gradient's norm, AdamW, on one batch of consultations whose tokens
have advantages by step; on-policy, so every ratio is 1 and TRL's token ratio has SPAR's gradient. Tokens counted are
those of consultations, whatever an arm pads or shares. Gate: gradients of all parameters agree with ``trl``'s to 1e-3.

    inquiry      rollouts of one context, of three to six turns of both speakers
    answers      rollouts of one context, each one message of a later stage: the context is the inquiry before it
    even, apart  inquiries of one length: nothing is padded. "apart": each has its own context, so nothing is shared

Numbers of tokens follow the clinic's own cases with the physician that knows the checklist, in SmolLM2's tokens
(medians: context of an inquiry 120, drawn in a turn 18, said by the patient 36, drawn in a later message 26 to 57).
Inquiries have a quarter to a half of their 13 turns, and the context of ``answers`` half of its 872 tokens (before the
differential diagnosis), so that a run takes minutes.

    m3           m3.train: packed microbatches, what is shared computed once, the head's gradients in the forward pass
    trl, trl_1   TRL 1.16 as it comes: all sequences padded at once; one sequence at a time, gradients accumulated
    spar_trl     m3.plugins.trl.SPARTrainer, padded at once: the same through our kernels, two-phase

On one thread seconds are those of the processor, else of the clock. Peaks are of a process of their own, over what it
held before the model was loaded ("all") and before the update ("update": activations, logits, gradients).
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gc
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import harness, record, tables

RESULTS = record.RESULTS / "train" / "update.jsonl"  # not a row of kernels: the report of those reads the folder above
MODEL = "SmolLM2-135M-Instruct"
TOLERANCE = 1e-3
ARMS = ("m3", "trl", "trl_1", "spar_trl")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """Tokens of a batch. Each ``rollouts`` consultations share their context.

    Args:
        lengths: of each consultation, its context included.
        drawn, patient: of a step, and between steps.
    """

    context: int
    lengths: tuple[int, ...]
    rollouts: int = 4
    drawn: int = 18
    patient: int = 36


SHAPES = {
    "inquiry": Shape(context=120, lengths=(408, 354, 300, 246)),
    "answers": Shape(context=436, lengths=(495, 490, 481, 472), drawn=64, patient=0),
    "even": Shape(context=120, lengths=(246, 246, 246, 246)),
    "apart": Shape(context=120, lengths=(246, 246, 246, 246), rollouts=1),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Consultation:
    """Tokens (T,) and, of each, whether the policy drew it and its advantage; the first ``context`` are given."""

    ids: Tensor
    mask: Tensor
    advantages: Tensor
    context: int

    @classmethod
    def draw(cls, shape: Shape, place: int, vocabulary: int) -> Consultation:
        """The one at a place of the batch; seeded by it, and its context by that of its group."""
        tokens, turn = shape.lengths[place], shape.drawn + shape.patient
        given = torch.Generator().manual_seed(10_000 + place // shape.rollouts)
        own = torch.Generator().manual_seed(place)
        later = torch.arange(tokens) - shape.context
        drawn = (later >= 0) & (later % turn < shape.drawn)
        steps = torch.where(drawn, later // turn, 0)
        values = torch.randn(int(steps.max()) + 1, generator=own)
        ids = torch.cat(
            [
                torch.randint(10, vocabulary, (shape.context,), generator=given),
                torch.randint(10, vocabulary, (tokens - shape.context,), generator=own),
            ]
        )
        return cls(ids=ids, mask=drawn.long(), advantages=values[steps] * drawn, context=shape.context)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainRow:
    """An arm on a batch. Bytes are peaks; ``gate`` "passed", or what failed; ``faster``: than each other arm."""

    arm: str
    batch: str
    shape: Mapping[str, object]
    tokens: int
    drawn: int
    threads: int
    clock: str
    gate: str
    error: float
    median_s: float | None
    p20_s: float | None
    p80_s: float | None
    tokens_per_s: float | None
    rounds: int
    micro_tokens: int
    faster: Mapping[str, tuple[float, float, float]] | None
    all_bytes: int | None
    update_bytes: int | None
    commit: str
    dirty: bool
    machine: Mapping[str, object]
    date: str
    command: str


# -- arms -------------------------------------------------------------------------------------------------------------
class UpdateArm(harness.Arm):
    """An update in two halves, so that gradients can be compared between them."""

    def gradients(self) -> None:
        """Forward and backward passes of the whole batch."""
        raise NotImplementedError

    def step(self) -> None:
        """Clip, AdamW, no gradients left."""
        raise NotImplementedError

    def run(self, part: int) -> None:
        self.gradients()
        self.step()

    def named(self) -> dict[str, Tensor]:
        """Gradients by the names of parameters."""
        raise NotImplementedError


class Ours(UpdateArm):
    """m3.train, as its loop takes an update."""

    def __init__(self, folder: str, batch: Sequence[Consultation], threads: int, micro_tokens: int) -> None:
        from m3.algorithms import spar
        from m3.train.optim import OptimConfig, Optimizer
        from m3.train.policy_model import PolicyModel
        from m3.train.stage import Objective
        from m3.train.streams import Sample, microbatches

        self.threads = threads
        self.model = PolicyModel.load(folder)
        self.optimizer = Optimizer(self.model, OptimConfig(lr=1e-9))
        self.objective = Objective(spec=spar.loss_spec())
        self.samples = [
            Sample(
                id=str(index),
                ids=one.ids,
                mask=one.mask.float(),
                steps=spar.step_ids(one.mask[None])[0],
                advantages=one.advantages.float(),
            )
            for index, one in enumerate(batch)
        ]
        self.parts_of_batch = microbatches(self.samples, micro_tokens)

    def gradients(self) -> None:
        from m3.train import objective
        from m3.train.streams import pack

        total = objective.normaliser(self.objective, self.samples)
        for part in self.parts_of_batch:
            objective.loss(self.objective, self.model, pack(part), total)[0].backward()

    def step(self) -> None:
        self.optimizer.step(1e-9)
        self.optimizer.zero_grad()

    def named(self) -> dict[str, Tensor]:
        return {name: one.grad for name, one in self.model.trained() if one.grad is not None}


class Trl(UpdateArm):
    """A trainer of TRL's kind, given its batch instead of generating one; ``rows``: sequences of a micro-batch."""

    def __init__(self, folder: str, batch: Sequence[Consultation], threads: int, rows: int, *, ours: bool) -> None:
        import transformers
        import trl
        from datasets import Dataset

        from m3.plugins import trl as plugin

        transformers.utils.logging.disable_progress_bar()
        self.threads = threads
        parts = len(batch) // rows
        with tempfile.TemporaryDirectory() as scratch:
            stated: dict[str, Any] = dict(
                output_dir=scratch, report_to="none", use_cpu=True, bf16=False, disable_tqdm=True, save_strategy="no",
                per_device_train_batch_size=rows, gradient_accumulation_steps=parts, num_generations=len(batch),
                num_iterations=10**6, learning_rate=1e-9, beta=0.0, gradient_checkpointing=False, loss_type="grpo",
                model_init_kwargs={"dtype": torch.float32},
            )  # fmt: skip
            kind, config = (plugin.SPARTrainer, plugin.SPARConfig) if ours else (trl.GRPOTrainer, trl.GRPOConfig)
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
            self.trainer: Any = kind(
                folder,
                lambda completions, **_: [0.0] * len(completions),
                config(**stated),
                train_dataset=Dataset.from_dict({"prompt": ["a"] * len(batch)}),
                processing_class=tokenizer,
            )
        self.trainer.create_optimizer()
        self.trainer.current_gradient_accumulation_steps = parts
        self.trainer._step = parts  # not a step that generates
        whole = padded(batch, tokenizer.pad_token_id)
        self.trainer._buffered_inputs = [
            {name: value[row : row + rows] for name, value in whole.items()} for row in range(0, len(batch), rows)
        ]
        self.micro_batches = parts

    def gradients(self) -> None:
        for _ in range(self.micro_batches):
            self.trainer.training_step(self.trainer.model, None, None)

    def step(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.trainer.model.parameters(), 1.0)
        self.trainer.optimizer.step()
        self.trainer.model.zero_grad(set_to_none=True)
        self.trainer._metrics["train"].clear()

    def named(self) -> dict[str, Tensor]:
        found = self.trainer.model.named_parameters()
        return {name: one.grad for name, one in found if one.grad is not None}


def padded(batch: Sequence[Consultation], pad: int) -> dict[str, Tensor]:
    """TRL's batch: contexts padded on the left, completions on the right."""
    before = max(one.context for one in batch)
    behind = max(len(one.ids) - one.context for one in batch)

    def rows(values: Callable[[Consultation], Tensor], fill: float, left: bool) -> Tensor:
        width = before if left else behind
        out = []
        for one in batch:
            part = values(one)[: one.context] if left else values(one)[one.context :]
            room = width - len(part)
            out.append(torch.nn.functional.pad(part, (room, 0) if left else (0, room), value=fill))
        return torch.stack(out)

    return {
        "prompt_ids": rows(lambda one: one.ids, pad, True),
        "prompt_mask": rows(lambda one: torch.ones_like(one.ids), 0, True),
        "completion_ids": rows(lambda one: one.ids, pad, False),
        "completion_mask": rows(lambda one: torch.ones_like(one.ids), 0, False),
        "tool_mask": rows(lambda one: one.mask, 1, False),
        "advantages": rows(lambda one: one.advantages, 0, False),
    }


def make(name: str, folder: str, batch: Sequence[Consultation], threads: int, micro_tokens: int) -> UpdateArm:
    """One of ARMS."""
    if name == "m3":
        return Ours(folder, batch, threads, micro_tokens)
    rows = 1 if name == "trl_1" else len(batch)
    return Trl(folder, batch, threads, rows, ours=name == "spar_trl")


def drawn(shape: Shape, folder: str) -> list[Consultation]:
    """The batch of a shape."""
    vocabulary = json.loads((Path(folder) / "config.json").read_text())["vocab_size"]
    return [Consultation.draw(shape, place, vocabulary) for place in range(len(shape.lengths))]


# -- gate, clock, memory ----------------------------------------------------------------------------------------------
def error_of(arm: UpdateArm, wanted: Mapping[str, Tensor]) -> float:
    """RMS of the difference of all gradients over RMS of the wanted ones; nan where a parameter has none."""
    found = arm.named()
    if found.keys() != wanted.keys():
        return math.nan
    error = sum(float((found[name] - value).double().square().sum()) for name, value in wanted.items())
    return math.sqrt(error / sum(float(value.double().square().sum()) for value in wanted.values()))


def visit(arm: harness.Arm, part: int) -> float:
    """Seconds of one update: of the processor on one thread, else of the clock."""
    arm.enter()
    clock = time.process_time if arm.threads == 1 else time.perf_counter
    began = clock()
    arm.run(part)
    return clock() - began


def peak_here(name: str, folder: str, shape: Shape, threads: int, micro_tokens: int) -> tuple[int, int]:
    """(bytes over what the process held before the model, over what it held before the update)."""
    gc.collect()
    before = harness.resident("VmRSS")
    arm = make(name, folder, drawn(shape, folder), threads, micro_tokens)
    arm.enter()
    arm.run(0)  # moments, and what libraries load
    update = harness.peak_extra_bytes(functools.partial(arm.run, 0))
    return harness.resident("VmHWM") - before, update


def peak(name: str, folder: str, shape: Shape, threads: int, micro_tokens: int) -> tuple[int, int]:
    """``peak_here`` of another process. Raises RuntimeError with what it said where that fails."""
    facts = dict(name=name, folder=folder, shape=dataclasses.asdict(shape), threads=threads, micro_tokens=micro_tokens)
    path = os.pathsep.join([str(record.ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "bench.train", json.dumps(facts)],
        env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{name}: its peak was not measured: {done.stderr.strip()[-400:]}")
    whole, update = json.loads(done.stdout.splitlines()[-1])
    return whole, update


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What is measured."""

    batches: tuple[str, ...] = tuple(SHAPES)
    arms: tuple[str, ...] = ARMS
    threads: int = 1
    rounds: int = 5
    micro_tokens: int = 4096  # as TrainConfig
    memory: bool = True


def measure(folder: str, plan: Plan, kind: str, shape: Shape, say: Callable[[str], None]) -> list[TrainRow]:
    """The rows of one batch, all arms side by side."""
    batch = drawn(shape, folder)
    torch.set_num_threads(plan.threads)
    arms, errors = [], {}
    wanted: dict[str, Tensor] = {}
    for name in sorted(plan.arms, key=lambda name: name != "trl"):  # what the others are held against comes first
        arm = make(name, folder, batch, plan.threads, plan.micro_tokens)
        arm.name = name
        arm.gradients()
        wanted = wanted or {key: value.clone() for key, value in arm.named().items()}
        errors[name] = error_of(arm, wanted)
        arm.step()
        say(f"  {name}: gradients differ by {errors[name]:.1e}")
        arms.append(arm)
    del wanted
    timed = [arm for arm in arms if errors[arm.name] <= TOLERANCE]
    rounds = range(plan.rounds)
    order, shuffle = list(timed), random.Random(0)
    times: dict[str, list[float]] = {arm.name: [] for arm in timed}
    for turn in rounds:
        shuffle.shuffle(order)
        for arm in order:
            times[arm.name].append(visit(arm, 0))
        say(f"  round {turn + 1}: " + ", ".join(f"{name} {values[-1]:.1f} s" for name, values in times.items()))
    del arms, timed, order, arm
    gc.collect()
    commit, dirty = record.commit()
    rows = []
    tokens = sum(shape.lengths)
    for name in plan.arms:
        found = harness.spread(times[name]) if name in times else None
        whole, update = (None, None)
        if plan.memory and found:
            whole, update = peak(name, folder, shape, plan.threads, plan.micro_tokens)
        rows.append(
            TrainRow(
                arm=name, batch=kind, shape=dataclasses.asdict(shape), tokens=tokens,
                drawn=int(sum(one.mask.sum() for one in batch)),
                threads=plan.threads, clock="processor" if plan.threads == 1 else "wall",
                gate="passed" if found else f"failed: gradients differ by {errors[name]:.1e}", error=errors[name],
                median_s=found and found.median, p20_s=found and found.p20, p80_s=found and found.p80,
                tokens_per_s=found and tokens / found.median, rounds=plan.rounds, micro_tokens=plan.micro_tokens,
                faster=harness.ratios(times, name) if found else None, all_bytes=whole, update_bytes=update,
                commit=commit, dirty=dirty, machine=record.machine(), date=record.now(), command=record.command(),
            )
        )  # fmt: skip
    return rows


def table(rows: Sequence[TrainRow]) -> str:
    """Rows for a reader."""

    def gib(value: int | None) -> str:
        return "" if value is None else f"{value / 2**30:.2f}"

    lines = []
    for row in rows:
        faster = row.faster or {}
        speed = [f"{row.tokens_per_s:.1f}" if row.tokens_per_s else row.gate]
        speed.append(f"{faster['trl'][0]:.2f}" if "trl" in faster else "")
        speed.append(f"{faster['trl_1'][0]:.2f}" if "trl_1" in faster else "")
        lines.append([row.batch, row.arm, *speed, gib(row.all_bytes), gib(row.update_bytes)])
    header = ["batch", "arm", "tokens/s", "times trl", "times trl_1", "all GiB", "update GiB"]
    return tables.table(header, lines)


def run(plan: Plan, say: Callable[[str], None], *, out: Path = RESULTS) -> list[TrainRow]:
    """Measure, append the rows to ``out``."""
    from m3.models.hub import resolve

    folder = str(resolve(MODEL))
    rows = []
    for kind in plan.batches:
        say(f"{MODEL}, {kind} batch of {SHAPES[kind].lengths} tokens, {plan.threads} thread(s)")
        found = measure(folder, plan, kind, SHAPES[kind], say)
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(dataclasses.asdict(row), allow_nan=False) + "\n" for row in found)
        rows += found
    return rows


def add_options(options: argparse.ArgumentParser) -> None:
    """Those of ``python -m bench train``."""
    options.add_argument("--batches", nargs="+", default=list(Plan.batches), choices=list(SHAPES))
    options.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    options.add_argument("--threads", type=int, default=Plan.threads)
    options.add_argument("--rounds", type=int, default=Plan.rounds)
    options.add_argument("--micro-tokens", type=int, default=Plan.micro_tokens)
    options.add_argument("--no-memory", action="store_true", help="do not measure the peak of each arm")
    options.add_argument("--out", type=Path, default=RESULTS, help=f"JSON lines to add to (default: {RESULTS.name})")


def carry_out(given: argparse.Namespace) -> int:
    """Measure and print what the options ask for; 1 where a gate failed."""
    plan = Plan(
        batches=tuple(given.batches), arms=tuple(given.arms), threads=given.threads, rounds=given.rounds,
        micro_tokens=given.micro_tokens, memory=not given.no_memory,
    )  # fmt: skip
    rows = run(plan, functools.partial(print, file=sys.stderr, flush=True), out=given.out)
    print(table(rows))
    return int(any(row.gate != "passed" for row in rows))


if __name__ == "__main__":  # the process in which the memory of one arm is measured
    facts = json.loads(sys.argv[1])
    print(json.dumps(peak_here(**{**facts, "shape": Shape(**facts["shape"])})))
