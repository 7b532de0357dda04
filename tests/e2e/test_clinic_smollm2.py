"""A language model as patient and as judge, for real: SmolLM2-135M-Instruct behind ``m3 serve`` in its own process.

The model is far too small for either part; what is tested is that everything it says, of its form or not, ends in an
outcome with a name, and that the counts add up.
"""

from __future__ import annotations

import asyncio
import collections
import subprocess
import sys
from collections.abc import Iterator, Sequence

import pytest

from m3.environment.case import Phase, own_cases
from m3.environment.episode import CaseView, run_inquiry
from m3.environment.llm_patient import (
    FAREWELL,
    FILLER,
    TONES,
    Event,
    LLMPatient,
    LLMPatientConfig,
    PatientCounts,
    count,
)
from m3.environment.trajectory import Message, Trajectory, chat
from m3.rewards.judge import Config, Judge
from m3.rewards.rubric import checklist_rubric
from m3.rewards.verdict import Outcome, Verdict
from m3.rollout.chat import Budget
from m3.rollout.openai import OpenAIChat

pytestmark = pytest.mark.slow
MODEL = "SmolLM2-135M-Instruct"
SERVE = [sys.executable, "-m", "m3", "serve"]
QUESTIONS = ("When did this start?", "Do you smoke?", "Do you take any medicines?")
ITEMS = 3  # of each case's rubric
TEMPLATES = ("healthbench-exact", "prefix-first")  # one for each of the two consultations


class Doctor:
    """Asks the same questions of everybody."""

    name = "fixed questions"

    async def act(self, view: CaseView, messages: Sequence[Message], phase: Phase, seed: int) -> str:
        asked = sum(message.role == "assistant" for message in messages)
        return QUESTIONS[asked] if asked < len(QUESTIONS) else "Thank you. I have no further questions."


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    process = subprocess.Popen([*SERVE, MODEL, "--port", "0"], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield next(line for line in process.stdout if "http://" in line).split()[-1]
    finally:
        process.terminate()
    assert process.wait(60) == 0


def test_a_model_plays_the_patient_and_judges(url, record_testsuite_property):
    cases = own_cases()[:2]
    budget = Budget()

    async def consult(client: OpenAIChat, number: int) -> Trajectory:
        config = LLMPatientConfig(max_tokens=48)
        patient = LLMPatient(cases[number], client, seed=number, config=config)
        return await run_inquiry(cases[number], Doctor(), patient, seed=number, max_turns=len(QUESTIONS) + 1)

    async def main() -> tuple[list[Trajectory], list[list[Verdict]], list[Judge]]:
        async with OpenAIChat(url, MODEL, timeout=300, budget=budget) as client:
            talks = await asyncio.gather(*(consult(client, number) for number in range(2)))
            judges = [Judge(client, Config(template=name, max_tokens=160, retries=2)) for name in TEMPLATES]
            verdicts = []
            for case, talk, judge in zip(cases, talks, judges, strict=True):
                messages = [message for message in talk.messages if message.phase is Phase.inquiry]
                verdicts.append(await judge.judge(chat(messages), checklist_rubric(case).items[:ITEMS]))
            return list(talks), verdicts, judges

    talks, verdicts, judges = asyncio.run(main())
    told = count(message for talk in talks for message in talk.messages)
    outcomes = collections.Counter(verdict.outcome for each in verdicts for verdict in each)
    record_testsuite_property("patient", str(told))
    unparsable = sum(judge.tally.unparsable_replies for judge in judges)
    calls = sum(judge.tally.calls for judge in judges)
    record_testsuite_property("judge", str({**outcomes, "unparsable replies": unparsable}))

    for talk in talks:
        check(talk)
    check_counts(told, talks)
    assert sum(outcomes.values()) == 2 * ITEMS
    judged = sum(times for outcome, times in outcomes.items() if outcome.judged)
    assert judged + outcomes[Outcome.unparsable] == 2 * ITEMS, "a server on loopback: nothing else can have happened"
    assert calls == judged + unparsable
    assert budget.calls_made == told.calls + calls
    assert budget.tokens_used > 0


def check(talk: Trajectory) -> None:
    """Every answer says where it comes from, and its counts are of it."""
    assert (talk.ended, len(talk.of("assistant"))) in [("closed", 4), ("patient", 1), ("patient", 2), ("patient", 3)]
    for message in talk.of("user")[1:]:
        meta = message.meta
        assert meta["gate"] in ("not asked", "yes", "no", "unparsable")
        assert set(meta["events"]) <= set(Event)
        assert (meta["gate"] == "unparsable") == (Event.gate_unparsable in meta["events"])
        assert (meta["answer_from"] == "gate") == (message.content == FAREWELL) == meta.get("gone", False)
        assert (meta["answer_from"] == "filler") == (message.content == FILLER)
        if meta["answer_from"] != "gate":
            assert meta["tone"] in TONES
            assert (meta["tone_from"] == "persona") == (Event.tone_unparsable in meta["events"])
        assert meta["prompt_tokens"] > meta["completion_tokens"] > 0
    assert any(message.meta["cached_tokens"] > 0 for message in talk.of("user")[1:]), "units share their prefixes"
    assert Trajectory.from_json(talk.to_json()) == talk


def check_counts(told: PatientCounts, talks: list[Trajectory]) -> None:
    answers = [message for talk in talks for message in talk.of("user")[1:]]
    assert told.answers == len(answers)
    for kind in ("leaked", "contradicted", "invented"):
        assert getattr(told, kind) == sum(len(message.meta[kind]) for message in answers)
    events = told.events
    gates = sum(message.meta["gate"] != "not asked" for message in answers)
    felt = sum(message.meta["answer_from"] != "gate" for message in answers)
    used = sum(message.meta["answer_from"] == "model" for message in answers)
    wasted = told.calls - gates - felt - used  # replies of the factual unit that nothing was said of
    malformed = sum(events.get(name, 0) for name in (Event.answer_empty, Event.answer_inverted, Event.answer_cut))
    assert 2 * events.get(Event.answer_filler, 0) <= wasted <= malformed


def test_the_same_seed_says_the_same(url):
    async def once() -> list[str]:
        async with OpenAIChat(url, MODEL, timeout=300) as client:
            patient = LLMPatient(own_cases()[0], client, seed=3, config=LLMPatientConfig(max_tokens=24))
            talk = await run_inquiry(own_cases()[0], Doctor(), patient, seed=3, max_turns=2)
            return [message.content for message in talk.messages]

    assert asyncio.run(once()) == asyncio.run(once())
