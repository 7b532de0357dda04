// The CPU kernels, told once over a SIMD trait S. Included by each gemm_cpu_<isa>.cpp inside an anonymous namespace.
//
// Work of one call: one n-tile of W (64 rows, streamed once) times `rows` packed activation rows, block by block (a
// block is at most 128 columns with one weight scale and one activation scale):
//   int8     acc32[row, n] += sum_4 u * q8    (vpdpbusd, or vpmaddubsw: 8 products of 15 * 127 * 2 stay inside int16)
//   int16    acc32[row, n] += sum_2 u * q16   (vpdpwssd or vpmaddwd)
//   int24    int8 three times: the planes of a row are three rows, added up at the end of the block
//   exact    acc[row, n]    = fma(float(u - zero), x, acc), k in stored order
// and at the end of a block c[row, n] += acc * scale_w, or (acc - zero * sum(q)) * scale_w * scale_x. Few rows take the
// nibbles apart in registers (Direct); more rows share a panel that was taken apart once into L1 (Panel); where there
// are 16 vector registers, 2 to 8 rows go together through each chunk of W (Skinny). Per row all perform the same
// operations in the same order, so a row's result does not depend on how many rows there are.
//
// A trait offers: kLanes (words of a vector), I and F (vectors), kDirectAcc (accumulators that fit for Direct),
// panel_rows and panel_vectors (register block of Panel), kWidenTiles (k-tiles after which a 16-bit accumulator must be
// widened; 0: dot8 accumulates in 32 bits), kRawLow (dot8 takes any unsigned byte), kSkinnyRows (0: no Skinny) and
// kSkinnyAcc (its accumulators), and the functions used below.
// words<t>(row, v) undoes the tile's xor: vector v holds the words of positions kLanes * v and on.

#define M3_INLINE static inline __attribute__((always_inline))

// W is streamed once. Far ahead into L2, near ahead into L1: a demand load that misses L1 would let the multiplications
// that wait for it fill the scheduler, and memory stand idle while they run. Measured in docs/log.md.
constexpr int kFarBytes = 16384, kNearBytes = 2048;
constexpr int kGroupsAhead = 4;
constexpr int kExpand[kModes] = {4, 2, 1,
                                 1};  // operands that one word yields per nibble half: 4 bytes, 2 pairs, 1 quadruple

M3_INLINE void prefetch_ahead(const uint8_t* w, int bytes) {
  for (int line = 0; line < bytes; line += 64) {
    __builtin_prefetch(w + line + kFarBytes, 0, 2);
    __builtin_prefetch(w + line + kNearBytes, 0, 3);
  }
}

template <class S, Mode kMode>
struct Acc {
  using T = typename S::I;
  using X = typename S::I;
};
template <class S>
struct Acc<S, Mode::kExact> {
  using T = typename S::F;
  using X = typename S::F;
};

// The e-th operand of word vector v: both nibble halves. An exact operand is float(u - z): a nibble at bits p..p+3 of
// the mantissa of 2^(23 - p) makes 2^(23 - p) + u, from which base[p / 4] = 2^(23 - p) + z is subtracted without
// rounding. kRaw leaves the high half in the low int8 operand, low + 16 high: one instruction less, undone once a
// block.
template <class S, Mode kMode, int e, bool kRaw>
M3_INLINE void operands(typename S::I w, const float (*base)[kTileN], int v, typename Acc<S, kMode>::X& low,
                        typename Acc<S, kMode>::X& high) {
  if constexpr (kMode == Mode::kInt8 || kMode == Mode::kInt24) {
    low = kRaw ? w : S::template nibbles<0>(w, 0x0F0F0F0F);
    high = S::template nibbles<4>(w, 0x0F0F0F0F);
  } else if constexpr (kMode == Mode::kInt16) {
    low = S::template nibbles<8 * e>(w, 0x000F000F);
    high = S::template nibbles<8 * e + 4>(w, 0x000F000F);
  } else {
    constexpr int p = 8 * (e % 2);
    if constexpr (e >= 2) w = S::template nibbles<16>(w, 0xFFFF);
    low = S::template minus_base<p>(w, S::load((const typename S::F*)(base[p / 4] + v * S::kLanes)));
    high = S::template minus_base<p + 4>(w, S::load((const typename S::F*)(base[p / 4 + 1] + 32 + v * S::kLanes)));
  }
}

