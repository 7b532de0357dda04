"""The OpenAI-compatible server as a FastAPI application over a backend.

    /v1/chat/completions, /v1/models, /health                              of every backend
    /v1/completions, /tokenize, /detokenize, /update_weights_from_disk     of one with tokens
    /v1/embeddings, /metrics, /version, /openapi.json

Bodies are read here, no further than allowed, before anything parses them.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from typing import TypeVar

import fastapi
import pydantic
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

import m3kernels
from m3.serve import metrics, openapi
from m3.serve.answers import Answer
from m3.serve.backend import ChatBackend, CountedBackend, TokenBackend
from m3.serve.chat import ChatShape
from m3.serve.chat_schema import ChatRequest
from m3.serve.embeddings import EmbeddingRequest, embedding_models, embeddings
from m3.serve.gate import Gate, Serving, known, refused, unknown_model
from m3.serve.schema import ModelCard, RequestError, read_as
from m3.serve.security import Keys, Limits, read_body
from m3.serve.token_routes import add_token_routes

Body = TypeVar("Body", bound=pydantic.BaseModel)


def build(
    backend: ChatBackend,
    *,
    api_keys: Sequence[str] = (),
    limits: Limits | None = None,
    cors: Sequence[str] = (),
    page: bool = False,
) -> fastapi.FastAPI:
    """The application; ``app.state.serving`` (gate.Serving) ends it.

    Args:
        api_keys: one of them must be sent as a bearer token, but for /health, the page and the schema; none: anything
            goes.
        limits: of what a client may ask for.
        cors: origins whose pages may ask; none: no other origin's.
        page: serve the page for a consultation at /.
    """
    limits = limits or Limits()
    counters = metrics.Metrics(backend if isinstance(backend, CountedBackend) else None)
    serving = Serving(Keys(api_keys), limits, counters)

    @contextlib.asynccontextmanager
    async def lifespan(app: fastapi.FastAPI) -> AsyncIterator[None]:
        async with backend.lifespan():
            yield

    app = fastapi.FastAPI(
        title="m3 serve",
        version=m3kernels.__version__,
        description="OpenAI's API over an engine or over patients. Research software: not a medical device.",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        lifespan=lifespan,
        exception_handlers={RequestError: _refused, HTTPException: _no_route, ClientDisconnect: _gone},
    )
    app.state.serving = serving
    _add_models(app, backend)
    _add_health(app, backend, serving)

    async def read(kind: type[Body], request: Request) -> Body:
        return read_as(kind, await read_body(request, limits))

    @app.post("/v1/chat/completions", **openapi.posted(ChatRequest, openapi.ChatCompletion, streams=True))
    async def chat(request: Request) -> Response:
        """The next message of a conversation."""
        asked = await read(ChatRequest, request)
        if len(asked.messages) > limits.messages:
            raise RequestError(400, f"messages: want at most {limits.messages}", param="messages")
        limits.check_answers(asked.n)
        exchange = known(request, backend.models(), asked.model)
        return Answer(asked, backend.stream(asked), ChatShape(asked), exchange, serving.ending)

    @app.post("/v1/embeddings", **openapi.posted(EmbeddingRequest, openapi.Embeddings))
    async def embed(request: Request) -> Response:
        """A vector for each text."""
        return JSONResponse(await embeddings(backend, await read(EmbeddingRequest, request)))

    @app.get("/metrics", response_class=Response, responses=openapi.METRICS)
    async def told() -> Response:
        """What Prometheus reads."""
        return Response(counters.text(), media_type=metrics.CONTENT_TYPE)

    if isinstance(backend, TokenBackend):
        add_token_routes(app, backend, backend.models, read, limits, serving)
    if page:
        from m3.serve.page import router

        app.include_router(router())
    app.add_middleware(Gate, serving=serving)
    if cors:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(cors),
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type", "X-Request-Id"],
            expose_headers=["X-Request-Id"],
        )
    openapi.describe(app, with_keys=bool(api_keys))
    return app


def _add_models(app: fastapi.FastAPI, backend: ChatBackend) -> None:
    started = int(time.time())

    def names() -> list[str]:
        return [*backend.models(), *embedding_models(backend)]

    @app.get("/v1/models", responses=openapi.got())
    async def models() -> openapi.ModelList:
        """What can be asked."""
        return openapi.ModelList(data=[ModelCard(id=name, created=started) for name in names()])

    @app.get("/v1/models/{name:path}", responses=openapi.got(404))
    async def model(name: str) -> ModelCard:
        """One of them."""
        if name not in names():
            raise unknown_model()
        return ModelCard(id=name, created=started)


def _add_health(app: fastapi.FastAPI, backend: ChatBackend, serving: Serving) -> None:
    def state() -> JSONResponse:
        told = "shutting down" if serving.draining else backend.failure()
        return JSONResponse({"status": told or "ok"}, 503 if told else 200)

    @app.get("/health", responses=openapi.HEALTH)
    async def health() -> openapi.Status:
        """Alive, and ready for requests."""
        return state()  # type: ignore[return-value]

    @app.get("/health/ready", responses=openapi.HEALTH)
    async def ready() -> openapi.Status:
        """Ready for requests: not while the model fails, or the server ends."""
        return state()  # type: ignore[return-value]

    @app.get("/health/live")
    async def live() -> openapi.Status:
        """The process answers."""
        return openapi.Status(status="ok")

    @app.get("/version")
    async def version() -> openapi.Version:
        """Of this software."""
        return openapi.Version(version=m3kernels.__version__)


# -- what is not answered ---------------------------------------------------------------------------------------------
async def _refused(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestError)
    request.state.exchange.outcome = error.code
    return refused(error)


async def _gone(request: Request, error: Exception) -> JSONResponse:
    """The client left while it sent its request: nobody reads this."""
    request.state.exchange.outcome = "client gone"
    return refused(RequestError(400, "body: want all of it"))


async def _no_route(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    code = {404: "unknown_url", 405: "method_not_allowed"}.get(error.status_code)
    return refused(RequestError(error.status_code, str(error.detail), code=code, headers=dict(error.headers or {})))
