"""Stage 3, MOPD: the student rolls out over all domains; each domain's teacher judges every token that it drew.

    A_t = log pi_teacher(y_t) - log pi(y_t) + alpha * A_outcome        w_t = pi / mu, 0 outside its bounds

Each domain is a source of on-policy samples (TaskRL over consultations, PromptRollouts over prompts) with the student
as its physician: whose outcome advantages are the domain's, and whose batch size is its part of the mixture. A domain
is judged while others are still being drawn, or by its own source while it draws (``teacher_logprobs``). The loss is
m3/algorithms/mopd.py's; the teacher is its reference. The model that comes out (``Outcome.model``) is an initial model
for stage 1 again: the cycle of the paper.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from m3.algorithms import mopd
from m3.train.rollouts import Physician
from m3.train.stage import Objective, Source, StepBatch
from m3.train.streams import Sample
from m3.train.teachers import Teacher, judged
from m3.train.together import together
from m3kernels.checks import refuse
from m3kernels.policy_loss.losses import LOG_RATIO_LIMIT

OP = "Mopd"


class Mopd:
    """The Source of stage 3.

    Args:
        domains: the source of each, by its name; their physician is ``physician``.
        teachers: of each domain, by its name. One may teach several.
        physician: the student. weights: of the trainer now, by their names in a checkpoint.
    Raises:
        ValueError: a domain without a teacher, or a teacher without a domain.
    """

    def __init__(
        self,
        domains: Mapping[str, Source],
        teachers: Mapping[str, Teacher],
        physician: Physician,
        weights: Callable[[], Mapping[str, Tensor]],
        config: mopd.Config | None = None,
    ) -> None:
        if not domains or domains.keys() != teachers.keys():
            raise refuse(OP, "teachers", f"one of each domain, {sorted(domains)}", f"{sorted(teachers)}")
        self.config = config or mopd.Config()
        self.objective = Objective(spec=mopd.loss_spec(self.config), on_policy=True)
        self._domains = dict(sorted(domains.items()))
        self._teachers, self._physician, self._weights = dict(teachers), physician, weights
        self._run = {
            "config": f"{self.config}",
            "teachers": {domain: self._teachers[domain].name for domain in self._domains},
        }

    async def batch(self, step: int) -> StepBatch | None:
        """The step's rollouts of all domains; None where one of them has ended: what is left is another mixture.

        Raises:
            ValueError: a domain's sample without advantages or the sampler's log-probabilities. What domains and
            teachers raise.
        """
        batches = await together([self._domain(domain, step) for domain in self._domains])
        samples: list[Sample] = []
        metrics: dict[str, float] = {}
        for domain, batch in zip(self._domains, batches, strict=True):
            if batch is None:
                return None
            samples += batch.samples
            metrics |= {f"{domain}/{name}": value for name, value in batch.metrics.items()}
            metrics |= {f"{domain}/{name}": value for name, value in measured(batch.samples).items()}
        return StepBatch(step=step, samples=samples, metrics=metrics)

    async def _domain(self, domain: str, step: int) -> StepBatch | None:
        batch = await self._domains[domain].batch(step)
        if batch is None:
            return None
        told: Sequence[Sample] = batch.samples
        if any(sample.teacher_logprobs is None for sample in told):
            told = await judged("teacher_logprobs", told, self._teachers[domain])
        return dataclasses.replace(batch, samples=[self._taught(sample, domain) for sample in told])

    def _taught(self, sample: Sample, domain: str) -> Sample:
        """The sample with its teacher as the reference, and alpha * A_outcome; A_t and w_t are those of pi itself
        (``on_policy``)."""
        for name in ("advantages", "sampler_logprobs"):
            if getattr(sample, name) is None:
                want = "a stream of every sample"
                raise refuse(OP, name, want, f"none of sample {sample.id!r} of {domain!r}")
        assert sample.advantages is not None
        outcome = mopd.outcome_advantages(sample.advantages, self.config)
        return dataclasses.replace(
            sample, domain=domain, advantages=outcome, old_logprobs=None, ref_logprobs=sample.teacher_logprobs
        )

    async def updated(self, step: int, version: int) -> None:
        """The student goes on with the trainer's weights, once for all domains."""
        await self._physician.refresh(await asyncio.to_thread(self._weights), version)

    def state(self) -> Mapping[str, Any]:
        """The state of each domain's source, and the run that it belongs to."""
        return {"run": self._run, "domains": {name: source.state() for name, source in self._domains.items()}}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state`` was taken. Raises ValueError: of a run with other domains, teachers or numbers."""
        for name, value in self._run.items():
            if state["run"].get(name) != value:
                got = f"{name} = {value!r}, where it was {state['run'].get(name)!r}"
                raise refuse(OP, "state", "of a run like this one", got)
        for name, source in self._domains.items():
            source.load_state(state["domains"][name])

    async def close(self) -> None:
        """Close the domains' sources; engines and teachers are the caller's."""
        for source in self._domains.values():
            await source.close()


def measured(samples: Sequence[Sample]) -> dict[str, float]:
    """reverse_kl: nats a token, the mean of log mu - log pi_teacher, held within +-20; outcome: the mean of
    |alpha * A_outcome|, which it is added to."""
    gaps, outcomes = [], []
    for one in samples:
        assert one.sampler_logprobs is not None and one.ref_logprobs is not None and one.advantages is not None
        gaps.append((one.sampler_logprobs - one.ref_logprobs)[one.mask > 0])
        outcomes.append(one.advantages[one.mask > 0])
    gap, outcome = torch.cat(gaps).double(), torch.cat(outcomes).double()
    if not len(gap):
        return {}
    held = gap.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return {"reverse_kl": float(held.mean()), "outcome": float(outcome.abs().mean())}
