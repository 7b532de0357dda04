"""TRL's seam over our kernels: a GRPOTrainer whose per-token log-probabilities and entropies come from linear_logprobs.

TRL gives its models a head that projects the hidden states of the backbone tile by tile; it calls the projection by a
variable of its module ``trl.trainer.utils``. ``LinearLogprobs`` puts ours there while a trainer computes
log-probabilities, so all the rest stays TRL's: wrappers (DDP, FSDP2, PEFT), images, router losses, the loss itself.
Rows without a label are left out, on the CPU too. Tested with TRL 1.16; not for DeepSpeed ZeRO-3, whose head is
gathered for the forward pass only.

    class Trainer(LinearLogprobs, GRPOTrainer): ...      # or GRPOTrainer of this file
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import trl
import trl.trainer.utils as seam
from torch import Tensor
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from m3kernels.checks import refuse
from m3kernels.policy_loss import linear_logprobs

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