template <class S, Mode kMode>
M3_INLINE typename Acc<S, kMode>::T multiply_add(typename Acc<S, kMode>::T acc, typename Acc<S, kMode>::X w,
                                                 typename Acc<S, kMode>::X x) {
  if constexpr (kMode == Mode::kInt8 || kMode == Mode::kInt24)
    return S::dot8(acc, w, x);
  else if constexpr (kMode == Mode::kInt16)
    return S::dot16(acc, w, x);
  else
    return S::fma(w, x, acc);
}

template <class S, Mode kMode>
M3_INLINE typename Acc<S, kMode>::X broadcast(const int32_t* x) {
  if constexpr (kMode == Mode::kExact)
    return S::broadcast_f(reinterpret_cast<const float*>(x));
  else
    return S::broadcast_i(x);
}

// What a block needs to know of W besides the nibbles, in position order.
struct alignas(64) BlockScale {
  float scales[kTileN];
  int32_t zeros[kTileN];
  float base[4][kTileN];  // 2^(23 - 4 i) + zero

  template <class S, Mode kMode>
  void load(const TileArgs& a, int64_t group, bool first) {
    const int64_t bytes = a.scale_type == Type::kF32 ? 4 * kTileN : 2 * kTileN;
    for (int64_t line = 0; line < bytes; line += 64)
      __builtin_prefetch((const char*)a.scales + (group + kGroupsAhead) * bytes + line, 0, 3);
    if (a.zeros) __builtin_prefetch(a.zeros + (group + kGroupsAhead) * kTileN, 0, 3);
    S::load_scales(a.scales, a.scale_type, group * kTileN, scales);
    if (!a.zeros && !first) return;
    for (int i = 0; i < kTileN; i++) zeros[i] = a.zeros ? a.zeros[group * kTileN + i] : 8;
    if constexpr (kMode == Mode::kExact)
      for (int p = 0; p < 4; p++)
        for (int i = 0; i < kTileN; i++) base[p][i] = (float)((1 << (23 - 4 * p)) + zeros[i]);
  }
};

// One word step (k-tile, t): expands the operands of kVectors word vectors and multiplies them into kRows accumulators
// each.
template <class S, Mode kMode, int kRows, int kVectors, bool kPanel, int e>
M3_INLINE void step(const typename S::I (&w)[kVectors], const float (*base)[kTileN], int v0, const int32_t*& panel,
                    const int32_t* x, int64_t stride, typename Acc<S, kMode>::T (&acc)[kRows][kVectors][2]) {
  if constexpr (e < kExpand[int(kMode)]) {
    typename Acc<S, kMode>::X low[kVectors], high[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; v++) {
      if constexpr (kPanel) {
        low[v] = S::load((const typename Acc<S, kMode>::X*)(panel + (2 * v) * S::kLanes));
        high[v] = S::load((const typename Acc<S, kMode>::X*)(panel + (2 * v + 1) * S::kLanes));
      } else {
        operands<S, kMode, e, S::kRawLow>(w[v], base, v0 + v, low[v], high[v]);
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRows; r++) {
      typename Acc<S, kMode>::X xb = broadcast<S, kMode>(x + r * stride + e);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; v++) {
        acc[r][v][0] = multiply_add<S, kMode>(acc[r][v][0], low[v], xb);
        S::pin(acc[r][v][0]);
        acc[r][v][1] = multiply_add<S, kMode>(acc[r][v][1], high[v], xb);
        S::pin(acc[r][v][1]);
      }
    }
    if constexpr (kPanel) panel += 2 * kVectors * S::kLanes;
    step<S, kMode, kRows, kVectors, kPanel, e + 1>(w, base, v0, panel, x, stride, acc);
  }
}

template <class S, Mode kMode, int kRows, int kVectors, bool kPanel, int t>
M3_INLINE void tile_steps(const uint8_t* tile, const float (*base)[kTileN], int v0, const int32_t*& panel,
                          const int32_t* x, int64_t stride, typename Acc<S, kMode>::T (&acc)[kRows][kVectors][2]) {
  if constexpr (t < 4) {
    typename S::I w[kVectors] = {};
    if constexpr (!kPanel) {
      if (v0 == 0) prefetch_ahead(tile + t * 128, 128);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; v++) w[v] = S::template words<t>(tile + t * 128, v0 + v);
    }
    step<S, kMode, kRows, kVectors, kPanel, 0>(w, base, v0, panel, x + t * kExpand[int(kMode)], stride, acc);
    tile_steps<S, kMode, kRows, kVectors, kPanel, t + 1>(tile, base, v0, panel, x, stride, acc);
  }
}

