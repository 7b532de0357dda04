// The CPU tile kernels, told once over a SIMD trait S. Included by each tiles_cpu_<isa>.cpp inside an anonymous
// namespace.
//
// A row of a tile is a few kilobytes that a matrix product has just left in L2: the first pass (transform, maximum)
// brings it to L1, the second (exp, sums) reads it there and fetches the next row. Sums run in kChains vectors over a
// block of kBlockVectors, and from block to block in double, so a row of any length adds about as exactly as one block;
// their order depends on the row's columns alone, neither on other rows nor on threads.
//
// A trait offers F (a vector of kLanes floats), its loads, stores and arithmetic, kFused (fma rounds once), and
//   load_part, store_part      the first `count` lanes; the others read as `fill` and are not written
//   min, max(a, b)             b where one of them is nan
//   scaled_exp(p, t, n, x)     p * 2^n, 0 where x < kSmallest; t holds n + 127 in its low bits
//   power(t)                   2^n
//   split(u, k)                u = m * 2^k with m in [sqrt(1/2), sqrt(2)), for normal u > 0
//   zero_where_zero(p, a)      a, 0 where p is 0

#define M3_INLINE static inline __attribute__((always_inline))

constexpr int kChains = 4;
constexpr int64_t kBlockVectors = 64;
constexpr float kLowest = -__builtin_huge_valf();
constexpr float kSmallest = -87.3365f;       // exp of less is subnormal: it becomes 0
constexpr float kRound = 12582912.0f + 127;  // 1.5 * 2^23: adding it rounds to an integer, kept in the low bits
constexpr float kLog2E = 1.44269504f, kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;

// x = n ln 2 + r, |r| <= ln 2 / 2. Cody and Waite: kLn2High has so few bits that n * kLn2High is exact.
template <class S>
M3_INLINE typename S::F reduce(typename S::F x, typename S::F& t, typename S::F& n) {
  t = S::fma(x, S::splat(kLog2E), S::splat(kRound));
  n = S::sub(t, S::splat(kRound));
  return S::fma(n, S::splat(-kLn2Low), S::fma(n, S::splat(-kLn2High), x));
}

// exp(x) within 1 ulp for x <= 88; 0 below kSmallest and for -inf; nan for nan. Minimax polynomial of degree 6.
template <class S>
M3_INLINE typename S::F exponential(typename S::F x) {
  typename S::F t, n;
  const typename S::F r = reduce<S>(x, t, n);
  typename S::F p = S::fma(S::splat(1.38436072e-3f), r, S::splat(8.37419555e-3f));
  p = S::fma(p, r, S::splat(4.16680053e-2f));
  p = S::fma(p, r, S::splat(0.166664302f));
  p = S::fma(p, r, S::splat(0.49999994f));
  p = S::fma(p, r, S::splat(1.0f));
  p = S::fma(p, r, S::splat(1.0f));
  return S::scaled_exp(p, t, n, x);
}

// The same for any x: inf from 89 on.
template <class S>
M3_INLINE typename S::F bounded_exponential(typename S::F x) {
  return exponential<S>(S::min(S::splat(89.0f), x));
}

// exp(x) - 1 for x <= 88, with a small relative error.
template <class S>
M3_INLINE typename S::F exponential_less_one(typename S::F x) {
  typename S::F t, n;
  x = S::max(S::splat(-60.0f), x);
  const typename S::F r = reduce<S>(x, t, n);
  typename S::F p = S::fma(S::splat(1.38825167e-3f), r, S::splat(8.36654752e-3f));
  p = S::fma(p, r, S::splat(4.16672006e-2f));
  p = S::fma(p, r, S::splat(0.166665435f));
  p = S::fma(p, r, S::splat(0.49999997f));
  p = S::fma(S::mul(p, r), r, r);
  const typename S::F s = S::power(t);
  return S::fma(s, p, S::sub(s, S::splat(1.0f)));
}

