// For each dimension d and row i:
//     u_id = (m_scale m_d + m_step g_id) / (sqrt(v_scale v_d + v_step g_id^2) + eps)
// and for each group the `top` dimensions of largest |mean_i u_id|.
//
// The dimensions are taken in tiles. Only the sums over the rows of a tile are kept, and only the sums that
// are among the largest so far, so memory is O(top) per group and thread whatever B and D. Cost: B D square
// roots and quotients. In float these take half the time of double and are precise enough for all but close
// calls, so float tiles are a sieve: a dimension whose sum may reach the list, by a bound of the rounding
// errors, is summed again in double, and the lists hold doubles alone. So float gradients give the dimensions
// that double arithmetic gives. With random data about top ln(D / top) of D dimensions pass the sieve.
//
// Rejected: keeping the sums of all dimensions and one partial sort (O(G D) memory, and no sieve, because the
// bar is not known while sums are made); estimates of the reciprocal square root (saved a fifth of the time,
// and eps would need a second path).
#include "cpu/matching.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/simd.h"
#include "cpu/directions.h"

namespace fc {

namespace {

using simd::kWidth;
using simd::Vec;

constexpr int64_t kTile = 1024;
constexpr int64_t kTilesAtOnce = 8;
constexpr int64_t kFloatSum = 32;  // terms that are summed in float before the sum goes on in double
// Below this eps, underflow in float could change u visibly.
constexpr double kLeastEpsOfSieve = 1e-10;

template <class X>
double to_double(X x) {
  if constexpr (std::is_same_v<X, Half> || std::is_same_v<X, BFloat16>)
    return simd::widen(x);
  else
    return x;
}

// Entries of gradients in some dimensions: all of a tile, or some of it. F is the type that they are computed
// in.
template <class Gradients, class F>
class Columns;

template <class X, class F>
class Columns<DenseGradients<X>, F> {
 public:
  explicit Columns(const DenseGradients<X>& g) : g_(g), buffer_(kTile + kWidth<F>) {}

  void take_all(int64_t begin, int64_t count) {
    begin_ = begin;
    count_ = count;
    which_ = nullptr;
  }

  // The dimensions begin + which[i].
  void take(int64_t begin, const int64_t* which, int64_t count) {
    take_all(begin, count);
    which_ = which;
  }

  // The entries of row i, readable to the end of a whole vector.
  const F* row(int64_t i) {
    const X* from = g_.rows.row(i) + begin_ * g_.rows.stride[1];
    const int64_t stride = g_.rows.stride[1];
    F* const to = buffer_.data();
    if (which_ != nullptr) {
      for (int64_t j = 0; j < count_; ++j) to[j] = static_cast<F>(to_double(from[which_[j] * stride]));
      return to;
    }
    if constexpr (std::is_same_v<X, F>) {
      if (stride == 1 && count_ % kWidth<F> == 0) return from;
    }
    if constexpr (std::is_same_v<F, float> && (std::is_same_v<X, Half> || std::is_same_v<X, BFloat16>)) {
      if (stride == 1) {
        simd::widen(from, to, count_);
        return to;
      }
    }
    for (int64_t j = 0; j < count_; ++j) to[j] = static_cast<F>(to_double(from[j * stride]));
    return to;
  }

 private:
  const DenseGradients<X>& g_;
  std::vector<F> buffer_;
  const int64_t* which_ = nullptr;
  int64_t begin_ = 0, count_ = 0;
};

template <class X, class F>
class Columns<LowRankGradients<X>, F> {
 public:
  explicit Columns(const LowRankGradients<X>& g)
      : g_(g), normal_(kTile), z_(g.coefficients.cols() * kStride), buffer_(kStride), sum_(kTile) {}

  void take_all(int64_t begin, int64_t count) {
    count_ = count;
    for (int64_t p = 0; p < g_.coefficients.cols(); ++p) {
      direction_part(g_.seed, static_cast<uint32_t>(p), begin, count, normal_.data());
      std::copy_n(normal_.data(), count, &z_[p * kStride]);
    }
  }

