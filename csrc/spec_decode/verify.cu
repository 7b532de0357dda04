// Verification of trees: the walk by the target's law, straight from the logits of the nodes on the accepted path.
#include <algorithm>

#include "spec_decode/rows.cuh"

namespace m3::spec_decode {
namespace {

constexpr int kList = 2048;   // tokens that pass to a list
constexpr int kGroups = 128;  // of threads of a team: each group's largest z is at least the list's smallest
constexpr int kSegments = kMostVocabulary / kSegment;

struct Entry {
  float z;
  int token;
};

// How a request is cut: each rank owns `tokens` of the vocabulary, a multiple of kSegment.
struct Cut {
  int ranks, tokens;
  bool keep;  // z of a rank's part stay in shared memory
};

// Shared memory of a block, in bytes from its beginning. The masses of segments lie over `list` and `bins`: they are
// written when both have been read.
struct Layout {
  int tokens, next_token, next_sibling, children, child_mass, own_list, list, bins, kept, bytes;
  __host__ __device__ Layout(int nodes, const Cut& cut) {
    const int n = (nodes + 15) / 16 * 16;
    tokens = (sizeof(Board) + 15) / 16 * 16;
    children = tokens + 4 * n;
    child_mass = children + 4 * n;
    next_token = child_mass + 8 * n;
    next_sibling = next_token + 2 * n;
    own_list = next_sibling + 2 * n;
    list = own_list + kList * (int)sizeof(Entry);
    bins = list + kList * (int)sizeof(Entry);
    kept = bins + kBins * (int)sizeof(Mass);
    bytes = kept + (cut.keep ? 4 * cut.tokens : 0);
  }
};
static_assert(kSegments * sizeof(Mass) <= kList * sizeof(Entry) + kBins * sizeof(Mass));

// First number m of 1 .. total with m > u * total, or the last.
M3_DEVICE Mass aim(double u, Mass total) {
  const double place = u * (double)total;
  const Mass whole = place > 0 ? place < (double)total ? (Mass)place : total - 1 : 0;
  return min(whole, total - 1) + 1;
}

// One request's walk; a member function is for all threads of the team.
template <Type kType>
struct Walk {
  const Verify& a;
  int64_t b;
  Team team;
  Slice<kType> slice;
  int share;    // tokens of a rank's part
  int* tokens;  // of the nodes; -1: none of the vocabulary
  int16_t *next_token, *next_sibling;
  int* children;     // tokens of the node's children, elder first
  Mass* child_mass;  // likewise
  Entry *own_list, *list;
  Mass *bins, *segments;
  Noise noise;
  Scale scale;
  uint32_t limit;  // largest key that the filters keep
  int listed;      // tokens in `list`, among them all that are kept; -1: there is no list

  // -- the list ------------------------------------------------------------------------------------------------------
  template <class Visit>
  __device__ __forceinline__ void each_listed(int count, Visit visit) const {
#pragma unroll 1
    for (int i = threadIdx.x; i < count; i += kThreads) visit(list[i], scale.key(list[i].z));
  }

  // Mass of the list's keys of at most `most`.
  __device__ Mass listed_mass(int count, uint32_t most) {
    Pair sum{0, 0};
    each_listed(count, [&](const Entry&, uint32_t key) { sum.a += key <= most ? scale.mass(key) : 0; });
    return team.fold(sum, Fold::kSum, true).a;
  }

