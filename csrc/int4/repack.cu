// Tiles from nibbles, tiles from a dense weight, a dense weight from tiles: each in one pass over memory.
#include <type_traits>

#include "common/launch.cuh"
#include "common/ptx.cuh"
#include "int4/repack_cuda.h"

namespace m3::int4 {
namespace {

constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int kBlockColumns = kWarps * kTileK;  // a tile for each warp

// -- numbers of a type known at run time ------------------------------------------------------------------------------
M3_DEVICE float half_of(DeviceType type, uint32_t bits) {
  return type == DeviceType::kBf16 ? ptx::to_float<Half::kBf16>((uint16_t)bits)
                                   : ptx::to_float<Half::kF16>((uint16_t)bits);
}

// Four neighbours from position i, a multiple of 4.
M3_DEVICE float4 load_four(const void* values, DeviceType type, int64_t i) {
  if (type == DeviceType::kFp32) return *(const float4*)((const float*)values + i);
  const uint2 pairs = *(const uint2*)((const uint16_t*)values + i);
  return make_float4(half_of(type, pairs.x & 0xFFFF), half_of(type, pairs.x >> 16), half_of(type, pairs.y & 0xFFFF),
                     half_of(type, pairs.y >> 16));
}

// How a weight is cut, in tiles. Each count fits in 32 bits: division by them is cheap, and what they multiply is wide.
struct Cut {
  int64_t n, k;
  uint32_t n_tiles, k_tiles, column_blocks, groups, group_tiles, first_tile;

