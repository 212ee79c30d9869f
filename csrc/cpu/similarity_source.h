// Where the similarities of a greedy run come from: points, a dense matrix, or the rows of a sparse one.
//
// A source evaluates gains
//   gain(j) = sum_i trunc(max(0, s(j, i) - best_i) * weight_i)
// as exact 64-bit integers: the weights carry a power of two that fills the 62 bits. So a gain does not
// depend on the order of summation, can be corrected for changed clients alone, and two of them tie exactly
// or not at all.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "core/metric.h"
#include "core/simd.h"
#include "core/tensor_view.h"
#include "core/threads.h"
#include "cpu/facility_location.h"
#include "cpu/live_lists.h"
#include "cpu/pack.h"
#include "cpu/pairwise_panels.h"

namespace fc {

// The clients' best similarities so far and their scaled weights, filled up to a whole panel with clients
// that cannot gain.
template <class T>
struct Cover {
  Buffer<T> best, weight;

  Cover() = default;
  Cover(int64_t m, T floor)
      : best(round_up(m, Tile<T>::kCols), std::numeric_limits<T>::max()),
        weight(round_up(m, Tile<T>::kCols), T(0)) {
    std::fill_n(best.data(), m, floor);
  }
};

template <class T>
class Source {
 public:
  virtual ~Source() = default;
  virtual int64_t candidates() const = 0;
  virtual int64_t clients() const = 0;

  // Checks the values and returns sum_i w_i * (an upper bound of max(0, s(j, i) - floor) over j).
  virtual double prepare(const GreedyOptions& options, ThreadTeam& team) = 0;

  // gains[i] of candidate index[i]. Stores live lists if `lists` is given and has room for them.
  virtual void evaluate(const int64_t* index, int64_t count, const Cover<T>& cover, LiveLists<T>* lists,
                        int64_t* gains, ThreadTeam& team, GreedyStats& stats) = 0;

  // Candidates that evaluate() wants at a time to use the machine well.
  virtual int64_t batch(const ThreadTeam& team) const = 0;

  // Similarities of up to sample_rows() candidates to every client, rows `stride` apart.
  virtual int64_t sample_rows() const = 0;
  virtual void similarities(const int64_t* index, int64_t count, T* out, int64_t stride,
                            ThreadTeam& team) = 0;

  // Similarity of candidate j to client j.
  virtual T self_similarity(int64_t j) = 0;

  // Share of live pairs from which on lists are worth their memory.
  virtual double list_density() const = 0;

  // gains[t][j] = gain of every candidate j under covers[t].
  virtual void sweep(const std::vector<const Cover<T>*>& covers, const std::vector<int64_t*>& gains,
                     ThreadTeam& team, GreedyStats& stats) {
    const std::vector<int64_t> all = everyone();
    for (size_t t = 0; t < covers.size(); ++t)
      evaluate(all.data(), candidates(), *covers[t], nullptr, gains[t], team, stats);
  }

 protected:
  std::vector<int64_t> everyone() const {
    std::vector<int64_t> all(candidates());
    std::iota(all.begin(), all.end(), int64_t{0});
    return all;
  }
};

// Live pairs of a batch of candidates on their way into the lists: at most `limit` per candidate, none for
// candidates with more.
template <class T>
class LiveRows {
 public:
  LiveRows(int64_t rows, int64_t limit)
      : limit_(limit),
        stride_(limit + 2 * Tile<T>::kCols),
        client_(rows * stride_),
        value_(rows * stride_),
        count_(rows, int64_t{0}) {}

  void clear() { std::fill_n(count_.data(), count_.size(), int64_t{0}); }

  void append(int64_t row, uint32_t mask, uint32_t first, simd::Vec<T> s) {
    int64_t& count = count_[row];
    if (mask == 0 || count > limit_) return;
    count =
        simd::append<T>(client_.data() + row * stride_, value_.data() + row * stride_, count, mask, first, s);
  }

  void store(const int64_t* index, int64_t rows, LiveLists<T>& lists) const {
    for (int64_t r = 0; r < rows; ++r) {
      if (count_[r] > limit_) continue;
      lists.store(index[r], client_.data() + r * stride_, value_.data() + r * stride_, count_[r]);
    }
  }

  // The longest list that is stored: four times the length that every candidate could have.
  static int64_t limit(const LiveLists<T>& lists, int64_t n, int64_t m) {
    return std::min(m, std::max<int64_t>(256, 4 * (lists.capacity() / std::max<int64_t>(n, 1))));
  }

