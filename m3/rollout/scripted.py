"""A chat model that is a script: for tests, for dry runs, for users who want to see what is asked."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from m3.rollout.chat import Budget, ChatError, ChatMessages, Reply
from m3kernels.checks import refuse

Line = str | Reply | ChatError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
    """One call as it was made."""

    messages: tuple[Mapping[str, str], ...]
    temperature: float
    max_tokens: int
    seed: int | None
    stop: tuple[str, ...]
    json_schema: Mapping[str, Any] | None

    @property
    def last(self) -> str:
        """The content of the last message."""
        return self.messages[-1]["content"] if self.messages else ""


class ScriptedChat:
    """A ChatClient that says what it was given, and keeps what it was asked in ``calls``.

    Args:
        replies: in order of the calls, or a function of the call. A ChatError is raised, a Reply returned as it is.
        repeat: begin again after the last reply; else a call more is a ValueError.
    """

    def __init__(
        self,
        replies: Sequence[Line] | Callable[[Call], Line],
        *,
        model: str = "scripted",
        repeat: bool = False,
        budget: Budget | None = None,
    ) -> None:
        if not callable(replies) and not replies:
            raise refuse("ScriptedChat", "replies", "one or more, or a function", "none")
        self._replies = replies
        self._model = model
        self._repeat = repeat
        self.budget = budget
        self.calls: list[Call] = []

    @property
    def model(self) -> str:
        return self._model

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
        """As ChatClient.chat; text is not cut at max_tokens or stop.

        Raises:
            ChatError: a line of the script, or over_budget.
            ValueError: the script is over.
        """
        if self.budget is not None:
            self.budget.take()
        call = Call(
            messages=tuple(dict(message) for message in messages),
            temperature=temperature,
            max_tokens=max_tokens,
            seed=seed,
            stop=tuple(stop),
            json_schema=json_schema,
        )
        line = self._line(call)
        self.calls.append(call)
        if isinstance(line, ChatError):
            raise line
        reply = line if isinstance(line, Reply) else Reply(text=line, model=self._model)
        if self.budget is not None:
            self.budget.add(reply.usage)
        return reply

    def _line(self, call: Call) -> Line:
        if callable(self._replies):
            return self._replies(call)
        n = len(self.calls)
        if n >= len(self._replies) and not self._repeat:
            raise refuse("ScriptedChat", "replies", f"one for call {n + 1}", f"{len(self._replies)}")
        return self._replies[n % len(self._replies)]
