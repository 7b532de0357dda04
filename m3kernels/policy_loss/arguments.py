"""What the public functions of the family accept: one function an argument, each raising the error that names it.

Values are looked at only where that costs no synchronisation: on the CPU, and not while compiling.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from m3kernels.checks import is_strided, refuse
from m3kernels.policy_loss import batch
from m3kernels.policy_loss.types import LossSpec, check_number

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
DTYPE_NAMES = "float32, bfloat16, float16 or float64"
WORKSPACE = {"cpu": 64 << 20}  # bytes of logits held at once where the caller names none
WORKSPACE_ELSEWHERE = 1 << 30


def check_head(
    op: str,
    hidden: object,
    weight: object,
    bias: object,
    softcap: object,
    logit_scale: object,
    *,
    leading: tuple[int, ...] = (1,),
    prefix: str = "",
) -> None:
    """hidden (T, D) or (B, L, D), weight (V, D), bias (V,) or None of one dtype and device; the head's numbers."""
    shapes = " or ".join({1: "(T, D)", 2: "(B, L, D)"}[n] for n in leading)
    if not is_strided(hidden) or hidden.ndim - 1 not in leading or hidden.dtype not in DTYPES:
        raise refuse(op, f"{prefix}hidden", f"{shapes} {DTYPE_NAMES}", hidden)
    size = hidden.shape[-1]
    good = is_strided(weight) and weight.ndim == 2 and weight.shape[1] == size and weight.dtype == hidden.dtype
    if not good or weight.device != hidden.device or not weight.shape[0]:  # type: ignore[attr-defined]
        want = f"(V, {size}) {hidden.dtype} on {hidden.device}, like {prefix}hidden, V >= 1"
        raise refuse(op, f"{prefix}weight", want, weight)
    vocabulary = weight.shape[0]  # type: ignore[attr-defined]
    good = is_strided(bias) and bias.shape == (vocabulary,) and bias.dtype == hidden.dtype
    if bias is not None and not (good and bias.device == hidden.device):  # type: ignore[attr-defined]
        raise refuse(op, f"{prefix}bias", f"({vocabulary},) {hidden.dtype} on {hidden.device}, or None", bias)
    check_number(op, f"{prefix}softcap", softcap, at_least=0.0)
    good = isinstance(logit_scale, (int, float)) and not isinstance(logit_scale, bool)
    if not good or logit_scale == 0 or not math.isfinite(logit_scale):  # type: ignore[arg-type]
        raise refuse(op, f"{prefix}logit_scale", "a finite number, not 0", logit_scale)


def check_ids(op: str, ids: object, shape: Sequence[int], hidden: Tensor, *, columns: bool) -> None:
    """ids of the given shape, or with one more dimension K >= 1 where columns are allowed."""
    good = is_strided(ids) and ids.dtype in (torch.int32, torch.int64) and ids.device == hidden.device
    exact = good and ids.shape == tuple(shape)  # type: ignore[attr-defined]
    wider = good and columns and ids.shape[:-1] == tuple(shape) and ids.shape[-1] >= 1  # type: ignore[attr-defined]
    if not exact and not wider:
        want = f"{tuple(shape)}{f' or {(*shape, chr(75))}' if columns else ''} int32 or int64 on {hidden.device}"
        raise refuse(op, "ids", want, ids)


def check_range(op: str, ids: Tensor, vocabulary: int) -> None:
    """ids in [0, vocabulary); asked only where it costs no synchronisation."""
    if ids.is_cpu and ids.numel() and not torch.compiler.is_compiling():
        low, high = ids.aminmax()
        if low < 0 or high >= vocabulary:
            raise refuse(op, "ids", f"values in 0..{vocabulary - 1} where mask is not 0", f"{int(low)}..{int(high)}")


def check_mask(
    op: str, mask: object, shape: Sequence[int], like: Tensor, segment_ids: Tensor | None, cu_seqlens: Tensor | None
) -> batch.Layout:
    """The layout of a batch whose mask has the shape of its tokens."""
    good = is_strided(mask) and mask.shape == tuple(shape) and mask.device == like.device and not mask.is_complex()
    if not good:
        raise refuse(op, "mask", f"{tuple(shape)} bool or numbers >= 0 on {like.device}, like ids", mask)
    assert isinstance(mask, Tensor)
    if mask.is_cpu and mask.numel() and mask.dtype != torch.bool and not torch.compiler.is_compiling():
        low, high = mask.detach().aminmax()
        if not (low >= 0 and high < torch.inf):
            raise refuse(op, "mask", "finite numbers >= 0", f"{float(low)}..{float(high)}")
    wide = torch.float64 if like.dtype == torch.float64 else torch.float32
    return batch.layout(op, mask, segment_ids, cu_seqlens, wide)