// log(1 + y) for y > -1, with a small relative error; 1 + y is at least `floor`. Cephes' polynomial.
template <class S>
M3_INLINE typename S::F log_of_one_plus(typename S::F y, typename S::F floor) {
  const typename S::F one = S::splat(1.0f), u = S::max(floor, S::add(one, y));
  typename S::F k;
  const typename S::F m = S::split(u, k);
  const typename S::F f =
      S::add(S::sub(m, one), S::sub(y, S::sub(u, one)));  // what 1 + y rounded away matters at k = 0
  typename S::F p = S::fma(S::splat(7.0376836292e-2f), f, S::splat(-1.1514610310e-1f));
  p = S::fma(p, f, S::splat(1.1676998740e-1f));
  p = S::fma(p, f, S::splat(-1.2420140846e-1f));
  p = S::fma(p, f, S::splat(1.4249322787e-1f));
  p = S::fma(p, f, S::splat(-1.6668057665e-1f));
  p = S::fma(p, f, S::splat(2.0000714765e-1f));
  p = S::fma(p, f, S::splat(-2.4999993993e-1f));
  p = S::fma(p, f, S::splat(3.3333331174e-1f));
  const typename S::F square = S::mul(f, f);
  p = S::mul(S::mul(p, f), square);
  p = S::fma(k, S::splat(kLn2Low), S::fma(square, S::splat(-0.5f), p));
  return S::fma(k, S::splat(kLn2High), S::add(f, p));
}

// softcap * tanh(z / softcap): tanh(a) = -e / (2 + e), e = exp(-2a) - 1, a >= 0. The quotient is a product with the
// reciprocal and one correction, as good as a division.
template <class S>
M3_INLINE typename S::F cap(typename S::F z, float softcap) {
  const typename S::F half = S::splat(0.5f * softcap), inverse = S::splat(1.0f / (0.5f * softcap));
  const typename S::F a = S::min(S::splat(16.0f * softcap), S::abs(z)), zero = S::splat(0.0f);
  typename S::F quotient;
  if constexpr (S::kFused) {
    quotient = S::mul(a, inverse);
    quotient = S::fma(S::fma(S::sub(zero, quotient), half, a), inverse, quotient);
  } else {
    quotient = S::div(a, half);
  }
  const typename S::F e = exponential_less_one<S>(S::sub(zero, quotient));
  return S::mul(S::with_sign(S::div(S::sub(zero, e), S::add(S::splat(2.0f), e)), z), S::splat(softcap));
}

// Whether a vector of a row is whole or the last, shorter one.
struct Whole {
  static constexpr bool kPart = false;
};
struct Part {
  static constexpr bool kPart = true;
};

template <class S, class Extent>
M3_INLINE typename S::F read(Extent, const float* p, int count, float fill) {
  if constexpr (Extent::kPart) return S::load_part(p, count, fill);
  return S::load(p);
}

template <class S, class Extent>
M3_INLINE void write(Extent, float* p, int count, typename S::F a) {
  if constexpr (Extent::kPart)
    S::store_part(p, count, a);
  else
    S::store(p, a);
}

// visit(extent, column, count, chain) for every vector of columns start .. stop - 1.
template <class S, class Visit>
M3_INLINE void walk(int64_t start, int64_t stop, Visit visit) {
  int64_t j = start;
  for (; j + kChains * S::kLanes <= stop; j += kChains * S::kLanes) {
    visit(Whole(), j, S::kLanes, 0);
    visit(Whole(), j + S::kLanes, S::kLanes, 1);
    visit(Whole(), j + 2 * S::kLanes, S::kLanes, 2);
    visit(Whole(), j + 3 * S::kLanes, S::kLanes, 3);
  }
  for (; j + S::kLanes <= stop; j += S::kLanes) visit(Whole(), j, S::kLanes, 0);
  if (j < stop) visit(Part(), j, int(stop - j), 1);
}

// totals[i] = sum over the row of what visit(extent, column, count, sums) adds to sums[i].
template <class S, int kSums, class Visit>
M3_INLINE void sum_row(int64_t columns, double (&totals)[kSums], Visit visit) {
  constexpr int64_t kBlock = kBlockVectors * S::kLanes;
  for (int i = 0; i < kSums; i++) totals[i] = 0.0;
  for (int64_t start = 0; start < columns; start += kBlock) {
    typename S::F sums[kChains][kSums];
    for (auto& chain : sums)
      for (auto& sum : chain) sum = S::splat(0.0f);
    walk<S>(start, start + kBlock < columns ? start + kBlock : columns,
            [&](auto extent, int64_t j, int count, int chain)
                __attribute__((always_inline)) { visit(extent, j, count, sums[chain]); });
    for (int i = 0; i < kSums; i++)
      totals[i] += (double)S::sum(S::add(S::add(sums[0][i], sums[1][i]), S::add(sums[2][i], sums[3][i])));
  }
}

