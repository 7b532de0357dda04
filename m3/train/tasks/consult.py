"""A consultation small enough to be scored exactly: made-up conditions, yes-or-no findings, a patient who only answers.

    patient    <s> complains cough
    physician  please sputum        patient  yes
    physician  state fever          patient  no
    physician  diagnosis cough-yn

Words are single tokens. A step is two of the physician's tokens and the patient's answer; a diagnosis ends it. The
medicine is made up: a department has four topics, a topic is a stem finding and three details, the last a red flag. The
patient complains of one topic. Its first detail and the stem of the next topic (in a circle) decide the condition:
``cough-yn`` is cough with sputum and without chest-pain. All other findings are drawn, a detail only where its stem is.

Reward: Eq 1 (rubric.rubric_reward) over the case's checklist; see ``checklist``. A step violates, by rule:

    redundant_question  asks for what the patient has told
    illogical_order     a detail whose stem is not known to be there, a topic that was left before, words that are no
                        question
    safety_risk         a diagnosis before the red flag of the complaint was asked for
    rigid_phrasing      "state" instead of "please"

Source: the names and Eq 1 are those of Baichuan-M3, arXiv 2602.06570; the task is ours.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import random
from collections.abc import Mapping, Sequence

from m3.rewards.rubric import rubric_reward
from m3kernels.checks import refuse

DEPARTMENTS = ("chest", "belly")
TOPICS: tuple[tuple[tuple[str, str, str, str], ...], ...] = (  # stem, two details, red flag; by department
    (
        ("cough", "sputum", "wheeze", "blood-sputum"),
        ("chest-pain", "pressing", "pleuritic", "radiating"),
        ("breathless", "orthopnoea", "swelling", "at-rest"),
        ("fever", "chills", "sweats", "rash"),
    ),
    (
        ("belly-pain", "cramping", "after-meals", "rigid-belly"),
        ("vomiting", "bile", "undigested", "blood-vomit"),
        ("diarrhoea", "mucus", "travel", "blood-stool"),
        ("jaundice", "itch", "dark-urine", "confusion"),
    ),
)
PER_TOPIC, TOPIC_COUNT = 4, 4
RED_FLAG = 3  # its place in a topic
FINDINGS = tuple(word for department in TOPICS for topic in department for word in topic)
CONDITIONS = tuple(
    f"{topic[0]}-{'yn'[1 - first]}{'yn'[1 - second]}"
    for department in TOPICS
    for topic in department
    for first in (0, 1)
    for second in (0, 1)
)
BEGIN, COMPLAINS, PLEASE, STATE, DIAGNOSIS, YES, NO, PARDON = range(8)
SPECIAL = ("<s>", "complains", "please", "state", "diagnosis", "yes", "no", "pardon")
WORDS = (*SPECIAL, *FINDINGS, *CONDITIONS)
FIRST_FINDING, FIRST_CONDITION = len(SPECIAL), len(SPECIAL) + len(FINDINGS)
OPENING = 3  # tokens before the first step
STEP = 3  # tokens of a step with its answer
MAX_TURNS = 20  # ours: the most that can be worth asking is 15 questions
STEM_SHARE, DETAIL_SHARE = 0.4, 0.5  # ours: chance of a stem, and of a detail where its stem is
HELD_OUT = 4  # one case in so many, by content, is never trained on


@dataclasses.dataclass(frozen=True, kw_only=True)
class Points:
    """Weights of the checklist (Eq 1), all ours: the complaint weighs most; not to be rightly diagnosed costs."""

    detail: float = 3.0
    red_flag: float = 5.0
    stem: float = 2.0  # of the other topics
    further: float = 1.0  # details of the other topics whose stem is there
    diagnosis: float = 10.0
    wrong: float = -5.0  # or none at all: else a bad guesser learns to give none


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """``complaint``: topic, 0 to 3. ``values``: the department's 16 findings, in the order of TOPICS."""

    department: int
    complaint: int
    values: tuple[bool, ...]

    @property
    def id(self) -> str:
        return f"{DEPARTMENTS[self.department]}-{self.complaint}-{''.join('01'[one] for one in self.values)}"

    @property
    def condition(self) -> int:
        """Token of the right diagnosis."""
        base = FIRST_CONDITION + 4 * (TOPIC_COUNT * self.department + self.complaint)
        first, second = deciding(self.complaint)
        return base + 2 * self.values[first] + self.values[second]

    @property
    def first_finding(self) -> int:
        """Token of the department's first finding."""
        return FIRST_FINDING + len(self.values) * self.department

    @property
    def opening(self) -> tuple[int, int, int]:
        return BEGIN, COMPLAINS, self.first_finding + PER_TOPIC * self.complaint

    @property
    def held_out(self) -> bool:
        return hashlib.blake2b(self.id.encode(), digest_size=4).digest()[0] % HELD_OUT == 0


