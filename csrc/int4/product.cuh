// What every product on a GPU shares: which expert's rows a block computes, the weight as an operand of the matrix
// units, the gate. Kernels that promise the same bits call the same functions.
#pragma once
#include "common/ptx.cuh"
#include "int4/gemm_cuda.h"

namespace m3::int4 {

// Rows of one expert, cut into chunks.
struct ExpertRows {
  int32_t expert;
  int32_t first, last;     // of y; last is not among them
  int32_t chunks, before;  // chunks of this expert, and of the experts before it
};

// The expert that owns chunk `wanted` of all experts' chunks of `chunk_rows` rows; false where there are fewer. A
// prefix sum over the experts, 32 at a time, which every warp computes for itself. Offsets out of order or range are
// clamped.
M3_DEVICE bool find_expert(const Product& p, int chunk_rows, int32_t wanted, ExpertRows& found) {
  const int lane = (int)threadIdx.x % 32;
  const auto clamped = [&](int32_t row) { return row < 0 ? 0 : row < p.rows ? row : (int32_t)p.rows; };
  int32_t before = 0;
  for (int32_t base = 0; base < p.experts; base += 32) {
    int32_t first = 0, last = 0;
    if (base + lane < p.experts) {
      first = clamped(__ldg(p.offsets + base + lane));
      last = max(first, clamped(__ldg(p.offsets + base + lane + 1)));
    }
    const int32_t own = (last - first + chunk_rows - 1) / chunk_rows;
    int32_t sum = own;  // of this lane and those below
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int32_t other = __shfl_up_sync(~0u, sum, step);
      if (lane >= step) sum += other;
    }
    const uint32_t beyond = __ballot_sync(~0u, before + sum > wanted);
    if (beyond) {
      const int owner = __ffs((int)beyond) - 1;
      found.expert = base + owner;
      found.first = __shfl_sync(~0u, first, owner), found.last = __shfl_sync(~0u, last, owner);
      found.chunks = __shfl_sync(~0u, own, owner), found.before = before + __shfl_sync(~0u, sum - own, owner);
      return true;
    }
    before += __shfl_sync(~0u, sum, 31);
  }
  return false;
}

// u - z, exact, of a lane's word: the A fragment of mma_16816 and wgmma, rows g and g + 8 of a sub-tile. A nibble under
// an exponent of 2^7 (bf16) or 2^10 (fp16) is that power plus the nibble; 4 bits higher, fp16 has 16 times the nibble.
// offset0, offset1, for the zero points of the two rows: bf16 128 + z; fp16 1024 + z and -(64 + z).
template <Half kHalf>
M3_DEVICE void centred(uint32_t word, uint32_t offset0, uint32_t offset1, uint32_t (&a)[4]) {
  constexpr int kAndOr = (0xF0 & 0xCC) | 0xAA;
  constexpr uint32_t kLow = 0x000F000F, kHigh = 0x00F000F0;
  if constexpr (kHalf == Half::kF16) {  // 1024 + u; 1024 + 16 u, which / 16 is 64 + u
    constexpr uint32_t kBase = 0x64006400, kSixteenth = 0x2C002C00;
    const uint32_t shifted = word >> 8;
    a[0] = ptx::sub2<kHalf>(ptx::lop3<kAndOr>(word, kLow, kBase), offset0);
    a[1] = ptx::fma2<kHalf>(ptx::lop3<kAndOr>(word, kHigh, kBase), kSixteenth, offset1);
    a[2] = ptx::sub2<kHalf>(ptx::lop3<kAndOr>(shifted, kLow, kBase), offset0);
    a[3] = ptx::fma2<kHalf>(ptx::lop3<kAndOr>(shifted, kHigh, kBase), kSixteenth, offset1);
  } else {  // 128 + u
    constexpr uint32_t kBase = 0x43004300;
#pragma unroll
    for (int i = 0; i < 4; ++i)
      a[i] = ptx::sub2<kHalf>(ptx::lop3<kAndOr>(word >> 4 * i, kLow, kBase), i % 2 ? offset1 : offset0);
  }
}

M3_DEVICE float silu_mul(float gate, float up) {
  constexpr float kLog2E = 1.44269504f;
  return ptx::mul(ptx::mul(gate, ptx::reciprocal(ptx::add(1.f, ptx::exp2(ptx::mul(-gate, kLog2E))))), up);
}

}  // namespace m3::int4
