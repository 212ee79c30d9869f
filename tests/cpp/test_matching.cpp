// Gradient matching against its formulas in double: every memory layout and thread count, ties, gradients
// along directions, histories and rows that are refused.
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include "check.h"
#include "cpu/directions.h"
#include "cpu/matching.h"
#include "samples.h"

namespace {

using samples::Matrix;

fc::AdamRule rule_of(int t) {
  const double first = 1 - std::pow(0.9, t), second = 1 - std::pow(0.999, t);
  return {true, 0.9 / first, 0.1 / first, 0.999 / second, 0.001 / second, 1e-8};
}

template <class T>
struct Case {
  Matrix<T> g;
  std::vector<T> m, v;
  std::vector<int64_t> member, offset;
  fc::AdamRule rule;

  int64_t groups() const { return static_cast<int64_t>(offset.size()) - 1; }

  double update(int64_t row, int64_t d) const {
    if (!rule.has_history) return g(row, d);
    const double x = g(row, d);
    return (rule.m_scale * m[d] + rule.m_step * x) /
           (std::sqrt(rule.v_scale * v[d] + rule.v_step * x * x) + rule.eps);
  }

  double mean(int64_t group, int64_t d) const {
    double sum = 0;
    for (int64_t r = offset[group]; r < offset[group + 1]; ++r) sum += update(member[r], d);
    return sum / static_cast<double>(offset[group + 1] - offset[group]);
  }
};

template <class T>
Case<T> make_case(int64_t rows, int64_t numel, int step, uint64_t seed) {
  Case<T> c{samples::normal<T>(rows, numel, seed), {}, {}, {}, {0, (rows + 1) / 2, rows}, {}};
  if (rows == 1) c.offset = {0, 1};
  samples::Random random(seed + 1);
  for (int64_t d = 0; d < numel; ++d) {
    c.m.push_back(static_cast<T>(0.1 * random.normal()));
    c.v.push_back(static_cast<T>(random.uniform()));
  }
  c.member.resize(rows);
  std::iota(c.member.rbegin(), c.member.rend(), 0);
  if (step > 0) c.rule = rule_of(step);
  return c;
}

template <class T>
void check_case(const Case<T>& c, int64_t top) {
  const int64_t numel = c.g.cols(), rows = c.g.rows();
  std::vector<int64_t> first_dims;
  std::vector<double> first_u;
  std::vector<T> storage;
  for (const int threads : {1, 3}) {
    for (const bool odd : {false, true}) {
      fc::ThreadTeam team(threads);
      std::vector<int64_t> dims(c.groups() * top, -1);
      std::vector<double> u(rows * top, -7);
      const fc::DenseGradients<T> g{odd ? c.g.odd_view(storage) : c.g.view()};
      const auto m = fc::TensorView<const T, 1>::compact(c.m.data(), numel),
                 v = fc::TensorView<const T, 1>::compact(c.v.data(), numel);
      const fc::GroupedRows groups{
          fc::TensorView<const int64_t, 1>::compact(c.member.data(), rows),
          fc::TensorView<const int64_t, 1>::compact(c.offset.data(), c.groups() + 1)};
      fc::top_updates(g, c.rule, m, v, groups,
                      fc::TensorView<int64_t, 2>::compact(dims.data(), c.groups(), top),
                      fc::TensorView<double, 2>::compact(u.data(), rows, top), team);
      if (first_dims.empty()) {
        first_dims = dims;
        first_u = u;
        for (int64_t group = 0; group < c.groups(); ++group) {
          std::vector<int64_t> order(numel);
          std::iota(order.begin(), order.end(), 0);
          std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
            return std::abs(c.mean(group, a)) > std::abs(c.mean(group, b));
          });
          for (int64_t i = 0; i < top; ++i) {
            const int64_t d = dims[group * top + i];
            // The order of equal ones may differ by the rounding of their sums.
            CHECK(std::abs(std::abs(c.mean(group, d)) - std::abs(c.mean(group, order[i]))) < 1e-14);
            for (int64_t r = c.offset[group]; r < c.offset[group + 1]; ++r)
              CHECK(std::abs(u[r * top + i] - c.update(c.member[r], d)) < 1e-13);
          }
        }
      }
      CHECK(dims == first_dims);
      CHECK(u == first_u);

      std::vector<T> new_m(numel), new_v(numel);
      fc::update_history(g, 0.9, 0.999, m, v, groups.member,
                         fc::TensorView<T, 1>::compact(new_m.data(), numel),
                         fc::TensorView<T, 1>::compact(new_v.data(), numel), team);
      for (int64_t d = 0; d < numel; ++d) {
        double sum = 0, square = 0;
        for (int64_t r = 0; r < rows; ++r) {
          sum += c.g(r, d);
          square += static_cast<double>(c.g(r, d)) * c.g(r, d);
        }
        const double unit = std::numeric_limits<T>::epsilon();
        CHECK(std::abs(new_m[d] - (0.9 * c.m[d] + 0.1 * sum / rows)) < unit);
        CHECK(std::abs(new_v[d] - (0.999 * c.v[d] + 0.001 * square / rows)) < unit);
      }
    }
  }
}

