// Solves min sum_sv C_sv x_sv with sum_v x_sv = V / g, sum_s x_sv = k / g, x >= 0 and whole, g = gcd(k, V),
// by successive shortest paths with dual variables, and repairs the solution after a source has been
// exchanged.
//
// The dual variables satisfy u_s + f_v <= C_sv, with equality where x_sv > 0 (complementary slackness), so a
// flow that leaves no unit behind is optimal. A source i that leaves takes its V / g units along; its
// successor o starts with u_o = min_v (C_ov - f_v) and V / g units to place. Dijkstra's algorithm on reduced
// costs C_sv - u_s - f_v runs from o: a member of the search lies at the distance of one of its sinks (their
// reduced cost is 0), a sink at the least distance of a member plus its reduced cost, and the search ends
// when the sinks found lack as many units as are to be placed. Then the dual variables of what was found move
// by the rest of the distance, and units go along the paths of the search as far as these do not share a
// bottleneck; if units are left, another search follows. All duals on the way are feasible, so the dual value
// is a lower bound of the result that rises with the distance: a search whose bound reaches the caller's
// ceiling is given up, and its changes are taken back.
//
// Predicted before it was written: a search that finds m of the k members costs about 2 m V steps of one
// vector lane (m rows relaxed, m smallest distances looked for); an exchange places V / k units, one search
// finds sinks for most of them, and m is some tens of k = 400, V = 2,000: 2 * 30 * 2,000 * 2 = 240,000 steps
// of a lane, some 0.05 ms at 4 lanes, beside 20 ms for a solve of few cells from nothing. A bound of an item
// for all members is 3 V steps and a selection of the V / k smallest.
//
// An exchange that is only scored is searched for forwards, from o: the distances of all sources to the place
// that is vacated are found once, and as potentials they show every further search the way. The first path is
// then known without a search, and the dual variables that a search has come to bound the scores of other
// items at the same place by V steps: most scores end there. Predicted: of 20,000 scores of 6,000 x 2,000
// items at k = 400 three quarters end at a bound of some 3 us, and a search that finds m sources takes m
// steps of k lanes instead of 2 m. Measured: 60 to 75 %; m is some 190, and half of the time goes into what
// the sources on the paths, 20 to 50, hand over from then on.
//
// Rounding: sums of costs that are multiples of one power of two (such as 1 - s of float32 similarities s)
// are exact as long as they fit into 53 bits. In general the dual variables are off by units of the last
// place, so after each exchange that stands the f_v are computed anew from u, and the largest reduced cost of
// a pair with flow is held against 1e-12 of the largest cost; pairs beyond that lose their flow, which is
// then placed anew. Every sum is taken in one order and every choice among equals takes the lowest index, so
// results are the same for all instruction sets and numbers of threads.
//
// Rejected: a network simplex, whose warm start needs a tree (of k + V - 1 pairs, of which k have no flow
// here) and whose pivots look at all k V pairs; heaps of distances, which cost more than a look at V numbers
// that lie in the first cache; the search from the sinks that lack units, which would scan columns.
#include "cpu/transport.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>

#include "core/simd.h"
#include "core/threads.h"

namespace fc {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kSlackness = 1e-12;  // of the largest cost
constexpr double kMost = 0x1p500;     // sums of as many costs as there are pairs stay finite
constexpr int64_t kPad = 8;           // lanes of the widest vectors
constexpr int kRepairs = 4;
constexpr double kBidStep = 1e-2;  // of the range of costs
constexpr int64_t kBids = 64;      // per sink, at most
constexpr int64_t kNear = 64;      // sinks of an item that a bound by ways looks at, and more
constexpr int64_t kHeap = 64;      // up to so many smallest numbers are kept while the others stream by
constexpr int64_t kPairs = int64_t{1} << 20;
constexpr size_t kPrices = 8;                      // that are kept for each source that leaves
constexpr int64_t kPriceBytes = int64_t{1} << 25;  // for all
constexpr double kSettled = -1;

using Lanes = simd::Vec<double>;
using Mask = typename simd::Types<double>::I;
constexpr int kLanes = simd::kWidth<double>;

Lanes load_wide(const double* p) { return simd::load(p); }

Lanes load_wide(const float* p) {
  typedef float Half __attribute__((vector_size(simd::kBytes / 2)));
  Half half;
  std::memcpy(&half, p, sizeof(half));
  return __builtin_convertvector(half, Lanes);
}

Lanes smaller(Lanes a, Lanes b) { return a < b ? a : b; }

// A sum whose rounding errors are summed too (Neumaier), in the order of the calls.
class ExactSum {
 public:
  void add(double x) {
    const double total = sum_ + x;
    lost_ += std::fabs(sum_) >= std::fabs(x) ? (sum_ - total) + x : (x - total) + sum_;
    sum_ = total;
  }
  void add_product(double a, double b) {
    const double product = a * b;
    add(product);
    lost_ += std::fma(a, b, -product);
  }
  double value() const { return sum_ + lost_; }

 private:
  double sum_ = 0, lost_ = 0;
};

struct Share {
  int32_t source;
  int64_t units;
  double cost;
};

template <class T>
class Solver final : public Transport<T> {
 public:
  Solver(const TensorView<const T, 2>& costs, const double* u, int threads, std::function<bool()> poll)
      : k_(costs.rows()),
        sinks_(costs.cols()),
        stride_((sinks_ + kPad - 1) / kPad * kPad),
        width_((k_ + kPad - 1) / kPad * kPad),
        team_(threads, std::move(poll)) {
    const int64_t common = std::gcd(k_, sinks_);
    mass_ = sinks_ / common;
    share_ = k_ / common;
    total_ = static_cast<double>(k_) * static_cast<double>(mass_);
    costs_.assign(k_ * stride_, std::numeric_limits<T>::infinity());
    for (int64_t s = 0; s < k_; ++s) {
      const T* const from = costs.row(s);
      check_costs(from, "costs", s);
      std::copy(from, from + sinks_, row(s));
    }
    u_.assign(width_, 0.0);
    for (int64_t s = 0; u && s < k_; ++s) {
      if (!(std::fabs(u[s]) <= kMost))
        throw std::invalid_argument("u: expected finite numbers, got " + std::to_string(u[s]) +
                                    " at position " + std::to_string(s));
      u_[s] = u[s];
    }
    f_.assign(stride_, 0.0);
    first_.assign(stride_, kInfinity);
    second_ = distance_ = first_;
    owner_.assign(stride_, 0);
    parent_.assign(stride_, 0);
    shares_.resize(sinks_);
    sinks_of_.resize(k_);
    need_.assign(sinks_, share_);
    supply_.assign(k_, mass_);
    left_ = k_ * mass_;
    seen_.assign(k_, 0);
    source_distance_.assign(k_, 0.0);
    via_.assign(k_, -1);
    transposed_.assign(sinks_ * width_, std::numeric_limits<T>::infinity());
    for (int64_t s = 0; s < k_; ++s) {
      for (int64_t v = 0; v < sinks_; ++v) transposed_[v * width_ + s] = row(s)[v];
    }
    if (!u) bid();
    solve();
    columns_.resize(k_ * width_);
    for (int64_t t = 0; t < k_; ++t) compute_column(t);
    hands_.assign(k_ * width_, kInfinity);
    ways_.resize(k_);
    prices_.resize(k_);
    slot_.assign(k_, -1);
    height_.assign(width_, 0.0);
    entries_ = open_ = height_;
    scratch_.assign(2 * stride_, 0.0);
    entering_.assign(stride_, std::numeric_limits<T>::infinity());
    entering_columns_.assign(width_, kInfinity);
    label_.assign(width_, kInfinity);
    next_.assign(width_, -1);
  }

