// Batched Sinkhorn iterations in the plain domain, with the range of the log domain.
//
// Potentials f, g are double. The kernel matrix K_ij = exp((f_i + g_j - C_ij) / eps) is made at the current
// potentials, so that its rows sum to 1 under the weights b, and is then scaled, P_ij = a_i u_i K_ij v_j b_j.
// A scaling beyond 1e+-8 is absorbed into the potentials and K is made anew. An iteration reads K once: four
// rows give their K v, from which their u follows, and while the next rows come from memory, the four rows'
// part of K^T u is taken from the first-level cache.
//   sweep        K from the costs (a block of 24 rows of it if K does not fit the memory budget), and an
//                iteration on the way: n m costs (d multiply-adds each from points) and exponentials
//   plain        an iteration from K: 2 n m multiply-adds, 4 n m bytes read
//   evaluate     the plan of the final potentials: marginals, cost, as a sweep
// If the sum of a row or column leaves the range of the type (costs far above eps before the potentials have
// settled, or a bad start), it is taken again in the log domain, with its largest exponent subtracted.
//
// Exponents are formed as ((f - C) + g) / eps from f, g in two parts and with the rounding error of f - C
// added back, because f, g and C may be 10^4 times eps while their sum is of the size of eps.
//
// Columns are summed over chunks of rows whose number depends on n alone, the chunks in order, so the result
// does not depend on the number of threads. Small problems run one per thread, large ones on all threads.
//
// Rejected: two products, K v and K^T u, which read K twice; the log domain throughout (one exponential per
// entry in every half iteration); K in half the bytes (its rounding is the marginal error's floor).
#include "cpu/sinkhorn.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "core/sinkhorn_schedule.h"
#include "core/threads.h"
#include "core/vmath.h"
#include "cpu/pairwise_panels.h"
#include "cpu/sinkhorn_costs.h"
#include "cpu/sinkhorn_shared.h"

namespace fc {
namespace {

// Rows of K that are read together; twice as many if rows are short, since a group has a fixed cost.
constexpr int kTogether = 4;
constexpr int64_t kShort = 256;            // columns
constexpr int64_t kFirstCache = 32 << 10;  // bytes of rows that a first-level cache keeps beside others
constexpr int64_t kChunkRows = 72;         // at least; a multiple of kTogether and of kCostRows
constexpr int64_t kChunks = 64;            // about, at most
constexpr int64_t kFlush = 512;            // columns whose sum is taken in the type's own precision
constexpr double kLeastScaling = 1e-8, kMostScaling = 1e8;
constexpr double kAdditionsPerEntry = 4;  // that a pass over the costs takes as long as, at least

template <class T>
constexpr int kLanes = simd::kWidth<T> < 2 * kTogether ? 2 * kTogether : simd::kWidth<T>;

// Sums outside these are taken in the log domain.
template <class T>
constexpr T kLeast = static_cast<T>(sizeof(T) == 4 ? 1e-20 : 1e-200);
template <class T>
constexpr T kMost = 1 / kLeast<T>;

// out[r] += sum over columns of k[r][j] x[j] for kNew rows `stride` apart and, on the way, sum[j] += w[r]
// old[r][j] for kOld rows.
template <int kNew, int kOld, class T>
void pass(const T* k, const T* old, int64_t stride, const T* x, const T* w, int64_t columns, double* out,
          T* sum) {
  using V = simd::Vec<T>;
  constexpr int kW = simd::kWidth<T>;
  V weight[kOld > 0 ? kOld : 1];
  for (int r = 0; r < kOld; ++r) weight[r] = simd::broadcast(w[r]);
  for (int64_t begin = 0; begin < columns; begin += kFlush) {
    const int64_t end = std::min(columns, begin + kFlush);
    V product[kNew > 0 ? kNew : 1] = {};
    for (int64_t j = begin; j < end; j += kW) {
      if constexpr (kNew > 0) {
        const V xj = simd::load(x + j);
#pragma GCC unroll 8
        for (int r = 0; r < kNew; ++r)
          product[r] = simd::fma<T>(simd::load(k + r * stride + j), xj, product[r]);
      }
      if constexpr (kOld > 0) {
        V s = simd::load(sum + j);
#pragma GCC unroll 8
        for (int r = 0; r < kOld; ++r) s = simd::fma<T>(simd::load(old + r * stride + j), weight[r], s);
        simd::store(sum + j, s);
      }
    }
    if constexpr (kNew > 0) {
      T total[kNew];
      simd::lane_sums<kNew>(product, total);
      for (int r = 0; r < kNew; ++r) out[r] += static_cast<double>(total[r]);
    }
  }
}

template <int kR, class T>
void add_products(const T* k, int64_t stride, const T* x, int64_t columns, double* out) {
  pass<kR, 0, T>(k, nullptr, stride, x, nullptr, columns, out, nullptr);
}

template <int kR, class T>
void add_rows(const T* k, int64_t stride, const T* w, int64_t columns, T* sum) {
  pass<0, kR, T>(nullptr, k, stride, nullptr, w, columns, nullptr, sum);
}

// fn(first, rows) with rows = kR as a constant while so many are left, then 1.
template <int kR = kTogether, class Fn>
void for_rows_together(int64_t count, Fn&& fn) {
  int64_t r = 0;
  for (; r + kR <= count; r += kR) fn(r, std::integral_constant<int, kR>{});
  for (; r < count; ++r) fn(r, std::integral_constant<int, 1>{});
}

// A number as two of type T: the nearest, and the nearest to the remainder.
template <class T>
struct TwoParts {
  T high, low;
  explicit TwoParts(double value)
      : high(static_cast<T>(value)),
        low(sizeof(T) == 4 && std::isfinite(value) ? static_cast<T>(value - static_cast<double>(high))
                                                   : T(0)) {}
};

// Columns' potentials in two parts, as the exponents need them.
template <class T>
struct ColumnPotentials {
  Buffer<T> high, low;
  explicit ColumnPotentials(int64_t size) : high(size), low(size) {}
  void set(int64_t j, double value) {
    const TwoParts<T> parts(value);
    high[j] = parts.high;
    low[j] = parts.low;
  }
};

// The exponents of one problem and the sums over them. Column arrays have `width` entries, those beyond m
// padding.
template <class T>
class Exponents {
  using V = simd::Vec<T>;
  static constexpr int kW = simd::kWidth<T>;

 public:
  explicit Exponents(const CostTiles<T>& costs) : costs_(costs) {}

  // E[r][j] = exp((f_r + g_j - C_rj) / eps - shift_r) for the rows [first, first + count), `stride` apart,
  // and sum[r] = sum_j weight_j E[r][j]; with `cost_sum` also cost_sum[r] = sum_j weight_j E[r][j] C_rj.
  void make(int64_t first, int64_t count, const double* f, const ColumnPotentials<T>& g, double eps,
            const double* shift, const T* weight, int64_t width, T* e, int64_t stride, double* sum,
            double* cost_sum) const {
    alignas(64) T room[kCostRows * kCostColumns<T>];
    std::fill(sum, sum + count, 0.0);
    if (cost_sum != nullptr) std::fill(cost_sum, cost_sum + count, 0.0);
    const V inverse = simd::broadcast(static_cast<T>(1 / eps));
    for (int64_t begin = 0; begin < width; begin += kCostColumns<T>) {
      const int64_t here = std::min(kCostColumns<T>, width - begin);
      int64_t apart;
      const T* c = costs_.tile(first, count, begin, here, room, apart);
      for (int64_t r = 0; r < count; ++r) {
        const TwoParts<T> fr(f[r]);
        const V high = simd::broadcast(fr.high), low = simd::broadcast(fr.low);
        const V minus = simd::broadcast(static_cast<T>(shift[r]));
        V total{}, cost_total{};
        for (int64_t j = 0; j < here; j += kW) {
          const V cost = simd::load(c + r * apart + j);
          const V t = exponent(high, low, cost, g, begin + j) * inverse - minus;
          const V value = simd::exp<T>(t);
          simd::store(e + r * stride + begin + j, value);
          const V part = value * simd::load(weight + begin + j);
          total += part;
          if (cost_sum != nullptr) cost_total = simd::fma<T>(part, cost, cost_total);
        }
        sum[r] += lanes(total);
        if (cost_sum != nullptr) cost_sum[r] += lanes(cost_total);
      }
    }
  }

