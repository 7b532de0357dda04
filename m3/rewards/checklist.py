"""A case's checklist judged by rules: which items a consultation met, where, and Eq 1 over them. No language model.

- must_ask: the patient *told* one of the item's facts as an answer to a question that asks for it. Of one message of
  the physician the first few things asked for earn credit, and each beyond so many takes one back: a dumped list earns
  nothing, whether of questions or in one question. One that recites a criterion or a fact of the case is none, and
  statements never earn. A fact that the patient adds to such an answer counts too, one a message. Items whose facts all
  stand in the opening line or are volunteered are *given*: they cost and earn nothing. Without facts, an item is met by
  a question with its keys.
- must_do: a sentence of the physician in the item's stage has all words of one of its keys and no negation just before
  them. Reciting the checklist's own criterion is not doing it, and after the inquiry asking is not doing.
- must_not, veto: likewise, statements only where the stage is not the inquiry; a recited criterion counts here.

Value: Eq 1 (rubric.rubric_reward) over items that are not given, met or committed being a_i = 1. A committed veto makes
the score 0, whatever the value. Of lists, only as many lines as a stage's instruction invites are read for credit, and
of a line only its first words.

Source of level, dimension and Eq 1: Baichuan-M3, arXiv 2602.06570 (ScanBench, rubric verifier); the rules are ours.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TypeVar

from m3.environment.asking import AskKind, asked, is_request, things
from m3.environment.case import Case, ChecklistItem, Disclosure, Phase
from m3.environment.lay_terms import means, stem, tokens, ways
from m3.environment.ledger import Ledger
from m3.environment.trajectory import Message, Trajectory
from m3.rewards.rubric import rubric_reward
from m3.rewards.verdict import UnjudgedError
from m3.text.words import NEGATIONS, sentences, stems, words
from m3kernels.checks import refuse

Group = TypeVar("Group")
_SCOPE = 5  # ours: words before a key in which a negation turns it ("I don't think you need to ...")
_ORDERED = tokens("order request")  # what every line of an order says


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChecklistConfig:
    """Limits of credit; all ours."""

    max_asks_per_turn: int = 4  # facts asked for in one message that can earn credit: two short questions name so many
    max_extras_per_turn: int = 1  # facts told beside an answer that can earn credit
    differential_lines: int = 10  # as stages.INSTRUCTIONS says
    order_lines: int = 12  # more tests than any case has essential and optional ones
    advice_sentences: int = 20
    line_words: int = 16  # of a line of the differential or of the orders: a name and a short reason
    advice_words: int = 40  # of a sentence

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < 0:
                raise refuse("ChecklistConfig", field.name, "an integer >= 0", getattr(self, field.name))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ItemScore:
    """Of one item. ``met`` of a negative item: it was committed. ``turn`` and ``evidence``: where, if met."""

    item: ChecklistItem
    met: bool
    given: bool = False
    turn: int | None = None
    evidence: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CoverageScore:
    """``value``: Eq 1 in [0, 1]; ``score``: 0 where a veto was committed, else ``value``.

    ``by_level``, ``by_dimension``, ``by_section``: share of the positive items met, by count; only groups that have
    items. ``vetoed``: ids of committed vetoes.
    """

    value: float
    items: tuple[ItemScore, ...]
    by_level: Mapping[int, float]
    by_dimension: Mapping[str, float]
    by_section: Mapping[str, float]
    vetoed: tuple[str, ...] = ()

    @property
    def score(self) -> float:
        """The value, or 0 after a veto."""
        return 0.0 if self.vetoed else self.value

    @property
    def met(self) -> tuple[str, ...]:
        """Ids of items met or committed."""
        return tuple(one.item.id for one in self.items if one.met)


def coverage(
    case: Case,
    trajectory: Trajectory,
    *,
    phases: Collection[Phase] | None = None,
    config: ChecklistConfig | None = None,
) -> CoverageScore:
    """The checklist's items of some stages, judged on a consultation.

    Args:
        case: the case of the trajectory.
        trajectory: patient's messages carry ``facts``; a recording without them: ``annotate`` first.
        phases: the stages whose items count; None: those in which the physician said something.
        config: limits of credit.
    Raises:
        ValueError: another case's trajectory.
        UnjudgedError: no item to judge in these stages.
    """
    op = "checklist.coverage"
    if trajectory.case != case.id:
        raise refuse(op, "trajectory", f"one of case {case.id!r}", repr(trajectory.case))
    said = [message for message in trajectory.of("assistant") if not message.meta.get("snippet")]
    kept = {message.phase for message in said} if phases is None else set(phases)
    config = config or ChecklistConfig()
    credit = _asked_and_told(case, trajectory, config)
    given = set(case.opening_facts) | {fact.id for fact in case.facts if fact.disclosure == Disclosure.volunteer}
    scores = [_judge(item, said, credit, given, config) for item in case.checklist if item.phase in kept]
    counted = [one for one in scores if not one.given]
    if not counted:
        raise UnjudgedError(f"{op}: case {case.id!r} has no item of {sorted(map(str, kept))} that is not given")
    return CoverageScore(
        value=rubric_reward([one.item.points for one in counted], [one.met for one in counted]),
        items=tuple(scores),
        by_level=_shares(counted, lambda item: item.level),
        by_dimension=_shares(counted, lambda item: item.dimension),
        by_section=_shares(counted, lambda item: item.section),
        vetoed=tuple(one.item.id for one in counted if one.met and one.item.kind == "veto"),
    )


def annotate(case: Case, trajectory: Trajectory) -> Trajectory:
    """A recording with the facts of the patient's messages filled in by the fact ledger, where a message has none."""
    ledger = Ledger(case)
    messages: list[Message] = []
    question = ""
    for message in trajectory.messages:
        if message.role == "user" and not message.facts and not message.meta.get("instruction"):
            message = dataclasses.replace(message, facts=ledger.check(question, message.content).disclosed)
        question = message.content if message.role == "assistant" else ""
        messages.append(message)
    return dataclasses.replace(trajectory, messages=tuple(messages))


