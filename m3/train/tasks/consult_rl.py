"""Stage 1 on the consultation task: three ways to charge the same violations, everything else the same.

    grpo            A_i  = (R_i - mean) / (std + eps), of the unpenalised reward: violations cost nothing
    global_penalty  A_i  likewise, of R_i * mean_j gamma_ij: the mean of SPAR's returns, charged to the whole rollout
    spar            A_ij = (gamma_ij R_i - mean) / (std + eps), of the unpenalised reward, charged to step j (Eq 8)

All three have one loss (SPAR's: sequence mean, ratio of the sequence), one update a batch and the same number of drawn
tokens, after which the source ends. Rollouts come from the trainer's own weights, so that the ratio is 1.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from m3.algorithms import grpo, spar
from m3.train.policy_model import PolicyModel
from m3.train.stage import Objective, StepBatch
from m3.train.streams import Sample
from m3.train.tasks.consult import DEPARTMENTS, MAX_TURNS, Case, Points, Score, draw_case
from m3.train.tasks.consult_policy import Rollout, rolled_out, sample_of
from m3kernels.checks import refuse
from m3kernels.policy_loss.types import check_choice

ARMS = ("grpo", "global_penalty", "spar")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConsultConfig:
    """Numbers of the source; all ours but those of ``spar``.

    Args:
        arm: how violations are charged; of ARMS.
        cases, rollouts: a batch is so many groups of so many rollouts.
        tokens: drawn tokens after which the source ends: the batch that reaches them is the last.
        department: of the cases; None: both.
        spar: lambdas and the floor of the standard deviation.
    """

    arm: str = "spar"
    cases: int = 8
    rollouts: int = 8
    tokens: int | None = None
    seed: int = 0
    department: str | None = None
    temperature: float = 1.0
    max_turns: int = MAX_TURNS
    points: Points = dataclasses.field(default_factory=Points)
    spar: spar.Config = dataclasses.field(default_factory=spar.Config)

    def __post_init__(self) -> None:
        check_choice("ConsultConfig", "arm", self.arm, ARMS)
        if self.cases < 1 or self.rollouts < 2:
            raise refuse("ConsultConfig", "cases, rollouts", "1 or more, 2 or more", f"{self.cases}, {self.rollouts}")


class ConsultSource:
    """Batches of rollouts of a model under training, with advantages."""

    def __init__(self, model: PolicyModel, config: ConsultConfig | None = None) -> None:
        self.model, self.config = model, config or ConsultConfig()
        self.objective = Objective(spec=spar.loss_spec(self.config.spar))
        self.drawn, self.version = 0, 0

    async def batch(self, step: int) -> StepBatch | None:
        config = self.config
        if config.tokens is not None and self.drawn >= config.tokens:
            return None
        chance = random.Random(f"consult {config.seed} {step}")
        cases = [draw_case(chance, department=config.department) for _ in range(config.cases)]
        rollouts = await rolled_out(
            self.model,
            [case for case in cases for _ in range(config.rollouts)],
            f"rollouts {config.seed} {step}",
            temperature=config.temperature,
            points=config.points,
            max_turns=config.max_turns,
        )
        samples = self._samples(step, rollouts)
        self.drawn += sum(sample.drawn for sample in samples)
        scores = [rollout.score for rollout in rollouts]
        spread = torch.tensor([score.reward for score in scores]).reshape(config.cases, -1).std(1)
        metrics = summary(scores) | by_rubric(scores) | {"group_std": float(spread.mean()), "tokens_so_far": self.drawn}
        del metrics["reward"]  # the loop's own
        for index, domain in enumerate(DEPARTMENTS):
            mine = [one.score.reward for one in rollouts if one.case.department == index]
            if mine:
                metrics[f"reward/{domain}"] = math.fsum(mine) / len(mine)
        return StepBatch(step=step, samples=samples, metrics=metrics)

    async def updated(self, step: int, version: int) -> None:
        self.version = version

    def state(self) -> Mapping[str, Any]:
        return {"drawn": self.drawn, "version": self.version}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.drawn, self.version = state["drawn"], state["version"]

    async def close(self) -> None:
        pass

    def _samples(self, step: int, rollouts: Sequence[Rollout]) -> list[Sample]:
        config = self.config
        shape = config.cases, config.rollouts
        rewards = torch.tensor([rollout.score.reward for rollout in rollouts], dtype=torch.float64).reshape(shape)
        violations = [rollout.score.violations for rollout in rollouts]
        groups = [violations[at : at + config.rollouts] for at in range(0, len(violations), config.rollouts)]
        factors = spar.step_factors(groups, config.spar)
        turns = torch.tensor([len(one) for one in violations]).reshape(shape)
        advantages = step_advantages(config.arm, rewards, factors, turns, config.spar).flatten(0, 1)
        samples = []
        for index, rollout in enumerate(rollouts):
            group, rank = divmod(index, config.rollouts)
            sample = sample_of(
                rollout.ids,
                rollout.score,
                name=f"{step}-{group}-{rank}",
                prompted=rollout.prompted,
                sampler_logprobs=rollout.logprobs,
                domain=DEPARTMENTS[rollout.case.department],
                group=f"{step}-{group}",
                rollout=rank,
                gammas={at: float(factors[group, rank, at]) for at in range(rollout.score.turns)},
                temperature=config.temperature,
                note={"case": rollout.case.id, "violations": _told(rollout.score)},
            )
            tokens = spar.token_advantages(advantages[index][None], sample.steps[None])[0].float()
            versions = torch.where(sample.steps >= 0, self.version, -1)
            samples.append(dataclasses.replace(sample, advantages=tokens, versions=versions))
        return samples


def step_advantages(
    arm: str,
    rewards_P_R: torch.Tensor,
    factors_P_R_S: torch.Tensor,
    turns_P_R: torch.Tensor,
    config: spar.Config | None = None,
) -> torch.Tensor:
    """(P, R, S) advantages of the steps of an arm; gammas beyond a rollout's ``turns`` are 1 and not read."""
    config = config or spar.Config()
    if arm == "spar":
        return spar.advantages(rewards_P_R, factors_P_R_S, config)
    if arm == "global_penalty":
        lost = (1 - factors_P_R_S.double()).sum(2) / turns_P_R
        rewards_P_R = rewards_P_R * (1 - lost)
    found = grpo.advantages(rewards_P_R, grpo.Config(eps=config.eps))
    return found.unsqueeze(2).expand(factors_P_R_S.shape)


