"""Converters: values of small rows of each format, what is lost, and the data sets themselves."""

from __future__ import annotations

import asyncio
import collections
import gzip
import json
import random
from pathlib import Path
from typing import Any

import pytest
from clinic_cases import shared_data

from m3.environment.asking import asked
from m3.environment.case import Case, Phase, find_problems, read_cases
from m3.environment.converters import FORMATS, Conversion, convert, ddxplus
from m3.environment.converters.drafting import age_and_sex, atomic, code_of, keys_of, polarity_of, section_of, split_of
from m3.environment.converters.mediq import asks_diagnosis
from m3.environment.converters.primock57 import impression
from m3.environment.patient import ScriptedPatient
from m3.environment.trajectory import Message, read_trajectories
from m3.evaluate.replay import read_recorded
from m3.rewards.checklist import annotate, coverage
from m3.rewards.rubric import read_healthbench

AGENTCLINIC = {
    "OSCE_Examination": {
        "Objective_for_Doctor": "Assess and diagnose the patient with a rash.",
        "Patient_Actor": {
            "Demographics": "24-year-old female",
            "History": "The patient noticed red spots on her arms two weeks ago. They spread to the trunk.",
            "Symptoms": {"Primary_Symptom": "Itchy rash on both arms", "Secondary_Symptoms": ["Joint stiffness"]},
            "Past_Medical_History": "Information not provided.",
            "Social_History": "Works as a gardener.",
            "Review_of_Systems": "Denies fever, cough, or chest pain.",
            "Medications": ["Ibuprofen"],
        },
        "Physical_Examination_Findings": {
            "Vital_Signs": {"Temperature": "36.9 C"},
            "Skin": {"Inspection": "Silvery scales.", "Palpation": "No warmth."},
        },
        "Test_Results": {
            "Blood_Work": {"Complete_Blood_Count": {"WBC": "7,000", "Platelets": "Normal"}, "Mystery": "Positive"},
            "Chest_X-ray": {"Findings": "Clear."},
        },
        "Correct_Diagnosis": "Guttate psoriasis",
    }
}
FACTS = ["1. A 51-year-old man.", "2. He has a painful rash.", "3. The rash began 2 years ago.", "4. He denies fever."]
MEDIQ = {
    "id": 7,
    "question": "Which of the following is the most likely diagnosis?",
    "context": ["A 51-year-old man has a painful rash.", "The rash began 2 years ago.", "He denies fever."],
    "options": {"A": "Psoriasis", "B": "Vitiligo"},
    "answer": "Vitiligo",
    "answer_idx": "B",
    "facts": FACTS,
    "patient": {"age": "51", "gender": "male", "specialties": ["Cardiology"]},
}
CRAFT_MD = {
    "case_id": "case_9",
    "category": "Dermatology",
    "doctor": "one",
    "trial": 0,
    "question": "What is the final diagnosis?",
    "answer": "Vitiligo",
    "facts": FACTS,
    "frq": "Final Diagnosis: Psoriasis",
    "frq_extracted": "psoriasis",
    "frq_eval": 0,
    "turns": [
        {"role": "doctor", "text": "Hello, what is wrong?"},
        {"role": "patient", "text": "I have a painful rash."},
        {"role": "doctor", "text": "Any fever?"},
    ],
}
PRIMOCK57 = {
    "id": "primock57-d9c01",
    "presenting_complaint": "I have a sore throat",
    "note": "Sore throat 3/7.\nImp: likely tonsillitis. Review if worse.\nPlan: rest",
    "highlights": ["Sore throat"],
    "turns": [
        {"role": "doctor", "text": "Hello?", "start": 0.0, "end": 1.0},
        {"role": "doctor", "text": "How can I help?", "start": 1.0, "end": 2.0},
        {"role": "patient", "text": "My throat is sore.", "start": 2.0, "end": 3.0},
        {"role": "patient", "text": "It hurts to swallow.", "start": 3.0, "end": 4.0},
        {"role": "doctor", "text": "Do you smoke?", "start": 4.0, "end": 5.0},
        {"role": "patient", "text": "I never smoked tobacco.", "start": 5.0, "end": 6.0},
    ],
    "checklists": {
        "Clinician_1": [
            {"section": "Introduction", "text": "Confirms name", "depth": 0, "level": "non_critical"},
            {"section": "HPC", "text": "sore throat", "depth": 0, "level": "critical"},
            {"section": "HPC", "text": "painful swallowing", "depth": 1, "level": "critical"},
            {"section": "SH", "text": "never smoked tobacco", "depth": 0, "level": "non_critical"},
            {"section": "SH", "text": "likes football", "depth": 0, "level": "irrelevant"},
        ]
    },
}
KQA = {
    "Question": "Is ibuprofen safe with asthma?",
    "Free_form_answer": "It can trigger an attack.",
    "Must_have": ["Ibuprofen can trigger asthma ", "Ibuprofen can trigger asthma", " "],
    "Nice_to_have": ["Paracetamol is an alternative."],
    "Sources": "https://example.org",
    "ICD_10_diag": None,
}
HEALTHBENCH = {
    "example_tags": ["theme:context"],
    "prompt": [{"role": "user", "content": "What should I take?"}],
    "prompt_id": "row-1",
    "rubrics": [{"criterion": "Asks about allergies.", "points": 5, "tags": ["axis:completeness"]}],
    "canary": "kept as it is",
}
SMALL = {
    "agentclinic": AGENTCLINIC,
    "mediq": MEDIQ,
    "craft_md": CRAFT_MD,
    "primock57": PRIMOCK57,
    "kqa": KQA,
    "healthbench": HEALTHBENCH,
}
EVIDENCES = {
    "E_91": ("E_91", "Do you have a fever?", "B", {}, False),
    "E_53": ("E_53", "Do you have pain somewhere?", "B", {}, False),
    "E_55": ("E_53", "Do you feel pain somewhere?", "M", {"V_1": "nowhere", "V_2": "forehead", "V_3": "jaw"}, False),
    "E_79": ("E_79", "Do you smoke cigarettes?", "B", {}, True),
    "E_80": ("E_80", "Are you pregnant?", "B", {}, True),
}