 private:
  int64_t limit_, stride_;
  Buffer<uint32_t> client_;
  Buffer<T> value_;
  Buffer<int64_t> count_;
};

// The gains of a block of candidates, growing panel by panel.
template <class T>
class GainSums {
 public:
  explicit GainSums(int64_t rows) : sums_(rows), totals_(rows) { clear(); }

  static std::vector<GainSums> per_thread(int threads, int64_t rows) {
    std::vector<GainSums> all;
    for (int t = 0; t < threads; ++t) all.emplace_back(rows);
    return all;
  }

  void clear() {
    std::fill_n(sums_.data(), sums_.size(), simd::Sum<T>{});
    std::fill_n(totals_.data(), totals_.size(), int64_t{0});
    panels_ = 0;
  }

  simd::Sum<T>* row(int64_t r) { return sums_.data() + r; }

  // To be called after every panel of clients that was added to the rows.
  void panel_done() {
    if (++panels_ >= simd::Sum<T>::kMostAdds / Tile<T>::kVectors) fold();
  }

  int64_t total(int64_t r) const { return totals_[r] + sums_[r].total(); }

 private:
  void fold() {
    for (int64_t r = 0; r < sums_.size(); ++r) totals_[r] += std::exchange(sums_[r], simd::Sum<T>{}).total();
    panels_ = 0;
  }

  Buffer<simd::Sum<T>> sums_;
  Buffer<int64_t> totals_;
  int64_t panels_ = 0;
};

// ---- points

template <class T>
class PointSource final : public Source<T> {
  static constexpr int kRows = Tile<T>::kRows, kCols = Tile<T>::kCols, kVectors = Tile<T>::kVectors,
                       kWidth = simd::kWidth<T>;

 public:
  PointSource(TensorView<const T, 2> x, const TensorView<const T, 2>* clients, Metric metric, double offset)
      : x_(x),
        clients_view_(clients ? *clients : x),
        self_(clients == nullptr),
        metric_(metric),
        offset_(offset) {}

  int64_t candidates() const override { return x_.shape[0]; }
  int64_t clients() const override { return clients_view_.shape[0]; }
  int64_t batch(const ThreadTeam& team) const override { return 4 * kRows * team.size(); }
  int64_t sample_rows() const override { return kRows; }
  double list_density() const override {
    return std::clamp(static_cast<double>(x_.shape[1]) / 512.0, 0.02, 0.25);
  }

  double prepare(const GreedyOptions& options, ThreadTeam& team) override {
    const bool normalise = metric_ == Metric::kCosine;
    columns_ = Panels<T>::pack(clients_view_, normalise, self_ ? "x" : "clients", team);
    everyone_ = this->everyone();
    if (self_) {
      rows_.panels = &columns_;
    } else {
      rows_.view = x_;
      if (normalise) scales_ = Buffer<RowScale>(candidates());
      team.parallel_for(candidates(), 64, [&](int, int64_t begin, int64_t end) {
        for (int64_t j = begin; j < end; ++j) {
          Panels<T>::check_row(x_, j, "x");
          if (normalise) scales_[j] = RowScale::of(x_, j);
        }
      });
      if (normalise) rows_.scale = scales_.data();
    }
    double largest = 0, sum = 0;
    if (metric_ == Metric::kDot) {
      for (int64_t j = 0; j < candidates(); ++j) largest = std::max(largest, norm(x_, j));
    }
    for (int64_t i = 0; i < clients(); ++i) {
      const double w = options.weight(i);
      if (metric_ == Metric::kDot) {
        const double bound = norm(clients_view_, i) * largest * 1.001;
        if (!(bound < std::numeric_limits<T>::max() / 4)) {
          throw std::invalid_argument("x: products of features overflow " +
                                      std::string(sizeof(T) == 4 ? "float32" : "float64") +
                                      " (the largest norms are " + std::to_string(largest) + " and " +
                                      std::to_string(norm(clients_view_, i)) + "); scale the features down");
        }
        sum += w * bound;
      } else {
        sum += w * (metric_ == Metric::kCosine ? 1.001 : offset_);
      }
    }
    return sum;
  }

