"""What the Triton kernels of spec_decode share: launches, rounding, order of floats, Philox noise, requests of rows.

Noise is that of law.py: key = the seed's two halves, counter = (first, the position's two halves, stream); Triton's
philox takes the same counter and key. The race is computed in fp32 from whole 32-bit words:

    u = (r + 1/2) 2^-32,   1 - u = (~r + 1/2) 2^-32,   E = -log1p(-u),   refined by a second word where r < 256
"""
# The arguments of a Triton kernel have no Python type.
# mypy: disallow-untyped-defs=False

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from m3kernels.triton_compile import CompileCase

INTERPRET: bool = triton.knobs.runtime.interpret  # read once: @triton.jit decides by it

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TL_DTYPE = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

NOWHERE = tl.constexpr(0x7FFFFFFF)  # larger than any index
LARGEST = tl.constexpr(0x7F7FFFFF)  # bits of the largest finite fp32
RACE, REFINED, NODE_COIN, FINAL_COIN = (tl.constexpr(stream) for stream in range(4))
ROUND_BFLOAT16 = tl.constexpr(INTERPRET)


def launch(kernel: Any, grid: tuple[int, ...], like: Tensor, *args: Any, num_warps: int = 4, **options: Any) -> None:
    """Start a grid of programs on the device of ``like``; a grid with an empty axis starts none."""
    if all(grid):
        with torch.cuda.device_of(like):
            kernel[grid](*args, num_warps=num_warps, enable_fp_fusion=False, **options)


def block(elements: int, most: int, least: int = 16) -> int:
    """The power of two that holds ``elements``, in least..most."""
    return max(least, min(most, triton.next_power_of_2(max(1, elements))))


def case(
    name: str, kernel: Any, signature: str, num_warps: int = 4, num_stages: int = 3, **constants: Any
) -> CompileCase:
    """One launch; ``signature`` is "argument type, ..."; arguments in neither it nor ``constants`` are None."""
    types = dict(entry.split() for entry in signature.split(", "))
    absent = dict.fromkeys(set(kernel.arg_names) - types.keys() - constants.keys())
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": False}
    return CompileCase(name, kernel, types, absent | constants, options)


# -- floats -----------------------------------------------------------------------------------------------------------
@triton.jit
def round_to(x, dtype: tl.constexpr):
    """fp32 to dtype, to nearest even. The interpreter cuts bfloat16 off instead: there the bits are rounded first."""
    if ROUND_BFLOAT16 and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x.to(dtype)


@triton.jit
def ordered(x):
    """int32 in the order of the floats x, without nan; -0 counts as 0."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def unordered(key):
    """The float whose ``ordered`` is key."""
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)


# -- noise ------------------------------------------------------------------------------------------------------------
@triton.jit
def words(seed, position, first, stream: tl.constexpr):
    """Four uint32 of Philox4x32-10 for each ``first`` (int32); seed and position are int64 scalars."""
    c0 = first.to(tl.uint32, bitcast=True)
    low = c0 * 0 + (position & 0xFFFFFFFF).to(tl.uint32)
    high = c0 * 0 + ((position >> 32) & 0xFFFFFFFF).to(tl.uint32)
    return tl.philox(seed.to(tl.uint64, bitcast=True), c0, low, high, c0 * 0 + stream)


@triton.jit
def coin(seed, position, stream: tl.constexpr):
    """Uniform noise in [0, 1), fp64, 53 bits."""
    o0, o1, _, _ = words(seed, position, tl.full((1,), 0, tl.int32), stream)
    bits = (o0.to(tl.int64) << 21) | (o1.to(tl.int64) >> 11)
    return tl.sum(bits.to(tl.float64) * 1.1102230246251565e-16, 0)


@triton.jit
def log_exponential(word, refined):
    """log E, fp32, of the race's word and its refinement (used where the word is below 256)."""
    u = (word.to(tl.float32) + 0.5) * 2.3283064365386963e-10
    u = tl.where(
        word < 256,
        (word.to(tl.float32) + (refined.to(tl.float32) + 0.5) * 2.3283064365386963e-10) * 2.3283064365386963e-10,
        u,
    )
    rest = tl.maximum(((word ^ 0xFFFFFFFF).to(tl.float32) + 0.5) * 2.3283064365386963e-10, 5.9604644775390625e-08)
    near = 1.0 - u  # log1p(-u) = log(near) * u / (1 - near) where u is small
    gap = 1.0 - near
    small = tl.where(gap == 0.0, u, -tl.log(near) * (u / tl.where(gap == 0.0, 1.0, gap)))
    return tl.log(tl.where(u < 0.5, small, -tl.log(rest)))


@triton.jit
def race_of_four(seed, position, first):
    """log E of tokens 4 * first + (0, 1, 2, 3): (n,) int32 -> (n, 4) fp32."""
    o0, o1, o2, o3 = words(seed, position, first, RACE)
    word = tl.join(tl.join(o0, o2), tl.join(o1, o3)).reshape(first.shape[0], 4)
    refined = word * 0
    if tl.min(tl.min(word, 1), 0) < 256:
        r0, r1, r2, r3 = words(seed, position, first, REFINED)
        refined = tl.join(tl.join(r0, r2), tl.join(r1, r3)).reshape(first.shape[0], 4)
    return log_exponential(word, refined)


@triton.jit
def _pick(o0, o1, o2, o3, index):
    return tl.where(index < 2, tl.where(index == 0, o0, o1), tl.where(index == 2, o2, o3))


@triton.jit
def race(seed, position, token):
    """log E of each token (int64, any order): (n,) fp32."""
    first, index = (token >> 2).to(tl.int32), (token & 3).to(tl.int32)
    o0, o1, o2, o3 = words(seed, position, first, RACE)
    word = _pick(o0, o1, o2, o3, index)
    refined = word * 0
    if tl.min(word, 0) < 256:
        r0, r1, r2, r3 = words(seed, position, first, REFINED)
        refined = _pick(r0, r1, r2, r3, index)
    return log_exponential(word, refined)


# -- requests ---------------------------------------------------------------------------------------------------------
@triton.jit
def request_of(cu_seqlens, index, requests, ROWS: tl.constexpr):
    """The last request b whose rows begin at or before ``index``, where each begins at cu[b] // ROWS + b * (ROWS > 1).

    ROWS 1: the request that row ``index`` belongs to. ROWS > 1: that of block ``index`` of ROWS rows, where request b
    has room for its blocks from cu[b] // ROWS + b on.
    """
    low = 0
    high = requests - 1
    while low < high:
        middle = (low + high + 1) // 2
        start = tl.load(cu_seqlens + middle)
        if ROWS > 1:
            start = start // ROWS + middle
        if start <= index:
            low = middle
        else:
            high = middle - 1
    return low
