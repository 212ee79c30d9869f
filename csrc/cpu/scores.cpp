// Scores of a row x [C] of logits with target t. With m = max_j x_j, d_j = x_j - m, e_j = exp(d_j):
//
//     R = sum_{j != t} e_j    Q = sum_{j != t} e_j^2    W = sum_{j != t} e_j d_j    S = R + e_t
//     loss = log S - d_t                      entropy = log S - (W + e_t d_t) / S
//     margin = (e_t - max_{j != t} e_j) / S   el2n = sqrt(Q + R^2) / S
//
// The target is left out of the sums, so that nothing cancels if its probability is close to 1: 1 - p_t is R
// / S, and log S is log1p(R) if e_t = 1.
//
// A row is read once, in blocks that stay in the first-level cache while they are read twice: for the largest
// value so far, then for the sums, which are scaled when the largest value grows. A block's sums are float
// lanes, the row's are double.
//
// Cost: N * T * C exponentials and about 20 further vector operations, itemsize * N * T * C bytes read. At C
// = 1,000 in float32 and AVX-512 the arithmetic takes about as long as the reading.
//
// Rejected: the online update element by element (a maximum, two exponentials and three dependent products
// per vector); the target as one more lane of the sums and EL2N by Q - 2 p_t + 1 (all digits cancel for a
// sample that is well learned).
#include "cpu/scores.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>

#include "core/simd.h"
#include "core/vmath.h"

namespace fc {
namespace {

constexpr int64_t kBlock = 1024;          // 4 or 8 KB
constexpr int64_t kChunkBytes = 1 << 16;  // of rows that a thread takes at a time

using simd::kWidth;
using simd::Vec;

template <class X>
ScoreOf<X> value_of(X x) {
  if constexpr (std::is_floating_point_v<X>) {
    return x;
  } else {
    return simd::widen(x);
  }
}

// x[0], x[stride], ... as contiguous numbers: at the place where they lie, or copied to `buffer` [kBlock].
template <class X>
const ScoreOf<X>* fetch(const X* x, int64_t stride, int64_t count, ScoreOf<X>* buffer) {
  if (stride != 1) {
    for (int64_t j = 0; j < count; ++j) buffer[j] = value_of(x[j * stride]);
    return buffer;
  }
  if constexpr (std::is_floating_point_v<X>) {
    return x;
  } else {
    simd::widen(x, buffer, count);
    return buffer;
  }
}

template <class T>
Vec<T> larger(Vec<T> a, Vec<T> b) {
  return a > b ? a : b;
}

// The largest of some numbers, lane by lane. A NaN may get lost: the sums show it.
template <class T>
struct LaneMax {
  static constexpr int64_t W = kWidth<T>;
  Vec<T> most[4];

  explicit LaneMax(T least) {
    for (Vec<T>& v : most) v = simd::broadcast(least);
  }

  void add(const T* p, int64_t count) {
    int64_t j = 0;
    for (; j + 4 * W <= count; j += 4 * W) {
      for (int i = 0; i < 4; ++i) most[i] = larger<T>(most[i], simd::load(p + j + i * W));
    }
    for (; j + W <= count; j += W) most[0] = larger<T>(most[0], simd::load(p + j));
    if (j < count) most[1] = larger<T>(most[1], simd::load_or(p + j, count - j, most[1][0]));
  }

  T largest() const {
    return simd::lane_max<T>(larger<T>(larger<T>(most[0], most[1]), larger<T>(most[2], most[3])));
  }
};

// Sums of e, e^2 and e d, lane by lane.
template <class T>
struct LaneSums {
  static constexpr int64_t W = kWidth<T>;
  Vec<T> sum{}, square{}, weighted{};

  void add(Vec<T> d) {
    const Vec<T> e = simd::exp_or_zero<T>(d);
    sum += e;
    square = simd::fma<T>(e, e, square);
    weighted = simd::fma<T>(e, d, weighted);  // NaN if a logit is NaN or infinite, even if e is 0
  }

  void add(const T* p, int64_t count, T most) {
    const Vec<T> m = simd::broadcast(most);
    int64_t j = 0;
    for (; j + W <= count; j += W) add(simd::load(p + j) - m);
    if (j == count) return;
    const Vec<T> d = simd::load_or(p + j, count - j, most) - m;
    add(simd::first_lanes<T>(count - j) ? d : simd::broadcast(T(-1000)));  // whose e is 0
  }
};

// The state of a row x with target t: sums over the other classes, as if all logits were lower by `most`.
template <class T>
struct Row {
  T target;                                       // x_t
  T other = -std::numeric_limits<T>::infinity();  // the largest of the other classes so far
  T most;                                         // the larger of the two
  double rest = 0, square = 0, weighted = 0;

