"""A small decoder for the consultation task: its vocabulary, its start from mediocre physicians, its rollouts.

Rollouts are drawn straight from the trained model, many consultations at once: all of them have the same number of
tokens at every moment (consult.py), so a batch needs no padding. What a row draws follows from the noise of its own,
which is decided before the first token.
"""

from __future__ import annotations

import asyncio
import dataclasses
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from m3.algorithms import clip_forward_kl
from m3.train.policy_model import PolicyModel
from m3.train.stage import Objective, Stateless, StepBatch
from m3.train.streams import Sample
from m3.train.tasks.consult import (
    BEGIN,
    DEPARTMENTS,
    DIAGNOSIS,
    MAX_TURNS,
    OPENING,
    STEP,
    WORDS,
    Case,
    Consultation,
    Habits,
    Points,
    Score,
    consult,
    draw_case,
)  # fmt: skip

CONTEXT = OPENING + STEP * MAX_TURNS


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Size of the decoder (Llama's layers); one million parameters."""

    hidden: int = 160
    layers: int = 3
    heads: int = 5
    intermediate: int = 480
    seed: int = 0


def decoder(config: DecoderConfig | None = None, *, words: int = len(WORDS), context: int = CONTEXT) -> PolicyModel:
    """A decoder with random weights, from a seed; the first of its words begins a sequence."""
    import transformers

    config = config or DecoderConfig()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        causal = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=words,
                hidden_size=config.hidden,
                intermediate_size=config.intermediate,
                num_hidden_layers=config.layers,
                num_attention_heads=config.heads,
                num_key_value_heads=config.heads,
                max_position_embeddings=2 * context,
                tie_word_embeddings=True,
                bos_token_id=BEGIN,
                eos_token_id=None,
                pad_token_id=None,
            )
        )
    return PolicyModel(causal.float())


def write_tokenizer(folder: str | Path, words: Sequence[str] = WORDS, unknown: str = "pardon") -> Path:
    """tokenizer.json of a task beside a saved model: words between spaces; the path."""
    import tokenizers
    from tokenizers import models, pre_tokenizers

    made = tokenizers.Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token=unknown))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    path = Path(folder) / "tokenizer.json"
    made.save(str(path))
    return path


def sample_of(
    ids: Sequence[int],
    score: Score,
    *,
    name: str,
    prompted: bool = False,
    sampler_logprobs: Sequence[float] | None = None,
    **more: Any,
) -> Sample:
    """A consultation as a trainer's sample: the physician's two tokens of each step count; see streams.Sample.

    ``prompted``: the word "diagnosis" of the last step was given, and does not count.
    """
    steps = torch.full((len(ids),), -1)
    for step in range(score.turns):
        at = OPENING + STEP * step
        steps[at : at + 2] = step
    if prompted:
        steps[at] = -1
    counts = steps >= 0
    logprobs = None
    if sampler_logprobs is not None:
        logprobs = torch.zeros(len(ids))
        logprobs[counts] = torch.tensor(list(sampler_logprobs), dtype=torch.float32)
    return Sample(
        id=name,
        ids=torch.tensor(list(ids)),
        mask=counts.float(),
        steps=steps,
        sampler_logprobs=logprobs,
        reward=score.reward,
        **more,
    )


class ScriptedSource(Stateless):
    """Consultations of scripted physicians to start from: cross-entropy on the physician's tokens.

    That is Clip-Forward-KL to a teacher that gives every token the probability 1 (Eq 2: the indicator is 1).
    """

    objective = Objective(spec=clip_forward_kl.loss_spec())

    def __init__(
        self, *, seed: int = 0, batch: int = 64, habits: Habits | None = None, department: str | None = None
    ) -> None:
        self.seed, self.size, self.habits, self.department = seed, batch, habits or Habits(), department

    async def batch(self, step: int) -> StepBatch:
        chance = random.Random(f"scripted {self.seed} {step}")
        samples = []
        for index in range(self.size):
            case = draw_case(chance, department=self.department)
            ids, score = consult(case, self.habits, chance)
            sample = sample_of(ids, score, name=f"{step}-{index}", domain=DEPARTMENTS[case.department])
            samples.append(dataclasses.replace(sample, teacher_logprobs=torch.zeros(sample.tokens)))
        return StepBatch(step=step, samples=samples)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rollout:
    """A consultation of the policy: its tokens, what the sampler gave those it drew (in nats), and its score.

    ``prompted``: the word "diagnosis" of the last step was given.
    """

    case: Case
    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    score: Score
    prompted: bool