  // The whole matrix of similarities, [n, m].
  Buffer<T> matrix(ThreadTeam& team, GreedyStats& stats) {
    Buffer<T> out(checked_mul(candidates(), clients()));
    pairwise_panels<T>(rows_, candidates(), columns_, metric_, is_distance(metric_), self_, out.data(),
                       clients(), team);
    stats.pairs += candidates() * clients() / (self_ ? 2 : 1);
    return out;
  }

  void evaluate(const int64_t* index, int64_t count, const Cover<T>& cover, LiveLists<T>* lists,
                int64_t* gains, ThreadTeam& team, GreedyStats& stats) override {
    const int64_t share = round_up((count + team.size() - 1) / team.size(), kRows);
    const int64_t block = std::min(lists ? std::min<int64_t>(48, block_rows<T>(columns_.features()))
                                         : block_rows<T>(columns_.features()),
                                   share);
    with_form(metric_, [&](auto form) {
      if (lists || count >= block * team.size()) {
        by_candidates<form()>(index, count, block, {&cover}, lists, {gains}, team);
      } else {
        by_clients<form()>(index, count, cover, gains, team);
      }
    });
    stats.pairs += count * clients();
  }

  // When the clients are the candidates, s(j, i) = s(i, j) serves two gains: half of the products.
  void sweep(const std::vector<const Cover<T>*>& covers, const std::vector<int64_t*>& gains, ThreadTeam& team,
             GreedyStats& stats) override {
    with_form(metric_, [&](auto form) {
      if (self_) {
        symmetric_sweep<form()>(covers, gains, team);
      } else {
        by_candidates<form()>(everyone_.data(), candidates(), block_rows<T>(columns_.features()), covers,
                              nullptr, gains, team);
      }
    });
    stats.pairs += self_ ? candidates() * (candidates() + 1) / 2 : candidates() * clients();
  }

  // The cost of a sweep, in evaluations of one candidate.
  double sweep_cost(int64_t covers) const {
    const double reduction =
        static_cast<double>(covers) * kReductionCost / static_cast<double>(columns_.features());
    return static_cast<double>(candidates()) * ((self_ ? 0.5 : 1.0) + reduction);
  }

  // gains[i] += the change of candidate index[i]'s gain as the clients changed[] went from `before` to
  // `cover`.
  void correct(const int64_t* index, int64_t count, const std::vector<int64_t>& changed,
               const Cover<T>& cover, const Buffer<T>& before, int64_t* gains, ThreadTeam& team,
               GreedyStats& stats) {
    constexpr int64_t kChunk = 8192;
    for (int64_t begin = 0; begin < static_cast<int64_t>(changed.size()); begin += kChunk) {
      const int64_t chunk = std::min<int64_t>(kChunk, static_cast<int64_t>(changed.size()) - begin);
      with_form(metric_, [&](auto form) {
        correct_chunk<form()>(index, count, changed.data() + begin, chunk, cover, before, gains, team);
      });
    }
    stats.pairs += count * static_cast<int64_t>(changed.size());
  }

  // For every candidate, from the clients in `sample` alone: gains[t][j] with every client's best at
  // levels[t], and which of the first `anchors` of them (a multiple of kCols) it is most similar to.
  void survey(const std::vector<int64_t>& sample, int64_t anchors, const std::vector<T>& levels,
              const Cover<T>& cover, std::vector<Buffer<int64_t>>& gains, int32_t* nearest, ThreadTeam& team,
              GreedyStats& stats) {
    const int64_t d = columns_.features(), count = static_cast<int64_t>(sample.size()),
                  block = block_rows<T>(d);
    const Panels<T> columns = Panels<T>::select(columns_, sample.data(), count);
    std::vector<Cover<T>> flat;
    for (const T level : levels) {
      flat.emplace_back(count, level);
      for (int64_t i = 0; i < count; ++i) flat.back().weight[i] = cover.weight[sample[i]];
    }
    const auto n_levels = static_cast<int64_t>(levels.size());
    auto packed = per_thread<T>(team.size(), block * d);
    auto sums = GainSums<T>::per_thread(team.size(), n_levels * block);
    auto nearest_value = per_thread<T>(team.size(), block);
    with_form(metric_, [&](auto form) {
      team.parallel_for((candidates() + block - 1) / block, 1, [&](int thread, int64_t which, int64_t) {
        const int64_t begin = which * block, rows = std::min(block, candidates() - begin);
        T* a = packed[thread].data();
        GainSums<T>& sum = sums[thread];
        T* most = nearest_value[thread].data();
        sum.clear();
        std::fill_n(most, block, std::numeric_limits<T>::lowest());
        std::fill_n(nearest + begin, rows, 0);
        rows_.pack_batch(everyone_.data() + begin, rows, a);
        alignas(64) T s[kRows * kCols];
        for (int64_t p = 0; p < columns.count(); ++p) {
          for (int64_t q = 0; q * kRows < rows; ++q) {
            values<form()>(a + q * kRows * d, columns.panel(p), s);
            for (int64_t t = 0; t < n_levels; ++t)
              add_rows(s, flat[t], p, sum.row(t * block + q * kRows), nullptr, 0);
            if (p * kCols >= anchors) continue;
            for (int64_t r = q * kRows; r < std::min<int64_t>(rows, (q + 1) * kRows); ++r) {
              for (int c = 0; c < kCols; ++c) {
                const T value = s[(r - q * kRows) * kCols + c];
                if (value <= most[r]) continue;
                most[r] = value;
                nearest[begin + r] = static_cast<int32_t>(p * kCols + c);
              }
            }
          }
          sum.panel_done();
        }
        for (int64_t t = 0; t < n_levels; ++t) {
          for (int64_t r = 0; r < rows; ++r) gains[t][begin + r] = sum.total(t * block + r);
        }
      });
    });
    stats.pairs += candidates() * count;
  }

