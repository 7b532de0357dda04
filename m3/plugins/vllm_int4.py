"""INT4 linears of vLLM over m3kernels: GPTQ (v1, v2, act-order), AWQ, compressed-tensors, AutoRound.

A linear of vLLM is one or several linears of the checkpoint (q, k, v; gate and up), and on a rank of tensor parallelism
a part of them. Every tensor is taken as it is in the file; when all are there, m3kernels reads them in their format and
this rank's part is cut (m3.plugins.int4_parts). So the formats differ in one function, and scales keep the file's
dtype. A layer is INT4 where the files have its packed tensors, and dense where they have ``.weight``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models.utils import WeightsMapper
from vllm.platforms import current_platform
from vllm.transformers_utils.config import get_safetensors_params_metadata

from m3.models.int4_linear import PackedWeight
from m3.plugins.int4_parts import (
    Layers,
    Parts,
    four_bit_settings,
    is_four_bit,
    joined,
    packed_layers,
    rank_columns,
    rank_rows,
)
from m3.plugins.vllm import METHOD
from m3kernels.checks import refuse
from m3kernels.int4 import int4_gemm


class Int4Config(QuantizationConfig):
    """quantization_config of a checkpoint, and which of its layers are packed."""

    def __init__(self, stored: Mapping[str, Any]) -> None:
        super().__init__()
        self.settings = four_bit_settings(stored)
        self.layers: Layers = {}

    def __repr__(self) -> str:
        return f"Int4Config({self.settings['quant_method']}, {len(self.layers)} linears)"

    @classmethod
    def get_name(cls) -> str:
        return METHOD

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return ["quantize_config.json"]

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Int4Config:
        return cls(config)

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """METHOD for checkpoints that are served here: those of 4 bits, on a CPU or if asked for by name."""
        asked = user_quant == METHOD
        if not asked and (user_quant is not None or not current_platform.is_cpu()):
            return None
        return METHOD if asked or is_four_bit(hf_quant_cfg) else None

    @staticmethod
    def get_checkpoint_weight_mapper() -> WeightsMapper:
        """Nothing is dropped: act-order is served, so ``g_idx`` is read."""
        return WeightsMapper()

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Reads which layers are packed from the headers of the files. Raises ValueError if none is."""
        self.layers = packed_layers(get_safetensors_params_metadata(model_name, revision=revision))

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        self.layers = hf_to_vllm_mapper.apply_dict(self.layers)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        if isinstance(layer, RoutedExperts):
            from m3.plugins.vllm_moe import experts_method

            return experts_method(self, layer, prefix)
        if isinstance(layer, LinearBase):
            names = self.names(prefix)
            packed = [name for name in names if name in self.layers]
            if packed and len(packed) < len(names):
                dense = sorted(set(names) - set(packed))[0]
                raise refuse("checkpoint", dense, f"a packed linear, as {packed[0]}: vLLM joins them", "a dense one")
            return Int4LinearMethod(self, names) if packed else UnquantizedLinearMethod()
        if isinstance(layer, ParallelLMHead) and prefix in self.layers:
            return Int4LinearMethod(self, [prefix])
        return None

    def names(self, prefix: str) -> list[str]:
        """Linears of the checkpoint that vLLM joins into ``prefix``, in its order."""
        parent, _, last = prefix.rpartition(".")
        return [f"{parent}.{name}" if parent else name for name in self.packed_modules_mapping.get(last, [last])]


class Int4LinearMethod(LinearMethodBase):
    """A linear layer whose shards are the linears ``names`` of the checkpoint."""

    def __init__(self, config: Int4Config, names: Sequence[str]) -> None:
        self.config, self.names = config, list(names)

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Empty parameters with the file's names, whose loader gathers what comes."""
        self.columns, self.rows = input_size_per_partition, output_partition_sizes
        if len(self.names) == 1 and len(self.rows) > 1:
            if sum(self.rows) != output_size:
                want = "one linear a shard: rows of several in one tensor cannot be told apart by rank"
                raise refuse("checkpoint", self.names[0], want, f"{len(self.rows)} shards in one")
            self.rows = [output_size]
        parts = Parts(torch.empty(0).device)
        for part, dtype in self.config.layers[self.names[0]].items():
            layer.register_parameter(part, placeholder(dtype, _gather(parts, part)))
        self.parts = parts

    def process_weights_after_loading(self, layer: Any) -> None:
        """From the file's tensors to tiles. Raises ValueError naming the linear that is malformed or cannot be cut."""
        shards: list[Any] = [None] if len(self.names) == 1 else [*range(len(self.names))]
        if set(self.parts.tensors) == set("qkv"):
            shards = list("qkv")
        if set(self.parts.tensors) != set(shards):
            want = f"the linears {', '.join(self.names)}, each its own"
            raise refuse("checkpoint", self.names[0], want, f"shards {sorted(map(str, self.parts.tensors))}")
        weights = []
        for shard, name, rows in zip(shards, self.names, self.rows, strict=True):
            weight = self.parts.take(shard, name, self.config.settings)
            weight = rank_rows(name, weight, rows, layer.tp_rank, layer.tp_size)
            weights.append(rank_columns(name, weight, self.columns, layer.tp_rank))
        for part in self.config.layers[self.names[0]]:
            delattr(layer, part)
        layer.int4 = nn.ModuleList(PackedWeight(weight) for weight in joined(weights))

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if len(layer.int4) == 1:
            return int4_gemm(x, layer.int4[0].int4, bias)
        y = torch.cat([int4_gemm(x, packed.int4) for packed in layer.int4], dim=-1)
        return y if bias is None else y + bias


def placeholder(dtype: torch.dtype, loader: Any) -> nn.Parameter:
    """An empty parameter for vLLM's loaders to find."""
    parameter = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
    parameter.weight_loader = loader  # type: ignore[attr-defined]
    return parameter


def _gather(parts: Parts, part: str) -> Any:
    def load(parameter: nn.Parameter, tensor: Tensor, shard: Any = None) -> None:
        parts.add(shard, part, tensor)

    return load
