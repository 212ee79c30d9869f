// Greedy facility location without the n x m matrix.
//
// Every gain is an exact 64-bit integer (see similarity_source.h), so everything below only decides which
// gains are computed when: the picks are those of the plain greedy algorithm, bit for bit, whatever the
// number of threads or the memory.
//
//   lazy: gains only fall as picks are made, so an old gain bounds the new one. A heap holds the bounds;
//   candidates are evaluated from its top, a batch at a time, until the best fresh gain beats every bound
//   left (candidate_heap.h).
//
//   sweeps (sweeps.h): in the first picks the bounds are so loose that a large part of all candidates would
//   be evaluated. When the candidates above the best fresh gain cost more than bringing everybody up to date,
//   all gains are corrected for just the clients whose best similarity changed since the last sweep; and if
//   clients and candidates are the same points, the full sweep needs half of the products. So a pick never
//   costs more than 0.6 n evaluations, nor much more than n times the share of clients it changed.
//
//   live pairs: once few pairs can still win anything, a candidate's evaluation leaves behind the list of its
//   live pairs, and later evaluations read that list (live_lists.h).
//
//   matrix: if the whole matrix fits the memory budget it is computed once (half of it, mirrored, for self
//   clients).
//
// Cost on clustered points (n = 100,000, 100 clusters, k = 1,000): see benchmarks/. Rejected: partial sums by
// client block, which need n x blocks numbers and save less than correcting for the changed clients.
#include "cpu/facility_location.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <utility>
#include <vector>

#include "core/threads.h"
#include "cpu/candidate_heap.h"
#include "cpu/live_lists.h"
#include "cpu/lookahead.h"
#include "cpu/matrix_source.h"
#include "cpu/point_source.h"
#include "cpu/sweeps.h"

namespace fc {
namespace {

// The least e with value <= 2^e; std::log2 rounds what is just above a power of two down to it.
int ceil_log2(double value) {
  int exponent = 0;
  return std::frexp(value, &exponent) > 0.5 ? exponent : exponent - 1;
}

template <class T>
class Greedy final : public FacilityLocation {
 public:
  Greedy(std::unique_ptr<Source<T>> source, PointSource<T>* points, bool distance, GreedyOptions options)
      : source_(std::move(source)),
        points_(points),
        floor_(distance ? static_cast<T>(-options.offset) : T(0)),
        options_(std::move(options)),
        team_(options_.threads, options_.poll),
        chosen_(source_->candidates(), 0) {
    for (int64_t p = 0; p < options_.preselected_count; ++p) chosen_[options_.preselected[p]] = 1;
  }

  int64_t candidates() const override { return source_->candidates(); }
  int64_t clients() const override { return source_->clients(); }
  int64_t picks() const override { return static_cast<int64_t>(picked_.size()); }
  bool is_open(int64_t candidate) const override { return !chosen_[candidate]; }
  GreedyStats stats() const override { return stats_; }

  double work() const override {
    const double n = static_cast<double>(candidates()), m = static_cast<double>(clients());
    double first = n * m;
    if (points_) {
      first = static_cast<double>(points_->all_pairs());
      if (Lookahead<T>::pays(*points_, now())) first += n * Lookahead<T>::survey_clients(m);
    }
    const double done = static_cast<double>(stats_.pairs) + team_.share() * static_cast<double>(stats_.ahead);
    return done / std::max(first, 1.0);
  }

  int64_t step(int64_t count, bool naive) override {
    prepare();
    while (count-- > 0 && pick(naive, -std::numeric_limits<double>::infinity()) >= 0) {
    }
    return picks();
  }

  int64_t pick(bool naive, double stop_gain) override {
    prepare();
    if (left() == 0) return -1;
    team_.check();
    const Entry best = naive ? best_of_all() : best_lazily();
    if (static_cast<double>(gain_of(best)) / scale_ < stop_gain) {
      heap_valid_ = false;  // the best was taken off the heap
      return -1;
    }
    commit(best);
    return best.candidate;
  }

  void close(const int64_t* candidates, int64_t count) override {
    for (int64_t i = 0; i < count; ++i) {
      closed_ += !chosen_[candidates[i]];
      chosen_[candidates[i]] = 1;
    }
    heap_valid_ = false;
  }

