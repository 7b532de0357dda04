"""TRL's seams: a GRPOTrainer over our kernels, and SPARTrainer, which has SPAR's advantages and loss on top.

TRL gives its models a head that projects the hidden states of the backbone tile by tile; it calls the projection by a
variable of its module ``trl.trainer.utils``. ``LinearLogprobs`` puts ours there while a trainer computes
log-probabilities, so all the rest stays TRL's: wrappers (DDP, FSDP2, PEFT), images, router losses, the loss itself.
Rows without a label are left out, on the CPU too. Tested with TRL 1.16; not for DeepSpeed ZeRO-3, whose head is
gathered for the forward pass only.

    class Trainer(LinearLogprobs, GRPOTrainer): ...      # or GRPOTrainer of this file

``SPARTrainer`` needs TRL 1.16 or later, below 2: TRL takes advantages (B, T), but with a sequence ratio it
differentiates that ratio, which gives every token of a completion the mean advantage; so the loss is ours.

    SPARTrainer(model, reward, SPARConfig(...), data, rollout_func=rollout)   # rollout returns "violations" too
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Collection, Iterator
from typing import Any

import torch
import trl
import trl.trainer.utils as seam
from torch import Tensor
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from m3.algorithms import spar
from m3kernels.checks import refuse
from m3kernels.policy_loss import linear_logprobs, policy_loss_from_logprobs

SERVED = {"log_probs", "entropy", "log_sum_sq_probs"}


class Projection:
    """``linear_logprobs`` behind the name and arguments by which TRL calls its ``ChunkedLogProbFunction``."""

    @staticmethod
    def apply(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = ("entropy", "log_sum_sq_probs"),
    ) -> tuple[Tensor, Tensor | None, Tensor | None, None, None]:
        """(log-probabilities, entropies, log sum of squared probabilities, None, None) of N rows; in nats, fp32.

        Args:
            hidden: (N, D). weight: (V, D). bias: (V,) or None. targets: (N,). The first three are cast to the dtype of
                autocast, or of hidden.
            chunk_size: without effect.
            outputs: "entropy" and "log_sum_sq_probs" are returned if named.
        """
        if unknown := set(outputs) - SERVED:
            raise refuse("Projection", "outputs", f"of {sorted(SERVED)}", f"{sorted(unknown)}")
        if is_deepspeed_zero3_enabled():
            raise refuse("Projection", "weight", "a head that outlives the forward pass", "one under DeepSpeed ZeRO-3")
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        squares = "log_sum_sq_probs" in outputs
        found = linear_logprobs(
            hidden.to(dtype),
            weight.to(dtype),
            targets,
            bias=None if bias is None else bias.to(dtype),
            temperature=temperature,
            softcap=final_logit_softcapping or 0.0,
            logit_scale=logit_scale,
            entropy="entropy" in outputs,
            sum_sq=squares,
        )
        log_sum_sq = found.sum_sq.detach().log() if found.sum_sq is not None else None
        return found.logprobs, found.entropy, log_sum_sq, None, None


@contextlib.contextmanager
def projection() -> Iterator[None]:
    """Within it, TRL's fused heads project through linear_logprobs, and only the rows that have a label."""
    before = seam._ChunkedLogProbFunction, seam._use_triton
    seam._ChunkedLogProbFunction = Projection
    seam._use_triton = lambda device: True  # in this module it decides only whether rows without a label are dropped
    try:
        yield
    finally:
        seam._ChunkedLogProbFunction, seam._use_triton = before


