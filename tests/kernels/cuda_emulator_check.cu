// Small kernels that show what the emulated CUDA device does, and what it catches. Run by test_cuda_emulator.py: the
// name of a kernel and a seed; prints numbers, or the emulator's complaint.
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "common/launch.cuh"
#include "common/ptx.cuh"

using namespace m3;

namespace {

constexpr int kThreads = 128;

__global__ void reverse(const int* in, int* out, bool with_barrier) {
  int* shared = (int*)shared_memory();
  shared[threadIdx.x] = in[blockIdx.x * blockDim.x + threadIdx.x];
  if (with_barrier) __syncthreads();
  out[blockIdx.x * blockDim.x + threadIdx.x] = shared[blockDim.x - 1 - threadIdx.x];
}

__global__ void warp_sum(const int* in, int* out) {
  int value = in[threadIdx.x];
  for (int step = 16; step; step /= 2) value += __shfl_xor_sync(~0u, value, step);
  out[threadIdx.x] = value;
}

__global__ void copy_in(const float* in, float* out, bool with_wait) {
  float* shared = (float*)shared_memory();
  ptx::cp_async_16(shared + 4 * threadIdx.x, in + 4 * threadIdx.x, threadIdx.x % 2 ? 16 : 8);
  ptx::cp_async_commit();
  if (with_wait) ptx::cp_async_wait<0>();
  __syncthreads();
  for (int i = 0; i < 4; ++i) out[4 * threadIdx.x + i] = shared[4 * ((threadIdx.x + 1) % kThreads) + i];
}

__global__ void bulk(const float* in, float* out, bool with_wait) {
  float* shared = (float*)shared_memory();
  uint64_t* barrier = (uint64_t*)(shared + 1024);
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(barrier, 1);
    ptx::mbarrier_fence_init();
  }
  __syncthreads();
  for (uint32_t round = 0; round < 3; ++round) {
    if (threadIdx.x == 0) {
      ptx::mbarrier_arrive_expect(barrier, 4096);
      ptx::bulk_copy(shared, in + 1024 * round, 2048, barrier);
      ptx::bulk_copy(shared + 512, in + 1024 * round + 512, 2048, barrier);
    }
    if (with_wait) ptx::mbarrier_wait(barrier, round % 2);
    for (int i = (int)threadIdx.x; i < 1024; i += kThreads) out[1024 * round + i] = shared[i];
    __syncthreads();
  }
}

__global__ void divergent() {
  if (threadIdx.x % 32 == 0)
    __syncwarp();
  else
    __shfl_sync(~0u, 1, 0);
}

__global__ void half_a_barrier() {
  if (threadIdx.x < 32) ptx::bar_sync(1, kThreads);
}

__global__ void overrun() { ptx::cp_async_16(shared_memory() + 1024, nullptr, 0); }

__global__ void waits_for_the_next(int* flag) {
  if (blockIdx.x + 1 < gridDim.x)
    while (!ptx::load_acquire(flag + blockIdx.x + 1)) {
    }
  ptx::store_release(flag + blockIdx.x, 1);
}

__global__ void cluster_sum(const float* in, float* out) {
  float* shared = (float*)shared_memory();
  shared[threadIdx.x] = in[blockIdx.x * kThreads + threadIdx.x];
  ptx::cluster_arrive();
  ptx::cluster_wait();
  if (threadIdx.x < kThreads / 4) {
    float4 total = make_float4(0, 0, 0, 0);
    for (int rank = 0; rank < 4; ++rank) {
      const float4 v = ptx::load_cluster(shared + 4 * threadIdx.x, rank);
      total.x += v.x, total.y += v.y, total.z += v.z, total.w += v.w;
    }
    *(float4*)(out + blockIdx.x * kThreads + 4 * threadIdx.x) = total;
  }
  ptx::cluster_arrive();
  ptx::cluster_wait();
}

