// y = x W^T for many rows at the rate of wgmma (sm_90a): y^T = W x^T, A from registers, B by way of shared memory.
#include <algorithm>

#include "int4/gemm_many.cuh"

namespace m3::int4 {
namespace {

// kSub m64 tiles of W a consumer warpgroup, of which there are two, and kTokens tokens.
template <Half kFormat, bool kScalesInTwo, int kSubTiles, int kTokenCount>
struct Shape {
  static constexpr Half kHalf = kFormat;
  static constexpr bool kTwoScales = kScalesInTwo;
  static constexpr int kSub = kSubTiles, kTokens = kTokenCount;
  static constexpr int kConsumers = 2, kTiles = kConsumers * kSub, kRows = kTiles * kTileN;
  static constexpr int kThreads = 128 * (kConsumers + 1);
  static constexpr int kStageTiles = 4, kColumns = kStageTiles * kTileK;  // 128 bytes of a row of x
  static constexpr int kXBytes = kTokens * kColumns * 2, kTileStage = kStageTiles * kTileBytes;
  static constexpr int kWBytes = kTiles * kTileStage;
  static constexpr int kStages = kXBytes + kWBytes > 20 << 10 ? 6 : 8;
  static constexpr int kBehind = 3;                        // stages whose copies of x may be under way behind the last
  static constexpr int kChunk = 32;                        // tokens that a warpgroup stages at once on their way to y
  static constexpr int kResults = kChunk * kSub * kTileN;  // floats
  static constexpr int kSharedBytes = kStages * (kXBytes + kWBytes) + kConsumers * kResults * 4 + 2 * kStages * 8;
};

struct Ring {  // a place in the ring of stages, and the parity of its phase
  int stage = 0;
  uint32_t phase = 0;
};
template <int kStages>
M3_DEVICE void advance(Ring& ring) {
  if (++ring.stage == kStages) ring.stage = 0, ring.phase ^= 1;
}

// Grid: as many blocks as multiprocessors, each takes every gridDim.x-th tile of tile_at; its producer warpgroup runs
// ahead into the next tile while the others store. A tile is kRows rows of W (gated: half of them gate, half up) times
// kTokens tokens, all of K. Reads W and x once for the tile, writes y once.
//
// Stage: 64 columns. W comes by bulk copies of 2 KiB; x by cp.async in chunks of 16 bytes, which allows rows by index,
// written with the 128-byte swizzle of wgmma. A consumer warpgroup multiplies kSub m64 tiles: each lane loads one word
// of each packed tile, unpacks it to u - z, multiplies by the scale in x's type, and has the A fragment of m64k16; the
// tensor cores work on the fragments before meanwhile. Rounding u - z times the scale to x's type is what a weight
// dequantised to that type has: one accumulator suffices, so a block can own 256 x 128, which needs 24 bytes of L2 for
// each multiprocessor and cycle of full rate; 128 x 128 with sums scaled in fp32 would need 40, more than there is.
// kTwoScales: scales of another type are high + low in x's type, so that the product is rounded once.
template <class S>
__global__ void __launch_bounds__(S::kThreads, 1) wgmma_kernel(const __grid_constant__ Problem problem) {
#if M3_WGMMA
  constexpr Half kHalf = S::kHalf;
  constexpr int kSub = S::kSub, kStages = S::kStages;
  const Product& p = problem.product;
  char* x_stages = shared_memory();
  char* w_stages = x_stages + kStages * S::kXBytes;
  float* all_results = (float*)(w_stages + kStages * S::kWBytes);
  uint64_t* full = (uint64_t*)(all_results + S::kConsumers * S::kResults);
  uint64_t* empty = full + kStages;
  const int warpgroup = (int)threadIdx.x / 128, thread = (int)threadIdx.x % 128, warp = thread / 32;
  const int lane = thread % 32, g = lane / 4, t = lane % 4;
  const bool gated = p.epilogue == Epilogue::kGated;
  const int all = problem.row_blocks * problem.token_tiles;
  const int stages = (problem.k_tiles + S::kStageTiles - 1) / S::kStageTiles;

  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i)
      ptx::mbarrier_init(full + i, 128 + 1), ptx::mbarrier_init(empty + i, 4 * S::kConsumers);
    ptx::mbarrier_fence_init();
  }
  __syncthreads();

