"""Claims: each rule of extraction by sentence, a whole response, and a language model that answers well or badly."""

from __future__ import annotations

import asyncio
import json

import pytest

from m3.rewards.claims import ChatExtractor, Claim, Extractor, ScriptedExtractor, extract_claims
from m3.rewards.fact_verdicts import Label
from m3.rollout.chat import ChatError, Failure, Reply


def texts(response: str) -> list[str]:
    return [claim.text for claim in extract_claims(response)]


RULES = {
    "one_fact": ("Aspirin thins the blood.", ["Aspirin thins the blood."]),
    "clauses_part": (
        "Viral colds clear up on their own; antibiotics are not needed.",
        ["Viral colds clear up on their own.", "Antibiotics are not needed."],
    ),
    "clauses_with_subjects_part": (
        "Ibuprofen reduces fever, but it can irritate the stomach.",
        ["Ibuprofen reduces fever.", "Ibuprofen can irritate the stomach."],
    ),
    "verbs_of_one_subject_part": (
        "Aspirin reduces fever and relieves pain.",
        ["Aspirin reduces fever.", "Aspirin relieves pain."],
    ),
    "nouns_stay_together": (
        "Metformin can cause nausea and vomiting.",
        ["Metformin can cause nausea and vomiting."],
    ),
    "objects_of_a_list_part": (
        "Symptoms of flu include fever, dry cough, and body aches.",
        ["Symptoms of flu include fever.", "Symptoms of flu include dry cough.", "Symptoms of flu include body aches."],
    ),
    "alternatives_stay_together": (
        "Causes of cough include asthma, reflux, or smoking.",
        ["Causes of cough include asthma, reflux, or smoking."],
    ),
    "a_condition_stays": (
        "If the fever lasts over three days, and the rash spreads, antibiotics are needed.",
        ["If the fever lasts over three days, and the rash spreads, antibiotics are needed."],
    ),
    "it_is_the_last_singular": (
        "Lexapro treats depression. It is taken once daily.",
        ["Lexapro treats depression.", "Lexapro is taken once daily."],
    ),
    "they_are_the_last_plural": (
        "Statins lower cholesterol. Grapefruit is a fruit. They can cause muscle pain.",
        ["Statins lower cholesterol.", "Grapefruit is a fruit.", "Statins can cause muscle pain."],
    ),
    "this_drug": (
        "Warfarin interacts with many antibiotics. This drug needs monitoring.",
        ["Warfarin interacts with many antibiotics.", "Warfarin needs monitoring."],
    ),
    "its_effect": (
        "Digoxin slows the heart. Its half-life is about 40 hours.",
        ["Digoxin slows the heart.", "Digoxin's half-life is about 40 hours."],
    ),
    "symptoms_are_somebodys": (
        "Esophagitis is an inflammation of the esophagus. Symptoms may include painful swallowing.",
        ["Esophagitis is an inflammation of the esophagus.", "Symptoms of Esophagitis may include painful swallowing."],
    ),
    "it_of_nothing_is_dropped": ("It is usually harmless.", []),
    "expletive_it_is_no_pronoun": (
        "It is important to finish the whole course of antibiotics.",
        ["It is important to finish the whole course of antibiotics."],
    ),
    "fragments_are_dropped": ("Probably a virus. Twice a day. Rest and fluids.", []),
    "questions_are_dropped": ("How long does the fever last? Does it hurt?", []),
    "talk_is_dropped": ("Hello! I'm sorry to hear that. I hope this helps! Feel free to ask more questions.", []),
    "a_bare_referral_is_dropped": ("You should consult your doctor before changing anything at all.", []),
    "a_referral_with_a_condition_stays": (
        "See a doctor if the headache is sudden.",
        ["Patients should see a doctor if the headache is sudden."],
    ),
    "openers_go": ("However, in fact, aspirin thins the blood.", ["Aspirin thins the blood."]),
    "yes_goes": ("Yes, aspirin thins the blood.", ["Aspirin thins the blood."]),
    "advice_is_a_statement": (
        "Take ibuprofen with food. Do not drive. Never stop steroids suddenly.",
        [
            "Patients should take ibuprofen with food.",
            "Patients should not drive.",
            "Patients should not stop steroids suddenly.",
        ],
    ),
    "advice_with_a_condition": (
        "If you miss a dose, skip it on that day.",
        ["If patients miss a dose, patients should skip it on that day."],
    ),
    "its_object_is_named": (
        "Lexapro treats depression. Take it with food.",
        ["Lexapro treats depression.", "Patients should take Lexapro with food."],
    ),
    "an_activity_is_no_order": ("Exercise improves mood.", ["Exercise improves mood."]),
    "you_are_patients": ("You should drink 2 litres a day.", ["Patients should drink 2 litres a day."]),
    "no_claim_twice": ("Aspirin thins the blood. ASPIRIN thins the blood!", ["Aspirin thins the blood."]),
    "nothing": ("", []),
    "blank_lines": ("\n \n", []),
}


@pytest.mark.parametrize(("response", "wanted"), RULES.values(), ids=RULES)
def test_rule(response, wanted):
    assert texts(response) == wanted


