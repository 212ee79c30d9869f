// The costs C [n, m] of one Sinkhorn problem, a tile at a time: read from a matrix or computed from points.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/sinkhorn_schedule.h"
#include "cpu/pack.h"
#include "cpu/sinkhorn.h"
#include "cpu/tile.h"

namespace fc {

// Rows and columns that are made at once: a multiple of every tile's rows and columns, 12 KB.
inline constexpr int64_t kCostRows = 24;
template <class T>
inline constexpr int64_t kCostColumns = 512 / static_cast<int64_t>(sizeof(T));

template <class T>
class CostTiles {
 public:
  // `forbidden`: whether check() found costs that are +infinite.
  CostTiles(const SinkhornBatch<T>& batch, int64_t p, bool forbidden, ThreadTeam& team)
      : n_(batch.rows(p)),
        m_(batch.columns(p)),
        cosine_(batch.cosine),
        forbidden_(forbidden),
        metric_(batch.metric) {
    const TensorView<const T, 2> x = problem(batch.x, p, n_, batch.is_cost ? m_ : batch.x.shape[2]);
    if (batch.is_cost) {
      matrix_ = x;
      return;
    }
    static_assert(kCostRows % Tile<T>::kRows == 0 && kCostColumns<T> % Tile<T>::kCols == 0,
                  "blocks must end on tile borders");
    const TensorView<const T, 2> y = problem(batch.y, p, m_, batch.y.shape[2]);
    columns_ = Panels<T>::pack(y, cosine_, "y", team);
    const int64_t d = x.shape[1];
    packed_ = Buffer<T>(round_up(n_, kCostRows) * d);
    Buffer<RowScale> scales(cosine_ ? n_ : 0);
    std::vector<int64_t> index(n_);
    std::iota(index.begin(), index.end(), int64_t{0});
    Rows<T> rows;
    rows.view = x;
    if (cosine_) rows.scale = scales.data();
    team.parallel_for((n_ + kCostRows - 1) / kCostRows, 4, [&](int, int64_t begin, int64_t end) {
      const int64_t first = begin * kCostRows, last = std::min(n_, end * kCostRows);
      if (cosine_) {
        for (int64_t i = first; i < last; ++i) scales[i] = RowScale::of(x, i);
      }
      rows.pack_batch(index.data() + first, last - first, packed_.data() + first * d);
    });
    spread_ = bound(x, y);
  }

  // Throws std::invalid_argument for NaN and infinity in problem p, but for pairs that are forbidden by costs
  // of +infinity: returns whether there are any.
  static bool check(const SinkhornBatch<T>& batch, int64_t p) {
    const int64_t n = batch.rows(p), m = batch.columns(p);
    bool forbidden = false;
    const auto check_rows = [&](const TensorView<const T, 3>& all, int64_t rows, int64_t columns,
                                const char* name) {
      const TensorView<const T, 2> view = problem(all, p, rows, columns);
      try {
        for (int64_t i = 0; i < rows; ++i) {
          if (batch.is_cost && is_finite(view, i)) continue;
          for (int64_t j = 0; batch.is_cost && j < columns; ++j) {
            if (view(i, j) == std::numeric_limits<T>::infinity()) {
              forbidden = true;
            } else {
              require_finite(view(i, j), name, i, j);
            }
          }
          if (!batch.is_cost) Panels<T>::check_row(view, i, name);
        }
      } catch (const std::invalid_argument& error) {
        if (batch.count() == 1) throw;
        throw std::invalid_argument(std::string(error.what()) + " of problem " + std::to_string(p));
      }
    };
    check_rows(batch.x, n, batch.is_cost ? m : batch.x.shape[2], "x");
    if (!batch.is_cost) check_rows(batch.y, m, batch.y.shape[2], "y");
    return forbidden;
  }

  bool forbidden() const { return forbidden_; }
  int64_t rows() const { return n_; }
  int64_t columns() const { return m_; }

  // A bound of the range of the costs.
  double spread() const {
    if (matrix_.data == nullptr) return spread_;
    if (forbidden_) return spread_of_finite();
    using V = simd::Vec<T>;
    constexpr int kW = simd::kWidth<T>;
    T least = matrix_(0, 0), most = least;
    V low = simd::broadcast(least), high = low;
    for (int64_t i = 0; i < n_; ++i) {
      int64_t j = 0;
      for (; matrix_.has_contiguous_rows() && j + kW <= m_; j += kW) {
        const V v = simd::load(matrix_.row(i) + j);
        low = v < low ? v : low;
        high = v > high ? v : high;
      }
      for (; j < m_; ++j) {
        least = std::min(least, matrix_(i, j));
        most = std::max(most, matrix_(i, j));
      }
    }
    for (int l = 0; l < kW; ++l) {
      least = std::min<T>(least, low[l]);
      most = std::max<T>(most, high[l]);
    }
    return static_cast<double>(most) - static_cast<double>(least);
  }

