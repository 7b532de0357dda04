// Tile kernels of two models' logits on a GPU: divergence and its gradient. Each is one pass at the speed of memory.
#include "policy_loss/tiles.cuh"

namespace m3::policy_loss {
namespace {

// A unit is taken in halves: 2 KiB of fp32 of either model are on their way in a warp, in half the registers.
constexpr int kHalfUnit = kUnit / 2;
template <Type kType>
constexpr int kHalfVectors = kHalfUnit / 32 / kVector<kType>;

// log p of one model's z'. The parts of log sum exp go one after the other: the first difference is all but exact.
struct Normaliser {
  float lse, low;
  __device__ float operator()(float z) const { return (z - lse) - low; }
};

M3_DEVICE float probability(float log_p) { return exponential(bounded(log_p)); }

// a, 0 where p is.
M3_DEVICE float unless_zero(float p, float a) { return p == 0.0f ? 0.0f : a; }

// log p - log m and log t - log m of the mixture m = beta t + rest p, from d = log t - log p:
//   log m - log p = log(1 + beta (exp(d) - 1))      up to a turn of d,
//   log m - log t = log(1 + rest (exp(-d) - 1))     beyond it; the other difference is d away.
// The turn (2 for small beta, -2 for large) lies where t begins to rule the mixture, so little cancels on either side.
M3_DEVICE void to_mixture(float log_p, float log_t, float beta, float rest, float& p_to_m, float& t_to_m) {
  const float d = log_t - log_p, turn = beta <= 0.5f ? 2.0f : -2.0f;
  const bool beyond = d > turn;
  const float log_sum = log1pf((beyond ? rest : beta) * expm1f(beyond ? -d : d));
  p_to_m = (beyond ? -d : 0.0f) - log_sum;
  t_to_m = (beyond ? 0.0f : d) - log_sum;
}

// Grid: rows * cut.shares, the shares of a row next to each other. A warp takes every kWarps-th of the block's
// cut.units units: reads both models once and leaves two sums per unit in the workspace; the row's last block adds them
// up.
template <Type kType, Kind kKind>
__global__ void __launch_bounds__(kThreads) divergence_kernel(const Divergence a, const Cut cut, const bool aligned) {
  constexpr int kEach = kVector<kType>, kVectors = kHalfVectors<kType>;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, units = (a.columns + kUnit - 1) / kUnit;
  const int64_t row = blockIdx.x / cut.shares;
  const int begin = blockIdx.x % cut.shares * cut.units, end = min(begin + cut.units, units);
  const Stored<kType>* student = (const Stored<kType>*)a.student.data + row * a.student.stride;
  const Stored<kType>* teacher = (const Stored<kType>*)a.teacher.data + row * a.teacher.stride;
  const Normaliser student_log{a.student_lse[row], a.student_low[row]};
  const Normaliser teacher_log{a.teacher_lse[row], a.teacher_low[row]};
  float2* part = (float2*)a.workspace.part + row * units;
  for (int unit = begin + warp; unit < end; unit += kWarps) {
    float from_t = 0.0f, from_p = 0.0f;
#pragma unroll 1
    for (int half = 0; half < 2; ++half) {
      const int first = unit * kUnit + half * kHalfUnit + lane * kEach;
      uint4 raw[kVectors], other[kVectors];
      read<kType>(raw, student, first, a.columns, aligned, -INFINITY);
      read<kType>(other, teacher, first, a.columns, aligned, -INFINITY);
#pragma unroll
      for (int j = 0; j < kVectors; ++j) {
        float z[kEach], t[kEach];
        widen<kType>(raw[j], z);
        widen<kType>(other[j], t);
#pragma unroll
        for (int i = 0; i < kEach; ++i) {
          const float log_p = student_log(z[i]), log_t = teacher_log(t[i]);
          float p_to_m, t_to_m;
          if constexpr (kKind == Kind::kJs)
            to_mixture(log_p, log_t, a.beta, a.rest, p_to_m, t_to_m);
          else
            p_to_m = log_p - log_t, t_to_m = log_t - log_p;
          if constexpr (kKind != Kind::kReverse) {
            const float q = probability(log_t);
            from_t = ptx::fma(q, unless_zero(q, t_to_m), from_t);
          }
          if constexpr (kKind != Kind::kForward) {
            const float p = probability(log_p);
            from_p = ptx::fma(p, unless_zero(p, p_to_m), from_p);
          }
        }
      }
    }
    from_t = warp_sum(from_t), from_p = warp_sum(from_p);
    if (lane == 0) part[unit] = make_float2(from_t, from_p);
  }
  if (!last_of_row(a.workspace.counters, row, cut.shares) || warp) return;
  float from_t = 0.0f, from_p = 0.0f;
  for (int unit = lane; unit < units; unit += 32) {
    const float2 sums = __ldcg(part + unit);
    from_t += sums.x, from_p += sums.y;
  }
  from_t = warp_sum(from_t), from_p = warp_sum(from_p);
  if (lane) return;
  if constexpr (kKind == Kind::kJs) from_t *= a.beta, from_p *= a.rest;
  a.value[row] += from_t + from_p;
  if constexpr (kKind != Kind::kForward) a.center[row] += from_p;
}

// Grid: n * blocks, the blocks of a row next to each other. A warp owns one unit of row i of out: reads it from row
// rows[i] of both models, writes the gradient, possibly over the student's.
template <Type kType, Type kOut, Kind kKind>
__global__ void __launch_bounds__(kThreads)
    divergence_gradient_kernel(const Divergence a, const int blocks, const bool aligned) {
  constexpr int kEach = kVector<kType>, kVectors = kHalfVectors<kType>;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t i = blockIdx.x / blocks;
  const int begin = (blockIdx.x % blocks * kWarps + warp) * kUnit, end = min(begin + kUnit, a.columns);
  const int64_t source = a.rows ? a.rows[i] : i;
  const bool exists = (uint64_t)source < (uint64_t)a.num_rows;
  const Stored<kType>* student = (const Stored<kType>*)a.student.data + (exists ? source : 0) * a.student.stride;
  const Stored<kType>* teacher = (const Stored<kType>*)a.teacher.data + (exists ? source : 0) * a.teacher.stride;
  Stored<kOut>* out = (Stored<kOut>*)a.out.data + i * a.out.stride;
  const Normaliser student_log{a.student_lse[i], a.student_low[i]};
  const Normaliser teacher_log{a.teacher_lse[i], a.teacher_low[i]};
  const float center = kKind == Kind::kForward ? 0.0f : a.center[i], weight = a.weight[i];
  const Chain chain = chain_of(a.transform, i);
  const bool capped = a.transform.softcap > 0.0f;
#pragma unroll 1
  for (int half = begin; half < end; half += kHalfUnit) {
    const int first = half + lane * kEach, columns = exists ? a.columns : 0;
    uint4 raw[kVectors], other[kVectors];
    read<kType>(raw, student, first, columns, aligned, NAN);
    read<kType>(other, teacher, first, columns, aligned, NAN);
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      float z[kEach], g[kEach];
      widen<kType>(raw[j], z);
      widen<kType>(other[j], g);
#pragma unroll
      for (int c = 0; c < kEach; ++c) {
        const float log_p = student_log(z[c]), log_t = teacher_log(g[c]), p = probability(log_p);
        if constexpr (kKind == Kind::kForward) {
          g[c] = p - probability(log_t);
        } else if constexpr (kKind == Kind::kReverse) {
          g[c] = p * unless_zero(p, (log_p - log_t) - center);
        } else {
          float p_to_m, t_to_m;
          to_mixture(log_p, log_t, a.beta, a.rest, p_to_m, t_to_m);
          g[c] = p * unless_zero(p, ptx::fma(a.rest, p_to_m, -center));
        }
        g[c] *= weight;
        g[c] = capped ? chained<true>(g[c], z[c], chain) : chained<false>(g[c], z[c], chain);
      }
      write<kOut>(out, first + 32 * kEach * j, a.columns, aligned, g);
    }
  }
}

// Runs body with the kind as a constant.
template <class Body>
void with_kind(Kind kind, Body body) {
  if (kind == Kind::kForward)
    body(std::integral_constant<Kind, Kind::kForward>());
  else if (kind == Kind::kReverse)
    body(std::integral_constant<Kind, Kind::kReverse>());
  else
    body(std::integral_constant<Kind, Kind::kJs>());
}

}  // namespace

