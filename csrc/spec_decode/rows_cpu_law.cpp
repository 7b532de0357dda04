// The law of one row: thresholds on z found from the maxima of groups (top_k) or from masses between pivots (top_p), a
// list of the tokens kept where they are few, sums of blocks where they are many.
#include "spec_decode/rows_cpu_law.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <numeric>

#include "common/isa.h"

namespace m3::spec_decode::rows {
namespace {

constexpr int64_t kListed = 1024;   // tokens kept, at most, for which each has its mass in double
constexpr int64_t kSample = 1024;   // elements from which a large k-th is guessed
constexpr int64_t kSorted = 256;    // tokens of an interval that are sorted at once
constexpr double kNegligible = 88;  // exp(-x) of more is 0 in fp32

float half(uint16_t word) {
  const uint32_t sign = (uint32_t)(word & 0x8000) << 16, size = (uint32_t)(word & 0x7FFF) << 13;
  uint32_t bits = size | 0x7F800000;
  float value;
  if (size < 0x0F800000) {
    std::memcpy(&value, &size, sizeof value);
    value *= 0x1p112f;
    std::memcpy(&bits, &value, sizeof value);
  }
  bits |= sign;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Where the first of pivots, descending, lies under which a mass of `target` has been reached; kPivots if none.
int first_reached(const double* masses, double above, double target) {
  int j = 0;
  while (j < kPivots && above + masses[j] < target) j++;
  return j;
}

}  // namespace

const Kernels& row_kernels() {
  switch (current_isa()) {
#if defined(__x86_64__)
    case Isa::kAvx512Vnni:
    case Isa::kAvx512:
      return kAvx512Rows;
    case Isa::kAvxVnni:
    case Isa::kAvx2:
      return kAvx2Rows;
#elif defined(__aarch64__) && defined(M3_NEON)
    case Isa::kNeon:
      return kNeonRows;
#endif
    default:
      return kScalarRows;
  }
}

float element(const Row& row, int64_t token) {
  if (row.allowed && !(row.allowed[token / 32] >> (token % 32) & 1)) return kNothing;
  if (row.type == Type::kF32) return clean(static_cast<const float*>(row.logits)[token]);
  const uint16_t word = static_cast<const uint16_t*>(row.logits)[token];
  if (row.type == Type::kF16) return clean(half(word));
  const uint32_t bits = (uint32_t)word << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return clean(value);
}

// -- whole rows -------------------------------------------------------------------------------------------------------
// A number that at least k elements reach, or nearly always do, and not many more: the k-th largest maximum of a group,
// or for large k an element of that rank in a sample.
float Ranking::below_kth(const Row& row, const float* maxima, int64_t k) {
  const int64_t groups = groups_of(row.size);
  int64_t count = groups, rank = k;
  float* sorted = sorted_.get(std::max(groups, kSample));
  if (k <= groups) {
    std::copy(maxima, maxima + groups, sorted);
  } else {
    const double expected = (double)k * kSample / (double)row.size;
    count = kSample, rank = (int64_t)(expected + 4.0 * std::sqrt(expected) + 4.0);
    if (row.size < 4 * kSample || rank > kSample) return -kClip;
    for (int64_t i = 0; i < kSample; i++) sorted[i] = element(row, i * (row.size / kSample));
  }
  std::nth_element(sorted, sorted + rank - 1, sorted + count, std::greater<float>());
  return std::max(-kClip, sorted[rank - 1]);
}

float Ranking::kth(const Kernels& isa, const Row& row, const float* maxima, int64_t k) {
  float low = below_kth(row, maxima, k);
  float* list = list_.get(row.size + kSlack);
  int64_t count = isa.collect(row, maxima, low, HUGE_VALF, row.size, list, nullptr);
  if (count < k && low > -kClip) count = isa.collect(row, maxima, -kClip, HUGE_VALF, row.size, list, nullptr);
  if (count < k) return kNothing;
  std::nth_element(list, list + k - 1, list + count, std::greater<float>());
  return list[k - 1];
}

double Softmax::logprob(double z) const { return (z - maximum) - std::log(total); }

Weight weight_of(float maximum, double temperature, float threshold) {
  const auto inverse = (float)(1.0 / temperature);
  return {maximum, inverse, (float)(1.0 / temperature - inverse), threshold, nullptr, 0.0f};
}

Softmax soften(const Kernels& isa, const Row& row, double temperature, float* maxima, double* sums, float* references) {
  const Weight scale = weight_of(0.0f, temperature, 0.0f);
  const float most = isa.soften(row, scale.inverse, scale.inverse_low, maxima, sums, references);
  double total = 0.0, factor = 0.0;
  for (int64_t b = 0; b < blocks_of(row.size) && most > kNothing; b++) {
    if (!b || references[b] != references[b - 1]) factor = std::exp(((double)references[b] - most) / temperature);
    total += sums[b] *= factor;
  }
  return {most, total};
}

// -- law --------------------------------------------------------------------------------------------------------------
Softmax Law::soften_row(const Row& row, double temperature) {
  sums_ = sums_memory_.get(blocks_of(row.size));
  float* references = references_memory_.get(blocks_of(row.size));
  return soften(*isa_, row, temperature, maxima_, sums_, references);
}

bool Law::set(const Row& row, const Filters& filters, bool raw) {
  isa_ = &row_kernels(), row_ = row, filters_ = filters, count_ = -1;
  maxima_ = maxima_memory_.get(groups_of(row.size));
  const bool top_k = filters.top_k > 0 && filters.top_k < row.size, top_p = filters.top_p < 1.0;
  const bool min_p = filters.min_p > 0.0, plain = !top_k && !top_p && !min_p;
  const bool same = !row.allowed && (!plain || filters.temperature == 1.0);  // one pass gives what the law needs too
  Softmax softmax{};
  if (raw) softmax = raw_ = soften_row({row.logits, row.type, nullptr, row.size}, 1.0);
  if (plain && !(raw && same)) softmax = soften_row(row, filters.temperature);
  const float most = plain || (raw && same) ? softmax.maximum : isa_->scan(row, maxima_);
  if (most == kNothing) return false;
  float lowest = -kClip;
  weight_ = weight_of(most, filters.temperature, lowest);
  total_ = softmax.total;
  if (plain) return true;
  if (top_k) lowest = std::max(lowest, ranking_.kth(*isa_, row, maxima_, filters.top_k));
  if (top_k && filters.top_k <= kListed && shorten(lowest)) {
    weigh_list();
    return true;
  }
  if (top_p) lowest = nucleus(lowest);
  if (min_p) lowest = std::max(lowest, most_of_min_p());
  weight_.threshold = lowest;
  if (shorten(lowest)) {
    filters_.top_p = 1.0, filters_.min_p = 0.0;  // are in the threshold
    weigh_list();
    return true;
  }
  sums_ = sums_memory_.get(blocks_of(row.size));
  isa_->add(row, weight_, maxima_, sums_);
  total_ = 0.0;
  for (int64_t b = 0; b < blocks_of(row.size); b++) total_ += sums_[b];
  return true;
}

// Lists z >= lowest, if they are few.
bool Law::shorten(float lowest) {
  z_ = z_memory_.get(kListed + kGroup + kSlack);
  ids_ = ids_memory_.get(kListed + kGroup + kSlack);
  const int64_t count = isa_->collect(row_, maxima_, lowest, HUGE_VALF, kListed, z_, ids_);
  if (count > kListed) return false;
  count_ = count;
  return true;
}

// Masses of the listed tokens, and what top_p and min_p leave of them.
void Law::weigh_list() {
  mass_ = mass_memory_.get(count_);
  const auto exponent = [&](int64_t i) { return ((double)z_[i] - weight_.maximum) / filters_.temperature; };
  double total = 0.0;
  for (int64_t i = 0; i < count_; i++) total += mass_[i] = std::exp(exponent(i));
  if (filters_.top_p < 1.0) {
    std::vector<int64_t> order((size_t)count_);
    std::iota(order.begin(), order.end(), 0);
    std::sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return z_[a] > z_[b]; });
    double above = 0.0, upto = 0.0;  // above: the mass of all larger z
    for (int64_t i = 0; i < count_; i++) {
      if (i && z_[order[i]] != z_[order[i - 1]]) above = upto;
      upto += mass_[order[i]];
      if (!(above < filters_.top_p * total)) mass_[order[i]] = 0.0;
    }
  }
  const double least = filters_.min_p > 0.0 ? std::log(filters_.min_p) : -HUGE_VAL;
  total_ = 0.0;
  for (int64_t i = 0; i < count_; i++) {
    if (exponent(i) < least) mass_[i] = 0.0;
    total_ += mass_[i];
  }
}

