// What the Python borders of the CPU families share: tensors as addresses and sizes, checked where memory rests on
// them.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
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

// What a family adds to the module.
namespace decoder {
void bind(pybind11::module_& module);
}
namespace int4 {
void bind(pybind11::module_& module);
}
namespace policy_loss {
void bind(pybind11::module_& module);
}
namespace spec_decode {
void bind(pybind11::module_& module);
}

}  // namespace m3
