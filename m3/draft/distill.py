"""The loss of a draft: cross-entropy against the target's own law over the draft's vocabulary, at every step.

    p   = softmax over the draft's vocabulary of the target's logits          (one product for all steps)
    l_i = -sum_v p_v log softmax(W y_i)_v                                     y_i: normed output at step i

The gradients are made where the logits are, a few rows at a time, so that no (rows, V) tensor outlives its chunk.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

CHUNK = 128  # lessons at a time


class Learned(NamedTuple):
    """What a batch says about the draft."""

    loss: Tensor  # (S,) mean cross-entropy of each step in nats, over the lessons inside of the draft's vocabulary
    hits: Tensor  # (S,) int64: lessons whose likeliest token the draft gives, at each step


class _DistillHead(torch.autograd.Function):
    """(S,) losses and hits of y (S, L, D); a lesson counts with weight_L."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,  # (S, L, D)
        head: Tensor,  # (V, D)
        final: Tensor,  # (L, D_t)
        teacher_head: Tensor,  # (V, D_t)
        best: Tensor,  # (L,) draft id, or -1 where the target's likeliest token has none
        step_weights: Tensor,  # (S,)
    ) -> tuple[Tensor, Tensor, Tensor]:
        steps, lessons, _ = y.shape
        wanted = ctx.needs_input_grad[0]
        scale = step_weights / max(int((best >= 0).sum()), 1)
        grad_y = torch.empty_like(y) if wanted else None
        grad_head = torch.zeros_like(head) if wanted else None
        loss = y.new_zeros(steps)
        hits = torch.zeros(steps, dtype=torch.int64, device=y.device)
        for start in range(0, lessons, CHUNK):
            part = slice(start, min(start + CHUNK, lessons))
            known = best[part] >= 0
            teacher = (final[part].to(teacher_head.dtype) @ teacher_head.T).softmax(-1)
            rows = y[:, part].reshape(-1, y.shape[-1])
            logits = (rows @ head.T).view(steps, -1, head.shape[0])
            log_mass = logits.logsumexp(-1)  # (S, l)
            cross = log_mass - torch.einsum("slv,lv->sl", logits, teacher)
            loss += torch.where(known, cross, 0.0).sum(-1)
            hits += (logits.argmax(-1) == best[part]).sum(-1)
            if grad_y is not None and grad_head is not None:
                grad = logits.sub_(log_mass[..., None]).exp_().sub_(teacher)
                grad = grad.mul_((scale[:, None] * known)[..., None]).flatten(0, 1)
                grad_y[:, part] = (grad @ head).view(steps, -1, y.shape[-1])
                grad_head.addmm_(grad.T, rows)
        ctx.save_for_backward(grad_y, grad_head)
        ctx.mark_non_differentiable(hits)
        total = (loss * scale).sum()
        loss = loss / max(int((best >= 0).sum()), 1)
        ctx.mark_non_differentiable(loss)
        return total, loss, hits

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *others: Tensor) -> tuple[Tensor | None, ...]:
        grad_y, grad_head = ctx.saved_tensors
        return grad_y * grad, grad_head * grad, None, None, None, None


def distill_head(
    y: Tensor, head: Tensor, final: Tensor, teacher_head: Tensor, best: Tensor, step_weights: Tensor
) -> tuple[Tensor, Learned]:
    """(sum over steps of step_weights times the mean loss, what else there is to say).

    Args:
        y: (S, L, D) normed outputs of the draft at each step, for the same L lessons.
        head: (V, D) of the draft. teacher_head: (V, D_t), the rows of the target's head for the same tokens.
        final: (L, D_t), the target's last hidden state. step_weights: (S,).
        best: (L,) int64, draft id of the target's likeliest token; -1 where it has none: such a lesson is left out.
    """
    total, loss, hits = _DistillHead.apply(y, head, final, teacher_head, best, step_weights)
    return total, Learned(loss, hits)
