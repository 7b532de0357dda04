// Python border of the int4 family's CPU kernels: integers that are addresses, sizes that Python has validated.
#include "common/border_cpu.h"
#include "int4/gemm_cpu_driver.h"

namespace py = pybind11;
using namespace m3;
using namespace m3::int4;

namespace {

Type type_of(const char* op, const char* argument, int type) {
  check(type >= 0 && type <= 2, op, argument, "0 (fp32), 1 (bf16) or 2 (fp16)", type);
  return Type(type);
}

// (qweight, scales, zeros, perm as (address, elements), scale type, experts, N, K, group_size, first_k)
using WeightTuple =
    std::tuple<SpanTuple, SpanTuple, SpanTuple, SpanTuple, int, int64_t, int64_t, int64_t, int64_t, int64_t>;

Weights weights_of(const char* op, const WeightTuple& tuple) {
  const auto& [tiles, scales, zeros, perm, type, experts, n, k, group_size, first_k] = tuple;
  constexpr int64_t most = INT32_MAX;
  check(experts >= 1 && n >= 1 && k >= 1 && experts < most && n < most && k < most, op, "weight",
        "sizes in 1 .. 2**31 - 2", n);
  check(group_size == -1 || (group_size > 0 && group_size % kTileK == 0), op, "group_size",
        "-1 or a positive multiple of 16", group_size);
  check(first_k >= 0 && first_k < most && first_k % kTileK == 0, op, "first_k", "a multiple of 16, >= 0", first_k);
  const Weights w{at<uint8_t>(std::get<0>(tiles)),
                  at<void>(std::get<0>(scales)),
                  at<uint8_t>(std::get<0>(zeros)),
                  at<int32_t>(std::get<0>(perm)),
                  type_of(op, "scales", type),
                  experts,
                  n,
                  k,
                  group_size,
                  first_k};
  const int64_t tile_rows = experts * w.n_tiles();
  check_span(op, "qweight", tiles, tile_rows * w.k_tiles() * kTileWords, false);
  check_span(op, "scales", scales, tile_rows * w.groups() * kTileN, false);
  check_span(op, "zeros", zeros, tile_rows * w.groups() * kTileN, true);
  check_span(op, "perm", perm, experts * k, true);
  return w;
}

Mode mode_of(const char* op, int mode) {
  check(mode >= 0 && mode <= int(Mode::kInt8), op, "activations", "0 (exact), 1 (int16) or 2 (int8)", mode);
  return Mode(mode);
}

void int4_gemm(SpanTuple x, int type, int64_t rows, const WeightTuple& weight, SpanTuple bias, uintptr_t y, int mode,
               int threads) {
  const char* op = "int4_gemm";
  const Weights w = weights_of(op, weight);
  check(w.experts == 1, op, "weight", "one weight, no experts", w.experts);
  check_span(op, "x", x, rows * w.k, false);
  check_span(op, "bias", bias, w.n, true);
  const Type t = type_of(op, "x", type);
  const Mode m = mode_of(op, mode);
  const int64_t offsets[2] = {0, rows};
  py::gil_scoped_release release;
  gemm(op, w, {at<void>(std::get<0>(x)), t, w.k, at<void>(y), t, w.n, offsets, nullptr, at<void>(std::get<0>(bias))}, m,
       threads);
}

void int4_grouped_gemm(SpanTuple x, int type, int64_t rows, SpanTuple offsets, const WeightTuple& weight, uintptr_t y,
                       int mode, int threads) {
  const char* op = "int4_grouped_gemm";
  const Weights w = weights_of(op, weight);
  check_span(op, "x", x, rows * w.k, false);
  check_span(op, "offsets", offsets, w.experts + 1, false);
  const int64_t* bounds = at<int64_t>(std::get<0>(offsets));
  check(bounds[0] == 0 && bounds[w.experts] == rows, op, "offsets", "0 .. " + std::to_string(rows), bounds[w.experts]);
  const Type t = type_of(op, "x", type);
  const Mode m = mode_of(op, mode);
  py::gil_scoped_release release;
  gemm(op, w, {at<void>(std::get<0>(x)), t, w.k, at<void>(y), t, w.n, bounds, nullptr, nullptr}, m, threads);
}

void int4_moe(SpanTuple x, int type, int64_t tokens, int64_t top_k, SpanTuple ids, SpanTuple topk_weights,
              const WeightTuple& w13, const WeightTuple& w2, uintptr_t y, int mode, int threads) {
  const char* op = "int4_moe";
  const Weights first = weights_of(op, w13), second = weights_of(op, w2);
  check_span(op, "x", x, tokens * first.k, false);
  check_span(op, "topk_ids", ids, tokens * top_k, false);
  check_span(op, "topk_weights", topk_weights, tokens * top_k, false);
  const Type t = type_of(op, "x", type);
  const Mode m = mode_of(op, mode);
  py::gil_scoped_release release;
  moe(first, second, at<void>(std::get<0>(x)), t, tokens, top_k, at<int64_t>(std::get<0>(ids)),
      at<float>(std::get<0>(topk_weights)), at<void>(y), m, threads);
}

}  // namespace

void m3::int4::bind(py::module_& m) {
  m.def("int4_gemm", &int4_gemm);
  m.def("int4_grouped_gemm", &int4_grouped_gemm);
  m.def("int4_moe", &int4_moe);
}
