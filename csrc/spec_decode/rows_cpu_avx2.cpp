// Kernels of rows of logits for AVX2 + FMA + F16C.
#include <immintrin.h>

#include "spec_decode/rows_cpu_noise.h"

namespace m3::spec_decode::rows {
namespace {

#include "spec_decode/rows_cpu_kernels.h"

struct Avx2 {
  static constexpr int kLanes = 8;
  using F = __m256;
  using U = __m256i;

  static inline F load(const float* p) { return _mm256_loadu_ps(p); }
  static inline F load(const Bf16* p) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
  }
  static inline F load(const F16* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
  static inline void store(float* p, F a) { _mm256_storeu_ps(p, a); }
  static inline F splat(float f) { return _mm256_set1_ps(f); }
  static inline F add(F a, F b) { return _mm256_add_ps(a, b); }
  static inline F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static inline F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static inline F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static inline F min(F a, F b) { return _mm256_min_ps(a, b); }
  static inline F max(F a, F b) { return _mm256_max_ps(a, b); }
  static inline F where_greater(F a, F b, F yes, F no) {
    return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_GT_OQ));
  }
  static inline F where_at_least(F a, F b, F yes) { return _mm256_and_ps(_mm256_cmp_ps(a, b, _CMP_GE_OQ), yes); }
  static inline F add_where_at_least(F sum, F a, F b, F more) { return add(sum, where_at_least(a, b, more)); }
  static inline unsigned at_least(F a, F b) { return (unsigned)_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GE_OQ)); }
  static inline F allow(F a, uint32_t bits) {
    const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i yes = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32((int)bits), lane), lane);
    return _mm256_blendv_ps(splat(kNothing), a, _mm256_castsi256_ps(yes));
  }
  static inline F scaled_exp(F p, F t, F, F x) {
    const F power = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(t), 23));
    return _mm256_and_ps(_mm256_cmp_ps(x, splat(kSmallest), _CMP_NLT_UQ), mul(p, power));
  }
  static inline F split(F u, F& k) {
    const __m256i bits = _mm256_castps_si256(u), root = _mm256_set1_epi32(0x3F3504F3);  // sqrt(1/2)
    const __m256i exponent = _mm256_srai_epi32(_mm256_sub_epi32(bits, root), 23);
    k = _mm256_cvtepi32_ps(exponent);
    return _mm256_castsi256_ps(_mm256_sub_epi32(bits, _mm256_slli_epi32(exponent, 23)));
  }
  static inline float sum(F a) {
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
  }
  static inline float top(F a) {
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    four = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
  }
  static inline void keep(unsigned mask, F a, int32_t first, float* out, int32_t* ids) {
    float lanes[kLanes];
    store(lanes, a);
    for (int n = 0; mask; mask &= mask - 1, n++) {
      const int lane = __builtin_ctz(mask);
      out[n] = lanes[lane];
      if (ids) ids[n] = first + lane;
    }
  }

  static inline U splat_u(uint32_t a) { return _mm256_set1_epi32((int)a); }
  static inline U load_u(const uint32_t* p) { return _mm256_loadu_si256((const __m256i*)p); }
  static inline void store_u(uint32_t* p, U a) { _mm256_storeu_si256((__m256i*)p, a); }
  static inline U exclusive_or(U a, U b, U c) { return _mm256_xor_si256(_mm256_xor_si256(a, b), c); }
  static inline F high_24(U a) { return _mm256_cvtepi32_ps(_mm256_srli_epi32(a, 8)); }
  static inline F low_8(U a) { return _mm256_cvtepi32_ps(_mm256_and_si256(a, _mm256_set1_epi32(255))); }
  static inline void multiply(U a, uint32_t m, U& high, U& low) {
    const U by = splat_u(m), even = _mm256_mul_epu32(a, by);
    const U odd = _mm256_mul_epu32(_mm256_shuffle_epi32(a, 0xF5), by);
    high = _mm256_blend_epi32(_mm256_shuffle_epi32(even, 0xF5), odd, 0xAA);
    low = _mm256_blend_epi32(even, _mm256_shuffle_epi32(odd, 0xA0), 0xAA);
  }
  static inline U counters(uint32_t first) {
    return _mm256_add_epi32(splat_u(first), _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7));
  }
  static inline void interleave(U (&words)[4]) {
    const U a = _mm256_unpacklo_epi32(words[0], words[1]), b = _mm256_unpacklo_epi32(words[2], words[3]);
    const U c = _mm256_unpackhi_epi32(words[0], words[1]), d = _mm256_unpackhi_epi32(words[2], words[3]);
    words[0] = _mm256_unpacklo_epi64(a, b), words[1] = _mm256_unpackhi_epi64(a, b);
    words[2] = _mm256_unpacklo_epi64(c, d), words[3] = _mm256_unpackhi_epi64(c, d);
  }
};

}  // namespace

extern const Kernels kAvx2Rows = {scan<Avx2>, soften<Avx2>, find<Avx2>, collect<Avx2>, tally<Avx2>,
                                  add<Avx2>,  weigh<Avx2>,  race<Avx2>, perturb<Avx2>};

}  // namespace m3::spec_decode::rows
