// The CPU driver: packs activations, cuts the product into tasks (expert, n-tile, run of rows) and shares them out
// among threads (common/tasks.h).
//
// One parallel region a product, on torch's OpenMP pool, with the thread count passed in. No result depends on the
// threads or on the other rows.
#include "int4/gemm_cpu_driver.h"

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "common/check.h"
#include "common/half.h"
#include "common/isa.h"
#include "common/tasks.h"

namespace m3::int4 {
namespace {

constexpr int64_t kRowsPerTask = 64;      // their c, their x of one block and the panel share L1
constexpr int64_t kSerialWork = 1 << 17;  // multiply-adds under which a second thread costs more than it brings

struct Free {
  void operator()(void* p) const { std::free(p); }
};

// Scratch memory, 64-byte aligned. Large buffers stay with their thread between calls: fresh pages cost more than the
// copy.
class Scratch {
 public:
  template <class T>
  T* get(int64_t count) {
    const size_t bytes = ((size_t)count * sizeof(T) + 127) / 64 * 64;
    if (bytes > size_) {
      memory_.reset();
      size_ = 0;
      memory_.reset(std::aligned_alloc(64, bytes));
      if (!memory_) throw std::bad_alloc();
      size_ = bytes;
    }
    return static_cast<T*>(memory_.get());
  }
  void trim() {
    if (size_ > kKeep) memory_.reset(), size_ = 0;
  }

