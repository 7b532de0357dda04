"""INT4 weight-only matrix products: public functions, their checks, and the ops m3kernels::int4_*.

Every room is deterministic and, unless row_invariant=False, row-invariant: row i of a result is bitwise the same for
every number of rows, every neighbour and every thread count; and weights are never materialised. Formulas:
reference.py; layout: types.py.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from m3kernels.checks import is_strided, refuse
from m3kernels.int4.reference import ACTIVATIONS
from m3kernels.int4.types import Int4Weight
from m3kernels.library import define

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DTYPE_NAMES = "float32, bfloat16 or float16"


def int4_gemm(
    x: Tensor,
    weight: Int4Weight,
    bias: Tensor | None = None,
    *,
    row_invariant: bool = True,
    activations: str = "auto",
) -> Tensor:
    """x @ W.T + bias with W packed in INT4; differentiable in x and bias.

    Args:
        x: (..., K) fp32, bf16 or fp16, on the device of weight.
        weight: plain Int4Weight (N, K).
        bias: (N,) of x's dtype, or None.
        row_invariant: True: the bits of a row never depend on the number of rows. False: on a GPU, a product of many
            rows may run on a faster kernel whose bits differ (kernel_for says which); elsewhere nothing changes.
        activations: "exact": dequantised weights times x as given, fp32 accumulation. "int16", "int8": x rounded per
            row and block of at most 128 columns, integer accumulation, CPU only; relative error (RMS) at most 5e-5
            and 8e-3; rows with outliers or non-finite values are computed exactly. "auto": the fastest of the room
            with an error under 1e-4: int16 on CPU, exact elsewhere.
    Returns:
        (..., N) of x's dtype. Error against fp64: TOLERANCE in reference.py, plus the mode's own.
    Raises:
        ValueError: an argument out of contract; names it, what was wanted, what came.
        BackendError: the backend forced by M3KERNELS_BACKEND cannot serve this call; says why.
    """
    check_weight("int4_gemm", "weight", weight, experts=False)
    check_x("int4_gemm", x, weight)
    check_row_invariant("int4_gemm", row_invariant)
    check_activations("int4_gemm", activations)
    if bias is not None and not (
        is_strided(bias) and bias.shape == (weight.out_features,) and bias.dtype == x.dtype and bias.device == x.device
    ):
        raise refuse("int4_gemm", "bias", f"({weight.out_features},) {x.dtype} on {x.device}, like x", bias)
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        return _Gemm.apply(x, bias, weight, row_invariant, activations)
    return _run_gemm(x, bias, weight, row_invariant, activations)


def int4_grouped_gemm(
    x: Tensor, weight: Int4Weight, offsets: Tensor, *, row_invariant: bool = True, activations: str = "auto"
) -> Tensor:
    """y[i] = x[i] @ W[e].T for the expert e with offsets[e] <= i < offsets[e + 1].

    Args:
        x: (M, K) fp32, bf16 or fp16; rows sorted by expert.
        weight: stack of E experts (N, K).
        offsets: (E + 1,) int32 or int64, 0 = offsets[0] <= ... <= offsets[E] = M, on the device of x (its values are
            checked on CPU only: reading them on a GPU would synchronise).
        row_invariant, activations: as in int4_gemm.
    Returns: (M, N) of x's dtype. Raises: as int4_gemm. Not differentiable.
    """
    op = "int4_grouped_gemm"
    check_weight(op, "weight", weight, experts=True)
    if isinstance(x, Tensor) and x.ndim != 2:
        raise refuse(op, "x", f"(M, {weight.in_features})", x)
    check_x(op, x, weight)
    check_row_invariant(op, row_invariant)
    check_activations(op, activations)
    check_no_grad(op, x)
    size = (weight.num_experts or 0) + 1
    good = is_strided(offsets) and offsets.shape == (size,) and offsets.dtype in (torch.int32, torch.int64)
    if not good or offsets.device != x.device:
        raise refuse(op, "offsets", f"({size},) int32 or int64 on {x.device}", offsets)
    if offsets.device.type == "cpu" and not torch.compiler.is_compiling():  # compiled, the room checks them
        bounds = offsets.tolist()
        if bounds[0] != 0 or bounds[-1] != len(x) or any(a > b for a, b in itertools.pairwise(bounds)):
            raise refuse(op, "offsets", f"0 = offsets[0] <= ... <= offsets[-1] = {len(x)}", f"{bounds[:8]}")
    return _grouped_gemm(
        x.contiguous(), offsets.to(torch.int64).contiguous(), *flat(weight), row_invariant, activations
    )


def int4_moe(
    x: Tensor,
    w13: Int4Weight,
    w2: Int4Weight,
    topk_ids: Tensor,
    topk_weights: Tensor,
    *,
    row_invariant: bool = True,
    activations: str = "auto",
) -> Tensor:
    """y[t] = sum_j topk_weights[t, j] * W2[e] @ (silu(G) * U), [G; U] = W13[e] @ x[t], e = topk_ids[t, j].

    Args:
        x: (T, D) fp32, bf16 or fp16.
        w13: stack of E experts (2 * I, D): gate rows, then up rows. w2: stack of E experts (D, I); same group_size.
        topk_ids: (T, k) int32 or int64 in [0, E), on x's device; values are checked on CPU only.
        topk_weights: (T, k) fp32, or x's dtype.
        row_invariant, activations: as in int4_gemm, for both products.
    Returns: (T, D) of x's dtype; the k terms are added in the order of topk_ids, in fp32.
    Raises: as int4_gemm. Not differentiable.
    """
    op = "int4_moe"
    check_weight(op, "w13", w13, experts=True)
    check_weight(op, "w2", w2, experts=True)
    experts, hidden, intermediate = w13.num_experts, w13.in_features, w2.in_features
    if isinstance(x, Tensor) and x.ndim != 2:
        raise refuse(op, "x", f"(T, {hidden})", x)
    check_x(op, x, w13)
    check_row_invariant(op, row_invariant)
    check_activations(op, activations)
    check_no_grad(op, x)
    facts = (w2.num_experts, w2.out_features, 2 * w2.in_features, w2.group_size, w2.device)
    if facts != (experts, hidden, w13.out_features, w13.group_size, w13.device):
        want = f"{experts} x ({hidden}, {w13.out_features // 2}), group {w13.group_size}, on {w13.device}, to match w13"
        raise refuse(op, "w2", want, f"{w2}")
    good = is_strided(topk_ids) and topk_ids.ndim == 2 and len(topk_ids) == len(x)
    if not good or topk_ids.dtype not in (torch.int32, torch.int64) or topk_ids.device != x.device:
        raise refuse(op, "topk_ids", f"({len(x)}, k) int32 or int64 on {x.device}", topk_ids)
    good = is_strided(topk_weights) and topk_weights.shape == topk_ids.shape
    if not good or topk_weights.dtype not in (torch.float32, x.dtype) or topk_weights.device != x.device:
        raise refuse(op, "topk_weights", f"{tuple(topk_ids.shape)} float32 or {x.dtype} on {x.device}", topk_weights)
    if topk_ids.device.type == "cpu" and topk_ids.numel() and not torch.compiler.is_compiling():  # else the room checks
        low, high = topk_ids.aminmax()
        if low < 0 or high >= (experts or 0):
            raise refuse(op, "topk_ids", f"values in 0..{(experts or 0) - 1}", f"{int(low)}..{int(high)}")
    return _moe(
        x.contiguous(),
        topk_ids.to(torch.int64).contiguous(),
        topk_weights.float().contiguous(),
        *(w13.qweight, w13.scales, w13.zeros, w13.perm),
        *(w2.qweight, w2.scales, w2.zeros, w2.perm),
        hidden,
        intermediate,
        w13.group_size,
        w13.first_k,
        w2.first_k,
        row_invariant,
        activations,
    )


def int4_dequantize(weight: Int4Weight, dtype: torch.dtype | None = None) -> Tensor:
    """W as a dense tensor in original column order: (N, K), or (E, N, K) for a stack.

    Args:
        weight: any Int4Weight.
        dtype: fp32, bf16 or fp16; default: that of the scales. fp32 is exact for fp16 and bf16 scales, other
            dtypes are rounded once from it.
    """
    if not isinstance(weight, Int4Weight):
        raise refuse("int4_dequantize", "weight", "an Int4Weight", weight)
    dtype = weight.scales.dtype if dtype is None else dtype
    if dtype not in DTYPES:
        raise refuse("int4_dequantize", "dtype", DTYPE_NAMES, dtype)
    return _dequantize(*flat(weight), dtype)


# -- checks -----------------------------------------------------------------------------------------------------------
def check_weight(op: str, name: str, weight: object, *, experts: bool) -> None:
    if not isinstance(weight, Int4Weight) or (weight.qweight.ndim == 4) != experts:
        want = "an Int4Weight with experts (Int4Weight.stack)" if experts else "an Int4Weight without experts"
        raise refuse(op, name, want, f"{weight!r}" if isinstance(weight, Int4Weight) else weight)


def check_x(op: str, x: object, weight: Int4Weight) -> None:
    good = is_strided(x) and x.ndim >= 1 and x.shape[-1] == weight.in_features and x.dtype in DTYPES
    if not good or x.device != weight.qweight.device:  # type: ignore[attr-defined]
        raise refuse(op, "x", f"(..., {weight.in_features}) {DTYPE_NAMES} on {weight.device}", x)


def check_activations(op: str, activations: object) -> None:
    if activations not in ACTIVATIONS:
        raise refuse(op, "activations", ", ".join(map(repr, ACTIVATIONS)), activations)


def check_row_invariant(op: str, row_invariant: object) -> None:
    if not isinstance(row_invariant, bool):
        raise refuse(op, "row_invariant", "True or False", row_invariant)


def check_no_grad(op: str, x: Tensor) -> None:
    if x.requires_grad and torch.is_grad_enabled():
        raise refuse(
            op, "x", "no gradient (call under torch.no_grad(); only int4_gemm is differentiable)", "requires_grad"
        )


# -- ops --------------------------------------------------------------------------------------------------------------
def flat(weight: Int4Weight) -> tuple[Any, ...]:
    """The arguments that describe a weight to a registered op, in schema order."""
    numbers = (weight.out_features, weight.in_features, weight.group_size, weight.first_k)
    return (weight.qweight, weight.scales, weight.zeros, weight.perm, *numbers)


def _run_gemm(x: Tensor, bias: Tensor | None, weight: Int4Weight, row_invariant: bool, activations: str) -> Tensor:
    qweight, scales, zeros, perm, *numbers = flat(weight)
    bias = None if bias is None else bias.contiguous()
    if x.ndim == 2:
        return _gemm(x.contiguous(), qweight, scales, zeros, perm, bias, *numbers, row_invariant, activations)
    rows = x.reshape(-1, weight.in_features).contiguous()
    y = _gemm(rows, qweight, scales, zeros, perm, bias, *numbers, row_invariant, activations)
    return y.view(*x.shape[:-1], weight.out_features)


class _Gemm(torch.autograd.Function):
    """int4_gemm when a gradient is wanted: dx = dy @ dequantised W, db = sum of dy. The weight has none."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, weight: Int4Weight, row_invariant: bool, activations: str
    ) -> Tensor:
        ctx.weight = weight
        return _run_gemm(x, bias, weight, row_invariant, activations)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        dx = dy @ int4_dequantize(ctx.weight, dy.dtype) if ctx.needs_input_grad[0] else None
        db = dy.reshape(-1, dy.shape[-1]).sum(0) if ctx.needs_input_grad[1] else None
        return dx, db, None, None, None


