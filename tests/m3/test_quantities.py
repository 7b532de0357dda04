"""Quantities out of text: what two wordings share, what they do not, and what is no quantity at all."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from m3.text.quantities import Quantity, find_quantities, quantities, same_quantities

DAY, YEAR = 86400.0, 31557600.0
READ = {
    "mass": ("500 mg", 0.5, 0.5, "g", ""),
    "no_space": ("500mg", 0.5, 0.5, "g", ""),
    "thousands": ("1,000 mg", 1.0, 1.0, "g", ""),
    "decimal_comma": ("0,5 mg", 5e-4, 5e-4, "g", ""),
    "glyph": ("2½ hours", 9000.0, 9000.0, "s", ""),
    "half_of_a_unit": ("half an hour", 1800.0, 1800.0, "s", ""),
    "molar": ("5 mmol/L", 0.005, 0.005, "mol/L", ""),
    "by_mass": ("90 mg/dL", 0.9, 0.9, "g/L", ""),
    "by_weight_and_day": ("86.4 mg/kg/day", 1e-9, 1e-9, "g/g/s", ""),
    "fahrenheit": ("101.3 °F", 38.5, 38.5, "°C", ""),
    "percent": ("25 percent", 0.25, 0.25, "fraction", ""),
    "one_in_four": ("1 in 4", 0.25, 0.25, "fraction", ""),
    "range": ("2-3 days", 2 * DAY, 3 * DAY, "s", ""),
    "between": ("between 2 and 3 days", 2 * DAY, 3 * DAY, "s", ""),
    "units_twice": ("5%-10%", 0.05, 0.1, "fraction", ""),
    "less": ("fewer than 3", 3.0, 3.0, "", "<"),
    "no_more": ("no more than 3", 3.0, 3.0, "", "<="),
    "or_older": ("65 years or older", 65 * YEAR, 65 * YEAR, "s", ">="),
    "age": ("aged 65 and over", 65 * YEAR, 65 * YEAR, "s", ">="),
    "twice_daily": ("twice daily", 2.31481481e-05, 2.31481481e-05, "1/s", ""),
    "every": ("every 4 to 6 hours", 4 * 3600.0, 6 * 3600.0, "every s", ""),
    "power": ("4 x 10^9/L", 4e9, 4e9, "1/L", ""),
    "superscript": ("10⁹/L", 1e9, 1e9, "1/L", ""),
    "ordinal": ("2nd", 2.0, 2.0, "ordinal", ""),
    "decade": ("thirties", 30.0, 30.0, "decade", ""),
    "roman": ("type II", 2.0, 2.0, "", ""),
    "words": ("one hundred and twenty-five", 125.0, 125.0, "", ""),
    "below_zero": ("a score of -2.5", -2.5, -2.5, "", ""),
}
ALIKE = [
    ("24 hours", "one day"),
    ("500 mg", "0.5 g"),
    ("14 to 21 days", "2–3 weeks"),
    ("12 months", "a duration of one year"),
    ("twice a day", "2x/day"),
    ("BID", "two times per day"),
    ("three drinks a day", "3 drinks daily"),
    ("half of patients", "50% of patients"),
    ("two thirds", "2/3"),
    ("at least 18 years of age", "18 years or more"),
    ("up to 40%", "not more than 40 percent"),
    ("120/80 mmHg", "120/80"),
    ("stage IV", "stage 4"),
    ("in her 30s", "in her thirties"),
    ("5 mg then 10 mg", "10 mg then 5 mg"),
    ("about 5 kg", "approximately 5000 g"),
]
APART = [
    ("5 mg", "5 mcg"),
    ("5 mmol/L", "5 mg/dL"),
    ("2 days", "3 days"),
    ("4 weeks", "1 month"),
    ("5 mg", "5 mg/kg"),
    ("5 mg", "5 mg and 5 mg"),
    ("at least 5", "more than 5"),
    ("at least 5", "at most 5"),
    ("up to 5", "5"),
    ("120/80", "80/120"),
    ("2-3", "2 and 3"),
    ("once daily", "once weekly"),
    ("38 °C", "38 °F"),
    ("second dose", "2 doses"),
    ("10⁹/L", "109/L"),
    ("2½", "21/2"),
    ("5 percentage points", "5 percent"),
    ("type I", "type II"),
    ("every 12 hours", "every 24 hours"),
]
NONE = ["", "vitamin B12", "COVID-19", "omega-3 and HbA1c", "no one", "L5-S1", "hindquarter", "May improve"]


@pytest.mark.parametrize(("text", "low", "high", "unit", "comparator"), READ.values(), ids=READ)
def test_quantity_in_base_units(text, low, high, unit, comparator):
    wanted = [pytest.approx(low), pytest.approx(high), unit, comparator]
    assert [[one.low, one.high, one.unit, one.comparator] for one in quantities(text)] == [wanted]


@pytest.mark.parametrize(("one", "other"), ALIKE)
def test_rewordings_are_the_same(one, other):
    assert same_quantities(one, other)


@pytest.mark.parametrize(("one", "other"), APART)
def test_other_quantities_are_not(one, other):
    assert not same_quantities(one, other)


@pytest.mark.parametrize("text", NONE)
def test_no_quantity(text):
    assert quantities(text) == []


def test_characters_cover_comparator_and_unit():
    text = "Take no more than 4 g per day, for at least 65 years old."
    assert [text[one.start : one.end] for one in find_quantities(text)] == [
        "no more than 4 g per day",
        "at least 65 years old",
    ]


@given(st.integers(1, 10**6), st.sampled_from([("mg", "g", 1e-3), ("ml", "L", 1e-3), ("days", "s", DAY)]))
def test_any_whole_number(number, unit):
    name, base, factor = unit
    wanted = float(f"{number * factor:.9g}")
    assert quantities(f"Take {number} {name} now") == [Quantity(low=wanted, high=wanted, unit=base)]


@given(st.text(max_size=60))
def test_any_text_is_read_without_overlap(text):
    found = find_quantities(text)
    assert all(0 <= one.start < one.end <= len(text) for one in found)
    assert all(a.end <= b.start for a, b in itertools.pairwise(found))


PIECES = "1 2 3,5 ½ 10⁹ ⁻ ⁰ ^ 0 99 in x / - to 5% mg a day per once half of third and °F II stage".split()


@given(st.lists(st.sampled_from(PIECES), max_size=9), st.sampled_from(["", " "]))
def test_any_jumble_of_numbers_is_read(parts, joint):
    text = joint.join(parts)
    assert all(text[one.start : one.end].strip() for one in find_quantities(text))
