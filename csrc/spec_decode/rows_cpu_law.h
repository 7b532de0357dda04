// The law of one row of logits (m3kernels/spec_decode/law.py says what it is), and what is drawn from it.
#pragma once
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include "spec_decode/rows_cpu_noise.h"

namespace m3::spec_decode::rows {

// The kernels of the instruction set in use.
const Kernels& row_kernels();

// Memory that stays with its thread between calls, unless it is large: fresh pages cost more than what is done in them.
template <class T>
class Kept {
 public:
  T* get(int64_t count) {
    if ((int64_t)memory_.size() < count) memory_ = {}, memory_.resize((size_t)count);
    return memory_.data();
  }
  void trim() {
    if (memory_.size() * sizeof(T) > kKeep) memory_ = {};
  }

 private:
  static constexpr size_t kKeep = size_t{64} << 20;
  std::vector<T> memory_;
};

inline int64_t groups_of(int64_t size) { return (size + kGroup - 1) / kGroup; }
inline int64_t blocks_of(int64_t size) { return (size + kBlock - 1) / kBlock; }

// z of one token.
float element(const Row& row, int64_t token);

// The k-th largest z of a row.
class Ranking {
 public:
  // 1 <= k <= size; -inf if fewer than k are larger.
  float kth(const Kernels& isa, const Row& row, const float* maxima, int64_t k);
  void trim() { sorted_.trim(), list_.trim(); }

 private:
  float below_kth(const Row& row, const float* maxima, int64_t k);

  Kept<float> sorted_, list_;
};

// Masses exp((z - maximum) / temperature) of a row, added in blocks in one pass.
struct Softmax {
  float maximum;
  double total;  // 0 where the maximum is -inf

  double logprob(double z) const;  // in nats, at temperature 1
};

// exp((z - maximum) / temperature) in the kernels' arithmetic: 1 / temperature is the sum of two floats.
Weight weight_of(float maximum, double temperature, float threshold);

// sums: room for a double a block; references: for a float.
Softmax soften(const Kernels& isa, const Row& row, double temperature, float* maxima, double* sums, float* references);

struct Filters {
  double temperature;
  int64_t top_k;  // 0: none
  double top_p;   // 1: none
  double min_p;   // 0: none
};

// Tokens with their mass: of all of a row, or of a short list. Where few tokens are kept, each has its own mass in
// double; else masses are fp32, added in blocks.
class Law {
 public:
  // False if the row allows no token. With `raw`, its softmax as given, without grammar and temperature, is taken too.
  bool set(const Row& row, const Filters& filters, bool raw);
  const Softmax& raw() const { return raw_; }
  // Probability of a token; 0 for what is none.
  double probability(int64_t token) const;
  // The token at u of the cumulative mass of all but the excluded; -1 if those have none.
  int64_t draw(double u, const std::vector<int64_t>& excluded);
  // The same for max(p - q, 0), where q outside 0..1 counts as 0.
  int64_t draw_residual(double u, const float* draft);
  // argmax of x - log E(noise, token), ties to the lowest.
  int64_t race(const Noise& noise) const;
  void trim();

 private:
  Softmax soften_row(const Row& row, double temperature);
  bool shorten(float lowest);
  void weigh_list();
  float nucleus(float lowest) const;
  float most_of_min_p() const;
  int64_t invert(double u, const double* masses) const;
  int64_t invert_blocks(double u, const Weight& weight, const std::vector<int64_t>& excluded, double* sums) const;
  void weigh(const Weight& weight, int64_t block, const std::vector<int64_t>& excluded, float* out) const;
  int64_t position(int64_t token) const;  // in the list, or -1

  const Kernels* isa_ = nullptr;
  Row row_{};
  Filters filters_{};
  Weight weight_{};
  double total_ = 0.0;
  Softmax raw_{};
  float* maxima_ = nullptr;
  double* sums_ = nullptr;  // of the blocks, where there is no list
  int64_t count_ = -1;      // tokens in the list; -1: there is none
  float* z_ = nullptr;      // of the list, as ids_ and mass_
  int32_t* ids_ = nullptr;
  double* mass_ = nullptr;
  Ranking ranking_;
  Kept<float> maxima_memory_, references_memory_, z_memory_;
  mutable Kept<float> interval_memory_, interval_maxima_memory_;
  Kept<int32_t> ids_memory_;
  Kept<double> mass_memory_, sums_memory_, rest_memory_;
};

}  // namespace m3::spec_decode::rows
