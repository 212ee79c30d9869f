// Every row i with weight w_i > 0 is a vector M_i = w_i (1, x_i - c) of D = d + 1 numbers, and what has to be
// kept is the sum of M_i rho_i, at first with all rho_i = 1. While more than rank(M) vectors are left, there
// is a v != 0 with sum_i v_i M_i = 0; moving rho along it until one rho_i is 0 changes nothing else
// (Caratheodory, 1907).
//
// Clusters (Maalouf, Jubran and Feldman, "Fast and accurate least-mean-squares solvers", NeurIPS 2019): the
// rows left are cut into m = 4 D (large D: 2 D) runs, whose vectors are sums of their rows'. Reducing m such
// vectors to rank of them drops three quarters of the rows at once, and the same factor then belongs to all
// rows of a run. In the last round runs are single rows.
//
// Null vectors without a factorisation each: Gauss-Jordan elimination with complete pivoting finds a basis B
// of the m vectors and all the rest in its terms, T = B^-1 M [rank, m - rank]. A column of T is a null
// vector. Taking columns from the last on, either column j's own rho comes to 0, and it is dropped (O(D)), or
// that of a basic vector p: then j takes its place, and T is updated by one pivot of the columns that are
// left (O(D * columns)). Of the two directions along v the one is taken that drops j, else the one with the
// larger pivot; among vectors that come to 0 within rounding the largest pivot wins (Harris). Each round
// factorises anew, so errors do not grow with n. At the end one more elimination, with what is missing to the
// sums as a further column, corrects the factors of a basis.
//
// With max_size = k there is room for weights that are nearly even: rho_i w_i is bounded by W / (k - D), W
// being the total, and null vectors lead to that bound as well as to 0. Single rows go through T, 4 D at a
// time; those at neither end, at most D, go on with the next ones. Which of the two directions is taken is
// drawn so that the mean of rho stays 1: a row's chance does not depend on its numbers (the cube method:
// Deville and Tille, "Efficient balanced sampling", Biometrika 91, 2004; Chauvet and Tille, "A fast algorithm
// for balanced sampling", Computational Statistics 21, 2006). At most k - D rows reach the bound, and D lie
// between, so k are enough. The draws are fixed: a result depends on the order of the rows. Cost: n / (3 D)
// tableaus, about 2 n D^2.
//
// Scale: rows are taken less the mean of a few of them before anything is summed (less that of all where this
// is far off, for a second reading), runs less the mean of all; each coordinate is divided by its largest
// magnitude among the m vectors. A coordinate whose differences are rounding of its size counts as constant.
//
// Where there are more coordinates than twice the rows, the rows' coordinates are first replaced by the n
// columns of the triangle R of a QR factorisation of M: same null vectors, n coordinates.
//
// Cost: 4/3 n d multiplications and readings of numbers for the sums, and in each of log4(n / D) rounds about
// 6 D^3 multiply-adds (4 D^3 the elimination, at most half of 3 D pivots of 1.5 D^2 each). At 18,000 x 16
// that is 0.4 and 0.15 million, at 100,000 x 32 4.3 and 1.3 million: reading the rows is most of it. A
// singular value decomposition for each null vector costs some 20 D^3 for each of D log2(n / D) vectors, 15
// and 250 million.
//
// Rejected: one pass over single rows with a basis exchange for each (n D^2); the inverse of the basis alone,
// as in the revised simplex method (as many operations where all columns are looked at anyway, in shorter
// loops); Gram matrices (half of the digits).
#include "cpu/caratheodory.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "core/philox.h"
#include "core/simd.h"

