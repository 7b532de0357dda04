// Python border of the int4 family's products on a GPU: addresses and sizes, checked where memory rests on them.
#include "common/border.h"
#include "int4/gemm_cuda.h"

namespace py = pybind11;

namespace m3::int4 {
namespace {

constexpr const char* kOp = "int4_product";
constexpr int64_t kMost = INT32_MAX;

// (qweight, scales, zeros as (address, elements), scale type, experts, N, K, group_size, first_k)
using DeviceWeightTuple = std::tuple<SpanTuple, SpanTuple, SpanTuple, int, int64_t, int64_t, int64_t, int64_t, int64_t>;
using PlanTuple = std::tuple<int64_t, int64_t, int64_t>;  // (part_tiles, split_parts, splits)

void check_aligned(const char* argument, const SpanTuple& span, uintptr_t bytes) {
  check(std::get<0>(span) % bytes == 0, kOp, argument,
        "an address that " + std::to_string(bytes) + " divides (a clone has one)", std::get<0>(span));
}

void check_at_least(const char* argument, const SpanTuple& span, int64_t count) {
  const auto& [address, got] = span;
  check(got >= count && (address || !count), kOp, argument, "at least " + std::to_string(count) + " elements", got);
}

void set_sizes(Product& p, int64_t rows, int64_t experts, int64_t n, int64_t k) {
  check(rows >= 0 && rows < kMost, kOp, "rows", "0 .. 2**31 - 2", rows);
  check(experts >= 1 && experts < kMost, kOp, "experts", "1 .. 2**31 - 2", experts);
  check(n >= 1 && n < kMost, kOp, "n", "1 .. 2**31 - 2", n);
  check(k >= 1 && k < kMost, kOp, "k", "1 .. 2**31 - 2", k);
  p.rows = rows, p.experts = experts, p.n = n, p.k = k;
}

void set_epilogue(Product& p, int epilogue) {
  check(epilogue >= 0 && epilogue <= 2, kOp, "epilogue", "0 (store), 1 (float) or 2 (gated)", epilogue);
  check(epilogue != int(Epilogue::kGated) || p.n % (2 * kTileN) == 0, kOp, "n",
        "a multiple of 128 for the gated epilogue", p.n);
  p.epilogue = Epilogue(epilogue);
}

// The last split and its first part have tiles, no tile is left over: the kernels count on no more than that.
void set_plan(Product& p, const PlanTuple& tuple, bool grouped, bool decode) {
  const auto& [part_tiles, split_parts, splits] = tuple;
  check(part_tiles >= 1 && part_tiles < kMost, kOp, "plan", "a positive number of tiles a part", part_tiles);
  check(split_parts >= 1 && split_parts < kMost, kOp, "plan", "a positive number of parts a split", split_parts);
  check(!decode || split_parts == kSplitParts, kOp, "plan", std::to_string(kSplitParts) + " parts a split",
        split_parts);
  const int64_t want = ceil_div64(p.k_tiles(), part_tiles * split_parts);
  check(splits == want && splits <= kMostSplits, kOp, "plan", std::to_string(want) + " splits, 16 at most", splits);
  check(!grouped || splits == 1, kOp, "plan", "one split for a grouped product", splits);
  p.plan = {int32_t(part_tiles), int32_t(split_parts), int32_t(splits)};
}

void int4_product(const std::string& which, const SpanTuple& x, int x_type, int64_t x_rows, int64_t rows,
                  const SpanTuple& row_index, const DeviceWeightTuple& weight, const SpanTuple& offsets,
                  const SpanTuple& bias, int epilogue, const SpanTuple& y, const SpanTuple& workspace,
                  const SpanTuple& counters, const PlanTuple& plan, uintptr_t stream) {
  const auto& [qweight, scales, zeros, scale_type, experts, n, k, group_size, first_k] = weight;
  const bool decode = which == "decode";
  check(decode || which == "many" || which == "wgmma", kOp, "which", "decode, many or wgmma", which);
  Product p{};
  set_sizes(p, rows, experts, n, k);
  check(x_type == 1 || x_type == 2, kOp, "x", "type 1 (bf16) or 2 (fp16)", x_type);
  check(x_rows >= 0 && x_rows < kMost, kOp, "x", "0 .. 2**31 - 2 rows", x_rows);
  check_span(kOp, "x", x, elements(kOp, "x", {x_rows, k}), false);
  check_aligned("x", x, 2);
  p.x = at<void>(x), p.x_type = DeviceType(x_type), p.x_rows = x_rows;
  check_span(kOp, "row_index", row_index, rows, true);
  check_aligned("row_index", row_index, 4);
  p.row_index = at<int32_t>(row_index);
  check(p.row_index || x_rows == rows, kOp, "x", std::to_string(rows) + " rows where there is no row_index", x_rows);

  check(scale_type >= 0 && scale_type <= 2, kOp, "scales", "type 0 (fp32), 1 (bf16) or 2 (fp16)", scale_type);
  check(group_size == -1 || (group_size > 0 && group_size < kMost && group_size % kTileK == 0), kOp, "group_size",
        "-1 or a positive multiple of 16", group_size);
  check(first_k >= 0 && first_k < kMost && first_k % kTileK == 0, kOp, "first_k", "a multiple of 16, >= 0", first_k);
  p.scale_type = DeviceType(scale_type), p.group_size = group_size, p.first_k = first_k;
  const int64_t of_groups = elements(kOp, "scales", {experts, p.n_tiles(), p.groups(), kTileN});
  check_span(kOp, "qweight", qweight, elements(kOp, "qweight", {experts, p.n_tiles(), p.k_tiles(), kTileWords}), false);
  check_span(kOp, "scales", scales, of_groups, false);
  check_span(kOp, "zeros", zeros, of_groups, true);
  check_aligned("qweight", qweight, 16);
  check_aligned("scales", scales, 16);
  check_aligned("zeros", zeros, 4);
  p.qweight = at<void>(qweight), p.scales = at<void>(scales), p.zeros = at<uint8_t>(zeros);

  check_span(kOp, "offsets", offsets, experts + 1, true);
  check_aligned("offsets", offsets, 4);
  p.offsets = at<int32_t>(offsets);
  check(p.offsets || experts == 1, kOp, "experts", "1 where there are no offsets", experts);
  set_epilogue(p, epilogue);
  check_span(kOp, "bias", bias, n, true);
  check_aligned("bias", bias, 2);
  p.bias = at<void>(bias);
  check(!p.bias || p.epilogue == Epilogue::kStore, kOp, "bias", "none but for the epilogue store", epilogue);
  check_span(kOp, "y", y, elements(kOp, "y", {rows, p.epilogue == Epilogue::kGated ? n / 2 : n}), false);
  check_aligned("y", y, p.epilogue == Epilogue::kFloat ? 4 : 2);
  p.y = at<void>(y);

  set_plan(p, plan, p.offsets != nullptr, decode);
  if (decode) {
    check_at_least("workspace", workspace, decode_workspace(p));
    check_at_least("counters", counters, decode_counters(p));
    check_aligned("workspace", workspace, 16);
    check_aligned("counters", counters, 4);
    p.workspace = at<float>(workspace), p.counters = at<int32_t>(counters);
  }
  p.stream = at<void>(stream);
  if (!rows) return;
  if (decode)
    gemm_decode(p);
  else if (which == "many")
    gemm_many(p);
  else
    gemm_many_sm90(p);
}

PlanTuple int4_plan(int64_t n, int64_t k, bool grouped) {
  Product p{};
  set_sizes(p, 0, 1, n, k);
  const Plan plan = plan_of(n, k, grouped, multiprocessors());
  return {plan.part_tiles, plan.split_parts, plan.splits};
}

std::pair<int64_t, int64_t> int4_decode_sizes(int64_t rows, int64_t experts, int64_t n, int64_t k, bool grouped,
                                              const PlanTuple& plan, int epilogue) {
  static constexpr int32_t kGrouped = 0;  // only whether there are offsets matters
  Product p{};
  set_sizes(p, rows, experts, n, k);
  p.offsets = grouped ? &kGrouped : nullptr;
  set_epilogue(p, epilogue);
  set_plan(p, plan, grouped, true);
  return {decode_workspace(p), decode_counters(p)};
}

}  // namespace

void bind_gemm_cuda(py::module_& m) {
  m.def("int4_product", &int4_product,
        "y = x W^T of one weight or of each row's expert, by the kernel `which`: decode, many or wgmma. Tensors as "
        "(address, elements); row_index, zeros, offsets, bias may be (0, 0).",
        py::arg("which"), py::arg("x"), py::arg("x_type"), py::arg("x_rows"), py::arg("rows"), py::arg("row_index"),
        py::arg("weight"), py::arg("offsets"), py::arg("bias"), py::arg("epilogue"), py::arg("y"), py::arg("workspace"),
        py::arg("counters"), py::arg("plan"), py::arg("stream"));
  m.def("int4_plan", &int4_plan, "(part_tiles, split_parts, splits) of a weight on the current device.", py::arg("n"),
        py::arg("k"), py::arg("grouped"));
  m.def("int4_decode_sizes", &int4_decode_sizes,
        "(floats of workspace, counters) that decode needs on the current device.", py::arg("rows"), py::arg("experts"),
        py::arg("n"), py::arg("k"), py::arg("grouped"), py::arg("plan"), py::arg("epilogue"));
}

}  // namespace m3::int4
