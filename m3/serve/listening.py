"""The process that serves: uvicorn, with an end that finishes its answers, and no patience with slow heads.

SIGTERM or SIGINT: /health/ready says 503 at once, new requests get 503, answers under way go on for ``grace`` seconds;
then those that are left end with an error, and so does the process. A second signal is the end of patience.
"""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import socket
import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import fastapi
import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from m3.serve.gate import Serving
from m3.serve.logs import log
from m3.serve.schema import RequestError

LAST_WORDS = 2  # seconds for answers that are ended to say so


class Server(uvicorn.Server):
    """Calls ``started(server)`` when it listens."""

    def __init__(self, config: uvicorn.Config, serving: Serving, grace: float, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._serving, self._grace, self._ready = serving, grace, ready
        self._asked: float | None = None  # when it was asked to end
        self.signal: int | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._asked is None:
            self._asked, self.signal = time.monotonic(), sig
            self._serving.drain()
            return
        self._serving.end()
        self.should_exit = True

    async def on_tick(self, counter: int) -> bool:
        if self._asked is not None:
            over = time.monotonic() - self._asked >= self._grace
            if over:
                self._serving.end()
            self.should_exit = over or not self._serving.under_way
        return await super().on_tick(counter)


class Protocol(H11Protocol):
    """HTTP/1.1 whose errors are OpenAI's, and whose heads must come in time. ``head_seconds`` is set by ``serve``."""

    head_seconds = 15.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._waiting: asyncio.TimerHandle | None = None  # for a head

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._wait()
        super().data_received(data)
        if not self._between_requests():
            self._stop_waiting()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._wait()

    def _between_requests(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _wait(self) -> None:
        if self._waiting is None and self._between_requests():
            self._waiting = self.loop.call_later(self.head_seconds, self._give_up)

    def _stop_waiting(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None

    def _give_up(self) -> None:
        self._waiting = None
        if self._between_requests() and not self.transport.is_closing():
            self.transport.close()

    def send_400_response(self, msg: str) -> None:
        """A head that is no HTTP, or too long (431)."""
        error = sys.exc_info()[1]
        long = isinstance(error, h11.RemoteProtocolError) and error.error_status_hint == 431
        status, told = (431, "header: want a shorter one") if long else (400, "want HTTP/1.1")
        body = json.dumps(RequestError(status, told, code="invalid_http").to_json()).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
        ]
        for event in (h11.Response(status_code=status, headers=headers), h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event))
        self.transport.close()


def serve(
    app: fastapi.FastAPI, host: str, port: int, *, grace: float = 30.0, ready: Callable[[str], None] = lambda url: None
) -> int | None:
    """Serve until a signal, whose number is returned; None: it could not start.

    Args:
        port: 0: any that is free. grace: seconds for answers under way. ready: called with the URL when it listens.

    Raises:
        OSError: nothing can listen there.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    serving: Serving = app.state.serving
    limits = serving.limits
    head_seconds = limits.header_seconds
    with socket.create_server((host, port), family=family) as listener:
        shown = f"[{host}]" if family == socket.AF_INET6 else host
        url = f"http://{shown}:{listener.getsockname()[1]}/v1"
        config = uvicorn.Config(
            app,
            http=type("Protocol", (Protocol,), {"head_seconds": head_seconds}),
            ws="none",
            h11_max_incomplete_event_size=limits.header_bytes,
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=LAST_WORDS,
        )
        server = Server(config, serving, grace, lambda: ready(url))
        signal.signal(signal.SIGTERM, lambda number, frame: None)  # one that comes after the end means nothing more
        server.run(sockets=[listener])
        log("ended", level=logging.INFO, signal=server.signal)
    return server.signal if server.started else None
