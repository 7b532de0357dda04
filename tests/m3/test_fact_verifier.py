"""Fact verifiers: words against words, the agents' searches and decisions, failures by name, audits by hand."""

from __future__ import annotations

import asyncio
import csv
import json
import math

import numpy as np
import pytest

from m3.rewards import entailment
from m3.rewards.claims import Claim
from m3.rewards.entailment import GIVEN, weigh
from m3.rewards.evidence import Evidence, Passage
from m3.rewards.fact_verdicts import FactVerdict, Label
from m3.rewards.fact_verifier import ChatVerifier, Config, FactVerifier, ScriptedVerifier
from m3.rewards.verifier_audit import agreement, audit_corpus, audit_kqa, make_claims
from m3.rollout.chat import Budget, ChatError, Failure, Reply, Usage
from tests.m3.clinic_cases import shared_data

S, R, U = Label.supported, Label.refuted, Label.uncertain

# -- words against words ----------------------------------------------------------------------------------------------
FINDINGS = {
    "the_same": ("Aspirin thins the blood.", "Aspirin thins the blood.", S),
    "inflected": ("Aspirin thins blood.", "Blood is thinned by aspirin.", S),
    "among_others": ("Aspirin thins the blood.", "Rest helps. Aspirin thins the blood, as every doctor knows.", S),
    "across_two_sentences": ("Ibuprofen relieves pain and fever.", "Ibuprofen relieves pain. It lowers fever too.", S),
    "another_subject": ("Aspirin thins the blood.", "Fractures heal in six weeks.", U),
    "nothing": ("Aspirin thins the blood.", "", U),
    "no_content": ("It is what it is.", "Aspirin thins the blood.", U),
    "negated": ("Aspirin thins the blood.", "Aspirin does not thin the blood.", R),
    "claim_negated": ("Aspirin does not thin the blood.", "Aspirin thins the blood.", R),
    "both_negated": ("Antibiotics do not cure viral colds.", "Viral colds are not cured by antibiotics.", S),
    "negation_elsewhere": ("Aspirin thins the blood.", "Do not drive. Aspirin thins the blood.", S),
    "antonym": ("Caffeine increases blood pressure.", "Caffeine decreases blood pressure.", R),
    "antonym_negated": ("Caffeine increases blood pressure.", "Caffeine never decreases blood pressure.", S),
    "both_antonyms_in_the_claim": (
        "High sodium and low potassium raise pressure.",
        "High sodium and low potassium raise pressure.",
        S,
    ),
    "same_quantity": ("The dose of aspirin is 0.5 g daily.", "The dose of aspirin is 500 mg daily.", S),
    "same_time": ("The rash lasts 24 hours.", "The rash lasts one day.", S),
    "other_quantity": ("The dose of aspirin is 100 mg.", "The dose of aspirin is 500 mg.", R),
    "quantity_not_said": ("The dose of aspirin is 100 mg.", "The dose of aspirin is known.", U),
    "population": ("Aspirin is safe for adults.", "Aspirin is safe for children.", R),
}


@pytest.mark.parametrize(("claim", "text", "label"), FINDINGS.values(), ids=FINDINGS)
def test_words_against_words(claim, text, label):
    assert weigh(claim, text).label is label


def test_coverage_is_a_share_by_hand():
    """aspirin, thin, blood, quick: three of four; by weight 1 + 2 + 3 of 10."""
    claim, text = "Aspirin thins blood quickly.", "Aspirin thins blood."
    assert weigh(claim, text).coverage == pytest.approx(3 / 4)
    weights = {"aspirin": 1.0, "thin": 2.0, "blood": 3.0, "quick": 4.0}
    found = weigh(claim, text, weight=weights.__getitem__)
    assert found.coverage == pytest.approx(6 / 10)
    assert (found.label, found.reason) == (U, "nothing is said of quick")


def test_context_names_the_subject_but_is_not_the_evidence():
    claim = "Warfarin needs regular blood tests."
    assert weigh(claim, "Regular blood tests are needed.", context=["warfarin"]).label is S
    assert weigh(claim, "Ask your doctor.", context=entailment.content(claim)).coverage == 0.0


