// A mixture of experts around its products: which rows belong to which expert, and elementwise work on those rows.
#include "common/launch.cuh"
#include "common/ptx.cuh"
#include "int4/route_cuda.h"

namespace m3::int4 {
namespace {

constexpr int kThreads = 1024;
constexpr int64_t kOneBlock = 8192;    // slots that one block routes alone
constexpr int64_t kBlockSlots = 4096;  // slots of a block when there are more

// -- routing: a stable counting sort ----------------------------------------------------------------------------------
// Bucket e < experts is expert e, bucket `experts` the ids out of range.
struct Buckets {
  int count;
  int* next;         // (count,): how many there are, then the row that the next slot of a bucket gets
  uint8_t* of_warp;  // (count, 32): slots of each warp in the pass under way; zero between passes
};

M3_DEVICE Buckets buckets(int64_t experts) {
  const int count = (int)experts + 1;
  char* shared = shared_memory();
  return {count, (int*)(shared + 32 * count), (uint8_t*)shared};
}
int shared_bytes(int64_t experts) { return 36 * ((int)experts + 1); }

M3_DEVICE int bucket_of(int64_t id, const Buckets& b) {
  return (uint64_t)id < (uint64_t)(b.count - 1) ? (int)id : b.count - 1;
}

// Counts the slots first .. last - 1 in b.next, and clears b.of_warp. Ends with a barrier.
M3_DEVICE void count_slots(const Buckets& b, const int64_t* ids, int64_t first, int64_t last) {
  for (int i = threadIdx.x; i < b.count; i += kThreads) b.next[i] = 0;
  for (int i = threadIdx.x; i < 8 * b.count; i += kThreads) ((uint32_t*)b.of_warp)[i] = 0;
  __syncthreads();
  for (int64_t slot = first + threadIdx.x; slot < last; slot += kThreads)
    atomicAdd(&b.next[bucket_of(ids[slot], b)], 1);
  __syncthreads();
}

// Counts become sums of the counts before them. Ends with a barrier.
M3_DEVICE void sum_counts(const Buckets& b) {
  if (threadIdx.x < 32) {
    int before = 0;
    for (int first = 0; first < b.count; first += 32) {
      const int i = first + threadIdx.x, own = i < b.count ? b.next[i] : 0;
      int sum = own;
#pragma unroll
      for (int by = 1; by < 32; by *= 2) {
        const int other = __shfl_up_sync(~0u, sum, by);
        if ((int)threadIdx.x >= by) sum += other;
      }
      if (i < b.count) b.next[i] = before + sum - own;
      before += __shfl_sync(~0u, sum, 31);
    }
  }
  __syncthreads();
}

// Gives the slots first .. last - 1 their rows, 1024 at a time. A slot's row is b.next of its bucket, plus the slots of
// that bucket in the warps before, plus those in the lanes before.
M3_DEVICE void place_slots(const Buckets& b, const Routing& p, int64_t first, int64_t last) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t slots = p.tokens * p.topk;
  for (int64_t start = first; start < last; start += kThreads) {
    const int64_t slot = start + threadIdx.x;
    const int bucket = slot < last ? bucket_of(p.ids[slot], b) : -1;
    const uint32_t same = __match_any_sync(~0u, (uint32_t)bucket);
    const int leader = __ffs(same) - 1, together = __popc(same);
    const bool leads = lane == leader && bucket >= 0;
    if (leads) b.of_warp[32 * bucket + warp] = (uint8_t)together;
    __syncthreads();
    int row = 0;
    if (leads) {
      const uint32_t* counts = (const uint32_t*)(b.of_warp + 32 * bucket);
      uint32_t sums = 0;  // of even and of odd bytes: at most 31 * 32 in 16 bits
      for (int i = 0; i <= warp / 4; ++i) {
        const uint32_t four = i < warp / 4 ? counts[i] : counts[i] & ((1u << (8 * (warp % 4))) - 1);
        sums += (four & 0x00FF00FF) + (four >> 8 & 0x00FF00FF);
      }
      row = b.next[bucket] + (int)((sums & 0xFFFF) + (sums >> 16));
    }
    row = __shfl_sync(~0u, row, leader) + __popc(same & ((1u << lane) - 1));
    if (bucket >= 0 && row >= 0 && row < slots) {  // always, unless someone else wrote to the workspace
      p.row_token[row] = (int)((uint32_t)slot / (uint32_t)p.topk);
      p.slot_row[slot] = bucket < p.experts ? row : -1;
    }
    __syncthreads();
    if (leads) {
      b.of_warp[32 * bucket + warp] = 0;
      atomicAdd(&b.next[bucket], together);
    }
    __syncwarp();
  }
}

M3_DEVICE void store_offsets(const Buckets& b, int32_t* offsets) {
  for (int e = threadIdx.x; e < b.count; e += kThreads) offsets[e] = b.next[e];
}

// Grid: one block, for a few thousand slots: a launch costs more than a second block would save. Reads the ids twice,
// the second time from L1.
__global__ void __launch_bounds__(kThreads) route_kernel(const Routing p) {
  const Buckets b = buckets(p.experts);
  const int64_t slots = p.tokens * p.topk;
  count_slots(b, p.ids, 0, slots);
  sum_counts(b);
  store_offsets(b, p.offsets);
  __syncthreads();
  place_slots(b, p, 0, slots);
}

// Grid: a block for every 4096 slots. Each writes its counts, workspace[block, bucket]; the last to arrive replaces
// them by the sum of the blocks before, in order, and writes offsets.
__global__ void __launch_bounds__(kThreads) route_count_kernel(const Routing p) {
  const Buckets b = buckets(p.experts);
  const int64_t first = blockIdx.x * kBlockSlots, slots = p.tokens * p.topk;
  count_slots(b, p.ids, first, min(slots, first + kBlockSlots));
  for (int i = threadIdx.x; i < b.count; i += kThreads) p.workspace[(int64_t)blockIdx.x * b.count + i] = b.next[i];
  __syncthreads();
  int* last = (int*)b.of_warp;
  if (threadIdx.x == 0) *last = ptx::add_acq_rel(p.counter, 1) == (int)gridDim.x - 1;
  __syncthreads();
  if (!*last) return;
  if (threadIdx.x == 0) *p.counter = 0;
  for (int i = threadIdx.x; i < b.count; i += kThreads) {
    constexpr int kAtOnce = 8;  // loads under way
    int before = 0;
    for (int block = 0; block < (int)gridDim.x; block += kAtOnce) {
      int32_t* at = p.workspace + (int64_t)block * b.count + i;
      int counts[kAtOnce];
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) counts[j] = block + j < (int)gridDim.x ? __ldcg(at + (int64_t)j * b.count) : 0;
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        if (block + j < (int)gridDim.x) at[(int64_t)j * b.count] = before;
        before += counts[j];
      }
    }
    b.next[i] = before;
  }
  __syncthreads();
  sum_counts(b);
  store_offsets(b, p.offsets);
}

