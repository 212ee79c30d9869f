// The CUDA kernels of Sinkhorn, run by the emulator under every schedule: the definition's numbers, in shared
// memory and streamed.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

#include "check.h"
#include "core/sinkhorn_schedule.h"
#include "cuda/sinkhorn.cuh"
#include "cuda/sinkhorn.h"
#include "emulator/device_array.h"
#include "emulator/schedules.h"
#include "samples.h"

namespace {

using fc::Metric;
using fc::cuda::SinkhornVerdict;
using fc::emulator::DeviceArray;

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

struct Case {
  int64_t batch, n, m, d;
  Metric metric = Metric::kSqeuclidean;
  bool precomputed = false;
  double reg = 1;  // of the largest distance that the samples have, about
  double rho_a = kInfinity, rho_b = kInfinity;
  int64_t max_iter = 6;
  double tol = 0;
  bool ragged = false, zero_weights = false, warm = false, l2 = false;
};

// The arrays of a batch. In a ragged batch problem p lacks p rows and 2 p columns, and the padding is NaN.
template <class T>
struct Data {
  std::vector<T> x, y;
  std::vector<double> a, b, f, g;
  std::vector<int64_t> x_lengths, y_lengths;

  explicit Data(const Case& c) {
    const auto points = samples::normal<T>(c.batch * c.n, c.d, 1),
               others = samples::normal<T>(c.batch * c.m, c.d, 2);
    x = points.values();
    y = others.values();
    if (c.precomputed) {
      const std::vector<T> px = x, py = y;
      x.assign(c.batch * c.n * c.m, T(0));
      for (int64_t p = 0; p < c.batch; ++p) {
        for (int64_t i = 0; i < c.n; ++i) {
          for (int64_t j = 0; j < c.m; ++j) {
            T sum = 0;
            for (int64_t k = 0; k < c.d; ++k) {
              const T gap = px[(p * c.n + i) * c.d + k] - py[(p * c.m + j) * c.d + k];
              sum += gap * gap;
            }
            x[(p * c.n + i) * c.m + j] = sum;
          }
        }
      }
    }
    samples::Random random(3);
    x_lengths.assign(c.batch, c.n);
    y_lengths.assign(c.batch, c.m);
    a.assign(c.batch * c.n, kNaN);
    b.assign(c.batch * c.m, kNaN);
    f.assign(c.batch * c.n, kNaN);
    g.assign(c.batch * c.m, kNaN);
    for (int64_t p = 0; p < c.batch; ++p) {
      if (c.ragged) {
        x_lengths[p] = std::max<int64_t>(c.n - p, 1);
        y_lengths[p] = std::max<int64_t>(c.m - 2 * p, 1);
      }
      fill(a, f, p * c.n, x_lengths[p], c.zero_weights, random);
      fill(b, g, p * c.m, y_lengths[p], c.zero_weights, random);
    }
    if (c.precomputed) {
      for (int64_t p = 0; p < c.batch; ++p) {
        for (int64_t i = 0; i < c.n; ++i) {
          for (int64_t j = 0; j < c.m; ++j) {
            if (i >= x_lengths[p] || j >= y_lengths[p]) x[(p * c.n + i) * c.m + j] = static_cast<T>(kNaN);
          }
        }
      }
    } else {
      pad(x, x_lengths, c.n, c.d);
      pad(y, y_lengths, c.m, c.d);
    }
  }

