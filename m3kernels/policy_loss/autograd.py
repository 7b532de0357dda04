"""The registered ops m3kernels::linear_* and the nodes that they are in an autograd graph.

A loss with its gradients (FormedForward) and log-probabilities (LogprobsNode) differ in when the gradients are formed:
the first forms them in the forward pass and only scales them in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from m3kernels.library import define
from m3kernels.policy_loss.arguments import check_main_grad
from m3kernels.policy_loss.schedule import coefficients, padded, two_sum
from m3kernels.policy_loss.types import METRICS, check_flag, wide_dtype

Call = Callable[[Tensor, Tensor, "Tensor | None", tuple[bool, bool, bool], bool], tuple[Tensor, ...]]


def formed(
    op: str,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    call: Call,
    accumulate_main_grad: bool,
) -> tuple[Tensor, Tensor]:
    """(loss, metrics): run ``call``, which gives (loss, dX, dW, db, metrics), as one node of the autograd graph."""
    check_flag(op, "accumulate_main_grad", accumulate_main_grad)
    main = check_main_grad(op, weight, accumulate_main_grad)
    grad = torch.is_grad_enabled()
    wanted = tuple(grad and x is not None and x.requires_grad for x in (hidden, weight, bias))
    return FormedForward.apply(hidden, weight, bias, call, wanted, main)


class FormedForward(torch.autograd.Function):
    """A loss whose gradients come with it: the backward pass scales them, in place, and hands them over, once."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        call: Call,
        wanted: tuple[bool, bool, bool],
        main_grad: bool,
    ) -> tuple[Tensor, Tensor]:
        b = None if bias is None else bias.detach().contiguous()
        loss, *grads, metrics = call(hidden.detach(), weight.detach().contiguous(), b, wanted, main_grad)
        ctx.grads = [found if want else None for found, want in zip(grads, wanted, strict=True)]
        ctx.weight = weight if main_grad else None
        ctx.mark_non_differentiable(metrics)
        return loss, metrics

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.grads is None:
            raise RuntimeError(
                "linear_policy_loss, linear_distill_loss: backward: want one call, the gradients were formed in the "
                "forward pass and have been handed over; got a second one. Compute the loss again."
            )
        (hidden, weight, bias), ctx.grads = ctx.grads, None
        parameter = ctx.weight
        if parameter is not None and weight is not None:
            parameter.main_grad.addcmul_(weight, grad.to(weight.dtype))
            weight = None
            if hasattr(parameter, "grad_added_to_main_grad"):
                parameter.grad_added_to_main_grad = True
                weight = torch.empty_like(parameter)
        elif weight is not None:
            weight = scaled(weight, grad)
        return (
            None if hidden is None else scaled(hidden, grad),
            weight,
            None if bias is None else scaled(bias, grad),
            None,
            None,
            None,
        )


def scaled(found: Tensor, grad: Tensor) -> Tensor:
    """found * grad, in place (not while compiling); untouched where grad is known to be 1."""
    if torch.compiler.is_compiling():
        return found * grad
    return found if grad.is_cpu and grad == 1 else found.mul_(grad)


class Options(NamedTuple):
    """The numbers of a linear_logprobs call, in schema order."""

    logit_scale: float
    softcap: float
    first_id: int
    entropy: bool
    sum_sq: bool
    save_logits: bool
    workspace: int


class LogprobsNode(torch.autograd.Function):
    """linear_logprobs with its backward pass, over one head or over the ranks of a process group."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ids: Tensor,
        temperature: Tensor | None,
        options: Options,
        group: dist.ProcessGroup | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        h, w = hidden.detach().contiguous(), weight.detach().contiguous()
        b = None if bias is None else bias.detach().contiguous()
        logprobs, lse, low, entropy, sum_sq, logits = logprobs_op(h, w, ids, b, temperature, *options)
        if group is not None:
            logprobs, lse, low, entropy, sum_sq = over_ranks(logprobs, lse, low, entropy, sum_sq, group)
        ctx.save_for_backward(hidden, weight, bias, ids, temperature, logprobs, lse, low, entropy, sum_sq, logits)
        ctx.options, ctx.group = options, group
        ctx.set_materialize_grads(False)
        return logprobs, lse, entropy, sum_sq

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, d_logprobs: Tensor | None, d_lse: Tensor | None, d_entropy: Tensor | None, d_sum_sq: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, ids, temperature, logprobs, lse, low, entropy, sum_sq, logits = ctx.saved_tensors
        o: Options = ctx.options
        c = coefficients(
            (logprobs, torch.zeros_like(logprobs) if d_logprobs is None else d_logprobs.contiguous()),
            d_lse,
            None if d_entropy is None or not o.entropy else (entropy, d_entropy),
            None if d_sum_sq is None or not o.sum_sq else (sum_sq, d_sum_sq),
        )
        wanted = ctx.needs_input_grad[:3]
        found = logprobs_backward_op(
            hidden.contiguous(),
            weight.contiguous(),
            ids,
            None if bias is None else bias.contiguous(),
            temperature,
            lse,
            low,
            logits,
            *c,
            o.logit_scale,
            o.softcap,
            o.first_id,
            *wanted,
        )
        d_hidden, d_weight, d_bias = (grad if want else None for grad, want in zip(found, wanted, strict=True))
        if ctx.group is not None and d_hidden is not None:
            dist.all_reduce(d_hidden, group=ctx.group)
        return d_hidden, d_weight, d_bias, None, None, None, None


def over_ranks(
    logprobs: Tensor, lse: Tensor, low: Tensor, entropy: Tensor, sum_sq: Tensor, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Put together what the ranks found over their parts of the vocabulary; an id is -inf on all ranks but one."""
    top = lse.clone()
    dist.all_reduce(top, dist.ReduceOp.MAX, group=group)
    nothing = lse == -torch.inf  # this rank's rows have no probability at all: padding, with a bias of -inf
    own = torch.where(nothing, -torch.inf, (lse - top) + low)
    total = own.exp()
    dist.all_reduce(total, group=group)
    log_total = total.log()
    whole, low = two_sum(top, log_total)
    shift = own - log_total  # log of this rank's share of the probability
    logprobs = torch.where(nothing[:, None], -torch.inf, logprobs + shift[:, None])
    dist.all_reduce(logprobs, dist.ReduceOp.MAX, group=group)
    if entropy.numel():
        entropy = torch.where(nothing, 0.0, shift.exp() * (entropy - shift))
        dist.all_reduce(entropy, group=group)
    if sum_sq.numel():
        sum_sq = torch.where(nothing, 0.0, (2 * shift).exp() * sum_sq)
        dist.all_reduce(sum_sq, group=group)
    return logprobs, whole, low, entropy, sum_sq


