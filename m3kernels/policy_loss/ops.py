"""Losses over a linear head, without its logits: the public functions and their contracts.

No function ever holds the (T, V) logits beyond a byte budget. ``linear_policy_loss`` and ``linear_distill_loss`` form
the gradients in the forward pass: three products of T x D x V instead of four, and only for the tokens that have a
weight and a coefficient. Formulas: types.py and losses.py; order of work: schedule.py and passes.py; contract:
reference.py; the registered ops m3kernels::linear_*: autograd.py.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from m3kernels.checks import is_strided, refuse
from m3kernels.policy_loss import batch, losses
from m3kernels.policy_loss.arguments import (
    DTYPES,
    check_batch,
    check_head,
    check_ids,
    check_mask,
    check_needs,
    check_range,
    check_start,
    check_stream,
    per_row,
    temperature_rows,
    with_letter,
    workspace_of,
)
from m3kernels.policy_loss.autograd import (
    LogprobsNode,
    Options,
    distill_op,
    formed,
    logprobs_backward_op,
    policy_op,
)
from m3kernels.policy_loss.types import (
    AGGREGATIONS,
    METRICS,
    DistillSpec,
    Logprobs,
    LossSpec,
    Tokens,
    check_choice,
    check_flag,
    check_length,
    wide_dtype,
)

Metrics = dict[str, Tensor]


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float = 0.0,
    logit_scale: float = 1.0,
    entropy: bool = False,
    sum_sq: bool = False,
    save_logits: bool | str = "auto",
    workspace_bytes: int | None = None,
    process_group: dist.ProcessGroup | None = None,
    vocab_start: int | None = None,
) -> Logprobs:
    """Log-probabilities, in nats, of chosen ids under a linear head; differentiable in hidden, weight and bias.

    Logits are cap(logit_scale * (hidden @ weight.T + bias)) / temperature, cap(u) = softcap * tanh(u / softcap).

    Args:
        hidden: (T, D) fp32, bf16, fp16 or fp64.
        weight: (V, D) of hidden's dtype; with a process group, this rank's rows of it.
        ids: (T,) or (T, K) int32 or int64 in [0, V), already shifted; there is no sentinel: mask the result. Values
            are checked on CPU only.
        bias: (V,) of hidden's dtype, or None.
        temperature: > 0, one number, or one of each token (T,). Not differentiable.
        softcap: >= 0; 0 means none. logit_scale: any finite number but 0.
        entropy, sum_sq: whether to return them; differentiable.
        save_logits: keep the logits for the backward pass, which then needs two products instead of three. "auto":
            if they fit into workspace_bytes.
        workspace_bytes: of logits held at once; default 64 MiB on CPU, 1 GiB elsewhere, or 256 rows if that is more.
            A tile of a few MiB is held in any case.
        process_group: its ranks hold consecutive runs of the vocabulary; hidden and ids are the same on all of them.
            The gradient of hidden is summed over the ranks.
        vocab_start: index of this rank's first row; default: rank * V, for shards of one size.
    Returns:
        Logprobs(logprobs like ids, lse (T,), entropy (T,) or None, sum_sq (T,) or None), fp32 (fp64 for fp64 input).
        Error: TOLERANCE in reference.py. logprobs are at most 0.
    Raises:
        ValueError: an argument out of contract; names it, what was wanted, what came.
        BackendError: the backend forced by M3KERNELS_BACKEND cannot serve this call; says why.
    Source: chunked linear cross-entropy (arXiv 2410.10989), with temperature, entropy and a vocabulary-parallel form.
    """
    op = "linear_logprobs"
    check_head(op, hidden, weight, bias, softcap, logit_scale)
    start = 0
    check_flag(op, "entropy", entropy)
    check_flag(op, "sum_sq", sum_sq)
    if process_group is not None:
        if not isinstance(process_group, dist.ProcessGroup) or dist.get_rank(process_group) < 0:
            raise refuse(op, "process_group", "a ProcessGroup that this process is in, or None", process_group)
        start = dist.get_rank(process_group) * weight.shape[0] if vocab_start is None else vocab_start
    elif vocab_start is not None:
        raise refuse(op, "vocab_start", "None without a process_group", vocab_start)
    check_start(op, start)
    check_ids(op, ids, hidden.shape[:1], hidden, columns=True)
    if process_group is None:
        check_range(op, ids, weight.shape[0])
    scale = temperature_rows(op, temperature, hidden.shape[:1], hidden)
    workspace = workspace_of(op, workspace_bytes, weight)
    if not isinstance(save_logits, bool) and not (isinstance(save_logits, str) and save_logits == "auto"):
        raise refuse(op, "save_logits", "True, False or 'auto'", save_logits)
    grad = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (hidden, weight, bias))
    fits = hidden.shape[0] * weight.shape[0] * 4 <= workspace
    save = grad and (fits if save_logits == "auto" else bool(save_logits))
    options = Options(float(logit_scale), float(softcap), start, bool(entropy), bool(sum_sq), save, workspace)
    columns = per_row(ids, len(hidden)).to(torch.int64).contiguous()
    found = LogprobsNode.apply(hidden, weight, bias, columns, scale, options, process_group)
    logprobs, lse, entropies, squares = found
    return Logprobs(logprobs.view(ids.shape), lse, entropies if entropy else None, squares if sum_sq else None)


def linear_logprobs_backward(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    lse: Tensor,
    grad_logprobs: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float = 0.0,
    logit_scale: float = 1.0,
    vocab_start: int = 0,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of linear_logprobs, for a caller that schedules its own backward pass.

    Args:
        hidden, weight, ids, bias, temperature, softcap, logit_scale: those of the forward call.
        lse: (T,) as returned by it (over the whole vocabulary). grad_logprobs: like ids.
        vocab_start: index of weight's first row; ids outside weight's rows are skipped.
    Returns: (dX (T, D), dW (V, D), db (V,) or None) in the dtypes of their inputs, accumulated in fp32.
    Raises: as linear_logprobs.
    """
    op = "linear_logprobs_backward"
    check_head(op, hidden, weight, bias, softcap, logit_scale)
    check_ids(op, ids, hidden.shape[:1], hidden, columns=True)
    check_stream(op, "grad_logprobs", grad_logprobs, ids.shape, hidden, required=True)
    check_stream(op, "lse", lse, hidden.shape[:1], hidden, required=True)
    check_start(op, vocab_start)
    hidden, weight, lse, grad_logprobs = (x.detach() for x in (hidden, weight, lse, grad_logprobs))
    wide = wide_dtype(hidden)
    picked = per_row(grad_logprobs.to(wide), len(hidden)).contiguous()
    bias = None if bias is None else bias.detach().contiguous()
    d_hidden, d_weight, d_bias = logprobs_backward_op(
        hidden.contiguous(),
        weight.contiguous(),
        ids.to(torch.int64).reshape(picked.shape).contiguous(),
        bias,
        temperature_rows(op, temperature, hidden.shape[:1], hidden),
        lse.to(wide).contiguous(),
        hidden.new_zeros(len(hidden), dtype=wide),
        hidden.new_empty(0, dtype=wide),
        -picked.sum(1),
        None,
        None,
        torch.zeros_like(picked),
        picked,
        float(logit_scale),
        float(softcap),
        vocab_start,
        True,
        True,
        bias is not None,
    )
    return d_hidden, d_weight, None if bias is None else d_bias


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    advantages: Tensor,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    sampler_logprobs: Tensor | None = None,
    mask: Tensor | None = None,
    segment_ids: Tensor | None = None,
    spec: LossSpec | losses.TokenLoss | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    normaliser: float | Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float = 0.0,
    logit_scale: float = 1.0,
    workspace_bytes: int | None = None,
    accumulate_main_grad: bool = False,
) -> tuple[Tensor, Metrics]:
    """A policy-gradient loss over a linear head in one pass; differentiable in hidden, weight and bias.

    Args:
        hidden: (B, L, D) padded, or (T, D) packed; fp32, bf16, fp16 or fp64.
        weight: (V, D), bias: (V,) or None, of hidden's dtype. temperature, softcap, logit_scale: as in linear_logprobs.
        ids: (B, L) or (T,) int32 or int64 in [0, V), the token that hidden predicts (already shifted). Values are
            checked on CPU only, where mask is not 0.
        advantages: of each token, like ids; or of each sequence, (B,).
        old_logprobs: like ids, in nats, under the policy before the update; None: this one (every ratio is 1).
        ref_logprobs: like ids, under the reference; needed for the KL term.
        sampler_logprobs: like ids, under the policy that sampled; needed for the sampler's weights.
        mask: like ids, bool or numbers >= 0, required: which tokens count, and how much. Where it is 0 nothing else of
            the token is read.
        spec: LossSpec; or a function (logprobs (n,), Tokens, entropy (n,)) -> losses (n,), or (losses, details) with
            details one (n,) tensor for some names of METRICS. Its attribute ``scope`` ("token" unless given; "step",
            "sequence") says which tokens it must see together, ``metrics`` which METRICS to return. Its losses are
            averaged over tokens.
        segment_ids: like ids, integers: runs of one number within a sequence are its steps. None: runs of mask != 0.
        cu_seqlens: (B + 1,) int32 or int64, 0 .. T: bounds of the sequences of a packed batch; None: one sequence.
        normaliser: divides the sum instead of the number of tokens ("token_mean"), of sequences ("sequence_mean") or
            of sequences * constant_length ("constant") of this batch: give the global number when gradients accumulate.
        workspace_bytes: as in linear_logprobs. A sequence whose ratio must be known whole and whose logits do not fit
            is computed with four products instead of three (metric rows_recomputed).
        accumulate_main_grad: in the backward pass add the gradient of weight, in fp32, to ``weight.main_grad`` and give
            None to autograd (or, where ``weight.grad_added_to_main_grad`` exists, set it and give an empty tensor).
    Returns:
        (loss, 0-D fp32 (fp64 for fp64 input); metrics, 0-D fp64 tensors without gradient, named as in spec.metrics).
        Gradients are accumulated in fp32 and scaled by the upstream gradient. Without grad mode none are formed.
    Raises: as linear_logprobs.
    """
    op = "linear_policy_loss"
    spec = LossSpec() if spec is None else spec
    check_head(op, hidden, weight, bias, softcap, logit_scale, leading=(1, 2))
    streams = (("old_logprobs", old_logprobs), ("ref_logprobs", ref_logprobs), ("sampler_logprobs", sampler_logprobs))
    layout = check_batch(op, hidden, ids, mask, segment_ids, cu_seqlens, weight.shape[0])
    for name, stream in streams:
        check_stream(op, name, stream, ids.shape, hidden)
    check_needs(op, spec, ref_logprobs, sampler_logprobs)
    tokens = policy_tokens(op, spec, layout, ids.shape, advantages, streams, normaliser)
    return one_pass(
        op, hidden, weight, bias, ids, temperature, tokens, spec, logit_scale, softcap, workspace_bytes,
        accumulate_main_grad,
    )  # fmt: skip


