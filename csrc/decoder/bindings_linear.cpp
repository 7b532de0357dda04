// Python border of linear: integers that are addresses, sizes that memory safety rests on.
#include "common/border.h"
#include "decoder/linear_cpu_driver.h"

namespace py = pybind11;
using namespace m3;
using namespace m3::decoder;

namespace {

using WeightTuple = std::tuple<SpanTuple, int, int64_t, int64_t>;    // elements, type, n, k
using BiasTuple = std::tuple<SpanTuple, int>;                        // elements, type
using RowsTuple = std::tuple<uintptr_t, int64_t, int64_t, int64_t>;  // address, rows, columns, row to row

constexpr const char* kOp = "linear";
constexpr int64_t kMost = int64_t{1} << 40;  // so that no product of sizes leaves int64

Type type_of(const char* argument, int type) {
  check(type >= 0 && type <= 2, kOp, argument, "type 0, 1 or 2", type);
  return Type(type);
}

float* rows_of(const char* argument, const RowsTuple& tuple, int64_t rows, int64_t columns, bool apart) {
  const auto& [address, got, width, stride] = tuple;
  check(got == rows, kOp, argument, std::to_string(rows) + " rows", got);
  check(width == columns, kOp, argument, std::to_string(columns) + " columns", width);
  const bool good = rows <= 1 || (stride >= (apart ? columns : 0) && stride <= kMost / rows);
  check(good, kOp, argument, "rows that lie one after another, under 2**40 elements", stride);
  check(address || !rows || !columns, kOp, argument, "memory", "none");
  return at<float>(address);
}

void linear_of(const RowsTuple& x, const WeightTuple& weight, const BiasTuple& bias, const RowsTuple& y, int threads) {
  const auto& [span, type, n, k] = weight;
  const int64_t rows = std::get<1>(x);
  check(n >= 0 && k >= 0 && n < kMost && k < kMost && (!k || n <= kMost / k), kOp, "weight", "under 2**40 elements", n);
  check(rows >= 0 && rows < kMost, kOp, "x", "under 2**40 rows", rows);
  check_span(kOp, "weight", span, n * k, false);
  check_span(kOp, "bias", std::get<0>(bias), n, true);
  check(threads >= 1 && threads <= 4096, kOp, "threads", "1..4096", threads);
  const Dense w{.weight = at<void>(span),
                .type = type_of("weight", type),
                .n = n,
                .k = k,
                .bias = at<void>(std::get<0>(bias)),
                .bias_type = type_of("bias", std::get<1>(bias))};
  const float* from = rows_of("x", x, rows, k, false);
  float* to = rows_of("y", y, rows, n, true);
  py::gil_scoped_release release;
  linear(w, from, std::get<3>(x), to, std::get<3>(y), rows, threads);
}

}  // namespace

namespace m3::decoder {

void bind_linear(py::module_& m) { m.def("decoder_linear", &linear_of); }

}  // namespace m3::decoder
