"""AgentClinic's OSCE cases of MedQA (MIT): one JSON object a line, ``OSCE_Examination``.

The patient's part becomes facts by section, examination findings become facts of section exam, which a patient never
tells, and nested test results become exams: a name that is an examination (m3/environment/exams.py) takes everything
below it as its result; one that is not ("Blood work") is opened; what is left in it is one exam of unknown category.
The objective for the doctor is dropped: it tells the answer's outline. Texts were written by GPT-4 from exam questions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from m3.environment.case import UNKNOWN_CATEGORY, Case, Disclosure
from m3.environment.converters.drafting import (
    Draft,
    age_and_sex,
    atomic,
    case_row,
    code_of,
    digest,
    facts_of,
    says_nothing,
    slug,
)
from m3.environment.converters.loss import Tally, field
from m3.environment.exams import categorise

LICENCE = "MIT"
CAVEATS = ("cases are GPT-4's rewritings of public exam questions: models may have seen them",)
_TOP = "OSCE_Examination"
_ACTOR = f"{_TOP}.Patient_Actor"
_SECTIONS = {
    "History": "HPI",
    "Past_Medical_History": "PMH",
    "Medications": "DH",
    "Current_Medications": "DH",
    "Family_History": "FH",
    "Social_History": "SH",
    "Review_of_Systems": "ROS",
}
_KEPT = (
    *(f"{_ACTOR}.{name}" for name in ("Demographics", "Symptoms.Primary_Symptom", "Symptoms.Secondary_Symptoms")),
    *(f"{_ACTOR}.{name}" for name in _SECTIONS),
    *(f"{_TOP}.{name}" for name in ("Physical_Examination_Findings", "Test_Results", "Correct_Diagnosis")),
)


def case_of(row: Mapping[str, Any], tally: Tally) -> Case:
    """A row's case; ValueError names the field."""
    demographics, label = field(row, f"{_ACTOR}.Demographics", str), field(row, f"{_TOP}.Correct_Diagnosis", str)
    actor, symptoms = field(row, _ACTOR, dict), field(row, f"{_ACTOR}.Symptoms", dict)
    complaint = _complaint(symptoms, actor)
    age, sex = age_and_sex(demographics)
    drafts = [
        Draft(id="complaint", text=complaint, section="HPI", disclosure=Disclosure.volunteer),
        Draft(id="demographics", text=demographics, section="demographic"),
    ]
    drafts += [Draft(text=text, section="HPI") for text in _sentences(symptoms.get("Secondary_Symptoms", []))]
    for name, section in _SECTIONS.items():
        drafts += [Draft(text=text, section=section) for text in _sentences(actor.get(name, ""))]
    found = field(row, f"{_TOP}.Physical_Examination_Findings", dict)
    drafts += [Draft(text=": ".join((*map(_plain, path), text)), section="exam") for path, text in _leaves(found)]
    tally.fields(row, _KEPT)
    exams = _exams(field(row, f"{_TOP}.Test_Results", dict))
    tally.defaults["exams.need: unknown"] += len(exams)
    unknown = sum(exam["category"] == UNKNOWN_CATEGORY for exam in exams)
    if unknown:
        tally.defaults["exams.category: unknown"] += unknown
    tally.kept["(exams)"] += len(exams)
    facts = facts_of(drafts, tally)
    tally.kept["(facts)"] += len(facts)
    name = digest(*(text for _, text in _leaves(actor)), label)
    return case_row(
        id=f"agentclinic-{name}",
        dataset="AgentClinic-MedQA",
        row=name,
        licence=LICENCE,
        synthetic=True,
        complaint=complaint,
        opening_facts=["complaint"],
        age=age,
        sex=sex,
        facts=facts,
        label=label.strip(),
        mapped=code_of(label.strip()),
        exams=exams,
        provenance={"facts": {"author": "llm", "note": "GPT-4's sentences; split, sorted and given keys by rule"}},
        tally=tally,
    )


def _complaint(symptoms: Mapping[str, Any], actor: Mapping[str, Any]) -> str:
    """The primary symptom; where a case has none under this name, its first symptom or sentence of the history."""
    told = [text for name in ("Primary_Symptom", *symptoms) for _, text in _leaves(symptoms.get(name, ""))]
    found = [text for text in (*told, *_sentences(actor.get("History", ""))) if not says_nothing(text)]
    if not found:
        raise ValueError(f"{_ACTOR}.Symptoms: want a symptom, or a history; got none")
    return found[0]


def _sentences(value: Any) -> list[str]:
    """Atomic sentences below a value; keys of an object stand before what they hold."""
    return [
        ": ".join((*map(_plain, path), one)) if path else one for path, text in _leaves(value) for one in atomic(text)
    ]


def _leaves(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """(keys, text) of every text below; lists have no keys."""
    if isinstance(value, Mapping):
        for key, below in value.items():
            yield from _leaves(below, (*path, key))
    elif isinstance(value, list):
        for below in value:
            yield from _leaves(below, path)
    elif value is not None and str(value).strip():
        yield path, str(value).strip()


def _plain(name: str) -> str:
    return name.replace("_", " ").strip()


def _exams(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    exams: list[dict[str, Any]] = []
    for name, value in results.items():
        for exam, category, result in _opened(_plain(name), value):
            one = {"id": slug(exam, [e["id"] for e in exams]), "name": exam, "category": category, "need": "unknown"}
            exams.append({**one, "result": result} if result else one)
    return exams


def _opened(name: str, value: Any) -> Iterator[tuple[str, str, str]]:
    """(name, category, result) of the exams at or below one name."""
    category = categorise(name)
    if category != UNKNOWN_CATEGORY or not isinstance(value, Mapping):
        yield name, category, _result(value)
        return
    rest = {}
    for key, below in value.items():
        found = list(_opened(_plain(key), below))
        if any(category != UNKNOWN_CATEGORY for _, category, _ in found):
            yield from found
        else:
            rest[key] = below
    if rest:
        yield name, UNKNOWN_CATEGORY, _result(rest)


def _result(value: Any) -> str:
    return "; ".join(": ".join((*map(_plain, path), text)) for path, text in _leaves(value))
