// Kernels for AArch64: Advanced SIMD with half precision and the dot-product instructions (Armv8.2-A).
#include <arm_neon.h>

#include <initializer_list>

#include "int4/gemm_cpu.h"

namespace m3::int4 {
namespace {

#include "int4/gemm_cpu_kernels.h"

// 32 registers: 24 accumulators leave room for the operands of a step. sdot wants signed bytes; a nibble is one as it
// stands.
struct Neon {
  static constexpr int kLanes = 4, kDirectAcc = 16, kWidenTiles = 0, kSkinnyRows = 0;
  static constexpr bool kRawLow = false;  // sdot reads a byte above 127 as negative
  static constexpr int panel_rows(Mode) { return 6; }
  static constexpr int panel_vectors(Mode) { return 2; }
  using I = int32x4_t;
  using F = float32x4_t;

  static inline void pin(I& a) { __asm__ volatile("" : "+w"(a)); }
  static inline void pin(F& a) { __asm__ volatile("" : "+w"(a)); }
  static inline I zero(I) { return vdupq_n_s32(0); }
  static inline F zero(F) { return vdupq_n_f32(0.0f); }
  static inline I load(const I* p) { return vld1q_s32((const int32_t*)p); }
  static inline F load(const F* p) { return vld1q_f32((const float*)p); }
  static inline void store(float* p, F a) { vst1q_f32(p, a); }
  static inline void store(int32_t* p, I a) { vst1q_s32(p, a); }
  static inline void store(int32_t* p, F a) { vst1q_s32(p, vreinterpretq_s32_f32(a)); }
  template <int t>
  static inline I words(const uint8_t* row, int v) {
    return load((const I*)(row + ((v ^ (2 * t)) * 16)));
  }
  template <int shift>
  static inline I nibbles(I w, int32_t mask) {
    uint32x4_t u = vreinterpretq_u32_s32(w);
    if constexpr (shift > 0) u = vshrq_n_u32(u, shift);
    return vreinterpretq_s32_u32(vandq_u32(u, vdupq_n_u32((uint32_t)mask)));
  }
  template <int p>
  static inline F minus_base(I w, F base) {
    const I bits = vorrq_s32(vandq_s32(w, vdupq_n_s32(0xF << p)), vdupq_n_s32((127 + 23 - p) << 23));
    return vsubq_f32(vreinterpretq_f32_s32(bits), base);
  }
  template <int bits>
  static inline I shift_left(I a) {
    return vshlq_n_s32(a, bits);
  }
  static inline F to_float(I a) { return vcvtq_f32_s32(a); }
  static inline I broadcast_i(const int32_t* p) { return vld1q_dup_s32(p); }
  static inline F broadcast_f(const float* p) { return vld1q_dup_f32(p); }
  static inline F splat(float f) { return vdupq_n_f32(f); }
  static inline F fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
  static inline F mul(F a, F b) { return vmulq_f32(a, b); }
  static inline I sub(I a, I b) { return vsubq_s32(a, b); }
  static inline I multiply(I a, int32_t b) { return vmulq_n_s32(a, b); }
  static inline I multiply16(I a, int32_t b) { return multiply(a, b); }
  static inline I widen(I acc, I) { return acc; }
  static inline I dot8(I acc, I w, I x) { return vdotq_s32(acc, vreinterpretq_s8_s32(w), vreinterpretq_s8_s32(x)); }
  static inline I dot16(I acc, I w, I x) {
    const int16x8_t u = vreinterpretq_s16_s32(w), q = vreinterpretq_s16_s32(x);
    const I low = vmull_s16(vget_low_s16(u), vget_low_s16(q)), high = vmull_high_s16(u, q);
    return vaddq_s32(acc, vpaddq_s32(low, high));
  }
  static inline void load_scales(const void* scales, Type type, int64_t offset, float* out) {
    if (type == Type::kF32) return load_scales_scalar(scales, type, offset, out);
    for (int i = 0; i < kTileN; i += 4) {
      const uint16x4_t half = vld1_u16((const uint16_t*)scales + offset + i);
      store(out + i, type == Type::kF16 ? vcvt_f32_f16(vreinterpret_f16_u16(half))
                                        : vreinterpretq_f32_u32(vshll_n_u16(half, 16)));
    }
  }
};

bool pack_row(Mode mode, const float* x, const Block* blocks, int num_blocks, int32_t* packed, int64_t, float* scale,
              int32_t* sum) {
  bool good = true;
  for (int block = 0; block < num_blocks; block++) {
    const Block& b = blocks[block];
    const float* in = x + (int64_t)b.tile * kTileK;
    int32_t* out = packed + (int64_t)b.tile * words_per_tile(mode);
    if (mode == Mode::kExact) {
      for (int i = 0; i < 2 * b.tiles; i++, out += 8) {  // columns 0-3 with 8-11, then 4-7 with 12-15
        const float* half = in + (i / 2) * kTileK + (i % 2) * 4;
        const float32x4_t low = vld1q_f32(half), high = vld1q_f32(half + 8);
        vst1q_f32((float*)out, vzip1q_f32(low, high));
        vst1q_f32((float*)out + 4, vzip2q_f32(low, high));
      }
      continue;
    }
    float32x4_t tops = vdupq_n_f32(0.0f), totals = vdupq_n_f32(0.0f);
    for (int i = 0; i < 4 * b.tiles; i++) {
      const float32x4_t a = vabsq_f32(vld1q_f32(in + 4 * i));
      tops = vmaxq_f32(tops, a);
      totals = vaddq_f32(totals, a);
    }
    const float top = vmaxvq_f32(tops), limit = kLimit[int(mode)];
    good = good && can_round(mode, top, vaddvq_f32(totals), b.columns);
    const float inverse = top > 0.0f && good ? limit / top : 0.0f;
    scale[block] = top / limit;
    int32x4_t q_sum = vdupq_n_s32(0);
    for (int i = 0; i < b.tiles; i++, in += kTileK) {
      int32x4_t q[4];
      for (int j = 0; j < 4; j++) {
        q[j] = vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(in + 4 * j), inverse));
        q_sum = vaddq_s32(q_sum, q[j]);
      }
      const int16x8_t low = vqmovn_high_s32(vqmovn_s32(q[0]), q[1]);   // columns 0-7: pair t belongs to lane t
      const int16x8_t high = vqmovn_high_s32(vqmovn_s32(q[2]), q[3]);  // columns 8-15
      if (mode == Mode::kInt16) {
        const int32x4_t a = vreinterpretq_s32_s16(low), c = vreinterpretq_s32_s16(high);
        vst1q_s32(out, vzip1q_s32(a, c));
        vst1q_s32(out + 4, vzip2q_s32(a, c));
        out += 8;
      } else {
        const int8x8x2_t bytes = vzip_s8(vqmovn_s16(low), vqmovn_s16(high));
        vst1q_s32(out, vreinterpretq_s32_s8(vcombine_s8(bytes.val[0], bytes.val[1])));
        out += 4;
      }
    }
    sum[block] = vaddvq_s32(q_sum);
  }
  return good;
}

