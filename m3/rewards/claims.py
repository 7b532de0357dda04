"""Atomic claims of a response: what a verifier can look up, one fact each.

The rules (Baichuan-M3, arXiv 2602.06570, on the fact verifier): a single fact; references resolved, so that a claim can
be understood alone; fragments without context and the recited wrong options of a multiple-choice question are dropped;
no claim twice; in the order of the response. Ours, where medicine asks for it: a condition stays with its claim, and
advice becomes a statement ("Take it with food." -> "Patients should take it with food."), so that it can be true or
false. The paper distils an extractor of 8B parameters; here are a language model behind a chat endpoint
(``ChatExtractor``) and rules (``ScriptedExtractor``): deterministic, conservative, blind to what no rule names.
"""

from __future__ import annotations

import asyncio
import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

from m3.rewards.claim_grammar import Subjects, finite_verb, imperative, pronoun, split_clauses, split_list
from m3.rewards.fact_verdicts import LABEL_OF_FAILURE, Label
from m3.rollout.chat import ChatClient, ChatError
from m3.rollout.replies import read_object
from m3.text.words import content_stems, sentences, words
from m3kernels.checks import refuse


@dataclasses.dataclass(frozen=True, kw_only=True)
class Claim:
    """One fact. ``sentence``: the sentence of the response it comes from, that sentence's place being ``index``."""

    text: str
    sentence: str
    index: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Extraction:
    """Claims of one response; or none, and ``failure`` says why. A response may well claim nothing."""

    claims: tuple[Claim, ...]
    failure: Label | None = None  # unparsable, timeout, unreachable or over_budget
    malformed: int = 0  # replies that could not be read, those of a retry that then succeeded included
    explanation: str = ""


@runtime_checkable
class Extractor(Protocol):
    """Who extracts claims. ``scripted``: by rules; figures made with it say so."""

    @property
    def name(self) -> str: ...

    @property
    def scripted(self) -> bool: ...

    async def extract(self, response: str, question: str = "") -> Extraction:
        """Claims of a response, given the question it answers."""
        ...


class ScriptedExtractor:
    """By rules, one sentence at a time; see ``extract_claims``."""

    name = "scripted-1"  # the number is raised when a rule changes
    scripted = True

    async def extract(self, response: str, question: str = "") -> Extraction:
        """Claims of a response; the question is not read."""
        return Extraction(claims=tuple(await asyncio.to_thread(extract_claims, response)))


# -- rules ------------------------------------------------------------------------------------------------------------
_MARKS = re.compile(r"\*\*|__|`+|^#+\s*|^>\s*", re.MULTILINE)
_BULLET = re.compile(r"^\s*(?:[-*•–]|\d{1,2}[.)])\s+")
_OPTION = re.compile(r"^\s*\(?([A-Ha-h])[).:]\s+\S")
_ABOUT_OPTIONS = re.compile(
    r"\b(?:options?|choices?|answers?)\s+\(?[A-H]\b|\([A-H]\)|\bother (?:options|choices|answers)\b", re.I
)
_OPENERS = re.compile(
    r"^(?:however|in addition|additionally|therefore|thus|hence|moreover|furthermore|also|in fact|indeed|overall|yes|"
    r"no|sure|for example|for instance|in summary|in conclusion|in short|finally|first(?:ly)?|second(?:ly)?|"
    r"third(?:ly)?|lastly|next|then|importantly|(?:please )?note that|remember that|keep in mind that|as mentioned|"
    r"it is (?:also )?(?:important|worth|essential|good) (?:to (?:note|remember|know|keep in mind)|noting|remembering) "
    r"that|that said|in other words|on the other hand|similarly|conversely|unfortunately|fortunately)\b\s*[,:]?\s*",
    re.I,
)
_REMARK = re.compile(  # the speaker about the talk itself
    r"^(?:i\b|i'm|i’m|we\b|as an ai|as a (?:language model|medical expert)|hello|hi\b|dear|thank|you'?re welcome|"
    r"good (?:morning|afternoon|evening|luck)|let me|let's|here (?:are|is)|the following|hope|sorry|"
    r"if you have (?:any|more) (?:\w+ )?questions|feel free|please (?:let me know|feel free)|take care|get well|"
    r"best wishes|congratulations|"
    r"this (?:answer|response|information) )",
    re.I,
)
_REFERRAL = re.compile(  # "ask your doctor", and nothing that could be looked up
    r"\b(?:consult|talk|speak|discuss|check|see|seek|ask|contact)\w*\b.*\b(?:doctor|physician|provider|professional|"
    r"pharmacist|specialist|medical (?:advice|attention))",
    re.I,
)
_CONDITION = re.compile(r"\b(?:if|when|unless|within|immediately|at once|emergency|\d+)\b", re.I)
_HEADING = re.compile(r"^([A-Z][^:.!?]{1,60}):\s+(\S.*)$", re.S)
_LISTED = re.compile(r"\s*[,;]?\s*(?:such as|including|for example|e\.g\.)\s*$", re.I)
_DANGLING = re.compile(r"\b(?:if|when|that|who|to|are|is|include|includes|cause|causes|contain|contains)$", re.I)
_CONDITIONAL = re.compile(r"^((?:if|when|after|before|unless|during|for|in)\b[^,]*,\s+)(\S.*)$", re.I | re.S)


