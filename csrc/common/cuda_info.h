// Facts about the CUDA runtime and devices, without starting a context. Defined in cuda_info.cu, bound in
// bindings_cuda.cpp.
#pragma once
#include <string>
#include <vector>

namespace m3 {

struct CudaDevice {
  std::string name;
  int major = 0, minor = 0;  // compute capability
};

struct CudaInfo {
  int runtime = 0;      // of the linked cudart: 13000 is 13.0
  int driver = 0;       // newest CUDA that the installed driver serves; 0: no driver
  std::string problem;  // why no device can be used; "" if one can
  std::vector<CudaDevice> devices;
  bool emulated = false;  // the kernels were compiled for the CPU (tests/cuda_emulator)
};

CudaInfo cuda_info();

// Compute capability of the kernels that run on the current device: 90 is 9.0.
int capability();

}  // namespace m3
