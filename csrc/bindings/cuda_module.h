// What the sources of the module _cuda share.
#pragma once

#include <cstdint>

#include "bindings/bindings.h"
#include "core/dlpack.h"
#include "cuda/launch.h"

namespace fc {

#if defined(FC_EMULATOR)
inline constexpr dlpack::DeviceType kDevice = dlpack::kCpu;
#else
inline constexpr dlpack::DeviceType kDevice = dlpack::kCuda;
#endif

// Makes the device of an array the current one for as long as the object lives.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    cuda::check(cudaGetDevice(&before_), "cudaGetDevice");
    if (device != before_) cuda::check(cudaSetDevice(device), "cudaSetDevice");
  }
  ~DeviceGuard() { cudaSetDevice(before_); }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
};

inline cudaStream_t stream_of(uintptr_t handle) { return reinterpret_cast<cudaStream_t>(handle); }

void bind_cuda_sinkhorn(py::module_& m);

}  // namespace fc
