// The kernels of tree attention, told once over a SIMD trait S. Included by each attention_cpu_<isa>.cpp inside an
// anonymous namespace.
//
// A score is a sum over the lanes of a vector that runs along the head, the lanes added in a fixed tree; the vectors of
// kLanes keys are folded together, so that the tree costs two instructions a key. Values are added one key after the
// other into the row's vectors, which stay in registers for kRows rows at a time. Nothing in the order of a row's
// operations depends on the rows beside it.
//
// A trait offers F (a vector of kLanes floats), its loads, stores and arithmetic, and
//   load_part, store_part       the first `count` lanes; the others read as 0 and are not written
//   max(a, b), min(a, b)        b where one of them is nan
//   scaled_exp(p, t, n, x)      p * 2^n, 0 where x < kSmallest; t holds n + 127 in its low bits
//   fold<level>(a, b)           halves the lanes of each key: those of a and b, added pair by pair, in one vector
//   kFold[level]                distance of the keys that fold<level> is given, so that they end in ascending lanes
//   kRows, kVectors             rows and vectors of a head that `accumulate` keeps in registers
//   kTiles                      whether keys can be put in tiles; then also repeat_quarter(p), four floats in every
//                               quarter, and transpose_quarters, of four vectors

#define M3_INLINE static inline __attribute__((always_inline))

constexpr float kLowest = -__builtin_huge_valf();
constexpr float kSmallest = -126.0f;         // exp2 of less is subnormal: it becomes 0
constexpr float kRound = 12582912.0f + 127;  // 1.5 * 2^23: adding it rounds to an integer, kept in the low bits
constexpr float kLog2E = 1.44269504f, kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;

// 2^(n + r), |r| <= 1/2: within 1 ulp for x <= 128; 0 where x < kSmallest, -inf included; nan for nan. Minimax
// polynomial of degree 6.
template <class S>
M3_INLINE typename S::F power_of_two(typename S::F t, typename S::F n, typename S::F r, typename S::F x) {
  typename S::F p = S::fma(S::splat(1.53458124e-4f), r, S::splat(1.33999309e-3f));
  p = S::fma(p, r, S::splat(9.61848907e-3f));
  p = S::fma(p, r, S::splat(5.55032864e-2f));
  p = S::fma(p, r, S::splat(0.240226462f));
  p = S::fma(p, r, S::splat(0.693147182f));
  p = S::fma(p, r, S::splat(1.0f));
  return S::scaled_exp(p, t, n, x);
}

template <class S>
M3_INLINE typename S::F exponential2(typename S::F x) {
  const typename S::F t = S::add(x, S::splat(kRound)), n = S::sub(t, S::splat(kRound));
  return power_of_two<S>(t, n, S::sub(x, n), x);
}

// 1 / (1 + e^-g). g = -(n + r) ln 2 by Cody and Waite: kLn2High has so few bits that n * kLn2High is exact.
template <class S>
M3_INLINE typename S::F sigmoid(typename S::F g) {
  const typename S::F x = S::min(S::splat(128.0f), S::mul(g, S::splat(-kLog2E)));
  const typename S::F t = S::add(x, S::splat(kRound)), n = S::sub(t, S::splat(kRound));
  const typename S::F rest = S::fma(n, S::splat(kLn2Low), S::fma(n, S::splat(kLn2High), g));
  const typename S::F r = S::max(S::splat(-1.0f), S::mul(rest, S::splat(-kLog2E))), one = S::splat(1.0f);
  return S::div(one, S::add(one, power_of_two<S>(t, n, S::min(one, r), x)));
}

// exp2 of differences to this: the maximum, or 0 before the first finite score.
M3_INLINE float shift_of(float maximum) { return maximum == kLowest ? 0.0f : maximum; }

// The larger of two; nan stays nan.
M3_INLINE float larger(float a, float b) { return a > b || a != a ? a : b; }

// -- memory -----------------------------------------------------------------------------------------------------------
template <Type kType>
struct Word {
  using T = uint16_t;
};
template <>
struct Word<Type::kInt8> {
  using T = int8_t;
};

