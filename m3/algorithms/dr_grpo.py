"""Dr. GRPO: GRPO without its two biases: no division by the standard deviation, no division by the length.

    A_i = R_i - mean_group
    L = -1/(G * length) sum_i sum_t min(r_t A_i, clip(r_t, 1 - clip_low, 1 + clip_high) A_i)

with ``length`` a constant, the budget of a rollout in tokens. Source: arXiv 2503.20783, 3.
"""

from __future__ import annotations

import dataclasses

from torch import Tensor

from m3.algorithms.base import group
from m3kernels.policy_loss.types import LossSpec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Numbers of Dr. GRPO; ``length``, in tokens, has no default: it is the run's generation budget."""

    length: int
    clip_low: float = 0.2  # not given in the text: that of PPO, arXiv 1707.06347, 6.1
    clip_high: float = 0.2


def advantages(rewards_P_R: Tensor) -> Tensor:
    """(P, R) advantages of the rollouts of P prompts. Raises ValueError: rewards not (P, R >= 2), floating, finite."""
    return group("dr_grpo.advantages", rewards_P_R).deviation.to(rewards_P_R.dtype)


def loss_spec(config: Config) -> LossSpec:
    """The loss of the formula above. No KL, as in the paper."""
    return LossSpec(
        clip_low=config.clip_low,
        clip_high=config.clip_high,
        aggregation="constant",
        constant_length=config.length,
    )
