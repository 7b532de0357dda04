// Python module m3kernels._cuda_ext. Loads on a machine without a driver: cudart is linked statically and asked lazily.
#include "common/border.h"
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
        facts["emulated"] = info.emulated;
        return facts;
      },
      "What was built and what the driver offers: archs, compiler, runtime, driver (CUDA versions, 0: no driver), "
      "problem "
      "(\"\" if a device can be used), devices, and emulated (kernels built for the CPU, by tests).");
  m.def("capability", &m3::capability, "Compute capability of the kernels that run on the current device; 90 is 9.0.");
  m3::int4::bind_gemm_cuda(m);
  m3::int4::bind_pack_cuda(m);
  m3::policy_loss::bind_cuda(m);
  m3::spec_decode::bind_attention_cuda(m);
  m3::spec_decode::bind_tree_cuda(m);
}
