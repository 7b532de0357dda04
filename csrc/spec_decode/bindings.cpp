// What the spec_decode family adds to the CPU module: trees, attention over them, and the law of their rows.
#include "common/border.h"

namespace m3::spec_decode {
void bind_attention(pybind11::module_& module);
void bind_rows(pybind11::module_& module);
void bind_tree(pybind11::module_& module);
}  // namespace m3::spec_decode

void m3::spec_decode::bind(pybind11::module_& m) {
  bind_attention(m);
  bind_rows(m);
  bind_tree(m);
}
