// Large Sinkhorn problems: one cooperative kernel makes all iterations, tiles of costs made anew (or read) in
// every pass, never n x m.
//
// A pass takes the logarithm of each line's sum,
//   S_i = log sum_j b_j exp((f_i + g_j - C_ij) / eps)      rows; columns likewise, with x and y exchanged,
// tile by tile with a running maximum. A strip of at most kMostStrip tiles leaves each line's maximum and
// sum; the strips of a line are put together in float64, in order, by the thread that then moves its
// potential. Between the four parts of an iteration (rows' tiles, rows, columns' tiles, columns) the grid
// meets.
//
// The blocks form as many teams as there are problems, or as there are blocks; a team's blocks share one
// problem's tiles, and it solves every so many-th problem. Teams meet the others at each barrier, whatever
// step each is at. Strips, and the order of all sums, depend on the shape of the problem alone, not on the
// GPU.
//
// Cost: an iteration makes every cost twice, n m d multiply-adds each, and 2 n m exponentials; 30 bytes per
// line, and 2 per strip of it. Four barriers, some microseconds.
// Rejected: both directions from one tile, since a column's sum needs the new potentials of all rows; one
// launch per pass, whose end the host would have to wait for to know whether another follows; the sum without
// a maximum, which overflows if potentials are far from their final values.
#include <algorithm>
#include <cmath>

#include "cuda/device_buffer.h"
#include "cuda/launch.h"
#include "cuda/sinkhorn.cuh"

namespace fc::cuda {
namespace {

constexpr int kMostStrip = 16;      // tiles, so that no chain of float32 sums is long
constexpr int kEnoughTiles = 1024;  // for all blocks to have work
constexpr int64_t kMostWorkspace = 256 << 20;

constexpr __host__ __device__ int64_t ceiling(int64_t count, int64_t size) {
  return (count + size - 1) / size;
}

// What a strip leaves of a line: sum exp(exponent) = sum * exp(most).
template <class T>
struct Partial {
  T most, sum;
};

// Sums over kThreads lines. `squares`: see SinkhornSettings::error_of(). `lost`: the sums that they ask for,
// less their weights.
struct Sums {
  double off, squares, dual, mass, lost;
};

// Rows or columns of a team's problem, in global memory. Capacities are those of the longest problem.
template <class T>
struct Lines {
  Split<T>* plain;     // potentials
  Split<T>* weighted;  // potentials + eps log weight
  Sums* sums;          // [ceil(lines / kThreads)]
};

struct Tiling {
  int line_tiles, other_tiles, strip, strips;
};

template <class T>
__host__ __device__ Tiling tiling_of(int64_t lines, int64_t others) {
  const int64_t line_tiles = ceiling(lines, kTileRows<T>), other_tiles = ceiling(others, kCols<T>);
  int64_t strip = line_tiles * other_tiles / kEnoughTiles;
  strip = strip < 1 ? 1 : strip > kMostStrip ? kMostStrip : strip;
  return {static_cast<int>(line_tiles), static_cast<int>(other_tiles), static_cast<int>(strip),
          static_cast<int>(ceiling(other_tiles, strip))};
}

// At least as many as tiling_of() makes of any problem of up to so many lines and others: a strip of one tile
// while there are less than 2 * kEnoughTiles, and for more tiles never over two strips for kEnoughTiles of a
// line's, nor more than the longest strips make of all.
template <class T>
int64_t most_partials(int64_t lines, int64_t others) {
  const int64_t line_tiles = ceiling(lines, kTileRows<T>), other_tiles = ceiling(others, kCols<T>);
  const int64_t blocks =
      std::max<int64_t>(2 * kEnoughTiles + line_tiles, line_tiles * ceiling(other_tiles, kMostStrip));
  return std::min(line_tiles * other_tiles, blocks) * kTileRows<T>;
}

struct Workspace {
  char* memory;  // `bytes` per team
  int64_t bytes;
  int64_t partials;  // partials for which there is room
  int* active;       // number of teams with a problem
  int teams, team_blocks;
};

template <class T>
int64_t team_bytes(int64_t n, int64_t m, int64_t partials) {
  const int64_t chunks = ceiling(n, kThreads) + ceiling(m, kThreads);
  const auto bytes = static_cast<int64_t>(partials / kTileRows<T> * sizeof(double) + chunks * sizeof(Sums) +
                                          2 * (n + m) * sizeof(Split<T>) + partials * sizeof(Partial<T>));
  return ceiling(bytes, 256) * 256;
}

// A block of a team.
template <class T>
class Streaming {
 public:
  __device__ Streaming(const Batch<T>& batch, const Task& task, const Workspace& workspace, int64_t shared,
                       SinkhornSchedule& schedule, SinkhornError& columns_off)
      : batch_(batch),
        task_(task),
        workspace_(workspace),
        shared_(shared),
        schedule_(schedule),
        columns_off_(columns_off),
        team_(static_cast<int>(blockIdx.x) / workspace.team_blocks),
        member_(static_cast<int>(blockIdx.x) % workspace.team_blocks) {
    const int64_t n = batch.n, m = batch.m;
    costs_ = reinterpret_cast<double*>(workspace.memory + team_ * workspace.bytes);
    rows_.sums = reinterpret_cast<Sums*>(costs_ + workspace.partials / kTileRows<T>);
    columns_.sums = rows_.sums + ceiling(n, kThreads);
    rows_.plain = reinterpret_cast<Split<T>*>(columns_.sums + ceiling(m, kThreads));
    rows_.weighted = rows_.plain + n;
    columns_.plain = rows_.weighted + n;
    columns_.weighted = columns_.plain + m;
    partial_ = reinterpret_cast<Partial<T>*>(columns_.weighted + m);
  }

