// Tree attention over a paged cache, on CUDA: attention of one split or of all, then the join of splits.
#include "spec_decode/attention.cuh"

#include <algorithm>
#include <bit>
#include <climits>
#include <type_traits>

#include "common/launch.cuh"
#include "spec_decode/attention_cuda.h"

namespace m3::spec_decode {
namespace {

constexpr const char* kOp = "tree_attention";
constexpr int64_t kMemory = int64_t{64} << 20;  // bytes of partial sums; beyond, a block takes its splits in turn

// -- plan -------------------------------------------------------------------------------------------------------------
// How one call is cut. Nothing here changes a bit of a result.
struct Plan {
  int group;        // query heads of a kv head
  int tiles;        // a block owns 16 tiles rows
  int threads;      // at least 128: the others load
  int query_shift;  // 2^this rows of a query in a block: its heads of one kv head, or a part of them
  int parts;        // blocks that share the heads of a query
  int queries;      // of a block
  int splits;       // of the longest request
  bool partial;     // a block owns one split, and the splits are joined by a second kernel
};

// Places in shared memory, in bytes: constants, so that no register holds one. Only the size is of a plan.
struct Places {
  int raw, zero, slots, rows, scales, totals, bounds, spans, block, queries;
};

template <int kHead>
__host__ __device__ constexpr Places places(bool int8) {
  using S = Shape<kHead>;
  constexpr int kWarps = S::kMostTiles * S::kHalves;
  Places p{};
  p.raw = 4 * S::kTileBytes;
  p.zero = p.raw + (int8 ? S::kTileBytes : 0);
  p.slots = p.zero + S::kRowBytes;
  p.rows = p.slots + 2 * S::kChunk * 8;
  p.scales = p.rows + kWarps * S::kChunk * 4;
  p.totals = p.scales + (int8 ? 6 * S::kChunk * 4 : 0);
  p.bounds = p.totals + kWarps * 16 * 8;
  p.spans = p.bounds + S::kMostTiles * 16 * 8;
  p.block = p.spans + kWarps * 16;
  p.queries = p.block + 80;
  return p;
}

template <int kHead>
constexpr int shared_bytes(bool int8, int tiles) {
  using S = Shape<kHead>;
  return places<kHead>(int8).queries + (S::kQueriesInRegisters ? 0 : tiles * 16 * S::kRowBytes);
}

template <int kHead>
Plan plan_of(const DeviceAttention& c) {
  using S = Shape<kHead>;
  const Device& gpu = device();
  const int64_t group = std::bit_ceil((uint64_t)(c.heads / c.kv_heads));
  Plan plan{};
  plan.group = (int)(c.heads / c.kv_heads);
  const int64_t splits = (c.table_width * c.page_size + kSplit - 1) / kSplit;
  plan.splits = (int)std::min<int64_t>(splits, INT32_MAX);
  const auto cut = [&](int tiles) {
    plan.tiles = tiles, plan.threads = std::max(128, 32 * tiles * S::kHalves);
    const int64_t rows = std::min<int64_t>(group, 16 * tiles);
    plan.query_shift = std::countr_zero((uint64_t)rows);
    plan.parts = (int)(group / rows), plan.queries = (int)(16 * tiles / rows);
  };
  const auto blocks = [&] { return (c.tokens + plan.queries - 1) / plan.queries * c.kv_heads * plan.parts; };
  const int64_t rows = (c.tokens + c.requests - 1) / std::max<int64_t>(c.requests, 1) * group;
  cut((int)std::clamp<int64_t>(std::bit_ceil((uint64_t)(rows + 15) / 16), 1, S::kMostTiles));
  while (plan.tiles > 1 && (shared_bytes<kHead>(c.int8, plan.tiles) > gpu.shared_bytes ||
                            blocks() * std::max(plan.splits, 1) < gpu.multiprocessors))
    cut(plan.tiles / 2);
  const int64_t resident = gpu.multiprocessors * (plan.tiles > 4 ? 1 : 2);
  const int64_t bytes = c.tokens * c.heads * splits * (c.head_size + 2) * 4;
  plan.partial = splits > 1 && splits < 65536 && 4 * blocks() < 3 * resident && bytes <= kMemory;
  return plan;
}

template <class F>
auto with_head(int64_t head_size, F f) {
  if (head_size <= 64) return f(std::integral_constant<int, 64>());
  if (head_size <= 128) return f(std::integral_constant<int, 128>());
  return f(std::integral_constant<int, 256>());
}

// -- requests, rows, slots --------------------------------------------------------------------------------------------
// What a block or warp finds out about a request. Lengths that cannot be attend to nothing.
struct Request {
  int b, first, queries;  // its queries are tokens first .. first + queries - 1
  int prefix, tree;       // keys before its tree, and of it
  bool impossible;
};

M3_DEVICE int boundary(const DeviceAttention& c, int b) { return min(max(__ldg(c.cu_seqlens + b), 0), (int)c.tokens); }

// The last request b with boundary(b) / queries + b * spare <= block: with spare 1, each has room for the blocks of its
// queries there; that of a token has queries 1, spare 0. Found by a whole warp, 32 candidates at a time.
M3_DEVICE Request request_of(const DeviceAttention& c, int block, int queries, int spare) {
  const int lane = threadIdx.x % 32;
  int low = 0, count = (int)c.requests;
  while (count > 1) {
    const int step = (count + 31) / 32, b = low + lane * step;
    const bool before = lane * step < count && boundary(c, b) / queries + b * spare <= block;
    const int found = __popc(__ballot_sync(~0u, before || lane == 0)) - 1;
    low += found * step;
    count = min(step, count - found * step);
  }
  Request r{};
  r.b = low, r.first = boundary(c, low), r.queries = max(boundary(c, low + 1) - r.first, 0);
  const int length = __ldg(c.cache_seqlens + low);
  r.tree = c.tree_lens ? __ldg(c.tree_lens + low) : r.queries;
  r.impossible = r.tree < 0 || r.tree > length || length > c.table_width * c.page_size;
  r.prefix = length - r.tree;
  if (r.impossible) r.prefix = r.tree = 0;
  return r;
}

// Word i of the mask of a query: the tree slots 32 i .. 32 i + 31 that it attends to.
M3_DEVICE uint32_t attended(const DeviceAttention& c, const Request& r, int64_t token, int word) {
  if (word >= c.mask_words || 32 * (int64_t)word >= r.tree) return 0;
  const uint32_t bits = (uint32_t)__ldg(c.mask_bits + token * c.mask_words + word);
  const int left = r.tree - 32 * word;
  return left < 32 ? bits & ((1u << left) - 1) : bits;
}

// Positions that a query attends to: [x, y). Found by a whole warp.
M3_DEVICE int2 positions_of(const DeviceAttention& c, const Request& r, int query) {
  int end = r.prefix + query + 1;
  if (c.mask_bits) {
    int count = 0;
    for (int word = threadIdx.x % 32; 32 * (int64_t)word < r.tree; word += 32)
      count += __popc(attended(c, r, r.first + query, word));
#pragma unroll
    for (int step = 16; step; step /= 2) count += __shfl_xor_sync(~0u, count, step);
    end = r.prefix + count;
  }
  if (r.impossible) end = 0;
  return make_int2(c.window ? max(end - c.window, 0) : 0, end);
}

// rows[i], i < count: the slot of position first + i of a query, less `base`; -1 where not in [from, to).
// `listed`: positions from the prefix on are the tree slots of the mask. By a whole warp.
M3_DEVICE void list_rows(const DeviceAttention& c, const Request& r, int query, bool listed, int first, int count,
                         int base, int from, int to, int* rows) {
  const int lane = threadIdx.x % 32;
  __syncwarp();
  for (int i = lane; i < count; i += 32) {
    const int position = first + i;
    rows[i] = position >= from && position < to && (!listed || position < r.prefix) ? position - base : -1;
  }
  __syncwarp();
  if (!listed) return;
  int position = r.prefix;
  for (int word = 0; 32 * (int64_t)word < r.tree && position < first + count; word += 32) {
    uint32_t bits = attended(c, r, r.first + query, word + lane);
    int before = __popc(bits);
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int other = __shfl_up_sync(~0u, before, step);
      if (lane >= step) before += other;
    }
    int at = position + before - __popc(bits);
    position += __shfl_sync(~0u, before, 31);
    for (; bits && at < first + count; bits &= bits - 1, ++at)
      if (at >= first && at >= from && at < to)
        rows[at - first] = r.prefix + 32 * (word + lane) + __ffs((int)bits) - 1 - base;
  }
  __syncwarp();
}

// Where a slot lies. page: -1 none wanted, kNowhere the table names no page.
struct Slot {
  int page, inside;
};
constexpr int kNowhere = -2;

// -- attention --------------------------------------------------------------------------------------------------------
// What all threads of a block know, and what a warp knows of its rows. In shared memory, so that it does not sit in
// registers through the products; so do sums and bounds of rows.
struct Block {
  Request request;
  int kv_head, heads;  // its query heads are from this on, in those of the kv head
  int begin, active;   // its queries, in those of the request
  int last_position;   // none attends to this or beyond
  int low, own, high;  // chunks [low, high), of which [low, own) hold the same slots for every row
  int base;            // slot of row 0 of the tiles where resident
  int query_shift;     // of the plan
  bool resident;       // the rest of the prefix and the tree fit the tiles
};
static_assert(sizeof(Block) <= 80);

struct Span {
  int least_from, most_from, least_to, most_to;  // of the bounds of its rows
};

template <int kHead>
struct RegisterQueries {
  uint32_t a[kHead / 16][4];
  __device__ __forceinline__ void load(uint32_t (&to)[4], int k) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) to[i] = a[k][i];
  }
};