  M3_HD Cut of(int64_t n, int64_t k, int64_t group_size, int64_t first_k) {
    const uint32_t n_tiles = (uint32_t)ceil_div64(n, kTileN), k_tiles = (uint32_t)ceil_div64(k, kTileK);
    const uint32_t group_tiles = group_size < 0 ? k_tiles : (uint32_t)(group_size / kTileK);
    const uint32_t first = group_size < 0 ? 0 : (uint32_t)(first_k / kTileK);
    return {n,
            k,
            n_tiles,
            k_tiles,
            (k_tiles + kWarps - 1) / kWarps,
            (first + k_tiles - 1) / group_tiles - first / group_tiles + 1,
            group_tiles,
            first};
  }
};

// -- nibbles to tiles -------------------------------------------------------------------------------------------------
template <Nibbles kNibbles>
M3_DEVICE uint32_t nibble(const void* source, uint32_t n, uint32_t k, const Cut& c) {
  const uint32_t* words = (const uint32_t*)source;
  if constexpr (kNibbles == Nibbles::kBytes) return ((const uint8_t*)source)[n * c.k + k] & 15;
  if constexpr (kNibbles == Nibbles::kRows) return words[n * ((c.k + 7) >> 3) + (k >> 3)] >> (4 * (k & 7)) & 15;
  if constexpr (kNibbles == Nibbles::kColumns) return words[(k >> 3) * c.n + n] >> (4 * (k & 7)) & 15;
  return words[k * (c.n >> 3) + (n >> 3)] >> (4 * ((n & 1) * 4 + (n >> 1 & 3))) & 15;
}

struct Packing {
  const void* source;
  Cut cut;
  const int32_t* perm;
  uint4* tiles;
};

// Grid: (experts * n_tiles * blocks of 8 k-tiles). A warp owns one tile: lane (g, t) gathers the 32 nibbles of its
// chunk and stores 16 bytes, the warp 512 in a row. Neighbouring lanes have neighbouring rows, as kColumns words do;
// the four lanes that share a word find it in L1.
template <Nibbles kNibbles>
__global__ void __launch_bounds__(kThreads) pack_kernel(const Packing p) {
  const Cut& c = p.cut;
  const int lane = threadIdx.x % 32, g = lane % 8, t = lane / 8;
  const uint32_t tile_row = blockIdx.x / c.column_blocks;
  const uint32_t kt = blockIdx.x % c.column_blocks * kWarps + threadIdx.x / 32;
  if (kt >= c.k_tiles) return;
  const int64_t expert = tile_row / c.n_tiles;
  const uint32_t first_row = tile_row % c.n_tiles * kTileN + g;
  const void* source = (const uint8_t*)p.source + (kNibbles == Nibbles::kBytes ? expert * c.n * c.k : 0);

  uint32_t words[4] = {};
#pragma unroll
  for (int b = 0; b < 4; ++b) {
    uint32_t k = kt * kTileK + byte_column(t, b);
    if (k < c.k && p.perm) k = (uint32_t)p.perm[expert * c.k + k];
    if (k >= c.k) continue;
#pragma unroll
    for (int half_row = 0; half_row < 8; ++half_row) {  // row 8 half_row + g: word half_row / 2, nibble half_row % 2
      const uint32_t n = first_row + 8 * half_row;
      if (n < c.n) words[half_row / 2] |= nibble<kNibbles>(source, n, k, c) << (8 * b + 4 * (half_row % 2));
    }
  }
  p.tiles[((int64_t)tile_row * c.k_tiles + kt) * (kTileBytes / 16) + chunk_offset(g, t) / 16] =
      make_uint4(words[0], words[1], words[2], words[3]);
}

// -- a dense weight to tiles ------------------------------------------------------------------------------------------
// value rounded to the type, at least the least number that a scale may be, and stored; padding (0) is stored as it is.
M3_DEVICE float store_scale(void* scales, DeviceType type, int64_t i, float value) {
  if (type == DeviceType::kFp32) {
    value = value > 0.f ? fmaxf(value, 0x1p-126f) : 0.f;
    ((float*)scales)[i] = value;
    return value;
  }
  const bool bf16 = type == DeviceType::kBf16;
  uint16_t bits = bf16 ? ptx::from_float<Half::kBf16>(value) : ptx::from_float<Half::kF16>(value);
  const uint16_t least = bf16 ? 0x0080 : 0x0001;  // 2^-126, 2^-24
  if (value > 0.f && bits < least) bits = least;
  ((uint16_t*)scales)[i] = bits;
  return half_of(type, bits);
}

// Elements i and i + 1 of a row with `left` elements from i on; 0 beyond. `pairs`: every i is even and aligned.
template <DeviceType kType>
M3_DEVICE float2 load_pair(const void* w, int64_t i, int64_t left, bool pairs) {
  if (left <= 0) return make_float2(0.f, 0.f);
  if constexpr (kType == DeviceType::kFp32) {
    const float* at = (const float*)w + i;
    return pairs ? *(const float2*)at : make_float2(at[0], left > 1 ? at[1] : 0.f);
  } else {
    const uint16_t* at = (const uint16_t*)w + i;
    const uint32_t bits = pairs ? *(const uint32_t*)at : at[0] | (left > 1 ? (uint32_t)at[1] << 16 : 0);
    return ptx::unpack2<(Half)kType>(bits);
  }
}

struct Quantizing {
  Rounding what;
  Cut cut;
  bool pairs;  // k is even, and w aligned for loads of two elements
};

// Grid: (experts * n_tiles * groups), a warp for each tile of a group up to 8. A block owns 64 rows of one group of
// columns; a warp holds the 64 x 16 values of its tile in registers, lane (g, t) those of its chunk, so that groups of
// up to 128 columns are read once (longer ones once more, from L2). The range of a row is that of its four lanes, then
// of its warps, through shared memory. Every operation is rounded as the formulas of quantize.py say: divisions are
// divisions.
template <DeviceType kType>
__global__ void __launch_bounds__(kThreads) quantize_kernel(const Quantizing q) {
  const Rounding& p = q.what;
  const Cut& c = q.cut;
  float* lows = (float*)shared_memory();      // (warps, 64)
  float* highs = lows + kWarps * kTileN;      // (warps, 64)
  float* scale_of = highs + kWarps * kTileN;  // (64,)
  float* zero_of = scale_of + kTileN;         // (64,)
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32, g = lane / 4, t = lane % 4;
  const uint32_t tile_row = blockIdx.x / c.groups, group = blockIdx.x % c.groups;
  const int64_t expert = tile_row / c.n_tiles, first_row = (int64_t)(tile_row % c.n_tiles) * kTileN;
  const int rows = (int)min((int64_t)kTileN, c.n - first_row);
  const uint32_t first = group * c.group_tiles, last = min(c.k_tiles, first + c.group_tiles);
  const float limit = p.scale_type == DeviceType::kF16 ? 65504.f * 7 : 0x1.fffffep127f;

  float w[8][4];  // of row 8 half_row + g, in the order of a chunk's bytes
  const auto load = [&](uint32_t tile) {
#pragma unroll
    for (int half_row = 0; half_row < 8; ++half_row)
#pragma unroll
      for (int pair = 0; pair < 2; ++pair) {
        const int row = 8 * half_row + g;
        const int64_t column = (int64_t)tile * kTileK + byte_column(t, pair);
        const float2 two = load_pair<kType>(p.w, (expert * c.n + first_row + row) * c.k + column,
                                            row < rows ? c.k - column : 0, q.pairs);
        w[half_row][pair] = two.x, w[half_row][pair + 2] = two.y;
      }
  };

  bool bad = false;
  float low[8] = {}, high[8] = {};
  for (uint32_t tile = first + warp; tile < last; tile += warps) {
    load(tile);
#pragma unroll
    for (int half_row = 0; half_row < 8; ++half_row)
#pragma unroll
      for (int b = 0; b < 4; ++b) {
        low[half_row] = fminf(low[half_row], w[half_row][b]), high[half_row] = fmaxf(high[half_row], w[half_row][b]);
        bad |= !(fabsf(w[half_row][b]) <= limit);
      }
  }
  if (bad) *p.problem = 1;
#pragma unroll
  for (int half_row = 0; half_row < 8; ++half_row) {
#pragma unroll
    for (int bits = 1; bits < 4; bits *= 2) {
      low[half_row] = fminf(low[half_row], __shfl_xor_sync(~0u, low[half_row], bits));
      high[half_row] = fmaxf(high[half_row], __shfl_xor_sync(~0u, high[half_row], bits));
    }
    if (t == 0) {
      lows[warp * kTileN + 8 * half_row + g] = low[half_row];
      highs[warp * kTileN + 8 * half_row + g] = high[half_row];
    }
  }
  __syncthreads();

  for (int row = threadIdx.x; row < kTileN; row += blockDim.x) {
    float least = 0.f, most = 0.f;
    for (int i = 0; i < warps; ++i)
      least = fminf(least, lows[i * kTileN + row]), most = fmaxf(most, highs[i * kTileN + row]);
    float unit;
    if (p.zeros)
      unit = fmaxf(ptx::add(__fdiv_rn(most, 15.f), -__fdiv_rn(least, 15.f)), __fdiv_rn(most, 14.f));
    else
      unit = ptx::mul(fmaxf(most, -least), (float)(2. / 15));
    const int64_t at = ((int64_t)tile_row * c.groups + group) * kTileN + position_of_row(row);
    const float scale = store_scale(p.scales, p.scale_type, at, row >= rows ? 0.f : unit > 0.f ? unit : 1.f);
    const float zero = p.zeros ? fminf(fmaxf(rintf(__fdiv_rn(-least, scale)), 1.f), 15.f) : 8.f;
    if (p.zeros) p.zeros[at] = row < rows ? (uint8_t)zero : 0;
    scale_of[row] = scale, zero_of[row] = zero;
  }
  __syncthreads();

  const bool still_there = c.group_tiles <= (uint32_t)warps;
  for (uint32_t tile = first + warp; tile < last; tile += warps) {
    if (!still_there) load(tile);
    uint32_t words[4] = {};
#pragma unroll
    for (int half_row = 0; half_row < 8; ++half_row) {
      const int row = 8 * half_row + g;
      const float scale = scale_of[row], zero = zero_of[row];
#pragma unroll
      for (int b = 0; b < 4; ++b) {
        const float steps = fminf(fmaxf(rintf(__fdiv_rn(w[half_row][b], scale)), -zero), 15.f - zero);
        const bool inside = row < rows && (int64_t)tile * kTileK + byte_column(t, b) < c.k;
        if (inside) words[half_row / 2] |= (uint32_t)(int)(steps + zero) << (8 * b + 4 * (half_row % 2));
      }
    }
    ((uint4*)p.tiles)[((int64_t)tile_row * c.k_tiles + tile) * (kTileBytes / 16) + chunk_offset(g, t) / 16] =
        make_uint4(words[0], words[1], words[2], words[3]);
  }
}

// -- tiles to a dense weight ------------------------------------------------------------------------------------------
struct Chunk {
  uint32_t words[4];
  float scale[8], zero[8];  // of rows 8 half_row + g
};

M3_DEVICE void load_chunk(Chunk& chunk, const Dense& p, const Cut& c, uint32_t tile_row, uint32_t kt, int g, int t) {
  const char* tiles = (const char*)p.tiles + ((int64_t)tile_row * c.k_tiles + kt) * kTileBytes;
  const uint4 words = *(const uint4*)(tiles + chunk_offset(g, t));
  chunk.words[0] = words.x, chunk.words[1] = words.y, chunk.words[2] = words.z, chunk.words[3] = words.w;
  const uint32_t group = (c.first_tile + kt) / c.group_tiles - c.first_tile / c.group_tiles;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int64_t at = ((int64_t)tile_row * c.groups + group) * kTileN + 32 * h + 4 * g;
    const float4 scale = load_four(p.scales, p.scale_type, at);
    chunk.scale[h] = scale.x, chunk.scale[2 + h] = scale.y, chunk.scale[4 + h] = scale.z, chunk.scale[6 + h] = scale.w;
    const uint32_t zeros = p.zeros ? *(const uint32_t*)(p.zeros + at) : 0x08080808u;
#pragma unroll
    for (int a = 0; a < 4; ++a) chunk.zero[2 * a + h] = (float)(zeros >> (8 * a) & 255);
  }
}

// Grid: (experts * n_tiles * blocks of 128 columns). A block owns 64 rows and 128 columns of y; a warp 16 of the
// columns: the tile of the same place, or, kGather, 128 bytes (all rows of four columns) for each column, a quarter of
// them of use. Values pass through shared memory, so that y is written a row of 128 columns at a time; rows there are 8
// elements longer, so that lanes meet different banks.
template <DeviceType kType, bool kGather>
__global__ void __launch_bounds__(kThreads, 4) dequantize_kernel(const Dense p, const Cut c) {
  using Element = std::conditional_t<kType == DeviceType::kFp32, float, uint16_t>;
  constexpr int kStride = kBlockColumns + 8, kVector = 16 / (int)sizeof(Element);
  Element* staged = (Element*)shared_memory();  // (64, kStride)
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const uint32_t tile_row = blockIdx.x / c.column_blocks, block = blockIdx.x % c.column_blocks;
  const uint32_t kt = block * kWarps + warp;
  const int64_t expert = tile_row / c.n_tiles, first_row = (int64_t)(tile_row % c.n_tiles) * kTileN;

  if (kt < c.k_tiles) {
    Chunk chunk;
    if (!kGather) load_chunk(chunk, p, c, tile_row, kt, g, t);
#pragma unroll 1
    for (int pair = 0; pair < 2; ++pair) {  // bytes pair and pair + 2 are neighbouring columns
      float values[2][8];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        int shift = 8 * (pair + 2 * i);
        if (kGather) {
          const int64_t column = min((int64_t)kt * kTileK + byte_column(t, pair + 2 * i), c.k - 1);
          const int64_t stored = p.inverse[expert * c.k + column];
          const uint32_t k = (uint32_t)max((int64_t)0, min(stored, c.k - 1)), within = k % kTileK;
          load_chunk(chunk, p, c, tile_row, k / kTileK, g, within % 8 / 2);
          shift = 16 * (within % 2) + 8 * (within / 8);
        }
#pragma unroll
        for (int half_row = 0; half_row < 8; ++half_row) {
          const float u = (float)(chunk.words[half_row / 2] >> (shift + 4 * (half_row % 2)) & 15);
          values[i][half_row] = ptx::mul(ptx::add(u, -chunk.zero[half_row]), chunk.scale[half_row]);
        }
      }
#pragma unroll
      for (int half_row = 0; half_row < 8; ++half_row) {
        Element* to = staged + (8 * half_row + g) * kStride + warp * kTileK + byte_column(t, pair);
        if constexpr (kType == DeviceType::kFp32)
          *(float2*)to = make_float2(values[0][half_row], values[1][half_row]);
        else
          *(uint32_t*)to = ptx::pack2<(Half)kType>(values[0][half_row], values[1][half_row]);
      }
    }
  }
  __syncthreads();

