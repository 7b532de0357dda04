"""The audit of the cache: its pairs change what they say they change, its counts are right, its bounds hold."""

from __future__ import annotations

import gzip
import json
import random

import pytest
from clinic_cases import shared_data

from m3.rewards.cache_audit import (
    KindRow,
    audit_pairs,
    kqa_statements,
    medquad_sentences,
    run_cache_audit,
    trial_groups,
)
from m3.rewards.claim_perturbation import TEST, TUNING, Pair, make_pairs
from m3.text.embed import LexicalEmbedder

SENTENCES = [
    "Take 5 mg of prednisone with food for 2 weeks.",
    "Symptoms include nausea, fever and rash.",
    "Acute pain in the knee is often caused by an injury.",
    "Children with high fever should not take aspirin.",
    "The tumor usually grows in the left kidney.",
    "Insulin may lower blood sugar in adults.",
]


def apply(which, kind: str, rule: str, text: str) -> str | None:
    return which[kind][rule](text, random.Random(0))


@pytest.mark.parametrize(
    ("which", "kind", "rule", "text", "changed"),
    [
        (TUNING, "number", "times_ten", SENTENCES[1], None),
        (TUNING, "negation", "no_not", SENTENCES[3], "Children with high fever should take aspirin."),
        (TUNING, "negation", "not", SENTENCES[2], "Acute pain in the knee is not often caused by an injury."),
        (TEST, "negation", "without", SENTENCES[0], "Take 5 mg of prednisone without food for 2 weeks."),
        (TEST, "modality", "modal", SENTENCES[5], "Insulin must lower blood sugar in adults."),
        (TEST, "rewording", "list", SENTENCES[1], "Symptoms include rash, nausea, and fever."),
        (TEST, "rewording", "opening", SENTENCES[5], "Keep in mind that insulin may lower blood sugar in adults."),
        (TEST, "rewording", "spelling", SENTENCES[4], "The tumour usually grows in the left kidney."),
        (TEST, "rewording", "fronted", SENTENCES[5], "In adults, insulin may lower blood sugar."),
        (TEST, "exchange", "roles", "Stress causes headaches.", "Headaches causes stress"),
        (TEST, "exchange", "numbers", SENTENCES[0], "Take 2 mg of prednisone with food for 5 weeks."),
    ],
)
def test_rules(which, kind, rule, text, changed):
    assert apply(which, kind, rule, text) == changed


@pytest.mark.parametrize("which", ["tuning", "test"])
def test_pairs_are_changed_once_each_and_seeded(which):
    pairs = list(make_pairs(SENTENCES, which, 4, 1))
    assert pairs == list(make_pairs(SENTENCES, which, 4, 1)) != list(make_pairs(SENTENCES, which, 4, 2))
    assert all(pair.claim != pair.changed for pair in pairs)
    assert {pair.kind for pair in pairs} >= {"number", "negation", "antonym", "drug", "rewording", "laterality"}


def test_counts_of_an_audit():
    pairs = [
        Pair(kind="number", rule="r", claim="Take 5 mg now", changed="Take 6 mg now"),
        Pair(kind="rewording", rule="r", claim="Kids may get a rash", changed="Children can get a rash."),
        Pair(kind="rewording", rule="r", claim="Rest helps healing", changed="Healing profits from rest"),
    ]
    found = audit_pairs(pairs, LexicalEmbedder(), 0.3)
    assert [hit for hit, _ in found] == [False, True, False]
    assert found[0][1] == pytest.approx(float(LexicalEmbedder()(["Take 5 mg now", "Take 6 mg now"]).prod(0).sum()))


def test_row_has_wilsons_bounds():
    row = KindRow(which="test", kind="number", pairs=400, hits=0, unguarded=(4, 2))
    assert row.rate == (0.0, 0.0, pytest.approx(0.009512, abs=1e-6)) and not row.harmless


def write_sets(folder) -> None:
    with gzip.open(folder / "medquad_nih_core.jsonl.gz", "wt") as file:
        file.write(json.dumps({"answer": " ".join(SENTENCES)}) + "\n")
    row = {"Must_have": [SENTENCES[0], "Rest."], "Nice_to_have": [" " + SENTENCES[5]]}
    (folder / "questions_w_answers.jsonl").write_text(json.dumps(row) + "\n")
    trials = [
        ["I have had a bad cough.", "No.", "Do you mean that it hurts?"],
        ["I have had a bad cough.", "It may hurt at night."],
        ["It can hurt at night!", "It can hurt all day."],
    ]
    with gzip.open(folder / "replay_dev.jsonl.gz", "wt") as file:
        for trial, said in enumerate(trials):
            turns = [{"role": "doctor", "text": "What brings you here today?"}]
            turns += [{"role": "patient", "text": "You are an AI doctor. Ask only one question."}]
            turns += [{"role": "patient", "text": text} for text in said]
            turns += [{"role": "doctor", "text": "Final Diagnosis: a cold, nothing else."}]
            file.write(json.dumps({"case_id": "1", "doctor": "d", "trial": trial, "turns": turns}) + "\n")


def test_audit_of_small_sets(tmp_path):
    write_sets(tmp_path)
    assert kqa_statements(tmp_path) == [SENTENCES[5], SENTENCES[0]]
    assert medquad_sentences(tmp_path) == sorted(SENTENCES)
    said = "Final Diagnosis: a cold, nothing else."
    cough, hurts = "I have had a bad cough.", "It may hurt at night."
    assert list(trial_groups(tmp_path)) == [
        [[cough, said], [cough, hurts, said], ["It can hurt at night!", "It can hurt all day.", said]]
    ]
    report = run_cache_audit(tmp_path, tmp_path, tmp_path, LexicalEmbedder(), per_kind=3, threshold=0.5)
    first = [(one.claims, one.l1, one.l2) for one in report.workload]
    assert first == [(2, 0, 0), (3, 2, 0), (3, 1, 1), (2, 2, 0), (3, 3, 0), (3, 2, 1)]
    assert report.stored == 4 and report.groups == 1
    assert "| 1 | 2 | 3 | 33.3% | 33.3% | 66.7% |" in report.markdown()


def test_bounds_hold_on_held_out_kinds():
    """The claim of docs/experiments/claim_cache.md, in small: no false hit in 60 pairs a kind, most rewordings hit."""
    sentences = medquad_sentences(shared_data("medquad"), every=24)
    pairs = list(make_pairs(sentences, "test", 60, 7))
    found = audit_pairs(pairs, LexicalEmbedder(), 0.7)
    false = [pair for pair, (hit, _) in zip(pairs, found, strict=True) if hit and pair.kind != "rewording"]
    assert [pair for pair in false if pair.kind != "conjunction"] == []
    assert len(false) <= 3, '"30 or more" and "30 and more" are the same'
    reworded = [hit for pair, (hit, _) in zip(pairs, found, strict=True) if pair.kind == "rewording"]
    assert sum(reworded) / len(reworded) > 0.85