def extract_claims(text: str) -> list[Claim]:
    """Claims of a text by rules, in order, none twice.

    A line break, a bullet or the end of a sentence ends a unit. Questions, greetings, remarks of the speaker on the
    talk, bare referrals ("ask your doctor"), answer options and what has no finite verb are dropped; a list's items
    join the line that opens it ("Side effects include:"); clauses with verbs of their own part; objects of "include",
    "cause" and "contain" part; a leading pronoun becomes the last subject, or its sentence is dropped; "you" becomes
    "patients".
    """
    claims: list[Claim] = []
    seen: set[tuple[str, ...]] = set()
    subjects = Subjects()
    lead = ""
    lines = [line for line in _MARKS.sub("", text).splitlines() if line.strip()]
    options = sum(bool(_OPTION.match(line)) for line in lines)
    index = -1
    for line in lines:
        if options >= 2 and _OPTION.match(line):
            continue
        bulleted = bool(_BULLET.match(line))
        line = _BULLET.sub("", line).strip()
        if line.endswith(":"):
            index += 1
            lead = _LISTED.sub("", _strip_openers(line[:-1]))
            lead = subjects.resolve(lead) or lead
            subjects.note(lead)
            continue
        lead = lead if bulleted else ""
        for sentence in sentences(line):
            index += 1
            for fact in _facts_of(sentence, subjects, lead):
                key = tuple(word.lower() for word in words(fact))
                if key not in seen:
                    seen.add(key)
                    claims.append(Claim(text=fact, sentence=sentence, index=index))
    return claims


def _facts_of(sentence: str, subjects: Subjects, lead: str) -> Iterator[str]:
    """Facts of one sentence; ``lead``: the line that opened its list."""
    if heading := _HEADING.match(sentence):
        name, rest = heading.groups()
        if not finite_verb(name) and (finite_verb(rest) or imperative(rest)):
            subjects.name(name.strip())
            sentence = rest
    if sentence.endswith("?") or _REMARK.match(sentence) or _ABOUT_OPTIONS.search(sentence):
        return
    plain = _strip_openers(sentence)
    if not plain or _REMARK.match(plain):
        return
    stated = finite_verb(plain) or imperative(plain)
    if lead and (_DANGLING.search(lead) or (finite_verb(lead) and not stated)):
        plain = f"{lead} {_uncapital(plain)}"
    for clause in split_clauses(plain):
        whole = subjects.resolve(clause)
        if whole is None:
            continue
        subjects.note(whole)
        whole = _declare(whole, subjects)
        if not finite_verb(whole) or pronoun(whole) or len(content_stems(whole)) < 2:
            continue
        if _REFERRAL.search(whole) and not _CONDITION.search(whole):
            continue
        for fact in split_list(whole):
            yield _sentence(fact)


def _strip_openers(sentence: str) -> str:
    rest = sentence
    while (shorter := _OPENERS.sub("", rest, count=1).strip()) != rest:
        rest = shorter
    return rest


def _declare(text: str, subjects: Subjects) -> str:
    """Advice as a statement, in the third person, with its object named."""
    before, advice = "", text
    if conditional := _CONDITIONAL.match(text):
        before, advice = conditional.groups()
    if kind := imperative(advice):
        said = re.sub(r"^(?:please\s+)?(?:(?:do not|don['’]t|never)\s+)?", "", advice, flags=re.I)
        if subjects.singular:
            said = re.sub(r"^(\w+) it\b", lambda match: f"{match.group(1)} {subjects.singular}", said)
        begin = "patients" if before else "Patients"
        text = f"{before}{begin} should {'not ' if kind == 'negative' else ''}{_uncapital(said)}"
    text = re.sub(r"\byou['’]re\b", "patients are", text, flags=re.I)
    text = re.sub(r"\byoursel(?:f|ves)\b", "themselves", text, flags=re.I)
    text = re.sub(r"\byours?\b", "their", text, flags=re.I)
    return re.sub(r"\byou\b", "patients", text, flags=re.I)


