// The emulated device: fibers, meetings, barriers, asynchronous copies and products. See emulator.h.
#include "emulator.h"

#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <mutex>
#include <numeric>
#include <stdexcept>

#include "common/half.h"

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace m3::emulator {

Settings settings;
Fiber* fiber = nullptr;
dim3 grid_dim, block_dim;
std::mt19937_64 coin;
const char* kernel_name = "";

namespace {

constexpr size_t kStack = 256 << 10;
std::vector<char*> spare_stacks;
const std::function<void()>* body_of_kernel = nullptr;
std::string failure;

#if defined(__x86_64__)
// Saves the callee-saved registers and the stack pointer, and goes on with those saved at `load`.
extern "C" void m3_emulator_switch(void** save, void* load);
asm(R"(
.text
.globl m3_emulator_switch
.hidden m3_emulator_switch
.type m3_emulator_switch, @function
m3_emulator_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
.size m3_emulator_switch, .-m3_emulator_switch
)");
void* scheduler_stack = nullptr;
void to_scheduler() { m3_emulator_switch(&fiber->stack_pointer, scheduler_stack); }
void to_fiber(Fiber* next) {
  fiber = next;
  m3_emulator_switch(&scheduler_stack, next->stack_pointer);
}
#else
ucontext_t scheduler_context;
void to_scheduler() { swapcontext((ucontext_t*)fiber->stack_pointer, &scheduler_context); }
void to_fiber(Fiber* next) {
  fiber = next;
  swapcontext(&scheduler_context, (ucontext_t*)next->stack_pointer);
}
#endif

// A meeting is complete when every lane of its mask that has not returned is there.
void complete_meetings(Warp& warp) {
  for (size_t i = 0; i < warp.meetings.size(); ++i) {
    Meeting& meeting = warp.meetings[i];
    if (!meeting.arrived || meeting.arrived != (meeting.mask & warp.live)) continue;
    meeting.compute(meeting.operands);
    for (bool* met : meeting.met)
      if (met) *met = true;
    warp.meetings.erase(warp.meetings.begin() + (long)i--);
  }
}

void release(Barrier& b) {
  b.arrived = 0;
  ++b.generation;
}

void entry() {
  (*body_of_kernel)();
  Fiber* self = fiber;
  self->done = true;
  self->warp->live &= ~(1u << self->lane);
  Block& block = *self->block;
  if (!--block.live) std::memset(block.shared, 0xFF, (size_t)block.shared_bytes);  // gone, for the cluster too
  complete_meetings(*self->warp);
  Barrier& all = block.barriers[0];
  if (all.arrived && all.arrived >= block.live) release(all);
  to_scheduler();
  std::abort();
}

void prepare(Fiber* f) {
  if (spare_stacks.empty()) {
    void* memory = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::runtime_error("emulator: no memory for a stack");
    mprotect(memory, 4096, PROT_NONE);  // an overflow ends here, not in the neighbour
    spare_stacks.push_back((char*)memory);
  }
  f->stack = spare_stacks.back();
  spare_stacks.pop_back();
#if defined(__x86_64__)
  void** top = (void**)(f->stack + kStack - 64);
  *--top = nullptr;        // the return address of entry, which never returns
  *--top = (void*)&entry;  // ret goes there
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  f->stack_pointer = top;
#else
  auto* context = new ucontext_t;
  getcontext(context);
  context->uc_stack.ss_sp = f->stack, context->uc_stack.ss_size = kStack, context->uc_link = nullptr;
  makecontext(context, entry, 0);
  f->stack_pointer = context;
#endif
}

void finish(Copy& copy) {
  std::memcpy(copy.to, copy.from, (size_t)copy.valid);
  std::memset((char*)copy.to + copy.valid, 0, (size_t)(copy.bytes - copy.valid));
}

struct Mbarrier {
  uint16_t pending, count;
  int32_t word;  // 2 * bytes still to come + phase
};
static_assert(sizeof(Mbarrier) == 8);

void mbarrier_progress(Mbarrier& b) {
  if (b.pending == 0 && (b.word >> 1) == 0) {
    b.pending = b.count;
    b.word = (b.word & 1) ^ 1;
  }
}

bool finish_one_bulk(Block& block) {
  if (block.bulk.empty()) return false;
  const size_t index = coin() % block.bulk.size();
  Copy copy = block.bulk[index];
  block.bulk.erase(block.bulk.begin() + (long)index);
  finish(copy);
  Mbarrier b;
  std::memcpy(&b, copy.barrier, 8);
  b.word -= 2 * copy.bytes;
  mbarrier_progress(b);
  std::memcpy(copy.barrier, &b, 8);
  return true;
}

std::string place(const Fiber& f) {
  return "thread " + std::to_string(f.linear) + " of block (" + std::to_string(f.block_index.x) + "," +
         std::to_string(f.block_index.y) + "," + std::to_string(f.block_index.z) + ")";
}

}  // namespace

void fail(const std::string& why) {
  failure = std::string(kernel_name) + ": emulator: " + (fiber ? place(*fiber) + ": " : "") + why;
  to_scheduler();
  std::abort();
}

void wait(const char* what, std::function<bool()> ready) {
  if (ready()) return;
  fiber->ready = std::move(ready);
  fiber->waits_at = what;
  to_scheduler();
}

// Sometimes others run before this fiber goes on: what it has announced must be true already.
void preempt() {
  if (coin() & 3) return;
  fiber->ready = nullptr;
  fiber->waits_at = "";
  to_scheduler();
}

void yield() {
  fiber->ready = nullptr;
  fiber->waits_at = "a load of another block's memory";
  to_scheduler();
}

void meet(const char* what, uint32_t mask, void* operand, const std::function<void(void* const*)>& compute) {
  Warp& warp = *fiber->warp;
  if (!(mask >> fiber->lane & 1)) fail(std::string(what) + ": the lane is not in its own mask");
  auto found = std::find_if(warp.meetings.begin(), warp.meetings.end(), [&](Meeting& m) { return m.mask & mask; });
  if (found == warp.meetings.end()) {
    Meeting fresh;
    fresh.what = what, fresh.mask = mask, fresh.compute = compute;
    warp.meetings.push_back(std::move(fresh));
    found = warp.meetings.end() - 1;
  }
  if (found->mask != mask || std::strcmp(found->what, what))
    fail(std::string(what) + ": other lanes of the warp are at " + found->what);
  if (found->arrived >> fiber->lane & 1) fail(std::string(what) + ": came twice");
  found->arrived |= 1u << fiber->lane;
  found->operands[fiber->lane] = operand;
  if (found->arrived == (mask & warp.live)) return complete_meetings(warp);
  bool met = false;
  found->met[fiber->lane] = &met;
  wait(what, [flag = &met] { return *flag; });
}

void barrier(const char* what, Barrier& b, int expected, bool stay) {
  if (b.arrived && b.expected != expected)
    fail(std::string(what) + ": " + std::to_string(expected) + " threads expected here, " + std::to_string(b.expected) +
         " elsewhere");
  b.expected = expected;
  const uint64_t generation = b.generation;
  if (++b.arrived >= expected) return release(b);
  if (stay) wait(what, [&b, generation] { return b.generation != generation; });
}

void block_barrier() {
  Barrier& b = fiber->block->barriers[0];
  const uint64_t generation = b.generation;
  if (++b.arrived >= fiber->block->live) return release(b);
  wait("__syncthreads", [&b, generation] { return b.generation != generation; });
}

void check_shared(const char* what, const void* pointer, int bytes, int alignment) {
  const char* p = (const char*)pointer;
  const Block& block = *fiber->block;
  if (p < block.shared || p + bytes > block.shared + block.shared_bytes)
    fail(std::string(what) + ": outside of the block's " + std::to_string(block.shared_bytes) +
         " bytes of shared memory, at " + std::to_string(p - block.shared));
  if ((uintptr_t)p % (uintptr_t)alignment)
    fail(std::string(what) + ": want shared memory aligned to " + std::to_string(alignment) + " bytes; got offset " +
         std::to_string(p - block.shared));
}

uint32_t shared_offset(const void* pointer) { return (uint32_t)((const char*)pointer - fiber->block->shared); }

char* shared_at(uint32_t offset, int rank) { return (*fiber->block->cluster)[(size_t)rank]->shared + offset; }

// -- asynchronous copies
// --------------------------------------------------------------------------------------------------
void copy_async(void* to, const void* from, int valid, int bytes) {
  check_shared("cp.async", to, bytes, bytes);
  if (valid < 0 || valid > bytes)
    fail("cp.async: want no more valid bytes than it copies; got " + std::to_string(valid));
  if (valid && (uintptr_t)from % bytes) fail("cp.async: want a source aligned to what it copies");
  Copy copy{to, from, bytes, valid, nullptr};
  if (coin() & 1) return finish(copy);
  std::memset(to, 0xFF, bytes);
  fiber->copy_groups.back().push_back(copy);
}

void commit_copies() { fiber->copy_groups.emplace_back(); }

void wait_copies(int groups) {  // the last entry is the group that is not yet committed
  auto& all = fiber->copy_groups;
  while ((int)all.size() - 1 > groups) {
    for (Copy& copy : all.front()) finish(copy);
    all.erase(all.begin());
  }
}

void mbarrier_init(uint64_t* barrier, int count) {
  check_shared("mbarrier", barrier, 8, 8);
  const Mbarrier b{(uint16_t)count, (uint16_t)count, 0};
  std::memcpy(barrier, &b, 8);
}

void mbarrier_arrive(uint64_t* barrier, int bytes) {
  check_shared("mbarrier", barrier, 8, 8);
  Mbarrier b;
  std::memcpy(&b, barrier, 8);
  if (!b.pending) fail("mbarrier: more arrivals than its count");
  --b.pending;
  b.word += 2 * bytes;
  mbarrier_progress(b);
  std::memcpy(barrier, &b, 8);
  preempt();
}

void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
  check_shared("mbarrier", barrier, 8, 8);
  wait("mbarrier_wait", [barrier, parity] {
    Mbarrier b;
    std::memcpy(&b, barrier, 8);
    return (uint32_t)(b.word & 1) != parity;
  });
}

