// Host interface of what a mixture of experts does besides its products on a GPU. Fits any compiler.
#pragma once
#include <cstdint>

#include "int4/gemm_cuda.h"

namespace m3::int4 {

constexpr int64_t kMostRoutedExperts = 2048;  // a block counts them in shared memory

// Rows sorted by expert, in the order of their slots. Slot t * topk + j is token t's j-th expert.
//   offsets (experts + 1,): expert e has the rows offsets[e] .. offsets[e + 1] - 1
//   row_token (tokens * topk,): the token of each row;   slot_row (tokens * topk,): the row of each slot
// A slot whose id is out of range has no row (slot_row -1); as many rows at the end belong to no expert.
struct Routing {
  const int64_t* ids;  // (tokens, topk)
  int64_t tokens, topk, experts;
  int32_t *offsets, *row_token, *slot_row;
  int32_t* workspace;  // routing_workspace(slots, experts) ints
  int32_t* counter;    // a zero, left zero
  void* stream;
};
int64_t routing_workspace(int64_t slots, int64_t experts);
void route(const Routing& routing);

// y[t] = sum_j weights[t, j] * rows[slot_row[t, j]] in order of j, fp32, rounded once; slots without a row add nothing.
struct Combination {
  const float* rows;  // (tokens * topk, columns)
  const int32_t* slot_row;
  const float* weights;  // (tokens, topk)
  int64_t tokens, topk, columns;
  void* y;  // (tokens, columns) bf16 or fp16
  DeviceType y_type;
  void* stream;
};
void combine(const Combination& combination);

// y[i, j] = x[row_index[i], perm[e, j]] of 16-bit elements, e the expert of row i. What lies outside of x, and a row of
// no expert, is 0.
struct Gathering {
  const void* x;  // (x_rows, columns)
  int64_t x_rows, rows, columns;
  const int32_t* row_index;  // (rows,); null: i
  const int32_t* perm;       // (experts, columns)
  const int32_t* offsets;    // (experts + 1,); null: one expert
  int64_t experts;
  void* y;  // (rows, columns)
  void* stream;
};
void gather_columns(const Gathering& gathering);

// y[i, j] = silu(x[i, j]) * x[i, columns + j] in fp32, rounded once; x (rows, 2 columns) fp32, y bf16 or fp16.
void gate(const float* x, int64_t rows, int64_t columns, void* y, DeviceType y_type, void* stream);

}  // namespace m3::int4
