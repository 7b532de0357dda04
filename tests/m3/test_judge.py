"""Judges: every outcome has its name, retries are bounded, the first clause goes alone, nothing outlives a cancelled
judge; and the scripted judge's rules."""

from __future__ import annotations

import asyncio
import json

import pytest
from clinic_cases import small_case

from m3.rewards.judge import Config, Judge, RubricJudge, ScriptedJudge
from m3.rewards.rubric import RubricItem, checklist_rubric, score_rubric
from m3.rewards.verdict import Outcome
from m3.rollout.chat import Budget, ChatError, Failure, Reply, Usage

CONVERSATION = [{"role": "user", "content": "My arm hurts."}, {"role": "assistant", "content": "Since when?"}]
ITEMS = [RubricItem(id=f"i{n}", criterion=f"Clause number {n}.", points=n + 1) for n in range(4)]


class Answers:
    """A chat client that answers with what ``answer(clause's number, try from 0)`` gives, or raises it; keeps a log."""

    def __init__(self, answer, model="grader", seconds=0.0):
        self.answer, self.model, self.seconds = answer, model, seconds
        self.log = []
        self.running = self.most = 0
        self.tries = {}

    async def chat(self, messages, *, temperature=0.0, max_tokens=512, seed=None, stop=(), json_schema=None):
        json.dumps([messages, json_schema])  # what a client sends must be JSON
        clause = int(messages[-1]["content"].split("Clause number ")[1].split(".")[0])
        self.log.append(("ask", clause, seed))
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await asyncio.sleep(self.seconds)
            attempt = self.tries.get(clause, 0)
            self.tries[clause] = attempt + 1
            found = self.answer(clause, attempt)
            if isinstance(found, Exception):
                raise found
            self.log.append(("answered", clause, seed))
            return Reply(text=found, usage=Usage(prompt_tokens=100, completion_tokens=7, cached_tokens=64))
        finally:
            self.running -= 1


def says(met: bool) -> str:
    return json.dumps({"explanation": "e", "criteria_met": met})


def outcomes(client, items=ITEMS, **config):
    judge = Judge(client, Config(**config))
    return judge, asyncio.run(judge.judge(CONVERSATION, items))


def test_verdicts_in_order_with_what_they_cost():
    judge, found = outcomes(Answers(lambda clause, _: says(clause % 2 == 0)))
    assert [verdict.criterion for verdict in found] == ["i0", "i1", "i2", "i3"]
    assert [verdict.outcome for verdict in found] == [Outcome.met, Outcome.not_met] * 2
    assert {(v.judge, v.template, v.explanation, v.cached) for v in found} == {("grader", "prefix-first", "e", False)}
    assert found[0].usage == Usage(prompt_tokens=100, completion_tokens=7, cached_tokens=64)
    assert (judge.tally.calls, judge.tally.unparsable_replies) == (4, 0)
    assert judge.tally.outcomes == {Outcome.met: 2, Outcome.not_met: 2}


def test_first_clause_goes_alone_and_the_others_together():
    client = Answers(lambda *_: says(True), seconds=0.01)
    outcomes(client)
    assert client.log[:2] == [("ask", 0, 0), ("answered", 0, 0)]
    assert sorted(client.log[2:5]) == [("ask", 1, 0), ("ask", 2, 0), ("ask", 3, 0)]


def test_reply_that_is_no_verdict_is_asked_again_with_another_seed():
    client = Answers(lambda clause, attempt: says(False) if attempt == 2 else "Yes, met!")
    judge, [found] = outcomes(client, ITEMS[:1])
    assert found.outcome is Outcome.not_met
    assert [seed for what, _, seed in client.log if what == "ask"] == [0, 1, 2]
    assert found.usage == Usage(prompt_tokens=300, completion_tokens=21, cached_tokens=192), "every try is paid for"
    assert (judge.tally.calls, judge.tally.unparsable_replies) == (3, 2)


def test_never_a_verdict_is_unparsable_and_not_asked_for_ever():
    judge, [found] = outcomes(Answers(lambda *_: "true"), ITEMS[:1], retries=2)
    assert (found.outcome, found.explanation) == (Outcome.unparsable, "no verdict in 3 replies")
    assert (judge.tally.calls, judge.tally.unparsable_replies) == (3, 3)


