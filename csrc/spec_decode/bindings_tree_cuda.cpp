// Python border of the spec_decode family's CUDA kernels: tree.
#include "common/border.h"

namespace m3::spec_decode {

void bind_tree_cuda(pybind11::module_&) {}

}  // namespace m3::spec_decode
