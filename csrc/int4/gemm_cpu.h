// Interface between the driver (gemm_cpu.cpp, built for the base architecture) and the kernels of each instruction set
// (gemm_cpu_<isa>.cpp, each built with its own flags). Plain structs and function pointers only: an inline function
// shared by files with different flags could be merged by the linker into code that the running CPU lacks.
#pragma once
#include <cstdint>

#include "int4/layout.h"

namespace m3::int4 {

// What x becomes before the product. kInt24 is how kernels with an 8-bit dot product compute "exact": q = 65536 a + 256
// b + c with three signed bytes, three integer products, put together in fp32. Its step, 2^-23 of a block's maximum, is
// below the rounding of an fp32 sum; rows with outliers, for which that would not hold, are computed in fp32 (kExact).
enum class Mode : int { kExact = 0, kInt16 = 1, kInt8 = 2, kInt24 = 3 };
enum class Type : int { kF32 = 0, kBF16 = 1, kF16 = 2 };

constexpr int kModes = 4;
constexpr int planes_of(Mode mode) { return mode == Mode::kInt24 ? 3 : 1; }
// 32-bit words of a packed activation row (or plane of one) per k-tile: 16 columns as fp32, int16 or int8.
constexpr int words_per_tile(Mode mode) { return mode == Mode::kExact ? 16 : mode == Mode::kInt16 ? 8 : 4; }

// A run of k-tiles inside one group: the unit that shares an activation scale and a weight scale.
struct Block {
  int32_t tile;     // first k-tile
  int32_t tiles;    // 1..kBlockTiles
  int32_t columns;  // columns inside the weight (padding excluded)
  int32_t group;    // row of scales and zeros
};

// One n-tile (64 rows of W) times a run of packed activation rows.
struct TileArgs {
  const uint8_t* tiles;  // kt tiles of 512 bytes
  const void* scales;    // (G, 64) in position order
  const uint8_t* zeros;  // (G, 64) or null: 8
  Type scale_type;
  const Block* blocks;
  int num_blocks;
  const int32_t* x;      // packed rows, planes of a row one after another; interleaved: word w of row r at w * rows + r
  int64_t x_stride;      // words from a plane to the next; unused where rows are interleaved
  const float* x_scale;  // (rows * planes, num_blocks): value of one step, in plane 0; unused when exact
  const int32_t* x_sum;  // (rows * planes, num_blocks): sum of the packed integers; unused when exact
  int64_t rows;
  float* c;     // (rows, 64) in position order; overwritten
  void* panel;  // scratch of kPanelBytes
};
constexpr int64_t kPanelBytes = kBlockTiles * kTileN * kTileK * 4;

struct Kernels {
  const char* name;
  int64_t skinny_rows;  // tasks of 2 to this many rows (one plane a row) want x interleaved, see TileArgs; 0: none
  // Packs one row of `16 * tiles` fp32 values (zero-padded). False: the row must be computed as kExact (mode is
  // another).
  bool (*pack_row)(Mode mode, const float* x, const Block* blocks, int num_blocks, int32_t* packed,
                   int64_t plane_stride, float* scale, int32_t* sum);
  void (*tile[kModes])(const TileArgs& args);  // kInt24 may be null
  // c (64 values in position order) -> 64 values in row order.
  void (*to_row_order)(const float* c, float* row);
  // gate[i] = gate[i] / (1 + exp(-gate[i])) * up[i]
  void (*silu_mul)(float* gate, const float* up, int64_t count);
};

// Each is defined by its file, and exists only where that file is part of the build.
extern const Kernels kScalarKernels;
extern const Kernels kAvx2Kernels;
extern const Kernels kAvxVnniKernels;
extern const Kernels kAvx512Kernels;
extern const Kernels kAvx512VnniKernels;
extern const Kernels kNeonKernels;

}  // namespace m3::int4
