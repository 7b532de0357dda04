"""The project's own cases: each of the quality the checklist needs, and the lot as ScanBench's make-up has it."""

from __future__ import annotations

import functools
import importlib
import itertools
import re
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

from m3.environment.case import OWN_CASES, Case, Disclosure, Phase, own_cases, read_cases
from m3.text.words import content_stems, stems

FILES = sorted(OWN_CASES.glob("*.json"))
QUOTA = {  # cases of each department: ScanBench's shares (arXiv 2602.06570) over 24, every department at least one
    "general_practice": 4,
    "surgery": 2,
    "gynaecology": 2,
    "neurology": 2,
    "gastroenterology": 2,
    "cardiology": 2,
    "respiratory": 2,
    "endocrinology": 2,
    "haematology": 2,
    "geriatrics": 2,
    "nephrology": 1,
    "rheumatology": 1,
}
NOTE = "synthetic; not reviewed by a clinician"


@functools.cache
def read(file: Path) -> Case:
    """The one case of a file."""
    (one,) = read_cases(file)
    return one


@pytest.fixture(params=FILES, ids=lambda file: file.stem)
def case(request: pytest.FixtureRequest) -> Case:
    """One own case: read, hence of the schema."""
    return read(request.param)


@pytest.fixture(scope="module")
def icd10() -> ModuleType:
    """The tree of ICD-10-CM, where it is installed."""
    try:
        return importlib.import_module("m3.environment.icd10")
    except ModuleNotFoundError:
        pytest.skip("m3.environment.icd10 is absent: codes cannot be looked up")


def names_of_diagnosis(case: Case) -> list[str]:
    """The label and its synonyms, lower case."""
    return [name.lower() for name in (case.diagnosis.label, *case.diagnosis.synonyms)]


def names_in(case: Case, text: str) -> list[str]:
    """The names of the diagnosis that stand in a text as whole words."""
    return [name for name in names_of_diagnosis(case) if re.search(rf"\b{re.escape(name)}\b", text.lower())]


# -- one case ---------------------------------------------------------------------------------------------------------
def test_file_carries_the_case_of_its_name(case: Case, request: pytest.FixtureRequest) -> None:
    assert case.id == request.node.callspec.params["case"].stem
    assert case.raw["source"] == {"dataset": "m3", "row": case.id, "licence": "Apache-2.0"}


def test_case_says_who_wrote_it(case: Case) -> None:
    assert case.synthetic
    assert case.provenance("facts") == {"author": "llm", "note": NOTE}


def test_case_stands_in_its_department_and_a_split(case: Case) -> None:
    assert case.id.rsplit("-", 1)[0] == case.department
    assert case.split in ("train", "held_out")


def test_case_has_twenty_to_thirty_five_facts_and_items(case: Case) -> None:
    assert 20 <= len(case.facts) <= 35
    assert 20 <= len(case.checklist) <= 35


def test_case_holds_pertinent_negatives_and_a_tale_to_tell(case: Case) -> None:
    told = Counter(fact.disclosure for fact in case.facts)
    assert sum(fact.polarity == "absent" for fact in case.facts) >= 5
    assert 1 <= told[Disclosure.volunteer] <= 3
    assert told[Disclosure.on_ask] >= 8
    assert told[Disclosure.on_specific_ask] >= 8


def test_opening_line_tells_facts_that_are_volunteered(case: Case) -> None:
    hidden = [one for one in case.opening_facts if case.fact[one].disclosure == Disclosure.on_specific_ask]
    assert case.opening_facts
    assert hidden == []


def test_patient_never_names_the_diagnosis(case: Case) -> None:
    said = [case.opening_line, *(content for role, content in case.snippet if role == "user")]
    said += [fact.lay_text for fact in case.facts]
    assert [(text, found) for text in said if (found := names_in(case, text))] == []


def test_every_fact_has_words_of_the_patient(case: Case) -> None:
    assert [fact.id for fact in case.facts if not fact.lay_text] == []


def test_facts_asked_for_have_keys_with_a_topic(case: Case) -> None:
    wanted = {one for item in case.checklist if item.kind == "must_ask" for one in item.facts}
    assert [one for one in sorted(wanted) if not case.fact[one].keys] == []
    assert [(fact.id, key) for fact in case.facts for key in fact.keys if not content_stems(key)] == []


def test_no_key_asks_for_two_facts(case: Case) -> None:
    owners: dict[frozenset[str], set[str]] = {}
    for fact in case.facts:
        for key in fact.keys:
            owners.setdefault(frozenset(stems(key)), set()).add(fact.id)
    assert {tuple(key): found for key, found in owners.items() if len(found) > 1} == {}


