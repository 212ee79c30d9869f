// Test data: seeded points that exercise ties, duplicates, zero rows and extreme magnitudes, in any memory
// layout.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "core/philox.h"
#include "core/tensor_view.h"

namespace samples {

// A sequence of random numbers.
class Random {
 public:
  explicit Random(uint64_t seed) : seed_(seed) {}
  uint32_t word() {
    if (used_ == 4) {
      block_ = fc::philox4x32(seed_, 0, next_++);
      used_ = 0;
    }
    return block_[used_++];
  }
  double uniform() { return (word() + 0.5) * 0x1p-32; }
  double normal() { return std::sqrt(-2 * std::log(uniform())) * std::cos(6.283185307179586 * uniform()); }
  int64_t below(int64_t n) { return static_cast<int64_t>(word() % static_cast<uint64_t>(n)); }

 private:
  uint64_t seed_, next_ = 0;
  fc::PhiloxBlock block_{};
  int used_ = 4;
};

// A matrix that owns its memory and can be viewed compactly, with padded rows, upside down or transposed.
template <class T>
class Matrix {
 public:
  Matrix(int64_t n, int64_t d) : n_(n), d_(d), values_(n * d) {}

  int64_t rows() const { return n_; }
  int64_t cols() const { return d_; }
  T& operator()(int64_t i, int64_t k) { return values_[i * d_ + k]; }
  T operator()(int64_t i, int64_t k) const { return values_[i * d_ + k]; }
  std::vector<T>& values() { return values_; }
  const std::vector<T>& values() const { return values_; }
  fc::TensorView<T, 2> writable() { return fc::TensorView<T, 2>::compact(values_.data(), n_, d_); }
  fc::TensorView<const T, 2> view() const {
    return fc::TensorView<const T, 2>::compact(values_.data(), n_, d_);
  }

  // The same matrix stored last row first, columns first, with gaps: both strides are unusual, one is
  // negative.
  fc::TensorView<const T, 2> odd_view(std::vector<T>& storage) const {
    const int64_t step = n_ + 3;
    storage.assign(2 * step * d_ + 1, T(-777));
    for (int64_t i = 0; i < n_; ++i)
      for (int64_t k = 0; k < d_; ++k) storage[2 * (k * step + (n_ - 1 - i))] = (*this)(i, k);
    return {storage.data() + 2 * (n_ - 1), {n_, d_}, {-2, 2 * step}};
  }

 private:
  int64_t n_, d_;
  std::vector<T> values_;
};

template <class T>
Matrix<T> normal(int64_t n, int64_t d, uint64_t seed) {
  Matrix<T> x(n, d);
  Random random(seed);
  for (T& value : x.values()) value = static_cast<T>(random.normal());
  return x;
}

// Few distinct rows of small whole numbers, one of them zero: exact ties everywhere.
template <class T>
Matrix<T> tied(int64_t n, int64_t d, uint64_t seed) {
  Matrix<T> x(n, d);
  Random random(seed);
  for (int64_t i = 0; i < n; ++i) {
    const int64_t kind = random.below(6);
    for (int64_t k = 0; k < d; ++k) x(i, k) = kind == 0 ? T(0) : static_cast<T>((kind * (k + 3)) % 5 - 1);
  }
  return x;
}

// Rows around a few centres.
template <class T>
Matrix<T> clustered(int64_t n, int64_t d, uint64_t seed) {
  const Matrix<T> centres = normal<T>(9, d, seed + 1);
  Matrix<T> x(n, d);
  Random random(seed);
  for (int64_t i = 0; i < n; ++i) {
    const int64_t c = random.below(9);
    for (int64_t k = 0; k < d; ++k) x(i, k) = static_cast<T>(centres(c, k) + 0.1 * random.normal());
  }
  return x;
}

}  // namespace samples
