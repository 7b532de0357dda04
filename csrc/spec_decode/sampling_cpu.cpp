// Walks that draw from given probabilities: memory-bound, so plain loops that the compiler vectorises. A row is read
// once, block by block, for the mass of each block; then the one block in which the coin falls is read again.
#include "spec_decode/sampling_cpu.h"

#include <omp.h>

#include <algorithm>
#include <bit>

namespace m3::spec_decode {
namespace {

constexpr int64_t kBlock = 1024, kLanes = 8;
constexpr int64_t kWorthThreads = 1 << 15;

float bfloat_bits(uint16_t h) { return std::bit_cast<float>((uint32_t)h << 16); }

// Subnormals, which most probabilities of a large row are, take no slow path: their mantissa is put behind the bits of
// 2^-14, which is then subtracted.
float half_bits(uint16_t h) {
  const uint32_t bits = h, magnitude = (bits & 0x7FFF) << 13, exponent = bits & 0x7C00;
  constexpr uint32_t kSmallest = 113u << 23;  // bits of 2^-14
  const uint32_t subnormal =
      std::bit_cast<uint32_t>(std::bit_cast<float>(kSmallest | magnitude) - std::bit_cast<float>(kSmallest));
  const uint32_t normal = magnitude + (112u << 23) + ((uint32_t)(exponent == 0x7C00) * 112u << 23);
  const uint32_t is_normal = -(uint32_t)(exponent != 0);  // a mask: a branch would not be vectorised
  return std::bit_cast<float>((bits & 0x8000) << 16 | (normal & is_normal) | (subnormal & ~is_normal));
}

// Elements first .. first + count - 1 of a row.
void load(const Laws& laws, int64_t b, int64_t row, int64_t first, int64_t count, float* out) {
  const int64_t offset = b * laws.request_stride + row * laws.row_stride + first;
  const uint16_t* halves = (const uint16_t*)laws.data + offset;
  switch (laws.type) {
    case ProbType::kF32:
      std::copy_n((const float*)laws.data + offset, count, out);
      break;
    case ProbType::kBF16:
      for (int64_t i = 0; i < count; i++) out[i] = bfloat_bits(halves[i]);
      break;
    case ProbType::kF16:
      for (int64_t i = 0; i < count; i++) out[i] = half_bits(halves[i]);
      break;
  }
}

float load_one(const Laws& laws, int64_t b, int64_t row, int64_t token) {
  float value;
  load(laws, b, row, token, 1, &value);
  return value;
}

// draft[b, row, token] = target[b, row, token]; the draft is fp32 or of the target's type.
void copy_one(const Sampling& a, int64_t b, int64_t row, int64_t token) {
  const int64_t to = b * a.draft.request_stride + row * a.draft.row_stride + token;
  if (a.draft.type == ProbType::kF32)
    ((float*)a.draft.data)[to] = load_one(a.target, b, row, token);
  else
    ((uint16_t*)a.draft.data)[to] =
        ((const uint16_t*)a.target.data)[b * a.target.request_stride + row * a.target.row_stride + token];
}

// The measure that the last token is drawn from: max(scale * target - draft, 0) of one row, without tokens rejected.
struct Measure {
  const Sampling& a;
  int64_t b, row;
  float scale = 1;
  bool subtract = false;                           // the draft's row
  bool only_probabilities = false;                 // of the draft: what is none counts 0
  const std::vector<int64_t>* rejected = nullptr;  // ascending; counts 0

  // A block, padded with zeros to whole lanes; NaN counts 0.
  int64_t load_block(int64_t first, float* out) const {
    const int64_t count = std::min(kBlock, a.vocabulary - first);
    load(a.target, b, row, first, count, out);
    if (subtract) {
      float q[kBlock];
      load(a.draft, b, row, first, count, q);
      if (only_probabilities)
        for (int64_t i = 0; i < count; i++) q[i] = q[i] >= 0 && q[i] <= 1 ? q[i] : 0;
      for (int64_t i = 0; i < count; i++) out[i] = scale * out[i] - q[i];
    }
    for (int64_t i = 0; i < count; i++) out[i] = out[i] > 0 ? out[i] : 0;
    if (rejected) {
      auto token = std::lower_bound(rejected->begin(), rejected->end(), first);
      for (; token != rejected->end() && *token < first + count; token++) out[*token - first] = 0;
    }
    const int64_t padded = (count + kLanes - 1) / kLanes * kLanes;
    std::fill(out + count, out + padded, 0.0f);
    return padded;
  }

