// Points rearranged into the panels that the tile routine reads.
//
// Panels<T> holds rows in groups of Tile<T>::kCols, feature-major inside a group: row i, feature k at
// data[(i / kCols * d + k) * kCols + i % kCols]. The last group is filled up with zero rows. pack_batch makes
// the other operand, groups of Tile<T>::kRows rows, for a batch of rows in any order.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "core/checked.h"
#include "core/tensor_view.h"
#include "core/threads.h"
#include "cpu/tile.h"

namespace fc {

// An uninitialised array on a 64-byte boundary; a large one on whole huge pages if Linux has some, since
// touching a matrix for the first time would otherwise cost as much as computing it.
template <class T>
class Buffer {
  static constexpr size_t kHugePage = size_t{2} << 20;

 public:
  Buffer() = default;
  explicit Buffer(int64_t size) : size_(size) {
    if (size <= 0) return;
    size_t bytes = static_cast<size_t>(checked_mul(size, sizeof(T)));
    // Filled up to whole huge pages if that adds an eighth at most.
    const size_t whole = (bytes + kHugePage - 1) / kHugePage * kHugePage;
    if (whole - bytes <= bytes / 8) bytes = whole;
    const bool huge = bytes >= 2 * kHugePage;
    const std::align_val_t alignment{huge ? kHugePage : 64};
    // nothrow, because sanitizers end the process if the other form is asked for too much.
    data_ = {static_cast<T*>(::operator new[](bytes, alignment, std::nothrow)), Free{alignment}};
    if (!data_) throw std::bad_alloc();
#if defined(__linux__)
    // Only a hint: without huge pages everything works the same.
    if (huge) madvise(data_.get(), bytes / kHugePage * kHugePage, MADV_HUGEPAGE);
#endif
  }
  Buffer(int64_t size, T value) : Buffer(size) {
    for (int64_t i = 0; i < size; ++i) data_[i] = value;
  }
  T* data() { return data_.get(); }
  const T* data() const { return data_.get(); }
  T& operator[](int64_t i) { return data_[i]; }
  const T& operator[](int64_t i) const { return data_[i]; }
  int64_t size() const { return size_; }
  void swap(Buffer& other) {
    data_.swap(other.data_);
    std::swap(size_, other.size_);
  }

 private:
  struct Free {
    std::align_val_t alignment{64};
    void operator()(T* p) const { ::operator delete[](p, alignment); }
  };
  std::unique_ptr<T[], Free> data_;
  int64_t size_ = 0;
};

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// fn(from, to) over the features in blocks, so that the lines that rows are scattered over stay in the
// first-level cache.
template <class Fn>
void for_feature_blocks(int64_t d, Fn&& fn) {
  for (int64_t from = 0; from < d; from += 64) fn(from, std::min(d, from + 64));
}

template <class T>
void require_finite(T value, const char* name, int64_t row, int64_t column) {
  if (!(std::abs(value) <= std::numeric_limits<T>::max())) {
    throw std::invalid_argument(std::string(name) + " must be finite, got " +
                                (std::isnan(value) ? "NaN"
                                 : value > 0       ? "inf"
                                                   : "-inf") +
                                " at row " + std::to_string(row) + ", column " + std::to_string(column));
  }
}

// The factors that give a row unit length: a power of two that brings its largest magnitude near 1, since
// squares of large or tiny values leave the range of T, and the norm of the row times that power. A zero row
// stays zero.
struct RowScale {
  double scale = 0, norm = 0, inverse = 0;

  template <class T>
  static RowScale of(const TensorView<const T, 2>& x, int64_t row) {
    if (x.has_contiguous_rows()) return of(x.row(row), x.shape[1], std::integral_constant<int64_t, 1>{});
    return of(x.row(row), x.shape[1], x.stride[1]);
  }

  template <class T>
  T apply(T value) const {
    return static_cast<T>(value * scale * inverse);
  }

 private:
  // Feature k goes to sum k % kLanes, on every instruction set: one order of summation, wide enough for all
  // of them.
  template <class T, class Step>
  static RowScale of(const T* x, int64_t d, Step step) {
    constexpr int64_t kLanes = 8;
    double most[kLanes] = {}, sum[kLanes] = {};
    const auto for_lanes = [&](auto&& fn) {
      int64_t k = 0;
      for (; k + kLanes <= d; k += kLanes) {
        for (int64_t lane = 0; lane < kLanes; ++lane) fn(lane, static_cast<double>(x[(k + lane) * step]));
      }
      for (; k < d; ++k) fn(k % kLanes, static_cast<double>(x[k * step]));
    };
    for_lanes([&](int64_t lane, double value) {
      const double magnitude = std::abs(value);
      most[lane] = magnitude > most[lane] ? magnitude : most[lane];
    });
    RowScale result;
    const double largest = *std::max_element(most, most + kLanes);
    if (largest == 0) return result;
    int exponent;
    std::frexp(largest, &exponent);
    result.scale = std::ldexp(1.0, std::clamp(-exponent, -1000, 1000));
    for_lanes([&](int64_t lane, double value) {
      const double t = value * result.scale;
      sum[lane] += t * t;
    });
    for (int64_t half = kLanes / 2; half > 0; half /= 2) {
      for (int64_t lane = 0; lane < half; ++lane) sum[lane] += sum[lane + half];
    }
    result.norm = std::sqrt(sum[0]);
    result.inverse = 1 / result.norm;
    return result;
  }
};

// out[k * kStride] = feature k of the row, from `from` up to `to`, scaled if `scale` is given.
template <int kStride, class T>
void scatter_row(const TensorView<const T, 2>& x, int64_t row, const RowScale* scale, int64_t from,
                 int64_t to, T* out) {
  const T* in = x.row(row);
  const int64_t step = x.stride[1];
  if (scale) {
    const RowScale by = *scale;
    for (int64_t k = from; k < to; ++k) out[k * kStride] = by.apply(in[k * step]);
  } else {
    for (int64_t k = from; k < to; ++k) out[k * kStride] = in[k * step];
  }
}

template <class T>
class Panels {
 public:
  static constexpr int kCols = Tile<T>::kCols;

