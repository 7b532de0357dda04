// Products of few rows with packed INT4 weights: the weight is streamed once, at the rate of memory.
#include "common/launch.cuh"
#include "common/ptx.cuh"
#include "int4/product.cuh"

namespace m3::int4 {
namespace {

constexpr int kStageTiles = 4;  // k-tiles of a pipeline stage: 64 columns, 128 bytes of a row of x
constexpr int kStages = 4;      // of which three are under way while one is computed on
constexpr int kStageRow = kStageTiles * kTileK * 2;
constexpr int kStageWeight = kStageTiles * kTileBytes;

// What the kernel is told: the product, and what the host knows about it already.
struct Decode {
  Product p;
  int32_t n_tiles, k_tiles, groups;
  int32_t group_tiles;  // k-tiles of a group
  int32_t group_start;  // k-tiles of the first group that lie before the weight
  int32_t units;        // blocks that cover n, for one chunk of rows and one split
  int32_t chunks;       // of rows, if dense
  uint32_t row_bytes;   // of x
  int32_t unit_tiles;   // from a block's first n-tile to that of the next block
  int32_t next_tile;    // from a block's first n-tile to its second
  bool cluster;         // the splits of a unit are one cluster, else they meet in the workspace
  bool wide_x, wide_y;  // rows of x are 16-byte aligned; quads of y lie in one row, aligned
};

M3_HD int ring_bytes(int token_tiles, int tiles) {
  return kSplitParts * kStages * (8 * token_tiles * kStageRow + tiles * kStageWeight);
}

// Blocks that a multiprocessor's shared memory has room for at once: how many registers a thread may have. 16 rows on
// sm_80 need more than half of it.
M3_HD int resident(int token_tiles, int tiles) {
  return token_tiles == 1 ? 4 / tiles : token_tiles == 2 && M3_SM90 ? 2 : 1;
}

// What a block owns.
struct Unit {
  int32_t row, rows;  // of y
  int64_t expert;
  int32_t tile;  // first n-tile
  int32_t split;
  int32_t index;  // among units that end in y
};

// Threads with the same stage of x: one warp, or the warps of a part.
template <int kWarps>
M3_DEVICE void sync_team(int part) {
  if constexpr (kWarps == 1)
    __syncwarp();
  else
    ptx::bar_sync(1 + part, 32 * kWarps);
}

// The unit of this block; false if it has none. Chunks of rows that share a weight are neighbours: the second reads it
// from L2.
M3_DEVICE bool find_unit(const Decode& d, int chunk_rows, Unit& unit) {
  int32_t index = (int32_t)blockIdx.x;
  unit.split = 0;
  if (d.p.plan.splits > 1) unit.split = index % d.p.plan.splits, index /= d.p.plan.splits;
  unit.index = index;
  int32_t first = 0, last = (int32_t)d.p.rows, chunks = d.chunks;
  unit.expert = 0;
  if (d.p.offsets) {
    ExpertRows rows;
    if (!find_expert(d.p, chunk_rows, index / d.units, rows)) return false;
    unit.expert = rows.expert, first = rows.first, last = rows.last, chunks = rows.chunks;
    index -= rows.before * d.units;
  }
  unit.tile = index / chunks * d.unit_tiles;
  unit.row = first + index % chunks * chunk_rows;
  unit.rows = min(last - unit.row, chunk_rows);
  return true;
}

// zero[a]: the offsets that `centred` wants, of byte a of `low` (rows g) and of `high` (rows g + 8).
template <Half kHalf>
M3_DEVICE void widen_zeros(uint32_t low, uint32_t high, uint32_t (&zero)[4][2]) {
#pragma unroll
  for (int a = 0; a < 4; ++a) {
    const uint32_t selector = (uint32_t)(0x4040 | a << 8 | a);  // bytes a, constant, a, constant
    if constexpr (kHalf == Half::kBf16) {
      zero[a][0] = ptx::prmt(low, 0x43, selector), zero[a][1] = ptx::prmt(high, 0x43, selector);
    } else {
      zero[a][0] = ptx::prmt(low, 0x64, selector);
      zero[a][1] = (ptx::prmt(high, 0, selector) << 4) + 0xD400D400u;
    }
  }
}

// Four scales (rows 16a + g of one g, a = 0..3) as they lie in memory.
M3_DEVICE uint4 load_scales(const Decode& d, int64_t index) {
  if (d.p.scale_type == DeviceType::kFp32) return __ldg((const uint4*)((const float*)d.p.scales + index));
  const uint2 two = __ldg((const uint2*)((const uint16_t*)d.p.scales + index));
  return make_uint4(two.x, two.y, 0, 0);
}

M3_DEVICE void widen_scales(DeviceType type, const uint4& raw, float (&scale)[4]) {
  if (type == DeviceType::kFp32) {
    scale[0] = __uint_as_float(raw.x), scale[1] = __uint_as_float(raw.y);
    scale[2] = __uint_as_float(raw.z), scale[3] = __uint_as_float(raw.w);
    return;
  }
  const bool bf16 = type == DeviceType::kBf16;
  const float2 low = bf16 ? ptx::unpack2<Half::kBf16>(raw.x) : ptx::unpack2<Half::kF16>(raw.x);
  const float2 high = bf16 ? ptx::unpack2<Half::kBf16>(raw.y) : ptx::unpack2<Half::kF16>(raw.y);
  scale[0] = low.x, scale[1] = low.y, scale[2] = high.x, scale[3] = high.y;
}

M3_DEVICE float4 add4(const float4& a, const float4& b) {
  return make_float4(ptx::add(a.x, b.x), ptx::add(a.y, b.y), ptx::add(a.z, b.z), ptx::add(a.w, b.w));
}

// What one thread copies of the rows of x of its part: kRows rows of 128 bytes a stage, each 16-byte chunk c of row r
// at c ^ (r % 8). A thread has one column of chunks, and every kRowStep-th row.
template <int kRows, int kTeam>
struct Columns {
  static constexpr int kRowStep = kTeam / (kStageRow / 16);
  static constexpr int kEach = kRows / kRowStep;
  const char* from;      // this column of row 0, in the stage to come
  uint32_t row[kEach];   // of x
  uint32_t present = 0;  // bit i: row[i] is one of x; otherwise zeros
  int32_t thread;