template <int kHead>
struct SharedQueries {
  const char* row;  // this lane's, of ldmatrix
  int turn;
  __device__ __forceinline__ void load(uint32_t (&to)[4], int k) const { ptx::ldmatrix_x4(to, row + (32 * k ^ turn)); }
};

template <Half kHalf, int kHead, bool kInt8>
struct Loader {
  using S = Shape<kHead>;
  const DeviceAttention& c;
  const Block& block;
  char* shared;
  Slot* slots;
  char* raw;
  float* scales;  // of keys, for each tile, of values, and of keys and values in `raw`

  __device__ __forceinline__ Slot look_up(int slot, bool wanted) const {
    if (!wanted) return {-1, 0};
    const int page = (unsigned)slot / (unsigned)c.page_size,
              at = __ldg(c.block_table + block.request.b * c.table_width + page);
    if (at < 0 || at >= c.pages) return {kNowhere, 0};
    return {at, slot - page * (int)c.page_size};
  }

  // Starts the copies of the chunk whose slots are slots[kChunk * side ..], to tile `tile` or to `raw`.
  __device__ __forceinline__ void issue(int side, int tile) const {
    constexpr int kPieces = kInt8 ? S::kPieces / 2 : S::kPieces, kPiece = kInt8 ? 16 : 8;
    char* keys = kInt8 ? raw : shared + tile * 2 * S::kTileBytes;
    char* values = keys + (kInt8 ? S::kTileBytes / 2 : S::kTileBytes);
    const int64_t head = block.kv_head;
    const auto address = [&](const Paged<void>& of, const Slot& at) {
      return (const char*)of.data + (max(at.page, 0) * of.page + at.inside * of.slot + head * of.head) * (16 / kPiece);
    };
#pragma unroll 1
    for (int i = threadIdx.x; i < S::kChunk * kPieces; i += blockDim.x) {
      const int row = i / kPieces, piece = i % kPieces;
      const Slot at = slots[S::kChunk * side + row];
      const int valid = at.page >= 0 && piece * kPiece < c.head_size ? 16 : 0;
      const int to = (row * kPieces + (kInt8 ? piece : piece ^ (row & 7))) * 16, from = valid ? piece * 16 : 0;
      if (!kInt8 && at.page == kNowhere)
        *(uint4*)(keys + to) = make_uint4(0x7FFF7FFFu, 0x7FFF7FFFu, 0x7FFF7FFFu, 0x7FFF7FFFu);  // nan
      else
        ptx::cp_async_16(keys + to, address(c.k, at) + from, valid);
      ptx::cp_async_16(values + to, address(c.v, at) + from, valid);
    }
    if constexpr (kInt8) {
#pragma unroll 1
      for (int i = threadIdx.x; i < 2 * S::kChunk; i += blockDim.x) {
        const Paged<float>& of = i < S::kChunk ? c.k_scale : c.v_scale;
        const Slot at = slots[S::kChunk * side + i % S::kChunk];
        ptx::cp_async_4(scales + 4 * S::kChunk + i,
                        of.data + (max(at.page, 0) * of.page + at.inside * of.slot + head * of.head),
                        at.page >= 0 ? 4 : 0);
      }
    }
    ptx::cp_async_commit();
  }

