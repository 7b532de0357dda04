"""The three stages on the clinic, as a recipe's source "clinic": who draws, who judges, and which source they make.

    task-rl          one domain: an expert learns
    offline-distill  each teacher rolls out in its domain into a store under ``source.folder``; the student reads it
    mopd             the student rolls out in all domains; the teacher of each says how likely it finds each token

The domain ``source.domain`` is consultations with simulated patients; every other is prompts of a file
(``source.prompts``), with a rubric each where an answer is to be rewarded. A policy or a teacher is a checkpoint, drawn
from and read in this process, or a server: http://host:port/v1#model.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch

from m3.algorithms import clip_forward_kl, mopd, spar
from m3.engine.config import EngineConfig
from m3.engine.engine import AsyncEngine
from m3.engine.open import open_core
from m3.environment import pipeline
from m3.environment.case import Phase, own_cases, read_cases
from m3.environment.consultation import SimulatedConsultation
from m3.environment.fragments import FragmentConsultation
from m3.environment.modes import ModeConfig
from m3.environment.pipeline import StageReward
from m3.models.tokenizer import Tokenizer
from m3.rewards.judge import Judge, RubricJudge, ScriptedJudge
from m3.rewards.pinned_rubrics import PinnedRubrics
from m3.rewards.rubric import HealthBenchRow, read_healthbench
from m3.rewards.rubric_stage import RubricReward, RubricStageReward
from m3.rewards.stage_rewards import rule_rewards
from m3.rewards.step_verifier import StepVerifier
from m3.rollout.open import open_chat
from m3.train.group_advantages import Algorithm
from m3.train.mopd import Mopd
from m3.train.offline_distill import OfflineDistill, OfflineDistillConfig
from m3.train.open_stage import Stage, folder_of, load_frozen, load_model
from m3.train.policy_model import PolicyModel
from m3.train.prompt_rollouts import Prompt, PromptRollouts, PromptRolloutsConfig
from m3.train.recipe import OP, Recipe
from m3.train.rollouts import EnginePhysician, Physician
from m3.train.served_physician import ServedPhysician
from m3.train.stage import Source
from m3.train.task_rl import TaskRL, TaskRLConfig, Weights
from m3.train.teacher_rollouts import roll_out
from m3.train.teachers import ModelTeacher, SamplingTeacher, ServedTeacher, Teacher
from m3.train.trajectory_store import TrajectoryStore
from m3.train.with_rubrics import WithRubrics
from m3kernels.checks import refuse

TRAJECTORIES, WEIGHTS = "trajectories", "weights"  # under source.folder
OWN_PROMPTS = Path(__file__).parent.parent / "data" / "advice_prompts.jsonl"
OVERLAP = 0.5  # ours: share of a clause's words that must stand in an answer, where no model judges
DIVERGENCES = {"clip_forward_kl": "clip_forward", "forward_kl": "forward"}
SERVERS = ("http://", "https://")


@contextlib.asynccontextmanager
async def clinic(recipe: Recipe) -> AsyncIterator[Stage]:
    """The stage of a recipe.

    Raises:
        ValueError: no case of the split; a domain without prompts; no teacher; a server that tells no ids.
    """
    stages = {"task-rl": _task_rl, "offline-distill": _offline_distill, "mopd": _mopd}
    async with _judges(recipe) as judges, stages[recipe.stage](recipe, judges) as stage:
        yield stage


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judges:
    """Who judges rubrics, and the store of those that a run learns of; None: nobody, none."""

    judge: RubricJudge | None
    store: PinnedRubrics | None

    def of_store(self, scope: str) -> bool:
        """Whether the store has clauses of a prompt."""
        return self.store is not None and bool(self.store.rubric(scope).items)

    def watching(self, source: Source) -> Source:
        """The source, with the store's version in its state where there is a store."""
        return source if self.store is None else WithRubrics(source, self.store)


@contextlib.asynccontextmanager
async def _judges(recipe: Recipe) -> AsyncIterator[Judges]:
    rewards = recipe.rewards
    store = PinnedRubrics(rewards.rubrics) if rewards.rubrics else None
    if not rewards.judge:
        if store is not None:
            raise refuse(OP, "rewards.judge", "who judges the rubrics of rewards.rubrics", "nobody")
        yield Judges(judge=None, store=None)
    elif rewards.judge == "rules":
        yield Judges(judge=ScriptedJudge({}, overlap=OVERLAP), store=store)
    else:
        async with open_chat(rewards.judge, timeout=recipe.rollout.timeout) as client:
            yield Judges(judge=Judge(client), store=store)


