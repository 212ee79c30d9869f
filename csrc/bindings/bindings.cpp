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

}  // namespace fc
