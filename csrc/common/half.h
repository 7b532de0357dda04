// Numbers of 16 bits, one at a time, in plain C++: what drivers and borders need; kernels have instructions for it.
#pragma once
#include <cstdint>
#include <cstring>

namespace m3 {

static inline float bf16_to_float(uint16_t h) {
  const uint32_t bits = (uint32_t)h << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

static inline float f16_to_float(uint16_t h) {
  const uint32_t sign = (uint32_t)(h & 0x8000) << 16, rest = h & 0x7FFF;
  uint32_t bits = rest >= 0x7C00 ? 0x7F800000 | (rest & 0x3FF) << 13 : (rest << 13) + (112u << 23);
  float f;
  if (rest < 0x400) {  // zero and subnormal
    f = (float)rest * 5.9604644775390625e-8f;
    std::memcpy(&bits, &f, 4);
  }
  bits |= sign;
  std::memcpy(&f, &bits, 4);
  return f;
}

static inline uint16_t float_to_bf16(float f) {  // round to nearest even
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  if ((bits & 0x7FFFFFFF) > 0x7F800000) return (uint16_t)(bits >> 16 | 0x40);
  return (uint16_t)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

static inline uint16_t float_to_f16(float f) {  // round to nearest even
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  const uint16_t sign = (uint16_t)(bits >> 16 & 0x8000);
  bits &= 0x7FFFFFFF;
  if (bits >= 0x7F800000) return sign | (bits > 0x7F800000 ? 0x7E00 : 0x7C00);
  if (bits >= 0x477FF000) return sign | 0x7C00;
  if (bits < 0x38800000) {  // subnormal: let fp32 round at 2^-24
    float magnitude;
    std::memcpy(&magnitude, &bits, 4);
    magnitude += 0.5f;
    std::memcpy(&bits, &magnitude, 4);
    return sign | (uint16_t)(bits - 0x3F000000);
  }
  return sign | (uint16_t)((bits - 0x38000000 + 0xFFF + (bits >> 13 & 1)) >> 13);
}

}  // namespace m3
