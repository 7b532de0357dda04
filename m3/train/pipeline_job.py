"""Several stages as one job that can be killed and go on: experts -> distillation -> MOPD.

    [[stages]]
    name = "expert-chest"
    recipe = "expert.toml"             beside the pipeline's file
    start = "start"                    an earlier stage whose model this one starts from; "": the recipe's own
    teachers = { chest = "..." }       earlier stages that teach, by domain
    set = ["source.department=chest"]  over the recipe

Each stage runs in a folder of its own. When it is done, stage.json there records what it was made from and what it
made, with sha256: the resolved recipe, the models that it took, the model that it left, its scores. A stage whose
record still holds is not run again; one whose inputs have changed is refused, not overwritten.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from m3.train.loop import MODEL
from m3.train.recipe import OP, Recipe, flat, parse
from m3.train.recipe import read as read_recipe
from m3.train.run_stage import run_stage
from m3kernels.checks import refuse

if TYPE_CHECKING:
    from rich.table import Table

RECORD, LOCK, FORMAT = "stage.json", "pipeline.lock", 1
Progress = Callable[[str, int, int], None]  # (stage, steps done, steps in all)


@dataclasses.dataclass(frozen=True, kw_only=True)
class JobStage:
    """A stage of a job: as in the file."""

    name: str
    recipe: str
    start: str = ""
    teachers: Mapping[str, str] = dataclasses.field(default_factory=dict)
    set: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """A pipeline. ``folder``: where its recipes lie; set by ``read``."""

    stages: tuple[JobStage, ...]
    folder: str = ""

    def __post_init__(self) -> None:
        known: set[str] = set()
        if not self.stages:
            raise refuse(OP, "stages", "at least one", "none")
        for stage in self.stages:
            if stage.name in known or not stage.name or Path(stage.name).name != stage.name:
                raise refuse(OP, "stages.name", "a name of its own that can name a folder", repr(stage.name))
            for name in (stage.start, *stage.teachers.values()):
                if name and name not in known:
                    raise refuse(OP, f"stages, {stage.name!r}", f"an earlier stage, of {sorted(known)}", repr(name))
            known.add(stage.name)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """What a stage was made from and what it made.

    Args:
        recipe: sha256 of the resolved recipe, without paths of models. inputs: sha256 of each earlier stage's model.
        output: sha256 of the model. steps: taken. scores: on held-out cases.
    """

    stage: str
    recipe: str
    inputs: Mapping[str, str]
    output: str
    steps: int
    scores: Mapping[str, float]
    format: int = FORMAT


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ended:
    """The records of the stages that are done; ``signal`` ended the job, or nothing did (None)."""

    records: Sequence[Record]
    signal: int | None


def read(path: str | Path) -> Job:
    """The job of a TOML file, its recipes read once, so that a mistake in the last is told before the first runs.

    Raises:
        ValueError: as recipe.read; a stage that takes from none earlier.
    """
    job = dataclasses.replace(parse(Job, path), folder=str(Path(path).parent))
    for stage in job.stages:
        recipe_of(job, stage, Path())
    return job


def recipe_of(job: Job, stage: JobStage, out: Path) -> Recipe:
    """The resolved recipe of a stage in a job under ``out``."""
    over = list(stage.set)
    if stage.start:
        over.append(f"model.name={json.dumps(str(out / stage.start / MODEL))}")
    over += [f"model.teachers.{domain}={json.dumps(str(out / one / MODEL))}" for domain, one in stage.teachers.items()]
    return read_recipe(Path(job.folder) / stage.recipe, over)


def run(job: Job, out: str | Path, progress: Progress = lambda what, done, total: None) -> Ended:
    """Run the stages that are not done yet, in order.

    Raises:
        ValueError: another process runs the job; a stage that is done was made from something else than the job says
            now, or its model has changed since. What ``loop.train`` raises.
    """
    out = Path(out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    records: dict[str, Record] = {}
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise refuse("pipeline", "torchrun", "one process; its stages alone can have several", os.environ["WORLD_SIZE"])
    with _alone(out):
        for stage in job.stages:
            recipe = recipe_of(job, stage, out)
            taken = sorted({name for name in (stage.start, *stage.teachers.values()) if name})
            inputs = {name: records[name].output for name in taken}
            folder = out / stage.name
            done = _done(folder, stage.name, _recipe_hash(recipe), inputs)
            if done is None:
                told = _teller(stage.name, progress)
                _check_begun(folder, inputs)
                ended = asyncio.run(run_stage(recipe, folder, told))
                if ended.outcome.model is None:
                    return Ended(records=tuple(records.values()), signal=ended.outcome.signal)
                done = Record(
                    stage=stage.name,
                    recipe=_recipe_hash(recipe),
                    inputs=inputs,
                    output=folder_hash(ended.outcome.model),
                    steps=ended.outcome.step,
                    scores=dict(ended.scores),
                )
                _write(folder / RECORD, dataclasses.asdict(done))
            records[stage.name] = done
    return Ended(records=tuple(records.values()), signal=None)


def table(records: Sequence[Record]) -> Table:
    """Scores of the stages, a row each."""
    from rich.table import Table

    names = sorted({name for record in records for name in record.scores if name.startswith("reward/")})
    made = Table(title="held-out reward after each stage")
    made.add_column("stage")
    made.add_column("steps", justify="right")
    for name in names:
        made.add_column(name.removeprefix("reward/"), justify="right")
    for record in records:
        told = [f"{record.scores[name]:.3f}" if name in record.scores else "" for name in names]
        made.add_row(record.stage, str(record.steps), *told)
    return made


def folder_hash(folder: Path) -> str:
    """sha256 of the names and bytes of all files under a folder."""
    digest = hashlib.sha256()
    for path in sorted(one for one in folder.rglob("*") if one.is_file()):
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(f"{found} {path.relative_to(folder).as_posix()}\n".encode())
    return digest.hexdigest()


# -- parts ------------------------------------------------------------------------------------------------------------
BEGUN = "inputs.json"


def _recipe_hash(recipe: Recipe) -> str:
    """Of what decides the stage. Models of earlier stages are named by their hashes, wherever they lie."""
    data = recipe.to_json()
    del data["checkpoint"]
    kept = {key: value for key, value in flat(data) if not key.startswith(("model.name", "model.teachers"))}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def _done(folder: Path, name: str, recipe: str, inputs: Mapping[str, str]) -> Record | None:
    """The record of a stage that is done.

    Raises:
        ValueError: it holds no longer.
    """
    path = folder / RECORD
    if not path.is_file():
        return None
    found = Record(**json.loads(path.read_text(encoding="utf-8")))
    if found.format != FORMAT or found.stage != name:
        raise refuse("pipeline", str(path), f"a record of {name}, format {FORMAT}", f"{found.stage}, {found.format}")
    if found.recipe != recipe:
        raise refuse("pipeline", str(path), "a stage made by the recipe as it is now", "one made by another")
    _same(path, found.inputs, inputs)
    model = folder / MODEL
    if folder_hash(model) != found.output:
        raise refuse("pipeline", str(model), "the model as the stage left it", "other files")
    return found


def _check_begun(folder: Path, inputs: Mapping[str, str]) -> None:
    """A stage that was begun goes on from the same inputs only."""
    path = folder / BEGUN
    if path.is_file():
        _same(path, json.loads(path.read_text(encoding="utf-8")), inputs)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        _write(path, inputs)


def _same(path: Path, before: Mapping[str, str], now: Mapping[str, str]) -> None:
    for name in sorted({*before, *now}):
        if before.get(name) != now.get(name):
            raise refuse("pipeline", str(path), "a stage made from the models as they are now", f"another {name!r}")


def _teller(name: str, progress: Progress) -> Callable[[int, int, Mapping[str, float]], None]:
    return lambda done, steps, metrics: progress(name, done, steps)


def _write(path: Path, data: Mapping[str, Any]) -> None:
    """JSON that is there whole or not at all."""
    part = path.with_name(path.name + ".part")
    with part.open("w", encoding="utf-8") as file:
        file.write(json.dumps(data, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


@contextlib.contextmanager
def _alone(out: Path) -> Iterator[None]:
    """One process at a time runs a job."""
    with (out / LOCK).open("ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise refuse("pipeline", str(out), "a job that no process runs", "one that is going on") from error
        yield
