// Finds, for each of K lists, its L most similar items of a stream of n, and makes rounds in which every list
// takes its best item that no earlier round took.
//
// A list keeps between L and 1.5 L entries; when it is full, the L best stay and the worst of them becomes
// the list's threshold. Most items fail against all thresholds, which costs one vector comparison per kWidth
// similarities; of n items in random order a list admits about L (1 + ln(n / L)). Rounds read the lists from
// the front, and a list is sorted only as far as it is read. An entry kept is one of the L first of the order
// (similarity falling, then item rising), which is total, so neither the cut into updates nor the threads
// decide what is kept.
//
// L entries are enough for the next L items taken: while fewer than L are taken since the pass, one of a
// list's L best is free. So a pass that keeps min(k, n) entries is the only one, and a pass that keeps L is
// followed by another after L items at the earliest. A further pass leaves taken items out: no list has to be
// longer than before.
//
// Cost: n K d multiply-adds (none if similarities are given), n K comparisons, 24 bytes (float32) for each of
// K L entries. Rejected: a full sort of n K similarities, which needs them all in memory and orders items
// that nobody asks for; one heap per list, which costs a data-dependent walk per admitted item, while an
// amortised selection costs a few sequential steps.
#include "cpu/nearest_order.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "core/simd.h"
#include "core/threads.h"
#include "cpu/pack.h"
#include "cpu/tile.h"

namespace fc {
namespace {

// Similarities compared between two merges: bounds the memory of the survivors (all of them, at worst) and
// lets thresholds rise.
constexpr int64_t kSlice = int64_t{1} << 19;
constexpr int64_t kFirstRows = 1024;
// Places reserved at once in a list, whose length may be set to more than there are items.
constexpr size_t kReserved = size_t{1} << 20;

// Writes row [d] at unit length into lane `lane` of a panel [d, width]. The row is first brought near 1 by a
// power of two, which is exact, so that squares neither overflow nor vanish.
template <class T>
void pack_unit(const T* row, int64_t d, int64_t item, T* out, int width) {
  using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
  constexpr Bits kMagnitude = ~Bits{0} >> 1;
  const T infinity = std::numeric_limits<T>::infinity();
  Bits infinity_bits, bits, largest = 0;
  std::memcpy(&infinity_bits, &infinity, sizeof(Bits));
  for (int64_t k = 0; k < d; ++k) {
    std::memcpy(&bits, row + k, sizeof(Bits));
    bits &= kMagnitude;
    largest = bits > largest ? bits : largest;
  }
  if (largest >= infinity_bits) {
    for (int64_t k = 0; k < d; ++k) require_finite(row[k], "openset", item, k);
  }
  if (largest == 0) {
    for (int64_t k = 0; k < d; ++k) out[k * width] = T(0);
    return;
  }
  constexpr int kLimit =
      std::numeric_limits<T>::max_exponent - 2;  // the power and its inverse are normal numbers
  T magnitude;
  std::memcpy(&magnitude, &largest, sizeof(T));
  const T power = std::ldexp(T(1), -std::min(std::max(std::ilogb(magnitude), -kLimit), kLimit));
  // Eight partial sums in a fixed pattern: the same bits at every vector width.
  double sums[8] = {};
  int64_t k = 0;
  for (; k + 8 <= d; k += 8) {
    for (int j = 0; j < 8; ++j) {
      const double t = row[k + j] * power;
      sums[j] += t * t;
    }
  }
  for (int j = 0; k < d; ++k, ++j) {
    const double t = row[k] * power;
    sums[j] += t * t;
  }
  const double sum =
      ((sums[0] + sums[4]) + (sums[1] + sums[5])) + ((sums[2] + sums[6]) + (sums[3] + sums[7]));
  const T inverse = static_cast<T>(1 / std::sqrt(sum));
  for (k = 0; k < d; ++k) out[k * width] = row[k] * power * inverse;
}

template <class T>
class StreamedOrder final : public NearestOrder<T> {
 public:
  StreamedOrder(const TensorView<const T, 2>& centroids, int threads, std::function<bool()> poll);
  StreamedOrder(int64_t lists, int threads, std::function<bool()> poll);

