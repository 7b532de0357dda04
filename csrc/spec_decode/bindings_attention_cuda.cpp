// Python border of the spec_decode family's CUDA kernels: attention and commit. Addresses, sizes and strides of tensors
// that Python has validated.
#include "common/border.h"
#include "spec_decode/attention_cuda.h"
#include "spec_decode/commit_cuda.h"

namespace py = pybind11;

namespace m3::spec_decode {
namespace {

constexpr const char* kOp = "tree_attention";

using RowsTuple = std::tuple<uintptr_t, int, int64_t, int64_t>;       // q: address, dtype; tokens, heads in elements
using PagedTuple = std::tuple<uintptr_t, int64_t, int64_t, int64_t>;  // address; pages, slots, heads in elements
using ShapeTuple = std::tuple<int64_t, int64_t, int64_t, int64_t>;    // tokens, heads, kv heads, head size
using PagesTuple = std::tuple<int64_t, int64_t, int64_t, int64_t>;    // requests, pages, page size, max_pages
using MaskTuple = std::tuple<SpanTuple, int64_t, SpanTuple>;          // mask_bits, its words a row; tree_lens
using GateTuple = std::tuple<uintptr_t, int, bool, int64_t>;          // address, dtype, one a head, row in elements

template <class T>
Paged<T> paged(const char* name, const PagedTuple& tensor, int64_t element, int64_t alignment) {
  const auto& [address, page, slot, head] = tensor;
  const std::string want = "an address and strides of 0 or more, multiples of " + std::to_string(alignment) + " bytes";
  for (int64_t stride : {page, slot, head})
    check(stride >= 0 && stride * element % alignment == 0, kOp, name, want, stride);
  check(address % alignment == 0, kOp, name, want, address);
  return {at<T>(address), page, slot, head};
}

DeviceAttention sizes_of(const ShapeTuple& shape, const PagesTuple& pages, bool int8) {
  DeviceAttention c{};
  std::tie(c.tokens, c.heads, c.kv_heads, c.head_size) = shape;
  std::tie(c.requests, c.pages, c.page_size, c.table_width) = pages;
  c.int8 = int8;
  constexpr int64_t kMost = INT32_MAX;
  const auto within = [](const char* name, int64_t size, int64_t least) {
    check(size >= least && size <= kMost, kOp, name, std::to_string(least) + ".." + std::to_string(kMost), size);
  };
  within("q", c.tokens, 0), within("q", c.heads, 1), within("k_cache", c.kv_heads, 1), within("k_cache", c.pages, 0);
  within("k_cache", c.page_size, 1), within("block_table", c.table_width, 0), within("cache_seqlens", c.requests, 0);
  check(c.heads % c.kv_heads == 0, kOp, "k_cache", "kv heads that divide " + std::to_string(c.heads), c.kv_heads);
  check(c.head_size >= 8 && c.head_size <= 256 && c.head_size % (int8 ? 16 : 8) == 0, kOp, "q",
        std::string("heads of 8..256 elements, a multiple of ") + (int8 ? "16 with int8 caches" : "8"), c.head_size);
  check(c.requests >= 1 || !c.tokens, kOp, "cache_seqlens", "requests", c.requests);
  return c;
}

int64_t memory_of(const ShapeTuple& shape, const PagesTuple& pages, bool int8) {
  const DeviceAttention c = sizes_of(shape, pages, int8);
  return c.tokens ? attention_memory(c) : 0;
}

void tree_attention_of(const ShapeTuple& shape, const RowsTuple& q, const PagedTuple& k_cache,
                       const PagedTuple& v_cache, bool int8, const PagedTuple& k_scale, const PagedTuple& v_scale,
                       const PagesTuple& pages, const SpanTuple& block_table, const SpanTuple& cache_seqlens,
                       const SpanTuple& cu_seqlens_q, const MaskTuple& mask, const GateTuple& gate,
                       double softmax_scale, int64_t window, const SpanTuple& out, const SpanTuple& memory,
                       uintptr_t stream) {
  DeviceAttention c = sizes_of(shape, pages, int8);
  const auto& [q_address, type, q_token, q_head] = q;
  check(type == (int)DeviceType::kBfloat16 || type == (int)DeviceType::kFloat16, kOp, "q", "bfloat16 or float16", type);
  c.type = (DeviceType)type, c.q = at<const void>(q_address), c.q_token = q_token, c.q_head = q_head;
  check(q_address % 4 == 0 && q_token % 2 == 0 && q_head % 2 == 0 && q_token >= 0 && q_head >= 0, kOp, "q",
        "rows at multiples of 4 bytes", q_address);
  const int64_t element = int8 ? 1 : 2;
  c.k = paged<void>("k_cache", k_cache, element, 16), c.v = paged<void>("v_cache", v_cache, element, 16);
  c.k_scale = paged<float>("k_scale", k_scale, 4, 4), c.v_scale = paged<float>("v_scale", v_scale, 4, 4);
  check((c.k_scale.data && c.v_scale.data) || !int8 || !c.pages, kOp, "k_scale", "scales of int8 caches", "none");
  check((c.k.data && c.v.data) || !c.pages, kOp, "k_cache", "memory", "none");
  check_span(kOp, "block_table", block_table, elements(kOp, "block_table", {c.requests, c.table_width}), false);
  check_span(kOp, "cache_seqlens", cache_seqlens, c.requests, false);
  check_span(kOp, "cu_seqlens_q", cu_seqlens_q, c.requests + 1, false);
  c.block_table = at<const int32_t>(block_table), c.cache_seqlens = at<const int32_t>(cache_seqlens);
  c.cu_seqlens = at<const int32_t>(cu_seqlens_q);
  const auto& [mask_bits, words, tree_lens] = mask;
  check(words >= 0, kOp, "mask_bits", "words of at least 0", words);
  check_span(kOp, "mask_bits", mask_bits, elements(kOp, "mask_bits", {c.tokens, words}), true);
  check_span(kOp, "tree_lens", tree_lens, c.requests, true);
  c.mask_bits = at<const int32_t>(mask_bits), c.mask_words = words, c.tree_lens = at<const int32_t>(tree_lens);
  check(c.mask_bits || !c.tree_lens, kOp, "tree_lens", "none without mask_bits", "some");
  const auto& [gate_address, gate_type, gate_one, gate_row] = gate;
  check(gate_type == (int)DeviceType::kFloat32 || gate_type == type, kOp, "gate", "float32 or the type of q",
        gate_type);
  check(gate_row >= 0, kOp, "gate", "a stride of at least 0", gate_row);
  c.gate = at<const void>(gate_address), c.gate_type = (DeviceType)gate_type, c.gate_one = gate_one;
  c.gate_row = gate_row;
  check(window >= 0 && window <= INT32_MAX, kOp, "window", "0..2147483647", window);
  c.window = (int)window, c.scale = (float)(softmax_scale * 1.4426950408889634);
  check_span(kOp, "out", out, elements(kOp, "out", {c.tokens, c.heads, c.head_size}), false);
  check(c.q || !c.tokens, kOp, "q", "memory", "none");
  if (!c.tokens) return;
  check_span(kOp, "memory", memory, attention_memory(c), false);
  c.out = at<void>(out), c.memory = at<float>(memory);
  py::gil_scoped_release release;
  tree_attention(c, at<void>(stream));
}

using CachesTuple = std::tuple<std::vector<uintptr_t>, int,                     // addresses, bytes of a unit
                               std::tuple<int64_t, int64_t, int64_t, int64_t>,  // pages, page size, heads, row
                               std::tuple<int64_t, int64_t, int64_t>>;          // pages, slots, heads; in units
using HiddenTuple = std::tuple<SpanTuple, int64_t, int64_t, SpanTuple>;         // hidden, nodes, bytes of one; accepted

// Spans in bytes for hidden and accepted, in elements for the others.
void tree_commit_of(const SpanTuple& accept_index, const SpanTuple& accept_length, int64_t requests, int64_t width,
                    const SpanTuple& block_table, int64_t table_width, const SpanTuple& cache_seqlens,
                    const std::vector<CachesTuple>& groups, const HiddenTuple& hidden, const SpanTuple& new_seqlens,
                    uintptr_t stream) {
  constexpr const char* op = "tree_commit";
  constexpr int64_t kMost = INT32_MAX;
  check(width >= 1 && width <= kMost && requests >= 0 && requests <= kMost, op, "accept_index", "(B, S), S at least 1",
        width);
  check_span(op, "accept_index", accept_index, elements(op, "accept_index", {requests, width}), false);
  check_span(op, "accept_length", accept_length, requests, false);
  check_span(op, "cache_seqlens", cache_seqlens, requests, false);
  check_span(op, "cache_seqlens", new_seqlens, requests, false);
  check(table_width >= 0 && table_width <= kMost, op, "block_table", "(B, max_pages)", table_width);
  check_span(op, "block_table", block_table, elements(op, "block_table", {requests, table_width}), false);
  DeviceCommit c{};
  c.requests = requests, c.width = width, c.table_width = table_width;
  c.accept_index = at<const int32_t>(accept_index), c.accept_length = at<const int32_t>(accept_length);
  c.block_table = at<const int32_t>(block_table), c.cache_seqlens = at<const int32_t>(cache_seqlens);
  c.new_seqlens = at<int32_t>(new_seqlens);
  const auto& [from, nodes, bytes, accepted] = hidden;
  check(nodes >= 0 && nodes <= kMost && bytes >= 0 && bytes % 2 == 0, op, "hidden", "(B, N, C)", bytes);
  check_span(op, "hidden", from, elements(op, "hidden", {requests, nodes, bytes}), false);
  check_span(op, "hidden", accepted, elements(op, "hidden", {requests, width, bytes}), false);
  c.nodes = nodes, c.hidden_bytes = bytes, c.accepted = at<void>(accepted);
  c.hidden = bytes ? at<const void>(from) : nullptr;
  if (bytes && !nodes) c.hidden = c.accepted;  // nothing of it is read: every slot is zero
  std::vector<Caches> launches;
  for (const auto& [addresses, unit, shape, strides] : groups) {
    Caches caches{};
    caches.unit = unit;
    std::tie(caches.pages, caches.page_size, caches.heads, caches.row) = shape;
    std::tie(caches.page, caches.slot, caches.head) = strides;
    check(unit == 1 || unit == 2 || unit == 4 || unit == 16, op, "k_caches", "units of 1, 2, 4 or 16 bytes", unit);
    elements(op, "k_caches", {caches.pages, caches.page_size, caches.heads, caches.row, unit});
    check(caches.pages >= 0 && caches.page_size >= 1 && caches.heads >= 0 && caches.row >= 0, op, "k_caches",
          "sizes of at least 0", "others");
    check(caches.page >= 0 && caches.slot >= 0 && caches.head >= 0, op, "k_caches", "strides of at least 0", "others");
    for (uintptr_t address : addresses) {
      check(address && address % unit == 0, op, "k_caches", "addresses at multiples of a unit", address);
      if (!caches.count) launches.push_back(caches);
      launches.back().data[launches.back().count++] = address;
      caches.count = (caches.count + 1) % kMostCaches;
    }
  }
  if (launches.empty()) launches.push_back({.count = 0, .unit = 16, .page_size = 1});
  py::gil_scoped_release release;
  for (const Caches& caches : launches) {
    tree_commit(c, caches, at<void>(stream));
    c.new_seqlens = nullptr, c.hidden = nullptr;
  }
}

}  // namespace

void bind_attention_cuda(py::module_& m) {
  m.def("spec_decode_attention_memory", &memory_of);
  m.def("spec_decode_tree_attention", &tree_attention_of);
  m.def("spec_decode_tree_commit", &tree_commit_of);
}

}  // namespace m3::spec_decode
