"""What a run leaves to look at: numbers of its steps, what they cost in time, samples as text, a batch that failed.

    metrics.jsonl   one line a step; a function of the run's settings alone, so the same, byte for byte, after a resume
    timings.jsonl   one line a step: seconds, tokens a second, memory
    samples/        step-000010.txt: some samples, step by step, with their rewards and advantages
    tensorboard/    both, where tensorboard is installed
    failed-step-000007.pt   the batch of a step whose loss or gradient was not finite

Steps count from 1 here: line n is written when n steps are done.
"""

from __future__ import annotations

import dataclasses
import fcntl
import importlib.util
import itertools
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from m3.train.streams import Sample
from m3kernels.checks import refuse
from m3kernels.policy_loss.losses import LOG_RATIO_LIMIT

METRICS, TIMINGS, SAMPLES, TENSORBOARD = "metrics.jsonl", "timings.jsonl", "samples", "tensorboard"
LOCK = "run.lock"  # held while a process writes; nothing is in it
CLOCK_NAMES = ("seconds", "per_second")  # a metric that ends so is of the clock
Decode = Callable[[list[int]], str]


def of_the_clock(name: str) -> bool:
    """Whether a metric tells time: it differs from run to run, and stands in timings.jsonl."""
    return name.endswith(CLOCK_NAMES)


class RunLog:
    """Writes the files of a run; one process at a time.

    Args:
        folder: of the run.
        decode: ids to text, special tokens included; None: samples are not written.
        tensorboard: write for it too, if it is installed.
    Raises:
        ValueError: another process has the run open.
    """

    def __init__(self, folder: str | Path, *, decode: Decode | None = None, tensorboard: bool = True) -> None:
        self.folder, self.decode, self.tensorboard = Path(folder), decode, tensorboard
        self._board: Any = None
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = (self.folder / LOCK).open("ab")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._lock.close()
            raise refuse("train", str(self.folder), "a run that no process has open", "one that is going on") from error

    def begin(self, step: int) -> None:
        """To be called before ``step``: so many steps are done; lines beyond them are dropped, they will come again.

        Raises:
            ValueError: a line of the files is not one; names it.
        """
        for name in (METRICS, TIMINGS):
            _cut(self.folder / name, step)
        if self.tensorboard and importlib.util.find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(self.folder / TENSORBOARD), purge_step=step + 1)

    def step(self, step: int, metrics: Mapping[str, float], timings: Mapping[str, float]) -> None:
        """Add a line to each file; those metrics that are of the clock go with the timings.

        Raises:
            ValueError: a metric that is no finite number; names it.
        """
        check(metrics)
        plain = {name: value for name, value in metrics.items() if not of_the_clock(name)}
        clock = {name: value for name, value in metrics.items() if of_the_clock(name)} | dict(timings)
        for file, values in ((METRICS, plain), (TIMINGS, clock)):
            try:
                with (self.folder / file).open("ab") as out:
                    out.write(json.dumps({"step": step, **values}, allow_nan=False).encode() + b"\n")
            except OSError as error:
                raise OSError(f"metrics: {self.folder / file}: {error}") from error
            for name, value in values.items() if self._board is not None else ():
                self._board.add_scalar(name, value, step)

    def samples(self, step: int, samples: Sequence[Sample]) -> None:
        if self.decode is None or not samples:
            return
        folder = self.folder / SAMPLES
        folder.mkdir(exist_ok=True)
        text = "\n".join(sample_text(sample, self.decode) for sample in samples)
        (folder / f"step-{step:06d}.txt").write_text(text, encoding="utf-8", errors="backslashreplace")

    def to_disk(self) -> None:
        """What a checkpoint will rely on."""
        for name in (METRICS, TIMINGS):
            if (self.folder / name).exists():
                with (self.folder / name).open("rb") as file:
                    os.fsync(file.fileno())

    def close(self) -> None:
        self._lock.close()
        if self._board is not None:
            self._board.close()


def check(metrics: Mapping[str, Any]) -> None:
    """Raises ValueError: a metric that is no finite number; names it."""
    for name, value in metrics.items():
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            raise refuse("metrics", name, "a finite number", value)


