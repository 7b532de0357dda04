// How packed weights cross the Python border of the CPU families: addresses and sizes, checked where memory rests on
// them.
#pragma once
#include "common/border.h"
#include "int4/gemm_cpu_driver.h"

namespace m3::int4 {

// (qweight, scales, zeros, perm as (address, elements), scale type, experts, N, K, group_size, first_k)
using WeightTuple =
    std::tuple<SpanTuple, SpanTuple, SpanTuple, SpanTuple, int, int64_t, int64_t, int64_t, int64_t, int64_t>;

inline Type type_of(const char* op, const char* argument, int type) {
  check(type >= 0 && type <= 2, op, argument, "0 (fp32), 1 (bf16) or 2 (fp16)", type);
  return Type(type);
}

inline Weights weights_of(const char* op, const WeightTuple& tuple) {
  const auto& [tiles, scales, zeros, perm, type, experts, n, k, group_size, first_k] = tuple;
  constexpr int64_t most = INT32_MAX;
  check(experts >= 1 && n >= 1 && k >= 1 && experts < most && n < most && k < most, op, "weight",
        "sizes in 1 .. 2**31 - 2", n);
  check(group_size == -1 || (group_size > 0 && group_size % kTileK == 0), op, "group_size",
        "-1 or a positive multiple of 16", group_size);
  check(first_k >= 0 && first_k < most && first_k % kTileK == 0, op, "first_k", "a multiple of 16, >= 0", first_k);
  const Weights w{at<uint8_t>(tiles),
                  at<void>(scales),
                  at<uint8_t>(zeros),
                  at<int32_t>(perm),
                  type_of(op, "scales", type),
                  experts,
                  n,
                  k,
                  group_size,
                  first_k};
  const int64_t groups = elements(op, "scales", {experts, w.n_tiles(), w.groups(), kTileN});
  check_span(op, "qweight", tiles, elements(op, "qweight", {experts, w.n_tiles(), w.k_tiles(), kTileWords}), false);
  check_span(op, "scales", scales, groups, false);
  check_span(op, "zeros", zeros, groups, true);
  check_span(op, "perm", perm, elements(op, "perm", {experts, k}), true);
  return w;
}

inline Mode mode_of(const char* op, int mode) {
  check(mode >= 0 && mode <= int(Mode::kInt8), op, "activations", "0 (exact), 1 (int16) or 2 (int8)", mode);
  return Mode(mode);
}

}  // namespace m3::int4