def write(folder: Path, *rows: Any, name: str = "rows.jsonl") -> Path:
    """Rows one a line; a text is written as it is."""
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    path = folder / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return path


def changed(row: dict[str, Any], field: str, value: Any) -> dict[str, Any]:
    """A copy of a row with one dotted field replaced."""
    copy = json.loads(json.dumps(row))
    *above, last = field.split(".")
    holder = copy
    for name in above:
        holder = holder[name]
    holder[last] = value
    return copy


def ddxplus_folder(folder: Path, code: str = "j17, j18", label: str = "Pneumonia") -> Path:
    """A folder of DDXPlus with one condition of three symptoms and an antecedent, and an evidence of no condition."""
    evidences = {
        name: {
            "code_question": parent,
            "question_en": question,
            "data_type": kind,
            "possible-values": list(values),
            "value_meaning": {value: {"en": meaning} for value, meaning in values.items()},
            "is_antecedent": antecedent,
        }
        for name, (parent, question, kind, values, antecedent) in EVIDENCES.items()
    }
    symptoms = {"E_91": {}, "E_53": {}, "E_55": {}}
    condition = {
        "cond-name-eng": label,
        "icd10-id": code,
        "symptoms": symptoms,
        "antecedents": {"E_79": {}},
        "severity": 3,
    }
    (folder / ddxplus.EVIDENCES).write_text(json.dumps(evidences))
    (folder / ddxplus.CONDITIONS).write_text(json.dumps({label: condition}))
    return folder


def one(name: str, tmp_path: Path) -> Conversion:
    """The small row of a format, converted."""
    return convert(name, write(tmp_path, SMALL[name]), strict=True)


