"""Words of patients and of physicians for one thing, and the words that make a sentence clinical.

``CONCEPTS``: each row is one thing under the names that people use for it; a question with any of them asks for a key
written with any other. ``CLINICAL``: words whose presence makes a statement of a patient a clinical one. Both are ours:
common English of consultations, written by hand, deliberately short; a word too few makes a patient say "I don't know",
a word too many would make it answer what was not asked.
"""

from __future__ import annotations

import functools
import re

from m3.text.words import stem as plain_stem
from m3.text.words import words

CONCEPTS: tuple[tuple[str, ...], ...] = (
    (
        "short of breath",
        "shortness of breath",
        "breathless",
        "breathlessness",
        "dyspnoea",
        "dyspnea",
        "out of breath",
        "difficulty breathing",
        "trouble breathing",
        "breathing difficulty",
        "hard to breathe",
        "winded",
        "puffed",
        "catch your breath",
        "catch breath",
    ),
    ("fever", "febrile", "high temperature", "raised temperature", "run a temperature", "feverish", "pyrexia"),
    ("chills", "rigors", "shivering", "shivers"),
    ("vomit", "vomiting", "emesis"),
    ("nausea", "nauseous", "nauseated", "feel sick", "feeling sick", "queasy"),
    ("diarrhoea", "diarrhea", "loose stools", "loose motions", "runny poo"),
    ("constipation", "constipated"),
    ("stool", "stools", "poo", "faeces", "feces", "bowel motion", "motions"),
    ("blood in stool", "bloody stool", "rectal bleeding", "bleeding from back passage", "blood when you poo"),
    ("black stool", "tarry stool", "melaena", "melena", "black poo"),
    ("urinate", "urination", "pass urine", "passing urine", "pee", "peeing", "pass water", "passing water", "wee"),
    ("blood in urine", "haematuria", "hematuria", "bloody urine", "blood in pee"),
    ("burning urine", "dysuria", "painful urination", "burn when pee", "burning when you pee", "pain passing urine"),
    ("palpitations", "heart racing", "racing heart", "heart pounding", "heart flutter", "irregular heartbeat"),
    (
        "faint",
        "fainted",
        "pass out",
        "passed out",
        "black out",
        "blackout",
        "syncope",
        "lose consciousness",
        "lost consciousness",
        "loss of consciousness",
        "collapse",
    ),
    ("dizzy", "dizziness", "lightheaded", "light-headed", "giddy", "woozy"),
    ("vertigo", "room spinning", "spinning"),
    ("seizure", "fit", "fits", "convulsion", "convulse"),
    ("numb", "numbness", "loss of sensation", "lost feeling"),
    ("tingling", "pins and needles", "paraesthesia", "paresthesia"),
    ("weakness", "weak", "loss of strength", "lost strength"),
    ("headache", "head ache", "head hurt", "pain in head"),
    ("light bother", "photophobia", "sensitive to light", "light sensitivity", "light hurt"),
    ("stiff neck", "neck stiffness", "neck stiff"),
    ("sweat", "sweating", "sweats", "sweaty", "clammy", "diaphoresis"),
    ("night sweats", "sweat at night", "drenched at night"),
    ("weight loss", "lost weight", "losing weight", "lose weight"),
    ("weight gain", "gained weight", "put on weight", "putting on weight", "gain weight"),
    ("appetite", "off your food", "eating less"),
    ("tired", "tiredness", "fatigue", "fatigued", "exhausted", "lack of energy", "low energy", "worn out"),
    ("swelling", "swollen", "oedema", "edema", "swell"),
    ("itch", "itching", "itchy", "pruritus"),
    ("rash", "skin change", "spots on skin"),
    ("jaundice", "yellow skin", "yellow eyes", "skin yellow", "eyes yellow"),
    ("swallow", "swallowing", "dysphagia", "food down"),
    ("heartburn", "acid reflux", "reflux", "indigestion"),
    ("bloat", "bloating", "bloated", "distended", "distension"),
    ("cough", "coughing"),
    (
        "cough blood",
        "coughing up blood",
        "haemoptysis",
        "hemoptysis",
        "blood when you cough",
        "bring up blood",
        "brought up blood",
    ),
    ("phlegm", "sputum", "mucus"),
    ("wheeze", "wheezing", "wheezy", "whistling chest"),
    ("snore", "snoring"),
    ("bruise", "bruising", "bruises easily"),
    ("period", "periods", "menstruation", "menstrual", "menses"),
    ("last period", "last menstrual period", "lmp"),
    ("pregnant", "pregnancy"),
    ("miscarry", "miscarriage", "lost a pregnancy"),
    ("contraception", "contraceptive", "birth control"),
    ("vaginal discharge", "discharge from vagina", "discharge down below"),
    ("sexually active", "sexual partner", "intercourse", "sex life"),
    ("radiate", "radiation", "spread", "go anywhere", "goes anywhere", "move anywhere", "travel anywhere"),
    ("start", "began", "begin", "onset", "first notice", "first noticed"),
    ("how long", "duration"),
    ("worse", "aggravate", "exacerbate", "trigger", "hurt more", "more painful"),
    ("better", "relieve", "ease", "help with the pain", "alleviate", "improve"),
    ("scale", "out of ten", "one to ten", "1 to 10", "how bad", "how severe", "severity"),
    ("hypertension", "high blood pressure", "raised blood pressure"),
    ("diabetes", "diabetic", "high blood sugar", "sugar problem"),
    ("anaemia", "anaemic", "anemia", "anemic"),
    ("cholesterol", "lipids", "hyperlipidaemia", "hyperlipidemia"),
    ("heart attack", "myocardial infarction", "coronary"),
    ("stroke", "tia", "mini-stroke"),
    ("asthma", "asthmatic"),
    ("blood clot", "clots", "thrombosis", "dvt", "embolism"),
    ("cancer", "malignancy", "tumour", "tumor"),
    ("operation", "operations", "surgery", "surgeries", "surgical", "operated"),
    (
        "medical conditions",
        "medical history",
        "past history",
        "long-term conditions",
        "health problems",
        "medical problems",
        "chronic illness",
        "ongoing conditions",
        "conditions in past",
        "existing conditions",
        "long-term illness",
        "health conditions",
        "long-standing problems",
        "serious illness",
    ),
    ("medication", "medications", "medicine", "medicines", "tablets", "drugs do you take", "prescription"),
    ("over the counter", "otc", "herbal", "supplements"),
    ("blood thinner", "anticoagulant", "warfarin"),
    ("painkiller", "painkillers", "analgesic", "ibuprofen", "nsaid"),
    ("allergy", "allergies", "allergic", "react badly", "bad reaction"),
    ("smoke", "smoking", "smoker", "cigarettes", "tobacco"),
    ("alcohol", "drink alcohol", "enjoy a drink", "units a week", "wine", "beer", "booze"),
    ("recreational drugs", "illicit drugs", "street drugs", "cannabis", "cocaine", "use drugs"),
    ("job", "occupation", "work as"),
    ("live alone", "living situation", "who is at home", "home situation"),
    ("exercise", "physical activity", "physically active"),
    ("travel", "travelled", "traveled", "abroad", "trip overseas"),
    ("family history", "run in the family", "runs in family", "relatives"),
    ("mother", "mum", "mom"),
    ("father", "dad"),
    ("parents", "mother or father"),
    ("siblings", "brothers or sisters"),
    ("mood", "low in mood", "feeling down", "depressed", "hopeless", "sad"),
    (
        "suicidal",
        "harm yourself",
        "end your life",
        "hurt yourself",
        "take your own life",
        "kill yourself",
        "self-harm",
        "not worth living",
    ),
    ("anxious", "anxiety", "nervous"),
    ("stress", "stressed"),
    ("sleep", "sleeping", "insomnia"),
    ("memory", "forgetful", "forgetting", "remember things"),
    ("fall", "fallen", "falls", "trip over"),
    ("injury", "injure", "injured", "trauma", "accident"),
    ("hit head", "bang head", "banged head", "knock head", "head injury", "bump head"),
    ("happened before", "like this before", "similar before"),
    ("pain", "painful", "hurt", "sore", "ache", "aching"),
    ("problem", "trouble", "disease", "illness"),
    ("vision", "eyesight", "see clearly", "blurred", "visual"),
    ("hearing", "deaf", "hear well"),
    ("thirst", "thirsty", "drink a lot of water", "polydipsia"),
    ("belly", "abdomen", "abdominal", "tummy", "stomach"),
    ("joint", "joints"),
    ("calf", "calves"),
    ("immunised", "immunisation", "vaccinated", "vaccination", "vaccine", "jabs"),
)

