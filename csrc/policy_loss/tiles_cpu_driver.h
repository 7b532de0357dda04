// What the bindings call: tile kernels over all rows of a tile, on raw pointers that the border has checked.
#pragma once
#include <cstdint>

#include "policy_loss/tiles_cpu.h"

namespace m3::policy_loss {

void statistics(const Statistics& args, int threads);
void gradient(const Gradient& args, int threads);
void divergence(const Divergence& args, int threads);
void divergence_gradient(const Divergence& args, int threads);

}  // namespace m3::policy_loss
