// The CPU driver of linear: cuts y into tasks (a run of columns, a run of rows) for threads.
//
// Few rows: a task is a run of columns whose weights are some tens of kilobytes. Many rows: a panel of columns and a
// run of rows. How y is cut, and who computes what (common/tasks.h), changes no bit of it.
#include "decoder/linear_cpu_driver.h"

#include <omp.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>

#include "common/isa.h"
#include "common/tasks.h"

namespace m3::decoder {
namespace {

constexpr int64_t kSerialWork = 1 << 17;    // multiply-adds under which a second thread costs more than it brings
constexpr int64_t kStreamFloats = 1 << 16;  // of x that stay in L2 beside a strip of the weight
constexpr int64_t kStreamBytes = 1 << 16;   // of weights in a task of few rows
constexpr int64_t kLeastTiles = 16;         // of a task of many rows
constexpr int64_t kTasksPerThread = 4;
constexpr int64_t kPackedFloats = 1 << 24;  // of x that are packed at a time

struct Free {
  void operator()(void* p) const { std::free(p); }
};

// Memory that stays with its thread between calls, 64-byte aligned.
class Scratch {
 public:
  float* get(int64_t floats) {
    if (floats > size_) {
      memory_.reset();
      size_ = 0;
      memory_.reset(static_cast<float*>(std::aligned_alloc(64, (size_t)(floats + 15) / 16 * 64)));
      if (!memory_) throw std::bad_alloc();
      size_ = floats;
    }
    return memory_.get();
  }

 private:
  std::unique_ptr<float, Free> memory_;
  int64_t size_ = 0;
};

const Kernels& kernels() {
  switch (current_isa()) {
#if defined(__x86_64__)
    case Isa::kAvx512Vnni:
    case Isa::kAvx512:
      return kAvx512Linear;
    case Isa::kAvxVnni:
    case Isa::kAvx2:
      return kAvx2Linear;
#elif defined(__aarch64__) && defined(M3_NEON)
    case Isa::kNeon:
      return kNeonLinear;
#endif
    default:
      return kScalarLinear;
  }
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Columns of a piece of K: pieces of one size, all but the last a multiple of kPieceStep.
int64_t piece_of(int64_t k) {
  const int64_t pieces = std::max<int64_t>(1, ceil_div(k, kMostPiece));
  return ceil_div(ceil_div(std::max<int64_t>(1, k), pieces), kPieceStep) * kPieceStep;
}

void multiply(const Kernels& isa, const Dense& w, const float* x, int64_t x_stride, float* y, int64_t y_stride,
              int64_t rows, int threads) {
  if ((double)rows * (double)w.n * (double)w.k < (double)kSerialWork) threads = 1;
  const int64_t size = w.type == Type::kF32 ? 4 : 2, bias_size = w.bias_type == Type::kF32 ? 4 : 2;
  const int64_t piece = piece_of(w.k), padded_k = ceil_div(w.k, kPieceStep) * kPieceStep;
  const int64_t tiles = ceil_div(rows, isa.tile_rows);
  const bool few = tiles == 1 || rows * padded_k <= kStreamFloats;
  const int64_t strips = few ? std::max<int64_t>(1, kStreamBytes / (kColumns * size * std::max<int64_t>(1, w.k)))
                             : kPanelColumns / kColumns;
  const int64_t columns = std::min(strips, ceil_div(w.n, kColumns)) * kColumns, across = ceil_div(w.n, columns);
  const int64_t parts = ceil_div(kTasksPerThread * threads, across);  // rows are cut only where columns are too few
  const int64_t down = few || threads == 1 ? 1 : std::min(parts, ceil_div(tiles, kLeastTiles)), tasks = across * down;
  threads = (int)std::min<int64_t>(threads, tasks);
  const int64_t own = kPanelFloats + columns, packed_floats = tiles > 1 ? rows * padded_k : 0;
  thread_local Scratch memory, packed_memory;
  float *scratch = memory.get(own * threads), *packed = packed_floats ? packed_memory.get(packed_floats) : nullptr;
  const auto pack = [&](int64_t tile) {
    const int64_t row = rows * tile / tiles, count = rows * (tile + 1) / tiles - row;
    for (int64_t k = 0; k < w.k; k += piece)
      isa.pack(x + row * x_stride + k, x_stride, (int)count, std::min(piece, w.k - k),
               packed + row * padded_k + k * count);
  };
  const auto run = [&](int64_t task, float* mine) {
    const int64_t n = task / down * columns, part = task % down;
    Product p;
    p.weight = static_cast<const char*>(w.weight) + n * w.k * size;
    p.type = w.type;
    p.columns = std::min(columns, w.n - n), p.k = w.k, p.piece = piece;
    p.x = x, p.x_stride = x_stride, p.rows = rows;
    p.packed = packed, p.padded_k = padded_k, p.tiles = tiles;
    p.first_tile = tiles * part / down, p.last_tile = tiles * (part + 1) / down;
    p.y = y + n, p.y_stride = y_stride;
    p.panel = mine;
    p.bias = nullptr;
    if (w.bias) {
      float* bias = mine + kPanelFloats;
      isa.widen(static_cast<const char*>(w.bias) + n * bias_size, w.bias_type, p.columns, bias);
      p.bias = bias;
    }
    few ? isa.stream(p) : isa.block(p);
  };
  if (threads == 1) {
    if (packed)
      for (int64_t tile = 0; tile < tiles; tile++) pack(tile);
    for (int64_t task = 0; task < tasks; task++) run(task, scratch);
    return;
  }
  Tasks packing(packed ? tiles : 0, threads), products(tasks, threads);
#pragma omp parallel num_threads(threads)
  {
    const int thread = omp_get_thread_num();
    float* mine = scratch + thread * own;
    if (packed) {
      packing.draw(thread, pack);
#pragma omp barrier
    }
    products.draw(thread, [&](int64_t task) { run(task, mine); });
  }
}

}  // namespace

void linear(const Dense& w, const float* x, int64_t x_stride, float* y, int64_t y_stride, int64_t rows, int threads) {
  if (rows <= 0 || w.n <= 0) return;
  const Kernels& isa = kernels();
  const int64_t most = std::max<int64_t>(kLeastTiles * isa.tile_rows, kPackedFloats / std::max<int64_t>(1, w.k));
  for (int64_t row = 0; row < rows; row += most)
    multiply(isa, w, x + row * x_stride, x_stride, y + row * y_stride, y_stride, std::min(most, rows - row), threads);
}

}  // namespace m3::decoder
