// Sinkhorn problems that share one matrix of costs: K_ij = exp((least cost - C_ij) / reg) is made once, and a
// half iteration of all problems together is a product of K with a matrix of weighted scalings.
//
// With weights of sum 1, w and x, the iteration of each problem (a lane: a column of these matrices) is
//   R = K (x v)     u <- u^(1 - omega) R^-omega        f = reg (log u - log B) + least cost
//   S = K' (w u)    v <- v^(1 - omega) (S A / B)^-omega    g = reg log v
// with the masses A, B of the weights. K is there a second time transposed, so both products read along its
// rows: tiles of kRows rows and two vectors of lanes, in chains of kChain whose sums are added in order.
// Lanes whose problems are solved make room when a tile of them is left. A lane's numbers depend neither on
// the others nor on the number of threads.
//
// Scalings are never absorbed: K, u and v have to fit the range of its type. They do if the costs range over
// less than kMostExponent<K> reg; a lane that leaves the range of its sums is solved alone, by Problem.
//
// Cost: 2 n m multiply-adds per problem and iteration, 2 n m numbers read for all problems together; K, its
// transpose and K times C in memory.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#include "core/sinkhorn_schedule.h"
#include "core/threads.h"
#include "core/vmath.h"
#include "cpu/pack.h"
#include "cpu/sinkhorn.h"
#include "cpu/tile.h"

namespace fc {

// The range of costs in units of reg for which K fits its type, products with scalings included.
template <class K>
constexpr double kMostExponent = sizeof(K) == 4 ? 40 : 400;

// Lanes of problems that are solved together, at most.
inline constexpr int64_t kMostLanes = 256;

class SharedSolver {
 public:
  virtual ~SharedSolver() = default;
  // One iteration of each problem at hand.
  virtual void step() = 0;
  virtual int64_t done() const = 0;
  // Iterations of the problems that are being solved.
  virtual int64_t iterations() const = 0;
};

// T: the costs' type. K: that of the kernel matrix and the scalings.
template <class T, class K>
class SharedCosts final : public SharedSolver {
  using V = simd::Vec<K>;
  static constexpr int kW = simd::kWidth<K>, kRows = Tile<K>::kRows, kVectors = Tile<K>::kVectors;
  static constexpr int64_t kPanel = kVectors * kW;
  static constexpr int64_t kLines = 8 * kRows;  // that a thread takes at a time

 public:
  // The costs that are not infinite lie in [least, least + spread]. `solve_alone(p)` writes the result of a
  // problem that leaves the range.
  SharedCosts(const SinkhornBatch<T>& batch, const SinkhornResult& result, const SinkhornOptions& options,
              double least, double spread, ThreadTeam& team, std::function<void(int64_t)> solve_alone)
      : batch_(batch),
        result_(result),
        options_(options),
        least_(least),
        spread_(spread),
        team_(team),
        solve_alone_(std::move(solve_alone)),
        n_(batch.a.shape[1]),
        m_(batch.b.shape[1]),
        kernel_(n_ * m_),
        turned_(n_ * m_),
        priced_(n_ * m_) {
    team_.parallel_for(n_, 16, [&](int, int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        for (int64_t j = 0; j < m_; ++j) {
          const T cost = batch_.x(0, i, j);
          const bool apart = !(cost < kSinkhornForbidden<T>);
          const K k =
              apart ? K(0) : static_cast<K>(std::exp((least_ - static_cast<double>(cost)) / options_.reg));
          kernel_[i * m_ + j] = turned_[j * n_ + i] = k;
          priced_[i * m_ + j] = apart ? K(0) : k * static_cast<K>(cost);
        }
      }
    });
  }

  static int64_t bytes(int64_t n, int64_t m, int64_t count) {
    return (3 * n * m + 5 * (n + m) * round_up(std::min(count, kMostLanes), kPanel)) *
           static_cast<int64_t>(sizeof(K));
  }

  int64_t done() const override { return done_; }
  int64_t iterations() const override {
    int64_t sum = 0;
    for (const Lane& lane : lanes_) sum += lane.schedule.iterations();
    return sum;
  }

