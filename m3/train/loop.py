"""The loop of every stage: a batch from the source, its loss, an update of the weights, and again; blind to algorithms.

    step       the source makes a batch (asynchronously); the loop fills in what it lacks of log-probabilities, takes
               ``minibatches * epochs`` updates on it, tells the source, writes a line of metrics
    exactness  a run that was interrupted has the same weights, moments and metrics as one that was not, bit for bit, on
               a CPU with the same threads, if the source keeps its promise (stage.py)
    SIGTERM    (and SIGINT) the step under way is finished, or the batch under way given up; a checkpoint is written;
               ``train`` returns with ``Outcome.signal``, for which a program exits with 128 + signal (143). A second
               signal acts as if nobody had asked for the first

Work on tensors is done on one thread beside the event loop, so a source can go on with what waits on others.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import functools
import json
import math
import random
import resource
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from m3.train import checkpoint, objective
from m3.train.metrics import Decode, RunLog, check, save_batch, told_by
from m3.train.objective import MetricSum
from m3.train.optim import OptimConfig, Optimizer
from m3.train.policy_model import PolicyModel
from m3.train.stage import NonFiniteError, OtherRankError, Source, StepBatch
from m3.train.streams import Sample, microbatches, pack
from m3kernels.checks import refuse
from m3kernels.threads import release_threads

CHECKPOINTS, MODEL = "checkpoints", "model"
Progress = Callable[[int, int, Mapping[str, float]], None]  # (steps done, steps in all, metrics of the last)
T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that decides a run beside its source, its model and its objective.

    Args:
        steps: batches; the source may end before.
        max_tokens: of a microbatch; a longer sample stands alone. Changes memory and rounding, not the loss.
        minibatches: parts of a batch, in order, one update each. epochs: times that a batch is gone through.
        checkpoint_every: steps; one is written at the end in any case. keep: how many.
        samples_every: steps; 0: never. samples: how many of a batch are written as text.
        deterministic: ask torch for deterministic algorithms; it warns of those that are not. On a CPU the same seed
            gives the same bytes with the same number of threads; with another one, last bits differ.
        workspace_bytes: of logits at once, as in linear_policy_loss.
        seed: of torch's and python's generators when a run begins.
    """

    steps: int
    max_tokens: int = 4096  # ours: fills a CPU's cores, and fits beside a small model
    minibatches: int = 1
    epochs: int = 1
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    checkpoint_every: int = 10
    keep: int = 2
    samples_every: int = 10
    samples: int = 4
    tensorboard: bool = True
    deterministic: bool = True
    workspace_bytes: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "max_tokens", "minibatches", "epochs", "checkpoint_every", "keep"):
            if getattr(self, name) < 1:
                raise refuse("TrainConfig", name, "at least 1", getattr(self, name))
        for name in ("samples_every", "samples"):
            if getattr(self, name) < 0:
                raise refuse("TrainConfig", name, "at least 0", getattr(self, name))

    @property
    def updates_per_batch(self) -> int:
        return self.minibatches * self.epochs

    def deciding(self) -> dict[str, Any]:
        """JSON of the settings that the weights follow from: those that a resumed run must share."""
        free = {"checkpoint_every", "keep", "samples_every", "samples", "tensorboard"}
        free |= {"steps"} if self.optim.schedule == "constant" else set()
        found = {name: value for name, value in dataclasses.asdict(self).items() if name not in free}
        return json.loads(json.dumps(found))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a call of ``train`` ended: ``step`` steps are done, in all; ``signal`` ended it, or nothing did (None).

    ``model``: folder of the exported weights; None after a signal.
    """

    step: int
    signal: int | None
    model: Path | None


class Ranks(Protocol):
    """The processes that train together. All of them call ``train`` with sources that give all the same batches."""

    rank: int
    size: int

    def microbatches(self, samples: Sequence[Sample], max_tokens: int) -> list[list[Sample]]:
        """This rank's part of the samples of one update: as many microbatches on each rank."""
        ...

    def summed(self, metrics: MetricSum) -> MetricSum:
        """The metrics of all ranks' parts."""
        ...

    def any(self, flag: bool) -> bool:
        """Whether it is true on some rank."""
        ...

    def mean(self, value: float | None, weight: float) -> float | None:
        """Of the values of all ranks by their weights; None where no rank has one."""
        ...

    def state_of(
        self, model: PolicyModel, optimizer: Optimizer, moment: checkpoint.Moment, run: Mapping[str, Any]
    ) -> checkpoint.State:
        """The whole state, on rank 0 at least; as ``checkpoint.state_of``. All ranks call it."""
        ...

    def restore(self, state: checkpoint.State, model: PolicyModel, optimizer: Optimizer) -> None:
        """As ``checkpoint.restore``."""
        ...

    def export(self, model: PolicyModel, folder: Path) -> None:
        """As ``checkpoint.export``; one rank writes."""
        ...


