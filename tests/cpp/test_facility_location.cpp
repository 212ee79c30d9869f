// Facility location, lazy and naive, from points, matrices and sparse rows, against a double loop: equal
// picks, gains, weights and assignments whatever the threads, the memory budget and the steps.
#include <cmath>
#include <limits>
#include <memory>
#include <numeric>
#include <string>
#include <vector>

#include "check.h"
#include "core/threads.h"
#include "cpu/facility_location.h"
#include "cpu/pairwise.h"
#include "greedy_oracle.h"
#include "samples.h"

namespace {

using fc::FacilityLocation;
using fc::GreedyOptions;
using fc::Metric;
using oracle::Result;
using samples::Matrix;

constexpr Metric kMetrics[] = {Metric::kCosine, Metric::kDot, Metric::kEuclidean, Metric::kSqeuclidean,
                               Metric::kL1};

Result finish(FacilityLocation& run) {
  Result r;
  const int64_t k = run.picks();
  r.indices.resize(k);
  r.gains.resize(k);
  r.weights.resize(k);
  r.assignment.resize(run.clients());
  r.objective = run.finish(r.indices.data(), r.gains.data(), r.weights.data(), r.assignment.data());
  return r;
}

bool same(const Result& a, const Result& b) {
  return a.indices == b.indices && a.gains == b.gains && a.weights == b.weights &&
         a.assignment == b.assignment &&
         std::fabs(a.objective - b.objective) <= 1e-12 * std::fabs(b.objective);
}

template <class T>
double norm(const Matrix<T>& x, int64_t row) {
  double sum = 0;
  for (int64_t k = 0; k < x.cols(); ++k) sum += static_cast<double>(x(row, k)) * x(row, k);
  return std::sqrt(sum);
}

template <class T>
struct Problem {
  const Matrix<T>& x;
  const Matrix<T>* clients;  // null: x
  Metric metric;
  std::vector<double> weights;
  std::vector<int64_t> preselected;
  double offset = 0;
  Matrix<T> s;

  Problem(const Matrix<T>& points, const Matrix<T>* client_points, Metric kind, std::vector<double> w,
          std::vector<int64_t> chosen)
      : x(points),
        clients(client_points),
        metric(kind),
        weights(std::move(w)),
        preselected(std::move(chosen)),
        s(points.rows(), (client_points ? client_points : &points)->rows()) {
    fc::ThreadTeam team(1);
    fc::pairwise<T>(x.view(), columns().view(), metric, false, s.writable(), team);
    if (!fc::is_distance(metric)) return;
    for (T& value : s.values()) {
      offset = std::max(offset, static_cast<double>(value));
      value = -value;
    }
    offset = offset * 1.001 + 0.5;
  }

  const Matrix<T>& columns() const { return clients ? *clients : x; }
  T floor() const { return fc::is_distance(metric) ? static_cast<T>(-offset) : T(0); }

  Result expected(int64_t k) const {
    double largest = 0;
    for (int64_t j = 0; j < x.rows(); ++j) largest = std::max(largest, norm(x, j));
    std::vector<double> bounds(s.cols());
    for (int64_t i = 0; i < s.cols(); ++i)
      bounds[i] = fc::is_distance(metric)     ? offset
                  : metric == Metric::kCosine ? 1.001
                                              : norm(columns(), i) * largest * 1.001;
    return oracle::greedy<T>(s, k, floor(), bounds, weights, preselected, clients == nullptr);
  }

  GreedyOptions options(int threads, int64_t budget) const {
    GreedyOptions o = oracle::options_of(weights, preselected);
    o.offset = offset;
    o.self_clients = clients == nullptr;
    o.memory_budget = budget;
    o.threads = threads;
    return o;
  }

