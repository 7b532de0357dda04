"""INT4 checkpoints written word by word with numpy, independently of m3kernels: what the loader is tested against."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
GROUP = 32


def pack_along(values: np.ndarray, axis: int, order: tuple[int, ...] = tuple(range(8))) -> torch.Tensor:
    """Eight nibbles a word along ``axis``: nibble i of word j is element 8 j + order[i]."""
    values = np.moveaxis(values.astype(np.uint64), axis, 0)
    words = sum(values[order[nibble] :: 8] << np.uint64(4 * nibble) for nibble in range(8))
    return torch.from_numpy(np.moveaxis(words, 0, axis).astype(np.uint32).view(np.int32).copy())


class Layer:
    """Random INT4 contents of one linear, and what they mean: ``weight`` (N, K) fp32."""

    def __init__(
        self, rows: int, columns: int, *, symmetric: bool, g_idx: np.ndarray, random: np.random.Generator
    ) -> None:
        groups = -(-columns // GROUP)
        self.q = random.integers(0, 16, (rows, columns))
        self.zeros = np.full((rows, groups), 8) if symmetric else random.integers(1, 16, (rows, groups))
        self.scales = (random.random((rows, groups)) * 0.03 + 0.01).astype(np.float16)
        self.g_idx = g_idx
        spread = self.scales.astype(np.float32)[:, g_idx]
        self.weight = torch.from_numpy((self.q - self.zeros[:, g_idx]).astype(np.float32) * spread)

    def gptq(self, version: int) -> dict[str, torch.Tensor]:
        return {
            "qweight": pack_along(self.q.T, 0),
            "qzeros": pack_along(self.zeros.T - (1 if version == 1 else 0), 1),
            "scales": torch.from_numpy(self.scales.T.copy()),
            "g_idx": torch.from_numpy(self.g_idx.astype(np.int32)),
        }

    def awq(self) -> dict[str, torch.Tensor]:
        return {
            "qweight": pack_along(self.q.T, 1, AWQ_ORDER),
            "qzeros": pack_along(self.zeros.T, 1, AWQ_ORDER),
            "scales": torch.from_numpy(self.scales.T.copy()),
        }

    def compressed_tensors(self) -> dict[str, torch.Tensor]:
        return {
            "weight_packed": pack_along(self.q, 1),
            "weight_scale": torch.from_numpy(self.scales),
            "weight_zero_point": pack_along(self.zeros, 0),
            "weight_shape": torch.tensor(self.q.shape),
        }


COMMON: dict[str, Any] = {"bits": 4, "group_size": GROUP}
CT_WEIGHTS = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP, "symmetric": False}
QUANTIZATION: dict[str, dict[str, Any]] = {
    "gptq-v1": {**COMMON, "quant_method": "gptq", "sym": False, "desc_act": False, "checkpoint_format": "gptq"},
    "gptq-v2": {**COMMON, "quant_method": "gptq", "sym": False, "desc_act": False, "checkpoint_format": "gptq_v2"},
    "gptq-symmetric": {**COMMON, "quant_method": "gptq", "sym": True, "desc_act": False},
    "gptq-act-order": {**COMMON, "quant_method": "gptq", "sym": False, "desc_act": True},
    "gptq-act-order-each-its-own": {**COMMON, "quant_method": "gptq", "sym": False, "desc_act": True},
    "gptq-some-dense": {**COMMON, "quant_method": "gptq", "sym": False, "desc_act": False},
    "auto-round": {**COMMON, "quant_method": "auto-round", "sym": False, "packing_format": "auto_round:auto_gptq"},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"},
    "compressed-tensors": {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": CT_WEIGHTS}},
    },
}


def rewrite(folder: Path, kind: str, model: torch.nn.Module) -> None:
    """Make the dense checkpoint in ``folder`` an INT4 one; give ``model`` (transformers) the weights it stands for."""
    random = np.random.default_rng(0)
    tensors = load_file(folder / "model.safetensors")
    for name in [key for key in tensors if key.endswith("_proj.weight")]:
        if kind == "gptq-some-dense" and "k_proj" in name:
            continue
        rows, columns = tensors.pop(name).shape
        g_idx = np.arange(columns) // GROUP
        if "act-order" in kind:
            shuffle = random if "each" in kind else np.random.default_rng(columns)
            g_idx = shuffle.permutation(g_idx)
        layer = Layer(rows, columns, symmetric=kind == "gptq-symmetric", g_idx=g_idx, random=random)
        prefix = name.removesuffix("weight")
        if kind == "awq":
            parts = layer.awq()
        elif kind == "compressed-tensors":
            parts = layer.compressed_tensors()
        else:
            parts = layer.gptq(2 if kind == "gptq-v2" else 1)
        tensors |= {prefix + key: value.contiguous() for key, value in parts.items()}
        set_weight(model, prefix.removesuffix("."), layer.weight)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = QUANTIZATION[kind]
    (folder / "config.json").write_text(json.dumps(config))


@torch.no_grad()
def set_weight(model: torch.nn.Module, name: str, weight: torch.Tensor) -> None:
    """Put a linear's weight into a transformers model, whose experts are stacked."""
    if ".experts." not in name:
        model.get_submodule(name).weight.copy_(weight)
        return
    prefix, _, rest = name.partition(".experts.")
    expert, part = rest.split(".")
    experts = model.get_submodule(f"{prefix}.experts")
    if part == "down_proj":
        experts.down_proj[int(expert)].copy_(weight)
        return
    rows = len(weight)
    experts.gate_up_proj[int(expert)][slice(0, rows) if part == "gate_proj" else slice(rows, 2 * rows)].copy_(weight)
