// Host interface of what turns weights into tiles and back on a GPU. Fits any compiler.
#pragma once
#include <cstdint>

#include "int4/gemm_cuda.h"

namespace m3::int4 {

// Where the nibble of row n and column k is before it is in a tile.
enum class Nibbles : int {
  kBytes = 0,    // (experts, n, k) uint8: a value a byte
  kRows = 1,     // (n, ceil(k / 8)) words: k = 8 word + nibble
  kColumns = 2,  // (k / 8, n) words: k = 8 word + nibble
  kPairs = 3,    // (k, n / 8) words: n = 8 word + (0, 2, 4, 6, 1, 3, 5, 7)[nibble]
};

// tiles (experts, n / 64, k / 16, 512 bytes). Stored column j is column perm[j] of the source; perm (experts, k) or
// null. Padding, and what a perm out of range names, is 0.
void pack_tiles(const void* source, Nibbles nibbles, int64_t experts, int64_t n, int64_t k, const int32_t* perm,
                void* tiles, void* stream);

// The dense weight w (experts, n, k) rounded to nearest with the range of each group: formulas in quantize.py,
// "minmax". scales and zeros in position order; zeros null: symmetric. *problem becomes 1 if a value is not finite or
// its scale does not fit scale_type; the tiles are then of no use.
struct Rounding {
  const void* w;
  DeviceType w_type;
  int64_t experts, n, k, group_size;
  void* tiles;
  void* scales;
  DeviceType scale_type;
  uint8_t* zeros;
  int32_t* problem;
  void* stream;
};
void quantize_tiles(const Rounding& rounding);

// y (experts, n, k) of y_type = (u - z) * s in fp32, rounded once. inverse (experts, k) or null: the stored column of
// each column of y.
struct Dense {
  const void* tiles;
  const void* scales;
  DeviceType scale_type;
  const uint8_t* zeros;
  const int64_t* inverse;
  int64_t experts, n, k, group_size, first_k;
  void* y;
  DeviceType y_type;
  void* stream;
};
void dequantize_tiles(const Dense& dense);

}  // namespace m3::int4
