// The CPU driver of tree attention: what each query attends to, the division into tasks, threads that draw them.
//
// A task is a run of queries of one request, over one kv head or a few with all their query heads, over all splits or
// over one. It walks the keys chunk by chunk. A chunk that is the same for all its queries (the prefix; under the
// causal mask every chunk) is fetched once for all their rows; where queries of a tree part ways, the chunk of each is
// put together by rank: the rest of the prefix, then its ancestors. Where one split is a task, the states of the splits
// wait in memory, and who ends last merges them in ascending order. That order, and every chunk, is that of a single
// query computed alone.
#include "spec_decode/attention_cpu_driver.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "common/check.h"
#include "common/isa.h"

namespace m3::spec_decode {
namespace {

constexpr int64_t kMostRows = 128;        // of a task: their sums stay in L2
constexpr int64_t kDirectRows = 24;       // up to here keys are read where they lie, beyond they are copied to L1 first
constexpr int64_t kHalfRows = 3;          // the same for keys of 16 or 8 bits, which each row has to widen
constexpr int64_t kThreadWork = 1 << 16;  // multiplications that are worth waking another thread
constexpr int64_t kSplit = kChunk * kSplitChunks;

const Kernels& kernels() {
  switch (current_isa()) {
#if defined(__x86_64__)
    case Isa::kAvx512Vnni:
    case Isa::kAvx512:
      return kAvx512Attention;
    case Isa::kAvxVnni:
    case Isa::kAvx2:
      return kAvx2Attention;
#elif defined(__aarch64__) && defined(M3_NEON)
    case Isa::kNeon:
      return kNeonAttention;
#endif
    default:
      return kScalarAttention;
  }
}

int64_t bytes_of(Type type) { return type == Type::kFloat32 ? 4 : type == Type::kInt8 ? 1 : 2; }

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Keys of request b after its prefix: those of the tree, or of the queries.
int32_t tree_len(const Attention& a, int64_t b) {
  return a.tree_lens ? a.tree_lens[b] : a.cu_seqlens_q[b + 1] - a.cu_seqlens_q[b];
}

// What each query attends to: logical positions begin .. end - 1.
struct Extents {
  std::vector<int32_t> begin, end;  // (T,)
};

int32_t count_bits(const int32_t* words, int64_t bits) {
  int32_t count = 0;
  for (int64_t w = 0; w * 32 < bits; w++) {
    uint32_t word = (uint32_t)words[w];
    if (bits - w * 32 < 32) word &= (1u << (bits - w * 32)) - 1;
    count += __builtin_popcount(word);
  }
  return count;
}

Extents extents_of(const Attention& a) {
  const int64_t rows = a.cu_seqlens_q[a.requests];
  Extents e{std::vector<int32_t>(rows), std::vector<int32_t>(rows)};
  for (int64_t b = 0; b < a.requests; b++) {
    const int32_t start = a.cu_seqlens_q[b], stop = a.cu_seqlens_q[b + 1], tree = tree_len(a, b);
    const int32_t prefix = a.cache_seqlens[b] - tree;
    for (int32_t t = start; t < stop; t++) {
      e.end[t] = prefix + (a.mask_bits ? count_bits(a.mask_bits + t * a.mask_words, tree) : t - start + 1);
      e.begin[t] = a.window && a.window < e.end[t] ? e.end[t] - (int32_t)a.window : 0;
    }
  }
  return e;
}

// Every page that holds a key between the first that some query attends to and the last of the request.
void check_pages(const Attention& a, const Extents& e) {
  for (int64_t b = 0; b < a.requests; b++) {
    const int32_t start = a.cu_seqlens_q[b], stop = a.cu_seqlens_q[b + 1];
    if (start == stop) continue;
    const int32_t first = *std::min_element(e.begin.begin() + start, e.begin.begin() + stop);
    const int32_t* ids = a.block_table + b * a.max_pages;
    for (int64_t p = first / a.page_size; p * a.page_size < a.cache_seqlens[b]; p++)
      if (ids[p] < 0 || ids[p] >= a.num_pages)
        refuse("tree_attention", "block_table",
               "block ids in 0.." + std::to_string(a.num_pages - 1) + " for the keys of request " + std::to_string(b),
               ids[p]);
  }
}

// A run of queries of one request, over some of its kv heads.
struct Block {
  int64_t request, kv_head, kv_heads;  // the first, how many
  int32_t start, stop;                 // queries: rows of q
  int32_t begin, end;                  // the logical positions of all of them
  int64_t first_split, splits;         // of those positions
  int64_t first_state;                 // of its states in memory, (rows, splits); -1: the block is one task
};

struct Task {
  int64_t block;
  int64_t split;  // -1: all
};

struct Plan {
  std::vector<Block> blocks;
  std::vector<Task> tasks;
  int64_t most_rows = 0, most_tail = 0, most_heads = 1, states = 0;
};

// Few queries take several kv heads together, chunk by chunk: the cache is then read in the order in which it lies.
Plan plan_of(const Attention& a, const Extents& e, int64_t threads) {
  const int64_t group = a.heads / a.kv_heads, queries = std::max<int64_t>(1, kMostRows / group);
  int64_t all_runs = 0;
  for (int64_t b = 0; b < a.requests; b++) all_runs += ceil_div(a.cu_seqlens_q[b + 1] - a.cu_seqlens_q[b], queries);
  const int64_t fair = threads > 1 ? std::max<int64_t>(1, all_runs * a.kv_heads / (4 * threads)) : a.kv_heads;
  Plan plan;
  for (int64_t b = 0; b < a.requests; b++) {
    const int32_t from = a.cu_seqlens_q[b], to = a.cu_seqlens_q[b + 1], tree = tree_len(a, b);
    if (from == to) continue;
    if (a.mask_bits) plan.most_tail = std::max<int64_t>(plan.most_tail, (a.cache_seqlens[b] - tree) % kChunk + tree);
    const int64_t runs = ceil_div(to - from, queries), rows = ceil_div(to - from, runs) * group;
    const int64_t heads = std::min({a.kv_heads, fair, std::max<int64_t>(1, kMostRows / rows)});
    plan.most_rows = std::max(plan.most_rows, rows * heads);
    plan.most_heads = std::max(plan.most_heads, heads);
    for (int64_t r = runs; r-- > 0;)  // the last, which attend to most, first
      for (int64_t g = 0; g < a.kv_heads; g += heads) {
        Block block{};
        block.request = b, block.kv_head = g, block.kv_heads = std::min(heads, a.kv_heads - g);
        block.start = int32_t(from + (to - from) * r / runs), block.stop = int32_t(from + (to - from) * (r + 1) / runs);
        block.begin = *std::min_element(e.begin.begin() + block.start, e.begin.begin() + block.stop);
        block.end = *std::max_element(e.end.begin() + block.start, e.end.begin() + block.stop);
        block.first_split = block.begin / kSplit;
        block.splits = ceil_div(block.end, kSplit) - block.first_split;
        plan.blocks.push_back(block);
      }
  }
  const bool few = threads > 1 && (int64_t)plan.blocks.size() < 4 * threads;
  for (size_t i = 0; i < plan.blocks.size(); i++) {
    Block& block = plan.blocks[i];
    block.first_state = -1;
    if (!few || block.splits <= 1) {
      plan.tasks.push_back({(int64_t)i, -1});
      continue;
    }
    block.first_state = plan.states;
    plan.states += (block.stop - block.start) * block.kv_heads * group * block.splits;
    for (int64_t s = 0; s < block.splits; s++) plan.tasks.push_back({(int64_t)i, block.first_split + s});
  }
  return plan;
}

// Rows of states in one piece of memory.
struct States {
  float *maximum, *total, *weighted;
  int64_t stride;