  std::unique_ptr<FacilityLocation> start(int threads, int64_t budget) const {
    const auto client_view = columns().view();
    return fc::facility_location_points<T>(x.view(), clients ? &client_view : nullptr, metric,
                                           options(threads, budget));
  }
};

template <class T>
void check_problem(const Problem<T>& problem, int64_t k) {
  const Result want = problem.expected(k);
  // No memory for lists, some, and enough for the whole matrix.
  for (const int64_t budget : {int64_t{0}, int64_t{20000}, int64_t{1} << 28}) {
    for (const int threads : {1, 2}) {
      const auto lazy = problem.start(threads, budget);
      CHECK_EQUAL(lazy->step(k, false), k);
      CHECK(same(finish(*lazy), want));
    }
    const auto naive = problem.start(2, budget);
    naive->step(k, true);
    CHECK(same(finish(*naive), want));
    const auto mixed = problem.start(1, budget);
    for (int64_t pick = 0; pick < k; ++pick) CHECK_EQUAL(mixed->step(1, pick % 3 == 1), pick + 1);
    CHECK(same(finish(*mixed), want));
  }
}

std::vector<double> some_weights(int64_t m) {
  samples::Random random(99);
  std::vector<double> w(m);
  for (double& value : w) value = random.below(5) == 0 ? 0.0 : 3 * random.uniform();
  return w;
}

template <class T>
void test_points() {
  for (const Metric metric : kMetrics) {
    for (const int64_t n : {1, 7, 97}) {
      for (const bool ties : {false, true}) {
        const auto x = ties ? samples::tied<T>(n, 7, n) : samples::clustered<T>(n, 7, n);
        const auto y = samples::normal<T>(n == 7 ? 1 : 31, 7, 5);
        const int64_t k = std::min<int64_t>(n, 20);
        check_problem(Problem<T>(x, nullptr, metric, {}, {}), k);
        check_problem(Problem<T>(x, &y, metric, some_weights(y.rows()), {}), k);
        if (n > 1)
          check_problem(Problem<T>(x, nullptr, metric, some_weights(n), {n - 1, 2}), std::min(k, n - 2));
      }
    }
  }
}

// Enough candidates and picks for sweeps, corrections and live lists to come and go.
template <class T>
void test_larger() {
  const auto x = samples::clustered<T>(1025, 33, 3), y = samples::clustered<T>(400, 33, 4);
  for (const Metric metric : {Metric::kCosine, Metric::kL1}) {
    const Problem<T> self(x, nullptr, metric, {}, {}), target(x, &y, metric, some_weights(400), {5, 1000});
    for (const Problem<T>* problem : {&self, &target}) {
      const int64_t k = 60;
      const Result want = problem->expected(k);
      for (const int64_t budget : {int64_t{0}, int64_t{300000}, int64_t{1} << 28}) {
        const auto run = problem->start(2, budget);
        run->step(k, false);
        CHECK(same(finish(*run), want));
      }
    }
  }
}

// Every candidate gets picked, the last ones at no gain, lowest index first.
template <class T>
void test_exhausting() {
  Matrix<T> x(23, 3);
  for (T& value : x.values()) value = 1;
  for (const Metric metric : {Metric::kCosine, Metric::kEuclidean}) {
    const Problem<T> problem(x, nullptr, metric, {}, {});
    const auto run = problem.start(2, 1 << 20);
    CHECK_EQUAL(run->step(100, false), 23);
    CHECK_EQUAL(run->step(100, false), 23);
    const Result got = finish(*run);
    for (int64_t i = 0; i < 23; ++i) CHECK_EQUAL(got.indices[i], i);
    for (int64_t i = 1; i < 23; ++i) CHECK_EQUAL(got.gains[i], 0.0);
    for (int64_t i = 0; i < 23; ++i) CHECK_EQUAL(got.assignment[i], i);
    for (int64_t j = 0; j < 23; ++j) CHECK(!run->is_open(j));
  }
}

template <class T>
Matrix<T> random_matrix(int64_t n, int64_t m, uint64_t seed) {
  auto s = samples::normal<T>(n, m, seed);  // negative entries included
  samples::Random random(seed);
  for (T& value : s.values()) {
    if (random.below(3) == 0) value = 0;
    if (random.below(7) == 0) value = 1;
  }
  return s;
}

template <class T>
std::vector<double> matrix_bounds(const Matrix<T>& s) {
  T largest = 0;
  for (int64_t j = 0; j < s.rows(); ++j)
    for (int64_t i = 0; i < s.cols(); ++i) largest = std::max(largest, s(j, i));
  return std::vector<double>(s.cols(), static_cast<double>(largest));
}

template <class T>
void test_matrices() {
  for (const int64_t n : {1, 7, 97, 300}) {
    for (const int64_t m : {n, int64_t{1}, int64_t{131}}) {
      const auto s = random_matrix<T>(n, m, n + m);
      std::vector<int64_t> indptr{0}, indices;
      std::vector<T> values;
      for (int64_t j = 0; j < n; ++j) {
        for (int64_t i = 0; i < m; ++i) {
          if (s(j, i) == 0) continue;
          indices.push_back(i);
          values.push_back(s(j, i));
        }
        indptr.push_back(static_cast<int64_t>(indices.size()));
      }
      for (const bool extras : {false, true}) {
        std::vector<double> weights;
        std::vector<int64_t> preselected;
        if (extras) weights = some_weights(m);
        if (extras && n > 1) preselected = {n / 2};
        GreedyOptions options = oracle::options_of(weights, preselected);
        options.self_clients = n == m;
        const int64_t k = std::min<int64_t>(n - static_cast<int64_t>(preselected.size()), 40);
        const Result want = oracle::greedy<T>(s, k, T(0), matrix_bounds(s), weights, preselected, n == m);
        for (const int64_t budget : {0, 5000, 1 << 24}) {
          for (const int threads : {1, 2}) {
            for (const bool naive : {false, true}) {
              options.memory_budget = budget;
              options.threads = threads;
              const auto dense = fc::facility_location_matrix<T>(s.view(), options);
              dense->step(k, naive);
              CHECK(same(finish(*dense), want));
              const auto sparse = fc::facility_location_sparse<T>(
                  {n, m, indptr.data(), indices.data(), values.data()}, options);
              sparse->step(k, naive);
              CHECK(same(finish(*sparse), want));
            }
          }
        }
      }
    }
  }
}

// step_among() all open candidates is a greedy step; among one candidate, it picks that one.
template <class T>
void test_step_among() {
  const auto x = samples::clustered<T>(97, 5, 1);
  const Problem<T> problem(x, nullptr, Metric::kCosine, {}, {3});
  const Result want = problem.expected(10);
  for (const int64_t budget : {0, 1 << 22}) {
    const auto run = problem.start(2, budget);
    for (int64_t pick = 0; pick < 10; ++pick) {
      std::vector<int64_t> open;
      for (int64_t j = 96; j >= 0; --j)
        if (run->is_open(j)) open.push_back(j);
      if (pick % 2 == 0) {
        CHECK_EQUAL(run->step_among(open.data(), static_cast<int64_t>(open.size())), want.indices[pick]);
      } else {
        run->step(1, false);
      }
    }
    CHECK(same(finish(*run), want));
    const int64_t last = run->is_open(96) ? 96 : 95;
    CHECK_EQUAL(run->step_among(&last, 1), last);
    CHECK_EQUAL(finish(*run).indices.back(), last);
  }
}

// A cancelled run continues at the place it had reached and ends as if nothing had happened.
template <class T>
void test_cancellation() {
  const auto x = samples::clustered<T>(300, 9, 1);
  const Problem<T> problem(x, nullptr, Metric::kEuclidean, {}, {});
  const Result want = problem.expected(40);
  for (const int64_t budget : {0, 1 << 22}) {
    bool asked = false;
    auto options = problem.options(2, budget);
    options.poll = [&] { return asked; };
    const auto run = fc::facility_location_points<T>(x.view(), nullptr, Metric::kEuclidean, options);
    for (const int64_t until : {0, 7, 20}) {
      run->step(until - run->picks(), false);
      asked = true;
      std::this_thread::sleep_for(std::chrono::milliseconds(60));  // polls are 50 ms apart
      CHECK_THROWS(run->step(40, false), fc::Cancelled);
      asked = false;
    }
    run->step(40 - run->picks(), false);
    CHECK(same(finish(*run), want));
  }
}

template <class T>
void test_bad_values() {
  for (const T bad : {std::numeric_limits<T>::quiet_NaN(), std::numeric_limits<T>::infinity(),
                      -std::numeric_limits<T>::infinity()}) {
    auto x = samples::normal<T>(50, 4, 1);
    const auto y = samples::normal<T>(20, 4, 2);
    x(33, 1) = bad;
    const auto x_view = x.view(), y_view = y.view();
    for (const Metric metric : kMetrics) {
      GreedyOptions options;
      options.offset = 10;
      const auto candidates = fc::facility_location_points<T>(x_view, &y_view, metric, options);
      const auto clients = fc::facility_location_points<T>(y_view, &x_view, metric, options);
      std::string message;
      try {
        candidates->step(1, false);
      } catch (const std::invalid_argument& error) {
        message = error.what();
      }
      CHECK(message.find("x ") == 0 && message.find("row 33, column 1") != std::string::npos);
      CHECK_THROWS(clients->step(1, false), std::invalid_argument);
      CHECK_THROWS(clients->step(1, false), std::invalid_argument);
    }
    CHECK_THROWS(fc::facility_location_matrix<T>(x_view, {})->step(1, false), std::invalid_argument);
    const std::vector<int64_t> indptr{0, 1, 2}, indices{0, 1};
    const std::vector<T> values{1, bad};
    CHECK_THROWS(fc::facility_location_sparse<T>({2, 2, indptr.data(), indices.data(), values.data()}, {})
                     ->step(1, false),
                 std::invalid_argument);
  }
}

// Row pointers and columns that point elsewhere are refused before anything is read through them.
template <class T>
void test_bad_sparse() {
  const std::vector<T> values{1, 2};
  const std::vector<int64_t> columns{0, 1};
  const auto refused = [&](std::vector<int64_t> indptr, std::vector<int64_t> indices) {
    const int64_t n = static_cast<int64_t>(indptr.size()) - 1;
    CHECK_THROWS(fc::facility_location_sparse<T>({n, 2, indptr.data(), indices.data(), values.data()}, {})
                     ->step(1, false),
                 std::invalid_argument);
  };
  refused({0, 2, 1, 2}, columns);
  refused({0, -1, 2}, columns);
  refused({1, 1, 2}, columns);
  refused({0, int64_t{1} << 40, 2}, columns);
  refused({0, 1, 2}, {0, 2});
  refused({0, 1, 2}, {-1, 1});
}

// Gains that add up beyond the range of double cannot be compared: refused.
void test_overflow() {
  Matrix<double> s(2, 2);
  for (double& value : s.values()) value = 1e308;
  CHECK_THROWS(fc::facility_location_matrix<double>(s.view(), {})->step(1, false), std::invalid_argument);
  GreedyOptions options;
  options.offset = 1e308;
  const auto x = samples::normal<double>(2, 2, 1);
  CHECK_THROWS(fc::facility_location_points<double>(x.view(), nullptr, Metric::kL1, options)->step(1, false),
               std::invalid_argument);
  // Just within the range.
  for (double& value : s.values()) value = 1e153;
  CHECK_EQUAL(fc::facility_location_points<double>(s.view(), nullptr, Metric::kDot, {})->step(1, false), 1);
}

template <class T>
void test_all() {
  test_points<T>();
  test_larger<T>();
  test_exhausting<T>();
  test_matrices<T>();
  test_step_among<T>();
  test_cancellation<T>();
  test_bad_values<T>();
  test_bad_sparse<T>();
}

}  // namespace

// Sizes that no memory holds, and rows whose sums would leave the range of fixed-point numbers.
void test_sparse_of_any_size() {
  const std::vector<int64_t> indptr{0, 2}, once{0, 2}, twice{1, 1};
  const std::vector<float> values{1, 1};
  for (const int64_t m : {int64_t{1} << 61, int64_t{1} << 62}) {
    CHECK_THROWS(fc::facility_location_sparse<float>({1, m, indptr.data(), once.data(), values.data()}, {})
                     ->step(1, false),
                 std::bad_alloc);
  }
  CHECK_THROWS(fc::facility_location_sparse<float>({1, 3, indptr.data(), twice.data(), values.data()}, {})
                   ->step(1, false),
               std::invalid_argument);
}

TEST_PROGRAM {
  test_all<float>();
  test_all<double>();
  test_overflow();
  test_sparse_of_any_size();
  return check::verdict("facility_location");
}
