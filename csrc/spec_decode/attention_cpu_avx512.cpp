// Tree attention for AVX-512 (F, BW, VL, DQ).
#include <immintrin.h>

#include "spec_decode/attention_cpu.h"

namespace m3::spec_decode {
namespace {

#include "spec_decode/attention_cpu_kernels.h"

struct Avx512 {
  static constexpr int kLanes = 16, kLevels = 4, kRows = 6, kVectors = 4;
  static constexpr int kFold[5] = {0, 8, 4, 1, 2};
  static constexpr bool kTiles = true;
  using F = __m512;

  static inline __mmask16 part(int count) { return (__mmask16)((1u << count) - 1); }
  static inline F load(const float* p) { return _mm512_loadu_ps(p); }
  static inline F load_part(const float* p, int count) { return _mm512_maskz_loadu_ps(part(count), p); }
  static inline F load_bf16(const uint16_t* p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
  }
  static inline F load_fp16(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
  static inline F load_int8(const int8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
  }
  static inline void store(float* p, F a) { _mm512_storeu_ps(p, a); }
  static inline void store_part(float* p, int count, F a) { _mm512_mask_storeu_ps(p, part(count), a); }
  static inline void store_bf16(uint16_t* p, F a) {  // to nearest even; nan becomes the quiet one
    const __m512i bits = _mm512_castps_si512(a), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), ones());
    const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
    const __mmask16 nan = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
    const __m512i half = _mm512_mask_mov_epi32(_mm512_srli_epi32(up, 16), nan, _mm512_set1_epi32(0x7FC0));
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(half));
  }
  static inline void store_fp16(uint16_t* p, F a) {
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  static inline __m512i ones() { return _mm512_set1_epi32(1); }
  static inline F splat(float f) { return _mm512_set1_ps(f); }
  static inline F add(F a, F b) { return _mm512_add_ps(a, b); }
  static inline F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static inline F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static inline F div(F a, F b) { return _mm512_div_ps(a, b); }
  static inline F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static inline F min(F a, F b) { return _mm512_min_ps(a, b); }
  static inline F max(F a, F b) { return _mm512_max_ps(a, b); }
  static inline F scaled_exp(F p, F, F n, F x) {
    return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x, splat(kSmallest), _CMP_NLT_UQ), p, n);
  }
  static inline float first(F a) { return _mm512_cvtss_f32(a); }
  static inline float sum(F a) { return _mm512_reduce_add_ps(a); }
  static inline float top(F a) { return _mm512_reduce_max_ps(a); }

  static inline F repeat_quarter(const float* p) { return _mm512_broadcast_f32x4(_mm_loadu_ps(p)); }
  static inline void transpose_quarters(F (&a)[4]) {
    const F low01 = _mm512_shuffle_f32x4(a[0], a[1], 0x44), high01 = _mm512_shuffle_f32x4(a[0], a[1], 0xEE);
    const F low23 = _mm512_shuffle_f32x4(a[2], a[3], 0x44), high23 = _mm512_shuffle_f32x4(a[2], a[3], 0xEE);
    a[0] = _mm512_shuffle_f32x4(low01, low23, 0x88), a[1] = _mm512_shuffle_f32x4(low01, low23, 0xDD);
    a[2] = _mm512_shuffle_f32x4(high01, high23, 0x88), a[3] = _mm512_shuffle_f32x4(high01, high23, 0xDD);
  }

  template <int kLevel>
  static inline F fold(F a, F b) {
    if constexpr (kLevel == 1)  // lanes 8 apart: [a b]
      return add(_mm512_mask_blend_ps(0xFF00, a, b), _mm512_shuffle_f32x4(a, b, 0x4E));
    if constexpr (kLevel == 2) {  // 4 apart, of [a0 a1] and [b0 b1]: [a0 b0 a1 b1]
      const __m512i other = _mm512_setr_epi32(4, 5, 6, 7, 16, 17, 18, 19, 12, 13, 14, 15, 24, 25, 26, 27);
      return add(_mm512_mask_blend_ps(0xF0F0, a, b), _mm512_permutex2var_ps(a, other, b));
    }
    if constexpr (kLevel == 3)  // 2 apart, in each quarter
      return add(_mm512_mask_blend_ps(0xCCCC, a, b), _mm512_shuffle_ps(a, b, 0x4E));
    return add(_mm512_shuffle_ps(a, b, 0x88), _mm512_shuffle_ps(a, b, 0xDD));  // neighbours
  }
};

}  // namespace

extern const Kernels kAvx512Attention = {widen<Avx512>, tile<Avx512>, attend<Avx512>, merge<Avx512>, finish<Avx512>};

}  // namespace m3::spec_decode