namespace fc {
namespace {

constexpr double kEps = std::numeric_limits<double>::epsilon();
constexpr int64_t kBlockRows = 256;  // summed together before they are added to a run's sum
constexpr int64_t kSampleRows = 64;  // whose mean is the first centre
constexpr int64_t kPart = 1 << 15;   // multiply-adds that a thread takes at a time
constexpr int64_t kPivotParts = 8;   // parts of a pivot, and of the sums, that are worth a second thread
constexpr int64_t kSumParts = 64;
constexpr int64_t kQrRows = 32;    // coordinates that are factorised together
constexpr int64_t kQrPieces = 16;  // pieces of the coordinates, whatever the number of threads

// Samples whose numbers are few and round have basic vectors at their ends and pivots that should be 0 but
// for rounding. After one as small as this T is made anew.
constexpr double kLeastPivot = 1e-3;

using simd::kWidth;
using simd::Vec;

template <class X>
double value_of(X x) {
  if constexpr (std::is_floating_point_v<X>) {
    return x;
  } else {
    return simd::widen(x);
  }
}

// y -= a * x.
void subtract(double* y, const double* x, double a, int64_t count) {
  int64_t j = 0;
  const Vec<double> factor = simd::broadcast(a);
  for (; j + kWidth<double> <= count; j += kWidth<double>) {
    simd::store(y + j, simd::load(y + j) - factor * simd::load(x + j));
  }
  for (; j < count; ++j) y[j] -= a * x[j];
}

double max_abs(const double* x, int64_t count) {
  double most = 0;
  int64_t j = 0;
  if (count >= kWidth<double>) {
    Vec<double> lanes{};
    for (; j + kWidth<double> <= count; j += kWidth<double>) {
      const Vec<double> v = simd::abs<double>(simd::load(x + j));
      lanes = v > lanes ? v : lanes;
    }
    most = simd::lane_max<double>(lanes);
  }
  for (; j < count; ++j) most = std::max(most, std::fabs(x[j]));
  return most;
}

// The m vectors of a round and T; column `extra`, if there is one, takes part in the elimination but never
// enters the basis.
class Tableau {
 public:
  // rows = coordinates, columns = vectors.
  Tableau(int64_t coordinates, int64_t vectors, bool extra, ThreadTeam& team)
      : team_(team),
        rows_(coordinates),
        columns_(vectors),
        width_(vectors + (extra ? 1 : 0)),
        extra_(extra),
        t_(static_cast<size_t>(coordinates * width_)),
        factor_(static_cast<size_t>(coordinates)),
        vector_of_(static_cast<size_t>(vectors)) {
    std::iota(vector_of_.begin(), vector_of_.end(), int64_t{0});
  }

  double* row(int64_t i) { return t_.data() + i * width_; }

  // Divides each coordinate by its largest magnitude (`together`: all but the first by that of all of these),
  // or leaves it out if that is at most least[i].
  void scale(const std::vector<double>& least, bool together) {
    const double of_all = together ? max_abs(row(1), (rows_ - 1) * width_) : 0;
    int64_t kept = 0;
    for (int64_t i = 0; i < rows_; ++i) {
      const double most = max_abs(row(i), columns_), divisor = together && i > 0 ? of_all : most;
      if (!(most > least[i])) continue;
      for (int64_t j = 0; j < width_; ++j) row(kept)[j] = row(i)[j] / divisor;
      ++kept;
    }
    rows_ = kept;
  }

  // Turns columns into the basis and T.
  void eliminate() {
    const double least = 4 * kEps * static_cast<double>(std::max<int64_t>(rows_, 64));
    std::vector<double> most(rows_);
    for (int64_t i = 0; i < rows_; ++i) most[i] = max_abs(row(i), columns_);
    while (rank_ < rows_ && columns_ > 0) {
      team_.check();
      const int64_t p = std::max_element(most.begin() + rank_, most.end()) - most.begin();
      if (!(most[p] > least)) break;
      int64_t j = 0;
      while (std::fabs(row(p)[j]) != most[p]) ++j;
      std::swap_ranges(row(p), row(p) + width_, row(rank_));
      std::swap(most[p], most[rank_]);
      take_column(j);
      basis_.push_back(last_vector_);
      pivot(rank_, rows_);
      ++rank_;
      for (int64_t i = rank_; i < rows_; ++i) most[i] = max_abs(row(i), columns_);
    }
    rows_ = rank_;
  }

  // Moves rho [vectors] along null vectors, each of which brings one of them to 0, `count` times or until no
  // column is left.
  void reduce(std::vector<double>& rho, int64_t count) {
    const std::vector<double> bound(rho.size(), std::numeric_limits<double>::infinity());
    for (; count > 0 && columns_ > 0; --count) {
      team_.check();
      take_column(columns_ - 1);
      const Leaving down = leaving(rho, bound, -1);
      if (rho[last_vector_] <= down.longest) {
        move(rho, bound, rho[last_vector_]);
        rho[last_vector_] = 0;
        continue;
      }
      const Leaving up = leaving(rho, bound, 1);
      if (up.pivot > down.pivot) {
        exchange(rho, bound, up, -1);
      } else {
        exchange(rho, bound, down, 1);
      }
    }
  }

