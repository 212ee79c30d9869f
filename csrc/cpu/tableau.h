// Vectors in terms of a basis of them, and how factors that belong to them move along their null vectors:
// what the Caratheodory reduction is made of. caratheodory.cpp has the method.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <vector>

#include "core/simd.h"
#include "core/threads.h"

namespace fc {

// y [count] -= a * x.
inline void subtract(double* y, const double* x, double a, int64_t count) {
  int64_t j = 0;
  const simd::Vec<double> factor = simd::broadcast(a);
  for (; j + simd::kWidth<double> <= count; j += simd::kWidth<double>) {
    simd::store(y + j, simd::load(y + j) - factor * simd::load(x + j));
  }
  for (; j < count; ++j) y[j] -= a * x[j];
}

inline double max_abs(const double* x, int64_t count) {
  double most = 0;
  int64_t j = 0;
  if (count >= simd::kWidth<double>) {
    simd::Vec<double> lanes{};
    for (; j + simd::kWidth<double> <= count; j += simd::kWidth<double>) {
      const simd::Vec<double> v = simd::abs<double>(simd::load(x + j));
      lanes = v > lanes ? v : lanes;
    }
    most = simd::lane_max<double>(lanes);
  }
  for (; j < count; ++j) most = std::max(most, std::fabs(x[j]));
  return most;
}

// Loops that drop rows end only if weights are finite.
[[noreturn]] inline void refuse_sums() {
  throw std::invalid_argument("x, weights: sums of their products are not finite; scale them down");
}

// The vectors, one per column, and then T; column `extra`, if there is one, takes part in the elimination but
// never enters the basis. A pivot costs one multiply-add per number, and threads share large pivots.
class Tableau {
 public:
  // rows = coordinates, columns = vectors.
  Tableau(int64_t coordinates, int64_t vectors, bool extra, ThreadTeam& team);

  double* row(int64_t i) { return t_.data() + i * width_; }

  // Divides each coordinate by its largest magnitude (`together`: all but the first by the largest magnitude
  // of all of these), or leaves it out if that magnitude is at most least[i]. Throws std::invalid_argument
  // for NaN and infinity.
  void scale(const std::vector<double>& least, bool together);

  // Turns columns into the basis and T.
  void eliminate();

  // Moves rho [vectors] along null vectors, each of which brings one of them to 0, `count` times or until no
  // column is left.
  void reduce(std::vector<double>& rho, int64_t count);

  // The same with rho_i <= bound_i: each null vector brings one of them to 0 or to its bound. Which way to go
  // is drawn such that the mean of rho does not change. Ends also when `count` have come to 0, and after a
  // pivot so small that T is no longer good; returns how many have come to 0.
  int64_t sample(std::vector<double>& rho, const std::vector<double>& bound, int64_t count, uint64_t draw);

  // The further column in terms of the basis: pairs of a vector and its coefficient.
  int64_t rank() const { return rank_; }
  int64_t basis(int64_t i) const { return basis_[i]; }
  double coefficient(int64_t i) { return row(i)[columns_]; }

 private:
  struct Leaving;

  // Takes column j out, into factor_; the last column moves to its place.
  void take_column(int64_t j);

  // The column taken out last becomes the unit vector of row p of the first `count` rows.
  void pivot(int64_t p, int64_t count);

  // How far basic vector i may go if rho of the column taken out goes down (sign -1) or up (1).
  double room(const std::vector<double>& rho, const std::vector<double>& bound, int64_t i, double sign) const;

  // Which basic vector comes to 0 or to its bound first.
  Leaving leaving(const std::vector<double>& rho, const std::vector<double>& bound, double sign) const;

  // rho of the column taken out is to go down by `step`.
  void move(std::vector<double>& rho, const std::vector<double>& bound, double step);

  // Moves until basic vector `out` is at its end, where the column taken out (which goes down if sign is 1,
  // up if it is -1) takes its place in the basis. Returns rho of the one that left.
  double exchange(std::vector<double>& rho, const std::vector<double>& bound, const Leaving& out,
                  double sign);

  ThreadTeam& team_;
  int64_t rows_, columns_, width_, rank_ = 0, last_vector_ = -1;
  bool extra_;
  std::vector<double> t_, factor_;
  std::vector<int64_t> vector_of_;  // of columns
  std::vector<int64_t> basis_;      // of rows
};

}  // namespace fc
