// Exact transport against a plain min-cost flow by Bellman and Ford: solutions, exchanges that stand and
// exchanges that are taken back, bounds, and what does not depend on the number of threads.
#include <cmath>
#include <limits>
#include <numeric>
#include <random>
#include <vector>

#include "check.h"
#include "cpu/transport.h"

namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// The least transport cost of c [k, sinks]: units go along shortest paths in the residual graph, one path
// after the other.
double least_cost(const std::vector<double>& c, int64_t k, int64_t sinks) {
  const int64_t common = std::gcd(k, sinks), mass = sinks / common, share = k / common;
  std::vector<int64_t> x(k * sinks, 0), supply(k, mass), need(sinks, share);
  double total = 0;
  for (int64_t left = k * mass; left > 0;) {
    std::vector<double> source(k), sink(sinks, kInfinity);
    std::vector<int64_t> by_sink(k, -1), by_source(sinks, -1);
    for (int64_t s = 0; s < k; ++s) source[s] = supply[s] > 0 ? 0 : kInfinity;
    for (bool changed = true; changed;) {
      changed = false;
      for (int64_t s = 0; s < k; ++s) {
        for (int64_t v = 0; v < sinks; ++v) {
          const double cost = c[s * sinks + v];
          if (source[s] + cost < sink[v] - 1e-13) {
            sink[v] = source[s] + cost;
            by_source[v] = s;
            changed = true;
          }
          if (x[s * sinks + v] > 0 && sink[v] - cost < source[s] - 1e-13) {
            source[s] = sink[v] - cost;
            by_sink[s] = v;
            changed = true;
          }
        }
      }
    }
    int64_t end = -1;
    for (int64_t v = 0; v < sinks; ++v) {
      if (need[v] > 0 && (end < 0 || sink[v] < sink[end])) end = v;
    }
    int64_t units = need[end], root = 0;
    for (int64_t v = end; v >= 0;) {
      const int64_t s = by_source[v];
      root = s;
      v = by_sink[s];
      if (v >= 0) units = std::min(units, x[s * sinks + v]);
    }
    units = std::min(units, supply[root]);
    for (int64_t v = end; v >= 0;) {
      const int64_t s = by_source[v];
      x[s * sinks + v] += units;
      total += static_cast<double>(units) * c[s * sinks + v];
      v = by_sink[s];
      if (v >= 0) {
        x[s * sinks + v] -= units;
        total -= static_cast<double>(units) * c[s * sinks + v];
      }
    }
    supply[root] -= units;
    need[end] -= units;
    left -= units;
  }
  return total / static_cast<double>(k * mass);
}

template <class T>
std::vector<T> numbers(std::mt19937_64& random, int64_t count, int kind) {
  std::vector<T> values(count);
  for (T& x : values) {
    const double unit = static_cast<double>(random() >> 11) * 0x1p-53;
    x = static_cast<T>(kind == 0   ? unit
                       : kind == 1 ? std::round(4 * unit) / 4
                       : kind == 2 ? 0.0
                                   : std::round(unit) - 0.5);
  }
  return values;
}

template <class T>
void check_optimal(const fc::Transport<T>& solved, const std::vector<T>& c) {
  const int64_t k = solved.sources(), sinks = solved.sinks(), common = std::gcd(k, sinks);
  const std::vector<double> u = solved.source_duals(), f = solved.sink_duals();
  for (int64_t s = 0; s < k; ++s) {
    for (int64_t v = 0; v < sinks; ++v) CHECK(c[s * sinks + v] - u[s] - f[v] >= -1e-12);
  }
  const int64_t count = solved.flow_count();
  std::vector<int64_t> source(count), sink(count), units(count), given(k, 0), got(sinks, 0);
  solved.flows(source.data(), sink.data(), units.data());
  for (int64_t i = 0; i < count; ++i) {
    CHECK(units[i] > 0);
    CHECK(c[source[i] * sinks + sink[i]] - u[source[i]] - f[sink[i]] <= 1e-12);
    given[source[i]] += units[i];
    got[sink[i]] += units[i];
  }
  for (const int64_t units_of : given) CHECK_EQUAL(units_of, sinks / common);
  for (const int64_t units_of : got) CHECK_EQUAL(units_of, k / common);
  CHECK(solved.gap() <= 1e-12);
  CHECK(solved.slackness() <= 1e-12);
}

