// Tile kernels for AArch64: Advanced SIMD.
#include <arm_neon.h>

#include "policy_loss/tiles_cpu.h"

namespace m3::policy_loss {
namespace {

#include "policy_loss/tiles_cpu_kernels.h"

struct Neon {
  static constexpr int kLanes = 4;
  static constexpr bool kFused = true;
  using F = float32x4_t;

  static inline F bits(uint32x4_t a) { return vreinterpretq_f32_u32(a); }
  static inline uint32x4_t bits(F a) { return vreinterpretq_u32_f32(a); }
  static inline F load(const float* p) { return vld1q_f32(p); }
  static inline F load_part(const float* p, int count, float fill) {
    float lanes[kLanes] = {fill, fill, fill, fill};
    for (int i = 0; i < count; i++) lanes[i] = p[i];
    return vld1q_f32(lanes);
  }
  static inline void store(float* p, F a) { vst1q_f32(p, a); }
  static inline void store_part(float* p, int count, F a) {
    float lanes[kLanes];
    vst1q_f32(lanes, a);
    for (int i = 0; i < count; i++) p[i] = lanes[i];
  }
  static inline F splat(float f) { return vdupq_n_f32(f); }
  static inline F add(F a, F b) { return vaddq_f32(a, b); }
  static inline F sub(F a, F b) { return vsubq_f32(a, b); }
  static inline F mul(F a, F b) { return vmulq_f32(a, b); }
  static inline F div(F a, F b) { return vdivq_f32(a, b); }
  static inline F fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
  static inline F min(F a, F b) { return vbslq_f32(vcltq_f32(a, b), a, b); }
  static inline F max(F a, F b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
  static inline F abs(F a) { return vabsq_f32(a); }
  static inline F with_sign(F a, F sign) { return vbslq_f32(vdupq_n_u32(0x80000000u), sign, a); }
  static inline F zero_where_zero(F p, F a) { return bits(vbicq_u32(bits(a), vceqzq_f32(p))); }
  static inline F where_greater(F a, F b, F yes, F no) { return vbslq_f32(vcgtq_f32(a, b), yes, no); }
  static inline F scaled_exp(F p, F t, F, F x) {
    return bits(vbicq_u32(bits(mul(p, power(t))), vcltq_f32(x, splat(kSmallest))));
  }
  static inline F power(F t) { return bits(vshlq_n_u32(bits(t), 23)); }
  static inline F split(F u, F& k) {
    const int32x4_t word = vreinterpretq_s32_f32(u), root = vdupq_n_s32(0x3F3504F3);  // sqrt(1/2)
    const int32x4_t exponent = vshrq_n_s32(vsubq_s32(word, root), 23);
    k = vcvtq_f32_s32(exponent);
    return vreinterpretq_f32_s32(vsubq_s32(word, vshlq_n_s32(exponent, 23)));
  }
  static inline float sum(F a) { return vaddvq_f32(a); }
  static inline float top(F a) { return vmaxvq_f32(a); }
};

}  // namespace

extern const Kernels kNeonKernels = {statistics<Neon>, gradient<Neon>, divergence<Neon>, divergence_gradient<Neon>};

}  // namespace m3::policy_loss
