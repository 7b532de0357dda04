"""The OpenAI-compatible server as an ASGI application over a backend: /v1/models, /v1/chat/completions, /health.

A backend of tokens has /v1/completions too (completions.py).

A backend answers in deltas; what is streamed and what is sent whole differ only here. A client that goes away cancels
its work. Logs tell counts and times of a request, never what it says.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hmac
import json
import logging
import time
import traceback
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Any, Protocol

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from m3.rollout.chat import Usage
from m3.serve.completions import TokenBackend, unless_gone
from m3.serve.completions import routes as token_routes
from m3.serve.schema import ChatRequest, RequestError, read_request

LOG = logging.getLogger("m3.serve")
MAX_BODY = 4 * 2**20  # bytes; ours: a conversation of a million tokens is not served


@dataclasses.dataclass(frozen=True, kw_only=True)
class Delta:
    """More of an answer; the last one has a finish_reason ("stop" or "length") and, where it is known, the usage."""

    text: str
    finish_reason: str | None = None
    usage: Usage | None = None


class ChatBackend(Protocol):
    """Who answers."""

    def models(self) -> Sequence[str]:
        """Names of what can be asked, in order."""

    def failure(self) -> str | None:
        """Why nothing can be answered now; None: it can."""

    def lifespan(self) -> contextlib.AbstractAsyncContextManager[None]:
        """Entered before the first request, left after the last."""
        ...

    def stream(self, request: ChatRequest) -> AsyncGenerator[Delta]:
        """The answer; closing it stops the work. ``request.model`` is one of models().

        Raises:
            RequestError: with the status and the message for the client.
        """
        ...


def build(backend: ChatBackend, *, api_key: str | None = None, max_body: int = MAX_BODY) -> Starlette:
    """The application.

    Args:
        api_key: what clients must send as a bearer token under /v1; None: anything goes.
        max_body: bytes of a request; more is refused with 413.
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with backend.lifespan():
            yield

    started = int(time.time())

    async def models(request: Request) -> JSONResponse:
        _check_key(request, api_key)
        rows = [{"id": name, "object": "model", "created": started, "owned_by": "m3"} for name in backend.models()]
        return JSONResponse({"object": "list", "data": rows})

    async def model(request: Request) -> JSONResponse:
        _check_key(request, api_key)
        name = request.path_params["name"]
        _check_model(backend, name)
        return JSONResponse({"id": name, "object": "model", "created": started, "owned_by": "m3"})

    async def health(request: Request) -> JSONResponse:
        failure = backend.failure()
        return JSONResponse({"status": "ok"} if failure is None else {"status": failure}, 200 if not failure else 503)

    async def completions(request: Request) -> ChatResponse:
        _check_key(request, api_key)
        asked = read_request(await _body(request, max_body))
        _check_model(backend, asked.model)
        return ChatResponse(backend, asked)

    async def body(request: Request) -> bytes:
        _check_key(request, api_key)
        return await _body(request, max_body)

    return Starlette(
        routes=[
            Route("/v1/models", models),
            Route("/v1/models/{name:path}", model),
            Route("/v1/chat/completions", completions, methods=["POST"]),
            Route("/health", health),
            *(token_routes(backend, body) if isinstance(backend, TokenBackend) else ()),
        ],
        exception_handlers={RequestError: _refused, HTTPException: _no_route, ClientDisconnect: _gone},
        lifespan=lifespan,
    )


