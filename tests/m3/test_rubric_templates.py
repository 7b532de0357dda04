"""Templates of a judge: HealthBench's byte for byte, what comes first in ours, and which replies are verdicts."""

from __future__ import annotations

import hashlib
import json
import time

import pytest

from m3.rewards.rubric import RubricItem
from m3.rewards.rubric_templates import HEALTHBENCH, Reading, dialogue, read_verdict, template

CONVERSATION = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day.\n\nWhat is it?"}]
ONE = RubricItem(id="a", criterion="Asks for the onset.", points=5)
OTHER = RubricItem(id="b", criterion="Blames.", points=-8)


def test_healthbench_prompt_is_the_published_one():
    """sha256 of GRADER_TEMPLATE of openai/simple-evals ee3b031, healthbench_eval.py."""
    digest = hashlib.sha256(HEALTHBENCH.encode()).hexdigest()
    assert digest == "2adffd51fd259554ebcd036ad1072d4aa2b7ce3aec2bbffe36271f911632ed3c"


def test_healthbench_prompt_is_filled_as_published():
    [system, user] = template("healthbench-exact").messages(CONVERSATION, ONE)
    head, rest = HEALTHBENCH.split("<<conversation>>")
    middle, tail = rest.split("<<rubric_item>>")
    said = "user: Hello\n\nassistant: Good day.\n\nWhat is it?"
    assert user == {"role": "user", "content": head + said + middle + "[5] Asks for the onset." + tail}
    assert system == {"role": "system", "content": "You are a helpful assistant."}


def test_prefix_first_differs_in_the_clause_at_the_end_alone():
    [one], [other] = (template("prefix-first").messages(CONVERSATION, item) for item in (ONE, OTHER))
    assert one["content"].removesuffix(str(ONE)) == other["content"].removesuffix(str(OTHER))
    assert one["content"].endswith(f"{dialogue(CONVERSATION)}\n\nEnd of the conversation\n\nClause\n{ONE}")


def test_answer_cannot_move_the_clause():
    said = [{"role": "assistant", "content": "<<rubric_item>> <<conversation>>"}]
    [message] = template("prefix-first").messages(said, ONE)
    assert message["content"].count(str(ONE)) == 1
    assert "assistant: <<rubric_item>> <<conversation>>\n" in message["content"]


def test_only_the_exact_template_is_comparable():
    assert template("healthbench-exact").comparable
    assert not template("prefix-first").comparable


def test_unknown_template():
    with pytest.raises(ValueError, match=r"template: name: want one of .*'prefix-first'.*; got 'mine'"):
        template("mine")


VERDICTS = {
    "plain": ('{"explanation": "because", "criteria_met": true}', Reading(met=True, explanation="because")),
    "fenced_json": ('```json\n{"explanation": "x", "criteria_met": false}\n```', Reading(met=False, explanation="x")),
    "fenced_bare": ('  ```\n{"criteria_met": true}\n```\n', Reading(met=True, explanation="")),
    "fence_inside": (
        json.dumps({"explanation": "said ```json``` twice", "criteria_met": True}),
        Reading(met=True, explanation="said ```json``` twice"),
    ),
}


@pytest.mark.parametrize(("text", "reading"), VERDICTS.values(), ids=VERDICTS)
def test_verdict_is_read(text, reading):
    assert read_verdict(text) == reading


NO_VERDICTS = {
    "empty": "",
    "words": "The criteria are met: true",
    "text_around": 'Here it is: {"criteria_met": true}',
    "text_for_bool": '{"criteria_met": "true"}',
    "number_for_bool": '{"criteria_met": 1}',
    "null": '{"criteria_met": null}',
    "other_field": '{"met": true}',
    "list": '[{"criteria_met": true}]',
    "cut": '{"explanation": "it is", "criteria_met": tr',
    "two": '{"criteria_met": true} {"criteria_met": false}',
    "deep": "[" * 200_000,
    "half_a_character": '{"explanation": "\\ud83d", "criteria_met": true}',
    "long_number": '{"criteria_met": ' + "1" * 5000 + "}",
}


@pytest.mark.parametrize("text", ["{" + " " * 200_000 + "x", "```json" + "\n" * 200_000 + "x"], ids=["spaces", "lines"])
def test_a_model_that_writes_blanks_to_the_end_costs_no_time(text):
    began = time.process_time()
    assert read_verdict(text) is None
    assert time.process_time() - began < 1.0


@pytest.mark.parametrize("text", NO_VERDICTS.values(), ids=NO_VERDICTS)
def test_anything_else_is_no_verdict(text):
    assert read_verdict(text) is None
