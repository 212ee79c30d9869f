// How the host starts a kernel: the one place that knows whether a GPU or the emulator runs it.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

#include "cuda/runtime.h"

namespace fc {
namespace cuda {

inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

// A grid of so many blocks.
inline dim3 grid_of(int64_t blocks) {
  if (blocks > INT32_MAX)
    throw std::invalid_argument("a launch on the GPU takes fewer than 2^31 blocks, this would be " +
                                std::to_string(blocks) + "; pass fewer rows or columns at a time");
  return dim3(static_cast<unsigned>(blocks));
}

struct Launch {
  dim3 grid, block;
  size_t shared = 0;  // bytes of dynamic shared memory
  cudaStream_t stream = nullptr;
  bool cooperative = false;  // all blocks are resident at once, so that grid_sync() works
};

namespace detail {

// Without an explicit request, a block has 48 KiB less the memory that the kernel itself declares. That size
// is not known here, so the memory is requested in any case.
template <class... P>
void allow_shared(void (*kernel)(P...), size_t bytes) {
  if (bytes > 0)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)),
          "dynamic shared memory");
}

#if defined(FC_EMULATOR)
template <class... P>
cudaError_t start(void (*kernel)(P...), const Launch& how, P... parameters) {
  return emulator::launch(kernel, {how.grid, how.block, how.shared, how.cooperative},
                          std::move(parameters)...);
}
#else
template <class... P>
cudaError_t start(void (*kernel)(P...), const Launch& how, P... parameters) {
  void* pointers[] = {const_cast<void*>(static_cast<const void*>(&parameters))..., nullptr};
  const void* function = reinterpret_cast<const void*>(kernel);
  if (how.cooperative)
    return cudaLaunchCooperativeKernel(function, how.grid, how.block, pointers, how.shared, how.stream);
  return cudaLaunchKernel(function, how.grid, how.block, pointers, how.shared, how.stream);
}
#endif

}  // namespace detail

// Runs kernel(arguments...), each argument converted to the type of its parameter. Like any launch, this does
// not wait for the kernel; errors of the launch itself are thrown.
template <class... P, class... A>
void launch(void (*kernel)(P...), const Launch& how, A&&... arguments) {
  static_assert(sizeof...(P) == sizeof...(A), "one argument for each parameter of the kernel");
  detail::allow_shared(kernel, how.shared);
  check(detail::start<P...>(kernel, how, static_cast<P>(std::forward<A>(arguments))...), "kernel launch");
}

// How many blocks of the kernel the current device holds at once: the largest grid of a cooperative launch.
// The environment variable FLASHCORESET_CUDA_BLOCKS lowers that to so many per multiprocessor, for tools
// whose instrumented kernels take more of a multiprocessor than the occupancy calculation knows.
template <class... P>
int cooperative_blocks(void (*kernel)(P...), int threads, size_t shared) {
  detail::allow_shared(kernel, shared);
  int device = 0, multiprocessors = 0, blocks = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device),
        "number of multiprocessors");
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, shared), "occupancy");
  if (const char* most = std::getenv("FLASHCORESET_CUDA_BLOCKS")) {
    blocks = std::min(blocks, std::max(std::atoi(most), 1));
  }
  return blocks * multiprocessors;
}

}  // namespace cuda
}  // namespace fc