// kRows rows times kVectors word vectors (2 * kVectors * kLanes rows of W) over one block, added to c.
template <class S, Mode kMode, int kRows, int kVectors, bool kPanel>
M3_INLINE void micro(const uint8_t* tiles, const int32_t* panel, int num_tiles, int v0, const BlockScale& scale,
                     const TileArgs& a, int64_t row, int block, bool first) {
  using T = typename Acc<S, kMode>::T;
  constexpr int kPlanes = planes_of(kMode), kAll = kRows * kPlanes;
  const int32_t* x = a.x + row * kPlanes * a.x_stride + (int64_t)a.blocks[block].tile * words_per_tile(kMode);
  T acc[kAll][kVectors][2];
#pragma GCC unroll 16
  for (int r = 0; r < kAll; r++)
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; v++) acc[r][v][0] = acc[r][v][1] = S::zero(T{});
  if constexpr (kExpand[int(kMode)] == 1 && S::kWidenTiles > 0) {
    for (int tile = 0; tile < num_tiles; tile += S::kWidenTiles) {
      T narrow[kAll][kVectors][2];
#pragma GCC unroll 16
      for (int r = 0; r < kAll; r++)
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; v++) narrow[r][v][0] = narrow[r][v][1] = S::zero(T{});
      const int stop = num_tiles - tile < S::kWidenTiles ? num_tiles - tile : S::kWidenTiles;
#pragma GCC unroll 1
      for (int i = 0; i < stop; i++, tiles += kTileBytes, x += words_per_tile(kMode))
        tile_steps<S, kMode, kAll, kVectors, kPanel, 0>(tiles, scale.base, v0, panel, x, a.x_stride, narrow);
#pragma GCC unroll 16
      for (int r = 0; r < kAll; r++)
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; v++)
          for (int h = 0; h < 2; h++) acc[r][v][h] = S::widen(acc[r][v][h], narrow[r][v][h]);
    }
  } else {
#pragma GCC unroll 1
    for (int tile = 0; tile < num_tiles; tile++, tiles += kTileBytes, x += words_per_tile(kMode))
      tile_steps<S, kMode, kAll, kVectors, kPanel, 0>(tiles, scale.base, v0, panel, x, a.x_stride, acc);
  }
  if constexpr (kExpand[int(kMode)] == 1 && !kPanel && S::kRawLow) {
#pragma GCC unroll 16
    for (int r = 0; r < kAll; r++)
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; v++) acc[r][v][0] = S::sub(acc[r][v][0], S::template shift_left<4>(acc[r][v][1]));
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; r++) {
    const int64_t cell = (row + r) * kPlanes * a.num_blocks + block;
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; v++)
#pragma GCC unroll 2
      for (int h = 0; h < 2; h++) {
        const int position = 32 * h + (v0 + v) * S::kLanes;
        float* c = a.c + (row + r) * kTileN + position;
        const auto s = S::load((const typename S::F*)(scale.scales + position));
        const auto old = first ? S::zero(typename S::F{}) : S::load((const typename S::F*)c);
        if constexpr (kMode == Mode::kExact) {
          S::store(c, S::fma(acc[r][v][h], s, old));
        } else {
          const auto z = S::load((const typename S::I*)(scale.zeros + position));
          typename S::F total;
#pragma GCC unroll 4
          for (int plane = 0; plane < kPlanes; plane++) {
            const int32_t sum =
                a.x_sum[cell + plane * a.num_blocks];  // of bytes: at most 2^14, a 16-bit multiplier will do
            const auto product = kMode == Mode::kInt16 ? S::multiply(z, sum) : S::multiply16(z, sum);
            const auto centred = S::to_float(S::sub(acc[r * kPlanes + plane][v][h], product));
            total = plane ? S::fma(total, S::splat(256.0f), centred) : centred;
          }
          S::store(c, S::fma(total, S::mul(s, S::splat(a.x_scale[cell])), old));
        }
      }
  }
}

