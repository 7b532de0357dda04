"""The endpoints of a backend with tokens: completions, tokenize and detokenize, new weights."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import fastapi
from starlette.requests import Request
from starlette.responses import Response

from m3.serve import openapi
from m3.serve.answers import Answer
from m3.serve.backend import TokenBackend
from m3.serve.completions import CompletionShape
from m3.serve.gate import Serving, known
from m3.serve.security import Limits
from m3.serve.token_schema import CompletionRequest, DetokenizeRequest, TokenizeRequest, WeightsRequest


def add_token_routes(
    app: fastapi.FastAPI,
    backend: TokenBackend,
    models: Callable[[], Any],
    read: Callable[[Any, Request], Awaitable[Any]],
    limits: Limits,
    serving: Serving,
) -> None:
    """Add them. ``read(kind, request)`` reads a body; ``models()`` are the names of what can be asked."""

    @app.post("/v1/completions", **openapi.posted(CompletionRequest, openapi.Completion, streams=True))
    async def completions(request: Request) -> Response:
        """The continuation of prompts, which are text or tokens."""
        asked: CompletionRequest = await read(CompletionRequest, request)
        limits.check_answers(asked.n, len(asked.prompts))
        exchange = known(request, models(), asked.model)
        return Answer(asked, backend.complete(asked), CompletionShape(asked), exchange, serving.ending)

    @app.post("/tokenize", **openapi.posted(TokenizeRequest))
    async def tokenize(request: Request) -> openapi.Tokenized:
        """The tokens of a text or of a conversation."""
        asked: TokenizeRequest = await read(TokenizeRequest, request)
        known(request, models(), models()[0] if asked.model is None else asked.model)
        tokens = list(await backend.tokenize(asked))
        spelled = [backend.spell(token).text for token in tokens] if asked.return_token_strs else None
        return openapi.Tokenized(
            count=len(tokens), max_model_len=backend.max_context, tokens=tokens, token_strs=spelled
        )

    @app.post("/detokenize", **openapi.posted(DetokenizeRequest))
    async def detokenize(request: Request) -> openapi.Detokenized:
        """The text of tokens."""
        asked: DetokenizeRequest = await read(DetokenizeRequest, request)
        known(request, models(), models()[0] if asked.model is None else asked.model)
        return openapi.Detokenized(prompt=await backend.detokenize(asked))

    @app.post("/update_weights_from_disk", **openapi.posted(WeightsRequest, forbidden=True))
    async def update(request: Request) -> openapi.Updated:
        """New weights from a checkpoint on the server's disk, where that was allowed."""
        version = await backend.update(await read(WeightsRequest, request))
        return openapi.Updated(message=f"weights of version {version}")
