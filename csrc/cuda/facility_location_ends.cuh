// The kernels before the first pick, which check values, find the offset and the scale, and after the last
// one, which write results. Included by facility_location.cu alone.
#pragma once

#include "cuda/facility_location_state.cuh"

namespace fc::cuda {
namespace {

// An offset so many times above the distances could lose them by rounding: gains are computed from a lower
// offset.
constexpr double kFarAbove = 1000;

// ---- before the first pick

__device__ void report(Control* control, Verdict::Kind kind, bool in_clients, long long at) {
  control->error_at = at;
  control->verdict = kind;
  control->in_clients = in_clients;
}

__device__ double block_sum(double own) {
  FC_SHARED(double, sums, [kThreads]);
  __syncthreads();
  sums[threadIdx.x] = own;
  __syncthreads();
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (static_cast<int>(threadIdx.x) < half) sums[threadIdx.x] += sums[threadIdx.x + half];
    __syncthreads();
  }
  return sums[0];
}

__device__ double block_max(double own) {
  FC_SHARED(double, values, [kThreads]);
  __syncthreads();
  values[threadIdx.x] = own;
  __syncthreads();
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (static_cast<int>(threadIdx.x) < half)
      values[threadIdx.x] = fmax(values[threadIdx.x], values[threadIdx.x + half]);
    __syncthreads();
  }
  return values[0];
}

// *most = the bits of the largest distance of the points to the first of `origin`; distances are not
// negative, so their order is that of their bits.
template <class T, Form form, bool kChained>
__global__ void __launch_bounds__(kThreads)
    farthest(State<T> state, RowSet<T> points, RowSet<T> origin, unsigned long long* most) {
  state.root = form == Form::kSquare;
  state.negate = false;
  origin.count = 1;
  double own = 0;
  const int tiles = (points.count + kCols<T> - 1) / kCols<T>;
  for (int tile = static_cast<int>(blockIdx.x); tile < tiles; tile += static_cast<int>(gridDim.x)) {
    for_tile<T, form, kFlatRows, kChained, false>(
        state, origin, 0, points, tile * kCols<T>,
        [&](int, int, int, T distance) { own = fmax(own, static_cast<double>(distance)); });
  }
  own = block_max(own);
  if (threadIdx.x == 0) atomicMax(most, static_cast<unsigned long long>(__double_as_longlong(own)));
}

// *most = the bits of the largest similarity, or 0. Strips of the rows, one block per strip.
template <class T>
__global__ void __launch_bounds__(kThreads)
    largest_of_matrix(const T* s, int64_t stride, int n, int m, unsigned long long* most,
                      unsigned long long* bad_at) {
  constexpr int kStrip = 16 * kThreads;
  const int strips = (m + kStrip - 1) / kStrip;
  double own = 0;
  for (int64_t work = blockIdx.x; work < static_cast<int64_t>(n) * strips; work += gridDim.x) {
    const int64_t j = work / strips;
    const int begin = static_cast<int>(work % strips) * kStrip;
    for (int i = begin + static_cast<int>(threadIdx.x); i < min(begin + kStrip, m); i += kThreads) {
      const T value = s[j * stride + i];
      if (!is_finite(value)) atomicMin(bad_at, static_cast<unsigned long long>(j * m + i));
      own = fmax(own, static_cast<double>(value));
    }
  }
  own = block_max(own);
  if (threadIdx.x == 0) atomicMax(most, static_cast<unsigned long long>(__double_as_longlong(own)));
}

__device__ double largest_of(const Control& control, Largest which) {
  return __longlong_as_double(static_cast<long long>(control.largest[which]));
}

// An upper bound of all distances by the triangle inequality, and never 0; in the type T.
template <class T>
__device__ double offset_of(const Control& control, bool self, bool squared) {
  const double of_candidates = largest_of(control, kOfCandidates);
  double offset = (self ? 2 * of_candidates : of_candidates + largest_of(control, kOfClients)) * 1.0001;
  if (squared) offset *= offset;
  return static_cast<double>(static_cast<T>(offset > 0 ? offset : 1.0));
}

struct PrepareArguments {
  const double* weights;
  const double *candidate_norms, *client_norms;  // for dot products, else null
  bool matrix;
  double upper;  // of similarities, above the floor, if neither tells: for distances (also negated, in a
                 // matrix) the offset
  bool distances, find_offset, self, squared;
  double largest;  // that a similarity may reach
  const BadAt* bad_at;
};

