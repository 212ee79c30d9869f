// Matching pursuit and Frank-Wolfe: the conditions of their optima, every thread count and memory budget,
// rows that come and go, input that is refused.
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <vector>

#include "check.h"
#include "cpu/active_set.h"
#include "cpu/pursuit.h"
#include "samples.h"

namespace {

using samples::Matrix;

constexpr int64_t kMuch = int64_t{1} << 28;

template <class X>
std::vector<double> residual_of(const Matrix<X>& g, std::vector<double> left,
                                const fc::PursuitResult& found) {
  for (size_t p = 0; p < found.indices.size(); ++p) {
    for (int64_t k = 0; k < g.cols(); ++k) left[k] -= found.weights[p] * g(found.indices[p], k);
  }
  return left;
}

double norm(const std::vector<double>& v) {
  return std::sqrt(std::inner_product(v.begin(), v.end(), v.begin(), 0.0));
}

template <class X>
double product(const Matrix<X>& g, int64_t row, const std::vector<double>& v) {
  double sum = 0;
  for (int64_t k = 0; k < g.cols(); ++k) sum += static_cast<double>(g(row, k)) * v[k];
  return sum;
}

bool same(const fc::PursuitResult& a, const fc::PursuitResult& b) {
  return a.indices == b.indices && a.weights == b.weights && a.residual_norms == b.residual_norms;
}

// Distinct rows, weights of the right sign that a least-squares fit gives, norms that fall.
template <class X>
void check_optimum(const Matrix<X>& g, const std::vector<double>& target, const fc::MatchingPursuit& options,
                   const fc::PursuitResult& found) {
  std::vector<int64_t> sorted = found.indices;
  std::sort(sorted.begin(), sorted.end());
  CHECK(std::adjacent_find(sorted.begin(), sorted.end()) == sorted.end());
  CHECK(static_cast<int64_t>(found.residual_norms.size()) <= options.k);
  CHECK(found.indices.size() <= found.residual_norms.size());
  const auto residual = residual_of(g, target, found);
  double scale = norm(target), most = 0;
  for (size_t p = 0; p < found.indices.size(); ++p) {
    const double length = std::sqrt(product(g, found.indices[p], [&] {
      std::vector<double> row(g.cols());
      for (int64_t k = 0; k < g.cols(); ++k) row[k] = g(found.indices[p], k);
      return row;
    }()));
    scale += std::abs(found.weights[p]) * length;
    most = std::max(most, length);
  }
  for (size_t p = 0; p < found.indices.size(); ++p) {
    CHECK(!options.nonnegative || found.weights[p] > 0);
    const double rest = product(g, found.indices[p], residual) - options.ridge * found.weights[p];
    CHECK(std::abs(rest) <= 1e-9 * scale * most);
  }
  if (!found.residual_norms.empty()) {
    CHECK(std::abs(found.residual_norms.back() - norm(residual)) <= 1e-9 * norm(target));
  }
  if (options.ridge == 0) {
    for (size_t s = 1; s < found.residual_norms.size(); ++s) {
      CHECK(found.residual_norms[s] <= found.residual_norms[s - 1] + 1e-9 * norm(target));
    }
  }
}

template <class X>
void check_all(const Matrix<X>& g, const std::vector<double>& target, int64_t k) {
  const auto view = g.view();
  for (const bool nonnegative : {true, false}) {
    for (const double ridge : {0.0, 2.0}) {
      fc::MatchingPursuit options;
      options.k = k;
      options.nonnegative = nonnegative;
      options.ridge = ridge;
      fc::PursuitResult first[2];
      for (const int threads : {1, 3}) {
        for (const bool streamed : {false, true}) {
          options.memory_budget = streamed ? 0 : kMuch;
          fc::ThreadTeam team(threads);
          const auto found = fc::orthogonal_matching_pursuit<X>(view, target.data(), options, team);
          if (threads == 1) {
            first[streamed] = found;
            check_optimum(g, target, options, found);
          }
          CHECK(same(found, first[streamed]));
        }
      }
    }
  }
  fc::PursuitResult first;
  for (const int threads : {1, 3}) {
    for (const int64_t budget : {kMuch, int64_t{0}}) {
      fc::ThreadTeam team(threads);
      const auto found = fc::frank_wolfe<X>(view, target.data(), k, budget, team);
      if (threads == 1 && budget == kMuch) {
        first = found;
        for (const double weight : found.weights) CHECK(weight > 0);
        if (!found.residual_norms.empty()) {
          CHECK(std::abs(found.residual_norms.back() - norm(residual_of(g, target, found))) <=
                1e-7 * norm(target));
        }
      }
      CHECK(same(found, first));
    }
  }
}

template <class X>
void test_shapes() {
  for (const int64_t n : {1, 7, 40, 97}) {
    for (const int64_t d : {1, 5, 16, 63, 1025, 2100}) {
      for (const bool tied : {false, true}) {
        const Matrix<X> g = tied ? samples::tied<X>(n, d, n + d) : samples::normal<X>(n, d, n + d);
        std::vector<double> whole(d), other(d);
        samples::Random random(3);
        for (int64_t k = 0; k < d; ++k) {
          for (int64_t i = 0; i < n; ++i) whole[k] += g(i, k);
          other[k] = random.normal();
        }
        check_all(g, whole, std::min<int64_t>(n, 25));
        check_all(g, other, std::min<int64_t>(n, 25));
      }
    }
  }
}

// Rows that leave the factor in any order: the rest solves as if they had never been there.
void test_active_set() {
  const Matrix<double> g = samples::clustered<double>(60, 12, 5);
  samples::Random random(9);
  std::vector<double> target(12);
  for (double& value : target) value = random.normal();
  fc::ActiveSet set(true, 0, norm(target));
  std::vector<int64_t> picks;
  int64_t dropped = 0;
  for (int64_t i = 0; i < 60; ++i) {
    std::vector<double> row(12);
    for (int64_t k = 0; k < 12; ++k) row[k] = g(i, k);
    picks.push_back(i);
    std::vector<double> products;
    for (const int64_t p : picks) products.push_back(product(g, p, row));
    if (!set.add(products, product(g, i, target))) {
      picks.pop_back();
      continue;
    }
    fc::PursuitResult found{picks, set.weights(), {}};
    const auto left = residual_of(g, target, found);
    for (size_t p = 0; p < picks.size(); ++p) {
      const double weight = set.weights()[p], rest = product(g, picks[p], left);
      CHECK(weight >= 0);
      CHECK(weight > 0 ? std::abs(rest) < 1e-9 : rest < 1e-9);
      dropped += weight == 0;
    }
    CHECK(std::abs(set.squared_residual() - norm(left) * norm(left)) < 1e-9);
  }
  CHECK(dropped > 50);
}

void test_refusals() {
  Matrix<float> g = samples::normal<float>(5, 40, 1);
  std::vector<double> target(40, 1.0);
  fc::ThreadTeam team(1);
  g(3, 37) = std::numeric_limits<float>::quiet_NaN();
  CHECK_THROWS(fc::frank_wolfe<float>(g.view(), target.data(), 2, kMuch, team), std::invalid_argument);
  CHECK_THROWS(fc::orthogonal_matching_pursuit<float>(g.view(), target.data(), {}, team),
               std::invalid_argument);
  g(3, 37) = 0;
  target[39] = std::numeric_limits<double>::infinity();
  CHECK_THROWS(fc::frank_wolfe<float>(g.view(), target.data(), 2, kMuch, team), std::invalid_argument);
  target[39] = 1e200;
  CHECK_THROWS(fc::frank_wolfe<float>(g.view(), target.data(), 2, kMuch, team), std::invalid_argument);
}

}  // namespace