// The smallest z that min_p keeps: bisection over floats in their order.
float Law::most_of_min_p() const {
  const double least = std::log(filters_.min_p);
  const auto number = [](float z) {
    int32_t bits;
    std::memcpy(&bits, &z, sizeof bits);
    return (int64_t)(bits < 0 ? std::numeric_limits<int32_t>::min() - (int64_t)bits : bits);
  };
  const auto value = [](int64_t n) {
    const auto bits = (int32_t)(n < 0 ? std::numeric_limits<int32_t>::min() - n : n);
    float z;
    std::memcpy(&z, &bits, sizeof z);
    return z;
  };
  int64_t out = number(-kClip) - 1, in = number(weight_.maximum);
  while (in - out > 1) {
    const int64_t middle = out + (in - out) / 2;
    const bool kept = ((double)value(middle) - weight_.maximum) / filters_.temperature >= least;
    (kept ? in : out) = middle;
  }
  return value(in);
}

// The smallest z that top_p keeps among z >= lowest. Masses above seven pivots say between which two it lies; the
// tokens there are listed, and the same is done to the list until it is short.
float Law::nucleus(float lowest) const {
  constexpr double steps[kPivots] = {0.5, 1.5, 3.0, 5.0, 7.5, 10.5, 15.0};
  const double most = weight_.maximum, temperature = filters_.temperature;
  float low = (float)std::max<double>(lowest, most - kNegligible * temperature), high = HUGE_VALF, pivots[kPivots];
  double masses[kPivots + 1], above = 0.0;
  for (int j = 0; j < kPivots; j++) pivots[j] = (float)std::max<double>(-kClip, most - steps[j] * temperature);
  Weight weight = weight_;
  weight.threshold = lowest;
  isa_->tally(row_, weight, pivots, masses);
  const double target = filters_.top_p * masses[kPivots];
  const auto narrow = [&] {
    const int j = first_reached(masses, above, target);
    if (j > 0) above += masses[j - 1], high = pivots[j - 1];
    if (j < kPivots) low = std::max(low, pivots[j]);
  };
  narrow();
  float* z = interval_memory_.get(row_.size + kSlack);
  int64_t count = isa_->collect(row_, maxima_, low, high, row_.size, z, nullptr);
  weight.threshold = -kClip;
  while (count > kSorted) {
    const Row interval{z, Type::kF32, nullptr, count};
    float* maxima = interval_maxima_memory_.get(groups_of(count));
    const float top = isa_->scan(interval, maxima);
    const float next = std::nextafter(low, HUGE_VALF);
    if (top < next) return low;
    pivots[0] = top;
    for (int j = 1; j < kPivots; j++)
      pivots[j] = std::max(next, (float)(low + ((double)top - low) * (kPivots - j) / kPivots));
    isa_->tally(interval, weight, pivots, masses);
    if (above + masses[0] >= target) return top;
    narrow();
    if (high == next) return low;
    count = isa_->collect(interval, maxima, low, high, count, z, nullptr);
  }
  std::sort(z, z + count, std::greater<float>());
  float kept = high;
  for (int64_t i = 0; i < count && above < target;) {
    double mass = 0.0;
    for (kept = z[i]; i < count && z[i] == kept; i++) mass += std::exp(((double)kept - most) / temperature);
    above += mass;
  }
  return kept;
}

