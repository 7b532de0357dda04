"""The fact-aware reward: equations 9 to 14 against plain loops, the choices the paper leaves open, and every edge."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m3.rewards.fact_aware import (
    Config,
    cluster,
    fact_penalty,
    fact_reward,
    naive_reward,
    representative,
    saliency,
    task_gate,
)
from m3.rewards.fact_verdicts import FactVerdict, Label
from m3.rewards.verdict import UnjudgedError
from m3.text.embed import LexicalEmbedder
from m3.text.words import sentences

LEXICAL = LexicalEmbedder()
RESPONSE = (
    "Aspirin irreversibly inhibits platelet aggregation. Ibuprofen can cause stomach bleeding. "
    "Paracetamol is the safest choice in pregnancy. See your doctor if the fever lasts."
)
CLAIMS = (
    "Aspirin irreversibly inhibits platelet aggregation.",
    "Aspirin inhibits platelet aggregation irreversibly.",
    "Ibuprofen can cause stomach bleeding.",
    "Paracetamol is the safest choice in pregnancy.",
    "Vitamin C cures pneumonia.",
)


def verdict(claim: str, label: str) -> FactVerdict:
    return FactVerdict(claim=claim, label=Label(label))


def verdicts(labels: str) -> list[FactVerdict]:
    """Of CLAIMS, by letter."""
    names = {"S": "supported", "R": "refuted", "U": "uncertain", "t": "timeout", "p": "unparsable"}
    return [verdict(claim, names[letter]) for claim, letter in zip(CLAIMS, labels, strict=False)]


# -- the reference: the equations, one loop each ----------------------------------------------------------------------
def reference(response: str, given: list[FactVerdict], task: float, threshold: float = 0.8) -> float:
    """Eq 10-14 with dictionaries and loops, clusters by merging lists until nothing changes."""

    def cos(left: str, right: str) -> float:
        a, b = (row.tolist() for row in LEXICAL([left, right]))
        return sum(x * y for x, y in zip(a, b, strict=True))

    bad = {i: one.label in ("refuted", "uncertain") for i, one in enumerate(given)}
    groups = [{i} for i in bad if given[i].label in ("supported", "refuted", "uncertain")]
    merged = True
    while merged:
        merged = False
        for a in range(len(groups)):
            for b in range(a + 1, len(groups)):
                pairs = [(i, j) for i in groups[a] for j in groups[b]]
                if any(cos(given[i].claim, given[j].claim) >= threshold and bad[i] == bad[j] for i, j in pairs):
                    groups[a] |= groups.pop(b)
                    merged = True
                    break
            if merged:
                break
    top = bottom = 0.0
    for group in groups:
        central = {i: sum(cos(given[i].claim, given[j].claim) for j in group) for i in sorted(group)}
        best = next(i for i in central if central[i] >= max(central.values()) - 1e-6)
        weight = max(0.0, max(cos(given[best].claim, sentence) for sentence in sentences(response)))
        top += weight * (1 if bad[best] else 0)
        bottom += weight
    fact = -top / (bottom + 1e-6)
    return task + fact / (1 + math.exp(-10 * (task - 0.85) / 0.2))


RANDOM = random.Random(0)
MIXES = ["".join(RANDOM.choice("SRUt"[: 4 if RANDOM.random() < 0.2 else 3]) for _ in range(5)) for _ in range(12)]


@pytest.mark.parametrize("task", [0.0, 0.6, 0.85, 1.0])
@pytest.mark.parametrize("labels", ["S", "R", "U", "SS", "SR", "RR", "SSSSS", "RRRRR", "UUUUU", *MIXES])
def test_reward_is_equations_10_to_14(labels, task):
    config = Config(max_unjudged=0.9)
    found = fact_reward(RESPONSE, verdicts(labels), LEXICAL, task, config)
    assert found.reward == pytest.approx(reference(RESPONSE, verdicts(labels), task), abs=1e-6)
    assert found.reward == found.task_reward + found.gate * found.penalty


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.sampled_from("aspirin fever dose child liver no not renal 5 10 mg".split()), min_size=1, max_size=8),
    st.lists(st.tuples(st.sampled_from(CLAIMS), st.sampled_from(["supported", "refuted", "uncertain"])), max_size=8),
    st.floats(0, 1),
)
def test_reward_of_any_claims(words, rows, task):
    given = [verdict(f"{claim} {words[i % len(words)]}", label) for i, (claim, label) in enumerate(rows)]
    found = fact_reward(RESPONSE, given, LEXICAL, task)
    assert found.reward == pytest.approx(reference(RESPONSE, given, task), abs=1e-5)
    assert -1 <= found.penalty <= 0
    assert sorted(i for one in found.clusters for i in one.members) == list(range(len(given)))


# -- edges ------------------------------------------------------------------------------------------------------------
def test_no_claims():
    found = fact_reward(RESPONSE, [], LEXICAL, 0.9)
    assert (found.reward, found.penalty, found.naive, found.clusters) == (0.9, 0.0, 0.9, ())


def test_an_empty_response_claims_nothing():
    assert fact_reward("", [], LEXICAL, 0.3).reward == 0.3
    with pytest.raises(ValueError, match="fact_reward: response: want a text with a sentence, having claims; got ''"):
        fact_reward("", verdicts("S"), LEXICAL, 0.3)


def test_one_supported_claim_costs_nothing():
    assert fact_reward(RESPONSE, verdicts("S"), LEXICAL, 0.9).reward == 0.9


@pytest.mark.parametrize("labels", ["R", "U", "RRRR", "UURR"])
def test_all_hallucinated_costs_the_whole_gate(labels):
    found = fact_reward(RESPONSE, verdicts(labels), LEXICAL, 0.95)
    assert found.penalty == pytest.approx(-1, abs=1e-5)
    assert found.reward == pytest.approx(0.95 - 1 / (1 + math.exp(-5)), abs=1e-5)


def test_saying_one_thing_five_times_counts_once():
    """Naively, four repetitions of a true claim dilute a false one; here they are one cluster."""
    few = [verdict(CLAIMS[0], "supported"), verdict(CLAIMS[2], "refuted")]
    many = [few[0]] * 5 + [few[1]]
    assert fact_reward(RESPONSE, many, LEXICAL, 0.9).reward == fact_reward(RESPONSE, few, LEXICAL, 0.9).reward
    assert fact_reward(RESPONSE, many, LEXICAL, 0.9).naive > fact_reward(RESPONSE, few, LEXICAL, 0.9).naive


def test_identical_claims_are_one_cluster_led_by_the_first():
    found = fact_reward(RESPONSE, [verdict(CLAIMS[0], "refuted")] * 3, LEXICAL, 0.9)
    assert [(one.members, one.representative) for one in found.clusters] == [((0, 1, 2), 0)]


def test_a_refuted_claim_does_not_vanish_behind_a_supported_one_that_reads_alike():
    given = [verdict(CLAIMS[0], "supported"), verdict(CLAIMS[1], "refuted")]
    found = fact_reward(RESPONSE, given, LEXICAL, 1.0)
    assert [one.members for one in found.clusters] == [(0,), (1,)]
    assert -0.55 < found.penalty < -0.45


def test_a_claim_the_response_hardly_makes_weighs_little():
    given = [verdict(CLAIMS[2], "supported"), verdict(CLAIMS[4], "refuted")]
    found = fact_reward(RESPONSE, given, LEXICAL, 1.0)
    assert found.clusters[0].saliency == pytest.approx(1, abs=1e-6)
    assert found.clusters[1].saliency < 0.3
    assert -0.25 < found.penalty <= 0


def test_zero_saliency_is_no_division():
    claims, spoken = np.eye(3, dtype=np.float32)[:2], np.eye(3, dtype=np.float32)[2:]
    weights = saliency(claims, spoken)
    assert weights.tolist() == [0.0, 0.0]
    assert fact_penalty(weights, np.array([True, True]), 1e-6) == 0.0


def test_a_negative_cosine_weighs_nothing():
    weights = saliency(np.array([[-1.0, 0], [0.6, 0.8]]), np.array([[1.0, 0]]))
    assert weights.tolist() == [0.0, 0.6]
    assert fact_penalty(weights, np.array([True, False]), 1e-6) == 0.0, "no bonus"


# -- claims without a verdict -----------------------------------------------------------------------------------------
def test_a_claim_without_verdict_is_left_out_and_counted():
    found = fact_reward(RESPONSE, verdicts("SSRSt"), LEXICAL, 0.9)
    assert found.reward == fact_reward(RESPONSE, verdicts("SSRS"), LEXICAL, 0.9).reward
    assert found.naive == pytest.approx(0.9 - 0.5 / 4)
    assert found.labels["timeout"] == 1
    assert sum(found.labels.values()) == 5


@pytest.mark.parametrize("labels", ["SSSt", "t", "tt", "SSStp"])
def test_too_many_without_verdict_is_no_reward(labels):
    with pytest.raises(UnjudgedError, match=f"of {len(labels)} claims have no verdict: .*timeout"):
        fact_reward(RESPONSE, verdicts(labels), LEXICAL, 0.9)


def test_failures_are_told_by_name():
    with pytest.raises(UnjudgedError, match="2 of 5 claims have no verdict: 1 unparsable, 1 timeout"):
        fact_reward(RESPONSE, verdicts("SSStp"), LEXICAL, 0.9)


# -- single equations -------------------------------------------------------------------------------------------------
GATES = {0.75: 1 / (1 + math.exp(5)), 0.85: 0.5, 0.95: 1 / (1 + math.exp(-5)), 0.0: 1 / (1 + math.exp(42.5))}


@pytest.mark.parametrize(("task", "gate"), GATES.items(), ids=str)
def test_gate_is_equation_13(task, gate):
    assert task_gate(task, Config()) == pytest.approx(gate, rel=1e-12)


@pytest.mark.parametrize(("task", "gate"), [(1e6, 1.0), (-1e6, 0.0), (1e308, 1.0), (-1e308, 0.0)])
def test_gate_is_stable_at_both_ends(task, gate):
    assert task_gate(task, Config()) == gate


def test_gate_rises():
    gates = [task_gate(i / 100, Config()) for i in range(101)]
    assert all(low < high for low, high in itertools.pairwise(gates))


@pytest.mark.parametrize(("bad", "total", "wanted"), [(0, 0, 0.8), (0, 4, 0.8), (1, 4, 0.675), (4, 4, 0.3)])
def test_naive_is_equation_9(bad, total, wanted):
    assert naive_reward(0.8, bad, total, 0.5) == pytest.approx(wanted, abs=1e-12)


def test_naive_counts_are_checked():
    with pytest.raises(ValueError, match=r"naive_reward: hallucinated: want an integer in \[0, 2\]; got 3"):
        naive_reward(0.8, 3, 2, 0.5)


def turned(*degrees: float) -> np.ndarray:
    return np.array([[math.cos(math.radians(one)), math.sin(math.radians(one))] for one in degrees], np.float32)


def test_clusters_are_chains():
    """0 - 30 - 60 degrees: the ends are linked through the middle; 200 stands alone."""
    rows = turned(0, 200, 60, 30)
    assert cluster(rows, np.zeros(4, bool), math.cos(math.radians(31))) == [[0, 2, 3], [1]]
    assert cluster(rows, np.array([False, False, False, True]), 0.8) == [[0], [1], [2], [3]]


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 1, 0, 2), (2, 3, 1, 0)])
def test_clusters_do_not_depend_on_order(order):
    rows = turned(0, 20, 40, 100)[list(order)]
    found = cluster(rows, np.zeros(4, bool), 0.9)
    assert {frozenset(order[i] for i in group) for group in found} == {frozenset({0, 1, 2}), frozenset({3})}


def test_the_middle_stands_for_its_cluster():
    assert representative(turned(0, 60, 30), [0, 1, 2]) == 2
    assert representative(turned(10, 50), [0, 1]) == 0, "the first of equals"


def test_no_claims_no_clusters():
    assert cluster(np.empty((0, 2)), np.empty(0, bool), 0.8) == []


WRONG = {
    "tau": ({"tau_min": 0.95}, "tau_min: want a number < tau_max 0.95; got 0.95"),
    "tau_inf": ({"tau_max": math.inf}, r"tau_max: want tau_max - tau_min finite; got \(0.75, inf\)"),
    "threshold": ({"cluster_threshold": 1.5}, r"cluster_threshold: want a number in \[-1, 1\]; got 1.5"),
    "unjudged": ({"max_unjudged": -0.1}, r"max_unjudged: want a number in \[0, 1\]; got -0.1"),
    "kappa": ({"kappa": 0.0}, "kappa: want a number > 0; got 0.0"),
    "alpha": ({"alpha": -1.0}, "alpha: want a number >= 0; got -1.0"),
}


@pytest.mark.parametrize(("changes", "message"), WRONG.values(), ids=WRONG)
def test_config_is_checked(changes, message):
    with pytest.raises(ValueError, match=f"fact_aware.Config: {message}"):
        Config(**changes)


@pytest.mark.parametrize("task", [math.nan, math.inf])
def test_a_task_reward_that_is_no_number(task):
    with pytest.raises(ValueError, match="fact_reward: task_reward: want a finite number; got"):
        fact_reward(RESPONSE, [], LEXICAL, task)


@pytest.mark.parametrize("broken", ["Aspirin thins the blood.", RESPONSE])
def test_an_embedding_that_is_no_number(broken):
    """Of the claim, or of a sentence of the response."""

    class Broken:
        name, dim = "broken", 2

        def __call__(self, texts):
            return np.array([[math.nan, 0.0] if text in broken else [1.0, 0.0] for text in texts], np.float32)

    verdicts = [FactVerdict(claim="Aspirin thins the blood.", label=Label.refuted)]
    with pytest.raises(ValueError, match="embedder: want rows of finite numbers; got nan or inf by broken"):
        fact_reward(RESPONSE, verdicts, Broken(), 0.9)


def test_a_verdict_survives_json():
    one = FactVerdict(
        claim="c", label=Label.refuted, evidence=("p1", "p2"), explanation="x", verifier="v", searches=2, malformed=1
    )
    assert FactVerdict.from_json(one.to_json()) == one
    assert FactVerdict.from_json({"claim": "c", "label": "timeout"}).label is Label.timeout
    with pytest.raises(ValueError, match="'maybe' is not a valid Label"):
        FactVerdict.from_json({"claim": "c", "label": "maybe"})
