"""What a chat request may hold, and how a mistake in it is told: the shapes of OpenAI's API, checked by pydantic.

What cannot be done is refused by name, never ignored: a field that is not known, n above 1, tools, a JSON schema.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

import pydantic

MAX_STOPS = 16  # ours; OpenAI takes 4
INT64 = 2**63
StopText = Annotated[str, pydantic.Field(min_length=1)]
Body = TypeVar("Body", bound=pydantic.BaseModel)


class RequestError(Exception):
    """What a client is told instead of an answer: a status and OpenAI's error object."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def to_json(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class Strict(pydantic.BaseModel):
    """No field that is not known; no value in an error."""

    model_config = pydantic.ConfigDict(extra="forbid", hide_input_in_errors=True)


class TextPart(Strict):
    """A piece of a message's content."""

    type: Literal["text"]
    text: str


class ChatMessage(Strict):
    """One message; "developer" is the younger name of "system"."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    def plain(self) -> dict[str, str]:
        """{"role", "content"}."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class StreamOptions(Strict):
    """include_usage: a last chunk, without a choice, tells the tokens."""

    include_usage: bool = False


class TextFormat(Strict):
    """The one response_format there is."""

    type: Literal["text"]


class ChatRequest(Strict):
    """The body of POST /v1/chat/completions; defaults are OpenAI's.

    ``user``, ``metadata`` and ``store`` are taken and not used. top_k and min_p are known from vLLM.
    """

    model: str
    messages: list[ChatMessage]
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, pydantic.Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, pydantic.Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, pydantic.Field(ge=0, lt=2**31)] = 0
    min_p: Annotated[float, pydantic.Field(ge=0, le=1)] = 0.0
    max_tokens: Annotated[int, pydantic.Field(ge=1, lt=2**31)] | None = None
    max_completion_tokens: Annotated[int, pydantic.Field(ge=1, lt=2**31)] | None = None
    seed: Annotated[int, pydantic.Field(ge=-INT64, lt=INT64)] | None = None
    stop: Annotated[str, pydantic.Field(min_length=1)] | list[Annotated[str, pydantic.Field(min_length=1)]] | None = (
        None
    )
    n: Literal[1] = 1
    frequency_penalty: Literal[0] = 0
    presence_penalty: Literal[0] = 0
    logprobs: Literal[False] | None = None
    response_format: TextFormat | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None

    @pydantic.field_validator("temperature", "top_p", "frequency_penalty", "presence_penalty", "n", mode="before")
    @classmethod
    def _null_is_default(cls, value: Any, info: pydantic.ValidationInfo) -> Any:
        return cls.model_fields[str(info.field_name)].default if value is None else value

    @property
    def limit(self) -> int | None:
        """Tokens of the answer at most."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def stops(self) -> tuple[str, ...]:
        return () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    def plain(self) -> list[dict[str, str]]:
        """The conversation as {"role", "content"}."""
        return [message.plain() for message in self.messages]


def read_request(body: bytes) -> ChatRequest:
    """A chat request from its body.

    Raises:
        RequestError: 400; names the argument; tells nothing of what the request holds.
    """
    request = read_as(ChatRequest, body)
    if len(request.stops) > MAX_STOPS:
        raise RequestError(400, f"stop: want at most {MAX_STOPS}; got {len(request.stops)}", param="stop")
    return request


def read_as(kind: type[Body], body: bytes) -> Body:
    """A body of any kind; raises as ``read_request``."""
    try:
        return kind.model_validate_json(body)
    except pydantic.ValidationError as error:
        first = error.errors(include_input=False, include_url=False, include_context=False)[0]
        if first["type"] == "json_invalid":
            raise RequestError(400, f"body: want JSON; {first['msg']}") from error
        param = _name(first["loc"])
        raise RequestError(400, f"{param or 'body'}: {first['msg']}", param=param, code=first["type"]) from error


def _name(place: tuple[int | str, ...]) -> str | None:
    """messages.0.role, without the names that pydantic gives to the arms of a union."""
    known = [str(part) for part in place if isinstance(part, int) or part.isidentifier()]
    return ".".join(known[:3]) or None