# -- the stages -------------------------------------------------------------------------------------------------------
@contextlib.asynccontextmanager
async def _task_rl(recipe: Recipe, judges: Judges) -> AsyncIterator[Stage]:
    domain = recipe.source.domain
    model = load_model(recipe)
    reference = load_frozen(recipe, recipe.model.reference) if recipe.model.reference else None
    async with _student(recipe, model) as (physician, tokenizer):
        readers = _readers(recipe, model, reference)
        source = judges.watching(domain_source(recipe, domain, physician, model.tensors, judges, readers))
        try:
            yield Stage(model=model, source=source, reference=reference, decode=_decoder(tokenizer))
        finally:
            await source.close()


@contextlib.asynccontextmanager
async def _offline_distill(recipe: Recipe, judges: Judges) -> AsyncIterator[Stage]:
    teachers = _teachers_of(recipe)
    judges = dataclasses.replace(judges, store=None)  # what changes while they roll out would change what they say
    with TrajectoryStore(Path(recipe.source.folder) / TRAJECTORIES) as store:
        for domain, name in teachers.items():
            if store.count(domain) < recipe.source.samples:
                await _roll_out(recipe, judges, store, domain, name)
        model = load_model(recipe)
        numbers = recipe.algorithm_config()
        config = OfflineDistillConfig(
            divergence=DIVERGENCES[recipe.algorithm],
            loss=numbers or clip_forward_kl.Config(),
            batch_size=recipe.source.groups * recipe.source.rollouts,
            weights={domain: float(store.count(domain)) for domain in teachers},
            epochs=recipe.source.epochs,
            seed=recipe.seed,
        )
        decode = _decoder(Tokenizer(folder_of(recipe.model.name)))
        yield Stage(model=model, source=OfflineDistill(store, config), decode=decode)


async def _roll_out(recipe: Recipe, judges: Judges, store: TrajectoryStore, domain: str, name: str) -> None:
    """Fill a domain of the store; what is there stays."""
    async with _drawing(recipe, name) as (teacher, _):
        source = domain_source(recipe, domain, teacher, dict, judges, {})
        try:
            await roll_out(source, SamplingTeacher(teacher), store, domain=domain, samples=recipe.source.samples)
        finally:
            await source.close()


@contextlib.asynccontextmanager
async def _mopd(recipe: Recipe, judges: Judges) -> AsyncIterator[Stage]:
    model = load_model(recipe)
    async with contextlib.AsyncExitStack() as stack:
        named: dict[str, Teacher] = {}
        for name in sorted(set(_teachers_of(recipe).values())):
            if name.startswith(SERVERS):
                url, served = _server(name, "model.teachers")
                named[name] = there = ServedTeacher(url, served, timeout=recipe.rollout.timeout)
                stack.push_async_callback(there.close)
            else:
                named[name] = ModelTeacher(load_frozen(recipe, name), name, max_tokens=recipe.scale.max_tokens)
        physician, tokenizer = await stack.enter_async_context(_student(recipe, model))
        teachers = {domain: named[name] for domain, name in _teachers_of(recipe).items()}
        domains = {}
        for domain, teacher in teachers.items():
            readers = {"teacher_logprobs": teacher} if _reads_ahead(recipe) else {}
            domains[domain] = domain_source(recipe, domain, physician, model.tensors, judges, readers)
        numbers = recipe.algorithm_config()
        assert isinstance(numbers, mopd.Config), "of the stage's one algorithm"
        source = judges.watching(Mopd(domains, teachers, physician, model.tensors, numbers))
        stack.push_async_callback(source.close)
        yield Stage(model=model, source=source, decode=_decoder(tokenizer))


