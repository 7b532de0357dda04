"""INT4 linears of vLLM over m3kernels.

A linear of vLLM is one or several linears of the checkpoint (q, k, v; gate and up), and on a rank of tensor parallelism
a part of them. Every tensor is taken as it is in the file; when all are there, m3kernels reads them in their format and
this rank's part is cut (m3.plugins.int4_parts). So the formats differ in one function, and scales keep the file's
dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearMethodBase

from m3.models.int4_linear import PackedWeight
from m3.plugins.int4_parts import Parts, joined, rank_columns, rank_rows
from m3.plugins.vllm_int4 import Int4Config
from m3kernels.checks import refuse
from m3kernels.int4 import int4_gemm


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
