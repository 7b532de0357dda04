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

M3_DEVICE float load_as_float(const void* values, DeviceType type, int64_t i) {
  return type == DeviceType::kFp32 ? ((const float*)values)[i] : half_of(type, ((const uint16_t*)values)[i]);
}

// Four neighbours from position i, a multiple of 4.
M3_DEVICE float4 load_four(const void* values, DeviceType type, int64_t i) {
  if (type == DeviceType::kFp32) return *(const float4*)((const float*)values + i);
  const uint2 pairs = *(const uint2*)((const uint16_t*)values + i);
  return make_float4(half_of(type, pairs.x & 0xFFFF), half_of(type, pairs.x >> 16), half_of(type, pairs.y & 0xFFFF),
                     half_of(type, pairs.y >> 16));
}

// -- nibbles to tiles -------------------------------------------------------------------------------------------------
template <Nibbles kNibbles>
M3_DEVICE uint32_t nibble(const void* source, int64_t n, int64_t k, int64_t rows, int64_t columns) {
  const uint32_t* words = (const uint32_t*)source;
  if constexpr (kNibbles == Nibbles::kBytes) return ((const uint8_t*)source)[n * columns + k] & 15;
  if constexpr (kNibbles == Nibbles::kRows) return words[n * ((columns + 7) >> 3) + (k >> 3)] >> (4 * (k & 7)) & 15;
  if constexpr (kNibbles == Nibbles::kColumns) return words[(k >> 3) * rows + n] >> (4 * (k & 7)) & 15;
  const int place = (int)((n & 1) * 4 + (n >> 1 & 3));
  return words[k * (rows >> 3) + (n >> 3)] >> (4 * place) & 15;
}

struct Packing {
  const void* source;
  int64_t n, k;
  const int32_t* perm;
  uint4* tiles;
};

// Grid: (experts * n_tiles * blocks of 8 k-tiles). A warp owns one tile: lane (g, t) gathers the 32 nibbles of its
// chunk and stores 16 bytes, the warp 512 in a row. Rows lie next to each other in lanes, as they do in kColumns words;
// the four lanes that share a word find it in L1.
template <Nibbles kNibbles>
__global__ void __launch_bounds__(kThreads) pack_kernel(const Packing p) {
  const int lane = threadIdx.x % 32, g = lane % 8, t = lane / 8;
  const int64_t n_tiles = ceil_div64(p.n, kTileN), k_tiles = ceil_div64(p.k, kTileK);
  const int64_t blocks = ceil_div64(k_tiles, kWarps);
  const int64_t tile_row = blockIdx.x / blocks, kt = blockIdx.x % blocks * kWarps + threadIdx.x / 32;
  if (kt >= k_tiles) return;
  const int64_t expert = tile_row / n_tiles, first_row = tile_row % n_tiles * kTileN + g;
  const void* source = (const uint8_t*)p.source + (kNibbles == Nibbles::kBytes ? expert * p.n * p.k : 0);

  uint32_t words[4] = {};
#pragma unroll
  for (int b = 0; b < 4; ++b) {
    int64_t k = kt * kTileK + byte_column(t, b);
    if (k < p.k && p.perm) k = p.perm[expert * p.k + k];
    if (k < 0 || k >= p.k) continue;
#pragma unroll
    for (int half_row = 0; half_row < 8; ++half_row) {  // rows 8 half_row + g: word half_row / 2, nibble half_row % 2
      const int64_t n = first_row + 8 * half_row;
      if (n < p.n) words[half_row / 2] |= nibble<kNibbles>(source, n, k, p.n, p.k) << (8 * b + 4 * (half_row % 2));
    }
  }
  p.tiles[(tile_row * k_tiles + kt) * (kTileBytes / 16) + chunk_offset(g, t) / 16] =
      make_uint4(words[0], words[1], words[2], words[3]);
}