// One block: checks the data, and finds the power of two that the weights are scaled by.
template <class T>
__global__ void __launch_bounds__(kThreads) prepare(State<T> state, PrepareArguments a) {
  const int thread = static_cast<int>(threadIdx.x);
  Control* control = state.control;
  const double offset_of_matrix = a.matrix ? static_cast<double>(static_cast<T>(a.upper)) : 0;
  if (a.matrix) a.upper = largest_of(*control, kOfMatrix) + offset_of_matrix;
  if (a.distances) {
    const double found = offset_of<T>(*control, a.self, a.squared);
    double near = largest_of(*control, kOfNear);
    if (a.squared) near *= near;
    if (a.find_offset || (a.upper > kFarAbove * near && a.upper > found)) a.upper = found;
  }
  double most_norm = 0;
  if (a.candidate_norms != nullptr) {
    for (int j = thread; j < state.n; j += kThreads) most_norm = fmax(most_norm, a.candidate_norms[j]);
  }
  most_norm = block_max(most_norm);
  double bound = 0, total = 0, heaviest = 0, most_upper = 0;
  int bad_weight = kNobody;
  for (int i = thread; i < state.m; i += kThreads) {
    const double w = a.weights == nullptr ? 1.0 : a.weights[i];
    if (!(w >= 0) || !is_finite(w)) bad_weight = min(bad_weight, i);
    total += w;
    heaviest = fmax(heaviest, w);
    if (a.client_norms == nullptr) continue;
    const double upper = a.client_norms[i] * most_norm * 1.001;
    most_upper = fmax(most_upper, upper);
    bound += w * upper;
  }
  bound = block_sum(bound);
  total = block_sum(total);
  heaviest = block_max(heaviest);
  most_upper = block_max(most_upper);
  bad_weight = -static_cast<int>(block_max(-static_cast<double>(bad_weight)));
  if (thread != 0) return;

  if (a.client_norms == nullptr) {
    most_upper = a.upper;
    bound = total * a.upper;
  }
  if (a.matrix) control->offset = offset_of_matrix;
  if (a.distances) control->offset = static_cast<double>(static_cast<T>(a.upper));
  const unsigned long long none = ~0ull;
  const BadAt& bad = *a.bad_at;
  if (bad_weight != kNobody) {
    report(control, Verdict::kBadWeight, false, bad_weight);
  } else if (!(total <= std::numeric_limits<T>::max())) {
    report(control, Verdict::kHeavyWeights, false, 0);
  } else if (bad.preselected != none) {
    report(control, Verdict::kBadPreselected, false, static_cast<long long>(bad.preselected));
  } else if (bad.candidate != none) {
    report(control, Verdict::kNotFinite, false, static_cast<long long>(bad.candidate));
  } else if (bad.client != none) {
    report(control, Verdict::kNotFinite, true, static_cast<long long>(bad.client));
  } else if (!(bound <= std::numeric_limits<double>::max() / 4) || !(most_upper <= a.largest)) {
    report(control, Verdict::kOverflow, false, 0);
  } else if (bound > 0) {
    // 2^(61 - ceil(log2 bound)), within the range of the type; frexp gives bound = f 2^e with 1/2 <= f < 1.
    int exponent, weight_exponent;
    const int power = frexp(bound, &exponent) > 0.5 ? exponent : exponent - 1;
    const int weight_power = frexp(heaviest, &weight_exponent) > 0.5 ? weight_exponent : weight_exponent - 1;
    const int room = 61 - power, most = (sizeof(T) == 4 ? 126 : 1000) - weight_power;
    control->scale = ldexp(1.0, min(min(room, most), 1000));
    control->unit = 1.0 / control->scale;
    if (bound * control->scale < 0x1p30) report(control, Verdict::kVanishing, false, 0);
  }
}

