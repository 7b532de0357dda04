"""What a trainer sees: sequences of tokens, each token with its streams. No algorithm, no text, no environment.

Token in, token out: ``ids`` are what the model was given and what its sampler drew, never re-tokenised text. Streams
are aligned with ``ids``: entry t is of token t, whose log-probability is read from the hidden state of token t - 1.
Entry 0 of a sequence has no predictor: its mask is 0. All log-probabilities are in nats, at the sampling temperature.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from m3kernels.checks import refuse

FLOAT_STREAMS = ("sampler_logprobs", "old_logprobs", "ref_logprobs", "teacher_logprobs", "advantages")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    """One sequence of T tokens. Streams that are None are not known, or not needed.

    Args:
        id: of the segment or trajectory it came from.
        ids: (T,) int64.
        mask: (T,) fp32 >= 0: weight of the token in the loss; 0 on everything the policy did not draw, and on token 0.
        steps: (T,) int64: which step (exchange) a token belongs to; -1 outside the policy's tokens.
        sampler_logprobs: (T,) fp32 under the policy that drew the token, its filters included.
        old_logprobs: (T,) under the trainer's policy before this update.
        ref_logprobs, teacher_logprobs: (T,) under the reference, and under the teacher of the sample's domain.
        advantages: (T,).
        versions: (T,) int64: of the weights that drew the token; -1 elsewhere.
        domain: names the teacher ("inquiry", "advisory", "general").
        group: rollouts of one context share it. rollout: counts them.
        reward: of the sequence, unpenalised; None in offline distillation.
        gammas: gamma of each step (Eq 7), by step number.
        temperature: that the tokens were drawn at, > 0.
        note: small facts for reports (name to text or number); never read by the loop.
    """

    id: str
    ids: Tensor
    mask: Tensor
    steps: Tensor
    sampler_logprobs: Tensor | None = None
    old_logprobs: Tensor | None = None
    ref_logprobs: Tensor | None = None
    teacher_logprobs: Tensor | None = None
    advantages: Tensor | None = None
    versions: Tensor | None = None
    domain: str = ""
    group: str = ""
    rollout: int = 0
    reward: float | None = None
    gammas: dict[int, float] = dataclasses.field(default_factory=dict)
    temperature: float = 1.0
    note: dict[str, str | float] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        op, tokens = "Sample", len(self.ids)
        if self.ids.dtype != torch.int64 or self.ids.ndim != 1 or tokens < 2:
            raise refuse(op, "ids", "(T >= 2,) int64", self.ids)
        for name, dtype in (("mask", torch.float32), ("steps", torch.int64), ("versions", torch.int64)):
            self._check(name, dtype)
        for name in FLOAT_STREAMS:
            self._check(name, torch.float32)
        if not bool(((self.mask >= 0) & torch.isfinite(self.mask)).all()) or bool(self.mask[0] != 0):
            raise refuse(op, "mask", "finite numbers >= 0, the first 0", "others")
        if self.temperature <= 0:
            raise refuse(op, "temperature", "a number > 0", self.temperature)

    def _check(self, name: str, dtype: torch.dtype) -> None:
        stream = getattr(self, name)
        if stream is not None and (stream.shape != self.ids.shape or stream.dtype != dtype):
            raise refuse("Sample", name, f"({len(self.ids)},) {dtype}", stream)

    @property
    def tokens(self) -> int:
        """All of them, T."""
        return len(self.ids)

    @property
    def drawn(self) -> int:
        """Tokens that count in the loss."""
        return int((self.mask > 0).sum())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Packed:
    """Samples one after the other, T tokens in all, B sequences; streams that any sample lacks are None.

    ``cu_seqlens`` (B + 1,) int64 bounds them; ``position_ids`` (T,) restart in each. ``temperature`` (T,) fp32.
    """

    ids: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    mask: Tensor
    steps: Tensor
    temperature: Tensor
    sampler_logprobs: Tensor | None = None
    old_logprobs: Tensor | None = None
    ref_logprobs: Tensor | None = None
    teacher_logprobs: Tensor | None = None
    advantages: Tensor | None = None

    @property
    def sequences(self) -> int:
        return len(self.cu_seqlens) - 1


def pack(samples: Sequence[Sample]) -> Packed:
    """One packed batch.

    Raises:
        ValueError: no sample.
    """
    if not samples:
        raise refuse("pack", "samples", "at least one", "none")
    lengths = [sample.tokens for sample in samples]
    streams: dict[str, Tensor | None] = {}
    for name in FLOAT_STREAMS:
        parts = [getattr(sample, name) for sample in samples]
        streams[name] = None if any(part is None for part in parts) else torch.cat(parts)
    return Packed(
        ids=torch.cat([sample.ids for sample in samples]),
        position_ids=torch.cat([torch.arange(length) for length in lengths]),
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0),
        mask=torch.cat([sample.mask for sample in samples]),
        steps=torch.cat([sample.steps for sample in samples]),
        temperature=torch.cat([torch.full((sample.tokens,), sample.temperature) for sample in samples]),
        **streams,
    )


def microbatches(samples: Iterable[Sample], max_tokens: int) -> list[list[Sample]]:
    """Samples in order, cut where the next would exceed ``max_tokens``; a longer sample stands alone."""
    if max_tokens < 1:
        raise refuse("microbatches", "max_tokens", "at least 1", max_tokens)
    out: list[list[Sample]] = []
    held = 0
    for sample in samples:
        if not out or held + sample.tokens > max_tokens:
            out.append([])
            held = 0
        out[-1].append(sample)
        held += sample.tokens
    return out
