// What the tile kernels share: how a warp reads and writes a run of a row, exp, and how the parts of a row meet.
//
// A warp takes kUnit neighbouring columns at once, a lane 16 bytes of every 512: where the unit is whole and aligned,
// all loads are on their way before the first is used, and nothing is checked. The end of a row, and rows that do not
// begin at 16 bytes, go vector by vector, with the same columns in the same lanes: that changes no bit.
#pragma once
#include <type_traits>

#include "common/launch.cuh"
#include "common/ptx.cuh"
#include "policy_loss/tiles_cuda.h"

namespace m3::policy_loss {

constexpr int kWarps = 4, kThreads = 32 * kWarps;

template <Type kType>
using Stored = std::conditional_t<kType == Type::kF32, uint32_t, uint16_t>;  // bits
template <Type kType>
constexpr int kVector = 16 / sizeof(Stored<kType>);  // elements of 16 bytes

// -- 16 bytes of a row ------------------------------------------------------------------------------------------------
template <Type kType>
M3_DEVICE void widen(const uint4& raw, float (&z)[kVector<kType>]) {
  const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (kType == Type::kF32) {
      z[i] = __uint_as_float(words[i]);
    } else {
      const float2 two = ptx::unpack2<Half(kType)>(words[i]);
      z[2 * i] = two.x, z[2 * i + 1] = two.y;
    }
  }
}

// Rounded to nearest even.
template <Type kType>
M3_DEVICE uint4 narrow(const float (&z)[kVector<kType>]) {
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (kType == Type::kF32)
      words[i] = __float_as_uint(z[i]);
    else
      words[i] = ptx::pack2<Half(kType)>(z[2 * i], z[2 * i + 1]);
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

// One element.
template <Type kType>
M3_DEVICE Stored<kType> bits_of(float value) {
  if constexpr (kType == Type::kF32)
    return __float_as_uint(value);
  else
    return ptx::from_float<Half(kType)>(value);
}
template <Type kType>
M3_DEVICE float value_of(Stored<kType> bits) {
  if constexpr (kType == Type::kF32)
    return __uint_as_float(bits);
  else
    return ptx::to_float<Half(kType)>(bits);
}

// A unit that is all there: vector j of a lane is columns `column` + 32 kVector j onwards.
template <Type kType, int kVectors>
M3_DEVICE void read_whole(uint4 (&raw)[kVectors], const Stored<kType>* row, int column) {
#pragma unroll
  for (int j = 0; j < kVectors; ++j) raw[j] = __ldcs((const uint4*)(row + column + 32 * kVector<kType> * j));
}

// One vector, `fill` where there is no column: the end of a row, or rows that are not aligned.
template <Type kType>
M3_DEVICE uint4 read_part(const Stored<kType>* row, int column, int columns, bool aligned, float fill) {
  constexpr int kEach = kVector<kType>, kPerWord = kEach / 4;
  if (aligned && column + kEach <= columns) return *(const uint4*)(row + column);
  uint32_t words[4] = {};
#pragma unroll
  for (int i = 0; i < kEach; ++i)
    words[i / kPerWord] |= (uint32_t)(column + i < columns ? row[column + i] : bits_of<kType>(fill))
                           << (i % kPerWord * 16);
  return make_uint4(words[0], words[1], words[2], words[3]);
}

// kCount neighbouring columns.
template <Type kType, int kCount>
M3_DEVICE void write_whole(Stored<kType>* row, int column, const float (&z)[kCount]) {
  if constexpr (kType == Type::kF32) {
#pragma unroll
    for (int i = 0; i < kCount; i += 4) *(float4*)(row + column + i) = make_float4(z[i], z[i + 1], z[i + 2], z[i + 3]);
  } else if constexpr (kCount == 8) {
    *(uint4*)(row + column) = narrow<kType>(z);
  } else {
    static_assert(kCount == 4);
    *(uint2*)(row + column) = make_uint2(ptx::pack2<Half(kType)>(z[0], z[1]), ptx::pack2<Half(kType)>(z[2], z[3]));
  }
}

template <Type kType, int kCount>
M3_DEVICE void write_part(Stored<kType>* row, int column, int columns, bool aligned, const float (&z)[kCount]) {
  if (aligned && column + kCount <= columns) return write_whole<kType>(row, column, z);
#pragma unroll
  for (int i = 0; i < kCount; ++i)
    if (column + i < columns) row[column + i] = bits_of<kType>(z[i]);
}

// -- arithmetic -------------------------------------------------------------------------------------------------------
constexpr float kZeroExp = -104.0f;  // exp of this and less is 0

// x, no lower than kZeroExp; a nan stays one.
M3_DEVICE float bounded(float x) { return ptx::max_nan(x, kZeroExp); }

// exp(x) for kZeroExp <= x <= 88 within 3 units in the last place; 0 where it is subnormal. 2^(x log2 e), with what
// rounding takes from the product put back: alone it would cost |x| units.
M3_DEVICE float exponential(float x) {
  constexpr float kLog2E = 1.44269504f, kLog2ELow = 1.92596303e-8f, kLn2 = 0.693147181f;
  const float t = x * kLog2E, low = ptx::fma(x, kLog2ELow, ptx::fma(x, kLog2E, -t));
  const float y = ptx::exp2(t);
  return ptx::fma(y, low * kLn2, y);
}

// 1 / x, rounded nearly always to nearest.
M3_DEVICE float inverse(float x) {
  const float y = ptx::reciprocal(x);
  return ptx::fma(y, ptx::fma(-x, y, 1.0f), y);
}

// dz'/dz = scale * (1 - (z' * inverse_cap)^2), the second factor only where there is a softcap.
struct Chain {
  float scale, inverse_cap;
};

M3_DEVICE Chain chain_of(const Transform& t, int64_t row) {
  const float temperature = t.inverse_temperature ? t.inverse_temperature[row] : 1.0f;
  return {t.logit_scale * temperature, t.softcap > 0.0f ? inverse(t.softcap * temperature) : 0.0f};
}

template <bool kCapped>
M3_DEVICE float chained(float g, float z, const Chain& chain) {
  if constexpr (kCapped) {
    const float ratio = z * chain.inverse_cap;
    g *= ptx::fma(-ratio, ratio, 1.0f);
  }
  return g * chain.scale;
}

// -- the parts of a row -----------------------------------------------------------------------------------------------
M3_DEVICE float warp_sum(float x) {
#pragma unroll
  for (int bits = 16; bits; bits /= 2) x += __shfl_xor_sync(~0u, x, bits);
  return x;
}
M3_DEVICE float warp_max(float x) {
#pragma unroll
  for (int bits = 16; bits; bits /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, bits));
  return x;
}