// out (64, 64) = in (64, 16) times in (64, 16)^T, in bf16, once by mma and once by wgmma.
__global__ void products(const uint16_t* in, float* out, bool with_wait) {
  char* shared = shared_memory();
  const int warp = (int)threadIdx.x / 32, lane = (int)threadIdx.x % 32, g = lane / 4, t = lane % 4;
  for (int i = (int)threadIdx.x; i < 64 * 16; i += kThreads) {
    const int n = i / 16, k = i % 16, at = n * 128 + 2 * k;
    *(uint16_t*)(shared + (at ^ ((at >> 7 & 7) << 4))) = in[i];
  }
  uint32_t a[4];
  for (int r = 0; r < 4; ++r) a[r] = *(const uint32_t*)(in + (16 * warp + g + 8 * (r & 1)) * 16 + 2 * t + 8 * (r >> 1));
  ptx::fence_async();
  __syncthreads();
  float d[32];
  ptx::wgmma_fence();
  ptx::wgmma<Half::kBf16, 64>(d, a, ptx::wgmma_descriptor(shared), 0);
  ptx::wgmma_commit();
  if (with_wait) ptx::wgmma_wait<0>();
  for (int j = 0; j < 8; ++j) {
    float e[4] = {0, 0, 0, 0};
    const uint32_t* b = (const uint32_t*)(in + (8 * j + g) * 16);
    ptx::mma_16816<Half::kBf16>(e, a, b[t], b[t + 4]);
    for (int i = 0; i < 4; ++i) {
      const int row = 16 * warp + g + 8 * (i / 2), column = 8 * j + 2 * t + i % 2;
      out[row * 64 + column] = e[i];
      out[4096 + row * 64 + column] = d[4 * j + i];
    }
  }
}

__global__ void transposed(const uint16_t* in, uint32_t* out, bool trans) {
  uint16_t* shared = (uint16_t*)shared_memory();
  for (int i = (int)threadIdx.x; i < 256; i += 32) shared[i] = in[i];
  __syncwarp();
  uint32_t r[4];
  if (trans)
    ptx::ldmatrix_x4_trans(r, shared + 8 * threadIdx.x);
  else
    ptx::ldmatrix_x4(r, shared + 8 * threadIdx.x);
  for (int i = 0; i < 4; ++i) out[4 * threadIdx.x + i] = r[i];
}

template <class T>
void print(const std::vector<T>& values) {
  for (const T& value : values) std::printf("%.9g ", (double)value);
}

void run(const std::string& name, bool right) {
  std::vector<int> ints(512), more(512);
  std::vector<float> floats(8192), out(8192, -1);
  std::vector<uint16_t> halves(1024);
  for (int i = 0; i < 512; ++i) ints[(size_t)i] = i * 7 % 101;
  for (int i = 0; i < 8192; ++i) floats[(size_t)i] = (float)(i % 1013);
  for (int i = 0; i < 1024; ++i) halves[(size_t)i] = emulator::float_to_half((float)(i * 5 % 37 - 18), true);
  Launch how{dim3(1), dim3(kThreads), 8192};
  if (name == "reverse") {
    how.grid = dim3(4);
    launch("reverse", reverse, how, ints.data(), more.data(), right);
    print(more);
  } else if (name == "warp_sum") {
    launch("warp_sum", warp_sum, how, ints.data(), more.data());
    more.resize(kThreads);
    print(more);
  } else if (name == "copy_in") {
    launch("copy_in", copy_in, how, floats.data(), out.data(), right);
    out.resize(512);
    print(out);
  } else if (name == "bulk") {
    launch("bulk", bulk, how, floats.data(), out.data(), right);
    out.resize(3072);
    print(out);
  } else if (name == "divergent") {
    launch("divergent", divergent, how);
  } else if (name == "half_a_barrier") {
    launch("half_a_barrier", half_a_barrier, how);
  } else if (name == "overrun") {
    how.shared_bytes = 1024;
    launch("overrun", overrun, how);
  } else if (name == "waits_for_the_next") {
    how.grid = dim3(2), how.block = dim3(1);
    launch("waits_for_the_next", waits_for_the_next, how, more.data());
  } else if (name == "cluster_sum") {
    how.grid = dim3(8), how.cluster = 4;
    launch("cluster_sum", cluster_sum, how, floats.data(), out.data());
    out.resize(1024);
    print(out);
  } else if (name == "products") {
    launch("products", products, how, halves.data(), out.data(), right);
    print(out);
  } else if (name == "ldmatrix") {
    std::vector<uint32_t> pairs(128);
    how.block = dim3(32);
    for (int i = 0; i < 256; ++i) halves[(size_t)i] = (uint16_t)i;
    launch("ldmatrix", transposed, how, halves.data(), pairs.data(), !right);
    print(pairs);
  } else {
    std::printf("no kernel %s", name.c_str());
  }
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 4) return 2;
  emulator::settings.seed = (uint64_t)std::atoll(arguments[2]);
  try {
    run(arguments[1], std::string(arguments[3]) == "right");
  } catch (const std::exception& error) {
    std::printf("refused: %s", error.what());
  }
  return 0;
}