  int64_t sources() const override { return k_; }
  int64_t sinks() const override { return sinks_; }
  double value() const override { return value_; }
  double gap() const override { return gap_; }
  double slackness() const override { return slackness_; }
  const std::vector<double>& source_duals() const override {
    duals_.assign(u_.begin(), u_.begin() + k_);
    return duals_;
  }
  const std::vector<double>& sink_duals() const override {
    duals_.assign(f_.begin(), f_.begin() + sinks_);
    return duals_;
  }

  int64_t flow_count() const override {
    int64_t count = 0;
    for (const auto& shares : shares_) count += static_cast<int64_t>(shares.size());
    return count;
  }

  void flows(int64_t* source, int64_t* sink, int64_t* units) const override {
    int64_t at = 0;
    for (int64_t v = 0; v < sinks_; ++v) {
      for (const Share& share : shares_[v]) {
        source[at] = share.source;
        sink[at] = v;
        units[at++] = share.units;
      }
    }
  }

  double exchange(int64_t place, const TensorView<const T, 1>& given, double ceiling) override {
    check_place(place);
    for (int64_t v = 0; v < sinks_; ++v) check(static_cast<double>(given(v)), "row", 0, v);
    const double value = try_exchange(place, given, ceiling);
    if (value < ceiling) {
      keep();
      settle();
      return value_;
    }
    take_back();
    return kInfinity;
  }

  BestExchange best_exchange(const TensorView<const T, 2>& costs,
                             const std::vector<ExchangeBound>& candidates, double ceiling, double enough,
                             int64_t most) override {
    BestExchange best{-1, ceiling, 0};
    const int64_t count = static_cast<int64_t>(candidates.size());
    prepare();
    std::vector<std::vector<double>> entries(costs.rows());
    for (int64_t i = 0; i < count && i < most && candidates[i].bound < best.value; ++i) {
      if (best.index >= 0 && best.value <= enough) break;
      const auto& [r, place, low] = candidates[i];
      check_place(place);
      check_row(r, costs.rows());
      const T* const c = costs.row(r);
      if (entries[r].empty()) {
        check_costs(c, "costs", r);
        find_entries(c, entries[r]);
      }
      const double value = score(place, c, entries[r], best.value);
      best.tried = i + 1;
      if (value < best.value) best = {i, value, i + 1};
      team_.check();
    }
    return best;
  }

  std::vector<ExchangeBound> bounds(const TensorView<const T, 2>& costs, double goal, int64_t most,
                                    bool by_ways, double* lowest) override {
    const int64_t count = costs.rows();
    for (int64_t r = 0; r < count; ++r) check_costs(costs.row(r), "costs", r);
    if (by_ways) find_all_ways();
    std::vector<ExchangeBound> kept;
    const int64_t chunk = std::max<int64_t>(1, ThreadTeam::kWorthwhile / stride_);
    const int64_t block = std::max(chunk, kPairs / k_ / chunk * chunk);  // rows whose pairs are held at once
    std::vector<std::vector<double>> scratch(team_.size());
    std::vector<WayScratch> of_ways(team_.size());
    std::vector<std::vector<ExchangeBound>> found(std::min(block, count));
    for (int64_t start = 0; start < count; start += block) {
      const int64_t rows = std::min(block, count - start);
      team_.parallel_for(rows, chunk, [&](int thread, int64_t begin, int64_t end) {
        std::vector<double>& mine = scratch[thread];
        mine.resize(2 * stride_ + k_);
        for (int64_t r = begin; r < end; ++r) {
          found[r].clear();
          lowest[start + r] =
              bound(costs.row(start + r), start + r, goal, mine.data(), most > 0 ? &found[r] : nullptr);
          if (by_ways && !found[r].empty()) tighten(costs.row(start + r), goal, found[r], of_ways[thread]);
        }
      });
      for (int64_t r = 0; r < rows; ++r) kept.insert(kept.end(), found[r].begin(), found[r].end());
      if (static_cast<int64_t>(kept.size()) > most) {
        std::nth_element(kept.begin(), kept.begin() + most, kept.end(), lower);
        kept.resize(most);
      }
      if (start + block >= count) std::sort(kept.begin(), kept.end(), lower);
    }
    return kept;
  }

 private:
  T* row(int64_t s) { return costs_.data() + s * stride_; }
  const T* row(int64_t s) const { return costs_.data() + s * stride_; }

  static bool lower(const ExchangeBound& a, const ExchangeBound& b) {
    return a.bound != b.bound ? a.bound < b.bound : a.row != b.row ? a.row < b.row : a.place < b.place;
  }

  static void check_row(int64_t r, int64_t rows) {
    if (r < 0 || r >= rows)
      throw std::invalid_argument("rows: expected a row in [0, " + std::to_string(rows) + "), got " +
                                  std::to_string(r));
  }

  void check_place(int64_t place) const {
    if (place < 0 || place >= k_)
      throw std::invalid_argument("place: expected a source in [0, " + std::to_string(k_) + "), got " +
                                  std::to_string(place));
  }

  static void check(double cost, const char* name, int64_t s, int64_t v) {
    if (!(std::fabs(cost) <= kMost))
      throw std::invalid_argument(std::string(name) + " must be finite and below 2^500 in magnitude, got " +
                                  std::to_string(cost) + " at row " + std::to_string(s) + ", column " +
                                  std::to_string(v));
  }

  void check_costs(const T* c, const char* name, int64_t s) const {
    bool fine = true;
    for (int64_t v = 0; v < sinks_; ++v) fine &= std::fabs(static_cast<double>(c[v])) <= kMost;
    for (int64_t v = 0; !fine && v < sinks_; ++v) check(static_cast<double>(c[v]), name, s, v);
  }

  // --- flows ---

  double cost(int64_t s, int64_t v) const {
    return static_cast<double>(s == entering_place_ ? entering_[v] : row(s)[v]);
  }

  // Changes the flow of a pair, and what its source and its sink lack with it.
  void add(int64_t s, int64_t v, int64_t units) {
    auto& shares = shares_[v];
    auto at = shares.begin();
    while (at != shares.end() && at->source != s) ++at;
    if (at == shares.end()) {
      shares.push_back({static_cast<int32_t>(s), units, cost(s, v)});
      sinks_of_[s].push_back(static_cast<int32_t>(v));
    } else if ((at->units += units) == 0) {
      *at = shares.back();
      shares.pop_back();
      auto& own = sinks_of_[s];
      *std::find(own.begin(), own.end(), static_cast<int32_t>(v)) = own.back();
      own.pop_back();
    }
    supply_[s] -= units;
    need_[v] -= units;
    left_ -= units;
  }

