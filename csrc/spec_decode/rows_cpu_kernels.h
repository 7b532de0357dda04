// The CPU kernels of rows of logits, told once over a SIMD trait S. Included by each rows_cpu_<isa>.cpp inside an
// anonymous namespace.
//
// The first pass over a row takes the raw maximum of each group, one operation a vector; whatever looks for large
// values afterwards reads only the groups that can hold them. What lies behind the row's end is read from a padded copy
// of its last group. Weights are added in kChains vectors over a block and from block to block in double, in an order
// that depends on the row's size alone.
//
// A trait offers F (a vector of kLanes floats) and U (as many 32-bit words), loads, stores and arithmetic, and
//   load(const float*), load(const Bf16*), load(const F16*)
//   min, max(a, b)            b where one of them is nan
//   where_greater(a, b, yes, no), where_at_least(a, b, yes)   no, or 0, where a comparison with nan is false
//   add_where_at_least(sum, a, b, more)   sum + more where a >= b, else sum
//   at_least(a, b)            a bit per lane
//   allow(a, bits)            -inf where the lane's bit is 0
//   scaled_exp(p, t, n, x)    p * 2^n, 0 where x < kSmallest; t holds n + 127 in its low bits
//   split(u, k)               u = m * 2^k with m in [sqrt(1/2), sqrt(2)), for normal u > 0
//   multiply(a, m, high, low) 64-bit products of words
//   interleave(words)         words[i] = word i of the counters in lane order -> words of consecutive tokens
//   keep(mask, a, first, out, ids)  stores the lanes whose bit is set, and their numbers; writes at most kLanes

#define M3_INLINE static inline __attribute__((always_inline))

constexpr int kChains = 4;
constexpr float kSmallest = -87.3365f;       // exp of less is subnormal: it becomes 0
constexpr float kRound = 12582912.0f + 127;  // 1.5 * 2^23: adding it rounds to an integer, kept in the low bits
constexpr float kLog2E = 1.44269504f, kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;

// -- functions --------------------------------------------------------------------------------------------------------
// exp(x) within 1 ulp for x <= 88; 0 below kSmallest. x = n ln 2 + r, |r| <= ln 2 / 2 (Cody and Waite), and a minimax
// polynomial of degree 6.
template <class S>
M3_INLINE typename S::F exponential(typename S::F x) {
  const typename S::F t = S::fma(x, S::splat(kLog2E), S::splat(kRound)), n = S::sub(t, S::splat(kRound));
  const typename S::F r = S::fma(n, S::splat(-kLn2Low), S::fma(n, S::splat(-kLn2High), x));
  typename S::F p = S::fma(S::splat(1.38436072e-3f), r, S::splat(8.37419555e-3f));
  p = S::fma(p, r, S::splat(4.16680053e-2f));
  p = S::fma(p, r, S::splat(0.166664302f));
  p = S::fma(p, r, S::splat(0.49999994f));
  p = S::fma(p, r, S::splat(1.0f));
  p = S::fma(p, r, S::splat(1.0f));
  return S::scaled_exp(p, t, n, x);
}

