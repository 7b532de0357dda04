// Linear for AArch64: Advanced SIMD with half precision.
#include <arm_neon.h>

#include <cstring>
#include <type_traits>

#include "decoder/linear_cpu.h"

namespace m3::decoder {
namespace {

#include "decoder/linear_cpu_kernels.h"

struct Neon {
  static constexpr int kLanes = 4, kRows = 6;
  using F = float32x4_t;

  static inline F zero() { return vdupq_n_f32(0.0f); }
  static inline F load(const float* p) { return vld1q_f32(p); }
  static inline F load(const Bf16* p) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(&p->bits), 16)); }
  static inline F load(const Fp16* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(&p->bits))); }
  template <class W>
  static inline F load_part(const W* p, int count) {
    W lanes[kLanes] = {};
    std::memcpy(lanes, p, count * sizeof(W));
    return load(lanes);
  }
  static inline void store(float* p, F a) { vst1q_f32(p, a); }
  static inline F fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
  static inline F join(const F (&a)[1]) { return a[0]; }
  static inline F fold_two(F a, F b) {
    return vaddq_f32(vcombine_f32(vget_low_f32(a), vget_low_f32(b)), vcombine_f32(vget_high_f32(a), vget_high_f32(b)));
  }
  static inline F fold_one(F a, F b) { return vpaddq_f32(a, b); }
};

}  // namespace

extern const Kernels kNeonLinear = {Neon::kRows, stream<Neon>, block<Neon>, pack<Neon>, widen<Neon>};

}  // namespace m3::decoder