  static int64_t floats(int64_t rows, int64_t stride) { return rows * (1 + kPad + stride) + kPad; }
  States(float* memory, int64_t rows, int64_t padded)
      : maximum(memory + rows * (kPad + padded)), total(memory + rows * padded), weighted(memory), stride(padded) {}
  State at(int64_t row) const { return {maximum + row, total + row * kPad, weighted + row * stride}; }
  void clear(int64_t row) const {
    maximum[row] = -std::numeric_limits<float>::infinity();
    std::fill_n(total + row * kPad, kPad, 0.0f);
    std::fill_n(weighted + row * stride, stride, 0.0f);
  }
  void copy(int64_t row, const State& from) const {
    maximum[row] = *from.maximum;
    std::memcpy(total + row * kPad, from.total, kPad * sizeof(float));
    std::memcpy(weighted + row * stride, from.weighted, stride * sizeof(float));
  }
};

// What all threads share.
struct Call {
  const Attention& a;
  const Extents& extents;
  const Plan& plan;
  const Kernels& isa;
  int64_t group, stride;       // rows of a query; head size, padded
  bool direct, wide, scaled;   // keys may be read where they lie; they are fp32; they are int8
  float* states;               // of plan.states rows
  std::atomic<int64_t>* open;  // tasks of each block that have not ended
};

// One thread's memory, and the tasks it does.
class Worker {
 public:
  static int64_t floats(const Call& call) {
    const int64_t rows = call.plan.most_rows,
                  tail = call.direct && call.wide ? 0 : call.plan.most_tail * call.plan.most_heads;
    return (rows + 2 * (kChunk + tail)) * call.stride + rows * (kChunk + kPad) + 2 * States::floats(rows, call.stride);
  }