def test_a_rare_word_must_be_said():
    rarity = {"syphili": 9.0, "white": 3.0, "tongu": 4.0, "caus": 1.0}.__getitem__
    text = "A white tongue is caused by dry mouth."
    assert weigh("Syphilis causes a white tongue.", text, weight=rarity).label is U
    assert weigh("Syphilis causes a white tongue.", text, config=entailment.Config(anchors=0)).label is S, "the danger"


class Synonyms:
    """Hears "heart attack" in "myocardial infarction", and nothing else."""

    name, dim = "synonyms", 2

    def __call__(self, texts):
        heard = [("heart attack" in text or "infarction" in text) for text in texts]
        return np.array([[1.0, 0.0] if one else [0.0, 1.0] for one in heard], np.float32)


def test_an_embedder_hears_synonyms_and_excuses_nothing_else():
    claim = "A heart attack can last 24 hours."
    said = "Myocardial infarction may go on for one day."
    assert weigh(claim, said).label is U
    assert weigh(claim, said, embedder=Synonyms()).reason == "the like is said"
    assert weigh(claim, said.replace("one day", "two days"), embedder=Synonyms()).label is not S
    assert weigh(claim, said.replace("may", "does not"), embedder=Synonyms()).label is not S
    assert weigh(claim, "It passes.", embedder=Synonyms()).label is U
    assert weigh(claim, "", embedder=Synonyms()).label is U


WRONG_RULES = {
    "support": ({"support": 0.0}, r"support: want a number in \(0, 1\]; got 0.0"),
    "stretch": ({"stretch": 0}, "stretch: want an integer >= 1; got 0"),
    "anchors": ({"anchors": -1}, "anchors: want an integer >= 0; got -1"),
}


@pytest.mark.parametrize(("changes", "message"), WRONG_RULES.values(), ids=WRONG_RULES)
def test_rules_are_checked(changes, message):
    with pytest.raises(ValueError, match=f"entailment.Config: {message}"):
        entailment.Config(**changes)


# -- the scripted agent -----------------------------------------------------------------------------------------------
LIBRARY = Evidence(
    [
        Passage(id="aspirin", title="Aspirin", text="It thins the blood. The usual dose of aspirin is 500 mg."),
        Passage(id="gout", title="Gout", text="Colchicine treats gout. Gout is caused by uric acid crystals."),
        Passage(id="flu", title="Flu", text="Influenza is caused by a virus. Antibiotics do not cure influenza."),
        Passage(id="filler-1", text="Fractures heal in six weeks."),
        Passage(id="filler-2", text="Sleep is good for memory."),
    ]
)


def check(*claims: str, verifier: FactVerifier | None = None) -> list[FactVerdict]:
    return asyncio.run((verifier or ScriptedVerifier(LIBRARY)).verify(claims))


def test_a_script_finds_and_labels():
    found = check(
        "Colchicine treats gout.", "Antibiotics cure influenza.", "The dose of aspirin is 2 g.", "Zinc fights warts."
    )
    assert [one.label for one in found] == [S, R, R, U]
    assert [one.evidence for one in found] == [("gout",), ("flu",), ("aspirin",), ()]
    assert found[0].explanation == "the same is said (100% of the claim): Colchicine treats gout."
    assert found[3].explanation == "nothing was found"


def test_it_stops_when_evidence_suffices_and_goes_on_when_not():
    sure, unsure = check("Colchicine treats gout.", "Colchicine treats warts in gout.")
    assert sure.searches == 1
    assert unsure.searches > 1


def test_searches_are_bounded():
    one = check("Colchicine treats warts in gout.", verifier=ScriptedVerifier(LIBRARY, Config(max_searches=1)))
    assert one[0].searches == 1


