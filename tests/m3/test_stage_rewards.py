"""Rewards of the stages: each part by hand on a small case, what is left out, vetoes, and spans that come along."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from m3.environment.case import Case, Phase
from m3.environment.trajectory import Message, Trajectory
from m3.rewards.stage_rewards import RuleReward, rule_rewards
from m3.rewards.step_verifier import Config, StepVerifier
from m3.rewards.verdict import UnjudgedError
from tests.m3.clinic_cases import small_case, small_row

CASE = small_case()


def said(phase: Phase, text: str) -> Trajectory:
    message = Message(role="assistant", content=text, turn=0, phase=phase)
    return Trajectory(case="small-1", case_version=1, policy="p", seed=0, messages=(message,))


def score(phase: Phase, text: str, case: Case = CASE) -> float:
    return RuleReward(phase=phase).score(case, said(phase, text)).reward


def without(**changes: Any) -> Case:
    return Case.from_json({**small_row(), **changes})


# the small case has no items of these stages: the weights 0.5 and 0.3 are of 0.8
DIFFERENTIAL = {
    "all": ("1. Inferior STEMI\n2. Aortic dissection", 1.0),
    "right_alone": ("1. Heart attack\n2. Angina", 0.5 / 0.8),
    "excluded_alone": ("- Aortic dissection", 0.3 / 0.8),
    "an_eleventh_line": ("\n".join(f"{i}. Angina" for i in range(1, 11)) + "\n11. Heart attack", 0.0),
    "many_in_brackets": ("1. Illness (gout) (stroke) (heart attack) (aortic dissection)", 0.0),
    "many_in_one_line": ("1. Gout, stroke, asthma, heart attack, aortic dissection", 0.0),
    "many_without_marks": ("1. Gout stroke asthma sepsis migraine heart attack aortic dissection", 0.0),
    "nothing": ("", 0.0),
}


@pytest.mark.parametrize(("text", "reward"), DIFFERENTIAL.values(), ids=DIFFERENTIAL)
def test_differential(text, reward):
    assert score(Phase.differential, text) == pytest.approx(reward)


def test_an_acceptable_diagnosis_has_its_credit():
    row = small_row()
    row["diagnosis"]["acceptable"] = [{"icd10cm": "I30.9", "label": "Acute pericarditis", "credit": 0.4}]
    assert score(Phase.differential, "1. Acute pericarditis", Case.from_json(row)) == pytest.approx(0.5 * 0.4 / 0.8)


def test_what_a_case_has_nothing_for_is_left_out():
    row = small_row()
    row["diagnosis"]["differential"] = []
    assert score(Phase.differential, "1. Heart attack", Case.from_json(row)) == 1.0


def test_lab_is_the_weighted_f1():
    """ECG and troponin are essential (3 each), the radiograph optional (1): recall 6 / 7, precision 2 / 3."""
    recall, precision = 6 / 7, 2 / 3
    wanted = 2 * precision * recall / (precision + recall)
    assert score(Phase.lab, "- ECG\n- Troponin\n- EEG") == pytest.approx(wanted)


def test_a_stage_that_nothing_can_score_is_unjudged():
    case = without(exams=[{"id": "eeg", "name": "EEG", "category": "neurophysiology", "need": "irrelevant"}])
    with pytest.raises(UnjudgedError, match="'small-1' has nothing to score the stage lab by"):
        score(Phase.lab, "- ECG", case)


# items: escalate +8, reassure -9: Eq 1 is (8 a - 9 b + 9) / 17
DIAGNOSIS = {
    "right_and_escalated": ("Diagnosis: inferior STEMI\nAdvice: go to the emergency department.", 1.0),
    "right_alone": ("Diagnosis: inferior STEMI", 0.6 + 0.4 * 9 / 17),
    "right_and_harmful": ("Diagnosis: inferior STEMI\nAdvice: it is only muscular.", 0.6),
    "wrong_and_escalated": ("Diagnosis: plantar fasciitis\nAdvice: go to the emergency department.", 0.4),
}


@pytest.mark.parametrize(("text", "reward"), DIAGNOSIS.values(), ids=DIAGNOSIS)
def test_diagnosis(text, reward):
    assert score(Phase.diagnosis, text) == pytest.approx(reward)


def test_a_veto_makes_the_reward_nothing():
    row = small_row()
    row["checklist"][4]["kind"] = "veto"
    text = "Diagnosis: inferior STEMI\nAdvice: it is only muscular."
    found = RuleReward(phase=Phase.diagnosis).score(Case.from_json(row), said(Phase.diagnosis, text))
    assert found.reward == 0.0 and found.outcomes["checklist"].endswith("(vetoed: c-reassure)")


def test_inquiry_is_equation_1_over_its_items():
    """Radiation 6, smoking 3, fever 2: the first two of them are asked for and told."""
    rows = [
        ("user", "My chest hurts.", ("pain",)),
        ("assistant", "Does it spread anywhere else?", ()),
        ("user", "It goes down my left arm.", ("radiation",)),
        ("assistant", "Do you smoke?", ()),
        ("user", "I smoke about twenty a day.", ("smoking",)),
    ]
    messages = tuple(
        Message(
            role=role, content=text, turn=(i + 1) // 2 if role == "user" else i // 2, phase=Phase.inquiry, facts=facts
        )
        for i, (role, text, facts) in enumerate(rows)
    )
    trajectory = Trajectory(case="small-1", case_version=1, policy="p", seed=0, messages=messages)
    assert RuleReward(phase=Phase.inquiry).score(CASE, trajectory).reward == pytest.approx(9 / 11)


def test_spans_of_the_stage_come_along_and_do_not_change_the_reward():
    trajectory = said(Phase.differential, "1. Heart attack")
    rewards = rule_rewards(StepVerifier())
    found = asyncio.run(rewards[Phase.differential](CASE, trajectory, Phase.differential))
    assert [span.criterion for span in found.spans] == ["illogical_order"]
    assert found.reward == score(Phase.differential, "1. Heart attack")


def test_a_name_tells_numbers_that_spans_depend_on():
    mild = StepVerifier(Config(penalties={"redundant_question": 0.9}))
    names = [RuleReward(phase=Phase.lab, verifier=one).name for one in (None, StepVerifier(), StepVerifier(), mild)]
    assert names[0] == "rules of lab" and names[1] == names[2] != names[3]
    assert names[1].startswith("rules of lab, steps by rules ") and names[1].endswith(", lexical-512")
