// Stands in for CUDA's cuda_runtime.h when kernels are compiled for the emulator: the language, its built-in functions.
#pragma once
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "emulator.h"

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline
#define __noinline__
#define __restrict__ __restrict
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)
#define __CUDACC__ 1  // headers shared with the host choose their device form

#define threadIdx (::m3::emulator::fiber->thread)
#define blockIdx (::m3::emulator::fiber->block_index)
#define blockDim (::m3::emulator::block_dim)
#define gridDim (::m3::emulator::grid_dim)

// -- vectors
// ------------------------------------------------------------------------------------------------------------
#define M3_VECTOR2(type, element)            \
  struct alignas(2 * sizeof(element)) type { \
    element x, y;                            \
  };                                         \
  static inline type make_##type(element x, element y) { return {x, y}; }
#define M3_VECTOR4(type, element)                                            \
  struct alignas(4 * sizeof(element) < 16 ? 4 * sizeof(element) : 16) type { \
    element x, y, z, w;                                                      \
  };                                                                         \
  static inline type make_##type(element x, element y, element z, element w) { return {x, y, z, w}; }
M3_VECTOR2(float2, float)
M3_VECTOR2(double2, double)
M3_VECTOR2(int2, int)
M3_VECTOR2(uint2, unsigned)
M3_VECTOR2(short2, short)
M3_VECTOR2(ushort2, unsigned short)
M3_VECTOR4(float4, float)
M3_VECTOR4(int4, int)
M3_VECTOR4(uint4, unsigned)
M3_VECTOR4(ushort4, unsigned short)
M3_VECTOR4(uchar4, unsigned char)
M3_VECTOR4(char4, signed char)
#undef M3_VECTOR2
#undef M3_VECTOR4

// -- bits and conversions
// -------------------------------------------------------------------------------------------------
static inline float __uint_as_float(unsigned u) { return std::bit_cast<float>(u); }
static inline unsigned __float_as_uint(float f) { return std::bit_cast<unsigned>(f); }
static inline float __int_as_float(int u) { return std::bit_cast<float>(u); }
static inline int __float_as_int(float f) { return std::bit_cast<int>(f); }
static inline double __longlong_as_double(long long u) { return std::bit_cast<double>(u); }
static inline long long __double_as_longlong(double f) { return std::bit_cast<long long>(f); }
static inline int __popc(unsigned x) { return std::popcount(x); }
static inline int __popcll(unsigned long long x) { return std::popcount(x); }
static inline int __clz(int x) { return std::countl_zero((unsigned)x); }
static inline int __clzll(long long x) { return std::countl_zero((unsigned long long)x); }
static inline int __ffs(int x) { return x ? std::countr_zero((unsigned)x) + 1 : 0; }
static inline int __ffsll(long long x) { return x ? std::countr_zero((unsigned long long)x) + 1 : 0; }
static inline unsigned __brev(unsigned x) {
  unsigned y = 0;
  for (int i = 0; i < 32; ++i) y |= (x >> i & 1) << (31 - i);
  return y;
}
static inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned)((uint64_t)a * b >> 32); }
static inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return (unsigned long long)((unsigned __int128)a * b >> 64);
}
static inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const uint64_t both = (uint64_t)b << 32 | a;
  unsigned d = 0;
  for (int i = 0; i < 4; ++i) d |= (unsigned)(both >> 8 * (selector >> 4 * i & 7) & 0xFF) << 8 * i;
  return d;
}
static inline int __float2int_rn(float f) { return (int)std::nearbyint(f); }
static inline int __float2int_rz(float f) { return (int)f; }
static inline float __int2float_rn(int i) { return (float)i; }
static inline float __uint2float_rn(unsigned i) { return (float)i; }

// -- arithmetic
// -----------------------------------------------------------------------------------------------------------
static inline float __fadd_rn(float a, float b) { return a + b; }
static inline float __fsub_rn(float a, float b) { return a - b; }
static inline float __fmul_rn(float a, float b) { return a * b; }
static inline float __fdiv_rn(float a, float b) { return a / b; }
static inline float __fsqrt_rn(float a) { return std::sqrt(a); }
static inline float __frcp_rn(float a) { return 1 / a; }
static inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
static inline double __dadd_rn(double a, double b) { return a + b; }
static inline double __dmul_rn(double a, double b) { return a * b; }
static inline double __fma_rn(double a, double b, double c) { return std::fma(a, b, c); }
#define __expf(x) std::exp((float)(x))    // glibc has a function of this name
#define __logf(x) std::log((float)(x))    // glibc has a function of this name
#define __log2f(x) std::log2((float)(x))  // glibc has a function of this name
static inline float __fdividef(float a, float b) { return a / b; }
static inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
template <class A, class B>
static inline auto min(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>)
    return (T)std::fmin((T)a, (T)b);
  else
    return (T)a < (T)b ? (T)a : (T)b;
}
template <class A, class B>
static inline auto max(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>)
    return (T)std::fmax((T)a, (T)b);
  else
    return (T)a > (T)b ? (T)a : (T)b;
}