// log(u), u = m * 2^k, m = 1 + f. Cephes' polynomial.
template <class S>
M3_INLINE typename S::F logarithm(typename S::F f, typename S::F k) {
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

// -log E of words >= kSmall: u = (word + 1/2) / 2^32, E = -log(1 - u). 1 - u comes from the word itself, not from u.
template <class S>
M3_INLINE typename S::F gumbel_of(typename S::U word) {
  const typename S::F one = S::splat(1.0f), scale = S::splat(0x1p-32f), byte = S::splat(256.0f);
  const typename S::F high = S::high_24(word), low = S::low_8(word);
  const typename S::F u = S::mul(S::fma(high, byte, S::add(low, S::splat(0.5f))), scale);
  typename S::F rest = S::mul(S::fma(S::sub(S::splat(16777215.0f), high), byte, S::sub(S::splat(255.5f), low)), scale);
  rest = S::max(S::splat(0x1p-24f), rest);
  typename S::F k;
  typename S::F m = S::split(rest, k);
  // Of 1 - u near 1 the part that rounding took away matters; behind the clip it must not come back.
  const typename S::F lost = S::sub(S::sub(one, rest), u);
  m = S::add(S::sub(m, one), S::where_greater(rest, S::splat(0.70710678f), lost, S::splat(0.0f)));
  const typename S::F e = S::sub(S::splat(0.0f), logarithm<S>(m, k));
  m = S::split(e, k);
  return S::sub(S::splat(0.0f), logarithm<S>(S::sub(m, one), k));
}

template <class S>
M3_INLINE typename S::F clean_of(typename S::F a) {
  const typename S::F nothing = S::splat(kNothing);
  return S::where_greater(a, nothing, S::min(S::splat(kClip), S::max(S::splat(-kClip), a)), nothing);
}

// -- rows -------------------------------------------------------------------------------------------------------------
struct Bf16 {
  uint16_t word;
};
struct F16 {
  uint16_t word;
};

M3_INLINE float nothing(float) { return kNothing; }
M3_INLINE Bf16 nothing(Bf16) { return {0xFF80}; }
M3_INLINE F16 nothing(F16) { return {0xFC00}; }

// Whether weights may be taken of raw logits: where the maximum is far from the clips and the temperature is not
// immense, what clean_of changes has weight 0 (nan and -inf do in any case).
struct Raw {};
struct Clean {};

template <class Visit>
M3_INLINE void with_values(float maximum, float inverse, Visit visit) {
  if (maximum > -0.1f * kClip && maximum < 0.1f * kClip && inverse > 1e-20f)
    visit(Raw());
  else
    visit(Clean());
}

// A row as groups. The last one, if it is not whole, is a copy filled up with -inf.
template <class S, class Element, bool kMasked>
struct Source {
  using F = typename S::F;
  static constexpr int kVectors = kGroup / S::kLanes;

  const Element* logits;
  const uint32_t* allowed;
  int64_t whole, groups;
  Element last[kGroup];
  uint32_t last_allowed[kGroup / 32];

  __attribute__((always_inline)) explicit Source(const Row& row)
      : logits((const Element*)row.logits), allowed(row.allowed), whole(row.size / kGroup) {
    const int64_t rest = row.size % kGroup;
    groups = whole + (rest > 0);
    if (!rest) return;
    __builtin_memcpy(last, logits + whole * kGroup, rest * sizeof(Element));
    for (int64_t i = rest; i < kGroup; i++) last[i] = nothing(Element{});
    if constexpr (kMasked) {
      for (int64_t i = 0; i < kGroup / 32; i++)
        last_allowed[i] = 32 * i < rest ? allowed[whole * (kGroup / 32) + i] : 0;
    }
  }

  struct Group {
    const Element* logits;
    const uint32_t* allowed;

    __attribute__((always_inline)) F raw(int i) const {
      const F a = S::load(logits + i * S::kLanes);
      if constexpr (kMasked) return S::allow(a, allowed[i * S::kLanes / 32] >> (i * S::kLanes % 32));
      return a;
    }
    __attribute__((always_inline)) F z(int i) const { return clean_of<S>(raw(i)); }
    __attribute__((always_inline)) F get(Raw, int i) const { return raw(i); }
    __attribute__((always_inline)) F get(Clean, int i) const { return z(i); }
  };

  __attribute__((always_inline)) Group group(int64_t g) const {
    if (g == whole) return {last, last_allowed};
    return {logits + g * kGroup, kMasked ? allowed + g * (kGroup / 32) : nullptr};
  }
};

// visit(source) with the source of the row's type.
template <class S, class Visit>
M3_INLINE void with_source(const Row& row, Visit visit) {
  switch (row.type) {
    case Type::kF32:
      if (row.allowed)
        visit(Source<S, float, true>(row));
      else
        visit(Source<S, float, false>(row));
      break;
    case Type::kBf16:
      if (row.allowed)
        visit(Source<S, Bf16, true>(row));
      else
        visit(Source<S, Bf16, false>(row));
      break;
    case Type::kF16:
      if (row.allowed)
        visit(Source<S, F16, true>(row));
      else
        visit(Source<S, F16, false>(row));
      break;
  }
}

// Weights, with the constants of Weight in registers.
template <class S, bool kResidual>
struct Measure {
  typename S::F maximum, inverse, inverse_low, threshold, inverse_total;

  __attribute__((always_inline)) explicit Measure(const Weight& w)
      : maximum(S::splat(w.maximum)),
        inverse(S::splat(w.inverse)),
        inverse_low(S::splat(w.inverse_low)),
        threshold(S::splat(w.threshold)),
        inverse_total(S::splat(w.inverse_total)) {}

  // (z - maximum) / temperature; at least -1000, also for -inf and nan.
  __attribute__((always_inline)) typename S::F exponent(typename S::F z) const {
    const typename S::F d = S::sub(z, maximum);
    return S::max(S::fma(d, inverse, S::mul(d, inverse_low)), S::splat(-1000.0f));
  }
  __attribute__((always_inline)) typename S::F of(typename S::F z, const float* draft) const {
    const typename S::F w = S::where_at_least(z, threshold, exponential<S>(exponent(z)));
    if constexpr (!kResidual) return w;
    typename S::F q = S::load(draft);
    q = S::where_at_least(q, S::splat(0.0f), S::where_at_least(S::splat(1.0f), q, q));
    return S::max(S::sub(S::mul(w, inverse_total), q), S::splat(0.0f));
  }
};

// Draft probabilities by groups, the last one filled up with 0.
template <bool kResidual>
struct Draft {
  const float* draft;
  int64_t whole;
  float last[kGroup];

  __attribute__((always_inline)) Draft(const float* draft, int64_t size) : draft(draft), whole(size / kGroup) {
    if constexpr (kResidual) {
      const int64_t rest = size % kGroup;
      for (int64_t i = 0; i < kGroup; i++) last[i] = i < rest ? draft[whole * kGroup + i] : 0.0f;
    }
  }
  __attribute__((always_inline)) const float* group(int64_t g) const {
    if constexpr (!kResidual) return nullptr;
    return g == whole ? last : draft + g * kGroup;
  }
};

M3_INLINE int64_t blocks_of(int64_t groups) { return (groups + kBlock / kGroup - 1) / (kBlock / kGroup); }

// visit(g) for the groups of block b.
template <class Visit>
M3_INLINE void each_group(int64_t b, int64_t groups, Visit visit) {
  const int64_t stop = (b + 1) * (kBlock / kGroup) < groups ? (b + 1) * (kBlock / kGroup) : groups;
  for (int64_t g = b * (kBlock / kGroup); g < stop; g++) visit(g);
}

template <class S>
M3_INLINE double sum_of(const typename S::F (&sums)[kChains]) {
  return (double)S::sum(S::add(S::add(sums[0], sums[1]), S::add(sums[2], sums[3])));
}

// -- largest values ---------------------------------------------------------------------------------------------------
template <class S, class Group>
M3_INLINE float maximum_of(const Group& group) {
  typename S::F most[kChains];
  for (auto& chain : most) chain = S::splat(kNothing);
#pragma GCC unroll 64
  for (int i = 0; i < kGroup / S::kLanes; i++) most[i % kChains] = S::max(group.raw(i), most[i % kChains]);
  return clean(S::top(S::max(S::max(most[0], most[1]), S::max(most[2], most[3]))));
}

template <class S>
float scan(const Row& row, float* maxima) {
  float most = kNothing;
  with_source<S>(row, [&](const auto& source) __attribute__((always_inline)) {
    for (int64_t g = 0; g < source.groups; g++) {
      maxima[g] = maximum_of<S>(source.group(g));
      most = maxima[g] > most ? maxima[g] : most;
    }
  });
  return most;
}

template <class S>
float soften(const Row& row, float inverse, float inverse_low, float* maxima, double* sums, float* references) {
  float most = kNothing;
  with_source<S>(row, [&](const auto& source) __attribute__((always_inline)) {
    for (int64_t b = 0; b < blocks_of(source.groups); b++) {
      each_group(b, source.groups, [&](int64_t g) __attribute__((always_inline)) {
        maxima[g] = maximum_of<S>(source.group(g));
        most = maxima[g] > most ? maxima[g] : most;
      });
      references[b] = most, sums[b] = 0.0;
      if (most == kNothing) continue;
      const Measure<S, false> measure(Weight{most, inverse, inverse_low, -kClip, nullptr, 0.0f});
      typename S::F chains[kChains];
      for (auto& chain : chains) chain = S::splat(0.0f);
      with_values(most, inverse, [&](auto values) __attribute__((always_inline)) {
        each_group(b, source.groups, [&](int64_t g) __attribute__((always_inline)) {
          const auto group = source.group(g);
#pragma GCC unroll 4
          for (int i = 0; i < kGroup / S::kLanes; i++)
            chains[i % kChains] = S::add(chains[i % kChains], exponential<S>(measure.exponent(group.get(values, i))));
        });
      });
      sums[b] = sum_of<S>(chains);
    }
  });
  return most;
}

template <class S>
int64_t find(const Row& row, const float* maxima, float z) {
  int64_t found = -1;
  with_source<S>(row, [&](const auto& source) __attribute__((always_inline)) {
    for (int64_t g = 0; g < source.groups && found < 0; g++) {
      if (!(maxima[g] >= z)) continue;
      const auto group = source.group(g);
      for (int i = 0; i < kGroup / S::kLanes && found < 0; i++) {
        const typename S::F a = group.z(i);
        const unsigned equal = S::at_least(a, S::splat(z)) & S::at_least(S::splat(z), a);
        if (equal) found = g * kGroup + i * S::kLanes + __builtin_ctz(equal);
      }
    }
  });
  return found;
}

template <class S>
int64_t collect(const Row& row, const float* maxima, float low, float high, int64_t limit, float* z, int32_t* ids) {
  int64_t count = 0;
  with_source<S>(row, [&](const auto& source) __attribute__((always_inline)) {
    const typename S::F at_least = S::splat(low), below = S::splat(high);
    for (int64_t g = 0; g < source.groups && count <= limit; g++) {
      if (maxima && !(maxima[g] >= low)) continue;
      const auto group = source.group(g);
      for (int i = 0; i < kGroup / S::kLanes; i++) {
        const typename S::F a = group.z(i);
        const unsigned mask = S::at_least(a, at_least) & ~S::at_least(a, below);
        if (!mask) continue;
        S::keep(mask, a, (int32_t)(g * kGroup + i * S::kLanes), z + count, ids ? ids + count : nullptr);
        count += __builtin_popcount(mask);
      }
    }
  });
  return count;
}

// -- masses -----------------------------------------------------------------------------------------------------------
template <class S>
void tally(const Row& row, const Weight& weight, const float* pivots, double* masses) {
  with_source<S>(row, [&](const auto& source) __attribute__((always_inline)) {
    const Measure<S, false> measure(weight);
    typename S::F pivot[kPivots];
    for (int j = 0; j < kPivots; j++) pivot[j] = S::splat(pivots[j]);
    for (int j = 0; j <= kPivots; j++) masses[j] = 0.0;
    with_values(weight.maximum, weight.inverse, [&](auto values) __attribute__((always_inline)) {
      for (int64_t b = 0; b < blocks_of(source.groups); b++) {
        typename S::F sums[kPivots + 1];
        for (auto& sum : sums) sum = S::splat(0.0f);
        each_group(b, source.groups, [&](int64_t g) __attribute__((always_inline)) {
          const auto group = source.group(g);
          for (int i = 0; i < kGroup / S::kLanes; i++) {
            const typename S::F z = group.get(values, i), w = measure.of(z, nullptr);
#pragma GCC unroll 8
            for (int j = 0; j < kPivots; j++) sums[j] = S::add_where_at_least(sums[j], z, pivot[j], w);
            sums[kPivots] = S::add(sums[kPivots], w);
          }
        });
        for (int j = 0; j <= kPivots; j++) masses[j] += (double)S::sum(sums[j]);
      }
    });
  });
}

template <class S, bool kResidual>
M3_INLINE void add_as(const Row& row, const Weight& weight, const float* maxima, double* sums) {
  with_source<S>(row, [&](const auto& source) __attribute__((always_inline)) {
    const Measure<S, kResidual> measure(weight);
    const Draft<kResidual> draft(weight.draft, row.size);
    with_values(weight.maximum, weight.inverse, [&](auto values) __attribute__((always_inline)) {
      for (int64_t b = 0; b < blocks_of(source.groups); b++) {
        typename S::F chains[kChains];
        for (auto& chain : chains) chain = S::splat(0.0f);
        each_group(b, source.groups, [&](int64_t g) __attribute__((always_inline)) {
          if (!(maxima[g] >= weight.threshold)) return;  // its weights are 0
          const auto group = source.group(g);
          const float* q = draft.group(g);
#pragma GCC unroll 4
          for (int i = 0; i < kGroup / S::kLanes; i++)
            chains[i % kChains] = S::add(chains[i % kChains], measure.of(group.get(values, i), q + i * S::kLanes));
        });
        sums[b] = sum_of<S>(chains);
      }
    });
  });
}

template <class S>
void add(const Row& row, const Weight& weight, const float* maxima, double* sums) {
  if (weight.draft)
    add_as<S, true>(row, weight, maxima, sums);
  else
    add_as<S, false>(row, weight, maxima, sums);
}

template <class S, bool kResidual>
M3_INLINE void weigh_as(const Row& row, const Weight& weight, int64_t block, float* out) {
  with_source<S>(row, [&](const auto& source) __attribute__((always_inline)) {
    const Measure<S, kResidual> measure(weight);
    const Draft<kResidual> draft(weight.draft, row.size);
    for (int64_t i = 0; i < kBlock; i++) out[i] = 0.0f;
    each_group(block, source.groups, [&](int64_t g) __attribute__((always_inline)) {
      const auto group = source.group(g);
      const float* q = draft.group(g);
      float* to = out + g * kGroup - block * kBlock;
      for (int i = 0; i < kGroup / S::kLanes; i++)
        S::store(to + i * S::kLanes, measure.of(group.z(i), q + i * S::kLanes));
    });
  });
}

template <class S>
void weigh(const Row& row, const Weight& weight, int64_t block, float* out) {
  if (weight.draft)
    weigh_as<S, true>(row, weight, block, out);
  else
    weigh_as<S, false>(row, weight, block, out);
}

// -- noise ------------------------------------------------------------------------------------------------------------
// words[i]: the words of tokens 4 * first + i * kLanes .. + kLanes - 1.
template <class S>
M3_INLINE void race_words(const Noise& noise, typename S::U c0, typename S::U (&words)[4]) {
  uint32_t k0 = (uint32_t)noise.seed, k1 = (uint32_t)(noise.seed >> 32);
  typename S::U c1 = S::splat_u((uint32_t)noise.position), c2 = S::splat_u((uint32_t)(noise.position >> 32));
  typename S::U c3 = S::splat_u(kRace);
#pragma GCC unroll 10
  for (int round = 0; round < kRounds; round++) {
    typename S::U high0, low0, high1, low1;
    S::multiply(c0, kMultiplier0, high0, low0);
    S::multiply(c2, kMultiplier1, high1, low1);
    c0 = S::exclusive_or(high1, c1, S::splat_u(k0)), c1 = low1;
    c2 = S::exclusive_or(high0, c3, S::splat_u(k1)), c3 = low0;
    k0 += kWeyl0, k1 += kWeyl1;
  }
  words[0] = c0, words[1] = c1, words[2] = c2, words[3] = c3;
}

// A token can only win if its E is at most exp(x - best), and E >= u >= floor(2^24 u) / 2^24: a comparison of 24 bits
// of the word with the token's weight finds the few that can, and those are scored in double. Tokens whose 24 bits are
// 0 are always among them, so that refined words need no thought here; nor do weights below exp(-87): without those
// bits they would lose to any score from -3 on.
template <class S>
void race(const Row& row, const Weight& weight, double temperature, const Noise& noise, const float* maxima,
          Best& best) {
  with_source<S>(row, [&](const auto& source) __attribute__((always_inline)) {
    const Measure<S, false> measure(weight);
    const auto bound_of = [&] { return (float)(0x1p24 * 1.0001 * ::exp(-best.score)); };
    typename S::F bound = S::splat(bound_of());
    for (int64_t g = 0; g < source.groups; g++) {
      const double most = ((double)maxima[g] - weight.maximum) / temperature;
      if (!(maxima[g] >= weight.threshold) || most + kMostNoise < best.score) continue;
      const auto group = source.group(g);
      for (int first = 0; first < kGroup / S::kLanes; first += 4) {
        typename S::U words[4];
        race_words<S>(noise, S::counters((uint32_t)((g * kGroup + first * S::kLanes) / 4)), words);
        S::interleave(words);
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
          const typename S::F z = group.z(first + i);
          const typename S::F reach = S::mul(bound, exponential<S>(measure.exponent(z)));
          unsigned mask = S::at_least(reach, S::high_24(words[i])) & S::at_least(z, measure.threshold);
          if (!mask) continue;
          float lanes[S::kLanes];
          S::store(lanes, z);
          for (; mask; mask &= mask - 1) {
            const int lane = __builtin_ctz(mask);
            const int64_t token = g * kGroup + (first + i) * S::kLanes + lane;
            const double score = ((double)lanes[lane] - weight.maximum) / temperature + gumbel(noise, token);
            if (score > best.score || (score == best.score && token < best.token)) best = {score, token};
          }
          bound = S::splat(bound_of());
        }
      }
    }
  });
}

