// Fuzzes the nearest-order kernel with calls in any order: it works, or throws a documented exception and
// goes on after begin().
#include <cstdlib>
#include <memory>
#include <set>
#include <stdexcept>
#include <vector>

#include "cpu/nearest_order.h"
#include "input.h"

namespace {

template <class T>
void run(fuzz::Input& in) {
  const int64_t lists = 1 + in.below(30), d = 1 + in.below(12);
  const bool any = in.coin(), features = in.coin();
  const int threads = static_cast<int>(1 + in.below(3));
  std::unique_ptr<fc::NearestOrder<T>> order;
  std::set<int64_t> seen;
  try {
    if (features) {
      const fuzz::Array<T> centroids(in, lists, d, any, false);
      order = fc::nearest_order_of_features<T>(centroids.view, threads, nullptr);
    } else {
      order = fc::nearest_order_of_similarities<T>(lists, threads, nullptr);
    }
  } catch (const std::invalid_argument&) {
    if (!any) std::abort();
    return;
  }
  int64_t items = 0;
  for (int turn = 0; turn < 12; ++turn) {
    try {
      switch (in.below(6)) {
        case 0:
          order->begin(1 + in.below(50));
          break;
        case 1:
          items = order->finish();
          break;
        case 2: {
          const int64_t count = 1 + in.below(4), k = in.below(60);
          std::vector<int64_t> taken(count * lists), counts(count), takers(count * lists);
          std::vector<double> values(count), similarities(count * lists);
          const int64_t made = order->rounds(k, count, taken.data(), counts.data(), values.data(),
                                             takers.data(), similarities.data());
          int64_t at = 0;
          for (int64_t r = 0; r < made; ++r) {
            for (int64_t i = 0; i < counts[r]; ++i, ++at) {
              if (taken[at] < 0 || taken[at] >= items || !seen.insert(taken[at]).second) std::abort();
            }
          }
          break;
        }
        case 3: {
          const int64_t list = in.below(lists), kept = order->kept(list);
          std::vector<int64_t> kept_items(kept);
          std::vector<T> similarities(kept);
          order->order(list, kept_items.data(), similarities.data());
          for (int64_t i = 1; i < kept; ++i) {
            if (!any && similarities[i] > similarities[i - 1]) std::abort();
          }
          break;
        }
        default: {
          const fuzz::Array<T> rows(in, 1 + in.below(80), features ? d : lists, any, true);
          if (features) {
            order->update(rows.view);
          } else {
            order->update_similarities(rows.view);
          }
        }
      }
    } catch (const std::invalid_argument&) {
      continue;
    }
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  return fuzz::with_float_or_double(data, size, [](auto zero, fuzz::Input& in) { run<decltype(zero)>(in); });
}
