// Greedy facility location on the GPU: one cooperative kernel makes any number of picks without the host.
//
// Gains are the exact 64-bit integers of the CPU kernel (docs/numerics.md),
//   gain(j) = sum_i trunc(max(0, s(j, i) - best_i) * weight_i),   weights times a power of two,
// so integer atomics may add them up in any order, and picks and gains equal the CPU's, bit for bit, wherever
// a pair's value does. A pick takes rounds of
//   reduce   fold in the sums of the last round; the best up-to-date gain and the best old gain (a bound)
//   list     the candidates whose bound beats the best up-to-date gain
//   evaluate their gains: tiles of candidates x clients, summed in registers along a strip of clients
// until no bound beats the best gain. If the list would cost more than a sweep, which corrects the gains of
// all candidates for just those clients whose best similarity changed since the last sweep, a sweep is made
// instead. Then one flat tile row brings best_i up to date. Between these steps the grid meets.
//
// Cost: one n x m x d product for the first gains; after pick p about m / p clients have changed, so a pick
// never costs more than n m d / p or the evaluations that plain lazy greedy would make, whichever is less.
// Memory: a packed copy of the points and about 40 bytes per candidate and client; never n x m. Rejected: one
// kernel per phase, launched by the host, which has to read from the device to know which is next; a heap,
// whose walks are serial; the symmetric half product for the first gains, whose column sums would need as
// many atomics as pairs of tiles.
#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "cuda/device_buffer.h"
#include "cuda/facility_location.h"
#include "cuda/facility_location_ends.cuh"
#include "cuda/facility_location_picks.cuh"
#include "cuda/facility_location_state.cuh"
#include "cuda/launch.h"
#include "cuda/pace.h"
#include "cuda/pack.cuh"

namespace fc::cuda {
namespace {

// The room left below 2^31 lets loops step by a whole grid without overflow.
constexpr int64_t kMostPoints = INT32_MAX - (1 << 21);

int blocks_for(int64_t threads) {
  return static_cast<int>(std::min<int64_t>(std::max<int64_t>((threads + kThreads - 1) / kThreads, 1), 4096));
}

template <class T>
class Greedy final : public FacilityLocation {
 public:
  Greedy(TensorView<const T, 2> x, const TensorView<const T, 2>* clients, const Metric* metric,
         const GreedyOptions& options, cudaStream_t stream)
      : x_(x), options_(options), stream_(stream), pace_(stream, options.poll) {
    const bool points = metric != nullptr;
    const int64_t n = x.rows(), m = !points ? x.cols() : clients != nullptr ? clients->rows() : n;
    if (n > kMostPoints || m > kMostPoints) {
      throw std::invalid_argument("x: the GPU kernel takes at most " + std::to_string(kMostPoints) +
                                  " candidates and clients, got " + std::to_string(n) + " and " +
                                  std::to_string(m));
    }
    if (points) clients_ = clients != nullptr ? *clients : x;
    separate_clients_ = points && clients != nullptr;
    metric_ = points ? *metric : Metric::kDot;
    points_ = points;
    state_.n = static_cast<int>(n);
    state_.m = static_cast<int>(m);
    state_.self_clients = options.self_clients;
    state_.negate = points && is_distance(metric_);
    state_.root = points && metric_ == Metric::kEuclidean;
    form_ = form_of(metric_);
    chained_ = points && x.cols() > kChain;
    open_ = n - options.preselected_count;
    take_work_ = static_cast<double>(m) * static_cast<double>(points ? std::max<int64_t>(x.cols(), 1) : 1);
    sweep_work_ = static_cast<double>(n) * take_work_;
    at_once_ = options.work_at_once > 0 ? static_cast<double>(options.work_at_once)
                                        : (sizeof(T) == 4 ? 0x1p38 : 0x1p36);
    picks_at_once_ = at_once(sweep_work_);
    allocate();
    begin();
  }

