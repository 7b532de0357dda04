"""Stage 1: rounds of the pipeline, fragments, advantages by name and token, dynamic sampling, going on where it was."""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import itertools
import json
import random
from pathlib import Path

import pytest
import torch
from letters_model import make_letters_model
from toy_core import ToyCore, make_tokenizer

from m3.algorithms import dapo, dr_grpo, grpo, gspo, spar
from m3.engine.engine import AsyncEngine
from m3.environment.case import Phase
from m3.environment.consultation import SimulatedConsultation
from m3.environment.episode import Said
from m3.environment.fragments import FragmentConsultation, cuts
from m3.environment.lockstep import Group, Lockstep
from m3.environment.modes import ModeConfig
from m3.environment.pipeline import Answer, Config, Pipeline, PipelineError
from m3.environment.segment import Context, Segment, StageScore
from m3.environment.trajectory import Message, Trajectory, to_line
from m3.rewards.claims import ScriptedExtractor
from m3.rewards.fact_stage import FactAwareReward
from m3.rewards.fact_verdicts import FactVerdict, Label
from m3.rewards.spans import SpanReward
from m3.rewards.verdict import UnjudgedError
from m3.train.group_advantages import algorithm, loss_spec, name_of, step_advantages, teaches, token_advantages
from m3.train.loop import TrainConfig, train
from m3.train.optim import OptimConfig
from m3.train.policy_model import PolicyModel
from m3.train.rollouts import EnginePhysician
from m3.train.stage import StepBatch
from m3.train.task_rl import TaskRL, TaskRLConfig
from tests.m3.clinic_cases import small_case
from tests.m3.clinic_runs import CASES, CONFIG, REWARDS, ScoredBySeed, SpokenBySeed, TwoQuestions

INQUIRY = Config(stages=(Phase.inquiry,), rollouts=3, batch_size=6, epochs=4, seed=3)


# -- rounds of the pipeline -------------------------------------------------------------------------------------------
def rounds(lockstep: Lockstep, count: int, groups: int = 3) -> list[tuple[Group, ...]]:
    async def go() -> list[tuple[Group, ...]]:
        return [await lockstep.round(groups) for _ in range(count)]

    return asyncio.run(go())


def told(found: list[tuple[Group, ...]]) -> list[list[tuple]]:
    """Everything of the groups, in order."""
    return [
        [([to_line(s.to_json()) for s in g.segments], g.carried, dict(g.discarded), dict(g.failed)) for g in groups]
        for groups in found
    ]


def test_rounds_walk_the_tree_of_the_pipeline():
    lockstep = Lockstep(CASES, SpokenBySeed(), REWARDS, CONFIG)
    found = list(itertools.chain.from_iterable(rounds(lockstep, 80)))

    async def pipeline() -> list[Segment]:
        async with Pipeline(CASES, SpokenBySeed(), REWARDS, CONFIG) as run:
            return [segment async for batch in run for segment in batch.segments]

    wanted = {segment.id: segment for segment in asyncio.run(pipeline())}
    assert {s.id: s for group in found for s in group.segments} == wanted
    assert len(wanted) > 100 and rounds(lockstep, 1) == [()]


def test_a_round_is_a_mixture_of_stages():
    lockstep = Lockstep(CASES, SpokenBySeed(), REWARDS, dataclasses.replace(CONFIG, pool=6))
    stages = [collections.Counter(group.context.phase for group in groups) for groups in rounds(lockstep, 5)]
    assert stages[0] == {Phase.inquiry: 3}
    assert set(stages[1]) == {Phase.inquiry, Phase.differential}
    assert set(stages[2]) >= {Phase.differential, Phase.lab}
    assert all(count.total() == 3 for count in stages)
    assert max(lockstep.progress.most_waiting.values()) <= 6


def test_cases_come_in_another_order_each_epoch_and_each_once():
    cases = tuple(small_case(id=f"case-{i}") for i in range(6))
    config = dataclasses.replace(INQUIRY, epochs=3)
    [groups] = rounds(Lockstep(cases, SpokenBySeed(), REWARDS, config), 1, groups=18)
    names = [group.context.id for group in groups]
    epochs = [names[i : i + 6] for i in (0, 6, 12)]
    assert [sorted(epoch) for epoch in epochs] == [[f"case-{i}@{e}" for i in range(6)] for e in range(3)]
    assert len({tuple(name[:6] for name in epoch) for epoch in epochs}) == 3