template <class T>
void check_directions() {
  for (const int64_t count : {1, 7, 40000}) {
    std::vector<T> all(2 * count), part(2 * count);
    fc::ThreadTeam team(2);
    fc::directions<T>(5, 3, 1, fc::TensorView<T, 2>::compact(all.data(), 2, count), team);
    std::vector<float> element(count), run(count);
    std::vector<int64_t> at(count);
    for (int64_t j = 0; j < count; ++j) at[j] = 3 + (j * 7) % count;
    fc::direction_elements(5, 2, at.data(), count, element.data());
    fc::direction_part(5, 2, 3, count, run.data());
    for (int64_t j = 0; j < count; ++j) {
      CHECK(static_cast<T>(run[j]) == all[count + j]);
      CHECK(static_cast<T>(element[j]) == all[count + at[j] - 3]);
    }
  }
}

// Coefficients of directions against the rows that they stand for.
void check_low_rank(int64_t q) {
  const int64_t rows = 9, numel = 2500, top = 30;
  const Matrix<double> c = samples::normal<double>(rows, q, 3);
  Case<double> dense = make_case<double>(rows, numel, 4, 11);
  fc::ThreadTeam team(2);
  std::vector<double> z(q * numel);
  fc::directions<double>(17, 0, 0, fc::TensorView<double, 2>::compact(z.data(), q, numel), team);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t d = 0; d < numel; ++d) {
      dense.g(i, d) = 0;
      for (int64_t p = 0; p < q; ++p) dense.g(i, d) += c(i, p) * z[p * numel + d];
    }
  }
  const fc::LowRankGradients<double> g{c.view(), 17, numel};
  std::vector<int64_t> dims(2 * top);
  std::vector<double> u(rows * top);
  const fc::GroupedRows groups{fc::TensorView<const int64_t, 1>::compact(dense.member.data(), rows),
                               fc::TensorView<const int64_t, 1>::compact(dense.offset.data(), 3)};
  const auto m = fc::TensorView<const double, 1>::compact(dense.m.data(), numel),
             v = fc::TensorView<const double, 1>::compact(dense.v.data(), numel);
  fc::top_updates(g, dense.rule, m, v, groups, fc::TensorView<int64_t, 2>::compact(dims.data(), 2, top),
                  fc::TensorView<double, 2>::compact(u.data(), rows, top), team);
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t group = r < dense.offset[1] ? 0 : 1;
    for (int64_t i = 0; i < top; ++i)
      CHECK(std::abs(u[r * top + i] - dense.update(dense.member[r], dims[group * top + i])) < 1e-12);
  }
}

template <class T>
void check_refused() {
  for (const int what : {0, 1, 2}) {
    Case<T> c = make_case<T>(6, 3000, 2, 5);
    const T nan = std::numeric_limits<T>::quiet_NaN();
    if (what == 0) c.g(4, 2500) = nan;
    if (what == 1) c.m[2500] = nan;
    if (what == 2) c.v[2500] = -1;
    std::string said;
    try {
      check_case(c, 5);
    } catch (const std::invalid_argument& error) {
      said = error.what();
    }
    CHECK(said.find("2500") != std::string::npos);
  }
}

template <class T>
void check_type() {
  for (const int step : {0, 1, 6}) {
    check_case(make_case<T>(1, 1, step, 1), 1);
    check_case(make_case<T>(7, 97, step, 2), 13);
    check_case(make_case<T>(70, 1025, step, 3), 1025);
    check_case(make_case<T>(5, 9000, step, 4), 100);
  }
  check_directions<T>();
  check_refused<T>();
}

}  // namespace

TEST_PROGRAM {
  check_type<float>();
  check_type<double>();
  check_low_rank(1);
  check_low_rank(3);
  return check::verdict("matching");
}
