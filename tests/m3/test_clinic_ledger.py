"""The fact ledger: what a patient's words disclosed, leaked, contradicted, invented."""

from __future__ import annotations

import asyncio
import re
import time

import pytest
from clinic_cases import small_case, small_row

from m3.environment.case import Case, own_cases
from m3.environment.episode import run_inquiry
from m3.environment.ledger import DIAGNOSIS, Ledger, LedgerEntry, numbers
from m3.environment.patient import ScriptedPatient
from m3.environment.physicians import POLICIES

# physician's words, patient's words, disclosed, leaked, contradicted, invented
ENTRIES = {
    "verbatim": ("Do you smoke?", "I smoke about twenty a day.", ["smoking"], [], [], []),
    "paraphrase": ("Do you smoke?", "Yes, twenty cigarettes a day, I'm afraid.", ["smoking"], [], [], []),
    "digits_for_words": ("Do you smoke?", "I smoke 20 a day.", ["smoking"], [], [], []),
    "bare_no_to_an_absent_fact": ("Any fever?", "No.", ["no-fever"], [], [], []),
    "bare_yes_to_a_present_fact": ("Does it spread?", "Yes, it does.", ["radiation"], [], [], []),
    "bare_yes_to_an_absent_fact": ("Any fever?", "Yes.", [], [], ["no-fever"], []),
    "bare_no_to_a_present_fact": ("Do you smoke?", "No, never.", [], [], ["smoking"], []),
    "other_polarity": ("Any fever?", "I had a fever last night.", [], [], ["no-fever"], []),
    "denied": ("Do you smoke?", "I don't smoke cigarettes.", [], [], ["smoking"], []),
    "other_number": ("Do you smoke?", "I smoke about five a day.", [], [], ["smoking"], []),
    "not_asked": ("Any fever?", "No fever. I smoke about twenty a day.", ["smoking", "no-fever"], ["smoking"], [], []),
    "volunteered": ("Any fever?", "It started about three hours ago.", ["pain"], [], [], []),
    "symptom_in_no_fact": ("How are you?", "I have a rash on my knee.", [], [], [], ["rash", "knee"]),
    "denial_in_no_fact": ("Any vomiting?", "No, no vomiting.", [], [], [], ["vomiting"]),
    "drug_in_no_fact": ("Any tablets?", "I take amlodipine.", [], [], [], ["amlodipine"]),
    "quantity_in_no_fact": ("How are you?", "I waited 45 minutes for the bus.", [], [], [], ["45"]),
    "names_the_diagnosis": ("How are you?", "I think it is a heart attack.", [], [DIAGNOSIS], [], ["heart"]),
    "unknown": ("Any vomiting?", "I don't know about vomiting, sorry.", [], [], [], []),
    "asks_back": ("Any vomiting?", "Is it a heart problem?", [], [], [], []),
    "small_talk": ("How are you?", "Thank you for seeing me so quickly.", [], [], [], []),
    "nothing": ("How are you?", "", [], [], [], []),
}


@pytest.mark.parametrize(
    ("asked", "answer", "disclosed", "leaked", "contradicted", "invented"), ENTRIES.values(), ids=ENTRIES
)
def test_entry(asked, answer, disclosed, leaked, contradicted, invented):
    entry = Ledger(small_case()).check(asked, answer)
    assert sorted(entry.disclosed) == sorted(disclosed)
    assert list(entry.leaked) == leaked
    assert list(entry.contradicted) == contradicted
    assert list(entry.invented) == invented
    assert len(entry.reasons) == len(leaked) + len(contradicted) + len(invented)
    assert entry.clean == (not entry.reasons)


def test_opening_line_discloses_its_facts():
    case = small_case()
    assert Ledger(case).check("", case.opening_line) == LedgerEntry(disclosed=("pain",))


