"""Cases are read whole or refused by file, line and field; trajectories keep every byte."""

from __future__ import annotations

import json

import pytest

from m3.environment.case import Case, Phase, read_cases, write_cases
from m3.environment.exams import CATEGORIES
from m3.environment.trajectory import (
    Action,
    Message,
    Trajectory,
    chat,
    read_trajectories,
    to_line,
    write_trajectories,
)
from m3.rewards.spans import SpanReward, step_gammas, violations
from tests.m3.clinic_cases import small_case, small_row


def test_a_case_is_read_field_by_field():
    case = small_case()
    assert case.fact["smoking"].value == (20, "1/d")
    assert case.fact["radiation"].said == "It goes down my left arm."
    assert [item.id for item in case.items(Phase.diagnosis)] == ["c-escalate", "c-reassure"]
    assert case.diagnosis.differential[0].must_exclude and case.diagnosis.acceptable[0].credit == 0.8


def test_there_are_38_categories_and_none_twice():
    assert len(CATEGORIES) == len(set(CATEGORIES)) == 38


def test_provenance_is_that_of_the_longest_name():
    row = small_row()
    row["provenance"] = {"*": {"author": "llm"}, "facts": {"author": "human"}, "facts.smoking": {"author": "rule"}}
    case = Case.from_json(row)
    assert case.provenance("facts.smoking.text")["author"] == "rule"
    assert case.provenance("facts.pain")["author"] == "human"
    assert case.provenance("exams")["author"] == "llm"


