"""POST /v1/embeddings: a vector for each text, where the backend has a model that embeds."""

from __future__ import annotations

import base64
import struct
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import pydantic

from m3.serve.schema import RequestError, Strict

MAX_TEXTS = 2048  # of one request; OpenAI's
EmbeddedText = Annotated[str, pydantic.Field(min_length=1)]


class EmbeddingRequest(Strict):
    """The body; ``user`` is taken and not used."""

    model: str
    input: EmbeddedText | Annotated[list[EmbeddedText], pydantic.Field(min_length=1, max_length=MAX_TEXTS)]
    encoding_format: Literal["float", "base64"] = "float"
    """base64: of fp32, little-endian."""
    dimensions: Annotated[int, pydantic.Field(ge=1, lt=2**20)] | None = None
    """As many as the model has, or nothing."""
    user: str | None = None

    @property
    def texts(self) -> list[str]:
        return [self.input] if isinstance(self.input, str) else self.input


def embedding_models(backend: object) -> Sequence[str]:
    """Names of a backend's models that embed."""
    from m3.serve.backend import EmbeddingBackend

    return backend.embedding_models() if isinstance(backend, EmbeddingBackend) else ()


async def embeddings(backend: object, request: EmbeddingRequest) -> dict[str, Any]:
    """The body of the answer.

    Raises:
        RequestError: 404: no such model embeds here; 400: dimensions that it does not have.
    """
    from m3.serve.backend import EmbeddingBackend

    models = embedding_models(backend)
    if not isinstance(backend, EmbeddingBackend) or request.model not in models:
        had = ", ".join(models) or "none: start it with --embeddings"
        raise RequestError(404, f"model: want one that embeds; here: {had}", param="model", code="model_not_found")
    rows = await backend.embed(request)
    if request.dimensions not in (None, len(rows[0])):
        raise RequestError(400, f"dimensions: want {len(rows[0])}, or nothing", param="dimensions")
    packed = request.encoding_format == "base64"
    data = [
        {"object": "embedding", "index": index, "embedding": _packed(row) if packed else list(row)}
        for index, row in enumerate(rows)
    ]
    return {"object": "list", "model": request.model, "data": data, "usage": None}


def _packed(row: Sequence[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(row)}f", *row)).decode()
