"""GRPO: the advantage of a rollout is its reward, standardised within the group of its prompt.

    A_i = (R_i - mean_group) / (std_group + eps)
    L = -1/G sum_i 1/|y_i| sum_t [ min(r_t A_i, clip(r_t, 1 - clip_low, 1 + clip_high) A_i) - kl_coef * k3_t ]

with r_t the ratio of the token and k3_t its estimate of KL(pi || ref). Source: DeepSeekMath, arXiv 2402.03300, 4.1.
"""

from __future__ import annotations

import dataclasses

from torch import Tensor

from m3.algorithms.base import standardised
from m3kernels.policy_loss.types import LossSpec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Numbers of GRPO."""

    clip_low: float = 0.2  # not given by the paper: that of PPO, arXiv 1707.06347, 6.1
    clip_high: float = 0.2
    kl_coef: float = 0.04  # 4.2; k3, differentiated in the loss: Eq 4
    eps: float = 1e-6  # not given by the paper: that of verl; TRL has 1e-4


def advantages(rewards_P_R: Tensor, config: Config | None = None) -> Tensor:
    """(P, R) advantages of the rollouts of P prompts. Raises ValueError: rewards not (P, R >= 2), floating, finite."""
    return standardised("grpo.advantages", rewards_P_R, (config or Config()).eps)


def loss_spec(config: Config | None = None) -> LossSpec:
    """The loss of the formula above; needs ref_logprobs unless kl_coef is 0."""
    config = config or Config()
    return LossSpec(
        clip_low=config.clip_low,
        clip_high=config.clip_high,
        kl_estimator="k3",
        kl_coef=config.kl_coef,
        aggregation="sequence_mean",
    )
