"""From what a caller has, a padded or packed batch, to streams of T tokens: sequences, steps, weights.

A sequence is a row of a padded batch, or a run between two of ``cu_seqlens``. A step is a run of one segment id within
a sequence; without ids, a run of tokens whose mask is not 0. Weights make the loss a plain sum:

    token_mean     mask / tokens                                     tokens = sum of mask
    sequence_mean  mask / (tokens of the sequence * sequences)       sequences that have a token
    constant       mask / (sequences * constant_length)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from m3kernels.checks import has_data, is_strided, refuse
from m3kernels.policy_loss.types import wide_dtype


class Layout(NamedTuple):
    """T tokens of a batch, flattened."""

    mask: Tensor  # (T,) fp32 or fp64
    sequence: Tensor  # (T,) int64, from 0, never decreasing
    step: Tensor  # (T,) int64, never decreasing
    sequences: int


def flat(stream: Tensor | None) -> Tensor | None:
    """(T,) of a (B, L) or (T,) stream, in fp32 (fp64 if it is), without gradient."""
    if stream is None:
        return None
    return stream.detach().reshape(-1).to(wide_dtype(stream))


def layout(op: str, mask: Tensor, segment_ids: Tensor | None, cu_seqlens: Tensor | None, dtype: torch.dtype) -> Layout:
    """The layout of a batch whose mask is (B, L) or (T,), numbers in dtype; checks segment_ids and cu_seqlens."""
    device, count = mask.device, mask.numel()
    if mask.ndim == 2:
        if cu_seqlens is not None:
            raise refuse(op, "cu_seqlens", "None for a padded batch: its rows are the sequences", cu_seqlens)
        sequences = mask.shape[0]
        sequence = torch.arange(sequences, device=device).repeat_interleave(mask.shape[1])
    elif cu_seqlens is None:
        sequences, sequence = 1, torch.zeros(count, dtype=torch.int64, device=device)
    else:
        bounds = check_bounds(op, cu_seqlens, count)
        sequences = len(bounds) - 1
        lengths = (bounds[1:] - bounds[:-1]).to(device)
        sequence = torch.arange(sequences, device=device).repeat_interleave(lengths, output_size=count)
    weights = mask.detach().reshape(-1).to(dtype)
    if segment_ids is None:
        segments = (weights != 0).to(torch.int64)
    else:
        good = is_strided(segment_ids) and segment_ids.shape == mask.shape and segment_ids.device == device
        if not good or segment_ids.is_floating_point() or segment_ids.is_complex():
            raise refuse(op, "segment_ids", f"{tuple(mask.shape)} integers on {device}, like ids, or None", segment_ids)
        segments = segment_ids.reshape(-1).to(torch.int64)
    return Layout(weights, sequence, steps(sequence, segments), sequences)


def steps(sequence: Tensor, segments: Tensor) -> Tensor:
    """(T,) index of each token's step: a new one begins where the sequence or the segment id changes."""
    if not len(sequence):
        return sequence
    new = (sequence[1:] != sequence[:-1]) | (segments[1:] != segments[:-1])
    return torch.cat([sequence.new_zeros(1), new.to(torch.int64)]).cumsum(0)


def check_bounds(op: str, cu_seqlens: Tensor, count: int) -> Tensor:
    """cu_seqlens on the CPU in int64. Raises ValueError unless 0 <= ... <= count, never decreasing."""
    good = has_data(cu_seqlens) and cu_seqlens.ndim == 1 and cu_seqlens.dtype in (torch.int32, torch.int64)
    if not good or len(cu_seqlens) < 1:
        raise refuse(op, "cu_seqlens", "(B + 1,) int32 or int64", cu_seqlens)
    bounds = cu_seqlens.detach().to(device="cpu", dtype=torch.int64)
    if bounds[0] != 0 or bounds[-1] != count or bool((bounds[1:] < bounds[:-1]).any()):
        raise refuse(
            op, "cu_seqlens", f"0 = cu_seqlens[0] <= ... <= cu_seqlens[-1] = {count}", f"{bounds.tolist()[:8]}"
        )
    return bounds


def per_token(op: str, name: str, stream: Tensor, batch: Layout, shape: torch.Size) -> Tensor:
    """(T,) of a stream of the tokens (of ``shape``), or of the sequences (B,)."""
    if stream.shape == shape:
        found = flat(stream)
        assert found is not None
        return found
    if stream.shape != (batch.sequences,):
        raise refuse(op, name, f"{tuple(shape)}, like ids, or ({batch.sequences},), one a sequence", stream)
    values = flat(stream)
    assert values is not None
    return values[batch.sequence]


def weights(
    op: str, batch: Layout, aggregation: str, constant_length: int | None, normaliser: float | Tensor | None
) -> Tensor:
    """(T,) what each token's loss counts: the formulas of this module, with ``normaliser`` for tokens or sequences."""
    mask = batch.mask
    divisor = None if normaliser is None else positive(op, normaliser, mask)
    if aggregation == "token_mean":
        tokens = mask.sum() if divisor is None else divisor
        return mask / torch.where(tokens > 0, tokens, 1.0)
    per_sequence = torch.zeros(batch.sequences, dtype=mask.dtype, device=mask.device)
    if batch.sequences:
        lengths = torch.bincount(batch.sequence, minlength=batch.sequences)
        per_sequence = torch.segment_reduce(mask, "sum", lengths=lengths, initial=0.0)
    if aggregation == "constant":
        assert constant_length is not None
        sequences = (per_sequence > 0).sum().to(mask.dtype) * constant_length if divisor is None else divisor
        return mask / torch.where(sequences > 0, sequences, 1.0)
    sequences = (per_sequence > 0).sum().to(mask.dtype) if divisor is None else divisor
    tokens = torch.where(per_sequence > 0, per_sequence, 1.0)[batch.sequence]
    return mask / (tokens * torch.where(sequences > 0, sequences, 1.0))


def positive(op: str, normaliser: float | Tensor, like: Tensor) -> Tensor:
    """The normaliser as a 0-D tensor; a number, or a tensor on CPU, must be > 0."""
    least, most = torch.finfo(like.dtype).tiny, torch.finfo(like.dtype).max
    if isinstance(normaliser, Tensor):
        good = has_data(normaliser) and normaliser.numel() == 1 and not normaliser.is_complex()
        good = good and (not normaliser.is_cpu or least <= float(normaliser) <= most)
    else:
        good = isinstance(normaliser, (int, float)) and not isinstance(normaliser, bool)
        good = good and least <= normaliser <= most
    if not good:
        raise refuse(op, "normaliser", "a finite number > 0, or a tensor of one", normaliser)
    return torch.as_tensor(normaliser, device=like.device).detach().to(like.dtype).reshape(())
