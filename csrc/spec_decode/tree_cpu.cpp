// Trees of drafted tokens on the CPU: integers only, one request a task. Every order is fixed, so results do not depend
// on the number of threads.
#include "spec_decode/tree_cpu.h"

#include <omp.h>

#include <algorithm>
#include <bit>
#include <cstring>

#include "common/check.h"

namespace m3::spec_decode {
namespace {

constexpr int64_t kWordBits = 32;
constexpr int64_t kWorthThreads = 1 << 15;  // elements, or bytes, below which one thread is faster

int use_threads(int64_t tasks, int64_t work, int threads) {
  return work < kWorthThreads ? 1 : (int)std::max<int64_t>(1, std::min<int64_t>(tasks, threads));
}

std::string between(int64_t low, int64_t high) {
  return "values in " + std::to_string(low) + ".." + std::to_string(high);
}

// -- tree_finalize ----------------------------------------------------------------------------------------------------

// Ascending keys are descending scores, ties by index. NaN counts as -inf, and the two zeros are one score.
uint64_t sort_key(float score, int64_t index) {
  const uint32_t bits = std::bit_cast<uint32_t>(score != score ? -__builtin_inff() : score + 0.0f);
  const uint32_t ascending = bits >> 31 ? ~bits : bits | 0x80000000u;
  return (uint64_t)~ascending << 32 | (uint32_t)index;
}

// One request; keys: M words, places: N words of scratch.
void finalize_one(const Finalize& a, int64_t b, uint64_t* keys, int64_t* places) {
  const int64_t n = a.nodes, m = a.candidates, words = (n + kWordBits - 1) / kWordBits;
  const int64_t kept = a.budget ? std::clamp<int64_t>(a.budget[b], 1, n) : n, count = std::min(kept - 1, m);
  const float* scores = a.scores + b * m;
  for (int64_t i = 0; i < m; i++) keys[i] = sort_key(scores[i], i);
  if (count < m) std::nth_element(keys, keys + count, keys + m);
  int64_t* selected = a.selected + b * (n - 1);
  for (int64_t i = 0; i < count; i++) selected[i] = (int64_t)(uint32_t)keys[i];
  std::sort(selected, selected + count);
  std::fill(selected + count, selected + n - 1, -1);

  int64_t *candidates = a.out_candidates + b * n, *positions = a.positions + b * n;
  int64_t *next_token = a.next_token + b * n, *next_sibling = a.next_sibling + b * n;
  int32_t* parents = a.parents + b * n;
  uint32_t* bits = a.mask_bits + b * n * words;
  std::fill(candidates, candidates + n, -1);
  std::fill(parents, parents + n, -1);
  std::fill(next_token, next_token + n, -1);
  std::fill(next_sibling, next_sibling + n, -1);
  std::fill(positions, positions + n, a.seq_lens[b]);
  std::fill(bits, bits + n * words, 0);
  candidates[0] = a.bonus[b];
  bits[0] = 1;
  int64_t* youngest = places;  // child of each node so far, -1 none
  std::fill(youngest, youngest + n, -1);
  for (int64_t i = 1; i < n; i++) {
    uint32_t* row = bits + i * words;
    row[i / kWordBits] = 1u << i % kWordBits;
    if (i > count) continue;
    const int64_t column = selected[i - 1] / a.topk;
    int64_t parent = 0;
    if (column > 0) {
      if (column >= a.list_width) continue;
      const int64_t wanted = a.parent_list[b * a.list_width + column];
      const int64_t* found = std::lower_bound(selected, selected + i - 1, wanted);
      if (found == selected + i - 1 || *found != wanted) continue;
      parent = found - selected + 1;
      if (parents[parent] < 0) continue;  // padding itself
    }
    candidates[i] = a.tokens[b * m + selected[i - 1]];
    parents[i] = (int32_t)parent;
    positions[i] = positions[parent] + 1;
    for (int64_t w = 0; w <= parent / kWordBits; w++) row[w] |= bits[parent * words + w];
    (youngest[parent] < 0 ? next_token[parent] : next_sibling[youngest[parent]]) = i;
    youngest[parent] = i;
  }
}

// -- tree_commit ------------------------------------------------------------------------------------------------------

void check_commit(const Commit& a) {
  const char* op = "tree_commit";
  for (int64_t b = 0; b < a.batch; b++) {
    const int64_t length = a.accept_length[b], prefix = a.cache_seqlens[b];
    check(length >= 0 && length < a.slots, op, "accept_length", between(0, a.slots - 1), length);
    check(prefix >= 0 && prefix < INT32_MAX - a.slots, op, "cache_seqlens", "values of at least 0", prefix);
    const int32_t* path = a.accept_index + b * a.slots;
    for (int64_t j = 0; j <= length; j++) {
      const bool good = j ? path[j] > path[j - 1] : path[j] >= 0;
      check(good, op, "accept_index", "paths of ascending nodes", path[j]);
    }
    if (a.hidden)
      check(path[length] < a.hidden_nodes, op, "accept_index", between(0, a.hidden_nodes - 1), path[length]);
    if (a.caches.empty()) continue;
    const int64_t keys = prefix + path[length] + 1;
    const std::string want = "block ids in 0.." + std::to_string(a.pages - 1) + " for the " + std::to_string(keys) +
                             " keys of request " + std::to_string(b);
    for (int64_t j = 0; j <= length; j++)
      for (const int64_t slot : {prefix + j, prefix + path[j]}) {
        const int64_t column = slot / a.page_size;
        check(column < a.table_width, op, "block_table", want, std::to_string(a.table_width) + " of them");
        const int64_t block = a.block_table[b * a.table_width + column];
        check(block >= 0 && block < a.pages, op, "block_table", want, block);
      }
  }
}

void move_path(const Commit& a, int64_t b, const Cache& cache) {
  const int32_t *path = a.accept_index + b * a.slots, *blocks = a.block_table + b * a.table_width;
  const auto slot = [&](int64_t position) {
    return cache.data + blocks[position / a.page_size] * cache.page_stride + position % a.page_size * cache.slot_stride;
  };
  const bool dense = cache.heads == 1 || cache.head_stride == cache.row_bytes;
  const int64_t heads = dense ? 1 : cache.heads, bytes = dense ? cache.heads * cache.row_bytes : cache.row_bytes;
  const int64_t prefix = a.cache_seqlens[b];
  for (int64_t j = 0; j <= a.accept_length[b]; j++) {  // paths ascend: no slot is written before it is read
    if (path[j] == j) continue;
    uint8_t *to = slot(prefix + j), *from = slot(prefix + path[j]);
    for (int64_t h = 0; h < heads; h++) std::memmove(to + h * cache.head_stride, from + h * cache.head_stride, bytes);
  }
}

void gather_hidden(const Commit& a, int64_t b) {
  const int32_t* path = a.accept_index + b * a.slots;
  uint8_t* out = a.accepted_hidden + b * a.slots * a.hidden_bytes;
  const int64_t length = a.accept_length[b] + 1;
  for (int64_t j = 0; j < length; j++)
    std::memcpy(out + j * a.hidden_bytes, a.hidden + b * a.hidden_request_stride + path[j] * a.hidden_node_stride,
                a.hidden_bytes);
  std::memset(out + length * a.hidden_bytes, 0, (a.slots - length) * a.hidden_bytes);
}

// -- building ---------------------------------------------------------------------------------------------------------

// Parent of each node of one request: 0 the root, -1 for the root itself and where the parent was not selected.
void find_parents(const Build& a, int64_t b, int32_t* parents) {
  const char* op = "build_tree_kernel_efficient";
  const int64_t count = a.nodes - 1;
  const int64_t *selected = a.selected + b * count, *end = selected + count;
  const bool ascending = std::is_sorted(selected, end);
  bool backwards = true;  // every parent lies before its child, so there is no cycle
  parents[0] = -1;
  for (int64_t i = 1; i <= count; i++) {
    const int64_t index = selected[i - 1], column = index / a.topk;
    check(index >= 0 && (column == 0 || column < a.list_width), op, "selected_index",
          between(0, std::max<int64_t>(1, a.list_width) * a.topk - 1), index);
    parents[i] = 0;
    if (column == 0) continue;
    const int64_t wanted = a.parent_list[b * a.list_width + column];
    const int64_t* found = ascending ? std::lower_bound(selected, end, wanted) : std::find(selected, end, wanted);
    parents[i] = found < end && *found == wanted ? (int32_t)(found - selected + 1) : -1;
    backwards = backwards && parents[i] < i;
  }
  for (int64_t i = 1; i <= count && !backwards; i++) {
    int64_t node = i, steps = 0;
    for (; node > 0 && steps <= count; steps++) node = parents[node];
    check(node <= 0, op, "parent_list", "a tree", "node " + std::to_string(i) + " among its own ancestors");
  }
}

void link_children(const Build& a, int64_t b, const int32_t* parents) {
  const int64_t n = a.nodes;
  int64_t *index = a.index + b * n, *next_token = a.next_token + b * n, *next_sibling = a.next_sibling + b * n;
  index[0] = b * n;
  for (int64_t i = n - 1; i > 0; i--) {
    index[i] = b * n + i;
    if (parents[i] < 0) continue;
    const int64_t elder = next_token[parents[i]];
    next_token[parents[i]] = i;
    if (elder != -1) next_sibling[i] = elder;
  }
}

// Rows of the mask begin `stride` bytes apart.
void write_ancestors(const Build& a, int64_t b, const int32_t* parents, uint8_t* rows, int64_t stride) {
  const int64_t n = a.nodes;
  for (int64_t i = 0; i < n; i++, rows += stride) {
    const bool packed = a.mode == MaskMode::kPacked;
    if (!packed) std::memset(rows, 0, n);
    rows[0] = 1;
    int64_t depth = 0;
    for (int64_t node = i; node > 0; node = parents[node], depth++) {
      if (packed)
        rows[node / 8] |= (uint8_t)(1u << node % 8);
      else
        rows[node] = 1;
    }
    a.positions[b * n + i] = a.seq_lens[b] + depth;
  }
}

// One request; youngest: N words of scratch. The last ancestor before a node is its parent.
void reconstruct_one(const Reconstruct& a, int64_t b, int64_t* youngest) {
  const int64_t n = a.nodes;
  const uint8_t* rows = a.mask + b * n * n;
  int64_t *next_token = a.next_token + b * n, *next_sibling = a.next_sibling + b * n;
  std::fill(next_token, next_token + n, -1);
  std::fill(next_sibling, next_sibling + n, -1);
  std::fill(youngest, youngest + n, -1);
  for (int64_t i = 0; i < n; i++, rows += n) {
    int64_t depth = 0, parent = -1;
    for (int64_t j = 0; j < i; j++) {
      if (!rows[j]) continue;
      depth++, parent = j;
      if (next_token[j] < 0) next_token[j] = i;
    }
    a.positions[b * n + i] = a.seq_lens[b] + depth;
    a.index[b * n + i] = b * n + i;
    if (parent < 0) continue;
    if (youngest[parent] >= 0) next_sibling[youngest[parent]] = i;
    youngest[parent] = i;
  }
}

}  // namespace

void tree_finalize(const Finalize& a, int threads) {
  const int active = use_threads(a.batch, a.batch * (8 * a.candidates + a.nodes * a.nodes / kWordBits), threads);
  std::vector<uint64_t> keys(active * a.candidates);
  std::vector<int64_t> places(active * a.nodes);
#pragma omp parallel for num_threads(active) if (active > 1)
  for (int64_t b = 0; b < a.batch; b++)
    finalize_one(a, b, keys.data() + omp_get_thread_num() * a.candidates,
                 places.data() + omp_get_thread_num() * a.nodes);
}

void tree_commit(const Commit& a, int threads) {
  check_commit(a);
  const int64_t layers = (int64_t)a.caches.size(), tasks = layers * a.batch;
  const int64_t bytes = layers ? tasks * a.slots * a.caches[0].heads * a.caches[0].row_bytes : 0;
  const int active = use_threads(tasks, bytes, threads);
#pragma omp parallel for num_threads(active) if (active > 1)
  for (int64_t task = 0; task < tasks; task++) move_path(a, task % a.batch, a.caches[task / a.batch]);
  for (int64_t b = 0; b < a.batch; b++) {
    if (a.hidden) gather_hidden(a, b);
    a.new_seqlens[b] = a.cache_seqlens[b] + a.accept_length[b] + 1;
  }
}

int64_t bytes_per_row(int64_t nodes) { return nodes <= 8 ? 1 : nodes <= 16 ? 2 : (nodes + 31) / 32 * 4; }

void build_tree(const Build& a, int threads) {
  const char* op = "build_tree_kernel_efficient";
  const int64_t n = a.nodes;
  std::vector<int64_t> starts(a.batch);
  int64_t bytes = 0;
  for (int64_t b = 0; b < a.batch; b++) {
    check(a.seq_lens[b] >= 0 && a.seq_lens[b] < int64_t{1} << 40, op, "verified_seq_len", "values of at least 0",
          a.seq_lens[b]);
    starts[b] = bytes;
    bytes +=
        a.mode == MaskMode::kFull ? n * (a.seq_lens[b] + n) : n * (a.mode == MaskMode::kQueries ? n : bytes_per_row(n));
  }
  check(bytes <= a.mask_bytes, op, "tree_mask", "at least " + std::to_string(bytes) + " bytes", a.mask_bytes);
  std::vector<int32_t> parents(a.batch * n);
  for (int64_t b = 0; b < a.batch; b++) find_parents(a, b, parents.data() + b * n);
  const int active = use_threads(a.batch, a.batch * n * n, threads);
#pragma omp parallel for num_threads(active) if (active > 1)
  for (int64_t b = 0; b < a.batch; b++) {
    const int64_t before = a.mode == MaskMode::kFull ? a.seq_lens[b] : 0;
    const int64_t stride = before + (a.mode == MaskMode::kPacked ? bytes_per_row(n) : n);
    link_children(a, b, parents.data() + b * n);
    write_ancestors(a, b, parents.data() + b * n, a.mask + starts[b] + before, stride);
  }
}

void reconstruct_tree(const Reconstruct& a, int threads) {
  const int active = use_threads(a.batch, a.batch * a.nodes * a.nodes, threads);
  std::vector<int64_t> youngest(active * a.nodes);
#pragma omp parallel for num_threads(active) if (active > 1)
  for (int64_t b = 0; b < a.batch; b++) reconstruct_one(a, b, youngest.data() + omp_get_thread_num() * a.nodes);
}

void check_walk(const char* op, const Walk& a, int64_t vocabulary) {
  const int64_t n = a.nodes, most = a.batch * n - 1;
  const auto check_node = [&](int64_t b, int64_t node) {
    const int64_t index = a.index[b * n + node], token = a.candidates[b * n + node];
    check(index >= 0 && index <= most, op, "retrive_index", between(0, most), index);
    check(!node || vocabulary < 0 || (token >= 0 && token < vocabulary), op, "candidates",
          "tokens in 0.." + std::to_string(vocabulary - 1), token);
  };
  const std::string tree = "a tree: -1 or a node of 1.." + std::to_string(n - 1) + ", each once";
  std::vector<int64_t> waiting;
  std::vector<bool> seen;
  for (int64_t b = 0; b < a.batch; b++) {
    if (!a.next_token) {
      for (int64_t node = 0; node < n; node++) check_node(b, node);
      continue;
    }
    seen.assign(n, false);
    seen[0] = true;
    waiting.assign(1, 0);
    while (!waiting.empty()) {
      const int64_t node = waiting.back();
      waiting.pop_back();
      check_node(b, node);
      const char* argument = "retrive_next_token";
      for (int64_t child = a.next_token[b * n + node]; child != -1; child = a.next_sibling[b * n + child]) {
        const bool good = child > 0 && child < n && !seen[child];
        check(good, op, argument, tree, std::to_string(child) + " in request " + std::to_string(b));
        seen[child] = true;
        waiting.push_back(child);
        argument = "retrive_next_sibling";
      }
    }
  }
}

void verify_greedy(const Walk& a, const int64_t* target_predict, int threads) {
  check_walk("verify_tree_greedy", a, -1);
  const int64_t n = a.nodes;
  const int active = use_threads(a.batch, a.batch * n, threads);
#pragma omp parallel for num_threads(active) if (active > 1)
  for (int64_t b = 0; b < a.batch; b++) {
    int32_t* path = a.accept_index + b * a.slots;
    int64_t last = a.index[b * n], node = 0, accepted = 0;
    path[0] = (int32_t)last;
    while (accepted + 1 < a.slots) {
      int64_t child = a.next_token[b * n + node];
      while (child != -1 && a.candidates[b * n + child] != target_predict[last]) child = a.next_sibling[b * n + child];
      if (child == -1) break;
      a.predicts[last] = (int32_t)target_predict[last];
      last = a.index[b * n + child], node = child;
      path[++accepted] = (int32_t)last;
    }
    a.accept_token_num[b] = (int32_t)accepted;
    a.predicts[last] = (int32_t)target_predict[last];
  }
}

}  // namespace m3::spec_decode
