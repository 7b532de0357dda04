"""Which linears of a checkpoint stay as they are under a budget of bytes: m3.quantize.sensitivity, a layer at a time.

Every layer is rounded to nearest, and sees the calibration set as the model as it is would hand it on.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from m3.checkpoint import read_json, write_json
from m3.draft.store import fingerprint
from m3.models.loader import EMBEDDING, LAYER
from m3.quantize.block import batches
from m3.quantize.scheme import Scheme, nearest
from m3.quantize.sensitivity import Unit, budget_of, kept, layer_units
from m3.quantize.shards import Shards
from m3.quantize.states import States, write_states

UNITS = "sensitivity.json"
Progress = Callable[[int, int], None]  # (layers done, in all)


def keep_under_budget(
    model: Path,
    budget: str,
    calibration: Tensor,
    scheme: Scheme,
    method: str,
    folder: Path,
    progress: Progress = lambda done, total: None,
) -> tuple[str, ...]:
    """Full names of the linears that stay, "5%" or "200MB" of room given.

    Args:
        calibration: (S, L) token ids. method: range of the groups, as quantize_weight has it.
        folder: where states lie for a while, and where the measured units stay, so that they are measured once.
    Raises ValueError: a budget of another form, or a bad checkpoint.
    """
    budget_of(budget, [])
    path = folder / UNITS
    header = {
        "model": fingerprint(model),
        "calibration": hashlib.sha256(calibration.numpy().tobytes()).hexdigest(),
        "grid": f"{scheme} {method}",
    }
    found = read_json(path) if path.is_file() else {}
    if any(found.get(key) != value for key, value in header.items()):
        folder.mkdir(parents=True, exist_ok=True)
        measured = measure(model, calibration, scheme, method, folder, progress)
        found = {**header, "units": [dataclasses.asdict(unit) for unit in measured]}
        part = path.with_suffix(".tmp")
        write_json(part, found)
        part.replace(path)
    units = [Unit(**{**unit, "linears": tuple(unit["linears"])}) for unit in found["units"]]
    chosen = sorted(kept(units, budget_of(budget, units)), key=lambda unit: (unit.layer, unit.linears))
    return tuple(LAYER.format(unit.layer) + name for unit in chosen for name in unit.linears)


@torch.no_grad()
def measure(
    model: Path, calibration: Tensor, scheme: Scheme, method: str, folder: Path, progress: Progress
) -> list[Unit]:
    """The units of all layers."""
    shards, units = Shards(model), []
    lengths = [calibration.shape[1]] * len(calibration)
    paths = [folder / f"states-{layer}-units.bin" for layer in range(shards.model.num_layers + 1)]
    embedding = shards.get(EMBEDDING)
    write_states(paths[0], (embedding[ids] for ids in calibration))
    for layer in range(shards.model.num_layers):
        states = States(paths[layer], lengths, shards.model.hidden_size)
        block = shards.block(layer, shards.layer(layer))
        rounded = {name: nearest(weight, scheme, method) for name, weight in block.weights.items()}
        units += layer_units(block, layer, states, rounded)
        write_states(paths[layer + 1], (rows for hidden in batches(states, 8) for rows in block.forward(hidden)))
        paths[layer].unlink()
        shards.close()
        progress(layer + 1, shards.model.num_layers)
    paths[-1].unlink()
    return units
