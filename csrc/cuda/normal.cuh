// Normal numbers from random words, on the device; python/flashcoreset/sketch/reference.py defines them.
#pragma once

#include <cmath>
#include <cstdint>

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

// Box and Muller's pair of normal numbers.
__device__ inline void normal_pair(uint32_t word0, uint32_t word1, float* x, float* y) {
  const double radius = sqrt(-2 * log((static_cast<double>(word0) + 1) * 0x1p-32));
  const double part = (static_cast<double>(word1 & 0x3FFFFFFFu) + 0.5) * 0x1p-30;
  const uint32_t quadrant = word1 >> 30;
  const double sine = quarter_sine(part) * radius, cosine = quarter_sine(1 - part) * radius;
  const double first = quadrant & 1 ? sine : cosine, second = quadrant & 1 ? cosine : sine;
  *x = static_cast<float>(quadrant == 1 || quadrant == 2 ? -first : first);
  *y = static_cast<float>(quadrant >= 2 ? -second : second);
}

// Four normal numbers of a random block.
__device__ inline void normals(const PhiloxBlock& words, float (&out)[4]) {
  normal_pair(words[0], words[1], &out[0], &out[1]);
  normal_pair(words[2], words[3], &out[2], &out[3]);
}

}  // namespace fc::cuda