  // most[r] = the largest exponent (f_r + g_j - C_rj) / eps of each row.
  void largest(int64_t first, int64_t count, const double* f, const ColumnPotentials<T>& g, double eps,
               int64_t width, double* most) const {
    std::fill(most, most + count, -HUGE_VAL);
    for_exponents(first, count, width, [&](int64_t r, int64_t begin, const T* c, int64_t here) {
      const TwoParts<T> fr(f[r]);
      const V high = simd::broadcast(fr.high), low = simd::broadcast(fr.low);
      V largest = simd::broadcast(-std::numeric_limits<T>::infinity());
      for (int64_t j = 0; j < here; j += kW) {
        const V t = exponent(high, low, simd::load(c + j), g, begin + j);
        largest = t > largest ? t : largest;
      }
      for (int i = 0; i < kW; ++i) most[r] = std::max(most[r], static_cast<double>(largest[i]) / eps);
    });
  }

  // most[j] = the larger of itself and f_i - C_ij over the rows with weight.
  void raise(int64_t first, int64_t count, const double* f, const T* row_weight, int64_t width,
             T* most) const {
    for_exponents(first, count, width, [&](int64_t r, int64_t begin, const T* c, int64_t here) {
      if (row_weight[r] == 0) return;
      const V high = simd::broadcast(static_cast<T>(f[r]));
      for (int64_t j = 0; j < here; j += kW) {
        const V t = high - simd::load(c + j), old = simd::load(most + begin + j);
        simd::store(most + begin + j, t > old ? t : old);
      }
    });
  }

 private:
  static double lanes(V v) {
    double sum = 0;
    for (int i = 0; i < kW; ++i) sum += static_cast<double>(v[i]);
    return sum;
  }

  static V exponent(V f_high, V f_low, V cost, const ColumnPotentials<T>& g, int64_t j) {
    const V s = f_high - cost;
    if constexpr (sizeof(T) == 8) return s + simd::load(g.high.data() + j);
    const V back = s - f_high;
    const V error = (f_high - (s - back)) - (cost + back);
    return (s + simd::load(g.high.data() + j)) + (error + (f_low + simd::load(g.low.data() + j)));
  }

  // fn(r, begin, costs, columns) for every row and tile.
  template <class Fn>
  void for_exponents(int64_t first, int64_t count, int64_t width, Fn&& fn) const {
    alignas(64) T room[kCostRows * kCostColumns<T>];
    for (int64_t begin = 0; begin < width; begin += kCostColumns<T>) {
      const int64_t here = std::min(kCostColumns<T>, width - begin);
      int64_t apart;
      const T* c = costs_.tile(first, count, begin, here, room, apart);
      for (int64_t r = 0; r < count; ++r) fn(r, begin, c + r * apart, here);
    }
  }

  const CostTiles<T>& costs_;
};

// The rows of one problem cut into chunks, and for each the sums over its rows of every column.
template <class T>
class Chunks {
 public:
  Chunks(int64_t rows, int64_t width)
      : rows_(rows),
        size_(std::max(kChunkRows, round_up((rows + kChunks - 1) / kChunks, kChunkRows))),
        width_(width),
        sums_(count() * width) {}

  int64_t count() const { return (rows_ + size_ - 1) / size_; }
  int64_t first(int64_t c) const { return c * size_; }
  int64_t last(int64_t c) const { return std::min(rows_, (c + 1) * size_); }
  T* sums(int64_t c) { return sums_.data() + c * width_; }

  // out[j] = the sum over the chunks, in order.
  void combine(double* out, int64_t columns) const {
    for (int64_t j = 0; j < columns; ++j) out[j] = static_cast<double>(sums_[j]);
    for (int64_t c = 1; c < count(); ++c) {
      const T* part = sums_.data() + c * width_;
      for (int64_t j = 0; j < columns; ++j) out[j] += static_cast<double>(part[j]);
    }
  }

 private:
  int64_t rows_, size_, width_;
  Buffer<T> sums_;
};

double damping(double rho, double eps) { return std::isinf(rho) ? 1.0 : rho / (rho + eps); }

// The arrays that a run of one problem needs, kept from problem to problem.
template <class T>
class Workspace {
 public:
  T* matrix(int64_t size) { return room(matrix_, size); }
  T* blocks(int64_t size) { return room(blocks_, size); }

 private:
  static T* room(Buffer<T>& buffer, int64_t size) {
    if (buffer.size() < size) buffer = Buffer<T>(size);
    return buffer.data();
  }
  Buffer<T> matrix_, blocks_;
};

// The least and the largest of some numbers.
template <class T>
class Range {
  using V = simd::Vec<T>;

 public:
  void add(V v) {
    least_ = v < least_ ? v : least_;
    most_ = v > most_ ? v : most_;
    // NaN is in no range, and compares as false.
    least_ = v == v ? least_ : V{};
  }
  T least() const {
    T result = least_[0];
    for (int i = 1; i < simd::kWidth<T>; ++i) result = std::min<T>(result, least_[i]);
    return result;
  }
  T most() const {
    T result = most_[0];
    for (int i = 1; i < simd::kWidth<T>; ++i) result = std::max<T>(result, most_[i]);
    return result;
  }
  void add(const Range& other) {
    add(other.least_);
    add(other.most_);
  }
  bool within(T least, T most) const { return this->least() >= least && this->most() <= most; }

 private:
  V least_ = simd::broadcast(std::numeric_limits<T>::max()),
    most_ = simd::broadcast(std::numeric_limits<T>::lowest());
};

template <class T>
class Problem {
  using V = simd::Vec<T>;
  static constexpr int kW = simd::kWidth<T>;

