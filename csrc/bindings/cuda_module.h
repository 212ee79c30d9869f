// What the sources of the module _cuda share.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "bindings/bindings.h"
#include "bindings/boundary.h"
#include "cuda/launch.h"

namespace fc {

#if defined(FC_EMULATOR)
inline constexpr dlpack::DeviceType kDevice = dlpack::kCpu;
#else
inline constexpr dlpack::DeviceType kDevice = dlpack::kCuda;
#endif

// All arrays of a call have to be where its kernels run.
inline void require_device(const ArrayArgument& array, int device) {
  if (array.device_id() == device) return;
  const std::string here = std::to_string(device), there = std::to_string(array.device_id());
  throw py::value_error(std::string(array.name()) + ": expected an array on device " + here +
                        ", where x is, got one on device " + there + "; move it there");
}

// Makes the device of an array the current one for as long as the object lives.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) : DeviceGuard(device, nullptr) {
    cuda::check(status_, "making the arrays' device the current one");
  }
  // For destructors: errors are left to the calls under the guard.
  DeviceGuard(int device, std::nullptr_t) {
    status_ = cudaGetDevice(&before_);
    if (status_ == cudaSuccess && device != before_) status_ = cudaSetDevice(device);
  }
  ~DeviceGuard() { cudaSetDevice(before_); }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
  cudaError_t status_ = cudaSuccess;
};

// An array on that device, in one piece.
template <class T, int Rank>
TensorView<const T, Rank> compact_input(const ArrayArgument& array, int device) {
  require_device(array, device);
  const auto view = array.input<T, Rank>();
  if (!view.is_compact()) throw py::value_error(std::string(array.name()) + ": expected a contiguous array");
  return view;
}

template <class T, int Rank>
TensorView<T, Rank> compact_output(const ArrayArgument& array, int device) {
  compact_input<T, Rank>(array, device);
  return array.output<T, Rank>();
}

// All arrays of a call, on that device and each in one piece.
struct DeviceArrays {
  int device;

  template <class T, int Rank>
  TensorView<const T, Rank> input(const ArrayArgument& array) const {
    return compact_input<T, Rank>(array, device);
  }
  template <class T, int Rank>
  TensorView<T, Rank> output(const ArrayArgument& array) const {
    return compact_output<T, Rank>(array, device);
  }
};

inline cudaStream_t stream_of(Integer handle) { return reinterpret_cast<cudaStream_t>(handle.stream()); }

// What the kernels were compiled for.
const char* cuda_architectures();

// Everything that Python calls.
void define_cuda_module(py::module_& m);

void bind_cuda_pairwise(py::module_& m);
void bind_cuda_facility_location(py::module_& m);
void bind_cuda_sinkhorn(py::module_& m);
void bind_cuda_sketch(py::module_& m);
void bind_cuda_matching(py::module_& m);
void bind_cuda_caratheodory(py::module_& m);
void bind_cuda_pursuit(py::module_& m);

}  // namespace fc
