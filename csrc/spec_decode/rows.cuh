// What kernels share that scan rows of logits: the clean logit and its key, noise, and a team of blocks that folds.
//
//   z = logit (nan -> -inf, clipped to +-1e30, forbidden tokens -inf),  x = (z - max z) / T <= 0,  w = exp(x)
//
// A row is cut into segments of 256 tokens, 8 neighbours a lane. A team is one block, or a cluster of blocks that own
// consecutive segments. Tokens are compared by `key`, the bits of |x|: integers in the order of decreasing x. Masses
// are integers, w times a power of two that only the vocabulary fixes, so every sum is exact: no result depends on
// the order of additions, on the size of the team or on how a set of tokens was found.
#pragma once
#include <cmath>
#include <cstdint>

#include "common/launch.cuh"
#include "common/ptx.cuh"
#include "spec_decode/tree_cuda.h"

namespace m3::spec_decode {

using Mass = unsigned long long;

constexpr int kThreads = 512, kWarps = kThreads / 32;
constexpr int kNeighbours = 8;                 // tokens of a lane
constexpr int kSegment = 32 * kNeighbours;     // of a warp
constexpr int kStep = kThreads * kNeighbours;  // of a block
constexpr uint32_t kLargest = 0x7F7FFFFF;      // key of the smallest finite x
constexpr float kClip = 1e30f;
constexpr unsigned kAll = ~0u;

M3_DEVICE float nothing() { return __uint_as_float(0xFF800000u); }  // -inf

// -- numbers ----------------------------------------------------------------------------------------------------------
// Unsigned integers in the order of the floats, which are no nan; the two zeros are one.
M3_DEVICE uint32_t ordered(float a) {
  const uint32_t bits = __float_as_uint(ptx::add(a, 0.f));
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}
M3_DEVICE float unordered(uint32_t a) { return __uint_as_float(a >> 31 ? a & 0x7FFFFFFFu : ~a); }
M3_DEVICE Mass ordered(double a) {
  const Mass bits = (Mass)__double_as_longlong(__dadd_rn(a, 0.0));
  return bits >> 63 ? ~bits : bits | 1ull << 63;
}

// Unit of masses: a power of two so large that the sum over the vocabulary stays below 2^62.
M3_DEVICE float mass_unit(int vocabulary) { return __uint_as_float((uint32_t)(127 + 30 + __clz(vocabulary)) << 23); }

// How x and w come from z: temperature, the largest z, and the unit of masses.
struct Scale {
  float top, heat, inverse, unit;

  // (z - top) / heat, rounded once for every quotient that is no subnormal; -inf stays.
  __device__ __forceinline__ float x(float z) const {
    const float d = ptx::add(z, -top), q = ptx::mul(d, inverse);
    return z > nothing() ? ptx::fma(ptx::fma(-q, heat, d), inverse, q) : nothing();
  }
  __device__ __forceinline__ uint32_t key(float z) const { return __float_as_uint(x(z)) & 0x7FFFFFFFu; }
  __device__ __forceinline__ Mass mass(uint32_t key) const { return (Mass)ptx::mul(expf(-__uint_as_float(key)), unit); }
};

// -- noise ------------------------------------------------------------------------------------------------------------
constexpr uint32_t kRace = 0, kRefined = 1, kNodeCoin = 2, kFinalCoin = 3;  // streams
constexpr uint32_t kSmall = 256;  // words of the race below it are refined by another word
constexpr double kWord = 0x1p-32;

struct Noise {
  uint64_t seed, position;
};

// Four words of Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011).
M3_DEVICE uint4 words(const Noise& noise, uint32_t first, uint32_t stream) {
  uint32_t k0 = (uint32_t)noise.seed, k1 = (uint32_t)(noise.seed >> 32);
  uint32_t c0 = first, c1 = (uint32_t)noise.position, c2 = (uint32_t)(noise.position >> 32), c3 = stream;
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = (uint64_t)c0 * 0xD2511F53u, b = (uint64_t)c2 * 0xCD9E8D57u;
    c0 = (uint32_t)(b >> 32) ^ c1 ^ k0, c1 = (uint32_t)b;
    c2 = (uint32_t)(a >> 32) ^ c3 ^ k1, c3 = (uint32_t)a;
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
  return make_uint4(c0, c1, c2, c3);
}

M3_DEVICE uint32_t pick(const uint4& four, int index) {
  return index < 2 ? (index ? four.y : four.x) : (index == 2 ? four.z : four.w);
}

// Uniform in [0, 1), 53 bits.
M3_DEVICE double coin(const Noise& noise, uint32_t stream) {
  const uint4 four = words(noise, 0, stream);
  return (double)((uint64_t)four.x << 21 | four.y >> 11) * 0x1p-53;
}

// (z - top) / heat - log E of a token whose word of the race is given, E exponential.
static __device__ __noinline__ double score_of(float z, float top, float heat, uint64_t seed, uint64_t position,
                                               int token, uint32_t word) {
  double u = ((double)word + 0.5) * kWord;
  if (word < kSmall) {
    const uint32_t finer = pick(words({seed, position}, (uint32_t)token >> 2, kRefined), token & 3);
    u = ((double)word + ((double)finer + 0.5) * kWord) * kWord;
  }
  return ((double)z - (double)top) / (double)heat - log(-log1p(-min(u, 1 - 0x1p-24)));
}

// The best of scores x - log E so far. Scores are computed in fp64, but only those that can win: E is at least its u,
// so a score above `best` has u < exp(x - best).
struct Race {
  double best = -INFINITY;
  float bar = -INFINITY;  // best, rounded
  int token = INT32_MAX;