  int64_t step_among(const int64_t* candidates, int64_t count) override {
    prepare();
    team_.check();
    CandidateHeap sample;
    for (int64_t i = 0; i < count; ++i) sample.append_unordered({bound_[candidates[i]], candidates[i]});
    sample.order();
    heap_valid_ = false;  // the heap holds bounds that this pick improves
    commit(select(sample, nullptr));
    return picked_.back();
  }

  double finish(int64_t* indices, double* gains, double* weights, int64_t* assignment) override {
    prepare();
    const int64_t m = clients();
    std::copy(picked_.begin(), picked_.end(), indices);
    for (int64_t p = 0; p < picks(); ++p) gains[p] = static_cast<double>(gain_[p]) / scale_;
    std::copy_n(owner_.data(), m, assignment);
    if (options_.self_clients) {
      for (int64_t p = 0; p < picks(); ++p) {
        if (serves_itself_[p]) assignment[picked_[p]] = p;
      }
    }
    std::fill_n(weights, picks(), 0.0);
    double objective = 0;
    for (int64_t i = 0; i < m; ++i) {
      const double w = options_.weight(i);
      if (assignment[i] >= 0) weights[assignment[i]] += w;
      objective += w * (static_cast<double>(cover_.best[i]) - static_cast<double>(floor_));
    }
    return objective;
  }

 private:
  static constexpr int64_t kNever = -1;
  // Units of the fixed-point sums that all similarities together are worth at the least.
  static constexpr double kLeastUnits = 0x1p30;

  int64_t left() const { return candidates() - options_.preselected_count - closed_ - picks(); }

  // Everything up to the first pick. Runs once; after an exception, again.
  void prepare() {
    if (prepared_) return;
    const int64_t n = candidates(), m = clients();
    const double bound = source_->prepare(options_, team_);
    if (!(bound <= std::numeric_limits<double>::max() / 4)) {
      throw std::invalid_argument(
          "x: the sum of a candidate's similarities overflows the range of a double; scale x or the weights "
          "down");
    }
    scale_ = 1;
    if (bound > 0) {
      const double* const w = options_.weights;
      const double heaviest = w == nullptr ? 1.0 : *std::max_element(w, w + m);
      const int room = 61 - ceil_log2(bound);
      // Scaled weights have to stay in the range of T, and the scale itself in that of double.
      const int most = (sizeof(T) == 4 ? 126 : 1000) - ceil_log2(heaviest);
      scale_ = std::ldexp(1.0, std::min({room, most, 1000}));
      if (bound * scale_ < kLeastUnits) {
        throw std::invalid_argument(
            "x: similarities times weights are so close to the smallest numbers of the type that gains "
            "would be lost; scale x or the weights up");
      }
    }
    cover_ = Cover<T>(m, floor_);
    for (int64_t i = 0; i < m; ++i) cover_.weight[i] = static_cast<T>(options_.weight(i) * scale_);
    owner_ = Buffer<int64_t>(m, int64_t{-1});
    row_ = Buffer<T>(checked_mul(round_up(m, Tile<T>::kCols), source_->sample_rows()));
    if (options_.preselected_count > 0) before_ = Buffer<T>(m, std::numeric_limits<T>::lowest());
    for (int64_t p = 0; p < options_.preselected_count; ++p) {
      const int64_t j = options_.preselected[p];
      source_->similarities(&j, 1, row_.data(), m, team_);
      for (int64_t i = 0; i < m; ++i) {
        before_[i] = std::max(before_[i], row_[i]);
        improve(i, row_[i], -1);
      }
    }
    int64_t list_bytes = options_.memory_budget;
    const int64_t matrix_bytes = saturated_mul(saturated_mul(n, m), sizeof(T));
    if (points_ && matrix_bytes <= options_.memory_budget) {
      auto matrix = std::make_unique<MatrixSource<T>>(points_->matrix(team_, stats_), n, m);
      points_ = nullptr;
      source_ = std::move(matrix);
      row_ = Buffer<T>(checked_mul(m, source_->sample_rows()));
      list_bytes -= matrix_bytes;
    }
    lists_ = std::make_unique<LiveLists<T>>(n, m, list_bytes);
    bound_ = Buffer<int64_t>(n, INT64_MAX);
    if (options_.costs != nullptr) exact_gain_ = Buffer<int64_t>(n, int64_t{0});
    stamp_ = Buffer<int64_t>(n, kNever);
    prepared_ = true;
  }

  bool fresh(int64_t j) const { return stamp_[j] == picks() || bound_[j] == 0; }