  void take(int64_t begin, const int64_t* which, int64_t count) {
    count_ = count;
    at_.resize(count);
    for (int64_t i = 0; i < count; ++i) at_[i] = begin + which[i];
    for (int64_t p = 0; p < g_.coefficients.cols(); ++p) {
      direction_elements(g_.seed, static_cast<uint32_t>(p), at_.data(), count, normal_.data());
      std::copy_n(normal_.data(), count, &z_[p * kStride]);
    }
  }

  const F* row(int64_t i) {
    F* const to = buffer_.data();
    if (g_.coefficients.cols() == 1) {
      const auto c = static_cast<F>(g_.coefficients(i, int64_t{0}));
      for (int64_t j = 0; j < count_; ++j) to[j] = c * z_[j];
      return to;
    }
    // In double in any case: cancellation in a sum of floats is beyond the bound of the sieve.
    std::fill_n(sum_.begin(), count_, 0.0);
    for (int64_t p = 0; p < g_.coefficients.cols(); ++p) {
      const double c = g_.coefficients(i, p);
      const F* const z = &z_[p * kStride];
      for (int64_t j = 0; j < count_; ++j) sum_[j] += c * z[j];
    }
    for (int64_t j = 0; j < count_; ++j) to[j] = static_cast<F>(sum_[j]);
    return to;
  }

  // Element j of direction p, after take_all().
  F direction(int64_t p, int64_t j) const { return z_[p * kStride + j]; }

 private:
  static constexpr int64_t kStride = kTile + kWidth<F>;
  const LowRankGradients<X>& g_;
  std::vector<float> normal_;
  std::vector<F> z_, buffer_;
  std::vector<double> sum_;
  std::vector<int64_t> at_;
  int64_t count_ = 0;
};

// m_scale m and v_scale v of some dimensions.
template <class F>
struct History {
  std::vector<F> m = std::vector<F>(kTile + kWidth<F>), v = std::vector<F>(kTile + kWidth<F>);
};

// out = u of the row g, or with kAdds out += u. Whole vectors are written.
template <bool kAdds, class F>
void updates(const AdamRule& rule, const F* g, const History<F>& history, int64_t count, F* out) {
  using V = Vec<F>;
  const V step = simd::broadcast(static_cast<F>(rule.m_step)),
          square = simd::broadcast(static_cast<F>(rule.v_step)),
          eps = simd::broadcast(static_cast<F>(rule.eps));
  for (int64_t j = 0; j < count; j += kWidth<F>) {
    const V x = simd::load(g + j);
    V u = x;
    if (rule.has_history) {
      const V root = simd::square_root<F>(simd::fma<F>(square * x, x, simd::load(history.v.data() + j)));
      u = simd::fma<F>(step, x, simd::load(history.m.data() + j)) / (root + eps);
      // A square beyond float makes the sum NaN, which passes the sieve.
      if constexpr (std::is_same_v<F, float>) u += root - root;
    }
    if (kAdds) u += simd::load(out + j);
    simd::store(out + j, u);
  }
}

// The largest values so far and where they were. Positions come in ascending order, so the first of equal
// values stay.
class TopList {
 public:
  struct Entry {
    double value;
    int64_t at;
    bool operator<(const Entry& other) const {
      return value != other.value ? value > other.value : at < other.at;
    }
  };

  explicit TopList(int64_t top) : top_(top) { entries_.reserve(2 * top); }

  // The bar that a value has to be above.
  double bar() const { return bar_; }

  void offer(double value, int64_t at) {
    if (!(value > bar_)) return;
    entries_.push_back({value, at});
    if (static_cast<int64_t>(entries_.size()) == 2 * top_) shrink();
  }

  void shrink() {
    if (static_cast<int64_t>(entries_.size()) <= top_) return;
    std::nth_element(entries_.begin(), entries_.begin() + (top_ - 1), entries_.end());
    bar_ = entries_[top_ - 1].value;
    entries_.resize(top_);
  }