FAILURES = {
    "timeout": (ChatError(Failure.timeout, "slow"), Outcome.timeout),
    "timeout_of_the_client": (TimeoutError(), Outcome.timeout),
    "unreachable": (ChatError(Failure.unreachable, "no route"), Outcome.unreachable),
    "refused": (ChatError(Failure.refused, "refused: prompt too long"), Outcome.unreachable),
    "over_budget": (ChatError(Failure.over_budget, "spent"), Outcome.over_budget),
}


@pytest.mark.parametrize(("error", "outcome"), FAILURES.values(), ids=FAILURES)
def test_failure_of_one_clause_is_its_outcome_alone(error, outcome):
    _, found = outcomes(Answers(lambda clause, _: error if clause == 1 else says(True)))
    assert [verdict.outcome for verdict in found] == [Outcome.met, outcome, Outcome.met, Outcome.met]
    assert found[1].usage is None
    assert str(error) in found[1].explanation


def test_slow_answer_is_a_timeout():
    _, [found] = outcomes(Answers(lambda *_: says(True), seconds=5), ITEMS[:1], timeout=0.01)
    assert (found.outcome, found.explanation) == (Outcome.timeout, "no answer in 0.01 s")


def test_budget_is_shared_and_ends_calls_by_name():
    budget = Budget(calls=2)
    client = Answers(lambda *_: says(True))
    found = asyncio.run(Judge(client, budget=budget).judge(CONVERSATION, ITEMS))
    assert [verdict.outcome for verdict in found] == [Outcome.met, Outcome.met] + [Outcome.over_budget] * 2
    assert found[3].explanation == "budget: spent: calls 2 of 2"
    assert budget.tokens_used == 2 * 107


def test_defect_of_a_client_is_not_an_outcome():
    with pytest.raises(ZeroDivisionError):
        outcomes(Answers(lambda *_: ZeroDivisionError()), ITEMS[:1])


def test_concurrency_is_bounded_over_conversations_and_a_judge_outlives_a_loop():
    client = Answers(lambda *_: says(True), seconds=0.005)
    judge = Judge(client, Config(max_concurrency=2))

    async def many():
        return await asyncio.gather(*(judge.judge(CONVERSATION, ITEMS) for _ in range(3)))

    first, second = asyncio.run(many()), asyncio.run(many())
    assert client.most == 2
    assert [len(found) for found in first + second] == [4] * 6


def test_cancelled_judge_leaves_no_call_behind():
    client = Answers(lambda *_: says(True), seconds=0.05)

    async def cancel() -> None:
        task = asyncio.create_task(Judge(client).judge(CONVERSATION, ITEMS))
        await asyncio.sleep(0.07)
        assert client.running == 3, "the siblings are under way"
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancel())
    assert client.running == 0
    assert [entry for entry in client.log if entry[0] == "answered"] == [("answered", 0, 0)]


class Endpoints:
    """A pool that gives each key its client by a table kept in order of first use."""

    model = "grader"

    def __init__(self) -> None:
        self.clients: dict[str, Answers] = {}

    def of(self, key: str) -> Answers:
        return self.clients.setdefault(key, Answers(lambda *_: says(True)))


def test_conversation_sticks_to_one_endpoint_of_a_pool():
    pool = Endpoints()
    judge = Judge(pool)

    async def turns():
        for n in range(3):
            opening = {"role": "user", "content": f"Hello, I am patient {n}."}
            await judge.judge([opening, CONVERSATION[1]], ITEMS[:2])
            await judge.judge([opening, CONVERSATION[1], *CONVERSATION], ITEMS[:2])

    asyncio.run(turns())
    assert judge.name == "grader"
    assert [sum(what == "ask" for what, *_ in client.log) for client in pool.clients.values()] == [4, 4, 4]


def test_no_clause_no_call():
    client = Answers(lambda *_: says(True))
    assert outcomes(client, [])[1] == []
    assert client.log == []


