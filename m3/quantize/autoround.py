"""AutoRound: learn the rounding offsets and the clipping of a layer's linears by signed gradient descent.

    W = s * (clamp(rint(w / s + V) + z, 0, 15) - z),   s = a * s0,   V in [-1/2, 1/2],   a in [1/2, 3/2]
    loss = sum over tokens of |layer(x; W) - target|^2 / |target|^2
    V <- clip(V - rate sign(dloss/dV)),   a <- clip(a - scale_rate sign(dloss/da)),   rates decaying linearly to 0

V decides for each weight which way it is rounded, a for each group how much of its range is clipped. The derivative of
rint is taken as 1 (straight-through), so with G = dloss/dW, u = w / s and inside = "not clamped":

    dloss/dV = G s inside,      dloss/ds = sum over the group of G ((q - z) - u inside),      dloss/da = s0 dloss/ds

Only signs are used: nothing of size N x K is kept for the backward pass but G, which autograd leaves at the weights.
Scales are rounded to the stored dtype before anything is rounded with them: what is optimised is, bit for bit, what is
packed. With no iterations and start "minmax" it is rounding to nearest.

Source: Cheng et al., "Optimize Weight Rounding via Signed Gradient Descent" (AutoRound), arXiv 2309.05516. Of ours:
- the loss of a token is relative (there: |layer - target|^2). The layers to come normalise their input, and the first
  token of a sequence, an attention sink, can be 10^4 times as large as the others: it would be nearly all of the loss;
- the ranges that learning starts from are searched (there: min-max);
- an iterate is judged by its loss over the loss that the start has on the same sequences, so that an easy batch does
  not look like a good iterate.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from m3.quantize.block import EXPERT, Block, batches, stacked
from m3.quantize.scheme import Rounded, Scheme, nearest
from m3.quantize.states import gathered
from m3kernels.checks import refuse
from m3kernels.int4.quantize import LARGEST_Q, METHODS, storable
from m3kernels.int4.types import SYMMETRIC_ZERO

LARGEST_OFFSET = 0.5
SMALLEST_RATIO, LARGEST_RATIO = 0.5, 1.5  # of a scale to the one that learning starts from
SMALLEST_LOSS = 1e-30  # a start without error divides by this
EXPERT_ROWS = 64  # tokens of a part, where an expert learns alone
CHUNK = 1 << 16  # weights updated at a time: the buffers of them stay in a CPU's second-level cache
Progress = Callable[[int, int], None]  # (iterations done, in all)
Sequences = Tensor | Sequence[Tensor]  # S x (L, D)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AutoRoundConfig:
    """How to learn.

    iterations, batch (sequences of one): AutoRound's defaults. learning_rate: of V, None is 1 / (2 iterations), so that
        an offset can travel a quarter (ours: docs/experiments/quantization.md; AutoRound has 1 / iterations).
    scale_rate: of a, as a multiple of learning_rate. start: the ranges at first, a method of quantize_weight.
    least_tokens: an expert that the router gives fewer tokens of the calibration set gets the likeliest others too.
    apart: attention first, then each expert alone, for its own output: the memory of one expert, not of all.
    """

    iterations: int = 200
    batch: int = 8
    learning_rate: float | None = None
    scale_rate: float = 1.0
    start: str = "weighted"  # ours: less error than "minmax" before anything is learnt
    least_tokens: int = 0
    apart: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.iterations < 0 or self.batch < 1 or self.least_tokens < 0:
            raise refuse("AutoRoundConfig", "iterations, batch, least_tokens", "0, 1, 0 or more", f"{self}"[:200])
        if self.start not in METHODS:
            raise refuse("AutoRoundConfig", "start", " or ".join(map(repr, METHODS)), self.start)

    @property
    def rate(self) -> float:
        """Of V at first."""
        return 0.5 / max(1, self.iterations) if self.learning_rate is None else self.learning_rate


class LearntRounding:
    """V and a of one linear weight (N, K); ``weight`` (N, K) fp32 is what they make of it, and collects G in .grad."""

    def __init__(self, weight: Tensor, start: Rounded) -> None:
        n, k = weight.shape
        groups = start.scales.shape[1]
        width = k if groups == 1 else start.group_size
        self.columns, self.start = k, start
        self.padding = (0, groups * width - k)
        self.dense = F.pad(weight.detach().float(), self.padding).view(n, groups, width)
        self.first_scales = start.scales.float()[..., None]  # (N, G, 1)
        zeros = torch.full_like(start.scales, SYMMETRIC_ZERO) if start.zeros is None else start.zeros
        self.low = -zeros.float()[..., None]  # q - z of the least q
        self.offsets = torch.zeros_like(self.dense)  # V
        self.ratios = torch.ones_like(self.first_scales)  # a
        self.weight = torch.empty(n, k)
        size = max(1, CHUNK // (groups * width))
        self.chunks = [slice(at, at + size) for at in range(0, n, size)]
        self.render()
        self.weight.requires_grad_()

    def scales(self, rows: slice) -> Tensor:
        """(n, G, 1) fp32, rounded to the dtype that they are stored in."""
        return storable(self.ratios[rows] * self.first_scales[rows], self.start.scales.dtype)

    def points(self, rows: slice, scales: Tensor) -> Tensor:
        """q - z (n, G, g) fp32."""
        low = self.low[rows]
        return (self.dense[rows] / scales).add_(self.offsets[rows]).round_().clamp_(low, low + LARGEST_Q)

    @torch.no_grad()
    def render(self) -> None:
        """Make ``weight`` of V and a."""
        for rows in self.chunks:
            self._write(rows)

    def _write(self, rows: slice) -> None:
        scales = self.scales(rows)
        self.weight.data[rows] = self.points(rows, scales).mul_(scales).flatten(1)[:, : self.columns]

    @torch.no_grad()
    def gradients(self, rows: slice) -> tuple[Tensor, Tensor]:
        """(dloss/dV / |s| (n, G, g), dloss/da (n, G, 1)) of some rows, from the gradient at ``weight``."""
        assert self.weight.grad is not None
        at_weight = F.pad(self.weight.grad[rows], self.padding).view_as(self.dense[rows])
        scales, low = self.scales(rows), self.low[rows]
        u = self.dense[rows] / scales
        points = (u + self.offsets[rows]).round_()
        clamped = points.clamp(low, low + LARGEST_Q)
        inside = points.eq_(clamped)
        at_ratio = clamped.sub_(u.mul_(inside)).mul_(at_weight).sum(-1, keepdim=True).mul_(self.first_scales[rows])
        return inside.mul_(at_weight).mul_(scales.sign()), at_ratio

    @torch.no_grad()
    def step(self, rate: float, scale_rate: float) -> None:
        """One step against the signs of the gradients; ``weight`` follows, and its gradient is cleared."""
        if self.weight.grad is None:  # an expert that no token came to
            return
        for rows in self.chunks:
            at_offset, at_ratio = self.gradients(rows)
            self.offsets[rows].sub_(at_offset.sign_(), alpha=rate).clamp_(-LARGEST_OFFSET, LARGEST_OFFSET)
            self.ratios[rows].sub_(at_ratio.sign_(), alpha=scale_rate).clamp_(SMALLEST_RATIO, LARGEST_RATIO)
            self._write(rows)
        self.weight.grad = None

    def state(self) -> tuple[Tensor, Tensor]:
        """V and a as they are."""
        return self.offsets.clone(), self.ratios.clone()

    def restore(self, state: tuple[Tensor, Tensor]) -> None:
        """Back to an earlier state."""
        self.offsets, self.ratios = state
        self.render()

    @torch.no_grad()
    def rounded(self) -> Rounded:
        """The integers and scales of ``weight``."""
        scales = torch.cat([self.scales(rows) for rows in self.chunks])
        points = torch.cat([self.points(rows, self.scales(rows)) for rows in self.chunks])
        codes = (points - self.low).to(torch.uint8).flatten(1)[:, : self.columns].contiguous()
        return dataclasses.replace(self.start, codes=codes, scales=scales[..., 0].to(self.start.scales.dtype))


# -- what is learnt from ----------------------------------------------------------------------------------------------
def relative_error(y: Tensor, wanted: Tensor) -> Tensor:
    """|y - wanted|^2 / |wanted|^2 of every token, (..., D) -> (...)."""
    return (y - wanted).square().sum(-1) / wanted.square().sum(-1).clamp(min=SMALLEST_LOSS)


class Reconstruction:
    """Linears, and S parts of a calibration set; a loss is the relative squared error of a part, summed over tokens."""

    def __init__(self, linears: Mapping[str, Tensor], parts: int) -> None:
        self.linears, self.parts = linears, parts

    def losses(self, weights: Mapping[str, Tensor], which: Sequence[int]) -> Tensor:
        """(B,) for B parts, with these weights for the linears."""
        raise NotImplementedError

    @torch.no_grad()
    def all_losses(self, weights: Mapping[str, Tensor], batch: int) -> Tensor:
        """(S,)."""
        everything = range(self.parts)
        return torch.cat([self.losses(weights, everything[at : at + batch]) for at in range(0, self.parts, batch)])


class WholeLayer(Reconstruction):
    """All linears of a layer, for its output; parts are sequences."""

    def __init__(self, block: Block, inputs: Sequences, targets: Sequences, config: AutoRoundConfig) -> None:
        super().__init__(block.weights, len(inputs))
        self.block, self.inputs, self.targets = block, inputs, targets
        self.extra: Tensor | None = None  # (S, L, E) bool
        if block.has_experts and config.least_tokens:
            self._add_extra(config)

    @torch.no_grad()
    def _add_extra(self, config: AutoRoundConfig) -> None:
        """Further tokens for rare experts; targets get what the experts, as they are, make of them."""
        x = torch.cat([self.block.attend(hidden)[1] for hidden in batches(self.inputs, config.batch)])
        extra = self.block.route(x).extra(config.least_tokens)
        self.extra = extra.view(self.parts, -1, extra.shape[1])
        targets = []
        for part in range(self.parts):
            hidden = stacked(self.inputs, [part])
            more = self.block.forward(hidden, extra=self.extra[part]) - self.block.forward(hidden)
            targets.append(self.targets[part].float() + more[0])
        self.targets = targets

    def losses(self, weights: Mapping[str, Tensor], which: Sequence[int]) -> Tensor:
        extra = None if self.extra is None else self.extra[list(which)].flatten(0, 1)
        return relative_error(
            self.block.forward(stacked(self.inputs, which), weights, extra=extra), stacked(self.targets, which)
        ).sum(1)


class AttentionHalf(Reconstruction):
    """The linears of attention, for what it makes of the inputs; parts are sequences."""

    def __init__(self, block: Block, inputs: Sequences) -> None:
        super().__init__({name: w for name, w in block.weights.items() if "_attn." in name}, len(inputs))
        self.block, self.inputs = block, inputs

    def losses(self, weights: Mapping[str, Tensor], which: Sequence[int]) -> Tensor:
        hidden = stacked(self.inputs, which)
        with torch.no_grad():
            wanted = self.block.attend(hidden)[0]
        return relative_error(self.block.attend(hidden, weights)[0], wanted).sum(1)


class OneExpert(Reconstruction):
    """The linears of an expert, for its output on tokens (T, D) times their ``shares`` (T,); parts are some tokens."""

    def __init__(self, block: Block, expert: int, x: Tensor, shares: Tensor) -> None:
        self.block, self.prefix = block, EXPERT.format(expert)
        self.x, self.shares = x.split(EXPERT_ROWS), shares.split(EXPERT_ROWS)
        linears = {name: weight for name, weight in block.weights.items() if name.startswith(self.prefix)}
        super().__init__(linears, len(self.x) if len(x) else 0)

    def losses(self, weights: Mapping[str, Tensor], which: Sequence[int]) -> Tensor:
        x, shares = (torch.cat([all_parts[part] for part in which]) for all_parts in (self.x, self.shares))
        with torch.no_grad():
            wanted = self.block.mlp(self.prefix, x)
        errors = ((self.block.mlp(self.prefix, x, weights) - wanted) * shares[:, None]).square().sum(1)
        return torch.stack([part.sum() for part in errors.split([len(self.x[part]) for part in which])])


def apart(
    block: Block, inputs: Sequences, config: AutoRoundConfig, scratch: Path | None = None
) -> Iterator[Reconstruction]:
    """Attention, then every expert on its tokens of the layer as it is."""
    yield AttentionHalf(block, inputs)
    sizes: list[Tensor] = []  # of what an expert adds to

    def normed() -> Iterator[Tensor]:
        for part in batches(inputs, config.batch):
            hidden, x = block.attend(part)
            sizes.append(hidden.flatten(0, 1).norm(dim=1, keepdim=True))
            yield x

    with torch.no_grad():
        x = gathered(normed(), block.config.hidden_size, scratch)
        routing = block.route(x)
        extra = routing.extra(config.least_tokens)
        used = routing.chosen() | extra
        shares = routing.shares(extra) / torch.cat(sizes).clamp(min=SMALLEST_LOSS)
    for expert in range(block.config.num_experts):
        rows = used[:, expert]
        yield OneExpert(block, expert, x[rows], shares[rows, expert])


class Order:
    """Batches of parts: every part at most once in each pass over them, in an order of the seed's."""

    def __init__(self, parts: int, batch: int, seed: int) -> None:
        self.parts, self.batch = parts, min(batch, parts)
        self.generator = torch.Generator().manual_seed(seed)
        self.rest: list[int] = []

    def next(self) -> list[int]:
        if len(self.rest) < self.batch:
            self.rest = torch.randperm(self.parts, generator=self.generator).tolist()
        found, self.rest = self.rest[: self.batch], self.rest[self.batch :]
        return found


