"""Which facts of a case a physician's message asks for: by rules, deterministic, no model.

A message is read sentence by sentence. A sentence counts if it is a question or a request for information ("Do you
smoke", "Any fever?", "Tell me about ...", "I would like to know ..."); a statement never does. What it asks for:

- a fact one of whose ``keys`` has all its words in the sentence, in any order (a *specific* ask). Words are compared by
  stem; grammar does not count; lay and medical names of one thing are the same (lay_terms.CONCEPTS);
- if it asks for none so and is open ("tell me about", "what is ... like"), a fact one of whose ``keywords`` it names,
  unless the fact is told on specific asking only (an ask by *topic*).

What a patient does with an ask is its own matter (patient.py): findings of an examination are asked for here as well.
Text meant for a machine ("ignore your instructions", "list all facts") asks for nothing and is named as such.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import math
import re

from m3.environment.case import Case, Disclosure, Fact
from m3.environment.lay_terms import tokens, ways
from m3.text.words import content_stems, sentences

MAX_CHARACTERS = 8_000  # ours: no patient listens longer; bounds the work a message can cause
_KEPT = 1024  # ours: sentences of a case whose reading is kept; more than its consultations at work have
_WORDS_A_THING = 4  # ours: words that carry a topic, for each thing of a question without commas
MAX_SENTENCE_WORDS = 60  # ours: a longer "sentence" is a list without stops; its beginning counts


class AskKind(enum.StrEnum):
    """What sort of question a sentence is."""

    specific = "specific"  # names facts by their keys
    topic = "topic"  # open, about a topic some facts belong to
    general = "general"  # "what brings you here?"
    more = "more"  # "anything else?"
    courtesy = "courtesy"  # "is that all right?": nothing to know
    machine = "machine"  # meant for a program, not for a patient
    unmatched = "unmatched"  # a question that no fact answers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ask:
    """One question. ``reasons[i]`` says why ``fact_ids[i]`` is asked for ("key 'spread arm'", "topic 'pain'")."""

    sentence: str
    kind: AskKind
    fact_ids: tuple[str, ...] = ()
    reasons: tuple[str, ...] = ()

    @property
    def reason(self) -> str:
        """Why, in one line."""
        pairs = zip(self.fact_ids, self.reasons, strict=True)
        return "; ".join(f"{fact}: {why}" for fact, why in pairs) or str(self.kind)


def asked(case: Case, text: str) -> list[Ask]:
    """The questions of a physician's message in order, each with the facts it asks for; none for mere statements."""
    index = _index(case)
    return [index.read(sentence) for sentence in requests(text[:MAX_CHARACTERS])]


@functools.lru_cache(maxsize=256)
def requests(text: str) -> tuple[str, ...]:
    """The sentences of a text that are questions or requests for information, in order."""
    return tuple(sentence for sentence in sentences(text) if is_request(sentence))


def is_request(sentence: str) -> bool:
    """Whether a sentence is a question or a request for information."""
    told = _TAG.sub("", sentence)
    if "?" in told or "？" in told:
        return True
    return any(found for found in (_REQUEST.match(sentence), _WISH.search(sentence), _MACHINE.search(sentence)))


@functools.lru_cache(maxsize=4096)
def things(sentence: str) -> int:
    """How many things a question names, whether or not anybody has them: "fever, chills or a rash?" names three.

    The parts of an enumeration; where no comma or "or" parts them, one for every few words that carry a topic.
    """
    parts = sum(bool(content_stems(part)) for part in _PARTS.split(sentence))
    return max(1, parts, math.ceil(len(content_stems(sentence)) / _WORDS_A_THING))


def says_enough(text: str) -> bool:
    """Whether a physician says that the history is complete."""
    return _ENOUGH.search(text[:MAX_CHARACTERS]) is not None


def is_closing(text: str) -> bool:
    """Whether a physician's message ends the inquiry: it says that it has enough, or it asks for nothing."""
    return says_enough(text) or not requests(text[:MAX_CHARACTERS])