def test_what_waits_decides_nothing():
    chance = random.Random(0)

    async def wait(what: object) -> None:
        await asyncio.sleep(chance.random() * 0.004)

    slow = Lockstep(CASES, SpokenBySeed(before=wait), dict.fromkeys(Phase, ScoredBySeed(before=wait)), CONFIG)
    assert told(rounds(slow, 8)) == told(rounds(Lockstep(CASES, SpokenBySeed(), REWARDS, CONFIG), 8))


@pytest.mark.parametrize("done", [0, 1, 3, 6])
def test_rounds_go_on_where_their_state_was_taken(done):
    unbroken = Lockstep(CASES, SpokenBySeed(), REWARDS, CONFIG)
    rounds(unbroken, done)
    state = json.loads(json.dumps(unbroken.state()))
    again = Lockstep(CASES, SpokenBySeed(), REWARDS, CONFIG)
    again.load_state(state)
    assert again.state() == state
    assert told(rounds(again, 4)) == told(rounds(unbroken, 4))


def test_a_state_of_other_cases_is_refused():
    lockstep = Lockstep(CASES, SpokenBySeed(), REWARDS, CONFIG)
    rounds(lockstep, 1)
    others = [dataclasses.replace(case, version=2) for case in CASES]
    other = Lockstep(others, SpokenBySeed(), REWARDS, CONFIG)
    with pytest.raises(ValueError, match="version 1, which waits; got version 2"):
        other.load_state(lockstep.state())


# -- fragments --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("interruption", [0.0, 1.0])
def test_a_fragment_is_one_reply_to_the_beginning_of_a_dialogue(interruption):
    modes = ModeConfig(interruption=interruption)
    consultation = FragmentConsultation(TwoQuestions(), modes=modes)
    [groups] = rounds(Lockstep(CASES, consultation, REWARDS, INQUIRY), 1, groups=12)
    lengths = collections.Counter()
    for group in groups:
        last = group.context.messages[-1]
        own = [m for m in group.context.messages if m.role == "assistant" and not m.meta.get("snippet")]
        assert last.role == "user" and {len(s.response) for s in group.segments} == {1}
        assert {s.response[0].turn for s in group.segments} == {last.turn}
        assert {s.steps for s in group.segments} == {(last.turn,)}
        lengths[len(own)] += 1
    assert len(lengths) == 3  # two questions and the end: three places to cut at
    closing = {s.ended for g in groups for s in g.segments if len(g.context.messages) >= 6 and not interruption}
    assert closing <= {"closed"}


def line(text: str, role: str = "assistant", finish: str = "stop") -> Message:
    said = Said(text=text, given_ids=(1,), token_ids=(2,), logprobs=(0.0,), versions=(0,), finish=finish)
    if role == "assistant":
        return said.message(turn=0, phase=Phase.inquiry, action=None)
    return Message(role=role, content=text, turn=0, phase=Phase.inquiry)


@pytest.mark.parametrize(
    ("dialogue", "places"),
    [
        ([line("a?"), line("x", "user"), line("b?"), line("y", "user"), line("c?")], [0, 2, 4]),
        ([line("a?"), line("x", "user"), line(" A? "), line("y", "user"), line("c?")], [0, 2]),
        ([line("a?"), line("x", "user"), line("b", finish="length"), line("y", "user"), line("c?")], [0, 2]),
        ([line("a?"), line("x", "user"), line("b?\nPatient: no"), line("y", "user"), line("c?")], [0, 2]),
    ],
)
def test_a_dialogue_is_cut_where_it_is_sound(dialogue, places):
    assert cuts(dialogue) == places


