// Python border of the spec_decode family: rows of logits. Integers that are addresses, sizes that Python has
// validated.
#include <algorithm>
#include <limits>

#include "common/border.h"
#include "spec_decode/rows_cpu_driver.h"

namespace py = pybind11;
using namespace m3;
using namespace m3::spec_decode::rows;

namespace m3::spec_decode {
void bind_rows(pybind11::module_& module);
}

namespace {

// Address, (B, rows, columns), elements from request to request, from row to row; address 0 and sizes 0 for None.
using RowsTuple = std::tuple<uintptr_t, int64_t, int64_t, int64_t, int64_t, int64_t>;
using LogitsTuple = std::tuple<RowsTuple, int>;                               // and the type
using LinksTuple = std::tuple<SpanTuple, SpanTuple, SpanTuple>;               // candidates, next_token, next_sibling
using FiltersTuple = std::tuple<SpanTuple, SpanTuple, SpanTuple, SpanTuple>;  // temperature, top_k, top_p, min_p
using NoiseTuple = std::tuple<SpanTuple, SpanTuple, SpanTuple, SpanTuple>;    // seed, position, coins, final_coins

constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
constexpr int64_t kFar = int64_t{1} << 44;  // elements; no address overflows below it

Rows rows_of(const char* op, const char* argument, const RowsTuple& tuple) {
  const auto& [address, requests, rows, columns, request_step, row_step] = tuple;
  const int64_t request_stride = requests > 1 ? request_step : 0, row_stride = rows > 1 ? row_step : 0;
  const std::string got =
      "(" + std::to_string(requests) + ", " + std::to_string(rows) + ", " + std::to_string(columns) + ")";
  check(requests >= 0 && rows >= 0 && columns >= 0 && requests <= kMost && rows <= kMost && columns <= kMost - kGroup,
        op, argument, "sizes under 2**31 - 256", got);
  check(!requests || !rows ||
            (request_stride >= 0 && row_stride >= 0 && request_stride <= kFar / requests && row_stride <= kFar / rows),
        op, argument, "strides of at least 0, under 2**44 elements", request_stride);
  check(address || !requests || !rows || !columns, op, argument, "memory", "none");
  return {at<const void>(address), requests, rows, columns, request_stride, row_stride};
}

Rows logits_of(const char* op, const LogitsTuple& tuple, Type& type) {
  const Rows rows = rows_of(op, "logits", std::get<0>(tuple));
  check(rows.rows >= 1 && rows.columns >= 1, op, "logits", "a row or more of each request, a vocabulary of at least 1",
        rows.rows);
  const int kind = std::get<1>(tuple);
  check(kind >= 0 && kind <= int(Type::kF16), op, "logits", "type 0 (float32), 1 (bfloat16) or 2 (float16)", kind);
  type = Type(kind);
  return rows;
}

Rows rows_like(const char* op, const char* argument, const RowsTuple& tuple, const Rows& logits, int64_t columns) {
  const Rows rows = rows_of(op, argument, tuple);
  if (!rows.data && !rows.requests && !rows.rows && !rows.columns) return rows;
  const std::string want =
      "(" + std::to_string(logits.requests) + ", " + std::to_string(logits.rows) + ", " + std::to_string(columns) + ")";
  check(rows.requests == logits.requests && rows.rows == logits.rows && rows.columns == columns, op, argument, want,
        "other sizes");
  return rows;
}

void check_threads(const char* op, int threads) {
  check(threads >= 1 && threads <= 4096, op, "threads", "1..4096", threads);
}

// Links that lead to later nodes alone end inside the tree.
void check_links(const char* op, const char* argument, const int64_t* links, int64_t requests, int64_t nodes) {
  const std::string want = "-1, or an index greater than the node's own and below " + std::to_string(nodes);
  for (int64_t b = 0; b < requests; b++)
    for (int64_t i = 0; i < nodes; i++) {
      const int64_t link = links[b * nodes + i];
      check(link == -1 || (link > i && link < nodes), op, argument, want, link);
    }
}

// A temperature is 0 or at least 1e-6; thresholds are searched for, which ends where the others are numbers in 0..1.
void check_filters(const char* op, const float* temperature, const float* top_p, const float* min_p, int64_t requests) {
  for (int64_t b = 0; b < requests; b++) {
    const float t = temperature[b];
    check(t == 0.0f || (t >= 1e-6f && t <= std::numeric_limits<float>::max()), op, "temperature",
          "0, or a finite number of at least 1e-6", t);
    if (top_p) check(top_p[b] > 0.0f && top_p[b] <= 1.0f, op, "top_p", "values in (0, 1]", top_p[b]);
    if (min_p) check(min_p[b] >= 0.0f && min_p[b] <= 1.0f, op, "min_p", "values in [0, 1]", min_p[b]);
  }
}

void check_coins(const char* op, const char* argument, const SpanTuple& span) {
  const auto* coins = at<double>(span);
  for (int64_t i = 0; coins && i < std::get<1>(span); i++)
    check(coins[i] >= 0.0 && coins[i] < 1.0, op, argument, "values in [0, 1)", coins[i]);
}

void draft_topk_of(const LogitsTuple& logits, SpanTuple scores, SpanTuple offsets, SpanTuple seed, SpanTuple position,
                   int64_t k, int64_t step, SpanTuple tokens, SpanTuple cum_scores, SpanTuple next_ids,
                   SpanTuple next_scores, SpanTuple src_row, SpanTuple parents, int threads) {
  const char* op = "draft_topk";
  Drafting a{};
  a.logits = logits_of(op, logits, a.type);
  const int64_t requests = a.logits.requests, rows = a.logits.rows, size = a.logits.columns;
  check(k >= 1 && k <= size, op, "k", "an integer in 1.." + std::to_string(size), k);
  check(step >= 0 && step <= kMost, op, "step", "an integer in 0..2**31 - 1", step);
  check(requests * rows <= kFar / k, op, "k", "under 2**44 candidates", k);
  check_span(op, "scores", scores, requests * rows, false);
  check_span(op, "d2t", offsets, size, true);
  check_span(op, "seed", seed, requests, true);
  check_span(op, "position", position, requests, true);
  check(!at<void>(seed) == !at<void>(position), op, "position", "both seed and position, or neither", "one");
  check_span(op, "tokens", tokens, requests * rows * k, false);
  check_span(op, "cum_scores", cum_scores, requests * rows * k, false);
  check_span(op, "next_ids", next_ids, requests * k, false);
  check_span(op, "next_scores", next_scores, requests * k, false);
  check_span(op, "src_row", src_row, requests * k, false);
  check_span(op, "parents", parents, requests * k, false);
  check_threads(op, threads);
  a.scores = at<float>(scores), a.offsets = at<int64_t>(offsets);
  a.seed = at<int64_t>(seed), a.position = at<int64_t>(position);
  a.k = k, a.step = step;
  a.tokens = at<int64_t>(tokens), a.cum_scores = at<float>(cum_scores), a.next_ids = at<int64_t>(next_ids);
  a.next_scores = at<float>(next_scores), a.src_row = at<int32_t>(src_row), a.parents = at<int64_t>(parents);
  py::gil_scoped_release release;
  draft_topk(a, threads);
}

void tree_verify_of(const LogitsTuple& logits, const LinksTuple& tree, const FiltersTuple& filters,
                    const NoiseTuple& noise, const RowsTuple& draft, const RowsTuple& allowed, int mode, int64_t width,
                    int logprobs, SpanTuple tokens, SpanTuple accept_index, SpanTuple accept_length,
                    SpanTuple token_logprobs, int threads) {
  const char* op = "tree_verify";
  Verification a{};
  a.logits = logits_of(op, logits, a.type);
  const int64_t requests = a.logits.requests, nodes = a.logits.rows, size = a.logits.columns;
  check(mode >= 0 && mode <= int(Mode::kCoupled), op, "mode", "0..3", mode);
  check(logprobs >= 0 && logprobs <= int(Logprobs::kSampling), op, "logprobs", "0..2", logprobs);
  check(width >= 1 && width <= kMost, op, "width", "an integer in 1..2**31 - 1", width);
  a.mode = Mode(mode), a.logprobs = Logprobs(logprobs), a.width = width;
  const auto& [candidates, next_token, next_sibling] = tree;
  check_span(op, "candidates", candidates, requests * nodes, false);
  check_span(op, "next_token", next_token, requests * nodes, false);
  check_span(op, "next_sibling", next_sibling, requests * nodes, false);
  check_links(op, "next_token", at<int64_t>(next_token), requests, nodes);
  check_links(op, "next_sibling", at<int64_t>(next_sibling), requests, nodes);
  const auto& [temperature, top_k, top_p, min_p] = filters;
  check_span(op, "temperature", temperature, requests, false);
  check_span(op, "top_k", top_k, requests, true);
  check_span(op, "top_p", top_p, requests, true);
  check_span(op, "min_p", min_p, requests, true);
  check_filters(op, at<float>(temperature), at<float>(top_p), at<float>(min_p), requests);
  const auto& [seed, position, coins, final_coins] = noise;
  check_span(op, "seed", seed, requests, true);
  check_span(op, "position", position, requests, true);
  check_span(op, "coins", coins, requests * nodes, true);
  check_span(op, "final_coins", final_coins, requests, true);
  check_coins(op, "coins", coins);
  check_coins(op, "final_coins", final_coins);
  a.draft = rows_like(op, "draft_probs", draft, a.logits, size);
  a.allowed = rows_like(op, "grammar_bits", allowed, a.logits, (size + 31) / 32);
  if (requests) {
    const bool drawn = (at<void>(coins) && at<void>(final_coins)) || (a.mode == Mode::kGreedy);
    const bool seeded = at<void>(seed) && at<void>(position);
    check(seeded || (drawn && a.mode != Mode::kCoupled), op, "seed", "seed and position, or coins where they serve",
          "neither");
    check(a.mode != Mode::kChain || a.draft.data, op, "draft_probs", "probabilities for mode 'chain'", "None");
  }
  check_span(op, "tokens", tokens, requests * width, false);
  check_span(op, "accept_index", accept_index, requests * width, false);
  check_span(op, "accept_length", accept_length, requests, false);
  check_span(op, "token_logprobs", token_logprobs, a.logprobs == Logprobs::kNone ? 0 : requests * width, false);
  check_threads(op, threads);
  a.candidates = at<int64_t>(candidates);
  a.next_token = at<int64_t>(next_token), a.next_sibling = at<int64_t>(next_sibling);
  a.temperature = at<float>(temperature), a.top_k = at<int32_t>(top_k);
  a.top_p = at<float>(top_p), a.min_p = at<float>(min_p);
  a.seed = at<int64_t>(seed), a.position = at<int64_t>(position);
  a.coins = at<double>(coins), a.final_coins = at<double>(final_coins);
  a.tokens = at<int64_t>(tokens), a.accept_index = at<int32_t>(accept_index);
  a.accept_length = at<int32_t>(accept_length);
  a.token_logprobs = a.logprobs == Logprobs::kNone ? nullptr : at<float>(token_logprobs);
  py::gil_scoped_release release;
  tree_verify(a, threads);
}

}  // namespace

void m3::spec_decode::bind_rows(py::module_& m) {
  m.def("spec_decode_draft_topk", &draft_topk_of);
  m.def("spec_decode_tree_verify", &tree_verify_of);
}
