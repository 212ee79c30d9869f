// The module: one for each instruction set, compiled from the same sources.
#include <vector>

#include "bindings/bindings.h"

namespace fc {

Metric metric_from_name(const std::string& name) {
  if (name == "cosine") return Metric::kCosine;
  if (name == "dot") return Metric::kDot;
  if (name == "euclidean") return Metric::kEuclidean;
  if (name == "sqeuclidean") return Metric::kSqeuclidean;
  if (name == "l1") return Metric::kL1;
  throw py::value_error("metric: expected cosine, dot, euclidean, sqeuclidean or l1, got '" + name + "'");
}

std::function<bool()> signal_poll() {
  return [] {
    py::gil_scoped_acquire gil;
    return PyErr_CheckSignals() != 0;
  };
}

namespace {

// The names of the builds that this processor can run, best first.
py::list supported_isas() {
  py::list names;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool v2 =
      __builtin_cpu_supports("sse4.2") && __builtin_cpu_supports("popcnt") && __builtin_cpu_supports("ssse3");
  const bool v3 = v2 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                  __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
  const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512vl");
  if (v4) names.append("x86-64-v4");
  if (v3) names.append("x86-64-v3");
  if (v2) names.append("x86-64-v2");
#elif defined(__aarch64__)
  names.append("aarch64");
#else
  names.append("generic");
#endif
  return names;
}

}  // namespace

}  // namespace fc

PYBIND11_MODULE(FC_MODULE_NAME, m) {
  m.doc() = "flashcoreset's CPU kernels, compiled for " FC_ISA_NAME ".";
  m.attr("ISA") = FC_ISA_NAME;
  m.def("supported_isas", &fc::supported_isas, "Builds that this processor can run, best first.");
  fc::bind_pairwise(m);
  fc::bind_facility_location(m);
  fc::bind_nearest_order(m);
}
