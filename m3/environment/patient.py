"""The scripted patient: passive, deterministic, grounded in a case's atomic facts. No language model.

It answers what was asked and nothing else; each thing it says is a fact in the case's own words or one of the fillers
below, which carry no clinical content. Asked what no fact answers it says that it does not know, never "no": a denial
would be an invention. It never tells a diagnosis, findings of an examination, or what a checklist wants. How it is
asked for facts: asking.py; a check of any patient's words against the facts: ledger.py.

A persona changes how much is said at a time, never what is true: a terse patient tells few facts a turn, a talkative
one adds a fact of the same topic, patchy recall needs asking twice, an anxious one says so. Source of the behaviour
(passive, answers only): Baichuan-M3, arXiv 2602.06570, on the patient simulator; every number here is ours.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence

from m3.environment.asking import Ask, AskKind, asked
from m3.environment.case import Case, Disclosure, Fact, Phase
from m3.environment.ledger import Ledger, LedgerEntry
from m3.environment.trajectory import Message
from m3kernels.checks import refuse

__all__ = ["AGAIN", "FILLERS", "Ledger", "LedgerEntry", "PatientConfig", "ScriptedPatient"]

AGAIN = "As I said: "  # before a fact that was told already
FILLERS = {  # everything that is said without being a fact
    "unknown": ("I don't know, sorry.", "I'm not sure about that.", "I couldn't tell you."),
    "forgotten": ("I can't remember just now.", "I'd have to think about that."),
    "nothing_more": ("I can't think of anything else.", "That's all I can think of."),
    "statement": ("All right.", "Okay, doctor.", "I see."),
    "courtesy": ("That's fine, doctor.", "Yes, of course."),
    "machine": ("I don't understand what you mean.", "Sorry, I don't follow."),
    "examination": ("You'd have to check that yourself, doctor.",),
    "too_many": ("That's a lot at once.", "One thing at a time, please."),
    "anxious": ("I just want to know what this is, doctor.", "Sorry, it is all I think about."),
    "gone": ("I have to leave now.",),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PatientConfig:
    """Numbers of the scripted patient; all ours: the papers give none.

    ``facts_a_turn``: most facts asked for that are told in one message, by verbosity (about what people answer before
    they lose count); ``open_facts``: most facts told to one open question. ``patience``: messages in a row that get
    nothing new out of the patient until it leaves.
    """

    facts_a_turn_terse: int = 2
    facts_a_turn_plain: int = 5
    facts_a_turn_talkative: int = 6
    open_facts: int = 3
    open_facts_terse: int = 1
    forget: float = 0.3  # share of facts that patchy recall brings back at the second asking only
    anxious_high: float = 0.3  # share of messages in which an anxious patient says so
    anxious_medium: float = 0.1
    patience: int = 8

    def __post_init__(self) -> None:
        for name in ("forget", "anxious_high", "anxious_medium"):
            if not 0 <= getattr(self, name) <= 1:
                raise refuse("PatientConfig", name, "a share in [0, 1]", getattr(self, name))
        for field in ("facts_a_turn_terse", "facts_a_turn_plain", "facts_a_turn_talkative", "open_facts", "patience"):
            if getattr(self, field) < 1:
                raise refuse("PatientConfig", field, "an integer >= 1", getattr(self, field))

    def facts_a_turn(self, verbosity: str) -> int:
        """Most facts asked for that one message tells."""
        return {"terse": self.facts_a_turn_terse, "talkative": self.facts_a_turn_talkative}.get(
            verbosity, self.facts_a_turn_plain
        )


@dataclasses.dataclass
class _State:
    """What was heard and said so far; a function of the physician's messages alone."""

    heard: list[str]
    told: set[str]
    forgotten: set[str]
    idle: int = 0


@dataclasses.dataclass
class _Turn:
    """One answer in the making: pieces with a reason each, and the facts they tell."""

    pieces: list[str]
    why: list[str]
    facts: list[str]
    fresh: int = 0  # facts told that were asked for and not told before

    def add(self, text: str, why: str, fact: str = "") -> None:
        self.pieces.append(text)
        self.why.append(why)
        if fact:
            self.facts.append(fact)


