"""Named shapes of real models: what the benchmarks run on.

Sources: the config.json of HuggingFaceTB/SmolLM2-135M-Instruct (hidden 576, intermediate 1536, 9/3 heads of 64,
vocabulary 49152), Qwen/Qwen3-0.6B (hidden 1024, vocabulary 151936), Qwen/Qwen3-8B (4096, 12288, 32/8 heads of 128,
vocabulary 151936), Qwen/Qwen2.5-32B (5120, 27648) and Qwen/Qwen3-235B-A22B (4096, experts of 1536, 64/4 heads of 128,
128 experts, top 8).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor

from m3kernels.int4 import Int4Weight, int4_dequantize
from m3kernels.int4.reference import make_inputs
from m3kernels.int4.types import TILE_N, in_huge_pages, num_groups


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossHead:
    """A policy loss over a linear head: T tokens in B sequences of one length, hidden size D, vocabulary V."""

    name: str
    tokens: int
    hidden: int
    vocabulary: int
    sequences: int = 4

    @property
    def length(self) -> int:
        return self.tokens // self.sequences


LINEARS = {
    linear.name: linear
    for linear in (
        Linear(name="4096x4096", n=4096, k=4096),
        Linear(name="4096x12288", n=12288, k=4096),
        Linear(name="8192x8192", n=8192, k=8192),
        Linear(name="smollm2-135m.qkv", n=960, k=576, group_size=64),
        Linear(name="smollm2-135m.o", n=576, k=576, group_size=64),
        Linear(name="smollm2-135m.gate_up", n=3072, k=576, group_size=64),
        Linear(name="smollm2-135m.down", n=576, k=1536, group_size=64),
        Linear(name="qwen3-8b.qkv", n=6144, k=4096),
        Linear(name="qwen3-8b.o", n=4096, k=4096),
        Linear(name="qwen3-8b.gate_up", n=24576, k=4096),
        Linear(name="qwen3-8b.down", n=4096, k=12288),
        Linear(name="qwen2.5-32b.gate_up", n=55296, k=5120),
        Linear(name="qwen2.5-32b.down", n=5120, k=27648),
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

LOSS_HEADS = {
    head.name: head
    for head in (
        LossHead(name="smollm2-135m.t1024", tokens=1024, hidden=576, vocabulary=49152),
        LossHead(name="qwen3-0.6b.t256", tokens=256, hidden=1024, vocabulary=151936),
        LossHead(name="narrow.t8192", tokens=8192, hidden=64, vocabulary=151936),
        LossHead(name="narrow.t65536", tokens=65536, hidden=64, vocabulary=151936),
        LossHead(name="qwen3-8b.t8192", tokens=8192, hidden=4096, vocabulary=151936),
        LossHead(name="qwen3-8b.t16384", tokens=16384, hidden=4096, vocabulary=151936),
        LossHead(name="qwen3-8b.t65536", tokens=65536, hidden=4096, vocabulary=151936),
    )
}

# The linear layers of which products with few rows are measured, one by one as their models have them, and the bytes
# that go by between two uses of a weight: all INT4 weights of the 30 layers of SmolLM2-135M, or more than any cache.
SKINNY_LINEARS = {
    linear.name: linear
    for linear in (
        Linear(name="smollm2-135m.o", n=576, k=576, group_size=64),
        Linear(name="smollm2-135m.kv", n=192, k=576, group_size=64),
        Linear(name="smollm2-135m.gate", n=1536, k=576, group_size=64),
        Linear(name="smollm2-135m.down", n=576, k=1536, group_size=64),
        Linear(name="qwen3-8b.o", n=4096, k=4096),
        Linear(name="qwen3-8b.kv", n=1024, k=4096),
        Linear(name="qwen3-8b.gate", n=12288, k=4096),
        Linear(name="qwen3-8b.down", n=4096, k=12288),
    )
}
SKINNY_STORES: dict[str, dict[str, int]] = {
    name: {"streamed": 56 << 20, "cached": 0} if name.startswith("smollm2") else {"streamed": 512 << 20}
    for name in SKINNY_LINEARS
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


Shape = TypeVar("Shape")


def look_up(name: str, known: Mapping[str, Shape]) -> Shape:
    """The shape of that name. Raises ValueError with the known names."""
    if name not in known:
        raise ValueError(f"bench: shape: want one of {', '.join(known)}; got {name!r}")
    return known[name]


def find(name: str) -> Linear | Experts:
    """The INT4 shape of that name."""
    return look_up(name, {**LINEARS, **EXPERTS})


def find_head(name: str) -> LossHead:
    """The head of a policy loss of that name."""
    return look_up(name, LOSS_HEADS)


# -- inputs of products -----------------------------------------------------------------------------------------------
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


def draw_weight(
    n: int, k: int, *, group_size: int, symmetric: bool, seed: int, device: str, experts: int | None = None
) -> Int4Weight:
    """Uniform nibbles and spread fp16 scales as ``make_inputs`` draws them, drawn and packed on the device."""
    random = torch.Generator(device).manual_seed(seed)
    groups = num_groups(k, group_size)

    def one() -> Int4Weight:
        q = torch.randint(0, 16, (n, k), generator=random, dtype=torch.uint8, device=device)
        scales = (torch.rand(n, groups, generator=random, device=device) * 0.02 + 0.001).half()
        zeros = None
        if not symmetric:
            zeros = torch.randint(0, 16, (n, groups), generator=random, dtype=torch.uint8, device=device)
        return Int4Weight.pack(q, scales, zeros, group_size=group_size)

    return one() if experts is None else Int4Weight.stack([one() for _ in range(experts)])


def draw(m: int, k: int, seed: int, device: str) -> Tensor:
    """(m, k) fp32 Gaussian, drawn on the device."""
    return torch.randn(m, k, generator=torch.Generator(device).manual_seed(seed), device=device)


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
    sizes = {"group_size": linear.group_size, "symmetric": symmetric}
    if device == "cpu":
        x, weight, _ = make_inputs(rows, linear.n, linear.k, seed=seed, **sizes)
    else:  # there it takes milliseconds, here minutes for large ones
        x = draw(rows, linear.k, seed, device)
        weight = draw_weight(linear.n, linear.k, seed=seed, device=device, **sizes)
    q, scales, zeros = weight.unpack()
    if not symmetric:
        zeros = zeros.clamp(max=15)
        weight = Int4Weight.pack(q, scales, zeros, group_size=linear.group_size)
    x = x.to(x_dtype).float()
    dense = int4_dequantize(weight, torch.float32)
    expected = x.double() @ dense.double().T
    return Problem(linear=linear, x=x, weight=weight, q=q, scales=scales, zeros=zeros, dense=dense, expected=expected)


# -- inputs of policy losses ------------------------------------------------------------------------------------------
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CLIP = 0.2
LOGIT_SPREAD = 2.0  # standard deviation of the logits
RATIO_SPREAD = 0.1  # log-ratios lie within this, inside the clip bounds at every precision ...
CLIPPED_LOG_RATIO = 0.5  # ... except of the first token of each sequence that counts, which is clipped
BLOCK_TOKENS = 1024


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossProblem:
    """What every arm computes: the mean over the tokens of -min(r A, clip(r, 0.8, 1.2) A), and its gradients.

    r = exp(logprobs - old_logprobs), A one advantage a sequence. hidden and weight are leaves that all arms share.
    """

    head: LossHead
    dtype: str
    density: float
    hidden: Tensor  # (B, L, D) requires grad
    weight: Tensor  # (V, D) requires grad
    ids: Tensor  # (B, L) int64
    mask: Tensor  # (B, L) bool, the same number of tokens in each sequence
    advantages: Tensor  # (B,) fp32, none 0
    old_logprobs: Tensor  # (B, L) fp32

    @property
    def rows(self) -> Tensor:
        """(n,) int64 indices of the tokens that count, in the flattened batch."""
        return self.mask.reshape(-1).nonzero()[:, 0]

    @property
    def gradient_bytes(self) -> int:
        return sum(leaf.numel() * leaf.element_size() for leaf in (self.hidden, self.weight))

    def token_losses(self, logprobs: Tensor, rows: Tensor) -> Tensor:
        """(n,) losses of the tokens ``rows`` from their log-probabilities (n,), in the dtype of those."""
        advantages = self.advantages.repeat_interleave(self.head.length)[rows].to(logprobs.dtype)
        ratio = (logprobs - self.old_logprobs.reshape(-1)[rows].to(logprobs.dtype)).exp()
        return -torch.minimum(ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossResult:
    """The loss, the mean absolute loss of a token (the scale of an error of the loss), and both gradients."""

    loss: float
    scale: float
    d_hidden: Tensor
    d_weight: Tensor


def make_loss_problem(head: LossHead, dtype: str, density: float, *, device: str = "cpu", seed: int = 0) -> LossProblem:
    """Gaussian hidden states and head, uniform ids, scattered masks, old log-probabilities near the present ones.

    Raises ValueError: tokens no multiple of sequences, or a density that leaves a sequence without a token.
    """
    counted = round(density * head.length)
    if head.tokens % head.sequences or not 1 <= counted <= head.length:
        wanted = f"a multiple of {head.sequences} tokens, of which a share of {density} is at least one a sequence"
        raise ValueError(f"make_loss_problem: head: want {wanted}; got {head.tokens}")
    batch = (head.sequences, head.length)
    random = torch.Generator(device).manual_seed(seed)
    options = {"generator": random, "device": device}
    hidden = torch.randn(*batch, head.hidden, **options).mul_(LOGIT_SPREAD).to(DTYPES[dtype])
    weight = torch.randn(head.vocabulary, head.hidden, **options).mul_(head.hidden**-0.5).to(DTYPES[dtype])
    ids = torch.randint(head.vocabulary, batch, **options)
    mask = torch.rand(batch, **options).argsort(1) < counted
    signs = torch.where(torch.arange(head.sequences, device=device) % 2 == 0, 1.0, -1.0)
    advantages = signs * torch.linspace(0.5, 1.5, head.sequences, device=device)
    logprobs = torch.empty(head.tokens, device=device)
    blocks = (tensor.split(BLOCK_TOKENS) for tensor in (hidden.view(-1, head.hidden), ids.view(-1), logprobs))
    for x, chosen, out in zip(*blocks, strict=True):
        out.copy_(-torch.nn.functional.cross_entropy((x @ weight.t()).float(), chosen, reduction="none"))
    shift = (torch.rand(batch, **options) * 2 - 1) * RATIO_SPREAD
    shift.scatter_(1, mask.int().argmax(1, keepdim=True), (signs * CLIPPED_LOG_RATIO)[:, None])
    return LossProblem(
        head=head,
        dtype=dtype,
        density=density,
        hidden=hidden.requires_grad_(),
        weight=weight.requires_grad_(),
        ids=ids,
        mask=mask,
        advantages=advantages,
        old_logprobs=logprobs.view(batch) - shift,
    )


def expected_loss(problem: LossProblem) -> LossResult:
    """What an arm must give: the definition in fp64, autograd through it, a block of tokens at a time."""
    count = len(problem.rows)
    hidden = problem.hidden.detach().view(problem.head.tokens, problem.head.hidden)
    weight = problem.weight.detach().double().requires_grad_()
    d_hidden = torch.zeros_like(hidden, dtype=torch.float64)
    loss = scale = 0.0
    for rows in problem.rows.split(BLOCK_TOKENS):
        x = hidden[rows].double().requires_grad_()
        logits = x @ weight.t()
        logprobs = -torch.nn.functional.cross_entropy(logits, problem.ids.view(-1)[rows], reduction="none")
        losses = problem.token_losses(logprobs, rows) / count
        losses.sum().backward()
        assert x.grad is not None
        d_hidden[rows] = x.grad
        values = losses.detach()
        loss, scale = loss + float(values.sum()), scale + float(values.abs().sum())
    assert weight.grad is not None
    return LossResult(loss=loss, scale=scale, d_hidden=d_hidden.view(problem.hidden.shape), d_weight=weight.grad)