 private:
  static void fill(std::vector<double>& weights, std::vector<double>& potentials, int64_t first,
                   int64_t count, bool zeros, samples::Random& random) {
    double sum = 0;
    for (int64_t l = first; l < first + count; ++l) {
      weights[l] = zeros && (l - first) % 3 == 1 ? 0 : 0.1 + random.uniform();
      potentials[l] = random.uniform();
      sum += weights[l];
    }
    for (int64_t l = first; l < first + count; ++l) weights[l] /= sum;
  }
  static void pad(std::vector<T>& points, const std::vector<int64_t>& lengths, int64_t rows, int64_t d) {
    for (size_t p = 0; p < lengths.size(); ++p) {
      for (int64_t at = lengths[p] * d; at < rows * d; ++at) {
        points[static_cast<int64_t>(p) * rows * d + at] = static_cast<T>(kNaN);
      }
    }
  }
};

template <class T>
double cost_of(const Case& c, const Data<T>& data, int64_t p, int64_t i, int64_t j) {
  if (c.precomputed) return data.x[(p * c.n + i) * c.m + j];
  double dot = 0, xx = 0, yy = 0, square = 0, absolute = 0;
  for (int64_t k = 0; k < c.d; ++k) {
    const double u = data.x[(p * c.n + i) * c.d + k], v = data.y[(p * c.m + j) * c.d + k];
    dot += u * v;
    xx += u * u;
    yy += v * v;
    square += (u - v) * (u - v);
    absolute += std::fabs(u - v);
  }
  if (c.metric == Metric::kCosine) return 1 - (xx > 0 && yy > 0 ? dot / std::sqrt(xx * yy) : 0);
  if (c.metric == Metric::kL1) return absolute;
  return c.metric == Metric::kEuclidean ? std::sqrt(square) : square;
}

double log_sum_exp(const std::vector<double>& terms) {
  const double most = *std::max_element(terms.begin(), terms.end());
  double sum = 0;
  for (const double t : terms) sum += std::exp(t - most);
  return most + std::log(sum);
}

// A batch's numbers: f, g (0 in the padding), and five for each problem: value, cost, error, iterations.
using Row = std::vector<double>;

// The definition, in the log domain throughout; runs that are neither annealed nor checked before their end.
template <class T>
Row expected(const Case& c, const Data<T>& data) {
  Row row((c.n + c.m) * c.batch + 4 * c.batch, 0.0);
  for (int64_t p = 0; p < c.batch; ++p) {
    const int64_t n = data.x_lengths[p], m = data.y_lengths[p];
    const double *a = data.a.data() + p * c.n, *b = data.b.data() + p * c.m;
    std::vector<double> f(n, 0.0), g(m, 0.0);
    if (c.warm) {
      f.assign(data.f.begin() + p * c.n, data.f.begin() + p * c.n + n);
      g.assign(data.g.begin() + p * c.m, data.g.begin() + p * c.m + m);
    }
    const double damp_a = std::isinf(c.rho_a) ? 1 : c.rho_a / (c.rho_a + c.reg);
    const double damp_b = std::isinf(c.rho_b) ? 1 : c.rho_b / (c.rho_b + c.reg);
    const auto row_sum = [&](int64_t i) {
      std::vector<double> terms(m);
      for (int64_t j = 0; j < m; ++j)
        terms[j] = (f[i] + g[j] - cost_of(c, data, p, i, j)) / c.reg + std::log(b[j]);
      return log_sum_exp(terms);
    };
    const auto column_sum = [&](int64_t j) {
      std::vector<double> terms(n);
      for (int64_t i = 0; i < n; ++i)
        terms[i] = (f[i] + g[j] - cost_of(c, data, p, i, j)) / c.reg + std::log(a[i]);
      return log_sum_exp(terms);
    };
    for (int64_t iteration = 0; iteration < c.max_iter; ++iteration) {
      std::vector<double> moved(n), sums(m);
      for (int64_t i = 0; i < n; ++i) moved[i] = damp_a * (f[i] - c.reg * row_sum(i));
      f = moved;
      for (int64_t j = 0; j < m; ++j) sums[j] = column_sum(j);
      for (int64_t j = 0; j < m; ++j) g[j] = damp_b * (g[j] - c.reg * sums[j]);
    }
    if (std::isinf(c.rho_b) && !std::isinf(c.rho_a)) {
      // The best constant, which does not change the plan.
      double asked = 0, mass = 0;
      for (int64_t i = 0; i < n; ++i) asked += a[i] > 0 ? a[i] * std::exp(-f[i] / c.rho_a) : 0;
      for (int64_t j = 0; j < m; ++j) mass += b[j];
      const double constant = c.rho_a * std::log(asked / mass);
      for (double& potential : f) potential += constant;
      for (double& potential : g) potential -= constant;
    }
    double value = 0, cost = 0, error = 0, mass = 0, mass_a = 0, mass_b = 0;
    std::vector<double> row_sums(n), column_sums(m);
    for (int64_t i = 0; i < n; ++i) row_sums[i] = row_sum(i);
    for (int64_t j = 0; j < m; ++j) column_sums[j] = column_sum(j);
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = 0; j < m; ++j) {
        const double of = cost_of(c, data, p, i, j);
        cost += a[i] * b[j] * std::exp((f[i] + g[j] - of) / c.reg) * of;
      }
    }
    for (int64_t i = 0; i < n; ++i) {
      const double now = a[i] > 0 ? a[i] * std::exp(row_sums[i]) : 0;
      mass += now;
      mass_a += a[i];
      error += std::fabs(now - a[i] * std::exp(-f[i] / c.rho_a));
      if (!(a[i] > 0)) f[i] = damp_a * (f[i] - c.reg * row_sums[i]);
      value += a[i] * (std::isinf(c.rho_a) ? f[i] : -c.rho_a * std::expm1(-f[i] / c.rho_a));
    }
    for (int64_t j = 0; j < m; ++j) {
      const double now = b[j] > 0 ? b[j] * std::exp(column_sums[j]) : 0;
      error += std::fabs(now - b[j] * std::exp(-g[j] / c.rho_b));
      mass_b += b[j];
      if (!(b[j] > 0)) g[j] = damp_b * (g[j] - c.reg * column_sums[j]);
      value += b[j] * (std::isinf(c.rho_b) ? g[j] : -c.rho_b * std::expm1(-g[j] / c.rho_b));
    }
    value -= c.reg * (mass - mass_a * mass_b);
    std::copy(f.begin(), f.end(), row.begin() + p * c.n);
    std::copy(g.begin(), g.end(), row.begin() + c.batch * c.n + p * c.m);
    double* const numbers = row.data() + c.batch * (c.n + c.m) + 4 * p;
    numbers[0] = value;
    numbers[1] = cost;
    numbers[2] = error;
    numbers[3] = static_cast<double>(c.max_iter);
  }
  return row;
}

