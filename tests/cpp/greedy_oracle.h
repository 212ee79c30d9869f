// Facility location by its definition: a double loop over candidates and clients at every pick. Similarities
// come in as a matrix; gains are the same exact integers as the kernel's, so every comparison is for
// equality.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "core/greedy.h"
#include "samples.h"

namespace oracle {

// The vectors have to outlive the options.
inline fc::GreedyOptions options_of(const std::vector<double>& weights,
                                    const std::vector<int64_t>& preselected) {
  fc::GreedyOptions options;
  options.weights = weights.empty() ? nullptr : weights.data();
  options.preselected = preselected.data();
  options.preselected_count = static_cast<int64_t>(preselected.size());
  return options;
}

struct Result {
  std::vector<int64_t> indices, assignment;
  std::vector<double> gains, weights;
  double objective = 0;
};

// s [n, m] similarities (distances negated); `floor` 0, or -offset; `bounds` [m] of max_j s(j, i) - floor;
// `self`: clients are the candidates.
template <class T>
Result greedy(const samples::Matrix<T>& s, int64_t k, T floor, const std::vector<double>& bounds,
              std::vector<double> w, const std::vector<int64_t>& preselected, bool self) {
  const int64_t n = s.rows(), m = s.cols();
  if (w.empty()) w.assign(m, 1.0);
  double bound = 0;
  for (int64_t i = 0; i < m; ++i) bound += w[i] * bounds[i];
  double scale = 1;
  if (bound > 0) {
    const double heaviest = *std::max_element(w.begin(), w.end());
    const int room = 61 - static_cast<int>(std::ceil(std::log2(bound)));
    const int most = (sizeof(T) == 4 ? 126 : 1000) - static_cast<int>(std::ceil(std::log2(heaviest)));
    scale = std::ldexp(1.0, std::min({room, most, 1000}));
  }
  std::vector<T> best(m, floor), before(m, std::numeric_limits<T>::lowest()), weight(m);
  std::vector<bool> used(n, false);
  for (int64_t i = 0; i < m; ++i) weight[i] = static_cast<T>(w[i] * scale);
  for (const int64_t j : preselected) {
    used[j] = true;
    for (int64_t i = 0; i < m; ++i) {
      before[i] = std::max(before[i], s(j, i));
      best[i] = std::max(best[i], s(j, i));
    }
  }
  Result result;
  result.assignment.assign(m, -1);
  for (int64_t pick = 0; pick < k; ++pick) {
    int64_t chosen = -1, most = -1;
    for (int64_t j = 0; j < n; ++j) {
      if (used[j]) continue;
      int64_t gain = 0;
      for (int64_t i = 0; i < m; ++i)
        if (s(j, i) > best[i]) gain += static_cast<int64_t>(static_cast<T>(s(j, i) - best[i]) * weight[i]);
      if (gain > most) {
        most = gain;
        chosen = j;
      }
    }
    used[chosen] = true;
    for (int64_t i = 0; i < m; ++i) {
      if (!(s(chosen, i) > best[i])) continue;
      best[i] = s(chosen, i);
      result.assignment[i] = pick;
    }
    result.indices.push_back(chosen);
    result.gains.push_back(static_cast<double>(most) / scale);
  }
  if (self) {
    for (int64_t pick = 0; pick < k; ++pick) {
      const int64_t j = result.indices[pick];
      if (!(before[j] > s(j, j))) result.assignment[j] = pick;
    }
  }
  result.weights.assign(k, 0.0);
  for (int64_t i = 0; i < m; ++i) {
    if (result.assignment[i] >= 0) result.weights[result.assignment[i]] += w[i];
    result.objective += w[i] * (static_cast<double>(best[i]) - static_cast<double>(floor));
  }
  return result;
}

}  // namespace oracle
