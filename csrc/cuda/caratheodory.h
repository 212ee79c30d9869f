// The parts of the Caratheodory reduction that read all rows, on the GPU; csrc/cpu/caratheodory.h has the
// rest of it.
#pragma once

#include <cstdint>

#include "core/half.h"
#include "core/tensor_view.h"
#include "cuda/runtime.h"

namespace fc::cuda {

// The rows of x that are left; `size` neighbours are a run.
struct Runs {
  int64_t count;          // of rows left
  int64_t size;           // the last run may be shorter
  const int64_t* rows;    // [count], null: the first `count` of x
  const double* weights;  // [count], null: 1
};

// sums [runs, 1 + d], compact, = the sums over each run of w (1, shrink x - centre). x [n, d] is float,
// double, Half or BFloat16, centre [d]. The order of the sums depends on the shapes alone. The call does not
// wait.
template <class X>
void sum_runs(TensorView<const X, 2> x, const Runs& runs, const double* centre, double shrink,
              TensorView<double, 2> sums, cudaStream_t stream);

// The rows of the runs `kept`, ascending, with their weights times their run's factor: new_rows and
// new_weights [count]. The call does not wait.
void keep_runs(const Runs& runs, const int64_t* kept, const double* factors, int64_t count, int64_t* new_rows,
               double* new_weights, cudaStream_t stream);

}  // namespace fc::cuda
