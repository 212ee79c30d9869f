// The scores against their formulas in long double: every memory layout and thread count, masked tokens,
// targets and logits that are refused.
#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "check.h"
#include "cpu/scores.h"
#include "samples.h"

namespace {

using samples::Matrix;

// Largest error relative to 1 + the magnitude; the sums of a block are float or double lanes.
template <class T>
constexpr double kTolerance = sizeof(T) == 4 ? 1e-6 : 2e-14;

template <class T>
std::vector<long double> expected(const Matrix<T>& x, int64_t i, int64_t t) {
  const int64_t classes = x.cols();
  long double most = x(i, 0), sum = 0;
  for (int64_t j = 0; j < classes; ++j) most = std::max<long double>(most, x(i, j));
  for (int64_t j = 0; j < classes; ++j) sum += std::exp(x(i, j) - most);
  long double entropy = 0, other = 0, square = 0;
  int64_t predicted = 0;
  for (int64_t j = 0; j < classes; ++j) {
    const long double p = std::exp(x(i, j) - most) / sum;
    if (p > 0) entropy -= p * std::log(p);
    if (j != t) other = std::max(other, p);
    square += (p - (j == t)) * (p - (j == t));
    if (x(i, j) > x(i, predicted)) predicted = j;
  }
  const long double own = std::exp(x(i, t) - most) / sum;
  return {-std::log(own), entropy, own - other, std::sqrt(square), predicted == t ? 1.0L : 0.0L};
}

template <class T>
void check_all(const Matrix<T>& x, const std::vector<int64_t>& targets) {
  const int64_t n = x.rows();
  std::vector<T> first;
  std::vector<T> storage;
  for (const int threads : {1, 3}) {
    for (const bool odd : {false, true}) {
      const auto rows = odd ? x.odd_view(storage) : x.view();
      const fc::TensorView<const T, 3> logits{
          rows.data, {n, 1, x.cols()}, {rows.stride[0], 1, rows.stride[1]}};
      std::vector<T> out(5 * n, T(-7));
      fc::ThreadTeam team(threads);
      fc::sample_scores<T>(logits, fc::TensorView<const int64_t, 2>::compact(targets.data(), n, 1), false,
                           fc::TensorView<T, 3>::compact(out.data(), 5, n, 1), team);
      if (first.empty()) {
        first = out;
        for (int64_t i = 0; i < n; ++i) {
          const auto want = expected(x, i, targets[i]);
          for (int s = 0; s < 5; ++s) {
            const double error =
                static_cast<double>(std::fabs(out[s * n + i] - want[s]) / (1 + std::fabs(want[s])));
            CHECK(error <= (s == 4 ? 0 : kTolerance<T>));
          }
        }
      }
      CHECK(out == first);
    }
  }
}

template <class T>
void test_formulas() {
  for (const int64_t classes : {1, 2, 7, 16, 63, 97, 1024, 1025, 3000}) {
    Matrix<T> x = samples::normal<T>(23, classes, classes);
    std::vector<int64_t> targets;
    samples::Random random(5);
    for (int64_t i = 0; i < x.rows(); ++i) {
      targets.push_back(random.below(classes));
      for (int64_t j = 0; j < classes; ++j) x(i, j) *= T(i);  // from all equal to far apart
      if (i % 3 == 0) x(i, targets[i]) = 60;                  // learned
    }
    check_all(x, targets);
    check_all(samples::tied<T>(23, classes, 3), targets);
  }
}

template <class T>
std::string refusal(const Matrix<T>& x, const std::vector<int64_t>& targets, int64_t tokens, bool masked) {
  const int64_t n = x.rows() / tokens;
  std::vector<T> out(5 * x.rows());
  fc::ThreadTeam team(2);
  try {
    fc::sample_scores<T>(fc::TensorView<const T, 3>::compact(x.values().data(), n, tokens, x.cols()),
                         fc::TensorView<const int64_t, 2>::compact(targets.data(), n, tokens), masked,
                         fc::TensorView<T, 3>::compact(out.data(), 5, n, tokens), team);
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "";
}

template <class T>
void test_refusals() {
  const Matrix<T> plain = samples::normal<T>(4000, 40, 1);
  const std::vector<int64_t> zeros(4000, 0);
  CHECK_EQUAL(refusal(plain, zeros, 1, false), "");
  for (const T bad : {std::numeric_limits<T>::quiet_NaN(), std::numeric_limits<T>::infinity(),
                      -std::numeric_limits<T>::infinity()}) {
    for (const int64_t column : {0, 17, 39}) {
      Matrix<T> x = plain;
      x(3901, column) = x(3001, column) = x(3999, column) = bad;
      const std::string what = std::isnan(bad) ? "NaN" : bad > 0 ? "inf" : "-inf";
      CHECK_EQUAL(refusal(x, zeros, 1, false),
                  "logits must be finite, got " + what + " at sample 3001, class " + std::to_string(column));
      CHECK_EQUAL(
          refusal(x, zeros, 2, false),
          "logits must be finite, got " + what + " at sample 1500, token 1, class " + std::to_string(column));
      std::vector<int64_t> skipped = zeros;
      skipped[3901] = skipped[3001] = skipped[3999] = -1;
      CHECK_EQUAL(refusal(x, skipped, 2, true), "");
    }
  }
  for (const int64_t bad : {int64_t{-1}, int64_t{40}, INT64_MIN, INT64_MAX}) {
    std::vector<int64_t> targets = zeros;
    targets[1000] = targets[7] = bad;
    CHECK_EQUAL(refusal(plain, targets, 1, false),
                "targets must be in [0, 40), got " + std::to_string(bad) + " at sample 7");
    if (bad != -1) CHECK(!refusal(plain, targets, 1, true).empty());
  }
}

void test_masked_tokens_are_zero() {
  const Matrix<float> x = samples::normal<float>(6, 9, 2);
  const std::vector<int64_t> targets = {3, -1, 0, -1, -1, 8};
  std::vector<float> out(30, -7.0f);
  fc::ThreadTeam team(1);
  fc::sample_scores<float>(fc::TensorView<const float, 3>::compact(x.values().data(), 2, 3, 9),
                           fc::TensorView<const int64_t, 2>::compact(targets.data(), 2, 3), true,
                           fc::TensorView<float, 3>::compact(out.data(), 5, 2, 3), team);
  for (int s = 0; s < 5; ++s) {
    for (const int row : {1, 3, 4}) CHECK_EQUAL(out[s * 6 + row], 0.0f);
  }
  for (const int row : {0, 2, 5}) CHECK(out[row] > 0);
}

}  // namespace

TEST_PROGRAM {
  test_formulas<float>();
  test_formulas<double>();
  test_refusals<float>();
  test_refusals<double>();
  test_masked_tokens_are_zero();
  return check::verdict("scores");
}
