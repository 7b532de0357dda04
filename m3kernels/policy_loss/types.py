"""Vocabulary of the policy_loss family: what a loss is made of, the head it reads, the streams of its tokens.

A loss is a function of the log-probabilities of T tokens; everything else about a token (advantage, old
log-probability, weight, sequence, step) is a stream beside it. ``losses.py`` computes with them, ``schedule.py`` runs
them over a head.
"""

from __future__ import annotations

import dataclasses
from types import NoneType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from m3kernels.checks import refuse

RATIO_LEVELS = ("token", "step", "sequence")
CLIPS = ("two_sided", "one_sided", "none")
KL_ESTIMATORS = ("k1", "k2", "k3")
AGGREGATIONS = ("token_mean", "sequence_mean", "constant")
DIVERGENCES = ("clip_forward", "forward", "reverse", "js")
LARGEST = 3.4e38  # of numbers: finite in fp32

# Means over the tokens with a weight, except the maximum and the counts of rows.
METRICS = (
    "ratio_mean",
    "ratio_max",
    "clip_low",  # share with ratio < 1 - clip_low and a negative advantage
    "clip_high",  # share with ratio > 1 + clip_high and a positive advantage; one_sided: and any advantage
    "dual_clip",  # share beyond dual_clip with a negative advantage
    "approx_kl",  # nats; k3 of the old policy against this one
    "kl",  # nats; the chosen estimator against the reference
    "entropy",  # nats
    "sampler_weight",
    "tokens",  # rows with a weight
    "rows_computed",  # rows whose logits were formed
    "rows_differentiated",  # of them, rows whose gradient was formed: those with a coefficient that is not 0
    "rows_recomputed",  # of them, rows whose logits were formed twice: their sequence exceeds the workspace
)
COUNTS = METRICS[-4:]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossSpec:
    """What a policy-gradient loss is made of. Per token, with r the ratio of new to old probability, A the advantage:

        two_sided  -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A), at most -dual_clip A where A < 0
        one_sided  -sg[min(r, 1 + clip_high)] A log pi
        none       -r A

    plus kl_coef * KL estimate, minus entropy_coef * entropy. sg[] is held constant in the gradient.

    Args:
        ratio_level: r of a token is its own ("token"), or sg[s] * pi / sg[pi] with s the geometric mean of the ratios
            of its "step" or "sequence". The form that differentiates s instead is not offered: it gives every token of
            a sequence the sequence's mean advantage (docs/numerics.md).
        clip, clip_low, clip_high, dual_clip: as above; dual_clip > 1 + clip_high, or None.
        kl_estimator: of KL(pi || ref) from one sample; with d = log pi - log ref: k1 = d, k2 = d^2 / 2,
            k3 = exp(-d) + d - 1.
        kl_coef: factor of the KL term, >= 0; needs ref_logprobs unless 0.
        kl_in: "loss" adds kl_coef * estimate to the loss and differentiates it; "reward" subtracts
            kl_coef * sg[estimate], taken at the old policy, from the advantage. k1 in the loss has a gradient of mean
            0: it regularises nothing.
        kl_ratio_weighted: multiplies the estimate in the loss by r, which makes k3's gradient unbiased off-policy.
        entropy_coef: factor of the entropy bonus, >= 0.
        sampler_level: None, or weigh each token by w = pi_old / mu, mu the policy of the sampler: of the "token", or
            the product over its "sequence". Needs sampler_logprobs.
        sampler_mode: "truncate": min(w, sampler_high); "mask": w where sampler_low <= w <= sampler_high, else 0.
        aggregation: "token_mean": sum over tokens / tokens; "sequence_mean": mean over sequences of their token means;
            "constant": sum over tokens / (sequences * constant_length). Sequences without a token do not count.
        constant_length: tokens, for "constant".
    Raises:
        ValueError: a field out of contract.
    """

    ratio_level: str = "token"
    clip: str = "two_sided"
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    kl_estimator: str = "k3"
    kl_coef: float = 0.0
    kl_in: str = "loss"
    kl_ratio_weighted: bool = False
    entropy_coef: float = 0.0
    sampler_level: str | None = None
    sampler_mode: str = "truncate"
    sampler_low: float = 0.0
    sampler_high: float = 2.0
    aggregation: str = "token_mean"
    constant_length: int | None = None

    def __post_init__(self) -> None:
        check_choice("LossSpec", "ratio_level", self.ratio_level, RATIO_LEVELS)
        check_choice("LossSpec", "clip", self.clip, CLIPS)
        check_choice("LossSpec", "kl_estimator", self.kl_estimator, KL_ESTIMATORS)
        check_choice("LossSpec", "kl_in", self.kl_in, ("loss", "reward"))
        check_choice("LossSpec", "sampler_level", self.sampler_level, (None, "token", "sequence"))
        check_choice("LossSpec", "sampler_mode", self.sampler_mode, ("truncate", "mask"))
        check_choice("LossSpec", "aggregation", self.aggregation, AGGREGATIONS)
        for name in ("clip_low", "clip_high", "kl_coef", "entropy_coef", "sampler_low"):
            self.set_number(name, at_least=0.0)
        self.set_number("sampler_high", at_least=max(self.sampler_low, 1e-30))
        if self.dual_clip is not None:
            self.set_number("dual_clip", at_least=1.0 + self.clip_high)
            if self.clip != "two_sided":
                raise refuse("LossSpec", "dual_clip", f"None with clip={self.clip!r}", self.dual_clip)
        check_flag("LossSpec", "kl_ratio_weighted", self.kl_ratio_weighted)
        if self.kl_ratio_weighted and self.kl_in != "loss":
            raise refuse("LossSpec", "kl_ratio_weighted", "False with kl_in='reward'", self.kl_ratio_weighted)
        check_length("LossSpec", self.aggregation, self.constant_length)

    def set_number(self, name: str, *, at_least: float) -> None:
        """Make a field a plain float: torch takes no integer beyond int64, to_text no number of another library."""
        object.__setattr__(self, name, check_number("LossSpec", name, getattr(self, name), at_least=at_least))

    @property
    def uses_entropy(self) -> bool:
        return self.entropy_coef > 0

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the metrics that this loss has a value for, in the order of METRICS."""
        absent = {"clip_low"} if self.clip == "one_sided" else set()
        absent |= {"clip_low", "clip_high"} if self.clip == "none" else set()
        absent |= set() if self.dual_clip is not None else {"dual_clip"}
        absent |= set() if self.kl_coef > 0 else {"kl"}
        absent |= set() if self.sampler_level is not None else {"sampler_weight"}
        return tuple(name for name in METRICS if name not in absent)

    def to_text(self) -> str:
        """Text from which ``losses.from_text`` makes this spec again."""
        return "policy " + " ".join([f"{name}={plain(getattr(self, name))!r}" for name in POLICY_FIELDS])


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillSpec:
    """A loss from a teacher's log-probabilities of K ids a token, t the teacher and p the student.

    Args:
        divergence: "clip_forward", K = 1: 1(log p < log t) * -log p. "forward": KL(t || p). "reverse": KL(p || t).
            "js": beta KL(t || m) + (1 - beta) KL(p || m), m = beta t + (1 - beta) p. The last three are taken between
            K + 1 buckets: the K ids, and all other ids together.
        beta: in (0, 1), for "js".
    """

    divergence: str = "clip_forward"
    beta: float = 0.5

    def __post_init__(self) -> None:
        check_choice("DistillSpec", "divergence", self.divergence, DIVERGENCES)
        object.__setattr__(self, "beta", check_number("DistillSpec", "beta", self.beta, at_least=1e-6))
        if self.beta > 1 - 1e-6:
            raise refuse("DistillSpec", "beta", "a number in (0, 1)", self.beta)

    @property
    def uses_entropy(self) -> bool:
        return False

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the metrics that this loss has a value for."""
        return ("entropy", *COUNTS)

    def to_text(self) -> str:
        """Text from which ``losses.from_text`` makes this spec again."""
        return f"distill divergence={plain(self.divergence)!r} beta={self.beta!r}"


