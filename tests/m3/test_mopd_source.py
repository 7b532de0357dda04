"""Stage 3: streams of mixed domains by hand, the gradient restated, and going on where it was; then stage 1 again."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from letters_model import make_letters_model

from m3.algorithms import mopd
from m3.engine.engine import AsyncEngine
from m3.environment.case import Phase
from m3.environment.consultation import SimulatedConsultation
from m3.environment.pipeline import Config
from m3.environment.segment import StageScore
from m3.train import objective
from m3.train.loop import TrainConfig, train
from m3.train.mopd import Mopd
from m3.train.optim import OptimConfig
from m3.train.policy_model import PolicyModel
from m3.train.prompt_rollouts import Prompt, PromptRollouts, PromptRolloutsConfig
from m3.train.rollouts import EnginePhysician
from m3.train.stage import Objective, StepBatch
from m3.train.streams import Sample, pack
from m3.train.task_rl import TaskRL, TaskRLConfig
from m3.train.teachers import ModelTeacher
from tests.m3.clinic_runs import CASES
from tests.m3.train_cases import draw_samples, with_one_thread

one_thread = pytest.fixture(scope="module", autouse=True)(with_one_thread)


class Given:
    """A domain whose batches are given; the state is how many were taken."""

    objective = Objective(spec=mopd.loss_spec(), on_policy=True)

    def __init__(self, *batches: Sequence[Sample]) -> None:
        self.batches, self.taken, self.closed = batches, 0, False

    async def batch(self, step: int) -> StepBatch | None:
        if self.taken == len(self.batches):
            return None
        self.taken += 1
        return StepBatch(step=step, samples=self.batches[self.taken - 1], metrics={"turns": 2.0})

    async def updated(self, step: int, version: int) -> None:
        raise AssertionError("the student is refreshed once, not by each domain")

    def state(self) -> Mapping[str, Any]:
        return {"taken": self.taken}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.taken = state["taken"]

    async def close(self) -> None:
        self.closed = True


class Constant:
    """A teacher to whom every token has one log-probability."""

    def __init__(self, name: str, value: float) -> None:
        self.name, self.value = name, value

    async def logprobs(self, samples: Sequence[Sample]) -> list[torch.Tensor]:
        return [torch.where(sample.mask > 0, self.value, 0.0) for sample in samples]


class Physician:
    """Remembers the weights that it is given."""

    def __init__(self) -> None:
        self.given: list[tuple[Mapping[str, torch.Tensor], int]] = []

    async def refresh(self, tensors: Mapping[str, torch.Tensor], version: int) -> None:
        self.given.append((tensors, version))


def sample(name: str, **changes: Any) -> Sample:
    """Three tokens of a prompt and a step of two."""
    streams: dict[str, Any] = dict(
        sampler_logprobs=torch.tensor([0, 0, 0, -1.0, -2.0]), advantages=torch.tensor([0, 0, 0, 0.5, 0.5]),
        old_logprobs=torch.zeros(5),
    )  # fmt: skip
    return Sample(
        id=name, ids=torch.tensor([1, 2, 3, 4, 5]), mask=torch.tensor([0, 0, 0, 1.0, 1.0]),
        steps=torch.tensor([-1, -1, -1, 0, 0]), **{**streams, **changes},
    )  # fmt: skip


def made(inquiry: Given, general: Given, physician: Any = None, **config: Any) -> Mopd:
    teachers = {"inquiry": Constant("a", -3.0), "general": Constant("b", -0.5)}
    domains = {"inquiry": inquiry, "general": general}
    return Mopd(domains, teachers, physician or Physician(), lambda: {"w": torch.ones(1)}, mopd.Config(**config))


# -- streams ----------------------------------------------------------------------------------------------------------
def test_streams_and_metrics_by_hand():
    source = made(Given([sample("i")]), Given([sample("g"), sample("h")]), alpha=0.25)
    batch = asyncio.run(source.batch(0))
    assert [(one.id, one.domain) for one in batch.samples] == [("g", "general"), ("h", "general"), ("i", "inquiry")]
    first, last = batch.samples[0], batch.samples[-1]
    assert first.ref_logprobs.tolist() == [0, 0, 0, -0.5, -0.5]
    assert last.ref_logprobs.tolist() == [0, 0, 0, -3.0, -3.0]
    assert last.advantages.tolist() == [0, 0, 0, 0.125, 0.125]
    assert last.sampler_logprobs.tolist() == [0, 0, 0, -1, -2] and last.old_logprobs is None
    assert batch.metrics == pytest.approx({
        "general/turns": 2, "general/reverse_kl": -1.5 + 0.5, "general/outcome": 0.125,
        "inquiry/turns": 2, "inquiry/reverse_kl": -1.5 + 3.0, "inquiry/outcome": 0.125,
    })  # fmt: skip
    assert set(objective.needed(source.objective, batch.samples)) == {"advantages", "ref_logprobs", "sampler_logprobs"}


def test_a_domain_that_was_judged_while_it_was_drawn_is_not_judged_again():
    judged = torch.tensor([0, 0, 0, -7.0, -8.0])
    source = made(Given([sample("i", teacher_logprobs=judged)]), Given([sample("g")]))
    general, inquiry = asyncio.run(source.batch(0)).samples
    assert inquiry.ref_logprobs.tolist() == judged.tolist()
    assert general.ref_logprobs.tolist() == [0, 0, 0, -0.5, -0.5]


@pytest.mark.parametrize("name", ["advantages", "sampler_logprobs"])
def test_a_sample_that_lacks_a_stream_is_named(name):
    source = made(Given([sample("i", **{name: None})]), Given([sample("g")]))
    with pytest.raises(ValueError, match=f"{name}: want a stream of every sample; got none of sample 'i' of 'inquiry'"):
        asyncio.run(source.batch(0))


def test_teachers_are_those_of_the_domains():
    with pytest.raises(ValueError, match=r"teachers: want one of each domain, \['a', 'b'\]; got \['a'\]"):
        Mopd({"a": Given(), "b": Given()}, {"a": Constant("a", 0)}, Physician(), dict)


def test_it_ends_with_the_first_domain():
    source = made(Given([sample("i")], [sample("j")]), Given([sample("g")]))
    found = [asyncio.run(source.batch(step)) for step in range(2)]
    assert found[0] is not None and found[1] is None


def test_state_refresh_and_close():
    inquiry, general, physician = Given([sample("i")], [sample("j")]), Given([sample("g")], [sample("h")]), Physician()
    source = made(inquiry, general, physician)
    asyncio.run(source.batch(0))
    asyncio.run(source.updated(0, 1))
    assert [version for _, version in physician.given] == [1] and physician.given[0][0]["w"] == 1
    state = json.loads(json.dumps(source.state()))
    again = made(Given([sample("i")], [sample("j")]), Given([sample("g")], [sample("h")]))
    again.load_state(state)
    assert [one.id for one in asyncio.run(again.batch(1)).samples] == ["h", "j"]
    with pytest.raises(ValueError, match="config = "):
        made(Given(), Given(), alpha=2.0).load_state(state)
    asyncio.run(source.close())
    assert inquiry.closed and general.closed


# -- the loss ---------------------------------------------------------------------------------------------------------
def test_the_gradient_is_that_of_the_formula(folder):
    """-mean over sequences of 1/|y| sum of w A log pi, restated from the model's own logits."""
    model, teacher = PolicyModel.load(folder), PolicyModel.load(folder)
    with torch.no_grad():
        teacher.head.weight.mul_(1.5)
    drawn = draw_samples("m", (9, 17, 12), streams=("advantages",))
    mixed = [
        dataclasses.replace(one, mask=(one.mask > 0).float(), domain="general",
                            sampler_logprobs=model.logprobs(pack([one])) + 0.6 * torch.arange(-1, one.tokens - 1).sin())
        for one in drawn
    ]  # fmt: skip
    config = mopd.Config(alpha=0.5, weight_low=0.6, weight_high=1.5)
    source = Mopd({"general": Given(mixed)}, {"general": ModelTeacher(teacher, "t")}, Physician(), dict, config)
    batch = asyncio.run(source.batch(0))
    goal = source.objective
    found, _ = objective.loss(goal, model, pack(batch.samples), objective.normaliser(goal, batch.samples))

    total, kept, left = torch.zeros(()), 0, 0
    for one in mixed:
        rows = [m.causal(input_ids=one.ids[None]).logits[0, :-1].log_softmax(-1) for m in (model, teacher)]
        own, told = (row.gather(1, one.ids[1:, None])[:, 0] for row in rows)
        weight = (own.detach() - one.sampler_logprobs[1:]).exp()
        within = (weight >= 0.6) & (weight <= 1.5)
        advantage = (told - own).detach() + 0.5 * one.advantages[1:]
        terms = torch.where(within, weight, 0.0) * advantage * own * one.mask[1:]
        total = total - terms.sum() / one.mask.sum() / len(mixed)
        kept, left = kept + int((within & (one.mask[1:] > 0)).sum()), left + int((~within & (one.mask[1:] > 0)).sum())
    assert kept > 5 and left > 3
    parameters = [parameter for _, parameter in model.trained()]
    for one, other in zip(torch.autograd.grad(found, parameters), torch.autograd.grad(total, parameters), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-3)


