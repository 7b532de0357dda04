"""Diagnoses: what a text claims, when two labels are one disease, the hierarchical credit, recorded graders."""

from __future__ import annotations

import gzip
import json

import pytest
from clinic_cases import shared_data, small_case

from m3.environment.case import CodedLabel
from m3.rewards.diagnosis import Config, Reading, Reference, compare, look_up, read_answer, reference_of, score

# -- reading: (text, reading, labels) ---------------------------------------------------------------------------------
READ = {
    "marker": ("Final Diagnosis: Lichen planus.", "decided", ["Lichen planus"]),
    "markdown": ("**Final Diagnosis:** Perioral Dermatitis", "decided", ["Perioral Dermatitis"]),
    "marker_of_a_stage": (
        "Diagnosis: Acute appendicitis\nAdvice: Go to hospital now.",
        "decided",
        ["Acute appendicitis"],
    ),
    "sentence": (
        "Based on your symptoms, the most likely diagnosis is benign paroxysmal positional vertigo (BPPV).",
        "decided",
        ["benign paroxysmal positional vertigo"],
    ),
    "next_line": ("The most likely diagnosis is:\n\nTyphoid fever.", "decided", ["Typhoid fever"]),
    "bare_label": (" Alzheimer's disease.", "decided", ["Alzheimer's disease"]),
    "joint": (
        "Final diagnosis: Scleroderma with Raynaud's phenomenon",
        "decided",
        ["Scleroderma", "Raynaud's phenomenon"],
    ),
    "hedged_alone": ("Final Diagnosis: Possible psoriasis.", "decided", ["psoriasis"]),
    "hedged_second_is_dropped": ("Final Diagnosis: Psoriasis with possible arthritis", "decided", ["Psoriasis"]),
    "hedged_after_a_finding": (
        "Final Diagnosis: Benign lesion, possibly a wart",
        "decided",
        ["Benign lesion", "a wart"],
    ),
    "ruled_out": ("Final Diagnosis: Migraine, not a stroke", "decided", ["Migraine"]),
    "reason_is_left_out": ("Final Diagnosis: Gout based on pain or swelling of the toe", "decided", ["Gout"]),
    "note_is_left_out": ("Final Diagnosis: Eczema (Note: or psoriasis, further tests needed)", "decided", ["Eczema"]),
    "advice_is_left_out": ("Final Diagnosis: Asthma. Please see a doctor about COPD or cancer.", "decided", ["Asthma"]),
    "alternatives": ("Final Diagnosis: Eczema or contact dermatitis", "undecided", ["Eczema", "contact dermatitis"]),
    "two_markers": ("Final Diagnosis: Gout\n\nor\n\nFinal Diagnosis: Sepsis", "undecided", ["Gout", "Sepsis"]),
    "list": ("1. Pneumonia\n2. Lung cancer - less likely\n3. Asthma", "ranked", ["Pneumonia", "Lung cancer", "Asthma"]),
    "list_after_marker": (
        "Differential diagnosis:\n- Gout\n- Septic arthritis",
        "ranked",
        ["Gout", "Septic arthritis"],
    ),
    "marker_at_the_end": ("Frozen shoulder is the most likely diagnosis.", "decided", ["Frozen shoulder"]),
    "lone_letter_ends_no_sentence": ("C. difficile infection.", "decided", ["C. difficile infection"]),
    "alternatives_in_brackets": ("Final Diagnosis: Neonatal rash (measles or rubella)", "decided", ["Neonatal rash"]),
    "several_causes": (
        "Final Diagnosis: Jaundice due to biliary atresia or sepsis",
        "decided",
        ["Jaundice"],
    ),
    "examination": ("Final Diagnosis: MRI of the brain.", "absent", []),
    "empty": ("", "absent", []),
    "question": ("How long have you had the rash?", "absent", []),
    "refusal": ("Final Diagnosis: Unable to determine without examination.", "absent", []),
    "referral_only": ("Please see a doctor.", "absent", []),
    "none": ("Final diagnosis: None", "absent", []),
}


