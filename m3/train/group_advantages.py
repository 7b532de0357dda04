"""The algorithms of m3/algorithms that compare the rollouts of a group, by name: advantages of steps, and the loss.

spar              an advantage for each step, from its gamma (Eq 8)
grpo, gspo        the rollout's, standardised, for all its steps
dr_grpo           the rollout's, not divided by the deviation
dapo              as grpo, of rewards with the punishment of overlong answers
"""

from __future__ import annotations

import difflib
from typing import Any

import torch
from torch import Tensor

from m3.algorithms import dapo, dr_grpo, grpo, gspo, spar
from m3kernels.checks import refuse
from m3kernels.policy_loss.types import LossSpec

Algorithm = spar.Config | grpo.Config | dapo.Config | dr_grpo.Config | gspo.Config
ALGORITHMS: dict[str, type[Algorithm]] = {
    "spar": spar.Config, "grpo": grpo.Config, "dapo": dapo.Config, "dr_grpo": dr_grpo.Config, "gspo": gspo.Config,
}  # fmt: skip


def algorithm(name: str, **numbers: Any) -> Algorithm:
    """The configuration of an algorithm by its name, ``numbers`` being its fields.

    Raises:
        ValueError: no such algorithm; names the nearest. TypeError: no such number.
    """
    if name not in ALGORITHMS:
        nearest = difflib.get_close_matches(name, ALGORITHMS, n=1)
        hint = f"; nearest is {nearest[0]!r}" if nearest else ""
        raise refuse("algorithm", "name", f"one of {sorted(ALGORITHMS)}", f"{name!r}{hint}")
    return ALGORITHMS[name](**numbers)


def name_of(config: Algorithm) -> str:
    """The name of an algorithm."""
    return next(name for name, kind in ALGORITHMS.items() if type(config) is kind)


def step_advantages(
    config: Algorithm, rewards_P_R: Tensor, gammas_P_R_S: Tensor, lengths_P_R: Tensor | None = None
) -> Tensor:
    """(P, R, S) advantages of the steps, in the dtype of the rewards.

    Args:
        rewards_P_R: unpenalised. gammas_P_R_S: of the steps (Eq 7), for spar; others look at its shape alone.
        lengths_P_R: tokens of the answers, for dapo's punishment; None: rewards are not punished.
    Raises:
        ValueError: an argument out of contract.
    """
    if isinstance(config, spar.Config):
        return spar.advantages(rewards_P_R, gammas_P_R_S, config)
    if isinstance(config, dapo.Config):
        punishment = 0.0 if lengths_P_R is None else dapo.overlong_punishment(lengths_P_R, config)
        found = dapo.advantages(rewards_P_R + punishment, config)
    elif isinstance(config, dr_grpo.Config):
        found = dr_grpo.advantages(rewards_P_R)
    elif isinstance(config, grpo.Config):
        found = grpo.advantages(rewards_P_R, config)
    else:
        found = gspo.advantages(rewards_P_R, config)
    return found[:, :, None].expand(*found.shape, gammas_P_R_S.shape[2])


def teaches(config: Algorithm, rewards_P_R: Tensor, gammas_P_R_S: Tensor) -> list[bool]:
    """Of each group, whether any of its steps has an advantage, punishments of length aside (DAPO, 3.2).

    Rewards that are all equal teach nothing, but for SPAR where a step is penalised.
    """
    found = step_advantages(config, rewards_P_R, gammas_P_R_S)
    return (found != 0).flatten(1).any(1).tolist()


def loss_spec(config: Algorithm) -> LossSpec:
    """The algorithm's loss."""
    if isinstance(config, spar.Config):
        return spar.loss_spec(config)
    if isinstance(config, dapo.Config):
        return dapo.loss_spec(config)
    if isinstance(config, dr_grpo.Config):
        return dr_grpo.loss_spec(config)
    if isinstance(config, grpo.Config):
        return grpo.loss_spec(config)
    return gspo.loss_spec(config)


def token_advantages(advantages_S: Tensor, turns: tuple[int, ...], steps_T: Tensor) -> Tensor:
    """(T,) fp32: of each token the advantage of its step; 0 where the step is -1.

    Args:
        advantages_S: of the steps in order; more than ``turns`` are padding. turns: their numbers in ``steps_T``.
    Raises:
        ValueError: a token of a step without an advantage.
    """
    found = torch.zeros(len(steps_T), dtype=torch.float32)
    left = steps_T >= 0
    for turn, value in zip(turns, advantages_S.tolist(), strict=False):
        found[steps_T == turn] = value
        left &= steps_T != turn
    if bool(left.any()):
        raise refuse("token_advantages", "steps", f"numbers of {list(turns)}, or -1", f"{int(steps_T[left][0])}")
    return found