class ScriptedPatient:
    """The patient of a case.

    Its answer is a function of the case, the seed and the physician's messages: it can be asked about any dialogue, one
    that another client kept included; a dialogue that goes on from the last one costs only its new message.
    """

    def __init__(self, case: Case, *, seed: int, config: PatientConfig | None = None) -> None:
        self.case, self.seed, self.config = case, seed, config or PatientConfig()
        self._state = self._begin()

    async def open(self) -> Message:
        """The opening line, turn 0."""
        return self.opening()

    async def answer(self, messages: Sequence[Message]) -> Message:
        """The answer to the physician's last message; see ``reply``."""
        return self.reply(messages)

    def opening(self) -> Message:
        """The opening line, turn 0."""
        return Message(
            role="user",
            content=self.case.opening_line,
            turn=0,
            phase=Phase.inquiry,
            facts=self.case.opening_facts,
            why=("opening line",),
        )

    def reply(self, messages: Sequence[Message]) -> Message:
        """The answer to the physician's last message.

        ``why`` has a reason for each thing said, a fact or a filler, in order. ``meta["gone"]`` is true when the
        patient leaves.

        Raises:
            ValueError: the last message is not the physician's.
        """
        if not messages or messages[-1].role != "assistant":
            got = messages[-1].role if messages else "no message"
            raise refuse("ScriptedPatient.reply", "messages", "a dialogue that ends with the physician", got)
        texts = [message.content for message in messages if message.role == "assistant"]
        if self._state.heard != texts[:-1]:
            self._state = self._begin()
            for text in texts[:-1]:
                self._say(text)
        turn = self._say(texts[-1])
        gone = self._state.idle >= self.config.patience
        return Message(
            role="user",
            content=" ".join(turn.pieces),
            turn=messages[-1].turn + 1,
            phase=Phase.inquiry,
            facts=tuple(turn.facts),
            why=tuple(turn.why),
            meta={"gone": True} if gone else {},
        )

    # -- one answer ---------------------------------------------------------------------------------------------------
    def _begin(self) -> _State:
        return _State([], set(self.case.opening_facts), set())

    def _random(self, *about: str | int) -> random.Random:
        return random.Random("/".join(map(str, (self.seed, self.case.id, *about))))

    def _filler(self, turn: _Turn, kind: str) -> None:
        choices = FILLERS[kind]
        at = self._random("filler", len(self._state.heard), kind).randrange(len(choices)) if len(choices) > 1 else 0
        if choices[at] not in turn.pieces:
            turn.add(choices[at], f"filler: {kind}")

    def _say(self, text: str) -> _Turn:
        state, turn = self._state, _Turn([], [], [])
        asks = asked(self.case, text)
        self._answer(asks, turn)
        if any(ask.kind != AskKind.machine for ask in asks):
            self._volunteer(turn, asks)
        if not turn.pieces:
            self._filler(turn, "statement")
        share = {"high": self.config.anxious_high, "medium": self.config.anxious_medium}.get(
            self.case.persona.anxiety, 0
        )
        if share and self._random("anxious", len(state.heard)).random() < share:
            self._filler(turn, "anxious")
        state.idle = 0 if turn.fresh or "filler: forgotten" in turn.why else state.idle + 1
        if state.idle >= self.config.patience:
            self._filler(turn, "gone")
        state.heard.append(text)
        state.told.update(turn.facts)
        return turn

    def _answer(self, asks: Sequence[Ask], turn: _Turn) -> None:
        """Tell what was asked for, as much as fits in one message; fillers for the rest."""
        new: dict[str, str] = {}
        known: dict[str, str] = {}
        kinds: list[str] = []
        for ask in asks:
            if filler := self._sort(ask, new, known):
                kinds.append(filler)
        room = self.config.facts_a_turn(self.case.persona.verbosity)
        forgotten = [one for one in new if self._forgets(one)]
        self._state.forgotten.update(forgotten)
        remembered = [one for one in new if one not in forgotten]
        for one in remembered[:room]:
            turn.add(self.case.fact[one].said, f"fact {one}: {new[one]}", one)
            turn.fresh += 1
        if not remembered:
            for one in list(known)[:room]:
                turn.add(AGAIN + self.case.fact[one].said, f"again {one}: {known[one]}", one)
        if forgotten:
            self._filler(turn, "forgotten")
        if len(remembered) > room:
            self._filler(turn, "too_many")
        for kind in dict.fromkeys(kinds):
            self._filler(turn, kind)

    def _sort(self, ask: Ask, new: dict[str, str], known: dict[str, str]) -> str | None:
        """Put the facts of one question to those to tell or those told already; the filler it gets otherwise."""
        terse = self.case.persona.verbosity == "terse"
        most = self.config.open_facts_terse if terse else self.config.open_facts
        topical = examined = 0
        pairs = list(zip(ask.fact_ids, ask.reasons, strict=True))
        if ask.kind in (AskKind.general, AskKind.more):
            pairs = [(fact.id, str(ask.kind)) for fact in self.case.facts if fact.disclosure == Disclosure.volunteer]
            if ask.kind == AskKind.general:
                pairs += [(one, str(ask.kind)) for one in self.case.opening_facts if (one, str(ask.kind)) not in pairs]
        again: dict[str, str] = {}
        for one, why in pairs:
            if self.case.fact[one].section == "exam":
                examined += 1
            elif one in self._state.told:
                again[one] = why
            elif not why.startswith("topic") or topical < most:
                topical += why.startswith("topic")
                new.setdefault(one, why)
            else:
                continue
        if ask.kind == AskKind.more:
            again.clear()
        if any(one in new for one, _ in pairs):
            return None  # something new was told: no need to say the old again
        known.update(again)
        if again:
            return None
        if examined:
            return "examination"
        return {AskKind.more: "nothing_more", AskKind.courtesy: "courtesy", AskKind.machine: "machine"}.get(
            ask.kind, "unknown"
        )

    def _forgets(self, one: str) -> bool:
        """Whether a fact does not come back at its first asking."""
        fact = self.case.fact[one]
        if self.case.persona.recall != "patchy" or fact.disclosure == Disclosure.volunteer:
            return False
        return one not in self._state.forgotten and self._random("recall", one).random() < self.config.forget

    def _volunteer(self, turn: _Turn, asks: Sequence[Ask]) -> None:
        """With the first question the facts that need none; a talkative patient adds one of the same topic."""
        said = self._state.told.union(turn.facts)
        for fact in self.case.facts:
            if fact.disclosure == Disclosure.volunteer and fact.id not in said and fact.section != "exam":
                turn.add(fact.said, f"fact {fact.id}: volunteered", fact.id)
        if self.case.persona.verbosity != "talkative" or not turn.fresh:
            return
        topics = {topic for one in turn.facts for topic in self.case.fact[one].keywords}
        asked_for = {one for ask in asks for one in ask.fact_ids}
        if extra := next((fact for fact in self.case.facts if self._adds(fact, topics, said | asked_for)), None):
            turn.add(extra.said, f"fact {extra.id}: volunteered on the same topic", extra.id)

    def _adds(self, fact: Fact, topics: set[str], said: set[str]) -> bool:
        return (
            fact.disclosure == Disclosure.on_ask
            and fact.section != "exam"
            and fact.id not in said
            and not topics.isdisjoint(fact.keywords)
        )
