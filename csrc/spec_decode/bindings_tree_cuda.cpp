// Python border of the spec_decode family's CUDA kernels: drafting, trees and their verification.
#include "common/border.h"
#include "spec_decode/tree_cuda.h"

namespace py = pybind11;

namespace m3::spec_decode {
namespace {

// Address, B, rows, columns, elements from request to request and from row to row; zeros for None.
using RowsTuple = std::tuple<uintptr_t, int64_t, int64_t, int64_t, int64_t, int64_t>;

constexpr int64_t kMost = int64_t{1} << 40;  // so that no product of two sizes leaves int64

void check_size(const char* op, const char* argument, int64_t low, int64_t high, int64_t got) {
  check(got >= low && got <= high, op, argument, std::to_string(low) + ".." + std::to_string(high), got);
}

template <class T>
Rows<T> rows_of(const char* op, const char* argument, const RowsTuple& tuple, int64_t requests, int64_t rows,
                int64_t columns, bool optional) {
  const auto& [address, got_requests, got_rows, got_columns, request_stride, row_stride] = tuple;
  if (optional && !address && !got_columns) return {nullptr, 0, 0};
  check(address || !requests, op, argument, "memory", "none");
  check(
      got_requests == requests && got_rows == rows && got_columns == columns, op, argument,
      "(" + std::to_string(requests) + ", " + std::to_string(rows) + ", " + std::to_string(columns) + ")",
      "(" + std::to_string(got_requests) + ", " + std::to_string(got_rows) + ", " + std::to_string(got_columns) + ")");
  for (int64_t stride : {request_stride, row_stride})
    check(stride >= 0 && stride < kMost, op, argument, "strides in 0 .. 2**40 - 1", stride);
  return {at<T>(address), request_stride, row_stride};
}

void verify_of(const RowsTuple& logits, int type, const std::vector<SpanTuple>& tree,
               const std::vector<SpanTuple>& filters, const std::vector<SpanTuple>& noise, const RowsTuple& draft,
               const RowsTuple& allowed, int mode, int64_t width, int asked, const std::vector<SpanTuple>& out,
               int ranks, uintptr_t stream) {
  const char* op = "tree_verify";
  const int64_t requests = std::get<1>(logits), nodes = std::get<2>(logits), vocabulary = std::get<3>(logits);
  check_size(op, "logits", 0, INT32_MAX / kMostNodes, requests);
  check_size(op, "logits", 1, kMostNodes, nodes);
  check_size(op, "logits", 1, kMostVocabulary, vocabulary);
  check_size(op, "logits", 0, 2, type);
  check_size(op, "mode", 0, 3, mode);
  check_size(op, "logprobs", 0, 2, asked);
  check_size(op, "width", 1, kMostNodes, width);
  check(ranks >= 0 && ranks <= 16 && (ranks & (ranks - 1)) == 0, op, "ranks", "0, 1, 2, 4, 8 or 16", ranks);
  check(tree.size() == 3 && filters.size() == 4 && noise.size() == 4 && out.size() == 4, op, "arguments",
        "3 links, 4 filters, 4 of noise, 4 out", out.size());
  const char* links[] = {"candidates", "next_token", "next_sibling"};
  for (int i = 0; i < 3; ++i) check_span(op, links[i], tree[i], requests * nodes, false);
  const char* laws[] = {"temperature", "top_k", "top_p", "min_p"};
  for (int i = 0; i < 4; ++i) check_span(op, laws[i], filters[i], requests, i > 0);
  const char* draws[] = {"seed", "position", "coins", "final_coins"};
  for (int i = 0; i < 4; ++i) check_span(op, draws[i], noise[i], requests * (i == 2 ? nodes : 1), true);
  const char* outs[] = {"tokens", "accept_index", "accept_length", "token_logprobs"};
  for (int i = 0; i < 4; ++i)
    check_span(op, outs[i], out[i], i == 2 ? requests : i == 3 && !asked ? 0 : requests * width, false);
  const Verify a{
      .logits = rows_of<void>(op, "logits", logits, requests, nodes, vocabulary, false),
      .candidates = at<int64_t>(tree[0]),
      .next_token = at<int64_t>(tree[1]),
      .next_sibling = at<int64_t>(tree[2]),
      .temperature = at<float>(filters[0]),
      .top_k = at<int32_t>(filters[1]),
      .top_p = at<float>(filters[2]),
      .min_p = at<float>(filters[3]),
      .seed = at<int64_t>(noise[0]),
      .position = at<int64_t>(noise[1]),
      .coins = at<double>(noise[2]),
      .final_coins = at<double>(noise[3]),
      .draft = rows_of<float>(op, "draft_probs", draft, requests, nodes, vocabulary, true),
      .allowed = rows_of<uint32_t>(op, "grammar_bits", allowed, requests, nodes, (vocabulary + 31) / 32, true),
      .requests = (int)requests,
      .nodes = (int)nodes,
      .vocabulary = (int)vocabulary,
      .width = (int)width,
      .mode = (Mode)mode,
      .asked = (Logprobs)asked,
      .tokens = at<int64_t>(out[0]),
      .accept_index = at<int32_t>(out[1]),
      .accept_length = at<int32_t>(out[2]),
      .logprobs = asked ? at<float>(out[3]) : nullptr};
  if (!requests) return;
  const bool seeded = a.seed && a.position, drawn = a.mode != Mode::kCoupled && a.coins && a.final_coins;
  check(seeded || drawn || a.mode == Mode::kGreedy, op, "seed", "seed and position, or coins where they serve",
        "neither");
  check(a.draft.data || a.mode != Mode::kChain, op, "draft_probs", "probabilities for mode 'chain'", "None");
  py::gil_scoped_release release;
  tree_verify(a, (Type)type, ranks, at<void>(stream));
}

}  // namespace

void bind_tree_cuda(py::module_& m) {
  m.def("spec_decode_tree_verify", &verify_of, "Walks each tree by the target's law, from logits.");
}

}  // namespace m3::spec_decode
