// Gains while they are summed, and the live pairs that are found on the way.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "core/simd.h"
#include "core/tensor_view.h"
#include "cpu/live_lists.h"
#include "cpu/tile.h"

namespace fc {

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

  int64_t limit() const { return limit_; }
  // The pairs of a row; all of them if these are at most limit().
  int64_t count(int64_t row) const { return count_[row]; }
  const uint32_t* clients(int64_t row) const { return client_.data() + row * stride_; }
  const T* values(int64_t row) const { return value_.data() + row * stride_; }

  void store(const int64_t* index, int64_t rows, LiveLists<T>& lists) const {
    for (int64_t r = 0; r < rows; ++r) {
      if (count_[r] <= limit_) lists.store(index[r], clients(r), values(r), count_[r]);
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

}  // namespace fc
