// Python border of the spec_decode family's CUDA kernels: drafting, trees and their verification.
#include "common/border.h"
#include "spec_decode/tree_cuda.h"

namespace py = pybind11;

namespace m3::spec_decode {
namespace {

// Address, B, rows, columns, elements from request to request and from row to row; zeros for None.
using RowsTuple = std::tuple<uintptr_t, int64_t, int64_t, int64_t, int64_t, int64_t>;

using Spans = std::vector<SpanTuple>;

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

void verify_of(const RowsTuple& logits, int type, const Spans& tree, const Spans& filters, const Spans& noise,
               const RowsTuple& draft, const RowsTuple& allowed, int mode, int64_t width, int asked, const Spans& out,
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

void finalize_of(const Spans& in, int64_t batch, int64_t candidates, int64_t list_width, int64_t topk, int64_t nodes,
                 const Spans& out, uintptr_t stream) {
  const char* op = "tree_finalize";
  check_size(op, "num_nodes", 1, kMostNodes, nodes);
  check_size(op, "topk", 1, INT32_MAX, topk);
  check_size(op, "scores", 0, INT32_MAX / kMostNodes, batch);
  check_size(op, "scores", 0, 1 << 30, candidates);
  check_size(op, "parent_list", 0, INT32_MAX, list_width);
  check(in.size() == 6 && out.size() == 7, op, "arguments", "6 in, 7 out", in.size());
  const int64_t words = (nodes + 31) / 32;
  const char* names[] = {"scores", "tokens", "parent_list", "bonus", "seq_lens", "budget"};
  const int64_t sizes[] = {batch * candidates, batch * candidates, batch * list_width, batch, batch, batch};
  for (int i = 0; i < 6; ++i) check_span(op, names[i], in[i], sizes[i], i == 5);
  for (int i = 0; i < 7; ++i)
    check_span(op, "out", out[i], batch * (i == 2 ? nodes * words : i == 6 ? nodes - 1 : nodes), false);
  const Finalize a{.scores = at<float>(in[0]),
                   .tokens = at<int64_t>(in[1]),
                   .parent_list = at<int64_t>(in[2]),
                   .bonus = at<int64_t>(in[3]),
                   .seq_lens = at<int64_t>(in[4]),
                   .budget = at<int32_t>(in[5]),
                   .batch = (int)batch,
                   .candidates = (int)candidates,
                   .list_width = (int)list_width,
                   .topk = (int)topk,
                   .nodes = (int)nodes,
                   .out_candidates = at<int64_t>(out[0]),
                   .parents = at<int32_t>(out[1]),
                   .mask_bits = at<uint32_t>(out[2]),
                   .positions = at<int64_t>(out[3]),
                   .next_token = at<int64_t>(out[4]),
                   .next_sibling = at<int64_t>(out[5]),
                   .selected = at<int64_t>(out[6])};
  py::gil_scoped_release release;
  tree_finalize(a, at<void>(stream));
}

void check_links(const char* op, const Spans& links, int64_t count) {
  const char* names[] = {"positions", "retrive_index", "retrive_next_token", "retrive_next_sibling"};
  check(links.size() == 4, op, "arguments", "4 outputs", links.size());
  for (int i = 0; i < 4; ++i) check_span(op, names[i], links[i], count, false);
}

void build_of(const SpanTuple& parent_list, int64_t list_width, const SpanTuple& selected, const SpanTuple& seq_lens,
              const SpanTuple& mask_bytes, const Spans& links, int64_t batch, int64_t topk, int64_t nodes, int mode,
              uintptr_t stream) {
  const char* op = "build_tree_kernel_efficient";
  check_size(op, "draft_token_num", 1, kMostNodes, nodes);
  check_size(op, "topk", 1, INT32_MAX, topk);
  check_size(op, "verified_seq_len", 0, INT32_MAX / kMostNodes, batch);
  check_size(op, "parent_list", 0, INT32_MAX, list_width);
  check_size(op, "tree_mask_mode", 0, 2, mode);
  check_span(op, "parent_list", parent_list, batch * list_width, false);
  check_span(op, "selected_index", selected, batch * (nodes - 1), false);
  check_span(op, "verified_seq_len", seq_lens, batch, false);
  check_links(op, links, batch * nodes);
  const Build a{.parent_list = at<int64_t>(parent_list),
                .selected = at<int64_t>(selected),
                .seq_lens = at<int64_t>(seq_lens),
                .batch = (int)batch,
                .list_width = (int)list_width,
                .topk = (int)topk,
                .nodes = (int)nodes,
                .mode = (MaskMode)mode,
                .mask = at<uint8_t>(mask_bytes),
                .mask_bytes = std::get<1>(mask_bytes),
                .positions = at<int64_t>(links[0]),
                .index = at<int64_t>(links[1]),
                .next_token = at<int64_t>(links[2]),
                .next_sibling = at<int64_t>(links[3])};
  py::gil_scoped_release release;
  build_tree(a, at<void>(stream));
}

void reconstruct_of(const SpanTuple& mask_bytes, const SpanTuple& seq_lens, const Spans& links, int64_t batch,
                    int64_t nodes, uintptr_t stream) {
  const char* op = "reconstruct_indices_from_tree_mask";
  check_size(op, "draft_token_num", 1, kMostNodes, nodes);
  check_size(op, "batch_size", 0, INT32_MAX / kMostNodes, batch);
  const int64_t bytes = batch * nodes * nodes;
  check(std::get<1>(mask_bytes) >= bytes, op, "tree_mask", "at least " + std::to_string(bytes) + " bytes",
        std::get<1>(mask_bytes));
  check_span(op, "verified_seq_len", seq_lens, batch, false);
  check_links(op, links, batch * nodes);
  const Reconstruct a{.mask = at<uint8_t>(mask_bytes),
                      .seq_lens = at<int64_t>(seq_lens),
                      .batch = (int)batch,
                      .nodes = (int)nodes,
                      .positions = at<int64_t>(links[0]),
                      .index = at<int64_t>(links[1]),
                      .next_token = at<int64_t>(links[2]),
                      .next_sibling = at<int64_t>(links[3])};
  py::gil_scoped_release release;
  reconstruct_tree(a, at<void>(stream));
}

// spans: predicts, accept_index, accept_token_num, candidates, retrive_index, retrive_next_token, retrive_next_sibling,
// target_predict
void verify_greedy_of(const Spans& spans, int64_t batch, int64_t nodes, int64_t slots, uintptr_t stream) {
  const char* op = "verify_tree_greedy";
  check_size(op, "candidates", 0, INT32_MAX / kMostNodes, batch);  // predicts are named by int32
  check_size(op, "candidates", 1, kMostNodes, nodes);
  check_size(op, "accept_index", 1, INT32_MAX, slots);
  check(spans.size() == 8, op, "arguments", "8", spans.size());
  check_span(op, "predicts", spans[0], batch * nodes, false);
  check_span(op, "accept_index", spans[1], batch * slots, false);
  check_span(op, "accept_token_num", spans[2], batch, false);
  const char* names[] = {"candidates", "retrive_index", "retrive_next_token", "retrive_next_sibling", "target_predict"};
  for (int i = 0; i < 5; ++i) check_span(op, names[i], spans[3 + i], batch * nodes, false);
  const Walk a{.candidates = at<int64_t>(spans[3]),
               .index = at<int64_t>(spans[4]),
               .next_token = at<int64_t>(spans[5]),
               .next_sibling = at<int64_t>(spans[6]),
               .target_predict = at<int64_t>(spans[7]),
               .batch = (int)batch,
               .nodes = (int)nodes,
               .slots = (int)slots,
               .predicts = at<int32_t>(spans[0]),
               .accept_index = at<int32_t>(spans[1]),
               .accept_token_num = at<int32_t>(spans[2])};
  py::gil_scoped_release release;
  verify_greedy(a, at<void>(stream));
}

}  // namespace

void bind_tree_cuda(py::module_& m) {
  m.def("spec_decode_tree_verify", &verify_of, "Walks each tree by the target's law, from logits.");
  m.def("spec_decode_tree_finalize", &finalize_of, "Trees of the best candidates: links, ancestors, positions.");
  m.def("spec_decode_build_tree", &build_of, "Links and masks of selected candidates, into the caller's buffers.");
  m.def("spec_decode_reconstruct_tree", &reconstruct_of, "Links and positions of trees given by masks.");
  m.def("spec_decode_verify_greedy", &verify_greedy_of, "Follows the predicted tokens through each tree.");
}

}  // namespace m3::spec_decode
