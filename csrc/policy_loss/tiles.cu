// Tile kernels of one model's logits on a GPU: statistics and gradient. Each is one pass at the speed of memory.
#include "policy_loss/tiles.cuh"

namespace m3::policy_loss {
namespace {

// -- statistics -------------------------------------------------------------------------------------------------------
// Online softmax of a set of columns: of a unit, or of a row so far.
struct Sums {
  float maximum, total, weighted, squared;
};

// Within 2 units of the last place: near 0 the polynomial of Cephes' tanhf, elsewhere 1 - 2 / (exp(2 |x|) + 1).
M3_DEVICE float tanh_of(float x) {
  const float square = x * x, a = fabsf(x);
  float near = ptx::fma(square, -5.70498872745e-3f, 2.06390887954e-2f);
  near = ptx::fma(near, square, -5.37397155531e-2f);
  near = ptx::fma(near, square, 1.33314422036e-1f);
  near = ptx::fma(near, square, -3.33332819422e-1f);
  near = ptx::fma(near * square, x, x);
  const float far = ptx::fma(ptx::reciprocal(exponential(2.0f * fminf(a, 20.0f)) + 1.0f), -2.0f, 1.0f);
  return a >= 0.625f ? copysignf(far, x) : near;
}

constexpr float kLowest = -3.40282347e38f;  // in place of a maximum of -inf: -inf less this is -inf, not nan

struct RowTransform {
  const float* bias;
  float logit_scale, softcap, inverse_softcap, inverse_temperature;
};

// z -> z' of kCount columns from `column` on; kWhole: all there, and aligned.
template <bool kWhole, int kCount>
M3_DEVICE void transform(float (&z)[kCount], const RowTransform& t, int column, int columns) {
  if (t.bias) {
#pragma unroll
    for (int i = 0; i < kCount; i += 4) {
      float4 bias = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      if constexpr (kWhole) {
        bias = *(const float4*)(t.bias + column + i);
      } else {
        if (column + i < columns) bias.x = t.bias[column + i];
        if (column + i + 1 < columns) bias.y = t.bias[column + i + 1];
        if (column + i + 2 < columns) bias.z = t.bias[column + i + 2];
        if (column + i + 3 < columns) bias.w = t.bias[column + i + 3];
      }
      z[i] += bias.x, z[i + 1] += bias.y, z[i + 2] += bias.z, z[i + 3] += bias.w;
    }
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) z[i] *= t.logit_scale;
  if (t.softcap > 0.0f) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) z[i] = t.softcap * tanh_of(z[i] * t.inverse_softcap);
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) z[i] *= t.inverse_temperature;
}

// The sums of a warp's unit, in every lane; vector(j) is this lane's j-th, -inf where there is no column. A warp that
// knows its maximum has one exp per column and no rescaling.
template <Type kType, int kUnrolled, class Vector>
M3_DEVICE Sums sums_of(Vector vector) {
  constexpr int kEach = kVector<kType>, kVectors = kUnit / 32 / kEach;
  float maximum = -INFINITY;
#pragma unroll kUnrolled
  for (int j = 0; j < kVectors; ++j) {
    float z[kEach];
    widen<kType>(vector(j), z);
#pragma unroll
    for (int i = 0; i < kEach; ++i) maximum = fmaxf(maximum, z[i]);
  }
  maximum = warp_max(maximum);
  const float origin = fmaxf(maximum, kLowest);
  float total = 0.0f, weighted = 0.0f, squared = 0.0f;
#pragma unroll kUnrolled
  for (int j = 0; j < kVectors; ++j) {
    float z[kEach];
    widen<kType>(vector(j), z);
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const float below = bounded(z[i] - origin), e = exponential(below);
      total += e, weighted = ptx::fma(e, below, weighted), squared = ptx::fma(e, e, squared);
    }
  }
  return {maximum, warp_sum(total), warp_sum(weighted), warp_sum(squared)};
}

