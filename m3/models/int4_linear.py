"""Int4Linear: y = x W^T + b with W packed in INT4 (m3kernels.int4). PackedWeight: an Int4Weight as module buffers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from m3kernels.checks import refuse
from m3kernels.int4 import Int4Weight, int4_gemm
from m3kernels.int4.quantize import quantize_weight
from m3kernels.int4.types import TILE_N

TENSORS = ("qweight", "scales", "zeros", "perm")


class PackedWeight(nn.Module):
    """Holds an Int4Weight (``int4``); its tensors are buffers, so they move with the model and are in its state_dict.

    ``.to(dtype)`` leaves it alone: packed weights have no compute dtype, and scales keep theirs.
    """

    def __init__(self, int4: Int4Weight) -> None:
        super().__init__()
        self._hold(int4)

    def _hold(self, int4: Int4Weight) -> None:
        self.int4 = int4
        for name in TENSORS:
            self.register_buffer(name, getattr(int4, name))
        self.register_buffer("meta", int4.state_dict()["meta"], persistent=True)

    def _apply(self, fn: Any, recurse: bool = True) -> PackedWeight:
        self._hold(self.int4.to(fn(self.int4.qweight).device))
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Takes any Int4Weight of the same out and in features: group size and symmetry come with the tensors."""
        int4 = Int4Weight.from_state_dict(state_dict, prefix)
        want = (self.int4.num_experts, self.int4.out_features, self.int4.in_features)
        got = (int4.num_experts, int4.out_features, int4.in_features)
        if got != want:
            raise refuse("load_state_dict", prefix + "meta", f"experts, out, in = {want}", f"{got}")
        self._hold(int4.to(self.int4.device))

    def extra_repr(self) -> str:
        return repr(self.int4)


class Int4Linear(nn.Module):
    """Drop-in for an inference nn.Linear.

    Args:
        weight: plain Int4Weight (N, K).
        bias: (N,) or None.
        activations: mode of m3kernels.int4.int4_gemm: "auto", "exact", "int16", "int8".
    """

    bias: Tensor | None

    def __init__(self, weight: Int4Weight, bias: Tensor | None = None, *, activations: str = "auto") -> None:
        super().__init__()
        if weight.num_experts is not None:
            raise refuse("Int4Linear", "weight", "an Int4Weight without experts", f"{weight!r}")
        self.weight = PackedWeight(weight)
        self.register_buffer("bias", bias)
        self.activations = activations

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        group_size: int = 128,
        symmetric: bool = True,
        method: str = "weighted",
        scale_dtype: torch.dtype = torch.float16,
        activations: str = "auto",
    ) -> Int4Linear:
        """Round a linear to INT4; arguments as in m3kernels.int4.quantize.quantize_weight."""
        int4 = quantize_weight(
            linear.weight.detach(), group_size=group_size, symmetric=symmetric, method=method, scale_dtype=scale_dtype
        )
        bias = None if linear.bias is None else linear.bias.detach()
        return cls(int4, bias, activations=activations)

    @property
    def in_features(self) -> int:
        return self.weight.int4.in_features

    @property
    def out_features(self) -> int:
        return self.weight.int4.out_features

    def forward(self, x: Tensor) -> Tensor:
        return int4_gemm(x, self.weight.int4, self.bias, activations=self.activations)

    def extra_repr(self) -> str:
        return f"activations={self.activations}"


def can_concat(weights: Sequence[Int4Weight]) -> bool:
    """Whether the rows of these weights can be stacked into one: same K, groups, symmetry, scale dtype, permutation."""
    first = weights[0]

    def facts(weight: Int4Weight) -> tuple[object, ...]:
        numbers = (weight.num_experts, weight.in_features, weight.group_size, weight.first_k)
        return (*numbers, weight.symmetric, weight.scales.dtype, weight.device, weight.perm is None)

    return all(
        facts(weight) == facts(first)
        and (first.perm is None or (weight.perm is not None and torch.equal(weight.perm, first.perm)))
        for weight in weights
    )


def concat_out(weights: Sequence[Int4Weight]) -> Int4Weight:
    """One weight with the rows of all, in order (fused q/k/v, gate/up). Raises ValueError unless can_concat."""
    if not can_concat(weights):
        raise refuse("concat_out", "weights", "the same K, groups, symmetry, scale dtype and perm", f"{list(weights)}")
    first = weights[0]
    rows = sum(weight.out_features for weight in weights)
    if all(weight.out_features % TILE_N == 0 for weight in weights):  # whole tiles: nothing is repacked
        qweight = torch.cat([weight.qweight for weight in weights], dim=-3)
        scales = torch.cat([weight.scales for weight in weights], dim=-3)
        zeros = None if first.zeros is None else torch.cat([w.zeros for w in weights if w.zeros is not None], dim=-3)
        return Int4Weight(
            qweight=qweight,
            scales=scales,
            zeros=zeros,
            perm=first.perm,
            out_features=rows,
            in_features=first.in_features,
            group_size=first.group_size,
            first_k=first.first_k,
        )
    if first.first_k:
        raise refuse(
            "concat_out", "weights", "whole tiles (N a multiple of 64) for a slice along K", f"{list(weights)}"
        )
    parts = [weight.unpack() for weight in weights]
    q, scales, zeros = (torch.cat(tensors, dim=-2) for tensors in zip(*parts, strict=True))
    return Int4Weight.pack(q, scales, None if first.symmetric else zeros, group_size=first.group_size, perm=first.perm)
