// Interface between the driver of linear (linear_cpu.cpp, built for the base architecture) and its kernels
// (linear_cpu_<isa>.cpp, each built with its own flags). Plain structs and function pointers only: an inline function
// shared by files with different flags could be merged by the linker into code that the running CPU lacks.
//
// Every y[m, n] is one dot product, cut along K into pieces of block_columns(k) columns. In a piece, lane l of a vector
// adds the products of columns l, l + lanes, ... one by one; the lanes are added in a tree, half against half; pieces
// are added in ascending order, the bias last. Whatever rows and columns of y are computed together, by whichever
// thread, each goes through these operations in this order.
#pragma once
#include <cstdint>

namespace m3::decoder {

enum class Type : int { kF32 = 0, kBF16 = 1, kF16 = 2 };

constexpr int kColumns = 4;           // outputs of a tile, its "strip": rows of the weight read side by side
constexpr int64_t kMostPiece = 1024;  // columns of K: 4 rows of a weight and 6 of x share L1
constexpr int64_t kPieceStep = 16;    // a piece has a multiple of this: the lanes of the widest vector

// y = x W^T (+ bias) for some columns of the weight. Strides in elements.
struct Product {
  const void* weight;  // (columns, k)
  Type type;
  int64_t columns, k, piece;
  const float* x;  // (rows, k); read where `packed` is null: then there is one tile
  int64_t x_stride, rows;
  const float* packed;  // x tile by tile: tile i starts at row rows * i / tiles, its rows take padded_k floats each
  int64_t padded_k, tiles;
  int64_t first_tile, last_tile;  // those that `block` computes
  float* y;
  int64_t y_stride;
  const float* bias;  // (columns,) or null
  float* panel;       // scratch of kPanelFloats
};

constexpr int64_t kPanelColumns = 128;
constexpr int64_t kPanelFloats = kPanelColumns * kMostPiece;

struct Kernels {
  int64_t tile_rows;  // rows of a tile at most
  // Few rows: the weight is read once, strip by strip, at the speed of memory.
  void (*stream)(const Product& product);
  // Many rows, at most kPanelColumns columns: a piece of the weight stays in L2, a tile of x in L1.
  void (*block)(const Product& product);
  // One piece of one tile of x as `packed` wants it
  void (*pack)(const float* x, int64_t x_stride, int rows, int64_t k, float* to);
  // to = from, as floats
  void (*widen)(const void* from, Type type, int64_t count, float* to);
};

// Each is defined by its file, and exists only where that file is part of the build.
extern const Kernels kScalarLinear;
extern const Kernels kAvx2Linear;
extern const Kernels kAvx512Linear;
extern const Kernels kNeonLinear;

}  // namespace m3::decoder
