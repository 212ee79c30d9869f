// The CUDA kernels of gradient matching, run by the emulator under every schedule: the CPU kernels'
// dimensions, updates and history, wherever chunks are cut.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <vector>

#include "check.h"
#include "core/threads.h"
#include "cpu/directions.h"
#include "cpu/matching.h"
#include "cuda/matching.h"
#include "emulator/device_array.h"
#include "emulator/schedules.h"
#include "samples.h"

namespace {

using fc::AdamRule;
using fc::DenseGradients;
using fc::HistoryOf;
using fc::LowRankGradients;
using fc::TensorView;
using fc::emulator::DeviceArray;

constexpr int64_t kNone = std::numeric_limits<int64_t>::max();
constexpr AdamRule kAdam{true, 2.1, 0.4, 1.3, 0.2, 1e-8};

template <class T>
TensorView<const T, 1> view_of(const std::vector<T>& values) {
  return TensorView<const T, 1>::compact(values.data(), static_cast<int64_t>(values.size()));
}

template <class T>
TensorView<const T, 1> view_of(const DeviceArray<T>& array, size_t size) {
  return TensorView<const T, 1>::compact(array.data(), static_cast<int64_t>(size));
}

// The same gradients with their values at `data`.
template <class X>
DenseGradients<X> moved(DenseGradients<X> g, const X* data) {
  g.rows.data = data;
  return g;
}
template <class X>
LowRankGradients<X> moved(LowRankGradients<X> g, const X* data) {
  g.coefficients.data = data;
  return g;
}

template <class Gradients>
struct Case {
  using X = typename Gradients::Element;
  using T = HistoryOf<X>;
  std::vector<X> values;
  Gradients g;  // a view of `values`
  AdamRule rule;
  std::vector<T> m, v;
  std::vector<int64_t> member, offset;
  int64_t top;

  int64_t groups() const { return static_cast<int64_t>(offset.size()) - 1; }
  int64_t rows() const { return static_cast<int64_t>(member.size()); }
};

// Dimensions in their order, updates there, and what was refused, as one array of doubles.
template <class Gradients>
std::vector<double> on_cpu(const Case<Gradients>& c) {
  using T = typename Case<Gradients>::T;
  std::vector<int64_t> dims(c.groups() * c.top);
  std::vector<double> u(c.rows() * c.top);
  fc::ThreadTeam team(1);
  fc::top_updates<Gradients, T>(c.g, c.rule, view_of(c.m), view_of(c.v),
                                {view_of(c.member), view_of(c.offset)},
                                TensorView<int64_t, 2>::compact(dims.data(), c.groups(), c.top),
                                TensorView<double, 2>::compact(u.data(), c.rows(), c.top), team);
  std::vector<double> all(dims.begin(), dims.end());
  all.insert(all.end(), u.begin(), u.end());
  all.push_back(static_cast<double>(kNone));
  return all;
}

template <class Gradients>
std::vector<double> on_device(const Case<Gradients>& c, int64_t first_chunk) {
  using T = typename Case<Gradients>::T;
  const int64_t groups = c.groups(), top = c.top;
  const DeviceArray<typename Case<Gradients>::X> values(c.values);
  const DeviceArray<T> m(c.m), v(c.v);
  const DeviceArray<int64_t> member(c.member), offset(c.offset), dims(groups * top);
  const DeviceArray<int64_t> refused(std::vector<int64_t>{kNone});
  const DeviceArray<double> means(groups * top), u(c.rows() * top);
  const Gradients g = moved(c.g, values.data());
  const fc::GroupedRows rows{view_of(member, c.member.size()), view_of(offset, c.offset.size())};
  fc::cuda::top_dimensions<Gradients, T>(g, c.rule, view_of(m, c.m.size()), view_of(v, c.v.size()), rows,
                                         TensorView<int64_t, 2>::compact(dims.data(), groups, top),
                                         TensorView<double, 2>::compact(means.data(), groups, top),
                                         refused.data(), nullptr, nullptr, first_chunk);
  // The sorting that is left to the caller.
  const std::vector<int64_t> found = dims.values();
  const std::vector<double> mean = means.values();
  std::vector<int64_t> sorted;
  for (int64_t group = 0; group < groups; ++group) {
    std::vector<int64_t> order(top);
    std::iota(order.begin(), order.end(), group * top);
    std::sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
      return mean[a] != mean[b] ? mean[a] > mean[b] : found[a] < found[b];
    });
    for (const int64_t i : order) sorted.push_back(found[i]);
  }
  const DeviceArray<int64_t> in_order(sorted);
  fc::cuda::restrict_updates<Gradients, T>(
      g, c.rule, view_of(m, c.m.size()), view_of(v, c.v.size()), rows,
      TensorView<const int64_t, 2>::compact(static_cast<const int64_t*>(in_order.data()), groups, top),
      TensorView<double, 2>::compact(u.data(), c.rows(), top), nullptr);
  std::vector<double> all(sorted.begin(), sorted.end());
  const std::vector<double> updates = u.values();
  all.insert(all.end(), updates.begin(), updates.end());
  all.push_back(static_cast<double>(refused.values()[0]));
  return all;
}

