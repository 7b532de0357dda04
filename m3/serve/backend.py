"""What stands behind the server: protocols of those who answer, and the pieces that an answer comes in."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import AsyncGenerator, Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from m3.rollout.chat import Usage
from m3.serve.chat_schema import ChatRequest

if TYPE_CHECKING:
    from m3.engine.engine import Stats
    from m3.serve.embeddings import EmbeddingRequest
    from m3.serve.token_schema import CompletionRequest, DetokenizeRequest, TokenizeRequest, WeightsRequest


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenText:
    """A token as clients see it.

    text: as it reads alone; raw: its bytes, which may be part of a character. logprob: nats, under softmax(logits);
    None: not asked for, or the first of a prompt. rank: from 1, where it is known. top: the likeliest at its place,
    best first, None where they were not asked for. hidden: a control token, which is not in the answer's text.
    """

    id: int
    text: str
    raw: bytes
    hidden: bool = False
    logprob: float | None = None
    rank: int | None = None
    top: Sequence[TokenText] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptText:
    """What was read. ``tokens``: with log-probabilities where these were asked for."""

    text: str
    tokens: Sequence[TokenText]


@dataclasses.dataclass(frozen=True, kw_only=True)
class CallDelta:
    """More of a tool call: id and name come once, in the first; arguments are the text of a JSON object, in pieces."""

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Delta:
    """More of an answer; the last one of each index has a finish_reason: "stop", "length" or "tool_calls".

    index: of the answer: answer a of prompt p has p * n + a. usage: so far, where it is known.
    tokens: as text, where log-probabilities were asked for. token_ids: where these were asked for.
    prompt: in the first delta of an index, where it was asked for.
    """

    text: str
    finish_reason: str | None = None
    usage: Usage | None = None
    index: int = 0
    reasoning: str = ""
    calls: Sequence[CallDelta] = ()
    tokens: Sequence[TokenText] | None = None
    token_ids: Sequence[int] = ()
    prompt: PromptText | None = None


class ChatBackend(Protocol):
    """Who answers."""

    def models(self) -> Sequence[str]:
        """Names of what can be asked, in order."""

    def failure(self) -> str | None:
        """Why nothing can be answered now; None: it can."""

    def lifespan(self) -> contextlib.AbstractAsyncContextManager[None]:
        """Entered before the first request, left after the last."""
        ...

    def stream(self, request: ChatRequest) -> AsyncGenerator[Delta]:
        """The answers; closing it stops the work. ``request.model`` is one of models().

        Raises:
            RequestError: with the status and the message for the client.
        """
        ...


@runtime_checkable
class TokenBackend(Protocol):
    """A ChatBackend that takes and gives tokens too."""

    def complete(self, request: CompletionRequest) -> AsyncGenerator[Delta]:
        """The answers to the prompts; as ChatBackend.stream."""
        ...

    async def tokenize(self, request: TokenizeRequest) -> Sequence[int]:
        """Tokens of a text, or of a conversation; raises RequestError."""
        ...

    async def detokenize(self, request: DetokenizeRequest) -> str:
        """The text of tokens, special ones included; raises RequestError."""
        ...

    def spell(self, token: int) -> TokenText:
        """A token as text."""
        ...

    @property
    def max_context(self) -> int:
        """Tokens of a prompt and its answer at most."""
        ...

    async def update(self, request: WeightsRequest) -> int:
        """New weights, from a checkpoint on this machine's disk; the version they have now.

        Raises:
            RequestError: 403: not allowed here; 400: no such checkpoint, or one of another model.
        """
        ...


@runtime_checkable
class EmbeddingBackend(Protocol):
    """A ChatBackend that embeds texts too."""

    def embedding_models(self) -> Sequence[str]:
        """Names of what embeds; none: nothing does."""

    async def embed(self, request: EmbeddingRequest) -> Sequence[Sequence[float]]:
        """A unit row for each text; raises RequestError."""
        ...


@runtime_checkable
class CountedBackend(Protocol):
    """A ChatBackend over an engine, whose numbers /metrics tells."""

    def stats(self) -> Stats: ...
