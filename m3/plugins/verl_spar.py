"""SPAR and Clip-Forward-KL in verl's registries: an advantage estimator, two policy losses, a distillation loss.

    algorithm.adv_estimator=spar                                          advantages of tokens, Eq 8
    actor_rollout_ref.actor.policy_loss.loss_mode=spar | spar_step        GSPO in its token form; ratio of each step
    distillation.distillation_loss.loss_mode=clip_forward_kl              Eq 2, from the teacher's sampled token

An estimator of verl sees the rewards of tokens and nothing else, so what a step violates must travel in them. With R
the reward of a rollout, gamma_j the factor of step j (m3/algorithms/spar.py) and R_j = gamma_j R, the rewards hold

    R_0 on the first token of step 0,   R_j - R_(j-1) on the first token of step j,   R - R_last on the last token

of the response, which is no token of the policy. The running sum at a token then is the penalised return of its step,
whatever tokens a filter has masked since; the sum of all is R, which so is the score that verl logs. Numbers are
multiples of 2^-20, so the sums are exact in fp32: equal rewards stay equal. Tested with verl 0.9.1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from verl.trainer.distillation.losses import DistillationLossSettings, register_distillation_loss
from verl.trainer.ppo.core_algos import register_adv_est, register_policy_loss
from verl.workers.utils.padding import no_padding_2_padding

from m3.algorithms import clip_forward_kl, spar
from m3kernels.checks import refuse
from m3kernels.policy_loss import policy_loss_from_logprobs
from m3kernels.policy_loss.losses import distill_loss
from m3kernels.policy_loss.types import Tokens

GRID = 2.0**20  # rewards are whole numbers over it; a sum of a response's is exact in fp32
AGGREGATIONS = {"seq-mean-token-mean": "sequence_mean", "token-mean": "token_mean"}


# -- rewards of tokens ------------------------------------------------------------------------------------------------
def token_rewards(reward: float, factors: Sequence[float], mask: Tensor) -> Tensor:
    """(L,) fp32 rewards of a response's tokens, as told above.

    Args:
        reward: R in [0, 1].
        factors: gamma of each step, in (0, 1].
        mask: (L,) not 0 on the policy's tokens; each run is a step, the first begins the response, the last token is
            none of the policy's.
    Raises:
        ValueError: an argument out of contract.
    """
    op = "token_rewards"
    steps = spar.step_ids(mask[None])[0]
    count = int(steps.max()) + 1 if len(mask) else 0
    if not count or mask[0] == 0 or mask[-1] != 0:
        raise refuse(op, "mask", "(L,) that begins with a step and ends outside any", f"{mask.tolist()}")
    if len(factors) != count or not all(0 < factor <= 1 for factor in factors):
        raise refuse(op, "factors", f"{count} numbers in (0, 1], one a step", f"{list(factors)}")
    if not 0 <= reward <= 1:
        raise refuse(op, "reward", "a number in [0, 1]", reward)
    least = 1 if reward > 0 else 0  # a penalised return of more than 0 stays so
    whole = max(least, round(reward * GRID))
    levels = [max(least, round(factor * reward * GRID)) for factor in factors]
    found = torch.zeros(len(mask), dtype=torch.float64)
    before = 0
    for step, level in enumerate(levels):
        found[int((steps == step).nonzero()[0])] = level - before
        before = level
    found[-1] = whole - before
    return (found / GRID).float()


def returns(token_level_rewards: Tensor, response_mask: Tensor) -> tuple[Tensor, Tensor]:
    """(rewards R (B,), penalised returns (B, L)) of what ``token_rewards`` wrote, padded; fp64, 0 where mask is 0.

    Raises:
        ValueError: rewards that something else wrote.
    """
    grid = token_level_rewards.double() * GRID
    running = grid.cumsum(1)
    inside = response_mask != 0
    reward = running[:, -1]
    beyond = inside & ((running <= 0) | (running > reward[:, None])) & (reward > 0)[:, None]
    foreign = (grid != grid.round()).any(1) | (reward < 0) | (reward > GRID) | beyond.any(1)
    foreign |= (reward == 0) & (grid != 0).any(1)
    if bool(foreign.any()):
        row = int(foreign.nonzero()[0])
        want = "those of m3's agent loop (trainer.use_v1=True, no KL in the reward)"
        raise refuse("spar", f"token_level_rewards[{row}]", want, token_level_rewards[row])
    return reward / GRID, torch.where(inside, running, 0.0) / GRID


@register_adv_est("spar")
def advantages(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    config: Any = None,
    index: Sequence[Any] | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """(advantages, penalised returns), both (B, L) fp32: verl's estimator "spar", groups by ``index``.

    Raises:
        ValueError: rewards that m3's agent loop did not write; a group of one.
    """
    if index is None or len(index) != len(token_level_rewards):
        raise refuse("spar", "index", f"{len(token_level_rewards)} names of groups", index)
    rewards, penalised = returns(token_level_rewards, response_mask)
    factors = torch.where((penalised > 0) & (response_mask != 0), penalised / rewards[:, None], 1.0)
    groups: dict[Any, list[int]] = {}
    for row, name in enumerate(index):
        groups.setdefault(name, []).append(row)
    found = torch.zeros_like(penalised)
    for rows in groups.values():
        found[rows] = spar.advantages(rewards[rows][None], factors[rows][None])[0]
    return (found * (response_mask != 0)).float(), penalised.float()


# -- losses -----------------------------------------------------------------------------------------------------------
def policy_loss(ratio_level: str, **kwargs: Any) -> tuple[Tensor, dict[str, Any]]:
    """SPAR's loss behind verl's call; the clip, the aggregation and the global normaliser are verl's settings."""
    log_prob, mask, config = kwargs["log_prob"], kwargs["response_mask"], kwargs["config"]
    mode, weights, advantage = kwargs["loss_agg_mode"], kwargs["rollout_is_weights"], kwargs["advantages"]
    if mode not in AGGREGATIONS:
        raise refuse("spar", "loss_agg_mode", f"of {sorted(AGGREGATIONS)}", repr(mode))
    settings = spar.Config(
        ratio_level=ratio_level,
        clip_low=config.clip_ratio if config.clip_ratio_low is None else config.clip_ratio_low,
        clip_high=config.clip_ratio if config.clip_ratio_high is None else config.clip_ratio_high,
    )
    every = config.global_batch_info
    count = every.get("global_batch_size" if mode == "seq-mean-token-mean" else "batch_num_tokens")
    loss, found = policy_loss_from_logprobs(
        log_prob.float(),
        advantage if weights is None else advantage * weights,  # a weight >= 0 may stand before the minimum
        kwargs["old_log_prob"].float(),
        mask=mask,
        spec=dataclasses.replace(spar.loss_spec(settings), aggregation=AGGREGATIONS[mode]),
        normaliser=None if count is None else float(count) / every.get("dp_size", 1),
    )
    return loss, {
        "actor/pg_clipfrac": (found["clip_low"] + found["clip_high"]).item(),
        "actor/pg_clipfrac_lower": 0.0,
        "actor/ppo_kl": found["approx_kl"].item(),
    }