  __device__ __forceinline__ Columns(const Decode& d, const Unit& unit, int32_t tile, int thread_) : thread(thread_) {
    const int64_t column = (int64_t)tile * kTileK + thread % 8 * 8;
    from = (const char*)d.p.x + 2 * column;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int r = thread / 8 + i * kRowStep;
      int32_t index = -1;
      if (r < unit.rows) index = d.p.row_index ? __ldg(d.p.row_index + unit.row + r) : unit.row + r;
      const bool good = index >= 0 && index < d.p.x_rows;
      row[i] = good ? (uint32_t)index : 0;
      present |= (uint32_t)good << i;
    }
  }

  __device__ __forceinline__ char* place(char* stage, int i) const {
    const int r = thread / 8 + i * kRowStep;
    return stage + r * kStageRow + (((thread ^ r) & 7) << 4);
  }

  // Rows from 8 * live on may be left as they are.
  __device__ __forceinline__ void load(const Decode& d, char* stage, int32_t tile, int live) {
    const int32_t left = (int32_t)d.p.k - tile * kTileK - thread % 8 * 8;  // columns to k
    if (d.wide_x) {
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        if (kRows > 16 && i * kRowStep >= 8 * live) break;
        ptx::cp_async_16(place(stage, i), from + (uint64_t)row[i] * d.row_bytes, left > 0 && present >> i & 1 ? 16 : 0);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        const uint16_t* const source = (const uint16_t*)(from + (uint64_t)row[i] * d.row_bytes);
        const int32_t valid = present >> i & 1 ? left : 0;
#pragma unroll 1
        for (int j = 0; j < 8; ++j) ((uint16_t*)place(stage, i))[j] = j < valid ? source[j] : (uint16_t)0;
      }
    }
    from += kStageRow;
  }
};

