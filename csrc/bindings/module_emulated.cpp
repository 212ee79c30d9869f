// The module _cuda_emulated: the CUDA kernels compiled against the emulator, which takes CPU memory for
// device memory.
#include <cstddef>
#include <cstdint>

#include "bindings/arguments.h"
#include "bindings/cuda_module.h"
#include "cuda/launch.h"

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
