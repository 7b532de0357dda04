// Host interface of the commit of an accepted path on a GPU. Fits any compiler.
#pragma once
#include <cstdint>

namespace m3::spec_decode {

constexpr int kMostCaches = 448;  // of a launch: their addresses are arguments of the kernel

// Caches (pages, page_size, heads, row) of one shape and stride, in units of `unit` bytes.
struct Caches {
  int count;
  int unit;  // 1, 2, 4 or 16 bytes: divides every address, stride and row
  int64_t pages, page_size, heads, row, page, slot, head;
  uint64_t data[kMostCaches];
};

struct DeviceCommit {
  int64_t requests, width, table_width;
  const int32_t* accept_index;   // (requests, width)
  const int32_t* accept_length;  // (requests,)
  const int32_t* block_table;    // (requests, table_width)
  const int32_t* cache_seqlens;  // (requests,): keys before the tree
  int32_t* new_seqlens;          // (requests,), or null: neither they nor hidden states are of this launch
  const void* hidden;            // (requests, nodes, hidden_bytes), or null
  int64_t nodes, hidden_bytes;   // bytes a multiple of 2
  void* accepted;                // (requests, width, hidden_bytes)
};

void tree_commit(const DeviceCommit& call, const Caches& caches, void* stream);

}  // namespace m3::spec_decode
