// What the modules of the CUDA kernels have in common.
#include "bindings/cuda_module.h"

#include <string>

#include "bindings/bindings.h"
#include "bindings/fields.h"
#include "cuda/launch.h"
#include "cuda/pairwise.h"

namespace fc {
namespace {

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
    return py::str(std::string("the kernels were compiled for ") + cuda_architectures() +
                   ", not for this device (" + cudaGetErrorString(found) +
                   "); reinstall with FLASHCORESET_CUDA_ARCHITECTURES unset");
  }
  return py::none();
}

}  // namespace

const char* cuda_architectures() {
#if defined(FC_EMULATOR)
  return "the emulator";
#else
  return FC_CUDA_ARCHITECTURES;
#endif
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

}  // namespace fc
