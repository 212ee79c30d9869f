// For each of K lists (centroids) the most similar items of a stream, and SimCore's rounds over them.
//
// See nearest_order.cpp for the algorithm and its cost.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "core/tensor_view.h"
#include "core/threads.h"
#include "cpu/pack.h"
#include "cpu/tile.h"

namespace fc {

// A pass over the items is begin(), any number of update() calls, finish(); then rounds() takes items. Where
// rounds() stops early, a list has run out of kept items: another pass over the same items keeps the best of
// those that were not taken. What is kept and taken does not depend on how the items are cut into updates,
// nor on the number of threads.
template <class T>
class NearestOrder {
 public:
  using Value = T;

  // centroids [K, d], rows of unit length (or zero): update() takes features.
  NearestOrder(const TensorView<const T, 2>& centroids, int threads, std::function<bool()> poll);
  // update_similarities() takes rows of K similarities.
  NearestOrder(int64_t lists, int threads, std::function<bool()> poll);

  int64_t lists() const { return static_cast<int64_t>(lists_.size()); }
  int64_t features() const { return d_; }  // 0 where similarities are given
  int64_t kept(int64_t list) const { return static_cast<int64_t>(lists_[list].entries.size()); }
  int64_t taken() const { return taken_; }

  // Starts a pass that keeps the `length` best items of each list.
  void begin(int64_t length);
  // The next items: x [r, d], rows contiguous. Throws std::invalid_argument for NaN and infinity, naming row
  // and column of the pass; the pass then has to be started again, as after Cancelled.
  void update(const TensorView<const T, 2>& x);
  // The next items: s [r, K], rows contiguous.
  void update_similarities(const TensorView<const T, 2>& s);
  // Ends the pass and returns the number of items in it. Throws std::invalid_argument if an earlier pass had
  // another number.
  int64_t finish();

  // Makes up to `count` rounds and returns how many were made: fewer when k items or all are taken, and when
  // a list needs another pass. The new items of a round follow each other in `items` [count * K] in the order
  // of the lists that took them, counts[r] of them in round r; values[r] is the mean of the similarities
  // taken.
  int64_t rounds(int64_t k, int64_t count, int64_t* items, int64_t* counts, double* values);

  // Writes what `list` keeps, most similar first: items and similarities [kept(list)].
  void order(int64_t list, int64_t* items, T* similarities);

 private:
  static constexpr int kGroup = Tile<T>::kRows;  // lists whose similarities come from one tile
  static constexpr int kPanel = Tile<T>::kCols;  // items of one tile

  struct Entry {
    T value;
    int64_t item;
  };
  struct Survivor {
    T value;
    int32_t lane;  // list within its group
    int64_t item;
  };
  struct List {
    std::vector<Entry> entries;  // the first `sorted` of them in order once the pass is finished
    int64_t sorted = 0;
    int64_t cursor = 0;  // everything before it is taken
    bool full = false;   // `length_` entries no worse than `last` are kept
    Entry last{};
  };
  struct Scratch {
    Buffer<T> panel;  // [d, kPanel]
    Buffer<T> tile;   // [kGroup, kPanel]
    int64_t items[kPanel];
    std::vector<std::vector<Survivor>> survivors;  // [groups]
  };

  static bool before(const Entry& a, const Entry& b) {
    return a.value != b.value ? a.value > b.value : a.item < b.item;
  }

  int64_t groups() const { return (lists() + kGroup - 1) / kGroup; }
  bool is_taken(int64_t item) const { return taken_bits_[item >> 6] >> (item & 63) & 1; }
  bool is_skipped(int64_t item) const { return taken_ > 0 && is_taken(item); }

  template <class Scan>
  void add(int64_t rows, Scan&& scan);
  void filter_panel(Scratch& scratch, int count);
  void filter_row(Scratch& scratch, const T* row, int64_t item, simd::Vec<T>& finite);
  void merge(int64_t group);
  void cut(int64_t list);
  bool advance(List& list);
  static void sort_further(List& list, int64_t end);

  ThreadTeam team_;
  int64_t d_ = 0;
  Buffer<T> centroids_;  // [groups, d, kGroup], the last group filled up with zeros
  std::vector<List> lists_;
  Buffer<T> thresholds_;          // [K]: an item whose similarity is not above it cannot be among the best
  std::vector<Scratch> scratch_;  // one a thread
  std::vector<uint64_t> taken_bits_;
  int64_t length_ = 0;
  int64_t rows_ = 0;    // seen in this pass
  int64_t items_ = -1;  // in all; -1 before the first pass is finished
  int64_t taken_ = 0;
  enum class Pass { kNone, kOpen, kFinished } pass_ = Pass::kNone;
};

}  // namespace fc