  Worker(const Call& call, float* memory)
      : call_(call),
        rows_(call.plan.most_rows),
        queries_(take(memory, rows_ * call.stride)),
        keys_(take(memory, kChunk * call.stride)),
        values_(take(memory, kChunk * call.stride)),
        tail_keys_(
            take(memory, call.direct && call.wide ? 0 : call.plan.most_tail * call.plan.most_heads * call.stride)),
        tail_values_(
            take(memory, call.direct && call.wide ? 0 : call.plan.most_tail * call.plan.most_heads * call.stride)),
        scores_(take(memory, rows_ * kChunk)),
        scale_(take(memory, rows_ * kPad)),
        split_(take(memory, States::floats(rows_, call.stride)), rows_, call.stride),
        whole_(memory, rows_, call.stride),
        begin_(rows_),
        end_(rows_),
        slots_(call.plan.most_tail),
        tail_at_{call.plan.most_tail, call.scaled},
        here_{kChunk, call.scaled},
        tail_ready_(call.plan.most_tail * call.plan.most_heads) {}

  void run(const Task& task) {
    const Block& block = call_.plan.blocks[task.block];
    block_ = &block;
    only_ = task.split;
    const int32_t tree = tree_len(call_.a, block.request);
    prefix_ = call_.a.cache_seqlens[block.request] - tree;
    load_queries();
    const int64_t shared = call_.a.mask_bits ? prefix_ / kChunk : ceil_div(block.end, kChunk);
    walk(block.start, block.stop, 0, shared, false);
    if (call_.a.mask_bits) {
      std::fill(tail_ready_.begin(), tail_ready_.end(), 0);
      locate(shared * kChunk, prefix_ % kChunk + tree, 0, tail_at_);
      for (int32_t t = block.start; t < block.stop; t++) {
        if (call_.extents.end[t] <= shared * kChunk) continue;
        list_slots(t, tree);
        walk(t, t + 1, shared, ceil_div(call_.extents.end[t], kChunk), true);
      }
    }
    if (only_ < 0) {
      each_row([&](int64_t row, int32_t t, int64_t head) { finish(t, head, whole_.at(row)); });
    } else if (call_.open[task.block].fetch_sub(1, std::memory_order_acq_rel) == 1) {
      merge_all();
    }
  }

