// SGLang's CUDA kernels of speculative decoding as functions of the CPU: compiled by g++ from SGLang's own headers, one
// thread of one block after another. CUDA's words are defined here, and of FlashInfer and CUB the few names that the
// tree sampler uses, for blocks of one thread: its sums run in the order of the tokens, in fp32.
#include <cmath>
#include <cstdint>

struct Index {
  uint32_t x = 0;
};
static Index blockIdx, threadIdx;
#define __global__
#define __device__
#define __shared__
#define __align__(bytes) __attribute__((aligned(bytes)))
static inline void __syncthreads() {}
static inline float max(float a, float b) { return std::fmax(a, b); }

namespace cub {
enum BlockScanAlgorithm { kAnyScan };
enum BlockReduceAlgorithm { kAnyReduce };
template <class T, uint32_t kThreads, BlockReduceAlgorithm kAlgorithm>
struct BlockReduce {
  static_assert(kThreads == 1);
  explicit BlockReduce(int) {}
  // nvcc takes x.Sum<n>(values) in a template for a call; to g++ it is two comparisons, which these are.
  struct {
    auto operator<(uint32_t) const { return *this; }
    template <uint32_t kCount>
    T operator>(const T (&values)[kCount]) const {
      T sum = 0;
      for (const T value : values) sum += value;
      return sum;
    }
  } Sum;
};
}  // namespace cub

namespace flashinfer {
static inline uint32_t ceil_div(uint32_t a, uint32_t b) { return (a + b - 1) / b; }
template <class T, uint32_t kCount>
struct vec_t {
  T values[kCount];
  T& operator[](uint32_t i) { return values[i]; }
  void fill(T value) {
    for (T& each : values) each = value;
  }
  void load(const T* from) {
    for (T& each : values) each = *from++;
  }
};
namespace sampling {
template <uint32_t kThreads, cub::BlockScanAlgorithm kScan, cub::BlockReduceAlgorithm kReduce>
struct SamplingTempStorage {
  struct {
    int reduce;
  } block_prim;
  struct {
    float value;
  } block_aggregate;
  int sampled_id, last_valid_id;
};
// The first element past which the sum of those that pred holds for exceeds u, and the last that pred holds for.
template <uint32_t kCount, uint32_t kThreads, cub::BlockScanAlgorithm kScan, cub::BlockReduceAlgorithm kReduce,
          bool kDeterministic, class Pred>
void DeviceSamplingFromProb(uint32_t i, uint32_t d, Pred pred, float u, vec_t<float, kCount> values, float& aggregate,
                            SamplingTempStorage<kThreads, kScan, kReduce>* storage) {
  for (uint32_t j = 0; j < kCount && i * kCount + j < d; j++) {
    if (!pred(values[j])) continue;
    const bool below = !(aggregate > u);
    aggregate += values[j];
    if (below && aggregate > u) storage->sampled_id = (int)(i * kCount + j);
    storage->last_valid_id = (int)(i * kCount + j);
  }
}
}  // namespace sampling
}  // namespace flashinfer

#include <sgl_kernel/speculative/eagle.cuh>
#include <sgl_kernel/speculative/ngram.cuh>
#include <sgl_kernel/speculative/sampling.cuh>

namespace sglang::speculative_sampling {
alignas(16) uint8_t smem_sampling[256];
}

using namespace sglang::speculative;

template <class Kernel, class... Args>
static void launch(int64_t blocks, int64_t threads, Kernel kernel, Args... args) {
  for (blockIdx.x = 0; blockIdx.x < blocks; blockIdx.x++)
    for (threadIdx.x = 0; threadIdx.x < threads; threadIdx.x++) kernel(args...);
  blockIdx.x = threadIdx.x = 0;
}

extern "C" {

void build_tree(int64_t batch, int64_t* parent_list, int64_t* selected, int64_t* seq_lens, void* mask,
                int64_t* positions, int64_t* index, int64_t* next_token, int64_t* next_sibling, int64_t topk,
                int64_t depth, int64_t nodes, int64_t mode) {
  if (mode == QLEN_ONLY_BITPACKING)
    launch(batch, nodes, build_tree_efficient_partial_packed, parent_list, selected, seq_lens, (uint8_t*)mask,
           positions, index, next_token, next_sibling, (int)topk, (int)depth, (int)nodes,
           (size_t)(nodes > 16  ? 4
                    : nodes > 8 ? 2
                                : 1));
  else
    launch(batch, nodes, build_tree_efficient, parent_list, selected, seq_lens, (bool*)mask, positions, index,
           next_token, next_sibling, (int)topk, (int)depth, (int)nodes, (int)mode);
}

void reconstruct(int64_t batch, bool* mask, int64_t* seq_lens, int64_t* positions, int64_t* index, int64_t* next_token,
                 int64_t* next_sibling, int64_t nodes) {
  launch(batch, nodes, reconstructIndicesFromTreeMask, mask, seq_lens, positions, index, next_token, next_sibling,
         (int)batch, (int)nodes);
}

void verify_greedy(int64_t batch, int32_t* predicts, int32_t* accept_index, int32_t* accept_token_num,
                   int64_t* candidates, int64_t* index, int64_t* next_token, int64_t* next_sibling, int64_t* target,
                   int64_t slots, int64_t nodes) {
  launch(batch, 1, VerifyTreeGreedy<int32_t, int64_t>, predicts, accept_index, accept_token_num, candidates, index,
         next_token, next_sibling, target, (uint32_t)batch, (uint32_t)slots, (uint32_t)nodes);
}

void sample_tree(int64_t batch, int32_t* predicts, int32_t* accept_index, int32_t* accept_token_num,
                 int64_t* candidates, int64_t* index, int64_t* next_token, int64_t* next_sibling, float* coins,
                 float* final_coins, float* target, float* draft, int64_t slots, int64_t nodes, int64_t vocabulary,
                 double threshold_single, double threshold_acc) {
  launch(batch, 1,
         sglang::speculative_sampling::TreeSpeculativeSamplingTargetOnly<1, cub::kAnyScan, cub::kAnyReduce, 1, true,
                                                                         float, int32_t, int64_t>,
         predicts, accept_index, accept_token_num, candidates, index, next_token, next_sibling, coins, final_coins,
         target, draft, (uint32_t)batch, (uint32_t)slots, (uint32_t)nodes, (uint32_t)vocabulary,
         (float)threshold_single, max((float)threshold_acc, 1e-9f));
}
}