  void add_logged(int64_t s, int64_t v, int64_t units) {
    add(s, v, units);
    changes_.push_back({static_cast<int32_t>(s), static_cast<int32_t>(v), units});
  }

  int64_t units_of(int64_t s, int64_t v) const {
    for (const Share& share : shares_[v]) {
      if (share.source == s) return share.units;
    }
    return 0;
  }

  double plan_cost() const {
    ExactSum sum;
    for (int64_t v = 0; v < sinks_; ++v) {
      for (const Share& share : shares_[v]) sum.add_product(static_cast<double>(share.units), share.cost);
    }
    return sum.value() / total_;
  }

  double dual_value() const {
    ExactSum sum;
    for (int64_t s = 0; s < k_; ++s) sum.add_product(static_cast<double>(mass_), u_[s]);
    for (int64_t v = 0; v < sinks_; ++v) sum.add_product(static_cast<double>(share_), f_[v]);
    return sum.value();
  }

  // --- searches ---

  // Lowers the sinks' distances to those by way of source s, which lies at `base`.
  void relax(int64_t s, double base) {
    const T* const c = row(s);
    const Lanes u = simd::broadcast(u_[s]), from = simd::broadcast(base), zero{};
    const Mask self = Mask{} + s;
    for (int64_t v = 0; v < stride_; v += kLanes) {
      const Lanes reduced = load_wide(c + v) - u - simd::load(f_.data() + v);
      const Lanes now = simd::load(distance_.data() + v), by = from + (reduced > zero ? reduced : zero);
      const Mask nearer = by < now;
      Mask parent;
      std::memcpy(&parent, parent_.data() + v, sizeof(parent));
      parent = nearer ? self : parent;
      std::memcpy(parent_.data() + v, &parent, sizeof(parent));
      simd::store(distance_.data() + v, nearer ? by : now);
    }
  }

  // The nearest sink that is not settled, the lowest of equals; sinks() if there is none.
  int64_t nearest() const {
    Lanes least = simd::broadcast(kInfinity);
    const Lanes zero{}, far = simd::broadcast(kInfinity);
    for (int64_t v = 0; v < stride_; v += kLanes) {
      const Lanes d = simd::load(distance_.data() + v);
      least = smaller(d < zero ? far : d, least);
    }
    double most = least[0];
    for (int i = 1; i < kLanes; ++i) most = least[i] < most ? least[i] : most;
    if (most == kInfinity) return sinks_;
    int64_t v = 0;
    while (distance_[v] != most) ++v;
    return v;
  }

  void settle_sink(int64_t v, double d) {
    distance_[v] = kSettled;
    settled_.push_back({v, d});
  }

  void visit(int64_t s, double d, int64_t by) {
    seen_[s] = 1;
    source_distance_[s] = d;
    via_[s] = by;
    members_.push_back(s);
    relax(s, d);
    // Its sinks lie at the same distance, and lead to no source that was not seen.
    for (const int32_t v : sinks_of_[s]) {
      if (distance_[v] < 0 || need_[v] > 0) continue;
      bool all = true;
      for (const Share& share : shares_[v]) all = all && seen_[share.source];
      if (all) settle_sink(v, d);
    }
  }

  // Searches from all sources with units left until the sinks found lack as many, moves the dual variables
  // and sends units along the paths. False if the dual value [units] reaches `ceiling` on the way.
  bool search(double ceiling) {
    std::fill(distance_.begin(), distance_.end(), kInfinity);
    for (const int64_t s : members_) seen_[s] = 0;
    members_.clear();
    settled_.clear();
    ends_.clear();
    for (int64_t s = 0; s < k_; ++s) {
      if (supply_[s] > 0) visit(s, 0, -1);
    }
    const double supply = static_cast<double>(left_);
    int64_t found = 0;
    double reached = 0;  // sum of the distances of the units found
    double key = 0;
    while (found < left_) {
      const int64_t v = nearest();
      key = distance_[v];
      // key * (supply - found) + reached is what the dual value has risen by.
      if (dual_ + key * (supply - static_cast<double>(found)) + reached >= ceiling) return false;
      settle_sink(v, key);
      if (need_[v] > 0) {
        ends_.push_back(v);
        found += need_[v];
        reached += key * static_cast<double>(need_[v]);
      }
      for (size_t i = 0; found < left_ && i < shares_[v].size(); ++i) {
        const int64_t s = shares_[v][i].source;
        if (!seen_[s]) visit(s, key, v);
      }
    }
    dual_ += key * (supply - static_cast<double>(found)) + reached;
    for (const int64_t s : members_) move(&u_[s], key - source_distance_[s]);
    for (const auto& [v, d] : settled_) move(&f_[v], d - key);
    for (const int64_t end : ends_) augment(end);
    return true;
  }

  void move(double* dual, double by) {
    moved_.push_back({dual, *dual});
    *dual += by;
  }

  // Sends as many units to `end` as its path takes by now.
  void augment(int64_t end) {
    int64_t units = need_[end];
    for (int64_t v = end; units > 0;) {
      const int64_t s = parent_[v];
      if (via_[s] < 0) {
        units = std::min(units, supply_[s]);
        break;
      }
      units = std::min(units, units_of(s, via_[s]));
      v = via_[s];
    }
    if (units == 0) return;
    for (int64_t v = end;;) {
      const int64_t s = parent_[v];
      add_logged(s, v, units);
      if (via_[s] < 0) break;
      v = via_[s];
      add_logged(s, v, -units);
    }
  }

  bool route(double ceiling) {
    while (left_ > 0) {
      team_.check();
      if (!search(ceiling)) return false;
    }
    return true;
  }

  // --- exchanges ---

  // Exchanges a source, and returns the transport cost, or infinity if its bound reaches the ceiling. keep()
  // or take_back() has to follow.
  double try_exchange(int64_t place, const TensorView<const T, 1>& given, double ceiling) {
    const double most = ceiling * total_;
    for (int64_t v = 0; v < sinks_; ++v) entering_[v] = given(v);
    const double entering_dual = least_reduced(entering_.data());
    dual_ = dual_start_ + static_cast<double>(mass_) * (entering_dual - u_[place]);
    if (dual_ >= most) return kInfinity;
    deficits_.assign(sinks_of_[place].begin(), sinks_of_[place].end());
    std::sort(deficits_.begin(), deficits_.end());
    for (const int64_t v : deficits_) {
      moved_.push_back({&f_[v], f_[v]});
      add_logged(place, v, -units_of(place, v));
    }
    entering_place_ = place;
    moved_.push_back({&u_[place], u_[place]});
    u_[place] = entering_dual;
    std::fill(entering_columns_.begin(), entering_columns_.end(), kInfinity);
    for (int64_t v = 0; v < sinks_; ++v) {
      for (const Share& share : shares_[v]) {
        double& least = entering_columns_[share.source];
        least = std::min(least, static_cast<double>(entering_[v]) - share.cost);
      }
    }
    while (supply_[place] > 0) {
      if (!place_along_one_path(most)) return kInfinity;
    }
    return plan_cost();
  }

