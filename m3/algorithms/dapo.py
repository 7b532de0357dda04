"""DAPO: clip higher, sample until groups teach, mean over tokens, a soft punishment of overlong answers.

    A_i = (R_i - mean_group) / (std_group + eps),   R_i with the punishment added
    L = -1/(sum_i |y_i|) sum_i sum_t min(r_t A_i, clip(r_t, 1 - clip_low, 1 + clip_high) A_i)
    punishment(|y|) = 0 up to max_length - cache, then falls linearly to -1 at max_length, and stays there

Groups whose rewards are all equal are dropped and sampled anew. Source: arXiv 2503.14476, 3.1 to 3.4.
"""

from __future__ import annotations

import dataclasses

from torch import Tensor

from m3.algorithms.base import group, standardised
from m3kernels.checks import is_strided, refuse
from m3kernels.policy_loss.types import LossSpec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Numbers of DAPO; lengths in tokens."""

    clip_low: float = 0.2  # 4.1
    clip_high: float = 0.28  # 4.1
    max_length: int = 20480  # 4.1: 16384 expected, and the cache
    cache: int = 4096  # 4.1
    eps: float = 1e-6  # not given by the paper: that of verl

    def __post_init__(self) -> None:
        if not 0 < self.cache <= self.max_length:
            raise refuse("dapo.Config", "cache", f"tokens in (0, max_length = {self.max_length}]", self.cache)


def advantages(rewards_P_R: Tensor, config: Config | None = None) -> Tensor:
    """(P, R) advantages of the rollouts of P prompts. Raises ValueError: rewards not (P, R >= 2), floating, finite."""
    return standardised("dapo.advantages", rewards_P_R, (config or Config()).eps)


def keep(rewards_P_R: Tensor) -> Tensor:
    """(P,) bool: dynamic sampling keeps the groups whose rewards are not all equal (3.2).

    Judge the rewards before the punishment of length, which would tell two equally wrong answers apart.
    """
    return group("dapo.keep", rewards_P_R).std[:, 0] > 0


def overlong_punishment(lengths: Tensor, config: Config | None = None) -> Tensor:
    """Float of the shape of lengths (tokens of the answers), in [-1, 0], to be added to the rewards (3.4)."""
    config = config or Config()
    if not is_strided(lengths) or lengths.is_floating_point() or bool((lengths < 0).any()):
        raise refuse("dapo.overlong_punishment", "lengths", "integers >= 0", lengths)
    return ((config.max_length - config.cache - lengths) / config.cache).clamp(-1.0, 0.0)


def loss_spec(config: Config | None = None) -> LossSpec:
    """The loss of the formula above. No KL: 2.3 drops it."""
    config = config or Config()
    return LossSpec(clip_low=config.clip_low, clip_high=config.clip_high, aggregation="token_mean")
