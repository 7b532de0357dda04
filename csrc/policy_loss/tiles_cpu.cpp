// The CPU driver: threads draw runs of rows. A row is never split: its sums have one order, whatever the threads.
#include "policy_loss/tiles_cpu_driver.h"

#include <algorithm>
#include <atomic>
#include <vector>

#include "common/isa.h"

namespace m3::policy_loss {
namespace {

constexpr int64_t kRunElements = 1 << 14;  // of a run of rows: microseconds, so a slow core holds up nobody for long

const Kernels& kernels() {
  switch (current_isa()) {
#if defined(__x86_64__)
    case Isa::kAvx512Vnni:
    case Isa::kAvx512:
      return kAvx512Kernels;
    case Isa::kAvxVnni:
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

// visit(i, scratch) for every row; scratch holds `floats` of the thread.
template <class Visit>
void for_each_row(int64_t rows, int64_t columns, int64_t floats, int threads, Visit visit) {
  const int64_t run = std::max<int64_t>(1, kRunElements / std::max<int64_t>(1, columns)), runs = (rows + run - 1) / run;
  threads = (int)std::min<int64_t>(threads, std::max<int64_t>(1, runs));
  std::vector<float> memory(threads * floats);
  if (threads == 1) {
    for (int64_t i = 0; i < rows; i++) visit(i, memory.data());
    return;
  }
  std::atomic<int64_t> next_run{0}, next_slot{0};
#pragma omp parallel num_threads(threads)
  {
    float* mine = memory.data() + next_slot.fetch_add(1) * floats;
    for (int64_t r; (r = next_run.fetch_add(1)) < runs;)
      for (int64_t i = r * run; i < std::min(rows, (r + 1) * run); i++) visit(i, mine);
  }
}

}  // namespace

void statistics(const Statistics& args, int threads) {
  const Kernels& isa = kernels();
  for_each_row(args.num_rows, args.columns, 0, threads, [&](int64_t i, float*) { isa.statistics(args, i); });
}

void gradient(const Gradient& args, int threads) {
  const Kernels& isa = kernels();
  for_each_row(args.num_rows, args.columns, 2 * args.num_ids, threads,
               [&](int64_t i, float* scratch) { isa.gradient(args, i, scratch); });
}

void divergence(const Divergence& args, int threads) {
  const Kernels& isa = kernels();
  for_each_row(args.num_rows, args.columns, 0, threads, [&](int64_t i, float*) { isa.divergence(args, i); });
}

void divergence_gradient(const Divergence& args, int threads) {
  const Kernels& isa = kernels();
  for_each_row(args.num_rows, args.columns, 0, threads, [&](int64_t i, float*) { isa.divergence_gradient(args, i); });
}

}  // namespace m3::policy_loss
