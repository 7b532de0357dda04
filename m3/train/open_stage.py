"""From a recipe to what the loop runs: the model, the source, the teachers.

An opener makes them and frees them: an asynchronous context manager of a ``Stage``. There are openers of the clinic and
of the small consultation task; a recipe names one of its user's own as ``source.kind = "package.module:function"``.

Where several processes train together each of them opens the stage: one that can be has an argument ``ranks``
(m3.train.distributed.Together). It shards the model, and the models that judge in the loop; its source gives all ranks
the same batches (``Relayed``); ``evaluate`` is called on rank 0 alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import inspect
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from m3.train.metrics import Decode
from m3.train.policy_model import LoraConfig, PolicyModel
from m3.train.recipe import OP, Recipe
from m3.train.stage import Source
from m3kernels.checks import refuse

if TYPE_CHECKING:
    from m3.train.distributed import Together


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """What ``loop.train`` takes.

    Args:
        reference, teachers, decode: as there.
        evaluate: scores of the model as it is, on cases that nothing is trained on: "reward/DOMAIN", perhaps with
            "standard_error/DOMAIN" of it, and others by any name. None: there are no such cases.
    """

    model: PolicyModel
    source: Source
    reference: PolicyModel | None = None
    teachers: Mapping[str, PolicyModel] = dataclasses.field(default_factory=dict)
    decode: Decode | None = None
    evaluate: Callable[[], Awaitable[Mapping[str, float]]] | None = None


Opener = Callable[..., AbstractAsyncContextManager[Stage]]  # of (recipe), or of (recipe, ranks=...)
OPENERS = {"clinic": "m3.train.open_stage:clinic", "consult": "m3.train.tasks.open_consult:consult"}


def opener(recipe: Recipe) -> Opener:
    """The opener that a recipe names.

    Raises:
        ValueError: no such kind, module or function.
    """
    kind = recipe.source.kind
    module, colon, name = OPENERS.get(kind, kind).partition(":")
    want = f"one of {sorted(OPENERS)}, or package.module:function"
    if not colon:
        raise refuse(OP, "source.kind", want, repr(kind))
    try:
        return getattr(importlib.import_module(module), name)
    except (ModuleNotFoundError, AttributeError) as error:
        raise refuse(OP, "source.kind", want, f"{kind!r}: {error}") from error


def check(recipe: Recipe) -> None:
    """Refuse what can be known not to open before anything is loaded.

    An opener ``f`` may have a function ``check_f`` of the recipe beside it, which raises ValueError.

    Raises:
        ValueError: as ``opener``; no teacher for stage 3; what the opener's own check refuses.
    """
    found = opener(recipe)
    if recipe.stage == "mopd" and not recipe.model.teachers:
        raise refuse(OP, "model.teachers", "a checkpoint by domain, for mopd", "none")
    own = getattr(importlib.import_module(found.__module__), f"check_{found.__name__}", None)
    if own is not None:
        own(recipe)


def opened(recipe: Recipe, ranks: Together | None = None) -> AbstractAsyncContextManager[Stage]:
    """The stage of a recipe, as a context manager; the model's random parts follow from the recipe's seed.

    Raises:
        ValueError: as ``check``; there are several ranks, and it cannot open for them.
    """
    check(recipe)
    torch.manual_seed(recipe.seed)
    random.seed(recipe.seed)
    found = opener(recipe)
    if ranks is None:
        return found(recipe)
    if "ranks" not in inspect.signature(found).parameters:
        raise refuse(OP, "source.kind", "one that several processes can open", repr(recipe.source.kind))
    return found(recipe, ranks=ranks)


def load_model(recipe: Recipe) -> PolicyModel:
    """The model that is trained.

    Raises:
        ValueError: the recipe names none.
    """
    model = recipe.model
    if not model.name:
        raise refuse(OP, "model.name", "a checkpoint folder or a name", "none")
    lora = LoraConfig(rank=model.lora_rank, alpha=model.lora_alpha) if model.lora_rank else None
    return PolicyModel.load(
        folder_of(model.name),
        dtype=getattr(torch, model.dtype),
        device=recipe.scale.device,
        attention=model.attention,
        gradient_checkpointing=model.gradient_checkpointing,
        lora=lora,
    )


def load_frozen(recipe: Recipe, name: str) -> PolicyModel:
    """A reference or teacher: as the trained model, without a gradient."""
    found = PolicyModel.load(
        folder_of(name),
        dtype=getattr(torch, recipe.model.dtype),
        device=recipe.scale.device,
        attention=recipe.model.attention,
    )
    return found.requires_grad_(False)


def load_teachers(recipe: Recipe) -> dict[str, PolicyModel]:
    """By domain; a checkpoint that teaches two domains is loaded once."""
    names = sorted(set(recipe.model.teachers.values()))
    models = {name: load_frozen(recipe, name) for name in names}
    return {domain: models[name] for domain, name in sorted(recipe.model.teachers.items())}


def folder_of(name: str) -> Path:
    """A checkpoint's folder."""
    from m3.models.hub import resolve

    return resolve(name)


