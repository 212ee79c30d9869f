// Python's view of gradient matching and of the directions of zeroth-order gradients.
#include "cpu/matching.h"

#include <string>

#include "bindings/bindings.h"
#include "bindings/boundary.h"
#include "bindings/gradients.h"
#include "cpu/directions.h"

namespace fc {

namespace {

void require_rows(TensorView<const int64_t, 1> rows, int64_t count, const char* name) {
  for (int64_t i = 0; i < rows.shape[0]; ++i) {
    if (rows(i) < 0 || rows(i) >= count)
      throw py::value_error(std::string(name) + ": expected rows in [0, " + std::to_string(count) +
                            "), got " + std::to_string(rows(i)));
  }
}

}  // namespace

void bind_matching(py::module_& m) {
  m.def(
      "directions",
      [](py::object out_array, Integer seed_number, Integer begin_number, Integer first_number,
         Integer threads_number) {
        const ArrayArgument out(out_array, "out");
        const uint64_t seed = seed_number.seed();
        const int threads = threads_number.threads();
        dispatch_floating(out, [&](auto zero) {
          using T = decltype(zero);
          const auto result = out.output<T, 2>();
          if (!result.has_contiguous_rows())
            throw py::value_error("out: expected rows that are contiguous in memory");
          const DirectionsFrom from = directions_from(begin_number, first_number, result);
          without_gil([&] {
            ThreadTeam team(threads, signal_poll());
            directions<T>(seed, from.begin, from.first, result, team);
          });
        });
      },
      py::arg("out"), py::arg("seed"), py::arg("begin"), py::arg("first") = 0, py::arg("threads") = 1,
      "out [q, n] = elements begin to begin + n of the directions first to first + q.");
  m.def(
      "top_updates",
      [](py::object g_array, Integer seed, Integer length, py::object m_array, py::object v_array,
         Real m_scale, Real m_step, Real v_scale, Real v_step, Real eps, py::object member_array,
         py::object offset_array, py::object dims_array, py::object u_array, Integer threads_number) {
        const int threads = threads_number.threads();
        const AdamRule rule = rule_from(m_array, m_scale, m_step, v_scale, v_step, eps);
        const ArrayArgument g(g_array, "g"), member(member_array, "member"), offset(offset_array, "offset"),
            dims(dims_array, "dims"), u(u_array, "u");
        const GroupedRows groups{member.input<int64_t, 1>(), offset.input<int64_t, 1>()};
        const auto found = dims.output<int64_t, 2>();
        const auto rows = u.output<double, 2>();
        const int64_t count = groups.offset.shape[0] - 1;
        if (count < 1 || groups.offset(int64_t{0}) != 0 || groups.offset(count) != groups.member.shape[0])
          throw py::value_error("offset: expected 0, ..., the number of members");
        for (int64_t i = 0; i < count; ++i) {
          if (groups.offset(i) >= groups.offset(i + 1))
            throw py::value_error("offset: expected groups that are not empty");
        }
        dims.require_shape({count, found.cols()});
        u.require_shape({groups.member.shape[0], found.cols()});
        if (!rows.has_contiguous_rows())
          throw py::value_error("u: expected rows that are contiguous in memory");
        dispatch_gradients(g, seed, length, [&](const auto& gradients) {
          using T = HistoryOf<typename std::decay_t<decltype(gradients)>::Element>;
          require_rows(groups.member, row_count(gradients), "member");
          if (found.cols() < 1 || found.cols() > gradients.numel())
            throw py::value_error("dims: expected 1 to " + std::to_string(gradients.numel()) +
                                  " columns, got " + std::to_string(found.cols()));
          const auto run = [&](TensorView<const T, 1> first, TensorView<const T, 1> second) {
            without_gil([&] {
              ThreadTeam team(threads, signal_poll());
              top_updates(gradients, rule, first, second, groups, found, rows, team);
            });
          };
          if (!rule.has_history) return run({}, {});
          const ArrayArgument first(m_array, "m"), second(v_array, "v");
          first.require_shape({gradients.numel()});
          second.require_shape({gradients.numel()});
          run(first.input<T, 1>(), second.input<T, 1>());
        });
      },
      py::arg("g"), py::arg("seed"), py::arg("length"), py::arg("m"), py::arg("v"), py::arg("m_scale"),
      py::arg("m_step"), py::arg("v_scale"), py::arg("v_step"), py::arg("eps"), py::arg("member"),
      py::arg("offset"), py::arg("dims"), py::arg("u"), py::arg("threads") = 1,
      "dims [G, top] = the dimensions of largest |mean update| of each group, u [R, top] = the members' "
      "updates there.");
  m.def(
      "update_history",
      [](py::object g_array, Integer seed, Integer length, Real beta1_number, Real beta2_number,
         py::object m_array, py::object v_array, py::object chosen_array, py::object new_m_array,
         py::object new_v_array, Integer threads_number) {
        const double beta1 = beta1_number.finite("beta1"), beta2 = beta2_number.finite("beta2");
        const int threads = threads_number.threads();
        const ArrayArgument g(g_array, "g"), first(m_array, "m"), second(v_array, "v"),
            chosen(chosen_array, "chosen"), new_first(new_m_array, "new_m"), new_second(new_v_array, "new_v");
        const auto rows = chosen.input<int64_t, 1>();
        if (rows.shape[0] == 0) throw py::value_error("chosen: expected at least 1 row, got 0");
        dispatch_gradients(g, seed, length, [&](const auto& gradients) {
          using T = HistoryOf<typename std::decay_t<decltype(gradients)>::Element>;
          require_rows(rows, row_count(gradients), "chosen");
          const auto old_m = first.input<T, 1>(), old_v = second.input<T, 1>();
          const auto new_m = new_first.output<T, 1>(), new_v = new_second.output<T, 1>();
          for (const ArrayArgument* array : {&first, &second, &new_first, &new_second})
            array->require_shape({gradients.numel()});
          without_gil([&] {
            ThreadTeam team(threads, signal_poll());
            update_history(gradients, beta1, beta2, old_m, old_v, rows, new_m, new_v, team);
          });
        });
      },
      py::arg("g"), py::arg("seed"), py::arg("length"), py::arg("beta1"), py::arg("beta2"), py::arg("m"),
      py::arg("v"), py::arg("chosen"), py::arg("new_m"), py::arg("new_v"), py::arg("threads") = 1,
      "The history after a step whose gradients are the rows `chosen`.");
}

}  // namespace fc