// -- statistics -------------------------------------------------------------------------------------------------------
template <class S>
M3_INLINE float maximum_of(const float* row, int64_t columns) {
  typename S::F most[kChains];
  for (auto& chain : most) chain = S::splat(kLowest);
  walk<S>(0, columns, [&](auto extent, int64_t j, int count, int chain) __attribute__((always_inline)) {
    most[chain] = S::max(read<S>(extent, row + j, count, kLowest), most[chain]);
  });
  return S::top(S::max(S::max(most[0], most[1]), S::max(most[2], most[3])));
}

// z -> z' in place; returns the maximum.
template <class S, bool kBias, bool kSoftcap>
M3_INLINE float transform(float* row, int64_t columns, const Transform& t, float inverse_temperature) {
  const typename S::F scale = S::splat(t.logit_scale), inverse = S::splat(inverse_temperature);
  typename S::F most[kChains];
  for (auto& chain : most) chain = S::splat(kLowest);
  walk<S>(0, columns, [&](auto extent, int64_t j, int count, int chain) __attribute__((always_inline)) {
    typename S::F z = read<S>(extent, row + j, count, 0.0f);
    if constexpr (kBias) z = S::add(z, read<S>(extent, t.bias + j, count, 0.0f));
    z = S::mul(z, scale);
    if constexpr (kSoftcap) z = cap<S>(z, t.softcap);
    z = S::mul(z, inverse);
    write<S>(extent, row + j, count, z);
    if constexpr (decltype(extent)::kPart) z = S::load_part(row + j, count, kLowest);
    most[chain] = S::max(z, most[chain]);
  });
  return S::top(S::max(S::max(most[0], most[1]), S::max(most[2], most[3])));
}

// {sum exp(z' - shift), sum exp(z' - shift) (z' - shift), sum exp(2 (z' - shift))}; 0 for what is not asked.
template <class S, bool kWeighted, bool kSquared>
M3_INLINE void exponential_sums(const float* row, const float* next, int64_t columns, float shift,
                                double (&totals)[3]) {
  const typename S::F shifts = S::splat(shift);
  sum_row<S>(columns, totals,
             [&](auto extent, int64_t j, int count, typename S::F* sums) __attribute__((always_inline)) {
               __builtin_prefetch(next + j);
               const typename S::F z = S::sub(read<S>(extent, row + j, count, kLowest), shifts), e = exponential<S>(z);
               sums[0] = S::add(sums[0], e);
               if constexpr (kWeighted) sums[1] = S::fma(e, S::zero_where_zero(e, z), sums[1]);
               if constexpr (kSquared) sums[2] = S::fma(e, e, sums[2]);
             });
}

template <class S>
void statistics(const Statistics& a, int64_t i) {
  float* row = a.logits + i * a.row_stride;
  const Transform& t = a.transform;
  const float inverse = t.inverse_temperature ? t.inverse_temperature[i] : 1.0f;
  float most;
  if (t.softcap > 0.0f)
    most = t.bias ? transform<S, true, true>(row, a.columns, t, inverse)
                  : transform<S, false, true>(row, a.columns, t, inverse);
  else if (t.bias)
    most = transform<S, true, false>(row, a.columns, t, inverse);
  else if (t.logit_scale != 1.0f || inverse != 1.0f)
    most = transform<S, false, false>(row, a.columns, t, inverse);
  else
    most = maximum_of<S>(row, a.columns);

  const float old = a.maximum[i], maximum = most > old ? most : old;
  const float shift = maximum == kLowest ? 0.0f : maximum;
  const float* next = i + 1 < a.num_rows ? row + a.row_stride : row;
  double totals[3];
  if (a.weighted && a.squared)
    exponential_sums<S, true, true>(row, next, a.columns, shift, totals);
  else if (a.weighted)
    exponential_sums<S, true, false>(row, next, a.columns, shift, totals);
  else if (a.squared)
    exponential_sums<S, false, true>(row, next, a.columns, shift, totals);
  else
    exponential_sums<S, false, false>(row, next, a.columns, shift, totals);

  const double down = __builtin_isinf(old) ? 0.0 : (double)old - (double)maximum;  // 0 before the first tile
  const double factor = down == 0.0 ? 1.0 : __builtin_exp(down), total = a.total[i];
  if (a.weighted) a.weighted[i] = (float)((a.weighted[i] + total * down) * factor + totals[1]);
  if (a.squared) a.squared[i] = (float)(a.squared[i] * (factor * factor) + totals[2]);
  a.total[i] = (float)(total * factor + totals[0]);
  a.maximum[i] = maximum;
  for (int64_t k = i * a.num_ids; k < (i + 1) * a.num_ids; k++)
    if (a.ids[k] >= a.first && a.ids[k] - a.first < a.columns) a.picked[k] = row[a.ids[k] - a.first];
}

