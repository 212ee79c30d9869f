// CUDA's host interface on the CPU: a device, whose memory is the heap, and streams that do everything at
// once and in order.
#pragma once

#include <cstddef>
#include <limits>

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidMemcpyDirection = 21,
  cudaErrorInvalidDevice = 101,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorInvalidResourceHandle = 400,
  cudaErrorNotReady = 600,
  cudaErrorCooperativeLaunchTooLarge = 720,
};

enum cudaMemcpyKind {
  cudaMemcpyHostToHost = 0,
  cudaMemcpyHostToDevice = 1,
  cudaMemcpyDeviceToHost = 2,
  cudaMemcpyDeviceToDevice = 3,
  cudaMemcpyDefault = 4,
};

enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrCooperativeLaunch = 95,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
  cudaDevAttrMemoryPoolsSupported = 115,
};

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };

struct EmulatedStream;
using cudaStream_t = EmulatedStream*;
constexpr unsigned cudaStreamDefault = 0, cudaStreamNonBlocking = 1;

struct EmulatedEvent;
using cudaEvent_t = EmulatedEvent*;
constexpr unsigned cudaEventDefault = 0, cudaEventDisableTiming = 2;

struct cudaFuncAttributes {};

const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetLastError();
cudaError_t cudaPeekAtLastError();

cudaError_t cudaGetDeviceCount(int* count);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaDeviceSynchronize();

// Each allocation is one of the heap's, so that the address sanitizer knows its bounds. Copies check that
// device memory is where the direction says it is, and that it is large enough.
cudaError_t cudaMalloc(void** memory, size_t bytes);
cudaError_t cudaMallocAsync(void** memory, size_t bytes, cudaStream_t stream);
cudaError_t cudaFree(void* memory);
cudaError_t cudaFreeAsync(void* memory, cudaStream_t stream);
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind);
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream = nullptr);
cudaError_t cudaMemset(void* memory, int value, size_t bytes);
cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t stream = nullptr);

template <class T>
cudaError_t cudaMalloc(T** memory, size_t bytes) {
  return cudaMalloc(reinterpret_cast<void**>(memory), bytes);
}
template <class T>
cudaError_t cudaMallocAsync(T** memory, size_t bytes, cudaStream_t stream) {
  return cudaMallocAsync(reinterpret_cast<void**>(memory), bytes, stream);
}

cudaError_t cudaStreamCreate(cudaStream_t* stream);
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags);
cudaError_t cudaStreamDestroy(cudaStream_t stream);
cudaError_t cudaStreamSynchronize(cudaStream_t stream);

// Reached when it is recorded, though cudaEventQuery may be set to deny that for a while:
// Device::event_delay.
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags);
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream);
cudaError_t cudaEventQuery(cudaEvent_t event);
cudaError_t cudaEventDestroy(cudaEvent_t event);

namespace fc::emulator {

// The device: an sm_80's limits, one multiprocessor.
constexpr unsigned kMaxThreads = 1024;
constexpr size_t kStaticSharedBytes = 48 * 1024;
constexpr size_t kSharedBytes = 163 * 1024;

// The properties that a test may change: less than the device's limits, or more devices of its kind.
struct Device {
  int count = 1;
  bool cooperative_launch = true, memory_pools = true;
  bool has_code = true;                               // whether the kernels were compiled for it
  unsigned largest_grid_y = 65535;                    // and z
  size_t bytes = std::numeric_limits<size_t>::max();  // of memory
  int event_delay = 0;                                // how often an event reports that it is not reached yet
};
void set_device(const Device& device);
const Device& device();

// The totals of all devices together.
size_t allocated_bytes();

// The device memory that the address is in, or a null pointer.
struct Allocation {
  const void* memory;
  size_t bytes;
};
Allocation allocation_of(const void* address);

cudaError_t remember(cudaError_t error);  // for cudaGetLastError
cudaError_t occupancy(int* blocks, int threads, size_t shared);
cudaError_t set_attribute(cudaFuncAttribute attribute, int value);
cudaError_t find_code();

}  // namespace fc::emulator

template <class... P>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void (*)(P...), int threads,
                                                          size_t shared) {
  return fc::emulator::occupancy(blocks, threads, shared);
}
template <class... P>
cudaError_t cudaFuncSetAttribute(void (*)(P...), cudaFuncAttribute attribute, int value) {
  return fc::emulator::set_attribute(attribute, value);
}
template <class... P>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, void (*)(P...)) {
  return fc::emulator::find_code();
}
