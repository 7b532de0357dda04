"""An engine behind the server: deltas as tokens are drawn, usage with the prompt tokens that were in the cache."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Sequence

from m3.engine.engine import AsyncEngine, EngineBusy, EngineClosed, EngineDead
from m3.engine.outputs import Output
from m3.engine.request import SamplingParams
from m3.rollout.chat import Usage
from m3.serve.app import Delta
from m3.serve.schema import ChatRequest, RequestError
from m3kernels.checks import refuse

MAX_TOKENS = 1024  # of an answer whose request does not say; ours
TIMEOUT = 600.0  # seconds of a request, waiting included; ours
DRAIN = 30.0  # seconds for which requests under way may go on at the end; ours


class EngineBackend:
    """A ChatBackend of one model.

    Args:
        engine: not started yet; lifespan() starts it and shuts it down.
        name: what clients call the model.
        max_tokens: of an answer whose request does not say.
        timeout: seconds of a request; then it ends with status 504.
    """

    def __init__(
        self, engine: AsyncEngine, name: str, *, max_tokens: int = MAX_TOKENS, timeout: float = TIMEOUT
    ) -> None:
        if engine.tokenizer is None or engine.tokenizer.template is None:
            raise refuse("EngineBackend", "engine", "one whose tokenizer has a chat template", "one without")
        self.engine = engine
        self._name = name
        self._max_tokens = max_tokens
        self._timeout = timeout

    def models(self) -> Sequence[str]:
        return (self._name,)

    def failure(self) -> str | None:
        stats = self.engine.stats()
        return None if stats.state == "running" else f"engine {stats.state}"

    @contextlib.asynccontextmanager
    async def lifespan(self) -> AsyncIterator[None]:
        await self.engine.start()
        try:
            yield
        finally:
            await self.engine.shutdown(timeout=DRAIN)

    async def stream(self, request: ChatRequest) -> AsyncGenerator[Delta]:
        """As ChatBackend.stream.

        Raises:
            RequestError: 400: no message, a prompt or a parameter that the engine cannot take; 503: it is full or
                closed; 504: the time is over; 500: it failed.
        """
        if not request.messages:
            raise RequestError(400, "messages: want one or more", param="messages")
        try:
            params = SamplingParams(
                temperature=request.temperature,
                top_p=request.top_p,
                top_k=request.top_k,
                min_p=request.min_p,
                seed=request.seed,
                max_tokens=request.limit or self._max_tokens,
                stop=request.stops,
                deadline=self._timeout,
            )
            assert self.engine.tokenizer is not None, "checked at the start"
            prompt = await asyncio.to_thread(self.engine.tokenizer.chat, request.plain())  # long where the prompt is
            async with contextlib.aclosing(self.engine.generate(prompt, params)) as outputs:
                async for output in outputs:
                    yield _delta(output)
        except ValueError as error:
            raise RequestError(400, str(error), param=_argument(error)) from error
        except (EngineBusy, EngineClosed) as error:
            raise RequestError(503, "the engine takes no request now", code="overloaded") from error
        except EngineDead as error:
            raise RequestError(500, "the engine failed", code="engine_failed") from error


def _delta(output: Output) -> Delta:
    match output.finish_reason:
        case None:
            return Delta(text=output.text)
        case "stop" | "length":
            usage = Usage(
                prompt_tokens=output.usage.prompt_tokens,
                completion_tokens=output.usage.completion_tokens,
                cached_tokens=output.usage.cached_tokens,
            )
            return Delta(text=output.text, finish_reason=output.finish_reason, usage=usage)
        case "deadline":
            raise RequestError(504, "the time of a request is over", code="timeout")
        case "abort":
            raise RequestError(503, "the server is shutting down", code="aborted")
        case "error":
            raise RequestError(500, "the engine failed", code="engine_failed")


def _argument(error: ValueError) -> str | None:
    """The argument's name in "op: argument: want ...", as the API calls it."""
    parts = str(error).split(": ")
    named = parts[1] if len(parts) > 2 else ""
    if named in ("prompt", "messages", "chat_template"):
        return "messages"
    return named if named in ChatRequest.model_fields else None
