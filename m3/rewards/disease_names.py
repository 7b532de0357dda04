"""Names of diseases as words: spelling levelled, names of one disease turned into one, words that tell nothing.

The table of names is m3/data/diagnosis_names.txt.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from m3.text.words import stem

NAMES = Path(__file__).parent.parent / "data" / "diagnosis_names.txt"

_SPELLINGS = (
    *(("haem", "hem"), ("aemia", "emia"), ("oedema", "edema"), ("oeso", "eso"), ("oestr", "estr"), ("coeli", "celi")),
    *(("foet", "fet"), ("tumour", "tumor"), ("diarrhoea", "diarrhea"), ("rrhoe", "rrhe"), ("naev", "nev")),
    *(("leuco", "leuko"), ("paed", "ped"), ("orrhoeic", "orrheic"), ("ise ", "ize "), ("ised ", "ized ")),
    *(("aeti", "eti"), ("caec", "cec"), ("faec", "fec"), ("anaes", "anes"), ("gynaec", "gynec"), ("chilae", "chile")),
)
_GREEK = str.maketrans({"\N{GREEK SMALL LETTER ALPHA}": "alpha ", "\N{GREEK SMALL LETTER BETA}": "beta "})
_LEVELLED = {
    key: value
    for value, keys in {
        "1": "i one",
        "2": "ii two",
        "3": "iii",
        "4": "iv",
        "cancer": "carcinoma carcinomas malignancy malignancies",
    }.items()
    for key in keys.split()
}


def stem_of(word: str) -> str:
    """The stem of a lower-case word; Greek and Latin plurals are singular, and an inflammation is not its organ.

    "Endometritis" is no "endometrial" disease, so words in -itis are kept whole.
    """
    word = _LEVELLED.get(word, word)
    word = re.sub(r"(?<=[a-z]{3})oses$", "osis", word)
    word = re.sub(r"(?<=[a-z]{2})omata$", "oma", word)
    return word if word.endswith("itis") else stem(word)


# words that add nothing to which disease it is
QUALIFIERS = frozenset(
    stem_of(word)
    for word in (
        "a an the of in on at to by for from with and et or as is be type disease diseases syndrome disorder"
        " condition complex illness case severe mild moderate early late classic classical typical atypical"
        " simple common new onset recurrent persistent unspecified idiopathic likely probable possible"
        " suspected presumed advanced stage grade left right bilateral unilateral localized generalized"
        " widespread diffuse multiple single solitary isolated extensive induced related associated caused due"
        " secondary primary acute chronic subacute exacerbation flare episode attack uncomplicated complicated"
        " adult childhood patient skin cutaneous lesion his her your nos"
    ).split()
)
OPPOSITES = tuple(
    frozenset(stem_of(word) for word in pair.split())
    for pair in (
        *("acute chronic", "benign malignant", "left right", "primary secondary", "viral bacterial", "1 2"),
        *("advanced delayed", "anterior posterior", "central nephrogenic", "congenital acquired", "direct indirect"),
        *("hereditary acquired", "internal external", "major minor", "open closed", "superior inferior", "upper lower"),
        *("stable unstable", "systolic diastolic", "thin thick", "wet dry"),
    )
)
# Words that name a kind of finding or of tissue, not one disease: alone they are no broader name of anything.
GENERIC = frozenset(
    stem_of(word)
    for word in (
        "dermatitis eczema rash eruption dermatosis erythema infection inflammation inflammatory lesion tumor"
        " cancer carcinoma neoplasm malignancy adenoma sarcoma lymphoma leukemia anemia cyst nevus keratosis"
        " papule plaque nodule ulcer wart benign malignant pigmented pigmentation hyperpigmentation"
        " hypopigmentation discoloration alopecia hair loss pruritus itch arthritis pain ache fever cough"
        " headache vertigo dizziness diarrhea vomiting constipation bleeding hemorrhage hematoma fracture"
        " injury trauma tear sprain edema swelling effusion abscess bacterial viral fungal parasitic allergic"
        " allergy reaction hypersensitivity autoimmune vasculitis vasculopathy purpura thrombosis embolism"
        " failure insufficiency deficiency obstruction stenosis perforation hernia rupture pneumonia colitis"
        " hepatitis nephritis gastritis meningitis encephalitis neuropathy myopathy cardiomyopathy"
        " encephalopathy cardiac heart myocardial coronary pulmonary lung respiratory renal kidney hepatic"
        " liver gastric stomach intestinal bowel colon cerebral brain spinal breast prostate thyroid adrenal"
        " ovarian uterine cervical testicular bladder urinary bone joint muscle nerve eye ear nose throat oral"
        " mouth nail scalp foot hand face facial back neck chest abdominal pityriasis lichen tinea systemic"
        " granuloma sclerosis amyloidosis drug medication poisoning toxicity overdose depression anxiety"
        " psychosis dementia seizure stroke shock sepsis diabetes mellitus hypertension hypotension emergency"
        " crisis hyperplasia atrophy dystrophy dysplasia hemangioma angioma fibroma pemphigus pemphigoid acne"
        " porphyria mucositis folliculitis panniculitis gastroenteritis hypertensive syndrome inversion nipple"
        " positional paroxysmal photosensitivity melanotic macular acral papulosa nigra venous arterial"
        " vascular viral tract atrophic atrophicus serous mucous fluid blood cell basal squamous elastolysis"
        " emotional stress traumatic major minor lump growth spot bump mass mole finding syncope amnesia ataxia"
        " angioedema jaundice cholestasis neutropenia thrombocytopenia leukopenia pregnancy insomnia palpitations"
        " hematuria proteinuria tachycardia bradycardia arrhythmia dyspnea hypoxia paralysis weakness tremor"
        " hallucination fatigue spasm necrosis ischemia grief goiter disturbance dysfunction vestibular"
    ).split()
)


def _plain(text: str) -> list[str]:
    text = unicodedata.normalize("NFKD", text.lower().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'").translate(_GREEK))
    text = "".join(character for character in text if not unicodedata.combining(character)) + " "
    text = re.sub(r"(?<=\w)'s?\b", "", text)
    for british, american in _SPELLINGS:
        text = text.replace(british, american)
    return [stem_of(word) for word in re.findall(r"[a-z]+|\d+", text)]


def _lines() -> list[tuple[str, tuple[str, ...]]]:
    """(the name all others are turned into, the others) of each line of the table."""
    text = NAMES.read_text(encoding="utf-8")
    lines = (line.split(" = ") for line in text.splitlines() if line.strip() and line[0] != "#")
    return [(own.strip(), tuple(other.strip() for other in others.split(";"))) for own, others in lines]


@functools.cache
def _names() -> dict[str, tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]]:
    """By a name's first stem: (stems of a name, stems of the one it is turned into), longest first."""
    found: dict[str, list[tuple[tuple[str, ...], tuple[str, ...]]]] = {}
    for own, others in _lines():
        turned = (own,) if "_" in own else tuple(_plain(own))
        for other in (own.replace("_", " "), *others):
            name = tuple(_plain(other))
            found.setdefault(name[0], []).append((name, turned))
    return {first: tuple(sorted(names, key=lambda pair: -len(pair[0]))) for first, names in found.items()}