  // The costs of rows [first, first + count) and columns [begin, begin + width), where `first` and `begin`
  // are multiples of kCostRows and kCostColumns and `width` goes to the end of a vector: a pointer to them
  // and, in `stride`, the distance between rows. Columns beyond m are finite. `room` [kCostRows *
  // kCostColumns] may be used.
  const T* tile(int64_t first, int64_t count, int64_t begin, int64_t width, T* room, int64_t& stride) const {
    stride = kCostColumns<T>;
    if (matrix_.data != nullptr) return from_matrix(first, count, begin, width, room, stride);
    const int64_t d = columns_.features();
    with_form(cosine_ ? Metric::kCosine : metric_, [&](auto form) {
      constexpr int kRows = Tile<T>::kRows, kCols = Tile<T>::kCols;
      alignas(64) T values[kRows * kCols];
      for (int64_t c = 0; c < width; c += kCols) {
        if (begin + c >= m_) break;
        for (int64_t r = 0; r < count; r += kRows) {
          const int64_t here = std::min<int64_t>(kRows, count - r);
          tile_rows<T, form()>(here, packed_.data() + (first + r) * d, columns_.panel((begin + c) / kCols), d,
                               values);
          finish_values(metric_, false, values, here * kCols);
          for (int64_t i = 0; i < here; ++i)
            std::copy(values + i * kCols, values + (i + 1) * kCols, room + (r + i) * stride + c);
        }
      }
      if (cosine_) {
        for (int64_t r = 0; r < count; ++r) {
          for (int64_t c = 0; c < width; ++c) room[r * stride + c] = 1 - room[r * stride + c];
        }
      }
    });
    return room;
  }

 private:
  static bool is_finite(const TensorView<const T, 2>& view, int64_t row) {
    T sum = 0;  // v - v is 0 for finite values and NaN otherwise
    simd::Vec<T> sums{};
    int64_t k = 0;
    for (; view.has_contiguous_rows() && k + simd::kWidth<T> <= view.shape[1]; k += simd::kWidth<T>) {
      const auto v = simd::load(view.row(row) + k);
      sums += v - v;
    }
    for (; k < view.shape[1]; ++k) sum += view(row, k) - view(row, k);
    for (int i = 0; i < simd::kWidth<T>; ++i) sum += sums[i];
    return sum == 0;
  }

  double spread_of_finite() const {
    double least = HUGE_VAL, most = -HUGE_VAL;
    for (int64_t i = 0; i < n_; ++i) {
      for (int64_t j = 0; j < m_; ++j) {
        const double cost = static_cast<double>(matrix_(i, j));
        if (!(cost < HUGE_VAL)) continue;
        least = std::min(least, cost);
        most = std::max(most, cost);
      }
    }
    return most >= least ? most - least : 0.0;
  }

  // Problem p of [B, rows, columns], up to its own size.
  static TensorView<const T, 2> problem(const TensorView<const T, 3>& all, int64_t p, int64_t rows,
                                        int64_t columns) {
    return {all.data + p * all.stride[0], {rows, columns}, {all.stride[1], all.stride[2]}};
  }

  const T* from_matrix(int64_t first, int64_t count, int64_t begin, int64_t width, T* room,
                       int64_t& stride) const {
    if (!forbidden_ && matrix_.has_contiguous_rows() && begin + width <= m_) {
      stride = matrix_.stride[0];
      return matrix_.row(first) + begin;
    }
    const int64_t there = std::min(width, m_ - begin);
    for (int64_t r = 0; r < count; ++r) {
      for (int64_t c = 0; c < there; ++c)
        room[r * stride + c] = std::min(matrix_(first + r, begin + c), kSinkhornForbidden<T>);
      std::fill(room + r * stride + there, room + r * stride + width, T(0));
    }
    return room;
  }

  // At least the largest cost, by the triangle inequality through the first column's point.
  double bound(const TensorView<const T, 2>& x, const TensorView<const T, 2>& y) const {
    if (cosine_) return 2;
    const auto farthest = [&](const TensorView<const T, 2>& z) {
      double most = 0;
      for (int64_t i = 0; i < z.shape[0]; ++i) {
        double sum = 0;
        for (int64_t k = 0; k < z.shape[1]; ++k) {
          const double t = static_cast<double>(z(i, k)) - static_cast<double>(y(0, k));
          sum += metric_ == Metric::kL1 ? std::abs(t) : t * t;
        }
        most = std::max(most, sum);
      }
      return metric_ == Metric::kL1 ? most : std::sqrt(most);
    };
    const double far = farthest(x) + farthest(y);
    return metric_ == Metric::kSqeuclidean ? far * far : far;
  }

  int64_t n_, m_;
  bool cosine_, forbidden_;
  Metric metric_;
  TensorView<const T, 2> matrix_{};
  Panels<T> columns_;
  Buffer<T> packed_;  // groups of Tile<T>::kRows rows
  double spread_ = 0;
};

}  // namespace fc