 private:
  static float* take(float*& memory, int64_t floats) {
    float* mine = memory;
    memory += floats;
    return mine;
  }

  // Rows of one kv head lie together, those of one query among them.
  int64_t queries() const { return block_->stop - block_->start; }
  int64_t row_of(int64_t g, int32_t t) const { return (g * queries() + t - block_->start) * call_.group; }

  // visit(row, query, head) for every row of the block.
  template <class Visit>
  void each_row(Visit visit) const {
    for (int64_t g = 0; g < block_->kv_heads; g++)
      for (int32_t t = block_->start; t < block_->stop; t++)
        for (int64_t h = 0; h < call_.group; h++) visit(row_of(g, t) + h, t, (block_->kv_head + g) * call_.group + h);
  }

  int32_t begin_of(int32_t t) const { return call_.extents.begin[t]; }
  int32_t end_of(int32_t t) const { return call_.extents.end[t]; }

  void load_queries() {
    const Attention& a = call_.a;
    const float factor = (float)((double)a.softmax_scale * 1.4426950408889634);  // scores in base 2
    each_row([&](int64_t row, int32_t t, int64_t head) {
      const void* from = a.q + t * a.q_row_stride + head * a.q_head_stride;
      call_.isa.widen(&from, a.type, 1, a.size, factor, queries_ + row * call_.stride, call_.stride);
      split_.clear(row);
    });
  }

  // Where keys, values and their scales of some slots lie, for the block's first kv head.
  struct Places {
    std::vector<const void*> keys, values;
    std::vector<const float*> key_scales, value_scales;

    Places(int64_t count, bool scaled)
        : keys(count), values(count), key_scales(scaled ? count : 0), value_scales(scaled ? count : 0) {}
  };

  // Slots first .. first + count - 1, into to's from `at` on. One division for all. A slot before every window may have
  // any block id: its address is never used.
  void locate(int64_t first, int64_t count, int64_t at, Places& to) const {
    const Attention& a = call_.a;
    const int32_t* table = a.block_table + block_->request * a.max_pages;
    int64_t page = first / a.page_size, slot = first % a.page_size;
    for (int64_t j = at; j < at + count; page++, slot = 0) {
      const int64_t from = j, stop = std::min(at + count, j + a.page_size - slot);
      uintptr_t key = address(a.keys.data, a.keys, table[page], slot, 1);
      uintptr_t value = address(a.values.data, a.values, table[page], slot, 1);
      for (; j < stop; j++, key += a.keys.slot_stride, value += a.values.slot_stride)
        to.keys[j] = (const void*)key, to.values[j] = (const void*)value;
      if (!call_.scaled) continue;
      key = address(a.k_scale.data, a.k_scale, table[page], slot, sizeof(float));
      value = address(a.v_scale.data, a.v_scale, table[page], slot, sizeof(float));
      for (int64_t i = from; i < stop; i++) {
        to.key_scales[i] = (const float*)key, to.value_scales[i] = (const float*)value;
        key += a.k_scale.slot_stride * sizeof(float), value += a.v_scale.slot_stride * sizeof(float);
      }
    }
  }

  template <class Strides>
  uintptr_t address(const void* data, const Strides& of, int32_t page, int64_t slot, uintptr_t bytes) const {
    return (uintptr_t)data + ((uintptr_t)page * (uintptr_t)of.page_stride +
                              (uintptr_t)(slot * of.slot_stride + block_->kv_head * of.head_stride)) *
                                 bytes;
  }

  // slots_[r]: offset from the last shared chunk's end of the key of rank r, for the positions from there on.
  void list_slots(int32_t t, int32_t tree) {
    int64_t count = 0;
    const int64_t rest = prefix_ % kChunk;
    for (; count < rest; count++) slots_[count] = (int32_t)count;
    const int32_t* words = call_.a.mask_bits + t * call_.a.mask_words;
    for (int64_t w = 0; w * 32 < tree; w++) {
      uint32_t word = (uint32_t)words[w];
      if (tree - w * 32 < 32) word &= (1u << (tree - w * 32)) - 1;
      for (; word; word &= word - 1) slots_[count++] = int32_t(rest + w * 32 + __builtin_ctz(word));
    }
  }

