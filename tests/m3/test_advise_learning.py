"""The advice task's policy, source and bench: rollouts from the model, what arms pay, exact resumption, intervals."""

import asyncio
import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from bench import facts as bench
from m3.algorithms import gspo
from m3.rewards import fact_aware
from m3.train.loop import TrainConfig, train
from m3.train.optim import OptimConfig
from m3.train.policy_model import PolicyModel
from m3.train.streams import pack
from m3.train.tasks import advise as task
from m3.train.tasks import advise_policy as policy
from m3.train.tasks import advise_rl as rl


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """More threads cost more than they bring to a model of this size."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


SMALL = policy.DecoderConfig(hidden=32, layers=2, heads=2, intermediate=64)
QUESTIONS = task.every_question(held_out=False)


@functools.cache
def started() -> PolicyModel:
    """A decoder that has learnt the form of a step, more or less. Not to be trained further."""
    model = policy.decoder(SMALL)
    optim = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(12):
        packed = pack(asyncio.run(policy.ScriptedSource(batch=16).batch(step)).samples)
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


def test_scripted_samples_carry_the_answers_tokens() -> None:
    sample = asyncio.run(policy.ScriptedSource(batch=2).batch(0)).samples[0]
    words = task.text(sample.ids.tolist()).split()
    assert words[:2] == ["<s>", "asks"] and words[-1] == "end" and words[5] == "states"
    assert sample.mask.tolist() == [0.0] * 5 + [1.0] * (len(words) - 5)
    assert sample.steps.tolist()[:9] == [-1] * 5 + [0, 0, 1, 1] and int(sample.steps[-1]) == (len(words) - 6) // 2
    again = asyncio.run(policy.ScriptedSource(batch=2).batch(0)).samples[0]
    assert torch.equal(again.ids, sample.ids)


def test_rollouts_have_the_log_probabilities_of_the_model_and_end_where_they_must() -> None:
    rollouts = policy.roll_out(started(), QUESTIONS[:16], "seed", temperature=0.7)
    assert len({len(one.ids) for one in rollouts}) > 2
    for one in rollouts:
        drawn = one.ids[task.OPENING :]
        assert one.ids[: task.OPENING] == one.question.opening and one.score == task.score(one.question, one.steps)
        cuts = [task.is_cut(one.steps[: at + 1]) for at in range(len(one.steps))]
        assert not any(cuts[:-1]) and (drawn[-1] == task.END if len(drawn) % 2 else cuts[-1])
        sample = policy.sample_of(one.ids, name="r", logprobs=one.logprobs, temperature=0.7)
        torch.testing.assert_close(started().logprobs(pack([sample])), sample.sampler_logprobs, atol=1e-4, rtol=0)


def test_rollouts_follow_from_their_seed() -> None:
    first, again, other = (policy.roll_out(started(), QUESTIONS[:6], seed) for seed in ("a", "a", "b"))
    assert first == again and [one.ids for one in first] != [one.ids for one in other]


def answer(right: int, wrong: int) -> policy.Rollout:
    """All core aspects, ``right`` of them rightly, ``wrong`` more wrongly, of a question that has an answer to all."""
    question = next(one for one in QUESTIONS if None not in one.truth)
    steps = tuple(
        (task.STATES, task.FIRST_FACT + task.VALUES * at + ((question.truth[at] or 0) + (at >= right)) % task.VALUES)
        for at in range(right + wrong)
    )
    return policy.Rollout(question=question, ids=(), logprobs=(), steps=steps, score=task.score(question, steps))


@pytest.mark.parametrize(
    ("arm", "wanted"),
    [
        ("none", 48 / 52),
        ("naive", 48 / 52 - 2 * 1 / 8),
        ("fact_aware", 48 / 52 - (1 / 8) / (1 + np.exp(-10 * (48 / 52 - 0.85) / 0.2))),
    ],
)
def test_what_an_arm_pays(arm: str, wanted: float) -> None:
    paid = rl.reward(arm, answer(7, 1), fact_aware.Config(alpha=2.0))
    assert paid == pytest.approx(wanted, abs=1e-5)


def test_a_batch_is_groups_of_one_question_with_their_advantages() -> None:
    config = rl.AdviseConfig(arm="naive", questions=2, rollouts=4, seed=3, facts=fact_aware.Config(alpha=1.0))
    source = rl.AdviseSource(started(), config)
    batch = asyncio.run(source.batch(5))
    assert [sample.group for sample in batch.samples] == ["5-0"] * 4 + ["5-1"] * 4
    assert [len({sample.note["question"] for sample in batch.samples[at : at + 4]}) for at in (0, 4)] == [1, 1]
    paid = []
    for sample in batch.samples:
        drawn = sample.ids[task.OPENING :].tolist()
        steps = list(zip(drawn[::2], drawn[1::2], strict=False))
        question = next(one for one in QUESTIONS if one.id == sample.note["question"])
        paid.append(task.fact_reward(question, steps, task.score(question, steps).reward, config.facts).naive)
    wanted = gspo.advantages(torch.tensor(paid, dtype=torch.float64).reshape(2, 4)).flatten()
    found = torch.tensor([float(sample.advantages[-1]) for sample in batch.samples])  # type: ignore[index]
    torch.testing.assert_close(found, wanted.float())
    assert source.state() == {"drawn": sum(sample.drawn for sample in batch.samples), "version": 0}


def test_unknown_arm_is_refused() -> None:
    with pytest.raises(ValueError, match="arm"):
        rl.AdviseConfig(arm="count")


def learn(folder: Path, steps: int) -> PolicyModel:
    model = copied()
    source = rl.AdviseSource(model, rl.AdviseConfig(questions=2, rollouts=4))
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


def test_rates_are_of_all_claims_together() -> None:
    scores = [answer(1, 0).score, answer(2, 3).score]
    found = rl.summary([*scores, dataclasses.replace(scores[0], claims=2, false=1)])
    assert found["hallucination"] == 4 / 8 and found["core_hallucination"] == 3 / 7
    assert found["peripheral_hallucination"] == pytest.approx(1.0) and found["peripheral"] == pytest.approx(1 / 3)
    assert rl.summary([answer(0, 0).score])["hallucination"] == 0.0


# -- the bench --------------------------------------------------------------------------------------------------------
def test_intervals_hold_the_rate_and_pair_what_is_compared() -> None:
    chance = np.random.default_rng(0)
    values = np.zeros((3, 40, len(rl.COUNTS)))
    values[:, :, rl.COUNTS.index("claims")] = chance.integers(4, 9, (3, 40))
    values[:, :, rl.COUNTS.index("false")] = chance.integers(0, 4, (3, 40))
    mean, low, high = bench.intervals(values)["hallucination"]
    assert mean == round(values[..., 2].sum() / values[..., 1].sum(), 4) and low < mean < high
    assert bench.intervals(values, values)["hallucination"] == (0.0, 0.0, 0.0)


def test_an_arm_has_its_alpha_behind_a_colon() -> None:
    config = bench.config_of("naive:0.25", 7)
    assert (config.arm, config.seed, config.facts.alpha) == ("naive", 7, 0.25)
    assert bench.config_of("fact_aware", 7).facts == fact_aware.Config()


def test_scripted_frontier_trades_reward_for_hallucination() -> None:
    points = [bench.intervals(bench.scripted(least)) for least in (0.55, 0.7, 0.85, 1.0)]
    rewards, rates = ([point[name][0] for point in points] for name in ("reward", "hallucination"))
    assert rewards == sorted(rewards, reverse=True) and rates == sorted(rates, reverse=True) and rates[-1] == 0.0


def test_a_run_that_is_done_is_read_and_told(tmp_path: Path) -> None:
    questions = len(task.every_question(held_out=True))
    row = [0.9, 8.0, 1.0, 7.0, 1.0, 0.8, 0.0, 8.0]
    for name in (bench.START, "none-1", "fact_aware-1"):
        (tmp_path / name).mkdir()
        told = f'{{"values": {[row] * questions}, "seconds": 1.0, "tokens": 5}}'
        (tmp_path / name / bench.HELD_OUT).write_text(told)
    found = bench.rows(tmp_path, ["none", "fact_aware"], [1], 4, 1e-3)
    names = [one.arm for one in found]
    assert names[-3:] == ["start", "none", "fact_aware"] and names[0] == "scripted 0.55"
    assert found[-1].held_out["hallucination"] == (0.125, 0.125, 0.125) and found[-2].against["reward"][0] == 0.0
