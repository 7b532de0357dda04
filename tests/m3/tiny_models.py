"""Tiny random checkpoints made by transformers: the independent reference of the model tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

SMALL: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "attn_implementation": "eager",
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
WIDE = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "head_dim": 32,
    "vocab_size": 128,
}  # sizes that vLLM serves on a CPU
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-untied-bias": ("Llama", {"tie_word_embeddings": False, "attention_bias": True}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "llama-rope-llama3": ("Llama", {"rope_parameters": LLAMA3_ROPE}),
    "llama-rope-linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "llama-one-kv-head": ("Llama", {"num_key_value_heads": 1}),
    "qwen2": ("Qwen2", {"head_dim": 16}),
    "qwen3": ("Qwen3", {}),
    "qwen3_moe": ("Qwen3Moe", {**EXPERTS, "norm_topk_prob": True}),
    "qwen3_moe-no-rescale": ("Qwen3Moe", {**EXPERTS, "norm_topk_prob": False}),
    "qwen3_moe-one-dense-layer": ("Qwen3Moe", {**EXPERTS, "mlp_only_layers": [1]}),
    "qwen3_moe-all-experts": ("Qwen3Moe", {**EXPERTS, "num_experts_per_tok": 6}),  # nothing to choose: no routing flips
    "llama-wide": ("Llama", WIDE),
    "qwen2-wide": ("Qwen2", WIDE),
    "qwen3_moe-wide": ("Qwen3Moe", {**EXPERTS, **WIDE, "moe_intermediate_size": 64, "norm_topk_prob": True}),
    "qwen3_moe-every-other": ("Qwen3Moe", {**EXPERTS, "decoder_sparse_step": 2}),
}


def make_checkpoint(folder: Path, family: str) -> torch.nn.Module:
    """Write a random model of this family to ``folder``; returns transformers' own model in fp32."""
    import transformers

    name, changes = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**SMALL, **changes})
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("bias") or "norm" in key:  # transformers starts them at 0 and 1: a test would see no error
                parameter.uniform_(0.5, 1.5)
    model.save_pretrained(folder)
    return model
