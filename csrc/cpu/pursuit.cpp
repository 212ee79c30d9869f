// Few rows of G [B, D] whose weighted sum is close to a target b [D].
//
// Orthogonal matching pursuit, with one step per pick, up to k of them: the row of the largest correlation c
// = G (b - G' w) with the rest of the target joins the picks, and all weights are fitted anew (active_set.h).
// The residual is never formed: c = G b - K w with columns of the Gram matrix K = G G' (Batch OMP:
// Rubinstein, Zibulevsky and Elad, "Efficient implementation of the K-SVD algorithm using batch orthogonal
// matching pursuit", 2008). A column costs a product with all of G, whose time is that of reading G from
// memory; so a dozen rows of the largest correlations get their columns together, in one pass over G and in
// the time of one column, and the next picks are mostly among them.
//
// Cost: 2 * B * D operations per column and itemsize * B * D bytes per pass; there are far fewer passes than
// picks; a step reads the columns of the picks in use, 8 * B * s bytes, and O(s^2) for the weights.
//
// Frank-Wolfe as GIGA (Campbell and Broderick, "Bayesian coreset construction via greedy iterative geodesic
// ascent", 2018, algorithm 1) runs on the same columns; its products with the current direction follow from
// those of the direction before.
//
// Every sum is in double, of exact products if the rows are float: a Gram matrix squares the condition of the
// rows, and 7 digits would leave none for the weights of rows that are alike.
//
// Rejected: the residual as a vector and c = G r (one pass over G per pick; kept for the case that k columns
// exceed the memory budget); the whole Gram matrix (B^2 D operations, ten times as many at B = 10 k).
#include "cpu/pursuit.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

#include "core/simd.h"
#include "cpu/active_set.h"
#include "cpu/pack.h"

