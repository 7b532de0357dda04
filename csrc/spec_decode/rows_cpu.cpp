// The CPU driver of rows of logits: drafting by rows, the walk through a tree by requests. A row, and a request's walk,
// is one thread's work from end to end.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <exception>
#include <vector>

#include "spec_decode/rows_cpu_driver.h"
#include "spec_decode/rows_cpu_law.h"

namespace m3::spec_decode::rows {
namespace {

// visit(i) for 0 <= i < count. What a thread throws is thrown here.
template <class Visit>
void for_each(int64_t count, int threads, Visit visit) {
  threads = (int)std::min<int64_t>(threads, std::max<int64_t>(1, count));
  if (threads == 1) {
    for (int64_t i = 0; i < count; i++) visit(i);
    return;
  }
  std::atomic<int64_t> next{0};
  std::exception_ptr error;
#pragma omp parallel num_threads(threads)
  {
    try {
      for (int64_t i; (i = next.fetch_add(1)) < count;) visit(i);
    } catch (...) {
#pragma omp critical(m3_spec_decode_rows)
      error = std::current_exception();
    }
  }
  if (error) std::rethrow_exception(error);
}

Row row_of(const Rows& rows, Type type, int64_t b, int64_t i, const uint32_t* allowed) {
  const int64_t bytes = type == Type::kF32 ? 4 : 2;
  const char* data = static_cast<const char*>(rows.data) + (b * rows.request_stride + i * rows.row_stride) * bytes;
  return {data, type, allowed, rows.columns};
}

template <class T>
const T* words_of(const Rows& rows, int64_t b, int64_t i) {
  return rows.data ? static_cast<const T*>(rows.data) + b * rows.request_stride + i * rows.row_stride : nullptr;
}

// -- drafting ---------------------------------------------------------------------------------------------------------
class Drafter {
 public:
  // The k best of a row, best first, ties to the lower id: ids, and log-probabilities in nats.
  void rank(Row row, const Noise* noise, const int64_t* offsets, int64_t k, int64_t* ids, double* logprobs) {
    const Kernels& isa = row_kernels();
    const Row given = row;
    if (noise) {
      float* noisy = noisy_.get(groups_of(row.size) * kGroup);
      isa.perturb(row, *noise, offsets, noisy);
      row = {noisy, Type::kF32, nullptr, row.size};
    }
    float* maxima = maxima_.get(groups_of(row.size));
    const int64_t blocks = blocks_of(row.size);
    const Softmax softmax = soften(isa, row, 1.0, maxima, sums_.get(blocks), references_.get(blocks));
    const float kth = ranking_.kth(isa, row, maxima, k);
    found_.clear();
    // With noise, tokens within rounding of the k-th are ranked again in double.
    const float low = noise && kth > kNothing ? kth - 1e-5f * (1.0f + std::fabs(kth)) : std::nextafter(kth, HUGE_VALF);
    take(isa, row, maxima, std::max(low, -kClip), HUGE_VALF, noise ? row.size : k);
    for (auto& [score, id] : found_)
      if (noise) score = (double)element(given, id) + gumbel(*noise, offsets ? shifted(id, offsets[id]) : id);
    std::sort(found_.begin(), found_.end(), [](const Scored& a, const Scored& b) {
      return a.score > b.score || (a.score == b.score && a.id < b.id);
    });
    const int64_t missing = k - (int64_t)found_.size();
    if (missing > 0 && kth > kNothing) take(isa, row, maxima, kth, std::nextafter(kth, HUGE_VALF), missing);
    for (int64_t id = 0; (int64_t)found_.size() < k; id++)  // fewer than k tokens are possible
      if (element(row, id) == kNothing) found_.push_back({kNothing, id});
    for (int64_t i = 0; i < k; i++) {
      ids[i] = found_[i].id;
      logprobs[i] = found_[i].score == kNothing ? kNothing : softmax.logprob(found_[i].score);
    }
  }
  void trim() {
    ranking_.trim(), sums_.trim(), references_.trim(), noisy_.trim(), maxima_.trim(), z_.trim(), ids_.trim();
  }

 private:
  struct Scored {
    double score;
    int64_t id;
  };