  int64_t candidates() const override { return state_.n; }
  int64_t clients() const override { return state_.m; }
  int64_t picks() const override { return picks_; }

  int64_t completed() const override { return std::min(pace_.completed(), picks_); }

  int64_t step(int64_t count, bool naive) override {
    pace_.check_running();
    for (int64_t left = std::min(count, open_ - picks_); left > 0;) {
      const bool in_parts = start_sweep(naive);
      const int made = static_cast<int>(std::min(left, in_parts ? 1 : picks_at_once_));
      Task task{Domain{nullptr, state_.n}, static_cast<int>(picks_), made, naive};
      task.sweep.all_summed = in_parts;
      launch_greedy(task);
      swept_ = true;
      picks_ += made;
      left -= made;
      picks_at_once_ = pace_.next_count(picks_, made);
    }
    return picks_;
  }

  int64_t step_among(const int64_t* candidates, int64_t count) override {
    pace_.check_running();
    if (count < 1 || count > kMostPoints) {
      throw std::invalid_argument("candidates: expected 1 to " + std::to_string(kMostPoints) +
                                  " of them, got " + std::to_string(count));
    }
    if (count > sample_size_) {
      sample_ = DeviceBuffer<int>(count, stream_);
      sample_size_ = count;
    }
    const int size = static_cast<int>(count);
    launch(check_sample<T>, {dim3(1), dim3(kThreads), 0, stream_}, state_, candidates, size, sample_.data());
    launch_greedy({Domain{sample_.data(), size}, static_cast<int>(picks_), 1});
    pace_.launched(picks_ + 1);
    const Control control = read_control();
    if (control.refused) {
      // Else later picks would be refused because of it.
      check(cudaMemsetAsync(&state_.control->refused, 0, sizeof control.refused, stream_),
            "clearing device memory");
      throw std::invalid_argument("candidates: expected indices in [0, " + std::to_string(state_.n) +
                                  ") that are not chosen yet, got " + std::to_string(control.refused_as));
    }
    if (control.verdict != Verdict::kFine) return -1;
    ++picks_;
    return control.last_pick;
  }

  int64_t pick(bool naive, double stop_gain) override {
    pace_.check_running();
    if (picks_ >= open_) return -1;
    const bool in_parts = start_sweep(naive);
    Task task{Domain{nullptr, state_.n}, static_cast<int>(picks_), 1, naive};
    task.sweep.all_summed = in_parts;
    task.stop_gain = stop_gain;
    launch_greedy(task);
    swept_ = true;
    pace_.launched(picks_ + 1);
    const Control control = read_control();
    if (control.verdict != Verdict::kFine || control.last_pick < 0) return -1;
    ++picks_;
    return control.last_pick;
  }

  void close(const int64_t* candidates, int64_t count) override {
    pace_.check_running();
    if (count == 0) return;
    const DeviceBuffer<int64_t> copy(count, stream_);
    check(cudaMemcpyAsync(copy.data(), candidates, count * sizeof(int64_t), cudaMemcpyHostToDevice, stream_),
          "copying the candidates");
    launch(close_listed<T>, over(count), state_, copy.data(), static_cast<int>(count));
    open_ = state_.n - options_.preselected_count - read_control().closed;
  }

  void finish(int64_t* indices, double* gains, double* weights, int64_t* assignment, double* objective,
              double* offset) override {
    pace_.check_running();
    const int picks = static_cast<int>(picks_);
    launch(write<T>, over(std::max(state_.m, picks)), state_, picks, indices, gains, assignment);
    if (state_.self_clients) launch(serve_themselves<T>, over(picks), state_, picks, assignment);
    launch(sum_up<T>, {dim3(picks + 1), dim3(kThreads), 0, stream_}, state_, picks, options_.weights,
           assignment, weights);
    pace_.launched(picks_);
    const Control control = read_control();
    *objective = control.objective;
    *offset = control.offset;
  }

  Verdict verdict() const override { return verdict_; }

