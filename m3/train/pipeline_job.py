"""Several stages as one job that can be killed and go on: experts -> distillation -> MOPD.

    [[stages]]
    name = "expert-chest"
    recipe = "expert.toml"             beside the pipeline's file
    start = "start"                    an earlier stage whose model this one starts from; "": the recipe's own
    teachers = { chest = "..." }       earlier stages that teach, by domain
    set = ["source.department=chest"]  over the recipe

Each stage runs in a folder of its own. When it is done, stage.json there records what it was made from and what it
made, with sha256: the resolved recipe, the models that it took, the model that it left; its scores, its seconds, the
version that ran. A stage whose record still holds is not run again; one whose inputs have changed is refused, not
overwritten.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import json
import math
import os
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from m3.train.loop import MODEL
from m3.train.metrics import TIMINGS, read_metrics
from m3.train.open_stage import check, folder_of
from m3.train.recipe import FREE, OP, Recipe, flat, parse
from m3.train.recipe import read as read_recipe
from m3.train.run_stage import run_stage
from m3kernels import __version__
from m3kernels.checks import refuse

RECORD, LOCK, FORMAT = "stage.json", "pipeline.lock", 2
REWARD, ERROR = "reward/", "standard_error/"  # names of scores begin so: of a domain, and its standard error
Progress = Callable[[str, int, int, Mapping[str, float]], None]  # (stage, steps done, steps in all, metrics)


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
class Made:
    """A file or folder, and sha256 of what it holds ("": a server has it, and nobody here can tell).

    ``path``: of a stage's model from the job's folder on.
    """

    path: str
    sha256: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """What a stage was made from and what it made.

    Args:
        kind: task-rl, offline-distill or mopd. algorithm: its loss.
        recipe: the TOML; the hash is that of the resolved recipe, without paths of models.
        inputs: the models that it took, by the name of their stage, or by their key in the recipe ("model.name").
        output: the model. steps: taken. seconds: of these steps, in whichever processes.
        scores: on held-out cases. version, commit: of the package; "" where it does not lie in a git repository.
    """

    stage: str
    kind: str
    algorithm: str
    recipe: Made
    inputs: Mapping[str, Made]
    output: Made
    steps: int
    seconds: float
    scores: Mapping[str, float]
    version: str = __version__
    commit: str = ""
    format: int = FORMAT

    @property
    def rewards(self) -> dict[str, tuple[float, float | None]]:
        """(mean, standard error if known) by domain, and over all domains ("all") where there are several."""
        found = {
            name.removeprefix(REWARD): (value, self.scores.get(ERROR + name.removeprefix(REWARD)))
            for name, value in sorted(self.scores.items())
            if name.startswith(REWARD)
        }
        errors = [error for _, error in found.values() if error is not None]
        if len(found) > 1:
            error = math.hypot(*errors) / len(found) if len(errors) == len(found) else None
            found["all"] = (math.fsum(mean for mean, _ in found.values()) / len(found), error)
        return found


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
        recipe = recipe_of(job, stage, Path())
        try:
            check(recipe)
        except ValueError as error:
            raise ValueError(f"{error} (stage {stage.name!r})") from error
    return job


def recipe_of(job: Job, stage: JobStage, out: Path) -> Recipe:
    """The resolved recipe of a stage in a job under ``out``."""
    over = list(stage.set)
    if stage.start:
        over.append(f"model.name={json.dumps(str(out / stage.start / MODEL))}")
    over += [f"model.teachers.{domain}={json.dumps(str(out / one / MODEL))}" for domain, one in stage.teachers.items()]
    return read_recipe(Path(job.folder) / stage.recipe, over)


def run(
    job: Job,
    out: str | Path,
    progress: Progress = lambda what, done, total, metrics: None,
    finished: Callable[[Sequence[Record]], object] = lambda records: None,
) -> Ended:
    """Run the stages that are not done yet, in order.

    Args:
        finished: told the records so far whenever a stage has ended in this call.
    Raises:
        ValueError: another process runs the job; a stage that is done was made from something else than the job says
            now, or its model has changed since. What ``loop.train`` raises.
    """
    out = Path(out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    records: dict[str, Record] = {}
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise refuse("pipeline", "torchrun", "one process; its stages alone can have several", os.environ["WORLD_SIZE"])
    source = commit()  # before it runs: files may change meanwhile
    with _alone(out):
        for stage in job.stages:
            recipe = recipe_of(job, stage, out)
            folder = out / stage.name
            inputs = _inputs(stage, recipe, records)
            done = _done(folder, stage.name, _recipe_hash(recipe), inputs)
            if done is None:
                _check_begun(folder, inputs)
                progress(stage.name, 0, recipe.optim.steps, {})
                ended = asyncio.run(run_stage(recipe, folder, functools.partial(progress, stage.name)))
                if ended.outcome.model is None:
                    return Ended(records=tuple(records.values()), signal=ended.outcome.signal)
                done = Record(
                    stage=stage.name,
                    kind=recipe.stage,
                    algorithm=recipe.algorithm,
                    recipe=Made(path=str(Path(job.folder, stage.recipe)), sha256=_recipe_hash(recipe)),
                    inputs=inputs,
                    output=Made(path=f"{stage.name}/{MODEL}", sha256=folder_hash(ended.outcome.model)),
                    steps=ended.outcome.step,
                    seconds=round(_seconds(folder), 1),
                    scores=dict(ended.scores),
                    commit=source,
                )
                _write(folder / RECORD, dataclasses.asdict(done))
                records[stage.name] = done
                finished(tuple(records.values()))
            records[stage.name] = done
    return Ended(records=tuple(records.values()), signal=None)


def folder_hash(folder: Path) -> str:
    """sha256 of the names and bytes of all files under a folder."""
    digest = hashlib.sha256()
    for path in sorted(one for one in folder.rglob("*") if one.is_file()):
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(f"{found} {path.relative_to(folder).as_posix()}\n".encode())
    return digest.hexdigest()


def commit() -> str:
    """Of the repository that the package lies in, "-dirty" behind it where files differ; "": it lies in none."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return ""
    asked = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        found = subprocess.run(asked, capture_output=True, text=True, check=False)
    except FileNotFoundError:  # there is no git here
        return ""
    return found.stdout.strip() if found.returncode == 0 else ""