// Adds `sums`, whose exps are of z' - sums.maximum, to sums whose exps are of z' - origin.
M3_DEVICE void join(Sums& into, float origin, const Sums& sums) {
  const float shift = bounded(sums.maximum - origin), factor = exponential(shift);
  into.total = ptx::fma(factor, sums.total, into.total);
  into.weighted = ptx::fma(factor, ptx::fma(sums.total, shift, sums.weighted), into.weighted);
  into.squared = ptx::fma(factor * factor, sums.squared, into.squared);
}

// One warp joins a row's units to its state: lane l adds units l, l + 32, ..., then the lanes are added.
M3_DEVICE void merge_statistics(const Statistics& a, int64_t row, int units) {
  const int lane = threadIdx.x % 32;
  const float4* part = (const float4*)a.workspace.part + row * units;
  const Sums old = {a.maximum[row], a.total[row], a.weighted ? a.weighted[row] : 0.0f,
                    a.squared ? a.squared[row] : 0.0f};
  float maximum = old.maximum;
#pragma unroll 1
  for (int unit = lane; unit < units; unit += 32) maximum = fmaxf(maximum, __ldcg(part + unit).x);
  maximum = warp_max(maximum);
  const float origin = fmaxf(maximum, kLowest);
  Sums sums = {maximum, 0.0f, 0.0f, 0.0f};
#pragma unroll 1
  for (int unit = lane; unit < units; unit += 32) {
    const float4 p = __ldcg(part + unit);
    join(sums, origin, {p.x, p.y, p.z, p.w});
  }
  sums = {maximum, warp_sum(sums.total), warp_sum(sums.weighted), warp_sum(sums.squared)};
  if (lane) return;
  join(sums, origin, old);
  a.maximum[row] = maximum, a.total[row] = sums.total;
  if (a.weighted) a.weighted[row] = sums.weighted;
  if (a.squared) a.squared[row] = sums.squared;
}

// Grid: rows * cut.shares, the shares of a row next to each other. A warp takes every kWarps-th of the block's
// cut.units units: reads the logits once, writes z' over them if there is a transform, and leaves four sums per unit in
// the workspace; the row's last block joins them to the state. The block then looks up z' at those ids that are among
// its columns. A unit is 4 KiB of fp32 in flight per warp; 20 KiB per processor would do to hide the memory's latency.
template <Type kType, bool kTransform>
__global__ void __launch_bounds__(kThreads) statistics_kernel(const Statistics a, const Cut cut, const bool aligned) {
  constexpr int kEach = kVector<kType>, kStep = 32 * kEach, kVectors = kUnit / kStep;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, units = (a.columns + kUnit - 1) / kUnit;
  const int64_t row = blockIdx.x / cut.shares;
  const int begin = blockIdx.x % cut.shares * cut.units, end = min(begin + cut.units, units);
  Stored<kType>* logits = (Stored<kType>*)a.logits.data + row * a.logits.stride;
  RowTransform to_z;
  if constexpr (kTransform) {
    const Transform& t = a.transform;
    to_z = {t.bias, t.logit_scale, t.softcap, t.softcap > 0.0f ? inverse(t.softcap) : 0.0f,
            t.inverse_temperature ? t.inverse_temperature[row] : 1.0f};
  }
  for (int unit = begin + warp; unit < end; unit += kWarps) {
    const int first = unit * kUnit + lane * kEach;
    Sums sums;
    if (aligned && (unit + 1) * kUnit <= a.columns) {
      uint4 raw[kVectors];
      read_whole<kType>(raw, logits, first);
      if constexpr (kTransform) {
#pragma unroll
        for (int j = 0; j < kVectors; ++j) {
          float z[kEach];
          widen<kType>(raw[j], z);
          transform<true>(z, to_z, first + kStep * j, a.columns);
          write_whole<kType>(logits, first + kStep * j, z);
          raw[j] = narrow<kType>(z);  // what is summed is what the gradient will see
        }
      }
      sums = sums_of<kType, kVectors>([&](int j) { return raw[j]; });
    } else {
      if constexpr (kTransform) {
#pragma unroll 1
        for (int column = first; column < first + kUnit; column += kStep) {
          float z[kEach];
          widen<kType>(read_part<kType>(logits, column, a.columns, aligned, 0.0f), z);
          transform<false>(z, to_z, column, a.columns);
          write_part<kType>(logits, column, a.columns, aligned, z);
        }
      }
      sums = sums_of<kType, 1>(
          [&](int j) { return read_part<kType>(logits, first + kStep * j, a.columns, aligned, -INFINITY); });
    }
    if (lane == 0)
      ((float4*)a.workspace.part)[row * units + unit] =
          make_float4(sums.maximum, sums.total, sums.weighted, sums.squared);
  }
  const bool last = last_of_row(a.workspace.counters, row, cut.shares);
  if (last && warp == 0) merge_statistics(a, row, units);
  for (int k = threadIdx.x; k < a.num_ids; k += kThreads) {
    const int64_t at = row * a.num_ids + k;
    const uint64_t column = (uint64_t)a.ids[at] - (uint64_t)a.first;
    if (column < (uint64_t)a.columns && (int)column / kUnit >= begin && (int)column / kUnit < end)
      a.picked[at] = value_of<kType>(logits[column]);
  }
}