def _uncapital(text: str) -> str:
    """First letter small, unless the word is an abbreviation or a name that keeps capitals."""
    first = text.split(maxsplit=1)[0] if text else ""
    return text if sum(letter.isupper() for letter in first) > 1 else text[:1].lower() + text[1:]


def _sentence(text: str) -> str:
    text = re.sub(r"\s+", " ", text).strip(" ,;:-")
    return f"{text[:1].upper()}{text[1:]}" + ("" if text.endswith((".", "!", "。")) else ".")


# -- a language model -------------------------------------------------------------------------------------------------
PROMPT_VERSION = "claims-1"
PROMPT = """List the factual medical claims of a response to a patient, so that each can be checked against reference \
works without seeing the response.

Rules:
1. One claim states one fact. Part what "and" joins, unless the parts mean something only together.
2. A claim can be understood alone: put names in the place of pronouns and of words like "this drug".
3. A condition belongs to its claim ("in pregnancy", "if the fever lasts over three days"), and so do doses and times.
4. Advice becomes a statement: "Take it with food" -> "Patients should take ibuprofen with food".
5. Leave out questions, greetings, sympathy, remarks about yourself or the talk, the patient's own history, sentences \
that make no sense alone, and the wrong options of a multiple-choice question that the response only recites.
6. Keep the order of the response. No claim twice. Add nothing that it does not say, and correct nothing.

Question:
{question}

Response:
{response}

Answer with JSON only: {{"claims": ["...", "..."]}}. If there is no claim: {{"claims": []}}."""
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"claims": {"type": "array", "items": {"type": "string"}}},
    "required": ["claims"],
    "additionalProperties": False,
}


class ChatExtractor:
    """A language model extracts. A reply that is no list of claims is asked for again; then the outcome is unparsable.

    Args:
        retries: further calls after a reply that cannot be read.
        timeout: seconds a call.
        max_tokens: of a reply.
    """

    scripted = False

    def __init__(self, client: ChatClient, *, retries: int = 2, timeout: float = 120.0, max_tokens: int = 2048) -> None:
        if retries < 0:
            raise refuse("ChatExtractor", "retries", "an integer >= 0", retries)
        self._client, self._retries, self._timeout, self._max_tokens = client, retries, timeout, max_tokens
        self.name = f"{client.model}/{PROMPT_VERSION}"

    async def extract(self, response: str, question: str = "") -> Extraction:
        """Claims of a response; a failure is named, never an empty list."""
        if not response.strip():
            return Extraction(claims=())
        prompt = PROMPT.format(question=question or "(not recorded)", response=response)
        for attempt in range(self._retries + 1):
            try:
                async with asyncio.timeout(self._timeout):
                    reply = await self._client.chat(
                        [{"role": "user", "content": prompt}],
                        temperature=0.0 if attempt == 0 else 0.5,  # the same reply again would not help
                        seed=attempt,
                        max_tokens=self._max_tokens,
                        json_schema=SCHEMA,
                    )
            except ChatError as error:
                failure = LABEL_OF_FAILURE[error.failure]
                return Extraction(claims=(), failure=failure, malformed=attempt, explanation=str(error))
            except TimeoutError:
                said = f"no reply in {self._timeout:g} s"
                return Extraction(claims=(), failure=Label.timeout, malformed=attempt, explanation=said)
            if (texts := _read_claims(reply.text)) is not None:
                return Extraction(claims=tuple(_placed(texts, response)), malformed=attempt)
        said = f"no list of claims in {self._retries + 1} replies"
        return Extraction(claims=(), failure=Label.unparsable, malformed=self._retries + 1, explanation=said)


def _read_claims(reply: str) -> list[str] | None:
    row = read_object(reply)
    texts = None if row is None else row.get("claims")
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        return None
    return [text.strip() for text in texts if text.strip()]


def _placed(texts: Sequence[str], response: str) -> Iterator[Claim]:
    """Claims with the sentence that shares most words with each, none twice."""
    spoken = sentences(response) or [response.strip()]
    stems = [set(content_stems(sentence)) for sentence in spoken]
    seen: set[tuple[str, ...]] = set()
    for text in texts:
        key = tuple(word.lower() for word in words(text))
        if key and key not in seen:
            seen.add(key)
            own = set(content_stems(text))
            index = max(range(len(spoken)), key=lambda i: (len(own & stems[i]), -i))
            yield Claim(text=text, sentence=spoken[index], index=index)
