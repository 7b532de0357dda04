"""MediQ's vignettes with numbered atomic facts (CC BY 4.0): one JSON object a line.

Only a question that asks for the diagnosis of the patient is converted: its answer is the label, its other options
the differential. Others (next step, mechanism, cause, finding) are skipped: their answer is no diagnosis. The complaint
is the vignette's first sentence, as in MediQ. Results of investigations stay facts of section exam; no exams.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from m3.environment.case import Case
from m3.environment.converters.drafting import (
    Draft,
    age_and_sex,
    case_row,
    code_of,
    digest,
    facts_of,
    section_of,
    told_by,
    unnumbered,
)
from m3.environment.converters.loss import SkippedRow, Tally, field, texts

LICENCE = "CC BY 4.0"
CAVEATS = ("vignettes are public exam questions: models may have seen them",)
_KEPT = ("question", "context", "options", "answer", "facts", "patient.specialties")
_ASKS_DIAGNOSIS = re.compile(
    r"(?:which of the following|what|which)\s+(?:is|are|was|would be|best describes|best represents)\b[^?]*"
    r"\bdiagnosis\b(?:\s+(?:for|in|of|at)\b[^?]*)?\W*$",
    re.IGNORECASE,
)
_NO_DIAGNOSIS = re.compile(
    r"\b(?:confirm\w*|establish\w*|steps?|tests?|findings?|treatment|therapy|management|make|etiology|cause|characteristic|"
    r"supports?|approach|method|tool|modality|pathogen|associated|complication|risk|criteri\w+|mechanism|used)\b",
    re.IGNORECASE,
)
_DEPARTMENTS = {
    "Cardiology": "cardiology",
    "Cardiovascular Disease": "cardiology",
    "Neurology": "neurology",
    "Gastroenterology": "gastroenterology",
    "Nephrology": "nephrology",
    "Hematology": "haematology",
    "Pulmonary Disease": "respiratory",
    "Rheumatology": "rheumatology",
    "Obstetrics and Gynecology": "gynaecology",
    "General Surgery": "surgery",
    "Surgery": "surgery",
    "Family Medicine": "general_practice",
    "Geriatric Medicine": "geriatrics",
    "Endocrinology, Diabetes, and Metabolism": "endocrinology",
    "Endocrinology": "endocrinology",
}


def asks_diagnosis(question: str) -> bool:
    """Whether a question asks for the patient's diagnosis, and not for what confirms or follows from it."""
    return bool(_ASKS_DIAGNOSIS.search(question)) and not _NO_DIAGNOSIS.search(question)


def case_of(row: Mapping[str, Any], tally: Tally) -> Case:
    """A row's case; ValueError names the field, SkippedRow the reason."""
    question, answer = field(row, "question", str), field(row, "answer", str).strip()
    context, options = texts(row, "context"), field(row, "options", dict)
    drafts = drafts_of(texts(row, "facts"))
    if not asks_diagnosis(question):
        raise SkippedRow("the question asks for no diagnosis")
    if not drafts or not context:
        raise SkippedRow("no facts")
    tally.fields(row, _KEPT)
    age, sex = age_and_sex(" ".join(draft.text for draft in drafts))
    facts = facts_of(drafts, tally)
    tally.kept["(facts)"] += len(facts)
    name = digest(*context)
    others = [option.strip() for option in options.values() if isinstance(option, str) and option.strip() != answer]
    return case_row(
        id=f"mediq-{name}",
        dataset="MediQ",
        row=str(row.get("id", name)),
        licence=LICENCE,
        synthetic=False,
        complaint=context[0].strip(),
        opening_facts=told_by(context[0], facts),
        age=age,
        sex=sex,
        department=_department(row),
        facts=facts,
        label=answer,
        mapped=code_of(answer),
        more_diagnosis={"differential": [{"icd10cm": code_of(one).code, "label": one} for one in others]},
        provenance={
            "facts": {"author": "llm", "note": "MediQ's atomic facts of the vignette; sections and keys by rule"},
            "diagnosis.differential": {"author": "rule", "note": "the question's other options"},
            "synthetic": {"author": "rule", "note": "false: the source does not say that no patient is behind it"},
        },
        tally=tally,
    )


def drafts_of(facts: Iterable[str]) -> list[Draft]:
    """Numbered atomic facts as drafts, sections by their words."""
    return [Draft(text=text, section=section_of(text)) for text in unnumbered(facts)]


def _department(row: Mapping[str, Any]) -> str:
    """Of the first specialty that the row names, where it is one of the schema's."""
    patient = row.get("patient")
    names = patient.get("specialties") if isinstance(patient, Mapping) else None
    return _DEPARTMENTS.get(names[0], "other") if isinstance(names, list) and names else "other"