class Alone:
    """One process."""

    rank, size = 0, 1

    def microbatches(self, samples: Sequence[Sample], max_tokens: int) -> list[list[Sample]]:
        return microbatches(samples, max_tokens)

    def summed(self, metrics: MetricSum) -> MetricSum:
        return metrics

    def any(self, flag: bool) -> bool:
        return flag

    def mean(self, value: float | None, weight: float) -> float | None:
        return value

    def state_of(
        self, model: PolicyModel, optimizer: Optimizer, moment: checkpoint.Moment, run: Mapping[str, Any]
    ) -> checkpoint.State:
        return checkpoint.state_of(model, optimizer, moment, run)

    def restore(self, state: checkpoint.State, model: PolicyModel, optimizer: Optimizer) -> None:
        checkpoint.restore(state, model, optimizer)

    def export(self, model: PolicyModel, folder: Path) -> None:
        checkpoint.export(model, folder)


async def train(
    source: Source,
    model: PolicyModel,
    config: TrainConfig,
    out: str | Path,
    *,
    reference: PolicyModel | None = None,
    teachers: Mapping[str, PolicyModel] | None = None,
    decode: Decode | None = None,
    progress: Progress = lambda done, steps, metrics: None,
    ranks: Ranks | None = None,
) -> Outcome:
    """Train until ``config.steps``, the source's end or a signal; goes on from the newest checkpoint under ``out``.

    Signals are heard on the main thread only. The source is the caller's to close.

    Args:
        out: folder of the run: checkpoints/, model/ (the exported weights), and the files of metrics.py.
        reference: for samples without ref_logprobs, where the objective has a KL term; None: the teacher of the
            sample's domain is the reference (MOPD).
        teachers: by domain, for samples without teacher_logprobs, where the objective distils.
        decode: ids to text, for samples to read.
    Raises:
        ValueError: a stream that is missing and that nobody here can compute; a run under ``out`` with other settings,
            or with checkpoints of which none is whole; another process has the run open.
        NonFiniteError: nan or inf in a stream, a loss, a gradient. The batch lies in ``out`` (metrics.load_batch),
            weights are as before that update.
        OSError: a checkpoint could not be written; older ones are as they were.
        OtherRankError: another rank has raised one of these.
        What the source raises. Before what it or the loss raises, a checkpoint of the steps before is written, but
        where an update of the step was taken already, or one rank of several has failed in it.
    """
    run = Run(source, model, config, Path(out), reference, teachers or {}, decode, progress, ranks or Alone())
    with _deterministic(config.deterministic), Signals() as signals:
        return await run.to_the_end(signals)