  // Finds the shortest path from the entering source to a sink that lacks units, backwards from these sinks
  // over the sources, moves the dual variables and sends units. False if the dual value reaches `most`.
  bool place_along_one_path(double most) {
    const int64_t place = entering_place_;
    std::fill(label_.begin(), label_.end(), kInfinity);
    double entry = kInfinity;  // the entering source's distance
    for (const int64_t v : deficits_) {
      const T* const c = transposed_.data() + v * width_;
      const Lanes f = simd::broadcast(f_[v]);
      for (int64_t s = 0; s < width_; s += kLanes)
        simd::store(label_.data() + s,
                    smaller(load_wide(c + s) - simd::load(u_.data() + s) - f, simd::load(label_.data() + s)));
      entry = std::min(entry, static_cast<double>(entering_[v]) - u_[place] - f_[v]);
    }
    const Lanes zero{}, far = simd::broadcast(kInfinity);
    for (int64_t s = 0; s < width_; s += kLanes) {
      const Lanes label = simd::load(label_.data() + s);
      simd::store(label_.data() + s, label > zero ? label : zero);
    }
    entry = std::max(entry, 0.0);
    for (int64_t s = k_; s < width_; ++s) label_[s] = kInfinity;
    label_[place] = kSettled;
    std::fill(next_.begin(), next_.end(), -1);
    members_.clear();
    int64_t entry_next = -1;
    double key = 0;
    const double left = static_cast<double>(supply_[place]);
    while (true) {
      Lanes least = far;
      for (int64_t s = 0; s < width_; s += kLanes) {
        const Lanes label = simd::load(label_.data() + s);
        least = smaller(label < zero ? far : label, least);
      }
      key = least[0];
      for (int i = 1; i < kLanes; ++i) key = least[i] < key ? least[i] : key;
      if (entry <= key) break;
      if (dual_ + key * left >= most) return false;
      int64_t t = 0;
      while (label_[t] != key) ++t;
      label_[t] = kSettled;
      members_.push_back(t);
      source_distance_[t] = key;
      const double* const column = columns_.data() + t * width_;
      const Lanes from = simd::broadcast(key), dual = simd::broadcast(u_[t]);
      const Mask self = Mask{} + t;
      for (int64_t s = 0; s < width_; s += kLanes) {
        const Lanes reduced = simd::load(column + s) - simd::load(u_.data() + s) + dual;
        const Lanes now = simd::load(label_.data() + s), by = from + (reduced > zero ? reduced : zero);
        const Mask nearer = by < now;
        Mask next;
        std::memcpy(&next, next_.data() + s, sizeof(next));
        next = nearer ? self : next;
        std::memcpy(next_.data() + s, &next, sizeof(next));
        simd::store(label_.data() + s, nearer ? by : now);
      }
      const double by = key + std::max(0.0, entering_columns_[t] - u_[place] + u_[t]);
      if (by < entry) {
        entry = by;
        entry_next = t;
      }
    }
    if (dual_ + entry * left >= most) return false;
    dual_ += entry * left;
    for (const int64_t t : members_) move(&u_[t], source_distance_[t] - entry);
    for (const int64_t v : deficits_) f_[v] += entry;

    // The path: each source takes over a sink of the next, the last one a sink that lacks units.
    path_.clear();
    int64_t units = supply_[place];
    for (int64_t s = place, t = entry_next;; s = t, t = next_[t]) {
      const int64_t v = t < 0 ? cheapest_deficit(s) : cheapest_of(s, t);
      path_.push_back({s, v, t});
      units = std::min(units, t < 0 ? need_[v] : units_of(t, v));
      if (t < 0) break;
    }
    for (const auto& [s, v, t] : path_) {
      add_logged(s, v, units);
      if (t >= 0) add_logged(t, v, -units);
    }
    for (const auto& [s, v, t] : path_) {
      if (t >= 0) change_column(t);
    }
    if (need_[path_.back().sink] == 0)
      deficits_.erase(std::find(deficits_.begin(), deficits_.end(), path_.back().sink));
    return true;
  }

  // --- scores ---

  // What scores and bounds by ways need of the flow that stands.
  void prepare() {
    if (prepared_) return;
    for (int64_t s = 0; s < k_; ++s) {
      for (int64_t t = 0; t < k_; ++t) hands_[s * width_ + t] = columns_[t * width_ + s];
    }
    served_.clear();
    for (int64_t v = 0; v < sinks_; ++v) {
      for (const Share& share : shares_[v])
        served_.push_back({static_cast<int32_t>(v), share.source, share.cost});
    }
    for (auto& way : ways_) way.clear();
    all_ways_ = false;
    forget_prices();
    std::fill(seen_.begin(), seen_.end(), 0);
    prepared_ = true;
  }

  static double least_of(Lanes lanes) {
    double least = lanes[0];
    for (int i = 1; i < kLanes; ++i) least = lanes[i] < least ? lanes[i] : least;
    return least;
  }

  // The first of values [width] that is not above their least.
  int64_t position(const std::vector<double>& values, double least) const {
    for (int64_t s = 0;; s += kLanes) {
      const uint32_t above =
          simd::greater_mask<double>(simd::load(values.data() + s), simd::broadcast(least));
      if (const uint32_t found = ~above & ((1u << kLanes) - 1)) return s + __builtin_ctz(found);
    }
  }

  // The least reduced costs [width] at which each source can hand sinks on until a sink of `place` is taken
  // over; infinite beyond the sources.
  const std::vector<double>& ways_to(int64_t place) {
    std::vector<double>& way = ways_[place];
    if (!way.empty()) return way;
    way.assign(width_, kInfinity);
    std::vector<double> label(width_, kInfinity), dual = u_;  // the duals of sources found are -infinity
    for (int64_t s = k_; s < width_; ++s) dual[s] = -kInfinity;
    const Lanes zero{}, far = simd::broadcast(kInfinity);
    double key = 0;
    for (int64_t t = place;; t = position(label, key)) {
      way[t] = key;
      label[t] = kInfinity;
      dual[t] = -kInfinity;
      const double* const column = columns_.data() + t * width_;
      const Lanes from = simd::broadcast(key), own = simd::broadcast(u_[t]);
      Lanes least = far;
      for (int64_t s = 0; s < width_; s += kLanes) {
        const Lanes reduced = simd::load(column + s) - simd::load(dual.data() + s) + own;
        const Lanes by = from + (reduced > zero ? reduced : zero);
        const Lanes now = smaller(by, simd::load(label.data() + s));
        simd::store(label.data() + s, now);
        least = smaller(now, least);
      }
      key = least_of(least);
      if (key == kInfinity) return way;
    }
  }

  void find_all_ways() {
    prepare();
    if (all_ways_) return;
    from_.assign(k_ * width_, kInfinity);
    team_.parallel_for(k_, 1, [&](int, int64_t begin, int64_t end) {
      for (int64_t place = begin; place < end; ++place) {
        const std::vector<double>& way = ways_to(place);
        for (int64_t s = 0; s < k_; ++s) from_[s * width_ + place] = way[s];
      }
    });
    all_ways_ = true;
  }

  struct WayScratch {
    std::vector<std::pair<double, int32_t>> nearest;
    std::vector<double> least, way, bounds;
  };

