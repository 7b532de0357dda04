"""A chat model in this process: an AsyncEngine behind the one protocol, with the tokens that it drew."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from m3.engine.engine import AsyncEngine, EngineBusy, EngineClosed, EngineDead
from m3.engine.outputs import Completion
from m3.engine.request import SamplingParams
from m3.rollout.chat import Budget, ChatError, ChatMessages, Failure, Reply, Usage
from m3kernels.checks import refuse

TIMEOUT = 300.0  # seconds; ours: a small model on a busy CPU


class EngineChat:
    """An engine that was started, as a ChatClient. ``token_ids`` of its replies are what the engine drew.

    The engine cannot hold an answer to a ``json_schema``: who wants JSON says so in the messages.

    Args:
        model: the model's name, as reports call it.
        timeout: seconds of a call, waiting included; then the engine drops the request.
        budget: counts calls and tokens; shared with whom it is given to.
    """

    def __init__(
        self, engine: AsyncEngine, model: str, *, timeout: float = TIMEOUT, budget: Budget | None = None
    ) -> None:
        if engine.tokenizer is None:
            raise refuse("EngineChat", "engine", "one with a tokenizer", "one without")
        if timeout <= 0:
            raise refuse("EngineChat", "timeout", "seconds above 0", timeout)
        self.engine = engine
        self.timeout = timeout
        self.budget = budget
        self._model = model

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
        """As ChatClient.chat; cancelling the call drops the request.

        Raises:
            ChatError: timeout; refused (a prompt or a parameter that the engine cannot take); unreachable (the engine
                is full, closed or failed); over_budget.
        """
        if self.budget is not None:
            self.budget.take()
        try:
            params = SamplingParams(
                temperature=temperature, max_tokens=max_tokens, seed=seed, stop=tuple(stop), deadline=self.timeout
            )
            assert self.engine.tokenizer is not None, "checked at the start"
            prompt = self.engine.tokenizer.chat([dict(message) for message in messages])
            done = await self.engine.complete(prompt, params)
        except ValueError as error:
            raise ChatError(Failure.refused, f"{self._model}: {error}"[:500]) from error
        except (EngineBusy, EngineClosed, EngineDead) as error:
            raise ChatError(Failure.unreachable, f"{self._model}: {error}"[:500]) from error
        usage = Usage(
            prompt_tokens=done.usage.prompt_tokens,
            completion_tokens=done.usage.completion_tokens,
            cached_tokens=done.usage.cached_tokens,
        )
        if self.budget is not None:
            self.budget.add(usage)
        self._check(done)
        return Reply(
            text=done.text,
            finish_reason=done.finish_reason,
            usage=usage,
            model=self._model,
            token_ids=tuple(done.tokens),
        )

    def _check(self, done: Completion) -> None:
        if done.finish_reason == "deadline":
            raise ChatError(Failure.timeout, f"{self._model}: not done after {self.timeout:g} s")
        if done.finish_reason in ("abort", "error"):
            raise ChatError(Failure.unreachable, f"{self._model}: {done.error or 'the engine was shut down'}"[:500])
