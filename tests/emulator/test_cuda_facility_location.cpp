// The CUDA kernels of facility location and pairwise distances, run by the emulator under every schedule: the
// values and picks of the CPU kernels.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <utility>
#include <vector>

#include "check.h"
#include "core/threads.h"
#include "cpu/facility_location.h"
#include "cpu/pairwise.h"
#include "cuda/facility_location.h"
#include "cuda/pairwise.h"
#include "emulator/device_array.h"
#include "emulator/schedules.h"
#include "greedy_oracle.h"
#include "samples.h"

namespace {

using fc::Metric;
using fc::TensorView;
using fc::cuda::Verdict;
using fc::emulator::DeviceArray;
using samples::Matrix;

constexpr Metric kMetrics[] = {Metric::kCosine, Metric::kDot, Metric::kEuclidean, Metric::kSqeuclidean,
                               Metric::kL1};

template <class T>
struct OnDevice {
  DeviceArray<T> data;
  TensorView<const T, 2> view;
  explicit OnDevice(const Matrix<T>& x)
      : data(x.values()), view(TensorView<const T, 2>::compact(data.data(), x.rows(), x.cols())) {}
};

struct Case {
  int64_t k;
  double offset = 0;
  std::vector<double> weights = {};
  std::vector<int64_t> preselected = {};
  bool naive = false;
  int64_t sample = 0;  // of the candidates 0, 3, 6, ... for one pick each
  int64_t work_at_once = 0;
  bool limited = false;  // by costs, and by candidates that are closed
};

std::vector<double> costs_of(const Case& c, int64_t n) {
  std::vector<double> costs;
  for (int64_t j = 0; c.limited && j < n; ++j) costs.push_back(0.5 + static_cast<double>(j * 7 % 5));
  return costs;
}

// Everything a run returns, as one row of numbers: indices, gains, weights, assignment, objective, verdict.
using Row = std::vector<double>;

std::vector<int64_t> sample_of(const Case& c, int64_t n, const std::vector<int64_t>& taken) {
  std::vector<int64_t> sample;
  for (int64_t j = 0; j < n; j += 3) {
    bool free = true;
    for (const int64_t t : taken) free = free && t != j;
    for (const int64_t t : c.preselected) free = free && t != j;
    if (free) sample.push_back(j);
  }
  return sample;
}

// `device` runs step_among on a copy of the sample in device memory.
template <class Run, class Among>
void make_picks(Run& run, const Case& c, Among&& among) {
  std::vector<int64_t> taken;
  for (int64_t p = 0; p < c.sample; ++p) taken.push_back(among(sample_of(c, run.candidates(), taken)));
  if (c.limited) {
    const int64_t closed[] = {1, 4, 1};
    run.close(closed, 3);
    const int64_t first = run.pick(c.naive, 0);
    CHECK(first >= 0);
    CHECK_EQUAL(run.pick(c.naive, 1e300), -1);
    const int64_t more[] = {first, 9};  // what is picked stays so
    run.close(more, 2);
    CHECK(run.pick(false, 0) >= 0);
  }
  // In two steps, so that state is carried from one launch to the next.
  run.step((c.k - c.sample) / 2, c.naive);
  run.step(c.k - run.picks(), c.naive);
}

Row row_of(const std::vector<int64_t>& indices, const std::vector<double>& gains,
           const std::vector<double>& weights, const std::vector<int64_t>& assignment, double objective) {
  Row row(indices.begin(), indices.end());
  row.insert(row.end(), gains.begin(), gains.end());
  row.insert(row.end(), weights.begin(), weights.end());
  row.insert(row.end(), assignment.begin(), assignment.end());
  row.push_back(objective);
  return row;
}

// `offset` becomes what distances were subtracted from: the device leaves out what is far above them all.
Row finish_on_device(fc::cuda::FacilityLocation& run, double& offset) {
  const int64_t k = run.picks(), m = run.clients();
  DeviceArray<int64_t> indices(k), assignment(m);
  DeviceArray<double> gains(k), weights(k);
  double objective = 0;
  run.finish(indices.data(), gains.data(), weights.data(), assignment.data(), &objective, &offset);
  CHECK_EQUAL(static_cast<int>(run.verdict().kind), static_cast<int>(Verdict::kFine));
  return row_of(indices.values(), gains.values(), weights.values(), assignment.values(), objective);
}

template <class T, class Start>
Row run_on_device(const Case& c, int64_t n, bool self, double& offset, Start&& start) {
  const DeviceArray<double> weights(c.weights);
  const DeviceArray<int64_t> preselected(c.preselected);
  fc::GreedyOptions options;
  options.weights = c.weights.empty() ? nullptr : weights.data();
  options.preselected = preselected.data();
  options.preselected_count = static_cast<int64_t>(c.preselected.size());
  options.offset = c.offset;
  options.self_clients = self;
  options.work_at_once = c.work_at_once;
  const DeviceArray<double> costs(costs_of(c, n));
  if (c.limited) options.costs = costs.data();
  const auto run = start(options);
  make_picks(*run, c, [&](const std::vector<int64_t>& sample) {
    const DeviceArray<int64_t> copy(sample);
    return run->step_among(copy.data(), static_cast<int64_t>(sample.size()));
  });
  return finish_on_device(*run, offset);
}

template <class T, class Start>
Row run_on_cpu(const Case& c, int64_t n, bool self, Start&& start) {
  fc::GreedyOptions options = oracle::options_of(c.weights, c.preselected);
  options.offset = c.offset;
  options.self_clients = self;
  const std::vector<double> costs = costs_of(c, n);
  if (c.limited) options.costs = costs.data();
  const auto run = start(options);
  make_picks(*run, c, [&](const std::vector<int64_t>& sample) {
    return run->step_among(sample.data(), static_cast<int64_t>(sample.size()));
  });
  const int64_t k = run->picks();
  std::vector<int64_t> indices(k), assignment(run->clients());
  std::vector<double> gains(k), weights(k);
  const double objective = run->finish(indices.data(), gains.data(), weights.data(), assignment.data());
  return row_of(indices, gains, weights, assignment, objective);
}

// Picks, gains and assignment are the same. Won weights and f(S) may differ in the last bits of a double:
// sums of these depend on their order.
void check_same(const Row& device, const Row& cpu, int64_t k) {
  CHECK_EQUAL(device.size(), cpu.size());
  for (size_t i = 0; i < std::min(device.size(), cpu.size()); ++i) {
    const auto at = static_cast<int64_t>(i);
    const bool real = (at >= 2 * k && at < 3 * k) || i + 1 == cpu.size();
    CHECK(std::fabs(device[i] - cpu[i]) <= (real ? 1e-14 * std::fabs(cpu[i]) : 0));
  }
}

// The largest distance of a row of x from a row of y.
template <class T>
double farthest(const Matrix<T>& x, const Matrix<T>& y, Metric metric) {
  Matrix<T> distances(x.rows(), y.rows());
  fc::ThreadTeam team(1);
  fc::pairwise<T>(x.view(), y.view(), metric, false, distances.writable(), team);
  const auto values = distances.values();
  return *std::max_element(values.begin(), values.end());
}

template <class T>
void check_points(const Matrix<T>& x, const Matrix<T>* clients, Metric metric, const Case& c) {
  double offset = 0;
  const auto device = fc::emulator::check_schedules([&] {
    const OnDevice<T> candidates(x), others(clients ? *clients : x);
    return run_on_device<T>(c, x.rows(), clients == nullptr, offset, [&](const fc::GreedyOptions& options) {
      return fc::cuda::facility_location_points<T>(candidates.view, clients ? &others.view : nullptr, metric,
                                                   options, nullptr);
    });
  });
  Case same = c;
  if (c.offset > 0) {
    CHECK(offset == c.offset || (offset < c.offset && offset >= farthest(x, clients ? *clients : x, metric)));
    same.offset = offset;
  }
  const auto cpu = run_on_cpu<T>(same, x.rows(), clients == nullptr, [&](const fc::GreedyOptions& options) {
    const TensorView<const T, 2> view = clients ? clients->view() : x.view();
    return fc::facility_location_points<T>(x.view(), clients ? &view : nullptr, metric, options);
  });
  check_same(device, cpu, c.k);
}

// Each way of calling with one of the metrics: which tile routine serves it does not depend on the call.
template <class T>
void test_points() {
  for (const auto& [n, d] : {std::pair<int64_t, int64_t>{1, 1}, {7, 3}, {140, 16}}) {
    const int64_t k = std::min<int64_t>(n, 5);
    const auto points = samples::clustered<T>(n, d, 1);
    const auto clients = samples::clustered<T>(n / 2 + 1, d, 2);
    std::vector<double> weights(clients.rows());
    for (size_t i = 0; i < weights.size(); ++i) weights[i] = 0.25 * static_cast<double>(i % 5);
    check_points<T>(points, nullptr, Metric::kCosine, {k});
    check_points<T>(points, nullptr, Metric::kDot, {std::min<int64_t>(n, 3), 0, {}, {}, true});
    if (n > 20) {
      for (const bool naive : {false, true})
        check_points<T>(points, &clients, Metric::kDot, {9, 0, weights, {2}, naive, 1, 0, true});
    }
    check_points<T>(points, &clients, Metric::kEuclidean, {k, 50.0 * static_cast<double>(d), weights});
    if (n > 20) {
      check_points<T>(points, nullptr, Metric::kL1, {k, 800, {}, {3, 11}});
      check_points<T>(points, nullptr, Metric::kSqeuclidean, {k, 1e4, {}, {5}, false, 2});
    }
  }
  // Chains of features that are restarted, several tiles of clients, and rounds that sweep.
  const auto x = samples::clustered<T>(150, 300, 1);
  check_points<T>(x, nullptr, Metric::kCosine, {4});
  // In many launches, a sweep of all candidates in two.
  const auto many = samples::clustered<T>(140, 3, 4);
  check_points<T>(many, nullptr, Metric::kSqeuclidean, {4, 1e4, {}, {5, 7}, false, 1, 1});
  check_points<T>(many, nullptr, Metric::kDot, {2, 0, {}, {}, true, 0, 1});
  // Every candidate, duplicates among them: zero gains, the lowest index first.
  auto twice = samples::clustered<T>(20, 2, 3);
  for (int64_t i = 10; i < 20; ++i) {
    for (int64_t k = 0; k < 2; ++k) twice(i, k) = twice(i - 10, k);
  }
  check_points<T>(twice, nullptr, Metric::kCosine, {20});
}

template <class T>
void test_matrix() {
  for (const auto& [n, m] : {std::pair<int64_t, int64_t>{1, 1}, {60, 60}, {33, 200}, {200, 33}}) {
    const auto s = samples::normal<T>(n, m, 4);
    for (const bool naive : {false, true}) {
      const Case c{
          std::min<int64_t>(n, 10), 0, {}, n > 3 ? std::vector<int64_t>{2} : std::vector<int64_t>{}, naive};
      const auto cpu = run_on_cpu<T>(c, n, n == m, [&](const fc::GreedyOptions& options) {
        return fc::facility_location_matrix<T>(s.view(), options);
      });
      const auto device = fc::emulator::check_schedules([&] {
        const OnDevice<T> matrix(s);
        double offset = 0;
        return run_on_device<T>(c, n, n == m, offset, [&](const fc::GreedyOptions& options) {
          return fc::cuda::facility_location_matrix<T>(matrix.view, options, nullptr);
        });
      });
      check_same(device, cpu, c.k);
    }
  }
}

template <class T>
void test_pairwise() {
  for (const Metric metric : kMetrics) {
    for (const auto& [n, m, d] : {std::array<int64_t, 3>{1, 1, 1}, {5, 130, 17}, {70, 65, 257}}) {
      const auto x = samples::normal<T>(n, d, 1), y = samples::normal<T>(m, d, 2);
      Matrix<T> expected(n, m);
      fc::ThreadTeam team(1);
      fc::pairwise<T>(x.view(), y.view(), metric, false, expected.writable(), team);
      const auto values = fc::emulator::check_schedules([&] {
        const OnDevice<T> xs(x), ys(y);
        DeviceArray<T> out(n * m);
        fc::cuda::pairwise<T>(xs.view, ys.view, metric, TensorView<T, 2>::compact(out.data(), n, m), nullptr);
        return out.values();
      });
      CHECK(values == expected.values());
    }
  }
}

template <class T>
Verdict verdict_of(const Matrix<T>& x, Metric metric, const Case& c) {
  const OnDevice<T> points(x);
  const DeviceArray<double> weights(c.weights);
  const DeviceArray<int64_t> preselected(c.preselected);
  fc::GreedyOptions options;
  options.weights = c.weights.empty() ? nullptr : weights.data();
  options.preselected = preselected.data();
  options.preselected_count = static_cast<int64_t>(c.preselected.size());
  options.self_clients = true;
  const auto run = fc::cuda::facility_location_points<T>(points.view, nullptr, metric, options, nullptr);
  run->step(c.k, false);
  DeviceArray<int64_t> indices(run->picks()), assignment(run->clients());
  DeviceArray<double> gains(run->picks()), won(run->picks());
  double objective, offset;
  run->finish(indices.data(), gains.data(), won.data(), assignment.data(), &objective, &offset);
  return run->verdict();
}

template <class T>
void test_verdicts() {
  const auto x = samples::normal<T>(20, 5, 1);
  for (const T bad : {std::numeric_limits<T>::quiet_NaN(), std::numeric_limits<T>::infinity()}) {
    auto wrong = x;
    wrong(7, 2) = bad;
    wrong(11, 0) = bad;
    const Verdict verdict = verdict_of<T>(wrong, Metric::kCosine, {3});
    CHECK_EQUAL(static_cast<int>(verdict.kind), static_cast<int>(Verdict::kNotFinite));
    CHECK_EQUAL(verdict.row, 7);
    CHECK_EQUAL(verdict.column, 2);
  }
  std::vector<double> weights(20, 1.0);
  weights[4] = -1;
  Verdict verdict = verdict_of<T>(x, Metric::kCosine, {3, 0, weights});
  CHECK_EQUAL(static_cast<int>(verdict.kind), static_cast<int>(Verdict::kBadWeight));
  CHECK_EQUAL(verdict.row, 4);
  weights.assign(20, static_cast<double>(std::numeric_limits<T>::max()) / 10);
  verdict = verdict_of<T>(x, Metric::kCosine, {3, 0, weights});
  CHECK_EQUAL(static_cast<int>(verdict.kind), static_cast<int>(Verdict::kHeavyWeights));
  for (const int64_t again : {int64_t{6}, int64_t{20}, int64_t{-1}}) {
    verdict = verdict_of<T>(x, Metric::kCosine, {3, 0, {}, {6, again}});
    CHECK_EQUAL(static_cast<int>(verdict.kind), static_cast<int>(Verdict::kBadPreselected));
  }
  auto huge = x, tiny = x;
  for (T& value : huge.values()) value *= std::sqrt(std::numeric_limits<T>::max());
  for (T& value : tiny.values()) value *= std::sqrt(std::numeric_limits<T>::min()) / 8;
  CHECK_EQUAL(static_cast<int>(verdict_of<T>(huge, Metric::kDot, {3}).kind),
              static_cast<int>(Verdict::kOverflow));
  CHECK_EQUAL(static_cast<int>(verdict_of<T>(tiny, Metric::kDot, {3}).kind),
              static_cast<int>(Verdict::kVanishing));
}

// Between two launches the caller is asked, and a run that was stopped stays so.
template <class T>
void test_cancelled() {
  const auto x = samples::normal<T>(40, 3, 1);
  const OnDevice<T> points(x);
  const size_t before = fc::emulator::allocated_bytes();
  fc::emulator::Device slow;
  slow.event_delay = 1 << 30;
  for (const bool slowly : {false, true}) {
    int asked = 0;
    fc::GreedyOptions options;
    options.self_clients = true;
    options.work_at_once = 1;
    options.poll = [&] { return slowly && ++asked == 3; };
    const auto run =
        fc::cuda::facility_location_points<T>(points.view, nullptr, Metric::kCosine, options, nullptr);
    if (!slowly) {
      CHECK_EQUAL(run->step(20, false), 20);
      CHECK(run->completed() > 0 && run->completed() < 20);  // the last two launches are not waited for
      double offset = 0;
      finish_on_device(*run, offset);
      CHECK_EQUAL(run->completed(), 20);
      continue;
    }
    fc::emulator::set_device(slow);
    CHECK_THROWS(run->step(20, false), fc::Cancelled);
    CHECK_EQUAL(asked, 3);
    CHECK_EQUAL(run->completed(), 0);
    CHECK(run->picks() <= 3);
    fc::emulator::set_device({});
    const DeviceArray<int64_t> sample(std::vector<int64_t>{1});
    CHECK_THROWS(run->step(1, false), std::runtime_error);
    CHECK_THROWS(run->step_among(sample.data(), 1), std::runtime_error);
    CHECK_THROWS(run->finish(nullptr, nullptr, nullptr, nullptr, nullptr, nullptr), std::runtime_error);
  }
  CHECK_EQUAL(fc::emulator::allocated_bytes(), before);
}

// A grid has 65,535 blocks at most in its second dimension, and 2^31 rows are named, not cut short.
template <class T>
void test_sizes() {
  fc::emulator::Device narrow;
  narrow.largest_grid_y = 1;
  fc::emulator::set_device(narrow);
  const auto x = samples::normal<T>(3, 1, 1), y = samples::normal<T>(300, 1, 2);
  const OnDevice<T> xs(x), ys(y);
  DeviceArray<T> out(3 * 300);
  fc::cuda::pairwise<T>(xs.view, ys.view, Metric::kL1, TensorView<T, 2>::compact(out.data(), 3, 300),
                        nullptr);
  const std::vector<T> values = out.values();
  for (int64_t i = 0; i < 900; ++i) CHECK_EQUAL(values[i], std::fabs(x(i / 300, 0) - y(i % 300, 0)));
  fc::emulator::set_device({});

  const auto huge = TensorView<const T, 2>::compact(nullptr, (int64_t{1} << 31) - 1, 1);
  const auto result = TensorView<T, 2>::compact(nullptr, 3, huge.rows());
  CHECK_THROWS(fc::cuda::pairwise<T>(xs.view, huge, Metric::kL1, result, nullptr), std::invalid_argument);
  // Loops that step by whole grids must not overflow, either.
  const auto large = TensorView<const T, 2>::compact(nullptr, (int64_t{1} << 31) - (1 << 20), 1);
  CHECK_THROWS(fc::cuda::facility_location_points<T>(large, nullptr, Metric::kL1, {}, nullptr),
               std::invalid_argument);
}

// Bounds of the gains that a logarithm would round to a power of two.
template <class T>
void test_scale() {
  Matrix<T> s(3, 64);
  for (int64_t i = 0; i < 64; ++i) {
    s(0, i) = s(1, i) = T(1) + std::numeric_limits<T>::epsilon();
    s(2, i) = i == 0 ? 0 : std::ldexp(T(1), -55) * static_cast<T>(i);
  }
  const Case c{3};
  const auto cpu = run_on_cpu<T>(c, 3, false, [&](const fc::GreedyOptions& options) {
    return fc::facility_location_matrix<T>(s.view(), options);
  });
  const OnDevice<T> matrix(s);
  double offset = 0;
  const auto device = run_on_device<T>(c, 3, false, offset, [&](const fc::GreedyOptions& options) {
    return fc::cuda::facility_location_matrix<T>(matrix.view, options, nullptr);
  });
  check_same(device, cpu, 3);
}

template <class T>
void all() {
  test_pairwise<T>();
  test_points<T>();
  test_matrix<T>();
  test_verdicts<T>();
  test_cancelled<T>();
  test_sizes<T>();
  test_scale<T>();
}

}  // namespace

TEST_PROGRAM {
  all<float>();
  all<double>();
  return check::verdict("cuda_facility_location");
}
