// What matching pursuit and Frank-Wolfe compute from the rows of G [B, D] on the GPU; the loop around it, in
// python/flashcoreset/pursuit/on_device.py, fits the weights on the host. Arrays are on the device, work goes
// to `stream`, and no call waits.
#pragma once

#include <cstdint>

#include "core/tensor_view.h"
#include "cuda/runtime.h"

namespace fc::cuda {

// The number of blocks of rows below which multiprocessors are idle.
constexpr int64_t kFewBlocks = 256;

// Rows places[v] of out [*, n] = the products of the rows which[v] of `vectors` with n rows of g, which
// `rows` lists, or with all rows if it has no data. Rows of g and `vectors` are contiguous, the other arrays
// compact. A product has the same bits whatever other products are computed along with it, and whether or not
// there are fewer blocks of rows than `few_blocks`. (If there are, pieces of long rows get blocks of their
// own.)
template <class X, class Y>
void products(TensorView<const X, 2> g, TensorView<const int64_t, 1> rows, TensorView<const Y, 2> vectors,
              TensorView<const int64_t, 1> which, TensorView<const int64_t, 1> places,
              TensorView<double, 2> out, cudaStream_t stream, int64_t few_blocks = kFewBlocks);

// out [B] = the squares of the rows.
template <class X>
void squares(TensorView<const X, 2> g, TensorView<double, 1> out, cudaStream_t stream,
             int64_t few_blocks = kFewBlocks);

// The arrays that the next pick is made by, all compact.
struct Correlations {
  TensorView<const double, 1> start;   // [B]
  TensorView<const double, 2> gram;    // [S, B], columns of the Gram matrix
  TensorView<const int64_t, 1> slots;  // [p], the rows of `gram` that hold the columns of the picks
  // [p + 1]: weights, and the rounding error of a correlation with a row of norm 1.
  TensorView<const double, 1> numbers;
  TensorView<const double, 1> norm;  // [B], infinite for a row that is taken
  bool magnitude = false;
};

// scores [B] = start - sum_p numbers[p] gram[slots[p]], or its magnitude, if that is more than its rounding
// error, else -inf. found [2] = the largest and its row, the first of equal ones.
void best_row(const Correlations& c, TensorView<double, 1> scores, TensorView<double, 1> found,
              cudaStream_t stream);

// out [D] = target - sum_p weights[p] g[rows[p]].
template <class X>
void residual(TensorView<const X, 2> g, TensorView<const double, 1> target, TensorView<const int64_t, 1> rows,
              TensorView<const double, 1> weights, TensorView<double, 1> out, cudaStream_t stream);

}  // namespace fc::cuda
