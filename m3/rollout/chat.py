"""The one protocol behind which a chat model stands: a server, the engine in this process, or a script."""

from __future__ import annotations

import dataclasses
import enum
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

ChatMessages = Sequence[Mapping[str, str]]  # [{"role": ..., "content": ...}, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Usage:
    """Tokens of a call; None where whoever answered did not say. ``cached_tokens`` None is "unknown", not 0.

    Of the answer: reasoning_tokens; accepted_tokens, that a draft had proposed; rejected_tokens: proposed in vain.
    """

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_tokens: int | None = None
    reasoning_tokens: int | None = None
    accepted_tokens: int | None = None
    rejected_tokens: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reply:
    """An answer. ``token_ids``: what was drawn, where it is known."""

    text: str
    finish_reason: str = "stop"
    usage: Usage = dataclasses.field(default_factory=Usage)
    model: str = ""
    token_ids: tuple[int, ...] | None = None


class Failure(enum.StrEnum):
    """Why there is no answer."""

    timeout = "timeout"
    unreachable = "unreachable"
    refused = "refused"  # the server understood and said no: a bad request, a wrong key
    over_budget = "over_budget"


class ChatError(RuntimeError):
    """No answer, after every retry. ``failure`` says of which kind."""

    def __init__(self, failure: Failure, message: str) -> None:
        super().__init__(message)
        self.failure = failure


@runtime_checkable
class ChatClient(Protocol):
    """Whoever answers chats. Implementations retry and time out by themselves, and raise ChatError."""

    @property
    def model(self) -> str:
        """The model's name, as reports call it."""

    async def chat(
        self,
        messages: ChatMessages,
        *,
        temperature: float = 0.0,
        max_tokens: int = 512,
        seed: int | None = None,
        stop: Sequence[str] = (),
        json_schema: Mapping[str, Any] | None = None,
    ) -> Reply:
        """Answer; ``json_schema``: asked of servers that can hold to one, a wish elsewhere.

        Raises:
            ChatError: no answer.
        """
        ...


class Budget:
    """A ceiling on calls, tokens and seconds, shared by all who are given it; None is no ceiling.

    ``take`` counts a call before it is made, ``add`` its tokens after.
    """

    def __init__(self, *, calls: int | None = None, tokens: int | None = None, seconds: float | None = None) -> None:
        self.calls, self.tokens, self.seconds = calls, tokens, seconds
        self.calls_made = 0
        self.tokens_used = 0
        self.began = time.monotonic()

    def take(self) -> None:
        """Count one call.

        Raises:
            ChatError: over_budget; names the ceiling that was reached.
        """
        reached = [
            f"{name} {used:g} of {limit:g}"
            for name, used, limit in (
                ("calls", self.calls_made, self.calls),
                ("tokens", self.tokens_used, self.tokens),
                ("seconds", time.monotonic() - self.began, self.seconds),
            )
            if limit is not None and used >= limit
        ]
        if reached:
            raise ChatError(Failure.over_budget, "budget: spent: " + ", ".join(reached))
        self.calls_made += 1

    def add(self, usage: Usage) -> None:
        """Count the tokens of a call that was made."""
        self.tokens_used += (usage.prompt_tokens or 0) + (usage.completion_tokens or 0)
