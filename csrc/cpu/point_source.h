// Similarities that are computed from points, a tile at a time.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/metric.h"
#include "core/simd.h"
#include "core/tensor_view.h"
#include "core/threads.h"
#include "cpu/gain_sums.h"
#include "cpu/pack.h"
#include "cpu/pairwise_panels.h"
#include "cpu/similarity_source.h"

namespace fc {

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
    stats.ahead = candidates() * clients() / (self_ ? 2 : 1);
    pairwise_panels<T>(rows_, candidates(), columns_, metric_, is_distance(metric_), self_, out.data(),
                       clients(), team);
    stats.count_region();
    return out;
  }

  void evaluate(const int64_t* index, int64_t count, const Cover<T>& cover, LiveLists<T>* lists,
                int64_t* gains, ThreadTeam& team, GreedyStats& stats) override {
    stats.ahead = count * clients();
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
    stats.count_region();
  }

  // When the clients are the candidates, s(j, i) = s(i, j) serves two gains: half of the products.
  void sweep(const std::vector<const Cover<T>*>& covers, const std::vector<int64_t*>& gains, ThreadTeam& team,
             GreedyStats& stats) override {
    stats.ahead = all_pairs();
    with_form(metric_, [&](auto form) {
      if (self_) {
        symmetric_sweep<form()>(covers, gains, team);
      } else {
        by_candidates<form()>(everyone_.data(), candidates(), block_rows<T>(columns_.features()), covers,
                              nullptr, gains, team);
      }
    });
    stats.count_region();
  }

  // The pairs of a sweep, a pair and its mirror image counted once.
  int64_t all_pairs() const {
    return self_ ? candidates() * (candidates() + 1) / 2 : candidates() * clients();
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
    stats.ahead = candidates() * count;
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
    stats.count_region();
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

}  // namespace fc