# -- each format ------------------------------------------------------------------------------------------------------
def test_agentclinic_facts_exams_and_label(tmp_path: Path) -> None:
    (case,) = one("agentclinic", tmp_path).cases
    told = {fact.text: (fact.section, fact.polarity) for fact in case.facts}
    assert told == {
        "Itchy rash on both arms": ("HPI", "present"),
        "24-year-old female": ("demographic", "present"),
        "Joint stiffness": ("HPI", "present"),
        "The patient noticed red spots on her arms two weeks ago.": ("HPI", "present"),
        "They spread to the trunk.": ("HPI", "present"),
        "Ibuprofen": ("DH", "present"),
        "Works as a gardener.": ("SH", "present"),
        "Denies fever.": ("ROS", "absent"),
        "Denies cough.": ("ROS", "absent"),
        "Denies chest pain.": ("ROS", "absent"),
        "Vital Signs: Temperature: 36.9 C": ("exam", "present"),
        "Skin: Inspection: Silvery scales.": ("exam", "present"),
        "Skin: Palpation: No warmth.": ("exam", "absent"),
    }
    assert [(exam.name, exam.category, exam.need, exam.result) for exam in case.exams] == [
        ("Complete Blood Count", "full_blood_count", "unknown", "WBC: 7,000; Platelets: Normal"),
        ("Blood Work", "unknown", "unknown", "Mystery: Positive"),
        ("Chest X-ray", "plain_radiography", "unknown", "Findings: Clear."),
    ]
    assert (case.age, case.sex, case.opening_line, case.opening_facts) == (
        24,
        "female",
        "Itchy rash on both arms",
        ("complaint",),
    )
    assert (case.diagnosis.label, case.diagnosis.icd10cm) == ("Guttate psoriasis", "L40.4")
    assert "Guttate psoriasis" in case.provenance("diagnosis.icd10cm")["note"]


def test_mediq_facts_options_and_department(tmp_path: Path) -> None:
    (case,) = one("mediq", tmp_path).cases
    assert [fact.text for fact in case.facts] == [fact[3:] for fact in FACTS]
    assert [fact.section for fact in case.facts] == ["demographic", "HPI", "HPI", "HPI"]
    assert case.facts[3].polarity == "absent" and "how long" in case.facts[2].keys
    assert [(entry.label, entry.icd10cm) for entry in case.diagnosis.differential] == [("Psoriasis", "L40")]
    assert (case.diagnosis.icd10cm, case.department, case.age, case.sex) == ("L80", "cardiology", 51, "male")
    assert case.opening_line == MEDIQ["context"][0] and case.opening_facts == ("f1", "f2")


@pytest.mark.parametrize(
    ("question", "wanted"),
    [
        ("Which of the following is the most likely diagnosis?", True),
        ('What is the most likely diagnosis in this patient?"', True),
        ("Which of the following is most likely to confirm the diagnosis?", False),
        ("Which of the following is the most appropriate next step in diagnosis?", False),
        ("Which of the following is characteristic of this patient's diagnosis?", False),
        ("Which of the following is the most appropriate treatment?", False),
    ],
)
def test_mediq_takes_questions_for_the_diagnosis_only(question: str, wanted: bool, tmp_path: Path) -> None:
    assert asks_diagnosis(question) is wanted
    report = convert("mediq", write(tmp_path, changed(MEDIQ, "question", question))).report
    assert report.skipped == ({} if wanted else {"the question asks for no diagnosis": 1})


def test_craft_md_one_case_for_all_trials_and_the_grader_kept(tmp_path: Path) -> None:
    path = write(tmp_path, CRAFT_MD, changed(CRAFT_MD, "trial", 1), CRAFT_MD, name="r.jsonl.gz")
    found = convert("craft_md", path)
    (case,) = found.cases
    assert [(t.case, t.policy, t.rollout, t.mode) for t in found.trajectories] == [
        (case.id, "one", 0, "recorded"),
        (case.id, "one", 1, "recorded"),
    ]
    assert found.report.skipped == {"the same again": 1}
    assert found.trajectories[0].meta == {
        "question": "What is the final diagnosis?",
        "answer": "Final Diagnosis: Psoriasis",
        "extracted": "psoriasis",
        "graded": False,
    }
    assert [(m.role, m.turn) for m in found.trajectories[0].messages] == [
        ("assistant", 0),
        ("user", 1),
        ("assistant", 1),
    ]
    assert case.opening_line == "He has a painful rash."


