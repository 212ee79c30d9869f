#include "emulator/host.h"

#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <mutex>
#include <set>

#include "emulator/emulator.h"

struct EmulatedStream {};

namespace fc::emulator {

namespace {

thread_local cudaError_t last_error = cudaSuccess;

std::mutex mutex;
// Never destroyed: whatever a program keeps in static objects may be freed after them.
auto& allocations = *new std::map<const char*, size_t, std::less<>>;
auto& streams = *new std::set<cudaStream_t>;

// Whether all of [memory, memory + bytes) is in one allocation.
bool on_device(const void* memory, size_t bytes) {
  const Allocation found = allocation_of(memory);
  if (found.memory == nullptr) return false;
  const auto offset =
      static_cast<size_t>(static_cast<const char*>(memory) - static_cast<const char*>(found.memory));
  return bytes <= found.bytes - offset;
}

bool is_stream(cudaStream_t stream) {
  const std::lock_guard<std::mutex> lock(mutex);
  return stream == nullptr || streams.count(stream) > 0;
}

}  // namespace

Allocation allocation_of(const void* address) {
  const auto* at = static_cast<const char*>(address);
  const std::lock_guard<std::mutex> lock(mutex);
  auto after = allocations.upper_bound(at);
  if (after == allocations.begin()) return {nullptr, 0};
  const auto& [start, bytes] = *--after;
  if (static_cast<size_t>(at - start) >= bytes) return {nullptr, 0};
  return {start, bytes};
}

cudaError_t remember(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

cudaError_t occupancy(int* blocks, int threads, size_t shared) {
  if (threads < 1 || threads > static_cast<int>(kMaxThreads)) return remember(cudaErrorInvalidValue);
  *blocks = shared > kSharedBytes ? 0 : resident_blocks();
  return cudaSuccess;
}

cudaError_t set_attribute(cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value < 0 ||
      static_cast<size_t>(value) > kSharedBytes)
    return remember(cudaErrorInvalidValue);
  return cudaSuccess;
}

}  // namespace fc::emulator

using fc::emulator::remember;

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorMemoryAllocation:
      return "out of memory";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorInvalidMemcpyDirection:
      return "invalid copy direction for memcpy";
    case cudaErrorInvalidDevice:
      return "invalid device ordinal";
    case cudaErrorInvalidResourceHandle:
      return "invalid resource handle";
    case cudaErrorCooperativeLaunchTooLarge:
      return "too many blocks in cooperative launch";
  }
  return "unrecognized error code";
}

cudaError_t cudaGetLastError() {
  const cudaError_t error = fc::emulator::last_error;
  fc::emulator::last_error = cudaSuccess;
  return error;
}
cudaError_t cudaPeekAtLastError() { return fc::emulator::last_error; }

cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) { return remember(device == 0 ? cudaSuccess : cudaErrorInvalidDevice); }

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device != 0) return remember(cudaErrorInvalidDevice);
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = 1;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      *value = 8;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = 0;
      return cudaSuccess;
    case cudaDevAttrCooperativeLaunch:
      *value = 1;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = static_cast<int>(fc::emulator::kSharedBytes);
      return cudaSuccess;
  }
  return remember(cudaErrorInvalidValue);
}

cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }

cudaError_t cudaMalloc(void** memory, size_t bytes) {
  *memory = nullptr;
  if (bytes == 0) return cudaSuccess;
  void* allocated = std::malloc(bytes);
  if (allocated == nullptr) return remember(cudaErrorMemoryAllocation);
  fc::emulator::poison(allocated, bytes);
  const std::lock_guard<std::mutex> lock(fc::emulator::mutex);
  fc::emulator::allocations.emplace(static_cast<const char*>(allocated), bytes);
  *memory = allocated;
  return cudaSuccess;
}
cudaError_t cudaMallocAsync(void** memory, size_t bytes, cudaStream_t stream) {
  if (!fc::emulator::is_stream(stream)) return remember(cudaErrorInvalidResourceHandle);
  return cudaMalloc(memory, bytes);
}

cudaError_t cudaFree(void* memory) {
  if (memory == nullptr) return cudaSuccess;
  {
    const std::lock_guard<std::mutex> lock(fc::emulator::mutex);
    if (fc::emulator::allocations.erase(static_cast<const char*>(memory)) == 0)
      return remember(cudaErrorInvalidValue);
  }
  std::free(memory);
  return cudaSuccess;
}
cudaError_t cudaFreeAsync(void* memory, cudaStream_t stream) {
  if (!fc::emulator::is_stream(stream)) return remember(cudaErrorInvalidResourceHandle);
  return cudaFree(memory);
}

cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
  if (bytes == 0) return cudaSuccess;
  if (kind < cudaMemcpyHostToHost || kind > cudaMemcpyDefault)
    return remember(cudaErrorInvalidMemcpyDirection);
  const bool to_device = kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice;
  const bool from_device = kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice;
  if (kind != cudaMemcpyDefault && (fc::emulator::on_device(to, bytes) != to_device ||
                                    fc::emulator::on_device(from, bytes) != from_device))
    return remember(cudaErrorInvalidValue);
  std::memmove(to, from, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream) {
  if (!fc::emulator::is_stream(stream)) return remember(cudaErrorInvalidResourceHandle);
  return cudaMemcpy(to, from, bytes, kind);
}

cudaError_t cudaMemset(void* memory, int value, size_t bytes) {
  if (bytes == 0) return cudaSuccess;
  if (!fc::emulator::on_device(memory, bytes)) return remember(cudaErrorInvalidValue);
  std::memset(memory, value, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t stream) {
  if (!fc::emulator::is_stream(stream)) return remember(cudaErrorInvalidResourceHandle);
  return cudaMemset(memory, value, bytes);
}

cudaError_t cudaStreamCreate(cudaStream_t* stream) {
  return cudaStreamCreateWithFlags(stream, cudaStreamDefault);
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
  if (flags != cudaStreamDefault && flags != cudaStreamNonBlocking) return remember(cudaErrorInvalidValue);
  const std::lock_guard<std::mutex> lock(fc::emulator::mutex);
  *stream = *fc::emulator::streams.insert(new EmulatedStream).first;
  return cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  {
    const std::lock_guard<std::mutex> lock(fc::emulator::mutex);
    if (fc::emulator::streams.erase(stream) == 0) return remember(cudaErrorInvalidResourceHandle);
  }
  delete stream;
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  return remember(fc::emulator::is_stream(stream) ? cudaSuccess : cudaErrorInvalidResourceHandle);
}
