// Facts about the CUDA runtime and devices. A machine without a driver is an answer here, not an error.
#include "common/cuda_info.h"

#include "common/launch.cuh"

namespace m3 {

CudaInfo cuda_info() {
  CudaInfo info;
  cudaRuntimeGetVersion(&info.runtime);
  cudaDriverGetVersion(&info.driver);
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status != cudaSuccess) {
    info.problem = info.driver ? cudaGetErrorString(status) : "no NVIDIA driver";
    cudaGetLastError();  // the error is reported here; it must not surface in a later call
    return info;
  }
  if (count == 0) info.problem = "no CUDA device";
  for (int index = 0; index < count; ++index) {
    cudaDeviceProp properties;
    if (cudaGetDeviceProperties(&properties, index) == cudaSuccess)
      info.devices.push_back({properties.name, properties.major, properties.minor});
  }
  return info;
}

int capability() { return device().capability; }

}  // namespace m3