def test_craft_md_doctor_without_an_answer_is_kept(tmp_path: Path) -> None:
    found = convert("craft_md", write(tmp_path, changed(CRAFT_MD, "frq", None)), strict=True)
    assert found.trajectories[0].meta["answer"] == ""


def test_craft_md_case_that_changes_its_answer_is_malformed(tmp_path: Path) -> None:
    other = changed(changed(CRAFT_MD, "trial", 1), "answer", "Psoriasis")
    report = convert("craft_md", write(tmp_path, CRAFT_MD, other)).report
    assert report.skipped == {"malformed": 1} and "rows.jsonl:2: case_id: want one answer" in report.problems[0]


def test_primock57_checklist_levels_and_turns(tmp_path: Path) -> None:
    found = one("primock57", tmp_path)
    (case,), (trajectory,) = found.cases, found.trajectories
    assert [(item.criterion, item.level, item.points, item.kind, item.facts) for item in case.checklist] == [
        ("In the introduction: Confirms name.", 1, 3, "must_do", ()),
        ("Elicits: sore throat.", 2, 6, "must_ask", ("f1",)),
        ("Elicits: sore throat: painful swallowing.", 2, 6, "must_ask", ("f2",)),
        ("Elicits: never smoked tobacco.", 1, 3, "must_ask", ("f3",)),
    ]
    assert case.facts[2].polarity == "absent" and case.facts[2].section == "SH"
    assert case.diagnosis.label == "tonsillitis" and case.opening_facts == ("f1",)
    assert [message.turn for message in trajectory.messages] == [0, 0, 1, 1, 1, 2]
    assert found.report.dropped["checklists.Clinician_1: irrelevant items"] == 1
    assert "complete by construction" in found.report.warnings[0]


def test_primock57_recording_is_scored_on_its_checklist(tmp_path: Path) -> None:
    found = one("primock57", tmp_path)
    (case,), (trajectory,) = found.cases, found.trajectories
    assert "c4" in coverage(case, annotate(case, trajectory)).met


@pytest.mark.parametrize(
    ("note", "labels"),
    [
        ("Imp: ?UTI. also need to exclude pregnancy", ["UTI"]),
        ("HPC: cough\nDDx : acute exacerbation of asthma, ?? allergy", ["acute exacerbation of asthma", "allergy"]),
        ("Plan: rest, an important one", []),
    ],
)
def test_impression_of_a_note(note: str, labels: list[str]) -> None:
    assert impression(note) == labels


def test_primock57_note_without_impression_is_skipped(tmp_path: Path) -> None:
    report = convert("primock57", write(tmp_path, changed(PRIMOCK57, "note", "Plan: rest"))).report
    assert report.skipped == {"the clinician's note names no impression": 1} and report.converted == 0


def test_kqa_statements_become_clauses_by_level(tmp_path: Path) -> None:
    found = one("kqa", tmp_path)
    (row,) = found.rows
    assert [(item.criterion, item.points, item.tags) for item in row.rubric.items] == [
        ("States that: Ibuprofen can trigger asthma.", 6, ("level:2", "kqa:must_have")),
        ("States that: Paracetamol is an alternative.", 3, ("level:1", "kqa:nice_to_have")),
    ]
    assert row.rest["ideal_completions_data"]["ideal_completion"] == KQA["Free_form_answer"]
    assert found.report.dropped == {
        "Must_have: empty statements": 1,
        "Must_have: statements that stand there twice": 1,
    }


def test_healthbench_comes_back_unchanged(tmp_path: Path) -> None:
    found = one("healthbench", tmp_path)
    found.write(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "rows.jsonl").read_text()) == HEALTHBENCH
    assert found.report.dropped == {}


