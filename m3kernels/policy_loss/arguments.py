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
from m3kernels.policy_loss.types import RATIO_LEVELS, LossSpec, check_choice, check_number, wide_dtype

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
DTYPE_NAMES = "float32, bfloat16, float16 or float64"
LARGEST = torch.finfo(torch.float32).max
WORKSPACE = {"cpu": 64 << 20}  # bytes of logits held at once where the caller names none, by device; or WORKSPACE_ROWS
WORKSPACE_ELSEWHERE = 1 << 30
WORKSPACE_ROWS = 256  # of logits at least: fewer make the products slow, and each piece reads and writes all of dW


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
    good = is_strided(hidden) and hidden.ndim - 1 in leading and hidden.dtype in DTYPES
    if not good or not hidden.shape[-1]:  # type: ignore[attr-defined]
        raise refuse(op, f"{prefix}hidden", f"{shapes} {DTYPE_NAMES}, D >= 1", hidden)
    assert isinstance(hidden, Tensor)
    size = hidden.shape[-1]
    good = is_strided(weight) and weight.ndim == 2 and weight.shape[1] == size and weight.dtype == hidden.dtype
    if not good or weight.device != hidden.device or not weight.shape[0]:  # type: ignore[attr-defined]
        want = f"(V, {size}) {hidden.dtype} on {hidden.device}, like {prefix}hidden, V >= 1"
        raise refuse(op, f"{prefix}weight", want, weight)
    if hasattr(weight, "full_tensor"):
        raise refuse(op, f"{prefix}weight", "a plain tensor, such as weight.full_tensor()", "a DTensor")
    vocabulary = weight.shape[0]  # type: ignore[attr-defined]
    good = is_strided(bias) and bias.shape == (vocabulary,) and bias.dtype == hidden.dtype
    if bias is not None and not (good and bias.device == hidden.device):  # type: ignore[attr-defined]
        raise refuse(op, f"{prefix}bias", f"({vocabulary},) {hidden.dtype} on {hidden.device}, or None", bias)
    check_number(op, f"{prefix}softcap", softcap, at_least=0.0)
    good = isinstance(logit_scale, (int, float)) and not isinstance(logit_scale, bool)
    if not good or not 0 < abs(logit_scale) <= LARGEST:  # type: ignore[arg-type]
        raise refuse(op, f"{prefix}logit_scale", "a finite number, not 0", logit_scale)


def check_ids(op: str, ids: object, shape: Sequence[int], hidden: Tensor, *, columns: bool) -> None:
    """ids of the given shape, or with one more dimension K >= 1 where columns are allowed."""
    good = is_strided(ids) and ids.dtype in (torch.int32, torch.int64) and ids.device == hidden.device
    exact = good and ids.shape == tuple(shape)  # type: ignore[attr-defined]
    wider = good and columns and ids.shape[:-1] == tuple(shape) and ids.shape[-1] >= 1  # type: ignore[attr-defined]
    if not exact and not wider:
        wanted = f"{tuple(shape)} or {with_letter(shape, 'K')}" if columns else f"{tuple(shape)}"
        raise refuse(op, "ids", f"{wanted} int32 or int64 on {hidden.device}", ids)


def with_letter(shape: Sequence[int], letter: str) -> str:
    """A shape whose last size is free, in words: (7, K)."""
    return f"({', '.join(map(str, shape))}, {letter})"


def check_range(op: str, ids: Tensor, vocabulary: int, *, where: str = "") -> None:
    """ids in [0, vocabulary); asked only where it costs no synchronisation. ``where`` says which of them."""
    if ids.is_cpu and ids.numel() and not torch.compiler.is_compiling():
        low, high = ids.aminmax()
        if low < 0 or high >= vocabulary:
            raise refuse(op, "ids", f"values in 0..{vocabulary - 1}{where}", f"{int(low)}..{int(high)}")


def check_mask(
    op: str, mask: object, shape: Sequence[int], like: Tensor, segment_ids: Tensor | None, cu_seqlens: Tensor | None
) -> batch.Layout:
    """The layout of a batch whose mask has the shape of its tokens."""
    good = is_strided(mask) and mask.shape == tuple(shape) and mask.device == like.device and not mask.is_complex()
    if not good:
        raise refuse(op, "mask", f"{tuple(shape)} bool or numbers >= 0 on {like.device}, like ids", mask)
    assert isinstance(mask, Tensor)
    wide = wide_dtype(like)
    if mask.is_cpu and mask.numel() and mask.dtype != torch.bool and not torch.compiler.is_compiling():
        low, high = mask.detach().to(wide).aminmax()
        if not (low >= 0 and high < torch.inf):
            raise refuse(op, "mask", "finite numbers >= 0", f"{float(low)}..{float(high)}")
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
        check_range(op, per_row(ids, layout.mask.numel())[layout.mask != 0], vocabulary, where=" where mask is not 0")
    return layout