 public:
  Problem(const SinkhornBatch<T>& batch, int64_t p, bool forbidden, const SinkhornResult& result,
          const SinkhornOptions& options, ThreadTeam& team, Workspace<T>& workspace)
      : p_(p),
        n_(batch.rows(p)),
        m_(batch.columns(p)),
        width_(round_up(m_, kW)),
        balanced_(std::isinf(options.rho_a) && std::isinf(options.rho_b)),
        symmetric_(options.symmetric && n_ == m_),
        resident_(width_ <= options.memory_budget / static_cast<int64_t>(sizeof(T)) / n_),
        options_(options),
        result_(result),
        team_(team),
        costs_(batch, p, forbidden, team),
        exponents_(costs_),
        chunks_(n_, width_),
        schedule_(options, options.warm(), spread_of(costs_, batch, p, options.reg), mass_of(batch.a, p, n_),
                  mass_of(batch.b, p, m_), kSinkhornReach<T>),
        translates_(schedule_.translates(options)),
        matrix_(resident_ ? workspace.matrix(n_ * width_) : nullptr),
        blocks_(workspace.blocks(team.size() * kCostRows * width_)),
        a_(n_),
        b_(m_),
        f_(n_, 0.0),
        g_(m_, 0.0),
        column_sums_(m_),
        chunk_error_(chunks_.count()),
        chunk_squares_(chunks_.count()),
        row_weight_(n_),
        column_weight_(width_, T(0)),
        u_(n_, T(1)),
        next_u_(n_, T(1)),
        v_(width_, T(1)),
        next_v_(width_, T(1)),
        weighted_v_(width_),
        potentials_(width_) {
    mass_a_ = mass_of(batch.a, p, n_);
    mass_b_ = mass_of(batch.b, p, m_);
    for (int64_t i = 0; i < n_; ++i) a_[i] = batch.a(p, i);
    for (int64_t j = 0; j < m_; ++j) b_[j] = batch.b(p, j);
    log_mass_b_ = std::log(mass_b_);
    ratio_ = mass_a_ / mass_b_;
    for (int64_t i = 0; i < n_; ++i) row_weight_[i] = static_cast<T>(a_[i] / mass_a_);
    for (int64_t j = 0; j < m_; ++j) column_weight_[j] = static_cast<T>(b_[j] / mass_b_);
    if (options.warm()) {
      for (int64_t i = 0; i < n_; ++i) f_[i] = options.f(p, i);
      for (int64_t j = 0; j < m_; ++j) g_[j] = symmetric() ? f_[j] : options.g(p, j);
    }
    if (balanced_) return;
    chunk_lost_ = Buffer<double>(chunks_.count());
    for (Buffer<T>* rows : {&row_pull_, &asked_, &next_asked_}) *rows = Buffer<T>(n_);
    column_pull_ = Buffer<T>(width_, T(0));
  }

  // Goes on for up to `iterations`; returns whether the problem is solved. `stop`: another thread asks to
  // stop.
  bool step(int64_t iterations, const std::atomic<bool>& stop) {
    for (int64_t i = 0; i < iterations; ++i) {
      if (stop.load(std::memory_order_relaxed)) throw Cancelled();
      team_.check();
      switch (schedule_.after(iterate())) {
        case SinkhornOrder::kGoOn:
          break;
        case SinkhornOrder::kNewEps:
          absorb();
          columns_off_ = {};
          break;
        case SinkhornOrder::kCheck: {
          const double error = evaluate();
          if (error <= schedule_.tol() || !schedule_.disappointed(error)) return true;
          break;
        }
        case SinkhornOrder::kStop:
          evaluate();
          return true;
      }
    }
    return false;
  }

  int64_t iterations() const { return schedule_.iterations(); }

 private:
  // A bound of the costs' range; throws std::invalid_argument if the costs, or their exponents, leave the
  // range of the type.
  static double spread_of(const CostTiles<T>& costs, const SinkhornBatch<T>& batch, int64_t p, double reg) {
    const double spread = costs.spread();
    // Euclidean distances are the roots of their squares.
    const bool squares = !batch.is_cost && !batch.cosine && batch.metric == Metric::kEuclidean;
    const double most = static_cast<double>(std::numeric_limits<T>::max());
    const bool fits = spread <= (squares ? std::sqrt(most) : most);
    if (fits && spread <= kSinkhornExponents * most * reg) return spread;
    const std::string type = sizeof(T) == 4 ? "torch.float32" : "torch.float64",
                      within = batch.count() > 1 ? " in problem " + std::to_string(p) : "",
                      remedy = sizeof(T) == 4 ? " or use float64" : "";
    if (!fits) {
      throw std::invalid_argument("x: costs overflow " + type + within + "; scale the data down" + remedy);
    }
    char text[96];
    std::snprintf(text, sizeof text, "reg: costs of %.3g in units of %.3g overflow ", spread, reg);
    throw std::invalid_argument(text + type + within + "; raise reg" + remedy);
  }

  static double mass_of(const TensorView<const double, 2>& weights, int64_t p, int64_t count) {
    double sum = 0;
    for (int64_t i = 0; i < count; ++i) sum += weights(p, i);
    return sum;
  }

  // How far marginals were off the ones that the potentials ask for: the row sums of the plan that an
  // iteration began with, the column sums of the plan that it made; the sum, and that of the squares of
  // shares of the mass. Also the weights' sums of exp(-potential / rho) - 1 after the iteration.
  struct Off {
    double rows = 0, columns = 0, row_squares = 0, column_squares = 0, lost_rows = 0, lost_columns = 0;
  };

  // One iteration; returns a bound of the error of the potentials that it began with.
  SinkhornError iterate() {
    Off off;
    bool done = false;
    if (scaled_) {
      done = plain(off);
      if (!done) absorb();
    }
    if (!done) off = sweep();
    const SinkhornError rows = options_.error_of(off.rows, off.row_squares, mass_a_),
                        error = rows.plus(symmetric() ? rows : columns_off_);
    columns_off_ = options_.error_of(off.columns, off.column_squares, mass_b_);
    if (translates_) columns_off_ = columns_off_.plus(translate(off.lost_rows, off.lost_columns));
    if (drifted_) absorb();
    return error;
  }

  // Moves the best constant from the columns' potentials to the rows', which leaves the plan as it is;
  // returns by how much more the column sums are off.
  double translate(double lost_rows, double lost_columns) {
    const double constant = sinkhorn_translation(rho_a(), rho_b(), mass_a_, mass_b_, lost_rows, lost_columns);
    if (constant == 0) return 0;
    if (!(std::abs(constant / rho_a()) < 30)) absorb();
    if (scaled_) {
      moved_ += constant;
      const T share = static_cast<T>(std::exp(-constant / rho_a()));
      for (int64_t i = 0; i < n_; ++i) asked_[i] *= share;
    } else {
      for (int64_t i = 0; i < n_; ++i) f_[i] += constant;
      for (int64_t j = 0; j < m_; ++j) g_[j] -= constant;
    }
    return (mass_b_ + lost_columns) * std::abs(std::expm1(constant / rho_b()));
  }

  // Puts the scalings into the potentials; the kernel matrix then has to be made anew.
  void absorb() {
    if (!scaled_) return;
    for (int64_t i = 0; i < n_; ++i) f_[i] += made_at_ * std::log(static_cast<double>(u_[i])) + moved_;
    for (int64_t j = 0; j < m_; ++j) g_[j] += made_at_ * std::log(static_cast<double>(v_[j])) - moved_;
    scaled_ = drifted_ = false;
    moved_ = 0;
  }

  double rho_a() const { return options_.rho_a; }
  double rho_b() const { return options_.rho_b; }
  double damp_rows(double eps) const { return damping(rho_a(), eps); }
  double damp_columns(double eps) const { return damping(rho_b(), eps); }
  bool symmetric() const { return symmetric_; }
  bool is_simple() const { return balanced_ && schedule_.omega() == 1; }

  double sum_over_chunks(const Buffer<double>& of) const {
    double sum = 0;
    for (int64_t c = 0; c < chunks_.count(); ++c) sum += of[c];
    return sum;
  }

  // ---- the plain domain