  void take(const Kernels& isa, const Row& row, const float* maxima, float low, float high, int64_t limit) {
    const int64_t room = std::min(limit, row.size) + kGroup + kSlack;
    float* z = z_.get(room);
    int32_t* ids = ids_.get(room);
    const int64_t count = std::min(limit, isa.collect(row, maxima, low, high, limit, z, ids));
    for (int64_t i = 0; i < count; i++) found_.push_back({z[i], ids[i]});
  }

  Ranking ranking_;
  Kept<double> sums_;
  Kept<float> references_, noisy_, maxima_, z_;
  Kept<int32_t> ids_;
  std::vector<Scored> found_;
};

void draft_row(const Drafting& a, int64_t b, int64_t f) {
  thread_local Drafter drafter;
  thread_local std::vector<double> logprobs;
  logprobs.resize((size_t)a.k);
  const Noise noise = a.seed ? Noise{(uint64_t)a.seed[b], (uint64_t)a.position[b]} : Noise{};
  const int64_t r = b * a.logits.rows + f;
  int64_t* tokens = a.tokens + r * a.k;
  drafter.rank(row_of(a.logits, a.type, b, f, nullptr), a.seed ? &noise : nullptr, a.offsets, a.k, tokens,
               logprobs.data());
  for (int64_t i = 0; i < a.k; i++) {
    if (a.offsets) tokens[i] = shifted(tokens[i], a.offsets[tokens[i]]);
    const auto score = (float)((double)a.scores[r] + logprobs[i]);
    a.cum_scores[r * a.k + i] = std::isnan(score) ? kNothing : score;
  }
  drafter.trim();
}

// The k best of a request's F * k: each row descends, so the next best is the head of one of them.
void expand(const Drafting& a, int64_t b) {
  const int64_t k = a.k, rows = a.logits.rows, base = a.step == 0 ? 0 : k + (a.step - 1) * k * k;
  const float* scores = a.cum_scores + b * rows * k;
  std::vector<int64_t> head((size_t)rows, 0);
  for (int64_t i = 0; i < k; i++) {
    int64_t best = -1;
    for (int64_t f = 0; f < rows; f++)
      if (head[f] < k && (best < 0 || scores[f * k + head[f]] > scores[best * k + head[best]])) best = f;
    const int64_t flat = best * k + head[best]++;
    a.next_ids[b * k + i] = a.tokens[b * rows * k + flat];
    a.next_scores[b * k + i] = scores[flat];
    a.src_row[b * k + i] = (int32_t)best;
    a.parents[b * k + i] = base + flat;
  }
}

// -- verification -----------------------------------------------------------------------------------------------------
struct Step {
  int64_t token, child;  // -1: none
  double logprob;
};

class Walk {
 public:
  void run(const Verification& args, int64_t b) {
    a_ = &args, b_ = b;
    const int64_t width = args.width;
    int64_t* tokens = args.tokens + b * width;
    int32_t* path = args.accept_index + b * width;
    std::fill(tokens, tokens + width, -1);
    std::fill(path, path + width, -1);
    float* logprobs = args.token_logprobs ? args.token_logprobs + b * width : nullptr;
    if (logprobs) std::fill(logprobs, logprobs + width, 0.0f);
    const bool greedy = args.mode == Mode::kGreedy || args.temperature[b] == 0.0f;
    int64_t node = 0, depth = 0;
    path[0] = 0;
    for (;; depth++) {
      node_ = node, depth_ = depth;
      first_ = depth + 1 < width ? links(args.next_token)[node] : -1;
      const Row row = row_of(args.logits, args.type, b, node, words_of<uint32_t>(args.allowed, b, node));
      const Step step = greedy ? follow_largest(row) : follow(row);
      tokens[depth] = step.token;
      if (logprobs) logprobs[depth] = (float)step.logprob;
      if (step.child < 0) break;
      node = step.child, path[depth + 1] = (int32_t)node;
    }
    args.accept_length[b] = (int32_t)depth;
    law_.trim(), maxima_.trim(), references_.trim(), sums_.trim();
  }

 private:
  const int64_t* links(const int64_t* of) const { return of + b_ * a_->logits.rows; }
  int64_t token_of(int64_t node) const { return links(a_->candidates)[node]; }
  int64_t sibling(int64_t node) const { return links(a_->next_sibling)[node]; }
  template <class T>
  T of(const T* values, T none) const {
    return values ? values[b_] : none;
  }
  Noise noise() const { return {(uint64_t)a_->seed[b_], (uint64_t)a_->position[b_] + (uint64_t)depth_}; }
  double node_coin() const { return a_->coins ? a_->coins[b_ * a_->logits.rows + node_] : coin(noise(), kNodeCoin); }
  double final_coin() const { return a_->final_coins ? a_->final_coins[b_] : coin(noise(), kFinalCoin); }

