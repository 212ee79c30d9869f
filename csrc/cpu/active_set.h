// The small problem inside matching pursuit: least squares over the rows picked so far, given by their Gram
// matrix K [p, p] and their correlations c [p] with the target,
//
//     min_w w' K w - 2 c' w + ridge |w|^2,    w >= 0 if asked.
//
// The rows in use (all of them, or those with w > 0) have a Cholesky factor L L' = K + ridge I and y = L^-1
// c: a row that enters adds a row to L, one that leaves takes a row out, and rotations make L triangular
// again. Each of it costs O(p^2), as does L' w = y.
//
// The non-negative problem is solved exactly, by the active-set method of Lawson and Hanson ("Solving least
// squares problems", 1974, chapter 23) from the solution before: a row whose weight would turn negative
// leaves with weight 0, and comes back when its correlation with the residual turns positive.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <utility>
#include <vector>

#include "core/simd.h"

namespace fc {

// sum_i a_i b_i, in one order.
inline double dot(const double* a, const double* b, int64_t n) {
  using V = simd::Vec<double>;
  constexpr int64_t W = simd::kWidth<double>;
  V sum[4] = {};
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W) {
    for (int v = 0; v < 4; ++v) {
      sum[v] = simd::fma<double>(simd::load(a + i + v * W), simd::load(b + i + v * W), sum[v]);
    }
  }
  const V all[1] = {(sum[0] + sum[1]) + (sum[2] + sum[3])};
  double total;
  simd::lane_sums<1, double>(all, &total);
  for (; i < n; ++i) total += a[i] * b[i];
  return total;
}

class ActiveSet {
 public:
  // A row whose squared distance from the span of the rows in use is at most this share of its square counts
  // as dependent on them. A Gram matrix in double has 16 digits, which leaves weights 6.
  static constexpr double kDependent = 1e-10;
  // Correlations of at most this share of |g_j| (|target| + sum_i |w_i| |g_i|) are rounding errors.
  static constexpr double kNoise = 1e-12;

  ActiveSet(bool nonnegative, double ridge, double target_norm)
      : nonnegative_(nonnegative), ridge_(ridge), target_norm_(target_norm), scale_(target_norm) {}

  int64_t size() const { return static_cast<int64_t>(weight_.size()); }
  const std::vector<double>& weights() const { return weight_; }  // [p], in pick order
  // The picks in use, as positions in pick order: what the weights are sums over.
  const std::vector<int64_t>& used() const { return used_; }
  // |target| + sum_i |w_i| |g_i|.
  double scale() const { return scale_; }

  // Takes in a row with products `products` [p + 1] with the picks and itself, and solves anew. False, and
  // nothing has changed, for a row that depends on those in use.
  bool add(std::vector<double> products, double correlation) {
    norm_.push_back(std::sqrt(products.back()));
    gram_.push_back(std::move(products));
    correlation_.push_back(correlation);
    weight_.push_back(0);
    if (!enter(size() - 1)) {
      norm_.pop_back();
      gram_.pop_back();
      correlation_.pop_back();
      weight_.pop_back();
      return false;
    }
    refit();
    double sum = target_norm_;
    for (const int64_t p : used_) sum += std::abs(weight_[p]) * norm_[p];
    scale_ = sum;
    return true;
  }

  // |target - sum_i w_i g_i|^2; cancels where little is left of the target.
  double squared_residual() const {
    double sum = target_norm_ * target_norm_;
    for (const int64_t p : used_) sum -= weight_[p] * (correlation_[p] + ridge_ * weight_[p]);
    return sum;
  }

 private:
  double gram(int64_t p, int64_t q) const { return p < q ? gram_[q][p] : gram_[p][q]; }

  bool enter(int64_t p) {
    const int64_t s = static_cast<int64_t>(used_.size());
    const double square = gram(p, p) + ridge_;
    std::vector<double> row(s + 1);
    double rest = square;
    for (int64_t i = 0; i < s; ++i) {
      row[i] = (gram(p, used_[i]) - dot(factor_[i].data(), row.data(), i)) / factor_[i][i];
      rest -= row[i] * row[i];
    }
    if (!(rest > kDependent * square)) return false;
    row[s] = std::sqrt(rest);
    solved_.push_back((correlation_[p] - dot(row.data(), solved_.data(), s)) / row[s]);
    factor_.push_back(std::move(row));
    used_.push_back(p);
    return true;
  }