  // An iteration from the kernel matrix; false, and the state as before, if a sum leaves the range of the
  // type.
  bool plain(Off& off) {
    for (int64_t j = 0; j < width_; ++j) weighted_v_[j] = column_weight_[j] * v_[j];
    std::atomic<bool> in_range{true}, drifted{false};
    const Move move(made_at_, schedule_.omega(), rho_a(), -moved_);
    team_.parallel_for(chunks_.count(), 1, [&](int, int64_t c, int64_t) {
      T* const sums = chunks_.sums(c);
      std::fill(sums, sums + width_, T(0));
      RowsSeen seen;
      if (width_ <= kShort) {
        plain_chunk<2 * kTogether>(c, move, sums, seen);
      } else {
        plain_chunk<kTogether>(c, move, sums, seen);
      }
      chunk_error_[c] = seen.error();
      chunk_squares_[c] = options_.l2 ? sum_of_lanes(seen.squares) : 0;
      if (!balanced_) chunk_lost_[c] = seen.sum_of(seen.lost);
      if (!seen.sums.within(kLeast<T>, kMost<T>)) in_range.store(false, std::memory_order_relaxed);
      if (!seen.scalings.within(kLeastScaling, kMostScaling)) drifted.store(true, std::memory_order_relaxed);
    });
    Range<T> scalings;
    if (!in_range.load()) return false;
    if (symmetric()) {
      std::copy(next_u_.data(), next_u_.data() + n_, next_v_.data());
    } else if (!scale_columns(off, scalings)) {
      return false;
    }
    off.rows = sum_over_chunks(chunk_error_);
    off.row_squares = sum_over_chunks(chunk_squares_);
    if (!balanced_) off.lost_rows = sum_over_chunks(chunk_lost_);
    u_.swap(next_u_);
    v_.swap(next_v_);
    asked_.swap(next_asked_);
    drifted_ = drifted.load() || !(symmetric() || scalings.within(kLeastScaling, kMostScaling));
    return true;
  }

  // The move of one side in the plain domain, whose potentials are F - taken + eps log u, by `pull`, -F /
  // rho.
  struct Move {
    V keep, step, moved, share;
    Move(double eps, double omega, double rho, double taken) {
      const double damp = damping(rho, eps);
      keep = simd::broadcast(static_cast<T>((1 - omega) * (1 - damp) + damp));
      step = simd::broadcast(static_cast<T>(omega * damp));
      moved = simd::broadcast(static_cast<T>(taken / rho));
      share = simd::broadcast(static_cast<T>(eps / rho));
    }
    // The next log u, from the current one and from the logarithm of the line's sum.
    V of(V log_u, V log_sum, V pull) const { return step * (pull + moved) + (keep * log_u - step * log_sum); }
    // exp(-potential / rho).
    V asked(V log_u, V pull) const { return simd::exp<T>((pull + moved) - share * log_u); }
  };

  // The results of an iteration over the rows of a chunk.
  struct RowsSeen {
    Range<T> sums, scalings;
    V off{};      // by how much the rows' sums are off, as shares of the mass
    V squares{};  // of these shares
    V lost{};     // the sums that they ask for from now on, less 1; likewise
    double mass = 1;
    void add_off(V shares) {
      off += shares;
      squares += shares * shares;
    }
    double error() const { return sum_of(off); }
    double sum_of(V shares) const { return sum_of_lanes(shares) * mass; }
  };

  static double sum_of_lanes(V values) {
    double total = 0;
    for (int l = 0; l < kW; ++l) total += static_cast<double>(values[l]);
    return total;
  }

  // The rows of a chunk, some together. If two groups of them fit the first-level cache, the columns' sums of
  // one group are taken while the next comes from memory.
  template <int kGroup>
  void plain_chunk(int64_t c, const Move& move, T* sums, RowsSeen& seen) {
    const bool overlap = !symmetric() && 2 * kGroup * width_ * static_cast<int64_t>(sizeof(T)) <= kFirstCache;
    const T *x = weighted_v_.data(), *before = nullptr;
    T weighted[kLanes<T>];
    seen.mass = mass_a_;
    const int64_t first = chunks_.first(c);
    for_rows_together<kGroup>(chunks_.last(c) - first, [&](int64_t r, auto together) {
      constexpr int kR = decltype(together)::value;
      const T* const rows = matrix_ + (first + r) * width_;
      double product[kR] = {};
      if (before == nullptr) {
        add_products<kR>(rows, width_, x, width_, product);
      } else {
        pass<kR, kGroup>(rows, before, width_, x, weighted, width_, product, sums);
      }
      scale_rows<kR>(first + r, product, move, weighted, seen);
      if (overlap && kR == kGroup) {
        before = rows;
      } else if (!symmetric()) {
        add_rows<kR>(rows, width_, weighted, width_, sums);
        before = nullptr;
      }
    });
    if (before != nullptr) add_rows<kGroup>(before, width_, weighted, width_, sums);
  }

  // The next scalings of kR rows from their `product` with the columns' scalings, `weighted` with the rows'
  // weights.
  template <int kR>
  void scale_rows(int64_t i, const double* product, const Move& move, T* weighted, RowsSeen& rows) {
    constexpr int kL = kLanes<T>;
    T sum[kL], old[kL], weight[kL], pull[kL], asked[kL], next[kL], next_asked[kL];
    for (int r = 0; r < kL; ++r) {
      sum[r] = r < kR ? static_cast<T>(product[r]) : T(1);
      old[r] = r < kR ? u_[i + r] : T(1);
      weight[r] = r < kR ? row_weight_[i + r] : T(0);
    }
    for (int r = 0; r < kL && !balanced_; ++r) {
      pull[r] = r < kR ? row_pull_[i + r] : T(0);
      asked[r] = r < kR ? asked_[i + r] : T(0);
    }
    const V one = simd::broadcast(T(1)), zero{};
    for (int l = 0; l < kL; l += kW) {
      const V u = simd::load(old + l), w = simd::load(weight + l);
      // A row without weight is 0 in the matrix, and stays as it is.
      const V x = w > zero ? simd::load(sum + l) : one / u, s = u * x;
      rows.sums.add(s);
      V scaling;
      if (is_simple()) {
        scaling = one / x;
      } else {
        const V p = balanced_ ? zero : simd::load(pull + l);
        const V log_scaling = move.of(simd::log<T>(u), simd::log<T>(s), p);
        scaling = simd::exp<T>(log_scaling);
        scaling = w > zero ? scaling : u;
        if (!balanced_) {
          const V now = move.asked(log_scaling, p);
          rows.add_off(w > zero ? w * simd::abs<T>(s - simd::load(asked + l)) : zero);
          rows.lost += w > zero ? w * (now - one) : zero;
          simd::store(next_asked + l, now);
        }
      }
      rows.scalings.add(scaling);
      if (balanced_) rows.add_off(w * simd::abs<T>(s - one));
      simd::store(next + l, scaling);
      simd::store(weighted + l, w * scaling);
    }
    std::copy(next, next + kR, next_u_.data() + i);
    if (!balanced_) std::copy(next_asked, next_asked + kR, next_asked_.data() + i);
  }

  // The next scalings of the columns from the chunks' sums; false if one of the sums leaves the range of the
  // type.
  bool scale_columns(Off& off, Range<T>& scalings) {
    chunks_.combine(column_sums_.data(), m_);
    for (int64_t j = 0; j < m_; ++j) next_v_[j] = static_cast<T>(ratio_ * column_sums_[j]);
    const V one = simd::broadcast(T(1)), zero{};
    const Move move(made_at_, schedule_.omega(), rho_b(), moved_);
    Range<T> range;
    V squares{};
    off.columns = off.lost_columns = 0;
    for (int64_t j = 0; j < width_; j += kW) {
      const V w = simd::load(column_weight_.data() + j), v = simd::load(v_.data() + j);
      const V x = w > zero ? simd::load(next_v_.data() + j) : one / v;
      const V s = v * x;
      range.add(s);
      V next;
      if (is_simple()) {
        next = one / x;
      } else {
        const V pull = balanced_ ? zero : simd::load(column_pull_.data() + j);
        const V log_scaling = move.of(simd::log<T>(v), simd::log<T>(s), pull);
        next = simd::exp<T>(log_scaling);
        next = w > zero ? next : v;
        const V after = x * next, asked = balanced_ ? one : move.asked(log_scaling, pull);
        if (options_.l2) {
          const V share = w > zero ? w * simd::abs<T>(after - asked) : zero;
          squares += share * share;
        }
        for (int l = 0; l < kW && j + l < m_; ++l) {
          if (balanced_) {
            off.columns += b_[j + l] * std::abs(static_cast<double>(after[l]) - 1);
          } else {
            note_column(j + l, static_cast<double>(after[l]), static_cast<double>(asked[l]), off);
          }
        }
      }
      scalings.add(next);
      simd::store(next_v_.data() + j, next);
    }
    if (options_.l2) off.column_squares = sum_of_lanes(squares);
    return range.within(kLeast<T>, kMost<T>);
  }

