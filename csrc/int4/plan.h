// How a product on a GPU is cut along K, and what each cut adds to what: one order of additions for every kernel.
//
// K is k_tiles tiles of 16 columns. Part p is the tiles [p * part_tiles, (p + 1) * part_tiles); split s is the parts
// [s * split_parts, (s + 1) * split_parts). For one element of y, with mma the fp32 accumulation of the matrix unit:
//
//   part(p)  = 0; for each run of tiles of p that lie in one group, in order of k:
//                     r = 0; for each tile: r = mma(u - z, x, r);   part = fma(scale, r, part)
//   split(s) = part(first) + part(next) + ...   in order;   parts without tiles are skipped
//   y        = split(0) + split(1) + ...        in order, then + bias, then rounded
//
// A kernel may compute parts and splits in different warps and blocks, or one after the other: the bits are the same,
// for every number of rows. So the plan depends on the weight and the device, never on the rows.
#pragma once
#include <cstdint>

#include "int4/layout.h"

namespace m3::int4 {

struct Plan {
  int32_t part_tiles;   // k-tiles of a part
  int32_t split_parts;  // parts of a split: one for each warp that shares a block's rows in the decode kernel
  int32_t splits;
};

constexpr int kSplitParts = 4;  // Plan::split_parts
constexpr int kMostSplits = 16;

M3_HD int64_t ceil_div64(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Splits so that a weight of few rows still keeps every multiprocessor reading: as many blocks (64 rows of one split)
// as are resident at a time, four a multiprocessor, and no second wave of a few; parts of at least 8 tiles (128
// columns).
M3_HD Plan plan_of(int64_t n, int64_t k, bool grouped, int multiprocessors) {
  constexpr int64_t kResident = 4, kLeastPart = 8;
  const int64_t k_tiles = ceil_div64(k, kTileK), blocks = ceil_div64(n, kTileN);
  int64_t splits = 1;
  if (!grouped)
    while (splits < kMostSplits && 2 * blocks * splits <= kResident * multiprocessors &&
           k_tiles >= 2 * splits * kSplitParts * kLeastPart)
      splits *= 2;
  const int64_t part = ceil_div64(k_tiles, splits * kSplitParts);
  return {(int32_t)part, kSplitParts, (int32_t)ceil_div64(k_tiles, part * kSplitParts)};
}

}  // namespace m3::int4