@contextlib.asynccontextmanager
async def clinic(recipe: Recipe) -> AsyncIterator[Stage]:
    """Stage 1 on consultations of m3.environment: scripted patients, rewards by rules, the embedded engine.

    Raises:
        ValueError: another stage; no case of the split.
    """
    from m3.engine.config import EngineConfig
    from m3.engine.engine import AsyncEngine
    from m3.engine.open import open_core
    from m3.environment import pipeline
    from m3.environment.case import own_cases, read_cases
    from m3.environment.consultation import SimulatedConsultation
    from m3.environment.fragments import FragmentConsultation
    from m3.environment.modes import ModeConfig
    from m3.rewards.stage_rewards import rule_rewards
    from m3.rewards.step_verifier import StepVerifier
    from m3.train.rollouts import EnginePhysician
    from m3.train.task_rl import TaskRL, TaskRLConfig

    if recipe.stage != "task-rl":
        raise refuse(OP, "source.kind", f"one that has {recipe.stage}, such as 'consult'", "'clinic'")
    source, rollout = recipe.source, recipe.rollout
    every = own_cases() if not source.cases else read_cases(Path(source.cases))
    cases = [case for case in every if source.split in ("", case.split)]
    if not cases:
        raise refuse(OP, "source.split", "the split of some case", repr(source.split))
    config = TaskRLConfig(
        algorithm=recipe.algorithm_config(),
        pipeline=pipeline.Config(
            seed=recipe.seed,
            epochs=source.epochs,
            stages=recipe.phases(),
            rollouts=source.rollouts,
            tau={phase: recipe.rewards.tau.get(str(phase), 0.5) for phase in pipeline.PHASES},
            batch_size=source.groups * source.rollouts,
            timeout=rollout.timeout,
        ),
        resample=source.resample,
        sampler_level=recipe.loss().spec.sampler_level,  # type: ignore[union-attr]
        sampler_high=recipe.objective.sampler_high,
        domain=source.domain,
    )
    model = load_model(recipe)
    weights = {"float32": "fp32", "bfloat16": "bf16"}[recipe.model.dtype]
    engine_config = EngineConfig(
        max_context=rollout.context, max_running=rollout.max_running, memory_mb=rollout.memory_mb
    )
    core, tokenizer = open_core(recipe.model.name, engine_config, weights=weights)
    async with AsyncEngine(core, tokenizer) as engine:
        physician = EnginePhysician(
            engine,
            recipe.model.name,
            temperature=rollout.temperature,
            top_k=rollout.top_k,
            top_p=rollout.top_p,
            min_p=rollout.min_p,
            max_tokens=rollout.max_tokens,
            timeout=rollout.timeout,
        )
        kind = FragmentConsultation if source.fragments else SimulatedConsultation
        consultation = kind(
            physician,
            max_turns=source.max_turns,
            modes=ModeConfig(interruption=source.interruption),
            version=lambda: physician.version,
        )
        verifier = StepVerifier() if recipe.rewards.steps else None
        task = TaskRL(cases, consultation, rule_rewards(verifier), physician, model.tensors, config)
        reference = load_frozen(recipe, recipe.model.reference) if recipe.model.reference else None
        try:
            yield Stage(model=model, source=task, reference=reference, decode=tokenizer.decode)
        finally:
            await task.close()