  // Takes the tokens with keys of at most `reach` into every rank's list; returns their number, or -1 if they are too
  // many. whole: mass (if asked for) and number of all tokens with finite z.
  __device__ int collect(uint32_t reach, bool with_mass, Pair& whole) {
    int* count = &team.board->count;
    if (threadIdx.x == 0) *count = 0;
    __syncthreads();
    Pair sum{0, 0};
    slice.each([&](int v, const float (&z)[kNeighbours]) {
#pragma unroll
      for (int j = 0; j < kNeighbours; ++j) {
        const uint32_t key = scale.key(z[j]);
        if (key > kLargest) continue;
        if (with_mass) sum.a += scale.mass(key);
        ++sum.b;
        if (key > reach) continue;
        sum.b += 1ull << 32;
        const int at = atomicAdd(count, 1);
        if (at < kList) own_list[at] = {z[j], v + j};
      }
    });
    sum = team.fold(sum, Fold::kSum);
    whole = {sum.a, sum.b & 0xFFFFFFFFu};
    const Mass all = sum.b >> 32;
    if (all > kList) return -1;
    if (team.size > 1) {
      const int share = kThreads / team.size, other = threadIdx.x / share;
      int before = 0;
      for (int r = 0; r < other; ++r) before += (int)(team.message(r).b >> 32);
      const int there = (int)(team.message(other).b >> 32);
      for (int i = threadIdx.x % share * 2; i < there; i += 2 * share) {
        const Pair two = team.from((const Pair*)(own_list + i), other);
        Entry entries[2];
        memcpy(entries, &two, sizeof two);
        list[before + i] = entries[0];
        if (i + 1 < there) list[before + i + 1] = entries[1];
      }
    }
    __syncthreads();
    return (int)all;
  }

  // -- the row --------------------------------------------------------------------------------------------------------
  // The largest key below which less than `target` lies, of the whole row: tokens, or mass.
  __device__ uint32_t row_place(bool by_mass, Mass target) {
    return place_of(team, bins, target, true, [&](auto item) {
      slice.each([&](int, const float (&z)[kNeighbours]) {
#pragma unroll
        for (int j = 0; j < kNeighbours; ++j) {
          const uint32_t key = scale.key(z[j]);
          if (key <= limit) item(key, by_mass ? scale.mass(key) : 1);
        }
      });
    });
  }

  // Mass of the row's tokens that are kept.
  __device__ __forceinline__ Mass row_mass() {
    Pair sum{0, 0};
    slice.each([&](int, const float (&z)[kNeighbours]) {
#pragma unroll
      for (int j = 0; j < kNeighbours; ++j) {
        const uint32_t key = scale.key(z[j]);
        if (key <= limit) sum.a += scale.mass(key);
      }
    });
    return team.fold(sum, Fold::kSum).a;
  }

  // Mass of each segment of this rank's part; returns the sum of the team. weight(v, key): of a token that is kept.
  template <class Weight>
  __device__ __forceinline__ Mass masses(Weight weight) {
    Pair sum{0, 0};
    slice.each([&](int v, const float (&z)[kNeighbours]) {
      Mass own = 0;
#pragma unroll
      for (int j = 0; j < kNeighbours; ++j) {
        const uint32_t key = scale.key(z[j]);
        if (key <= limit) own += weight(v + j, key);
      }
      sum.a += own;
#pragma unroll
      for (int bits = 16; bits; bits /= 2) own += __shfl_xor_sync(kAll, own, bits);
      if (threadIdx.x % 32 == 0) segments[(v - slice.first) / kSegment] = own;
    });
    return team.fold(sum, Fold::kSum).a;
  }

