// Python border of the spec_decode family: attention. Addresses, sizes and strides of tensors that Python has
// validated.
#include "common/border.h"
#include "spec_decode/attention_cpu_driver.h"

namespace py = pybind11;

namespace m3::spec_decode {
void bind_attention(pybind11::module_& module);
}

namespace m3::spec_decode {
namespace {

using TypedTuple = std::tuple<uintptr_t, int>;                        // address, dtype
using StridesTuple = std::tuple<int64_t, int64_t>;                    // rows, heads of q, in elements
using CacheTuple = std::tuple<uintptr_t, int64_t, int64_t, int64_t>;  // address; pages, slots, heads in elements
using ShapeTuple = std::tuple<int64_t, int64_t, int64_t, int64_t>;    // rows, heads, kv heads, head size
using PagesTuple = std::tuple<int64_t, int64_t, SpanTuple, int64_t>;  // pages, page size, block_table, max_pages
using MaskTuple = std::tuple<SpanTuple, int64_t, SpanTuple>;          // mask_bits, words of a row, tree_lens
using GateTuple = std::tuple<uintptr_t, int, bool, int64_t>;          // address, dtype, one a head; rows in elements

constexpr const char* kOp = "tree_attention";
constexpr int64_t kMost = int64_t{1} << 31;

int64_t size_of(Type type) { return type == Type::kFloat32 ? 4 : type == Type::kInt8 ? 1 : 2; }

Type type_of(const char* argument, int type) {
  check(type >= 0 && type <= 2, kOp, argument, "dtype 0 (float32), 1 (bfloat16) or 2 (float16)", type);
  return Type(type);
}

Type cache_type_of(int type) {
  check(type >= 0 && type <= 3, kOp, "k_cache", "dtype 0 (float32), 1 (bfloat16), 2 (float16) or 3 (int8)", type);
  return Type(type);
}

void check_size(const char* argument, int64_t size, int64_t least) {
  check(size >= least && size < kMost, kOp, argument, "sizes in " + std::to_string(least) + " .. 2**31 - 1", size);
}

void check_stride(const char* argument, int64_t stride) {
  constexpr int64_t most = int64_t{1} << 40;
  check(stride >= 0 && stride < most, kOp, argument, "strides in 0 .. 2**40 - 1", stride);
}

Cache cache_of(const char* argument, const CacheTuple& tuple, int64_t bytes) {
  const auto& [address, page, slot, head] = tuple;
  for (int64_t stride : {page, slot, head}) check_stride(argument, stride);
  return {at<const char>(address), page * bytes, slot * bytes, head * bytes};
}

Scales scales_of(const char* argument, const CacheTuple& tuple, const Attention& a) {
  const auto& [address, page, slot, head] = tuple;
  for (int64_t stride : {page, slot, head}) check_stride(argument, stride);
  const bool scaled = a.cache_type == Type::kInt8;
  check(scaled ? address || !a.num_pages : !address, kOp, argument, scaled ? "scales of int8 caches" : "none",
        address ? "some" : "none");
  return {at<const float>(address), page, slot, head};
}

// The small integer tensors decide what is read: they are checked whole.
void check_lengths(const Attention& a, int64_t rows) {
  const int32_t* cu = a.cu_seqlens_q;
  check(cu[0] == 0 && cu[a.requests] == rows, kOp, "cu_seqlens_q", "0 first and " + std::to_string(rows) + " last",
        std::to_string(cu[0]) + " and " + std::to_string(cu[a.requests]));
  for (int64_t b = 0; b < a.requests; b++) {
    const int64_t queries = (int64_t)cu[b + 1] - cu[b], keys = a.cache_seqlens[b];
    check(queries >= 0, kOp, "cu_seqlens_q", "ascending values", queries);
    const int64_t tree = a.tree_lens ? a.tree_lens[b] : queries;
    check(tree >= 0, kOp, "tree_lens", "values of at least 0", tree);
    check(keys >= tree, kOp, "cache_seqlens",
          std::string("at least the ") + (a.tree_lens ? "tree_lens" : "queries") + " of a request, " +
              std::to_string(tree),
          keys);
    if (!queries) continue;
    check((keys + a.page_size - 1) / a.page_size <= a.max_pages, kOp, "block_table",
          "pages for " + std::to_string(keys) + " keys", a.max_pages * a.page_size);
    check(!a.mask_bits || a.mask_words * 32 >= tree, kOp, "mask_bits", std::to_string(tree) + " bits a row",
          a.mask_words * 32);
  }
}

void tree_attention_of(const ShapeTuple& shape, const TypedTuple& q, const StridesTuple& q_strides,
                       const CacheTuple& k_cache, const CacheTuple& v_cache, int cache_type, const CacheTuple& k_scale,
                       const CacheTuple& v_scale, const PagesTuple& pages, SpanTuple cache_seqlens,
                       SpanTuple cu_seqlens_q, const MaskTuple& mask, const GateTuple& gate, double softmax_scale,
                       int64_t window, uintptr_t out, int threads) {
  Attention a{};
  const auto& [rows, heads, kv_heads, size] = shape;
  const auto& [mask_span, mask_words, tree_lens] = mask;
  const auto& [gate_data, gate_type, gate_one, gate_row_stride] = gate;
  check_size("q", rows, 0), check_size("q", heads, 1), check_size("k_cache", kv_heads, 1), check_size("q", size, 1);
  check(heads % kv_heads == 0, kOp, "k_cache", "kv heads that divide " + std::to_string(heads), kv_heads);
  a.requests = std::get<1>(cache_seqlens);
  a.heads = heads, a.kv_heads = kv_heads, a.size = size;
  a.type = type_of("q", std::get<1>(q)), a.cache_type = cache_type_of(cache_type);
  a.q = at<const char>(std::get<0>(q));
  for (int64_t stride : {std::get<0>(q_strides), std::get<1>(q_strides)}) check_stride("q", stride);
  a.q_row_stride = std::get<0>(q_strides) * size_of(a.type), a.q_head_stride = std::get<1>(q_strides) * size_of(a.type);
  a.keys = cache_of("k_cache", k_cache, size_of(a.cache_type));
  a.values = cache_of("v_cache", v_cache, size_of(a.cache_type));
  SpanTuple table;
  std::tie(a.num_pages, a.page_size, table, a.max_pages) = pages;
  a.k_scale = scales_of("k_scale", k_scale, a), a.v_scale = scales_of("v_scale", v_scale, a);
  check_size("k_cache", a.num_pages, 0), check_size("k_cache", a.page_size, 1);
  check_size("block_table", a.max_pages, 0), check_size("cache_seqlens", a.requests, 0);
  check_span(kOp, "block_table", table, a.requests * a.max_pages, false);
  check_span(kOp, "cu_seqlens_q", cu_seqlens_q, a.requests + 1, false);
  check_span(kOp, "cache_seqlens", cache_seqlens, a.requests, false);
  check_size("mask_bits", mask_words, 0), check_span(kOp, "mask_bits", mask_span, rows * mask_words, true);
  check_span(kOp, "tree_lens", tree_lens, a.requests, true), check_stride("gate", gate_row_stride);
  check(std::get<0>(mask_span) || !std::get<0>(tree_lens), kOp, "tree_lens", "none without mask_bits", "some");
  check(window >= 0, kOp, "window", "at least 0", window);
  check(threads >= 1 && threads <= 4096, kOp, "threads", "1..4096", threads);
  a.block_table = at<const int32_t>(table);
  a.cache_seqlens = at<const int32_t>(cache_seqlens), a.cu_seqlens_q = at<const int32_t>(cu_seqlens_q);
  a.mask_bits = at<const int32_t>(mask_span), a.mask_words = mask_words;
  a.tree_lens = at<const int32_t>(tree_lens);
  a.gate = at<const char>(gate_data), a.gate_type = type_of("gate", gate_type), a.gate_one = gate_one;
  a.gate_row_stride = gate_row_stride;
  a.softmax_scale = (float)softmax_scale, a.window = window;
  a.out = at<char>(out);
  check((a.q && a.out) || !rows, kOp, "q", "memory", "none");
  check((a.keys.data && a.values.data) || !a.num_pages, kOp, "k_cache", "memory", "none");
  check_lengths(a, rows);
  py::gil_scoped_release release;
  tree_attention(a, threads);
}

}  // namespace
}  // namespace m3::spec_decode

void m3::spec_decode::bind_attention(py::module_& m) { m.def("tree_attention", &tree_attention_of); }