  // Integers that have arrived in `raw`, as 16-bit floats in tile `tile`, with the scales of its rows.
  __device__ __forceinline__ void widen(int side, int tile) const {
    constexpr int kPieces = S::kPieces / 2;
    char* tiles = shared + tile * 2 * S::kTileBytes;
#pragma unroll 1
    for (int i = threadIdx.x; i < 2 * S::kChunk * kPieces; i += blockDim.x) {
      const bool value = i >= S::kChunk * kPieces;
      const int row = i / kPieces % S::kChunk, piece = i % kPieces;
      const Slot& at = slots[S::kChunk * side + row];
      const uint4 integers = *(const uint4*)(raw + i * 16);
      const uint32_t four[4] = {integers.x, integers.y, integers.z, integers.w};
      const float factor = kHalf == Half::kF16 && value ? scales[5 * S::kChunk + row] : 1.f;
      uint32_t two[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const int shift = 16 * (j % 2);
        const float low = (float)(int8_t)(four[j / 2] >> shift), high = (float)(int8_t)(four[j / 2] >> (shift + 8));
        two[j] = ptx::pack2<kHalf>(ptx::mul(low, factor), ptx::mul(high, factor));
        if (!value && at.page == kNowhere) two[j] = 0x7FFF7FFFu;
        if (value && at.page < 0) two[j] = 0;
      }
      char* to = tiles + (value ? S::kTileBytes : 0) + row * S::kRowBytes;
      *(uint4*)(to + ((2 * piece ^ (row & 7)) << 4)) = make_uint4(two[0], two[1], two[2], two[3]);
      *(uint4*)(to + ((2 * piece + 1 ^ (row & 7)) << 4)) = make_uint4(two[4], two[5], two[6], two[7]);
    }
#pragma unroll 1
    for (int i = threadIdx.x; i < 2 * S::kChunk; i += blockDim.x)
      scales[S::kChunk * (i / S::kChunk * 2 + tile) + i % S::kChunk] = scales[4 * S::kChunk + i];
  }

