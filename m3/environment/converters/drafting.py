"""From a source's sentences to a case: facts, what asks for them, age and sex, the code of a label, the split.

Nothing here invents: a fact is a sentence of the source (a list of denied symptoms is taken apart), the code of a
diagnosis is one whose description or inclusion term has the same words, or none, and what a source does not say is
"unknown", null or absent. The rules, all ours:

- *keys* (what asks for a fact): each content word that no other fact of the case has; then pairs of the words that it
  shares, where at most one other fact has both; where it has neither, all its words together. A fact with a duration
  has "how long" as well, the demographic one "how old".
- *topics*: by section ("medical history", "medicines", "family", ...), for open questions.
- *polarity*: absent where an odd number of negations stands in the sentence, or "nor"; what follows "without" or
  "with no" after something else is not counted.
- *split*: by what every rewording of a vignette keeps: age, sex and the words of the diagnosis. So a vignette that two
  data sets share has one split, and all cases of one condition without age and sex are on one side.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from m3.environment import icd10
from m3.environment.case import SCHEMA, Case, Disclosure
from m3.environment.converters.loss import Tally
from m3.environment.lay_terms import FUNCTION_WORDS
from m3.rewards import diagnosis
from m3.text.words import NEGATIONS, STOP_WORDS, content_stems, is_negated, sentences, stem, words

HELD_OUT = 0.2  # share of the vignettes that are held out; ours
LEVEL_POINTS = {2: 6, 1: 3}  # points of an item that a source grades but does not weigh; ours
MAX_KEYS = 8  # of one fact; ours
MAX_HOLDERS = 2  # facts of a case that two words together may ask for; ours
EXACT = 0.999  # icd10.find scores 1 where the words are the same
_TOPICS = {
    "HPI": ("symptoms",),
    "ROS": ("symptoms",),
    "PMH": ("medical history", "past history", "health problems"),
    "DH": ("medications", "medicines", "tablets"),
    "FH": ("family",),
    "SH": ("lifestyle", "social history", "habits"),
    "OB": ("pregnancies", "periods"),
}
_SAYS_NOTHING = re.compile(
    r"(?:(?:no|not|none|nil|n/?a)\b[^.]*\b(?:provided|available|applicable|specified|stated)|"
    r"no additional symptoms(?: \w+)?|information not provided|not mentioned|n/?a|unknown|none)\W*",
    re.IGNORECASE,
)
_NUMBERED = re.compile(r"^\s*\d+[.)]\s*")
_DENIALS = re.compile(
    r"^(?P<who>(?:the )?(?:patient|man|woman|boy|girl|he|she|they)?\s*(?:also\s+)?(?:denies|denied|has no|reports no|"
    r"had no|no|denies any|denied any|does not have|no history of))\s+(?P<what>[^.;]+?)(?P<stop>\.?)$",
    re.IGNORECASE,
)
_JOINT = re.compile(r",\s*(?:and|or|nor)\s+|,\s*|\s+(?:or|nor)\s+")
_STANDS_ALONE = re.compile(  # a symptom that means the same outside its list; not "skin" of "no skin or nail changes"
    r"(?:and |or )?(?!(?:recent|new|prior|previous|significant|other)\b)(?:any )?(?:[a-z]+ )?(?:fevers?|chills|cough|"
    r"nausea|vomiting|diarrh(?:o)?ea|constipation|headaches?|dizziness|rash(?:es)?|itching|dysuria|h(?:a)?ematuria|"
    r"fatigue|dyspn(?:o)?ea|palpitations|pain|sweats|weight loss|weight gain|swelling|bleeding|discharge|"
    r"shortness of breath|trauma|seizures?|numbness|tingling|weakness|wheezing|hemoptysis|syncope|travel|"
    r"alcohol(?: use)?|drug use|smoking)",
    re.IGNORECASE,
)
_DURATION = re.compile(
    r"\b(?:ago|since|(?:for|past|last|over) (?:the )?(?:past |last )?"
    r"(?:\d+|a|an|one|two|three|four|five|six|several|few)[\s-](?:\w+ )?(?:hours?|days?|weeks?|months?|years?)|"
    r"\d+[\s-](?:hour|day|week|month|year)s? history)\b",
    re.IGNORECASE,
)
_AGE = re.compile(r"\b(\d+(?:\.\d+)?)[\s-]*(year|month|week|day)s?(?:[\s-]*old)", re.IGNORECASE)
_UNITS = {"year": 1.0, "month": 12.0, "week": 52.18, "day": 365.25}
_NEWBORN = re.compile(r"\b(?:newborn|neonate)\b", re.IGNORECASE)
_SEX = (
    (re.compile(r"\b(?:woman|female|girl|lady)\b|\b(?:man|male|boy|gentleman)\b", re.IGNORECASE)),
    (re.compile(r"\b(?:she|her)\b|\b(?:he|his|him)\b", re.IGNORECASE)),
)
_FEMALE = re.compile(r"woman|female|girl|lady|she|her", re.IGNORECASE)
_GENERIC = frozenset(
    stem(word)
    for word in (
        "patient patients presents presented presenting presentation reports reported reporting complains "
        "complained complaint complaints denies denied history physical examination exam symptom symptoms "
        "symptomatic past medical significant noted notes notable found finding findings shows showed revealed "
        "reveals appears appeared describes described states stated associated additional additionally including "
        "includes included due likely possible man woman boy girl male female old year years month months week "
        "weeks day days hour hours minute minutes time times one two three four five six seven eight nine ten "
        "first second third several multiple previous previously recent recently currently current new onset last "
        "since ago during after before while because without within around approximately about normal limits "
        "physician doctor clinic hospital department emergency brought comes came come visit evaluation mother's "
        "father's began begin begins started start starts developed develop felt feel feels feeling measured "
        "located caused cause noticed notice became become using used use uses taking take takes took even much "
        "usual usually resulting otherwise made make makes seen see yes no either related especially presence mg ml "
        "mm cm kg lb hg min bpm c f l dl g"
    ).split()
)
_SECTIONS = (
    ("demographic", re.compile(r"\b\d+[\s-](?:year|month|week|day)s?[\s-]old\b", re.IGNORECASE)),
    (
        "exam",
        re.compile(
            r"\b(?:CT|MRI|ECG|EKG|ESR|CBC|PSA|TSH)\b|\b(?i:examination|on exam|temperature|pulse|blood pressure|"
            r"respirations?|respiratory rate|heart rate|vital signs|auscultation|palpation|percussion|mm ?Hg|"
            r"oxygen saturation|biops\w+|histolog\w+|"
            r"histopatholog\w+|cultures?|serum|urinalysis|laborator\w+|lab|blood work|x-?rays?|"
            r"radiograph\w*|ultraso\w+|echocardiogra\w+|h(?:a)?emoglobin|h(?:a)?ematocrit|sedimentation|leukocyt\w+|"
            r"platelets?|shows|showed|reveal\w*|stain\w*|percentile|microscop\w+|dermoscop\w+|mg/dL|mEq/L|inspection|"
            r"well[- ]demarcated|nontender|blood cell)\b"
        ),
    ),
    (
        "FH",
        re.compile(
            r"\bfamily history\b|\b(?:father|mother|brother|sister|parents?|siblings?|grandmother|grandfather|aunt|"
            r"uncle|cousin)\b.{0,30}\b(?:had|has|died|diagnosed|history|suffers|similar)\b",
            re.IGNORECASE,
        ),
    ),
    (
        "DH",
        re.compile(
            r"\b(?:medications?|medicines?|takes|taking|prescribed|over-the-counter|mg|antibiotics?|steroids?|drug "
            r"allerg\w+|contraceptives?)\b",
            re.IGNORECASE,
        ),
    ),
    (
        "SH",
        re.compile(
            r"\b(?:smok\w+|cigarettes?|tobacco|alcohol|drinks|illicit|recreational|sexually|sexual partners?|works as|"
            r"occupation|lives (?:with|in|alone)|travel\w*|student|retired|married|pets?)\b",
            re.IGNORECASE,
        ),
    ),
    (
        "PMH",
        re.compile(
            r"\b(?:medical history|history of|diagnosed with|surger(?:y|ies)|surgical|hospitali[sz]\w+|"
            r"otherwise healthy|previously healthy|immuni[sz]ations?|vaccin\w+|allerg\w+|born|delivered)\b",
            re.IGNORECASE,
        ),
    ),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Draft:
    """A fact before it has an id. ``lay_text``: the patient's words, if the source has them."""

    text: str
    section: str
    disclosure: Disclosure = Disclosure.on_ask
    polarity: str = ""  # "": by negation
    lay_text: str = ""
    id: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mapped:
    """A label's code, or None and why."""

    code: str | None
    note: str
    confidence: float | None = None


