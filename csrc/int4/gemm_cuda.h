// Host interface of the GPU products: what one product is, and the kernels that compute it. Fits any compiler.
//
//   y[i] = x[row(i)] W[e]^T + bias,   e the expert with offsets[e] <= i < offsets[e + 1] (dense: the one weight)
#pragma once
#include <cstdint>

#include "int4/layout.h"
#include "int4/plan.h"

namespace m3::int4 {

// Numbers of types at the border, as in gemm_cpu.h.
enum class DeviceType : int { kFp32 = 0, kBf16 = 1, kF16 = 2 };

enum class Epilogue : int {
  kStore = 0,  // y (rows, n) of x's type, with bias
  kFloat = 1,  // y (rows, n) fp32, no bias
  kGated = 2,  // y (rows, n / 2) of x's type: silu(gate) * up in fp32, gate the rows 0 .. n/2 - 1 of W, up the others
};

struct Product {
  const void* x;  // (x_rows, k) bf16 or fp16
  DeviceType x_type;
  int64_t x_rows, rows;      // of x and of y
  const int32_t* row_index;  // (rows,): row of x that row i reads, out of range: zeros; null: i

  const void* qweight;  // (experts, n / 64, k / 16, 512 bytes), 16-byte aligned
  const void* scales;   // (experts, n / 64, groups, 64) in position order
  DeviceType scale_type;
  const uint8_t* zeros;  // like scales; null: 8
  int64_t experts, n, k, group_size, first_k;
  const int32_t* offsets;  // (experts + 1,) on the device; null: dense. Values out of order or range are clamped

  const void* bias;  // (n,) of x's type, or null; kStore alone
  Epilogue epilogue;
  void* y;

  float* workspace;   // workspace_elements(product) floats
  int32_t* counters;  // counter_elements(product) zeros, left zero
  Plan plan;
  void* stream;

  int64_t n_tiles() const { return ceil_div64(n, kTileN); }
  int64_t k_tiles() const { return ceil_div64(k, kTileK); }
  int64_t groups() const { return group_size < 0 ? 1 : ceil_div64(first_k + k, group_size) - first_k / group_size; }
};

// Streams the weight once: for up to 64 rows (of an expert, if grouped; more are served 64 at a time). sm_80 and newer.
void gemm_decode(const Product& product);
int64_t decode_workspace(const Product& product);  // floats
int64_t decode_counters(const Product& product);   // ints
int multiprocessors();                             // of the current device, for plan_of

// For many rows: the same bits as gemm_decode, for every number of rows. sm_80 and newer. No workspace.
void gemm_many(const Product& product);

// For many rows at the rate of wgmma: sm_90a alone; other bits than the two above. No workspace.
void gemm_many_sm90(const Product& product);

}  // namespace m3::int4
