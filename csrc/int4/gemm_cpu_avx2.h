// The AVX2 trait and the row operations of every x86 file. Included inside an anonymous namespace, after
// gemm_cpu_kernels.h.

struct Avx2 {
  static constexpr int kLanes = 8, kDirectAcc = 8, kWidenTiles = 2, kSkinnyRows = 8, kSkinnyAcc = 10;
  static constexpr bool kRawLow = false;
  static constexpr int panel_rows(Mode mode) { return mode == Mode::kInt8 ? 4 : 6; }
  static constexpr int panel_vectors(Mode) { return 1; }
  using I = __m256i;
  using F = __m256;

  static inline void pin(I& a) {
    __asm__ volatile("" : "+x"(a));
  }  // gcc otherwise reassociates integer sums and spills
  static inline void pin(F& a) { __asm__ volatile("" : "+x"(a)); }
  static inline I zero(I) { return _mm256_setzero_si256(); }
  static inline F zero(F) { return _mm256_setzero_ps(); }
  static inline I load(const I* p) { return _mm256_loadu_si256(p); }
  static inline F load(const F* p) { return _mm256_loadu_ps((const float*)p); }
  static inline void store(float* p, F a) { _mm256_storeu_ps(p, a); }
  static inline void store(int32_t* p, I a) { _mm256_storeu_si256((I*)p, a); }
  static inline void store(int32_t* p, F a) { _mm256_storeu_ps((float*)p, a); }
  template <int t>
  static inline I words(const uint8_t* row, int v) {
    return load((const I*)(row + ((v ^ t) * 32)));
  }
  template <int shift>
  static inline I nibbles(I w, int32_t mask) {
    if constexpr (shift > 0) w = _mm256_srli_epi32(w, shift);
    return _mm256_and_si256(w, _mm256_set1_epi32(mask));
  }
  template <int p>
  static inline F minus_base(I w, F base) {
    const I bits =
        _mm256_or_si256(_mm256_and_si256(w, _mm256_set1_epi32(0xF << p)), _mm256_set1_epi32((127 + 23 - p) << 23));
    return _mm256_sub_ps(_mm256_castsi256_ps(bits), base);
  }
  static inline F to_float(I a) { return _mm256_cvtepi32_ps(a); }
  static inline I broadcast_i(const int32_t* p) { return _mm256_set1_epi32(*p); }
  static inline F broadcast_f(const float* p) { return _mm256_broadcast_ss(p); }
  static inline F splat(float f) { return _mm256_set1_ps(f); }
  static inline F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static inline F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static inline I sub(I a, I b) { return _mm256_sub_epi32(a, b); }
  template <int bits>
  static inline I shift_left(I a) {
    return _mm256_slli_epi32(a, bits);
  }
  static inline I multiply(I a, int32_t b) { return _mm256_mullo_epi32(a, _mm256_set1_epi32(b)); }
  static inline I multiply16(I a, int32_t b) { return _mm256_madd_epi16(a, _mm256_set1_epi32(b & 0xFFFF)); }
  static inline I dot8(I acc16, I w, I x) { return _mm256_add_epi16(acc16, _mm256_maddubs_epi16(w, x)); }
  static inline I widen(I acc32, I acc16) {
    return _mm256_add_epi32(acc32, _mm256_madd_epi16(acc16, _mm256_set1_epi16(1)));
  }
  static inline I dot16(I acc, I w, I x) { return _mm256_add_epi32(acc, _mm256_madd_epi16(w, x)); }
  static inline void load_scales(const void* scales, Type type, int64_t offset, float* out) {
    if (type == Type::kF32) return load_scales_scalar(scales, type, offset, out);
    for (int i = 0; i < kTileN; i += 8) {
      const __m128i half = _mm_loadu_si128((const __m128i*)((const uint16_t*)scales + offset + i));
      store(out + i, type == Type::kF16 ? _mm256_cvtph_ps(half)
                                        : _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16)));
    }
  }
};

inline float horizontal_sum(__m256 a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

inline float horizontal_max(__m256 a) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}

