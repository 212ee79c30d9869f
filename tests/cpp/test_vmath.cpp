// exp and log against the C library in a wider type: the error in units in the last place over the whole
// range, special values exactly, and the same bits in every lane.
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <vector>

#include "check.h"
#include "core/philox.h"
#include "core/vmath.h"

namespace {

constexpr double kAllowedUlp = 1.0;

template <class T>
using Wide = std::conditional_t<sizeof(T) == 4, double, long double>;

template <class To, class From>
To bits_of(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  std::memcpy(&result, &value, sizeof(result));
  return result;
}

// The distance between neighbours of type T around x.
template <class T>
Wide<T> unit_in_last_place(Wide<T> x) {
  const int exponent = x == 0 ? std::numeric_limits<T>::min_exponent
                              : std::max(std::ilogb(x) + 1, std::numeric_limits<T>::min_exponent);
  return std::ldexp(Wide<T>(1), exponent - std::numeric_limits<T>::digits);
}

template <class T>
double error_in_ulp(T got, Wide<T> want) {
  if (std::isnan(want)) return std::isnan(got) ? 0 : HUGE_VAL;
  // Past the largest value by half a unit or more rounds to infinity.
  const Wide<T> largest = std::numeric_limits<T>::max();
  if (std::isinf(got) && got > 0) return want >= largest ? 0 : HUGE_VAL;
  if (std::isinf(got) || std::isinf(want)) return got == static_cast<T>(want) ? 0 : HUGE_VAL;
  return static_cast<double>(std::fabs(static_cast<Wide<T>>(got) - want) / unit_in_last_place<T>(want));
}

template <class T>
struct Worst {
  double ulp = 0;
  T at = 0;
};

template <class T, class Ours, class Reference>
Worst<T> worst_error(const std::vector<T>& arguments, Ours ours, Reference reference) {
  std::vector<T> got(arguments.size());
  fc::simd::map(arguments.data(), got.data(), static_cast<int64_t>(arguments.size()), ours);
  Worst<T> worst;
  for (size_t i = 0; i < arguments.size(); ++i) {
    const double ulp = error_in_ulp<T>(got[i], reference(static_cast<Wide<T>>(arguments[i])));
    if (!(ulp <= worst.ulp)) worst = {ulp, arguments[i]};
  }
  return worst;
}

template <class T>
fc::simd::Vec<T> our_exp(fc::simd::Vec<T> v) {
  return fc::simd::exp<T>(v);
}
template <class T>
fc::simd::Vec<T> our_log(fc::simd::Vec<T> v) {
  return fc::simd::log<T>(v);
}

template <class T>
struct Errors {
  Worst<T> exp, log;
  void add(const std::vector<T>& x) {
    const auto e = worst_error<T>(x, our_exp<T>, [](Wide<T> v) { return std::exp(v); });
    const auto l = worst_error<T>(x, our_log<T>, [](Wide<T> v) {
      return v < 0 ? std::numeric_limits<Wide<T>>::quiet_NaN() : std::log(v);
    });
    if (!(e.ulp <= exp.ulp)) exp = e;
    if (!(l.ulp <= log.ulp)) log = l;
  }
  void report(const char* type) const {
    std::printf("%s: exp %.3f ulp at %.9g, log %.3f ulp at %.9g\n", type, exp.ulp, double(exp.at), log.ulp,
                double(log.at));
    CHECK(exp.ulp <= kAllowedUlp);
    CHECK(log.ulp <= kAllowedUlp);
  }
};

// Bit patterns across the whole type: every `step`-th of all floats (1: all of them).
void test_float(uint64_t step) {
  Errors<float> errors;
  std::vector<float> x;
  for (uint64_t bits = 0; bits < (uint64_t{1} << 32); bits += step) {
    x.push_back(bits_of<float>(static_cast<uint32_t>(bits)));
    if (x.size() == 1 << 16) {
      errors.add(x);
      x.clear();
    }
  }
  errors.add(x);
  errors.report("float");
}

// Random bit patterns, and random arguments where exp is neither 0 nor infinite and where log is near 0.
void test_double(uint64_t count) {
  Errors<double> errors;
  std::vector<double> x;
  for (uint64_t i = 0; i < count; i += 4096) {
    x.clear();
    for (uint64_t j = 0; j < 4096; j += 4) {
      const auto block = fc::philox4x32(7, i, j);
      const uint64_t word = (uint64_t{block[0]} << 32) | block[1];
      const double unit = static_cast<double>(((uint64_t{block[2]} << 32) | block[3]) >> 11) * 0x1p-53;
      x.push_back(bits_of<double>(word));
      x.push_back(-746 + unit * (746 + 710));
      x.push_back(-1 + 2 * unit);
      x.push_back(0.5 + unit);
    }
    errors.add(x);
  }
  errors.report("double");
}

// The neighbourhoods where something changes.
template <class T>
void test_edges() {
  const bool wide = sizeof(T) == 8;
  const T edges[] = {0,
                     std::numeric_limits<T>::denorm_min(),
                     std::numeric_limits<T>::min(),
                     std::numeric_limits<T>::max(),
                     1,
                     static_cast<T>(std::sqrt(0.5)),
                     static_cast<T>(std::sqrt(2.0)),
                     static_cast<T>(wide ? 709.782712893384 : 88.7228391),
                     static_cast<T>(wide ? -708.396418532264 : -87.3365448),
                     static_cast<T>(wide ? -744.440071921381 : -103.278929),
                     static_cast<T>(wide ? -745.133219101941 : -103.972077)};
  Errors<T> errors;
  for (const T edge : edges) {
    std::vector<T> x;
    T below = edge, above = edge;
    for (int i = 0; i < 2000; ++i) {
      for (const T value : {below, above, -below, -above}) x.push_back(value);
      below = std::nextafter(below, -std::numeric_limits<T>::infinity());
      above = std::nextafter(above, std::numeric_limits<T>::infinity());
    }
    errors.add(x);
  }
  errors.report(wide ? "double edges" : "float edges");
}

template <class T>
T one(fc::simd::Vec<T> (*fn)(fc::simd::Vec<T>), T x) {
  T y;
  fc::simd::map(&x, &y, 1, fn);
  return y;
}

template <class T>
void test_special() {
  using Limits = std::numeric_limits<T>;
  const T inf = Limits::infinity();
  CHECK_EQUAL(one<T>(our_exp<T>, 0), T(1));
  CHECK_EQUAL(one<T>(our_exp<T>, T(-0.0)), T(1));
  CHECK_EQUAL(one<T>(our_exp<T>, inf), inf);
  CHECK_EQUAL(one<T>(our_exp<T>, -inf), T(0));
  CHECK(!std::signbit(one<T>(our_exp<T>, -inf)));
  CHECK_EQUAL(one<T>(our_exp<T>, Limits::max()), inf);
  CHECK_EQUAL(one<T>(our_exp<T>, Limits::lowest()), T(0));
  CHECK(std::isnan(one<T>(our_exp<T>, Limits::quiet_NaN())));
  CHECK(std::isnan(one<T>(our_exp<T>, -Limits::quiet_NaN())));
  CHECK(!std::signbit(one<T>(our_log<T>, 1)));
  CHECK_EQUAL(one<T>(our_log<T>, 1), T(0));
  CHECK_EQUAL(one<T>(our_log<T>, 0), -inf);
  CHECK_EQUAL(one<T>(our_log<T>, T(-0.0)), -inf);
  CHECK_EQUAL(one<T>(our_log<T>, inf), inf);
  CHECK(std::isnan(one<T>(our_log<T>, T(-1))));
  CHECK(std::isnan(one<T>(our_log<T>, -inf)));
  CHECK(std::isnan(one<T>(our_log<T>, -Limits::denorm_min())));
  CHECK(std::isnan(one<T>(our_log<T>, Limits::quiet_NaN())));
}

// The same argument gives the same bits in every lane, in the padded tail, and in place.
template <class T>
void test_position() {
  using Word = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
  for (const int n : {1, 7, 97, 1025}) {
    std::vector<T> x(n), whole(n);
    for (int i = 0; i < n; ++i) x[i] = static_cast<T>(0.1 + 1.37 * (i % 53));
    for (const auto fn : {&our_exp<T>, &our_log<T>}) {
      fc::simd::map(x.data(), whole.data(), n, fn);
      for (int i = 0; i < n; ++i) CHECK_EQUAL(bits_of<Word>(whole[i]), bits_of<Word>(one<T>(fn, x[i])));
      std::vector<T> in_place = x;
      fc::simd::map(in_place.data(), in_place.data(), n, fn);
      CHECK(in_place == whole);
    }
  }
}

template <class T>
fc::simd::Vec<T> our_exp_or_zero(fc::simd::Vec<T> v) {
  return fc::simd::exp_or_zero<T>(v);
}

// exp() bit for bit down to where it becomes 0, and 0 from there on.
template <class T>
void test_exp_or_zero() {
  const T flush = fc::simd::MathConstants<T>::kExpFlush;
  std::vector<T> x = {0, T(-0.0), flush, std::nextafter(flush, T(0)), std::nextafter(T(0), flush)};
  for (int i = 0; i < 100000; ++i) x.push_back(flush * static_cast<T>(i) / 100000);
  std::vector<T> got(x.size()), want(x.size());
  fc::simd::map(x.data(), got.data(), static_cast<int64_t>(x.size()), our_exp_or_zero<T>);
  fc::simd::map(x.data(), want.data(), static_cast<int64_t>(x.size()), our_exp<T>);
  CHECK(got == want);
  CHECK(got[2] > 0);
  for (const T below : {std::nextafter(flush, 2 * flush), 2 * flush, T(-1e9),
                        std::numeric_limits<T>::lowest(), -std::numeric_limits<T>::infinity()})
    CHECK_EQUAL(one<T>(our_exp_or_zero<T>, below), T(0));
}

}  // namespace

// `test_vmath all` tries every float and 2 * 10^7 doubles (minutes), the plain call a sample of them.
TEST_PROGRAM {
  test_float(thorough ? 1 : 4099);
  test_double(thorough ? 20000000 : 400000);
  test_edges<float>();
  test_edges<double>();
  test_special<float>();
  test_special<double>();
  test_exp_or_zero<float>();
  test_exp_or_zero<double>();
  test_position<float>();
  test_position<double>();
  return check::verdict("vmath");
}