# concepts that do not ask for anything alone: the key "first notice" is not asked for by "before we start"
_GENERIC = frozenset({"=start", "=how long", "=worse", "=better", "=scale", "=exercise", "=fall", "=pain", "=problem"})

# a sentence of a patient with one of these says something clinical
_CLINICAL = """
abscess ache acne alcohol allergy anaemia anemia angina ankle anxiety anxious appendix appetite arm arthritis
aspirin asthma belly biopsy bladder bleed blister bloat blood blurred bone bowel breast breath breathless bruise
burn calf cancer cannabis chemotherapy chest chill cholesterol cigarette clot cocaine cold collapse colonoscopy
confused constipation convulsion cough cramp dehydrated dementia depressed depression diabetes diarrhea diarrhoea
diet discharge dizzy drowsy ear eczema elbow epilepsy eye faint fall fatigue fever fit flu fracture gallstone gout
groin gum haemorrhoid hallucination headache heart heartburn hernia heroin hip hive hoarse hypertension ibuprofen
incontinence infection inhaler injury insomnia insulin itch jaundice jaw joint kidney knee lethargic leg limp liver
lump lung malaria medication medicine melaena menopause metformin migraine miscarriage morphine mucus murmur muscle
nausea neck numb oedema operation pain painkiller palpitation pancreas panic paracetamol paralysed pee penicillin
period phlegm pill pneumonia poo pregnant prostate psoriasis pulse rash reflux rib scar seizure shiver shoulder sick
sinus skin sleep smoke snore sore spasm sperm spinal spine sputum stiff stomach stool stroke suicidal surgery
swallow sweat swell swollen syphilis tablet tachycardia temperature tender testicle throat thyroid tingling tired
tobacco tonsil toothache tremble tremor tuberculosis tumour tumor ulcer urine urinate vaccine vagina vertigo vision
vomit warfarin weak weakness weight wheeze wound wrist
"""
_DRUG_OR_DISEASE = re.compile(
    r"\w{3,}(?:itis|osis|aemia|emia|algia|oma|pathy|ectomy|oscopy|pril|sartan|statin|olol|azole|cillin|mycin|cycline"
    r"|oxacin|idone|azepam|gliptin|gliflozin|triptan|dipine|uria|rrhoea|rrhea)s?$"
)
_NOT_DISEASE = frozenset("diagnosis prognosis osmosis purpose chemosis coma aroma diploma".split())