  // n-tile i of a block's kTiles; kSub of them, one after the other, belong to a warpgroup: gated, a gate and its up.
  auto n_tile = [&](int row_block, int i) {
    if (!gated) return min(row_block * S::kTiles + i, problem.n_tiles - 1);
    return min(row_block * (S::kTiles / 2) + i / 2, problem.out_tiles - 1) + i % 2 * problem.out_tiles;
  };

  Ring ring;
  if (warpgroup == S::kConsumers) {  // -- producer
    ptx::registers_down<56>();
    Ring copied;     // the oldest stage whose x is under way
    int behind = 0;  // stages under way
    for (int index = (int)blockIdx.x; index < all; index += (int)gridDim.x) {
      const int2 tile = tile_at(problem, index);
      const Tokens tokens = tokens_at<S::kTokens>(problem, tile.y);
      if (tokens.count <= 0) continue;
      int source[S::kTokens / 16];
#pragma unroll
      for (int i = 0; i < S::kTokens / 16; ++i) source[i] = source_row(problem, tokens, thread / 8 + 16 * i);
      for (int stage = 0; stage < stages; ++stage) {
        ptx::mbarrier_wait(empty + ring.stage, ring.phase ^ 1);
        if (thread == 0) {
          const int k_tile = stage * S::kStageTiles;
          const int bytes = min(S::kStageTiles, problem.k_tiles - k_tile) * kTileBytes;
          ptx::mbarrier_arrive_expect(full + ring.stage, S::kTiles * bytes);
#pragma unroll
          for (int i = 0; i < S::kTiles; ++i)
            ptx::bulk_copy(w_stages + ring.stage * S::kWBytes + i * S::kTileStage,
                           tile_of(problem, tokens.expert, n_tile(tile.x, i), k_tile), bytes, full + ring.stage);
        }
        char* x = x_stages + ring.stage * S::kXBytes + thread / 8 * 128 + (thread % 8 ^ thread / 8 % 8) * 16;
        const int column = stage * S::kColumns + thread % 8 * 8;
#pragma unroll
        for (int i = 0; i < S::kTokens / 16; ++i)
          copy_x(problem, (const uint16_t*)p.x + ((int64_t)source[i] * (int)p.k + column), source[i] >= 0,
                 (int)p.k - column, x + i * 16 * 128);
        ptx::cp_async_commit();
        advance<kStages>(ring);
        if (++behind > S::kBehind) {
          ptx::cp_async_wait<S::kBehind>();
          ptx::fence_async();
          ptx::mbarrier_arrive(full + copied.stage);
          advance<kStages>(copied), --behind;
        }
      }
    }
    ptx::cp_async_wait<0>();
    ptx::fence_async();
    for (; behind; --behind) ptx::mbarrier_arrive(full + copied.stage), advance<kStages>(copied);
  } else {  // -- consumers
    ptx::registers_up<224>();
    float* results = all_results + warpgroup * S::kResults;
    // Warp w multiplies, in row g, the row of sub-tile w ^ g / 2: the words of a warp then lie in 32 different banks.
    const int sub = warp ^ (g >> 1);
    float acc[kSub][S::kTokens / 2];
    for (int index = (int)blockIdx.x; index < all; index += (int)gridDim.x) {
      const int2 tile = tile_at(problem, index);
      const Tokens tokens = tokens_at<S::kTokens>(problem, tile.y);
      if (tokens.count <= 0) continue;
      int64_t groups[kSub];
      uint32_t next_scale[kSub][2];
      uint8_t next_zero[kSub][2];
      uint32_t high[kSub][2], low[kSub][2], offset[kSub][2];
      int group = 0, left = 0;
      const int upper = in_upper_half(problem, sub);
      auto load_next = [&] {
#pragma unroll
        for (int s = 0; s < kSub; ++s)
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const int64_t at = groups[s] + (int64_t)min(group, problem.groups - 1) * kTileN + 32 * h;
            next_scale[s][h] = load_scale(problem, at), next_zero[s][h] = load_zero(problem, at);
          }
      };
      auto enter_group = [&] {
#pragma unroll
        for (int s = 0; s < kSub; ++s) {
          offset[s][0] = offset_of<kHalf, 0>(zero_of(problem, next_zero[s][0]));
          offset[s][1] = offset_of<kHalf, 1>(zero_of(problem, next_zero[s][1]));
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            if constexpr (S::kTwoScales) {
              const float value = scale_of(problem, next_scale[s][h], upper);
              high[s][h] = ptx::pack2<kHalf>(value, value);
              const float rest = value - ptx::to_float<kHalf>((uint16_t)high[s][h]);
              low[s][h] = ptx::pack2<kHalf>(rest, rest);
            } else {
              high[s][h] = ptx::prmt(next_scale[s][h], 0, upper ? 0x3232 : 0x1010);
            }
          }
        }
        left = group == 0 ? problem.first_tiles : problem.group_tiles;
        ++group;
        load_next();
      };
#pragma unroll
      for (int s = 0; s < kSub; ++s)
        groups[s] = groups_of(problem, tokens.expert, n_tile(tile.x, warpgroup * kSub + s)) + 4 * g + sub;
      load_next();

