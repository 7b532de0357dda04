"""What every request may hold, and how a mistake in it is told: the shapes of OpenAI's API, checked by pydantic.

What cannot be done is refused by name, never ignored; null means the default, as OpenAI has it. Fields that are not
OpenAI's are vLLM's: top_k, min_p, repetition_penalty, min_tokens, ignore_eos, stop_token_ids, prompt_logprobs,
structured_outputs.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, TypeVar

import pydantic
from pydantic.json_schema import GetJsonSchemaHandler, JsonSchemaValue

MAX_STOPS = 16  # ours; OpenAI takes 4
MAX_CHOICES = 16  # answers to one prompt; ours
MAX_TOP = 20  # likeliest tokens that are told at a position; OpenAI's
INT64 = 2**63
Token = Annotated[int, pydantic.Field(ge=0, lt=2**31)]
StopText = Annotated[str, pydantic.Field(min_length=1)]
Bias = Annotated[float, pydantic.Field(ge=-100, le=100)]
Penalty = Annotated[float, pydantic.Field(ge=-2, le=2)]
TokenName = Annotated[str, pydantic.Field(pattern=r"^[0-9]{1,9}$")]
Body = TypeVar("Body", bound=pydantic.BaseModel)


class RequestError(Exception):
    """What a client is told instead of an answer: a status, OpenAI's error object, and more headers."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = headers or {}

    def to_json(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class Strict(pydantic.BaseModel):
    """No field that is not known, no value of another type, no value in an error; null is the default."""

    model_config = pydantic.ConfigDict(
        extra="forbid", strict=True, hide_input_in_errors=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    @pydantic.model_validator(mode="before")
    @classmethod
    def _null_is_default(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        fields = cls.model_fields
        return {k: v for k, v in data.items() if v is not None or k not in fields or fields[k].is_required()}

    def check(self) -> None:
        """What two fields of a request must not say together.

        Raises:
            RequestError: 400; names the second field.
        """

    @classmethod
    def __get_pydantic_json_schema__(cls, core: Any, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """As pydantic's, and every field that has a default takes null."""
        schema = handler(core)
        found = handler.resolve_ref_schema(schema)
        for name, field in found.get("properties", {}).items():
            arms = field.get("anyOf", [])
            if name in found.get("required", ()) or {"type": "null"} in arms:
                continue
            outside = {key: field.pop(key) for key in ("title", "description", "default") if key in field}
            inner = dict(field)
            field.clear()
            field |= {"anyOf": [*(arms or [inner]), {"type": "null"}], **outside}
        return schema


class StreamOptions(Strict):
    """What a stream tells of the tokens used."""

    include_usage: bool = False
    """A last chunk, without a choice, tells it."""
    continuous_usage_stats: bool = False
    """With include_usage: every chunk tells what was used so far. vLLM's."""


class StructuredOutputs(Strict):
    """What the answer must be: one of the four. vLLM's."""

    one_of: ClassVar = ("json", "regex", "choice", "grammar")
    model_config = pydantic.ConfigDict(
        json_schema_extra={"minProperties": 1, "maxProperties": 1}, validate_by_name=True, validate_by_alias=True
    )

    json_: dict[str, Any] | str | None = pydantic.Field(None, alias="json")
    """A JSON schema, or its text."""
    regex: Annotated[str, pydantic.Field(min_length=1)] | None = None
    """A regular expression that the whole answer matches (Rust's syntax)."""
    choice: Annotated[list[StopText], pydantic.Field(min_length=1, max_length=512)] | None = None
    """Texts of which the answer is one."""
    grammar: Annotated[str, pydantic.Field(min_length=1)] | None = None
    """A grammar in Lark's syntax; its first rule is ``start``."""

    @pydantic.model_validator(mode="after")
    def _one(self) -> StructuredOutputs:
        given = (self.json_, self.regex, self.choice, self.grammar)
        if sum(each is not None for each in given) != 1:
            raise ValueError("want one of json, regex, choice, grammar")
        return self


class Sampling(Strict):
    """What chats and completions have in common."""

    model: str
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, pydantic.Field(ge=1, le=MAX_CHOICES)] = 1
    """Answers to each prompt; their seeds are seed, seed + 1, ..."""
    temperature: Annotated[float, pydantic.Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, pydantic.Field(ge=1e-6, le=1)] = 1.0
    top_k: Annotated[int, pydantic.Field(ge=0, lt=2**31)] = 0
    min_p: Annotated[float, pydantic.Field(ge=0, le=1)] = 0.0
    frequency_penalty: Penalty = 0.0
    presence_penalty: Penalty = 0.0
    repetition_penalty: Annotated[float, pydantic.Field(ge=0.01, le=100)] = 1.0
    logit_bias: dict[TokenName, Bias] | None = None
    seed: Annotated[int, pydantic.Field(ge=-INT64, lt=INT64)] | None = None
    stop: StopText | Annotated[list[StopText], pydantic.Field(max_length=MAX_STOPS)] | None = None
    stop_token_ids: list[Token] = []
    min_tokens: Annotated[int, pydantic.Field(ge=0, lt=2**31)] = 0
    ignore_eos: bool = False
    prompt_logprobs: Annotated[int, pydantic.Field(ge=0, le=MAX_TOP)] | None = None
    """The log-probability of every prompt token but the first, and of so many likeliest ones. Not with stream."""
    structured_outputs: StructuredOutputs | None = None
    user: str | None = None
    """Taken and not used."""

    @property
    def stops(self) -> tuple[str, ...]:
        return () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def biases(self) -> tuple[tuple[int, float], ...]:
        """(token, bias), each token once: "7" and "07" are the same, and the last one counts."""
        return tuple({int(token): bias for token, bias in (self.logit_bias or {}).items()}.items())

    @property
    def tells_usage(self) -> bool:
        """A stream ends with its usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def keeps_telling_usage(self) -> bool:
        return self.tells_usage and self.stream_options is not None and self.stream_options.continuous_usage_stats

    def check(self) -> None:
        if self.stream_options is not None and not self.stream:
            raise RequestError(400, "stream_options: want stream: true with it", param="stream_options")
        if self.stream and self.prompt_logprobs is not None:
            raise RequestError(400, "prompt_logprobs: want stream: false with it", param="prompt_logprobs")


class ModelCard(Strict):
    """A model, as /v1/models tells it."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "m3"


def read_as(kind: type[Body], body: bytes) -> Body:
    """A request from its body.

    Raises:
        RequestError: 400; names the argument; tells nothing of what the request holds.
    """
    try:
        request = kind.model_validate_json(body)
    except pydantic.ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        if first["type"] == "json_invalid":
            raise RequestError(400, f"body: want JSON; {first['msg']}") from error
        param = _name(first["loc"], first["type"])
        raise RequestError(400, f"{param or 'body'}: {_told(first)}", param=param, code=first["type"]) from error
    if isinstance(request, Strict):
        request.check()
    return request


def _told(error: Any) -> str:
    """pydantic's words, but for those that quote the request."""
    if error["type"] == "union_tag_invalid":
        return f"Input should be one of {error['ctx']['expected_tags']}"
    return str(error["msg"])


def _name(place: tuple[int | str, ...], kind: str) -> str | None:
    """messages.0.content, without the names that pydantic gives to the arms of a union."""
    parts = list(place)
    union = {"messages": (2, "role"), "response_format": (1, "type")}.get(str(parts[0]) if parts else "")
    if union is not None and kind.startswith("union_tag"):
        parts.append(union[1])
    elif union is not None:
        del parts[union[0] : union[0] + 1]
    known = [str(part) for part in parts if isinstance(part, int) or part.isidentifier()]
    return ".".join(known[:3]) or None
