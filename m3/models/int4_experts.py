"""Int4Experts: the experts of a mixture-of-experts layer, packed in INT4, computed by one op, int4_moe."""

from __future__ import annotations

from torch import Tensor, nn

from m3.models.int4_linear import PackedWeight
from m3kernels.checks import refuse
from m3kernels.int4 import Int4Weight, int4_moe


class Int4Experts(nn.Module):
    """y[t] = sum_j topk_weights[t, j] * W2[e] (silu(G) * U), [G; U] = W13[e] x[t], e = topk_ids[t, j].

    Args:
        w13: stack of E experts (2 I, D): gate rows, then up rows. w2: stack of E experts (D, I).
        activations: mode of int4_moe.
    """

    def __init__(self, w13: Int4Weight, w2: Int4Weight, *, activations: str = "auto") -> None:
        super().__init__()
        for name, weight in (("w13", w13), ("w2", w2)):
            if weight.num_experts is None:
                raise refuse("Int4Experts", name, "an Int4Weight with experts", f"{weight!r}")
        self.w13 = PackedWeight(w13)
        self.w2 = PackedWeight(w2)
        self.activations = activations

    @property
    def num_experts(self) -> int:
        return self.w13.int4.num_experts or 0

    def forward(
        self,
        x: Tensor,  # (T, D)
        topk_ids: Tensor,  # (T, k)
        topk_weights: Tensor,  # (T, k)
    ) -> Tensor:
        return int4_moe(x, self.w13.int4, self.w2.int4, topk_ids, topk_weights, activations=self.activations)

    def extra_repr(self) -> str:
        return f"activations={self.activations}"
