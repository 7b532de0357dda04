"""Advice on made-up medicines, small enough that every claim of an answer can be checked exactly.

    question   <s> asks velorin child asthma
    answer     states dose-b adds colour-a states limit-c restates dose-b end

Words are single tokens. A step of the answer is a manner and a fact: ``states`` begins a sentence, ``adds`` hangs the
fact on the sentence before, ``restates`` says it in another order of words. A fact is an aspect with one of its three
values, and stands for English: "Velorin is taken as two capsules after breakfast." Other pairs claim nothing.

A hidden table says which value is true. Five core aspects and the peripheral ones follow from the medicine. Three
core aspects depend on the whole question: the medicine's usual value holds with the probability ``usual``, or another
one, or nothing is known and every claim about it is uncertain. So a held-out question cannot be answered without risk.

An answer ends with "end", or is cut off after a step that repeats words or claims nothing, or after MAX_STEPS.

Reward: Eq 1 (rubric.rubric_reward): a core aspect's points where its true value is named, whatever else is said.
Claims: each wording once, as an extractor has them. Verdicts: exact on core facts; of the peripheral wordings one in
ten, by a hash of question and wording, gets a wrong verdict in training. Scores of an answer are by the exact table.

Source: the reward's equations are those of Baichuan-M3, arXiv 2602.06570; the task is ours.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import random
from collections.abc import Sequence

from m3.rewards import fact_aware
from m3.rewards.fact_verdicts import FactVerdict, Label
from m3.rewards.rubric import rubric_reward
from m3.text.embed import LexicalEmbedder
from m3kernels.checks import refuse

MEDICINES = (
    "velorin", "tasmadol", "quorexin", "brinolast", "pemfidine", "osterlix", "cavitral", "dromexin", "lunapril",
    "serovane", "mirtozol", "fenquate",
)  # fmt: skip
AGES = ("child", "teenager", "adult", "elder")
CONDITIONS = (
    "asthma", "diabetes", "gout", "epilepsy", "glaucoma", "anaemia", "psoriasis", "migraine", "eczema", "hepatitis",
    "hypertension", "insomnia",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Aspect:
    """``points`` of its clause in the rubric, 0: peripheral. ``usual``: chance that the medicine's value holds; the
    rest is shared by another value and by nothing known."""

    name: str
    verb: str
    values: tuple[str, str, str]
    points: float = 0.0
    usual: float = 1.0


ASPECTS = (  # points and chances are ours
    Aspect(name="use", verb="treats", points=8,
           values=("swollen painful joints", "stubborn nightly cough", "recurrent bladder infection")),
    Aspect(name="dose", verb="is taken as", points=8,
           values=("two capsules after breakfast", "one drop under tongue", "five millilitres before sleep")),
    Aspect(name="limit", verb="harms people with", points=8,
           values=("slow kidney clearance", "fatty liver disease", "weak heart valves")),
    Aspect(name="meeting", verb="clashes with", points=8,
           values=("oral blood thinners", "grapefruit juice drinks", "strong iron tablets")),
    Aspect(name="alarm", verb="requires care at", points=8,
           values=("sudden facial swelling", "yellow tinted eyes", "dark watery stools")),
    Aspect(name="course", verb="is continued for", points=4, usual=0.85,
           values=("three full weeks", "ten short days", "half one year")),
    Aspect(name="check", verb="is followed by", points=4, usual=0.7,
           values=("monthly urine tests", "yearly eye exams", "weekly weight records")),
    Aspect(name="effect", verb="often causes", points=4, usual=0.55,
           values=("mild dry mouth", "vivid long dreams", "passing skin itch")),
    Aspect(name="colour", verb="looks", values=("blue", "orange", "white")),
    Aspect(name="origin", verb="comes from", values=("Lund", "Turin", "Porto")),
    Aspect(name="age", verb="dates from", values=("1954", "1978", "2003")),
    Aspect(name="smell", verb="smells of", values=("mint", "sulphur", "vanilla")),
)  # fmt: skip
CORE = tuple(index for index, aspect in enumerate(ASPECTS) if aspect.points)
VALUES = 3
NOTHING_KNOWN = 0.4  # ours: of the questions where the usual value does not hold
WRONG_VERDICTS = 0.1  # ours: share of peripheral wordings
FACTS = tuple(f"{aspect.name}-{letter}" for aspect in ASPECTS for letter in "abc")
BEGIN, ASKS, STATES, ADDS, RESTATES, END = range(6)
SPECIAL = ("<s>", "asks", "states", "adds", "restates", "end")
WORDS = (*SPECIAL, *MEDICINES, *AGES, *CONDITIONS, *FACTS)
FIRST_FACT = len(WORDS) - len(FACTS)
OPENING, STEP = 5, 2  # tokens of a question, and of a step
MAX_STEPS = 16  # ours: 12 facts are true at most, and each can be said in two ways
HELD_OUT = 4  # one question in so many, by content, is never trained on


def _share(text: str) -> float:
    """A number in [0, 1) that follows from a text."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=6).digest(), "little") / 2**48


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
    """What a patient of an age (0 to 3) with a condition asks about a medicine: all that should be known."""

    medicine: int
    age: int
    condition: int

    @property
    def id(self) -> str:
        return f"{MEDICINES[self.medicine]}-{AGES[self.age]}-{CONDITIONS[self.condition]}"

    @property
    def opening(self) -> tuple[int, ...]:
        first = len(SPECIAL)
        age = first + len(MEDICINES) + self.age
        return BEGIN, ASKS, first + self.medicine, age, first + len(MEDICINES) + len(AGES) + self.condition

    @property
    def held_out(self) -> bool:
        return _share(f"held out {self.id}") < 1 / HELD_OUT

    @property
    def truth(self) -> tuple[int | None, ...]:
        """The true value of each aspect; None: nothing is known."""
        return _truth(self)


