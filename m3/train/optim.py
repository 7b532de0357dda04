"""One optimiser for all stages: AdamW, a rate that warms up and then stays or falls, the gradient's norm clipped.

A loss or gradient that is not finite stops the run: ``NonFiniteError``. Weights are as before the update then.
Source: AdamW, arXiv 1711.05101.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from m3.train.policy_model import PolicyModel, whole
from m3.train.stage import NonFiniteError
from m3kernels.checks import refuse
from m3kernels.policy_loss.types import check_choice

SCHEDULES = ("constant", "cosine", "linear")
SEPARATOR = "|"  # between a parameter's name and its moment's, in a checkpoint; no parameter's name has one


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Numbers of the optimiser; the papers give none of them.

    Args:
        lr: after warm-up, > 0. warmup: updates. schedule: "constant", or down to ``lr_end`` at the last update by
            half a "cosine" or "linear"ly.
        weight_decay: on matrices alone, not on norms and biases. clip: norm of the gradient; 0 means no clipping.
    """

    lr: float = 1e-6  # verl's for reinforcement learning
    lr_end: float = 0.0
    warmup: int = 0
    schedule: str = "constant"
    betas: tuple[float, float] = (0.9, 0.999)  # torch's, verl's
    eps: float = 1e-8
    weight_decay: float = 0.0  # ours: the KL terms and the clip hold the policy; TRL has 0, verl 0.01
    clip: float = 1.0  # verl's

    def __post_init__(self) -> None:
        op = "OptimConfig"
        check_choice(op, "schedule", self.schedule, SCHEDULES)
        if not 0 < self.lr < math.inf or not 0 <= self.lr_end <= self.lr:
            raise refuse(op, "lr, lr_end", "0 <= lr_end <= lr, 0 < lr", f"{self.lr}, {self.lr_end}")
        for name in ("warmup", "weight_decay", "clip"):
            if not 0 <= getattr(self, name) < math.inf:
                raise refuse(op, name, "a number >= 0", getattr(self, name))
        if not self.eps > 0 or not all(0 <= beta < 1 for beta in self.betas):
            raise refuse(op, "betas, eps", "betas in [0, 1), eps > 0", f"{self.betas}, {self.eps}")

    def rate(self, update: int, updates: int) -> float:
        """Rate of update 0, 1, ... of ``updates``; the first of a warm-up is lr / (warmup + 1), not 0."""
        if update < self.warmup:
            return self.lr * (update + 1) / (self.warmup + 1)
        if self.schedule == "constant":
            return self.lr
        share = min((update - self.warmup) / max(updates - 1 - self.warmup, 1), 1.0)
        fall = 0.5 * (1 + math.cos(math.pi * share)) if self.schedule == "cosine" else 1 - share
        return self.lr_end + (self.lr - self.lr_end) * fall


class Optimizer:
    """AdamW over the parameters that learn. ``updates``: how many it has taken."""

    def __init__(self, model: PolicyModel, config: OptimConfig) -> None:
        self.config, self.updates = config, 0
        self.named = dict(model.trained())
        if not self.named:
            raise refuse("Optimizer", "model", "a parameter that learns", "none")
        matrices = [one for one in self.named.values() if one.ndim >= 2]
        rest = [one for one in self.named.values() if one.ndim < 2]
        groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": rest, "weight_decay": 0.0}]
        groups = [group for group in groups if group["params"]]
        self.adamw = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)

    def zero_grad(self) -> None:
        self.adamw.zero_grad(set_to_none=True)

    def step(self, rate: float) -> float:
        """One update at a rate, from the gradients that lie in the parameters; the norm they had before clipping.

        Raises:
            NonFiniteError: nan or inf in a gradient; names the parameters. Nothing has changed.
        """
        norm = self._norm()
        if not math.isfinite(norm):
            bad = [name for name, one in self.named.items() if one.grad is not None and not _finite(one.grad)]
            where = f"{len(bad)} of {len(self.named)} parameters, first {bad[0]!r}" if bad else "the norm overflows"
            raise NonFiniteError(f"gradient: want finite numbers; got norm {norm} ({where})")
        if self.config.clip and norm > self.config.clip:
            parameters = [one for one in self.named.values() if one.grad is not None]
            nn.utils.clip_grads_with_norm_(parameters, self.config.clip, torch.tensor(norm))
        for group in self.adamw.param_groups:
            group["lr"] = rate
        self.adamw.step()
        self.updates += 1
        return norm

    def _norm(self) -> float:
        """Of the whole gradient, over all ranks where it is sharded."""
        norm = nn.utils.get_total_norm([one.grad for one in self.named.values() if one.grad is not None])
        return float(whole(norm))

    # -- in a checkpoint ----------------------------------------------------------------------------------------------
    def tensors(self) -> dict[str, Tensor]:
        """Moments by ``parameter|moment``; of parameters that have had a gradient."""
        found = {}
        for name, parameter in self.named.items():
            for moment, value in self.adamw.state.get(parameter, {}).items():
                found[f"{name}{SEPARATOR}{moment}"] = value
        return found

    def load(self, tensors: Mapping[str, Tensor], updates: int) -> None:
        """Go on where ``tensors`` and ``updates`` were taken.

        Raises:
            ValueError: a moment of a parameter that does not learn here, or of another shape; nothing has changed.
        """
        state: dict[str, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            name, _, moment = key.rpartition(SEPARATOR)
            if name not in self.named:
                raise refuse("Optimizer.load", "tensors", "moments of parameters that learn", f"{name!r}")
            if value.ndim and value.shape != self.named[name].shape:
                raise refuse("Optimizer.load", key, f"{tuple(self.named[name].shape)}", value)
            state.setdefault(name, {})[moment] = value
        self.adamw.state.clear()
        for name, moments in state.items():
            parameter = self.named[name]
            self.adamw.state[parameter] = {
                moment: value.to(parameter.device, copy=True) if moment == "step" else value.to(parameter)
                for moment, value in moments.items()
            }
        self.updates = updates


def _finite(gradient: Tensor) -> bool:
    return bool(torch.isfinite(whole(gradient)).all())