  void similarities(const int64_t* index, int64_t count, T* out, int64_t stride, ThreadTeam& team) override {
    Buffer<T> a(kRows * columns_.features());
    rows_.pack_batch(index, count, a.data());
    with_form(metric_, [&](auto form) {
      team.parallel_for(columns_.count(), 64, [&](int, int64_t begin, int64_t end) {
        alignas(64) T s[kRows * kCols];
        for (int64_t p = begin; p < end; ++p) {
          values<form()>(a.data(), columns_.panel(p), s, count);
          const int64_t width = std::min<int64_t>(kCols, clients() - p * kCols);
          for (int64_t r = 0; r < count; ++r)
            std::copy(s + r * kCols, s + r * kCols + width, out + r * stride + p * kCols);
        }
      });
    });
  }

  T self_similarity(int64_t j) override {
    Buffer<T> a(kRows * columns_.features());
    rows_.pack_batch(&j, 1, a.data());
    alignas(64) T s[kRows * kCols];
    with_form(metric_, [&](auto form) { values<form()>(a.data(), columns_.panel(j / kCols), s, 1); });
    return s[j % kCols];
  }

 private:
  static double norm(const TensorView<const T, 2>& x, int64_t row) {
    const RowScale scale = RowScale::of(x, row);
    return scale.scale == 0 ? 0 : scale.norm / scale.scale;
  }

  // s [rows, kCols] of one tile, distances negated.
  template <Form form>
  void values(const T* a, const T* b, T* s, int64_t rows = kRows) const {
    tile_rows<T, form>(rows, a, b, columns_.features(), s);
    if constexpr (form != Form::kProduct) finish_values(metric_, true, s, rows * kCols);
  }

  // Adds a tile's terms to its candidates' sums, and its live pairs to their lists.
  static void add_rows(const T* s, const Cover<T>& cover, int64_t panel, simd::Sum<T>* sums,
                       LiveRows<T>* live, int64_t row) {
    const T* best = cover.best.data() + panel * kCols;
    const T* weight = cover.weight.data() + panel * kCols;
    for (int r = 0; r < kRows; ++r) {
      simd::Sum<T> sum = sums[r];
      for (int v = 0; v < kVectors; ++v) {
        const auto value = simd::load(s + r * kCols + v * kWidth), b = simd::load(best + v * kWidth);
        sum.add(simd::positive_part<T>(value - b) * simd::load(weight + v * kWidth));
        if (live)
          live->append(row + r, simd::greater_mask<T>(value, b),
                       static_cast<uint32_t>(panel * kCols + v * kWidth), value);
      }
      sums[r] = sum;
    }
  }

