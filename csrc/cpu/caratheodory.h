// A weighted subset of rows with the weighted mean and the total weight of all rows.
//
// See caratheodory.cpp for the algorithm and the cost.
#pragma once

#include <cstdint>
#include <vector>

#include "core/half.h"
#include "core/tensor_view.h"
#include "core/threads.h"

namespace fc {

struct WeightedRows {
  std::vector<int64_t> rows;    // ascending
  std::vector<double> weights;  // positive
};

// Of the rows x [n, d] with weights [n] >= 0, not all 0 (null: all 1): at most rank + 1 rows and new weights
// for them, sum and weighted sum unchanged; rank is that of the rows less their mean. With max_size > 0 the
// reduction ends as soon as at most that many rows are left. X is float, double, Half or BFloat16; all
// arithmetic is double, and the result does not depend on the number of threads. Throws std::invalid_argument
// for NaN and infinity in x, naming the first.
template <class X>
WeightedRows caratheodory(TensorView<const X, 2> x, const TensorView<const double, 1>* weights,
                          int64_t max_size, ThreadTeam& team);

}  // namespace fc
