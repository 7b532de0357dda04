"""The three stages on the consultation task (consult.py), as a recipe's source "consult".

    task-rl           an expert learns: groups of its own rollouts, SPAR or GRPO; ``source.department`` is its domain
    offline-distill   rollouts of the frozen teachers, each in its own department; without a teacher, scripted mediocre
                      physicians (Habits), which is where a decoder with random weights starts
    mopd              rollouts of the student in both departments, judged by the teacher of the department

A frozen teacher's rollouts follow from the recipe's seed and the step alone: they are drawn when they are needed.
Where several processes train together rank 0 draws, from a whole copy of the model.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import random
import statistics
from collections.abc import AsyncIterator, Mapping
from typing import TYPE_CHECKING, Any

from m3.algorithms import mopd, spar
from m3.train.offline_distill import certain
from m3.train.open_stage import Stage, load_frozen, load_model, load_teachers
from m3.train.policy_model import PolicyModel
from m3.train.recipe import OP, Recipe
from m3.train.stage import Objective, Source, StepBatch
from m3.train.tasks.consult import DEPARTMENTS, draw_case, draw_cases, text
from m3.train.tasks.consult_policy import ScriptedSource, decoder, rolled_out, sample_of
from m3.train.tasks.consult_rl import ConsultConfig, ConsultSource, evaluate, summary
from m3kernels.checks import refuse
from m3kernels.policy_loss.types import DistillSpec

if TYPE_CHECKING:
    from m3.train.distributed import Together

HELD_OUT = 400  # ours: consultations of each department; the standard error of a mean reward is about 0.015
ARMS = {"spar": "spar", "grpo": "grpo"}


class TeacherSource:
    """Consultations of frozen teachers, department by department, with the log-probabilities of their tokens.

    As in OfflineDistill, forward KL is -log pi of the teachers' own tokens.
    """

    def __init__(self, teachers: Mapping[str, PolicyModel], objective: Objective, *, seed: int, batch: int) -> None:
        self.teachers, self.objective, self.seed, self.size = teachers, objective, seed, batch
        self.forward = isinstance(objective.spec, DistillSpec) and objective.spec.divergence == "forward"

    async def batch(self, step: int) -> StepBatch:
        samples, metrics = [], {}
        for domain, teacher in sorted(self.teachers.items()):
            chance = random.Random(f"teachers {self.seed} {step} {domain}")
            cases = [draw_case(chance, department=domain) for _ in range(-(-self.size // len(self.teachers)))]
            rollouts = await rolled_out(teacher, cases, f"teachers {self.seed} {step} {domain}")
            for index, one in enumerate(rollouts):
                name = f"{step}-{domain}-{index}"
                sample = sample_of(
                    one.ids,
                    one.score,
                    name=name,
                    prompted=one.prompted,
                    sampler_logprobs=one.logprobs,
                    domain=domain,
                )
                told = dataclasses.replace(sample, teacher_logprobs=sample.sampler_logprobs)
                samples.append(certain(told) if self.forward else told)
            metrics[f"reward/{domain}"] = summary([one.score for one in rollouts])["reward"]
        return StepBatch(step=step, samples=samples, metrics=metrics)

    async def updated(self, step: int, version: int) -> None:
        pass

    def state(self) -> Mapping[str, Any]:
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        pass

    async def close(self) -> None:
        pass


class StudentSource(ConsultSource):
    """Stage 3: the student's own rollouts; the loop adds the log-probabilities of each domain's teacher."""

    def __init__(self, model: PolicyModel, config: ConsultConfig, distillation: mopd.Config) -> None:
        super().__init__(model, config)
        self.distillation = distillation
        self.objective = Objective(spec=mopd.loss_spec(distillation), on_policy=True)

    def _samples(self, *arguments: Any) -> list[Any]:
        found = super()._samples(*arguments)
        return [
            dataclasses.replace(one, advantages=mopd.outcome_advantages(one.advantages, self.distillation))
            for one in found
            if one.advantages is not None
        ]


def check_consult(recipe: Recipe) -> None:
    """What ``consult`` refuses before it loads anything. Raises ValueError as there."""
    department, teachers = recipe.source.department, recipe.model.teachers
    if department not in ("", *DEPARTMENTS):
        raise refuse(OP, "source.department", f"one of {list(DEPARTMENTS)}", repr(department))
    other = sorted(set(teachers) - set(DEPARTMENTS))
    if other:
        raise refuse(OP, "model.teachers", f"departments, {list(DEPARTMENTS)}", repr(other[0]))
    missing = sorted(set([department] if department else DEPARTMENTS) - set(teachers))
    if recipe.stage == "mopd" and missing:
        raise refuse(OP, "model.teachers", "a teacher of each department", f"none of {missing}")
    if recipe.stage == "task-rl" and recipe.algorithm not in ARMS:
        raise refuse(OP, "objective.algorithm", f"one of {sorted(ARMS)} on this task", repr(recipe.algorithm))


@contextlib.asynccontextmanager
async def consult(recipe: Recipe, ranks: Together | None = None) -> AsyncIterator[Stage]:
    """The stage of a recipe on this task; ``model.name`` may be "", a decoder with random weights.

    Raises:
        ValueError: an algorithm that the task has not; a department that it has not; no teacher for stage 3.
    """
    check_consult(recipe)
    model = load_model(recipe) if recipe.model.name else decoder()
    drawer = model  # whose rollouts are drawn
    if ranks is not None:
        drawer = load_frozen(recipe, recipe.model.name) if recipe.model.name else decoder()
    teachers = load_teachers(recipe)
    source: Source
    department = recipe.source.department or None
    if recipe.stage == "offline-distill":
        size = recipe.source.groups * recipe.source.rollouts
        if teachers:
            source = TeacherSource(teachers, recipe.loss(), seed=recipe.seed, batch=size)
        else:
            source = ScriptedSource(seed=recipe.seed, batch=size, department=department)
    else:
        source = _rollouts(recipe, drawer, department)
    reference = load_frozen(recipe, recipe.model.reference) if recipe.model.reference else None

    async def held_out() -> dict[str, float]:
        found: dict[str, float] = {}
        for domain in DEPARTMENTS:
            cases = draw_cases(HELD_OUT, "held out", held_out=True, department=domain)
            scores = await evaluate(drawer, cases)
            found |= {f"{name}/{domain}": value for name, value in summary(scores).items()}
            spread = statistics.stdev(score.reward for score in scores)
            found[f"standard_error/{domain}"] = spread / math.sqrt(len(scores))
        return found

    if ranks is not None:
        from m3.train.distributed import Copied, Relayed

        judges = [] if recipe.stage == "offline-distill" else list({id(one): one for one in teachers.values()}.values())
        for one in (model, *judges, *([] if reference is None else [reference])):
            ranks.shard(one)
        own = Copied(source, model, drawer) if ranks.rank == 0 else None
        source = Relayed(ranks, source.objective, own, model=model)

    yield Stage(model=model, source=source, reference=reference, teachers=teachers, decode=text, evaluate=held_out)


def _rollouts(recipe: Recipe, model: PolicyModel, department: str | None) -> Source:
    """Stages 1 and 3."""
    algorithm = recipe.algorithm_config()
    config = ConsultConfig(
        arm=ARMS.get(recipe.algorithm, "spar"),
        cases=recipe.source.groups,
        rollouts=recipe.source.rollouts,
        seed=recipe.seed,
        department=department,
        temperature=recipe.rollout.temperature,
        max_turns=recipe.source.max_turns,
        spar=algorithm if isinstance(algorithm, spar.Config) else spar.Config(),
    )
    if recipe.stage == "mopd":
        return StudentSource(model, config, algorithm)
    return ConsultSource(model, config)