  const std::vector<Entry>& entries() const { return entries_; }

 private:
  int64_t top_;
  double bar_ = -1;
  std::vector<Entry> entries_;
};

template <class Gradients, class T>
class Search {
 public:
  Search(const Gradients& g, const AdamRule& rule, TensorView<const T, 1> m, TensorView<const T, 1> v,
         const GroupedRows& groups, int64_t top)
      : g_(g), rule_(rule), m_(m), v_(v), groups_(groups), top_(top) {}

  void run(TensorView<int64_t, 2> dims, TensorView<double, 2> u, ThreadTeam& team) {
    find(dims, team);
    restrict_rows(dims, u, team);
  }

 private:
  // What one thread works with.
  struct Worker {
    Worker(const Gradients& g, int64_t groups, int64_t top)
        : sieve(g),
          exact(g),
          lists(groups, TopList(top)),
          partial(kTile + kWidth<T>),
          u(kTile + kWidth<double>) {}
    Columns<Gradients, T> sieve;
    Columns<Gradients, double> exact;
    History<T> coarse;
    History<double> fine;
    std::vector<TopList> lists;
    std::vector<T> partial;
    std::vector<double> u, sum = std::vector<double>(kTile);
    std::vector<int64_t> candidates;
  };

  int64_t group_count() const { return groups_.offset.shape[0] - 1; }
  int64_t group_size(int64_t group) const { return groups_.offset(group + 1) - groups_.offset(group); }

  bool sieves() const {
    return std::is_same_v<T, float> && rule_.has_history && rule_.eps >= kLeastEpsOfSieve;
  }

  void find(TensorView<int64_t, 2> dims, ThreadTeam& team) {
    const int64_t numel = g_.numel();
    std::vector<std::unique_ptr<Worker>> workers(team.size());
    team.parallel_for((numel + kTile - 1) / kTile, kTilesAtOnce,
                      [&](int thread, int64_t first, int64_t last) {
                        auto& worker = workers[thread];
                        if (!worker) worker = std::make_unique<Worker>(g_, group_count(), top_);
                        for (int64_t tile = first; tile < last; ++tile)
                          look_at(*worker, tile * kTile, std::min(kTile, numel - tile * kTile));
                      });
    if (refused_.load() < numel) refuse(refused_.load());
    for (int64_t group = 0; group < group_count(); ++group) {
      std::vector<TopList::Entry> all;
      for (const auto& worker : workers) {
        if (worker) {
          const auto& some = worker->lists[group].entries();
          all.insert(all.end(), some.begin(), some.end());
        }
      }
      std::partial_sort(all.begin(), all.begin() + top_, all.end());
      for (int64_t i = 0; i < top_; ++i) dims(group, i) = all[i].at;
    }
  }

  void look_at(Worker& w, int64_t begin, int64_t count) {
    load_history(begin, nullptr, count, w.coarse);
    if (sieves())
      w.sieve.take_all(begin, count);
    else
      take_all_in_double(w, begin, count);
    for (int64_t group = 0; group < group_count(); ++group) {
      TopList& list = w.lists[group];
      if (!sieves()) {
        means(w, group, count);
        for (int64_t j = 0; j < count; ++j) offer(list, w.sum[j], begin + j);
        continue;
      }
      sift(w, group, count);
      if (w.candidates.empty()) continue;
      const auto found = static_cast<int64_t>(w.candidates.size());
      w.exact.take(begin, w.candidates.data(), found);
      load_history(begin, w.candidates.data(), found, w.fine);
      means(w, group, found);
      for (int64_t j = 0; j < found; ++j) offer(list, w.sum[j], begin + w.candidates[j]);
    }
  }

  void take_all_in_double(Worker& w, int64_t begin, int64_t count) {
    w.exact.take_all(begin, count);
    load_history(begin, nullptr, count, w.fine);
  }

  void offer(TopList& list, double mean, int64_t at) {
    if (!std::isfinite(mean)) refused_at(at);
    list.offer(std::abs(mean), at);
  }

