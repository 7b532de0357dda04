// Ceilings of a machine, measured: read bandwidth and multiply-accumulates per second from registers.
// A shared library for roofline.py. Instructions are chosen at run time, so any x86-64 compiler builds all of it.
#define _GNU_SOURCE
#include <pthread.h>
#include <stdint.h>
#include <stddef.h>
#include <time.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

enum { kMaxThreads = 256 };

typedef struct {
  int kind;
  const char* buffer;
  size_t bytes;
  long iterations;
  double start, stop;
  uint64_t sink;
  pthread_barrier_t* barrier;
} Work;

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec + 1e-9 * t.tv_nsec;
}

// -- read ------------------------------------------------------------------------------------------------------------
// kind 0: one stream. 1: one stream with software prefetch. 2: four streams. Bytes: a multiple of 1024.
static uint64_t read_plain(const char* buffer, size_t bytes) {
  const uint64_t* p = (const uint64_t*)buffer;
  uint64_t a = 0, b = 0, c = 0, d = 0;
  for (size_t i = 0; i < bytes / 8; i += 8) {
    a ^= p[i] ^ p[i + 1];
    b ^= p[i + 2] ^ p[i + 3];
    c ^= p[i + 4] ^ p[i + 5];
    d ^= p[i + 6] ^ p[i + 7];
  }
  return a ^ b ^ c ^ d;
}

#if defined(__x86_64__)
#define LOAD(p) _mm256_loadu_si256((const __m256i*)(p))
__attribute__((target("avx2"))) static uint64_t fold(__m256i a, __m256i b, __m256i c, __m256i d) {
  a = _mm256_xor_si256(_mm256_xor_si256(a, b), _mm256_xor_si256(c, d));
  return (uint64_t)_mm256_extract_epi64(a, 0);
}

__attribute__((target("avx2"))) static uint64_t read_avx2(const char* buffer, size_t bytes, int kind) {
  __m256i a = _mm256_setzero_si256(), b = a, c = a, d = a;
  if (kind == 2) {
    const size_t quarter = bytes / 4 / 64 * 64;
    const char *p = buffer, *q = p + quarter, *r = q + quarter, *s = r + quarter;
    for (size_t i = 0; i < quarter; i += 64) {
      a = _mm256_xor_si256(a, _mm256_xor_si256(LOAD(p + i), LOAD(p + i + 32)));
      b = _mm256_xor_si256(b, _mm256_xor_si256(LOAD(q + i), LOAD(q + i + 32)));
      c = _mm256_xor_si256(c, _mm256_xor_si256(LOAD(r + i), LOAD(r + i + 32)));
      d = _mm256_xor_si256(d, _mm256_xor_si256(LOAD(s + i), LOAD(s + i + 32)));
    }
    return fold(a, b, c, d);
  }
  for (size_t i = 0; i < bytes; i += 256) {
    const char* p = buffer + i;
    if (kind == 1)
      for (int line = 0; line < 256; line += 64) _mm_prefetch(p + 2048 + line, _MM_HINT_T0);  // past the end: harmless
    a = _mm256_xor_si256(a, _mm256_xor_si256(LOAD(p), LOAD(p + 32)));
    b = _mm256_xor_si256(b, _mm256_xor_si256(LOAD(p + 64), LOAD(p + 96)));
    c = _mm256_xor_si256(c, _mm256_xor_si256(LOAD(p + 128), LOAD(p + 160)));
    d = _mm256_xor_si256(d, _mm256_xor_si256(LOAD(p + 192), LOAD(p + 224)));
  }
  return fold(a, b, c, d);
}
#endif

static void* read_thread(void* argument) {
  Work* work = argument;
  pthread_barrier_wait(work->barrier);
  work->start = now();
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2"))
    work->sink = read_avx2(work->buffer, work->bytes, work->kind);
  else
#endif
    work->sink = read_plain(work->buffer, work->bytes);
  work->stop = now();
  return 0;
}

