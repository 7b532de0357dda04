"""What algorithms with groups share: the rewards of P prompts x R rollouts, and their statistics per prompt.

The standard deviation is the unbiased one, sqrt(sum (r - mean)^2 / (R - 1)), as in TRL and verl. Everything is
computed in fp64 and returned in the dtype of the rewards. A group whose rewards are all equal has advantages of exactly
0, not of rounding error over eps: its tokens then have no coefficient and are not computed at all.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from m3kernels.checks import is_strided, refuse


class Group(NamedTuple):
    """Statistics of the rewards of each prompt; fp64."""

    mean: Tensor  # (P, 1)
    std: Tensor  # (P, 1) unbiased; exactly 0 where all rewards are equal
    deviation: Tensor  # (P, R) reward - mean; exactly 0 where all rewards are equal


def group(op: str, rewards_P_R: Tensor) -> Group:
    """The statistics of each row.

    Raises:
        ValueError: rewards is not (P, R >= 2), floating, finite. A group of one has nothing to be relative to.
    """
    good = is_strided(rewards_P_R) and rewards_P_R.ndim == 2 and rewards_P_R.is_floating_point()
    if not good or rewards_P_R.shape[1] < 2:
        raise refuse(op, "rewards", "(P, R >= 2) floating", rewards_P_R)
    if not bool(torch.isfinite(rewards_P_R).all()):
        raise refuse(op, "rewards", "finite numbers", "nan or inf")
    rewards = rewards_P_R.detach().double()
    equal = (rewards == rewards[:, :1]).all(1, keepdim=True)
    mean = rewards.mean(1, keepdim=True)
    deviation = torch.where(equal, 0.0, rewards - mean)
    return Group(mean, (deviation.square().sum(1, keepdim=True) / (rewards.shape[1] - 1)).sqrt(), deviation)


def standardised(op: str, rewards_P_R: Tensor, eps: float) -> Tensor:
    """(P, R) (reward - mean) / (std + eps) of each group. Raises: as ``group``."""
    found = group(op, rewards_P_R)
    return (found.deviation / (found.std + eps)).to(rewards_P_R.dtype)
