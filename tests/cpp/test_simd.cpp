// The vector operations that plain arithmetic cannot stand for: exact sums of truncated values up to their
// limits, comparisons, and compression.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "check.h"
#include "core/philox.h"
#include "core/simd.h"

namespace {

using fc::simd::kWidth;

// Values of every size that a gain's part may have, and those beside which rounding would show: around the
// cuts of the three-part sums and just below a whole number.
template <class T>
std::vector<T> addends() {
  std::vector<T> values = {T(0), T(0.25), std::nextafter(T(1), T(0)), T(1), T(1.5)};
  for (const int exponent : {1, 19, 20, 21, 22, 23, 24, 39, 40, 41, 43, 44, 52, 53, 60, 61}) {
    const T power = std::ldexp(T(1), exponent);
    for (const T value : {std::nextafter(power, T(0)), power, std::nextafter(power, 2 * power)}) {
      if (value <= std::ldexp(T(1), 61)) values.push_back(value);
    }
  }
  values.push_back(std::numeric_limits<T>::denorm_min());
  for (uint32_t i = 0; i < 4000; ++i) {
    const auto draw = fc::philox4x32(1, i, 0);
    values.push_back(
        static_cast<T>(std::ldexp(static_cast<double>(draw[0]), static_cast<int>(draw[1] % 60) - 32)));
  }
  return values;
}

// One lane holds the value, the others nothing: its sum is the value's truncation, and no other lane changes.
template <class T>
void single_values() {
  for (const T value : addends<T>()) {
    const int lane = static_cast<int>(static_cast<int64_t>(value) % kWidth<T>);
    fc::simd::Vec<T> v{};
    v[lane] = value;
    fc::simd::Sum<T> sum{};
    fc::simd::LaneSums<T> lanes{};
    sum.add(v);
    lanes.add(v);
    CHECK_EQUAL(sum.total(), static_cast<int64_t>(value));
    for (int i = 0; i < kWidth<T>; ++i)
      CHECK_EQUAL(lanes.lane(i), i == lane ? static_cast<int64_t>(value) : 0);
  }
}

// As many additions as a sum takes (at most 5,000), of the largest values that keep the total below 2^62.
template <class T>
void many_values() {
  const int64_t count = std::min<int64_t>(fc::simd::Sum<T>::kMostAdds, 5000);
  static_assert(fc::simd::Sum<T>::kMostAdds >= 512 && fc::simd::LaneSums<T>::kMostAdds >= 512);
  const T largest = std::ldexp(T(1), 61) / static_cast<T>(4096 * kWidth<T>);
  for (const T base : {largest, largest / 3, T(0x1.fffffep39), T(0x1.fffffep19), T(0.75)}) {
    fc::simd::Sum<T> sum{};
    fc::simd::LaneSums<T> lanes{};
    std::vector<int64_t> expected(kWidth<T>, 0);
    for (int64_t i = 0; i < count; ++i) {
      fc::simd::Vec<T> v;
      for (int lane = 0; lane < kWidth<T>; ++lane) {
        v[lane] = base * (1 - static_cast<T>((i + lane) % 7) / 64);
        expected[lane] += static_cast<int64_t>(v[lane]);
      }
      sum.add(v);
      lanes.add(v);
    }
    int64_t total = 0;
    for (int lane = 0; lane < kWidth<T>; ++lane) {
      CHECK_EQUAL(lanes.lane(lane), expected[lane]);
      total += expected[lane];
    }
    CHECK_EQUAL(sum.total(), total);
  }
}

// Two hundred rows of comparisons: the mask has the bits, append() writes the kept pairs one after the other
// and nothing before them.
template <class T>
void comparisons_and_compression() {
  constexpr int kMost = 1 << 12;
  std::vector<uint32_t> index(kMost + kWidth<T>);
  std::vector<T> value(kMost + kWidth<T>);
  std::vector<uint32_t> wanted_index;
  std::vector<T> wanted_value;
  int64_t count = 0;
  const T infinity = std::numeric_limits<T>::infinity();
  for (uint32_t row = 0; row < 200; ++row) {
    fc::simd::Vec<T> a, b;
    uint32_t wanted = 0;
    for (int i = 0; i < kWidth<T>; ++i) {
      const auto draw = fc::philox4x32(2, row, i);
      a[i] = static_cast<T>(draw[0] % 5) - 2;
      b[i] = draw[1] % 9 == 0 ? -infinity : static_cast<T>(draw[2] % 5) - 2;
      if (a[i] > b[i]) {
        wanted |= uint32_t{1} << i;
        wanted_index.push_back(row * kWidth<T> + i);
        wanted_value.push_back(a[i]);
      }
    }
    const uint32_t mask = fc::simd::greater_mask<T>(a, b);
    CHECK_EQUAL(mask, wanted);
    count = fc::simd::append<T>(index.data(), value.data(), count, mask, row * kWidth<T>, a);
  }
  CHECK_EQUAL(count, static_cast<int64_t>(wanted_index.size()));
  index.resize(wanted_index.size());
  value.resize(wanted_value.size());
  CHECK(index == wanted_index);
  CHECK(value == wanted_value);
}

// Every 16-bit number as its fields say, alone and in arrays that end within a vector.
template <class X>
void widened(int significand_bits, int bias, int largest_exponent) {
  std::vector<X> in(1 << 16);
  for (uint32_t bits = 0; bits < in.size(); ++bits) in[bits].bits = static_cast<uint16_t>(bits);
  std::vector<float> out(in.size());
  fc::simd::widen(in.data(), out.data(), static_cast<int64_t>(in.size()));
  for (uint32_t bits = 0; bits < in.size(); ++bits) {
    const int exponent = static_cast<int>((bits & 0x7FFF) >> significand_bits);
    const uint32_t significand = bits & ((1u << significand_bits) - 1);
    const float alone = fc::simd::widen(in[bits]);
    if (exponent == largest_exponent && significand != 0) {
      CHECK(std::isnan(out[bits]));
      CHECK(std::isnan(alone));
      continue;
    }
    double want = std::ldexp(significand + (exponent > 0 ? double(1u << significand_bits) : 0.0),
                             std::max(exponent, 1) - bias - significand_bits);
    if (exponent == largest_exponent) want = HUGE_VAL;
    CHECK_EQUAL(out[bits], static_cast<float>(bits & 0x8000 ? -want : want));
    CHECK_EQUAL(alone, out[bits]);
    CHECK_EQUAL(std::signbit(alone), (bits & 0x8000) != 0);
  }
  for (int64_t count = 0; count < 70; ++count) {
    std::vector<float> part(count + 1, -7.0f);
    fc::simd::widen(in.data() + 0x3C00, part.data(), count);
    CHECK(std::equal(part.begin(), part.end() - 1, out.begin() + 0x3C00));
    CHECK_EQUAL(part[count], -7.0f);
  }
}

// Every number of lanes, of memory that ends where they do.
template <class T>
void partial_vectors() {
  for (int count = 0; count <= kWidth<T>; ++count) {
    std::vector<T> exact(count);
    for (int i = 0; i < count; ++i) exact[i] = static_cast<T>(i * i + 1);
    const auto v = fc::simd::load_or<T>(exact.data(), count, T(-3));
    const auto mask = fc::simd::first_lanes<T>(count);
    for (int i = 0; i < kWidth<T>; ++i) {
      CHECK_EQUAL(v[i], i < count ? exact[i] : T(-3));
      CHECK_EQUAL(mask[i], i < count ? -1 : 0);
    }
    CHECK_EQUAL(fc::simd::lane_max<T>(v), count > 0 ? exact[count - 1] : T(-3));
    CHECK_EQUAL(fc::simd::lane_max<T>(-v), count == 0 ? T(3) : count < kWidth<T> ? T(3) : T(-1));
  }
}

template <class T>
void all() {
  partial_vectors<T>();
  single_values<T>();
  many_values<T>();
  comparisons_and_compression<T>();
}

}  // namespace

TEST_PROGRAM {
  all<float>();
  all<double>();
  widened<fc::Half>(10, 15, 31);
  widened<fc::BFloat16>(7, 127, 255);
  return check::verdict("simd");
}
