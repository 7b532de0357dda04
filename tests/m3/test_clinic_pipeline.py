"""The segmented pipeline: the gate (Eq 6), groups and seeds, back-pressure, failures by name, cancelling, going on."""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import itertools
import json
import math
import random
from pathlib import Path

import pytest
import torch

from m3.algorithms import grpo, spar
from m3.environment.case import Phase
from m3.environment.consultation import SimulatedConsultation
from m3.environment.journal import Journal
from m3.environment.modes import ModeConfig
from m3.environment.pipeline import Config, Pipeline, PipelineError, Progress
from m3.environment.seeds import derive_seed
from m3.environment.segment import Batch, Segment, StageScore
from m3.environment.stages import PHASES
from m3.environment.trajectory import to_line
from m3.rewards.verdict import UnjudgedError
from m3.rollout.chat import ChatError, Failure
from tests.m3.clinic_runs import CASES, CONFIG, REWARDS, ScoredBySeed, SpokenBySeed, TwoQuestions


def drain(pipeline: Pipeline) -> list[Batch]:
    async def all_of_it() -> list[Batch]:
        async with pipeline:
            return [batch async for batch in pipeline]

    return asyncio.run(all_of_it())


def run(config: Config = CONFIG, consultation=None, rewards=None, cases=CASES) -> tuple[list[Segment], Progress]:
    pipeline = Pipeline(cases, consultation or SpokenBySeed(), rewards or REWARDS, config)
    batches = drain(pipeline)
    return list(itertools.chain.from_iterable(batch.segments for batch in batches)), pipeline.progress


async def settle() -> None:
    """Until nothing moves that does not wait for its reader: no answer here waits for a clock."""
    for _ in range(2000):
        await asyncio.sleep(0)


def with_(**changes) -> Config:
    return dataclasses.replace(CONFIG, **changes)


def lines(segments: list[Segment]) -> dict[str, str]:
    return {segment.id: to_line(segment.to_json()) for segment in segments}


# -- what the tree of segments is -------------------------------------------------------------------------------------
def test_the_tree_is_that_of_a_plain_walk():
    """An independent walk, one segment after another: scores by seed, the gate, the draw of those that go on."""
    wanted = []

    def walk(name: str, stages: tuple[Phase, ...]) -> None:
        ids = [f"{name}/{i}" for i in range(3)]
        seeds = [derive_seed(5, "rollout", name, str(stages[0]), i) for i in range(3)]
        scores = [random.Random(seed).random() for seed in seeds]
        wanted.extend(zip(ids, seeds, scores, strict=True))
        passed = [one for one, score in zip(ids, scores, strict=True) if score >= 0.5]
        drawn = random.Random(derive_seed(5, "gate", name)).sample(passed, min(2, len(passed)))
        if len(stages) > 1:
            for one in drawn:
                walk(one, stages[1:])

    for epoch, case in itertools.product(range(4), CASES):
        walk(f"{case.id}@{epoch}", PHASES)
    segments, _ = run()
    assert sorted((s.id, s.seed, s.reward) for s in segments) == sorted(wanted)


def test_results_do_not_depend_on_what_runs_beside():
    """One slot and sixteen, and answers that take different times: the same segments, byte for byte."""

    async def wait(context) -> None:
        await asyncio.sleep(derive_seed(0, context.id) % 4 / 1000)

    one, _ = run(with_(slots=1, pool=2, batch_size=3))
    many, _ = run(with_(slots=16, ahead=3), SpokenBySeed(before=wait))
    assert lines(one) == lines(many) and len(one) > 100


def test_another_seed_is_another_run():
    assert not {s.seed for s in run()[0]} & {s.seed for s in run(with_(seed=6))[0]}


def test_each_stage_begins_with_all_that_was_said():
    """Eq 5 along the tree: a segment's prompt is its parent's prompt and response, and an instruction."""
    segments = {segment.id: segment for segment in run()[0]}
    children = [s for s in segments.values() if s.phase != Phase.inquiry]
    parents = [segments[s.group] for s in children]
    assert [s.prompt[:-1] for s in children] == [(*p.prompt, *p.response) for p in parents]
    told = {s.prompt[-1].content.splitlines()[1] for s in children if s.phase == Phase.diagnosis}
    assert told == {"- ECG: ST elevation in II, III and aVF."}


