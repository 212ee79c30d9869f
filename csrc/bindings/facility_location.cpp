// Python's view of the greedy facility location run.
#include "bindings/facility_location.h"

#include <cmath>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "cpu/facility_location.h"

namespace fc {
namespace {

// Costs whose quotients with gains, integers below 2^62, are normal numbers.
constexpr double kMostCost = 0x1p900;

// The run and the arrays that it reads.
class PyFacilityLocation {
 public:
  PyFacilityLocation(py::object object, Integer threads_number) {
    const int threads = threads_number.threads();
    const Fields fields(object);
    const py::object x = fields["x"];
    // Asking a tensor for an attribute that it lacks takes long.
    const bool is_tensor = reinterpret_cast<PyObject*>(Py_TYPE(x.ptr())) == Exporter::instance().type;
    if (!is_tensor && py::hasattr(x, "crow")) {
      start_sparse(fields, Fields(x), threads);
    } else {
      start_dense(fields, threads);
    }
  }

  int64_t step(Integer count_number, Flag naive_flag, py::object report) {
    const int64_t count = count_number.in("count", 0);
    const bool naive = naive_flag.on("naive");
    if (!report.is_none() && PyCallable_Check(report.ptr()) == 0)
      throw py::type_error("report: expected a function or None");
    return one_call_([&] {
      const Watched watched{report_, report.is_none() ? nullptr : report.ptr()};
      return run_->step(count, naive);
    });
  }

  int64_t pick(Flag naive_flag, Real stop_gain_number) {
    const bool naive = naive_flag.on("naive");
    const double stop_gain = stop_gain_of(stop_gain_number);
    return one_call_([&] { return run_->pick(naive, stop_gain); });
  }

  int64_t step_among(py::object candidates) {
    const std::vector<int64_t> list = candidates_below(candidates, run_->candidates());
    if (list.empty()) throw py::value_error("candidates: expected at least one");
    return one_call_([&] {
      for (const int64_t j : list) {
        if (run_->is_open(j)) continue;
        throw std::invalid_argument("candidates: expected indices in [0, " +
                                    std::to_string(run_->candidates()) + ") that are not chosen yet, got " +
                                    std::to_string(j));
      }
      return run_->step_among(list.data(), static_cast<int64_t>(list.size()));
    });
  }

  void close(py::object candidates) {
    const std::vector<int64_t> list = candidates_below(candidates, run_->candidates());
    one_call_([&] { run_->close(list.data(), static_cast<int64_t>(list.size())); });
  }

