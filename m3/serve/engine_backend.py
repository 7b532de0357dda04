"""An engine behind the server: deltas as tokens are drawn, usage with the prompt tokens that were in the cache.

Prompts of tokens are answered whole (completions.py), with the log-probabilities of what was drawn.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from pathlib import Path

from torch import Tensor

from m3.engine.engine import AsyncEngine, EngineBusy, EngineClosed, EngineDead
from m3.engine.outputs import Output
from m3.engine.request import Reason, SamplingParams
from m3.rollout.chat import Usage
from m3.serve.app import Delta
from m3.serve.completions import Completed, CompletionRequest, WeightsRequest
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
        weights_from: folder under which checkpoints lie whose weights a client may put in; None: none may.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        name: str,
        *,
        max_tokens: int = MAX_TOKENS,
        timeout: float = TIMEOUT,
        weights_from: str | Path | None = None,
    ) -> None:
        if engine.tokenizer is None or engine.tokenizer.template is None:
            raise refuse("EngineBackend", "engine", "one whose tokenizer has a chat template", "one without")
        self.engine = engine
        self._name = name
        self._max_tokens = max_tokens
        self._timeout = timeout
        self._weights_from = None if weights_from is None else Path(weights_from).resolve()
        self._version = 0

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
        except (ValueError, EngineBusy, EngineClosed, EngineDead) as error:
            raise _told(error) from error

    async def complete(self, request: CompletionRequest) -> Completed:
        """As TokenBackend.complete. The token that ended the answer is one of its ids where these were asked for."""
        tokenizer = self.engine.tokenizer
        assert tokenizer is not None, "checked at the start"
        try:
            params = SamplingParams(
                temperature=request.temperature,
                top_p=request.top_p,
                top_k=request.top_k,
                min_p=request.min_p,
                seed=request.seed,
                max_tokens=request.max_tokens,
                stop=request.stops,
                stop_token_ids=request.stop_token_ids,
                keep_end=request.return_token_ids,
                logprobs="none" if request.logprobs is None else "raw",
                prompt_logprobs=request.prompt_logprobs is not None,
                deadline=self._timeout,
            )
            done = await self.engine.complete(request.prompt, params)
        except (ValueError, EngineBusy, EngineClosed, EngineDead) as error:
            raise _told(error, "prompt") from error
        _check_reason(done.finish_reason)
        return Completed(
            text=done.text,
            prompt=done.prompt,
            tokens=done.tokens,
            logprobs=done.logprobs,
            prompt_logprobs=done.prompt_logprobs,
            finish_reason=done.finish_reason,
            usage=Usage(
                prompt_tokens=done.usage.prompt_tokens,
                completion_tokens=done.usage.completion_tokens,
                cached_tokens=done.usage.cached_tokens,
            ),
            spelled=[tokenizer.decode([token]) for token in done.tokens],
        )

    async def update(self, request: WeightsRequest) -> int:
        """As TokenBackend.update. Requests under way go on with the new weights.

        A version that is a number is told with each token of the engine; without one it is counted.
        """
        if self._weights_from is None:
            raise RequestError(403, "this server takes no weights: start it with --weights-from", code="forbidden")
        folder = Path(request.model_path).resolve()
        if not folder.is_relative_to(self._weights_from):
            raise RequestError(403, "model_path: want a folder where weights may come from", param="model_path")
        said = request.weight_version or ""
        version = int(said) if said.isdecimal() else self._version + 1
        try:
            tensors = await asyncio.to_thread(lambda: dict(_tensors(folder)))
            await self.engine.update_weights(tensors, version)
        except (ValueError, EngineBusy, EngineClosed, EngineDead) as error:
            raise _told(error) from error
        self._version = version
        return version


def _tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of everything in a checkpoint's safetensors files."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise refuse("serve", "model_path", "a folder with *.safetensors", "none there")
    for file in files:
        try:
            yield from load_file(file).items()
        except SafetensorError as error:
            raise refuse("serve", "model_path", "whole safetensors files", f"{file.name}: {error}") from error


def _told(error: Exception, prompt: str = "messages") -> RequestError:
    """What a client is told of it. ``prompt``: how the API calls a prompt."""
    if isinstance(error, ValueError):
        return RequestError(400, str(error), param=_argument(error, prompt))
    if isinstance(error, EngineDead):
        return RequestError(500, "the engine failed", code="engine_failed")
    return RequestError(503, "the engine takes no request now", code="overloaded")


def _delta(output: Output) -> Delta:
    if output.finish_reason is None:
        return Delta(text=output.text)
    _check_reason(output.finish_reason)
    usage = Usage(
        prompt_tokens=output.usage.prompt_tokens,
        completion_tokens=output.usage.completion_tokens,
        cached_tokens=output.usage.cached_tokens,
    )
    return Delta(text=output.text, finish_reason=output.finish_reason, usage=usage)


def _check_reason(reason: Reason) -> None:
    match reason:
        case "deadline":
            raise RequestError(504, "the time of a request is over", code="timeout")
        case "abort":
            raise RequestError(503, "the server is shutting down", code="aborted")
        case "error":
            raise RequestError(500, "the engine failed", code="engine_failed")


def _argument(error: ValueError, prompt: str) -> str | None:
    """The argument's name in "op: argument: want ...", as the API calls it."""
    parts = str(error).split(": ")
    named = parts[1] if len(parts) > 2 else ""
    if named in ("prompt", "messages", "chat_template"):
        return prompt
    return named if named in (*ChatRequest.model_fields, *WeightsRequest.model_fields) else None
