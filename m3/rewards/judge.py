"""Judges: whoever says which clauses of a rubric an answer meets. A language model, or a script where none is needed.

A verdict has a named outcome. A reply that is no verdict is asked for again a bounded number of times and then is
``unparsable``; it is never taken for "not met". ``judge`` is a coroutine that can be started as soon as an answer is
complete (``asyncio.create_task(judge.judge(...))``) and runs beside the rest of a training step (Baichuan-M3, arXiv
2602.06570: judging overlaps the log-probs of the reference); cancelled, it leaves no call behind.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

from m3.environment.case import Case
from m3.rewards.judge_schedule import add_usage, conversation_key, first_then_rest
from m3.rewards.rubric import RubricItem
from m3.rewards.rubric_templates import Template, read_verdict, template
from m3.rewards.verdict import Outcome, Verdict
from m3.rollout.chat import Budget, ChatClient, ChatError, ChatMessages, Failure, Usage
from m3.text.words import content_stems, is_negated, sentences, stems
from m3kernels.checks import refuse

OUTCOMES: Mapping[Failure, Outcome] = {
    Failure.timeout: Outcome.timeout,
    Failure.unreachable: Outcome.unreachable,
    Failure.refused: Outcome.unreachable,  # the explanation says that it was refused
    Failure.over_budget: Outcome.over_budget,
}


@runtime_checkable
class RubricJudge(Protocol):
    """What evaluations and rewards need of a judge. ``scripted``: no benchmark's score may be told of its verdicts."""

    @property
    def name(self) -> str: ...

    @property
    def template(self) -> str: ...

    @property
    def comparable(self) -> bool: ...

    @property
    def scripted(self) -> bool: ...

    async def judge(self, conversation: ChatMessages, items: Sequence[RubricItem]) -> list[Verdict]:
        """A verdict of each clause, in order, on the last turn of the conversation, an assistant's."""
        ...