inline __m128i to_bytes(__m256i low, __m256i high) {  // columns 0-7, 8-15 of a k-tile -> bytes in stored order
  __m256i q = _mm256_packs_epi32(low, high);          // 0-3, 8-11 | 4-7, 12-15
  q = _mm256_packs_epi16(q, q);
  const __m128i pairs = _mm_unpacklo_epi64(_mm256_castsi256_si128(q), _mm256_extracti128_si256(q, 1));
  return _mm_shuffle_epi8(pairs, _mm_setr_epi8(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15));
}

inline __m256i low_byte(__m256i q) { return _mm256_srai_epi32(_mm256_slli_epi32(q, 24), 24); }  // as a signed digit

inline int32_t horizontal_sum(__m256i a) {
  __m128i s = _mm_add_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
  s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4E));
  return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xB1)));
}

bool pack_row(Mode mode, const float* x, const Block* blocks, int num_blocks, int32_t* packed, int64_t plane_stride,
              float* scale, int32_t* sum) {
  const __m256 absolute = _mm256_castsi256_ps(_mm256_set1_epi32(0x7FFFFFFF));
  bool good = true;
  for (int block = 0; block < num_blocks; block++) {
    const Block& b = blocks[block];
    const float* in = x + (int64_t)b.tile * kTileK;
    int32_t* out = packed + (int64_t)b.tile * words_per_tile(mode);
    if (mode == Mode::kExact) {
      for (int i = 0; i < b.tiles; i++, in += kTileK, out += 16) {
        const __m256 low = _mm256_loadu_ps(in), high = _mm256_loadu_ps(in + 8);  // columns 0-7, 8-15
        const __m256 even = _mm256_unpacklo_ps(low, high);                       // t = 0 and 2
        const __m256 odd = _mm256_unpackhi_ps(low, high);                        // t = 1 and 3
        _mm256_storeu_ps((float*)out, _mm256_permute2f128_ps(even, odd, 0x20));
        _mm256_storeu_ps((float*)out + 8, _mm256_permute2f128_ps(even, odd, 0x31));
      }
      continue;
    }
    __m256 tops = _mm256_setzero_ps(), totals = _mm256_setzero_ps();
    for (int i = 0; i < 2 * b.tiles; i++) {
      const __m256 a = _mm256_and_ps(_mm256_loadu_ps(in + 8 * i), absolute);
      tops = _mm256_max_ps(tops, a);
      totals = _mm256_add_ps(totals, a);
    }
    const float top = horizontal_max(tops), limit = kLimit[int(mode)];
    good = good && can_round(mode, top, horizontal_sum(totals), b.columns);
    const __m256 inverse = _mm256_set1_ps(top > 0.0f && good ? limit / top : 0.0f);
    scale[block] = top / limit;
    __m256i sums[3] = {};
    for (int i = 0; i < b.tiles; i++, in += kTileK, out += words_per_tile(mode)) {
      __m256i low = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(in), inverse));
      __m256i high = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(in + 8), inverse));
      for (int plane = planes_of(mode) - 1; plane > 0; plane--) {  // the last digit first
        const __m256i low_digit = low_byte(low), high_digit = low_byte(high);
        sums[plane] = _mm256_add_epi32(sums[plane], _mm256_add_epi32(low_digit, high_digit));
        _mm_storeu_si128((__m128i*)(out + plane * plane_stride), to_bytes(low_digit, high_digit));
        low = _mm256_srai_epi32(_mm256_sub_epi32(low, low_digit), 8);
        high = _mm256_srai_epi32(_mm256_sub_epi32(high, high_digit), 8);
      }
      sums[0] = _mm256_add_epi32(sums[0], _mm256_add_epi32(low, high));
      if (mode == Mode::kInt16)
        _mm256_storeu_si256((__m256i*)out, _mm256_shuffle_epi32(_mm256_packs_epi32(low, high), 0xD8));
      else
        _mm_storeu_si128((__m128i*)out, to_bytes(low, high));
    }
    for (int plane = 0; plane < planes_of(mode); plane++) sum[plane * num_blocks + block] = horizontal_sum(sums[plane]);
  }
  return good;
}

