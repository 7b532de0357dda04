"""A chat API of a script for tests of the consult page: OpenAI's wire format, at a pace that is seen."""

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


class ScriptedServer:
    """The page, and the API of ``script``, which each test sets anew."""

    def __init__(self) -> None:
        self.script = Script()
        self.app = FastAPI()
        self.app.include_router(router())
        self.app.get("/v1/models")(self._models)
        self.app.post("/v1/chat/completions")(self._complete)

    def _refusal(self, request: Request) -> Response | None:
        script, sent = self.script, request.headers.get("authorization", "")
        script.keys.append(sent)
        status = 401 if script.key and sent != f"Bearer {script.key}" else script.status
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
        self.script.requests.append(await request.json())
        return StreamingResponse(_events(self.script), media_type="text/event-stream")


async def _events(script: Script) -> AsyncIterator[str]:
    try:
        for one in script.chunks:
            yield f"data: {json.dumps(one)}\n\n"
            await asyncio.sleep(script.pause)
        if script.hangs:
            await asyncio.sleep(60)
        yield "data: [DONE]\n\n"
    except (asyncio.CancelledError, GeneratorExit):
        script.closed.set()
        raise


def chunk(
    text: str = "", finish: str | None = None, *, usage: tuple[int, int, int] | None = None, **delta: str
) -> dict:
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
