// Sums of runs of rows of the module _cuda.
#include <algorithm>
#include <optional>

#include "bindings/bindings.h"
#include "bindings/cuda_module.h"
#include "bindings/fields.h"
#include "cuda/caratheodory.h"

namespace fc {
namespace {

// flashcoreset.caratheodory.problem.Runs: rows of x [n, d], all of them in order or some, with weights or
// without, `size` to a run.
class RunsArgument {
 public:
  explicit RunsArgument(const Fields& runs)
      : size_(runs.integer("size").in("size", 1)),
        x_(runs.array("x")),
        rows_(runs.optional_array("rows")),
        weights_(runs.optional_array("weights")) {
    runs_ = {x_.size(0), size_, nullptr, nullptr};
    if (rows_) {
      const auto view = compact_input<int64_t, 1>(*rows_, device());
      runs_.count = view.size();
      runs_.rows = view.data;
    }
    if (weights_) {
      runs_.weights = compact_input<double, 1>(*weights_, device()).data;
      weights_->require_shape({runs_.count});
    }
    if (runs_.count < 1) throw py::value_error("rows: expected at least 1 row, got 0");
    runs_.size = std::min(runs_.size, runs_.count);
  }

  const ArrayArgument& x() const { return x_; }
  int device() const { return x_.device_id(); }
  const cuda::Runs& view() const { return runs_; }
  int64_t count() const { return ceil_div(runs_.count, runs_.size); }

 private:
  int64_t size_;
  ArrayArgument x_;
  std::optional<ArrayArgument> rows_, weights_;
  cuda::Runs runs_;
};

}  // namespace

void bind_cuda_caratheodory(py::module_& m) {
  m.def(
      "sum_runs",
      [](py::object object, py::object centre_array, Real shrink_number, py::object sums_array,
         Integer stream_number) {
        const double shrink = shrink_number.positive("shrink");
        const cudaStream_t stream = stream_of(stream_number);
        const RunsArgument runs{Fields(object, kDevice)};
        const ArrayArgument centre(centre_array, "centre", kDevice), sums(sums_array, "sums", kDevice);
        const DeviceArrays arrays{runs.device()};
        dispatch_real(runs.x(), [&](auto zero) {
          using X = decltype(zero);
          const auto points = runs.x().input<X, 2>();
          if (points.size() == 0) throw py::value_error("x: expected at least 1 row and 1 column");
          const auto c = arrays.input<double, 1>(centre);
          centre.require_shape({points.cols()});
          const auto out = arrays.output<double, 2>(sums);
          sums.require_shape({runs.count(), 1 + points.cols()});
          const DeviceGuard guard(runs.device());
          without_gil([&] { cuda::sum_runs<X>(points, runs.view(), c.data, shrink, out, stream); });
        });
      },
      py::arg("runs"), py::arg("centre"), py::arg("shrink"), py::arg("sums"), py::arg("stream"),
      "sums [runs, 1 + d] = of w (1, shrink * x - centre) over the rows of each run, on the device.");
  m.def(
      "keep_runs",
      [](py::object object, py::object kept_array, py::object factors_array, py::object new_rows_array,
         py::object new_weights_array, Integer stream_number) {
        const cudaStream_t stream = stream_of(stream_number);
        const RunsArgument runs{Fields(object, kDevice)};
        const ArrayArgument kept(kept_array, "kept", kDevice), factors(factors_array, "factors", kDevice),
            new_rows(new_rows_array, "new_rows", kDevice),
            new_weights(new_weights_array, "new_weights", kDevice);
        const DeviceArrays arrays{runs.device()};
        const auto which = arrays.input<int64_t, 1>(kept);
        const auto times = arrays.input<double, 1>(factors);
        factors.require_shape({which.size()});
        const auto out = arrays.output<int64_t, 1>(new_rows);
        const auto out_weights = arrays.output<double, 1>(new_weights);
        new_weights.require_shape({out.size()});
        if (out.size() < 1 || out.size() > checked_mul(which.size(), runs.view().size))
          throw py::value_error("new_rows: expected as many as the runs kept have, got " +
                                std::to_string(out.size()));
        const DeviceGuard guard(runs.device());
        without_gil([&] {
          cuda::keep_runs(runs.view(), which.data, times.data, out.size(), out.data, out_weights.data,
                          stream);
        });
      },
      py::arg("runs"), py::arg("kept"), py::arg("factors"), py::arg("new_rows"), py::arg("new_weights"),
      py::arg("stream"),
      "The rows of the runs `kept`, ascending, and their weights times their run's factor, on the device.");
}

}  // namespace fc
