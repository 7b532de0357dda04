"""Teachers: the same log-probabilities in process, on an engine and served; teachers' rollouts into a store."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from pathlib import Path

import pytest
import torch
from letters_model import make_letters_model
from loopback import serving
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from m3.engine.engine import AsyncEngine
from m3.rollout.chat import ChatError, Failure
from m3.train.policy_model import PolicyModel
from m3.train.prompt_rollouts import Prompt, PromptRollouts, PromptRolloutsConfig
from m3.train.rollouts import EnginePhysician
from m3.train.stage import StepBatch
from m3.train.streams import Sample, pack
from m3.train.teacher_rollouts import roll_out
from m3.train.teachers import EngineTeacher, ModelTeacher, SamplingTeacher, ServedTeacher, Teacher
from m3.train.trajectory_store import TrajectoryStore
from tests.m3.train_cases import with_one_thread

one_thread = pytest.fixture(scope="module", autouse=True)(with_one_thread)
PROMPTS = [Prompt(id=f"p{n}", messages=(("user", text),)) for n, text in enumerate(("Hi", "Why?", "My arm hurts"))]
CONFIG = PromptRolloutsConfig(prompts=2, rollouts=2, epochs=3, domain="general")


class ShareOfSmall:
    """The share of small letters in an answer."""

    name = "share-of-small"

    async def __call__(self, prompt: Prompt, answer: str) -> float:
        return sum(letter.islower() for letter in answer) / len(answer)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_letters_model(tmp_path_factory.mktemp("letters"))


@pytest.fixture(scope="module")
def model(folder: Path) -> PolicyModel:
    return PolicyModel.load(folder)


async def drawn(folder: Path, config: PromptRolloutsConfig = CONFIG, **physician) -> list[StepBatch]:
    async with AsyncEngine.from_model(folder) as engine:
        source = PromptRollouts(
            PROMPTS, EnginePhysician(engine, "letters", max_tokens=20, **physician), dict, config, reward=ShareOfSmall()
        )
        found = []
        while (batch := await source.batch(len(found))) is not None:
            found.append(batch)
        return found


@pytest.fixture(scope="module")
def batches(folder: Path) -> list[StepBatch]:
    return asyncio.run(drawn(folder))


@pytest.fixture(scope="module")
def samples(batches: list[StepBatch]) -> list[Sample]:
    return [sample for batch in batches for sample in batch.samples]


def told(teacher: Teacher, samples: list[Sample]) -> torch.Tensor:
    return torch.cat(asyncio.run(teacher.logprobs(samples)))


# -- prompts ----------------------------------------------------------------------------------------------------------
def test_each_prompt_is_asked_once_an_epoch(batches):
    assert [len(batch.samples) for batch in batches] == [4, 4, 4, 4, 2]
    names = [sample.id for batch in batches for sample in batch.samples]
    assert sorted(names) == sorted(f"p{n}@{epoch}/{r}" for n in range(3) for epoch in range(3) for r in range(2))


def test_a_sample_of_a_prompt(batches):
    sample = batches[0].samples[0]
    given = int((sample.steps < 0).sum())
    assert sample.mask.tolist() == [0.0] * given + [1.0] * (sample.tokens - given)
    assert sample.versions.tolist() == [-1] * given + [0] * (sample.tokens - given)
    assert (sample.domain, sample.group, sample.rollout) == ("general", sample.id[:-2], 0)


def test_advantages_are_relative_to_the_group(batches):
    for batch in batches:
        assert batch.metrics["reward/prompts"] == pytest.approx(
            sum(sample.reward for sample in batch.samples) / len(batch.samples)
        )
    one, other = next(
        batch.samples[at : at + 2]
        for batch in batches
        for at in range(0, len(batch.samples), 2)
        if batch.samples[at].reward != batch.samples[at + 1].reward
    )
    assert one.group == other.group
    better, worse = (one, other) if one.reward > other.reward else (other, one)
    # two rewards are half their distance from the mean, and their deviation is that distance / sqrt(2)
    assert float(better.advantages[-1]) == pytest.approx(0.5**0.5, abs=1e-3)
    assert float(worse.advantages[-1]) == pytest.approx(-(0.5**0.5), abs=1e-3)
    assert not better.advantages[better.mask == 0].any()


def test_prompts_go_on_where_their_state_was_taken(folder, batches):
    async def main() -> StepBatch | None:
        async with AsyncEngine.from_model(folder) as engine:
            physician = EnginePhysician(engine, "letters", max_tokens=20)
            source = PromptRollouts(PROMPTS, physician, dict, CONFIG, reward=ShareOfSmall())
            before = source.state()
            source.load_state(json.loads(json.dumps({**before, "taken": 6})))
            other = PromptRollouts(PROMPTS[:2], physician, dict, CONFIG, reward=ShareOfSmall())
            with pytest.raises(ValueError, match="prompts = "):
                other.load_state(before)
            return await source.batch(3)

    again = asyncio.run(main())
    for one, wanted in zip(again.samples, batches[3].samples, strict=True):
        assert one.id == wanted.id and torch.equal(one.ids, wanted.ids)
        assert torch.equal(one.sampler_logprobs, wanted.sampler_logprobs)


# -- log-probabilities ------------------------------------------------------------------------------------------------
def test_engine_and_trainer_find_tokens_alike(folder, model, samples):
    async def main() -> torch.Tensor:
        async with AsyncEngine.from_model(folder) as engine:
            return torch.cat(await EngineTeacher(engine, "letters").logprobs(samples))

    found = asyncio.run(main())
    packed = pack(samples)
    wanted = model.logprobs(packed)
    assert packed.mask.sum() > 100
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)
    torch.testing.assert_close(told(ModelTeacher(model, "m", max_tokens=60), samples), wanted, atol=1e-4, rtol=0)
    assert bool((found[packed.mask == 0] == 0).all())


def test_who_drew_knows_what_it_drew(folder, model):
    [first, *_] = asyncio.run(drawn(folder, temperature=0.8))

    async def main(**options) -> torch.Tensor:
        physician = EnginePhysician(AsyncEngine.from_model(folder), "letters", **options)
        return torch.cat(await SamplingTeacher(physician).logprobs(first.samples))

    torch.testing.assert_close(asyncio.run(main()), model.logprobs(pack(first.samples)), atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="without top_k, top_p, min_p"):
        asyncio.run(main(top_p=0.9))


def test_a_temperature_that_prompts_do_not_have_is_refused(folder, samples):
    hot = dataclasses.replace(samples[0], temperature=0.7)
    teacher = EngineTeacher(AsyncEngine.from_model(folder), "letters")
    with pytest.raises(ValueError, match=r"temperature: want 1: .*; got 0.7 of sample"):
        asyncio.run(teacher.logprobs([hot]))


# -- served -----------------------------------------------------------------------------------------------------------
def completions(model: PolicyModel, spoil: str = "") -> Starlette:
    """The part of vLLM's server that answers for prompts of ids."""

    async def complete(request: Request) -> JSONResponse:
        body = await request.json()
        assert (body["prompt_logprobs"], body["max_tokens"], body["model"]) == (0, 1, "letters")
        if spoil == "status":
            return JSONResponse({"error": {"message": "no such model"}}, status_code=404)
        ids = torch.tensor(body["prompt"])
        one = Sample(
            id="s", ids=ids, mask=(torch.arange(len(ids)) > 0).float(), steps=torch.zeros(len(ids), dtype=torch.int64)
        )
        found = model.logprobs(pack([one])).tolist()[1:]
        rows = [None, *({str(i): {"logprob": v, "rank": 1}} for i, v in zip(body["prompt"][1:], found, strict=True))]
        if spoil == "token":
            rows[2] = {"0": {"logprob": -1.0}}
        choice = {"index": 0, "text": "a", "finish_reason": "length", "logprobs": None}
        choice |= {} if spoil == "none" else {"prompt_logprobs": rows[:-1] if spoil == "short" else rows}
        return JSONResponse(
            {"id": "c", "object": "text_completion", "created": 0, "model": "letters", "choices": [choice]}
        )

    return Starlette(routes=[Route("/v1/completions", complete, methods=["POST"])])


