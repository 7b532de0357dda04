// Stands in for csrc/common/ptx.cuh: the same functions, with the meaning that the PTX manual gives them, in plain C++.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#define M3_SM90 1
#define M3_WGMMA 1
#define M3_DEVICE static inline

namespace m3 {

enum class Half { kBf16 = 1, kF16 = 2 };

namespace ptx {

template <int kTable>
M3_DEVICE uint32_t lop3(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d = 0;
  for (int row = 0; row < 8; ++row)
    if (kTable >> row & 1) d |= (row & 4 ? a : ~a) & (row & 2 ? b : ~b) & (row & 1 ? c : ~c);
  return d;
}
M3_DEVICE uint32_t prmt(uint32_t a, uint32_t b, uint32_t selector) { return __byte_perm(a, b, selector); }

template <Half kHalf>
M3_DEVICE float to_float(uint16_t bits) {
  return emulator::half_to_float(bits, kHalf == Half::kBf16);
}
template <Half kHalf>
M3_DEVICE uint16_t from_float(float f) {
  return emulator::float_to_half(f, kHalf == Half::kBf16);
}
template <Half kHalf>
M3_DEVICE uint32_t pack2(float low, float high) {
  return (uint32_t)from_float<kHalf>(high) << 16 | from_float<kHalf>(low);
}
template <Half kHalf>
M3_DEVICE float2 unpack2(uint32_t bits) {
  return {to_float<kHalf>((uint16_t)bits), to_float<kHalf>((uint16_t)(bits >> 16))};
}
// Products and sums of two 16-bit floats are exact in double, to be rounded once; by way of fp32 they would be twice.
template <Half kHalf>
M3_DEVICE uint16_t round_once(double exact) {
  float f = (float)exact;
  if ((double)f != exact && std::isfinite(f)) {  // make the last bit sticky: round to odd
    const uint32_t bits = __float_as_uint(f);
    const bool beyond = std::fabs((double)f) > std::fabs(exact);
    f = __uint_as_float((beyond ? bits - 1 : bits) | 1);
  }
  return from_float<kHalf>(f);
}
template <Half kHalf>
M3_DEVICE uint32_t fma2(uint32_t a, uint32_t b, uint32_t c) {
  const float2 x = unpack2<kHalf>(a), y = unpack2<kHalf>(b), z = unpack2<kHalf>(c);
  return (uint32_t)round_once<kHalf>((double)x.y * y.y + z.y) << 16 | round_once<kHalf>((double)x.x * y.x + z.x);
}
template <Half kHalf>
M3_DEVICE uint32_t sub2(uint32_t a, uint32_t b) {
  const float2 x = unpack2<kHalf>(a), y = unpack2<kHalf>(b);
  return (uint32_t)round_once<kHalf>((double)x.y - y.y) << 16 | round_once<kHalf>((double)x.x - y.x);
}
template <Half kHalf>
M3_DEVICE uint32_t mul2(uint32_t a, uint32_t b) {
  return fma2<kHalf>(a, b, 0x80008000u);
}

M3_DEVICE float add(float a, float b) { return a + b; }
M3_DEVICE float mul(float a, float b) { return a * b; }
M3_DEVICE float fma(float a, float b, float c) { return std::fma(a, b, c); }
M3_DEVICE float max_nan(float a, float b) { return a != a || b != b ? NAN : std::max(a, b); }
M3_DEVICE float flush(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.f, x) : x; }
M3_DEVICE float exp2(float x) { return flush(std::exp2(flush(x))); }
M3_DEVICE float log2(float x) { return flush(std::log2(flush(x))); }
M3_DEVICE float reciprocal(float x) { return flush(1 / flush(x)); }

template <Half kHalf>
M3_DEVICE void mma_16816(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Operand {
    float* d;
    const uint32_t* a;
    uint32_t b[2];
  } operand{d, a, {b0, b1}};
  emulator::meet(kHalf == Half::kBf16 ? "mma_16816 bf16" : "mma_16816 f16", ~0u, &operand, [](void* const* operands) {
    float wide_a[16][16], wide_b[16][8];
    for (int lane = 0; lane < 32; ++lane) {
      if (!operands[lane]) emulator::fail("mma_16816: a lane of the warp has returned");
      const Operand& o = *(Operand*)operands[lane];
      const int g = lane / 4, t = lane % 4;
      for (int r = 0; r < 4; ++r) {
        const float2 two = unpack2<kHalf>(o.a[r]);
        wide_a[g + 8 * (r & 1)][2 * t + 8 * (r >> 1)] = two.x;
        wide_a[g + 8 * (r & 1)][2 * t + 8 * (r >> 1) + 1] = two.y;
      }
      for (int r = 0; r < 2; ++r) {
        const float2 two = unpack2<kHalf>(o.b[r]);
        wide_b[2 * t + 8 * r][g] = two.x;
        wide_b[2 * t + 8 * r + 1][g] = two.y;
      }
    }
    for (int lane = 0; lane < 32; ++lane) {
      float* out = ((Operand*)operands[lane])->d;
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + 8 * (i >> 1), column = 2 * (lane % 4) + (i & 1);
        float sum = out[i];
        for (int k = 0; k < 16; ++k) sum += wide_a[row][k] * wide_b[k][column];
        out[i] = sum;
      }
    }
  });
}

M3_DEVICE uint32_t shared_address(const void* pointer) { return emulator::shared_offset(pointer); }