 private:
  Launch over(int64_t threads) const { return {dim3(blocks_for(threads)), dim3(kThreads), 0, stream_}; }

  // Candidates whose gains one part of a sweep sums, at least: a row of tiles.
  static constexpr int kPartRows = 128;
  static constexpr int64_t kMostPicksAtOnce = 1024;

  // How many pieces of so much work each go into one launch.
  int64_t at_once(double work) const {
    const auto most = static_cast<double>(kMostPicksAtOnce);
    return static_cast<int64_t>(std::max(1.0, std::min(most, at_once_ / std::max(work, 1.0))));
  }

  // Whether the sweep before the next pick is long, so that launches of its own have made its sums.
  bool start_sweep(bool naive) {
    const bool in_parts = (naive || !swept_) && sweep_work_ > at_once_ && state_.n > kPartRows;
    if (in_parts) sweep_in_parts();
    return in_parts;
  }

  void sweep_in_parts() {
    const double rows = at_once_ / std::max(take_work_, 1.0) / kPartRows;
    const int64_t length = kPartRows * std::max<int64_t>(static_cast<int64_t>(std::min(rows, 0x1p30)), 1);
    for (int64_t first = 0; first < state_.n; first += length) {
      Task task{Domain{nullptr, state_.n}, static_cast<int>(picks_), 1, true};
      task.sweep.first = static_cast<int>(first);
      task.sweep.count = static_cast<int>(std::min(length, state_.n - first));
      launch_greedy(task);
      pace_.launched(picks_);
    }
  }

  Control read_control() {
    pace_.wait();
    Control control;
    check(cudaMemcpyAsync(&control, state_.control, sizeof(Control), cudaMemcpyDeviceToHost, stream_),
          "reading the result");
    check(cudaStreamSynchronize(stream_), "facility location on the GPU");
    verdict_.kind = static_cast<Verdict::Kind>(control.verdict);
    verdict_.in_clients = control.in_clients != 0;
    const int64_t columns = verdict_.kind == Verdict::kNotFinite ? x_.cols() : 1;
    verdict_.row = control.error_at / columns;
    verdict_.column = control.error_at % columns;
    return control;
  }

  template <class U>
  U* buffer(DeviceBuffer<U>& owner, int64_t size) {
    owner = DeviceBuffer<U>(size, stream_);
    return owner.data();
  }

  void allocate() {
    const int64_t n = state_.n, m = state_.m, d = x_.cols();
    state_.control = buffer(control_, 1);
    bad_at_ = DeviceBuffer<BadAt>(1, stream_);
    long long* longs = buffer(candidate_longs_, 4 * n);
    state_.bound = longs;
    state_.sum = longs + n;
    state_.swept_gain = longs + 2 * n;
    state_.gain = longs + 3 * n;
    state_.costs = options_.costs;
    if (options_.costs != nullptr) state_.exact = buffer(exact_gains_, n);
    int* ints = buffer(candidate_ints_, 6 * n);
    state_.stamp = ints;
    state_.pending = ints + n;
    state_.open = ints + 2 * n;
    state_.list = ints + 3 * n;
    state_.picked = ints + 4 * n;
    state_.serves_itself = ints + 5 * n;
    T* values = buffer(client_values_, 4 * m);
    state_.best = values;
    state_.swept_best = values + m;
    state_.before = values + 2 * m;
    state_.weight = values + 3 * m;
    int* client_ints = buffer(client_ints_, 2 * m);
    state_.owner = client_ints;
    state_.changed_clients = client_ints + m;
    preselected_list_ = DeviceBuffer<int>(options_.preselected_count, stream_);
    if (points_) {
      packed_candidates_ = DeviceBuffer<T>(n * d, stream_);
      if (separate_clients_) packed_clients_ = DeviceBuffer<T>(m * d, stream_);
      state_.candidates = {packed_candidates_.data(), d, nullptr, state_.n};
      state_.clients = {separate_clients_ ? packed_clients_.data() : packed_candidates_.data(), d, nullptr,
                        state_.m};
    } else {
      state_.matrix = x_.data;
      state_.matrix_stride = x_.stride[0];
      state_.candidates = {nullptr, 0, nullptr, state_.n};
      state_.clients = {nullptr, 0, nullptr, state_.m};
    }
  }

