// Python's view of random projections.
#include "cpu/sketch.h"

#include <string>

#include "bindings/bindings.h"
#include "bindings/boundary.h"

namespace fc {
namespace {

Projection projection_from(const std::string& kind, int64_t seed, int64_t offset, int64_t nnz, int64_t rows,
                           int64_t dim) {
  static constexpr const char* kKinds[] = {"rademacher", "gaussian", "sjlt", "srht"};
  Projection result;
  int number = 0;
  while (number < 4 && kind != kKinds[number]) ++number;
  if (number == 4) throw py::value_error("kind: expected rademacher, gaussian, sjlt or srht, got " + kind);
  result.kind = static_cast<SketchKind>(number);
  result.seed = static_cast<uint64_t>(seed);
  result.offset = offset;
  result.nnz = nnz;
  if (dim < 1 || dim > int64_t{1} << 31)
    throw py::value_error("out: expected 1 to 2^31 columns, got " + std::to_string(dim));
  if (offset < 0 || rows > INT64_MAX - offset)
    throw py::value_error("offset: expected a number >= 0 whose sum with the rows fits in 64 bits, got " +
                          std::to_string(offset));
  if (nnz < 1 || nnz > dim)
    throw py::value_error("nnz: expected 1 to " + std::to_string(dim) + ", got " + std::to_string(nnz));
  return result;
}

}  // namespace

void bind_sketch(py::module_& m) {
  m.def(
      "sketch",
      [](py::object x_array, py::object out_array, const std::string& kind, int64_t seed, int64_t offset,
         int64_t nnz, int threads) {
        ArrayArgument x(x_array, "x"), out(out_array, "out");
        dispatch_floating(x, [&](auto zero) {
          using T = decltype(zero);
          const auto rows = x.input<T, 2>();
          const auto result = out.output<T, 2>();
          const Projection projection =
              projection_from(kind, seed, offset, nnz, rows.shape[1], result.shape[1]);
          out.require_shape({rows.shape[0], result.shape[1]});
          if (!result.has_contiguous_rows())
            throw py::value_error("out: expected rows that are contiguous in memory");
          without_gil([&] {
            ThreadTeam team(threads, signal_poll());
            sketch<T>(rows, projection, result, team);
          });
        });
      },
      py::arg("x"), py::arg("out"), py::arg("kind"), py::arg("seed"), py::arg("offset"), py::arg("nnz"),
      py::arg("threads") = 1, "out [B, dim] = x [B, D] times a random matrix [D, dim].");
  m.def(
      "projection_matrix",
      [](py::object out_array, const std::string& kind, int64_t seed, int64_t offset, int64_t nnz,
         int threads) {
        ArrayArgument out(out_array, "out");
        dispatch_floating(out, [&](auto zero) {
          using T = decltype(zero);
          const auto result = out.output<T, 2>();
          const Projection projection =
              projection_from(kind, seed, offset, nnz, result.shape[0], result.shape[1]);
          if (!result.has_contiguous_rows())
            throw py::value_error("out: expected rows that are contiguous in memory");
          without_gil([&] {
            ThreadTeam team(threads, signal_poll());
            projection_matrix<T>(projection, result, team);
          });
        });
      },
      py::arg("out"), py::arg("kind"), py::arg("seed"), py::arg("offset"), py::arg("nnz"),
      py::arg("threads") = 1, "out [D, dim] = a random matrix.");
}

}  // namespace fc
