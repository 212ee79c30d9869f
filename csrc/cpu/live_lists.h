// For each candidate, the clients it can still win: pairs (client, similarity) with similarity > the client's
// best so far.
//
// The bests only rise, so a pair that is not live now never will be, and a gain summed over the live pairs is
// the whole gain. After some dozens of picks they are a hundredth of all pairs, and evaluating a candidate
// costs a few hundred gathers instead of a pass over all clients' features. Lists shrink in place when they
// are read; memory is handed out in order from one arena within a fixed budget, and closed up when it runs
// out.
#pragma once

#include <algorithm>
#include <cstdint>
#include <mutex>
#include <utility>
#include <vector>

#include "core/simd.h"
#include "cpu/pack.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fc {

// trunc(t) of a gain's term. Beyond 2^61, which sums have no room for, it is only not undefined.
template <class T>
int64_t whole_part(T t) {
  return t < T{0x1p61} ? static_cast<int64_t>(t) : int64_t{1} << 61;
}

inline int64_t wrapping_sum(int64_t a, int64_t b) {
  return simd::wrapped(static_cast<uint64_t>(a) + static_cast<uint64_t>(b));
}

// The gain over the pairs (client, value), sum of trunc(max(0, value - best) * weight). Drops those that are
// no longer live, and `count` falls.
template <class T>
int64_t gain_of_pairs(uint32_t* client, T* value, int64_t& count, const T* best, const T* weight) {
  int64_t kept = 0, i = 0;
  int64_t gain = 0;
#if defined(__AVX2__)
  if constexpr (sizeof(T) == 4) {
    simd::Sum<T> sum{};
    int64_t adds = 0;
    for (; i + simd::kWidth<T> <= count; i += simd::kWidth<T>) {
      if (++adds > simd::Sum<T>::kMostAdds) {
        gain = wrapping_sum(gain, std::exchange(sum, simd::Sum<T>{}).total());
        adds = 1;
      }
      const auto s = simd::load(value + i);
      const auto index = simd::load_indices(client + i);
      const auto b = simd::gather(best, index);
      const uint32_t live = simd::greater_mask<T>(s, b);
      sum.add(simd::positive_part<T>(s - b) * simd::gather(weight, index));
      kept = simd::compress(client, value, kept, live, index, s);
    }
    gain = wrapping_sum(gain, sum.total());
  }
#endif
  for (; i < count; ++i) {
    const uint32_t c = client[i];
    const T s = value[i], gap = s - best[c];
    if (gap <= 0) continue;
    gain = wrapping_sum(gain, whole_part(gap * weight[c]));
    client[kept] = c;
    value[kept] = s;
    ++kept;
  }
  count = kept;
  return gain;
}

template <class T>
class LiveLists {
 public:
  static constexpr int64_t kEntryBytes = sizeof(uint32_t) + sizeof(T);

  LiveLists() = default;
  // n candidates, m clients; at most `bytes` of entries. Clients must be numbered below 2^31 (gathers take
  // signed indices).
  LiveLists(int64_t n, int64_t m, int64_t bytes)
      : capacity_(m < INT32_MAX ? std::min(bytes / kEntryBytes,
                                           std::min(saturated_mul(n, m), INT64_MAX - kSlack) + kSlack)
                                : 0),
        start_(n, int64_t{-1}),
        length_(n, int64_t{0}) {}

  int64_t capacity() const { return capacity_; }
  bool has(int64_t j) const { return start_[j] >= 0; }
  int64_t length(int64_t j) const { return length_[j]; }
  const uint32_t* clients(int64_t j) const { return client_.data() + start_[j]; }
  const T* values(int64_t j) const { return value_.data() + start_[j]; }

  // Stores j's list if there is room. Thread safe against other stores.
  void store(int64_t j, const uint32_t* client, const T* value, int64_t count) {
    int64_t place;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      if (used_ + count + kSlack > capacity_) {
        overflow_ = true;
        return;
      }
      reserve();
      place = used_;
      used_ += count;
      order_.push_back(j);
    }
    std::copy(client, client + count, client_.data() + place);
    std::copy(value, value + count, value_.data() + place);
    start_[j] = place;
    length_[j] = count;
  }

  // Whether a list was refused since the last call.
  bool take_overflow() { return std::exchange(overflow_, false); }

  // Empties the list of a candidate that is chosen and never evaluated again.
  void forget(int64_t j) { length_[j] = 0; }

  // The gain of j, sum of trunc(max(0, s - best) * weight); drops the pairs that are no longer live.
  int64_t evaluate(int64_t j, const T* best, const T* weight) {
    return gain_of_pairs(client_.data() + start_[j], value_.data() + start_[j], length_[j], best, weight);
  }

  // Closes the gaps that shrunken and chosen candidates' lists left. Returns the share of the arena that is
  // free afterwards.
  double compact() {
    int64_t to = 0;
    for (const int64_t j : order_) {
      const int64_t from = start_[j];
      std::copy(client_.data() + from, client_.data() + from + length_[j], client_.data() + to);
      std::copy(value_.data() + from, value_.data() + from + length_[j], value_.data() + to);
      start_[j] = to;
      to += length_[j];
    }
    used_ = to;
    return 1.0 - static_cast<double>(used_) / static_cast<double>(std::max<int64_t>(capacity_, 1));
  }

 private:
  // Vector reads and writes may touch this many entries behind a list.
  static constexpr int64_t kSlack = 64;

  // The arena is address space only until lists are written into it.
  void reserve() {
    if (client_.size() != 0) return;
    client_ = Buffer<uint32_t>(capacity_);
    value_ = Buffer<T>(capacity_);
#if defined(__linux__)
    // Page faults of 4 KiB cost as much as filling the pages.
    advise(client_.data(), capacity_ * static_cast<int64_t>(sizeof(uint32_t)));
    advise(value_.data(), capacity_ * static_cast<int64_t>(sizeof(T)));
#endif
  }

#if defined(__linux__)
  static void advise(void* data, int64_t bytes) {
    const int64_t page = 1 << 21;
    const auto begin = round_up(static_cast<int64_t>(reinterpret_cast<uintptr_t>(data)), page);
    const auto end = (static_cast<int64_t>(reinterpret_cast<uintptr_t>(data)) + bytes) / page * page;
    if (end > begin) madvise(reinterpret_cast<void*>(begin), static_cast<size_t>(end - begin), MADV_HUGEPAGE);
  }
#endif

  int64_t capacity_ = 0, used_ = 0;
  bool overflow_ = false;
  Buffer<uint32_t> client_;
  Buffer<T> value_;
  Buffer<int64_t> start_, length_;
  std::vector<int64_t> order_;
  std::mutex mutex_;
};

}  // namespace fc
