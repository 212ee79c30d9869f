// A weighted subset of rows with the weighted mean and the total weight of all rows.
//
// See caratheodory.cpp for the algorithm and the cost.
#pragma once

#include <cstdint>
#include <vector>

#include "core/half.h"
#include "core/tensor_view.h"
#include "core/threads.h"

namespace fc {

struct WeightedRows {
  std::vector<int64_t> rows;    // ascending
  std::vector<double> weights;  // positive
};

// Finds at most rank + 1 of the rows x [n, d] with weights [n] >= 0, not all 0 (null: all 1), and new weights
// for them; the sum of the weights and the weighted sum of the rows stay unchanged. The rank is that of the
// rows less their mean. With max_size > 0 the reduction ends as soon as at most that many rows are left, if
// so few are enough, and weights stay as even as that allows: none grows beyond total / (max_size - d - 1).
// With one_scale, numbers that are small beside the largest number of all columns count as rounding. X is
// float, double, Half or BFloat16; all arithmetic is double, and the result does not depend on the number of
// threads. Throws std::invalid_argument for NaN and infinity in x, naming the first.
template <class X>
WeightedRows caratheodory(TensorView<const X, 2> x, const TensorView<const double, 1>* weights,
                          int64_t max_size, ThreadTeam& team, bool one_scale = false);

// ---- Its parts, for a backend whose rows are elsewhere. Its sums are sums of w (1, x - centre) over
// neighbouring rows, [runs, 1 + d], its rows contiguous, x being the rows times `shrink`.

// What the weights have to preserve.
struct Moments {
  explicit Moments(int64_t d) : centre(d), target(1 + d) {}

  int64_t d() const { return static_cast<int64_t>(centre.size()); }

  // How many runs of rows are reduced together, at most.
  int64_t most_runs() const { return (target.size() > 64 ? 2 : 4) * static_cast<int64_t>(target.size()); }

  std::vector<double> centre;  // [d]
  std::vector<double> target;  // [1 + d], the sum over all rows
  double shrink = 1;           // keeps sums of huge numbers finite
  bool one_scale = false;
};

// Makes the sum of `sums` the target. Returns false if a sum is so large, or not finite, that sums with the
// weights of later rounds, which are larger, may overflow: then `shrink` is needed.
bool take_total(Moments& moments, TensorView<const double, 2> sums);

// Makes the mean of all rows the centre, and moves the target and `sums` (the sums given to take_total())
// along. Returns false if the centre was so far off that rounding would show: then neither has moved, and
// sums about the new centre have to be taken, and their total.
bool move_to_mean(Moments& moments, TensorView<double, 2> sums);

// Factors of runs that keep the sum of `sums`, as few of them > 0 as there can be.
std::vector<double> factors_of_runs(const Moments& moments, TensorView<const double, 2> sums,
                                    ThreadTeam& team);

// caratheodory() of the rows that are left, x [n, d] with weights [n]; the sums are to become those of all
// rows.
template <class X>
WeightedRows reduce_rest(const Moments& moments, TensorView<const X, 2> x,
                         TensorView<const double, 1> weights, ThreadTeam& team);

// caratheodory() with max_size, for rows that come piece by piece.
class Sampler {
 public:
  // At most `goal` of the `weights` [n] > 0 stay positive, if so few are enough.
  Sampler(const Moments& moments, TensorView<double, 1> weights, int64_t goal, ThreadTeam& team);

  // Takes the next rows: x [count, d], or the rows of x that are named.
  template <class X>
  void push(TensorView<const X, 2> x, const std::vector<int64_t>* rows = nullptr);

  // Whether the goal is reached, so that further rows are not read.
  bool done() const { return remaining_ <= goal_; }

  // To be called after the last row. Sums are then preserved up to the rounding of the steps:
  // correct_weights() follows.
  void finish();

 private:
  // Whether anything could still be moved.
  bool step(bool last);

  const Moments& moments_;
  TensorView<double, 1> weights_;
  ThreadTeam& team_;
  int64_t goal_, remaining_, next_ = 0;
  double even_;
  uint64_t draw_ = 0;
  std::vector<int64_t> block_;       // rows that are neither dropped nor at their bound
  std::vector<double> differences_;  // [most_runs, d], their differences from the centre
};

// Adds to `weights` [k] of the rows x [k, d] the amount that the sums [1 + d] of all rows left are short of
// the target.
template <class X>
void correct_weights(const Moments& moments, TensorView<const X, 2> x, TensorView<double, 1> weights,
                     TensorView<const double, 1> sums, ThreadTeam& team);

}  // namespace fc