  // Takes the row at position t of used_ out: without its row, L has one entry too many in each row below,
  // which rotations of neighbouring columns bring to 0.
  void leave(int64_t t) {
    used_.erase(used_.begin() + t);
    factor_.erase(factor_.begin() + t);
    const int64_t s = static_cast<int64_t>(used_.size());
    std::vector<double> cosine(s), sine(s);
    for (int64_t i = t; i < s; ++i) {
      double* const row = factor_[i].data();
      double carried = row[t];
      for (int64_t c = t; c < i; ++c) {
        const double next = row[c + 1];
        row[c] = cosine[c] * carried + sine[c] * next;
        carried = cosine[c] * next - sine[c] * carried;
      }
      const double length = std::hypot(carried, row[i + 1]);
      cosine[i] = carried / length;
      sine[i] = row[i + 1] / length;
      row[i] = length;
      factor_[i].resize(i + 1);
      const double y = solved_[i];
      solved_[i] = cosine[i] * y + sine[i] * solved_[i + 1];
      solved_[i + 1] = cosine[i] * solved_[i + 1] - sine[i] * y;
    }
    solved_.pop_back();
  }

  // z [rows in use] = the least-squares weights.
  void solve(std::vector<double>& z) const {
    z = solved_;
    using V = simd::Vec<double>;
    constexpr int64_t W = simd::kWidth<double>;
    for (int64_t i = static_cast<int64_t>(z.size()) - 1; i >= 0; --i) {
      const double* const row = factor_[i].data();
      const double value = z[i] /= row[i];
      const V minus = simd::broadcast(-value);
      int64_t c = 0;
      for (; c + W <= i; c += W) {
        simd::store(&z[c], simd::fma<double>(minus, simd::load(row + c), simd::load(&z[c])));
      }
      for (; c < i; ++c) z[c] -= value * row[c];
    }
  }

  void refit() {
    std::vector<double> z;
    std::vector<char> barred(nonnegative_ ? size() : 0);
    // Every round lowers the objective, so that none comes twice; with rounding, the bound makes sure.
    for (int64_t round = 0; round < 3 * size() + 3; ++round) {
      const int64_t entered = used_.empty() ? -1 : used_.back();
      while (true) {
        solve(z);
        if (!nonnegative_) break;
        // From w towards z, as far as no weight turns negative.
        double most = 1;
        bool blocked = false;
        for (size_t i = 0; i < used_.size(); ++i) {
          if (z[i] > 0) continue;
          const double w = weight_[used_[i]];
          most = std::min(most, w > 0 ? w / (w - z[i]) : 0.0);
          blocked = true;
        }
        if (!blocked) break;
        std::vector<int64_t> gone;
        for (size_t i = 0; i < used_.size(); ++i) {
          double& w = weight_[used_[i]];
          const bool hits = z[i] <= 0 && (w > 0 ? w / (w - z[i]) : 0.0) <= most;
          w = hits ? 0 : std::max(w + most * (z[i] - w), 0.0);
          if (hits) gone.push_back(static_cast<int64_t>(i));
        }
        for (auto t = gone.rbegin(); t != gone.rend(); ++t) {
          barred[used_[*t]] = barred[used_[*t]] || (most == 0 && used_[*t] == entered);
          leave(*t);
        }
      }
      for (size_t i = 0; i < used_.size(); ++i) weight_[used_[i]] = z[i];
      if (static_cast<int64_t>(used_.size()) == size() || !come_back(barred)) return;
    }
  }

  // The pick of weight 0 that correlates most with the residual enters, if there is one.
  bool come_back(std::vector<char>& barred) {
    double scale = target_norm_;
    for (const int64_t p : used_) scale += weight_[p] * norm_[p];
    while (true) {
      std::vector<char> idle(size(), 1);
      for (const int64_t p : used_) idle[p] = 0;
      int64_t best = -1;
      double most = 0;
      for (int64_t p = 0; p < size(); ++p) {
        if (!idle[p] || barred[p]) continue;
        double left = correlation_[p];
        for (const int64_t q : used_) left -= weight_[q] * gram(p, q);
        if (left > kNoise * scale * norm_[p] && left > most) {
          most = left;
          best = p;
        }
      }
      if (best < 0) return false;
      if (enter(best)) return true;
      barred[best] = 1;
    }
  }

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