  // Each thread takes blocks of candidates through all clients. Lists go with a single cover.
  template <Form form>
  void by_candidates(const int64_t* index, int64_t count, int64_t block,
                     const std::vector<const Cover<T>*>& covers, LiveLists<T>* lists,
                     const std::vector<int64_t*>& gains, ThreadTeam& team) {
    const int64_t d = columns_.features(),
                  limit = lists ? LiveRows<T>::limit(*lists, candidates(), clients()) : 0;
    const auto n_covers = static_cast<int64_t>(covers.size());
    auto packed = per_thread<T>(team.size(), block * d);
    auto sums = GainSums<T>::per_thread(team.size(), n_covers * block);
    std::vector<std::unique_ptr<LiveRows<T>>> live(team.size());
    if (lists) {
      for (auto& rows : live) rows = std::make_unique<LiveRows<T>>(block, limit);
    }
    team.parallel_for((count + block - 1) / block, 1, [&](int thread, int64_t which, int64_t) {
      const int64_t begin = which * block, rows = std::min(block, count - begin);
      T* a = packed[thread].data();
      GainSums<T>& sum = sums[thread];
      sum.clear();
      if (lists) live[thread]->clear();
      rows_.pack_batch(index + begin, rows, a);
      alignas(64) T s[kRows * kCols];
      for (int64_t p = 0; p < columns_.count(); ++p) {
        for (int64_t q = 0; q * kRows < rows; ++q) {
          values<form>(a + q * kRows * d, columns_.panel(p), s);
          for (int64_t t = 0; t < n_covers; ++t) {
            add_rows(s, *covers[t], p, sum.row(t * block + q * kRows), live[thread].get(), q * kRows);
          }
        }
        sum.panel_done();
      }
      for (int64_t t = 0; t < n_covers; ++t) {
        for (int64_t r = 0; r < rows; ++r) gains[t][begin + r] = sum.total(t * block + r);
      }
      if (lists) live[thread]->store(index + begin, rows, *lists);
    });
  }

  // A small batch: the threads share it and split the clients.
  template <Form form>
  void by_clients(const int64_t* index, int64_t count, const Cover<T>& cover, int64_t* gains,
                  ThreadTeam& team) {
    const int64_t d = columns_.features(), rows = round_up(count, kRows);
    Buffer<T> a(rows * d);
    rows_.pack_batch(index, count, a.data());
    auto sums = GainSums<T>::per_thread(team.size(), rows);
    team.parallel_for(columns_.count(), 16, [&](int thread, int64_t begin, int64_t end) {
      alignas(64) T s[kRows * kCols];
      for (int64_t p = begin; p < end; ++p) {
        for (int64_t q = 0; q * kRows < count; ++q) {
          values<form>(a.data() + q * kRows * d, columns_.panel(p), s);
          add_rows(s, cover, p, sums[thread].row(q * kRows), nullptr, 0);
        }
        sums[thread].panel_done();
      }
    });
    for (int64_t i = 0; i < count; ++i) {
      gains[i] = 0;
      for (const auto& sum : sums) gains[i] += sum.total(i);
    }
  }

  template <Form form>
  void symmetric_sweep(const std::vector<const Cover<T>*>& covers, const std::vector<int64_t*>& gains,
                       ThreadTeam& team) {
    const int64_t d = columns_.features(), n = candidates(), padded = columns_.count() * kCols;
    const auto n_covers = static_cast<int64_t>(covers.size());
    const int64_t block =
        n > 8 * 192 * team.size() ? block_rows<T>(d) : std::min<int64_t>(block_rows<T>(d), 96);
    auto packed = per_thread<T>(team.size(), block * d);
    auto sums = GainSums<T>::per_thread(team.size(), n_covers * block);
    auto columns = per_thread<simd::LaneSums<T>>(team.size(), n_covers * kVectors);
    std::vector<Buffer<int64_t>> partial;
    for (int t = 0; t < team.size(); ++t) partial.emplace_back(n_covers * padded, int64_t{0});
    team.parallel_for((n + block - 1) / block, 1, [&](int thread, int64_t which, int64_t) {
      const int64_t begin = which * block, count = std::min(block, n - begin);
      T* a = packed[thread].data();
      GainSums<T>& sum = sums[thread];
      simd::LaneSums<T>* column = columns[thread].data();
      int64_t* mine = partial[thread].data();
      sum.clear();
      rows_.pack_batch(everyone_.data() + begin, count, a);
      alignas(64) T s[kRows * kCols];
      for (int64_t p = begin / kCols; p < columns_.count(); ++p) {
        const bool mirror = p * kCols >= begin + block;
        std::fill_n(column, n_covers * kVectors, simd::LaneSums<T>{});
        for (int64_t q = 0; q * kRows < count; ++q) {
          values<form>(a + q * kRows * d, columns_.panel(p), s);
          for (int64_t t = 0; t < n_covers; ++t) {
            add_rows(s, *covers[t], p, sum.row(t * block + q * kRows), nullptr, 0);
            if (mirror)
              add_columns(s, *covers[t], begin + q * kRows, std::min<int64_t>(kRows, count - q * kRows),
                          column + t * kVectors);
          }
        }
        sum.panel_done();
        if (!mirror) continue;
        for (int64_t t = 0; t < n_covers; ++t) {
          for (int c = 0; c < kCols; ++c)
            mine[t * padded + p * kCols + c] += column[t * kVectors + c / kWidth].lane(c % kWidth);
        }
      }
      for (int64_t t = 0; t < n_covers; ++t) {
        for (int64_t r = 0; r < count; ++r) mine[t * padded + begin + r] += sum.total(t * block + r);
      }
    });
    for (int64_t t = 0; t < n_covers; ++t) {
      for (int64_t j = 0; j < n; ++j) {
        gains[t][j] = 0;
        for (const auto& part : partial) gains[t][j] += part[t * padded + j];
      }
    }
  }