  Panels() = default;
  Panels(int64_t rows, int64_t d) : rows_(rows), d_(d), data_(checked_mul(round_up(rows, kCols), d)) {}

  int64_t rows() const { return rows_; }
  int64_t features() const { return d_; }
  int64_t count() const { return (rows_ + kCols - 1) / kCols; }
  const T* panel(int64_t p) const { return data_.data() + p * d_ * kCols; }
  T at(int64_t row, int64_t k) const { return panel(row / kCols)[k * kCols + row % kCols]; }

  // Copies x [rows, d], each row to unit length if asked; refuses NaN and infinity, naming `name`.
  static Panels pack(const TensorView<const T, 2>& x, bool normalise, const char* name, ThreadTeam& team) {
    Panels panels(x.shape[0], x.shape[1]);
    const int64_t d = panels.d_;
    // Below some ten microseconds of work another thread is not worth waking.
    const int64_t chunk = std::max<int64_t>(1, 2048 / std::max<int64_t>(d, 1));
    team.parallel_for(panels.count(), chunk, [&](int, int64_t begin, int64_t end) {
      RowScale scales[kCols];
      for (int64_t p = begin; p < end; ++p) {
        T* out = panels.data_.data() + p * d * kCols;
        const int64_t first = p * kCols, rows = std::min<int64_t>(kCols, panels.rows_ - first);
        for (int64_t lane = 0; lane < rows; ++lane) {
          check_row(x, first + lane, name);
          if (normalise) scales[lane] = RowScale::of(x, first + lane);
        }
        for_feature_blocks(d, [&](int64_t from, int64_t to) {
          for (int64_t lane = 0; lane < kCols; ++lane) {
            T* place = out + lane;
            if (lane >= rows) {
              for (int64_t k = from; k < to; ++k) place[k * kCols] = T(0);
              continue;
            }
            scatter_row<kCols>(x, first + lane, normalise ? &scales[lane] : nullptr, from, to, place);
          }
        });
      }
    });
    return panels;
  }

  static void check_row(const TensorView<const T, 2>& x, int64_t row, const char* name) {
    const int64_t d = x.shape[1];
    int64_t k = 0;
    if (x.has_contiguous_rows()) {
      // v - v is 0 for finite values and NaN otherwise.
      simd::Vec<T> sum{};
      for (; k + simd::kWidth<T> <= d; k += simd::kWidth<T>) {
        const auto v = simd::load(x.row(row) + k);
        sum += v - v;
      }
      for (int i = 0; i < simd::kWidth<T>; ++i) {
        if (sum[i] != 0) k = 0;
      }
    }
    for (; k < d; ++k) require_finite(x(row, k), name, row, k);
  }

  // Copies the rows named in index[0..count) of another set of panels, in that order.
  static Panels select(const Panels& from, const int64_t* index, int64_t count) {
    Panels panels(count, from.d_);
    for (int64_t i = 0; i < round_up(count, kCols); ++i) {
      T* out = panels.data_.data() + i / kCols * panels.d_ * kCols + i % kCols;
      const T* in = i < count ? from.panel(index[i] / kCols) + index[i] % kCols : nullptr;
      for (int64_t k = 0; k < panels.d_; ++k) out[k * kCols] = in ? in[k * kCols] : T(0);
    }
    return panels;
  }

 private:
  int64_t rows_ = 0, d_ = 0;
  Buffer<T> data_;
};

// Rows that a batch is drawn from: panels, or the caller's own array (checked beforehand) with the rows'
// scales.
template <class T>
struct Rows {
  const Panels<T>* panels = nullptr;
  TensorView<const T, 2> view{};
  const RowScale* scale = nullptr;  // null if rows are taken as they are

  // out [groups of kRows][d][kRows] = rows index[0..count), the last group filled up with zeros.
  void pack_batch(const int64_t* index, int64_t count, T* out) const {
    constexpr int kRows = Tile<T>::kRows;
    const int64_t d = panels ? panels->features() : view.shape[1];
    for_feature_blocks(d, [&](int64_t from, int64_t to) {
      for (int64_t i = 0; i < round_up(count, kRows); ++i) {
        T* place = out + i / kRows * d * kRows + i % kRows;
        if (i >= count) {
          for (int64_t k = from; k < to; ++k) place[k * kRows] = T(0);
        } else if (panels) {
          const T* in = panels->panel(index[i] / Panels<T>::kCols) + index[i] % Panels<T>::kCols;
          for (int64_t k = from; k < to; ++k) place[k * kRows] = in[k * Panels<T>::kCols];
        } else {
          scatter_row<kRows>(view, index[i], scale ? &scale[index[i]] : nullptr, from, to, place);
        }
      }
    });
  }
};

}  // namespace fc
