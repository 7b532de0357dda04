// Python border of the policy_loss family's CPU kernels: integers that are addresses, sizes that Python has validated.
#include "policy_loss/border.h"
#include "policy_loss/tiles_cpu_driver.h"

namespace py = pybind11;
using namespace m3;
using namespace m3::policy_loss;

namespace {

Tile matrix_of(const char* op, const char* argument, const MatrixTuple& tuple) {
  return tile_of(op, argument, tuple, sizeof(float));
}

void check_threads(const char* op, int threads) {
  check(threads >= 1 && threads <= 4096, op, "threads", "1..4096", threads);
}

const int64_t* rows_of(const char* op, const std::optional<SpanTuple>& rows, int64_t of, int64_t n) {
  if (!rows) {
    check(n == of, op, "out", std::to_string(of) + " rows", n);
    return nullptr;
  }
  check_span(op, "rows", *rows, n, false);
  const int64_t* values = at<int64_t>(*rows);
  for (int64_t i = 0; i < n; i++)
    check(values[i] >= 0 && values[i] < of, op, "rows", "values in 0.." + std::to_string(of - 1), values[i]);
  return values;
}

Transform transform_of(const char* op, const TransformTuple& tuple, int64_t rows) {
  const auto& [logit_scale, softcap, inverse_temperature] = tuple;
  check_span(op, "inverse_temperature", inverse_temperature, rows, true);
  return {nullptr, (float)logit_scale, (float)softcap, at<float>(inverse_temperature)};
}

void statistics_of(const MatrixTuple& logits, const IdsTuple& ids, SpanTuple bias, const TransformTuple& transform,
                   SpanTuple maximum, SpanTuple total, SpanTuple picked, SpanTuple weighted, SpanTuple squared,
                   int threads) {
  const char* op = "statistics";
  const Tile z = matrix_of(op, "logits", logits);
  check_ids(op, ids, z.rows);
  check_span(op, "bias", bias, z.columns, true);
  check_span(op, "maximum", maximum, z.rows, false);
  check_span(op, "total", total, z.rows, false);
  check_span(op, "picked", picked, z.rows * std::get<1>(ids), false);
  check_span(op, "weighted", weighted, z.rows, true);
  check_span(op, "squared", squared, z.rows, true);
  check_threads(op, threads);
  Statistics a{.logits = at<float>(z.address),
               .num_rows = z.rows,
               .row_stride = z.stride,
               .columns = z.columns,
               .first = std::get<2>(ids),
               .transform = transform_of(op, transform, z.rows),
               .ids = at<int64_t>(std::get<0>(ids)),
               .num_ids = std::get<1>(ids),
               .maximum = at<float>(maximum),
               .total = at<float>(total),
               .picked = at<float>(picked),
               .weighted = at<float>(weighted),
               .squared = at<float>(squared)};
  a.transform.bias = at<float>(bias);
  py::gil_scoped_release release;
  statistics(a, threads);
}

void gradient_of(const MatrixTuple& logits, const std::optional<SpanTuple>& rows, const IdsTuple& ids, SpanTuple lse,
                 SpanTuple lse_low, SpanTuple base, SpanTuple slope, SpanTuple square, SpanTuple picked,
                 SpanTuple complement, const TransformTuple& transform, const MatrixTuple& out, int threads) {
  const char* op = "gradient";
  const Tile z = matrix_of(op, "logits", logits), g = matrix_of(op, "out", out);
  const int64_t n = g.rows;
  check_shape(op, "out", g, n, z.columns);
  const int64_t* which = rows_of(op, rows, z.rows, n);
  check_apart(op, "logits", z, g, !which);
  check_ids(op, ids, n);
  check_span(op, "lse", lse, n, false);
  check_span(op, "lse_low", lse_low, n, false);
  check_span(op, "base", base, n, false);
  check_span(op, "slope", slope, n, true);
  check_span(op, "square", square, n, true);
  check_span(op, "picked", picked, n * std::get<1>(ids), false);
  check_span(op, "complement", complement, n * std::get<1>(ids), false);
  check_threads(op, threads);
  const Gradient a{.logits = at<float>(z.address),
                   .num_rows = n,
                   .row_stride = z.stride,
                   .columns = z.columns,
                   .first = std::get<2>(ids),
                   .rows = which,
                   .transform = transform_of(op, transform, n),
                   .ids = at<int64_t>(std::get<0>(ids)),
                   .num_ids = std::get<1>(ids),
                   .lse = at<float>(lse),
                   .lse_low = at<float>(lse_low),
                   .base = at<float>(base),
                   .slope = at<float>(slope),
                   .square = at<float>(square),
                   .picked = at<float>(picked),
                   .complement = at<float>(complement),
                   .out = at<float>(g.address),
                   .out_stride = g.stride};
  py::gil_scoped_release release;
  gradient(a, threads);
}

// The part that both functions share: two matrices of logits, their normalisers, the kind.
Divergence divergence_base(const char* op, const Tile& student, const Tile& teacher, int64_t rows,
                           const SpanTuple& student_lse, const SpanTuple& student_low, const SpanTuple& teacher_lse,
                           const SpanTuple& teacher_low, int kind, double beta) {
  check_shape(op, "teacher", teacher, student.rows, student.columns);
  check(kind >= 0 && kind <= int(Kind::kJs), op, "kind", "0 (forward), 1 (reverse) or 2 (js)", kind);
  check(kind != int(Kind::kJs) || (beta > 0.0 && beta < 1.0), op, "beta", "0 < beta < 1", beta);
  check_span(op, "student_lse", student_lse, rows, false);
  check_span(op, "student_low", student_low, rows, false);
  check_span(op, "teacher_lse", teacher_lse, rows, false);
  check_span(op, "teacher_low", teacher_low, rows, false);
  Divergence a{};
  a.student = at<float>(student.address), a.student_stride = student.stride;
  a.teacher = at<float>(teacher.address), a.teacher_stride = teacher.stride;
  a.num_rows = rows, a.columns = student.columns;
  a.student_lse = at<float>(student_lse), a.student_low = at<float>(student_low);
  a.teacher_lse = at<float>(teacher_lse), a.teacher_low = at<float>(teacher_low);
  a.kind = Kind(kind), a.beta = (float)beta, a.rest = (float)(1.0 - beta);
  return a;
}

void divergence_of(const MatrixTuple& student, const MatrixTuple& teacher, SpanTuple student_lse, SpanTuple student_low,
                   SpanTuple teacher_lse, SpanTuple teacher_low, int kind, double beta, SpanTuple value,
                   SpanTuple center, int threads) {
  const char* op = "divergence";
  const Tile s = matrix_of(op, "student", student), t = matrix_of(op, "teacher", teacher);
  Divergence a = divergence_base(op, s, t, s.rows, student_lse, student_low, teacher_lse, teacher_low, kind, beta);
  check_span(op, "value", value, s.rows, false);
  check_span(op, "center", center, s.rows, false);
  check_threads(op, threads);
  a.value = at<float>(value), a.center = at<float>(center);
  py::gil_scoped_release release;
  divergence(a, threads);
}

void divergence_gradient_of(const MatrixTuple& student, const MatrixTuple& teacher,
                            const std::optional<SpanTuple>& rows, SpanTuple student_lse, SpanTuple student_low,
                            SpanTuple teacher_lse, SpanTuple teacher_low, int kind, double beta, SpanTuple center,
                            SpanTuple weight, const TransformTuple& transform, const MatrixTuple& out, int threads) {
  const char* op = "divergence_gradient";
  const Tile s = matrix_of(op, "student", student), t = matrix_of(op, "teacher", teacher),
             g = matrix_of(op, "out", out);
  const int64_t n = g.rows;
  Divergence a = divergence_base(op, s, t, n, student_lse, student_low, teacher_lse, teacher_low, kind, beta);
  check_shape(op, "out", g, n, s.columns);
  a.rows = rows_of(op, rows, s.rows, n);
  check_apart(op, "student", s, g, !a.rows);
  check_apart(op, "teacher", t, g, !a.rows);
  check_span(op, "center", center, n, false);
  check_span(op, "weight", weight, n, false);
  check_threads(op, threads);
  a.center = at<float>(center), a.weight = at<float>(weight);
  a.transform = transform_of(op, transform, n);
  a.out = at<float>(g.address), a.out_stride = g.stride;
  py::gil_scoped_release release;
  divergence_gradient(a, threads);
}

}  // namespace

void m3::policy_loss::bind(py::module_& m) {
  m.def("policy_loss_statistics", &statistics_of);
  m.def("policy_loss_gradient", &gradient_of);
  m.def("policy_loss_divergence", &divergence_of);
  m.def("policy_loss_divergence_gradient", &divergence_gradient_of);
}
