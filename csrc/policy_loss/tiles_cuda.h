// Host interface of the CUDA tile kernels; m3kernels/policy_loss/tiles.py says what each function computes.
//
// A tile is R rows (tokens) by C columns (a run of the vocabulary that starts at index `first`). With raw products z:
//   u = logit_scale * (z + bias);   u = softcap * tanh(u / softcap) if softcap > 0;   z' = u * inverse_temperature
#pragma once
#include <cstdint>

namespace m3::policy_loss {

enum class Type : int { kF32 = 0, kBf16 = 1, kF16 = 2 };  // of logits and gradients; numbers as in m3::Half
enum class Kind : int { kForward = 0, kReverse = 1, kJs = 2 };

// Columns that a warp takes at once. Sums are formed unit by unit and joined in their order, so a row's results depend
// on its columns alone, whichever blocks compute its units.
constexpr int kUnit = 1024;

struct Matrix {
  void* data;
  int64_t stride;  // elements from row to row
  Type type;
};

// z -> z', and what dz'/dz needs.
struct Transform {
  const float* bias;  // (C,) or null
  float logit_scale;
  float softcap;                     // 0: none
  const float* inverse_temperature;  // one a row, or null: 1
};

// Where a row's sums meet when several blocks share it.
struct Workspace {
  float* part;    // (R, units, 4) for statistics, (R, units, 2) for divergence
  int* counters;  // num_counters zeros, left zero; rows without one are not shared
  int64_t num_counters;
};

// z -> z' in place, and the online softmax of each row.
struct Statistics {
  Matrix logits;  // (R, C)
  int64_t num_rows;
  int columns;
  int64_t first;
  Transform transform;
  const int64_t* ids;                                    // (R, K)
  int num_ids;                                           // K
  float *maximum, *total, *picked, *weighted, *squared;  // (R,), picked (R, K); weighted and squared may be null
  Workspace workspace;
};

// out = p * (base + slope * q + square * p) * dz'/dz,   q = (z' - lse) - lse_low,   p = exp(q);
// at each of the ids k, base + picked[k] in place of base, and complement[k] * dz'/dz more
struct Gradient {
  Matrix logits;     // (R, C), z'
  int64_t num_rows;  // R
  int columns;
  int64_t first;
  const int64_t* rows;  // (n,): rows of logits, nan where there is no such row; null: row i
  Transform transform;
  const int64_t* ids;  // (n, K)
  int num_ids;
  const float *lse, *lse_low, *base, *slope, *square;  // (n,); slope and square may be null
  const float *picked, *complement;                    // (n, K)
  Matrix out;                                          // (n, C): of the logits' type, or of any if they are fp32
  int64_t out_rows;                                    // n
};

// Divergence of a student p from a teacher t, both from z'.
struct Divergence {
  Matrix student, teacher;  // (R, C), of one type
  int64_t num_rows;
  int columns;
  const int64_t* rows;                                                 // divergence_gradient alone, as in Gradient
  const float *student_lse, *student_low, *teacher_lse, *teacher_low;  // (n,)
  Kind kind;
  float beta, rest;       // rest = 1 - beta
  float *value, *center;  // (n,): divergence adds to both; its gradient reads center
  Workspace workspace;    // divergence alone
  const float* weight;    // (n,) and all below: the gradient alone
  Transform transform;
  Matrix out;  // (n, C), as in Gradient
  int64_t out_rows;
};

void statistics(const Statistics& args, void* stream);
void gradient(const Gradient& args, void* stream);
void divergence(const Divergence& args, void* stream);
void divergence_gradient(const Divergence& args, void* stream);

}  // namespace m3::policy_loss
