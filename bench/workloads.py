"""Named shapes of real models: what the benchmarks run on.

Sources: the config.json of HuggingFaceTB/SmolLM2-135M-Instruct (hidden 576, intermediate 1536, 9/3 heads of 64),
Qwen/Qwen3-8B (4096, 12288, 32/8 heads of 128) and Qwen/Qwen3-235B-A22B (4096, experts of 1536, 64/4 heads of 128, 128
experts, top 8).
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from m3kernels.int4 import Int4Weight, int4_dequantize
from m3kernels.int4.reference import make_inputs
from m3kernels.int4.types import TILE_N, in_huge_pages


@dataclasses.dataclass(frozen=True, kw_only=True)
class Linear:
    """y (M, N) = x (M, K) @ W (N, K).T, W in INT4 with groups of group_size columns."""

    name: str
    n: int
    k: int
    group_size: int = 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experts:
    """A mixture-of-experts layer: E experts, hidden D, intermediate I, k experts per token."""

    name: str
    experts: int
    hidden: int
    intermediate: int
    topk: int
    group_size: int = 128


LINEARS = {
    linear.name: linear
    for linear in (
        Linear(name="4096x4096", n=4096, k=4096),
        Linear(name="4096x12288", n=12288, k=4096),
        Linear(name="smollm2-135m.qkv", n=960, k=576, group_size=64),
        Linear(name="smollm2-135m.o", n=576, k=576, group_size=64),
        Linear(name="smollm2-135m.gate_up", n=3072, k=576, group_size=64),
        Linear(name="smollm2-135m.down", n=576, k=1536, group_size=64),
        Linear(name="qwen3-8b.qkv", n=6144, k=4096),
        Linear(name="qwen3-8b.o", n=4096, k=4096),
        Linear(name="qwen3-8b.gate_up", n=24576, k=4096),
        Linear(name="qwen3-8b.down", n=4096, k=12288),
        Linear(name="qwen3-235b-a22b.qkv", n=9216, k=4096),
        Linear(name="qwen3-235b-a22b.o", n=4096, k=8192),
        Linear(name="qwen3-235b-a22b.expert_w13", n=3072, k=4096),
        Linear(name="qwen3-235b-a22b.expert_w2", n=4096, k=1536),
        Linear(name="qwen3-235b-a22b.expert_w2_tp8", n=4096, k=192),
    )
}

# Expert parallelism over 8 (16) devices leaves 16 (8) of the 128 experts on each; all of a token's 8 experts are taken
# from those, so a token costs what it costs on the whole layer.
EXPERTS = {
    experts.name: experts
    for experts in (
        Experts(name="qwen3-235b-a22b.moe_ep8", experts=16, hidden=4096, intermediate=1536, topk=8),
        Experts(name="qwen3-235b-a22b.moe", experts=128, hidden=4096, intermediate=1536, topk=8),
    )
}

PRESETS = {
    "acceptance": ("4096x4096", "4096x12288"),
    "smollm2": tuple(name for name in LINEARS if name.startswith("smollm2")),
    "qwen3-8b": tuple(name for name in LINEARS if name.startswith("qwen3-8b")),
    "qwen3-235b": (*(name for name in LINEARS if name.startswith("qwen3-235b")), "qwen3-235b-a22b.moe_ep8"),
    "default": (
        "4096x4096",
        "4096x12288",
        "smollm2-135m.gate_up",
        "smollm2-135m.down",
        "qwen3-8b.qkv",
        "qwen3-8b.down",
        "qwen3-235b-a22b.expert_w13",
        "qwen3-235b-a22b.expert_w2",
        "qwen3-235b-a22b.moe_ep8",
    ),
}


def find(name: str) -> Linear | Experts:
    """The shape of that name. Raises ValueError with the known names."""
    known = {**LINEARS, **EXPERTS}
    if name not in known:
        raise ValueError(f"bench: shape: want one of {', '.join(known)}; got {name!r}")
    return known[name]


# -- inputs -----------------------------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """What every arm computes: x (M, K) times one INT4 weight, in as many different copies as asked for.

    Copy i is the weight with its rows rotated down by 64 * i: other memory and other content, the same result rotated.
    """

    linear: Linear
    x: Tensor  # (largest M, K) fp32
    weight: Int4Weight  # copy 0
    q: Tensor  # (N, K) uint8
    scales: Tensor  # (N, G) fp16
    zeros: Tensor  # (N, G) uint8, all 8 if symmetric
    dense: Tensor  # (N, K) fp32, exact
    expected: Tensor  # (largest M, N) fp64

    @property
    def symmetric(self) -> bool:
        return self.weight.symmetric

    @property
    def weight_bytes(self) -> int:
        """Of one packed copy, scales (fp16) and zeros (uint8) included."""
        return self.weight.nbytes

    def packed(self, copy: int) -> Int4Weight:
        """Copy i as Int4Weight, its tensors placed in memory as Int4Weight.pack places them."""

        def rolled(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else in_huge_pages(tensor.roll(copy, 0))

        tensors = {name: rolled(getattr(self.weight, name)) for name in ("qweight", "scales", "zeros")}
        return dataclasses.replace(self.weight, **tensors)

    def rows(self, tensor: Tensor, copy: int) -> Tensor:
        """One of q, scales, zeros, dense as copy i has it, contiguous and in its own memory."""
        return tensor.roll(TILE_N * copy, 0)

    def result(self, m: int, copy: int) -> Tensor:
        """(m, N) fp64: what an arm must give for the first m rows of x."""
        return self.expected[:m].roll(TILE_N * copy, 1)


def make_problem(
    linear: Linear,
    rows: int,
    *,
    symmetric: bool = True,
    seed: int = 0,
    x_dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Problem:
    """Gaussian x, uniform nibbles, spread fp16 scales; zeros in 0..15, which every format can hold.

    x is fp32 whose values x_dtype can hold; everything is on ``device``.

    Raises ValueError: linear.n is no multiple of 64.
    """
    if linear.n % TILE_N:
        raise ValueError(f"make_problem: linear: want N a multiple of {TILE_N}; got {linear.n}")
    made = make_inputs(rows, linear.n, linear.k, group_size=linear.group_size, symmetric=symmetric, seed=seed)
    x, weight, _ = made
    q, scales, zeros = weight.unpack()
    if not symmetric:
        zeros = zeros.clamp(max=15)
        weight = Int4Weight.pack(q, scales, zeros, group_size=linear.group_size)
    x, weight, q = x.to(x_dtype).float().to(device), weight.to(device), q.to(device)
    scales, zeros = scales.to(device), zeros.to(device)
    dense = int4_dequantize(weight, torch.float32)
    expected = x.double() @ dense.double().T
    return Problem(linear=linear, x=x, weight=weight, q=q, scales=scales, zeros=zeros, dense=dense, expected=expected)
