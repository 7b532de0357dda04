// Stands in for csrc/common/launch.cuh: a kernel's blocks run here and now, on the CPU.
#pragma once
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>
#include <tuple>

namespace m3 {

static inline char* shared_memory() { return emulator::fiber->block->shared; }

struct Launch {
  dim3 grid, block;
  int shared_bytes = 0;
  cudaStream_t stream = nullptr;
  int cluster = 1;
  bool dependent = false;
};

inline void check_cuda(const char* op, cudaError_t status) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(op) + ": CUDA: an error");
}

template <class... Parameters, class... Arguments>
void launch(const char* op, void (*kernel)(Parameters...), const Launch& how, Arguments&&... arguments) {
  if (!how.grid.x || !how.grid.y || !how.grid.z) return;
  static_assert((std::is_trivially_copyable_v<std::decay_t<Parameters>> && ...), "parameters are copied as bytes");
  const std::tuple<std::decay_t<Parameters>...> given(std::forward<Arguments>(arguments)...);
  emulator::run(op, how.grid, how.block, how.shared_bytes, how.cluster, [&] { std::apply(kernel, given); });
}

struct Device {
  int multiprocessors, capability, shared_bytes;
};

inline Device device() {
  return {emulator::settings.multiprocessors, emulator::settings.capability, emulator::settings.shared_bytes};
}

}  // namespace m3
