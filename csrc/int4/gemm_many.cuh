// What the two products for many rows share: which tile a block computes, where its x and W lie, how results are
// stored.
#pragma once
#include "common/launch.cuh"
#include "int4/product.cuh"

namespace m3::int4 {

// A product and what follows from it. Tiles of y are cut into rows of W (n) and tokens (rows of y, of one expert).
struct Problem {
  Product product;
  int n_tiles, k_tiles, groups;
  int group_tiles, first_tiles;  // k-tiles of a group, and of the first one here
  int out_tiles;                 // 64-column tiles of y: half of n_tiles where gate and up become one
  int row_blocks, token_tiles;   // the grid: token_tiles bounds what the experts' rows can need
  bool x_aligned, y_aligned;     // rows are whole 16-byte chunks
};

// Fills what does not depend on the kernel; throws std::invalid_argument where kGated cannot be computed.
inline Problem problem_of(const char* op, const Product& p, int block_rows, int block_tokens) {
  const bool gated = p.epilogue == Epilogue::kGated;
  if (gated && p.n % (2 * kTileN))
    throw std::invalid_argument(
        std::string(op) + ": weight: want n / 2 a multiple of 64 with a gated epilogue; got n " + std::to_string(p.n));
  if (std::max(p.rows, p.x_rows) >= INT32_MAX || p.experts >= INT32_MAX)
    throw std::invalid_argument(std::string(op) + ": x: want fewer than 2**31 - 1 rows; got " +
                                std::to_string(std::max(p.rows, p.x_rows)));
  Problem problem{};
  problem.product = p;
  problem.n_tiles = (int)p.n_tiles(), problem.k_tiles = (int)p.k_tiles(), problem.groups = (int)p.groups();
  problem.group_tiles = p.group_size < 0 ? problem.k_tiles : (int)(p.group_size / kTileK);
  problem.first_tiles =
      p.group_size < 0 ? problem.k_tiles : problem.group_tiles - (int)(p.first_k / kTileK % problem.group_tiles);
  problem.out_tiles = gated ? problem.n_tiles / 2 : problem.n_tiles;
  problem.row_blocks = (int)ceil_div64(problem.out_tiles, block_rows / kTileN);
  const int64_t tokens = p.offsets ? std::min(p.rows, p.rows / block_tokens + p.experts)  // each may leave one partial
                                   : ceil_div64(p.rows, block_tokens);
  if (tokens * problem.row_blocks >= INT32_MAX)
    throw std::invalid_argument(std::string(op) + ": rows: want fewer than 2**31 tiles of y; got " +
                                std::to_string(p.rows) + " rows");
  problem.token_tiles = (int)tokens;
  const int64_t out_columns = gated ? p.n / 2 : p.n;
  problem.x_aligned = p.k % 8 == 0 && (uintptr_t)p.x % 16 == 0;
  problem.y_aligned = out_columns % 8 == 0 && (uintptr_t)p.y % 16 == 0;
  return problem;
}

// -- which tile -------------------------------------------------------------------------------------------------------
// Tile `index` of the grid: eight token tiles go through all of W together, so that both stay in L2.
M3_DEVICE int2 tile_at(const Problem& p, int index) {  // (row block, token tile)
  constexpr int kTogether = 8;
  const int strip = index / (kTogether * p.row_blocks), inside = index - strip * kTogether * p.row_blocks;
  const int width = min(kTogether, p.token_tiles - strip * kTogether);
  return make_int2(inside / width, strip * kTogether + inside % width);
}

struct Tokens {
  int expert, count;  // count 0: a tile that no expert needs
  int64_t first;      // row of y
};

// Where token tile `tile` lies; called by whole warps.
template <int kTokens>
M3_DEVICE Tokens tokens_at(const Problem& problem, int tile) {
  const Product& p = problem.product;
  if (!p.offsets) {
    const int64_t first = (int64_t)tile * kTokens;
    return {0, (int)min((int64_t)kTokens, p.rows - first), first};
  }
  ExpertRows rows;
  if (!find_expert(p, kTokens, tile, rows)) return {0, 0, 0};
  const int64_t first = rows.first + (int64_t)(tile - rows.before) * kTokens;
  return {rows.expert, (int)min((int64_t)kTokens, rows.last - first), first};
}

// -- x ----------------------------------------------------------------------------------------------------------------
// Row of x that token `i` of a tile reads; -1: none.
M3_DEVICE int source_row(const Problem& problem, const Tokens& tokens, int i) {
  if (i >= tokens.count) return -1;
  const Product& p = problem.product;
  const int64_t row = p.row_index ? (int64_t)p.row_index[tokens.first + i] : tokens.first + i;
  return row >= 0 && row < p.x_rows ? (int)row : -1;
}

// Eight columns of x to 16 bytes of shared memory, asynchronously if x is aligned. The row ends after `left` columns,
// of which there may be fewer than one; what lies beyond is zero, as is everything where there is no row.
M3_DEVICE void copy_x(const Problem& problem, const uint16_t* from, bool row, int left, char* shared) {
  if (problem.x_aligned) {
    const bool inside = row && left > 0;
    ptx::cp_async_16(shared, inside ? from : (const uint16_t*)problem.product.x, inside ? 16 : 0);
    return;
  }
  uint32_t words[4] = {};
#pragma unroll
  for (int i = 0; i < 8; ++i)
    if (row && i < left) words[i / 2] |= (uint32_t)from[i] << 16 * (i % 2);
  *(uint4*)shared = make_uint4(words[0], words[1], words[2], words[3]);
}

// -- W ----------------------------------------------------------------------------------------------------------------
M3_DEVICE const char* tile_of(const Problem& p, int expert, int n_tile, int k_tile) {
  return (const char*)p.product.qweight +
         (((int64_t)expert * p.n_tiles + n_tile) * p.k_tiles + k_tile) * (int64_t)kTileBytes;
}
// Of one n-tile's scales and zeros, position 0 of group 0.
M3_DEVICE int64_t groups_of(const Problem& p, int expert, int n_tile) {
  return ((int64_t)expert * p.n_tiles + n_tile) * p.groups * kTileN;
}

// A scale and a zero point as they are stored. What is made of them is apart from the loads, and a load has no branch,
// so that nothing waits for it before the value is used. A scale travels as the aligned word that holds it.
M3_DEVICE uint32_t load_scale(const Problem& p, int64_t at) {
  const uintptr_t address = (uintptr_t)p.product.scales + at * (p.product.scale_type == DeviceType::kFp32 ? 4 : 2);
  return __ldg((const uint32_t*)(address & ~(uintptr_t)3));
}
// 1 if scale `at`, where it has 16 bits, is the upper half of its word.
M3_DEVICE int in_upper_half(const Problem& p, int64_t at) {
  return (int)(((uintptr_t)p.product.scales / 2 + (uintptr_t)at) & 1);
}
M3_DEVICE float scale_of(const Problem& p, uint32_t word, int upper) {
  const uint16_t half = (uint16_t)(upper ? word >> 16 : word);
  if (p.product.scale_type == DeviceType::kFp32) return __uint_as_float(word);
  return p.product.scale_type == DeviceType::kF16 ? ptx::to_float<Half::kF16>(half) : ptx::to_float<Half::kBf16>(half);
}
M3_DEVICE uint8_t load_zero(const Problem& p, int64_t at) {
  return __ldg(p.product.zeros ? p.product.zeros + at : (const uint8_t*)p.product.scales);
}
M3_DEVICE uint32_t zero_of(const Problem& p, uint8_t stored) { return p.product.zeros ? stored : 8u; }

// What `centred` subtracts, for a zero point of a row in the lower (h = 0) or upper (h = 1) half of a sub-tile.
template <Half kHalf, int h>
M3_DEVICE uint32_t offset_of(uint32_t zero) {
  if constexpr (kHalf == Half::kBf16) return (0x4300u + zero) * 0x10001u;          // 128 + z
  return h == 0 ? (0x6400u + zero) * 0x10001u : (0xD400u + 16 * zero) * 0x10001u;  // 1024 + z; -(64 + z)
}

// -- y ----------------------------------------------------------------------------------------------------------------
// fp32 results on their way from fragments to rows of y: (tokens, kWidth), bits 3 and 4 of the column xored with bits 1
// and 2 of the token, so that the lanes of a warp, which hold eight rows of W and four pairs of tokens, meet no bank
// twice. Index of column `column`, below 64, of token 2 t; token 8 j + 2 t + 1 is at index + (8 j + 1) * kWidth, and
// column ^ 8, column ^ 16 at index ^ 8, index ^ 16.
template <int kWidth>
M3_DEVICE int staged(int t, int column) {
  return 2 * t * kWidth + (column ^ 8 * t);
}

// Rows first .. first + tokens - 1 of y, its columns from column0 on, from the first 8 << log_chunks staged columns.
// Called by `threads` threads.
template <Half kHalf, int kWidth>
M3_DEVICE void store(const Problem& problem, const float* results, int log_chunks, int tokens, int64_t first,
                     int64_t column0, int thread, int threads) {
  const Product& p = problem.product;
  const int64_t columns = p.epilogue == Epilogue::kGated ? p.n / 2 : p.n;
  for (int i = thread; i < tokens << log_chunks; i += threads) {
    const int token = i >> log_chunks, inside = (i - (token << log_chunks)) * 8;
    const int64_t column = column0 + inside, at = (first + token) * columns + column;
    const int count = (int)min((int64_t)8, columns - column);
    if (count <= 0) continue;
    const float* staged_row = results + token * kWidth + (inside ^ (token >> 1 & 3) * 8);
    float v[8];
    *(float4*)v = *(const float4*)staged_row;
    *(float4*)(v + 4) = *(const float4*)(staged_row + 4);
    if (p.epilogue == Epilogue::kFloat) {
      float* y = (float*)p.y + at;
      if (problem.y_aligned) {
        *(float4*)y = *(const float4*)v, *(float4*)(y + 4) = *(const float4*)(v + 4);
        continue;
      }
#pragma unroll
      for (int c = 0; c < 8; ++c)
        if (c < count) y[c] = v[c];
      continue;
    }
    if (p.bias) {
#pragma unroll
      for (int c = 0; c < 8; ++c)
        if (c < count) v[c] = ptx::add(v[c], ptx::to_float<kHalf>(__ldg((const uint16_t*)p.bias + column + c)));
    }
    uint16_t* y = (uint16_t*)p.y + at;
    if (problem.y_aligned) {
      *(uint4*)y = make_uint4(ptx::pack2<kHalf>(v[0], v[1]), ptx::pack2<kHalf>(v[2], v[3]),
                              ptx::pack2<kHalf>(v[4], v[5]), ptx::pack2<kHalf>(v[6], v[7]));
      continue;
    }
#pragma unroll
    for (int c = 0; c < 8; ++c)
      if (c < count) y[c] = ptx::from_float<kHalf>(v[c]);
  }
}

}  // namespace m3::int4
