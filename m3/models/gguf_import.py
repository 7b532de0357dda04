"""Read a GGUF file of the Llama family and write it as a Hugging Face checkpoint, so that later steps know one format.

Weights are dequantised in fp32 by the gguf package and rounded once to the stored dtype. llama.cpp keeps the rows of q
and k in the order of interleaved rotary pairs (2i, 2i+1); Hugging Face rotates halves (i, i + d/2): the rows go back.
The byte-level BPE tokenizer is rebuilt from the vocabulary, merges and token types that the file carries.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from m3.checkpoint import write_checkpoint, write_json
from m3kernels.checks import refuse

LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
CONTROL_TOKEN = 3  # gguf token type: a special token, never made from text
# How text is cut before BPE, by the name that llama.cpp gives it. smollm: single digits, then the GPT-2 pattern.
PRE_TOKENIZERS = {
    "smollm": lambda: pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    ),
    "gpt-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
}


def import_gguf(
    path: Path,
    folder: Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Write ``path`` to ``folder`` as config.json, model.safetensors, tokenizer.json and tokenizer_config.json.

    Raises:
        ValueError: an architecture or tokenizer that is not known here; names what was wanted and found.
    """
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    if fields.get("general.architecture") != "llama":
        raise refuse("import_gguf", "general.architecture", "'llama'", fields.get("general.architecture"))
    config = hf_config(fields, dtype, tied=all(tensor.name != "output.weight" for tensor in reader.tensors))
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    tensors: dict[str, Tensor] = {}
    for index, source in enumerate(reader.tensors):
        name, kind = hf_name(source.name)
        weight = torch.from_numpy(np.array(gguf.quants.dequantize(source.data, source.tensor_type)))
        if kind in heads:
            weight = halves_from_pairs(weight, heads[kind])
        tensors[name] = weight.to(dtype)
        progress(index + 1, len(reader.tensors))
    tokenizer = build_tokenizer(fields)
    write_checkpoint(folder, config, tensors)
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", tokenizer_config(fields))


def hf_name(name: str) -> tuple[str, str]:
    """(Hugging Face name, kind of tensor) of a GGUF tensor name."""
    if name in TOP_NAMES:
        return TOP_NAMES[name], name
    block, _, rest = name.removeprefix("blk.").partition(".")
    kind, _, suffix = rest.partition(".")
    if not name.startswith("blk.") or kind not in LAYER_NAMES or suffix != "weight":
        raise refuse("import_gguf", "tensor", "a tensor of a Llama model", name)
    return f"model.layers.{block}.{LAYER_NAMES[kind]}.weight", kind


def halves_from_pairs(weight: Tensor, heads: int) -> Tensor:
    """Rows (heads, d/2, 2) of llama.cpp -> rows (heads, 2, d/2) of Hugging Face."""
    rows = weight.shape[0]
    return weight.reshape(heads, rows // heads // 2, 2, -1).transpose(1, 2).reshape(rows, -1)


def hf_config(fields: dict[str, Any], dtype: torch.dtype, *, tied: bool) -> dict[str, Any]:
    """config.json of a Llama model from GGUF metadata."""
    heads = fields["llama.attention.head_count"]
    rms_eps = fields["llama.attention.layer_norm_rms_epsilon"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "hidden_size": fields["llama.embedding_length"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": fields.get("llama.attention.head_count_kv", heads),
        "head_dim": fields.get("llama.attention.key_length", fields["llama.embedding_length"] // heads),
        "hidden_act": "silu",
        "rms_norm_eps": float(f"{rms_eps:.6g}"),  # stored as fp32: 9.99999975e-06 was 1e-05
        "rope_theta": fields.get("llama.rope.freq_base", 10000.0),
        "max_position_embeddings": fields["llama.context_length"],
        "tie_word_embeddings": tied,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": fields.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": fields.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": fields.get("tokenizer.ggml.padding_token_id"),
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


def build_tokenizer(fields: dict[str, Any]) -> Tokenizer:
    """The byte-level BPE tokenizer of the file."""
    kind, cut = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre")
    if kind != "gpt2" or cut not in PRE_TOKENIZERS:
        raise refuse(
            "import_gguf", "tokenizer", f"gpt2 with pre in {', '.join(PRE_TOKENIZERS)}", f"{kind} with pre {cut!r}"
        )
    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = PRE_TOKENIZERS[cut]()
    tokenizer.decoder = decoders.ByteLevel()
    control = [
        token for token, kind in zip(tokens, fields["tokenizer.ggml.token_type"], strict=True) if kind == CONTROL_TOKEN
    ]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    return tokenizer


def tokenizer_config(fields: dict[str, Any]) -> dict[str, Any]:
    """tokenizer_config.json: the special tokens by role, and the chat template."""
    tokens = fields["tokenizer.ggml.tokens"]
    roles = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {role: fields.get(f"tokenizer.ggml.{key}_token_id") for role, key in roles.items()}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": bool(fields.get("tokenizer.ggml.add_bos_token", False)),
        "clean_up_tokenization_spaces": False,
        "model_max_length": fields["llama.context_length"],
        **{role: tokens[index] for role, index in ids.items() if index is not None},
        **({"chat_template": fields["tokenizer.chat_template"]} if "tokenizer.chat_template" in fields else {}),
    }
