"""Matrix products over tiles of the vocabulary with a room's tile kernels around them: softmax, and gradients.

    softmax          for each tile of W:    z = x @ W_tile.T;  online softmax of z;  z kept if asked      (product 1)
    add_gradients    for each tile of W:    dz from z, kept or formed again;  dx += dz @ W_tile;          (product 2)
                                            dW_tile += dz.T @ x                                           (product 3)

The tiles are the outer loop, blocks of rows the inner: a tile of dW is finished before the next begins. On the CPU
operands are widened to fp32 tile by tile, which keeps a tile of W in the cache; on a GPU bf16 operands feed the matrix
units and products leave in fp32. dX and dW grow in fp32 and are rounded once. Every sum has one order: results do not
vary from run to run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from m3kernels.policy_loss.tiles import new_state
from m3kernels.policy_loss.types import Head

TILE_ELEMENTS = 1 << 20  # of a tile of W or of logits on the CPU, 4 MiB in fp32: smaller ones cost products their speed
TILE_COLUMNS = 16384  # on a GPU: products large enough for its matrix units
BLOCK_ROWS = {"cpu": 1024}  # rows of logits at once where they are not kept
BLOCK_ROWS_ELSEWHERE = 4096
ROW_MULTIPLE = 16  # products run on whole multiples, the rest zeros: 5 to 10 % faster than on 410 rows (docs/log.md)


class Tiles(NamedTuple):
    """What a room brings: the four functions of tiles.py, and memory."""

    statistics: Callable[..., None]
    gradient: Callable[..., None]
    divergence: Callable[..., None]
    divergence_gradient: Callable[..., None]
    empty: Callable[[int, Tensor], Tensor]  # (elements, like) -> 1-D fp32 on the device of like, not initialised
    borrow: Callable[[int, Tensor], Tensor]  # the same, for a workspace that goes back
    give_back: Callable[[Tensor], None]


# -- products ---------------------------------------------------------------------------------------------------------
def compute_dtype(x: Tensor) -> torch.dtype:
    """Of the operands of products: fp32, except bf16 on a GPU (fp16 could not hold a gradient of 1e-8)."""
    return torch.bfloat16 if x.dtype == torch.bfloat16 and x.is_cuda else torch.float32


def multiply(a: Tensor, b: Tensor, out: Tensor, *, add: bool = False) -> None:
    """out = a @ b, or out += a @ b; out fp32, operands of one dtype."""
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, out=out) if add else torch.mm(a, b, out=out)
    elif add:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)


class Weights:
    """The rows of a head, tile by tile, in the dtype of products."""

    def __init__(self, head: Head, rows: int) -> None:
        self.head, self.dtype = head, compute_dtype(head.weight)
        self.vocabulary, self.hidden_size = head.weight.shape
        self.columns = tile_columns(head.weight, rows)
        self.wide: Tensor | None = None
        if head.weight.dtype != self.dtype:
            self.wide = head.weight.new_empty(min(self.columns, self.vocabulary), self.hidden_size, dtype=self.dtype)

    def spans(self) -> Iterator[tuple[int, int]]:
        """(first, last) row of each tile."""
        for first in range(0, self.vocabulary, self.columns):
            yield first, min(first + self.columns, self.vocabulary)

    def tile(self, first: int, last: int) -> Tensor:
        """Rows first..last (C, D). Valid until the next call."""
        rows = self.head.weight[first:last]
        return rows if self.wide is None else self.wide[: last - first].copy_(rows)

    def bias(self, first: int, last: int) -> Tensor | None:
        return None if self.head.bias is None else self.head.bias[first:last].float()


def tile_columns(weight: Tensor, rows: int) -> int:
    """Columns of a tile: its logits and its rows of W stay in a CPU's cache; on a GPU, enough for its matrix units."""
    if not weight.is_cpu:
        return TILE_COLUMNS
    return min(max(TILE_ELEMENTS // max(weight.shape[1], min(rows, BLOCK_ROWS["cpu"]), 1) // 64 * 64, 128), 8192)


def block_rows(x: Tensor) -> int:
    return BLOCK_ROWS.get(x.device.type, BLOCK_ROWS_ELSEWHERE)


# -- logits and their softmax -----------------------------------------------------------------------------------------
class Chunk(NamedTuple):
    """n rows to work on together."""

    x: Tensor  # (padded(n), D) in the dtype of products; zeros beyond n
    ids: Tensor  # (n, K) int64
    inverse_temperature: Tensor | None  # (n,) fp32


class Softmax(NamedTuple):
    """What the statistics of n rows come to; fp32."""

    logprobs: Tensor  # (n, K), at most 0
    lse: Tensor  # (n,)
    lse_low: Tensor  # (n,) what rounding took from lse: log sum exp is lse + lse_low
    entropy: Tensor | None  # (n,)
    sum_sq: Tensor | None  # (n,)


Selection = slice | Tensor  # rows of the batch: a run, or their indices


def padded(rows: int) -> int:
    return -(-rows // ROW_MULTIPLE) * ROW_MULTIPLE


def pad(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x (n, D) in dtype, with zero rows up to padded(n)."""
    rows = padded(len(x))
    if rows == len(x):
        return x.to(dtype)
    out = x.new_empty(rows, x.shape[1], dtype=dtype)
    out[: len(x)], out[len(x) :] = x, 0
    return out


def take(hidden: Tensor, ids: Tensor, temperature: Tensor | None, rows: Selection) -> Chunk:
    inverse = None if temperature is None else temperature[rows].reciprocal()
    return Chunk(pad(hidden[rows], compute_dtype(hidden)), ids[rows], inverse)


def subset(chunk: Chunk, rows: Selection) -> Chunk:
    """Some rows of a chunk."""
    inverse = None if chunk.inverse_temperature is None else chunk.inverse_temperature[rows]
    return Chunk(pad(chunk.x[: len(chunk.ids)][rows], chunk.x.dtype), chunk.ids[rows], inverse)


def tile_of(buffer: Tensor, rows: int, first: int, last: int) -> Tensor:
    """(rows, last - first) view of the tile that begins at column first, in a buffer of tiles one after another."""
    return buffer[rows * first : rows * last].view(rows, last - first)


def softmax(
    tiles: Tiles, weights: Weights, chunk: Chunk, keep: Tensor | None, *, entropy: bool, sum_sq: bool, first_id: int = 0
) -> Softmax:
    """The softmax of a chunk. Its transformed logits, tile after tile, stay in ``keep`` (len(x) * V) if given."""
    n, rows, head = len(chunk.ids), len(chunk.x), weights.head
    state = new_state(n, chunk.ids.shape[1], entropy=entropy, sum_sq=sum_sq, like=chunk.x)
    scratch = tiles.empty(rows * weights.columns, chunk.x) if keep is None else keep
    for first, last in weights.spans():
        z = tile_of(scratch, rows, *((0, last - first) if keep is None else (first, last)))
        multiply(chunk.x, weights.tile(first, last).t(), z)
        tiles.statistics(
            z[:n],
            chunk.ids,
            first_id + first,
            weights.bias(first, last),
            head.logit_scale,
            head.softcap,
            chunk.inverse_temperature,
            state,
        )
    log_total = state.total.log()
    shifted = (state.picked - state.maximum[:, None]) - log_total[:, None]
    lse, low = two_sum(state.maximum, log_total)
    return Softmax(
        logprobs=shifted.clamp(max=0.0),
        lse=lse,
        lse_low=low,
        entropy=None if state.weighted is None else log_total - state.weighted / state.total,
        sum_sq=None if state.squared is None else state.squared / state.total.square(),
    )


def two_sum(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """(a + b rounded, what rounding took), exact for finite numbers. Source: Knuth, TAOCP 2, 4.2.2."""
    total = a + b
    part = total - a
    low = (a - (total - part)) + (b - part)
    return total, torch.where(low.isfinite(), low, 0.0)


# -- gradients --------------------------------------------------------------------------------------------------------
class Gradients:
    """dX, dW and db of one call: fp32 while they grow, in the wanted dtype at the end. Those not wanted are None."""

    def __init__(
        self, tiles: Tiles, hidden: Tensor, head: Head, wanted: tuple[bool, bool, bool], dtype: torch.dtype, passes: int
    ) -> None:
        self.wanted, self.started, self.dtype = wanted, False, dtype
        weight, bias = head.weight, head.bias
        self.hidden = torch.zeros_like(hidden) if wanted[0] else hidden.new_empty(0)
        self.bias = weight.new_zeros(len(weight) if wanted[2] else 0, dtype=torch.float32)
        self.bias_dtype = weight.dtype if bias is None else bias.dtype
        self.narrow = weight.new_empty(0, dtype=dtype)  # result, tile by tile, where one pass gives all of dW
        self.total = weight.new_empty(0, dtype=torch.float32)
        if wanted[1] and dtype != torch.float32 and passes == 1:
            self.narrow = torch.empty_like(weight, dtype=dtype)
        elif wanted[1]:
            self.total = tiles.empty(weight.numel(), weight).view(weight.shape)

    def weight_tile(self, first: int, last: int, scratch: Tensor) -> Tensor:
        """Where rows first..last of dW are summed, fp32."""
        return self.total[first:last] if self.total.numel() else scratch[: last - first]

    def finish_tile(self, first: int, last: int, tile: Tensor) -> None:
        if self.narrow.numel():
            self.narrow[first:last] = tile

    def results(self) -> tuple[Tensor, Tensor, Tensor]:
        """(dX, dW, db); 0 elements where not wanted."""
        if not self.started:
            self.total.zero_()
            self.narrow.zero_()
        weight = self.narrow if self.narrow.numel() else self.total.to(self.dtype)
        return self.hidden, weight, self.bias.to(self.bias_dtype)


Form = Callable[[Tensor, "Tensor | None", slice, int, int, Tensor], None]  # (z, rows, block, first, last, out)


def add_gradients(
    tiles: Tiles,
    weights: Weights,
    chunk: Chunk,
    keep: Tensor | None,
    kept_rows: int,
    active: Tensor | None,
    form: Form,
    gradients: Gradients,
    rows: Selection,
) -> None:
    """Add the gradients of n rows: one pass over the vocabulary.

    Args:
        chunk: the n rows. rows: their places in the batch.
        keep: logits of kept_rows rows, as softmax left them, of which the n rows are ``active`` (None: the first n);
            None: form the logits again.
        form: writes d loss / dz of the rows ``block`` of the n into out (rows, last - first), from their z, or from all
            kept rows and the indices of theirs.
    """
    n, x = len(chunk.ids), chunk.x
    if n == 0:
        return
    block = min(block_rows(x), len(x))
    wants_hidden, wants_weight, wants_bias = gradients.wanted
    width = min(weights.columns, weights.vocabulary)
    scratch = x.new_empty(block * width)
    logits = tiles.empty(block * width, x) if keep is None and x.dtype != torch.float32 else scratch
    dx = tiles.empty(x.numel(), x).view(x.shape) if wants_hidden else x
    dw = tiles.empty(width * x.shape[1], x).view(width, -1) if wants_weight and gradients.narrow.numel() else x
    for first, last in weights.spans():
        w = weights.tile(first, last)
        target = gradients.weight_tile(first, last, dw) if wants_weight else dw
        for start in range(0, len(x), block):
            whole = slice(start, min(start + block, len(x)))  # with zero rows
            part = slice(start, min(start + block, n))
            size = part.stop - start
            dz = tile_of(scratch, whole.stop - start, 0, last - first)
            if keep is None:
                z, chosen = tile_of(logits, whole.stop - start, 0, last - first), None
                multiply(x[whole], w.t(), z)
                z = z[:size]
                transform(tiles, weights, chunk, part, first, last, z)
            else:
                z, chosen = tile_of(keep, kept_rows, first, last), None if active is None else active[part]
                z = z[part] if active is None else z
            form(z, chosen, part, first, last, dz[:size])
            if size < len(dz):
                dz[size:] = 0
            if wants_hidden:
                multiply(dz, w, dx[whole], add=first > 0)
            if wants_weight:
                multiply(dz.t(), x[whole], target, add=gradients.started or start > 0)
            if wants_bias:
                gradients.bias[first:last] += dz.sum(0, dtype=torch.float32)
        gradients.finish_tile(first, last, target)
    gradients.started = True
    if wants_hidden:
        gradients.hidden[rows] = dx[:n].to(gradients.hidden.dtype)


def transform(tiles: Tiles, weights: Weights, chunk: Chunk, part: slice, first: int, last: int, z: Tensor) -> None:
    """What statistics does to logits, for logits formed again; nothing where logits are the products themselves."""
    inverse = None if chunk.inverse_temperature is None else chunk.inverse_temperature[part]
    if weights.head.bias is None and weights.head.logit_scale == 1 and weights.head.softcap == 0 and inverse is None:
        return
    state = new_state(len(z), chunk.ids.shape[1], entropy=False, sum_sq=False, like=z)
    head = weights.head
    tiles.statistics(
        z, chunk.ids[part], first, weights.bias(first, last), head.logit_scale, head.softcap, inverse, state
    )


class Coefficients(NamedTuple):
    """dz of n rows in terms of p and log p: the arguments of ``tiles.gradient``."""

    base: Tensor  # (n,)
    slope: Tensor | None  # (n,)
    square: Tensor | None  # (n,)
    picked: Tensor  # (n, K)
    complement: Tensor  # (n, K)

    def take(self, rows: Selection) -> Coefficients:
        slope, square = (None if x is None else x[rows] for x in (self.slope, self.square))
        return Coefficients(self.base[rows], slope, square, self.picked[rows], self.complement[rows])


def coefficients(
    logprobs: tuple[Tensor, Tensor],
    lse: Tensor | None = None,
    entropy: tuple[Tensor, Tensor] | None = None,
    sum_sq: tuple[Tensor, Tensor] | None = None,
) -> Coefficients:
    """Coefficients from d loss / d lse (n,), and (value, d loss / d value) of logprobs (n, K), entropy, sum_sq (n,).

    With q = log p: d log p_k / dz_j = 1(j = k) - p_j,  dH / dz_j = -p_j (q_j + H),  d sum p^2 / dz_j = 2 p_j (p_j - S).
    """
    value, picked = logprobs
    base = -picked.sum(1)
    if lse is not None:
        base = base + lse
    slope = square = None
    if entropy is not None:
        slope, base = -entropy[1], base - entropy[0] * entropy[1]
    if sum_sq is not None:
        square, base = 2 * sum_sq[1], base - 2 * sum_sq[0] * sum_sq[1]
    return Coefficients(base, slope, square, picked, -picked * torch.expm1(value))


def from_coefficients(
    tiles: Tiles, head: Head, chunk: Chunk, lse: Tensor, lse_low: Tensor, c: Coefficients, first_id: int = 0
) -> Form:
    """The form of add_gradients for a loss of log-probabilities; chunk, lse, lse_low and c are those of the n rows."""

    def form(z: Tensor, rows: Tensor | None, part: slice, first: int, last: int, out: Tensor) -> None:
        tiles.gradient(
            z,
            rows,
            chunk.ids[part],
            first_id + first,
            lse[part],
            lse_low[part],
            *c.take(part),
            head.logit_scale,
            head.softcap,
            None if chunk.inverse_temperature is None else chunk.inverse_temperature[part],
            out,
        )

    return form


def active_rows(c: Coefficients) -> Tensor | None:
    """Indices of the rows that have a gradient; None if all have."""
    active = (c.picked != 0).any(1) | (c.base != 0)
    for part in (c.slope, c.square):
        if part is not None:
            active |= part != 0
    found = active.nonzero()[:, 0]
    return None if len(found) == len(active) else found


def from_divergence(
    tiles: Tiles,
    head: Head,
    chunk: Chunk,
    teacher_kept: Tensor,
    student: Softmax,
    teacher: Softmax,
    kind: str,
    beta: float,
    center: Tensor,
    scale: Tensor,
) -> Form:
    """The form of add_gradients for a divergence of n rows from kept logits of a teacher."""

    def form(z: Tensor, rows: Tensor | None, part: slice, first: int, last: int, out: Tensor) -> None:
        tiles.divergence_gradient(
            z,
            tile_of(teacher_kept, len(chunk.x), first, last)[part],
            rows,
            student.lse[part],
            student.lse_low[part],
            teacher.lse[part],
            teacher.lse_low[part],
            kind,
            beta,
            center[part],
            scale[part],
            head.logit_scale,
            head.softcap,
            None if chunk.inverse_temperature is None else chunk.inverse_temperature[part],
            out,
        )

    return form