// A batch in device memory.
template <class T>
struct OnDevice {
  DeviceArray<T> x, y;
  DeviceArray<double> a, b, f, g;
  DeviceArray<int64_t> x_lengths, y_lengths;
  fc::cuda::SinkhornBatch<T> problems;

  OnDevice(const Case& c, const Data<T>& data)
      : x(data.x),
        y(data.y),
        a(data.a),
        b(data.b),
        f(data.f),
        g(data.g),
        x_lengths(data.x_lengths),
        y_lengths(data.y_lengths) {
    problems.x = x.data();
    problems.y = c.precomputed ? nullptr : y.data();
    problems.batch = c.batch;
    problems.n = c.n;
    problems.m = c.m;
    problems.d = c.precomputed ? 0 : c.d;
    problems.metric = c.metric;
    problems.a = a.data();
    problems.b = b.data();
    if (c.ragged) {
      problems.x_lengths = x_lengths.data();
      problems.y_lengths = y_lengths.data();
    }
  }
};

template <class T>
Row run(const Case& c, const Data<T>& data, int64_t shared_bytes, SinkhornVerdict* verdict = nullptr) {
  const OnDevice<T> device(c, data);
  const std::vector<double> zeros(c.batch * std::max(c.n, c.m), 0.0);
  const DeviceArray<double> f(std::vector<double>(zeros.begin(), zeros.begin() + c.batch * c.n)),
      g(std::vector<double>(zeros.begin(), zeros.begin() + c.batch * c.m)), value(c.batch), cost(c.batch),
      error(c.batch), tol(c.batch);
  const DeviceArray<int64_t> iterations(c.batch);
  fc::cuda::SinkhornOptions options;
  options.reg = c.reg;
  options.rho_a = c.rho_a;
  options.rho_b = c.rho_b;
  options.tol = c.tol;
  options.max_iter = c.max_iter;
  options.l2 = c.l2;
  options.shared_bytes = shared_bytes;
  if (c.warm) {
    options.f = device.f.data();
    options.g = device.g.data();
  }
  const SinkhornVerdict found = fc::cuda::sinkhorn<T>(
      device.problems, options,
      {f.data(), g.data(), value.data(), cost.data(), error.data(), tol.data(), iterations.data()});
  if (verdict != nullptr) {
    *verdict = found;
    return {};
  }
  CHECK_EQUAL(static_cast<int>(found.kind), static_cast<int>(SinkhornVerdict::kFine));
  Row row = f.values();
  const Row columns = g.values(), values = value.values(), costs = cost.values(), errors = error.values();
  const std::vector<int64_t> made = iterations.values();
  row.insert(row.end(), columns.begin(), columns.end());
  for (int64_t p = 0; p < c.batch; ++p) {
    row.insert(row.end(), {values[p], costs[p], errors[p], static_cast<double>(made[p])});
  }
  return row;
}

