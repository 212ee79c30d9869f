// What the bindings of greedy runs share on both devices: how a problem enters, and where its results go.
#pragma once

#include <cmath>
#include <limits>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "bindings/bindings.h"
#include "bindings/boundary.h"
#include "bindings/fields.h"
#include "bindings/run.h"
#include "core/greedy.h"

namespace fc {

// A facility_location Problem as Python gives it. The arrays are kept for as long as a run reads them.
struct GreedyProblem {
  std::string metric;
  GreedyOptions options;  // but for its arrays, whose form is the device's
  ArrayArgument x;
  std::optional<ArrayArgument> clients, weights, preselected, costs;

  // `values_name` of `owner` is x, or the values of a sparse x.
  GreedyProblem(const Fields& problem, const Fields& owner, const char* values_name)
      : metric(problem.text("metric")),
        options(numbers_of(problem)),
        x(owner.array(values_name)),
        clients(problem.optional_array("clients")),
        weights(problem.optional_array("weights")),
        preselected(problem.optional_array("preselected")),
        costs(problem.optional_array("costs")) {}

  // Calls points(x, clients or null, metric) or matrix(x), as views of the type that x has.
  template <class Points, class Matrix>
  void read(Points&& points, Matrix&& matrix) {
    dispatch_floating(x, [&](auto zero) {
      using T = decltype(zero);
      const auto view = x.input<T, 2>();
      if (metric == "precomputed") {
        if (clients)
          throw py::value_error(
              "clients: must be None for a precomputed matrix, whose columns are the clients");
        if (!view.has_contiguous_rows())
          throw py::value_error("x: expected rows that are contiguous in memory; pass a contiguous copy");
        require_offset<T>();
        options.self_clients = view.rows() == view.cols();
        return matrix(view);
      }
      const Metric kind = metric_from_name(metric);
      if (is_distance(kind)) require_offset<T>();
      options.self_clients = !clients;
      if (!clients) return points(view, static_cast<const TensorView<const T, 2>*>(nullptr), kind);
      const auto others = clients->input<T, 2>();
      if (others.cols() != view.cols()) {
        throw py::value_error("clients: expected " + std::to_string(view.cols()) + " columns as in x, got " +
                              std::to_string(others.cols()));
      }
      points(view, &others, kind);
    });
  }

 private:
  static GreedyOptions numbers_of(const Fields& problem) {
    GreedyOptions options;
    const Real offset = problem.real("offset");
    options.find_offset = offset.given.is_none();
    if (!options.find_offset) options.offset = offset.finite("offset");
    options.memory_budget = problem.integer("memory_budget").memory_budget();
    const Integer expected_picks = problem.integer("expected_picks");
    if (!expected_picks.given.is_none()) options.expected_picks = expected_picks.in("expected_picks", 0);
    options.poll = signal_poll();
    return options;
  }

  template <class T>
  void require_offset() const {
    if (options.offset >= 0 && options.offset <= static_cast<double>(std::numeric_limits<T>::max())) return;
    throw py::value_error("offset: expected a number >= 0 within the range of the features' type, got " +
                          std::to_string(options.offset));
  }
};

// The array of one entry per client or candidate, if there is one.
template <class T>
std::optional<TensorView<const T, 1>> vector_of(const std::optional<ArrayArgument>& array, int64_t size,
                                                const char* each) {
  if (!array) return std::nullopt;
  const auto view = array->input<T, 1>();
  if (view.size() != size) {
    throw py::value_error(std::string(array->name()) + ": expected " + std::to_string(size) +
                          " entries, one for each " + each + ", got " + std::to_string(view.size()));
  }
  return view;
}

// Where a run's finish() writes.
template <class T>
struct GreedyOutputs {
  TensorView<int64_t, 1> indices;
  TensorView<T, 1> gains, weights;
  TensorView<int64_t, 1> assignment;

  void require_sizes(int64_t picks, int64_t clients) const {
    if (!indices.is_compact() || !gains.is_compact() || !weights.is_compact() || !assignment.is_compact()) {
      throw std::invalid_argument("indices, gains, weights, assignment: expected contiguous arrays");
    }
    if (indices.size() != picks || gains.size() != picks || weights.size() != picks) {
      throw std::invalid_argument("indices, gains, weights: expected " + std::to_string(picks) +
                                  " entries, one for each pick so far");
    }
    if (assignment.size() != clients) {
      throw std::invalid_argument("assignment: expected " + std::to_string(clients) +
                                  " entries, one for each client");
    }
  }
};

// Candidates that close() is given, on the CPU.
inline std::vector<int64_t> candidates_below(py::handle array, int64_t n) {
  const ArrayArgument argument(array, "candidates");
  const auto view = argument.input<int64_t, 1>();
  std::vector<int64_t> list(view.size());
  for (int64_t i = 0; i < view.size(); ++i) {
    list[i] = view(i);
    if (list[i] < 0 || list[i] >= n) {
      throw py::value_error("candidates: expected indices in [0, " + std::to_string(n) + "), got " +
                            std::to_string(list[i]));
    }
  }
  return list;
}

// The methods that Python's classes of both devices have; `Run` is one of them.
template <class Run>
void define_run(py::class_<Run>& run) {
  run.def("pick", &Run::pick, py::arg("naive") = false, py::arg("stop_gain") = py::none(),
          "Makes one pick, if its gain is at least `stop_gain`; returns the candidate, or -1.")
      .def("step_among", &Run::step_among, py::arg("candidates"),
           "Makes one pick among candidates [r] int64 and returns it.")
      .def("close", &Run::close, py::arg("candidates"),
           "Candidates [r] int64, in an array of the CPU, that are not picked from now on.")
      .def("finish", &Run::finish, py::arg("indices"), py::arg("gains"), py::arg("weights"),
           py::arg("assignment"),
           "Writes the picks so far and the assignment into the given arrays; returns the objective.");
}

inline double stop_gain_of(const Real& stop_gain) {
  return stop_gain.given.is_none() ? -HUGE_VAL : stop_gain.finite("stop_gain");
}

}  // namespace fc