def deciding(complaint: int) -> tuple[int, int]:
    """Places among the 16 of the two findings that decide the condition."""
    return PER_TOPIC * complaint + 1, PER_TOPIC * ((complaint + 1) % TOPIC_COUNT)


def draw_case(chance: random.Random, *, held_out: bool = False, department: str | None = None) -> Case:
    """A case of a department (None: of any), trained on or held out."""
    if department is not None and department not in DEPARTMENTS:
        raise refuse("draw_case", "department", f"of {DEPARTMENTS}", repr(department))
    while True:
        place = chance.randrange(2) if department is None else DEPARTMENTS.index(department)
        complaint = chance.randrange(TOPIC_COUNT)
        values: list[bool] = []
        for topic in range(TOPIC_COUNT):
            stem = topic == complaint or chance.random() < STEM_SHARE
            values += [stem, *(stem and chance.random() < DETAIL_SHARE for _ in range(PER_TOPIC - 1))]
        case = Case(department=place, complaint=complaint, values=tuple(values))
        if case.held_out == held_out:
            return case


def draw_cases(count: int, seed: str, *, held_out: bool = False, department: str | None = None) -> list[Case]:
    """Different cases."""
    chance, found = random.Random(seed), dict[str, Case]()
    while len(found) < count:
        case = draw_case(chance, held_out=held_out, department=department)
        found.setdefault(case.id, case)
    return list(found.values())


def checklist(case: Case, points: Points | None = None) -> dict[int, float]:
    """Points of each finding worth asking for, by its place among the 16; what was told at the start is not."""
    points = points or Points()
    found: dict[int, float] = {}
    for topic in range(TOPIC_COUNT):
        stem = PER_TOPIC * topic
        if topic != case.complaint:
            found[stem] = points.stem
        for detail in range(1, PER_TOPIC) if case.values[stem] else ():
            mine = points.red_flag if detail == RED_FLAG else points.detail
            found[stem + detail] = mine if topic == case.complaint else points.further
    return found


def kind(case: Case, place: int) -> str:
    """Of a finding on the checklist: a name of Points."""
    topic, detail = divmod(place, PER_TOPIC)
    if topic == case.complaint:
        return "red_flag" if detail == RED_FLAG else "detail"
    return "further" if detail else "stem"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score:
    """What came of a consultation.

    Args:
        reward: Eq 1 in [0, 1], unpenalised.
        violations: of each step.
        diagnosed: rightly or not; None: no diagnosis was given.
        coverage: share of the points for questions that was reached. asked: share of the findings that were asked for,
            by kind; kinds that the case's checklist has.
    """

    reward: float
    violations: tuple[tuple[str, ...], ...]
    diagnosed: bool | None
    coverage: float
    asked: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def turns(self) -> int:
        return len(self.violations)

    def clean(self, name: str) -> float:
        """Share of the steps that do not violate it: of "redundant_question" the paper's repeat score, and so on."""
        return 1.0 - sum(name in step for step in self.violations) / max(self.turns, 1)


