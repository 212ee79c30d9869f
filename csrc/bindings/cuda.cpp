// Python's view of the CUDA kernels: the module _cuda, or, compiled against the emulator, _cuda_emulated,
// which takes CPU memory for device memory.
#include <cstddef>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "bindings/bindings.h"
#include "bindings/boundary.h"
#include "bindings/cuda_module.h"
#include "bindings/fields.h"
#include "bindings/run.h"
#include "cuda/facility_location.h"
#include "cuda/launch.h"
#include "cuda/pairwise.h"

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
  PyCudaFacilityLocation(py::object x_array, py::object clients_array, const std::string& metric,
                         py::object weights_array, py::object preselected_array, Real offset,
                         Integer stream) {
    ArrayArgument& x = keep(x_array, "x");
    device_ = x.device_id();
    cuda::GreedyArguments arguments;
    arguments.find_offset = offset.given.is_none();
    arguments.trim_offset = !arguments.find_offset;
    arguments.offset = arguments.find_offset ? 0 : offset.finite("offset");
    arguments.poll = signal_poll();
    arguments.stream = stream_of(stream);
    dispatch_floating(x, [&](auto zero) {
      using T = decltype(zero);
      const auto view = x.input<T, 2>();
      const bool precomputed = metric == "precomputed";
      TensorView<const T, 2> clients{};
      int64_t m = precomputed ? view.cols() : view.rows();
      if (!clients_array.is_none()) {
        clients = keep(clients_array, "clients").input<T, 2>();
        if (precomputed || clients.cols() != view.cols()) {
          throw py::value_error("clients: expected points of as many columns as x has");
        }
        m = clients.rows();
      }
      if (precomputed && !view.has_contiguous_rows()) {
        throw py::value_error("x: expected rows that are contiguous in memory; pass a contiguous copy");
      }
      arguments.self_clients = clients_array.is_none() && view.rows() == m;
      if (!weights_array.is_none()) arguments.weights = compact<double>(weights_array, "weights", m);
      if (!preselected_array.is_none()) {
        arguments.preselected = compact<int64_t>(preselected_array, "preselected", -1);
        arguments.preselected_count = arrays_.back()->size(0);
        if (arguments.preselected_count > view.rows()) {
          throw py::value_error("preselected: expected at most " + std::to_string(view.rows()) + " entries");
        }
      }
      const DeviceGuard guard(device_);
      without_gil([&] {
        if (precomputed) {
          run_ = cuda::facility_location_matrix<T>(view, arguments);
        } else {
          run_ = cuda::facility_location_points<T>(view, clients_array.is_none() ? nullptr : &clients,
                                                   metric_from_name(metric), arguments);
        }
      });
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

  int64_t step_among(py::object candidates_array) {
    const ArrayArgument candidates(candidates_array, "candidates", kDevice);
    require_device(candidates, device_);
    const auto view = candidates.input<int64_t, 1>();
    if (view.size() == 0 || !view.is_compact()) {
      throw py::value_error("candidates: expected a contiguous array of at least one");
    }
    return locked([&] { return run_->step_among(view.data, view.size()); });
  }

  // (f(S), offset)
  py::tuple finish(py::object indices_array, py::object gains_array, py::object weights_array,
                   py::object assignment_array) {
    const ArrayArgument indices(indices_array, "indices", kDevice), gains(gains_array, "gains", kDevice),
        weights(weights_array, "weights", kDevice), assignment(assignment_array, "assignment", kDevice);
    for (const ArrayArgument* array : {&indices, &gains, &weights, &assignment}) {
      require_device(*array, device_);
    }
    const auto i = indices.output<int64_t, 1>(), a = assignment.output<int64_t, 1>();
    const auto g = gains.output<double, 1>(), w = weights.output<double, 1>();
    if (i.size() != run_->picks() || g.size() != i.size() || w.size() != i.size() ||
        a.size() != run_->clients()) {
      throw py::value_error("indices, gains, weights, assignment: expected " + std::to_string(run_->picks()) +
                            " picks and " + std::to_string(run_->clients()) + " clients");
    }
    if (!i.is_compact() || !g.is_compact() || !w.is_compact() || !a.is_compact()) {
      throw py::value_error("indices, gains, weights, assignment: expected contiguous arrays");
    }
    double objective = 0, offset = 0;
    locked([&] { run_->finish(i.data, g.data, w.data, a.data, &objective, &offset); });
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
  ArrayArgument& keep(py::handle array, const char* name) {
    arrays_.push_back(std::make_unique<ArrayArgument>(array, name, kDevice));
    if (arrays_.size() > 1) require_device(*arrays_.back(), device_);
    return *arrays_.back();
  }

  template <class U>
  const U* compact(py::handle array, const char* name, int64_t size) {
    const auto view = keep(array, name).template input<U, 1>();
    if (!view.is_compact() || (size >= 0 && view.size() != size)) {
      throw py::value_error(std::string(name) + ": expected a contiguous array" +
                            (size < 0 ? "" : " of " + std::to_string(size) + " entries"));
    }
    return view.data;
  }

  std::vector<std::unique_ptr<ArrayArgument>> arrays_;
  int device_ = 0;
  std::unique_ptr<cuda::FacilityLocation> run_;
  OneCall one_call_;
};

void pairwise(py::object x_array, py::object y_array, py::object out_array, const std::string& metric,
              Integer stream_number) {
  const cudaStream_t stream = stream_of(stream_number);
  const Metric kind = metric_from_name(metric);
  const ArrayArgument x(x_array, "x", kDevice), y(y_array, "y", kDevice), out(out_array, "out", kDevice);
  require_device(y, x.device_id());
  require_device(out, x.device_id());
  dispatch_floating(x, [&](auto zero) {
    using T = decltype(zero);
    const auto xs = x.input<T, 2>(), ys = y.input<T, 2>();
    const auto result = out.output<T, 2>();
    if (xs.cols() != ys.cols()) throw py::value_error("y: expected as many columns as x has");
    out.require_shape({xs.rows(), ys.rows()});
    if (!result.has_contiguous_rows()) {
      throw py::value_error("out: expected rows that are contiguous in memory");
    }
    const DeviceGuard guard(x.device_id());
    without_gil([&] { cuda::pairwise<T>(xs, ys, kind, result, stream); });
  });
}

#if defined(FC_EMULATOR)
constexpr const char* kBuiltFor = "the emulator";
#else
constexpr const char* kBuiltFor = FC_CUDA_ARCHITECTURES;
#endif

// The reason why no device, or not this one, can be used; None if it can be.
py::object unusable(Integer device_number) {
  const int device = static_cast<int>(device_number.in("device", 0, INT32_MAX));
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status != cudaSuccess) return py::str(cudaGetErrorString(status));
  if (device >= count) return py::str("there are " + std::to_string(count) + " CUDA devices");
  const auto has = [&](cudaDeviceAttr attribute) {
    int value = 0;
    cuda::check(cudaDeviceGetAttribute(&value, attribute, device), "device attribute");
    return value != 0;
  };
  if (!has(cudaDevAttrCooperativeLaunch)) return py::str("the device has no cooperative launch");
  if (!has(cudaDevAttrMemoryPoolsSupported)) return py::str("the device has no memory pools");
  const DeviceGuard guard(device);
  if (const cudaError_t found = cuda::find_kernel(); found != cudaSuccess) {
    cudaGetLastError();  // reported here, not by the next launch
    return py::str(std::string("the kernels were compiled for ") + kBuiltFor + ", not for this device (" +
                   cudaGetErrorString(found) + "); reinstall with FLASHCORESET_CUDA_ARCHITECTURES unset");
  }
  return py::none();
}

void define_cuda_module(py::module_& m) {
  define_exporter(m);
  m.def("unusable", &unusable, py::arg("device") = 0, "Why the device cannot be used, or None.");
  m.def("pairwise", &pairwise, py::arg("x"), py::arg("y"), py::arg("out"), py::arg("metric"),
        py::arg("stream"),
        "out [n, m] = similarities or distances of the rows of x [n, d] and y [m, d], on the device.");
  py::class_<PyCudaFacilityLocation>(m, "FacilityLocation", py::module_local(),
                                     "A greedy run that stays on the GPU.")
      .def(py::init<py::object, py::object, const std::string&, py::object, py::object, Real, Integer>(),
           py::arg("x"), py::arg("clients"), py::arg("metric"), py::arg("weights"), py::arg("preselected"),
           py::arg("offset"), py::arg("stream"))
      .def("step", &PyCudaFacilityLocation::step, py::arg("count"), py::arg("naive"),
           "Starts up to `count` picks; returns how many there will be in all.")
      .def_property_readonly("completed", &PyCudaFacilityLocation::completed,
                             "Of the picks started, how many are known to be made.")
      .def("step_among", &PyCudaFacilityLocation::step_among, py::arg("candidates"),
           "One pick among candidates [r] int64; waits and returns it.")
      .def("finish", &PyCudaFacilityLocation::finish, py::arg("indices"), py::arg("gains"),
           py::arg("weights"), py::arg("assignment"),
           "Writes indices, gains and weights [picks], assignment [m]; waits; returns (f(S), offset).")
      .def("verdict", &PyCudaFacilityLocation::verdict,
           "After finish() or step_among(): (what is wrong or None, argument, row).");
  bind_cuda_sinkhorn(m);
  bind_cuda_sketch(m);
  bind_cuda_matching(m);
  bind_cuda_caratheodory(m);
  bind_cuda_pursuit(m);
}

}  // namespace
}  // namespace fc

