// The Caratheodory reduction: sums in extended precision, sizes, threads, views, refusals.
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "check.h"
#include "cpu/caratheodory.h"
#include "samples.h"

namespace {

using samples::Matrix;

// Of the sums of magnitudes.
constexpr long double kTolerance = 1e-13L;

template <class T>
fc::WeightedRows reduce(fc::TensorView<const T, 2> x, const std::vector<double>& weights, int64_t max_size,
                        int threads) {
  fc::ThreadTeam team(threads);
  const auto w =
      fc::TensorView<const double, 1>::compact(weights.data(), static_cast<int64_t>(weights.size()));
  return fc::caratheodory<T>(x, weights.empty() ? nullptr : &w, max_size, team);
}

template <class T>
void check_all(const Matrix<T>& x, const std::vector<double>& weights, int64_t max_size, int64_t most) {
  const int64_t n = x.rows(), d = x.cols();
  const fc::WeightedRows first = reduce(x.view(), weights, max_size, 1);
  CHECK(static_cast<int64_t>(first.rows.size()) <= most);
  CHECK_EQUAL(first.rows.size(), first.weights.size());
  for (size_t i = 0; i < first.rows.size(); ++i) {
    CHECK(first.weights[i] > 0);
    CHECK(first.rows[i] >= 0 && first.rows[i] < n);
    CHECK(i == 0 || first.rows[i] > first.rows[i - 1]);
    CHECK(weights.empty() || weights[first.rows[i]] > 0);
  }
  for (int64_t j = -1; j < d; ++j) {
    long double wanted = 0, got = 0, size = 0;
    const auto value = [&](int64_t i) { return j < 0 ? 1.0L : static_cast<long double>(x(i, j)); };
    for (int64_t i = 0; i < n; ++i) {
      const long double weight = weights.empty() ? 1 : weights[i];
      wanted += weight * value(i);
      size += weight * std::fabs(value(i));
    }
    for (size_t i = 0; i < first.rows.size(); ++i) got += first.weights[i] * value(first.rows[i]);
    CHECK(std::fabs(got - wanted) <= kTolerance * size);
  }
  std::vector<T> storage;
  const fc::WeightedRows other = reduce(x.odd_view(storage), weights, max_size, 3);
  CHECK(other.rows == first.rows);
  CHECK(other.weights == first.weights);
}

template <class T>
void test_sums() {
  for (const int64_t n : {1, 2, 7, 97, 1025, 20000}) {
    for (const int64_t d : {1, 3, 16, 40}) {
      if (n * d > 400000) continue;
      std::vector<double> weights(n);
      samples::Random random(n + d);
      for (double& w : weights) w = random.below(3) == 0 ? 0 : random.uniform();
      weights[0] = 1;
      for (const auto& w : {std::vector<double>(), weights}) {
        check_all(samples::normal<T>(n, d, d), w, 0, std::min(n, d + 1));
        check_all(samples::clustered<T>(n, d, d), w, 0, std::min(n, d + 1));
        check_all(samples::tied<T>(n, d, d), w, 0, 6);
      }
      check_all(samples::normal<T>(n, d, d), {}, n / 2 + d + 1, n / 2 + d + 1);
    }
  }
}

void test_long_streams_of_even_weights() {
  Matrix<double> x = samples::normal<double>(20000, 4, 3);
  for (double& value : x.values()) value = std::exp(2 * value);
  for (const int64_t k : {6, 10, 150, 9000}) check_all(x, {}, k, k);
}

void test_many_columns() {
  // More coordinates than twice the rows, of which the pivots of large tableaus go to several threads.
  check_all(samples::normal<double>(30, 900, 1), {}, 0, 30);
  check_all(samples::tied<double>(200, 900, 1), {}, 0, 6);
  check_all(samples::normal<float>(700, 300, 1), {}, 0, 301);
}

template <class T>
void test_refusals() {
  for (const T bad : {std::numeric_limits<T>::quiet_NaN(), std::numeric_limits<T>::infinity(),
                      -std::numeric_limits<T>::infinity()}) {
    for (const int64_t d : {4, 3000}) {
      Matrix<T> x = samples::normal<T>(1000, d, 1);
      x(901, 3) = x(990, 0) = bad;
      std::vector<double> weights(1000, 1);
      weights[901] = 0;  // looked at all the same
      std::string said;
      try {
        reduce(x.view(), weights, 0, 2);
      } catch (const std::invalid_argument& error) {
        said = error.what();
      }
      const std::string what = std::isnan(bad) ? "NaN" : bad > 0 ? "inf" : "-inf";
      CHECK_EQUAL(said, "x must be finite, got " + what + " at row 901, column 3");
    }
  }
}

void test_cancel() {
  const Matrix<double> x = samples::normal<double>(4000, 500, 1);
  fc::ThreadTeam team(2, [] { return true; });
  bool cancelled = false;
  try {
    fc::caratheodory<double>(x.view(), nullptr, 0, team);
  } catch (const fc::Cancelled&) {
    cancelled = true;
  }
  CHECK(cancelled);
}

}  // namespace

TEST_PROGRAM {
  test_sums<float>();
  test_sums<double>();
  test_many_columns();
  test_long_streams_of_even_weights();
  test_refusals<float>();
  test_refusals<double>();
  test_cancel();
  return check::verdict("caratheodory");
}
