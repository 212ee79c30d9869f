// Standard normal numbers, several at once, from the words of philox_simd.h.
//
// python/flashcoreset/sketch/reference.py has the formula (Box and Muller's, its angles cut into quadrants).
// Cost per pair and vector: a logarithm, a square root and two polynomials, in double.
#pragma once

#include <cstdint>

#include "core/philox_simd.h"
#include "core/simd.h"
#include "core/vmath.h"

namespace fc::simd {

using Doubles = Vec<double>;

inline Doubles to_double(Words low) {
#if defined(__AVX512F__)
  return (Doubles)_mm512_cvtepu64_pd((__m512i)low);
#else
  Doubles result;
  for (int r = 0; r < kPhiloxRows; ++r) result[r] = static_cast<double>(static_cast<uint32_t>(low[r]));
  return result;
#endif
}

// By intrinsics, because GCC 12 forgets the rounding when it vectorises a loop whose results become doubles
// again.
inline void round_to_float(Doubles v, float* out) {
#if defined(__AVX512F__)
  _mm256_storeu_ps(out, _mm512_cvtpd_ps((__m512d)v));
#elif defined(__AVX2__)
  _mm_storeu_ps(out, _mm256_cvtpd_ps((__m256d)v));
#elif defined(__SSE2__)
  _mm_storel_pi(reinterpret_cast<__m64*>(out), _mm_cvtpd_ps((__m128d)v));
#elif defined(__aarch64__)
  vst1_f32(out, vcvt_f32_f64((float64x2_t)v));
#else
  for (int r = 0; r < kPhiloxRows; ++r) out[r] = static_cast<float>(v[r]);
#endif
}

// sin(pi / 2 t), 0 <= t <= 1, by Taylor's series; what is left out is 5 * 10^-14 of it at most.
inline Doubles quarter_sine(Doubles t) {
  static constexpr double kSeries[] = {6.0669357311061955e-12, -6.688035109811468e-10, 5.692172921967927e-08,
                                       -3.598843235212085e-06, 0.00016044118478735983, -0.004681754135318688,
                                       0.07969262624616705,    -0.6459640975062463,    1.5707963267948966};
  const Doubles square = t * t;
  Doubles sum = broadcast(kSeries[0]);
  for (int k = 1; k < 9; ++k) sum = fma<double>(sum, square, broadcast(kSeries[k]));
  return sum * t;
}

// The two normal numbers that two words make, in every lane; see reference/sketch.py.
inline void normal_pairs(Words word0, Words word1, float (&x)[kPhiloxRows], float (&y)[kPhiloxRows]) {
  const Words low = Words{} + 0xFFFFFFFFu, one = Words{} + 1;
  word0 &= low;
  word1 &= low;
  const Doubles radius = square_root<double>(
      broadcast(-2.0) * log<double>((to_double(word0) + broadcast(1.0)) * broadcast(0x1p-32)));
  // The quadrant is the two highest bits; the half that is added does not reach them.
  const Doubles part = (to_double(word1 & (low >> 2)) + broadcast(0.5)) * broadcast(0x1p-30);
  const Words quadrant = word1 >> 30, odd = Words{} - (quadrant & one);
  const Words sine = (Words)(quarter_sine(part) * radius),
              cosine = (Words)(quarter_sine(broadcast(1.0) - part) * radius);
  const Doubles first = (Doubles)((sine & odd) | (cosine & ~odd)),
                second = (Doubles)((cosine & odd) | (sine & ~odd));
  const Words flip_first = ((quadrant ^ (quadrant >> 1)) & one) << 63, flip_second = (quadrant >> 1) << 63;
  const Doubles a = (Doubles)((Words)first ^ flip_first), b = (Doubles)((Words)second ^ flip_second);
  round_to_float(a, x);
  round_to_float(b, y);
}

}  // namespace fc::simd
