// Values of a tile of pairs on the GPU: the same chain of operations for a pair as on the CPU (cpu/tile.h),
//   product   acc = fma(a_k, b_k, acc)                (dot, cosine)
//   square    acc = fma(a_k - b_k, a_k - b_k, acc)    (sqeuclidean, euclidean)
//   absolute  acc = acc + |a_k - b_k|                 (l1)
// restarted every kChain features, the partial results added in order. So a pair has one value, whatever
// tile, list or backend with fused multiply-add computes it. The arithmetic is float32 (or float64)
// throughout: no TF32.
//
// 256 threads form a 16 x 16 grid over the tile; each keeps kRows/16 x kCols/16 accumulators. kDepth features
// of both sides are staged in shared memory at a time, the next ones already on their way in registers.
//
// Cost: kRows * kCols * d multiply-adds, (kRows + kCols) * d values read from the second-level cache.
// Rejected: tensor cores, which multiply float32 only as TF32 (10 bits of significand), or as three such
// products.
#pragma once

#include <type_traits>

#include "core/metric.h"
#include "cuda/runtime.h"

namespace fc::cuda {

inline constexpr int kThreads = 256;
inline constexpr int kSide = 16;   // threads along either side of a tile
inline constexpr int kDepth = 16;  // features staged at a time
inline constexpr int kChain = 256;

template <class T>
inline constexpr int kCols = sizeof(T) == 4 ? 128 : 64;

// Rows of the tall tile. Long chains need a second set of accumulators, so the tile has half of the rows.
template <class T, bool kChained>
inline constexpr int kTallRows = kCols<T> / (kChained ? 2 : 1);

// Rows of the flat tile, for a few candidates against all clients.
inline constexpr int kFlatRows = kSide;

// Rows of a compact [*, d] array, all of them in order or those of a list.
template <class T>
struct RowSet {
  const T* data = nullptr;
  int64_t d = 0;
  const int* list = nullptr;  // null: row r is r
  int count = 0;