def test_passages_that_disagree_are_uncertain():
    library = Evidence([Passage(id="a", text="Zinc cures warts."), Passage(id="b", text="Zinc does not cure warts.")])
    (found,) = check("Zinc cures warts.", verifier=ScriptedVerifier(library))
    assert (found.label, found.evidence) == (U, ("a", "b"))
    assert found.explanation == "passages disagree: Zinc cures warts. | Zinc does not cure warts."


def test_equal_claims_are_verified_once_and_order_is_kept():
    budget = Budget()
    verifier = ScriptedVerifier(LIBRARY, budget=budget)
    claim = Claim(text="Colchicine treats gout.", sentence="", index=0)
    found = asyncio.run(verifier.verify(["Antibiotics cure influenza.", claim, "Colchicine treats gout."]))
    assert [one.label for one in found] == [R, S, S]
    assert budget.calls_made == 2


def test_no_claims():
    assert check() == []


def test_a_name_tells_rules_apart():
    names = {
        ScriptedVerifier(LIBRARY).name,
        ScriptedVerifier(LIBRARY, rules=GIVEN).name,
        ScriptedVerifier(LIBRARY, embedder=Synonyms()).name,
        ScriptedVerifier(LIBRARY, Config(max_searches=2)).name,
    }
    assert len(names) == 4


def test_a_spent_budget_is_an_outcome_with_a_name():
    found = check("Colchicine treats gout.", verifier=ScriptedVerifier(LIBRARY, budget=Budget(calls=0)))
    assert (found[0].label, found[0].explanation) == (Label.over_budget, "budget: spent: calls 0 of 0")


class Keeper:
    """A cache: keeps verdicts that are verdicts."""

    def __init__(self) -> None:
        self.kept: dict[str, FactVerdict] = {}

    async def get_or_verify(self, claim, verify):
        if claim not in self.kept:
            verdict = await verify()
            if not verdict.label.judged:
                return verdict
            self.kept[claim] = verdict
        return self.kept[claim]


def test_a_cache_is_asked_first():
    cache, budget = Keeper(), Budget()
    verifier = ScriptedVerifier(LIBRARY, cache=cache, budget=budget)
    first, again = (check("Colchicine treats gout.", verifier=verifier) for _ in range(2))
    assert first == again
    assert budget.calls_made == 1


def test_a_cached_verdict_is_of_the_claim_that_was_asked():
    class Near:
        async def get_or_verify(self, claim, verify):
            return FactVerdict(claim="worded otherwise", label=S, cached=True)

    (found,) = check("Colchicine treats gout.", verifier=ScriptedVerifier(LIBRARY, cache=Near()))
    assert (found.claim, found.cached) == ("Colchicine treats gout.", True)


# -- a language model as agent ----------------------------------------------------------------------------------------
class Script:
    """A chat client that replies in turn, and keeps what it was asked."""

    model = "script"

    def __init__(self, *replies: object, delay: float = 0.0) -> None:
        self.replies = [json.dumps(one) if isinstance(one, dict) else one for one in replies]
        self.delay = delay
        self.calls: list[dict] = []

    async def chat(self, messages, **options):
        self.calls.append({"messages": [dict(one) for one in messages], **options})
        await asyncio.sleep(self.delay)
        reply = self.replies.pop(0)
        if isinstance(reply, Exception):
            raise reply
        return Reply(text=reply, usage=Usage(prompt_tokens=10, completion_tokens=5))


def search(query: str) -> dict:
    return {"action": "search", "query": query}


def say(label: str, *evidence: str) -> dict:
    return {"action": "verdict", "label": label, "evidence": list(evidence), "explanation": "why"}


def ask(script: Script, claim: str = "Colchicine treats gout.", budget: Budget | None = None, **config) -> FactVerdict:
    verifier = ChatVerifier(script, LIBRARY, Config(**config), budget=budget)
    return check(claim, verifier=verifier)[0]


def test_a_model_searches_and_labels():
    script = Script(search("colchicine gout"), say("supported", "E1"))
    found = ask(script)
    assert found == FactVerdict(
        claim="Colchicine treats gout.",
        label=S,
        evidence=("gout",),
        explanation="why",
        verifier="script/verifier-1-5x5",
        searches=1,
    )
    shown = script.calls[1]["messages"][-1]["content"]
    assert shown.startswith("[E1] Gout\nColchicine treats gout.")
    assert shown.endswith("Searches left: 4")