def policy_loss_from_logprobs(
    logprobs: Tensor,
    advantages: Tensor,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    sampler_logprobs: Tensor | None = None,
    mask: Tensor | None = None,
    segment_ids: Tensor | None = None,
    spec: LossSpec | losses.TokenLoss | None = None,
    *,
    entropy: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    normaliser: float | Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """The loss of linear_policy_loss from log-probabilities that exist: differentiable in logprobs and entropy.

    The second phase of the two-phase path (linear_logprobs, or any other source of log-probabilities, comes first), for
    a head that is split over ranks or a loss that needs more than one pass. Plain torch; any device.

    Args:
        logprobs: (B, L) or (T,) fp32 or fp64, in nats, of the tokens taken. Not read where mask is 0.
        entropy: like logprobs, in nats; needed where spec.entropy_coef > 0, and for the metric.
        The others: as in linear_policy_loss.
    Returns: (loss, metrics); the metrics about rows count tokens. Raises: as linear_policy_loss.
    """
    op = "policy_loss_from_logprobs"
    spec = LossSpec() if spec is None else spec
    if not is_strided(logprobs) or logprobs.ndim not in (1, 2) or logprobs.dtype not in DTYPES:
        raise refuse(op, "logprobs", "(B, L) or (T,) floating point", logprobs)
    layout = check_mask(op, mask, logprobs.shape, logprobs, segment_ids, cu_seqlens)
    streams = (("old_logprobs", old_logprobs), ("ref_logprobs", ref_logprobs), ("sampler_logprobs", sampler_logprobs))
    for name, stream in (*streams, ("entropy", entropy)):
        check_stream(op, name, stream, logprobs.shape, logprobs)
    check_needs(op, spec, ref_logprobs, sampler_logprobs)
    if isinstance(spec, LossSpec) and spec.uses_entropy and entropy is None:
        raise refuse(op, "entropy", f"a tensor like logprobs, for entropy_coef={spec.entropy_coef}", None)
    tokens = policy_tokens(op, spec, layout, logprobs.shape, advantages, streams, normaliser)
    loss = spec.to_text() if isinstance(spec, LossSpec) else spec
    rows = tokens.weight.nonzero()[:, 0]
    wide = wide_dtype(logprobs)
    chosen = logprobs.reshape(-1)[rows].to(wide)
    entropies = None if entropy is None else entropy.reshape(-1)[rows].to(wide)
    taken = tokens.take(rows)
    values, details = losses.evaluate(loss, chosen, taken, entropies)
    metrics = losses.named(losses.metrics(details, {}, len(rows), logprobs), spec)
    if entropy is None:
        metrics.pop("entropy", None)
    return losses.total(values, taken), metrics


def linear_distill_loss(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor | None = None,
    teacher_logprobs: Tensor | None = None,
    mask: Tensor | None = None,
    spec: DistillSpec | None = None,
    *,
    teacher_hidden: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    teacher_softcap: float = 0.0,
    teacher_logit_scale: float = 1.0,
    cu_seqlens: Tensor | None = None,
    aggregation: str = "token_mean",
    constant_length: int | None = None,
    normaliser: float | Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float = 0.0,
    logit_scale: float = 1.0,
    workspace_bytes: int | None = None,
    accumulate_main_grad: bool = False,
) -> tuple[Tensor, Metrics]:
    """A distillation loss over a linear head in one pass; differentiable in hidden, weight, bias, not in the teacher.

    Either from stored log-probabilities of K ids a token (three products), or from the teacher's own hidden states and
    head (four: both models' logits, dX, dW).

    Args:
        hidden, weight, bias, temperature, softcap, logit_scale, mask, cu_seqlens, normaliser, workspace_bytes,
            accumulate_main_grad: as in linear_policy_loss. The temperature divides the teacher's logits too.
        ids: like mask, or (..., K): the ids whose teacher_logprobs are given, distinct within a token for K > 1.
        teacher_logprobs: like ids, in nats; already at the temperature of this loss.
        spec: DistillSpec, the divergence. "clip_forward" wants ids like mask; the others also serve top-K ids, with one
            bucket for all other ids.
        teacher_hidden: (B, L, Dt) or (T, Dt), teacher_weight: (V, Dt), teacher_bias: (V,) or None, of hidden's dtype:
            the full-vocabulary form, instead of ids and teacher_logprobs; not for "clip_forward".
        teacher_softcap, teacher_logit_scale: of the teacher's head.
        aggregation, constant_length: as in LossSpec.
    Returns: (loss, metrics): of METRICS, "kl" is the mean divergence in nats (full-vocabulary form), "entropy" the
        student's, the rest count rows.
    Raises: as linear_logprobs.
    """
    op = "linear_distill_loss"
    spec = DistillSpec() if spec is None else spec
    if not isinstance(spec, DistillSpec):
        raise refuse(op, "spec", "a DistillSpec", spec)
    check_choice(op, "aggregation", aggregation, AGGREGATIONS)
    check_length(op, aggregation, constant_length)
    check_head(op, hidden, weight, bias, softcap, logit_scale, leading=(1, 2))
    shape = hidden.shape[:-1]
    if teacher_hidden is None:
        if ids is None:
            raise refuse(op, "ids", "a tensor, with teacher_logprobs (or else teacher_hidden, teacher_weight)", ids)
        if teacher_weight is not None or teacher_bias is not None:
            name = "teacher_bias" if teacher_weight is None else "teacher_weight"
            got = teacher_bias if teacher_weight is None else teacher_weight
            raise refuse(op, name, "None without teacher_hidden", got)
        columns = spec.divergence != "clip_forward"
        layout = check_batch(op, hidden, ids, mask, None, cu_seqlens, weight.shape[0], columns=columns)
        check_stream(op, "teacher_logprobs", teacher_logprobs, ids.shape, hidden, required=True)
        assert teacher_logprobs is not None
        weights = batch.weights(op, layout, aggregation, constant_length, normaliser)
        teacher = batch.flat(teacher_logprobs)
        assert teacher is not None
        tokens = Tokens(weight=weights, teacher_logprobs=per_row(teacher.view(ids.shape), len(weights)))
        return one_pass(
            op, hidden, weight, bias, ids, temperature, tokens, spec, logit_scale, softcap, workspace_bytes,
            accumulate_main_grad,
        )  # fmt: skip
    if ids is not None or teacher_logprobs is not None:
        raise refuse(op, "teacher_hidden", "None where ids and teacher_logprobs are given", teacher_hidden)
    if spec.divergence == "clip_forward":
        raise refuse(op, "spec", "'forward', 'reverse' or 'js' with teacher_hidden", f"{spec.divergence!r}")
    check_head(op, teacher_hidden, teacher_weight, teacher_bias, teacher_softcap, teacher_logit_scale, leading=(1, 2),
               prefix="teacher_")  # fmt: skip
    assert teacher_weight is not None
    if (teacher_hidden.shape[:-1], teacher_hidden.dtype, teacher_hidden.device) != (shape, hidden.dtype, hidden.device):
        want = f"{with_letter(shape, 'Dt')} {hidden.dtype} on {hidden.device}, like hidden"
        raise refuse(op, "teacher_hidden", want, teacher_hidden)
    if teacher_weight.shape[0] != weight.shape[0]:
        raise refuse(op, "teacher_weight", f"({weight.shape[0]}, Dt): the student's vocabulary", teacher_weight)
    layout = check_mask(op, mask, shape, hidden, None, cu_seqlens)
    weights = batch.weights(op, layout, aggregation, constant_length, normaliser)
    rows = hidden.reshape(-1, hidden.shape[-1]).contiguous()
    scale = temperature_rows(op, temperature, shape, hidden)
    workspace = workspace_of(op, workspace_bytes, weight)
    teacher_rows = teacher_hidden.detach().reshape(-1, teacher_hidden.shape[-1]).contiguous()
    teacher_bias = None if teacher_bias is None else teacher_bias.detach().contiguous()

    def call(h: Tensor, w: Tensor, b: Tensor | None, wanted: tuple[bool, bool, bool], wide: bool) -> tuple[Tensor, ...]:
        return distill_op(
            h, w, b, scale, weights, teacher_rows, teacher_weight.detach().contiguous(), teacher_bias,
            float(logit_scale), float(softcap), float(teacher_logit_scale), float(teacher_softcap),
            spec.divergence, float(spec.beta), *wanted, wide, workspace,
        )  # fmt: skip

    loss, metrics = formed(op, rows, weight, bias, call, accumulate_main_grad)
    named = losses.named(metrics, spec)
    return loss, {"kl": metrics[METRICS.index("kl")], **named}


def policy_tokens(
    op: str,
    spec: LossSpec | losses.TokenLoss,
    layout: batch.Layout,
    shape: torch.Size,
    advantages: Tensor,
    streams: tuple[tuple[str, Tensor | None], ...],
    normaliser: float | Tensor | None,
) -> Tokens:
    """The streams of a policy loss."""
    if not is_strided(advantages) or not advantages.is_floating_point() or advantages.device != layout.mask.device:
        device = layout.mask.device
        want = f"{tuple(shape)}, like ids, or ({layout.sequences},), one a sequence, floating point on {device}"
        raise refuse(op, "advantages", want, advantages)
    aggregation, length = ("token_mean", None)
    if isinstance(spec, LossSpec):
        aggregation, length = spec.aggregation, spec.constant_length
    old, ref, sampler = (batch.flat(stream) for _, stream in streams)
    return Tokens(
        weight=batch.weights(op, layout, aggregation, length, normaliser),
        advantages=batch.per_token(op, "advantages", advantages, layout, shape),
        old_logprobs=old,
        ref_logprobs=ref,
        sampler_logprobs=sampler,
        sequence=layout.sequence,
        step=layout.step,
    )


def one_pass(
    op: str,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    temperature: float | Tensor,
    tokens: Tokens,
    spec: LossSpec | DistillSpec | losses.TokenLoss,
    logit_scale: float,
    softcap: float,
    workspace_bytes: int | None,
    accumulate_main_grad: bool,
) -> tuple[Tensor, Metrics]:
    described = spec.to_text() if isinstance(spec, (LossSpec, DistillSpec)) else spec
    rows = hidden.reshape(-1, hidden.shape[-1]).contiguous()
    columns = per_row(ids, len(rows)).to(torch.int64).contiguous()
    scale = temperature_rows(op, temperature, hidden.shape[:-1], hidden)
    workspace = workspace_of(op, workspace_bytes, weight)

    def call(h: Tensor, w: Tensor, b: Tensor | None, wanted: tuple[bool, bool, bool], wide: bool) -> tuple[Tensor, ...]:
        return policy_op(
            h, w, columns, b, scale, *tokens, float(logit_scale), float(softcap), described, *wanted, wide, workspace
        )

    loss, metrics = formed(op, rows, weight, bias, call, accumulate_main_grad)
    return loss, losses.named(metrics, spec)
