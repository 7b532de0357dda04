"""Quantise a Decoder's linears: round to the nearest grid point, the grid from min-max or searched for least error.

Quantised: q, k, v, o, gate, up, down of every layer, and experts. Left out: embedding, norms, the router of a mixture
of experts, and the head unless asked for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor, nn

from m3.models.decoder import Attention, Concat, Decoder, Experts, Layer, Mlp, Moe, RMSNorm
from m3.models.int4_experts import Int4Experts
from m3.models.int4_linear import Int4Linear
from m3kernels.checks import refuse
from m3kernels.int4 import Int4Weight
from m3kernels.int4.quantize import quantize_weight

BF16_BYTES = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoundConfig:
    """How to round.

    group_size: columns that share a scale; -1 or a multiple of 16. 128 need not divide the width here, but vLLM wants
        a divisor. symmetric: zero point 8. method: "minmax" (plain round-to-nearest), "mse"
        (searched for least squared error) or "weighted" (the same, large weights counting more: docs/log.md).
    head: quantise the output head too.
    """

    group_size: int = 128
    symmetric: bool = True
    method: str = "weighted"
    scale_dtype: torch.dtype = torch.float16
    head: bool = False
    activations: str = "auto"


def quantize_model(
    model: Decoder, config: RoundConfig | None = None, progress: Callable[[int, int], None] = lambda done, total: None
) -> Decoder:
    """A Decoder with INT4 linears that shares everything else with ``model``, which stays as it is.

    Raises:
        ValueError: the model already has INT4 linears, or a setting that quantize_weight refuses.
    """
    return _Rounder(config or RoundConfig()).model(model, progress)


class _Rounder:
    def __init__(self, config: RoundConfig) -> None:
        self.config = config

    def weight(self, weight: Tensor) -> Int4Weight:
        config = self.config
        return quantize_weight(
            weight.detach(),
            group_size=config.group_size,
            symmetric=config.symmetric,
            method=config.method,
            scale_dtype=config.scale_dtype,
        )

    def linear(self, module: nn.Module) -> nn.Module:
        if isinstance(module, Concat):
            return Concat([self.linear(part) for part in module.parts])
        if not isinstance(module, nn.Linear):
            raise refuse("quantize_model", "model", "a model that is not quantised yet", type(module).__name__)
        bias = None if module.bias is None else module.bias.detach()
        return Int4Linear(self.weight(module.weight), bias, activations=self.config.activations)

    def experts(self, experts: nn.Module) -> Int4Experts:
        if not isinstance(experts, Experts):
            raise refuse("quantize_model", "model", "a model that is not quantised yet", type(experts).__name__)
        return Int4Experts(self.weight(experts.w13), self.weight(experts.w2), activations=self.config.activations)

    def model(self, model: Decoder, progress: Callable[[int, int], None]) -> Decoder:
        layers = []
        for index, layer in enumerate(model.blocks):
            layers.append(self.layer(model, layer))
            progress(index + 1, len(model.blocks))
        head = self.linear(model.head) if self.config.head else model.head
        return Decoder(model.config, model.embedding, layers, model.norm, head).eval()

    def layer(self, model: Decoder, layer: Layer) -> Layer:
        attention, mlp = layer.attention, layer.mlp
        q_norm, k_norm = attention.q_norm, attention.k_norm
        norms = (q_norm, k_norm) if isinstance(q_norm, RMSNorm) and isinstance(k_norm, RMSNorm) else None
        quantised = Attention(model.config, self.linear(attention.qkv), self.linear(attention.o), norms)
        rounded: Mlp | Moe
        if isinstance(mlp, Moe):
            rounded = Moe(model.config, mlp.router, self.experts(mlp.experts))
        else:
            rounded = Mlp(self.linear(mlp.gate_up), self.linear(mlp.down))
        return Layer(layer.attention_norm, quantised, layer.mlp_norm, rounded)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """Bytes of a model's weights: what is or would be quantised, and the rest (embedding, norms, router, head)."""

    linears: int  # as held; packed tensors with their padding and scales; unquantised ones counted in bf16
    linears_bf16: int  # the same linears in bf16
    rest_bf16: int  # everything else in bf16, a tied head once

    @property
    def ratio(self) -> float:
        """linears / linears_bf16."""
        return self.linears / self.linears_bf16


def sizes(model: Decoder) -> Sizes:
    """Count the bytes of a model; a dense model's linears count in bf16 whatever they are computed in."""
    linears = linears_bf16 = 0
    counted: set[int] = set()
    for layer in model.blocks:
        for name, module in layer.named_modules():
            if isinstance(module, Int4Linear):
                packed = [module.weight.int4]
            elif isinstance(module, Int4Experts):
                packed = [module.w13.int4, module.w2.int4]
            elif isinstance(module, nn.Linear) and not name.endswith("router"):
                linears += module.weight.numel() * BF16_BYTES
                linears_bf16 += module.weight.numel() * BF16_BYTES
                counted.add(id(module.weight))
                continue
            elif isinstance(module, Experts):
                for stack in (module.w13, module.w2):
                    linears += stack.numel() * BF16_BYTES
                    linears_bf16 += stack.numel() * BF16_BYTES
                    counted.add(id(stack))
                continue
            else:
                continue
            for weight in packed:
                linears += weight.nbytes
                linears_bf16 += (weight.num_experts or 1) * weight.out_features * weight.in_features * BF16_BYTES
    rest = {id(tensor): tensor for tensor in model.parameters() if id(tensor) not in counted}
    storages = {tensor.data_ptr(): tensor.numel() for tensor in rest.values()}
    total = sum(storages.values()) * BF16_BYTES
    if isinstance(model.head, Int4Linear):
        total += model.head.weight.int4.nbytes
    return Sizes(linears=linears, linears_bf16=linears_bf16, rest_bf16=total)