// Grid: a block for every 4096 slots, after route_count_kernel.
__global__ void __launch_bounds__(kThreads) route_place_kernel(const Routing p) {
  const Buckets b = buckets(p.experts);
  for (int i = threadIdx.x; i < b.count; i += kThreads)
    b.next[i] = p.offsets[i] + p.workspace[(int64_t)blockIdx.x * b.count + i];
  for (int i = threadIdx.x; i < 8 * b.count; i += kThreads) ((uint32_t*)b.of_warp)[i] = 0;
  __syncthreads();
  const int64_t first = blockIdx.x * kBlockSlots;
  place_slots(b, p, first, min(p.tokens * p.topk, first + kBlockSlots));
}

// -- elementwise ------------------------------------------------------------------------------------------------------
constexpr int kElementThreads = 128;

// kWidth floats: 4 from an address that 16 divides, or 1.
template <int kWidth>
M3_DEVICE void load_floats(float (&to)[kWidth], const float* from) {
  if constexpr (kWidth == 4) {
    const float4 four = __ldcs((const float4*)from);
    to[0] = four.x, to[1] = four.y, to[2] = four.z, to[3] = four.w;
  } else {
    to[0] = *from;
  }
}

template <Half kHalf, int kWidth>
M3_DEVICE void store_halves(uint16_t* to, const float (&from)[kWidth]) {
  if constexpr (kWidth == 4)
    *(uint2*)to = make_uint2(ptx::pack2<kHalf>(from[0], from[1]), ptx::pack2<kHalf>(from[2], from[3]));
  else
    *to = ptx::from_float<kHalf>(from[0]);
}

