"""Write a Decoder as a Hugging Face checkpoint: INT4 linears in GPTQ form, everything else as it was.

Fused linears go back to their own names (q_proj, k_proj, ...), so that vLLM, transformers with gptqmodel, and
m3.models.loader read the result. GPTQ wants in and out features in multiples of 8, and vLLM a group size that divides
every width.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from m3.checkpoint import SHARD_BYTES, read_json, write_checkpoint
from m3.models.decoder import Concat, Decoder, Experts, Moe, RMSNorm
from m3.models.int4_experts import Int4Experts
from m3.models.int4_linear import Int4Linear
from m3.models.loader import EMBEDDING, HEAD, LAYER, NORM, attention_parts, mlp_parts
from m3kernels import __version__
from m3kernels.checks import refuse
from m3kernels.int4 import Int4Weight
from m3kernels.int4.convert import to_gptq

COMPANIONS = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"),
    *("generation_config.json", "vocab.json", "merges.txt", "added_tokens.json"),
)


def export_model(
    model: Decoder,
    folder: str | Path,
    source: str | Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write ``model`` to ``folder``.

    Args:
        folder: made if it is not there; files of an earlier export are replaced.
        source: the checkpoint that the model came from: its config.json is amended, its tokenizer files are copied.
        dtype: what unquantised tensors are stored in.
        shard_bytes: a file is at most this large.
    Raises:
        ValueError: INT4 linears that GPTQ form cannot hold, or of more than one group size; names the layer.
    """
    folder, source = Path(folder), Path(source)
    exporter = _Exporter(model, dtype)
    tensors = dict(exporter.tensors())
    config = read_json(source / "config.json")
    for key in ("quantization_config", "compression_config", "dtype"):
        config.pop(key, None)
    config["torch_dtype"] = str(dtype).removeprefix("torch.")
    if exporter.int4:
        config["quantization_config"] = exporter.quantization_config()
    if isinstance(model.head, Int4Linear):
        config["tie_word_embeddings"] = False
    folder.mkdir(parents=True, exist_ok=True)
    for stale in (*folder.glob("*.safetensors"), *folder.glob("*.safetensors.index.json")):
        stale.unlink()
    write_checkpoint(folder, config, tensors, shard_bytes=shard_bytes)
    for name in COMPANIONS:
        if (source / name).is_file() and source.resolve() != folder.resolve():
            shutil.copyfile(source / name, folder / name)


