"""A pipeline as one job: what each stage takes and leaves, a kill -9 in the middle, records that no longer hold."""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import torch
from tiny_models import make_checkpoint

from m3.train import pipeline_job
from m3.train.open_stage import Stage, load_model, load_teachers, opener
from m3.train.recipe import Recipe
from tests.m3.train_cases import DrawnSource, with_one_thread

KILL = "M3_TEST_KILL"  # "stage seed, step": where the process kills itself
one_thread = pytest.fixture(autouse=True)(with_one_thread)


@contextlib.asynccontextmanager
async def drawn(recipe: Recipe) -> AsyncIterator[Stage]:
    """Batches of train_cases; scores are a sum of weights."""
    model = load_model(recipe)
    seed, _, step = os.environ.get(KILL, "-1 0").partition(" ")
    at = {int(step): signal.SIGKILL} if int(seed) == recipe.seed else {}

    async def evaluate() -> dict[str, float]:
        return {"reward/all": float(model.tensors()["model.norm.weight"].double().sum())}

    source = DrawnSource(recipe.loss(), model, at=at)
    yield Stage(model=model, source=source, teachers=load_teachers(recipe), evaluate=evaluate)


STAGES = [
    ("expert-a", "task-rl", 1),
    ("expert-b", "task-rl", 2),
    ("distilled", "offline-distill", 3),
    ("fused", "mopd", 4),
]


@pytest.fixture(scope="module")
def job_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("job")
    make_checkpoint(folder / "base", "llama")
    text = ""
    for name, stage, seed in STAGES:
        (folder / f"{name}.toml").write_text(
            f'stage = "{stage}"\nseed = {seed}\n[model]\nname = "{folder / "base"}"\n'
            f'[source]\nkind = "{__name__}:drawn"\n[optim]\nsteps = 3\nlr = 1e-3\n'
            "[checkpoint]\nevery = 1\ntensorboard = false\n[scale]\nmax_tokens = 24\n"
        )
        text += f'[[stages]]\nname = "{name}"\nrecipe = "{name}.toml"\n'
        if stage != "task-rl":
            text += 'teachers = { a = "expert-a", b = "expert-b" }\n'
        if name == "fused":
            text += 'start = "distilled"\n'
    (folder / "pipeline.toml").write_text(text)
    return folder / "pipeline.toml"


@pytest.fixture(scope="module")
def unbroken(job_file: Path) -> tuple[Path, pipeline_job.Ended]:
    torch.set_num_threads(1)
    out = job_file.parent / "unbroken"
    return out, pipeline_job.run(pipeline_job.read(job_file), out)


def test_each_stage_records_what_it_took_and_left(unbroken):
    out, ended = unbroken
    records = {record.stage: record for record in ended.records}
    assert list(records) == [name for name, _, _ in STAGES] and ended.signal is None
    taken = ("distilled", "expert-a", "expert-b")
    assert dict(records["fused"].inputs) == {name: records[name].output for name in taken}
    assert not records["expert-a"].inputs and records["expert-a"].output != records["expert-b"].output
    assert records["fused"].output == pipeline_job.folder_hash(out / "fused" / "model")
    assert all(record.steps == 3 for record in ended.records)


def run_apart(job: str, out: str, kill: str) -> None:
    torch.set_num_threads(1)
    os.environ[KILL] = kill
    pipeline_job.run(pipeline_job.read(job), out)


def test_a_job_that_was_killed_goes_on_to_the_same_models(job_file, unbroken, tmp_path):
    process = multiprocessing.get_context("spawn").Process(target=run_apart, args=(str(job_file), str(tmp_path), "3 2"))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    assert not (tmp_path / "distilled" / "stage.json").exists() and (tmp_path / "expert-b" / "stage.json").exists()
    ended = pipeline_job.run(pipeline_job.read(job_file), tmp_path)
    assert [one.output for one in ended.records] == [one.output for one in unbroken[1].records]
    assert [dict(one.scores) for one in ended.records] == [dict(one.scores) for one in unbroken[1].records]


def test_a_job_that_is_done_does_nothing(job_file, unbroken):
    out, ended = unbroken
    asked: list[str] = []
    again = pipeline_job.run(pipeline_job.read(job_file), out, progress=lambda what, done, total: asked.append(what))
    assert again.records == ended.records and asked == []


def test_a_stage_of_another_recipe_is_refused(job_file, unbroken):
    job = pipeline_job.read(job_file)
    other = dataclasses.replace(job.stages[0], set=("optim.lr=0.5",))
    with pytest.raises(ValueError, match=r"expert-a/stage\.json: want a stage made by the recipe as it is now"):
        pipeline_job.run(dataclasses.replace(job, stages=(other, *job.stages[1:])), unbroken[0])


def test_a_model_that_has_changed_is_refused(job_file, tmp_path):
    job = pipeline_job.read(job_file)
    job = dataclasses.replace(job, stages=job.stages[:1])
    pipeline_job.run(job, tmp_path)
    (tmp_path / "expert-a" / "model" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="the model as the stage left it"):
        pipeline_job.run(job, tmp_path)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('[[stages]]\nname = "a"\nrecipe = "expert-a.toml"\nstart = "b"', "want an earlier stage"),
        ('[[stages]]\nname = "a/b"\nrecipe = "expert-a.toml"', "that can name a folder"),
        ('[[stages]]\nname = "a"\nrecip = "x"', "'recip'; nearest is 'recipe'"),
        ('[[stages]]\nname = "a"\nrecipe = "absent.toml"', r"absent\.toml"),
        ("stages = []", "at least one"),
    ],
)
def test_a_job_that_cannot_run_is_refused_before_it_begins(job_file, text, told):
    path = job_file.parent / "wrong.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=told):
        pipeline_job.read(path)


@pytest.mark.parametrize("kind", ["clinc", "m3.absent:f", "m3.train.open_stage:absent"])
def test_a_source_that_is_none_is_refused(kind):
    with pytest.raises(ValueError, match=r"source\.kind"):
        opener(Recipe(stage="task-rl", source=dataclasses.replace(Recipe(stage="task-rl").source, kind=kind)))