// The state of the candidates before the first pick.
template <class T>
__global__ void __launch_bounds__(kThreads) open_all(State<T> state) {
  for (int j = grid_thread(); j < state.n; j += grid_threads()) {
    state.bound[j] = kNoBound;
    state.stamp[j] = kNever;
    state.sum[j] = 0;
    state.pending[j] = 0;
    state.open[j] = 1;
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    close_preselected(State<T> state, const int64_t* preselected, int count, int* list, BadAt* bad_at) {
  for (int p = grid_thread(); p < count; p += grid_threads()) {
    const int64_t j = preselected[p];
    if (j < 0 || j >= state.n || atomicExch(state.open + j, 0) == 0) {
      atomicMin(&bad_at->preselected, static_cast<unsigned long long>(p));
    } else {
      list[p] = static_cast<int>(j);
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    close_listed(State<T> state, const int64_t* candidates, int count) {
  for (int t = grid_thread(); t < count; t += grid_threads()) {
    if (atomicExch(state.open + candidates[t], 0) != 0) atomicAdd(&state.control->closed, 1);
  }
}

// One block: the sample of step_among(), each candidate once; or a candidate that is not open.
template <class T>
__global__ void __launch_bounds__(kThreads)
    check_sample(State<T> state, const int64_t* candidates, int count, int* sample) {
  int first_bad = kNobody;
  for (int t = static_cast<int>(threadIdx.x); t < count; t += kThreads) {
    const int64_t j = candidates[t];
    if (j < 0 || j >= state.n || !state.open[j]) first_bad = min(first_bad, t);
  }
  first_bad = -static_cast<int>(block_max(-static_cast<double>(first_bad)));
  if (threadIdx.x == 0) {
    state.control->refused = first_bad != kNobody;
    if (first_bad != kNobody) state.control->refused_as = candidates[first_bad];
  }
  if (first_bad != kNobody) return;
  // The pick that follows starts by clearing the marks.
  for (int t = static_cast<int>(threadIdx.x); t < count; t += kThreads) {
    const int j = static_cast<int>(candidates[t]);
    sample[t] = atomicExch(state.pending + j, 1) == 0 ? j : -1;
  }
}

// The state of the clients before the first pick.
template <class T>
__global__ void __launch_bounds__(kThreads) start(State<T> state, const double* weights) {
  if (state.control->verdict != Verdict::kFine) return;
  const T floor = static_cast<T>(-state.control->offset);
  for (int i = grid_thread(); i < state.m; i += grid_threads()) {
    state.best[i] = floor;
    state.swept_best[i] = floor;
    state.before[i] = std::numeric_limits<T>::lowest();
    state.weight[i] = static_cast<T>((weights == nullptr ? 1.0 : weights[i]) * state.control->scale);
    state.owner[i] = -1;
  }
}

__global__ void __launch_bounds__(kThreads) clear(Control* control, BadAt* bad_at) {
  if (threadIdx.x != 0) return;
  *control = Control{};
  control->scale = control->unit = 1;
  *bad_at = BadAt{~0ull, ~0ull, ~0ull};
}

// ---- after the last pick

template <class T>
__global__ void __launch_bounds__(kThreads)
    write(State<T> state, int picks, int64_t* indices, double* gains, int64_t* assignment) {
  if (state.control->verdict != Verdict::kFine) return;
  for (int i = grid_thread(); i < state.m; i += grid_threads()) assignment[i] = state.owner[i];
  for (int p = grid_thread(); p < picks; p += grid_threads()) {
    indices[p] = state.picked[p];
    gains[p] = static_cast<double>(state.gain[p]) / state.control->scale;
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) serve_themselves(State<T> state, int picks, int64_t* assignment) {
  if (state.control->verdict != Verdict::kFine) return;
  for (int p = grid_thread(); p < picks; p += grid_threads()) {
    if (state.serves_itself[p]) assignment[state.picked[p]] = p;
  }
}

// One block per pick, and one more for f(S): sums over the clients in a fixed order.
template <class T>
__global__ void __launch_bounds__(kThreads)
    sum_up(State<T> state, int picks, const double* weights, const int64_t* assignment, double* won) {
  if (state.control->verdict != Verdict::kFine) return;
  const int p = static_cast<int>(blockIdx.x);
  double own = 0;
  for (int i = static_cast<int>(threadIdx.x); i < state.m; i += kThreads) {
    const double w = weights == nullptr ? 1.0 : weights[i];
    if (p == picks) {
      own += w * (static_cast<double>(state.best[i]) + state.control->offset);
    } else if (assignment[i] == p) {
      own += w;
    }
  }
  own = block_sum(own);
  if (threadIdx.x != 0) return;
  if (p == picks) {
    state.control->objective = own;
  } else {
    won[p] = own;
  }
}

}  // namespace
}  // namespace fc::cuda
