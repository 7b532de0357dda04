"""``m3 train``: a stage of training from a recipe, its report; ``m3 pipeline``: several stages as one job.

m3.cli adds ``app`` and ``pipeline_app``; what a command needs is imported when it runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from m3.terminal import Debug, Threads, console, errors, one_line_errors, set_threads
from m3kernels.checks import refuse

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None, help="Train a clinical model.")
pipeline_app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None, help="Stages as one job.")

if TYPE_CHECKING:
    from m3.train.pipeline_job import Job
    from m3.train.recipe import Recipe

RecipeFile = Annotated[
    Path,
    typer.Option(
        "--config", "-c", help="The recipe: TOML, a shipped one (tiny_cpu/start.toml), or the recipe.json of a run."
    ),
]
Overrides = Annotated[list[str] | None, typer.Argument(help="section.key=value, over the recipe.")]
RunFolder = Annotated[
    Path | None,
    typer.Option("--out", "-o", help="Folder of the run; the same goes on. Default: runs/<recipe's folder>/<recipe>."),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop: tokens, memory, time.")]


@app.command("task-rl")
@one_line_errors
def task_rl(
    config: RecipeFile,
    overrides: Overrides = None,
    out: RunFolder = None,
    dry_run: DryRun = False,
    threads: Threads = None,
    debug: Debug = False,
) -> None:
    """Stage 1: an expert learns from its own consultations (SPAR and its siblings)."""
    _command("task-rl", config, overrides, out, dry_run, threads)


@app.command("offline-distill")
@one_line_errors
def offline_distill(
    config: RecipeFile,
    overrides: Overrides = None,
    out: RunFolder = None,
    dry_run: DryRun = False,
    threads: Threads = None,
    debug: Debug = False,
) -> None:
    """Stage 2: a student learns from what experts said (Clip-Forward-KL)."""
    _command("offline-distill", config, overrides, out, dry_run, threads)


@app.command()
@one_line_errors
def mopd(
    config: RecipeFile,
    overrides: Overrides = None,
    out: RunFolder = None,
    dry_run: DryRun = False,
    threads: Threads = None,
    debug: Debug = False,
) -> None:
    """Stage 3: the student speaks, the expert of the domain judges its tokens (MOPD)."""
    _command("mopd", config, overrides, out, dry_run, threads)


@app.command()
@one_line_errors
def report(
    run: Annotated[Path, typer.Argument(help="Folder of a run.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The page; default RUN/report.html.")] = None,
    debug: Debug = False,
) -> None:
    """Write one HTML page of a run: curves, rewards, step penalties, rollouts."""
    from m3.train.report import write_report

    path = write_report(run, out)
    console.print(str(path), highlight=False, soft_wrap=True)


@pipeline_app.command("run")
@one_line_errors
def run_pipeline(
    job: Annotated[Path, typer.Argument(help="The pipeline: TOML, or a shipped one (tiny_cpu/pipeline.toml).")],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Folder of the job. Default: runs/<pipeline's folder>/<pipeline>."),
    ] = None,
    dry_run: DryRun = False,
    threads: Threads = None,
    debug: Debug = False,
) -> None:
    """Experts, distillation, MOPD: each stage starts from what those before it made. The same command goes on."""
    from m3.train import pipeline_job, pipeline_page
    from m3.train.progress import StageBars
    from m3.train.recipe import located

    set_threads(threads)
    path = located(job)
    found = pipeline_job.read(path)
    out = out or default_out(path)
    if dry_run:
        _print_plans(found, out)
        return
    with _told_how_to_go_on(out), StageBars() as bars:

        def finished(records: Sequence[pipeline_job.Record]) -> None:
            last = records[-1]
            bars.scored(last.stage, ", ".join(f"{name} {value:.3f}" for name, (value, _) in last.rewards.items()))
            pipeline_page.write_page(records, out)

        ended = pipeline_job.run(found, out, progress=bars.told, finished=finished)
    if ended.signal is not None:
        _say_how_to_go_on(out)
        raise typer.Exit(128 + ended.signal)
    page = pipeline_page.page_of(ended.records, out)
    console.print(pipeline_page.table(ended.records))
    console.print(f"models: {out}/<stage>/model   page: {page}", markup=False, highlight=False, soft_wrap=True)


# -- parts ------------------------------------------------------------------------------------------------------------
def _one_voice(command: Callable[..., None]) -> Callable[..., None]:
    """Of the processes that torchrun started rank 0 speaks; of an error, the one that has met it."""

    @functools.wraps(command)
    def run(*args: object) -> None:
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return command(*args)
        console.quiet = errors.quiet = os.environ["RANK"] != "0"
        try:
            return command(*args)
        except typer.Exit:
            raise
        except Exception as error:
            from m3.train.distributed import tells

            if not tells(error):
                raise typer.Exit(1) from error
            errors.quiet = False
            raise

    return run


@_one_voice
def _command(
    stage: str, config: Path, overrides: list[str] | None, out: Path | None, dry_run: bool, threads: int | None
) -> None:
    from m3.train.plan import plan_of
    from m3.train.progress import StageBars
    from m3.train.recipe import located, read
    from m3.train.run_stage import run_stage

    set_threads(threads)
    path = located(config)
    recipe = read(path, overrides or (), stage=stage)
    out = out or default_out(path)
    if dry_run:
        console.print(plan_of(recipe, out).text(), markup=False, highlight=False, soft_wrap=True)
        for line in _engine_lines(recipe):
            console.print(line, markup=False, highlight=False, soft_wrap=True)
        return
    if recipe.scale.engine != "here":
        raise refuse("train", "scale.engine", "'here', or --dry-run", f"{recipe.scale.engine!r}, run by its launcher")
    with _told_how_to_go_on(out), StageBars() as bars:
        ended = asyncio.run(run_stage(recipe, out, functools.partial(bars.told, stage)))
    if ended.outcome.signal is not None:
        _say_how_to_go_on(out)
        raise typer.Exit(128 + ended.outcome.signal)
    for name, value in sorted(ended.scores.items()):
        console.print(f"{name} {value:.3f}", markup=False, highlight=False)
    console.print(f"{ended.outcome.model}: {ended.outcome.step} steps", highlight=False, soft_wrap=True)


def default_out(recipe: Path) -> Path:
    """runs/tiny_cpu/start of .../tiny_cpu/start.toml; of the recipe.json of a run the folder of that run."""
    from m3.train.recipe import RESOLVED

    if recipe.name == RESOLVED:
        return recipe.parent
    return Path("runs", recipe.resolve().parent.name, recipe.stem)


@contextlib.contextmanager
def _told_how_to_go_on(out: Path) -> Iterator[None]:
    """ctrl-C outside of the steps: while something is loaded, or held-out cases are seen."""
    try:
        yield
    except KeyboardInterrupt:
        _say_how_to_go_on(out)
        raise


def _say_how_to_go_on(out: Path) -> None:
    errors.print(f"stopped; the same command goes on from {out}", markup=False, highlight=False, soft_wrap=True)


def _print_plans(job: Job, out: Path) -> None:
    """The plan of each stage; one that starts from an earlier one has its size."""
    from m3.train.pipeline_job import recipe_of
    from m3.train.plan import Plan, plan_of

    plans: dict[str, Plan] = {}
    for stage in job.stages:
        console.print(f"== {stage.name}", markup=False)
        shape = plans[stage.start].shape if stage.start else None
        plans[stage.name] = plan_of(recipe_of(job, stage, out), out / stage.name, shape)
        console.print(plans[stage.name].text(), markup=False, highlight=False, soft_wrap=True)
    seconds = [plan.seconds for plan in plans.values() if plan.seconds is not None]
    if len(seconds) == len(plans):
        console.print(f"== all: {sum(seconds) / 60:.1f} minutes", markup=False, highlight=False)


def _engine_lines(recipe: Recipe) -> list[str]:
    """What the recipe is in the words of its engine."""
    from m3.train.engine_configs import agent_loop_yaml, trl_arguments, verl_overrides

    if recipe.scale.engine == "verl":
        return ["", "python -m verl.trainer.main_ppo", *verl_overrides(recipe), "", agent_loop_yaml(recipe)]
    if recipe.scale.engine == "trl":
        return ["", "SPARConfig or GRPOConfig", *(f"{key}={value!r}" for key, value in trl_arguments(recipe).items())]
    return []
