// Linear for AVX-512 (F, BW, VL, DQ).
#include <immintrin.h>

#include <cstring>
#include <type_traits>

#include "decoder/linear_cpu.h"

namespace m3::decoder {
namespace {

#include "decoder/linear_cpu_kernels.h"

struct Avx512 {
  static constexpr int kLanes = 16, kRows = 6;
  using F = __m512;

  static inline __mmask16 part(int count) { return (__mmask16)((1u << count) - 1); }
  static inline F zero() { return _mm512_setzero_ps(); }
  static inline F load(const float* p) { return _mm512_loadu_ps(p); }
  static inline F load(const Bf16* p) { return widened(_mm256_loadu_si256((const __m256i*)p)); }
  static inline F load(const Fp16* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
  static inline F load_part(const float* p, int count) { return _mm512_maskz_loadu_ps(part(count), p); }
  static inline F load_part(const Bf16* p, int count) { return widened(_mm256_maskz_loadu_epi16(part(count), p)); }
  static inline F load_part(const Fp16* p, int count) {
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(part(count), p));
  }
  static inline F widened(__m256i bf16) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bf16), 16));
  }
  static inline void store(float* p, F a) { _mm512_storeu_ps(p, a); }
  static inline F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static inline F join(const F (&a)[4]) {
    const F low = halves(a[0], a[1]), high = halves(a[2], a[3]);
    return _mm512_add_ps(_mm512_shuffle_f32x4(low, high, 0x88), _mm512_shuffle_f32x4(low, high, 0xDD));
  }
  static inline F halves(F a, F b) {  // of lanes 8 apart: [a b]
    return _mm512_add_ps(_mm512_mask_blend_ps(0xFF00, a, b), _mm512_shuffle_f32x4(a, b, 0x4E));
  }
  static inline F fold_two(F a, F b) {
    return _mm512_add_ps(_mm512_mask_blend_ps(0xCCCC, a, b), _mm512_shuffle_ps(a, b, 0x4E));
  }
  static inline F fold_one(F a, F b) {
    return _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x88), _mm512_shuffle_ps(a, b, 0xDD));
  }
};

}  // namespace

extern const Kernels kAvx512Linear = {Avx512::kRows, stream<Avx512>, block<Avx512>, pack<Avx512>, widen<Avx512>};

}  // namespace m3::decoder