# -- the whole: consultations and prompts, two teachers, one student --------------------------------------------------
class SmallLetters:
    """The share of small letters in what the physician said."""

    name = "small-letters"

    async def __call__(self, case: Any, trajectory: Any, phase: Phase) -> StageScore:
        said = "".join(message.content for message in trajectory.of("assistant", phase))
        return StageScore(reward=sum(letter.islower() for letter in said) / len(said), quality=1.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_letters_model(tmp_path_factory.mktemp("letters"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 2048}))
    return folder


def consulting(physician: EnginePhysician, model: PolicyModel) -> TaskRL:
    consultation = SimulatedConsultation(physician, max_turns=2, version=lambda: physician.version)
    plan = Config(stages=(Phase.inquiry,), epochs=9, rollouts=2, batch_size=2, seed=1)
    rewards = {Phase.inquiry: SmallLetters()}
    return TaskRL(CASES, consultation, rewards, physician, model.tensors, TaskRLConfig(pipeline=plan))


def plan(steps: int) -> TrainConfig:
    return TrainConfig(
        steps=steps, max_tokens=700, optim=OptimConfig(lr=1e-2), checkpoint_every=1, samples_every=0, tensorboard=False
    )


def learn(folder: Path, out: Path, steps: int) -> dict[str, torch.Tensor]:
    """Weights after some steps, from the newest checkpoint in ``out`` on."""

    async def main() -> dict[str, torch.Tensor]:
        model, teachers = PolicyModel.load(folder), [PolicyModel.load(folder) for _ in range(2)]
        with torch.no_grad():
            teachers[0].head.weight.mul_(1.5)
            teachers[1].head.weight.neg_()
        async with AsyncEngine.from_model(folder) as engine:
            physician = EnginePhysician(engine, "letters", max_tokens=8)
            prompts = [Prompt(id=f"p{n}", messages=(("user", "Hi" * n),)) for n in (1, 2, 3)]
            asked = PromptRolloutsConfig(prompts=2, rollouts=2)
            source = Mopd(
                {"inquiry": consulting(physician, model),
                 "general": PromptRollouts(prompts, physician, model.tensors, asked)},
                {"inquiry": ModelTeacher(teachers[0], "one"), "general": ModelTeacher(teachers[1], "two")},
                physician, model.tensors,
            )  # fmt: skip
            await train(source, model, plan(steps), out)
            await source.close()
        return {name: tensor.clone() for name, tensor in model.tensors().items()}

    return asyncio.run(main())