// Where float4 `quad` (rows 4 quad .. + 3 of the tile) of a token lies among a tile's sums; conflict-free for mma's
// lanes.
M3_DEVICE int sum_index(int token, int row) { return token * kTileN + (row ^ ((token >> 1 & 3) << 3)); }

// y = x W^T for at most 8 kTokenTiles rows. Grid: (units of n, chunks of rows, splits), splits fastest. A block owns
// kTiles n-tiles (64 rows of W each; gate and up of the same columns if gated) of one split. Warp w owns part w % 4 of
// n-tile w / 4 and streams its tiles, which lie one after the other in memory, through a ring of kStages stages of 2
// KiB that it fills with asynchronous copies and alone reads; x goes the same way, shared by the warps of a part. So
// there is no barrier of the block until the sums, and a multiprocessor has 16 warps (8 at 32 rows) x 6 KiB of the
// weight under way, whichever group, part or block ends in between. Tiles of W are the m side of mma, tokens the n
// side: 8 rows cost what 1 costs. Sums: parts through shared memory, splits through the cluster's (or the workspace),
// both in order.
template <Half kHalf, int kTokenTiles, int kTiles>
__global__ void __launch_bounds__(32 * kSplitParts * kTiles, resident(kTokenTiles, kTiles)) decode(const Decode d) {
  constexpr int kRows = 8 * kTokenTiles, kTeam = 32 * kTiles, kThreads = kTeam * kSplitParts;
  constexpr int kStageX = kRows * kStageRow, kRings = ring_bytes(kTokenTiles, kTiles);
  ptx::grid_wait();
  ptx::grid_launch_dependents();
  Unit own;
  if (!find_unit(d, kRows, own)) return;
  const int thread = (int)threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int g = lane / 4, t = lane % 4;
  const int part = warp % kSplitParts, slot = warp / kSplitParts;
  const int live = (own.rows + 7) / 8;  // token tiles with rows
  const int32_t n_tile = own.tile + slot * d.next_tile;
  const bool owner = n_tile < d.n_tiles;  // the second n-tile of the last unit may not be

  const int64_t first64 = ((int64_t)own.split * kSplitParts + part) * d.p.plan.part_tiles;
  const int32_t first = (int32_t)min(first64, (int64_t)d.k_tiles);
  const int32_t last = (int32_t)min(first64 + d.p.plan.part_tiles, (int64_t)d.k_tiles);

  char* const shared = shared_memory();
  Unit& unit = *(Unit*)(shared + kRings);  // read after the loop, which needs the registers
  if (thread == 0) unit = own;
  char* const ring_x = shared + part * kStages * kStageX;
  char* const ring_w = shared + kSplitParts * kStages * kStageX + warp * kStages * kStageWeight;
  const int64_t row_of_tiles = own.expert * d.n_tiles + (owner ? n_tile : 0);
  const char* const weight = (const char*)d.p.qweight + row_of_tiles * d.k_tiles * kTileBytes + lane * 16;

  const char* to_come = weight + (int64_t)first * kTileBytes;
  const int32_t last_read = owner ? last : first;
  auto load_weight = [&](int32_t tile, int stage) {
    char* const to = ring_w + stage * kStageWeight + lane * 16;
    if (tile + kStageTiles <= last_read) {
#pragma unroll
      for (int j = 0; j < kStageTiles; ++j) ptx::cp_async_16(to + j * kTileBytes, to_come + j * kTileBytes);
    } else {
#pragma unroll 1
      for (int j = 0; tile + j < last_read; ++j) ptx::cp_async_16(to + j * kTileBytes, to_come + j * kTileBytes);
    }
    to_come += kStageWeight;
  };
#pragma unroll 1
  for (int s = 0; s < kStages - 1; ++s) load_weight(first + s * kStageTiles, s);
  Columns<kRows, kTeam> columns(d, own, first, slot * 32 + lane);
#pragma unroll 1
  for (int s = 0; s < kStages - 1; ++s) {
    if (first + s * kStageTiles < last) columns.load(d, ring_x + s * kStageX, first + s * kStageTiles, live);
    ptx::cp_async_commit();
  }

  // Scales of the run under way and zeros of the next one, as they lie in memory.
  int32_t group = (first + d.group_start) / d.group_tiles;
  int32_t left = (group + 1) * d.group_tiles - (first + d.group_start);  // tiles of the run to come
  const int64_t quad = row_of_tiles * d.groups * kTileN + 4 * g;
  uint4 raw_scale[2] = {};
  uint32_t raw_zero[2] = {0x08080808u, 0x08080808u}, zero[4][2];
  auto load_groups = [&](bool scales, bool zeros) {
    if (!owner) return;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int64_t index = quad + (int64_t)group * kTileN + 32 * h;
      if (scales) raw_scale[h] = load_scales(d, index);
      if (zeros && d.p.zeros) raw_zero[h] = __ldg((const uint32_t*)(d.p.zeros + index));
    }
  };
  if (first < last) {
    load_groups(true, true);
    widen_zeros<kHalf>(raw_zero[0], raw_zero[1], zero);
    if (++group < d.groups) load_groups(false, true);
  }

  float run[kTokenTiles][4][4] = {}, sum[kTokenTiles][4][4] = {};
  auto multiply = [&](const char* tile, const char* x, int j) {
    const uint4 words = *(const uint4*)(tile + chunk_offset(g, t));
    uint32_t a[4][4];
    centred<kHalf>(words.x, zero[0][0], zero[0][1], a[0]);
    centred<kHalf>(words.y, zero[1][0], zero[1][1], a[1]);
    centred<kHalf>(words.z, zero[2][0], zero[2][1], a[2]);
    centred<kHalf>(words.w, zero[3][0], zero[3][1], a[3]);
    const int chunk = ((2 * j + (lane >> 3 & 1)) ^ (lane & 7)) << 4;
    if constexpr (kTokenTiles == 1) {
      uint32_t b[2];
      ptx::ldmatrix_x2(b, x + (lane & 7) * kStageRow + chunk);
#pragma unroll
      for (int i = 0; i < 4; ++i) ptx::mma_16816<kHalf>(run[0][i], a[i], b[0], b[1]);
    } else {
#pragma unroll
      for (int n = 0; n < kTokenTiles; n += 2) {
        if (n && n >= live) break;
        uint32_t b[4];
        ptx::ldmatrix_x4(b, x + (8 * n + (lane >> 4) * 8 + (lane & 7)) * kStageRow + chunk);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          ptx::mma_16816<kHalf>(run[n][i], a[i], b[0], b[1]);
          ptx::mma_16816<kHalf>(run[n + 1][i], a[i], b[2], b[3]);
        }
      }
    }
  };
  auto end_run = [&](bool more) {
    float scale[2][4];
#pragma unroll
    for (int h = 0; h < 2; ++h) widen_scales(d.p.scale_type, raw_scale[h], scale[h]);
    if (more) {
      widen_zeros<kHalf>(raw_zero[0], raw_zero[1], zero);
      load_groups(true, false);
      if (++group < d.groups) load_groups(false, true);
    }
#pragma unroll
    for (int n = 0; n < kTokenTiles; ++n)
#pragma unroll
      for (int a = 0; a < 4; ++a)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          sum[n][a][i] = ptx::fma(scale[i >> 1][a], run[n][a][i], sum[n][a][i]);
          run[n][a][i] = 0.f;
        }
    left = d.group_tiles;
  };

  int stage = 0;
  for (int32_t tile = first; tile < last; tile += kStageTiles) {
    ptx::cp_async_wait<kStages - 2>();
    sync_team<kTiles>(part);
    const int32_t ahead = tile + (kStages - 1) * kStageTiles;
    const int free_stage = stage == 0 ? kStages - 1 : stage - 1;  // read in the iteration before
    if (ahead < last) {
      load_weight(ahead, free_stage);
      columns.load(d, ring_x + free_stage * kStageX, ahead, live);
    }
    ptx::cp_async_commit();
    const char* const w = ring_w + stage * kStageWeight;
    const char* const x = ring_x + stage * kStageX;
    if (owner) {
      if (tile + kStageTiles <= last && left >= kStageTiles) {
#pragma unroll(kTokenTiles == 2 ? 2 : 4)
        for (int j = 0; j < kStageTiles; ++j) multiply(w + j * kTileBytes, x, j);
        left -= kStageTiles;
        if (!left || tile + kStageTiles == last) end_run(tile + kStageTiles < last);
      } else {
        const int tiles = min(kStageTiles, last - tile);
#pragma unroll 1
        for (int j = 0; j < tiles; ++j) {
          multiply(w + j * kTileBytes, x, j);
          if (!--left || tile + j + 1 == last) end_run(tile + j + 1 < last);
        }
      }
    }
    stage = stage == kStages - 1 ? 0 : stage + 1;
  }
  ptx::cp_async_wait<0>();
  __syncthreads();

  // sums[slot][part][token][row]: parts, then in the place of part 0 the split.
  float* const sums = (float*)shared;
  constexpr int kTileSums = kRows * kTileN;
  {
    float* const to = sums + (slot * kSplitParts + part) * kTileSums;
#pragma unroll
    for (int n = 0; n < kTokenTiles; ++n)
#pragma unroll
      for (int a = 0; a < 4; ++a)
#pragma unroll
        for (int i = 0; i < 4; ++i) to[sum_index(8 * n + 2 * t + (i & 1), 16 * a + 8 * (i >> 1) + g)] = sum[n][a][i];
  }
  __syncthreads();
  const int64_t split_first = (int64_t)unit.split * kSplitParts * d.p.plan.part_tiles;
  const int parts = (int)min((d.k_tiles - split_first + d.p.plan.part_tiles - 1) / d.p.plan.part_tiles,
                             (int64_t)kSplitParts);  // with tiles
  const int quads = unit.rows * (kTileN / 4);        // of one n-tile
  auto place = [&](int which, int item) {
    return which * kSplitParts * kTileSums + sum_index(item / 16, item % 16 * 4);
  };
  auto split_sum = [&](int which, int item) {
    const float* from = sums + place(which, item);
    float4 v = *(const float4*)from;
#pragma unroll 1
    for (int q = 1; q < parts; ++q) v = add4(v, *(const float4*)(from + q * kTileSums));
    return v;
  };

  // A split's sum stays in shared memory for the cluster, or goes to the workspace, where the last block to arrive
  // adds.
  const int splits = d.p.plan.splits;
  float* const meeting = d.p.workspace + (int64_t)unit.index * splits * kTiles * kTileSums;
  const bool gated = d.p.epilogue == Epilogue::kGated;
  const int items = gated ? quads : kTiles * quads;  // of y: four columns of a row
  int begin = thread, end = items;
  if (splits > 1) {
#pragma unroll 1
    for (int item = thread; item < kTiles * quads; item += kThreads) {
      const int which = item >= quads, quad_item = item - which * quads;
      const float4 v = split_sum(which, quad_item);
      if (d.cluster)
        *(float4*)(sums + place(which, quad_item)) = v;
      else
        *(float4*)(meeting + (unit.split * kTiles + which) * kTileSums + quad_item * 4) = v;
    }
    if (d.cluster) {  // every block adds the splits of its share
#if M3_SM90
      ptx::cluster_arrive();
      ptx::cluster_wait();
#endif
      const int share = (items + splits - 1) / splits;
      begin += unit.split * share, end = min((unit.split + 1) * share, items);
    } else {
      __syncthreads();
      int* const arrived = (int*)(sums + kTiles * kSplitParts * kTileSums);
      if (thread == 0) *arrived = ptx::add_acq_rel(d.p.counters + unit.index, 1);
      __syncthreads();
      if (*arrived != splits - 1) return;
      if (thread == 0) d.p.counters[unit.index] = 0;
    }
  }
  auto total = [&](int which, int item) {
    if (splits == 1) return split_sum(which, item);
    float4 v;
#if M3_SM90
    if (d.cluster) {
      const float* const from = sums + place(which, item);
      float4 each[8];
#pragma unroll
      for (int s = 0; s < 8; ++s)
        if (s < splits) each[s] = ptx::load_cluster(from, s);
      v = each[0];
#pragma unroll
      for (int s = 1; s < 8; ++s)
        if (s < splits) v = add4(v, each[s]);
      return v;
    }
#endif
    const float* const from = meeting + which * kTileSums + item * 4;
    v = ptx::load_l2(from);
#pragma unroll 1
    for (int s = 1; s < splits; ++s) v = add4(v, ptx::load_l2(from + s * kTiles * kTileSums));
    return v;
  };

  const int64_t width = gated ? d.p.n / 2 : d.p.n;  // of y
