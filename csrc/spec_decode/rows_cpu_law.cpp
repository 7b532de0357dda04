// The law of one row: thresholds on z found from the maxima of groups (top_k) or from masses between pivots (top_p), a
// list of the tokens kept where they are few, sums of blocks where they are many.
#include "spec_decode/rows_cpu_law.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>

#include "common/isa.h"

namespace m3::spec_decode::rows {
namespace {

constexpr int64_t kListed = 1024;   // tokens kept, at most, for which each has its mass in double
constexpr int64_t kSorted = 256;    // tokens of an interval that are sorted at once
constexpr double kNegligible = 88;  // exp(-x) of more is 0 in fp32

// exp((z - maximum) / temperature) in the kernels' arithmetic: 1 / temperature as a sum of two floats.
Weight weight_of(float maximum, double temperature, float threshold) {
  const auto inverse = (float)(1.0 / temperature);
  return {maximum, inverse, (float)(1.0 / temperature - inverse), threshold, nullptr, 0.0f};
}

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

// -- ranking ----------------------------------------------------------------------------------------------------------
float Ranking::kth(const Kernels& isa, const Row& row, const float* maxima, int64_t k) {
  float low = -kClip;
  if (const int64_t groups = groups_of(row.size); k <= groups) {  // k groups hold at least one as large
    float* sorted = sorted_.get(groups);
    std::copy(maxima, maxima + groups, sorted);
    std::nth_element(sorted, sorted + k - 1, sorted + groups, std::greater<float>());
    low = std::max(low, sorted[k - 1]);
  }
  float* list = list_.get(row.size + kSlack);
  const int64_t count = isa.collect(row, maxima, low, HUGE_VALF, row.size, list, nullptr);
  if (count < k) return kNothing;
  std::nth_element(list, list + k - 1, list + count, std::greater<float>());
  return list[k - 1];
}

double Normalizer::log_total(const Kernels& isa, const Row& row, float* maxima) {
  const int64_t blocks = blocks_of(row.size);
  double* sums = sums_.get(blocks);
  float* references = references_.get(blocks);
  const float most = isa.soften(row, 1.0f, 0.0f, maxima, sums, references);
  if (most == kNothing) return kNothing;
  double total = 0.0, scale = 0.0;
  for (int64_t b = 0; b < blocks; b++) {
    if (!b || references[b] != references[b - 1]) scale = std::exp((double)references[b] - most);
    total += sums[b] * scale;
  }
  return most + std::log(total);
}

// -- law --------------------------------------------------------------------------------------------------------------
bool Law::set(const Row& row, const Filters& filters) {
  isa_ = &row_kernels(), row_ = row, filters_ = filters, count_ = -1;
  float* maxima = maxima_memory_.get(groups_of(row.size));
  maxima_ = maxima;
  const float most = isa_->scan(row, maxima);
  if (most == kNothing) return false;
  float lowest = -kClip;
  const auto shorten = [&] {
    float* z = z_.get(kListed + kGroup + kSlack);
    int32_t* ids = ids_.get(kListed + kGroup + kSlack);
    return isa_->collect(row_, maxima_, lowest, HUGE_VALF, kListed, z, ids);
  };
  weight_ = weight_of(most, filters.temperature, lowest);
  const bool top_k = filters.top_k > 0 && filters.top_k < row.size, top_p = filters.top_p < 1.0;
  if (top_k) {
    lowest = std::max(lowest, ranking_.kth(*isa_, row, maxima, filters.top_k));
    if (filters.top_k <= kListed) {
      if (const int64_t count = shorten(); count <= kListed) {
        list(count);
        return true;
      }
    }
  }
  if (top_p) lowest = nucleus(lowest, filters.top_p);
  if (filters.min_p > 0.0) {
    const double least = std::log(filters.min_p);
    const auto keeps = [&](float z) { return ((double)z - most) / filters.temperature >= least; };
    auto z = (float)std::max(-(double)kClip, most + least * filters.temperature);
    while (z < most && !keeps(z)) z = std::nextafter(z, HUGE_VALF);
    while (z > -kClip && keeps(std::nextafter(z, -HUGE_VALF))) z = std::nextafter(z, -HUGE_VALF);
    lowest = std::max(lowest, std::min(z, most));
  }
  weight_.threshold = lowest;
  if (top_k || top_p || filters.min_p > 0.0) {
    if (const int64_t count = shorten(); count <= kListed) {
      filters_.top_p = 1.0, filters_.min_p = 0.0;
      list(count);
      return true;
    }
  }
  double* sums = sums_.get(blocks_of(row.size));
  isa_->add(row, weight_, maxima, sums);
  total_ = 0.0;
  for (int64_t b = 0; b < blocks_of(row.size); b++) total_ += sums[b];
  return true;
}

// Masses of the listed tokens, and what top_p and min_p leave of them.
void Law::list(int64_t count) {
  const float* z = z_.get(0);
  double* mass = mass_.get(count);
  const auto exponent = [&](int64_t i) { return ((double)z[i] - weight_.maximum) / filters_.temperature; };
  double total = 0.0;
  for (int64_t i = 0; i < count; i++) total += mass[i] = std::exp(exponent(i));
  if (filters_.top_p < 1.0) {
    std::vector<int64_t> order((size_t)count);
    for (int64_t i = 0; i < count; i++) order[i] = i;
    std::sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return z[a] > z[b]; });
    double above = 0.0, upto = 0.0;  // above: the mass of all larger z
    for (int64_t i = 0; i < count; i++) {
      if (i && z[order[i]] != z[order[i - 1]]) above = upto;
      upto += mass[order[i]];
      if (!(above < filters_.top_p * total)) mass[order[i]] = 0.0;
    }
  }
  const double least = filters_.min_p > 0.0 ? std::log(filters_.min_p) : -HUGE_VAL;
  total_ = 0.0;
  for (int64_t i = 0; i < count; i++) {
    if (exponent(i) < least) mass[i] = 0.0;
    total_ += mass[i];
  }
  count_ = count;
}

