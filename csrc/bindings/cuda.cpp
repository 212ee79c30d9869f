// Python's view of the CUDA kernels: the module _cuda, or, compiled against the emulator, _cuda_emulated,
// which takes CPU memory for device memory.
#include <cstddef>
#include <string>

#include "bindings/bindings.h"
#include "bindings/boundary.h"
#include "bindings/cuda_module.h"
#include "bindings/fields.h"
#include "cuda/launch.h"
#include "cuda/pairwise.h"

namespace fc {
namespace {

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
  bind_cuda_pairwise(m);
  bind_cuda_facility_location(m);
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