def check_stream(
    op: str, name: str, stream: object, shape: Sequence[int], like: Tensor, *, required: bool = False
) -> None:
    """Floating point of the tokens' shape, on their device; None unless required."""
    good = is_strided(stream) and stream.shape == tuple(shape) and stream.is_floating_point()
    absent = stream is None and not required
    if not absent and not (good and stream.device == like.device):  # type: ignore[attr-defined]
        optional = "" if required else ", or None"
        raise refuse(op, name, f"{tuple(shape)} floating point on {like.device}{optional}", stream)


def check_needs(op: str, spec: object, ref_logprobs: object, sampler_logprobs: object) -> None:
    """A LossSpec has the streams that it needs; anything else can be called."""
    if not isinstance(spec, LossSpec):
        if not callable(spec) or isinstance(spec, type):
            raise refuse(op, "spec", "a LossSpec, or a function (logprobs, tokens, entropy) -> losses", spec)
        check_choice(op, "spec.scope", getattr(spec, "scope", "token"), RATIO_LEVELS)
        return
    if spec.kl_coef > 0 and ref_logprobs is None:
        raise refuse(op, "ref_logprobs", f"a tensor like ids, for kl_coef={spec.kl_coef}", None)
    if spec.sampler_level is not None and sampler_logprobs is None:
        raise refuse(op, "sampler_logprobs", f"a tensor like ids, for sampler_level={spec.sampler_level!r}", None)


def check_main_grad(op: str, weight: Tensor, accumulate: bool) -> bool:
    main = getattr(weight, "main_grad", None)
    good = is_strided(main) and main.shape == weight.shape and main.is_floating_point() and main.device == weight.device
    if accumulate and not good:
        want = f"{tuple(weight.shape)} floating point on {weight.device}, to accumulate into"
        raise refuse(op, "weight.main_grad", want, main)
    return accumulate


def check_start(op: str, vocab_start: object) -> None:
    if type(vocab_start) is not int or not 0 <= vocab_start < 2**40:
        raise refuse(op, "vocab_start", "an int >= 0", vocab_start)


def temperature_rows(op: str, temperature: object, shape: Sequence[int], hidden: Tensor) -> Tensor | None:
    """(T,) fp32 (fp64 for fp64 hidden), or None where it is 1."""
    dtype = wide_dtype(hidden)
    count = math.prod(shape)
    least, most = torch.finfo(dtype).tiny, torch.finfo(dtype).max  # whose reciprocals are finite
    want = f"a number > 0, or {tuple(shape)} floating point > 0"
    if isinstance(temperature, Tensor):
        good = is_strided(temperature) and temperature.shape in (tuple(shape), ()) and temperature.is_floating_point()
        if not good or (temperature.is_meta and not hidden.is_meta):
            raise refuse(op, "temperature", want, temperature)
        rows = temperature.detach().to(device=hidden.device, dtype=dtype)
        if rows.is_cpu and rows.numel() and not torch.compiler.is_compiling():
            low, high = rows.aminmax()
            if not (low >= least and high <= most):
                raise refuse(op, "temperature", want, f"{float(low):g}..{float(high):g}")
        return rows.expand(shape).reshape(count).contiguous()
    good = isinstance(temperature, (int, float)) and not isinstance(temperature, bool)
    if not good or not least <= temperature <= most:  # type: ignore[operator]
        raise refuse(op, "temperature", want, temperature)
    assert isinstance(temperature, (int, float))
    return None if temperature == 1 else torch.full((count,), float(temperature), dtype=dtype, device=hidden.device)


def workspace_of(op: str, workspace_bytes: object, weight: Tensor) -> int:
    """Bytes of logits that may be held at once."""
    if workspace_bytes is None:
        least = WORKSPACE_ROWS * 4 * weight.shape[0]
        return max(WORKSPACE.get(weight.device.type, WORKSPACE_ELSEWHERE), least)
    if type(workspace_bytes) is not int or workspace_bytes < 1:
        raise refuse(op, "workspace_bytes", "an int >= 1, or None", workspace_bytes)
    return workspace_bytes


def per_row(stream: Tensor, rows: int) -> Tensor:
    """A stream of ``rows`` tokens, or of K columns for each, as (rows, K)."""
    columns = stream.numel() // rows if rows else 1
    return stream.reshape(rows, columns)
