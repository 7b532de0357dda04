// Python border of the spec_decode family: rows.
#include "common/border_cpu.h"

namespace m3::spec_decode {
void bind_rows(pybind11::module_& module);
}

void m3::spec_decode::bind_rows(pybind11::module_&) {}