  // Raises the bounds of exchanges for an item with costs c, and keeps those that stay below `goal`.
  void tighten(const T* c, double goal, std::vector<ExchangeBound>& exchanges, WayScratch& scratch) const {
    find_way_bounds(c, scratch);
    size_t kept = 0;
    for (ExchangeBound exchange : exchanges) {
      exchange.bound = std::max(exchange.bound, scratch.bounds[exchange.place]);
      if (exchange.bound < goal) exchanges[kept++] = exchange;
    }
    exchanges.resize(kept);
  }

  // Bounds [k] of the exchanges of every source for an item with costs c: its units enter at different sinks,
  // as many as a sink takes, and each goes the shortest way to a sink of the source that leaves.
  void find_way_bounds(const T* c, WayScratch& scratch) const {
    const int64_t wanted = (mass_ + share_ - 1) / share_;  // sinks, the last one perhaps in part
    const int64_t near = std::min(sinks_, kNear + 2 * ((sinks_ + k_ - 1) / k_));
    auto& nearest = scratch.nearest;
    nearest.resize(sinks_);
    for (int64_t v = 0; v < sinks_; ++v)
      nearest[v] = {static_cast<double>(c[v]) - f_[v], static_cast<int32_t>(v)};
    std::nth_element(nearest.begin(), nearest.begin() + near - 1, nearest.end());
    std::sort(nearest.begin(), nearest.begin() + near);
    // least [wanted, width]: the shortest ways from different sinks, ascending. Sinks that are not looked at
    // are as far as the last one at least.
    const double rest = near < sinks_ ? nearest[near - 1].first : kInfinity;
    auto& least = scratch.least;
    least.assign(wanted * width_, rest);
    auto& way = scratch.way;
    way.resize(width_);
    double* const last = least.data() + (wanted - 1) * width_;
    for (int64_t i = 0; i < near; ++i) {
      const auto& [d, v] = nearest[i];
      if (i % 8 == 0 && d >= *std::max_element(last, last + k_)) break;
      const auto& shares = shares_[v];
      const double* from = from_.data() + shares[0].source * width_;
      if (shares.size() > 1) {
        std::copy(from, from + width_, way.begin());
        for (const Share& share : shares) {
          const double* const other = from_.data() + share.source * width_;
          for (int64_t s = 0; s < width_; ++s) way[s] = std::min(way[s], other[s]);
        }
        from = way.data();
      }
      const Lanes start = simd::broadcast(d);
      for (int64_t s = 0; s < width_; s += kLanes) {
        Lanes x = start + simd::load(from + s);
        if (!simd::greater_mask<double>(simd::load(last + s), x)) continue;
        for (int64_t j = 0; j < wanted; ++j) {
          double* const at = least.data() + j * width_ + s;
          const Lanes now = simd::load(at);
          simd::store(at, smaller(x, now));
          x = x < now ? now : x;
        }
      }
    }
    auto& bounds = scratch.bounds;
    bounds.assign(k_, 0.0);
    int64_t left = mass_;
    for (int64_t j = 0; j < wanted; ++j) {
      const int64_t units = std::min(left, share_);
      for (int64_t s = 0; s < k_; ++s) bounds[s] += static_cast<double>(units) * least[j * width_ + s];
      left -= units;
    }
    for (int64_t s = 0; s < k_; ++s)
      bounds[s] = (dual_start_ + bounds[s] - static_cast<double>(mass_) * u_[s]) / total_;
  }

  // What it costs an item with costs c [V] to take over a sink of each source, [width].
  void find_entries(const T* c, std::vector<double>& entries) const {
    entries.assign(width_, kInfinity);
    for (const auto& [v, s, cost] : served_) {
      const double by = static_cast<double>(c[v]) - cost;
      entries[s] = by < entries[s] ? by : entries[s];
    }
  }

  // Dual variables under which `place` has left: of the sinks, and the sum of the others' times their units.
  struct Prices {
    std::vector<double> f;  // [stride]
    double sum;
  };

  // The transport cost after the exchange of `place` for an item with costs c [V], which is not made, or
  // infinity if it reaches the ceiling.
  //
  // The units go along shortest paths from the item, one after the other. The first path is the item's least
  // cost to take over a sink plus the way from there, which is known for all items once it is for `place`;
  // with these ways as potentials ("heights") the searches see where the sinks that lack units are. What a
  // search for one item has found out about prices without `place` bounds the scores of the others: where
  // that reaches the ceiling, nothing is searched.
  double score(int64_t place, const T* c, const std::vector<double>& entries, double ceiling) {
    const double most = ceiling * total_;
    std::copy(c, c + sinks_, entering_.begin());
    auto& prices = prices_[place];
    for (const Prices& known : prices) {
      if (price_bound(known) >= most) return kInfinity;
    }
    const std::vector<double>& way = ways_to(place);
    Lanes nearest = simd::broadcast(kInfinity);
    for (int64_t s = 0; s < width_; s += kLanes) {
      const Lanes height = simd::load(u_.data() + s) + simd::load(way.data() + s);
      simd::store(height_.data() + s, height);
      nearest = smaller(simd::load(entries.data() + s) + height, nearest);
    }
    for (int64_t s = k_; s < width_; ++s) height_[s] = 0;
    spent_ = dual_start_ - static_cast<double>(mass_) * u_[place];
    if (spent_ + static_cast<double>(mass_) * least_of(nearest) >= most) return kInfinity;
    std::copy(entries.begin(), entries.end(), entries_.begin());
    deficits_.assign(sinks_of_[place].begin(), sinks_of_[place].end());
    std::sort(deficits_.begin(), deficits_.end());
    for (const int64_t v : deficits_) add_logged(place, v, -units_of(place, v));
    entering_place_ = place;
    bool whole = true;
    while (whole && supply_[place] > 0) whole = place_along_heights(most);
    const double value = whole ? plan_cost() : kInfinity;
    keep_prices(place);
    take_back();
    for (const int64_t t : changed_) slot_[t] = -1;
    changed_.clear();
    return value;
  }