  explicit Row(T at_target) : target(at_target), most(at_target) {}

  // The next classes: p [count], of which number `own` is the target, if it is in [0, count).
  void add(const T* p, int64_t count, int64_t own) {
    const int64_t below = std::clamp<int64_t>(own, 0, count), above = std::clamp<int64_t>(own + 1, 0, count);
    LaneMax<T> lane_max(other);
    lane_max.add(p, below);
    lane_max.add(p + above, count - above);
    other = lane_max.largest();
    if (other > most) {
      rescale(static_cast<double>(most) - static_cast<double>(other));
      most = other;
    }
    LaneSums<T> lanes;
    lanes.add(p, below, most);
    lanes.add(p + above, count - above, most);
    const Vec<T> all[4] = {lanes.sum, lanes.square, lanes.weighted, Vec<T>{}};
    T sums[4];
    simd::lane_sums<4, T>(all, sums);
    rest += sums[0];
    square += sums[1];
    weighted += sums[2];
  }

  void rescale(double shift) {
    if (rest == 0) return;
    const double factor = std::exp(shift);
    weighted = factor == 0 ? 0 : factor * (weighted + rest * shift);
    rest *= factor;
    square *= factor * factor;
  }

  // Whether no logit was NaN or infinite, and no difference of two left the range of T.
  bool is_finite() const { return std::isfinite(weighted) && std::isfinite(target); }
};

// The same for a row that Row cannot handle: false if a logit is NaN or infinite; else logits are so far
// apart that their differences overflow, and those classes have no part in the sums.
template <class T, class X>
bool add_far_apart(const X* x, int64_t stride, int64_t classes, int64_t t, Row<T>& row) {
  row = Row<T>(value_of(x[t * stride]));
  if (!std::isfinite(row.target)) return false;
  for (int64_t j = 0; j < classes; ++j) {
    const T value = value_of(x[j * stride]);
    if (!std::isfinite(value)) return false;
    if (j != t) row.other = std::max(row.other, value);
  }
  row.most = std::max(row.target, row.other);
  for (int64_t j = 0; j < classes; ++j) {
    const double d = static_cast<double>(value_of(x[j * stride])) - static_cast<double>(row.most);
    if (j == t || d < -1000) continue;
    const double e = std::exp(d);
    row.rest += e;
    row.square += e * e;
    row.weighted += e * d;
  }
  return true;
}

// Whether t is the first class of the largest logit.
template <class T, class X>
bool is_correct(const Row<T>& row, const X* x, int64_t stride, int64_t t) {
  if (row.target != row.other) return row.target > row.other;
  for (int64_t j = 0; j < t; ++j) {
    if (value_of(x[j * stride]) == row.target) return false;
  }
  return true;
}

// Rows whose scores are computed together, one row per lane.
template <class T>
class Group {
 public:
  static constexpr int kSize = 16;

  explicit Group(const TensorView<T, 3>& out) : out_(out) {}

  bool is_full() const { return used_ == kSize; }

  void add(int64_t sample, int64_t token, const Row<T>& row, bool correct) {
    sample_[used_] = sample;
    token_[used_] = token;
    d_[used_] = static_cast<double>(row.target) - static_cast<double>(row.most);
    other_[used_] = static_cast<double>(row.other) - static_cast<double>(row.most);
    rest_[used_] = row.rest;
    square_[used_] = row.square;
    weighted_[used_] = row.weighted;
    score_[4][used_] = correct ? 1 : 0;
    ++used_;
  }

  // Writes the scores of the rows that were added.
  void flush() {
    for (int i = 0; i < used_; i += kWidth<double>) compute(i);
    for (int i = 0; i < used_; ++i) {
      for (int s = 0; s < 5; ++s) out_(s, sample_[i], token_[i]) = static_cast<T>(score_[s][i]);
    }
    used_ = 0;
  }

