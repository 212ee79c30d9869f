// Normal numbers from random words, on the device; python/flashcoreset/sketch/reference.py defines them.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/normal.h"
#include "core/philox.h"
#include "cuda/runtime.h"

namespace fc::cuda {

// sin(pi / 2 t), 0 <= t <= 1, by Taylor's series; what is left out is 5 * 10^-14 of it at most.
__device__ inline double quarter_sine(double t) {
  constexpr double kSeries[] = {6.0669357311061955e-12, -6.688035109811468e-10, 5.692172921967927e-08,
                                -3.598843235212085e-06, 0.00016044118478735983, -0.004681754135318688,
                                0.07969262624616705,    -0.6459640975062463,    1.5707963267948966};
  const double square = t * t;
  double sum = kSeries[0];
#pragma unroll
  for (int k = 1; k < 9; ++k) sum = __fma_rn(sum, square, kSeries[k]);
  return sum * t;
}

// Box and Muller's pair of normal numbers, in double.
__device__ inline void normal_pair(uint32_t word0, uint32_t word1, float* x, float* y) {
  const double radius = sqrt(-2 * log((static_cast<double>(word0) + 1) * 0x1p-32));
  const double part = (static_cast<double>(word1 & 0x3FFFFFFFu) + 0.5) * 0x1p-30;
  const uint32_t quadrant = word1 >> 30;
  const double sine = quarter_sine(part) * radius, cosine = quarter_sine(1 - part) * radius;
  const double first = quadrant & 1 ? sine : cosine, second = quadrant & 1 ? cosine : sine;
  *x = static_cast<float>(quadrant == 1 || quadrant == 2 ? -first : first);
  *y = static_cast<float>(quadrant >= 2 ? -second : second);
}

// Their pair in float, of `gaussian`. Every operation rounds once, so the bits are those of all backends.
__device__ inline void normal_pair_in_float(uint32_t a, uint32_t b, float* x, float* y) {
  using P = NormalPolynomials;
  constexpr int kOne = 1 << 23, kTwoThirds = 0x3F2AAAAB;
  const float uniform = __fadd_rn(static_cast<float>(static_cast<int>(a & 0x7FFFFFFFu)), 0.5f);
  const int bits = __float_as_int(uniform), places = (kTwoThirds + 32 * kOne - 1 - bits) & -kOne;
  const float f = __fsub_rn(1.0f, __int_as_float(bits + (places - 31 * kOne)));
  float radius = P::logarithm(P::kLogarithm - 1);
#pragma unroll
  for (int k = P::kLogarithm - 2; k >= 0; --k) radius = __fmaf_rn(radius, f, P::logarithm(k));
  radius = sqrtf(__fmaf_rn(f, radius, static_cast<float>(places)));
  const float t = __fmul_rn(static_cast<float>(static_cast<int>(b << 1 | 1)), 0x1p-31f);
  const float square = __fmul_rn(t, t);
  float sine = P::sine(P::kSine - 1), cosine = P::cosine(P::kCosine - 1);
#pragma unroll
  for (int k = P::kSine - 2; k >= 0; --k) sine = __fmaf_rn(sine, square, P::sine(k));
#pragma unroll
  for (int k = P::kCosine - 2; k >= 0; --k) cosine = __fmaf_rn(cosine, square, P::cosine(k));
  sine = __fmul_rn(__fmul_rn(sine, t), radius);
  cosine = __fmul_rn(cosine, a >> 31 ? -radius : radius);
  *x = b >> 31 ? cosine : sine;
  *y = b >> 31 ? sine : cosine;
}

// A word with its halves exchanged.
__device__ inline uint32_t exchanged(uint32_t word) { return word << 16 | word >> 16; }

// Eight normal numbers of a random block of `gaussian`: out[2 j + h] is the number that belongs to columns 8
// j
// + h behind the block's first one.
__device__ inline void eight_normals(const PhiloxBlock& words, float (&out)[8]) {
#pragma unroll
  for (int pair = 0; pair < 2; ++pair) {
    const uint32_t a = words[2 * pair], b = words[2 * pair + 1];
    normal_pair_in_float(a, b, &out[4 * pair], &out[4 * pair + 2]);
    normal_pair_in_float(exchanged(a), exchanged(b), &out[4 * pair + 1], &out[4 * pair + 3]);
  }
}

// Four normal numbers of a random block of `gaussian-boxmuller`.
__device__ inline void normals(const PhiloxBlock& words, float (&out)[4]) {
  normal_pair(words[0], words[1], &out[0], &out[1]);
  normal_pair(words[2], words[3], &out[2], &out[3]);
}

}  // namespace fc::cuda
