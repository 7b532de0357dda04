"""Policy-gradient and distillation losses over a linear head: no logits, three products, gradients formed forward."""

from m3kernels.policy_loss.ops import (
    linear_distill_loss,
    linear_logprobs,
    linear_logprobs_backward,
    linear_policy_loss,
    policy_loss_from_logprobs,
)
from m3kernels.policy_loss.types import METRICS, DistillSpec, Logprobs, LossSpec, Tokens

__all__ = [
    "METRICS",
    "DistillSpec",
    "Logprobs",
    "LossSpec",
    "Tokens",
    "linear_distill_loss",
    "linear_logprobs",
    "linear_logprobs_backward",
    "linear_policy_loss",
    "policy_loss_from_logprobs",
]
