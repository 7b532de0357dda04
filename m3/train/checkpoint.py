"""Checkpoints that are there whole or not at all: a killed process or a full disk never leaves one that loads wrongly.

A checkpoint is a folder ``step-000006`` (six steps are done) of

    model.safetensors      the parameters that learn       state.json     step, updates, source, run, machine
    optimizer.safetensors  moments by parameter|moment     rng.safetensors, and python's in state.json
    manifest.json          size and sha256 of each file

It is written under another name, each file and the folder are forced to the disk, the manifest last, and then it is
renamed. Whoever loads it compares every file with the manifest first. Old ones are renamed before they are deleted.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import random
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from m3.train.optim import Optimizer
from m3.train.policy_model import PolicyModel
from m3kernels.checks import refuse

OP = "checkpoint"
FORMAT = 1
MODEL, OPTIMIZER, RNG, STATE, MANIFEST = (
    "model.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json", "manifest.json",
)  # fmt: skip
FILES = (MODEL, OPTIMIZER, RNG, STATE)
NAME = re.compile(r"step-(\d{6,})")
UNFINISHED = re.compile(r"\.(writing|removing)-step-\d+")


class DamagedCheckpointWarning(UserWarning):
    """A checkpoint is not what its manifest says and is passed over."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Moment:
    """What must be taken between two steps, before the source begins its next batch; everything else waits till then.

    Args:
        step: steps done.
        source: ``Source.state()``: JSON.
        rng: of torch's generators, by device ("cpu", "cuda:0"); python_rng: of ``random``.
    """

    step: int
    source: Mapping[str, Any]
    rng: Mapping[str, Tensor]
    python_rng: tuple[Any, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class State:
    """Everything that the rest of a run follows from.

    Args:
        updates: of the optimiser, done.
        model, optimizer: as ``PolicyModel.trained`` and ``Optimizer.tensors`` give them.
        run: settings of the run: JSON. machine: what may move the last bits (threads, torch): JSON.
    """

    moment: Moment
    updates: int
    model: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    run: Mapping[str, Any]
    machine: Mapping[str, Any]


def machine() -> dict[str, Any]:
    """What the last bits of a number depend on, beside the run's settings."""
    cpu = torch.backends.cpu.get_cpu_capability()
    return {"threads": torch.get_num_threads(), "torch": torch.__version__, "cpu": cpu}


def moment(step: int, source: Mapping[str, Any]) -> Moment:
    """This one."""
    rng = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        rng |= {f"cuda:{index}": value for index, value in enumerate(torch.cuda.get_rng_state_all())}
    return Moment(step=step, source=json.loads(json.dumps(source)), rng=rng, python_rng=random.getstate())


def state_of(model: PolicyModel, optimizer: Optimizer, moment: Moment, run: Mapping[str, Any]) -> State:
    """The state of one process; its tensors share memory with model and optimizer."""
    return State(
        moment=moment,
        updates=optimizer.updates,
        model={name: one.detach() for name, one in model.trained()},
        optimizer=optimizer.tensors(),
        run=run,
        machine=machine(),
    )


def restore(state: State, model: PolicyModel, optimizer: Optimizer) -> None:
    """Put weights, moments and generators where ``state`` has them; the source is the caller's.

    Raises:
        ValueError: the model's learning parameters have other names or shapes; nothing has changed.
    """
    found = dict(model.trained())
    if found.keys() != state.model.keys():
        other = sorted(found.keys() ^ state.model.keys())
        raise refuse(OP, "model", "the parameters of the run's own model", f"{len(other)} others, first {other[0]!r}")
    for name, parameter in found.items():
        if parameter.shape != state.model[name].shape or parameter.dtype != state.model[name].dtype:
            raise refuse(OP, name, f"{tuple(parameter.shape)} {parameter.dtype}", state.model[name])
    optimizer.load(state.optimizer, state.updates)
    with torch.no_grad():
        for name, parameter in found.items():
            parameter.copy_(state.model[name])
    torch.set_rng_state(state.moment.rng["cpu"])
    for device, value in state.moment.rng.items():
        if device != "cpu" and torch.cuda.is_available():
            torch.cuda.set_rng_state(value, device)
    version, words, gauss = state.moment.python_rng
    random.setstate((version, tuple(words), gauss))


# -- on the disk ------------------------------------------------------------------------------------------------------
def write(folder: str | Path, state: State, *, keep: int = 2) -> Path:
    """Write a checkpoint into ``folder``, then delete all but the ``keep`` newest; its path.

    Raises:
        OSError: the disk is full, or worse; the older checkpoints are as they were, and no new one is there.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    if keep < 1:
        raise refuse(OP, "keep", "at least 1", keep)
    folder = Path(folder)
    moment = state.moment
    name = f"step-{moment.step:06d}"
    part, path = folder / f".writing-{name}", folder / name
    folder.mkdir(parents=True, exist_ok=True)
    sweep(folder)
    try:
        part.mkdir()
        for file, tensors in ((MODEL, state.model), (OPTIMIZER, state.optimizer), (RNG, moment.rng)):
            save_file({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, part / file)
        plain = {
            "format": FORMAT,
            "step": moment.step,
            "updates": state.updates,
            "source": moment.source,
            "python_rng": moment.python_rng,
            "run": state.run,
            "machine": state.machine,
        }
        _write_json(part / STATE, plain)
        for file in FILES:
            to_disk(part / file)
        _write_json(part / MANIFEST, {file: _described(part / file) for file in FILES})
        to_disk(part / MANIFEST)
        to_disk(part)
        if path.exists():  # of an earlier run of the same steps
            _remove(path)
        part.rename(path)
        to_disk(folder)
    except BaseException as error:
        shutil.rmtree(part, ignore_errors=True)
        if isinstance(error, (SafetensorError, OSError)):
            raise OSError(f"{OP}: {path}: {error}") from error
        raise
    for _, old in [one for one in finished(folder) if one[0] < moment.step][keep - 1 :]:
        _remove(old)
    return path


def load(path: str | Path) -> State:
    """The state in a checkpoint, compared with its manifest, file by file.

    Raises:
        ValueError: it is not whole, or not what was written; names the file.
    """
    from safetensors.torch import load_file

    path = Path(path)
    verify(path)
    plain = json.loads((path / STATE).read_bytes())
    if plain["format"] != FORMAT:
        raise refuse(OP, f"{path / STATE}: format", f"{FORMAT}, of this version", "another")
    model, optimizer, rng = (load_file(path / file) for file in (MODEL, OPTIMIZER, RNG))
    place = Moment(step=plain["step"], source=plain["source"], rng=rng, python_rng=tuple(plain["python_rng"]))
    return State(
        moment=place, updates=plain["updates"], model=model, optimizer=optimizer, run=plain["run"],
        machine=plain["machine"],
    )  # fmt: skip


def verify(path: Path) -> None:
    """Raises ValueError: a file of a checkpoint is missing or is not the one that its manifest tells of."""
    if not (path / MANIFEST).is_file():
        raise refuse(OP, str(path / MANIFEST), "a file", "none")
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
    except ValueError as error:
        raise refuse(OP, str(path / MANIFEST), "JSON", f"{error}") from error
    for file in FILES:
        wanted = manifest.get(file) if isinstance(manifest, dict) else None
        found = _described(path / file) if (path / file).is_file() else "no file"
        if found != wanted:
            raise refuse(OP, str(path / file), f"the file of the manifest, {wanted}", f"{found}")


def latest(folder: str | Path) -> Path | None:
    """The newest checkpoint of a folder that is what its manifest says; None without any. Warns of damaged ones."""
    for _, path in finished(Path(folder)):
        try:
            verify(path)
        except ValueError as error:
            warnings.warn(f"{error}; an older checkpoint is looked for", DamagedCheckpointWarning, stacklevel=2)
            continue
        return path
    return None


def export(model: PolicyModel, folder: str | Path) -> Path:
    """``model.save(folder)``; the folder appears under its name when it is complete and on the disk.

    What stood there before is replaced; a process killed in that moment leaves it as ``.old-<name>``.

    Raises:
        OSError: the disk is full, or worse; what stood there is as it was.
    """
    from safetensors import SafetensorError

    folder = Path(folder)
    part, old = folder.with_name(f".writing-{folder.name}"), folder.with_name(f".old-{folder.name}")
    shutil.rmtree(part, ignore_errors=True)
    try:
        model.save(part)
        for path in (*part.iterdir(), part):
            to_disk(path)
    except BaseException as error:
        shutil.rmtree(part, ignore_errors=True)
        if isinstance(error, (SafetensorError, OSError)):
            raise OSError(f"{OP}: {folder}: {error}") from error
        raise
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    part.rename(folder)
    to_disk(folder.parent)
    shutil.rmtree(old, ignore_errors=True)
    return folder


def sweep(folder: Path) -> None:
    """Delete what a killed process left unfinished."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if UNFINISHED.fullmatch(path.name):
            shutil.rmtree(path)


def to_disk(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def finished(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of the finished checkpoints, damaged ones too, newest first."""

    def each() -> Iterator[tuple[int, Path]]:
        for path in folder.iterdir() if folder.is_dir() else ():
            match = NAME.fullmatch(path.name)
            if match and path.is_dir():
                yield int(match[1]), path

    return sorted(each(), reverse=True)


def _remove(path: Path) -> None:
    """A checkpoint is never half deleted under its own name."""
    going = path.with_name(f".removing-{path.name}")
    path.rename(going)
    shutil.rmtree(going)


def _described(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, allow_nan=False) + "\n", encoding="utf-8")
