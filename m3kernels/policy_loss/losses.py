"""Every loss of the family, once, in plain torch on log-probabilities: the only definition there is.

A loss is called as ``loss(logprobs, tokens, entropy)`` with logprobs (n,) (or (n, K)), the streams of the same n tokens
and their entropy (n,) or None, and returns the losses (n,) of the tokens, before their weights. The reference, the
two-phase path (linear_logprobs, then a loss) and the one-pass path (gradients formed in the forward pass) all
differentiate these few lines. Sources: two-sided clip arXiv 1707.06347, dual clip 1912.09729, held sequence ratio
2507.18071, one-sided clip 2506.13585, KL estimators Schulman 2020, generalised JS 2306.13649, clip_forward 2602.06570.
"""

from __future__ import annotations

import ast
import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from m3kernels.checks import describe, is_strided, refuse
from m3kernels.policy_loss.types import COUNTS, METRICS, DistillSpec, LossSpec, Tokens

LOG_RATIO_LIMIT = 20.0  # nats; a ratio beyond e^20 is no information, and exp must not overflow
SMALLEST_TAIL = 2.0**-23  # probability of "all other ids" below which its logarithm is not resolved in fp32

Details = dict[str, Tensor]  # metric -> its value at each token
TokenLoss = Callable[[Tensor, Tokens, "Tensor | None"], "Tensor | tuple[Tensor, Details]"]


# -- parts ------------------------------------------------------------------------------------------------------------
def segment_sum(values: Tensor, segment: Tensor | None) -> tuple[Tensor, Tensor]:
    """(sum over its segment, tokens of its segment), both fp64 at each token; a segment is a run of equal indices."""
    values = values.double()
    if segment is None or not len(values):
        return values.sum().expand_as(values), torch.full_like(values, len(values))
    _, index, counts = torch.unique_consecutive(segment, return_inverse=True, return_counts=True)
    sums = torch.segment_reduce(values, "sum", lengths=counts, axis=0)
    return sums[index], counts[index].double()


def log_ratio(logprobs: Tensor, tokens: Tokens, level: str) -> Tensor:
    """log r (n,): of the token; or, of its step or sequence, sg[mean log r] + log pi - sg[log pi]."""
    held = logprobs.detach()
    if tokens.old_logprobs is None:
        return logprobs - held
    own = (logprobs - tokens.old_logprobs).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    if level == "token":
        return own
    total, count = segment_sum(own.detach(), tokens.sequence if level == "sequence" else tokens.step)
    return (total / count).to(own.dtype) + logprobs - held


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, estimator: str) -> Tensor:
    """KL(pi || ref) in nats from the sampled token alone: k1 = d, k2 = d^2 / 2, k3 = exp(-d) + d - 1."""
    d = (logprobs - ref_logprobs).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    if estimator == "k1":
        return d
    return d.square() / 2 if estimator == "k2" else torch.expm1(-d) + d


def sampler_weight(logprobs: Tensor, tokens: Tokens, spec: LossSpec) -> Tensor:
    """w (n,): importance of the sampler's tokens under the old policy, truncated or masked."""
    assert tokens.sampler_logprobs is not None
    old = logprobs.detach() if tokens.old_logprobs is None else tokens.old_logprobs
    log_w = old - tokens.sampler_logprobs
    if spec.sampler_level == "sequence":
        log_w = segment_sum(log_w, tokens.sequence)[0].to(log_w.dtype)
    w = log_w.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    if spec.sampler_mode == "truncate":
        return w.clamp(max=spec.sampler_high)
    return torch.where((w >= spec.sampler_low) & (w <= spec.sampler_high), w, 0.0)


