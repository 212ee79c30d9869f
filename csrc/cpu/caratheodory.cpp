// Every row i with weight w_i > 0 is a vector M_i = w_i (1, x_i - c) of D = d + 1 numbers. The sum
// over i of M_i rho_i has to be kept, at first with all rho_i = 1. While more than rank(M) vectors are left,
// there is a v != 0 with sum_i v_i M_i = 0; moving rho along it until one rho_i is 0 changes nothing else
// (Caratheodory, 1907).
//
// Clusters (Maalouf, Jubran and Feldman, "Fast and accurate least-mean-squares solvers", NeurIPS 2019): the
// rows left are cut into m = 4 D (large D: 2 D) runs, whose vectors are sums of their rows'. Reducing m such
// vectors to as many as their rank drops three quarters of the rows at once, and the same factor then belongs
// to all rows of a run. In the last round runs are single rows.
//
// Null vectors without one factorisation per vector: Gauss-Jordan elimination with complete pivoting finds a
// basis B of the m vectors and expresses all the rest in it, T = B^-1 M [rank, m - rank]. A column of T is a
// null vector. Taking columns from the last on, either column j's own rho comes to 0, and j is dropped
// (O(D)), or the rho of a basic vector p does: then j takes its place, and T is updated by one pivot of the
// columns that are left (O(D * columns)). There are two directions along v: the one that drops j is taken,
// else the one with the larger pivot; among vectors that come to 0 within rounding the largest pivot wins
// (Harris). Each round factorises anew, so errors do not grow with n. At the end one more elimination, with
// the amount that the sums are short of as a further column, corrects the factors of a basis.
//
// With max_size = k there is room for weights that are nearly even: rho_i w_i is bounded by W / (k - D), W
// being the total, and null vectors lead to that bound as well as to 0. Single rows go through T, 4 D at a
// time; rows at neither end, at most D, go on with the next ones. Which of the two directions is taken is
// drawn so that the mean of rho stays 1: a row's chance does not depend on its numbers (the cube method:
// Deville and Tille, "Efficient balanced sampling", Biometrika 91, 2004; Chauvet and Tille, "A fast algorithm
// for balanced sampling", Computational Statistics 21, 2006). At most k - D rows reach the bound, and D lie
// between, so k are enough. The draws are fixed: a result depends on the order of the rows. Cost: n / (3 D)
// tableaus, about 2 n D^2.
//
// Scale: the mean of a few rows is subtracted from the rows before anything is summed (if that mean is far
// off, the rows are read a second time, less the mean of all), and the mean of all from the runs; each
// coordinate is divided by its largest magnitude among the m vectors. A coordinate whose differences are
// rounding of its size counts as constant.
//
// If there are more coordinates than twice the rows, the rows' coordinates are first replaced by the n
// columns of the triangle R of a QR factorisation of M: R has the same null vectors, and n coordinates.
//
// Cost: 4/3 n d multiplications and numbers read for the sums, and in each of log4(n / D) rounds about 6 D^3
// multiply-adds (4 D^3 the elimination, at most half of 3 D pivots of 1.5 D^2 each). At 18,000 x 16 that is
// 0.4 and 0.15 million, at 100,000 x 32 4.3 and 1.3 million: reading the rows is most of it. A singular value
// decomposition per null vector costs some 20 D^3 for each of D log2(n / D) vectors, 15 and 250 million.
//
// Rejected: one pass over single rows with a basis exchange per row (n D^2); the inverse of the basis alone,
// as in the revised simplex method (as many operations if all columns are read anyway, in shorter loops);
// Gram matrices (half of the digits).
#include "cpu/caratheodory.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "core/checked.h"
#include "core/simd.h"
#include "cpu/tableau.h"

