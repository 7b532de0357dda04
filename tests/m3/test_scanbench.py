"""The three stations by hand, what is left out and counted, means over cases, turns in bins, what a score is called."""

from __future__ import annotations

import asyncio
import dataclasses

import pytest
from clinic_cases import small_case

from m3.environment.case import Phase, own_cases
from m3.environment.episode import run_consultation
from m3.environment.patient import ScriptedPatient
from m3.environment.physicians import POLICIES
from m3.environment.trajectory import Message, Trajectory
from m3.evaluate import scanbench
from m3.evaluate.scanbench import Config, ConsultationScore, InquiryScore, evaluate, score


def said(phase: Phase, text: str, turn: int = 0, role: str = "assistant", **fields) -> Message:
    return Message(role=role, content=text, turn=turn, phase=phase, **fields)


def consultation(*messages: Message, case: str = "small-1", **fields) -> Trajectory:
    return Trajectory(case=case, case_version=1, policy="written", seed=0, messages=messages, **fields)


WHOLE = consultation(
    said(Phase.inquiry, "I have had this pain in my chest since this morning.", role="user", facts=("pain",)),
    said(Phase.inquiry, "Does the pain spread anywhere else?"),
    said(Phase.inquiry, "It goes down my left arm.", 1, role="user", facts=("radiation",)),
    said(Phase.inquiry, "I have no further questions.", 1),
    said(Phase.lab, "- ECG\n- EEG", 2),
    said(Phase.diagnosis, "Diagnosis: Unstable angina\nAdvice: Call an ambulance.", 3),
)


class Oracle:
    """Says that all items were met, as a language model's judge would say it."""

    name = "oracle"
    scripted = False

    def met(self, case, trajectory):
        return {item.id for item in case.checklist}


def test_three_stations_by_hand():
    """One of three items met (level 2: 1 of 1, level 1: 0 of 2); P 1/2 and R 3/7 of the tests; the right block."""
    found = score(small_case(), WHOLE)
    assert found.inquiry.value == pytest.approx(1 / 3)
    assert found.inquiry.by_level == {2: 1.0, 1: 0.0}
    assert found.inquiry.by_dimension == {"C": 1.0, "A": 0.0}
    assert found.inquiry.missed == ("c-smoking", "c-fever")
    assert found.lab.f1 == pytest.approx(2 * (1 / 2) * (3 / 7) / (1 / 2 + 3 / 7))
    assert found.diagnosis.credit == pytest.approx(0.3)
    assert (found.turns, found.unscored) == (2, {})


def test_station_that_was_not_reached_is_counted_and_not_zero():
    report = evaluate([small_case()], [consultation(*WHOLE.messages[:4])])
    assert set(report.stations) == {"inquiry"}
    assert report.unscored == {"diagnosis: not reached": 1, "lab: not reached": 1}


def test_case_that_cannot_be_scored_is_counted():
    case = small_case(exams=[], diagnosis={"icd10cm": None, "label": "Heart attack"})
    assert score(case, WHOLE).unscored == {
        "lab": "the case says of no examination that it is needed",
        "diagnosis": "the case has no ICD-10-CM code",
    }


def test_boilerplate_is_left_out():
    """Items on what the opening line tells, and on demographic data, cost and earn nothing."""
    row = dict(small_case().raw)
    common = {"level": 1, "dimension": "N", "phase": "inquiry", "points": 1, "kind": "must_ask"}
    row["checklist"] = [
        *row["checklist"],
        {"id": "given", "criterion": "Asks what hurts.", "facts": ["pain"], "section": "HPI", **common},
        {"id": "age", "criterion": "Asks the age.", "keys": ["how old"], "section": "demographic", **common},
    ]
    found = score(small_case(checklist=row["checklist"]), WHOLE).inquiry
    assert found.left_out == ("given", "age")
    assert found.value == pytest.approx(1 / 3)


# -- what a figure is called ------------------------------------------------------------------------------------------
def test_scripted_judge_gives_no_scanbench_score():
    report = evaluate([small_case()], [WHOLE])
    assert [report.scanbench(station) for station in scanbench.STATIONS] == ["n/a: scripted judge"] * 3
    lines = report.lines()
    assert "ScanBench inquiry: n/a: scripted judge" in lines
    assert "scripted station score, inquiry: 33.3 [33.3, 33.3] (1 cases)" in lines


