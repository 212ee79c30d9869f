#include "cpu/tableau.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "core/checked.h"
#include "core/philox.h"

namespace fc {
namespace {

constexpr double kEps = std::numeric_limits<double>::epsilon();
constexpr int64_t kPart = 1 << 15;  // multiply-adds that a thread takes at a time
constexpr int64_t kParts = 8;       // parts of a pivot that are worth a second thread
// Samples whose numbers are few and round have basic vectors at their ends and pivots that should be 0 but
// for rounding. After a pivot as small as this, T is no longer good.
constexpr double kLeastPivot = 1e-3;

bool all_finite(const double* x, int64_t count) {
  // v - v is 0 for finite values and NaN otherwise.
  constexpr int64_t W = simd::kWidth<double>;
  simd::Vec<double> sum[4] = {};
  double rest = 0;
  int64_t j = 0;
  for (; j + 4 * W <= count; j += 4 * W) {
    for (int v = 0; v < 4; ++v) {
      const simd::Vec<double> value = simd::load(x + j + v * W);
      sum[v] += value - value;
    }
  }
  for (; j < count; ++j) rest += x[j] - x[j];
  const simd::Vec<double> all = (sum[0] + sum[1]) + (sum[2] + sum[3]);
  for (int lane = 0; lane < W; ++lane) rest += all[lane];
  return rest == 0;
}

}  // namespace

struct Tableau::Leaving {
  double longest = std::numeric_limits<double>::infinity();  // step, rounding allowed for
  double pivot = 0;                                          // |factor| of the basic vector that leaves
  int64_t row = -1;
};

Tableau::Tableau(int64_t coordinates, int64_t vectors, bool extra, ThreadTeam& team)
    : team_(team),
      rows_(coordinates),
      columns_(vectors),
      width_(vectors + (extra ? 1 : 0)),
      extra_(extra),
      t_(static_cast<size_t>(checked_mul(coordinates, width_))),
      factor_(static_cast<size_t>(coordinates)),
      vector_of_(static_cast<size_t>(vectors)) {
  std::iota(vector_of_.begin(), vector_of_.end(), int64_t{0});
}

void Tableau::scale(const std::vector<double>& least, bool together) {
  if (!all_finite(row(0), rows_ * width_)) refuse_sums();
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

void Tableau::eliminate() {
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

void Tableau::reduce(std::vector<double>& rho, int64_t count) {
  const std::vector<double> bound(rho.size(), std::numeric_limits<double>::infinity());
  for (; count > 0 && columns_ > 0; --count) {
    team_.check();
    take_column(columns_ - 1);
    const Leaving down = leaving(rho, bound, -1);
    if (!(rho[last_vector_] > down.longest)) {  // so that with a NaN no vector that leaves is looked for
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

int64_t Tableau::sample(std::vector<double>& rho, const std::vector<double>& bound, int64_t count,
                        uint64_t draw) {
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
    if (!(room > out.longest)) {
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

inline void Tableau::take_column(int64_t j) {
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

inline void Tableau::pivot(int64_t p, int64_t count) {
  const int64_t width = columns_ + (extra_ ? 1 : 0);
  double* const source = row(p);
  for (int64_t j = 0; j < width; ++j) source[j] /= factor_[p];
  const auto update = [&](int, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (i != p && factor_[i] != 0) subtract(row(i), source, factor_[i], width);
    }
  };
  if (count * width < kParts * kPart) {
    update(0, 0, count);
  } else {
    team_.parallel_for(count, std::max<int64_t>(1, kPart / width), update);
  }
}

inline double Tableau::room(const std::vector<double>& rho, const std::vector<double>& bound, int64_t i,
                            double sign) const {
  return sign * factor_[i] > 0 ? rho[basis_[i]] : bound[basis_[i]] - rho[basis_[i]];
}

inline Tableau::Leaving Tableau::leaving(const std::vector<double>& rho, const std::vector<double>& bound,
                                         double sign) const {
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

inline void Tableau::move(std::vector<double>& rho, const std::vector<double>& bound, double step) {
  for (int64_t i = 0; i < rank_; ++i) {
    double& r = rho[basis_[i]];
    r = std::clamp(r + step * factor_[i], 0.0, bound[basis_[i]]);
  }
}

inline double Tableau::exchange(std::vector<double>& rho, const std::vector<double>& bound,
                                const Leaving& out, double sign) {
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

}  // namespace fc
