// Batched Sinkhorn: textbook iterations in double as the oracle, marginals at convergence, and one answer
// whatever the threads, the memory budget, the batch and the memory layout.
#include <atomic>
#include <cmath>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <vector>

#include "check.h"
#include "core/threads.h"
#include "cpu/sinkhorn.h"
#include "samples.h"

namespace {

using fc::SinkhornBatch;
using fc::SinkhornOptions;
using fc::TensorView;

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

struct Solved {
  std::vector<double> f, g, value, cost, error, tol;
  std::vector<int64_t> iterations;
};

// A batch with the arrays that it views: points in three dimensions, or costs; NaN beyond the sizes.
template <class T>
struct Case {
  int64_t count, n, m;
  std::vector<int64_t> rows, columns;
  std::vector<T> x, y;
  std::vector<double> a, b;
  SinkhornBatch<T> batch;

  Case(int64_t count_, int64_t n_, int64_t m_, bool costs, bool ragged, uint64_t seed)
      : count(count_), n(n_), m(m_) {
    samples::Random random(seed);
    const int64_t d = costs ? m : 3;
    x.assign(count * n * d, T(kNan));
    y.assign(costs ? 0 : count * m * d, T(kNan));
    a.assign(count * n, kNan);
    b.assign(count * m, kNan);
    for (int64_t p = 0; p < count; ++p) {
      rows.push_back(ragged ? 1 + random.below(n) : n);
      columns.push_back(ragged ? 1 + random.below(m) : m);
      for (int64_t i = 0; i < rows[p]; ++i) {
        const int64_t width = costs ? columns[p] : d;
        for (int64_t k = 0; k < width; ++k) x[(p * n + i) * d + k] = static_cast<T>(random.uniform());
      }
      for (int64_t j = 0; !costs && j < columns[p]; ++j) {
        for (int64_t k = 0; k < d; ++k) y[(p * m + j) * d + k] = static_cast<T>(random.uniform());
      }
      const auto weigh = [&](double* weights, int64_t size) {
        for (int64_t i = 0; i < size; ++i) weights[i] = 0.1 + random.uniform();
        const double sum = std::accumulate(weights, weights + size, 0.0);
        for (int64_t i = 0; i < size; ++i) weights[i] /= sum;
      };
      weigh(a.data() + p * n, rows[p]);
      weigh(b.data() + p * m, columns[p]);
    }
    batch.x = TensorView<const T, 3>::compact(static_cast<const T*>(x.data()), count, n, d);
    if (!costs) batch.y = TensorView<const T, 3>::compact(static_cast<const T*>(y.data()), count, m, d);
    batch.is_cost = costs;
    batch.a = TensorView<const double, 2>::compact(static_cast<const double*>(a.data()), count, n);
    batch.b = TensorView<const double, 2>::compact(static_cast<const double*>(b.data()), count, m);
    batch.x_lengths = rows.data();
    batch.y_lengths = columns.data();
  }

  double cost(int64_t p, int64_t i, int64_t j) const {
    if (batch.is_cost) return static_cast<double>(x[(p * n + i) * m + j]);
    double sum = 0;
    for (int64_t k = 0; k < 3; ++k) {
      const double t =
          static_cast<double>(x[(p * n + i) * 3 + k]) - static_cast<double>(y[(p * m + j) * 3 + k]);
      sum += t * t;
    }
    return sum;
  }

  Solved solve(const SinkhornOptions& options, int64_t step = INT64_MAX) const {
    Solved s;
    s.f.assign(count * n, 0.0);
    s.g.assign(count * m, 0.0);
    s.value.resize(count);
    s.cost.resize(count);
    s.error.resize(count);
    s.tol.resize(count);
    s.iterations.resize(count);
    fc::SinkhornResult result{TensorView<double, 2>::compact(s.f.data(), count, n),
                              TensorView<double, 2>::compact(s.g.data(), count, m)};
    result.value = s.value.data();
    result.transport_cost = s.cost.data();
    result.error = s.error.data();
    result.tol = s.tol.data();
    result.iterations = s.iterations.data();
    const auto run = fc::make_sinkhorn<T>(batch, result, options);
    int64_t done = 0;
    while (done < run->total()) {
      const int64_t before = done;
      done = run->step(step);
      CHECK(done > before);
    }
    return s;
  }
};

// The plan after `iterations` textbook iterations from g = 0.
template <class T>
std::vector<double> textbook(const Case<T>& c, int64_t p, double reg, int64_t iterations) {
  const int64_t n = c.rows[p], m = c.columns[p];
  std::vector<double> kernel(n * m), u(n), v(c.b.begin() + p * c.m, c.b.begin() + p * c.m + m);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < m; ++j) kernel[i * m + j] = std::exp(-c.cost(p, i, j) / reg);
  for (int64_t t = 0; t < iterations; ++t) {
    for (int64_t i = 0; i < n; ++i) {
      double sum = 0;
      for (int64_t j = 0; j < m; ++j) sum += kernel[i * m + j] * v[j];
      u[i] = c.a[p * c.n + i] / sum;
    }
    for (int64_t j = 0; j < m; ++j) {
      double sum = 0;
      for (int64_t i = 0; i < n; ++i) sum += kernel[i * m + j] * u[i];
      v[j] = c.b[p * c.m + j] / sum;
    }
  }
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < m; ++j) kernel[i * m + j] *= u[i] * v[j];
  return kernel;
}