#pragma unroll 1
  for (int item = begin; item < end; item += kThreads) {
    const int which = item >= quads, quad_item = item - which * quads;
    const int64_t column = (int64_t)(unit.tile + which * d.next_tile) * kTileN + quad_item % 16 * 4;
    if (column >= width) continue;
    const float4 whole = total(which, quad_item);
    float v[4] = {whole.x, whole.y, whole.z, whole.w};
    if (gated) {
      const float4 up = total(1, quad_item);
      v[0] = silu_mul(v[0], up.x), v[1] = silu_mul(v[1], up.y);
      v[2] = silu_mul(v[2], up.z), v[3] = silu_mul(v[3], up.w);
    }
    const int valid = (int)min(width - column, (int64_t)4);
    if (d.p.bias)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (i < valid) v[i] = ptx::add(v[i], ptx::to_float<kHalf>(((const uint16_t*)d.p.bias)[column + i]));
    const int64_t to = (int64_t)(unit.row + quad_item / 16) * width + column;
    const uint2 halves = make_uint2(ptx::pack2<kHalf>(v[0], v[1]), ptx::pack2<kHalf>(v[2], v[3]));
    if (d.p.epilogue == Epilogue::kFloat) {
      float* const y = (float*)d.p.y + to;
      if (d.wide_y)
        *(float4*)y = make_float4(v[0], v[1], v[2], v[3]);
      else
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (i < valid) y[i] = v[i];
    } else {
      uint16_t* const y = (uint16_t*)d.p.y + to;
      if (d.wide_y)
        *(uint2*)y = halves;
      else
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (i < valid) y[i] = (uint16_t)((i < 2 ? halves.x : halves.y) >> 16 * (i % 2));
    }
  }
