#include "emulator/host.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <mutex>
#include <set>

#include "emulator/emulator.h"

struct EmulatedStream {
  int device;
};
struct EmulatedEvent {
  int left = 0;  // queries that it will still deny
};

namespace fc::emulator {

namespace {

thread_local cudaError_t last_error = cudaSuccess;

std::mutex mutex;
// Never destroyed: memory that a program keeps in static objects may be freed after them.
struct Block {
  size_t bytes;
  int device;
};
auto& allocations = *new std::map<const char*, Block, std::less<>>;
auto& streams = *new std::set<cudaStream_t>;
auto& events = *new std::set<cudaEvent_t>;
size_t allocated = 0;
Device emulated;
thread_local int current_device = 0;

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

// The null stream is that of the current device.
int device_of(cudaStream_t stream) { return stream == nullptr ? current_device : stream->device; }

bool is_event(cudaEvent_t event) {
  const std::lock_guard<std::mutex> lock(mutex);
  return events.count(event) > 0;
}

}  // namespace

Allocation allocation_of(const void* address) {
  const auto* at = static_cast<const char*>(address);
  const std::lock_guard<std::mutex> lock(mutex);
  auto after = allocations.upper_bound(at);
  if (after == allocations.begin()) return {nullptr, 0};
  const auto& [start, block] = *--after;
  if (static_cast<size_t>(at - start) >= block.bytes) return {nullptr, 0};
  return {start, block.bytes};
}

void set_device(const Device& device) {
  emulated = device;
  current_device = 0;
}
const Device& device() { return emulated; }

size_t allocated_bytes() {
  const std::lock_guard<std::mutex> lock(mutex);
  return allocated;
}

cudaError_t find_code() {
  return remember(emulated.has_code ? cudaSuccess : cudaErrorNoKernelImageForDevice);
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

using fc::emulator::allocated_bytes;
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
    case cudaErrorNoKernelImageForDevice:
      return "no kernel image is available for execution on the device";
    case cudaErrorInvalidResourceHandle:
      return "invalid resource handle";
    case cudaErrorNotReady:
      return "device not ready";
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
  *count = fc::emulator::emulated.count;
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
  *device = fc::emulator::current_device;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= fc::emulator::emulated.count) return remember(cudaErrorInvalidDevice);
  fc::emulator::current_device = device;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device < 0 || device >= fc::emulator::emulated.count) return remember(cudaErrorInvalidDevice);
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
      *value = fc::emulator::emulated.cooperative_launch;
      return cudaSuccess;
    case cudaDevAttrMemoryPoolsSupported:
      *value = fc::emulator::emulated.memory_pools;
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
  if (bytes > fc::emulator::emulated.bytes - std::min(fc::emulator::emulated.bytes, allocated_bytes()))
    return remember(cudaErrorMemoryAllocation);
  void* allocated = std::malloc(bytes);
  if (allocated == nullptr) return remember(cudaErrorMemoryAllocation);
  fc::emulator::poison(allocated, bytes);
  const std::lock_guard<std::mutex> lock(fc::emulator::mutex);
  const fc::emulator::Block block{bytes, fc::emulator::current_device};
  fc::emulator::allocations.emplace(static_cast<const char*>(allocated), block);
  fc::emulator::allocated += bytes;
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
    const auto found = fc::emulator::allocations.find(static_cast<const char*>(memory));
    if (found == fc::emulator::allocations.end()) return remember(cudaErrorInvalidValue);
    fc::emulator::allocated -= found->second.bytes;
    fc::emulator::allocations.erase(found);
  }
  std::free(memory);
  return cudaSuccess;
}
cudaError_t cudaFreeAsync(void* memory, cudaStream_t stream) {
  if (!fc::emulator::is_stream(stream)) return remember(cudaErrorInvalidResourceHandle);
  {
    // CUDA itself takes the stream of another device, whose order says nothing about the memory's use.
    const std::lock_guard<std::mutex> lock(fc::emulator::mutex);
    const auto found = fc::emulator::allocations.find(static_cast<const char*>(memory));
    if (found != fc::emulator::allocations.end() && found->second.device != fc::emulator::device_of(stream))
      return remember(cudaErrorInvalidValue);
  }
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
  *stream = *fc::emulator::streams.insert(new EmulatedStream{fc::emulator::current_device}).first;
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

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags) {
  if (flags != cudaEventDefault && flags != cudaEventDisableTiming) return remember(cudaErrorInvalidValue);
  const std::lock_guard<std::mutex> lock(fc::emulator::mutex);
  *event = *fc::emulator::events.insert(new EmulatedEvent).first;
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  if (!fc::emulator::is_event(event) || !fc::emulator::is_stream(stream))
    return remember(cudaErrorInvalidResourceHandle);
  event->left = fc::emulator::emulated.event_delay;
  return cudaSuccess;
}
cudaError_t cudaEventQuery(cudaEvent_t event) {
  if (!fc::emulator::is_event(event)) return remember(cudaErrorInvalidResourceHandle);
  if (event->left == 0) return cudaSuccess;
  --event->left;
  return remember(cudaErrorNotReady);
}
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  {
    const std::lock_guard<std::mutex> lock(fc::emulator::mutex);
    if (fc::emulator::events.erase(event) == 0) return remember(cudaErrorInvalidResourceHandle);
  }
  delete event;
  return cudaSuccess;
}