async def ask(url: str, samples: list[Sample]) -> list[torch.Tensor]:
    teacher = ServedTeacher(url, "letters", max_retries=0, concurrency=3)
    try:
        return await teacher.logprobs(samples)
    finally:
        await teacher.close()


def test_a_served_teacher(model, samples):
    with serving(completions(model)) as url:
        found = torch.cat(asyncio.run(ask(url, samples)))
    torch.testing.assert_close(found, model.logprobs(pack(samples)), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("spoil", "failure", "message"),
    [
        ("status", Failure.refused, "status 404: .*no such model"),
        ("none", Failure.unreachable, r"want prompt_logprobs of \d+ tokens; got none"),
        ("short", Failure.unreachable, r"want prompt_logprobs of \d+ tokens; got \d+"),
        ("token", Failure.unreachable, r"want the log-probability of token \d+ at 2"),
    ],
)
def test_a_server_that_does_not_say(model, samples, spoil, failure, message):
    with serving(completions(model, spoil)) as url, pytest.raises(ChatError, match=message) as caught:
        asyncio.run(ask(url, samples[:2]))
    assert caught.value.failure is failure


# -- into a store -----------------------------------------------------------------------------------------------------
async def rolling(folder: Path, store: TrajectoryStore, wanted: int) -> int:
    async with AsyncEngine.from_model(folder) as engine:
        physician = EnginePhysician(engine, "letters", max_tokens=20)
        source = PromptRollouts(PROMPTS, physician, dict, CONFIG)
        return await roll_out(source, SamplingTeacher(physician), store, domain="advisory", samples=wanted)


def test_rollouts_go_on_in_the_store(folder, model, tmp_path):
    for name, parts in (("parts", (3, 9, 100)), ("whole", (100,))):
        for wanted in parts:
            with TrajectoryStore(tmp_path / name) as store:
                held = asyncio.run(rolling(folder, store, wanted))
    parts, whole = TrajectoryStore(tmp_path / "parts"), TrajectoryStore(tmp_path / "whole")
    assert held == 18 and [shard.samples for shard in whole.shards] == [4, 4, 4, 4, 2]
    assert parts.digest() == whole.digest() and parts.shards == whole.shards
    found = [whole.sample(shard, row) for shard in whole.shards for row in range(shard.samples)]
    assert {sample.domain for sample in found} == {"advisory"}
    wanted = model.logprobs(pack(found))
    torch.testing.assert_close(pack(found).teacher_logprobs, wanted, atol=1e-4, rtol=0)


def test_another_teacher_does_not_go_on(folder, tmp_path):
    async def main() -> None:
        async with AsyncEngine.from_model(folder) as engine:
            physician = EnginePhysician(engine, "letters", max_tokens=20)
            source = PromptRollouts(PROMPTS, physician, dict, CONFIG)
            with TrajectoryStore(tmp_path) as store:
                await roll_out(source, SamplingTeacher(physician, "a"), store, domain="d", samples=2)
                with pytest.raises(ValueError, match="teacher: want a, who began 'd'; got b"):
                    await roll_out(source, SamplingTeacher(physician, "b"), store, domain="d", samples=9)

    asyncio.run(main())
