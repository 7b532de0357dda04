"""What /openapi.json says: bodies, answers, errors. Bodies are parsed by the endpoints; here they are described."""

from __future__ import annotations

from typing import Any, Literal

import fastapi
import pydantic
from fastapi.openapi.utils import get_openapi

from m3.serve.chat_schema import ChatRequest
from m3.serve.embeddings import EmbeddingRequest
from m3.serve.schema import ModelCard
from m3.serve.security import is_open
from m3.serve.token_schema import CompletionRequest, DetokenizeRequest, TokenizeRequest, WeightsRequest

BODIES = (
    ChatRequest, CompletionRequest, TokenizeRequest, DetokenizeRequest, EmbeddingRequest, WeightsRequest,
)  # fmt: skip
REF = "#/components/schemas/{model}"


class ErrorDetail(pydantic.BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class Error(pydantic.BaseModel):
    """OpenAI's error object."""

    error: ErrorDetail


class ModelList(pydantic.BaseModel):
    """GET /v1/models."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class Status(pydantic.BaseModel):
    """GET /health."""

    status: str


class Version(pydantic.BaseModel):
    """GET /version."""

    version: str


class Usage(pydantic.BaseModel):
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: dict[str, int] | None = None
    completion_tokens_details: dict[str, int] | None = None


class _Answered(pydantic.BaseModel):
    id: str
    created: int
    model: str
    usage: Usage | None


class ChatMessage(pydantic.BaseModel):
    """What the model said."""

    role: Literal["assistant"]
    content: str | None
    refusal: str | None
    reasoning_content: str | None = None
    tool_calls: list[dict[str, Any]] | None = None


class ChatChoice(pydantic.BaseModel):
    """One answer."""

    index: int
    message: ChatMessage
    logprobs: dict[str, Any] | None
    finish_reason: Literal["stop", "length", "tool_calls"]


class ChatCompletion(_Answered):
    """POST /v1/chat/completions."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    prompt_logprobs: list[Any] | None = None


class CompletionChoice(pydantic.BaseModel):
    """One answer."""

    index: int
    text: str
    logprobs: dict[str, Any] | None
    finish_reason: Literal["stop", "length"]
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: list[Any] | None = None


class Completion(_Answered):
    """POST /v1/completions."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]


class Embedding(pydantic.BaseModel):
    """One vector."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class Embeddings(pydantic.BaseModel):
    """POST /v1/embeddings."""

    object: Literal["list"]
    model: str
    data: list[Embedding]
    usage: Usage | None


class Tokenized(pydantic.BaseModel):
    """POST /tokenize."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class Detokenized(pydantic.BaseModel):
    """POST /detokenize."""

    prompt: str


class Updated(pydantic.BaseModel):
    """POST /update_weights_from_disk."""

    success: Literal[True] = True
    message: str


ERRORS = {
    400: "A request that is wrong; names its field.",
    401: "No API key, or a wrong one.",
    403: "Not allowed here.",
    404: "No such model, or path.",
    408: "The body did not come in time.",
    413: "A body that is too long.",
    429: "Too many requests; Retry-After says when to come again.",
    500: "The server failed.",
    503: "The server ends, or takes no request now.",
    504: "The time of a request is over.",
}
HEALTH: dict[int | str, Any] = {503: {"model": Status, "description": "Not ready, and why."}}


def _errors(*statuses: int) -> dict[int | str, Any]:
    return {status: {"model": Error, "description": ERRORS[status]} for status in sorted(statuses)}


def got(*more: int) -> dict[int | str, Any]:
    """The errors of a GET that wants a key."""
    return _errors(401, 500, 503, *more)


METRICS: dict[int | str, Any] = {
    **got(),
    200: {"content": {"text/plain": {"schema": {"type": "string"}}}, "description": "Prometheus's text format."},
}


def posted(
    body: type[pydantic.BaseModel],
    answer: type[pydantic.BaseModel] | None = None,
    *,
    streams: bool = False,
    forbidden: bool = False,
) -> dict[str, Any]:
    """Arguments of ``app.post``: a body of JSON, its answer (None: what the function returns), the errors."""
    responses = _errors(400, 401, 404, 408, 413, 429, 500, 503, 504, *((403,) if forbidden else ()))
    if answer is not None:
        responses[200] = {"model": answer, "description": "The answer."}
    if streams:
        event = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
        events = {"text/event-stream": {"schema": event}}  # of one event; its data is a chunk as JSON, or [DONE]
        responses[200] = {**responses[200], "content": events, "description": "The answer, whole or as events."}
    told = {"required": True, "content": {"application/json": {"schema": {"$ref": REF.format(model=body.__name__)}}}}
    more: dict[str, Any] = {"responses": responses, "openapi_extra": {"requestBody": told}}
    return more if answer is None else {**more, "response_model": None}


def describe(app: fastapi.FastAPI, *, with_keys: bool) -> None:
    """Make the application's schema whole: the bodies' schemas, and where a key is wanted."""

    def schema() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _schema(app, with_keys)
        return app.openapi_schema

    app.openapi = schema  # type: ignore[method-assign]


def _schema(app: fastapi.FastAPI, with_keys: bool) -> dict[str, Any]:
    found = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    parts = found.setdefault("components", {})
    for path, methods in found["paths"].items():
        for operation in methods.values():
            for body in BODIES:
                if REF.format(model=body.__name__) in str(operation.get("requestBody")):
                    told = body.model_json_schema(ref_template=REF)
                    parts.setdefault("schemas", {}).update(told.pop("$defs", {}))
                    parts["schemas"][body.__name__] = told
            operation.get("responses", {}).pop("422", None)
            if with_keys and not is_open(path):
                operation["security"] = [{"key": []}]
    for name in ("HTTPValidationError", "ValidationError"):  # FastAPI's own, which nobody gets
        parts["schemas"].pop(name, None)
    if with_keys:
        parts["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return found