  // w.candidates = the dimensions of the tile whose mean may be above the bar.
  void sift(Worker& w, int64_t group, int64_t count) {
    std::fill_n(w.sum.begin(), count, 0.0);
    const int64_t first = groups_.offset(group), last = groups_.offset(group + 1);
    for (int64_t part = first; part < last; part += kFloatSum) {
      std::fill(w.partial.begin(), w.partial.end(), T(0));
      for (int64_t r = part; r < std::min(part + kFloatSum, last); ++r)
        updates<true>(rule_, w.sieve.row(groups_.member(r)), w.coarse, count, w.partial.data());
      for (int64_t j = 0; j < count; ++j) w.sum[j] += w.partial[j];
    }
    // |u| is at most this: the share of g alone plus that of m alone; sums of 32 terms and the eight
    // roundings of each are off by 40 units of 2^-24.
    const double of_g = std::abs(rule_.m_step) / std::sqrt(rule_.v_step), unit = (kFloatSum + 8) * 0x1p-24;
    const double scale = 1.0 / static_cast<double>(last - first), bar = w.lists[group].bar();
    w.candidates.clear();
    for (int64_t j = 0; j < count; ++j) {
      const double of_m =
          std::abs(w.coarse.m[j]) / (std::sqrt(static_cast<double>(w.coarse.v[j])) + rule_.eps);
      if (!(std::abs(w.sum[j]) * scale + unit * (of_g + of_m) <= bar)) w.candidates.push_back(j);
    }
  }

  // w.sum = the means over a group of what w.exact and w.fine hold.
  void means(Worker& w, int64_t group, int64_t count) {
    std::fill(w.u.begin(), w.u.end(), 0.0);
    for (int64_t r = groups_.offset(group); r < groups_.offset(group + 1); ++r)
      updates<true>(rule_, w.exact.row(groups_.member(r)), w.fine, count, w.u.data());
    const auto size = static_cast<double>(group_size(group));
    for (int64_t j = 0; j < count; ++j) w.sum[j] = w.u[j] / size;
  }

  // The history of the dimensions begin + which[j], or begin + j.
  template <class F>
  void load_history(int64_t begin, const int64_t* which, int64_t count, History<F>& history) {
    if (!rule_.has_history) return;
    for (int64_t j = 0; j < count; ++j) {
      const int64_t d = begin + (which != nullptr ? which[j] : j);
      const T m = m_(d), v = v_(d);
      if (!(std::isfinite(m) && std::isfinite(v) && v >= 0)) refused_at(d);
      history.m[j] = static_cast<F>(rule_.m_scale * m);
      history.v[j] = static_cast<F>(rule_.v_scale * v);
    }
    // Lanes behind the last dimension divide by something.
    for (int64_t j = count; j < (count + kWidth<F> - 1) / kWidth<F> * kWidth<F>; ++j)
      history.m[j] = 0, history.v[j] = 1;
  }

  void restrict_rows(TensorView<const int64_t, 2> dims, TensorView<double, 2> u, ThreadTeam& team) {
    constexpr int64_t kPart = 256;
    const int64_t parts = (top_ + kPart - 1) / kPart;
    team.parallel_for(group_count() * parts, 1, [&](int, int64_t number, int64_t) {
      const int64_t group = number / parts, from = number % parts * kPart,
                    count = std::min(kPart, top_ - from);
      Columns<Gradients, double> columns(g_);
      History<double> history;
      std::vector<double> row(kPart + kWidth<double>);
      std::vector<int64_t> which(count);
      for (int64_t j = 0; j < count; ++j) which[j] = dims(group, from + j);
      columns.take(0, which.data(), count);
      load_history(0, which.data(), count, history);
      for (int64_t r = groups_.offset(group); r < groups_.offset(group + 1); ++r) {
        updates<false>(rule_, columns.row(groups_.member(r)), history, count, row.data());
        std::copy_n(row.data(), count, u.row(r) + from);
      }
    });
  }

