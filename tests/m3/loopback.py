"""Real HTTP servers on loopback for tests: an ASGI application under uvicorn on a thread, and a backend of a script."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import http.client
import json
import threading
import time
import urllib.parse
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from m3.rollout.chat import Usage
from m3.serve.backend import Delta
from m3.serve.chat_schema import ChatRequest
from m3.serve.schema import RequestError


@contextlib.contextmanager
def serving(app: ASGIApp) -> Iterator[str]:
    """The base URL, ending in /v1, of an application that is served while the block runs."""
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning", timeout_graceful_shutdown=2)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        until(lambda: server.started or not thread.is_alive())
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive(), "the server ends"


def until(condition: Callable[[], bool]) -> None:
    """Wait for what another thread does."""
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "it happens"
        time.sleep(0.005)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Got:
    """A response as it came."""

    status: int
    content_type: str
    text: str

    def json(self) -> Any:
        return json.loads(self.text)


def ask(
    url: str, body: bytes | str | Iterable[bytes] | None = None, *, key: str | None = None, method: str | None = None
) -> Got:
    """One raw request: GET, or POST where there is a body."""
    parts = urllib.parse.urlsplit(url)
    connection = http.client.HTTPConnection(parts.netloc, timeout=20)
    headers = {} if key is None else {"Authorization": f"Bearer {key}".encode()}
    try:
        connection.request(method or ("GET" if body is None else "POST"), parts.path, body, headers)
        response = connection.getresponse()
        text = response.read().decode()
        return Got(status=response.status, content_type=response.headers["content-type"], text=text)
    finally:
        connection.close()


class Theirs:
    """A server that is not ours: ``answer`` makes its chat completions, and may be set anew by each test."""

    def __init__(self) -> None:
        self.answer: Callable[[Request], Awaitable[Response]] | None = None
        self.url = ""
        self.app = Starlette(routes=[Route("/v1/chat/completions", self._complete, methods=["POST"])])

    async def _complete(self, request: Request) -> Response:
        assert self.answer is not None
        return await self.answer(request)


def completion(text: str, **fields: object) -> JSONResponse:
    """A chat completion as OpenAI's servers send it."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    row = {"id": "x", "object": "chat.completion", "created": 1, "model": "theirs", "choices": [choice], **fields}
    return JSONResponse(row)


class EchoBackend:
    """Says the last message back, one word a delta. "hang": never ends; "fail", "refuse", "late": errors."""

    def __init__(self, names: Sequence[str] = ("echo",)) -> None:
        self.names = tuple(names)
        self.requests: list[ChatRequest] = []
        self.closed = threading.Event()  # a stream was closed before its end
        self.state: str | None = None

    def models(self) -> Sequence[str]:
        return self.names

    def failure(self) -> str | None:
        return self.state

    @contextlib.asynccontextmanager
    async def lifespan(self) -> AsyncIterator[None]:
        yield

    async def stream(self, request: ChatRequest) -> AsyncGenerator[Delta]:
        self.requests.append(request)
        text = request.plain()[-1]["content"]
        if request.response_format is not None and request.response_format.type == "json_schema":
            raise RequestError(400, "response_format: want text", param="response_format")
        if text == "refuse":
            raise RequestError(400, "messages: want something else", param="messages")
        if text.startswith("fail"):
            raise RuntimeError(text)
        try:
            words = text.split(" ")
            for n, word in enumerate(words):
                yield Delta(text=word if n == 0 else f" {word}")
            if text.endswith("hang"):
                await asyncio.sleep(60)
            if text.endswith("late"):
                raise RequestError(504, "the time of a request is over", code="timeout")
        except (asyncio.CancelledError, GeneratorExit):
            self.closed.set()
            raise
        usage = Usage(prompt_tokens=7, completion_tokens=len(words), cached_tokens=3)
        yield Delta(text="", finish_reason="stop", usage=usage)