void check_near(const Row& got, const Row& want, double tolerance) {
  CHECK_EQUAL(got.size(), want.size());
  double worst = 0;
  for (size_t i = 0; i < std::min(got.size(), want.size()); ++i) {
    worst = std::max(worst, std::fabs(got[i] - want[i]) / (1 + std::fabs(want[i])));
    if (std::isnan(got[i])) worst = kInfinity;
  }
  CHECK(worst <= tolerance);
  if (!(worst <= tolerance)) std::fprintf(stderr, "  off by %g\n", worst);
}

// Shared memory for all of a case's problems, for none, and for some of a ragged batch.
template <class T>
void check_case(const Case& c, const std::vector<int64_t>& shared = {-1, 0}) {
  const Data<T> data(c);
  const Row want = expected(c, data);
  for (const int64_t bytes : shared) {
    const Row got = fc::emulator::check_schedules([&] { return run<T>(c, data, bytes); });
    // Rounding of the costs, some units in the last place of numbers up to 50 with d features.
    check_near(got, want, sizeof(T) == 4 ? 2e-5 : 1e-13);
  }
}

template <class T>
void test_iterations() {
  constexpr Metric kMetrics[] = {Metric::kSqeuclidean, Metric::kEuclidean, Metric::kL1, Metric::kCosine};
  for (const Metric metric : kMetrics) {
    Case c{2, 7, 5, 3, metric};
    c.max_iter = 3;
    c.reg = 0.5;
    check_case<T>(c);
  }
  check_case<T>({1, 1, 1, 1});
  Case c{1, 70, 33, 2};
  c.max_iter = 3;
  check_case<T>(c);
  c.precomputed = true;
  check_case<T>(c);
  // Several strips of tiles, and more of them than blocks.
  c = {1, 35, 260, 2};
  c.max_iter = 2;
  check_case<T>(c, {0});
}

template <class T>
void test_variants() {
  Case c{3, 9, 11, 2};
  c.ragged = c.zero_weights = true;
  c.rho_a = 1;
  check_case<T>(c);
  c.rho_b = 0.5;
  c.warm = true;
  check_case<T>(c);
  c.rho_a = c.rho_b = kInfinity;
  c.precomputed = true;
  check_case<T>(c);
  // Five problems; the larger ones are streamed, by fewer teams than there are problems.
  c = {5, 9, 11, 2};
  c.ragged = true;
  c.max_iter = 2;
  check_case<T>(c, {fc::cuda::resident_bytes<T>(7, 7), 0});
}