namespace fc {
namespace {

using simd::kWidth;
using V = simd::Vec<double>;

constexpr int64_t kChunk = 1024;  // features that are summed in one vector; partial sums are added in order
constexpr int kBatch = 12;        // columns at a time
constexpr int64_t kLines = 2048;  // rows that a thread takes at a time if a row is a few operations
constexpr int64_t kStep = 4 * kWidth<double>;  // arrays over the rows are padded to a multiple of it
constexpr double kNone = -std::numeric_limits<double>::infinity();
// Norms of rows and target between which products, and 1e-12 of the products, are normal numbers.
constexpr double kSmallest = 0x1p-400, kLargest = 0x1p480;

// Rows and vectors of a block of sums in registers.
#if defined(__AVX512F__)
constexpr int kRows = 4, kVectors = 6;
#elif defined(__AVX2__)
constexpr int kRows = 3, kVectors = 4;
#else
constexpr int kRows = 2, kVectors = 4;
#endif

V load_double(const double* p) { return simd::load(p); }

V load_double(const float* p) {
  typedef float Half __attribute__((vector_size(simd::kBytes / 2)));
  Half half;
  std::memcpy(&half, p, sizeof(half));
  return __builtin_convertvector(half, V);
}

// out[v][r] += sum_k rows[r][k] * vectors[v][k] over k in [0, n), for `used` rows.
template <int kV, class X>
void add_products(const X* const* rows, int used, const double* const* vectors, int64_t n,
                  double* const* out) {
  constexpr int64_t W = kWidth<double>;
  V sum[kV][kRows] = {};
  int64_t k = 0;
  for (; k + W <= n; k += W) {
    V x[kRows];
    for (int r = 0; r < kRows; ++r) x[r] = load_double(rows[r] + k);
#pragma GCC unroll 6
    for (int v = 0; v < kV; ++v) {
      const V y = simd::load(vectors[v] + k);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) sum[v][r] = simd::fma<double>(x[r], y, sum[v][r]);
    }
  }
  for (int v = 0; v < kV; ++v) {
    double total[kRows];
    simd::lane_sums<kRows, double>(sum[v], total);
    for (int r = 0; r < used; ++r) {
      for (int64_t rest = k; rest < n; ++rest) {
        total[r] += static_cast<double>(rows[r][rest]) * vectors[v][rest];
      }
      out[v][r] += total[r];
    }
  }
}

// out[v][i] = the product of row `which[i]` (row i if `which` is null) of g with vectors[v], for i in [0, n)
// and `count` vectors of length D. A product has the same bits whatever other products are computed along
// with it.
template <class X, class Y>
void products(const TensorView<const X, 2>& g, const int64_t* which, int64_t n, const Y* const* vectors,
              int count, double* const* out, ThreadTeam& team) {
  const int64_t d = g.cols();
  const int64_t share = n / (4 * team.size());
  const int64_t block = std::clamp<int64_t>(share / kRows, 1, 16) * kRows;
  team.parallel_for(n, block, [&](int, int64_t begin, int64_t end) {
    alignas(64) double copy[kBatch][kChunk];
    for (int v = 0; v < count; ++v) std::fill(out[v] + begin, out[v] + end, 0.0);
    for (int64_t from = 0; from < d; from += kChunk) {
      const int64_t length = std::min(kChunk, d - from);
      for (int v = 0; v < count; ++v) std::copy_n(vectors[v] + from, length, copy[v]);
      for (int64_t i = begin; i < end; i += kRows) {
        const int used = static_cast<int>(std::min<int64_t>(kRows, end - i));
        const X* rows[kRows];
        for (int r = 0; r < kRows; ++r) {
          const int64_t row = i + std::min(r, used - 1);
          rows[r] = g.row(which ? which[row] : row) + from;
        }
        const double* in[kBatch];
        double* to[kBatch];
        for (int v = 0; v < count; ++v) {
          in[v] = copy[v];
          to[v] = out[v] + i;
        }
        int v = 0;
        for (; v + kVectors <= count; v += kVectors) {
          add_products<kVectors>(rows, used, in + v, length, to + v);
        }
        for (; v < count; ++v) add_products<1>(rows, used, in + v, length, to + v);
      }
    }
  });
}

// The facts about the rows that both algorithms start from.
template <class X>
struct Problem {
  const TensorView<const X, 2> g;
  const double* const target;
  ThreadTeam& team;
  double target_norm = 0;
  Buffer<double> norm, correlation;  // [B]: |g_j| and g_j' b

  // unit_rows: whether short rows count as much as long ones.
  Problem(const TensorView<const X, 2>& rows, const double* b, bool unit_rows, ThreadTeam& threads)
      : g(rows), target(b), team(threads), norm(rows.rows()), correlation(round_up(rows.rows(), kStep), 0.0) {
    const int64_t n = g.rows(), d = g.cols();
    for (int64_t k = 0; k < d; ++k) {
      if (!std::isfinite(b[k])) {
        throw std::invalid_argument(std::string("target must be finite, got ") +
                                    (std::isnan(b[k]) ? "NaN"
                                     : b[k] > 0       ? "inf"
                                                      : "-inf") +
                                    " at position " + std::to_string(k));
      }
    }
    target_norm = std::sqrt(dot(b, b, d));
    double* const out[1] = {correlation.data()};
    products<X, double>(g, nullptr, n, &target, 1, out, team);
    team.parallel_for(n, 16, [&](int, int64_t begin, int64_t end) {
      alignas(64) double copy[kChunk];
      for (int64_t i = begin; i < end; ++i) {
        double square = 0;
        for (int64_t from = 0; from < d; from += kChunk) {
          const int64_t length = std::min(kChunk, d - from);
          std::copy_n(g.row(i) + from, length, copy);
          square += dot(copy, copy, length);
        }
        norm[i] = std::sqrt(square);
      }
    });
    bool over = !(target_norm <= kLargest),
         under = target_norm < kSmallest && std::any_of(b, b + d, [](double v) { return v != 0; });
    double longest = 0;
    bool lost = false;  // rows whose products are
    for (int64_t i = 0; i < n; ++i) {
      if (norm[i] <= kLargest && std::isfinite(correlation[i])) {
        longest = std::max(longest, norm[i]);
        if (norm[i] < kSmallest && !lost)
          lost = std::any_of(g.row(i), g.row(i) + d, [](X v) { return v != 0; });
        continue;
      }
      for (int64_t k = 0; k < d; ++k) require_finite(g(i, k), "g", i, k);
      over = true;
    }
    under = under || (lost && (unit_rows || longest < kSmallest));
    if (over) throw std::invalid_argument("g, target: products of their entries overflow; scale them down");
    if (under) throw std::invalid_argument("g, target: products of their entries underflow; scale them up");
  }

