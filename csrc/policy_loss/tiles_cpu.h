// Interface between the driver (tiles_cpu.cpp, built for the base architecture) and the kernels of each instruction set
// (tiles_cpu_<isa>.cpp, each built with its own flags). Plain structs and function pointers only: an inline function
// shared by files with different flags could be merged by the linker into code that the running CPU lacks.
//
// A tile is R rows (tokens) by C columns (a run of the vocabulary that starts at index `first`). With raw products z:
//   u = logit_scale * (z + bias);   u = softcap * tanh(u / softcap) if softcap > 0;   z' = u * inverse_temperature
#pragma once
#include <cstdint>

namespace m3::policy_loss {

// z -> z', and what dz'/dz needs.
struct Transform {
  const float* bias;  // (C,) or null
  float logit_scale;
  float softcap;                     // 0: none
  const float* inverse_temperature;  // one a row, or null: 1
};

// z -> z' in place, and the online softmax of each row.
struct Statistics {
  float* logits;  // (R, C)
  int64_t num_rows, row_stride, columns, first;
  Transform transform;
  const int64_t* ids;                                    // (R, K)
  int64_t num_ids;                                       // K
  float *maximum, *total, *picked, *weighted, *squared;  // (R,), picked (R, K); weighted and squared may be null
};

// out = p * (base + slope * q + square * p) * dz'/dz,   q = (z' - lse) - lse_low,   p = exp(q);
// at each of the ids k, base + picked[k] in place of base, and complement[k] * dz'/dz more
struct Gradient {
  const float* logits;  // (R, C), z'
  int64_t num_rows;     // n
  int64_t row_stride, columns, first;
  const int64_t* rows;  // (n,): rows of logits; null: row i
  Transform transform;
  const int64_t* ids;  // (n, K)
  int64_t num_ids;
  const float *lse, *lse_low, *base, *slope, *square;  // (n,); slope and square may be null
  const float *picked, *complement;                    // (n, K)
  float* out;                                          // (n, C)
  int64_t out_stride;
};

enum class Kind : int { kForward = 0, kReverse = 1, kJs = 2 };

// Divergence of a student p from a teacher t, both from z': forward KL(t || p), reverse KL(p || t), generalised
// Jensen-Shannon beta KL(t || m) + (1 - beta) KL(p || m) with m = beta t + (1 - beta) p.
struct Divergence {
  const float *student, *teacher;  // (R, C)
  int64_t num_rows;                // n; R for divergence
  int64_t student_stride, teacher_stride, columns;
  const int64_t* rows;                                                 // divergence_gradient alone; null: row i
  const float *student_lse, *student_low, *teacher_lse, *teacher_low;  // (n,)
  Kind kind;
  float beta, rest;       // rest = 1 - beta
  float *value, *center;  // (n,): divergence adds to both; its gradient reads center
  const float* weight;    // (n,) and all below: the gradient alone
  Transform transform;
  float* out;  // (n, C)
  int64_t out_stride;
};

// Each function does row i and nothing else. scratch: 2 * num_ids floats.
struct Kernels {
  void (*statistics)(const Statistics& args, int64_t i);
  void (*gradient)(const Gradient& args, int64_t i, float* scratch);
  void (*divergence)(const Divergence& args, int64_t i);
  void (*divergence_gradient)(const Divergence& args, int64_t i);
};

// Each is defined by its file, and exists only where that file is part of the build.
extern const Kernels kScalarKernels;
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
extern const Kernels kNeonKernels;

}  // namespace m3::policy_loss
