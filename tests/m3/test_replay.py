"""Recorded consultations: both formats, facts told, questions, groups without variance, rankings, recorded doctors."""

from __future__ import annotations

import gzip
import itertools
import json

import pytest
from clinic_cases import shared_data, small_case

from m3.environment.case import Phase
from m3.environment.trajectory import Message, Trajectory, to_line
from m3.evaluate import replay
from m3.evaluate.replay import Config, evaluate, fact_recall, kendall_tau, read_recorded, score
from m3.rewards.spans import SpanReward
from m3.rewards.step_verifier import Config as StepConfig
from m3.rewards.step_verifier import StepVerifier

ROW = {
    "case_id": "case_1",
    "doctor": "one",
    "trial": 0,
    "answer": "Gout",
    "facts": ["1. The patient has pain in the big toe.", "2. The patient drinks beer daily.", "3. The toe is red."],
    "frq": "Final Diagnosis: Podagra.",
    "frq_eval": 1,
    "turns": [
        {"role": "doctor", "text": "Hello! What brings you here?"},
        {"role": "patient", "text": "I have pain in my big toe."},
        {"role": "doctor", "text": "Do you drink beer? How long has it hurt?"},
        {"role": "patient", "text": "For three days."},
        {"role": "doctor", "text": "Do you drink any beer?"},
        {"role": "patient", "text": "I do not know."},
        {"role": "doctor", "text": "Final Diagnosis: Podagra."},
    ],
}


def recorded(tmp_path, *rows, name="r.jsonl"):
    path = tmp_path / name
    text = "\n".join(json.dumps(row) for row in rows) + "\n"
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return path


def test_one_consultation_by_hand(tmp_path):
    one = next(read_recorded(recorded(tmp_path, ROW)))
    found = score(one)
    assert (found.doctor, found.case, found.trial, found.graded) == ("one", "case_1", 0, True)
    assert found.diagnosis.correct
    assert found.fact_recall == pytest.approx(1 / 3)
    assert (found.questions, found.duplicates, found.asking_turns) == (4, 1, 3)
    assert found.redundant_turns is None
    assert found.credit == 1.0, "the code of the label Gout is looked up"


@pytest.mark.parametrize("verdict", [-1, None])
def test_what_was_not_answered_or_graded_is_no_failure_of_a_grader(tmp_path, verdict):
    found = score(next(read_recorded(recorded(tmp_path, ROW | {"frq": None, "frq_eval": verdict}))))
    assert found.graded is None
    assert str(found.diagnosis.reading) == "absent"


def test_turns_of_a_doctor_who_speaks_first(tmp_path):
    messages = next(read_recorded(recorded(tmp_path, ROW, name="r.jsonl.gz"))).trajectory.messages
    assert [(m.role, m.turn) for m in messages] == [
        ("assistant", 0),
        *itertools.chain.from_iterable([("user", turn), ("assistant", turn)] for turn in (1, 2, 3)),
    ]


def test_trajectories_of_cases(tmp_path):
    said = [
        Message(role="user", content="The pain goes down my left arm, it radiates.", turn=0, phase=Phase.inquiry),
        Message(role="assistant", content="Do you smoke?", turn=0, phase=Phase.inquiry),
        Message(role="assistant", content="Diagnosis: heart attack", turn=1, phase=Phase.diagnosis),
    ]
    one = Trajectory(case="small-1", case_version=1, policy="p", seed=0, messages=tuple(said))
    path = tmp_path / "t.jsonl"
    path.write_text(to_line(one.to_json()) + "\n")
    found = score(next(read_recorded(path, [small_case()])))
    assert (found.graded, found.questions, found.credit) == (None, 1, 1.0)
    assert found.fact_recall == pytest.approx(1 / 4)
    with pytest.raises(ValueError, match=r"t\.jsonl:1: .*want one of the cases given; got 'small-1'"):
        list(read_recorded(path))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "r.jsonl:2: want JSON"),
        ("{}", "missing field 'turns'"),
        ("[]", "r.jsonl:2: want a JSON object; got list"),
    ],
)
def test_broken_lines_are_named(tmp_path, line, message):
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps(ROW) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=message):
        list(read_recorded(path))


def test_fact_recall_counts_one_message_at_a_time():
    said = [Message(role="user", content=text, turn=0, phase=Phase.inquiry) for text in ("red swollen", "big toe")]
    one = Trajectory(case="c", case_version=1, policy="p", seed=0, messages=tuple(said))
    assert fact_recall(["The big toe is red and swollen."], one) == 0.0
    assert fact_recall(["The big toe is red and swollen."], one, Config(told=0.5)) == 1.0
    assert fact_recall(["The patient."], one) is None


# -- doctors ----------------------------------------------------------------------------------------------------------
def trials(doctor: str, case: str, graded: list[int]) -> list[dict]:
    answers = {0: "Final Diagnosis: Asthma", 1: "Final Diagnosis: Gout"}
    return [
        {**ROW, "doctor": doctor, "case_id": case, "trial": i, "frq_eval": one, "frq": answers[one]}
        for i, one in enumerate(graded)
    ]


