"""Products of rows with a dense weight: the public function, its checks, and the op m3kernels::linear.

Every room is deterministic and row-invariant: row i of a result is bitwise the same for every number of rows, every
neighbour and every thread count. The weight is read where it lies, so it may be changed in place between calls.
"""

from __future__ import annotations

import torch
from torch import Tensor

from m3kernels.checks import is_strided, refuse
from m3kernels.decoder.types import DTYPE_NAMES, DTYPES
from m3kernels.library import define


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias, row-invariant to the last bit. Not differentiable.

    Args:
        x: (..., K) fp32, bf16 or fp16.
        weight: (N, K) fp32, bf16 or fp16, contiguous, on the device of x; its dtype need not be x's.
        bias: (N,) fp32 or of the weight's dtype, or None.
    Returns:
        (..., N) of x's dtype: accumulated in fp32, rounded once. Error against fp64: TOLERANCE in reference.py.
    Raises:
        ValueError: an argument out of contract; names it, what was wanted, what came.
        BackendError: the backend forced by M3KERNELS_BACKEND cannot serve this call; says why.
    """
    if not is_strided(weight) or weight.ndim != 2 or weight.dtype not in DTYPES or not weight.is_contiguous():
        raise refuse("linear", "weight", f"(N, K) {DTYPE_NAMES}, contiguous", weight)
    n, k = weight.shape
    if not is_strided(x) or x.ndim < 1 or x.shape[-1] != k or x.dtype not in DTYPES or x.device != weight.device:
        raise refuse("linear", "x", f"(..., {k}) {DTYPE_NAMES} on {weight.device}", x)
    if bias is not None:
        good = is_strided(bias) and bias.shape == (n,) and bias.dtype in (torch.float32, weight.dtype)
        if not good or bias.device != weight.device:
            want = f"({n},) {' or '.join(dict.fromkeys(map(str, (torch.float32, weight.dtype))))} on {weight.device}"
            raise refuse("linear", "bias", want.replace("torch.", ""), bias)
    if torch.is_grad_enabled():
        for name, tensor in (("x", x), ("weight", weight), ("bias", bias)):
            if tensor is not None and tensor.requires_grad:
                raise refuse("linear", name, "no gradient (call under torch.no_grad())", "requires_grad")
    bias = None if bias is None else bias.contiguous()
    if x.ndim == 2:
        return _linear(x, weight, bias)
    rows = x.reshape(x.shape[:-1].numel(), k)
    return _linear(rows, weight, bias).view(*x.shape[:-1], n)


_linear = define(
    __package__,
    "linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    fake=lambda x, weight, bias: x.new_empty(x.shape[0], weight.shape[0]),
)