template <class T>
std::vector<T> plans(const Case<T>& c, const Solved& s, double reg) {
  std::vector<T> out(c.count * c.n * c.m, T(0));
  fc::sinkhorn_plan<T>(c.batch, TensorView<const double, 2>::compact(s.f.data(), c.count, c.n),
                       TensorView<const double, 2>::compact(s.g.data(), c.count, c.m), reg,
                       TensorView<T, 3>::compact(out.data(), c.count, c.n, c.m), 2, nullptr);
  return out;
}

template <class T>
void check_iterations(int64_t n, int64_t m, bool costs, int64_t budget, uint64_t seed) {
  const Case<T> c(3, n, m, costs, seed % 2 == 1, seed);
  SinkhornOptions options;
  options.reg = 0.07;
  options.tol = 0;
  options.max_iter = 5;
  options.memory_budget = budget;
  options.threads = 2;
  const Solved s = c.solve(options);
  options.l2 = true;
  const Solved in_l2 = c.solve(options);
  CHECK(in_l2.f == s.f);
  CHECK(in_l2.g == s.g);
  const std::vector<T> plan = plans(c, s, options.reg);
  // Float: exponents of 30 from costs rounded to 6e-8 of 3. Worst seen 2e-6 of the mass.
  const double slack = sizeof(T) == 4 ? 1e-5 : 1e-12;
  for (int64_t p = 0; p < c.count; ++p) {
    const std::vector<double> expected = textbook(c, p, options.reg, options.max_iter);
    double off = 0, cost = 0, error = 0, squares[2] = {};
    std::vector<double> row(c.rows[p]), column(c.columns[p]);
    for (int64_t i = 0; i < c.rows[p]; ++i) {
      for (int64_t j = 0; j < c.columns[p]; ++j) {
        const double value = static_cast<double>(plan[(p * n + i) * m + j]);
        off += std::abs(value - expected[i * c.columns[p] + j]);
        cost += value * c.cost(p, i, j);
        row[i] += value;
        column[j] += value;
      }
    }
    for (int64_t i = 0; i < c.rows[p]; ++i) {
      error += std::abs(row[i] - c.a[p * n + i]);
      squares[0] += std::pow(row[i] - c.a[p * n + i], 2);
    }
    for (int64_t j = 0; j < c.columns[p]; ++j) {
      error += std::abs(column[j] - c.b[p * m + j]);
      squares[1] += std::pow(column[j] - c.b[p * m + j], 2);
    }
    CHECK(off <= slack);
    CHECK(std::abs(cost - s.cost[p]) <= slack);
    CHECK(std::abs(error - s.error[p]) <= slack / 10);
    CHECK(std::abs(std::sqrt(squares[0]) + std::sqrt(squares[1]) - in_l2.error[p]) <= slack / 10);
    CHECK_EQUAL(s.iterations[p], options.max_iter);
  }
}

template <class T>
void check_one_answer(bool costs, const double (&marginal)[2]) {
  const Case<T> c(7, 150, 90, costs, true, 5);
  SinkhornOptions options;
  options.reg = 0.02;
  options.rho_a = marginal[0];
  options.rho_b = marginal[1];
  options.tol = sizeof(T) == 4 ? 1e-5 : 1e-9;
  options.max_iter = 300;
  options.l2 = !std::isinf(marginal[0]);
  for (const int64_t budget : {int64_t{0}, int64_t{1} << 26}) {
    options.memory_budget = budget;
    options.threads = 1;
    const Solved first = c.solve(options);
    for (const int threads : {2, 5}) {
      options.threads = threads;
      for (const int64_t step : {INT64_MAX, int64_t{7}}) {
        const Solved other = c.solve(options, step);
        CHECK(other.f == first.f);
        CHECK(other.g == first.g);
        CHECK(other.value == first.value);
        CHECK(other.error == first.error);
        CHECK(other.iterations == first.iterations);
      }
    }
    for (const double value : first.value) CHECK(std::isfinite(value));
  }
}