  // Waits for a chunk that was issued; afterwards `tile` can be read, and the other tile and `raw` written.
  __device__ __forceinline__ void arrive(int side, int tile) const {
    ptx::cp_async_wait<0>();
    __syncthreads();
    if constexpr (kInt8) {
      widen(side, tile);
      __syncthreads();
    }
  }
};

// Whether the values of a chunk in shared memory are all finite, for a whole warp.
template <Half kHalf, int kHead>
M3_DEVICE bool finite(const char* values) {
  constexpr uint32_t kLow = kHalf == Half::kBf16 ? 0x7F80 : 0x7C00, kHigh = kLow << 16;
  bool good = true;
  for (int i = threadIdx.x % 32; i < Shape<kHead>::kTileBytes / 16; i += 32) {
    const uint4 piece = *(const uint4*)(values + i * 16);
    for (const uint32_t two : {piece.x, piece.y, piece.z, piece.w})
      good = good && (two & kLow) != kLow && (two & kHigh) != kHigh;
  }
  return __all_sync(~0u, good);
}

M3_DEVICE float gate_of(const DeviceAttention& c, int64_t token, int head, int column) {
  const int64_t at = token * c.gate_row + (c.gate_one ? head : head * c.head_size + column);
  if (c.gate_type == DeviceType::kFloat32) return __ldg((const float*)c.gate + at);
  const uint16_t bits = __ldg((const uint16_t*)c.gate + at);
  return c.gate_type == DeviceType::kBfloat16 ? ptx::to_float<Half::kBf16>(bits) : ptx::to_float<Half::kF16>(bits);
}

// Four columns of a row of the result: gated and rounded.
template <Half kHalf>
M3_DEVICE void finish(const DeviceAttention& c, int64_t token, int head, int column, float factor, float4 sums) {
  float x[4] = {sums.x, sums.y, sums.z, sums.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    x[i] = ptx::mul(x[i], factor);
    if (c.gate) x[i] = ptx::mul(x[i], sigmoid(gate_of(c, token, head, column + i)));
  }
  *(uint2*)((uint16_t*)c.out + (token * c.heads + head) * c.head_size + column) =
      make_uint2(ptx::pack2<kHalf>(x[0], x[1]), ptx::pack2<kHalf>(x[2], x[3]));
}

