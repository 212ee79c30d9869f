// A batch of Sinkhorn problems as Python gives it (python/flashcoreset/sinkhorn/problem.py), for both
// devices: its numbers, and its arrays, kept alive and checked against each other.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "bindings/bindings.h"
#include "bindings/fields.h"
#include "core/sinkhorn_schedule.h"

namespace fc {

struct SinkhornProblem {
  // Numbers come first: see fields.h. If the problem is symmetric, the columns are the rows, and not read.
  const SinkhornSettings settings;
  const int64_t memory_budget;
  Metric metric = Metric::kSqeuclidean;  // of points
  const ArrayArgument x;  // [count, n, d], or the costs, [count, n, m] or [1, n, m] for all problems
  const std::optional<ArrayArgument> y;                     // [count, m, d]
  const ArrayArgument a, b;                                 // [count, n], [count, m]
  const std::optional<ArrayArgument> x_lengths, y_lengths;  // [count]
  const std::optional<ArrayArgument> f, g;                  // [count, n], [count, m], or neither
  const int64_t count, n, m;

  explicit SinkhornProblem(const Fields& fields)
      : settings(settings_of(fields)),
        memory_budget(fields.integer("memory_budget").memory_budget()),
        x(fields.array("x")),
        y(fields.optional_array(settings.symmetric ? "x" : "y")),
        a(fields.array("a")),
        b(fields.array(settings.symmetric ? "a" : "b")),
        x_lengths(fields.optional_array("x_lengths")),
        y_lengths(fields.optional_array(settings.symmetric ? "x_lengths" : "y_lengths")),
        f(fields.optional_array("f")),
        g(fields.optional_array(settings.symmetric ? "f" : "g")),
        count(a.size(0)),
        n(x.size(1)),
        m(y ? y->size(1) : x.size(2)) {
    const std::string name = fields.text("metric");
    if ((name == "precomputed") == y.has_value())
      throw py::value_error("y: expected points, or None for metric precomputed");
    if (y) {
      metric = metric_from_name(name);
      if (metric == Metric::kDot) throw py::value_error("metric: expected a distance or cosine, got 'dot'");
      y->require_shape({count, m, x.size(2)});
    }
    if (count == 0 || n == 0 || m == 0)
      throw py::value_error("x: expected at least one problem, row and column");
    if (settings.symmetric && n != m) throw py::value_error("x: expected the same array whenever it is read");
    if (!is_shared()) x.require_shape({count, n, x.size(2)});
    a.require_shape({count, n});
    b.require_shape({count, m});
    for (const auto* lengths : {&x_lengths, &y_lengths}) {
      if (*lengths) (*lengths)->require_shape({count});
    }
    if (f.has_value() != g.has_value()) throw py::value_error("f, g: expected both, or None for both");
    if (f) f->require_shape({count, n});
    if (g) g->require_shape({count, m});
  }

  bool is_cost() const { return !y.has_value(); }
  // Whether one matrix of costs is that of all problems.
  bool is_shared() const { return is_cost() && x.rank() == 3 && x.size(0) == 1 && count > 1; }

  void require_potentials() const {
    if (!f) throw py::value_error("f, g: expected potentials, got None");
  }

 private:
  static SinkhornSettings settings_of(const Fields& fields) {
    SinkhornSettings settings;
    settings.reg = fields.real("reg").positive("reg");
    settings.rho_a = fields.real("rho_a").positive_or_infinite("rho_a");
    settings.rho_b = fields.real("rho_b").positive_or_infinite("rho_b");
    settings.tol = fields.real("tol").not_negative("tol");
    settings.symmetric = fields.flag("symmetric").on("symmetric");
    settings.l2 = is_l2(fields.text("norm"));
    settings.max_iter = fields.integer("max_iter").in("max_iter", 1, int64_t{1} << 40);
    return settings;
  }

  static bool is_l2(const std::string& norm) {
    if (norm != "l1" && norm != "l2")
      throw py::value_error("norm: expected 'l1' or 'l2', got '" + norm + "'");
    return norm == "l2";
  }
};

// Where a run's results go: f [count, n], g [count, m]; scalars [4, count]: value, transport cost, error and
// the error at which the problem is solved; iterations [count].
struct SinkhornOutput {
  const ArrayArgument f, g, scalars, iterations;

  SinkhornOutput(py::object f_array, py::object g_array, py::object scalars_array,
                 py::object iterations_array, dlpack::DeviceType where, const SinkhornProblem& problem)
      : f(f_array, "f", where),
        g(g_array, "g", where),
        scalars(scalars_array, "scalars", where),
        iterations(iterations_array, "iterations", where) {
    f.require_shape({problem.count, problem.n});
    g.require_shape({problem.count, problem.m});
    scalars.require_shape({4, problem.count});
    iterations.require_shape({problem.count});
  }

  // A result of either device, its members of these names.
  template <class Result>
  void set_numbers(Result& result, const TensorView<double, 2>& numbers,
                   const TensorView<int64_t, 1>& counts) const {
    if (!numbers.is_compact() || !counts.is_compact())
      throw py::value_error("scalars, iterations: expected contiguous arrays");
    const int64_t count = counts.shape[0];
    result.value = numbers.data;
    result.transport_cost = numbers.data + count;
    result.error = numbers.data + 2 * count;
    result.tol = numbers.data + 3 * count;
    result.iterations = counts.data;
  }
};

}  // namespace fc
