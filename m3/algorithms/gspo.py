"""GSPO: the ratio is of the whole sequence, so that it is clipped as what was rewarded: whole.

    A_i = (R_i - mean_group) / (std_group + eps)
    s_i = (pi(y_i) / pi_old(y_i))^(1/|y_i|)
    L = -1/G sum_i 1/|y_i| sum_t min(s_it A_i, clip(s_it, 1 - clip_low, 1 + clip_high) A_i)
    s_it = sg[s_i] * pi(y_it) / sg[pi(y_it)]

s_it is the paper's GSPO-token: with one advantage a sequence its value and gradient are those of GSPO, and it stays
right where advantages differ from token to token. Source: arXiv 2507.18071, 4.1 to 4.3.
"""

from __future__ import annotations

import dataclasses

from torch import Tensor

from m3.algorithms.base import standardised
from m3kernels.policy_loss.types import LossSpec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Numbers of GSPO."""

    clip_low: float = 3e-4  # 5.1
    clip_high: float = 4e-4  # 5.1
    eps: float = 1e-6  # not given by the paper: that of verl


def advantages(rewards_P_R: Tensor, config: Config | None = None) -> Tensor:
    """(P, R) advantages of the rollouts of P prompts. Raises ValueError: rewards not (P, R >= 2), floating, finite."""
    return standardised("gspo.advantages", rewards_P_R, (config or Config()).eps)


def loss_spec(config: Config | None = None) -> LossSpec:
    """The loss of the formula above."""
    config = config or Config()
    return LossSpec(
        ratio_level="sequence",
        clip_low=config.clip_low,
        clip_high=config.clip_high,
        aggregation="sequence_mean",
    )
