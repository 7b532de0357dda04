// Linear for AVX2 + FMA + F16C.
#include <immintrin.h>

#include <cstring>
#include <type_traits>

#include "decoder/linear_cpu.h"

namespace m3::decoder {
namespace {

#include "decoder/linear_cpu_kernels.h"

struct Avx2 {
  static constexpr int kLanes = 8, kRows = 3;
  using F = __m256;

  static inline F zero() { return _mm256_setzero_ps(); }
  static inline F load(const float* p) { return _mm256_loadu_ps(p); }
  static inline F load(const Bf16* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
  }
  static inline F load(const Fp16* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
  template <class W>
  static inline F load_part(const W* p, int count) {
    W lanes[kLanes] = {};
    std::memcpy(lanes, p, count * sizeof(W));
    return load(lanes);
  }
  static inline void store(float* p, F a) { _mm256_storeu_ps(p, a); }
  static inline F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static inline F join(const F (&a)[2]) {
    return _mm256_add_ps(_mm256_permute2f128_ps(a[0], a[1], 0x20), _mm256_permute2f128_ps(a[0], a[1], 0x31));
  }
  static inline F fold_two(F a, F b) {
    return _mm256_add_ps(_mm256_shuffle_ps(a, b, 0x44), _mm256_shuffle_ps(a, b, 0xEE));
  }
  static inline F fold_one(F a, F b) {
    return _mm256_add_ps(_mm256_shuffle_ps(a, b, 0x88), _mm256_shuffle_ps(a, b, 0xDD));
  }
};

}  // namespace

extern const Kernels kAvx2Linear = {Avx2::kRows, stream<Avx2>, block<Avx2>, pack<Avx2>, widen<Avx2>};

}  // namespace m3::decoder