  // The same with rho_i <= bound_i: each null vector brings one of them to 0 or to its bound. Which way to go
  // is drawn such that the mean of rho does not change. Ends also when `count` have come to 0, and after a
  // pivot so small that T is no longer good; returns how many have come to 0.
  int64_t sample(std::vector<double>& rho, const std::vector<double>& bound, int64_t count, uint64_t draw) {
    int64_t zeros = 0;
    while (zeros < count && columns_ > 0) {
      team_.check();
      take_column(columns_ - 1);
      double& own = rho[last_vector_];
      const Leaving down = leaving(rho, bound, -1), up = leaving(rho, bound, 1);
      const double room_up = bound[last_vector_] - own;
      const double step_down = std::min(own, down.longest), step_up = std::min(room_up, up.longest);
      const uint32_t word = philox4x32(draw, static_cast<uint64_t>(last_vector_), 0)[0];
      const bool goes_up = (word + 0.5) * 0x1p-32 * (step_down + step_up) < step_down;
      const Leaving& out = goes_up ? up : down;
      const double room = goes_up ? room_up : own, sign = goes_up ? -1 : 1;
      if (room <= out.longest) {
        move(rho, bound, sign * room);
        own = goes_up ? bound[last_vector_] : 0;
        zeros += own == 0;
      } else {
        zeros += exchange(rho, bound, out, sign) == 0;
        if (out.pivot < kLeastPivot) break;
      }
    }
    return zeros;
  }

  // The further column in terms of the basis: pairs of a vector and its coefficient.
  int64_t rank() const { return rank_; }
  int64_t basis(int64_t i) const { return basis_[i]; }
  double coefficient(int64_t i) { return row(i)[columns_]; }

 private:
  struct Leaving {
    double longest = std::numeric_limits<double>::infinity();  // step, rounding allowed for
    double pivot = 0;                                          // |factor| of the basic vector that leaves
    int64_t row = -1;
  };

  // Takes column j out, into factor_; the last one moves to its place.
  void take_column(int64_t j) {
    --columns_;
    last_vector_ = vector_of_[j];
    vector_of_[j] = vector_of_[columns_];
    for (int64_t i = 0; i < rows_; ++i) {
      double* r = row(i);
      factor_[i] = r[j];
      r[j] = r[columns_];
      if (extra_) r[columns_] = r[columns_ + 1];
    }
  }

  // The column taken out last becomes the unit vector of row p of the first `count` rows.
  void pivot(int64_t p, int64_t count) {
    const int64_t width = columns_ + (extra_ ? 1 : 0);
    double* const source = row(p);
    for (int64_t j = 0; j < width; ++j) source[j] /= factor_[p];
    const auto update = [&](int, int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        if (i != p && factor_[i] != 0) subtract(row(i), source, factor_[i], width);
      }
    };
    if (count * width < kPivotParts * kPart) {
      update(0, 0, count);
    } else {
      team_.parallel_for(count, std::max<int64_t>(1, kPart / width), update);
    }
  }

  // How far basic vector i may go where rho of the column taken out goes down (sign -1) or up (1).
  double room(const std::vector<double>& rho, const std::vector<double>& bound, int64_t i,
              double sign) const {
    return sign * factor_[i] > 0 ? rho[basis_[i]] : bound[basis_[i]] - rho[basis_[i]];
  }

  // Which basic vector comes to 0 or to its bound first.
  Leaving leaving(const std::vector<double>& rho, const std::vector<double>& bound, double sign) const {
    Leaving out;
    for (int64_t i = 0; i < rank_; ++i) {
      if (factor_[i] == 0) continue;
      const double way = room(rho, bound, i, sign), rounding = kEps * std::max(1.0, way);
      out.longest = std::min(out.longest, (way + rounding) / std::fabs(factor_[i]));
    }
    for (int64_t i = 0; i < rank_; ++i) {
      const double factor = std::fabs(factor_[i]);
      // Division is monotone, so the vector that set the longest step is among them.
      if (factor > out.pivot && room(rho, bound, i, sign) / factor <= out.longest) {
        out.pivot = factor;
        out.row = i;
      }
    }
    return out;
  }

  // rho of the column taken out is to go down by `step`.
  void move(std::vector<double>& rho, const std::vector<double>& bound, double step) {
    for (int64_t i = 0; i < rank_; ++i) {
      double& r = rho[basis_[i]];
      r = std::clamp(r + step * factor_[i], 0.0, bound[basis_[i]]);
    }
  }

