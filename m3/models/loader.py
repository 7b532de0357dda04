"""Read a Hugging Face checkpoint into a Decoder: dense, or INT4 in GPTQ, AWQ, compressed-tensors or AutoRound form.

A linear is INT4 if the file has its packed tensors and dense if it has ``.weight``, layer by layer. q, k, v and gate,
up become one linear each where their formats agree, and stay separate (Concat) where they do not. Tied heads share the
embedding's storage.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from m3.checkpoint import FLOATS, Checkpoint
from m3.models.decoder import Attention, Concat, Decoder, DecoderConfig, Experts, Layer, Mlp, Moe, RMSNorm
from m3.models.int4_experts import Int4Experts
from m3.models.int4_linear import Int4Linear, can_concat, concat_out
from m3kernels.checks import refuse
from m3kernels.int4 import Int4Weight
from m3kernels.int4.convert import from_autoround, from_compressed_tensors
from m3kernels.int4.types import SCALE_DTYPES

LAYER = "model.layers.{}."
EMBEDDING, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head"
METHODS = ("gptq", "awq", "auto-round", "compressed-tensors")
Progress = Callable[[int, int], None]  # (layers done, layers in all)


def attention_parts(config: DecoderConfig) -> list[tuple[str, int]]:
    """(name, rows) of what the fused q/k/v linear is made of."""
    kv_rows = config.num_kv_heads * config.head_dim
    q_rows = config.num_heads * config.head_dim
    return [("self_attn.q_proj", q_rows), ("self_attn.k_proj", kv_rows), ("self_attn.v_proj", kv_rows)]


def mlp_parts(config: DecoderConfig) -> list[tuple[str, int]]:
    """(name, rows) of what the fused gate/up linear of a plain MLP is made of."""
    return [("mlp.gate_proj", config.intermediate_size), ("mlp.up_proj", config.intermediate_size)]


def load_model(
    folder: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    activations: str = "auto",
    progress: Progress = lambda done, total: None,
) -> Decoder:
    """The model in ``folder``.

    Args:
        folder: config.json with model.safetensors, or with shards and model.safetensors.index.json.
        dtype: compute dtype; weights that are not INT4 are held in it. fp32 is the fast one on CPUs.
        activations: mode of the INT4 products, as in m3kernels.int4.int4_gemm.
        progress: called after every layer.
    Raises:
        ValueError: a file, key or tensor that is missing or malformed; names it, what was wanted, what came.
    """
    if dtype not in FLOATS:
        raise refuse("load_model", "dtype", "float32, bfloat16 or float16", dtype)
    source = Checkpoint(folder)
    return _Loader(source, DecoderConfig.from_hf(source.config), dtype, activations).model(progress)


class _Loader:
    def __init__(self, source: Checkpoint, config: DecoderConfig, dtype: torch.dtype, activations: str) -> None:
        self.source, self.config, self.dtype, self.activations = source, config, dtype, activations
        self.quantization = read_quantization_config(source.config)

    # -- whole model ------------------------------------------------------------------------------------------------
    def model(self, progress: Progress) -> Decoder:
        config = self.config
        embedding = self.dense(EMBEDDING, (config.vocab_size, config.hidden_size))
        norm = self.norm(NORM, config.hidden_size)
        packed = any(name.startswith(f"{HEAD}.") and name != f"{HEAD}.weight" for name in self.source.names)
        head: nn.Module
        if config.tie_word_embeddings and not packed:
            head = dense_linear(embedding, None)
        else:
            head = self.linear(HEAD, config.vocab_size, config.hidden_size)
        layers = []
        for index in range(config.num_layers):
            layers.append(self.layer(index))
            progress(index + 1, config.num_layers)
        return Decoder(config, embedding, layers, norm, head).eval()

    def layer(self, index: int) -> Layer:
        config, prefix = self.config, LAYER.format(index)
        hidden = config.hidden_size
        norms = None
        if config.qk_norm:
            q_norm, k_norm = (self.norm(f"{prefix}self_attn.{name}_norm.weight", config.head_dim) for name in "qk")
            norms = (q_norm, k_norm)
        qkv = self.fused(prefix, attention_parts(config), hidden)
        o = self.linear(f"{prefix}self_attn.o_proj", hidden, config.num_heads * config.head_dim)
        mlp: Mlp | Moe
        if config.has_experts(index):
            router = self.linear(f"{prefix}mlp.gate", config.num_experts, hidden)
            mlp = Moe(config, router, self.experts(f"{prefix}mlp.experts."))
        else:
            gate_up = self.fused(prefix, mlp_parts(config), hidden)
            mlp = Mlp(gate_up, self.linear(f"{prefix}mlp.down_proj", hidden, config.intermediate_size))
        return Layer(
            self.norm(f"{prefix}input_layernorm.weight", hidden),
            Attention(config, qkv, o, norms),
            self.norm(f"{prefix}post_attention_layernorm.weight", hidden),
            mlp,
        )

    # -- parts --------------------------------------------------------------------------------------------------------
    def dense(self, name: str, shape: tuple[int, ...]) -> Tensor:
        tensor = self.source.get(name, shape, FLOATS)
        return tensor.to(self.dtype) if tensor.dtype != self.dtype else tensor.clone()

    def norm(self, name: str, size: int) -> RMSNorm:
        return RMSNorm(self.dense(name, (size,)), self.config.rms_norm_eps)

    def bias(self, name: str, rows: int) -> Tensor | None:
        return self.dense(f"{name}.bias", (rows,)) if f"{name}.bias" in self.source else None

    def linear(self, name: str, rows: int, columns: int) -> nn.Module:
        return self.fused("", [(name, rows)], columns)

    def fused(self, prefix: str, parts: list[tuple[str, int]], columns: int) -> nn.Module:
        """One linear for all parts if they are all dense, or all INT4 of one format; else a Concat of them."""
        weights = [self.weight(prefix + name, rows, columns) for name, rows in parts]
        biases = [self.bias(prefix + name, rows) for name, rows in parts]
        packed = [weight for weight in weights if isinstance(weight, Int4Weight)]
        dense = [weight for weight in weights if isinstance(weight, Tensor)]
        if (packed and dense) or (packed and not can_concat(packed)):
            return Concat([self.module(weight, bias) for weight, bias in zip(weights, biases, strict=True)])
        bias = None
        if any(part is not None for part in biases):
            zeros = [torch.zeros(rows, dtype=self.dtype) for _, rows in parts]
            bias = torch.cat([zero if part is None else part for part, zero in zip(biases, zeros, strict=True)])
        if len(parts) == 1:
            return self.module(weights[0], bias)
        return self.module(concat_out(packed) if packed else torch.cat(dense), bias)

    def module(self, weight: Tensor | Int4Weight, bias: Tensor | None) -> nn.Module:
        if isinstance(weight, Int4Weight):
            return Int4Linear(weight, bias, activations=self.activations)
        return dense_linear(weight, bias)

    def weight(self, name: str, rows: int, columns: int) -> Tensor | Int4Weight:
        if self.quantization and f"{name}.weight" not in self.source:
            return self.packed(name, rows, columns)
        return self.dense(f"{name}.weight", (rows, columns))

    def packed(self, name: str, rows: int, columns: int) -> Int4Weight:
        get = self.source.get
        words, numbers = (torch.int32,), (torch.int32, torch.int64)
        try:
            if self.quantization["quant_method"] == "compressed-tensors":
                optional = {
                    key: get(f"{name}.{key}", None, numbers)
                    for key in ("weight_zero_point", "weight_g_idx")
                    if f"{name}.{key}" in self.source
                }
                weight = from_compressed_tensors(
                    get(f"{name}.weight_packed", (rows, -(-columns // 8)), words),
                    get(f"{name}.weight_scale", (rows, None), SCALE_DTYPES),
                    get(f"{name}.weight_shape", (2,), numbers),
                    **optional,
                    group_size=self.quantization["group_size"],
                )
            else:
                settings = {**self.quantization, **self.quantization.get("extra_config", {}).get(name, {})}
                along_n = settings["quant_method"] == "awq" or settings.get("packing_format") == "auto_round:auto_awq"
                shape = (columns, -(-rows // 8)) if along_n else (-(-columns // 8), rows)
                tensors = {"qweight": get(f"{name}.qweight", shape, words)}
                tensors["qzeros"] = get(f"{name}.qzeros", (None, -(-rows // 8)), words)
                tensors["scales"] = get(f"{name}.scales", (None, rows), SCALE_DTYPES)
                if f"{name}.g_idx" in self.source:
                    tensors["g_idx"] = get(f"{name}.g_idx", (columns,), numbers)
                weight = from_autoround(tensors, settings)
        except ValueError as error:
            if name in str(error):
                raise
            raise ValueError(f"checkpoint: {self.source.file_of(f'{name}.qweight')}: {name}: {error}") from error
        if (weight.out_features, weight.in_features) != (rows, columns):
            got = f"({weight.out_features}, {weight.in_features})"
            raise refuse(
                "checkpoint", f"{self.source.file_of(f'{name}.qweight')}: {name}", f"a weight ({rows}, {columns})", got
            )
        return weight

    def experts(self, prefix: str) -> nn.Module:
        count, hidden, inner = self.config.num_experts, self.config.hidden_size, self.config.moe_intermediate_size
        if f"{prefix}gate_up_proj" in self.source:
            w13 = self.dense(f"{prefix}gate_up_proj", (count, 2 * inner, hidden))
            return Experts(w13, self.dense(f"{prefix}down_proj", (count, hidden, inner)))
        w13s, w2s = [], []
        for expert in range(count):
            gate, up = (self.weight(f"{prefix}{expert}.{name}_proj", inner, hidden) for name in ("gate", "up"))
            down = self.weight(f"{prefix}{expert}.down_proj", hidden, inner)
            w13s.append(self.pair(f"{prefix}{expert}", gate, up))
            w2s.append(down)
        packed13, packed2 = _all_packed(w13s), _all_packed(w2s)
        if packed13 and packed2:
            try:
                return Int4Experts(Int4Weight.stack(packed13), Int4Weight.stack(packed2), activations=self.activations)
            except ValueError as error:
                raise ValueError(f"checkpoint: {prefix}*: {error}") from error
        dense13, dense2 = _all_dense(w13s), _all_dense(w2s)
        if not dense13 or not dense2:
            raise refuse("checkpoint", f"{prefix}*", "all experts dense or all INT4", "some of each")
        return Experts(torch.stack(dense13), torch.stack(dense2))

    def pair(self, name: str, gate: Tensor | Int4Weight, up: Tensor | Int4Weight) -> Tensor | Int4Weight:
        if isinstance(gate, Int4Weight) and isinstance(up, Int4Weight) and can_concat([gate, up]):
            return concat_out([gate, up])
        if isinstance(gate, Tensor) and isinstance(up, Tensor):
            return torch.cat((gate, up))
        raise refuse("checkpoint", name, "gate_proj and up_proj in one format", f"{gate!r}, {up!r}"[:200])


def _all_packed(weights: Sequence[Tensor | Int4Weight]) -> list[Int4Weight]:
    packed = [weight for weight in weights if isinstance(weight, Int4Weight)]
    return packed if len(packed) == len(weights) else []


def _all_dense(weights: Sequence[Tensor | Int4Weight]) -> list[Tensor]:
    dense = [weight for weight in weights if isinstance(weight, Tensor)]
    return dense if len(dense) == len(weights) else []


def dense_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """An inference nn.Linear over these tensors, nothing allocated or initialised."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear


