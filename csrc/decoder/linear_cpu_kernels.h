// The kernels of linear, told once over a SIMD trait S. Included by each linear_cpu_<isa>.cpp inside an anonymous
// namespace.
//
// A tile is up to S::kRows rows of x against a strip of kColumns rows of the weight: one vector of sums for each of its
// outputs, kept in registers along a piece of K, then added up by a transposing tree. Few rows read the weight where it
// lies, widening 16 bits on the way to the registers. Where several tiles of rows read a strip, it and x are first
// packed as the tile reads them, step by step: [step][row][lane] and [step][column][lane], the last step filled with 0.
//
// A trait offers F (a vector of kLanes floats), its arithmetic, and
//   load(p), load_part(p, count)   for const float*, Bf16 and Fp16 pointers; lanes behind `count` are 0
//   join(a)                        kLanes / 4 vectors into one: quarter q of the result adds up quarters of a[q], half
//                                  against half
//   fold_two(a, b), fold_one(a, b) in each quarter: [a0 + a2, a1 + a3, b0 + b2, b1 + b3] and
//                                  [a0 + a1, a2 + a3, b0 + b1, b2 + b3]

#define M3_INLINE static inline __attribute__((always_inline))

struct Bf16 {
  uint16_t bits;
};
struct Fp16 {
  uint16_t bits;
};

// One tile along one piece of K, and where its sums go.
struct Tile {
  const void* weight;  // of the strip's first row
  uintptr_t next;      // address of what is read after this strip: fetched meanwhile
  int64_t weight_stride;
  int columns;  // 1 .. kColumns
  int64_t k;    // of the piece
  const float* x;
  int64_t x_stride;
  float* y;
  int64_t y_stride;
  bool first;         // y is written, not added to
  const float* bias;  // added last; null: none
};

template <class S, int kRowCount>
M3_INLINE void store_sums(const Tile& t, const typename S::F (&sums)[kRowCount][kColumns]) {
  using F = typename S::F;
  constexpr int kGroup = S::kLanes / 4;  // rows whose sums fill one vector
#pragma GCC unroll 8
  for (int group = 0; group < kRowCount; group += kGroup) {
    F columns[kColumns];
#pragma GCC unroll 4
    for (int c = 0; c < kColumns; c++) {
      F rows[kGroup];
#pragma GCC unroll 4
      for (int r = 0; r < kGroup; r++) rows[r] = sums[group + r < kRowCount ? group + r : group][c];
      columns[c] = S::join(rows);
    }
    alignas(64) float total[S::kLanes];
    S::store(total, S::fold_one(S::fold_two(columns[0], columns[1]), S::fold_two(columns[2], columns[3])));
#pragma GCC unroll 4
    for (int r = 0; r < kGroup; r++) {
      if (group + r >= kRowCount) break;
      float* y = t.y + (group + r) * t.y_stride;
      if (t.columns == kColumns) {
        float out[kColumns];
#pragma GCC unroll 4
        for (int c = 0; c < kColumns; c++) out[c] = t.first ? total[4 * r + c] : y[c] + total[4 * r + c];
        if (t.bias)
          for (int c = 0; c < kColumns; c++) out[c] += t.bias[c];
        std::memcpy(y, out, sizeof out);
      } else {
        for (int c = 0; c < t.columns; c++) {
          const float sum = t.first ? total[4 * r + c] : y[c] + total[4 * r + c];
          y[c] = t.bias ? sum + t.bias[c] : sum;
        }
      }
    }
  }
}

template <class S, int kRowCount, class LoadX, class LoadW>
M3_INLINE void add_products(typename S::F (&sums)[kRowCount][kColumns], LoadX load_x, LoadW load_w) {
  typename S::F a[kRowCount];
#pragma GCC unroll 8
  for (int r = 0; r < kRowCount; r++) a[r] = load_x(r);
#pragma GCC unroll 4
  for (int c = 0; c < kColumns; c++) {
    const typename S::F b = load_w(c);
#pragma GCC unroll 8
    for (int r = 0; r < kRowCount; r++) sums[r][c] = S::fma(a[r], b, sums[r][c]);
  }
}

#define M3_LOAD [&](int i) __attribute__((always_inline))

template <class S, int kRowCount>
M3_INLINE void clear(typename S::F (&sums)[kRowCount][kColumns]) {
#pragma GCC unroll 8
  for (int r = 0; r < kRowCount; r++)
#pragma GCC unroll 4
    for (int c = 0; c < kColumns; c++) sums[r][c] = S::zero();
}