  __device__ void solve_all() {
    p_ = team_ - workspace_.teams;
    take_next();
    for (int half = 0;; half = 1 - half) {
      const bool of_columns = half == 1;
      if (has_problem() && round_ != Round::kBegin && !mirrors(of_columns)) sum_strips(of_columns);
      grid_sync();
      // The only place where it is sure that no team is just finishing.
      if (*workspace_.active == 0) return;
      if (has_problem()) {
        if (round_ == Round::kBegin) {
          begin(of_columns);
        } else if (mirrors(of_columns)) {
          mirror();
        } else {
          settle(of_columns);
        }
      }
      grid_sync();
      if (has_problem() && of_columns) decide();
    }
  }

 private:
  // The purpose of the next four parts: setting potentials up, an iteration, or the final evaluation.
  enum class Round { kBegin, kIteration, kEvaluation };

  __device__ static int thread() { return static_cast<int>(threadIdx.x); }
  __device__ bool has_problem() const { return p_ < batch_.count; }
  __device__ bool leads() const { return member_ == 0 && threadIdx.x == 0; }

  __device__ int count_of(bool of_columns) const { return of_columns ? batch_.columns(p_) : batch_.rows(p_); }
  // Member by member: a reference chosen at run time would put both sides into memory.
  __device__ Lines<T> lines_of(bool of_columns) const {
    return {of_columns ? columns_.plain : rows_.plain, of_columns ? columns_.weighted : rows_.weighted,
            of_columns ? columns_.sums : rows_.sums};
  }
  __device__ const double* weights_of(bool of_columns) const {
    return of_columns ? batch_.b + p_ * batch_.m : batch_.a + p_ * batch_.n;
  }
  __device__ double* potentials_of(bool of_columns) const {
    return of_columns ? task_.result.g + p_ * batch_.m : task_.result.f + p_ * batch_.n;
  }