// Grid: (blocks of queries, kv heads * parts of their query heads, splits if plan.partial). A block owns 16 plan.tiles
// rows: plan.queries queries of one request, each with 2^plan.query_shift query heads of one kv head; request b has
// room for blocks from cu[b] / queries + b on, the surplus returns. A warp owns 16 rows and all their keys, so that
// keys and values cross shared memory once for all of a block's rows, and rows never meet. All threads copy chunks of
// keys and values to two tiles, one ahead of the products. Chunks that end inside the prefix are read once. From there
// on, in a tree, rows attend to slots of their own: if the rest of the prefix and the tree fit the two tiles, they are
// read once, and a warp picks the rows of each query by their addresses; else slots are gathered query by query.
// plan.partial: sums of one split go to memory, (tokens, heads, splits, head_size) and then (.., 2). Else all splits in
// order, their joint sums waiting in memory (tokens, heads, head_size) where they are more than one, and the result.
template <Half kHalf, int kHead, bool kInt8>
__global__ __launch_bounds__(256) void attention_kernel(const __grid_constant__ DeviceAttention c,
                                                        const __grid_constant__ Plan plan) {
  using S = Shape<kHead>;
  constexpr int kChunk = S::kChunk, kSplitChunks = kSplit / kChunk;
  const int tid = threadIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4;
  const int t = threadIdx.x % 4;
  const int half = threadIdx.x / 32 % S::kHalves, first_row = threadIdx.x / 32 / S::kHalves * 16;
  const bool computes = first_row < 16 * plan.tiles;
  const Request found = request_of(c, blockIdx.x, plan.queries, 1);
  const int begin = (int)(blockIdx.x - (found.first / plan.queries + found.b)) * plan.queries;
  if (begin < 0 || begin >= found.queries) return;
  const int active = min(found.queries - begin, plan.queries);
  char* shared = shared_memory();
  constexpr Places at = places<kHead>(kInt8);
  int2* bounds = (int2*)(shared + at.bounds);
  int* rows = (int*)(shared + at.rows) + (computes ? warp : 0) * kChunk;
  Loader<kHalf, kHead, kInt8> loader{c,
                                     *(Block*)(shared + at.block),
                                     shared,
                                     (Slot*)(shared + at.slots),
                                     shared + at.raw,
                                     (float*)(shared + at.scales)};
  Slot* slots = loader.slots;

#pragma unroll 1
  for (int i = warp; i < active; i += blockDim.x / 32) {
    const int2 positions = positions_of(c, found, begin + i);
    if (lane == 0) bounds[i] = positions;
  }
  if (tid < S::kPieces) *(uint4*)(shared + at.zero + tid * 16) = make_uint4(0, 0, 0, 0);
  __syncthreads();
  Block& block = *(Block*)(shared + at.block);
  {
    int from = INT_MAX, to = 0;
    for (int i = lane; i < active; i += 32)
      if (bounds[i].x < bounds[i].y) from = min(from, bounds[i].x), to = max(to, bounds[i].y);
    from = __reduce_min_sync(~0u, from), to = __reduce_max_sync(~0u, to);
    int low = to ? from / kChunk : 0, high = (to + kChunk - 1) / kChunk;
    if (plan.partial) {
      low = max(low, (int)blockIdx.z * kSplitChunks), high = min(high, ((int)blockIdx.z + 1) * kSplitChunks);
      if (low >= high) return;
    }
    const int kv_head = blockIdx.y / plan.parts, heads = (blockIdx.y - kv_head * plan.parts) << plan.query_shift;
    const int whole = found.prefix / kChunk, base = whole * kChunk;
    const int own = c.mask_bits ? max(min(whole, high), low) : high;
    const bool resident = found.prefix - base + found.tree <= 2 * kChunk;
    if (tid == 0)
      block = Block{found, kv_head, heads, begin, active, to, low, own, high, base, plan.query_shift, resident};
    __syncthreads();
  }

  // The rows of the warp's tile; this lane's are g and g + 8. What all have in common decides how chunks are computed.
  struct Row {
    int query, head;  // in the block; of all
    int64_t token;
    bool real;
  };
  const auto row_of = [&](int i) {
    const int row = first_row + i, in_group = block.heads + (row & ((1 << block.query_shift) - 1));
    const int query = row >> block.query_shift;
    return Row{query, block.kv_head * plan.group + in_group, block.request.first + block.begin + (int64_t)query,
               computes && query < block.active && in_group < plan.group};
  };
  bool real[2];
  Span& span = *(Span*)(shared + at.spans + (computes ? warp : 0) * (int)sizeof(Span));
  {
    Span of{INT_MAX, 0, INT_MAX, 0};
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const Row row = row_of(g + 8 * r);
      real[r] = row.real;
      if (row.real) {
        const int2 own = bounds[row.query];
        of.least_from = min(of.least_from, own.x), of.most_from = max(of.most_from, own.x);
        of.least_to = min(of.least_to, own.y), of.most_to = max(of.most_to, own.y);
      }
    }
    of.least_from = __reduce_min_sync(~0u, of.least_from), of.most_from = __reduce_max_sync(~0u, of.most_from);
    of.least_to = __reduce_min_sync(~0u, of.least_to), of.most_to = __reduce_max_sync(~0u, of.most_to);
    if (computes && lane == 0) span = of;
    __syncwarp();
  }

  // Queries; a scale below 0 turns their signs.
  std::conditional_t<S::kQueriesInRegisters, RegisterQueries<kHead>, SharedQueries<kHead>> q;
  const uint32_t sign = c.scale < 0 ? 0x80008000u : 0;
  const float scale = fabsf(c.scale);
  const auto query_of = [&](const Row& row) {
    return (const uint32_t*)((const uint16_t*)c.q + row.token * c.q_token + row.head * c.q_head);
  };
  if constexpr (S::kQueriesInRegisters) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const uint32_t* own_query = query_of(row_of(g + 8 * r));