 private:
  static constexpr size_t kKeep = 64 << 20;
  std::unique_ptr<void, Free> memory_;
  size_t size_ = 0;
};

float to_float(const void* data, Type type, int64_t i) {
  if (type == Type::kF32) return static_cast<const float*>(data)[i];
  const uint16_t h = static_cast<const uint16_t*>(data)[i];
  return type == Type::kBF16 ? bf16_to_float(h) : f16_to_float(h);
}

int64_t type_size(Type type) { return type == Type::kF32 ? 4 : 2; }

void read_row(const Rows& rows, const Weights& w, const int32_t* perm, int64_t row, float* out) {
  const char* x = static_cast<const char*>(rows.x) +
                  (rows.x_rows ? rows.x_rows[row] : row) * rows.x_stride * type_size(rows.x_type);
  if (perm) {
    for (int64_t i = 0; i < w.k; i++) out[i] = to_float(x, rows.x_type, perm[i]);
  } else if (rows.x_type == Type::kF32) {
    std::memcpy(out, x, w.k * 4);
  } else if (rows.x_type == Type::kBF16) {
    for (int64_t i = 0; i < w.k; i++) out[i] = bf16_to_float(reinterpret_cast<const uint16_t*>(x)[i]);
  } else {
    for (int64_t i = 0; i < w.k; i++) out[i] = to_float(x, Type::kF16, i);
  }
  std::fill(out + w.k, out + w.k_tiles() * kTileK, 0.0f);
}

void write_row(const Rows& rows, const float* values, int64_t row, int64_t n0, int64_t count) {
  float sum[kTileN];
  if (rows.bias) {
    for (int64_t i = 0; i < count; i++) sum[i] = values[i] + to_float(rows.bias, rows.y_type, n0 + i);
    values = sum;
  }
  char* y = static_cast<char*>(rows.y) + (row * rows.y_stride + n0) * type_size(rows.y_type);
  if (rows.y_type == Type::kF32)
    std::memcpy(y, values, count * 4);
  else if (rows.y_type == Type::kBF16)
    for (int64_t i = 0; i < count; i++) reinterpret_cast<uint16_t*>(y)[i] = float_to_bf16(values[i]);
  else
    for (int64_t i = 0; i < count; i++) reinterpret_cast<uint16_t*>(y)[i] = float_to_f16(values[i]);
}

std::vector<Block> blocks_of(const Weights& w) {
  std::vector<Block> blocks;
  for (int64_t tile = 0; tile < w.k_tiles(); tile++) {
    const auto group = (int32_t)group_of_tile(tile, w.group_size, w.first_k);
    const auto columns = (int32_t)std::min<int64_t>(kTileK, w.k - tile * kTileK);
    if (!blocks.empty() && blocks.back().group == group && blocks.back().tiles < kBlockTiles) {
      blocks.back().tiles++;
      blocks.back().columns += columns;
    } else {
      blocks.push_back({(int32_t)tile, 1, columns, group});
    }
  }
  return blocks;
}

const Kernels& kernels() {
  switch (current_isa()) {
#if defined(__x86_64__)
    case Isa::kAvx512Vnni:
      return kAvx512VnniKernels;
    case Isa::kAvx512:
      return kAvx512Kernels;
    case Isa::kAvxVnni:
      return kAvxVnniKernels;
    case Isa::kAvx2:
      return kAvx2Kernels;
#elif defined(__aarch64__) && defined(M3_NEON)
    case Isa::kNeon:
      return kNeonKernels;
#endif
    default:
      return kScalarKernels;
  }
}

struct Task {
  int64_t expert, row, rows;
};

// The product for the rows listed in `only` (sorted, inside offsets), or all rows when it is null.
void run(const Weights& w, const Rows& rows, const std::vector<Block>& blocks, Mode mode, int threads,
         const std::vector<int64_t>* only, std::vector<int64_t>& exact_rows) {
  const Kernels& isa = kernels();
  const int64_t count = only ? (int64_t)only->size() : rows.offsets[w.experts];
  if (count == 0) return;
  const auto num_blocks = (int64_t)blocks.size();
  const int64_t k_tiles = w.k_tiles(), n_tiles = w.n_tiles(), groups = w.groups(), columns = k_tiles * kTileK;
  // 4096-byte row strides would map the rows of a step onto one set of L1
  const int64_t plane = k_tiles * words_per_tile(mode) + 16, stride = plane * planes_of(mode),
                cells = num_blocks * planes_of(mode);
  thread_local Scratch x_memory, scale_memory, sum_memory;
  int32_t* x = x_memory.get<int32_t>(count * stride);
  float* x_scale = scale_memory.get<float>(count * cells);
  int32_t* x_sum = sum_memory.get<int32_t>(count * cells);
  std::vector<uint8_t> good(count, 1);

  std::vector<Task> tasks;
  const int64_t skinny_rows = planes_of(mode) == 1 ? isa.skinny_rows : 0;
  std::vector<int64_t> task_of;    // per row, its task where that wants its rows interleaved, else -1
  std::vector<int64_t> expert_of;  // per row, where the permutation differs by expert
  if (w.perm && w.experts > 1) expert_of.resize(count);
  for (int64_t expert = 0, row = 0; expert < w.experts; expert++) {
    int64_t stop = rows.offsets[expert + 1];
    if (only) stop = std::lower_bound(only->begin(), only->end(), stop) - only->begin();
    if (!expert_of.empty()) std::fill(expert_of.begin() + row, expert_of.begin() + stop, expert);
    const int64_t parts = (stop - row + kRowsPerTask - 1) / kRowsPerTask, first = row, total = stop - row;
    for (int64_t part = 0; part < parts; part++) {
      const int64_t next = first + total * (part + 1) / parts;
      tasks.push_back({expert, row, next - row});
      if (next - row >= 2 && next - row <= skinny_rows) {
        if (task_of.empty()) task_of.resize(count, -1);
        std::fill(task_of.begin() + row, task_of.begin() + next, (int64_t)tasks.size() - 1);
      }
      row = next;
    }
  }
  const int64_t num_tasks = (int64_t)tasks.size() * n_tiles;
  if ((double)count * (double)w.n * (double)w.k < (double)kSerialWork || num_tasks == 1) threads = 1;

  const auto pack = [&](int64_t i, float* buffer) {
    const int64_t row = only ? (*only)[i] : i;
    const int32_t* perm = w.perm ? w.perm + (expert_of.empty() ? 0 : expert_of[i]) * w.k : nullptr;
    read_row(rows, w, perm, row, buffer);
    const Task* task = task_of.empty() || task_of[i] < 0 ? nullptr : &tasks[task_of[i]];
    int32_t* packed = task ? reinterpret_cast<int32_t*>(buffer + columns + 16) : x + i * stride;
    good[i] = isa.pack_row(mode, buffer, blocks.data(), (int)num_blocks, packed, plane, x_scale + i * cells,
                           x_sum + i * cells);
    if (task) {
      int32_t* out = x + task->row * stride + (i - task->row);
      for (int64_t word = 0; word < plane - 16; word++) out[word * task->rows] = packed[word];
    }
  };
  const auto multiply = [&](int64_t index, float* c, void* panel) {
    const Task& task = tasks[index / n_tiles];
    const int64_t n_tile = index % n_tiles, tile_row = task.expert * n_tiles + n_tile;
    TileArgs a;
    a.tiles = w.tiles + tile_row * k_tiles * kTileBytes;
    a.scales = static_cast<const char*>(w.scales) + tile_row * groups * kTileN * type_size(w.scale_type);
    a.zeros = w.zeros ? w.zeros + tile_row * groups * kTileN : nullptr;
    a.scale_type = w.scale_type;
    a.blocks = blocks.data();
    a.num_blocks = (int)num_blocks;
    a.x = x + task.row * stride;
    a.x_stride = plane;
    a.x_scale = x_scale + task.row * cells;
    a.x_sum = x_sum + task.row * cells;
    a.rows = task.rows;
    a.c = c;
    a.panel = panel;
    isa.tile[int(mode)](a);
    const int64_t n0 = n_tile * kTileN, width = std::min<int64_t>(kTileN, w.n - n0);
    for (int64_t i = 0; i < task.rows; i++) {
      if (!good[task.row + i]) continue;
      alignas(64) float ordered[kTileN];
      isa.to_row_order(c + i * kTileN, ordered);
      write_row(rows, ordered, only ? (*only)[task.row + i] : task.row + i, n0, width);
    }
  };

  int64_t widest = 0;
  for (const Task& task : tasks) widest = std::max(widest, task.rows);
  const int64_t c_floats = widest * kTileN, panel_floats = kPanelBytes / 4;
  const int64_t own = (std::max(columns + 16 + plane, c_floats + panel_floats) + 31) / 32 * 32;
  thread_local Scratch work_memory;
  float* work = work_memory.get<float>(own * threads);
  if (threads == 1) {
    for (int64_t i = 0; i < count; i++) pack(i, work);
    for (int64_t i = 0; i < num_tasks; i++) multiply(i, work + panel_floats, work);
  } else {
    const bool pack_together = count > 4;
    if (!pack_together)
      for (int64_t i = 0; i < count; i++) pack(i, work);
    Tasks packing(count, threads), products(num_tasks, threads);
#pragma omp parallel num_threads(threads)
    {
      const int thread = omp_get_thread_num();
      float* mine = work + own * thread;
      if (pack_together) {
        packing.draw(thread, [&](int64_t i) { pack(i, mine); });
#pragma omp barrier
      }
      products.draw(thread, [&](int64_t i) { multiply(i, mine + panel_floats, mine); });
    }
  }
  for (int64_t i = 0; i < count; i++)
    if (!good[i]) exact_rows.push_back(only ? (*only)[i] : i);
  x_memory.trim(), scale_memory.trim(), sum_memory.trim(), work_memory.trim();
}

void check_perm(const char* op, const Weights& w) {  // read from a checkpoint: an index outside x would be read
  if (!w.perm) return;
  int32_t low = 0, high = 0;
  for (int64_t i = 0; i < w.experts * w.k; i++) low = std::min(low, w.perm[i]), high = std::max(high, w.perm[i]);
  check(low >= 0 && high < w.k, op, "perm", "values in 0.." + std::to_string(w.k - 1), low < 0 ? low : high);
}

}  // namespace

void gemm(const char* op, const Weights& w, const Rows& rows, Mode mode, int threads) {
  check_perm(op, w);
  check(threads >= 1 && threads <= 4096, op, "threads", "1..4096", threads);
  for (int64_t e = 0; e < w.experts; e++)
    check(rows.offsets[e] >= 0 && rows.offsets[e] <= rows.offsets[e + 1], op, "offsets", "ascending values",
          rows.offsets[e + 1]);
  const std::vector<Block> blocks = blocks_of(w);
  std::vector<int64_t> exact_rows, none;
  if (mode == Mode::kExact && kernels().tile[int(Mode::kInt24)]) mode = Mode::kInt24;
  run(w, rows, blocks, mode, threads, nullptr, exact_rows);
  if (!exact_rows.empty()) run(w, rows, blocks, Mode::kExact, threads, &exact_rows, none);
}

void silu_mul(float* gate, const float* up, int64_t count) { kernels().silu_mul(gate, up, count); }

void moe(const Weights& w13, const Weights& w2, const void* x, Type type, int64_t tokens, int64_t top_k,
         const int64_t* ids, const float* weights, void* y, Mode mode, int threads) {
  const char* op = "int4_moe";
  const int64_t hidden = w13.k, intermediate = w2.k, experts = w13.experts;
  check(w13.n == 2 * intermediate && w2.n == hidden && w2.experts == experts, op, "w2", "the transpose of w13", w2.n);
  for (int64_t i = 0; i < tokens * top_k; i++)
    check(ids[i] >= 0 && ids[i] < experts, op, "topk_ids", "values in 0.." + std::to_string(experts - 1), ids[i]);
  thread_local Scratch up_memory, down_memory;
  const int64_t row_floats = 2 * intermediate + hidden, budget = (256 << 20) / 4;
  const int64_t chunk = std::max<int64_t>(1, budget / (row_floats * std::max<int64_t>(1, top_k)));
  for (int64_t t0 = 0; t0 < tokens; t0 += chunk) {  // a token's result does not depend on its chunk
    const int64_t count = std::min(chunk, tokens - t0), pairs = count * top_k;
    std::vector<int64_t> offsets(experts + 1, 0), token_of(pairs), position(pairs);
    const int64_t* id = ids + t0 * top_k;
    for (int64_t i = 0; i < pairs; i++) offsets[id[i] + 1]++;
    for (int64_t e = 0; e < experts; e++) offsets[e + 1] += offsets[e];
    std::vector<int64_t> next(offsets.begin(), offsets.end() - 1);
    for (int64_t i = 0; i < pairs; i++) {
      position[i] = next[id[i]]++;
      token_of[position[i]] = t0 + i / top_k;
    }
    float* up = up_memory.get<float>(pairs * 2 * intermediate);
    float* down = down_memory.get<float>(pairs * hidden);
    gemm(op, w13, {x, type, hidden, up, Type::kF32, 2 * intermediate, offsets.data(), token_of.data(), nullptr}, mode,
         threads);
    const Kernels& isa = kernels();
    const int active = (double)pairs * (double)row_floats < (double)kSerialWork ? 1 : threads;
#pragma omp parallel for num_threads(active) if (active > 1)
    for (int64_t i = 0; i < pairs; i++)
      isa.silu_mul(up + i * 2 * intermediate, up + i * 2 * intermediate + intermediate, intermediate);
    gemm(op, w2, {up, Type::kF32, 2 * intermediate, down, Type::kF32, hidden, offsets.data(), nullptr, nullptr}, mode,
         threads);
    const Rows out{nullptr, type, 0, y, type, hidden, nullptr, nullptr, nullptr};
#pragma omp parallel for num_threads(active) if (active > 1)
    for (int64_t t = 0; t < count; t++) {
      float sum[kTileN];
      for (int64_t n0 = 0; n0 < hidden; n0 += kTileN) {
        const int64_t width = std::min<int64_t>(kTileN, hidden - n0);
        std::fill(sum, sum + kTileN, 0.0f);
        for (int64_t j = 0; j < top_k; j++) {
          const float weight = weights[(t0 + t) * top_k + j];
          const float* row = down + position[t * top_k + j] * hidden + n0;
          for (int64_t i = 0; i < width; i++) sum[i] += weight * row[i];
        }
        write_row(out, sum, t0 + t, n0, width);
      }
    }
  }
  up_memory.trim(), down_memory.trim();
}

}  // namespace m3::int4