// Grid: (tokens * blocks of columns). A thread owns kWidth columns of a token, and has the loads of eight slots under
// way before it adds the first.
template <Half kHalf, int kWidth>
__global__ void __launch_bounds__(kElementThreads) combine_kernel(const Combination p) {
  constexpr int kAtOnce = 8;
  const uint32_t blocks = (uint32_t)ceil_div64(p.columns, kElementThreads * kWidth), token = blockIdx.x / blocks;
  const int64_t column = (blockIdx.x % blocks * (int64_t)kElementThreads + threadIdx.x) * kWidth;
  if (column >= p.columns) return;
  const int64_t rows = p.tokens * p.topk;
  float sum[kWidth] = {};
  for (int64_t first = token * p.topk, last = first + p.topk; first < last; first += kAtOnce) {
    float term[kAtOnce][kWidth], weight[kAtOnce];
    bool there[kAtOnce];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const int64_t row = first + j < last ? p.slot_row[first + j] : -1;
      there[j] = row >= 0 && row < rows;
      if (!there[j]) continue;
      load_floats(term[j], p.rows + row * p.columns + column);
      weight[j] = p.weights[first + j];
    }
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j)
#pragma unroll
      for (int i = 0; i < kWidth; ++i)
        if (there[j]) sum[i] = ptx::fma(term[j][i], weight[j], sum[i]);
  }
  store_halves<kHalf>((uint16_t*)p.y + token * p.columns + column, sum);
}

// Grid: (rows * blocks of columns). A thread owns kWidth columns of y.
template <Half kHalf, int kWidth>
__global__ void __launch_bounds__(kElementThreads) gate_kernel(const float* x, int64_t columns, uint16_t* y) {
  const uint32_t blocks = (uint32_t)ceil_div64(columns, kElementThreads * kWidth);
  const int64_t row = blockIdx.x / blocks;
  const int64_t column = (blockIdx.x % blocks * (int64_t)kElementThreads + threadIdx.x) * kWidth;
  if (column >= columns) return;
  float gates[kWidth], ups[kWidth];
  load_floats(gates, x + row * 2 * columns + column);
  load_floats(ups, x + row * 2 * columns + columns + column);
#pragma unroll
  for (int i = 0; i < kWidth; ++i) gates[i] = ptx::mul(__fdiv_rn(gates[i], ptx::add(1.f, expf(-gates[i]))), ups[i]);
  store_halves<kHalf>(y + row * columns + column, gates);
}

constexpr int kGatherThreads = 256, kGatherColumns = 8 * kGatherThreads;

