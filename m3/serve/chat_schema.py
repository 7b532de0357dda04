"""The body of POST /v1/chat/completions: messages, tools, the form of the answer."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

import pydantic

from m3.serve.schema import MAX_TOP, RequestError, Sampling, Strict

ToolName = Annotated[str, pydantic.Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
RESERVED = ("messages", "tools", "add_generation_prompt", "self")  # variables of templates that are not the client's
MaxTokens = Annotated[int, pydantic.Field(ge=1, lt=2**31)]


class TextPart(Strict):
    """A piece of a message's content."""

    type: Literal["text"]
    text: str


Content = str | list[TextPart]


class CalledFunction(Strict):
    """What an assistant called."""

    name: ToolName
    arguments: str
    """A JSON object, as text."""


class ToolCall(Strict):
    """A call in a message of the assistant."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class SystemMessage(Strict):
    """What the model is told first; "developer" is the younger name."""

    role: Literal["system", "developer"]
    content: Content
    name: str | None = None


class UserMessage(Strict):
    """What somebody said."""

    role: Literal["user"]
    content: Content
    name: str | None = None


class AssistantMessage(Strict):
    """What the model said, and what it called; reasoning_content is for templates that show it."""

    role: Literal["assistant"]
    content: Content | None = None
    name: str | None = None
    refusal: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None


class ToolMessage(Strict):
    """What a call returned."""

    role: Literal["tool"]
    content: Content
    tool_call_id: str


Message = Annotated[SystemMessage | UserMessage | AssistantMessage | ToolMessage, pydantic.Field(discriminator="role")]


class FunctionDefinition(Strict):
    """A function that the model may call. ``strict`` is taken and not used."""

    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    """A JSON schema of an object; None: no arguments."""
    strict: bool | None = None


class Tool(Strict):
    """One tool; functions are the only ones."""

    type: Literal["function"]
    function: FunctionDefinition


class NamedFunction(Strict):
    """The function of a NamedTool."""

    name: ToolName


class NamedTool(Strict):
    """The tool that must be called."""

    type: Literal["function"]
    function: NamedFunction


class TextFormat(Strict):
    """Any text."""

    type: Literal["text"]


class JsonObjectFormat(Strict):
    """A JSON object."""

    type: Literal["json_object"]


class JsonSchema(Strict):
    """A schema and its name; ``strict`` is taken and not used: it always is."""

    name: Annotated[str, pydantic.Field(min_length=1, max_length=64)]
    description: str | None = None
    schema_: dict[str, Any] = pydantic.Field(alias="schema")
    strict: bool | None = None


class JsonSchemaFormat(Strict):
    """JSON that a schema admits."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, pydantic.Field(discriminator="type")]


class ChatRequest(Sampling):
    """The body of POST /v1/chat/completions; defaults are OpenAI's.

    ``user``, ``metadata``, ``store``, ``service_tier`` and ``parallel_tool_calls`` are taken and not used.
    """

    messages: list[Message]
    max_tokens: MaxTokens | None = None
    max_completion_tokens: MaxTokens | None = None
    """Tokens of the answer at most; goes before max_tokens, its older name."""
    logprobs: bool = False
    """The log-probability of every token of the answer, its reasoning and calls included."""
    top_logprobs: Annotated[int, pydantic.Field(ge=0, le=MAX_TOP)] | None = None
    """With logprobs: so many likeliest tokens at every position."""
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], pydantic.Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    """Variables of the model's chat template: {"enable_thinking": false}. vLLM's."""
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None

    @property
    def limit(self) -> int | None:
        """Tokens of the answer at most."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def usable_tools(self) -> list[Tool]:
        """Those that the model is told of."""
        return [] if self.tool_choice == "none" else self.tools or []

    def plain(self) -> list[dict[str, str]]:
        """The conversation as {"role", "content"}, without calls."""
        return [{"role": _role(message.role), "content": _text(message.content)} for message in self.messages]

    def for_template(self) -> list[dict[str, Any]]:
        """The conversation as chat templates take it: arguments of calls are objects, not their texts."""
        return rows_for_template(self.messages)

    def check(self) -> None:
        super().check()
        check_variables(self.chat_template_kwargs)
        if self.top_logprobs and not self.logprobs:
            raise RequestError(400, "top_logprobs: want logprobs: true with it", param="top_logprobs")
        if self.tool_choice not in (None, "none", "auto") and not self.tools:
            raise RequestError(400, "tool_choice: want tools to choose from", param="tool_choice")
        if isinstance(self.tool_choice, NamedTool):
            name = self.tool_choice.function.name
            if all(tool.function.name != name for tool in self.tools or ()):
                raise RequestError(400, "tool_choice: want the name of one of the tools", param="tool_choice")
        names = [tool.function.name for tool in self.tools or ()]
        if len(set(names)) < len(names):
            raise RequestError(400, "tools: want each name once", param="tools")
        forms = [
            self.structured_outputs is not None,
            self.response_format is not None and self.response_format.type != "text",
            self.tool_choice not in (None, "none", "auto"),
        ]
        if sum(forms) > 1:
            want = "want one of response_format, structured_outputs and a tool_choice that forces a call"
            raise RequestError(400, f"response_format: {want}", param="response_format")


def check_variables(variables: dict[str, Any] | None) -> None:
    """Raises RequestError 400: variables of a template that a request has fields for, or that are no names."""
    taken = [name for name in variables or () if name in RESERVED or not name.isidentifier()]
    if taken:
        want = f"chat_template_kwargs: want names other than {', '.join(RESERVED)}"
        raise RequestError(400, want, param="chat_template_kwargs")


def rows_for_template(messages: list[Message]) -> list[dict[str, Any]]:
    """Messages as chat templates take them.

    Raises:
        RequestError: 400: arguments of a call that are no JSON object.
    """
    return [_row(message, index) for index, message in enumerate(messages)]


def _role(role: str) -> str:
    return "system" if role == "developer" else role


def _text(content: Content | None) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(part.text for part in content)


def _row(message: SystemMessage | UserMessage | AssistantMessage | ToolMessage, index: int) -> dict[str, Any]:
    row: dict[str, Any] = {"role": _role(message.role), "content": _text(message.content)}
    if isinstance(message, ToolMessage):
        row["tool_call_id"] = message.tool_call_id
    elif message.name is not None:
        row["name"] = message.name
    if isinstance(message, AssistantMessage):
        if message.reasoning_content is not None:
            row["reasoning_content"] = message.reasoning_content
        if message.tool_calls:
            row["tool_calls"] = [_call(call, index) for call in message.tool_calls]
    return row


def _call(call: ToolCall, index: int) -> dict[str, Any]:
    try:
        arguments = json.loads(call.function.arguments or "{}")
    except (ValueError, RecursionError) as error:
        arguments = error
    if not isinstance(arguments, dict):
        param = f"messages.{index}.tool_calls"
        raise RequestError(400, f"{param}: want arguments that are the text of a JSON object", param=param)
    return {"id": call.id, "type": "function", "function": {"name": call.function.name, "arguments": arguments}}