// -- gradient ---------------------------------------------------------------------------------------------------------
// dz'/dz = chain * (1 - w^2), w = z' * inverse_cap: the derivative of tanh from its value. No softcap: chain.
struct Slope {
  float chain, inverse_cap;
  bool capped;
};

M3_INLINE Slope slope_of(const Transform& t, int64_t i) {
  const float inverse = t.inverse_temperature ? t.inverse_temperature[i] : 1.0f;
  const bool capped = t.softcap > 0.0f;
  return {inverse * t.logit_scale, capped ? 1.0f / (inverse * t.softcap) : 0.0f, capped};
}

template <class S>
M3_INLINE typename S::F uncap(typename S::F g, typename S::F z, typename S::F inverse_cap) {
  const typename S::F w = S::mul(z, inverse_cap), one = S::splat(1.0f);
  return S::mul(g, S::mul(S::sub(one, w), S::add(one, w)));
}

// log p of z'. The two parts of log sum exp go one after the other: the first difference is all but exact.
template <class S>
M3_INLINE typename S::F log_probability(typename S::F z, typename S::F lse, typename S::F lse_low) {
  return S::sub(S::sub(z, lse), lse_low);
}

// What all columns of a row share; slope and square hold the chain of dz'/dz.
template <class S>
struct RowGradient {
  typename S::F lse, lse_low, slope, square, inverse_cap;
};

template <class S, bool kPolynomial, bool kCapped>
M3_INLINE typename S::F gradient_of(const RowGradient<S>& r, typename S::F z, typename S::F base) {
  const typename S::F q = log_probability<S>(z, r.lse, r.lse_low), p = bounded_exponential<S>(q);
  typename S::F g = base;
  if constexpr (kPolynomial) g = S::fma(r.square, p, S::fma(r.slope, S::zero_where_zero(p, q), g));
  g = S::mul(p, g);
  if constexpr (kCapped) g = uncap<S>(g, z, r.inverse_cap);
  return g;
}

// The columns of ids are computed once more from their z', which scratch keeps (K), with what `picked` adds up to
// there (scratch + K): where base + picked is 0, so is the gradient that `complement` is added to. Ids may repeat.
template <class S, bool kPolynomial, bool kCapped>
M3_INLINE void gradient_row(const Gradient& a, int64_t i, const float* row, const float* next, float* scratch) {
  const Slope to_z = slope_of(a.transform, i);
  const float own_base = a.base[i], slope = a.slope ? a.slope[i] * to_z.chain : 0.0f,
              square = a.square ? a.square[i] * to_z.chain : 0.0f;
  const RowGradient<S> r{S::splat(a.lse[i]), S::splat(a.lse_low[i]), S::splat(slope), S::splat(square),
                         S::splat(to_z.inverse_cap)};
  const typename S::F base = S::splat(own_base * to_z.chain), chain = S::splat(to_z.chain);
  const int64_t* ids = a.ids + i * a.num_ids;
  const float *picked = a.picked + i * a.num_ids, *complement = a.complement + i * a.num_ids;
  float *out = a.out + i * a.out_stride, *kept = scratch, *hits = scratch + a.num_ids;
  const auto each_id = [&](auto visit) __attribute__((always_inline)) {
    for (int64_t k = 0; k < a.num_ids; k++)
      if (ids[k] >= a.first && ids[k] - a.first < a.columns) visit(k, ids[k] - a.first);
  };
  for (int64_t k = 0; k < 2 * a.num_ids; k++) scratch[k] = 0.0f;
  each_id([&](int64_t k, int64_t j) { kept[k] = row[j]; });  // before out, which may be row, is written

  walk<S>(0, a.columns, [&](auto extent, int64_t j, int count, int) __attribute__((always_inline)) {
    __builtin_prefetch(next + j);
    write<S>(extent, out + j, count,
             gradient_of<S, kPolynomial, kCapped>(r, read<S>(extent, row + j, count, 0.0f), base));
  });

  each_id([&](int64_t, int64_t j) { out[j] = 0.0f; });
  each_id([&](int64_t k, int64_t j) { out[j] += picked[k]; });
  each_id([&](int64_t k, int64_t j) { hits[k] = out[j]; });
  walk<S>(0, a.num_ids, [&](auto extent, int64_t k, int count, int) __attribute__((always_inline)) {
    const typename S::F z = read<S>(extent, kept + k, count, 0.0f);
    const typename S::F sum = S::mul(S::add(S::splat(own_base), read<S>(extent, hits + k, count, 0.0f)), chain);
    typename S::F rest = S::mul(read<S>(extent, complement + k, count, 0.0f), chain);
    if constexpr (kCapped) rest = uncap<S>(rest, z, r.inverse_cap);
    write<S>(extent, hits + k, count, gradient_of<S, kPolynomial, kCapped>(r, z, sum));
    write<S>(extent, kept + k, count, rest);
  });
  each_id([&](int64_t k, int64_t j) { out[j] = hits[k]; });
  each_id([&](int64_t k, int64_t j) { out[j] += kept[k]; });
}