def performs(item: ChecklistItem, text: str, config: ChecklistConfig | None = None) -> str:
    """The sentence of a physician's message that does what an item's keys name, or ""."""
    wanted = item.points > 0
    limits = config or ChecklistConfig()
    most = None
    if wanted and item.phase != Phase.inquiry:
        most = limits.advice_words if item.phase == Phase.diagnosis else limits.line_words
    for sentence in _read(item.phase, text, limits if wanted else None):
        if wanted and _recites(item.criterion, sentence):
            continue
        if item.phase != Phase.inquiry and (sentence.endswith("?") if wanted else is_request(sentence)):
            continue
        if item.kind == "must_ask" and not is_request(sentence):
            continue
        said = tokens(sentence, most)
        if item.phase == Phase.lab:
            said |= _ORDERED
        if any(means(said, key) and not _negated(key, sentence) for key in item.keys):
            return sentence
    return ""


# -- one item ---------------------------------------------------------------------------------------------------------
def _judge(
    item: ChecklistItem,
    said: Sequence[Message],
    credit: Mapping[str, tuple[int, str]],
    given: set[str],
    config: ChecklistConfig,
) -> ItemScore:
    if item.kind == "must_ask" and item.facts:
        if given.issuperset(item.facts):
            return ItemScore(item=item, met=False, given=True)
        found = [credit[one] for one in item.facts if one in credit]
        if not found:
            return ItemScore(item=item, met=False)
        turn, evidence = min(found)
        return ItemScore(item=item, met=True, turn=turn, evidence=evidence)
    for message in said:
        if message.phase == item.phase and (evidence := performs(item, message.content, config)):
            return ItemScore(item=item, met=True, turn=message.turn, evidence=evidence)
    return ItemScore(item=item, met=False)


