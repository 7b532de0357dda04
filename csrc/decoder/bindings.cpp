// What the decoder family adds to the CPU module: dense products, and passes through layers.
#include "common/border.h"

namespace m3::decoder {
void bind_linear(pybind11::module_& module);
void bind_program(pybind11::module_& module);
}  // namespace m3::decoder

void m3::decoder::bind(pybind11::module_& m) {
  bind_linear(m);
  bind_program(m);
}