  int64_t lists() const override { return static_cast<int64_t>(lists_.size()); }
  int64_t features() const override { return d_; }
  int64_t kept(int64_t list) const override { return static_cast<int64_t>(lists_[list].entries.size()); }
  int64_t taken() const override { return taken_; }
  void begin(int64_t length) override;
  void update(const TensorView<const T, 2>& x) override;
  void update_similarities(const TensorView<const T, 2>& s) override;
  int64_t finish() override;
  int64_t rounds(int64_t k, int64_t count, int64_t* items, int64_t* counts, double* values, int64_t* takers,
                 double* similarities) override;
  void order(int64_t list, int64_t* items, T* similarities) override;

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
  std::vector<Scratch> scratch_;  // one per thread
  std::vector<uint64_t> taken_bits_;
  int64_t length_ = 0;
  int64_t rows_ = 0;    // seen in this pass
  int64_t items_ = -1;  // in all; -1 before the first pass is finished
  int64_t taken_ = 0;
  enum class Pass { kNone, kOpen, kFinished } pass_ = Pass::kNone;
};

template <class T>
StreamedOrder<T>::StreamedOrder(int64_t lists, int threads, std::function<bool()> poll)
    : team_(threads, std::move(poll)), lists_(lists), thresholds_(lists), scratch_(team_.size()) {
  for (Scratch& scratch : scratch_) scratch.survivors.resize(groups());
}

template <class T>
StreamedOrder<T>::StreamedOrder(const TensorView<const T, 2>& centroids, int threads,
                                std::function<bool()> poll)
    : StreamedOrder(centroids.rows(), threads, std::move(poll)) {
  d_ = centroids.cols();
  centroids_ = Buffer<T>(checked_mul(groups() * kGroup, d_), T(0));
  for (int64_t c = 0; c < centroids.rows(); ++c) {
    Panels<T>::check_row(centroids, c, "centroids");
    T* out = centroids_.data() + c / kGroup * d_ * kGroup + c % kGroup;
    for (int64_t k = 0; k < d_; ++k) out[k * kGroup] = centroids(c, k);
  }
  for (Scratch& scratch : scratch_) {
    scratch.panel = Buffer<T>(d_ * kPanel, T(0));
    scratch.tile = Buffer<T>(kGroup * kPanel);
  }
}

template <class T>
void StreamedOrder<T>::begin(int64_t length) {
  pass_ = Pass::kNone;
  // No list is ever that long; what is added to the length below must not overflow.
  length = std::min(length, int64_t{1} << 48);
  length_ = items_ < 0 ? length : std::min(length, std::max<int64_t>(items_ - taken_, 1));
  rows_ = 0;
  for (int64_t c = 0; c < lists(); ++c) {
    lists_[c] = List{};
    thresholds_[c] = -std::numeric_limits<T>::infinity();
  }
  for (Scratch& scratch : scratch_) {
    for (auto& survivors : scratch.survivors) survivors.clear();
  }
  pass_ = Pass::kOpen;
}

// scan(scratch, begin, end) leaves the survivors of these rows in scratch; rows of a slice are shared out
// among the threads.
template <class T>
template <class Scan>
void StreamedOrder<T>::add(int64_t rows, Scan&& scan) {
  if (pass_ != Pass::kOpen) throw std::invalid_argument("no pass is open: call begin() first");
  if (items_ >= 0 && rows_ + rows > items_) {
    throw std::invalid_argument("openset has more rows than the " + std::to_string(items_) +
                                " of its first reading");
  }
  pass_ = Pass::kNone;  // until all went well
  const int64_t most = round_up(std::max<int64_t>(kSlice / lists(), 1), kPanel);
  for (int64_t first = 0; first < rows;) {
    // Thresholds stand still within a slice, so slices start small and grow with what was seen.
    const int64_t size = std::min({rows - first, most, std::max(rows_, kFirstRows)});
    const int64_t share = std::max<int64_t>(round_up(size / (4 * team_.size()), kPanel), kPanel);
    team_.parallel_for(size, share, [&](int thread, int64_t begin, int64_t end) {
      scan(scratch_[thread], first + begin, first + end, rows_ + begin);
    });
    team_.parallel_for(groups(), 1, [&](int, int64_t begin, int64_t end) {
      for (int64_t group = begin; group < end; ++group) merge(group);
    });
    rows_ += size;
    first += size;
  }
  pass_ = Pass::kOpen;
}

template <class T>
void StreamedOrder<T>::update(const TensorView<const T, 2>& x) {
  add(x.rows(), [&](Scratch& scratch, int64_t begin, int64_t end, int64_t item) {
    int count = 0;
    for (int64_t i = begin; i < end; ++i, ++item) {
      if (is_skipped(item)) continue;
      pack_unit(x.row(i), d_, item, scratch.panel.data() + count, kPanel);
      scratch.items[count++] = item;
      if (count == kPanel) {
        filter_panel(scratch, count);
        count = 0;
      }
    }
    if (count > 0) filter_panel(scratch, count);
  });
}

template <class T>
void StreamedOrder<T>::update_similarities(const TensorView<const T, 2>& s) {
  add(s.rows(), [&](Scratch& scratch, int64_t begin, int64_t end, int64_t item) {
    simd::Vec<T> finite{};
    const int64_t first = item;
    for (int64_t i = begin; i < end; ++i, ++item) {
      if (!is_skipped(item)) filter_row(scratch, s.row(i), item, finite);
    }
    for (int lane = 0; lane < simd::kWidth<T>; ++lane) {
      if (finite[lane] == 0) continue;
      for (int64_t i = begin; i < end; ++i) {
        for (int64_t c = 0; c < lists(); ++c) require_finite(s(i, c), "similarities", first + i - begin, c);
      }
    }
  });
}

// Similarities of the first `count` items of the scratch panel to all lists; those above a threshold survive.
template <class T>
void StreamedOrder<T>::filter_panel(Scratch& scratch, int count) {
  constexpr int kWidth = simd::kWidth<T>;
  const uint64_t valid = ~uint64_t{0} >> (64 - count);
  for (int64_t group = 0; group < groups(); ++group) {
    T* values = scratch.tile.data();
    tile_rows<T, Form::kProduct>(Tile<T>::kRows, centroids_.data() + group * d_ * kGroup,
                                 scratch.panel.data(), d_, values);
    std::vector<Survivor>& survivors = scratch.survivors[group];
    const int used = static_cast<int>(std::min<int64_t>(kGroup, lists() - group * kGroup));
    for (int lane = 0; lane < used; ++lane) {
      const simd::Vec<T> threshold = simd::broadcast(thresholds_[group * kGroup + lane]);
      for (int v = 0; v < Tile<T>::kVectors; ++v) {
        const T* row = values + lane * kPanel + v * kWidth;
        uint32_t mask =
            simd::greater_mask<T>(simd::load(row), threshold) & static_cast<uint32_t>(valid >> (v * kWidth));
        for (; mask != 0; mask &= mask - 1) {
          const int j = __builtin_ctz(mask);
          survivors.push_back({row[j], lane, scratch.items[v * kWidth + j]});
        }
      }
    }
  }
}

// The same for one row of given similarities. `finite` becomes NaN if one of them is not finite.
template <class T>
void StreamedOrder<T>::filter_row(Scratch& scratch, const T* row, int64_t item, simd::Vec<T>& finite) {
  constexpr int kWidth = simd::kWidth<T>;
  const int64_t n = lists();
  const auto survive = [&](int64_t c) {
    scratch.survivors[c / kGroup].push_back({row[c], static_cast<int32_t>(c % kGroup), item});
  };
  int64_t c = 0;
  for (; c + kWidth <= n; c += kWidth) {
    const simd::Vec<T> values = simd::load(row + c);
    finite += values - values;
    uint32_t mask = simd::greater_mask<T>(values, simd::load(thresholds_.data() + c));
    for (; mask != 0; mask &= mask - 1) survive(c + __builtin_ctz(mask));
  }
  for (; c < n; ++c) {
    finite[0] += row[c] - row[c];
    if (row[c] > thresholds_[c]) survive(c);
  }
}

// Takes the survivors of one group of lists out of all threads' hands.
template <class T>
void StreamedOrder<T>::merge(int64_t group) {
  const size_t capacity = static_cast<size_t>(length_ + std::max<int64_t>(length_ / 2, 64));
  for (Scratch& scratch : scratch_) {
    for (const Survivor& survivor : scratch.survivors[group]) {
      const int64_t c = group * kGroup + survivor.lane;
      List& list = lists_[c];
      const Entry entry{survivor.value, survivor.item};
      if (list.full && !before(entry, list.last)) continue;
      if (list.entries.empty()) list.entries.reserve(std::min(capacity, kReserved));
      list.entries.push_back(entry);
      if (list.entries.size() == capacity) cut(c);
    }
    scratch.survivors[group].clear();
  }
}

// Keeps the `length_` first entries of a list that has at least as many.
template <class T>
void StreamedOrder<T>::cut(int64_t c) {
  List& list = lists_[c];
  const auto last = list.entries.begin() + (length_ - 1);
  std::nth_element(list.entries.begin(), last, list.entries.end(), before);
  list.last = *last;
  list.full = true;
  list.entries.erase(last + 1, list.entries.end());
  thresholds_[c] = list.last.value;
}

template <class T>
int64_t StreamedOrder<T>::finish() {
  if (pass_ != Pass::kOpen) throw std::invalid_argument("no pass is open: call begin() first");
  if (items_ >= 0 && rows_ != items_) {
    throw std::invalid_argument("openset has " + std::to_string(rows_) + " rows, it had " +
                                std::to_string(items_) + " in its first reading");
  }
  team_.parallel_for(lists(), 1, [&](int, int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      if (kept(c) > length_) cut(c);
    }
  });
  if (items_ < 0) {
    items_ = rows_;
    taken_bits_.assign(static_cast<size_t>((items_ + 63) / 64), 0);
  }
  pass_ = Pass::kFinished;
  return items_;
}

template <class T>
void StreamedOrder<T>::sort_further(List& list, int64_t end) {
  const auto begin = list.entries.begin() + list.sorted, middle = list.entries.begin() + end;
  if (middle != list.entries.end()) std::nth_element(begin, middle, list.entries.end(), before);
  std::sort(begin, middle, before);
  list.sorted = end;
}

// Moves the cursor to the list's best item that is not taken; false if the list keeps none.
template <class T>
bool StreamedOrder<T>::advance(List& list) {
  const int64_t size = static_cast<int64_t>(list.entries.size());
  for (; list.cursor < size; ++list.cursor) {
    if (list.cursor == list.sorted)
      sort_further(list, std::min(size, std::max<int64_t>(64, 2 * list.sorted)));
    if (!is_taken(list.entries[list.cursor].item)) return true;
  }
  return false;
}

template <class T>
int64_t StreamedOrder<T>::rounds(int64_t k, int64_t count, int64_t* items, int64_t* counts, double* values,
                                 int64_t* takers, double* similarities) {
  if (pass_ != Pass::kFinished)
    throw std::invalid_argument("no pass is finished: call begin(), update() and finish() first");
  const int64_t limit = std::min(k, items_);
  int64_t made = 0;
  for (; made < count && taken_ < limit; ++made) {
    team_.check();
    // Items are marked only after every list has chosen: two lists may take the same one in a round.
    for (List& list : lists_) {
      if (!advance(list)) return made;
    }
    double total = 0;
    int64_t taken = 0;
    for (int64_t c = 0; c < lists(); ++c) {
      const Entry& entry = lists_[c].entries[lists_[c].cursor];
      total += entry.value;
      if (is_taken(entry.item)) continue;
      taken_bits_[entry.item >> 6] |= uint64_t{1} << (entry.item & 63);
      if (takers) *takers++ = c;
      if (similarities) *similarities++ = entry.value;
      items[taken++] = entry.item;
    }
    taken_ += taken;
    items += taken;
    counts[made] = taken;
    values[made] = total / static_cast<double>(lists());
  }
  return made;
}

template <class T>
void StreamedOrder<T>::order(int64_t index, int64_t* items, T* similarities) {
  if (pass_ != Pass::kFinished)
    throw std::invalid_argument("no pass is finished: call begin(), update() and finish() first");
  List& list = lists_[index];
  sort_further(list, kept(index));
  for (const Entry& entry : list.entries) {
    *items++ = entry.item;
    *similarities++ = entry.value;
  }
}

}  // namespace

template <class T>
std::unique_ptr<NearestOrder<T>> nearest_order_of_features(const TensorView<const T, 2>& centroids,
                                                           int threads, std::function<bool()> poll) {
  return std::make_unique<StreamedOrder<T>>(centroids, threads, std::move(poll));
}

template <class T>
std::unique_ptr<NearestOrder<T>> nearest_order_of_similarities(int64_t lists, int threads,
                                                               std::function<bool()> poll) {
  return std::make_unique<StreamedOrder<T>>(lists, threads, std::move(poll));
}

#define FC_INSTANTIATE(T)                                                                                    \
  template std::unique_ptr<NearestOrder<T>> nearest_order_of_features<T>(const TensorView<const T, 2>&, int, \
                                                                         std::function<bool()>);             \
  template std::unique_ptr<NearestOrder<T>> nearest_order_of_similarities<T>(int64_t, int,                   \
                                                                             std::function<bool()>);
FC_INSTANTIATE(float)
FC_INSTANTIATE(double)
#undef FC_INSTANTIATE

}  // namespace fc
