// Python's view of the greedy facility location run.
#include "cpu/facility_location.h"

#include <cmath>
#include <limits>
#include <memory>
#include <utility>
#include <vector>

#include "bindings/bindings.h"
#include "bindings/boundary.h"
#include "bindings/run.h"

namespace fc {
namespace {

template <class T>
void require_offset(double offset) {
  if (offset >= 0 && offset <= static_cast<double>(std::numeric_limits<T>::max())) return;
  throw py::value_error("offset: expected a number >= 0 within the range of the features' type, got " +
                        std::to_string(offset));
}

// The run and the arrays that it reads.
class PyFacilityLocation {
 public:
  PyFacilityLocation(py::object x_array, py::object clients_array, const std::string& metric,
                     py::object weights, py::object preselected, Real offset_number, Integer memory_budget,
                     Integer threads_number, Integer expected_picks) {
    const double offset = offset_number.finite("offset");
    const int threads = threads_number.threads();
    ArrayArgument& x = keep(x_array, "x");
    GreedyOptions options;
    options.offset = offset;
    options.expected_picks = expected_picks.in("expected_picks", 0);
    options.memory_budget = memory_budget.memory_budget();
    options.threads = threads;
    dispatch_floating(x, [&](auto zero) {
      using T = decltype(zero);
      const auto view = x.input<T, 2>();
      if (metric == "precomputed") {
        if (!clients_array.is_none())
          throw py::value_error(
              "clients: must be None for a precomputed matrix, whose columns are the clients");
        if (!view.has_contiguous_rows())
          throw py::value_error("x: expected rows that are contiguous in memory; pass a contiguous copy");
        require_offset<T>(offset);
        options.self_clients = view.shape[0] == view.shape[1];
        read_options(view.shape[0], view.shape[1], weights, preselected, options);
        run_ = facility_location_matrix<T>(view, std::move(options));
        return;
      }
      const Metric kind = metric_from_name(metric);
      if (is_distance(kind)) require_offset<T>(offset);
      const auto use_threads_for = [&](int64_t m) {
        const double pairs = static_cast<double>(view.shape[0]) * static_cast<double>(m);
        options.threads = ThreadTeam::for_work(threads, pairs * static_cast<double>(view.shape[1]));
      };
      if (clients_array.is_none()) {
        use_threads_for(view.shape[0]);
        options.self_clients = true;
        read_options(view.shape[0], view.shape[0], weights, preselected, options);
        run_ = facility_location_points<T>(view, nullptr, kind, std::move(options));
      } else {
        const auto clients = keep(clients_array, "clients").input<T, 2>();
        if (clients.shape[1] != view.shape[1]) {
          throw py::value_error("clients: expected " + std::to_string(view.shape[1]) +
                                " columns as in x, got " + std::to_string(clients.shape[1]));
        }
        use_threads_for(clients.shape[0]);
        read_options(view.shape[0], clients.shape[0], weights, preselected, options);
        run_ = facility_location_points<T>(view, &clients, kind, std::move(options));
      }
    });
  }

  // Sparse rows: indptr [n + 1] and indices int64, values float.
  PyFacilityLocation(py::object indptr_array, py::object indices_array, py::object values_array,
                     Integer m_number, py::object weights, py::object preselected, Flag self_clients,
                     Integer memory_budget, Integer threads) {
    const int64_t m = m_number.count("m");
    ArrayArgument& values = keep(values_array, "values");
    const auto indptr = keep(indptr_array, "indptr").input<int64_t, 1>();
    const auto indices = keep(indices_array, "indices").input<int64_t, 1>();
    const int64_t n = indptr.shape[0] - 1;
    if (n < 0) throw py::value_error("indptr: expected at least one entry");
    if (!indptr.has_contiguous_rows() || !indices.has_contiguous_rows())
      throw py::value_error("indptr, indices: expected contiguous arrays");
    if (indices.shape[0] != values.size(0))
      throw py::value_error("indices: expected as many entries as values");
    if (indptr(n) != indices.shape[0])
      throw py::value_error("indptr: expected its last entry to be the number of stored values");
    GreedyOptions options;
    options.self_clients = self_clients.on("self_clients");
    if (options.self_clients && n != m) throw py::value_error("self_clients: expected a square matrix");
    options.memory_budget = memory_budget.memory_budget();
    options.threads = threads.threads();
    read_options(n, m, weights, preselected, options);
    dispatch_floating(values, [&](auto zero) {
      using T = decltype(zero);
      const auto view = values.input<T, 1>();
      if (!view.has_contiguous_rows()) throw py::value_error("values: expected a contiguous array");
      run_ = facility_location_sparse<T>(SparseRows<T>{n, m, indptr.data, indices.data, view.data},
                                         std::move(options));
    });
  }

  int64_t step(Integer count_number, Flag naive_flag) {
    const int64_t count = count_number.in("count", 0);
    const bool naive = naive_flag.on("naive");
    return one_call_([&] { return run_->step(count, naive); });
  }

  int64_t step_among(py::object candidates_array) {
    const ArrayArgument argument(candidates_array, "candidates");
    const auto candidates = argument.input<int64_t, 1>();
    std::vector<int64_t> list;
    for (int64_t i = 0; i < candidates.shape[0]; ++i) list.push_back(candidates(i));
    if (list.empty()) throw py::value_error("candidates: expected at least one");
    return one_call_([&] {
      for (const int64_t j : list) {
        if (j < 0 || j >= run_->candidates() || !run_->is_open(j)) {
          throw std::invalid_argument("candidates: expected indices in [0, " +
                                      std::to_string(run_->candidates()) + ") that are not chosen yet, got " +
                                      std::to_string(j));
        }
      }
      return run_->step_among(list.data(), static_cast<int64_t>(list.size()));
    });
  }

