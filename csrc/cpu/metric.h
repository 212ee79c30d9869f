// The metrics by name, and what they ask of the tile routine.
#pragma once

#include <cmath>

#include "core/simd.h"
#include "cpu/tile.h"

namespace fc {

enum class Metric { kCosine, kDot, kEuclidean, kSqeuclidean, kL1 };

inline bool is_distance(Metric metric) { return metric != Metric::kCosine && metric != Metric::kDot; }

// Calls fn with the tile form of `metric` as a compile-time constant.
template <class Fn>
void with_form(Metric metric, Fn&& fn) {
  switch (metric) {
    case Metric::kCosine:
    case Metric::kDot:
      return fn(std::integral_constant<Form, Form::kProduct>{});
    case Metric::kEuclidean:
    case Metric::kSqeuclidean:
      return fn(std::integral_constant<Form, Form::kSquare>{});
    case Metric::kL1:
      return fn(std::integral_constant<Form, Form::kAbsolute>{});
  }
}

// Turns what the tile routine accumulated into the metric's value times `sign`: +1 for the value itself, -1
// to see a distance as a similarity. (`count` values in place.)
template <class T>
inline void finish_values(Metric metric, bool negate, T* __restrict values, int64_t count) {
  if (metric == Metric::kEuclidean) {
    for (int64_t i = 0; i < count; ++i) values[i] = std::sqrt(values[i]);
  }
  if (negate) {
    for (int64_t i = 0; i < count; ++i) values[i] = -values[i];
  }
}

}  // namespace fc
