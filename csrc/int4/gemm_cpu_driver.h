// What the bindings call: matrix products over packed INT4 weights on the CPU, on raw pointers.
#pragma once
#include <cstdint>

#include "int4/gemm_cpu.h"

namespace m3::int4 {

// E weights of one shape, contiguous. Pointers as in Int4Weight; perm and zeros may be null.
struct Weights {
  const uint8_t* tiles;
  const void* scales;
  const uint8_t* zeros;
  const int32_t* perm;
  Type scale_type;
  int64_t experts, n, k, group_size, first_k;

  int64_t n_tiles() const { return (n + kTileN - 1) / kTileN; }
  int64_t k_tiles() const { return (k + kTileK - 1) / kTileK; }
  int64_t groups() const { return group_of_tile(k_tiles() - 1, group_size, first_k) + 1; }
};

// y[i] = W[e] x[i] (+ bias), rows sorted by expert: offsets (experts + 1). bias has y's type.
struct Rows {
  const void* x;
  Type x_type;
  int64_t x_stride;  // elements
  void* y;
  Type y_type;
  int64_t y_stride;
  const int64_t* offsets;
  const int64_t* x_rows;  // row i reads x[x_rows[i]]; null: x[i]
  const void* bias;
};

void gemm(const char* op, const Weights& weights, const Rows& rows, Mode mode, int threads);

void moe(const Weights& w13, const Weights& w2, const void* x, Type type, int64_t tokens, int64_t top_k,
         const int64_t* ids, const float* weights, void* y, Mode mode, int threads);

// gate[i] = silu(gate[i]) * up[i]
void silu_mul(float* gate, const float* up, int64_t count);

}  // namespace m3::int4