def _asked_and_told(case: Case, trajectory: Trajectory, config: ChecklistConfig) -> dict[str, tuple[int, str]]:
    """(turn, question) of each fact that was told as an answer and earns credit."""
    found: dict[str, tuple[int, str]] = {}
    messages = trajectory.messages
    for message, answer in itertools.pairwise(messages):
        for order in answer.meta.get("orders", ()):
            for one in order["facts"]:
                found.setdefault(one, (message.turn, order["order"]))
        if (message.role, answer.role) != ("assistant", "user") or message.phase != Phase.inquiry:
            continue
        if message.meta.get("snippet") or answer.meta.get("instruction"):
            continue
        asks = [ask for ask in asked(case, message.content) if not _quotes(case, ask.sentence)]
        asked_for = sum(things(ask.sentence) for ask in asks)
        room = config.max_asks_per_turn - max(0, asked_for - config.max_asks_per_turn)
        named: set[str] = set()
        answered = False
        for ask in asks:
            for one, why in zip(ask.fact_ids, ask.reasons, strict=True):
                told = one in answer.facts
                named.add(one)
                if not told and why.startswith("topic"):
                    continue  # an open question asks for as much as it gets
                if room > 0 and told:
                    found.setdefault(one, (message.turn, ask.sentence))
                    answered = True
                room -= 1
            if room > 0 and ask.kind in (AskKind.general, AskKind.more):
                answered = answered or bool(answer.facts)
        if answered:
            extras = [one for one in answer.facts if one not in named and one not in found]
            for one in extras[: config.max_extras_per_turn]:
                found[one] = (message.turn, "told beside an answer")
    return found


def _read(phase: Phase, text: str, config: ChecklistConfig | None) -> Iterator[str]:
    """Sentences of a message, as many as may earn credit; all without limits."""
    most = None
    if config is not None:
        most = {
            Phase.differential: config.differential_lines,
            Phase.lab: config.order_lines,
            Phase.diagnosis: config.advice_sentences,
        }.get(phase)
    yield from sentences(text)[:most]


def _recites(criterion: str, sentence: str) -> bool:
    """Whether a sentence says the criterion's own words in their order."""
    wanted, said = stems(criterion), stems(sentence)
    return any(said[i : i + len(wanted)] == wanted for i in range(len(said) - len(wanted) + 1))


def _quotes(case: Case, sentence: str) -> bool:
    """Whether a question holds the words of a criterion or of a fact as the case has them: no patient is asked so."""
    said = f" {' '.join(words(sentence))} ".casefold()
    return any(quote in said for quote in _quotable(case))


def _quotable(case: Case) -> tuple[str, ...]:
    """Made once for a case and kept on it, as functools.cached_property would: to hash a case costs more."""
    kept = vars(case)
    if (found := kept.get("_quotable")) is None:
        texts = [*(item.criterion for item in case.checklist), *(fact.text for fact in case.facts)]
        split = [words(text) for text in texts]
        found = kept["_quotable"] = tuple(f" {' '.join(one)} ".casefold() for one in split if len(one) > 2)
    return found


def _negated(key: str, sentence: str) -> bool:
    """Whether a negation that is not the key's own stands shortly before its first word, in the same clause."""
    said = words(sentence)
    own = {stem(word) for word in words(key)}
    wanted = own.union(*ways(key))
    first = next((i for i, word in enumerate(said) if stem(word) in wanted and word.lower() not in NEGATIONS), 0)
    start = sentence.find(said[first]) if said else 0
    clause = max(sentence.rfind(mark, 0, start) for mark in (",", ";", ":", " but "))
    before = words(sentence[clause + 1 : start])[-_SCOPE:]
    return any(word.lower().replace("’", "'") in NEGATIONS and stem(word) not in own for word in before)


def _shares(scores: Sequence[ItemScore], group: Callable[[ChecklistItem], Group]) -> dict[Group, float]:
    counts: dict[Group, list[bool]] = {}
    for one in scores:
        if one.item.points > 0:
            counts.setdefault(group(one.item), []).append(one.met)
    return {name: sum(met) / len(met) for name, met in sorted(counts.items(), key=lambda pair: str(pair[0]))}
