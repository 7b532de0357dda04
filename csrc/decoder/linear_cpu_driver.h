// What the bindings and the decoder's pass call: products of dense weights with rows of fp32, on raw pointers.
#pragma once
#include <cstdint>

#include "decoder/linear_cpu.h"

namespace m3::decoder {

struct Dense {
  const void* weight;  // (n, k) row-major
  Type type;
  int64_t n, k;
  const void* bias;  // (n,) or null
  Type bias_type;
};

// y[i] = W x[i] (+ bias). fp32 in and out, strides in elements; y lies apart from all that is read. One parallel region
// on torch's OpenMP pool, none for little work. Row i of y depends on row i of x alone, to the last bit.
void linear(const Dense& w, const float* x, int64_t x_stride, float* y, int64_t y_stride, int64_t rows, int threads);

}  // namespace m3::decoder
