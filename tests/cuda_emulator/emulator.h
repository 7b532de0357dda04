// A CPU as a CUDA device, for tests: every thread of a block is a fiber, and whatever threads do together is a meeting.
//
// Kernels are compiled as C++ with the headers of this folder in place of cuda_runtime.h, common/ptx.cuh and
// common/launch.cuh. Blocks (clusters, where there are any) run one after the other, in an order drawn from the seed;
// so do the threads of a block between two meetings. What is asynchronous on a GPU happens here as early or as late as
// it may, by a coin: the destination of a copy is poisoned until then, an accumulator of wgmma is NaN until the wait.
// Shared memory starts as NaN. A kernel that lacks a barrier, a fence or a wait therefore fails here with some seed.
// What is not modelled: time, the memory order between blocks, and rounding inside one matrix instruction (fp32, by
// column).
#pragma once
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <random>
#include <string>
#include <vector>

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3() = default;
  dim3(unsigned x_, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct uint3 {
  unsigned x, y, z;
};

namespace m3::emulator {

struct Block;
struct Fiber;

// Lanes of a warp that must come together; the last to come computes for all.
struct Meeting {
  const char* what = nullptr;
  uint32_t mask = 0, arrived = 0;
  void* operands[32] = {};
  bool* met[32] = {};  // told when it is over
  std::function<void(void* const* operands)> compute;
};

struct Warp {
  uint32_t live = 0;
  std::vector<Meeting> meetings;
};

struct Barrier {
  int arrived = 0;
  int expected = 0;
  uint64_t generation = 0;
};

struct Copy {
  void* to;
  const void* from;
  int bytes, valid;
  uint64_t* barrier;  // of a bulk copy
};

// A wgmma of one lane that has been issued: d is the caller's accumulator, held here until the wait.
struct Product {
  float* d;
  int columns;
  uint32_t a[4];
  uint64_t b;
  int accumulate;
  bool bf16;
  int group;
};

struct Fiber {
  uint3 thread{}, block_index{};
  Block* block = nullptr;
  Warp* warp = nullptr;
  int lane = 0, linear = 0;
  bool done = false;
  std::function<bool()> ready;  // empty: runnable
  const char* waits_at = "";
  std::vector<std::vector<Copy>> copy_groups{1};
  std::vector<Product> products;
  std::map<float*, std::vector<float>> held;  // accumulators under way
  int product_group = 0;
  uint64_t cluster_generation = 0;  // when it arrived
  void* stack_pointer = nullptr;
  char* stack = nullptr;
};

struct Block {
  uint3 index{};
  char* shared = nullptr;
  int shared_bytes = 0;
  int rank = 0;  // in its cluster
  std::vector<Warp> warps;
  std::vector<Fiber*> fibers;
  Barrier barriers[16];
  std::deque<Copy> bulk;  // under way
  std::vector<Block*>* cluster = nullptr;
  Barrier* cluster_barrier = nullptr;
  int live = 0;
};

struct Settings {
  int capability = 90, multiprocessors = 4, shared_bytes = 227 << 10;
  uint64_t seed = 0;
};
extern Settings settings;
extern Fiber* fiber;  // the one that runs
extern dim3 grid_dim, block_dim;
extern std::mt19937_64 coin;
extern const char* kernel_name;

// The calling fiber sleeps until `ready`; others run.
void wait(const char* what, std::function<bool()> ready);
void yield();
void preempt();
[[noreturn]] void fail(const std::string& why);

// All lanes of `mask` that still run must come; `compute` sees each lane's operand (null for lanes not in mask).
void meet(const char* what, uint32_t mask, void* operand, const std::function<void(void* const*)>& compute);
void barrier(const char* what, Barrier& b, int expected, bool stay);
void block_barrier();
void check_shared(const char* what, const void* pointer, int bytes, int alignment);
uint32_t shared_offset(const void* pointer);
char* shared_at(uint32_t offset, int rank);

void copy_async(void* to, const void* from, int valid, int bytes = 16);
void commit_copies();
void wait_copies(int groups);

void mbarrier_init(uint64_t* barrier, int count);
void mbarrier_arrive(uint64_t* barrier, int bytes);
void mbarrier_wait(uint64_t* barrier, uint32_t parity);
void bulk_copy(void* to, const void* from, int bytes, uint64_t* barrier);

void issue_product(float* d, int columns, const uint32_t* a, uint64_t b, int accumulate, bool bf16);
void commit_products();
void wait_products(int groups);

float half_to_float(uint16_t bits, bool bf16);
uint16_t float_to_half(float value, bool bf16);

// Runs `body` once for each thread of the grid.
void run(const char* op, dim3 grid, dim3 block, int shared_bytes, int cluster, const std::function<void()>& body);

}  // namespace m3::emulator
