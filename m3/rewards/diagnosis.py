"""The reward of a diagnosis: what an answer names, whether it is the reference's disease, and how near in ICD-10-CM.

Two scores that are told apart. ``correct`` is lexical: an answer's label and the reference's are the same disease by
their words, after abbreviations, synonyms (m3/data/diagnosis_names.txt), spelling and qualifiers are levelled. The
hierarchical credit is that of the lowest common ancestor in ICD-10-CM (m3/environment/icd10.py). Source of the second:
ScanBench's third station, Baichuan-M3, arXiv 2602.06570: a leaf match is rewarded, a prediction off the branch is
penalised; no numbers are given.

How words decide, in this order: ``same``: equal sets of words; ``narrower``: the answer holds all words of the
reference within a short window ("oral lichen planus" for "lichen planus"); ``broader``: the answer's words are part of
the reference's and one of them names a disease by itself ("melanoma" for "acral lentiginous melanoma", never
"dermatitis" for "contact dermatitis"). An answer that leaves open which of several diseases it is ("A or B") is correct
only if each of them would be. A list is no diagnosis: beyond so many labels an answer is not correct, its credit is
shared among all it names, and a label of many words that no comma parts is not narrower.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import itertools
import math
import re
from collections.abc import Sequence

from m3.environment import icd10
from m3.environment.case import Case, CodedLabel
from m3.rewards.disease_names import (
    GENERIC,
    OPPOSITES,
    core,
    is_generic,
    same_word,
    stem_of,
    synonyms,
    words_of,
)
from m3kernels.checks import refuse


class Reading(enum.StrEnum):
    """What became of an answer's text."""

    decided = "decided"  # one disease, or several that are all claimed
    undecided = "undecided"  # alternatives: "A or B"
    ranked = "ranked"  # a numbered list, most likely first
    absent = "absent"  # the text names no diagnosis: empty, a question, a refusal