// -- a dense weight to tiles ------------------------------------------------------------------------------------------
// Rounds to the type, and keeps it at least the least number that a scale may be.
M3_DEVICE float store_scale(void* scales, DeviceType type, int64_t i, float value) {
  if (type == DeviceType::kFp32) return ((float*)scales)[i] = fmaxf(value, 0x1p-126f);
  if (type == DeviceType::kBf16) {
    value = fmaxf(ptx::to_float<Half::kBf16>(ptx::from_float<Half::kBf16>(value)), 0x1p-126f);
    ((uint16_t*)scales)[i] = ptx::from_float<Half::kBf16>(value);
  } else {
    value = fmaxf(ptx::to_float<Half::kF16>(ptx::from_float<Half::kF16>(value)), 0x1p-24f);
    ((uint16_t*)scales)[i] = ptx::from_float<Half::kF16>(value);
  }
  return value;
}

M3_DEVICE void store_zero_scale(void* scales, DeviceType type, int64_t i) {
  if (type == DeviceType::kFp32)
    ((float*)scales)[i] = 0.f;
  else
    ((uint16_t*)scales)[i] = 0;
}

// Grid: (experts * n_tiles * groups), a warp for each tile of a group up to 8. A block owns 64 rows of one group of
// columns and reads them twice: for the range of each row (a warp a row, neighbours side by side), and, from L1 where
// the group fits, for the nibbles (a warp a tile, as in pack_kernel). Every operation is rounded as the formulas of
// quantize.py say: divisions are divisions.
template <DeviceType kType>
__global__ void __launch_bounds__(kThreads) quantize_kernel(const Rounding p) {
  float* scale_of = (float*)shared_memory();  // of each row of the block
  float* zero_of = scale_of + kTileN;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
  const int64_t n_tiles = ceil_div64(p.n, kTileN), k_tiles = ceil_div64(p.k, kTileK);
  const int64_t size = p.group_size < 0 ? k_tiles * kTileK : p.group_size, groups = ceil_div64(p.k, size);
  const int64_t tile_row = blockIdx.x / groups, group = blockIdx.x % groups;
  const int64_t expert = tile_row / n_tiles, first_row = tile_row % n_tiles * kTileN;
  const int64_t first_k = group * size, last_k = min(p.k, first_k + size);
  const float limit = p.scale_type == DeviceType::kF16 ? 65504.f * 7 : 0x1.fffffep127f;

  bool bad = false;
  for (int row = warp; row < kTileN; row += warps) {
    const int64_t n = first_row + row, at = (tile_row * groups + group) * kTileN + position_of_row(row);
    if (n >= p.n) {  // padding
      if (lane == 0) {
        store_zero_scale(p.scales, p.scale_type, at);
        if (p.zeros) p.zeros[at] = 0;
        scale_of[row] = 1.f, zero_of[row] = 0.f;
      }
      continue;
    }
    float low = 0.f, high = 0.f;
    const int64_t start = (expert * p.n + n) * p.k;
    for (int64_t k = first_k + lane; k < last_k; k += 32) {
      const float w = load_as_float(p.w, kType, start + k);
      low = fminf(low, w), high = fmaxf(high, w);
      bad |= !(fabsf(w) <= limit);
    }
#pragma unroll
    for (int bits = 16; bits; bits /= 2) {
      low = fminf(low, __shfl_xor_sync(~0u, low, bits));
      high = fmaxf(high, __shfl_xor_sync(~0u, high, bits));
    }
    if (lane == 0) {
      float unit;
      if (p.zeros)
        unit = fmaxf(ptx::add(__fdiv_rn(high, 15.f), -__fdiv_rn(low, 15.f)), __fdiv_rn(high, 14.f));
      else
        unit = ptx::mul(fmaxf(high, -low), (float)(2. / 15));
      const float scale = store_scale(p.scales, p.scale_type, at, unit > 0.f ? unit : 1.f);
      float zero = 8.f;
      if (p.zeros) {
        zero = fminf(fmaxf(rintf(__fdiv_rn(-low, scale)), 1.f), 15.f);
        p.zeros[at] = (uint8_t)zero;
      }
      scale_of[row] = scale, zero_of[row] = zero;
    }
  }
  if (bad) *p.problem = 1;
  __syncthreads();

  const int g = lane / 4, t = lane % 4;
  float scale[8], zero[8];
#pragma unroll
  for (int half_row = 0; half_row < 8; ++half_row)
    scale[half_row] = scale_of[8 * half_row + g], zero[half_row] = zero_of[8 * half_row + g];
  for (int64_t kt = first_k / kTileK + warp; kt * kTileK < last_k; kt += warps) {
    uint32_t words[4] = {};
#pragma unroll
    for (int b = 0; b < 4; ++b) {
      const int64_t k = kt * kTileK + byte_column(t, b);
#pragma unroll
      for (int half_row = 0; half_row < 8; ++half_row) {
        const int64_t n = first_row + 8 * half_row + g;
        if (n >= p.n || k >= p.k) continue;
        const float w = load_as_float(p.w, kType, (expert * p.n + n) * p.k + k);
        const float steps = rintf(__fdiv_rn(w, scale[half_row]));
        const float point = fminf(fmaxf(steps, -zero[half_row]), 15.f - zero[half_row]);
        words[half_row / 2] |= (uint32_t)(int)(point + zero[half_row]) << (8 * b + 4 * (half_row % 2));
      }
    }
    ((uint4*)p.tiles)[(tile_row * k_tiles + kt) * (kTileBytes / 16) + chunk_offset(g, t) / 16] =
        make_uint4(words[0], words[1], words[2], words[3]);
  }
}

