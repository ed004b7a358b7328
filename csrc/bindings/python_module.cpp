// pyvit._C: what was built, and what this processor can run. Knows pybind11 and no torch.
#include <pybind11/pybind11.h>

#include <string>

namespace py = pybind11;

namespace {

py::dict cpu_features() {
  py::dict features;
#if defined(__x86_64__)
  __builtin_cpu_init();  // also asks the system whether it saves the wide registers
  features["avx2"] = bool(__builtin_cpu_supports("avx2"));
  features["fma"] = bool(__builtin_cpu_supports("fma"));
  features["f16c"] = bool(__builtin_cpu_supports("f16c"));
  features["avx512f"] = bool(__builtin_cpu_supports("avx512f"));
  features["avx512bw"] = bool(__builtin_cpu_supports("avx512bw"));
  features["avx512dq"] = bool(__builtin_cpu_supports("avx512dq"));
  features["avx512vl"] = bool(__builtin_cpu_supports("avx512vl"));
#endif
  return features;
}

py::dict build_info() {
  py::dict info;
  info["compiler"] = std::string(
#if defined(__clang__)
      "clang "
#else
      "gcc "
#endif
      __VERSION__);
  info["torch"] = PYVIT_TORCH_VERSION;
  info["instruction_sets"] = PYVIT_BUILT_SETS;
  info["sanitized"] = bool(PYVIT_SANITIZED);
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "pyvit's build information and this processor's features";
  m.def("build_info", &build_info, "Compiler, torch and instruction sets of this build, as a dict.");
  m.def("cpu_features", &cpu_features, "Whether this processor has each feature the kernels use.");
}