  // The team's next problem that is not solved in shared memory.
  __device__ void take_next() {
    do {
      p_ += workspace_.teams;
    } while (has_problem() && resident_bytes<T>(batch_.rows(p_), batch_.columns(p_)) <= shared_);
    if (!has_problem()) {
      if (leads()) atomicAdd(workspace_.active, -1);
      return;
    }
    round_ = Round::kBegin;
    fresh_ = true;
    constant_ = 0;
    // No barriers: decide() sums in block_sum() after its last look at the schedule of the problem before,
    // and the grid meets before anyone looks at this one.
    if (threadIdx.x == 0) {
      new (&schedule_) SinkhornSchedule(task_.schedule(p_));
      columns_off_ = {};
    }
  }

  __device__ bool translates() const { return schedule_.translates(task_.options); }

  // Whether the columns of a symmetric problem become the rows, in the place of their half of an iteration.
  __device__ bool mirrors(bool of_columns) const {
    return of_columns && round_ == Round::kIteration && task_.options.symmetric;
  }
  __device__ void mirror() {
    const Lines<T> lines = lines_of(true);
    const double* const from = potentials_of(false);
    double* const to = potentials_of(true);
    const int count = count_of(true);
    for (int chunk = member_; chunk * kThreads < count; chunk += workspace_.team_blocks) {
      const int l = chunk * kThreads + thread();
      if (l < count) {
        to[l] = from[l];
        note_potential(lines, l, from[l], weights_of(true)[l]);
      }
      if (threadIdx.x == 0) lines.sums[chunk] = rows_.sums[chunk];
    }
  }

  // The constant that f has gained and g lost besides the potentials in memory: the plan does not change with
  // it.
  __device__ double constant_of(bool of_columns) const { return of_columns ? -constant_ : constant_; }

  // Potentials at the start of a problem or of a new eps.
  __device__ void begin(bool of_columns) {
    const Lines<T> lines = lines_of(of_columns);
    double* const potentials = potentials_of(of_columns);
    const double* const start = of_columns ? task_.options.g : task_.options.f;
    const int64_t first = p_ * (of_columns ? batch_.m : batch_.n);
    const int step = workspace_.team_blocks * kThreads, count = count_of(of_columns);
    for (int l = member_ * kThreads + thread(); l < count; l += step) {
      if (fresh_) potentials[l] = start == nullptr ? 0.0 : start[first + l];
      note_potential(lines, l, potentials[l], weights_of(of_columns)[l]);
    }
  }

  __device__ void note_potential(const Lines<T>& lines, int l, double potential, double weight) {
    lines.plain[l] = split<T>(potential);
    lines.weighted[l] = split<T>(potential + schedule_.eps() * log(weight));
  }

