// y = x W^T for many rows with the matrix units of every GPU from sm_80 on, in the order of additions of plan.h.
#include "int4/gemm_many.cuh"

namespace m3::int4 {
namespace {

// kSub sub-tiles of 16 rows of W and 32 tokens a warp; a block is kRowTiles n-tiles and kTokenWarps * 32 tokens.
template <Half kFormat, int kSubTiles, int kRowTiles, int kTokenWarps, int kBlocksPerProcessor>
struct Shape {
  static constexpr Half kHalf = kFormat;
  static constexpr int kSub = kSubTiles, kTiles = kRowTiles, kBlocks = kBlocksPerProcessor;
  static constexpr int kRows = kTileN * kRowTiles, kTokens = 32 * kTokenWarps;
  static constexpr int kRowWarps = kRows / (16 * kSub), kTokenWarpsOf = kTokenWarps;
  static constexpr int kThreads = 32 * kRowWarps * kTokenWarps;
  static constexpr int kStages = 3, kStageTiles = 2, kColumns = kStageTiles * kTileK;
  static constexpr int kXBytes = kTokens * kColumns * 2, kWBytes = kRowTiles * kStageTiles * kTileBytes;
  static constexpr int kSlotBytes = kRows * kTokens * 4;  // one float of each element of the block's tile
  static constexpr int kCopies = kTokens * 4 / kThreads;  // 16-byte chunks of x that a thread copies each stage
  static int shared_bytes(int slots) { return kStages * (kXBytes + kWBytes) + slots * kSlotBytes; }
};
template <Half kHalf>
using Large = Shape<kHalf, 4, 2, 4, 1>;  // 128 x 128, 8 warps
template <Half kHalf>
using Small = Shape<kHalf, 2, 1, 2, 2>;  // 64 x 64, 4 warps

// Byte of 16-byte chunk c (0..3) of a token's 64 bytes of a stage: two tokens to 128 bytes, chunks xored so that
// ldmatrix finds eight tokens in eight different bank groups.
M3_DEVICE int x_offset(int token, int c) { return token / 2 * 128 + (token % 2 * 4 + (c ^ (token / 2 & 3))) * 16; }

// Slots that a block needs: the sum of a split; of all splits, if several; the gate, while up is computed.
int slots_of(const Product& p) { return 1 + (p.plan.splits > 1) + (p.epilogue == Epilogue::kGated); }

// Grid: one block for each tile of y, in the order of tile_at. A block owns kRows rows of W (gated: as many gate rows,
// then as many up rows, in two passes over x) times kTokens tokens, and all of K. Reads W and x once for the tile, by
// cp.async into a ring of three stages of 32 columns; writes y once.
//
// A warp owns kSub sub-tiles and 32 tokens: 4 kSub products of mma_16816 for one 8 (or 16) byte load a lane of W,
// two ldmatrix of x and 9 to 11 operations to unpack each sub-tile. r and part of plan.h are registers; the sums of a
// split and of all splits, which change only where a part ends, are the thread's own places in shared memory. Small
// serves few tiles and GPUs with 99 KiB of shared memory, Large everything else: it reads L2 half as often.
template <class S>
__global__ void __launch_bounds__(S::kThreads, S::kBlocks) many_kernel(const __grid_constant__ Problem problem) {
  constexpr Half kHalf = S::kHalf;
  constexpr int kSub = S::kSub;
  const Product& p = problem.product;
  const int2 tile = tile_at(problem, (int)blockIdx.x);
  const Tokens tokens = tokens_at<S::kTokens>(problem, tile.y);
  if (tokens.count <= 0) return;

  char* x_stages = shared_memory();
  char* w_stages = x_stages + S::kStages * S::kXBytes;
  float4* slots = (float4*)(w_stages + S::kStages * S::kWBytes);
  const int thread = (int)threadIdx.x, warp = thread / 32, lane = thread % 32, g = lane / 4, t = lane % 4;
  const int row_warp = warp / S::kTokenWarpsOf, first_token = warp % S::kTokenWarpsOf * 32;
  const int row_tile = row_warp * kSub / 4;
  // With half a tile to a warp, which half alternates with g: lanes whose chunks share banks read different words.
  const int first_sub = kSub == 4 ? 0 : 2 * ((row_warp & 1) ^ (g >> 1 & 1));

  auto slot = [&](int which, int i) -> float4& {
    return slots[(which * (S::kSlotBytes / 16 / S::kThreads) + i) * S::kThreads + thread];
  };
  const uint16_t* source[S::kCopies];  // what this thread copies of x in stage 0; null: zeros
#pragma unroll
  for (int i = 0; i < S::kCopies; ++i) {
    const int row = source_row(problem, tokens, thread / 4 + i * (S::kThreads / 4));
    source[i] = row < 0 ? nullptr : (const uint16_t*)p.x + row * p.k + thread % 4 * 8;
  }

  const bool gated = p.epilogue == Epilogue::kGated, several = p.plan.splits > 1;
  const int stages = (problem.k_tiles + S::kStageTiles - 1) / S::kStageTiles;
  float part[kSub][4][4];

  for (int pass = 0; pass <= (int)gated; ++pass) {
    auto n_tile = [&](int i) {  // beyond the weight: the last one, whose results are dropped
      return min(tile.x * S::kTiles + i, problem.out_tiles - 1) + pass * problem.out_tiles;
    };
    constexpr int kChunks = S::kStageTiles * kTileBytes / 16;  // of one n-tile's part of a stage
    const char* packed = tile_of(problem, tokens.expert, n_tile(thread / kChunks), 0) + thread % kChunks * 16;
    const int packed_tiles = thread < S::kTiles * kChunks ? problem.k_tiles - thread % kChunks * 16 / kTileBytes : 0;
    auto fetch = [&](int stage) {
      if (stage < stages) {
        char* x = x_stages + stage % S::kStages * S::kXBytes;
        char* w = w_stages + stage % S::kStages * S::kWBytes;
        const int column = stage * S::kColumns;
#pragma unroll
        for (int i = 0; i < S::kCopies; ++i)
          copy_x(problem, source[i] + column, source[i] != nullptr, (int)p.k - thread % 4 * 8 - column,
                 x + x_offset(thread / 4 + i * (S::kThreads / 4), thread % 4));
        if (stage * S::kStageTiles < packed_tiles)
          ptx::cp_async_16(w + thread * 16, packed + (int64_t)stage * (S::kStageTiles * kTileBytes));
      }
      ptx::cp_async_commit();
    };
    const int64_t groups = groups_of(problem, tokens.expert, n_tile(row_tile)) + 4 * g + first_sub;

    float r[kSub][4][4];
    uint32_t scale[kSub][2], offset[kSub][2];  // of this run: as stored; what centred subtracts
    uint8_t zero[kSub][2];                     // of the next run
    auto load_zeros = [&](int group) {
      const int64_t at = groups + (int64_t)min(group, problem.groups - 1) * kTileN;
#pragma unroll
      for (int a = 0; a < kSub; ++a)
#pragma unroll
        for (int h = 0; h < 2; ++h) zero[a][h] = load_zero(problem, at + 32 * h + a);
    };
    int group = 0, run_end = 0, next_end = problem.first_tiles, part_end = p.plan.part_tiles, parts = 0;
#pragma unroll
    for (int a = 0; a < kSub; ++a)
#pragma unroll
      for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) part[a][j][i] = 0.f, r[a][j][i] = 0.f;
    load_zeros(0);

#pragma unroll 1
    for (int stage = 0; stage < S::kStages - 1; ++stage) fetch(stage);
    for (int stage = 0; stage < stages; ++stage) {
      ptx::cp_async_wait<S::kStages - 2>();
      __syncthreads();  // the stage is there, and nobody reads the one before
      fetch(stage + S::kStages - 1);
      const char* x = x_stages + stage % S::kStages * S::kXBytes;
      const char* w = w_stages + stage % S::kStages * S::kWBytes + row_tile * S::kStageTiles * kTileBytes +
                      chunk_offset(g, t) + 4 * first_sub;
      uint32_t words[S::kStageTiles][kSub], b[S::kStageTiles][2][4];  // all loads of the stage before its products
#pragma unroll
      for (int kk = 0; kk < S::kStageTiles; ++kk) {
        if constexpr (kSub == 4)
          *(uint4*)words[kk] = *(const uint4*)(w + kk * kTileBytes);
        else
          *(uint2*)words[kk] = *(const uint2*)(w + kk * kTileBytes);
#pragma unroll
        for (int pair = 0; pair < 2; ++pair)  // tokens 16 pair .. 16 pair + 15
          ptx::ldmatrix_x4(b[kk][pair],
                           x + x_offset(first_token + 16 * pair + lane / 16 * 8 + lane % 8, 2 * kk + lane / 8 % 2));
      }
#pragma unroll
      for (int kk = 0; kk < S::kStageTiles; ++kk) {
        const int k_tile = stage * S::kStageTiles + kk;
        if (k_tile >= problem.k_tiles) continue;
        if (k_tile == run_end) {  // a group begins
#pragma unroll
          for (int a = 0; a < kSub; ++a) {
            offset[a][0] = offset_of<kHalf, 0>(zero_of(problem, zero[a][0]));
            offset[a][1] = offset_of<kHalf, 1>(zero_of(problem, zero[a][1]));
#pragma unroll
            for (int h = 0; h < 2; ++h)
              scale[a][h] = load_scale(problem, groups + (int64_t)group * kTileN + 32 * h + a);
          }
          load_zeros(group + 1);
          run_end = next_end, next_end += problem.group_tiles, ++group;
        }
#pragma unroll
        for (int a = 0; a < kSub; ++a) {
          uint32_t fragment[4];
          centred<kHalf>(words[kk][a], offset[a][0], offset[a][1], fragment);
#pragma unroll
          for (int j = 0; j < 4; ++j)
            ptx::mma_16816<kHalf>(r[a][j], fragment, b[kk][j / 2][j % 2 * 2], b[kk][j / 2][j % 2 * 2 + 1]);
        }
        const bool last = k_tile + 1 == problem.k_tiles, part_ends = last || k_tile + 1 == part_end;
        if (part_ends || k_tile + 1 == run_end) {
#pragma unroll
          for (int a = 0; a < kSub; ++a) {
            const int upper = in_upper_half(problem, a);
            const float value[2] = {scale_of(problem, scale[a][0], upper), scale_of(problem, scale[a][1], upper)};
#pragma unroll
            for (int j = 0; j < 4; ++j)
#pragma unroll
              for (int i = 0; i < 4; ++i)
                part[a][j][i] = ptx::fma(value[i / 2], r[a][j][i], part[a][j][i]), r[a][j][i] = 0.f;
          }
        }
        if (part_ends) {
          const bool first_part = parts % p.plan.split_parts == 0, first_split = parts < p.plan.split_parts;
          const bool split_ends = last || (parts + 1) % p.plan.split_parts == 0;
#pragma unroll
          for (int a = 0; a < kSub; ++a)
#pragma unroll
            for (int j = 0; j < 4; ++j) {
              float (&v)[4] = part[a][j];
              auto add = [&](const float4& before) {
                v[0] = ptx::add(before.x, v[0]), v[1] = ptx::add(before.y, v[1]);
                v[2] = ptx::add(before.z, v[2]), v[3] = ptx::add(before.w, v[3]);
              };
              if (!first_part) add(slot(0, a * 4 + j));
              if (split_ends && !first_split) add(slot(1, a * 4 + j));
              if (last) continue;  // the result stays in `part`
              slot(split_ends && several ? 1 : 0, a * 4 + j) = make_float4(v[0], v[1], v[2], v[3]);
              v[0] = v[1] = v[2] = v[3] = 0.f;
            }
          part_end += p.plan.part_tiles, ++parts;
        }
      }
    }
    ptx::cp_async_wait<0>();
    __syncthreads();
#pragma unroll
    for (int a = 0; a < kSub; ++a)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        float (&v)[4] = part[a][j];
        if (!gated) continue;
        float4& gate = slot(several ? 2 : 1, a * 4 + j);
        if (pass == 0) {
          gate = make_float4(v[0], v[1], v[2], v[3]);
        } else {
          const float4 silu = gate;
          v[0] = silu_mul(silu.x, v[0]), v[1] = silu_mul(silu.y, v[1]);
          v[2] = silu_mul(silu.z, v[2]), v[3] = silu_mul(silu.w, v[3]);
        }
      }
  }

