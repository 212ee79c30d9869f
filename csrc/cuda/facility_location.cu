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
#include "cuda/launch.h"
#include "cuda/pace.h"
#include "cuda/pack.cuh"
#include "cuda/tile.cuh"

namespace fc::cuda {
namespace {

constexpr long long kNoBound = INT64_MAX;
constexpr int kNever = -1;
constexpr int kNobody = INT32_MAX;
// An offset so many times above the distances could lose them by rounding: gains are computed from a lower
// offset.
constexpr double kFarAbove = 1000;
// The room left below 2^31 lets loops step by a whole grid without overflow.
constexpr int64_t kMostPoints = INT32_MAX - (1 << 21);

// The first bad entry of each argument, all ones for none.
struct BadAt {
  unsigned long long candidate, client;  // row * columns + column of a value that is not finite
  unsigned long long preselected;        // position of an index out of range or given twice
};

// Largest values found before the first pick, as bits of doubles: none is negative, so their order is that of
// the bits.
enum Largest : int {
  kOfCandidates,  // distance of a candidate to the first client
  kOfClients,     // distance of a client to the first client
  kOfNear,        // distance of one of the first clients to the first candidate
  kOfMatrix,      // similarity
  kLargestCount
};

// The values that the blocks pass to each other and leave for the host.
struct Control {
  double scale, unit;  // what gains are multiplied by; 1 / scale, which is exact
  long long error_at;  // row * columns + column, or position
  int verdict;         // Verdict::Kind
  int in_clients;
  int swept;      // whether every candidate has been evaluated at `swept_best`
  int listed;     // length of `list`
  int changed;    // length of `changed_clients`
  int last_pick;  // -1: none was made
  int closed;     // candidates that close() took out
  double objective;
  double offset;         // the number that distances are subtracted from
  int refused;           // whether step_among() got a candidate that is not open,
  long long refused_as;  // and which
  unsigned long long largest[kLargestCount];
};

struct Best {
  long long bound;
  int candidate;
};

__device__ __forceinline__ bool better(const Best& a, const Best& b) {
  return a.bound != b.bound ? a.bound > b.bound : a.candidate < b.candidate;
}

struct Partial {
  Best fresh, stale;
};

// Everything a kernel reads and writes, on the device.
template <class T>
struct State {
  RowSet<T> candidates, clients;  // points
  const T* matrix = nullptr;      // or similarities [n, m], rows `matrix_stride` apart
  int64_t matrix_stride = 0;
  int n = 0, m = 0;
  bool root = false, negate = false, self_clients = false;

