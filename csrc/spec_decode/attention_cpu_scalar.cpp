// Portable tree attention: vectors of four as the compiler's own vector type. The baseline of every build.
#include <cstring>

#include "spec_decode/attention_cpu.h"

namespace m3::spec_decode {
namespace {

#include "spec_decode/attention_cpu_kernels.h"

struct Scalar {
  static constexpr int kLanes = 4, kLevels = 2, kRows = 4, kVectors = 2;
  static constexpr int kFold[3] = {0, 1, 2};
  static constexpr bool kTiles = false;
  typedef float F __attribute__((vector_size(16)));
  typedef int32_t I __attribute__((vector_size(16)));

  static inline F load(const float* p) {
    F a;
    std::memcpy(&a, p, sizeof a);
    return a;
  }
  static inline F load_part(const float* p, int count) {
    F a = splat(0.0f);
    for (int i = 0; i < count; i++) a[i] = p[i];
    return a;
  }
  static inline F load_bf16(const uint16_t* p) { return (F)(integers(p) << 16); }
  static inline F load_fp16(const uint16_t* p) {
    const I half = integers(p), size = half & 0x7FFF;
    const F value = (F)(size << 13) * splat(0x1p112f);  // exact, also where the half is subnormal
    const I huge = (size << 13) | 0x7F800000;           // infinity and nan
    return (F)((I)choose(size < 0x7C00, value, (F)huge) | ((half & 0x8000) << 16));
  }
  static inline F load_int8(const int8_t* p) { return F{(float)p[0], (float)p[1], (float)p[2], (float)p[3]}; }
  static inline void store(float* p, F a) { std::memcpy(p, &a, sizeof a); }
  static inline void store_part(float* p, int count, F a) {
    for (int i = 0; i < count; i++) p[i] = a[i];
  }
  static inline void store_bf16(uint16_t* p, F a) {  // to nearest even; nan becomes the quiet one
    for (int i = 0; i < kLanes; i++) {
      const uint32_t bits = word(a[i]);
      p[i] = uint16_t(a[i] != a[i] ? 0x7FC0 : (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
    }
  }
  static inline void store_fp16(uint16_t* p, F a) {  // to nearest even; nan becomes the quiet one
    for (int i = 0; i < kLanes; i++) {
      const uint32_t bits = word(a[i]), size = bits & 0x7FFFFFFFu, sign = (bits >> 16) & 0x8000u;
      uint32_t half;
      if (size > 0x7F800000u) {
        half = 0x7E00u;
      } else if (size >= 0x47800000u) {  // 2^16: infinity, as is what rounds to it below
        half = 0x7C00u;
      } else if (size < 0x38800000u) {  // below 2^-14: adding 1/2 rounds to multiples of 2^-24
        float magnitude;
        std::memcpy(&magnitude, &size, 4);
        half = word(magnitude + 0.5f) - 0x3F000000u;
      } else {
        half = (size - 0x38000000u + 0xFFFu + ((size >> 13) & 1u)) >> 13;
      }
      p[i] = uint16_t(sign | half);
    }
  }
  static inline uint32_t word(float f) {
    uint32_t bits;
    std::memcpy(&bits, &f, 4);
    return bits;
  }
  static inline I integers(const uint16_t* p) { return I{p[0], p[1], p[2], p[3]}; }
  static inline F splat(float f) { return F{f, f, f, f}; }
  static inline F add(F a, F b) { return a + b; }
  static inline F sub(F a, F b) { return a - b; }
  static inline F mul(F a, F b) { return a * b; }
  static inline F div(F a, F b) { return a / b; }
  static inline F fma(F a, F b, F c) { return a * b + c; }
  static inline F choose(I mask, F yes, F no) { return (F)(((I)yes & mask) | ((I)no & ~mask)); }
  static inline F min(F a, F b) { return choose(a < b, a, b); }
  static inline F max(F a, F b) { return choose(a > b, a, b); }
  static inline F scaled_exp(F p, F t, F, F x) { return (F)((I)(p * (F)((I)t << 23)) & ~(I)(x < splat(kSmallest))); }
  static inline float first(F a) { return a[0]; }
  static inline float sum(F a) { return (a[0] + a[2]) + (a[1] + a[3]); }
  static inline float top(F a) { return larger(larger(a[0], a[2]), larger(a[1], a[3])); }

  template <int kLevel>
  static inline F fold(F a, F b) {
    if constexpr (kLevel == 1) return F{a[0], a[1], b[0], b[1]} + F{a[2], a[3], b[2], b[3]};
    return F{a[0], a[2], b[0], b[2]} + F{a[1], a[3], b[1], b[3]};
  }
};

}  // namespace

extern const Kernels kScalarAttention = {widen<Scalar>, nullptr, attend<Scalar>, merge<Scalar>, finish<Scalar>};

}  // namespace m3::spec_decode