  double finish(py::object indices_array, py::object gains_array, py::object weights_array,
                py::object assignment_array) {
    const ArrayArgument indices(indices_array, "indices"), gains(gains_array, "gains"),
        weights(weights_array, "weights"), assignment(assignment_array, "assignment");
    return dispatch_floating(gains, [&](auto zero) {
      using T = decltype(zero);
      const GreedyOutputs<T> out{indices.output<int64_t, 1>(), gains.output<T, 1>(), weights.output<T, 1>(),
                                 assignment.output<int64_t, 1>()};
      return one_call_([&] {
        const int64_t k = run_->picks();
        out.require_sizes(k, run_->clients());
        std::vector<double> gain(k), weight(k);
        const double objective =
            run_->finish(out.indices.data, gain.data(), weight.data(), out.assignment.data);
        for (int64_t p = 0; p < k; ++p) {
          out.gains.data[p] = static_cast<T>(gain[p]);
          out.weights.data[p] = static_cast<T>(weight[p]);
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
  // The function that hears of a call's progress while the call lasts, which keeps it alive.
  struct Watched {
    Watched(PyObject*& place, PyObject* report) : place_(place) { place_ = report; }
    ~Watched() { place_ = nullptr; }
    PyObject*& place_;
  };

  // Whether to stop: a signal handler or the function that hears of the progress raised.
  bool poll() const {
    py::gil_scoped_acquire gil;
    if (PyErr_CheckSignals() != 0) return true;
    if (report_ == nullptr) return false;
    try {
      const py::handle report(report_);
      report(run_->work(), run_->picks());
    } catch (py::error_already_set& error) {
      error.restore();
      return true;
    }
    return false;
  }

  void start_dense(const Fields& fields, int threads) {
    GreedyProblem& problem = problem_.emplace(fields, fields, "x");
    problem.options.poll = [this] { return poll(); };
    problem.read(
        [&](const auto& x, const auto* clients, Metric metric) {
          const int64_t m = clients == nullptr ? x.rows() : clients->rows();
          const double pairs = static_cast<double>(x.rows()) * static_cast<double>(m);
          problem.options.threads = ThreadTeam::for_work(threads, pairs * static_cast<double>(x.cols()));
          read_vectors(x.rows(), m);
          run_ = facility_location_points(x, clients, metric, problem.options);
        },
        [&](const auto& s) {
          problem.options.threads = threads;
          read_vectors(s.rows(), s.cols());
          run_ = facility_location_matrix(s, problem.options);
        });
  }

  // x has crow [n + 1] and col int64, values and shape (n, m).
  void start_sparse(const Fields& fields, const Fields& x, int threads) {
    const auto shape = x["shape"];
    if (!py::isinstance<py::sequence>(shape) || py::len(shape) != 2)
      throw py::type_error("x: expected a shape of two numbers");
    const int64_t m = Integer::of(py::sequence(shape)[1]).count("columns");
    GreedyProblem& problem = problem_.emplace(fields, x, "values");
    problem.options.poll = [this] { return poll(); };
    if (problem.metric != "precomputed" || problem.clients)
      throw py::value_error(
          "x: a sparse matrix is one of similarities, for metric 'precomputed' without clients");
    rows_ = x.array("crow");
    columns_ = x.array("col");
    const auto indptr = rows_->input<int64_t, 1>(), indices = columns_->input<int64_t, 1>();
    const int64_t n = indptr.shape[0] - 1;
    if (n < 0) throw py::value_error("crow: expected at least one entry");
    if (!indptr.has_contiguous_rows() || !indices.has_contiguous_rows())
      throw py::value_error("crow, col: expected contiguous arrays");
    if (indices.shape[0] != problem.x.size(0))
      throw py::value_error("col: expected as many entries as values");
    if (indptr(n) != indices.shape[0])
      throw py::value_error("crow: expected its last entry to be the number of stored values");
    problem.options.self_clients = n == m;
    problem.options.threads = threads;
    read_vectors(n, m);
    dispatch_floating(problem.x, [&](auto zero) {
      using T = decltype(zero);
      const auto view = problem.x.input<T, 1>();
      if (!view.has_contiguous_rows()) throw py::value_error("values: expected a contiguous array");
      run_ = facility_location_sparse<T>(SparseRows<T>{n, m, indptr.data, indices.data, view.data},
                                         problem.options);
    });
  }

  // Copies the vectors, whose entries stay as they were checked.
  void read_vectors(int64_t n, int64_t m) {
    GreedyProblem& problem = *problem_;
    GreedyOptions& options = problem.options;
    if (options.find_offset) throw py::type_error("offset: expected a number, got NoneType");
    const auto copy_positive = [](const auto& view, const char* name, bool with_zero, auto& copy) {
      copy.reserve(view->size());
      for (int64_t i = 0; i < view->size(); ++i) {
        const double value = (*view)(i);
        if (with_zero ? !(value >= 0) || std::isinf(value)
                      : !(value >= 1 / kMostCost && value <= kMostCost)) {
          throw py::value_error(std::string(name) + ": expected finite numbers " +
                                (with_zero ? ">= 0" : "> 0") + ", got " + std::to_string(value) +
                                " at index " + std::to_string(i));
        }
        copy.push_back(value);
      }
      return copy.data();
    };
    if (const auto weights = vector_of<double>(problem.weights, m, "client"))
      options.weights = copy_positive(weights, "weights", true, weights_);
    if (const auto costs = vector_of<double>(problem.costs, n, "candidate"))
      options.costs = copy_positive(costs, "costs", false, costs_);
    if (!problem.preselected) return;
    const auto p = problem.preselected->input<int64_t, 1>();
    std::vector<char> seen(n, 0);
    for (int64_t i = 0; i < p.shape[0]; ++i) {
      const int64_t j = p(i);
      if (j < 0 || j >= n)
        throw py::value_error("preselected: expected indices in [0, " + std::to_string(n) + "), got " +
                              std::to_string(j));
      if (seen[j])
        throw py::value_error("preselected: expected distinct indices, got " + std::to_string(j) + " twice");
      seen[j] = 1;
      preselected_.push_back(j);
    }
    options.preselected = preselected_.data();
    options.preselected_count = p.shape[0];
  }

  std::optional<GreedyProblem> problem_;
  std::optional<ArrayArgument> rows_, columns_;  // of a sparse x
  std::vector<double> weights_, costs_;
  std::vector<int64_t> preselected_;
  PyObject* report_ = nullptr;  // of the step in progress
  std::unique_ptr<FacilityLocation> run_;
  OneCall one_call_;
};

}  // namespace

void bind_facility_location(py::module_& m) {
  py::class_<PyFacilityLocation> run(
      m, "FacilityLocation", py::module_local(),
      "A greedy facility location run over points or a matrix of similarities, pick by pick.");
  run.def(py::init<py::object, Integer>(), py::arg("problem"), py::arg("threads"),
          "A run of a FacilityLocationProblem, or of an object with its attributes.");
  define_run(run);
  run.def("step", &PyFacilityLocation::step, py::arg("count"), py::arg("naive") = false,
          py::arg("report") = py::none(),
          "Makes up to `count` further picks; returns how many there are then. report(work, picks) is called "
          "about every 50 ms; work: pairs computed, in units of those that the first pick takes.");
  run.def("stats", &PyFacilityLocation::stats,
          "What the run did so far: evaluations, pairs, matrix_reads, list_reads, sweeps, foreseen.");
}

}  // namespace fc
