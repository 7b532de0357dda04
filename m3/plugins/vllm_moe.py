"""INT4 experts of vLLM: one ``int4_moe`` of m3kernels a layer, for the formats of m3.plugins.vllm_int4.

Expert parallelism keeps this rank's experts and gives the rows of others the weight 0. Tensor parallelism cuts the
intermediate size. Refused: another activation than SiLU with a gate, router weights on the input, clamped gates,
biases of experts, experts that are packed in part.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

from m3.models.int4_linear import PackedWeight
from m3.plugins.int4_parts import Parts, joined, rank_columns, rank_rows
from m3.plugins.vllm_int4 import Int4Config
from m3.plugins.vllm_linear import placeholder
from m3kernels.checks import refuse
from m3kernels.int4 import Int4Weight, int4_moe

SHARDS = ("w1", "w3", "w2")  # vLLM's words for gate, up and down


def experts_method(config: Int4Config, layer: RoutedExperts, prefix: str) -> FusedMoEMethodBase:
    """Ours if the checkpoint's experts under ``prefix`` are packed, else vLLM's dense one."""
    stem = prefix.removesuffix(".routed_experts") + "."
    packed = [name for name in config.layers if name.startswith(stem)]
    if not packed:
        return UnquantizedFusedMoEMethod(layer.moe_config)
    parts = {tuple(sorted(config.layers[name])) for name in packed}
    if len(parts) > 1:
        raise refuse("checkpoint", prefix, "the same packed tensors of every expert", sorted(parts))
    return Int4MoeMethod(config, layer, stem, packed[0])


class Int4MoeMethod(FusedMoEMethodBase):
    """The experts of one layer."""

    def __init__(self, config: Int4Config, layer: RoutedExperts, stem: str, example: str) -> None:
        super().__init__(layer.moe_config)
        self.config, self.stem, self.stored = config, stem, config.layers[example]
        facts = {
            "activation": (layer.activation, MoEActivation.SILU),
            "apply_router_weight_on_input": (layer.apply_router_weight_on_input, False),
            "swiglu_limit": (layer.swiglu_limit, None),
            "has_bias": (layer.moe_config.has_bias, False),
        }
        for name, (got, want) in facts.items():
            if got != want:
                raise refuse("int4_moe", f"{stem}{name}", want, got)

    def create_weights(
        self,
        layer: nn.Module,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Empty parameters with the names that vLLM gives the experts' tensors, whose loader gathers what comes."""
        self.experts, self.inner = num_experts, intermediate_size_per_partition
        self.parts = Parts(torch.empty(0).device)
        for part, dtype in self.stored.items():
            for kind in ("w13", "w2"):
                layer.register_parameter(f"{kind}_{part}", placeholder(dtype, self.gather(layer, part)))

    def gather(self, layer: Any, part: str) -> Any:
        def load(
            param: nn.Parameter,
            loaded_weight: Tensor,
            weight_name: str,
            shard_id: str,
            expert_id: int,
            return_success: bool = False,
        ) -> bool | None:
            local = layer._map_global_expert_id_to_local_expert_id(expert_id)
            if local != -1:
                self.parts.add((local, shard_id), part, loaded_weight)
            return local != -1 if return_success else None

        return load

    def process_weights_after_loading(self, layer: Any) -> None:
        """From the files' tensors to two stacks of tiles. Raises ValueError naming what is missing or differs."""
        rank, ranks = self.moe.moe_parallel_config.tp_rank, self.moe.moe_parallel_config.tp_size
        pairs, downs = [], []
        for expert in range(self.experts):
            name = f"{self.stem}{expert}"
            gate, up, down = (self.parts.take((expert, shard), name, self.config.settings) for shard in SHARDS)
            pair = joined([rank_rows(name, weight, self.inner, rank, ranks) for weight in (gate, up)])
            if len(pair) != 1:
                raise refuse("checkpoint", name, f"up_proj in the form of gate_proj, {gate!r}", f"{up!r}")
            pairs.append(pair[0])
            downs.append(rank_columns(name, down, self.inner, rank))
        for part in self.stored:
            for kind in ("w13", "w2"):
                delattr(layer, f"{kind}_{part}")
        try:
            layer.w13, layer.w2 = (PackedWeight(Int4Weight.stack(weights)) for weights in (pairs, downs))
        except ValueError as error:
            raise ValueError(f"checkpoint: {self.stem}*: {error}") from error

    def get_fused_moe_quant_config(self, layer: nn.Module) -> None:
        return None

    def apply(
        self,
        layer: Any,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any,
        shared_experts_input: Tensor | None,
    ) -> Tensor:
        if layer.expert_map is not None:
            topk_ids = layer.expert_map[topk_ids.long()]
            topk_weights = topk_weights.masked_fill(topk_ids < 0, 0)
            topk_ids = topk_ids.clamp_min(0)
        return int4_moe(x, layer.w13.int4, layer.w2.int4, topk_ids, topk_weights)
