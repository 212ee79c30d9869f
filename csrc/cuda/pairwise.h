// All similarities or distances between two sets of points, on the GPU.
#pragma once

#include "core/metric.h"
#include "core/tensor_view.h"
#include "cuda/runtime.h"

namespace fc::cuda {

// out [n, m], rows contiguous: the metric's values between the rows of x [n, d] and of y [m, d], on the
// device. Work goes to `stream`; the call does not wait. NaN and infinity are not checked for: they give NaN
// or infinity.
template <class T>
void pairwise(TensorView<const T, 2> x, TensorView<const T, 2> y, Metric metric, TensorView<T, 2> out,
              cudaStream_t stream);

// Success if the kernels were compiled for the current device, or can be from their PTX.
cudaError_t find_kernel();

}  // namespace fc::cuda