#if M3_SM90
  if (d.cluster) {  // what others read here stays until they have
    ptx::cluster_arrive();
    ptx::cluster_wait();
  }
#endif
}

// -- host -------------------------------------------------------------------------------------------------------------

// Which instantiation, and its grid. No choice here changes a bit of y.
struct Shape {
  int token_tiles, tiles;
  int64_t units, chunks;  // chunks: of all experts, at most
  bool cluster;
};

Shape shape_of(const Product& p) {
  const int64_t busy = p.rows < p.experts ? p.rows : p.experts;
  const bool gated = p.epilogue == Epilogue::kGated;
  Shape shape{};
  // Rows of an expert beyond one chunk read its weight again, from L2: chunks hold about twice the mean.
  const int64_t rows = p.offsets && 2 * p.rows < p.rows * busy ? ceil_div64(2 * p.rows, busy) : p.rows;
  const int most = device().shared_bytes < ring_bytes(4, 2) + (int)sizeof(Unit) ? 2 : 4;
  shape.token_tiles = rows <= 8 ? 1 : rows <= 16 ? 2 : most;
  shape.tiles = gated || shape.token_tiles > 1 ? 2 : 1;
  shape.units = gated ? p.n / (2 * kTileN) : ceil_div64(p.n_tiles(), shape.tiles);
  const int chunk_rows = 8 * shape.token_tiles;
  shape.chunks = p.offsets ? busy + (p.rows - busy) / chunk_rows : ceil_div64(p.rows, chunk_rows);
  shape.cluster = p.plan.splits > 1 && p.plan.splits <= 8 && device().capability == 90;
  return shape;
}

