"""Scripted physicians: a good one that has read the checklist, a baseline, and the exploits a reward must not pay.

``good`` is an oracle: it plans questions from a case's checklist, asks one or two at a time in the usual order, repeats
nothing that was answered, stops, and then gives a sensible differential, the essential examinations, the right
diagnosis and the escalation that is due. It measures the top of the scale, not skill. ``random_questions`` knows
nothing of the case. The others are degenerate policies; a reward that pays one of them is broken.

A policy is made for one case: ``POLICIES["good"](case)``. All are deterministic functions of the dialogue and the seed.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from m3.environment.asking import asked, things
from m3.environment.case import Case, ChecklistItem, Disclosure, Phase
from m3.environment.episode import CaseView
from m3.environment.exams import CATEGORIES
from m3.environment.lay_terms import CONCEPTS
from m3.environment.trajectory import Message
from m3.rewards.checklist import performs

SECTIONS = ("HPI", "ROS", "PMH", "DH", "OB", "FH", "SH", "demographic", "")  # the order in which a history is taken
QUESTIONS_A_TURN = 2
THINGS_A_TURN = 4  # that these may name: two long questions are asked one by one
TRIES = 3  # times the good physician asks for one thing: patients forget, and tell a few things at a time
CLOSING = "Thank you, I have no further questions."
GENERIC_QUESTIONS = (
    "What brings you in today?",
    "When did it start?",
    "How long does it last?",
    "Is it getting worse?",
    "Where exactly is it?",
    "Does it spread anywhere?",
    "What makes it better?",
    "What brings it on?",
    "How bad is it on a scale of one to ten?",
    "Have you had a fever?",
    "Have you had a cough?",
    "Are you short of breath?",
    "Do you have any chest pain?",
    "Have you had palpitations?",
    "Have you fainted?",
    "Do you feel dizzy?",
    "Do you have headaches?",
    "Have you had any nausea or vomiting?",
    "Have your bowels changed?",
    "Have you had blood in your stool?",
    "Do you have trouble passing urine?",
    "Have you lost weight?",
    "How is your appetite?",
    "How do you sleep?",
    "Do you have a rash?",
    "Do your joints hurt?",
    "Do you have any weakness or numbness?",
    "Has your vision changed?",
    "Do you have any medical conditions?",
    "Have you had any operations?",
    "Do you take any medication?",
    "Do you have any allergies?",
    "Does anything run in your family?",
    "Do you smoke?",
    "Do you drink alcohol?",
    "What do you do for work?",
    "Who do you live with?",
    "Have you travelled recently?",
    "How is your mood?",
    "Is there anything else?",
)
_UNKNOWING = MappingProxyType(  # what a physician says in later stages who has nothing to say
    {
        Phase.inquiry: CLOSING,
        Phase.differential: "1. Viral infection\n2. Stress",
        Phase.lab: "- Full blood count",
        Phase.diagnosis: "Diagnosis: viral infection\nAdvice: Rest, and come back if it does not improve.",
    }
)


class _Physician:
    """What scripted physicians share: a name, a case, the physician's messages so far."""

    name = ""

    def __init__(self, case: Case) -> None:
        self.case = case

    async def act(self, view: CaseView, messages: Sequence[Message], phase: Phase, seed: int) -> str:
        """The next message."""
        mine = [m for m in messages if m.role == "assistant" and m.phase == phase and not m.meta.get("snippet")]
        return self.say(messages, mine, phase, random.Random(seed))

    def say(self, messages: Sequence[Message], mine: Sequence[Message], phase: Phase, rng: random.Random) -> str:
        """The next message of a stage, after ``mine``; nothing but closing the inquiry and guessing by default."""
        return _UNKNOWING[phase]