  // Notes that column j of the plan now sums up to b_j times `ratio`, of which its potential asks for
  // `asked`; returns by how much it is off.
  double note_column(int64_t j, double ratio, double asked, Off& off) const {
    if (!(b_[j] > 0)) return 0;
    const double own = b_[j] * std::abs(ratio - asked);
    off.columns += own;
    off.lost_columns += b_[j] * (asked - 1);
    return own;
  }

  // ---- from the costs

  // An iteration that makes the kernel matrix, or only a block of its rows at a time.
  Off sweep() {
    const double eps = schedule_.eps(), omega = schedule_.omega(), damp = damp_rows(eps);
    set_potentials();
    std::atomic<bool> far{
        false};  // whether a scaling would be far from 1, or a block does not hold its values
    team_.parallel_for(chunks_.count(), 1, [&](int thread, int64_t c, int64_t) {
      T* const sums = chunks_.sums(c);
      std::fill(sums, sums + width_, T(0));
      double error = 0, squares = 0, lost = 0;
      for (int64_t i = chunks_.first(c); i < chunks_.last(c); i += kCostRows) {
        const int64_t count = std::min(kCostRows, chunks_.last(c) - i);
        T* const e = resident_ ? matrix_ + i * width_ : block(thread);
        double logs[kCostRows], next[kCostRows];
        T factor[kCostRows];
        bool tame = make_block(i, count, eps, e, logs);
        if (!tame) far = true;
        for (int64_t r = 0; r < count; ++r) {
          next[r] = sinkhorn_moved(f_[i + r], logs[r], eps, omega, damp);
          if (costs_.forbidden()) next[r] = sinkhorn_allowed<T>(next[r], a_[i + r]);
          const double exponent = (next[r] - f_[i + r]) / eps;
          tame = tame && std::abs(exponent) < 40;
          factor[r] = static_cast<T>(std::exp(exponent));
          const double own = row_off(i + r, logs[r]);
          error += own;
          squares += sinkhorn_square(own, mass_a_);
          if (!balanced_ && a_[i + r] > 0) lost += a_[i + r] * std::expm1(-next[r] / rho_a());
          (symmetric() ? column_sums_ : f_)[i + r] = next[r];
          if (symmetric() && a_[i + r] > 0 && !(std::abs(exponent) < std::log(kMostScaling))) far = true;
        }
        if (symmetric()) {
          zero_weightless(i, count, e);
          continue;
        }
        if (!tame) {
          make_again(i, count, eps, e);
          std::fill(factor, factor + count, T(1));
        }
        if (resident_) {
          for (int64_t r = 0; r < count; ++r) {
            for (int64_t j = 0; j < width_; ++j) e[r * width_ + j] *= factor[r];
          }
          std::fill(factor, factor + count, T(1));
        }
        add_block(i, count, e, factor, sums);
      }
      chunk_error_[c] = error;
      chunk_squares_[c] = squares;
      if (!balanced_) chunk_lost_[c] = lost;
    });
    Off off;
    off.rows = sum_over_chunks(chunk_error_);
    off.row_squares = sum_over_chunks(chunk_squares_);
    if (!balanced_) off.lost_rows = sum_over_chunks(chunk_lost_);
    if (symmetric()) {
      move_both(eps, !far.load());
    } else {
      move_columns(eps, off);
    }
    return off;
  }

  // The potentials of both sides become those of the rows in column_sums_, or the scalings that lead there.
  void move_both(double eps, bool near) {
    if (!keeps_kernel(eps, near)) {
      for (int64_t i = 0; i < n_; ++i) f_[i] = g_[i] = column_sums_[i];
      return;
    }
    scaled_ = true;
    made_at_ = eps;
    for (int64_t i = 0; i < n_; ++i) {
      u_[i] = v_[i] = a_[i] > 0 ? static_cast<T>(std::exp((column_sums_[i] - f_[i]) / eps)) : T(1);
      if (balanced_) continue;
      row_pull_[i] = static_cast<T>(-f_[i] / rho_a());
      asked_[i] = static_cast<T>(sinkhorn_asked(column_sums_[i], rho_a()));
    }
  }

  // Whether the kernel matrix stays for the next iteration. The logarithm of a scaling, times eps, has too
  // few digits for a potential that is small beside eps.
  bool keeps_kernel(double eps, bool near) const {
    return resident_ && near && !(eps > std::min(rho_a(), rho_b()));
  }

  // E of a block of rows at the potentials, and the logarithms of the rows' sums S_i. Returns whether the
  // sums could be taken in the plain domain; otherwise E does not hold these values.
  bool make_block(int64_t i, int64_t count, double eps, T* e, double* logs, double* cost = nullptr) const {
    double f[kCostRows], shift[kCostRows] = {}, sum[kCostRows];
    for (int64_t r = 0; r < count; ++r) f[r] = f_[i + r] + eps * log_mass_b_;
    exponents_.make(i, count, f, potentials_, eps, shift, column_weight_.data(), width_, e, width_, sum,
                    cost);
    bool tame = true;
    for (int64_t r = 0; r < count; ++r) tame = tame && sum[r] > kLeast<T> && sum[r] < kMost<T>;
    if (!tame) {
      exponents_.largest(i, count, f, potentials_, eps, width_, shift);
      exponents_.make(i, count, f, potentials_, eps, shift, column_weight_.data(), width_, e, width_, sum,
                      cost);
    }
    for (int64_t r = 0; r < count; ++r) {
      logs[r] = std::log(sum[r]) + shift[r];
      if (cost != nullptr) cost[r] *= std::exp(shift[r]);
    }
    return tame;
  }

  // E of a block of rows at the potentials.
  void make_again(int64_t i, int64_t count, double eps, T* e) const {
    double f[kCostRows], shift[kCostRows] = {}, sum[kCostRows];
    for (int64_t r = 0; r < count; ++r) f[r] = f_[i + r] + eps * log_mass_b_;
    exponents_.make(i, count, f, potentials_, eps, shift, column_weight_.data(), width_, e, width_, sum,
                    nullptr);
  }

  // sums[j] += sum over a block of rows of weight_i factor_r E[r][j].
  void add_block(int64_t i, int64_t count, T* e, const T* factor, T* sums) const {
    T weight[kCostRows];
    for (int64_t r = 0; r < count; ++r) {
      weight[r] = row_weight_[i + r] > 0 ? row_weight_[i + r] * factor[r] : T(0);
    }
    zero_weightless(i, count, e);
    for_rows_together(count, [&](int64_t r, auto together) {
      add_rows<decltype(together)::value>(e + r * width_, width_, weight + r, width_, sums);
    });
  }

  // Rows without weight may be infinite.
  void zero_weightless(int64_t i, int64_t count, T* e) const {
    for (int64_t r = 0; r < count; ++r) {
      if (row_weight_[i + r] == 0) std::fill(e + r * width_, e + (r + 1) * width_, T(0));
    }
  }

  // By how much row i of the plan, whose sum is a_i exp(log_sum), is off.
  double row_off(int64_t i, double log_sum) const {
    if (!(a_[i] > 0)) return 0;
    if (std::isinf(rho_a())) return a_[i] * std::abs(std::expm1(log_sum));
    return a_[i] * std::abs(std::exp(log_sum) - sinkhorn_asked(f_[i], rho_a()));
  }