# -- policy losses ----------------------------------------------------------------------------------------------------
def policy_loss(logprobs: Tensor, tokens: Tokens, entropy: Tensor | None, spec: LossSpec) -> tuple[Tensor, Details]:
    """Losses (n,) of a LossSpec, and what its metrics are made of. Formulas: LossSpec."""
    advantages = tokens.advantages
    assert advantages is not None
    ratio = log_ratio(logprobs, tokens, spec.ratio_level).exp()
    r = ratio.detach()
    details = {"ratio_mean": r, "ratio_max": r, "approx_kl": approx_kl(logprobs, tokens)}
    uses_kl = spec.kl_coef > 0
    if uses_kl:
        assert tokens.ref_logprobs is not None
        here = logprobs.detach() if tokens.old_logprobs is None else tokens.old_logprobs
        policy = here if spec.kl_in == "reward" else logprobs
        kl = kl_estimate(policy, tokens.ref_logprobs, spec.kl_estimator)
        details["kl"] = kl.detach()
        if spec.kl_in == "reward":
            advantages = advantages - spec.kl_coef * kl

    low, high = 1 - spec.clip_low, 1 + spec.clip_high
    if spec.clip == "two_sided":
        objective = torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages)
        details["clip_low"] = (r < low) & (advantages < 0)
        details["clip_high"] = (r > high) & (advantages > 0)
        if spec.dual_clip is not None:
            bound = spec.dual_clip * advantages
            objective = torch.where(advantages < 0, torch.maximum(objective, bound), objective)
            details["dual_clip"] = (r > spec.dual_clip) & (advantages < 0)
    elif spec.clip == "one_sided":
        objective = r.clamp(max=high) * advantages * logprobs
        details["clip_high"] = r > high
    else:
        objective = ratio * advantages

    if spec.sampler_level is not None:
        w = sampler_weight(logprobs, tokens, spec)
        objective = objective * w
        details["sampler_weight"] = w
    losses = -objective
    if uses_kl and spec.kl_in == "loss":
        losses = losses + spec.kl_coef * (kl * ratio if spec.kl_ratio_weighted else kl)
    if entropy is not None:
        details["entropy"] = entropy.detach()
        if spec.entropy_coef > 0:
            losses = losses - spec.entropy_coef * entropy
    return losses, details


def approx_kl(logprobs: Tensor, tokens: Tokens) -> Tensor:
    """k3 estimate (n,) of KL(old || new): how far this policy has moved from the one that acted."""
    old = logprobs if tokens.old_logprobs is None else tokens.old_logprobs
    return kl_estimate(old.detach(), logprobs.detach(), "k3")


# -- distillation from log-probabilities ------------------------------------------------------------------------------
def distill_loss(logprobs: Tensor, tokens: Tokens, spec: DistillSpec) -> Tensor:
    """Losses (n,) of a DistillSpec; logprobs (n, K) or (n,), teacher_logprobs alike."""
    assert tokens.teacher_logprobs is not None
    student = logprobs[:, None] if logprobs.ndim == 1 else logprobs
    teacher = tokens.teacher_logprobs.view(student.shape)
    if spec.divergence == "clip_forward":
        return torch.where(student >= teacher, 0.0, -student).sum(1)
    student, teacher = (torch.cat([x, tail(x)], 1) for x in (student, teacher))
    return divergence(student, teacher, spec.divergence, spec.beta)


def tail(logprobs: Tensor) -> Tensor:
    """(n, 1) log-probability of all the ids that are not among the K."""
    return torch.log1p(-logprobs.exp().sum(1, keepdim=True).clamp(max=1 - SMALLEST_TAIL))


def divergence(student: Tensor, teacher: Tensor, kind: str, beta: float) -> Tensor:
    """(n,) divergence in nats between two distributions given as log-probabilities (n, C). Kinds: DistillSpec."""
    if kind == "forward":
        return expectation(teacher, teacher - student)
    if kind == "reverse":
        return expectation(student, student - teacher)
    mixture = torch.logaddexp(teacher + math.log(beta), student + math.log1p(-beta))
    return beta * expectation(teacher, teacher - mixture) + (1 - beta) * expectation(student, student - mixture)


def expectation(logprobs: Tensor, values: Tensor) -> Tensor:
    """sum of exp(logprobs) * values; outcomes of probability 0 count 0 whatever their value, nan is nan."""
    possible = logprobs != -torch.inf
    return (torch.where(possible, logprobs, -torch.inf).exp() * torch.where(possible, values, 0.0)).sum(1)


# -- a loss as a function, its metrics as numbers ---------------------------------------------------------------------
@functools.lru_cache(maxsize=256)
def from_text(text: str) -> LossSpec | DistillSpec:
    """The spec whose ``to_text`` gave ``text``."""
    kind, *parts = text.split(" ")
    pairs = (part.partition("=") for part in parts)
    fields: dict[str, Any] = {name: ast.literal_eval(value) for name, _, value in pairs}
    return LossSpec(**fields) if kind == "policy" else DistillSpec(**fields)