  float* results = (float*)slots;  // slot 0; its owners have read it
  const int at = staged<S::kRows>(t, 16 * first_sub + g) + first_token * S::kRows + kTileN * row_tile;
#pragma unroll
  for (int a = 0; a < kSub; ++a)
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        results[(at ^ (16 * (a % 2) + 8 * (i / 2))) + 32 * (a / 2) + (8 * j + i % 2) * S::kRows] = part[a][j][i];
  __syncthreads();
  store<kHalf, S::kRows>(problem, results, S::kTiles == 2 ? 4 : 3, tokens.count, tokens.first,
                         (int64_t)tile.x * S::kRows, thread, S::kThreads);
}

template <class S>
void run(const Product& p) {
  const char* op = "int4_many";
  const Problem problem = problem_of(op, p, S::kRows, S::kTokens);
  launch(op, many_kernel<S>,
         {dim3((unsigned)(problem.row_blocks * problem.token_tiles)), dim3(S::kThreads), S::shared_bytes(slots_of(p)),
          (cudaStream_t)p.stream},
         problem);
}

template <Half kHalf>
void choose(const Product& p) {
  using L = Large<kHalf>;
  const Device d = device();
  const int64_t tiles = ceil_div64(p.rows, L::kTokens) * ceil_div64(p.n, L::kRows);
  const bool fits = L::shared_bytes(slots_of(p)) <= d.shared_bytes;
  if (fits && tiles >= d.multiprocessors && p.rows / p.experts > 64)
    run<L>(p);
  else
    run<Small<kHalf>>(p);
}

}  // namespace

void gemm_many(const Product& product) {
  if (product.rows <= 0) return;
  const Plan& plan = product.plan;
  const int64_t split = (int64_t)plan.part_tiles * plan.split_parts;
  if (plan.part_tiles < 1 || plan.split_parts < 1 || ceil_div64(product.k_tiles(), split) != plan.splits)
    throw std::invalid_argument("int4_many: plan: want splits of parts that cover " +
                                std::to_string(product.k_tiles()) + " tiles; got " + std::to_string(plan.splits));
  product.x_type == DeviceType::kF16 ? choose<Half::kF16>(product) : choose<Half::kBf16>(product);
}

}  // namespace m3::int4