# -- ops --------------------------------------------------------------------------------------------------------------
def fake_logprobs(
    hidden: Tensor, weight: Tensor, ids: Tensor, bias: Any, temperature: Any, logit_scale: float, softcap: float,
    first_id: int, entropy: bool, sum_sq: bool, save_logits: bool, workspace: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    rows, dtype = hidden.shape[0], wide_dtype(hidden)
    saved = padded(rows) * weight.shape[0] if save_logits else 0
    sizes = (rows, rows, rows if entropy else 0, rows if sum_sq else 0, saved)
    return hidden.new_empty(ids.shape, dtype=dtype), *(hidden.new_empty(size, dtype=dtype) for size in sizes)


def fake_gradients(
    hidden: Tensor, weight: Tensor, wanted: tuple[bool, bool, bool], dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        hidden.new_empty(hidden.shape if wanted[0] else (0,)),
        weight.new_empty(weight.shape if wanted[1] else (0,), dtype=dtype),
        weight.new_empty(weight.shape[0] if wanted[2] else 0),
    )


def fake_formed(hidden: Tensor, weight: Tensor, wanted: tuple[bool, bool, bool], wide: bool) -> tuple[Tensor, ...]:
    dtype = wide_dtype(hidden)
    grads = fake_gradients(hidden, weight, wanted, dtype if wide else weight.dtype)
    return hidden.new_empty((), dtype=dtype), *grads, hidden.new_empty(len(METRICS), dtype=torch.float64)


HEAD = "Tensor? bias, Tensor? temperature"
WANTED = "bool wants_hidden, bool wants_weight, bool wants_bias"
FORMED = "(Tensor loss, Tensor d_hidden, Tensor d_weight, Tensor d_bias, Tensor metrics)"

logprobs_op = define(
    __package__,
    f"linear_logprobs(Tensor hidden, Tensor weight, Tensor ids, {HEAD}, float logit_scale, float softcap, "
    "int first_id, bool entropy, bool sum_sq, bool save_logits, int workspace) -> "
    "(Tensor logprobs, Tensor lse, Tensor lse_low, Tensor entropy, Tensor sum_sq, Tensor logits)",
    fake=fake_logprobs,
)
logprobs_backward_op = define(
    __package__,
    f"linear_logprobs_backward(Tensor hidden, Tensor weight, Tensor ids, {HEAD}, Tensor lse, Tensor lse_low, "
    "Tensor logits, Tensor base, Tensor? slope, Tensor? square, Tensor picked, Tensor complement, "
    "float logit_scale, float softcap, int first_id, "
    f"{WANTED}) -> (Tensor d_hidden, Tensor d_weight, Tensor d_bias)",
    fake=lambda hidden, weight, *rest: fake_gradients(hidden, weight, rest[-3:], weight.dtype),
)
policy_op = define(
    __package__,
    f"linear_policy_loss(Tensor hidden, Tensor weight, Tensor ids, {HEAD}, Tensor token_weight, Tensor? advantages, "
    "Tensor? old_logprobs, Tensor? ref_logprobs, Tensor? sampler_logprobs, Tensor? teacher_logprobs, "
    f"Tensor? sequence, Tensor? step, float logit_scale, float softcap, str loss, {WANTED}, "
    f"bool wide_weight_grad, int workspace) -> {FORMED}",
    fake=lambda hidden, weight, *rest: fake_formed(hidden, weight, rest[-5:-2], rest[-2]),
)
distill_op = define(
    __package__,
    f"linear_distill_loss(Tensor hidden, Tensor weight, {HEAD}, Tensor token_weight, Tensor teacher_hidden, "
    "Tensor teacher_weight, Tensor? teacher_bias, float logit_scale, float softcap, float teacher_logit_scale, "
    f"float teacher_softcap, str kind, float beta, {WANTED}, bool wide_weight_grad, int workspace) -> {FORMED}",
    fake=lambda hidden, weight, *rest: fake_formed(hidden, weight, rest[-5:-2], rest[-2]),
)