  const int64_t first = (int64_t)block * kBlockColumns;
  const uint32_t rows = (uint32_t)min((int64_t)kTileN, c.n - first_row);
  const uint32_t columns = (uint32_t)min((int64_t)kBlockColumns, c.k - first);
  Element* y = (Element*)p.y + (expert * c.n + first_row) * c.k + first;
  if (c.k % kVector == 0) {
    const uint32_t vectors = columns / kVector;
    for (uint32_t i = threadIdx.x; i < rows * vectors; i += kThreads) {
      const uint32_t row = i / vectors, column = i % vectors * kVector;
      *(uint4*)(y + row * c.k + column) = *(const uint4*)(staged + row * kStride + column);
    }
  } else {
    for (uint32_t i = threadIdx.x; i < rows * columns; i += kThreads)
      y[i / columns * c.k + i % columns] = staged[i / columns * kStride + i % columns];
  }
}

unsigned blocks_of(int64_t experts, const Cut& cut, int64_t others) {
  const int64_t count = experts * cut.n_tiles * others;
  if (count > INT32_MAX) throw std::invalid_argument("int4: weight: want under 2**31 blocks of 64 rows; got more");
  return (unsigned)count;
}

}  // namespace

void pack_tiles(const void* source, Nibbles nibbles, int64_t experts, int64_t n, int64_t k, const int32_t* perm,
                void* tiles, void* stream) {
  constexpr void (*kKernels[])(Packing) = {pack_kernel<Nibbles::kBytes>, pack_kernel<Nibbles::kRows>,
                                           pack_kernel<Nibbles::kColumns>, pack_kernel<Nibbles::kPairs>};
  const Cut cut = Cut::of(n, k, -1, 0);
  launch("int4_pack", kKernels[(int)nibbles],
         {.grid = dim3(blocks_of(experts, cut, cut.column_blocks)),
          .block = dim3(kThreads),
          .stream = (cudaStream_t)stream},
         Packing{source, cut, perm, (uint4*)tiles});
}

