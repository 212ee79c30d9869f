// Fuzzes exact transport: a call works, or throws a documented exception and leaves the transport as it was.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <vector>

#include "cpu/transport.h"
#include "input.h"

namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

template <class T>
void require_whole(const fc::Transport<T>& solved) {
  const int64_t k = solved.sources(), sinks = solved.sinks(), common = std::gcd(k, sinks),
                count = solved.flow_count();
  std::vector<int64_t> source(count), sink(count), units(count), given(k, 0), got(sinks, 0);
  solved.flows(source.data(), sink.data(), units.data());
  for (int64_t i = 0; i < count; ++i) {
    if (units[i] <= 0) std::abort();
    given[source[i]] += units[i];
    got[sink[i]] += units[i];
  }
  for (const int64_t of_source : given) {
    if (of_source != sinks / common) std::abort();
  }
  for (const int64_t of_sink : got) {
    if (of_sink != k / common) std::abort();
  }
  if (!(solved.gap() >= 0) || !(solved.slackness() >= 0) || !std::isfinite(solved.value())) std::abort();
}

template <class T>
void run(fuzz::Input& in) {
  const int64_t k = 1 + in.below(12), sinks = 1 + in.below(20);
  const bool any = in.coin();
  const int threads = static_cast<int>(1 + in.below(3));
  const std::vector<double> u = in.numbers<double>(k, any);
  std::unique_ptr<fc::Transport<T>> solved;
  try {
    const fuzz::Array<T> costs(in, k, sinks, any, true);
    solved = fc::transport<T>(costs.view, in.coin() ? u.data() : nullptr, threads, nullptr);
    require_whole(*solved);
    for (int turn = 0; turn < 8; ++turn) {
      const int64_t rows = 1 + in.below(4);
      const fuzz::Array<T> items(in, rows, sinks, any, true);
      const double value = solved->value(), ceiling = in.coin() ? kInfinity : value;
      try {
        std::vector<double> lowest(rows);
        const auto bounds = solved->bounds(items.view, ceiling, in.below(40), in.coin(), lowest.data());
        for (size_t i = 1; i < bounds.size(); ++i) {
          if (bounds[i].bound < bounds[i - 1].bound) std::abort();
        }
        const auto best = solved->best_exchange(items.view, bounds, ceiling, -kInfinity, in.below(30));
        if (solved->value() != value) std::abort();
        if (best.index >= 0 && !any) {
          const auto& chosen = bounds[best.index];
          const auto row = fc::TensorView<const T, 1>::compact(items.view.row(chosen.row), sinks);
          const double after = solved->exchange(chosen.place, row, kInfinity);
          if (std::fabs(after - best.value) > 1e-9) std::abort();
        }
        solved->exchange(in.below(2 * k), fc::TensorView<const T, 1>::compact(items.view.row(0), sinks),
                         ceiling);
      } catch (const std::invalid_argument&) {
      }
      require_whole(*solved);
    }
  } catch (const std::invalid_argument&) {
    return;
  } catch (const std::runtime_error&) {
    // Costs of all magnitudes forbid complementary slackness.
    if (!any) std::abort();
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  return fuzz::with_float_or_double(data, size, [](auto zero, fuzz::Input& in) { run<decltype(zero)>(in); });
}
