"""Reasoning apart from content, wherever the pieces of an answer begin and end; over HTTP too."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest
from loopback import serving
from scripted_engine import ScriptedEngine

from m3.serve.app import build
from m3.serve.reasoning import ReasoningSplitter

ANSWERS = {
    "none": (False, "A sprain.", "", "A sprain."),
    "space first": (False, "\n A sprain.", "", "\n A sprain."),
    "begun by the model": (False, "<think>\nIt hurts.\n</think>\n\nA sprain.", "It hurts.", "A sprain."),
    "after space": (False, "\n <think>It hurts.</think>A sprain.", "It hurts.", "A sprain."),
    "begun by the template": (True, "\nIt hurts.\n</think>\n\nA sprain.", "It hurts.", "A sprain."),
    "never ended": (True, "It hurts </thin", "It hurts </thin", ""),
    "a lone opening": (False, "<thi", "", "<thi"),
    "empty": (False, "<think>\n\n</think>\n\nA sprain.", "", "A sprain."),
    "later tags are words": (False, "A <think>b</think>", "", "A <think>b</think>"),
    "a closing tag is a word": (False, "A sprain.</think>", "", "A sprain.</think>"),
    "tags in reasoning": (True, "a < b <think> c</think>d</think>", "a < b <think> c", "d</think>"),
    "space inside": (True, "a\n\n b \n</think> c ", "a\n\n b", "c "),
    "nothing": (True, "", "", ""),
}


@pytest.mark.parametrize(("inside", "text", "reasoning", "content"), ANSWERS.values(), ids=ANSWERS)
def test_the_parts_do_not_depend_on_the_pieces(inside, text, reasoning, content):
    for first in range(len(text) + 1):
        for second in range(first, len(text) + 1):
            splitter = ReasoningSplitter(inside=inside)
            pieces = [splitter.push(piece) for piece in (text[:first], text[first:second], text[second:])]
            pieces.append(splitter.finish())
            assert tuple(map("".join, zip(*pieces, strict=True))) == (reasoning, content), (first, second)


def test_what_is_certain_is_told_at_once():
    splitter = ReasoningSplitter(inside=False)
    told = [splitter.push(piece) for piece in ("<th", "ink>It", " hurts", " a<", "/b", "</think", ">\n", "A", " sp")]
    assert told == [
        ("", ""), ("It", ""), (" hurts", ""), (" a", ""), ("</b", ""), ("", ""), ("", ""), ("", "A"), ("", " sp"),
    ]  # fmt: skip


# -- over HTTP --------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> ScriptedEngine:
    return ScriptedEngine(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def client(engine: ScriptedEngine) -> Iterator[openai.OpenAI]:
    with serving(build(engine.backend)) as url, openai.OpenAI(base_url=url, api_key="x", max_retries=0) as client:
        yield client


HELLO = [{"role": "user", "content": "Hi"}]
THINKS = {"extra_body": {"chat_template_kwargs": {"enable_thinking": True}}}
SERVED = {
    "by the model": ("<think>It hurts.</think>\nA sprain.", {}, 24),
    "by the template": ("It hurts.\n</think>\n\nA sprain.", THINKS, 18),
}


@pytest.mark.parametrize(("text", "options", "count"), SERVED.values(), ids=SERVED)
def test_reasoning_is_told_apart(engine, client, text, options, count):
    """The count: tokens (bytes) up to the end of </think>."""
    engine.say(text)
    asked = {"model": "toy", "messages": HELLO, **options}
    got = client.chat.completions.create(**asked)
    assert (got.choices[0].message.reasoning_content, got.choices[0].message.content) == ("It hurts.", "A sprain.")
    assert got.usage.completion_tokens_details.reasoning_tokens == count
    more = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(client.chat.completions.create(**asked, **more))
    deltas = [chunk.choices[0].delta for chunk in chunks[:-1]]
    assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas) == "It hurts."
    assert "".join(delta.content or "" for delta in deltas) == "A sprain."
    assert [delta.role for delta in deltas].count("assistant") == 1 and deltas[0].role == "assistant"
    assert chunks[-1].usage.completion_tokens_details.reasoning_tokens == count


def test_a_form_leaves_no_room_for_reasoning(engine, client):
    """The template opens the tag; it is closed before the answer, which is held to its form from the first token on."""
    engine.say('"yes"')
    asked = {"model": "toy", "messages": HELLO}
    plain = client.chat.completions.create(**asked, **THINKS)
    more = {**THINKS["extra_body"], "structured_outputs": {"choice": ["yes"]}}
    got = client.chat.completions.create(**asked, extra_body=more)
    assert got.choices[0].message.content == '"yes"'
    assert got.usage.prompt_tokens - plain.usage.prompt_tokens == len("\n</think>\n\n")


def test_an_answer_without_reasoning_has_no_such_field(engine, client):
    engine.say("A sprain.")
    got = client.chat.completions.create(model="toy", messages=HELLO)
    assert "reasoning_content" not in got.choices[0].message.model_extra
    assert got.usage.completion_tokens_details.reasoning_tokens == 0