void quantize_tiles(const Rounding& p) {
  constexpr void (*kKernels[])(Quantizing) = {quantize_kernel<DeviceType::kFp32>, quantize_kernel<DeviceType::kBf16>,
                                              quantize_kernel<DeviceType::kF16>};
  const Cut cut = Cut::of(p.n, p.k, p.group_size, 0);
  const uint32_t tiles = cut.group_tiles < cut.k_tiles ? cut.group_tiles : cut.k_tiles;
  const int pair_bytes = p.w_type == DeviceType::kFp32 ? 8 : 4;
  launch("int4_quantize", kKernels[(int)p.w_type],
         {.grid = dim3(blocks_of(p.experts, cut, cut.groups)),
          .block = dim3(32 * (tiles < kWarps ? tiles : kWarps)),
          .shared_bytes = (2 * kWarps + 2) * kTileN * (int)sizeof(float),
          .stream = (cudaStream_t)p.stream},
         Quantizing{p, cut, p.k % 2 == 0 && (uintptr_t)p.w % pair_bytes == 0});
}

void dequantize_tiles(const Dense& p) {
  constexpr void (*kKernels[][3])(Dense, Cut) = {
      {dequantize_kernel<DeviceType::kFp32, false>, dequantize_kernel<DeviceType::kBf16, false>,
       dequantize_kernel<DeviceType::kF16, false>},
      {dequantize_kernel<DeviceType::kFp32, true>, dequantize_kernel<DeviceType::kBf16, true>,
       dequantize_kernel<DeviceType::kF16, true>}};
  const Cut cut = Cut::of(p.n, p.k, p.group_size, p.first_k);
  const int element = p.y_type == DeviceType::kFp32 ? 4 : 2;
  launch("int4_dequantize", kKernels[p.inverse != nullptr][(int)p.y_type],
         {.grid = dim3(blocks_of(p.experts, cut, cut.column_blocks)),
          .block = dim3(kThreads),
          .shared_bytes = kTileN * (kBlockColumns + 8) * element,
          .stream = (cudaStream_t)p.stream},
         p, cut);
}

}  // namespace m3::int4
