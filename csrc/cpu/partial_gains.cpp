#include "cpu/partial_gains.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "cpu/live_lists.h"

namespace fc {
namespace {

// Pairs that a list may have: a tenth of all, or this many. A longer one is read no faster than a block.
constexpr int64_t kShort = 1024;
constexpr int64_t kShare = 10;
// What a list costs beside its pairs, in pairs.
constexpr int64_t kOverhead = 32;

}  // namespace

template <class T>
void PartialGains<T>::begin(int64_t rows, bool listing) {
  rows_ = rows;
  limit_ = 0;  // until there is memory for the lists
  // Gathers take signed indices.
  if (!listing || rows == 0 || clients_ >= INT32_MAX) return;
  const int64_t limit = std::min({clients_, std::max(kShort, clients_ / kShare), most_ / 4 / rows});
  if (limit < 1) return;
  if (rows > room_ || live_.limit() != limit) {
    room_ = 0;
    live_ = LiveRows<T>(0, 0);  // one at a time
    live_ = LiveRows<T>(rows, limit);
    room_ = rows;
  }
  live_.clear();
  limit_ = limit;
}

template <class T>
void PartialGains<T>::add(TensorView<const T, 2> s, int64_t first, const T* best, const T* weight,
                          int64_t* sums, ThreadTeam& team) {
  LiveRows<T>* live = limit_ > 0 ? &live_ : nullptr;
  team.parallel_for(s.rows(), 4, [&](int, int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r)
      sums[r] = wrapping_sum(sums[r], row_gain(s.row(r), s.cols(), first, best, weight, r, live));
  });
}

template <class T>
int64_t PartialGains<T>::size_of(const List& list) {
  return list.client.size() + kOverhead;
}

template <class T>
auto PartialGains<T>::copy_of(const uint32_t* client, const T* value, int64_t count, uint64_t age) -> List {
  List list{Buffer<uint32_t>(count), Buffer<T>(count), count, age};
  std::copy_n(client, count, list.client.data());
  std::copy_n(value, count, list.value.data());
  return list;
}

template <class T>
void PartialGains<T>::settle(int64_t number, List list) {
  const int64_t size = size_of(list);
  by_age_.emplace(list.age, number);  // without its list, if memory ends here, it is dropped all the same
  lists_.insert_or_assign(number, std::move(list));
  entries_ += size;
}

template <class T>
void PartialGains<T>::keep(const int64_t* number) {
  for (int64_t r = 0; limit_ > 0 && r < rows_; ++r) {
    const int64_t count = live_.count(r);
    if (count > limit_) continue;
    forget(number[r]);
    if (count + kOverhead > most_) continue;
    while (entries_ + count + kOverhead > most_) drop_oldest();
    settle(number[r], copy_of(live_.clients(r), live_.values(r), count, made_++));
  }
  limit_ = rows_ = 0;
}

template <class T>
void PartialGains<T>::evaluate(const int64_t* number, int64_t count, const T* best, const T* weight,
                               int64_t* sums, ThreadTeam& team) {
  std::vector<List*> lists;
  for (int64_t i = 0; i < count; ++i) lists.push_back(&lists_.at(number[i]));
  team.parallel_for(count, 4, [&](int, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      List& list = *lists[i];
      sums[i] = gain_of_pairs(list.client.data(), list.value.data(), list.count, best, weight);
    }
  });
  for (int64_t i = 0; i < count; ++i) {
    List& list = *lists[i];
    if (list.count + kOverhead >= size_of(list) / 4) continue;
    List smaller = copy_of(list.client.data(), list.value.data(), list.count, list.age);
    forget(number[i]);
    settle(number[i], std::move(smaller));
  }
}

template <class T>
void PartialGains<T>::win(int64_t number, int64_t position, T* best, int64_t* owner) const {
  const List& list = lists_.at(number);
  for (int64_t i = 0; i < list.count; ++i) {
    const uint32_t c = list.client[i];
    if (!(list.value[i] > best[c])) continue;
    best[c] = list.value[i];
    owner[c] = position;
  }
}

template <class T>
void PartialGains<T>::drop_oldest() {
  const int64_t number = by_age_.begin()->second;
  by_age_.erase(by_age_.begin());
  forget(number);
}

template <class T>
void PartialGains<T>::forget(int64_t number) {
  const auto found = lists_.find(number);
  if (found == lists_.end()) return;
  entries_ -= size_of(found->second);
  by_age_.erase(found->second.age);
  lists_.erase(found);
}

template class PartialGains<float>;
template class PartialGains<double>;

}  // namespace fc
