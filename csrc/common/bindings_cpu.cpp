// Python module m3kernels._cpu_ext: the facts of the build, the choice of an instruction set, and what families bind.
#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#if defined(_OPENMP)
#include <omp.h>
#endif

#include "common/border.h"
#include "common/isa.h"

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::dict info;
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#elif defined(__GNUC__)
  info["compiler"] = "gcc " __VERSION__;
#else
  info["compiler"] = "unknown";
#endif
#if defined(_OPENMP)
  info["openmp"] = _OPENMP;
#else
  info["openmp"] = 0;
#endif
  info["isas"] = m3::built_isas();
  return info;
}

// A wish: a kernel that cannot fulfil it goes on with small pages, so the answer is not looked at.
void advise_huge_pages(uintptr_t address, uint64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const auto page = (uintptr_t)sysconf(_SC_PAGESIZE);
  const uintptr_t first = address / page * page + (address % page ? page : 0), last = (address + bytes) / page * page;
  if (first < last) madvise(m3::at<void>(first), last - first, MADV_HUGEPAGE);
#else
  (void)address, (void)bytes;
#endif
}

// OpenMP 5's, which GNU's runtime has since gcc 9, whatever version it names.
void release_threads() {
#if defined(_OPENMP) && (_OPENMP >= 201811 || (defined(__GNUC__) && !defined(__clang__)))
  omp_pause_resource_all(omp_pause_soft);
#endif
}

}  // namespace

PYBIND11_MODULE(_cpu_ext, m) {
  m.doc() = "Native CPU kernels of m3kernels. Arguments are addresses and sizes: call the public functions instead.";
  m3::decoder::bind(m);
  m3::int4::bind(m);
  m3::policy_loss::bind(m);
  m3::spec_decode::bind(m);
  m.def("build_info", &build_info, "What was compiled: compiler, OpenMP version, instruction sets.");
  m.def("isas", &m3::isas, "Instruction sets that this build and this CPU can run, best first.");
  m.def("get_isa", &m3::get_isa, "The instruction set in use: M3_ISA, else the best.");
  m.def("set_isa", &m3::set_isa, "Use another instruction set from now on, in the whole process.");
  m.def("release_threads", &release_threads, "Ends the idle OpenMP threads of the calling thread.");
  m.def("advise_huge_pages", &advise_huge_pages, "Asks Linux for huge pages in the whole pages of (address, bytes).");
}