      uint32_t fragment[2][kSub][4];  // the tensor cores read one set while the other is written
      int before = ring.stage;
      for (int stage = 0; stage < stages; ++stage) {
        ptx::mbarrier_wait(full + ring.stage, ring.phase);
        const char* x = x_stages + ring.stage * S::kXBytes;
        const char* w =
            w_stages + ring.stage * S::kWBytes + warpgroup * kSub * S::kTileStage + chunk_offset(g, t) + 4 * sub;
        uint32_t words[S::kStageTiles][kSub];
#pragma unroll
        for (int kk = 0; kk < S::kStageTiles; ++kk)
#pragma unroll
          for (int s = 0; s < kSub; ++s) words[kk][s] = *(const uint32_t*)(w + s * S::kTileStage + kk * kTileBytes);
        const int tiles_left = problem.k_tiles - stage * S::kStageTiles;
        if (tiles_left < S::kStageTiles) {  // beyond K x is 0, and W may be any finite number
#pragma unroll
          for (int kk = 1; kk < S::kStageTiles; ++kk)
#pragma unroll
            for (int s = 0; s < kSub; ++s)
              if (kk >= tiles_left) words[kk][s] = 0;
        }
#pragma unroll
        for (int kk = 0; kk < S::kStageTiles; ++kk) {
          if (left == 0) enter_group();
          --left;
#pragma unroll
          for (int s = 0; s < kSub; ++s) {
            uint32_t (&a)[4] = fragment[kk % 2][s];
            centred<kHalf>(words[kk][s], offset[s][0], offset[s][1], a);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              if constexpr (S::kTwoScales)
                a[i] = ptx::fma2<kHalf>(a[i], high[s][i % 2], ptx::mul2<kHalf>(a[i], low[s][i % 2]));
              else
                a[i] = ptx::mul2<kHalf>(a[i], high[s][i % 2]);
            }
          }
          ptx::wgmma_fence();
          const uint64_t b = ptx::wgmma_descriptor(x + kk * 32);
#pragma unroll
          for (int s = 0; s < kSub; ++s) ptx::wgmma<kHalf, S::kTokens>(acc[s], fragment[kk % 2][s], b, stage + kk > 0);
          ptx::wgmma_commit();
          ptx::wgmma_wait<1>();
          if (kk == 0 && stage > 0 && lane == 0) ptx::mbarrier_arrive(empty + before);
        }
        before = ring.stage;
        advance<kStages>(ring);
      }
      ptx::wgmma_wait<0>();
#pragma unroll
      for (int s = 0; s < kSub; ++s) ptx::wgmma_hold(acc[s]);
      if (lane == 0) ptx::mbarrier_arrive(empty + before);

      if constexpr (kSub == 2) {
        if (gated) {
#pragma unroll
          for (int i = 0; i < S::kTokens / 2; ++i) acc[0][i] = silu_mul(acc[0][i], acc[1][i]);
        }
      }
      constexpr int kWidth = kSub * kTileN;
      const int out_width = gated ? kTileN : kWidth, at = staged<kWidth>(t, 16 * sub + g);
