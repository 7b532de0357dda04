"""SPAR: Step-Penalized Advantage with Relative baseline. A bad step costs its own tokens, not the whole consultation.

    gamma_j = 1 if step j violates nothing, else min of lambda_v over its violations v          (Eq 7)
    A_j = (gamma_j R - mu) / (sigma + eps)                                                      (Eq 8)

R in [0, 1] is the reward of the rollout; mu and sigma are those of the group's **unpenalised** rewards. A step is one
exchange; the tokens of step j have advantage A_j under the loss of GSPO in its token form (a differentiated sequence
ratio would give every token the mean of them). Source: Baichuan-M3, arXiv 2602.06570, on SPAR.

What follows from Eq 8 and is kept: without violations it is GRPO's advantage, exactly; where R = 0 a violation changes
nothing; other steps of a rollout keep their advantage. A negative R would be *raised* by a penalty: it is refused.

Groups of little variance. Eq 8 is GRPO's advantage plus (gamma_j - 1) R / (sigma + eps). The first term is at most
(n - 1) / sqrt(n) for n rollouts, whatever sigma; the second grows without bound as sigma goes to 0: a group of equal
rewards would give a mild violation an advantage of -1e5 and drown the batch. Dropping such groups would silence
penalties exactly when they are all that is left to learn. So the second term, and only it, is divided by
max(sigma + eps, min_std):

    A_j = (R - mu) / (sigma + eps)  +  (gamma_j - 1) R / max(sigma + eps, min_std)

which is Eq 8 where sigma + eps >= min_std. In a group of equal rewards clean steps have advantage 0 and a penalised
step has a bounded negative one.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from m3.algorithms.base import group
from m3kernels.checks import is_strided, refuse
from m3kernels.policy_loss.types import LossSpec

PENALTIES: Mapping[str, float] = MappingProxyType(
    {
        "redundant_question": 0.1,  # the paper: severe, about 0.1
        "safety_risk": 0.1,  # ours: no number given; as severe
        "illogical_order": 0.5,  # ours: no number given; between the two
        "rigid_phrasing": 0.9,  # the paper: mild, about 0.9
    }
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Numbers of SPAR. ``penalties``: lambda_v, in (0, 1), of each violation's name."""

    penalties: Mapping[str, float] = dataclasses.field(default_factory=lambda: PENALTIES)
    min_std: float = 0.1  # ours: a tenth of the reward's range; there a mild violation weighs what a deviation does
    ratio_level: str = "sequence"  # the paper: GSPO-style; "step" takes the ratio of each step alone
    clip_low: float = 3e-4  # not given by the paper: those of GSPO, arXiv 2507.18071, 5.1
    clip_high: float = 4e-4
    eps: float = 1e-6  # not given by the paper: that of verl

    def __post_init__(self) -> None:
        for name, factor in self.penalties.items():
            if not 0 < factor < 1:
                raise refuse("spar.Config", f"penalties[{name!r}]", "a number in (0, 1)", factor)
        for name in ("min_std", "eps"):
            if not 0 < getattr(self, name) < float("inf"):
                raise refuse("spar.Config", name, "a number > 0", getattr(self, name))


def step_factor(violations: Collection[str], config: Config | None = None) -> float:
    """gamma of a step (Eq 7): the least lambda of its violations, 1 without any.

    Raises:
        ValueError: a violation without a penalty; names the nearest.
    """
    penalties = (config or Config()).penalties
    for name in violations:
        if name not in penalties:
            nearest = difflib.get_close_matches(name, penalties, n=1)
            hint = f"; nearest is {nearest[0]!r}" if nearest else ""
            raise refuse("spar.step_factor", "violations", f"of {sorted(penalties)}", f"{name!r}{hint}")
    return min((penalties[name] for name in violations), default=1.0)


def step_factors(violations: Sequence[Sequence[Sequence[Collection[str]]]], config: Config | None = None) -> Tensor:
    """(P, R, S) fp32 gammas of violations[prompt][rollout][step]; S the most steps of any rollout, padded with 1.

    Raises:
        ValueError: prompts differ in rollouts; or as ``step_factor``.
    """
    rollouts = {len(rows) for rows in violations}
    if len(rollouts) > 1:
        raise refuse("spar.step_factors", "violations", "as many rollouts of every prompt", f"{sorted(rollouts)}")
    steps = max((len(row) for rows in violations for row in rows), default=0)
    factors = [
        [[step_factor(step, config) for step in row] + [1.0] * (steps - len(row)) for row in rows]
        for rows in violations
    ]
    return torch.tensor(factors, dtype=torch.float32).reshape(len(violations), max(rollouts, default=0), steps)


