"""Rubrics: equation 1 beside an own statement of it and by hand, what may be left out, checklists, files of rows."""

from __future__ import annotations

import json
import re
from fractions import Fraction

import pytest
from clinic_cases import small_case
from hypothesis import given
from hypothesis import strategies as st

from m3.environment.case import Phase
from m3.rewards.rubric import (
    HealthBenchRow,
    Rubric,
    RubricItem,
    case_row,
    checklist_rubric,
    read_healthbench,
    rubric_reward,
    score_rubric,
    write_healthbench,
)
from m3.rewards.verdict import Outcome, UnjudgedError, Verdict

weights = st.integers(-10, 10).filter(bool)
tables = st.lists(st.tuples(weights, st.booleans()), min_size=1, max_size=40)


def equation_1(table) -> Fraction:
    """Eq 1 restated: of all weight there is, the part earned: good clauses met, bad clauses not met."""
    earned = sum(Fraction(abs(weight)) for weight, met in table if met == (weight > 0))
    return earned / sum(Fraction(abs(weight)) for weight, _ in table)


def verdicts(outcomes: dict[str, Outcome]) -> list[Verdict]:
    return [Verdict(criterion=one, outcome=outcome) for one, outcome in outcomes.items()]


# -- equation 1 -------------------------------------------------------------------------------------------------------
@given(tables)
def test_reward_is_equation_1(table):
    found = rubric_reward([weight for weight, _ in table], [met for _, met in table])
    assert found == pytest.approx(float(equation_1(table)), abs=1e-15)
    assert 0 <= found <= 1


BY_HAND = {
    "all_good": ([5, 3, -2], [True, True, False], 1.0),
    "all_bad": ([5, 3, -2], [False, False, True], 0.0),
    "nothing_met": ([5, 3, -2], [False, False, False], 0.2),
    "everything_met": ([5, 3, -2], [True, True, True], 0.8),
    "negative_only_clean": ([-4, -6], [False, False], 1.0),
    "negative_only_one_met": ([-4, -6], [True, False], 0.6),
    "negative_only_all_met": ([-4, -6], [True, True], 0.0),
    "one_clause": ([0.5], [True], 1.0),
}


@pytest.mark.parametrize(("points", "met", "reward"), BY_HAND.values(), ids=BY_HAND)
def test_reward_by_hand(points, met, reward):
    assert rubric_reward(points, met) == pytest.approx(reward)


@given(tables, st.integers(0, 39))
def test_meeting_a_clause_moves_the_reward_by_its_weight(table, place):
    place %= len(table)
    points = [weight for weight, _ in table]
    low, high = ([met if i != place else bit for i, (_, met) in enumerate(table)] for bit in (False, True))
    moved = rubric_reward(points, high) - rubric_reward(points, low)
    assert moved == pytest.approx(points[place] / sum(map(abs, points)))


REFUSED = {
    "no_rubric": (lambda: rubric_reward([], []), "rubric_reward: points: want one clause or more; got no rubric"),
    "named_no_rubric": (
        lambda: score_rubric(Rubric((), id="case-7"), []),
        "score_rubric: rubric: want one clause or more; got no rubric ('case-7')",
    ),
    "weight_0": (lambda: rubric_reward([1, 0], [True, True]), "want numbers in [-10, 10], none 0; got 0"),
    "weight_11": (lambda: rubric_reward([11], [True]), "want numbers in [-10, 10], none 0; got 11"),
    "not_a_number": (lambda: rubric_reward([float("nan")], [True]), "none 0; got nan"),
    "name_for_met": (lambda: rubric_reward([3], [Outcome.not_met]), "met: want true or false of each clause; got <Out"),
    "nan_for_met": (lambda: rubric_reward([3], [float("nan")]), "met: want true or false of each clause; got nan"),
    "lengths": (lambda: rubric_reward([1, 2], [True]), "met: want 2 of them, one a clause; got 1"),
    "points": (lambda: RubricItem(id="a", criterion="x", points=True), "points of 'a': want a number in [-10, 10]"),
    "criterion": (lambda: RubricItem(id="a", criterion=" ", points=1), "criterion of 'a': want text"),
    "tags": (lambda: RubricItem(id="a", criterion="x", points=1, tags=("t", "t")), "tags of 'a': want each tag once"),
    "ids": (
        lambda: Rubric((RubricItem(id="a", criterion="x", points=1),) * 2, id="r"),
        "Rubric 'r': items: want each id once; got 'a'",
    ),
    "max_unjudged": (
        lambda: score_rubric(TWO, [], max_unjudged=1.0),
        "score_rubric: max_unjudged: want a share in [0, 1); got 1.0",
    ),
    "verdict_missing": (lambda: score_rubric(TWO, verdicts({"a": Outcome.met})), "1 for 2 clauses, differing in 'b'"),
    "verdict_twice": (
        lambda: score_rubric(TWO, verdicts({"a": Outcome.met, "b": Outcome.met}) + verdicts({"a": Outcome.met})),
        "3 for 2 clauses",
    ),
}
TWO = Rubric((RubricItem(id="a", criterion="x", points=3), RubricItem(id="b", criterion="y", points=-1)), id="two")