  // Finds the shortest path from the entering source to a sink that lacks units and sends units along it.
  // False if the cost [units] then reaches `most` for certain.
  bool place_along_heights(double most) {
    const int64_t place = entering_place_;
    const double left = static_cast<double>(supply_[place]);
    const Lanes zero{}, far = simd::broadcast(kInfinity);
    Lanes least = far;
    for (int64_t s = 0; s < width_; s += kLanes) {
      const Lanes height = simd::load(height_.data() + s), label = simd::load(entries_.data() + s) + height;
      simd::store(label_.data() + s, label);
      simd::store(open_.data() + s, height);
      least = smaller(label, least);
    }
    for (const int64_t t : changed_) open_[t] = kInfinity;
    members_.clear();
    double key = least_of(least);
    bool cut;
    while (!(cut = spent_ + key * left >= most)) {
      const int64_t s = position(label_, key);
      if (s == place) break;
      label_[s] = open_[s] = kInfinity;
      seen_[s] = 1;
      members_.push_back(s);
      source_distance_[s] = key;
      const double* const hand = hands_.data() + s * width_;
      const Lanes from = simd::broadcast(key), height = simd::broadcast(height_[s]);
      least = far;
      for (int64_t t = 0; t < width_; t += kLanes) {
        const Lanes reduced = simd::load(hand + t) - height + simd::load(open_.data() + t);
        const Lanes by = from + (reduced > zero ? reduced : zero);
        const Lanes label = smaller(by, simd::load(label_.data() + t));
        simd::store(label_.data() + t, label);
        least = smaller(label, least);
      }
      double next = least_of(least);
      for (const int64_t t : changed_) {
        if (seen_[t]) continue;
        label_[t] = std::min(label_[t], by_way_of(s, t));
        next = std::min(next, label_[t]);
      }
      key = next;
    }
    if (!cut) {
      // The path, backwards: each source takes over a sink of the next.
      path_.clear();
      int64_t units = supply_[place], before = static_cast<int64_t>(members_.size());
      for (int64_t t = place; t >= 0;) {
        double shortest = entries_[t] + height_[t];
        int64_t s = -1;
        for (int64_t i = 0, end = before; i < end; ++i) {
          const double by = by_way_of(members_[i], t);
          if (by < shortest) {
            shortest = by;
            s = members_[i];
            before = i;
          }
        }
        const int64_t v =
            t == place ? cheapest_deficit(s < 0 ? place : s) : cheapest_of(s < 0 ? place : s, t);
        path_.push_back({s < 0 ? place : s, v, t});
        units = std::min(units, t == place ? need_[v] : units_of(t, v));
        t = s;
      }
      for (const auto& [s, v, t] : path_) {
        add_logged(s, v, units);
        if (t != place) add_logged(t, v, -units);
      }
      if (need_[path_.front().sink] == 0)
        deficits_.erase(std::find(deficits_.begin(), deficits_.end(), path_.front().sink));
      for (const auto& [s, v, t] : path_) change_hands(t);
      spent_ += key * static_cast<double>(units);
    }
    for (const int64_t s : members_) {
      height_[s] += key - source_distance_[s];
      seen_[s] = 0;
    }
    return !cut;
  }

  // The length of the path by way of s, which was found, to t.
  double by_way_of(int64_t s, int64_t t) const {
    const double hand = slot_[t] < 0 ? columns_[t * width_ + s] : changed_columns_[slot_[t] * width_ + s];
    return source_distance_[s] + std::max(0.0, hand - height_[s] + height_[t]);
  }

  // After the sinks of t, or those that `place` has left behind, have changed.
  void change_hands(int64_t t) {
    const auto& sinks = t == entering_place_ ? deficits_ : sinks_of_[t];
    if (slot_[t] < 0) {
      slot_[t] = static_cast<int64_t>(changed_.size());
      changed_.push_back(t);
      if (changed_columns_.size() < changed_.size() * width_)
        changed_columns_.resize(changed_.size() * width_);
    }
    compute_column(t, sinks, changed_columns_.data() + slot_[t] * width_);
    double least = kInfinity;
    for (const int32_t v : sinks)
      least = std::min(least, static_cast<double>(entering_[v]) - static_cast<double>(row(t)[v]));
    entries_[t] = least;
  }

  void keep_prices(int64_t place) {
    auto& prices = prices_[place];
    if (prices.size() == kPrices) {
      prices.erase(prices.begin());
    } else if (++prices_kept_ > std::max<int64_t>(1, kPriceBytes / (8 * stride_))) {
      forget_prices();
      prices_kept_ = 1;
    }
    prices.push_back(prices_now());
  }

  void forget_prices() {
    for (auto& prices : prices_) prices.clear();
    prices_kept_ = 0;
  }

  // The prices that the score in progress has come to.
  Prices prices_now() {
    const int64_t place = entering_place_;
    Prices prices{std::vector<double>(stride_, 0.0), 0};
    ExactSum sum;
    for (int64_t s = 0; s < k_; ++s) {
      if (s != place) sum.add(static_cast<double>(mass_) * height_[s]);
    }
    height_[place] = -kInfinity;  // it has left
    for (int64_t v = 0; v < sinks_; ++v) {
      double least = kInfinity;
      for (const Share& share : shares_[v]) {
        if (share.source != place) least = std::min(least, share.cost - height_[share.source]);
      }
      if (least == kInfinity) {
        const T* const c = transposed_.data() + v * width_;
        Lanes all = simd::broadcast(kInfinity);
        for (int64_t s = 0; s < width_; s += kLanes)
          all = smaller(load_wide(c + s) - simd::load(height_.data() + s), all);
        least = least_of(all);
      }
      prices.f[v] = least;
      sum.add(static_cast<double>(share_) * least);
    }
    prices.sum = sum.value();
    return prices;
  }

  // A bound [units] of the cost after `place` has given way to the entering item.
  double price_bound(const Prices& prices) {
    const int64_t share = (sinks_ + k_ - 1) / k_;
    smallest(entering_.data(), prices.f.data(), share, scratch_.data(), scratch_.data() + stride_);
    const double* const d = scratch_.data() + stride_;
    const double y = d[share - 1];
    double excess = 0;
    for (int64_t i = 0; i < share; ++i) excess += y - d[i];
    return prices.sum + (static_cast<double>(mass_) * y - static_cast<double>(share_) * excess);
  }

  // The sink of t that s takes over at the least cost.
  int64_t cheapest_of(int64_t s, int64_t t) const {
    double least = kInfinity;
    int64_t at = -1;
    for (const int32_t v : sinks_of_[t]) {
      const double by = cost(s, v) - cost(t, v);
      if (by < least) {
        least = by;
        at = v;
      }
    }
    return at;
  }

  int64_t cheapest_deficit(int64_t s) const {
    double least = kInfinity;
    int64_t at = -1;
    for (const int64_t v : deficits_) {
      const double by = cost(s, v) - f_[v];
      if (by < least) {
        least = by;
        at = v;
      }
    }
    return at;
  }

  // columns_[t, s] = min C_sv - C_tv over the sinks v of t: what it costs s to take over a sink of t.
  template <class Sinks>
  void compute_column(int64_t t, const Sinks& sinks, double* column) const {
    std::fill(column, column + width_, kInfinity);
    for (const auto v : sinks) {
      const T* const c = transposed_.data() + v * width_;
      const Lanes own = simd::broadcast(static_cast<double>(c[t]));
      for (int64_t s = 0; s < width_; s += kLanes)
        simd::store(column + s, smaller(load_wide(c + s) - own, simd::load(column + s)));
    }
  }

  void compute_column(int64_t t) { compute_column(t, sinks_of_[t], columns_.data() + t * width_); }

  // After the sinks of t have changed.
  void change_column(int64_t t) {
    const double* const column = columns_.data() + t * width_;
    saved_columns_.push_back(t);
    saved_.insert(saved_.end(), column, column + width_);
    compute_column(t);
    double least = kInfinity;
    for (const int32_t v : sinks_of_[t])
      least = std::min(least, static_cast<double>(entering_[v]) - cost(t, v));
    entering_columns_[t] = least;
  }

  void forget() {
    changes_.clear();
    moved_.clear();
    saved_columns_.clear();
    saved_.clear();
    entering_place_ = -1;
  }