  void set_gain(int64_t j, int64_t gain) {
    bound_[j] = pick_key(gain, options_.costs, j);
    if (options_.costs != nullptr) exact_gain_[j] = gain;
    stamp_[j] = picks();
  }

  // Of a candidate whose bound is exact.
  int64_t gain_of(const Entry& e) const {
    return options_.costs == nullptr ? e.bound : exact_gain_[e.candidate];
  }

  // ---- choosing

  Entry best_of_all() {
    std::vector<int64_t> open;
    for (int64_t j = 0; j < candidates(); ++j) {
      if (!chosen_[j]) open.push_back(j);
    }
    std::vector<int64_t> gains(open.size());
    source_->evaluate(open.data(), static_cast<int64_t>(open.size()), cover_, nullptr, gains.data(), team_,
                      stats_);
    stats_.evaluations += static_cast<int64_t>(open.size());
    heap_valid_ = false;
    Entry best{-1, INT64_MAX};
    for (size_t i = 0; i < open.size(); ++i) {
      set_gain(open[i], gains[i]);
      if (const Entry e{bound_[open[i]], open[i]}; e.better_than(best)) best = e;
    }
    return best;
  }

  Entry best_lazily() {
    if (!sweeps_.any()) first_sweep();
    use_foreseen();
    if (!heap_valid_) rebuild_heap();
    heap_valid_ = false;  // until the candidates taken off the heap are back
    std::vector<int64_t> taken;
    const Entry best = select(heap_, &taken);
    for (const int64_t j : taken) {
      if (j != best.candidate) heap_.push({bound_[j], j});
    }
    heap_valid_ = true;
    return best;
  }

  void rebuild_heap() {
    heap_.clear();
    for (int64_t j = 0; j < candidates(); ++j) {
      if (!chosen_[j]) heap_.append_unordered({bound_[j], j});
    }
    heap_.order();
    heap_valid_ = true;
  }

  // Takes candidates off the heap until the best of them has a fresh gain that beats every bound left on it.
  // With `taken`, the heap holds all open candidates: those taken off are noted in `taken`, more may be
  // evaluated than this pick needs, or all brought up to date.
  Entry select(CandidateHeap& heap, std::vector<int64_t>* taken) {
    if (!listing_) consider_listing();
    Entry best{-1, INT64_MAX};
    std::vector<int64_t> batch;
    int64_t size = listing_ ? 16 : std::max<int64_t>(8, source_->batch(team_) / 2);
    for (bool first = true;; first = false) {
      batch.clear();
      while (!heap.empty() && static_cast<int64_t>(batch.size()) < size && heap.top().better_than(best)) {
        const Entry e = heap.pop();
        if (taken) taken->push_back(e.candidate);
        if (fresh(e.candidate)) {
          best = {bound_[e.candidate], e.candidate};
        } else {
          batch.push_back(e.candidate);
        }
      }
      if (batch.empty()) return best;
      if (taken && listing_) fill_up(heap, batch, *taken);
      evaluate(batch);
      for (const int64_t j : batch) {
        if (const Entry e{bound_[j], j}; e.better_than(best)) best = e;
      }
      if (first && taken && sweep_pays(best)) {
        sweep();
        taken->clear();
        rebuild_heap();
        const Entry top = heap.pop();
        taken->push_back(top.candidate);
        return top;
      }
      size = std::min<int64_t>(2 * size, 1024);
    }
  }

  // A source that wants large batches gets further candidates without a list: these candidates would come up
  // within a few picks.
  void fill_up(CandidateHeap& heap, std::vector<int64_t>& batch, std::vector<int64_t>& taken) {
    int64_t without = 0;
    for (const int64_t j : batch) without += !lists_->has(j);
    if (without == 0 || lists_full_until_ > picks()) return;
    const int64_t wanted = source_->batch(team_);
    std::vector<Entry> passed;
    for (int64_t tries = 4 * wanted; without < wanted && tries > 0 && !heap.empty() && heap.top().bound > 0;
         --tries) {
      const Entry e = heap.pop();
      if (fresh(e.candidate) || lists_->has(e.candidate)) {
        passed.push_back(e);
        continue;
      }
      taken.push_back(e.candidate);
      batch.push_back(e.candidate);
      ++without;
    }
    for (const Entry& e : passed) heap.push(e);
  }

