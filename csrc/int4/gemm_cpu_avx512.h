// The AVX-512 trait (F, BW, VL, DQ). Included inside an anonymous namespace, after gemm_cpu_avx2.h.

struct Avx512 {
  static constexpr int kLanes = 16, kDirectAcc = 24, kWidenTiles = 2, kSkinnyRows = 0;
  static constexpr bool kRawLow = false;
  // A panel of fp32 for all 64 rows of W would fill L1: exact takes half at a time.
  static constexpr int panel_rows(Mode mode) { return mode == Mode::kExact ? 12 : mode == Mode::kInt8 ? 4 : 6; }
  static constexpr int panel_vectors(Mode mode) { return mode == Mode::kExact ? 1 : 2; }
  using I = __m512i;
  using F = __m512;

  static inline void pin(I& a) { __asm__ volatile("" : "+v"(a)); }
  static inline void pin(F& a) { __asm__ volatile("" : "+v"(a)); }
  static inline I zero(I) { return _mm512_setzero_si512(); }
  static inline F zero(F) { return _mm512_setzero_ps(); }
  static inline I load(const I* p) { return _mm512_loadu_si512(p); }
  static inline F load(const F* p) { return _mm512_loadu_ps(p); }
  static inline void store(float* p, F a) { _mm512_storeu_ps(p, a); }
  static inline void store(int32_t* p, I a) { _mm512_storeu_si512(p, a); }
  static inline void store(int32_t* p, F a) { _mm512_storeu_ps(p, a); }
  // 64 bytes hold the chunks of four g in the order of g ^ 2t: for odd t the two halves are exchanged.
  template <int t>
  static inline I words(const uint8_t* row, int v) {
    const I w = load((const I*)(row + ((v ^ (t >> 1)) * 64)));
    return t & 1 ? _mm512_permutexvar_epi64(_mm512_setr_epi64(4, 5, 6, 7, 0, 1, 2, 3), w)
                 : w;  // one instruction with the load
  }
  template <int shift>
  static inline I nibbles(I w, int32_t mask) {
    if constexpr (shift > 0) w = _mm512_srli_epi32(w, shift);
    return _mm512_and_si512(w, _mm512_set1_epi32(mask));
  }
  template <int p>
  static inline F minus_base(I w, F base) {  // 0xEA: (w & mask) | exponent
    const I bits =
        _mm512_ternarylogic_epi32(w, _mm512_set1_epi32(0xF << p), _mm512_set1_epi32((127 + 23 - p) << 23), 0xEA);
    return _mm512_sub_ps(_mm512_castsi512_ps(bits), base);
  }
  static inline F to_float(I a) { return _mm512_cvtepi32_ps(a); }
  static inline I broadcast_i(const int32_t* p) { return _mm512_set1_epi32(*p); }
  static inline F broadcast_f(const float* p) { return _mm512_set1_ps(*p); }
  static inline F splat(float f) { return _mm512_set1_ps(f); }
  static inline F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static inline F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static inline I sub(I a, I b) { return _mm512_sub_epi32(a, b); }
  template <int bits>
  static inline I shift_left(I a) {
    return _mm512_slli_epi32(a, bits);
  }
  static inline I multiply(I a, int32_t b) { return _mm512_mullo_epi32(a, _mm512_set1_epi32(b)); }
  static inline I multiply16(I a, int32_t b) { return _mm512_madd_epi16(a, _mm512_set1_epi32(b & 0xFFFF)); }
  static inline I dot8(I acc16, I w, I x) { return _mm512_add_epi16(acc16, _mm512_maddubs_epi16(w, x)); }
  static inline I widen(I acc32, I acc16) {
    return _mm512_add_epi32(acc32, _mm512_madd_epi16(acc16, _mm512_set1_epi16(1)));
  }
  static inline I dot16(I acc, I w, I x) { return _mm512_add_epi32(acc, _mm512_madd_epi16(w, x)); }
  static inline void load_scales(const void* scales, Type type, int64_t offset, float* out) {
    Avx2::load_scales(scales, type, offset, out);
  }
};