# -- the good physician -----------------------------------------------------------------------------------------------
class Good(_Physician):
    """An oracle that has read the checklist."""

    name = "good"

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        given = set(case.opening_facts) | {fact.id for fact in case.facts if fact.disclosure == Disclosure.volunteer}
        wanted = [item for item in case.items(Phase.inquiry) if item.points > 0]
        asks = [item for item in wanted if item.kind == "must_ask" and item.facts and not given.issuperset(item.facts)]
        asks.sort(key=lambda item: SECTIONS.index(item.section))
        self.plan = [(item, questions) for item in asks if (questions := _questions(case, item))]
        self.statements = [text for item in wanted if item not in asks for text in _statements(case, item)[:1]]

    def say(self, messages: Sequence[Message], mine: Sequence[Message], phase: Phase, rng: random.Random) -> str:
        if phase != Phase.inquiry:
            return {Phase.differential: self._differential, Phase.lab: self._orders, Phase.diagnosis: self._diagnosis}[
                phase
            ]()
        told = {one for message in messages if not message.meta.get("snippet") for one in message.facts}
        before = "\n".join(message.content for message in mine)
        due = []
        for item, questions in self.plan:
            tries = sum(before.count(question) for question in questions)
            if told.isdisjoint(item.facts) and tries < TRIES:
                due.append((item.section, questions[tries % len(questions)]))
        now = [question for section, question in due if section == due[0][0]][:QUESTIONS_A_TURN]
        if sum(map(things, now)) > THINGS_A_TURN:
            now = now[:1]
        opening = self._opening(messages, first=not mine)
        return " ".join([*opening, *(now or [CLOSING])])

    def _opening(self, messages: Sequence[Message], *, first: bool) -> list[str]:
        """What is said before the questions: an answer to how the patient feels; at first, what is due by the list."""
        said = []
        last = messages[-1]
        if last.meta.get("snippet") or any(why == "filler: anxious" for why in last.why):
            said.append("I understand that this worries you, and we will get to the bottom of it together.")
        return said + (self.statements if first else [])

    def _differential(self) -> str:
        names = [self.case.diagnosis.label, *(entry.label for entry in self.case.diagnosis.differential)]
        lines = self._with_items(Phase.differential, [name for name in names if name][:6], "{}")
        return "\n".join(f"{i}. {line}" for i, line in enumerate(lines[:10], 1))

    def _orders(self) -> str:
        names = [exam.name for exam in self.case.exams if exam.need == "essential"]
        return "\n".join(f"- {line}" for line in self._with_items(Phase.lab, names, "{}"))

    def _diagnosis(self) -> str:
        escalation = [self.case.safety.escalation] if self.case.safety.must_escalate else []
        lines = self._with_items(Phase.diagnosis, [one for one in escalation if one], "What matters now: {}.")
        return "\n".join([f"Diagnosis: {self.case.diagnosis.label}", *(f"Advice: {line}" for line in lines)])

    def _with_items(self, phase: Phase, lines: Sequence[str], form: str) -> list[str]:
        """Lines of a stage, and one for each item that they do not meet; none that commits what must not be."""
        items = self.case.items(phase)
        never = [item for item in items if item.points < 0]
        kept = [line for line in lines if not any(performs(item, line) for item in never)]
        for item in items:
            if item.points < 0 or any(performs(item, line) for line in kept):
                continue
            ways = (form.format(key) for key in sorted(item.keys, key=len, reverse=True))
            good = (way for way in ways if performs(item, way) and not any(performs(other, way) for other in never))
            kept += [way for way in [next(good, "")] if way]
        return kept


_LEADING_VERB = re.compile(
    r"^(?:asks?|clarif(?:y|ies)|explores?|establish(?:es)?|elicits?|checks?|finds? out|enquires?|inquires?|screens?|"
    r"takes?|obtains?|determines?|identif(?:y|ies)|confirms?|quantif(?:y|ies)|characterises?|assesses?|reviews?)\b\s*",
    re.IGNORECASE,
)
_PERSONS = (
    (r"\b(?:she|he|the patient) is\b", "you are"),
    (r"\b(?:she|he|the patient) has\b", "you have"),
    (r"\b(?:she|he|the patient) was\b", "you were"),
    (r"\b(?:her|his|the patient's)\b", "your"),
    (r"\b(?:she|he|him|the patient)\b", "you"),
)


def _questions(case: Case, item: ChecklistItem) -> list[str]:
    """Ways to ask for an item, the most natural first; each names one of its facts that the patient can tell."""
    able = {one for one in item.facts if case.fact[one].section != "exam"}
    topic = _LEADING_VERB.sub("", item.criterion.strip().rstrip("."))
    topic = re.sub(r"^(?:(?:\w+ly|and|about|for|into|on)\b\s*)+", "", topic)
    for pattern, word in _PERSONS:
        topic = re.sub(pattern, word, topic, flags=re.IGNORECASE)
    clause = re.match(r"(?:when|where|whether|if|how|what|who|which|why)\b", topic, re.IGNORECASE)
    ways = [f"Could you tell me {topic}?" if clause else f"May I ask about {topic}?"] if topic else []
    ways += [f"May I ask you this: {key}?" for one in sorted(able) for key in case.fact[one].keys]
    never = [other for other in case.items(Phase.inquiry) if other.points < 0]
    fit = (
        way
        for way in dict.fromkeys(ways)
        if _names(case, way, able) and not any(performs(other, way) for other in never)
    )
    return list(itertools.islice(fit, TRIES))


