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

// The gain of a candidate over the clients [first, first + count), of which s has the similarities; `best`
// and `weight` are those of all clients. Its live pairs are added to `live` as those of `row`, unless that is
// null.
template <class T>
int64_t row_gain(const T* s, int64_t count, int64_t first, const T* best, const T* weight, int64_t row,
                 LiveRows<T>* live) {
  constexpr int64_t kWidth = simd::kWidth<T>;
  constexpr int64_t kStrip = std::min<int64_t>(simd::Sum<T>::kMostAdds, 512) * 2 * kWidth;
  best += first;
  weight += first;
  int64_t gain = 0, i = 0;
  while (i + 2 * kWidth <= count) {
    simd::Sum<T> sum[2] = {};
    for (const int64_t end = std::min(count, i + kStrip); i + 2 * kWidth <= end; i += 2 * kWidth) {
      for (int h = 0; h < 2; ++h) {
        const int64_t at = i + h * kWidth;
        const auto value = simd::load(s + at), b = simd::load(best + at);
        sum[h].add(simd::positive_part<T>(value - b) * simd::load(weight + at));
        if (live)
          live->append(row, simd::greater_mask<T>(value, b), static_cast<uint32_t>(first + at), value);
      }
    }
    for (const simd::Sum<T>& half : sum) gain = wrapping_sum(gain, half.total());
  }
  for (; i < count; ++i) {
    if (!(s[i] > best[i])) continue;
    gain = wrapping_sum(gain, whole_part((s[i] - best[i]) * weight[i]));
    if (live) live->append(row, 1, static_cast<uint32_t>(first + i), simd::broadcast(s[i]));
  }
  return gain;
}

}  // namespace fc
