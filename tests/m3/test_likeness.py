"""Near duplicates: what counts as said again and what does not; the index against all pairs; real doctors."""

from __future__ import annotations

import gzip
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from m3.text.likeness import THRESHOLD, Duplicate, duplicate_rate, likeness, near_duplicates, questions, signature
from tests.m3.clinic_cases import shared_data

SAME = {
    "word_for_word": ("Do you smoke?", "Do you smoke?"),
    "grammar": ("Have you had any fever?", "Did you have a fever, any fevers?"),
    "order": ("Have you noticed changes in your weight or appetite?", "Any changes in appetite or weight noticed?"),
    "one_word_more": ("Has the pain spread to your arm or jaw?", "Has the pain spread to your left arm or jaw?"),
    "no_topic_word": ("How was that for you?", "How was that for you?"),
}
OTHER = {
    "another_place": ("Have you noticed changes in the skin on your face?", "... changes in the skin on your back?"),
    "another_dose": ("Do you take 20 mg of it?", "Do you take 40 mg of it?"),
    "another_way_of_asking": ("When did the pain start?", "How did the pain start?"),
    "negation": ("Is there a rash?", "Is there no rash?"),
    "another_thing": ("Do you smoke?", "Do you drink?"),
    "nothing_said": ("?", "?"),
}


@pytest.mark.parametrize(("one", "other"), SAME.values(), ids=SAME)
def test_said_again(one, other):
    assert likeness(signature(one), signature(other)) >= THRESHOLD


@pytest.mark.parametrize(("one", "other"), OTHER.values(), ids=OTHER)
def test_not_the_same(one, other):
    assert likeness(signature(one), signature(other)) < THRESHOLD


def test_likeness_by_hand():
    """{pain, spread, arm} and {pain, spread, left, arm, jaw}: 3 of 5."""
    assert likeness(signature("Does the pain spread to your arm?"), signature("Pain spread left arm, jaw?")) == 3 / 5


def test_the_likest_earlier_one_is_named_and_the_first_of_equals():
    said = ["Any fever?", "Do you smoke cigarettes daily?", "Any fever?", "Do you smoke cigarettes?", "A fever?"]
    found = near_duplicates([*said, "Do you smoke cigarettes daily?"], threshold=0.6)
    assert found == [
        Duplicate(earlier=0, later=2, likeness=1.0),
        Duplicate(earlier=1, later=3, likeness=2 / 3),
        Duplicate(earlier=0, later=4, likeness=1.0),
        Duplicate(earlier=1, later=5, likeness=1.0),
    ]
    assert duplicate_rate([said, ["Any cough?"]], threshold=0.6) == 3 / 6


SAYINGS = st.lists(
    st.lists(st.sampled_from("pain arm fever when how no 20 40 cough you".split()), max_size=5), max_size=8
)


@given(SAYINGS)
def test_the_index_finds_what_all_pairs_find(rows):
    texts = [" ".join(row) for row in rows]
    pairs = {
        j: max((likeness(signature(texts[i]), signature(texts[j])), -i) for i in range(j)) for j in range(1, len(texts))
    }
    wanted = [(-i, j, value) for j, (value, i) in pairs.items() if value >= THRESHOLD]
    assert [(d.earlier, d.later, d.likeness) for d in near_duplicates(texts)] == wanted


def test_questions_of_a_message():
    text = "I see. Since when? Any fever? Tell me about it.\n**Do you smoke?**\n- Do you drink? (If so, how much?)"
    wanted = ["Since when?", "Any fever?", "**Do you smoke?**", "- Do you drink?", "(If so, how much?)"]
    assert questions(text) == wanted


@pytest.mark.parametrize("threshold", [0.0, 1.5, float("nan")])
def test_a_threshold_out_of_contract(threshold):
    with pytest.raises(ValueError, match="threshold: want a number in"):
        near_duplicates(["a"], threshold)


def test_no_sentence_has_no_rate():
    with pytest.raises(ValueError, match="duplicate_rate: dialogues: want at least one sentence; got none"):
        duplicate_rate([[], []])


def test_rates_of_recorded_doctors():
    """3,750 replays have 0.4 %, 1.0 %, 4.4 %, 17.9 % and 0.2 % by another measure; this is half of them."""
    file = shared_data("craft-md") / "replay_dev.jsonl.gz"
    asked: dict[str, list[list[str]]] = {}
    with gzip.open(file, "rt", encoding="utf-8") as rows:
        for row in map(json.loads, rows):
            said = " \n".join(turn["text"] for turn in row["turns"] if turn["role"] == "doctor")
            asked.setdefault(row["doctor"], []).append(questions(said))
    rates = {doctor: duplicate_rate(dialogues) for doctor, dialogues in asked.items()}
    assert sorted(rates, key=rates.__getitem__) == ["mistral-v2", "gpt4_1106", "gpt3_1106", "llama2-7b", "mistral-v1"]
    wanted = {"gpt4_1106": 0.004, "gpt3_1106": 0.010, "llama2-7b": 0.044, "mistral-v1": 0.179, "mistral-v2": 0.002}
    assert rates == pytest.approx(wanted, abs=0.02)
