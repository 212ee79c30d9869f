// What every CUDA source includes in place of CUDA's own headers: those under nvcc, or the runtime in
// tests/emulator, which runs the same source on the CPU. The two differ in how a kernel declares shared
// memory, so it does so through the macros below.
#pragma once

#if defined(FC_EMULATOR)
#include "emulator/cuda.h"
#else
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

// FC_SHARED(float, tile, [16][128]); declares an array in the block's shared memory, FC_SHARED(long long,
// total, ); a scalar, and FC_DYNAMIC_SHARED(float, buffer); a pointer to the shared memory that the launch
// asked for. All are uninitialised.
#if defined(FC_EMULATOR)
// The lambda's type distinguishes one declaration, in one instantiation of its template, from all others.
#define FC_SHARED(type, name, extents) auto& name = ::fc::emulator::shared_array<type extents>([] {}, #name)
#define FC_DYNAMIC_SHARED(type, name) \
  type* const name = reinterpret_cast<type*>(::fc::emulator::dynamic_shared())
#else
#define FC_SHARED(type, name, extents) __shared__ type name extents
// One name has one type in all of a source, so every kernel's buffer is declared as bytes.
#define FC_DYNAMIC_SHARED(type, name)                                       \
  extern __shared__ __align__(16) unsigned char fc_dynamic_shared_memory[]; \
  type* const name = reinterpret_cast<type*>(fc_dynamic_shared_memory)
#endif

namespace fc {
namespace cuda {

// Waits until every thread of a cooperative launch is here, and makes what they wrote visible to all.
#if defined(FC_EMULATOR)
using emulator::grid_sync;
#elif defined(__CUDACC__)  // the CUDA headers that plain C++ includes have no device code
__device__ inline void grid_sync() { cooperative_groups::this_grid().sync(); }
#endif

}  // namespace cuda
}  // namespace fc