template <class S>
void gradient(const Gradient& a, int64_t i, float* scratch) {
  const float* row = a.logits + (a.rows ? a.rows[i] : i) * a.row_stride;
  const int64_t after = i + 1 < a.num_rows ? i + 1 : i;
  const float* next = a.logits + (a.rows ? a.rows[after] : after) * a.row_stride;
  const bool capped = a.transform.softcap > 0.0f;
  if (a.slope || a.square) {
    if (capped)
      gradient_row<S, true, true>(a, i, row, next, scratch);
    else
      gradient_row<S, true, false>(a, i, row, next, scratch);
  } else if (capped) {
    gradient_row<S, false, true>(a, i, row, next, scratch);
  } else {
    gradient_row<S, false, false>(a, i, row, next, scratch);
  }
}

// -- divergence -------------------------------------------------------------------------------------------------------
// log p - log m and log t - log m of the mixture m = beta t + rest p, from d = log t - log p:
//   log m - log p = log(1 + beta (exp(d) - 1))      up to a turn of d,
//   log m - log t = log(1 + rest (exp(-d) - 1))     beyond it; the other difference is d away.
// The turn (2 for small beta, -2 for large) lies where t begins to rule the mixture, so little cancels on either side.
template <class S>
M3_INLINE void to_mixture(typename S::F log_p, typename S::F log_t, float beta, float rest, typename S::F& p_to_m,
                          typename S::F& t_to_m) {
  const typename S::F zero = S::splat(0.0f), turn = S::splat(beta <= 0.5f ? 2.0f : -2.0f);
  const typename S::F d = S::sub(log_t, log_p), away = S::sub(zero, d);
  const typename S::F e = exponential_less_one<S>(S::where_greater(d, turn, away, d));
  const typename S::F share = S::where_greater(d, turn, S::splat(rest), S::splat(beta));
  const typename S::F log_sum = log_of_one_plus<S>(S::mul(share, e), S::splat(beta < rest ? beta : rest));
  p_to_m = S::sub(S::where_greater(d, turn, away, zero), log_sum);
  t_to_m = S::sub(S::where_greater(d, turn, zero, d), log_sum);
}