template <Half kHalf, int kTokenTiles, int kTiles>
void start(const Product& p, const Shape& shape) {
  constexpr const char* kOp = "int4_product";
  const bool gated = p.epilogue == Epilogue::kGated;
  Decode d{};
  d.p = p;
  d.n_tiles = (int32_t)p.n_tiles(), d.k_tiles = (int32_t)p.k_tiles(), d.groups = (int32_t)p.groups();
  d.group_tiles = p.group_size < 0 ? INT32_MAX / 2 : (int32_t)(p.group_size / kTileK);
  d.group_start = p.group_size < 0 ? 0 : (int32_t)(p.first_k % p.group_size / kTileK);
  d.row_bytes = (uint32_t)(2 * p.k);
  d.units = (int32_t)shape.units, d.chunks = (int32_t)shape.chunks;
  d.unit_tiles = kTiles, d.next_tile = 1;
  if (gated) d.unit_tiles = 1, d.next_tile = (int32_t)shape.units;
  d.cluster = shape.cluster;
  d.wide_x = p.k % 8 == 0 && (uintptr_t)p.x % 16 == 0;
  const int64_t columns = gated ? p.n / 2 : p.n;
  d.wide_y = columns % 4 == 0 && (uintptr_t)p.y % (p.epilogue == Epilogue::kFloat ? 16 : 8) == 0;
  Launch how;
  how.grid = dim3((unsigned)(shape.units * shape.chunks * p.plan.splits));
  how.block = dim3(32 * kSplitParts * kTiles);
  how.shared_bytes = ring_bytes(kTokenTiles, kTiles) + (int)sizeof(Unit);
  how.stream = (cudaStream_t)p.stream;
  how.cluster = shape.cluster ? p.plan.splits : 1;
  how.dependent = device().capability == 90;
  launch(kOp, &decode<kHalf, kTokenTiles, kTiles>, how, d);
}

