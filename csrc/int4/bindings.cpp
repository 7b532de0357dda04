// Python border of the int4 family's CPU kernels: integers that are addresses, sizes that Python has validated.
#include "int4/border_cpu.h"

namespace py = pybind11;
using namespace m3;
using namespace m3::int4;

namespace {

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
