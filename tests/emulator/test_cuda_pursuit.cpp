// The CUDA kernels of matching pursuit, run by the emulator under every schedule, against sums in plain
// loops.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <vector>

#include "check.h"
#include "cuda/pursuit.h"
#include "emulator/device_array.h"
#include "emulator/schedules.h"
#include "samples.h"

namespace {

using fc::TensorView;
using fc::emulator::check_schedules;
using fc::emulator::DeviceArray;
using samples::Matrix;

constexpr double kNone = -std::numeric_limits<double>::infinity();

template <class T>
TensorView<const T, 1> view_of(const DeviceArray<T>& array, size_t size) {
  return TensorView<const T, 1>::compact(array.data(), static_cast<int64_t>(size));
}

// A row longer than the matrix' own, so that rows are not at multiples of their length.
template <class T>
struct Padded {
  DeviceArray<T> values;
  TensorView<const T, 2> view;

  explicit Padded(const Matrix<T>& x) : values(padded(x)) {
    view = {values.data(), {x.rows(), x.cols()}, {x.cols() + 3, 1}};
  }

  static std::vector<T> padded(const Matrix<T>& x) {
    std::vector<T> all(x.rows() * (x.cols() + 3), T(-777));
    for (int64_t i = 0; i < x.rows(); ++i)
      for (int64_t k = 0; k < x.cols(); ++k) all[i * (x.cols() + 3) + k] = x(i, k);
    return all;
  }
};

// [which.size(), rows.size() or all], the vectors' order turned round.
template <class X, class Y>
std::vector<double> products(const Matrix<X>& g, const std::vector<int64_t>& rows, const Matrix<Y>& vectors,
                             const std::vector<int64_t>& which, int64_t few_blocks) {
  const Padded<X> all(g);
  const Padded<Y> with(vectors);
  std::vector<int64_t> turned(which.size());
  std::iota(turned.rbegin(), turned.rend(), 0);
  const DeviceArray<int64_t> listed(rows), numbers(which), places(turned);
  const auto count = static_cast<int64_t>(which.size());
  const int64_t n = rows.empty() ? g.rows() : static_cast<int64_t>(rows.size());
  const DeviceArray<double> out(count * n);
  fc::cuda::products<X, Y>(all.view,
                           rows.empty() ? TensorView<const int64_t, 1>{} : view_of(listed, rows.size()),
                           with.view, view_of(numbers, which.size()), view_of(places, which.size()),
                           TensorView<double, 2>::compact(out.data(), count, n), nullptr, few_blocks);
  return out.values();
}

template <class X, class Y>
void test_products(int64_t n, int64_t d) {
  const auto g = samples::normal<X>(n, d, n + d);
  const auto vectors = samples::normal<Y>(15, d, 5);  // more than a launch takes
  std::vector<int64_t> which(15), rows;
  std::iota(which.begin(), which.end(), 0);
  for (int64_t i = n; i-- > 0;) rows.push_back(i);
  const auto got = check_schedules([&] { return products(g, {}, vectors, which, 256); });
  for (int64_t v = 0; v < 15; ++v) {
    double scale = 0;
    for (int64_t i = 0; i < n; ++i) {
      double want = 0;
      for (int64_t k = 0; k < d; ++k) {
        want += static_cast<double>(g(i, k)) * vectors(v, k);
        scale += std::fabs(static_cast<double>(g(i, k)) * vectors(v, k));
      }
      CHECK(std::fabs(got[(14 - v) * n + i] - want) <= 1e-15 * scale);
    }
  }
  // The same bits alone, with other rows, and if one block takes all pieces.
  CHECK(products(g, {}, vectors, which, 0) == got);
  const auto listed = products(g, rows, vectors, which, 256);
  for (int64_t v = 0; v < 15; ++v) {
    for (int64_t i = 0; i < n; ++i) CHECK_EQUAL(listed[v * n + (n - 1 - i)], got[v * n + i]);
  }
  const auto alone = check_schedules([&] { return products(g, {}, vectors, {9}, 256); });
  for (int64_t i = 0; i < n; ++i) CHECK_EQUAL(alone[i], got[(14 - 9) * n + i]);
}

template <class X>
void test_squares(int64_t n, int64_t d) {
  const auto g = samples::normal<X>(n, d, n);
  const Padded<X> all(g);
  for (const int64_t few_blocks : {0, 256}) {
    const auto got = check_schedules([&] {
      const DeviceArray<double> out(n);
      fc::cuda::squares<X>(all.view, TensorView<double, 1>::compact(out.data(), n), nullptr, few_blocks);
      return out.values();
    });
    for (int64_t i = 0; i < n; ++i) CHECK_EQUAL(got[i], products(g, {}, g, {i}, 256)[i]);
  }
}

// Picks with weights of both signs and of 0, rows that tie and rows that are taken.
void test_best_row(int64_t n, int64_t count, bool magnitude, bool tied) {
  const auto gram = tied ? samples::tied<double>(count + 3, n, 1) : samples::normal<double>(count + 3, n, 1);
  samples::Random random(7);
  std::vector<double> start(n), norm(n), numbers;
  std::vector<int64_t> slots;
  for (int64_t i = 0; i < n; ++i) {
    start[i] = tied ? static_cast<double>(random.below(3)) : random.normal();
    norm[i] = random.below(4) == 0 ? std::numeric_limits<double>::infinity() : 1.0;
  }
  for (int64_t p = 0; p < count; ++p) {
    numbers.push_back(static_cast<double>(random.below(5) - 2));
    slots.push_back((5 * p) % (count + 3));
  }
  numbers.push_back(0.5);  // a rounding error: smaller scores do not count
  const auto got = check_schedules([&] {
    const DeviceArray<double> from(start), columns(gram.values()), by(numbers), lengths(norm), scores(n),
        found(2);
    const DeviceArray<int64_t> places(slots);
    const fc::cuda::Correlations c{
        view_of(from, n),
        TensorView<const double, 2>::compact(static_cast<const double*>(columns.data()), count + 3, n),
        view_of(places, count),
        view_of(by, count + 1),
        view_of(lengths, n),
        magnitude};
    fc::cuda::best_row(c, TensorView<double, 1>::compact(scores.data(), n),
                       TensorView<double, 1>::compact(found.data(), 2), nullptr);
    std::vector<double> all = scores.values();
    for (const double value : found.values()) all.push_back(value);
    return all;
  });
  double most = kNone;
  int64_t row = 0;
  for (int64_t i = 0; i < n; ++i) {
    double rest = start[i];
    for (int64_t p = 0; p < count; ++p) rest -= numbers[p] * gram(slots[p], i);
    if (magnitude) rest = std::fabs(rest);
    if (rest > 0.5 && norm[i] == 1.0) {
      CHECK(std::fabs(got[i] - rest) <= 1e-12);
    } else {
      CHECK_EQUAL(got[i], kNone);
    }
    if (got[i] > most) {
      most = got[i];
      row = i;
    }
  }
  CHECK_EQUAL(got[n], most);
  if (most != kNone) CHECK_EQUAL(got[n + 1], static_cast<double>(row));
}

template <class X>
void test_residual(int64_t d) {
  const auto g = samples::normal<X>(9, d, 3);
  const Padded<X> all(g);
  samples::Random random(4);
  std::vector<double> target(d);
  for (double& value : target) value = random.normal();
  const std::vector<int64_t> rows{8, 0, 3};
  const std::vector<double> weights{0.5, -2, 3};
  const auto got = check_schedules([&] {
    const DeviceArray<double> from(target), by(weights), out(d);
    const DeviceArray<int64_t> of(rows);
    fc::cuda::residual<X>(all.view, view_of(from, d), view_of(of, 3), view_of(by, 3),
                          TensorView<double, 1>::compact(out.data(), d), nullptr);
    return out.values();
  });
  for (int64_t k = 0; k < d; ++k) {
    double want = target[k];
    for (size_t p = 0; p < 3; ++p) want -= weights[p] * static_cast<double>(g(rows[p], k));
    CHECK(std::fabs(got[k] - want) <= 1e-14);
  }
}

template <class X>
void all() {
  test_products<X, X>(1, 1);
  test_products<X, X>(37, 300);
  test_products<X, X>(3, 8300);  // three pieces
  test_products<X, double>(35, 257);
  test_squares<X>(35, 300);
  test_squares<X>(2, 4100);
  for (const int64_t d : {1, 257, 600}) test_residual<X>(d);
}

}  // namespace

TEST_PROGRAM {
  all<float>();
  all<double>();
  for (const bool magnitude : {false, true}) {
    for (const bool tied : {false, true}) {
      for (const int64_t n : {1, 33, 500}) {
        for (const int64_t count : {0, 1, 8, 21}) test_best_row(n, count, magnitude, tied);
      }
    }
  }
  test_best_row(9000, 2, false, true);  // more blocks than the last one has threads
  return check::verdict("cuda_pursuit");
}