#pragma unroll 1
      for (int chunk = 0; chunk * S::kChunk < tokens.count; ++chunk) {
        ptx::bar_sync(1 + warpgroup, 128);  // what was staged before has been stored
#pragma unroll
        for (int c = 0; c < S::kTokens / S::kChunk; ++c)
          if (c == chunk) {
#pragma unroll
            for (int s = 0; s < kSub; ++s)
#pragma unroll
              for (int i = 0; i < S::kChunk / 2; ++i)
                results[(at ^ i % 4 / 2 * 8) + kTileN * s + (i / 4 * 8 + i % 2) * kWidth] =
                    acc[s][c * S::kChunk / 2 + i];
          }
        ptx::bar_sync(1 + warpgroup, 128);
        store<kHalf, kWidth>(problem, results, out_width == 128 ? 4 : 3,
                             min(S::kChunk, tokens.count - chunk * S::kChunk), tokens.first + chunk * S::kChunk,
                             ((int64_t)tile.x * S::kConsumers + warpgroup) * out_width, thread, 128);
      }
    }
  }
#endif
}

template <class S>
void run(const Product& p) {
  const char* op = "int4_wgmma";
  const int out_rows = p.epilogue == Epilogue::kGated ? S::kRows / 2 : S::kRows;
  const Problem problem = problem_of(op, p, out_rows, S::kTokens);
  const int tiles = problem.row_blocks * problem.token_tiles;
  launch(op, wgmma_kernel<S>,
         {dim3((unsigned)std::min(tiles, device().multiprocessors)), dim3(S::kThreads), S::kSharedBytes,
          (cudaStream_t)p.stream},
         problem);
}

// Cycles for each 64 columns of K: those of the tensor cores, or those in which L2 brings x and W, and some to meet.
template <class S>
int64_t cost(const Product& p) {
  constexpr int64_t kProducts = 2048, kBytes = 26, kMeet = 64;  // a multiprocessor's in a cycle
  constexpr int64_t kMath = (int64_t)S::kRows * S::kTokens * S::kColumns / kProducts;
  constexpr int64_t kTraffic = (S::kXBytes + S::kWBytes) / kBytes;
  const int64_t rows = ceil_div64(p.rows, p.experts), processors = device().multiprocessors;
  const int64_t tiles = p.experts * ceil_div64(rows, S::kTokens) * ceil_div64(p.n, S::kRows);
  return ceil_div64(tiles, processors) * (std::max(kMath, kTraffic) + kMeet);
}

// The shape that takes least time by `cost`.
template <Half kHalf, bool kTwoScales>
void choose(const Product& p) {
  using A = Shape<kHalf, kTwoScales, 2, 128>;
  using B = Shape<kHalf, kTwoScales, 2, 64>;
  using C = Shape<kHalf, kTwoScales, 1, 128>;
  using D = Shape<kHalf, kTwoScales, 1, 64>;
  const int64_t a = cost<A>(p), b = cost<B>(p), c = cost<C>(p), d = cost<D>(p);
  if (p.epilogue == Epilogue::kGated) return a <= b ? run<A>(p) : run<B>(p);  // a gate and its up in one thread
  const int64_t least = std::min({a, b, c, d});
  a == least ? run<A>(p) : b == least ? run<B>(p) : c == least ? run<C>(p) : run<D>(p);
}

}  // namespace

void gemm_many_sm90(const Product& p) {
  if (device().capability != 90)
    throw std::runtime_error("int4_wgmma: want a device of compute capability 9.0; got " +
                             std::to_string(device().capability) + " / 10");
  if (p.rows <= 0) return;
  const bool same = p.scale_type == p.x_type;
  if (p.x_type == DeviceType::kF16)
    same ? choose<Half::kF16, false>(p) : choose<Half::kF16, true>(p);
  else
    same ? choose<Half::kBf16, false>(p) : choose<Half::kBf16, true>(p);
}

}  // namespace m3::int4
