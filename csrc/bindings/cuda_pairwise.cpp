// Pairwise similarities and distances of the module _cuda.
#include <string>

#include "bindings/bindings.h"
#include "bindings/boundary.h"
#include "bindings/cuda_module.h"
#include "cuda/pairwise.h"

namespace fc {
namespace {

void pairwise(py::object x_array, py::object y_array, py::object out_array, const std::string& metric,
              Integer stream_number) {
  const cudaStream_t stream = stream_of(stream_number);
  const Metric kind = metric_from_name(metric);
  const ArrayArgument x(x_array, "x", kDevice), y(y_array, "y", kDevice), out(out_array, "out", kDevice);
  require_device(y, x.device_id());
  require_device(out, x.device_id());
  dispatch_floating(x, [&](auto zero) {
    using T = decltype(zero);
    const auto xs = x.input<T, 2>(), ys = y.input<T, 2>();
    const auto result = out.output<T, 2>();
    if (xs.cols() != ys.cols()) throw py::value_error("y: expected as many columns as x has");
    out.require_shape({xs.rows(), ys.rows()});
    if (!result.has_contiguous_rows()) {
      throw py::value_error("out: expected rows that are contiguous in memory");
    }
    const DeviceGuard guard(x.device_id());
    without_gil([&] { cuda::pairwise<T>(xs, ys, kind, result, stream); });
  });
}

}  // namespace

void bind_cuda_pairwise(py::module_& m) {
  m.def("pairwise", &pairwise, py::arg("x"), py::arg("y"), py::arg("out"), py::arg("metric"),
        py::arg("stream"),
        "out [n, m] = similarities or distances of the rows of x [n, d] and y [m, d], on the device.");
}

}  // namespace fc
