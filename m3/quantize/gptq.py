"""GPTQ: round a linear weight column by column, and let the columns still to come make up for the error.

    H = sum over tokens of x x^T,   U = upper Cholesky factor of (H + damp mean(diag H) I)^-1,  U^T U = the inverse
    for each column j:   q_j = nearest grid point of w_j,   e = (w_j - q_j) / U[j, j],   w_l -= e U[j, l] for l > j

which is the least increase of |X W^T - X Q^T|^2 for every choice of q_j. Columns are taken in the order of diag H,
largest first, if asked for (act-order), and in blocks: updates beyond a block are one product. The range of a group is
found from its weights as they are when its first column is reached. Hessians are products of fp32 tokens summed in
fp64; they are factored in fp64, columns are updated in fp32.

Source: Frantar et al., "GPTQ", arXiv 2210.17323; act-order and grouping from its code.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from m3.quantize.block import DOWN, EXPERT, OUT, Block, batches
from m3.quantize.scheme import Rounded, Scheme
from m3.quantize.states import gathered
from m3kernels.checks import refuse
from m3kernels.int4.quantize import LARGEST_Q, METHODS, quantize_groups

ATTENTION = (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), (OUT,))  # those over one input together
DENSE_MLP = (("mlp.gate_proj", "mlp.up_proj"), (DOWN,))
EXPERT_MLP = (("gate_proj", "up_proj"), ("down_proj",))
BLOCK = 128  # columns between two updates of all the rest
ROWS = 1 << 13  # tokens that pass through an expert together
MOST_DAMPING = 1.0
Progress = Callable[[int, int], None]  # (linears done, in all)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GptqConfig:
    """How to round.

    damping: added to diag H, as a share of its mean; ten times more where H cannot be factored (0.01 as in GPTQ).
    act_order: columns in the order of diag H, stored as a permutation. start: ranges, a method of quantize_weight.
    sequential: q, k and v are rounded before what o sees is taken, and so on; else all see the layer as it is.
    batch: sequences of a forward pass. least_tokens: an expert that the router gives fewer tokens of the calibration
        set gets the likeliest others too.
    """

    damping: float = 0.01
    act_order: bool = False
    start: str = "mse"
    sequential: bool = True
    batch: int = 8
    least_tokens: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.damping <= MOST_DAMPING:
            raise refuse("GptqConfig", "damping", f"more than 0, at most {MOST_DAMPING}", self.damping)
        if self.start not in METHODS:
            raise refuse("GptqConfig", "start", " or ".join(map(repr, METHODS)), self.start)
        if self.batch < 1 or self.least_tokens < 0:
            raise refuse("GptqConfig", "batch, least_tokens", "1, 0 or more", f"{self}"[:200])


class Hessian:
    """sum of x x^T over the tokens (T, K) that one linear sees, fp64."""

    def __init__(self, name: str, columns: int) -> None:
        self.name = name
        self.total = torch.zeros(columns, columns, dtype=torch.float64)

    def see(self, name: str, x: Tensor) -> None:
        if name == self.name:
            self.total += x.T @ x


def inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """U (K, K) fp32, upper triangular, U^T U = (H + damp mean(diag H) I)^-1; inputs that are always 0 stand alone.

    Raises ValueError: H is not finite.
    """
    if not bool(torch.isfinite(hessian).all()):
        raise refuse("gptq", "inputs", "finite hidden states", "a Hessian that is not finite")
    h = hessian.double().clone()
    diagonal = h.diagonal()
    diagonal[diagonal == 0] = 1.0
    mean = float(diagonal.mean())
    while True:
        damped = h + damping * mean * torch.eye(len(h), dtype=h.dtype)
        factor, info = torch.linalg.cholesky_ex(damped)
        if int(info) == 0:
            upper, info = torch.linalg.cholesky_ex(torch.cholesky_inverse(factor), upper=True)
            if int(info) == 0:
                return upper.float()
        if damping >= MOST_DAMPING:
            raise refuse("gptq", "inputs", "a Hessian that can be factored", f"none with damping {damping}")
        damping = min(10 * damping, MOST_DAMPING)


def block_columns(group: int) -> int:
    """Columns of a block: whole groups, or a part of one that starts with the block."""
    return group * max(1, BLOCK // group)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prepared:
    """What all linears over one input share: the factor U (K, K), and the order of columns, None as they come."""

    factor: Tensor
    perm: Tensor | None

    @classmethod
    def of(cls, hessian: Tensor, config: GptqConfig) -> Prepared:
        if not config.act_order:
            return cls(factor=inverse_factor(hessian, config.damping), perm=None)
        perm = hessian.diagonal().sort(descending=True, stable=True).indices
        return cls(factor=inverse_factor(hessian[perm][:, perm], config.damping), perm=perm)


@torch.no_grad()
def quantise_linear(weight: Tensor, prepared: Prepared, scheme: Scheme, start: str = "mse") -> Rounded:
    """The weight (N, K) rounded for inputs whose Hessian was prepared; ``start``: the ranges, as in GptqConfig."""
    n, k = weight.shape
    w, factor, perm = weight.detach().float().clone(), prepared.factor, prepared.perm
    if perm is not None:
        w = w[:, perm]
    groups, width = scheme.groups(k), min(k, scheme.width(k))
    step = BLOCK if groups == 1 else block_columns(width)
    codes = torch.empty(n, k, dtype=torch.uint8)
    scales = torch.empty(n, groups, dtype=scheme.scale_dtype)
    zeros = torch.empty(n, groups, dtype=torch.uint8)
    for first in range(0, k, step):
        last = min(first + step, k)
        part, local = w[:, first:last].clone(), factor[first:last, first:last]
        errors = torch.empty_like(part)
        for at in range(last - first):
            column = first + at
            group = column // width
            if column % width == 0:
                current = w if groups == 1 else part
                piece = current[:, at : at + width].contiguous()[:, None]
                found = quantize_groups(piece, piece.shape[2], scheme.symmetric, start, scheme.scale_dtype)
                scales[:, group], zeros[:, group] = found[1][:, 0], found[2][:, 0]
                scale, low = scales[:, group].float(), -zeros[:, group].float()
            points = (part[:, at] / scale).round_().clamp_(low, low + LARGEST_Q)
            codes[:, column] = (points - low).to(torch.uint8)
            errors[:, at] = (part[:, at] - points * scale) / local[at, at]
            part[:, at + 1 :].addr_(errors[:, at], local[at, at + 1 :], alpha=-1)
        w[:, last:] -= errors @ factor[first:last, last:]
    return Rounded(
        codes=codes,
        scales=scales,
        zeros=None if scheme.symmetric else zeros,
        perm=None if perm is None else perm.to(torch.int32),
        group_size=scheme.group_size,
    )


@torch.no_grad()
def quantised_linears(
    block: Block,
    inputs: Tensor | Sequence[Tensor],
    scheme: Scheme,
    config: GptqConfig,
    scratch: Path | None = None,
) -> Iterator[tuple[str, Rounded]]:
    """Each linear of a layer by its name as soon as it is rounded, in the order of block.linears.

    Args:
        block: the layer as it is, which stays so.
        inputs: S sequences (L, D), of one length: what the layer will see.
        scratch: a new file for what the experts of the layer see; None: it is in memory.
    Raises:
        ValueError: hidden states that are not finite, or sequences that do not fit.
    """
    weights: dict[str, Tensor] = {}

    def rounded(names: Sequence[str], hessian: Tensor) -> Iterator[tuple[str, Rounded]]:
        prepared = Prepared.of(hessian, config)
        for name in names:
            found = quantise_linear(block.weights[name], prepared, scheme, config.start)
            if config.sequential:
                weights[name] = found.dequantized()
            yield name, found

    for stage in ATTENTION if block.has_experts else ATTENTION + DENSE_MLP:
        hessian = Hessian(stage[0], block.weights[stage[0]].shape[1])
        forward = block.attend if stage in ATTENTION else block.forward
        for hidden in batches(inputs, config.batch):
            forward(hidden, weights, see=hessian.see)
        yield from rounded(stage, hessian.total)
    if not block.has_experts:
        return
    parts = (block.attend(hidden, weights)[1] for hidden in batches(inputs, config.batch))
    x = gathered(parts, block.config.hidden_size, scratch)
    routing = block.route(x)
    used = routing.chosen() | routing.extra(config.least_tokens)
    for expert in range(block.config.num_experts):
        prefix, rows = EXPERT.format(expert), x[used[:, expert]]
        for stage in EXPERT_MLP:
            names = [prefix + name for name in stage]
            hessian = Hessian(names[0], block.weights[names[0]].shape[1])
            for part in rows.split(ROWS):
                block.mlp(prefix, part, weights, see=hessian.see)
            yield from rounded(names, hessian.total)
        for name in (prefix + name for stage in EXPERT_MLP for name in stage):
            weights.pop(name, None)  # no other linear sees what an expert gives


def quantise_block(
    block: Block,
    inputs: Tensor | Sequence[Tensor],
    targets: Tensor | Sequence[Tensor] | None,
    scheme: Scheme,
    config: GptqConfig,
    progress: Progress = lambda done, total: None,
) -> dict[str, Rounded]:
    """All linears of a layer, as ``quantised_linears``.

    Args:
        targets: not used; GPTQ looks at the inputs of each linear alone.
        progress: called after every linear.
    Returns:
        a Rounded for each name in block.linears.
    """
    found: dict[str, Rounded] = {}
    for name, one in quantised_linears(block, inputs, scheme, config):
        found[name] = one
        progress(len(found), len(block.linears))
    return {name: found[name] for name in block.linears}
