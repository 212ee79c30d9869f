// The cooperative kernel that makes picks: sweeps, rounds of evaluations, and what a pick changes. Included
// by facility_location.cu alone.
#pragma once

#include "cuda/facility_location_state.cuh"

namespace fc::cuda {
namespace {

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

}  // namespace
}  // namespace fc::cuda
