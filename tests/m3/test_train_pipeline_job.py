"""A pipeline as one job: what each stage takes and leaves, a kill -9 in the middle, records that no longer hold."""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import shutil
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import torch
from tiny_models import make_checkpoint
from typer.testing import CliRunner

from m3.cli import app
from m3.train import pipeline_job, pipeline_page
from m3.train.open_stage import Stage, load_model, load_teachers, opener
from m3.train.recipe import Recipe
from tests.m3.train_cases import PRELOADED, DrawnSource, with_one_thread

KILL = "M3_TEST_KILL"  # "stage seed, step": where the process kills itself
one_thread = pytest.fixture(autouse=True)(with_one_thread)


@contextlib.asynccontextmanager
async def drawn(recipe: Recipe) -> AsyncIterator[Stage]:
    """Batches of train_cases; scores are a sum of weights."""
    model = load_model(recipe)
    seed, _, step = os.environ.get(KILL, "-1 0").partition(" ")
    at = {int(step): signal.SIGKILL} if int(seed) == recipe.seed else {}

    async def evaluate() -> dict[str, float]:
        found = float(model.tensors()["model.norm.weight"].double().sum())
        return {"reward/a": found, "reward/b": 0.5, "standard_error/a": 0.03, "standard_error/b": 0.04, "turns/a": 7.0}

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
    base = pipeline_job.Made(path=str(out.parent / "base"), sha256=pipeline_job.folder_hash(out.parent / "base"))
    assert records["expert-a"].inputs == {"model.name": base}
    assert records["expert-a"].output.sha256 != records["expert-b"].output.sha256
    model = out / "fused" / "model"
    assert records["fused"].output == pipeline_job.Made(path="fused/model", sha256=pipeline_job.folder_hash(model))
    assert records["fused"].recipe.path == str(out.parent / "fused.toml")
    assert (records["fused"].kind, records["fused"].algorithm) == ("mopd", "mopd")
    assert all(record.steps == 3 and 0 < record.seconds < 60 for record in ended.records)


def test_rewards_over_domains_are_their_mean_with_its_error(unbroken):
    found = unbroken[1].records[0].rewards
    assert list(found) == ["a", "b", "all"] and found["b"] == (0.5, 0.04)
    assert found["all"] == pytest.approx(((found["a"][0] + 0.5) / 2, 0.025))  # hypot(0.03, 0.04) / 2


def test_the_command_on_a_job_that_is_done_prints_its_table_and_page(job_file, unbroken):
    out, ended = unbroken
    path = job_file.parent / "one.toml"
    path.write_text('[[stages]]\nname = "expert-a"\nrecipe = "expert-a.toml"\n')
    found = CliRunner().invoke(app, ["pipeline", "run", str(path), "-o", str(out)])
    assert found.exit_code == 0 and "expert-a" in found.output and "0.500 ± 0.040" in found.output
    page = (out / pipeline_page.PAGE).read_text()
    assert '<a href="expert-a/report.html">expert-a</a>' in page and (out / "expert-a" / "report.html").is_file()
    assert ended.records[0].output.sha256 in page and "<td>7.000</td>" in page
    assert (out / pipeline_page.PICTURE).read_bytes()[:4] == b"\x89PNG"


def test_a_page_older_than_a_record_is_written_anew(unbroken):
    out, records = unbroken[0], unbroken[1].records[:1]
    page = out / pipeline_page.PAGE
    page.write_text("before")
    assert pipeline_page.page_of(records, out) == page and page.read_text() == "before"
    os.utime(page, (1, 1))
    assert pipeline_page.page_of(records, out) == page and "expert-a" in page.read_text()


def run_apart(job: str, out: str, kill: str) -> None:
    torch.set_num_threads(1)
    os.environ[KILL] = kill
    pipeline_job.run(pipeline_job.read(job), out)


def test_a_job_that_was_killed_goes_on_to_the_same_models(job_file, unbroken, tmp_path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=run_apart, args=(str(job_file), str(tmp_path), "3 2"))
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
    again = pipeline_job.run(pipeline_job.read(job_file), out, progress=lambda what, *_: asked.append(what))
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


def test_a_stage_of_another_base_model_is_refused(job_file, tmp_path):
    shutil.copytree(job_file.parent / "base", tmp_path / "base")
    job = pipeline_job.read(job_file)
    one = dataclasses.replace(job.stages[0], set=(f'model.name="{tmp_path}/base"',))
    job = dataclasses.replace(job, stages=(one,))
    pipeline_job.run(job, tmp_path / "run")
    torch_config = tmp_path / "base" / "generation_config.json"
    torch_config.write_text("{}")
    with pytest.raises(ValueError, match=r"the models as they are now; got another 'model\.name'"):
        pipeline_job.run(job, tmp_path / "run")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('[[stages]]\nname = "a"\nrecipe = "expert-a.toml"\nstart = "b"', "want an earlier stage"),
        ('[[stages]]\nname = "a/b"\nrecipe = "expert-a.toml"', "that can name a folder"),
        ('[[stages]]\nname = "a"\nrecip = "x"', "'recip'; nearest is 'recipe'"),
        ('[[stages]]\nname = "a"\nrecipe = "absent.toml"', r"absent\.toml"),
        ("stages = []", "at least one"),
        ('[[stages]]\nname = "a"\nrecipe = "fused.toml"', "want a checkpoint by domain, for mopd; got none"),
    ],
)
def test_a_job_that_cannot_run_is_refused_before_it_begins(job_file, text, told):
    path = job_file.parent / "wrong.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=told):
        pipeline_job.read(path)


CONSULT = '[source]\nkind = "consult"\n'


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (f'stage = "mopd"\n[model]\nteachers = {{ chest = "x" }}\n{CONSULT}', r"teacher of each department.*'belly'"),
        (f'stage = "task-rl"\n{CONSULT}department = "head"', "'chest', 'belly'.*got 'head'"),
        (f'stage = "task-rl"\n[objective]\nalgorithm = "dapo"\n{CONSULT}', "on this task; got 'dapo'"),
        (f'stage = "offline-distill"\n[model]\nteachers = {{ head = "x" }}\n{CONSULT}', "departments.*got 'head'"),
    ],
)
def test_what_the_small_task_cannot_open_is_told_before_any_stage_runs(tmp_path, text, told):
    (tmp_path / "one.toml").write_text(text)
    (tmp_path / "job.toml").write_text('[[stages]]\nname = "one"\nrecipe = "one.toml"\n')
    with pytest.raises(ValueError, match=f"{told}.*stage 'one'"):
        pipeline_job.read(tmp_path / "job.toml")


@pytest.mark.parametrize("kind", ["clinc", "m3.absent:f", "m3.train.open_stage:absent"])
def test_a_source_that_is_none_is_refused(kind):
    with pytest.raises(ValueError, match=r"source\.kind"):
        opener(Recipe(stage="task-rl", source=dataclasses.replace(Recipe(stage="task-rl").source, kind=kind)))
