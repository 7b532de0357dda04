// Tree attention for AArch64: Advanced SIMD with half precision.
#include <arm_neon.h>

#include "spec_decode/attention_cpu.h"

namespace m3::spec_decode {
namespace {

#include "spec_decode/attention_cpu_kernels.h"

struct Neon {
  static constexpr int kLanes = 4, kLevels = 2, kRows = 6, kVectors = 4;
  static constexpr int kFold[3] = {0, 1, 2};
  static constexpr bool kTiles = false;
  using F = float32x4_t;

  static inline F bits(uint32x4_t a) { return vreinterpretq_f32_u32(a); }
  static inline uint32x4_t bits(F a) { return vreinterpretq_u32_f32(a); }
  static inline F load(const float* p) { return vld1q_f32(p); }
  static inline F load_part(const float* p, int count) {
    float lanes[kLanes] = {};
    for (int i = 0; i < count; i++) lanes[i] = p[i];
    return vld1q_f32(lanes);
  }
  static inline F load_bf16(const uint16_t* p) { return bits(vshll_n_u16(vld1_u16(p), 16)); }
  static inline F load_fp16(const uint16_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
  static inline F load_int8(const int8_t* p) {
    int32_t four;
    __builtin_memcpy(&four, p, sizeof four);
    return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(four))))));
  }
  static inline void store(float* p, F a) { vst1q_f32(p, a); }
  static inline void store_part(float* p, int count, F a) {
    float lanes[kLanes];
    vst1q_f32(lanes, a);
    for (int i = 0; i < count; i++) p[i] = lanes[i];
  }
  static inline void store_bf16(uint16_t* p, F a) {  // to nearest even; nan becomes the quiet one
    const uint32x4_t word = bits(a), odd = vandq_u32(vshrq_n_u32(word, 16), vdupq_n_u32(1));
    const uint32x4_t up = vaddq_u32(word, vaddq_u32(odd, vdupq_n_u32(0x7FFF)));
    vst1_u16(p, vmovn_u32(vbslq_u32(vceqq_f32(a, a), vshrq_n_u32(up, 16), vdupq_n_u32(0x7FC0))));
  }
  static inline void store_fp16(uint16_t* p, F a) { vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(a))); }
  static inline F splat(float f) { return vdupq_n_f32(f); }
  static inline F add(F a, F b) { return vaddq_f32(a, b); }
  static inline F sub(F a, F b) { return vsubq_f32(a, b); }
  static inline F mul(F a, F b) { return vmulq_f32(a, b); }
  static inline F div(F a, F b) { return vdivq_f32(a, b); }
  static inline F fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
  static inline F min(F a, F b) { return vbslq_f32(vcltq_f32(a, b), a, b); }
  static inline F max(F a, F b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
  static inline F scaled_exp(F p, F t, F, F x) {
    return bits(vbicq_u32(bits(mul(p, bits(vshlq_n_u32(bits(t), 23)))), vcltq_f32(x, splat(kSmallest))));
  }
  static inline float first(F a) { return vgetq_lane_f32(a, 0); }
  static inline float sum(F a) { return vaddvq_f32(a); }
  static inline float top(F a) { return vmaxvq_f32(a); }

  template <int kLevel>
  static inline F fold(F a, F b) {
    return vpaddq_f32(a, b);
  }
};

}  // namespace

extern const Kernels kNeonAttention = {widen<Neon>, nullptr, attend<Neon>, merge<Neon>, finish<Neon>};

}  // namespace m3::spec_decode