# -- learning ---------------------------------------------------------------------------------------------------------
def learn(
    task: Reconstruction, scheme: Scheme, config: AutoRoundConfig, told: Callable[[], None] = lambda: None
) -> dict[str, Rounded]:
    """The linears of a task, learnt together: the best iterate. ``told`` is called after every iteration."""
    learnt = {
        name: LearntRounding(weight, nearest(weight, scheme, config.start)) for name, weight in task.linears.items()
    }
    weights = {name: one.weight for name, one in learnt.items()}
    iterations = config.iterations if task.parts else 0
    if iterations:
        first = task.all_losses(weights, config.batch)
        if not bool(torch.isfinite(first).all()):
            raise refuse("autoround", "inputs, targets", "finite hidden states", "a loss that is not finite")
    best, best_state = 1.0, {name: one.state() for name, one in learnt.items()}
    order = Order(task.parts, config.batch, config.seed)
    for iteration in range(iterations):
        batch = order.next()
        loss = task.losses(weights, batch).sum()
        ratio = float(loss.detach()) / max(float(first[batch].sum()), SMALLEST_LOSS)
        if ratio < best:
            best, best_state = ratio, {name: one.state() for name, one in learnt.items()}
        loss.backward()
        rate = config.rate * (1 - iteration / iterations)
        for one in learnt.values():
            one.step(rate, rate * config.scale_rate)
        told()
    for name, one in learnt.items():
        one.restore(best_state[name])
    return {name: one.rounded() for name, one in learnt.items()}