// -- peaks -----------------------------------------------------------------------------------------------------------
// Twelve independent accumulators, no loads; the empty asm keeps the compiler from merging or hoisting them.
// Names, and multiply-accumulates per instruction group, are told by m3_peak_name and m3_peak_macs.
#if defined(__x86_64__)
#define KEEP(x) __asm__ volatile("" : "+v"(x));
#define CHAINS(STEP) STEP(0) STEP(1) STEP(2) STEP(3) STEP(4) STEP(5) STEP(6) STEP(7) STEP(8) STEP(9) STEP(10) STEP(11)
#define FINISH(i) KEEP(s##i)
#define PEAK(function, isa, vector, empty, u_value, w_value, STEP)                   \
  __attribute__((target(isa))) static void function(long iterations) {               \
    vector u = u_value, w = w_value;                                                 \
    vector s0 = empty, s1 = empty, s2 = empty, s3 = empty, s4 = empty, s5 = empty;   \
    vector s6 = empty, s7 = empty, s8 = empty, s9 = empty, s10 = empty, s11 = empty; \
    for (long r = 0; r < iterations; r++) {                                          \
      CHAINS(STEP)                                                                   \
    }                                                                                \
    CHAINS(FINISH)                                                                   \
  }
#define ZERO_PS_256 _mm256_setzero_ps()
#define ZERO_256 _mm256_setzero_si256()
#define ZERO_PS_512 _mm512_setzero_ps()
#define ZERO_512 _mm512_setzero_si512()
#define FMA_256(i)                    \
  s##i = _mm256_fmadd_ps(s##i, u, w); \
  KEEP(s##i)
#define FMA_512(i)                    \
  s##i = _mm512_fmadd_ps(s##i, u, w); \
  KEEP(s##i)
#define DPBF16_512(i)                                      \
  s##i = _mm512_dpbf16_ps(s##i, (__m512bh)u, (__m512bh)w); \
  KEEP(s##i)
#define MADD_256(i)                                               \
  KEEP(u) s##i = _mm256_add_epi32(s##i, _mm256_madd_epi16(u, w)); \
  KEEP(s##i)
#define DPWSSD_256(i)                         \
  s##i = _mm256_dpwssd_avx_epi32(s##i, u, w); \
  KEEP(s##i)
#define DPWSSD_512(i)                     \
  s##i = _mm512_dpwssd_epi32(s##i, u, w); \
  KEEP(s##i)
#define MADDUBS_256(i)                                                                     \
  KEEP(u) s##i = _mm256_add_epi32(s##i, _mm256_madd_epi16(_mm256_maddubs_epi16(u, w), w)); \
  KEEP(s##i)
#define MADDUBS_ADD16_256(i)                                         \
  KEEP(u) s##i = _mm256_add_epi16(s##i, _mm256_maddubs_epi16(u, w)); \
  KEEP(s##i)
#define DPBUSD_256(i)                         \
  s##i = _mm256_dpbusd_avx_epi32(s##i, u, w); \
  KEEP(s##i)
#define DPBUSD_512(i)                     \
  s##i = _mm512_dpbusd_epi32(s##i, u, w); \
  KEEP(s##i)

PEAK(fma_256, "avx2,fma", __m256, ZERO_PS_256, _mm256_set1_ps(0.999f), _mm256_set1_ps(0.001f), FMA_256)
PEAK(fma_512, "avx512f", __m512, ZERO_PS_512, _mm512_set1_ps(0.999f), _mm512_set1_ps(0.001f), FMA_512)
PEAK(dpbf16_512, "avx512f,avx512bf16", __m512, ZERO_PS_512, _mm512_set1_ps(0.5f), _mm512_set1_ps(0.5f), DPBF16_512)
PEAK(madd_256, "avx2", __m256i, ZERO_256, _mm256_set1_epi16(7), _mm256_set1_epi16(3), MADD_256)
PEAK(dpwssd_256, "avx2,avxvnni", __m256i, ZERO_256, _mm256_set1_epi16(7), _mm256_set1_epi16(3), DPWSSD_256)
PEAK(dpwssd_512, "avx512f,avx512vnni", __m512i, ZERO_512, _mm512_set1_epi32(7), _mm512_set1_epi32(3), DPWSSD_512)
PEAK(maddubs_256, "avx2", __m256i, ZERO_256, _mm256_set1_epi16(1), _mm256_set1_epi16(1), MADDUBS_256)
PEAK(maddubs_add16_256, "avx2", __m256i, ZERO_256, _mm256_set1_epi8(1), _mm256_set1_epi8(1), MADDUBS_ADD16_256)
PEAK(dpbusd_256, "avx2,avxvnni", __m256i, ZERO_256, _mm256_set1_epi8(7), _mm256_set1_epi8(3), DPBUSD_256)
PEAK(dpbusd_512, "avx512f,avx512vnni", __m512i, ZERO_512, _mm512_set1_epi32(7), _mm512_set1_epi32(3), DPBUSD_512)
#endif

typedef struct {
  const char *name, *computes;  // computes: fp32, bf16, int16 or int8 operands
  int macs;                     // multiply-accumulates of one step of one chain
  void (*run)(long);
} Peak;

static const Peak kPeaks[] = {
#if defined(__x86_64__)
    {"fma ymm", "fp32", 8, fma_256},
    {"fma zmm", "fp32", 16, fma_512},
    {"vdpbf16ps zmm", "bf16", 32, dpbf16_512},
    {"vpmaddwd+vpaddd ymm", "int16", 16, madd_256},
    {"vpdpwssd ymm", "int16", 16, dpwssd_256},
    {"vpdpwssd zmm", "int16", 32, dpwssd_512},
    {"vpmaddubsw+vpmaddwd+vpaddd ymm", "int8", 32, maddubs_256},
    {"vpmaddubsw+vpaddw ymm", "int8", 32, maddubs_add16_256},
    {"vpdpbusd ymm", "int8", 32, dpbusd_256},
    {"vpdpbusd zmm", "int8", 64, dpbusd_512},
#endif
    {0, 0, 0, 0},
};

static int supported(int kind) {
#if defined(__x86_64__)
  void (*run)(long) = kPeaks[kind].run;
  if (run == fma_256) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (run == madd_256 || run == maddubs_256 || run == maddubs_add16_256) return __builtin_cpu_supports("avx2");
  if (run == dpbusd_256 || run == dpwssd_256) {
    unsigned a = 7, b, c = 1, d;  // AVX-VNNI: CPUID 7.1, EAX bit 4
    __asm__ volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
    return __builtin_cpu_supports("avx2") && (a >> 4 & 1);
  }
  if (run == fma_512) return __builtin_cpu_supports("avx512f");
  if (run == dpbf16_512) return __builtin_cpu_supports("avx512bf16");
  return __builtin_cpu_supports("avx512vnni");
#else
  (void)kind;
  return 0;
#endif
}

static void* peak_thread(void* argument) {
  Work* work = argument;
  pthread_barrier_wait(work->barrier);
  work->start = now();
  kPeaks[work->kind].run(work->iterations);
  work->stop = now();
  return 0;
}

// Seconds from the first thread's start to the last one's end; < 0: not possible.
static double run_threads(void* (*body)(void*), Work* works, int threads) {
  pthread_t handles[kMaxThreads];
  pthread_barrier_t barrier;
  pthread_barrier_init(&barrier, 0, threads);
  for (int i = 0; i < threads; i++) works[i].barrier = &barrier;
  for (int i = 1; i < threads; i++)
    if (pthread_create(&handles[i], 0, body, &works[i])) return -1;
  body(&works[0]);
  for (int i = 1; i < threads; i++) pthread_join(handles[i], 0);
  pthread_barrier_destroy(&barrier);
  double start = works[0].start, stop = works[0].stop;
  for (int i = 1; i < threads; i++) {
    if (works[i].start < start) start = works[i].start;
    if (works[i].stop > stop) stop = works[i].stop;
  }
  return stop - start;
}

// Time to read bytes of buffer once, split among threads. bytes / threads must be a multiple of 1024.
double m3_read_seconds(const char* buffer, size_t bytes, int threads, int kind) {
  if (threads < 1 || threads > kMaxThreads || bytes % (1024u * threads)) return -1;
  Work works[kMaxThreads] = {0};
  for (int i = 0; i < threads; i++) {
    works[i].kind = kind;
    works[i].buffer = buffer + bytes / threads * i;
    works[i].bytes = bytes / threads;
  }
  return run_threads(read_thread, works, threads);
}

const char* m3_peak_name(int kind) { return kPeaks[kind].name; }  // NULL past the last
const char* m3_peak_computes(int kind) { return kPeaks[kind].computes; }

// Multiply-accumulates per second over all threads; 0 where the CPU lacks the instruction.
double m3_peak(int kind, long iterations, int threads) {
  if (threads < 1 || threads > kMaxThreads || !supported(kind)) return 0;
  Work works[kMaxThreads] = {0};
  for (int i = 0; i < threads; i++) works[i].kind = kind, works[i].iterations = iterations;
  const double seconds = run_threads(peak_thread, works, threads);
  return seconds > 0 ? 12.0 * kPeaks[kind].macs * iterations * threads / seconds : 0;
}