  static Row unmasked(const Row& row) { return {row.logits, row.type, nullptr, row.size}; }

  int64_t child_with(int64_t token) const {
    int64_t child = first_;
    while (child >= 0 && token_of(child) != token) child = sibling(child);
    return child;
  }

  Step follow_largest(const Row& row) {
    const Kernels& isa = row_kernels();
    float* maxima = maxima_.get(groups_of(row.size));
    Softmax raw{};
    if (a_->logprobs == Logprobs::kRaw) {
      const int64_t blocks = blocks_of(row.size);
      raw = soften(isa, unmasked(row), 1.0, maxima, sums_.get(blocks), references_.get(blocks));
    }
    const bool known = a_->logprobs == Logprobs::kRaw && !row.allowed;
    const float most = known ? raw.maximum : isa.scan(row, maxima);
    if (most == kNothing) return {-1, -1, 0.0};
    const int64_t token = isa.find(row, maxima, most);
    const double logprob = a_->logprobs == Logprobs::kRaw ? raw.logprob(element(unmasked(row), token)) : 0.0;
    return {token, child_with(token), logprob};
  }

  Step follow(const Row& row) {
    const Filters filters{a_->temperature[b_], of(a_->top_k, 0), of(a_->top_p, 1.0f), of(a_->min_p, 0.0f)};
    if (!law_.set(row, filters, a_->logprobs == Logprobs::kRaw)) return {-1, -1, 0.0};
    Step step = a_->mode == Mode::kCoupled ? coupled() : a_->mode == Mode::kChain ? chain() : target_only();
    if (a_->logprobs == Logprobs::kSampling) step.logprob = std::log(law_.probability(step.token));
    if (a_->logprobs == Logprobs::kRaw) step.logprob = law_.raw().logprob(element(unmasked(row), step.token));
    return step;
  }

  Step coupled() {
    const int64_t token = law_.race(noise());
    return {token, child_with(token), 0.0};
  }

  Step target_only() {
    rejected_.clear();
    const double u = first_ >= 0 ? node_coin() : 0.0;
    double mass = 0.0;
    for (int64_t child = first_; child >= 0; child = sibling(child)) {
      const int64_t token = token_of(child);
      if (std::find(rejected_.begin(), rejected_.end(), token) != rejected_.end()) continue;
      const double p = law_.probability(token);
      mass += p;
      if (p > 0.0 && u < mass) return {token, child, 0.0};
      rejected_.push_back(token);
    }
    int64_t token = law_.draw(final_coin(), rejected_);
    if (token < 0) token = law_.draw(final_coin(), {});  // the children have all the mass but what rounding took
    return {token, -1, 0.0};
  }

  Step chain() {
    int64_t token = -1;
    if (first_ >= 0) {
      const float* draft = words_of<float>(a_->draft, b_, node_);
      token = token_of(first_);
      const double p = law_.probability(token), q = p > 0.0 ? (double)draft[token] : 0.0;
      if (q > 0.0 && q <= 1.0 && node_coin() * q < p) return {token, first_, 0.0};
      token = law_.draw_residual(final_coin(), draft);
    }
    if (token < 0) token = law_.draw(final_coin(), {});
    return {token, -1, 0.0};
  }

  const Verification* a_ = nullptr;
  int64_t b_ = 0, node_ = 0, depth_ = 0, first_ = -1;
  Law law_;
  Kept<float> maxima_, references_;
  Kept<double> sums_;
  std::vector<int64_t> rejected_;
};

}  // namespace

void draft_topk(const Drafting& args, int threads) {
  const int64_t rows = args.logits.rows;
  for_each(args.logits.requests * rows, threads, [&](int64_t r) { draft_row(args, r / rows, r % rows); });
  for_each(args.logits.requests, 1, [&](int64_t b) { expand(args, b); });
}

void tree_verify(const Verification& args, int threads) {
  for_each(args.logits.requests, threads, [&](int64_t b) {
    thread_local Walk walk;
    walk.run(args, b);
  });
}

}  // namespace m3::spec_decode::rows