  // Its total; blocks: masses of the blocks.
  double total(std::vector<double>& blocks) const {
    double sum = 0;
    for (int64_t first = 0, k = 0; first < a.vocabulary; first += kBlock, k++) {
      float values[kBlock];
      const int64_t count = load_block(first, values);
      double lanes[kLanes] = {};
      for (int64_t i = 0; i < count; i += kLanes)
        for (int64_t j = 0; j < kLanes; j++) lanes[j] += values[i + j];
      blocks[k] = 0;
      for (int64_t j = 0; j < kLanes; j++) blocks[k] += lanes[j];
      sum += blocks[k];
    }
    return sum;
  }

  // First token whose cumulative mass exceeds coin * total; if rounding leaves none, the last with mass; without any
  // mass, the last token.
  int64_t draw(float coin, std::vector<double>& blocks) const {
    const float aim = coin * (float)total(blocks);
    double before = 0;
    int64_t last = a.vocabulary - 1;
    for (int64_t first = 0, k = 0; first < a.vocabulary; before += blocks[k], first += kBlock, k++) {
      const bool here = before + blocks[k] > aim;
      if (!(here || (blocks[k] > 0 && !mass_after(blocks, k)))) continue;
      float values[kBlock];
      const int64_t count = load_block(first, values);
      double upto = before;
      for (int64_t i = 0; i < count; i++) {
        upto += values[i];
        if (values[i] > 0) last = first + i;
        if (upto > aim) return first + i;
      }
      return last;
    }
    return last;
  }

