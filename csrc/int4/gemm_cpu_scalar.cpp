// Portable kernels: vectors of four words as plain loops. The baseline of every build, and the oracle of the others.
#include <cmath>
#include <cstring>

#include "int4/gemm_cpu.h"

namespace m3::int4 {
namespace {

#include "int4/gemm_cpu_kernels.h"

struct Scalar {
  static constexpr int kLanes = 4, kDirectAcc = 8, kWidenTiles = 0, kSkinnyRows = 0;
  static constexpr bool kRawLow = false;
  static constexpr int panel_rows(Mode) { return 4; }
  static constexpr int panel_vectors(Mode) { return 2; }
  struct I {
    int32_t v[4];
  };
  struct F {
    float v[4];
  };

  static void pin(I&) {}
  static void pin(F&) {}
  static I zero(I) { return {}; }
  static F zero(F) { return {}; }
  static I load(const I* p) {
    I r;
    std::memcpy(&r, p, sizeof r);
    return r;
  }
  static F load(const F* p) {
    F r;
    std::memcpy(&r, p, sizeof r);
    return r;
  }
  static void store(float* p, F a) { std::memcpy(p, &a, sizeof a); }
  static void store(int32_t* p, I a) { std::memcpy(p, &a, sizeof a); }
  static void store(int32_t* p, F a) { std::memcpy(p, &a, sizeof a); }
  template <int t>
  static I words(const uint8_t* row, int v) {
    return load((const I*)(row + ((v ^ (2 * t)) * 16)));
  }
  template <int shift>
  static I nibbles(I w, int32_t mask) {
    for (int i = 0; i < 4; i++) w.v[i] = (int32_t)(((uint32_t)w.v[i] >> shift) & (uint32_t)mask);
    return w;
  }
  template <int p>
  static F minus_base(I w, F base) {
    F r;
    for (int i = 0; i < 4; i++) r.v[i] = (float)((1 << (23 - p)) + ((w.v[i] >> p) & 15)) - base.v[i];
    return r;
  }
  static F to_float(I a) {
    F r;
    for (int i = 0; i < 4; i++) r.v[i] = (float)a.v[i];
    return r;
  }
  static I broadcast_i(const int32_t* p) { return {{*p, *p, *p, *p}}; }
  static F broadcast_f(const float* p) { return splat(*p); }
  static F splat(float f) { return {{f, f, f, f}}; }
  static F fma(F a, F b, F c) {
    for (int i = 0; i < 4; i++) c.v[i] += a.v[i] * b.v[i];
    return c;
  }
  static F mul(F a, F b) {
    for (int i = 0; i < 4; i++) a.v[i] *= b.v[i];
    return a;
  }
  static I sub(I a, I b) {
    for (int i = 0; i < 4; i++) a.v[i] -= b.v[i];
    return a;
  }
  static I multiply(I a, int32_t b) {
    for (int i = 0; i < 4; i++) a.v[i] *= b;
    return a;
  }
  static I multiply16(I a, int32_t b) { return multiply(a, b); }
  static I widen(I acc, I) { return acc; }
  static I dot8(I acc, I w, I x) {
    for (int i = 0; i < 4; i++)
      for (int b = 0; b < 4; b++)
        acc.v[i] += (int32_t)((w.v[i] >> (8 * b)) & 255) * (int32_t)(int8_t)(x.v[i] >> (8 * b));
    return acc;
  }
  static I dot16(I acc, I w, I x) {
    for (int i = 0; i < 4; i++)
      for (int b = 0; b < 2; b++)
        acc.v[i] += (int32_t)((w.v[i] >> (16 * b)) & 65535) * (int32_t)(int16_t)(x.v[i] >> (16 * b));
    return acc;
  }
  static void load_scales(const void* scales, Type type, int64_t offset, float* out) {
    load_scales_scalar(scales, type, offset, out);
  }
};

bool pack_row(Mode mode, const float* x, const Block* blocks, int num_blocks, int32_t* packed, int64_t, float* scale,
              int32_t* sum) {
  bool good = true;
  for (int block = 0; block < num_blocks; block++) {
    const Block& b = blocks[block];
    const int64_t start = (int64_t)b.tile * kTileK, count = (int64_t)b.tiles * kTileK;
    if (mode == Mode::kExact) {
      float* out = (float*)packed + start;
      for (int64_t i = 0; i < b.tiles; i++)
        for (int t = 0; t < 4; t++)
          for (int e = 0; e < 4; e++) *out++ = x[start + i * kTileK + byte_column(t, e)];
      continue;
    }
    float top = 0.0f, total = 0.0f;
    for (int64_t i = 0; i < count; i++) {
      const float a = std::fabs(x[start + i]);
      top = a > top ? a : top;
      total += a;
    }
    good = good && can_round(mode, top, total, b.columns);
    const float limit = kLimit[int(mode)], inverse = top > 0.0f && good ? limit / top : 0.0f;
    scale[block] = top / limit;
    int32_t q_sum = 0;
    for (int64_t i = 0; i < b.tiles; i++)
      for (int t = 0; t < 4; t++) {
        int32_t q[4];
        for (int e = 0; e < 4; e++) {
          q[e] = good ? (int32_t)std::nearbyintf(x[start + i * kTileK + byte_column(t, e)] * inverse) : 0;
          q_sum += q[e];
        }
        int32_t* out = packed + ((int64_t)b.tile + i) * words_per_tile(mode) + t * (mode == Mode::kInt8 ? 1 : 2);
        if (mode == Mode::kInt8) {
          out[0] = (q[0] & 255) | (q[1] & 255) << 8 | (q[2] & 255) << 16 | (int32_t)((uint32_t)q[3] << 24);
        } else {
          out[0] = (q[0] & 65535) | (int32_t)((uint32_t)q[2] << 16);
          out[1] = (q[1] & 65535) | (int32_t)((uint32_t)q[3] << 16);
        }
      }
    sum[block] = q_sum;
  }
  return good;
}

void to_row_order(const float* c, float* row) {
  for (int p = 0; p < kTileN; p++) row[row_of_position(p)] = c[p];
}

void silu_mul(float* gate, const float* up, int64_t count) {
  for (int64_t i = 0; i < count; i++) gate[i] = gate[i] / (1.0f + std::exp(-gate[i])) * up[i];
}

}  // namespace

extern const Kernels kScalarKernels = {
    "scalar",     Scalar::kSkinnyRows,
    pack_row,     {tile<Scalar, Mode::kExact>, tile<Scalar, Mode::kInt16>, tile<Scalar, Mode::kInt8>, nullptr},
    to_row_order, silu_mul};

}  // namespace m3::int4
