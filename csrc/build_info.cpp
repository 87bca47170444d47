// What was built, and what this CPU can run: `segkernels._build_info`. No tensor passes through here.
//
// The build links `segkernels_build` in: the metadata of every library of that build, as JSON after a mark.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <string>
#include <vector>

namespace py = pybind11;

extern "C" const char segkernels_build[];

namespace {

py::object metadata() {
  return py::module_::import("json").attr("loads")(std::strchr(segkernels_build, '{'));
}

// Of the instruction sets that the CPU kernels have code for, those that this processor runs.
std::vector<std::string> instruction_sets() {
  std::vector<std::string> sets;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) sets.push_back("AVX2");
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw")) sets.push_back("AVX-512");
  if (__builtin_cpu_supports("avx512bf16")) sets.push_back("AVX-512 BF16");
#endif
  return sets;
}

}  // namespace

PYBIND11_MODULE(_build_info, m) {
  m.doc() = "What the native libraries were built from and with.";
  m.def("metadata", &metadata, "Metadata of each library, or why it was left out.");
  m.def("instruction_sets", &instruction_sets, "Vector instruction sets of this processor, lowest first.");
}
