"""The family's ops as every room but the reference runs them: passes over the rows of a batch, in pieces that fit.

One pass, for the rows that have a weight, piece by piece:

    softmax of the piece, logits kept;  loss(logprobs) -> d loss / d logprobs;  rows whose coefficients are all 0 leave;
    gradients of the rest from the kept logits: three products in all

A loss that needs whole sequences gets pieces of whole sequences. One that does not fit into the workspace goes through
the softmax alone first and then has its logits formed again: four products, for its rows only.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from m3kernels.policy_loss import losses
from m3kernels.policy_loss.schedule import (
    ROW_MULTIPLE,
    Chunk,
    Coefficients,
    Gradients,
    Selection,
    Softmax,
    Tiles,
    Weights,
    active_rows,
    add_gradients,
    block_rows,
    coefficients,
    from_coefficients,
    from_divergence,
    padded,
    softmax,
    subset,
    take,
    tile_of,
)
from m3kernels.policy_loss.types import Head, Tokens


def ops(tiles: Tiles) -> tuple[Callable[..., Any], ...]:
    """The family's ops over a room's tiles: linear_logprobs, its backward, linear_policy_loss, linear_distill_loss."""
    functions = (linear_logprobs, linear_logprobs_backward, linear_policy_loss, linear_distill_loss)
    return tuple(functools.partial(torch.no_grad()(function), tiles) for function in functions)


# -- log-probabilities ------------------------------------------------------------------------------------------------
def linear_logprobs(
    tiles: Tiles,
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    bias: Tensor | None,
    temperature: Tensor | None,
    logit_scale: float,
    softcap: float,
    first_id: int,
    entropy: bool,
    sum_sq: bool,
    save_logits: bool,
    workspace: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    head = Head(weight, bias, temperature, logit_scale, softcap)
    rows, vocabulary = len(hidden), len(weight)
    weights = Weights(head, rows)
    keep = tiles.empty(padded(rows) * vocabulary if save_logits else 0, hidden)
    block = rows if save_logits else min(block_rows(hidden), rows)
    parts = []
    for start in range(0, rows, block or 1):
        chunk = take(hidden, ids, temperature, slice(start, start + block))
        saved = keep if save_logits else None
        parts.append(softmax(tiles, weights, chunk, saved, entropy=entropy, sum_sq=sum_sq, first_id=first_id))
    empty = hidden.new_empty(0, dtype=torch.float32)
    if not parts:
        none = (empty.clone() for _ in range(4))
        return hidden.new_empty(ids.shape, dtype=torch.float32), *none, keep  # type: ignore[return-value]
    logprobs, lse, low = (torch.cat(column) for column in zip(*(part[:3] for part in parts), strict=True))
    entropies = torch.cat([part.entropy for part in parts if part.entropy is not None]) if entropy else empty
    squares = torch.cat([part.sum_sq for part in parts if part.sum_sq is not None]) if sum_sq else empty.clone()
    return logprobs, lse, low, entropies, squares, keep


def linear_logprobs_backward(
    tiles: Tiles,
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    bias: Tensor | None,
    temperature: Tensor | None,
    lse: Tensor,
    lse_low: Tensor,
    logits: Tensor,
    base: Tensor,
    slope: Tensor | None,
    square: Tensor | None,
    picked: Tensor,
    complement: Tensor,
    logit_scale: float,
    softcap: float,
    first_id: int,
    wants_hidden: bool,
    wants_weight: bool,
    wants_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    head = Head(weight, bias, temperature, logit_scale, softcap)
    weights = Weights(head, len(hidden))
    c = Coefficients(base, slope, square, picked, complement)
    active = active_rows(c)
    kept = padded(len(hidden))
    rows: Selection = slice(0, len(hidden))
    if active is not None:
        rows, c, lse, lse_low = active, c.take(active), lse[active], lse_low[active]
    chunk = take(hidden, ids, temperature, rows)
    gradients = Gradients(tiles, hidden, head, (wants_hidden, wants_weight, wants_bias), weight.dtype, 1)
    form = from_coefficients(tiles, head, chunk, lse, lse_low, c, first_id)
    add_gradients(tiles, weights, chunk, logits if logits.numel() else None, kept, active, form, gradients, rows)
    return gradients.results()


# -- one pass ---------------------------------------------------------------------------------------------------------
class Piece(NamedTuple):
    """Rows start..stop (of those that have a weight) to work on together; whether their logits fit the workspace."""

    start: int
    stop: int
    fits: bool


def pieces(segment: Tensor | None, rows: int, limit: int) -> list[Piece]:
    """Cut rows into pieces of at most limit: anywhere, into equal parts; or between segments (rows,)."""
    if segment is None:
        count = -(-rows // limit)
        bounds = [rows * i // count for i in range(count + 1)] if count else [0]
        return [Piece(a, b, True) for a, b in itertools.pairwise(bounds)]
    found: list[Piece] = []
    start = stop = 0
    for length in torch.unique_consecutive(segment, return_counts=True)[1].tolist():
        if stop > start and stop + length - start > limit:
            found.append(Piece(start, stop, stop - start <= limit))
            start = stop
        stop += length
    return [*found, Piece(start, stop, stop - start <= limit)] if stop > start else found


def linear_policy_loss(
    tiles: Tiles,
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    bias: Tensor | None,
    temperature: Tensor | None,
    token_weight: Tensor,
    advantages: Tensor | None,
    old_logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    sampler_logprobs: Tensor | None,
    teacher_logprobs: Tensor | None,
    sequence: Tensor | None,
    step: Tensor | None,
    logit_scale: float,
    softcap: float,
    loss: str,
    wants_hidden: bool,
    wants_weight: bool,
    wants_bias: bool,
    wide_weight_grad: bool,
    workspace: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    head = Head(weight, bias, temperature, logit_scale, softcap)
    streams = (advantages, old_logprobs, ref_logprobs, sampler_logprobs, teacher_logprobs, sequence, step)
    tokens = Tokens(token_weight, *streams)
    wanted = (wants_hidden, wants_weight, wants_bias)
    rows = token_weight.nonzero()[:, 0]
    whole = {"token": None, "step": step, "sequence": sequence}[losses.scope(loss, old_logprobs is not None)]
    limit = rows_within(workspace, 4 * len(weight))
    plan = pieces(None if whole is None else whole[rows], len(rows), limit)
    largest = max((piece.stop - piece.start for piece in plan if piece.fits), default=0)
    weights = Weights(head, largest or limit)
    keep = tiles.borrow(padded(largest) * len(weight), hidden) if any(wanted) else None
    dtype = torch.float32 if wide_weight_grad else weight.dtype
    gradients = Gradients(tiles, hidden, head, wanted, dtype, len(plan))
    tally, value = losses.Tally(hidden), hidden.new_zeros((), dtype=torch.float64)
    for piece in plan:
        everything = len(rows) == len(hidden)
        selection: Selection = slice(piece.start, piece.stop) if everything else rows[piece.start : piece.stop]
        chunk = take(hidden, ids, temperature, selection)
        n, kept_rows = len(chunk.ids), len(chunk.x)
        kept = keep[: kept_rows * len(weight)] if keep is not None and piece.fits else None
        found = (
            softmax(tiles, weights, chunk, kept, entropy=True, sum_sq=False)
            if piece.fits
            else softmax_in_blocks(tiles, weights, chunk)
        )
        c, total, details = differentiate(loss, found, tokens, rows[piece.start : piece.stop])
        tally.add(n, details)
        value += total
        if not any(wanted):
            continue
        active = active_rows(c)
        lse, lse_low = found.lse, found.lse_low
        if active is not None:
            selection, c = rows[piece.start : piece.stop][active], c.take(active)
            lse, lse_low = lse[active], lse_low[active]
            chunk = subset(chunk, active)
        tally.counts["rows_differentiated"] += len(chunk.ids)
        tally.counts["rows_recomputed"] += 0 if piece.fits else len(chunk.ids)
        form = from_coefficients(tiles, head, chunk, lse, lse_low, c)
        add_gradients(tiles, weights, chunk, kept, kept_rows, active, form, gradients, selection)
    if keep is not None:
        tiles.give_back(keep)
    keep = kept = None  # not held while dW is rounded: the peak is that of the loop
    return value.float(), *gradients.results(), tally.metrics()


def rows_within(workspace: int, row_bytes: int) -> int:
    """Rows of logits that fit, at least 1; a multiple of what products are padded to, where there are as many."""
    rows = max(workspace // row_bytes, 1)
    return rows // ROW_MULTIPLE * ROW_MULTIPLE or rows


def softmax_in_blocks(tiles: Tiles, weights: Weights, chunk: Chunk) -> Softmax:
    """The softmax of more rows than the workspace has room for, block by block."""
    block = block_rows(chunk.x)
    parts = []
    for start in range(0, len(chunk.ids), block):
        piece = subset(chunk, slice(start, start + block))
        parts.append(softmax(tiles, weights, piece, None, entropy=True, sum_sq=False))
    entropies = torch.cat([part.entropy for part in parts if part.entropy is not None])
    logprobs, lse, low = (torch.cat(column) for column in zip(*(part[:3] for part in parts), strict=True))
    return Softmax(logprobs, lse, low, entropies, None)


def differentiate(
    loss: str | losses.TokenLoss, found: Softmax, tokens: Tokens, rows: Tensor
) -> tuple[Coefficients, Tensor, losses.Details]:
    """(coefficients of dz, weighted sum of the losses, details) of n tokens, by autograd on n numbers."""
    assert found.entropy is not None
    with torch.inference_mode(False), torch.enable_grad():
        tokens = tokens.take(rows)
        single = found.logprobs.shape[1] == 1
        logprobs = (found.logprobs[:, 0] if single else found.logprobs).clone().requires_grad_()
        entropy = found.entropy.clone().requires_grad_()
        values, details = losses.evaluate(loss, logprobs, tokens, entropy)
        total = losses.total(values, tokens)
        grads: tuple[Tensor | None, ...] = (None, None)
        if total.requires_grad:
            grads = torch.autograd.grad(total, (logprobs, entropy), allow_unused=True)
    d_logprobs = torch.zeros_like(found.logprobs) if grads[0] is None else grads[0].reshape(found.logprobs.shape)
    d_entropy = None if grads[1] is None else (found.entropy, grads[1])
    return coefficients((found.logprobs, d_logprobs), entropy=d_entropy), total.detach(), details


# -- divergence from a teacher's head ---------------------------------------------------------------------------------
def linear_distill_loss(
    tiles: Tiles,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    temperature: Tensor | None,
    token_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    logit_scale: float,
    softcap: float,
    teacher_logit_scale: float,
    teacher_softcap: float,
    kind: str,
    beta: float,
    wants_hidden: bool,
    wants_weight: bool,
    wants_bias: bool,
    wide_weight_grad: bool,
    workspace: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    head = Head(weight, bias, temperature, logit_scale, softcap)
    teacher = Head(teacher_weight, teacher_bias, temperature, teacher_logit_scale, teacher_softcap)
    wanted = (wants_hidden, wants_weight, wants_bias)
    rows = token_weight.nonzero()[:, 0]
    plan = pieces(None, len(rows), rows_within(workspace, 8 * len(weight)))
    largest = max((piece.stop - piece.start for piece in plan), default=0)
    weights, teacher_weights = Weights(head, largest), Weights(teacher, largest)
    teacher_weights.columns = weights.columns
    keep, teacher_keep = (tiles.borrow(padded(largest) * len(weight), hidden) for _ in range(2))
    dtype = torch.float32 if wide_weight_grad else weight.dtype
    gradients = Gradients(tiles, hidden, head, wanted, dtype, len(plan))
    tally, value = losses.Tally(hidden), hidden.new_zeros((), dtype=torch.float64)
    no_ids = torch.full((len(hidden), 1), -1, dtype=torch.int64, device=hidden.device)
    for piece in plan:
        selection = rows[piece.start : piece.stop]
        chunk, teacher_chunk = (take(x, no_ids, temperature, selection) for x in (hidden, teacher_hidden))
        n, kept_rows = len(chunk.ids), len(chunk.x)
        kept, teacher_kept = (x[: kept_rows * len(weight)] for x in (keep, teacher_keep))
        found = softmax(tiles, weights, chunk, kept, entropy=True, sum_sq=False)
        other = softmax(tiles, teacher_weights, teacher_chunk, teacher_kept, entropy=False, sum_sq=False)
        divergence, center = (torch.zeros_like(found.lse) for _ in range(2))
        for first, last in weights.spans():
            z, t = (tile_of(x, kept_rows, first, last)[:n] for x in (kept, teacher_kept))
            tiles.divergence(z, t, found.lse, found.lse_low, other.lse, other.lse_low, kind, beta, divergence, center)
        scale = token_weight[selection]
        assert found.entropy is not None
        value += (divergence * scale).sum()
        tally.add(n, {"kl": divergence, "entropy": found.entropy})
        if any(wanted):
            tally.counts["rows_differentiated"] += n
            form = from_divergence(tiles, head, chunk, teacher_kept, found, other, kind, beta, center, scale)
            add_gradients(tiles, weights, chunk, kept, kept_rows, None, form, gradients, selection)
    tiles.give_back(keep)
    tiles.give_back(teacher_keep)
    return value.float(), *gradients.results(), tally.metrics()
