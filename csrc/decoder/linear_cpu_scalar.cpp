// Portable linear: vectors of four as the compiler's own vector type. The baseline of every build.
#include <cstring>
#include <type_traits>

#include "common/half.h"
#include "decoder/linear_cpu.h"

namespace m3::decoder {
namespace {

#include "decoder/linear_cpu_kernels.h"

struct Scalar {
  static constexpr int kLanes = 4, kRows = 2;
  typedef float F __attribute__((vector_size(16)));

  static inline F zero() { return F{}; }
  static inline F load(const float* p) {
    F a;
    std::memcpy(&a, p, sizeof a);
    return a;
  }
  static inline F load(const Bf16* p) { return F{one(p[0]), one(p[1]), one(p[2]), one(p[3])}; }
  static inline F load(const Fp16* p) { return F{one(p[0]), one(p[1]), one(p[2]), one(p[3])}; }
  template <class W>
  static inline F load_part(const W* p, int count) {
    F a{};
    for (int i = 0; i < count; i++) a[i] = one(p[i]);
    return a;
  }
  static inline float one(float a) { return a; }
  static inline float one(Bf16 a) { return bf16_to_float(a.bits); }
  static inline float one(Fp16 a) { return f16_to_float(a.bits); }
  static inline void store(float* p, F a) { std::memcpy(p, &a, sizeof a); }
  static inline F fma(F a, F b, F c) { return a * b + c; }
  static inline F join(const F (&a)[1]) { return a[0]; }
  static inline F fold_two(F a, F b) { return F{a[0], a[1], b[0], b[1]} + F{a[2], a[3], b[2], b[3]}; }
  static inline F fold_one(F a, F b) { return F{a[0], a[2], b[0], b[2]} + F{a[1], a[3], b[1], b[3]}; }
};

}  // namespace

extern const Kernels kScalarLinear = {Scalar::kRows, stream<Scalar>, block<Scalar>, pack<Scalar>, widen<Scalar>};

}  // namespace m3::decoder
