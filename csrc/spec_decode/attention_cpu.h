// Interface between the driver of tree attention (attention_cpu.cpp, built for the base architecture) and its kernels
// (attention_cpu_<isa>.cpp, each built with its own flags). Plain structs and function pointers only: an inline
// function shared by files with different flags could be merged by the linker into code that the running CPU lacks.
//
// The keys that a query attends to are counted by logical position: 0 for the first token of the request, then on along
// the path to the query. Arithmetic is cut at fixed positions: a chunk of kChunk keys is one step of the online
// softmax, a split of kSplitChunks chunks starts a new softmax, and splits are merged in ascending order. Whatever rows
// are computed together, by whichever thread, each goes through the same operations in the same order.
#pragma once
#include <cstdint>

namespace m3::spec_decode {

enum class Type : int { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2, kInt8 = 3 };  // int8: of caches only

constexpr int kChunk = 64;       // keys
constexpr int kSplitChunks = 8;  // chunks of a split
constexpr int kPad = 16;         // rows in workspace are padded to a multiple of this: the lanes of the widest vector

// The online softmax of rows over a part of their keys. weighted / (sum of total's lanes) is the attention so far.
struct State {
  float* maximum;   // (rows,), of the scores in base 2; -inf before the first key
  float* total;     // (rows, kPad): lanes that add up to the sum of exp2(score - maximum)
  float* weighted;  // (rows, stride): sum of exp2(score - maximum) * value
};

// Rows of queries against the keys of one chunk. Key j of row i counts iff begin[i] <= j < end[i]. Integers enter as
// they are: a key's scale multiplies its score, a value's the weight of the value.
struct Chunk {
  const void* const* keys;    // (kChunk,) addresses of `stride` elements; all can be read, whether they count or not
  const float* tiles;         // the same keys as `tile` leaves them, then `keys` is not looked at; or null
  const void* const* values;  // (kChunk,); those that count for no row are not read
  Type key_type, value_type;
  const float *key_scales, *value_scales;  // (kChunk,), those of keys and values that were int8; null: none
  const int *begin, *end;                  // (rows,), within 0 .. kChunk
  int64_t rows;
  const float* queries;   // (rows, stride), scaled by softmax_scale * log2(e)
  int64_t stride;         // head size, padded
  float *scores, *scale;  // (rows, kChunk) and (rows,), scratch
  State state;
};

// out[i] = weighted / total * sigmoid(gate)
struct Finish {
  int64_t size;        // head size
  const float* total;  // one row of a State
  const float* weighted;
  const void* gate;  // null: none; else `size` values, or one for all where gate_one
  bool gate_one;
  Type gate_type;
  void* out;  // (size,)
  Type type;
};

struct Kernels {
  // to[i] (stride) = from[i] (size) * factor, zeros after; factor 1 changes no bit
  void (*widen)(const void* const* from, Type type, int64_t count, int64_t size, float factor, float* to,
                int64_t stride);
  // kChunk keys as `attend` wants them for many rows; null where it has no use for that
  void (*tile)(const void* const* from, Type type, int64_t size, float* to, int64_t stride);
  void (*attend)(const Chunk& chunk);
  // into (one row) becomes the state over its keys and those of `from` (one row)
  void (*merge)(const State& into, const State& from, int64_t stride);
  void (*finish)(const Finish& row);
};

// Each is defined by its file, and exists only where that file is part of the build.
extern const Kernels kScalarAttention;
extern const Kernels kAvx2Attention;
extern const Kernels kAvx512Attention;
extern const Kernels kNeonAttention;

}  // namespace m3::spec_decode