  // Fresh gains for a batch, from lists for candidates that have one.
  void evaluate(const std::vector<int64_t>& batch) {
    std::vector<int64_t> listed, others;
    int64_t length = 0;
    for (const int64_t j : batch) {
      (lists_->has(j) ? listed : others).push_back(j);
      length += lists_->length(j);
    }
    // Below some ten microseconds of work another thread is not worth waking.
    const int64_t chunk = length < 40000 ? static_cast<int64_t>(listed.size()) : 8;
    team_.parallel_for(static_cast<int64_t>(listed.size()), chunk, [&](int, int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        set_gain(listed[i], lists_->evaluate(listed[i], cover_.best.data(), cover_.weight.data()));
      }
    });
    stats_.list_reads += length;
    stats_.evaluations += static_cast<int64_t>(batch.size());
    if (others.empty()) return;
    const bool store = listing_ && picks() >= lists_full_until_;
    std::vector<int64_t> gains(others.size());
    source_->evaluate(others.data(), static_cast<int64_t>(others.size()), cover_,
                      store ? lists_.get() : nullptr, gains.data(), team_, stats_);
    for (size_t i = 0; i < others.size(); ++i) set_gain(others[i], gains[i]);
    if (store && lists_->take_overflow() && lists_->compact() < 0.2) {
      // Lists shrink as picks are made: try again when there are a fifth more.
      lists_full_until_ = picks() + picks() / 5 + 1;
    }
  }

  // ---- sweeps

  // Whether evaluating every candidate above `best` would cost more than bringing all of them up to date.
  bool sweep_pays(const Entry& best) const {
    if (!points_) return false;
    int64_t above = 0;
    for (int64_t j = 0; j < candidates(); ++j)
      above += bound_[j] > best.bound && !chosen_[j] && stamp_[j] != picks() && !lists_->has(j);
    return static_cast<double>(above) > std::min(points_->sweep_cost(1), sweeps_.correction_cost(cover_));
  }

  // Exact gains of all open candidates.
  void sweep() {
    if (sweeps_.any() && points_ && sweeps_.correction_cost(cover_) < points_->sweep_cost(1)) {
      sweeps_.correct(*points_, chosen_, cover_, team_, stats_);
    } else {
      Buffer<int64_t> gains(candidates());
      source_->sweep({&cover_}, {gains.data()}, team_, stats_);
      sweeps_.take(std::move(gains), left());
    }
    finish_sweep();
    ++stats_.sweeps;
  }

  // Makes the gains of the last sweep everybody's.
  void finish_sweep() {
    if (points_) sweeps_.remember(cover_, clients());
    for (int64_t j = 0; j < candidates(); ++j) {
      if (!chosen_[j]) set_gain(j, sweeps_.gain(j));
    }
    heap_valid_ = false;
  }

  typename Lookahead<T>::State now() const {
    return {cover_, chosen_, floor_, picks(), options_.expected_picks};
  }

  void first_sweep() {
    if (!points_ || !Lookahead<T>::pays(*points_, now())) return sweep();
    sweeps_.take(lookahead_.sweep(*points_, now(), team_, stats_), left());
    finish_sweep();
    ++stats_.sweeps;
  }

  // Takes over the gains foreseen for the present state, if the state came as foreseen.
  void use_foreseen() {
    if (!lookahead_.has(picks())) return;
    sweeps_.take(lookahead_.take(), left());
    finish_sweep();
    ++stats_.foreseen;
  }

  // ---- lists

  // Starts keeping lists once a sample of candidates says that the lists would fit and be short. Checks at
  // picks 1, 2, 3, 4, 6, 8, 12, ...
  void consider_listing() {
    if (picks() < next_look_ || lists_->capacity() == 0) return;
    next_look_ = picks() + std::max<int64_t>(1, picks() / 3);
    const int64_t n = candidates(), m = clients(), count = std::min(n, source_->sample_rows());
    std::vector<int64_t> index(count);
    for (int64_t i = 0; i < count; ++i) index[i] = i * n / count;
    source_->similarities(index.data(), count, row_.data(), m, team_);
    int64_t live = 0;
    for (int64_t r = 0; r < count; ++r) {
      for (int64_t i = 0; i < m; ++i) live += row_[r * m + i] > cover_.best[i];
    }
    const double density = static_cast<double>(live) / static_cast<double>(std::max<int64_t>(count * m, 1));
    listing_ =
        density <= source_->list_density() && density * static_cast<double>(n) * static_cast<double>(m) <=
                                                  0.7 * static_cast<double>(lists_->capacity());
  }

