// Products of long rows with a few vectors, and the choice of the next pick of a matching pursuit.
//
//   out_vi = g_i . y_v
//                    A warp has 4 rows and up to 12 vectors, and a lane every 32nd column: 48 sums in double
//                    registers, of exact products if the rows are float. A block's 8 warps share the
//                    vectors, 256 columns of them at a time in shared memory as doubles, so that each number
//                    of G is read and converted once. After 4,096 columns the lanes' sums are added up into
//                    a running total. With few rows each such piece has blocks of its own, and a second
//                    kernel adds the pieces up in order.
//   score_i = c_i - sum_p w_p K_pi
//                    A block has 32 rows; each of its 8 warps takes every eighth column K_p of the Gram
//                    matrix, since rows alone are too few threads. The best of each block goes to memory, and
//                    one block finds the best of all, the first of equal ones.
//   b - sum_p w_p g_p
//                    A thread has a column.
//
// Sums have one order each, which for products depends on D alone; there are no atomics.
//
// Cost of products: itemsize * B * D bytes and 2 * B * D operations in double per vector; of scores: 8 * B *
// s bytes for s picks in use. Memory: 8 bytes per piece and product if pieces have blocks of their own, less
// than a hundredth of G.
//
// Rejected: float sums (a Gram matrix squares the condition of the rows); matrix units in double, which need
// operands that are double in memory; the weights' fit on the GPU (each of p steps of a triangular solve
// waits for the one before).
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "cuda/device_buffer.h"
#include "cuda/launch.h"
#include "cuda/pursuit.h"

namespace fc::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kRows = 4;                // of a warp
constexpr int kVectors = 12;            // at a time
constexpr int kTile = kThreads;         // columns of the vectors in shared memory
constexpr int64_t kPiece = 16 * kTile;  // columns whose sum is added up over the lanes
constexpr int64_t kBlockRows = kRows * kWarps;
constexpr int kLines = 32;  // rows of a block of scores
constexpr double kNone = -std::numeric_limits<double>::infinity();

constexpr int64_t parts(int64_t count, int64_t part) { return (count + part - 1) / part; }

Launch over(int64_t blocks, cudaStream_t stream) { return {grid_of(blocks), dim3(kThreads), 0, stream}; }

// ---- products

template <class X, class Y>
struct Products {
  const X* g;
  int64_t stride;
  const int64_t* rows;  // [n], or null for all
  int64_t n, columns;
  const Y* vectors;
  int64_t vector_stride;
  const int64_t *which, *places;  // [count]
  int count;
  int64_t blocks;  // of rows
  bool split;      // one piece per block
  double* out;     // [*, n], or split [pieces, count, n]
};

// The sum of all lanes' values, in every lane.
__device__ double sum_of_lanes(double value) {
#pragma unroll
  for (int delta = 16; delta > 0; delta /= 2) value += __shfl_xor_sync(~0u, value, delta);
  return value;
}

// kCount vectors, or 0 for the row itself.
template <class X, class Y, int kCount>
__global__ void __launch_bounds__(kThreads) multiply(Products<X, Y> p) {
  constexpr int kSums = kCount == 0 ? 1 : kCount;
  FC_SHARED(double, tile, [kSums][kTile]);
  FC_SHARED(double, totals, [kWarps][kRows * kSums]);
  const int t = static_cast<int>(threadIdx.x), warp = t / 32, lane = t % 32;
  const int64_t first = blockIdx.x % p.blocks * kBlockRows + warp * kRows;
  const int64_t pieces = (p.columns + kPiece - 1) / kPiece;
  const int64_t begin = p.split ? blockIdx.x / p.blocks : 0, end = p.split ? begin + 1 : pieces;
  const X* row[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int64_t i = min(first + r, p.n - 1);  // one that exists
    row[r] = p.g + (p.rows == nullptr ? i : p.rows[i]) * p.stride;
  }
  // A total is read and written by one lane.
  for (int i = lane; i < kRows * kSums; i += 32) totals[warp][i] = 0;
  for (int64_t piece = begin; piece < end; ++piece) {
    double sum[kRows][kSums] = {};
    const int64_t last = min((piece + 1) * kPiece, p.columns);
    for (int64_t from = piece * kPiece; from < last; from += kTile) {
      if constexpr (kCount > 0) {
        __syncthreads();  // the tile before has been read
#pragma unroll
        for (int v = 0; v < kCount; ++v) {
          tile[v][t] = v < p.count && from + t < last
                           ? static_cast<double>(p.vectors[p.which[v] * p.vector_stride + from + t])
                           : 0.0;
        }
        __syncthreads();
      }
#pragma unroll 4
      for (int k = lane; k < kTile; k += 32) {
        double x[kRows];
#pragma unroll
        for (int r = 0; r < kRows; ++r) x[r] = from + k < last ? static_cast<double>(row[r][from + k]) : 0.0;
#pragma unroll
        for (int v = 0; v < kSums; ++v) {
#pragma unroll
          for (int r = 0; r < kRows; ++r)
            sum[r][v] = __fma_rn(x[r], kCount == 0 ? x[r] : tile[v][k], sum[r][v]);
        }
      }
    }
#pragma unroll
    for (int v = 0; v < kSums; ++v) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const double whole = sum_of_lanes(sum[r][v]);
        if (lane == (v * kRows + r) % 32) totals[warp][v * kRows + r] += whole;
      }
    }
  }
  for (int i = lane; i < kRows * kSums; i += 32) {
    const int v = i / kRows;
    const int64_t own = first + i % kRows;
    if (v >= p.count || own >= p.n) continue;
    const int64_t place = p.split ? begin * p.count + v : p.places[v];
    p.out[place * p.n + own] = totals[warp][i];
  }
}

