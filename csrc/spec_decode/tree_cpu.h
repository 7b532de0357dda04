// Trees of drafted tokens on the CPU: choosing their nodes, linking them, walking them greedily, and committing the
// accepted path to the cache. Pointers that the border has checked; values that memory rests on are checked here,
// before anything is written. Letters: B requests, N nodes of a tree, M candidates, S slots of a path.
#pragma once
#include <cstdint>
#include <vector>

namespace m3::spec_decode {

// The best nodes of all candidates, as a tree. Parents come before their children.
struct Finalize {
  const float* scores;         // (B, M)
  const int64_t* tokens;       // (B, M)
  const int64_t* parent_list;  // (B, L)
  const int64_t* bonus;        // (B)
  const int64_t* seq_lens;     // (B)
  const int32_t* budget;       // (B) or null
  int64_t batch, candidates, list_width, topk, nodes;
  int64_t* out_candidates;  // (B, N)
  int32_t* parents;         // (B, N)
  uint32_t* mask_bits;      // (B, N, ceil(N / 32))
  int64_t* positions;       // (B, N)
  int64_t* next_token;      // (B, N)
  int64_t* next_sibling;    // (B, N)
  int64_t* selected;        // (B, N - 1)
};
void tree_finalize(const Finalize& args, int threads);

// Keys or values of one layer: sizes and strides in bytes.
struct Cache {
  uint8_t* data;
  int64_t page_stride, slot_stride, head_stride, heads, row_bytes;
};

struct Commit {
  const int32_t* accept_index;   // (B, S)
  const int32_t* accept_length;  // (B)
  const int32_t* block_table;    // (B, table_width)
  const int32_t* cache_seqlens;  // (B)
  int64_t batch, slots, table_width, pages, page_size;
  std::vector<Cache> caches;
  const uint8_t* hidden;                                                          // (B, N, C), or null
  int64_t hidden_nodes, hidden_request_stride, hidden_node_stride, hidden_bytes;  // strides and C in bytes
  uint8_t* accepted_hidden;                                                       // (B, S, C)
  int32_t* new_seqlens;                                                           // (B)
};
void tree_commit(const Commit& args, int threads);

// -- ops that write into the caller's buffers and leave every other entry as it was
enum class MaskMode : int { kFull = 0, kQueries = 1, kPacked = 2 };

int64_t bytes_per_row(int64_t nodes);  // of a packed mask

struct Build {
  const int64_t* parent_list;  // (B, L)
  const int64_t* selected;     // (B, N - 1)
  const int64_t* seq_lens;     // (B)
  int64_t batch, list_width, topk, nodes;
  MaskMode mode;
  uint8_t* mask;
  int64_t mask_bytes;
  int64_t* positions;     // (B * N)
  int64_t* index;         // (B, N)
  int64_t* next_token;    // (B, N)
  int64_t* next_sibling;  // (B, N)
};
void build_tree(const Build& args, int threads);

struct Reconstruct {
  const uint8_t* mask;      // (B, N, N)
  const int64_t* seq_lens;  // (B)
  int64_t batch, nodes;
  int64_t* positions;     // (B * N)
  int64_t* index;         // (B, N)
  int64_t* next_token;    // (B, N)
  int64_t* next_sibling;  // (B, N)
};
void reconstruct_tree(const Reconstruct& args, int threads);

// Trees that a walk reads, and where it writes: index (B, N) names the nodes across requests.
struct Walk {
  const int64_t* candidates;    // (B, N)
  const int64_t* index;         // (B, N)
  const int64_t* next_token;    // (B, N), null for chains
  const int64_t* next_sibling;  // (B, N), null for chains
  int64_t batch, nodes, slots;
  int32_t* predicts;      // (B * N)
  int32_t* accept_index;  // (B, S)
  int32_t* accept_token_num;
};

// ValueError unless every node that can be reached has one parent, a place in 0 .. B * N - 1 and, where vocabulary is
// not negative, a token below it.
void check_walk(const char* op, const Walk& walk, int64_t vocabulary);

void verify_greedy(const Walk& walk, const int64_t* target_predict, int threads);

}  // namespace m3::spec_decode