def read_quantization_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """quantization_config of config.json in the form of m3kernels.int4.convert.from_autoround; {} if there is none.

    Raises ValueError naming the key that is malformed or asks for something other than 4-bit integer weights.
    """
    found = config.get("quantization_config") or config.get("compression_config")
    if found is None:
        return {}
    where = "quantization_config"
    if not isinstance(found, dict):
        raise refuse("config.json", where, "an object", f"{found!r}"[:200])
    method = found.get("quant_method")
    if method not in METHODS:
        raise refuse("config.json", f"{where}: quant_method", " or ".join(METHODS), f"{method!r}"[:200])
    if method == "compressed-tensors":
        return {"quant_method": method, "group_size": _compressed_tensors_group_size(found)}
    extra = found.get("extra_config") or {}
    if not isinstance(extra, dict) or not all(isinstance(value, dict) for value in extra.values()):
        raise refuse("config.json", f"{where}: extra_config", "an object of objects", f"{extra!r}"[:200])
    settings = {**found, "extra_config": extra}
    if method == "gptq":
        settings.setdefault("sym", True)
    if method == "awq":
        settings.pop("sym", None)
        settings.setdefault("zero_point", True)
        settings["bits"] = found.get("bits", found.get("w_bit"))
        settings["group_size"] = found.get("group_size", found.get("q_group_size"))
        if str(found.get("version", "gemm")).lower() != "gemm":
            raise refuse("config.json", f"{where}: version", "'gemm'", f"{found['version']!r}"[:200])
    return settings