@dataclasses.dataclass(frozen=True, kw_only=True)
class Label:
    """One disease that an answer names. ``aside``: other names, in brackets; ``codes``: of ICD-10-CM, if given."""

    text: str
    hedged: bool = False
    aside: tuple[str, ...] = ()
    codes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """What a text claims. ``statement``: the words that name the diagnosis, without reasons and advice."""

    reading: Reading
    statement: str = ""
    labels: tuple[Label, ...] = ()

    @property
    def codes(self) -> tuple[str, ...]:
        """Codes written in the answer, in order."""
        return tuple(dict.fromkeys(code for label in self.labels for code in label.codes))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reference:
    """What an answer is held against; of a case, ``reference_of``. ``code`` None: no hierarchical score."""

    label: str
    synonyms: tuple[str, ...] = ()
    code: str | None = None
    acceptable: tuple[CodedLabel, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Numbers of the scores; the paper gives none, all are ours."""

    credits: icd10.Credits = dataclasses.field(default_factory=icd10.Credits)
    listed: int = 3  # labels of an answer that count, ranked or claimed together; more buy nothing
    claimed: int = 8  # labels from which an answer is a list of diseases, not one with its complications
    asides: int = 2  # names in brackets that count, as other names of the first label
    further: int = 8  # words that a narrower label may have beyond the reference's
    accept_broader: bool = True
    spelling: int = 7  # letters from which a word may be misspelt by one letter, or two changed places
    window: int = 3  # words that may stand between those of the reference in an answer
    found: float = 0.6  # least score of a code that is looked up for a label; below it the label has no code
    absent: float = 0.0  # credit of an answer that names no diagnosis

    def __post_init__(self) -> None:
        if self.listed < 1:
            raise refuse("diagnosis.Config", "listed", "a number >= 1", self.listed)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiagnosisScore:
    """``credit`` in [off_branch, 1], None where the reference has no code. ``code``: the answer's.

    ``correct`` and ``rule`` are lexical (module docstring); ``matched`` is the name of the reference that was met.
    ``source``: "label" (the label is the reference's, so its code is), "written", "looked up", or "none" (no entry of
    ICD-10-CM has the label's words: scored off the branch, since the label is not the reference's either).
    """

    reading: Reading
    correct: bool
    rule: str  # same, narrower, broader, none
    matched: str = ""
    acceptable: float = 0.0  # credit of the acceptable alternative that was met, lexically; 1 where correct
    code: str | None = None
    source: str = "none"
    levels: icd10.Match | None = None
    credit: float | None = None


def reference_of(case: Case) -> Reference:
    """The reference of a case."""
    found = case.diagnosis
    return Reference(label=found.label, synonyms=found.synonyms, code=found.icd10cm, acceptable=found.acceptable)


# -- reading ----------------------------------------------------------------------------------------------------------
_DECORATION = re.compile(r"[*_#`\"\N{LEFT DOUBLE QUOTATION MARK}\N{RIGHT DOUBLE QUOTATION MARK}]+")
_VERB = r"(?:\s+(?:is|are|was|would be|could be|may be|appears to be|seems to be|remains|includes?|of))*"
_MARKERS = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        rf"\bfinal\s+diagnos[ie]s(?:\s*\([^)]*\))?{_VERB}\s*[:\-\N{{EN DASH}}]*\s*",
        r"\b(?:most likely|most probable|primary|principal|leading|working|provisional|definitive|presumptive|likely"
        rf"|probable|main|clinical)\s+(?:\w+\s+)?diagnos[ie]s{_VERB}\s*[:\-\N{{EN DASH}}]*\s*",
        rf"\b(?:differential\s+)?diagnos[ie]s\s*(?:{_VERB}\s*:|\s(?:is|are|of|would be)\b)\s*",
        r"\b(?:impression|assessment|conclusion)\s*:\s*",
        r"\b(?:consistent with|suggestive of|indicative of|diagnosed with|suggests?|points? to|suffering from"
        r"|you (?:most likely |likely |probably |may |might )?have|(?:this|it) is (?:most likely|likely|probably))\s+",
    )
)
_ABSENT = re.compile(
    r"^\W*(?:none|n/?a|unknown|undetermined|unclear|no (?:final )?diagnosis\b.*"
    r"|(?:i (?:am|'m) )?(?:unable|not able) to .*"
    r"|(?:i )?can(?:no|')t .*|(?:i )?cannot .*|(?:i )?do(?: not|n't) know.*|(?:further|more|additional) \w+ .*"
    r"|insufficient .*|not enough .*|(?:please )?(?:see|consult|visit) (?:a|an|your) .*"
    r"|(?:it is |it's )?(?:not possible|impossible|difficult) to .*|cannot be .*|pending .*)$",
    re.IGNORECASE,
)
_CLAUSE = re.compile(
    r"\b(?:based on|because|given (?:the|his|her|your|that)|as evidenced|as suggested|as indicated"
    r"|which|that (?:is|are|has)"
    r"|(?:this|it|these) (?:is|are|could|may|should|would|diagnos)|however|although|but\b"
    r"|i (?:would|recommend|suggest|advise)"
    r"|please|further (?:\w+ )?(?:evaluation|investigation|test|assessment|examination|work)|needs?\b|requir(?:es|ing)"
    r"|until|pending|confirm (?:with|by)|to be confirmed|for (?:confirmation|an? \d)|rather than|instead of"
    r"|and not|not\b|rule(?:d)? out"
    r"|unlikely|without evidence|no evidence|note:|treatment|recommend)",
    re.IGNORECASE,
)
_CAUSE = re.compile(
    r"\b(?:(?:likely|possibly|probably|potentially|most likely) )?(?:due to|secondary to|caused by|resulting from"
    r"|related to"
    r"|exacerbated|aggravated|triggered by|induced by|such as|including|in the (?:setting|context)"
    r"|following|after\b|from\b"
    r"|e\.g|i\.e|progressing to|in (?:an?|the) )",
    re.IGNORECASE,
)
_CAUSE_OF_REFERENCE = re.compile(
    r"\b(?:due to|secondary to|caused by|associated with|in the setting of)", re.IGNORECASE
)
_CAUSES = 6  # ours: alternatives from which an answer leaves open the disease, not only its cause
_EXAMPLE = re.compile(r"\b(?:such as|including|for example|e\.g)", re.IGNORECASE)
_HEDGE = re.compile(
    r"\b(?:possible|possibly|potential|potentially|suspected|suspicious|suspicion of|may(?:be)?|might|could be|can be"
    r"|suggestive of|query|concern for|possibility of)\b",
    re.IGNORECASE,
)
_ALTERNATIVE = re.compile(r"\s+(?:or|vs\.?|versus|and/or|/)\s+|\s*/\s*|\beither\b|\bor\s+", re.IGNORECASE)
_JOINT = re.compile(
    r"\s*[,;:]\s*|\s+(?:and|with|plus|along with|as well as|complicated by|associated with|superimposed on|on top of"
    r"|in addition to)\s+|\s+[&+\N{EM DASH}\N{EN DASH}-]\s+",
    re.IGNORECASE,
)
_LISTED = re.compile(r"(?:^|\n|(?<=[:.;,)\s]))\s*\d{1,2}[.)]\s+(?=\S)|(?:^|\n)\s*[-\N{BULLET}]\s+(?=\S)")
_BRACKETS = re.compile(r"[(\[]([^()\[\]]*)[)\]]")
_EXAMINATION = re.compile(
    r"(?:scop(?:y|ies)|biops(?:y|ies)|\bspirometry|ography|\bMRI|\bCT|\bscans?|ultrasound|\bx-?rays?|\btit(?:er|re)s?|\bassays?"
    r"|\bpanel|\bcounts?|\bcultures?|\bpuncture|\btests?|\btesting|\bstudies|\bimaging)(?:\s+(?:of|for|to|with)\b.*)?$",
    re.IGNORECASE,
)
_REMARK = re.compile(
    r"^\W*(?:note|based|if|due|because|this|the|for|further|as|since|it|please|pending|given|which)\b", re.I
)
_SENTENCE_END = re.compile(r"(?<!\b[A-Za-z])(?<!\b[Ss]t)(?<!\bvs)[.!](?=\s|$)|\n")


@functools.lru_cache(maxsize=16384)
def read_answer(text: str) -> Answer:
    """What a physician's last words claim: the statement after "Final diagnosis:" or what stands for it.

    Reasons, advice and notes are left out; so is a second disease that is only a possibility beside the first.
    """
    plain = _DECORATION.sub(" ", text).replace("\N{RIGHT SINGLE QUOTATION MARK}", "'").strip()
    said = _statements(plain)
    if not said:
        return Answer(reading=Reading.absent)
    listed = [part.strip() for part in _LISTED.split(said[0]) if part.strip()] if _LISTED.search(said[0]) else []
    if len(listed) > 1 or (listed and re.match(r"\s*(?:\d{1,2}[.)]|[-\N{BULLET}])\s", said[0])):
        labels = [label for part in listed if (label := _first_label(part)) is not None]
        return Answer(reading=Reading.ranked, statement=said[0], labels=tuple(labels)) if labels else _nothing()
    statements = [_statement(one) for one in said]
    kept = " or ".join(dict.fromkeys(one for one in statements if one))
    main = _before(_CAUSE, _BRACKETS.sub(" ", kept)) if _name_before(_CAUSE, kept) else _BRACKETS.sub(" ", kept)
    alternatives = [part for part in _ALTERNATIVE.split(main) if part.strip(" ,.;")]
    if len(_ALTERNATIVE.split(kept)) > _CAUSES:
        alternatives = _ALTERNATIVE.split(kept)
    if len(alternatives) > 1:
        labels = [Label(text=" ".join(_HEDGE.sub(" ", part).split()).strip(" ,.;")) for part in alternatives]
        return Answer(reading=Reading.undecided, statement=kept, labels=tuple(labels)) if labels else _nothing()
    kept = _BRACKETS.sub(lambda m: "" if _ALTERNATIVE.search(m.group(1)) else m.group(), kept)
    if _ALTERNATIVE.search(kept[len(_before(_CAUSE, kept)) :]):
        kept = _before(_CAUSE, kept)  # one of several causes: none of them is claimed
    labels = [label for label in _labels(kept) if not _EXAMINATION.search(label.text.split("(")[0])]
    kept = _before(_EXAMPLE, _before(_HEDGE, kept)).strip(" ,.;:-")
    return Answer(reading=Reading.decided, statement=kept, labels=tuple(labels)) if labels else _nothing()


def _nothing() -> Answer:
    return Answer(reading=Reading.absent)


def _statements(text: str) -> list[str]:
    """What follows each marker of the surest kind that is there; the first sentence of a text without any."""
    for marker in _MARKERS:
        found = list(marker.finditer(text))
        ends = [*(match.start() for match in found), len(text)][1:]
        said = [text[match.end() : end].strip() for match, end in zip(found, ends, strict=False)]
        said = [one for one in said if re.search(r"[A-Za-z]{2}", one) and not _ABSENT.match(_sentence(one))]
        if said:
            return said if re.search(r"\bor\W*$", said[0], re.IGNORECASE) else said[:1]
        if found:
            before = re.sub(
                r"\s+(?:is|are|would be|was)\s+(?:the|your|his|her|my)\s*$", "", _sentence(text[: found[0].start()])
            )
            return [before] if re.search(r"[A-Za-z]{2}", before) and not _ABSENT.match(before) else []
    first = text if _LISTED.match(text) else _sentence(text)
    if not re.search(r"[A-Za-z]{2}", first) or _ABSENT.match(first) or text.rstrip().endswith("?"):
        return []
    return [first]


def _sentence(text: str) -> str:
    """The first sentence of the first line."""
    parts = _SENTENCE_END.split(text.strip(), maxsplit=1)
    return parts[0].strip()


def _statement(text: str) -> str:
    """The part of a statement that names the disease: no reasons, advice, remarks in brackets."""
    text = _sentence(_BRACKETS.sub(lambda m: "" if _REMARK.match(m.group(1)) else m.group(), text))
    text = re.sub(r"^\W*(?:this (?:is|could be)|it is|likely to be|a case of|an?|the)\s+", "", text, flags=re.I)
    text = re.sub(r"^\W*(?:most )?(?:likely|probabl[ey])(?: to be)?(?: a case of)?\s+", "", text, flags=re.I)
    return _before(_CLAUSE, text).strip(" ,.;:-\n")


def _name_before(pattern: re.Pattern[str], text: str) -> bool:
    return bool(re.search(r"[A-Za-z]{3}", _before(pattern, text)))


def _before(pattern: re.Pattern[str], text: str) -> str:
    """The text before the first match that does not begin it."""
    match = next((found for found in pattern.finditer(text) if re.search(r"[A-Za-z]{3}", text[: found.start()])), None)
    return text[: match.start()] if match else text


def _labels(statement: str) -> list[Label]:
    """Diseases claimed together: those joined by "and", "with", commas; hedged ones only where they stand first."""
    asides = tuple(
        part.strip()
        for part in _BRACKETS.findall(statement)
        if not icd10.codes_in(part) and not _ALTERNATIVE.search(part) and not _HEDGE.search(part)
    )
    codes = tuple(icd10.codes_in(statement))
    body = " ".join(_BRACKETS.sub(" ", statement).split())
    found: list[Label] = []
    for i, part in enumerate(part.strip(" .") for part in _JOINT.split(body)):
        hedged = bool(_HEDGE.search(part))
        name = _HEDGE.sub(" ", part).strip()
        if not re.search(r"[A-Za-z]{2}", name) or _EXAMPLE.match(name):
            continue
        if hedged and i > 0 and not all(core(words_of(label.text)) <= GENERIC for label in found):
            continue  # "a rash, possibly measles" claims measles; "measles, possibly gout" claims no gout
        found.append(
            Label(text=name, hedged=hedged, aside=asides if not found else (), codes=codes if not found else ())
        )
    return found


def _first_label(text: str) -> Label | None:
    found = _labels(_statement(text))
    return found[0] if found else None


# -- words -----------------------------------------------------------------------------------------------------------
_ANY_DRUG = frozenset(stem_of(word) for word in ("drug", "medication", "medicine"))
_MODIFIER = re.compile(r".*[- ](?:induced|associated|related)\s+(?!(?:to|with|by)\b)(?=\w)", re.IGNORECASE)
_INDUCED = re.compile(r"\b(?:induced|caused by|due to|secondary to|associated)\b", re.IGNORECASE)


@functools.lru_cache(maxsize=65536)
def compare(reference: str, label: str, config: Config | None = None) -> str:
    """same, narrower, broader or none: what an answer's label is to a reference's (module docstring)."""
    config = config or Config()
    want_words, got_words = words_of(_before(_CAUSE_OF_REFERENCE, reference)), words_of(label)
    want, got = core(want_words), core(got_words)
    if not want or not got:
        return "none"
    if (_denied(want_words) ^ _denied(got_words)) & set(got_words) & set(want_words):
        return "none"
    named = got
    if modified := _MODIFIER.match(_before(_CAUSE, label)):  # "vaccine-associated fever" is a fever and no vaccine
        named = core(words_of(label[modified.end() :]))
        if not any(same_word(word, other, config.spelling) for word in want for other in named):
            return "none"
    if any((a := pair & set(want_words)) and (b := pair & set(got_words)) and not a & b for pair in OPPOSITES):
        return "none"
    numbers = {word for word in want if word.isdecimal()}
    if numbers != want:  # a number that the answer does not say is no contradiction; another one was refused above
        want -= numbers - got
    if _INDUCED.search(label) and len(want) > 1:  # any drug is one
        want -= _ANY_DRUG
    said = [word for word in got_words if word in got]  # in order: which of two like words is met must not vary
    pairs = {
        word: word if word in got else next((other for other in said if same_word(word, other, config.spelling)), None)
        for word in want
    }
    if all(pairs.values()):
        if len(want) == len(got):
            return "same"
        met = set(pairs.values())
        at = [i for i, word in enumerate(got_words) if word in met]
        if len(got) <= len(want) + config.further and _least_span(at, got_words, met) <= len(met) + config.window:
            return "narrower"
    elif config.accept_broader:
        head = core(want_words[: want_words.index("with")]) if "with" in want_words[1:] else want
        if not any(same_word(word, other, config.spelling) for word in head for other in named):
            return "none"  # what is with a disease is no name of it
        unmet = [word for word in named if not any(same_word(word, other, config.spelling) for other in want)]
        if not unmet and any(not is_generic(word) and not word.isdecimal() for word in named):
            return "broader"
        if not unmet and len(named) >= 2 and len(named) >= math.ceil(2 * len(want) / 3):
            return "broader"
    return "none"


def _denied(words: Sequence[str]) -> set[str]:
    """The words that follow "non"."""
    return {word for before, word in itertools.pairwise(words) if before == "non"}


def _least_span(at: Sequence[int], words: Sequence[str], wanted: set[str | None]) -> int:
    """Length of the shortest run of words that holds all wanted ones."""
    best = len(words) + 1
    for i, first in enumerate(at):
        left = set(wanted)
        for last in at[i:]:
            left.discard(words[last])
            if not left:
                best = min(best, last - first + 1)
                break
    return best


# -- score ------------------------------------------------------------------------------------------------------------
_RULES = ("same", "narrower", "broader")


def score(reference: Reference | Case, answer: Answer | str, config: Config | None = None) -> DiagnosisScore:
    """How good an answer is. A ranked list is correct by its first label; its credit is the best, divided by the rank.

    An answer that names no diagnosis is not correct and has the credit of ``config.absent``: only where ``read_answer``
    finds none in the text, and the reading says so.
    """
    config = config or Config()
    reference = reference_of(reference) if isinstance(reference, Case) else reference
    answer = read_answer(answer) if isinstance(answer, str) else answer
    if answer.reading is Reading.absent:
        credit = None if reference.code is None else config.absent
        return DiagnosisScore(reading=answer.reading, correct=False, rule="none", credit=credit)
    rule, matched = _lexical(reference, answer, config)
    correct = rule in _RULES
    acceptable = 1.0 if correct else max((one.credit for one in _accepted(reference, answer, config)), default=0.0)
    found = DiagnosisScore(reading=answer.reading, correct=correct, rule=rule, matched=matched, acceptable=acceptable)
    return found if reference.code is None else _hierarchical(found, reference, answer, config)


def _lexical(reference: Reference, answer: Answer, config: Config) -> tuple[str, str]:
    """(rule, name of the reference) by which an answer is correct, or ("none", "")."""
    if answer.reading is Reading.undecided:
        each = [_met(reference, (label,), "", config) for label in answer.labels]
        return each[0] if all(rule in _RULES for rule, _ in each) else ("none", "")
    due = _due(reference, config)
    if answer.reading is Reading.decided and len(answer.labels) >= max(config.claimed, due + 1):
        return "none", ""
    labels = answer.labels[: 1 if answer.reading is Reading.ranked else config.listed]
    asides = max((len(label.aside) for label in answer.labels), default=0)
    whole = answer.reading is Reading.decided and len(answer.labels) <= due and asides <= config.asides
    return _met(reference, labels, answer.statement if whole else "", config)


def _due(reference: Reference, config: Config) -> int:
    """Labels that an answer may claim together: as many as count, or as the reference's own name has."""
    return max(config.listed, len(_labels(reference.label)))


def _met(reference: Reference, labels: Sequence[Label], statement: str, config: Config) -> tuple[str, str]:
    """The best rule by which one of the labels, or the whole statement, is the reference or a synonym."""
    best: tuple[str, str] = ("none", "")
    for name in _names_of(reference):
        said = [text for label in labels for text in (label.text, *label.aside[: config.asides])]
        rules = {compare(name, text, config) for text in said}
        if statement and compare(name, statement, config) in ("same", "narrower"):
            rules.add("narrower")
        for rule in _RULES:
            if rule in rules and (best[0] == "none" or _RULES.index(rule) < _RULES.index(best[0])):
                best = (rule, name)
    return best


def _names_of(reference: Reference) -> tuple[str, ...]:
    """The label, without what stands in brackets; that too, where it is another name of it; the synonyms."""
    plain = " ".join(_BRACKETS.sub(" ", reference.label).split()) or reference.label
    asides = (part.strip() for part in _BRACKETS.findall(reference.label))
    return (plain, *(part for part in asides if _is_name(part, plain)), *reference.synonyms)


def _is_name(aside: str, label: str) -> bool:
    """Whether what stands in brackets is a disease's name or the label's initials; "(domperidone)" is a cause."""
    if words_of(aside) in synonyms() or re.search(r"\b(?:disease|syndrome|disorder)$", aside, re.IGNORECASE):
        return True
    initials = iter(word[0] for word in re.findall(r"[a-z]+", label.lower()))
    return aside.isalpha() and len(aside) > 1 and all(letter in initials for letter in aside.lower())


def _accepted(reference: Reference, answer: Answer, config: Config) -> list[CodedLabel]:
    """Acceptable alternatives that an answer names in words."""
    return [
        one
        for one in reference.acceptable
        if one.label and _lexical(Reference(label=one.label), answer, config)[0] in _RULES
    ]


def _hierarchical(found: DiagnosisScore, reference: Reference, answer: Answer, config: Config) -> DiagnosisScore:
    """The same score with the answer's code and its credit."""
    assert reference.code is not None
    targets = [(reference.code, 1.0), *((one.icd10cm, one.credit) for one in reference.acceptable if one.icd10cm)]
    ranked = answer.reading is Reading.ranked
    best: tuple[float, str | None, str, icd10.Match | None] | None = None
    for rank, label in enumerate(answer.labels[: config.listed], 1):
        code, source = _code_of(label, reference, found if not ranked else None, config)
        for target, weight in targets:
            match = None if code is None else icd10.tree().match(target, code, config.credits)
            credit = config.credits.off_branch if match is None else match.credit
            if credit > 0:
                credit *= weight / (rank if ranked else 1)
            if best is None or credit > best[0]:
                best = (credit, code, source, match)
        if source == "written" or (not ranked and source == "label"):
            break
    assert best is not None
    credit, code, source, levels = best
    if answer.reading is Reading.undecided and credit > 0:
        credit /= len(answer.labels)  # as the chance of drawing the best of the alternatives
    elif not ranked and credit > 0:
        due = _due(reference, config)
        credit *= due / max(due, len(answer.labels))  # a long list names the disease by chance
    return dataclasses.replace(found, code=code, source=source, levels=levels, credit=credit)


def _code_of(
    label: Label, reference: Reference, found: DiagnosisScore | None, config: Config
) -> tuple[str | None, str]:
    """(code, where it is from) of one label."""
    if label.codes:
        return label.codes[0], "written"
    if found is not None and found.correct and found.rule != "broader" and found.reading is Reading.decided:
        return reference.code, "label"
    rule, _ = _met(reference, (label,), "", config)
    if rule in ("same", "narrower"):
        return reference.code, "label"
    for one in reference.acceptable:
        if one.label and one.icd10cm and compare(one.label, label.text, config) in ("same", "narrower"):
            return one.icd10cm, "label"
    return look_up(label.text, config.found)


@functools.lru_cache(maxsize=16384)
def look_up(label: str, least: float) -> tuple[str | None, str]:
    """(code, "looked up") of the entry of ICD-10-CM nearest to a label, or (None, "none") below the least score."""
    words = words_of(label)
    tries = [label, " ".join(word.replace("_", " ") for word in words), *synonyms().get(words, ())]
    found = [one for text in tries for one in icd10.tree().find(text, 1)]
    best = max(found, key=lambda one: one.score, default=None)
    return (None, "none") if best is None or best.score < least else (best.code, "looked up")