// -- tiles to a dense weight ------------------------------------------------------------------------------------------
struct Chunk {
  uint32_t words[4];
  float scale[8], zero[8];  // of rows 8 half_row + g
};

M3_DEVICE void load_chunk(Chunk& c, const Dense& p, int64_t tile_row, int64_t kt, int g, int t) {
  const int64_t k_tiles = ceil_div64(p.k, kTileK);
  const int64_t groups = p.group_size < 0 ? 1 : ceil_div64(p.first_k + p.k, p.group_size) - p.first_k / p.group_size;
  const uint4 words =
      *(const uint4*)((const char*)p.tiles + (tile_row * k_tiles + kt) * kTileBytes + chunk_offset(g, t));
  c.words[0] = words.x, c.words[1] = words.y, c.words[2] = words.z, c.words[3] = words.w;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int64_t at = (tile_row * groups + group_of_tile(kt, p.group_size, p.first_k)) * kTileN + 32 * h + 4 * g;
    const float4 scale = load_four(p.scales, p.scale_type, at);
    c.scale[h] = scale.x, c.scale[2 + h] = scale.y, c.scale[4 + h] = scale.z, c.scale[6 + h] = scale.w;
    const uint32_t zeros = p.zeros ? *(const uint32_t*)(p.zeros + at) : 0x08080808u;
#pragma unroll
    for (int a = 0; a < 4; ++a) c.zero[2 * a + h] = (float)(zeros >> (8 * a) & 255);
  }
}

