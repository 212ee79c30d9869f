// Sums of runs of rows of the module _cuda.
#include <algorithm>
#include <optional>

#include "bindings/bindings.h"
#include "bindings/boundary.h"
#include "bindings/cuda_module.h"
#include "cuda/caratheodory.h"

namespace fc {
namespace {

// Rows of x [n, d], None for all in order, and their weights, None for 1; arrays live as long as the object.
class PyRuns {
 public:
  PyRuns(int64_t n, Integer size, py::object rows, py::object weights, int device) {
    runs_ = {n, size.in("size", 1), nullptr, nullptr};
    if (!rows.is_none()) {
      rows_.emplace(rows, "rows", kDevice);
      const auto view = compact_input<int64_t, 1>(*rows_, device);
      runs_.count = view.size();
      runs_.rows = view.data;
    }
    if (!weights.is_none()) {
      weights_.emplace(weights, "weights", kDevice);
      runs_.weights = compact_input<double, 1>(*weights_, device).data;
      weights_->require_shape({runs_.count});
    }
    if (runs_.count < 1) throw py::value_error("rows: expected at least 1 row, got 0");
    runs_.size = std::min(runs_.size, runs_.count);
  }

  const cuda::Runs& view() const { return runs_; }
  int64_t count() const { return ceil_div(runs_.count, runs_.size); }

 private:
  std::optional<ArrayArgument> rows_, weights_;
  cuda::Runs runs_;
};

}  // namespace

void bind_cuda_caratheodory(py::module_& m) {
  m.def(
      "sum_runs",
      [](py::object x_array, py::object rows, py::object weights, py::object centre_array, Real shrink_number,
         Integer size, py::object sums_array, Integer stream_number) {
        const double shrink = shrink_number.positive("shrink");
        const cudaStream_t stream = stream_of(stream_number);
        const ArrayArgument x(x_array, "x", kDevice), centre(centre_array, "centre", kDevice),
            sums(sums_array, "sums", kDevice);
        const int device = x.device_id();
        dispatch_real(x, [&](auto zero) {
          using X = decltype(zero);
          const auto points = x.input<X, 2>();
          if (points.size() == 0) throw py::value_error("x: expected at least 1 row and 1 column");
          const PyRuns runs(points.rows(), size, rows, weights, device);
          const auto c = compact_input<double, 1>(centre, device);
          centre.require_shape({points.cols()});
          const auto out = compact_output<double, 2>(sums, device);
          sums.require_shape({runs.count(), 1 + points.cols()});
          const DeviceGuard guard(device);
          without_gil([&] { cuda::sum_runs<X>(points, runs.view(), c.data, shrink, out, stream); });
        });
      },
      py::arg("x"), py::arg("rows"), py::arg("weights"), py::arg("centre"), py::arg("shrink"),
      py::arg("size"), py::arg("sums"), py::arg("stream"),
      "sums [runs, 1 + d] = of w (1, shrink * x - centre) over `size` of the rows each, on the device.");
  m.def(
      "keep_runs",
      [](Integer n, py::object rows, py::object weights, Integer size, py::object kept_array,
         py::object factors_array, py::object new_rows_array, py::object new_weights_array,
         Integer stream_number) {
        const cudaStream_t stream = stream_of(stream_number);
        const ArrayArgument kept(kept_array, "kept", kDevice), factors(factors_array, "factors", kDevice),
            new_rows(new_rows_array, "new_rows", kDevice),
            new_weights(new_weights_array, "new_weights", kDevice);
        const int device = kept.device_id();
        const PyRuns runs(n.count("n", 1), size, rows, weights, device);
        const auto which = compact_input<int64_t, 1>(kept, device);
        const auto times = compact_input<double, 1>(factors, device);
        factors.require_shape({which.size()});
        const auto out = compact_output<int64_t, 1>(new_rows, device);
        const auto out_weights = compact_output<double, 1>(new_weights, device);
        new_weights.require_shape({out.size()});
        if (out.size() < 1 || out.size() > checked_mul(which.size(), runs.view().size))
          throw py::value_error("new_rows: expected as many as the runs kept have, got " +
                                std::to_string(out.size()));
        const DeviceGuard guard(device);
        without_gil([&] {
          cuda::keep_runs(runs.view(), which.data, times.data, out.size(), out.data, out_weights.data,
                          stream);
        });
      },
      py::arg("n"), py::arg("rows"), py::arg("weights"), py::arg("size"), py::arg("kept"), py::arg("factors"),
      py::arg("new_rows"), py::arg("new_weights"), py::arg("stream"),
      "The rows of the runs `kept`, ascending, and their weights times their run's factor, on the device.");
}

}  // namespace fc
