"""Log-probabilities read while others are drawn: whose turn it is, by events; their values; what is left behind."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
import torch

from m3.environment.case import Case, Phase
from m3.environment.episode import Said
from m3.environment.pipeline import Answer, Config
from m3.environment.segment import Context, StageScore
from m3.environment.trajectory import Message, Trajectory
from m3.rewards.verdict import UnjudgedError
from m3.train.read_ahead import ReadAhead
from m3.train.stage import StepBatch
from m3.train.streams import Sample
from m3.train.task_rl import TaskRL, TaskRLConfig
from tests.m3.clinic_cases import small_case

CASES = tuple(small_case(id=f"case-{i}") for i in range(2))
INQUIRY = Config(stages=(Phase.inquiry,), rollouts=3, batch_size=6, epochs=9, seed=3, retries=0)


class OneWord:
    """Each rollout says one token, its number; ``before``: what it waits for, by number of the rollout."""

    name, policy, version = "one-word", "one-word", 0

    def __init__(self, before: dict[int, asyncio.Event] | None = None) -> None:
        self.before = before or {}

    async def open(self, case: Case, *, seed: int) -> tuple[Message, ...]:
        return (Message(role="user", content="I cough.", turn=0, phase=Phase.inquiry, meta={"mode": "passive"}),)

    async def answer(self, context: Context, *, seed: int, rollout: int) -> Answer:
        if rollout in self.before:
            await self.before[rollout].wait()
        said = Said(text="Hm?", given_ids=(7, 8), token_ids=(rollout, 96), logprobs=(-1.0, -2.0), versions=(0, 0),
                    finish="stop")  # fmt: skip
        message = said.message(turn=0, phase=Phase.inquiry, action=None)
        return Answer(messages=(message,), ended="closed")


class Physician:
    """Who would draw, were OneWord not there."""

    name, temperature, version, sampling, filtered = "p", 1.0, 0, "none", False


class Reward:
    """The rollout's number; ``during``: what to do while it is judged."""

    name = "reward"

    def __init__(self, during=None) -> None:
        self.during = during

    async def __call__(self, case: Case, trajectory: Trajectory, phase: Phase) -> StageScore:
        if self.during is not None:
            await self.during(trajectory)
        return StageScore(reward=trajectory.rollout / 2)


class Reader:
    """Every token has the log-probability -id / 10. ``during``: awaited first, with the sample."""

    name = "reader"

    def __init__(self, during=None) -> None:
        self.during, self.read = during, []

    async def logprobs(self, samples: Sequence[Sample]) -> list[torch.Tensor]:
        [sample] = samples
        self.read.append(sample.id)
        if self.during is not None:
            await self.during(sample)
        return [-sample.ids / 10 * (sample.mask > 0)]


def source_of(consultation: OneWord, reward: Reward, **readers: Reader) -> TaskRL:
    config = TaskRLConfig(pipeline=INQUIRY)
    return TaskRL(CASES, consultation, {Phase.inquiry: reward}, Physician(), dict, config, readers=readers)


def batch_of(source: TaskRL) -> StepBatch:
    async def main() -> StepBatch | None:
        async with asyncio.timeout(10):
            return await source.batch(0)

    found = asyncio.run(main())
    assert found is not None
    return found


def test_each_sample_has_what_was_read_of_it():
    old, ref = Reader(), Reader()
    batch = batch_of(source_of(OneWord(), Reward(), old_logprobs=old, ref_logprobs=ref))
    assert len(batch.samples) == 6 and sorted(old.read) == sorted(ref.read) == sorted(s.id for s in batch.samples)
    for sample in batch.samples:
        assert sample.ids.tolist() == [7, 8, sample.rollout, 96]
        assert sample.old_logprobs.tolist() == pytest.approx([0, 0, -sample.rollout / 10, -9.6])
        assert torch.equal(sample.ref_logprobs, sample.old_logprobs)


def test_a_rollout_is_read_while_others_are_drawn_and_while_it_is_judged():
    """The last rollout is drawn when the first is being read; the first is judged when it is being read; its reading
    ends when the last is drawn."""

    async def main() -> StepBatch | None:
        reading, judging, drawn = asyncio.Event(), asyncio.Event(), asyncio.Event()

        async def read(sample: Sample) -> None:
            if sample.id.endswith("/0"):
                reading.set()
                await asyncio.gather(judging.wait(), drawn.wait())

        async def judge(trajectory: Trajectory) -> None:
            if trajectory.rollout == 0:
                await reading.wait()
                judging.set()
            if trajectory.rollout == 2:
                drawn.set()

        source = source_of(OneWord({2: reading}), Reward(judge), old_logprobs=Reader(read))
        async with asyncio.timeout(10):
            return await source.batch(0)

    assert len(asyncio.run(main()).samples) == 6


def test_an_error_of_the_reader_ends_the_batch():
    async def fail(sample: Sample) -> None:
        raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        batch_of(source_of(OneWord(), Reward(), old_logprobs=Reader(fail)))


def test_what_nobody_takes_is_dropped():
    """A group whose judge fails stays out; its reading, still under way, is ended with the batch."""
    ended: list[str] = []

    async def hang(sample: Sample) -> None:
        if sample.id.startswith("case-0"):
            try:
                await asyncio.Event().wait()
            finally:
                ended.append(sample.id)

    async def judge(trajectory: Trajectory) -> None:
        if trajectory.case == "case-0":
            raise UnjudgedError("no verdict")

    batch = batch_of(source_of(OneWord(), Reward(judge), old_logprobs=Reader(hang)))
    assert {sample.group[:6] for sample in batch.samples} == {"case-1"}
    assert len(ended) == 3


def test_without_readers_nothing_is_read():
    ahead = ReadAhead(OneWord(), {}, temperature=1.0)
    sample = batch_of(source_of(OneWord(), Reward())).samples[0]
    assert sample.old_logprobs is None
    assert asyncio.run(ahead.taken(sample)) is sample and ahead.name == "one-word"


def test_a_run_with_other_readers_is_refused():
    state = source_of(OneWord(), Reward(), old_logprobs=Reader()).state()
    with pytest.raises(ValueError, match=r"readers = \{\}"):
        source_of(OneWord(), Reward()).load_state(state)
