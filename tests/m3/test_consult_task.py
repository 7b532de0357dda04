"""The consultation task: its cases, its patient, what violates what, the exact score, the scripted physicians."""

import random

import pytest

from m3.train.tasks import consult as task
from m3.train.tasks.consult import Case, Consultation, Points

COUGH = Case(  # complains of cough; sputum and a red flag; fever with chills; nothing else
    department=0, complaint=0, values=tuple(bool(int(one)) for one in "1101 0000 0000 1100".replace(" ", ""))
)


def word(text: str) -> int:
    return task.WORDS.index(text)


def said(case: Case, *steps: str, max_turns: int = task.MAX_TURNS) -> tuple[Consultation, list[str]]:
    now, answers = Consultation(case, max_turns=max_turns), []
    for step in steps:
        first, second = step.split()
        answer = now.act(word(first), word(second))
        answers.append("" if answer is None else task.WORDS[answer])
    return now, answers


def test_vocabulary() -> None:
    assert len(task.WORDS) == len(set(task.WORDS)) == 72
    assert task.WORDS[task.FIRST_FINDING] == "cough" and task.WORDS[task.FIRST_CONDITION] == "cough-nn"


def test_condition_follows_from_the_two_deciding_findings() -> None:
    assert task.WORDS[COUGH.condition] == "cough-yn"  # sputum, no chest-pain
    circle = Case(department=1, complaint=3, values=tuple([True] + [False] * 11 + [True, False, False, False]))
    assert task.text(circle.opening) == "<s> complains jaundice"
    assert task.WORDS[circle.condition] == "jaundice-ny"  # no itch, belly-pain


def test_checklist_by_hand() -> None:
    assert task.checklist(COUGH) == {1: 3.0, 2: 3.0, 3: 5.0, 4: 2.0, 8: 2.0, 12: 2.0, 13: 1.0, 14: 1.0, 15: 1.0}


def test_patient_answers_what_is_asked() -> None:
    _, answers = said(COUGH, "please sputum", "state wheeze", "please vomiting", "yes no", "diagnosis cough-yn")
    assert answers == ["yes", "no", "no", "pardon", ""]


@pytest.mark.parametrize(
    ("steps", "violations"),
    [
        (["please sputum"], ()),
        (["please cough"], ("redundant_question",)),
        (["please sputum", "please sputum"], ("redundant_question",)),
        (["state sputum", "state sputum"], ("rigid_phrasing", "redundant_question")),
        (["please chills"], ("illogical_order",)),  # fever not asked
        (["please chest-pain", "please pressing"], ("illogical_order",)),  # and it is not there
        (["please fever", "please chills"], ()),
        (["please fever", "please sputum"], ("illogical_order",)),  # cough was left
        (["please sputum", "please fever", "please sputum"], ("redundant_question",)),  # what was told has no order
        (["please vomiting"], ("illogical_order",)),  # another department's
        (["sputum please"], ("rigid_phrasing",)),
        (["please please"], ("rigid_phrasing",)),
        (["diagnosis sputum"], ("rigid_phrasing",)),
        (["diagnosis cough-yn"], ("safety_risk",)),
        (["please blood-sputum", "diagnosis cough-yn"], ()),
    ],
)
def test_violations_of_the_last_step(steps: list[str], violations: tuple[str, ...]) -> None:
    assert said(COUGH, *steps)[0].violations[-1] == violations


def test_score_by_hand() -> None:
    now, _ = said(COUGH, "please blood-sputum", "state cough", "please fever", "diagnosis cough-yn")
    score = now.score()
    # reached: 5 + 2 of 20 for questions, 10 for the diagnosis, 5 for not being wrong; 35 in all
    assert score.reward == pytest.approx(22 / 35) and score.coverage == pytest.approx(7 / 20)
    assert (score.turns, score.diagnosed) == (4, True)
    assert [score.clean(name) for name in ("redundant_question", "rigid_phrasing", "safety_risk")] == [0.75, 0.75, 1.0]


def test_a_wrong_diagnosis_costs_and_so_does_none() -> None:
    assert said(COUGH, "diagnosis cough-nn")[0].score().reward == 0.0
    now, _ = said(COUGH, "please wheeze", max_turns=1)
    assert now.done and now.score().diagnosed is None
    assert now.score().reward == pytest.approx(3 / 35)


def test_points_are_of_the_checklist() -> None:
    now = Consultation(COUGH, points=Points(diagnosis=4.0, wrong=-6.0))
    now.act(task.DIAGNOSIS, COUGH.condition)
    assert now.score().reward == pytest.approx(10 / 30)


def test_nothing_is_said_after_the_end() -> None:
    now, _ = said(COUGH, "diagnosis cough-nn")
    with pytest.raises(ValueError, match="after its end"):
        now.act(task.PLEASE, word("sputum"))


def test_held_out_cases_are_never_drawn_for_training() -> None:
    chance = random.Random(0)
    trained = {task.draw_case(chance).id for _ in range(3000)}
    held = {case.id for case in task.draw_cases(200, "a", held_out=True)}
    assert len(held) == 200 and not trained & held


def test_cases_of_a_department() -> None:
    assert {case.department for case in task.draw_cases(50, "b", department="belly")} == {1}
    assert {case.department for case in task.draw_cases(50, "b")} == {0, 1}
    with pytest.raises(ValueError, match=r"department: want of \('chest', 'belly'\); got 'skin'"):
        task.draw_case(random.Random(0), department="skin")


def test_details_are_there_only_with_their_stem() -> None:
    values = [case.values for case in task.draw_cases(200, "c")]
    assert all(row[stem] or not any(row[stem : stem + 4]) for row in values for stem in (0, 4, 8, 12))


def test_the_good_physician_is_perfect_and_the_mediocre_one_is_not() -> None:
    cases = task.draw_cases(100, "d")
    good = [task.consult(case, task.GOOD, random.Random(case.id))[1] for case in cases]
    assert {score.reward for score in good} == {1.0}
    assert not any(step for score in good for step in score.violations)
    plain = [task.consult(case, task.Habits(), random.Random(case.id))[1] for case in cases]
    assert 0.4 < sum(score.reward for score in plain) / 100 < 0.65
    assert {name for score in plain for step in score.violations for name in step} == {
        "redundant_question", "illogical_order", "safety_risk", "rigid_phrasing",
    }  # fmt: skip


def test_tokens_of_a_scripted_consultation_replay_to_its_score() -> None:
    case = task.draw_cases(1, "e")[0]
    ids, score = task.consult(case, task.Habits(), random.Random(5))
    now, at = Consultation(case), task.OPENING
    while not now.done:
        answer = now.act(ids[at], ids[at + 1])
        assert answer is None or ids[at + 2] == answer
        at += task.STEP
    assert now.score() == score and tuple(ids[:3]) == case.opening
