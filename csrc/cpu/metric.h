// The metrics by name.
#pragma once

namespace fc {

enum class Metric { kCosine, kDot, kEuclidean, kSqeuclidean, kL1 };

inline bool is_distance(Metric metric) { return metric != Metric::kCosine && metric != Metric::kDot; }

}  // namespace fc