template <class S, Mode kMode, int e>
M3_INLINE void unpack_word(typename S::I w, const float (*base)[kTileN], int v, int32_t* panel) {
  if constexpr (e < kExpand[int(kMode)]) {
    typename Acc<S, kMode>::X low, high;
    operands<S, kMode, e, false>(w, base, v, low, high);
    constexpr int step_words = 2 * S::panel_vectors(kMode) * S::kLanes;
    S::store(panel + e * step_words, low);
    S::store(panel + e * step_words + S::kLanes, high);
    unpack_word<S, kMode, e + 1>(w, base, v, panel);
  }
}

// Panel layout: [vector block][k-tile][t][e][vector][half][lane] words; a vector block is panel_vectors() vectors.
template <class S, Mode kMode, int t>
M3_INLINE void unpack_steps(const uint8_t* tile, const float (*base)[kTileN], int num_tiles, int32_t* panel) {
  if constexpr (t < 4) {
    constexpr int step_words = 2 * S::panel_vectors(kMode) * S::kLanes, word_steps = kExpand[int(kMode)];
#pragma GCC unroll 8
    for (int v = 0; v < 32 / S::kLanes; v++) {
      int32_t* out = panel + ((int64_t)(v / S::panel_vectors(kMode)) * num_tiles * 4 + t) * word_steps * step_words +
                     (v % S::panel_vectors(kMode)) * 2 * S::kLanes;
      unpack_word<S, kMode, 0>(S::template words<t>(tile + t * 128, v), base, v, out);
    }
    unpack_steps<S, kMode, t + 1>(tile, base, num_tiles, panel);
  }
}

template <class S, Mode kMode, int kRows>
static __attribute__((noinline)) void direct(const uint8_t* tiles, int num_tiles, const BlockScale& scale,
                                             const TileArgs& a, int64_t row, int block, bool first) {
  constexpr int kAll = 32 / S::kLanes, fit = S::kDirectAcc / (2 * kRows * planes_of(kMode));
  constexpr int kVectors = fit >= kAll ? kAll : fit >= 4 ? 4 : fit >= 2 ? 2 : 1;
#pragma GCC unroll 1
  for (int v0 = 0; v0 < kAll; v0 += kVectors)
    micro<S, kMode, kRows, kVectors, false>(tiles, nullptr, num_tiles, v0, scale, a, row, block, first);
}

template <class S, Mode kMode, int kRows>
static __attribute__((noinline)) void panel_rows(const int32_t* panel, int num_tiles, int v0, const BlockScale& scale,
                                                 const TileArgs& a, int64_t row, int block, bool first) {
  micro<S, kMode, kRows, S::panel_vectors(kMode), true>(nullptr, panel, num_tiles, v0, scale, a, row, block, first);
}

// Skinny: 2 to S::kSkinnyRows rows where vector registers are few. A pass multiplies kVectors word vectors, one or both
// nibble halves of them, into all rows over a chunk of k-tiles; sums of rows wait in L1 between the chunks of a block.
// An operand is taken apart once for all rows, and each pass prefetches its share of the chunks to come, so that memory
// is asked evenly while the products run. x is interleaved by row: all rows of a word have one address. The sums of a
// row meet the same operations in the same order as in micro().
constexpr int kChunkTiles = 2;  // at most kWidenTiles
constexpr int kSkinnyMax = 8;   // room for the sums of so many rows

// One half of operands(): h = 0 the low nibbles, 1 the high ones.
template <class S, Mode kMode, int e, int h>
M3_INLINE typename Acc<S, kMode>::X operand(typename S::I w, const float (*base)[kTileN], int v) {
  if constexpr (kMode == Mode::kInt8 || kMode == Mode::kInt24) {
    return S::template nibbles<4 * h>(w, 0x0F0F0F0F);
  } else if constexpr (kMode == Mode::kInt16) {
    return S::template nibbles<8 * e + 4 * h>(w, 0x000F000F);
  } else {
    constexpr int p = 8 * (e % 2) + 4 * h;
    if constexpr (e >= 2) w = S::template nibbles<16>(w, 0xFFFF);
    return S::template minus_base<p>(w, S::load((const typename S::F*)(base[p / 4] + 32 * h + v * S::kLanes)));
  }
}

