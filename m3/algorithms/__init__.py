"""Reinforcement learning and distillation, one algorithm a file: formula, source, Config, advantages, spec of its loss.

An algorithm is pure: tensors in, tensors out. It fills the streams beside the tokens (advantages, step ids) and names
the loss, a ``LossSpec`` or ``DistillSpec``, which ``m3kernels.policy_loss`` computes. docs/add_an_algorithm.md.
"""

from m3.algorithms import clip_forward_kl, dapo, dr_grpo, grpo, gspo, mopd, spar

__all__ = ["clip_forward_kl", "dapo", "dr_grpo", "grpo", "gspo", "mopd", "spar"]