 private:
  void compute(int i) {
    using V = Vec<double>;
    const V zero{}, one = simd::broadcast(1.0);
    const V d = simd::load(d_ + i), rest = simd::load(rest_ + i), weighted = simd::load(weighted_ + i);
    const V e = simd::exp<double>(d), sum = rest + e, log_sum = simd::log<double>(sum);
    // If e = 1, log(1 + rest) with all digits of rest: the error of 1 + rest is corrected (by Kahan).
    const V above = sum - one;
    const V log1p = above == zero ? rest : log_sum * (rest / above);
    const V log_total = d == zero ? log1p : log_sum;
    const V own = e == zero ? zero : e * d;
    simd::store(score_[0] + i, log_total - d);
    simd::store(score_[1] + i, log_total - (weighted + own) / sum);
    simd::store(score_[2] + i, (e - simd::exp<double>(simd::load(other_ + i))) / sum);
    double* const el2n = score_[3] + i;
    simd::store(el2n, simd::load(square_ + i) + rest * rest);
    for (int lane = 0; lane < kWidth<double>; ++lane) el2n[lane] = std::sqrt(el2n[lane]);
    simd::store(el2n, simd::load(el2n) / sum);
  }

  TensorView<T, 3> out_;
  int used_ = 0;
  int64_t sample_[kSize], token_[kSize];
  double d_[kSize] = {}, other_[kSize] = {}, rest_[kSize] = {}, square_[kSize] = {}, weighted_[kSize] = {};
  double score_[5][kSize];
};

template <class X>
[[noreturn]] void refuse(const TensorView<const X, 3>& logits, const TensorView<const int64_t, 2>& targets,
                         int64_t sample, int64_t token) {
  std::string where = " at sample " + std::to_string(sample);
  if (targets.shape[1] > 1) where += ", token " + std::to_string(token);
  const int64_t target = targets(sample, token), classes = logits.shape[2];
  if (target < 0 || target >= classes) {
    throw std::invalid_argument("targets must be in [0, " + std::to_string(classes) + "), got " +
                                std::to_string(target) + where);
  }
  int64_t j = 0;
  while (j + 1 < classes && std::isfinite(value_of(logits(sample, token, j)))) ++j;
  const double value = value_of(logits(sample, token, j));
  throw std::invalid_argument(std::string("logits must be finite, got ") +
                              (std::isnan(value) ? "NaN"
                               : value > 0       ? "inf"
                                                 : "-inf") +
                              where + ", class " + std::to_string(j));
}

}  // namespace

template <class X>
void sample_scores(TensorView<const X, 3> logits, TensorView<const int64_t, 2> targets, bool masked,
                   TensorView<ScoreOf<X>, 3> out, ThreadTeam& team) {
  using T = ScoreOf<X>;
  const int64_t tokens = logits.shape[1], classes = logits.shape[2], rows = logits.shape[0] * tokens;
  const int64_t stride = logits.stride[2];
  const int64_t chunk = std::max<int64_t>(1, kChunkBytes / (classes * static_cast<int64_t>(sizeof(X))));
  std::atomic<int64_t> refused{rows};  // the first row that is not valid
  team.parallel_for(rows, chunk, [&](int, int64_t begin, int64_t end) {
    T buffer[kBlock];
    Group<T> group(out);
    for (int64_t r = begin; r < end; ++r) {
      const int64_t i = r / tokens, token = r % tokens, t = targets(i, token);
      if (masked && t == -1) {
        for (int s = 0; s < 5; ++s) out(s, i, token) = 0;
        continue;
      }
      bool valid = t >= 0 && t < classes;
      if (valid) {
        const X* x = &logits(i, token, 0);
        Row<T> row(value_of(x[t * stride]));
        for (int64_t first = 0; first < classes; first += kBlock) {
          const int64_t count = std::min(kBlock, classes - first);
          row.add(fetch(x + first * stride, stride, count, buffer), count, t - first);
        }
        valid = row.is_finite() || add_far_apart(x, stride, classes, t, row);
        if (valid) group.add(i, token, row, is_correct(row, x, stride, t));
      }
      if (!valid) {
        int64_t seen = refused.load(std::memory_order_relaxed);
        while (r < seen && !refused.compare_exchange_weak(seen, r, std::memory_order_relaxed)) {
        }
      }
      if (group.is_full()) group.flush();
    }
    group.flush();
  });
  if (refused.load() < rows) refuse(logits, targets, refused.load() / tokens, refused.load() % tokens);
}

#define FC_INSTANTIATE(X)                                                                    \
  template void sample_scores<X>(TensorView<const X, 3>, TensorView<const int64_t, 2>, bool, \
                                 TensorView<ScoreOf<X>, 3>, ThreadTeam&);
FC_INSTANTIATE(float)
FC_INSTANTIATE(double)
FC_INSTANTIATE(Half)
FC_INSTANTIATE(BFloat16)
#undef FC_INSTANTIATE

}  // namespace fc