def test_items_join_the_line_that_opens_their_list():
    response = "Lexapro is a drug.\nCommon side effects include:\n- Nausea\n* **Dry mouth**\n\nIt is taken daily."
    assert texts(response) == [
        "Lexapro is a drug.",
        "Common side effects of Lexapro include nausea.",
        "Common side effects of Lexapro include dry mouth.",
        "Lexapro is taken daily.",
    ]


def test_a_list_of_conditions():
    response = "Seek medical attention if:\n1. Your tongue hurts\n2. You have trouble eating"
    assert texts(response) == [
        "Patients should seek medical attention if their tongue hurts.",
        "Patients should seek medical attention if patients have trouble eating.",
    ]


def test_recited_options_are_dropped():
    response = (
        "Strep throat is caused by bacteria.\nA. Amoxicillin is an antifungal.\nB) Doxycycline treats viruses.\n"
        "(C) Rest is harmful.\nOption B is wrong because doxycycline is no antiviral.\nPenicillin treats strep throat."
    )
    assert texts(response) == ["Strep throat is caused by bacteria.", "Penicillin treats strep throat."]


def test_a_single_letter_is_no_option():
    assert texts("A. Vitamin A is stored in the liver.") == ["Vitamin A is stored in the liver."]


def test_a_claim_knows_its_sentence():
    assert extract_claims("Hello! Aspirin thins the blood and reduces fever. It is cheap.") == [
        Claim(text="Aspirin thins the blood.", sentence="Aspirin thins the blood and reduces fever.", index=1),
        Claim(text="Aspirin reduces fever.", sentence="Aspirin thins the blood and reduces fever.", index=1),
        Claim(text="Aspirin is cheap.", sentence="It is cheap.", index=2),
    ]


def test_scripted_extractor_is_the_rules():
    extractor = ScriptedExtractor()
    found = asyncio.run(extractor.extract("Aspirin thins the blood."))
    assert [claim.text for claim in found.claims] == ["Aspirin thins the blood."]
    assert (found.failure, extractor.scripted, isinstance(extractor, Extractor)) == (None, True, True)


# -- a language model -------------------------------------------------------------------------------------------------
class Script:
    """A chat client that replies in turn, and keeps what it was asked."""

    model = "script"

    def __init__(self, *replies: str | Exception, delay: float = 0.0) -> None:
        self.replies, self.delay = list(replies), delay
        self.calls: list[dict] = []

    async def chat(self, messages, **options):
        self.calls.append({"messages": messages, **options})
        await asyncio.sleep(self.delay)
        reply = self.replies.pop(0)
        if isinstance(reply, Exception):
            raise reply
        return Reply(text=reply)


RESPONSE = "Aspirin thins the blood. It is taken daily."
GOOD = json.dumps({"claims": ["Aspirin thins the blood.", "Aspirin is taken daily.", "aspirin thins the blood"]})


def extract(client, response=RESPONSE, **options):
    return asyncio.run(ChatExtractor(client, **options).extract(response, "What does aspirin do?"))


def test_a_model_extracts():
    client = Script(GOOD)
    found = extract(client)
    assert found.claims == (
        Claim(text="Aspirin thins the blood.", sentence="Aspirin thins the blood.", index=0),
        Claim(text="Aspirin is taken daily.", sentence="It is taken daily.", index=1),
    )
    asked = client.calls[0]["messages"][0]["content"]
    assert "What does aspirin do?" in asked and RESPONSE in asked
    assert client.calls[0]["json_schema"]["required"] == ["claims"]


def test_no_claims_is_an_answer():
    found = extract(Script('{"claims": []}'))
    assert (found.claims, found.failure) == ((), None)


def test_a_bad_reply_is_asked_for_again_with_another_seed():
    client = Script("I found these claims: aspirin.", '{"claims": "aspirin"}', "```json\n" + GOOD + "\n```")
    found = extract(client)
    assert (len(found.claims), found.malformed, found.failure) == (2, 2, None)
    assert [call["seed"] for call in client.calls] == [0, 1, 2]
    assert [call["temperature"] > 0 for call in client.calls] == [False, True, True]


def test_bad_replies_are_an_outcome_with_a_name():
    found = extract(Script("no", "{", "[1]"), retries=2)
    assert (found.claims, found.failure, found.malformed) == ((), Label.unparsable, 3)
    assert found.explanation == "no list of claims in 3 replies"


FAILURES = {
    Failure.timeout: Label.timeout,
    Failure.unreachable: Label.unreachable,
    Failure.refused: Label.unreachable,
    Failure.over_budget: Label.over_budget,
}


@pytest.mark.parametrize(("failure", "label"), FAILURES.items())
def test_no_answer_is_an_outcome_with_a_name(failure, label):
    found = extract(Script(ChatError(failure, "why")))
    assert (found.claims, found.failure, found.explanation) == ((), label, "why")


def test_a_slow_answer_is_a_timeout():
    assert extract(Script(GOOD, delay=5.0), timeout=0.02).failure is Label.timeout


def test_an_empty_response_is_not_asked_about():
    client = Script()
    assert extract(client, response=" \n").claims == ()
    assert client.calls == []


def test_retries_are_checked():
    with pytest.raises(ValueError, match="ChatExtractor: retries: want an integer >= 0; got -1"):
        ChatExtractor(Script(), retries=-1)
