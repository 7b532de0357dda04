"""A small decoder for the advice task: its start from mediocre scripted writers, its rollouts; as consult_policy.py."""

from __future__ import annotations

import asyncio
import dataclasses
import random
from collections.abc import Sequence
from typing import Any

import torch

from m3.algorithms import clip_forward_kl
from m3.train.policy_model import PolicyModel
from m3.train.stage import Objective, Stateless, StepBatch
from m3.train.streams import Sample
from m3.train.tasks import consult_policy
from m3.train.tasks.advise import (
    END,
    MAX_STEPS,
    MEDICINES,
    OPENING,
    STEP,
    WORDS,
    Habits,
    Question,
    Score,
    Step,
    every_question,
    is_cut,
    score,
    tokens,
    write,
)  # fmt: skip
from m3.train.tasks.consult_policy import DecoderConfig

CONTEXT = OPENING + STEP * MAX_STEPS


def decoder(config: DecoderConfig | None = None) -> PolicyModel:
    """A decoder with random weights, from a seed; one million parameters by default."""
    return consult_policy.decoder(config, words=len(WORDS), context=CONTEXT)


def sample_of(ids: Sequence[int], *, name: str, logprobs: Sequence[float] | None = None, **more: Any) -> Sample:
    """An answer as a trainer's sample: all its tokens count, in steps of two, "end" being one of its own."""
    steps = torch.full((len(ids),), -1)
    steps[OPENING:] = torch.arange(len(ids) - OPENING) // STEP
    sampler = None
    if logprobs is not None:
        sampler = torch.zeros(len(ids))
        sampler[OPENING:] = torch.tensor(list(logprobs), dtype=torch.float32)
    return Sample(
        id=name, ids=torch.tensor(list(ids)), mask=(steps >= 0).float(), steps=steps, sampler_logprobs=sampler, **more
    )


class ScriptedSource(Stateless):
    """Answers of scripted writers to start from: cross-entropy on their tokens, by Eq 2 with teachers that are sure.

    Their questions are those of training.
    """

    objective = Objective(spec=clip_forward_kl.loss_spec())

    def __init__(self, *, seed: int = 0, batch: int = 64, habits: Habits | None = None) -> None:
        self.seed, self.size, self.habits = seed, batch, habits or Habits()
        self.questions = every_question(held_out=False)

    async def batch(self, step: int) -> StepBatch:
        chance = random.Random(f"scripted {self.seed} {step}")
        samples = []
        for index in range(self.size):
            question = chance.choice(self.questions)
            steps = write(question, self.habits, chance)
            sample = sample_of(
                tokens(question, steps), name=f"{step}-{index}", domain="advisory", reward=score(question, steps).reward
            )
            samples.append(dataclasses.replace(sample, teacher_logprobs=torch.zeros(sample.tokens)))
        return StepBatch(step=step, samples=samples)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rollout:
    """An answer of the policy: its tokens with the question's, what the sampler gave those it drew, and its score."""

    question: Question
    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    steps: tuple[Step, ...]
    score: Score

    @property
    def note(self) -> dict[str, str | float]:
        """For reports."""
        return {"question": self.question.id, "medicine": MEDICINES[self.question.medicine], "false": self.score.false}


@torch.no_grad()
def roll_out(
    model: PolicyModel, questions: Sequence[Question], seed: str, *, temperature: float = 1.0
) -> list[Rollout]:
    """One answer to each question, drawn at a temperature (> 0) from the whole vocabulary, until "end" or a cut.

    The same seed, questions and weights give the same tokens.
    """
    import transformers

    generator = torch.Generator().manual_seed(random.Random(seed).getrandbits(62))
    noise = torch.rand(len(questions), STEP * MAX_STEPS, generator=generator, dtype=torch.float64)
    drawn: list[list[int]] = [[] for _ in questions]
    logprobs: list[list[float]] = [[] for _ in questions]
    rows = list(range(len(questions)))
    cache: Any = transformers.DynamicCache()
    coming = torch.tensor([question.opening for question in questions])
    for at in range(STEP * MAX_STEPS):
        found, told = consult_policy.draw(model, coming, cache, noise[rows, at], temperature)
        for row, token, value in zip(rows, found.tolist(), told.tolist(), strict=True):
            drawn[row].append(token)
            logprobs[row].append(value)
        alive = [place for place, row in enumerate(rows) if not _over(drawn[row])]
        if not alive:
            break
        if len(alive) < len(rows):
            rows = [rows[place] for place in alive]
            found = found[alive]
            cache.batch_select_indices(torch.tensor(alive))
        coming = found[:, None]
    rollouts = []
    for question, mine, values in zip(questions, drawn, logprobs, strict=True):
        steps = _steps(mine)
        rollouts.append(
            Rollout(
                question=question,
                ids=(*question.opening, *mine),
                logprobs=tuple(values),
                steps=steps,
                score=score(question, steps),
            )
        )
    return rollouts


def _steps(drawn: Sequence[int]) -> tuple[Step, ...]:
    """The whole steps of what was drawn."""
    return tuple(zip(drawn[::STEP], drawn[1::STEP], strict=False))


def _over(drawn: Sequence[int]) -> bool:
    return is_cut(_steps(drawn)) if len(drawn) % STEP == 0 else drawn[-1] == END


async def rolled_out(model: PolicyModel, questions: Sequence[Question], seed: str, **more: Any) -> list[Rollout]:
    """``roll_out`` beside the event loop."""
    return await asyncio.to_thread(roll_out, model, questions, seed, **more)
