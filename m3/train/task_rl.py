"""Stage 1, TaskRL: groups of consultations drawn by the policy, each stage rewarded, advantages token by token.

    contexts of the segmented pipeline -> R rollouts each -> G_k and steps' violations -> advantages -> samples

A step draws a fixed number of groups over the stages that have work (m3.environment.lockstep). All that it draws is
decided before it starts and the engine's rows do not depend on their neighbours: a batch is a function of the run's
seed, the step's weights and ``state()``. Within a step nothing waits without need: a rollout is judged, and its
log-probabilities under other models are read, while others are still being drawn. Gamma, advantages: m3/algorithms.
Source: Baichuan-M3, arXiv 2602.06570.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from m3.algorithms import spar
from m3.environment import pipeline
from m3.environment.case import Case, Phase
from m3.environment.fragments import FragmentConsultation
from m3.environment.lockstep import Group, Lockstep
from m3.environment.pipeline import Consultation, StageReward
from m3.environment.segment import Segment
from m3.train.group_advantages import Algorithm, loss_spec, step_advantages, teaches, token_advantages
from m3.train.read_ahead import ReadAhead
from m3.train.rollouts import Physician, sample_of
from m3.train.stage import Objective, StepBatch
from m3.train.streams import Sample
from m3.train.teachers import Teacher
from m3kernels.checks import refuse

REDUNDANT = "redundant_question"
Weights = Callable[[], Mapping[str, Tensor]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskRLConfig:
    """Numbers of TaskRL.

    Args:
        algorithm: of group_advantages.algorithm.
        pipeline: of the clinic's; ``batch_size`` segments make a step, ``epochs`` bound the run.
        resample: rounds that draw other groups for those in which no step has an advantage, or a rollout failed.
        sampler_level: as in LossSpec: corrects for a sampler that is not quite the trainer; None: no correction.
        sampler_high: where the weight is truncated.
        domain: names the teacher that this run trains.
    """

    algorithm: Algorithm = dataclasses.field(default_factory=spar.Config)
    pipeline: pipeline.Config = dataclasses.field(default_factory=lambda: pipeline.Config(epochs=1000))
    resample: int = 0  # DAPO (3.2) samples until the batch is full; ours: the user says how often
    sampler_level: str | None = "token"  # truncated importance sampling; not given by the paper
    sampler_high: float = 2.0  # ours: that of LossSpec
    domain: str = "inquiry"

    def __post_init__(self) -> None:
        if self.pipeline.rollouts < 2:
            raise refuse("TaskRLConfig", "pipeline.rollouts", "at least 2: advantages are relative to a group", 1)
        if self.pipeline.pool < self.groups * self.pipeline.carry:
            want = f"at least {self.groups * self.pipeline.carry}: all that a step may carry to one stage"
            raise refuse("TaskRLConfig", "pipeline.pool", want, self.pipeline.pool)
        if self.resample < 0:
            raise refuse("TaskRLConfig", "resample", "an integer >= 0", self.resample)

    @property
    def groups(self) -> int:
        """Of a step."""
        return self.pipeline.batch_size // self.pipeline.rollouts

    def objective(self) -> Objective:
        """The algorithm's loss, with the sampler's correction."""
        spec = loss_spec(self.algorithm)
        return Objective(
            spec=dataclasses.replace(spec, sampler_level=self.sampler_level, sampler_high=self.sampler_high)
        )


class TaskRL:
    """The Source of stage 1.

    Silent groups (no step has an advantage) stay out of the batch where ``resample`` draws others, but for a step in
    which every group is silent. Without ``resample`` they are in it: their gradient is 0, but they count in means.

    Args:
        cases: who is seen.
        consultation: of ``physician`` (SimulatedConsultation, or FragmentConsultation for M2's fragments).
        rewards: of each stage; with a step verifier their spans are the steps' violations.
        physician: who draws. weights: of the trainer now, by their names in a checkpoint (``PolicyModel.tensors``).
        readers: who fills which stream of a sample while others are drawn (read_ahead.py); what they do not fill is
            left to the loop.
    """

    def __init__(
        self,
        cases: Sequence[Case],
        consultation: Consultation,
        rewards: Mapping[Phase, StageReward],
        physician: Physician,
        weights: Weights,
        config: TaskRLConfig | None = None,
        *,
        readers: Mapping[str, Teacher] | None = None,
    ) -> None:
        self.config = config or TaskRLConfig()
        self.objective = self.config.objective()
        self._physician, self._weights = physician, weights
        self._ahead = ReadAhead(consultation, readers or {}, temperature=physician.temperature)
        self._lockstep = Lockstep(cases, self._ahead, rewards, self.config.pipeline)
        stages = self.config.pipeline.stages
        if isinstance(consultation, FragmentConsultation) and stages != (Phase.inquiry,):
            got = str([str(phase) for phase in stages])
            raise refuse("TaskRL", "config.pipeline.stages", "the inquiry alone, for fragments of it", got)
        self._run = {
            **pipeline.Pipeline.run_of(cases, consultation, rewards, self.config.pipeline),
            "algorithm": f"{self.config.algorithm}",
            "groups": self.config.groups,
            "resample": self.config.resample,
            "sampling": physician.sampling,
            "readers": {stream: reader.name for stream, reader in sorted((readers or {}).items())},
        }

    async def batch(self, step: int) -> StepBatch | None:
        """The step's groups; None where cases and pools are empty.

        Raises:
            PipelineError: more rollouts failed than the pipeline's configuration bears, in this process.
        """
        try:
            return await self._batch(step)
        finally:
            await self._ahead.drop()

    async def _batch(self, step: int) -> StepBatch | None:
        begun = time.monotonic()
        drawn: list[Group] = []
        kept: list[Group] = []
        rounds = again = 0
        while (lacking := self.config.groups - len(kept)) and (rounds <= self.config.resample or not _complete(drawn)):
            found = await self._lockstep.round(lacking)
            if not found:
                break
            rounds += 1
            drawn += found
            again += len(found) if rounds > 1 else 0
            complete = [group for group in found if group.complete]
            kept += [group for group in complete if not self.config.resample or self._teaches(group)]
        if not kept:
            kept = _complete(drawn)[: self.config.groups]
        if not kept:
            return None
        samples = [await self._ahead.taken(sample) for group in kept for sample in self._samples(group)]
        metrics = measured(
            drawn, len(kept), [self._teaches(group) for group in _complete(drawn)], self.config.algorithm
        )
        clock = {"rollout_seconds": time.monotonic() - begun}
        return StepBatch(step=step, samples=samples, metrics={**metrics, "groups_resampled": again, **clock})

    async def updated(self, step: int, version: int) -> None:
        """The physician goes on with the trainer's weights."""
        await self._physician.refresh(await asyncio.to_thread(self._weights), version)

    def state(self) -> Mapping[str, Any]:
        """What waits in the pools, how many cases were taken, and the run that it belongs to."""
        return {"run": self._run, **self._lockstep.state()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state`` was taken.

        Raises:
            ValueError: of a run with other cases, rewards or numbers; nothing has changed.
        """
        for name in sorted({*state["run"], *self._run}):
            if state["run"].get(name) != self._run.get(name):
                got = f"{name} = {self._run.get(name)!r}, where it was {state['run'].get(name)!r}"
                raise refuse("TaskRL", "state", "of a run like this one", got)
        self._lockstep.load_state(state)

    async def close(self) -> None:
        """Nothing is held between two steps; the engine is the caller's."""
        await self._lockstep.close()

    # -- from groups to samples ---------------------------------------------------------------------------------------
    def _teaches(self, group: Group) -> bool:
        rewards, gammas = tensors(group.segments, self.config.algorithm)
        return teaches(self.config.algorithm, rewards, gammas)[0]

    def _samples(self, group: Group) -> list[Sample]:
        algorithm = self.config.algorithm
        penalties = algorithm if isinstance(algorithm, spar.Config) else None
        temperature = self._physician.temperature
        samples = [
            sample_of(segment, temperature=temperature, domain=self.config.domain, penalties=penalties)
            for segment in group.segments
        ]
        rewards, gammas = tensors(group.segments, algorithm)
        lengths = torch.tensor([[sample.drawn for sample in samples]])
        found = step_advantages(algorithm, rewards, gammas, lengths)[0]
        return [
            dataclasses.replace(sample, advantages=token_advantages(row, segment.steps, sample.steps))
            for sample, segment, row in zip(samples, group.segments, found, strict=True)
        ]


def tensors(segments: Sequence[Segment], algorithm: Algorithm) -> tuple[Tensor, Tensor]:
    """(1, R) fp64 rewards and (1, R, S) gammas of a group."""
    config = algorithm if isinstance(algorithm, spar.Config) else None
    rewards = torch.tensor([[segment.reward for segment in segments]], dtype=torch.float64)
    return rewards, spar.step_factors([[segment.violations() for segment in segments]], config)


def measured(drawn: Sequence[Group], kept: int, teach: Sequence[bool], algorithm: Algorithm) -> dict[str, float]:
    """What a step says of itself. Means are over all that was drawn, also where it stayed out of the batch.

    reward/STAGE, groups/STAGE   mean reward of a stage's rollouts; groups
    gamma_mean, violations/NAME  over the policy's steps: mean gamma, share that violates (redundant_question always)
    turns                        steps of an inquiry, on average
    discarded/REASON             pairs that do not go on (Eq 6)
    rollouts_failed, groups_silent, groups_left_out    of all that was drawn
    tokens_sampled, cut          tokens that were drawn in all; share of messages that filled their budget
    """
    segments = [segment for group in drawn for segment in group.segments]
    config = algorithm if isinstance(algorithm, spar.Config) else None
    found: dict[str, float] = {}
    for phase in Phase:
        rewards = [segment.reward for segment in segments if segment.phase == phase]
        found[f"groups/{phase}"] = sum(group.context.phase == phase for group in drawn)
        if rewards:
            found[f"reward/{phase}"] = _mean(rewards)
    violated = [names for segment in segments for names in segment.violations()]
    if violated:
        found["gamma_mean"] = _mean([spar.step_factor(names, config) for names in violated])
        for name in sorted({REDUNDANT}.union(*violated)):
            found[f"violations/{name}"] = _mean([name in names for names in violated])
    turns = [len(segment.steps) for segment in segments if segment.phase == Phase.inquiry]
    if turns:
        found["turns"] = _mean(turns)
    reasons = collections.Counter(r.partition(":")[0] for group in drawn for r in group.discarded.values())
    for reason in ("below_tau", "not_drawn"):
        found[f"discarded/{reason}"] = reasons[reason]
    said = [m for segment in segments for m in segment.response if m.role == "assistant" and m.token_ids is not None]
    return {
        **found,
        "rollouts_failed": sum(len(group.failed) for group in drawn),
        "groups_silent": sum(not one for one in teach),
        "groups_left_out": len(drawn) - kept,
        "tokens_sampled": sum(len(message.token_ids or ()) for message in said),
        "cut": _mean([message.meta["sampled"]["finish"] == "length" for message in said]) if said else 0.0,
    }


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _complete(groups: Sequence[Group]) -> list[Group]:
    return [group for group in groups if group.complete]