#pragma unroll
      for (int i = 0; i < kHead / 8; ++i) {
        const bool there = real[r] && 8 * i < c.head_size;
        q.a[i / 2][i % 2 * 2 + r] = there ? __ldg(own_query + 4 * i + t) ^ sign : 0;
      }
    }
  } else {
    char* own_queries = shared + at.queries + (computes ? first_row : 0) * S::kRowBytes;
#pragma unroll 1
    for (int i = lane; i < 16 * S::kPieces * 4 && computes && half == 0; i += 32) {
      const int row = i / (S::kPieces * 4), column = i % (S::kPieces * 4) * 2;
      const Row of = row_of(row);
      *(uint32_t*)(own_queries + row * S::kRowBytes + ((column / 8 ^ (row & 7)) << 4) + column % 8 * 2) =
          of.real && column < c.head_size ? __ldg(query_of(of) + column / 2) ^ sign : 0;
    }
    q.row = own_queries + lane % 16 * S::kRowBytes, q.turn = ((lane & 7) ^ lane >> 4) << 4;
  }

  State<kHead> s;
  float2* totals = (float2*)(shared + at.totals) + (computes ? warp : 0) * 16 + g;  // m and l of earlier splits
  const float* scales = loader.scales;
  if (block.low < block.own) {
#pragma unroll 1
    for (int i = tid; i < 2 * kChunk; i += blockDim.x) {
      const int slot = (block.low + i / kChunk) * kChunk + i % kChunk;
      slots[(block.low + i / kChunk) % 2 * kChunk + i % kChunk] = loader.look_up(slot, slot < block.last_position);
    }
    __syncthreads();
    loader.issue(block.low % 2, block.low % 2);
  }

  int chunk = block.low, pass = 0;  // one pass over a chunk, or one for each query whose slots are gathered
  do {                              // a split
    State<kHead>::clear(s);
    while (chunk < block.high) {
      const int first = chunk * kChunk;
      const bool in_tree = chunk >= block.own, gathered = in_tree && !block.resident;
      int offset = 0;  // slot of row 0 of the tiles
      if (!in_tree) {
        const int tile = chunk % 2;
        loader.arrive(tile, tile);
        const int slot = first + 2 * kChunk + tid;
        const bool looks = tid < kChunk && chunk + 2 < block.own;
        const Slot ahead = loader.look_up(slot, looks && slot < block.last_position);  // while copies start
        if (chunk + 1 < block.own) loader.issue(1 - tile, 1 - tile);
        if (looks) slots[tile * kChunk + tid] = ahead;
        offset = first - tile * kChunk;
      } else if (block.resident) {
        offset = block.base;
        if (chunk == block.own) {
          __syncthreads();
          const int end = block.request.prefix + block.request.tree;
#pragma unroll 1
          for (int i = tid; i < 2 * kChunk; i += blockDim.x)
            slots[i] = loader.look_up(block.base + i, block.base + i < end);
          __syncthreads();
          loader.issue(0, 0);
          if constexpr (kInt8) loader.arrive(0, 0);  // there is one place for integers
          loader.issue(1, 1);
          loader.arrive(1, 1);
        }
      } else {
        offset = first;
        __syncthreads();
        if (warp == 0)
          list_rows(c, block.request, block.begin + pass, true, first, kChunk, 0, bounds[pass].x, bounds[pass].y, rows);
        __syncthreads();
#pragma unroll 1
        for (int i = tid; i < kChunk; i += blockDim.x) {
          const int slot = ((int*)(shared + at.rows))[i];
          slots[i] = loader.look_up(slot, slot >= 0);
        }
        __syncthreads();
        loader.issue(0, 0);
        loader.arrive(0, 0);
      }

      if (computes && span.most_to > first && span.least_from < first + kChunk) {
        Tiles tiles{shared, 0, at.zero, half, rows, scales, scales + 2 * kChunk};
        if (!in_tree && span.most_from <= first && span.least_to >= first + kChunk) {
          const int tile = chunk % 2;
          tiles.keys = tile * 2 * S::kTileBytes;
          tiles.k_scales += tile * kChunk, tiles.v_scales += tile * kChunk;
          const int2 all[2] = {};
          attend<kHalf, kHead, kInt8, true>(s, q, tiles, scale, first, all);
        } else {
          int query = first_row >> block.query_shift,
              last = min((first_row + 15) >> block.query_shift, block.active - 1);
          // Together: zeros as weights would let infinite values of others through.
          bool together = false;
          if (!in_tree && last > query) together = finite<kHalf, kHead>(shared + (chunk % 2 * 2 + 1) * S::kTileBytes);
          if (together) last = query;
          if (gathered) query = max(query, pass), last = min(last, pass);
          for (; query <= last; ++query) {
            const int x = together ? span.least_from : bounds[query].x, y = together ? span.most_to : bounds[query].y;
            if (x >= first + kChunk || y <= first) continue;
            list_rows(c, block.request, block.begin + query, in_tree && !gathered, first, kChunk, offset, x, y, rows);
            int2 own[2];
#pragma unroll
            for (int r = 0; r < 2; ++r) {
              const Row row = row_of(g + 8 * r);
              own[r] = row.real && (together || row.query == query) ? bounds[row.query] : make_int2(0, 0);
            }
            attend<kHalf, kHead, kInt8, false>(s, q, tiles, scale, first, own);
          }
        }
      }
      pass = gathered && pass + 1 < block.active ? pass + 1 : 0;
      chunk += pass == 0;
      if (pass == 0 && chunk % kSplitChunks == 0) break;
    }

    // It is complete.
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      s.l[r] = ptx::add(s.l[r], __shfl_xor_sync(~0u, s.l[r], 1));
      s.l[r] = ptx::add(s.l[r], __shfl_xor_sync(~0u, s.l[r], 2));
      const Row row = row_of(g + 8 * r);
      float* sums = c.memory + (row.token * c.heads + row.head) * c.head_size + half * S::kColumns + 2 * t;
      const auto own_column = [&](int j) { return row.real && half * S::kColumns + 8 * j < c.head_size; };
      if ((chunk - 1) / kSplitChunks * kSplitChunks > block.low) {  // not the first
        const float2 total = totals[8 * r];
        const Joint joint = join(total.x, total.y, s.m[r], s.l[r]);
        s.m[r] = joint.m, s.l[r] = joint.l;
#pragma unroll
        for (int j = 0; j < S::kColumns / 8; j += 4) {
          float2 before[4] = {};
#pragma unroll
          for (int i = 0; i < 4; ++i)
            if (own_column(j + i)) before[i] = *(const float2*)(sums + 8 * (j + i));
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            s.acc[j + i][2 * r] = join(joint, before[i].x, s.acc[j + i][2 * r]);
            s.acc[j + i][2 * r + 1] = join(joint, before[i].y, s.acc[j + i][2 * r + 1]);
          }
        }
      }
      if (chunk < block.high) {
        __syncwarp();  // the lanes of a row have read what was there
        if (computes) totals[8 * r] = make_float2(s.m[r], s.l[r]);
#pragma unroll
        for (int j = 0; j < S::kColumns / 8; ++j)
          if (own_column(j)) *(float2*)(sums + 8 * j) = make_float2(s.acc[j][2 * r], s.acc[j][2 * r + 1]);
      }
    }
  } while (chunk < block.high);

  // Rows leave by way of the tiles, a row at a time: whole lines of gates and results, few registers.
  __syncthreads();
  if (!computes) return;
  float* own_rows = (float*)shared + warp * 16 * S::kColumns;  // 8 columns j of row i lie at j ^ i % 8