  // fn(begin, end) over the rows, on all threads.
  template <class Fn>
  void for_rows(Fn&& fn) {
    team.parallel_for(g.rows(), kLines, [&](int, int64_t begin, int64_t end) { fn(begin, end); });
  }

  // The place of the largest score above kNone, the first of equal ones; -1 if there is none.
  int64_t best(const Buffer<double>& score) const {
    int64_t found = -1;
    double most = kNone;
    for (int64_t i = 0; i < score.size(); ++i) {
      if (score[i] > most) {
        most = score[i];
        found = i;
      }
    }
    return found;
  }
};

// Columns of the Gram matrix, computed as they are asked for and kept while there is room.
template <class X>
class GramColumns {
 public:
  GramColumns(Problem<X>& problem, int64_t memory_budget) : problem_(problem), place_(problem.g.rows(), -1) {
    const int64_t bytes = problem.g.rows() * static_cast<int64_t>(sizeof(double));
    room_ = std::max<int64_t>(memory_budget / bytes, 1);
  }

  int64_t room() const { return room_; }

  // Keeps the column of row j, which has been fetched, for good.
  void keep(int64_t j) { kept_[place_[j]] = 1; }

  // The column [B] of row j. If it has to be computed, the columns of the next largest scores are computed as
  // well. A column that is not kept for good may be gone after the next call.
  const double* get(int64_t j, const Buffer<double>& score) {
    if (place_[j] < 0) compute(choose(j, score));
    return columns_[place_[j]].data();
  }

  const double* kept(int64_t j) const { return columns_[place_[j]].data(); }

 private:
  std::vector<int64_t> choose(int64_t j, const Buffer<double>& score) {
    std::vector<int64_t> rows;
    for (int64_t i = 0; i < score.size(); ++i) {
      if (i != j && score[i] > kNone && place_[i] < 0) rows.push_back(i);
    }
    const int64_t free = room_ - static_cast<int64_t>(std::count(kept_.begin(), kept_.end(), 1));
    const int64_t others =
        std::min<int64_t>({kBatch - 1, std::max<int64_t>(free - 1, 0), static_cast<int64_t>(rows.size())});
    std::partial_sort(rows.begin(), rows.begin() + others, rows.end(), [&](int64_t a, int64_t b) {
      return score[a] > score[b] || (score[a] == score[b] && a < b);
    });
    rows.resize(others);
    rows.insert(rows.begin(), j);
    return rows;
  }

  void compute(const std::vector<int64_t>& rows) {
    const X* vectors[kBatch];
    double* out[kBatch];
    const int count = static_cast<int>(rows.size());
    for (int v = 0; v < count; ++v) {
      const int64_t slot = free_slot();
      place_[rows[v]] = slot;
      owner_[slot] = rows[v];
      vectors[v] = problem_.g.row(rows[v]);
      out[v] = columns_[slot].data();
    }
    products<X, X>(problem_.g, nullptr, problem_.g.rows(), vectors, count, out, problem_.team);
  }