def test_ddxplus_samples_a_closed_world(tmp_path: Path) -> None:
    found = convert("ddxplus", ddxplus_folder(tmp_path))
    assert len(found.cases) == ddxplus.Config().cases_per_condition
    case = next(case for case in found.cases if case.fact["e-53"].polarity == "present")
    assert case.fact["e-80"].said == "No, I am not pregnant." and case.fact["e-80"].section == "PMH"
    assert case.fact["e-53"].said == "Yes, I do have pain somewhere."
    assert set(case.fact["e-55"].text.removeprefix("Do you feel pain somewhere? ").strip(".").split(", ")) <= {
        "forehead",
        "jaw",
    }
    assert [(item.id, item.level) for item in case.checklist] == [
        ("c-e-91", 2),
        ("c-e-53", 2),
        ("c-e-55", 2),
        ("c-e-79", 1),
    ]
    assert (case.diagnosis.icd10cm, case.diagnosis.severity, case.synthetic) == ("J18", 3, True)
    assert [entry.icd10cm for entry in case.diagnosis.acceptable] == ["J17"]
    assert {case.split for case in found.cases} == {found.cases[0].split}


def test_ddxplus_detail_is_absent_with_what_it_is_a_detail_of(tmp_path: Path) -> None:
    evidences = ddxplus.read_evidences(ddxplus_folder(tmp_path))
    config = ddxplus.Config(symptom=0.0)
    found = ddxplus.sampled(["E_53", "E_55"], [], evidences, config, random.Random(0))
    assert found == {"E_53": ()}


def test_ddxplus_same_seed_same_bytes(tmp_path: Path) -> None:
    folder = ddxplus_folder(tmp_path)
    first, second = convert("ddxplus", folder), convert("ddxplus", folder)
    assert [case.raw for case in first.cases] == [case.raw for case in second.cases]


def test_ddxplus_code_that_contradicts_the_label_is_refused_with_a_warning(tmp_path: Path) -> None:
    found = convert("ddxplus", ddxplus_folder(tmp_path, code="M34", label="SLE"))
    assert found.cases[0].diagnosis.icd10cm is None
    assert any(warning.startswith("SLE: the source says M34") for warning in found.report.warnings)


# -- the rules --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("Denies fever, cough, or chest pain.", ["Denies fever.", "Denies cough.", "Denies chest pain."]),
        ("No skin or nipple changes.", ["No skin or nipple changes."]),
        ("Denies recent travel or trauma.", ["Denies recent travel or trauma."]),
        ("She has fever, cough and pain.", ["She has fever, cough and pain."]),
        ("No fever or chills. Eats well.", ["No fever.", "No chills.", "Eats well."]),
    ],
)
def test_lists_of_denials_are_taken_apart(text: str, wanted: list[str]) -> None:
    assert atomic(text) == wanted


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("The patient denies fever.", "absent"),
        ("White spots are not tender nor ulcerated.", "absent"),
        ("Healthy with no chronic conditions.", "present"),
        ("Without fever.", "absent"),
        ("He has fever.", "present"),
    ],
)
def test_polarity(text: str, wanted: str) -> None:
    assert polarity_of(text) == wanted


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("35-year-old woman", (35, "female")),
        ("9-month-old infant", (0.75, "unknown")),
        ("2-week-old female newborn", (0.038, "female")),
        ("Newborn, born after the 32nd gestational week", (0, "unknown")),
        ("The patient is tired. He smokes.", (None, "male")),
        ("A patient has a rash.", (None, "unknown")),
    ],
)
def test_age_and_sex(text: str, wanted: tuple[float | None, str]) -> None:
    assert age_and_sex(text) == wanted


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("Examination shows scales.", "exam"),
        ("Vital signs are within normal limits.", "exam"),
        ("Her mother died of a stroke.", "FH"),
        ("He takes lisinopril.", "DH"),
        ("She drinks alcohol.", "SH"),
        ("He has a history of asthma.", "PMH"),
        ("He has a cough.", "HPI"),
    ],
)
def test_section_of_a_sentence(text: str, wanted: str) -> None:
    assert section_of(text) == wanted


@pytest.mark.parametrize(
    ("label", "code"),
    [
        ("Progressive multifocal leukoencephalopathy (PML)", "A81.2"),
        ("PE", "I26"),
        ("Adenomatous polyp", None),  # only an includes note of D28, benign neoplasm of female genital organs
        ("Wooden leg", None),
    ],
)
def test_code_of_a_label_has_its_words_or_is_none(label: str, code: str | None) -> None:
    assert code_of(label).code == code


