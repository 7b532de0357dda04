// Python border of the policy_loss family's CUDA kernels: integers that are addresses, sizes that Python has validated.
#include "policy_loss/border.h"
#include "policy_loss/tiles_cuda.h"

namespace py = pybind11;
using namespace m3;
using namespace m3::policy_loss;

namespace {

using TypedTuple = std::tuple<MatrixTuple, int>;          // a matrix and the number of its type
using WorkspaceTuple = std::tuple<SpanTuple, SpanTuple>;  // part, counters

struct Typed : Tile {
  Type type;

  Matrix matrix() const { return {at<void>(address), stride, type}; }
};

Typed typed(const char* op, const char* argument, const TypedTuple& tuple) {
  const auto& [matrix, type] = tuple;
  check(type >= 0 && type <= int(Type::kF16), op, argument, "type 0 (float32), 1 (bfloat16) or 2 (float16)", type);
  const Tile tile = tile_of(op, argument, matrix, type == int(Type::kF32) ? 4 : 2);
  const int64_t units = (tile.columns + kUnit - 1) / kUnit;  // so that blocks can be counted in 31 bits
  check(tile.columns < int64_t{1} << 30 && tile.rows * std::max<int64_t>(units, 1) < int64_t{1} << 31, op, argument,
        "under 2**30 columns and 2**31 units of 1024", shape(tile.rows, tile.columns));
  check(tile.address % tile.bytes == 0, op, argument, "an aligned address", tile.address);
  return {tile, Type(type)};
}

// Logits of 32 bits give gradients of any type, others of their own.
void check_types(const char* op, const Typed& logits, const Typed& out) {
  check(logits.type == Type::kF32 || logits.type == out.type, op, "out",
        "the type of the logits, unless they are float32", int(out.type));
}

// Rows of logits to read: their numbers lie on the device, where a kernel checks them.
const int64_t* rows_of(const char* op, const std::optional<SpanTuple>& rows, int64_t of, int64_t n) {
  if (rows)
    check_span(op, "rows", *rows, n, false);
  else
    check(n == of, op, "out", std::to_string(of) + " rows", n);
  return rows ? at<int64_t>(*rows) : nullptr;
}

Transform transform_of(const char* op, const TransformTuple& tuple, int64_t rows) {
  const auto& [logit_scale, softcap, inverse_temperature] = tuple;
  check_span(op, "inverse_temperature", inverse_temperature, rows, true);
  return {nullptr, (float)logit_scale, (float)softcap, at<float>(inverse_temperature)};
}

Workspace workspace_of(const char* op, const WorkspaceTuple& tuple, const Tile& logits, int64_t sums) {
  const auto& [part, counters] = tuple;
  check_span(op, "part", part, logits.rows * ((logits.columns + kUnit - 1) / kUnit) * sums, false);
  check(std::get<0>(part) % 16 == 0, op, "part", "an address aligned to 16 bytes", std::get<0>(part));
  return {at<float>(part), at<int>(counters), std::get<0>(counters) ? std::get<1>(counters) : 0};
}

void statistics_of(const TypedTuple& logits, const IdsTuple& ids, SpanTuple bias, const TransformTuple& transform,
                   SpanTuple maximum, SpanTuple total, SpanTuple picked, SpanTuple weighted, SpanTuple squared,
                   const WorkspaceTuple& workspace, uintptr_t stream) {
  const char* op = "statistics";
  const Typed z = typed(op, "logits", logits);
  check_ids(op, ids, z.rows);
  check_span(op, "bias", bias, z.columns, true);
  check_span(op, "maximum", maximum, z.rows, false);
  check_span(op, "total", total, z.rows, false);
  check_span(op, "picked", picked, z.rows * std::get<1>(ids), false);
  check_span(op, "weighted", weighted, z.rows, true);
  check_span(op, "squared", squared, z.rows, true);
  Statistics a{.logits = z.matrix(),
               .num_rows = z.rows,
               .columns = (int)z.columns,
               .first = std::get<2>(ids),
               .transform = transform_of(op, transform, z.rows),
               .ids = at<int64_t>(std::get<0>(ids)),
               .num_ids = (int)std::get<1>(ids),
               .maximum = at<float>(maximum),
               .total = at<float>(total),
               .picked = at<float>(picked),
               .weighted = at<float>(weighted),
               .squared = at<float>(squared),
               .workspace = workspace_of(op, workspace, z, 4)};
  a.transform.bias = at<float>(bias);
  py::gil_scoped_release release;
  statistics(a, at<void>(stream));
}

void gradient_of(const TypedTuple& logits, const std::optional<SpanTuple>& rows, const IdsTuple& ids, SpanTuple lse,
                 SpanTuple lse_low, SpanTuple base, SpanTuple slope, SpanTuple square, SpanTuple picked,
                 SpanTuple complement, const TransformTuple& transform, const TypedTuple& out, uintptr_t stream) {
  const char* op = "gradient";
  const Typed z = typed(op, "logits", logits), g = typed(op, "out", out);
  const int64_t n = g.rows;
  check_shape(op, "out", g, n, z.columns);
  check_types(op, z, g);
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
  const Gradient a{.logits = z.matrix(),
                   .num_rows = z.rows,
                   .columns = (int)z.columns,
                   .first = std::get<2>(ids),
                   .rows = which,
                   .transform = transform_of(op, transform, n),
                   .ids = at<int64_t>(std::get<0>(ids)),
                   .num_ids = (int)std::get<1>(ids),
                   .lse = at<float>(lse),
                   .lse_low = at<float>(lse_low),
                   .base = at<float>(base),
                   .slope = at<float>(slope),
                   .square = at<float>(square),
                   .picked = at<float>(picked),
                   .complement = at<float>(complement),
                   .out = g.matrix(),
                   .out_rows = n};
  py::gil_scoped_release release;
  gradient(a, at<void>(stream));
}

// The part that both functions share: two matrices of logits, their normalisers, the kind.
Divergence divergence_base(const char* op, const Typed& student, const Typed& teacher, int64_t rows,
                           const SpanTuple& student_lse, const SpanTuple& student_low, const SpanTuple& teacher_lse,
                           const SpanTuple& teacher_low, int kind, double beta) {
  check_shape(op, "teacher", teacher, student.rows, student.columns);
  check(student.type == teacher.type, op, "teacher", "the type of the student", int(teacher.type));
  check(kind >= 0 && kind <= int(Kind::kJs), op, "kind", "0 (forward), 1 (reverse) or 2 (js)", kind);
  check(kind != int(Kind::kJs) || (beta > 0.0 && beta < 1.0), op, "beta", "0 < beta < 1", beta);
  check_span(op, "student_lse", student_lse, rows, false);
  check_span(op, "student_low", student_low, rows, false);
  check_span(op, "teacher_lse", teacher_lse, rows, false);
  check_span(op, "teacher_low", teacher_low, rows, false);
  Divergence a{};
  a.student = student.matrix(), a.teacher = teacher.matrix();
  a.num_rows = student.rows, a.columns = (int)student.columns;
  a.student_lse = at<float>(student_lse), a.student_low = at<float>(student_low);
  a.teacher_lse = at<float>(teacher_lse), a.teacher_low = at<float>(teacher_low);
  a.kind = Kind(kind), a.beta = (float)beta, a.rest = (float)(1.0 - beta);
  return a;
}

void divergence_of(const TypedTuple& student, const TypedTuple& teacher, SpanTuple student_lse, SpanTuple student_low,
                   SpanTuple teacher_lse, SpanTuple teacher_low, int kind, double beta, SpanTuple value,
                   SpanTuple center, const WorkspaceTuple& workspace, uintptr_t stream) {
  const char* op = "divergence";
  const Typed s = typed(op, "student", student), t = typed(op, "teacher", teacher);
  Divergence a = divergence_base(op, s, t, s.rows, student_lse, student_low, teacher_lse, teacher_low, kind, beta);
  check_span(op, "value", value, s.rows, false);
  check_span(op, "center", center, s.rows, false);
  a.value = at<float>(value), a.center = at<float>(center);
  a.workspace = workspace_of(op, workspace, s, 2);
  py::gil_scoped_release release;
  divergence(a, at<void>(stream));
}

void divergence_gradient_of(const TypedTuple& student, const TypedTuple& teacher, const std::optional<SpanTuple>& rows,
                            SpanTuple student_lse, SpanTuple student_low, SpanTuple teacher_lse, SpanTuple teacher_low,
                            int kind, double beta, SpanTuple center, SpanTuple weight, const TransformTuple& transform,
                            const TypedTuple& out, uintptr_t stream) {
  const char* op = "divergence_gradient";
  const Typed s = typed(op, "student", student), t = typed(op, "teacher", teacher), g = typed(op, "out", out);
  const int64_t n = g.rows;
  Divergence a = divergence_base(op, s, t, n, student_lse, student_low, teacher_lse, teacher_low, kind, beta);
  check_shape(op, "out", g, n, s.columns);
  check_types(op, s, g);
  a.rows = rows_of(op, rows, s.rows, n);
  check_apart(op, "student", s, g, !a.rows);
  check_apart(op, "teacher", t, g, !a.rows);
  check_span(op, "center", center, n, false);
  check_span(op, "weight", weight, n, false);
  a.center = at<float>(center), a.weight = at<float>(weight);
  a.transform = transform_of(op, transform, n);
  a.out = g.matrix(), a.out_rows = n;
  py::gil_scoped_release release;
  divergence_gradient(a, at<void>(stream));
}

}  // namespace

void m3::policy_loss::bind_cuda(py::module_& m) {
  m.attr("policy_loss_unit") = kUnit;
  m.def("policy_loss_statistics", &statistics_of);
  m.def("policy_loss_gradient", &gradient_of);
  m.def("policy_loss_divergence", &divergence_of);
  m.def("policy_loss_divergence_gradient", &divergence_gradient_of);
}
