// Trees: chosen from candidates, read back from masks, walked along given predictions. One block a request, one launch.
#include <algorithm>

#include "spec_decode/rows.cuh"

namespace m3::spec_decode {
namespace {

constexpr int kKeys = 4096;  // candidates whose keys stay in shared memory
constexpr int kDigits = 256;

// Shared memory of a block, in bytes from its beginning.
struct Layout {
  int selected, parents, first_child, next_sibling, digits, keys, bytes;
  __host__ __device__ Layout(int nodes, int candidates) {
    const int n = (nodes + 15) / 16 * 16;
    selected = (sizeof(Board) + 15) / 16 * 16;
    parents = selected + 4 * n;
    first_child = parents + 4 * n;
    next_sibling = first_child + 4 * n;
    digits = next_sibling + 4 * n;
    keys = digits + 4 * kDigits;
    bytes = keys + 4 * min(candidates, kKeys);
  }
};

// -- what all trees share ---------------------------------------------------------------------------------------------
// First children and next younger siblings of nodes by their parents (-1: none), by one warp: from the youngest 32
// nodes to the eldest. first_child holds -1.
M3_DEVICE void link(const int* parents, int nodes, int* first_child, int* next_sibling) {
  const int lane = threadIdx.x % 32;
  const unsigned younger = ~0u << lane << 1;
  for (int base = (nodes - 1) / 32 * 32; base >= 0; base -= 32) {
    const int i = base + lane, parent = i > 0 && i < nodes ? parents[i] : -1;
    const unsigned peers = __match_any_sync(kAll, (unsigned)parent);
    const int near = peers & younger ? base + __ffs(peers & younger) - 1 : -1;
    if (i < nodes) next_sibling[i] = parent < 0 ? -1 : near >= 0 ? near : first_child[parent];
    __syncwarp();
    if (parent >= 0 && !(peers & ~younger & ~(1u << lane))) first_child[parent] = i;
    __syncwarp();
  }
}

// Ancestors of a node as bits, word `lane` in each lane, for one warp: the node itself and all that are met before the
// root or nothing. depth: their number; returns where they end: 0 the root, -1 nothing.
M3_DEVICE int ancestors(const int* parents, int node, int nodes, uint32_t& bits, int& depth) {
  const int lane = threadIdx.x % 32;
  int above = node;
  bits = 0, depth = 0;
  for (; above > 0 && depth < nodes; above = parents[above], ++depth)
    if (above / 32 == lane) bits |= 1u << above % 32;
  return above;
}

// -- the best candidates
// ------------------------------------------------------------------------------------------------
M3_DEVICE uint32_t score_key(float score) { return ordered(score == score ? score : nothing()); }

// Writes the `count` best candidates (1 .. all) by ascending index to `selected`: those above a threshold of the keys,
// found digit by digit from the largest, and the first of those that equal it.
template <class Key>
M3_DEVICE void select(Board* board, int* digits, int candidates, int count, int* selected, Key key) {
  uint32_t prefix = 0;
  Mass ties = (Mass)count;
  for (int shift = 24; shift >= 0; shift -= 8) {
    for (int i = threadIdx.x; i < kDigits; i += kThreads) digits[i] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < candidates; i += kThreads) {
      const uint32_t bits = key(i);
      if (shift == 24 || bits >> (shift + 8) == prefix) atomicAdd(&digits[bits >> shift & 255], 1);
    }
    __syncthreads();
    const int digit = kDigits - 1 - (int)threadIdx.x;
    const Mass own = digit >= 0 ? (Mass)digits[digit] : 0;
    Mass total;
    const Mass before = scan_before(own, board, total);
    if (before < ties && ties <= before + own) board->found = digit, board->rest = ties - before;
    __syncthreads();
    prefix = prefix << 8 | (uint32_t)board->found;
    ties = board->rest;
  }
  Mass equal = 0, taken = 0;  // so far
  for (int base = 0; base < candidates; base += kThreads) {
    const int i = base + (int)threadIdx.x;
    const uint32_t bits = i < candidates ? key(i) : 0;
    const bool tie = i < candidates && bits == prefix;
    Mass all;
    const Mass elder = equal + scan_before(tie, board, all);
    equal += all;
    const bool take = i < candidates && (bits > prefix || (tie && elder < ties));
    const Mass at = taken + scan_before(take, board, all);
    taken += all;
    if (take) selected[at] = i;
  }
  __syncthreads();
}

// Grid: (requests). A block holds the keys of its candidates, the nodes chosen and their parents in shared memory;
// then warp 0 links the nodes while the others walk up from theirs. A node that does not reach the root is padding.
__global__ void __launch_bounds__(kThreads, 1) finalize_kernel(const Finalize a) {
  char* shared = shared_memory();
  const Layout at(a.nodes, a.candidates);
  Board* board = (Board*)shared;
  int *selected = (int*)(shared + at.selected), *parents = (int*)(shared + at.parents);
  int *first_child = (int*)(shared + at.first_child), *next_sibling = (int*)(shared + at.next_sibling);
  uint32_t* keys = (uint32_t*)(shared + at.keys);
  const int64_t b = blockIdx.x;
  const int n = a.nodes, m = a.candidates, words = (n + 31) / 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const float* scores = a.scores + b * m;
  const int kept = a.budget ? max(1, min(a.budget[b], n)) : n, count = min(kept - 1, m);
  const int64_t length = a.seq_lens[b], bonus = a.bonus[b];
  for (int i = threadIdx.x; i < min(m, kKeys); i += kThreads) keys[i] = score_key(__ldg(scores + i));
  for (int i = threadIdx.x; i < n; i += kThreads) first_child[i] = -1;
  __syncthreads();
  if (count > 0)
    select(board, (int*)(shared + at.digits), m, count, selected,
           [&](int i) { return i < kKeys ? keys[i] : score_key(__ldg(scores + i)); });
  for (int i = threadIdx.x; i < n; i += kThreads) {
    int parent = -1;
    if (i > 0 && i <= count) {
      const int column = selected[i - 1] / a.topk;
      if (column == 0) {
        parent = 0;
      } else if (column < a.list_width) {
        const int64_t wanted = __ldg(a.parent_list + b * a.list_width + column);
        int low = 0, high = i - 1;
        while (low < high) {
          const int middle = (low + high) / 2;
          if (selected[middle] < wanted)
            low = middle + 1;
          else
            high = middle;
        }
        if (low < i - 1 && selected[low] == wanted) parent = low + 1;
      }
    }
    parents[i] = parent;
    if (i > 0) a.selected[b * (n - 1) + i - 1] = i <= count ? selected[i - 1] : -1;
  }
  __syncthreads();
  if (warp == 0) link(parents, n, first_child, next_sibling);
  for (int i = (warp + kWarps - 1) % kWarps; i < n; i += kWarps) {  // warp 0 comes last
    uint32_t bits;
    int depth;
    const bool placed = ancestors(parents, i, n, bits, depth) == 0;
    if (!placed) bits = i / 32 == lane ? 1u << i % 32 : 0, depth = 0;
    if (placed && lane == 0) bits |= 1;
    const int64_t node = b * n + i;
    if (lane < words) a.mask_bits[node * words + lane] = bits;
    if (lane == 0) {
      a.positions[node] = length + depth;
      a.parents[node] = placed ? parents[i] : -1;
      a.out_candidates[node] = i == 0 ? bonus : placed ? __ldg(a.tokens + b * m + selected[i - 1]) : -1;
      if (i > 0 && !placed) selected[i - 1] = -1;
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < n; i += kThreads) {
    const bool placed = i == 0 || selected[i - 1] >= 0;
    a.next_token[b * n + i] = placed ? first_child[i] : -1;
    a.next_sibling[b * n + i] = placed ? next_sibling[i] : -1;
  }
}

// -- trees in the caller's buffers ------------------------------------------------------------------------------------
// Bytes of a row of a packed mask: 1, 2 or 4, beyond 32 nodes whole words.
__host__ __device__ __forceinline__ int bytes_per_row(int nodes) {
  return nodes <= 8 ? 1 : nodes <= 16 ? 2 : (nodes + 31) / 32 * 4;
}

// Grid: (requests). Parents are looked up among the selected nodes, the first that equals the entry of the column. A
// warp then writes the mask of a node; bytes outside the mask are written by no one, links that are none stay as the
// caller left them.
__global__ void __launch_bounds__(kThreads, 1) build_kernel(const Build a) {
  char* shared = shared_memory();
  const Layout at(a.nodes, 0);
  Board* board = (Board*)shared;
  int *selected = (int*)(shared + at.selected), *parents = (int*)(shared + at.parents);
  int *first_child = (int*)(shared + at.first_child), *next_sibling = (int*)(shared + at.next_sibling);
  const int64_t b = blockIdx.x;
  const int n = a.nodes, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  Mass sum = 0, before;  // keys of the requests before this one
  if (a.mode == MaskMode::kFull)
    for (int64_t r = threadIdx.x; r < b; r += kThreads) sum += (Mass)__ldg(a.seq_lens + r);
  scan_before(sum, board, before);
  for (int i = threadIdx.x; i < n - 1; i += kThreads) {
    const int64_t index = __ldg(a.selected + b * (n - 1) + i);
    selected[i] = index >= 0 && index <= INT32_MAX ? (int)index : -1;  // what is no candidate has no parent
  }
  for (int i = threadIdx.x; i < n; i += kThreads) first_child[i] = -1;
  __syncthreads();
  for (int i = threadIdx.x; i < n; i += kThreads) {
    int parent = -1;
    if (i > 0 && selected[i - 1] >= 0) {
      const int column = selected[i - 1] / a.topk;
      if (column == 0) {
        parent = 0;
      } else if (column < a.list_width) {
        const int64_t wanted = __ldg(a.parent_list + b * a.list_width + column);
        for (int j = 0; j < n - 1 && parent < 0; ++j)
          if (selected[j] == wanted && wanted >= 0) parent = j + 1;
      }
    }
    parents[i] = parent;
  }
  __syncthreads();
  if (warp == 0) link(parents, n, first_child, next_sibling);
  const int64_t length = a.seq_lens[b];
  const int width = a.mode == MaskMode::kPacked ? bytes_per_row(n) : n;
  for (int i = (warp + kWarps - 1) % kWarps; i < n; i += kWarps) {  // warp 0 comes last
    uint32_t bits;
    int depth;
    ancestors(parents, i, n, bits, depth);
    if (lane == 0) bits |= 1;
    const int64_t node = b * n + i;
    if (lane == 0) a.positions[node] = length + depth, a.index[node] = node;
    int64_t place = node * width;
    if (a.mode == MaskMode::kFull) place = n * ((int64_t)before + b * n) + (length + n) * i + length;
    const int64_t room = place >= 0 ? min(a.mask_bytes - place, (int64_t)width) : 0;
    for (int base = 0; base < width; base += 32) {
      const int j = base + lane;
      const uint32_t word = __shfl_sync(kAll, bits, a.mode == MaskMode::kPacked ? j / 4 % 32 : base / 32);
      if (j >= room) continue;
      if (a.mode == MaskMode::kPacked)
        a.mask[place + j] = (uint8_t)((j ? a.mask[place + j] : 0) | (word >> (8 * (j % 4)) & 0xFF));
      else
        a.mask[place + j] = (uint8_t)(word >> lane & 1);
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < n; i += kThreads) {
    if (first_child[i] >= 0) a.next_token[b * n + i] = first_child[i];
    if (next_sibling[i] >= 0) a.next_sibling[b * n + i] = next_sibling[i];
  }
}

// Grid: (requests). A warp reads the row of a node: its ancestors' number is its depth, the last of them its parent,
// and it is the first child of every ancestor that no elder node has.
__global__ void __launch_bounds__(kThreads, 1) reconstruct_kernel(const Reconstruct a) {
  char* shared = shared_memory();
  const Layout at(a.nodes, 0);
  int *parents = (int*)(shared + at.parents), *first_child = (int*)(shared + at.first_child);
  int *eldest = (int*)(shared + at.selected), *next_sibling = (int*)(shared + at.next_sibling);
  const int64_t b = blockIdx.x;
  const int n = a.nodes, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const uint8_t* mask = a.mask + b * n * n;
  const int64_t length = a.seq_lens[b];
  for (int i = threadIdx.x; i < n; i += kThreads) first_child[i] = -1, eldest[i] = INT32_MAX;
  __syncthreads();
  for (int i = warp; i < n; i += kWarps) {
    int parent = -1, depth = 0;
#pragma unroll 4
    for (int base = 0; base < i; base += 32) {
      const int j = base + lane;
      const bool up = j < i && __ldg(mask + (int64_t)i * n + j);
      const unsigned those = __ballot_sync(kAll, up);
      if (those) parent = base + 31 - __clz(those);
      depth += __popc(those);
      if (up) atomicMin(&eldest[j], i);
    }
    if (lane == 0) {
      parents[i] = parent;
      a.positions[b * n + i] = length + depth;
      a.index[b * n + i] = b * n + i;
    }
  }
  __syncthreads();
  if (warp == 0) link(parents, n, first_child, next_sibling);
  __syncthreads();
  for (int i = threadIdx.x; i < n; i += kThreads) {
    a.next_token[b * n + i] = eldest[i] < n ? eldest[i] : -1;
    a.next_sibling[b * n + i] = next_sibling[i];
  }
}

// -- following predictions --------------------------------------------------------------------------------------------
// Grid: (requests). All that a walk may read is loaded at once: what would be a chain of loads from device memory is
// one of shared memory, walked by thread 0. Places and links outside the tree are taken as ends.
__global__ void __launch_bounds__(kThreads, 1) greedy_kernel(const Walk a) {
  int64_t* shared = (int64_t*)shared_memory();
  const int64_t b = blockIdx.x, total = (int64_t)a.batch * a.nodes;
  const int n = a.nodes;
  int64_t *tokens = shared, *targets = tokens + n, *places = targets + n;
  int *next_token = (int*)(places + n), *next_sibling = next_token + n;
  for (int i = threadIdx.x; i < n; i += kThreads) {
    const int64_t place = __ldg(a.index + b * n + i);
    const int64_t child = __ldg(a.next_token + b * n + i), sibling = __ldg(a.next_sibling + b * n + i);
    tokens[i] = __ldg(a.candidates + b * n + i);
    places[i] = place;
    targets[i] = place >= 0 && place < total ? __ldg(a.target_predict + place) : 0;
    next_token[i] = child >= 0 && child < n ? (int)child : -1;
    next_sibling[i] = sibling >= 0 && sibling < n ? (int)sibling : -1;
  }
  __syncthreads();
  if (threadIdx.x) return;
  int* path = a.accept_index + b * a.slots;
  int node = 0, accepted = 0, steps = 0;
  for (;;) {
    path[accepted] = (int)places[node];
    if (places[node] < 0 || places[node] >= total) break;
    int child = accepted + 1 < a.slots ? next_token[node] : -1;
    while (child >= 0 && steps < n && tokens[child] != targets[node]) child = next_sibling[child], ++steps;
    a.predicts[places[node]] = (int)targets[node];
    if (child < 0 || steps >= n) break;
    node = child, ++accepted, ++steps;
  }
  a.accept_token_num[b] = accepted;
}

template <class Kernel, class Arguments>
void start(const char* op, Kernel kernel, const Arguments& a, int64_t requests, int bytes, void* stream) {
  launch(op, kernel,
         {.grid = dim3((unsigned)requests),
          .block = dim3(kThreads),
          .shared_bytes = bytes,
          .stream = (cudaStream_t)stream},
         a);
}

}  // namespace

void tree_finalize(const Finalize& a, void* stream) {
  start("tree_finalize", finalize_kernel, a, a.batch, Layout(a.nodes, a.candidates).bytes, stream);
}

void build_tree(const Build& a, void* stream) {
  start("build_tree_kernel_efficient", build_kernel, a, a.batch, Layout(a.nodes, 0).bytes, stream);
}

void reconstruct_tree(const Reconstruct& a, void* stream) {
  start("reconstruct_indices_from_tree_mask", reconstruct_kernel, a, a.batch, Layout(a.nodes, 0).bytes, stream);
}

void verify_greedy(const Walk& a, void* stream) {
  start("verify_tree_greedy", greedy_kernel, a, a.batch, 32 * a.nodes, stream);
}

}  // namespace m3::spec_decode
