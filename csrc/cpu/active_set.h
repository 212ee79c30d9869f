// The small problem inside matching pursuit: least squares over the rows picked so far, given by their Gram
// matrix K [p, p] and their correlations c [p] with the target,
//
//     min_w w' K w - 2 c' w + ridge |w|^2,    w >= 0 if asked.
//
// The rows in use (all of them, or those with w > 0) have a Cholesky factor L L' = K + ridge I and y = L^-1
// c: a row that enters adds a row to L, one that leaves takes a row out, and rotations make L triangular
// again. Each of these steps costs O(p^2), as does L' w = y. Kernels for a GPU, which find the picks, fit
// weights by this code too (python/flashcoreset/pursuit/on_device.py).
//
// The non-negative problem is solved exactly, by the active-set method of Lawson and Hanson ("Solving least
// squares problems", 1974, chapter 23) from the solution before: a row whose weight would turn negative
// leaves with weight 0, and comes back when its correlation with the residual turns positive.
#pragma once

#include <cstdint>
#include <vector>

namespace fc {

// sum_i a_i b_i, in one order.
double dot(const double* a, const double* b, int64_t n);

class ActiveSet {
 public:
  // A row whose squared distance from the span of the rows in use is at most this share of its square counts
  // as dependent on them. A Gram matrix in double has 16 digits, which leaves 6 for the weights.
  static constexpr double kDependent = 1e-10;
  // Correlations of at most this share of |g_j| (|target| + sum_i |w_i| |g_i|) are rounding errors.
  static constexpr double kNoise = 1e-12;

  ActiveSet(bool nonnegative, double ridge, double target_norm)
      : nonnegative_(nonnegative), ridge_(ridge), target_norm_(target_norm), scale_(target_norm) {}

  int64_t size() const { return static_cast<int64_t>(weight_.size()); }
  const std::vector<double>& weights() const { return weight_; }  // [p], in pick order
  // The picks in use, as positions in pick order: the rows that the weighted sum is over.
  const std::vector<int64_t>& used() const { return used_; }
  // |target| + sum_i |w_i| |g_i|.
  double scale() const { return scale_; }

  // Takes in a row with products `products` [p + 1] with the picks and itself, and solves anew. Returns
  // false, and changes nothing, for a row that depends on those in use. Throws std::invalid_argument for
  // products that are not finite, and if the weights would not be.
  bool add(std::vector<double> products, double correlation);

  // |target - sum_i w_i g_i|^2; digits cancel if little is left of the target.
  double squared_residual() const;

 private:
  double gram(int64_t p, int64_t q) const { return p < q ? gram_[q][p] : gram_[p][q]; }

  bool enter(int64_t p);

  // Takes the row at position t of used_ out: without its row, L has one entry too many in each row below,
  // which rotations of neighbouring columns bring to 0.
  void leave(int64_t t);

  // z [rows in use] = the least-squares weights.
  void solve(std::vector<double>& z) const;

  void refit();

  // The pick of weight 0 that correlates most with the residual enters, if there is one.
  bool come_back(std::vector<char>& barred);

  const bool nonnegative_;
  const double ridge_, target_norm_;
  double scale_;
  std::vector<std::vector<double>> gram_;  // row p: products with picks 0 to p
  std::vector<double> norm_, correlation_, weight_;
  std::vector<int64_t> used_;
  std::vector<std::vector<double>> factor_;  // L; row i belongs to used_[i] and has i + 1 entries
  std::vector<double> solved_;               // y
};

}  // namespace fc