// Groups of points, `barrier` apart from the next, and but for weights of `light` all mass in the first row
// group and the last column group: in a dozen iterations potentials move by hundreds of reg, while the matrix
// is resident.
template <class T>
void check_barriers(int64_t groups, double barrier, double light) {
  Case c{1, 12, 10, 1};
  c.precomputed = true;
  c.reg = 1;
  c.max_iter = 12;
  Data<T> data(c);
  for (int64_t i = 0; i < c.n; ++i) {
    const int64_t group = i * groups / c.n;
    data.a[i] = group == 0 ? 1 : light;
    for (int64_t j = 0; j < c.m; ++j) {
      const int64_t other = j * groups / c.m;
      data.b[j] = other == groups - 1 ? 1 : light;
      data.x[i * c.m + j] = static_cast<T>(barrier * static_cast<double>(std::abs(group - other)) +
                                           static_cast<double>((i * 7 + j * 3) % 5));
    }
  }
  for (std::vector<double>* weights : {&data.a, &data.b}) {
    double sum = 0;
    for (const double weight : *weights) sum += weight;
    for (double& weight : *weights) weight /= sum;
  }
  const Row want = expected(c, data);
  for (const int64_t bytes : {-1, 0}) {
    check_near(fc::emulator::check_schedules([&] { return run<T>(c, data, bytes); }), want,
               sizeof(T) == 4 ? 2e-6 : 1e-13);
  }
}

template <class T>
void test_absorption() {
  check_barriers<T>(5, 40, 1e-3);    // scalings leave their range, of rows and of columns
  check_barriers<T>(2, 400, 1e-60);  // sums leave their range
}

// Stopping, over-relaxation and annealing: the same number of iterations whichever kernel makes them.
template <class T>
void test_stopping() {
  Case c{2, 13, 9, 2};
  c.tol = 1e-4;
  c.max_iter = 300;
  c.reg = 0.3;
  c.ragged = true;
  constexpr std::pair<double, bool> kRuns[] = {{0.3, false}, {0.02, false}, {0.02, true}};
  for (const auto& [reg, l2] : kRuns) {
    c.reg = reg;
    c.l2 = l2;
    const Data<T> data(c);
    const Row resident = fc::emulator::check_schedules([&] { return run<T>(c, data, -1); });
    check_near(run<T>(c, data, 0), resident, sizeof(T) == 4 ? 2e-5 : 1e-11);
    for (int64_t p = 0; p < c.batch; ++p) {
      const double* const numbers = resident.data() + c.batch * (c.n + c.m) + 4 * p;
      CHECK(numbers[2] <= c.tol);
      CHECK(numbers[3] > 2 && numbers[3] < 300);
    }
  }
}

template <class T>
void test_plans() {
  for (const bool precomputed : {false, true}) {
    Case c{2, 70, 40, 3, Metric::kL1, precomputed};
    c.ragged = c.zero_weights = true;
    const Data<T> data(c);
    const int64_t k = 5;
    std::vector<double> f = data.f, g = data.g, v = samples::normal<double>(c.batch * c.m, k, 4).values(),
                        u = samples::normal<double>(c.batch * c.n, k, 5).values();
    Row plan(c.batch * c.n * c.m, 0.0), product(c.batch * c.n * k, 0.0), transposed(c.batch * c.m * k, 0.0);
    for (int64_t p = 0; p < c.batch; ++p) {
      for (int64_t i = 0; i < data.x_lengths[p]; ++i) {
        for (int64_t j = 0; j < data.y_lengths[p]; ++j) {
          const int64_t row = p * c.n + i, column = p * c.m + j;
          const double entry = data.a[row] * data.b[column] *
                               std::exp((f[row] + g[column] - cost_of(c, data, p, i, j)) / c.reg);
          plan[row * c.m + j] = entry;
          for (int64_t q = 0; q < k; ++q) {
            product[row * k + q] += entry * v[column * k + q];
            transposed[column * k + q] += entry * u[row * k + q];
          }
        }
      }
    }
    const double tolerance = sizeof(T) == 4 ? 2e-7 : 1e-15;
    const auto with_device = [&](int64_t size, auto&& call) {
      return fc::emulator::check_schedules([&] {
        const OnDevice<T> device(c, data);
        const DeviceArray<double> out(size);
        call(device, out.data());
        return out.values();
      });
    };
    check_near(with_device(plan.size(),
                           [&](const OnDevice<T>& on, double* out) {
                             fc::cuda::sinkhorn_plan<T>(on.problems, c.reg, on.f.data(), on.g.data(), out,
                                                        nullptr);
                           }),
               plan, tolerance);
    for (const bool transpose : {false, true}) {
      const DeviceArray<double> factors(transpose ? u : v);
      check_near(with_device((transpose ? transposed : product).size(),
                             [&](const OnDevice<T>& on, double* out) {
                               fc::cuda::sinkhorn_apply<T>(on.problems, c.reg, on.f.data(), on.g.data(),
                                                           factors.data(), k, transpose, out, nullptr);
                             }),
                 transpose ? transposed : product, tolerance);
    }
  }
}