  // Moves until basic vector `out` is at its end, where the column taken out (which goes down if sign is 1,
  // up if it is -1) takes its place in the basis. Returns rho of the one that left.
  double exchange(std::vector<double>& rho, const std::vector<double>& bound, const Leaving& out,
                  double sign) {
    const int64_t left = basis_[out.row];
    const bool falls = sign * factor_[out.row] < 0;
    const double step = sign * room(rho, bound, out.row, -sign) / out.pivot;
    move(rho, bound, step);
    rho[last_vector_] = std::clamp(rho[last_vector_] - step, 0.0, bound[last_vector_]);
    rho[left] = falls ? 0 : bound[left];
    basis_[out.row] = last_vector_;
    pivot(out.row, rank_);
    return rho[left];
  }

  ThreadTeam& team_;
  int64_t rows_, columns_, width_, rank_ = 0, last_vector_ = -1;
  bool extra_;
  std::vector<double> t_, factor_;
  std::vector<int64_t> vector_of_;  // of columns
  std::vector<int64_t> basis_;      // of rows
};

// The rows less a centre, and sums of runs of them.
template <class X>
class Rows {
 public:
  explicit Rows(const TensorView<const X, 2>& x) : x_(x), d_(x.shape[1]), centre_(static_cast<size_t>(d_)) {}

  double centre(int64_t j) const { return centre_[j]; }

  // `factor` of all values; it keeps sums of huge numbers finite.
  void shrink(double factor) { shrink_ = factor; }

  // The mean of a few of the rows becomes the centre.
  void centre_on(const std::vector<int64_t>& rows, const std::vector<double>& w) {
    const int64_t n = static_cast<int64_t>(rows.size()), count = std::min(n, kSampleRows);
    double total = 0;
    for (int64_t s = 0; s < count; ++s) total += w[s * n / count];
    std::fill(centre_.begin(), centre_.end(), 0.0);
    for (int64_t s = 0; s < count; ++s) {
      const int64_t at = s * n / count;
      for (int64_t j = 0; j < d_; ++j) {
        centre_[j] += value_of(x_(rows[at], j)) * shrink_ * (w[at] / total);
      }
    }
  }

  void set_centre(int64_t j, double value) { centre_[j] = value; }

  double difference(int64_t i, int64_t j) const { return value_of(x_(i, j)) * shrink_ - centre_[j]; }

  // sum [1 + d] = sum of w (1, x - c) over rows[begin, end).
  void sum(const std::vector<int64_t>& rows, const std::vector<double>& w, int64_t begin, int64_t end,
           double* sum) const {
    std::vector<double> part(1 + d_);
    std::fill(sum, sum + 1 + d_, 0.0);
    const bool compact = x_.has_contiguous_rows();
    double* const out = part.data() + 1;
    const double* const c = centre_.data();
    // Rows first to last, four at a time, so that the sums are read and written less often.
    const auto add = [&](int64_t first, int64_t last, auto stride) {
      const auto value = [&](const X* p, int64_t j) { return value_of(p[j * stride]) * shrink_ - c[j]; };
      int64_t r = first;
      for (; r + 4 <= last; r += 4) {
        const X *p0 = x_.row(rows[r]), *p1 = x_.row(rows[r + 1]), *p2 = x_.row(rows[r + 2]),
                *p3 = x_.row(rows[r + 3]);
        const double w0 = w[r], w1 = w[r + 1], w2 = w[r + 2], w3 = w[r + 3];
        part[0] += (w0 + w1) + (w2 + w3);
        for (int64_t j = 0; j < d_; ++j) {
          out[j] += (w0 * value(p0, j) + w1 * value(p1, j)) + (w2 * value(p2, j) + w3 * value(p3, j));
        }
      }
      for (; r < last; ++r) {
        const X* const p = x_.row(rows[r]);
        part[0] += w[r];
        for (int64_t j = 0; j < d_; ++j) out[j] += w[r] * value(p, j);
      }
    };
    for (int64_t first = begin; first < end; first += kBlockRows) {
      std::fill(part.begin(), part.end(), 0.0);
      const int64_t last = std::min(end, first + kBlockRows);
      if (compact) {
        add(first, last, std::integral_constant<int64_t, 1>());
      } else {
        add(first, last, x_.stride[1]);
      }
      for (int64_t j = 0; j <= d_; ++j) sum[j] += part[j];
    }
  }