def test_another_judge_gives_one():
    report = evaluate([small_case()], [WHOLE], judge=Oracle())
    assert report.scanbench("inquiry") == "100.0 [100.0, 100.0]"
    assert report.judge == "oracle"


# -- gathering --------------------------------------------------------------------------------------------------------
def test_mean_is_over_cases_of_means_over_rollouts():
    found = scanbench.mean_over_cases([("a", 0.0), ("a", 1.0), ("b", 1.0)])
    assert found.mean == pytest.approx(0.75)
    assert (found.cases, found.consultations) == (2, 3)
    assert (found.low, found.high) == (0.5, 1.0)


def test_bootstrap_interval_is_seeded_and_near_the_normal_one():
    values = [(str(i), float(i % 2)) for i in range(400)]
    one = scanbench.mean_over_cases(values)
    assert one == scanbench.mean_over_cases(values)
    assert one != scanbench.mean_over_cases(values, Config(seed=1))
    assert one.high - one.low == pytest.approx(2 * 1.96 * 0.5 / 20, rel=0.1)


def test_departments_apart():
    other = dataclasses.replace(small_case(), id="small-2", department="neurology")
    report = evaluate([small_case(), other], [WHOLE, dataclasses.replace(WHOLE, case="small-2")])
    assert set(report.by_department) == {"cardiology", "neurology"}
    assert report.by_department["neurology"]["lab"].cases == 1


def at(turns: int, value: float) -> ConsultationScore:
    inquiry = InquiryScore(value=value, by_level={}, by_dimension={}, by_section={}, met=(), missed=(), left_out=())
    return ConsultationScore(
        case="a",
        department="d",
        policy="p",
        rollout=0,
        turns=turns,
        inquiry=inquiry,
        lab=None,
        diagnosis=None,
        unscored={},
    )


def test_bins_under_a_tenth_of_the_samples_are_dropped():
    """20 samples: bins of 2 exchanges; the lone one of 9 exchanges is 5 %."""
    scores = [at(1, 0.0), at(2, 1.0)] * 5 + [at(3, 0.5)] * 9 + [at(9, 1.0)]
    bins = scanbench.score_against_turns(scores)
    assert [(one.first, one.last, one.count) for one in bins] == [(1, 2, 10), (3, 4, 9)]
    assert [one.mean for one in bins] == [0.5, 0.5]
    assert bins[0].error == pytest.approx(0.5270463 / 10**0.5)
    kept = scanbench.score_against_turns(scores, config=Config(least_share=0.05))
    assert [one.first for one in kept] == [1, 3, 9]


def test_figure(tmp_path):
    path = tmp_path / "turns.svg"
    scanbench.plot_turns(evaluate([small_case()], [WHOLE]), path)
    assert "scripted station score" in path.read_text() or path.stat().st_size > 10_000


# -- the scripted physicians ------------------------------------------------------------------------------------------
def test_good_physician_is_far_above_the_one_that_asks_nothing():
    case = own_cases()[0]
    trajectories = {
        name: asyncio.run(run_consultation(case, POLICIES[name](case), ScriptedPatient(case, seed=0), seed=0))
        for name in ("good", "ask_nothing")
    }
    good = score(case, trajectories["good"])
    nothing = score(case, trajectories["ask_nothing"])
    assert good.inquiry.value > 0.8 > 0.2 > nothing.inquiry.value
    assert good.lab.f1 >= 0.7 > 0.5 > nothing.lab.f1
    assert good.diagnosis.credit == 1.0


# -- errors -----------------------------------------------------------------------------------------------------------
def test_trajectories_of_other_cases_are_refused():
    with pytest.raises(ValueError, match=r"scanbench\.score: trajectory: want one of case 'small-1'; got 'x'"):
        score(small_case(), dataclasses.replace(WHOLE, case="x"))
    with pytest.raises(ValueError, match=r"scanbench\.evaluate: trajectories: want of the cases given; got 'x'"):
        evaluate([small_case()], [dataclasses.replace(WHOLE, case="x")])
    with pytest.raises(ValueError, match=r"scanbench\.evaluate: trajectories: want at least one"):
        evaluate([small_case()], [])


def test_config_and_stations_are_checked():
    with pytest.raises(ValueError, match=r"scanbench\.Config: turns_per_bin"):
        Config(turns_per_bin=0)
    with pytest.raises(ValueError, match=r"scanbench\.Config: least_share"):
        Config(least_share=2)
    with pytest.raises(ValueError, match=r"scanbench: station: want of"):
        at(1, 0.0).value("triage")
