"""Scripted physicians: how the good one takes a history, and that each exploit does what it is named after."""

from __future__ import annotations

import asyncio

import pytest
from clinic_cases import small_case

from m3.environment.asking import asked
from m3.environment.case import Phase, own_cases
from m3.environment.episode import run_consultation, run_inquiry
from m3.environment.exams import CATEGORIES
from m3.environment.modes import END_OF_TURN, interruption
from m3.environment.patient import AGAIN, ScriptedPatient
from m3.environment.physicians import CLOSING, EXPLOITS, POLICIES, QUESTIONS_A_TURN, SECTIONS

CASE = small_case()


def inquiry(case, name, seed=1, **options):
    return asyncio.run(run_inquiry(case, POLICIES[name](case), ScriptedPatient(case, seed=seed), seed=seed, **options))


def consultation(case, name):
    return asyncio.run(run_consultation(case, POLICIES[name](case), ScriptedPatient(case, seed=1), seed=1))


def lines(trajectory, phase=Phase.inquiry):
    return [message.content for message in trajectory.of("assistant", phase) if not message.meta.get("snippet")]


def test_names():
    assert {name: make(CASE).name for name, make in POLICIES.items()} == {name: name for name in POLICIES}
    assert set(POLICIES) - set(EXPLOITS) == {"good", "random_questions"}


def test_good_consultation_of_the_small_case():
    trajectory = consultation(CASE, "good")
    assert lines(trajectory) == [
        "Could you tell me whether the pain radiates? May I ask about fever?",
        "May I ask about smoking?",
        CLOSING,
    ]
    assert lines(trajectory, Phase.differential) == [
        "1. Inferior ST elevation myocardial infarction\n2. Aortic dissection\n3. Pulmonary embolism"
    ]
    assert lines(trajectory, Phase.lab) == ["- 12-lead ECG\n- High-sensitivity troponin"]
    assert lines(trajectory, Phase.diagnosis) == [
        "Diagnosis: Inferior ST elevation myocardial infarction\nAdvice: Emergency reperfusion."
    ]


@pytest.mark.parametrize("case", own_cases(), ids=lambda case: case.id)
def test_good_history_is_orderly_and_asks_nothing_twice(case):
    trajectory = inquiry(case, "good")
    said = lines(trajectory)
    assert trajectory.ended == "closed"
    assert said[-1].endswith(CLOSING)
    assert max(len(asked(case, line)) for line in said[1:]) <= QUESTIONS_A_TURN
    again = [m.content for m in trajectory.of("user") if m.content.startswith(AGAIN)]
    assert len(again) <= 1, "it asks for what it has been told, at most where a question names two facts"
    sections = [SECTIONS.index(item.section) for item, _ in POLICIES["good"](case).plan]
    assert sections == sorted(sections)


def test_good_physician_answers_the_patients_question_first():
    trajectory = inquiry(CASE, "good", mode=interruption(CASE, END_OF_TURN, seed=1))
    assert lines(trajectory)[0].startswith("I understand that this worries you")


def test_random_questions_differ_by_seed_and_do_not_repeat():
    one, other = (lines(inquiry(CASE, "random_questions", seed=seed)) for seed in (1, 2))
    assert one != other
    assert len(set(one)) == len(one)


def test_exploits_do_what_they_are_named_after():
    said = {name: lines(inquiry(CASE, name)) for name in EXPLOITS}
    assert len(asked(CASE, said["ask_everything"][0])) > 40
    assert said["ask_nothing"] == [CLOSING]
    assert len(said["repeat"]) > 5
    assert len(set(said["repeat"])) == 1
    assert said["see_a_doctor"][0].startswith("Please see a doctor")
    assert said["copy_rubric"] == ["Asks whether the pain radiates.\nAsks about smoking.\nAsks about fever."]
    assert said["diagnose_first"] == ["Diagnosis: Inferior ST elevation myocardial infarction"]
    orders = lines(consultation(CASE, "order_every_test"), Phase.lab)[0].splitlines()
    assert len(orders) == len(CASE.exams) + len(CATEGORIES)
