"""INT4 weight-only GEMM, dense and mixture-of-experts: one packed layout, one set of ops, four backends."""

from m3kernels.int4.ops import int4_dequantize, int4_gemm, int4_grouped_gemm, int4_moe
from m3kernels.int4.types import Int4Weight

__all__ = [
    "Int4Weight",
    "int4_dequantize",
    "int4_gemm",
    "int4_grouped_gemm",
    "int4_moe",
]