// -- gradient ---------------------------------------------------------------------------------------------------------
// Which of the row's ids k, k + 1, ..., k + 31 lie among `count` columns from `first` (an index of the vocabulary) on:
// a bit each; `column` is that of this lane's id, from `first` on.
M3_DEVICE unsigned ids_among(const Gradient& a, int64_t row, int k, int64_t first, int count, int& column) {
  k += threadIdx.x % 32;
  const uint64_t distance = k < a.num_ids ? (uint64_t)a.ids[row * a.num_ids + k] - (uint64_t)first : ~uint64_t{0};
  column = (int)distance;
  return __ballot_sync(~0u, distance < (uint64_t)count);
}

M3_DEVICE bool has_id(const Gradient& a, int64_t row, int64_t first, int count) {
  int column;
  unsigned found = 0;
#pragma unroll 1
  for (int k = 0; k < a.num_ids; k += 32) found |= ids_among(a, row, k, first, count, column);
  return found;
}

// x + values[row, k] in the column of each id, in order of k; a lane has kEach neighbouring columns, the warp 32 *
// kEach from `first` on.
template <int kEach>
M3_DEVICE void add_at_ids(float (&x)[kEach], const Gradient& a, const float* values, int64_t row, int64_t first) {
#pragma unroll 1
  for (int k = 0; k < a.num_ids; k += 32) {
    int column;
    unsigned found = ids_among(a, row, k, first, 32 * kEach, column);
    for (; found; found &= found - 1) {
      const int at = __ffs((int)found) - 1, own = __shfl_sync(~0u, column, at) - (int)threadIdx.x % 32 * kEach;
      const float value = values[row * a.num_ids + k + at];
#pragma unroll
      for (int c = 0; c < kEach; ++c)
        if (c == own) x[c] += value;
    }
  }
}

