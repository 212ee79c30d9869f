// For each of K lists (centroids) the most similar items of a stream, and SimCore's rounds over them.
//
// See nearest_order.cpp for the algorithm and its cost.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>

#include "core/tensor_view.h"

namespace fc {

// A pass over the items is begin(), any number of update() calls, finish(); then rounds() takes items. If
// rounds() stops early, a list has run out of kept items: another pass over the same items keeps the best of
// the items that were not taken. What is kept and taken does not depend on how the items are cut into
// updates, nor on the number of threads.
template <class T>
class NearestOrder {
 public:
  using Value = T;

  virtual ~NearestOrder() = default;

  virtual int64_t lists() const = 0;
  virtual int64_t features() const = 0;  // 0 if similarities are given
  virtual int64_t kept(int64_t list) const = 0;
  virtual int64_t taken() const = 0;

  // Starts a pass that keeps the `length` best items of each list.
  virtual void begin(int64_t length) = 0;
  // The next items: x [r, d], rows contiguous. Throws std::invalid_argument for NaN and infinity, naming row
  // and column of the pass; the pass then has to be started again, as after Cancelled.
  virtual void update(const TensorView<const T, 2>& x) = 0;
  // The next items: s [r, K], rows contiguous.
  virtual void update_similarities(const TensorView<const T, 2>& s) = 0;
  // Ends the pass and returns the number of items in it. Throws std::invalid_argument if an earlier pass had
  // another number.
  virtual int64_t finish() = 0;

  // Makes up to `count` rounds and returns how many were made: fewer when k items or all are taken, and when
  // a list needs another pass. The new items of a round follow each other in `items` [count * K] in the order
  // of the lists that took them, counts[r] of them in round r; values[r] is the mean of the similarities
  // taken. takers and similarities [count * K], unless null: the list that took each item (the first that
  // did) and its similarity.
  virtual int64_t rounds(int64_t k, int64_t count, int64_t* items, int64_t* counts, double* values,
                         int64_t* takers = nullptr, double* similarities = nullptr) = 0;

  // Writes what `list` keeps, most similar first: items and similarities [kept(list)].
  virtual void order(int64_t list, int64_t* items, T* similarities) = 0;
};

// For features: centroids [K, d], rows of unit length (or zero).
template <class T>
std::unique_ptr<NearestOrder<T>> nearest_order_of_features(const TensorView<const T, 2>& centroids,
                                                           int threads, std::function<bool()> poll);

// For rows of K = `lists` similarities.
template <class T>
std::unique_ptr<NearestOrder<T>> nearest_order_of_similarities(int64_t lists, int threads,
                                                               std::function<bool()> poll);

}  // namespace fc