  // -- filters -------------------------------------------------------------------------------------------------------
  __device__ void filter(float floor) {
    const int k = a.top_k ? a.top_k[b] : 0;
    const float share = a.top_p ? a.top_p[b] : 1.f, least = a.min_p ? a.min_p[b] : 0.f;
    const bool by_k = k > 0 && k < slice.vocabulary, by_p = share < 1.f;
    if (!by_k && !by_p && !(least > 0.f)) return;
    const uint32_t reach = floor > nothing() ? min(scale.key(floor), kLargest) : kLargest;
    Pair whole;
    const int count = collect(reach, by_p && !by_k, whole);
#pragma unroll 1
    for (int by_mass = 0; by_mass < 2; ++by_mass) {
      Mass target = 0;
      if (!by_mass) {
        if (by_k && (Mass)k <= whole.b) target = (Mass)k;
      } else if (by_p) {
        Mass all = whole.a;
        if (by_k) all = count >= 0 && limit <= reach ? listed_mass(count, limit) : row_mass();
        const double part = (double)share * (double)all;
        target = part > 0 ? (Mass)part : 0;
        target = all ? max(min(target + ((double)target < part), all), (Mass)1) : 0;
      }
      if (!target) continue;
      const uint32_t most = min(limit, reach);
      const bool near = count >= 0 && (by_mass ? listed_mass(count, most) : (Mass)count) >= target;
      limit = near ? place_of(team, bins, target, false,
                              [&](auto item) {
                                each_listed(count, [&](const Entry&, uint32_t key) {
                                  if (key <= most) item(key, by_mass ? scale.mass(key) : 1);
                                });
                              })
                   : row_place(by_mass, target);
    }
    if (least > 0.f) {  // the largest key with x >= log(least)
      const double most = -log((double)least);
      const float nearest = (float)most;
      const uint32_t key = __float_as_uint(nearest) & 0x7FFFFFFFu;
      limit = min(limit, least < 1.f ? key - ((double)nearest > most) : 0u);
    }
    if (count >= 0 && limit <= reach) listed = count;
  }

