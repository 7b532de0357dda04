// Interface between the driver (rows_cpu.cpp, built for the base architecture) and the kernels of each instruction set
// (rows_cpu_<isa>.cpp, each built with its own flags). Plain structs and function pointers only: an inline function
// shared by files with different flags could be merged by the linker into code that the running CPU lacks.
//
// A row is read in groups of kGroup elements and added up in blocks of kBlock. Its logits become
//   z = logit; nan -> -inf; above 1e30 -> 1e30; below -1e30, but not -inf -> -1e30; -inf where a token is not allowed
#pragma once
#include <cstdint>

namespace m3::spec_decode::rows {

constexpr int64_t kGroup = 256, kBlock = 1024;
constexpr int64_t kSlack = 32;  // elements that a kernel may write behind the last of a list
constexpr float kClip = 1e30f;
constexpr float kNothing = -__builtin_huge_valf();
constexpr int kPivots = 7;

enum class Type : int { kF32 = 0, kBf16 = 1, kF16 = 2 };

struct Row {
  const void* logits;
  Type type;
  const uint32_t* allowed;  // bit v % 32 of word v / 32: token v is allowed; null: all are
  int64_t size;
};

// Weight of a token: w = exp((z - maximum) * (inverse + inverse_low)), 0 where z < threshold. With draft probabilities
// q (outside 0..1: 0) it is max(w * inverse_total - q, 0).
struct Weight {
  float maximum, inverse, inverse_low, threshold;
  const float* draft;  // (size,) or null
  float inverse_total;
};

struct Noise {
  uint64_t seed, position;
};

struct Best {
  double score;
  int64_t token;
};

// maxima: of the row's groups, one each.
struct Kernels {
  // Fills maxima and returns the largest.
  float (*scan)(const Row& row, float* maxima);
  // The same; and for each block the sum of exp((z - reference) * (inverse + inverse_low)), where reference is the
  // largest z up to its end (sum 0 where that is -inf).
  float (*soften)(const Row& row, float inverse, float inverse_low, float* maxima, double* sums, float* references);
  // First token with this z, or -1.
  int64_t (*find)(const Row& row, const float* maxima, float z);
  // Lists low <= z < high in order of tokens; low is not -inf. z may be the row itself; ids may be null, maxima too.
  // Gives up behind the group in which it has listed more than `limit`. Returns how many it has listed.
  int64_t (*collect)(const Row& row, const float* maxima, float low, float high, int64_t limit, float* z, int32_t* ids);
  // masses[i]: sum of the weights where z >= pivots[i]; masses[kPivots]: of all.
  void (*tally)(const Row& row, const Weight& weight, const float* pivots, double* masses);
  // Sum of the weights of each block.
  void (*add)(const Row& row, const Weight& weight, const float* maxima, double* sums);
  // The weights of one block; 0 behind the row's end. out: kBlock floats.
  void (*weigh)(const Row& row, const Weight& weight, int64_t block, float* out);
  // best = the token with the largest (z - maximum) / temperature - log E(noise, token), ties to the lowest, among z >=
  // threshold and what best already holds; its score there is at least -3.
  void (*race)(const Row& row, const Weight& weight, double temperature, const Noise& noise, const float* maxima,
               Best& best);
  // out = z - log E(noise, v + offsets[v]), for size elements and -inf up to a whole group.
  void (*perturb)(const Row& row, const Noise& noise, const int64_t* offsets, float* out);
};

// Each is defined by its file, and exists only where that file is part of the build.
extern const Kernels kScalarRows;
extern const Kernels kAvx2Rows;
extern const Kernels kAvx512Rows;
extern const Kernels kNeonRows;

}  // namespace m3::spec_decode::rows
