// The CPU driver of tree attention: what each query attends to, the division into tasks, threads that draw them.
//
// A task is a run of queries of one request, all query heads of one kv head, over all splits or over one. It walks the
// keys chunk by chunk. A chunk that is the same for all its queries (the prefix; under the causal mask every chunk) is
// fetched once for all their rows; where queries of a tree part ways, the chunk of each is put together by rank: the
// rest of the prefix, then its ancestors. Where one split is a task, the states of the splits wait in memory, and who
// ends last merges them in ascending order. That order, and every chunk, is that of a single query computed alone.
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
constexpr int64_t kDirectRows = 8;        // up to here keys are read where they lie, beyond they are copied to L1 first
constexpr int64_t kThreadWork = 1 << 19;  // multiplications that are worth waking another thread
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

int64_t bytes_of(Type type) { return type == Type::kFloat32 ? 4 : 2; }

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

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
    const int32_t start = a.cu_seqlens_q[b], stop = a.cu_seqlens_q[b + 1], queries = stop - start;
    const int32_t prefix = a.cache_seqlens[b] - queries;
    for (int32_t t = start; t < stop; t++) {
      e.end[t] = prefix + (a.mask_bits ? count_bits(a.mask_bits + t * a.mask_words, queries) : t - start + 1);
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

// A run of queries that share the keys of one kv head.
struct Block {
  int64_t request, kv_head;
  int32_t start, stop;          // queries: rows of q
  int32_t begin, end;           // the logical positions of all of them
  int64_t first_split, splits;  // of those positions
  int64_t first_state = -1;     // of its states in memory, (rows, splits); -1: the block is one task
};

struct Task {
  int64_t block;
  int64_t split;  // -1: all
};

struct Plan {
  std::vector<Block> blocks;
  std::vector<Task> tasks;
  int64_t most_rows = 0, most_tail = 0, states = 0;
};

Plan plan_of(const Attention& a, const Extents& e, int64_t threads) {
  const int64_t group = a.heads / a.kv_heads, queries = std::max<int64_t>(1, kMostRows / group);
  Plan plan;
  for (int64_t b = 0; b < a.requests; b++) {
    const int32_t from = a.cu_seqlens_q[b], to = a.cu_seqlens_q[b + 1], prefix = a.cache_seqlens[b] - (to - from);
    const int64_t runs = ceil_div(to - from, queries);
    if (to > from && a.mask_bits) plan.most_tail = std::max<int64_t>(plan.most_tail, prefix % kChunk + (to - from));
    for (int64_t r = runs; r-- > 0;)  // the last, which attend to most, first
      for (int64_t g = 0; g < a.kv_heads; g++) {
        Block block{.request = b,
                    .kv_head = g,
                    .start = int32_t(from + (to - from) * r / runs),
                    .stop = int32_t(from + (to - from) * (r + 1) / runs),
                    .begin = 0,
                    .end = 0,
                    .first_split = 0,
                    .splits = 0};
        block.begin = *std::min_element(e.begin.begin() + block.start, e.begin.begin() + block.stop);
        block.end = *std::max_element(e.end.begin() + block.start, e.end.begin() + block.stop);
        block.first_split = block.begin / kSplit;
        block.splits = ceil_div(block.end, kSplit) - block.first_split;
        plan.most_rows = std::max(plan.most_rows, (block.stop - block.start) * group);
        plan.blocks.push_back(block);
      }
  }
  const bool few = threads > 1 && (int64_t)plan.blocks.size() < 4 * threads;
  for (size_t i = 0; i < plan.blocks.size(); i++) {
    Block& block = plan.blocks[i];
    if (!few || block.splits <= 1) {
      plan.tasks.push_back({(int64_t)i, -1});
      continue;
    }
    block.first_state = plan.states;
    plan.states += (block.stop - block.start) * group * block.splits;
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
  bool direct;                 // keys may be read where they lie
  float* states;               // of plan.states rows
  std::atomic<int64_t>* open;  // tasks of each block that have not ended
};

// One thread's memory, and the tasks it does.
class Worker {
 public:
  static int64_t floats(const Call& call) {
    const int64_t rows = call.plan.most_rows, tail = call.direct ? 0 : call.plan.most_tail;
    return (rows + 2 * (kChunk + tail)) * call.stride + rows * (kChunk + kPad) + 2 * States::floats(rows, call.stride);
  }

  Worker(const Call& call, float* memory)
      : call_(call),
        rows_(call.plan.most_rows),
        queries_(take(memory, rows_ * call.stride)),
        keys_(take(memory, kChunk * call.stride)),
        values_(take(memory, kChunk * call.stride)),
        tail_keys_(take(memory, call.direct ? 0 : call.plan.most_tail * call.stride)),
        tail_values_(take(memory, call.direct ? 0 : call.plan.most_tail * call.stride)),
        scores_(take(memory, rows_ * kChunk)),
        scale_(take(memory, rows_ * kPad)),
        split_(take(memory, States::floats(rows_, call.stride)), rows_, call.stride),
        whole_(memory, rows_, call.stride),
        begin_(rows_),
        end_(rows_),
        slots_(call.plan.most_tail),
        tail_ready_(call.plan.most_tail) {}

  void run(const Task& task) {
    const Block& block = call_.plan.blocks[task.block];
    block_ = &block;
    only_ = task.split;
    const int32_t from = call_.a.cu_seqlens_q[block.request], to = call_.a.cu_seqlens_q[block.request + 1];
    prefix_ = call_.a.cache_seqlens[block.request] - (to - from);
    load_queries();
    const int64_t shared = call_.a.mask_bits ? prefix_ / kChunk : ceil_div(block.end, kChunk);
    walk(block.start, block.stop, 0, shared, false);
    if (call_.a.mask_bits) {
      std::fill(tail_ready_.begin(), tail_ready_.end(), 0);
      for (int32_t t = block.start; t < block.stop; t++) {
        if (call_.extents.end[t] <= shared * kChunk) continue;
        list_slots(t, to - from);
        walk(t, t + 1, shared, ceil_div(call_.extents.end[t], kChunk), true);
      }
    }
    if (only_ < 0) {
      for (int32_t t = block.start; t < block.stop; t++)
        for (int64_t h = 0; h < call_.group; h++) finish(t, h, whole_.at(row_of(t, h)));
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

  int64_t row_of(int32_t t, int64_t h) const { return (t - block_->start) * call_.group + h; }
  int32_t begin_of(int32_t t) const { return call_.extents.begin[t]; }
  int32_t end_of(int32_t t) const { return call_.extents.end[t]; }

  void load_queries() {
    const Attention& a = call_.a;
    const float factor = (float)((double)a.softmax_scale * 1.4426950408889634);  // scores in base 2
    const char* first = a.q + block_->kv_head * call_.group * a.q_head_stride;
    for (int32_t t = block_->start; t < block_->stop; t++)
      for (int64_t h = 0; h < call_.group; h++) {
        const void* row = first + t * a.q_row_stride + h * a.q_head_stride;
        call_.isa.widen(&row, a.type, 1, a.size, factor, queries_ + row_of(t, h) * call_.stride, call_.stride);
      }
    for (int64_t r = 0; r < (block_->stop - block_->start) * call_.group; r++) split_.clear(r);
  }

  const char* address(const Cache& cache, int64_t slot) const {
    const Attention& a = call_.a;
    const int64_t page = a.block_table[block_->request * a.max_pages + slot / a.page_size];
    return cache.data + page * cache.page_stride + slot % a.page_size * cache.slot_stride +
           block_->kv_head * cache.head_stride;
  }

  // slots_[r]: offset from the last shared chunk's end of the key of rank r, for the positions from there on.
  void list_slots(int32_t t, int32_t queries) {
    int64_t count = 0;
    const int64_t rest = prefix_ % kChunk;
    for (; count < rest; count++) slots_[count] = (int32_t)count;
    const int32_t* words = call_.a.mask_bits + t * call_.a.mask_words;
    for (int64_t w = 0; w * 32 < queries; w++) {
      uint32_t word = (uint32_t)words[w];
      if (queries - w * 32 < 32) word &= (1u << (queries - w * 32)) - 1;
      for (; word; word &= word - 1) slots_[count++] = int32_t(rest + w * 32 + __builtin_ctz(word));
    }
  }

  // Where the keys and values at positions first .. last - 1 of a shared chunk lie.
  void locate(int64_t chunk, int first, int last, const void** keys, const void** values) const {
    for (int j = first; j < last; j++) {
      keys[j] = address(call_.a.keys, chunk * kChunk + j);
      values[j] = address(call_.a.values, chunk * kChunk + j);
    }
  }

  // key_at_, value_at_ of positions first .. last - 1 of a chunk that all queries share, and what to prefetch: the
  // chunk's values and the next one's keys where they are read in place, else the next one's keys and values.
  void fetch_shared(int64_t chunk, int first, int last, int64_t rows, bool more) {
    locate(chunk, first, last, here_[0], here_[1]);
    const int next = more ? (int)std::min<int64_t>(kChunk, block_->end - (chunk + 1) * kChunk) : 0;
    const int64_t bytes = call_.a.size * bytes_of(call_.a.cache_type);
    if (next > 0) locate(chunk + 1, 0, next, ahead_[0], ahead_[1]);
    if (call_.direct && rows <= kDirectRows) {
      for (int j = first; j < last; j++) {
        key_at_[j] = (const float*)here_[0][j];
        value_at_[j] = (const float*)here_[1][j];
      }
      soon_[0] = {here_[1] + first, last - first, bytes};
      soon_[1] = {ahead_[0], next, bytes};
      return;
    }
    copy(here_[0] + first, here_[1] + first, last - first, keys_ + first * call_.stride,
         values_ + first * call_.stride);
    for (int j = first; j < last; j++) {
      key_at_[j] = keys_ + j * call_.stride;
      value_at_[j] = values_ + j * call_.stride;
    }
    for (int i : {0, 1}) soon_[i] = {ahead_[i], next, bytes};
  }

  void copy(const void* const* keys, const void* const* values, int64_t count, float* to_keys, float* to_values) const {
    const Attention& a = call_.a;
    call_.isa.widen(keys, a.cache_type, count, a.size, 1.0f, to_keys, call_.stride);
    call_.isa.widen(values, a.cache_type, count, a.size, 1.0f, to_values, call_.stride);
  }

  // The same for one query of a tree: position p is slot tail + slots_[p - tail]. Each slot is copied once a task.
  void fetch_listed(int64_t chunk, int first, int last) {
    const Attention& a = call_.a;
    const int64_t tail = prefix_ / kChunk * kChunk;
    for (int j = first; j < last; j++) {
      const int64_t slot = slots_[chunk * kChunk + j - tail];
      if (call_.direct) {
        key_at_[j] = (const float*)address(a.keys, tail + slot);
        value_at_[j] = (const float*)address(a.values, tail + slot);
        continue;
      }
      float *key = tail_keys_ + slot * call_.stride, *value = tail_values_ + slot * call_.stride;
      if (!tail_ready_[slot]) {
        const void *from_key = address(a.keys, tail + slot), *from_value = address(a.values, tail + slot);
        copy(&from_key, &from_value, 1, key, value);
        tail_ready_[slot] = 1;
      }
      key_at_[j] = key, value_at_[j] = value;
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
        for (int64_t h = 0; h < call_.group; h++) {
          begin_[row_of(t, h)] = begin;
          end_[row_of(t, h)] = end;
        }
        if (begin >= end) continue;
        first = std::min(first, begin), last = std::max(last, end);
        low = std::min(low, t), high = t + 1;
      }
      if (low >= high) continue;
      const int64_t row = row_of(low, 0), rows = (high - low) * call_.group;
      soon_[0] = soon_[1] = {};
      if (listed)
        fetch_listed(chunk, first, last);
      else
        fetch_shared(chunk, first, last, rows, chunk + 1 < to);
      for (int j = 0; j < first; j++) key_at_[j] = key_at_[first];  // read with their neighbours, counted by no row
      for (int j = last; j < kChunk; j++) key_at_[j] = key_at_[first];
      call_.isa.attend({.keys = key_at_,
                        .values = value_at_,
                        .begin = begin_.data() + row,
                        .end = end_.data() + row,
                        .rows = rows,
                        .queries = queries_ + row * call_.stride,
                        .stride = call_.stride,
                        .scores = scores_,
                        .scale = scale_,
                        .state = split_.at(row),
                        .ahead = {soon_[0], soon_[1]}});
      for (int32_t t = low; t < high; t++)
        if (begin_of(t) < (chunk + 1) * kChunk && end_of(t) > chunk * kChunk &&
            (chunk % kSplitChunks == kSplitChunks - 1 || end_of(t) <= (chunk + 1) * kChunk))
          end_split(t, chunk / kSplitChunks);
    }
  }

  States states_of_block() const {
    const int64_t rows = (block_->stop - block_->start) * call_.group * block_->splits;
    return {call_.states + block_->first_state * (1 + kPad + call_.stride), rows, call_.stride};
  }

  void end_split(int32_t t, int64_t split) {
    for (int64_t h = 0; h < call_.group; h++) {
      const int64_t row = row_of(t, h);
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
    for (int32_t t = block_->start; t < block_->stop; t++)
      for (int64_t h = 0; h < call_.group; h++) {
        const int64_t row = row_of(t, h), first = begin_of(t) / kSplit;
        for (int64_t s = first; s < ceil_div(end_of(t), kSplit); s++)
          add_split(whole_, row, parts.at(row * block_->splits + s - block_->first_split), s == first);
        finish(t, h, whole_.at(row));
      }
  }

  void finish(int32_t t, int64_t h, const State& state) const {
    const Attention& a = call_.a;
    const int64_t head = block_->kv_head * call_.group + h, at = t * a.heads + head;
    char* out = a.out + at * a.size * bytes_of(a.type);
    if (begin_of(t) >= end_of(t)) {
      std::memset(out, 0, a.size * bytes_of(a.type));
      return;
    }
    const void* gate = a.gate ? a.gate + at * (a.gate_one ? 1 : a.size) * bytes_of(a.gate_type) : nullptr;
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
  std::vector<char> tail_ready_;
  const float *key_at_[kChunk], *value_at_[kChunk];
  const void *here_[2][kChunk], *ahead_[2][kChunk];  // keys and values
  Ahead soon_[2];
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
  const bool direct = a.cache_type == Type::kFloat32 && a.size == stride;
  std::unique_ptr<float[]> states(new float[plan.states * (1 + kPad + stride)]);
  std::vector<std::atomic<int64_t>> open(plan.blocks.size());
  for (size_t i = 0; i < open.size(); i++) open[i] = plan.blocks[i].splits;
  const Call call{a, extents, plan, kernels(), a.heads / a.kv_heads, stride, direct, states.get(), open.data()};

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