@functools.cache
def synonyms() -> dict[tuple[str, ...], tuple[str, ...]]:
    """By the words that a name is turned into: all names of the disease, as written."""
    found: dict[tuple[str, ...], tuple[str, ...]] = {}
    for own, others in _lines():
        names = (own.replace("_", " "), *others)
        found[words_of(names[0])] = tuple(name for name in names if len(name) > 5)
    return found


def is_generic(word: str) -> bool:
    """Whether a stem names a finding, a tissue or an inflammation of one, and not one disease."""
    return word in GENERIC or word.endswith("itis")


@functools.lru_cache(maxsize=65536)
def words_of(label: str) -> tuple[str, ...]:
    """Stems of a label in order, spelling levelled, each known name turned into the one that stands for it."""
    plain = _plain(label)
    names = _names()
    turned: list[str] = []
    i = 0
    while i < len(plain):
        for name, other in names.get(plain[i], ()):
            if tuple(plain[i : i + len(name)]) == name:
                turned.extend(other)
                i += len(name)
                break
        else:
            turned.append(plain[i])
            i += 1
    return tuple(turned)


def core(words: Sequence[str]) -> frozenset[str]:
    """The words that tell which disease; all of them where only qualifiers are left."""
    return frozenset(word for word in words if word not in QUALIFIERS) or frozenset(words)


@functools.lru_cache(maxsize=65536)
def same_word(one: str, other: str, letters: int) -> bool:
    """Equal, or of at least so many letters, of one beginning, and one slip apart: a letter more, other or swapped."""
    if one == other:
        return True
    if "_" in one or "_" in other:  # a name, not as it was written
        return False
    short, long = sorted((one, other), key=len)
    if len(short) < letters or len(long) - len(short) > 1 or short[:2] != long[:2]:
        return False
    at = next((i for i, (a, b) in enumerate(zip(short, long, strict=False)) if a != b), len(short))
    if len(short) < len(long):
        return short[at:] == long[at + 1 :]
    return short[at + 1 :] == long[at + 1 :] or (
        short[at + 2 :] == long[at + 2 :] and short[at : at + 2] == long[at : at + 2][::-1]
    )
