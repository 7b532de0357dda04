"""The guard: rewordings meet; every other difference keeps claims apart and is named."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from m3.rewards.claim_guard import normalise, same, signature
from m3.rewards.claim_wording import base

ALIKE = {
    "frame": ("It is important to note that aspirin thins the blood.", "Aspirin thins the blood"),
    "synonyms": ("Acetaminophen may lead to rash in kids", "Paracetamol can cause rash in children"),
    "spelling": ("Diarrhoea and anaemia are recognised", "Diarrhea and anemia are recognized"),
    "contraction": ("It isn't approved", "It is not approved"),
    "units": ("Take 500 mg for 2 weeks", "Take 0.5 g for fourteen days"),
    "how_often": ("Take it twice daily", "Take it two times a day"),
    "fraction": ("It affects 1 in 4 people", "It affects 25% of persons"),
    "fronted": ("In adults, the dose is 5 mg", "The dose is 5 mg in adults"),
    "list": ("Symptoms include nausea, fever and rash", "Symptoms include rash, nausea, and fever"),
    "of": ("The risk of cancer is higher", "Cancer risk is higher"),
    "passive": ("Measles is not caused by bacteria", "Bacteria do not cause measles"),
    "one_word": ("Health care costs money", "Healthcare costs money"),
    "inflection": ("It treats infections", "It treats an infection"),
    "brackets": ("Lexapro (escitalopram) helps", "Lexapro escitalopram helps."),
}
APART = {
    "dose": ("Take 500 mg", "Take 50 mg", "quantity"),
    "unit": ("Take 5 mg", "Take 5 mcg", "quantity"),
    "bound": ("Use at least 5 mg", "Use at most 5 mg", "quantity"),
    "direction": ("Reduce from 10 mg to 5 mg", "Reduce from 5 mg to 10 mg", "quantity"),
    "minus": ("A score of -2.5 is low", "A score of 2.5 is low", "quantity"),
    "not": ("It is safe", "It is not safe", "negation"),
    "without": ("Take it with food", "Take it without food", "negation"),
    "scope": ("Patients who do not smoke should stop", "Patients who smoke should not stop", "order"),
    "prefix": ("Hypertension is treated", "Hypotension is treated", "opposite"),
    "side": ("Pain in the left arm", "Pain in the right arm", "laterality"),
    "route": ("It is given orally", "It is given intravenously", "route"),
    "time": ("Take it before meals", "Take it after meals", "time"),
    "population": ("It is used in children", "It is used in adults", "population"),
    "modal": ("You should rest", "You must rest", "modality"),
    "cannot": ("It cannot be cured", "It may not be cured", "modality"),
    "strength": ("It is more common", "It is most common", "comparison"),
    "few": ("Few patients recover", "A few patients recover", "comparison"),
    "site": ("It harms the liver", "It harms the kidney", "site"),
    "drug": ("Atenolol is used", "Metoprolol is used", "drug"),
    "unknown_drug": ("Xanofril is used", "Zanufril is used", "word"),
    "roles": ("Stress causes pain", "Pain causes stress", "order"),
    "voice": ("Stress causes pain", "Stress is caused by pain", "word"),
    "doses_change_places": ("Take A1 5 mg and B2 10 mg", "Take A1 10 mg and B2 5 mg", "order"),
    "scope_of_an_adjective": ("It causes severe rash and fever", "It causes severe fever and rash", "order"),
    "nested_lists": (
        "It causes rash and harms, such as pain and itch",
        "It causes itch and harms, such as pain and rash",
        "order",
    ),
    "and_or": ("Use ice and heat", "Use ice or heat", "word"),
    "respectively": ("A1 and B2 treat gout and flu respectively", "B2 and A1 treat gout and flu respectively", "order"),
    "letter": ("Hepatitis A is common", "Hepatitis is common", "word"),
    "capitals": ("ALL is a cancer", "All is a cancer", "comparison"),
    "receptor": ("ER+ tumors grow", "ER- tumors grow", "word"),
    "name_with_digits": ("Vitamin B12 helps", "Vitamin B6 helps", "word"),
    "left_out": ("It is usually safe", "It is safe", "modality"),
    "sign": ("Take it ☀ now", "Take it ☾ now", "word"),
    "no_word": ("...", "!!!", "word"),
    "question": ("Is it safe?", "Is it safe", "word"),
}
CLAIMS = [pair[0] for pair in (*ALIKE.values(), *APART.values())]
WORDS = (
    "aspirin may not cause severe rash or fever in adults of 5 mg twice daily , the left arm without is by and".split()
)


@pytest.mark.parametrize(("one", "other"), ALIKE.values(), ids=ALIKE)
def test_rewordings_meet(one, other):
    assert (same(one, other), same(other, one)) == ("", "")


@pytest.mark.parametrize(("one", "other"), ALIKE.values(), ids=ALIKE)
def test_rewordings_share_a_flight(one, other):
    assert signature(one).flight_key == signature(other).flight_key


@pytest.mark.parametrize(("one", "other", "reason"), APART.values(), ids=APART)
def test_others_stay_apart_and_say_why(one, other, reason):
    assert [same(one, other).partition(":")[0], same(other, one).partition(":")[0]] == [reason, reason]


@given(st.permutations(WORDS), st.integers(1, len(WORDS)), st.integers(0, len(WORDS) - 1))
def test_a_word_left_out_is_seen(order, length, at):
    """Of any jumble: only "the", a comma, and an "and" that begins it may go."""
    words = order[:length]
    gone = at % length
    left = [word for i, word in enumerate(words) if i != gone]
    if words[gone] not in ("the", ",") and (gone or words[gone] != "and"):
        assert same(" ".join(words), " ".join(left)) != ""


@given(st.sampled_from(CLAIMS), st.sampled_from(CLAIMS))
def test_it_is_symmetric_and_same_means_one_flight(one, other):
    alike = same(one, other) == ""
    assert (same(other, one) == "") == alike
    assert not alike or signature(one).flight_key == signature(other).flight_key


@given(st.text(max_size=40))
def test_any_text_has_a_signature(text):
    assert same(text, text) == "" or not signature(text).tokens
    assert normalise(normalise(text)) == normalise(text)


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [
        ("Aspirin helps.", "aspirin   helps", True),
        ("It’s “safe”", 'it\'s "safe"', True),
        ("ALL is treatable", "all is treatable", False),
        ("10⁹ cells", "109 cells", False),
        ("2½ cups", "21/2 cups", False),
        ("5 mg", "5 mcg", False),
    ],
)
def test_exact_key_folds_writing_only(one, other, equal):
    assert (normalise(one) == normalise(other)) is equal


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("treated", "treats"),
        ("dosing", "doses"),
        ("causing", "cause"),
        ("stopped", "stops"),
        ("women", "woman"),
        ("studies", "studied"),
        ("tumours", "tumor"),
        ("viruses", "virus"),
        ("oedema", "edema"),
    ],
)
def test_inflections_share_a_base(one, other):
    assert base(one) == base(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("rate", "rat"),
        ("higher", "high"),
        ("treatment", "treat"),
        ("organism", "organ"),
        ("harmless", "harmful"),
        ("artery", "arterial"),
        ("prednisone", "prednisolone"),
        ("planed", "planned"),
    ],
)
def test_derivations_and_other_words_do_not(one, other):
    assert base(one) != base(other)


ALMOST = {
    "tense": ("She smokes", "She smoked"),
    "irregular tense": ("He drinks alcohol", "He drank alcohol"),
    "role": ("The infecting organism dies", "The infected organism dies"),
    "gerund": ("A fasting test is needed", "A fast test is needed"),
    "organ": ("The tests were removed", "The testes were removed"),
    "only": ("It affects just women", "It affects women"),
    "own": ("The immune system attacks its own cells", "The immune system attacks cells"),
    "enhance": ("Caffeine enhances headache", "Caffeine improves headache"),
    "in case": ("Carry epinephrine in case you react", "Carry epinephrine if you react"),
    "jointly": ("Alcohol together with aspirin harms", "Alcohol and aspirin harm"),
    "the cause": ("Smoking is the cause of it", "Smoking is a cause of it"),
    "whom": ("About 2% of people have seizures", "About 2% of patients have seizures"),
    "ability": ("Newborns can see", "Newborns might see"),
    "permission": ("You may eat before surgery", "You might eat before surgery"),
    "answer": ("No, antibiotics help", "No antibiotics help"),
    "letter a": ("HEPATITIS A IS SPREAD BY FOOD", "HEPATITIS IS SPREAD BY FOOD"),
    "genotype": ("The genotype Aa causes it", "The genotype aa causes it"),
    "antigen": ("Anti-K antibodies cause it", "Anti-k antibodies cause it"),
    "mega": ("Give 370 MBq of iodine", "Give 370 mBq of iodine"),
    "mercury": ("A pressure of 10 mm Hg", "A pressure of 10 cm Hg"),
    "negative": ("Rh(-) mothers need it", "Rh mothers need it"),
    "ranked": ("Causes include A1, B2, and C3, in that order", "Causes include B2, A1, and C3, in that order"),
    "owner": ("Viruses infect cells of animals", "Animal viruses infect cells"),
    "lost": ("It causes loss of vision and headache", "It causes loss of headache and vision"),
    "attachment": ("In mice, it kills cells that grow in humans", "It kills cells that grow in humans in mice"),
    "relative": ("Patients, who smoke, die", "Patients who smoke die"),
    "night": ("Take it daily", "Take it nightly"),
    "few": ("Multiple doses are needed", "A few doses are needed"),
}


@pytest.mark.parametrize(("one", "other"), ALMOST.values(), ids=ALMOST)
def test_small_words_and_endings_keep_claims_apart(one, other):
    assert same(one, other)
    assert same(other, one)
    assert normalise(one) != normalise(other)


STILL = {
    "passive": ("Measles is caused by a virus", "A virus causes measles"),
    "synonym with its own ending": ("STDs can be prevented", "Sexually transmitted diseases can be prevented"),
    "linked": ("It is linked to cancer", "It is associated with cancer"),
    "chance": ("It can cause nausea", "It might cause nausea"),
    "who has a disease": ("People with diabetes need care", "Patients with diabetes need care"),
    "the most": ("It is the most common cause", "It is most common cause"),
}


@pytest.mark.parametrize(("one", "other"), STILL.values(), ids=STILL)
def test_endings_do_not_part_rewordings(one, other):
    assert (same(one, other), same(other, one)) == ("", "")
