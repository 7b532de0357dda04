"""Tile kernels in plain torch: what a room does to a tile of logits around the matrix products of the schedule.

A tile is R rows (tokens) by C columns (a run of the vocabulary that starts at index ``first``). With raw products z:

    u = logit_scale * (z + bias);   u = softcap * tanh(u / softcap) if softcap > 0;   z' = u * inverse_temperature

``statistics`` turns z into z' and adds the tile to an online softmax; ``gradient`` gives d loss / d z; ``divergence``
and ``divergence_gradient`` do the same for two models' logits. A room has four functions of these names and arguments,
and writes only into ``logits`` (or ``student``), ``state``, ``value``, ``center`` and ``out``. Ids outside the tile are
skipped. A log sum exp comes in two parts, rounded (lse) and what rounding took (lse_low). Every row is computed by
itself, so results depend neither on the other rows nor on the number of threads.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class State(NamedTuple):
    """Online softmax of R rows, K ids each; fp32 (fp64 for fp64 tiles). m is ``maximum``."""

    maximum: Tensor  # (R,) max z' so far, from -inf
    total: Tensor  # (R,) sum exp(z' - m)
    picked: Tensor  # (R, K) z' at the ids, from -inf
    weighted: Tensor | None  # (R,) sum exp(z' - m) * (z' - m): entropy = log(total) - weighted / total
    squared: Tensor | None  # (R,) sum exp(2 (z' - m)): sum p^2 = squared / total^2


def new_state(rows: int, ids: int, *, entropy: bool, sum_sq: bool, like: Tensor) -> State:
    """A State of no tile yet, on the device of ``like``; fp64 if ``like`` is."""
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    zeros = like.new_zeros(3, rows, dtype=dtype)
    infinite = like.new_full((rows * (ids + 1),), -torch.inf, dtype=dtype)
    return State(
        infinite[:rows], zeros[0], infinite[rows:].view(rows, ids), zeros[1] if entropy else None,
        zeros[2] if sum_sq else None,
    )  # fmt: skip


def in_tile(ids: Tensor, first: int, columns: int) -> tuple[Tensor, Tensor]:
    """(column of each id, 0 where it is not in the tile; whether it is)."""
    inside = (ids >= first) & (ids < first + columns)
    return torch.where(inside, ids - first, 0), inside


def statistics(
    logits: Tensor,
    ids: Tensor,
    first: int,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float,
    inverse_temperature: Tensor | None,
    state: State,
) -> None:
    """Transform ``logits`` (R, C) in place to z' and add them to ``state``; ids (R, K), bias (C,), temperature (R,)."""
    if bias is not None:
        logits += bias
    if logit_scale != 1.0:
        logits *= logit_scale
    if softcap > 0:
        logits.div_(softcap).tanh_().mul_(softcap)
    if inverse_temperature is not None:
        logits *= inverse_temperature[:, None]
    z = logits.to(state.total.dtype)
    maximum = torch.maximum(state.maximum, z.amax(1)) if z.shape[1] else state.maximum
    shift = torch.where(state.maximum.isinf(), 0.0, state.maximum - maximum)  # 0 before the first tile: its sums are 0
    factor = shift.exp()
    z = z - torch.where(maximum == -torch.inf, 0.0, maximum)[:, None]
    e = z.exp()
    if state.weighted is not None:
        terms = torch.where(e == 0, 0.0, e * z)
        state.weighted.add_(state.total * shift).mul_(factor).add_(terms.sum(1))
    if state.squared is not None:
        state.squared.mul_(factor * factor).add_(e.square().sum(1))
    state.total.mul_(factor).add_(e.sum(1))
    state.maximum.copy_(maximum)
    column, inside = in_tile(ids, first, logits.shape[1])
    if logits.shape[1]:
        state.picked.copy_(torch.where(inside, logits.gather(1, column).to(state.picked.dtype), state.picked))


def chain(
    g: Tensor, z: Tensor, logit_scale: float, softcap: float, inverse_temperature: Tensor | None, out: Tensor
) -> None:
    """out = g * dz'/dz, from d loss / dz' and z'."""
    if softcap > 0:
        u = z if inverse_temperature is None else z / inverse_temperature[:, None]
        g = g * (1 - (u / softcap).square())
    if inverse_temperature is not None:
        g = g * inverse_temperature[:, None]
    out.copy_(g * logit_scale)


