"""JSON read from a chat model's reply: what counts as it, and that nothing else does."""

from __future__ import annotations

import pytest

from m3.rollout.replies import read_json, read_object

VALUES = {
    "object": (' {"a": 1} ', {"a": 1}),
    "list": ("[1, 2]", [1, 2]),
    "fenced": ('```json\n{"a": "```"}\n```', {"a": "```"}),
    "bare_fence": ("```\n[]\n```", []),
    "words_around": ('Sure: {"a": 1}', None),
    "broken": ('{"a": 1', None),
    "nothing": ("", None),
    "deep": ("[" * 100_000, None),
    "many_digits": ("1" * 5000, None),
    "half_a_character": ('["\\ud83d"]', None),
    "a_whole_character": ('["\\ud83d\\ude00"]', ["😀"]),
}


@pytest.mark.parametrize(("reply", "wanted"), VALUES.values(), ids=VALUES)
def test_a_value_is_read(reply, wanted):
    assert read_json(reply) == wanted


REPLIES = {
    "plain": ('{"a": 1}', {"a": 1}),
    "fenced": ('```json\n{"a": {"b": "}"}}\n```', {"a": {"b": "}"}}),
    "words_around": ('Sure: {"a": 1}. Done.', {"a": 1}),
    "said_twice": ('{"a": 1} {"a": 1}', {"a": 1}),
    "two_that_differ": ('{"a": 1} {"a": 2}', None),
    "broken": ('{"a": 1', None),
    "a_brace_before": ('{ so {"a": 1}', {"a": 1}),
    "a_list": ("[1, 2]", None),
    "nothing": ("", None),
    "many_digits": ('{"a": 1%s}' % ("0" * 5000), None),
    "deep": ('{"a":' * 100_000, None),
    "half_a_character": ('{"a": "\\ud83d"}', None),
}


@pytest.mark.parametrize(("reply", "wanted"), REPLIES.values(), ids=REPLIES)
def test_an_object_is_read(reply, wanted):
    assert read_object(reply) == wanted