# -- advantages by name -----------------------------------------------------------------------------------------------
REWARD = torch.tensor([[0.2, 0.5, 0.8]], dtype=torch.float64)  # mean 0.5, deviation 0.3
GAMMA = torch.ones(1, 3, 2)
GAMMA[0, 2, 1] = 0.1
ONE = 1 - 0.023333333333333333**0.5  # with it, the deviation of 0.2, 0.5 and 0.3 divides by 1


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        (algorithm("spar", eps=1e-9), [[-1, -1], [0, 0], [1, (0.08 - 0.5) / 0.3]]),
        (algorithm("grpo", eps=1e-9), [[-1, -1], [0, 0], [1, 1]]),
        (algorithm("gspo", eps=1e-9), [[-1, -1], [0, 0], [1, 1]]),
        (algorithm("dr_grpo", length=10), [[-0.3, -0.3], [0, 0], [0.3, 0.3]]),
        # 6 tokens, of which 4 are free: 0.8 - 0.5, and a mean of 1/3
        (algorithm("dapo", eps=ONE, max_length=8, cache=4), [[-2 / 15] * 2, [1 / 6] * 2, [-1 / 30] * 2]),
    ],
    ids=lambda one: name_of(one) if not isinstance(one, list) else "",
)  # fmt: skip
def test_advantages_of_each_algorithm(config, wanted):
    found = step_advantages(config, REWARD, GAMMA, torch.tensor([[2, 4, 6]]))
    torch.testing.assert_close(found, torch.tensor([wanted], dtype=torch.float64), atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize(
    ("config", "module"),
    [
        (spar.Config(min_std=0.2), spar), (grpo.Config(kl_coef=0.0), grpo), (gspo.Config(clip_low=0.1), gspo),
        (dapo.Config(clip_high=0.3), dapo), (dr_grpo.Config(length=7), dr_grpo),
    ],
)  # fmt: skip
def test_the_loss_is_the_algorithms(config, module):
    assert loss_spec(config) == module.loss_spec(config)
    assert module.__name__.endswith(name_of(config))


def test_an_algorithm_that_is_none_is_named_with_its_nearest():
    with pytest.raises(ValueError, match="nearest is 'dr_grpo'"):
        algorithm("drgrpo", length=3)


@pytest.mark.parametrize(
    ("name", "rewards", "gamma", "taught"),
    [
        ("spar", [0.5, 0.5], 1.0, False),
        ("spar", [0.5, 0.5], 0.1, True),  # a penalty among equal rewards
        ("spar", [0.0, 0.0], 0.1, False),
        ("grpo", [0.5, 0.5], 0.1, False),
        ("dapo", [0.5, 0.5], 1.0, False),
        ("dapo", [0.5, 0.4], 1.0, True),
    ],
)
def test_what_teaches(name, rewards, gamma, taught):
    found = teaches(algorithm(name), torch.tensor([rewards]), torch.tensor([[[gamma], [1.0]]]))
    assert found == [taught]


def test_a_step_without_an_advantage_is_an_error():
    steps = torch.tensor([-1, 3, 3, -1, 4])
    assert token_advantages(torch.tensor([1.5, -2.0]), (3, 4), steps).tolist() == [0, 1.5, 1.5, 0, -2]
    with pytest.raises(ValueError, match=r"numbers of \[3\], or -1; got 4"):
        token_advantages(torch.tensor([1.5]), (3,), steps)


# -- batches ----------------------------------------------------------------------------------------------------------
@dataclasses.dataclass(kw_only=True)
class TwoSteps:
    """Rollouts of two messages, of rollout + 1 tokens and of one."""

    name: str = "two-steps"
    policy: str = "two-steps"
    version: int = 0

    async def open(self, case, *, seed: int) -> tuple[Message, ...]:
        return (Message(role="user", content="Hi", turn=0, phase=Phase.inquiry),)

    async def answer(self, context: Context, *, seed: int, rollout: int) -> Answer:
        first = self.say(0, [10] * (rollout + 1))
        told = Message(role="user", content="Yes", turn=1, phase=Phase.inquiry)
        return Answer(messages=(first, told, self.say(1, [11])), ended="turns")

    def say(self, turn: int, ids: list[int]) -> Message:
        logprobs = (-1.0,) * len(ids)
        said = Said(
            text="?", given_ids=(1, 2), token_ids=tuple(ids), logprobs=logprobs, versions=(0,) * len(ids),
            finish="length" if turn else "stop",
        )  # fmt: skip
        return said.message(turn=turn, phase=Phase.inquiry, action=None)


@dataclasses.dataclass(kw_only=True)
class ByRollout:
    """Rewards 0.2, 0.5, 0.8 by rollout, the last with a redundant second step; equal and clean for ``silent`` cases;
    ``unjudged`` cases have no score."""

    silent: tuple[str, ...] = ()
    unjudged: tuple[str, ...] = ()
    name: str = "by-rollout"

    async def __call__(self, case, trajectory: Trajectory, phase: Phase) -> StageScore:
        if case.id in self.unjudged:
            raise UnjudgedError("no judge")
        if case.id in self.silent:
            return StageScore(reward=0.5)
        span = SpanReward(turn=1, token_start=0, token_end=1, value=0.1, criterion="redundant_question")
        last = trajectory.rollout == 2
        return StageScore(reward=(0.2, 0.5, 0.8)[trajectory.rollout], spans=(span,) if last else ())


@pytest.fixture(scope="module")
def physician(tmp_path_factory: pytest.TempPathFactory) -> EnginePhysician:
    """One that is never asked."""
    tokenizer = make_tokenizer(tmp_path_factory.mktemp("toy"))
    return EnginePhysician(AsyncEngine(ToyCore(), tokenizer), "toy", temperature=0.7)


def source_of(physician, reward=None, consultation=None, **config) -> TaskRL:
    made = TaskRLConfig(**{"pipeline": INQUIRY, "algorithm": spar.Config(eps=1e-9), **config})
    rewards = {Phase.inquiry: reward or ByRollout()}
    return TaskRL(CASES, consultation or TwoSteps(), rewards, physician, dict, made)


def batch_of(source: TaskRL, step: int = 0) -> StepBatch | None:
    return asyncio.run(source.batch(step))


def test_spar_token_by_token(physician):
    batch = batch_of(source_of(physician))
    assert len(batch.samples) == 6 and len({sample.group for sample in batch.samples}) == 2
    low, middle, high = batch.samples[:3]
    assert [low.rollout, middle.rollout, high.rollout] == [0, 1, 2]
    assert (low.temperature, low.domain) == (0.7, "inquiry")
    assert high.ids.tolist() == [1, 2, 10, 10, 10, 1, 2, 11]
    penalised = (0.1 * 0.8 - 0.5) / 0.3
    wanted = [0, 0, 1, 1, 1, 0, 0, penalised]
    torch.testing.assert_close(high.advantages, torch.tensor(wanted))
    torch.testing.assert_close(low.advantages, torch.tensor([0, 0, -1.0, 0, 0, -1]))
    assert middle.advantages.tolist() == [0] * 7
    assert high.gammas == pytest.approx({0: 1.0, 1: 0.1})


def test_dapo_punishes_what_is_too_long(physician):
    config = dapo.Config(max_length=4, cache=2, eps=1e-9)
    batch = batch_of(source_of(physician, algorithm=config))
    lengths = [sample.drawn for sample in batch.samples[:3]]
    assert lengths == [2, 3, 4]  # punished by 0, 0.5 and 1: rewards 0.2, 0.0, -0.2
    assert [float(s.advantages[2]) for s in batch.samples[:3]] == pytest.approx([1, 0, -1], abs=1e-6)
    assert [s.reward for s in batch.samples[:3]] == [0.2, 0.5, 0.8]


def test_the_metrics_of_a_step(physician):
    metrics = dict(batch_of(source_of(physician)).metrics)
    assert metrics.pop("rollout_seconds") >= 0
    assert metrics == pytest.approx({
        "groups/inquiry": 2, "groups/differential": 0, "groups/lab": 0, "groups/diagnosis": 0,
        "reward/inquiry": 0.5, "gamma_mean": (5 + 0.1) / 6, "violations/redundant_question": 1 / 6, "turns": 2,
        "discarded/below_tau": 0, "discarded/not_drawn": 0, "rollouts_failed": 0, "groups_silent": 0,
        "groups_left_out": 0, "groups_resampled": 0, "tokens_sampled": 18, "cut": 0.5,
    })  # fmt: skip


def test_discarded_pairs_are_counted(physician):
    config = dataclasses.replace(INQUIRY, stages=(Phase.inquiry, Phase.differential), carry=1)
    source = TaskRL(
        CASES, TwoSteps(), dict.fromkeys(Phase, ByRollout()), physician, dict, TaskRLConfig(pipeline=config)
    )
    metrics = batch_of(source).metrics
    assert (metrics["discarded/below_tau"], metrics["discarded/not_drawn"]) == (2, 2)  # tau 0.5: one and one a group


@pytest.mark.parametrize(
    ("silent", "resample", "again", "groups", "left_out"),
    [
        (("case-0", "case-1"), 0, 0, 2, 0),  # as they are drawn
        (("case-0", "case-1"), 9, None, 2, None),
        (("case-0", "case-1", "case-2"), 2, 4, 2, 4),  # nothing teaches: silent ones are all there is
    ],
)
def test_silent_groups_are_drawn_anew(physician, silent, resample, again, groups, left_out):
    batch = batch_of(source_of(physician, ByRollout(silent=silent), resample=resample))
    metrics = batch.metrics
    kept = {sample.group for sample in batch.samples}
    assert len(kept) == groups
    drawn = metrics["groups/inquiry"]
    assert metrics["groups_left_out"] == drawn - groups == metrics["groups_resampled"]
    if again is not None:
        assert (metrics["groups_resampled"], metrics["groups_left_out"]) == (again, left_out)
    else:
        assert metrics["groups_resampled"] > 0 and metrics["groups_silent"] == drawn - 2
        assert {name[:6] for name in kept} == {"case-2"}


def test_penalties_keep_equal_rewards_in_the_batch(physician):
    @dataclasses.dataclass(kw_only=True)
    class Equal(ByRollout):
        async def __call__(self, case, trajectory, phase):
            return dataclasses.replace(await super().__call__(case, trajectory, phase), reward=0.5)

    batch = batch_of(source_of(physician, Equal(), resample=3))
    assert batch.metrics["groups_resampled"] == 0
    assert [float(s.advantages[-1]) for s in batch.samples[:3]] == pytest.approx([0, 0, -0.9 * 0.5 / 0.1])


def test_groups_that_fail_stay_out_and_are_counted(physician):
    source = source_of(physician, ByRollout(unjudged=("case-0",)), resample=5)
    counts = [batch_of(source, step).metrics["rollouts_failed"] for step in range(3)]
    assert sum(counts) >= 3 and all(count % 3 == 0 for count in counts)


def test_too_many_failures_end_the_run(physician):
    config = dataclasses.replace(INQUIRY, max_failures=5, epochs=1000)
    source = source_of(physician, ByRollout(unjudged=("case-0", "case-1", "case-2")), pipeline=config)
    with pytest.raises(PipelineError, match="unjudged in inquiry"):
        batch_of(source)


def test_the_end_of_the_cases_is_the_end(physician):
    source = source_of(physician, pipeline=dataclasses.replace(INQUIRY, epochs=1))
    assert [len(batch.samples) if (batch := batch_of(source, s)) else None for s in range(3)] == [6, 3, None]


def test_a_rollout_is_judged_while_others_are_drawn(physician):
    """The first that is drawn waits in its judge until the last has been drawn."""
    last_drawn = asyncio.Event()

    class Slow(TwoSteps):
        async def answer(self, context, *, seed, rollout):
            if rollout == 2:
                await judged.wait()
                last_drawn.set()
            return await super().answer(context, seed=seed, rollout=rollout)

    judged = asyncio.Event()

    class Judge(ByRollout):
        async def __call__(self, case, trajectory, phase):
            if trajectory.rollout == 0:
                judged.set()
                await last_drawn.wait()
            return await super().__call__(case, trajectory, phase)

    async def main() -> StepBatch | None:
        async with asyncio.timeout(10):
            return await source_of(physician, Judge(), Slow()).batch(0)

    assert len(asyncio.run(main()).samples) == 6


def test_other_rewards_than_those_of_the_state_are_refused(physician):
    state = json.loads(json.dumps(source_of(physician).state()))
    source_of(physician).load_state(state)
    with pytest.raises(ValueError, match=r"rewards = .*other"):
        source_of(physician, ByRollout(name="other")).load_state(state)
    with pytest.raises(ValueError, match=r"algorithm = .*kl_coef"):
        source_of(physician, algorithm=grpo.Config()).load_state(state)


def test_a_group_of_one_is_refused():
    with pytest.raises(ValueError, match="at least 2"):
        TaskRLConfig(pipeline=dataclasses.replace(INQUIRY, rollouts=1))


def test_pools_that_cannot_hold_what_a_step_carries_are_refused():
    with pytest.raises(ValueError, match=r"pipeline.pool: want at least 8"):
        TaskRLConfig(pipeline=Config(rollouts=2, batch_size=8, carry=2, pool=7))


def test_fragments_of_later_stages_are_refused(physician):
    with pytest.raises(ValueError, match="the inquiry alone"):
        TaskRL(CASES, FragmentConsultation(TwoQuestions()), REWARDS, physician, dict)


# -- facts ------------------------------------------------------------------------------------------------------------
class AllOf:
    """Every claim has this label."""

    def __init__(self, label: Label) -> None:
        self.label = label

    async def verify(self, claims):
        return [FactVerdict(claim=claim.text, label=self.label) for claim in claims]


@pytest.mark.parametrize(
    ("label", "task", "wanted"),
    [
        (Label.supported, 0.9, 0.9),
        (Label.refuted, 0.85, 0.85 - 0.5),  # half of R_fact = -1
        (Label.refuted, 0.2, 0.2),  # facts do not count yet
        (Label.refuted, 0.927, 0.0),  # below 0: held at 0
    ],
)
def test_a_fact_aware_reward(label, task, wanted):
    class Task:
        name = "task"

        async def __call__(self, case, trajectory, phase):
            return StageScore(reward=task, outcomes={"checklist": "1"})

    said = Message(
        role="assistant", content="Aspirin thins the blood. Warfarin is an antibiotic.", turn=0, phase=Phase.diagnosis
    )
    trajectory = Trajectory(case="c", case_version=1, policy="p", seed=0, messages=(said,))
    reward = FactAwareReward(Task(), ScriptedExtractor(), AllOf(label), name="all")
    score = asyncio.run(reward(CASES[0], trajectory, Phase.diagnosis))
    assert score.reward == pytest.approx(wanted, abs=1e-4)
    assert (score.quality, score.outcomes["checklist"], score.outcomes["task"]) == (task, "1", f"{task:.6g}")


# -- the whole: engine, patients, trainer -----------------------------------------------------------------------------
class LowerCase:
    """The share of small letters in what the physician said in a stage."""

    name = "lower-case"

    async def __call__(self, case, trajectory: Trajectory, phase: Phase) -> StageScore:
        said = "".join(message.content for message in trajectory.of("assistant", phase))
        share = sum(letter.islower() for letter in said) / len(said)
        turn = trajectory.of("assistant", phase)[0].turn
        span = SpanReward(turn=turn, token_start=0, token_end=1, value=0.1, criterion="redundant_question")
        return StageScore(reward=share, quality=1.0, spans=(span,) if "?" in said else ())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_letters_model(tmp_path_factory.mktemp("letters"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 4096}))
    return folder