MEASURES = {
    "reward": lambda score: score.reward,
    "repeat_score": lambda score: score.clean("redundant_question"),
    "logical_score": lambda score: score.clean("illogical_order"),
    "phrasing_score": lambda score: score.clean("rigid_phrasing"),
    "safe": lambda score: float(all("safety_risk" not in step for step in score.violations)),
    "turns": lambda score: float(score.turns),
    "diagnosis": lambda score: float(score.diagnosed is True),
    "coverage": lambda score: score.coverage,
}


def summary(scores: Sequence[Score]) -> dict[str, float]:
    """Mean of each of MEASURES."""
    return {name: math.fsum(map(measure, scores)) / len(scores) for name, measure in MEASURES.items()}


def by_rubric(scores: Sequence[Score]) -> dict[str, float]:
    """rubric/KIND: mean share of the findings of a kind that were asked for; rubric/diagnosis: share of right ones."""
    found = {"rubric/diagnosis": sum(score.diagnosed is True for score in scores) / len(scores)}
    for name in sorted({name for score in scores for name in score.asked}):
        shares = [score.asked[name] for score in scores if name in score.asked]
        found[f"rubric/{name}"] = math.fsum(shares) / len(shares)
    return found


async def evaluate(model: PolicyModel, cases: Sequence[Case], seed: str = "held out") -> list[Score]:
    """Scores of one consultation of each case, drawn at temperature 1 with noise that is the same for every model."""
    return [rollout.score for rollout in await rolled_out(model, cases, seed)]


def _told(score: Score) -> str:
    """Violations as "3 redundant_question, 5 illogical_order": the step's number and its names."""
    return ", ".join(f"{step} {'+'.join(names)}" for step, names in enumerate(score.violations) if names)