// A value that is no number is refused: no row would leave, and the fit would look for one for ever.
void test_active_set_of_no_numbers() {
  constexpr double kNan = std::numeric_limits<double>::quiet_NaN(),
                   kInf = std::numeric_limits<double>::infinity();
  for (const bool nonnegative : {false, true}) {
    for (const double bad : {kNan, kInf, -kInf}) {
      for (int place = 0; place < 3; ++place) {
        fc::ActiveSet set(nonnegative, 0.1, 1.0);
        CHECK(set.add({1}, 0.5));
        std::vector<double> products{0.5, 1};
        if (place < 2) products[place] = bad;
        CHECK_THROWS(set.add(products, place == 2 ? bad : 0.5), std::invalid_argument);
      }
    }
    // Numbers whose weights are not finite.
    fc::ActiveSet set(nonnegative, 0.0, 1.0);
    CHECK_THROWS(set.add({1e-300}, 1e308), std::invalid_argument);
    fc::ActiveSet two(nonnegative, 0.0, 1.0);
    CHECK(two.add({1e-200}, 1e100));
    const std::vector<double> products{1e-200 * (1 - 1e-9), 1e-200};
    if (nonnegative) {  // The row whose weight would be -infinity leaves.
      CHECK(two.add(products, -1e200));
      CHECK_EQUAL(two.weights()[1], 0.0);
      CHECK(std::isfinite(two.weights()[0]));
    } else {
      CHECK_THROWS(two.add(products, -1e200), std::invalid_argument);
    }
  }
}

TEST_PROGRAM {
  test_shapes<float>();
  test_shapes<double>();
  test_active_set();
  test_active_set_of_no_numbers();
  test_refusals();
  return check::verdict("pursuit");
}