template <int kMatrices, bool kTransposed>
M3_DEVICE void ldmatrix(uint32_t* r, const void* row) {
  struct Operand {
    uint32_t* r;
    const char* row;
  } operand{r, (const char*)row};
  if (emulator::fiber->lane < 8 * kMatrices) emulator::check_shared("ldmatrix", row, 16, 16);
  emulator::meet(kTransposed ? "ldmatrix trans" : "ldmatrix", ~0u, &operand, [](void* const* operands) {
    for (int matrix = 0; matrix < kMatrices; ++matrix) {
      uint16_t element[8][8];
      for (int i = 0; i < 8; ++i) std::memcpy(element[i], ((Operand*)operands[8 * matrix + i])->row, 16);
      for (int lane = 0; lane < 32; ++lane) {
        const int i = lane / 4, j = 2 * (lane % 4);
        const uint16_t low = kTransposed ? element[j][i] : element[i][j];
        const uint16_t high = kTransposed ? element[j + 1][i] : element[i][j + 1];
        ((Operand*)operands[lane])->r[matrix] = (uint32_t)high << 16 | low;
      }
    }
  });
}
M3_DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* row) { ldmatrix<4, false>(r, row); }
M3_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) { ldmatrix<4, true>(r, row); }
M3_DEVICE void ldmatrix_x2(uint32_t (&r)[2], const void* row) { ldmatrix<2, false>(r, row); }

M3_DEVICE uint4 load_once(const void* pointer) {
  if ((uintptr_t)pointer % 16) emulator::fail("load_once: want an address aligned to 16 bytes");
  return *(const uint4*)pointer;
}
M3_DEVICE void cp_async_16(void* shared, const void* global, int valid = 16) {
  emulator::copy_async(shared, global, valid);
}
M3_DEVICE void cp_async_4(void* shared, const void* global, int valid = 4) {
  emulator::copy_async(shared, global, valid, 4);
}
M3_DEVICE void cp_async_commit() { emulator::commit_copies(); }
template <int kGroups>
M3_DEVICE void cp_async_wait() {
  emulator::wait_copies(kGroups);
}

M3_DEVICE int add_acq_rel(int* counter, int value) { return atomicAdd(counter, value); }
M3_DEVICE int load_acquire(const int* pointer) {
  emulator::yield();
  return *pointer;
}
M3_DEVICE void store_release(int* pointer, int value) { *pointer = value; }
M3_DEVICE float4 load_l2(const float* pointer) {
  if ((uintptr_t)pointer % 16) emulator::fail("load_l2: want an address aligned to 16 bytes");
  return *(const float4*)pointer;
}

M3_DEVICE void bar_sync(int id, int threads) {
  emulator::barrier("bar_sync", emulator::fiber->block->barriers[id], threads, true);
}
M3_DEVICE void bar_arrive(int id, int threads) {
  emulator::barrier("bar_arrive", emulator::fiber->block->barriers[id], threads, false);
}
M3_DEVICE void grid_wait() {}
M3_DEVICE void grid_launch_dependents() {}

M3_DEVICE void mbarrier_init(uint64_t* barrier, int count) { emulator::mbarrier_init(barrier, count); }
M3_DEVICE void mbarrier_fence_init() {}
M3_DEVICE void mbarrier_arrive(uint64_t* barrier) { emulator::mbarrier_arrive(barrier, 0); }
M3_DEVICE void mbarrier_arrive_expect(uint64_t* barrier, int bytes) { emulator::mbarrier_arrive(barrier, bytes); }
M3_DEVICE void mbarrier_wait(uint64_t* barrier, uint32_t parity) { emulator::mbarrier_wait(barrier, parity); }
M3_DEVICE void bulk_copy(void* shared, const void* global, int bytes, uint64_t* barrier) {
  emulator::bulk_copy(shared, global, bytes, barrier);
}
M3_DEVICE void bulk_copy_once(void* shared, const void* global, int bytes, uint64_t* barrier) {
  emulator::bulk_copy(shared, global, bytes, barrier);
}
M3_DEVICE void fence_async() {}

M3_DEVICE int cluster_rank() { return emulator::fiber->block->rank; }
M3_DEVICE void cluster_arrive() {
  emulator::Block& block = *emulator::fiber->block;
  const int all = (int)(block.cluster->size() * block.fibers.size());
  emulator::Barrier& b = *block.cluster_barrier;
  emulator::fiber->cluster_generation = b.generation;
  emulator::barrier("cluster_arrive", b, all, false);
}
M3_DEVICE void cluster_wait() {
  emulator::Barrier& b = *emulator::fiber->block->cluster_barrier;
  const uint64_t generation = emulator::fiber->cluster_generation;
  emulator::wait("cluster_wait", [&b, generation] { return b.generation != generation; });
}
M3_DEVICE float4 load_cluster(const float* pointer, int rank) {
  emulator::check_shared("load_cluster", pointer, 16, 16);
  return *(const float4*)emulator::shared_at(emulator::shared_offset(pointer), rank);
}

M3_DEVICE void wgmma_fence() {}
M3_DEVICE void wgmma_commit() { emulator::commit_products(); }
template <int kGroups>
M3_DEVICE void wgmma_wait() {
  emulator::wait_products(kGroups);
}
template <int kRegisters>
M3_DEVICE void wgmma_hold(float (&)[kRegisters]) {}
M3_DEVICE uint64_t wgmma_descriptor(const void* pointer) {
  return (uint64_t)((shared_address(pointer) & 0x3FFFF) >> 4) | 1ull << 16 | 64ull << 32 | 1ull << 62;
}
template <Half kHalf, int kTokens>
M3_DEVICE void wgmma(float (&d)[kTokens / 2], const uint32_t (&a)[4], uint64_t b, int accumulate) {
  emulator::issue_product(d, kTokens, a, b, accumulate, kHalf == Half::kBf16);
}
template <int kRegisters>
M3_DEVICE void registers_up() {}
template <int kRegisters>
M3_DEVICE void registers_down() {}

}  // namespace ptx
}  // namespace m3
