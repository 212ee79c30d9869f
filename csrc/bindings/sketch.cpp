// Python's view of random projections.
#include "cpu/sketch.h"

#include <string>

#include "bindings/bindings.h"
#include "bindings/boundary.h"

namespace fc {

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