def test_it_decides_itself_how_often_to_search():
    script = Script(search("colchicine"), search("gout"), search("zebra"), say("Uncertain"))
    found = ask(script)
    assert (found.label, found.searches, found.malformed) == (U, 3, 0)
    assert "[E1] (shown above)" in script.calls[2]["messages"][-1]["content"]
    assert script.calls[3]["messages"][-1]["content"].startswith("Nothing was found.")


def test_no_search_beyond_the_bound():
    script = Script(search("colchicine"), search("gout"), say("supported", "E1"))
    found = ask(script, max_searches=1)
    assert (found.label, found.searches, found.malformed) == (S, 1, 1)
    assert script.calls[1]["messages"][-1]["content"].endswith("No search is left: give your verdict.")


NO_STEP = {
    "prose": "It is true.",
    "unknown_label": say("probably"),
    "no_action": {"label": "supported"},
    "empty_query": search(" "),
    "cites_nothing": say("supported"),
    "cites_what_was_not_shown": say("refuted", "E7"),
    "evidence_is_no_list": {"action": "verdict", "label": "refuted", "evidence": "E1"},
}


@pytest.mark.parametrize("reply", NO_STEP.values(), ids=NO_STEP)
def test_a_reply_that_is_no_step_is_asked_for_again_and_counted(reply):
    script = Script(search("gout"), reply, say("supported", "E1"))
    found = ask(script)
    assert (found.label, found.malformed) == (S, 1)
    assert script.calls[1]["messages"] == script.calls[2]["messages"]
    assert [call["seed"] for call in script.calls] == [0, 0, 1]


def test_replies_that_are_no_step_end_unparsable():
    found = ask(Script("a", "b", "c"))
    assert (found.label, found.malformed, found.explanation) == (Label.unparsable, 3, "3 replies that are no step")


FAILURES = {
    Failure.timeout: Label.timeout,
    Failure.unreachable: Label.unreachable,
    Failure.refused: Label.unreachable,
    Failure.over_budget: Label.over_budget,
}


@pytest.mark.parametrize(("failure", "label"), FAILURES.items())
def test_no_answer_is_an_outcome_with_a_name(failure, label):
    found = ask(Script(ChatError(failure, "why")))
    assert (found.label, found.explanation) == (label, "why")


def test_a_slow_claim_is_a_timeout():
    assert ask(Script(say("uncertain"), delay=5.0), timeout=0.02).label is Label.timeout


def test_a_budget_counts_calls_and_tokens():
    budget = Budget(calls=2)
    assert ask(Script(search("gout"), search("gout"), say("uncertain")), budget=budget).label is Label.over_budget
    assert (budget.calls_made, budget.tokens_used) == (2, 30)


WRONG_CONFIG = {
    "searches": ({"max_searches": 0}, "max_searches: want an integer >= 1; got 0"),
    "retries": ({"retries": -1}, "retries: want an integer >= 0; got -1"),
    "timeout": ({"timeout": 0.0}, "timeout: want a number > 0; got 0.0"),
}


@pytest.mark.parametrize(("changes", "message"), WRONG_CONFIG.values(), ids=WRONG_CONFIG)
def test_config_is_checked(changes, message):
    with pytest.raises(ValueError, match=f"fact_verifier.Config: {message}"):
        Config(**changes)


