// Python's view of gradient matching and of the directions of zeroth-order gradients.
#include "cpu/matching.h"

#include <string>

#include "bindings/bindings.h"
#include "bindings/boundary.h"
#include "bindings/matching.h"
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

void require_groups(const GroupedRows& groups) {
  const int64_t count = groups.offset.size() - 1;
  if (groups.offset(int64_t{0}) != 0 || groups.offset(count) != groups.member.size())
    throw py::value_error("offset: expected 0, ..., the number of members");
  for (int64_t i = 0; i < count; ++i) {
    if (groups.offset(i) >= groups.offset(i + 1))
      throw py::value_error("offset: expected groups that are not empty");
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
      [](py::object problem, py::object dims_array, py::object u_array, Integer threads_number) {
        const int threads = threads_number.threads();
        const UpdatesArgument updates{Fields(problem)};
        const ArrayArgument dims(dims_array, "dims"), u(u_array, "u");
        const auto found = dims.output<int64_t, 2>();
        const auto rows = u.output<double, 2>();
        if (!rows.has_contiguous_rows())
          throw py::value_error("u: expected rows that are contiguous in memory");
        updates.with(HostArrays{}, dims,
                     [&](const auto& gradients, auto first, auto second, const auto& groups) {
                       u.require_shape({groups.member.shape[0], found.cols()});
                       require_groups(groups);
                       require_rows(groups.member, row_count(gradients), "member");
                       without_gil([&] {
                         ThreadTeam team(threads, signal_poll());
                         top_updates(gradients, updates.rule(), first, second, groups, found, rows, team);
                       });
                     });
      },
      py::arg("problem"), py::arg("dims"), py::arg("u"), py::arg("threads") = 1,
      "dims [G, top] = the dimensions of largest |mean update| of each group, u [R, top] = the members' "
      "updates there; the problem is flashcoreset.matching.problem.Updates.");
  m.def(
      "update_history",
      [](py::object gradients, py::object history, py::object chosen, py::object new_m, py::object new_v,
         Integer threads_number) {
        const int threads = threads_number.threads();
        const StepArgument step(Fields(gradients), Fields(history), chosen, new_m, new_v, dlpack::kCpu);
        step.with(HostArrays{}, [&](const auto& g, double beta1, double beta2, auto old_m, auto old_v,
                                    auto rows, auto to_m, auto to_v) {
          require_rows(rows, row_count(g), "chosen");
          without_gil([&] {
            ThreadTeam team(threads, signal_poll());
            update_history(g, beta1, beta2, old_m, old_v, rows, to_m, to_v, team);
          });
        });
      },
      py::arg("gradients"), py::arg("history"), py::arg("chosen"), py::arg("new_m"), py::arg("new_v"),
      py::arg("threads") = 1, "The history after a step whose gradients are the rows `chosen`.");
}

}  // namespace fc