  // Raises for the first NaN or infinity, if there is one.
  void check_finite() const {
    for (int64_t i = 0; i < x_.shape[0]; ++i) check_finite(i);
  }

  void check_finite(int64_t i) const {
    for (int64_t j = 0; j < d_; ++j) {
      const double value = value_of(x_(i, j));
      if (std::isfinite(value)) continue;
      throw std::invalid_argument(std::string("x must be finite, got ") +
                                  (std::isnan(value) ? "NaN"
                                   : value > 0       ? "inf"
                                                     : "-inf") +
                                  " at row " + std::to_string(i) + ", column " + std::to_string(j));
    }
  }

 private:
  TensorView<const X, 2> x_;
  int64_t d_;
  double shrink_ = 1;
  std::vector<double> centre_;
};

// The rows that are left, their weights, and what the weights have to add up to.
template <class X>
class Reduction {
 public:
  // `together`: the columns of x share one scale, and what is small beside the largest of all is rounding.
  Reduction(const TensorView<const X, 2>& x, std::vector<int64_t> rows, std::vector<double> weights,
            bool together, ThreadTeam& team)
      : team_(team),
        source_(x),
        rows_(std::move(rows)),
        weights_(std::move(weights)),
        together_(together),
        d_(x.shape[1]) {
    most_ = (1 + d_ > 64 ? 2 : 4) * (1 + d_);
  }

  // As few rows as there can be.
  void run() {
    start();
    const int64_t n = left();
    bool last = n == 1;
    while (!last) last = round((left() + most_ - 1) / most_);
    for (int i = 0; i < 2 && left() < n; ++i) correct();
  }

  // At most `goal` rows if there can be so few, of weights as even as that allows.
  void sample(int64_t goal) {
    start();
    if (left() <= goal) return;
    const double even = goal > 1 + d_ ? target_[0] / static_cast<double>(goal - (1 + d_))
                                      : std::numeric_limits<double>::infinity();
    int64_t remaining = left(), next = 0;
    std::vector<int64_t> block;  // rows that are neither dropped nor at their bound
    for (uint64_t draw = 0; remaining > goal; ++draw) {
      for (; static_cast<int64_t>(block.size()) < most_ && next < left(); ++next) {
        if (weights_[next] < even) block.push_back(next);
      }
      Tableau tableau = tableau_of(block);
      tableau.eliminate();
      if (next == left() && tableau.rank() == static_cast<int64_t>(block.size())) break;
      std::vector<double> rho(block.size(), 1.0), bound;
      for (const int64_t r : block) bound.push_back(even / weights_[r]);
      tableau.sample(rho, bound, remaining - goal, draw);
      size_t kept = 0;
      for (size_t i = 0; i < block.size(); ++i) {
        const bool full = rho[i] == bound[i];
        weights_[block[i]] = full ? even : weights_[block[i]] * rho[i];
        if (weights_[block[i]] == 0) --remaining;
        if (!full && weights_[block[i]] > 0) block[kept++] = block[i];
      }
      block.resize(kept);
    }
    const int64_t n = left();
    keep_positive();
    for (int i = 0; i < 2 && left() < n; ++i) correct();
  }

  WeightedRows result() && { return {std::move(rows_), std::move(weights_)}; }

 private:
  int64_t left() const { return static_cast<int64_t>(rows_.size()); }

  // Sums of runs of `size` rows, at most `most_` of them.
  void sum_runs(int64_t size) {
    runs_ = std::min(most_, (left() + size - 1) / size);
    sums_.resize(static_cast<size_t>(runs_ * (1 + d_)));
    const int64_t run = size * (1 + d_);
    const bool small = runs_ * run < kSumParts * kPart;
    team_.parallel_for(runs_, small ? runs_ : std::max<int64_t>(1, kPart / run),
                       [&](int, int64_t begin, int64_t end) {
                         for (int64_t c = begin; c < end; ++c) {
                           source_.sum(rows_, weights_, c * size, std::min(left(), (c + 1) * size),
                                       sums_.data() + c * (1 + d_));
                         }
                       });
  }