# words whose stem is that of another thing: "medication" is stemmed as "medical", "relative" as "related"
_APART = {"medication": "medicin", "medications": "medicin", "relative": "relative", "relatives": "relative"}


def stem(word: str) -> str:
    """The stem by which words of keys and of sentences are compared: of words.stem but where two things share one."""
    return _APART.get(word.lower()) or plain_stem(word)


# grammar that a key may hold and a question may word otherwise
FUNCTION_WORDS = frozenset(
    stem(word)
    for word in (
        "a an the of in on at to for with from by and or your you yours any some do does did is are was were be been "
        "has have had it its this that there up when's what's i my me please ever get got"
    ).split()
)
_VARIANT_GAP = 1  # ours: words that may stand between two words of a name ("short of any breath")


def topic_stems(text: str) -> list[str]:
    """Stems of the words of a text in order, without grammar; all of them where nothing else is left."""
    return without_grammar([stem(word) for word in words(text)])


def without_grammar(found: list[str]) -> list[str]:
    """Stems of a sentence without those of grammar; all of them where nothing else is left."""
    return [one for one in found if one not in FUNCTION_WORDS] or found


@functools.cache
def _variants() -> dict[str, list[tuple[tuple[str, ...], str]]]:
    found: dict[str, list[tuple[tuple[str, ...], str]]] = {}
    for names in CONCEPTS:
        concept = "=" + names[0]
        for phrase in dict.fromkeys(tuple(topic_stems(name)) for name in names):
            found.setdefault(phrase[0], []).append((phrase[1:], concept))
    return found


