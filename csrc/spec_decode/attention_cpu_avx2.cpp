// Tree attention for AVX2 + FMA + F16C.
#include <immintrin.h>

#include "spec_decode/attention_cpu.h"

namespace m3::spec_decode {
namespace {

#include "spec_decode/attention_cpu_kernels.h"

alignas(32) const int32_t kPart[16] = {-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0};

struct Avx2 {
  static constexpr int kLanes = 8, kLevels = 3, kRows = 6, kVectors = 2;
  static constexpr int kFold[4] = {0, 4, 1, 2};
  static constexpr bool kTiles = false;
  using F = __m256;

  static inline __m256i part(int count) { return _mm256_loadu_si256((const __m256i*)(kPart + 8 - count)); }
  static inline F load(const float* p) { return _mm256_loadu_ps(p); }
  static inline F load_part(const float* p, int count) { return _mm256_maskload_ps(p, part(count)); }
  static inline F load_bf16(const uint16_t* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
  }
  static inline F load_fp16(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
  static inline F load_int8(const int8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
  }
  static inline void store(float* p, F a) { _mm256_storeu_ps(p, a); }
  static inline void store_part(float* p, int count, F a) { _mm256_maskstore_ps(p, part(count), a); }
  static inline void store_bf16(uint16_t* p, F a) {  // to nearest even; nan becomes the quiet one
    const __m256i bits = _mm256_castps_si256(a);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
    const __m256i half = _mm256_blendv_epi8(_mm256_srli_epi32(up, 16), _mm256_set1_epi32(0x7FC0), nan);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(half, half), 0xD8);
    _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(packed));
  }
  static inline void store_fp16(uint16_t* p, F a) {
    _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  static inline F splat(float f) { return _mm256_set1_ps(f); }
  static inline F add(F a, F b) { return _mm256_add_ps(a, b); }
  static inline F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static inline F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static inline F div(F a, F b) { return _mm256_div_ps(a, b); }
  static inline F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static inline F min(F a, F b) { return _mm256_min_ps(a, b); }
  static inline F max(F a, F b) { return _mm256_max_ps(a, b); }
  static inline F scaled_exp(F p, F t, F, F x) {
    const F power = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(t), 23));
    return _mm256_and_ps(_mm256_cmp_ps(x, splat(kSmallest), _CMP_NLT_UQ), mul(p, power));
  }
  static inline float first(F a) { return _mm256_cvtss_f32(a); }
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

  template <int kLevel>
  static inline F fold(F a, F b) {
    if constexpr (kLevel == 1)  // lanes 4 apart: [a b]
      return add(_mm256_blend_ps(a, b, 0xF0), _mm256_permute2f128_ps(a, b, 0x21));
    if constexpr (kLevel == 2)  // 2 apart, in each half
      return add(_mm256_blend_ps(a, b, 0xCC), _mm256_shuffle_ps(a, b, 0x4E));
    return add(_mm256_shuffle_ps(a, b, 0x88), _mm256_shuffle_ps(a, b, 0xDD));  // neighbours
  }
};

}  // namespace

extern const Kernels kAvx2Attention = {widen<Avx2>, nullptr, attend<Avx2>, merge<Avx2>, finish<Avx2>};

}  // namespace m3::spec_decode