template <class S, Type kType>
M3_INLINE typename S::F load_as(const void* row, int64_t i) {
  if constexpr (kType == Type::kFloat32) return S::load((const float*)row + i);
  if constexpr (kType == Type::kBfloat16) return S::load_bf16((const uint16_t*)row + i);
  if constexpr (kType == Type::kInt8) return S::load_int8((const int8_t*)row + i);
  return S::load_fp16((const uint16_t*)row + i);
}

template <class S, Type kType>
M3_INLINE typename S::F load_part_as(const void* row, int64_t i, int count) {
  if constexpr (kType == Type::kFloat32) return S::load_part((const float*)row + i, count);
  typename Word<kType>::T part[S::kLanes] = {};
  for (int j = 0; j < count; j++) part[j] = ((const typename Word<kType>::T*)row)[i + j];
  return load_as<S, kType>(part, 0);
}

template <class S, Type kType, bool kScaled>
M3_INLINE void widen_as(const void* const* from, int64_t count, int64_t size, float factor, float* to, int64_t stride) {
  const auto scaled = [&](typename S::F x)
                          __attribute__((always_inline)) { return kScaled ? S::mul(x, S::splat(factor)) : x; };
  for (int64_t i = 0; i < count; i++, to += stride) {
    const void* row = from[i];
    int64_t d = 0;
    for (; d + 4 * S::kLanes <= size; d += 4 * S::kLanes)
#pragma GCC unroll 4
      for (int v = 0; v < 4 * S::kLanes; v += S::kLanes) S::store(to + d + v, scaled(load_as<S, kType>(row, d + v)));
    for (; d + S::kLanes <= size; d += S::kLanes) S::store(to + d, scaled(load_as<S, kType>(row, d)));
    if (d < size) S::store(to + d, scaled(load_part_as<S, kType>(row, d, int(size - d)))), d += S::kLanes;
    for (; d < stride; d += S::kLanes) S::store(to + d, S::splat(0.0f));
  }
}

template <class S, Type kType>
M3_INLINE void widen_type(const void* const* from, int64_t count, int64_t size, float factor, float* to,
                          int64_t stride) {
  if (factor == 1.0f)
    widen_as<S, kType, false>(from, count, size, factor, to, stride);
  else
    widen_as<S, kType, true>(from, count, size, factor, to, stride);
}

template <class S>
void widen(const void* const* from, Type type, int64_t count, int64_t size, float factor, float* to, int64_t stride) {
  if (type == Type::kFloat32)
    widen_type<S, Type::kFloat32>(from, count, size, factor, to, stride);
  else if (type == Type::kBfloat16)
    widen_type<S, Type::kBfloat16>(from, count, size, factor, to, stride);
  else if (type == Type::kInt8)
    widen_type<S, Type::kInt8>(from, count, size, factor, to, stride);
  else
    widen_type<S, Type::kFloat16>(from, count, size, factor, to, stride);
}

// -- scores -----------------------------------------------------------------------------------------------------------
// Lanes l, l + kLanes, ... of q . k. kSteps: vectors of a head, 0 where it is not known at compile time.
template <class S, Type kType, int kSteps>
M3_INLINE typename S::F products(const float* q, const void* k, int64_t stride) {
  const int64_t size = kSteps ? kSteps * S::kLanes : stride;
  typename S::F sum = S::mul(S::load(q), load_as<S, kType>(k, 0));
#pragma GCC unroll 32
  for (int64_t d = S::kLanes; d < size; d += S::kLanes) sum = S::fma(S::load(q + d), load_as<S, kType>(k, d), sum);
  return sum;
}

// 2^kLevel keys in one vector, 2^-kLevel of their lanes left.
template <class S, Type kType, int kSteps, int kLevel>
M3_INLINE typename S::F folded(const float* q, const void* const* keys, int64_t stride) {
  if constexpr (kLevel == 0)
    return products<S, kType, kSteps>(q, keys[0], stride);
  else
    return S::template fold<kLevel>(folded<S, kType, kSteps, kLevel - 1>(q, keys, stride),
                                    folded<S, kType, kSteps, kLevel - 1>(q, keys + S::kFold[kLevel], stride));
}

template <class S, Type kType, int kSteps>
M3_INLINE void score_row(const float* q, const void* const* keys, int64_t stride, int begin, int end, float* scores) {
  for (int j = begin / S::kLanes * S::kLanes; j < end; j += S::kLanes)
    S::store(scores + j, folded<S, kType, kSteps, S::kLevels>(q, keys + j, stride));
}