  bool mass_after(const std::vector<double>& blocks, int64_t k) const {
    return std::any_of(blocks.begin() + k + 1, blocks.begin() + (a.vocabulary + kBlock - 1) / kBlock,
                       [](double mass) { return mass > 0; });
  }
};

struct Scratch {
  std::vector<double> blocks;
  std::vector<int64_t> rejected;
  std::vector<float> prefixes;
};

std::vector<Scratch> make_scratch(const Sampling& a, int threads) {
  Scratch one{std::vector<double>((a.vocabulary + kBlock - 1) / kBlock), {}, {}};
  std::vector<Scratch> all(threads, one);
  for (Scratch& scratch : all) {  // nothing is allocated among threads
    scratch.rejected.reserve(a.walk.nodes);
    scratch.prefixes.reserve(a.walk.nodes);
  }
  return all;
}

int use_threads(const Sampling& a, int threads) {
  if (a.walk.batch * a.vocabulary < kWorthThreads) return 1;
  return (int)std::max<int64_t>(1, std::min<int64_t>(a.walk.batch, threads));
}

void sample_one_tree(const Sampling& a, int64_t b, Scratch& scratch) {
  const Walk& w = a.walk;
  const int64_t n = w.nodes;
  const int64_t *tokens = w.candidates + b * n, *index = w.index + b * n, *sibling = w.next_sibling + b * n;
  int32_t* path = w.accept_index + b * w.slots;
  std::vector<int64_t>& rejected = scratch.rejected;
  int64_t node = 0, last = index[0], accepted = 0;
  path[0] = (int32_t)last;
  while (accepted + 1 < w.slots) {
    const float coin = a.coins[b * a.coins_width + node];
    float mass = 0;
    rejected.clear();
    int64_t child = w.next_token[b * n + node];
    for (; child != -1; child = sibling[child]) {
      const float p = load_one(a.target, b, node, tokens[child]);
      mass += p;
      if (p > 0 && (coin < mass / a.threshold_acc || p >= a.threshold_single)) break;
      rejected.push_back(tokens[child]);
      if (a.draft.data) copy_one(a, b, node, tokens[child]);
    }
    if (child == -1) break;
    w.predicts[last] = (int32_t)tokens[child];
    node = child, last = index[child];
    path[++accepted] = (int32_t)last;
  }
  w.accept_token_num[b] = (int32_t)accepted;
  Measure measure{.a = a, .b = b, .row = node};
  if (accepted + 1 < w.slots) {
    measure.subtract = a.draft.data;
    std::sort(rejected.begin(), rejected.end());
    measure.rejected = a.draft.data ? nullptr : &rejected;
  }
  w.predicts[last] = (int32_t)measure.draw(a.final_coins[b], scratch.blocks);
}

// Drafts accepted; scale: of the target in the residual. The first coin, from the last draft on, that lets its whole
// prefix pass decides.
int64_t longest_block(const Sampling& a, int64_t b, Scratch& scratch, float& scale) {
  const Walk& w = a.walk;
  const int64_t slots = w.nodes;
  const int64_t* tokens = w.candidates + b * slots;
  const float* coins = a.coins + b * a.coins_width;
  std::vector<float>& prefixes = scratch.prefixes;
  prefixes.clear();
  float prefix = 1;
  for (int64_t step = 1; step < slots; step++) {
    const float p = load_one(a.target, b, step - 1, tokens[step]), q = load_one(a.draft, b, step - 1, tokens[step]);
    const float ratio = q > 0 && q <= 1 ? prefix * p / q : 0;
    prefix = ratio >= 0 ? std::min(ratio, 1.0f) : 0;
    prefixes.push_back(prefix);
  }
  for (int64_t step = slots - 1; step > 0; step--) {
    prefix = prefixes[step - 1];
    if (!(coins[step - 1] < prefix)) continue;
    float chance = prefix;
    if (step < slots - 1 && prefix > 0 && prefix < 1) {
      const Measure residual{
          .a = a, .b = b, .row = step, .scale = prefix, .subtract = true, .only_probabilities = true};
      const float mass = (float)residual.total(scratch.blocks);
      chance = mass / (mass + 1.0f - prefix);
    }
    if (!(coins[step - 1] < chance)) continue;
    scale = prefix;
    return step;
  }
  scale = 1;
  return 0;
}

int64_t longest_run(const Sampling& a, int64_t b) {
  const Walk& w = a.walk;
  const int64_t* tokens = w.candidates + b * w.nodes;
  for (int64_t step = 1; step < w.nodes; step++) {
    const float p = load_one(a.target, b, step - 1, tokens[step]), q = load_one(a.draft, b, step - 1, tokens[step]);
    if (!(q > 0 && q <= 1 && a.coins[b * a.coins_width + step - 1] * q < p)) return step - 1;
  }
  return w.nodes - 1;
}

void sample_one_chain(const Sampling& a, int64_t b, Scratch& scratch) {
  const Walk& w = a.walk;
  const int64_t *tokens = w.candidates + b * w.nodes, *index = w.index + b * w.nodes;
  Measure measure{.a = a, .b = b, .row = 0, .only_probabilities = true};
  measure.row = a.block_verification ? longest_block(a, b, scratch, measure.scale) : longest_run(a, b);
  measure.subtract = measure.row + 1 < w.nodes;
  for (int64_t slot = 0; slot <= measure.row; slot++) {
    w.accept_index[b * w.slots + slot] = (int32_t)index[slot];
    if (slot) w.predicts[index[slot - 1]] = (int32_t)tokens[slot];
  }
  w.accept_token_num[b] = (int32_t)measure.row;
  w.predicts[index[measure.row]] = (int32_t)measure.draw(a.final_coins[b], scratch.blocks);
}

template <class One>
void for_each_request(const Sampling& a, int threads, One one) {
  const int active = use_threads(a, threads);
  std::vector<Scratch> scratch = make_scratch(a, active);
#pragma omp parallel for schedule(dynamic) num_threads(active) if (active > 1)
  for (int64_t b = 0; b < a.walk.batch; b++) one(a, b, scratch[omp_get_thread_num()]);
}

}  // namespace

void sample_tree(const Sampling& a, int threads) {
  check_walk("tree_speculative_sampling_target_only", a.walk, a.vocabulary);
  for_each_request(a, threads, sample_one_tree);
}

void sample_chain(const Sampling& a, int threads) {
  check_walk("chain_speculative_sampling", a.walk, a.vocabulary);
  for_each_request(a, threads, sample_one_chain);
}

}  // namespace m3::spec_decode