  // key_at_, value_at_ or tiles_ of kv head g at positions first .. last - 1 of a chunk that all queries share; here_
  // locates it for the first kv head.
  void fetch_shared(int64_t g, int first, int last, int64_t rows) {
    const void *keys[kChunk], *values[kChunk];
    for (int j = first; j < last; j++) {
      keys[j] = (const char*)here_.keys[j] + g * call_.a.keys.head_stride;
      values[j] = (const char*)here_.values[j] + g * call_.a.values.head_stride;
    }
    if (call_.scaled)
      for (int j = first; j < last; j++) fetch_scales(g, here_, j, j);
    const bool few = call_.direct && rows <= kDirectRows;
    const int64_t stride = call_.stride;
    if (few && (call_.wide || rows <= kHalfRows)) {
      key_type_ = call_.a.cache_type;
      std::copy(keys + first, keys + last, key_at_ + first);
    } else if (call_.isa.tile && rows > kDirectRows) {
      for (int j = 0; j < first; j++) keys[j] = keys[first];  // tiles are whole; no row counts these
      for (int j = last; j < kChunk; j++) keys[j] = keys[first];
      call_.isa.tile(keys, call_.a.cache_type, call_.a.size, keys_, stride);
      tiles_ = keys_;
    } else {
      copy(keys + first, last - first, keys_ + first * stride);
      for (int j = first; j < last; j++) key_at_[j] = keys_ + j * stride;
    }
    if (few) {
      value_type_ = call_.a.cache_type;
      std::copy(values + first, values + last, value_at_ + first);
    } else {
      copy(values + first, last - first, values_ + first * stride);
      for (int j = first; j < last; j++) value_at_[j] = values_ + j * stride;
    }
  }

  void fetch_scales(int64_t g, const Places& places, int64_t from, int to) {
    key_scales_[to] = places.key_scales[from][g * call_.a.k_scale.head_stride];
    value_scales_[to] = places.value_scales[from][g * call_.a.v_scale.head_stride];
  }

  void copy(const void* const* from, int64_t count, float* to) const {
    call_.isa.widen(from, call_.a.cache_type, count, call_.a.size, 1.0f, to, call_.stride);
  }

  // The same for one query of a tree: position p is slot tail + slots_[p - tail]. Each slot is copied once a task.
  void fetch_listed(int64_t g, int64_t chunk, int first, int last) {
    const Attention& a = call_.a;
    const int64_t tail = prefix_ / kChunk * kChunk;
    for (int j = first; j < last; j++) {
      const int64_t slot = slots_[chunk * kChunk + j - tail];
      const void* key = (const char*)tail_at_.keys[slot] + g * a.keys.head_stride;
      const void* value = (const char*)tail_at_.values[slot] + g * a.values.head_stride;
      if (call_.scaled) fetch_scales(g, tail_at_, slot, j);
      if (call_.direct && call_.wide) {
        key_at_[j] = key, value_at_[j] = value;
        continue;
      }
      const int64_t own = g * call_.plan.most_tail + slot;
      float *to_key = tail_keys_ + own * call_.stride, *to_value = tail_values_ + own * call_.stride;
      if (!tail_ready_[own]) {
        copy(&key, 1, to_key);
        copy(&value, 1, to_value);
        tail_ready_[own] = 1;
      }
      key_at_[j] = to_key, value_at_[j] = to_value;
    }
  }