  // The columns' half of a sweep.
  void move_columns(double eps, Off& off) {
    chunks_.combine(column_sums_.data(), m_);
    bool tame = true;
    for (int64_t j = 0; j < m_; ++j) {
      const double sum = ratio_ * column_sums_[j];
      if (b_[j] > 0 && !(sum > kLeast<T> && sum < kMost<T>)) tame = false;
      column_sums_[j] = std::log(sum);
    }
    if (!tame) soft_columns(eps, column_sums_.data());
    const double damp = damp_columns(eps), omega = schedule_.omega();
    bool near = true;
    for (int64_t j = 0; j < m_; ++j) {
      if (!(b_[j] > 0)) {
        column_sums_[j] = 0;
        continue;
      }
      double next = sinkhorn_moved(g_[j], column_sums_[j], eps, omega, damp);
      if (costs_.forbidden()) next = sinkhorn_allowed<T>(next, b_[j]);
      const double moved = (next - g_[j]) / eps;
      if (!is_simple()) {
        const double own =
            note_column(j, std::exp(column_sums_[j] + moved), sinkhorn_asked(next, rho_b()), off);
        off.column_squares += sinkhorn_square(own, mass_b_);
      }
      near = near && std::abs(moved) < std::log(kMostScaling);
      column_sums_[j] = moved;
    }
    if (!keeps_kernel(eps, near)) {
      for (int64_t j = 0; j < m_; ++j) g_[j] += eps * column_sums_[j];
      return;
    }
    scaled_ = true;
    made_at_ = eps;
    std::fill(u_.data(), u_.data() + n_, T(1));
    for (int64_t j = 0; j < m_; ++j) v_[j] = static_cast<T>(std::exp(column_sums_[j]));
    if (balanced_) return;
    for (int64_t i = 0; i < n_; ++i) {
      row_pull_[i] = static_cast<T>(-f_[i] / rho_a());
      asked_[i] = static_cast<T>(sinkhorn_asked(f_[i], rho_a()));
    }
    for (int64_t j = 0; j < m_; ++j) column_pull_[j] = static_cast<T>(-g_[j] / rho_b());
  }

  // log_sums[j] = T_j, taken in the log domain, for all columns, with and without weight.
  void soft_columns(double eps, double* log_sums) {
    Buffer<T> most(width_, -std::numeric_limits<T>::infinity());
    Buffer<double> f(n_);
    for (int64_t i = 0; i < n_; ++i) f[i] = f_[i] + eps * log_mass_b_;
    team_.parallel_for(chunks_.count(), 1, [&](int, int64_t c, int64_t) {
      T* const largest = chunks_.sums(c);
      std::fill(largest, largest + width_, -std::numeric_limits<T>::infinity());
      for_blocks(c, [&](int64_t i, int64_t count) {
        exponents_.raise(i, count, f.data() + i, row_weight_.data() + i, width_, largest);
      });
    });
    for (int64_t c = 0; c < chunks_.count(); ++c) {
      for (int64_t j = 0; j < m_; ++j) most[j] = std::max(most[j], chunks_.sums(c)[j]);
    }
    ColumnPotentials<T> below(width_);
    for (int64_t j = 0; j < width_; ++j) below.set(j, j < m_ ? -static_cast<double>(most[j]) : -HUGE_VAL);
    team_.parallel_for(chunks_.count(), 1, [&](int thread, int64_t c, int64_t) {
      T* const sums = chunks_.sums(c);
      std::fill(sums, sums + width_, T(0));
      for_blocks(c, [&](int64_t i, int64_t count) {
        const double shift[kCostRows] = {};
        double sum[kCostRows];
        T factor[kCostRows];
        std::fill(factor, factor + count, T(1));
        exponents_.make(i, count, f.data() + i, below, eps, shift, column_weight_.data(), width_,
                        block(thread), width_, sum, nullptr);
        add_block(i, count, block(thread), factor, sums);
      });
    });
    chunks_.combine(log_sums, m_);
    for (int64_t j = 0; j < m_; ++j) {
      log_sums[j] = std::log(ratio_ * log_sums[j]) + (g_[j] + static_cast<double>(most[j])) / eps;
    }
  }

  // ---- the result

  // Writes the result of the potentials as they are now and returns the plan's error.
  double evaluate() {
    absorb();
    const double reg = options_.reg;
    set_potentials();
    Buffer<double> rows(n_), costs(n_);
    team_.parallel_for(chunks_.count(), 1, [&](int thread, int64_t c, int64_t) {
      T* const sums = chunks_.sums(c);
      std::fill(sums, sums + width_, T(0));
      for_blocks(c, [&](int64_t i, int64_t count) {
        T* const e = block(thread);
        T factor[kCostRows];
        std::fill(factor, factor + count, T(1));
        if (!make_block(i, count, reg, e, rows.data() + i, costs.data() + i)) make_again(i, count, reg, e);
        add_block(i, count, e, factor, sums);
      });
    });
    chunks_.combine(column_sums_.data(), m_);
    if (translates_) translate_exactly();
    double sum_off = 0, row_squares = 0, column_squares = 0;
    double mass = 0, cost = 0, worth_a = 0, worth_b = 0;
    for (int64_t i = 0; i < n_; ++i) {
      const double row = a_[i] > 0 ? a_[i] * std::exp(rows[i]) : 0;
      double& f = result_.f(p_, i);
      // A weight may also be 0 in the type of the scalings alone; f then has not moved.
      f = row_weight_[i] > 0 ? f_[i] : damp_rows(reg) * (f_[i] - reg * rows[i]);
      if (costs_.forbidden()) f = sinkhorn_allowed<T>(f, a_[i]);
      const double off = std::abs(row - a_[i] * (balanced_ ? 1 : sinkhorn_asked(f, rho_a())));
      sum_off += off;
      row_squares += sinkhorn_square(off, mass_a_);
      mass += row;
      cost += a_[i] > 0 ? a_[i] * costs[i] : 0;
      worth_a += a_[i] > 0 ? a_[i] * worth(f, rho_a()) : 0;
    }
    bool some_weightless = false;
    for (int64_t j = 0; j < m_; ++j) {
      some_weightless = some_weightless || !(b_[j] > 0);
      const double column = b_[j] > 0 ? b_[j] * ratio_ * column_sums_[j] : 0;
      const double off = std::abs(column - b_[j] * (balanced_ ? 1 : sinkhorn_asked(g_[j], rho_b())));
      sum_off += off;
      column_squares += sinkhorn_square(off, mass_b_);
      result_.g(p_, j) = g_[j];
      worth_b += b_[j] > 0 ? b_[j] * worth(g_[j], rho_b()) : 0;
    }
    if (some_weightless) {
      soft_columns(reg, column_sums_.data());
      for (int64_t j = 0; j < m_; ++j) {
        if (b_[j] > 0) continue;
        const double g = damp_columns(reg) * (g_[j] - reg * column_sums_[j]);
        result_.g(p_, j) = costs_.forbidden() ? sinkhorn_allowed<T>(g, 0) : g;
      }
    }
    const double error = options_.error_of(sum_off, row_squares, mass_a_)
                             .plus(options_.error_of(0, column_squares, mass_b_))
                             .judged;
    result_.value[p_] = worth_a + worth_b - reg * (mass - mass_a_ * mass_b_);
    result_.transport_cost[p_] = cost;
    result_.error[p_] = error;
    result_.tol[p_] = schedule_.tol();
    result_.iterations[p_] = schedule_.iterations();
    return error;
  }