#if defined(FC_EMULATOR)
PYBIND11_MODULE(_cuda_emulated, m) {
  m.doc() = "flashcoreset's CUDA kernels, run on the CPU by tests/emulator.";
  m.def("set_schedule", &fc::emulator::set_schedule, pybind11::arg("name"));
  m.def(
      "set_device",
      [](fc::Integer count, fc::Flag cooperative_launch, fc::Flag memory_pools, fc::Flag has_code,
         fc::Integer bytes, fc::Integer event_delay) {
        fc::emulator::Device device;
        device.count = static_cast<int>(count.in("count", 0, INT32_MAX));
        device.cooperative_launch = cooperative_launch.on("cooperative_launch");
        device.memory_pools = memory_pools.on("memory_pools");
        device.has_code = has_code.on("has_code");
        device.bytes = static_cast<size_t>(bytes.in("bytes", 0));
        device.event_delay = static_cast<int>(event_delay.in("event_delay", 0, INT32_MAX));
        fc::emulator::set_device(device);
      },
      pybind11::arg("count") = 1, pybind11::arg("cooperative_launch") = true,
      pybind11::arg("memory_pools") = true, pybind11::arg("has_code") = true,
      pybind11::arg("bytes") = INT64_MAX, pybind11::arg("event_delay") = 0);
  m.def(
      "set_current_device",
      [](fc::Integer device) {
        const int number = static_cast<int>(device.in("device", 0, INT32_MAX));
        fc::cuda::check(cudaSetDevice(number), "cudaSetDevice");
      },
      pybind11::arg("device"));
  m.def("allocated_bytes", &fc::emulator::allocated_bytes);
  fc::define_cuda_module(m);
}
#else
PYBIND11_MODULE(_cuda, m) {
  m.doc() = "flashcoreset's CUDA kernels.";
  m.attr("ARCHITECTURES") = fc::kBuiltFor;
  fc::define_cuda_module(m);
}
#endif