  // Queries start .. stop - 1 over chunks from .. to - 1.
  void walk(int32_t start, int32_t stop, int64_t from, int64_t to, bool listed) {
    if (only_ >= 0) {
      from = std::max(from, only_ * kSplitChunks);
      to = std::min(to, (only_ + 1) * kSplitChunks);
    }
    from = std::max<int64_t>(from, (listed ? begin_of(start) : block_->begin) / kChunk);
    for (int64_t chunk = from; chunk < to; chunk++) {
      int first = kChunk, last = 0;
      int32_t low = stop, high = start;  // the queries that have keys here lie in low .. high - 1
      for (int32_t t = start; t < stop; t++) {
        const int begin = (int)std::max<int64_t>(0, begin_of(t) - chunk * kChunk);
        const int end = (int)std::min<int64_t>(kChunk, end_of(t) - chunk * kChunk);
        for (int64_t row = row_of(0, t); row < row_of(0, t + 1); row++) begin_[row] = begin, end_[row] = end;
        if (begin >= end) continue;
        first = std::min(first, begin), last = std::max(last, end);
        low = std::min(low, t), high = t + 1;
      }
      if (low >= high) continue;
      if (!listed) locate(chunk * kChunk + first, last - first, first, here_);
      for (int64_t g = 0; g < block_->kv_heads; g++) attend(g, chunk, first, last, low, high, listed);
      for (int32_t t = low; t < high; t++)
        if (begin_of(t) < (chunk + 1) * kChunk && end_of(t) > chunk * kChunk &&
            (chunk % kSplitChunks == kSplitChunks - 1 || end_of(t) <= (chunk + 1) * kChunk))
          end_split(t, chunk / kSplitChunks);
    }
  }

  void attend(int64_t g, int64_t chunk, int first, int last, int32_t low, int32_t high, bool listed) {
    const int64_t row = row_of(g, low), rows = (high - low) * call_.group;
    tiles_ = nullptr;
    key_type_ = value_type_ = Type::kFloat32;
    if (call_.scaled) {  // of keys that no row counts
      std::fill_n(key_scales_, kChunk, 0.0f);
      std::fill_n(value_scales_, kChunk, 0.0f);
    }
    if (listed)
      fetch_listed(g, chunk, first, last);
    else
      fetch_shared(g, first, last, rows);
    for (int j = 0; j < first; j++) key_at_[j] = key_at_[first];  // read with their neighbours, counted by no row
    for (int j = last; j < kChunk; j++) key_at_[j] = key_at_[first];
    call_.isa.attend({.keys = key_at_,
                      .tiles = tiles_,
                      .values = value_at_,
                      .key_type = key_type_,
                      .value_type = value_type_,
                      .key_scales = call_.scaled ? key_scales_ : nullptr,
                      .value_scales = call_.scaled ? value_scales_ : nullptr,
                      .begin = begin_.data() + row_of(0, low),
                      .end = end_.data() + row_of(0, low),
                      .rows = rows,
                      .queries = queries_ + row * call_.stride,
                      .stride = call_.stride,
                      .scores = scores_,
                      .scale = scale_,
                      .state = split_.at(row)});
  }

  States states_of_block() const {
    const int64_t rows = queries() * block_->kv_heads * call_.group * block_->splits;
    return {call_.states + block_->first_state * (1 + kPad + call_.stride), rows, call_.stride};
  }

  void end_split(int32_t t, int64_t split) {
    for (int64_t g = 0; g < block_->kv_heads; g++)
      for (int64_t row = row_of(g, t); row < row_of(g, t + 1); row++) {
        if (only_ >= 0)
          states_of_block().copy(row * block_->splits + split - block_->first_split, split_.at(row));
        else
          add_split(whole_, row, split_.at(row), split == begin_of(t) / kSplit);
        split_.clear(row);
      }
  }

  void add_split(const States& whole, int64_t row, const State& split, bool first) const {
    if (first)
      whole.copy(row, split);
    else
      call_.isa.merge(whole.at(row), split, call_.stride);
  }

  void merge_all() {
    const States parts = states_of_block();
    each_row([&](int64_t row, int32_t t, int64_t head) {
      const int64_t first = begin_of(t) / kSplit;
      for (int64_t s = first; s < ceil_div(end_of(t), kSplit); s++)
        add_split(whole_, row, parts.at(row * block_->splits + s - block_->first_split), s == first);
      finish(t, head, whole_.at(row));
    });
  }