  void step() override {
    if (lanes_.empty()) begin();
    team_.check();
    rows_.pass(*this, kernel_.data(), columns_);
    columns_.pass(*this, turned_.data(), rows_);
    settle();
  }

 private:
  struct Lane {
    int64_t problem;
    SinkhornSchedule schedule;
    double mass_a, mass_b;
    SinkhornError columns_off{};
  };

  // Rows or columns of all lanes: arrays [count, width].
  struct Side {
    int64_t count = 0, width = 0;
    bool of_columns = false;
    Buffer<K> weight, scale, weighted;  // weights of sum 1; u or v; both multiplied
    std::vector<double> off, squares;   // [width], of shares of the mass
    std::vector<K> least, most;         // [width] of the sums and scalings seen
    Buffer<K> chunk_off, chunk_squares, chunk_least, chunk_most;

    int64_t chunks() const { return (count + kLines - 1) / kLines; }

    // Half an iteration: the scalings from the products of `matrix` [count, others] with the other side.
    void pass(SharedCosts& all, const K* matrix, const Side& other) {
      all.options_.l2 ? pass<true>(all, matrix, other) : pass<false>(all, matrix, other);
    }
    template <bool kL2>
    void pass(SharedCosts& all, const K* matrix, const Side& other) {
      const bool simple = all.plain_;
      all.team_.parallel_for(chunks(), 1, [&](int, int64_t c, int64_t) {
        Buffer<K> sums(kLines * width);
        const int64_t first = c * kLines, here = std::min(kLines, count - first);
        product(matrix + first * other.count, here, other.count, other.weighted.data(), width, sums.data());
        for (int64_t l = 0; l < width; l += kW) {
          const V omega = simd::load(all.omega_.data() + l), ratio = simd::load(all.ratio_.data() + l);
          const V one = simd::broadcast(K(1)), zero{};
          V off{}, squares{}, low = one, high = one;
          for (int64_t r = 0; r < here; ++r) {
            const int64_t at = (first + r) * width + l;
            const V w = simd::load(weight.data() + at), u = simd::load(scale.data() + at);
            V x = simd::load(sums.data() + r * width + l);
            if (of_columns) x = x * ratio;
            x = w > zero ? x : one / u;  // a line without weight stays as it is
            const V s = u * x;
            V next = one / x, after = zero;
            if (!simple) {
              const V relaxed = simd::exp<K>(simd::log<K>(u) - omega * simd::log<K>(s));
              next = omega == one ? next : relaxed;
              after = omega == one ? zero : simd::abs<K>(x * next - one);
            }
            const V own = w * (of_columns ? after : simd::abs<K>(s - one));
            off += own;
            if constexpr (kL2) squares += own * own;
            low = x < low ? x : low;
            low = next < low ? next : low;
            high = x > high ? x : high;
            high = next > high ? next : high;
            low = next == next ? low : zero;  // NaN is in no range
            simd::store(scale.data() + at, next);
            simd::store(weighted.data() + at, w * next);
          }
          simd::store(chunk_off.data() + c * width + l, off);
          if constexpr (kL2) simd::store(chunk_squares.data() + c * width + l, squares);
          simd::store(chunk_least.data() + c * width + l, low);
          simd::store(chunk_most.data() + c * width + l, high);
        }
      });
      for (int64_t l = 0; l < width; ++l) {
        off[l] = squares[l] = 0;
        least[l] = most[l] = K(1);
        for (int64_t c = 0; c < chunks(); ++c) {
          off[l] += static_cast<double>(chunk_off[c * width + l]);
          if constexpr (kL2) squares[l] += static_cast<double>(chunk_squares[c * width + l]);
          least[l] = std::min(least[l], chunk_least[c * width + l]);
          most[l] = std::max(most[l], chunk_most[c * width + l]);
        }
      }
    }

    void resize(int64_t lines, int64_t lanes) {
      count = lines;
      width = lanes;
      for (Buffer<K>* each : {&weight, &scale, &weighted}) *each = Buffer<K>(count * width);
      for (Buffer<K>* each : {&chunk_off, &chunk_squares, &chunk_least, &chunk_most})
        *each = Buffer<K>(chunks() * width);
      off.assign(width, 0);
      squares.assign(width, 0);
      least.assign(width, K(1));
      most.assign(width, K(1));
    }