class LinearLogprobs:
    """Mixin for TRL's GRPOTrainer, before it in the list of bases."""

    def _get_per_token_logps_and_entropies(
        self, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(log-probabilities, entropies, router loss): TRL's method, its head over our kernels."""
        with projection():
            return super()._get_per_token_logps_and_entropies(*args, **kwargs)  # type: ignore[misc]


class GRPOTrainer(LinearLogprobs, trl.GRPOTrainer):
    """TRL's GRPOTrainer with per-token log-probabilities and entropies through ``linear_logprobs``."""


# -- SPAR -------------------------------------------------------------------------------------------------------------
@dataclasses.dataclass
class SPARConfig(trl.GRPOConfig):
    """TRL's settings with SPAR's numbers in place of its defaults, and SPAR's own beside them.

    Args:
        importance_sampling_level: "sequence", "step" or "token": over what the ratio is taken; held constant in the
            gradient above "token" (docs/numerics.md).
        penalties: lambda_v of each violation's name; None: those of m3.algorithms.spar.
        min_std: least deviation by which a penalty is divided.
    """

    loss_type: str = dataclasses.field(default="grpo", metadata={"help": "Only 'grpo', a mean over sequences."})
    importance_sampling_level: str = dataclasses.field(
        default=spar.Config.ratio_level, metadata={"help": "Ratio of the 'sequence', of each 'step' or 'token'."}
    )
    epsilon: float = dataclasses.field(default=spar.Config.clip_low, metadata={"help": "Lower clip of the ratio."})
    epsilon_high: float | None = dataclasses.field(
        default=spar.Config.clip_high, metadata={"help": "Upper clip of the ratio."}
    )
    penalties: dict[str, float] | None = dataclasses.field(
        default=None, metadata={"help": "Factor of the reward, in (0, 1), of a step with each violation."}
    )
    min_std: float = dataclasses.field(
        default=spar.Config.min_std, metadata={"help": "Least deviation by which a penalty is divided."}
    )


# Metrics of the loss, by the names under which TRL logs them.
LOGGED = {"entropy": "entropy", "kl": "kl", "clip_low": "clip_ratio/low_mean", "clip_high": "clip_ratio/high_mean"}
MODEL_INPUTS = (
    "pixel_values",
    "image_grid_thw",
    "num_images",
    "pixel_attention_mask",
    "spatial_shapes",
    "num_tiles",
    "image_sizes",
    "token_type_ids",
    "mm_token_type_ids",
    "image_position_ids",
)

# What SPAR leaves no room for: (setting, the value it must have). The rest of TRL's settings keep their meaning.
FIXED = (
    ("loss_type", "grpo"),
    ("scale_rewards", "group"),
    ("multi_objective_aggregation", "sum_then_normalize"),
    ("delta", None),
    ("off_policy_mask_threshold", None),
    ("top_entropy_quantile", 1.0),
    ("entropy_coef", 0.0),
    ("use_adaptive_entropy", False),
)


class SPARTrainer(GRPOTrainer):
    """TRL's GRPOTrainer with the advantages and the loss of SPAR (m3/algorithms/spar.py).

    A step of a completion is a run of the policy's tokens (of ``env_mask``, or between results of tools). What each
    step violates comes, a list of names for every step, from the field ``violations`` of what ``rollout_func`` returns
    (one entry a completion), or from the attribute ``violations`` of the completion's environment after its rollout.
    Rewards, weighted and summed over the reward functions, lie in [0, 1]. A completion that no function scores has no
    part in its group's baseline and advantage 0, as in TRL.

    Args:
        As of trl.GRPOTrainer; ``args`` is a SPARConfig.
    Raises:
        ValueError: a setting that SPAR leaves no room for; rewards beyond [0, 1]; a completion without its violations,
            or with those of more or fewer steps than it has.
    """

    def __init__(self, model: Any, reward_funcs: Any = None, args: SPARConfig | None = None, **kwargs: Any) -> None:
        op = type(self).__name__
        if not isinstance(args, SPARConfig):
            raise refuse(op, "args", "a SPARConfig", args)
        for name, wanted in FIXED:
            if getattr(args, name, wanted) != wanted:
                raise refuse(op, f"args.{name}", repr(wanted), repr(getattr(args, name)))
        self.spar = spar.Config(
            penalties=spar.PENALTIES if args.penalties is None else args.penalties,
            min_std=args.min_std,
            ratio_level=args.importance_sampling_level,
            clip_low=args.epsilon,
            clip_high=args.epsilon if args.epsilon_high is None else args.epsilon_high,
        )
        self.loss_spec = dataclasses.replace(
            spar.loss_spec(self.spar), kl_coef=args.beta, kl_ratio_weighted=args.use_bias_correction_kl
        )
        self._rewards: Tensor | None = None
        super().__init__(model, reward_funcs, args, **kwargs)

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        """(rollouts of all processes, functions): TRL's; kept, because TRL passes on no more than its advantages."""
        self._rewards = super()._calculate_rewards(*args, **kwargs)
        return self._rewards

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """TRL's batch, its advantages those of SPAR: (B, T), of each token that of its step."""
        output = super()._generate_and_score_completions(inputs)
        assert self._rewards is not None
        weighted = self._rewards * self.reward_weights.to(self._rewards.device)
        unjudged = self._rewards.isnan().all(1)
        rewards = weighted.nansum(1).masked_fill(unjudged, torch.nan)
        steps = spar.step_ids(drawn(output))
        violations = [found_violations(row, inputs, self.environments) for row in range(len(inputs))]
        check_steps(violations, steps)
        factors = spar.step_factors([violations], self.spar)[0].to(rewards.device)
        size = self.num_generations if self.model.training else self.num_generations_eval
        first = self.accelerator.process_index * len(inputs)
        output["advantages"] = spar.token_advantages(local_advantages(rewards, factors, first, size, self.spar), steps)
        penalised = (factors < 1).any(1).float()
        mode = "train" if self.model.training else "eval"
        self._metrics[mode]["spar/rollouts_penalised"].append(self.accelerator.gather(penalised).mean().item())
        return output

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """The loss of the batch, and its metrics under TRL's names."""
        ids, mask = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1), drawn(inputs)
        attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        extras = {name: inputs.get(name) for name in MODEL_INPUTS}
        logprobs, entropy, router_loss = self._get_per_token_logps_and_entropies(
            model, ids, attention, mask.shape[1], compute_entropy=True, compute_aux_loss=self.aux_loss_enabled, **extras
        )
        advantages = inputs["advantages"]
        if self.use_vllm and self.vllm_importance_sampling_correction:
            advantages = advantages * inputs["importance_sampling_ratio"]  # a weight >= 0 may stand before the minimum
        training = self.model.training
        accumulated = self.current_gradient_accumulation_steps if training else 1
        loss, found = policy_loss_from_logprobs(
            logprobs,
            advantages,
            inputs.get("old_per_token_logps"),
            inputs.get("ref_per_token_logps"),
            mask=mask,
            spec=self.loss_spec,
            entropy=entropy,
            normaliser=len(mask) * accumulated,  # TRL's: the mean over the rows of a micro-batch, then over those
        )
        log = self._metrics["train" if training else "eval"]
        for name, logged in LOGGED.items():
            if name in found:
                log[logged].append(self.weighted_mean(found[name], mask.sum()))
        if self.aux_loss_enabled:
            assert router_loss is not None
            loss = loss + self.router_aux_loss_coef * router_loss / accumulated
            log["aux_loss"].append(self.accelerator.gather(router_loss).mean().item())
        return loss

    def weighted_mean(self, mean: Tensor, tokens: Tensor) -> float:
        """The mean over the tokens of all processes, of this process's mean."""
        sums = torch.stack([mean * tokens, tokens.to(mean.dtype)])
        total, count = self.accelerator.reduce(sums, reduction="sum").tolist()
        return total / max(count, 1.0)


