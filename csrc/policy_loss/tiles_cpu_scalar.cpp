// Portable tile kernels: vectors of four as the compiler's own vector type. The baseline of every build.
#include <cstring>

#include "policy_loss/tiles_cpu.h"

namespace m3::policy_loss {
namespace {

#include "policy_loss/tiles_cpu_kernels.h"

struct Scalar {
  static constexpr int kLanes = 4;
  static constexpr bool kFused = false;
  typedef float F __attribute__((vector_size(16)));
  typedef int32_t I __attribute__((vector_size(16)));

  static inline F load(const float* p) {
    F a;
    std::memcpy(&a, p, sizeof a);
    return a;
  }
  static inline F load_part(const float* p, int count, float fill) {
    F a = splat(fill);
    for (int i = 0; i < count; i++) a[i] = p[i];
    return a;
  }
  static inline void store(float* p, F a) { std::memcpy(p, &a, sizeof a); }
  static inline void store_part(float* p, int count, F a) {
    for (int i = 0; i < count; i++) p[i] = a[i];
  }
  static inline F splat(float f) { return F{f, f, f, f}; }
  static inline F add(F a, F b) { return a + b; }
  static inline F sub(F a, F b) { return a - b; }
  static inline F mul(F a, F b) { return a * b; }
  static inline F div(F a, F b) { return a / b; }
  static inline F fma(F a, F b, F c) { return a * b + c; }
  static inline F choose(I mask, F yes, F no) { return (F)(((I)yes & mask) | ((I)no & ~mask)); }
  static inline F min(F a, F b) { return choose(a < b, a, b); }
  static inline F max(F a, F b) { return choose(a > b, a, b); }
  static inline F abs(F a) { return (F)((I)a & ~(I)splat(-0.0f)); }
  static inline F with_sign(F a, F sign) { return (F)((I)a | ((I)sign & (I)splat(-0.0f))); }
  static inline F zero_where_zero(F p, F a) { return (F)((I)a & ~(I)(p == splat(0.0f))); }
  static inline F where_greater(F a, F b, F yes, F no) { return choose(a > b, yes, no); }
  static inline F scaled_exp(F p, F t, F, F x) { return (F)((I)(p * power(t)) & ~(I)(x < splat(kSmallest))); }
  static inline F power(F t) { return (F)((I)t << 23); }
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
};

}  // namespace

extern const Kernels kScalarKernels = {statistics<Scalar>, gradient<Scalar>, divergence<Scalar>,
                                       divergence_gradient<Scalar>};

}  // namespace m3::policy_loss
