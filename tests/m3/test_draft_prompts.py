"""The prompts of a draft: nothing that is measured on was trained on, and a file of one's own is read or refused."""

from __future__ import annotations

import tomllib

import pytest

from m3.draft.prompts import BUILT_IN, HOLD_OUT_EVERY, read_prompts

KINDS = {name: table for name, table in tomllib.loads(BUILT_IN.read_text()).items() if name != "free"}
HELD_OUT_TOPICS = [topic for table in KINDS.values() for topic in table["held_out"]]
TEMPLATED = '[a]\ntopics = ["x", "y"]\nheld_out = ["z"]\ntemplates = ["What is {topic}?", "Why {topic}?"]\n'


def test_there_is_enough_and_whole_topics_are_held_out():
    prompts = read_prompts()
    assert sum(len(table["topics"]) for table in KINDS.values()) >= 60
    assert len(HELD_OUT_TOPICS) >= 10
    assert len(prompts.train) == sum(len(table["topics"]) * len(table["templates"]) for table in KINDS.values())
    assert len(prompts.out_of_template) >= 40


@pytest.mark.parametrize("topic", HELD_OUT_TOPICS)
def test_no_training_prompt_speaks_of_a_held_out_topic(topic):
    prompts = read_prompts()
    assert not [text for text in prompts.train if topic in text]
    assert [text for text in prompts.held_out if topic in text]


def test_the_groups_share_nothing():
    prompts = read_prompts()
    groups = [set(prompts.train), set(prompts.held_out), set(prompts.out_of_template)]
    assert len(groups[0] | groups[1] | groups[2]) == sum(map(len, groups))


def test_any_first_part_is_a_mixture():
    first = read_prompts().train[:100]
    assert all(any(topic in text for text in first for topic in table["topics"]) for table in KINDS.values())


def test_a_file_of_topics_and_templates(tmp_path):
    path = tmp_path / "own.toml"
    path.write_text(TEMPLATED + '[free]\nquestions = ["Who?"]\n')
    prompts = read_prompts(path)
    assert sorted(prompts.train) == ["What is x?", "What is y?", "Why x?", "Why y?"]
    assert sorted(prompts.held_out) == ["What is z?", "Why z?"]
    assert prompts.out_of_template == ("Who?",)
    assert read_prompts(path) == prompts


def test_a_file_of_lines(tmp_path):
    path = tmp_path / "own.txt"
    path.write_text("\n".join(f"question {number}\n" for number in range(45)))
    prompts = read_prompts(path)
    assert sorted(prompts.held_out) == sorted(f"question {at}" for at in (HOLD_OUT_EVERY - 1, 2 * HOLD_OUT_EVERY - 1))
    assert len(prompts.train) == 43
    assert not set(prompts.train) & set(prompts.held_out)


WRONG = {
    "no file": (None, "FILE: want a .toml or a text file"),
    "empty": ("", "want a prompt or more to train on; got none"),
    "not TOML": ("[a\n", "want UTF-8 text, TOML if it is named so"),
    "no slot": (TEMPLATED.replace("Why {topic}?", "Why?"), r"\[a\] templates: want {topic} once in each; got 'Why\?'"),
    "no templates": ('[a]\ntopics = ["x"]\nheld_out = []\n', r"\[a\] templates: want a list of texts; got None"),
    "topics not a list": (TEMPLATED.replace('["x", "y"]', "3"), r"\[a\] topics: want a list of texts; got 3"),
    "free not a table": (TEMPLATED.replace("[a]", 'free = ["q"]\n[a]'), r"\[free\]"),
}


@pytest.mark.parametrize(("text", "message"), WRONG.values(), ids=WRONG)
def test_a_file_that_is_not_right_is_refused(tmp_path, text, message):
    path = tmp_path / "own.toml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_prompts(path)
