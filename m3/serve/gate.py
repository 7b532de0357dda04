"""The door of the server: every request passes it, gets an id, and is let in or refused; every answer is counted here.

id -> is the server ending? -> key -> rate -> room -> the application -> a line in the log, a count in the metrics
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import math
import re
import time
import uuid
from collections import Counter
from collections.abc import MutableMapping, Sequence
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from m3.rollout.chat import Usage
from m3.serve.backend import Delta
from m3.serve.logs import failure, log
from m3.serve.metrics import Metrics
from m3.serve.schema import RequestError
from m3.serve.security import Bucket, Keys, Limits, is_open

REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
ALWAYS = ("/health", "/health/live", "/health/ready", "/metrics")  # answered also while the server ends


@dataclasses.dataclass(kw_only=True)
class Exchange:
    """One request and its answer, in numbers."""

    id: str
    method: str
    metrics: Metrics
    scope: Scope
    started: float = dataclasses.field(default_factory=time.monotonic)
    key: int | None = None
    model: str | None = None
    status: int = 0
    outcome: str | None = None
    first: float | None = None  # seconds until the first piece
    usage: Usage | None = None
    _last: float = 0.0
    _drawn: Counter[int] = dataclasses.field(default_factory=Counter)

    @property
    def path(self) -> str:
        """Of the route, not what the client wrote."""
        return getattr(self.scope.get("route"), "path", "unknown")

    def see(self, delta: Delta) -> None:
        """A piece of the answer came."""
        now = time.monotonic()
        if self.first is None:
            self.first = now - self.started
            self.metrics.first.labels(self.path).observe(self.first)
        told = delta.usage.completion_tokens if delta.usage is not None else None
        count = 1 if told is None else max(0, told - self._drawn[delta.index])
        self._drawn[delta.index] += count
        if self._last and count:
            for _ in range(count):
                self.metrics.between.labels(self.path).observe((now - self._last) / count)
        self._last = now

    def close(self) -> None:
        """It is over: count it, and write a line."""
        seconds = time.monotonic() - self.started
        if self.status:
            self.metrics.requests.labels(self.path, str(self.status)).inc()
            self.metrics.whole.labels(self.path).observe(seconds)
        if self.outcome == "client gone":
            self.metrics.left.labels(self.path).inc()
        usage = self.usage or Usage()
        self.metrics.prompt.inc(usage.prompt_tokens or 0)
        self.metrics.cached.inc(usage.cached_tokens or 0)
        self.metrics.generated.inc(usage.completion_tokens or 0)
        log(
            "request", request_id=self.id, method=self.method, path=self.path, status=self.status or None,
            outcome=self.outcome, model=self.model, key=self.key, seconds=round(seconds, 4),
            first_seconds=None if self.first is None else round(self.first, 4),
            prompt_tokens=usage.prompt_tokens, completion_tokens=usage.completion_tokens,
            cached_tokens=usage.cached_tokens,
        )  # fmt: skip


class Serving:
    """The state of one server: who is inside, and whether it ends.

    drain(): nobody new is let in. end(): who is inside is sent away; streams with an error and [DONE].
    """

    def __init__(self, keys: Keys, limits: Limits, metrics: Metrics) -> None:
        self.keys, self.limits, self.metrics = keys, limits, metrics
        self.draining = False
        self.ending = asyncio.Event()
        self.under_way = 0
        self._of_key: Counter[int | None] = Counter()
        self._buckets: dict[int | None, Bucket] = {}

    def drain(self) -> None:
        self.draining = True

    def end(self) -> None:
        self.draining = True
        self.ending.set()

    def check(self, path: str, headers: Headers, exchange: Exchange) -> None:
        """Raises RequestError: 503: the server ends; 401: no key of ours; 429: too many a minute."""
        if self.draining and path not in ALWAYS:
            gone = {"Connection": "close", "Retry-After": "5"}
            raise RequestError(503, "the server is shutting down", code="shutting_down", headers=gone)
        if not self.keys or is_open(path):
            return
        exchange.key = self.keys.find(headers.get("authorization", ""))
        if exchange.key is None:
            want = {"WWW-Authenticate": "Bearer"}
            raise RequestError(401, "want a valid API key as a bearer token", code="invalid_api_key", headers=want)

    def enter(self, key: int | None) -> None:
        """Let one in who asks for work. Raises RequestError: 429: too many a minute, or at once."""
        limits = self.limits
        if self.under_way >= limits.at_once or self._of_key[key] >= limits.at_once_a_key:
            wait = {"Retry-After": "1"}
            raise RequestError(429, "too many requests at once", code="rate_limit_exceeded", headers=wait)
        if limits.a_minute is not None:
            wait_for = self._buckets.setdefault(key, Bucket(limits.a_minute)).take()
            if wait_for:
                wait = {"Retry-After": str(math.ceil(wait_for))}
                want = f"want at most {limits.a_minute} requests a minute"
                raise RequestError(429, want, code="rate_limit_exceeded", headers=wait)
        self.under_way += 1
        self._of_key[key] += 1
        self.metrics.under_way.set(self.under_way)

    def leave(self, key: int | None) -> None:
        self.under_way -= 1
        self._of_key[key] -= 1
        self.metrics.under_way.set(self.under_way)


class Gate:
    """ASGI middleware around the application."""

    def __init__(self, app: ASGIApp, serving: Serving) -> None:
        self._app, self._serving = app, serving

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        sent = headers.get("x-request-id", "")
        exchange = Exchange(
            id=sent if REQUEST_ID.fullmatch(sent) else uuid.uuid4().hex,
            method=scope["method"] if scope["method"] in ("GET", "POST", "HEAD", "OPTIONS") else "other",
            metrics=self._serving.metrics,
            scope=scope,
        )
        scope.setdefault("state", {})["exchange"] = exchange

        async def named(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                exchange.status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = exchange.id
            await send(message)

        try:
            await self._pass(scope, receive, named, headers, exchange)
        except RequestError as error:
            exchange.outcome = exchange.outcome or error.code
            if not exchange.status:  # else the answer is cut short: its status is told
                await refused(error)(scope, receive, named)
        finally:
            exchange.close()

    async def _pass(self, scope: Scope, receive: Receive, send: Send, headers: Headers, exchange: Exchange) -> None:
        self._serving.check(scope["path"], headers, exchange)
        works = scope["method"] == "POST" and not is_open(scope["path"])
        if works:
            self._serving.enter(exchange.key)
        try:
            await self._app(scope, receive, send)
        except RequestError:
            raise
        except Exception as error:
            log("failed", level=logging.ERROR, request_id=exchange.id, **failure(error))
            name = type(error).__name__
            raise RequestError(500, f"the server failed ({name}); id {exchange.id}", code="internal_error") from error
        finally:
            if works:
                self._serving.leave(exchange.key)


def refused(error: RequestError) -> JSONResponse:
    """The answer to a request that is not served."""
    return JSONResponse(error.to_json(), error.status, headers=error.headers)


def unknown_model() -> RequestError:
    return RequestError(404, "model: want one of GET /v1/models", param="model", code="model_not_found")


def known(request: Request, models: Sequence[str], name: str) -> Exchange:
    """The exchange of a request whose model is known, and is named in the log from now on; else RequestError 404."""
    exchange: Exchange = request.state.exchange
    if name not in models:
        raise unknown_model()
    exchange.model = name
    return exchange