// The words of kGroup tokens from `start`, or of tokens v + offsets[v]: then each token needs a counter of its own.
template <class S>
M3_INLINE void group_words(const Row& row, const Noise& noise, const int64_t* offsets, int64_t start, uint32_t* out) {
  for (int i = 0; i < kGroup && !offsets; i += 4 * S::kLanes) {
    typename S::U words[4];
    race_words<S>(noise, S::counters((uint32_t)((start + i) / 4)), words);
    S::interleave(words);
    for (int j = 0; j < 4; j++) S::store_u(out + i + j * S::kLanes, words[j]);
  }
  for (int i = 0; i < kGroup && offsets; i += S::kLanes) {
    uint32_t counters[S::kLanes], four[4][S::kLanes];
    int64_t tokens[S::kLanes];
    for (int lane = 0; lane < S::kLanes; lane++) {
      const int64_t v = start + i + lane;
      tokens[lane] = v < row.size ? shifted(v, offsets[v]) : 0;
      counters[lane] = (uint32_t)(tokens[lane] >> 2);
    }
    typename S::U words[4];
    race_words<S>(noise, S::load_u(counters), words);
    for (int j = 0; j < 4; j++) S::store_u(four[j], words[j]);
    for (int lane = 0; lane < S::kLanes; lane++) out[i + lane] = four[tokens[lane] & 3][lane];
  }
}

template <class S>
void perturb(const Row& row, const Noise& noise, const int64_t* offsets, float* out) {
  with_source<S>(row, [&](const auto& source) __attribute__((always_inline)) {
    for (int64_t g = 0; g < source.groups; g++) {
      const auto group = source.group(g);
      const int64_t start = g * kGroup;
      uint32_t words[kGroup];
      group_words<S>(row, noise, offsets, start, words);
      unsigned refined = 0;
#pragma GCC unroll 4
      for (int i = 0; i < kGroup / S::kLanes; i++) {
        const typename S::U word = S::load_u(words + i * S::kLanes);
        S::store(out + start + i * S::kLanes, S::add(group.z(i), gumbel_of<S>(word)));
        refined |= S::at_least(S::splat(0.0f), S::high_24(word));  // words below kSmall
      }
      for (int i = 0; i < kGroup && refined; i++) {
        const int64_t v = start + i;
        if (words[i] >= kSmall || v >= row.size) continue;
        float z[kGroup];
        for (int j = 0; j < kGroup / S::kLanes; j++) S::store(z + j * S::kLanes, group.z(j));
        out[v] = (float)((double)z[i] + gumbel(noise, offsets ? shifted(v, offsets[v]) : v));
      }
    }
  });
}