  // Makes the exchange that was tried.
  void keep() {
    const int64_t place = entering_place_;
    std::copy(entering_.begin(), entering_.begin() + sinks_, row(place));
    for (int64_t v = 0; v < sinks_; ++v) transposed_[v * width_ + place] = entering_[v];
    for (int64_t t = 0; t < k_; ++t) columns_[t * width_ + place] = entering_columns_[t];
    compute_column(place);
    forget();
  }

  void take_back() {
    // First what the entering source took, then what the other one had.
    const int64_t place = entering_place_;
    for (auto at = changes_.rbegin(); at != changes_.rend(); ++at) {
      if (at->source == place && at->units < 0) entering_place_ = -1;
      add(at->source, at->sink, -at->units);
    }
    for (auto at = moved_.rbegin(); at != moved_.rend(); ++at) *at->first = at->second;
    for (int64_t i = static_cast<int64_t>(saved_columns_.size()) - 1; i >= 0; --i)
      std::copy(saved_.begin() + i * width_, saved_.begin() + (i + 1) * width_,
                columns_.begin() + saved_columns_[i] * width_);
    forget();
  }

  // min_v (c_v - f_v).
  double least_reduced(const T* c) const {
    Lanes least = simd::broadcast(kInfinity);
    for (int64_t v = 0; v < stride_; v += kLanes)
      least = smaller(load_wide(c + v) - simd::load(f_.data() + v), least);
    double most = least[0];
    for (int i = 1; i < kLanes; ++i) most = least[i] < most ? least[i] : most;
    return most;
  }

  // --- solutions ---

  double largest_in(const T* c) const {
    T largest = 0;
    for (int64_t v = 0; v < sinks_; ++v) largest = std::max(largest, std::fabs(c[v]));
    return static_cast<double>(largest);
  }

  // f_v = min_s (C_sv - u_s), the source at which it is reached and the second smallest, for all sinks.
  void minima() {
    std::fill(first_.begin(), first_.end(), kInfinity);
    std::fill(second_.begin(), second_.end(), kInfinity);
    for (int64_t s = 0; s < k_; ++s) {
      const T* const c = row(s);
      const Lanes u = simd::broadcast(u_[s]);
      const Mask self = Mask{} + s;
      for (int64_t v = 0; v < stride_; v += kLanes) {
        const Lanes d = load_wide(c + v) - u, first = simd::load(first_.data() + v);
        const Mask lower = d < first;
        Mask owner;
        std::memcpy(&owner, owner_.data() + v, sizeof(owner));
        owner = lower ? self : owner;
        std::memcpy(owner_.data() + v, &owner, sizeof(owner));
        simd::store(second_.data() + v, smaller(lower ? first : d, simd::load(second_.data() + v)));
        simd::store(first_.data() + v, lower ? d : first);
      }
      if (s % 64 == 0) team_.check();
    }
    for (int64_t v = 0; v < sinks_; ++v) f_[v] = first_[v];
  }

  // Dual variables to begin with, by an auction: every sink bids for a place at the source that is cheapest
  // for it, by as much as it prefers that source to the next and a little more; the lowest bid at a source
  // loses its place when there are more than it has places, and is the source's price. Source: Bertsekas and
  // Castanon, "The auction algorithm for the transportation problem", Annals of Operations Research 20, 1989.
  void bid() {
    if (k_ == 1) return;
    const int64_t places = (sinks_ + k_ - 1) / k_;
    double least = kInfinity, most = -kInfinity;
    for (int64_t s = 0; s < k_; ++s) {
      for (int64_t v = 0; v < sinks_; ++v) {
        least = std::min(least, static_cast<double>(row(s)[v]));
        most = std::max(most, static_cast<double>(row(s)[v]));
      }
    }
    const double step = kBidStep * (most - least);
    std::vector<double> price(width_, 0.0);
    std::vector<std::vector<std::pair<double, int64_t>>> bids(k_);  // heaps, the lowest bid in front
    std::vector<int64_t> without(sinks_);
    std::iota(without.rbegin(), without.rend(), int64_t{0});
    for (int64_t count = 0; !without.empty() && count < kBids * sinks_; ++count) {
      if (count % 1024 == 0) team_.check();
      const int64_t v = without.back();
      without.pop_back();
      const T* const c = transposed_.data() + v * width_;
      Lanes first = simd::broadcast(kInfinity), second = first;
      for (int64_t s = 0; s < width_; s += kLanes) {
        const Lanes by = load_wide(c + s) + simd::load(price.data() + s);
        second = smaller(by < first ? first : by, second);
        first = smaller(by, first);
      }
      double best = first[0], next = second[0];
      for (int i = 1; i < kLanes; ++i) {
        next = std::min({next, second[i], std::max(best, static_cast<double>(first[i]))});
        best = std::min(best, static_cast<double>(first[i]));
      }
      int64_t s = 0;
      while (static_cast<double>(c[s]) + price[s] != best) ++s;
      auto& mine = bids[s];
      mine.push_back({price[s] + (next - best) + step, v});
      std::push_heap(mine.begin(), mine.end(), std::greater<>());
      if (static_cast<int64_t>(mine.size()) > places) {
        std::pop_heap(mine.begin(), mine.end(), std::greater<>());
        without.push_back(mine.back().second);
        mine.pop_back();
      }
      if (static_cast<int64_t>(mine.size()) == places) price[s] = std::max(price[s], mine.front().first);
    }
    for (int64_t s = 0; s < k_; ++s) u_[s] = -price[s];
  }

  void solve() {
    minima();
    for (int64_t v = 0; v < sinks_; ++v) {
      const int64_t s = owner_[v], units = std::min(need_[v], supply_[s]);
      if (units > 0) add(s, v, units);
    }
    dual_ = dual_value();
    route(kInfinity);
    settle();
  }

  // Computes f and what follows from it anew, and places anew what lies at pairs that are not tight enough.
  void settle() {
    double largest = 0;
    for (int64_t s = 0; s < k_; ++s) largest = std::max(largest, largest_in(row(s)));
    for (int attempt = 0;; ++attempt) {
      changes_.clear();
      moved_.clear();
      minima();
      slackness_ = 0;
      const double most = kSlackness * largest;
      for (int64_t v = 0; v < sinks_; ++v) {
        for (const Share& share : shares_[v])
          slackness_ = std::max(slackness_, share.cost - u_[share.source] - f_[v]);
      }
      if (slackness_ <= most) break;
      if (attempt == kRepairs)
        throw std::runtime_error("the transport of " + std::to_string(k_) + " sources and " +
                                 std::to_string(sinks_) + " sinks violates complementary slackness by " +
                                 std::to_string(slackness_ / largest) +
                                 " of the largest cost; scale the costs to [0, 1]");
      for (int64_t v = 0; v < sinks_; ++v) {
        const std::vector<Share> shares = shares_[v];
        for (const Share& share : shares) {
          if (share.cost - u_[share.source] - f_[v] > 0) add(share.source, v, -share.units);
        }
      }
      dual_ = dual_value();
      route(kInfinity);
      changes_.clear();
      moved_.clear();
      if (!columns_.empty()) {
        for (int64_t t = 0; t < k_; ++t) compute_column(t);
      }
    }
    prepared_ = false;
    dual_start_ = dual_value();
    value_ = plan_cost();
    gap_ = std::max(0.0, value_ - dual_start_ / total_);
    // What leaving costs each source, and the room of its sinks' duals.
    loss_.assign(k_, 0.0);
    for (int64_t v = 0; v < sinks_; ++v) {
      second_[v] = k_ > 1 ? second_[v] - first_[v] : 0.0;
      loss_[owner_[v]] += second_[v];
    }
    for (int64_t v = sinks_; v < stride_; ++v) second_[v] = -1;
    for (int64_t s = 0; s < k_; ++s)
      loss_[s] = loss_[s] / static_cast<double>(sinks_) - u_[s] / static_cast<double>(k_);
  }