def test_keys_are_own_words_then_pairs_then_all() -> None:
    found = keys_of(["Pain in the chest", "Pain in the chest wall", "Pain in the leg", "Pain"])
    assert found == [["pain chest"], ["wall", "pain chest"], ["leg"], ["pain"]]


def test_every_key_asks_for_its_fact(tmp_path: Path) -> None:
    cases = [*one("agentclinic", tmp_path).cases, *one("mediq", tmp_path).cases, *one("primock57", tmp_path).cases]
    unasked = [
        (fact.text, key) for case in cases for fact in case.facts for key in fact.keys if not _asks(case, key, fact.id)
    ]
    assert unasked == [] and all(fact.keys for case in cases for fact in case.facts)


def _asks(case: Case, key: str, fact: str) -> bool:
    return any(fact in ask.fact_ids for ask in asked(case, f"Do you have {key}?"))


def test_a_patient_answers_about_a_converted_case(tmp_path: Path) -> None:
    (case,) = one("agentclinic", tmp_path).cases
    patient = ScriptedPatient(case, seed=0)
    question = Message(role="assistant", content="Have you had any fever?", turn=0, phase=Phase.inquiry)

    async def talk() -> str:
        return (await patient.answer([await patient.open(), question])).content

    assert "Denies fever." in asyncio.run(talk())


def test_a_vignette_has_one_split_in_every_data_set(tmp_path: Path) -> None:
    labels = [f"disease number {n}" for n in range(40)]
    rows = [
        (changed(MEDIQ, "answer", one), changed(changed(CRAFT_MD, "answer", one), "case_id", one)) for one in labels
    ]
    contexts = [changed(row, "context", [f"{i} {text}" for text in row["context"]]) for i, (row, _) in enumerate(rows)]
    mediq = convert("mediq", write(tmp_path, *contexts, name="a.jsonl")).cases
    craft_md = convert("craft_md", write(tmp_path, *(row for _, row in rows), name="b.jsonl")).cases
    assert [case.split for case in mediq] == [case.split for case in craft_md]
    assert 2 <= sum(case.split == "held_out" for case in mediq) <= 16


def test_split_does_not_see_spelling() -> None:
    splits = [
        (split_of(age=n, sex="male", label="Acute gout"), split_of(age=n, sex="male", label="gout, acute"))
        for n in range(30)
    ]
    assert all(a == b for a, b in splits) and len({a for a, _ in splits}) == 2


# -- reports and errors -----------------------------------------------------------------------------------------------
def test_report_counts_what_was_lost(tmp_path: Path) -> None:
    report = one("agentclinic", tmp_path).report
    assert (report.read, report.converted, report.skipped, report.licence) == (1, 1, {}, "MIT")
    assert report.dropped == {
        "(sentences that say that nothing is known)": 1,
        "OSCE_Examination.Objective_for_Doctor": 1,
    }
    assert report.kept["(exams)"] == 3 and report.kept["(facts)"] == 13
    assert report.defaults["exams.need: unknown"] == 3 and report.defaults["exams.category: unknown"] == 1
    assert report.provenance == {"* (rule)": 1, "diagnosis.icd10cm (rule)": 1, "facts (llm)": 1}
    assert ("dropped", "OSCE_Examination.Objective_for_Doctor", "1") in set(report.rows())
    assert json.loads(json.dumps(report.to_json()))["read"] == 1 and report.table().row_count == len(
        list(report.rows())
    )


MALFORMED = [
    ("agentclinic", "OSCE_Examination.Correct_Diagnosis", 3, "OSCE_Examination.Correct_Diagnosis: want text; got int"),
    ("mediq", "facts", ["1. A man.", 2], "facts.1: want text; got int"),
    ("craft_md", "turns", [{"role": "nurse", "text": "x"}], "turns.0.role: want doctor or patient; got 'nurse'"),
    ("primock57", "checklists", None, "checklists: want an object; got NoneType"),
    ("kqa", "Must_have", "one", "Must_have: want a list; got str"),
    ("healthbench", "rubrics", [{"criterion": "x", "points": 0, "tags": []}], "rubrics.0"),
]


