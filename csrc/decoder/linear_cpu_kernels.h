// The kernels of linear, told once over a SIMD trait S. Included by each linear_cpu_<isa>.cpp inside an anonymous
// namespace.
//
// A tile is up to S::kRows rows of x against a strip of kColumns rows of the weight: one vector of sums for each of its
// outputs, kept in registers along a piece of K, then added up by a transposing tree. A weight of 16 bits is widened on
// the way to the registers, or where many rows read it, once into a panel of floats: the same numbers.
//
// A trait offers F (a vector of kLanes floats), its arithmetic, and
//   load(p), load_part(p, count)   for const float*, Bf16 and Fp16 pointers; lanes behind `count` are 0
//   join(a)                        kLanes / 4 vectors into one: quarter q of the result adds up quarters of a[q], half
//                                  against half
//   fold_two(a, b), fold_one(a, b) in each quarter: [a0 + a2, a1 + a3, b0 + b2, b1 + b3] and
//                                  [a0 + a1, a2 + a3, b0 + b1, b2 + b3]

#define M3_INLINE static inline __attribute__((always_inline))

constexpr int64_t kTilesForPanel = 3;  // tiles of rows from which widening a strip once is faster than in each

struct Bf16 {
  uint16_t bits;
};
struct Fp16 {
  uint16_t bits;
};