  // The total to keep, and whether all numbers are finite.
  void start() {
    source_.centre_on(rows_, weights_);
    sum_all();
    if (!std::all_of(target_.begin(), target_.end(), [](double v) { return std::isfinite(v); })) {
      source_.check_finite();
      source_.shrink(0x1p-80);
      source_.centre_on(rows_, weights_);
      sum_all();
    }
    const std::vector<double> shift = move_centre();
    if (!centre_was_near(shift)) {
      sum_all();
      return;
    }
    for (int64_t c = 0; c < runs_; ++c) {
      for (int64_t j = 1; j <= d_; ++j) sums_[c * (1 + d_) + j] -= sums_[c * (1 + d_)] * shift[j];
    }
    for (int64_t j = 1; j <= d_; ++j) target_[j] -= target_[0] * shift[j];
  }

  // The mean of all becomes the centre; by how much it moved.
  std::vector<double> move_centre() {
    std::vector<double> shift(1 + d_);
    for (int64_t j = 1; j <= d_; ++j) {
      const double before = source_.centre(j - 1);
      source_.set_centre(j - 1, before + target_[j] / target_[0]);
      shift[j] = source_.centre(j - 1) - before;
    }
    return shift;
  }

  // Whether sums may be moved along, or rounding of the shift would show: the runs' sums less the shift are
  // at most the rows' magnitudes.
  bool centre_was_near(const std::vector<double>& shift) const {
    for (int64_t j = 1; j <= d_; ++j) {
      if (!(std::fabs(shift[j]) > 8 * kEps * std::fabs(source_.centre(j - 1)))) continue;
      double magnitudes = 0;
      for (int64_t c = 0; c < runs_; ++c) {
        magnitudes += std::fabs(sums_[c * (1 + d_) + j] - sums_[c * (1 + d_)] * shift[j]);
      }
      if (std::fabs(target_[j]) > 64 * magnitudes) return false;
    }
    return true;
  }

  void sum_all() {
    sum_runs((left() + most_ - 1) / most_);
    target_.assign(static_cast<size_t>(1 + d_), 0.0);
    for (int64_t c = 0; c < runs_; ++c) {
      for (int64_t j = 0; j <= d_; ++j) target_[j] += sums_[c * (1 + d_) + j];
    }
  }

  // Coordinates of a tableau whose largest magnitude is rounding: those of a constant column.
  std::vector<double> rounding(double weight) const {
    std::vector<double> least(1 + d_);
    for (int64_t j = 0; j < d_; ++j) least[1 + j] = 4 * kEps * weight * std::fabs(source_.centre(j));
    return least;
  }

  // Drops runs of `size` rows; whether nothing further can be dropped.
  bool round(int64_t size) {
    if (!fresh_) sum_runs(size);
    fresh_ = false;
    Tableau tableau(1 + d_, runs_, false, team_);
    double heaviest = 0;
    for (int64_t c = 0; c < runs_; ++c) {
      const double* const sum = sums_.data() + c * (1 + d_);
      tableau.row(0)[c] = sum[0];
      heaviest = std::max(heaviest, sum[0]);
      for (int64_t j = 1; j <= d_; ++j) tableau.row(j)[c] = sum[j] - sum[0] * (target_[j] / target_[0]);
    }
    tableau.scale(rounding(heaviest), together_);
    tableau.eliminate();
    std::vector<double> rho(runs_, 1.0);
    tableau.reduce(rho, runs_);
    for (int64_t c = 0; c < runs_; ++c) {
      for (int64_t r = c * size; r < std::min(left(), (c + 1) * size); ++r) weights_[r] *= rho[c];
    }
    keep_positive();
    return size == 1;
  }

  void keep_positive() {
    int64_t kept = 0;
    for (int64_t r = 0; r < left(); ++r) {
      if (!(weights_[r] > 0)) continue;
      rows_[kept] = rows_[r];
      weights_[kept] = weights_[r];
      ++kept;
    }
    rows_.resize(static_cast<size_t>(kept));
    weights_.resize(static_cast<size_t>(kept));
  }

  // The vectors of single rows, given by their places, and perhaps one further column, scaled.
  Tableau tableau_of(const std::vector<int64_t>& places, const std::vector<double>* extra = nullptr) {
    const int64_t count = static_cast<int64_t>(places.size());
    Tableau tableau(1 + d_, count, extra != nullptr, team_);
    double heaviest = 0;
    for (int64_t c = 0; c < count; ++c) {
      const double weight = weights_[places[c]];
      heaviest = std::max(heaviest, weight);
      tableau.row(0)[c] = weight;
      for (int64_t j = 1; j <= d_; ++j) {
        tableau.row(j)[c] = weight * (source_.difference(rows_[places[c]], j - 1) - target_[j] / target_[0]);
      }
    }
    if (extra) {
      for (int64_t j = 0; j <= d_; ++j) tableau.row(j)[count] = (*extra)[j];
    }
    tableau.scale(rounding(heaviest), together_);
    return tableau;
  }