@pytest.mark.parametrize(("name", "field", "value", "problem"), MALFORMED, ids=[row[0] for row in MALFORMED])
def test_malformed_row_is_named_and_counted(name: str, field: str, value: Any, problem: str, tmp_path: Path) -> None:
    path = write(tmp_path, changed(SMALL[name], field, value), "{", "[]", SMALL[name])
    report = convert(name, path).report
    assert (report.read, report.converted, report.skipped) == (4, 1, {"malformed": 3})
    assert f"rows.jsonl:1: {problem}" in report.problems[0].replace("row: ", "")
    assert "rows.jsonl:2: want JSON" in report.problems[1] and "rows.jsonl:3: want an object" in report.problems[2]
    with pytest.raises(ValueError, match=r"rows\.jsonl:1: "):
        convert(name, path, strict=True)


@pytest.mark.parametrize(
    ("arguments", "message"), [(("fhir", "x"), "convert: name"), (("mediq", "x", 0), "convert: limit")]
)
def test_convert_refuses(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        convert(*arguments[:2], limit=arguments[2] if len(arguments) > 2 else None)


def test_written_files_are_read_back(tmp_path: Path) -> None:
    found = one("craft_md", tmp_path)
    paths = found.write(tmp_path / "out")
    assert [path.name for path in paths] == ["cases.jsonl", "trajectories.jsonl", "loss.json"]
    assert list(read_cases(paths[0])) == list(found.cases)
    assert list(read_trajectories(paths[1])) == list(found.trajectories)
    assert [one.case for one in read_recorded(paths[1], found.cases)] == list(found.cases)
    assert json.loads(paths[2].read_text())["format"] == "craft_md"
    kqa = one("kqa", tmp_path)
    assert list(read_healthbench(kqa.write(tmp_path / "kqa")[0])) == list(kqa.rows)


# -- the data sets ----------------------------------------------------------------------------------------------------
FILES = {
    "agentclinic": ("agentclinic", "agentclinic_medqa_extended.jsonl"),
    "mediq": ("mediq", "all_craft_md.jsonl"),
    "craft_md": ("craft-md", "replay_dev.jsonl.gz"),
    "primock57": ("primock57", "primock57.jsonl"),
    "kqa": ("kqa", "questions_w_answers.jsonl"),
    "ddxplus": ("ddxplus", ""),
}


def of_data(name: str, limit: int | None = None) -> Conversion:
    """A conversion of the data set of a format; skips without it."""
    folder, file = FILES[name]
    return convert(name, shared_data(folder) / file, limit=limit)


@pytest.mark.parametrize("name", FILES)
def test_first_rows_of_a_data_set(name: str) -> None:
    found = of_data(name, limit=2)
    assert found.report.read == 2 and "malformed" not in found.report.skipped
    assert [list(find_problems(case.raw)) for case in found.cases] == [[] for _ in found.cases]
    made = {"cases": found.cases, "trajectories": found.trajectories, "rows": found.rows}
    assert tuple(kind for kind, some in made.items() if some) == FORMATS[name].gives


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_all_rows_of_a_data_set(name: str) -> None:
    found = of_data(name)
    assert "malformed" not in found.report.skipped
    assert found.report.converted + sum(found.report.skipped.values()) == found.report.read
    assert [case.id for case in found.cases if list(find_problems(case.raw))] == []
    facts = [(case, fact) for case in found.cases[:120] for fact in case.facts if fact.section != "exam" and fact.keys]
    unasked = [(case.id, fact.id, fact.keys[0]) for case, fact in facts if not _asks(case, fact.keys[0], fact.id)]
    assert len(unasked) <= 0.01 * len(facts), collections.Counter(key for _, _, key in unasked).most_common(10)


@pytest.mark.slow
def test_shared_vignettes_of_the_data_sets_have_one_split() -> None:
    mediq = {tuple(fact.text for fact in case.facts): case.split for case in of_data("mediq").cases}
    craft_md = {tuple(fact.text for fact in case.facts): case.split for case in of_data("craft_md").cases}
    both = mediq.keys() & craft_md.keys()
    assert len(both) > 50 and {facts for facts in both if mediq[facts] != craft_md[facts]} == set()