def drawn(batch: dict[str, Any]) -> Tensor:
    """(B, T) int64, 1 on the tokens that the policy drew."""
    mask = batch["completion_mask"]
    return mask * batch["tool_mask"] if "tool_mask" in batch else mask


def found_violations(row: int, inputs: list[dict[str, Any]], environments: list[Any] | None) -> list[Collection[str]]:
    """What each step of a completion violates: of the rollout's field, or of its environment."""
    if "violations" in inputs[row]:
        return list(inputs[row]["violations"])
    if environments is not None and hasattr(environments[row], "violations"):
        return list(environments[row].violations)
    raise refuse("SPARTrainer", "violations", "a field of the rollout, or an attribute of its environment", "neither")


def check_steps(violations: list[list[Collection[str]]], steps: Tensor) -> None:
    """Raises ValueError: a completion has other steps than violations. One masked whole (truncated) has none."""
    for row, (found, count) in enumerate(zip(violations, (steps.amax(1) + 1).tolist(), strict=True)):
        if count and len(found) != count:
            raise refuse("SPARTrainer", f"violations[{row}]", f"{count} steps, as the completion has", len(found))


def local_advantages(rewards: Tensor, factors: Tensor, first: int, size: int, config: spar.Config) -> Tensor:
    """(B, S) advantages of this process's rollouts, ``first`` and following, among those of all processes.

    Args:
        rewards: (rollouts of all processes,) fp32, ``size`` of them a group; nan: not judged, outside the baseline.
        factors: (B, S) gammas of this process's.
    """
    local = range(first, first + len(factors))
    every = torch.ones(len(rewards), factors.shape[1], dtype=factors.dtype, device=factors.device)
    every[local.start : local.stop] = factors
    found = torch.zeros_like(every)
    for start in range(0, len(rewards), size):
        judged = start + (~rewards[start : start + size].isnan()).nonzero()[:, 0]
        if len(judged) > 1:  # one alone has nothing to be relative to
            found[judged] = spar.advantages(rewards[judged][None], every[judged][None], config)[0]
    return found[local.start : local.stop]