void bulk_copy(void* to, const void* from, int bytes, uint64_t* barrier) {
  check_shared("bulk_copy", to, bytes, 16);
  check_shared("bulk_copy", barrier, 8, 8);
  if ((uintptr_t)from % 16 || bytes % 16 || bytes <= 0)
    fail("bulk_copy: want a source aligned to 16 bytes and a positive multiple of 16 bytes; got " +
         std::to_string(bytes));
  std::memset(to, 0xFF, (size_t)bytes);
  fiber->block->bulk.push_back({to, from, bytes, bytes, barrier});
  if (coin() & 1) finish_one_bulk(*fiber->block);
}

// -- products of a warpgroup
// ----------------------------------------------------------------------------------------------
float half_to_float(uint16_t bits, bool bf16) { return bf16 ? bf16_to_float(bits) : f16_to_float(bits); }
uint16_t float_to_half(float value, bool bf16) { return bf16 ? float_to_bf16(value) : float_to_f16(value); }

void issue_product(float* d, int columns, const uint32_t* a, uint64_t b, int accumulate, bool bf16) {
  Fiber& f = *fiber;
  auto [held, fresh] = f.held.try_emplace(d);
  if (fresh) held->second.assign(d, d + columns / 2);
  for (int i = 0; i < columns / 2; ++i) d[i] = std::numeric_limits<float>::quiet_NaN();
  f.products.push_back({d, columns, {a[0], a[1], a[2], a[3]}, b, accumulate, bf16, f.product_group});
}

