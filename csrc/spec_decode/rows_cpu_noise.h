// Noise of one token, from Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011), and the
// clean logit. Static functions: files with different instruction sets each have their own copy.
#pragma once
#include <cmath>
#include <cstdint>

#include "spec_decode/rows_cpu.h"

namespace m3::spec_decode::rows {

constexpr uint32_t kMultiplier0 = 0xD2511F53, kMultiplier1 = 0xCD9E8D57;
constexpr uint32_t kWeyl0 = 0x9E3779B9, kWeyl1 = 0xBB67AE85;
constexpr int kRounds = 10;
constexpr uint32_t kRace = 0, kRefined = 1, kNodeCoin = 2, kFinalCoin = 3;  // streams
constexpr uint32_t kSmall = 256;                                            // words of the race below it are refined
constexpr double kMostNoise = 45.1;                                         // -log E is less

struct Words {
  uint32_t word[4];
};

static inline Words philox(const Noise& noise, uint32_t first, uint32_t stream) {
  uint32_t k0 = (uint32_t)noise.seed, k1 = (uint32_t)(noise.seed >> 32);
  uint32_t c0 = first, c1 = (uint32_t)noise.position, c2 = (uint32_t)(noise.position >> 32), c3 = stream;
  for (int round = 0; round < kRounds; round++) {
    const uint64_t a = (uint64_t)c0 * kMultiplier0, b = (uint64_t)c2 * kMultiplier1;
    c0 = (uint32_t)(b >> 32) ^ c1 ^ k0, c1 = (uint32_t)b;
    c2 = (uint32_t)(a >> 32) ^ c3 ^ k1, c3 = (uint32_t)a;
    k0 += kWeyl0, k1 += kWeyl1;
  }
  return {{c0, c1, c2, c3}};
}

// -log E(noise, token), E exponential.
static inline double gumbel(const Noise& noise, int64_t token) {
  constexpr double scale = 0x1p-32;
  const auto first = (uint32_t)(token >> 2);
  const uint32_t word = philox(noise, first, kRace).word[token & 3];
  double u = (word + 0.5) * scale;
  if (word < kSmall) u = (word + (philox(noise, first, kRefined).word[token & 3] + 0.5) * scale) * scale;
  return -std::log(-std::log1p(-(u > 1 - 0x1p-24 ? 1 - 0x1p-24 : u)));
}

// Uniform in [0, 1), 53 bits.
static inline double coin(const Noise& noise, uint32_t stream) {
  const Words words = philox(noise, 0, stream);
  return (double)((uint64_t)words.word[0] << 21 | words.word[1] >> 11) * 0x1p-53;
}

// Target id of a draft token; any two integers have a sum here.
static inline int64_t shifted(int64_t token, int64_t offset) { return (int64_t)((uint64_t)token + (uint64_t)offset); }

static inline float clean(float a) {
  if (!(a > kNothing)) return kNothing;
  return a > kClip ? kClip : a < -kClip ? -kClip : a;
}

}  // namespace m3::spec_decode::rows
