// Tile kernels of two models' logits on a GPU: divergence and its gradient. Each is one pass at the speed of memory.
#include "policy_loss/tiles.cuh"

namespace m3::policy_loss {
namespace {

// A unit is taken in halves: 2 KiB of fp32 of either model are on their way in a warp, in half the registers.
constexpr int kHalfUnit = kUnit / 2;

// log p of one model's z'. The parts of log sum exp go one after the other: the first difference is all but exact.
struct Normaliser {
  float lse, low;
  __device__ float operator()(float z) const { return (z - lse) - low; }
};

M3_DEVICE float probability(float log_p) { return exponential(bounded(log_p)); }

// a, 0 where p is.
M3_DEVICE float unless_zero(float p, float a) { return p == 0.0f ? 0.0f : a; }

// exp(x) - 1 for x <= 2 with a small relative error. x = n ln 2 + r; the polynomial is that of the CPU kernels.
M3_DEVICE float exponential_less_one(float x) {
  constexpr float kLog2E = 1.44269504f, kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  constexpr float kRound = 12582912.0f + 127.0f;  // 1.5 * 2^23: adding it leaves n + 127 in the low bits
  x = ptx::max_nan(x, -60.0f);
  const float t = ptx::fma(x, kLog2E, kRound), n = t - kRound;
  const float r = ptx::fma(n, -kLn2Low, ptx::fma(n, -kLn2High, x)), power = __uint_as_float(__float_as_uint(t) << 23);
  float p = ptx::fma(r, 1.38825167e-3f, 8.36654752e-3f);
  p = ptx::fma(p, r, 4.16672006e-2f);
  p = ptx::fma(p, r, 0.166665435f);
  p = ptx::fma(p, r, 0.49999997f);
  p = ptx::fma(p * r, r, r);
  return ptx::fma(power, p, power - 1.0f);
}

// log(1 + y) for y > -1, with a small relative error; 1 + y is at least `least`. Cephes' polynomial.
M3_DEVICE float log_of_one_plus(float y, float least) {
  constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  constexpr uint32_t kRootHalf = 0x3F3504F3;  // sqrt(1/2): u = m 2^k with m from there to sqrt(2)
  const float u = ptx::max_nan(1.0f + y, least);
  const int exponent = (int)(__float_as_uint(u) - kRootHalf) >> 23;
  const float k = __int2float_rn(exponent), m = __uint_as_float(__float_as_uint(u) - ((uint32_t)exponent << 23));
  const float f = (m - 1.0f) + (y - (u - 1.0f));  // what 1 + y rounded away matters at k = 0
  float p = ptx::fma(f, 7.0376836292e-2f, -1.1514610310e-1f);
  p = ptx::fma(p, f, 1.1676998740e-1f);
  p = ptx::fma(p, f, -1.2420140846e-1f);
  p = ptx::fma(p, f, 1.4249322787e-1f);
  p = ptx::fma(p, f, -1.6668057665e-1f);
  p = ptx::fma(p, f, 2.0000714765e-1f);
  p = ptx::fma(p, f, -2.4999993993e-1f);
  p = ptx::fma(p, f, 3.3333331174e-1f);
  const float square = f * f;
  p = ptx::fma(k, kLn2Low, ptx::fma(square, -0.5f, p * f * square));
  return ptx::fma(k, kLn2High, f + p);
}

// log p - log m and log t - log m of the mixture m = beta t + rest p, from d = log t - log p:
//   log m - log p = log(1 + beta (exp(d) - 1))      up to a turn of d,
//   log m - log t = log(1 + rest (exp(-d) - 1))     beyond it; the other difference is d away.
// The turn (2 for small beta, -2 for large) lies where t begins to rule the mixture, so little cancels on either side.
M3_DEVICE void to_mixture(float log_p, float log_t, float beta, float rest, float& p_to_m, float& t_to_m) {
  const float d = log_t - log_p, turn = beta <= 0.5f ? 2.0f : -2.0f;
  const bool beyond = d > turn;
  const float log_sum =
      log_of_one_plus((beyond ? rest : beta) * exponential_less_one(beyond ? -d : d), fminf(beta, rest));
  p_to_m = (beyond ? -d : 0.0f) - log_sum;
  t_to_m = (beyond ? 0.0f : d) - log_sum;
}

// Grid: rows * cut.shares, the shares of a row next to each other. A warp takes every kWarps-th of the block's
// cut.units units: reads both models once and leaves two sums per unit in the workspace; the row's last block adds them
// up.
template <Type kType, Kind kKind>
__global__ void __launch_bounds__(kThreads) divergence_kernel(const Divergence a, const Cut cut, const bool aligned) {
  constexpr int kEach = kVector<kType>, kStep = 32 * kEach, kVectors = kHalfUnit / kStep;
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
    const auto add = [&](const uint4& raw, const uint4& other) {
      float z[kEach], t[kEach];
      widen<kType>(raw, z);
      widen<kType>(other, t);
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
    };
    const int first = unit * kUnit + lane * kEach;
    if (aligned && (unit + 1) * kUnit <= a.columns) {
#pragma unroll 1
      for (int half = first; half < first + kUnit; half += kHalfUnit) {
        uint4 raw[kVectors], other[kVectors];
        read_whole<kType>(raw, student, half);
        read_whole<kType>(other, teacher, half);
#pragma unroll
        for (int j = 0; j < kVectors; ++j) add(raw[j], other[j]);
      }
    } else {
#pragma unroll 1
      for (int column = first; column < first + kUnit; column += kStep)
        add(read_part<kType>(student, column, a.columns, aligned, -INFINITY),
            read_part<kType>(teacher, column, a.columns, aligned, -INFINITY));
    }
    from_t = warp_sum(from_t), from_p = warp_sum(from_p);
    if (lane == 0) part[unit] = make_float2(from_t, from_p);
  }
  if (!last_of_row(a.workspace.counters, row, cut.shares) || warp) return;
  float from_t = 0.0f, from_p = 0.0f;
#pragma unroll 1
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
  constexpr int kEach = kVector<kType>, kStep = 32 * kEach, kVectors = kHalfUnit / kStep;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t i = blockIdx.x / blocks;
  const int begin = (blockIdx.x % blocks * kWarps + warp) * kUnit;
  if (begin >= a.columns) return;
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
  const auto gradient = [&](const uint4& raw, const uint4& other, float (&g)[kEach]) {
    float z[kEach];
    widen<kType>(raw, z);
    widen<kType>(other, g);
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
  };
  const int first = begin + lane * kEach;
  if (aligned && exists && begin + kUnit <= a.columns) {
#pragma unroll 1
    for (int half = first; half < first + kUnit; half += kHalfUnit) {
      uint4 raw[kVectors], other[kVectors];
      read_whole<kType>(raw, student, half);
      read_whole<kType>(other, teacher, half);
#pragma unroll
      for (int j = 0; j < kVectors; ++j) {
        float g[kEach];
        gradient(raw[j], other[j], g);
        write_whole<kOut>(out, half + kStep * j, g);
      }
    }
  } else {
    const int columns = exists ? a.columns : 0;
#pragma unroll 1
    for (int column = first; column < first + kUnit; column += kStep) {
      float g[kEach];
      gradient(read_part<kType>(student, column, columns, aligned, NAN),
               read_part<kType>(teacher, column, columns, aligned, NAN), g);
      write_part<kOut>(out, column, a.columns, aligned, g);
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
