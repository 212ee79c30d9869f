// The polynomials of `gaussian`'s normal numbers; python/flashcoreset/sketch/reference.py (`normal_pairs`)
// says what they approximate, how well, and how numbers are made of them.
#pragma once

#include "core/host_device.h"

namespace fc {

// Coefficient k of the power k.
struct NormalPolynomials {
  static constexpr int kLogarithm = 6, kSine = 3, kCosine = 4;

  FC_HOST_DEVICE static constexpr float logarithm(int k) {
    constexpr float coefficients[kLogarithm] = {12102290.0f, 6051346.0f,  4020255.0f,
                                                3007360.25f, 2740731.25f, 2341755.5f};
    return coefficients[k];
  }
  FC_HOST_DEVICE static constexpr float sine(int k) {
    constexpr float coefficients[kSine] = {0.00031928022508509457f, -3.281629324192181e-05f,
                                           9.901314115268178e-07f};
    return coefficients[k];
  }
  FC_HOST_DEVICE static constexpr float cosine(int k) {
    constexpr float coefficients[kCosine] = {0.0004065207904204726f, -0.000125380844110623f,
                                             6.443226538976887e-06f, -1.2956950001807854e-07f};
    return coefficients[k];
  }
};

}  // namespace fc
