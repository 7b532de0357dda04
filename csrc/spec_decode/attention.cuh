// What the kernels of tree attention share: shapes, the online softmax of a warp's 16 rows, and how splits are joined.
//
// Keys are taken in order of logical position: position p of a row is slot p of the prefix, or the (p - prefix)-th of
// the tree slots that it attends to. A chunk of positions is one step of the online softmax, kSplit positions have a
// softmax of their own, and splits are joined in ascending order. A row enters the matrix products with what it attends
// to and zeros, at places that follow from positions alone. So its bits are those of its q, gate and keys, whatever
// tile, batch, tree, page size or launch it is computed in.
#pragma once
#include "common/ptx.cuh"

namespace m3::spec_decode {

constexpr int kSplit = 512;  // positions: a context of 4096 is 8 blocks a tile of rows

template <int kHead>
struct Shape {
  static constexpr int kChunk = kHead == 256 ? 32 : 64;  // positions
  static constexpr int kRowBytes = 2 * kHead;            // of keys and values in shared memory: 16 bits an element
  static constexpr int kTileBytes = kChunk * kRowBytes;  // keys, or values, of a chunk
  static constexpr int kPieces = kHead / 8;              // 16-byte pieces of a row; piece i lies at i ^ (row & 7)
  static constexpr bool kQueriesInRegisters = kHead <= 128;
  static constexpr int kColumns = kHead < 128 ? kHead : 128;  // of values and sums, of a warp: what registers hold
  static constexpr int kHalves = kHead / kColumns;            // warps of a tile of rows, each with all scores
  static constexpr int kMostTiles = 8 / kHalves;
};

// The online softmax of rows g and g + 8 of a warp's tile, in the lane order of mma_16816.
template <int kHead>
struct State {
  float acc[Shape<kHead>::kColumns / 8][4];
  float m[2];  // largest score, in base 2; -inf before the first key
  float l[2];  // this lane's share of the sum of exp2(score - m)

  M3_DEVICE void clear(State& s) {
#pragma unroll
    for (int j = 0; j < Shape<kHead>::kColumns / 8; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) s.acc[j][e] = 0.f;
#pragma unroll
    for (int r = 0; r < 2; ++r) s.m[r] = -INFINITY, s.l[r] = 0.f;
  }
};

// Two splits as one; where one holds no key the other stays as it is: its factor is 1.
struct Joint {
  float m, l, before, after;
};

M3_DEVICE Joint join(float m, float l, float next_m, float next_l) {
  const float top = next_l == 0.f ? m : l == 0.f ? next_m : fmaxf(m, next_m);
  const float before = l == 0.f ? 0.f : ptx::exp2(m - top), after = next_l == 0.f ? 0.f : ptx::exp2(next_m - top);
  return {top, ptx::fma(l, before, ptx::mul(next_l, after)), before, after};
}

M3_DEVICE float join(const Joint& joint, float before, float after) {
  const float early = ptx::mul(before, joint.before), late = ptx::mul(after, joint.after);
  const float both = ptx::fma(before, joint.before, late);
  return joint.before == 0.f ? late : joint.after == 0.f ? early : both;
}

// What multiplies a row's sums: 1 / l; 0 without keys, nan of a request whose lengths are impossible.
M3_DEVICE float normalizer(float l, bool impossible) { return impossible ? NAN : l == 0.f ? 0.f : 1.f / l; }

M3_DEVICE float sigmoid(float gate) { return 1.f / ptx::add(1.f, ptx::exp2(ptx::mul(gate, -1.4426950408889634f))); }

// Keys and values of a pass: rows of shared memory, by lists or in place. Bytes from its start, multiples of a row.
struct Tiles {
  const char* shared;
  int keys;               // of the first chunk; its values lie kTileBytes behind, the next chunk 2 kTileBytes
  int zero;               // a row of zeros
  int half;               // of the columns of values
  const int* rows;        // (kChunk,) row of each position, -1: none that the pass attends to; unused where kShared
  const float* k_scales;  // of rows, of int8 caches
  const float* v_scales;
};

// One chunk for a warp's rows. kShared: every position counts for every row, and position i is row i of `tiles`. Else
// position `first` + i counts for row r iff bounds[r].x <= first + i < bounds[r].y, and rows that have none stay
// untouched. Queries: `q` in registers, or 16 rows of shared memory like those of keys.
template <Half kHalf, int kHead, bool kInt8, bool kShared, class Queries>
M3_DEVICE void attend(State<kHead>& s, const Queries& q, const Tiles& tiles, float scale, int first,
                      const int2 (&bounds)[2]) {
  using S = Shape<kHead>;
  constexpr int kBlocks = S::kChunk / 16;
  const int lane = threadIdx.x % 32, t = threadIdx.x % 4;
  // Where this lane's rows of keys or values lie, and piece ^ row % 8 in them, for a first piece of 0 or 1. The other
  // pieces are an exclusive or away: rows are aligned to their size.
  int at[kBlocks];
  const auto find = [&](int key, int piece, int values) {
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
      const int row = kShared ? key + 16 * block : tiles.rows[key + 16 * block];
      const int place = tiles.keys + values + row * S::kRowBytes + row / S::kChunk * S::kTileBytes;
      at[block] = (kShared || row >= 0 ? place : tiles.zero) + (((row & 7) ^ piece) << 4);
    }
  };
  const auto piece_at = [&](int block, int bytes) {  // where kShared, blocks are a constant apart
    return tiles.shared + (kShared ? (at[0] ^ bytes) + block * 16 * S::kRowBytes : at[block] ^ bytes);
  };