template <Half kHalf>
void start(const Product& p, const Shape& shape) {
  if (shape.token_tiles == 1 && shape.tiles == 1) return start<kHalf, 1, 1>(p, shape);
  if (shape.token_tiles == 1) return start<kHalf, 1, 2>(p, shape);
  if (shape.token_tiles == 2) return start<kHalf, 2, 2>(p, shape);
  return start<kHalf, 4, 2>(p, shape);
}

}  // namespace

int multiprocessors() { return device().multiprocessors; }

int64_t decode_workspace(const Product& p) {
  const Shape shape = shape_of(p);
  if (p.plan.splits == 1 || shape.cluster || !p.rows) return 0;
  return shape.units * shape.chunks * p.plan.splits * shape.tiles * shape.token_tiles * 8 * kTileN;
}

int64_t decode_counters(const Product& p) {
  const Shape shape = shape_of(p);
  return p.plan.splits == 1 || shape.cluster || !p.rows ? 0 : shape.units * shape.chunks;
}

void gemm_decode(const Product& p) {
  if (!p.rows) return;
  const Shape shape = shape_of(p);
  if (shape.units * shape.chunks * p.plan.splits > INT32_MAX)
    throw std::invalid_argument("int4_product: rows: want a grid of less than 2**31 blocks; got " +
                                std::to_string(p.rows) + " rows");
  if (p.x_type == DeviceType::kBf16)
    start<Half::kBf16>(p, shape);
  else
    start<Half::kF16>(p, shape);
}

}  // namespace m3::int4
