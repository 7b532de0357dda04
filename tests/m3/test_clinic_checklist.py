"""A checklist judged by rules: what counts as asked and done, Eq 1 over it, and what earns nothing."""

from __future__ import annotations

import asyncio
import dataclasses
import re

import pytest
from clinic_cases import small_case, small_row
from clinic_policies import Script

from m3.environment.case import Case, Phase
from m3.environment.episode import run_consultation, run_inquiry
from m3.environment.patient import ScriptedPatient
from m3.environment.trajectory import Trajectory
from m3.rewards.checklist import ChecklistConfig, annotate, coverage, performs
from m3.rewards.verdict import UnjudgedError

CASE = small_case()
CLOSE = "I have no further questions."
SILENT = ("1. Angina", "- ECG", "Diagnosis: angina")


def inquiry(*lines: str, case: Case = CASE) -> Trajectory:
    return asyncio.run(run_inquiry(case, Script(*lines, CLOSE), ScriptedPatient(case, seed=1), seed=1))


def consultation(*lines: str, case: Case = CASE) -> Trajectory:
    return asyncio.run(run_consultation(case, Script(*lines), ScriptedPatient(case, seed=1), seed=1))


# -- Eq 1: items radiation 6, smoking 3, fever 2 of the inquiry; escalate 8, reassure -9 of the diagnosis --------------
INQUIRIES = {
    "nothing": ([], [], 0),
    "one": (["Does it spread?"], ["c-radiation"], 6 / 11),
    "two_turns": (["Does it spread?", "Do you smoke?"], ["c-radiation", "c-smoking"], 9 / 11),
    "two_at_once": (["Do you smoke? Any fever?"], ["c-smoking", "c-fever"], 5 / 11),
    "all": (["Does it spread?", "Do you smoke? Any fever?"], ["c-radiation", "c-smoking", "c-fever"], 1),
    "by_topic": (["Tell me about the pain."], ["c-radiation"], 6 / 11),
    "twice_counts_once": (["Do you smoke?", "Do you smoke?"], ["c-smoking"], 3 / 11),
    "statement": (["You smoke, I see, and it spreads. Are you well?"], [], 0),
    "for_a_machine": (["List all facts about fever and smoking. Are you well?"], [], 0),
}


@pytest.mark.parametrize(("lines", "met", "value"), INQUIRIES.values(), ids=INQUIRIES)
def test_inquiry(lines, met, value):
    score = coverage(CASE, inquiry(*lines))
    assert list(score.met) == met
    assert score.value == pytest.approx(value)
    assert score.score == score.value


CONSULTATIONS = {
    "silent": (SILENT, [], 9 / 28),
    "escalates": ((*SILENT[:2], "Diagnosis: x. Call an ambulance now."), ["c-escalate"], 17 / 28),
    "reassures": ((*SILENT[:2], "It is only muscular."), ["c-reassure"], 0),
    "both": ((*SILENT[:2], "It is only muscular. Call an ambulance."), ["c-escalate", "c-reassure"], 8 / 28),
    "negated": ((*SILENT[:2], "There is no need for an ambulance."), [], 9 / 28),
    "does_not_reassure": ((*SILENT[:2], "Do not go home."), [], 9 / 28),
    "asks_about_it": ((*SILENT[:2], "Can you go home?"), [], 9 / 28),
    "in_another_stage": (("1. Ambulance", *SILENT[1:]), [], 9 / 28),
    "recites_the_criterion": ((*SILENT[:2], "Sends the patient to emergency care at once."), [], 9 / 28),
    "recites_a_negative_one": ((*SILENT[:2], "Says that it is only muscular without an ECG."), ["c-reassure"], 0),
}


@pytest.mark.parametrize(("stages", "met", "value"), CONSULTATIONS.values(), ids=CONSULTATIONS)
def test_consultation(stages, met, value):
    score = coverage(CASE, consultation(CLOSE, *stages))
    assert list(score.met) == met
    assert score.value == pytest.approx(value)


def test_where_and_why():
    score = coverage(CASE, inquiry("Any fever?", "Do you smoke? Thank you."), phases={Phase.inquiry})
    found = {one.item.id: (one.met, one.turn, one.evidence) for one in score.items}
    assert found == {
        "c-radiation": (False, None, ""),
        "c-smoking": (True, 1, "Do you smoke?"),
        "c-fever": (True, 0, "Any fever?"),
    }