  // A new place for a column while there is room, else the place of the oldest column that is not kept for
  // good.
  int64_t free_slot() {
    const int64_t slots = static_cast<int64_t>(columns_.size());
    if (slots < room_) {
      columns_.emplace_back(round_up(problem_.g.rows(), kStep), 0.0);
      owner_.push_back(-1);
      kept_.push_back(0);
      return slots;
    }
    while (kept_[next_]) next_ = (next_ + 1) % slots;
    const int64_t slot = next_;
    next_ = (next_ + 1) % slots;
    place_[owner_[slot]] = -1;
    return slot;
  }

  Problem<X>& problem_;
  int64_t room_, next_ = 0;
  std::vector<int64_t> place_;  // [B]: the slot of a row's column, or -1
  std::vector<Buffer<double>> columns_;
  std::vector<int64_t> owner_;
  std::vector<char> kept_;
};

template <class X>
class OrthogonalMatchingPursuit {
 public:
  OrthogonalMatchingPursuit(const TensorView<const X, 2>& g, const double* target,
                            const MatchingPursuit& options, ThreadTeam& team)
      : options_(options),
        problem_(g, target, false, team),
        columns_(problem_, options.memory_budget),
        streamed_(columns_.room() < std::min(options.k, g.rows())),
        active_(options.nonnegative, options.ridge, problem_.target_norm),
        taken_(g.rows(), 0),
        score_(g.rows()),
        rest_(round_up(g.rows(), kStep), 0.0) {}

  PursuitResult run() {
    PursuitResult result;
    update_scores();
    while (static_cast<int64_t>(picks_.size()) < options_.k) {
      const int64_t j = problem_.best(score_);
      if (j < 0) break;
      std::vector<double> products = products_with_picks(j);
      taken_[j] = 1;
      score_[j] = kNone;
      if (!active_.add(std::move(products), problem_.correlation[j])) continue;
      if (!streamed_) columns_.keep(j);
      picks_.push_back(j);
      if (streamed_) find_residual();
      result.residual_norms.push_back(residual_norm());
      update_scores();
      problem_.team.check();
    }
    for (size_t p = 0; p < picks_.size(); ++p) {
      if (active_.weights()[p] == 0) continue;
      result.indices.push_back(picks_[p]);
      result.weights.push_back(active_.weights()[p]);
    }
    return result;
  }

 private:
  // Row j's products with the picks and itself.
  std::vector<double> products_with_picks(int64_t j) {
    std::vector<int64_t> rows = picks_;
    rows.push_back(j);
    std::vector<double> found(rows.size());
    if (streamed_) {
      const X* const vector = problem_.g.row(j);
      double* const out[1] = {found.data()};
      products<X, X>(problem_.g, rows.data(), static_cast<int64_t>(rows.size()), &vector, 1, out,
                     problem_.team);
    } else {
      const double* const column = columns_.get(j, score_);
      for (size_t p = 0; p < rows.size(); ++p) found[p] = column[rows[p]];
    }
    return found;
  }

  // score = c, or |c|, of the rows that may be picked.
  void update_scores() {
    if (streamed_ && !picks_.empty()) {
      const double* const vector = residual_.data();
      double* const out[1] = {rest_.data()};
      products<X, double>(problem_.g, nullptr, problem_.g.rows(), &vector, 1, out, problem_.team);
    }
    std::vector<double> weights;
    std::vector<const double*> columns;
    if (!streamed_) {
      for (const int64_t p : active_.used()) {
        weights.push_back(active_.weights()[p]);
        columns.push_back(columns_.kept(picks_[p]));
      }
    }
    const double noise = ActiveSet::kNoise * active_.scale();
    problem_.for_rows([&](int64_t begin, int64_t end) {
      if (!streamed_ || picks_.empty()) {
        subtract(weights, columns, begin, end);
      }
      for (int64_t i = begin; i < end; ++i) {
        const double score = options_.nonnegative ? rest_[i] : std::abs(rest_[i]);
        score_[i] = !taken_[i] && score > noise * problem_.norm[i] ? score : kNone;
      }
    });
  }