# -- audits -----------------------------------------------------------------------------------------------------------
def test_agreement_by_hand():
    """Truth SSSUUR, said SSUUUS (and one timeout): F1 2/3, 4/5, 0; chance (9 + 6 + 0) / 36."""
    pairs = [(S, S), (S, S), (S, U), (U, U), (U, U), (R, S), (U, Label.timeout)]
    found = agreement(pairs, unanimous=[True, False])
    assert found.f1 == pytest.approx({"supported": 2 / 3, "refuted": 0.0, "uncertain": 4 / 5})
    assert found.macro_f1 == pytest.approx((2 / 3 + 4 / 5) / 3)
    assert found.accuracy == pytest.approx(4 / 6)
    assert found.kappa == pytest.approx((4 / 6 - 15 / 36) / (1 - 15 / 36))
    assert found.confusion["refuted"] == {"supported": 1, "refuted": 0, "uncertain": 0}
    assert (found.claims, found.judged, found.failures) == (7, 6, {"timeout": 1})
    assert (found.majority_share, found.unanimous) == (3 / 7, 0.5)


def test_agreement_of_nothing():
    with pytest.raises(ValueError, match="agreement: labels: want a claim that was judged; got none of 1"):
        agreement([(S, Label.timeout)])


def test_an_audit_reads_physicians_labels(tmp_path):
    columns = ["Question", "answer", "claim", "majority_label", "label_0", "label_1", "label_2"]
    with (tmp_path / "nli.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerow(["q", "Aspirin thins the blood.\nRest.", "Aspirin thins the blood.", *["Entailment"] * 4])
        writer.writerow(["q", "Aspirin thins the blood.\nRest.", "Zinc cures warts.", *["Neutral"] * 3, "Entailment"])
        writer.writerow(["q", "Zinc is no cure for warts.", "Zinc is a cure for warts.", *["Contradiction"] * 4])

    def make(evidence):
        return ScriptedVerifier(evidence, rules=GIVEN)

    found = asyncio.run(audit_kqa(tmp_path / "nli.csv", make))
    assert (found.claims, found.macro_f1, found.kappa) == (3, 1.0, 1.0)
    assert found.unanimous == pytest.approx(2 / 3)
    assert found.scripted


def test_an_audit_refuses_an_unknown_split(tmp_path):
    with pytest.raises(ValueError, match="audit_kqa: split: want 'all', 'tuning' or 'test'; got 'dev'"):
        asyncio.run(audit_kqa(tmp_path / "x.csv", ScriptedVerifier, split="dev"))


def test_the_rules_beat_the_majority_on_real_physicians():
    path = shared_data("kqa") / "NLI_medical_annotator.csv"
    found = asyncio.run(audit_kqa(path, lambda evidence: ScriptedVerifier(evidence, rules=GIVEN), split="test"))
    assert found.judged == found.claims > 100
    assert found.accuracy > found.majority_share
    assert 0.05 < found.kappa < 0.5, "above chance, and far from a physician"


def make_corpus() -> Evidence:
    names = ["alphitis", "betosis", "gammoma", "deltemia", "epsilopathy", "zetalgia"]
    rows = [
        Passage(
            id=str(i),
            title=f"What is {name}?",
            text=f"The disease {name} is treated with {10 + i} tablets of drug{i}zol.",
        )
        for i, name in enumerate(names)
    ]
    return Evidence([*rows, *(Passage(id=f"f{i}", text=f"Filler number{i} says nothing.") for i in range(700))])


def test_claims_are_made_from_the_evidence():
    made = make_claims(make_corpus(), n=3, seed=0)
    assert {kind: len(claims) for kind, claims in made.items()} == {
        "as_is": 3,
        "subject": 3,
        "number": 3,
        "negation": 3,
    }
    assert made == make_claims(make_corpus(), n=3, seed=0)
    assert made != make_claims(make_corpus(), n=3, seed=1)
    assert "is not treated" in made["negation"][0]


def test_an_audit_of_the_rules_on_their_corpus():
    found = asyncio.run(audit_corpus(ScriptedVerifier(make_corpus()), n=3))
    assert found["as_is"]["supported"] == 3
    assert found["subject"]["supported"] == found["number"]["supported"] == found["negation"]["supported"] == 0


def test_rarity_by_hand():
    assert LIBRARY.rarity("gout") == pytest.approx(math.log(1 + 4.5 / 1.5))
    assert LIBRARY.rarity("zebra") == pytest.approx(math.log(1 + 5.5 / 0.5))
