"""Liger's seams over our kernels: its fused linear GRPO loss, and its fused linear scaled cross-entropy.

``FusedLinearGRPOLoss`` has the constructor, the call and the results of Liger 0.8.5's ``LigerFusedLinearGRPOLoss``;
``fused_linear_scaled_cross_entropy`` those of ``LigerFusedLinearScaledCrossEntropyFunction.apply``. Three products of
the head's size instead of four, masked and clipped tokens left out of them, gradients accumulated in fp32. Neither
needs Liger.

What differs. importance_sampling_level="sequence" holds the sequence ratio constant and differentiates each token's own
log-probability (docs/numerics.md): with Liger's advantages, one a sequence, value and gradient of the policy term are
the same; ``advantages`` may also be (B, T), where Liger's form would give every token their mean. Log-ratios are held
within +-20. "luspo" is TRL's, a sum over tokens / B. The KL metric is taken before ``use_bias_correction_kl``; for
"cispo" the share of clipped tokens is of all beyond the bound, whatever the sign of their advantage.
``compiled`` and ``chunk_size`` change nothing: memory is bounded in bytes. "vespo", and "luspo" at token level, are
refused.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.distributed as dist
from torch import Tensor, nn

from m3kernels.checks import is_strided, refuse
from m3kernels.policy_loss import LossSpec, Tokens, linear_logprobs, linear_policy_loss
from m3kernels.policy_loss.losses import kl_estimate, log_ratio
from m3kernels.policy_loss.types import check_choice, check_number

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo")


class FusedLinearGRPOLoss(nn.Module):
    """Liger's ``LigerFusedLinearGRPOLoss``: same names, defaults and results.

    Args:
        beta: factor of the k3 estimate of KL(pi || reference).
        compiled, chunk_size: without effect.
        use_ref_model: whether a reference is given to the call; without one the KL term is 0.
        epsilon_low, epsilon_high: the ratio is clipped to [1 - epsilon_low, 1 + epsilon_high]; for "cispo" epsilon_high
            is the upper bound of the ratio itself, here at least 1.
        loss_type: "grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", or "luspo" with sequence ratios.
        max_completion_length: tokens, for "dr_grpo".
        importance_sampling_level: "token" or "sequence"; the latter not for "cispo" and "sapo".
        sapo_temperature_pos, sapo_temperature_neg: of the gate of "sapo", > 0.
        temperature: divides the logits.
        delta: bound of the ratio of tokens with a negative advantage, here at least 1 + epsilon_high; or None.
        use_bias_correction_kl: multiply the KL estimate by the ratio.
        vespo_k_pos, vespo_lambda_pos, vespo_k_neg, vespo_lambda_neg: of "vespo", which is refused.
    Raises:
        ValueError: an argument out of contract.
    """

    def __init__(
        self,
        beta: float = 0.04,
        compiled: bool = True,
        use_ref_model: bool = True,
        chunk_size: int = 1,
        epsilon_low: float = 0.2,
        epsilon_high: float = 0.2,
        loss_type: str = "dapo",
        max_completion_length: int | None = None,
        importance_sampling_level: str = "token",
        sapo_temperature_pos: float = 1.0,
        sapo_temperature_neg: float = 1.05,
        temperature: float = 1.0,
        delta: float | None = None,
        use_bias_correction_kl: bool = False,
        vespo_k_pos: float = 2.0,
        vespo_lambda_pos: float = 3.0,
        vespo_k_neg: float = 3.0,
        vespo_lambda_neg: float = 2.0,
    ) -> None:
        super().__init__()
        op = type(self).__name__
        check_choice(op, "loss_type", loss_type, LOSS_TYPES)
        check_choice(op, "importance_sampling_level", importance_sampling_level, ("token", "sequence"))
        by_sequence = importance_sampling_level == "sequence"
        if by_sequence and loss_type in ("cispo", "sapo"):
            want = f"'token' for loss_type={loss_type!r}"
            raise refuse(op, "importance_sampling_level", want, repr(importance_sampling_level))
        if loss_type == "luspo" and not by_sequence:
            raise refuse(
                op, "importance_sampling_level", "'sequence' for loss_type='luspo'", repr(importance_sampling_level)
            )
        if loss_type == "dr_grpo" and max_completion_length is None:
            raise refuse(op, "max_completion_length", "tokens, for loss_type='dr_grpo'", max_completion_length)
        if loss_type == "cispo" and epsilon_high < 1:
            raise refuse(op, "epsilon_high", "the bound of the ratio, >= 1, for loss_type='cispo'", epsilon_high)
        for name, number in (("pos", sapo_temperature_pos), ("neg", sapo_temperature_neg)):
            check_number(op, f"sapo_temperature_{name}", number, at_least=1e-6)
        self.beta = beta
        self.use_ref_model = use_ref_model
        self.loss_type = loss_type
        self.max_completion_length = max_completion_length
        self.temperature = temperature
        self.gate = Gate(
            positive=sapo_temperature_pos,
            negative=sapo_temperature_neg,
            kl_coef=beta if use_ref_model else 0.0,
            kl_ratio_weighted=use_bias_correction_kl,
        )
        self.spec = LossSpec(
            ratio_level=importance_sampling_level,
            clip="one_sided" if loss_type == "cispo" else "two_sided",
            clip_low=epsilon_low,
            clip_high=epsilon_high - 1 if loss_type == "cispo" else epsilon_high,
            dual_clip=None if loss_type in ("cispo", "sapo") else delta,
            kl_estimator="k3",
            kl_coef=beta if use_ref_model else 0.0,
            kl_ratio_weighted=use_bias_correction_kl,
            aggregation="sequence_mean" if loss_type == "grpo" else "token_mean",
        )

    def forward(
        self,
        _input: Tensor,
        lin_weight: Tensor,
        selected_token_ids: Tensor,
        attention_mask: Tensor,
        advantages: Tensor,
        bias: Tensor | None = None,
        ref_per_token_logps: Tensor | None = None,
        old_per_token_logps: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        vllm_is_ratio: Tensor | None = None,
        num_items_in_batch: float | Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """(loss, metrics): the mean KL estimate, where beta is not 0, and the share of clipped tokens.

        Args:
            _input: (B, T, D) hidden states. lin_weight: (V, D) and bias: (V,) or None are cast to their dtype, as under
                autocast.
            selected_token_ids, attention_mask: (B, T), the tokens and which of them count.
            advantages: (B,) or (B, T).
            ref_per_token_logps, old_per_token_logps: (B, T), in nats, or None.
            ref_input, ref_weight, ref_bias: the reference's hidden states and head, where its logps are not given.
            vllm_is_ratio: (B, T), (B, 1) or (B,): weight, >= 0, of each token's policy term.
            num_items_in_batch: for "dapo" and "cispo": tokens of the whole batch, over all processes.
        """
        op = type(self).__name__
        if not is_strided(attention_mask) or attention_mask.ndim != 2:
            raise refuse(op, "attention_mask", "(B, T)", attention_mask)
        reference = self.reference_logprobs(
            selected_token_ids, attention_mask, ref_per_token_logps, ref_input, ref_weight, ref_bias
        )
        if vllm_is_ratio is not None:
            # A weight >= 0 may stand before or after the minimum of the clip.
            advantages = columns(advantages) * columns(vllm_is_ratio)
            advantages = advantages.expand(attention_mask.shape) if advantages.shape[1] == 1 else advantages
        mask = attention_mask.float()
        if self.loss_type == "sapo":
            mask = mask / mask.sum(1, keepdim=True).clamp(min=1.0)
        loss, found = linear_policy_loss(
            _input,
            lin_weight.to(_input.dtype),
            selected_token_ids,
            advantages,
            old_per_token_logps,
            reference,
            mask=mask,
            spec=self.gate if self.loss_type == "sapo" else self.spec,
            normaliser=self.normaliser(attention_mask, num_items_in_batch),
            bias=None if bias is None else bias.to(_input.dtype),
            temperature=self.temperature,
        )
        none = torch.zeros_like(loss)
        clipped, kl = found.get("clip_low", none) + found.get("clip_high", none), found.get("kl", none)
        metrics = (clipped.float(),) if self.beta == 0 else (kl.float(), clipped.float())
        return loss, metrics

    def normaliser(self, attention_mask: Tensor, num_items_in_batch: float | Tensor | None) -> Tensor:
        """What the sum over tokens (of sequence means, for "grpo" and "sapo") is divided by: Liger's, loss by loss."""
        rows = torch.tensor(float(max(len(attention_mask), 1)), device=attention_mask.device)
        if self.loss_type in ("grpo", "sapo", "luspo"):
            return rows
        if self.loss_type == "dr_grpo":
            assert self.max_completion_length is not None
            return rows * self.max_completion_length
        tokens = attention_mask.float().sum()
        if self.loss_type == "bnpo":
            return tokens.clamp(min=1.0)
        world = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        if num_items_in_batch is not None:
            tokens = torch.as_tensor(num_items_in_batch, device=tokens.device).float()
        elif world > 1:
            dist.all_reduce(tokens)
        return (tokens / world).clamp(min=1.0)

    def reference_logprobs(
        self,
        ids: Tensor,
        mask: Tensor,
        logprobs: Tensor | None,
        hidden: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
    ) -> Tensor | None:
        """(B, T) log-probabilities under the reference: those given, or of its hidden states; None without one."""
        if not self.use_ref_model:
            return None
        if logprobs is not None or self.beta == 0:
            return logprobs
        op = type(self).__name__
        if hidden is None or weight is None:
            raise refuse(op, "ref_per_token_logps", "a tensor, or ref_input and ref_weight, with use_ref_model", None)
        chosen = mask != 0
        with torch.no_grad():
            found = linear_logprobs(hidden[chosen], weight, ids[chosen], bias=bias, temperature=self.temperature)
        return found.logprobs.new_zeros(mask.shape).masked_scatter(chosen, found.logprobs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gate:
    """SAPO's loss of a token, -A sigmoid(tau (r - 1)) 4 / tau: a soft gate instead of a clip. arXiv 2511.20347."""

    positive: float  # tau where A > 0
    negative: float  # tau elsewhere
    kl_coef: float
    kl_ratio_weighted: bool
    metrics = ("kl",)

    def __call__(
        self, logprobs: Tensor, tokens: Tokens, entropy: Tensor | None
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        advantages = tokens.advantages
        assert advantages is not None
        ratio = log_ratio(logprobs, tokens, "token").exp()
        temperature = torch.where(advantages > 0, self.positive, self.negative)
        losses = -advantages * torch.sigmoid(temperature * (ratio - 1)) * 4 / temperature
        if self.kl_coef == 0:
            return losses
        assert tokens.ref_logprobs is not None
        kl = kl_estimate(logprobs, tokens.ref_logprobs, "k3") * (ratio if self.kl_ratio_weighted else 1.0)
        return losses + self.kl_coef * kl, {"kl": kl.detach()}


def columns(values: Tensor) -> Tensor:
    """(B, T) or (B, 1) of values that are one a token or one a sequence."""
    return values.unsqueeze(1) if values.ndim == 1 else values


def fused_linear_scaled_cross_entropy(
    _input: Tensor,
    weight: Tensor,
    target: Tensor,
    temperature: float = 1.0,
    ignore_index: int = -100,
    m_tiles_per_cluster: int = 1,
    return_entropy: bool = False,
    selected_token_ids: Tensor | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """Negative log-likelihood of each target under a linear head: nll; (nll, entropy); with ids, one more: their logps.

    Args:
        _input: (M, D). weight: (V, D). target: (M,) int64 in [0, V), or ignore_index: there every output is 0 and no
            logits are computed. temperature: > 0, divides the logits.
        m_tiles_per_cluster: without effect.
        return_entropy: whether to return the entropy.
        selected_token_ids: (K,) int64 in [0, V): ids whose log-probabilities are wanted at every row; or None.
    Returns:
        nll (M,), entropy (M,), logps (M, K): fp32 (fp64 for fp64 input), in nats, differentiable in _input and weight.
    Raises:
        ValueError: as linear_logprobs.
    """
    op = "fused_linear_scaled_cross_entropy"
    if not is_strided(target) or target.ndim != 1 or target.dtype != torch.int64:
        raise refuse(op, "target", "(M,) int64", target)
    ids = target.unsqueeze(1)
    if selected_token_ids is not None:
        if not is_strided(selected_token_ids) or selected_token_ids.ndim != 1:
            raise refuse(op, "selected_token_ids", "(K,) int64, or None", selected_token_ids)
        ids = torch.cat([ids, selected_token_ids.expand(len(target), -1)], 1)
    valid = target != ignore_index
    found = linear_logprobs(_input[valid], weight, ids[valid], temperature=temperature, entropy=return_entropy)
    logprobs = scatter(found.logprobs, valid)
    outputs = [-logprobs[:, 0]]
    if return_entropy:
        assert found.entropy is not None
        outputs.append(scatter(found.entropy, valid))
    if selected_token_ids is not None:
        outputs.append(logprobs[:, 1:])
    return outputs[0] if len(outputs) == 1 else tuple(outputs)


def scatter(values: Tensor, rows: Tensor) -> Tensor:
    """values of the chosen rows (bool) among rows of 0; joined to the graph even where none is chosen."""
    places = rows if values.ndim == 1 else rows.unsqueeze(1)
    return values.new_zeros((len(rows), *values.shape[1:])).masked_scatter(places, values)
