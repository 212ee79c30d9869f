// Gains of candidates that live anywhere, over the clients that are here: a rank's parts of sums over all
// ranks.
//
// The similarities of a batch of candidates come block by block of the clients. A candidate whose pairs are
// few enough leaves behind the list of those that are still live, and its later evaluations read that list
// (live_lists.h says why that is the whole gain). Lists are kept by the candidates' numbers, the newest ones
// if there is no room for all; which are kept changes no sum.
//
// Cost: a block is read once, three arrays of its length beside it; a list costs two gathers a pair.
#pragma once

#include <cstdint>
#include <map>
#include <unordered_map>

#include "core/tensor_view.h"
#include "core/threads.h"
#include "cpu/gain_sums.h"
#include "cpu/pack.h"

namespace fc {

template <class T>
class PartialGains {
 public:
  using Value = T;

  // At most `entries` pairs are kept.
  PartialGains(int64_t clients, int64_t entries) : clients_(clients), most_(entries) {}

  int64_t clients() const { return clients_; }
  // Candidates of the batch that begin() began.
  int64_t rows() const { return rows_; }

  // A new batch of candidates, for whose live pairs lists are prepared if `listing`.
  void begin(int64_t rows, bool listing);
  // Adds to sums[r] the terms trunc(max(0, s(r, c) - best[first + c]) * weight[first + c]), of which all sums
  // have to stay below 2^62. `best` and `weight` are those of all clients.
  void add(TensorView<const T, 2> s, int64_t first, const T* best, const T* weight, int64_t* sums,
           ThreadTeam& team);
  // Ends the batch: keeps the lists of candidates `number` [rows], distinct.
  void keep(const int64_t* number);

  bool has(int64_t number) const { return lists_.count(number) != 0; }
  // sums[i] of candidates `number` [count], distinct ones that have lists; pairs that are no longer live are
  // dropped.
  void evaluate(const int64_t* number, int64_t count, const T* best, const T* weight, int64_t* sums,
                ThreadTeam& team);
  // Clients that the candidate's list says are better served by it get that similarity as `best`, and
  // `position` as `owner`.
  void win(int64_t number, int64_t position, T* best, int64_t* owner) const;
  void forget(int64_t number);

 private:
  struct List {
    Buffer<uint32_t> client;
    Buffer<T> value;
    int64_t count = 0;
    uint64_t age = 0;
  };

  static int64_t size_of(const List& list);
  static List copy_of(const uint32_t* client, const T* value, int64_t count, uint64_t age);
  void settle(int64_t number, List list);
  void drop_oldest();

  int64_t clients_, most_, rows_ = 0, limit_ = 0, entries_ = 0;
  uint64_t made_ = 0;
  LiveRows<T> live_{0, 0};
  int64_t room_ = 0;  // rows that live_ holds, of limit_ pairs each
  std::unordered_map<int64_t, List> lists_;
  std::map<uint64_t, int64_t> by_age_;
};

}  // namespace fc
