// Gradient matching and the directions of zeroth-order gradients of the module _cuda.
#include <string>

#include "bindings/bindings.h"
#include "bindings/boundary.h"
#include "bindings/cuda_module.h"
#include "bindings/gradients.h"
#include "cuda/matching.h"

namespace fc {
namespace {

// Arguments that top_dimensions() and restrict_updates() share.
struct Problem {
  ArrayArgument g, member, offset;
  py::object m, v;
  Integer seed, length;
  AdamRule rule;

  Problem(py::object g_array, Integer seed, Integer length, py::object m, py::object v, Real m_scale,
          Real m_step, Real v_scale, Real v_step, Real eps, py::object member_array, py::object offset_array)
      : g(g_array, "g", kDevice),
        member(member_array, "member", kDevice),
        offset(offset_array, "offset", kDevice),
        m(m),
        v(v),
        seed(seed),
        length(length),
        rule(rule_from(m, m_scale, m_step, v_scale, v_step, eps)) {}

  int device() const { return g.device_id(); }

  // fn(gradients, m, v, groups).
  template <class Fn>
  void with(const Fn& fn) const {
    const GroupedRows groups{compact_input<int64_t, 1>(member, device()),
                             compact_input<int64_t, 1>(offset, device())};
    if (groups.offset.size() < 2) throw py::value_error("offset: expected at least 2 entries");
    dispatch_gradients(g, seed, length, [&](const auto& gradients) {
      using T = HistoryOf<typename std::decay_t<decltype(gradients)>::Element>;
      const DeviceGuard guard(device());
      if (!rule.has_history) return fn(gradients, TensorView<const T, 1>{}, TensorView<const T, 1>{}, groups);
      const ArrayArgument first(m, "m", kDevice), second(v, "v", kDevice);
      first.require_shape({gradients.numel()});
      second.require_shape({gradients.numel()});
      fn(gradients, compact_input<T, 1>(first, device()), compact_input<T, 1>(second, device()), groups);
    });
  }
};

}  // namespace

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
      [](py::object g, Integer seed, Integer length, py::object m, py::object v, Real m_scale, Real m_step,
         Real v_scale, Real v_step, Real eps, py::object member, py::object offset, py::object dims_array,
         py::object values_array, py::object refused_array, Integer stream_number) {
        const cudaStream_t stream = stream_of(stream_number);
        const Problem problem(g, seed, length, m, v, m_scale, m_step, v_scale, v_step, eps, member, offset);
        const ArrayArgument dims(dims_array, "dims", kDevice), values(values_array, "values", kDevice),
            refused(refused_array, "refused", kDevice);
        const auto found = compact_output<int64_t, 2>(dims, problem.device());
        const auto means = compact_output<double, 2>(values, problem.device());
        const auto first = compact_output<int64_t, 1>(refused, problem.device());
        refused.require_shape({1});
        problem.with([&](const auto& gradients, auto past_m, auto past_v, const GroupedRows& groups) {
          dims.require_shape({groups.offset.size() - 1, found.cols()});
          values.require_shape({groups.offset.size() - 1, found.cols()});
          if (found.cols() < 1 || found.cols() > gradients.numel())
            throw py::value_error("dims: expected 1 to " + std::to_string(gradients.numel()) +
                                  " columns, got " + std::to_string(found.cols()));
          without_gil([&] {
            cuda::top_dimensions(gradients, problem.rule, past_m, past_v, groups, found, means, first.data,
                                 stream, signal_poll());
          });
        });
      },
      py::arg("g"), py::arg("seed"), py::arg("length"), py::arg("m"), py::arg("v"), py::arg("m_scale"),
      py::arg("m_step"), py::arg("v_scale"), py::arg("v_step"), py::arg("eps"), py::arg("member"),
      py::arg("offset"), py::arg("dims"), py::arg("values"), py::arg("refused"), py::arg("stream"),
      "dims and values [G, top] = the dimensions of largest |mean update| of each group and these means, in "
      "no order; refused "
      "[1] = the least of itself and the first dimension with a NaN, an infinity or v < 0.");
  module.def(
      "restrict_updates",
      [](py::object g, Integer seed, Integer length, py::object m, py::object v, Real m_scale, Real m_step,
         Real v_scale, Real v_step, Real eps, py::object member, py::object offset, py::object dims_array,
         py::object u_array, Integer stream_number) {
        const cudaStream_t stream = stream_of(stream_number);
        const Problem problem(g, seed, length, m, v, m_scale, m_step, v_scale, v_step, eps, member, offset);
        const ArrayArgument dims(dims_array, "dims", kDevice), u(u_array, "u", kDevice);
        const auto found = compact_input<int64_t, 2>(dims, problem.device());
        const auto rows = compact_output<double, 2>(u, problem.device());
        problem.with([&](const auto& gradients, auto past_m, auto past_v, const GroupedRows& groups) {
          dims.require_shape({groups.offset.size() - 1, found.cols()});
          u.require_shape({groups.member.size(), found.cols()});
          without_gil([&] {
            cuda::restrict_updates(gradients, problem.rule, past_m, past_v, groups, found, rows, stream);
          });
        });
      },
      py::arg("g"), py::arg("seed"), py::arg("length"), py::arg("m"), py::arg("v"), py::arg("m_scale"),
      py::arg("m_step"), py::arg("v_scale"), py::arg("v_step"), py::arg("eps"), py::arg("member"),
      py::arg("offset"), py::arg("dims"), py::arg("u"), py::arg("stream"),
      "u [R, top] = the members' updates in their group's dimensions, on the device.");
  module.def(
      "update_history",
      [](py::object g_array, Integer seed, Integer length, Real beta1_number, Real beta2_number,
         py::object m_array, py::object v_array, py::object chosen_array, py::object new_m_array,
         py::object new_v_array, py::object overflows_array, Integer stream_number) {
        const double beta1 = beta1_number.finite("beta1"), beta2 = beta2_number.finite("beta2");
        const cudaStream_t stream = stream_of(stream_number);
        const ArrayArgument g(g_array, "g", kDevice), first(m_array, "m", kDevice),
            second(v_array, "v", kDevice), chosen(chosen_array, "chosen", kDevice),
            new_first(new_m_array, "new_m", kDevice), new_second(new_v_array, "new_v", kDevice),
            overflows(overflows_array, "overflows", kDevice);
        const int device = g.device_id();
        const auto rows = compact_input<int64_t, 1>(chosen, device);
        if (rows.size() == 0) throw py::value_error("chosen: expected at least 1 row, got 0");
        const auto flag = compact_output<int64_t, 1>(overflows, device);
        overflows.require_shape({1});
        dispatch_gradients(g, seed, length, [&](const auto& gradients) {
          using T = HistoryOf<typename std::decay_t<decltype(gradients)>::Element>;
          const auto old_m = compact_input<T, 1>(first, device), old_v = compact_input<T, 1>(second, device);
          const auto new_m = compact_output<T, 1>(new_first, device),
                     new_v = compact_output<T, 1>(new_second, device);
          for (const ArrayArgument* array : {&first, &second, &new_first, &new_second})
            array->require_shape({gradients.numel()});
          const DeviceGuard guard(device);
          without_gil([&] {
            cuda::update_history(gradients, beta1, beta2, old_m, old_v, rows, new_m, new_v, flag.data, stream,
                                 signal_poll());
          });
        });
      },
      py::arg("g"), py::arg("seed"), py::arg("length"), py::arg("beta1"), py::arg("beta2"), py::arg("m"),
      py::arg("v"), py::arg("chosen"), py::arg("new_m"), py::arg("new_v"), py::arg("overflows"),
      py::arg("stream"), "The history after a step whose gradients are the rows `chosen`, on the device.");
}

}  // namespace fc