// x and the weight where they lie.
template <class S, class W, int kRowCount>
static __attribute__((noinline)) void direct_tile(const Tile& t) {
  typename S::F sums[kRowCount][kColumns];
  const float* x[kRowCount];
  const W* w[kColumns];
  uintptr_t next[kColumns];
#pragma GCC unroll 8
  for (int r = 0; r < kRowCount; r++) x[r] = t.x + r * t.x_stride;
#pragma GCC unroll 4
  for (int c = 0; c < kColumns; c++) {  // columns beyond the strip repeat its last one and are not stored
    const int64_t offset = (c < t.columns ? c : t.columns - 1) * t.weight_stride;
    w[c] = static_cast<const W*>(t.weight) + offset;
    next[c] = t.next + offset * sizeof(W);
  }
  clear<S, kRowCount>(sums);
  int64_t k = 0;
  for (; k + S::kLanes <= t.k; k += S::kLanes) {
#pragma GCC unroll 4
    for (int c = 0; c < kColumns; c++) __builtin_prefetch((const void*)(next[c] + k * sizeof(W)));
    add_products<S, kRowCount>(sums, M3_LOAD { return S::load(x[i] + k); }, M3_LOAD { return S::load(w[i] + k); });
  }
  if (k < t.k) {
    const int count = int(t.k - k);
    add_products<S, kRowCount>(
        sums, M3_LOAD { return S::load_part(x[i] + k, count); }, M3_LOAD { return S::load_part(w[i] + k, count); });
  }
  store_sums<S, kRowCount>(t, sums);
}

// x and the weight packed. kFetch: t.next is a strip of W's that lies unpacked, fetched meanwhile.
template <class S, class W, int kRowCount, bool kFetch>
static __attribute__((noinline)) void packed_tile(const Tile& t) {
  typename S::F sums[kRowCount][kColumns];
  const float *x = t.x, *w = static_cast<const float*>(t.weight);
  uintptr_t next = t.next;
  const uintptr_t row = t.weight_stride * sizeof(W);
  clear<S, kRowCount>(sums);
  for (int64_t k = 0; k < t.k; k += S::kLanes) {
    if constexpr (kFetch) {
#pragma GCC unroll 4
      for (int c = 0; c < kColumns; c++) __builtin_prefetch((const void*)(next + c * row));
      next += S::kLanes * sizeof(W);
    }
    add_products<S, kRowCount>(
        sums, M3_LOAD { return S::load(x + i * S::kLanes); }, M3_LOAD { return S::load(w + i * S::kLanes); });
    x += kRowCount * S::kLanes, w += kColumns * S::kLanes;
  }
  store_sums<S, kRowCount>(t, sums);
}

// visit(std::integral_constant of `rows`)
template <class S, class Visit>
M3_INLINE void with_rows(int rows, Visit visit) {
  switch (rows) {
    case 1:
      return visit(std::integral_constant<int, 1>());
    case 2:
      return visit(std::integral_constant<int, 2>());
    case 3:
      if constexpr (S::kRows >= 3) return visit(std::integral_constant<int, 3>());
      break;
    case 4:
      if constexpr (S::kRows >= 4) return visit(std::integral_constant<int, 4>());
      break;
    case 5:
      if constexpr (S::kRows >= 5) return visit(std::integral_constant<int, 5>());
      break;
    case 6:
      if constexpr (S::kRows >= 6) return visit(std::integral_constant<int, 6>());
      break;
  }
}

// -- packing ----------------------------------------------------------------------------------------------------------
template <class S, class W>
static void widen_run(const W* from, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + S::kLanes <= count; i += S::kLanes) S::store(to + i, S::load(from + i));
  if (i < count) {
    alignas(64) float rest[S::kLanes];
    S::store(rest, S::load_part(from + i, int(count - i)));
    std::memcpy(to + i, rest, (count - i) * sizeof(float));
  }
}

template <class S>
static void widen(const void* from, Type type, int64_t count, float* to) {
  if (type == Type::kF32) return widen_run<S>(static_cast<const float*>(from), count, to);
  if (type == Type::kBF16) return widen_run<S>(static_cast<const Bf16*>(from), count, to);
  widen_run<S>(static_cast<const Fp16*>(from), count, to);
}

// `count` runs of k values, `stride` apart, into [step][of][lane]; runs from `count` on are 0.
template <class S, class W>
static void interleave(const W* from, int64_t stride, int count, int of, int64_t k, float* to) {
  for (int i = 0; i < of; i++) {
    float* out = to + i * S::kLanes;
    if (i >= count) {
      for (int64_t j = 0; j < k; j += S::kLanes, out += of * S::kLanes) S::store(out, S::zero());
      continue;
    }
    const W* run = from + i * stride;
    int64_t j = 0;
    for (; j + S::kLanes <= k; j += S::kLanes, out += of * S::kLanes) S::store(out, S::load(run + j));
    if (j < k) S::store(out, S::load_part(run + j, int(k - j)));
  }
}

