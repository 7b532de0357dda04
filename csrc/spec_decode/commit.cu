// Commit of an accepted path, on CUDA: rows of all caches move towards the root, hidden states are gathered.
#include "spec_decode/commit_cuda.h"

#include <algorithm>
#include <climits>

#include "common/launch.cuh"
#include "common/ptx.cuh"

namespace m3::spec_decode {
namespace {

constexpr const char* kOp = "tree_commit";
constexpr int kThreads = 256;
constexpr int kAhead = 4;  // rows of a thread under way

// Where a row comes from and goes to; from -1: nowhere.
struct Move {
  int64_t from, to;
};

// Writes to[moves[i].to] = from[moves[i].from], i < count; `zeros`: 0 where there is no `from`.
template <class Unit>
M3_DEVICE void copy_rows(const Unit* from, Unit* to, const Move* moves, int count, bool zeros) {
  for (int i = 0; i < count; i += kAhead) {
    Unit value[kAhead];
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      value[j] = Unit{};
      if (i + j < count && moves[i + j].from >= 0) value[j] = from[moves[i + j].from];
    }
#pragma unroll
    for (int j = 0; j < kAhead; ++j)
      if (i + j < count && (zeros || moves[i + j].from >= 0)) to[moves[i + j].to] = value[j];
  }
}

// Grid: (requests, blocks of units of all caches, then of hidden states). A thread owns one unit of every slot of a
// request in one cache, and copies slot prefix + accept_index[j] to slot prefix + j for ascending j (the root is where
// it belongs). Nodes ascend along a path, so node j is at least j, and no slot is read after it was written: rows may
// be read ahead. The block looks the slots up once. A slot whose block id lies outside the cache is neither read nor
// written. A thread of the others owns `HiddenUnit` of every slot of `accepted`.
template <class Unit, class HiddenUnit>
__global__ __launch_bounds__(kThreads) void commit_kernel(const __grid_constant__ DeviceCommit c,
                                                          const __grid_constant__ Caches caches, int cache_blocks) {
  const int tid = threadIdx.x, b = blockIdx.x;
  Move* moves = (Move*)shared_memory();
  const int length = __ldg(c.accept_length + b), prefix = __ldg(c.cache_seqlens + b);
  const int used = (int)min((int64_t)max(length, -1) + 1, c.width);  // slots of the path
  const bool hidden = (int)blockIdx.y >= cache_blocks;
  if (c.new_seqlens && blockIdx.y == 0 && tid == 0) c.new_seqlens[b] = (int)((unsigned)prefix + (unsigned)length + 1u);

  const int64_t row_units = hidden ? c.hidden_bytes / (int64_t)sizeof(HiddenUnit) : caches.row;
  const int64_t unit = ((int64_t)blockIdx.y - (hidden ? cache_blocks : 0)) * kThreads + tid;
  const int64_t slot_units = caches.heads * caches.row;
  const int cache = hidden ? 0 : (int)(unit / slot_units);
  const int64_t in_slot = hidden ? unit : unit - cache * slot_units;
  const bool real = hidden ? unit < row_units : cache < caches.count;
  const int count = hidden ? (int)c.width : used;
  for (int start = 0; start < count; start += kThreads) {
    __syncthreads();
    if (start + tid < count) {
      const int j = start + tid, node = __ldg(c.accept_index + b * c.width + j);
      Move move{-1, 0};
      if (hidden) {
        move.to = j * row_units;
        if (j < used && node >= 0 && node < c.nodes) move.from = node * row_units;
      } else if (node > j && prefix >= 0 && ((int64_t)prefix + node) / caches.page_size < c.table_width) {
        const int64_t from = (int64_t)prefix + node, to = (int64_t)prefix + j;
        const int64_t from_page = from / caches.page_size, to_page = to / caches.page_size;
        const int from_block = __ldg(c.block_table + b * c.table_width + from_page);
        const int to_block = __ldg(c.block_table + b * c.table_width + to_page);
        if (from_block >= 0 && from_block < caches.pages && to_block >= 0 && to_block < caches.pages) {
          move.from = from_block * caches.page + (from - from_page * caches.page_size) * caches.slot;
          move.to = to_block * caches.page + (to - to_page * caches.page_size) * caches.slot;
        }
      }
      moves[tid] = move;
    }
    __syncthreads();
    const int here = min(count - start, kThreads);
    if (real && hidden) {
      const HiddenUnit* from = (const HiddenUnit*)c.hidden + b * c.nodes * row_units + in_slot;
      copy_rows(from, (HiddenUnit*)c.accepted + b * c.width * row_units + in_slot, moves, here, true);
    } else if (real) {
      const int64_t head = in_slot / caches.row;
      Unit* data = (Unit*)caches.data[cache] + head * caches.head + (in_slot - head * caches.row);
      copy_rows<Unit>(data, data, moves, here, false);
    }
  }
}

template <class Unit, class HiddenUnit>
void run(const DeviceCommit& c, const Caches& caches, cudaStream_t stream) {
  const auto blocks = [](int64_t units) { return (units + kThreads - 1) / kThreads; };
  const int64_t of_caches = blocks(caches.count * caches.heads * caches.row);
  const int64_t of_hidden = c.hidden ? blocks(c.hidden_bytes / (int64_t)sizeof(HiddenUnit)) : 0;
  Launch how{};
  how.grid = dim3((unsigned)c.requests, (unsigned)std::max<int64_t>(of_caches + of_hidden, c.new_seqlens != nullptr));
  how.block = dim3(kThreads), how.shared_bytes = kThreads * (int)sizeof(Move), how.stream = stream;
  launch(kOp, commit_kernel<Unit, HiddenUnit>, how, c, caches, (int)of_caches);
}

template <class Unit>
void run(const DeviceCommit& c, const Caches& caches, cudaStream_t stream) {
  if ((uintptr_t)c.hidden % 16 || (uintptr_t)c.accepted % 16 || c.hidden_bytes % 16)
    run<Unit, uint16_t>(c, caches, stream);
  else
    run<Unit, uint4>(c, caches, stream);
}

}  // namespace

void tree_commit(const DeviceCommit& c, const Caches& caches, void* stream) {
  const auto on = (cudaStream_t)stream;
  switch (caches.unit) {
    case 16:
      return run<uint4>(c, caches, on);
    case 4:
      return run<uint32_t>(c, caches, on);
    case 2:
      return run<uint16_t>(c, caches, on);
    default:
      return run<uint8_t>(c, caches, on);
  }
}

}  // namespace m3::spec_decode