  // Adds to the weights what the sums are short of.
  void correct() {
    // Of many rows the heaviest take it.
    std::vector<int64_t> chosen(rows_.size());
    std::iota(chosen.begin(), chosen.end(), int64_t{0});
    if (left() > most_) {
      std::nth_element(chosen.begin(), chosen.begin() + most_, chosen.end(), [&](int64_t a, int64_t b) {
        return weights_[a] > weights_[b] || (weights_[a] == weights_[b] && a < b);
      });
      chosen.resize(static_cast<size_t>(most_));
      std::sort(chosen.begin(), chosen.end());
    }
    std::vector<double> missing(1 + d_);
    source_.sum(rows_, weights_, 0, left(), missing.data());
    for (int64_t j = 0; j <= d_; ++j) missing[j] = target_[j] - missing[j];
    for (int64_t j = 1; j <= d_; ++j) missing[j] -= missing[0] * (target_[j] / target_[0]);
    Tableau tableau = tableau_of(chosen, &missing);
    tableau.eliminate();
    // Weights stay positive.
    double step = 1;
    for (int64_t i = 0; i < tableau.rank(); ++i) {
      const double change = tableau.coefficient(i);
      if (change < 0) step = std::min(step, -0.5 / change);
    }
    for (int64_t i = 0; i < tableau.rank(); ++i) {
      weights_[chosen[tableau.basis(i)]] *= 1 + step * tableau.coefficient(i);
    }
  }

  ThreadTeam& team_;
  Rows<X> source_;
  std::vector<int64_t> rows_;
  std::vector<double> weights_;
  bool together_;
  int64_t d_, most_, runs_ = 0;
  bool fresh_ = true;           // whether sums_ are those of start()
  std::vector<double> sums_;    // [runs, 1 + d]
  std::vector<double> target_;  // [1 + d]
};

// R <- the triangle of a QR factorisation of R [n, n] on top of block [count, n], by Householder reflections.
void append(std::vector<double>& r, std::vector<double>& block, int64_t n, int64_t count) {
  std::vector<double> dot(n);
  for (int64_t k = 0; k < n; ++k) {
    double* const top = r.data() + k * n;
    double largest = std::fabs(top[k]);
    for (int64_t i = 0; i < count; ++i) largest = std::max(largest, std::fabs(block[i * n + k]));
    if (largest == 0) continue;
    double square = (top[k] / largest) * (top[k] / largest);
    for (int64_t i = 0; i < count; ++i) {
      const double v = block[i * n + k] / largest;
      square += v * v;
    }
    const double norm = largest * std::sqrt(square), diagonal = top[k] > 0 ? -norm : norm;
    const double first = top[k] - diagonal;  // the reflection is along (first, column k of the block)
    // With v = (1, column / first) and beta = 2 / v.v = -first / diagonal.
    const double beta = -first / diagonal;
    std::copy(top + k + 1, top + n, dot.begin() + k + 1);
    for (int64_t i = 0; i < count; ++i) {
      subtract(dot.data() + k + 1, block.data() + i * n + k + 1, -block[i * n + k] / first, n - k - 1);
    }
    subtract(top + k + 1, dot.data() + k + 1, beta, n - k - 1);
    for (int64_t i = 0; i < count; ++i) {
      subtract(block.data() + i * n + k + 1, dot.data() + k + 1, beta * block[i * n + k] / first, n - k - 1);
    }
    top[k] = diagonal;
  }
}

// Points [n, n] with the null vectors of the rows less their mean: column i of R, for row i.
template <class X>
std::vector<double> compressed(const TensorView<const X, 2>& x, const std::vector<int64_t>& rows,
                               const std::vector<double>& weights, ThreadTeam& team) {
  const int64_t n = static_cast<int64_t>(rows.size()), d = x.shape[1];
  Rows<X> source(x);
  source.check_finite();
  double largest = 0;
  for (const int64_t i : rows) {
    for (int64_t j = 0; j < d; ++j) largest = std::max(largest, std::fabs(double(value_of(x(i, j)))));
  }
  if (largest > 1e290) source.shrink(0x1p-80);
  const double total = std::accumulate(weights.begin(), weights.end(), 0.0);
  std::vector<std::vector<double>> triangles(kQrPieces);
  team.parallel_for(kQrPieces, 1, [&](int thread, int64_t begin, int64_t end) {
    for (int64_t piece = begin; piece < end; ++piece) {
      std::vector<double>& r = triangles[piece];
      r.assign(static_cast<size_t>(n * n), 0.0);
      const int64_t stop = d * (piece + 1) / kQrPieces;
      std::vector<double> block;
      for (int64_t first = d * piece / kQrPieces; first < stop; first += kQrRows) {
        if (team.stopping().load(std::memory_order_relaxed)) return;
        if (thread == 0) team.check();
        const int64_t count = std::min(kQrRows, stop - first);
        block.assign(static_cast<size_t>(count * n), 0.0);
        for (int64_t j = 0; j < count; ++j) {
          double* const out = block.data() + j * n;
          double mean = 0;
          for (int64_t i = 0; i < n; ++i) {
            out[i] = source.difference(rows[i], first + j);  // the centre is 0
            mean += weights[i] / total * out[i];
          }
          for (int64_t i = 0; i < n; ++i) out[i] -= mean;
          const double most = max_abs(out, n);
          const bool constant = !(most > 4 * kEps * std::fabs(mean));
          for (int64_t i = 0; i < n; ++i) out[i] = constant ? 0 : out[i] / most;
        }
        append(r, block, n, count);
      }
    }
  });
  for (int64_t piece = 1; piece < kQrPieces; ++piece) {
    team.check();
    append(triangles[0], triangles[piece], n, n);
  }
  std::vector<double> points(static_cast<size_t>(n * n));
  for (int64_t k = 0; k < n; ++k) {
    for (int64_t i = k; i < n; ++i) points[i * n + k] = triangles[0][k * n + i];
  }
  return points;
}

}  // namespace