def _compressed_tensors_group_size(found: Mapping[str, Any]) -> int:
    where = "quantization_config"
    if found.get("format") != "pack-quantized":
        raise refuse("config.json", f"{where}: format", "'pack-quantized'", f"{found.get('format')!r}"[:200])
    groups = found.get("config_groups")
    found_weights = [
        group.get("weights") if isinstance(group, dict) else None
        for group in (groups.values() if isinstance(groups, dict) else ())
    ]
    weights = [weight for weight in found_weights if isinstance(weight, dict)]
    if not weights or len(weights) != len(found_weights):
        raise refuse("config.json", f"{where}: config_groups", "one or more objects with weights", f"{groups!r}"[:200])
    sizes = set()
    for weight in weights:
        if weight.get("num_bits") != 4 or weight.get("type", "int") != "int":
            raise refuse(
                "config.json", f"{where}: config_groups: weights", "num_bits 4, type 'int'", f"{weight!r}"[:200]
            )
        size = -1 if weight.get("strategy") == "channel" else weight.get("group_size")
        sizes.add(size if isinstance(size, int) else None)
    if len(sizes) != 1 or None in sizes:
        raise refuse("config.json", f"{where}: config_groups: group_size", "one int for all groups", f"{sizes}")
    return int(sizes.pop())  # type: ignore[arg-type]