def test_shares_by_level_dimension_and_section():
    score = coverage(CASE, consultation("Do you smoke?", CLOSE, *SILENT))
    assert score.by_level == {1: 1 / 2, 2: 0}
    assert score.by_dimension == {"A": 1 / 2, "C": 0, "S": 0}
    assert score.by_section == {"": 0, "HPI": 0, "SH": 1}


def test_stages_that_count():
    trajectory = consultation(CLOSE, *SILENT[:2], "Call an ambulance.")
    assert coverage(CASE, trajectory, phases=[Phase.diagnosis]).value == 1
    assert coverage(CASE, trajectory, phases=[Phase.inquiry]).value == 0
    assert coverage(CASE, inquiry()).items[-1].item.id == "c-fever", "stages that were not reached do not count"


def test_given_items_neither_cost_nor_earn():
    row = small_row()
    row["checklist"][1]["facts"] = ["pain"]
    case = Case.from_json(row)
    score = coverage(case, inquiry("Does it spread?", case=case))
    assert [one.item.id for one in score.items if one.given] == ["c-smoking"]
    assert score.value == pytest.approx(6 / 8)


def many(count: int) -> Case:
    """A case with facts and items f0, f1, ...; each is asked for by its own word."""
    row = small_row()
    row["presentation"]["facts"] = []
    row["facts"] = [
        {"id": f"f{i}", "text": f"Fact {i}.", "section": "HPI", "polarity": "present", "disclosure": "on_ask",
         "keys": [f"thing{i}"]}
        for i in range(count)
    ]  # fmt: skip
    row["checklist"] = [{**row["checklist"][0], "id": f"c{i}", "facts": [f"f{i}"], "points": 1} for i in range(count)]
    return Case.from_json(row)


DUMPS = {
    "as_many_as_may_be": (4, ["c0", "c1", "c2", "c3"]),
    "six": (6, ["c0", "c1"]),
    "eight": (8, []),
    "ten": (10, []),
}


@pytest.mark.parametrize(("count", "met"), DUMPS.values(), ids=DUMPS)
def test_question_beyond_the_limit_takes_one_back(count, met):
    case = many(10)
    trajectory = inquiry("".join(f"Any thing{i}? " for i in range(count)), case=case)
    assert len(trajectory.told()) == min(count, 5), "the patient tells as much as it does of any message"
    assert list(coverage(case, trajectory).met) == met


def test_dumped_list_earns_nothing_however_it_is_turned():
    case = many(10)
    asks = [f"Any thing{i}? " for i in range(10)]
    turned = ["".join(asks[i:] + asks[:i]) for i in range(0, 10, 2)]
    trajectory = inquiry(*turned, case=case)
    assert len(trajectory.told()) == 10
    assert coverage(case, trajectory).met == ()


@pytest.mark.parametrize(
    ("count", "most", "met"), [(4, 4, 4), (5, 4, 3), (6, 4, 2), (8, 4, 0), (10, 4, 0), (3, 2, 1), (10, 10, 5)]
)
@pytest.mark.parametrize("between", [", ", " or ", "; ", " and "])
def test_things_of_one_question_beyond_the_limit_take_one_back_each(count, most, met, between):
    case = many(10)
    trajectory = inquiry("Any " + between.join(f"thing{i}" for i in range(count)) + "?", case=case)
    score = coverage(case, trajectory, config=ChecklistConfig(max_asks_per_turn=most))
    assert score.met == tuple(f"c{i}" for i in range(met))


def test_things_that_nobody_has_take_as_much_back():
    case = many(1)
    plain = inquiry("Any thing0, cough, rash or fever?", case=case)
    assert coverage(case, plain).met == ("c0",)
    stuffed = inquiry(
        "Any thing0, " + ", ".join(["cough", "rash", "fever", "cramp", "itch", "sweat"] * 3) + "?", case=case
    )
    assert coverage(case, stuffed).met == ()
    spaced = inquiry("Do you have thing0 " + "cough rash fever cramp itch sweat " * 5 + "?", case=case)
    assert coverage(case, spaced).met == ()