// The smallest z that top_p keeps among z >= lowest. Masses above seven pivots say between which two it lies; the
// tokens there are listed, and the same is done to the list until it is short.
float Law::nucleus(float lowest, double top_p) {
  constexpr double steps[kPivots] = {0.5, 1.5, 3.0, 5.0, 7.5, 10.5, 15.0};
  const double most = weight_.maximum, temperature = filters_.temperature;
  float low = (float)std::max<double>(lowest, most - kNegligible * temperature), high = HUGE_VALF, pivots[kPivots];
  double masses[kPivots + 1], above = 0.0;
  for (int j = 0; j < kPivots; j++) pivots[j] = (float)std::max<double>(-kClip, most - steps[j] * temperature);
  Weight weight = weight_;
  weight.threshold = lowest;
  isa_->tally(row_, weight, pivots, masses);
  const double target = top_p * masses[kPivots];
  const auto narrow = [&] {
    const int j = first_reached(masses, above, target);
    if (j > 0) above += masses[j - 1], high = pivots[j - 1];
    if (j < kPivots) low = std::max(low, pivots[j]);
  };
  narrow();
  float* z = interval_.get(row_.size + kSlack);
  int64_t count = isa_->collect(row_, maxima_, low, high, row_.size, z, nullptr);
  weight.threshold = -kClip;
  while (count > kSorted) {
    const Row interval{z, Type::kF32, nullptr, count};
    const float top = isa_->scan(interval, interval_maxima_.get(groups_of(count)));
    const float next = std::nextafter(low, HUGE_VALF);
    if (top < next) return low;
    pivots[0] = top;
    for (int j = 1; j < kPivots; j++)
      pivots[j] = std::max(next, (float)(low + ((double)top - low) * (kPivots - j) / kPivots));
    isa_->tally(interval, weight, pivots, masses);
    if (above + masses[0] >= target) return top;
    narrow();
    if (high == next) return low;
    count = isa_->collect(interval, interval_maxima_.get(0), low, high, count, z, nullptr);
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

double Law::probability(int64_t token) const {
  if (token < 0 || token >= row_.size) return 0.0;
  if (count_ < 0) {
    const float z = element(row_, token);
    return z >= weight_.threshold ? std::exp(((double)z - weight_.maximum) / filters_.temperature) / total_ : 0.0;
  }
  const int32_t* ids = const_cast<Kept<int32_t>&>(ids_).get(0);
  const int32_t* found = std::lower_bound(ids, ids + count_, token);
  if (found == ids + count_ || *found != token) return 0.0;
  return const_cast<Kept<double>&>(mass_).get(0)[found - ids] / total_;
}

// First of the list whose cumulative mass exceeds u of the total; the last with mass if rounding leaves none; -1 if
// none has any.
int64_t Law::invert(double u, const double* masses) const {
  const int32_t* ids = const_cast<Kept<int32_t>&>(ids_).get(0);
  double total = 0.0, upto = 0.0;
  for (int64_t i = 0; i < count_; i++) total += masses[i];
  int64_t last = -1;
  for (int64_t i = 0; i < count_; i++) {
    if (!(masses[i] > 0.0)) continue;
    last = ids[i], upto += masses[i];
    if (upto > u * total) break;
  }
  return last;
}

void Law::weigh(const Weight& weight, int64_t block, const std::vector<int64_t>& excluded, float* out) const {
  isa_->weigh(row_, weight, block, out);
  for (const int64_t token : excluded)
    if (token >= 0 && token < row_.size && token / kBlock == block) out[token % kBlock] = 0.0f;
}

// The same over blocks: by their sums, then inside one.
int64_t Law::invert_blocks(double u, const Weight& weight, const std::vector<int64_t>& excluded) {
  const int64_t blocks = blocks_of(row_.size);
  const double* given = weight.draft ? residual_sums_.get(0) : sums_.get(0);
  double* sums = residual_.get(blocks);
  std::copy(given, given + blocks, sums);
  alignas(64) float inside[kBlock];
  for (const int64_t token : excluded) {
    if (token < 0 || token >= row_.size) continue;
    weigh(weight, token / kBlock, excluded, inside);
    sums[token / kBlock] = 0.0;
    for (const float mass : inside) sums[token / kBlock] += (double)mass;
  }
  double total = 0.0, upto = 0.0;
  for (int64_t b = 0; b < blocks; b++) total += sums[b];
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
  if (count_ < 0) return invert_blocks(u, weight_, excluded);
  const int32_t* ids = ids_.get(0);
  double* rest = residual_.get(count_);
  std::copy(mass_.get(0), mass_.get(0) + count_, rest);
  for (const int64_t token : excluded) {
    const int32_t* found = std::lower_bound(ids, ids + count_, token);
    if (found != ids + count_ && *found == token) rest[found - ids] = 0.0;
  }
  return invert(u, rest);
}

int64_t Law::draw_residual(double u, const float* draft) {
  const auto valid = [](float q) { return q >= 0.0f && q <= 1.0f ? q : 0.0f; };
  if (count_ >= 0) {
    const int32_t* ids = ids_.get(0);
    const double* mass = mass_.get(0);
    double* rest = residual_.get(count_);
    for (int64_t i = 0; i < count_; i++) rest[i] = std::max(mass[i] / total_ - valid(draft[ids[i]]), 0.0);
    return invert(u, rest);
  }
  Weight weight = weight_;
  weight.draft = draft, weight.inverse_total = (float)(1.0 / total_);
  isa_->add(row_, weight, maxima_, residual_sums_.get(blocks_of(row_.size)));
  return invert_blocks(u, weight, {});
}

int64_t Law::race(const Noise& noise) const {
  Best best{-HUGE_VAL, -1};
  const auto run = [&](float z, int64_t token) {
    const double score = ((double)z - weight_.maximum) / filters_.temperature + gumbel(noise, token);
    if (score > best.score) best = {score, token};
  };
  if (count_ >= 0) {
    const float* z = const_cast<Kept<float>&>(z_).get(0);
    const int32_t* ids = const_cast<Kept<int32_t>&>(ids_).get(0);
    const double* mass = const_cast<Kept<double>&>(mass_).get(0);
    for (int64_t i = 0; i < count_; i++)
      if (mass[i] > 0.0) run(z[i], ids[i]);
  } else {
    run(weight_.maximum, isa_->find(row_, maxima_, weight_.maximum));  // a good score to begin with
    isa_->race(row_, weight_, filters_.temperature, noise, maxima_, best);
  }
  return best.token;
}

void Law::trim() {
  ranking_.trim(), maxima_memory_.trim(), interval_.trim(), interval_maxima_.trim(), z_.trim(), ids_.trim();
  mass_.trim(), residual_.trim(), sums_.trim(), residual_sums_.trim();
}

}  // namespace m3::spec_decode::rows
