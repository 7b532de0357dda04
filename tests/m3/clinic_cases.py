"""What tests of the clinic share: where openly licensed data lies, and a small case made in the test."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from m3.environment.case import Case

ROOT = Path(__file__).parent.parent.parent


def shared_data(name: str) -> Path:
    """A folder of openly licensed clinical data beside the repository, or ``$M3_SHARED_DATA``; skips without it."""
    folder = Path(os.environ.get("M3_SHARED_DATA", ROOT.parent / "shared" / "data")) / name
    if not folder.is_dir():
        pytest.skip(f"no data set {name!r} ({folder}): set M3_SHARED_DATA to the folder that holds it")
    return folder


def small_row() -> dict[str, Any]:
    """The JSON object of a complete small case, new at each call."""
    return {
        "schema": "m3.case/v1",
        "id": "small-1",
        "version": 1,
        "synthetic": True,
        "lang": "en",
        "split": "train",
        "department": "cardiology",
        "source": {"dataset": "m3", "row": "small-1", "licence": "Apache-2.0"},
        "presentation": {
            "chief_complaint": "chest pain",
            "opening_line": "I have had this pain in my chest since this morning.",
            "facts": ["pain"],
        },
        "profile": {"age": 61, "sex": "male", "setting": "emergency department", "persona": {"verbosity": "plain"}},
        "facts": [
            {
                "id": "pain",
                "text": "He has had chest pain for three hours.",
                "lay_text": "It started about three hours ago.",
                "section": "HPI",
                "polarity": "present",
                "value": {"number": 3, "unit": "h"},
                "disclosure": "volunteer",
                "keywords": ["pain", "chest"],
                "keys": ["when start", "how long", "onset"],
            },
            {
                "id": "radiation",
                "text": "The pain radiates to the left arm.",
                "lay_text": "It goes down my left arm.",
                "section": "HPI",
                "polarity": "present",
                "disclosure": "on_ask",
                "keywords": ["pain"],
                "keys": ["radiate", "spread", "arm", "anywhere else"],
                "red_flag": True,
            },
            {
                "id": "smoking",
                "text": "He smokes 20 cigarettes a day.",
                "lay_text": "I smoke about twenty a day.",
                "section": "SH",
                "polarity": "present",
                "value": {"number": 20, "unit": "1/d"},
                "disclosure": "on_specific_ask",
                "keywords": ["lifestyle"],
                "keys": ["smoke", "cigarettes", "tobacco"],
            },
            {
                "id": "no-fever",
                "text": "He has no fever.",
                "lay_text": "No, I haven't had a fever.",
                "section": "ROS",
                "polarity": "absent",
                "disclosure": "on_specific_ask",
                "keys": ["fever", "temperature", "chills"],
            },
        ],
        "checklist": [
            {
                "id": "c-radiation",
                "criterion": "Asks whether the pain radiates.",
                "level": 2,
                "dimension": "C",
                "facts": ["radiation"],
                "phase": "inquiry",
                "points": 6,
                "kind": "must_ask",
                "section": "HPI",
            },
            {
                "id": "c-smoking",
                "criterion": "Asks about smoking.",
                "level": 1,
                "dimension": "A",
                "facts": ["smoking"],
                "phase": "inquiry",
                "points": 3,
                "kind": "must_ask",
                "section": "SH",
            },
            {
                "id": "c-fever",
                "criterion": "Asks about fever.",
                "level": 1,
                "dimension": "A",
                "facts": ["no-fever"],
                "phase": "inquiry",
                "points": 2,
                "kind": "must_ask",
                "section": "HPI",
            },
            {
                "id": "c-escalate",
                "criterion": "Sends the patient to emergency care at once.",
                "level": 2,
                "dimension": "S",
                "keys": ["emergency", "ambulance", "admit"],
                "phase": "diagnosis",
                "points": 8,
                "kind": "must_do",
            },
            {
                "id": "c-reassure",
                "criterion": "Says that it is only muscular without an ECG.",
                "level": 2,
                "dimension": "S",
                "keys": ["only muscular", "go home"],
                "phase": "diagnosis",
                "points": -9,
                "kind": "must_not",
            },
        ],
        "exams": [
            {
                "id": "ecg",
                "name": "12-lead ECG",
                "category": "ecg",
                "need": "essential",
                "result": "ST elevation in II, III and aVF.",
                "abnormal": True,
            },
            {
                "id": "troponin",
                "name": "High-sensitivity troponin",
                "category": "cardiac_markers",
                "need": "essential",
                "result": "420 ng/L (below 14).",
                "abnormal": True,
            },
            {
                "id": "cxr",
                "name": "Chest radiograph",
                "category": "plain_radiography",
                "need": "optional",
                "result": "Normal.",
                "abnormal": False,
            },
            {"id": "eeg", "name": "EEG", "category": "neurophysiology", "need": "irrelevant"},
        ],
        "diagnosis": {
            "icd10cm": "I21.19",
            "label": "Inferior ST elevation myocardial infarction",
            "synonyms": ["inferior STEMI", "heart attack"],
            "acceptable": [{"icd10cm": "I21.9", "label": "Acute myocardial infarction", "credit": 0.8}],
            "differential": [
                {"icd10cm": "I71.00", "label": "Aortic dissection", "must_exclude": True},
                {"icd10cm": "I26.99", "label": "Pulmonary embolism"},
            ],
            "severity": 1,
        },
        "safety": {"must_escalate": True, "escalation": "Emergency reperfusion.", "forbidden_actions": ["send home"]},
        "provenance": {"*": {"author": "llm", "note": "written for tests"}},
    }


def small_case(**changes: Any) -> Case:
    """The small case, top-level fields replaced."""
    return Case.from_json({**small_row(), **changes})
