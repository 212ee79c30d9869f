// Rows brought into compact memory, and to unit length, with the operations of cpu/pack.h: a power of two
// brings a row's largest magnitude near 1, and feature k counts into partial sum k % 8. Eight threads per
// row.
#pragma once

#include <cmath>

#include "core/tensor_view.h"
#include "cuda/launch.h"
#include "cuda/tile.cuh"

namespace fc::cuda {

__device__ __forceinline__ int grid_thread() {
  return static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
}
__device__ __forceinline__ int grid_threads() { return static_cast<int>(gridDim.x * blockDim.x); }

__device__ __forceinline__ bool is_finite(double value) { return value - value == 0; }

// out [rows, d]; norms [rows] and bad_at (the least row * d + column of a value that is not finite) where
// they are wanted.
template <class T>
__global__ void __launch_bounds__(kThreads)
    pack(const T* x, int64_t row_stride, int64_t col_stride, int rows, int64_t d, bool normalise, T* out,
         double* norms, unsigned long long* bad_at) {
  constexpr int kLanes = 8;
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  // Whole warps run on, so that the shuffles find all of their lanes.
  const int64_t row = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / kLanes;
  const bool inside = row < rows;
  const T* in = x + (inside ? row : 0) * row_stride;
  double most = 0;
  for (int64_t k = lane; inside && k < d; k += kLanes) {
    const double value = in[k * col_stride];
    if (!is_finite(value) && bad_at != nullptr)
      atomicMin(bad_at, static_cast<unsigned long long>(row * d + k));
    most = fmax(most, fabs(value));
  }
  for (int step = kLanes / 2; step > 0; step /= 2)
    most = fmax(most, __shfl_xor_sync(0xffffffffu, most, step));
  double scale = 0, inverse = 0, norm = 0;
  if (most > 0 && is_finite(most)) {
    int exponent;
    frexp(most, &exponent);
    scale = ldexp(1.0, min(max(-exponent, -1000), 1000));
  }
  double sum = 0;
  for (int64_t k = lane; inside && k < d; k += kLanes) {
    const double t = __dmul_rn(in[k * col_stride], scale);
    sum = __dadd_rn(sum, __dmul_rn(t, t));
  }
  for (int step = kLanes / 2; step > 0; step /= 2) {
    sum = __dadd_rn(sum, __shfl_xor_sync(0xffffffffu, sum, step));
  }
  if (scale > 0) {
    norm = sqrt(sum);
    inverse = 1 / norm;
  }
  for (int64_t k = lane; inside && k < d; k += kLanes) {
    const T value = in[k * col_stride];
    out[row * d + k] = normalise ? static_cast<T>(__dmul_rn(__dmul_rn(value, scale), inverse)) : value;
  }
  if (norms != nullptr && inside && lane == 0) norms[row] = scale > 0 ? norm / scale : 0;
}

template <class T>
void launch_pack(const TensorView<const T, 2>& x, bool normalise, T* out, double* norms,
                 unsigned long long* bad_at, cudaStream_t stream) {
  if (x.rows() == 0) return;
  const dim3 blocks = grid_of((x.rows() * 8 + kThreads - 1) / kThreads);
  launch(pack<T>, {blocks, dim3(kThreads), 0, stream}, x.data, x.stride[0], x.stride[1],
         static_cast<int>(x.rows()), x.cols(), normalise, out, norms, bad_at);
}

}  // namespace fc::cuda
