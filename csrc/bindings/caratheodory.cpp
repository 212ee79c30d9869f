// Python's view of the Caratheodory reduction.
#include "cpu/caratheodory.h"

#include <algorithm>
#include <limits>

#include "bindings/bindings.h"
#include "bindings/boundary.h"

namespace fc {

void bind_caratheodory(py::module_& m) {
  m.def(
      "caratheodory",
      [](py::object x_array, py::object weights_array, int64_t max_size, py::object indices_array,
         py::object new_weights_array, int threads) {
        const ArrayArgument x(x_array, "x"), indices(indices_array, "indices"),
            new_weights(new_weights_array, "new_weights");
        const auto out = indices.output<int64_t, 1>();
        const auto out_weights = new_weights.output<double, 1>();
        int64_t count = 0;
        dispatch_real(x, [&](auto zero) {
          using X = decltype(zero);
          const auto points = x.input<X, 2>();
          const int64_t n = points.shape[0], d = points.shape[1];
          if (n == 0 || d == 0) throw py::value_error("x: expected at least 1 row and 1 column");
          if (max_size < 0) throw py::value_error("max_size: expected at least 0");
          indices.require_shape({std::min(n, std::max(d + 1, max_size))});
          new_weights.require_shape({out.shape[0]});
          TensorView<const double, 1> weights{};
          bool any = true;
          if (!weights_array.is_none()) {
            const ArrayArgument given(weights_array, "weights");
            weights = given.input<double, 1>();
            given.require_shape({n});
            any = false;
            for (int64_t i = 0; i < n; ++i) {
              if (!(weights(i) >= 0 && weights(i) < std::numeric_limits<double>::infinity())) {
                throw py::value_error("weights: expected finite numbers >= 0");
              }
              any = any || weights(i) > 0;
            }
          }
          if (!any) throw py::value_error("weights: expected one that is > 0");
          const WeightedRows found = without_gil([&] {
            ThreadTeam team(threads, signal_poll());
            return caratheodory<X>(points, weights.data ? &weights : nullptr, max_size, team);
          });
          count = static_cast<int64_t>(found.rows.size());
          for (int64_t i = 0; i < count; ++i) {
            out(i) = found.rows[i];
            out_weights(i) = found.weights[i];
          }
        });
        return count;
      },
      py::arg("x"), py::arg("weights").none(true), py::arg("max_size"), py::arg("indices"),
      py::arg("new_weights"), py::arg("threads") = 1,
      "Writes at most rank + 1 rows of x [n, d] with the weighted mean and total weight of all into indices "
      "and "
      "new_weights [min(n, max(d + 1, max_size))] and returns their number; with max_size > 0 it stops as "
      "soon as "
      "at most that many are left.");
}

}  // namespace fc
