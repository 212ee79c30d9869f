// Gradient matching and the directions of zeroth-order gradients of the module _cuda.
#include <string>

#include "bindings/bindings.h"
#include "bindings/boundary.h"
#include "bindings/cuda_module.h"
#include "bindings/matching.h"
#include "cuda/matching.h"

namespace fc {

void bind_cuda_matching(py::module_& module) {
  module.def(
      "directions",
      [](py::object out_array, Integer seed_number, Integer begin_number, Integer first_number,
         Integer stream_number) {
        const ArrayArgument out(out_array, "out", kDevice);
        const uint64_t seed = seed_number.seed();
        const cudaStream_t stream = stream_of(stream_number);
        dispatch_floating(out, [&](auto zero) {
          using T = decltype(zero);
          const auto result = out.output<T, 2>();
          if (!result.has_contiguous_rows())
            throw py::value_error("out: expected rows that are contiguous in memory");
          const DirectionsFrom from = directions_from(begin_number, first_number, result);
          const DeviceGuard guard(out.device_id());
          without_gil([&] { cuda::directions<T>(seed, from.begin, from.first, result, stream); });
        });
      },
      py::arg("out"), py::arg("seed"), py::arg("begin"), py::arg("first"), py::arg("stream"),
      "out [q, n] = elements begin to begin + n of the directions first to first + q, on the device.");
  module.def(
      "top_dimensions",
      [](py::object problem, py::object dims_array, py::object values_array, py::object refused_array,
         Integer stream_number) {
        const cudaStream_t stream = stream_of(stream_number);
        const UpdatesArgument updates{Fields(problem, kDevice)};
        const ArrayArgument dims(dims_array, "dims", kDevice), values(values_array, "values", kDevice),
            refused(refused_array, "refused", kDevice);
        const DeviceArrays arrays{updates.device()};
        const auto found = arrays.output<int64_t, 2>(dims);
        const auto means = arrays.output<double, 2>(values);
        const auto first = arrays.output<int64_t, 1>(refused);
        refused.require_shape({1});
        updates.with(arrays, dims, [&](const auto& g, auto past_m, auto past_v, const auto& groups) {
          values.require_shape({found.rows(), found.cols()});
          const DeviceGuard guard(updates.device());
          without_gil([&] {
            cuda::top_dimensions(g, updates.rule(), past_m, past_v, groups, found, means, first.data, stream,
                                 signal_poll());
          });
        });
      },
      py::arg("problem"), py::arg("dims"), py::arg("values"), py::arg("refused"), py::arg("stream"),
      "dims and values [G, top] = the dimensions of largest |mean update| of each group and these means, in "
      "no order; refused [1] = the least of itself and the first dimension with a NaN, an infinity or v < 0; "
      "the problem is flashcoreset.matching.problem.Updates.");
  module.def(
      "restrict_updates",
      [](py::object problem, py::object dims_array, py::object u_array, Integer stream_number) {
        const cudaStream_t stream = stream_of(stream_number);
        const UpdatesArgument updates{Fields(problem, kDevice)};
        const ArrayArgument dims(dims_array, "dims", kDevice), u(u_array, "u", kDevice);
        const DeviceArrays arrays{updates.device()};
        const auto found = arrays.input<int64_t, 2>(dims);
        const auto rows = arrays.output<double, 2>(u);
        updates.with(arrays, dims, [&](const auto& g, auto past_m, auto past_v, const auto& groups) {
          u.require_shape({groups.member.size(), found.cols()});
          const DeviceGuard guard(updates.device());
          without_gil([&] {
            cuda::restrict_updates(g, updates.rule(), past_m, past_v, groups, found, rows, stream);
          });
        });
      },
      py::arg("problem"), py::arg("dims"), py::arg("u"), py::arg("stream"),
      "u [R, top] = the members' updates in their group's dimensions, on the device.");
  module.def(
      "update_history",
      [](py::object gradients, py::object history, py::object chosen, py::object new_m, py::object new_v,
         py::object overflows_array, Integer stream_number) {
        const cudaStream_t stream = stream_of(stream_number);
        const StepArgument step(Fields(gradients, kDevice), Fields(history, kDevice), chosen, new_m, new_v,
                                kDevice);
        const ArrayArgument overflows(overflows_array, "overflows", kDevice);
        const DeviceArrays arrays{step.device()};
        const auto flag = arrays.output<int64_t, 1>(overflows);
        overflows.require_shape({1});
        step.with(arrays, [&](const auto& g, double beta1, double beta2, auto old_m, auto old_v, auto rows,
                              auto to_m, auto to_v) {
          const DeviceGuard guard(step.device());
          without_gil([&] {
            cuda::update_history(g, beta1, beta2, old_m, old_v, rows, to_m, to_v, flag.data, stream,
                                 signal_poll());
          });
        });
      },
      py::arg("gradients"), py::arg("history"), py::arg("chosen"), py::arg("new_m"), py::arg("new_v"),
      py::arg("overflows"), py::arg("stream"),
      "The history after a step whose gradients are the rows `chosen`, on the device.");
}

}  // namespace fc