  void finish(int32_t t, int64_t head, const State& state) const {
    const Attention& a = call_.a;
    const int64_t at = t * a.heads + head;
    char* out = a.out + at * a.size * bytes_of(a.type);
    if (begin_of(t) >= end_of(t)) {
      std::memset(out, 0, a.size * bytes_of(a.type));
      return;
    }
    const int64_t gate_at = t * a.gate_row_stride + head * (a.gate_one ? 1 : a.size);
    const void* gate = a.gate ? a.gate + gate_at * bytes_of(a.gate_type) : nullptr;
    call_.isa.finish({.size = a.size,
                      .total = state.total,
                      .weighted = state.weighted,
                      .gate = gate,
                      .gate_one = a.gate_one,
                      .gate_type = a.gate_type,
                      .out = out,
                      .type = a.type});
  }

  const Call& call_;
  const int64_t rows_;
  float *queries_, *keys_, *values_, *tail_keys_, *tail_values_, *scores_, *scale_;
  const States split_, whole_;
  std::vector<int> begin_, end_;
  std::vector<int32_t> slots_;
  Places tail_at_, here_;  // from the last shared chunk's end on; of the chunk
  std::vector<char> tail_ready_;
  const void *key_at_[kChunk], *value_at_[kChunk];
  float key_scales_[kChunk], value_scales_[kChunk];
  Type key_type_ = Type::kFloat32, value_type_ = Type::kFloat32;
  const float* tiles_ = nullptr;
  const Block* block_ = nullptr;
  int64_t only_ = -1, prefix_ = 0;
};

int64_t useful_threads(const Attention& a, const Extents& e, int threads) {
  double work = 0.0;
  for (size_t t = 0; t < e.end.size(); t++) work += e.end[t] - e.begin[t];
  work *= 2.0 * (double)a.heads * (double)a.size;
  return std::max<int64_t>(1, std::min<int64_t>(threads, (int64_t)std::min(work / kThreadWork, 4096.0)));
}

}  // namespace

void tree_attention(const Attention& a, int most_threads) {
  const Extents extents = extents_of(a);
  check_pages(a, extents);
  const int64_t threads = useful_threads(a, extents, most_threads);
  const Plan plan = plan_of(a, extents, threads);
  const int64_t stride = ceil_div(a.size, kPad) * kPad;
  std::unique_ptr<float[]> states(new float[plan.states * (1 + kPad + stride)]);
  std::vector<std::atomic<int64_t>> open(plan.blocks.size());
  for (size_t i = 0; i < open.size(); i++) open[i] = plan.blocks[i].splits;
  const Call call{a,
                  extents,
                  plan,
                  kernels(),
                  a.heads / a.kv_heads,
                  stride,
                  a.size == stride,
                  a.cache_type == Type::kFloat32,
                  a.cache_type == Type::kInt8,
                  states.get(),
                  open.data()};

  const int64_t floats = ceil_div(Worker::floats(call), kPad) * kPad;
  const int64_t workers = std::min<int64_t>(threads, std::max<int64_t>(1, (int64_t)plan.tasks.size()));
  std::unique_ptr<float[]> memory(new float[workers * floats + kPad]);
  float* aligned = memory.get() + (64 - (uintptr_t)memory.get() % 64) % 64 / sizeof(float);
  if (workers == 1) {
    Worker worker(call, aligned);
    for (const Task& task : plan.tasks) worker.run(task);
    return;
  }
  std::atomic<int64_t> next_task{0}, next_slot{0};
#pragma omp parallel num_threads((int)workers)
  {
    Worker worker(call, aligned + next_slot.fetch_add(1) * floats);
    for (int64_t i; (i = next_task.fetch_add(1)) < (int64_t)plan.tasks.size();) worker.run(plan.tasks[i]);
  }
}

}  // namespace m3::spec_decode
