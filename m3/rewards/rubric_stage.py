"""Rewards from rubrics (Eq 1) that a judge decides: of a stage of a consultation, and of an answer to a prompt.

    stage    share * R_rubric + (1 - share) * R_task, with R_task by rules; where no rubric applies, R_task alone
    prompt   R_rubric

Rubrics of a store (rubric_store.py) are the core set and what is active at the version that the run is at: dynamic
rubrics enter and leave a run between two batches. Source: Baichuan-M3, arXiv 2602.06570, on the rubric verifier and on
dynamic rubric evolution; the mixture with rules is ours.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Mapping

from m3.environment.case import Case, Phase
from m3.environment.pipeline import StageReward
from m3.environment.segment import StageScore
from m3.environment.trajectory import Trajectory, chat
from m3.rewards.judge import RubricJudge
from m3.rewards.pinned_rubrics import PinnedRubrics
from m3.rewards.rubric import Rubric, match_verdicts, score_rubric
from m3.rewards.verdict import UnjudgedError
from m3.rollout.chat import ChatMessages
from m3kernels.checks import refuse


class RubricStageReward:
    """The ``StageReward`` of a stage's rules and of the rubrics that a store has for the case.

    V_k of the gate is the task's where it gives one, else this reward.

    Args:
        task: R_task; its spans come along. share: of the rubrics, in (0, 1]. max_unjudged: as score_rubric.
    """

    def __init__(
        self,
        task: StageReward,
        judge: RubricJudge,
        rubrics: PinnedRubrics,
        *,
        share: float = 0.5,
        max_unjudged: float = 0.0,
    ) -> None:
        if not 0 < share <= 1:
            raise refuse("RubricStageReward", "share", "a number in (0, 1]", share)
        self._task, self._judge, self._rubrics = task, judge, rubrics
        self._share, self._max_unjudged = share, max_unjudged
        self.name = f"{task.name}; {share:g} rubrics of a store by {judge.name}, {judge.template}"

    async def __call__(self, case: Case, trajectory: Trajectory, phase: Phase) -> StageScore:
        """Score a stage; rules and judge at the same time.

        Raises:
            UnjudgedError: the task's; too many clauses without a verdict.
        """
        rubric = self._rubrics.rubric(case.id)
        if not rubric.items:
            return await self._task(case, trajectory, phase)
        messages = [message for message in trajectory.messages if message.phase == phase]
        while messages and messages[-1].role != "assistant":
            messages.pop()
        score, verdicts = await asyncio.gather(
            self._task(case, trajectory, phase), self._judge.judge(chat(messages), rubric.items)
        )
        found = score_rubric(rubric, verdicts, max_unjudged=self._max_unjudged)
        outcomes = match_verdicts(rubric.items, verdicts)
        told = {f"rubric {item.id}": str(outcome) for item, outcome in zip(rubric.items, outcomes, strict=True)}
        return dataclasses.replace(
            score,
            reward=self._share * found.reward + (1 - self._share) * score.reward,
            outcomes={**score.outcomes, "rubric": f"{found.reward:.6g}", **told},
        )


class RubricReward:
    """The reward of an answer to a prompt (m3.train.prompt_rollouts.PromptReward).

    Args:
        rubrics: of each prompt by its id. store: further clauses of the prompt's scope.
    """

    def __init__(
        self,
        judge: RubricJudge,
        rubrics: Mapping[str, Rubric],
        store: PinnedRubrics | None = None,
        *,
        max_unjudged: float = 0.0,
    ) -> None:
        self._judge, self._rubrics, self._store, self._max_unjudged = judge, dict(rubrics), store, max_unjudged
        self.name = f"rubrics by {judge.name}, {judge.template}" + (", and of a store" if store else "")

    async def score(self, prompt: str, conversation: ChatMessages) -> float:
        """R_rubric of a conversation that ends with the answer.

        Raises:
            UnjudgedError: the prompt has no rubric; too many clauses without a verdict.
        """
        items = self._rubrics[prompt].items if prompt in self._rubrics else ()
        if self._store is not None:
            items += self._store.rubric(prompt).items
        if not items:
            raise UnjudgedError(f"RubricReward: prompt {prompt!r} has no rubric")
        verdicts = await self._judge.judge(conversation, items)
        return score_rubric(Rubric(items, id=prompt), verdicts, max_unjudged=self._max_unjudged).reward