  // The tile seen from the other side: its columns are candidates, its rows the clients first, first + 1, ...
  static void add_columns(const T* s, const Cover<T>& cover, int64_t first, int64_t rows,
                          simd::LaneSums<T>* sums) {
    static_assert(kMostRows <= simd::LaneSums<T>::kMostAdds, "a block of rows is summed without a break");
    simd::LaneSums<T> sum[kVectors];
    for (int v = 0; v < kVectors; ++v) sum[v] = sums[v];
    for (int64_t r = 0; r < rows; ++r) {
      const auto best = simd::broadcast(cover.best[first + r]),
                 weight = simd::broadcast(cover.weight[first + r]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v)
        sum[v].add(simd::positive_part<T>(simd::load(s + r * kCols + v * kWidth) - best) * weight);
    }
    for (int v = 0; v < kVectors; ++v) sums[v] = sum[v];
  }

  template <Form form>
  void correct_chunk(const int64_t* index, int64_t count, const int64_t* changed, int64_t chunk,
                     const Cover<T>& cover, const Buffer<T>& before, int64_t* gains, ThreadTeam& team) {
    const int64_t d = columns_.features(), block = block_rows<T>(d);
    const Panels<T> columns = Panels<T>::select(columns_, changed, chunk);
    Cover<T> was(chunk, T(0)), is(chunk, T(0));
    for (int64_t i = 0; i < chunk; ++i) {
      was.best[i] = before[changed[i]];
      is.best[i] = cover.best[changed[i]];
      was.weight[i] = is.weight[i] = cover.weight[changed[i]];
    }
    auto packed = per_thread<T>(team.size(), block * d);
    auto sums = GainSums<T>::per_thread(team.size(), 2 * block);
    team.parallel_for((count + block - 1) / block, 1, [&](int thread, int64_t which, int64_t) {
      const int64_t begin = which * block, rows = std::min(block, count - begin);
      T* a = packed[thread].data();
      GainSums<T>& sum = sums[thread];
      sum.clear();
      rows_.pack_batch(index + begin, rows, a);
      alignas(64) T s[kRows * kCols];
      for (int64_t p = 0; p < columns.count(); ++p) {
        for (int64_t q = 0; q * kRows < rows; ++q) {
          values<form>(a + q * kRows * d, columns.panel(p), s);
          add_rows(s, was, p, sum.row(q * kRows), nullptr, 0);
          add_rows(s, is, p, sum.row(block + q * kRows), nullptr, 0);
        }
        sum.panel_done();
      }
      for (int64_t r = 0; r < rows; ++r) gains[begin + r] += sum.total(block + r) - sum.total(r);
    });
  }

  TensorView<const T, 2> x_, clients_view_;
  bool self_;
  Metric metric_;
  double offset_;
  // Turning a similarity into a term of a gain costs about as much as this many features of it.
  static constexpr double kReductionCost = 8;

  Panels<T> columns_;
  Rows<T> rows_;
  std::vector<int64_t> everyone_;
  Buffer<RowScale> scales_;
};

// ---- matrix

template <class T>
class MatrixSource final : public Source<T> {
  static constexpr int kWidth = simd::kWidth<T>;

