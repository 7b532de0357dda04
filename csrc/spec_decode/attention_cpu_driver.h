// What the bindings call: tree attention on raw pointers whose sizes the border has checked.
#pragma once
#include <cstdint>

#include "spec_decode/attention_cpu.h"

namespace m3::spec_decode {

struct Cache {
  const char* data;
  int64_t page_stride, slot_stride, head_stride;  // bytes
};

// One of each row of an int8 cache: the row is integers * scale.
struct Scales {
  const float* data;                              // null: none
  int64_t page_stride, slot_stride, head_stride;  // elements
};

struct Attention {
  int64_t requests, heads, kv_heads, size;
  const char* q;
  int64_t q_row_stride, q_head_stride;  // bytes
  Type type;                            // of q and out
  Cache keys, values;
  Type cache_type;
  Scales k_scale, v_scale;  // with int8 caches
  int64_t num_pages, page_size;
  const int32_t* block_table;  // (requests, max_pages)
  int64_t max_pages;
  const int32_t* cache_seqlens;  // (requests,)
  const int32_t* cu_seqlens_q;   // (requests + 1,)
  const int32_t* mask_bits;      // (T, mask_words), null: causal
  int64_t mask_words;
  const int32_t* tree_lens;  // (requests,): last keys of which mask_bits speak; null: as many as queries
  const char* gate;          // (T, heads) or (T, heads, size), null: none
  int64_t gate_row_stride;   // elements from row to row; a row is contiguous
  bool gate_one;             // one a head
  Type gate_type;
  float softmax_scale;
  int64_t window;  // 0: none
  char* out;       // (T, heads, size)
};

// Throws std::invalid_argument for a block id that is needed and out of range.
void tree_attention(const Attention& args, int threads);

}  // namespace m3::spec_decode
