// What the Python borders of all families share: tensors as addresses and sizes, checked where memory rests on them.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <initializer_list>
#include <string>
#include <tuple>

#include "common/check.h"

namespace m3 {

using SpanTuple = std::tuple<uintptr_t, int64_t>;  // address and elements of a contiguous tensor; (0, 0) for None

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

template <class T>
T* at(const SpanTuple& span) {
  return at<T>(std::get<0>(span));
}

// The registered ops can be called without the public checks, so every size that memory safety rests on is checked at
// the border.
inline void check_span(const char* op, const char* argument, const SpanTuple& span, int64_t count, bool optional) {
  const auto& [address, got] = span;
  if (optional && !address && !got) return;
  check(got == count && (address || !count), op, argument, std::to_string(count) + " elements", got);
}

// Elements of a tensor of these sizes, none of them negative; refused before the product could overflow.
inline int64_t elements(const char* op, const char* argument, std::initializer_list<int64_t> sizes) {
  constexpr int64_t most = int64_t{1} << 46;
  int64_t count = 1;
  for (int64_t size : sizes) {
    check(!size || count <= most / size, op, argument, "at most 2**46 elements", "more");
    count *= size;
  }
  return count;
}

// What a family adds to the CPU module and to the CUDA module.
namespace decoder {
void bind(pybind11::module_& module);
}
namespace int4 {
void bind(pybind11::module_& module);
void bind_gemm_cuda(pybind11::module_& module);
void bind_pack_cuda(pybind11::module_& module);
}  // namespace int4
namespace policy_loss {
void bind(pybind11::module_& module);
void bind_cuda(pybind11::module_& module);
}  // namespace policy_loss
namespace spec_decode {
void bind(pybind11::module_& module);
void bind_attention_cuda(pybind11::module_& module);
void bind_tree_cuda(pybind11::module_& module);
}  // namespace spec_decode

}  // namespace m3