// -- memory
// -----------------------------------------------------------------------------------------------------------------
template <class T>
static inline T __ldg(const T* p) {
  return *p;
}
template <class T>
static inline T __ldcg(const T* p) {
  return *p;
}
template <class T>
static inline T __ldcs(const T* p) {
  return *p;
}
template <class T>
static inline void __stcg(T* p, T v) {
  *p = v;
}
template <class T>
static inline void __stcs(T* p, T v) {
  *p = v;
}
static inline void __threadfence() {}
static inline void __threadfence_block() {}
template <class T, class V>
static inline T atomicAdd(T* p, V v) {
  const T old = *p;
  *p = (T)(old + (T)v);
  return old;
}
template <class T, class V>
static inline T atomicMax(T* p, V v) {
  const T old = *p;
  *p = std::max(old, (T)v);
  return old;
}
template <class T, class V>
static inline T atomicMin(T* p, V v) {
  const T old = *p;
  *p = std::min(old, (T)v);
  return old;
}
template <class T, class V>
static inline T atomicOr(T* p, V v) {
  const T old = *p;
  *p = old | (T)v;
  return old;
}
template <class T, class V>
static inline T atomicExch(T* p, V v) {
  const T old = *p;
  *p = (T)v;
  return old;
}
template <class T, class C, class V>
static inline T atomicCAS(T* p, C compare, V v) {
  const T old = *p;
  if (old == (T)compare) *p = (T)v;
  return old;
}
[[noreturn]] static inline void __trap() { m3::emulator::fail("trap"); }

// -- what the threads of a warp or a block do together
// -----------------------------------------------------------------------
static inline void __syncthreads() { m3::emulator::block_barrier(); }
static inline int __syncthreads_or(int value) {
  static int any;  // one block runs at a time
  m3::emulator::block_barrier();
  any = 0;
  m3::emulator::block_barrier();
  any |= value != 0;
  m3::emulator::block_barrier();
  return any;
}
static inline void __syncwarp(unsigned mask = ~0u) {
  m3::emulator::meet("__syncwarp", mask, nullptr, [](void* const*) {});
}

namespace m3::emulator {

// Every lane gets the value of the lane that `source` names for it (its own, if that is not there).
template <class T, class Source>
static inline T exchange(const char* what, unsigned mask, T value, Source source) {
  struct Operand {
    T in, out;
    int from;
  } operand{value, value, source(fiber->lane)};
  meet(what, mask, &operand, [](void* const* operands) {
    for (int lane = 0; lane < 32; ++lane)
      if (operands[lane]) {
        Operand& o = *(Operand*)operands[lane];
        if (o.from >= 0 && o.from < 32 && operands[o.from]) o.out = ((Operand*)operands[o.from])->in;
      }
  });
  return operand.out;
}

template <class T, class Fold>
static inline T reduce(const char* what, unsigned mask, T value, Fold fold) {
  struct Operand {
    T in, out;
  } operand{value, value};
  meet(what, mask, &operand, [fold](void* const* operands) {
    bool first = true;
    T total{};
    for (int lane = 0; lane < 32; ++lane)
      if (operands[lane]) {
        const T each = ((Operand*)operands[lane])->in;
        total = first ? each : fold(total, each);
        first = false;
      }
    for (int lane = 0; lane < 32; ++lane)
      if (operands[lane]) ((Operand*)operands[lane])->out = total;
  });
  return operand.out;
}

}  // namespace m3::emulator

template <class T>
static inline T __shfl_sync(unsigned mask, T value, int lane, int width = 32) {
  return m3::emulator::exchange("__shfl_sync", mask, value,
                                [=](int own) { return (own & ~(width - 1)) | (lane & (width - 1)); });
}
template <class T>
static inline T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
  return m3::emulator::exchange("__shfl_xor_sync", mask, value, [=](int own) {
    const int from = own ^ bits;
    return (from & ~(width - 1)) == (own & ~(width - 1)) ? from : own;
  });
}
template <class T>
static inline T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32) {
  return m3::emulator::exchange("__shfl_down_sync", mask, value,
                                [=](int own) { return own % width + (int)by < width ? own + (int)by : own; });
}
template <class T>
static inline T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32) {
  return m3::emulator::exchange("__shfl_up_sync", mask, value,
                                [=](int own) { return own % width >= (int)by ? own - (int)by : own; });
}
static inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return m3::emulator::reduce("__ballot_sync", mask, predicate ? 1u << m3::emulator::fiber->lane : 0u,
                              [](unsigned a, unsigned b) { return a | b; });
}
static inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
static inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, !predicate) == 0; }
static inline unsigned __match_any_sync(unsigned mask, unsigned value) {
  struct Operand {
    unsigned in, out;
  } operand{value, 0};
  m3::emulator::meet("__match_any_sync", mask, &operand, [](void* const* operands) {
    for (int a = 0; a < 32; ++a)
      for (int b = 0; b < 32; ++b)
        if (operands[a] && operands[b] && ((Operand*)operands[a])->in == ((Operand*)operands[b])->in)
          ((Operand*)operands[a])->out |= 1u << b;
  });
  return operand.out;
}
template <class T>
static inline T __reduce_add_sync(unsigned mask, T value) {
  return m3::emulator::reduce("__reduce_add_sync", mask, value, [](T a, T b) { return (T)(a + b); });
}
template <class T>
static inline T __reduce_max_sync(unsigned mask, T value) {
  return m3::emulator::reduce("__reduce_max_sync", mask, value, [](T a, T b) { return a > b ? a : b; });
}
template <class T>
static inline T __reduce_min_sync(unsigned mask, T value) {
  return m3::emulator::reduce("__reduce_min_sync", mask, value, [](T a, T b) { return a < b ? a : b; });
}

// -- the runtime's own functions
// ----------------------------------------------------------------------------------------------
using cudaStream_t = void*;
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;
static inline cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t) {
  std::memset(p, value, bytes);
  return cudaSuccess;
}
static inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, int, cudaStream_t) {
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}