def usual_value(medicine: int, aspect: int) -> int:
    """What holds for a medicine as a rule."""
    return int(_share(f"{MEDICINES[medicine]} {ASPECTS[aspect].name}") * VALUES)


@functools.cache
def _truth(question: Question) -> tuple[int | None, ...]:
    found: list[int | None] = []
    for index, aspect in enumerate(ASPECTS):
        usual = usual_value(question.medicine, index)
        left = (_share(f"{question.id} {aspect.name}") - aspect.usual) / max(1 - aspect.usual, 1e-9)
        if left < 0:
            found.append(usual)
        elif left < NOTHING_KNOWN:
            found.append(None)
        else:
            found.append((usual + 1 + int((left - NOTHING_KNOWN) / (1 - NOTHING_KNOWN) * (VALUES - 1))) % VALUES)
    return tuple(found)


def every_question(*, held_out: bool) -> list[Question]:
    """All questions that are held out, or all others."""
    found = (
        Question(medicine=medicine, age=age, condition=condition)
        for medicine in range(len(MEDICINES))
        for age in range(len(AGES))
        for condition in range(len(CONDITIONS))
    )
    return [question for question in found if question.held_out == held_out]


# -- answers ----------------------------------------------------------------------------------------------------------
Step = tuple[int, int]  # a manner and a fact, as tokens


def said(steps: Sequence[Step]) -> list[tuple[int, int, int]]:
    """(manner, aspect, value) of the steps that claim something."""
    return [
        (manner, *divmod(fact - FIRST_FACT, VALUES))
        for manner, fact in steps
        if manner in (STATES, ADDS, RESTATES) and FIRST_FACT <= fact < len(WORDS)
    ]


def is_cut(steps: Sequence[Step]) -> bool:
    """Whether the last step ends an answer: its words were said before, or it claims nothing."""
    worded = [(manner == RESTATES, aspect, value) for manner, aspect, value in said(steps)]
    return len(set(worded)) < len(steps) or len(steps) >= MAX_STEPS


def wording(medicine: int, aspect: int, value: int, *, restated: bool = False) -> str:
    """A claim as a sentence."""
    name, about = MEDICINES[medicine].capitalize(), ASPECTS[aspect]
    told = about.values[value]
    return f"{told[0].upper()}{told[1:]} is what {name} {about.verb}." if restated else f"{name} {about.verb} {told}."


def response(question: Question, steps: Sequence[Step]) -> str:
    """An answer in English."""
    sentences: list[str] = []
    for manner, aspect, value in said(steps):
        if manner == ADDS and sentences:
            about = ASPECTS[aspect]
            sentences[-1] = f"{sentences[-1][:-1]}, and {about.verb} {about.values[value]}."
        else:
            sentences.append(wording(question.medicine, aspect, value, restated=manner == RESTATES))
    return " ".join(sentences)


def exact_label(question: Question, aspect: int, value: int) -> Label:
    """By the table."""
    true = question.truth[aspect]
    return Label.uncertain if true is None else Label.supported if true == value else Label.refuted


