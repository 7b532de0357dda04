"""Tool calls: read out of a stream wherever it is cut, told as OpenAI tells them, forced by a grammar."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import llguidance
import openai
import pytest
from loopback import serving
from scripted_engine import ScriptedEngine

from m3.serve.app import build
from m3.serve.backend import CallDelta
from m3.serve.chat_schema import FunctionDefinition, NamedFunction, NamedTool, Tool
from m3.serve.tool_calls import ToolCallSplitter, forced

LOOK = '<tool_call>\n{"name": "look", "arguments": {"at": "arm {}]", "n": [1, {"a": "\\"}"}]}}\n</tool_call>'
LOOKED = '{"at": "arm {}]", "n": [1, {"a": "\\"}"}]}'
TAP = '<tool_call>{"name":"tap","arguments":{}}</tool_call>'
ANSWERS: dict[str, tuple[str, str, list[tuple[str, str]]]] = {
    "none": ("A sprain. <b>", "A sprain. <b>", []),
    "one": (LOOK, "", [("look", LOOKED)]),
    "after words": (f"Let me see.\n{LOOK}", "Let me see.", [("look", LOOKED)]),
    "two": (f"{LOOK}\n{TAP}\n", "", [("look", LOOKED), ("tap", "{}")]),
    "words after": (f"{TAP} done", " done", [("tap", "{}")]),
    "parameters": ('<tool_call>{"name": "tap", "parameters": {"a": 1}}</tool_call>', "", [("tap", '{"a": 1}')]),
    "the other way round": (
        '<tool_call>{"arguments": {"a": 1}, "name": "tap"}</tool_call>', "", [("tap", '{"a": 1}')],
    ),
    "arguments as text": (
        '<tool_call>{"name": "tap", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [("tap", '{"a": 1}')],
    ),
    "a closing tag in a text": (
        '<tool_call>{"name": "say", "arguments": {"a": "</tool_call>"}}</tool_call>', "",
        [("say", '{"a": "</tool_call>"}')],
    ),
    "no JSON": ("<tool_call>look</tool_call>", "<tool_call>look</tool_call>", []),
    "cut in its head": ('<tool_call>{"name": "lo', '<tool_call>{"name": "lo', []),
    "cut in its arguments": ('<tool_call>{"name": "look", "arguments": {"at": "a', "", [("look", '{"at": "a')]),
    "a tag begun": ("a <tool_c", "a <tool_c", []),
}  # fmt: skip


def told(calls: Sequence[CallDelta]) -> list[tuple[str, str]]:
    """(name, arguments) of each call; ids are there once, and differ."""
    found: dict[int, list[str]] = {}
    ids = []
    for call in calls:
        if call.name is not None:
            assert call.index == len(found) and call.id is not None
            ids.append(call.id)
            found[call.index] = [call.name, ""]
        found[call.index][1] += call.arguments
    assert len(set(ids)) == len(found)
    return [(name, arguments) for name, arguments in found.values()]


@pytest.mark.parametrize(("text", "content", "calls"), ANSWERS.values(), ids=ANSWERS)
def test_calls_do_not_depend_on_the_pieces(text, content, calls):
    for first in range(len(text) + 1):
        for second in range(first, len(text) + 1, 3):
            splitter = ToolCallSplitter()
            said, found = "", []
            for piece in (text[:first], text[first:second], text[second:]):
                more, new = splitter.push(piece)
                said, found = said + more, found + new
            more, new = splitter.finish()
            assert (said + more, told(found + new)) == (content, calls), (first, second)


def test_arguments_come_as_they_are_written():
    splitter = ToolCallSplitter()
    pieces = [splitter.push(char)[1] for char in LOOK]
    assert sum(map(bool, pieces)) == len(LOOKED)


# -- over HTTP --------------------------------------------------------------------------------------------------------
TOOLS: Any = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}} for name in ("look", "tap")
]
HELLO: Any = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> ScriptedEngine:
    return ScriptedEngine(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def client(engine: ScriptedEngine) -> Iterator[openai.OpenAI]:
    with serving(build(engine.backend)) as url, openai.OpenAI(base_url=url, api_key="x", max_retries=0) as client:
        yield client


def test_calls_are_told(engine, client):
    engine.say(f"<think>Look.</think>Wait.{LOOK}{TAP}")
    got = client.chat.completions.create(model="toy", messages=HELLO, tools=TOOLS).choices[0]
    assert (got.finish_reason, got.message.content, got.message.reasoning_content) == ("tool_calls", "Wait.", "Look.")
    calls = got.message.tool_calls
    assert [(call.type, call.function.name) for call in calls] == [("function", "look"), ("function", "tap")]
    assert [json.loads(call.function.arguments) for call in calls] == [json.loads(LOOKED), {}]
    assert calls[0].id != calls[1].id


def test_calls_are_streamed(engine, client):
    engine.say(f"Wait.{LOOK}{TAP}")
    with client.chat.completions.stream(model="toy", messages=HELLO, tools=TOOLS) as stream:
        kinds = {event.type for event in stream}
        done = stream.get_final_completion().choices[0]
    assert "tool_calls.function.arguments.delta" in kinds
    assert (done.finish_reason, done.message.content) == ("tool_calls", "Wait.")
    assert [call.function.name for call in done.message.tool_calls] == ["look", "tap"]
    assert done.message.tool_calls[0].function.arguments == LOOKED


def test_a_call_alone_has_no_content(engine, client):
    engine.say(TAP)
    got = client.chat.completions.create(model="toy", messages=HELLO, tools=TOOLS).choices[0]
    assert (got.message.content, got.finish_reason) == (None, "tool_calls")


@pytest.mark.parametrize("options", [{}, {"tools": TOOLS, "tool_choice": "none"}], ids=["no tools", "none"])
def test_without_tools_a_call_is_text(engine, client, options):
    engine.say(TAP)
    got = client.chat.completions.create(model="toy", messages=HELLO, **options).choices[0]
    assert (got.message.content, got.message.tool_calls, got.finish_reason) == (TAP, None, "stop")


def test_calls_and_their_results_are_in_the_conversation(engine, client):
    """The template shows the arguments as an object: it reads one of its fields."""
    call = {"id": "1", "type": "function", "function": {"name": "look", "arguments": '{"a": 7}'}}
    talk = [*HELLO, {"role": "assistant", "content": None, "tool_calls": [call]}]
    engine.say("Yes.")

    def length(messages: list) -> int:
        return client.chat.completions.create(model="toy", messages=messages).usage.prompt_tokens

    assert length(talk) == len(b"look(7)") + 2
    assert length([*talk, {"role": "tool", "tool_call_id": "1", "content": "red"}]) == len(b"red") + 2


TALK_MISTAKES = {
    "arguments": ([{"role": "assistant", "tool_calls": [
        {"id": "1", "type": "function", "function": {"name": "a", "arguments": "[1]"}}]}], "messages.0.tool_calls"),
    "no id": ([{"role": "tool", "content": "red"}], "messages.0.tool_call_id"),
    "a user calls": ([{"role": "user", "content": "a", "tool_calls": []}], "messages.0.tool_calls"),
}  # fmt: skip


@pytest.mark.parametrize(("messages", "param"), TALK_MISTAKES.values(), ids=TALK_MISTAKES)
def test_a_mistake_in_a_call_is_named(client, messages, param):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="toy", messages=messages)
    assert caught.value.param == param


CHOICE_MISTAKES = {
    "no tools": ({"tool_choice": "required"}, "tool_choice"),
    "another name": ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice"),
    "a name twice": ({"tools": [TOOLS[0], TOOLS[0]]}, "tools"),
    "and JSON": (
        {"tools": TOOLS, "tool_choice": "required", "response_format": {"type": "json_object"}}, "response_format",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("options", "param"), CHOICE_MISTAKES.values(), ids=CHOICE_MISTAKES)
def test_a_choice_that_cannot_be_is_named(client, options, param):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="toy", messages=HELLO, **options)
    assert caught.value.param == param


# -- forced -----------------------------------------------------------------------------------------------------------
SCHEMA = {"type": "object", "properties": {"at": {"enum": ["arm", "leg"]}}, "required": ["at"]}
KNOWN = [
    Tool(type="function", function=FunctionDefinition(name="look", parameters=SCHEMA)),
    Tool(type="function", function=FunctionDefinition(name="tap")),
]
ARM = '<tool_call>\n{"name": "look", "arguments": {"at": "arm"}}\n</tool_call>'
EMPTY = '<tool_call>\n{"name": "tap", "arguments": {}}\n</tool_call>'
FORCED = {
    "one": ("required", True, ARM, True),
    "another": ("required", True, EMPTY, True),
    "two": ("required", True, f"{ARM}\n{EMPTY}", True),
    "two in turn": ("required", False, f"{ARM}\n{EMPTY}", False),
    "not of the schema": ("required", True, ARM.replace("arm", "eye"), False),
    "no call": ("required", True, "A sprain.", False),
    "the named": (NamedTool(type="function", function=NamedFunction(name="tap")), True, EMPTY, True),
    "not the named": (NamedTool(type="function", function=NamedFunction(name="tap")), True, ARM, False),
}


@pytest.mark.parametrize(("choice", "parallel", "text", "taken"), FORCED.values(), ids=FORCED)
def test_the_grammar_takes_calls_of_the_tools_alone(choice, parallel, text, taken):
    tokens = [bytes([byte]) for byte in range(256)] + [b"<end>"]
    tokenizer = llguidance.LLTokenizer(llguidance.TokenizerWrapper(ByteTokens(tokens)))
    matcher = llguidance.LLMatcher(
        tokenizer, llguidance.LLMatcher.grammar_from_lark(forced(KNOWN, choice, parallel=parallel))
    )
    assert matcher.get_error() == ""
    count = matcher.try_consume_tokens(list(text.encode()))
    assert (count == len(text) and matcher.is_accepting()) is taken


class ByteTokens:
    """A vocabulary of bytes, as llguidance wants one."""

    def __init__(self, tokens: list[bytes]) -> None:
        self.tokens, self.eos_token_id, self.bos_token_id = tokens, len(tokens) - 1, None
        self.special_token_ids = [self.eos_token_id]

    def __call__(self, text: str | bytes) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)