class Consultation:
    """One under way: ``act`` with the physician's two tokens until ``done``."""

    def __init__(self, case: Case, *, points: Points | None = None, max_turns: int = MAX_TURNS) -> None:
        self.case, self.points, self.max_turns = case, points or Points(), max_turns
        self.told: dict[int, bool] = {PER_TOPIC * case.complaint: True}  # by place among the 16
        self.topic, self.left = case.complaint, set[int]()
        self.violations: list[tuple[str, ...]] = []
        self.diagnosed: bool | None = None
        self.done = False

    def act(self, first: int, second: int) -> int | None:
        """The patient's token; None: it was a diagnosis. ``violations`` has one entry more.

        Raises:
            ValueError: the consultation is over.
        """
        if self.done:
            raise refuse("Consultation.act", "first", "a step of a consultation under way", "one after its end")
        answer, found = self._answer(first, second)
        self.violations.append(tuple(found))
        self.done = answer is None or len(self.violations) >= self.max_turns
        return answer

    def score(self) -> Score:
        worth = checklist(self.case, self.points)
        asked = [place in self.told for place in worth]
        ending = (self.points.diagnosis, self.points.wrong)
        reward = rubric_reward((*worth.values(), *ending), (*asked, self.diagnosed is True, self.diagnosed is not True))
        reached = sum(value for value, is_asked in zip(worth.values(), asked, strict=True) if is_asked)
        kinds: dict[str, list[bool]] = collections.defaultdict(list)
        for place in worth:
            kinds[kind(self.case, place)].append(place in self.told)
        return Score(
            reward=reward,
            violations=tuple(self.violations),
            diagnosed=self.diagnosed,
            coverage=reached / sum(worth.values()),
            asked={name: sum(some) / len(some) for name, some in kinds.items()},
        )

    def _answer(self, first: int, second: int) -> tuple[int | None, list[str]]:
        """(the patient's token, what the step violates)."""
        if first == DIAGNOSIS and FIRST_CONDITION <= second < len(WORDS):
            self.diagnosed = second == self.case.condition
            flag = PER_TOPIC * self.case.complaint + RED_FLAG
            return None, [] if flag in self.told else ["safety_risk"]
        place = second - self.case.first_finding
        if first not in (PLEASE, STATE) or not FIRST_FINDING <= second < FIRST_CONDITION:
            return PARDON, ["illogical_order"]
        found = ["rigid_phrasing"] if first == STATE else []
        if not 0 <= place < len(self.case.values):  # of another department: nobody has it
            return NO, [*found, "illogical_order"]
        if place in self.told:
            found.append("redundant_question")
        elif self._out_of_order(place):
            found.append("illogical_order")
        self.told[place] = self.case.values[place]
        return (YES if self.told[place] else NO), found

    def _out_of_order(self, place: int) -> bool:
        """Whether a question not asked before comes at a bad moment; it is the topic now."""
        topic, detail = divmod(place, PER_TOPIC)
        returned = topic in self.left
        if topic != self.topic:
            self.left.add(self.topic)
            self.topic = topic
        return returned or (detail > 0 and not self.told.get(PER_TOPIC * topic, False))


def text(ids: Sequence[int]) -> str:
    """Tokens as words."""
    return " ".join(WORDS[one] if 0 <= one < len(WORDS) else f"?{one}" for one in ids)


# -- scripted physicians ----------------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True, kw_only=True)
class Habits:
    """How well a scripted physician works; the defaults are mediocre in all things. All ours.

    Args:
        repeat: chance that a question is one that was asked already.
        jump: chance of a finding at random instead of what the topic at hand leaves to be asked.
        rigid: chance of "state".
        stop: chance to stop after a step, from the third one on.
        care: chance that the diagnosis is one of those that the answers allow; otherwise any of the complaint's four.
    """

    repeat: float = 0.2
    jump: float = 0.3
    rigid: float = 0.5
    stop: float = 0.15
    care: float = 0.9


GOOD = Habits(repeat=0.0, jump=0.0, rigid=0.0, stop=0.0, care=1.0)


def consult(case: Case, habits: Habits, chance: random.Random) -> tuple[list[int], Score]:
    """(tokens, score) of a consultation by a scripted physician."""
    now, ids = Consultation(case), list(case.opening)
    while not now.done:
        first, second = _scripted(now, habits, chance)
        answer = now.act(first, second)
        ids += [first, second] if answer is None else [first, second, answer]
    return ids, now.score()


def _scripted(now: Consultation, habits: Habits, chance: random.Random) -> tuple[int, int]:
    case, turn = now.case, len(now.violations)
    left = _to_ask(now)
    if not left or turn >= now.max_turns - 1 or (turn >= 2 and chance.random() < habits.stop):
        return DIAGNOSIS, _diagnosis(now, habits, chance)
    manner = STATE if chance.random() < habits.rigid else PLEASE
    if chance.random() < habits.repeat:
        place = chance.choice(sorted(now.told))
    elif chance.random() < habits.jump:
        place = chance.randrange(len(case.values))
    else:
        place = left[0]
    return manner, case.first_finding + place


def _to_ask(now: Consultation) -> list[int]:
    """What is worth asking, as far as is known: the rest of the topic at hand, then other topics in order."""
    topics = sorted(range(TOPIC_COUNT), key=lambda topic: (topic != now.topic, topic in now.left, topic))
    found = []
    for topic in topics:
        stem = PER_TOPIC * topic
        known = now.told.get(stem)
        if known is None:
            found.append(stem)
        elif known:
            found += [place for place in range(stem + 1, stem + PER_TOPIC) if place not in now.told]
    return found


def _diagnosis(now: Consultation, habits: Habits, chance: random.Random) -> int:
    case = now.case
    base = case.condition - (case.condition - FIRST_CONDITION) % 4
    careful = chance.random() < habits.care
    bits = [
        int(now.told[place]) if careful and place in now.told else chance.randrange(2)
        for place in deciding(case.complaint)
    ]
    return base + 2 * bits[0] + bits[1]
