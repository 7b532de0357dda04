// Python module m3kernels._cuda_ext. Loads on a machine without a driver: cudart is linked statically and asked lazily.
#include <pybind11/pybind11.h>

#include "common/cuda_info.h"

namespace py = pybind11;

PYBIND11_MODULE(_cuda_ext, m) {
  m.doc() =
      "CUDA kernels of m3kernels: they take pointers, sizes, strides and a stream; Python validates tensors first.";
  m.def(
      "build_info",
      [] {
        const m3::CudaInfo info = m3::cuda_info();
        py::list devices;
        for (const m3::CudaDevice& device : info.devices) {
          py::dict entry;
          entry["name"] = device.name;
          entry["capability"] = py::make_tuple(device.major, device.minor);
          devices.append(entry);
        }
        py::dict facts;
        facts["archs"] = M3_CUDA_ARCHS;
        facts["compiler"] = __VERSION__;
        facts["runtime"] = info.runtime;
        facts["driver"] = info.driver;
        facts["problem"] = info.problem;
        facts["devices"] = devices;
        return facts;
      },
      "What was built and what the driver offers: archs, compiler, runtime, driver (CUDA versions, 0: no driver), "
      "problem "
      "(\"\" if a device can be used) and devices.");
}