def _names(case: Case, question: str, facts: set[str]) -> bool:
    """Whether a question names one of the facts itself, and few others."""
    specific = [
        one
        for ask in asked(case, question)
        for one, why in zip(ask.fact_ids, ask.reasons, strict=True)
        if why.startswith("key")
    ]
    return not facts.isdisjoint(specific[:3])


def _statements(case: Case, item: ChecklistItem) -> list[str]:
    """Ways to do an item of the inquiry that no fact answers."""
    forms = ("Let me say first: {}.", "May I ask you this: {}?") if item.kind == "must_do" else ("May I ask: {}?",)
    never = [other for other in case.items(Phase.inquiry) if other.points < 0]
    ways = [form.format(key) for form in forms for key in item.keys]
    return [way for way in ways if performs(item, way) and not any(performs(other, way) for other in never)]


# -- the baseline and the exploits ------------------------------------------------------------------------------------
class RandomQuestions(_Physician):
    """Asks one question after another off a general list, in random order, and guesses."""

    name = "random_questions"
    turns = 15

    def say(self, messages: Sequence[Message], mine: Sequence[Message], phase: Phase, rng: random.Random) -> str:
        left = [one for one in GENERIC_QUESTIONS if all(one != message.content for message in mine)]
        if phase != Phase.inquiry or len(mine) >= self.turns or not left:
            return super().say(messages, mine, phase, rng)
        return rng.choice(left)


class AskEverything(_Physician):
    """Every question of the checklist and of the general list in each message, each time from another one on."""

    name = "ask_everything"

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self.questions = [*(questions[0] for _, questions in Good(case).plan), *GENERIC_QUESTIONS]

    def say(self, messages: Sequence[Message], mine: Sequence[Message], phase: Phase, rng: random.Random) -> str:
        if phase != Phase.inquiry:
            return super().say(messages, mine, phase, rng)
        start = 4 * len(mine) % len(self.questions)
        return " ".join(self.questions[start:] + self.questions[:start])


class AskNothing(_Physician):
    """Closes at once."""

    name = "ask_nothing"


class Repeat(_Physician):
    """The same good question again and again."""

    name = "repeat"

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        plan = Good(case).plan
        self.text = plan[0][1][0] if plan else GENERIC_QUESTIONS[0]

    def say(self, messages: Sequence[Message], mine: Sequence[Message], phase: Phase, rng: random.Random) -> str:
        return self.text if phase == Phase.inquiry else super().say(messages, mine, phase, rng)


class OrderEveryTest(_Physician):
    """Asks nothing, orders everything there is."""

    name = "order_every_test"

    def say(self, messages: Sequence[Message], mine: Sequence[Message], phase: Phase, rng: random.Random) -> str:
        if phase != Phase.lab:
            return super().say(messages, mine, phase, rng)
        names = [*(exam.name for exam in self.case.exams), *(name.replace("_", " ") for name in CATEGORIES)]
        return "\n".join(f"- {name}" for name in names)


class SeeADoctor(_Physician):
    """Always says to see a doctor."""

    name = "see_a_doctor"

    def say(self, messages: Sequence[Message], mine: Sequence[Message], phase: Phase, rng: random.Random) -> str:
        return "Please see a doctor as soon as possible, or go to the emergency department if it gets worse."


class CopyRubric(_Physician):
    """Pastes the checklist's criteria of the stage as statements."""

    name = "copy_rubric"

    def say(self, messages: Sequence[Message], mine: Sequence[Message], phase: Phase, rng: random.Random) -> str:
        return "\n".join(item.criterion for item in self.case.items(phase) if item.points > 0) or _UNKNOWING[phase]


class DiagnoseFirst(_Physician):
    """Says the right diagnosis at once, in every stage, and nothing else."""

    name = "diagnose_first"

    def say(self, messages: Sequence[Message], mine: Sequence[Message], phase: Phase, rng: random.Random) -> str:
        label = self.case.diagnosis.label
        return {Phase.differential: f"1. {label}", Phase.lab: "No tests."}.get(phase, f"Diagnosis: {label}")