POLICY_FIELDS = tuple(field.name for field in dataclasses.fields(LossSpec))


class Head(NamedTuple):
    """A linear head: logits z' = softcap(logit_scale * (hidden @ weight.T + bias)) / temperature."""

    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    temperature: Tensor | None  # (T,) fp32, of each row of hidden; None is 1
    logit_scale: float
    softcap: float  # softcap(u) = softcap * tanh(u / softcap); 0: none


class Tokens(NamedTuple):
    """Streams beside the log-probabilities of n tokens; fp32 or fp64, except the int64 indices."""

    weight: Tensor  # (n,) what the token's loss counts in the sum: mask over normaliser
    advantages: Tensor | None = None  # (n,)
    old_logprobs: Tensor | None = None  # (n,) None: the policy itself, held constant
    ref_logprobs: Tensor | None = None  # (n,)
    sampler_logprobs: Tensor | None = None  # (n,)
    teacher_logprobs: Tensor | None = None  # (n, K)
    sequence: Tensor | None = None  # (n,) index of its sequence, never decreasing; None: one sequence
    step: Tensor | None = None  # (n,) index of its step, never decreasing

    def take(self, rows: Tensor) -> Tokens:
        """The streams of some tokens, in the order of ``rows`` (m,) int64."""
        weight, *streams = self
        return Tokens(weight[rows], *(None if stream is None else stream[rows] for stream in streams))


class Logprobs(NamedTuple):
    """What ``linear_logprobs`` returns; natural logarithms, fp32."""

    logprobs: Tensor  # (T,) or (T, K), at most 0
    lse: Tensor  # (T,) log sum exp of the logits
    entropy: Tensor | None  # (T,)
    sum_sq: Tensor | None  # (T,) sum of the squared probabilities


def plain(value: object) -> object:
    """Text itself, of a member of an Enum or another subclass of str."""
    return str.__str__(value) if isinstance(value, str) else value


def check_choice(op: str, name: str, value: object, choices: tuple[Any, ...]) -> None:
    if not isinstance(value, (str, NoneType)) or value not in choices:
        raise refuse(op, name, " or ".join(map(repr, choices)), value)


def check_number(op: str, name: str, value: object, *, at_least: float) -> float:
    good = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not good or not at_least <= value <= LARGEST:  # type: ignore[operator]
        raise refuse(op, name, f"a finite number >= {at_least:g}", value)
    return float(value)  # type: ignore[arg-type]


def check_flag(op: str, name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise refuse(op, name, "True or False", value)


def check_length(op: str, aggregation: str, length: object) -> None:
    """constant_length: needed by one aggregation, allowed beside the others."""
    if not (type(length) is int and 1 <= length < 2**53) and (aggregation == "constant" or length is not None):
        optional = "" if aggregation == "constant" else ", or None"
        raise refuse(op, "constant_length", f"an int >= 1{optional} with aggregation={aggregation!r}", length)


def wide_dtype(x: Tensor) -> torch.dtype:
    """Of log-probabilities, and of gradients while they grow: fp64 for fp64, else fp32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
