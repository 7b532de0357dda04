"""From an objective and a packed batch to its loss, through m3kernels.policy_loss alone.

A batch may come in pieces (microbatches, ranks): each piece is divided by the normaliser of the whole, so that losses
and gradients of the pieces add up to those of the whole.

    token_mean     sum of the masks                      sequence_mean  sequences that have a token
    constant       sequences that have a token * constant_length
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from m3.train.policy_model import PolicyModel, moved
from m3.train.stage import NonFiniteError, Objective
from m3.train.streams import Packed, Sample, pack
from m3kernels.checks import refuse
from m3kernels.policy_loss import METRICS, DistillSpec, LossSpec, linear_distill_loss, linear_policy_loss
from m3kernels.policy_loss.types import COUNTS

OP = "train"


def needed(objective: Objective, samples: Sequence[Sample], updates: int = 1) -> tuple[str, ...]:
    """Streams that all samples of a batch must have, ``updates`` optimiser updates being taken on it.

    With one update the policy before it is the policy itself: its log-probabilities are not needed, and every ratio
    is 1. They are with more updates, or where a sample brings its own; never where the objective is ``on_policy``.
    """
    spec = objective.spec
    if isinstance(spec, DistillSpec):
        return ("teacher_logprobs",)
    names = ["advantages"]
    told = any(sample.old_logprobs is not None for sample in samples)
    if not objective.on_policy and (updates > 1 or told):
        names.append("old_logprobs")
    if spec.kl_coef > 0:
        names.append("ref_logprobs")
    if spec.sampler_level is not None:
        names.append("sampler_logprobs")
    return tuple(names)


def check_streams(objective: Objective, samples: Sequence[Sample], updates: int = 1) -> None:
    """Look at what the objective needs of each sample, where its mask is not 0.

    Raises:
        ValueError: a sample lacks a stream. NonFiniteError: nan or inf in one (-inf is a log-probability).
    """
    for name in needed(objective, samples, updates):
        for sample in samples:
            stream = getattr(sample, name)
            if stream is None:
                want = f"a stream of every sample, for {_named(objective.spec)}"
                raise refuse(OP, name, want, f"none of sample {sample.id!r}")
            values = stream[sample.mask > 0]
            if bool((values.isnan() | (values == torch.inf)).any()) or (
                name == "advantages" and bool(values.isinf().any())
            ):
                raise NonFiniteError(f"{OP}: {name}: want finite numbers where mask > 0; got others, {sample.id!r}")


def normaliser(objective: Objective, samples: Sequence[Sample]) -> float:
    """What divides the loss of all these samples together: those of one update, over all microbatches and ranks.

    Raises:
        ValueError: no token counts; such a batch has no loss.
    """
    spec = objective.spec
    kind = spec.aggregation if isinstance(spec, LossSpec) else objective.aggregation
    length = spec.constant_length if isinstance(spec, LossSpec) else None
    if kind == "token_mean":
        total = math.fsum(float(sample.mask.double().sum()) for sample in samples)
    else:
        total = float(sum(sample.drawn > 0 for sample in samples))
        total *= length if kind == "constant" and length is not None else 1
    if total <= 0:
        raise refuse(OP, "mask", "a token that counts in some sample", f"none in {len(samples)}")
    return total


def loss(
    objective: Objective, model: PolicyModel, packed: Packed, total: float, *, workspace_bytes: int | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss, metrics) of a piece of a batch whose normaliser is ``total``; differentiable in the model.

    Token t is predicted from the hidden state of token t - 1: streams are shifted by one. The row between two sequences
    is that of a first token, whose mask is 0.

    Returns:
        (0-D fp32 (fp64 for an fp64 model); metrics of linear_policy_loss or linear_distill_loss).
    Raises:
        ValueError: a stream is missing; or as those functions.
    """
    spec = objective.spec
    hidden = model.hidden(packed)[:-1]
    head = model.head  # where the model is sharded, the pass has gathered it
    batch = moved(packed, hidden.device)
    bounds = packed.cu_seqlens.clone()
    bounds[1:] -= 1
    temperature = batch.temperature[1:]
    first = float(packed.temperature[0])
    shared: dict[str, Any] = dict(
        cu_seqlens=bounds,
        normaliser=total,
        bias=head.bias,
        temperature=first if bool((packed.temperature == first).all()) else temperature,
        softcap=head.softcap,
        workspace_bytes=workspace_bytes,
    )
    if isinstance(spec, DistillSpec):
        return linear_distill_loss(
            hidden, head.weight, batch.ids[1:], _shifted(batch, "teacher_logprobs", spec), batch.mask[1:], spec,
            aggregation=objective.aggregation, **shared,
        )  # fmt: skip
    kl, sampler = spec.kl_coef > 0, spec.sampler_level is not None
    return linear_policy_loss(
        hidden,
        head.weight,
        batch.ids[1:],
        _shifted(batch, "advantages", spec),
        None if objective.on_policy or batch.old_logprobs is None else batch.old_logprobs[1:],
        _shifted(batch, "ref_logprobs", spec) if kl else None,
        _shifted(batch, "sampler_logprobs", spec) if sampler else None,
        batch.mask[1:],
        batch.steps[1:],
        spec,
        **shared,
    )


def with_logprobs(stream: str, samples: Sequence[Sample], model: PolicyModel) -> list[Sample]:
    """The samples of one microbatch, those that lack ``stream`` given it by a model, without gradient."""
    lengths = [sample.tokens for sample in samples]
    found = model.logprobs(pack(samples)).split(lengths)
    return [
        sample if getattr(sample, stream) is not None else dataclasses.replace(sample, **{stream: logprobs.clone()})
        for sample, logprobs in zip(samples, found, strict=True)
    ]


class MetricSum:
    """Metrics of the pieces of a batch, put together: means over tokens, the largest ratio, counts, the summed loss."""

    def __init__(self) -> None:
        self.loss = 0.0
        self.tokens = 0.0
        self._sums: dict[str, float] = {}

    def add(self, loss: float, metrics: Mapping[str, Tensor]) -> None:
        self.loss += loss
        tokens = float(metrics["tokens"])
        self.tokens += tokens
        for name, value in metrics.items():
            before, here = self._sums.get(name, 0.0), float(value)
            if name == "ratio_max":
                self._sums[name] = max(before, here)
            else:
                self._sums[name] = before + (here if name in COUNTS else here * tokens)

    def merge(self, other: MetricSum) -> None:
        """Add the pieces of another sum."""
        self.loss += other.loss
        self.tokens += other.tokens
        for name, value in other._sums.items():
            before = self._sums.get(name, 0.0)
            self._sums[name] = max(before, value) if name == "ratio_max" else before + value

    def values(self) -> dict[str, float]:
        """By name, in the order of METRICS."""
        whole = {name: self._sums[name] for name in METRICS if name in self._sums}
        plain = (*COUNTS, "ratio_max")
        return {name: value if name in plain else value / max(self.tokens, 1.0) for name, value in whole.items()}


def _shifted(packed: Packed, name: str, spec: LossSpec | DistillSpec) -> Tensor:
    stream = getattr(packed, name)
    if stream is None:
        raise refuse(OP, name, f"a stream of every sample, for {_named(spec)}", "none")
    return stream[1:]


def _named(spec: LossSpec | DistillSpec) -> str:
    if isinstance(spec, DistillSpec):
        return f"divergence {spec.divergence!r}"
    return f"kl_coef={spec.kl_coef:g}, sampler_level={spec.sampler_level!r}"