template <class S>
static void pack(const float* x, int64_t stride, int rows, int64_t k, float* to) {
  interleave<S>(x, stride, rows, rows, k, to);
}

// -- products ---------------------------------------------------------------------------------------------------------
// Rows are cut into tiles of nearly one size, of which i starts here.
M3_INLINE int64_t tile_start(const Product& p, int64_t i) { return p.rows * i / p.tiles; }

template <class S, class W>
static void stream_typed(const Product& p) {
  const W* weight = static_cast<const W*>(p.weight);
  Tile t;
  t.weight_stride = p.k;
  t.y_stride = p.y_stride;
  for (int64_t n = 0; n < p.columns; n += kColumns) {
    const W* strip = weight + n * p.k;
    t.columns = int(p.columns - n < kColumns ? p.columns - n : kColumns);
    int64_t k = 0;
    do {
      t.k = p.k - k < p.piece ? p.k - k : p.piece;
      const bool last = k + t.k == p.k;
      t.next = (uintptr_t)strip + (last ? kColumns * p.k : k + t.k) * sizeof(W);
      t.first = k == 0;
      t.bias = last && p.bias ? p.bias + n : nullptr;
      t.y = p.y + n;
      if (!p.packed) {
        t.weight = strip + k;
        t.x = p.x + k, t.x_stride = p.x_stride;
        with_rows<S>(int(p.rows), [&](auto rows) { direct_tile<S, W, decltype(rows)::value>(t); });
      } else {
        interleave<S>(strip + k, p.k, t.columns, kColumns, t.k, p.panel);
        t.weight = p.panel;
        for (int64_t i = 0; i < p.tiles; i++) {
          const int64_t row = tile_start(p, i), count = tile_start(p, i + 1) - row;
          t.x = p.packed + row * p.padded_k + k * count;
          t.y = p.y + row * p.y_stride + n;
          if (i == 0)
            with_rows<S>(int(count), [&](auto rows) { packed_tile<S, W, decltype(rows)::value, true>(t); });
          else
            with_rows<S>(int(count), [&](auto rows) { packed_tile<S, float, decltype(rows)::value, false>(t); });
        }
      }
      k += t.k;
    } while (k < p.k);
  }
}

template <class S>
static void stream(const Product& p) {
  if (p.type == Type::kF32) return stream_typed<S, float>(p);
  if (p.type == Type::kBF16) return stream_typed<S, Bf16>(p);
  stream_typed<S, Fp16>(p);
}

template <class S, class W>
static void block_typed(const Product& p) {
  const W* weight = static_cast<const W*>(p.weight);
  Tile t;
  t.y_stride = p.y_stride;
  int64_t k = 0;
  do {
    t.k = p.k - k < p.piece ? p.k - k : p.piece;
    t.first = k == 0;
    const int64_t strip = kColumns * ((t.k + S::kLanes - 1) / S::kLanes * S::kLanes);
    for (int64_t n = 0; n < p.columns; n += kColumns) {
      const int columns = int(p.columns - n < kColumns ? p.columns - n : kColumns);
      interleave<S>(weight + n * p.k + k, p.k, columns, kColumns, t.k, p.panel + n / kColumns * strip);
    }
    for (int64_t i = p.first_tile; i < p.last_tile; i++) {
      const int64_t row = tile_start(p, i), count = tile_start(p, i + 1) - row;
      t.x = p.packed + row * p.padded_k + k * count;
      for (int64_t n = 0; n < p.columns; n += kColumns) {
        t.columns = int(p.columns - n < kColumns ? p.columns - n : kColumns);
        t.weight = p.panel + n / kColumns * strip;
        t.y = p.y + row * p.y_stride + n;
        t.bias = p.bias && k + t.k == p.k ? p.bias + n : nullptr;
        with_rows<S>(int(count), [&](auto rows) { packed_tile<S, float, decltype(rows)::value, false>(t); });
      }
    }
    k += t.k;
  } while (k < p.k);
}

template <class S>
static void block(const Product& p) {
  if (p.type == Type::kF32) return block_typed<S, float>(p);
  if (p.type == Type::kBF16) return block_typed<S, Bf16>(p);
  block_typed<S, Fp16>(p);
}