// Grid: (rows * blocks of 2048 columns). A block owns a piece of one row of y; its threads look at one expert each to
// find the row's. Reads of x are scattered within one row, which L1 holds.
__global__ void __launch_bounds__(kGatherThreads) gather_kernel(const Gathering p) {
  int* found = (int*)shared_memory();
  const uint32_t blocks = (uint32_t)ceil_div64(p.columns, kGatherColumns);
  const int64_t row = blockIdx.x / blocks;
  if (threadIdx.x == 0) *found = p.offsets ? -1 : 0;
  __syncthreads();
  if (p.offsets)
    for (int e = threadIdx.x; e < p.experts; e += kGatherThreads)
      if (p.offsets[e] <= row && row < p.offsets[e + 1]) *found = e;
  __syncthreads();
  const int64_t expert = *found, source = p.row_index ? p.row_index[row] : row;
  const bool there = expert >= 0 && source >= 0 && source < p.x_rows;
  const uint16_t* x = (const uint16_t*)p.x + source * p.columns;
  const int32_t* perm = p.perm + expert * p.columns;
  const int64_t first = blockIdx.x % blocks * (int64_t)kGatherColumns + threadIdx.x;
#pragma unroll
  for (int i = 0; i < kGatherColumns / kGatherThreads; ++i) {
    const int64_t column = first + i * kGatherThreads;
    if (column >= p.columns) break;
    const int64_t from = there ? perm[column] : -1;
    ((uint16_t*)p.y)[row * p.columns + column] = from >= 0 && from < p.columns ? x[from] : 0;
  }
}

unsigned blocks_of(const char* op, int64_t rows, int64_t columns, int64_t block_columns) {
  const int64_t blocks = rows * ceil_div64(columns, block_columns);
  if (blocks > INT32_MAX) throw std::invalid_argument(std::string(op) + ": rows: want under 2**31 blocks; got more");
  return (unsigned)blocks;
}

bool whole_fours(int64_t columns, const void* a, const void* b) {
  return columns % 4 == 0 && (uintptr_t)a % 16 == 0 && (uintptr_t)b % 8 == 0;
}

}  // namespace

int64_t routing_workspace(int64_t slots, int64_t experts) {
  return slots <= kOneBlock ? 0 : ceil_div64(slots, kBlockSlots) * (experts + 1);
}

void route(const Routing& p) {
  const int64_t slots = p.tokens * p.topk;
  Launch how{.grid = dim3(1),
             .block = dim3(kThreads),
             .shared_bytes = shared_bytes(p.experts),
             .stream = (cudaStream_t)p.stream};
  if (slots <= kOneBlock) return launch("int4_moe", route_kernel, how, p);
  how.grid = dim3((unsigned)ceil_div64(slots, kBlockSlots));
  launch("int4_moe", route_count_kernel, how, p);
  launch("int4_moe", route_place_kernel, how, p);
}

void combine(const Combination& p) {
  const bool fours = whole_fours(p.columns, p.rows, p.y), bf16 = p.y_type == DeviceType::kBf16;
  const unsigned blocks = blocks_of("int4_moe", p.tokens, p.columns, kElementThreads * (fours ? 4 : 1));
  const auto kernel = bf16 ? (fours ? combine_kernel<Half::kBf16, 4> : combine_kernel<Half::kBf16, 1>)
                           : (fours ? combine_kernel<Half::kF16, 4> : combine_kernel<Half::kF16, 1>);
  launch("int4_moe", kernel, {.grid = dim3(blocks), .block = dim3(kElementThreads), .stream = (cudaStream_t)p.stream},
         p);
}

void gate(const float* x, int64_t rows, int64_t columns, void* y, DeviceType y_type, void* stream) {
  const bool fours = whole_fours(columns, x, y), bf16 = y_type == DeviceType::kBf16;
  const unsigned blocks = blocks_of("int4_moe", rows, columns, kElementThreads * (fours ? 4 : 1));
  const auto kernel = bf16 ? (fours ? gate_kernel<Half::kBf16, 4> : gate_kernel<Half::kBf16, 1>)
                           : (fours ? gate_kernel<Half::kF16, 4> : gate_kernel<Half::kF16, 1>);
  launch("int4_moe", kernel, {.grid = dim3(blocks), .block = dim3(kElementThreads), .stream = (cudaStream_t)stream}, x,
         columns, (uint16_t*)y);
}

void gather_columns(const Gathering& p) {
  launch("int4_gemm", gather_kernel,
         {.grid = dim3(blocks_of("int4_gemm", p.rows, p.columns, kGatherColumns)),
          .block = dim3(kGatherThreads),
          .shared_bytes = 16,
          .stream = (cudaStream_t)p.stream},
         p);
}

}  // namespace m3::int4