def says_nothing(text: str) -> bool:
    """Whether a text only says that nothing is known ("Information not provided.")."""
    return not text.strip() or _SAYS_NOTHING.fullmatch(text.strip()) is not None


def atomic(text: str) -> list[str]:
    """Sentences of a text; a list of denials ("Denies fever, cough, or travel.") one by one, each a denial."""
    found = []
    for sentence in sentences(text):
        match = _DENIALS.match(sentence)
        parts = [part for part in _JOINT.split(match["what"]) if part.strip()] if match else []
        simple = len(parts) > 1 and all(_STANDS_ALONE.fullmatch(part.strip()) for part in parts)
        if match and simple:
            found += [f"{match['who']} {part.strip()}{match['stop']}" for part in parts]
        else:
            found.append(sentence)
    return found


def unnumbered(facts: Iterable[str]) -> list[str]:
    """Numbered atomic facts without their numbers, none empty."""
    return [text for fact in facts if (text := _NUMBERED.sub("", fact).strip())]


def polarity_of(text: str) -> str:
    """present or absent (module docstring)."""
    head = re.split(r"\b(?:without|with no|but not?|and no)\b", text, maxsplit=1)[0]
    told = head if _askable(head) else text
    return "absent" if is_negated(told) or re.search(r"\bn(?:eithe|o)r\b", told.lower()) else "present"


