// The module: one per instruction set that the kernels are compiled for.
#include <string>

#include "bindings/bindings.h"
#include "bindings/fields.h"
#include "cpu/isa.h"

namespace fc {

namespace {

void define_module(py::module_& m) {
  m.doc() = std::string("flashcoreset's CPU kernels, compiled for ") + kernel_isa() + ".";
  m.attr("ISA") = kernel_isa();
  define_exporter(m);
  bind_pairwise(m);
  bind_partial_gains(m);
  bind_facility_location(m);
  bind_nearest_order(m);
  bind_sinkhorn(m);
  bind_sketch(m);
  bind_scores(m);
  bind_matching(m);
  bind_caratheodory(m);
  bind_pursuit(m);
  bind_transport(m);
}

}  // namespace

}  // namespace fc

// The bindings are compiled once and linked to each build of the kernels, so each module has the entry points
// of all builds; Python calls the one that the module's file is named after.
#define FC_MODULE(name) \
  PYBIND11_MODULE(name, m) { fc::define_module(m); }
#if defined(__x86_64__)
FC_MODULE(_cpu_x86_64_v2)
FC_MODULE(_cpu_x86_64_v3)
FC_MODULE(_cpu_x86_64_v4)
#elif defined(__aarch64__)
FC_MODULE(_cpu_aarch64)
#else
FC_MODULE(_cpu_generic)
#endif