@pytest.mark.parametrize(("text", "reading", "labels"), READ.values(), ids=READ)
def test_read_answer(text, reading, labels):
    found = read_answer(text)
    assert (str(found.reading), [label.text for label in found.labels]) == (reading, labels)


def test_codes_and_asides_of_an_answer():
    found = read_answer("Final Diagnosis: Heart attack (STEMI) [I21.19]")
    assert found.codes == ("I21.19",)
    assert found.labels[0].aside == ("STEMI",)


# -- words: (reference, label, rule) ----------------------------------------------------------------------------------
COMPARED = [
    ("Lichen planus", "LICHEN PLANUS", "same"),
    ("Benign paroxysmal positional vertigo", "BPPV", "same"),
    ("Perniosis", "chilblains", "same"),
    ("Anaemia of iron deficiency", "iron deficiency anemia", "same"),
    ("Ménière's disease", "Menieres disease", "same"),
    ("Pyoderma grangrenosum", "pyoderma gangrenosum", "same"),
    ("Acute contact dermatitis", "contact dermatitis", "same"),
    ("Type 2 diabetes mellitus", "T2DM", "same"),
    ("Type II diabetes mellitus", "type 2 diabetes", "same"),
    ("Lichen planus", "oral lichen planus", "narrower"),
    ("Acral lentiginous melanoma", "malignant melanoma", "broader"),
    ("Anetoderma associated with SLE", "lupus erythematosus", "none"),
    ("Contact dermatitis", "dermatitis", "none"),
    ("Tinea", "tinea versicolor", "none"),
    ("Type 1 diabetes mellitus", "type 2 diabetes mellitus", "none"),
    ("Acute pancreatitis", "chronic pancreatitis", "none"),
    ("Hyperthyroidism", "hypothyroidism", "none"),
    ("Hyperkalemia", "hypokalemia", "none"),
    ("Hyperkalemia", "hypercalcemia", "none"),
    ("Hypertension", "pulmonary hypertension", "none"),
    ("Stroke", "heat stroke", "none"),
    ("Pemphigus foliaceous", "pemphigus foliaceus", "same"),
    ("Hidradenitis suppurativa", "hidradneitis suppurativa", "same"),
    ("Viral meningitis", "bacterial meningitis", "none"),
    ("Gout", "pseudogout", "none"),
    ("Pulmonary embolism", "pulmonary edema", "none"),
    ("Measles", "", "none"),
    ("Crohn\N{RIGHT SINGLE QUOTATION MARK}s disease", "Crohn's disease", "same"),
    ("Seborrheic keratosis", "seborrheic keratoses", "same"),
    ("\N{GREEK SMALL LETTER BETA}-thal major", "beta thalassemia major", "same"),
    ("Papillary carcinoma of the thyroid", "papillary thyroid cancer", "same"),
    ("Endometritis", "endometrial cancer", "none"),
    ("Non-Hodgkin lymphoma", "Hodgkin lymphoma", "none"),
    ("Non-Hodgkin lymphoma", "non-Hodgkin lymphoma", "same"),
    ("Gallstone pancreatitis", "pancreatitis", "none"),
    ("Transient global amnesia", "amnesia", "none"),
    ("Advanced sleep phase disorder", "delayed sleep phase disorder", "none"),
    ("Adjustment disorder with depressed mood", "major depressive disorder", "none"),
    ("Rotavirus infection", "rotavirus-associated intussusception", "none"),
    ("Acute stress disorder", "post-traumatic stress disorder", "none"),
    ("Hemophilia A", "hemophilia", "none"),
    ("Hepatitis B", "hepatitis A", "none"),
    ("Angioedema", "drug-induced angioedema", "narrower"),
]