 public:
  // s [n, m] with unit column stride, and the value that takes the place of 0 below its entries.
  MatrixSource(TensorView<const T, 2> s, T floor) : s_(s), floor_(floor) {}
  // A matrix of this object's own, whose values are known to be finite.
  MatrixSource(Buffer<T> own, int64_t n, int64_t m) : own_(std::move(own)), s_{own_.data(), {n, m}, {m, 1}} {}

  int64_t candidates() const override { return s_.shape[0]; }
  int64_t clients() const override { return s_.shape[1]; }
  int64_t batch(const ThreadTeam&) const override { return 1; }
  int64_t sample_rows() const override { return 16; }
  double list_density() const override { return 0.2; }
  T self_similarity(int64_t j) override { return s_(j, j); }

  double prepare(const GreedyOptions& options, ThreadTeam& team) override {
    std::vector<T> largest(team.size(), T(0));
    team.parallel_for(candidates(), rows_at_once(), [&](int thread, int64_t begin, int64_t end) {
      for (int64_t j = begin; j < end; ++j) {
        Panels<T>::check_row(s_, j, "x");
        const T* s = s_.row(j);
        simd::Vec<T> most{};
        int64_t i = 0;
        for (; i + kWidth <= clients(); i += kWidth) {
          const auto v = simd::load(s + i);
          most = v > most ? v : most;
        }
        for (int lane = 0; lane < kWidth; ++lane) largest[thread] = std::max(largest[thread], most[lane]);
        for (; i < clients(); ++i) largest[thread] = std::max(largest[thread], s[i]);
      }
    });
    return options.total_weight(clients()) *
           (static_cast<double>(*std::max_element(largest.begin(), largest.end())) -
            static_cast<double>(floor_));
  }

  void evaluate(const int64_t* index, int64_t count, const Cover<T>& cover, LiveLists<T>* lists,
                int64_t* gains, ThreadTeam& team, GreedyStats& stats) override {
    const int64_t m = clients(), limit = lists ? LiveRows<T>::limit(*lists, candidates(), m) : 0;
    std::vector<std::unique_ptr<LiveRows<T>>> live(team.size());
    // A row is a few hundred nanoseconds: only larger batches are worth waking the other threads.
    team.parallel_for(count, std::max<int64_t>(1, rows_at_once()),
                      [&](int thread, int64_t begin, int64_t end) {
                        if (lists && !live[thread]) live[thread] = std::make_unique<LiveRows<T>>(1, limit);
                        for (int64_t i = begin; i < end; ++i) {
                          if (lists) live[thread]->clear();
                          gains[i] = row_gain(index[i], cover, live[thread].get());
                          if (lists) live[thread]->store(index + i, 1, *lists);
                        }
                      });
    stats.matrix_reads += count * m;
  }

  void similarities(const int64_t* index, int64_t count, T* out, int64_t stride, ThreadTeam&) override {
    for (int64_t r = 0; r < count; ++r) {
      const T* const row = s_.row(index[r]);
      std::copy(row, row + clients(), out + r * stride);
    }
  }

 private:
  int64_t rows_at_once() const {
    return std::max<int64_t>(1, (int64_t{1} << 16) / std::max<int64_t>(clients(), 1));
  }

  int64_t row_gain(int64_t j, const Cover<T>& cover, LiveRows<T>* live) const {
    const T* s = s_.data + j * s_.stride[0];
    const T *best = cover.best.data(), *weight = cover.weight.data();
    const int64_t m = clients();
    constexpr int64_t kStrip = std::min<int64_t>(simd::Sum<T>::kMostAdds, 512) * 2 * kWidth;
    int64_t gain = 0, i = 0;
    while (i + 2 * kWidth <= m) {
      simd::Sum<T> sum[2] = {};
      for (const int64_t end = std::min(m, i + kStrip); i + 2 * kWidth <= end; i += 2 * kWidth) {
        for (int h = 0; h < 2; ++h) {
          const int64_t at = i + h * kWidth;
          const auto value = simd::load(s + at), b = simd::load(best + at);
          sum[h].add(simd::positive_part<T>(value - b) * simd::load(weight + at));
          if (live) live->append(0, simd::greater_mask<T>(value, b), static_cast<uint32_t>(at), value);
        }
      }
      gain += sum[0].total() + sum[1].total();
    }
    for (; i < m; ++i) {
      if (!(s[i] > best[i])) continue;
      gain += static_cast<int64_t>((s[i] - best[i]) * weight[i]);
      if (live) live->append(0, 1, static_cast<uint32_t>(i), simd::broadcast(s[i]));
    }
    return gain;
  }

