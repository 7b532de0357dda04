"""Dense products in Triton, for NVIDIA and AMD GPUs; interpreted on CPU tensors.

    Y^T = W X^T,   y[m, n] = sum over the blocks of K, in order, of sum_{k in b} weight[n, k] * x[m, k],   + bias[n]

Row-invariance. Every launch has the same tile, the same order of blocks and the same kind of matrix instruction,
whatever the number of rows: the weight operand is BLOCK_N rows high, the tokens are its columns. Accumulation is fp32.
Operands of one 16-bit dtype go to the matrix units as they are, all others are fp32 and multiplied as IEEE asks.
Nothing is atomic.

Interpreted (TRITON_INTERPRET=1), bf16 is loaded right and computed as fp32, and torch rounds the result: the
interpreter's own bf16 arithmetic is wrong.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from m3kernels.triton_compile import CompileCase

INTERPRET: bool = triton.knobs.runtime.interpret  # read once: @triton.jit below decides by it

BLOCK_M, BLOCK_N = 32, 64
BLOCK_K = {torch.float32: 16, torch.bfloat16: 64, torch.float16: 64}  # by compute dtype
TL_DTYPE = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
NUM_WARPS, NUM_STAGES = 4, 3


def compute_dtype(x: torch.dtype, weight: torch.dtype) -> torch.dtype:
    """Dtype of the operands of the dot products."""
    return torch.float32 if x != weight or (INTERPRET and x == torch.bfloat16) else x


def unsupported(op: str, x: Tensor, *args: Any) -> str:
    if x.device.type == "cpu":
        return "" if INTERPRET else "CPU tensors need TRITON_INTERPRET=1, set before Triton is imported"
    if x.device.type != "cuda":
        return f"no Triton target for {x.device.type} tensors"
    if INTERPRET:
        return "TRITON_INTERPRET=1 interprets kernels: CPU tensors only"
    if torch.version.hip is None and torch.cuda.get_device_capability(x.device) < (8, 0):
        return "needs compute capability 8.0 or newer"
    return ""


# Grid: one program for each tile of BLOCK_N outputs and BLOCK_M rows; neighbours share rows of x. It reads its rows of
# the weight and of x once, block by block of K, and writes its tile of y. The tile is small enough for one row (the
# weight is streamed) and large enough that many rows are bound by the matrix units of 16-bit operands.
@triton.jit
def _linear_kernel(
    x,
    weight,
    bias,
    y,
    M,
    N,
    K,
    x_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    tiles_n = tl.cdiv(N, BLOCK_N)
    n = (tl.program_id(0) % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)  # (BLOCK_N,)
    m = (tl.program_id(0) // tiles_n) * BLOCK_M + tl.arange(0, BLOCK_M)  # (BLOCK_M,)
    lane = tl.arange(0, BLOCK_K)
    w_rows = weight + n[:, None].to(tl.int64) * K + lane[None, :]  # (BLOCK_N, BLOCK_K)
    x_rows = x + m[None, :].to(tl.int64) * x_stride + lane[:, None]  # (BLOCK_K, BLOCK_M)
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for k in range(0, K, BLOCK_K):
        inside = k + lane < K
        w = tl.load(w_rows + k, (n < N)[:, None] & inside[None, :], other=0.0).to(COMPUTE)
        a = tl.load(x_rows + k, (m < M)[None, :] & inside[:, None], other=0.0).to(COMPUTE)
        total = tl.dot(w, a, total, input_precision="ieee")
    if bias is not None:
        total += tl.load(bias + n, n < N, other=0.0).to(tl.float32)[:, None]
    out = y + m[None, :].to(tl.int64) * N + n[:, None]
    tl.store(out, total.to(y.dtype.element_ty), (m < M)[None, :] & (n < N)[:, None])


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if x.shape[1] > 1 and x.stride(1) != 1:
        x = x.contiguous()
    (m, k), n = x.shape, weight.shape[0]
    y = x.new_empty(m, n, dtype=torch.float32 if INTERPRET else x.dtype)
    dtype = compute_dtype(x.dtype, weight.dtype)
    grid = triton.cdiv(n, BLOCK_N) * triton.cdiv(m, BLOCK_M)
    if grid:
        with torch.cuda.device_of(x):
            _linear_kernel[(grid,)](
                *(x, weight, bias, y, m, n, k, x.stride(0)),
                BLOCK_M=BLOCK_M,
                BLOCK_N=BLOCK_N,
                BLOCK_K=BLOCK_K[dtype],
                COMPUTE=TL_DTYPE[dtype],
                num_warps=NUM_WARPS,
                num_stages=NUM_STAGES,
                enable_fp_fusion=False,
            )
    return y.to(x.dtype)


# -- compiled elsewhere -----------------------------------------------------------------------------------------------
def compile_cases(target: str) -> list[CompileCase]:
    """Every kind of launch: operands of one dtype, and of two; with and without a bias."""
    pairs = {
        "fp32": ("fp32", "fp32", torch.float32, None),
        "bf16": ("bf16", "bf16", torch.bfloat16, None),
        "fp16_bias": ("fp16", "fp16", torch.float16, "*fp16"),
        "fp32_bf16_bias": ("fp32", "bf16", torch.float32, "*fp32"),
    }
    return [
        CompileCase(
            name,
            _linear_kernel,
            {"x": f"*{x}", "weight": f"*{weight}", "y": f"*{x}", "M": "i32", "N": "i32:16", "K": "i32:16"}
            | {"x_stride": "i32:16"}
            | ({} if bias is None else {"bias": bias}),
            {"BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N, "BLOCK_K": BLOCK_K[dtype], "COMPUTE": TL_DTYPE[dtype]}
            | ({"bias": None} if bias is None else {}),
            {"num_warps": NUM_WARPS, "num_stages": NUM_STAGES, "enable_fp_fusion": False},
            matrix_units=dtype != torch.float32,
        )
        for name, (x, weight, dtype, bias) in pairs.items()
    ]
