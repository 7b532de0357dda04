// Kernels for AVX-512 with VNNI (Ice Lake, Zen 4 and later).
#include <immintrin.h>

#include "int4/gemm_cpu.h"

namespace m3::int4 {
namespace {

#include "int4/gemm_cpu_kernels.h"

#include "int4/gemm_cpu_avx2.h"

#include "int4/gemm_cpu_avx512.h"

struct Avx512Vnni : Avx512 {
  static constexpr int kWidenTiles = 0;
  static constexpr bool kRawLow = true;
  static constexpr int panel_rows(Mode mode) { return mode == Mode::kExact ? 12 : mode == Mode::kInt24 ? 2 : 6; }
  static inline I dot8(I acc, I w, I x) { return _mm512_dpbusd_epi32(acc, w, x); }
  static inline I dot16(I acc, I w, I x) { return _mm512_dpwssd_epi32(acc, w, x); }
};

}  // namespace

extern const Kernels kAvx512VnniKernels = {"avx512vnni",
                                           Avx512Vnni::kSkinnyRows,
                                           pack_row,
                                           {tile<Avx512Vnni, Mode::kExact>, tile<Avx512Vnni, Mode::kInt16>,
                                            tile<Avx512Vnni, Mode::kInt8>, tile<Avx512Vnni, Mode::kInt24>},
                                           to_row_order,
                                           silu_mul};

}  // namespace m3::int4