template <class S, Type kType, int kSteps>
M3_INLINE void score_rows(const Chunk& c) {
  for (int64_t i = 0; i < c.rows; i++)
    score_row<S, kType, kSteps>(c.queries + i * c.stride, c.keys, c.stride, c.begin[i], c.end[i],
                                c.scores + i * kChunk);
}

// Keys in tiles, for many rows: vector m of a tile of kLanes keys holds four elements of keys m, m + 4, m + 8, ..., so
// that only the last two folds are left to do. The first folds become sums of whole vectors: per key the same sums in
// the same order as in `folded`. Layout: (kChunk / kLanes, stride / 4, 4, kLanes).
template <class S, Type kType>
M3_INLINE void tile_as(const void* const* from, int64_t size, float* to, int64_t stride) {
  for (int64_t j = 0; j < kChunk; j += S::kLanes)
    for (int m = 0; m < 4; m++)
      for (int64_t d = 0; d < stride; d += S::kLanes) {
        typename S::F rows[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
          const void* row = from[j + 4 * i + m];
          rows[i] = d + S::kLanes <= size ? load_as<S, kType>(row, d)
                                          : load_part_as<S, kType>(row, d, int(size > d ? size - d : 0));
        }
        S::transpose_quarters(rows);
#pragma GCC unroll 4
        for (int a = 0; a < 4; a++) S::store(to + j * stride + (d + 4 * a) * S::kLanes + m * S::kLanes, rows[a]);
      }
}

template <class S>
void tile(const void* const* from, Type type, int64_t size, float* to, int64_t stride) {
  static_assert(S::kLanes == 16);
  if (type == Type::kFloat32)
    tile_as<S, Type::kFloat32>(from, size, to, stride);
  else if (type == Type::kBfloat16)
    tile_as<S, Type::kBfloat16>(from, size, to, stride);
  else if (type == Type::kInt8)
    tile_as<S, Type::kInt8>(from, size, to, stride);
  else
    tile_as<S, Type::kFloat16>(from, size, to, stride);
}

// sums[i][m] = lanes 4 a .. 4 a + 3 of `products` for row i and keys m, m + 4, m + 8, m + 12
template <class S, int kSteps, int kRows>
M3_INLINE void tile_products(const float* q, const float* tile, int64_t stride, int a,
                             typename S::F (&sums)[kRows][4]) {
  const int64_t steps = kSteps ? kSteps : stride / S::kLanes;
#pragma GCC unroll 8
  for (int64_t step = 0; step < steps; step++) {
    const float* keys = tile + (step * 4 + a) * 4 * S::kLanes;
#pragma GCC unroll 4
    for (int i = 0; i < kRows; i++) {
      const typename S::F x = S::repeat_quarter(q + i * stride + step * S::kLanes + 4 * a);
#pragma GCC unroll 4
      for (int m = 0; m < 4; m++) {
        const typename S::F k = S::load(keys + m * S::kLanes);
        sums[i][m] = step ? S::fma(x, k, sums[i][m]) : S::mul(x, k);
      }
    }
  }
}

template <class S, int kSteps, int kRows>
M3_INLINE void score_tiles(const float* q, const float* tiles, int64_t stride, int begin, int end, float* scores) {
  for (int j = begin / S::kLanes * S::kLanes; j < end; j += S::kLanes) {
    const float* tile = tiles + j * stride;
    typename S::F even[kRows][4], odd[kRows][4], more[kRows][4];
    tile_products<S, kSteps, kRows>(q, tile, stride, 0, even);
    tile_products<S, kSteps, kRows>(q, tile, stride, 2, more);
#pragma GCC unroll 4
    for (int i = 0; i < kRows; i++)
#pragma GCC unroll 4
      for (int m = 0; m < 4; m++) even[i][m] = S::add(even[i][m], more[i][m]);
    tile_products<S, kSteps, kRows>(q, tile, stride, 1, odd);
    tile_products<S, kSteps, kRows>(q, tile, stride, 3, more);
#pragma GCC unroll 4
    for (int i = 0; i < kRows; i++) {
#pragma GCC unroll 4
      for (int m = 0; m < 4; m++) even[i][m] = S::add(even[i][m], S::add(odd[i][m], more[i][m]));
      S::store(scores + i * kChunk + j,
               S::template fold<S::kLevels>(S::template fold<S::kLevels - 1>(even[i][0], even[i][1]),
                                            S::template fold<S::kLevels - 1>(even[i][2], even[i][3])));
    }
  }
}