  __device__ __forceinline__ void enter(const Noise& noise, const Scale& scale, float z, float x, int v,
                                        uint32_t word) {
    const float bound = ptx::exp2(ptx::mul(ptx::add(x, -bar), 1.4426950f));
    if (ptx::mul((float)word, 0x1p-32f) > ptx::mul(bound, 1.001f)) return;
    const double score = score_of(z, scale.top, scale.heat, noise.seed, noise.position, v, word);
    if (score > best || (score == best && v < token)) best = score, bar = (float)score, token = v;
  }
};

// -- folding ----------------------------------------------------------------------------------------------------------
struct alignas(16) Pair {
  Mass a, b;
};

enum class Fold {
  kSum,            // of both
  kBest,           // the larger a, the smaller b of equals
  kMaxMin,         // the largest a, the smallest b
  kMaxMinOfPairs,  // likewise, but warps count in pairs, with the larger of their b
};

template <class Combine>
M3_DEVICE Pair across(Pair p, int lanes, Combine combine) {
#pragma unroll 1
  for (int bits = lanes / 2; bits; bits /= 2)
    p = combine(p, Pair{__shfl_xor_sync(kAll, p.a, bits), __shfl_xor_sync(kAll, p.b, bits)});
  return p;
}

// The fold over the first `lanes` lanes, a power of two, or over each run of as many.
M3_DEVICE Pair across(Pair p, int lanes, Fold fold) {
  if (fold == Fold::kSum)
    return across(p, lanes, [](const Pair& x, const Pair& y) { return Pair{x.a + y.a, x.b + y.b}; });
  if (fold == Fold::kBest)
    return across(p, lanes,
                  [](const Pair& x, const Pair& y) { return x.a > y.a || (x.a == y.a && x.b < y.b) ? x : y; });
  return across(p, lanes, [](const Pair& x, const Pair& y) { return Pair{max(x.a, y.a), min(x.b, y.b)}; });
}

constexpr int kMostRanks = 16;
constexpr int kBins = 2048;

// Shared memory of a team's exchanges.
struct Board {
  Pair warps[kWarps];
  Pair messages[3];  // to the team, the first two alternately: when a rank writes one again, all have read it;
                     // the last is for the block alone, which meets nobody before it writes again
  Mass scan[kWarps];
  Mass rest;
  int found, count;
};

// Team::fold, out of line: kernels have many.
static __device__ __noinline__ Pair folded(Pair p, Fold how, Board* board, int message, int size) {
  p = across(p, 32, how);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (lane == 0) board->warps[warp] = p;
  __syncthreads();
  Pair* slot = board->messages + message;
  if (warp == 0) {
    p = board->warps[lane % kWarps];
    if (how == Fold::kMaxMinOfPairs) p.b = max(p.b, __shfl_xor_sync(kAll, p.b, 1));
    p = across(p, kWarps, how);
    if (lane == 0) *slot = p;
  }
#if M3_SM90
  if (size > 1) {
    ptx::cluster_arrive();
    ptx::cluster_wait();
    const float4 v = ptx::load_cluster((const float*)slot, lane % size);
    memcpy(&p, &v, sizeof p);
    return across(p, size, how);
  }
#endif
  __syncthreads();
  return *slot;
}

// The blocks that work on one request together: one, or a cluster (sm_90). Every function is for all threads of all.
struct Team {
  Board* board;
  int rank, size;
  int turn = 0;

  __device__ __forceinline__ void sync() const {
#if M3_SM90
    if (size > 1) {
      ptx::cluster_arrive();
      ptx::cluster_wait();
      return;
    }
#endif
    __syncthreads();
  }