def verdicts(question: Question, steps: Sequence[Step], *, wrong: float = WRONG_VERDICTS) -> list[FactVerdict]:
    """One of each wording, in order, by the verifier of training, ``wrong`` of whose peripheral verdicts are wrong:
    uncertain for supported, supported for refuted."""
    found: dict[str, Label] = {}
    for manner, aspect, value in said(steps):
        claim = wording(question.medicine, aspect, value, restated=manner == RESTATES)
        label = exact_label(question, aspect, value)
        if aspect not in CORE and _share(f"verdict {question.id} {claim}") < wrong:
            label = Label.uncertain if label == Label.supported else Label.supported
        found.setdefault(claim, label)
    return [FactVerdict(claim=claim, label=label, verifier="table") for claim, label in found.items()]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score:
    """What an answer is worth, by the exact table. Claims are distinct facts, however often they are said.

    Args:
        reward: R_task, Eq 1 in [0, 1].
        claims, false: distinct facts, and those that are refuted or uncertain.
        core, core_false: of core aspects alone.
        recall: share of the clauses that are met, unweighted.
        repeats: steps that say a fact again, mostly in other words. steps: all of them.
    """

    reward: float
    claims: int
    false: int
    core: int
    core_false: int
    recall: float
    repeats: int
    steps: int


def score(question: Question, steps: Sequence[Step]) -> Score:
    """The score of an answer."""
    claimed = said(steps)
    facts = {(aspect, value) for _, aspect, value in claimed}
    false = {fact for fact in facts if exact_label(question, *fact) != Label.supported}
    asked = [aspect for aspect in CORE if question.truth[aspect] is not None]
    met = [(aspect, question.truth[aspect]) in facts for aspect in asked]
    return Score(
        reward=rubric_reward([ASPECTS[aspect].points for aspect in asked], met),
        claims=len(facts),
        false=len(false),
        core=sum(aspect in CORE for aspect, _ in facts),
        core_false=sum(aspect in CORE for aspect, _ in false),
        recall=sum(met) / len(met),
        repeats=len(claimed) - len(facts),
        steps=len(steps),
    )


EMBEDDER = LexicalEmbedder()


def fact_reward(
    question: Question, steps: Sequence[Step], task_reward: float, config: fact_aware.Config | None = None
) -> fact_aware.FactReward:
    """The fact-aware reward of an answer, and Eq 9's, by the verdicts of training."""
    return fact_aware.fact_reward(response(question, steps), verdicts(question, steps), EMBEDDER, task_reward, config)


def text(ids: Sequence[int]) -> str:
    """Tokens as words."""
    return " ".join(WORDS[one] if 0 <= one < len(WORDS) else f"?{one}" for one in ids)


# -- scripted writers -------------------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True, kw_only=True)
class Habits:
    """How a scripted writer answers, who knows what is usual for the medicine and no more; mediocre by default. Ours.

    Args:
        cover: chance of each core aspect.
        accuracy: chance that the usual value is named; otherwise any other.
        second: chance that another value of the aspect follows.
        asides: chance that a sentence has a peripheral fact added. restate: that a core fact is said again.
        least: aspects whose usual value is less likely to hold are left out.
    """

    cover: float = 0.65
    accuracy: float = 0.95
    second: float = 0.05
    asides: float = 0.35
    restate: float = 0.05
    least: float = 0.0

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if not 0 <= value <= 1:
                raise refuse("Habits", name, "a number in [0, 1]", value)


def good(least: float) -> Habits:
    """Names the usual value of each core aspect where it holds with a chance of ``least`` or more, and nothing else."""
    return Habits(cover=1.0, accuracy=1.0, second=0.0, asides=0.0, restate=0.0, least=least)


def write(question: Question, habits: Habits, chance: random.Random) -> list[Step]:
    """The steps of an answer by a scripted writer, at most MAX_STEPS."""
    steps: list[Step] = []
    aspects = [aspect for aspect in CORE if ASPECTS[aspect].usual >= habits.least and chance.random() < habits.cover]
    asides = [aspect for aspect in range(len(ASPECTS)) if aspect not in CORE]
    chance.shuffle(asides)
    for aspect in aspects:
        fact = _named(question, aspect, habits, chance)
        steps.append((STATES, fact))
        if asides and chance.random() < habits.asides:
            steps.append((ADDS, _named(question, asides.pop(), habits, chance)))
        if chance.random() < habits.second:
            other = fact - FIRST_FACT - VALUES * aspect + 1 + chance.randrange(VALUES - 1)
            steps.append((STATES, FIRST_FACT + VALUES * aspect + other % VALUES))
        if chance.random() < habits.restate:
            steps.append((RESTATES, fact))
    return steps[:MAX_STEPS]


def _named(question: Question, aspect: int, habits: Habits, chance: random.Random) -> int:
    """The token of the fact that the writer takes for true."""
    value = usual_value(question.medicine, aspect)
    if chance.random() >= habits.accuracy:
        value = (value + 1 + chance.randrange(VALUES - 1)) % VALUES
    return FIRST_FACT + VALUES * aspect + value


def tokens(question: Question, steps: Sequence[Step]) -> list[int]:
    """Question and answer; the word "end" where it was not cut off."""
    flat = [token for step in steps for token in step]
    return [*question.opening, *flat, *([] if is_cut(steps) else [END])]