  // -- drawing -------------------------------------------------------------------------------------------------------
  __device__ int race() {
    Race race;
    if (listed >= 0) {
      each_listed(listed, [&](const Entry& entry, uint32_t key) {
        if (key > limit) return;
        const uint4 four = words(noise, entry.token >> 2, kRace);
        race.enter(noise, scale, entry.z, scale.x(entry.z), entry.token, pick(four, entry.token & 3));
      });
    } else {
      slice.each([&](int v, const float (&z)[kNeighbours]) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float x[4];
          bool any = false;
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            x[j] = scale.x(z[4 * half + j]);
            any = any || (__float_as_uint(x[j]) & 0x7FFFFFFFu) <= limit;
          }
          if (!any) continue;
          const uint4 four = words(noise, v / 4 + half, kRace);
#pragma unroll
          for (int j = 0; j < 4; ++j)
            if ((__float_as_uint(x[j]) & 0x7FFFFFFFu) <= limit)
              race.enter(noise, scale, z[4 * half + j], x[j], v + 4 * half + j, pick(four, j));
        }
      });
    }
    const Pair best = team.fold(Pair{ordered(race.best), (Mass)race.token}, Fold::kBest, listed >= 0);
    return best.b < (Mass)slice.vocabulary ? (int)best.b : -1;
  }

  // The token in which `target` of the list's weights falls.
  template <class Weight>
  __device__ __forceinline__ int listed_token(Mass target, Weight weight) {
    return (int)place_of(team, bins, target, false, [&](auto item) {
      each_listed(listed, [&](const Entry& entry, uint32_t key) {
        if (key <= limit) item((uint32_t)entry.token, weight(entry.token, key));
      });
    });
  }

  __device__ __forceinline__ bool is_child(int token, int count) const {
#pragma unroll 1
    for (int i = 0; i < count; ++i)
      if (children[i] == token) return true;
    return false;
  }

  // The token in which u of the row's mass falls, after `masses` of the same weight, without the first `removed`
  // children. Known to the rank that owns the token: `mine`.
  template <class Weight>
  __device__ __forceinline__ int row_token(double u, int removed, bool& mine, Weight weight) {
    const int lane = threadIdx.x % 32, other = lane % team.size;
    Mass part = team.message(other).a;
#pragma unroll 1
    for (int i = 0; i < removed; ++i)
      if (children[i] >= 0 && children[i] / share == other) part -= child_mass[i];
    if (lane >= team.size) part = 0;
    Mass upto = part;
#pragma unroll
    for (int by = 1; by < kMostRanks; by *= 2) {
      const Mass lower = __shfl_up_sync(kAll, upto, by);
      if (lane >= by) upto += lower;
    }
    const Mass total = __shfl_sync(kAll, upto, kMostRanks - 1);
    mine = team.rank == 0;
    if (!total) return -1;
    Mass target = aim(u, total);
    const unsigned here = __ballot_sync(kAll, upto - part < target && target <= upto);
    const int owner = __ffs(here) - 1;
    mine = team.rank == owner;
    if (!mine) return -1;
    target -= __shfl_sync(kAll, upto - part, owner);
#pragma unroll 1
    for (int i = threadIdx.x; i < removed; i += kThreads)
      if (children[i] >= slice.first && children[i] < slice.end)
        atomicAdd(&segments[(children[i] - slice.first) / kSegment], 0 - child_mass[i]);
    __syncthreads();
    constexpr int kEach = kSegments / kThreads;
    const int count = (slice.end - slice.first + kSegment - 1) / kSegment, first = threadIdx.x * kEach;
    Mass sum = 0, all;
#pragma unroll 1
    for (int i = first; i < min(first + kEach, count); ++i) sum += segments[i];
    Mass before = scan_before(sum, team.board, all);
    if (before < target && target <= before + sum) {
      int i = first;
      while (target > before + segments[i]) before += segments[i++];
      team.board->found = i, team.board->rest = target - before;
    }
    __syncthreads();
    target = team.board->rest;
    const int v = slice.first + team.board->found * kSegment + lane * kNeighbours;
    float z[kNeighbours];
    slice.at(v, z);
    Mass w[kNeighbours], own = 0;
#pragma unroll
    for (int j = 0; j < kNeighbours; ++j) {
      const uint32_t key = scale.key(z[j]);
      w[j] = key <= limit && !is_child(v + j, removed) ? weight(v + j, key) : 0;
      own += w[j];
    }
    upto = own;
#pragma unroll
    for (int by = 1; by < 32; by *= 2) {
      const Mass lower = __shfl_up_sync(kAll, upto, by);
      if (lane >= by) upto += lower;
    }
    int token = -1;
    before = upto - own;
#pragma unroll
    for (int j = 0; j < kNeighbours; ++j) {
      if (before < target && target <= before + w[j]) token = v + j;
      before += w[j];
    }
    return __reduce_max_sync(kAll, token);
  }

  // The child of a target_only or chain step that is accepted, or -1: their number, tokens and masses are left for
  // what follows. Warp 0 decides.
  __device__ __forceinline__ int accept(int node, int first_child, Mass total, const float* draft, int& count) {
    count = 0;
#pragma unroll 1
    for (int child = first_child; child >= 0; child = a.mode == Mode::kChain ? -1 : next_sibling[child]) {
      if (threadIdx.x == 0) children[count] = tokens[child];
      ++count;
    }
    __syncthreads();
    if (threadIdx.x < 32) {
      const int lane = threadIdx.x;
      const double u = a.coins ? a.coins[b * a.nodes + node] : coin(noise, kNodeCoin);
      Mass before = 0;
      int accepted = -1;
#pragma unroll 1
      for (int base = 0; base < count && accepted < 0; base += 32) {
        const int i = base + lane, token = i < count ? children[i] : -1;
        bool known = token >= 0;
#pragma unroll 1
        for (int elder = 0; elder < i && known; ++elder) known = children[elder] != token;
        const uint32_t key = known ? scale.key(z_of<kType>(slice.row, slice.allowed, token)) : kLargest + 1;
        const Mass mass = key <= limit ? scale.mass(key) : 0;
        Mass upto = mass;
#pragma unroll
        for (int by = 1; by < 32; by *= 2) {
          const Mass lower = __shfl_up_sync(kAll, upto, by);
          if (lane >= by) upto += lower;
        }
        upto += before;
        bool yes = mass && u * (double)total < (double)upto;
        if (a.mode == Mode::kChain) {
          const float q = known ? __ldg(draft + token) : 0.f;
          yes = q > 0.f && q <= 1.f && u * (double)q * (double)total < (double)mass;
        }
        if (i < count) child_mass[i] = mass;
        const unsigned those = __ballot_sync(kAll, yes);
        if (those) accepted = base + __ffs(those) - 1;
        before = __shfl_sync(kAll, upto, 31);
      }
      if (lane == 0) team.board->found = accepted;
    }
    __syncthreads();
    const int accepted = team.board->found;
    int child = accepted < 0 ? -1 : first_child;
#pragma unroll 1
    for (int i = 0; i < accepted; ++i) child = next_sibling[child];
    return child;
  }

  // The token drawn where no child was accepted.
  __device__ __forceinline__ int rest_token(Mass total, const float* draft, int count, bool& mine) {
    const double u = a.final_coins ? a.final_coins[b] : coin(noise, kFinalCoin);
    const auto whole = [&](int, uint32_t key) { return scale.mass(key); };
    int removed = 0;
    if (a.mode == Mode::kChain && count) {  // p less q
      const auto rest = [&](int v, uint32_t key) -> Mass {
        const float q = __ldg(draft + v), p = __fdiv_rn((float)scale.mass(key), (float)total);
        const float left = ptx::add(p, q >= 0.f && q <= 1.f ? -q : 0.f);
        return left > 0.f ? (Mass)ptx::mul(left, scale.unit) : 0;
      };
      if (listed >= 0) {
        Pair sum{0, 0};
        each_listed(listed,
                    [&](const Entry& entry, uint32_t key) { sum.a += key <= limit ? rest(entry.token, key) : 0; });
        const Mass all = team.fold(sum, Fold::kSum, true).a;
        if (all) return listed_token(aim(u, all), rest);
      } else {
        if (masses(rest)) return row_token(u, 0, mine, rest);
        masses(whole);
      }
    } else if (count) {  // p without the children
      Mass all = 0;
#pragma unroll 1
      for (int i = 0; i < count; ++i) all += child_mass[i];
      if (all < total) removed = count;
    }
    if (listed < 0) return row_token(u, removed, mine, whole);
    if (!total) return -1;
    Mass all = total;
#pragma unroll 1
    for (int i = 0; i < removed; ++i) all -= child_mass[i];
    return listed_token(aim(u, all), [&](int v, uint32_t key) { return is_child(v, removed) ? 0 : scale.mass(key); });
  }

  // log of the mass of all tokens under the logits as given, and their maximum.
  __device__ __forceinline__ double raw_log_mass(float& top) {
    Slice<kType> free = slice;
    if (slice.allowed) {
      free.allowed = nullptr, free.kept = nullptr;
      float best = nothing();
      free.each([&](int, const float (&z)[kNeighbours]) {
#pragma unroll
        for (int j = 0; j < kNeighbours; ++j) best = max(best, z[j]);
      });
      top = unordered((uint32_t)team.fold(Pair{ordered(best), 0}, Fold::kBest).a);
    }
    const Scale plain{top, 1.f, 1.f, scale.unit};
    Pair sum{0, 0};
    free.each([&](int, const float (&z)[kNeighbours]) {
#pragma unroll
      for (int j = 0; j < kNeighbours; ++j) {
        const uint32_t key = plain.key(z[j]);
        if (key <= kLargest) sum.a += plain.mass(key);
      }
    });
    return log((double)team.fold(sum, Fold::kSum).a / (double)scale.unit);
  }

  // -- the walk ------------------------------------------------------------------------------------------------------
  __device__ void run() {
    const float heat = a.temperature[b];
    const bool greedy = a.mode == Mode::kGreedy || heat == 0.f;
    const int64_t out = b * a.width;
    const uint64_t start = a.position ? (uint64_t)a.position[b] : 0;
    noise.seed = a.seed ? (uint64_t)a.seed[b] : 0;
    int node = 0, depth = 0;
    for (;;) {
      constexpr int kBytes = kType == Type::kF32 ? 4 : 2;
      slice.row = (const char*)a.logits.data + (b * a.logits.request_stride + node * a.logits.row_stride) * kBytes;
      slice.allowed =
          a.allowed.data ? a.allowed.data + b * a.allowed.request_stride + node * a.allowed.row_stride : nullptr;
      const float* draft = a.draft.data + b * a.draft.request_stride + node * a.draft.row_stride;
      noise.position = start + (uint64_t)depth;

      float best = nothing();
      int token = INT32_MAX;
      slice.template each<true>([&](int v, const float (&z)[kNeighbours]) {
#pragma unroll
        for (int j = 0; j < kNeighbours; ++j)
          if (z[j] > best) best = z[j], token = v + j;
      });
      uint32_t floor = ordered(best);
      for (int bits = 1; bits < 32 && bits * (kGroups / team.size) < kThreads; bits *= 2)
        floor = max(floor, __shfl_xor_sync(kAll, floor, bits));
      const Pair both = team.fold(Pair{(Mass)ordered(best) << 32 | (uint32_t)~token, floor},
                                  kGroups / team.size < kWarps ? Fold::kMaxMinOfPairs : Fold::kMaxMin);
      float top = unordered((uint32_t)(both.a >> 32));
      token = (int)~(uint32_t)both.a;
      scale.top = top, scale.heat = heat;
      scale.inverse = __fdiv_rn(1.f, heat);

      int accepted = -1;
      int first_child = depth + 1 < a.width ? next_token[node] : -1;
      bool mine = team.rank == 0;
      double logprob = 0;
      if (!(top > nothing())) {
        token = first_child = -1;
      } else {
        double raw = 0;
        if (a.asked == Logprobs::kRaw) raw = raw_log_mass(top);
        if (!greedy) {
          limit = kLargest, listed = -1;
          filter(unordered((uint32_t)both.b));
          Mass total = 0;
          if (a.mode != Mode::kCoupled || a.asked == Logprobs::kSampling)
            total =
                listed >= 0 ? listed_mass(listed, limit) : masses([&](int, uint32_t key) { return scale.mass(key); });
          if (a.mode == Mode::kCoupled) {
            token = race();
          } else {
            int count;
            accepted = accept(node, first_child, total, draft, count);
            token = accepted >= 0 ? tokens[accepted] : rest_token(total, draft, count, mine);
          }
          if (a.asked == Logprobs::kSampling && mine && token >= 0) {
            const double z = z_of<kType>(slice.row, slice.allowed, token);
            logprob = (z - (double)scale.top) / (double)heat - log((double)total / (double)scale.unit);
          }
        }
        if (a.asked == Logprobs::kRaw && mine && token >= 0)
          logprob = (double)z_of<kType>(slice.row, nullptr, token) - (double)top - raw;
      }
      if (greedy || a.mode == Mode::kCoupled)
#pragma unroll 1
        for (int child = first_child; child >= 0 && accepted < 0; child = next_sibling[child])
          if (tokens[child] == token) accepted = child;
      if (mine && threadIdx.x == 0) {
        a.tokens[out + depth] = token;
        a.accept_index[out + depth] = node;
        if (a.logprobs) a.logprobs[out + depth] = (float)logprob;
      }
      if (accepted < 0) break;
      node = accepted, ++depth;
    }
    if (team.rank == 0) {
      if (threadIdx.x == 0) a.accept_length[b] = depth;
      for (int slot = depth + 1 + threadIdx.x; slot < a.width; slot += kThreads) {
        a.tokens[out + slot] = -1, a.accept_index[out + slot] = -1;
        if (a.logprobs) a.logprobs[out + slot] = 0.f;
      }
    }
  }
};

