"""Rubrics that change while a run trains: a version at a time, in the run's state; the rewards that read them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from m3.environment.case import Phase
from m3.environment.segment import StageScore
from m3.environment.trajectory import Message, Trajectory
from m3.rewards.judge import ScriptedJudge
from m3.rewards.pinned_rubrics import PinnedRubrics
from m3.rewards.rubric import Rubric, RubricItem
from m3.rewards.rubric_stage import RubricReward, RubricStageReward
from m3.rewards.rubric_store import Provenance, RubricStore
from m3.rewards.verdict import UnjudgedError
from m3.train.stage import Objective, StepBatch
from m3.train.with_rubrics import WithRubrics
from m3kernels.policy_loss import LossSpec
from tests.m3.clinic_cases import small_case

CASE = small_case()
BY = Provenance(author="human", by="A. Expert")
SMOKE = RubricItem(id="smoke", criterion="Asks about smoking", points=6)
RUDE = RubricItem(id="rude", criterion="Calls the patient lazy", points=-3)
JUDGE = ScriptedJudge({"smoke": ["smoke"], "rude": ["lazy"]}, asks=frozenset({"smoke"}))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A store with the case's core set; a second clause is drafted."""
    path = tmp_path / "rubrics.jsonl"
    with RubricStore(path, clock=lambda: "2026-01-01T00:00:00") as store:
        store.add_core(CASE.id, [SMOKE], BY)
        store.draft(CASE.id, RUDE, BY)
    return path


def admit(path: Path) -> None:
    with RubricStore(path, clock=lambda: "2026-01-02T00:00:00") as store:
        store.approve("rude", "A. Expert")
        store.admit("rude", "rule", "p < 0.01")


# -- a version --------------------------------------------------------------------------------------------------------
def test_a_version_holds_until_it_is_asked_to_look(path):
    pinned = PinnedRubrics(path)
    before = pinned.state()
    admit(path)
    assert [item.id for item in pinned.rubric(CASE.id).items] == ["smoke"] and pinned.state() == before
    pinned.look()
    assert [item.id for item in pinned.rubric(CASE.id).items] == ["smoke", "rude"]
    assert (before["version"], pinned.version) == (2, 4) and pinned.digest != before["digest"]


def test_a_run_goes_back_to_its_version(path):
    state = json.loads(json.dumps(PinnedRubrics(path).state()))
    admit(path)
    pinned = PinnedRubrics(path)
    pinned.load_state(state)
    assert pinned.state() == state and [item.id for item in pinned.rubric(CASE.id).items] == ["smoke"]


def test_another_history_is_refused(path, tmp_path):
    pinned = PinnedRubrics(path)
    other = tmp_path / "other.jsonl"
    with RubricStore(other) as store:
        store.add_core(CASE.id, [RUDE], BY)
    elsewhere = PinnedRubrics(other)
    with pytest.raises(ValueError, match=r"a store of 2 events or more; got .*of 1"):
        elsewhere.load_state(pinned.state())
    with pytest.raises(ValueError, match="whose first 1 events have digest"):
        pinned.load_state(elsewhere.state())
    assert pinned.version == 2


def test_what_is_no_store_is_refused(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"run": {"schema": "other"}}\n')
    with pytest.raises(ValueError, match=r"x\.jsonl"):
        PinnedRubrics(tmp_path / "x.jsonl")


# -- rewards ----------------------------------------------------------------------------------------------------------
class Task:
    """R_task is 0.4."""

    name = "task"

    async def __call__(self, case: Any, trajectory: Any, phase: Phase) -> StageScore:
        return StageScore(reward=0.4, quality=0.9, outcomes={"checklist": "0.4"})


def consulted(*said: str) -> Trajectory:
    """The physician's messages, each followed by the patient's."""
    messages = [Message(role="user", content="I cough.", turn=0, phase=Phase.inquiry)]
    for turn, text in enumerate(said):
        messages.append(Message(role="assistant", content=text, turn=turn, phase=Phase.inquiry))
        messages.append(Message(role="user", content="Well.", turn=turn + 1, phase=Phase.inquiry))
    return Trajectory(case=CASE.id, case_version=1, policy="p", seed=0, messages=tuple(messages))