def concepts(topics: list[str]) -> dict[str, frozenset[str]]:
    """Concepts named in a sentence's topic stems, each with the stems that name it; ``=`` begins a concept's name."""
    variants = _variants()
    found: dict[str, frozenset[str]] = {}
    for i, first in enumerate(topics):
        for rest, concept in variants.get(first, ()):
            at = i
            for one in rest:
                window = topics[at + 1 : at + 2 + _VARIANT_GAP]
                if one not in window:
                    break
                at += 1 + window.index(one)
            else:
                found[concept] = found.get(concept, frozenset()) | {first, *rest}
    return found


@functools.lru_cache(maxsize=16384)
def ways(phrase: str) -> tuple[frozenset[str], ...]:
    """A key as sets of tokens, any of which means it: as written, and by the concepts it names.

    Grammar in it counts only where one word alone would be left ("bring on").
    """
    kept = topic_stems(phrase)
    plain = frozenset(kept if len(kept) > 1 else [stem(word) for word in words(phrase)])
    found = concepts(kept)
    if not plain or not found:
        return (plain,) if plain else ()
    found = {one: naming for one, naming in found.items() if not any(naming < other for other in found.values())}
    named = frozenset(one for naming in found.values() for one in naming)
    by_concept = frozenset({*(plain - named), *found})
    return (plain,) if by_concept <= _GENERIC else tuple(dict.fromkeys((plain, by_concept)))


def tokens(sentence: str, most: int | None = None) -> frozenset[str]:
    """Stems of a sentence's words, grammar included, and the concepts it names; of its first ``most`` words."""
    found = [stem(word) for word in words(sentence)[:most]]
    return frozenset(found) | frozenset(concepts(without_grammar(found)))


def means(sentence_tokens: frozenset[str], phrase: str) -> bool:
    """Whether all words of a key are among a sentence's tokens."""
    return any(way <= sentence_tokens for way in ways(phrase))


@functools.cache
def clinical_stems() -> frozenset[str]:
    """Stems of the words that make a statement clinical: the list above, and one-word names of ``CONCEPTS``."""
    names = (name for row in CONCEPTS for name in row if " " not in name)
    everyday = {stem(word) for word in _EVERYDAY}
    return frozenset(stem(word) for text in (_CLINICAL, *names) for word in words(text)) - everyday


# names of concepts that people also use of other things
_EVERYDAY = (
    "start began begin onset duration worse better ease scale job trip fit severity trigger travel family mother "
    "father mum  mom dad parents siblings memory hearing worry stress stressed remember abroad relatives coronary "
    "sad spread motions supplements exercise "
).split()


def is_clinical(word: str) -> bool:
    """Whether a word makes a patient's statement a clinical one."""
    lower = word.lower()
    return stem(lower) in clinical_stems() or (
        _DRUG_OR_DISEASE.fullmatch(lower) is not None and lower not in _NOT_DISEASE
    )
