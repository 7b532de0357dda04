"""How far the memory of the quantisation job grows, as a program: ``quantize_memory.py FOLDER`` prints JSON.

A process of its own, in which nothing else ran: what is freed goes back to the system at once (see ENVIRONMENT).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from bench.harness import peak_extra_bytes
from m3.checkpoint import CONFIG, write_json
from m3.models.loader import EMBEDDING, LAYER, NORM
from m3.quantize.job import JobConfig, quantize_checkpoint
from m3.quantize.scheme import Scheme

ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
HIDDEN, INNER, EXPERT_INNER, VOCABULARY = 256, 1024, 256, 64
LAYER_WEIGHTS = 4 * HIDDEN * HIDDEN + 3 * HIDDEN * INNER  # linears of a dense layer
FEW, MANY = 2, 20
EXPERTS = 64
EXPERT_WEIGHTS = 3 * HIDDEN * EXPERT_INNER
COMMON: dict[str, Any] = {
    "hidden_size": HIDDEN, "intermediate_size": INNER, "vocab_size": VOCABULARY, "tie_word_embeddings": True,
    "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 64, "rms_norm_eps": 1e-6, "rope_theta": 1e4,
    "max_position_embeddings": 64,
}  # fmt: skip
MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": EXPERT_INNER, "norm_topk_prob": True}


def make(folder: Path, layers: int, experts: int) -> Path:
    """A random model in bf16, llama or Qwen3-MoE; returns its folder."""
    torch.manual_seed(0)
    ones, tensors = torch.ones(HIDDEN, dtype=torch.bfloat16), {}

    def linear(name: str, rows: int, columns: int) -> None:
        tensors[f"{name}.weight"] = (0.05 * torch.randn(rows, columns)).bfloat16()

    for layer in range(layers):
        prefix = LAYER.format(layer)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{name}.weight"] = ones.clone()
        for name in "qkvo":
            linear(f"{prefix}self_attn.{name}_proj", HIDDEN, HIDDEN)
        mlps = [f"mlp.experts.{expert}." for expert in range(experts)] or ["mlp."]
        for mlp in mlps:
            inner = EXPERT_INNER if experts else INNER
            linear(f"{prefix}{mlp}gate_proj", inner, HIDDEN)
            linear(f"{prefix}{mlp}up_proj", inner, HIDDEN)
            linear(f"{prefix}{mlp}down_proj", HIDDEN, inner)
        if experts:
            linear(f"{prefix}mlp.gate", experts, HIDDEN)
            for name in ("q_norm", "k_norm"):
                tensors[f"{prefix}self_attn.{name}.weight"] = torch.ones(64, dtype=torch.bfloat16)
    tensors |= {EMBEDDING: torch.randn(VOCABULARY, HIDDEN).bfloat16(), NORM: ones.clone()}
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    kind = {"model_type": "qwen3_moe", "num_experts": experts, **MOE} if experts else {"model_type": "llama"}
    write_json(folder / CONFIG, {**COMMON, **kind, "num_hidden_layers": layers})
    return folder


def peak(model: Path) -> int:
    """Bytes more than before, at most, while the job quantises it."""
    ids = torch.randint(VOCABULARY, (4, 16), generator=torch.Generator().manual_seed(0))
    config = JobConfig(scheme=Scheme(group_size=64), range="minmax")
    out = model.with_name(f"{model.name}-int4")
    return peak_extra_bytes(lambda: quantize_checkpoint(model, out, config, calibration=ids))


def main(folder: Path) -> None:
    few, many = make(folder / "few", FEW, 0), make(folder / "many", MANY, 0)
    mixture = make(folder / "mixture", 1, EXPERTS)
    warm = make(folder / "warm", 1, 2)  # what is loaded at first use
    peak(warm)
    found = {"few": peak(few), "many": peak(many), "mixture": peak(mixture)}
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
