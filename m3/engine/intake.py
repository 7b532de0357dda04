"""What Engine and AsyncEngine share: prompts into requests, events into outputs, and the errors of an engine."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from typing import Any

from m3.engine.outputs import Assembly
from m3.engine.request import Event, Finished, PromptLogprobs, Request, SamplingParams, Tokens
from m3.models.tokenizer import Tokenizer
from m3kernels.checks import refuse

Prompt = str | Sequence[int]
Message = dict[str, str]
GREEDY = SamplingParams()


class EngineBusy(RuntimeError):  # noqa: N818
    """As many requests wait as may."""


class EngineDead(RuntimeError):  # noqa: N818
    """The core failed; the cause is in __cause__. What it computed cannot be trusted: make a new engine."""


class EngineClosed(RuntimeError):  # noqa: N818
    """The engine was not started, or is shut down."""


def describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def core_failed(error: BaseException) -> EngineDead:
    dead = EngineDead(f"engine: want a core that works; got one that failed with {describe(error)}")
    dead.__cause__ = error
    return dead


class Intake:
    """Prompts and parameters into requests."""

    def __init__(self, tokenizer: Tokenizer | None, seed: int | None) -> None:
        self.tokenizer = tokenizer
        self._seeds = random.Random(seed)
        self._count = 0

    def encode(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise refuse("engine", "prompt", "tokens where there is no tokenizer", "a str")
            tokens = self.tokenizer.encode(prompt)
        else:
            tokens = list(prompt) if isinstance(prompt, (list, tuple, range)) else []
        if not tokens or any(type(token) is not int for token in tokens):
            raise refuse("engine", "prompt", "a str, or a list of ints, of at least one token", repr(prompt)[:200])
        return tokens

    def chat(self, messages: Sequence[Message], variables: dict[str, Any]) -> list[int]:
        if self.tokenizer is None:
            raise refuse("engine", "messages", "a prompt of tokens where there is no tokenizer", "messages")
        return self.tokenizer.chat(messages, **variables)

    def assembly(
        self, prompt: Prompt, params: SamplingParams, request_id: str | None, *, skip_special_tokens: bool
    ) -> Assembly:
        """A request whose id in the core was never used before, and the place where its events go."""
        if not isinstance(params, SamplingParams):
            raise refuse("engine", "params", "SamplingParams", repr(params)[:200])
        tokens = self.encode(prompt)
        self._count += 1
        name = f"request-{self._count}" if request_id is None else request_id
        request = Request(
            id=f"{name}#{self._count}",
            prompt=tokens,
            params=params,
            seed=self._seeds.getrandbits(63) if params.seed is None else params.seed,
            arrival=time.monotonic(),
            tokens=list(tokens),
        )
        return Assembly(request, self.tokenizer, request_id=name, skip_special_tokens=skip_special_tokens)


def apply(event: Event, assembly: Assembly) -> bool:
    """Whether the event completed a stop string: then the core is to abort the request."""
    if assembly.finish_reason is not None:
        return False
    match event:
        case Tokens():
            return assembly.add_tokens(event)
        case PromptLogprobs():
            assembly.add_prompt_logprobs(event)
        case Finished():
            assembly.finish(event.reason, error=event.error, cached_tokens=event.cached_tokens, drafted=event.drafted)
    return False