__global__ void __launch_bounds__(kThreads) add_pieces(const double* sums, int64_t pieces, int64_t count,
                                                       int64_t n, const int64_t* places, double* out) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x, size = count * n;
  if (at >= size) return;
  double total = 0;
#pragma unroll 8
  for (int64_t piece = 0; piece < pieces; ++piece) total += sums[piece * size + at];
  out[places[at / n] * n + at % n] = total;
}

template <int kCount, class X, class Y>
void launch_products(Products<X, Y> p, cudaStream_t stream, int64_t few_blocks) {
  const int64_t pieces = parts(p.columns, kPiece);
  p.blocks = parts(p.n, kBlockRows);
  p.split = pieces > 1 && p.blocks < few_blocks;
  double* const out = p.out;
  const int64_t size = p.count * p.n;
  const DeviceBuffer<double> sums(p.split ? checked_mul(pieces, size) : 0, stream);
  if (p.split) p.out = sums.data();
  launch(multiply<X, Y, kCount>, over(p.blocks * (p.split ? pieces : 1), stream), p);
  if (p.split)
    launch(add_pieces, over(parts(size, kThreads), stream), sums.data(), pieces, p.count, p.n, p.places, out);
}

// ---- the best row

struct Best {
  double score;
  int64_t row;

  __device__ void take(double other, int64_t other_row) {
    if (other > score || (other == score && other_row < row)) {
      score = other;
      row = other_row;
    }
  }
};

// The best of all lanes', in lane 0.
__device__ Best best_of_lanes(Best best) {
#pragma unroll
  for (int delta = 16; delta > 0; delta /= 2) {
    const double score = __shfl_down_sync(~0u, best.score, delta);
    const auto row = static_cast<int64_t>(__shfl_down_sync(~0u, static_cast<long long>(best.row), delta));
    best.take(score, row);
  }
  return best;
}

struct Scores {
  const double *start, *gram;
  const int64_t* slots;
  const double *numbers, *norm;
  int64_t n, count;
  bool magnitude;
  double* scores;
  double* best;       // [blocks]
  int64_t* best_row;  // [blocks]
};

__global__ void __launch_bounds__(kThreads) score_rows(Scores s) {
  FC_SHARED(double, part, [kWarps][kLines]);
  const int t = static_cast<int>(threadIdx.x), warp = t / 32, lane = t % 32;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kLines + lane;
  double sum = 0;
  if (i < s.n) {
#pragma unroll 4
    for (int64_t p = warp; p < s.count; p += kWarps) {
      const double weight = s.numbers[p];
      if (weight != 0) sum = __fma_rn(weight, s.gram[s.slots[p] * s.n + i], sum);
    }
  }
  part[warp][lane] = sum;
  __syncthreads();
  if (warp != 0) return;
  Best best{kNone, std::numeric_limits<int64_t>::max()};
  if (i < s.n) {
    sum = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += part[w][lane];
    const double rest = s.start[i] - sum, score = s.magnitude ? fabs(rest) : rest;
    best = {score > s.numbers[s.count] * s.norm[i] ? score : kNone, i};
    s.scores[i] = best.score;
  }
  best = best_of_lanes(best);
  if (lane == 0) {
    s.best[blockIdx.x] = best.score;
    s.best_row[blockIdx.x] = best.row;
  }
}

// One block.
__global__ void __launch_bounds__(kThreads)
    find_best(const double* scores, const int64_t* rows, int64_t count, double* found) {
  FC_SHARED(double, score_of, [kWarps]);
  FC_SHARED(int64_t, row_of, [kWarps]);
  const int t = static_cast<int>(threadIdx.x), warp = t / 32, lane = t % 32;
  Best best{kNone, std::numeric_limits<int64_t>::max()};
  for (int64_t i = t; i < count; i += kThreads) best.take(scores[i], rows[i]);
  best = best_of_lanes(best);
  if (lane == 0) {
    score_of[warp] = best.score;
    row_of[warp] = best.row;
  }
  __syncthreads();
  if (t != 0) return;
  for (int w = 1; w < kWarps; ++w) best.take(score_of[w], row_of[w]);
  found[0] = best.score;
  found[1] = static_cast<double>(best.row);
}