namespace fc {
namespace {

constexpr double kEps = std::numeric_limits<double>::epsilon();
constexpr int64_t kBlockRows = 256;  // summed together before they are added to a run's sum
constexpr int64_t kSampleRows = 64;  // whose mean is the first centre
constexpr double kShrink = 0x1p-80;
constexpr double kLarge = 1e290;    // beyond which numbers are shrunk
constexpr int64_t kPart = 1 << 15;  // multiply-adds that a thread takes at a time
constexpr int64_t kSumParts = 64;   // parts that are worth a second thread
constexpr int64_t kQrRows = 32;     // coordinates that are factorised together
constexpr int64_t kQrPieces = 16;   // pieces of the coordinates, whatever the number of threads

template <class X>
double value_of(X x) {
  if constexpr (std::is_floating_point_v<X>) {
    return x;
  } else {
    return simd::widen(x);
  }
}

void require_number(double value) {
  if (!std::isfinite(value)) refuse_sums();
}

// Which coordinates of a tableau have only rounding as their largest magnitude: those of a constant column.
std::vector<double> rounding(const Moments& moments, double weight) {
  std::vector<double> least(1 + moments.d());
  for (int64_t j = 0; j < moments.d(); ++j) {
    least[1 + j] = 4 * kEps * weight * std::fabs(moments.centre[j]);
  }
  return least;
}

// The vectors of single rows with weights [count] and differences [count, d] from the centre, and perhaps one
// further column, scaled.
Tableau tableau_of(const Moments& moments, const std::vector<double>& weights, const double* differences,
                   const std::vector<double>* extra, ThreadTeam& team) {
  const int64_t d = moments.d(), count = static_cast<int64_t>(weights.size());
  Tableau tableau(1 + d, count, extra != nullptr, team);
  double heaviest = 0;
  for (int64_t c = 0; c < count; ++c) {
    const double weight = weights[c];
    heaviest = std::max(heaviest, weight);
    tableau.row(0)[c] = weight;
  }
  for (int64_t j = 1; j <= d; ++j) {
    const double mean = moments.target[j] / moments.target[0];
    double* const row = tableau.row(j);
    for (int64_t c = 0; c < count; ++c) row[c] = weights[c] * (differences[c * d + j - 1] - mean);
  }
  if (extra) {
    for (int64_t j = 0; j <= d; ++j) tableau.row(j)[count] = (*extra)[j];
  }
  tableau.scale(rounding(moments, heaviest), moments.one_scale);
  return tableau;
}

// Adds to `weights` [k] of rows with differences [k, d] the amount that `sums` [1 + d] are short of the
// target.
void correct(const Moments& moments, const std::vector<double>& sums, const double* differences,
             std::vector<double>& weights, ThreadTeam& team) {
  const std::vector<double>& target = moments.target;
  std::vector<double> missing(sums.size());
  for (size_t j = 0; j < sums.size(); ++j) missing[j] = target[j] - sums[j];
  for (size_t j = 1; j < sums.size(); ++j) missing[j] -= missing[0] * (target[j] / target[0]);
  Tableau tableau = tableau_of(moments, weights, differences, &missing, team);
  tableau.eliminate();
  // Weights stay positive.
  double step = 1;
  for (int64_t i = 0; i < tableau.rank(); ++i) {
    const double change = tableau.coefficient(i);
    if (change < 0) step = std::min(step, -0.5 / change);
  }
  for (int64_t i = 0; i < tableau.rank(); ++i) {
    weights[tableau.basis(i)] *= 1 + step * tableau.coefficient(i);
  }
}

// The rows less a centre, and sums of runs of them.
template <class X>
class Rows {
 public:
  Rows(const TensorView<const X, 2>& x, const Moments& moments) : x_(x), d_(x.shape[1]), moments_(moments) {}

  // The mean of a few of the rows.
  std::vector<double> mean_of_a_few(const std::vector<int64_t>& rows, const std::vector<double>& w) const {
    const int64_t n = static_cast<int64_t>(rows.size()), count = std::min(n, kSampleRows);
    double total = 0;
    for (int64_t s = 0; s < count; ++s) total += w[s * n / count];
    std::vector<double> mean(d_);
    for (int64_t s = 0; s < count; ++s) {
      const int64_t at = s * n / count;
      for (int64_t j = 0; j < d_; ++j) {
        mean[j] += value_of(x_(rows[at], j)) * moments_.shrink * (w[at] / total);
      }
    }
    return mean;
  }