    // Only these lanes, in this order; lanes beyond them are the first again.
    void keep(const std::vector<int64_t>& which, int64_t lanes) {
      Side kept;
      kept.of_columns = of_columns;
      kept.resize(count, lanes);
      for (int64_t i = 0; i < count; ++i) {
        for (int64_t l = 0; l < lanes; ++l) {
          const int64_t from = i * width + which[l < static_cast<int64_t>(which.size()) ? l : 0];
          kept.weight[i * lanes + l] = weight[from];
          kept.scale[i * lanes + l] = scale[from];
          kept.weighted[i * lanes + l] = weighted[from];
        }
      }
      *this = std::move(kept);
    }
  };

  // out [rows, width] = k [rows, inner] x [inner, width]
  static void product(const K* k, int64_t rows, int64_t inner, const K* x, int64_t width, K* out) {
    for (int64_t begin = 0; begin < inner; begin += Tile<K>::kChain) {
      const int64_t end = std::min<int64_t>(inner, begin + Tile<K>::kChain);
      int64_t r = 0;
      for (; r + kRows <= rows; r += kRows)
        product_of<kRows>(k + r * inner, inner, begin, end, x, width, out + r * width);
      for (; r < rows; ++r) product_of<1>(k + r * inner, inner, begin, end, x, width, out + r * width);
    }
  }

