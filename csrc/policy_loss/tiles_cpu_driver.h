// What the bindings call: tile kernels over all rows of a tile, on raw pointers that the border has checked.
#pragma once
#include <cstdint>

#include "policy_loss/tiles_cpu.h"

namespace m3::policy_loss {

// `rows` is R; of the gradients, n.
void statistics(const Statistics& args, int64_t rows, int threads);
void gradient(const Gradient& args, int64_t rows, int threads);
void divergence(const Divergence& args, int64_t rows, int threads);
void divergence_gradient(const Divergence& args, int64_t rows, int threads);

}  // namespace m3::policy_loss
