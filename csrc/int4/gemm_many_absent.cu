// The products of many rows, where their kernels are not part of the build: they refuse.
#include <stdexcept>

#include "int4/gemm_cuda.h"

namespace m3::int4 {

void gemm_many(const Product&) { throw std::runtime_error("int4_product: many: not built"); }
void gemm_many_sm90(const Product&) { throw std::runtime_error("int4_product: wgmma: not built"); }

}  // namespace m3::int4