  // ---- picking

  void commit(const Entry& pick) {
    const int64_t j = pick.candidate, position = picks();
    const bool itself = options_.self_clients &&
                        (options_.preselected_count == 0 || !(before_[j] > source_->self_similarity(j)));
    cover_with(j, position);
    chosen_[j] = 1;
    picked_.push_back(j);
    lookahead_.picked(j, position);
    gain_.push_back(gain_of(pick));
    serves_itself_.push_back(itself);
  }

  // Gives every client that candidate j serves better than before to the pick at `position`.
  void cover_with(int64_t j, int64_t position) {
    if (lists_->has(j)) {
      const uint32_t* client = lists_->clients(j);
      const T* value = lists_->values(j);
      for (int64_t e = 0; e < lists_->length(j); ++e) improve(client[e], value[e], position);
      lists_->forget(j);
      return;
    }
    source_->similarities(&j, 1, row_.data(), clients(), team_);
    for (int64_t i = 0; i < clients(); ++i) improve(i, row_[i], position);
  }

  void improve(int64_t client, T value, int64_t position) {
    if (!(value > cover_.best[client])) return;
    cover_.best[client] = value;
    owner_[client] = position;
  }

  std::unique_ptr<Source<T>> source_;
  PointSource<T>* points_;  // source_, if it is a PointSource and no matrix was made of it
  const T floor_;
  const GreedyOptions options_;
  ThreadTeam team_;
  std::vector<char> chosen_;  // picked, preselected or closed
  int64_t closed_ = 0;
  GreedyStats stats_;

  bool prepared_ = false;
  double scale_ = 1;
  Cover<T> cover_;
  Buffer<T> before_;       // each client's similarity to the nearest of the preselected
  Buffer<int64_t> owner_;  // the pick that serves each client
  Buffer<T> row_;

  std::vector<int64_t> picked_, gain_;
  std::vector<char> serves_itself_;

  Buffer<int64_t> bound_, stamp_;  // an upper bound of each pick_key, and after how many picks it was exact
  Buffer<int64_t> exact_gain_;     // with costs: the gain at that time
  CandidateHeap heap_;
  bool heap_valid_ = false;

  Sweeps<T> sweeps_;
  Lookahead<T> lookahead_;

  std::unique_ptr<LiveLists<T>> lists_;
  bool listing_ = false;
  int64_t next_look_ = 1, lists_full_until_ = 0;
};

}  // namespace

template <class T>
std::unique_ptr<FacilityLocation> facility_location_points(TensorView<const T, 2> x,
                                                           const TensorView<const T, 2>* clients,
                                                           Metric metric, GreedyOptions options) {
  auto source = std::make_unique<PointSource<T>>(x, clients, metric, options.offset);
  PointSource<T>* points = source.get();
  return std::make_unique<Greedy<T>>(std::move(source), points, is_distance(metric), std::move(options));
}

template <class T>
std::unique_ptr<FacilityLocation> facility_location_matrix(TensorView<const T, 2> s, GreedyOptions options) {
  const bool distance = options.offset > 0;
  const T floor = distance ? static_cast<T>(-options.offset) : T(0);
  return std::make_unique<Greedy<T>>(std::make_unique<MatrixSource<T>>(s, floor), nullptr, distance,
                                     std::move(options));
}

template <class T>
std::unique_ptr<FacilityLocation> facility_location_sparse(SparseRows<T> s, GreedyOptions options) {
  return std::make_unique<Greedy<T>>(std::make_unique<SparseSource<T>>(s), nullptr, false,
                                     std::move(options));
}

#define FC_INSTANTIATE(T)                                                                        \
  template std::unique_ptr<FacilityLocation> facility_location_points<T>(                        \
      TensorView<const T, 2>, const TensorView<const T, 2>*, Metric, GreedyOptions);             \
  template std::unique_ptr<FacilityLocation> facility_location_matrix<T>(TensorView<const T, 2>, \
                                                                         GreedyOptions);         \
  template std::unique_ptr<FacilityLocation> facility_location_sparse<T>(SparseRows<T>, GreedyOptions);
FC_INSTANTIATE(float)
FC_INSTANTIATE(double)
#undef FC_INSTANTIATE

}  // namespace fc