template <class T>
void check_problem(int64_t k, int64_t sinks, int kind, uint64_t seed, int exchanges) {
  std::mt19937_64 random(seed);
  std::vector<T> c = numbers<T>(random, k * sinks, kind);
  const auto view = fc::TensorView<const T, 2>::compact(c.data(), k, sinks);
  const auto solved = fc::transport<T>(view, nullptr, 1, nullptr);
  const auto wide = [&] { return std::vector<double>(c.begin(), c.end()); };
  CHECK(std::fabs(solved->value() - least_cost(wide(), k, sinks)) < 1e-11);
  check_optimal(*solved, c);
  for (int turn = 0; turn < exchanges; ++turn) {
    const int64_t place = static_cast<int64_t>(random() % k);
    const std::vector<T> row = numbers<T>(random, sinks, kind);
    const std::vector<T> before(c.begin() + place * sinks, c.begin() + (place + 1) * sinks);
    std::copy(row.begin(), row.end(), c.begin() + place * sinks);
    const double expected = least_cost(wide(), k, sinks), value = solved->value();
    const auto item = fc::TensorView<const T, 1>::compact(row.data(), sinks);
    const auto items = fc::TensorView<const T, 2>::compact(row.data(), 1, sinks);

    double lowest = 0;
    const auto bounds = solved->bounds(items, kInfinity, k, false, &lowest);
    CHECK_EQUAL(static_cast<int64_t>(bounds.size()), k);
    for (const auto& bound : bounds) {
      CHECK(bound.bound >= lowest);
      if (bound.place == place) CHECK(bound.bound <= expected + 1e-12);
    }
    const auto tight = solved->bounds(items, kInfinity, k, true, &lowest);
    CHECK_EQUAL(tight.size(), bounds.size());
    for (const auto& bound : tight) {
      if (bound.place == place) CHECK(bound.bound <= expected + 1e-12);
    }
    const auto best = solved->best_exchange(items, {{0, place, -kInfinity}}, kInfinity, -kInfinity, 1);
    CHECK(std::fabs(best.value - expected) < 1e-11);
    CHECK_EQUAL(best.tried, 1);
    CHECK_EQUAL(solved->exchange(place, item, expected - 1e-9), kInfinity);
    CHECK_EQUAL(solved->value(), value);
    std::copy(before.begin(), before.end(), c.begin() + place * sinks);
    check_optimal(*solved, c);
    std::copy(row.begin(), row.end(), c.begin() + place * sinks);
    CHECK(std::fabs(solved->exchange(place, item, kInfinity) - expected) < 1e-11);
    check_optimal(*solved, c);
  }
}

template <class T>
void check_threads() {
  std::mt19937_64 random(7);
  const int64_t k = 31, sinks = 200, rows = 700;
  const std::vector<T> c = numbers<T>(random, k * sinks, 0), items = numbers<T>(random, rows * sinks, 0);
  std::vector<std::vector<fc::ExchangeBound>> found;
  std::vector<std::vector<double>> lowest;
  for (const int threads : {1, 3}) {
    const auto solved =
        fc::transport<T>(fc::TensorView<const T, 2>::compact(c.data(), k, sinks), nullptr, threads, nullptr);
    lowest.emplace_back(rows);
    found.push_back(solved->bounds(fc::TensorView<const T, 2>::compact(items.data(), rows, sinks),
                                   solved->value(), 900, true, lowest.back().data()));
  }
  CHECK(lowest[0] == lowest[1]);
  CHECK_EQUAL(found[0].size(), found[1].size());
  for (size_t i = 0; i < found[0].size(); ++i) {
    CHECK_EQUAL(found[0][i].row, found[1][i].row);
    CHECK_EQUAL(found[0][i].place, found[1][i].place);
    CHECK_EQUAL(found[0][i].bound, found[1][i].bound);
  }
}

template <class T>
void check_refusals() {
  const std::vector<T> c(12, T(1)), bad{T(0), std::numeric_limits<T>::quiet_NaN(), T(0), T(0)};
  const auto view = fc::TensorView<const T, 2>::compact(c.data(), 3, 4);
  CHECK_THROWS(fc::transport<T>(fc::TensorView<const T, 2>::compact(bad.data(), 2, 2), nullptr, 1, nullptr),
               std::invalid_argument);
  const double u[3] = {0, kInfinity, 0};
  CHECK_THROWS(fc::transport<T>(view, u, 1, nullptr), std::invalid_argument);
  const auto solved = fc::transport<T>(view, nullptr, 1, nullptr);
  CHECK_THROWS(solved->exchange(3, fc::TensorView<const T, 1>::compact(c.data(), 4), 1),
               std::invalid_argument);
  CHECK_THROWS(solved->exchange(0, fc::TensorView<const T, 1>::compact(bad.data(), 4), 1),
               std::invalid_argument);
  check_optimal(*solved, c);
}

}  // namespace

TEST_PROGRAM {
  for (uint64_t seed = 0; seed < (thorough ? 400 : 100); ++seed) {
    const int64_t k = 1 + static_cast<int64_t>(seed * 7 % 11),
                  sinks = 1 + static_cast<int64_t>(seed * 5 % 17);
    check_problem<float>(k, sinks, static_cast<int>(seed % 4), seed, 3);
    check_problem<double>(k, sinks, static_cast<int>(seed % 4), seed, 3);
  }
  check_threads<float>();
  check_threads<double>();
  check_refusals<float>();
  check_refusals<double>();
  return check::verdict("transport");
}