  // Scores: lane i names the row of key i % 8 of one of four 8 x 8 matrices (two blocks of 8 keys, two of 8 columns).
  find(lane >> 4 << 3 | (lane & 7), lane >> 3 & 1, 0);
  float score[2 * kBlocks][4];
#pragma unroll
  for (int j = 0; j < 2 * kBlocks; ++j)
#pragma unroll
    for (int e = 0; e < 4; ++e) score[j][e] = 0.f;
#pragma unroll(S::kQueriesInRegisters ? kHead / 16 : 2)
  for (int k = 0; k < kHead / 16; ++k) {
    uint32_t a[4];
    q.load(a, k);
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
      uint32_t b[4];
      ptx::ldmatrix_x4(b, piece_at(block, 32 * k));
      ptx::mma_16816<kHalf>(score[2 * block], a, b[0], b[1]);
      ptx::mma_16816<kHalf>(score[2 * block + 1], a, b[2], b[3]);
    }
  }

  // Softmax: score[j][e] is of position 8j + 2t + e % 2 and row g + 8 (e / 2).
  uint32_t counts = ~0u;
  bool active[2] = {true, true};
  if constexpr (!kShared) {
#pragma unroll
    for (int r = 0; r < 2; ++r) active[r] = bounds[r].x < first + S::kChunk && bounds[r].y > first;
    counts = 0;
#pragma unroll
    for (int i = 0; i < 8 * kBlocks; ++i) {
      const int j = i / 4, e = i % 4, position = first + 8 * j + 2 * t + e % 2;
      if (position >= bounds[e / 2].x && position < bounds[e / 2].y) counts |= 1u << i;
    }
  }
  const auto scale_of = [&](const float* scales, int i) {  // of position 8 (i / 2) + 2 t + i % 2
    const int key = 8 * (i / 2) + 2 * t + i % 2;
    return scales[kShared ? key : max(tiles.rows[key], 0)];
  };
  if constexpr (kInt8) {
#pragma unroll
    for (int i = 0; i < 4 * kBlocks; ++i) {
      const float k_scale = scale_of(tiles.k_scales, i);
      score[i / 2][i % 2] = ptx::mul(score[i / 2][i % 2], k_scale);
      score[i / 2][2 + i % 2] = ptx::mul(score[i / 2][2 + i % 2], k_scale);
    }
  }
  float top[2] = {-INFINITY, -INFINITY}, alpha[2], sum[2] = {0.f, 0.f};
#pragma unroll
  for (int i = 0; i < 8 * kBlocks; ++i)
    if (kShared || counts >> i & 1) top[i % 4 / 2] = fmaxf(top[i % 4 / 2], score[i / 4][i % 4]);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    top[r] = fmaxf(top[r], __shfl_xor_sync(~0u, top[r], 1));
    top[r] = fmaxf(top[r], __shfl_xor_sync(~0u, top[r], 2));
    top[r] = fmaxf(s.m[r], ptx::mul(top[r], scale));
    alpha[r] = ptx::exp2(s.m[r] - top[r]);
  }
  // Scales of values are read from here on: not held in registers while scores are made.
  if constexpr (kInt8 && kHalf == Half::kBf16) __syncwarp();
#pragma unroll
  for (int i = 0; i < 8 * kBlocks; ++i) {
    float& p = score[i / 4][i % 4];
    p = ptx::exp2(ptx::fma(p, scale, -top[i % 4 / 2]));
    if (!kShared && !(counts >> i & 1)) p = 0.f;
    sum[i % 4 / 2] = ptx::add(sum[i % 4 / 2], p);
    // The range of fp32 holds the product of a weight and a scale; that of fp16 may not: there values come scaled.
    if constexpr (kInt8 && kHalf == Half::kBf16) {
      p = ptx::mul(p, scale_of(tiles.v_scales, i / 4 * 2 + i % 2));
      if (!kShared && !(counts >> i & 1)) p = 0.f;
    }
  }
  uint32_t p[kBlocks][4];
#pragma unroll
  for (int block = 0; block < kBlocks; ++block)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float* two = &score[2 * block + i / 2][2 * (i % 2)];
      p[block][i] = ptx::pack2<kHalf>(two[0], two[1]);
    }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    if (!kShared && !active[r]) continue;
    s.l[r] = ptx::fma(s.l[r], alpha[r], sum[r]);
    s.m[r] = top[r];
  }

  // Values: acc = acc alpha + p v, the product a sum of its own. Lane i names the row of key i % 16.
  find(lane & 15, lane >> 4, S::kTileBytes + tiles.half * 2 * S::kColumns);
#pragma unroll
  for (int n = 0; n < S::kColumns / 8; n += 4) {
    float term[4][4];
#pragma unroll
    for (int i = 0; i < 16; ++i) term[i / 4][i % 4] = 0.f;
#pragma unroll
    for (int block = 0; block < kBlocks; ++block)
#pragma unroll
      for (int pair = 0; pair < 2; ++pair) {
        uint32_t b[4];
        ptx::ldmatrix_x4_trans(b, piece_at(block, 16 * (n + 2 * pair)));
        ptx::mma_16816<kHalf>(term[2 * pair], p[block], b[0], b[1]);
        ptx::mma_16816<kHalf>(term[2 * pair + 1], p[block], b[2], b[3]);
      }
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      float& acc = s.acc[n + i / 4][i % 4];
      const float next = ptx::fma(acc, alpha[i % 4 / 2], term[i / 4][i % 4]);
      if (kShared || active[i % 4 / 2]) acc = next;
    }
  }
}

}  // namespace m3::spec_decode