def advantages(rewards_P_R: Tensor, factors_P_R_S: Tensor, config: Config | None = None) -> Tensor:
    """(P, R, S) advantages of the steps, in the dtype of the rewards.

    Args:
        rewards_P_R: unpenalised rewards in [0, 1], floating, R >= 2.
        factors_P_R_S: gammas in (0, 1], of ``step_factors``.
    Raises:
        ValueError: an argument out of contract.
    """
    config = config or Config()
    op = "spar.advantages"
    found = group(op, rewards_P_R)
    rewards = rewards_P_R.detach().double()
    if bool(((rewards < 0) | (rewards > 1)).any()):
        span = f"{rewards.min().item():g} to {rewards.max().item():g}"
        raise refuse(op, "rewards", "numbers in [0, 1] (a penalty would raise a negative one)", span)
    if not is_strided(factors_P_R_S) or factors_P_R_S.ndim != 3 or factors_P_R_S.shape[:2] != rewards.shape:
        raise refuse(op, "factors", f"({rewards.shape[0]}, {rewards.shape[1]}, S)", factors_P_R_S)
    factors = factors_P_R_S.detach().to(rewards)
    if not bool(((factors > 0) & (factors <= 1)).all()):
        raise refuse(op, "factors", "numbers in (0, 1]", factors_P_R_S)
    divisor = found.std + config.eps
    relative = found.deviation / divisor
    penalty = (factors - 1) * (rewards / divisor.clamp(min=config.min_std)).unsqueeze(2)
    return (relative.unsqueeze(2) + penalty).to(rewards_P_R.dtype)


def step_ids(mask: Tensor) -> Tensor:
    """int64 of the shape of mask (B, L): index of the step of each token, a step being a run of mask != 0; else -1."""
    if not is_strided(mask) or mask.ndim != 2:
        raise refuse("spar.step_ids", "mask", "(B, L)", mask)
    inside = mask != 0
    before = torch.nn.functional.pad(inside, (1, 0))[:, :-1]
    return torch.where(inside, (inside & ~before).cumsum(1) - 1, -1)


def token_advantages(advantages_B_S: Tensor, step_ids_B_L: Tensor) -> Tensor:
    """(B, L) advantages: of each token that of its step; 0 where the step id is -1.

    Args:
        advantages_B_S: of the steps; rows of ``advantages(...).flatten(0, 1)``.
        step_ids_B_L: integers in [-1, S), of ``step_ids``.
    Raises:
        ValueError: an argument out of contract; above all a step without an advantage.
    """
    op = "spar.token_advantages"
    if not is_strided(advantages_B_S) or advantages_B_S.ndim != 2:
        raise refuse(op, "advantages", "(B, S)", advantages_B_S)
    rows, steps = advantages_B_S.shape
    good = is_strided(step_ids_B_L) and step_ids_B_L.ndim == 2 and not step_ids_B_L.is_floating_point()
    if not good or len(step_ids_B_L) != rows:
        raise refuse(op, "step_ids", f"({rows}, L) integers", step_ids_B_L)
    if bool(((step_ids_B_L < -1) | (step_ids_B_L >= steps)).any()):
        span = f"{int(step_ids_B_L.min())} to {int(step_ids_B_L.max())}"
        raise refuse(op, "step_ids", f"integers in [-1, {steps}), {steps} steps having an advantage", span)
    padded = torch.nn.functional.pad(advantages_B_S, (1, 0))
    return padded.gather(1, step_ids_B_L.to(torch.int64) + 1)


def loss_spec(config: Config | None = None) -> LossSpec:
    """The loss of GSPO in its token form, for advantages of tokens; ratio_level "step" needs step ids beside them."""
    config = config or Config()
    return LossSpec(
        ratio_level=config.ratio_level,
        clip_low=config.clip_low,
        clip_high=config.clip_high,
        aggregation="sequence_mean",
    )