def read_metrics(path: str | Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl or timings.jsonl of a run, also of one that runs: a line not yet whole is left out."""
    return [json.loads(line) for line in Path(path).read_bytes().split(b"\n")[:-1]]


def sample_text(sample: Sample, decode: Decode) -> str:
    """A sample to be read: facts, then its tokens in runs of one step, what the policy said marked off."""
    facts = [f"domain {sample.domain or '-'}", f"group {sample.group or '-'}", f"rollout {sample.rollout}"]
    facts += [] if sample.reward is None else [f"reward {sample.reward:.3f}"]
    facts += [f"{sample.drawn} of {sample.tokens} tokens count"]
    lines = [f"==== {sample.id}: {', '.join(facts)}"]
    lines += [f"     {name}: {value}" for name, value in sample.note.items()]
    for begin, end in _runs(sample):
        step, counts = int(sample.steps[begin]), bool(sample.mask[begin] > 0)
        told = [f"step {step}" if step >= 0 else "given", f"{end - begin} tokens"]
        if step in sample.gammas:
            told.append(f"gamma {sample.gammas[step]:g}")
        if counts and sample.advantages is not None:
            told.append(f"advantage {float(sample.advantages[begin:end].mean()):+.3f}")
        lines += [
            f"-- {'policy' if counts else 'not counted'}: {', '.join(told)}",
            decode(sample.ids[begin:end].tolist()),
        ]
    return "\n".join(lines) + "\n"


def save_batch(path: Path, samples: Sequence[Sample], why: str) -> None:
    """The samples of a step that failed, for ``load_batch``.

    Raises:
        OSError: the disk is full, or worse; nothing is there.
    """
    rows = [{field.name: getattr(sample, field.name) for field in dataclasses.fields(sample)} for sample in samples]
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            torch.save({"why": why, "samples": rows}, file)
        part.replace(path)
    except BaseException as error:
        part.unlink(missing_ok=True)
        if isinstance(error, RuntimeError):  # torch's name for what the disk has said
            raise OSError(f"{path}: {error}") from error
        raise


def load_batch(path: str | Path) -> tuple[list[Sample], str]:
    """(samples, why it failed) of a file of ``save_batch``."""
    found = torch.load(Path(path), weights_only=True)
    return [Sample(**row) for row in found["samples"]], found["why"]


def told_by(samples: Sequence[Sample]) -> dict[str, float]:
    """What the samples of a step say of themselves: counts, and means of what all of them have.

    ``tokens_packed`` are all tokens, ``tokens_drawn`` those that count (the loss's own ``tokens`` counts them anew in
    each epoch).
    ``advantage`` and ``sampler_gap`` (nats by which a token was likelier to its sampler than to the trainer) are means
    over the tokens that count.
    """
    drawn = sum(sample.drawn for sample in samples)
    tokens = sum(sample.tokens for sample in samples)
    found: dict[str, float] = {"samples": len(samples), "tokens_packed": tokens, "tokens_drawn": drawn}
    rewards = [sample.reward for sample in samples if sample.reward is not None]
    if rewards:
        found["reward"] = math.fsum(rewards) / len(rewards)
    advantages: list[Tensor] = []
    gaps: list[Tensor] = []
    for sample in samples:
        counts = sample.mask > 0
        if sample.advantages is not None:
            advantages.append(sample.advantages[counts])
        if sample.sampler_logprobs is not None and sample.old_logprobs is not None:
            gaps.append(
                (sample.sampler_logprobs - sample.old_logprobs)[counts].clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
            )
    for name, parts in (("advantage", advantages), ("sampler_gap", gaps)):
        if drawn and len(parts) == len(samples):
            found[name] = float(torch.cat(parts).double().mean())
    return found


def _runs(sample: Sample) -> Iterator[tuple[int, int]]:
    """(begin, end) of the runs of tokens of one step that count or do not."""
    key = sample.steps * 2 + (sample.mask > 0)
    bounds = [0, *((key[1:] != key[:-1]).nonzero()[:, 0] + 1).tolist(), sample.tokens]
    return itertools.pairwise(bounds)


def _cut(path: Path, step: int) -> None:
    """Keep the lines of steps up to ``step``; one that a kill cut short goes with the others."""
    if not path.is_file():
        return
    kept, last = [], 0
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            done = json.loads(line)["step"]
        except (ValueError, TypeError, KeyError) as error:
            if last >= step:  # what a machine that went down left of lines that come again
                break
            raise refuse("metrics", f"{path}: line {number}", "JSON with a step", repr(line[:60])) from error
        if done <= step:
            kept.append(line)
            last = done
    part = path.with_name(path.name + ".part")
    try:
        part.write_bytes(b"".join(line + b"\n" for line in kept))
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise OSError(f"metrics: {path}: {error}") from error