template <class Gradients>
std::vector<double> history_on_cpu(const Case<Gradients>& c) {
  using T = typename Case<Gradients>::T;
  std::vector<T> m(c.m.size()), v(c.v.size());
  fc::ThreadTeam team(1);
  const auto numel = static_cast<int64_t>(c.m.size());
  fc::update_history<Gradients, T>(c.g, 0.9, 0.99, view_of(c.m), view_of(c.v), view_of(c.member),
                                   TensorView<T, 1>::compact(m.data(), numel),
                                   TensorView<T, 1>::compact(v.data(), numel), team);
  std::vector<double> all(m.begin(), m.end());
  all.insert(all.end(), v.begin(), v.end());
  all.push_back(0);
  return all;
}

template <class Gradients>
std::vector<double> history_on_device(const Case<Gradients>& c, int64_t at_once) {
  using T = typename Case<Gradients>::T;
  const auto numel = static_cast<int64_t>(c.m.size());
  const DeviceArray<typename Case<Gradients>::X> values(c.values);
  const DeviceArray<T> m(c.m), v(c.v), new_m(c.m.size()), new_v(c.v.size());
  const DeviceArray<int64_t> chosen(c.member), overflows(std::vector<int64_t>{0});
  fc::cuda::update_history<Gradients, T>(
      moved(c.g, values.data()), 0.9, 0.99, view_of(m, c.m.size()), view_of(v, c.v.size()),
      view_of(chosen, c.member.size()), TensorView<T, 1>::compact(new_m.data(), numel),
      TensorView<T, 1>::compact(new_v.data(), numel), overflows.data(), nullptr, nullptr, at_once);
  std::vector<double> all;
  for (const T x : new_m.values()) all.push_back(x);
  for (const T x : new_v.values()) all.push_back(x);
  all.push_back(static_cast<double>(overflows.values()[0]));
  return all;
}

// Worst seen: 0, but 2e-16 for the history of gradients along several directions, whose sums the CPU takes in
// another way.
template <class T>
void check_close(const std::vector<double>& got, const std::vector<double>& want) {
  CHECK_EQUAL(got.size(), want.size());
  for (size_t i = 0; i < want.size(); ++i) {
    const double slack = (sizeof(T) == 4 ? 0x1p-23 : 1e-14) * (1 + std::fabs(want[i]));
    CHECK(std::fabs(got[i] - want[i]) <= slack);
  }
}

// Two groups of `count` rows, in no order; the first chunk is one part of several.
template <class Gradients>
void test(Gradients g, const std::vector<typename Gradients::Element>& values, int64_t count, int64_t numel,
          int64_t top, bool has_history) {
  using T = HistoryOf<typename Gradients::Element>;
  Case<Gradients> c{values, g, has_history ? kAdam : AdamRule{}, {}, {}, {}, {}, top};
  c.offset = {0, (count + 2) / 3};
  if (count > 1) c.offset.push_back(count);
  samples::Random random(9);
  for (int64_t d = 0; d < numel; ++d) {
    c.m.push_back(static_cast<T>(0.1 * random.normal()));
    c.v.push_back(static_cast<T>(std::fabs(random.normal())));
  }
  for (int64_t i = count; i-- > 0;) c.member.push_back(i);
  const std::vector<double> got = fc::emulator::check_schedules([&] { return on_device(c, 300); });
  check_close<double>(got, on_cpu(c));
  CHECK(on_device(c, 4096) == got);
  const std::vector<double> advanced = fc::emulator::check_schedules([&] { return history_on_device(c, 1); });
  check_close<T>(advanced, history_on_cpu(c));
  CHECK(history_on_device(c, int64_t{1} << 34) == advanced);
}

template <class X>
void test_rows(int64_t count, int64_t numel, int64_t top, bool has_history, bool tied) {
  const auto x = tied ? samples::tied<X>(count, numel, 4) : samples::normal<X>(count, numel, 4);
  test<DenseGradients<X>>({x.view()}, x.values(), count, numel, top, has_history);
}