  // translate(), from the potentials: sums in the type of the scalings leave the constant off by the rounding
  // of 1 times rho.
  void translate_exactly() {
    double lost_rows = 0, lost_columns = 0;
    for (int64_t i = 0; i < n_; ++i) {
      if (row_weight_[i] > 0) lost_rows += a_[i] * std::expm1(-f_[i] / rho_a());
    }
    for (int64_t j = 0; j < m_; ++j) {
      if (column_weight_[j] > 0) lost_columns += b_[j] * std::expm1(-g_[j] / rho_b());
    }
    translate(lost_rows, lost_columns);
  }

  // The amount that a unit of weight adds to the dual objective.
  static double worth(double potential, double rho) {
    return std::isinf(rho) ? potential : -rho * std::expm1(-potential / rho);
  }

  void set_potentials() {
    for (int64_t j = 0; j < width_; ++j) potentials_.set(j, column_weight_[j] > 0 ? g_[j] : -HUGE_VAL);
  }

  template <class Fn>
  void for_blocks(int64_t c, Fn&& fn) const {
    for (int64_t i = chunks_.first(c); i < chunks_.last(c); i += kCostRows) {
      fn(i, std::min(kCostRows, chunks_.last(c) - i));
    }
  }

  T* block(int thread) const { return blocks_ + thread * kCostRows * width_; }

  const int64_t p_, n_, m_, width_;
  const bool balanced_, symmetric_, resident_;
  const SinkhornOptions& options_;
  const SinkhornResult& result_;
  ThreadTeam& team_;
  const CostTiles<T> costs_;
  const Exponents<T> exponents_;
  Chunks<T> chunks_;
  SinkhornSchedule schedule_;
  const bool translates_;
  T* const matrix_;  // K [n, width], if it is kept
  T* const blocks_;  // kCostRows rows of it per thread
  Buffer<double> a_, b_, f_, g_;
  Buffer<double> column_sums_;  // [m]
  Buffer<double> chunk_error_, chunk_squares_;
  Buffer<T> row_weight_, column_weight_;  // of sum 1
  Buffer<T> u_, next_u_, v_, next_v_, weighted_v_;
  ColumnPotentials<T> potentials_;
  double mass_a_ = 0, mass_b_ = 0, log_mass_b_ = 0, ratio_ = 1;
  bool scaled_ = false;   // whether the plan is that of K, u and v, rather than of the potentials alone
  bool drifted_ = false;  // whether u and v have to be absorbed
  double made_at_ = 1;    // the eps of K
  SinkhornError columns_off_{};
  // Unbalanced: -potential / rho when K was made, which draws the scalings back; exp(-f / rho) now; and the
  // amount that f has gained and g lost since K was made.
  Buffer<double> chunk_lost_;
  Buffer<T> row_pull_, column_pull_, asked_, next_asked_;
  double moved_ = 0;
};

// How many of `threads` are worth starting for a few passes over a batch.
template <class T>
int worthwhile(int threads, const SinkhornBatch<T>& batch) {
  double entries = 0;
  for (int64_t p = 0; p < batch.count(); ++p) {
    entries += static_cast<double>(batch.rows(p)) * static_cast<double>(batch.columns(p));
  }
  return ThreadTeam::for_work(threads, kAdditionsPerEntry * entries);
}

template <class T>
class SinkhornRun final : public Sinkhorn {
 public:
  SinkhornRun(const SinkhornBatch<T>& batch, const SinkhornResult& result, const SinkhornOptions& options)
      : batch_(batch),
        result_(result),
        // The problems of a batch may take any number of iterations, one thread each.
        options_(
            with_threads(options, batch.count() > 1 ? options.threads : worthwhile(options.threads, batch))),
        team_(options_.threads, options.poll),
        order_(batch.count()),
        checked_(batch.is_shared() ? 1 : batch.count()),
        units_(std::min(options.max_iter, INT64_MAX / batch.count())) {
    int64_t largest = 0, all = 0;
    std::vector<int64_t> size(batch.count());
    for (int64_t p = 0; p < batch.count(); ++p) {
      size[p] = batch.rows(p) * batch.columns(p);
      largest = std::max(largest, size[p]);
      all += size[p];
    }
    team_.parallel_for(checked_.size(), 1,
                       [&](int, int64_t p, int64_t) { checked_[p] = CostTiles<T>::check(batch_, p); });
    // One problem per thread if that keeps all threads busy and the matrices fit; the results are the same.
    one_a_thread_ = batch.count() > 1 && largest <= all / options_.threads &&
                    largest <= options.memory_budget / static_cast<int64_t>(sizeof(T)) / options_.threads;
    // The largest first, so that the threads end together.
    std::iota(order_.begin(), order_.end(), int64_t{0});
    if (one_a_thread_) {
      std::stable_sort(order_.begin(), order_.end(), [&](int64_t p, int64_t q) { return size[p] > size[q]; });
    }
    workspaces_.resize(one_a_thread_ ? options_.threads : 1);
    if (batch.is_shared() && std::isinf(options.rho_a) && std::isinf(options.rho_b)) share();
  }

  int64_t total() const override { return batch_.count() * units_; }

  int64_t step(int64_t iterations) override {
    iterations = std::max<int64_t>(iterations, 1);
    if (shared_) {
      for (int64_t made = 0; made < iterations && shared_->done() < batch_.count(); made += batch_.count())
        shared_->step();
      return shared_->done() * units_ + std::min(shared_->iterations(), units_);
    }
    if (one_a_thread_) {
      several(std::max<int64_t>(iterations / std::max<int64_t>(options_.max_iter, 1), 8 * options_.threads));
    } else {
      one(iterations);
    }
    return done_ * units_ + (problem_ ? std::min(problem_->iterations(), units_) : 0);
  }

 private:
  static SinkhornOptions with_threads(SinkhornOptions options, int threads) {
    options.threads = threads;
    return options;
  }

  // Solves the problems together, if their costs' exponents fit.
  void share() {
    double least = HUGE_VAL, most = -HUGE_VAL;
    for (int64_t i = 0; i < batch_.x.shape[1]; ++i) {
      for (int64_t j = 0; j < batch_.x.shape[2]; ++j) {
        const double cost = static_cast<double>(batch_.x(0, i, j));
        least = std::min(least, cost);
        if (cost < HUGE_VAL) most = std::max(most, cost);
      }
    }
    const double exponent = (most - least) / options_.reg;
    if (exponent <= kMostExponent<float> && sizeof(T) == sizeof(float)) {
      share_as<float>(least, most - least);
    } else if (exponent <= kMostExponent<double>) {
      share_as<double>(least, most - least);
    }
  }

  template <class K>
  void share_as(double least, double spread) {
    if (SharedCosts<T, K>::bytes(batch_.x.shape[1], batch_.x.shape[2], batch_.count()) >
        options_.memory_budget) {
      return;
    }
    shared_ = std::make_unique<SharedCosts<T, K>>(
        batch_, result_, options_, least, spread, team_, [this](int64_t p) {
          const std::atomic<bool> stop{false};
          Problem<T> problem(batch_, p, forbidden(p), result_, options_, team_, workspaces_[0]);
          while (!problem.step(options_.max_iter, stop)) {
          }
        });
  }

  // The next `count` problems, one per thread.
  void several(int64_t count) {
    const int64_t begin = done_, end = std::min(batch_.count(), begin + std::min(count, batch_.count()));
    team_.parallel_for(end - begin, 1, [&](int thread, int64_t which, int64_t) {
      // The calling thread alone may ask the caller whether to go on.
      ThreadTeam alone(1, thread == 0 ? options_.poll : nullptr);
      const int64_t p = order_[begin + which];
      Problem<T> problem(batch_, p, forbidden(p), result_, options_, alone, workspaces_[thread]);
      while (!problem.step(options_.max_iter, team_.stopping())) {
      }
    });
    done_ = end;
  }

