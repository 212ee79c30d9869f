// Gains of all candidates at once, corrected for just the clients that changed since.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "core/tensor_view.h"
#include "core/threads.h"
#include "cpu/point_source.h"

namespace fc {

// What the last sweep over all candidates left, untouched by evaluations since.
template <class T>
class Sweeps {
 public:
  bool any() const { return any_; }
  int64_t gain(int64_t candidate) const { return gain_[candidate]; }

  // Takes the gains of a full sweep, in which `open` candidates were not picked yet.
  void take(Buffer<int64_t> gains, int64_t open) {
    gain_ = std::move(gains);
    open_ = open;
    any_ = true;
  }

  // Keeps the state that the gains belong to, for correct().
  void remember(const Cover<T>& cover, int64_t clients) {
    best_ = Buffer<T>(clients);
    std::copy_n(cover.best.data(), clients, best_.data());
  }

  // The cost of correct(), in evaluations of one candidate.
  double correction_cost(const Cover<T>& cover) const {
    const int64_t m = best_.size();
    int64_t changed = 0;
    for (int64_t i = 0; i < m; ++i) changed += cover.best[i] != best_[i];
    return 1.1 * static_cast<double>(open_) * static_cast<double>(changed) /
           static_cast<double>(std::max<int64_t>(m, 1));
  }

  // Brings the gains of the candidates that are not `chosen` up to date with `cover`.
  void correct(PointSource<T>& points, const std::vector<char>& chosen, const Cover<T>& cover,
               ThreadTeam& team, GreedyStats& stats) {
    std::vector<int64_t> open, changed;
    for (int64_t j = 0; j < gain_.size(); ++j) {
      if (!chosen[j] && gain_[j] > 0) open.push_back(j);
    }
    for (int64_t i = 0; i < best_.size(); ++i) {
      if (cover.best[i] != best_[i]) changed.push_back(i);
    }
    std::vector<int64_t> gains(open.size());
    for (size_t i = 0; i < open.size(); ++i) gains[i] = gain_[open[i]];
    open_ = static_cast<int64_t>(open.size());
    points.correct(open.data(), open_, changed, cover, best_, gains.data(), team, stats);
    for (size_t i = 0; i < open.size(); ++i) gain_[open[i]] = gains[i];
  }

 private:
  bool any_ = false;
  int64_t open_ = 0;
  Buffer<int64_t> gain_;
  Buffer<T> best_;  // each client's best similarity at the time of the gains
};

}  // namespace fc
