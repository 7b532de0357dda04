"""The physician on an engine, token in, token out; and what it said as samples for the trainer.

A consultation is one stream of tokens. Its beginning is the first prompt in the model's own template. Each further
prompt is what the stream holds, then the template's tokens for what others have said since:

    given (first prompt) | drawn | given (end of turn, the patient's answer, "assistant:") | drawn | given ...

What was drawn is never turned into text and back: for most tokenizers other ids would come out now and then, with
log-probabilities that nobody drew them with. The pieces travel with the messages (m3.environment.episode.Said), so the
physician keeps nothing, and a consultation can go on in another process.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from m3.algorithms import spar
from m3.engine.engine import AsyncEngine, EngineBusy, EngineClosed, EngineDead
from m3.engine.outputs import Completion
from m3.engine.request import SamplingParams
from m3.environment.case import Phase
from m3.environment.episode import CaseView, Said
from m3.environment.segment import Segment
from m3.environment.trajectory import Message, chat
from m3.models.tokenizer import Tokenizer
from m3.rollout.chat import ChatError, Failure
from m3.rollout.engine import TIMEOUT
from m3.train.streams import Sample
from m3kernels.checks import refuse

NOTHING = "..."  # what others hear of a message without a word


class Physician(Protocol):
    """A Policy whose every token is known, and whose weights a trainer may set.

    ``sampling``: all that decides a draw beside weights, prompt and seed. ``filtered``: whether it draws from less than
    the whole vocabulary. ``version``: of its weights.
    """

    @property
    def name(self) -> str: ...

    @property
    def temperature(self) -> float: ...

    @property
    def version(self) -> int: ...

    @property
    def sampling(self) -> str: ...

    @property
    def filtered(self) -> bool: ...

    async def act(self, view: CaseView, messages: Sequence[Message], phase: Phase, seed: int) -> Said:
        """The next message. Raises ChatError: there is none."""
        ...

    async def refresh(self, tensors: Mapping[str, Tensor], version: int) -> None:
        """Go on with these weights, by their names in a Hugging Face checkpoint."""
        ...


class EnginePhysician:
    """A Policy on an engine that was started.

    Args:
        engine: one with a tokenizer that has a chat template.
        name: as reports call the model.
        temperature: > 0, of the sampling; the trainer divides its logits by the same. top_k, top_p, min_p: filters; the
            trainer has none, so the sampler's correction is all that tells it of them.
        max_tokens: of one message.
        timeout: seconds of one message, waiting included.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        name: str,
        *,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        max_tokens: int = 400,
        timeout: float = TIMEOUT,
    ) -> None:
        if engine.tokenizer is None or engine.tokenizer.template is None:
            raise refuse("EnginePhysician", "engine", "one with a tokenizer and its chat template", "none")
        if not temperature > 0:
            raise refuse("EnginePhysician", "temperature", "a number > 0", temperature)
        self.name, self.temperature = name, temperature
        self.version = 0
        self._engine, self._tokenizer = engine, engine.tokenizer
        end = self._tokenizer.eos_token_id
        self._sampling = {
            "temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "max_tokens": max_tokens,
            "stop_token_ids": () if end is None else (end,), "keep_end": True, "logprobs": "sampling",
            "deadline": timeout,
        }  # fmt: skip
        self._params(0)

    def _params(self, seed: int) -> SamplingParams:
        return SamplingParams(seed=seed, **self._sampling)  # type: ignore[arg-type]

    @property
    def sampling(self) -> str:
        """All that decides a draw beside weights, prompt and seed."""
        return ", ".join(f"{name} {value}" for name, value in self._sampling.items() if name != "deadline")

    @property
    def filtered(self) -> bool:
        """Whether it draws from less than the whole vocabulary."""
        return (self._sampling["top_k"], self._sampling["top_p"], self._sampling["min_p"]) != (0, 1.0, 0.0)

    async def act(self, view: CaseView, messages: Sequence[Message], phase: Phase, seed: int) -> Said:
        """The next message. It sees instructions and the dialogue, nothing of the case.

        Raises:
            ChatError: timeout; refused (a prompt that the engine cannot take, such as one too long); unreachable.
        """
        before, given = prompt_ids(self._tokenizer, messages)
        try:
            done = await self._engine.complete([*before, *given], self._params(seed))
        except ValueError as error:
            raise ChatError(Failure.refused, f"{self.name}: {error}"[:500]) from error
        except (EngineBusy, EngineClosed, EngineDead) as error:
            raise ChatError(Failure.unreachable, f"{self.name}: {error}"[:500]) from error
        self._check(done)
        assert done.logprobs is not None, "they were asked for"
        return Said(
            text=done.text.strip() or NOTHING,
            given_ids=tuple(given),
            token_ids=tuple(done.tokens),
            logprobs=tuple(done.logprobs),
            versions=tuple(done.versions),
            finish=done.finish_reason,
        )

    def _check(self, done: Completion) -> None:
        if done.finish_reason == "deadline":
            raise ChatError(Failure.timeout, f"{self.name}: not done after {self._sampling['deadline']:g} s")
        if done.finish_reason in ("abort", "error") or not done.tokens:
            raise ChatError(Failure.unreachable, f"{self.name}: {done.error or 'no token was drawn'}"[:500])

    async def refresh(self, tensors: Mapping[str, Tensor], version: int) -> None:
        """Go on with these weights, by their names in a Hugging Face checkpoint."""
        await self._engine.update_weights(tensors, version)
        self.version = version