@pytest.mark.parametrize(("reference", "label", "rule"), COMPARED)
def test_compare(reference, label, rule):
    assert compare(reference, label) == rule


# a word and the same misspelt: which of the two is met must not depend on the order of a set
TWINS = (
    "sarcoidosis",
    "endometriosis",
    "histiocytosis",
    "mastocytosis",
    "blastomycosis",
    "actinomycosis",
)


@pytest.mark.parametrize("word", TWINS)
def test_the_word_itself_is_met_before_one_that_is_like_it(word):
    twin = word[:-4] + "e" + word[-3:]
    assert compare(f"{word} ocularis", f"{word} ocularis mother father sister brother uncle {twin}") == "narrower"


def test_broader_names_can_be_refused():
    assert compare("Acral lentiginous melanoma", "melanoma", Config(accept_broader=False)) == "none"


# -- score ------------------------------------------------------------------------------------------------------------
STEMI = reference_of(small_case())  # I21.19; acceptable I21.9 at 0.8

# text: correct, code, source, credit
SCORED = {
    "label": ("Diagnosis: inferior ST elevation myocardial infarction", True, "I21.19", "label", 1.0),
    "synonym": ("Diagnosis: heart attack", True, "I21.19", "label", 1.0),
    "code_alone_decides_the_credit": ("Diagnosis: Heart attack [I21.4]", True, "I21.4", "written", 0.6),
    "looked_up_block": ("Diagnosis: Unstable angina", False, "I20.0", "looked up", 0.3),
    "looked_up_chapter": ("Diagnosis: Aortic dissection", False, "I71", "looked up", 0.1),
    "off_the_branch": ("Diagnosis: Lichen planus", False, "L43", "looked up", -0.1),
    "no_such_disease": ("Diagnosis: qwertz asdf", False, None, "none", -0.1),
    "ranked_second": ("1. Lichen planus\n2. Heart attack", False, "I21.19", "label", 0.5),
    "ranked_beyond_the_limit": (
        "1. Lichen planus\n2. Gout\n3. Asthma\n4. Heart attack",
        False,
        "L43",
        "looked up",
        -0.1,
    ),
    "alternatives_share": ("Diagnosis: heart attack or gout", False, "I21.19", "label", 0.5),
    "absent": ("I cannot tell.", False, None, "none", 0.0),
}


@pytest.mark.parametrize(("text", "correct", "code", "source", "credit"), SCORED.values(), ids=SCORED)
def test_score(text, correct, code, source, credit):
    found = score(STEMI, text)
    assert (found.correct, found.code, found.source) == (correct, code, source)
    assert found.credit == pytest.approx(credit)


def test_absent_is_named_and_its_credit_is_configured():
    found = score(STEMI, "What else?", Config(absent=-0.25))
    assert (found.reading, found.credit, found.rule) == (Reading.absent, -0.25, "none")


LOOKED_UP = {
    "Perniosis": "T69.1",  # by another name of it: chilblains
    "Grover disease": "L11.1",
    "Nummular eczema": "L30.0",
    "Tinea": "B35",
    "BPPV": "H81.1",
    "Burr hole": None,  # no disease; "Fall into hole" is beside the matter
    "qwertz": None,
}


@pytest.mark.parametrize(("label", "code"), LOOKED_UP.items())
def test_look_up(label, code):
    assert look_up(label, Config().found) == (code, "none" if code is None else "looked up")


def test_without_a_reference_code_there_is_no_credit():
    found = score(Reference(label="Gout"), "Final Diagnosis: Podagra")
    assert found.correct
    assert found.credit is None
    assert score(Reference(label="Gout"), "").credit is None