// Grid: (requests * ranks), a cluster a request where there are several ranks. A team walks one tree from its root; at
// each node its blocks read their parts of that node's row once, and no other row. What they then share is a few
// words: the maximum, masses, and after filters the list of tokens near the top, which every rank draws from alone. The
// parts stay in shared memory where they fit, else later passes read them again. All ranks take every decision; the
// rank that knows the token writes the slot. Links that would lead back are taken as ends, tokens outside the
// vocabulary are never accepted: nothing in memory can keep a walk from ending.
template <Type kType>
__global__ void __launch_bounds__(kThreads, 1) verify_kernel(const Verify a, const Cut cut) {
  char* shared = shared_memory();
  const Layout at(a.nodes, cut);
  const Team team{(Board*)shared, (int)(blockIdx.x % cut.ranks), cut.ranks};
  const int64_t b = blockIdx.x / cut.ranks;
  Walk<kType> walk{a, b, team};
  walk.share = cut.tokens;
  walk.slice.vocabulary = a.vocabulary;
  walk.slice.first = min(team.rank * cut.tokens, a.vocabulary);
  walk.slice.end = min(walk.slice.first + cut.tokens, a.vocabulary);
  walk.slice.kept = cut.keep ? (float*)(shared + at.kept) : nullptr;
  walk.slice.plane = cut.tokens / 2;
  walk.tokens = (int*)(shared + at.tokens);
  walk.next_token = (int16_t*)(shared + at.next_token);
  walk.next_sibling = (int16_t*)(shared + at.next_sibling);
  walk.children = (int*)(shared + at.children);
  walk.child_mass = (Mass*)(shared + at.child_mass);
  walk.own_list = (Entry*)(shared + at.own_list);
  walk.list = cut.ranks > 1 ? (Entry*)(shared + at.list) : walk.own_list;
  walk.bins = (Mass*)(shared + at.bins);
  walk.segments = (Mass*)(shared + at.list);
  walk.scale.unit = mass_unit(a.vocabulary);
  for (int i = threadIdx.x; i < a.nodes; i += kThreads) {
    const int64_t token = a.candidates[b * a.nodes + i];
    const int64_t child = a.next_token[b * a.nodes + i], sibling = a.next_sibling[b * a.nodes + i];
    walk.tokens[i] = token >= 0 && token < a.vocabulary ? (int)token : -1;
    walk.next_token[i] = (int16_t)(child > i && child < a.nodes ? child : -1);
    walk.next_sibling[i] = (int16_t)(sibling > i && sibling < a.nodes ? sibling : -1);
  }
  __syncthreads();
  walk.run();
  if (cut.ranks > 1) team.sync();  // no rank leaves while another may read its shared memory
}