  // rest = G b - sum_p weights[p] * columns[p] over rows [begin, end), in whole vectors: a row in a last,
  // partial vector would be rounded in another way than its duplicate.
  void subtract(const std::vector<double>& weights, const std::vector<const double*>& columns, int64_t begin,
                int64_t end) {
    for (int64_t i = begin; i < end; i += kStep) {
      V sum[4];
      for (int v = 0; v < 4; ++v) sum[v] = simd::load(problem_.correlation.data() + i + v * kWidth<double>);
      for (size_t p = 0; p < weights.size(); ++p) {
        const V weight = simd::broadcast(-weights[p]);
        const double* const column = columns[p] + i;
        for (int v = 0; v < 4; ++v) {
          sum[v] = simd::fma<double>(weight, simd::load(column + v * kWidth<double>), sum[v]);
        }
      }
      for (int v = 0; v < 4; ++v) simd::store(rest_.data() + i + v * kWidth<double>, sum[v]);
    }
  }

  // residual = b - sum_i w_i g_i.
  void find_residual() {
    const int64_t d = problem_.g.cols();
    if (residual_.size() == 0) residual_ = Buffer<double>(d);
    problem_.team.parallel_for(d, kChunk, [&](int, int64_t begin, int64_t end) {
      std::copy(problem_.target + begin, problem_.target + end, residual_.data() + begin);
      for (const int64_t p : active_.used()) {
        const double weight = active_.weights()[p];
        const X* const row = problem_.g.row(picks_[p]);
        for (int64_t k = begin; k < end; ++k) residual_[k] -= weight * static_cast<double>(row[k]);
      }
    });
  }

  // By the Gram matrix, which has 16 digits of |b|^2; if few of them are left, by the rows.
  double residual_norm() {
    const double square = active_.squared_residual(), whole = problem_.target_norm * problem_.target_norm;
    if (!streamed_) {
      if (square > 1e-6 * whole) return std::sqrt(square);
      find_residual();
    }
    return std::sqrt(dot(residual_.data(), residual_.data(), residual_.size()));
  }

  const MatchingPursuit options_;
  Problem<X> problem_;
  GramColumns<X> columns_;
  const bool streamed_;  // k columns exceed the memory budget
  ActiveSet active_;
  std::vector<int64_t> picks_;
  std::vector<char> taken_;  // [B]: picked, or found to depend on the picks
  Buffer<double> score_, rest_, residual_;
};

// A step of 2-norm rounding errors of products of unit vectors stays below this.
constexpr double kUnitNoise = 1e-10;

template <class X>
class FrankWolfe {
 public:
  FrankWolfe(const TensorView<const X, 2>& g, const double* target, int64_t k, int64_t memory_budget,
             ThreadTeam& team)
      : k_(k),
        problem_(g, target, true, team),
        columns_(problem_, memory_budget),
        place_(g.rows(), -1),
        score_(g.rows()),
        along_(g.rows(), 0.0),
        direction_(g.cols(), 0.0) {}

  PursuitResult run() {
    PursuitResult result;
    double towards = 0;  // the cosine of direction and target
    for (int64_t step = 0; step < k_; ++step) {
      find_scores(towards);
      const int64_t j = problem_.best(score_);
      if (j < 0) break;
      const double* const column = columns_.get(j, score_);
      const double cosine = problem_.correlation[j] / (problem_.norm[j] * problem_.target_norm);
      double part = 1;  // of the new row
      if (step > 0) {
        const double ahead = cosine - towards * along_[j], behind = towards - cosine * along_[j];
        part = std::clamp(ahead / (ahead + behind), 0.0, 1.0);
      }
      const double left = 1 - part;
      const double length =
          std::sqrt(std::max(left * left + part * part + 2 * left * part * along_[j], 1e-300));
      advance(j, column, left / length, part / length);
      const double unit = std::sqrt(dot(direction_.data(), direction_.data(), direction_.size()));
      towards = dot(direction_.data(), problem_.target, direction_.size()) / (unit * problem_.target_norm);
      result.residual_norms.push_back(residual_norm(unit, towards));
      problem_.team.check();
    }
    for (size_t p = 0; p < picks_.size(); ++p) {
      if (weights_[p] == 0) continue;
      result.indices.push_back(picks_[p]);
      result.weights.push_back(weights_[p] * towards * problem_.target_norm / problem_.norm[picks_[p]]);
    }
    return result;
  }

