// Kernels for AVX2 + FMA + F16C.
#include <immintrin.h>

#include "int4/gemm_cpu.h"

namespace m3::int4 {
namespace {

#include "int4/gemm_cpu_kernels.h"

#include "int4/gemm_cpu_avx2.h"

}  // namespace

extern const Kernels kAvx2Kernels = {
    "avx2",       Avx2::kSkinnyRows,
    pack_row,     {tile<Avx2, Mode::kExact>, tile<Avx2, Mode::kInt16>, tile<Avx2, Mode::kInt8>, nullptr},
    to_row_order, silu_mul};

}  // namespace m3::int4
