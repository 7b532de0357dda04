// Python border of the int4 family's CUDA kernels: gemm.
#include "common/border.h"

namespace m3::int4 {

void bind_gemm_cuda(pybind11::module_&) {}

}  // namespace m3::int4