void commit_products() { ++fiber->product_group; }

void wait_products(int groups) {
  Fiber& f = *fiber;
  const int last = f.product_group - groups;  // groups before this one must be done
  while (!f.products.empty() && f.products.front().group < last) {
    Product product = f.products.front();
    f.products.erase(f.products.begin());
    struct Operand {
      Product* product;
      std::vector<float>* held;
      Block* block;
    } operand{&product, &f.held[product.d], f.block};
    meet("wgmma", ~0u, &operand, [](void* const* operands) {
      const Product& first = *((Operand*)operands[0])->product;
      Block& block = *((Operand*)operands[0])->block;
      const uint32_t start = (uint32_t)(first.b & 0x3FFF) << 4;
      const uint32_t stride = (uint32_t)(first.b >> 32 & 0x3FFF) << 4;
      if (first.b >> 62 != 1) fail("wgmma: only the 128-byte swizzle is emulated");
      float a[16][16];
      for (int lane = 0; lane < 32; ++lane) {
        const Operand& o = *(Operand*)operands[lane];
        if (o.product->b != first.b || o.product->columns != first.columns)
          fail("wgmma: lanes of a warp with different operands");
        for (int r = 0; r < 4; ++r)
          for (int h = 0; h < 2; ++h)
            a[lane / 4 + 8 * (r & 1)][2 * (lane % 4) + h + 8 * (r >> 1)] =
                half_to_float((uint16_t)(o.product->a[r] >> 16 * h), first.bf16);
      }
      for (int n = 0; n < first.columns; ++n) {
        float b[16];
        for (uint32_t k = 0; k < 16; ++k) {
          uint32_t at = start + (uint32_t)(n / 8) * stride + (uint32_t)(n % 8) * 128 + 2 * k;
          at ^= (at >> 7 & 7) << 4;
          if ((int)at + 2 > block.shared_bytes) fail("wgmma: outside of shared memory");
          uint16_t bits;
          std::memcpy(&bits, block.shared + at, 2);
          b[k] = half_to_float(bits, first.bf16);
        }
        for (int m = 0; m < 16; ++m) {
          const int lane = (m % 8) * 4 + n % 8 / 2, index = 4 * (n / 8) + 2 * (m / 8) + n % 2;
          float& d = (*((Operand*)operands[lane])->held)[(size_t)index];
          float sum = first.accumulate ? d : 0.f;
          for (int k = 0; k < 16; ++k) sum += a[m][k] * b[k];
          d = sum;
        }
      }
    });
  }
  for (auto it = f.held.begin(); it != f.held.end();) {
    const bool busy = std::any_of(f.products.begin(), f.products.end(), [&](Product& p) { return p.d == it->first; });
    if (!busy) std::copy(it->second.begin(), it->second.end(), it->first);
    it = busy ? std::next(it) : f.held.erase(it);
  }
}