def test_findings_of_an_examination_are_leaked_even_when_asked_for():
    row = small_row()
    row["facts"].append(
        {
            "id": "murmur",
            "text": "A pansystolic murmur is heard at the apex.",
            "section": "exam",
            "polarity": "present",
            "disclosure": "on_specific_ask",
            "keys": ["murmur"],
        }
    )
    entry = Ledger(Case.from_json(row)).check("Is there a murmur?", "A pansystolic murmur is heard at the apex.")
    assert entry.leaked == ("murmur",)


def test_clause_after_but_is_read_alone():
    entry = Ledger(small_case()).check("Do you smoke? Any fever?", "I have no fever but I smoke twenty a day.")
    assert set(entry.disclosed) == {"no-fever", "smoking"}
    assert entry.clean


NUMBERS = {"digits": ("2.5 mg at 10", {2.5, 10}), "words": ("twenty-five a day", {25}), "none": ("a few", set())}


@pytest.mark.parametrize(("text", "wanted"), NUMBERS.values(), ids=NUMBERS)
def test_numbers(text, wanted):
    assert numbers(text) == wanted


@pytest.mark.parametrize("case", own_cases(), ids=lambda case: case.id)
def test_scripted_patient_is_clean(case):
    """The ledger agrees with what the scripted patient says that it told, message by message, and blames nothing."""
    trajectory = asyncio.run(run_inquiry(case, POLICIES["good"](case), ScriptedPatient(case, seed=3), seed=3))
    ledger, question = Ledger(case), ""
    entries = []
    for message in trajectory.messages[1:]:
        if message.role == "user":
            entries.append((ledger.check(question, message.content), set(message.facts)))
        question = message.content if message.role == "assistant" else ""
    assert [entry.reasons for entry, _ in entries if not entry.clean] == []
    assert [(set(entry.disclosed), told) for entry, told in entries if set(entry.disclosed) != told] == []


# -- over all own cases: facts told in the third person of the case, which no patient speaks in ----------------------
ASKED = [(case, fact) for case in own_cases() for fact in case.facts if fact.section != "exam" and fact.keys]


def entries(answer):
    """What the ledger says of an answer to a question for each fact."""
    ledgers = {case.id: Ledger(case) for case in own_cases()}
    return [(fact.id, ledgers[case.id].check(f"May I ask you: {fact.keys[0]}?", answer(fact))) for case, fact in ASKED]


def test_a_patient_who_says_blanks_costs_no_time():
    began = time.process_time()
    assert Ledger(small_case()).check("Do you smoke?", "x" + " " * 50_000 + "y").clean
    assert time.process_time() - began < 2.0


def test_facts_in_other_words_are_disclosed_and_not_blamed():
    """Of some 400 facts: 99 % are recognised, none is called contradicted or invented, 2 % look like another's leak."""
    found = entries(lambda fact: fact.text)
    assert sum(one in entry.disclosed for one, entry in found) >= 0.97 * len(found)
    assert sum(bool(entry.contradicted or entry.invented) for _, entry in found) <= 0.02 * len(found)
    assert sum(bool(entry.leaked) for _, entry in found) <= 0.04 * len(found)


def test_another_number_is_contradicted():
    """Every number in digits made another one: three of four are caught; "10 kg in ten days" for "3 kg" is not."""
    with_value = [(case, fact) for case, fact in ASKED if fact.value and re.search(r"\d", fact.text)]
    caught = [
        Ledger(case).check(
            f"May I ask you: {fact.keys[0]}?", re.sub(r"\d+", lambda m: f"{int(m[0]) * 3 + 1}", fact.text)
        )
        for case, fact in with_value
    ]
    assert sum(not entry.clean for entry in caught) >= 0.65 * len(caught)


def test_the_opposite_of_a_fact_is_contradicted():
    """A mere yes or no against the fact: nine of ten are caught; questions that name two facts hide the rest."""
    found = entries(lambda fact: "Yes, I do." if fact.polarity == "absent" else "No, I don't.")
    assert sum(one in entry.contradicted for one, entry in found) >= 0.85 * len(found)
