// Python border of the int4 family's CUDA kernels around the products: tiles, routing, elementwise work on rows.
#include "common/border.h"
#include "int4/repack_cuda.h"
#include "int4/route_cuda.h"

namespace py = pybind11;

namespace m3::int4 {
namespace {

constexpr int64_t kMost = INT32_MAX;

DeviceType type_of(const char* op, const char* argument, int type, int least = 0) {
  check(type >= least && type <= 2, op, argument, least ? "1 (bf16) or 2 (fp16)" : "0 (fp32), 1 (bf16) or 2 (fp16)",
        type);
  return DeviceType(type);
}

void check_aligned(const char* op, const char* argument, const SpanTuple& span) {
  check(std::get<0>(span) % 16 == 0, op, argument, "an address that 16 divides", std::get<0>(span));
}

// Sizes of a weight, and how many words its tiles have.
int64_t tile_words(const char* op, int64_t experts, int64_t n, int64_t k) {
  check(experts >= 1 && n >= 1 && k >= 1 && experts < kMost && n < kMost && k < kMost, op, "weight",
        "sizes in 1 .. 2**31 - 2", n);
  return elements(op, "qweight", {experts, ceil_div64(n, kTileN), ceil_div64(k, kTileK), kTileWords});
}

int64_t scale_count(const char* op, int64_t experts, int64_t n, int64_t k, int64_t group_size, int64_t first_k) {
  check(group_size == -1 || (group_size > 0 && group_size % kTileK == 0), op, "group_size",
        "-1 or a positive multiple of 16", group_size);
  check(first_k >= 0 && first_k < kMost && first_k % kTileK == 0, op, "first_k", "a multiple of 16, >= 0", first_k);
  const int64_t groups = group_size < 0 ? 1 : ceil_div64(first_k + k, group_size) - first_k / group_size;
  return elements(op, "scales", {experts, ceil_div64(n, kTileN), groups, kTileN});
}

void pack(const SpanTuple& source, int nibbles, int64_t experts, int64_t n, int64_t k, const SpanTuple& perm,
          const SpanTuple& tiles, uintptr_t stream) {
  constexpr const char* kOp = "int4_pack";
  const int64_t words = tile_words(kOp, experts, n, k);
  check(nibbles >= 0 && nibbles <= 3, kOp, "nibbles", "0 .. 3", nibbles);
  const Nibbles kind = Nibbles(nibbles);
  check(experts == 1 || kind == Nibbles::kBytes, kOp, "experts", "1 for words", experts);
  int64_t count = 0;
  switch (kind) {
    case Nibbles::kBytes:
      count = elements(kOp, "source", {experts, n, k});
      break;
    case Nibbles::kRows:
      count = elements(kOp, "source", {n, ceil_div64(k, 8)});
      break;
    case Nibbles::kColumns:
      count = elements(kOp, "source", {ceil_div64(k, 8), n});
      break;
    case Nibbles::kPairs:
      check(n % 8 == 0, kOp, "n", "a multiple of 8", n);
      count = elements(kOp, "source", {k, n / 8});
  }
  check_span(kOp, "source", source, count, false);
  check_span(kOp, "perm", perm, elements(kOp, "perm", {experts, k}), true);
  check_span(kOp, "tiles", tiles, words, false);
  check_aligned(kOp, "tiles", tiles);
  pack_tiles(at<void>(source), kind, experts, n, k, at<int32_t>(perm), at<void>(tiles), at<void>(stream));
}

void quantize(const SpanTuple& w, int w_type, int64_t experts, int64_t n, int64_t k, int64_t group_size,
              const SpanTuple& tiles, const SpanTuple& scales, int scale_type, const SpanTuple& zeros,
              const SpanTuple& problem, uintptr_t stream) {
  constexpr const char* kOp = "int4_quantize";
  const int64_t words = tile_words(kOp, experts, n, k), count = scale_count(kOp, experts, n, k, group_size, 0);
  check_span(kOp, "weight", w, elements(kOp, "weight", {experts, n, k}), false);
  check_span(kOp, "tiles", tiles, words, false);
  check_aligned(kOp, "tiles", tiles);
  check_span(kOp, "scales", scales, count, false);
  check_span(kOp, "zeros", zeros, count, true);
  check_span(kOp, "problem", problem, 1, false);
  quantize_tiles({.w = at<void>(w),
                  .w_type = type_of(kOp, "weight", w_type),
                  .experts = experts,
                  .n = n,
                  .k = k,
                  .group_size = group_size,
                  .tiles = at<void>(tiles),
                  .scales = at<void>(scales),
                  .scale_type = type_of(kOp, "scales", scale_type),
                  .zeros = at<uint8_t>(zeros),
                  .problem = at<int32_t>(problem),
                  .stream = at<void>(stream)});
}

void dequantize(const SpanTuple& tiles, const SpanTuple& scales, int scale_type, const SpanTuple& zeros,
                const SpanTuple& inverse, int64_t experts, int64_t n, int64_t k, int64_t group_size, int64_t first_k,
                const SpanTuple& y, int y_type, uintptr_t stream) {
  constexpr const char* kOp = "int4_dequantize";
  const int64_t words = tile_words(kOp, experts, n, k), count = scale_count(kOp, experts, n, k, group_size, first_k);
  check_span(kOp, "qweight", tiles, words, false);
  check_aligned(kOp, "qweight", tiles);
  check_span(kOp, "scales", scales, count, false);
  check_aligned(kOp, "scales", scales);
  check_span(kOp, "zeros", zeros, count, true);
  check_aligned(kOp, "zeros", zeros);
  check_span(kOp, "perm", inverse, elements(kOp, "perm", {experts, k}), true);
  check_span(kOp, "y", y, elements(kOp, "y", {experts, n, k}), false);
  check_aligned(kOp, "y", y);
  dequantize_tiles({.tiles = at<void>(tiles),
                    .scales = at<void>(scales),
                    .scale_type = type_of(kOp, "scales", scale_type),
                    .zeros = at<uint8_t>(zeros),
                    .inverse = at<int64_t>(inverse),
                    .experts = experts,
                    .n = n,
                    .k = k,
                    .group_size = group_size,
                    .first_k = first_k,
                    .y = at<void>(y),
                    .y_type = type_of(kOp, "y", y_type),
                    .stream = at<void>(stream)});
}

constexpr const char* kMoe = "int4_moe";

int64_t slots_of(int64_t tokens, int64_t topk) {
  const int64_t slots = elements(kMoe, "topk_ids", {tokens, topk});
  check(slots < kMost, kMoe, "topk_ids", "under 2**31 - 1 slots", slots);
  return slots;
}

void check_experts(int64_t experts) {
  check(experts >= 1 && experts <= kMostRoutedExperts, kMoe, "experts", "1 .. 2048", experts);
}

int64_t route_workspace(int64_t tokens, int64_t topk, int64_t experts) {
  check_experts(experts);
  return routing_workspace(slots_of(tokens, topk), experts);
}

void route_slots(const SpanTuple& ids, int64_t tokens, int64_t topk, int64_t experts, const SpanTuple& offsets,
                 const SpanTuple& row_token, const SpanTuple& slot_row, const SpanTuple& workspace,
                 const SpanTuple& counter, uintptr_t stream) {
  const int64_t slots = slots_of(tokens, topk);
  check_experts(experts);
  check_span(kMoe, "topk_ids", ids, slots, false);
  check_span(kMoe, "offsets", offsets, experts + 1, false);
  check_span(kMoe, "row_token", row_token, slots, false);
  check_span(kMoe, "slot_row", slot_row, slots, false);
  check_span(kMoe, "workspace", workspace, routing_workspace(slots, experts), false);
  check_span(kMoe, "counter", counter, 1, false);
  route({.ids = at<int64_t>(ids),
         .tokens = tokens,
         .topk = topk,
         .experts = experts,
         .offsets = at<int32_t>(offsets),
         .row_token = at<int32_t>(row_token),
         .slot_row = at<int32_t>(slot_row),
         .workspace = at<int32_t>(workspace),
         .counter = at<int32_t>(counter),
         .stream = at<void>(stream)});
}

void combine_rows(const SpanTuple& rows, const SpanTuple& slot_row, const SpanTuple& weights, int64_t tokens,
                  int64_t topk, int64_t columns, const SpanTuple& y, int y_type, uintptr_t stream) {
  const int64_t slots = slots_of(tokens, topk);
  check_span(kMoe, "rows", rows, elements(kMoe, "rows", {slots, columns}), false);
  check_span(kMoe, "slot_row", slot_row, slots, false);
  check_span(kMoe, "topk_weights", weights, slots, false);
  check_span(kMoe, "y", y, elements(kMoe, "y", {tokens, columns}), false);
  combine({.rows = at<float>(rows),
           .slot_row = at<int32_t>(slot_row),
           .weights = at<float>(weights),
           .tokens = tokens,
           .topk = topk,
           .columns = columns,
           .y = at<void>(y),
           .y_type = type_of(kMoe, "y", y_type, 1),
           .stream = at<void>(stream)});
}

void gather(const SpanTuple& x, int64_t x_rows, int64_t columns, const SpanTuple& row_index, int64_t rows,
            const SpanTuple& perm, const SpanTuple& offsets, int64_t experts, const SpanTuple& y, uintptr_t stream) {
  constexpr const char* kOp = "int4_gather";
  check(rows >= 0 && rows < kMost && experts >= 1 && experts < kMost, kOp, "rows", "0 .. 2**31 - 2", rows);
  check_span(kOp, "x", x, elements(kOp, "x", {x_rows, columns}), false);
  check_span(kOp, "row_index", row_index, rows, true);
  check_span(kOp, "perm", perm, elements(kOp, "perm", {experts, columns}), false);
  check_span(kOp, "offsets", offsets, experts + 1, true);
  check_span(kOp, "y", y, elements(kOp, "y", {rows, columns}), false);
  gather_columns({.x = at<void>(x),
                  .x_rows = x_rows,
                  .rows = rows,
                  .columns = columns,
                  .row_index = at<int32_t>(row_index),
                  .perm = at<int32_t>(perm),
                  .offsets = at<int32_t>(offsets),
                  .experts = experts,
                  .y = at<void>(y),
                  .stream = at<void>(stream)});
}

void gate_rows(const SpanTuple& x, int64_t rows, int64_t columns, const SpanTuple& y, int y_type, uintptr_t stream) {
  check_span(kMoe, "x", x, elements(kMoe, "x", {rows, 2, columns}), false);
  check_span(kMoe, "y", y, elements(kMoe, "y", {rows, columns}), false);
  gate(at<float>(x), rows, columns, at<void>(y), type_of(kMoe, "y", y_type, 1), at<void>(stream));
}

}  // namespace

void bind_pack_cuda(py::module_& m) {
  m.def("int4_pack", &pack);
  m.def("int4_quantize", &quantize);
  m.def("int4_dequantize", &dequantize);
  m.def("int4_route_workspace", &route_workspace);
  m.def("int4_route", &route_slots);
  m.def("int4_combine", &combine_rows);
  m.def("int4_gather", &gather);
  m.def("int4_gate", &gate_rows);
}

}  // namespace m3::int4
