// Greedy facility location runs of the module _cuda.
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "bindings/cuda_module.h"
#include "bindings/facility_location.h"
#include "cuda/facility_location.h"

namespace fc {
namespace {

// A run, the arrays that it reads, and the device that both are on.
class PyCudaFacilityLocation {
  template <class Fn>
  auto locked(Fn&& fn) {
    return one_call_([&] {
      const DeviceGuard guard(device_);
      return fn();
    });
  }

 public:
  PyCudaFacilityLocation(py::object object, Integer stream_number) {
    const cudaStream_t stream = stream_of(stream_number);
    const Fields fields(object, kDevice);
    GreedyProblem& problem = problem_.emplace(fields, fields, "x");
    device_ = problem.x.device_id();
    for (const auto* array : {&problem.clients, &problem.weights, &problem.preselected, &problem.costs}) {
      if (*array) require_device(**array, device_);
    }
    problem.read(
        [&](const auto& x, const auto* clients, Metric metric) {
          read_vectors(x.rows(), clients == nullptr ? x.rows() : clients->rows());
          start([&] { return cuda::facility_location_points(x, clients, metric, problem.options, stream); });
        },
        [&](const auto& s) {
          read_vectors(s.rows(), s.cols());
          start([&] { return cuda::facility_location_matrix(s, problem.options, stream); });
        });
  }

  // Memory is freed on the device that it comes from.
  ~PyCudaFacilityLocation() {
    const DeviceGuard guard(device_, nullptr);
    run_.reset();
  }
  PyCudaFacilityLocation(const PyCudaFacilityLocation&) = delete;
  PyCudaFacilityLocation& operator=(const PyCudaFacilityLocation&) = delete;

  int64_t step(Integer count_number, Flag naive_flag) {
    const int64_t count = count_number.in("count", 0);
    const bool naive = naive_flag.on("naive");
    return locked([&] { return run_->step(count, naive); });
  }

  int64_t completed() const { return run_->completed(); }

  int64_t pick(Flag naive_flag, Real stop_gain_number) {
    const bool naive = naive_flag.on("naive");
    const double stop_gain = stop_gain_of(stop_gain_number);
    return locked([&] { return run_->pick(naive, stop_gain); });
  }

  int64_t step_among(py::object candidates_array) {
    const ArrayArgument candidates(candidates_array, "candidates", kDevice);
    require_device(candidates, device_);
    const auto view = candidates.input<int64_t, 1>();
    if (view.size() == 0 || !view.is_compact()) {
      throw py::value_error("candidates: expected a contiguous array of at least one");
    }
    return locked([&] { return run_->step_among(view.data, view.size()); });
  }

  void close(py::object candidates) {
    const std::vector<int64_t> list = candidates_below(candidates, run_->candidates());
    locked([&] { run_->close(list.data(), static_cast<int64_t>(list.size())); });
  }

  // (f(S), offset)
  py::tuple finish(py::object indices_array, py::object gains_array, py::object weights_array,
                   py::object assignment_array) {
    const ArrayArgument indices(indices_array, "indices", kDevice), gains(gains_array, "gains", kDevice),
        weights(weights_array, "weights", kDevice), assignment(assignment_array, "assignment", kDevice);
    for (const ArrayArgument* array : {&indices, &gains, &weights, &assignment}) {
      require_device(*array, device_);
    }
    const GreedyOutputs<double> out{indices.output<int64_t, 1>(), gains.output<double, 1>(),
                                    weights.output<double, 1>(), assignment.output<int64_t, 1>()};
    double objective = 0, offset = 0;
    locked([&] {
      out.require_sizes(run_->picks(), run_->clients());
      run_->finish(out.indices.data, out.gains.data, out.weights.data, out.assignment.data, &objective,
                   &offset);
    });
    return py::make_tuple(objective, offset);
  }

  // What is wrong, or None; "x" or "clients", row.
  py::tuple verdict() const {
    static constexpr const char* kKinds[] = {nullptr,   "not finite",  "overflow",   "vanishing",
                                             "weights", "weights sum", "preselected"};
    const cuda::Verdict verdict = run_->verdict();
    const char* kind = kKinds[verdict.kind];
    return py::make_tuple(kind == nullptr ? py::object(py::none()) : py::str(kind),
                          verdict.in_clients ? "clients" : "x", verdict.row);
  }

 private:
  template <class Start>
  void start(Start&& start) {
    const DeviceGuard guard(device_);
    without_gil([&] { run_ = start(); });
  }

  void read_vectors(int64_t n, int64_t m) {
    GreedyOptions& options = problem_->options;
    const auto place = [](const auto& view, const char* name) {
      if (!view.is_compact()) throw py::value_error(std::string(name) + ": expected a contiguous array");
      return view.data;
    };
    if (const auto weights = vector_of<double>(problem_->weights, m, "client"))
      options.weights = place(*weights, "weights");
    if (const auto costs = vector_of<double>(problem_->costs, n, "candidate"))
      options.costs = place(*costs, "costs");
    if (!problem_->preselected) return;
    const auto preselected = problem_->preselected->input<int64_t, 1>();
    options.preselected = place(preselected, "preselected");
    options.preselected_count = preselected.size();
    if (options.preselected_count > n)
      throw py::value_error("preselected: expected at most " + std::to_string(n) + " entries");
  }

  std::optional<GreedyProblem> problem_;
  int device_ = 0;
  std::unique_ptr<cuda::FacilityLocation> run_;
  OneCall one_call_;
};

}  // namespace

void bind_cuda_facility_location(py::module_& m) {
  py::class_<PyCudaFacilityLocation> run(m, "FacilityLocation", py::module_local(),
                                         "A greedy facility location run that stays on the GPU.");
  run.def(py::init<py::object, Integer>(), py::arg("problem"), py::arg("stream"),
          "A run of a FacilityLocationProblem, or of an object with its attributes.");
  define_run(run);
  run.def("step", &PyCudaFacilityLocation::step, py::arg("count"), py::arg("naive") = false,
          "Starts up to `count` further picks; returns how many there are then.");
  run.def_property_readonly("completed", &PyCudaFacilityLocation::completed,
                            "Of the picks started, how many are known to be made.")
      .def("verdict", &PyCudaFacilityLocation::verdict,
           "After finish(), pick() or step_among(): (what is wrong or None, argument, row).");
}

}  // namespace fc