// ---- the residual

template <class X>
__global__ void __launch_bounds__(kThreads)
    subtract_rows(const X* g, int64_t stride, const double* target, const int64_t* rows,
                  const double* weights, int64_t count, int64_t columns, double* out) {
  const int64_t k = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (k >= columns) return;
  double left = target[k];
#pragma unroll 4
  for (int64_t p = 0; p < count; ++p)
    left = __fma_rn(-weights[p], static_cast<double>(g[rows[p] * stride + k]), left);
  out[k] = left;
}

}  // namespace

template <class X, class Y>
void products(TensorView<const X, 2> g, TensorView<const int64_t, 1> rows, TensorView<const Y, 2> vectors,
              TensorView<const int64_t, 1> which, TensorView<const int64_t, 1> places,
              TensorView<double, 2> out, cudaStream_t stream, int64_t few_blocks) {
  Products<X, Y> p{};
  p.g = g.data;
  p.stride = g.stride[0];
  p.rows = rows.data;
  p.n = rows.data == nullptr ? g.rows() : rows.size();
  p.columns = g.cols();
  p.vectors = vectors.data;
  p.vector_stride = vectors.stride[0];
  p.out = out.data;
  for (int64_t first = 0; first < which.size(); first += kVectors) {
    p.which = which.data + first;
    p.places = places.data + first;
    p.count = static_cast<int>(std::min<int64_t>(kVectors, which.size() - first));
    if (p.count == 1) {
      launch_products<1>(p, stream, few_blocks);
    } else {
      launch_products<kVectors>(p, stream, few_blocks);
    }
  }
}

template <class X>
void squares(TensorView<const X, 2> g, TensorView<double, 1> out, cudaStream_t stream, int64_t few_blocks) {
  // One row of `out`, whose number is in device memory as the other numbers are.
  const DeviceBuffer<int64_t> place(1, stream);
  check(cudaMemsetAsync(place.data(), 0, sizeof(int64_t), stream), "clearing device memory");
  Products<X, X> p{};
  p.g = g.data;
  p.stride = g.stride[0];
  p.n = g.rows();
  p.columns = g.cols();
  p.places = place.data();
  p.count = 1;
  p.out = out.data;
  launch_products<0>(p, stream, few_blocks);
}

void best_row(const Correlations& c, TensorView<double, 1> scores, TensorView<double, 1> found,
              cudaStream_t stream) {
  const int64_t n = scores.size(), blocks = parts(n, kLines);
  const DeviceBuffer<double> best(blocks, stream);
  const DeviceBuffer<int64_t> rows(blocks, stream);
  launch(score_rows, over(blocks, stream),
         Scores{c.start.data, c.gram.data, c.slots.data, c.numbers.data, c.norm.data, n, c.slots.size(),
                c.magnitude, scores.data, best.data(), rows.data()});
  launch(find_best, over(1, stream), best.data(), rows.data(), blocks, found.data);
}

template <class X>
void residual(TensorView<const X, 2> g, TensorView<const double, 1> target, TensorView<const int64_t, 1> rows,
              TensorView<const double, 1> weights, TensorView<double, 1> out, cudaStream_t stream) {
  launch(subtract_rows<X>, over(parts(g.cols(), kThreads), stream), g.data, g.stride[0], target.data,
         rows.data, weights.data, rows.size(), g.cols(), out.data);
}

#define FC_PRODUCTS(X, Y)                                                                                    \
  template void products<X, Y>(TensorView<const X, 2>, TensorView<const int64_t, 1>, TensorView<const Y, 2>, \
                               TensorView<const int64_t, 1>, TensorView<const int64_t, 1>,                   \
                               TensorView<double, 2>, cudaStream_t, int64_t);
#define FC_INSTANTIATE(X)                                                                         \
  template void squares<X>(TensorView<const X, 2>, TensorView<double, 1>, cudaStream_t, int64_t); \
  template void residual<X>(TensorView<const X, 2>, TensorView<const double, 1>,                  \
                            TensorView<const int64_t, 1>, TensorView<const double, 1>,            \
                            TensorView<double, 1>, cudaStream_t);
FC_PRODUCTS(float, float)
FC_PRODUCTS(float, double)
FC_PRODUCTS(double, double)
FC_INSTANTIATE(float)
FC_INSTANTIATE(double)
#undef FC_PRODUCTS
#undef FC_INSTANTIATE

}  // namespace fc::cuda
