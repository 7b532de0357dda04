"""Draft checkpoints as other projects write them, by hand: they share no table of names or shapes with the code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from m3.checkpoint import write_checkpoint
from m3.draft.layouts import load_draft
from m3.models.decoder import DecoderConfig, RopeConfig
from m3.models.gated_eagle3 import GatedEagle3, GatedEagle3Config

H, H_T, V, V_D, HEADS, KV_HEADS, HEAD_DIM, INNER, LAYERS = 20, 20, 37, 11, 4, 2, 6, 28, 30
IDS = "eagle_aux_hidden_state_layer_ids"
ATTENTION = "layers.0.self_attn."
DRAFT_IDS = [0, 1, 2, 5, 8, 9, 13, 20, 21, 30, 36]  # target ids of the draft's vocabulary
TARGET = DecoderConfig.from_hf(
    {
        "model_type": "llama",
        "vocab_size": V,
        "hidden_size": H_T,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 5,
    }
)
CONFIG = GatedEagle3Config(
    hidden_size=H,
    target_hidden_size=H_T,
    intermediate_size=INNER,
    num_heads=HEADS,
    num_kv_heads=KV_HEADS,
    head_dim=HEAD_DIM,
    vocab_size=V,
    draft_vocab_size=V_D,
    rms_norm_eps=1e-5,
    rope=RopeConfig(theta=500000.0),
    gate="none",
    aux_layers=(2, 15, 27),
    max_position_embeddings=128,
)
LLAMA3 = RopeConfig(
    theta=5e5,
    kind="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def vocabulary() -> dict[str, Tensor]:
    ids = torch.tensor(DRAFT_IDS)
    return {"d2t": ids - torch.arange(V_D), "t2d": torch.zeros(V, dtype=torch.bool).index_fill_(0, ids, True)}


def stock_tensors(layer: str = "midlayer.") -> dict[str, Tensor]:
    """An ungated draft as SpecForge writes it."""
    attention, mlp = f"{layer}self_attn.", f"{layer}mlp."
    tensors = {
        "fc.weight": draw(H, 3 * H_T, seed=1),
        f"{layer}hidden_norm.weight": draw(H, seed=2),
        f"{layer}input_layernorm.weight": draw(H, seed=3),
        f"{layer}post_attention_layernorm.weight": draw(H, seed=4),
        f"{attention}q_proj.weight": draw(HEADS * HEAD_DIM, 2 * H, seed=5),
        f"{attention}k_proj.weight": draw(KV_HEADS * HEAD_DIM, 2 * H, seed=6),
        f"{attention}v_proj.weight": draw(KV_HEADS * HEAD_DIM, 2 * H, seed=7),
        f"{attention}o_proj.weight": draw(H, HEADS * HEAD_DIM, seed=8),
        f"{mlp}gate_proj.weight": draw(INNER, H, seed=9),
        f"{mlp}up_proj.weight": draw(INNER, H, seed=10),
        f"{mlp}down_proj.weight": draw(H, INNER, seed=11),
        "norm.weight": draw(H, seed=12),
        "lm_head.weight": draw(V_D, H, seed=13),
    }
    return {**tensors, **vocabulary()}


def stock_config() -> dict[str, Any]:
    """config.json of SpecForge: ids [1, 14, 26] are hidden states after 2, 15 and 27 layers."""
    return {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "eagle_config": {IDS: [1, 14, 26], "use_aux_hidden_state": True},
        "hidden_size": H,
        "intermediate_size": INNER,
        "num_hidden_layers": 1,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "vocab_size": V,
        "draft_vocab_size": V_D,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 128,
        "rope_theta": 500000.0,
        "rope_scaling": None,
        "attention_bias": False,
        "tie_word_embeddings": False,
    }


def vllm_config() -> dict[str, Any]:
    config = stock_config()
    del config["eagle_config"]
    return {**config, IDS: [2, 15, 27]}


def speculators_config() -> dict[str, Any]:
    layer = stock_config()
    for key in ("architectures", "eagle_config", "draft_vocab_size"):
        del layer[key]
    return {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "speculators_config": {
            "algorithm": "eagle3",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": 3}],
            "verifier": {"name_or_path": "target", "architectures": ["LlamaForCausalLM"]},
        },
        "transformer_layer_config": layer,
        "draft_vocab_size": V_D,
        IDS: [2, 15, 27],
        "norm_before_residual": False,
    }


CONFIGS = {"specforge": stock_config, "vllm": vllm_config, "speculators": speculators_config}


def write(folder: Path, config: dict[str, Any] | None = None, **changes: Tensor | None) -> Path:
    """A stock draft in ``folder``; changes by canonical name, dots as double underscores, None removes."""
    tensors = {name.replace("midlayer.", "layers.0."): tensor for name, tensor in stock_tensors().items()}
    for key, tensor in changes.items():
        name = key.replace("__", ".")
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor
    write_checkpoint(folder, stock_config() if config is None else config, tensors)
    return folder


def refused(folder: Path, message: str, **options: Any) -> None:
    with pytest.raises(ValueError, match=message):
        load_draft(folder, TARGET, **options)


def state_of(
    config: GatedEagle3Config, dtype: torch.dtype = torch.float32, own_embedding: bool = False
) -> dict[str, Tensor]:
    draft = GatedEagle3(config, torch.zeros(config.vocab_size, config.hidden_size))
    draft.set_vocabulary(torch.tensor(DRAFT_IDS) if config.draft_vocab_size == V_D else torch.arange(config.vocab_size))
    state = draft.state_dict()
    for index, (name, tensor) in enumerate(state.items()):
        if tensor.is_floating_point():
            state[name] = (draw(*tensor.shape, seed=index) / tensor.shape[-1] ** 0.5).to(dtype)
    return (
        {**state, "embed_tokens.weight": draw(V, config.hidden_size, seed=99, dtype=dtype)} if own_embedding else state
    )
