// Scores of a row x [C] of logits with target t. With m = max_j x_j, d_j = x_j - m, e_j = exp(d_j):
//
//     R = sum_{j != t} e_j    Q = sum_{j != t} e_j^2    W = sum_{j != t} e_j d_j    S = R + e_t
//     loss = log S - d_t                      entropy = log S - (W + e_t d_t) / S
//     margin = (e_t - max_{j != t} e_j) / S   el2n = sqrt(Q + R^2) / S
//
// The target is left out of the sums, so that nothing cancels where its probability is close to 1: 1 - p_t is
// R / S, and log S is log1p(R) where e_t = 1.
//
// A row is read once, in blocks that stay in the first-level cache while they are looked at twice: for the
// largest value so far, then for the sums, which are scaled when the largest value grows. A block's sums are
// float lanes, the row's are double.
//
// Cost: N * T * C exponentials and about 20 further vector operations, itemsize * N * T * C bytes read. At C
// = 1,000 in float32 and AVX-512 the arithmetic takes about as long as the reading.
//
// Rejected: the online update element by element (a maximum, two exponentials and three dependent products
// for each vector); the target as one more lane of the sums and EL2N by Q - 2 p_t + 1 (all digits cancel for
// a sample that is well learned).
#include "cpu/scores.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

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

// x[0], x[stride], ... as contiguous numbers: where they lie, or copied to `buffer` [kBlock].
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

// The largest of p [count]; -infinity of none. NaN may get lost: the sums show it.
template <class T>
T largest(const T* p, int64_t count) {
  using V = Vec<T>;
  constexpr int64_t W = kWidth<T>;
  T result = -std::numeric_limits<T>::infinity();
  if (count < W) {
    for (int64_t j = 0; j < count; ++j) result = std::max(result, p[j]);
    return result;
  }
  // The last vector overlaps what came before it, which does not change a maximum.
  V most[4];
  for (V& v : most) v = simd::load(p + count - W);
  int64_t j = 0;
  for (; j + 4 * W <= count; j += 4 * W) {
    for (int lane = 0; lane < 4; ++lane) {
      const V v = simd::load(p + j + lane * W);
      most[lane] = most[lane] > v ? most[lane] : v;
    }
  }
  for (; j + W <= count; j += W) {
    const V v = simd::load(p + j);
    most[0] = most[0] > v ? most[0] : v;
  }
  for (int lane = 1; lane < 4; ++lane) most[0] = most[0] > most[lane] ? most[0] : most[lane];
  T lanes[W];
  simd::store(lanes, most[0]);
  for (int64_t half = W / 2; half > 0; half /= 2)
    for (int64_t i = 0; i < half; ++i) lanes[i] = std::max(lanes[i], lanes[i + half]);
  return lanes[0];
}

// Sums of e, e^2 and e d over lanes.
template <class T>
struct Lanes {
  Vec<T> sum{}, square{}, weighted{};

  void add(Vec<T> d) {
    const Vec<T> e = simd::exp_or_zero<T>(d);
    sum += e;
    square = simd::fma<T>(e, e, square);
    weighted = simd::fma<T>(e, d, weighted);  // NaN where a logit is NaN or infinite, even if e is 0
  }

  void add(const T* p, int64_t count, T most) {
    constexpr int64_t W = kWidth<T>;
    const Vec<T> m = simd::broadcast(most);
    int64_t j = 0;
    for (; j + W <= count; j += W) add(simd::load(p + j) - m);
    if (j == count) return;
    T d[W];
    for (int64_t i = 0; i < W; ++i) d[i] = j + i < count ? p[j + i] - most : T(-1000);  // e = 0
    add(simd::load(d));
  }
};

struct Scores {
  double loss, entropy, margin, el2n;
  bool correct;
};

// A row as its target sees it: differences to the largest value, and sums over the other classes.
template <class T>
struct Row {
  T target;                                        // x_t
  T before = -std::numeric_limits<T>::infinity();  // the largest value of a class below t, and of one above
  T after = -std::numeric_limits<T>::infinity();
  T most;  // the largest value so far
  double rest = 0, square = 0, weighted = 0;

  explicit Row(T at_target) : target(at_target), most(at_target) {}

