"""The segmented pipeline in rounds: what a round draws is decided before it begins, and nothing depends on the clock.

The tree of contexts and segments, the gate (Eq 6) and the names are those of pipeline.py. There, slots go on while a
batch is used, so which weights drew a segment depends on timing. Here a round takes contexts from the cases and the
pools, all at once, and what passes the gate waits for a later round: with the weights of the round, its segments are a
function of the state before it. That is what a training run that goes on after a kill needs.

A round is a mixture of stages: of those with work, and with room in the next pool, the one that has the fewest groups
in this round is taken next; of equals, the latest. Cases come in an order drawn anew for each epoch.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from m3.environment.case import Case, Phase
from m3.environment.pipeline import Config, Consultation, Pipeline, StageReward
from m3.environment.seeds import derive_seed
from m3.environment.segment import Context, Segment
from m3.environment.stages import PHASES
from m3.environment.trajectory import Message
from m3kernels.checks import refuse

OP = "Lockstep"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
    """What came of one context.

    ``segments``: in order of rollouts, without those that failed. ``carried``: names of those that go on.
    ``discarded``, ``failed``: reasons by name of the segment, as the journal of a pipeline has them. A context that
    could not be opened has neither segments nor failures of segments.
    """

    context: Context
    segments: tuple[Segment, ...] = ()
    carried: tuple[str, ...] = ()
    discarded: Mapping[str, str] = dataclasses.field(default_factory=dict)
    failed: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def complete(self) -> bool:
        """Whether no rollout failed: a group that misses one has another mean."""
        return bool(self.segments) and not self.failed


class Lockstep(Pipeline):
    """Rounds of whole groups; arguments as of Pipeline. Slots, ahead and batch_size of its numbers are unused."""

    def __init__(
        self,
        cases: Sequence[Case],
        consultation: Consultation,
        rewards: Mapping[Phase, StageReward],
        config: Config | None = None,
    ) -> None:
        super().__init__(cases, consultation, rewards, config)
        self._cases = {case.id: case for case in cases}
        self._taken = 0  # cases, over all epochs
        self._roots = self._draw_cases()

    async def round(self, groups: int) -> tuple[Group, ...]:
        """Draw and reward at most ``groups`` groups, all at the same time; fewer where cases and pools hold fewer.

        After an exception, or if cancelled, the contexts it had taken are lost: ``load_state`` brings them back.

        Raises:
            PipelineError: too many failures.
            Exception: whatever the consultation or a reward raised that is no failure with a name.
        """
        plan = self._plan(groups)
        try:
            async with asyncio.TaskGroup() as tasks:
                work = [tasks.create_task(self._group(context)) for context in plan]
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None
        found = []
        for group in (task.result() for task in work):  # in the order of the plan, not of the clock
            carried, discarded = self._gate(group.context, group.segments)
            if (after := self._after(group.context.phase)) is not None:
                for segment in carried:
                    self._pools[after].append(self._next(group.context.case, segment, after))
                self.progress.most_waiting[after] = max(self.progress.most_waiting[after], len(self._pools[after]))
            names = tuple(segment.id for segment in carried)
            found.append(dataclasses.replace(group, carried=names, discarded=discarded))
        return tuple(found)

    def _plan(self, groups: int) -> list[Context]:
        plan: list[Context] = []
        busy: collections.Counter[Phase] = collections.Counter()
        while len(plan) < groups:
            ready = [phase for phase in self.config.stages if self._has_work(phase) and self._has_room_after(phase)]
            if not ready:
                break
            phase = min(reversed(ready), key=lambda one: busy[one])
            busy[phase] += 1
            if (after := self._after(phase)) is not None:
                self._reserved[after] += self.config.carry
            plan.append(self._pools[phase].popleft())
        self._reserved.clear()
        return plan

    async def _group(self, context: Context) -> Group:
        opened = await self._opened(context) if context.phase == PHASES[0] else context
        if opened is None:
            return Group(context=context)
        segments, failed = await self._rollouts(opened)
        return Group(context=opened, segments=segments, failed=failed)

    def _draw_cases(self) -> Iterator[tuple[int, Case]]:
        cases = list(self._cases.values())
        while self._taken < self.config.epochs * len(cases):
            epoch, place = divmod(self._taken, len(cases))
            order = random.Random(derive_seed(self.config.seed, "order", epoch)).sample(range(len(cases)), len(cases))
            self._taken += 1
            yield epoch, cases[order[place]]

    # -- what a run that goes on needs --------------------------------------------------------------------------------
    def state(self) -> dict[str, Any]:
        """JSON: what waits in the pools, and how many cases were taken."""
        pools = {
            str(phase): [
                {"id": one.id, "case": one.case.id, "case_version": one.case.version,
                 "messages": [message.to_json() for message in one.messages]}
                for one in waiting
            ]
            for phase, waiting in self._pools.items()
        }  # fmt: skip
        return {"taken": self._taken, "pools": pools}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Be where ``state`` was taken.

        Raises:
            ValueError: a stage or a case that this run does not have, or another version of one; nothing has changed.
        """
        stages = [str(phase) for phase in self._pools]
        if sorted(state["pools"]) != sorted(stages):
            raise refuse(OP, "state", f"pools of {stages}", f"of {sorted(state['pools'])}")
        pools = {
            phase: collections.deque(self._context(row, phase) for row in state["pools"][str(phase)])
            for phase in self._pools
        }
        self._pools, self._taken, self._roots = pools, int(state["taken"]), self._draw_cases()

    def _context(self, row: Mapping[str, Any], phase: Phase) -> Context:
        case = self._cases.get(row["case"])
        if case is None or case.version != row["case_version"]:
            got = "none of that id" if case is None else f"version {case.version}"
            raise refuse(OP, "cases", f"case {row['case']!r} version {row['case_version']}, which waits", got)
        messages = tuple(Message.from_json(message) for message in row["messages"])
        return Context(id=row["id"], case=case, phase=phase, messages=messages)