template <class S, Kind kKind>
M3_INLINE void divergence_row(const Divergence& a, const float* student, const float* teacher, int64_t i) {
  const typename S::F student_lse = S::splat(a.student_lse[i]), student_low = S::splat(a.student_low[i]);
  const typename S::F teacher_lse = S::splat(a.teacher_lse[i]), teacher_low = S::splat(a.teacher_low[i]);
  double totals[2];  // from t, from p
  sum_row<S>(a.columns, totals,
             [&](auto extent, int64_t j, int count, typename S::F* sums) __attribute__((always_inline)) {
               const typename S::F log_p =
                   log_probability<S>(read<S>(extent, student + j, count, kLowest), student_lse, student_low);
               const typename S::F log_t =
                   log_probability<S>(read<S>(extent, teacher + j, count, kLowest), teacher_lse, teacher_low);
               typename S::F p_to_m, t_to_m;
               if constexpr (kKind == Kind::kJs)
                 to_mixture<S>(log_p, log_t, a.beta, a.rest, p_to_m, t_to_m);
               else
                 p_to_m = S::sub(log_p, log_t), t_to_m = S::sub(log_t, log_p);
               if constexpr (kKind != Kind::kReverse) {
                 const typename S::F t = bounded_exponential<S>(log_t);
                 sums[0] = S::fma(t, S::zero_where_zero(t, t_to_m), sums[0]);
               }
               if constexpr (kKind != Kind::kForward) {
                 const typename S::F p = bounded_exponential<S>(log_p);
                 sums[1] = S::fma(p, S::zero_where_zero(p, p_to_m), sums[1]);
               }
             });
  constexpr bool js = kKind == Kind::kJs;
  const double share = js ? a.rest * totals[1] : totals[1];
  a.value[i] = (float)(a.value[i] + ((js ? a.beta * totals[0] : totals[0]) + share));
  if constexpr (kKind != Kind::kForward) a.center[i] = (float)(a.center[i] + share);
}

template <class S>
void divergence(const Divergence& a, int64_t i) {
  const float *student = a.student + i * a.student_stride, *teacher = a.teacher + i * a.teacher_stride;
  if (a.kind == Kind::kForward)
    divergence_row<S, Kind::kForward>(a, student, teacher, i);
  else if (a.kind == Kind::kReverse)
    divergence_row<S, Kind::kReverse>(a, student, teacher, i);
  else
    divergence_row<S, Kind::kJs>(a, student, teacher, i);
}

template <class S, Kind kKind, bool kCapped>
M3_INLINE void divergence_gradient_row(const Divergence& a, const float* student, const float* teacher, int64_t i) {
  const Slope to_z = slope_of(a.transform, i);
  const typename S::F student_lse = S::splat(a.student_lse[i]), student_low = S::splat(a.student_low[i]);
  const typename S::F teacher_lse = S::splat(a.teacher_lse[i]), teacher_low = S::splat(a.teacher_low[i]);
  const typename S::F weight = S::splat(a.weight[i] * to_z.chain), center = S::splat(a.center[i]);
  float* out = a.out + i * a.out_stride;
  walk<S>(0, a.columns, [&](auto extent, int64_t j, int count, int) __attribute__((always_inline)) {
    const typename S::F z = read<S>(extent, student + j, count, 0.0f);
    const typename S::F log_p = log_probability<S>(z, student_lse, student_low);
    const typename S::F log_t = log_probability<S>(read<S>(extent, teacher + j, count, 0.0f), teacher_lse, teacher_low);
    const typename S::F p = bounded_exponential<S>(log_p);
    typename S::F g;
    if constexpr (kKind == Kind::kForward) {
      g = S::sub(p, bounded_exponential<S>(log_t));
    } else if constexpr (kKind == Kind::kReverse) {
      g = S::mul(p, S::zero_where_zero(p, S::sub(S::sub(log_p, log_t), center)));
    } else {
      typename S::F p_to_m, t_to_m;
      to_mixture<S>(log_p, log_t, a.beta, a.rest, p_to_m, t_to_m);
      g = S::mul(p, S::zero_where_zero(p, S::sub(S::mul(S::splat(a.rest), p_to_m), center)));
    }
    g = S::mul(g, weight);
    if constexpr (kCapped) g = uncap<S>(g, z, S::splat(to_z.inverse_cap));
    write<S>(extent, out + j, count, g);
  });
}

template <class S, Kind kKind>
M3_INLINE void divergence_gradient_of(const Divergence& a, int64_t i) {
  const int64_t r = a.rows ? a.rows[i] : i;
  const float *student = a.student + r * a.student_stride, *teacher = a.teacher + r * a.teacher_stride;
  if (a.transform.softcap > 0.0f)
    divergence_gradient_row<S, kKind, true>(a, student, teacher, i);
  else
    divergence_gradient_row<S, kKind, false>(a, student, teacher, i);
}

template <class S>
void divergence_gradient(const Divergence& a, int64_t i) {
  if (a.kind == Kind::kForward)
    divergence_gradient_of<S, Kind::kForward>(a, i);
  else if (a.kind == Kind::kReverse)
    divergence_gradient_of<S, Kind::kReverse>(a, i);
  else
    divergence_gradient_of<S, Kind::kJs>(a, i);
}
