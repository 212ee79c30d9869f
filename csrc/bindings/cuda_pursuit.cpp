// Matching pursuit of the module _cuda.
#include <string>

#include "bindings/bindings.h"
#include "bindings/cuda_module.h"
#include "bindings/fields.h"
#include "cuda/pursuit.h"

namespace fc {
namespace {

// Long rows: of g, or the vectors that it is multiplied with.
template <class T>
TensorView<const T, 2> long_rows(const ArrayArgument& array, int device) {
  require_device(array, device);
  const auto view = array.input<T, 2>();
  if (!view.has_contiguous_rows() || view.size() == 0) {
    throw py::value_error(std::string(array.name()) +
                          ": expected at least 1 row and 1 column, rows contiguous in memory");
  }
  return view;
}

void products(py::object g_array, py::object rows_array, py::object vectors_array, py::object which_array,
              py::object out_array, py::object places_array, Integer stream_number) {
  const cudaStream_t stream = stream_of(stream_number);
  const ArrayArgument g(g_array, "g", kDevice), vectors(vectors_array, "vectors", kDevice),
      which(which_array, "which", kDevice), out(out_array, "out", kDevice),
      places(places_array, "places", kDevice);
  const int device = g.device_id();
  const auto numbers = compact_input<int64_t, 1>(which, device),
             to = compact_input<int64_t, 1>(places, device);
  places.require_shape({numbers.size()});
  const auto result = compact_output<double, 2>(out, device);
  const auto run = [&](auto of_rows, auto of_vectors) {
    using X = decltype(of_rows);
    using Y = decltype(of_vectors);
    const auto all = long_rows<X>(g, device);
    const auto with = long_rows<Y>(vectors, device);
    vectors.require_shape({with.rows(), all.cols()});
    const auto call = [&](TensorView<const int64_t, 1> rows, int64_t count) {
      out.require_shape({result.rows(), count});
      const DeviceGuard guard(device);
      without_gil([&] { cuda::products<X, Y>(all, rows, with, numbers, to, result, stream); });
    };
    if (rows_array.is_none()) return call({}, all.rows());
    const ArrayArgument listed(rows_array, "rows", kDevice);
    const auto rows = compact_input<int64_t, 1>(listed, device);
    if (rows.size() == 0) throw py::value_error("rows: expected at least 1 row, got 0");
    call(rows, rows.size());
  };
  dispatch_floating(g, [&](auto zero) {
    using X = decltype(zero);
    if (vectors.dtype() == kDTypeOf<X>) {
      run(zero, zero);
    } else {
      run(zero, double{});
    }
  });
}

}  // namespace

void bind_cuda_pursuit(py::module_& module) {
  module.def(
      "products", &products, py::arg("g"), py::arg("rows"), py::arg("vectors"), py::arg("which"),
      py::arg("out"), py::arg("places"), py::arg("stream"),
      "Rows places [m] of out [*, n] = the products of the rows which [m] of `vectors` [*, D] with the rows "
      "[n] of g [B, D], or with all of them, on the device.");
  module.def(
      "squares",
      [](py::object g_array, py::object out_array, Integer stream_number) {
        const cudaStream_t stream = stream_of(stream_number);
        const ArrayArgument g(g_array, "g", kDevice), out(out_array, "out", kDevice);
        const int device = g.device_id();
        const auto result = compact_output<double, 1>(out, device);
        dispatch_floating(g, [&](auto zero) {
          const auto rows = long_rows<decltype(zero)>(g, device);
          out.require_shape({rows.rows()});
          const DeviceGuard guard(device);
          without_gil([&] { cuda::squares(rows, result, stream); });
        });
      },
      py::arg("g"), py::arg("out"), py::arg("stream"),
      "out [B] = the squares of the rows of g, on the device.");
  module.def(
      "best_row",
      [](py::object correlations, py::object scores_array, py::object found_array, Integer stream_number) {
        const cudaStream_t stream = stream_of(stream_number);
        const Fields given(correlations, kDevice);
        const bool magnitude = given.flag("magnitude").on("magnitude");
        const ArrayArgument start = given.array("start"), gram = given.array("gram"),
                            slots = given.array("slots"), numbers = given.array("numbers"),
                            norm = given.array("norm"), scores(scores_array, "scores", kDevice),
                            found(found_array, "found", kDevice);
        const int device = scores.device_id();
        const DeviceArrays arrays{device};
        const auto result = arrays.output<double, 1>(scores), best = arrays.output<double, 1>(found);
        const cuda::Correlations c{arrays.input<double, 1>(start),  arrays.input<double, 2>(gram),
                                   arrays.input<int64_t, 1>(slots), arrays.input<double, 1>(numbers),
                                   arrays.input<double, 1>(norm),   magnitude};
        if (result.size() == 0) throw py::value_error("scores: expected at least 1 row, got 0");
        start.require_shape({result.size()});
        norm.require_shape({result.size()});
        gram.require_shape({c.gram.rows(), result.size()});
        numbers.require_shape({c.slots.size() + 1});
        found.require_shape({2});
        const DeviceGuard guard(device);
        without_gil([&] { cuda::best_row(c, result, best, stream); });
      },
      py::arg("correlations"), py::arg("scores"), py::arg("found"), py::arg("stream"),
      "scores [B] = start - sum_p numbers[p] gram[slots[p]], or its magnitude, or -inf where that is within "
      "the last of `numbers` times `norm`; found [2] = the largest and its row, on the device.");
  module.def(
      "residual",
      [](py::object g_array, py::object target_array, py::object rows_array, py::object weights_array,
         py::object out_array, Integer stream_number) {
        const cudaStream_t stream = stream_of(stream_number);
        const ArrayArgument g(g_array, "g", kDevice), target(target_array, "target", kDevice),
            rows(rows_array, "rows", kDevice), weights(weights_array, "weights", kDevice),
            out(out_array, "out", kDevice);
        const int device = g.device_id();
        const auto of = compact_input<int64_t, 1>(rows, device);
        const auto from = compact_input<double, 1>(target, device),
                   by = compact_input<double, 1>(weights, device);
        const auto result = compact_output<double, 1>(out, device);
        weights.require_shape({of.size()});
        dispatch_floating(g, [&](auto zero) {
          using X = decltype(zero);
          const auto all = long_rows<X>(g, device);
          target.require_shape({all.cols()});
          out.require_shape({all.cols()});
          const DeviceGuard guard(device);
          without_gil([&] { cuda::residual<X>(all, from, of, by, result, stream); });
        });
      },
      py::arg("g"), py::arg("target"), py::arg("rows"), py::arg("weights"), py::arg("out"), py::arg("stream"),
      "out [D] = target - sum_p weights[p] g[rows[p]], on the device.");
}

}  // namespace fc
