"""From the tensors of a checkpoint's linears to the INT4 weights of one rank's layer; knows no serving engine.

``Parts`` gathers tensors as a loader brings them, by shard (one linear of the file: "q", "k", "v"; 0, 1; or an expert's
linears) and name. When all are there, ``rank_weights`` reads each shard in its format and cuts this rank's rows or
columns; shards that can share a product become one weight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from m3.models.int4_linear import can_concat, concat_out
from m3.models.loader import METHODS, read_quantization_config
from m3.plugins.transformers_int4 import read_weight
from m3kernels.checks import refuse
from m3kernels.int4 import Int4Weight

DTYPES = {"I32": torch.int32, "I64": torch.int64, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
PACKED = (  # the last word of a packed tensor's name
    *("qweight", "qzeros", "scales", "g_idx"),
    *("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx"),
)
Layers = dict[str, dict[str, torch.dtype]]  # linear of the checkpoint -> its packed tensors' names and dtypes


def four_bit_settings(stored: Mapping[str, Any]) -> dict[str, Any]:
    """quantization_config of a checkpoint in the form of ``read_weight``. Raises ValueError if it has none."""
    settings = read_quantization_config({"quantization_config": dict(stored)})
    if settings["quant_method"] == "compressed-tensors":
        for group in stored["config_groups"].values():
            if group.get("input_activations") is not None:
                want = "none: m3kernels quantises no activations"
                raise refuse("quantization_config", "input_activations", want, group["input_activations"])
    elif settings.get("bits") != 4:
        raise refuse("quantization_config", "bits", "4", settings.get("bits"))
    return settings


def is_four_bit(stored: Mapping[str, Any]) -> bool:
    """Whether ``four_bit_settings`` takes it."""
    if stored.get("quant_method") not in METHODS:
        return False
    try:
        four_bit_settings(stored)
    except ValueError:
        return False
    return True


def packed_layers(metadata: Mapping[str, Mapping[str, Any]]) -> Layers:
    """Linears with packed tensors, from the headers of safetensors files: {tensor: {"dtype": "I32", ..}}.

    Raises ValueError: a packed tensor of another dtype; no packed tensor at all.
    """
    layers: Layers = {}
    for name, facts in metadata.items():
        layer, _, part = name.rpartition(".")
        if part in PACKED:
            if facts["dtype"] not in DTYPES:
                raise refuse("checkpoint", name, " or ".join(DTYPES), facts["dtype"])
            layers.setdefault(layer, {})[part] = DTYPES[facts["dtype"]]
    if not layers:
        raise refuse("checkpoint", "safetensors files", "packed tensors (qweight or weight_packed)", "none")
    return layers


class Parts:
    """Tensors of the shards of one layer, on the device where they will be used."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.tensors: dict[Any, dict[str, Tensor]] = {}

    def add(self, shard: Any, part: str, tensor: Tensor) -> None:
        """A copy: what a loader hands over may be a window of a mapped file."""
        self.tensors.setdefault(shard, {})[part] = tensor.detach().to(self.device, copy=True)

    def take(self, shard: Any, name: str, settings: Mapping[str, Any]) -> Int4Weight:
        """The weight of a shard, whose tensors are let go. Raises ValueError naming the linear."""
        try:
            own = {**settings, **settings.get("extra_config", {}).get(name, {})}
            return read_weight(self.tensors.pop(shard, {}), own)
        except ValueError as error:
            raise ValueError(f"checkpoint: {name}: {error}") from error


def rank_rows(name: str, weight: Int4Weight, rows: int, rank: int, ranks: int) -> Int4Weight:
    """Rows of one rank of a column-parallel linear; key and value heads fewer than ranks are held by several ranks."""
    if rows > weight.out_features or weight.out_features % rows or ranks % (weight.out_features // rows):
        want = f"a multiple of the {rows} rows of a rank, for {ranks} ranks"
        raise refuse("checkpoint", name, want, f"{weight.out_features} rows")
    pieces = weight.out_features // rows
    start = rank * pieces // ranks * rows
    return weight if pieces == 1 else weight.slice_out(start, start + rows)


def rank_columns(name: str, weight: Int4Weight, columns: int, rank: int) -> Int4Weight:
    """Columns of one rank of a row-parallel linear. Raises ValueError for a part of an act-order weight."""
    if weight.in_features == columns:
        return weight
    try:
        return weight.slice_in(rank * columns, (rank + 1) * columns)
    except ValueError as error:
        raise ValueError(f"checkpoint: {name}: {error}") from error


def joined(weights: Sequence[Int4Weight]) -> list[Int4Weight]:
    """One weight of all rows if they share groups, symmetry and order; else as they are."""
    return [concat_out(weights)] if len(weights) > 1 and can_concat(weights) else list(weights)