  // The next classes: p [count], of which number t - first is the target (or none is).
  void add(const T* p, int64_t first, int64_t count, int64_t t) {
    const int64_t below = std::clamp<int64_t>(t - first, 0, count);
    const int64_t above = std::clamp<int64_t>(t - first + 1, 0, count);
    before = std::max(before, largest(p, below));
    after = std::max(after, largest(p + above, count - above));
    const T now = std::max(before, after);
    if (now > most) {
      rescale(static_cast<double>(most) - static_cast<double>(now));
      most = now;
    }
    Lanes<T> lanes;
    lanes.add(p, below, most);
    lanes.add(p + above, count - above, most);
    const Vec<T> all[4] = {lanes.sum, lanes.square, lanes.weighted, Vec<T>{}};
    T sums[4];
    simd::lane_sums<4, T>(all, sums);
    rest += sums[0];
    square += sums[1];
    weighted += sums[2];
  }

  // As if all had been lower by -shift.
  void rescale(double shift) {
    if (rest == 0) return;
    const double factor = std::exp(shift);
    weighted = factor == 0 ? 0 : factor * (weighted + rest * shift);
    rest *= factor;
    square *= factor * factor;
  }

  // Whether no logit was NaN or infinite, and no difference of two left the range of T.
  bool is_finite() const { return std::isfinite(weighted) && std::isfinite(target); }

  Scores scores(bool alone) const {
    const double other = static_cast<double>(std::max(before, after)) - static_cast<double>(most);
    const double d = static_cast<double>(target) - static_cast<double>(most);
    const double e = d == 0 ? 1 : std::exp(d), e_other = alone ? 0 : other == 0 ? 1 : std::exp(other);
    const double sum = rest + e, log_sum = d == 0 ? std::log1p(rest) : std::log(sum);
    const double own = e == 0 ? 0 : e * d;
    return {log_sum - d, log_sum - (weighted + own) / sum, (e - e_other) / sum,
            std::sqrt(square + rest * rest) / sum, target > before && target >= after};
  }
};

// The same for a row that Row could not do: false where a logit is NaN or infinite; else logits are so far
// apart that their differences overflow, and those classes have no part in the sums.
template <class T, class X>
bool add_far_apart(const X* x, int64_t stride, int64_t classes, int64_t t, Row<T>& row) {
  row = Row<T>(value_of(x[t * stride]));
  if (!std::isfinite(row.target)) return false;
  for (int64_t j = 0; j < classes; ++j) {
    const T value = value_of(x[j * stride]);
    if (!std::isfinite(value)) return false;
    T& side = j < t ? row.before : row.after;
    if (j != t) side = std::max(side, value);
  }
  row.most = std::max({row.target, row.before, row.after});
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
  while (std::isfinite(value_of(logits(sample, token, j)))) ++j;
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
    for (int64_t r = begin; r < end; ++r) {
      const int64_t i = r / tokens, token = r % tokens, t = targets(i, token);
      const auto write = [&](const Scores& s) {
        out(0, i, token) = static_cast<T>(s.loss);
        out(1, i, token) = static_cast<T>(s.entropy);
        out(2, i, token) = static_cast<T>(s.margin);
        out(3, i, token) = static_cast<T>(s.el2n);
        out(4, i, token) = s.correct ? T(1) : T(0);
      };
      if (masked && t == -1) {
        write({0, 0, 0, 0, false});
        continue;
      }
      bool valid = t >= 0 && t < classes;
      if (valid) {
        const X* x = &logits(i, token, 0);
        Row<T> row(value_of(x[t * stride]));
        for (int64_t first = 0; first < classes; first += kBlock) {
          const int64_t count = std::min(kBlock, classes - first);
          row.add(fetch(x + first * stride, stride, count, buffer), first, count, t);
        }
        valid = row.is_finite() || add_far_apart(x, stride, classes, t, row);
        if (valid) write(row.scores(classes == 1));
      }
      if (!valid) {
        int64_t seen = refused.load(std::memory_order_relaxed);
        while (r < seen && !refused.compare_exchange_weak(seen, r, std::memory_order_relaxed)) {
        }
      }
    }
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
