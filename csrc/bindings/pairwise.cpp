// Python's view of the pairwise kernel.
#include "cpu/pairwise.h"

#include "bindings/bindings.h"
#include "bindings/boundary.h"

namespace fc {

void bind_pairwise(py::module_& m) {
  m.def(
      "pairwise",
      [](py::object x_array, py::object y_array, py::object out_array, const std::string& metric_name,
         Integer threads_number, Flag symmetric_flag) {
        const int threads = threads_number.threads();
        const bool symmetric = symmetric_flag.on("symmetric");
        const Metric metric = metric_from_name(metric_name);
        ArrayArgument x(x_array, "x"), y(y_array, "y"), out(out_array, "out");
        dispatch_floating(x, [&](auto zero) {
          using T = decltype(zero);
          const auto xs = x.input<T, 2>(), ys = y.input<T, 2>();
          const auto result = out.output<T, 2>();
          if (xs.shape[1] != ys.shape[1]) {
            throw py::value_error("y: expected " + std::to_string(xs.shape[1]) + " columns as in x, got " +
                                  std::to_string(ys.shape[1]));
          }
          if (symmetric && xs.shape[0] != ys.shape[0]) {
            throw py::value_error("symmetric: y must be x, got " + std::to_string(xs.shape[0]) + " and " +
                                  std::to_string(ys.shape[0]) + " rows");
          }
          out.require_shape({xs.shape[0], ys.shape[0]});
          if (!result.has_contiguous_rows())
            throw py::value_error("out: expected rows that are contiguous in memory");
          without_gil([&] {
            const double pairs = static_cast<double>(xs.shape[0]) * static_cast<double>(ys.shape[0]);
            ThreadTeam team(ThreadTeam::for_work(threads, pairs * static_cast<double>(xs.shape[1])),
                            signal_poll());
            pairwise<T>(xs, ys, metric, symmetric, result, team);
          });
        });
      },
      py::arg("x"), py::arg("y"), py::arg("out"), py::arg("metric"), py::arg("threads") = 1,
      py::arg("symmetric") = false,
      "out [n, m] = similarities (cosine, dot) or distances (euclidean, sqeuclidean, l1) of the rows of x "
      "[n, d] and y [m, d].");
}

}  // namespace fc
