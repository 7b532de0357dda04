"""INT4 weight-only GEMM, dense and mixture-of-experts: one packed layout, one set of ops, four backends."""

from m3kernels.int4.convert import (
    from_autoround,
    from_awq,
    from_compressed_tensors,
    from_gptq,
    to_awq,
    to_compressed_tensors,
    to_gptq,
)
from m3kernels.int4.crossovers import kernel_for
from m3kernels.int4.ops import int4_dequantize, int4_gemm, int4_grouped_gemm, int4_moe
from m3kernels.int4.quantize import quantize_weight
from m3kernels.int4.types import Int4Weight

__all__ = [
    "Int4Weight",
    "from_autoround",
    "from_awq",
    "from_compressed_tensors",
    "from_gptq",
    "int4_dequantize",
    "int4_gemm",
    "int4_grouped_gemm",
    "int4_moe",
    "kernel_for",
    "quantize_weight",
    "to_awq",
    "to_compressed_tensors",
    "to_gptq",
]
