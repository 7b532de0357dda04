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

// Finds the k-th largest z of a row, 1 <= k <= size, from the maxima of its groups; -inf if fewer than k are larger.
class Ranking {
 public:
  float kth(const Kernels& isa, const Row& row, const float* maxima, int64_t k);
  void trim() { sorted_.trim(), list_.trim(); }

 private:
  Kept<float> sorted_, list_;
};

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
  // False if the row allows no token.
  bool set(const Row& row, const Filters& filters);
  // Probability of a token; 0 for what is none.
  double probability(int64_t token) const;
  // The token at u of the cumulative mass, without those excluded; -1 if the others have none.
  int64_t draw(double u, const std::vector<int64_t>& excluded);
  // The same for max(p - q, 0), where q outside 0..1 counts as 0.
  int64_t draw_residual(double u, const float* draft);
  // argmax of x - log E(noise, token).
  int64_t race(const Noise& noise) const;
  void trim();

 private:
  void list(int64_t count);
  float nucleus(float lowest, double top_p);
  int64_t invert(double u, const double* masses) const;
  int64_t invert_blocks(double u, const Weight& weight, const std::vector<int64_t>& excluded);
  void weigh(const Weight& weight, int64_t block, const std::vector<int64_t>& excluded, float* out) const;

  const Kernels* isa_ = nullptr;
  Row row_{};
  Filters filters_{};
  Weight weight_{};
  int64_t count_ = -1;  // tokens in the list; -1: none is made
  double total_ = 0.0;
  const float* maxima_ = nullptr;
  Ranking ranking_;
  Kept<float> maxima_memory_, interval_, interval_maxima_, z_;
  Kept<int32_t> ids_;
  Kept<double> mass_, residual_, sums_, residual_sums_;
};

// log sum exp of a row, given room for the maxima of its groups; -inf for a row of -inf.
class Normalizer {
 public:
  double log_total(const Kernels& isa, const Row& row, float* maxima);
  void trim() { sums_.trim(), references_.trim(); }

 private:
  Kept<double> sums_;
  Kept<float> references_;
};

}  // namespace m3::spec_decode::rows