WEIGHT = "Tensor qweight, Tensor scales, Tensor? zeros, Tensor? perm"
NUMBERS = "int out_features, int in_features, int group_size, int first_k"

_gemm = define(
    __package__,
    f"int4_gemm(Tensor x, {WEIGHT}, Tensor? bias, {NUMBERS}, bool row_invariant, str activations) -> Tensor",
    fake=lambda x, qweight, scales, zeros, perm, bias, out_features, *_: x.new_empty(x.shape[0], out_features),
)
_grouped_gemm = define(
    __package__,
    f"int4_grouped_gemm(Tensor x, Tensor offsets, {WEIGHT}, {NUMBERS}, bool row_invariant, str activations) -> Tensor",
    fake=lambda x, offsets, qweight, scales, zeros, perm, out_features, *_: x.new_empty(x.shape[0], out_features),
)
_moe = define(
    __package__,
    "int4_moe(Tensor x, Tensor topk_ids, Tensor topk_weights, "
    "Tensor w13_qweight, Tensor w13_scales, Tensor? w13_zeros, Tensor? w13_perm, "
    "Tensor w2_qweight, Tensor w2_scales, Tensor? w2_zeros, Tensor? w2_perm, "
    "int hidden_size, int intermediate_size, int group_size, int w13_first_k, int w2_first_k, "
    "bool row_invariant, str activations) -> Tensor",
    fake=lambda x, *_: torch.empty_like(x),
)
_dequantize = define(
    __package__,
    f"int4_dequantize({WEIGHT}, {NUMBERS}, ScalarType dtype) -> Tensor",
    fake=lambda qweight, scales, zeros, perm, out_features, in_features, group_size, first_k, dtype: qweight.new_empty(
        (*qweight.shape[:-3], out_features, in_features), dtype=dtype
    ),
)