  // d [stride] = c_v - f_v, infinite beyond the sinks, and the `count` smallest of them, sorted, in some
  // [stride].
  void smallest(const T* c, const double* f, int64_t count, double* d, double* some) const {
    for (int64_t v = 0; v < sinks_; ++v) d[v] = static_cast<double>(c[v]) - f[v];
    for (int64_t v = sinks_; v < stride_; ++v) d[v] = kInfinity;
    if (count <= kHeap) {
      int64_t kept = 0;
      double most = kInfinity;
      for (int64_t v = 0; v < stride_; v += kLanes) {
        for (uint32_t mask = simd::greater_mask<double>(simd::broadcast(most), simd::load(d + v)); mask;
             mask &= mask - 1) {
          const double x = d[v + __builtin_ctz(mask)];
          if (!(x < most)) continue;
          int64_t at = kept < count ? kept++ : count - 1;
          for (; at > 0 && some[at - 1] > x; --at) some[at] = some[at - 1];
          some[at] = x;
          if (kept == count) most = some[count - 1];
        }
      }
    } else {
      std::copy(d, d + sinks_, some);
      std::nth_element(some, some + count - 1, some + sinks_);
      std::sort(some, some + count);
    }
  }

  // The lowest bound of the exchanges of one item with costs c; d [2 stride + k] is scratch.
  double bound(const T* c, int64_t r, double goal, double* d, std::vector<ExchangeBound>* pairs) const {
    double* const saved = d + 2 * stride_;
    const int64_t share = (sinks_ + k_ - 1) / k_;
    double* const some = d + stride_;
    smallest(c, f_.data(), share, d, some);
    const double y = some[share - 1];
    double excess = 0;
    for (int64_t i = 0; i < share; ++i) excess += y - some[i];
    const double per_sink = 1 / static_cast<double>(sinks_);
    const double start = dual_start_ / total_ + (y / static_cast<double>(k_) - excess * per_sink);
    std::fill(saved, saved + k_, 0.0);
    const Lanes at = simd::broadcast(y), zero{};
    for (int64_t v = 0; v < stride_; v += kLanes) {
      const Lanes above = simd::load(d + v) - at;
      const Lanes rest = simd::load(second_.data() + v) - (above > zero ? above : zero);
      for (uint32_t mask = simd::greater_mask<double>(rest, zero); mask; mask &= mask - 1) {
        const int lane = __builtin_ctz(mask);
        saved[owner_[v + lane]] += rest[lane];
      }
    }
    double lowest = kInfinity;
    for (int64_t s = 0; s < k_; ++s) {
      const double value = start + (loss_[s] - saved[s] * per_sink);
      lowest = value < lowest ? value : lowest;
      if (pairs && value < goal) pairs->push_back({r, s, value});
    }
    return lowest;
  }

  struct Change {
    int32_t source, sink;
    int64_t units;
  };

  const int64_t k_, sinks_, stride_, width_;
  int64_t mass_ = 0, share_ = 0;  // units of a source, of a sink
  double total_ = 0;              // units
  std::vector<T> costs_;          // [k, stride], infinite beyond the sinks
  std::vector<T> transposed_;     // [V, width], infinite beyond the sources
  std::vector<double> columns_;   // [k, width]
  std::vector<double> u_, f_;
  mutable std::vector<double> duals_;
  std::vector<std::vector<Share>> shares_;      // [V]
  std::vector<std::vector<int32_t>> sinks_of_;  // [k]
  std::vector<int64_t> need_, supply_;          // units that sinks and sources lack
  int64_t left_ = 0;                            // their sum
  double dual_ = 0;                             // the dual value [units] by now
  double dual_start_ = 0, value_ = 0, gap_ = 0, slackness_ = 0;
  std::vector<Change> changes_;  // what take_back() takes back
  std::vector<std::pair<double*, double>> moved_;
  std::vector<int64_t> saved_columns_;  // columns that were changed, and what they were
  std::vector<double> saved_;
  // Of the exchange that is tried.
  int64_t entering_place_ = -1;
  std::vector<T> entering_;               // [stride]
  std::vector<double> entering_columns_;  // [width], the entering source's entries of columns_
  std::vector<int32_t> deficits_;         // sinks that lack units, ascending
  std::vector<double> label_;             // [width], distances to them
  std::vector<int64_t> next_;             // [width], the next source on the way; -1: such a sink comes next
  struct Step {
    int64_t source, sink, owner;
  };
  std::vector<Step> path_;
  // Of scores and bounds by ways.
  bool prepared_ = false;
  std::vector<double> hands_;              // [k, width], columns_ transposed
  std::vector<std::vector<double>> ways_;  // of each source that leaves, [width] or not known
  bool all_ways_ = false;
  std::vector<double> from_;                 // [k, width], ways_ transposed once all are known
  std::vector<std::vector<Prices>> prices_;  // of each source that leaves
  int64_t prices_kept_ = 0;
  struct Served {
    int32_t sink, source;
    double cost;
  };
  std::vector<Served> served_;
  // Of the score that is computed.
  double spent_ = 0;                      // the cost [units] without the units that are left
  std::vector<double> entries_, height_;  // [width]
  std::vector<double> open_;     // [width], the heights of sources that were neither found nor changed
  std::vector<double> scratch_;  // [2 stride]
  std::vector<int64_t> changed_, slot_;  // sources whose sinks have changed; the place of each there, or -1
  std::vector<double> changed_columns_;  // theirs, as columns_
  // Of the search that runs.
  std::vector<double> distance_;  // [stride]
  std::vector<int64_t> parent_;   // [stride]
  std::vector<char> seen_;
  std::vector<double> source_distance_;
  std::vector<int64_t> via_, members_, ends_;
  std::vector<std::pair<int64_t, double>> settled_;
  // For bounds.
  std::vector<double> first_, second_;  // [stride]; second_ less first_ after settle()
  std::vector<int64_t> owner_;
  std::vector<double> loss_;
  ThreadTeam team_;
};

}  // namespace

template <class T>
std::unique_ptr<Transport<T>> transport(const TensorView<const T, 2>& costs, const double* u, int threads,
                                        std::function<bool()> poll) {
  return std::make_unique<Solver<T>>(costs, u, threads, std::move(poll));
}

template std::unique_ptr<Transport<float>> transport(const TensorView<const float, 2>&, const double*, int,
                                                     std::function<bool()>);
template std::unique_ptr<Transport<double>> transport(const TensorView<const double, 2>&, const double*, int,
                                                      std::function<bool()>);

}  // namespace fc