# -- parts ------------------------------------------------------------------------------------------------------------
BEGUN = "inputs.json"


def _inputs(stage: JobStage, recipe: Recipe, records: Mapping[str, Record]) -> dict[str, Made]:
    """Models of earlier stages by their names, and those that the recipe itself names by their keys."""
    taken = sorted({name for name in (stage.start, *stage.teachers.values()) if name})
    found = {name: records[name].output for name in taken}
    named = {"model.name": recipe.model.name, "model.reference": recipe.model.reference}
    if stage.start:
        del named["model.name"]
    for domain, name in sorted(recipe.model.teachers.items()):
        if domain not in stage.teachers:
            named[f"model.teachers.{domain}"] = name
    for key, name in named.items():
        if name:
            served = name.startswith(("http://", "https://"))
            found[key] = Made(path=name, sha256="" if served else folder_hash(folder_of(name)))
    return found


def _recipe_hash(recipe: Recipe) -> str:
    """Of what decides the stage. Models of earlier stages are named by their hashes, wherever they lie."""
    data = flat(recipe.to_json())
    kept = {key: value for key, value in data if not key.startswith((*FREE, "model.name", "model.teachers"))}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def _done(folder: Path, name: str, recipe: str, inputs: Mapping[str, Made]) -> Record | None:
    """The record of a stage that is done.

    Raises:
        ValueError: it holds no longer.
    """
    found = _read(folder)
    if found is None:
        return None
    path = folder / RECORD
    if found.stage != name:
        raise refuse("pipeline", str(path), f"a record of {name}", found.stage)
    if found.recipe.sha256 != recipe:
        raise refuse("pipeline", str(path), "a stage made by the recipe as it is now", "one made by another")
    _same(path, found.inputs, inputs)
    model = folder / MODEL
    if folder_hash(model) != found.output.sha256:
        raise refuse("pipeline", str(model), "the model as the stage left it", "other files")
    return found


def _read(folder: Path) -> Record | None:
    """The record that lies in a stage's folder."""
    path = folder / RECORD
    if not path.is_file():
        return None
    data = json.loads(path.read_text(encoding="utf-8"))
    if data.get("format") != FORMAT:
        raise refuse("pipeline", str(path), f"a record of format {FORMAT}", data.get("format"))
    made = {name: Made(**data[name]) for name in ("recipe", "output")}
    return Record(**{**data, **made, "inputs": {name: Made(**one) for name, one in data["inputs"].items()}})


def _seconds(folder: Path) -> float:
    """Of all steps, in whichever processes they were done."""
    parts = ("batch_seconds", "logprobs_seconds", "update_seconds", "refresh_seconds")
    return math.fsum(row[part] for row in read_metrics(folder / TIMINGS) for part in parts)


def _check_begun(folder: Path, inputs: Mapping[str, Made]) -> None:
    """A stage that was begun goes on from the same inputs only."""
    path = folder / BEGUN
    if path.is_file():
        begun = json.loads(path.read_text(encoding="utf-8"))
        _same(path, {name: Made(**one) for name, one in begun.items()}, inputs)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        _write(path, {name: dataclasses.asdict(one) for name, one in inputs.items()})


def _same(path: Path, before: Mapping[str, Made], now: Mapping[str, Made]) -> None:
    for name in sorted({*before, *now}):
        if name in before and name in now:
            one, other = before[name], now[name]
            if (one.sha256 or one.path) == (other.sha256 or other.path):
                continue
        raise refuse("pipeline", str(path), "a stage made from the models as they are now", f"another {name!r}")


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
