// The one routine that computes every similarity and distance.
//
// A pair's value is a chain over the features 0, 1, ..., d-1 with one accumulator,
//   product   acc = fma(a_k, b_k, acc)          (dot, cosine)
//   square    acc = fma(a_k - b_k, a_k - b_k, acc)   (sqeuclidean, euclidean)
//   absolute  acc = acc + |a_k - b_k|           (l1)
// restarted every kChain features, the partial results added in order. So a value has the same bits in
// whatever tile or batch it is computed, the same for (a, b) and (b, a), and its rounding error grows with
// the number of chains, not with d. A library matrix product promises none of this. Distances are formed from
// differences: |a|^2 + |b|^2 - 2ab cancels for near points, and a duplicate would not be at distance 0.
//
// Cost per tile: kRows x kCols x d multiply-adds (l1: a subtraction, an and, an addition for each) from
// registers, kCols * d + kRows * d loads. Rejected: chains outermost, so that a chain's part of the panel
// stays in the first-level cache for all tiles that share it: measured slower at d = 2,560 (the prefetcher
// hides the second level, the partial tiles cost stores).
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "core/metric.h"
#include "core/simd.h"

namespace fc {

template <class T>
struct Tile {
  static constexpr int kRows = simd::kTileRows;
  static constexpr int kVectors = 2;
  static constexpr int kCols = kVectors * simd::kWidth<T>;
  static constexpr int kChain = 256;
};

// out [kRowsUsed, kCols] = the pairs' values; a [d, kRows] and b [d, kCols] are packed panels (see pack.h).
template <class T, Form form, int kRowsUsed>
inline void tile(const T* __restrict a, const T* __restrict b, int64_t d, T* __restrict out) {
  using V = simd::Vec<T>;
  constexpr int kRows = Tile<T>::kRows, kVectors = Tile<T>::kVectors, kWidth = simd::kWidth<T>,
                kCols = Tile<T>::kCols;
  for (int64_t begin = 0; begin == 0 || begin < d; begin += Tile<T>::kChain) {
    const int64_t end = begin + Tile<T>::kChain < d ? begin + Tile<T>::kChain : d;
    V acc[kRowsUsed][kVectors] = {};
    for (int64_t k = begin; k < end; ++k) {
      V bk[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) bk[v] = simd::load(b + k * kCols + v * kWidth);
#pragma GCC unroll 16
      for (int r = 0; r < kRowsUsed; ++r) {
        const V ak = simd::broadcast(a[k * kRows + r]);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
          if constexpr (form == Form::kProduct) {
            acc[r][v] = simd::fma<T>(ak, bk[v], acc[r][v]);
          } else if constexpr (form == Form::kSquare) {
            const V t = ak - bk[v];
            acc[r][v] = simd::fma<T>(t, t, acc[r][v]);
          } else {
            acc[r][v] = acc[r][v] + simd::abs<T>(simd::difference<T>(ak, bk[v]));
          }
        }
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRowsUsed; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        T* place = out + r * kCols + v * kWidth;
        simd::store(place, begin == 0 ? acc[r][v] : simd::load(place) + acc[r][v]);
      }
    }
  }
}

// The same for at least the first `rows` rows of a: a single row (a pick against all clients) takes a shorter
// path.
template <class T, Form form>
inline void tile_rows(int64_t rows, const T* a, const T* b, int64_t d, T* out) {
  constexpr int kAtOnce = form == Form::kProduct ? Tile<T>::kRows : simd::kDistanceRows;
  if (rows == 1) return tile<T, form, 1>(a, b, d, out);
  for (int first = 0; first < Tile<T>::kRows && first < rows; first += kAtOnce) {
    tile<T, form, kAtOnce>(a + first, b, d, out + first * Tile<T>::kCols);
  }
}

// Calls fn with the tile form of `metric` as a compile-time constant.
template <class Fn>
void with_form(Metric metric, Fn&& fn) {
  switch (form_of(metric)) {
    case Form::kProduct:
      return fn(std::integral_constant<Form, Form::kProduct>{});
    case Form::kSquare:
      return fn(std::integral_constant<Form, Form::kSquare>{});
    case Form::kAbsolute:
      return fn(std::integral_constant<Form, Form::kAbsolute>{});
  }
}

// Turns the value that the tile routine accumulated into the metric's value times `sign`: +1 for the value
// itself, -1 to see a distance as a similarity. (`count` values in place.)
template <class T>
inline void finish_values(Metric metric, bool negate, T* __restrict values, int64_t count) {
  if (metric == Metric::kEuclidean) {
    for (int64_t i = 0; i < count; ++i) values[i] = std::sqrt(values[i]);
  }
  if (negate) {
    for (int64_t i = 0; i < count; ++i) values[i] = -values[i];
  }
}

}  // namespace fc