# -- who draws, who reads ---------------------------------------------------------------------------------------------
@contextlib.asynccontextmanager
async def _student(recipe: Recipe, model: PolicyModel) -> AsyncIterator[tuple[Physician, Tokenizer]]:
    """The physician with the trained model's weights."""
    async with _drawing(recipe, recipe.rollout.server or recipe.model.name) as (physician, tokenizer):
        if recipe.rollout.server:
            await physician.refresh(model.tensors(), 0)  # a server may have those of an earlier run
        yield physician, tokenizer


@contextlib.asynccontextmanager
async def _drawing(recipe: Recipe, name: str) -> AsyncIterator[tuple[Physician, Tokenizer]]:
    """A physician with weights of its own: of a checkpoint, in this process, or of a server."""
    rollout = recipe.rollout
    if name.startswith(SERVERS):
        if (rollout.temperature, rollout.top_k, rollout.top_p, rollout.min_p) != (1.0, 0, 1.0, 0.0):
            want = "1 and no top_k, top_p, min_p, where a server draws"
            raise refuse(OP, "rollout.temperature", want, f"{rollout.temperature:g}, or a filter")
        url, served = _server(name, "rollout.server")
        physician = ServedPhysician(
            url,
            served,
            source=folder_of(recipe.model.name),
            weights=Path(recipe.source.folder) / WEIGHTS,
            refresh=rollout.refresh,
            max_tokens=rollout.max_tokens,
            timeout=rollout.timeout,
            concurrency=rollout.max_running,
        )
        try:
            await physician.check()
            yield physician, Tokenizer(folder_of(recipe.model.name))
        finally:
            await physician.close()
        return
    weights = {"float32": "fp32", "bfloat16": "bf16"}[recipe.model.dtype]
    sizes = EngineConfig(max_context=rollout.context, max_running=rollout.max_running, memory_mb=rollout.memory_mb)
    core, tokenizer = open_core(name, sizes, weights=weights)
    async with AsyncEngine(core, tokenizer) as engine:
        yield (
            EnginePhysician(
                engine,
                name,
                temperature=rollout.temperature,
                top_k=rollout.top_k,
                top_p=rollout.top_p,
                min_p=rollout.min_p,
                max_tokens=rollout.max_tokens,
                timeout=rollout.timeout,
            ),
            tokenizer,
        )


def _server(spec: str, key: str) -> tuple[str, str]:
    """(base URL, model)."""
    url, _, model = spec.partition("#")
    if not model:
        raise refuse(OP, key, "http://host:port/v1#model", repr(spec))
    return url, model


def _reads_ahead(recipe: Recipe) -> bool:
    return recipe.rollout.read_ahead and not torch.distributed.is_initialized()  # ranks read together, in the loop


def _readers(recipe: Recipe, model: PolicyModel, reference: PolicyModel | None) -> dict[str, Teacher]:
    """Who reads each segment while others are drawn: the trainer, and the reference where the loss has a KL term."""
    if not _reads_ahead(recipe):
        return {}
    most = recipe.scale.max_tokens
    found: dict[str, Teacher] = {"old_logprobs": ModelTeacher(model, "the trainer", max_tokens=most)}
    if reference is not None and getattr(recipe.loss().spec, "kl_coef", 0) > 0:
        found["ref_logprobs"] = ModelTeacher(reference, recipe.model.reference, max_tokens=most)
    return found


def _teachers_of(recipe: Recipe) -> dict[str, str]:
    if not recipe.model.teachers:
        raise refuse(OP, "model.teachers", "a teacher by domain, such as { inquiry = 'folder' }", "none")
    return dict(sorted(recipe.model.teachers.items()))


def _decoder(tokenizer: Tokenizer) -> Callable[[list[int]], str]:
    """Special tokens too: where a message begins and ends is what a reader of samples looks for."""
    return lambda ids: tokenizer.fast.decode(ids, skip_special_tokens=False)