@pytest.mark.parametrize(
    ("text", "met"),
    [("Do you smoke?", ["c-smoking"]), ("Asks about smoking?", []), ("Please: asks about smoking?", []),
     ("May I ask about smoking?", ["c-smoking"])],
)  # fmt: skip
def test_a_criterion_with_a_question_mark_is_no_question(text, met):
    row = small_row()
    row["checklist"][1]["criterion"] = "Asks about smoking."
    case = Case.from_json(row)
    assert [one for one in coverage(case, inquiry(text, case=case)).met if one == "c-smoking"] == met


def test_one_fact_beside_an_answer_counts():
    case = many(4)
    trajectory = inquiry("Any thing0?", case=case)
    answer = dataclasses.replace(trajectory.messages[3], facts=("f0", "f1", "f2"))
    told = dataclasses.replace(trajectory, messages=(*trajectory.messages[:3], answer, *trajectory.messages[4:]))
    assert coverage(case, told).met == ("c0", "c1")
    unasked = dataclasses.replace(trajectory.messages[3], facts=("f1", "f2"))
    alone = dataclasses.replace(trajectory, messages=(*trajectory.messages[:3], unasked, *trajectory.messages[4:]))
    assert coverage(case, alone).met == (), "nothing asked for was told"


def test_veto_makes_the_score_zero_and_leaves_the_value():
    row = small_row()
    row["checklist"][4]["kind"] = "veto"
    case = Case.from_json(row)
    score = coverage(case, consultation("Does it spread?", CLOSE, *SILENT[:2], "Only muscular.", case=case))
    assert (score.value, score.score, score.vetoed) == (pytest.approx(6 / 28), 0, ("c-reassure",))


def test_snippet_earns_nothing():
    trajectory = inquiry("Does it spread?")
    asked = dataclasses.replace(trajectory.messages[2], meta={"snippet": True})
    seen = dataclasses.replace(trajectory, messages=(*trajectory.messages[:2], asked, *trajectory.messages[3:]))
    assert coverage(CASE, seen).value == 0


def test_findings_of_an_examination_meet_an_item():
    row = small_row()
    row["facts"].append({"id": "murmur", "text": "A murmur.", "section": "exam", "polarity": "present",
                         "disclosure": "on_specific_ask", "keys": ["heart auscultation"]})  # fmt: skip
    row["checklist"][1] |= {"facts": ["murmur"], "phase": "lab"}
    case = Case.from_json(row)
    trajectory = consultation(CLOSE, "1. Angina", "- Heart auscultation", "Diagnosis: angina", case=case)
    score = coverage(case, trajectory, phases=[Phase.lab])
    assert score.met == ("c-smoking",)


def test_order_says_that_it_orders():
    item = dataclasses.replace(CASE.checklist[4], phase=Phase.lab, keys=("order CT head",))
    assert performs(item, "- CT head") == "- CT head"
    assert performs(dataclasses.replace(item, phase=Phase.diagnosis), "- CT head") == ""


def test_lines_beyond_the_limit_earn_nothing_and_still_cost():
    text = "\n".join([f"- Test {i}" for i in range(12)] + ["- CT head"])
    item = dataclasses.replace(CASE.checklist[4], phase=Phase.lab, keys=("CT head",))
    assert performs(dataclasses.replace(item, points=5, kind="must_do"), text) == ""
    assert performs(item, text) == "- CT head"


def test_recording_is_annotated_by_the_ledger():
    trajectory = inquiry("Do you smoke?", "Any fever?")
    bare = dataclasses.replace(
        trajectory, messages=tuple(dataclasses.replace(m, facts=(), why=()) for m in trajectory.messages)
    )
    assert coverage(CASE, bare).value == 0
    filled = annotate(CASE, bare)
    assert [m.facts for m in filled.of("user")] == [("pain",), ("smoking",), ("no-fever",)]
    assert coverage(CASE, filled).value == coverage(CASE, trajectory).value > 0


def test_trajectory_of_another_case():
    with pytest.raises(ValueError, match=re.escape("checklist.coverage: trajectory: want one of case 'other'; got ")):
        coverage(small_case(id="other"), inquiry())


def test_case_without_items():
    message = "checklist.coverage: case 'small-1' has no item of ['inquiry'] that is not given"
    with pytest.raises(UnjudgedError, match=re.escape(message)):
        coverage(small_case(checklist=[]), inquiry())


def test_limit_below_zero():
    with pytest.raises(ValueError, match=re.escape("ChecklistConfig: order_lines: want an integer >= 0; got -1")):
        ChecklistConfig(order_lines=-1)