// -- the scheduler
// ----------------------------------------------------------------------------------------------------------
namespace {

void run_cluster(std::vector<Block*>& blocks, const dim3& block_size) {
  std::vector<std::unique_ptr<Fiber>> fibers;
  const int threads = (int)(block_size.x * block_size.y * block_size.z);
  Barrier cluster_barrier;
  for (Block* block : blocks) {
    block->cluster = &blocks, block->cluster_barrier = &cluster_barrier, block->live = threads;
    block->warps.resize((size_t)(threads + 31) / 32);
    for (int i = 0; i < threads; ++i) {
      auto f = std::make_unique<Fiber>();
      f->linear = i, f->lane = i % 32, f->block = block, f->block_index = block->index;
      f->thread = {(unsigned)i % block_size.x, (unsigned)i / block_size.x % block_size.y,
                   (unsigned)i / (block_size.x * block_size.y)};
      f->warp = &block->warps[(size_t)i / 32];
      f->warp->live |= 1u << f->lane;
      prepare(f.get());
      block->fibers.push_back(f.get());
      fibers.push_back(std::move(f));
    }
  }
  std::vector<Fiber*> order;
  for (auto& f : fibers) order.push_back(f.get());
  std::shuffle(order.begin(), order.end(), coin);
  long idle = 0;
  size_t left = order.size();
  size_t turn = coin() % blocks.size(), stuck = 0;  // a block runs until it must wait for others of its cluster
  failure.clear();
  while (left && failure.empty()) {
    bool moved = false, spun = true;
    for (Fiber* f : order) {
      if (f->block != blocks[turn] || f->done || (f->ready && !f->ready())) continue;
      const bool waited = (bool)f->ready;
      f->ready = nullptr;
      f->waits_at = "";
      to_fiber(f);
      if (!failure.empty()) break;
      moved = true;
      if (f->done) --left;
      if (f->done || f->ready || waited) spun = false;
    }
    if (moved) stuck = 0;
    if (!moved || spun) turn = (turn + 1) % blocks.size();
    if (failure.empty() && left && !moved && ++stuck >= blocks.size()) {
      for (Block* block : blocks) moved |= finish_one_bulk(*block);
      stuck = 0;
      if (!moved) {
        auto first = std::find_if(order.begin(), order.end(), [](Fiber* f) { return !f->done; });
        fiber = nullptr;
        failure = std::string(kernel_name) + ": emulator: deadlock: " + std::to_string(left) + " threads wait, " +
                  place(**first) + " at " + (*first)->waits_at;
        for (Fiber* f : order)
          if (!f->done && std::strcmp(f->waits_at, (*first)->waits_at)) {
            failure += ", " + place(*f) + " at " + f->waits_at;
            break;
          }
      }
    }
    idle = moved && spun ? idle + 1 : 0;
    if (idle > 100000) failure = std::string(kernel_name) + ": emulator: a block waits for one that has not run";
  }
  for (auto& f : fibers) {
    spare_stacks.push_back(f->stack);
#if !defined(__x86_64__)
    delete (ucontext_t*)f->stack_pointer;
#endif
  }
  fiber = nullptr;
  if (!failure.empty()) throw std::runtime_error(failure);
}

}  // namespace