# -- the gate (Eq 6) --------------------------------------------------------------------------------------------------
def test_the_gate_lets_pass_from_tau_on_and_says_why_it_does_not(tmp_path: Path):
    """tau itself passes; who is below, and who is not drawn, stands in the journal with the reason."""
    segments, _ = run(with_(stages=PHASES[:1]))
    tau = sorted(segment.quality for segment in segments)[len(segments) // 2]
    config = with_(stages=PHASES[:2], tau=dict.fromkeys(PHASES, tau), carry=1)
    path = tmp_path / "run.jsonl"
    with Journal(path, run={}) as journal:
        drain(Pipeline(CASES, SpokenBySeed(), REWARDS, config, journal=journal))
        groups = {row["id"]: row for row in journal.records("group") if row["phase"] == "inquiry"}
        stage_two = {row["segment"]["group"] for row in journal.records("segment")} - set(groups)
    passed = {s.id for s in segments if s.quality >= tau}
    below = {name for row in groups.values() for name, why in row["discarded"].items() if why.startswith("below_tau: ")}
    not_drawn = {name for row in groups.values() for name, why in row["discarded"].items() if why.startswith("not_dr")}
    carried = {name for row in groups.values() for name in row["carried"]}
    assert below == {s.id for s in segments} - passed and carried | not_drawn == passed and len(below) > 5
    assert stage_two == carried and max(len(row["carried"]) for row in groups.values()) == 1 and not_drawn


def test_the_gate_reads_the_quality_where_it_is_told():
    """V_k is not G_k: a reward of 0 with quality 1 goes on, and the other way it does not."""

    class Upside(ScoredBySeed):
        async def __call__(self, case, trajectory, phase):
            score = await super().__call__(case, trajectory, phase)
            return dataclasses.replace(score, quality=1.0 - score.reward)

    segments, _ = run(with_(stages=PHASES[:2]), rewards=dict.fromkeys(PHASES, Upside()))
    rewards = {s.id: s.reward for s in segments}
    assert {rewards[s.group] <= 0.5 for s in segments if s.phase == Phase.differential} == {True}


def test_nothing_below_the_gate_goes_on():
    segments, progress = run(with_(tau=dict.fromkeys(PHASES, 1.1)))
    assert {s.phase for s in segments} == {Phase.inquiry} and len(segments) == 36
    assert progress.discarded == {(Phase.inquiry, "below_tau"): 36}


# -- batches ----------------------------------------------------------------------------------------------------------
def test_batches_hold_whole_groups_and_mix_stages():
    batches = drain(Pipeline(CASES, SpokenBySeed(), REWARDS, with_(batch_size=12)))
    assert [batch.step for batch in batches] == list(range(len(batches)))
    assert {len(batch.segments) for batch in batches[:-1]} == {12}
    sizes = {len(group) for batch in batches for group in batch.groups().values()}
    assert sizes == {3}
    mixtures = [len({s.phase for s in batch.segments}) for batch in batches]
    assert sum(mixtures) / len(mixtures) > 2


def test_groups_are_what_advantages_are_relative_to():
    """From segments to SPAR's advantages (Eq 7, 8), by hand: gamma is 0.1 where the span stands."""
    segments, _ = run(with_(stages=PHASES[:1]))
    groups = Batch(step=0, segments=tuple(segments)).groups()
    rows = next(rows for rows in groups.values() if 0 < sum(map(bool, (s.spans for s in rows))) < 3)
    rewards = torch.tensor([[s.reward for s in rows]], dtype=torch.float64)
    factors = spar.step_factors([[s.violations() for s in rows]])
    found = spar.advantages(rewards, factors)
    mean = sum(s.reward for s in rows) / 3
    std = math.sqrt(sum((s.reward - mean) ** 2 for s in rows) / 2)
    by_hand = [
        [((0.1 if s.spans and turn == 1 else 1.0) * s.reward - mean) / (std + 1e-6) for turn in (0, 1)] for s in rows
    ]
    assert std > 0.1
    torch.testing.assert_close(found[0], torch.tensor(by_hand, dtype=torch.float64), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(found[0, :, 0], grpo.advantages(rewards)[0])


# -- back-pressure ----------------------------------------------------------------------------------------------------
def test_pools_never_hold_more_than_they_may():
    config = with_(pool=2, slots=16, tau=dict.fromkeys(PHASES, 0.0), epochs=2)
    segments, progress = run(config)
    assert max(progress.most_waiting.values()) == 2
    assert collections.Counter(s.phase for s in segments) == {
        Phase.inquiry: 18, Phase.differential: 36, Phase.lab: 72, Phase.diagnosis: 144
    }  # fmt: skip


def test_work_stops_while_nobody_takes_batches():
    """After the first batch the reader waits: at most (1 + ahead) batches more are made."""
    began = []

    async def note(context) -> None:
        began.append(context.id)

    async def read_one() -> tuple[int, int]:
        async with Pipeline(CASES, SpokenBySeed(before=note), REWARDS, with_(batch_size=6, ahead=1)) as pipeline:
            await anext(pipeline)
            await settle()
            first = len(began)
            await settle()
            return first, len(began)

    first, later = asyncio.run(read_one())
    assert first == later and 6 < first <= 6 + 2 * 6


# -- failures ---------------------------------------------------------------------------------------------------------
FAILURES = {
    "timeout": (lambda: ChatError(Failure.timeout, "slow"), "timeout", 3),
    "unreachable": (lambda: ChatError(Failure.unreachable, "gone"), "unreachable", 3),
    "refused": (lambda: ChatError(Failure.refused, "wrong key"), "refused", 1),
    "over_budget": (lambda: ChatError(Failure.over_budget, "spent"), "over_budget", 1),
    "unjudged": (lambda: UnjudgedError("3 unparsable"), "unjudged", 3),
}


@pytest.mark.parametrize(("error", "name", "attempts"), FAILURES.values(), ids=FAILURES)
def test_a_failure_has_a_name_and_takes_only_its_group(error, name, attempts):
    """One rollout always fails: tried as often as another try may help; its group is in no batch, all others are."""
    tried = []

    async def fail(trajectory) -> None:
        if trajectory.case == "case-1" and trajectory.rollout == 2 and trajectory.messages[-1].phase == Phase.inquiry:
            tried.append(trajectory.seed)
            raise error()

    segments, progress = run(with_(epochs=1, retries=2), rewards=dict.fromkeys(PHASES, ScoredBySeed(before=fail)))
    assert progress.failed == {(Phase.inquiry, name): 1} and len(tried) == attempts
    inquiries = {s.group for s in segments if s.phase == Phase.inquiry}
    assert inquiries == {"case-0@0", "case-2@0"}


def test_a_failure_that_passes_leaves_no_trace():
    """The first two tries of every answer fail: the segments are those of a run without."""
    tried: collections.Counter[str] = collections.Counter()

    async def fail_twice(context) -> None:
        tried[context.id] += 1
        if tried[context.id] <= 2:
            raise ChatError(Failure.unreachable, "not yet")

    segments, progress = run(with_(retries=2, epochs=1), SpokenBySeed(before=fail_twice))
    assert lines(segments) == lines(run(with_(epochs=1))[0]) and not progress.failed


def test_an_answer_that_hangs_is_a_timeout():
    async def hang(context) -> None:
        if context.id == "case-0@0":
            await asyncio.sleep(3600)

    segments, progress = run(with_(timeout=0.02, retries=0, epochs=1), SpokenBySeed(before=hang))
    assert progress.failed == {(Phase.inquiry, "timeout"): 3} and segments


def test_too_many_failures_end_the_run_and_are_tried_again_by_the_next(tmp_path: Path):
    async def fail(context) -> None:
        if context.phase == Phase.lab:
            raise ChatError(Failure.refused, "wrong key")

    path, config = tmp_path / "run.jsonl", with_(max_failures=4)
    wrong = SpokenBySeed(before=fail)
    with Journal(path, run={}) as journal, pytest.raises(PipelineError, match=r"more than 4 .*: 5 refused in lab"):
        drain(Pipeline(CASES, wrong, REWARDS, config, journal=journal))
    with Journal(path, run={}) as journal:
        failed_for_good = {name for row in journal.records("group") for name in row["failed"]}
        drain(Pipeline(CASES, SpokenBySeed(), REWARDS, config, journal=journal))
        have = {row["id"]: to_line(row["segment"]) for row in journal.records("segment")}
    unbroken = lines(run()[0])
    assert len(failed_for_good) <= 4
    assert have == {name: line for name, line in unbroken.items() if name in have}
    lost = set(unbroken) - set(have)
    assert {any(name.startswith(one) for one in failed_for_good) for name in lost} <= {True}


def test_a_defect_is_no_failure_and_comes_out():
    async def divide(trajectory) -> None:
        raise ZeroDivisionError("a defect in a reward")

    with pytest.raises(ZeroDivisionError, match="a defect"):
        run(rewards=dict.fromkeys(PHASES, ScoredBySeed(before=divide)))


def test_a_defect_comes_out_though_the_reader_has_left():
    async def divide(context) -> None:
        if context.phase == Phase.lab:
            raise ZeroDivisionError("a defect in a policy")

    async def read_one() -> None:
        async with Pipeline(CASES, SpokenBySeed(before=divide), REWARDS, with_(ahead=9)) as pipeline:
            await anext(pipeline)
            await settle()

    with pytest.raises(ZeroDivisionError, match="a defect"):
        asyncio.run(read_one())


def test_a_call_that_is_cancelled_inside_does_not_lose_its_group_without_a_word():
    async def cancelled(context) -> None:
        if context.id == "case-1@2":
            raise asyncio.CancelledError

    with pytest.raises(PipelineError, match="a slot of the stage inquiry was cancelled by what it waited for"):
        run(consultation=SpokenBySeed(before=cancelled))


@pytest.mark.parametrize(("reward", "quality", "name"), [(math.nan, None, "reward"), (0.5, math.inf, "quality")])
def test_a_score_that_is_no_number_is_refused(reward, quality, name):
    """Not a number is on neither side of the gate: the pair would neither go on nor be discarded."""
    with pytest.raises(ValueError, match=f"StageScore: {name}: want a finite number"):
        StageScore(reward=reward, quality=quality)


# -- stopping and going on --------------------------------------------------------------------------------------------
def test_cancelled_it_stops_its_slots_and_goes_on_from_its_journal(tmp_path: Path):
    path = tmp_path / "run.jsonl"

    async def wait(context) -> None:
        await asyncio.sleep(0.002)

    async def cancelled() -> int:
        with Journal(path, run={}) as journal:
            task = asyncio.create_task(
                Pipeline(CASES, SpokenBySeed(before=wait), REWARDS, CONFIG, journal=journal).run()
            )
            await asyncio.sleep(0.03)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            return len(asyncio.all_tasks())

    assert asyncio.run(cancelled()) == 1
    with Journal(path, run={}) as journal:
        done = sum(1 for _ in journal.records("segment"))
        pipeline = Pipeline(CASES, SpokenBySeed(), REWARDS, CONFIG, journal=journal)
        drain(pipeline)
        have = {row["id"]: to_line(row["segment"]) for row in journal.records("segment")}
        assert journal.cut_bytes == 0
    assert have == lines(run()[0])
    assert pipeline.progress.resumed.total() == done >= 20


@pytest.mark.parametrize("read", [0, 1, 4])
def test_a_reader_with_a_cursor_gets_the_batches_it_has_not_read(tmp_path: Path, read):
    """A reader that is at step ``read`` when the process ends gets step ``read`` next, the same if it was made."""
    path = tmp_path / "run.jsonl"

    async def read_some(journal: Journal) -> list[Batch]:
        async with Pipeline(CASES, SpokenBySeed(), REWARDS, CONFIG, journal=journal) as pipeline:
            return [await anext(pipeline) for _ in range(4)]

    with Journal(path, run={}) as journal:
        before = asyncio.run(read_some(journal))
    with Journal(path, run={}) as journal:
        after = drain(Pipeline(CASES, SpokenBySeed(), REWARDS, CONFIG, journal=journal, first_step=read))
    assert after[: 4 - read] == before[read:]
    assert [batch.step for batch in after] == list(range(read, read + len(after)))
    names = [s.id for batch in [*before[:read], *after] for s in batch.segments]
    assert sorted(names) == sorted(lines(run()[0]))


def test_a_reader_that_gives_up_waiting_gets_the_batch_when_it_asks_again(tmp_path: Path):
    async def read(journal: Journal) -> list[str]:
        names: list[str] = []
        moments = random.Random(3)
        async with Pipeline(CASES, SpokenBySeed(), REWARDS, CONFIG, journal=journal) as pipeline:
            while True:
                waiting = asyncio.ensure_future(anext(pipeline))
                for _ in range(moments.randrange(40)):
                    await asyncio.sleep(0)
                if moments.random() < 0.7:
                    waiting.cancel()
                try:
                    names += [segment.id for segment in (await waiting).segments]
                except asyncio.CancelledError:
                    continue
                except StopAsyncIteration:
                    return names

    with Journal(tmp_path / "run.jsonl", run={}) as journal:
        assert sorted(asyncio.run(read(journal))) == sorted(lines(run()[0]))


def test_a_finished_run_gives_nothing_again(tmp_path: Path):
    with Journal(tmp_path / "run.jsonl", run={}) as journal:
        first = drain(Pipeline(CASES, SpokenBySeed(), REWARDS, CONFIG, journal=journal))
        size = journal.path.stat().st_size
        assert first and drain(Pipeline(CASES, SpokenBySeed(), REWARDS, CONFIG, journal=journal)) == []
        assert journal.path.stat().st_size == size


# -- contracts --------------------------------------------------------------------------------------------------------
def test_a_segment_survives_its_line():
    segment = next(s for s in run(with_(epochs=1))[0] if s.spans)
    assert Segment.from_json(json.loads(to_line(segment.to_json()))) == segment


def test_a_malformed_segment_is_refused_by_field():
    row = run(with_(epochs=1, stages=PHASES[:1]))[0][0].to_json()
    with pytest.raises(ValueError, match=r"segment: want the fields of a segment; .*'prompt'"):
        Segment.from_json({name: value for name, value in row.items() if name != "prompt"})


def test_what_a_journal_is_bound_to():
    found = Pipeline.run_of(CASES, SpokenBySeed(), REWARDS, CONFIG)
    changed = Pipeline.run_of(CASES, SpokenBySeed(), REWARDS, with_(carry=1, slots=1, timeout=1))
    assert {name for name in found if found[name] != changed[name]} == {"carry"}
    assert found["cases"][0] == "case-0 version 1"


REFUSED = {
    "rollouts": ({"rollouts": 0}, "rollouts: want an integer >= 1; got 0"),
    "batch": ({"batch_size": 7}, "batch_size: want a multiple of rollouts, 3; got 7"),
    "pool": ({"pool": 1}, "pool: want at least carry, 2; got 1"),
    "timeout": ({"timeout": float("nan")}, "timeout: want seconds > 0"),
    "stages": ({"stages": PHASES[1:]}, "stages: want the first stages"),
    "tau_nan": ({"tau": dict.fromkeys(PHASES, math.nan)}, "tau: want numbers; got nan for inquiry"),
    "tau": ({"tau": {Phase.inquiry: 0.5}}, "tau: want a number for each .*; got none for differential"),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED)
def test_a_configuration_out_of_contract_is_refused(changes, message):
    with pytest.raises(ValueError, match=f"pipeline.Config: {message}"):
        with_(**changes)


def test_a_stage_without_a_reward_is_refused():
    with pytest.raises(ValueError, match="rewards: want a reward of the stage lab"):
        Pipeline(CASES, SpokenBySeed(), {p: r for p, r in REWARDS.items() if p != Phase.lab}, CONFIG)


def test_cases_with_one_id_are_refused():
    with pytest.raises(ValueError, match="cases: want ids used once"):
        Pipeline(CASES + CASES[:1], SpokenBySeed(), REWARDS, CONFIG)


# -- with patients ----------------------------------------------------------------------------------------------------
def consult(**options) -> SimulatedConsultation:
    return SimulatedConsultation(TwoQuestions(), **options)


def test_rollouts_of_a_group_begin_alike_and_go_on_by_their_seeds():
    config = with_(epochs=8, rollouts=6, batch_size=6, stages=PHASES[:1])
    segments, _ = run(config, consult())
    groups = Batch(step=0, segments=tuple(segments)).groups().values()
    assert {len({s.prompt for s in map(freeze, rows)}) for rows in groups} == {1}
    orders = {tuple(m.content for m in s.response if m.role == "assistant") for s in segments}
    assert len(orders) == 2 and {s.ended for s in segments} == {"closed"}
    assert {s.trajectory().mode for s in segments} == {"passive", "interruption:end_of_turn", "interruption:mid_turn"}


def freeze(segment: Segment) -> Segment:
    """Its prompt as text, which can be hashed."""
    return dataclasses.replace(segment, prompt=tuple(to_line(m.to_json()) for m in segment.prompt))


def test_a_whole_consultation_is_told_and_its_orders_answered():
    segments, _ = run(with_(epochs=1, tau=dict.fromkeys(PHASES, 0.0)), consult(modes=ModeConfig(interruption=0.0)))
    last = next(s for s in segments if s.phase == Phase.diagnosis)
    told = {fact for m in last.prompt for fact in m.facts}
    assert told == {"pain", "radiation", "smoking"}
    assert [m.turn for m in last.prompt if m.role == "user"] == [0, 1, 2, 3, 4, 5]
    assert "ST elevation in II, III and aVF." in last.prompt[-1].content
    assert [m.content for m in last.response] == ["Diagnosis: heart attack"]


def test_the_same_seed_gives_the_same_bytes():
    assert lines(run(consultation=consult())[0]) == lines(run(with_(slots=1), consultation=consult())[0])
