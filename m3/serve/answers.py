"""Sends an answer: the deltas of a backend as one JSON body, or as server-sent events. Chats and completions differ in
how their rows look (Shape), and in nothing else.

The status is told with the first delta. A client that goes away ends its work. When the server ends, so do answers:
with 503, or, where the status is told, with an error as an event and [DONE].
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncGenerator, Coroutine, Iterator
from typing import Any, Protocol, TypeVar

from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from m3.rollout.chat import Usage
from m3.serve.backend import Delta
from m3.serve.gate import Exchange, refused
from m3.serve.logs import failure, log
from m3.serve.schema import RequestError, Sampling

Result = TypeVar("Result")
EVENTS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]


class Shape(Protocol):
    """How an endpoint writes answers."""

    def chunks(self, delta: Delta) -> Iterator[dict[str, Any]]:
        """The rows of a stream that a delta becomes."""
        ...

    def usage_chunk(self) -> dict[str, Any]:
        """A row without a choice."""
        ...

    def add(self, delta: Delta) -> None:
        """For whole()."""

    def whole(self) -> dict[str, Any]:
        """All that was added."""
        ...


class Answer(Response):
    """The response to one request.

    Args:
        deltas: of the backend; not begun. shape: of the rows. exchange: to be told what comes.
        ending: set when the server ends.
    """

    def __init__(
        self,
        request: Sampling,
        deltas: AsyncGenerator[Delta],
        shape: Shape,
        exchange: Exchange,
        ending: asyncio.Event,
    ) -> None:
        super().__init__()
        self._request, self._source, self._shape = request, deltas, shape
        self._exchange, self._ending = exchange, ending
        self._usage = UsageSum(request.n)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = self._exchange
        try:
            await unless_gone(receive, self._answer(scope, receive, send), self._ending)
            exchange.outcome = exchange.outcome or "answered"
        except ClientDisconnect:
            exchange.outcome = "client gone"
        except RequestError as error:
            exchange.outcome = error.code or "refused"
            if not exchange.status:
                await refused(error)(scope, receive, send)
            else:
                await _send(send, _event(error.to_json()) + _event("[DONE]"), last=True)
        finally:
            exchange.usage = self._usage.total()

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with contextlib.aclosing(self._deltas()) as deltas:
            first = await anext(deltas)
            if self._request.stream:
                await self._send_events(first, deltas, send)
            else:
                await self._send_whole(first, deltas, scope, receive, send)

    async def _deltas(self) -> AsyncGenerator[Delta]:
        """The backend's. A mistake of ours becomes a status; its place goes to the log, its words, which may quote the
        request, nowhere."""
        try:
            async with contextlib.aclosing(self._source) as deltas:
                async for delta in deltas:
                    self._exchange.see(delta)
                    self._usage.add(delta)
                    yield delta
        except RequestError:
            raise
        except Exception as error:
            name = self._exchange.id
            log("failed", level=logging.ERROR, request_id=name, **failure(error))
            told = f"the server failed ({type(error).__name__}); id {name}"
            raise RequestError(500, told, code="internal_error") from error

    async def _send_whole(
        self, first: Delta, deltas: AsyncGenerator[Delta], scope: Scope, receive: Receive, send: Send
    ) -> None:
        self._shape.add(first)
        async for delta in deltas:
            self._shape.add(delta)
        body = {**self._shape.whole(), "usage": self._usage.to_json()}
        await JSONResponse(body)(scope, receive, send)

    async def _send_events(self, first: Delta, deltas: AsyncGenerator[Delta], send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": EVENTS})
        await self._send_delta(first, send)
        async for delta in deltas:
            await self._send_delta(delta, send)
        last = b""
        if self._request.tells_usage:
            last = _event({**self._shape.usage_chunk(), "usage": self._usage.to_json()})
        await _send(send, last + _event("[DONE]"), last=True)

    async def _send_delta(self, delta: Delta, send: Send) -> None:
        usage: dict[str, Any] = {}
        if self._request.tells_usage:
            usage = {"usage": self._usage.to_json() if self._request.keeps_telling_usage else None}
        events = b"".join(_event({**row, **usage}) for row in self._shape.chunks(delta))
        if events:
            await _send(send, events)


class UsageSum:
    """The tokens of all answers to a request: each prompt counts once, however many answers it has."""

    def __init__(self, n: int) -> None:
        self._n = n
        self._of: dict[int, Usage] = {}

    def add(self, delta: Delta) -> None:
        if delta.usage is not None:
            self._of[delta.index] = delta.usage

    def total(self) -> Usage | None:
        """None where the backend does not tell."""
        prompts: dict[int, Usage] = {}
        for index in sorted(self._of):
            prompts.setdefault(index // self._n, self._of[index])
        if not prompts:
            return None
        asked, said = list(prompts.values()), list(self._of.values())
        return Usage(
            prompt_tokens=_sum(each.prompt_tokens for each in asked),
            completion_tokens=_sum(each.completion_tokens for each in said),
            cached_tokens=_sum(each.cached_tokens for each in asked),
            reasoning_tokens=_sum(each.reasoning_tokens for each in said),
            accepted_tokens=_sum(each.accepted_tokens for each in said),
            rejected_tokens=_sum(each.rejected_tokens for each in said),
        )

    def to_json(self) -> dict[str, Any] | None:
        """As OpenAI tells it; what is not known is left out."""
        usage = self.total()
        if usage is None or usage.prompt_tokens is None or usage.completion_tokens is None:
            return None
        row: dict[str, Any] = {
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        }
        if usage.cached_tokens is not None:
            row["prompt_tokens_details"] = {"cached_tokens": usage.cached_tokens}
        details = {
            "reasoning_tokens": usage.reasoning_tokens,
            "accepted_prediction_tokens": usage.accepted_tokens,
            "rejected_prediction_tokens": usage.rejected_tokens,
        }
        if any(value is not None for value in details.values()):
            row["completion_tokens_details"] = {name: value for name, value in details.items() if value is not None}
        return row


def _sum(counts: Iterator[int | None]) -> int | None:
    known = [count for count in counts if count is not None]
    return sum(known) if known else None


def _event(row: dict[str, Any] | str) -> bytes:
    text = row if isinstance(row, str) else json.dumps(row, ensure_ascii=False, separators=(",", ":"))
    return f"data: {text}\n\n".encode()


async def _send(send: Send, body: bytes, *, last: bool = False) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": not last})


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, Result], ending: asyncio.Event) -> Result:
    """The result of ``work``, which is cancelled when the client goes away first, or the server ends.

    Raises:
        ClientDisconnect: the client went.
        RequestError: 503: the server ended.
    """

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    doing, leaving = asyncio.create_task(work), asyncio.create_task(gone())
    over = asyncio.create_task(ending.wait())
    try:
        await asyncio.wait({doing, leaving, over}, return_when=asyncio.FIRST_COMPLETED)
        if doing.done():
            return doing.result()
        if leaving.done():
            raise ClientDisconnect
        raise RequestError(503, "the server is shutting down", code="shutting_down")
    finally:
        for task in (doing, leaving, over):
            task.cancel()
        await asyncio.gather(doing, leaving, over, return_exceptions=True)