  // 16 bytes of another rank's shared memory.
  template <class T>
  __device__ __forceinline__ T from(const T* own, int other) const {
    static_assert(sizeof(T) == 16);
#if M3_SM90
    if (size > 1) {
      const float4 v = ptx::load_cluster((const float*)own, other);
      T value;
      memcpy(&value, &v, 16);
      return value;
    }
#endif
    return *own;
  }

  // Over the team's threads, or, with `alone`, over this block's; what each rank gave to the team's last fold is in
  // message(rank).
  __device__ __forceinline__ Pair fold(Pair p, Fold how, bool alone = false) {
    if (!alone) turn ^= 1;
    return folded(p, how, board, alone ? 2 : turn, alone ? 1 : size);
  }
  __device__ __forceinline__ Pair message(int other) const { return from(board->messages + turn, other); }
};

// Sum over the threads before this one, of one block; `total` is that of all.
M3_DEVICE Mass scan_before(Mass value, Board* board, Mass& total) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  Mass upto = value;
#pragma unroll
  for (int by = 1; by < 32; by *= 2) {
    const Mass lower = __shfl_up_sync(kAll, upto, by);
    if (lane >= by) upto += lower;
  }
  __syncthreads();
  if (lane == 31) board->scan[warp] = upto;
  __syncthreads();
  Mass before = 0;
  total = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    if (w < warp) before += board->scan[w];
    total += board->scan[w];
  }
  return before + upto - value;
}

// -- finding a place by mass ------------------------------------------------------------------------------------------
// The largest key below which, strictly, lies less than `target`, for 1 <= target <= the sum of all weights: digit by
// digit. `each` calls its argument with (key, weight) for all items of this thread; whole: the items are the team's,
// else each rank's own. bins: kBins masses of shared memory.
template <class Each>
M3_DEVICE uint32_t place_of(Team& team, Mass* bins, Mass target, bool whole, Each each) {
  uint32_t prefix = 0;
#pragma unroll 1
  for (int level = 0; level < 3; ++level) {
    const int shift = 20 - 10 * level;
    for (int i = threadIdx.x; i < kBins; i += kThreads) bins[i] = 0;
    __syncthreads();
    each([&](uint32_t key, Mass weight) {
      if (level == 0)
        atomicAdd(&bins[key >> 20], weight);
      else if (key >> (shift + 10) == prefix)
        atomicAdd(&bins[key >> shift & 1023], weight);
    });
    if (whole)
      team.sync();
    else
      __syncthreads();
    const int first = threadIdx.x * (kBins / kThreads);
    Mass own[4] = {};
    static_assert(kBins / kThreads == 4);
    const int ranks = whole ? team.size : 1;
#pragma unroll 1
    for (int r = 0; r < ranks; ++r) {
      const int other = ranks == 1 ? team.rank : r;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const Pair two =
            ranks == 1 ? *(const Pair*)&bins[first + 2 * i] : team.from((const Pair*)&bins[first + 2 * i], other);
        own[2 * i] += two.a, own[2 * i + 1] += two.b;
      }
    }
    Mass total;
    Mass before = scan_before(own[0] + own[1] + own[2] + own[3], team.board, total);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (before < target && target <= before + own[i])
        team.board->found = first + i, team.board->rest = target - before;
      before += own[i];
    }
    if (whole)
      team.sync();
    else
      __syncthreads();
    prefix = prefix << 10 | (uint32_t)team.board->found;
    target = team.board->rest;
  }
  return prefix;
}

// -- a row ------------------------------------------------------------------------------------------------------------
M3_DEVICE float clean(float a) { return a > nothing() ? min(max(a, -kClip), kClip) : nothing(); }

template <Type kType>
M3_DEVICE float element(const void* row, int64_t v) {
  if constexpr (kType == Type::kF32)
    return __ldg((const float*)row + v);
  else
    return ptx::to_float<(Half)kType>(__ldg((const uint16_t*)row + v));
}

// The 16 bytes of tokens from v on, one by one; -inf beyond the vocabulary.
template <Type kType>
static __device__ __noinline__ uint4 ragged(const void* row, int v, int vocabulary) {
  uint32_t bits[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (kType == Type::kF32) {
      bits[i] = v + i < vocabulary ? __ldg((const uint32_t*)row + v + i) : 0xFF800000u;
    } else {
      constexpr uint32_t kNothing = kType == Type::kF16 ? 0xFC00u : 0xFF80u;
      const uint16_t* at = (const uint16_t*)row + v + 2 * i;
      const uint32_t low = v + 2 * i < vocabulary ? __ldg(at) : kNothing;
      bits[i] = (v + 2 * i + 1 < vocabulary ? __ldg(at + 1) : kNothing) << 16 | low;
    }
  }
  return make_uint4(bits[0], bits[1], bits[2], bits[3]);
}