// -- softmax ----------------------------------------------------------------------------------------------------------
// scores -> exp2(score - maximum) of keys begin .. end - 1, the maximum and total brought up to date. Returns what the
// row's sums so far are to be multiplied with; it is exactly 1 while the maximum stays.
template <class S>
M3_INLINE float weigh(float* scores, int begin, int end, float& maximum, float* total) {
  constexpr int kCount = kChunk / S::kLanes, kTotals = kPad / S::kLanes;
  if (begin > 0 || end < kChunk) {
    for (int j = 0; j < begin; j++) scores[j] = kLowest;
    for (int j = end; j < kChunk; j++) scores[j] = kLowest;
  }
  typename S::F most = S::load(scores);
#pragma GCC unroll 16
  for (int v = 1; v < kCount; v++) most = S::max(S::load(scores + v * S::kLanes), most);
  const float old = maximum, now = larger(old, S::top(most)), shift = shift_of(now);
  const typename S::F shifts = S::splat(shift);
  typename S::F sums[kTotals];
#pragma GCC unroll 16
  for (int v = 0; v < kCount; v++) {
    const typename S::F e = exponential2<S>(S::sub(S::load(scores + v * S::kLanes), shifts));
    S::store(scores + v * S::kLanes, e);
    sums[v % kTotals] = v < kTotals ? e : S::add(sums[v % kTotals], e);
  }
  maximum = now;
  if (now == old && old != kLowest) {
#pragma GCC unroll 16
    for (int v = 0; v < kTotals; v++) S::store(total + v * S::kLanes, S::add(S::load(total + v * S::kLanes), sums[v]));
    return 1.0f;
  }
  const typename S::F down = exponential2<S>(S::sub(S::splat(old), shifts));
#pragma GCC unroll 16
  for (int v = 0; v < kTotals; v++)
    S::store(total + v * S::kLanes, S::fma(S::load(total + v * S::kLanes), down, sums[v]));
  return S::first(down);
}

// scores[j] *= scales[j] in the vectors that hold begin .. end - 1
template <class S>
M3_INLINE void multiply(float* scores, const float* scales, int begin, int end) {
  for (int j = begin / S::kLanes * S::kLanes; j < end; j += S::kLanes)
    S::store(scores + j, S::mul(S::load(scores + j), S::load(scales + j)));
}

// -- values -----------------------------------------------------------------------------------------------------------
// weighted[i] = weighted[i] * scale[i] + sum of scores[i][j] * values[j], j = begin .. end - 1, d .. d + kColumns
// vectors of the head.
template <class S, Type kType, int kRows, int kColumns>
M3_INLINE void accumulate_tile(const Chunk& c, int64_t row, int64_t d, const float* scale, int begin, int end) {
  float* weighted = c.state.weighted + row * c.stride + d;
  const float* scores = c.scores + row * kChunk;
  typename S::F sums[kRows][kColumns];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; i++)
