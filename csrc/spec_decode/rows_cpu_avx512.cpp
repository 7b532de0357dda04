// Kernels of rows of logits for AVX-512 (F, BW, VL, DQ).
#include <immintrin.h>

#include "spec_decode/rows_cpu_noise.h"

namespace m3::spec_decode::rows {
namespace {

#include "spec_decode/rows_cpu_kernels.h"

struct Avx512 {
  static constexpr int kLanes = 16;
  using F = __m512;
  using U = __m512i;

  static inline F load(const float* p) { return _mm512_loadu_ps(p); }
  static inline F load(const Bf16* p) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
  }
  static inline F load(const F16* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
  static inline void store(float* p, F a) { _mm512_storeu_ps(p, a); }
  static inline F splat(float f) { return _mm512_set1_ps(f); }
  static inline F add(F a, F b) { return _mm512_add_ps(a, b); }
  static inline F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static inline F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static inline F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static inline F min(F a, F b) { return _mm512_min_ps(a, b); }
  static inline F max(F a, F b) { return _mm512_max_ps(a, b); }
  static inline F where_greater(F a, F b, F yes, F no) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_GT_OQ), no, yes);
  }
  static inline F where_at_least(F a, F b, F yes) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a, b, _CMP_GE_OQ), yes);
  }
  static inline F add_where_at_least(F sum, F a, F b, F more) {
    return _mm512_mask_add_ps(sum, _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ), sum, more);
  }
  static inline unsigned at_least(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
  static inline F allow(F a, uint32_t bits) { return _mm512_mask_mov_ps(splat(kNothing), (__mmask16)bits, a); }
  static inline F scaled_exp(F p, F, F n, F x) {
    return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x, splat(kSmallest), _CMP_NLT_UQ), p, n);
  }
  static inline F split(F u, F& k) {
    const __m512i bits = _mm512_castps_si512(u), root = _mm512_set1_epi32(0x3F3504F3);  // sqrt(1/2)
    const __m512i exponent = _mm512_srai_epi32(_mm512_sub_epi32(bits, root), 23);
    k = _mm512_cvtepi32_ps(exponent);
    return _mm512_castsi512_ps(_mm512_sub_epi32(bits, _mm512_slli_epi32(exponent, 23)));
  }
  static inline float sum(F a) { return _mm512_reduce_add_ps(a); }
  static inline float top(F a) { return _mm512_reduce_max_ps(a); }
  static inline void keep(unsigned mask, F a, int32_t first, float* out, int32_t* ids) {
    const auto lanes = (__mmask16)mask;
    _mm512_storeu_ps(out, _mm512_maskz_compress_ps(lanes, a));
    if (!ids) return;
    const __m512i count = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    _mm512_storeu_si512(ids, _mm512_maskz_compress_epi32(lanes, _mm512_add_epi32(count, _mm512_set1_epi32(first))));
  }

  static inline U splat_u(uint32_t a) { return _mm512_set1_epi32((int)a); }
  static inline U load_u(const uint32_t* p) { return _mm512_loadu_si512(p); }
  static inline void store_u(uint32_t* p, U a) { _mm512_storeu_si512(p, a); }
  static inline U exclusive_or(U a, U b, U c) { return _mm512_ternarylogic_epi32(a, b, c, 0x96); }
  static inline F high_24(U a) { return _mm512_cvtepi32_ps(_mm512_srli_epi32(a, 8)); }
  static inline F low_8(U a) { return _mm512_cvtepi32_ps(_mm512_and_si512(a, _mm512_set1_epi32(255))); }
  // Words of odd lanes move by shuffles, which leave the multiplier's port alone.
  static inline void multiply(U a, uint32_t m, U& high, U& low) {
    const U by = splat_u(m), even = _mm512_mul_epu32(a, by);
    const U odd = _mm512_mul_epu32(_mm512_shuffle_epi32(a, (_MM_PERM_ENUM)0xF5), by);
    high = _mm512_mask_mov_epi32(_mm512_shuffle_epi32(even, (_MM_PERM_ENUM)0xF5), 0xAAAA, odd);
    low = _mm512_mask_mov_epi32(even, 0xAAAA, _mm512_shuffle_epi32(odd, (_MM_PERM_ENUM)0xA0));
  }
  static inline U counters(uint32_t first) {
    return _mm512_add_epi32(splat_u(first), _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  }
  static inline void interleave(U (&words)[4]) {
    const U a = _mm512_unpacklo_epi32(words[0], words[1]), b = _mm512_unpacklo_epi32(words[2], words[3]);
    const U c = _mm512_unpackhi_epi32(words[0], words[1]), d = _mm512_unpackhi_epi32(words[2], words[3]);
    words[0] = _mm512_unpacklo_epi64(a, b), words[1] = _mm512_unpackhi_epi64(a, b);
    words[2] = _mm512_unpacklo_epi64(c, d), words[3] = _mm512_unpackhi_epi64(c, d);
  }
};

}  // namespace

extern const Kernels kAvx512Rows = {scan<Avx512>, soften<Avx512>, find<Avx512>, collect<Avx512>, tally<Avx512>,
                                    add<Avx512>,  weigh<Avx512>,  race<Avx512>, perturb<Avx512>};

}  // namespace m3::spec_decode::rows