// Position 32h + 4g + a -> row 16a + 8h + g: an 8 x 4 transpose for each h.
void to_row_order(const float* c, float* row) {
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  for (int h = 0; h < 2; h++, c += 32, row += 8) {
    const __m256 c0 = _mm256_loadu_ps(c), c1 = _mm256_loadu_ps(c + 8), c2 = _mm256_loadu_ps(c + 16),
                 c3 = _mm256_loadu_ps(c + 24);
    const __m256 a = _mm256_unpacklo_ps(c0, c1),
                 b = _mm256_unpackhi_ps(c0, c1);  // g 0 2 | 1 3, columns a = 0, 1 and 2, 3
    const __m256 d = _mm256_unpacklo_ps(c2, c3), e = _mm256_unpackhi_ps(c2, c3);
    _mm256_storeu_ps(row, _mm256_permutevar8x32_ps(_mm256_shuffle_ps(a, d, 0x44), order));
    _mm256_storeu_ps(row + 16, _mm256_permutevar8x32_ps(_mm256_shuffle_ps(a, d, 0xEE), order));
    _mm256_storeu_ps(row + 32, _mm256_permutevar8x32_ps(_mm256_shuffle_ps(b, e, 0x44), order));
    _mm256_storeu_ps(row + 48, _mm256_permutevar8x32_ps(_mm256_shuffle_ps(b, e, 0xEE), order));
  }
}

// exp(x) for x <= 88, within 2 ulp: 2^n * p(r), Cephes' polynomial. Below -87 it goes to 0.
inline __m256 exponential(__m256 x) {
  x = _mm256_min_ps(_mm256_max_ps(x, _mm256_set1_ps(-104.0f)), _mm256_set1_ps(88.7f));
  const __m256 n =
      _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693359375f), x);
  r = _mm256_fnmadd_ps(n, _mm256_set1_ps(-2.12194440e-4f), r);
  __m256 p = _mm256_set1_ps(1.9875691500e-4f);
  constexpr float coefficients[] = {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f,
                                    5.0000001201e-1f};
  for (float coefficient : coefficients) p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(coefficient));
  p = _mm256_add_ps(_mm256_fmadd_ps(p, _mm256_mul_ps(r, r), r), _mm256_set1_ps(1.0f));
  const __m256i half = _mm256_srai_epi32(_mm256_cvtps_epi32(n), 1);  // two factors: 2^n itself may be subnormal
  const __m256i rest = _mm256_sub_epi32(_mm256_cvtps_epi32(n), half), bias = _mm256_set1_epi32(127);
  p = _mm256_mul_ps(p, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(half, bias), 23)));
  return _mm256_mul_ps(p, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(rest, bias), 23)));
}

void silu_mul(float* gate, const float* up, int64_t count) {
  for (int64_t i = 0; i < count; i += 8) {
    alignas(32) float tail_gate[8] = {}, tail_up[8] = {};
    const int64_t rest = count - i < 8 ? count - i : 8;
    if (rest < 8)
      for (int64_t j = 0; j < rest; j++) tail_gate[j] = gate[i + j], tail_up[j] = up[i + j];
    const __m256 g = rest < 8 ? _mm256_load_ps(tail_gate) : _mm256_loadu_ps(gate + i);
    const __m256 u = rest < 8 ? _mm256_load_ps(tail_up) : _mm256_loadu_ps(up + i);
    // min and max drop a NaN; g / (1 + ...) brings it back
    const __m256 e = exponential(_mm256_sub_ps(_mm256_setzero_ps(), g));
    const __m256 y = _mm256_mul_ps(_mm256_div_ps(g, _mm256_add_ps(_mm256_set1_ps(1.0f), e)), u);
    if (rest == 8)
      _mm256_storeu_ps(gate + i, y);
    else {
      _mm256_store_ps(tail_gate, y);
      for (int64_t j = 0; j < rest; j++) gate[i + j] = tail_gate[j];
    }
  }
}