@pytest.mark.parametrize(
    ("said", "share", "wanted"),
    [
        (("Do you smoke?",), 0.5, 0.5 * 1 + 0.5 * 0.4),
        (("Where is it?",), 0.5, 0.5 * (3 / 9) + 0.5 * 0.4),  # (0 - -3) / (6 + 3)
        (("Do you smoke?", "You are lazy."), 1.0, 6 / 9),  # (6 - 3 - -3) / 9
    ],
)
def test_a_stage_by_hand(path, said, share, wanted):
    admit(path)
    reward = RubricStageReward(Task(), JUDGE, PinnedRubrics(path), share=share)
    found = asyncio.run(reward(CASE, consulted(*said), Phase.inquiry))
    assert found.reward == pytest.approx(wanted)
    assert (found.quality, found.outcomes["checklist"]) == (0.9, "0.4")
    assert found.outcomes["rubric smoke"] == ("met" if "smoke" in said[0] else "not_met")


def test_a_case_without_rubrics_has_its_task_alone(path):
    reward = RubricStageReward(Task(), JUDGE, PinnedRubrics(path))
    found = asyncio.run(reward(small_case(id="other"), consulted("Do you smoke?"), Phase.inquiry))
    assert found == asyncio.run(Task()(CASE, None, Phase.inquiry))


def test_an_answer_by_hand(path):
    admit(path)
    talk = [{"role": "user", "content": "I cough."}, {"role": "assistant", "content": "You are lazy."}]
    own = {"p": Rubric((SMOKE,), id="p")}
    assert asyncio.run(RubricReward(JUDGE, own).score("p", talk)) == 0
    assert asyncio.run(RubricReward(JUDGE, {}, PinnedRubrics(path)).score(CASE.id, talk)) == 0
    with pytest.raises(UnjudgedError, match="'q' has no rubric"):
        asyncio.run(RubricReward(JUDGE, own).score("q", talk))


# -- in a run ---------------------------------------------------------------------------------------------------------
class Counting:
    """A source whose batches say how many clauses a case has."""

    objective = Objective(spec=LossSpec())

    def __init__(self, rubrics: PinnedRubrics) -> None:
        self.rubrics, self.loaded = rubrics, None

    async def batch(self, step: int) -> StepBatch | None:
        clauses = len(self.rubrics.rubric(CASE.id).items)
        return None if step == 9 else StepBatch(step=step, samples=[], metrics={"clauses": clauses})

    async def updated(self, step: int, version: int) -> None:
        pass

    def state(self) -> Mapping[str, Any]:
        return {"own": 1}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.loaded = state

    async def close(self) -> None:
        pass


def source(path: Path) -> WithRubrics:
    rubrics = PinnedRubrics(path)
    return WithRubrics(Counting(rubrics), rubrics)


def test_a_run_that_goes_on_trains_on_what_it_had(path):
    """An expert approves after the checkpoint of step 1: it is in from step 2 on."""

    async def clauses(one: WithRubrics, step: int) -> tuple[float, float]:
        metrics = (await one.batch(step)).metrics
        return metrics["clauses"], metrics["rubrics_version"]

    async def main() -> None:
        unbroken = source(path)
        assert await clauses(unbroken, 0) == (1, 2)
        await unbroken.updated(0, 1)
        state = json.loads(json.dumps(unbroken.state()))
        admit(path)
        again = source(path)
        again.load_state(state)
        await again.updated(0, 1)  # as the loop does, so that samplers have the weights
        assert again.state() == state
        for one in (unbroken, again):
            assert await clauses(one, 1) == (1, 2)
            await one.updated(1, 2)
            assert await clauses(one, 2) == (2, 4)
            assert await one.batch(9) is None

    asyncio.run(main())