  void refused_at(int64_t d) {
    int64_t seen = refused_.load(std::memory_order_relaxed);
    while (d < seen && !refused_.compare_exchange_weak(seen, d, std::memory_order_relaxed)) {
    }
  }

  [[noreturn]] void refuse(int64_t d) const {
    const auto text = [](double value) {
      return std::isnan(value)   ? std::string("NaN")
             : std::isinf(value) ? std::string(value > 0 ? "inf" : "-inf")
                                 : std::to_string(value);
    };
    if (rule_.has_history) {
      if (!std::isfinite(m_(d)))
        throw std::invalid_argument("normalize: m must be finite, got " + text(m_(d)) + " at position " +
                                    std::to_string(d));
      if (!(v_(d) >= 0 && std::isfinite(v_(d))))
        throw std::invalid_argument("normalize: v must be finite and >= 0, got " + text(v_(d)) +
                                    " at position " + std::to_string(d));
    }
    Columns<Gradients, double> column(g_);
    column.take(0, &d, 1);
    constexpr int64_t kNone = std::numeric_limits<int64_t>::max();
    int64_t row = kNone;
    for (int64_t r = 0; r < groups_.member.shape[0]; ++r) {
      const double value = column.row(groups_.member(r))[0];
      if (!std::isfinite(value)) row = std::min(row, groups_.member(r));
    }
    if (row == kNone)
      throw std::invalid_argument("g: updates overflow in dimension " + std::to_string(d) +
                                  "; scale the gradients down");
    throw std::invalid_argument("g must be finite, got " + text(column.row(row)[0]) + " at row " +
                                std::to_string(row) + ", column " + std::to_string(d));
  }

  const Gradients& g_;
  const AdamRule rule_;
  const TensorView<const T, 1> m_, v_;
  const GroupedRows groups_;
  const int64_t top_;
  std::atomic<int64_t> refused_{std::numeric_limits<int64_t>::max()};
};

// mean[j] and square[j] = the means of g and g^2 over the rows `chosen` in the dimensions [begin, begin +
// count).
template <class X>
class Moments;

template <class X>
class Moments<DenseGradients<X>> {
 public:
  Moments(const DenseGradients<X>& g, TensorView<const int64_t, 1> chosen) : columns_(g), chosen_(chosen) {}

  void operator()(int64_t begin, int64_t count, double* mean, double* square) {
    columns_.take_all(begin, count);
    std::fill_n(mean, count, 0.0);
    std::fill_n(square, count, 0.0);
    for (int64_t r = 0; r < chosen_.shape[0]; ++r) {
      const double* const g = columns_.row(chosen_(r));
      for (int64_t j = 0; j < count; ++j) {
        mean[j] += g[j];
        square[j] += g[j] * g[j];
      }
    }
    const auto size = static_cast<double>(chosen_.shape[0]);
    for (int64_t j = 0; j < count; ++j) {
      mean[j] /= size;
      square[j] /= size;
    }
  }

 private:
  Columns<DenseGradients<X>, double> columns_;
  TensorView<const int64_t, 1> chosen_;
};

// For coefficients c and directions z: mean(c) . z and z . mean(c c^T) z.
template <class X>
class Moments<LowRankGradients<X>> {
 public:
  Moments(const LowRankGradients<X>& g, TensorView<const int64_t, 1> chosen)
      : columns_(g), q_(g.coefficients.cols()), first_(q_), second_(q_ * q_) {
    const auto size = static_cast<double>(chosen.shape[0]);
    for (int64_t r = 0; r < chosen.shape[0]; ++r) {
      for (int64_t p = 0; p < q_; ++p) {
        const double c = g.coefficients(chosen(r), p);
        first_[p] += c / size;
        for (int64_t o = 0; o <= p; ++o) {
          // Each pair once, so those of two directions count twice.
          const double other = g.coefficients(chosen(r), o);
          second_[p * q_ + o] += c * other * (o == p ? 1 : 2) / size;
        }
      }
    }
  }

