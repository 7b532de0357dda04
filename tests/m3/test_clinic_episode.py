"""A consultation runs: how the inquiry ends, what each side is shown, orders and results, the same bytes again."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys

import pytest
from clinic_cases import ROOT, small_case, small_row
from clinic_policies import Script

from m3.environment.case import Case, Phase, own_cases
from m3.environment.episode import CaseView, Patient, Policy, message_seed, run_consultation, run_inquiry, view_of
from m3.environment.modes import draw
from m3.environment.patient import PatientConfig, ScriptedPatient
from m3.environment.physicians import POLICIES
from m3.environment.results import answer_orders, find_exam, read_order_lines
from m3.environment.stages import INSTRUCTIONS
from m3.environment.trajectory import Action, Trajectory, to_line

CASE = small_case()
CLOSE = "I have no further questions."


def inquiry(*lines: str, config: PatientConfig | None = None, **options) -> Trajectory:
    patient = ScriptedPatient(CASE, seed=1, config=config)
    return asyncio.run(run_inquiry(CASE, Script(*lines), patient, seed=1, **options))


def test_protocols():
    assert isinstance(ScriptedPatient(CASE, seed=0), Patient)
    assert isinstance(POLICIES["good"](CASE), Policy)


def test_view_hides_what_must_be_found_out():
    wanted = CaseView(chief_complaint="chest pain", age=61, sex="male", setting="emergency department", lang="en")
    assert view_of(CASE) == wanted


ENDS = {
    "says_enough": ([CLOSE], {}, "closed", 2),
    "asks_nothing": (["Do you smoke?", "You should stop."], {}, "closed", 4),
    "turns": (["Do you smoke?", "Any fever?"], {"max_turns": 2}, "turns", 4),
    "patient": (["Do you smoke?", "Do you smoke?"], {"config": PatientConfig(patience=1)}, "patient", 5),
}


@pytest.mark.parametrize(("lines", "options", "ended", "count"), ENDS.values(), ids=ENDS)
def test_inquiry_ends(lines, options, ended, count):
    trajectory = inquiry(*lines, **options)
    assert trajectory.ended == ended
    assert len(trajectory.messages) - 1 == count  # the first is the instruction


def test_exchanges_and_actions():
    trajectory = inquiry("Do you smoke?", CLOSE)
    found = [(m.role, m.turn, m.action, m.facts) for m in trajectory.messages]
    assert found == [
        ("system", 0, None, ()),
        ("user", 0, None, ("pain",)),
        ("assistant", 0, Action.ask, ()),
        ("user", 1, None, ("smoking",)),
        ("assistant", 1, Action.close, ()),
    ]
    assert trajectory.messages[0].content == INSTRUCTIONS[Phase.inquiry]


def test_seed_of_a_message_is_of_its_place():
    script = Script("Do you smoke?", CLOSE)
    asyncio.run(run_inquiry(CASE, script, ScriptedPatient(CASE, seed=1), seed=9, rollout=4))
    assert [seed for *_, seed in script.seen] == [message_seed(9, CASE, 4, turn, Phase.inquiry) for turn in (0, 1)]
    places = [(9, 4, 0), (9, 4, 1), (9, 5, 0), (8, 4, 0)]
    seeds = {message_seed(seed, CASE, rollout, turn, Phase.inquiry) for seed, rollout, turn in places}
    assert len(seeds) == len(places)
    assert message_seed(0, CASE, 0, 0, Phase.inquiry) == 2115912832


def test_no_turns():
    with pytest.raises(ValueError, match=re.escape("run_inquiry: max_turns: want an integer >= 1; got 0")):
        inquiry(CLOSE, max_turns=0)


# -- all four stages --------------------------------------------------------------------------------------------------
STAGES = ["1. Heart attack", "- 12-lead ECG\n- EEG\n- Porcelain level", "Diagnosis: heart attack"]


def test_consultation():
    script = Script(CLOSE, *STAGES)
    trajectory = asyncio.run(run_consultation(CASE, script, ScriptedPatient(CASE, seed=1), seed=1))
    assert [m.content for m in trajectory.of("assistant")] == [CLOSE, *STAGES]
    actions = [Action.close, Action.differential, Action.order, Action.diagnose]
    assert [m.action for m in trajectory.of("assistant")] == actions
    assert [m.phase for m in trajectory.of("assistant")] == list(Phase)
    assert [len(messages) for _, messages, _, _ in script.seen] == [2, 4, 6, 8], "each stage sees all that was said"
    results = trajectory.messages[-2]
    assert results.content.startswith(
        "Results:\n"
        "- 12-lead ECG: ST elevation in II, III and aVF.\n"
        "- EEG: done, no result recorded.\n"
        "- Porcelain level: unknown test, not done.\n\n"
    )
    assert results.meta["orders"] == [
        {"order": "12-lead ECG", "event": "result", "exam": "ecg", "facts": []},
        {"order": "EEG", "event": "unrecorded", "exam": "eeg", "facts": []},
        {"order": "Porcelain level", "event": "unknown test", "exam": "", "facts": []},
    ]


def test_consultation_without_orders():
    trajectory = asyncio.run(
        run_consultation(CASE, Script(CLOSE, "1. x", "Nothing.", "Diagnosis: x"), ScriptedPatient(CASE, seed=1), seed=1)
    )
    assert trajectory.messages[-2].content.startswith("No test was ordered.\n\n")


ORDERS = {
    "name": ("12-lead ECG", "ecg"),
    "part_of_the_name": ("Troponin", "troponin"),
    "more_than_the_name": ("Urgent high-sensitivity troponin level", "troponin"),
    "other_order": ("radiograph of the chest", "cxr"),
    "no_such": ("Colonoscopy", None),
    "common_word_alone": ("test", None),
    "half_of_another": ("Chest CT", None),
}


@pytest.mark.parametrize(("order", "wanted"), ORDERS.values(), ids=ORDERS)
def test_examination_that_an_order_names(order, wanted):
    found = find_exam(CASE, order)
    assert (found.id if found else None) == wanted


def test_lines_of_orders():
    text = "I would like:\n- ECG.\n* Troponin;\n2) Chest radiograph\n3. ECG\n-\nand nothing else"
    assert read_order_lines(text) == ["ECG", "Troponin", "Chest radiograph"]


def test_findings_of_an_examination_are_results():
    row = small_row()
    row["facts"].append({"id": "murmur", "text": "A pansystolic murmur.", "section": "exam", "polarity": "present",
                         "disclosure": "on_specific_ask", "keys": ["heart auscultation"]})  # fmt: skip
    (found,) = answer_orders(Case.from_json(row), "- Auscultation of the heart")
    assert (found.event, found.facts) == ("finding", ("murmur",))
    assert found.said == "- Auscultation of the heart: A pansystolic murmur."


# -- the same bytes ---------------------------------------------------------------------------------------------------
def bytes_of(case: Case, policy: str, seed: int) -> str:
    mode = draw(case, seed=seed)
    patient = ScriptedPatient(case, seed=seed)
    return to_line(asyncio.run(run_consultation(case, POLICIES[policy](case), patient, seed=seed, mode=mode)).to_json())


@pytest.mark.parametrize("policy", ["good", "random_questions"])
def test_same_seed_same_bytes(policy):
    case = own_cases()[0]
    lines = [bytes_of(case, policy, seed) for seed in range(4)]
    assert lines == [bytes_of(case, policy, seed) for seed in range(4)]
    assert len(set(lines)) == 4


@pytest.mark.slow
def test_same_bytes_in_another_process():
    """Nothing depends on Python's hash of strings, which differs from process to process."""
    program = "from test_clinic_episode import bytes_of, own_cases; print(bytes_of(own_cases()[0], 'good', 3))"
    found = [
        subprocess.run(
            [sys.executable, "-c", program],
            env={
                **os.environ,
                "PYTHONHASHSEED": seed,
                "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests/m3")]),
            },
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert found[0] == found[1] == bytes_of(own_cases()[0], "good", 3) + "\n"


def test_trajectory_survives_its_file():
    line = bytes_of(own_cases()[0], "good", 3)
    assert to_line(Trajectory.from_json(json.loads(line)).to_json()) == line
