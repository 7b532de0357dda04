// Kernels for AVX2 with AVX-VNNI (Alder Lake and later clients): the dot products accumulate in 32 bits.
#include <immintrin.h>

#include "int4/gemm_cpu.h"

namespace m3::int4 {
namespace {

#include "int4/gemm_cpu_kernels.h"

#include "int4/gemm_cpu_avx2.h"

struct AvxVnni : Avx2 {
  static constexpr int kWidenTiles = 0;
  static constexpr bool kRawLow = true;
  static constexpr int panel_rows(Mode mode) { return mode == Mode::kInt24 ? 2 : 6; }
  static inline I dot8(I acc, I w, I x) { return _mm256_dpbusd_avx_epi32(acc, w, x); }
  static inline I dot16(I acc, I w, I x) { return _mm256_dpwssd_avx_epi32(acc, w, x); }
};

}  // namespace

extern const Kernels kAvxVnniKernels = {
    "avxvnni",
    AvxVnni::kSkinnyRows,
    pack_row,
    {tile<AvxVnni, Mode::kExact>, tile<AvxVnni, Mode::kInt16>, tile<AvxVnni, Mode::kInt8>, tile<AvxVnni, Mode::kInt24>},
    to_row_order,
    silu_mul};

}  // namespace m3::int4
