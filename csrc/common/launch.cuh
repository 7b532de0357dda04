// Start a kernel: grid, block, dynamic shared memory, cluster, stream; a failure to start is an exception. And what
// host code asks about the device. tests/cuda_emulator has a file of the same name that runs the blocks on a CPU.
#pragma once
#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

namespace m3 {

// The block's dynamic shared memory; the only shared memory a kernel uses.
static __device__ __forceinline__ char* shared_memory() {
  extern __shared__ __align__(1024) char m3_shared_memory[];
  return m3_shared_memory;
}

struct Launch {
  dim3 grid, block;
  int shared_bytes = 0;
  cudaStream_t stream = nullptr;
  int cluster = 1;         // blocks of a cluster along x; more than 1 needs sm_90
  bool dependent = false;  // may start while the launch before it ends (sm_90): the kernel calls ptx::grid_wait
};

inline void check_cuda(const char* op, cudaError_t status) {
  if (status == cudaSuccess) return;
  cudaGetLastError();
  throw std::runtime_error(std::string(op) + ": CUDA: " + cudaGetErrorString(status));
}

// Start `kernel`. A grid without blocks starts nothing. Throws std::runtime_error if CUDA refuses.
template <class... Parameters, class... Arguments>
void launch(const char* op, void (*kernel)(Parameters...), const Launch& how, Arguments&&... arguments) {
  if (!how.grid.x || !how.grid.y || !how.grid.z) return;
  if (how.shared_bytes > 48 << 10)
    check_cuda(op, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, how.shared_bytes));
  if (how.cluster > 8) check_cuda(op, cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config{};
  config.gridDim = how.grid, config.blockDim = how.block, config.dynamicSmemBytes = how.shared_bytes;
  config.stream = how.stream, config.attrs = attributes;
  if (how.cluster > 1) {
    cudaLaunchAttribute& cluster = attributes[config.numAttrs++];
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = how.cluster, cluster.val.clusterDim.y = 1, cluster.val.clusterDim.z = 1;
  }
  if (how.dependent) {
    cudaLaunchAttribute& dependent = attributes[config.numAttrs++];
    dependent.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    dependent.val.programmaticStreamSerializationAllowed = 1;
  }
  check_cuda(op, cudaLaunchKernelEx(&config, kernel, Parameters(std::forward<Arguments>(arguments))...));
  check_cuda(op, cudaPeekAtLastError());
}

// What schedules depend on, of the current device.
struct Device {
  int multiprocessors;
  int capability;    // 90 is 9.0; of a device that no target was built for, that of the PTX it compiles
  int shared_bytes;  // dynamic shared memory that a block may have
};

// The newest target of this build whose kernels a device runs: of its own generation, or else PTX, which is older
// than 90.
inline int built_capability(int capability) {
  constexpr int kBuilt[] = {__CUDA_ARCH_LIST__};
  int newest = 0;
  for (int target : kBuilt) {
    target /= 10;
    if (target <= capability && (target / 10 == capability / 10 || target < 90)) newest = std::max(newest, target);
  }
  return newest;
}

inline const Device& device() {
  static thread_local Device found[64] = {};
  int index = 0;
  check_cuda("cuda", cudaGetDevice(&index));
  if (index >= 64) throw std::runtime_error("cuda: device: want one of the first 64; got " + std::to_string(index));
  Device& d = found[index];
  if (!d.multiprocessors) {
    int major = 0, minor = 0;
    check_cuda("cuda", cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index));
    check_cuda("cuda", cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index));
    check_cuda("cuda", cudaDeviceGetAttribute(&d.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, index));
    d.capability = built_capability(10 * major + minor);
    check_cuda("cuda", cudaDeviceGetAttribute(&d.multiprocessors, cudaDevAttrMultiProcessorCount, index));
  }
  return d;
}

}  // namespace m3