  void operator()(int64_t begin, int64_t count, double* mean, double* square) {
    columns_.take_all(begin, count);
    std::fill_n(mean, count, 0.0);
    std::fill_n(square, count, 0.0);
    for (int64_t p = 0; p < q_; ++p) {
      for (int64_t j = 0; j < count; ++j) mean[j] += first_[p] * columns_.direction(p, j);
      for (int64_t o = 0; o <= p; ++o) {
        const double factor = second_[p * q_ + o];
        for (int64_t j = 0; j < count; ++j)
          square[j] += factor * columns_.direction(p, j) * columns_.direction(o, j);
      }
    }
    // Negative only by rounding.
    for (int64_t j = 0; j < count; ++j) square[j] = square[j] > 0 ? square[j] : 0;
  }

 private:
  Columns<LowRankGradients<X>, double> columns_;
  int64_t q_;
  std::vector<double> first_, second_;
};

}  // namespace

template <class Gradients, class T>
void top_updates(const Gradients& g, const AdamRule& rule, TensorView<const T, 1> m, TensorView<const T, 1> v,
                 const GroupedRows& groups, TensorView<int64_t, 2> dims, TensorView<double, 2> u,
                 ThreadTeam& team) {
  Search<Gradients, T>(g, rule, m, v, groups, dims.cols()).run(dims, u, team);
}

template <class Gradients, class T>
void update_history(const Gradients& g, double beta1, double beta2, TensorView<const T, 1> m,
                    TensorView<const T, 1> v, TensorView<const int64_t, 1> chosen, TensorView<T, 1> new_m,
                    TensorView<T, 1> new_v, ThreadTeam& team) {
  const int64_t numel = g.numel();
  const Moments<Gradients> moments(g, chosen);
  std::atomic<bool> overflows{false};
  team.parallel_for((numel + kTile - 1) / kTile, kTilesAtOnce, [&](int, int64_t first, int64_t last) {
    Moments<Gradients> own = moments;
    double mean[kTile], square[kTile];
    bool finite = true;
    for (int64_t begin = first * kTile; begin < std::min(last * kTile, numel); begin += kTile) {
      const int64_t count = std::min(kTile, numel - begin);
      own(begin, count, mean, square);
      for (int64_t j = 0; j < count; ++j) {
        const T next_m = static_cast<T>(beta1 * m(begin + j) + (1 - beta1) * mean[j]);
        const T next_v = static_cast<T>(beta2 * v(begin + j) + (1 - beta2) * square[j]);
        finite &= std::isfinite(next_m) && std::isfinite(next_v);
        new_m(begin + j) = next_m;
        new_v(begin + j) = next_v;
      }
    }
    if (!finite) overflows.store(true, std::memory_order_relaxed);
  });
  if (overflows.load())
    throw std::invalid_argument(
        "g: the mean squares of the chosen rows overflow the history's dtype; scale the gradients down");
}

#define FC_INSTANTIATE(Gradients, T)                                                                   \
  template void top_updates<Gradients, T>(const Gradients&, const AdamRule&, TensorView<const T, 1>,   \
                                          TensorView<const T, 1>, const GroupedRows&,                  \
                                          TensorView<int64_t, 2>, TensorView<double, 2>, ThreadTeam&); \
  template void update_history<Gradients, T>(const Gradients&, double, double, TensorView<const T, 1>, \
                                             TensorView<const T, 1>, TensorView<const int64_t, 1>,     \
                                             TensorView<T, 1>, TensorView<T, 1>, ThreadTeam&);
FC_INSTANTIATE(DenseGradients<float>, float)
FC_INSTANTIATE(DenseGradients<double>, double)
FC_INSTANTIATE(DenseGradients<Half>, float)
FC_INSTANTIATE(DenseGradients<BFloat16>, float)
FC_INSTANTIATE(LowRankGradients<float>, float)
FC_INSTANTIATE(LowRankGradients<double>, double)
#undef FC_INSTANTIATE

}  // namespace fc