def section_of(text: str) -> str:
    """The section of a sentence of a vignette, by its words; HPI where none tells."""
    return next((section for section, pattern in _SECTIONS if pattern.search(text)), "HPI")


def age_and_sex(text: str) -> tuple[float | None, str]:
    """(years, sex) that a text says of its patient at first; (None, "unknown") where it does not."""
    match = _AGE.search(text)
    years = None
    if match:
        years = round(float(match[1]) / _UNITS[match[2].lower()], 3)
        if years > 130:
            years = None
    elif _NEWBORN.search(text):
        years = 0.0
    for pattern in _SEX:
        if found := pattern.search(text):
            return years, "female" if _FEMALE.fullmatch(found[0]) else "male"
    return years, "unknown"


@functools.lru_cache(maxsize=4096)
def code_of(label: str) -> Mapped:
    """The ICD-10-CM code one of whose description or inclusion terms has the words of a label and no others."""
    expanded = " ".join(word.replace("_", " ") for word in diagnosis.words_of(label))  # "UTI" has words too
    tries = dict.fromkeys((label, re.sub(r"\s*[(\[][^)\]]*[)\]]", "", label), expanded))
    tree = icd10.tree()
    for text in tries:
        best = [one for one in tree.find(text, 3) if one.score >= EXACT and _names(one)] if text.strip() else []
        if not best:
            continue
        first = best[0]
        apart = [one.code for one in best[1:] if first.code not in tree.ancestors(one.code)]
        if apart:
            return Mapped(code=None, note=f"several codes have these words: {first.code}, {', '.join(apart)}")
        return Mapped(code=first.code, note=f"mapped_by: the words of {first.phrase!r}", confidence=first.score)
    return Mapped(code=None, note="no code has the words of the label")


def _names(found: icd10.Found) -> bool:
    """Whether a phrase names its entry; an includes note of a category can name a part of another thing as well."""
    tree = icd10.tree()
    return tree.level(found.code) == "code" or found.phrase == tree.describe(found.code)


def split_of(*, age: float | None, sex: str, label: str) -> str:
    """train or held_out, by what every rewording of a vignette keeps (module docstring)."""
    key = f"{age}|{sex}|{' '.join(sorted(set(content_stems(label))))}"
    return "held_out" if int(digest(key), 16) / 16**12 < HELD_OUT else "train"


def digest(*parts: str) -> str:
    """Twelve hexadecimal digits of the words of some texts: the same for another spacing, case or punctuation."""
    plain = "|".join(" ".join(words(part.lower())) for part in parts)
    return hashlib.sha256(plain.encode()).hexdigest()[:12]


def slug(name: str, taken: Iterable[str] = ()) -> str:
    """An id from a name: letters, digits and hyphens; numbered where it is taken."""
    plain = "-".join(re.findall(r"[a-z0-9]+", name.lower()))[:60] or "x"
    used = set(taken)
    return next(one for n in itertools.count(1) if (one := plain if n == 1 else f"{plain}-{n}") not in used)


def _askable(text: str) -> dict[str, str]:
    """The words of a fact that can ask for it, by stem, in order."""
    found: dict[str, str] = {}
    for word in words(text.lower()):
        one = stem(word)
        if word in STOP_WORDS or word in NEGATIONS or one in FUNCTION_WORDS or one in _GENERIC or len(word) < 3:
            continue
        if word[0].isalpha():
            found.setdefault(one, word)
    return found


def keys_of(texts: Sequence[str]) -> list[list[str]]:
    """The keys of each fact of a case (module docstring); [] for one without any content word."""
    every = [_askable(text) for text in texts]
    holders: dict[str, set[int]] = collections.defaultdict(set)
    for i, found in enumerate(every):
        for one in found:
            holders[one].add(i)
    keys: list[list[str]] = []
    for found in every:
        own = [word for one, word in found.items() if len(holders[one]) == 1]
        shared = [one for one in found if len(holders[one]) > 1][:6]
        pairs = [(len(holders[a] & holders[b]), f"{found[a]} {found[b]}") for a, b in itertools.combinations(shared, 2)]
        rare = [pair for held, pair in sorted(pairs, key=lambda pair: pair[0]) if held <= MAX_HOLDERS]
        keys.append(([*own, *rare] or ([" ".join(found.values())] if found else []))[:MAX_KEYS])
    return keys


