"""A chat API of a script for tests of the consult page: OpenAI's wire format, event by event, at a pace that is seen."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import threading
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from m3.serve.page import router


@dataclasses.dataclass(kw_only=True)
class Script:
    """What the next answers are. ``chunks``: events, told ``pause`` seconds apart; ``hangs``: no end after them.

    ``key``: what clients must send; ``status``: answers with this error. ``requests``: bodies that came.
    """

    chunks: Sequence[dict[str, Any]] = ()
    pause: float = 0.0
    hangs: bool = False
    key: str = ""
    status: int = 200
    requests: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    keys: list[str] = dataclasses.field(default_factory=list)
    closed: threading.Event = dataclasses.field(default_factory=threading.Event)  # a client left

    @property
    def app(self) -> FastAPI:
        """The page and the API."""
        app = FastAPI()
        app.include_router(router())
        app.get("/v1/models")(self._models)
        app.post("/v1/chat/completions")(self._complete)
        return app

    def _refusal(self, request: Request) -> Response | None:
        sent = request.headers.get("authorization", "")
        self.keys.append(sent)
        status = 401 if self.key and sent != f"Bearer {self.key}" else self.status
        if status == 200:
            return None
        return JSONResponse({"error": {"message": f"refused with {status}", "type": "x"}}, status)

    async def _models(self, request: Request) -> Response:
        rows = [{"id": name, "object": "model"} for name in ("first", "second")]
        return self._refusal(request) or JSONResponse({"object": "list", "data": rows})

    async def _complete(self, request: Request) -> Response:
        refusal = self._refusal(request)
        if refusal is not None:
            return refusal
        self.requests.append(await request.json())
        return StreamingResponse(self._events(), media_type="text/event-stream")

    async def _events(self) -> AsyncIterator[str]:
        try:
            for chunk in self.chunks:
                yield f"data: {json.dumps(chunk)}\n\n"
                await asyncio.sleep(self.pause)
            if self.hangs:
                await asyncio.sleep(60)
            yield "data: [DONE]\n\n"
        except (asyncio.CancelledError, GeneratorExit):
            self.closed.set()
            raise


def chunk(text: str = "", finish: str | None = None, *, usage: tuple[int, int, int] | None = None, **delta: str) -> dict:
    """An event. ``usage``: completion tokens, accepted, rejected."""
    row: dict[str, Any] = {"choices": [{"index": 0, "delta": {"content": text, **delta}, "finish_reason": finish}]}
    if usage is not None:
        tokens, accepted, rejected = usage
        details = {"accepted_prediction_tokens": accepted, "rejected_prediction_tokens": rejected}
        row["usage"] = {"prompt_tokens": 9, "completion_tokens": tokens, "completion_tokens_details": details}
    return row


def words(text: str) -> list[dict]:
    """An answer, a word an event, and its end."""
    return [*(chunk(f"{word} ") for word in text.split(" ")), chunk(finish="stop")]
