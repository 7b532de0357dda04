// Walks that draw from given probabilities, on the CPU: a tree by the mass of its siblings, a chain by min(1, p / q).
// Comparisons are in fp32, sums over a row in fp64; one request a task, one order of sums, any number of threads.
#pragma once
#include <cstdint>

#include "spec_decode/tree_cpu.h"

namespace m3::spec_decode {

enum class ProbType : int { kF32 = 0, kBF16 = 1, kF16 = 2 };

// Laws of the nodes: (B, rows, V), the last dimension contiguous; strides in elements. data null: none.
struct Laws {
  void* data;
  ProbType type;
  int64_t request_stride, row_stride;
};

struct Sampling {
  Walk walk;
  const float* coins;        // (B, coins_width)
  const float* final_coins;  // (B)
  int64_t coins_width, vocabulary;
  Laws target, draft;
  float threshold_single, threshold_acc;  // trees
  bool block_verification;                // chains
};

void sample_tree(const Sampling& args, int threads);
void sample_chain(const Sampling& args, int threads);

}  // namespace m3::spec_decode