#pragma GCC unroll 8
    for (int v = 0; v < kColumns; v++)
      sums[i][v] = S::mul(S::load(weighted + i * c.stride + v * S::kLanes), S::splat(scale[i]));
  for (int j = begin; j < end; j++) {
    const void* value = c.values[j];
    typename S::F columns[kColumns];
#pragma GCC unroll 8
    for (int v = 0; v < kColumns; v++) columns[v] = load_as<S, kType>(value, d + v * S::kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; i++) {
      const typename S::F p = S::splat(scores[i * kChunk + j]);
#pragma GCC unroll 8
      for (int v = 0; v < kColumns; v++) sums[i][v] = S::fma(p, columns[v], sums[i][v]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; i++)
#pragma GCC unroll 8
    for (int v = 0; v < kColumns; v++) S::store(weighted + i * c.stride + v * S::kLanes, sums[i][v]);
}

template <class S, Type kType, int kRows>
M3_INLINE void accumulate_rows(const Chunk& c, int64_t row, const float* scale, int begin, int end) {
  constexpr int kWide = kRows == 1 ? 8 : kRows == 2 ? S::kVectors * 2 : S::kVectors;  // enough sums to hide the latency
  int64_t d = 0;
  for (; d + kWide * S::kLanes <= c.stride; d += kWide * S::kLanes)
    accumulate_tile<S, kType, kRows, kWide>(c, row, d, scale, begin, end);
  if constexpr (kWide > S::kVectors)
    for (; d + S::kVectors * S::kLanes <= c.stride; d += S::kVectors * S::kLanes)
      accumulate_tile<S, kType, kRows, S::kVectors>(c, row, d, scale, begin, end);
  for (; d < c.stride; d += S::kLanes) accumulate_tile<S, kType, kRows, 1>(c, row, d, scale, begin, end);
}

template <class S, Type kType>
void accumulate(const Chunk& c, int64_t row, int rows, const float* scale, int begin, int end) {
  static_assert(S::kRows <= 6);
  if constexpr (S::kRows >= 6)
    if (rows == 6) return accumulate_rows<S, kType, 6>(c, row, scale, begin, end);
  if constexpr (S::kRows >= 5)
    if (rows == 5) return accumulate_rows<S, kType, 5>(c, row, scale, begin, end);
  if (rows == 4) return accumulate_rows<S, kType, 4>(c, row, scale, begin, end);
  if (rows == 3) return accumulate_rows<S, kType, 3>(c, row, scale, begin, end);
  if (rows == 2) return accumulate_rows<S, kType, 2>(c, row, scale, begin, end);
  accumulate_rows<S, kType, 1>(c, row, scale, begin, end);
}

// Rows of one block need not count the same keys: each takes those before the common run alone, then all take the run
// together, then each the rest alone. Per row that is begin .. end - 1 in order.
template <class S, Type kType>
M3_INLINE void accumulate_block(const Chunk& c, int64_t row, int rows) {
  static const float ones[8] = {1, 1, 1, 1, 1, 1, 1, 1};
  const float* scale = c.scale + row;
  const int *begin = c.begin + row, *end = c.end + row;
  int first = begin[0], last = end[0];
  bool same = true;
  for (int i = 1; i < rows; i++) {
    same = same && begin[i] == begin[0] && end[i] == end[0];
    first = begin[i] > first ? begin[i] : first;
    last = end[i] < last ? end[i] : last;
  }
  if (same) {
    if (first < last) accumulate<S, kType>(c, row, rows, scale, first, last);
    return;
  }
  if (first >= last) {
    for (int i = 0; i < rows; i++)
      if (begin[i] < end[i]) accumulate<S, kType>(c, row + i, 1, scale + i, begin[i], end[i]);
    return;
  }
  for (int i = 0; i < rows; i++) accumulate<S, kType>(c, row + i, 1, scale + i, begin[i], first);
  accumulate<S, kType>(c, row, rows, ones, first, last);
  for (int i = 0; i < rows; i++)
    if (last < end[i]) accumulate<S, kType>(c, row + i, 1, ones, last, end[i]);
}

template <class S, Type kType>
M3_INLINE void accumulate_all(const Chunk& c) {
  for (int64_t i = 0; i < c.rows; i += S::kRows)
    accumulate_block<S, kType>(c, i, int(c.rows - i < S::kRows ? c.rows - i : S::kRows));
}

// All scores, then all weights; all values come after: a chunk of keys, and then one of values, stays in L1 for all
// rows.
template <class S, int kSteps>
M3_INLINE void weigh_rows(const Chunk& c) {
  if constexpr (S::kTiles)
    if (c.tiles)
      for (int64_t i = 0; i < c.rows; i += 2) {
        const bool two = i + 1 < c.rows;
        const int begin = two && c.begin[i + 1] < c.begin[i] ? c.begin[i + 1] : c.begin[i];
        const int end = two && c.end[i + 1] > c.end[i] ? c.end[i + 1] : c.end[i];
        const float* q = c.queries + i * c.stride;
        if (two)
          score_tiles<S, kSteps, 2>(q, c.tiles, c.stride, begin, end, c.scores + i * kChunk);
        else
          score_tiles<S, kSteps, 1>(q, c.tiles, c.stride, begin, end, c.scores + i * kChunk);
      }
  if (!c.tiles) {
    if (c.key_type == Type::kFloat32)
      score_rows<S, Type::kFloat32, kSteps>(c);
    else if (c.key_type == Type::kBfloat16)
      score_rows<S, Type::kBfloat16, kSteps>(c);
    else if (c.key_type == Type::kInt8)
      score_rows<S, Type::kInt8, kSteps>(c);
    else
      score_rows<S, Type::kFloat16, kSteps>(c);
  }
  for (int64_t i = 0; i < c.rows; i++) {
    c.scale[i] = 1.0f;
    if (c.begin[i] >= c.end[i]) continue;
    float* scores = c.scores + i * kChunk;
    if (c.key_scales) multiply<S>(scores, c.key_scales, c.begin[i], c.end[i]);
    c.scale[i] = weigh<S>(scores, c.begin[i], c.end[i], c.state.maximum[i], c.state.total + i * kPad);
    if (c.value_scales) multiply<S>(scores, c.value_scales, c.begin[i], c.end[i]);
  }
}

template <class S>
void attend(const Chunk& c) {
  if (c.stride == 64)
    weigh_rows<S, 64 / S::kLanes>(c);
  else if (c.stride == 128)
    weigh_rows<S, 128 / S::kLanes>(c);
  else
    weigh_rows<S, 0>(c);
  if (c.value_type == Type::kFloat32)
    accumulate_all<S, Type::kFloat32>(c);
  else if (c.value_type == Type::kBfloat16)
    accumulate_all<S, Type::kBfloat16>(c);
  else if (c.value_type == Type::kInt8)
    accumulate_all<S, Type::kInt8>(c);
  else
    accumulate_all<S, Type::kFloat16>(c);
}

// -- splits -----------------------------------------------------------------------------------------------------------
template <class S>
void merge(const State& into, const State& from, int64_t stride) {
  const float now = larger(*into.maximum, *from.maximum), shift = shift_of(now);
  const typename S::F shifts = S::splat(shift);
  const typename S::F old = exponential2<S>(S::sub(S::splat(*into.maximum), shifts));
  const typename S::F more = exponential2<S>(S::sub(S::splat(*from.maximum), shifts));
  for (int v = 0; v < kPad; v += S::kLanes)
    S::store(into.total + v, S::fma(S::load(into.total + v), old, S::mul(S::load(from.total + v), more)));
  for (int64_t d = 0; d < stride; d += S::kLanes)
    S::store(into.weighted + d, S::fma(S::load(into.weighted + d), old, S::mul(S::load(from.weighted + d), more)));
  *into.maximum = now;
}

// -- results ----------------------------------------------------------------------------------------------------------
// `count` values of the gate from d on, or the one that stands for all.
template <class S, Type kType>
M3_INLINE typename S::F gate_at(const Finish& f, int64_t d, int count) {
  if (f.gate_one) return S::splat(S::first(load_part_as<S, kType>(f.gate, 0, 1)));
  return count < S::kLanes ? load_part_as<S, kType>(f.gate, d, count) : load_as<S, kType>(f.gate, d);
}

template <class S>
void finish(const Finish& f) {
  typename S::F lanes = S::load(f.total);
  for (int v = S::kLanes; v < kPad; v += S::kLanes) lanes = S::add(lanes, S::load(f.total + v));
  const typename S::F total = S::splat(S::sum(lanes));
  for (int64_t d = 0; d < f.size; d += S::kLanes) {
    const int count = int(f.size - d < S::kLanes ? f.size - d : S::kLanes);
    typename S::F y = S::div(S::load(f.weighted + d), total);
    if (f.gate) {
      const typename S::F g = f.gate_type == Type::kFloat32    ? gate_at<S, Type::kFloat32>(f, d, count)
                              : f.gate_type == Type::kBfloat16 ? gate_at<S, Type::kBfloat16>(f, d, count)
                                                               : gate_at<S, Type::kFloat16>(f, d, count);
      y = S::mul(y, sigmoid<S>(g));
    }
    if (f.type == Type::kFloat32) {
      S::store_part((float*)f.out + d, count, y);
    } else {
      uint16_t half[S::kLanes];
      if (f.type == Type::kBfloat16)
        S::store_bf16(half, y);
      else
        S::store_fp16(half, y);
      for (int j = 0; j < count; j++) ((uint16_t*)f.out)[d + j] = half[j];
    }
  }
}