def prompt_ids(tokenizer: Tokenizer, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
    """(the stream of tokens so far, what is to be given after it) of a physician's next message.

    The template is rendered with a mark in place of the last drawn message; what follows the mark is given. Where the
    drawn message ended with the token that the template ends one with, it is not given twice.

    Raises:
        ValueError: a template that does not render a message of the assistant once.
    """
    rows, stream, last = chat(messages), [], None
    for place, message in enumerate(messages):
        if (said := Said.of(message)) is not None:
            stream += [*said.given_ids, *said.token_ids]
            last = place, said
    if last is None:
        return [], tokenizer.chat(rows)
    place, said = last
    given = tokenizer.chat_after(rows, place)
    return stream, given[1:] if said.finish == "stop" and given[:1] == [said.token_ids[-1]] else given


def stream_of(name: str, prompt: Sequence[Message], response: Sequence[Message], *, temperature: float) -> Sample:
    """The whole stream of tokens of a prompt and its response, of which the policy's in the response count.

    Steps are numbered by turn. Messages of the policy in the prompt are context: they were rewarded in their own
    stage. What was said after the last drawn token is left out.

    Args:
        name: of the sample. temperature: that the policy drew at.
    Raises:
        ValueError: a message of the policy without its tokens.
    """
    ids: list[int] = []
    steps: list[int] = []
    logprobs: list[float] = []
    versions: list[int] = []
    for place, message in enumerate((*prompt, *response)):
        counts = place >= len(prompt)
        said = Said.of(message)
        if said is None:
            if message.role == "assistant" and counts:
                raise refuse("stream_of", "response", "token ids of each message that was drawn", name)
            continue
        ids += [*said.given_ids, *said.token_ids]
        given, drawn = len(said.given_ids), len(said.token_ids)
        steps += [-1] * given + [message.turn if counts else -1] * drawn
        logprobs += [0.0] * given + (list(said.logprobs) if counts else [0.0] * drawn)
        versions += [-1] * given + (list(said.versions) if counts else [-1] * drawn)
    at = torch.tensor(steps)
    return Sample(
        id=name,
        ids=torch.tensor(ids),
        mask=(at >= 0).float(),
        steps=at,
        sampler_logprobs=torch.tensor(logprobs, dtype=torch.float32),
        versions=torch.tensor(versions),
        temperature=temperature,
    )


def sample_of(
    segment: Segment, *, temperature: float, domain: str = "", penalties: spar.Config | None = None
) -> Sample:
    """A segment for the trainer: its ``stream_of``, with what is known of it.

    Args:
        temperature: that the policy drew at.
        domain: names the teacher. penalties: of the steps' violations, for ``gammas``.
    Raises:
        ValueError: a message of the policy without its tokens; a violation without a penalty.
    """
    drawn = stream_of(segment.id, segment.prompt, segment.response, temperature=temperature)
    finished = [said.finish for message in segment.response if (said := Said.of(message)) is not None]
    violated = dict(zip(segment.steps, segment.violations(), strict=True))
    note: dict[str, str | float] = {
        "case": segment.case,
        "phase": str(segment.phase),
        "quality": segment.quality,
        "ended": segment.ended,
        "cut": finished.count("length"),
        **{f"violates {turn}": ", ".join(sorted(names)) for turn, names in violated.items() if names},
        **segment.outcomes,
    }
    return dataclasses.replace(
        drawn,
        domain=domain,
        group=segment.group,
        rollout=segment.rollout,
        reward=segment.reward,
        gammas={turn: spar.step_factor(names, penalties) for turn, names in violated.items()},
        note=note,
    )
