"""Small runs of the pipeline for tests: answers and scores drawn from seeds; scripted patients, and runs to kill."""

from __future__ import annotations

import asyncio
import dataclasses
import random
from collections.abc import Awaitable, Callable, Sequence

from m3.environment.case import Case, Phase
from m3.environment.consultation import SimulatedConsultation
from m3.environment.episode import CaseView
from m3.environment.journal import Journal
from m3.environment.pipeline import Answer, Config, Pipeline
from m3.environment.segment import Context, StageScore
from m3.environment.stages import PHASES, instruction
from m3.environment.trajectory import Message, Trajectory
from m3.rewards.spans import SpanReward
from tests.m3.clinic_cases import small_case

CASES = tuple(small_case(id=f"case-{i}") for i in range(3))


async def at_once(what: object) -> None:
    """What happens before an answer: nothing."""


@dataclasses.dataclass(kw_only=True)
class SpokenBySeed:
    """Answers that only their seed decides; ``before`` is awaited first (to wait, to fail, to record)."""

    name: str = "by-seed"
    policy: str = "by-seed"
    version: int = 0
    before: Callable[[Context], Awaitable[None]] = at_once

    async def open(self, case: Case, *, seed: int) -> tuple[Message, ...]:
        said = Message(role="user", content=f"{case.opening_line} [{seed}]", turn=0, phase=Phase.inquiry)
        return (instruction(Phase.inquiry, 0), said)

    async def answer(self, context: Context, *, seed: int, rollout: int) -> Answer:
        await self.before(context)
        turn, phase = context.messages[-1].turn, context.phase
        said = Message(role="assistant", content=f"- ECG\n- {phase} {seed}", turn=turn, phase=phase)
        if phase != Phase.inquiry:
            return Answer(messages=(said,))
        told = Message(role="user", content="Yes.", turn=turn + 1, phase=phase)
        return Answer(messages=(said, told, dataclasses.replace(said, turn=turn + 1)), ended="turns")


@dataclasses.dataclass(kw_only=True)
class ScoredBySeed:
    """A score in [0, 1] that only the trajectory's seed decides."""

    name: str = "score-by-seed"
    before: Callable[[Trajectory], Awaitable[None]] = at_once

    async def __call__(self, case: Case, trajectory: Trajectory, phase: Phase) -> StageScore:
        await self.before(trajectory)
        value = random.Random(trajectory.seed).random()
        turn = trajectory.messages[-1].turn
        span = SpanReward(turn=turn, token_start=0, token_end=1, value=0.1, criterion="redundant_question")
        return StageScore(reward=value, spans=(span,) if value < 0.2 else (), outcomes={"drawn": f"{value:.3f}"})


REWARDS = dict.fromkeys(PHASES, ScoredBySeed())
CONFIG = Config(seed=5, epochs=4, rollouts=3, batch_size=6, slots=4, carry=2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TwoQuestions:
    """A physician who asks two things, in an order that its seed draws, and then goes through the stages."""

    name: str = "two-questions"
    pause: float = 0.0  # seconds before each message

    async def act(self, view: CaseView, messages: Sequence[Message], phase: Phase, seed: int) -> str:
        await asyncio.sleep(self.pause)
        said = [m.content for m in messages if m.role == "assistant" and "snippet" not in m.meta]
        left = [one for one in ("Does it spread anywhere else?", "Do you smoke?") if one not in said]
        if phase == Phase.inquiry:
            return random.Random(seed).choice(left) if left else "I have no further questions."
        return {Phase.differential: "1. Heart attack", Phase.lab: "- 12-lead ECG"}.get(phase, "Diagnosis: heart attack")


def run_to_be_killed(path: str, pause: float) -> None:
    """The scripted patients, to the end or until killed; pauses before messages make moments to be killed at."""
    consultation = SimulatedConsultation(TwoQuestions(pause=pause))
    with Journal(path, run=Pipeline.run_of(CASES, consultation, REWARDS, CONFIG)) as journal:
        asyncio.run(Pipeline(CASES, consultation, REWARDS, CONFIG, journal=journal).run())