// -- drawing ----------------------------------------------------------------------------------------------------------
int64_t Law::position(int64_t token) const {
  const int32_t* found = std::lower_bound(ids_, ids_ + count_, token);
  return found != ids_ + count_ && *found == token ? found - ids_ : -1;
}

double Law::probability(int64_t token) const {
  if (token < 0 || token >= row_.size) return 0.0;
  if (count_ >= 0) {
    const int64_t i = position(token);
    return i < 0 ? 0.0 : mass_[i] / total_;
  }
  const float z = element(row_, token);
  return z >= weight_.threshold ? std::exp(((double)z - weight_.maximum) / filters_.temperature) / total_ : 0.0;
}

// First of the list whose cumulative mass exceeds u of the total; the last with mass if rounding leaves none; -1 if
// none has any.
int64_t Law::invert(double u, const double* masses) const {
  const double total = std::accumulate(masses, masses + count_, 0.0);
  double upto = 0.0;
  int64_t last = -1;
  for (int64_t i = 0; i < count_; i++) {
    if (!(masses[i] > 0.0)) continue;
    last = ids_[i], upto += masses[i];
    if (upto > u * total) break;
  }
  return last;
}

// The masses of one block.
void Law::weigh(const Weight& weight, int64_t block, const std::vector<int64_t>& excluded, float* out) const {
  isa_->weigh(row_, weight, block, out);
  for (const int64_t token : excluded)
    if (token >= 0 && token < row_.size && token / kBlock == block) out[token % kBlock] = 0.0f;
}