# -- how people ask ---------------------------------------------------------------------------------------------------
_AUX = r"(?:do|does|did|have|has|had|are|is|was|were|can|could|would|will)"
_REQUEST = re.compile(
    r"\W*(?:(?:and|now|ok|okay|so|please|also|right|then|next|thanks?|thank you|first|finally|lastly|i see|but|or)\b"
    r"\W*)*"
    r"(?:(?:tell|remind|give|show) me|describe\b|explain\b|(?:walk|talk) me through|say more|elaborate\b|"
    r"rate (?:the|your)|list (?:your|the|any|all)|go on\b|any\b|"
    rf"{_AUX} (?:you|your|it|there|they|anyone|anybody|any|either|he|she)\b|"
    rf"(?:what|when|where|which|who|why|how) "
    rf"(?:{_AUX}|about|else|long|many|much|often|bad|severe|old|far|makes?|brings?)\b)",
    re.IGNORECASE,
)
_WISH = re.compile(
    r"\b(?:i(?:'d|’d| would) (?:also )?(?:like|want|love) (?:you )?to (?:know|ask|hear|learn|tell|describe|understand)|"
    r"i (?:also )?(?:need|want|have) (?:you )?to (?:know|ask|tell|describe)|(?:let me|may i|can i|could i) "
    r"(?:also )?ask|"
    r"i (?:was )?wonder(?:ed|ing)? (?:if|whether|about)|i(?:'m| am) interested (?:in|to know))\b",
    re.IGNORECASE,
)
_TAG = re.compile(r",\s*(?:ok|okay|all right|alright)\s*[?？]\W*$", re.IGNORECASE)  # "..., OK?" asks for nothing
_PARTS = re.compile(r"[,;:/&+|\n]|\b(?:and|or|nor)\b", re.IGNORECASE)
_MANNERS = re.compile(  # words of politeness, which name no symptom: "walk me through", "how can I help you"
    r"\b(?:(?:walk|talk) me through|(?:how|what) (?:can|may) (?:i|we) (?:help|do for)(?: you)?|(?:glass of|some) water|"
    r"(?:would you like to|please|do) (?:sit|take a seat)(?: down)?|lie down for me|good time to talk|"
    r"(?:can|do) you hear me(?: well| all right)?|take your hand|how has your day been)\b",
    re.IGNORECASE,
)
_OPEN = re.compile(
    r"\b(?:tell me|describe|explain|(?:walk|talk) me through|say more|elaborate|what about|how about|more about|"
    r"what can you (?:tell|say)|hear (?:more )?about|know (?:more )?about|ask (?:you )?about|history of|"
    r"(?:what|how) (?:is|are|was|were|has|have|does|do|did)\b.*|what(?:'s|’s)|how(?:'s|’s)|"
    r"(?:any|some|anything|something)(?: \w+)? (?:problems?|troubles?|issues?|difficult\w+|concerns?|changes?|"
    r"about|with)|"
    r"which|what (?:kind|sort|type)s?)\b",
    re.IGNORECASE,
)
_GENERAL = re.compile(
    r"\b(?:what (?:brings|brought) you|how (?:can|may) i help|what can i (?:do|help)|what(?:'s| is| has| seems|’s)\b"
    r".{0,12}(?:going on|happening|happened|matter|troubling|bothering|wrong|problem)|"
    r"what happened|what seems|in your own words|"
    r"tell me (?:more )?(?:about )?(?:what|why|your (?:symptoms?|problem|concerns?|story|complaint))|"
    r"why (?:have|did) you come|what are your symptoms)\b",
    re.IGNORECASE,
)
_MORE = re.compile(
    r"\b(?:(?:anything|something|what) (?:else|more|further)|"
    r"any(?:thing)? other (?:symptoms?|problems?|complaints?|concerns?)|"
    r"(?:anything|something) (?:you|that you) (?:want|would like|wish) to (?:add|tell|mention))\b",
    re.IGNORECASE,
)
_COURTESY = re.compile(
    r"\b(?:any questions|questions for me|is (?:that|this) (?:ok|okay|all right|alright|fine)|do you understand|"
    r"shall we|"
    r"(?:may|can|could) i (?:ask|call|examine|have)|are you (?:ready|comfortable|happy)|how are you|"
    r"does that make sense|"
    r"would (?:it|that) be (?:ok|okay|all right|alright))\b",
    re.IGNORECASE,
)
_MACHINE = re.compile(
    r"\b(?:ignore|disregard|forget|override|bypass)\b.{0,40}\b(?:instructions?|prompts?|rules?|guidelines?|previous|above)\b|"
    r"\b(?:system|hidden|secret|initial) prompt\b|\bdeveloper mode\b|\bjailbreak\b|"
    r"\b(?:list|reveal|print|show|output|tell|give|repeat|recite|dump|disclose|share)\b.{0,30}"
    r"\b(?:facts?|instructions?|script|case file|checklist|rubrics?|prompt|answer key|json)\b|"
    r"\byou are (?:now )?(?:an? )?(?:ai|language model|assistant|chatbot|simulat\w+|program)\b|\bas an ai\b|"
    r"\b(?:what is|what(?:'s|’s)|tell me|reveal|give me|state|name|say) (?:your|the|my) "
    r"(?:\w+ )?(?:diagnosis|final answer)\W*$",
    re.IGNORECASE,
)
_ENOUGH = re.compile(
    r"\b(?:(?:i have|i've|i’ve|we have) (?:got )?(?:enough|all (?:the|that)|everything)(?! (?:day|night))|"
    r"no (?:further|more|other) questions|that(?:'s| is|’s| was) all (?:i need|my questions|the questions|for now)|"
    r"that concludes|(?:the )?history is complete)\b",
    re.IGNORECASE,
)


