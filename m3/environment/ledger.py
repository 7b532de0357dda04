"""The fact ledger: what a patient's message told, and what of it the patient should not or could not have said.

For any patient, scripted or a language model, by rules and without a model:

- disclosed: facts of the case that the message tells;
- leaked: facts told that were not asked for (and are not volunteered), findings of examinations, the diagnosis;
- contradicted: facts told with the opposite polarity or with another number;
- invented: clinical content that is in no fact: a symptom, a drug, an illness, a quantity; a denial as much as a claim.

The rules are conservative: what they cannot tell they do not count, so counts are lower bounds. A sentence that says "I
don't know", or asks, or puts off ("one thing at a time"), tells nothing. Source of the three kinds of failure:
Baichuan-M2, arXiv 2509.02208, on the patient simulator; the rules are ours.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterable, Sequence

from m3.environment.asking import AskKind, asked
from m3.environment.case import Case, Disclosure, Fact
from m3.environment.lay_terms import concepts, is_clinical, means, stem, tokens
from m3.text.words import STOP_WORDS, content_stems, is_negated, sentences, words

DIAGNOSIS = "diagnosis"  # what is leaked when the patient names what it has
_OVERLAP = 0.6  # ours: share of a fact's content words that makes a clause speak of it
_EMPTY = frozenset(
    stem(word) for word in (*STOP_WORDS, "all", "nothing", "no", "not")
)  # of "that's all", "no, nothing"
_VERBATIM = 4  # ours: content words that no other sentence holds by chance
_UNKNOWN = re.compile(
    r"\b(?:(?:don't|do not|don’t|didn't|didn’t) (?:really )?(?:know|remember|recall)|not (?:really )?sure|no idea|"
    r"(?:can't|cannot|can’t|couldn't|couldn’t) (?:say|tell|remember|recall)|haven't noticed|haven’t noticed|"
    r"one thing at a time|lot at once|check that yourself)\b",
    re.IGNORECASE,
)
_ANSWER = re.compile(
    r"\W*(yes|yeah|yep|no|nope|not at all|never)\b(?:\s*[,.!:;]+\s*|\s*$|\s+(?=(?:i|it|we|they|my|there|not)\b))",
    re.IGNORECASE,
)
_NO = ("no", "nope", "not at all", "never")
_CLAUSE = re.compile(r"\s*;\s*|,?\s+\b(?:but|although|though|however|except)\b\s+", re.IGNORECASE)
_UNITS = frozenset(
    stem(word)
    for word in (
        "second minute hour day night week month year mg g kg ml litre liter unit cigarette pack pint glass time "
        "degree pound stone tablet pill c f"
    ).split()
)
_NUMBER_WORDS = dict(
    zip(
        (
            "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
            "seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety hundred once "
            "twice half dozen"
        ).split(),
        (*range(1, 21), 30, 40, 50, 60, 70, 80, 90, 100, 1, 2, 0.5, 12),
        strict=True,
    )
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LedgerEntry:
    """Of one message: ids of facts (``leaked`` may hold DIAGNOSIS), words for ``invented``, a reason for each count."""

    disclosed: tuple[str, ...] = ()
    leaked: tuple[str, ...] = ()
    contradicted: tuple[str, ...] = ()
    invented: tuple[str, ...] = ()
    reasons: tuple[str, ...] = ()

    @property
    def clean(self) -> bool:
        """Whether nothing was leaked, contradicted or invented."""
        return not (self.leaked or self.contradicted or self.invented)


def numbers(text: str) -> set[float]:
    """Numbers in a text, in digits or in English words to a hundred ("twenty-five" is 25)."""
    found: set[float] = set()
    for word in words(text):
        plain = word.lower().replace("-", " ").split()
        values = [_NUMBER_WORDS[part] for part in plain if part in _NUMBER_WORDS]
        if values and len(values) == len(plain):
            found.add(float(sum(values)))
        for part in re.findall(r"\d+(?:\.\d+)?", word):
            found.add(float(part))
    return found


def _measures(text: str) -> list[tuple[float, str]]:
    """Numbers of a text, each with the stem of the word after it."""
    said = words(text)
    return [(number, stem(unit)) for word, unit in itertools.pairwise(said) for number in numbers(word)]


def _conflicts(known: _Known, clause: str, said: set[float], right: set[float]) -> set[float]:
    """Numbers of a clause against a fact: of a unit that the fact has, or instead of its value."""
    other = {number for number, unit in _measures(clause) if unit in known.units and number not in right}
    return other or (said if known.fact.value and not said & right else set())


@dataclasses.dataclass(frozen=True)
class _Known:
    """A fact, ready to be recognised."""

    fact: Fact
    wordings: tuple[frozenset[str], ...]
    keys: tuple[str, ...]  # of several words, or one of its own
    long_keys: tuple[str, ...]  # of several words
    numbers: frozenset[float]
    units: frozenset[str]  # what stands after its numbers
    negated: bool | None  # whether it is told in negated clauses; None: in both kinds, polarity cannot be checked
    bare: bool | None  # whether a mere "no" tells it; None: cannot be said


class Ledger:
    """Checks messages of one case's patient."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self._facts = tuple(_known(fact) for fact in case.facts)
        texts = [case.opening_line, case.chief_complaint, case.sex, case.setting]
        for fact in case.facts:
            texts += [fact.text, fact.said, *fact.keys, *fact.keywords]
        self._vocabulary = tokens(" . ".join(texts)) | {stem(word) for text in texts for word in words(text)}
        self._numbers = {number for text in texts for number in numbers(text)}
        if case.age is not None:
            self._numbers.add(case.age)
        self._names = [
            tuple(content_stems(name)) for name in (case.diagnosis.label, *case.diagnosis.synonyms) if name.strip()
        ]

    def check(self, asked_text: str, answer_text: str) -> LedgerEntry:
        """What a patient's answer to a physician's message told; every tuple without repetition, in order.

        Args:
            asked_text: the physician's message; "" for the patient's first words.
            answer_text: the patient's.
        """
        asks = asked(self.case, asked_text)
        allowed = {fact for ask in asks for fact in ask.fact_ids} | set(self.case.opening_facts)
        topics = {topic for fact in allowed for topic in self.case.fact[fact].keywords}
        specific = [fact for ask in asks if ask.kind == AskKind.specific for fact in ask.fact_ids]
        told, rest = self._verbatim(answer_text, allowed)
        wrong: dict[str, str] = {}
        invented: dict[str, str] = {}
        for sentence in sentences(rest):
            if "?" in sentence or _UNKNOWN.search(sentence):
                continue
            for clause in _CLAUSE.split(" ".join(sentence.split())):  # long runs of blanks take the pattern long
                self._read(clause, specific, allowed, told, wrong, invented)
        leaked = {
            one: "told and not asked"
            for one in told
            if not _may_tell(self.case.fact[one], allowed, topics, self.case.persona.verbosity == "talkative")
        }
        if self._names_diagnosis(answer_text):
            leaked[DIAGNOSIS] = "names the diagnosis"
        reasons = [f"{one}: {why}" for found in (leaked, wrong, invented) for one, why in found.items()]
        return LedgerEntry(
            disclosed=tuple(one for one in told if one not in wrong),
            leaked=tuple(leaked),
            contradicted=tuple(wrong),
            invented=tuple(invented),
            reasons=tuple(reasons),
        )

    def _verbatim(self, answer: str, allowed: set[str]) -> tuple[dict[str, str], str]:
        """Facts told in the case's own words, and what is left of the answer; short ones ("No.") where asked for."""
        told: dict[str, str] = {}
        if answer.startswith(self.case.opening_line):
            told.update(dict.fromkeys(self.case.opening_facts, "opening line"))
            answer = answer[len(self.case.opening_line) :]
        for known in sorted(self._facts, key=lambda known: -len(known.fact.said)):
            said, one = known.fact.said, known.fact.id
            if said in answer and (one in allowed or len(content_stems(said)) >= _VERBATIM):
                told[one] = "verbatim"
                answer = answer.replace(said, "\n")
        return told, answer

    def _read(
        self,
        clause: str,
        specific: Sequence[str],
        asked_for: set[str],
        told: dict[str, str],
        wrong: dict[str, str],
        invented: dict[str, str],
    ) -> None:
        """Read one clause that is not in the case's words."""
        opened = _ANSWER.match(clause)
        answer = opened.group(1).lower() if opened else ""
        body = clause[opened.end() :] if opened else clause
        spoken_tokens, said_numbers = tokens(body), numbers(body)
        spoken = self._spoken(spoken_tokens, asked_for)
        bare = not spoken and len(set(specific)) == 1 and answer != "" and len(content_stems(body)) <= 2
        if bare:
            spoken = [known for known in self._facts if known.fact.id == specific[0]]
        negated = answer in _NO if bare else is_negated(body)
        all_numbers = set().union(*(known.numbers for known in spoken)) if spoken else set()
        for known in spoken:
            one = known.fact.id
            wanted = known.bare if bare else known.negated
            if wanted is not None and wanted != negated:
                wrong.setdefault(one, f"said {'no' if negated else 'yes'} in {clause.strip()!r}")
            elif other := _conflicts(known, body, said_numbers, all_numbers):
                wrong.setdefault(one, f"said {min(other):g}, not {', '.join(f'{n:g}' for n in sorted(known.numbers))}")
            else:
                told.setdefault(one, "told")
        for word in words(body):
            if is_clinical(word) and not ({stem(word), *concepts([stem(word)])} & self._vocabulary):
                invented.setdefault(word.lower(), f"in no fact: {clause.strip()!r}")
        if not spoken and said_numbers - self._numbers and {stem(word) for word in words(body)} & _UNITS:
            number = min(said_numbers - self._numbers)
            invented.setdefault(f"{number:g}", f"a quantity in no fact: {clause.strip()!r}")

    def _spoken(self, said: frozenset[str], asked_for: set[str]) -> list[_Known]:
        """Facts that a clause speaks of: by most of their words, or by a key where they were asked for."""
        strong = [known for known in self._facts if _shares_words(known, said)]
        if any(known.fact.id in asked_for for known in strong):
            return strong
        keyed = [known for known in self._facts if any(means(said, key) for key in known.keys)]
        weak = [known for known in keyed if known.fact.id in asked_for and known not in strong]
        return [*strong, *weak] or [known for known in keyed if any(means(said, key) for key in known.long_keys)]

    def _names_diagnosis(self, answer: str) -> bool:
        said = content_stems(answer)
        return any(name and _contains(said, name) and not set(name) <= self._vocabulary for name in self._names)