#pragma unroll
  for (int r = 0; r < 2; ++r)
#pragma unroll
    for (int j = 0; j < S::kColumns / 8; ++j)
      *(float2*)(own_rows + (g + 8 * r) * S::kColumns + (j ^ g) * 8 + 2 * t) =
          make_float2(s.acc[j][2 * r], s.acc[j][2 * r + 1]);
  __syncwarp();
  for (int i = 0; i < 16; ++i) {
    const float m = __shfl_sync(~0u, i < 8 ? s.m[0] : s.m[1], i % 8 * 4);
    const float l = __shfl_sync(~0u, i < 8 ? s.l[0] : s.l[1], i % 8 * 4);
    const Row row = row_of(i);
    if (!row.real) continue;
    const int64_t at_split = (row.token * c.heads + row.head) * plan.splits + blockIdx.z;
    if (plan.partial && half == 0 && lane == 0)
      *(float2*)(c.memory + c.tokens * c.heads * plan.splits * c.head_size + 2 * at_split) = make_float2(m, l);
    const int column = half * S::kColumns + 4 * lane;
    if (4 * lane >= S::kColumns || column >= c.head_size) continue;
    const float4 sums = *(const float4*)(own_rows + i * S::kColumns + (4 * lane ^ i % 8 * 8));
    if (plan.partial)
      *(float4*)(c.memory + at_split * c.head_size + column) = sums;
    else
      finish<kHalf>(c, row.token, row.head, column, normalizer(l, block.request.impossible), sums);
  }
}

