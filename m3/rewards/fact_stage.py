"""A stage's reward with the facts of what was said: R = R_task + lambda(R_task) R_fact (fact_aware.py, Eq 10-14)."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Sequence
from typing import Protocol

from m3.environment.case import Case, Phase
from m3.environment.pipeline import StageReward
from m3.environment.segment import StageScore
from m3.environment.trajectory import Trajectory
from m3.rewards import fact_aware
from m3.rewards.claims import Claim, Extractor
from m3.rewards.fact_verdicts import FactVerdict
from m3.rewards.verdict import UnjudgedError
from m3.text.embed import Embedder, LexicalEmbedder


class Verifier(Protocol):
    """As m3.rewards.fact_verifier.FactVerifier."""

    async def verify(self, claims: Sequence[str | Claim]) -> list[FactVerdict]: ...


class FactAwareReward:
    """The ``StageReward`` of a task's reward and the facts of the policy's messages in that stage.

    V_k of the gate stays the task's. A reward below 0 is held at 0 (ours: SPAR would raise a negative one by a penalty;
    Eq 14 reaches -0.052, at a task reward of 0.927 with every claim refuted).

    Args:
        task: R_task.
        extractor: claims of a text.
        verifier: evidence for each.
        name: of the two, for journals: what scores depend on.
    """

    def __init__(
        self,
        task: StageReward,
        extractor: Extractor,
        verifier: Verifier,
        *,
        name: str,
        embedder: Embedder | None = None,
        config: fact_aware.Config | None = None,
    ) -> None:
        self._task, self._extractor, self._verifier = task, extractor, verifier
        self._embedder: Embedder = embedder or LexicalEmbedder()
        self._config = config or fact_aware.Config()
        self.name = f"{task.name}; facts by {name}, {self._embedder.name}, {self._config}"

    async def __call__(self, case: Case, trajectory: Trajectory, phase: Phase) -> StageScore:
        """Score a stage; the task and the facts are judged at the same time.

        Raises:
            UnjudgedError: the task's; no claims could be read; too many claims without a verdict.
        """
        said = "\n".join(message.content for message in trajectory.of("assistant", phase))
        try:
            async with asyncio.TaskGroup() as group:
                scoring = group.create_task(self._task(case, trajectory, phase))
                checking = group.create_task(self._verdicts(said))
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None
        score, verdicts = scoring.result(), checking.result()
        found = await asyncio.to_thread(
            fact_aware.fact_reward, said, verdicts, self._embedder, score.reward, self._config
        )
        labels = ", ".join(f"{count} {label}" for label, count in found.labels.items() if count)
        told = f"{found.penalty:.6g} x {found.gate:.6g} ({labels or 'no claims'})"
        return dataclasses.replace(
            score,
            reward=max(0.0, found.reward),
            quality=score.reward if score.quality is None else score.quality,
            outcomes={**score.outcomes, "task": f"{score.reward:.6g}", "facts": told},
        )

    async def _verdicts(self, said: str) -> list[FactVerdict]:
        extraction = await self._extractor.extract(said)
        if extraction.failure is not None:
            raise UnjudgedError(f"fact-aware reward: no claims: {extraction.failure}")
        return await self._verifier.verify(extraction.claims) if extraction.claims else []