BROKEN = {
    "unknown field": (lambda row: row.update(colour="red"), "(top): Additional properties"),
    "wrong type": (lambda row: row["profile"].update(age="old"), "profile.age: 'old' is not of type"),
    "no such fact": (
        lambda row: row["checklist"][0].update(facts=["nose"]),
        "checklist.0.facts.0: want the id of a fact",
    ),
    "id twice": (lambda row: row["facts"].append(dict(row["facts"][0])), "facts.4.id: want an id used once"),
    "sign of points": (lambda row: row["checklist"][0].update(points=-3), "checklist.0.points: want positive points"),
    "category": (lambda row: row["exams"][0].update(category="magic"), "exams.0.category: want one of the 38"),
    "opening": (lambda row: row["presentation"].update(facts=["x"]), "presentation.facts.0: want the id of a fact"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_case_is_named_by_file_line_and_field(name, tmp_path):
    breaks, message = BROKEN[name]
    broken = small_row()
    broken["id"] = "small-2"
    breaks(broken)
    path = tmp_path / "cases.jsonl"
    path.write_text(json.dumps(small_row()) + "\n\n" + json.dumps(broken) + "\n")
    with pytest.raises(ValueError, match=r"cases\.jsonl:3: ") as caught:
        list(read_cases(path))
    assert message in str(caught.value)


def test_in_a_json_file_the_line_is_that_of_the_field(tmp_path):
    row = small_row()
    row["profile"]["sex"] = "m"
    path = tmp_path / "one.json"
    path.write_text(json.dumps(row, indent=1))
    line = 1 + next(i for i, text in enumerate(path.read_text().splitlines()) if '"sex": "m"' in text)
    with pytest.raises(ValueError, match=rf"one\.json:{line}: profile.sex: 'm' is not one of"):
        list(read_cases(path))


def test_text_that_is_no_json_is_named_by_line(tmp_path):
    path = tmp_path / "cases.jsonl"
    path.write_text(json.dumps(small_row()) + "\n{broken\n")
    with pytest.raises(ValueError, match=r"cases\.jsonl:2: want JSON"):
        list(read_cases(path))


def test_an_id_may_occur_once_in_a_folder(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(small_row()))
    (tmp_path / "b.jsonl").write_text(json.dumps(small_row()) + "\n")
    with pytest.raises(ValueError, match=r"b\.jsonl:1: id: want an id used once; got 'small-1', also at"):
        list(read_cases(tmp_path))


def test_cases_written_are_cases_read(tmp_path):
    assert write_cases(tmp_path / "out.jsonl", [small_case()]) == 1
    (read,) = read_cases(tmp_path / "out.jsonl")
    assert read == small_case() and read.raw == small_row()


def trajectory() -> Trajectory:
    return Trajectory(
        case="small-1",
        case_version=1,
        policy="someone",
        seed=7,
        ended="closed",
        messages=(
            Message(
                role="user",
                content="Es tut weh – hier.",
                turn=0,
                phase=Phase.inquiry,
                facts=("pain",),
                why=("opening",),
            ),
            Message(
                role="assistant",
                content="Does it spread?",
                turn=0,
                phase=Phase.inquiry,
                action=Action.ask,
                token_ids=(1, 2),
            ),
            Message(role="user", content="To my arm.", turn=1, phase=Phase.inquiry, facts=("radiation", "pain")),
            Message(
                role="assistant", content="Order: ECG", turn=1, phase=Phase.lab, action=Action.order, meta={"n": 1}
            ),
        ),
    )


def test_a_trajectory_comes_back_as_it_was_written(tmp_path):
    path = tmp_path / "t.jsonl"
    assert write_trajectories(path, [trajectory()]) == 1
    assert list(read_trajectories(path)) == [trajectory()]
    assert path.read_text() == to_line(trajectory().to_json()) + "\n"


def test_a_trajectory_tells_its_turns_facts_and_chat():
    assert trajectory().turns == 2
    assert trajectory().told() == ("pain", "radiation")
    assert [m.content for m in trajectory().of("assistant", Phase.lab)] == ["Order: ECG"]
    assert chat(trajectory().messages)[0] == {"role": "user", "content": "Es tut weh – hier."}


def test_a_foreign_line_is_named(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text(to_line(trajectory().to_json()) + '\n{"schema": "other"}\n')
    with pytest.raises(ValueError, match=r"t\.jsonl:2: trajectory: schema: want 'm3.trajectory/v1'; got 'other'"):
        list(read_trajectories(path))


FOREIGN = {
    "list": ("[1]", "want a JSON object; got list"),
    "deep": ("[" * 100_000, "want JSON"),
    "bytes": (b"\xff\xfe", "want JSON"),
    "content": (
        to_line({**trajectory().to_json(), "messages": [{"role": "user", "content": 5}]}),
        "content: want text",
    ),
    "turn": (
        to_line({**trajectory().to_json(), "messages": [{"role": "user", "content": "x", "m3": {"turn": -3}}]}),
        "turn: want an integer >= 0; got -3",
    ),
}


@pytest.mark.parametrize(("line", "message"), FOREIGN.values(), ids=FOREIGN)
def test_a_malformed_line_is_named(tmp_path, line, message):
    path = tmp_path / "t.jsonl"
    path.write_bytes(line if isinstance(line, bytes) else line.encode())
    with pytest.raises(ValueError, match=rf"t\.jsonl:1: .*{message}"):
        list(read_trajectories(path))


def span(turn: int, value: float, criterion: str) -> SpanReward:
    return SpanReward(turn=turn, token_start=0, token_end=3, value=value, criterion=criterion)


def test_only_the_worst_violation_of_a_step_counts():
    spans = [span(1, 0.9, "rigid_phrasing"), span(1, 0.1, "redundant_question"), span(2, 0.9, "rigid_phrasing")]
    assert step_gammas(spans, 4) == [1.0, 0.1, 0.9, 1.0]
    assert violations(spans, 4) == [set(), {"rigid_phrasing", "redundant_question"}, {"rigid_phrasing"}, set()]


@pytest.mark.parametrize("read", [violations, step_gammas])
def test_a_span_of_no_turn_is_refused(read):
    with pytest.raises(ValueError, match=r"want turns in \[0, 2\); got 2"):
        read([span(2, 0.5, "rigid_phrasing")], 2)


def test_a_penalty_outside_0_to_1_is_refused():
    with pytest.raises(ValueError, match=r"want lambda in \(0, 1\); got 1"):
        step_gammas([span(0, 1.0, "rigid_phrasing")], 1)