  // partial_ of the team's problem; and costs_, each strip's part of <P, C>, in a column pass that evaluates.
  __device__ void sum_strips(bool of_columns) {
    constexpr int kR = kTileRows<T> / kSide, kC = kCols<T> / kSide;
    const Costs<T> costs = costs_of(batch_, p_, of_columns);
    const int lines = costs.lines.count, others = costs.others.count;
    const Split<T>* const plain = lines_of(of_columns).plain;
    const Split<T>* const weighted = lines_of(!of_columns).weighted;
    const double* const weights = weights_of(of_columns);
    const bool with_cost = of_columns && round_ == Round::kEvaluation;
    const T inverse = static_cast<T>(1 / schedule_.eps()), none = -static_cast<T>(HUGE_VAL);
    const Tiling tiling = tiling_of<T>(lines, others);
    for (int work = member_; work < tiling.line_tiles * tiling.strips; work += workspace_.team_blocks) {
      const int first_line = work % tiling.line_tiles * kTileRows<T>, strip = work / tiling.line_tiles;
      const int last_tile = min((strip + 1) * tiling.strip, tiling.other_tiles);
      Split<T> own[kR];
      T most[kR], sum[kR], paid[kR];
#pragma unroll
      for (int r = 0; r < kR; ++r) {
        own[r] = plain[min(first_line + tile_row<kTileRows<T>>(r), lines - 1)];
        most[r] = none;
        sum[r] = paid[r] = 0;
      }
      for (int tile = strip * tiling.strip; tile < last_tile; ++tile) {
        T value[kR][kC];
        cost_tile(costs, first_line, tile * kCols<T>, value);
        const auto exponent_of = [&](int r, int c, Split<T> other) {
          return exponent(own[r], other, value[r][c], inverse);
        };
        const auto other_at = [&](int c) {
          const int o = tile * kCols<T> + tile_column<T>(c);
          return o < others ? weighted[o] : split<T>(-HUGE_VAL);
        };
        if (with_cost) {
#pragma unroll
          for (int c = 0; c < kC; ++c) {
            const Split<T> other = other_at(c);
#pragma unroll
            for (int r = 0; r < kR; ++r) paid[r] += exponential(exponent_of(r, c, other)) * value[r][c];
          }
        }
#pragma unroll
        for (int c = 0; c < kC; ++c) {
          const Split<T> other = other_at(c);
#pragma unroll
          for (int r = 0; r < kR; ++r) value[r][c] = exponent_of(r, c, other);
        }
#pragma unroll
        for (int r = 0; r < kR; ++r) {
          T top = most[r];
#pragma unroll
          for (int c = 0; c < kC; ++c) top = max(top, value[r][c]);
          if (top == none) continue;
          T part = 0;
#pragma unroll
          for (int c = 0; c < kC; ++c) part += exponential(value[r][c] - top);
          sum[r] = sum[r] * exponential(most[r] - top) + part;
          most[r] = top;
        }
      }
      double cost = 0;
#pragma unroll
      for (int r = 0; r < kR; ++r) {
        // The sixteen threads of a line are half a warp.
        T top = most[r];
        for (int step = kSide / 2; step > 0; step /= 2)
          top = max(top, __shfl_xor_sync(0xffffffffu, top, step));
        T total = top == none ? T(0) : sum[r] * exponential(most[r] - top);
        for (int step = kSide / 2; step > 0; step /= 2) total += __shfl_xor_sync(0xffffffffu, total, step);
        const int line = first_line + tile_row<kTileRows<T>>(r);
        if (line >= lines) continue;
        if (threadIdx.x % kSide == 0) partial_[static_cast<int64_t>(strip) * lines + line] = {top, total};
        if (with_cost && weights[line] > 0) cost += weights[line] * static_cast<double>(paid[r]);
      }
      if (!with_cost) continue;
      cost = block_sum(cost);
      if (threadIdx.x == 0) costs_[work] = cost;
    }
  }

  // log sum over all strips of a line.
  __device__ double log_sum(int l, int count, int strips) const {
    double most = -HUGE_VAL, sum = 0;
    for (int s = 0; s < strips; ++s) {
      most = fmax(most, static_cast<double>(partial_[static_cast<int64_t>(s) * count + l].most));
    }
    for (int s = 0; s < strips && most > -HUGE_VAL; ++s) {
      const Partial<T> part = partial_[static_cast<int64_t>(s) * count + l];
      sum += static_cast<double>(part.sum) * exp(static_cast<double>(part.most) - most);
    }
    return most + log(sum);
  }