  // The next iterations of one problem, on all threads.
  void one(int64_t iterations) {
    const std::atomic<bool> stop{false};
    if (done_ == batch_.count()) return;
    if (!problem_) {
      problem_ = std::make_unique<Problem<T>>(batch_, done_, forbidden(done_), result_, options_, team_,
                                              workspaces_[0]);
    }
    if (problem_->step(iterations, stop)) {
      problem_.reset();
      ++done_;
    }
  }

  bool forbidden(int64_t p) const { return checked_[batch_.is_shared() ? 0 : p] != 0; }

  const SinkhornBatch<T> batch_;
  const SinkhornResult result_;
  const SinkhornOptions options_;
  ThreadTeam team_;
  std::vector<int64_t> order_;
  std::vector<char> checked_;  // whether pairs are forbidden; of the first problem alone if costs are shared
  const int64_t units_;        // what a problem counts for: its iterations, if the sum of all fits
  std::vector<Workspace<T>> workspaces_;
  bool one_a_thread_ = false;
  int64_t done_ = 0;  // problems, in `order_`
  std::unique_ptr<Problem<T>> problem_;
  std::unique_ptr<SharedSolver> shared_;
};

// fn(first, count, E) for blocks of rows of problem p, E[r][j] = exp((f_i + g_j - C_ij) / reg), 0 where b_j
// is 0.
template <class T, class Fn>
void for_kernel_blocks(const SinkhornBatch<T>& batch, int64_t p, const TensorView<const double, 2>& f,
                       const TensorView<const double, 2>& g, double reg, ThreadTeam& team, Fn&& fn) {
  const int64_t n = batch.rows(p), m = batch.columns(p), width = round_up(m, simd::kWidth<T>);
  const CostTiles<T> costs(batch, p, CostTiles<T>::check(batch, p), team);
  const Exponents<T> exponents(costs);
  ColumnPotentials<T> potentials(width);
  for (int64_t j = 0; j < width; ++j) potentials.set(j, j < m && batch.b(p, j) > 0 ? g(p, j) : -HUGE_VAL);
  const Buffer<T> weight(width, T(0));
  auto blocks = per_thread<T>(team.size(), kCostRows * width);
  team.parallel_for((n + kCostRows - 1) / kCostRows, 1, [&](int thread, int64_t block, int64_t) {
    const int64_t first = block * kCostRows, count = std::min(kCostRows, n - first);
    double row[kCostRows], sum[kCostRows];
    const double shift[kCostRows] = {};
    for (int64_t r = 0; r < count; ++r) row[r] = f(p, first + r);
    T* const e = blocks[thread].data();
    exponents.make(first, count, row, potentials, reg, shift, weight.data(), width, e, width, sum, nullptr);
    for (int64_t r = 0; r < count; ++r) {
      if (!(batch.a(p, first + r) > 0)) std::fill(e + r * width, e + (r + 1) * width, T(0));
    }
    fn(first, count, e);
  });
}

template <class T, int kRank>
TensorView<T, kRank> swapped(TensorView<T, kRank> view, int first, int second) {
  std::swap(view.shape[first], view.shape[second]);
  std::swap(view.stride[first], view.stride[second]);
  return view;
}

}  // namespace

template <class T>
std::unique_ptr<Sinkhorn> make_sinkhorn(const SinkhornBatch<T>& batch, const SinkhornResult& result,
                                        const SinkhornOptions& options) {
  return std::make_unique<SinkhornRun<T>>(batch, result, options);
}

template <class T>
void sinkhorn_apply(const SinkhornBatch<T>& batch, TensorView<const double, 2> f,
                    TensorView<const double, 2> g, double reg, TensorView<const T, 3> v, bool transpose,
                    TensorView<T, 3> out, int threads, std::function<bool()> poll) {
  if (transpose) {
    // The transposed plan is the plan of the transposed problem; a cost has the same bits either way.
    SinkhornBatch<T> other = batch;
    if (batch.is_cost) {
      other.x = swapped(batch.x, 1, 2);
    } else {
      std::swap(other.x, other.y);
    }
    std::swap(other.a, other.b);
    std::swap(other.x_lengths, other.y_lengths);
    return sinkhorn_apply<T>(other, g, f, reg, v, false, out, threads, std::move(poll));
  }
  ThreadTeam team(worthwhile(threads, batch), std::move(poll));
  for (int64_t p = 0; p < batch.count(); ++p) {
    const int64_t m = batch.columns(p), width = round_up(m, simd::kWidth<T>), k = v.shape[2];
    Buffer<T> values(k * width, T(0));  // b_j v_jk, by k
    for (int64_t j = 0; j < m; ++j) {
      const double b = batch.b(p, j);
      for (int64_t c = 0; c < k; ++c)
        values[c * width + j] = b > 0 ? static_cast<T>(b * static_cast<double>(v(p, j, c))) : T(0);
    }
    for_kernel_blocks(batch, p, f, g, reg, team, [&](int64_t first, int64_t count, const T* e) {
      for_rows_together(count, [&](int64_t r, auto together) {
        constexpr int kR = decltype(together)::value;
        for (int64_t c = 0; c < k; ++c) {
          double sum[kR] = {};
          add_products<kR>(e + r * width, width, values.data() + c * width, width, sum);
          for (int t = 0; t < kR; ++t) {
            const int64_t i = first + r + t;
            out(p, i, c) = static_cast<T>(batch.a(p, i) * sum[t]);
          }
        }
      });
    });
  }
}

template <class T>
void sinkhorn_plan(const SinkhornBatch<T>& batch, TensorView<const double, 2> f,
                   TensorView<const double, 2> g, double reg, TensorView<T, 3> out, int threads,
                   std::function<bool()> poll) {
  ThreadTeam team(worthwhile(threads, batch), std::move(poll));
  for (int64_t p = 0; p < batch.count(); ++p) {
    const int64_t n = batch.rows(p), m = batch.columns(p), width = round_up(m, simd::kWidth<T>);
    Buffer<double> b(m);
    for (int64_t j = 0; j < m; ++j) b[j] = batch.b(p, j);
    for_kernel_blocks(batch, p, f, g, reg, team, [&](int64_t first, int64_t count, const T* e) {
      for (int64_t r = 0; r < count; ++r) {
        const double a = batch.a(p, first + r);
        T* const row = &out(p, first + r, 0);
        for (int64_t j = 0; j < m; ++j)
          row[j] = static_cast<T>(a * b[j] * static_cast<double>(e[r * width + j]));
        std::fill(row + m, row + out.shape[2], T(0));
      }
    });
    for (int64_t i = n; i < out.shape[1]; ++i) std::fill_n(&out(p, i, 0), out.shape[2], T(0));
  }
}

#define FC_INSTANTIATE(T)                                                                             \
  template std::unique_ptr<Sinkhorn> make_sinkhorn<T>(const SinkhornBatch<T>&, const SinkhornResult&, \
                                                      const SinkhornOptions&);                        \
  template void sinkhorn_apply<T>(const SinkhornBatch<T>&, TensorView<const double, 2>,               \
                                  TensorView<const double, 2>, double, TensorView<const T, 3>, bool,  \
                                  TensorView<T, 3>, int, std::function<bool()>);                      \
  template void sinkhorn_plan<T>(const SinkhornBatch<T>&, TensorView<const double, 2>,                \
                                 TensorView<const double, 2>, double, TensorView<T, 3>, int,          \
                                 std::function<bool()>);
FC_INSTANTIATE(float)
FC_INSTANTIATE(double)
#undef FC_INSTANTIATE

}  // namespace fc