// The same as invert: by the sums of blocks, then inside one. sums: a copy, which changes where tokens are excluded.
int64_t Law::invert_blocks(double u, const Weight& weight, const std::vector<int64_t>& excluded, double* sums) const {
  const int64_t blocks = blocks_of(row_.size);
  alignas(64) float inside[kBlock];
  for (const int64_t token : excluded) {
    if (token < 0 || token >= row_.size) continue;
    weigh(weight, token / kBlock, excluded, inside);
    sums[token / kBlock] = std::accumulate(inside, inside + kBlock, 0.0);
  }
  const double total = std::accumulate(sums, sums + blocks, 0.0);
  double upto = 0.0;
  int64_t block = -1;
  for (int64_t b = 0; b < blocks; b++) {
    if (!(sums[b] > 0.0)) continue;
    block = b;
    if (upto + sums[b] > u * total) break;
    upto += sums[b];
  }
  if (block < 0) return -1;
  weigh(weight, block, excluded, inside);
  int64_t last = -1;
  for (int64_t i = 0; i < kBlock; i++) {
    if (!(inside[i] > 0.0f)) continue;
    last = block * kBlock + i, upto += (double)inside[i];
    if (upto > u * total) break;
  }
  return last;
}

int64_t Law::draw(double u, const std::vector<int64_t>& excluded) {
  const int64_t count = count_ < 0 ? blocks_of(row_.size) : count_;
  const double* masses = count_ < 0 ? sums_ : mass_;
  double* rest = rest_memory_.get(count);
  std::copy(masses, masses + count, rest);
  if (count_ < 0) return invert_blocks(u, weight_, excluded, rest);
  for (const int64_t token : excluded)
    if (const int64_t i = position(token); i >= 0) rest[i] = 0.0;
  return invert(u, rest);
}

int64_t Law::draw_residual(double u, const float* draft) {
  if (count_ >= 0) {
    double* rest = rest_memory_.get(count_);
    for (int64_t i = 0; i < count_; i++) {
      const float q = draft[ids_[i]];
      rest[i] = std::max(mass_[i] / total_ - (q >= 0.0f && q <= 1.0f ? (double)q : 0.0), 0.0);
    }
    return invert(u, rest);
  }
  Weight weight = weight_;
  weight.draft = draft, weight.inverse_total = (float)(1.0 / total_);
  double* sums = rest_memory_.get(blocks_of(row_.size));
  isa_->add(row_, weight, maxima_, sums);
  return invert_blocks(u, weight, {}, sums);
}

int64_t Law::race(const Noise& noise) const {
  Best best{-HUGE_VAL, -1};
  const auto run = [&](float z, int64_t token) {
    const double score = ((double)z - weight_.maximum) / filters_.temperature + gumbel(noise, token);
    if (score > best.score) best = {score, token};
  };
  for (int64_t i = 0; i < count_; i++)
    if (mass_[i] > 0.0) run(z_[i], ids_[i]);
  if (count_ < 0) {
    run(weight_.maximum, isa_->find(row_, maxima_, weight_.maximum));  // a good score to begin with
    isa_->race(row_, weight_, filters_.temperature, noise, maxima_, best);
  }
  return best.token;
}

void Law::trim() {
  ranking_.trim(), maxima_memory_.trim(), references_memory_.trim(), z_memory_.trim(), ids_memory_.trim();
  interval_memory_.trim(), interval_maxima_memory_.trim();
  mass_memory_.trim(), sums_memory_.trim(), rest_memory_.trim();
}

}  // namespace m3::spec_decode::rows
