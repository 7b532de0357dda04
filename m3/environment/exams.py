"""The closed list of 38 categories of examination, and the names under which people order them.

The paper counts 38 categories and does not name them (Baichuan-M3, arXiv 2602.06570, on ScanBench); these are ours.
"""

from __future__ import annotations

CATEGORIES = (
    "full_blood_count",
    "electrolytes_and_renal_function",
    "liver_function",
    "glucose_and_lipids",
    "cardiac_markers",
    "coagulation",
    "inflammatory_markers",
    "blood_gas",
    "iron_and_vitamins",
    "thyroid_function",
    "other_hormones",
    "autoantibodies",
    "tumour_markers",
    "proteins_and_immunoglobulins",
    "haemolysis_and_blood_film",
    "blood_culture",
    "infection_serology",
    "urine_tests",
    "pregnancy_test",
    "stool_tests",
    "swab_and_sputum",
    "cerebrospinal_fluid",
    "joint_and_cavity_fluid",
    "drug_levels_and_toxicology",
    "genetic_tests",
    "biopsy_and_bone_marrow",
    "ecg",
    "cardiac_stress_and_catheter",
    "echocardiography",
    "plain_radiography",
    "ultrasound",
    "ct",
    "mri",
    "nuclear_medicine_and_bone_density",
    "endoscopy",
    "lung_function",
    "neurophysiology",
    "bedside_and_functional_tests",
)
