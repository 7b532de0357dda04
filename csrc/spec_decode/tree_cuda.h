// Host interface of the CUDA kernels that draft, build and verify trees. Pointers to device memory whose sizes the
// border has checked; what lies in them is checked by no one: out of range, it is skipped. Letters: B requests, N nodes
// of a tree, V vocabulary, M candidates, S slots of a path.
#pragma once
#include <cstdint>

namespace m3::spec_decode {

enum class Type : int { kF32 = 0, kBf16 = 1, kF16 = 2 };
enum class Mode : int { kGreedy = 0, kTargetOnly = 1, kChain = 2, kCoupled = 3 };
enum class Logprobs : int { kNone = 0, kRaw = 1, kSampling = 2 };

constexpr int64_t kMostVocabulary = 1 << 20;
constexpr int64_t kMostNodes = 1024;

// (B, rows, columns) with contiguous rows; strides in elements.
template <class T>
struct Rows {
  const T* data;
  int64_t request_stride, row_stride;
};

struct Verify {
  Rows<void> logits;            // (B, N, V)
  const int64_t* candidates;    // (B, N)
  const int64_t* next_token;    // (B, N)
  const int64_t* next_sibling;  // (B, N)
  const float* temperature;     // (B)
  const int32_t* top_k;         // (B) or null, as all that follow
  const float* top_p;           // (B)
  const float* min_p;           // (B)
  const int64_t* seed;          // (B)
  const int64_t* position;      // (B)
  const double* coins;          // (B, N)
  const double* final_coins;    // (B)
  Rows<float> draft;            // (B, N, V)
  Rows<uint32_t> allowed;       // (B, N, ceil(V / 32))
  int requests, nodes, vocabulary, width;
  Mode mode;
  Logprobs asked;
  int64_t* tokens;         // (B, S)
  int32_t* accept_index;   // (B, S)
  int32_t* accept_length;  // (B)
  float* logprobs;         // (B, S), or null where none are asked for
};

// ranks: blocks that share a request, a power of two up to 16; 0: as many as the device has room for.
void tree_verify(const Verify& args, Type type, int ranks, void* stream);

// -- trees ------------------------------------------------------------------------------------------------------------
// The best nodes of all candidates, as a tree. Parents come before their children.
struct Finalize {
  const float* scores;         // (B, M)
  const int64_t* tokens;       // (B, M)
  const int64_t* parent_list;  // (B, L)
  const int64_t* bonus;        // (B)
  const int64_t* seq_lens;     // (B)
  const int32_t* budget;       // (B) or null
  int batch, candidates, list_width, topk, nodes;
  int64_t* out_candidates;  // (B, N)
  int32_t* parents;         // (B, N)
  uint32_t* mask_bits;      // (B, N, ceil(N / 32))
  int64_t* positions;       // (B, N)
  int64_t* next_token;      // (B, N)
  int64_t* next_sibling;    // (B, N)
  int64_t* selected;        // (B, N - 1)
};
void tree_finalize(const Finalize& args, void* stream);

enum class MaskMode : int { kFull = 0, kQueries = 1, kPacked = 2 };

struct Build {
  const int64_t* parent_list;  // (B, L)
  const int64_t* selected;     // (B, N - 1)
  const int64_t* seq_lens;     // (B)
  int batch, list_width, topk, nodes;
  MaskMode mode;
  uint8_t* mask;
  int64_t mask_bytes;
  int64_t* positions;     // (B * N)
  int64_t* index;         // (B, N)
  int64_t* next_token;    // (B, N)
  int64_t* next_sibling;  // (B, N)
};
void build_tree(const Build& args, void* stream);

struct Reconstruct {
  const uint8_t* mask;      // (B, N, N)
  const int64_t* seq_lens;  // (B)
  int batch, nodes;
  int64_t* positions;     // (B * N)
  int64_t* index;         // (B, N)
  int64_t* next_token;    // (B, N)
  int64_t* next_sibling;  // (B, N)
};
void reconstruct_tree(const Reconstruct& args, void* stream);

// Follows predicted tokens; index (B, N) names the nodes across requests.
struct Walk {
  const int64_t* candidates;      // (B, N)
  const int64_t* index;           // (B, N)
  const int64_t* next_token;      // (B, N)
  const int64_t* next_sibling;    // (B, N)
  const int64_t* target_predict;  // (B * N)
  int batch, nodes, slots;
  int32_t* predicts;          // (B * N)
  int32_t* accept_index;      // (B, S)
  int32_t* accept_token_num;  // (B)
};
void verify_greedy(const Walk& args, void* stream);

}  // namespace m3::spec_decode
