// Every instruction set's kernels of rows of logits against the portable ones, which the Python tests hold against the
// reference: drafting and verification of random trees decide the same. Exit status 1 on a failure.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "common/isa.h"
#include "spec_decode/rows_cpu_driver.h"

using namespace m3;
using namespace m3::spec_decode::rows;

namespace {

constexpr int64_t kRequests = 3, kNodes = 5, kWidth = 4, kTopk = 6;

struct Inputs {
  int64_t size;
  Type type;
  bool masked, filtered;
  std::vector<float> logits, draft;
  std::vector<uint16_t> halves;
  std::vector<uint32_t> allowed;
  std::vector<int64_t> candidates, next_token, next_sibling, seed, position;
  std::vector<float> temperature, top_p, min_p, scores;
  std::vector<int32_t> top_k;
  std::vector<double> coins, final_coins;

  Inputs(int64_t size, Type type, bool masked, bool filtered, unsigned random_seed)
      : size(size), type(type), masked(masked), filtered(filtered) {
    std::mt19937 generator(random_seed);
    std::normal_distribution<float> normal(0.0f, 2.0f);
    std::uniform_real_distribution<double> uniform(0.0, 1.0);
    const int64_t rows = kRequests * kNodes;
    for (int64_t i = 0; i < rows * size; i++) {
      logits.push_back(generator() % 50 ? normal(generator) : generator() % 2 ? -HUGE_VALF : (float)NAN);
      draft.push_back((float)(uniform(generator) * 2.0 / (double)size));
      uint32_t bits;
      std::memcpy(&bits, &logits.back(), sizeof bits);
      // As fp16: sign, a few exponents, ten bits; the same words serve as bf16.
      halves.push_back((uint16_t)((bits >> 16 & 0x8000) | (0x3400 + generator() % 0x1000)));
    }
    for (int64_t i = 0; i < rows * ((size + 31) / 32); i++) allowed.push_back((uint32_t)generator());
    for (int64_t b = 0; b < kRequests; b++) {
      for (int64_t i = 0; i < kNodes; i++) {  // a root, its children 1 and 2, below 1: 3 and 4
        candidates.push_back((int64_t)(generator() % (unsigned)size));
        next_token.push_back(i == 0 ? 1 : i == 1 ? 3 : -1);
        next_sibling.push_back(i == 1 ? 2 : i == 3 ? 4 : -1);
        coins.push_back(uniform(generator) * 0.1);
      }
      logits[(b * kNodes) * size + candidates[b * kNodes + 1]] = 9.0f;
      temperature.push_back(b == 0 ? 1.0f : 0.8f), top_k.push_back(b == 1 ? 7 : 0);
      top_p.push_back(0.9f), min_p.push_back(0.01f);
      seed.push_back((int64_t)generator() << 20), position.push_back((int64_t)generator());
      final_coins.push_back(uniform(generator));
      for (int64_t i = 0; i < kNodes; i++) scores.push_back(-(float)uniform(generator));
    }
  }
  Rows rows() const {
    const void* data = type == Type::kF32 ? (const void*)logits.data() : (const void*)halves.data();
    return {data, kRequests, kNodes, size, kNodes * size, size};
  }
};

struct Verified {
  std::vector<int64_t> numbers;
  std::vector<float> logprobs;
};

Verified verify(const Inputs& in, Mode mode) {
  std::vector<int64_t> tokens(kRequests * kWidth);
  std::vector<int32_t> path(kRequests * kWidth), length(kRequests);
  Verified found;
  found.logprobs.resize(kRequests * kWidth);
  Verification a{};
  a.logits = in.rows(), a.type = in.type;
  a.candidates = in.candidates.data(), a.next_token = in.next_token.data(), a.next_sibling = in.next_sibling.data();
  a.temperature = in.temperature.data();
  if (in.filtered) a.top_k = in.top_k.data(), a.top_p = in.top_p.data(), a.min_p = in.min_p.data();
  a.seed = in.seed.data(), a.position = in.position.data();
  a.coins = in.coins.data(), a.final_coins = in.final_coins.data();
  a.draft = {in.draft.data(), kRequests, kNodes, in.size, kNodes * in.size, in.size};
  const int64_t words = (in.size + 31) / 32;
  if (in.masked) a.allowed = {in.allowed.data(), kRequests, kNodes, words, kNodes * words, words};
  a.mode = mode, a.width = kWidth, a.logprobs = in.masked ? Logprobs::kRaw : Logprobs::kSampling;
  a.tokens = tokens.data(), a.accept_index = path.data(), a.accept_length = length.data();
  a.token_logprobs = found.logprobs.data();
  tree_verify(a, 2);
  found.numbers = tokens;
  found.numbers.insert(found.numbers.end(), path.begin(), path.end());
  found.numbers.insert(found.numbers.end(), length.begin(), length.end());
  return found;
}

Verified draft(const Inputs& in, bool noise) {
  const int64_t k = std::min(kTopk, in.size);
  std::vector<int64_t> tokens(kRequests * kNodes * k), next_ids(kRequests * k), parents(kRequests * k);
  std::vector<float> next_scores(kRequests * k);
  std::vector<int32_t> src_row(kRequests * k);
  Verified found;
  found.logprobs.resize(kRequests * kNodes * k);
  Drafting a{};
  a.logits = in.rows(), a.type = in.type, a.scores = in.scores.data();
  if (noise) a.seed = in.seed.data(), a.position = in.position.data();
  a.k = k, a.step = 1;
  a.tokens = tokens.data(), a.cum_scores = found.logprobs.data(), a.next_ids = next_ids.data();
  a.next_scores = next_scores.data(), a.src_row = src_row.data(), a.parents = parents.data();
  draft_topk(a, 2);
  found.numbers = tokens;
  found.numbers.insert(found.numbers.end(), next_ids.begin(), next_ids.end());
  found.numbers.insert(found.numbers.end(), parents.begin(), parents.end());
  return found;
}

int failures = 0;

void compare(const std::string& isa, const char* what, const Inputs& in, const Verified& got, const Verified& want) {
  bool good = got.numbers == want.numbers;
  for (size_t i = 0; i < got.logprobs.size(); i++)
    good = good && (got.logprobs[i] == want.logprobs[i] || std::fabs(got.logprobs[i] - want.logprobs[i]) < 1e-5f);
  if (good) return;
  failures++;
  std::printf("%s %s V=%ld type %d masked %d filtered %d\n", isa.c_str(), what, (long)in.size, int(in.type), in.masked,
              in.filtered);
}

template <class Run>
void check(const char* what, const Inputs& in, Run run) {
  set_isa("scalar");
  const Verified want = run();
  for (const std::string& isa : isas()) {
    set_isa(isa);
    compare(isa, what, in, run(), want);
  }
}

}  // namespace

int main(int argc, char** argv) {
  const auto seed = (unsigned)std::strtoul(argc > 1 ? argv[1] : "0", nullptr, 10);
  for (const int64_t size : {1, 5, 63, 256, 261, 1300})
    for (const Type type : {Type::kF32, Type::kBf16, Type::kF16})
      for (const int options : {0, 1, 2, 3}) {
        const Inputs in(size, type, options & 1, options & 2, seed);
        check("greedy", in, [&] { return verify(in, Mode::kGreedy); });
        check("target_only", in, [&] { return verify(in, Mode::kTargetOnly); });
        check("chain", in, [&] { return verify(in, Mode::kChain); });
        check("coupled", in, [&] { return verify(in, Mode::kCoupled); });
        check("draft", in, [&] { return draft(in, false); });
        check("noise", in, [&] { return draft(in, true); });
      }
  return failures > 0;
}