template <class S, Mode kMode, int kRows, int kVectors, int kHalves, int h, int t, int e>
M3_INLINE void skinny_steps(const uint8_t* const (&w)[kVectors][4], int64_t at, const float (*base)[kTileN], int v0,
                            const int32_t* x, typename Acc<S, kMode>::T (&acc)[kHalves][kVectors][kRows]) {
  if constexpr (t < 4) {
    const int32_t* xs = x + (t * kExpand[int(kMode)] + e) * kRows;
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; v++) {
      const auto word = S::load((const typename S::I*)(w[v][t] + at));
#pragma GCC unroll 2
      for (int i = 0; i < kHalves; i++) {
        const auto o =
            i + h ? operand<S, kMode, e, 1>(word, base, v0 + v) : operand<S, kMode, e, 0>(word, base, v0 + v);
#pragma GCC unroll 16
        for (int r = 0; r < kRows; r++) {
          acc[i][v][r] = multiply_add<S, kMode>(acc[i][v][r], o, broadcast<S, kMode>(xs + r));
          S::pin(acc[i][v][r]);
        }
      }
    }
    constexpr bool kNext = e + 1 == kExpand[int(kMode)];
    skinny_steps<S, kMode, kRows, kVectors, kHalves, h, t + kNext, kNext ? 0 : e + 1>(w, at, base, v0, x, acc);
  }
}

template <class S, Mode kMode, int kRows, int kVectors, int kHalves, int h>
M3_INLINE void skinny_pass(const uint8_t* tiles, int num_tiles, int v0, const BlockScale& scale, const TileArgs& a,
                           const int32_t* x, int block, bool start, bool end) {
  using T = typename Acc<S, kMode>::T;
  constexpr bool kNarrow = kExpand[int(kMode)] == 1 && S::kWidenTiles > 0;
  const uint8_t* w[kVectors][4];
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; v++)
#pragma GCC unroll 4
    for (int t = 0; t < 4; t++) w[v][t] = tiles + t * 128 + ((v0 + v) ^ t) * 4 * S::kLanes;
  T* sums = (T*)a.panel + (h * 32 / S::kLanes + v0) * kSkinnyMax;
  constexpr int kHalf = 32 / S::kLanes * kSkinnyMax;
  T acc[kHalves][kVectors][kRows];
#pragma GCC unroll 2
  for (int i = 0; i < kHalves; i++)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; v++)
#pragma GCC unroll 16
      for (int r = 0; r < kRows; r++)
        acc[i][v][r] = kNarrow || start ? S::zero(T{}) : S::load(sums + i * kHalf + v * kSkinnyMax + r);
#pragma GCC unroll 1
  for (int64_t at = 0; at < num_tiles * kTileBytes; at += kTileBytes, x += words_per_tile(kMode) * kRows)
    skinny_steps<S, kMode, kRows, kVectors, kHalves, h, 0, 0>(w, at, scale.base, v0, x, acc);
  if constexpr (kNarrow) {
#pragma GCC unroll 2
    for (int i = 0; i < kHalves; i++)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; v++)
#pragma GCC unroll 16
        for (int r = 0; r < kRows; r++)
          acc[i][v][r] = S::widen(start ? S::zero(T{}) : S::load(sums + i * kHalf + v * kSkinnyMax + r), acc[i][v][r]);
  }
  if (!end) {
#pragma GCC unroll 2
    for (int i = 0; i < kHalves; i++)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; v++)
#pragma GCC unroll 16
        for (int r = 0; r < kRows; r++) S::store((int32_t*)(sums + i * kHalf + v * kSkinnyMax + r), acc[i][v][r]);
    return;
  }
#pragma GCC unroll 2
  for (int i = 0; i < kHalves; i++)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; v++) {
      const int position = 32 * (i + h) + (v0 + v) * S::kLanes;
      const auto s = S::load((const typename S::F*)(scale.scales + position));
#pragma GCC unroll 16
      for (int r = 0; r < kRows; r++) {
        float* c = a.c + r * kTileN + position;
        const auto old = block == 0 ? S::zero(typename S::F{}) : S::load((const typename S::F*)c);
        if constexpr (kMode == Mode::kExact) {
          S::store(c, S::fma(acc[i][v][r], s, old));
        } else {
          const int64_t cell = (int64_t)r * a.num_blocks + block;
          const auto z = S::load((const typename S::I*)(scale.zeros + position));
          const auto product = kMode == Mode::kInt16 ? S::multiply(z, a.x_sum[cell]) : S::multiply16(z, a.x_sum[cell]);
          const auto total = S::to_float(S::sub(acc[i][v][r], product));
          S::store(c, S::fma(total, S::mul(s, S::splat(a.x_scale[cell])), old));
        }
      }
    }
}

