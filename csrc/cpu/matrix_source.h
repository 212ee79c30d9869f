// Similarities that are stored: a dense matrix, or the rows of a sparse one.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "core/simd.h"
#include "core/tensor_view.h"
#include "core/threads.h"
#include "cpu/gain_sums.h"
#include "cpu/pack.h"
#include "cpu/similarity_source.h"

namespace fc {

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
                          gains[i] = row_gain(s_.row(index[i]), clients(), 0, cover.best.data(),
                                              cover.weight.data(), 0, live[thread].get());
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

  Buffer<T> own_;
  TensorView<const T, 2> s_;
  const T floor_ = 0;
};

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
