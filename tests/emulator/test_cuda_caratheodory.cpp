// The CUDA kernels of the Caratheodory reduction, run by the emulator under every schedule: sums of runs to
// the last digits of extended precision, wherever runs are cut, and rows of the runs that are kept.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "check.h"
#include "cuda/caratheodory.h"
#include "emulator/device_array.h"
#include "emulator/schedules.h"
#include "samples.h"

namespace {

using fc::TensorView;
using fc::cuda::Runs;
using fc::emulator::DeviceArray;

// Some rows in order, with weights, some of them 0.
struct Case {
  std::vector<int64_t> rows;
  std::vector<double> weights, centre;
};

Case make_case(int64_t n, int64_t d) {
  Case c;
  samples::Random random(n + d);
  for (int64_t i = 0; i < n; ++i) {
    if (i % 3 == 1) continue;
    c.rows.push_back(i);
    c.weights.push_back(i % 5 == 0 ? 0 : random.uniform());
  }
  for (int64_t j = 0; j < d; ++j) c.centre.push_back(random.normal());
  return c;
}

template <class X>
std::vector<double> sums_on_device(const X* data, const TensorView<const X, 2>& x, const Case& c,
                                   bool with_rows, bool with_weights, double shrink, int64_t size) {
  const DeviceArray<int64_t> rows(c.rows);
  const DeviceArray<double> weights(c.weights), centre(c.centre);
  const auto count = static_cast<int64_t>(c.rows.size()), runs = (count + size - 1) / size;
  const DeviceArray<double> sums(runs * (1 + x.cols()));
  TensorView<const X, 2> there = x;
  there.data = data;
  fc::cuda::sum_runs<X>(
      there, {count, size, with_rows ? rows.data() : nullptr, with_weights ? weights.data() : nullptr},
      centre.data(), shrink, TensorView<double, 2>::compact(sums.data(), runs, 1 + x.cols()), nullptr);
  return sums.values();
}

// The largest error, as a share of the sums of magnitudes. Worst seen: 5e-16.
constexpr long double kTolerance = 2e-15L;

template <class X>
void check_sums(const samples::Matrix<X>& x, const Case& c, int64_t size) {
  const int64_t count = static_cast<int64_t>(c.rows.size()), d = x.cols();
  const double shrink = 0.5;
  const DeviceArray<X> values(x.values());
  std::vector<X> storage;
  const TensorView<const X, 2> odd = x.odd_view(storage);
  const DeviceArray<X> stored(storage);
  const X* const odd_data = stored.data() + (odd.data - storage.data());
  for (const bool with_rows : {false, true}) {
    for (const bool with_weights : {false, true}) {
      const auto compute = [&] {
        return sums_on_device<X>(values.data(), x.view(), c, with_rows, with_weights, shrink, size);
      };
      const std::vector<double> got =
          x.rows() < 100 || x.cols() == 1 ? fc::emulator::check_schedules(compute) : compute();
      CHECK(sums_on_device<X>(odd_data, odd, c, with_rows, with_weights, shrink, size) == got);
      for (int64_t run = 0; run * size < count; ++run) {
        for (int64_t j = -1; j < d; ++j) {
          long double want = 0, magnitudes = 0;
          for (int64_t r = run * size; r < std::min(count, (run + 1) * size); ++r) {
            const int64_t row = with_rows ? c.rows[r] : r;
            const long double w = with_weights ? c.weights[r] : 1;
            const long double value = j < 0 ? 1 : x(row, j) * shrink - c.centre[j];
            want += w * value;
            magnitudes += w * std::fabs(value);
          }
          CHECK(std::fabs(got[run * (1 + d) + 1 + j] - want) <= kTolerance * magnitudes);
        }
      }
    }
  }
}

template <class X>
void test_sums() {
  for (const int64_t n : {1, 7, 97, 1025}) {
    for (const int64_t d : {1, 3, 16, 40}) {
      if (n * d > 20000) continue;
      const auto x = samples::normal<X>(n, d, d);
      const Case c = make_case(n, d);
      // One run, of several pieces; runs with a short one at the end; single rows.
      for (const int64_t size : {n, (n + 8) / 9, int64_t{1}}) {
        if (n <= 100 * size) check_sums(x, c, size);
      }
    }
  }
}

// Halves are widened without rounding: small whole numbers.
void test_halves() {
  constexpr int64_t kRows = 300, kColumns = 5;
  samples::Matrix<float> x(kRows, kColumns);
  std::vector<fc::Half> halves;
  std::vector<fc::BFloat16> shorter;
  samples::Random random(3);
  for (float& value : x.values()) {
    value = static_cast<float>(random.below(200)) - 100;
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    shorter.push_back({static_cast<uint16_t>(bits >> 16)});
    const uint32_t exponent = (bits >> 23 & 255) - 112, fraction = bits >> 13 & 1023;
    halves.push_back(
        {static_cast<uint16_t>(value == 0 ? 0 : (bits >> 16 & 0x8000u) | exponent << 10 | fraction)});
  }
  const Case c = make_case(kRows, kColumns);
  const DeviceArray<float> values(x.values());
  const DeviceArray<fc::Half> narrow(halves);
  const DeviceArray<fc::BFloat16> other(shorter);
  const auto want = sums_on_device<float>(values.data(), x.view(), c, true, true, 1, 50);
  CHECK(sums_on_device<fc::Half>(narrow.data(),
                                 TensorView<const fc::Half, 2>::compact(halves.data(), kRows, kColumns), c,
                                 true, true, 1, 50) == want);
  CHECK(sums_on_device<fc::BFloat16>(
            other.data(), TensorView<const fc::BFloat16, 2>::compact(shorter.data(), kRows, kColumns), c,
            true, true, 1, 50) == want);
}

// Also if the weight is 0.
void test_infinity_shows() {
  auto x = samples::normal<float>(100, 3, 1);
  Case c = make_case(100, 3);
  const auto bad =
      static_cast<int64_t>(std::find(c.weights.begin(), c.weights.end(), 0.0) - c.weights.begin());
  x(c.rows[bad], 1) = std::numeric_limits<float>::infinity();
  const DeviceArray<float> values(x.values());
  const auto sums = sums_on_device<float>(values.data(), x.view(), c, true, true, 1, 10);
  for (size_t i = 0; i < sums.size(); ++i) {
    CHECK_EQUAL(std::isfinite(sums[i]), static_cast<int64_t>(i) != bad / 10 * 4 + 2);
  }
}

void test_kept() {
  const Case c = make_case(1000, 1);
  const auto count = static_cast<int64_t>(c.rows.size());
  const DeviceArray<int64_t> rows(c.rows);
  const DeviceArray<double> weights(c.weights);
  for (const int64_t size : {1, 7, 300}) {
    std::vector<int64_t> kept;
    std::vector<double> factors;
    for (int64_t run = 0; run * size < count; run += size < 300 ? 3 : 2) {
      kept.push_back(run);
      factors.push_back(1.0 + static_cast<double>(run));
    }
    std::vector<int64_t> want_rows;
    std::vector<double> want;
    for (size_t k = 0; k < kept.size(); ++k) {
      for (int64_t r = kept[k] * size; r < std::min(count, (kept[k] + 1) * size); ++r) {
        want_rows.push_back(c.rows[r]);
        want.push_back(c.weights[r] * factors[k]);
      }
    }
    const DeviceArray<int64_t> which(kept), new_rows(want_rows.size());
    const DeviceArray<double> times(factors), new_weights(want_rows.size());
    for (const bool given : {true, false}) {
      fc::emulator::check_schedules([&] {
        fc::cuda::keep_runs({count, size, given ? rows.data() : nullptr, given ? weights.data() : nullptr},
                            which.data(), times.data(), static_cast<int64_t>(want_rows.size()),
                            new_rows.data(), new_weights.data(), nullptr);
        return new_weights.values();
      });
      if (given) {
        CHECK(new_rows.values() == want_rows);
        CHECK(new_weights.values() == want);
      } else {
        const auto places = new_rows.values();
        for (size_t i = 0; i < places.size(); ++i) CHECK_EQUAL(c.rows[places[i]], want_rows[i]);
      }
    }
  }
}

}  // namespace

TEST_PROGRAM {
  test_sums<float>();
  test_sums<double>();
  test_halves();
  test_infinity_shows();
  test_kept();
  return check::verdict("cuda_caratheodory");
}
