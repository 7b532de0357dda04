// The packed INT4 tile, defined once for CPU and CUDA: index maps between logical (n, k) and bytes. No dependencies.
//
// A tile is 64 rows (n) x 16 columns (k) = 512 bytes; tiles are stored (N/64, K/16), k contiguous. Lane (g, t), g in
// 0..7, t in 0..3, owns the 16-byte chunk at t*128 + (g ^ 2t)*16: four 32-bit words, word a for the 16-row sub-tile a.
// Byte b of a word holds k = 2t + {0, 8, 1, 9}[b]; its low nibble is row 16a + g, its high nibble row 16a + g + 8.
// Scales and zeros are stored (N/64, G, 64), row 16a + 8h + g at position 32h + 4g + a ("position order").
#pragma once
#include <cstdint>

#if defined(__CUDACC__)
#define M3_HD static __host__ __device__ constexpr
#else
#define M3_HD static constexpr
#endif

namespace m3::int4 {

constexpr int kTileN = 64;
constexpr int kTileK = 16;
constexpr int kTileBytes = kTileN * kTileK / 2;
constexpr int kTileWords = kTileBytes / 4;
constexpr int kBlockTiles = 8;  // k-tiles of an activation block at most: 128 columns

// Byte offset, inside a tile, of the chunk of lane (g, t).
M3_HD int chunk_offset(int g, int t) { return t * 128 + ((g ^ (2 * t)) * 16); }

// Column, inside a tile, of byte b of any word of lane t.
M3_HD int byte_column(int t, int b) { return 2 * t + (b >> 1) + 8 * (b & 1); }

// Position of row n (0..63) in position order, and back.
M3_HD int position_of_row(int n) { return 32 * ((n >> 3) & 1) + 4 * (n & 7) + (n >> 4); }
M3_HD int row_of_position(int p) { return 16 * (p & 3) + 8 * (p >> 5) + ((p >> 2) & 7); }

// Group of k-tile kt, counted from the first group that the weight touches.
M3_HD int64_t group_of_tile(int64_t kt, int64_t group_size, int64_t first_k) {
  return group_size < 0 ? 0 : (first_k + kTileK * kt) / group_size - first_k / group_size;
}

}  // namespace m3::int4