template <class S, Mode kMode, int kRows>
static __attribute__((noinline)) void skinny(const TileArgs& a) {
  BlockScale scale;
  constexpr int kHalves = 2 * kRows <= S::kSkinnyAcc ? 2 : 1, kVectors = 4 * kRows <= S::kSkinnyAcc ? 2 : 1;
  constexpr int kPasses = 32 / S::kLanes / kVectors, kShare = kChunkTiles * kTileBytes / kPasses;
  for (int block = 0; block < a.num_blocks; block++) {
    const Block& b = a.blocks[block];
    scale.template load<S, kMode>(a, b.group, block == 0);
    for (int i = 0; i < b.tiles; i += kChunkTiles) {
      const int count = b.tiles - i < kChunkTiles ? b.tiles - i : kChunkTiles;
      const uint8_t* tiles = a.tiles + (int64_t)(b.tile + i) * kTileBytes;
      const int32_t* x = a.x + (int64_t)(b.tile + i) * words_per_tile(kMode) * kRows;
      const bool start = i == 0, end = i + count == b.tiles;
#pragma GCC unroll 1
      for (int pass = 0; pass < kPasses; pass++) {
        const int v = pass * kVectors;
        prefetch_ahead(tiles + pass * kShare, kShare / (3 - kHalves));
        skinny_pass<S, kMode, kRows, kVectors, kHalves, 0>(tiles, count, v, scale, a, x, block, start, end);
        if constexpr (kHalves == 1) {
          prefetch_ahead(tiles + pass * kShare + kShare / 2, kShare / 2);
          skinny_pass<S, kMode, kRows, kVectors, 1, 1>(tiles, count, v, scale, a, x, block, start, end);
        }
      }
    }
  }
}

template <class S, Mode kMode>
static void tile(const TileArgs& a) {
  if constexpr (S::kSkinnyRows > 0 && planes_of(kMode) == 1) {
    static_assert(S::kSkinnyRows == kSkinnyMax);
    switch (a.rows) {
      case 2:
        return skinny<S, kMode, 2>(a);
      case 3:
        return skinny<S, kMode, 3>(a);
      case 4:
        return skinny<S, kMode, 4>(a);
      case 5:
        return skinny<S, kMode, 5>(a);
      case 6:
        return skinny<S, kMode, 6>(a);
      case 7:
        return skinny<S, kMode, 7>(a);
      case 8:
        return skinny<S, kMode, 8>(a);
      default:
        break;
    }
  }
  BlockScale scale;
  int32_t* panel = (int32_t*)a.panel;
  for (int block = 0; block < a.num_blocks; block++) {
    const Block& b = a.blocks[block];
    const bool first = block == 0;
    const uint8_t* tiles = a.tiles + (int64_t)b.tile * kTileBytes;
    scale.template load<S, kMode>(a, b.group, first);
    switch (a.rows) {
      case 1:
        direct<S, kMode, 1>(tiles, b.tiles, scale, a, 0, block, first);
        continue;
      case 2:
        direct<S, kMode, 2>(tiles, b.tiles, scale, a, 0, block, first);
        continue;
      case 3:
        direct<S, kMode, 3>(tiles, b.tiles, scale, a, 0, block, first);
        continue;
      case 4:
        direct<S, kMode, 4>(tiles, b.tiles, scale, a, 0, block, first);
        continue;
      default:
        break;
    }
    for (int i = 0; i < b.tiles; i++) {
      prefetch_ahead(tiles + i * kTileBytes, kTileBytes);
      unpack_steps<S, kMode, 0>(tiles + i * kTileBytes, scale.base, b.tiles,
                                panel + i * 4 * kExpand[int(kMode)] * 2 * S::panel_vectors(kMode) * S::kLanes);
    }
    const int64_t block_words = (int64_t)b.tiles * 4 * kExpand[int(kMode)] * 2 * S::panel_vectors(kMode) * S::kLanes;
    constexpr int kMax = S::panel_rows(kMode);
    const int64_t parts = (a.rows + kMax - 1) / kMax;
    for (int vb = 0; vb < 32 / S::kLanes / S::panel_vectors(kMode); vb++) {
      const int32_t* p = panel + vb * block_words;
      const int v0 = vb * S::panel_vectors(kMode);
      int64_t row = 0;
      for (int64_t part = 0; part < parts; part++) {  // rows spread evenly over the parts
        const int64_t stop = a.rows * (part + 1) / parts;
        switch (stop - row) {
          case 1:
            if constexpr (kMax >= 1) panel_rows<S, kMode, 1>(p, b.tiles, v0, scale, a, row, block, first);
            break;
          case 2:
            if constexpr (kMax >= 2) panel_rows<S, kMode, 2>(p, b.tiles, v0, scale, a, row, block, first);
            break;
          case 3:
            if constexpr (kMax >= 3) panel_rows<S, kMode, 3>(p, b.tiles, v0, scale, a, row, block, first);
            break;
          case 4:
            if constexpr (kMax >= 4) panel_rows<S, kMode, 4>(p, b.tiles, v0, scale, a, row, block, first);
            break;
          case 5:
            if constexpr (kMax >= 5) panel_rows<S, kMode, 5>(p, b.tiles, v0, scale, a, row, block, first);
            break;
          case 6:
            if constexpr (kMax >= 6) panel_rows<S, kMode, 6>(p, b.tiles, v0, scale, a, row, block, first);
            break;
          case 7:
            if constexpr (kMax >= 7) panel_rows<S, kMode, 7>(p, b.tiles, v0, scale, a, row, block, first);
            break;
          case 8:
            if constexpr (kMax >= 8) panel_rows<S, kMode, 8>(p, b.tiles, v0, scale, a, row, block, first);
            break;
          case 9:
            if constexpr (kMax >= 9) panel_rows<S, kMode, 9>(p, b.tiles, v0, scale, a, row, block, first);
            break;
          case 10:
            if constexpr (kMax >= 10) panel_rows<S, kMode, 10>(p, b.tiles, v0, scale, a, row, block, first);
            break;
          case 11:
            if constexpr (kMax >= 11) panel_rows<S, kMode, 11>(p, b.tiles, v0, scale, a, row, block, first);
            break;
          case 12:
            if constexpr (kMax >= 12) panel_rows<S, kMode, 12>(p, b.tiles, v0, scale, a, row, block, first);
            break;
          default:
            break;
        }
        row = stop;
      }
    }
  }
}