# -- a domain ---------------------------------------------------------------------------------------------------------
def domain_source(
    recipe: Recipe,
    domain: str,
    physician: Physician,
    weights: Weights,
    judges: Judges,
    readers: Mapping[str, Teacher],
) -> Source:
    """Where samples of a domain come from.

    Raises:
        ValueError: neither the consultations' domain nor one with prompts.
    """
    if domain in recipe.source.prompts:
        return _prompts(recipe, domain, physician, weights, judges)
    if domain != recipe.source.domain:
        known = sorted({recipe.source.domain, *recipe.source.prompts})
        raise refuse(OP, "source.prompts", f"a file of prompts of each domain but {known}", f"none of {domain!r}")
    source, loss = recipe.source, recipe.objective
    every = own_cases() if not source.cases else read_cases(Path(source.cases))
    cases = [case for case in every if source.split in ("", case.split)]
    if not cases:
        raise refuse(OP, "source.split", "the split of some case", repr(source.split))
    config = TaskRLConfig(
        algorithm=_advantages(recipe),
        pipeline=pipeline.Config(
            seed=recipe.seed,
            epochs=source.epochs,
            stages=recipe.phases(),
            rollouts=source.rollouts,
            tau={phase: recipe.rewards.tau.get(str(phase), 0.5) for phase in pipeline.PHASES},
            batch_size=source.groups * source.rollouts,
            timeout=recipe.rollout.timeout,
        ),
        resample=source.resample,
        sampler_level=None if loss.sampler_level == "none" else loss.sampler_level,
        sampler_high=loss.sampler_high,
        domain=domain,
    )
    kind = FragmentConsultation if source.fragments else SimulatedConsultation
    consultation = kind(
        physician,
        max_turns=source.max_turns,
        modes=ModeConfig(interruption=source.interruption),
        version=lambda: physician.version,
    )
    rewards = _stage_rewards(recipe, judges)
    return TaskRL(cases, consultation, rewards, physician, weights, config, readers=readers)


def _advantages(recipe: Recipe) -> Algorithm:
    """Of the recipe in stage 1; outcome advantages of stages 2 and 3 are SPAR's."""
    if recipe.stage == "task-rl":
        return recipe.algorithm_config()
    penalties = {**spar.PENALTIES, **recipe.rewards.penalties}
    return spar.Config(penalties=penalties)


def _stage_rewards(recipe: Recipe, judges: Judges) -> Mapping[Phase, StageReward]:
    rules = rule_rewards(StepVerifier() if recipe.rewards.steps else None)
    if judges.judge is None or judges.store is None:
        return rules
    inquiry = RubricStageReward(rules[Phase.inquiry], judges.judge, judges.store)
    return {**rules, Phase.inquiry: inquiry}


def _prompts(recipe: Recipe, domain: str, physician: Physician, weights: Weights, judges: Judges) -> PromptRollouts:
    rows = list(read_healthbench(_prompt_file(recipe.source.prompts[domain])))
    config = PromptRolloutsConfig(
        domain=domain,
        prompts=recipe.source.groups,
        rollouts=recipe.source.rollouts,
        epochs=recipe.source.epochs,
        algorithm=_advantages(recipe),
        seed=recipe.seed,
    )
    objective = recipe.loss() if recipe.stage == "task-rl" else None
    bare = [row.prompt_id for row in rows if not row.rubric.items and not judges.of_store(row.prompt_id)]
    judged = judges.judge is not None and len(bare) < len(rows)
    if (judged and bare) or (not judged and recipe.stage == "task-rl"):
        got = f"none of {bare[0]!r}" if bare else "none"
        raise refuse(OP, f"source.prompts, {domain!r}", "a rubric of each prompt and rewards.judge, or of none", got)
    reward = _PromptReward(judges, rows) if judged else None
    return PromptRollouts(list(_asked(rows)), physician, weights, config, reward=reward, objective=objective)


def _prompt_file(name: str) -> Path:
    return OWN_PROMPTS if name == "own" else Path(name)


def _asked(rows: Sequence[HealthBenchRow]) -> Iterator[Prompt]:
    for row in rows:
        yield Prompt(id=row.prompt_id, messages=tuple((one["role"], one["content"]) for one in row.prompt))


class _PromptReward:
    """The rubric of each prompt, judged."""

    def __init__(self, judges: Judges, rows: Sequence[HealthBenchRow]) -> None:
        assert judges.judge is not None
        self._reward = RubricReward(judges.judge, {row.prompt_id: row.rubric for row in rows}, judges.store)
        self.name = self._reward.name

    async def __call__(self, prompt: Prompt, answer: str) -> float:
        said = [{"role": role, "content": text} for role, text in prompt.messages]
        return await self._reward.score(prompt.id, [*said, {"role": "assistant", "content": answer}])
