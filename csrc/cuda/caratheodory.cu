// sums_rj = sum of w_i (1, shrink x_ij - c_j) over the rows i of run r, and the rows that are left when runs
// are dropped.
//
//   sum_pieces  A block has a piece of a run and some columns (a power of two, 32 at most). Each thread
//               takes a column and every so-manieth row; the sums are added up in shared memory as a tree.
//   add_pieces  A thread adds up the pieces of a run's column, in order.
//   gather      A thread has a row of a run that is kept. Runs are kept or dropped whole, so the host knows
//               where each goes: no counting, no atomics.
//
// All sums are double. A piece has 256 rows, or as many as make 2^13 pieces of all rows, which is enough to
// keep every multiprocessor busy: the order of sums depends on the number of rows and columns and on `size`,
// not on strides. A NaN or infinity in a row makes its run's sums not finite even if its weight is 0.
//
// Cost: a conversion, a subtraction and a fused multiply-add per number, all in double; bytes: x once, and
// one row of partial sums per 256 rows. Memory: these partial sums.
//
// Rejected: float sums that are corrected afterwards (there is nothing to correct them with but the rows);
// atomic additions (their order changes); a round without the host (the elimination is sequential, D^3
// operations on a matrix that one core has in its cache).
#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "cuda/caratheodory.h"
#include "cuda/device_buffer.h"
#include "cuda/launch.h"

namespace fc::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kPieceRows = 256;
constexpr int64_t kPieces = int64_t{1} << 13;

__device__ __forceinline__ double widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ double widen(__half x) { return __half2float(x); }
__device__ __forceinline__ double widen(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class X>
using OnDevice = std::conditional_t<std::is_same_v<X, Half>, __half,
                                    std::conditional_t<std::is_same_v<X, BFloat16>, __nv_bfloat16, X>>;

constexpr int64_t parts(int64_t count, int64_t part) { return (count + part - 1) / part; }

template <class X>
struct Matrix {
  const X* data;  // [n, d]
  int64_t d, stride, step;
};

// How a run is cut.
struct Cut {
  int64_t rows;    // of a piece
  int64_t pieces;  // of a run
  int64_t tiles;   // of columns
  int width;       // of a tile
};

// Four blocks per multiprocessor are enough to hide loads; ptxas would go for six on sm_100, and spill.
template <class X>
__global__ void __launch_bounds__(kThreads, 4)
    sum_pieces(Matrix<X> x, Runs runs, const double* centre, double shrink, Cut cut, double* out) {
  FC_SHARED(double, part, [kThreads]);
  FC_SHARED(double, weight_part, [kThreads]);
  const int64_t tile = blockIdx.x % cut.tiles, piece = blockIdx.x / cut.tiles;
  const int t = static_cast<int>(threadIdx.x), column = t % cut.width, lane = t / cut.width;
  const int lanes = kThreads / cut.width;
  const int64_t j = tile * cut.width + column;
  const int64_t begin = piece / cut.pieces * runs.size, first = begin + piece % cut.pieces * cut.rows;
  const int64_t last = min(min(begin + runs.size, runs.count), first + cut.rows);
  const bool inside = j < x.d;
  const double c = inside ? centre[j] : 0;
  const X* const own = x.data + (inside ? j : 0) * x.step;
  double total = 0, weight = 0;
#pragma unroll 4
  for (int64_t r = first + lane; r < last; r += lanes) {
    const int64_t row = runs.rows != nullptr ? runs.rows[r] : r;
    const double w = runs.weights != nullptr ? runs.weights[r] : 1.0;
    weight += w;
    total = __fma_rn(w, widen(own[row * x.stride]) * shrink - c, total);
  }
  part[t] = total;
  weight_part[t] = weight;
  __syncthreads();
  for (int half = lanes / 2; half > 0; half /= 2) {
    if (lane < half) {
      part[t] += part[t + half * cut.width];
      weight_part[t] += weight_part[t + half * cut.width];
    }
    __syncthreads();
  }
  if (lane > 0 || !inside) return;
  out[piece * (1 + x.d) + 1 + j] = part[t];
  if (j == 0) out[piece * (1 + x.d)] = weight_part[t];
}

__global__ void __launch_bounds__(kThreads)
    add_pieces(const double* partial, int64_t pieces, int64_t columns, int64_t runs, double* sums) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (at >= runs * columns) return;
  const double* const own = partial + at / columns * pieces * columns + at % columns;
  double total = 0;
  for (int64_t piece = 0; piece < pieces; ++piece) total += own[piece * columns];
  sums[at] = total;
}

__global__ void __launch_bounds__(kThreads) gather(Runs runs, const int64_t* kept, const double* factors,
                                                   int64_t count, int64_t* new_rows, double* new_weights) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (at >= count) return;
  const int64_t run = at / runs.size, r = kept[run] * runs.size + at % runs.size;
  new_rows[at] = runs.rows != nullptr ? runs.rows[r] : r;
  new_weights[at] = (runs.weights != nullptr ? runs.weights[r] : 1.0) * factors[run];
}

Launch over(int64_t blocks, cudaStream_t stream) { return {grid_of(blocks), dim3(kThreads), 0, stream}; }

}  // namespace

template <class X>
void sum_runs(TensorView<const X, 2> x, const Runs& runs, const double* centre, double shrink,
              TensorView<double, 2> sums, cudaStream_t stream) {
  const int64_t d = x.cols(), count = sums.rows();
  Cut cut;
  cut.width = 1;
  while (cut.width < d && cut.width < 32) cut.width *= 2;
  cut.tiles = parts(d, cut.width);
  cut.rows = kPieceRows * parts(runs.count, kPieceRows * kPieces);
  cut.pieces = parts(runs.size, cut.rows);
  const Matrix<OnDevice<X>> matrix{reinterpret_cast<const OnDevice<X>*>(x.data), d, x.stride[0], x.stride[1]};
  const DeviceBuffer<double> partial(cut.pieces > 1 ? checked_mul(count, cut.pieces, 1 + d) : 0, stream);
  launch(sum_pieces<OnDevice<X>>, over(count * cut.pieces * cut.tiles, stream), matrix, runs, centre, shrink,
         cut, cut.pieces > 1 ? partial.data() : sums.data);
  if (cut.pieces == 1) return;
  launch(add_pieces, over(parts(count * (1 + d), kThreads), stream), partial.data(), cut.pieces, 1 + d, count,
         sums.data);
}

void keep_runs(const Runs& runs, const int64_t* kept, const double* factors, int64_t count, int64_t* new_rows,
               double* new_weights, cudaStream_t stream) {
  launch(gather, over(parts(count, kThreads), stream), runs, kept, factors, count, new_rows, new_weights);
}

#define FC_INSTANTIATE(X)                                                               \
  template void sum_runs<X>(TensorView<const X, 2>, const Runs&, const double*, double, \
                            TensorView<double, 2>, cudaStream_t);
FC_INSTANTIATE(float)
FC_INSTANTIATE(double)
FC_INSTANTIATE(Half)
FC_INSTANTIATE(BFloat16)
#undef FC_INSTANTIATE

}  // namespace fc::cuda
