// All similarities or distances between two sets of points.
#pragma once

#include "core/metric.h"
#include "core/tensor_view.h"
#include "core/threads.h"

namespace fc {

// out [n, m] with unit column stride: the metric's values between the rows of x [n, d] and of y [m, d]; y is
// x if `symmetric`. Throws std::invalid_argument for NaN or infinity in x or y.
template <class T>
void pairwise(TensorView<const T, 2> x, TensorView<const T, 2> y, Metric metric, bool symmetric,
              TensorView<T, 2> out, ThreadTeam& team);

}  // namespace fc