// fp32 bits of an fp16 or bf16 value; the vector traits have instructions for it.
static inline float half_to_float(uint16_t h) {
  const uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = (h >> 10) & 31, mantissa = h & 1023;
  union {
    uint32_t u;
    float f;
  } bits;
  if (exponent == 31)
    bits.u = sign | 0x7F800000 | (mantissa << 13);
  else if (exponent)
    bits.u = sign | ((exponent + 112) << 23) | (mantissa << 13);
  else {
    bits.f = (float)mantissa * 5.9604644775390625e-8f;  // 2^-24
    bits.u |= sign;
  }
  return bits.f;
}

static inline float bfloat_to_float(uint16_t h) {
  union {
    uint32_t u;
    float f;
  } bits = {(uint32_t)h << 16};
  return bits.f;
}

static inline void load_scales_scalar(const void* scales, Type type, int64_t offset, float* out) {
  for (int i = 0; i < kTileN; i++)
    out[i] = type == Type::kF32    ? ((const float*)scales)[offset + i]
             : type == Type::kBF16 ? bfloat_to_float(((const uint16_t*)scales)[offset + i])
                                   : half_to_float(((const uint16_t*)scales)[offset + i]);
}

constexpr float kLimit[kModes] = {0.0f, 32767.0f, 127.0f, 127 * 65536.0f};  // int24: the first digit stays a byte
// max|x| over the mean of the others, beyond which a row is not rounded; reference.py states the rule and the value for
// int16
constexpr float kOutlierRatio[kModes] = {0.0f, 1024.0f, 0.0f, 16.0f};
constexpr float kSmallestMax = 1e-30f;

// The rule of reference.py: can this block be rounded?
static inline bool can_round(Mode mode, float top, float total, int columns) {
  if (!(total <= 3.4028234e38f) || (top > 0.0f && top < kSmallestMax)) return false;
  const float ratio = kOutlierRatio[int(mode)];
  return ratio == 0.0f || !(top * (float)(columns - 1) > ratio * (total - top));
}