template <class X>
WeightedRows caratheodory(TensorView<const X, 2> x, const TensorView<const double, 1>* weights,
                          int64_t max_size, ThreadTeam& team) {
  const int64_t n = x.shape[0];
  std::vector<int64_t> rows;
  std::vector<double> w;
  int exponent = 0;
  if (weights) {
    double heaviest = 0;
    for (int64_t i = 0; i < n; ++i) heaviest = std::max(heaviest, (*weights)(i));
    std::frexp(heaviest, &exponent);
    for (int64_t i = 0; i < n; ++i) {
      if ((*weights)(i) > 0) {
        rows.push_back(i);
        w.push_back(std::ldexp((*weights)(i), -exponent));  // sums of weights and of products stay in range
      } else {
        Rows<X>(x).check_finite(i);
      }
    }
  } else {
    rows.resize(static_cast<size_t>(n));
    std::iota(rows.begin(), rows.end(), int64_t{0});
    w.assign(static_cast<size_t>(n), 1.0);
  }
  const int64_t live = static_cast<int64_t>(rows.size());
  WeightedRows found;
  if (x.shape[1] + 1 > 2 * live && live > std::max<int64_t>(max_size, 1)) {
    const std::vector<double> points = compressed(x, rows, w, team);
    std::vector<int64_t> places(rows.size());
    std::iota(places.begin(), places.end(), int64_t{0});
    Reduction<double> reduction(TensorView<const double, 2>::compact(points.data(), live, live), places, w,
                                true, team);
    max_size > 0 ? reduction.sample(max_size) : reduction.run();
    found = std::move(reduction).result();
    for (int64_t& place : found.rows) place = rows[place];
  } else {
    Reduction<X> reduction(x, std::move(rows), std::move(w), false, team);
    max_size > 0 ? reduction.sample(max_size) : reduction.run();
    found = std::move(reduction).result();
  }
  for (double& weight : found.weights) weight = std::ldexp(weight, exponent);
  return found;
}

#define FC_INSTANTIATE(X)                                                                                    \
  template WeightedRows caratheodory<X>(TensorView<const X, 2>, const TensorView<const double, 1>*, int64_t, \
                                        ThreadTeam&);
FC_INSTANTIATE(float)
FC_INSTANTIATE(double)
FC_INSTANTIATE(Half)
FC_INSTANTIATE(BFloat16)
#undef FC_INSTANTIATE

}  // namespace fc
