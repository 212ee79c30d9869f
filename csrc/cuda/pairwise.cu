// All similarities or distances between two sets of points: one block per tile of the result. n * m * d
// multiply-adds, both sets packed first.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "cuda/device_buffer.h"
#include "cuda/launch.h"
#include "cuda/pack.cuh"
#include "cuda/pairwise.h"
#include "cuda/tile.cuh"

namespace fc::cuda {
namespace {

template <class T, Form form>
__global__ void __launch_bounds__(kThreads)
    tile_of_pairs(RowSet<T> x, RowSet<T> y, bool root, T* out, int64_t stride) {
  constexpr int kRows = kTallRows<T, true>;
  T value[kRows / kSide][kCols<T> / kSide];
  // In one dimension of the grid: the others have at most 65,535 blocks.
  const int row_tiles = (x.count + kRows - 1) / kRows, tile = static_cast<int>(blockIdx.x);
  const int first_row = tile % row_tiles * kRows, first_col = tile / row_tiles * kCols<T>;
  tile_values<T, form, kRows, true>(x, first_row, y, first_col, value);
#pragma unroll
  for (int r = 0; r < kRows / kSide; ++r) {
    const int row = first_row + tile_row<kRows>(r);
#pragma unroll
    for (int c = 0; c < kCols<T> / kSide; ++c) {
      const int col = first_col + tile_column<T>(c);
      if (row < x.count && col < y.count) out[row * stride + col] = finish_value(value[r][c], root, false);
    }
  }
}

}  // namespace

template <class T>
void pairwise(TensorView<const T, 2> x, TensorView<const T, 2> y, Metric metric, TensorView<T, 2> out,
              cudaStream_t stream) {
  const int64_t n = x.rows(), m = y.rows(), d = x.cols();
  constexpr int kRows = kTallRows<T, true>;
  const int64_t row_tiles = (n + kRows - 1) / kRows, column_tiles = (m + kCols<T> - 1) / kCols<T>;
  if (n == 0 || m == 0) return;
  // So many tiles that they cannot be counted in 31 bits would be 16 TiB of values, unless there are as many
  // rows.
  if (std::max(n, m) > INT32_MAX - kCols<T> || row_tiles > INT32_MAX / column_tiles) {
    throw std::invalid_argument("x, y: the GPU kernel takes fewer than 2^31 rows each, and 2^31 tiles of " +
                                std::to_string(kRows) + " x " + std::to_string(kCols<T>) + " pairs, got " +
                                std::to_string(n) + " and " + std::to_string(m) +
                                " rows; pass some at a time");
  }
  const bool normalise = metric == Metric::kCosine;
  const bool same = x.data == y.data && n == m && x.stride[0] == y.stride[0] && x.stride[1] == y.stride[1];
  const DeviceBuffer<T> packed_x(n * d, stream), packed_y(same ? 0 : m * d, stream);
  launch_pack(x, normalise, packed_x.data(), nullptr, nullptr, stream);
  if (!same) launch_pack(y, normalise, packed_y.data(), nullptr, nullptr, stream);
  const RowSet<T> rows{packed_x.data(), d, nullptr, static_cast<int>(n)};
  const RowSet<T> columns{same ? packed_x.data() : packed_y.data(), d, nullptr, static_cast<int>(m)};
  const dim3 grid = grid_of(row_tiles * column_tiles);
  const auto run = [&](auto kernel) {
    launch(kernel, {grid, dim3(kThreads), 0, stream}, rows, columns, metric == Metric::kEuclidean, out.data,
           out.stride[0]);
  };
  switch (form_of(metric)) {
    case Form::kProduct:
      return run(tile_of_pairs<T, Form::kProduct>);
    case Form::kSquare:
      return run(tile_of_pairs<T, Form::kSquare>);
    case Form::kAbsolute:
      return run(tile_of_pairs<T, Form::kAbsolute>);
  }
}

cudaError_t find_kernel() {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, tile_of_pairs<float, Form::kProduct>);
}

template void pairwise<float>(TensorView<const float, 2>, TensorView<const float, 2>, Metric,
                              TensorView<float, 2>, cudaStream_t);
template void pairwise<double>(TensorView<const double, 2>, TensorView<const double, 2>, Metric,
                               TensorView<double, 2>, cudaStream_t);

}  // namespace fc::cuda
