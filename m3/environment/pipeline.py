"""The asynchronous segmented pipeline: slots at work on different stages and patients, and their union a batch.

    inquiry  --V >= tau-->  pool of differential  --V >= tau-->  pool of lab  --V >= tau-->  pool of diagnosis
       |                            |                               |                             |
       +----------------------------+---- finished groups ----------+-----------------------------+-->  batches B_t

A slot takes a context x_k, draws its group of rollouts y_k (Eq 3) and has each rewarded (G_k of Eq 4). All of a whole
group go to the batch, good and bad. The pair (x_k, y_k) makes a context of the next stage only if V_k >= tau; else it
is discarded and the journal says why (Eq 6). Source: Baichuan-M3, arXiv 2602.06570, on the segmented pipeline.

What holds:

* A segment depends on its context, its seed and the policy, never on what runs beside it.
* Back-pressure. A slot starts only where the next pool has room for what it may carry there, and while less than
  ``1 + ahead`` batches wait; so no slot waits for room while it holds one, and the latest stage with work can start.
* Nothing finished is lost or done twice. A segment is in the journal before anything is made of it; a run that goes on
  from a journal walks the same tree and takes from the journal what it finds there.
* A failure has a name and a bound. A rollout that fails after its retries makes its group incomplete: the group stays
  out of batches, what finished in it may still be carried. More failures than ``max_failures`` end the run, and the
  groups they were in are tried again by a run that goes on. Any other exception ends the run.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import logging
import math
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from types import MappingProxyType, TracebackType
from typing import Any, Protocol, TypeVar

from m3.environment.case import Case, Phase
from m3.environment.episode import open_stage
from m3.environment.journal import Journal
from m3.environment.seeds import derive_seed
from m3.environment.segment import Batch, Context, Segment, StageScore
from m3.environment.stages import PHASES, following
from m3.environment.trajectory import Message, Trajectory
from m3.rewards.verdict import UnjudgedError
from m3.rollout.chat import ChatError, Failure
from m3kernels.checks import refuse

Result = TypeVar("Result")
_log = logging.getLogger(__name__)
NOT_RETRIED = (Failure.refused, Failure.over_budget)  # a second call would be answered the same


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Numbers of the pipeline; the paper gives none of them but K = 4.

    ``tau``: the gate of each stage. ``carry``: how many pairs of a group that pass the gate become contexts, drawn by
    seed: with all of them a tree of R + R^2 + R^3 + R^4 segments stands behind each case.
    """

    seed: int = 0
    epochs: int = 1  # times each case is taken
    stages: tuple[Phase, ...] = PHASES  # the first k of the four
    rollouts: int = 4  # ours: R of a context
    tau: Mapping[Phase, float] = dataclasses.field(default_factory=lambda: MappingProxyType(dict.fromkeys(PHASES, 0.5)))
    carry: int = 1
    slots: int = 8  # ours: groups at work at one time
    pool: int = 32  # ours: contexts that wait before a stage, at most
    batch_size: int = 16  # ours: segments of B_t
    ahead: int = 1  # ours: batches that may be made before they are asked for
    timeout: float = 600.0  # seconds of one answer, and of one reward
    retries: int = 2  # after a timeout, an unreachable server, or a reward that was not judged
    max_failures: int = 100  # of rollouts, in one run of the process

    def __post_init__(self) -> None:
        op = "pipeline.Config"
        for name, least in {"epochs": 1, "rollouts": 1, "carry": 1, "slots": 1, "batch_size": 1}.items():
            if getattr(self, name) < least:
                raise refuse(op, name, f"an integer >= {least}", getattr(self, name))
        for name in ("ahead", "retries", "max_failures"):
            if getattr(self, name) < 0:
                raise refuse(op, name, "an integer >= 0", getattr(self, name))
        if not self.timeout > 0:
            raise refuse(op, "timeout", "seconds > 0", self.timeout)
        if self.carry > self.pool:
            raise refuse(op, "pool", f"at least carry, {self.carry}", self.pool)
        if self.batch_size % self.rollouts:
            raise refuse(op, "batch_size", f"a multiple of rollouts, {self.rollouts}", self.batch_size)
        if not self.stages or self.stages != PHASES[: len(self.stages)]:
            raise refuse(op, "stages", "the first stages of a consultation, in order", str(list(self.stages)))
        for phase in self.stages:
            if phase not in self.tau:
                raise refuse(op, "tau", f"a number for each of {[str(p) for p in self.stages]}", f"none for {phase}")
            if math.isnan(self.tau[phase]):
                raise refuse(op, "tau", "numbers", f"nan for {phase}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """y_k. ``ended``: of an inquiry, why it ended."""

    messages: tuple[Message, ...]
    ended: str = ""


class Consultation(Protocol):
    """Who speaks: a policy, and the patients it sees."""

    @property
    def policy(self) -> str:
        """The policy's name."""

    @property
    def name(self) -> str:
        """The policy's name and what else tells this one from others: a journal is bound to it."""

    @property
    def version(self) -> int:
        """The policy's version now; it may grow while the pipeline runs."""

    async def open(self, case: Case, *, seed: int) -> tuple[Message, ...]:
        """x_1: the first instruction and what was said before the policy speaks."""
        ...

    async def answer(self, context: Context, *, seed: int, rollout: int) -> Answer:
        """y_k. Raises ChatError: no answer."""
        ...


class StageReward(Protocol):
    """G_k and V_k of one stage. Raises UnjudgedError or ChatError where it cannot tell; it has no default."""

    @property
    def name(self) -> str:
        """What it is, with what its scores depend on: a journal is bound to it."""

    async def __call__(self, case: Case, trajectory: Trajectory, phase: Phase) -> StageScore:
        """Score the stage ``phase`` of a trajectory, which ends with it."""
        ...


class PipelineError(RuntimeError):
    """More rollouts failed than the configuration bears; the message counts failures by name."""


@dataclasses.dataclass(kw_only=True)
class Progress:
    """Counts, of this process and (``resumed``) of what was in the journal."""

    segments: collections.Counter[Phase] = dataclasses.field(default_factory=collections.Counter)
    resumed: collections.Counter[Phase] = dataclasses.field(default_factory=collections.Counter)
    discarded: collections.Counter[tuple[Phase, str]] = dataclasses.field(default_factory=collections.Counter)
    failed: collections.Counter[tuple[Phase, str]] = dataclasses.field(default_factory=collections.Counter)
    most_waiting: collections.Counter[Phase] = dataclasses.field(default_factory=collections.Counter)  # in a pool
    batches: int = 0


class Pipeline:
    """Batches of finished segments: ``async with Pipeline(...) as pipeline: async for batch in pipeline: ...``.

    The pipeline works on while its user does something else in the same event loop, up to ``ahead`` batches. Leaving
    the ``async with``, or cancelling, stops the slots; the journal stays whole.

    Args:
        cases: who is seen; ids used once.
        consultation: who speaks.
        rewards: of each stage.
        config: numbers.
        journal: where segments go; of ``Pipeline.run_of(...)``. None: nothing is kept.
        first_step: batches from this step on that the journal holds are given again, the same; None: none of them is.
    """

    def __init__(
        self,
        cases: Sequence[Case],
        consultation: Consultation,
        rewards: Mapping[Phase, StageReward],
        config: Config | None = None,
        *,
        journal: Journal | None = None,
        first_step: int | None = None,
    ) -> None:
        self.config = config or Config()
        self.progress = Progress()
        for phase in self.config.stages:
            if phase not in rewards:
                raise refuse("Pipeline", "rewards", f"a reward of the stage {phase}", str([str(p) for p in rewards]))
        if len({case.id for case in cases}) < len(cases):
            raise refuse("Pipeline", "cases", "ids used once", f"{len(cases)} cases with fewer ids")
        self._consultation, self._rewards, self._journal = consultation, rewards, journal
        self._roots: Iterator[tuple[int, Case]] = ((e, case) for e in range(self.config.epochs) for case in cases)
        self._pools: dict[Phase, collections.deque[Context]] = {p: collections.deque() for p in self.config.stages}
        self._reserved: collections.Counter[Phase] = collections.Counter()  # places in pools that slots may fill
        self._at_work: dict[asyncio.Task[None], Phase] = {}
        self._waiting: collections.deque[tuple[Segment, ...]] = collections.deque()  # whole groups, not yet in a batch
        self._batched: set[str] = set()
        self._replays: collections.deque[Batch] = collections.deque()
        self._step = 0
        self._error: BaseException | None = None
        self._wake = asyncio.Event()
        self._closed = False
        if journal is not None:
            self._recall_batches(journal, first_step)

    @staticmethod
    def run_of(
        cases: Sequence[Case], consultation: Consultation, rewards: Mapping[Phase, StageReward], config: Config
    ) -> dict[str, Any]:
        """What segments depend on, for ``Journal(path, run=...)``: not slots, pools, batches, timeouts."""
        return {
            "seed": config.seed,
            "epochs": config.epochs,
            "rollouts": config.rollouts,
            "carry": config.carry,
            "stages": [str(phase) for phase in config.stages],
            "tau": {str(phase): config.tau[phase] for phase in config.stages},
            "cases": [f"{case.id} version {case.version}" for case in cases],
            "consultation": consultation.name,
            "rewards": {str(phase): rewards[phase].name for phase in config.stages},
        }

    async def run(self) -> Progress:
        """Everything to the end, without looking at the batches."""
        async with self:
            async for _ in self:
                pass
        return self.progress

    async def __aenter__(self) -> Pipeline:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
        if error is None and self._error is not None:
            raise self._error

    def __aiter__(self) -> AsyncIterator[Batch]:
        return self

    async def __anext__(self) -> Batch:
        """The next batch; the last may be smaller.

        Raises:
            PipelineError: too many failures.
            Exception: whatever the consultation or a reward raised that is no failure with a name.
        """
        if self._replays:
            return self._replays.popleft()
        while True:
            if self._error is not None:
                error, self._error = self._error, None
                await self.close()
                raise error
            if self._closed:
                raise StopAsyncIteration
            self._fill()
            if sum(map(len, self._waiting)) >= self.config.batch_size or (self._waiting and not self._at_work):
                return await self._take_batch()
            if not self._at_work:
                await self.close()
                raise StopAsyncIteration
            self._wake.clear()
            await self._wake.wait()

    async def close(self) -> None:
        """Stop the slots and wait until they have. What finished before is in the journal."""
        self._closed = True
        tasks = list(self._at_work)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._journal is not None:
            await asyncio.to_thread(self._journal.sync)

    # -- which slot does what -----------------------------------------------------------------------------------------
    def _fill(self) -> None:
        """Start slots while there are slots, work, and room for what comes of it."""
        config = self.config
        while not self._closed and self._error is None and len(self._at_work) < config.slots:
            made = sum(map(len, self._waiting)) + len(self._at_work) * config.rollouts
            if made >= (1 + config.ahead) * config.batch_size:
                return
            busy = collections.Counter(self._at_work.values())
            ready = [phase for phase in config.stages if self._has_work(phase) and self._has_room_after(phase)]
            if not ready:
                return
            phase = min(reversed(ready), key=lambda one: busy[one])  # a mixture of stages; of equals, the latest
            if (after := self._after(phase)) is not None:
                self._reserved[after] += config.carry
            context = self._pools[phase].popleft()
            work = self._begin(context) if phase == PHASES[0] else self._roll(context)
            task = asyncio.create_task(work, name=f"slot {phase}")
            self._at_work[task] = phase
            task.add_done_callback(self._on_done)

    def _after(self, phase: Phase) -> Phase | None:
        after = following(phase)
        return after if after in self.config.stages else None

    def _has_work(self, phase: Phase) -> bool:
        """Contexts wait before the stage; the first stage draws on cases."""
        pool = self._pools[phase]
        if phase == PHASES[0] and not pool and (root := next(self._roots, None)) is not None:
            epoch, case = root
            pool.append(Context(id=f"{case.id}@{epoch}", case=case, phase=phase, messages=()))
        return bool(pool)

    def _has_room_after(self, phase: Phase) -> bool:
        after = self._after(phase)
        if after is None:
            return True
        return len(self._pools[after]) + self._reserved[after] + self.config.carry <= self.config.pool

    def _on_done(self, task: asyncio.Task[None]) -> None:
        phase = self._at_work.pop(task)
        if (after := self._after(phase)) is not None:
            self._reserved[after] -= self.config.carry
        error: BaseException | None
        if not task.cancelled():
            error = task.exception()
        elif self._closed:
            error = None
        else:  # not by us: a call inside was cancelled, and its group would be missing without a word
            error = PipelineError(f"pipeline: a slot of the stage {phase} was cancelled by what it waited for")
        if error is not None and self._error is None:
            self._error = error
            self._closed = True
        self._fill()
        self._wake.set()

    # -- one group ----------------------------------------------------------------------------------------------------
    async def _begin(self, empty: Context) -> None:
        """The group of a case's inquiry; its context is opened first."""
        context = await self._opened(empty)
        if context is not None:
            await self._roll(context)

    async def _opened(self, empty: Context) -> Context | None:
        """The context of a case's inquiry; None: it failed, and is counted."""
        seed = derive_seed(self.config.seed, "open", empty.id)
        try:
            messages = await self._attempts(lambda: self._consultation.open(empty.case, seed=seed))
        except (ChatError, UnjudgedError, TimeoutError) as error:
            self._count_failure(empty.phase, error)
            return None
        return dataclasses.replace(empty, messages=messages)

    async def _rollouts(self, context: Context) -> tuple[tuple[Segment, ...], dict[str, str]]:
        """All rollouts of a context: (segments, names of failures by segment)."""
        try:
            async with asyncio.TaskGroup() as group:
                rollouts = [group.create_task(self._segment(context, i)) for i in range(self.config.rollouts)]
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None
        found = [task.result() for task in rollouts]
        segments = tuple(one for one in found if isinstance(one, Segment))
        return segments, {context.segment(i): one for i, one in enumerate(found) if not isinstance(one, Segment)}

    async def _roll(self, context: Context) -> None:
        """All rollouts of a context, then the gate."""
        segments, failed = await self._rollouts(context)
        carried, discarded = self._gate(context, segments)
        record = {
            "kind": "group",
            "id": context.id,
            "phase": str(context.phase),
            "carried": [segment.id for segment in carried],
            "discarded": discarded,
            "failed": failed,
        }
        if self._journal is not None and ("group", context.id) not in self._journal:
            self._journal.append(record)
        if (after := self._after(context.phase)) is not None:
            for segment in carried:
                self._pools[after].append(self._next(context.case, segment, after))
            self.progress.most_waiting[after] = max(self.progress.most_waiting[after], len(self._pools[after]))
        if not failed and segments[0].id not in self._batched:
            self._waiting.append(segments)

    def _gate(self, context: Context, segments: Sequence[Segment]) -> tuple[list[Segment], dict[str, str]]:
        """Eq 6: the pairs that go on, in order of rollouts, and of every other the reason why not."""
        if self._after(context.phase) is None:
            return [], {}
        tau = self.config.tau[context.phase]
        passed = [segment for segment in segments if segment.quality >= tau]
        discarded = {s.id: f"below_tau: {s.quality:.6g} < {tau:g}" for s in segments if s.quality < tau}
        draw = random.Random(derive_seed(self.config.seed, "gate", context.id))
        drawn = set(draw.sample([s.id for s in passed], min(self.config.carry, len(passed))))
        discarded |= {s.id: f"not_drawn: {len(drawn)} of {len(passed)} go on" for s in passed if s.id not in drawn}
        for name, reason in discarded.items():
            _log.info("%s: discarded: %s", name, reason)
            self.progress.discarded[context.phase, reason.partition(":")[0]] += 1
        return [segment for segment in passed if segment.id in drawn], discarded

    @staticmethod
    def _next(case: Case, segment: Segment, phase: Phase) -> Context:
        messages = open_stage(case, segment.prompt, segment.response, phase)
        return Context(id=segment.id, case=case, phase=phase, messages=messages)

    async def _segment(self, context: Context, rollout: int) -> Segment | str:
        """One rollout, from the journal where it is there; or the name of its failure."""
        name = context.segment(rollout)
        if self._journal is not None and (record := self._journal.get("segment", name)) is not None:
            self.progress.resumed[context.phase] += 1
            return Segment.from_json(record["segment"])
        if self._journal is not None and (group := self._journal.get("group", context.id)) is not None:
            return str(group["failed"][name])
        seed = derive_seed(self.config.seed, "rollout", context.id, str(context.phase), rollout)
        version = self._consultation.version
        try:
            answer = await self._attempts(lambda: self._consultation.answer(context, seed=seed, rollout=rollout))
            draft = Segment(
                id=name,
                group=context.id,
                rollout=rollout,
                case=context.case.id,
                case_version=context.case.version,
                phase=context.phase,
                prompt=context.messages,
                response=answer.messages,
                reward=0.0,
                quality=0.0,
                seed=seed,
                policy=self._consultation.policy,
                policy_version=version,
                ended=answer.ended,
            )
            reward = self._rewards[context.phase]
            score = await self._attempts(lambda: reward(context.case, draft.trajectory(), context.phase))
        except (ChatError, UnjudgedError, TimeoutError) as error:
            return self._count_failure(context.phase, error)
        quality = score.reward if score.quality is None else score.quality
        segment = dataclasses.replace(
            draft, reward=score.reward, quality=quality, spans=score.spans, outcomes=score.outcomes
        )
        if self._journal is not None:
            self._journal.append({"kind": "segment", "id": name, "segment": segment.to_json()})
        self.progress.segments[context.phase] += 1
        return segment

    async def _attempts(self, call: Callable[[], Awaitable[Result]]) -> Result:
        """Call within the timeout, again after what another call may mend."""
        for attempt in range(1 + self.config.retries):
            try:
                async with asyncio.timeout(self.config.timeout):
                    return await call()
            except (ChatError, UnjudgedError, TimeoutError) as error:
                final = isinstance(error, ChatError) and error.failure in NOT_RETRIED
                if final or attempt == self.config.retries:
                    raise
                _log.info("attempt %d of %d failed: %s", attempt + 1, 1 + self.config.retries, error)
        raise AssertionError("unreachable: the last attempt returns or raises")

    def _count_failure(self, phase: Phase, error: ChatError | UnjudgedError | TimeoutError) -> str:
        """Its name; more of them than ``max_failures`` are an error."""
        if isinstance(error, ChatError):
            name = str(error.failure)
        else:
            name = "unjudged" if isinstance(error, UnjudgedError) else "timeout"
        self.progress.failed[phase, name] += 1
        _log.warning("a rollout of stage %s failed: %s: %s", phase, name, error)
        if self.progress.failed.total() > self.config.max_failures:
            counts = ", ".join(f"{n} {name} in {phase}" for (phase, name), n in sorted(self.progress.failed.items()))
            raise PipelineError(f"pipeline: more than {self.config.max_failures} rollouts failed: {counts}") from error
        return name

    # -- batches ------------------------------------------------------------------------------------------------------
    async def _take_batch(self) -> Batch:
        segments: list[Segment] = []
        while self._waiting and len(segments) < self.config.batch_size:
            segments += self._waiting.popleft()
        batch = Batch(step=self._step, segments=tuple(segments))
        if self._journal is not None:
            ids = [segment.id for segment in segments]
            self._journal.append({"kind": "batch", "id": str(batch.step), "segments": ids})
        self._step += 1
        self.progress.batches += 1
        self._fill()
        if self._journal is not None:
            try:
                await asyncio.to_thread(self._journal.sync)
            except asyncio.CancelledError:
                self._replays.append(batch)  # the reader gave up waiting; it gets the batch when it asks again
                raise
        return batch

    def _recall_batches(self, journal: Journal, first_step: int | None) -> None:
        for step, record in enumerate(journal.records("batch")):
            self._batched.update(record["segments"])
            if first_step is not None and step >= first_step:
                rows = [journal.get("segment", name) for name in record["segments"]]
                segments = tuple(Segment.from_json(row["segment"]) for row in rows if row is not None)
                self._replays.append(Batch(step=step, segments=segments))
            self._step = step + 1
