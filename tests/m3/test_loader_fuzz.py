"""Thousands of damaged checkpoints: the loader gives a model or a ValueError, never anything else."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from int4_formats import rewrite
from safetensors.torch import load_file, save
from tiny_models import make_checkpoint

from m3.checkpoint import SINGLE
from m3.models.loader import load_model

ROUNDS = 6  # of BATCH mutations each: a failure names its round and case
BATCH = 80
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 16, 64, 2**31, 2**63, -(2**40), 0.5, 1e300, float("nan")),
    *("", "4", "gptq", "gptq_v2", "awq", "x" * 300, [], [1], ["a"], {}, {"a": 1}, {"a": {"weights": {}}}, [[]]),
)
DTYPES = (
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.int32,
    torch.int64,
    torch.uint8,
    torch.bool,
)
KINDS = ("gptq-v1", "gptq-act-order", "awq", "compressed-tensors", "auto-round")


@pytest.fixture(scope="module")
def seeds(tmp_path_factory) -> list[tuple[dict[str, Any], bytes]]:
    """(config.json, model.safetensors) of undamaged tiny checkpoints of several formats."""
    found = []
    for family, kind in [*(("llama", kind) for kind in KINDS), ("qwen3_moe", "gptq-v1"), ("qwen3_moe", None)]:
        folder = tmp_path_factory.mktemp("seed")
        reference = make_checkpoint(folder, family)
        if kind:
            rewrite(folder, kind, reference)
        found.append((json.loads((folder / "config.json").read_text()), (folder / SINGLE).read_bytes()))
    return found


def change_bytes(data: bytes, rng: random.Random) -> bytes:
    """Cut, extend or overwrite; half of the damage is done to the header, where it matters."""
    header = 8 + int.from_bytes(data[:8], "little")
    place = rng.randrange(header) if rng.random() < 0.7 else rng.randrange(len(data))
    choice = rng.randrange(5)
    if choice == 0:
        return data[:place]
    if choice == 1:
        return data + bytes(rng.randrange(1, 64))
    if choice == 2:
        return rng.randbytes(rng.randrange(64))
    count = rng.choice((1, 1, 1, 4, 16))
    return data[:place] + rng.randbytes(count) + data[place + count :]


def change_config(config: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """Replace or remove one value, at any depth."""
    config = json.loads(json.dumps(config))
    place = config
    while True:
        key = rng.choice(sorted(place))
        if isinstance(place[key], dict) and place[key] and rng.random() < 0.8:
            place = place[key]
            continue
        if rng.random() < 0.15:
            place.pop(key)
        else:
            place[key] = rng.choice(VALUES)
        return config


def change_tensors(data: bytes, rng: random.Random, folder: Path) -> bytes:
    """Remove, rename, cast, cut, flatten or fill one tensor."""
    path = folder / "whole.safetensors"
    path.write_bytes(data)
    tensors = load_file(path)
    name = rng.choice(sorted(tensors))
    tensor = tensors.pop(name)
    choice = rng.randrange(6)
    if choice == 1:
        tensors[name + "x"] = tensor
    elif choice == 2:
        tensors[name] = tensor.to(rng.choice(DTYPES))
    elif choice == 3:
        axis = rng.randrange(tensor.ndim)
        tensors[name] = tensor.narrow(axis, 0, rng.randrange(tensor.shape[axis])).contiguous()
    elif choice == 4:
        tensors[name] = tensor.flatten()
    elif choice == 5:
        value = rng.choice((0, 1, -1, 2**31 - 1, -(2**31)) if not tensor.is_floating_point() else (0, 1e-30, torch.inf))
        tensors[name] = torch.full_like(tensor, value)
    return save(tensors)


@pytest.mark.parametrize("round_", range(ROUNDS))
def test_damaged_checkpoints_give_a_model_or_a_value_error(round_, seeds, tmp_path):
    unexpected, refused = [], 0
    for case in range(BATCH):
        rng = random.Random(round_ * BATCH + case)
        config, data = rng.choice(seeds)
        folder = tmp_path / "case"
        folder.mkdir()
        text = json.dumps(config).encode()
        kind = rng.choice(("bytes", "config", "config text", "tensors"))
        if kind == "bytes":
            data = change_bytes(data, rng)
        elif kind == "config":
            text = json.dumps(change_config(config, rng)).encode()
        elif kind == "config text":
            text = change_bytes(len(text).to_bytes(8, "little") + text, rng)[8:]
        else:
            data = change_tensors(data, rng, tmp_path)
        (folder / "config.json").write_bytes(text)
        (folder / SINGLE).write_bytes(data)
        try:
            load_model(folder)
        except ValueError:
            refused += 1
        except BaseException as error:
            unexpected.append((case, kind, repr(error)[:300]))
            if not isinstance(error, Exception):
                raise
        shutil.rmtree(folder)
    assert unexpected == []
    assert refused > BATCH // 4