 private:
  // The cosine between the geodesics from the direction towards the target and towards each row, times the
  // length of the first; at the first step the cosine between target and row.
  void find_scores(double towards) {
    const bool first = picks_.empty();
    problem_.for_rows([&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const double norm = problem_.norm[i] * problem_.target_norm;
        const double square = 1 - along_[i] * along_[i];
        double score = 0;
        if (norm > 0 && square > 1e-8) {
          const double cosine = problem_.correlation[i] / norm;
          score = first ? cosine : (cosine - towards * along_[i]) / std::sqrt(square);
        }
        score_[i] = score > kUnitNoise ? score : kNone;
      }
    });
  }

  // direction = old * direction + added * g_j / |g_j|, and with it its weights and its products with all
  // rows.
  void advance(int64_t j, const double* column, double old, double added) {
    for (double& weight : weights_) weight *= old;
    if (place_[j] < 0) {
      place_[j] = static_cast<int64_t>(picks_.size());
      picks_.push_back(j);
      weights_.push_back(0);
    }
    weights_[place_[j]] += added;
    const double scale = added / problem_.norm[j];
    problem_.for_rows([&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const double norm = problem_.norm[i];
        along_[i] = old * along_[i] + (norm > 0 ? scale * column[i] / norm : 0.0);
      }
    });
    const X* const row = problem_.g.row(j);
    for (int64_t k = 0; k < direction_.size(); ++k) {
      direction_[k] = old * direction_[k] + scale * static_cast<double>(row[k]);
    }
  }

  // |b - (its projection on the direction)|.
  double residual_norm(double unit, double towards) const {
    const double scale = towards * problem_.target_norm / unit;
    double sum = 0;
    for (int64_t k = 0; k < direction_.size(); ++k) {
      const double rest = problem_.target[k] - scale * direction_[k];
      sum += rest * rest;
    }
    return std::sqrt(sum);
  }

  const int64_t k_;
  Problem<X> problem_;
  GramColumns<X> columns_;
  std::vector<int64_t> picks_, place_;
  std::vector<double> weights_;  // of unit rows, whose sum is the direction
  Buffer<double> score_, along_, direction_;
};

}  // namespace

template <class X>
PursuitResult orthogonal_matching_pursuit(TensorView<const X, 2> g, const double* target,
                                          const MatchingPursuit& options, ThreadTeam& team) {
  return OrthogonalMatchingPursuit<X>(g, target, options, team).run();
}

template <class X>
PursuitResult frank_wolfe(TensorView<const X, 2> g, const double* target, int64_t k, int64_t memory_budget,
                          ThreadTeam& team) {
  return FrankWolfe<X>(g, target, k, memory_budget, team).run();
}

#define FC_INSTANTIATE(X)                                                                      \
  template PursuitResult orthogonal_matching_pursuit<X>(TensorView<const X, 2>, const double*, \
                                                        const MatchingPursuit&, ThreadTeam&);  \
  template PursuitResult frank_wolfe<X>(TensorView<const X, 2>, const double*, int64_t, int64_t, ThreadTeam&);
FC_INSTANTIATE(float)
FC_INSTANTIATE(double)
#undef FC_INSTANTIATE

}  // namespace fc