  double finish(py::object indices_array, py::object gains_array, py::object weights_array,
                py::object assignment_array) {
    const ArrayArgument indices(indices_array, "indices"), gains(gains_array, "gains"),
        weights(weights_array, "weights"), assignment(assignment_array, "assignment");
    const auto i = indices.output<int64_t, 1>();
    const auto a = assignment.output<int64_t, 1>();
    return dispatch_floating(gains, [&](auto zero) {
      using T = decltype(zero);
      const auto g = gains.output<T, 1>(), w = weights.output<T, 1>();
      if (!i.is_compact() || !g.is_compact() || !w.is_compact() || !a.is_compact()) {
        throw py::value_error("indices, gains, weights, assignment: expected contiguous arrays");
      }
      return one_call_([&] {
        const int64_t k = run_->picks();
        if (i.shape[0] != k || g.shape[0] != k || w.shape[0] != k) {
          throw std::invalid_argument("indices, gains, weights: expected " + std::to_string(k) +
                                      " entries, one for each pick so far");
        }
        if (a.shape[0] != run_->clients()) {
          throw std::invalid_argument("assignment: expected " + std::to_string(run_->clients()) +
                                      " entries, one for each client");
        }
        std::vector<double> gain(k), weight(k);
        const double objective = run_->finish(i.data, gain.data(), weight.data(), a.data);
        for (int64_t p = 0; p < k; ++p) {
          g.data[p] = static_cast<T>(gain[p]);
          w.data[p] = static_cast<T>(weight[p]);
        }
        return objective;
      });
    });
  }

  py::dict stats() {
    const GreedyStats s = one_call_([&] { return run_->stats(); });
    py::dict result;
    result["evaluations"] = s.evaluations;
    result["pairs"] = s.pairs;
    result["matrix_reads"] = s.matrix_reads;
    result["list_reads"] = s.list_reads;
    result["sweeps"] = s.sweeps;
    result["foreseen"] = s.foreseen;
    return result;
  }

 private:
  ArrayArgument& keep(py::handle array, const char* name) {
    arrays_.push_back(std::make_unique<ArrayArgument>(array, name));
    return *arrays_.back();
  }

  void read_options(int64_t n, int64_t m, py::handle weights, py::handle preselected,
                    GreedyOptions& options) {
    options.poll = signal_poll();
    if (!weights.is_none()) {
      const auto w = keep(weights, "weights").input<double, 1>();
      if (w.shape[0] != m)
        throw py::value_error("weights: expected " + std::to_string(m) +
                              " entries, one for each client, got " + std::to_string(w.shape[0]));
      for (int64_t i = 0; i < m; ++i) {
        if (!(w(i) >= 0) || std::isinf(w(i))) {
          throw py::value_error("weights: expected finite numbers >= 0, got " + std::to_string(w(i)) +
                                " at index " + std::to_string(i));
        }
        options.weights.push_back(w(i));
      }
    }
    if (!preselected.is_none()) {
      const auto p = keep(preselected, "preselected").input<int64_t, 1>();
      std::vector<char> seen(n, 0);
      for (int64_t i = 0; i < p.shape[0]; ++i) {
        const int64_t j = p(i);
        if (j < 0 || j >= n)
          throw py::value_error("preselected: expected indices in [0, " + std::to_string(n) + "), got " +
                                std::to_string(j));
        if (seen[j])
          throw py::value_error("preselected: expected distinct indices, got " + std::to_string(j) +
                                " twice");
        seen[j] = 1;
        options.preselected.push_back(j);
      }
    }
  }

  std::vector<std::unique_ptr<ArrayArgument>> arrays_;
  std::unique_ptr<FacilityLocation> run_;
  OneCall one_call_;
};

}  // namespace

void bind_facility_location(py::module_& m) {
  py::class_<PyFacilityLocation>(
      m, "FacilityLocation", py::module_local(),
      "A greedy facility location run over points or a dense similarity matrix, pick by pick.")
      .def(py::init<py::object, py::object, const std::string&, py::object, py::object, Real, Integer,
                    Integer, Integer>(),
           py::arg("x"), py::arg("clients"), py::arg("metric"), py::arg("weights"), py::arg("preselected"),
           py::arg("offset"), py::arg("memory_budget"), py::arg("threads"),
           py::arg("expected_picks") = INT64_MAX)
      .def_static(
          "from_csr",
          [](py::object indptr, py::object indices, py::object values, Integer m, py::object weights,
             py::object preselected, Flag self_clients, Integer memory_budget, Integer threads) {
            return std::make_unique<PyFacilityLocation>(indptr, indices, values, m, weights, preselected,
                                                        self_clients, memory_budget, threads);
          },
          py::arg("indptr"), py::arg("indices"), py::arg("values"), py::arg("m"), py::arg("weights"),
          py::arg("preselected"), py::arg("self_clients"), py::arg("memory_budget"), py::arg("threads"),
          "The same over the rows of a sparse matrix with m columns; absent entries are 0.")
      .def("step", &PyFacilityLocation::step, py::arg("count"), py::arg("naive") = false,
           "Makes up to `count` further picks; returns the number of picks so far.")
      .def("step_among", &PyFacilityLocation::step_among, py::arg("candidates"),
           "Makes one pick among the given candidates and returns it.")
      .def("finish", &PyFacilityLocation::finish, py::arg("indices"), py::arg("gains"), py::arg("weights"),
           py::arg("assignment"),
           "Writes the picks so far and the assignment into the given arrays; returns the objective.")
      .def("stats", &PyFacilityLocation::stats,
           "What the run did so far: evaluations, pairs, matrix_reads, list_reads, sweeps, foreseen.");
}

}  // namespace fc
