"""MOPD: multi-teacher on-policy distillation. The student rolls out; the teacher of the sample's domain judges tokens.

    L = -E[ 1/|y| sum_t w_t A_t log pi(y_t) ]
    A_t = sg[log pi_teacher(y_t) - log pi(y_t)] + alpha * A_outcome
    w_t = sg[pi(y_t) / mu(y_t)] if within [weight_low, weight_high], else 0

with mu the policy of the sampler. As a ``LossSpec`` the first part of A_t is a KL penalty in the reward, of estimator
k1 and coefficient 1, against the teacher as reference; w_t is the sampler's weight, masked. Call the loss with

    advantages=outcome_advantages(...), ref_logprobs=teacher_logprobs, sampler_logprobs=mu, old_logprobs=None

(None: pi stands for the old policy, so that A_t and w_t are those of pi itself). The gradient is that of the formula;
the value is that of -w_t A_t. Log-ratios are held within +-20 nats. Source: MiMo-V2-Flash, arXiv 2601.02780, which
Baichuan-M3, arXiv 2602.06570, takes for its third stage without giving numbers.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from m3kernels.checks import is_strided, refuse
from m3kernels.policy_loss.losses import LOG_RATIO_LIMIT
from m3kernels.policy_loss.types import LossSpec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Numbers of MOPD; none is given by the papers."""

    alpha: float = 1.0  # ours: a standard deviation of reward weighs what a nat of disagreement does
    weight_low: float = 0.5  # ours: the masked weights of IcePop, as NeMo-RL has them
    weight_high: float = 5.0

    def __post_init__(self) -> None:
        if not 0 <= self.alpha < float("inf"):
            raise refuse("mopd.Config", "alpha", "a number >= 0", self.alpha)
        if not 0 <= self.weight_low < self.weight_high < float("inf"):
            raise refuse("mopd.Config", "weight_low", f"in [0, weight_high = {self.weight_high})", self.weight_low)


def outcome_advantages(rewards_advantages: Tensor, config: Config | None = None) -> Tensor:
    """alpha * A_outcome, the ``advantages`` of the loss; A_outcome of any algorithm here, of sequences or tokens."""
    return rewards_advantages * (config or Config()).alpha


def token_advantages(
    logprobs: Tensor, teacher_logprobs: Tensor, outcome: Tensor, config: Config | None = None
) -> Tensor:
    """A_t, of the shape of logprobs, without gradient: for trainers that take advantages of tokens.

    Args:
        logprobs, teacher_logprobs: (B, L) or (T,), in nats, of the same tokens.
        outcome: A_outcome, like logprobs, or (B,) with logprobs (B, L).
    Raises:
        ValueError: shapes that do not fit.
    """
    op = "mopd.token_advantages"
    if not is_strided(teacher_logprobs) or teacher_logprobs.shape != logprobs.shape:
        raise refuse(op, "teacher_logprobs", f"{tuple(logprobs.shape)}, like logprobs", teacher_logprobs)
    if outcome.ndim == 1 and logprobs.ndim == 2 and len(outcome) == len(logprobs):
        outcome = outcome.unsqueeze(1)
    elif outcome.shape != logprobs.shape:
        raise refuse(op, "outcome", f"{tuple(logprobs.shape)}, like logprobs, or one a sequence", outcome)
    disagreement = (teacher_logprobs - logprobs).detach().clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return disagreement + outcome_advantages(outcome.detach(), config)


def token_weights(logprobs: Tensor, sampler_logprobs: Tensor, config: Config | None = None) -> Tensor:
    """w_t, of the shape of logprobs, without gradient. Raises ValueError: shapes that do not fit."""
    config = config or Config()
    if not is_strided(sampler_logprobs) or sampler_logprobs.shape != logprobs.shape:
        want = f"{tuple(logprobs.shape)}, like logprobs"
        raise refuse("mopd.token_weights", "sampler_logprobs", want, sampler_logprobs)
    weights = (logprobs - sampler_logprobs).detach().clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    return torch.where((weights >= config.weight_low) & (weights <= config.weight_high), weights, 0.0)


def loss_spec(config: Config | None = None) -> LossSpec:
    """The loss of the formula above, for the call given there."""
    config = config or Config()
    return LossSpec(
        clip="none",
        kl_estimator="k1",
        kl_coef=1.0,
        kl_in="reward",
        sampler_level="token",
        sampler_mode="mask",
        sampler_low=config.weight_low,
        sampler_high=config.weight_high,
        aggregation="sequence_mean",
    )