@pytest.mark.parametrize(("call", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


# -- from verdicts ----------------------------------------------------------------------------------------------------
def test_score_is_matched_by_id_whatever_the_order():
    found = score_rubric(TWO, verdicts({"b": Outcome.met, "a": Outcome.not_met}))
    assert (found.reward, found.judged, found.left_out) == (0.0, 2, {})


def test_unjudged_is_no_score():
    outcomes = verdicts({"a": Outcome.met, "b": Outcome.unparsable})
    with pytest.raises(UnjudgedError, match="rubric 'two': 1 of 2 clauses unjudged: unparsable 1"):
        score_rubric(TWO, outcomes)


def test_unjudged_may_be_left_out_by_consent_and_is_counted():
    outcomes = verdicts({"a": Outcome.met, "b": Outcome.timeout})
    found = score_rubric(TWO, outcomes, max_unjudged=0.5)
    assert (found.reward, found.judged, found.left_out) == (1.0, 1, {Outcome.timeout: 1})
    with pytest.raises(UnjudgedError):
        score_rubric(TWO, outcomes, max_unjudged=0.49)


def test_nothing_judged_is_never_a_score():
    outcomes = verdicts({"a": Outcome.over_budget, "b": Outcome.timeout})
    with pytest.raises(UnjudgedError, match="2 of 2 clauses unjudged: over_budget 1, timeout 1"):
        score_rubric(TWO, outcomes, max_unjudged=0.99)


# -- checklists -------------------------------------------------------------------------------------------------------
def test_checklist_becomes_a_rubric():
    rubric = checklist_rubric(small_case())
    assert rubric.id == "small-1"
    assert [(item.id, item.points) for item in rubric.items] == [
        ("c-radiation", 6),
        ("c-smoking", 3),
        ("c-fever", 2),
        ("c-escalate", 8),
        ("c-reassure", -9),
    ]
    assert rubric.items[0].tags == ("level:2", "scan:C", "phase:inquiry", "kind:must_ask", "section:HPI")


def test_checklist_of_one_stage():
    rubric = checklist_rubric(small_case(), [Phase.diagnosis])
    assert [item.id for item in rubric.items] == ["c-escalate", "c-reassure"]


# -- HealthBench's files ----------------------------------------------------------------------------------------------
ROW = {
    "example_tags": ["theme:a", "group:b"],
    "ideal_completions_data": None,
    "prompt": [{"role": "user", "content": "Is 38.5 °C high?"}],
    "prompt_id": "p-1",
    "rubrics": [
        {"criterion": "Says that it is a fever.", "points": 7, "tags": ["level:example", "axis:accuracy"]},
        {"criterion": "Alarms.", "points": -3.5, "tags": []},
    ],
    "canary": "kept",
}


def test_row_comes_back_as_it_was(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROW) + "\n\n" + json.dumps({**ROW, "prompt_id": "p-2"}) + "\n", encoding="utf-8")
    rows = list(read_healthbench(path))
    assert [row.to_json() for row in rows] == [ROW, {**ROW, "prompt_id": "p-2"}]
    assert [str(item) for item in rows[0].rubric.items] == ["[7] Says that it is a fever.", "[-3.5] Alarms."]
    assert write_healthbench(tmp_path / "again.jsonl", rows) == 2
    assert list(read_healthbench(tmp_path / "again.jsonl")) == rows


def test_checklist_survives_the_file(tmp_path):
    row = case_row(small_case())
    write_healthbench(tmp_path / "case.jsonl", [row])
    assert list(read_healthbench(tmp_path / "case.jsonl")) == [row]
    written = json.loads((tmp_path / "case.jsonl").read_text(encoding="utf-8"))
    assert set(written) == {"example_tags", "prompt", "prompt_id", "rubrics"}
    assert {"level:2", "scan:C", "id:c-radiation"} <= set(written["rubrics"][0]["tags"])


def changed(**fields):
    return json.dumps({**ROW, **fields})


BROKEN = {
    "json": ('{"prompt_id": ', "rows.jsonl:2: want JSON"),
    "many_digits": ('{"a": ' + "1" * 5000 + "}", "rows.jsonl:2: want JSON"),
    "deep": ("[" * 100_000, "rows.jsonl:2: want JSON"),
    "half_a_character": (changed(prompt_id="\ud83d"), "rows.jsonl:2: want JSON"),
    "top": ("[]", "rows.jsonl:2: want a JSON object; got list"),
    "no_rubrics": (
        json.dumps({"prompt_id": "q", "prompt": ROW["prompt"], "example_tags": []}),
        ": rubrics: want the",
    ),
    "role": (changed(prompt_id="q", prompt=[{"content": "x"}]), ":2: prompt.0.role: want text; got NoneType"),
    "empty_prompt": (changed(prompt_id="q", prompt=[]), ":2: prompt: want one message or more; got none"),
    "points": (
        changed(prompt_id="q", rubrics=[{"criterion": "x", "points": "5", "tags": []}]),
        ":2: rubrics.0: RubricItem: points of '0': want a number in [-10, 10], not 0; got '5'",
    ),
    "no_points": (
        changed(prompt_id="q", rubrics=[{"criterion": "x", "tags": []}]),
        ":2: rubrics.0: RubricItem",
    ),
    "criterion": (changed(prompt_id="q", rubrics=[{"points": 5, "tags": []}]), ":2: rubrics.0.criterion: want text"),
    "tags": (changed(prompt_id="q", example_tags=["a", "a"]), ":2: example_tags: want each tag once; got ('a', 'a')"),
    "twice": (changed(), ":2: prompt_id: want an id used once; got 'p-1', also at "),
}


@pytest.mark.parametrize(("line", "message"), BROKEN.values(), ids=BROKEN)
def test_broken_row_names_file_line_and_field(tmp_path, line, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROW) + "\n" + line + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape(message)):
        list(read_healthbench(path))


def test_row_may_have_no_positive_clause():
    row = HealthBenchRow.from_json({**ROW, "rubrics": ROW["rubrics"][1:]})
    assert rubric_reward([item.points for item in row.rubric.items], [True]) == 0.0
