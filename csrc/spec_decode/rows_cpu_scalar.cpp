// Portable kernels of rows of logits: vectors of four as the compiler's own vector type. The baseline of every build.
#include <cstring>

#include "spec_decode/rows_cpu_noise.h"

namespace m3::spec_decode::rows {
namespace {

#include "spec_decode/rows_cpu_kernels.h"

struct Scalar {
  static constexpr int kLanes = 4;
  typedef float F __attribute__((vector_size(16)));
  typedef int32_t I __attribute__((vector_size(16)));
  typedef uint32_t U __attribute__((vector_size(16)));

  static inline F load(const float* p) {
    F a;
    std::memcpy(&a, p, sizeof a);
    return a;
  }
  static inline F load(const Bf16* p) {
    return (F)U{(uint32_t)p[0].word << 16, (uint32_t)p[1].word << 16, (uint32_t)p[2].word << 16,
                (uint32_t)p[3].word << 16};
  }
  // Exponent and mantissa move into place; a multiplication puts the exponent right, subnormals included.
  static inline F load(const F16* p) {
    const U h = {p[0].word, p[1].word, p[2].word, p[3].word}, size = (h & 0x7FFFu) << 13;
    const U finite = (U)((F)size * splat(0x1p112f)), full = size | 0x7F800000u;
    return (F)((U)choose((I)(size >= 0x0F800000u), (F)full, (F)finite) | (h & 0x8000u) << 16);
  }
  static inline void store(float* p, F a) { std::memcpy(p, &a, sizeof a); }
  static inline F splat(float f) { return F{f, f, f, f}; }
  static inline F add(F a, F b) { return a + b; }
  static inline F sub(F a, F b) { return a - b; }
  static inline F mul(F a, F b) { return a * b; }
  static inline F fma(F a, F b, F c) { return a * b + c; }
  static inline F choose(I mask, F yes, F no) { return (F)(((I)yes & mask) | ((I)no & ~mask)); }
  static inline F min(F a, F b) { return choose(a < b, a, b); }
  static inline F max(F a, F b) { return choose(a > b, a, b); }
  static inline F where_greater(F a, F b, F yes, F no) { return choose(a > b, yes, no); }
  static inline F where_at_least(F a, F b, F yes) { return (F)((I)yes & (I)(a >= b)); }
  static inline F add_where_at_least(F sum, F a, F b, F more) { return add(sum, where_at_least(a, b, more)); }
  static inline unsigned at_least(F a, F b) {
    const I yes = a >= b;
    return (yes[0] & 1) | (yes[1] & 2) | (yes[2] & 4) | (yes[3] & 8);
  }
  static inline F allow(F a, uint32_t bits) {
    const I lane = {1, 2, 4, 8}, word = {(int)bits, (int)bits, (int)bits, (int)bits};
    return choose((word & lane) == lane, a, splat(kNothing));
  }
  static inline F scaled_exp(F p, F t, F, F x) { return (F)((I)(p * (F)((I)t << 23)) & ~(I)(x < splat(kSmallest))); }
  static inline F split(F u, F& k) {
    const I exponent = ((I)u - 0x3F3504F3) >> 23;  // sqrt(1/2)
    k = __builtin_convertvector(exponent, F);
    return (F)((I)u - (exponent << 23));
  }
  static inline float sum(F a) { return (a[0] + a[2]) + (a[1] + a[3]); }
  static inline float top(F a) {
    const float low = a[0] > a[2] ? a[0] : a[2], high = a[1] > a[3] ? a[1] : a[3];
    return low > high ? low : high;
  }
  static inline void keep(unsigned mask, F a, int32_t first, float* out, int32_t* ids) {
    for (int n = 0; mask; mask &= mask - 1, n++) {
      const int lane = __builtin_ctz(mask);
      out[n] = a[lane];
      if (ids) ids[n] = first + lane;
    }
  }

  static inline U splat_u(uint32_t a) { return U{a, a, a, a}; }
  static inline U load_u(const uint32_t* p) { return U{p[0], p[1], p[2], p[3]}; }
  static inline void store_u(uint32_t* p, U a) { std::memcpy(p, &a, sizeof a); }
  static inline U exclusive_or(U a, U b, U c) { return a ^ b ^ c; }
  static inline F high_24(U a) { return __builtin_convertvector((I)(a >> 8), F); }
  static inline F low_8(U a) { return __builtin_convertvector((I)(a & 255u), F); }
  static inline void multiply(U a, uint32_t m, U& high, U& low) {
    const uint64_t p0 = (uint64_t)a[0] * m, p1 = (uint64_t)a[1] * m, p2 = (uint64_t)a[2] * m, p3 = (uint64_t)a[3] * m;
    high = U{(uint32_t)(p0 >> 32), (uint32_t)(p1 >> 32), (uint32_t)(p2 >> 32), (uint32_t)(p3 >> 32)};
    low = U{(uint32_t)p0, (uint32_t)p1, (uint32_t)p2, (uint32_t)p3};
  }
  static inline U counters(uint32_t first) { return U{first, first + 1, first + 2, first + 3}; }
  static inline void interleave(U (&words)[4]) {
    const U a = words[0], b = words[1], c = words[2], d = words[3];
    for (int i = 0; i < 4; i++) words[i] = U{a[i], b[i], c[i], d[i]};
  }
};

}  // namespace

extern const Kernels kScalarRows = {scan<Scalar>, soften<Scalar>, find<Scalar>, collect<Scalar>, tally<Scalar>,
                                    add<Scalar>,  weigh<Scalar>,  race<Scalar>, perturb<Scalar>};

}  // namespace m3::spec_decode::rows