@register_policy_loss("spar")
def spar_loss(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "seq-mean-token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """The ratio of the sequence, held constant, on each token's own log-probability; all (B, L)."""
    return policy_loss(
        "sequence", old_log_prob=old_log_prob, log_prob=log_prob, advantages=advantages, response_mask=response_mask,
        loss_agg_mode=loss_agg_mode, config=config, rollout_is_weights=rollout_is_weights,
    )  # fmt: skip


@register_policy_loss("spar_step")
def spar_step_loss(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "seq-mean-token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """The same with the ratio of each step, a run of the mask."""
    return policy_loss(
        "step", old_log_prob=old_log_prob, log_prob=log_prob, advantages=advantages, response_mask=response_mask,
        loss_agg_mode=loss_agg_mode, config=config, rollout_is_weights=rollout_is_weights,
    )  # fmt: skip


@register_distillation_loss(DistillationLossSettings(names=["clip_forward_kl"], use_estimator=True))
def clip_forward_kl_loss(
    config: Any, distillation_config: Any, model_output: dict[str, Any], data: Any
) -> tuple[Tensor, dict[str, Any]]:
    """(losses (B, L), metrics): -log pi of each token that is less likely than under its teacher, else 0.

    Raises:
        ValueError: distillation_loss.use_policy_gradient, which takes a loss for a reward; or loss_max_clamp, which
            takes the gradient from the tokens that need it most.
    """
    settings = distillation_config.distillation_loss
    for name, wanted in (("use_policy_gradient", False), ("loss_max_clamp", None)):
        if getattr(settings, name) != wanted:
            raise refuse("clip_forward_kl", f"distillation_loss.{name}", repr(wanted), repr(getattr(settings, name)))
    student = no_padding_2_padding(model_output["log_probs"], data)
    teacher = no_padding_2_padding(data["teacher_logprobs"], data).squeeze(-1)
    mask = data["response_mask"]
    inside = (mask.to_padded_tensor(0) if mask.is_nested else mask) != 0
    tokens = Tokens(weight=torch.ones_like(student[inside]), teacher_logprobs=teacher[inside].to(student.dtype))
    found = distill_loss(student[inside], tokens, clip_forward_kl.loss_spec())
    losses = torch.zeros_like(student).masked_scatter(inside, found)
    taught = (found > 0).float().mean().item() if len(found) else 0.0
    return losses, {"distillation/tokens_taught": taught}