def test_a_run_that_goes_on_is_one_that_was_not_interrupted(folder, tmp_path):
    learn(folder, tmp_path / "parts", 1)
    parts = learn(folder, tmp_path / "parts", 3)
    whole = learn(folder, tmp_path / "whole", 3)
    assert parts.keys() == whole.keys() and all(torch.equal(parts[name], whole[name]) for name in whole)
    lines = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("parts", "whole")]
    assert lines[0] == lines[1]
    rows = [json.loads(line) for line in lines[0].splitlines()]
    assert all(row["sampler_weight"] == pytest.approx(1.0, abs=1e-3) for row in rows)
    assert rows[0]["general/outcome"] == 0 < rows[0]["inquiry/reverse_kl"]


def test_what_comes_out_can_go_through_stage_1_again(folder, tmp_path):
    learn(folder, tmp_path, 1)

    async def main() -> torch.Tensor:
        model = PolicyModel.load(tmp_path / "model")
        async with AsyncEngine.from_model(tmp_path / "model") as engine:
            physician = EnginePhysician(engine, "letters", max_tokens=8)
            outcome = await train(consulting(physician, model), model, plan(1), tmp_path / "again")
        assert outcome.step == 1
        return model.tensors()["model.norm.weight"]

    again = asyncio.run(main())
    first = PolicyModel.load(folder).tensors()["model.norm.weight"]
    assert not torch.equal(again, first)