def facts_of(drafts: Iterable[Draft], tally: Tally) -> list[dict[str, Any]]:
    """Facts of a case: those that say something, each wording once, with ids, keys and topics."""
    kept: dict[str, Draft] = {}
    for draft in drafts:
        if says_nothing(draft.text):
            tally.dropped["(sentences that say that nothing is known)"] += 1
        elif (same := digest(draft.text)) in kept:
            tally.dropped["(sentences that say the same again)"] += 1
        else:
            kept[same] = draft
    rows: list[dict[str, Any]] = []
    for n, (draft, keys) in enumerate(zip(kept.values(), keys_of([one.text for one in kept.values()]), strict=True), 1):
        polarity = draft.polarity or polarity_of(draft.text)
        if draft.section == "demographic":
            keys = ["how old", "age", *keys]
        elif draft.section != "exam" and polarity == "present" and _DURATION.search(draft.text):
            keys = ["how long", *keys]
        told = draft.disclosure if draft.section != "exam" else Disclosure.on_specific_ask
        row: dict[str, Any] = {
            "id": draft.id or f"f{n}",
            "text": draft.text,
            "section": draft.section,
            "polarity": polarity,
            "disclosure": str(told),
            "keys": list(dict.fromkeys(keys)),
        }
        if draft.lay_text:
            row["lay_text"] = draft.lay_text
        if topics := _TOPICS.get(draft.section):
            row["keywords"] = list(topics)
        rows.append(row)
    return rows


def told_by(opening: str, facts: Sequence[Mapping[str, Any]], share: float = 0.8) -> list[str]:
    """Ids of facts, none of an examination, whose words stand in an opening line, but for a few (``share``)."""
    said = set(content_stems(opening))
    found = []
    for fact in facts:
        stems = set(content_stems(fact["text"])) - _GENERIC
        if fact["section"] != "exam" and stems and len(stems & said) >= share * len(stems):
            found.append(fact["id"])
    return found


def case_row(
    *,
    id: str,
    dataset: str,
    row: str,
    licence: str,
    synthetic: bool,
    complaint: str,
    opening_facts: Sequence[str],
    age: float | None,
    sex: str,
    facts: list[dict[str, Any]],
    label: str,
    mapped: Mapped,
    provenance: Mapping[str, Mapping[str, Any]],
    tally: Tally,
    department: str = "other",
    checklist: Sequence[Mapping[str, Any]] = (),
    exams: Sequence[Mapping[str, Any]] = (),
    more_diagnosis: Mapping[str, Any] | None = None,
) -> Case:
    """A case from its parts, validated; what no converted source says is filled in and counted.

    The opening line is the complaint as the source words it; ``opening_facts``: ids of the facts that it tells.
    """
    authors: dict[str, Mapping[str, Any]] = {
        "*": {"author": "rule", "note": f"converted from {dataset} by rule"},
        "diagnosis.icd10cm": {"author": "rule", "confidence": mapped.confidence, "note": mapped.note},
        **provenance,
    }
    for name, entry in authors.items():
        tally.provenance[f"{name} ({entry['author']})"] += 1
    for name, value, unset in (
        ("department", department, "other"),
        ("profile.age", age, None),
        ("profile.sex", sex, "unknown"),
        ("diagnosis.icd10cm", mapped.code, None),
    ):
        if value == unset:
            tally.defaults[f"{name}: {'null' if unset is None else unset}"] += 1
    tally.defaults["safety.must_escalate: null"] += 1
    tally.defaults["facts.disclosure: on_ask, but for the opening"] += len(facts)
    if not checklist:
        tally.defaults["checklist: empty"] += 1
    if not exams:
        tally.defaults["exams: empty"] += 1
    told = [fact["text"] for fact in facts if fact["section"] != "exam"]
    if any(re.search(rf"\b{re.escape(label.lower())}\b", text.lower()) for text in told):
        tally.warnings["the patient's own facts name the diagnosis"] += 1
    return Case.from_json(
        {
            "schema": SCHEMA,
            "id": id,
            "version": 1,
            "synthetic": synthetic,
            "lang": "en",
            "split": split_of(age=age, sex=sex, label=label),
            "department": department,
            "source": {"dataset": dataset, "row": row, "licence": licence},
            "presentation": {"chief_complaint": complaint, "opening_line": complaint, "facts": list(opening_facts)},
            "profile": {"age": age, "sex": sex},
            "facts": facts,
            "checklist": list(checklist),
            "exams": list(exams),
            "diagnosis": {"icd10cm": mapped.code, "label": label, **(more_diagnosis or {})},
            "safety": {"must_escalate": None},
            "provenance": authors,
        }
    )