  // From the lines' sums: their new potentials, or in an evaluation the potentials of zero weights; and
  // `sums`.
  __device__ void settle(bool of_columns) {
    const Lines<T> lines = lines_of(of_columns);
    const double* const weights = weights_of(of_columns);
    double* const potentials = potentials_of(of_columns);
    const int count = count_of(of_columns), strips = tiling_of<T>(count, count_of(!of_columns)).strips;
    const bool iterates = round_ == Round::kIteration, translates = iterates && this->translates();
    const double eps = schedule_.eps(), omega = iterates ? schedule_.omega() : 1;
    const double rho = task_.rho(of_columns), damp = damping(rho, eps), constant = constant_of(of_columns);
    for (int chunk = member_; chunk * kThreads < count; chunk += workspace_.team_blocks) {
      const int l = chunk * kThreads + thread();
      Sums own{};
      if (l < count) {
        const double log_of = log_sum(l, count, strips);
        const double weight = weights[l], potential = potentials[l] + constant;
        const double moved = sinkhorn_allowed<T>(sinkhorn_moved(potential, log_of, eps, omega, damp), weight);
        // For columns: the error of the plan that the iteration makes.
        const bool made = iterates && of_columns;
        const double ratio = exp(log_of + (made ? (moved - potential) / eps : 0));
        own.off = off_by(weight, ratio, made ? moved : potential, rho);
        own.squares = task_.square_of(p_, of_columns, own.off);
        own.mass = weight > 0 ? weight * ratio : 0;
        own.dual = iterates ? 0 : worth(weight, potential, rho);
        own.lost = translates ? lost_by(weight, moved, rho) : 0;
        if (iterates || !(weight > 0)) {
          potentials[l] = moved - constant;
          note_potential(lines, l, moved - constant, weight);
        }
      }
      own.off = block_sum(own.off);
      if (task_.options.l2) own.squares = block_sum(own.squares);
      if (translates) own.lost = block_sum(own.lost);
      if (!iterates) {
        own.dual = block_sum(own.dual);
        own.mass = block_sum(own.mass);
      }
      if (threadIdx.x == 0) lines.sums[chunk] = own;
    }
  }

  // To the potentials, at the end.
  __device__ void add_constant() {
    if (constant_ == 0) return;
    const int step = workspace_.team_blocks * kThreads;
#pragma unroll 1
    for (int side = 0; side < 2; ++side) {
      double* const potentials = potentials_of(side == 1);
      const int count = count_of(side == 1);
#pragma unroll 1
      for (int l = member_ * kThreads + thread(); l < count; l += step)
        potentials[l] += constant_of(side == 1);
    }
  }

  __device__ double total(const Sums* sums, int count, double Sums::* member) const {
    double own = 0;
    for (int chunk = thread(); chunk * kThreads < count; chunk += kThreads) own += sums[chunk].*member;
    return block_sum(own);
  }

  // The error of a side, from the sums of its lines.
  __device__ SinkhornError error_of(bool of_columns) const {
    const Sums* const sums = of_columns ? columns_.sums : rows_.sums;
    const int count = count_of(of_columns);
    const double off = total(sums, count, &Sums::off),
                 squares = task_.options.l2 ? total(sums, count, &Sums::squares) : 0;
    return task_.error_of(p_, of_columns, off, squares);
  }

  // Moves the best constant from the columns to the rows; returns by how much more the column sums are off.
  __device__ double translate() {
    const Facts& facts = task_.facts[p_];
    const double rho_b = task_.options.rho_b;
    const double lost_rows = total(rows_.sums, count_of(false), &Sums::lost),
                 lost_columns = total(columns_.sums, count_of(true), &Sums::lost);
    const double more = sinkhorn_translation(task_.options.rho_a, rho_b, facts.mass[0], facts.mass[1],
                                             lost_rows, lost_columns);
    constant_ += more;
    return (facts.mass[1] + lost_columns) * fabs(expm1(more / rho_b));
  }

