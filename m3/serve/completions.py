"""Token in, token out: POST /v1/completions, for trainers that roll out elsewhere, and new weights for a server.

A prompt of ids is taken as it is; what was drawn comes back as ids with a log-probability each, the token that ended
the answer included. Fields are vLLM's: ``return_token_ids``, ``logprobs``, ``prompt_logprobs``, ``stop_token_ids``.

    POST /update_weights_from_disk {"model_path": folder, "weight_version": "7"}     SGLang's; where it was allowed
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Annotated, Any, Literal, Protocol, TypeVar, runtime_checkable

import pydantic
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from m3.rollout.chat import Usage
from m3.serve.schema import INT64, MAX_STOPS, RequestError, StopText, Strict, read_as

LOG = logging.getLogger("m3.serve")
Result = TypeVar("Result")
Token = Annotated[int, pydantic.Field(ge=0, lt=2**31)]


class CompletionRequest(Strict):
    """The body of POST /v1/completions; defaults are OpenAI's.

    Args:
        prompt: ids, or text, which is encoded with the tokenizer's special tokens.
        logprobs: 0: the log-probability of each drawn token, under softmax(logits), whatever it was drawn with.
        prompt_logprobs: 0: that of each prompt token but the first.
        return_token_ids: tell the ids of prompt and answer, with the token that ended it.
    """

    model: str
    prompt: Annotated[str, pydantic.Field(min_length=1)] | Annotated[list[Token], pydantic.Field(min_length=1)]
    max_tokens: Annotated[int, pydantic.Field(ge=1, lt=2**31)] = 16
    temperature: Annotated[float, pydantic.Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, pydantic.Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, pydantic.Field(ge=0, lt=2**31)] = 0
    min_p: Annotated[float, pydantic.Field(ge=0, le=1)] = 0.0
    seed: Annotated[int, pydantic.Field(ge=-INT64, lt=INT64)] | None = None
    stop: StopText | list[StopText] | None = None
    stop_token_ids: tuple[Token, ...] = ()
    logprobs: Literal[0] | None = None
    prompt_logprobs: Literal[0] | None = None
    return_token_ids: bool = False
    stream: Literal[False] = False
    n: Literal[1] = 1
    echo: Literal[False] = False
    repetition_penalty: Literal[1] = 1
    frequency_penalty: Literal[0] = 0
    presence_penalty: Literal[0] = 0
    user: str | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        return () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


class WeightsRequest(Strict):
    """The body of POST /update_weights_from_disk; load_format is taken and not used."""

    model_path: str
    weight_version: str | None = None
    load_format: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Completed:
    """An answer. ``logprobs``: of ``tokens``; ``prompt_logprobs``: of the prompt but its first; None: not asked for."""

    text: str
    prompt: Sequence[int]
    tokens: Sequence[int]
    logprobs: Sequence[float] | None
    prompt_logprobs: Sequence[float] | None
    finish_reason: str
    usage: Usage
    spelled: Sequence[str]  # each token as text


@runtime_checkable
class TokenBackend(Protocol):
    """A ChatBackend that answers prompts of tokens too."""

    def models(self) -> Sequence[str]: ...

    async def complete(self, request: CompletionRequest) -> Completed:
        """Raises RequestError, as ChatBackend.stream."""
        ...

    async def update(self, request: WeightsRequest) -> int:
        """New weights, from a checkpoint on this machine's disk; the version they have now.

        Raises:
            RequestError: 403: not allowed here; 400: no such checkpoint, or one of another model.
        """
        ...


def read_completion(body: bytes) -> CompletionRequest:
    """A request from its body; RequestError 400 names the argument."""
    request = read_as(CompletionRequest, body)
    if len(request.stops) > MAX_STOPS:
        raise RequestError(400, f"stop: want at most {MAX_STOPS}; got {len(request.stops)}", param="stop")
    return request


def routes(backend: TokenBackend, body: Callable[[Request], Awaitable[bytes]]) -> list[Route]:
    """The two routes. ``body`` checks a request's key and reads it."""

    async def completions(request: Request) -> CompletionResponse:
        asked = read_completion(await body(request))
        if asked.model not in backend.models():
            raise RequestError(404, "model: want one of GET /v1/models", param="model", code="model_not_found")
        return CompletionResponse(backend, asked)

    async def update(request: Request) -> JSONResponse:
        version = await backend.update(read_as(WeightsRequest, await body(request)))
        return JSONResponse({"success": True, "message": f"weights of version {version}"})

    return [
        Route("/v1/completions", completions, methods=["POST"]),
        Route("/update_weights_from_disk", update, methods=["POST"]),
    ]


class CompletionResponse:
    """Sends the answer to one request; a client that goes away ends its work."""

    def __init__(self, backend: TokenBackend, request: CompletionRequest) -> None:
        self._backend, self._request = backend, request

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        name, begun = f"cmpl-{uuid.uuid4().hex}", time.monotonic()
        status, told = 200, "client gone"
        try:
            done = await unless_gone(receive, self._backend.complete(self._request))
            row = completion_json(name, self._request, done)
            told = f"answered, {done.usage.prompt_tokens} + {done.usage.completion_tokens} tokens"
        except ClientDisconnect:
            return
        except RequestError as error:
            status, row, told = error.status, error.to_json(), f"status {error.status}"
        finally:
            LOG.info("%s: %s: %s in %.2f s", name, self._request.model, told, time.monotonic() - begun)
        await JSONResponse(row, status)(scope, receive, send)


def completion_json(name: str, request: CompletionRequest, done: Completed) -> dict[str, Any]:
    """The body of the answer."""
    choice: dict[str, Any] = {"index": 0, "text": done.text, "finish_reason": done.finish_reason, "logprobs": None}
    if done.logprobs is not None:
        offsets = [0]
        for word in done.spelled:
            offsets.append(offsets[-1] + len(word))
        choice["logprobs"] = {
            "tokens": list(done.spelled), "token_logprobs": list(done.logprobs),
            "top_logprobs": None, "text_offset": offsets[:-1],
        }  # fmt: skip
    if request.return_token_ids:
        choice |= {"token_ids": list(done.tokens), "prompt_token_ids": list(done.prompt)}
    if done.prompt_logprobs is not None:
        told = zip(done.prompt[1:], done.prompt_logprobs, strict=True)
        choice["prompt_logprobs"] = [None, *({str(token): {"logprob": value}} for token, value in told)]
    usage = {
        "prompt_tokens": done.usage.prompt_tokens,
        "completion_tokens": done.usage.completion_tokens,
        "total_tokens": (done.usage.prompt_tokens or 0) + (done.usage.completion_tokens or 0),
    }
    head = {"id": name, "object": "text_completion", "created": int(time.time()), "model": request.model}
    return {**head, "choices": [choice], "usage": usage}


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of ``work``, which is cancelled when the client goes away first.

    Raises:
        ClientDisconnect: it did.
    """

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    doing, leaving = asyncio.create_task(work), asyncio.create_task(gone())
    try:
        await asyncio.wait({doing, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not doing.done():
            raise ClientDisconnect
        return doing.result()
    finally:
        for task in (doing, leaving):
            task.cancel()
        await asyncio.gather(doing, leaving, return_exceptions=True)