  double difference(int64_t i, int64_t j) const {
    return value_of(x_(i, j)) * moments_.shrink - moments_.centre[j];
  }

  // Row i's differences [d].
  void differences(int64_t i, double* out) const {
    for (int64_t j = 0; j < d_; ++j) out[j] = difference(i, j);
  }

  // sum [1 + d] = sum of w (1, x - c) over rows[begin, end).
  void sum(const std::vector<int64_t>& rows, const std::vector<double>& w, int64_t begin, int64_t end,
           double* sum) const {
    std::vector<double> part(1 + d_);
    std::fill(sum, sum + 1 + d_, 0.0);
    const bool compact = x_.has_contiguous_rows();
    double* const out = part.data() + 1;
    const double* const c = moments_.centre.data();
    const double shrink = moments_.shrink;
    // Rows first to last, four at a time, so that the sums are read and written less often.
    const auto add = [&](int64_t first, int64_t last, auto stride) {
      const auto value = [&](const X* p, int64_t j) { return value_of(p[j * stride]) * shrink - c[j]; };
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

  const TensorView<const X, 2>& view() const { return x_; }

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
  const Moments& moments_;
};

// The rows that are left, their weights, and what the weights have to add up to.
template <class X>
class Reduction {
 public:
  Reduction(const TensorView<const X, 2>& x, std::vector<int64_t> rows, std::vector<double> weights,
            Moments moments, ThreadTeam& team)
      : team_(team),
        moments_(std::move(moments)),
        source_(x, moments_),
        rows_(std::move(rows)),
        weights_(std::move(weights)),
        d_(x.shape[1]),
        most_(moments_.most_runs()) {}

  // As few rows as possible.
  void run() {
    start();
    const int64_t n = left();
    if (n > 1) reduce();
    for (int i = 0; i < 2 && left() < n; ++i) correct();
  }

  // The same if other rows have been dropped already, with the sums of all for moments.
  void run_rest() {
    reduce();
    for (int i = 0; i < 2; ++i) correct();
  }

  // At most `goal` rows if so few are possible, with weights as even as that allows.
  void sample(int64_t goal) {
    start();
    if (left() <= goal) return;
    std::vector<double>().swap(sums_);  // as large as the tableaus
    {
      Sampler sampler(moments_, TensorView<double, 1>::compact(weights_.data(), left()), goal, team_);
      sampler.push(source_.view(), &rows_);
      sampler.finish();
    }
    const int64_t n = left();
    keep_positive();
    for (int i = 0; i < 2 && left() < n; ++i) correct();
  }

  WeightedRows result() && { return {std::move(rows_), std::move(weights_)}; }

 private:
  int64_t left() const { return static_cast<int64_t>(rows_.size()); }

  void reduce() {
    while (!round((left() + most_ - 1) / most_)) {
    }
  }

  TensorView<double, 2> sums() { return TensorView<double, 2>::compact(sums_.data(), runs_, 1 + d_); }

  // Sums of runs of `size` rows, at most `most_` of them.
  void sum_runs(int64_t size) {
    runs_ = std::min(most_, (left() + size - 1) / size);
    sums_.resize(static_cast<size_t>(checked_mul(runs_, 1 + d_)));
    const int64_t run = saturated_mul(size, 1 + d_);
    const bool small = saturated_mul(runs_, run) < kSumParts * kPart;
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
    moments_.centre = source_.mean_of_a_few(rows_, weights_);
    if (!sum_all()) {
      source_.check_finite();
      moments_.shrink = kShrink;
      moments_.centre = source_.mean_of_a_few(rows_, weights_);
      sum_all();
    }
    if (!move_to_mean(moments_, sums())) sum_all();
    fresh_ = true;
  }

  bool sum_all() {
    sum_runs((left() + most_ - 1) / most_);
    return take_total(moments_, sums());
  }

  // Drops runs of `size` rows; returns whether nothing further can be dropped.
  bool round(int64_t size) {
    if (!fresh_) sum_runs(size);
    fresh_ = false;
    const std::vector<double> rho = factors_of_runs(moments_, sums(), team_);
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
    // The total weight has not changed, so that nothing is left only if the total was no number.
    if (kept == 0) refuse_sums();
    rows_.resize(static_cast<size_t>(kept));
    weights_.resize(static_cast<size_t>(kept));
  }

  // Adds to the weights the amount that the sums are short of the target.
  void correct() {
    // If there are many rows, the heaviest take the correction.
    std::vector<int64_t> chosen(rows_.size());
    std::iota(chosen.begin(), chosen.end(), int64_t{0});
    if (left() > most_) {
      std::nth_element(chosen.begin(), chosen.begin() + most_, chosen.end(), [&](int64_t a, int64_t b) {
        return weights_[a] > weights_[b] || (weights_[a] == weights_[b] && a < b);
      });
      chosen.resize(static_cast<size_t>(most_));
      std::sort(chosen.begin(), chosen.end());
    }
    std::vector<double> sums(1 + d_), weights,
        differences(static_cast<size_t>(checked_mul(static_cast<int64_t>(chosen.size()), d_)));
    source_.sum(rows_, weights_, 0, left(), sums.data());
    for (const int64_t r : chosen) {
      source_.differences(rows_[r], differences.data() + weights.size() * d_);
      weights.push_back(weights_[r]);
    }
    fc::correct(moments_, sums, differences.data(), weights, team_);
    for (size_t i = 0; i < chosen.size(); ++i) weights_[chosen[i]] = weights[i];
  }

  ThreadTeam& team_;
  Moments moments_;
  Rows<X> source_;
  std::vector<int64_t> rows_;
  std::vector<double> weights_;
  int64_t d_, most_, runs_ = 0;
  bool fresh_ = false;        // whether sums_ are those of start()
  std::vector<double> sums_;  // [runs, 1 + d]
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
  Moments moments(d);  // the centre is 0
  const Rows<X> source(x, moments);
  source.check_finite();
  double largest = 0;
  for (const int64_t i : rows) {
    for (int64_t j = 0; j < d; ++j) largest = std::max(largest, std::fabs(double(value_of(x(i, j)))));
  }
  if (largest > kLarge) moments.shrink = kShrink;
  const double total = std::accumulate(weights.begin(), weights.end(), 0.0);
  std::vector<std::vector<double>> triangles(kQrPieces);
  team.parallel_for(kQrPieces, 1, [&](int thread, int64_t begin, int64_t end) {
    for (int64_t piece = begin; piece < end; ++piece) {
      std::vector<double>& r = triangles[piece];
      r.assign(static_cast<size_t>(checked_mul(n, n)), 0.0);
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
            out[i] = source.difference(rows[i], first + j);
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

bool take_total(Moments& moments, TensorView<const double, 2> sums) {
  bool small = true;
  std::fill(moments.target.begin(), moments.target.end(), 0.0);
  for (int64_t c = 0; c < sums.rows(); ++c) {
    const double* const sum = sums.row(c);
    for (int64_t j = 0; j < sums.cols(); ++j) {
      moments.target[j] += sum[j];
      small = small && std::fabs(sum[j]) <= kLarge;  // false for a NaN
    }
  }
  return small;
}

bool move_to_mean(Moments& moments, TensorView<double, 2> sums) {
  const int64_t d = moments.d();
  std::vector<double>& centre = moments.centre;
  std::vector<double>& target = moments.target;
  std::vector<double> shift(1 + d);
  for (int64_t j = 1; j <= d; ++j) {
    const double before = centre[j - 1];
    centre[j - 1] = before + target[j] / target[0];
    shift[j] = centre[j - 1] - before;
  }
  // Sums may be moved along if the sums of the runs less the shift are at most the rows' magnitudes.
  for (int64_t j = 1; j <= d; ++j) {
    if (!(std::fabs(shift[j]) > 8 * kEps * std::fabs(centre[j - 1]))) continue;
    double magnitudes = 0;
    for (int64_t c = 0; c < sums.rows(); ++c) magnitudes += std::fabs(sums(c, j) - sums(c, 0) * shift[j]);
    if (std::fabs(target[j]) > 64 * magnitudes) return false;
  }
  for (int64_t c = 0; c < sums.rows(); ++c) {
    double* const sum = sums.row(c);
    for (int64_t j = 1; j <= d; ++j) sum[j] -= sum[0] * shift[j];
  }
  for (int64_t j = 1; j <= d; ++j) target[j] -= target[0] * shift[j];
  return true;
}

std::vector<double> factors_of_runs(const Moments& moments, TensorView<const double, 2> sums,
                                    ThreadTeam& team) {
  const std::vector<double>& target = moments.target;
  const int64_t runs = sums.rows(), d = moments.d();
  Tableau tableau(1 + d, runs, false, team);
  double heaviest = 0;
  for (int64_t c = 0; c < runs; ++c) {
    const double* const sum = sums.row(c);
    tableau.row(0)[c] = sum[0];
    heaviest = std::max(heaviest, sum[0]);
    for (int64_t j = 1; j <= d; ++j) tableau.row(j)[c] = sum[j] - sum[0] * (target[j] / target[0]);
  }
  tableau.scale(rounding(moments, heaviest), moments.one_scale);
  tableau.eliminate();
  std::vector<double> rho(runs, 1.0);
  tableau.reduce(rho, runs);
  for (const double factor : rho) require_number(factor);
  return rho;
}

template <class X>
WeightedRows reduce_rest(const Moments& moments, TensorView<const X, 2> x,
                         TensorView<const double, 1> weights, ThreadTeam& team) {
  std::vector<int64_t> rows;
  std::vector<double> w;
  for (int64_t i = 0; i < x.shape[0]; ++i) {
    if (!(weights(i) > 0)) continue;
    rows.push_back(i);
    w.push_back(weights(i));
  }
  Reduction<X> reduction(x, std::move(rows), std::move(w), moments, team);
  reduction.run_rest();
  return std::move(reduction).result();
}

Sampler::Sampler(const Moments& moments, TensorView<double, 1> weights, int64_t goal, ThreadTeam& team)
    : moments_(moments),
      weights_(weights),
      team_(team),
      goal_(goal),
      remaining_(weights.size()),
      differences_(static_cast<size_t>(checked_mul(moments.most_runs(), moments.d()))) {
  const int64_t free = goal - (1 + moments.d());
  even_ = free > 0 ? moments.target[0] / static_cast<double>(free) : std::numeric_limits<double>::infinity();
}

template <class X>
void Sampler::push(TensorView<const X, 2> x, const std::vector<int64_t>* rows) {
  const Rows<X> source(x, moments_);
  const int64_t count = rows ? static_cast<int64_t>(rows->size()) : x.rows();
  for (int64_t i = 0; i < count && !done(); ++i, ++next_) {
    if (!(weights_(next_) < even_)) continue;
    source.differences(rows ? (*rows)[i] : i,
                       differences_.data() + static_cast<int64_t>(block_.size()) * moments_.d());
    block_.push_back(next_);
    if (static_cast<int64_t>(block_.size()) == moments_.most_runs()) step(false);
  }
}

void Sampler::finish() {
  while (!done() && step(true)) {
  }
}

bool Sampler::step(bool last) {
  const int64_t d = moments_.d();
  std::vector<double> own;
  for (const int64_t r : block_) own.push_back(weights_(r));
  Tableau tableau = tableau_of(moments_, own, differences_.data(), nullptr, team_);
  tableau.eliminate();
  if (last && tableau.rank() == static_cast<int64_t>(block_.size())) return false;
  std::vector<double> rho(block_.size(), 1.0), bound;
  for (const double weight : own) bound.push_back(even_ / weight);
  tableau.sample(rho, bound, remaining_ - goal_, draw_++);
  size_t kept = 0;
  for (size_t i = 0; i < block_.size(); ++i) {
    const bool full = rho[i] == bound[i];
    double& weight = weights_(block_[i]);
    weight = full ? even_ : weight * rho[i];
    require_number(weight);
    if (weight == 0) --remaining_;
    if (full || !(weight > 0)) continue;
    const double* const from = differences_.data() + static_cast<int64_t>(i) * d;
    std::copy(from, from + d, differences_.data() + static_cast<int64_t>(kept) * d);
    block_[kept++] = block_[i];
  }
  block_.resize(kept);
  return true;
}

template <class X>
void correct_weights(const Moments& moments, TensorView<const X, 2> x, TensorView<double, 1> weights,
                     TensorView<const double, 1> sums, ThreadTeam& team) {
  const int64_t count = x.rows(), d = moments.d();
  const Rows<X> source(x, moments);
  std::vector<double> own(count), differences(static_cast<size_t>(checked_mul(count, d))), all(1 + d);
  for (int64_t i = 0; i < count; ++i) {
    source.differences(i, differences.data() + i * d);
    own[i] = weights(i);
  }
  for (int64_t j = 0; j <= d; ++j) all[j] = sums(j);
  correct(moments, all, differences.data(), own, team);
  for (int64_t i = 0; i < count; ++i) weights(i) = own[i];
}

template <class X>
WeightedRows caratheodory(TensorView<const X, 2> x, const TensorView<const double, 1>* weights,
                          int64_t max_size, ThreadTeam& team, bool one_scale) {
  const int64_t n = x.shape[0];
  std::vector<int64_t> rows;
  std::vector<double> w;
  int exponent = 0;
  Moments moments(x.shape[1]);
  moments.one_scale = one_scale;
  if (weights) {
    double heaviest = 0;
    for (int64_t i = 0; i < n; ++i) heaviest = std::max(heaviest, (*weights)(i));
    std::frexp(heaviest, &exponent);
    for (int64_t i = 0; i < n; ++i) {
      if ((*weights)(i) > 0) {
        rows.push_back(i);
        w.push_back(std::ldexp((*weights)(i), -exponent));  // sums of weights and of products stay in range
      } else {
        Rows<X>(x, moments).check_finite(i);
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
    Moments of_points(live);
    of_points.one_scale = true;
    Reduction<double> reduction(TensorView<const double, 2>::compact(points.data(), live, live), places, w,
                                of_points, team);
    max_size > 0 ? reduction.sample(max_size) : reduction.run();
    found = std::move(reduction).result();
    for (int64_t& place : found.rows) place = rows[place];
  } else {
    Reduction<X> reduction(x, std::move(rows), std::move(w), std::move(moments), team);
    max_size > 0 ? reduction.sample(max_size) : reduction.run();
    found = std::move(reduction).result();
  }
  for (double& weight : found.weights) weight = std::ldexp(weight, exponent);
  return found;
}

#define FC_INSTANTIATE(X)                                                                                    \
  template WeightedRows caratheodory<X>(TensorView<const X, 2>, const TensorView<const double, 1>*, int64_t, \
                                        ThreadTeam&, bool);                                                  \
  template WeightedRows reduce_rest<X>(const Moments&, TensorView<const X, 2>, TensorView<const double, 1>,  \
                                       ThreadTeam&);                                                         \
  template void Sampler::push<X>(TensorView<const X, 2>, const std::vector<int64_t>*);                       \
  template void correct_weights<X>(const Moments&, TensorView<const X, 2>, TensorView<double, 1>,            \
                                   TensorView<const double, 1>, ThreadTeam&);
FC_INSTANTIATE(float)
FC_INSTANTIATE(double)
FC_INSTANTIATE(Half)
FC_INSTANTIATE(BFloat16)
#undef FC_INSTANTIATE

}  // namespace fc