// Grid: (experts * n_tiles * blocks of 128 columns). A block owns 64 rows and 128 columns of y; a warp 16 of the
// columns: the tile of the same place, or, with `inverse`, 128 bytes (all rows of four columns) for each column, a
// quarter of them of use. Values pass through shared memory, so that y is written a row of 128 columns at a time;
// rows there are 8 elements longer, so that lanes meet different banks.
template <DeviceType kType>
__global__ void __launch_bounds__(kThreads) dequantize_kernel(const Dense p) {
  using Element = std::conditional_t<kType == DeviceType::kFp32, float, uint16_t>;
  constexpr int kStride = kBlockColumns + 8, kVector = 16 / (int)sizeof(Element);
  Element* staged = (Element*)shared_memory();  // (64, kStride)
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int64_t n_tiles = ceil_div64(p.n, kTileN), k_tiles = ceil_div64(p.k, kTileK);
  const int64_t blocks = ceil_div64(k_tiles, kWarps);
  const int64_t tile_row = blockIdx.x / blocks, block = blockIdx.x % blocks, kt = block * kWarps + warp;
  const int64_t expert = tile_row / n_tiles, first_row = tile_row % n_tiles * kTileN;

  if (kt < k_tiles) {
    Chunk chunk;
    if (!p.inverse) load_chunk(chunk, p, tile_row, kt, g, t);
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {  // bytes pair and pair + 2 are neighbouring columns
      float values[2][8];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        int shift = 8 * (pair + 2 * i);
        if (p.inverse) {
          const int64_t column = min(kt * kTileK + byte_column(t, pair + 2 * i), p.k - 1);
          const int64_t k = max((int64_t)0, min(p.inverse[expert * p.k + column], p.k - 1));
          const int within = (int)(k % kTileK);
          load_chunk(chunk, p, tile_row, k / kTileK, g, within % 8 / 2);
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

  const int64_t first = block * kBlockColumns;
  const int rows = (int)min((int64_t)kTileN, p.n - first_row);
  const int columns = (int)min((int64_t)kBlockColumns, p.k - first);
  Element* y = (Element*)p.y + (expert * p.n + first_row) * p.k + first;
  if (p.k % kVector == 0) {
    const int vectors = columns / kVector;
    for (int i = threadIdx.x; i < rows * vectors; i += kThreads) {
      const int row = i / vectors, column = i % vectors * kVector;
      *(uint4*)(y + row * p.k + column) = *(const uint4*)(staged + row * kStride + column);
    }
  } else {
    for (int i = threadIdx.x; i < rows * columns; i += kThreads)
      y[i / columns * p.k + i % columns] = staged[i / columns * kStride + i % columns];
  }
}

unsigned blocks_of(int64_t experts, int64_t n, int64_t others) {
  const int64_t count = experts * ceil_div64(n, kTileN) * others;
  if (count > INT32_MAX) throw std::invalid_argument("int4: weight: want under 2**31 blocks of 64 rows; got more");
  return (unsigned)count;
}

}  // namespace

void pack_tiles(const void* source, Nibbles nibbles, int64_t experts, int64_t n, int64_t k, const int32_t* perm,
                void* tiles, void* stream) {
  constexpr void (*kKernels[])(Packing) = {pack_kernel<Nibbles::kBytes>, pack_kernel<Nibbles::kRows>,
                                           pack_kernel<Nibbles::kColumns>, pack_kernel<Nibbles::kPairs>};
  const unsigned blocks = blocks_of(experts, n, ceil_div64(ceil_div64(k, kTileK), kWarps));
  launch("int4_pack", kKernels[(int)nibbles],
         {.grid = dim3(blocks), .block = dim3(kThreads), .stream = (cudaStream_t)stream},
         Packing{source, n, k, perm, (uint4*)tiles});
}

void quantize_tiles(const Rounding& p) {
  constexpr void (*kKernels[])(Rounding) = {quantize_kernel<DeviceType::kFp32>, quantize_kernel<DeviceType::kBf16>,
                                            quantize_kernel<DeviceType::kF16>};
  const int64_t size = p.group_size < 0 ? p.k : p.group_size, tiles = ceil_div64(size < p.k ? size : p.k, kTileK);
  const int warps = tiles < kWarps ? (int)tiles : kWarps;
  launch("int4_quantize", kKernels[(int)p.w_type],
         {.grid = dim3(blocks_of(p.experts, p.n, ceil_div64(p.k, size))),
          .block = dim3(32 * warps),
          .shared_bytes = 2 * kTileN * (int)sizeof(float),
          .stream = (cudaStream_t)p.stream},
         p);
}

void dequantize_tiles(const Dense& p) {
  constexpr void (*kKernels[])(Dense) = {dequantize_kernel<DeviceType::kFp32>, dequantize_kernel<DeviceType::kBf16>,
                                         dequantize_kernel<DeviceType::kF16>};
  const int element = p.y_type == DeviceType::kFp32 ? 4 : 2;
  launch("int4_dequantize", kKernels[(int)p.y_type],
         {.grid = dim3(blocks_of(p.experts, p.n, ceil_div64(ceil_div64(p.k, kTileK), kWarps))),
          .block = dim3(kThreads),
          .shared_bytes = kTileN * (kBlockColumns + 8) * element,
          .stream = (cudaStream_t)p.stream},
         p);
}

}  // namespace m3::int4
