// Kernels for AVX-512 without VNNI (Skylake-X).
#include <immintrin.h>

#include "int4/gemm_cpu.h"

namespace m3::int4 {
namespace {

#include "int4/gemm_cpu_kernels.h"

#include "int4/gemm_cpu_avx2.h"

#include "int4/gemm_cpu_avx512.h"

}  // namespace

extern const Kernels kAvx512Kernels = {
    "avx512",     Avx512::kSkinnyRows,
    pack_row,     {tile<Avx512, Mode::kExact>, tile<Avx512, Mode::kInt16>, tile<Avx512, Mode::kInt8>, nullptr},
    to_row_order, silu_mul};

}  // namespace m3::int4
