"""Losses over a linear head in plain torch, fp64, logits and all: the contract that every other room is tested against.

    z = softcap(logit_scale * (hidden @ weight.T + bias)) / temperature,    logprobs = z[ids] - logsumexp(z)
    loss = sum_t token_weight[t] * loss_t(logprobs, streams),               gradients by autograd through all of it

The losses themselves stand in losses.py, once for all rooms; here they are differentiated through full fp64 logits.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from m3kernels.policy_loss import losses
from m3kernels.policy_loss.schedule import padded
from m3kernels.policy_loss.types import Head, Tokens, wide_dtype

# Error of a result against fp64, as a multiple c of the error of torch in the same dtype (full logits, autograd), plus
# eps relative to the largest value: RMS and max. c is 1.5 because fp32 sums in another order differ by about that.
TOLERANCE = {"c": 1.5, "eps": 1e-6}


def make_inputs(
    tokens: int,
    hidden_size: int,
    vocabulary: int,
    *,
    sequences: int = 1,
    density: float = 1.0,
    dtype: torch.dtype = torch.float32,
    bias: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """Arguments of linear_policy_loss for a packed batch: streams a little off this policy, as after some updates.

    Keys: hidden (T, D), weight (V, D), bias (V,) or None, ids (T,), advantages, old_logprobs, ref_logprobs,
    sampler_logprobs, mask (T,), cu_seqlens, segment_ids (runs of 1 to 7 tokens).
    """
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, hidden_size, generator=g).to(dtype)
    weight = (torch.randn(vocabulary, hidden_size, generator=g) * 2 / hidden_size**0.5).to(dtype)
    offset = torch.randn(vocabulary, generator=g).to(dtype) if bias else None
    ids = torch.randint(0, vocabulary, (tokens,), generator=g)
    logits = hidden.double() @ weight.double().T + (0 if offset is None else offset.double())
    logprobs = logits.log_softmax(-1).gather(1, ids[:, None])[:, 0].float()
    near = [logprobs + scale * torch.randn(tokens, generator=g) for scale in (0.3, 0.5, 0.2)]
    cuts = torch.randperm(max(tokens - 1, 0), generator=g)[: sequences - 1].sort().values + 1
    bounds = torch.cat([torch.zeros(1, dtype=torch.int64), cuts, torch.tensor([tokens])])
    steps = torch.repeat_interleave(torch.arange(tokens), torch.randint(1, 8, (tokens,), generator=g))[:tokens]
    return {
        "hidden": hidden,
        "weight": weight,
        "bias": offset,
        "ids": ids,
        "advantages": torch.randn(tokens, generator=g),
        "old_logprobs": near[0],
        "ref_logprobs": near[1],
        "sampler_logprobs": near[0] + near[2] - logprobs,
        "mask": torch.rand(tokens, generator=g) < density,
        "cu_seqlens": bounds,
        "segment_ids": steps,
    }


def unsupported(op: str, *args: Tensor) -> str:
    """The losses look at values; log-probabilities do not."""
    return f"{op} needs data: meta tensors have none" if op.endswith("_loss") and args and args[0].is_meta else ""


def logits64(hidden: Tensor, head: Head) -> Tensor:
    """(T, V) fp64."""
    u = hidden.double() @ head.weight.double().T
    if head.bias is not None:
        u = u + head.bias.double()
    u = u * head.logit_scale
    if head.softcap > 0:
        u = head.softcap * torch.tanh(u / head.softcap)
    return u if head.temperature is None else u / head.temperature.double()[:, None]


def linear_logprobs(
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
    logits = logits64(hidden, Head(weight, bias, temperature, logit_scale, softcap))
    lse = logits.logsumexp(-1)
    logp = logits - lse[:, None]
    inside = (ids >= first_id) & (ids < first_id + len(weight))
    picked = torch.where(inside, logp.gather(1, torch.where(inside, ids - first_id, 0)), -torch.inf)
    p = logp.exp()
    empty = logits.new_empty(0)
    found = (
        picked.clamp(max=0),
        lse,
        lse - lse.to(wide_dtype(hidden)).double(),
        losses.expectation(logp, -logp) if entropy else empty,
        p.square().sum(-1) if sum_sq else empty,
        F.pad(logits, (0, 0, 0, padded(len(logits)) - len(logits))).reshape(-1) if save_logits else empty,
    )
    logprobs, lse, low, entropies, squares, saved = (x.to(wide_dtype(hidden), copy=True) for x in found)
    return logprobs, lse, low, entropies, squares, saved


def linear_logprobs_backward(
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
    z = logits64(hidden, head)
    q = z - lse.double()[:, None] - lse_low.double()[:, None]
    p = q.exp()
    g = p * base.double()[:, None]
    if slope is not None:
        g += slope.double()[:, None] * torch.where(p == 0, 0.0, p * q)
    if square is not None:
        g += square.double()[:, None] * p * p
    inside = (ids >= first_id) & (ids < first_id + len(weight))
    column = torch.where(inside, ids - first_id, 0)
    at_ids = picked.double() * p.gather(1, column) + complement.double()
    g.scatter_add_(1, column, torch.where(inside, at_ids, 0.0))
    if temperature is not None:
        g /= temperature.double()[:, None]
        z = z * temperature.double()[:, None]
    if softcap > 0:
        g *= 1 - (z / softcap).square()
    g *= logit_scale
    return gradients(g, hidden, weight, bias, (wants_hidden, wants_weight, wants_bias), weight.dtype)


def gradients(
    g: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, wanted: tuple[bool, bool, bool], dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """(dX, dW, db) from d loss / d (hidden @ weight.T + bias), (T, V) fp64; 0 elements where not wanted."""
    empty = g.new_empty(0)
    d_hidden = g @ weight.double() if wanted[0] else empty
    d_weight = g.T @ hidden.double() if wanted[1] else empty
    return d_hidden.to(hidden.dtype), d_weight.to(dtype), (g.sum(0) if wanted[2] else empty.clone()).to(weight.dtype)


def linear_policy_loss(
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
    streams = (advantages, old_logprobs, ref_logprobs, sampler_logprobs, teacher_logprobs)
    with torch.inference_mode(False), torch.enable_grad():
        adv, old, ref, sampler, teacher = (None if x is None else x.double() for x in streams)
        rows = token_weight.nonzero()[:, 0]
        tokens = Tokens(token_weight.double(), adv, old, ref, sampler, teacher, sequence, step).take(rows)
        raw = [None if x is None else x.detach().double().clone().requires_grad_() for x in (hidden, weight, bias)]
        x, w, b = raw
        assert x is not None and w is not None
        scale = None if temperature is None else temperature[rows]
        logp = logits64(x[rows], Head(w, b, scale, logit_scale, softcap)).log_softmax(-1)
        entropy = losses.expectation(logp, -logp)
        logprobs = logp.gather(1, ids[rows])
        values, details = losses.evaluate(loss, logprobs[:, 0] if ids.shape[1] == 1 else logprobs, tokens, entropy)
        total = losses.total(values, tokens)
        found = differentiate(total, raw, (wants_hidden, wants_weight, wants_bias))
        counts = dict.fromkeys(["rows_differentiated"], 0)
        if wants_hidden or wants_weight or wants_bias:
            slopes = differentiate(total, [logprobs, entropy, None], (True, True, False))
            counts["rows_differentiated"] = int(((slopes[0] != 0).any(1) | (slopes[1] != 0)).sum())
    metrics = losses.metrics(details, counts, len(rows), hidden)
    return total.detach().to(wide_dtype(hidden)), *narrow(found, hidden, weight, wide_weight_grad), metrics


def differentiate(total: Tensor, inputs: list[Tensor | None], wanted: tuple[bool, bool, bool]) -> list[Tensor]:
    """fp64 gradients of total; 0 elements where not wanted, zeros where total does not depend on the input."""
    found = []
    for x, want in zip(inputs, wanted, strict=True):
        if x is None or not want:
            found.append(total.new_empty(0))
        elif not total.requires_grad:
            found.append(torch.zeros_like(x))
        else:
            found.append(torch.autograd.grad(total, x, retain_graph=True, materialize_grads=True)[0])
    return found


def narrow(
    found: list[Tensor], hidden: Tensor, weight: Tensor, wide_weight_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    d_hidden, d_weight, d_bias = (x.detach() for x in found)
    dtype = wide_dtype(hidden) if wide_weight_grad else weight.dtype
    return d_hidden.to(hidden.dtype), d_weight.to(dtype), d_bias.to(weight.dtype)


def linear_distill_loss(
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
    with torch.inference_mode(False), torch.enable_grad():
        rows = token_weight.nonzero()[:, 0]
        scale = None if temperature is None else temperature[rows]
        head = Head(teacher_weight, teacher_bias, scale, teacher_logit_scale, teacher_softcap)
        teacher = logits64(teacher_hidden[rows], head).log_softmax(-1)
        raw = [None if x is None else x.detach().double().clone().requires_grad_() for x in (hidden, weight, bias)]
        x, w, b = raw
        assert x is not None and w is not None
        student = logits64(x[rows], Head(w, b, scale, logit_scale, softcap)).log_softmax(-1)
        values = losses.divergence(student, teacher, kind, beta)
        total = (values * token_weight[rows].double()).sum()
        found = differentiate(total, raw, (wants_hidden, wants_weight, wants_bias))
    student = student.detach()
    details = {"kl": values.detach(), "entropy": losses.expectation(student, -student)}
    differentiated = len(rows) if wants_hidden or wants_weight or wants_bias else 0
    metrics = losses.metrics(details, {"rows_differentiated": differentiated}, len(rows), hidden)
    return total.detach().to(wide_dtype(hidden)), *narrow(found, hidden, weight, wide_weight_grad), metrics
