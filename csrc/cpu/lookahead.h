// The first picks of a greedy run, foreseen from a few likely candidates.
//
// A few percent of the candidates, the likely picks, are run ahead greedily, and one sweep computes
// everybody's gain both now and at some of the states foreseen: its products are shared, only the reductions
// multiply. If the picks come as foreseen, those sweeps cost nothing; from the first other pick on they are
// useless and forgotten. No bound ever rests on a guess.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <deque>
#include <limits>
#include <utility>
#include <vector>

#include "core/tensor_view.h"
#include "core/threads.h"
#include "cpu/candidate_heap.h"
#include "cpu/point_source.h"

namespace fc {

template <class T>
class Lookahead {
 public:
  // Where a run stands.
  struct State {
    const Cover<T>& cover;
    const std::vector<char>& chosen;
    T floor;
    int64_t picks, expected_picks;
  };

  // How many clients each candidate meets before the sweep, about: those of the survey, and as if a quarter
  // of all candidates were likely picks.
  static double survey_clients(double clients) {
    return std::max(static_cast<double>(kSurveyClients), clients / 20) + clients / 4;
  }

  static bool pays(const PointSource<T>& points, const State& now) {
    return points.candidates() >= kCandidates && points.clients() >= kSurveyClients &&
           now.expected_picks - now.picks >= 8;
  }

  // Foresees picks and returns everybody's gain now.
  Buffer<int64_t> sweep(PointSource<T>& points, const State& now, ThreadTeam& team, GreedyStats& stats) {
    const int64_t n = points.candidates();
    std::vector<Cover<T>> states;
    std::vector<int64_t> at;
    foresee(points, likely_picks(points, now, team, stats), now, states, at, team, stats);
    std::vector<const Cover<T>*> covers{&now.cover};
    for (const auto& state : states) covers.push_back(&state);
    std::vector<Buffer<int64_t>> gains;
    std::vector<int64_t*> places;
    for (size_t t = 0; t < covers.size(); ++t) gains.emplace_back(n);
    for (auto& g : gains) places.push_back(g.data());
    points.sweep(covers, places, team, stats);
    for (size_t t = 1; t < gains.size(); ++t) foreseen_.push_back({at[t - 1], std::move(gains[t])});
    return std::move(gains[0]);
  }

  // Whether the gains after this many picks were foreseen.
  bool has(int64_t picks) const { return !foreseen_.empty() && foreseen_.front().at == picks; }

  // These gains, which are given away.
  Buffer<int64_t> take() {
    Buffer<int64_t> gains = std::move(foreseen_.front().gains);
    foreseen_.pop_front();
    return gains;
  }

  // Forgets what was foreseen if another candidate is picked at `position`.
  void picked(int64_t candidate, int64_t position) {
    if (foreseen_.empty()) return;
    const auto step = static_cast<size_t>(position - from_);
    if (step >= picks_.size() || picks_[step] != candidate) foreseen_.clear();
  }

 private:
  // Candidates that stand out among their like: those that gain most from a sample of clients whose best is
  // at a high level, so that only near clients count, within each group of candidates nearest to the same of
  // some anchors.
  static std::vector<int64_t> likely_picks(PointSource<T>& points, const State& now, ThreadTeam& team,
                                           GreedyStats& stats) {
    const int64_t n = points.candidates(), m = points.clients();
    const int64_t count = std::min(m, std::max(kSurveyClients, m / 20)), anchors = 256;
    std::vector<int64_t> sample(count);
    // The anchors come first, spread over all clients like the rest.
    int64_t filled = 0;
    for (int64_t i = 0; i < count; ++i) {
      if (i * anchors / count != (i + 1) * anchors / count) sample[filled++] = i * m / count;
    }
    for (int64_t i = 0; i < count; ++i) {
      if (i * anchors / count == (i + 1) * anchors / count) sample[filled++] = i * m / count;
    }
    const std::vector<T> levels = survey_levels(points, now.floor, team);
    std::vector<Buffer<int64_t>> gains;
    for (size_t t = 0; t < levels.size(); ++t) gains.emplace_back(n);
    Buffer<int32_t> nearest(n);
    points.survey(sample, anchors, levels, now.cover, gains, nearest.data(), team, stats);
    std::vector<char> likely(n, 0);
    std::vector<std::vector<Entry>> groups(anchors);
    for (const auto& gain : gains) {
      for (auto& group : groups) group.clear();
      for (int64_t j = 0; j < n; ++j) {
        if (!now.chosen[j]) groups[nearest[j]].push_back({gain[j], j});
      }
      for (auto& group : groups) {
        const auto keep = static_cast<int64_t>(std::ceil(kLikelyShare * static_cast<double>(group.size())));
        std::partial_sort(group.begin(), group.begin() + keep, group.end(),
                          [](const Entry& a, const Entry& b) { return a.better_than(b); });
        for (int64_t i = 0; i < keep; ++i) likely[group[i].candidate] = 1;
      }
    }
    std::vector<int64_t> result;
    for (int64_t j = 0; j < n; ++j) {
      if (likely[j]) result.push_back(j);
    }
    return result;
  }