// Grid: (tokens, blocks of 4 heads). A warp joins the splits of one row in ascending order and writes the result.
template <Half kHalf>
__global__ __launch_bounds__(128, 8) void join_kernel(const __grid_constant__ DeviceAttention c, int splits) {
  constexpr int kPieces = 2;  // of 4 columns a lane
  const int token = blockIdx.x, head = blockIdx.y * 4 + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (head >= c.heads) return;
  const Request request = request_of(c, token, 1, 0);
  const int2 positions = positions_of(c, request, token - request.first);
  const int64_t row = ((int64_t)token * c.heads + head) * splits;
  const float* sums = c.memory + row * c.head_size;
  const float* pairs = c.memory + c.tokens * c.heads * splits * c.head_size + 2 * row;
  float m = -INFINITY, l = 0.f, acc[kPieces][4] = {};
  ptx::grid_wait();
  const int last = (positions.y + kSplit - 1) / kSplit;
#pragma unroll 4
  for (int split = positions.x / kSplit; split < last; ++split) {
    const float2 next = __ldcg((const float2*)(pairs + 2 * split));
    const Joint joint = join(m, l, next.x, next.y);
    m = joint.m, l = joint.l;
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const int column = 4 * (lane + 32 * i);
      if (column >= c.head_size) continue;
      const float4 four = ptx::load_l2(sums + split * c.head_size + column);
      acc[i][0] = join(joint, acc[i][0], four.x), acc[i][1] = join(joint, acc[i][1], four.y);
      acc[i][2] = join(joint, acc[i][2], four.z), acc[i][3] = join(joint, acc[i][3], four.w);
    }
  }
  const float factor = normalizer(l, request.impossible);
#pragma unroll
  for (int i = 0; i < kPieces; ++i) {
    const int column = 4 * (lane + 32 * i);
    if (column >= c.head_size) continue;
    finish<kHalf>(c, token, head, column, factor, make_float4(acc[i][0], acc[i][1], acc[i][2], acc[i][3]));
  }
}

template <Half kHalf, int kHead, bool kInt8>
void run(const DeviceAttention& c, cudaStream_t stream) {
  const Plan plan = plan_of<kHead>(c);
  Launch how{};
  how.grid = dim3((unsigned)(c.tokens / plan.queries + c.requests), (unsigned)(c.kv_heads * plan.parts),
                  plan.partial ? plan.splits : 1);
  how.block = dim3(plan.threads), how.stream = stream;
  how.shared_bytes = shared_bytes<kHead>(kInt8, plan.tiles);
  launch(kOp, attention_kernel<kHalf, kHead, kInt8>, how, c, plan);
  if (!plan.partial) return;
  Launch joining{};
  joining.grid = dim3((unsigned)c.tokens, (unsigned)((c.heads + 3) / 4)), joining.block = dim3(128);
  joining.stream = stream, joining.dependent = device().capability >= 90;
  launch(kOp, join_kernel<kHalf>, joining, c, plan.splits);
}

template <Half kHalf>
void run(const DeviceAttention& c, cudaStream_t stream) {
  with_head(c.head_size, [&](auto head) {
    if (c.int8)
      run<kHalf, head.value, true>(c, stream);
    else
      run<kHalf, head.value, false>(c, stream);
  });
}

}  // namespace

int64_t attention_memory(const DeviceAttention& c) {
  const Plan plan = with_head(c.head_size, [&](auto head) { return plan_of<head.value>(c); });
  if (plan.splits <= 1) return 0;
  const int64_t rows = c.tokens * c.heads;
  return plan.partial ? rows * plan.splits * (c.head_size + 2) : rows * c.head_size;
}

void tree_attention(const DeviceAttention& c, void* stream) {
  if (!c.tokens) return;
  if (c.type == DeviceType::kFloat16)
    run<Half::kF16>(c, (cudaStream_t)stream);
  else
    run<Half::kBf16>(c, (cudaStream_t)stream);
}

}  // namespace m3::spec_decode
