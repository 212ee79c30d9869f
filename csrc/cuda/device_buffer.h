// Device memory that lives and dies in the order of a stream.
#pragma once

#include <cstdint>
#include <new>
#include <string>
#include <utility>

#include "core/checked.h"
#include "cuda/launch.h"
#include "cuda/runtime.h"

namespace fc::cuda {

// Raised in Python as MemoryError.
class OutOfDeviceMemory : public std::bad_alloc {
 public:
  explicit OutOfDeviceMemory(size_t bytes)
      : message_("out of device memory: " + std::to_string(bytes) + " bytes more were asked for") {}
  const char* what() const noexcept override { return message_.c_str(); }

 private:
  std::string message_;
};

template <class T>
class DeviceBuffer {
 public:
  DeviceBuffer() = default;
  DeviceBuffer(int64_t size, cudaStream_t stream) : stream_(stream) {
    if (size <= 0) return;
    const auto bytes = static_cast<size_t>(checked_mul(size, sizeof(T)));
    const cudaError_t status = cudaMallocAsync(reinterpret_cast<void**>(&data_), bytes, stream);
    if (status == cudaErrorMemoryAllocation) {
      cudaGetLastError();  // reported here, not by the next launch
      throw OutOfDeviceMemory(bytes);
    }
    check(status, "allocating device memory");
  }
  DeviceBuffer(DeviceBuffer&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), stream_(other.stream_) {}
  DeviceBuffer& operator=(DeviceBuffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(stream_, other.stream_);
    return *this;
  }
  ~DeviceBuffer() {
    // A destructor cannot report an error; the next call on the stream reports it.
    if (data_ != nullptr) cudaFreeAsync(data_, stream_);
  }

  T* data() const { return data_; }

 private:
  T* data_ = nullptr;
  cudaStream_t stream_ = nullptr;
};

}  // namespace fc::cuda
