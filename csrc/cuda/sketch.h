// Products with random matrices that are never stored, on the GPU.
#pragma once

#include <functional>

#include "core/projection.h"
#include "core/tensor_view.h"
#include "cuda/runtime.h"

namespace fc::cuda {

// out [B, dim], rows contiguous, = x [B, D] times the projection's matrix, on the device. Work goes to
// `stream`; if it takes several launches of tenths of a second, the host waits for the last but one of them,
// asking `poll` whether to stop: then Cancelled is thrown. The first launches do about `first_launch`
// multiply-adds, the next as many as their time allows; results do not depend on where launches are cut.
template <class T>
void sketch(TensorView<const T, 2> x, const Projection& projection, TensorView<T, 2> out, cudaStream_t stream,
            std::function<bool()> poll, double first_launch = 0x1p38);

// out [rows, dim], rows contiguous, = the matrix itself. The call does not wait.
template <class T>
void projection_matrix(const Projection& projection, TensorView<T, 2> out, cudaStream_t stream);

}  // namespace fc::cuda
