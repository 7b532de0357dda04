"""A rubric judge behind ScanBench's first station: every checklist item of every inquiry put to it, then looked up.

The judge sees the conversation alone, never the case. An item without a verdict leaves its consultation unjudged: the
station then raises, it does not guess.
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Collection, Iterable, Mapping, Sequence

from m3.environment.case import Case, Phase
from m3.environment.trajectory import Trajectory, chat
from m3.rewards.judge import RubricJudge
from m3.rewards.judge_schedule import together
from m3.rewards.rubric import checklist_rubric
from m3.rewards.verdict import Outcome, UnjudgedError, Verdict
from m3kernels.checks import refuse

Key = tuple[str, str, int, int]  # case, policy, seed, rollout


def key_of(trajectory: Trajectory) -> Key:
    return trajectory.case, trajectory.policy, trajectory.seed, trajectory.rollout


class JudgedInquiries:
    """An ``InquiryJudge`` over verdicts that are there. ``outcomes`` counts them by name."""

    def __init__(self, judge: RubricJudge, verdicts: Mapping[Key, Sequence[Verdict]]) -> None:
        self.name, self.scripted = judge.name, judge.scripted
        self._verdicts = verdicts
        counted = collections.Counter(one.outcome for found in verdicts.values() for one in found)
        self.outcomes: Mapping[str, int] = {str(outcome): count for outcome, count in sorted(counted.items())}

    def met(self, case: Case, trajectory: Trajectory) -> Collection[str]:
        """Ids of items met.

        Raises:
            ValueError: a consultation that was not put to the judge.
            UnjudgedError: an item of it has no verdict.
        """
        found = self._verdicts.get(key_of(trajectory))
        if found is None:
            raise refuse("JudgedInquiries.met", "trajectory", "one that was judged", str(key_of(trajectory)))
        unjudged = collections.Counter(str(one.outcome) for one in found if not one.outcome.judged)
        if unjudged:
            raise UnjudgedError(
                f"scanbench: {case.id}: {sum(unjudged.values())} of {len(found)} items: {dict(unjudged)}"
            )
        return [one.criterion for one in found if one.outcome == Outcome.met]


async def judge_inquiries(
    cases: Iterable[Case], trajectories: Iterable[Trajectory], judge: RubricJudge
) -> JudgedInquiries:
    """Put the inquiries of consultations to a judge, side by side.

    Raises:
        ValueError: a trajectory of no case, or two with the same case, policy, seed and rollout.
    """
    known = {case.id: case for case in cases}
    recorded: dict[Key, Trajectory] = {}
    for trajectory in trajectories:
        if trajectory.case not in known or key_of(trajectory) in recorded:
            raise refuse("judge_inquiries", "trajectories", "of the cases given, each once", str(key_of(trajectory)))
        recorded[key_of(trajectory)] = trajectory

    async def one(trajectory: Trajectory) -> list[Verdict]:
        said = [m for m in trajectory.of(phase=Phase.inquiry) if m.role != "system"]
        while said and said[-1].role != "assistant":
            said.pop()
        if not said:
            return []
        items = checklist_rubric(known[trajectory.case], (Phase.inquiry,)).items
        return await judge.judge(chat(said), items)

    verdicts = await together([functools.partial(one, trajectory) for trajectory in recorded.values()])
    return JudgedInquiries(judge, dict(zip(recorded, verdicts, strict=True)))