  void begin() {
    BadAt* const bad_at = bad_at_.data();
    const int preselected = static_cast<int>(options_.preselected_count);
    launch(clear, over(1), state_.control, bad_at);
    launch(open_all<T>, over(state_.n), state_);
    if (preselected > 0) {
      launch(close_preselected<T>, over(preselected), state_, options_.preselected, preselected,
             preselected_list_.data(), bad_at);
    }
    unsigned long long* const largest = state_.control->largest;
    PrepareArguments prepare_arguments{};
    prepare_arguments.weights = options_.weights;
    prepare_arguments.largest = std::numeric_limits<T>::max() / 4;
    prepare_arguments.bad_at = bad_at;
    DeviceBuffer<double> candidate_norms, client_norms;
    const bool normalise = points_ && metric_ == Metric::kCosine;
    if (points_) {
      prepare_arguments.upper = metric_ == Metric::kCosine ? 1.001 : options_.offset;
      if (metric_ == Metric::kDot) {
        candidate_norms = DeviceBuffer<double>(state_.n, stream_);
        client_norms = DeviceBuffer<double>(state_.m, stream_);
        prepare_arguments.candidate_norms = candidate_norms.data();
        prepare_arguments.client_norms = separate_clients_ ? client_norms.data() : candidate_norms.data();
      } else if (metric_ != Metric::kCosine) {
        prepare_arguments.distances = true;
        prepare_arguments.find_offset = options_.find_offset;
        prepare_arguments.self = !separate_clients_;
        prepare_arguments.squared = metric_ == Metric::kSqeuclidean;
        prepare_arguments.largest = std::numeric_limits<T>::max();
      }
      launch_pack(x_, normalise, packed_candidates_.data(), candidate_norms.data(), &bad_at->candidate,
                  stream_);
      if (separate_clients_) {
        launch_pack(clients_, normalise, packed_clients_.data(), client_norms.data(), &bad_at->client,
                    stream_);
      }
      if (prepare_arguments.distances) find_farthest(largest);
    } else {
      prepare_arguments.matrix = true;
      prepare_arguments.upper = options_.offset;
      prepare_arguments.largest = std::numeric_limits<T>::max();
      launch(largest_of_matrix<T>, over(static_cast<int64_t>(state_.n) * state_.m), state_.matrix,
             state_.matrix_stride, state_.n, state_.m, largest + kOfMatrix, &bad_at->candidate);
    }
    launch(prepare<T>, {dim3(1), dim3(kThreads), 0, stream_}, state_, prepare_arguments);
    launch(start<T>, over(state_.m), state_, options_.weights);
    const auto taken_at_once = static_cast<int>(at_once(take_work_));
    for (int first = 0; first < preselected; first += taken_at_once) {
      Task task{Domain{nullptr, state_.n}, first, std::min(taken_at_once, preselected - first)};
      task.preselected = preselected_list_.data();
      launch_greedy(task);
      pace_.launched(0);
    }
  }

  void find_farthest(unsigned long long* largest) {
    if (state_.n == 0 || state_.m == 0) return;
    with_kernels([&](auto form, auto chained, auto matrix) {
      if constexpr (form() != Form::kProduct && !matrix()) {
        const auto kernel = farthest<T, form(), chained()>;
        launch(kernel, over(state_.n), state_, state_.candidates, state_.clients, largest + kOfCandidates);
        if (separate_clients_)
          launch(kernel, over(state_.m), state_, state_.clients, state_.clients, largest + kOfClients);
        RowSet<T> near = state_.clients;
        near.count = std::min(state_.m, 8);
        launch(kernel, over(1), state_, near, state_.candidates, largest + kOfNear);
      }
    });
  }

