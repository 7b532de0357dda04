// What this CPU and its operating system can run, asked once at run time. Sources: Intel SDM vol. 2A (CPUID leaves 1,
// 7; XGETBV), Linux asm/hwcap.h for AArch64. No dependencies.
//
// Everything is static (one copy per translation unit) on purpose: files are compiled with different ISA flags, and an
// inline function shared between them could be linked in its AVX-512 form and run on a CPU without it.
#pragma once
#include <cstdint>

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__)
#include <sys/auxv.h>
#endif

namespace m3 {

struct CpuFeatures {
  bool avx2 = false;        // AVX2, FMA and F16C, YMM state saved by the system
  bool avxvnni = false;     // avx2, and VNNI in its VEX form
  bool avx512 = false;      // avx2, and AVX-512 F, BW, VL, DQ, ZMM state saved by the system
  bool avx512vnni = false;  // avx512, and VNNI in its EVEX form
  bool dotprod = false;     // AArch64 Advanced SIMD with half precision (fp16) and dot product
};

#if defined(__x86_64__)
static inline bool cpu_bit(uint32_t reg, int bit) { return (reg >> bit) & 1u; }

static inline CpuFeatures read_cpu_features() {
  CpuFeatures have;
  uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx)) return have;
  const bool osxsave = cpu_bit(ecx, 27);
  const bool fma = cpu_bit(ecx, 12), avx = cpu_bit(ecx, 28), f16c = cpu_bit(ecx, 29);
  if (!osxsave || !avx) return have;

  uint32_t xcr0 = 0, xcr0_high = 0;
  __asm__ volatile("xgetbv" : "=a"(xcr0), "=d"(xcr0_high) : "c"(0));
  const bool ymm_saved = (xcr0 & 0x6u) == 0x6u;    // SSE, AVX
  const bool zmm_saved = (xcr0 & 0xE6u) == 0xE6u;  // SSE, AVX, opmask, ZMM0-15 high halves, ZMM16-31

  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return have;
  const uint32_t subleaves = eax;
  const bool avx512_all = cpu_bit(ebx, 16) && cpu_bit(ebx, 17) && cpu_bit(ebx, 30) && cpu_bit(ebx, 31);  // F DQ BW VL
  have.avx2 = ymm_saved && fma && f16c && cpu_bit(ebx, 5);
  have.avx512 = have.avx2 && zmm_saved && avx512_all;
  have.avx512vnni = have.avx512 && cpu_bit(ecx, 11);
  if (subleaves >= 1 && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx)) have.avxvnni = have.avx2 && cpu_bit(eax, 4);
  return have;
}
#elif defined(__aarch64__)
static inline CpuFeatures read_cpu_features() {
  CpuFeatures have;
  const unsigned long hwcap = getauxval(AT_HWCAP);
  const bool half = (hwcap >> 9) & (hwcap >> 10) & 1;  // HWCAP_FPHP, HWCAP_ASIMDHP
  have.dotprod = half && ((hwcap >> 20) & 1);          // HWCAP_ASIMDDP
  return have;
}
#else
static inline CpuFeatures read_cpu_features() { return {}; }
#endif

static inline const CpuFeatures& cpu_features() {
  static const CpuFeatures features = read_cpu_features();
  return features;
}

static inline bool cpu_has_avx2() { return cpu_features().avx2; }
static inline bool cpu_has_avxvnni() { return cpu_features().avxvnni; }
static inline bool cpu_has_avx512() { return cpu_features().avx512; }
static inline bool cpu_has_avx512vnni() { return cpu_features().avx512vnni; }
static inline bool cpu_has_dotprod() { return cpu_features().dotprod; }

}  // namespace m3
