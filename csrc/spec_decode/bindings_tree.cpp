// Python border of the spec_decode family: tree.
#include "common/border_cpu.h"

namespace m3::spec_decode {
void bind_tree(pybind11::module_& module);
}

void m3::spec_decode::bind_tree(pybind11::module_&) {}