// One block's part of a row: tokens first .. end - 1, first a multiple of kSegment.
template <Type kType>
struct Slice {
  const void* row;          // of the whole vocabulary
  const uint32_t* allowed;  // bits of the tokens that may be, or null
  int first, end, vocabulary;
  float* kept;  // the z of this part in shared memory, or null: it is read again. Two planes of 4 tokens each.
  int plane;    // floats of a plane

  static constexpr int kQuads = kType == Type::kF32 ? 2 : 1;
  struct Raw {
    uint4 quad[kQuads];
  };

  // 16-byte loads where the row is so aligned.
  __device__ __forceinline__ Raw load(int v, bool aligned) const {
    Raw raw;
#pragma unroll
    for (int i = 0; i < kQuads; ++i) {
      const int from = v + i * (kNeighbours / kQuads);
      raw.quad[i] = aligned && from + kNeighbours / kQuads <= vocabulary
                        ? ptx::load_once((const char*)row + (int64_t)from * (16 * kQuads / kNeighbours))
                        : ragged<kType>(row, from, vocabulary);
    }
    return raw;
  }

  __device__ __forceinline__ void unpack(const Raw& raw, int v, float (&z)[kNeighbours]) const {
#pragma unroll
    for (int i = 0; i < kQuads; ++i) {
      const uint32_t bits[4] = {raw.quad[i].x, raw.quad[i].y, raw.quad[i].z, raw.quad[i].w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if constexpr (kType == Type::kF32) {
          z[4 * i + j] = clean(__uint_as_float(bits[j]));
        } else {
          const float2 two = ptx::unpack2<(Half)kType>(bits[j]);
          z[2 * j] = clean(two.x), z[2 * j + 1] = clean(two.y);
        }
      }
    }
    if (allowed) {
      const uint32_t byte = v < vocabulary ? __ldg(allowed + v / 32) >> (v % 32) : 0;
#pragma unroll
      for (int i = 0; i < kNeighbours; ++i) z[i] = byte >> i & 1 ? z[i] : nothing();
    }
  }

  // From `kept`, or the row is read again.
  __device__ __forceinline__ void at(int v, float (&z)[kNeighbours]) const {
    if (kept) {
      const float4 low = *(const float4*)(kept + (v - first) / 2);
      const float4 high = *(const float4*)(kept + plane + (v - first) / 2);
      z[0] = low.x, z[1] = low.y, z[2] = low.z, z[3] = low.w;
      z[4] = high.x, z[5] = high.y, z[6] = high.z, z[7] = high.w;
    } else {
      unpack(load(v, (uintptr_t)row % 16 == 0), v, z);
    }
  }

  // Calls visit(v, z) for this lane's 8 tokens from v on, by ascending v, all lanes of a warp together; outside z is
  // -inf. kFirst: many loads under way, z is written to `kept`; otherwise z is as `at` has it.
  template <bool kFirst = false, class Visit>
  __device__ __forceinline__ void each(Visit visit) const {
    const int from = first + threadIdx.x / 32 * kSegment, mine = threadIdx.x % 32 * kNeighbours;
    const bool aligned = (uintptr_t)row % 16 == 0;
    if constexpr (kFirst) {
      constexpr int kFlight = 4 / kQuads;  // loads of a thread under way
#pragma unroll 1
      for (int base = from; base < end; base += kFlight * kStep) {
        Raw raw[kFlight];
#pragma unroll
        for (int i = 0; i < kFlight; ++i)
          if (base + i * kStep < end) raw[i] = load(base + i * kStep + mine, aligned);
#pragma unroll
        for (int i = 0; i < kFlight; ++i) {
          if (base + i * kStep >= end) break;
          const int v = base + i * kStep + mine;
          float z[kNeighbours];
          unpack(raw[i], v, z);
          if (kept) {
            *(float4*)(kept + (v - first) / 2) = make_float4(z[0], z[1], z[2], z[3]);
            *(float4*)(kept + plane + (v - first) / 2) = make_float4(z[4], z[5], z[6], z[7]);
          }
          visit(v, z);
        }
      }
    } else {
#pragma unroll 1
      for (int base = from; base < end; base += kStep) {
        float z[kNeighbours];
        at(base + mine, z);
        visit(base + mine, z);
      }
    }
  }
};

// z of one token of a row.
template <Type kType>
M3_DEVICE float z_of(const void* row, const uint32_t* allowed, int v) {
  const bool may = !allowed || (__ldg(allowed + v / 32) >> (v % 32) & 1);
  return may ? clean(element<kType>(row, v)) : nothing();
}

}  // namespace m3::spec_decode
