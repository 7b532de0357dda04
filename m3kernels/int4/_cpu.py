"""Native CPU room of the int4 family: AVX-512, AVX2, NEON or portable kernels, chosen at the first call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from m3kernels import _cpu_ext
from m3kernels.checks import refuse
from m3kernels.int4.reference import int4_dequantize as _dequantize

MODE = {"exact": 0, "int16": 1, "int8": 2, "auto": 1}
TYPE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def unsupported(op: str, x: Tensor, *args: Any) -> str:
    return "" if x.is_cpu else f"needs CPU tensors, not {x.device.type}"


def _span(tensor: Tensor | None, dtype: torch.dtype | None = None) -> tuple[int, int]:
    """(address, elements) of a contiguous tensor of the given dtype; (0, 0) for None."""
    if tensor is None:
        return 0, 0
    if not tensor.is_contiguous() or (dtype is not None and tensor.dtype != dtype):
        raise refuse("m3kernels::int4", "tensor", f"contiguous {dtype or ''}", tensor)
    return tensor.data_ptr(), tensor.numel()


def _type(tensor: Tensor) -> int:
    if tensor.dtype not in TYPE:
        raise refuse("m3kernels::int4", "tensor", "float32, bfloat16 or float16", tensor)
    return TYPE[tensor.dtype]


def _weight(
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    perm: Tensor | None,
    n: int,
    k: int,
    group_size: int,
    first_k: int,
) -> tuple[Any, ...]:
    experts = qweight.shape[0] if qweight.ndim == 4 else 1
    spans = (_span(qweight, torch.int32), _span(scales), _span(zeros, torch.uint8), _span(perm, torch.int32))
    return (*spans, _type(scales), experts, n, k, group_size, first_k)


def int4_gemm(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    perm: Tensor | None,
    bias: Tensor | None,
    out_features: int,
    in_features: int,
    group_size: int,
    first_k: int,
    row_invariant: bool,
    activations: str,
) -> Tensor:
    y = x.new_empty(x.shape[0], out_features)
    weight = _weight(qweight, scales, zeros, perm, out_features, in_features, group_size, first_k)
    threads = torch.get_num_threads()
    _cpu_ext.int4_gemm(
        _span(x), _type(x), x.shape[0], weight, _span(bias, x.dtype), y.data_ptr(), MODE[activations], threads
    )
    return y


def int4_grouped_gemm(
    x: Tensor,
    offsets: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    perm: Tensor | None,
    out_features: int,
    in_features: int,
    group_size: int,
    first_k: int,
    row_invariant: bool,
    activations: str,
) -> Tensor:
    y = x.new_empty(x.shape[0], out_features)
    weight = _weight(qweight, scales, zeros, perm, out_features, in_features, group_size, first_k)
    threads = torch.get_num_threads()
    _cpu_ext.int4_grouped_gemm(
        _span(x), _type(x), x.shape[0], _span(offsets, torch.int64), weight, y.data_ptr(), MODE[activations], threads
    )
    return y


def int4_moe(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    w13_qweight: Tensor,
    w13_scales: Tensor,
    w13_zeros: Tensor | None,
    w13_perm: Tensor | None,
    w2_qweight: Tensor,
    w2_scales: Tensor,
    w2_zeros: Tensor | None,
    w2_perm: Tensor | None,
    hidden_size: int,
    intermediate_size: int,
    group_size: int,
    w13_first_k: int,
    w2_first_k: int,
    row_invariant: bool,
    activations: str,
) -> Tensor:
    y = torch.empty_like(x)
    two_i = 2 * intermediate_size
    _cpu_ext.int4_moe(
        _span(x),
        _type(x),
        x.shape[0],
        topk_ids.shape[1],
        _span(topk_ids, torch.int64),
        _span(topk_weights, torch.float32),
        _weight(w13_qweight, w13_scales, w13_zeros, w13_perm, two_i, hidden_size, group_size, w13_first_k),
        _weight(w2_qweight, w2_scales, w2_zeros, w2_perm, hidden_size, intermediate_size, group_size, w2_first_k),
        y.data_ptr(),
        MODE[activations],
        torch.get_num_threads(),
    )
    return y


int4_dequantize = _dequantize  # a gather over bytes: torch's own kernels serve it