  // The result of the round, and the purpose of the next one.
  __device__ void decide() {
    FC_SHARED(SinkhornOrder, order, );
    FC_SHARED(int, go_on, );
    if (round_ == Round::kBegin) {
      round_ = Round::kIteration;
      return;
    }
    const int n = count_of(false), m = count_of(true);
    const SinkhornError rows_off = error_of(false), off = error_of(true);
    if (round_ == Round::kIteration) {
      if (threadIdx.x == 0)
        order = schedule_.after(rows_off.plus(task_.options.symmetric ? off : columns_off_));
      __syncthreads();
      order_ = order;
      const double more = translates() ? translate() : 0;
      // The columns of a symmetric problem are off by what the rows are, now and not later.
      const bool later = order_ != SinkhornOrder::kNewEps && !task_.options.symmetric;
      if (threadIdx.x == 0) columns_off_ = later ? off.plus(more) : SinkhornError{};
      if (order_ == SinkhornOrder::kNewEps) {
        round_ = Round::kBegin;
        fresh_ = false;
      } else if (order_ != SinkhornOrder::kGoOn) {
        round_ = Round::kEvaluation;
      }
      return;
    }
    Outcome found{rows_off.plus(off).judged, 0, 0, 0, schedule_.iterations()};
    found.dual = total(rows_.sums, n, &Sums::dual) + total(columns_.sums, m, &Sums::dual);
    found.mass = total(rows_.sums, n, &Sums::mass);
    if (order_ == SinkhornOrder::kCheck && !(found.error <= schedule_.tol())) {
      // What this changes was last read before the grid met.
      if (threadIdx.x == 0) go_on = schedule_.disappointed(found.error);
      __syncthreads();
      if (go_on) {
        round_ = Round::kIteration;
        return;
      }
    }
    const Tiling tiling = tiling_of<T>(m, n);
    double cost = 0;
    for (int work = thread(); work < tiling.line_tiles * tiling.strips; work += kThreads)
      cost += costs_[work];
    found.transport_cost = block_sum(cost);
    if (leads()) write_outcome(task_, p_, found);
    add_constant();
    take_next();
  }

  const Batch<T>& batch_;
  const Task& task_;
  const Workspace& workspace_;
  const int64_t shared_;
  SinkhornSchedule& schedule_;
  SinkhornError& columns_off_;  // in the plan of the last iteration; the first thread's
  const int team_, member_;
  Lines<T> rows_, columns_;
  double* costs_;        // [works of a column pass]
  Partial<T>* partial_;  // [strips, lines]

  int64_t p_ = 0;
  Round round_ = Round::kBegin;
  bool fresh_ = true;
  SinkhornOrder order_ = SinkhornOrder::kGoOn;
  double constant_ = 0;  // see constant_of(); the same in all threads of the team
};

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksWanted<T>)
    solve_streaming(Batch<T> batch, Task task, Workspace workspace, int64_t shared) {
  FC_SHARED(double, schedule, [kScheduleDoubles]);
  FC_SHARED(SinkhornError, columns_off, );
  if (task.faults->any()) return;
  Streaming<T>(batch, task, workspace, shared, *reinterpret_cast<SinkhornSchedule*>(schedule), columns_off)
      .solve_all();
}

__global__ void set_active(int* active, int teams) { *active = teams; }

}  // namespace

template <class T>
void launch_streaming(const Batch<T>& batch, const Task& task, int64_t shared) {
  const cudaStream_t stream = task.options.stream;
  const int64_t partials = std::max(most_partials<T>(batch.n, batch.m), most_partials<T>(batch.m, batch.n));
  const int64_t bytes = team_bytes<T>(batch.n, batch.m, partials);
  const int64_t blocks = cooperative_blocks(solve_streaming<T>, kThreads, 0);
  const int64_t room = std::max<int64_t>(kMostWorkspace / bytes, 1);
  const int64_t teams = std::min({batch.count, room, blocks});
  const int64_t team_blocks = std::min(blocks / teams, partials / kTileRows<T>);
  const DeviceBuffer<char> memory(teams * bytes, stream);
  const DeviceBuffer<int> active(1, stream);
  const Workspace workspace{
      memory.data(), bytes, partials, active.data(), static_cast<int>(teams), static_cast<int>(team_blocks)};
  launch(set_active, {dim3(1), dim3(1), 0, stream}, workspace.active, workspace.teams);
  launch(solve_streaming<T>,
         {dim3(static_cast<unsigned>(teams * team_blocks)), dim3(kThreads), 0, stream, true}, batch, task,
         workspace, shared);
}

template void launch_streaming<float>(const Batch<float>&, const Task&, int64_t);
template void launch_streaming<double>(const Batch<double>&, const Task&, int64_t);

}  // namespace fc::cuda
