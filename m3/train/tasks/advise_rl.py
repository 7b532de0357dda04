"""Stage 1 on the advice task: three rewards of the same answers (the paper's Fig. 12), everything else the same.

    none        R = R_task: what is said costs nothing
    naive       R = R_task - alpha N_hallu / N_total                             (Eq 9)
    fact_aware  R = R_task + lambda(R_task) R_fact: denoise and reweight         (Eq 10-14)

All by m3.rewards.fact_aware from the same verdicts. The algorithm is GSPO, with one update a batch; rollouts come from
the trainer's own weights, so that the ratio is 1.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from m3.algorithms import gspo
from m3.rewards import fact_aware
from m3.train.policy_model import PolicyModel
from m3.train.stage import Objective, StepBatch
from m3.train.streams import Sample
from m3.train.tasks.advise import Question, Score, every_question, fact_reward
from m3.train.tasks.advise_policy import Rollout, rolled_out, sample_of
from m3kernels.checks import refuse
from m3kernels.policy_loss.types import check_choice

ARMS = ("none", "naive", "fact_aware")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdviseConfig:
    """Numbers of the source; all ours but those of ``facts`` and ``gspo``.

    Args:
        arm: the reward; of ARMS. naive has the alpha of ``facts``.
        questions, rollouts: a batch is so many groups of so many answers.
    """

    arm: str = "fact_aware"
    questions: int = 8
    rollouts: int = 8
    seed: int = 0
    temperature: float = 1.0
    facts: fact_aware.Config = dataclasses.field(default_factory=fact_aware.Config)
    gspo: gspo.Config = dataclasses.field(default_factory=gspo.Config)

    def __post_init__(self) -> None:
        check_choice("AdviseConfig", "arm", self.arm, ARMS)
        if self.questions < 1 or self.rollouts < 2:
            got = f"{self.questions}, {self.rollouts}"
            raise refuse("AdviseConfig", "questions, rollouts", "1 or more, 2 or more", got)


def reward(arm: str, rollout: Rollout, config: fact_aware.Config) -> float:
    """What an arm pays for an answer."""
    task = rollout.score.reward
    if arm == "none":
        return task
    found = fact_reward(rollout.question, rollout.steps, task, config)
    return found.naive if arm == "naive" else found.reward


class AdviseSource:
    """Batches of answers of a model under training, with advantages."""

    def __init__(self, model: PolicyModel, config: AdviseConfig | None = None) -> None:
        self.model, self.config = model, config or AdviseConfig()
        self.objective = Objective(spec=gspo.loss_spec(self.config.gspo))
        self.questions = every_question(held_out=False)
        self.drawn, self.version = 0, 0

    async def batch(self, step: int) -> StepBatch:
        config = self.config
        chance = random.Random(f"advise {config.seed} {step}")
        questions = chance.sample(self.questions, config.questions)
        rollouts = await rolled_out(
            self.model,
            [question for question in questions for _ in range(config.rollouts)],
            f"rollouts {config.seed} {step}",
            temperature=config.temperature,
        )
        paid = torch.tensor([reward(config.arm, one, config.facts) for one in rollouts], dtype=torch.float64)
        samples = self._samples(step, rollouts, gspo.advantages(paid.reshape(config.questions, -1), config.gspo))
        self.drawn += sum(sample.drawn for sample in samples)
        metrics = summary([one.score for one in rollouts])
        del metrics["reward"]  # the loop's own
        return StepBatch(
            step=step, samples=samples, metrics=metrics | {"paid": float(paid.mean()), "tokens_so_far": self.drawn}
        )

    async def updated(self, step: int, version: int) -> None:
        self.version = version

    def state(self) -> Mapping[str, Any]:
        return {"drawn": self.drawn, "version": self.version}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.drawn, self.version = state["drawn"], state["version"]

    async def close(self) -> None:
        pass

    def _samples(self, step: int, rollouts: Sequence[Rollout], advantages_P_R: torch.Tensor) -> list[Sample]:
        samples = []
        for index, (rollout, advantage) in enumerate(zip(rollouts, advantages_P_R.flatten().tolist(), strict=True)):
            group, rank = divmod(index, self.config.rollouts)
            sample = sample_of(
                rollout.ids,
                name=f"{step}-{group}-{rank}",
                logprobs=rollout.logprobs,
                domain="advisory",
                group=f"{step}-{group}",
                rollout=rank,
                reward=rollout.score.reward,
                temperature=self.config.temperature,
                note=rollout.note,
            )
            versions = torch.where(sample.steps >= 0, self.version, -1)
            samples.append(dataclasses.replace(sample, advantages=sample.mask * advantage, versions=versions))
        return samples


COUNTS = ("reward", "claims", "false", "core", "core_false", "recall", "repeats", "steps")


def counts(score: Score) -> tuple[float, ...]:
    """COUNTS of an answer."""
    return tuple(float(getattr(score, name)) for name in COUNTS)


def _share(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0


def measures(mean: Mapping[str, float]) -> dict[str, float]:
    """From means of COUNTS over answers: rates are of all claims together.

    hallucination: share of false claims; of core aspects, of peripheral ones. peripheral: such claims an answer.
    """
    return {
        "reward": mean["reward"],
        "hallucination": _share(mean["false"], mean["claims"]),
        "core_hallucination": _share(mean["core_false"], mean["core"]),
        "peripheral_hallucination": _share(mean["false"] - mean["core_false"], mean["claims"] - mean["core"]),
        "core_recall": mean["recall"],
        "claims": mean["claims"],
        "peripheral": mean["claims"] - mean["core"],
        "repeats": mean["repeats"],
        "steps": mean["steps"],
    }


MEASURES = tuple(measures(dict.fromkeys(COUNTS, 1.0)))


def summary(scores: Sequence[Score]) -> dict[str, float]:
    """``measures`` of answers."""
    columns = zip(*map(counts, scores), strict=True)
    return measures({name: math.fsum(column) / len(scores) for name, column in zip(COUNTS, columns, strict=True)})


async def evaluate(model: PolicyModel, questions: Sequence[Question], seed: str = "held out") -> list[Score]:
    """Scores of one answer to each question, drawn at temperature 1 with noise that is the same for every model."""
    return [rollout.score for rollout in await rolled_out(model, questions, seed)]