  void launch_greedy(const Task& task) {
    with_kernels([&](auto form, auto chained, auto matrix) {
      launch_cooperative(greedy<T, form(), chained(), matrix()>, task);
    });
  }

  // Calls fn with the form, whether chains are long, and whether similarities are given, as constants.
  template <class Fn>
  void with_kernels(Fn&& fn) {
    using Yes = std::true_type;
    using No = std::false_type;
    if (!points_) return fn(std::integral_constant<Form, Form::kProduct>{}, No{}, Yes{});
    const auto with_chains = [&](auto form) {
      if constexpr (sizeof(T) == 4) {
        if (!chained_) return fn(form, No{}, No{});
      }
      return fn(form, Yes{}, No{});  // for float64 in any case: one kernel less per form
    };
    switch (form_) {
      case Form::kProduct:
        return with_chains(std::integral_constant<Form, Form::kProduct>{});
      case Form::kSquare:
        return with_chains(std::integral_constant<Form, Form::kSquare>{});
      case Form::kAbsolute:
        return with_chains(std::integral_constant<Form, Form::kAbsolute>{});
    }
  }

  template <class Kernel>
  void launch_cooperative(Kernel kernel, const Task& task) {
    const int blocks = cooperative_blocks(kernel, kThreads, 0);
    if (blocks > partials_) {
      state_.partial = buffer(partial_, blocks);
      partials_ = blocks;
    }
    launch(kernel, {dim3(blocks), dim3(kThreads), 0, stream_, true}, state_, task);
  }

  TensorView<const T, 2> x_, clients_{};
  const GreedyOptions options_;
  const cudaStream_t stream_;
  Metric metric_ = Metric::kDot;
  Form form_ = Form::kProduct;
  bool points_ = false, separate_clients_ = false, chained_ = false;
  int64_t open_ = 0, picks_ = 0, picks_at_once_ = 1, sample_size_ = 0;
  bool swept_ = false;
  // Multiply-adds per update of a pick, per sweep, and per launch.
  double take_work_ = 0, sweep_work_ = 0, at_once_ = 0;
  Verdict verdict_;
  int partials_ = 0;

  State<T> state_;
  DeviceBuffer<Control> control_;
  DeviceBuffer<Partial> partial_;
  DeviceBuffer<BadAt> bad_at_;
  DeviceBuffer<long long> candidate_longs_, exact_gains_;
  DeviceBuffer<int> candidate_ints_, client_ints_, preselected_list_, sample_;
  DeviceBuffer<T> client_values_, packed_candidates_, packed_clients_;
  Pace pace_;
};

}  // namespace

template <class T>
std::unique_ptr<FacilityLocation> facility_location_points(TensorView<const T, 2> x,
                                                           const TensorView<const T, 2>* clients,
                                                           Metric metric, const GreedyOptions& options,
                                                           cudaStream_t stream) {
  return std::make_unique<Greedy<T>>(x, clients, &metric, options, stream);
}

template <class T>
std::unique_ptr<FacilityLocation> facility_location_matrix(TensorView<const T, 2> s,
                                                           const GreedyOptions& options,
                                                           cudaStream_t stream) {
  return std::make_unique<Greedy<T>>(s, nullptr, nullptr, options, stream);
}

#define FC_INSTANTIATE(T)                                                                                 \
  template std::unique_ptr<FacilityLocation> facility_location_points<T>(                                 \
      TensorView<const T, 2>, const TensorView<const T, 2>*, Metric, const GreedyOptions&, cudaStream_t); \
  template std::unique_ptr<FacilityLocation> facility_location_matrix<T>(                                 \
      TensorView<const T, 2>, const GreedyOptions&, cudaStream_t);
FC_INSTANTIATE(float)
FC_INSTANTIATE(double)
#undef FC_INSTANTIATE

}  // namespace fc::cuda
