// exp and log of whole vectors, float and double, at the native width of the instruction set.
//
// Each lane is computed by the same fixed sequence of operations whatever its position and neighbours, so a
// value depends on its argument alone (within one build: if the instruction set has a fused multiply-add, it
// is used). The whole range is covered: denormals in and out, overflow, underflow, infinities, NaN, zeros and
// negative arguments, and no branch depends on data.
//
// Largest error found over all floats and 2 * 10^7 doubles (tests/cpp/test_vmath.cpp), in units in the last
// place:
//              with fused multiply-add     without
//   exp float        0.988                   0.951
//   exp double       0.966                   0.943
//   log float        0.835                   0.835
//   log double       0.857                   0.857
//
// The polynomials interpolate at Chebyshev nodes of the reduced interval (approximation error below 0.05
// units). Rejected: tables (a gather costs more than three multiply-adds), and one scaling by 2^n in exp (it
// cannot reach denormals).
#pragma once

#include <cstdint>
#include <limits>

#include "core/simd.h"

namespace fc::simd {

template <class T>
struct MathConstants;

template <>
struct MathConstants<float> {
  // Bit patterns are unsigned: sums of them wrap, and a shift to the right exists for 64 bits everywhere.
  typedef uint32_t Bits __attribute__((vector_size(kBytes)));
  static constexpr int kMantissa = 23;               // explicit bits
  static constexpr uint32_t kBias = 127;             // of the exponent
  static constexpr uint32_t kSqrtHalf = 0x3F3504F3;  // the bits of sqrt(1/2)
  static constexpr float kShift =
      12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number, kept in the low bits
  static constexpr float kToNormal = 8388608.0f, kToNormalExponent = 23.0f;
  static constexpr float kExpMax = 89.0f, kExpMin = -104.0f;  // beyond: inf and 0 for sure
  static constexpr float kExpFlush = -86.0f;
  static constexpr float kLn2High = 0.693145751953125f,
                         kLn2Low = 1.428606765330187e-06f;  // n * high is exact
  static constexpr float kInvLn2 = 1.4426950216293335f;
  static constexpr float kExp[] = {0.5f,
                                   0.1666666716337204f,
                                   0.04166646674275398f,
                                   0.00833331048488617f,
                                   0.0013933649752289057f,
                                   0.00019890991097781807f};
  static constexpr float kLog[] = {0.6666666865348816f, 0.4000012278556824f, 0.2855081558227539f,
                                   0.23330582678318024f};
};

template <>
struct MathConstants<double> {
  typedef uint64_t Bits __attribute__((vector_size(kBytes)));
  static constexpr int kMantissa = 52;
  static constexpr uint64_t kBias = 1023;
  static constexpr uint64_t kSqrtHalf = 0x3FE6A09E667F3BCD;
  static constexpr double kShift = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double kToNormal = 4503599627370496.0, kToNormalExponent = 52.0;
  static constexpr double kExpMax = 710.0, kExpMin = -746.0, kExpFlush = -700.0;
  static constexpr double kLn2High = 0.693147180559663, kLn2Low = 2.8235290563031577e-13;
  static constexpr double kInvLn2 = 1.4426950408889634;
  static constexpr double kExp[] = {0.5,
                                    0.1666666666666667,
                                    0.04166666666666667,
                                    0.008333333333326136,
                                    0.0013888888888883748,
                                    0.00019841269874820627,
                                    2.4801587325547743e-05,
                                    2.7557255400206422e-06,
                                    2.75572736431103e-07,
                                    2.5105217004720745e-08,
                                    2.0914686968086876e-09};
  static constexpr double kLog[] = {0.666666666666667,   0.39999999999899444, 0.2857142862600327,
                                    0.22222211130259878, 0.18182889455674947, 0.15331710618210773,
                                    0.14616585424888623};
};

// c[0] + c[1] x + c[2] x^2 + ...
template <class T, int N>
inline Vec<T> polynomial(const T (&c)[N], Vec<T> x) {
  Vec<T> sum = broadcast<T>(c[N - 1]);
#pragma GCC unroll 16
  for (int i = N - 2; i >= 0; --i) sum = fma<T>(sum, x, broadcast<T>(c[i]));
  return sum;
}

// exp(x) = 2^n exp(r) with n = round(x / ln 2), |r| <= ln 2 / 2, and exp(r) = 1 + r + r^2 q(r).
template <class T>
inline Vec<T> exp(Vec<T> x) {
  using C = MathConstants<T>;
  using V = Vec<T>;
  using Bits = typename C::Bits;
  const V upper = broadcast<T>(C::kExpMax), lower = broadcast<T>(C::kExpMin);
  x = x > upper ? upper : x;  // NaN compares false and stays
  x = x < lower ? lower : x;
  const V shift = broadcast<T>(C::kShift);
  const V shifted = fma<T>(x, broadcast<T>(C::kInvLn2), shift);
  const V n = shifted - shift;
  V r = fma<T>(n, broadcast<T>(-C::kLn2High), x);
  r = fma<T>(n, broadcast<T>(-C::kLn2Low), r);
  const V value = fma<T>(r * r, polynomial<T>(C::kExp, r), r) + broadcast<T>(1);
  // 2^n is out of range if the result is denormal or near overflow: two factors, the second product rounds
  // once.
  const Bits biased =
      reinterpret_cast<Bits>(shifted) - reinterpret_cast<Bits>(shift) + 2 * C::kBias;  // n + 2 bias >= 0
  const Bits half = biased >> 1;
  const V first = reinterpret_cast<V>(half << C::kMantissa);
  const V second = reinterpret_cast<V>((biased - half) << C::kMantissa);
  return value * first * second;
}

// exp(x) for x <= 0, to the accuracy of exp(), and 0 if the result is below e^kExpFlush: one multiplication
// by a power of two is then an addition to the exponent. NaN gives anything.
template <class T>
inline Vec<T> exp_or_zero(Vec<T> x) {
  using C = MathConstants<T>;
  using V = Vec<T>;
  using Bits = typename C::Bits;
  const V shift = broadcast<T>(C::kShift);
  const V shifted = fma<T>(x, broadcast<T>(C::kInvLn2), shift);
  const V n = shifted - shift;
  V r = fma<T>(n, broadcast<T>(-C::kLn2High), x);
  r = fma<T>(n, broadcast<T>(-C::kLn2Low), r);
  const V value = fma<T>(r * r, polynomial<T>(C::kExp, r), r) + broadcast<T>(1);
  // The low bits of `shifted` are those of n; the bits above them leave the number on the left.
  const Bits scaled = reinterpret_cast<Bits>(value) + (reinterpret_cast<Bits>(shifted) << C::kMantissa);
  return x < broadcast<T>(C::kExpFlush) ? V{} : reinterpret_cast<V>(scaled);
}

// log(x) = k ln 2 + log(1 + f) with x = 2^k (1 + f), sqrt(1/2) <= 1 + f < sqrt(2). With s = f / (2 + f),
// log(1 + f) = 2 atanh(s) = f - (f^2/2 - s (f^2/2 + R(s^2))), where R(z) = 2z/3 + 2z^2/5 + ...: the leading
// term f is exact.
template <class T>
inline Vec<T> log(Vec<T> x) {
  using C = MathConstants<T>;
  using V = Vec<T>;
  using Bits = typename C::Bits;
  const V zero{}, infinity = broadcast<T>(std::numeric_limits<T>::infinity());
  const auto denormal = x < broadcast<T>(std::numeric_limits<T>::min());
  const V normal = denormal ? x * broadcast<T>(C::kToNormal) : x;
  const Bits bits = reinterpret_cast<Bits>(normal);
  // The exponent counted from sqrt(1/2); put into the low bits of kShift it becomes a number without a
  // conversion.
  const Bits exponent = ((bits - C::kSqrtHalf + (C::kBias << C::kMantissa)) >> C::kMantissa) - C::kBias;
  const V shift = broadcast<T>(C::kShift);
  V k = reinterpret_cast<V>(exponent + reinterpret_cast<Bits>(shift)) - shift;
  k = denormal ? k - broadcast<T>(C::kToNormalExponent) : k;
  const V f = reinterpret_cast<V>(bits - (exponent << C::kMantissa)) - broadcast<T>(1);
  const V s = f / (f + broadcast<T>(2));
  const V z = s * s;
  const V half_square = f * f * broadcast<T>(T(0.5));
  const V tail = fma<T>(s, half_square + z * polynomial<T>(C::kLog, z), k * broadcast<T>(C::kLn2Low));
  V result = fma<T>(k, broadcast<T>(C::kLn2High), f - (half_square - tail));
  result = x < infinity ? result : x;  // infinity and NaN
  result = x == zero ? -infinity : result;
  return x < zero ? broadcast<T>(std::numeric_limits<T>::quiet_NaN()) : result;
}

// out[i] = fn(in[i]) for a vector function fn; the last, partial vector is padded with ones. `in` and `out`
// may be the same.
template <class T, class Fn>
inline void map(const T* in, T* out, int64_t n, Fn&& fn) {
  int64_t i = 0;
  for (; i + kWidth<T> <= n; i += kWidth<T>) store<T>(out + i, fn(load<T>(in + i)));
  if (i == n) return;
  Vec<T> last = broadcast<T>(1);
  std::memcpy(&last, in + i, static_cast<size_t>(n - i) * sizeof(T));
  last = fn(last);
  std::memcpy(out + i, &last, static_cast<size_t>(n - i) * sizeof(T));
}

}  // namespace fc::simd
