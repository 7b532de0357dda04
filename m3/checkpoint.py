"""Hugging Face checkpoint folders on disk: config.json and one or more safetensors files, read with every fact checked.

A tensor is asked for by name with the shape and dtypes that the model needs; whatever is wrong with a file (truncated,
not safetensors, tensor missing or of another shape) is a ValueError that names file, tensor, wanted and got.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from m3kernels.checks import refuse

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
FLOAT_NAMES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}  # in a file's header
SHARD_BYTES = 4 << 30


class Checkpoint:
    """An opened folder: ``config`` (the parsed config.json), ``names`` (its tensors), ``get`` (one tensor).

    Raises:
        ValueError: a file is missing or malformed; names file, tensor, wanted, got.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.config = read_json(self.folder / CONFIG)
        self._files: dict[str, Any] = {}
        self._where: dict[str, str] = {}
        if (self.folder / INDEX).is_file():
            self._read_index()
        else:
            self._where = dict.fromkeys(self._open(SINGLE).keys(), SINGLE)

    def _read_index(self) -> None:
        where = read_json(self.folder / INDEX).get("weight_map")
        if not isinstance(where, dict) or not where:
            raise refuse("checkpoint", f"{INDEX}: weight_map", "an object of tensor name to file name", where)
        for name, file in where.items():
            if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
                raise refuse(
                    "checkpoint", f"{INDEX}: weight_map[{name!r}]", "a *.safetensors file of this folder", repr(file)
                )
            if name not in self._open(file).keys():  # noqa: SIM118  (a safetensors handle is not a mapping)
                raise refuse("checkpoint", f"{file}: {name}", f"a tensor, as {INDEX} says", "none of that name")
        self._where = where

    def _open(self, file: str) -> Any:
        if file not in self._files:
            path = self.folder / file
            if not path.is_file():
                raise refuse("checkpoint", str(path), "a file", "none")
            try:
                self._files[file] = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise refuse(
                    "checkpoint", str(path), "a safetensors file", f"{path.stat().st_size} bytes: {error}"
                ) from error
        return self._files[file]

    def close(self) -> None:
        """Let go of the files, and of the memory they are mapped to; ``get`` opens what it needs again."""
        self._files.clear()

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._where)

    def __contains__(self, name: object) -> bool:
        return name in self._where

    def file_of(self, name: str) -> str:
        """File that holds ``name``; for a tensor that is nowhere, the file it should be in."""
        return self._where.get(name, INDEX if (self.folder / INDEX).is_file() else SINGLE)

    def outline(self, name: str) -> Tensor:
        """The tensor called ``name`` without its data, on device meta: shape and dtype as its file's header says."""
        view = self._open(self._where[name]).get_slice(name)
        dtype = FLOAT_NAMES.get(view.get_dtype())  # no page of the data is touched
        return torch.empty(view.get_shape(), dtype=self.get(name).dtype if dtype is None else dtype, device="meta")

    def get(
        self, name: str, shape: tuple[int | None, ...] | None = None, dtypes: Iterable[torch.dtype] | None = None
    ) -> Tensor:
        """The tensor called ``name``; None in ``shape`` accepts any size there."""
        label = f"{self.file_of(name)}: {name}"
        sizes = "" if shape is None else "(" + ", ".join("any" if size is None else str(size) for size in shape) + ")"
        kinds = "" if dtypes is None else " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        want = f"{sizes} {kinds}".strip() or "a tensor"
        if name not in self._where:
            raise refuse("checkpoint", label, want, "no such tensor")
        try:
            tensor = self._open(self._where[name]).get_tensor(name)
        except (SafetensorError, OSError, RuntimeError, TypeError, AttributeError) as error:  # a dtype torch has not
            raise refuse("checkpoint", label, want, f"unreadable: {error}") from error
        fits = shape is None or (
            tensor.ndim == len(shape) and all(a in (None, b) for a, b in zip(shape, tensor.shape, strict=True))
        )
        if not fits or (dtypes is not None and tensor.dtype not in tuple(dtypes)):
            raise refuse("checkpoint", label, want, tensor)
        return tensor


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ValueError if there is no file, no JSON, or no object."""
    if not path.is_file():
        raise refuse("checkpoint", str(path), "a file", "none")
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise refuse("checkpoint", str(path), "JSON", f"{type(error).__name__}: {error}") from error
    if not isinstance(value, dict):
        raise refuse("checkpoint", str(path), "a JSON object", value)
    return value


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """A safetensors file, readable to whom any new file is: safetensors alone would let nobody else read it.

    Raises SafetensorError, or OSError: it cannot be written.
    """
    path.unlink(missing_ok=True)
    path.touch()
    mode = path.stat().st_mode
    save_file(dict(tensors), path, {"format": "pt"})
    path.chmod(mode)


def write_checkpoint(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], *, shard_bytes: int = SHARD_BYTES
) -> None:
    """config.json and the tensors, as one safetensors file, or as shards of at most ``shard_bytes`` with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / CONFIG, config)
    shards: list[dict[str, Tensor]] = [{}]
    used = 0
    for name, tensor in tensors.items():
        nbytes = tensor.numel() * tensor.element_size()
        if shards[-1] and used + nbytes > shard_bytes:
            shards.append({})
            used = 0
        shards[-1][name] = tensor.contiguous()
        used += nbytes
    if len(shards) == 1:
        save_tensors(shards[0], folder / SINGLE)
        return
    where: dict[str, str] = {}
    for index, shard in enumerate(shards, 1):
        file = f"model-{index:05d}-of-{len(shards):05d}.safetensors"
        save_tensors(shard, folder / file)
        where |= dict.fromkeys(shard, file)
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": where})