def learn(folder: Path, out: Path, steps: int) -> dict[str, torch.Tensor]:
    """Weights after some steps over all stages, from the newest checkpoint in ``out`` on."""

    async def main() -> dict[str, torch.Tensor]:
        model = PolicyModel.load(folder)
        async with AsyncEngine.from_model(folder) as engine:
            physician = EnginePhysician(engine, "letters", max_tokens=8)
            consultation = SimulatedConsultation(physician, max_turns=2, version=lambda: physician.version)
            config = TaskRLConfig(pipeline=Config(epochs=9, rollouts=2, batch_size=4, seed=1))
            rewards = dict.fromkeys(Phase, LowerCase())
            source = TaskRL(CASES, consultation, rewards, physician, model.tensors, config)
            plan = TrainConfig(
                steps=steps, max_tokens=700, optim=OptimConfig(lr=1e-2), checkpoint_every=2, samples_every=1,
                tensorboard=False,
            )  # fmt: skip
            await train(source, model, plan, out, decode=engine.tokenizer.decode)
            await source.close()
        return {name: tensor.clone() for name, tensor in model.tensors().items()}

    return asyncio.run(main())


def test_a_run_that_goes_on_is_one_that_was_not_interrupted(folder, tmp_path):
    learn(folder, tmp_path / "parts", 2)
    parts = learn(folder, tmp_path / "parts", 4)
    whole = learn(folder, tmp_path / "whole", 4)
    assert parts.keys() == whole.keys() and all(torch.equal(parts[name], whole[name]) for name in whole)
    one, other = ((tmp_path / name / "metrics.jsonl").read_bytes() for name in ("parts", "whole"))
    assert one == other
    rows = [json.loads(row) for row in one.splitlines()]
    assert {name for row in rows for name, value in row.items() if name.startswith("groups/") and value} == {
        f"groups/{phase}" for phase in Phase
    }
    assert not torch.equal(whole["model.norm.weight"], PolicyModel.load(folder).tensors()["model.norm.weight"])
    assert rows[3]["sampler_weight"] == pytest.approx(1.0, abs=1e-3)  # the engine has the trainer's weights
    text = (tmp_path / "whole" / "samples" / "step-000004.txt").read_text()
    assert "advantage" in text and "phase: " in text
