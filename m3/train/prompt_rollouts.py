"""On-policy answers to prompts of text: one message each, for domains that are no consultation.

Prompts come in an order drawn anew for each epoch. All that a step draws is decided before it starts, so a batch is a
function of the run's seed, the step's weights and ``state()``.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import json
import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from m3.algorithms import grpo
from m3.environment.case import Phase
from m3.environment.episode import CaseView, Said
from m3.environment.seeds import derive_seed
from m3.environment.trajectory import Message
from m3.train.group_advantages import Algorithm, step_advantages
from m3.train.rollouts import Physician
from m3.train.stage import Objective, StepBatch
from m3.train.streams import Sample
from m3.train.together import together
from m3kernels.checks import refuse

OP = "PromptRollouts"
NOBODY = CaseView(chief_complaint="", age=None, sex="", setting="", lang="")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompt:
    """What is asked. ``messages``: (role, content) pairs, the last of a user."""

    id: str
    messages: tuple[tuple[str, str], ...]

    def __post_init__(self) -> None:
        if not self.messages or self.messages[-1][0] != "user":
            raise refuse("Prompt", "messages", "some, the last of a user", f"others, in {self.id!r}")


class PromptReward(Protocol):
    """Judges an answer. ``name`` tells it from others."""

    name: str

    async def __call__(self, prompt: Prompt, answer: str) -> float:
        """The reward. Raises UnjudgedError: there is none."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptRolloutsConfig:
    """Numbers of the rollouts.

    Args:
        domain: names the teacher. prompts: of a step. rollouts: of a prompt. epochs: times that each prompt is asked.
        algorithm: of advantages where there is a reward; without one they are 0, and the teacher alone teaches.
    """

    domain: str = "general"
    prompts: int = 8  # ours
    rollouts: int = 4  # ours: groups of 4 to 16 are usual
    epochs: int = 1000
    algorithm: Algorithm = dataclasses.field(default_factory=grpo.Config)
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("prompts", "rollouts", "epochs"):
            if getattr(self, name) < 1:
                raise refuse("PromptRolloutsConfig", name, "at least 1", getattr(self, name))


class PromptRollouts:
    """A Source of on-policy samples, for MOPD and for a teacher's own rollouts.

    Args:
        prompts: ids are unique. weights: of the trainer now, as in TaskRL.
        reward: None: no sample has one.
        objective: where it is trained on by itself.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        physician: Physician,
        weights: Callable[[], Mapping[str, Tensor]],
        config: PromptRolloutsConfig | None = None,
        *,
        reward: PromptReward | None = None,
        objective: Objective | None = None,
    ) -> None:
        self.config = config or PromptRolloutsConfig()
        self.objective = objective or Objective(spec=grpo.loss_spec())
        if not prompts or len({prompt.id for prompt in prompts}) != len(prompts):
            raise refuse(OP, "prompts", "at least one, with ids of their own", f"{len(prompts)} prompts")
        if reward is not None and self.config.rollouts < 2:
            raise refuse(OP, "config.rollouts", "at least 2: advantages are relative to a group", self.config.rollouts)
        self._prompts, self._physician, self._weights, self._reward = list(prompts), physician, weights, reward
        self._taken = 0
        asked = json.dumps([dataclasses.astuple(prompt) for prompt in prompts]).encode()
        self._run = {
            "prompts": hashlib.sha256(asked).hexdigest(),
            "config": f"{self.config}",
            "reward": None if reward is None else reward.name,
            "sampling": physician.sampling,
        }

    async def batch(self, step: int) -> StepBatch | None:
        """The next prompts' groups; None when each was asked ``epochs`` times.

        Raises:
            ChatError: an answer that could not be drawn. UnjudgedError: one without a reward.
        """
        begun = time.monotonic()
        end = min(self._taken + self.config.prompts, self.config.epochs * len(self._prompts))
        asked = [self._ask(place) for place in range(self._taken, end)]
        if not asked:
            return None
        groups = await together([self._group(*one) for one in asked])
        self._taken = end
        samples = [sample for group in groups for sample in group]
        rewards = [sample.reward for sample in samples if sample.reward is not None]
        metrics = {
            **({"reward/prompts": sum(rewards) / len(rewards)} if rewards else {}),
            "cut": sum(float(sample.note["cut"]) for sample in samples) / len(samples),
            "tokens_sampled": sum(sample.drawn for sample in samples),
            "rollout_seconds": time.monotonic() - begun,
        }
        return StepBatch(step=step, samples=samples, metrics=metrics)

    async def updated(self, step: int, version: int) -> None:
        """The physician goes on with the trainer's weights."""
        await self._physician.refresh(await asyncio.to_thread(self._weights), version)

    def state(self) -> Mapping[str, Any]:
        """How many prompts were asked, over all epochs."""
        return {"run": self._run, "taken": self._taken}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state`` was taken. Raises ValueError: of a run with other prompts, reward or numbers."""
        for name, value in self._run.items():
            if state["run"].get(name) != value:
                got = f"{name} = {value!r}, where it was {state['run'].get(name)!r}"
                raise refuse(OP, "state", "of a run like this one", got)
        self._taken = int(state["taken"])

    async def close(self) -> None:
        """Nothing is held; the engine is the caller's."""

    # -- a group ------------------------------------------------------------------------------------------------------
    def _ask(self, place: int) -> tuple[Prompt, str]:
        """(prompt, name of its group)."""
        epoch, row = divmod(place, len(self._prompts))
        chance = random.Random(derive_seed(self.config.seed, "order", self.config.domain, epoch))
        prompt = self._prompts[chance.sample(range(len(self._prompts)), len(self._prompts))[row]]
        return prompt, f"{prompt.id}@{epoch}"

    async def _group(self, prompt: Prompt, group: str) -> list[Sample]:
        samples = await together([self._answer(prompt, group, one) for one in range(self.config.rollouts)])
        rewards = torch.tensor([[sample.reward or 0.0 for sample in samples]], dtype=torch.float64)
        lengths = torch.tensor([[sample.drawn for sample in samples]])
        if self._reward is None:
            found = torch.zeros(len(samples))
        else:
            found = step_advantages(self.config.algorithm, rewards, torch.ones(1, len(samples), 1), lengths)[0, :, 0]
        return [
            dataclasses.replace(sample, advantages=(sample.mask > 0).float() * float(value))
            for sample, value in zip(samples, found, strict=True)
        ]

    async def _answer(self, prompt: Prompt, group: str, rollout: int) -> Sample:
        messages = [Message(role=role, content=text, turn=0, phase=Phase.inquiry) for role, text in prompt.messages]
        seed = derive_seed(self.config.seed, "answer", self.config.domain, group, rollout)
        said = await self._physician.act(NOBODY, messages, Phase.inquiry, seed)
        reward = None if self._reward is None else float(await self._reward(prompt, said.text))
        return self._sample(said, group, rollout, reward)

    def _sample(self, said: Said, group: str, rollout: int, reward: float | None) -> Sample:
        given, drawn = len(said.given_ids), len(said.token_ids)
        steps = torch.tensor([-1] * given + [0] * drawn)
        return Sample(
            id=f"{group}/{rollout}",
            ids=torch.tensor([*said.given_ids, *said.token_ids]),
            mask=(steps >= 0).float(),
            steps=steps,
            sampler_logprobs=torch.tensor([0.0] * given + list(said.logprobs), dtype=torch.float32),
            versions=torch.tensor([-1] * given + list(said.versions)),
            domain=self.config.domain,
            group=group,
            rollout=rollout,
            reward=reward,
            temperature=self._physician.temperature,
            note={"cut": float(said.finish == "length")},
        )
