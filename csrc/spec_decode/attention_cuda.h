// Host interface of tree attention on a GPU: what one call is, its memory between kernels, and the launch. Fits any
// compiler.
#pragma once
#include <cstdint>

namespace m3::spec_decode {

// Numbers of types at the border, as in attention_cpu.h.
enum class DeviceType : int { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2, kInt8 = 3 };

// A paged tensor (pages, page_size, kv_heads, ...): strides in elements.
template <class T>
struct Paged {
  const T* data;
  int64_t page, slot, head;
};

struct DeviceAttention {
  int64_t tokens, requests, heads, kv_heads, head_size;
  DeviceType type;  // of q and out: bf16 or fp16
  bool int8;        // caches; otherwise they are of `type`
  const void* q;    // rows of head_size elements, a multiple of 8; 4-byte aligned
  int64_t q_token, q_head;
  Paged<void> k, v;  // rows, and all strides, of a multiple of 16 bytes
  Paged<float> k_scale, v_scale;
  int64_t pages, page_size, table_width;
  const int32_t* block_table;    // (requests, table_width)
  const int32_t* cache_seqlens;  // (requests,)
  const int32_t* cu_seqlens;     // (requests + 1,)
  const int32_t* tree_lens;      // (requests,) or null
  const int32_t* mask_bits;      // (tokens, mask_words) or null: causal
  int64_t mask_words;
  const void* gate;  // null, (tokens, heads) or (tokens, heads, head_size); rows of tokens gate_row elements apart
  DeviceType gate_type;
  bool gate_one;  // one a head
  int64_t gate_row;
  float scale;    // of the scores, log2(e) included
  int window;     // 0: all
  void* out;      // (tokens, heads, head_size)
  float* memory;  // attention_memory(call) floats
};

// Floats that the call needs between its kernels, of the current device: a function of sizes alone.
int64_t attention_memory(const DeviceAttention& call);

void tree_attention(const DeviceAttention& call, void* stream);

}  // namespace m3::spec_decode
