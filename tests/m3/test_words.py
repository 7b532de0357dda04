"""Words, stems and sentences: what ends a sentence, what a word is, which words carry a topic."""

from __future__ import annotations

import pytest

from m3.text.words import content_stems, is_negated, sentences, word_spans, words


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("Dr. Smith saw him. It hurts!", ["Dr. Smith saw him.", "It hurts!"]),
        ("It is 2.5 mg. Twice a day?", ["It is 2.5 mg.", "Twice a day?"]),
        ("Aspirin, e.g. Disprin, helps.", ["Aspirin, e.g. Disprin, helps."]),
        ("1. Angina\n2. Embolism\n10. Panic", ["1. Angina", "2. Embolism", "10. Panic"]),
        ("He is 51. He smokes.", ["He is 51.", "He smokes."]),
        ('He said "no." Then he left.', ['He said "no.', "Then he left."]),
        ("\n\n", []),
        ("", []),
    ],
    ids=["title", "decimal", "for example", "list", "number", "quote", "blank", "empty"],
)
def test_sentences(text, want):
    assert sentences(text) == want


def test_words_keep_what_changes_a_meaning():
    assert words("BP 120/80, x-ray; don't take >2.5 mg (90%)") == [
        *("BP", "120/80", "x-ray", "don't", "take", ">", "2.5", "mg", "90", "%")
    ]


def test_spans_are_those_of_the_words():
    text = "Does it spread to your arm?"
    assert [text[a:b] for a, b in word_spans(text)] == words(text)


def test_content_leaves_out_what_carries_no_topic_and_keeps_negations():
    assert content_stems("Have you ever had no chest pains when walking?") == ["no", "chest", "pain", "walk"]


@pytest.mark.parametrize(
    ("text", "negated"),
    [("No fever.", True), ("Fever.", False), ("It is not that he denies it.", False), ("He doesn’t smoke", True)],
)
def test_two_negations_are_none(text, negated):
    assert is_negated(text) == negated
