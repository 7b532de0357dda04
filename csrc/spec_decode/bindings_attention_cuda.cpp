// Python border of the spec_decode family's CUDA kernels: attention.
#include "common/border.h"

namespace m3::spec_decode {

void bind_attention_cuda(pybind11::module_&) {}

}  // namespace m3::spec_decode
