// Python border of the policy_loss family's CUDA kernels.
#include "common/border.h"

namespace m3::policy_loss {

void bind_cuda(pybind11::module_&) {}

}  // namespace m3::policy_loss
