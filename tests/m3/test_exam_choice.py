"""Orders of examinations: reading them, what the case says of each, weighted F1 by hand, and ordering everything."""

from __future__ import annotations

import math

import pytest
from clinic_cases import small_case, small_row

from m3.environment.case import own_cases
from m3.rewards.exam_choice import Config, Order, everything, match, needs, read_orders, weighted_f1

READ = {
    "list": ("- 12-lead ECG\n- Troponin (serial)", [("12-lead ECG", "ecg"), ("Troponin (serial)", "cardiac_markers")]),
    "numbers": ("1. MRI brain\n2) EEG", [("MRI brain", "mri"), ("EEG", "neurophysiology")]),
    "one_line_of_several": (
        "- CBC, CRP and a CT of the head",
        [("CBC", "full_blood_count"), ("CRP", "inflammatory_markers"), ("CT of the head", "ct")],
    ),
    "sentence_with_a_reason": (
        "I would order a chest X-ray to rule out pneumonia.",
        [("chest X-ray", "plain_radiography")],
    ),
    "command": ("REQUEST TEST: Chest_X-Ray", [("Chest_X-Ray", "plain_radiography")]),
    "group": ("- Blood tests: FBC, U&E", [("FBC", "full_blood_count"), ("U&E", "electrolytes_and_renal_function")]),
    "blood_is_no_filler": ("- Blood cultures", [("Blood cultures", "blood_culture")]),
    "one_category_stays_one": ("- PT and INR", [("PT and INR", "coagulation")]),
    "not_wanted": ("- No CT needed\n- ECG", [("ECG", "ecg")]),
    "each_once": ("- ECG\n- ecg", [("ECG", "ecg")]),
    "question": ("What is your age?", []),
    "nothing": ("", []),
    "unknown": ("- Xyzzy", [("Xyzzy", "")]),
}


@pytest.mark.parametrize(("text", "orders"), READ.values(), ids=READ)
def test_read_orders(text, orders):
    assert [(order.text, "".join(order.categories)) for order in read_orders(text)] == orders


def test_a_panel_is_one_order_of_two_categories():
    order = Order(text="CMP", categories=("electrolytes_and_renal_function", "liver_function"))
    assert read_orders("- CMP") == [order]


# The small case: ecg and cardiac_markers essential, plain_radiography optional, neurophysiology irrelevant: w 3, 3, 1.
F1 = {
    "all_wanted": ("- ECG\n- Troponin\n- Chest radiograph", 1.0, 1.0),
    "essential_only": ("- ECG\n- Troponin", 1.0, 6 / 7),
    "one_essential": ("- ECG", 1.0, 3 / 7),
    "optional_only": ("- CXR", 1.0, 1 / 7),
    "irrelevant_by_name": ("- ECG\n- EEG", 1 / 2, 3 / 7),
    "irrelevant_category": ("- ECG\n- MRI brain", 1 / 2, 3 / 7),
    "same_category_twice": ("- ECG\n- Holter monitor", 1.0, 3 / 7),
    "unknown_test": ("- ECG\n- Xyzzy", 1 / 2, 3 / 7),
    "nothing": ("I would wait.", 0.0, 0.0),
    "only_wrong": ("- EEG", 0.0, 0.0),
}


@pytest.mark.parametrize(("text", "precision", "recall"), F1.values(), ids=F1)
def test_weighted_f1_by_hand(text, precision, recall):
    found = weighted_f1(small_case(), [] if text == "I would wait." else text)
    assert found.precision == pytest.approx(precision)
    assert found.recall == pytest.approx(recall)
    total = precision + recall
    assert found.f1 == pytest.approx(2 * precision * recall / total if total else 0.0)


def test_parts_of_the_score():
    found = weighted_f1(small_case(), "- ECG\n- CXR\n- EEG")
    assert (found.essential_recall, found.optional_recall) == (0.5, 1.0)
    assert found.missed == ("cardiac_markers",)
    assert found.choice.irrelevant == ("neurophysiology",)


def with_exam(**fields):
    row = small_row()
    row["exams"].append({"id": "x", "name": "CT with contrast", "category": "ct", "need": "harmful", **fields})
    return small_case(exams=row["exams"])


def test_harmful_weighs_three_irrelevant_ones():
    found = weighted_f1(with_exam(), "- ECG\n- CT with contrast")
    assert found.choice.harmful == ("ct",)
    assert found.precision == pytest.approx(1 / 4)


def test_harmful_by_name_beside_an_essential_category():
    case = with_exam(name="Exercise ECG", category="ecg")
    assert needs(case)["ecg"] == "essential"
    assert match(case, read_orders("- Exercise ECG")).harmful == ("ecg",)
    assert match(case, read_orders("- 12-lead ECG")).essential == ("ecg",)


def test_need_that_the_case_does_not_say_counts_neither_way():
    found = weighted_f1(with_exam(need="unknown"), "- ECG\n- CT with contrast")
    assert found.choice.unjudged == ("ct",)
    assert found.precision == 1.0


def test_case_without_wanted_examinations_is_refused():
    with pytest.raises(ValueError, match="want essential or optional examinations; got none in 'small-1'"):
        weighted_f1(small_case(exams=[]), "- ECG")


def test_weights_are_configured():
    found = weighted_f1(small_case(), "- ECG", Config(essential=10, optional=1))
    assert found.recall == pytest.approx(10 / 21)
    with pytest.raises(ValueError, match=r"exam_choice\.Config: essential: want"):
        Config(essential=1, optional=1)
    with pytest.raises(ValueError, match=r"exam_choice\.Config: harmful: want"):
        Config(harmful=0.5)


@pytest.mark.parametrize("name", ["essential", "harmful", "unknown"])
@pytest.mark.parametrize("weight", [math.nan, math.inf])
def test_weights_are_numbers(name, weight):
    with pytest.raises(ValueError, match=r"exam_choice\.Config: .*, finite"):
        Config(**{name: weight})


@pytest.mark.parametrize("case", own_cases(), ids=lambda case: case.id)
def test_ordering_everything_scores_low(case):
    """Below one half, and far below the essential examinations alone."""
    chosen = "\n".join(f"- {exam.name}" for exam in case.exams if exam.need == "essential")
    all_of_them = weighted_f1(case, everything()).f1
    assert all_of_them < 0.45
    assert weighted_f1(case, chosen).f1 > all_of_them + 0.2


def test_everything_is_38_categories():
    assert weighted_f1(small_case(), everything()).f1 == pytest.approx(2 * (3 / 38) / (1 + 3 / 38))