// Grid: n * blocks, the blocks of a row next to each other. A warp owns one unit of row i of out: reads it from row
// rows[i] of the logits, writes the gradient, possibly over it. While the logits are on their way one look at the ids
// says whether any is in the unit. Nearly always none is, and the rest is the same few operations on every column; else
// the unit goes vector by vector, each id compared with its columns.
template <Type kType, Type kOut, bool kCapped>
__global__ void __launch_bounds__(kThreads) gradient_kernel(const Gradient a, const int blocks, const bool aligned) {
  constexpr int kEach = kVector<kType>, kStep = 32 * kEach, kVectors = kUnit / kStep;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t i = blockIdx.x / blocks;
  const int begin = (blockIdx.x % blocks * kWarps + warp) * kUnit;
  if (begin >= a.columns) return;
  const int64_t source = a.rows ? a.rows[i] : i;
  const bool exists = (uint64_t)source < (uint64_t)a.num_rows, whole = aligned && exists && begin + kUnit <= a.columns;
  const Stored<kType>* logits = (const Stored<kType>*)a.logits.data + (exists ? source : 0) * a.logits.stride;
  Stored<kOut>* out = (Stored<kOut>*)a.out.data + i * a.out.stride;
  uint4 raw[kVectors];
  if (whole) read_whole<kType>(raw, logits, begin + lane * kEach);

  const float lse = a.lse[i], lse_low = a.lse_low[i], base = a.base[i];
  const float slope = a.slope ? a.slope[i] : 0.0f, square = a.square ? a.square[i] : 0.0f;
  const Chain chain = chain_of(a.transform, i);
  const auto times_p = [&](float& g, float z) {
    const float q = bounded((z - lse) - lse_low), p = exponential(q);
    g = p * ptx::fma(square, p, ptx::fma(slope, q, g));
  };
  const bool hit = has_id(a, i, a.first + begin, kUnit);
  if (whole && !hit) {
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      float z[kEach], g[kEach];
      widen<kType>(raw[j], z);
#pragma unroll
      for (int c = 0; c < kEach; ++c) {
        g[c] = base;
        times_p(g[c], z[c]);
        g[c] = chained<kCapped>(g[c], z[c], chain);
      }
      write_whole<kOut>(out, begin + lane * kEach + kStep * j, g);
    }
    return;
  }
#pragma unroll 1
  for (int first = begin; first < begin + kUnit; first += kStep) {
    const int column = first + lane * kEach;
    float z[kEach], g[kEach];
    widen<kType>(read_part<kType>(logits, column, exists ? a.columns : 0, aligned, NAN), z);
#pragma unroll
    for (int c = 0; c < kEach; ++c) g[c] = base;
    if (hit) add_at_ids(g, a, a.picked, i, a.first + first);
#pragma unroll
    for (int c = 0; c < kEach; ++c) times_p(g[c], z[c]);
    if (hit) add_at_ids(g, a, a.complement, i, a.first + first);
#pragma unroll
    for (int c = 0; c < kEach; ++c) g[c] = chained<kCapped>(g[c], z[c], chain);
    write_part<kOut>(out, column, a.columns, aligned, g);
  }
}

}  // namespace

void statistics(const Statistics& a, void* stream) {
  if (!a.num_rows || !a.columns) return;
  const Transform& t = a.transform;
  const bool transforms = t.bias || t.logit_scale != 1.0f || t.softcap > 0.0f || t.inverse_temperature;
  const Cut cut = cut_of(a.workspace, a.num_rows, a.columns);
  const Launch how{.grid = dim3(a.num_rows * cut.shares),
                   .block = dim3(kThreads),
                   .shared_bytes = 16,
                   .stream = (cudaStream_t)stream};
  with_type(a.logits.type, [&](auto type) {
    launch("statistics", transforms ? statistics_kernel<type(), true> : statistics_kernel<type(), false>, how, a, cut,
           aligned(a.logits, a.num_rows) && (uintptr_t)t.bias % 16 == 0);
  });
}

void gradient(const Gradient& a, void* stream) {
  const int blocks = (units_of(a.columns) + kWarps - 1) / kWarps;
  const Launch how{
      .grid = dim3(a.out_rows * blocks), .block = dim3(kThreads), .shared_bytes = 0, .stream = (cudaStream_t)stream};
  const bool whole = aligned(a.logits, a.num_rows) && aligned(a.out, a.out_rows);
  with_types(a.logits.type, a.out.type, [&](auto type, auto out) {
    launch("gradient",
           a.transform.softcap > 0.0f ? gradient_kernel<type(), out(), true> : gradient_kernel<type(), out(), false>,
           how, a, blocks, whole);
  });
}

}  // namespace m3::policy_loss