# -- one answer -------------------------------------------------------------------------------------------------------
class ChatResponse:
    """Sends the answer to one request, whole or as server-sent events. The status is told with the first delta."""

    def __init__(self, backend: ChatBackend, request: ChatRequest) -> None:
        self._backend, self._request = backend, request
        self._id = f"chatcmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._started = time.monotonic()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_gone(receive, self._answer(scope, receive, send))
        except ClientDisconnect:
            self._log("client gone")

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with contextlib.aclosing(self._deltas()) as deltas:
            try:
                first = await anext(deltas)
                if self._request.stream:
                    usage = await self._send_events(first, deltas, send)
                else:
                    usage = await self._send_whole(first, deltas, scope, receive, send)
            except RequestError as error:
                self._log(f"status {error.status}")
                await JSONResponse(error.to_json(), error.status)(scope, receive, send)
            else:
                self._log("answered", usage)

    async def _deltas(self) -> AsyncGenerator[Delta]:
        """The backend's. A mistake of ours becomes a status; its place goes to the log, its words, which may quote the
        request, nowhere."""
        try:
            async with contextlib.aclosing(self._backend.stream(self._request)) as deltas:
                async for delta in deltas:
                    yield delta
        except RequestError:
            raise
        except Exception as error:
            place = "".join(traceback.format_tb(error.__traceback__))
            LOG.error("%s: %s\n%s", self._id, type(error).__name__, place)
            raise RequestError(500, f"the server failed ({type(error).__name__}); id {self._id}") from error

    async def _send_whole(
        self, first: Delta, deltas: AsyncGenerator[Delta], scope: Scope, receive: Receive, send: Send
    ) -> Usage | None:
        pieces = [first]
        async for delta in deltas:
            pieces.append(delta)
        usage = pieces[-1].usage
        message = {"role": "assistant", "content": "".join(piece.text for piece in pieces), "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": pieces[-1].finish_reason}
        body = {**self._head("chat.completion"), "choices": [choice], "usage": _usage(usage)}
        await JSONResponse(body)(scope, receive, send)
        return usage

    async def _send_events(self, first: Delta, deltas: AsyncGenerator[Delta], send: Send) -> Usage | None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        asked_usage = self._request.stream_options is not None and self._request.stream_options.include_usage

        async def event(row: dict[str, Any] | str) -> None:
            text = row if isinstance(row, str) else json.dumps(row, ensure_ascii=False, separators=(",", ":"))
            await send({"type": "http.response.body", "body": f"data: {text}\n\n".encode(), "more_body": True})

        def chunk(delta: dict[str, str], finish_reason: str | None = None) -> dict[str, Any]:
            choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
            row = {**self._head("chat.completion.chunk"), "choices": [choice]}
            return {**row, "usage": None} if asked_usage else row

        last = first
        try:
            await event(chunk({"role": "assistant", "content": first.text}))
            async for last in deltas:
                if last.text:
                    await event(chunk({"content": last.text}))
            await event(chunk({}, last.finish_reason))
            if asked_usage:
                await event({**self._head("chat.completion.chunk"), "choices": [], "usage": _usage(last.usage)})
            await event("[DONE]")
        except RequestError as error:  # the status is sent: the error is an event
            self._log(f"status {error.status} under way")
            await event(error.to_json())
        await send({"type": "http.response.body", "body": b"", "more_body": False})
        return last.usage

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._request.model}

    def _log(self, what: str, usage: Usage | None = None) -> None:
        tokens = "" if usage is None else f", {usage.prompt_tokens} + {usage.completion_tokens} tokens"
        seconds = time.monotonic() - self._started
        LOG.info("%s: %s: %s in %.2f s%s", self._id, self._request.model, what, seconds, tokens)


def _usage(usage: Usage | None) -> dict[str, Any] | None:
    """As OpenAI tells it; what is not known is left out."""
    if usage is None or usage.prompt_tokens is None or usage.completion_tokens is None:
        return None
    row: dict[str, Any] = {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }
    if usage.cached_tokens is not None:
        row["prompt_tokens_details"] = {"cached_tokens": usage.cached_tokens}
    return row


# -- before the backend -----------------------------------------------------------------------------------------------
def _check_key(request: Request, api_key: str | None) -> None:
    if api_key is None:
        return
    kind, _, sent = request.headers.get("authorization", "").partition(" ")
    if kind.lower() != "bearer" or not hmac.compare_digest(sent.strip().encode(), api_key.encode()):
        raise RequestError(401, "want a valid API key as a bearer token", code="invalid_api_key")


def _check_model(backend: ChatBackend, name: str) -> None:
    if name not in backend.models():
        raise RequestError(404, "model: want one of GET /v1/models", param="model", code="model_not_found")


async def _body(request: Request, most: int) -> bytes:
    """The body, read no further than allowed."""
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > most:
            raise RequestError(413, f"body: want at most {most} bytes", code="request_too_large")
    return bytes(body)


async def _refused(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestError)
    LOG.info("%s: status %d", request.url.path, error.status)
    return JSONResponse(error.to_json(), error.status)


async def _gone(request: Request, error: Exception) -> JSONResponse:
    """The client left while it sent its request: nobody reads this."""
    return JSONResponse(RequestError(400, "body: want all of it").to_json(), 400)


async def _no_route(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    known = RequestError(error.status_code, str(error.detail), code="unknown_url")
    return JSONResponse(known.to_json(), error.status_code, headers=error.headers)