def test_groups_without_variance_and_shares(tmp_path):
    rows = [*trials("one", "a", [1, 1]), *trials("one", "b", [0, 1]), *trials("two", "a", [0, 0])]
    report = evaluate(read_recorded(recorded(tmp_path, *rows)))
    one, two = report.doctors
    assert (one.graded, one.correct, one.equal_graded, one.equal_correct) == (0.75, 0.75, 0.5, 0.5)
    assert (two.graded, two.equal_graded) == (0.0, 1.0)
    assert one.equal_fact_recall == 1.0
    assert one.duplicate_questions == pytest.approx(1 / 4)
    assert report.tau_outcome == 1.0
    assert report.agreement.share.mean == 1.0


def test_agreement_counts(tmp_path):
    rows = [{**row, "frq_eval": eval_} for row, eval_ in zip(trials("one", "a", [1, 1, 0]), [1, 0, 1], strict=True)]
    found = evaluate(read_recorded(recorded(tmp_path, *rows))).agreement
    assert (found.true_positives, found.false_positives, found.false_negatives) == (1, 1, 1)
    assert (found.precision, found.recall, found.share.mean) == (0.5, 0.5, pytest.approx(1 / 3))


def test_redundant_turns_are_those_of_the_verifier(tmp_path):
    def verify(case, trajectory):
        names = [(1, "redundant_question"), (1, "redundant_question"), (2, "rigid_phrasing")]
        return [SpanReward(turn=t, token_start=0, token_end=1, value=0.1, criterion=name) for t, name in names]

    report = evaluate(read_recorded(recorded(tmp_path, ROW)), verify=verify)
    assert report.scored[0].redundant_turns == 1
    assert report.doctors[0].redundant_turns == pytest.approx(1 / 3)
    assert report.tau_redundancy is None, "one doctor has no rank"


def test_nothing_recorded_is_refused():
    with pytest.raises(ValueError, match=r"replay\.evaluate: recorded: want at least one consultation"):
        evaluate([])


TAUS = {
    "same": ([1, 2, 3], [4, 5, 6], 1.0),
    "reversed": ([1, 2, 3], [3, 2, 1], -1.0),
    "one_swap": ([1, 2, 3], [1, 3, 2], 1 / 3),
    "a_tie": ([1, 1, 2], [1, 2, 3], 2 / (2 * 3) ** 0.5),
    "no_order": ([1, 1], [1, 2], None),
    "alone": ([1], [1], None),
}


@pytest.mark.parametrize(("one", "other", "tau"), TAUS.values(), ids=TAUS)
def test_kendall_tau_b(one, other, tau):
    assert kendall_tau(one, other) == (None if tau is None else pytest.approx(tau))


def test_report_as_text(tmp_path):
    report = evaluate(read_recorded(recorded(tmp_path, *trials("one", "a", [1, 0]))))
    heading, row = replay.table(report)
    assert dict(zip(heading, row, strict=True))["graded correct"] == "50.0 %"
    assert dict(zip(heading, row, strict=True))["redundant turns (verifier)"] == "n/a"
    assert replay.lines(report)[0].startswith("the diagnosis scorer agrees with the recorded grader on 100.0")
    assert replay.lines(report)[1] == "answers by what they claim: decided 2"


# -- recorded doctors -------------------------------------------------------------------------------------------------
def doctors_of(cases: int | None) -> replay.Report:
    every = read_recorded(shared_data("craft-md") / "replay_dev.jsonl.gz")
    groups = itertools.groupby(every, key=lambda one: one.trajectory.case)
    kept = itertools.chain.from_iterable(group for _, group in itertools.islice(groups, cases))
    verifier = StepVerifier(StepConfig(penalties={"redundant_question": 0.1}))
    return evaluate(kept, verify=verifier.verify)


def test_recorded_doctors_of_ten_cases():
    """Outcome alone leaves most groups without an advantage, facts told few; one doctor repeats itself far the most."""
    doctors = {doctor.name: doctor for doctor in doctors_of(10).doctors}
    assert len(doctors) == 5
    assert min(doctor.equal_graded for doctor in doctors.values()) >= 0.5
    assert max(doctor.equal_fact_recall for doctor in doctors.values()) <= 0.3
    repeats = sorted(doctors.values(), key=lambda doctor: doctor.duplicate_questions)
    assert repeats[-1].name == "mistral-v1"
    assert repeats[-1] == max(doctors.values(), key=lambda doctor: doctor.redundant_turns)


@pytest.mark.slow
def test_recorded_doctors_of_all_cases():
    report = doctors_of(None)
    assert report.tau_redundancy == 1.0
    assert report.tau_outcome >= 0.9
    assert report.agreement.share.mean >= 0.95
    assert report.rate >= 3750 / 60