  Control* control = nullptr;
  Partial* partial = nullptr;       // [blocks]
  const double* costs = nullptr;    // [n] or null
  long long* bound = nullptr;       // [n] an upper bound of the pick_key
  long long* exact = nullptr;       // [n] with costs: the gain that belongs to it
  int* stamp = nullptr;             // [n] after how many picks it was exact
  long long* sum = nullptr;         // [n] the sums of the running round; 0 between rounds
  int* pending = nullptr;           // [n] whether the running round evaluates the candidate
  int* open = nullptr;              // [n] neither picked, preselected nor closed
  int* list = nullptr;              // [n]
  long long* swept_gain = nullptr;  // [n] the gain at `swept_best`
  T* best = nullptr;                // [m] similarity to the nearest of S; at least 0, or -offset
  T* swept_best = nullptr;          // [m]
  T* before = nullptr;              // [m] similarity to the nearest of the preselected
  T* weight = nullptr;              // [m] times the scale
  int* owner = nullptr;             // [m] the pick that serves the client, or -1
  int* changed_clients = nullptr;   // [m] those with best != swept_best
  int* picked = nullptr;            // [n]
  long long* gain = nullptr;        // [n] of each pick
  int* serves_itself = nullptr;     // [n] whether each pick is its own client's server
};

template <class T>
__device__ __forceinline__ long long term(T s, T best, T weight) {
  const T above = s - best;
  return above > T(0) ? static_cast<long long>(above * weight) : 0;
}

// fn(r, c, row, column, value) for this thread's pairs of the tile: rows of `rows`, columns of `columns`.
template <class T, Form form, int kRows, bool kChained, bool kMatrix, class Fn>
__device__ void for_tile(const State<T>& state, const RowSet<T>& rows, int first_row,
                         const RowSet<T>& columns, int first_col, Fn&& fn) {
  constexpr int kR = kRows / kSide, kC = kCols<T> / kSide;
  T value[kR][kC];
  if constexpr (!kMatrix) {
    tile_values<T, form, kRows, kChained>(rows, first_row, columns, first_col, value);
  }
#pragma unroll
  for (int r = 0; r < kR; ++r) {
    const int row = first_row + tile_row<kRows>(r);
    if (row >= rows.count) continue;
    const int j = rows.index(row);
#pragma unroll
    for (int c = 0; c < kC; ++c) {
      const int col = first_col + tile_column<T>(c);
      if (col >= columns.count) continue;
      const int i = columns.index(col);
      if constexpr (kMatrix) {
        fn(r, j, i, state.matrix[j * state.matrix_stride + i]);
      } else {
        fn(r, j, i, finish_value(value[r][c], state.root, state.negate));
      }
    }
  }
}

// state.sum[j] += the worth of clients `columns` to every row j: their terms of its gain, or (`correct`) the
// change of these terms since the last sweep. Strips of column tiles, one addition per row and strip.
template <class T, Form form, int kRows, bool kChained, bool kMatrix>
__device__ void add_over(const State<T>& state, const RowSet<T>& rows, const RowSet<T>& columns,
                         bool correct) {
  constexpr int kR = kRows / kSide;
  const int row_tiles = (rows.count + kRows - 1) / kRows;
  const int column_tiles = (columns.count + kCols<T> - 1) / kCols<T>;
  // As many strips as keep the blocks evenly busy, each as long as possible.
  const int wanted = (8 * static_cast<int>(gridDim.x) + row_tiles - 1) / row_tiles;
  const int length = (column_tiles + wanted - 1) / wanted;
  const int strips = length > 0 ? (column_tiles + length - 1) / length : 0;
  for (int64_t work = blockIdx.x; work < static_cast<int64_t>(strips) * row_tiles; work += gridDim.x) {
    const int first_row = static_cast<int>(work % row_tiles) * kRows;
    const int first_tile = static_cast<int>(work / row_tiles) * length;
    const int last_tile = min(first_tile + length, column_tiles);
    long long total[kR] = {};
    for (int tile = first_tile; tile < last_tile; ++tile) {
      for_tile<T, form, kRows, kChained, kMatrix>(
          state, rows, first_row, columns, tile * kCols<T>, [&](int r, int, int i, T s) {
            total[r] += term(s, state.best[i], state.weight[i]);
            if (correct) total[r] -= term(s, state.swept_best[i], state.weight[i]);
          });
    }
    // The sixteen threads of a row are half a warp.
#pragma unroll
    for (int r = 0; r < kR; ++r) {
      for (int step = kSide / 2; step > 0; step /= 2) {
        total[r] += __shfl_xor_sync(0xffffffffu, total[r], step);
      }
      const int row = first_row + tile_row<kRows>(r);
      if (threadIdx.x % kSide == 0 && row < rows.count && total[r] != 0) {
        atomicAdd(reinterpret_cast<unsigned long long*>(state.sum + rows.index(row)),
                  static_cast<unsigned long long>(total[r]));
      }
    }
  }
}

template <class T, Form form, bool kChained, bool kMatrix>
__device__ void add_over_any(const State<T>& state, const RowSet<T>& rows, const RowSet<T>& columns,
                             bool correct) {
  constexpr int kTall = kTallRows<T, kChained>;
  if (rows.count > kTall / 2) {
    add_over<T, form, kTall, kChained, kMatrix>(state, rows, columns, correct);
  } else {
    add_over<T, form, kFlatRows, kChained, kMatrix>(state, rows, columns, correct);
  }
}

__device__ Best block_best(Best own) {
  FC_SHARED(Best, warps, [kThreads / 32]);
  for (int step = 16; step > 0; step /= 2) {
    const Best other{__shfl_xor_sync(0xffffffffu, own.bound, step),
                     __shfl_xor_sync(0xffffffffu, own.candidate, step)};
    if (better(other, own)) own = other;
  }
  __syncthreads();  // of an earlier call, everyone has read the answer
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = own;
  __syncthreads();
  Best result = warps[0];
  for (int warp = 1; warp < kThreads / 32; ++warp) {
    if (better(warps[warp], result)) result = warps[warp];
  }
  return result;
}

enum class Fold { kNothing, kList, kSweep, kAll };

// The candidates that a pick chooses from: all, or a sample, in which -1 stands for nobody.
struct Domain {
  const int* sample;
  int count;
  __device__ int operator[](int t) const { return sample == nullptr ? t : sample[t]; }
};

// Part of the sweep that precedes a pick, in a launch of its own: so many candidates, whose gains are summed;
// or (`all_summed`) none, since launches before this one have summed all.
struct Sweep {
  int first = 0, count = 0;
  bool all_summed = false;
};

// Folds in the sums of the round before, and finds the best up-to-date gain and the best bound that is not up
// to date. The grid meets at its end.
template <class T>
__device__ Partial reduce(const State<T>& state, const Domain& domain, Fold fold, int picks, int changed) {
  Partial own{{-1, kNobody}, {-1, kNobody}};
  for (int t = grid_thread(); t < domain.count; t += grid_threads()) {
    const int j = domain[t];
    if (j < 0) continue;
    if (fold == Fold::kAll || fold == Fold::kSweep || (fold == Fold::kList && state.pending[j])) {
      long long gain = state.sum[j];
      if (fold == Fold::kSweep) gain += state.swept_gain[j];
      if (fold != Fold::kList) state.swept_gain[j] = gain;
      state.bound[j] = pick_key(gain, state.costs, j);
      if (state.costs != nullptr) state.exact[j] = gain;
      state.stamp[j] = picks;
      state.sum[j] = 0;
    }
    state.pending[j] = 0;
    if (!state.open[j]) continue;
    const Best entry{state.bound[j], j};
    Best& place = state.stamp[j] == picks || entry.bound == 0 ? own.fresh : own.stale;
    if (better(entry, place)) place = entry;
  }
  if (fold == Fold::kAll) {
    for (int i = grid_thread(); i < state.m; i += grid_threads()) state.swept_best[i] = state.best[i];
  } else if (fold == Fold::kSweep) {
    for (int t = grid_thread(); t < changed; t += grid_threads()) {
      const int i = state.changed_clients[t];
      state.swept_best[i] = state.best[i];
    }
  }
  if (grid_thread() == 0) {
    state.control->listed = 0;
    if (fold == Fold::kAll || fold == Fold::kSweep) {
      state.control->changed = 0;
      state.control->swept = 1;
    }
  }
  own.fresh = block_best(own.fresh);
  own.stale = block_best(own.stale);
  if (threadIdx.x == 0) state.partial[blockIdx.x] = own;
  grid_sync();
  // Every block does it for itself: there are at most a few hundred partial results.
  Partial all{{-1, kNobody}, {-1, kNobody}};
  for (int b = static_cast<int>(threadIdx.x); b < static_cast<int>(gridDim.x); b += kThreads) {
    if (better(state.partial[b].fresh, all.fresh)) all.fresh = state.partial[b].fresh;
    if (better(state.partial[b].stale, all.stale)) all.stale = state.partial[b].stale;
  }
  all.fresh = block_best(all.fresh);
  all.stale = block_best(all.stale);
  return all;
}

// Lists the candidates whose bound is none of this pick's gains and beats `threshold`. The grid meets at its
// end. Returns their number.
template <class T>
__device__ int list_above(const State<T>& state, const Domain& domain, const Best& threshold, int picks) {
  for (int t = grid_thread(); t < domain.count; t += grid_threads()) {
    const int j = domain[t];
    if (j < 0 || !state.open[j] || state.stamp[j] == picks || state.bound[j] == 0) continue;
    if (!better(Best{state.bound[j], j}, threshold)) continue;
    state.list[atomicAdd(&state.control->listed, 1)] = j;
    state.pending[j] = 1;
  }
  grid_sync();
  return state.control->listed;
}

// The candidate of the largest gain, when `picks` picks have been made; none after a part of a sweep. A
// sample is only evaluated; all candidates may be swept.
template <class T, Form form, bool kChained, bool kMatrix>
__device__ Best choose(const State<T>& state, const Domain& domain, const Sweep& sweep, int picks, bool naive,
                       bool whole) {
  const int changed = state.control->changed;
  RowSet<T> rows = state.candidates, columns = state.clients;
  Fold fold = whole && (naive || !state.control->swept) ? Fold::kAll : Fold::kNothing;
  bool summed = sweep.all_summed;
  if (sweep.count > 0) {
    for (int t = grid_thread(); t < sweep.count; t += grid_threads()) state.list[t] = sweep.first + t;
    grid_sync();
    rows.list = state.list;
    rows.count = sweep.count;
  }
  for (bool may_sweep = whole && fold == Fold::kNothing;; summed = false) {
    if (fold != Fold::kNothing) {
      if (!summed) add_over_any<T, form, kChained, kMatrix>(state, rows, columns, fold == Fold::kSweep);
      if (sweep.count > 0) return {-1, kNobody};
      grid_sync();
    }
    const Partial found = reduce(state, domain, fold, picks, changed);
    if (!better(found.stale, found.fresh)) return found.fresh;
    // With nothing to compare with yet, the top of the bounds.
    const bool comparable = found.fresh.candidate != kNobody;
    const Best threshold =
        comparable ? found.fresh : Best{found.stale.bound - found.stale.bound / 32 - 1, kNobody};
    const int listed = list_above(state, domain, threshold, picks);
    if (may_sweep && comparable &&
        static_cast<int64_t>(state.n) * changed < static_cast<int64_t>(listed) * state.m) {
      rows = state.candidates;
      columns.list = state.changed_clients;
      columns.count = changed;
      fold = Fold::kSweep;
      may_sweep = false;
    } else {
      rows.list = state.list;
      rows.count = listed;
      columns = state.clients;
      fold = Fold::kList;
    }
  }
}

// Takes pick number `picks` into S, or (number -1) a preselected candidate: one flat row of tiles against all
// clients. The grid meets at its end.
template <class T, Form form, bool kChained, bool kMatrix>
__device__ void take(const State<T>& state, const int* chosen, int picks) {
  RowSet<T> row = state.candidates;
  row.list = chosen;
  row.count = 1;
  const int column_tiles = (state.m + kCols<T> - 1) / kCols<T>;
  for (int tile = static_cast<int>(blockIdx.x); tile < column_tiles; tile += static_cast<int>(gridDim.x)) {
    for_tile<T, form, kFlatRows, kChained, kMatrix>(
        state, row, 0, state.clients, tile * kCols<T>, [&](int, int j, int i, T s) {
          if (picks < 0) {
            state.before[i] = max(state.before[i], s);
          } else if (state.self_clients && i == j) {
            state.serves_itself[picks] = !(state.before[i] > s);
          }
          const T best = state.best[i];
          if (!(s > best)) return;
          if (best == state.swept_best[i]) state.changed_clients[atomicAdd(&state.control->changed, 1)] = i;
          state.best[i] = s;
          state.owner[i] = picks;
        });
  }
  grid_sync();
}

// What one launch does: picks number `done`, ..., `done` + `count` - 1; or, with `preselected`, takes those
// of these candidates; or a part of the sweep before pick `done`.
struct Task {
  Domain domain;
  int done = 0, count = 0;
  bool naive = false;
  const int* preselected = nullptr;
  Sweep sweep = {};
  double stop_gain = -std::numeric_limits<double>::infinity();  // a pick of a smaller gain is not made
};

// One kernel for all of this, since most of it is the tiles, which take long to compile.
template <class T, Form form, bool kChained, bool kMatrix>
__global__ void __launch_bounds__(kThreads, 1) greedy(State<T> state, Task task) {
  if (state.control->verdict != Verdict::kFine || state.control->refused) return;
  const bool whole = task.domain.sample == nullptr;
  for (int picks = task.done; picks < task.done + task.count; ++picks) {
    const int* chosen = task.preselected + picks;
    if (task.preselected == nullptr) {
      const Best best =
          choose<T, form, kChained, kMatrix>(state, task.domain, task.sweep, picks, task.naive, whole);
      if (task.sweep.count > 0) return;
      const bool found = best.candidate != kNobody;
      const long long gain = found && state.costs != nullptr ? state.exact[best.candidate] : best.bound;
      if (!found || static_cast<double>(gain) * state.control->unit < task.stop_gain) {
        if (grid_thread() == 0) state.control->last_pick = -1;
        return;
      }
      if (grid_thread() == 0) {
        state.picked[picks] = best.candidate;
        state.gain[picks] = gain;
        state.open[best.candidate] = 0;
        state.serves_itself[picks] = 0;
        state.control->last_pick = best.candidate;
      }
      grid_sync();
      chosen = state.picked + picks;
    }
    take<T, form, kChained, kMatrix>(state, chosen, task.preselected == nullptr ? picks : -1);
  }
}

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

// ---- the host's side

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