  template <int kR>
  static void product_of(const K* k, int64_t stride, int64_t begin, int64_t end, const K* x, int64_t width,
                         K* out) {
    for (int64_t l = 0; l < width; l += kPanel) {
      V acc[kR][kVectors] = {};
      for (int64_t t = begin; t < end; ++t) {
        V xt[kVectors];
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) xt[v] = simd::load(x + t * width + l + v * kW);
#pragma GCC unroll 16
        for (int r = 0; r < kR; ++r) {
          const V kr = simd::broadcast(k[r * stride + t]);
#pragma GCC unroll 4
          for (int v = 0; v < kVectors; ++v) acc[r][v] = simd::fma<K>(kr, xt[v], acc[r][v]);
        }
      }
#pragma GCC unroll 16
      for (int r = 0; r < kR; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
          K* const place = out + r * width + l + v * kW;
          simd::store(place, begin == 0 ? acc[r][v] : simd::load(place) + acc[r][v]);
        }
      }
    }
  }

  // Takes the next problems.
  void begin() {
    const int64_t count = std::min(kMostLanes, batch_.count() - next_), width = round_up(count, kPanel);
    rows_.resize(n_, width);
    columns_.resize(m_, width);
    columns_.of_columns = true;
    const auto fill = [&](Side& side, const TensorView<const double, 2>& weights,
                          const TensorView<const double, 2>& start, std::vector<double>& mass) {
      for (int64_t l = 0; l < width; ++l) {
        const int64_t p = next_ + (l < count ? l : 0);
        double sum = 0;
        for (int64_t i = 0; i < side.count; ++i) sum += weights(p, i);
        mass[l] = sum;
        for (int64_t i = 0; i < side.count; ++i) {
          double u = 1;
          if (options_.warm()) {
            u = side.of_columns ? std::exp(start(p, i) / options_.reg)
                                : std::exp((start(p, i) - least_) / options_.reg) * mass_b_[l];
          }
          const int64_t at = i * width + l;
          side.weight[at] = static_cast<K>(weights(p, i) / sum);
          side.scale[at] = static_cast<K>(u);
          side.weighted[at] = side.weight[at] * side.scale[at];
        }
      }
    };
    mass_a_.resize(width);
    mass_b_.resize(width);
    fill(columns_, batch_.b, options_.g, mass_b_);
    fill(rows_, batch_.a, options_.f, mass_a_);
    for (int64_t l = 0; l < count; ++l) {
      lanes_.push_back(
          {next_ + l,
           SinkhornSchedule(options_, options_.warm(), spread_, mass_a_[l], mass_b_[l], kSinkhornReach<K>),
           mass_a_[l], mass_b_[l]});
    }
    next_ += count;
    note_lanes();
  }

  // The lanes' numbers as vectors.
  void note_lanes() {
    omega_ = Buffer<K>(rows_.width, K(1));
    ratio_ = Buffer<K>(rows_.width, K(1));
    plain_ = true;
    for (int64_t l = 0; l < rows_.width; ++l) {
      const Lane& lane = lanes_[l < static_cast<int64_t>(lanes_.size()) ? l : 0];
      omega_[l] = static_cast<K>(lane.schedule.omega());
      ratio_[l] = static_cast<K>(lane.mass_a / lane.mass_b);
      plain_ = plain_ && lane.schedule.omega() == 1;
    }
  }

  // After an iteration: what comes next for each problem.
  void settle() {
    const K least = static_cast<K>(sizeof(K) == 4 ? 1e-30 : 1e-250), most = 1 / least;
    std::vector<int64_t> judged;
    std::vector<char> ends(lanes_.size(), 0), checks(lanes_.size(), 0);
    for (size_t l = 0; l < lanes_.size(); ++l) {
      Lane& lane = lanes_[l];
      if (!(std::min(rows_.least[l], columns_.least[l]) >= least &&
            std::max(rows_.most[l], columns_.most[l]) <= most)) {
        ends[l] = 2;
        continue;
      }
      const SinkhornError rows = options_.error_of(lane.mass_a * rows_.off[l], rows_.squares[l], lane.mass_a);
      const SinkhornOrder order = lane.schedule.after(rows.plus(lane.columns_off));
      lane.columns_off = options_.error_of(lane.mass_b * columns_.off[l], columns_.squares[l], lane.mass_b);
      if (order == SinkhornOrder::kGoOn) continue;
      if (order == SinkhornOrder::kNewEps) {  // K is that of one eps
        ends[l] = 2;
        continue;
      }
      checks[l] = order == SinkhornOrder::kCheck;
      judged.push_back(static_cast<int64_t>(l));
    }
    if (!judged.empty()) {
      const std::vector<double> errors = evaluate(judged);
      for (size_t k = 0; k < judged.size(); ++k) {
        const int64_t l = judged[k];
        SinkhornSchedule& schedule = lanes_[l].schedule;
        if (checks[l] && !(errors[k] <= schedule.tol()) && schedule.disappointed(errors[k])) continue;
        ends[l] = 1;
      }
    }
    std::vector<int64_t> left;
    std::vector<Lane> lanes;
    for (size_t l = 0; l < lanes_.size(); ++l) {
      if (ends[l] == 0) {
        left.push_back(static_cast<int64_t>(l));
        lanes.push_back(lanes_[l]);
        continue;
      }
      if (ends[l] == 2) solve_alone_(lanes_[l].problem);
      ++done_;
    }
    if (left.size() < lanes_.size()) {
      lanes_ = std::move(lanes);
      if (lanes_.empty()) return;
      const auto width = round_up(static_cast<int64_t>(left.size()), kPanel);
      rows_.keep(left, width);
      columns_.keep(left, width);
    }
    note_lanes();
  }

  // Writes the results of some lanes as their scalings are now; returns their plans' errors.
  std::vector<double> evaluate(const std::vector<int64_t>& which) {
    const auto width = round_up(static_cast<int64_t>(which.size()), kPanel);
    Side rows, columns;
    rows.resize(n_, width);
    columns.resize(m_, width);
    const auto copy = [&](Side& to, const Side& from) {
      for (int64_t i = 0; i < to.count; ++i) {
        for (int64_t k = 0; k < width; ++k) {
          const int64_t l = which[k < static_cast<int64_t>(which.size()) ? k : 0];
          to.weighted[i * width + k] = from.weighted[i * from.width + l];
        }
      }
    };
    copy(rows, rows_);
    copy(columns, columns_);
    Buffer<K> row_sums(n_ * width), row_costs(n_ * width), column_sums(m_ * width);
    const auto multiply = [&](const Buffer<K>& matrix, const Side& side, int64_t lines, Buffer<K>& out) {
      team_.parallel_for((lines + kLines - 1) / kLines, 1, [&](int, int64_t c, int64_t) {
        const int64_t first = c * kLines;
        product(matrix.data() + first * side.count, std::min(kLines, lines - first), side.count,
                side.weighted.data(), width, out.data() + first * width);
      });
    };
    multiply(kernel_, columns, n_, row_sums);
    multiply(priced_, columns, n_, row_costs);
    multiply(turned_, rows, m_, column_sums);
    std::vector<double> errors(which.size());
    team_.parallel_for(static_cast<int64_t>(which.size()), 1, [&](int, int64_t k, int64_t) {
      errors[k] = write(lanes_[which[k]], which[k], k, width, row_sums, row_costs, column_sums);
    });
    return errors;
  }

  double write(const Lane& lane, int64_t l, int64_t k, int64_t width, const Buffer<K>& row_sums,
               const Buffer<K>& row_costs, const Buffer<K>& column_sums) {
    const int64_t p = lane.problem;
    const double reg = options_.reg, log_mass_b = std::log(lane.mass_b), ratio = lane.mass_a / lane.mass_b;
    double sum_off = 0, row_squares = 0, column_squares = 0, mass = 0, cost = 0, worth = 0;
    for (int64_t i = 0; i < n_; ++i) {
      const double a = batch_.a(p, i), sum = static_cast<double>(row_sums[i * width + k]);
      const double u = static_cast<double>(rows_.scale[i * rows_.width + l]);
      const bool heavy = rows_.weight[i * rows_.width + l] > 0;
      const double log_scale = heavy ? std::log(u) : -std::log(sum);
      const double f = sinkhorn_allowed<T>(reg * (log_scale - log_mass_b) + least_, a);
      result_.f(p, i) = f;
      if (!(a > 0)) continue;
      const double scale = heavy ? u : 1 / sum;
      const double off = std::abs(a * scale * sum - a);
      sum_off += off;
      row_squares += sinkhorn_square(off, lane.mass_a);
      mass += a * scale * sum;
      cost += a * scale * static_cast<double>(row_costs[i * width + k]);
      worth += a * f;
    }
    for (int64_t j = 0; j < m_; ++j) {
      const double b = batch_.b(p, j), sum = ratio * static_cast<double>(column_sums[j * width + k]);
      const double v = static_cast<double>(columns_.scale[j * columns_.width + l]);
      const bool heavy = columns_.weight[j * columns_.width + l] > 0;
      const double g = sinkhorn_allowed<T>(reg * (heavy ? std::log(v) : -std::log(sum)), b);
      result_.g(p, j) = g;
      if (!(b > 0)) continue;
      const double off = std::abs(b * (heavy ? v * sum : 1) - b);
      sum_off += off;
      column_squares += sinkhorn_square(off, lane.mass_b);
      worth += b * g;
    }
    const double error = options_.error_of(sum_off, row_squares, lane.mass_a)
                             .plus(options_.error_of(0, column_squares, lane.mass_b))
                             .judged;
    result_.value[p] = worth - reg * (mass - lane.mass_a * lane.mass_b);
    result_.transport_cost[p] = cost;
    result_.error[p] = error;
    result_.tol[p] = lane.schedule.tol();
    result_.iterations[p] = lane.schedule.iterations();
    return error;
  }

  const SinkhornBatch<T>& batch_;
  const SinkhornResult& result_;
  const SinkhornOptions& options_;
  const double least_, spread_;  // the least of the costs, and their range
  ThreadTeam& team_;
  const std::function<void(int64_t)> solve_alone_;
  const int64_t n_, m_;
  Buffer<K> kernel_, turned_, priced_;  // K, its transpose, K times C
  Side rows_, columns_;
  std::vector<Lane> lanes_;
  std::vector<double> mass_a_, mass_b_;
  Buffer<K> omega_, ratio_;  // of each lane
  bool plain_ = true;        // whether no lane is over-relaxed
  int64_t next_ = 0, done_ = 0;
};

}  // namespace fc