def evaluate(loss: str | TokenLoss, logprobs: Tensor, tokens: Tokens, entropy: Tensor | None) -> tuple[Tensor, Details]:
    """(losses (n,) before weights, details) of a spec's text or of a user's function, which may leave details out."""
    if not isinstance(loss, str):
        found = loss(logprobs, tokens, entropy)
        values, details = found if isinstance(found, tuple) and len(found) == 2 else (found, {})
        check_losses(values, details, tokens.weight)
        return values, details
    spec = from_text(loss)
    if isinstance(spec, LossSpec):
        return policy_loss(logprobs, tokens, entropy, spec)
    details = {} if entropy is None else {"entropy": entropy.detach()}
    return distill_loss(logprobs, tokens, spec), details


def total(values: Tensor, tokens: Tokens) -> Tensor:
    """The weighted sum of losses (n,)."""
    return (values * tokens.weight).sum()


def check_losses(values: object, details: object, weight: Tensor) -> None:
    """What a user's function may return. Raises ValueError."""
    n, device = tuple(weight.shape), weight.device
    good = is_strided(values) and values.shape == weight.shape and values.is_floating_point()
    if not good or values.device != device:  # type: ignore[attr-defined]
        raise refuse("policy_loss", "spec", f"a function that returns losses {n} floating point on {device}", values)
    good = isinstance(details, dict) and not set(details) - set(METRICS) | set(details) & set(COUNTS)
    for value in details.values() if good else ():  # type: ignore[attr-defined]
        good = good and is_strided(value) and value.shape == weight.shape and value.device == device
    if not good:
        got = str({str(k): describe(v) for k, v in details.items()}) if isinstance(details, dict) else details
        names = ", ".join(METRICS[: -len(COUNTS)])
        raise refuse("policy_loss", "spec", f"a function whose details are {n} tensors named {names}", got)


def scope(loss: str | TokenLoss, has_old_logprobs: bool) -> str:
    """What of a token's company its loss must see at once: "token", "step" or "sequence".

    Without old log-probabilities every ratio is 1, whatever its level.
    """
    if not isinstance(loss, str):
        return getattr(loss, "scope", "token")
    spec = from_text(loss)
    if not isinstance(spec, LossSpec):
        return "token"
    if spec.sampler_level == "sequence":
        return "sequence"
    return spec.ratio_level if has_old_logprobs else "token"


class Tally:
    """Metrics of a call, gathered piece by piece in fp64: means over tokens, a maximum, counts of rows."""

    def __init__(self, like: Tensor) -> None:
        self.sums = torch.zeros(len(METRICS), dtype=torch.float64, device=like.device)
        self.counts = dict.fromkeys(COUNTS, 0)

    def add(self, rows: int, details: Details) -> None:
        """Count rows whose details are (rows,) tensors."""
        self.counts["tokens"] += rows
        self.counts["rows_computed"] += rows
        for name, values in details.items():
            place = METRICS.index(name)
            if name != "ratio_max":
                self.sums[place] += values.sum(dtype=torch.float64)
            elif rows:
                self.sums[place] = torch.maximum(self.sums[place], values.max())

    def metrics(self) -> Tensor:
        """(len(METRICS),) fp64; 0 for what no detail told, and for means over no tokens."""
        found = self.sums.clone()
        for place, name in enumerate(METRICS):
            if name in self.counts:
                found[place] = self.counts[name]
            elif name != "ratio_max":
                found[place] /= max(self.counts["tokens"], 1)
        return found


def named(metrics: Tensor, loss: object) -> dict[str, Tensor]:
    """Those of the metrics (len(METRICS),) that a loss has a value for, by name."""
    asked = getattr(loss, "metrics", COUNTS)
    return {name: value for name, value in zip(METRICS, metrics.unbind(), strict=True) if name in asked}


def metrics(details: Details, counts: dict[str, int], rows: int, like: Tensor) -> Tensor:
    """The metrics of one piece that is the whole call."""
    tally = Tally(like)
    tally.add(rows, details)
    tally.counts |= counts
    return tally.metrics()
