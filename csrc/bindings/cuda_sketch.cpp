// Random projections of the module _cuda.
#include <string>

#include "bindings/bindings.h"
#include "bindings/boundary.h"
#include "bindings/cuda_module.h"
#include "cuda/sketch.h"

namespace fc {

void bind_cuda_sketch(py::module_& m) {
  m.def(
      "sketch",
      [](py::object x_array, py::object out_array, const std::string& kind, Integer seed, Integer offset,
         Integer nnz, Integer stream_number) {
        const cudaStream_t stream = stream_of(stream_number);
        const ArrayArgument x(x_array, "x", kDevice), out(out_array, "out", kDevice);
        require_device(out, x.device_id());
        dispatch_floating(x, [&](auto zero) {
          using T = decltype(zero);
          const auto rows = x.input<T, 2>();
          const auto result = out.output<T, 2>();
          const Projection projection = projection_from(kind, seed, offset, nnz, rows.cols(), result.cols());
          out.require_shape({rows.rows(), result.cols()});
          if (!result.has_contiguous_rows())
            throw py::value_error("out: expected rows that are contiguous in memory");
          const DeviceGuard guard(x.device_id());
          without_gil([&] { cuda::sketch<T>(rows, projection, result, stream, signal_poll()); });
        });
      },
      py::arg("x"), py::arg("out"), py::arg("kind"), py::arg("seed"), py::arg("offset"), py::arg("nnz"),
      py::arg("stream"), "out [B, dim] = x [B, D] times a random matrix [D, dim], on the device.");
  m.def(
      "projection_matrix",
      [](py::object out_array, const std::string& kind, Integer seed, Integer offset, Integer nnz,
         Integer stream_number) {
        const cudaStream_t stream = stream_of(stream_number);
        const ArrayArgument out(out_array, "out", kDevice);
        dispatch_floating(out, [&](auto zero) {
          using T = decltype(zero);
          const auto result = out.output<T, 2>();
          const Projection projection =
              projection_from(kind, seed, offset, nnz, result.rows(), result.cols());
          if (!result.has_contiguous_rows())
            throw py::value_error("out: expected rows that are contiguous in memory");
          const DeviceGuard guard(out.device_id());
          without_gil([&] { cuda::projection_matrix<T>(projection, result, stream); });
        });
      },
      py::arg("out"), py::arg("kind"), py::arg("seed"), py::arg("offset"), py::arg("nnz"), py::arg("stream"),
      "out [D, dim] = a random matrix, on the device.");
}

}  // namespace fc
