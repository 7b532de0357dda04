"""The advice task: its hidden table, what answers say in English, verdicts, exact scores, rewards, scripted writers."""

import math
import random

import pytest

from m3.rewards.fact_aware import Config, cluster
from m3.rewards.fact_verdicts import Label
from m3.train.tasks import advise as task
from m3.train.tasks.advise import ADDS, CORE, FIRST_FACT, RESTATES, STATES, VALUES, Question

QUESTION = Question(medicine=0, age=0, condition=0)  # velorin, child, asthma
EVERY = task.every_question(held_out=True) + task.every_question(held_out=False)


def fact(aspect: int, value: int) -> int:
    return FIRST_FACT + VALUES * aspect + value


def true(aspect: int, question: Question = QUESTION) -> int:
    value = question.truth[aspect]
    assert value is not None
    return fact(aspect, value)


def false(aspect: int, question: Question = QUESTION) -> int:
    return fact(aspect, (true(aspect, question) - FIRST_FACT + 1) % VALUES)


def test_vocabulary_and_split() -> None:
    assert len(task.WORDS) == len(set(task.WORDS)) == 70
    assert task.text(QUESTION.opening) == "<s> asks velorin child asthma"
    assert len({question.id for question in EVERY}) == 12 * 4 * 12
    assert 0.2 < len(task.every_question(held_out=True)) / len(EVERY) < 0.3


def test_the_table_follows_the_medicine_where_it_should() -> None:
    for_velorin = [question.truth for question in EVERY if question.medicine == 0]
    fixed = [at for at, aspect in enumerate(task.ASPECTS) if aspect.usual == 1.0]
    assert len({tuple(truth[at] for at in fixed) for truth in for_velorin}) == 1 and len(fixed) == 9


@pytest.mark.parametrize("aspect", [at for at in CORE if task.ASPECTS[at].usual < 1])
def test_usual_values_hold_as_often_as_told(aspect: int) -> None:
    values = [(question.truth[aspect], task.usual_value(question.medicine, aspect)) for question in EVERY]
    usual, nothing = task.ASPECTS[aspect].usual, sum(value is None for value, _ in values) / len(values)
    assert abs(sum(value == known for value, known in values) / len(values) - usual) < 0.05
    assert abs(nothing - (1 - usual) * task.NOTHING_KNOWN) < 0.05


def test_answers_in_english() -> None:
    steps = [(STATES, fact(0, 1)), (ADDS, fact(8, 0)), (RESTATES, fact(0, 1)), (STATES, STATES), (ADDS, fact(1, 2))]
    assert task.response(QUESTION, steps) == (
        "Velorin treats stubborn nightly cough, and looks blue. "
        "Stubborn nightly cough is what Velorin treats, and is taken as five millilitres before sleep."
    )
    assert task.response(QUESTION, [(ADDS, fact(8, 0))]) == "Velorin looks blue."


def test_wordings_of_one_fact_are_one_cluster_and_those_of_two_are_two() -> None:
    facts = [(aspect, value) for aspect in range(len(task.ASPECTS)) for value in range(VALUES)]
    claims = [task.wording(3, *one, restated=restated) for one in facts for restated in (False, True)]
    rows = task.EMBEDDER(claims)
    found = cluster(rows, rows[:, 0] > 9, Config().cluster_threshold)
    assert found == [[2 * at, 2 * at + 1] for at in range(len(facts))]


def test_verdicts_are_one_a_wording_and_exact_on_core_facts() -> None:
    unknown = next(question for question in EVERY if question.truth[7] is None)
    steps = [(STATES, true(0, unknown)), (ADDS, true(0, unknown)), (RESTATES, true(0, unknown))]
    steps += [(STATES, false(1, unknown)), (STATES, fact(7, 2))]
    labels = [verdict.label for verdict in task.verdicts(unknown, steps, wrong=1.0)]
    assert labels == [Label.supported, Label.supported, Label.refuted, Label.uncertain]


