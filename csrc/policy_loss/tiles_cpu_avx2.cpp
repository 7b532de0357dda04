// Tile kernels for AVX2 + FMA.
#include <immintrin.h>

#include "policy_loss/tiles_cpu.h"

namespace m3::policy_loss {
namespace {

#include "policy_loss/tiles_cpu_kernels.h"

alignas(32) const int32_t kFirst[16] = {-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0};

struct Avx2 {
  static constexpr int kLanes = 8;
  static constexpr bool kFused = true;
  using F = __m256;

  static inline __m256i first(int count) { return _mm256_loadu_si256((const __m256i*)(kFirst + 8 - count)); }
  static inline F load(const float* p) { return _mm256_loadu_ps(p); }
  static inline F load_part(const float* p, int count, float fill) {
    const __m256i mask = first(count);
    return _mm256_blendv_ps(splat(fill), _mm256_maskload_ps(p, mask), _mm256_castsi256_ps(mask));
  }
  static inline void store(float* p, F a) { _mm256_storeu_ps(p, a); }
  static inline void store_part(float* p, int count, F a) { _mm256_maskstore_ps(p, first(count), a); }
  static inline F splat(float f) { return _mm256_set1_ps(f); }
  static inline F add(F a, F b) { return _mm256_add_ps(a, b); }
  static inline F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static inline F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static inline F div(F a, F b) { return _mm256_div_ps(a, b); }
  static inline F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static inline F min(F a, F b) { return _mm256_min_ps(a, b); }
  static inline F max(F a, F b) { return _mm256_max_ps(a, b); }
  static inline F abs(F a) { return _mm256_andnot_ps(splat(-0.0f), a); }
  static inline F with_sign(F a, F sign) { return _mm256_or_ps(a, _mm256_and_ps(sign, splat(-0.0f))); }
  static inline F zero_where_zero(F p, F a) {
    return _mm256_and_ps(_mm256_cmp_ps(p, _mm256_setzero_ps(), _CMP_NEQ_UQ), a);
  }
  static inline F where_greater(F a, F b, F yes, F no) {
    return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_GT_OQ));
  }
  static inline F scaled_exp(F p, F t, F, F x) {
    return _mm256_and_ps(_mm256_cmp_ps(x, splat(kSmallest), _CMP_NLT_UQ), mul(p, power(t)));
  }
  static inline F power(F t) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(t), 23)); }
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
};

}  // namespace

extern const Kernels kAvx2Kernels = {statistics<Avx2>, gradient<Avx2>, divergence<Avx2>, divergence_gradient<Avx2>};

}  // namespace m3::policy_loss