class _Exporter:
    def __init__(self, model: Decoder, dtype: torch.dtype) -> None:
        self.model, self.dtype = model, dtype
        self.int4 = [module for module in model.modules() if isinstance(module, (Int4Linear, Int4Experts))]
        self.weights = [weight for module in self.int4 for weight in packed_weights(module)]
        self.version = self._version()

    def _version(self) -> int:
        """GPTQ v1, which everyone reads, unless a zero point of 0 needs v2."""
        return (
            2
            if any(weight.zeros is not None and bool((weight.unpack()[2] == 0).any()) for weight in self.weights)
            else 1
        )

    def quantization_config(self) -> dict[str, Any]:
        group_sizes = {weight.group_size for weight in self.weights}
        if len(group_sizes) != 1:
            raise refuse("export_model", "model", "one group size in all INT4 linears", f"{sorted(group_sizes)}")
        return quantization_config(
            group_size=group_sizes.pop(),
            symmetric=all(weight.symmetric for weight in self.weights),
            act_order=any(weight.perm is not None for weight in self.weights),
            head=isinstance(self.model.head, Int4Linear),
            version=self.version,
        )

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        model, config = self.model, self.model.config
        yield EMBEDDING, self.dense(model.embedding)
        for index, layer in enumerate(model.blocks):
            prefix = LAYER.format(index)
            yield f"{prefix}input_layernorm.weight", self.dense(layer.attention_norm.weight)
            yield f"{prefix}post_attention_layernorm.weight", self.dense(layer.mlp_norm.weight)
            attention, mlp = layer.attention, layer.mlp
            for name, norm in (("q_norm", attention.q_norm), ("k_norm", attention.k_norm)):
                if isinstance(norm, RMSNorm):
                    yield f"{prefix}self_attn.{name}.weight", self.dense(norm.weight)
            yield from self.linear(prefix, attention_parts(config), attention.qkv)
            yield from self.linear(prefix, [("self_attn.o_proj", config.hidden_size)], attention.o)
            if isinstance(mlp, Moe):
                yield from self.linear(prefix, [("mlp.gate", config.num_experts)], mlp.router)
                yield from self.experts(f"{prefix}mlp.experts.", mlp.experts)
            else:
                yield from self.linear(prefix, mlp_parts(config), mlp.gate_up)
                yield from self.linear(prefix, [("mlp.down_proj", config.hidden_size)], mlp.down)
        yield NORM, self.dense(model.norm.weight)
        if not (isinstance(model.head, nn.Linear) and model.head.weight.data_ptr() == model.embedding.data_ptr()):
            yield from self.linear("", [(HEAD, config.vocab_size)], model.head)

    def dense(self, tensor: Tensor) -> Tensor:
        return tensor.detach().to(self.dtype)

    def linear(self, prefix: str, parts: list[tuple[str, int]], module: nn.Module) -> Iterator[tuple[str, Tensor]]:
        if isinstance(module, Concat):
            for part, one in zip(parts, module.parts, strict=True):
                yield from self.linear(prefix, [part], one)
            return
        bias = module.bias
        start = 0
        for name, rows in parts:
            if isinstance(module, Int4Linear):
                yield from self.packed(prefix + name, module.weight.int4, start, rows)
            elif isinstance(module, nn.Linear):
                yield f"{prefix}{name}.weight", self.dense(module.weight[start : start + rows])
            if isinstance(bias, Tensor):
                yield f"{prefix}{name}.bias", self.dense(bias[start : start + rows])
            start += rows

    def packed(self, name: str, weight: Int4Weight, start: int, rows: int) -> Iterator[tuple[str, Tensor]]:
        try:
            tensors = to_gptq(weight.slice_out(start, start + rows), version=self.version)
        except ValueError as error:
            raise ValueError(f"export_model: {name}: {error}") from error
        for key, tensor in tensors.items():
            yield f"{name}.{key}", tensor

    def experts(self, prefix: str, experts: nn.Module) -> Iterator[tuple[str, Tensor]]:
        inner, hidden = self.model.config.moe_intermediate_size, self.model.config.hidden_size
        rows = (("gate_proj", 0, inner), ("up_proj", inner, inner))
        for expert in range(self.model.config.num_experts):
            if isinstance(experts, Int4Experts):
                for name, start, count in rows:
                    yield from self.packed(f"{prefix}{expert}.{name}", experts.w13.int4.expert(expert), start, count)
                yield from self.packed(f"{prefix}{expert}.down_proj", experts.w2.int4.expert(expert), 0, hidden)
            elif isinstance(experts, Experts):
                for name, start, count in rows:
                    yield f"{prefix}{expert}.{name}.weight", self.dense(experts.w13[expert, start : start + count])
                yield f"{prefix}{expert}.down_proj.weight", self.dense(experts.w2[expert])


def packed_weights(module: Int4Linear | Int4Experts) -> list[Int4Weight]:
    """The Int4Weights of a module."""
    return [module.weight.int4] if isinstance(module, Int4Linear) else [module.w13.int4, module.w2.int4]


def quantization_config(
    *,
    group_size: int,
    symmetric: bool,
    act_order: bool = False,
    head: bool = False,
    version: int = 1,
    damping: float = 0.01,
    left_out: Sequence[str] = (),
    quantised: Sequence[str] = (),
) -> dict[str, Any]:
    """What config.json says about linears in GPTQ form.

    Args:
        left_out: full names of linears in layers that are not quantised. gptqmodel and vLLM look for them as patterns
            under "dynamic", transformers for their names under "modules_to_not_convert".
        quantised: full names of those that are; optimum, with which transformers reads GPTQ form, knows no other list.
    """
    found = {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": group_size,
        "sym": symmetric,
        "desc_act": act_order,
        "checkpoint_format": "gptq" if version == 1 else "gptq_v2",
        "lm_head": head,
        "true_sequential": True,
        "damp_percent": damping,
        "meta": {"quantizer": [f"m3:{__version__}"]},
    }
    if left_out:
        found["dynamic"] = {f"-:^{re.escape(name)}$": {} for name in left_out}
        found["modules_to_not_convert"] = list(left_out)
    if quantised:
        found["modules_in_block_to_quantize"] = [list(quantised)]
    return found
