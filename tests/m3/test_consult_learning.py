"""The consultation task's policy and source: rollouts from the model, advantages by hand, exact resumption."""

import asyncio
import functools
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from m3.algorithms import spar
from m3.train.loop import TrainConfig, train
from m3.train.objective import loss, normaliser
from m3.train.optim import OptimConfig
from m3.train.policy_model import PolicyModel
from m3.train.stage import Objective
from m3.train.streams import pack
from m3.train.tasks import consult as task
from m3.train.tasks import consult_policy as policy
from m3.train.tasks import consult_rl as rl
from m3.train.tasks.open_consult import TeacherSource
from m3kernels.policy_loss import DistillSpec


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """More threads cost more than they bring to a model of this size."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


SMALL = policy.DecoderConfig(hidden=32, layers=2, heads=2, intermediate=64)


@functools.cache
def started() -> PolicyModel:
    """A decoder that has learnt the form of a step, more or less. Not to be trained further."""
    model = policy.decoder(SMALL)
    optim = torch.optim.AdamW(model.parameters(), lr=1e-2)
    chance = random.Random(0)
    for _ in range(20):
        found = [task.consult(task.draw_case(chance), task.Habits(), chance) for _ in range(16)]
        packed = pack([policy.sample_of(ids, score, name="s") for ids, score in found])
        rows = (packed.mask[1:] > 0).nonzero()[:, 0]
        logits = model.hidden(packed)[rows] @ model.head.weight.T
        torch.nn.functional.cross_entropy(logits, packed.ids[rows + 1]).backward()
        optim.step()
        optim.zero_grad()
    return model


def copied() -> PolicyModel:
    model = policy.decoder(SMALL)
    model.load_state_dict(started().state_dict())
    return model


def test_scripted_samples_carry_the_physicians_tokens_alone() -> None:
    batch = asyncio.run(policy.ScriptedSource(batch=3).batch(0))
    sample = batch.samples[0]
    marked = [task.WORDS[token] for token, mask in zip(sample.ids.tolist(), sample.mask.tolist(), strict=True) if mask]
    assert set(marked[::2]) <= {"please", "state", "diagnosis"} and len(marked) == 2 * (int(sample.steps.max()) + 1)
    assert sample.steps.tolist()[:9] == [-1, -1, -1, 0, 0, -1, 1, 1, -1] and float(sample.mask.sum()) == sample.drawn
    again = asyncio.run(policy.ScriptedSource(batch=3).batch(0))
    assert [one.ids.tolist() for one in again.samples] == [one.ids.tolist() for one in batch.samples]


def test_rollouts_replay_to_their_scores_and_log_probabilities() -> None:
    cases = task.draw_cases(12, "r")
    rollouts = policy.roll_out(started(), cases, "seed", temperature=0.7, max_turns=6)
    assert {one.prompted for one in rollouts} == {True, False}
    assert len({rollout.score.turns for rollout in rollouts}) > 2  # rows end at different moments
    samples = [
        policy.sample_of(
            one.ids, one.score, name="r", prompted=one.prompted, sampler_logprobs=one.logprobs, temperature=0.7
        )
        for one in rollouts
    ]
    for rollout, sample in zip(rollouts, samples, strict=True):
        now, drawn = task.Consultation(rollout.case, max_turns=6), sample.ids[sample.mask > 0].tolist()
        if rollout.prompted:
            drawn.insert(-1, task.DIAGNOSIS)
        for first, second in zip(drawn[::2], drawn[1::2], strict=True):
            now.act(first, second)
        assert now.done and now.score() == rollout.score
        torch.testing.assert_close(started().logprobs(pack([sample])), sample.sampler_logprobs, atol=1e-4, rtol=0)


def test_rollouts_follow_from_their_seed() -> None:
    cases = task.draw_cases(6, "s")
    first, again, other = (policy.roll_out(started(), cases, seed) for seed in ("a", "a", "b"))
    assert first == again and [one.ids for one in first] != [one.ids for one in other]


def test_rollouts_are_drawn_from_the_models_distribution() -> None:
    case = task.draw_cases(1, "t")[0]
    rollouts = policy.roll_out(started(), [case] * 3000, "many", max_turns=2)
    logits = started().causal(input_ids=torch.tensor([case.opening])).logits[0, -1].detach()
    counts = torch.bincount(torch.tensor([one.ids[3] for one in rollouts]), minlength=len(task.WORDS)) / 3000
    assert float((counts - logits.softmax(-1)).abs().max()) < 0.04  # about 4 standard errors


REWARDS = torch.tensor([[0.2, 0.8]], dtype=torch.float64)  # mean 0.5, std 0.3 * sqrt(2)
FACTORS = torch.tensor([[[1.0, 1.0, 1.0], [1.0, 0.1, 1.0]]])  # the second rollout's second step; the first has 2 steps
TURNS = torch.tensor([[2, 3]])
UNIT = 0.5**0.5  # 0.3 / (0.3 * sqrt(2))


@pytest.mark.parametrize(
    ("arm", "wanted"),
    [
        ("grpo", [[-UNIT] * 3, [UNIT] * 3]),
        ("global_penalty", [[-UNIT] * 3, [UNIT] * 3]),  # 0.2 against 0.8 * 0.7: two rewards are at +-UNIT whatever
        ("spar", [[-UNIT] * 3, [UNIT, UNIT - 0.9 * 0.8 / (0.3 * 2**0.5), UNIT]]),
    ],
)
def test_advantages_by_hand(arm: str, wanted: list[list[float]]) -> None:
    found = rl.step_advantages(arm, REWARDS, FACTORS, TURNS)
    torch.testing.assert_close(found, torch.tensor([wanted], dtype=torch.float64), atol=1e-5, rtol=0)


def test_global_penalty_takes_the_mean_of_the_steps_returns() -> None:
    rewards = torch.tensor([[0.5, 0.5, 0.5]], dtype=torch.float64)
    factors = torch.tensor([[[1.0, 1.0], [0.1, 1.0], [0.5, 1.0]]])
    found = rl.step_advantages("global_penalty", rewards, factors, torch.tensor([[2, 1, 2]]))[0, :, 0]
    returns = torch.tensor([0.5, 0.05, 0.375], dtype=torch.float64)  # 0.5 * mean gamma: 1, 0.1, 0.75
    torch.testing.assert_close(found, (returns - returns.mean()) / returns.std(), atol=1e-4, rtol=0)


def test_a_batch_is_groups_of_one_case_with_their_advantages() -> None:
    source = rl.ConsultSource(started(), rl.ConsultConfig(cases=2, rollouts=4, seed=3))
    batch = asyncio.run(source.batch(5))
    assert batch is not None and [sample.group for sample in batch.samples] == ["5-0"] * 4 + ["5-1"] * 4
    assert [len({sample.note["case"] for sample in batch.samples[at : at + 4]}) for at in (0, 4)] == [1, 1]
    rewards = torch.tensor([[sample.reward for sample in batch.samples[:4]]], dtype=torch.float64)
    for index, sample in enumerate(batch.samples[:4]):
        gammas = torch.ones(1, 4, 20)
        gammas[0, index, : len(sample.gammas)] = torch.tensor(list(sample.gammas.values()))
        wanted = spar.advantages(rewards, gammas)[0, index, : len(sample.gammas)].float()
        found = sample.advantages[sample.mask > 0]  # type: ignore[index]
        per_step = torch.tensor([int((sample.steps == step).sum()) for step in range(len(wanted))])
        torch.testing.assert_close(found, wanted.repeat_interleave(per_step))
    assert source.state() == {"drawn": sum(sample.drawn for sample in batch.samples), "version": 0}


def test_unknown_arm_is_refused() -> None:
    with pytest.raises(ValueError, match="arm"):
        rl.ConsultConfig(arm="ppo")


def test_the_source_ends_when_its_tokens_are_spent() -> None:
    source = rl.ConsultSource(started(), rl.ConsultConfig(cases=1, rollouts=2, tokens=1))
    assert asyncio.run(source.batch(0)) is not None and asyncio.run(source.batch(1)) is None


def learn(folder: Path, steps: int, arm: str = "spar") -> PolicyModel:
    model = copied()
    source = rl.ConsultSource(model, rl.ConsultConfig(arm=arm, cases=2, rollouts=4))
    config = TrainConfig(steps=steps, optim=OptimConfig(lr=1e-3), tensorboard=False)
    asyncio.run(train(source, model, config, folder, decode=task.text))
    return model


def test_a_run_in_two_parts_is_the_run_in_one(tmp_path: Path) -> None:
    whole = learn(tmp_path / "one", 4)
    learn(tmp_path / "two", 2)
    parts = learn(tmp_path / "two", 4)
    assert (tmp_path / "one" / "metrics.jsonl").read_bytes() == (tmp_path / "two" / "metrics.jsonl").read_bytes()
    for name, value in whole.trained():
        assert torch.equal(value, dict(parts.trained())[name]), name


def test_tokenizer_reads_and_writes_the_words(tmp_path: Path) -> None:
    import transformers

    policy.write_tokenizer(tmp_path)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    ids, _ = task.consult(task.draw_cases(1, "u")[0], task.Habits(), random.Random(0))
    assert tokenizer(task.text(ids))["input_ids"] == ids


def test_summary_by_hand() -> None:
    score = task.Score(
        reward=0.5, violations=(("redundant_question",), (), (), ("safety_risk",)), diagnosed=False, coverage=0.25
    )
    other = task.Score(reward=1.0, violations=((), ()), diagnosed=True, coverage=0.75)
    assert rl.summary([score, other]) == {
        "reward": 0.75, "repeat_score": 0.875, "logical_score": 1.0, "phrasing_score": 1.0, "safe": 0.5, "turns": 3.0,
        "diagnosis": 0.5, "coverage": 0.5,
    }  # fmt: skip


def test_teachers_who_ask_to_the_last_turn_teach() -> None:
    """The word that ended such a consultation was given: it is not taught."""
    source = TeacherSource({"chest": started(), "belly": started()}, Objective(spec=DistillSpec()), seed=1, batch=40)
    samples = asyncio.run(source.batch(0)).samples
    prompted = [one for one in samples if one.drawn % 2]
    assert prompted and {int(one.steps.max()) for one in prompted} == {task.MAX_TURNS - 1}
    for one in prompted:
        last = int((one.steps == task.MAX_TURNS - 1).nonzero()[0, 0])
        assert task.WORDS[int(one.ids[last - 1])] == "diagnosis" and one.mask.tolist()[last - 1 : last + 1] == [0, 1]
        assert one.teacher_logprobs is not None and bool((one.teacher_logprobs[one.mask > 0] < 0).all())


def test_forward_kl_of_teachers_is_the_likelihood_of_their_tokens() -> None:
    objective = Objective(spec=DistillSpec(divergence="forward"))
    source = TeacherSource({"chest": started()}, objective, seed=1, batch=6)
    samples = asyncio.run(source.batch(0)).samples
    student, packed = policy.decoder(SMALL), pack(samples)
    value, _ = loss(objective, student, packed, normaliser(objective, samples))
    assert value.item() == pytest.approx(-float(student.logprobs(packed).sum() / packed.mask.sum()), rel=1e-5)