  Buffer<T> own_;
  TensorView<const T, 2> s_;
  const T floor_ = 0;
};

// ---- sparse rows

template <class T>
class SparseSource final : public Source<T> {
 public:
  explicit SparseSource(SparseRows<T> s) : s_(s) {}

  int64_t candidates() const override { return s_.n; }
  int64_t clients() const override { return s_.m; }
  int64_t batch(const ThreadTeam&) const override { return 1; }
  int64_t sample_rows() const override { return 1; }
  double list_density() const override { return 1.0; }

  T self_similarity(int64_t j) override {
    for (int64_t e = s_.indptr[j]; e < s_.indptr[j + 1]; ++e) {
      if (s_.indices[e] == j) return s_.values[e];
    }
    return T(0);
  }

  double prepare(const GreedyOptions& options, ThreadTeam&) override {
    if (s_.indptr[0] != 0)
      throw std::invalid_argument("x: the first row pointer must be 0, got " + std::to_string(s_.indptr[0]));
    for (int64_t j = 0; j < s_.n; ++j) {
      if (s_.indptr[j + 1] < s_.indptr[j])
        throw std::invalid_argument("x: row pointers must not decrease, got a decrease at row " +
                                    std::to_string(j));
    }
    // Only now is it known that all rows lie within the stored entries.
    T largest = 0;
    for (int64_t j = 0; j < s_.n; ++j) {
      int64_t before = -1;
      for (int64_t e = s_.indptr[j]; e < s_.indptr[j + 1]; ++e) {
        if (s_.indices[e] < 0 || s_.indices[e] >= s_.m) {
          throw std::invalid_argument("x: column indices must be in [0, " + std::to_string(s_.m) + "), got " +
                                      std::to_string(s_.indices[e]) + " in row " + std::to_string(j));
        }
        // A column that comes twice would count twice, and sums leave the range that was made for them.
        if (s_.indices[e] <= before) {
          throw std::invalid_argument("x: column indices must rise within a row, got " +
                                      std::to_string(s_.indices[e]) + " after " + std::to_string(before) +
                                      " in row " + std::to_string(j));
        }
        before = s_.indices[e];
        require_finite(s_.values[e], "x", j, s_.indices[e]);
        largest = std::max(largest, s_.values[e]);
      }
    }
    return options.total_weight(s_.m) * static_cast<double>(largest);
  }

  void evaluate(const int64_t* index, int64_t count, const Cover<T>& cover, LiveLists<T>* lists,
                int64_t* gains, ThreadTeam& team, GreedyStats& stats) override {
    const int64_t limit = lists ? LiveRows<T>::limit(*lists, s_.n, s_.m) : 0;
    std::vector<std::unique_ptr<LiveRows<T>>> live(team.size());
    std::vector<int64_t> reads(team.size(), 0);
    team.parallel_for(count, 64, [&](int thread, int64_t begin, int64_t end) {
      if (lists && !live[thread]) live[thread] = std::make_unique<LiveRows<T>>(1, limit);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t j = index[i];
        if (lists) live[thread]->clear();
        int64_t gain = 0;
        for (int64_t e = s_.indptr[j]; e < s_.indptr[j + 1]; ++e) {
          const int64_t c = s_.indices[e];
          if (!(s_.values[e] > cover.best[c])) continue;
          gain += static_cast<int64_t>((s_.values[e] - cover.best[c]) * cover.weight[c]);
          if (lists) live[thread]->append(0, 1, static_cast<uint32_t>(c), simd::broadcast(s_.values[e]));
        }
        reads[thread] += s_.indptr[j + 1] - s_.indptr[j];
        gains[i] = gain;
        if (lists) live[thread]->store(index + i, 1, *lists);
      }
    });
    stats.matrix_reads += std::accumulate(reads.begin(), reads.end(), int64_t{0});
  }

  void similarities(const int64_t* index, int64_t count, T* out, int64_t stride, ThreadTeam&) override {
    for (int64_t r = 0; r < count; ++r) {
      T* row = out + r * stride;
      std::fill_n(row, s_.m, T(0));
      for (int64_t e = s_.indptr[index[r]]; e < s_.indptr[index[r] + 1]; ++e)
        row[s_.indices[e]] = s_.values[e];
    }
  }

 private:
  SparseRows<T> s_;
};

}  // namespace fc