// P v and P^T v against the plan.
template <class T>
void check_apply(bool costs) {
  const Case<T> c(2, 53, 77, costs, true, 9);
  SinkhornOptions options;
  options.reg = 0.1;
  const Solved s = c.solve(options);
  const std::vector<T> plan = plans(c, s, options.reg);
  const auto f = TensorView<const double, 2>::compact(s.f.data(), c.count, c.n);
  const auto g = TensorView<const double, 2>::compact(s.g.data(), c.count, c.m);
  const samples::Matrix<T> right = samples::normal<T>(c.count * c.m, 3, 1),
                           left = samples::normal<T>(c.count * c.n, 3, 2);
  std::vector<T> there(c.count * c.n * 3, T(0)), back(c.count * c.m * 3, T(0));
  fc::sinkhorn_apply<T>(c.batch, f, g, options.reg,
                        TensorView<const T, 3>::compact(right.values().data(), c.count, c.m, 3), false,
                        TensorView<T, 3>::compact(there.data(), c.count, c.n, 3), 2, nullptr);
  fc::sinkhorn_apply<T>(c.batch, f, g, options.reg,
                        TensorView<const T, 3>::compact(left.values().data(), c.count, c.n, 3), true,
                        TensorView<T, 3>::compact(back.data(), c.count, c.m, 3), 2, nullptr);
  const double slack = sizeof(T) == 4 ? 1e-6 : 1e-13;
  for (int64_t p = 0; p < c.count; ++p) {
    for (int64_t k = 0; k < 3; ++k) {
      for (int64_t i = 0; i < c.rows[p]; ++i) {
        double sum = 0;
        for (int64_t j = 0; j < c.columns[p]; ++j) {
          sum += static_cast<double>(plan[(p * c.n + i) * c.m + j]) * right.values()[(p * c.m + j) * 3 + k];
        }
        CHECK(std::abs(sum - there[(p * c.n + i) * 3 + k]) <= slack);
      }
      for (int64_t j = 0; j < c.columns[p]; ++j) {
        double sum = 0;
        for (int64_t i = 0; i < c.rows[p]; ++i) {
          sum += static_cast<double>(plan[(p * c.n + i) * c.m + j]) * left.values()[(p * c.n + i) * 3 + k];
        }
        CHECK(std::abs(sum - back[(p * c.m + j) * 3 + k]) <= slack);
      }
    }
  }
}

template <class T>
void check_extremes() {
  // Costs far above reg, a start far off, weights of 0: finite, and the columns of the last plan as asked
  // for.
  Case<T> c(4, 40, 30, true, true, 3);
  for (int64_t p = 0; p < c.count; ++p) {
    if (c.rows[p] > 2) c.a[p * c.n + 1] = 0;
    if (c.columns[p] > 2) c.b[p * c.m + 2] = 0;
    double mass[2] = {};
    for (int64_t i = 0; i < c.rows[p]; ++i) mass[0] += c.a[p * c.n + i];
    for (int64_t j = 0; j < c.columns[p]; ++j) mass[1] += c.b[p * c.m + j];
    for (int64_t j = 0; j < c.columns[p]; ++j) c.b[p * c.m + j] *= mass[0] / mass[1];
  }
  for (const double reg : {1e-6, 1e-3, 1e3}) {
    for (const int64_t iterations : {1, 2, 50}) {
      SinkhornOptions options;
      options.reg = reg;
      options.max_iter = iterations;
      options.memory_budget = int64_t{1} << 20;
      const Solved s = c.solve(options);
      for (const std::vector<double>* values : {&s.f, &s.g, &s.value, &s.cost, &s.error}) {
        for (const double value : *values) CHECK(std::isfinite(value));
      }
    }
  }
}

void check_refusals() {
  Case<float> c(2, 5, 4, false, false, 1);
  c.y[c.m * 3 + 2] = std::numeric_limits<float>::infinity();
  CHECK_THROWS(c.solve(SinkhornOptions{}), std::invalid_argument);
  const Case<double> large(1, 400, 400, true, false, 2);
  SinkhornOptions options;
  options.max_iter = 1 << 30;
  options.tol = 0;
  options.threads = 2;
  std::atomic<int> asked{0};
  options.poll = [&] { return ++asked > 2; };
  CHECK_THROWS(large.solve(options), fc::Cancelled);
  const Case<double> many(30, 60, 60, true, false, 2);
  options.memory_budget = int64_t{1} << 26;
  asked = 0;
  CHECK_THROWS(many.solve(options), fc::Cancelled);
}

template <class T>
void check_all(bool thorough) {
  uint64_t seed = 0;
  for (const int64_t n : {1, 7, 25, 97}) {
    for (const int64_t m : {1, 8, 33, 130}) {
      for (const int64_t budget : {int64_t{0}, int64_t{1} << 24}) {
        check_iterations<T>(n, m, seed % 3 == 0, budget, seed);
        ++seed;
      }
    }
  }
  if (thorough) check_iterations<T>(1300, 1100, false, int64_t{1} << 26, 2);
  constexpr double kInf = std::numeric_limits<double>::infinity();
  check_one_answer<T>(true, {kInf, kInf});
  check_one_answer<T>(false, {kInf, kInf});
  check_one_answer<T>(false, {0.3, kInf});
  check_apply<T>(true);
  check_apply<T>(false);
  check_extremes<T>();
}

}  // namespace

TEST_PROGRAM {
  check_all<float>(thorough);
  check_all<double>(thorough);
  check_refusals();
  return check::verdict("sinkhorn");
}