template <class T, class Spoil>
SinkhornVerdict verdict_of(Case c, Spoil&& spoil) {
  Data<T> data(c);
  spoil(data);
  SinkhornVerdict verdict;
  run<T>(c, data, -1, &verdict);
  return verdict;
}

void check_verdict(const SinkhornVerdict& got, const SinkhornVerdict& want) {
  CHECK_EQUAL(static_cast<int>(got.kind), static_cast<int>(want.kind));
  CHECK_EQUAL(got.second, want.second);
  CHECK_EQUAL(got.problem, want.problem);
  CHECK_EQUAL(got.row, want.row);
  CHECK_EQUAL(got.column, want.column);
}

template <class T>
void test_verdicts() {
  Case c{3, 6, 8, 4};
  c.ragged = true;
  for (const double bad : {kNaN, kInfinity}) {
    check_verdict(verdict_of<T>(c, [&](Data<T>& data) { data.x[(1 * 6 + 3) * 4 + 2] = static_cast<T>(bad); }),
                  {SinkhornVerdict::kNotFinite, false, 1, 3, 2});
    check_verdict(verdict_of<T>(c, [&](Data<T>& data) { data.y[(2 * 8 + 1) * 4] = static_cast<T>(bad); }),
                  {SinkhornVerdict::kNotFinite, true, 2, 1, 0});
  }
  for (const double bad : {kNaN, kInfinity, -1.0}) {
    check_verdict(verdict_of<T>(c, [&](Data<T>& data) { data.b[1 * 8 + 5] = bad; }),
                  {SinkhornVerdict::kBadWeight, true, 1, 5, 0});
  }
  check_verdict(verdict_of<T>(c,
                              [&](Data<T>& data) {
                                for (int64_t i = 0; i < 5; ++i) data.a[1 * 6 + i] = 0;
                              }),
                {SinkhornVerdict::kNoWeight, false, 1, 0, 0});
  const auto heavier = [&](Data<T>& data) { data.a[2 * 6] += 2e-4; };
  check_verdict(verdict_of<T>(c, heavier), {SinkhornVerdict::kUnequalWeight, false, 2, 0, 0});
  Case unbalanced = c;
  unbalanced.rho_a = 1;
  check_verdict(verdict_of<T>(unbalanced, heavier), {});
  check_verdict(verdict_of<T>(c, [&](Data<T>& data) { data.x[0] = std::numeric_limits<T>::max() / 2; }),
                {SinkhornVerdict::kOverflow, false, 0, 0, 0});
  Case costs = c;
  costs.precomputed = true;
  check_verdict(
      verdict_of<T>(costs, [&](Data<T>& data) { data.x[(1 * 6 + 3) * 8 + 5] = static_cast<T>(kNaN); }),
      {SinkhornVerdict::kNotFinite, false, 1, 3, 5});
}

template <class T>
void all() {
  test_iterations<T>();
  test_variants<T>();
  test_absorption<T>();
  test_stopping<T>();
  test_plans<T>();
  test_verdicts<T>();
}

}  // namespace

TEST_PROGRAM {
  all<float>();
  all<double>();
  return check::verdict("cuda_sinkhorn");
}