  __device__ int index(int r) const { return list == nullptr ? r : list[r]; }
};

// The tile's column (0 .. kCols-1) of a thread's c-th accumulator: four neighbours (two in float64) and then
// a stride, so that a quarter of a warp reads 128 consecutive bytes.
template <class T>
__device__ __forceinline__ int tile_column(int c, int lane) {
  constexpr int kTogether = 16 / static_cast<int>(sizeof(T));
  return c / kTogether * (kSide * kTogether) + lane * kTogether + c % kTogether;
}
template <class T>
__device__ __forceinline__ int tile_column(int c) {
  return tile_column<T>(c, static_cast<int>(threadIdx.x % kSide));
}

template <int kRows>
__device__ __forceinline__ int tile_row(int r) {
  return static_cast<int>(threadIdx.x / kSide) * (kRows / kSide) + r;
}

__device__ __forceinline__ float fused(float a, float b, float c) { return __fmaf_rn(a, b, c); }
__device__ __forceinline__ double fused(double a, double b, double c) { return __fma_rn(a, b, c); }

template <Form form, class T>
__device__ __forceinline__ T accumulate(T a, T b, T sum) {
  if constexpr (form == Form::kProduct) {
    return fused(a, b, sum);
  } else if constexpr (form == Form::kSquare) {
    return fused(a - b, a - b, sum);
  } else {
    return sum + static_cast<T>(fabs(a - b));
  }
}

// The common part of a kernel's tall tile and its flat one.
template <class T>
using Staged = T[kDepth][kCols<T> + 16 / static_cast<int>(sizeof(T))];
template <class T>
__device__ __forceinline__ Staged<T>& staged_columns() {
  FC_SHARED(T, columns, [kDepth][kCols<T> + 16 / static_cast<int>(sizeof(T))]);
  return columns;
}

// value[r][c] of this thread: rows first_row + tile_row(r) of `a` against rows first_col + tile_column(c) of
// `b`. Rows beyond the sets are zeros. All threads of the block take part. with_form(fn) calls fn with the
// form as a constant, which it knows or, the same for all threads, finds out once per kDepth features.
// kStored: where the sums of the chains before the running one are kept, in shared memory or in registers.
template <class T, int kRows, bool kChained, bool kStored, class WithForm>
__device__ void tile_values_of(const RowSet<T>& a, int first_row, const RowSet<T>& b, int first_col,
                               T (&value)[kRows / kSide][kCols<T> / kSide], WithForm&& with_form) {
  constexpr int kR = kRows / kSide, kC = kCols<T> / kSide, kPad = 16 / static_cast<int>(sizeof(T));
  constexpr int kLoadsA = kRows * kDepth / kThreads, kLoadsB = kCols<T> * kDepth / kThreads;
  FC_SHARED(T, a_part, [kDepth][kRows + kPad]);
  auto& b_part = staged_columns<T>();
  // Read and written by one thread each, once in kChain features.
  FC_SHARED(T, chains, [kStored ? kR * kC : 1][kStored ? kThreads : 1]);
  const int k_own = static_cast<int>(threadIdx.x) % kDepth, row_own = static_cast<int>(threadIdx.x) / kDepth;
  constexpr int kRowsAtOnce = kThreads / kDepth;

  const T* a_row[kLoadsA];
  const T* b_row[kLoadsB];
#pragma unroll
  for (int l = 0; l < kLoadsA; ++l) {
    const int r = first_row + l * kRowsAtOnce + row_own;
    a_row[l] = r < a.count ? a.data + a.index(r) * a.d : nullptr;
  }
#pragma unroll
  for (int l = 0; l < kLoadsB; ++l) {
    const int r = first_col + l * kRowsAtOnce + row_own;
    b_row[l] = r < b.count ? b.data + b.index(r) * b.d : nullptr;
  }
  T a_next[kLoadsA], b_next[kLoadsB];
  const auto fetch = [&](int64_t k) {
#pragma unroll
    for (int l = 0; l < kLoadsA; ++l) a_next[l] = a_row[l] != nullptr && k < a.d ? a_row[l][k] : T(0);
#pragma unroll
    for (int l = 0; l < kLoadsB; ++l) b_next[l] = b_row[l] != nullptr && k < b.d ? b_row[l][k] : T(0);
  };

  T sum[kR][kC] = {};
  bool first_chain = true;
  fetch(k_own);
  for (int64_t begin = 0; begin < a.d; begin += kDepth) {
    __syncthreads();  // everyone is done with what the last round staged
#pragma unroll
    for (int l = 0; l < kLoadsA; ++l) a_part[k_own][l * kRowsAtOnce + row_own] = a_next[l];
#pragma unroll
    for (int l = 0; l < kLoadsB; ++l) b_part[k_own][l * kRowsAtOnce + row_own] = b_next[l];
    __syncthreads();
    fetch(begin + kDepth + k_own);
    // Features beyond d are zeros on both sides, which change nothing in any form.
    with_form([&](auto form) {
#pragma unroll
      for (int k = 0; k < kDepth; ++k) {
        T av[kR], bv[kC];
#pragma unroll
        for (int r = 0; r < kR; ++r) av[r] = a_part[k][tile_row<kRows>(r)];
#pragma unroll
        for (int c = 0; c < kC; ++c) bv[c] = b_part[k][tile_column<T>(c)];
#pragma unroll
        for (int r = 0; r < kR; ++r) {
#pragma unroll
          for (int c = 0; c < kC; ++c) sum[r][c] = accumulate<form()>(av[r], bv[c], sum[r][c]);
        }
      }
    });
    const bool last = begin + kDepth >= a.d, chain_ends = (begin + kDepth) % kChain == 0 || last;
    if (!kChained || !chain_ends) continue;
#pragma unroll
    for (int r = 0; r < kR; ++r) {
#pragma unroll
      for (int c = 0; c < kC; ++c) {
        T& before = kStored ? chains[kStored ? r * kC + c : 0][kStored ? threadIdx.x : 0] : value[r][c];
        const T total = first_chain ? sum[r][c] : before + sum[r][c];
        if (last) {
          sum[r][c] = total;
        } else {
          before = total;
          sum[r][c] = T(0);
        }
      }
    }
    first_chain = false;
  }
#pragma unroll
  for (int r = 0; r < kR; ++r) {
#pragma unroll
    for (int c = 0; c < kC; ++c) value[r][c] = sum[r][c];
  }
}

template <class T, Form form, int kRows, bool kChained>
__device__ void tile_values(const RowSet<T>& a, int first_row, const RowSet<T>& b, int first_col,
                            T (&value)[kRows / kSide][kCols<T> / kSide]) {
  // A thread with several rows would lack the registers.
  constexpr bool kStored = kChained && kRows > kSide;
  tile_values_of<T, kRows, kChained, kStored>(a, first_row, b, first_col, value,
                                              [](auto fn) { fn(std::integral_constant<Form, form>{}); });
}

// The metric's value as a similarity: the root if the metric has one, the sign turned for distances.
template <class T>
__device__ __forceinline__ T finish_value(T value, bool root, bool negate) {
  if (root) value = static_cast<T>(sqrt(value));
  return negate ? -value : value;
}

}  // namespace fc::cuda