def quantised_linears(
    block: Block,
    inputs: Sequences,
    targets: Sequences,
    scheme: Scheme,
    config: AutoRoundConfig,
    progress: Progress = lambda done, total: None,
    scratch: Path | None = None,
) -> Iterator[tuple[str, Rounded]]:
    """Each linear of a layer by its name, as soon as those it is learnt with are done.

    Args:
        block: the layer as it is, which stays so.
        inputs: S sequences (L, D), of one length: what the layer will see, from the layers before it as they are or
            as they were quantised.
        targets: S sequences (L, D): what it should give, the output of the layers as they are. Not used if experts
            learn apart.
        progress: called after every iteration.
        scratch: a new file for what experts that learn apart see; None: it is in memory.
    Raises:
        ValueError: no sequences, sequences that do not fit, or hidden states that are not finite.
    """
    width = block.config.hidden_size
    shapes = {tuple(one.shape) for one in (*inputs, *targets)}
    if len(inputs) != len(targets) or len(shapes) != 1 or len(shape := shapes.copy().pop()) != 2 or shape[1] != width:
        want = f"one sequence or more, as many of each, all of one shape (L, {width})"
        raise refuse("autoround", "inputs, targets", want, f"{len(inputs)}, {len(targets)} of {sorted(shapes)}"[:200])
    tasks: Iterable[Reconstruction] = [WholeLayer(block, inputs, targets, config)]
    count = 1
    if block.has_experts and config.apart:
        tasks, count = apart(block, inputs, config, scratch), 1 + block.config.num_experts
    done, total = 0, count * config.iterations

    def told() -> None:
        nonlocal done
        done += 1
        progress(done, total)

    for number, task in enumerate(tasks, 1):
        yield from learn(task, scheme, config, told).items()
        done = number * config.iterations  # a task without parts took none


def quantise_block(
    block: Block,
    inputs: Sequences,
    targets: Sequences,
    scheme: Scheme,
    config: AutoRoundConfig,
    progress: Progress = lambda done, total: None,
) -> dict[str, Rounded]:
    """All linears of a layer, as ``quantised_linears``; a Rounded for each name in block.linears."""
    found = dict(quantised_linears(block, inputs, targets, scheme, config, progress))
    return {name: found[name] for name in block.linears}
