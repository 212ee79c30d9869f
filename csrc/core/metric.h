// The metrics, and what each of them sums up over the features.
#pragma once

namespace fc {

enum class Metric { kCosine, kDot, kEuclidean, kSqeuclidean, kL1 };

constexpr bool is_distance(Metric metric) { return metric != Metric::kCosine && metric != Metric::kDot; }

// a * b, (a - b)^2, |a - b|
enum class Form { kProduct, kSquare, kAbsolute };

constexpr Form form_of(Metric metric) {
  return !is_distance(metric) ? Form::kProduct : metric == Metric::kL1 ? Form::kAbsolute : Form::kSquare;
}

}  // namespace fc