// Position 32h + 4g + a -> row 16a + 8h + g: a de-interleaving load by four.
void to_row_order(const float* c, float* row) {
  for (int h = 0; h < 2; h++)
    for (int g = 0; g < 8; g += 4) {
      const float32x4x4_t columns = vld4q_f32(c + 32 * h + 4 * g);
      for (int a = 0; a < 4; a++) vst1q_f32(row + 16 * a + 8 * h + g, columns.val[a]);
    }
}

// exp(x) for x <= 88, within 2 ulp: 2^n * p(r), Cephes' polynomial. Below -87 it goes to 0.
inline float32x4_t exponential(float32x4_t x) {
  x = vminq_f32(vmaxq_f32(x, vdupq_n_f32(-104.0f)), vdupq_n_f32(88.7f));
  const float32x4_t n = vrndnq_f32(vmulq_n_f32(x, 1.44269504f));
  float32x4_t r = vfmsq_n_f32(x, n, 0.693359375f);
  r = vfmsq_n_f32(r, n, -2.12194440e-4f);
  float32x4_t p = vdupq_n_f32(1.9875691500e-4f);
  for (float coefficient : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
    p = vfmaq_f32(vdupq_n_f32(coefficient), p, r);
  p = vaddq_f32(vfmaq_f32(r, p, vmulq_f32(r, r)), vdupq_n_f32(1.0f));
  const int32x4_t whole = vcvtnq_s32_f32(n), half = vshrq_n_s32(whole, 1);  // two factors: 2^n itself may be subnormal
  const int32x4_t rest = vsubq_s32(whole, half), bias = vdupq_n_s32(127);
  p = vmulq_f32(p, vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(half, bias), 23)));
  return vmulq_f32(p, vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(rest, bias), 23)));
}

inline float32x4_t silu_mul4(float32x4_t gate, float32x4_t up) {
  const float32x4_t e = exponential(vnegq_f32(gate));
  return vmulq_f32(vdivq_f32(gate, vaddq_f32(vdupq_n_f32(1.0f), e)), up);
}

void silu_mul(float* gate, const float* up, int64_t count) {
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) vst1q_f32(gate + i, silu_mul4(vld1q_f32(gate + i), vld1q_f32(up + i)));
  float tail_gate[4] = {}, tail_up[4] = {};
  for (int64_t j = i; j < count; j++) tail_gate[j - i] = gate[j], tail_up[j - i] = up[j];
  vst1q_f32(tail_gate, silu_mul4(vld1q_f32(tail_gate), vld1q_f32(tail_up)));
  for (int64_t j = i; j < count; j++) gate[j] = tail_gate[j - i];
}

}  // namespace

extern const Kernels kNeonKernels = {
    "neon",       Neon::kSkinnyRows,
    pack_row,     {tile<Neon, Mode::kExact>, tile<Neon, Mode::kInt16>, tile<Neon, Mode::kInt8>, nullptr},
    to_row_order, silu_mul};

}  // namespace m3::int4
