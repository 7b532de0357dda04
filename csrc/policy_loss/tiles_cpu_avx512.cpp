// Tile kernels for AVX-512 (F, BW, VL, DQ).
#include <immintrin.h>

#include "policy_loss/tiles_cpu.h"

namespace m3::policy_loss {
namespace {

#include "policy_loss/tiles_cpu_kernels.h"

struct Avx512 {
  static constexpr int kLanes = 16;
  static constexpr bool kFused = true;
  using F = __m512;

  static inline __mmask16 first(int count) { return (__mmask16)((1u << count) - 1); }
  static inline F load(const float* p) { return _mm512_loadu_ps(p); }
  static inline F load_part(const float* p, int count, float fill) {
    return _mm512_mask_loadu_ps(splat(fill), first(count), p);
  }
  static inline void store(float* p, F a) { _mm512_storeu_ps(p, a); }
  static inline void store_part(float* p, int count, F a) { _mm512_mask_storeu_ps(p, first(count), a); }
  static inline F splat(float f) { return _mm512_set1_ps(f); }
  static inline F add(F a, F b) { return _mm512_add_ps(a, b); }
  static inline F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static inline F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static inline F div(F a, F b) { return _mm512_div_ps(a, b); }
  static inline F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static inline F min(F a, F b) { return _mm512_min_ps(a, b); }
  static inline F max(F a, F b) { return _mm512_max_ps(a, b); }
  static inline F abs(F a) { return _mm512_abs_ps(a); }
  static inline F with_sign(F a, F sign) { return _mm512_or_ps(a, _mm512_and_ps(sign, splat(-0.0f))); }
  static inline F zero_where_zero(F p, F a) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(p, _mm512_setzero_ps(), _CMP_NEQ_UQ), a);
  }
  static inline F where_greater(F a, F b, F yes, F no) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_GT_OQ), no, yes);
  }
  static inline F scaled_exp(F p, F, F n, F x) {
    return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x, splat(kSmallest), _CMP_NLT_UQ), p, n);
  }
  static inline F power(F t) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(t), 23)); }
  static inline F split(F u, F& k) {
    const __m512i bits = _mm512_castps_si512(u), root = _mm512_set1_epi32(0x3F3504F3);  // sqrt(1/2)
    const __m512i exponent = _mm512_srai_epi32(_mm512_sub_epi32(bits, root), 23);
    k = _mm512_cvtepi32_ps(exponent);
    return _mm512_castsi512_ps(_mm512_sub_epi32(bits, _mm512_slli_epi32(exponent, 23)));
  }
  static inline float sum(F a) { return _mm512_reduce_add_ps(a); }
  static inline float top(F a) { return _mm512_reduce_max_ps(a); }
};

}  // namespace

extern const Kernels kAvx512Kernels = {statistics<Avx512>, gradient<Avx512>, divergence<Avx512>,
                                       divergence_gradient<Avx512>};

}  // namespace m3::policy_loss