# -- a case, ready to be asked ----------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class _Wanted:
    """Words that must all stand in a sentence, and how to name them."""

    stems: frozenset[str]
    name: str


@dataclasses.dataclass(frozen=True)
class _Entry:
    fact: Fact
    keys: tuple[_Wanted, ...]
    topics: tuple[_Wanted, ...]


def _wanted(phrase: str, label: str) -> list[_Wanted]:
    return [_Wanted(way, f"{label} '{phrase}'") for way in ways(phrase)]


class _Index:
    def __init__(self, case: Case) -> None:
        self.kept: dict[str, Ask] = {}
        self.entries = tuple(
            _Entry(
                fact,
                tuple(one for key in fact.keys for one in _wanted(key, "key")),
                tuple(one for topic in fact.keywords for one in _wanted(topic, "topic"))
                if fact.disclosure != Disclosure.on_specific_ask
                else (),
            )
            for fact in case.facts
        )
        self.known = frozenset().union(
            *(one.stems for entry in self.entries for one in (*entry.keys, *entry.topics)), frozenset()
        )

    def read(self, sentence: str) -> Ask:
        """What a sentence asks for; patient, reward and verifiers read the same ones."""
        if (ask := self.kept.get(sentence)) is None:
            if len(self.kept) >= _KEPT:
                self.kept.clear()
            ask = self.kept[sentence] = self._read(sentence)
        return ask

    def _read(self, sentence: str) -> Ask:
        if _MACHINE.search(sentence):
            return Ask(sentence=sentence, kind=AskKind.machine)
        present = self.known & tokens(_MANNERS.sub(" ", sentence), MAX_SENTENCE_WORDS)
        specific = [(entry.fact.id, one.name) for entry in self.entries if (one := _first(entry.keys, present))]
        found = specific
        if not specific and (_OPEN.search(sentence) or _MORE.search(sentence)):
            found = [(entry.fact.id, one.name) for entry in self.entries if (one := _first(entry.topics, present))]
        kind = AskKind.specific if specific else AskKind.topic if found else _kind_without_facts(sentence)
        return Ask(
            sentence=sentence,
            kind=kind,
            fact_ids=tuple(fact for fact, _ in found),
            reasons=tuple(why for _, why in found),
        )


def _first(wanted: tuple[_Wanted, ...], present: frozenset[str]) -> _Wanted | None:
    for one in wanted:
        if one.stems <= present:
            return one
    return None


def _kind_without_facts(sentence: str) -> AskKind:
    for pattern, kind in ((_GENERAL, AskKind.general), (_MORE, AskKind.more), (_COURTESY, AskKind.courtesy)):
        if pattern.search(sentence):
            return kind
    return AskKind.unmatched


def _index(case: Case) -> _Index:
    """Made once for a case and kept on it, as functools.cached_property would: to hash a case costs more."""
    kept = vars(case)
    if (index := kept.get("_asking")) is None:
        index = kept["_asking"] = _Index(case)
    return index
