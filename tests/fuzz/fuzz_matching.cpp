// Fuzzes gradient matching, with gradients that are dense or coefficients of random directions: chosen
// dimensions are distinct and in order of their mean updates, and the two forms agree, or the input is
// refused.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <stdexcept>
#include <vector>

#include "cpu/directions.h"
#include "cpu/matching.h"
#include "input.h"

namespace {

template <class X>
X number(fuzz::Input& in, bool any) {
  if constexpr (std::is_floating_point_v<X>) {
    return in.number<X>(any);
  } else {
    const uint16_t low = in.byte();
    return {static_cast<uint16_t>(any ? low | in.byte() << 8 : 0x3C00 | low)};
  }
}

// Throws what the kernels throw.
template <class Gradients>
void check(fuzz::Input& in, const Gradients& g, int64_t rows, bool any) {
  using T = fc::HistoryOf<typename Gradients::Element>;
  const int64_t numel = g.numel(), groups = 1 + in.below(std::min<int64_t>(rows, 4)),
                top = 1 + in.below(std::min<int64_t>(numel, 20));
  std::vector<int64_t> member(rows), offset{0};
  for (int64_t i = 0; i < rows; ++i) member[i] = in.below(rows);
  for (int64_t i = 1; i < groups; ++i) offset.push_back(i * rows / groups);
  offset.push_back(rows);
  fc::AdamRule rule;
  rule.has_history = in.coin();
  if (rule.has_history) rule = {true, 0.9, 0.1, 0.99, 0.01, 1e-8};
  std::vector<T> m = in.numbers<T>(numel, any), v = in.numbers<T>(numel, any);
  if (!any) {
    for (T& value : v) value = std::fabs(value);
  }
  std::vector<int64_t> dims(groups * top);
  std::vector<double> u(rows * top);
  fc::ThreadTeam team(static_cast<int>(1 + in.below(3)));
  const auto first = fc::TensorView<const T, 1>::compact(m.data(), numel),
             second = fc::TensorView<const T, 1>::compact(v.data(), numel);
  fc::top_updates(g, rule, first, second,
                  {fc::TensorView<const int64_t, 1>::compact(member.data(), rows),
                   fc::TensorView<const int64_t, 1>::compact(offset.data(), groups + 1)},
                  fc::TensorView<int64_t, 2>::compact(dims.data(), groups, top),
                  fc::TensorView<double, 2>::compact(u.data(), rows, top), team);
  for (int64_t i = 0; i < groups; ++i) {
    std::vector<int64_t> own(dims.begin() + i * top, dims.begin() + (i + 1) * top);
    std::sort(own.begin(), own.end());
    if (own.front() < 0 || own.back() >= numel || std::adjacent_find(own.begin(), own.end()) != own.end()) {
      std::abort();
    }
    double before = HUGE_VAL;
    for (int64_t t = 0; t < top; ++t) {
      double mean = 0, size = 0;
      for (int64_t r = offset[i]; r < offset[i + 1]; ++r) {
        mean += u[r * top + t];
        size += std::fabs(u[r * top + t]);
      }
      // Sums of rounded updates in another order.
      if (!any && std::fabs(mean) > before + 1e-5 * (size + before)) std::abort();
      before = std::min(before, std::fabs(mean) + 1e-5 * size);
    }
  }
  std::vector<T> new_m(numel), new_v(numel);
  fc::update_history(g, 0.9, 0.99, first, second,
                     fc::TensorView<const int64_t, 1>::compact(member.data(), rows),
                     fc::TensorView<T, 1>::compact(new_m.data(), numel),
                     fc::TensorView<T, 1>::compact(new_v.data(), numel), team);
  for (int64_t j = 0; j < numel; ++j) {
    if (!any && !(std::isfinite(new_m[j]) && new_v[j] >= 0)) std::abort();
  }
}

template <class X>
void dense(fuzz::Input& in, int64_t rows, bool any) {
  const int64_t numel = 1 + in.below(in.coin() ? 20 : 700);
  std::vector<X> g(rows * numel);
  for (X& x : g) x = number<X>(in, any);
  const bool transposed = in.coin();
  const fc::TensorView<const X, 2> view{
      g.data(), {rows, numel}, {transposed ? 1 : numel, transposed ? rows : 1}};
  check(in, fc::DenseGradients<X>{view}, rows, any);
}

template <class X>
void low_rank(fuzz::Input& in, int64_t rows, bool any) {
  const int64_t q = 1 + in.below(3), numel = 1 + in.below(in.coin() ? 20 : 700);
  const fuzz::Array<X> coefficients(in, rows, q, any, false);
  const uint64_t seed = in.byte();
  check(in, fc::LowRankGradients<X>{coefficients.view, seed, numel}, rows, any);
  // Any part of the directions equals that part of all of them.
  const int64_t begin = in.below(numel), first = in.below(1 << 15), count = numel - begin;
  std::vector<X> all(2 * numel), part(2 * count);
  fc::ThreadTeam team(static_cast<int>(1 + in.below(3)));
  fc::directions<X>(seed, 0, static_cast<uint32_t>(first),
                    fc::TensorView<X, 2>::compact(all.data(), 2, numel), team);
  fc::directions<X>(seed, begin, static_cast<uint32_t>(first),
                    fc::TensorView<X, 2>::compact(part.data(), 2, count), team);
  for (int64_t p = 0; p < 2; ++p) {
    for (int64_t j = 0; j < count; ++j) {
      if (part[p * count + j] != all[p * numel + begin + j]) std::abort();
    }
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  fuzz::Input in(data, size);
  const int64_t rows = 1 + in.below(20);
  const bool any = in.coin();
  try {
    switch (in.byte() % 6) {
      case 0:
        dense<float>(in, rows, any);
        break;
      case 1:
        dense<double>(in, rows, any);
        break;
      case 2:
        dense<fc::Half>(in, rows, any);
        break;
      case 3:
        dense<fc::BFloat16>(in, rows, any);
        break;
      case 4:
        low_rank<float>(in, rows, any);
        break;
      default:
        low_rank<double>(in, rows, any);
    }
  } catch (const std::invalid_argument&) {
    if (!any) std::abort();
  }
  return 0;
}