// As many ranks as keep every processor busy without a second wave, none with less than a step of the vocabulary.
Cut cut_of(const Verify& a, int ranks, const Device& device) {
  const bool clusters = device.capability >= 90 && device.capability < 120;
  if (!clusters) ranks = 1;
  const int steps = (a.vocabulary + kStep - 1) / kStep;
  if (!ranks)
    for (ranks = 1; 2 * ranks <= std::min(steps, kMostRanks) && 2 * ranks * a.requests <= device.multiprocessors;)
      ranks *= 2;
  Cut cut{ranks, 0, false};
  const int segments = (a.vocabulary + kSegment - 1) / kSegment;
  cut.tokens = (segments + ranks - 1) / ranks * kSegment;
  cut.keep = a.mode != Mode::kGreedy;
  cut.keep = cut.keep && Layout(a.nodes, cut).bytes <= device.shared_bytes;
  return cut;
}

template <Type kType>
void start(const Verify& a, int ranks, void* stream) {
  const Cut cut = cut_of(a, ranks, device());
  const Launch how{.grid = dim3((unsigned)(a.requests * cut.ranks)),
                   .block = dim3(kThreads),
                   .shared_bytes = Layout(a.nodes, cut).bytes,
                   .stream = (cudaStream_t)stream,
                   .cluster = cut.ranks};
  launch("tree_verify", verify_kernel<kType>, how, a, cut);
}

}  // namespace

void tree_verify(const Verify& a, Type type, int ranks, void* stream) {
  switch (type) {
    case Type::kF32:
      return start<Type::kF32>(a, ranks, stream);
    case Type::kBf16:
      return start<Type::kBf16>(a, ranks, stream);
    case Type::kF16:
      return start<Type::kF16>(a, ranks, stream);
  }
}

}  // namespace m3::spec_decode
