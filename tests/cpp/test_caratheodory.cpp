// The Caratheodory reduction: sums in extended precision, sizes, threads, views, refusals.
#include <algorithm>
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

// The largest error, as a share of the sums of magnitudes.
constexpr long double kTolerance = 1e-13L;

template <class T>
fc::WeightedRows reduce(fc::TensorView<const T, 2> x, const std::vector<double>& weights, int64_t max_size,
                        int threads) {
  fc::ThreadTeam team(threads);
  const auto w =
      fc::TensorView<const double, 1>::compact(weights.data(), static_cast<int64_t>(weights.size()));
  return fc::caratheodory<T>(x, weights.empty() ? nullptr : &w, max_size, team);
}

// Whether the sums of w (1, x) are kept.
template <class T>
void check_sums(const Matrix<T>& x, const std::vector<double>& weights, const fc::WeightedRows& found) {
  for (int64_t j = -1; j < x.cols(); ++j) {
    long double wanted = 0, got = 0, size = 0;
    const auto value = [&](int64_t i) { return j < 0 ? 1.0L : static_cast<long double>(x(i, j)); };
    for (int64_t i = 0; i < x.rows(); ++i) {
      const long double weight = weights.empty() ? 1 : weights[i];
      wanted += weight * value(i);
      size += weight * std::fabs(value(i));
    }
    for (size_t i = 0; i < found.rows.size(); ++i) got += found.weights[i] * value(found.rows[i]);
    CHECK(std::fabs(got - wanted) <= kTolerance * size);
  }
}

template <class T>
void check_all(const Matrix<T>& x, const std::vector<double>& weights, int64_t max_size, int64_t most) {
  const int64_t n = x.rows();
  const fc::WeightedRows first = reduce(x.view(), weights, max_size, 1);
  CHECK(static_cast<int64_t>(first.rows.size()) <= most);
  CHECK_EQUAL(first.rows.size(), first.weights.size());
  for (size_t i = 0; i < first.rows.size(); ++i) {
    CHECK(first.weights[i] > 0);
    CHECK(first.rows[i] >= 0 && first.rows[i] < n);
    CHECK(i == 0 || first.rows[i] > first.rows[i - 1]);
    CHECK(weights.empty() || weights[first.rows[i]] > 0);
  }
  check_sums(x, weights, first);
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
  // More coordinates than twice the rows; the pivots of large tableaus go to several threads.
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
      weights[901] = 0;  // checked all the same
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

// The steps of a backend whose rows are elsewhere.
Matrix<double> sums_of_runs(const Matrix<float>& x, const std::vector<int64_t>& rows,
                            const std::vector<double>& weights, const fc::Moments& moments, int64_t size) {
  const auto count = static_cast<int64_t>(rows.size());
  Matrix<double> sums((count + size - 1) / size, 1 + x.cols());
  for (int64_t r = 0; r < count; ++r) {
    sums(r / size, 0) += weights[r];
    for (int64_t j = 0; j < x.cols(); ++j) {
      sums(r / size, 1 + j) += weights[r] * (x(rows[r], j) * moments.shrink - moments.centre[j]);
    }
  }
  return sums;
}

void test_parts() {
  for (const double offset : {0.0, 1e4}) {
    const int64_t n = 3001, d = 9;
    Matrix<float> x = samples::normal<float>(n, d, 5);
    for (float& value : x.values()) value += static_cast<float>(offset);
    fc::ThreadTeam team(2);
    fc::Moments moments(d);
    std::vector<int64_t> rows(n);
    for (int64_t i = 0; i < n; ++i) rows[i] = i;
    std::vector<double> weights(n, 1.0);
    const auto size_of = [&] {
      return (static_cast<int64_t>(rows.size()) + moments.most_runs() - 1) / moments.most_runs();
    };
    const auto sums = [&] { return sums_of_runs(x, rows, weights, moments, size_of()); };
    Matrix<double> first = sums();
    fc::take_total(moments, first.view());
    const bool moved = fc::move_to_mean(moments, first.writable());
    CHECK_EQUAL(moved, offset == 0);  // from 0, the centre is too far off
    if (!moved) fc::take_total(moments, sums().view());
    while (static_cast<int64_t>(rows.size()) > 3 * moments.most_runs()) {
      const int64_t size = size_of();
      const std::vector<double> factors = fc::factors_of_runs(moments, sums().view(), team);
      size_t kept = 0;
      for (size_t r = 0; r < rows.size(); ++r) {
        const double factor = factors[r / size];
        CHECK(factor >= 0);
        if (!(factor > 0)) continue;
        rows[kept] = rows[r];
        weights[kept++] = weights[r] * factor;
      }
      CHECK(kept <= (1 + d) * static_cast<size_t>(size));
      rows.resize(kept);
      weights.resize(kept);
    }
    Matrix<float> rest(static_cast<int64_t>(rows.size()), d);
    for (int64_t r = 0; r < rest.rows(); ++r) {
      for (int64_t j = 0; j < d; ++j) rest(r, j) = x(rows[r], j);
    }
    fc::WeightedRows found = fc::reduce_rest<float>(
        moments, rest.view(), fc::TensorView<const double, 1>::compact(weights.data(), rest.rows()), team);
    CHECK_EQUAL(static_cast<int64_t>(found.rows.size()), d + 1);
    for (int64_t& row : found.rows) row = rows[row];
    check_sums(x, {}, found);

    // Where pieces end makes no difference.
    std::vector<double> expected;
    for (const int64_t piece : {n, int64_t{1}, int64_t{100}}) {
      std::vector<double> left(n, 1.0);
      fc::Sampler sampler(moments, fc::TensorView<double, 1>::compact(left.data(), n), 200, team);
      int64_t begin = 0;
      for (; begin < n && !sampler.done(); begin += piece) {
        const int64_t count = std::min(piece, n - begin);
        const float* const at = x.view().row(begin);
        sampler.push(fc::TensorView<const float, 2>::compact(at, count, d));
      }
      sampler.finish();
      if (expected.empty()) expected = left;
      CHECK(left == expected);
    }
    fc::WeightedRows sampled;
    for (int64_t i = 0; i < n; ++i) {
      if (expected[i] == 0) continue;
      sampled.rows.push_back(i);
      sampled.weights.push_back(expected[i]);
    }
    CHECK_EQUAL(sampled.rows.size(), size_t{200});
    for (double& weight : sampled.weights) weight *= 1 + 1e-9;  // to be corrected by a few of them
    const Matrix<double> total =
        sums_of_runs(x, sampled.rows, sampled.weights, moments, static_cast<int64_t>(sampled.rows.size()));
    const int64_t few = moments.most_runs();
    Matrix<float> chosen(few, d);
    for (int64_t r = 0; r < few; ++r) {
      for (int64_t j = 0; j < d; ++j) chosen(r, j) = x(sampled.rows[r], j);
    }
    fc::correct_weights<float>(moments, chosen.view(),
                               fc::TensorView<double, 1>::compact(sampled.weights.data(), few),
                               fc::TensorView<const double, 1>::compact(total.values().data(), 1 + d), team);
    check_sums(x, {}, sampled);
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
  test_parts();
  test_refusals<float>();
  test_refusals<double>();
  test_cancel();
  return check::verdict("caratheodory");
}
