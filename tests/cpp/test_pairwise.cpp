// Pairwise similarities and distances against scalar loops in a wider type, and the promise that a pair's
// value does not depend on the tile, the batch, the layout or the threads it was computed with.
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "check.h"
#include "cpu/pairwise.h"
#include "samples.h"

namespace {

using samples::Matrix;

constexpr fc::Metric kMetrics[] = {fc::Metric::kCosine, fc::Metric::kDot, fc::Metric::kEuclidean,
                                   fc::Metric::kSqeuclidean, fc::Metric::kL1};

template <class T>
Matrix<T> run(const fc::TensorView<const T, 2>& x, const fc::TensorView<const T, 2>& y, fc::Metric metric,
              bool symmetric, int threads) {
  Matrix<T> out(x.rows(), y.rows());
  fc::ThreadTeam team(threads);
  fc::pairwise<T>(x, y, metric, symmetric, out.writable(), team);
  return out;
}

struct Value {
  long double value = 0,
              magnitude =
                  0;  // the sum, and the sum of the terms' magnitudes, which scales its rounding error
};

template <class T>
Value scalar(const Matrix<T>& x, int64_t i, const Matrix<T>& y, int64_t j, fc::Metric metric) {
  long double sum = 0, magnitude = 0, xx = 0, yy = 0;
  for (int64_t k = 0; k < x.cols(); ++k) {
    const long double a = x(i, k), b = y(j, k);
    const bool product = metric == fc::Metric::kDot || metric == fc::Metric::kCosine;
    const long double term = product                     ? a * b
                             : metric == fc::Metric::kL1 ? std::fabs(a - b)
                                                         : (a - b) * (a - b);
    sum += term;
    magnitude += std::fabs(term);
    xx += a * a;
    yy += b * b;
  }
  if (metric == fc::Metric::kCosine) {
    const long double norms = std::sqrt(xx) * std::sqrt(yy);
    return norms == 0 ? Value{0, 0} : Value{sum / norms, magnitude / norms};
  }
  if (metric == fc::Metric::kEuclidean) return {std::sqrt(sum), std::sqrt(sum)};
  return {sum, magnitude};
}

// Standard bound for a sum in chains of 256: each term meets at most min(d, 256) + d / 256 roundings, and a
// few more when it is formed, normalised or rooted.
template <class T>
long double bound(int64_t d) {
  return static_cast<long double>(std::min<int64_t>(d, 256) + d / 256 + 6) *
         std::numeric_limits<T>::epsilon() / 2;
}

template <class T>
void test_against_scalar(const Matrix<T>& x, const Matrix<T>& y) {
  for (const fc::Metric metric : kMetrics) {
    const auto out = run<T>(x.view(), y.view(), metric, false, 2);
    long double worst = 0;
    for (int64_t i = 0; i < x.rows(); ++i) {
      for (int64_t j = 0; j < y.rows(); ++j) {
        const Value want = scalar(x, i, y, j, metric);
        const long double error = std::fabs(static_cast<long double>(out(i, j)) - want.value);
        const long double share = error == 0 ? 0 : error / (want.magnitude * bound<T>(x.cols()));
        worst = share > worst || share != share ? share : worst;
      }
    }
    CHECK(worst <= 1);
  }
}

template <class T>
void test_values() {
  for (const int64_t d : {1, 7, 97, 300}) {
    test_against_scalar<T>(samples::normal<T>(1, d, 1), samples::normal<T>(1, d, 2));
    test_against_scalar<T>(samples::normal<T>(7, d, 3), samples::normal<T>(97, d, 4));
    test_against_scalar<T>(samples::tied<T>(97, d, 5), samples::tied<T>(7, d, 6));
  }
  test_against_scalar<T>(samples::normal<T>(1025, 7, 7), samples::normal<T>(97, 7, 8));
  test_against_scalar<T>(samples::normal<T>(97, 7, 9), samples::normal<T>(1025, 7, 10));
  test_against_scalar<T>(samples::normal<T>(7, 1025, 11), samples::normal<T>(7, 1025, 12));
}

// One row at a time, both ways round, strided, with more threads, and computed by halves: the same bits.
template <class T>
void test_same_bits() {
  const auto x = samples::clustered<T>(97, 300, 1), y = samples::clustered<T>(131, 300, 2);
  std::vector<T> x_storage, y_storage;
  const auto odd_x = x.odd_view(x_storage), odd_y = y.odd_view(y_storage);
  for (const fc::Metric metric : kMetrics) {
    const auto whole = run<T>(x.view(), y.view(), metric, false, 1);
    CHECK(run<T>(x.view(), y.view(), metric, false, 3).values() == whole.values());
    CHECK(run<T>(odd_x, odd_y, metric, false, 2).values() == whole.values());
    const auto swapped = run<T>(y.view(), x.view(), metric, false, 1);
    bool same = true;
    for (int64_t i = 0; i < x.rows(); ++i)
      for (int64_t j = 0; j < y.rows(); ++j) same = same && swapped(j, i) == whole(i, j);
    CHECK(same);
    for (const int64_t i : {0, 50, 96}) {
      const fc::TensorView<const T, 2> row{x.view().row(i), {1, x.cols()}, {x.cols(), 1}};
      const auto alone = run<T>(row, y.view(), metric, false, 1);
      CHECK(std::equal(alone.values().begin(), alone.values().end(), whole.view().row(i)));
    }
  }
  for (const int64_t n : {1, 7, 97, 1025}) {
    const auto z = samples::normal<T>(n, 17, 3);
    for (const fc::Metric metric : kMetrics)
      for (const int threads : {1, 2})
        CHECK(run<T>(z.view(), z.view(), metric, true, threads).values() ==
              run<T>(z.view(), z.view(), metric, false, 1).values());
  }
}

// Only the entries of the result are written.
template <class T>
void test_padded_output() {
  const auto x = samples::normal<T>(37, 5, 1), y = samples::normal<T>(41, 5, 2);
  std::vector<T> storage(37 * 50, T(-5));
  fc::ThreadTeam team(2);
  fc::pairwise<T>(x.view(), y.view(), fc::Metric::kL1, false, {storage.data(), {37, 41}, {50, 1}}, team);
  const auto want = run<T>(x.view(), y.view(), fc::Metric::kL1, false, 1);
  bool same = true;
  for (int64_t i = 0; i < 37; ++i)
    for (int64_t j = 0; j < 50; ++j) same = same && storage[i * 50 + j] == (j < 41 ? want(i, j) : T(-5));
  CHECK(same);
}

// Without features every similarity and distance is an empty sum; without rows there is nothing to write.
template <class T>
void test_empty() {
  const auto x = samples::normal<T>(5, 0, 1), y = samples::normal<T>(40, 0, 2);
  const auto none = samples::normal<T>(0, 3, 3), some = samples::normal<T>(7, 3, 4);
  for (const fc::Metric metric : kMetrics) {
    CHECK(run<T>(x.view(), y.view(), metric, false, 2).values() == std::vector<T>(200, T(0)));
    CHECK(run<T>(y.view(), y.view(), metric, true, 2).values() == std::vector<T>(1600, T(0)));
    CHECK(run<T>(none.view(), some.view(), metric, false, 2).values().empty());
    CHECK(run<T>(some.view(), none.view(), metric, false, 2).values().empty());
    CHECK(run<T>(none.view(), none.view(), metric, true, 2).values().empty());
  }
}

// Cosine at the ends of the range, where squares overflow or vanish; a zero row is similar to nothing.
template <class T>
void test_cosine_range() {
  const T large = std::numeric_limits<T>::max(), tiny = std::numeric_limits<T>::denorm_min();
  Matrix<T> x(4, 2);
  x.values() = {large, large, tiny, tiny, 0, 0, 1, 1};
  const auto s = run<T>(x.view(), x.view(), fc::Metric::kCosine, true, 1);
  for (const int64_t i : {0, 1, 3})
    for (const int64_t j : {0, 1, 3}) CHECK(std::fabs(s(i, j) - 1) <= 4 * std::numeric_limits<T>::epsilon());
  for (int64_t i = 0; i < 4; ++i) CHECK_EQUAL(s(2, i), T(0));
}

template <class T>
void test_not_finite() {
  for (const T bad : {std::numeric_limits<T>::quiet_NaN(), std::numeric_limits<T>::infinity(),
                      -std::numeric_limits<T>::infinity()}) {
    for (const int threads : {1, 2}) {
      auto x = samples::normal<T>(97, 3, 1);
      const auto y = samples::normal<T>(50, 3, 2);
      x(70, 2) = bad;
      std::string message;
      try {
        run<T>(x.view(), y.view(), fc::Metric::kDot, false, threads);
      } catch (const std::invalid_argument& error) {
        message = error.what();
      }
      CHECK(message.find("x ") == 0 && message.find("row 70, column 2") != std::string::npos);
      CHECK_THROWS(run<T>(y.view(), x.view(), fc::Metric::kCosine, false, threads), std::invalid_argument);
      CHECK_THROWS(run<T>(x.view(), x.view(), fc::Metric::kL1, true, threads), std::invalid_argument);
    }
  }
}

template <class T>
void test_all() {
  test_values<T>();
  test_same_bits<T>();
  test_padded_output<T>();
  test_empty<T>();
  test_cosine_range<T>();
  test_not_finite<T>();
}

}  // namespace

TEST_PROGRAM {
  test_all<float>();
  test_all<double>();
  return check::verdict("pairwise");
}