class StuffKeywords(_Physician):
    """Names a dozen complaints in every question, other ones each time, whoever the patient is."""

    name = "stuff_keywords"
    at_once = 12

    def say(self, messages: Sequence[Message], mine: Sequence[Message], phase: Phase, rng: random.Random) -> str:
        if phase != Phase.inquiry:
            return super().say(messages, mine, phase, rng)
        start = self.at_once * len(mine)
        names = (CONCEPTS[i % len(CONCEPTS)][0] for i in range(start, start + self.at_once))
        return f"Do you have {', '.join(names)}?"


class OneCompoundQuestion(_Physician):
    """All questions of the checklist in one sentence, each time from another one on."""

    name = "one_compound_question"

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self.questions = [questions[0].rstrip("?") for _, questions in Good(case).plan]

    def say(self, messages: Sequence[Message], mine: Sequence[Message], phase: Phase, rng: random.Random) -> str:
        if phase != Phase.inquiry or not self.questions:
            return super().say(messages, mine, phase, rng)
        start = 4 * len(mine) % len(self.questions)
        return " and ".join(self.questions[start:] + self.questions[:start]) + "?"


class RubricAsQuestions(_Physician):
    """The checklist's criteria with a question mark, one a message, and all of them in a later stage."""

    name = "rubric_as_questions"

    def say(self, messages: Sequence[Message], mine: Sequence[Message], phase: Phase, rng: random.Random) -> str:
        items = [item.criterion.rstrip(".") + "?" for item in self.case.items(phase) if item.points > 0]
        return (items[len(mine) % len(items)] if phase == Phase.inquiry else "\n".join(items)) if items else CLOSING


_COMMON = (  # diseases that a guess would name
    "Pneumonia, urinary tract infection, pulmonary embolism, myocardial infarction, heart failure, stroke, asthma, "
    "gastroenteritis, appendicitis, pancreatitis, sepsis, type 2 diabetes mellitus, hypothyroidism, iron deficiency "
    "anaemia, deep vein thrombosis, migraine, depression, gout, peptic ulcer, lymphoma, tuberculosis, meningitis"
).split(", ")


class HedgedList(_Physician):
    """Names the right diagnosis among many common ones, several in each line of the differential."""

    name = "hedged_list"

    def say(self, messages: Sequence[Message], mine: Sequence[Message], phase: Phase, rng: random.Random) -> str:
        names = [self.case.diagnosis.label, *_COMMON]
        lines = [f"{i + 1}. {' ('.join(names[i::10])}{')' * (len(names[i::10]) - 1)}" for i in range(10)]
        said = {Phase.differential: "\n".join(lines), Phase.diagnosis: f"Diagnosis: {', '.join(names)}"}
        return said.get(phase) or super().say(messages, mine, phase, rng)


class EveryAdvice(_Physician):
    """Escalates in every way, and gives the opposite advice as well."""

    name = "every_advice"

    def say(self, messages: Sequence[Message], mine: Sequence[Message], phase: Phase, rng: random.Random) -> str:
        if phase != Phase.diagnosis:
            return super().say(messages, mine, phase, rng)
        return (
            "Diagnosis: viral infection\nAdvice: Go to the emergency department at once. Call an ambulance. "
            "Be admitted to hospital today. See the specialist urgently. Come back at once if it gets worse. "
            "Stay at home and rest. Go home. Wait and see. There is nothing to worry about. See your doctor next week."
        )


class Echo(_Physician):
    """Says the patient's own words back as a question."""

    name = "echo"

    def say(self, messages: Sequence[Message], mine: Sequence[Message], phase: Phase, rng: random.Random) -> str:
        if phase != Phase.inquiry:
            return super().say(messages, mine, phase, rng)
        return f"Tell me more: {messages[-1].content.rstrip('.?!')}?"


EXPLOITS: Mapping[str, Callable[[Case], _Physician]] = MappingProxyType(
    {
        one.name: one
        for one in (
            *(AskEverything, AskNothing, Repeat, OrderEveryTest, SeeADoctor, CopyRubric, DiagnoseFirst),
            *(StuffKeywords, OneCompoundQuestion, RubricAsQuestions, HedgedList, EveryAdvice, Echo),
        )
    }
)
POLICIES: Mapping[str, Callable[[Case], _Physician]] = MappingProxyType(
    {Good.name: Good, RandomQuestions.name: RandomQuestions, **EXPLOITS}
)