class Run:
    """One call of ``train``."""

    def __init__(
        self,
        source: Source,
        model: PolicyModel,
        config: TrainConfig,
        out: Path,
        reference: PolicyModel | None,
        teachers: Mapping[str, PolicyModel],
        decode: Decode | None,
        progress: Progress,
        ranks: Ranks,
    ) -> None:
        self.source, self.model, self.config, self.out = source, model, config, out
        self.reference, self.teachers, self.progress, self.ranks = reference, teachers, progress, ranks
        self.objective = source.objective
        self.optimizer = Optimizer(model, config.optim)
        spec = self.objective.spec.to_text()
        self.settings = {**config.deciding(), "objective": f"{spec} {self.objective.aggregation}"}
        self.settings["frozen"] = model.frozen()
        self.step, self.written = 0, -1
        self.log = RunLog(out, decode=decode, tensorboard=config.tensorboard) if self.ranks.rank == 0 else None
        try:
            path = checkpoint.latest(out / CHECKPOINTS)
            self.resumed = path is not None
            if path is not None:
                self._resume(path)
            elif damaged := checkpoint.finished(out / CHECKPOINTS):
                want = "a checkpoint that is whole, or none: remove those that are damaged to begin anew"
                raise refuse("train", f"{out / CHECKPOINTS}", want, f"{len(damaged)} damaged")
            else:
                torch.manual_seed(config.seed)
                random.seed(config.seed)
            self.moment = checkpoint.moment(self.step, source.state())
            if self.log is not None:
                self.log.begin(self.step)
        except BaseException:
            if self.log is not None:
                self.log.close()
            raise

    def _resume(self, path: Path) -> None:
        state = checkpoint.load(path)
        other = [name for name in {**state.run, **self.settings} if state.run.get(name) != self.settings.get(name)]
        if other:
            told = ", ".join(f"{name} = {state.run.get(name)!r}" for name in other)
            raise refuse("train", f"{path}", f"a run with the settings of this one; it has {told}", "another run")
        here = checkpoint.machine()
        if here != state.machine:
            warnings.warn(f"{path}: made with {dict(state.machine)}, here {here}: last bits may differ", stacklevel=4)
        self.ranks.restore(state, self.model, self.optimizer)
        self.source.load_state(state.moment.source)
        self.step = self.written = state.moment.step

    # -- the run ------------------------------------------------------------------------------------------------------
    async def to_the_end(self, signals: Signals) -> Outcome:
        with concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="m3-train") as thread:
            try:
                return await self._go(signals, _Worker(thread))
            finally:
                if self.log is not None:
                    self.log.close()

    async def _go(self, signals: Signals, work: _Worker) -> Outcome:
        if self.resumed:
            await self.source.updated(self.step - 1, self.step)
        while self.step < self.config.steps and not await self._stopped(signals, work):
            begun = time.monotonic()
            try:
                batch = await self._batch(signals)
            except Exception:
                await self._checkpoint(work)  # the steps before are not lost to what ails the source
                raise
            if batch is None:
                break
            waited, updates = time.monotonic() - begun, self.optimizer.updates
            try:
                values, timings = await work(functools.partial(self._learn, batch))
            except Exception:
                if self.ranks.size == 1 and self.optimizer.updates == updates:
                    await self._checkpoint(work)
                raise
            self.step += 1
            begun = time.monotonic()
            self.moment = checkpoint.moment(self.step, self.source.state())  # a resumed run tells the source too
            try:
                await self.source.updated(self.step - 1, self.step)
            except Exception:
                self._log(values, timings)
                if self.ranks.size == 1:
                    await self._checkpoint(work)
                raise
            self._log(values, timings | {"batch_seconds": waited, "refresh_seconds": time.monotonic() - begun})
            if self.log is not None and self.config.samples_every and self.step % self.config.samples_every == 0:
                self.log.samples(self.step, batch.samples[: self.config.samples])
            if self.step % self.config.checkpoint_every == 0:
                await self._checkpoint(work)
            self.progress(self.step, self.config.steps, values)
        await self._checkpoint(work)
        if await self._stopped(signals, work):
            return Outcome(step=self.step, signal=signals.first or signal.SIGTERM, model=None)
        folder = self.out / MODEL
        await work(functools.partial(self.ranks.export, self.model, folder))
        return Outcome(step=self.step, signal=None, model=folder)

    def _log(self, values: Mapping[str, float], timings: Mapping[str, float]) -> None:
        if self.log is not None:
            self.log.step(self.step, values, timings)

    async def _stopped(self, signals: Signals, work: _Worker) -> bool:
        """Whether some rank has had a signal; the event loop goes on while they wait for one another."""
        return await work(functools.partial(self.ranks.any, signals.first is not None))

    async def _batch(self, signals: Signals) -> StepBatch | None:
        """The next batch; None where there is no more, or a signal came first.

        Of several ranks only a source that tells all of them (``Relayed``) may be cancelled: it ends as it must.
        """
        task = asyncio.ensure_future(self.source.batch(self.step))
        stop = asyncio.ensure_future(signals.came.wait())
        try:
            await asyncio.wait({task, stop}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                if self.ranks.size == 1 or getattr(self.source, "relays", False):
                    task.cancel()
                await asyncio.wait({task})
            batch = None if task.cancelled() else task.result()
            if batch is not None and batch.step != self.step:
                raise refuse("train", "source.batch", f"the batch of step {self.step}", f"that of {batch.step}")
            return batch
        finally:
            for one in (task, stop):
                if not one.done():
                    one.cancel()
                    with contextlib.suppress(asyncio.CancelledError):
                        await one

    async def _checkpoint(self, work: _Worker) -> None:
        """One of the steps that are done; nothing where there is one, or no step is done."""
        if self.step in (0, self.written):
            return
        state = await work(
            functools.partial(self.ranks.state_of, self.model, self.optimizer, self.moment, self.settings)
        )
        if self.log is not None:
            self.log.to_disk()
            folder = self.out / CHECKPOINTS
            await work(functools.partial(checkpoint.write, folder, state, keep=self.config.keep))
        self.written = self.step

    # -- a step -------------------------------------------------------------------------------------------------------
    def _learn(self, batch: StepBatch) -> tuple[dict[str, float], dict[str, float]]:
        """(metrics, timings) of the updates that are taken on a batch."""
        begun = time.monotonic()
        check(batch.metrics)
        check({f"reward of {one.id!r}": one.reward for one in batch.samples if one.reward is not None})
        try:
            plan = self._plan(batch.samples)
            filled = time.monotonic()
            sums, norms, rate = self._update(plan)
        except NonFiniteError as error:
            self.optimizer.zero_grad()
            rank = f"-rank-{self.ranks.rank}" if self.ranks.rank else ""
            place = self.out / f"failed-step-{self.step + 1:06d}{rank}.pt"
            try:
                save_batch(place, batch.samples, str(error))
                saved = f"its batch is in {place}"
            except OSError as full:
                saved = f"its batch could not be saved: {full}"
            raise NonFiniteError(f"step {self.step + 1}: {error}; {saved}") from error
        done = time.monotonic()
        own = told_by([sample for _, parts in plan for part in parts for sample in part])
        told = own if self.ranks.size == 1 else told_by(batch.samples)
        gap = self.ranks.mean(own.get("sampler_gap"), own["tokens_drawn"])  # old_logprobs are with each rank's own
        values = {
            "loss": sums.loss / self.config.updates_per_batch,
            "grad_norm": math.fsum(norms) / len(norms),
            "lr": rate,
            **told,
            **({} if gap is None else {"sampler_gap": gap}),
            **sums.values(),
        }
        double = sorted(values.keys() & batch.metrics.keys())
        if double:
            raise refuse("train", "metrics", "of the source, other names than the loop's own", f"{double}")
        tokens = sum(sample.tokens for sample in batch.samples)
        timings = {
            "logprobs_seconds": filled - begun,
            "update_seconds": done - filled,
            "tokens_per_second": tokens * self.config.epochs / (done - filled),
            "peak_memory_bytes": _peak_memory(),
        }
        return {**values, **batch.metrics}, timings

    def _plan(self, samples: Sequence[Sample]) -> list[tuple[float, list[list[Sample]]]]:
        """(normaliser, this rank's microbatches) of each minibatch, with every stream that the objective needs."""
        if len(samples) < self.config.minibatches:
            raise refuse("train", "source.batch", f"at least {self.config.minibatches} samples", f"{len(samples)}")
        size, more = divmod(len(samples), self.config.minibatches)
        bounds = [index * size + min(index, more) for index in range(self.config.minibatches + 1)]
        wanted = objective.needed(self.objective, samples, self.config.updates_per_batch)
        lacking = [name for name in wanted if any(getattr(sample, name) is None for sample in samples)]
        plan = []
        for index in range(self.config.minibatches):
            part = samples[bounds[index] : bounds[index + 1]]
            total = objective.normaliser(self.objective, part)
            mine = self.ranks.microbatches(part, self.config.max_tokens)
            plan.append((total, [self._filled(one, lacking) for one in mine]))
        failure: Exception | None = None
        try:
            for _, parts in plan:
                for one in parts:
                    objective.check_streams(self.objective, one, self.config.updates_per_batch)
        except (NonFiniteError, ValueError) as error:
            failure = error
        self._stop_together(failure)
        return plan

    def _stop_together(self, failure: Exception | None) -> None:
        """Raises on all ranks what one of them has met, so that none waits for it."""
        if self.ranks.any(failure is not None):
            raise failure or OtherRankError("another rank has stopped, and says why")

    def _filled(self, samples: list[Sample], lacking: Sequence[str]) -> list[Sample]:
        """A microbatch with the log-probabilities that some model here can give it."""
        for name in lacking:
            if name == "old_logprobs":
                samples = objective.with_logprobs(name, samples, self.model)
            elif name == "ref_logprobs" and self.reference is not None:
                samples = objective.with_logprobs(name, samples, self.reference)
            elif name in ("ref_logprobs", "teacher_logprobs"):
                samples = self._judged(name, samples)
        return samples

    def _judged(self, name: str, samples: list[Sample]) -> list[Sample]:
        """Each sample with the log-probabilities of the teacher of its domain; in the same order."""
        found = list(samples)
        for domain in sorted(self.teachers):
            places = [index for index, sample in enumerate(samples) if sample.domain == domain]
            if places:
                told = objective.with_logprobs(name, [samples[index] for index in places], self.teachers[domain])
                for index, sample in zip(places, told, strict=True):
                    found[index] = sample
            elif self.ranks.size > 1:  # a teacher that is sharded computes on all ranks together
                self.teachers[domain].hidden(pack([min(samples, key=lambda sample: sample.tokens)]))
        return found

    def _update(self, plan: Sequence[tuple[float, list[list[Sample]]]]) -> tuple[MetricSum, list[float], float]:
        """All updates of a step: (metrics over all of them, norms of the gradients, rate of the last)."""
        sums, norms, rate = MetricSum(), [], 0.0
        updates = self.config.steps * self.config.updates_per_batch
        for _ in range(self.config.epochs):
            for total, parts in plan:
                self.optimizer.zero_grad()
                for index, part in enumerate(parts):
                    loss, metrics = objective.loss(
                        self.objective, self.model, pack(part), total, workspace_bytes=self.config.workspace_bytes
                    )
                    value = float(loss.detach())
                    names = ", ".join(repr(sample.id) for sample in part[:3])
                    why = f"loss: want a finite number; got {value} in microbatch {index} ({names})"
                    self._stop_together(None if math.isfinite(value) else NonFiniteError(why))
                    loss.backward()
                    sums.add(value, metrics)
                rate = self.config.optim.rate(self.optimizer.updates, updates)
                norms.append(self.optimizer.step(rate))
        self.optimizer.zero_grad()
        return self.ranks.summed(sums), norms, rate


class _Worker:
    """Runs functions on the one thread of tensors; a cancelled caller waits until its function has ended.

    Between two functions the processor is an engine's, if there is one: idle OpenMP threads are ended.
    """

    def __init__(self, thread: concurrent.futures.ThreadPoolExecutor) -> None:
        self.thread = thread

    async def __call__(self, function: Callable[[], T]) -> T:
        future = asyncio.get_running_loop().run_in_executor(self.thread, self._run, function)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            await asyncio.wait({future})
            raise

    @staticmethod
    def _run(function: Callable[[], T]) -> T:
        try:
            return function()
        finally:
            release_threads()


class Signals:
    """SIGTERM and SIGINT as something to wait for; the second one acts as it did before."""

    def __init__(self) -> None:
        self.first: int | None = None
        self.came = asyncio.Event()

    def __enter__(self) -> Signals:
        self._loop = asyncio.get_running_loop()
        self._before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.getsignal(number)
                self._loop.add_signal_handler(number, self._heard, number)
        return self

    def _heard(self, number: int) -> None:
        self.first = number
        self.came.set()
        self._give_back()

    def __exit__(self, *error: object) -> None:
        self._give_back()

    def _give_back(self) -> None:
        for number, before in self._before.items():
            self._loop.remove_signal_handler(number)
            signal.signal(number, before)
        self._before = {}


@contextlib.contextmanager
def _deterministic(wanted: bool) -> Iterator[None]:
    """torch's deterministic algorithms, without filling memory that nobody reads; as before afterwards."""
    memory: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = memory.fill_uninitialized_memory
    if wanted:
        torch.use_deterministic_algorithms(True, warn_only=True)
        memory.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        memory.fill_uninitialized_memory = fill


def _peak_memory() -> float:
    """Bytes that this process has held at most: of the GPU if it uses one."""
    if torch.cuda.is_initialized():
        return float(torch.cuda.max_memory_allocated())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(peak if sys.platform == "darwin" else peak * 1024)