void run(const char* op, dim3 grid, dim3 block, int shared_bytes, int cluster, const std::function<void()>& body) {
  const size_t count = (size_t)grid.x * grid.y * grid.z;
  const int threads = (int)(block.x * block.y * block.z);
  auto refuse = [&](const std::string& why) { throw std::runtime_error(std::string(op) + ": emulator: " + why); };
  if (grid.x > 0x7FFFFFFF || grid.y > 65535 || grid.z > 65535) refuse("the grid is too large");
  if (threads < 1 || threads > 1024) refuse("want 1 to 1024 threads a block; got " + std::to_string(threads));
  if (shared_bytes > settings.shared_bytes) refuse("too much shared memory: " + std::to_string(shared_bytes));
  if (cluster < 1 || cluster > 16 || grid.x % (unsigned)cluster) refuse("the cluster does not divide the grid");
  if (cluster > 1 && settings.capability < 90) refuse("clusters need sm_90");
  kernel_name = op, grid_dim = grid, block_dim = block, body_of_kernel = &body;
  coin.seed(settings.seed);
  std::vector<size_t> order(count / (size_t)cluster);
  std::iota(order.begin(), order.end(), size_t{0});
  if (settings.seed) std::shuffle(order.begin(), order.end(), coin);
  const size_t bytes = ((size_t)shared_bytes + 1023) / 1024 * 1024 + 1024;
  std::vector<std::unique_ptr<char, void (*)(void*)>> shared;
  for (int i = 0; i < cluster; ++i) shared.emplace_back((char*)std::aligned_alloc(1024, bytes), &std::free);
  for (size_t which : order) {
    std::vector<Block> blocks((size_t)cluster);
    std::vector<Block*> pointers;
    for (size_t rank = 0; rank < (size_t)cluster; ++rank) {
      const size_t linear = which * (size_t)cluster + rank;
      Block& b = blocks[rank];
      b.index = {(unsigned)(linear % grid.x), (unsigned)(linear / grid.x % grid.y),
                 (unsigned)(linear / grid.x / grid.y)};
      b.shared = shared[rank].get(), b.shared_bytes = shared_bytes, b.rank = (int)rank;
      std::memset(b.shared, 0xFF, bytes);
      pointers.push_back(&b);
    }
    run_cluster(pointers, block);
  }
}

}  // namespace m3::emulator
