// Python's view of random projections.
#include "cpu/sketch.h"

#include <algorithm>
#include <string>

#include "bindings/bindings.h"
#include "bindings/fields.h"

namespace fc {

void bind_sketch(py::module_& m) {
  m.def(
      "sketch",
      [](py::object x_array, py::object out_array, const std::string& kind, Integer seed, Integer offset,
         Integer nnz, Integer threads_number) {
        const int threads = threads_number.threads();
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
      "sketch_rows",
      [](py::object indices_array, py::object g_array, py::object out_array, const std::string& kind,
         Integer seed, Integer offset, Integer nnz, Integer threads_number) {
        const int threads = threads_number.threads();
        ArrayArgument indices(indices_array, "indices"), g(g_array, "g"), out(out_array, "out");
        dispatch_floating(g, [&](auto zero) {
          using T = decltype(zero);
          const auto parts = g.input<T, 3>();
          const auto numbers = indices.input<int64_t, 2>();
          const auto result = out.output<T, 2>();
          const int64_t batch = parts.shape[0], count = parts.shape[1], width = parts.shape[2];
          indices.require_shape({batch, count});
          out.require_shape({batch, result.shape[1]});
          if (!result.has_contiguous_rows())
            throw py::value_error("out: expected rows that are contiguous in memory");
          int64_t most = 0;
          for (int64_t b = 0; b < batch; ++b) {
            for (int64_t t = 0; t < count; ++t) {
              if (numbers(b, t) < 0)
                throw py::value_error("indices: expected numbers >= 0, got " + std::to_string(numbers(b, t)));
              most = std::max(most, numbers(b, t));
            }
          }
          int64_t rows = 0;
          if (__builtin_add_overflow(most, int64_t{1}, &rows) || __builtin_mul_overflow(rows, width, &rows))
            throw py::value_error(
                "indices: expected numbers whose product with the width fits in 64 bits, got " +
                std::to_string(most));
          const Projection projection = projection_from(kind, seed, offset, nnz, rows, result.shape[1]);
          without_gil([&] {
            ThreadTeam team(threads, signal_poll());
            sketch_rows<T>(numbers, parts, projection, result, team);
          });
        });
      },
      py::arg("indices"), py::arg("g"), py::arg("out"), py::arg("kind"), py::arg("seed"), py::arg("offset"),
      py::arg("nnz"), py::arg("threads") = 1,
      "out [B, dim] += sketches of rows that are zero but for the parts g [B, T, width] numbered indices [B, "
      "T].");
  m.def(
      "sketch_csr",
      [](py::object csr_object, py::object out_array, const std::string& kind, Integer seed, Integer offset,
         Integer nnz, Integer threads_number) {
        const int threads = threads_number.threads();
        const Fields csr(csr_object);
        const ArrayArgument crow = csr.array("crow"), col = csr.array("col"), values = csr.array("values"),
                            out(out_array, "out");
        dispatch_floating(values, [&](auto zero) {
          using T = decltype(zero);
          const CsrRows<T> x{crow.input<int64_t, 1>(), col.input<int64_t, 1>(), values.input<T, 1>()};
          const auto result = out.output<T, 2>();
          const int64_t count = x.values.size();
          col.require_shape({count});
          crow.require_shape({result.shape[0] + 1});
          if (!result.has_contiguous_rows())
            throw py::value_error("out: expected rows that are contiguous in memory");
          if (x.crow(int64_t{0}) != 0 || x.crow(result.shape[0]) != count)
            throw py::value_error("crow: expected 0, ..., the number of values");
          for (int64_t b = 0; b < result.shape[0]; ++b) {
            if (x.crow(b) > x.crow(b + 1)) throw py::value_error("crow: expected numbers that do not fall");
          }
          int64_t most = -1;
          for (int64_t e = 0; e < count; ++e) {
            if (x.col(e) < 0)
              throw py::value_error("col: expected numbers >= 0, got " + std::to_string(x.col(e)));
            most = std::max(most, x.col(e));
          }
          if (most == INT64_MAX) throw py::value_error("col: expected numbers below 2^63 - 1");
          const Projection projection = projection_from(kind, seed, offset, nnz, most + 1, result.shape[1]);
          without_gil([&] {
            ThreadTeam team(threads, signal_poll());
            sketch_csr<T>(x, projection, result, team);
          });
        });
      },
      py::arg("csr"), py::arg("out"), py::arg("kind"), py::arg("seed"), py::arg("offset"), py::arg("nnz"),
      py::arg("threads") = 1,
      "out [B, dim] = rows in CSR form, with the fields crow, col and values, times a random matrix.");
  m.def(
      "projection_matrix",
      [](py::object out_array, const std::string& kind, Integer seed, Integer offset, Integer nnz,
         Integer threads_number) {
        const int threads = threads_number.threads();
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
