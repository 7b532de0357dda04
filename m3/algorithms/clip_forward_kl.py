"""Clip-Forward-KL: offline distillation that teaches only what the student finds less likely than its teacher does.

    L = E_(s,a)~D [ 1(log pi(a|s) < log pi_teacher(a|s)) * -log pi(a|s) ]                       (Eq 2)

token-wise over the teachers' own trajectories D, with the teacher's log-probability stored beside each token. Source:
Baichuan-M3, arXiv 2602.06570, on offline policy distillation.
"""

from __future__ import annotations

import dataclasses

from torch import Tensor

from m3kernels.checks import is_strided, refuse
from m3kernels.policy_loss.types import AGGREGATIONS, DistillSpec, check_choice


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """``aggregation`` of ``linear_distill_loss``; the paper's expectation is over tokens (Eq 2)."""

    aggregation: str = "token_mean"

    def __post_init__(self) -> None:
        check_choice("clip_forward_kl.Config", "aggregation", self.aggregation, AGGREGATIONS)


def teaches(logprobs: Tensor, teacher_logprobs: Tensor) -> Tensor:
    """bool of their shape: the tokens with a gradient, those less likely under the student than under the teacher."""
    if not is_strided(logprobs) or not is_strided(teacher_logprobs) or logprobs.shape != teacher_logprobs.shape:
        raise refuse("clip_forward_kl.teaches", "teacher_logprobs", "the shape of logprobs", teacher_logprobs)
    return logprobs < teacher_logprobs


def loss_spec(config: Config | None = None) -> DistillSpec:
    """Spec for ``linear_distill_loss(..., teacher_logprobs=..., aggregation=config.aggregation)``."""
    return DistillSpec(divergence="clip_forward")