@pytest.mark.parametrize(
    ("reference", "said", "correct"),
    [
        ("Early ovarian failure (primary ovarian insufficiency)", "primary ovarian insufficiency", True),
        ("Adrenal adenoma (Conn's syndrome)", "Conn syndrome", True),
        ("Toxic epidermal necrolysis (TEN)", "TEN", True),
        ("Toxic epidermal necrolysis (TEN)", "epidermal necrolysis, toxic", True),
        ("Drug-induced hyperprolactinaemia (domperidone)", "Stops domperidone", False),
        ("Carbuncle (acute)", "acute gout", False),
    ],
)
def test_brackets_of_a_reference(reference, said, correct):
    """Another name or initials count; a cause or a qualifier does not."""
    assert score(Reference(label=reference), said).correct is correct


def test_acceptable_alternative():
    reference = Reference(
        label="Lyme disease", code="A69.20", acceptable=(CodedLabel(icd10cm="B88.8", label="Tick bite", credit=0.4),)
    )
    found = score(reference, "Diagnosis: tick bite")
    assert (found.correct, found.acceptable, found.code) == (False, 0.4, "B88.8")
    assert found.credit == pytest.approx(0.4)


def test_naming_many_diseases_does_not_pay():
    """A list of one disease of each chapter earns less than the right block."""
    listed = "Differential:\n" + "\n".join(
        f"- {name}" for name in ("Gout", "Asthma", "Sepsis", "Stroke", "Heart attack")
    )
    assert score(STEMI, listed).credit == pytest.approx(-0.1)


def test_claiming_many_diseases_at_once_does_not_pay():
    claimed = "Diagnosis: gout, asthma, measles, heart attack"
    assert not score(STEMI, claimed).correct
    assert score(STEMI, claimed).credit == pytest.approx(-0.1)


COMMON = "gout; asthma; sepsis; stroke; measles; malaria; migraine; eczema; cholera; epilepsy; scabies; mumps".split(
    "; "
)
LISTS = {
    "right_one_first": "Diagnosis: " + ", ".join(["heart attack", *COMMON]),
    "joined": "Diagnosis: " + " with ".join(["heart attack", *COMMON]),
    "in_brackets": "Diagnosis: illness (" + ") (".join([*COMMON, "heart attack"]) + ")",
    "without_marks": "Diagnosis: " + " ".join([*COMMON, "heart attack"]),
    "alternatives_after_a_cause": "Diagnosis: heart attack due to stress or " + " or ".join(COMMON),
}


@pytest.mark.parametrize("text", LISTS.values(), ids=LISTS)
def test_a_list_is_no_diagnosis(text):
    found = score(STEMI, text)
    assert not found.correct
    assert found.credit < 0.25


@pytest.mark.parametrize(("others", "share"), [(0, 1.0), (2, 1.0), (3, 3 / 4), (5, 3 / 6)])
def test_credit_is_shared_among_all_that_is_claimed(others, share):
    one = score(STEMI, "Diagnosis: " + ", ".join(["heart attack", *COMMON[:others]]))
    alone = score(STEMI, "Diagnosis: heart attack")
    assert one.correct
    assert one.credit == pytest.approx(alone.credit * share)


def test_levels_are_reported():
    levels = score(STEMI, "Diagnosis: Unstable angina").levels
    assert (levels.chapter, levels.block, levels.category, levels.exact) == (True, True, False, False)


@pytest.mark.parametrize("listed", [0, -1])
def test_config_is_checked(listed):
    with pytest.raises(ValueError, match=r"diagnosis\.Config: listed: want"):
        Config(listed=listed)


# -- recorded consultations -------------------------------------------------------------------------------------------
def test_agrees_with_the_recorded_grader():
    """On CRAFT-MD's recorded answers, at least 95 in 100 verdicts are those of the recorded grader."""
    with gzip.open(shared_data("craft-md") / "replay_dev.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    agreed = [score(Reference(label=row["answer"]), row["frq"]).correct == bool(row["frq_eval"]) for row in rows]
    assert sum(agreed) / len(agreed) >= 0.95
    graded = sum(row["frq_eval"] for row in rows) / len(rows)
    assert 1 - graded < 0.9, "answering never correct would agree on nearly as many"
