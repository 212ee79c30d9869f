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

Projection projection_from(const std::string& kind, Integer seed, Integer offset, Integer nnz, int64_t rows,
                           int64_t dim) {
  Projection result;
  if (kind == "rademacher") {
    result.kind = SketchKind::kRademacher;
  } else if (kind == "gaussian") {
    result.kind = SketchKind::kGaussian;
  } else if (kind == "sjlt") {
    result.kind = SketchKind::kSjlt;
  } else if (kind == "srht") {
    result.kind = SketchKind::kSrht;
  } else if (kind == "gaussian-boxmuller") {
    result.kind = SketchKind::kGaussianBoxMuller;
  } else {
    throw py::value_error("kind: expected rademacher, gaussian, sjlt, srht or gaussian-boxmuller, got " +
                          kind);
  }
  if (dim < 1 || dim > int64_t{1} << 31)
    throw py::value_error("out: expected 1 to 2^31 columns, got " + std::to_string(dim));
  result.seed = seed.seed();
  result.offset = offset.in("offset", 0, INT64_MAX - rows);
  result.nnz = nnz.in("nnz", 1, dim);
  return result;
}

std::function<bool()> signal_poll() {
  return [] {
    py::gil_scoped_acquire gil;
    return PyErr_CheckSignals() != 0;
  };
}

}  // namespace fc