// Whether this block is the last of the row's `shares` to come here: it then sees what the others wrote. All threads.
M3_DEVICE bool last_of_row(int* counters, int64_t row, int shares) {
  __syncthreads();
  if (shares == 1) return true;
  int* last = (int*)shared_memory();
  if (threadIdx.x == 0) {
    *last = ptx::add_acq_rel(counters + row, 1) == shares - 1;
    if (*last) counters[row] = 0;
  }
  __syncthreads();
  return *last;
}

// -- launches ---------------------------------------------------------------------------------------------------------
inline int units_of(int columns) { return (columns + kUnit - 1) / kUnit; }

// How a reduction over rows is cut into blocks. A block per row is enough where rows are many; few rows are shared.
struct Cut {
  int shares;  // blocks a row
  int units;   // of a block
};

inline Cut cut_of(const Workspace& workspace, int64_t rows, int columns) {
  const int units = units_of(columns);
  const int64_t wanted = 4 * (int64_t)device().multiprocessors / rows;
  if (rows > workspace.num_counters || wanted < 2) return {1, units};
  const int most = (units + kWarps - 1) / kWarps, shares = wanted < most ? (int)wanted : most;
  const int each = ((units + shares - 1) / shares + kWarps - 1) / kWarps * kWarps;
  return {(units + each - 1) / each, each};
}

// Whether every row begins at 16 bytes.
inline bool aligned(const Matrix& m, int64_t rows) {
  const int64_t bytes = m.type == Type::kF32 ? 4 : 2;
  return (uintptr_t)m.data % 16 == 0 && (rows <= 1 || m.stride * bytes % 16 == 0);
}

// Runs body with the types of logits and gradients as constants. The border has refused all other pairs.
template <Type kType>
using Constant = std::integral_constant<Type, kType>;

template <class Body>
void with_type(Type type, Body body) {
  if (type == Type::kF32)
    body(Constant<Type::kF32>());
  else if (type == Type::kBf16)
    body(Constant<Type::kBf16>());
  else
    body(Constant<Type::kF16>());
}

template <class Body>
void with_types(Type in, Type out, Body body) {
  if (in == Type::kF32)
    with_type(out, [&](auto to) { body(Constant<Type::kF32>(), to); });
  else if (in == Type::kBf16)
    body(Constant<Type::kBf16>(), Constant<Type::kBf16>());
  else
    body(Constant<Type::kF16>(), Constant<Type::kF16>());
}

}  // namespace m3::policy_loss