def test_checklist_can_be_met(case: Case) -> None:
    assert sum(item.points for item in case.checklist if item.points > 0) >= 50
    assert [item.id for item in case.checklist if not item.facts and not item.keys] == []
    assert [item.id for item in case.checklist if item.kind == "must_ask" and not (item.facts and item.section)] == []


def test_checklist_covers_every_stage_and_dimension(case: Case) -> None:
    assert {item.phase for item in case.checklist} == set(Phase)
    assert {item.dimension for item in case.checklist} == set("SCAN")
    assert 3 <= sum(item.points < 0 for item in case.checklist) <= 5


def test_what_must_not_be_done_is_not_what_must(case: Case) -> None:
    never = [(item.id, key, set(stems(key))) for item in case.checklist if item.points < 0 for key in item.keys]
    wanted = [item.criterion for item in case.checklist if item.kind == "must_do"]
    wanted += [key for item in case.checklist if item.kind == "must_do" for key in item.keys]
    wanted += [case.diagnosis.label, *(entry.label for entry in case.diagnosis.differential)]
    wanted += [exam.name for exam in case.exams if exam.need == "essential"]
    both = itertools.product(never, wanted)
    assert [(one, key, text) for (one, key, group), text in both if group <= set(stems(text))] == []


def test_examinations_are_few_and_of_each_need(case: Case) -> None:
    needs = Counter(exam.need for exam in case.exams)
    assert 8 <= len(case.exams) <= 14
    assert 2 <= needs["essential"] <= 5
    assert 2 <= needs["optional"] <= 4
    assert 2 <= needs["irrelevant"] <= 4
    assert needs["harmful"] <= 2
    assert [exam.id for exam in case.exams if not exam.result or exam.abnormal is None or exam.cost is None] == []


def test_diagnosis_has_alternatives_and_a_differential(case: Case) -> None:
    answers = [case.diagnosis.icd10cm, *(entry.icd10cm for entry in case.diagnosis.acceptable)]
    assert 1 <= len(case.diagnosis.acceptable) <= 4
    assert 4 <= len(case.diagnosis.differential) <= 6
    assert any(entry.must_exclude for entry in case.diagnosis.differential)
    assert len(set(answers)) == len(answers)
    assert sum(entry.probability or 0.0 for entry in case.diagnosis.differential) < 1.0


def test_codes_exist(case: Case, icd10: ModuleType) -> None:
    entries = (*case.diagnosis.acceptable, *case.diagnosis.differential)
    codes = [case.diagnosis.icd10cm, *(entry.icd10cm for entry in entries)]
    assert [code for code in codes if code not in icd10.tree()] == []


# -- all cases --------------------------------------------------------------------------------------------------------
def test_no_department_has_more_than_its_quota() -> None:
    counts = Counter(case.department for case in own_cases())
    assert counts <= Counter(QUOTA)


def test_about_a_third_is_held_out() -> None:
    assert 0.25 <= len(own_cases("held_out")) / len(own_cases()) <= 0.45


def test_sections_of_the_inquiry_are_those_of_scanbench() -> None:
    """Present illness 55.8 %, past history 19.6, personal and social 14.6, obstetric 5.4, family 4.7 (the paper)."""
    counts = Counter(item.section for case in own_cases() for item in case.items(Phase.inquiry) if item.section)
    shares = {section: count / counts.total() for section, count in counts.items()}
    paper = {"HPI": 0.558, "PMH": 0.196, "SH": 0.146, "OB": 0.054, "FH": 0.047}
    assert shares == pytest.approx(paper, abs=0.06)


def test_half_the_items_are_critical() -> None:
    levels = Counter(item.level for case in own_cases() for item in case.checklist)
    assert levels[2] / levels.total() == pytest.approx(0.513, abs=0.08)  # of ScanBench: 51.3 %


def test_cases_are_as_long_as_scanbench() -> None:
    sizes = [len(case.checklist) for case in own_cases()]
    assert sum(sizes) / len(sizes) == pytest.approx(29.23, abs=3)  # of ScanBench: mean 29.23


def test_snippets_end_in_the_patients_question() -> None:
    snippets = {case.id: case.snippet for case in own_cases() if case.snippet}
    last = {one: snippet[-1] for one, snippet in snippets.items()}
    assert len(snippets) >= len(own_cases()) / 4
    assert {one: len(snippet) for one, snippet in snippets.items() if not 2 <= len(snippet) <= 6} == {}
    assert {one: said for one, said in last.items() if said[0] != "user" or not said[1].endswith("?")} == {}


def test_some_patients_need_no_emergency() -> None:
    escalated = Counter(case.safety.must_escalate for case in own_cases())
    assert escalated[True] >= len(own_cases()) / 4
    assert escalated[False] >= len(own_cases()) / 4
