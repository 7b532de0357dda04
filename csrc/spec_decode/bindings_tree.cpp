// Python border of the spec_decode family: trees, and walks that draw from given probabilities.
#include <algorithm>

#include "common/border.h"
#include "spec_decode/sampling_cpu.h"
#include "spec_decode/tree_cpu.h"

namespace py = pybind11;
using namespace m3;

namespace m3::spec_decode {
void bind_tree(pybind11::module_& module);
}

namespace {

using namespace m3::spec_decode;

using CacheTuple = std::tuple<uintptr_t, int64_t, int64_t, int64_t, int64_t>;  // address; strides, a row in bytes
using LawsTuple = std::tuple<uintptr_t, int, int64_t, int64_t, int64_t>;  // address, type, rows, strides in elements
using HiddenTuple = std::tuple<uintptr_t, int64_t, int64_t, int64_t, int64_t>;  // address, N, strides, C in bytes
using Spans = std::vector<SpanTuple>;

constexpr int64_t kMostNodes = 1024;
constexpr int64_t kMost = int64_t{1} << 40;  // so that no product of two sizes leaves int64

void check_size(const char* op, const char* argument, int64_t low, int64_t high, int64_t got) {
  check(got >= low && got <= high, op, argument, std::to_string(low) + ".." + std::to_string(high), got);
}

void check_threads(const char* op, int threads) { check_size(op, "threads", 1, 4096, threads); }

void finalize_of(const Spans& in, int64_t batch, int64_t candidates, int64_t list_width, int64_t topk, int64_t nodes,
                 const Spans& out, int threads) {
  const char* op = "tree_finalize";
  check_size(op, "num_nodes", 1, kMostNodes, nodes);
  check_size(op, "topk", 1, kMost, topk);
  check_size(op, "scores", 0, INT32_MAX, batch);
  check_size(op, "scores", 0, INT32_MAX, candidates);
  check_size(op, "parent_list", 0, INT32_MAX, list_width);
  check_threads(op, threads);
  check(in.size() == 6 && out.size() == 7, op, "arguments", "6 in, 7 out", in.size());
  const int64_t words = (nodes + 31) / 32;
  const char* names[] = {"scores", "tokens", "parent_list", "bonus", "seq_lens", "budget"};
  const int64_t sizes[] = {batch * candidates, batch * candidates, batch * list_width, batch, batch, batch};
  for (int i = 0; i < 6; i++) check_span(op, names[i], in[i], sizes[i], i == 5);
  for (int i = 0; i < 7; i++)
    check_span(op, "out", out[i], batch * (i == 2 ? nodes * words : i == 6 ? nodes - 1 : nodes), false);
  const Finalize a{.scores = at<float>(in[0]),
                   .tokens = at<int64_t>(in[1]),
                   .parent_list = at<int64_t>(in[2]),
                   .bonus = at<int64_t>(in[3]),
                   .seq_lens = at<int64_t>(in[4]),
                   .budget = at<int32_t>(in[5]),
                   .batch = batch,
                   .candidates = candidates,
                   .list_width = list_width,
                   .topk = topk,
                   .nodes = nodes,
                   .out_candidates = at<int64_t>(out[0]),
                   .parents = at<int32_t>(out[1]),
                   .mask_bits = at<uint32_t>(out[2]),
                   .positions = at<int64_t>(out[3]),
                   .next_token = at<int64_t>(out[4]),
                   .next_sibling = at<int64_t>(out[5]),
                   .selected = at<int64_t>(out[6])};
  py::gil_scoped_release release;
  tree_finalize(a, threads);
}

// shape: pages, page_size, heads; hidden: address 0 for none.
void commit_of(SpanTuple accept_index, SpanTuple accept_length, int64_t batch, int64_t slots, SpanTuple block_table,
               int64_t table_width, SpanTuple cache_seqlens, std::tuple<int64_t, int64_t, int64_t> shape,
               const std::vector<CacheTuple>& caches, HiddenTuple hidden, SpanTuple accepted_hidden,
               SpanTuple new_seqlens, int threads) {
  const char* op = "tree_commit";
  check_size(op, "accept_index", 0, INT32_MAX, batch);
  check_size(op, "accept_index", 1, INT32_MAX, slots);
  check_size(op, "block_table", 0, INT32_MAX, table_width);
  check_threads(op, threads);
  check_span(op, "accept_index", accept_index, batch * slots, false);
  check_span(op, "accept_length", accept_length, batch, false);
  check_span(op, "block_table", block_table, batch * table_width, false);
  check_span(op, "cache_seqlens", cache_seqlens, batch, false);
  check_span(op, "out", new_seqlens, batch, false);
  const auto& [pages, page_size, heads] = shape;
  const auto& [hidden_data, hidden_nodes, request_stride, node_stride, hidden_bytes] = hidden;
  for (int64_t size : {pages, heads, hidden_nodes, hidden_bytes}) check_size(op, "k_caches", 0, INT32_MAX, size);
  check_size(op, "k_caches", 1, INT32_MAX, page_size);
  Commit a{.accept_index = at<int32_t>(accept_index),
           .accept_length = at<int32_t>(accept_length),
           .block_table = at<int32_t>(block_table),
           .cache_seqlens = at<int32_t>(cache_seqlens),
           .batch = batch,
           .slots = slots,
           .table_width = table_width,
           .pages = pages,
           .page_size = page_size,
           .caches = {},
           .hidden = at<uint8_t>(hidden_data),
           .hidden_nodes = hidden_nodes,
           .hidden_request_stride = request_stride,
           .hidden_node_stride = node_stride,
           .hidden_bytes = hidden_bytes,
           .accepted_hidden = at<uint8_t>(accepted_hidden),
           .new_seqlens = at<int32_t>(new_seqlens)};
  if (a.hidden) check_span(op, "hidden", accepted_hidden, batch * slots * hidden_bytes, false);
  for (const auto& [address, page_stride, slot_stride, head_stride, row_bytes] : caches) {
    check_size(op, "k_caches", 0, INT32_MAX, row_bytes);
    check(address || !pages || !heads || !row_bytes, op, "k_caches", "memory", "none");
    a.caches.push_back({at<uint8_t>(address), page_stride, slot_stride, head_stride, heads, row_bytes});
  }
  py::gil_scoped_release release;
  tree_commit(a, threads);
}

void check_links(const char* op, const Spans& links, int64_t count) {
  const char* names[] = {"positions", "retrive_index", "retrive_next_token", "retrive_next_sibling"};
  check(links.size() == 4, op, "arguments", "4 outputs", links.size());
  for (int i = 0; i < 4; i++) check_span(op, names[i], links[i], count, false);
}

void build_of(SpanTuple parent_list, int64_t list_width, SpanTuple selected, SpanTuple seq_lens, SpanTuple mask_bytes,
              const Spans& links, int64_t batch, int64_t topk, int64_t nodes, int mode, int threads) {
  const char* op = "build_tree_kernel_efficient";
  check_size(op, "draft_token_num", 1, kMostNodes, nodes);
  check_size(op, "topk", 1, kMost, topk);
  check_size(op, "verified_seq_len", 0, INT32_MAX, batch);
  check_size(op, "parent_list", 0, INT32_MAX, list_width);
  check_size(op, "tree_mask_mode", 0, 2, mode);
  check_threads(op, threads);
  check_span(op, "parent_list", parent_list, batch * list_width, false);
  check_span(op, "selected_index", selected, batch * (nodes - 1), false);
  check_span(op, "verified_seq_len", seq_lens, batch, false);
  check_links(op, links, batch * nodes);
  const Build a{.parent_list = at<int64_t>(parent_list),
                .selected = at<int64_t>(selected),
                .seq_lens = at<int64_t>(seq_lens),
                .batch = batch,
                .list_width = list_width,
                .topk = topk,
                .nodes = nodes,
                .mode = (MaskMode)mode,
                .mask = at<uint8_t>(mask_bytes),
                .mask_bytes = std::get<1>(mask_bytes),
                .positions = at<int64_t>(links[0]),
                .index = at<int64_t>(links[1]),
                .next_token = at<int64_t>(links[2]),
                .next_sibling = at<int64_t>(links[3])};
  py::gil_scoped_release release;
  build_tree(a, threads);
}

void reconstruct_of(SpanTuple mask_bytes, SpanTuple seq_lens, const Spans& links, int64_t batch, int64_t nodes,
                    int threads) {
  const char* op = "reconstruct_indices_from_tree_mask";
  check_size(op, "draft_token_num", 1, kMostNodes, nodes);
  check_size(op, "batch_size", 0, INT32_MAX, batch);
  check_threads(op, threads);
  const int64_t bytes = batch * nodes * nodes;
  check(std::get<1>(mask_bytes) >= bytes, op, "tree_mask", "at least " + std::to_string(bytes) + " bytes",
        std::get<1>(mask_bytes));
  check_span(op, "verified_seq_len", seq_lens, batch, false);
  check_links(op, links, batch * nodes);
  const Reconstruct a{.mask = at<uint8_t>(mask_bytes),
                      .seq_lens = at<int64_t>(seq_lens),
                      .batch = batch,
                      .nodes = nodes,
                      .positions = at<int64_t>(links[0]),
                      .index = at<int64_t>(links[1]),
                      .next_token = at<int64_t>(links[2]),
                      .next_sibling = at<int64_t>(links[3])};
  py::gil_scoped_release release;
  reconstruct_tree(a, threads);
}

// spans: predicts, accept_index, accept_token_num, candidates, retrive_index, retrive_next_token, retrive_next_sibling
Walk walk_of(const char* op, const Spans& spans, int64_t batch, int64_t nodes, int64_t slots) {
  check_size(op, "candidates", 0, INT32_MAX / kMostNodes, batch);  // predicts are named by int32
  check_size(op, "candidates", 1, kMostNodes, nodes);
  check_size(op, "accept_index", 1, INT32_MAX, slots);
  check(spans.size() == 7, op, "arguments", "7", spans.size());
  check_span(op, "predicts", spans[0], batch * nodes, false);
  check_span(op, "accept_index", spans[1], batch * slots, false);
  check_span(op, "accept_token_num", spans[2], batch, false);
  const char* names[] = {"candidates", "retrive_index", "retrive_next_token", "retrive_next_sibling"};
  for (int i = 0; i < 4; i++) check_span(op, names[i], spans[3 + i], batch * nodes, i >= 2);
  check((std::get<0>(spans[5]) == 0) == (std::get<0>(spans[6]) == 0) || !batch, op, "retrive_next_token",
        "both links or none", "one");
  return {.candidates = at<int64_t>(spans[3]),
          .index = at<int64_t>(spans[4]),
          .next_token = at<int64_t>(spans[5]),
          .next_sibling = at<int64_t>(spans[6]),
          .batch = batch,
          .nodes = nodes,
          .slots = slots,
          .predicts = at<int32_t>(spans[0]),
          .accept_index = at<int32_t>(spans[1]),
          .accept_token_num = at<int32_t>(spans[2])};
}

void verify_greedy_of(const Spans& spans, SpanTuple target_predict, int64_t batch, int64_t nodes, int64_t slots,
                      int threads) {
  const char* op = "verify_tree_greedy";
  const Walk walk = walk_of(op, spans, batch, nodes, slots);
  check(walk.next_token || !batch, op, "retrive_next_token", "links", "none");
  check_span(op, "target_predict", target_predict, batch * nodes, false);
  check_threads(op, threads);
  py::gil_scoped_release release;
  verify_greedy(walk, at<int64_t>(target_predict), threads);
}

Laws laws_of(const char* op, const char* argument, const LawsTuple& tuple, int64_t batch, int64_t nodes,
             int64_t vocabulary, bool optional) {
  const auto& [address, type, rows, request_stride, row_stride] = tuple;
  if (optional && !address) return {nullptr, ProbType::kF32, 0, 0};
  check_size(op, argument, 0, 2, type);
  check(address || !batch, op, argument, "memory", "none");
  check(rows >= nodes, op, argument, std::to_string(nodes) + " rows a request", rows);
  check(request_stride >= 0 && row_stride >= 0 && request_stride < kMost && row_stride < kMost, op, argument,
        "strides in 0 .. 2**40 - 1", row_stride);
  check_size(op, argument, 1, INT32_MAX, vocabulary);
  return {at<void>(address), (ProbType)type, request_stride, row_stride};
}

Sampling sampling_of(const char* op, const Spans& spans, SpanTuple coins, SpanTuple final_coins, int64_t coins_width,
                     const LawsTuple& target, const LawsTuple& draft, int64_t draft_rows, int64_t batch, int64_t nodes,
                     int64_t slots, int64_t vocabulary, int threads) {
  const Walk walk = walk_of(op, spans, batch, nodes, slots);
  check_threads(op, threads);
  check_size(op, "uniform_samples", nodes - 1, INT32_MAX, coins_width);
  check_span(op, "uniform_samples", coins, batch * coins_width, false);
  check_span(op, "uniform_samples_for_final_sampling", final_coins, batch, false);
  return {.walk = walk,
          .coins = at<float>(coins),
          .final_coins = at<float>(final_coins),
          .coins_width = coins_width,
          .vocabulary = vocabulary,
          .target = laws_of(op, "target_probs", target, batch, nodes, vocabulary, false),
          .draft = laws_of(op, "draft_probs", draft, batch, draft_rows, vocabulary, true),
          .threshold_single = 1,
          .threshold_acc = 1,
          .block_verification = false};
}

void sample_tree_of(const Spans& spans, SpanTuple coins, SpanTuple final_coins, const LawsTuple& target,
                    const LawsTuple& draft, int64_t batch, int64_t nodes, int64_t slots, int64_t vocabulary,
                    double threshold_single, double threshold_acc, int threads) {
  const char* op = "tree_speculative_sampling_target_only";
  Sampling a =
      sampling_of(op, spans, coins, final_coins, nodes, target, draft, nodes, batch, nodes, slots, vocabulary, threads);
  check(a.walk.next_token || !batch, op, "retrive_next_token", "links", "none");
  check(!a.draft.data || a.draft.type == ProbType::kF32 || a.draft.type == a.target.type, op, "draft_probs",
        "float32 or the type of target_probs", (int)a.draft.type);
  a.threshold_single = (float)threshold_single;
  a.threshold_acc = std::max((float)threshold_acc, 1e-9f);
  py::gil_scoped_release release;
  sample_tree(a, threads);
}

void sample_chain_of(const Spans& spans, SpanTuple coins, SpanTuple final_coins, int64_t coins_width,
                     const LawsTuple& target, const LawsTuple& draft, int64_t batch, int64_t nodes, int64_t vocabulary,
                     bool block_verification, int threads) {
  const char* op = "chain_speculative_sampling";
  Sampling a = sampling_of(op, spans, coins, final_coins, coins_width, target, draft, nodes - 1, batch, nodes, nodes,
                           vocabulary, threads);
  check(!a.walk.next_token, op, "retrive_next_token", "no links of a chain", "links");
  check(a.draft.data || !batch || nodes == 1, op, "draft_probs", "memory", "none");
  a.block_verification = block_verification;
  py::gil_scoped_release release;
  sample_chain(a, threads);
}

}  // namespace

void m3::spec_decode::bind_tree(pybind11::module_& m) {
  m.def("spec_decode_tree_finalize", &finalize_of, "Trees of the best candidates: links, ancestors, positions.");
  m.def("spec_decode_tree_commit", &commit_of, "Moves the accepted path in every cache, gathers its hidden states.");
  m.def("spec_decode_build_tree", &build_of, "Links and masks of selected candidates, into the caller's buffers.");
  m.def("spec_decode_reconstruct_tree", &reconstruct_of, "Links and positions of trees given by masks.");
  m.def("spec_decode_verify_greedy", &verify_greedy_of, "Follows the predicted tokens through each tree.");
  m.def("spec_decode_sample_tree", &sample_tree_of, "Walks each tree by the target's probabilities.");
  m.def("spec_decode_sample_chain", &sample_chain_of, "Walks each chain by the target's and the draft's.");
}