@runtime_checkable
class Pool(Protocol):
    """Several endpoints of one model: ``of(key)`` is the client of all calls with that key."""

    @property
    def model(self) -> str: ...

    def of(self, key: str) -> ChatClient: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Numbers of a judge."""

    template: str = "prefix-first"  # the paper's order; "healthbench-exact" for scores to compare
    retries: int = 3  # ours: after a reply that is no verdict; simple-evals asks for ever
    timeout: float | None = None  # seconds a call, the client's own retries and queue included; None: the client's own
    max_concurrency: int = 120  # calls at once: simple-evals' threads
    max_tokens: int = 2048  # of a reply: simple-evals' grader
    temperature: float = 0.5  # simple-evals' grader; above 0, so that asking again can help
    seed: int = 0  # of the first try; each further one adds 1

    def __post_init__(self) -> None:
        template(self.template)
        for name, least in (("retries", 0), ("max_concurrency", 1), ("max_tokens", 1)):
            if getattr(self, name) < least:
                raise refuse("judge.Config", name, f"{least} or more", getattr(self, name))
        if self.timeout is not None and not self.timeout > 0:
            raise refuse("judge.Config", "timeout", "seconds > 0 or None", self.timeout)


@dataclasses.dataclass(kw_only=True)
class Tally:
    """What a judge has done so far: calls made, replies that were no verdict, verdicts by outcome."""

    calls: int = 0
    unparsable_replies: int = 0
    outcomes: collections.Counter[Outcome] = dataclasses.field(default_factory=collections.Counter)


class Judge:
    """A language model as judge.

    Args:
        client: who answers; of a pool of endpoints, each conversation goes to one.
        budget: each try is a call. Give it to the judge or to the client, not to both.
    """

    scripted = False

    def __init__(
        self, client: ChatClient | Pool, config: Config | None = None, *, budget: Budget | None = None
    ) -> None:
        self._client = client
        self.config = config or Config()
        self.budget = budget or Budget()
        self.name = client.model
        self.tally = Tally()
        self._asked_by: Template = template(self.config.template)
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def template(self) -> str:
        return self._asked_by.name

    @property
    def comparable(self) -> bool:
        return self._asked_by.comparable

    async def judge(self, conversation: ChatMessages, items: Sequence[RubricItem]) -> list[Verdict]:
        """A verdict of each clause, in order: the first asked alone, the others together after it.

        Raises:
            ValueError: a conversation that does not end in an assistant's turn.
        """
        _answer(conversation)
        client = self._client.of(conversation_key(conversation)) if isinstance(self._client, Pool) else self._client
        verdicts = await first_then_rest([functools.partial(self._ask, client, conversation, one) for one in items])
        self.tally.outcomes.update(verdict.outcome for verdict in verdicts)
        return verdicts

    async def _ask(self, client: ChatClient, conversation: ChatMessages, item: RubricItem) -> Verdict:
        messages = self._asked_by.messages(conversation, item)
        used: list[Usage] = []
        for attempt in range(1 + self.config.retries):
            try:
                async with self._slots():
                    self.budget.take()
                    self.tally.calls += 1
                    async with asyncio.timeout(self.config.timeout):
                        reply = await client.chat(
                            messages,
                            temperature=self.config.temperature,
                            max_tokens=self.config.max_tokens,
                            seed=self.config.seed + attempt,
                            json_schema=self._asked_by.schema,
                        )
            except ChatError as error:
                return self._verdict(item, OUTCOMES[error.failure], str(error), used)
            except TimeoutError:
                return self._verdict(item, Outcome.timeout, f"no answer in {self.config.timeout} s", used)
            self.budget.add(reply.usage)
            used.append(reply.usage)
            reading = read_verdict(reply.text)
            if reading is not None:
                return self._verdict(item, Outcome.met if reading.met else Outcome.not_met, reading.explanation, used)
            self.tally.unparsable_replies += 1
        return self._verdict(item, Outcome.unparsable, f"no verdict in {1 + self.config.retries} replies", used)

    def _verdict(self, item: RubricItem, outcome: Outcome, explanation: str, used: list[Usage]) -> Verdict:
        return Verdict(
            criterion=item.id,
            outcome=outcome,
            explanation=explanation,
            judge=self.name,
            template=self.template,
            usage=add_usage(used) if used else None,
        )

    def _slots(self) -> asyncio.Semaphore:
        loop = asyncio.get_running_loop()
        if self._loop is not loop:  # a semaphore belongs to one loop; a judge may be used in several, one by one
            self._loop, self._semaphore = loop, asyncio.Semaphore(self.config.max_concurrency)
        return self._semaphore


class ScriptedJudge:
    """A judge by rules, deterministic, of a clause's keys: for tests, plumbing and training without a model.

    It reads text alone; what a consultation disclosed of a case is for m3/rewards/checklist.py to judge.

    A clause is met where one sentence of the assistant, in any turn, has all words of one of its keys. A key that
    states something ("go home") is not met by its denial ("do not go home"); a key to ask for (``asks``) is met by a
    question however it is put.

    Args:
        keys: of each clause by its id: each a few words.
        asks: ids of clauses that are met by asking.
        overlap: where given, a clause without keys is met when this share, in (0, 1], of the words of its criterion
            stands in the last turn; otherwise such a clause is refused.
    """

    scripted = True
    comparable = False
    template = "scripted"
    name = "scripted"

    def __init__(
        self,
        keys: Mapping[str, Sequence[str]],
        *,
        asks: frozenset[str] = frozenset(),
        overlap: float | None = None,
    ) -> None:
        if overlap is not None and not 0 < overlap <= 1:
            raise refuse("ScriptedJudge", "overlap", "a share in (0, 1] or None", overlap)
        self._keys = {one: [(frozenset(stems(key)), is_negated(key)) for key in texts] for one, texts in keys.items()}
        self._asks, self._overlap = asks, overlap

    @classmethod
    def of_case(cls, case: Case) -> ScriptedJudge:
        """Of a case's checklist: an item's keys, and those of the facts that it asks for."""
        keys = {
            item.id: [*item.keys, *(key for fact in item.facts for key in case.fact[fact].keys)]
            for item in case.checklist
        }
        asks = frozenset(item.id for item in case.checklist if item.kind == "must_ask")
        return cls({one: texts for one, texts in keys.items() if texts}, asks=asks)

    async def judge(self, conversation: ChatMessages, items: Sequence[RubricItem]) -> list[Verdict]:
        """A verdict of each clause, in order.

        Raises:
            ValueError: a clause that no rule can judge, or a conversation that does not end in an assistant's turn.
        """
        last = frozenset(content_stems(_answer(conversation)))
        said = [
            (frozenset(stems(sentence)), is_negated(sentence))
            for message in conversation
            if message["role"] == "assistant"
            for sentence in sentences(message["content"])
        ]
        return [self._verdict(item, said, last) for item in items]

    def _verdict(self, item: RubricItem, said: Sequence[tuple[frozenset[str], bool]], last: frozenset[str]) -> Verdict:
        if item.id in self._keys:
            plain = item.id in self._asks
            met = any(
                key and key <= spoken and (plain or negated == key_negated)
                for key, key_negated in self._keys[item.id]
                for spoken, negated in said
            )
        elif self._overlap is not None:
            wanted = frozenset(content_stems(item.criterion))
            met = len(wanted & last) >= self._overlap * len(wanted)
        else:
            raise refuse("ScriptedJudge", "items", "clauses that have keys", f"{item.id!r}")
        return Verdict(
            criterion=item.id,
            outcome=Outcome.met if met else Outcome.not_met,
            judge=self.name,
            template=self.template,
        )


def _answer(conversation: ChatMessages) -> str:
    """The text to judge: the last turn, an assistant's; it may be empty."""
    if not conversation or conversation[-1]["role"] != "assistant":
        role = conversation[-1]["role"] if conversation else "nothing"
        raise refuse("judge", "conversation", "an assistant's turn at the end", repr(role))
    return conversation[-1]["content"]
