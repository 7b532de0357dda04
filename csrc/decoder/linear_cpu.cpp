// The CPU driver of linear: cuts y into tasks (a run of columns, a run of rows) and lets threads draw them.
//
// Few rows: a task is a run of columns whose weights are some tens of kilobytes. Many rows: a panel of columns and a
// run of rows. Tasks are drawn dynamically, so a core that is shared with somebody else does not hold up the rest. How
// y is cut changes no bit of it.
#include "decoder/linear_cpu_driver.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>

#include "common/isa.h"

namespace m3::decoder {
namespace {

constexpr int64_t kSerialWork = 1 << 17;   // multiply-adds under which a second thread costs more than it brings
constexpr int64_t kStreamRows = 24;        // the most rows that stay in L2 beside a strip of the weight
constexpr int64_t kStreamBytes = 1 << 16;  // of weights in a task of few rows
constexpr int64_t kBlockRows = 192;        // the most rows of a task of many

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

}  // namespace

void linear(const Dense& w, const float* x, int64_t x_stride, float* y, int64_t y_stride, int64_t rows, int threads) {
  if (rows <= 0 || w.n <= 0) return;
  const Kernels& isa = kernels();
  const int64_t size = w.type == Type::kF32 ? 4 : 2, bias_size = w.bias_type == Type::kF32 ? 4 : 2;
  const bool few = rows <= kStreamRows;
  const int64_t run =
      few ? std::max<int64_t>(1, kStreamBytes / (kColumns * size * std::max<int64_t>(1, w.k))) * kColumns
          : kPanelColumns;
  const int64_t columns = few ? std::min(run, ceil_div(w.n, kColumns) * kColumns) : run;
  const int64_t across = ceil_div(w.n, columns), down = few ? 1 : ceil_div(rows, kBlockRows), tasks = across * down;
  if ((double)rows * (double)w.n * (double)w.k < (double)kSerialWork) threads = 1;
  threads = (int)std::min<int64_t>(threads, tasks);
  const int64_t own = kPanelFloats + columns;
  thread_local Scratch memory;
  float* scratch = memory.get(own * threads);
  const auto multiply = [&](int64_t task, float* mine) {
    const int64_t n = task / down * columns, part = task % down;
    const int64_t row = rows * part / down, stop = rows * (part + 1) / down;
    Product p;
    p.weight = static_cast<const char*>(w.weight) + n * w.k * size;
    p.type = w.type;
    p.weight_stride = p.k = w.k;
    p.columns = std::min(columns, w.n - n);
    p.piece = piece_of(w.k);
    p.x = x + row * x_stride, p.x_stride = x_stride, p.rows = stop - row;
    p.y = y + row * y_stride + n, p.y_stride = y_stride;
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
    for (int64_t task = 0; task < tasks; task++) multiply(task, scratch);
    return;
  }
  std::atomic<int64_t> next_task{0}, next_slot{0};
#pragma omp parallel num_threads(threads)
  {
    float* mine = scratch + next_slot.fetch_add(1) * own;
    for (int64_t task; (task = next_task.fetch_add(1)) < tasks;) multiply(task, mine);
  }
}

}  // namespace m3::decoder