// One tile along one piece of K, and where its sums go.
struct Tile {
  const void* weight;  // of the strip's first row
  const void* next;    // of the strip that is read after this one: fetched meanwhile
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

template <class S, class W, int kRowCount>
static __attribute__((noinline)) void tile(const Tile& t) {
  using F = typename S::F;
  F sums[kRowCount][kColumns];
  const float* x[kRowCount];
  const W* w[kColumns];
  uintptr_t next[kColumns];
#pragma GCC unroll 8
  for (int r = 0; r < kRowCount; r++) x[r] = t.x + r * t.x_stride;
#pragma GCC unroll 4
  for (int c = 0; c < kColumns; c++) {  // columns beyond the strip repeat its last one and are not stored
    const int64_t offset = (c < t.columns ? c : t.columns - 1) * t.weight_stride;
    w[c] = static_cast<const W*>(t.weight) + offset;
    next[c] = (uintptr_t)t.next + offset * sizeof(W);
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRowCount; r++)
#pragma GCC unroll 4
    for (int c = 0; c < kColumns; c++) sums[r][c] = S::zero();
  const auto step = [&](const auto& load_x, const auto& load_w) __attribute__((always_inline)) {
    F a[kRowCount];
#pragma GCC unroll 8
    for (int r = 0; r < kRowCount; r++) a[r] = load_x(x[r]);
#pragma GCC unroll 4
    for (int c = 0; c < kColumns; c++) {
      const F b = load_w(w[c]);
#pragma GCC unroll 8
      for (int r = 0; r < kRowCount; r++) sums[r][c] = S::fma(a[r], b, sums[r][c]);
    }
  };
  int64_t k = 0;
  for (; k + S::kLanes <= t.k; k += S::kLanes) {
#pragma GCC unroll 4
    for (int c = 0; c < kColumns; c++) __builtin_prefetch((const void*)(next[c] + k * sizeof(W)));
    step([&](const float* p) __attribute__((always_inline)) { return S::load(p + k); },
         [&](const W* p) __attribute__((always_inline)) { return S::load(p + k); });
  }
  if (k < t.k) {
    const int count = int(t.k - k);
    step([&](const float* p) __attribute__((always_inline)) { return S::load_part(p + k, count); },
         [&](const W* p) __attribute__((always_inline)) { return S::load_part(p + k, count); });
  }
  store_sums<S, kRowCount>(t, sums);
}

template <class S, class W>
M3_INLINE void tile_of(int rows, const Tile& t) {
  switch (rows) {
    case 1:
      return tile<S, W, 1>(t);
    case 2:
      return tile<S, W, 2>(t);
    case 3:
      if constexpr (S::kRows >= 3) return tile<S, W, 3>(t);
      break;
    case 4:
      if constexpr (S::kRows >= 4) return tile<S, W, 4>(t);
      break;
    case 5:
      if constexpr (S::kRows >= 5) return tile<S, W, 5>(t);
      break;
    case 6:
      if constexpr (S::kRows >= 6) return tile<S, W, 6>(t);
      break;
  }
}

// Rows are cut into tiles of nearly one size: tile i of `tiles` starts here.
template <class S>
M3_INLINE int64_t tiles_of(int64_t rows) {
  return (rows + S::kRows - 1) / S::kRows;
}
M3_INLINE int64_t tile_start(int64_t rows, int64_t tiles, int64_t i) { return rows * i / tiles; }

template <class S, class W>
static void widen_rows(const W* from, int64_t count, float* to) {
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
  if (type == Type::kF32) return std::memcpy(to, from, count * sizeof(float)), void();
  if (type == Type::kBF16) return widen_rows<S>(static_cast<const Bf16*>(from), count, to);
  widen_rows<S>(static_cast<const Fp16*>(from), count, to);
}

template <class S, class W>
static void stream_typed(const Product& p) {
  const int64_t tiles = tiles_of<S>(p.rows);
  const bool through_panel = sizeof(W) < 4 && tiles >= kTilesForPanel;
  const W* weight = static_cast<const W*>(p.weight);
  for (int64_t n = 0; n < p.columns; n += kColumns) {
    const int columns = int(p.columns - n < kColumns ? p.columns - n : kColumns);
    const W* strip = weight + n * p.weight_stride;
    int64_t k = 0;
    do {
      const int64_t width = p.k - k < p.piece ? p.k - k : p.piece;
      const bool last = k + width == p.k;
      Tile t;
      t.weight = strip + k;
      t.next = last ? (const void*)((uintptr_t)strip + kColumns * p.weight_stride * sizeof(W)) : strip + k + width;
      t.weight_stride = p.weight_stride;
      t.columns = columns;
      t.k = width;
      t.x_stride = p.x_stride, t.y_stride = p.y_stride;
      t.first = k == 0;
      t.bias = last && p.bias ? p.bias + n : nullptr;
      if (through_panel) {
        for (int c = 0; c < columns; c++)
          widen_rows<S>(strip + c * p.weight_stride + k, width, p.panel + c * kMostPiece);
        t.weight = p.panel, t.weight_stride = kMostPiece;
      }
      for (int64_t i = 0; i < tiles; i++) {
        const int64_t row = tile_start(p.rows, tiles, i);
        const int rows = int(tile_start(p.rows, tiles, i + 1) - row);
        t.x = p.x + row * p.x_stride + k;
        t.y = p.y + row * p.y_stride + n;
        if (through_panel)
          tile_of<S, float>(rows, t);
        else
          tile_of<S, W>(rows, t);
        t.next = t.weight;
      }
      k += width;
    } while (k < p.k);
  }
}

template <class S>
static void stream(const Product& p) {
  if (p.type == Type::kF32) return stream_typed<S, float>(p);
  if (p.type == Type::kBF16) return stream_typed<S, Bf16>(p);
  stream_typed<S, Fp16>(p);
}

template <class S>
static void block(const Product& p) {
  const int64_t tiles = tiles_of<S>(p.rows), size = p.type == Type::kF32 ? 4 : 2;
  int64_t k = 0;
  do {
    const int64_t width = p.k - k < p.piece ? p.k - k : p.piece;
    const float* weight = static_cast<const float*>(p.weight) + k;
    int64_t stride = p.weight_stride;
    if (p.type != Type::kF32) {
      for (int64_t n = 0; n < p.columns; n++)
        widen<S>(static_cast<const char*>(p.weight) + (n * p.weight_stride + k) * size, p.type, width,
                 p.panel + n * kMostPiece);
      weight = p.panel, stride = kMostPiece;
    }
    Tile t;
    t.weight_stride = stride;
    t.k = width;
    t.x_stride = p.x_stride, t.y_stride = p.y_stride;
    t.first = k == 0;
    for (int64_t i = 0; i < tiles; i++) {
      const int64_t row = tile_start(p.rows, tiles, i);
      const int rows = int(tile_start(p.rows, tiles, i + 1) - row);
      t.x = p.x + row * p.x_stride + k;
      for (int64_t n = 0; n < p.columns; n += kColumns) {
        const bool more = n + kColumns < p.columns;
        t.columns = int(more ? kColumns : p.columns - n);
        t.weight = weight + n * stride;
        t.next = more ? weight + (n + kColumns) * stride : weight;
        t.y = p.y + row * p.y_stride + n;
        t.bias = p.bias && k + width == p.k ? p.bias + n : nullptr;
        tile_of<S, float>(rows, t);
      }
    }
    k += width;
  } while (k < p.k);
}