def gradient(
    logits: Tensor,
    rows: Tensor | None,
    ids: Tensor,
    first: int,
    lse: Tensor,
    lse_low: Tensor,
    base: Tensor,
    slope: Tensor | None,
    square: Tensor | None,
    picked: Tensor,
    complement: Tensor,
    logit_scale: float,
    softcap: float,
    inverse_temperature: Tensor | None,
    out: Tensor,
) -> None:
    """out = dz'/dz * d loss / dz', with p = exp(q), q = (z' - lse) - lse_low:

        d loss / dz' = p * (base + slope * q + square * p), and at each of the ids k  + p * picked[k] + complement[k]

    Where base is -picked, as for one log-probability, a complement of -picked * expm1(log p) makes the gradient at the
    id exact however near p is to 1. ``rows`` (n,) int64 names rows of ``logits`` (None: all); everything else is
    (n, ...). ``out`` may be ``logits``.
    """
    z = (logits if rows is None else logits[rows]).to(lse.dtype)
    q = (z - lse[:, None]) - lse_low[:, None]
    p = q.exp()
    g = base[:, None]
    if slope is not None:
        g = g + slope[:, None] * torch.where(p == 0, 0.0, q)
    if square is not None:
        g = g + square[:, None] * p
    column, inside = in_tile(ids, first, logits.shape[1])
    hits = torch.zeros_like(p)
    if logits.shape[1]:
        hits.scatter_add_(1, column, torch.where(inside, picked, 0.0))
    g = p * (g + hits)
    if logits.shape[1]:
        g.scatter_add_(1, column, torch.where(inside, complement, 0.0))
    chain(g, z, logit_scale, softcap, inverse_temperature, out)


def mixture(log_p: Tensor, log_t: Tensor, beta: float) -> Tensor:
    """log(beta * t + (1 - beta) * p), 0 < beta < 1."""
    return torch.logaddexp(log_t + math.log(beta), log_p + math.log(1 - beta))


def terms(p: Tensor, difference: Tensor) -> Tensor:
    """p * difference, 0 where p is."""
    return torch.where(p == 0, 0.0, p * difference)


def divergence(
    student: Tensor,
    teacher: Tensor,
    student_lse: Tensor,
    student_low: Tensor,
    teacher_lse: Tensor,
    teacher_low: Tensor,
    kind: str,
    beta: float,
    value: Tensor,
    center: Tensor,
) -> None:
    """Add a tile's share of the divergence in nats to ``value`` (R,), and what its gradient subtracts to ``center``.

    forward: KL(t || p);  reverse: KL(p || t);  js: beta KL(t || m) + (1 - beta) KL(p || m), m = beta t + (1 - beta) p.
    """
    log_p = (student.to(value.dtype) - student_lse[:, None]) - student_low[:, None]
    log_t = (teacher.to(value.dtype) - teacher_lse[:, None]) - teacher_low[:, None]
    p, t = log_p.exp(), log_t.exp()
    if kind == "forward":
        value += terms(t, log_t - log_p).sum(1)
    elif kind == "reverse":
        share = terms(p, log_p - log_t).sum(1)
        value += share
        center += share
    else:
        log_m = mixture(log_p, log_t, beta)
        share = (1 - beta) * terms(p, log_p - log_m).sum(1)
        value += beta * terms(t, log_t - log_m).sum(1) + share
        center += share


def divergence_gradient(
    student: Tensor,
    teacher: Tensor,
    rows: Tensor | None,
    student_lse: Tensor,
    student_low: Tensor,
    teacher_lse: Tensor,
    teacher_low: Tensor,
    kind: str,
    beta: float,
    center: Tensor,
    weight: Tensor,
    logit_scale: float,
    softcap: float,
    inverse_temperature: Tensor | None,
    out: Tensor,
) -> None:
    """out = weight * d divergence / dz of the student's raw logits; ``rows`` and ``out`` as in ``gradient``."""
    z, other = ((x if rows is None else x[rows]).to(weight.dtype) for x in (student, teacher))
    log_p = (z - student_lse[:, None]) - student_low[:, None]
    log_t = (other - teacher_lse[:, None]) - teacher_low[:, None]
    p = log_p.exp()
    if kind == "forward":
        g = p - log_t.exp()
    elif kind == "reverse":
        g = terms(p, log_p - log_t - center[:, None])
    else:
        g = terms(p, (1 - beta) * (log_p - mixture(log_p, log_t, beta)) - center[:, None])
    chain(g * weight[:, None], z, logit_scale, softcap, inverse_temperature, out)
