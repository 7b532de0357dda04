// What the bindings call: drafting and verification over all requests, on raw pointers that the border has checked.
#pragma once
#include <cstdint>

#include "spec_decode/rows_cpu.h"

namespace m3::spec_decode::rows {

enum class Mode : int { kGreedy = 0, kTargetOnly = 1, kChain = 2, kCoupled = 3 };
enum class Logprobs : int { kNone = 0, kRaw = 1, kSampling = 2 };

// (B, rows, columns): contiguous columns, elements from request to request and from row to row.
struct Rows {
  const void* data;
  int64_t requests, rows, columns, request_stride, row_stride;
};

struct Drafting {
  Rows logits;  // (B, F, V)
  Type type;
  const float* scores;             // (B, F)
  const int64_t* offsets;          // (V,) or null
  const int64_t *seed, *position;  // (B,) or null
  int64_t k, step;
  int64_t* tokens;    // (B, F, k)
  float* cum_scores;  // (B, F, k)
  int64_t* next_ids;  // (B, k) and all below
  float* next_scores;
  int32_t* src_row;
  int64_t* parents;
};

struct Verification {
  Rows logits;  // (B, N, V)
  Type type;
  const int64_t *candidates, *next_token, *next_sibling;  // (B, N); links are -1 or lead to a later node
  const float* temperature;                               // (B,) and all below; all but temperature may be null
  const int32_t* top_k;
  const float *top_p, *min_p;
  const int64_t *seed, *position;
  const double *coins, *final_coins;  // (B, N), (B,)
  Rows draft;                         // (B, N, V) float, or no data
  Rows allowed;                       // (B, N, ceil(V / 32)) uint32_t, or no data
  Mode mode;
  int64_t width;
  Logprobs logprobs;
  int64_t* tokens;        // (B, width)
  int32_t* accept_index;  // (B, width)
  int32_t* accept_length;
  float* token_logprobs;  // (B, width) or null
};

void draft_topk(const Drafting& args, int threads);
void tree_verify(const Verification& args, int threads);

}  // namespace m3::spec_decode::rows