def check_batch(
    op: str,
    hidden: Tensor,
    ids: Tensor,
    mask: Tensor | None,
    segment_ids: Tensor | None,
    cu_seqlens: Tensor | None,
    vocabulary: int,
    *,
    columns: bool = False,
) -> batch.Layout:
    """The layout of a batch, its ids checked where its mask is not 0."""
    shape = hidden.shape[:-1]
    check_ids(op, ids, shape, hidden, columns=columns)
    layout = check_mask(op, mask, shape, hidden, segment_ids, cu_seqlens)
    if ids.is_cpu and not torch.compiler.is_compiling():
        check_range(op, per_row(ids, layout.mask.numel())[layout.mask != 0], vocabulary)
    return layout


def check_stream(op: str, name: str, stream: object, shape: Sequence[int], like: Tensor) -> None:
    """None, or floating point of the tokens' shape, on their device."""
    good = is_strided(stream) and stream.shape == tuple(shape) and stream.is_floating_point()
    if stream is not None and not (good and stream.device == like.device):  # type: ignore[attr-defined]
        raise refuse(op, name, f"{tuple(shape)} floating point on {like.device}, like ids, or None", stream)


def check_needs(op: str, spec: object, ref_logprobs: object, sampler_logprobs: object) -> None:
    """A LossSpec has the streams that it needs; anything else can be called."""
    if not isinstance(spec, LossSpec):
        if not callable(spec):
            raise refuse(op, "spec", "a LossSpec, or a function (logprobs, tokens, entropy) -> losses", spec)
        return
    if spec.kl_coef > 0 and ref_logprobs is None:
        raise refuse(op, "ref_logprobs", f"a tensor like ids, for kl_coef={spec.kl_coef}", None)
    if spec.sampler_level is not None and sampler_logprobs is None:
        raise refuse(op, "sampler_logprobs", f"a tensor like ids, for sampler_level={spec.sampler_level!r}", None)


def check_main_grad(op: str, weight: Tensor, accumulate: bool) -> bool:
    main = getattr(weight, "main_grad", None)
    if accumulate and not (is_strided(main) and main.shape == weight.shape and main.is_floating_point()):
        raise refuse(op, "weight.main_grad", f"{tuple(weight.shape)} floating point, to accumulate into", main)
    return accumulate


def temperature_rows(op: str, temperature: object, shape: Sequence[int], hidden: Tensor) -> Tensor | None:
    """(T,) fp32 (fp64 for fp64 hidden), or None where it is 1."""
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    count = math.prod(shape)
    if isinstance(temperature, Tensor):
        good = is_strided(temperature) and temperature.shape in (tuple(shape), ()) and temperature.is_floating_point()
        if good and temperature.is_cpu and temperature.numel() and not torch.compiler.is_compiling():
            low, high = temperature.detach().aminmax()
            good = bool(low > 0) and bool(high < torch.inf)
        if not good:
            raise refuse(op, "temperature", f"a number > 0, or {tuple(shape)} floating point > 0", temperature)
        rows = temperature.detach().to(device=hidden.device, dtype=dtype)
        return rows.expand(shape).reshape(count).contiguous()
    if not isinstance(temperature, (int, float)) or isinstance(temperature, bool) or not 0 < temperature < math.inf:
        raise refuse(op, "temperature", f"a number > 0, or {tuple(shape)} floating point > 0", temperature)
    return None if temperature == 1 else torch.full((count,), float(temperature), dtype=dtype, device=hidden.device)


def workspace_of(op: str, workspace_bytes: object, hidden: Tensor) -> int:
    if workspace_bytes is None:
        return WORKSPACE.get(hidden.device.type, WORKSPACE_ELSEWHERE)
    if type(workspace_bytes) is not int or workspace_bytes < 1:
        raise refuse(op, "workspace_bytes", "an int >= 1, or None", workspace_bytes)
    return workspace_bytes


def per_row(stream: Tensor, rows: int) -> Tensor:
    """A stream of ``rows`` tokens, or of K columns for each, as (rows, K)."""
    columns = stream.numel() // rows if rows else 1
    return stream.reshape(rows, columns)