@torch.no_grad()
def roll_out(
    model: PolicyModel,
    cases: Sequence[Case],
    seed: str,
    *,
    temperature: float = 1.0,
    points: Points | None = None,
    max_turns: int = MAX_TURNS,
) -> list[Rollout]:
    """One consultation of each case, drawn at a temperature (> 0) from the whole vocabulary.

    Whoever has not made a diagnosis before the last turn is asked for it there: the word "diagnosis" is given.
    The same seed, cases and weights give the same tokens.
    """
    import transformers

    generator = torch.Generator().manual_seed(random.Random(seed).getrandbits(62))
    noise = torch.rand(len(cases), 2 * max_turns, generator=generator, dtype=torch.float64)
    nows = [Consultation(case, points=points, max_turns=max_turns) for case in cases]
    ids = [list(case.opening) for case in cases]
    logprobs: list[list[float]] = [[] for _ in cases]
    rows = list(range(len(cases)))
    cache: Any = transformers.DynamicCache()
    coming = torch.tensor(ids)
    for turn in range(max_turns):
        first, told = draw(model, coming, cache, noise[rows, 2 * turn], temperature)
        prompted = turn == max_turns - 1
        if prompted:
            first = torch.full_like(first, DIAGNOSIS)
        second, told_second = draw(model, first[:, None], cache, noise[rows, 2 * turn + 1], temperature)
        alive, answers = [], []
        for place, row in enumerate(rows):
            pair = int(first[place]), int(second[place])
            answer = nows[row].act(*pair)
            ids[row] += [*pair] if answer is None else [*pair, answer]
            logprobs[row] += (
                [float(told_second[place])] if prompted else [float(told[place]), float(told_second[place])]
            )
            if not nows[row].done:
                alive.append(place)
                answers.append(answer)
        if not alive:
            break
        rows = [rows[place] for place in alive]
        kept = torch.tensor(alive)
        if len(kept) < len(first):
            cache.batch_select_indices(kept)
        coming = torch.stack([second[kept], torch.tensor(answers)], 1)
    return [
        Rollout(
            case=now.case,
            ids=tuple(tokens),
            logprobs=tuple(values),
            score=now.score(),
            prompted=len(values) < 2 * len(now.violations),
        )
        for now, tokens, values in zip(nows, ids, logprobs, strict=True)
    ]


def draw(model: PolicyModel, coming: Tensor, cache: Any, noise: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """(tokens (B,), log-probabilities (B,)) after ``coming`` (B, L), whose keys and values go into the cache.

    ``noise`` (B,) fp64 in [0, 1) decides what is drawn.
    """
    found = model.causal(input_ids=coming, past_key_values=cache, use_cache=True, logits_to_keep=1)
    logprobs = (found.logits[:, -1].double() / temperature).log_softmax(-1)
    sums = logprobs.exp().cumsum(-1)
    drawn = torch.searchsorted(sums, (noise * sums[:, -1])[:, None], right=True)[:, 0].clamp(max=sums.shape[1] - 1)
    return drawn, logprobs.gather(1, drawn[:, None])[:, 0]


async def rolled_out(model: PolicyModel, cases: Sequence[Case], seed: str, **more: Any) -> list[Rollout]:
    """``roll_out`` beside the event loop."""
    return await asyncio.to_thread(roll_out, model, cases, seed, **more)