void divergence(const Divergence& a, void* stream) {
  if (!a.num_rows || !a.columns) return;
  const Cut cut = cut_of(a.workspace, a.num_rows, a.columns);
  const Launch how{.grid = dim3(a.num_rows * cut.shares),
                   .block = dim3(kThreads),
                   .shared_bytes = 16,
                   .stream = (cudaStream_t)stream};
  const bool whole = aligned(a.student, a.num_rows) && aligned(a.teacher, a.num_rows);
  with_type(a.student.type, [&](auto type) {
    with_kind(a.kind, [&](auto kind) { launch("divergence", divergence_kernel<type(), kind()>, how, a, cut, whole); });
  });
}

void divergence_gradient(const Divergence& a, void* stream) {
  const int blocks = (units_of(a.columns) + kWarps - 1) / kWarps;
  const Launch how{
      .grid = dim3(a.out_rows * blocks), .block = dim3(kThreads), .shared_bytes = 0, .stream = (cudaStream_t)stream};
  const bool whole = aligned(a.student, a.num_rows) && aligned(a.teacher, a.num_rows) && aligned(a.out, a.out_rows);
  with_types(a.student.type, a.out.type, [&](auto type, auto out) {
    with_kind(a.kind, [&](auto kind) {
      launch("divergence_gradient", divergence_gradient_kernel<type(), out(), kind()>, how, a, blocks, whole);
    });
  });
}

}  // namespace m3::policy_loss