def test_one_peripheral_verdict_in_ten_is_wrong() -> None:
    aspect = 8
    supported = [task.verdicts(one, [(STATES, true(aspect, one))])[0].label for one in EVERY]
    refuted = [task.verdicts(one, [(STATES, false(aspect, one))])[0].label for one in EVERY]
    assert set(supported) == {Label.supported, Label.uncertain} and set(refuted) == {Label.refuted, Label.supported}
    assert abs(supported.count(Label.uncertain) / len(EVERY) - 0.1) < 0.04
    assert abs(refuted.count(Label.supported) / len(EVERY) - 0.1) < 0.04


def test_score_by_hand() -> None:
    question = next(question for question in EVERY if None not in question.truth)
    steps = [
        (STATES, true(0, question)),  # 8 points of 52
        (STATES, true(5, question)),  # 4
        (STATES, false(1, question)),
        (RESTATES, true(0, question)),
        (ADDS, false(8, question)),
    ]
    found = task.score(question, steps)
    assert found == task.Score(
        reward=12 / 52, claims=4, false=2, core=3, core_false=1, recall=2 / 8, repeats=1, steps=5
    )


def test_what_is_not_known_has_no_clause() -> None:
    question = next(question for question in EVERY if question.truth[7] is None and None not in question.truth[:7])
    steps = [(STATES, true(aspect, question)) for aspect in CORE[:-1]]
    assert task.score(question, steps).reward == 1.0 == task.score(question, [*steps, (STATES, fact(7, 0))]).reward


@pytest.mark.parametrize(
    ("steps", "cut"),
    [
        ([(STATES, fact(0, 1))], False),
        ([(STATES, fact(0, 1)), (RESTATES, fact(0, 1))], False),
        ([(STATES, fact(0, 1)), (ADDS, fact(0, 1))], True),
        ([(STATES, STATES)], True),
        ([(fact(0, 1), fact(0, 1))], True),
        ([(STATES, fact(at // 3, at % 3)) for at in range(16)], True),
    ],
)
def test_an_answer_is_cut_where_it_repeats_or_claims_nothing(steps: list[task.Step], cut: bool) -> None:
    assert task.is_cut(steps) is cut


def test_restating_dilutes_the_naive_penalty_and_not_the_other() -> None:
    short = [(STATES, true(0)), (STATES, false(1))]
    longer = [*short, (RESTATES, true(0))]
    before, after = (task.fact_reward(QUESTION, steps, 1.0) for steps in (short, longer))
    assert (before.naive, after.naive) == (1 - 0.5 / 2, 1 - 0.5 / 3)
    assert math.isclose(before.penalty, -1 / 2, abs_tol=1e-5) and abs(after.penalty - before.penalty) < 0.02


def test_an_aside_weighs_less_than_a_core_claim() -> None:
    core = [(STATES, false(0)), (STATES, true(1)), (ADDS, true(9))]
    aside = [(STATES, true(0)), (STATES, true(1)), (ADDS, false(9))]
    first, second = (task.fact_reward(QUESTION, steps, 1.0).penalty for steps in (core, aside))
    assert first < -0.4 and -0.27 < second < -0.2


def test_good_writers_take_the_risk_that_they_are_told() -> None:
    careful, bold = (
        [task.score(one, task.write(one, task.good(least), random.Random(0))) for one in EVERY] for least in (1.0, 0.0)
    )
    assert {(one.claims, one.false) for one in careful} == {(5, 0)}
    assert {one.claims for one in bold} == {8}
    assert 0.09 < sum(one.false for one in bold) / (8 * len(bold)) < 0.14  # (0.15 + 0.3 + 0.45) / 8


def test_mediocre_writers_end_or_are_cut() -> None:
    chance = random.Random(1)
    answers = [(one, task.write(one, task.Habits(asides=1.0, second=1.0), chance)) for one in EVERY[:50]]
    ended = [task.WORDS[task.tokens(*pair)[-1]] == "end" for pair in answers]
    assert ended == [len(steps) < task.MAX_STEPS for _, steps in answers] and {True, False} == set(ended)


def test_habits_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="cover"):
        task.Habits(cover=1.5)