def _known(fact: Fact) -> _Known:
    parities = _parities(fact.text) | _parities(_without_answer(fact.said))
    opened = _ANSWER.match(fact.said)
    if opened and not _without_answer(fact.said):
        parities = _parities(fact.text) | {opened.group(1).lower() in _NO}
    negated = parities.pop() if len(parities) == 1 else None
    absent = fact.polarity == "absent"
    own = tokens(f"{fact.said} {fact.text}")
    return _Known(
        fact,
        tuple(_content(text) for text in dict.fromkeys((fact.said, fact.text))),
        tuple(key for key in fact.keys if len(words(key)) > 1 or means(own, key)),
        tuple(key for key in fact.keys if len(words(key)) > 1),
        frozenset(numbers(fact.text) | numbers(fact.said) | ({fact.value[0]} if fact.value else set())),
        frozenset(unit for text in (fact.text, fact.said) for _, unit in _measures(text)),
        negated,
        absent if negated in (absent, None) else None,
    )


def _parities(text: str) -> set[bool]:
    """Whether its clauses are negated."""
    return {is_negated(clause) for sentence in sentences(text) for clause in _CLAUSE.split(sentence)}


def _content(text: str) -> frozenset[str]:
    return frozenset(stem(word) for word in words(text)) - _EMPTY


def _without_answer(text: str) -> str:
    opened = _ANSWER.match(text)
    return text[opened.end() :] if opened else text


def _shares_words(known: _Known, said: frozenset[str]) -> bool:
    """Whether most of a fact's content words, two at least, are said."""
    return any(len(wording & said) >= max(2, _OVERLAP * len(wording)) for wording in known.wordings)


def _may_tell(fact: Fact, allowed: Iterable[str], topics: set[str], talkative: bool) -> bool:
    if fact.section == "exam":
        return False
    if fact.id in allowed or fact.disclosure == Disclosure.volunteer:
        return True
    return talkative and fact.disclosure == Disclosure.on_ask and bool(topics & set(fact.keywords))


def _contains(sequence: Sequence[str], part: Sequence[str]) -> bool:
    return any(tuple(sequence[i : i + len(part)]) == tuple(part) for i in range(len(sequence) - len(part) + 1))
