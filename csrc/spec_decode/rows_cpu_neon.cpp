// Kernels of rows of logits for AArch64: Advanced SIMD with half precision.
#include <arm_neon.h>

#include "spec_decode/rows_cpu_noise.h"

namespace m3::spec_decode::rows {
namespace {

#include "spec_decode/rows_cpu_kernels.h"

struct Neon {
  static constexpr int kLanes = 4;
  using F = float32x4_t;
  using U = uint32x4_t;

  static inline F bits(uint32x4_t a) { return vreinterpretq_f32_u32(a); }
  static inline uint32x4_t bits(F a) { return vreinterpretq_u32_f32(a); }
  static inline F load(const float* p) { return vld1q_f32(p); }
  static inline F load(const Bf16* p) { return bits(vshll_n_u16(vld1_u16((const uint16_t*)p), 16)); }
  static inline F load(const F16* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16((const uint16_t*)p))); }
  static inline void store(float* p, F a) { vst1q_f32(p, a); }
  static inline F splat(float f) { return vdupq_n_f32(f); }
  static inline F add(F a, F b) { return vaddq_f32(a, b); }
  static inline F sub(F a, F b) { return vsubq_f32(a, b); }
  static inline F mul(F a, F b) { return vmulq_f32(a, b); }
  static inline F fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
  static inline F min(F a, F b) { return vbslq_f32(vcltq_f32(a, b), a, b); }
  static inline F max(F a, F b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
  static inline F where_greater(F a, F b, F yes, F no) { return vbslq_f32(vcgtq_f32(a, b), yes, no); }
  static inline F where_at_least(F a, F b, F yes) { return bits(vandq_u32(bits(yes), vcgeq_f32(a, b))); }
  static inline F add_where_at_least(F sum, F a, F b, F more) { return add(sum, where_at_least(a, b, more)); }
  static inline unsigned at_least(F a, F b) {
    const uint32x4_t lane = {1, 2, 4, 8};
    return vaddvq_u32(vandq_u32(vcgeq_f32(a, b), lane));
  }
  static inline F allow(F a, uint32_t word) {
    const uint32x4_t lane = {1, 2, 4, 8};
    return vbslq_f32(vtstq_u32(vdupq_n_u32(word), lane), a, splat(kNothing));
  }
  static inline F scaled_exp(F p, F t, F, F x) {
    const F power = bits(vshlq_n_u32(bits(t), 23));
    return bits(vbicq_u32(bits(mul(p, power)), vcltq_f32(x, splat(kSmallest))));
  }
  static inline F split(F u, F& k) {
    const int32x4_t word = vreinterpretq_s32_f32(u), root = vdupq_n_s32(0x3F3504F3);  // sqrt(1/2)
    const int32x4_t exponent = vshrq_n_s32(vsubq_s32(word, root), 23);
    k = vcvtq_f32_s32(exponent);
    return vreinterpretq_f32_s32(vsubq_s32(word, vshlq_n_s32(exponent, 23)));
  }
  static inline float sum(F a) { return vaddvq_f32(a); }
  static inline float top(F a) { return vmaxvq_f32(a); }
  static inline void keep(unsigned mask, F a, int32_t first, float* out, int32_t* ids) {
    float lanes[kLanes];
    store(lanes, a);
    for (int n = 0; mask; mask &= mask - 1, n++) {
      const int lane = __builtin_ctz(mask);
      out[n] = lanes[lane];
      if (ids) ids[n] = first + lane;
    }
  }

  static inline U splat_u(uint32_t a) { return vdupq_n_u32(a); }
  static inline U load_u(const uint32_t* p) { return vld1q_u32(p); }
  static inline void store_u(uint32_t* p, U a) { vst1q_u32(p, a); }
  static inline U exclusive_or(U a, U b, U c) { return veorq_u32(veorq_u32(a, b), c); }
  static inline F high_24(U a) { return vcvtq_f32_u32(vshrq_n_u32(a, 8)); }
  static inline F low_8(U a) { return vcvtq_f32_u32(vandq_u32(a, vdupq_n_u32(255))); }
  static inline void multiply(U a, uint32_t m, U& high, U& low) {
    const uint32x4_t first = vreinterpretq_u32_u64(vmull_n_u32(vget_low_u32(a), m));
    const uint32x4_t second = vreinterpretq_u32_u64(vmull_n_u32(vget_high_u32(a), m));
    low = vuzp1q_u32(first, second), high = vuzp2q_u32(first, second);
  }
  static inline U counters(uint32_t first) {
    const uint32x4_t lane = {0, 1, 2, 3};
    return vaddq_u32(vdupq_n_u32(first), lane);
  }
  static inline void interleave(U (&words)[4]) {
    const uint32x4_t a = vzip1q_u32(words[0], words[2]), b = vzip2q_u32(words[0], words[2]);
    const uint32x4_t c = vzip1q_u32(words[1], words[3]), d = vzip2q_u32(words[1], words[3]);
    words[0] = vzip1q_u32(a, c), words[1] = vzip2q_u32(a, c);
    words[2] = vzip1q_u32(b, d), words[3] = vzip2q_u32(b, d);
  }
};

}  // namespace

extern const Kernels kNeonRows = {scan<Neon>, soften<Neon>, find<Neon>, collect<Neon>, tally<Neon>,
                                  add<Neon>,  weigh<Neon>,  race<Neon>, perturb<Neon>};

}  // namespace m3::spec_decode::rows