template <class X>
void test_directions(int64_t q) {
  const auto x = samples::normal<X>(19, q, 4);
  test<LowRankGradients<X>>({x.view(), 0xFEDCBA9876543210u, 1500}, x.values(), 19, 1500, 40, true);
}

// Halves have 11 bits: rows of small whole numbers.
void test_halves() {
  std::vector<fc::Half> values(20 * 1100);
  samples::Random random(3);
  for (auto& value : values)
    value.bits =
        static_cast<uint16_t>((random.below(2) << 15) | (random.below(12) + 10) << 10 | random.below(1024));
  const auto view =
      TensorView<const fc::Half, 2>::compact(static_cast<const fc::Half*>(values.data()), 20, 1100);
  test<DenseGradients<fc::Half>>({view}, values, 20, 1100, 30, true);
}

// The first dimension with an impossible value.
void test_refusal() {
  auto x = samples::normal<float>(20, 1000, 1);
  x(7, 900) = x(3, 905) = std::numeric_limits<float>::infinity();
  Case<DenseGradients<float>> c{x.values(), {x.view()}, kAdam, {}, {}, {}, {0, 9, 20}, 50};
  c.m.assign(1000, 0.0f);
  c.v.assign(1000, 1.0f);
  for (int64_t i = 0; i < 20; ++i) c.member.push_back(i);
  CHECK_EQUAL(on_device(c, 300).back(), 900.0);
  c.v[800] = -1e-30f;
  CHECK_EQUAL(on_device(c, 300).back(), 800.0);
  c.m[700] = std::numeric_limits<float>::quiet_NaN();
  CHECK_EQUAL(on_device(c, 300).back(), 700.0);
  for (auto& value : c.values) value = 1e30f;
  CHECK_EQUAL(history_on_device(c, 1).back(), 1.0);
}

// A long run ends when its poll returns true, and memory is given back.
void test_cancellation() {
  const auto x = samples::normal<float>(4, 20000, 1);
  const size_t before = fc::emulator::allocated_bytes();
  {
    const DeviceArray<float> in(x.values());
    const DeviceArray<int64_t> member(std::vector<int64_t>{0, 1}), offset(std::vector<int64_t>{0, 2}),
        dims(3), refused(std::vector<int64_t>{kNone});
    const DeviceArray<double> values(3);
    const DenseGradients<float> g{
        TensorView<const float, 2>::compact(static_cast<const float*>(in.data()), 4, 20000)};
    fc::emulator::Device slow;
    slow.event_delay = 1000000;  // how often an event reports that it has not been reached
    fc::emulator::set_device(slow);
    CHECK_THROWS((fc::cuda::top_dimensions<DenseGradients<float>, float>(
                     g, {}, {}, {}, {view_of(member, 2), view_of(offset, 2)},
                     TensorView<int64_t, 2>::compact(dims.data(), 1, 3),
                     TensorView<double, 2>::compact(values.data(), 1, 3), refused.data(), nullptr,
                     [] { return true; }, 300)),
                 fc::Cancelled);
    fc::emulator::set_device({});
  }
  CHECK_EQUAL(fc::emulator::allocated_bytes(), before);
}

// The CPU kernels' logarithm is another; numbers are rounded to float32.
template <class T>
void test_elements() {
  constexpr int64_t kCount = 2, kWidth = 1001, kBegin = (int64_t{1} << 40) + 3;
  const std::vector<T> got = fc::emulator::check_schedules([&] {
    const DeviceArray<T> out(kCount * kWidth);
    fc::cuda::directions<T>(7, kBegin, 0xFFFFFFFEu, TensorView<T, 2>::compact(out.data(), kCount, kWidth),
                            nullptr);
    return out.values();
  });
  fc::ThreadTeam team(1);
  samples::Matrix<T> want(kCount, kWidth);
  fc::directions<T>(7, kBegin, 0xFFFFFFFEu, want.writable(), team);
  for (size_t i = 0; i < got.size(); ++i) {
    const double number = want.values()[i];
    CHECK(std::fabs(got[i] - number) <= 2 * 0x1p-23 * std::fabs(number));
  }
}

template <class X>
void all() {
  for (const bool has_history : {false, true}) {
    test_rows<X>(1, 1, 1, has_history, false);
    test_rows<X>(37, 1300, 90, has_history, false);
    test_rows<X>(5, 1300, 700, has_history, true);  // more equal values than a list holds
  }
  test_rows<X>(3, 600, 600, true, false);
  test_directions<X>(1);
  test_directions<X>(3);
  test_elements<X>();
}

}  // namespace

TEST_PROGRAM {
  all<float>();
  all<double>();
  test_halves();
  test_refusal();
  test_cancellation();
  return check::verdict("cuda_matching");
}
