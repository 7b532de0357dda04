"""A small row of each public format that converters read."""

from __future__ import annotations

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