  // The similarities that every second, tenth and fiftieth pair exceeds, from a few candidates.
  static std::vector<T> survey_levels(PointSource<T>& points, T floor, ThreadTeam& team) {
    const int64_t n = points.candidates(), m = points.clients(), rows = std::min(n, points.sample_rows());
    std::vector<int64_t> index(rows);
    for (int64_t i = 0; i < rows; ++i) index[i] = i * n / rows;
    Buffer<T> sample(checked_mul(rows, m));
    points.similarities(index.data(), rows, sample.data(), m, team);
    T* const end = sample.data() + rows * m;
    std::vector<T> levels;
    for (const int64_t share : {2, 10, 50}) {
      T* const place = end - rows * m / share - 1;
      std::nth_element(sample.data(), place, end);
      levels.push_back(std::max(*place, floor));
    }
    return levels;
  }

  // Greedy picks among `likely` alone, from the present state on, into picks_; some of the covers on the way
  // into `states`, and after how many picks in all they are reached into `at`.
  void foresee(PointSource<T>& points, const std::vector<int64_t>& likely, const State& now,
               std::vector<Cover<T>>& states, std::vector<int64_t>& at, ThreadTeam& team,
               GreedyStats& stats) {
    const int64_t m = points.clients();
    const auto count = static_cast<int64_t>(likely.size());
    const int64_t steps = std::min<int64_t>(kSteps, std::min(count, now.expected_picks - now.picks) - 1);
    Cover<T> cover = copy(now.cover);
    Buffer<T> before(m), row(m);
    std::vector<int64_t> gains(count), changed;
    std::vector<char> used(count, 0);
    points.evaluate(likely.data(), count, cover, nullptr, gains.data(), team, stats);
    picks_.clear();
    from_ = now.picks;
    for (int64_t step = 1; step <= steps; ++step) {
      Entry best{-1, INT64_MAX};
      int64_t which = 0;
      for (int64_t i = 0; i < count; ++i) {
        if (const Entry e{gains[i], likely[i]}; !used[i] && e.better_than(best)) {
          best = e;
          which = i;
        }
      }
      used[which] = 1;
      picks_.push_back(best.candidate);
      std::copy_n(cover.best.data(), m, before.data());
      points.similarities(&best.candidate, 1, row.data(), m, team);
      changed.clear();
      for (int64_t i = 0; i < m; ++i) {
        if (!(row[i] > cover.best[i])) continue;
        cover.best[i] = row[i];
        changed.push_back(i);
      }
      points.correct(likely.data(), count, changed, cover, before, gains.data(), team, stats);
      if (std::find(std::begin(kStates), std::end(kStates), step) != std::end(kStates)) {
        states.push_back(copy(cover));
        at.push_back(now.picks + step);
      }
    }
  }

  static Cover<T> copy(const Cover<T>& cover) {
    Cover<T> result;
    result.best = Buffer<T>(cover.best.size());
    result.weight = Buffer<T>(cover.weight.size());
    std::copy_n(cover.best.data(), cover.best.size(), result.best.data());
    std::copy_n(cover.weight.data(), cover.weight.size(), result.weight.data());
    return result;
  }

  struct Foreseen {
    int64_t at;  // after how many picks
    Buffer<int64_t> gains;
  };
  static constexpr int64_t kCandidates = 4096, kSurveyClients = 2048, kSteps = 19;
  static constexpr int64_t kStates[] = {1, 2, 3, 4, 6, 9, 13, 19};
  static constexpr double kLikelyShare = 0.05;
  std::deque<Foreseen> foreseen_;
  std::vector<int64_t> picks_;  // the picks foreseen, from the pick `from_` on
  int64_t from_ = 0;
};

}  // namespace fc