def test_exact_template_asks_no_schema_and_is_comparable():
    judge = Judge(Answers(lambda *_: says(True)), Config(template="healthbench-exact"))
    assert (judge.template, judge.comparable, judge.scripted) == ("healthbench-exact", True, False)
    [found] = asyncio.run(judge.judge(CONVERSATION, ITEMS[:1]))
    assert found.template == "healthbench-exact"


def test_both_are_judges():
    assert isinstance(Judge(Answers(lambda *_: "")), RubricJudge)
    assert isinstance(ScriptedJudge({}), RubricJudge)


REFUSED = {
    "empty": (lambda: asyncio.run(Judge(Answers(None)).judge([], ITEMS)), "want an assistant's turn at the end"),
    "user_last": (lambda: asyncio.run(Judge(Answers(None)).judge(CONVERSATION[:1], ITEMS)), "at the end; got 'user'"),
    "template": (lambda: Config(template="mine"), "template: name: want one of"),
    "retries": (lambda: Config(retries=-1), "judge.Config: retries: want 0 or more; got -1"),
    "timeout": (lambda: Config(timeout=0), "judge.Config: timeout: want seconds > 0 or None; got 0"),
    "overlap": (lambda: ScriptedJudge({}, overlap=0), "ScriptedJudge: overlap: want a share"),
}


@pytest.mark.parametrize(("call", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# -- the scripted judge -----------------------------------------------------------------------------------------------
def scripted(*said: str) -> dict[str, Outcome]:
    case = small_case()
    conversation = [{"role": "user", "content": case.opening_line}]
    for text in said:
        conversation += [{"role": "assistant", "content": text}, {"role": "user", "content": "I do not know."}]
    judge = ScriptedJudge.of_case(case)
    found = asyncio.run(judge.judge(conversation[:-1], checklist_rubric(case).items))
    return {verdict.criterion: verdict.outcome for verdict in found}


SAID = {
    "question": (["Does it spread anywhere else?"], {"c-radiation"}),
    "negative_question": (["You don't smoke, do you?"], {"c-smoking"}),
    "in_an_earlier_turn": (["Any fever? Chills?", "Thank you."], {"c-fever"}),
    "action": (["Call an ambulance now."], {"c-escalate"}),
    "action_denied": (["There is no emergency."], set()),
    "fault": (["You can go home."], {"c-reassure"}),
    "fault_denied": (["Do not go home."], set()),
    "words_over_two_sentences": (["It is only a strain. Muscular pain passes."], set()),
    "nothing": ([""], set()),
}


@pytest.mark.parametrize(("said", "met"), SAID.values(), ids=SAID)
def test_scripted_judge_of_a_case(said, met):
    found = scripted(*said)
    assert {one for one, outcome in found.items() if outcome is Outcome.met} == met
    assert set(found.values()) <= {Outcome.met, Outcome.not_met}


def test_scripted_judge_rewards_the_good_over_the_bad():
    case = small_case()
    rubric = checklist_rubric(case)

    def reward(text: str) -> float:
        conversation = [{"role": "user", "content": case.opening_line}, {"role": "assistant", "content": text}]
        verdicts = asyncio.run(ScriptedJudge.of_case(case).judge(conversation, rubric.items))
        return score_rubric(rubric, verdicts).reward

    good = "Does the pain spread? Do you smoke? Any fever? I will call an ambulance."
    assert [reward(text) for text in (good, "", "You can go home.")] == [1.0, 9 / 28, 0.0]


def test_scripted_judge_refuses_what_no_rule_judges():
    with pytest.raises(ValueError, match="ScriptedJudge: items: want clauses that have keys; got 'i0'"):
        asyncio.run(ScriptedJudge({}).judge(CONVERSATION, ITEMS[:1]))


def test_scripted_judge_by_overlap():
    items = [
        RubricItem(id="a", criterion="Recommends drinking water.", points=1),
        RubricItem(id="b", criterion="Recommends antibiotics tonight.", points=1),
    ]
    said = [{"role": "assistant", "content": "I recommend that you drink some water."}]
    found = asyncio.run(ScriptedJudge({}, overlap=0.6).judge(said, items))
    assert [verdict.outcome for verdict in found] == [Outcome.met, Outcome.not_met]
