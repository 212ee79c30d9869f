// Small Sinkhorn problems: one block solves one problem from its first iteration to its last, its matrix in
// shared memory.
//
// With absorbed potentials F, G the matrix holds K_ij = exp((F_i + G_j - C_ij) / eps), and the iteration is
//   r_i = sum_j K_ij b_j v_j     u_i <- 1 / r_i         f_i = F_i + eps log u_i
//   c_j = sum_i K_ij a_i u_i     v_j <- 1 / c_j         g_j = G_j + eps log v_j
// (with a power and a factor if it is over-relaxed or a marginal is not kept): two reads of shared memory and
// a multiply-add per entry, and no exponential. u, v are float64, the products float32 in chains of 8 whose
// sums are added up in float64.
//
// The range is the log domain's. The first iteration, and one that follows a new eps, holds the costs
// themselves in the matrix and takes logarithms of sums (float64 exponents), which makes u = v = 1 a good
// start. If u or v then leaves 10^-8 .. 10^8, they are absorbed and K is made anew. If a sum leaves 10^-18 ..
// 10^18, entries below the smallest float would be missing from it, and that half of the iteration is made
// again from the costs.
//
// A thread sums a part of a row (or of a column), neighbours of a warp the parts of neighbouring rows: with
// rows an odd number of entries apart no two are in one bank.
//
// Cost: rows * columns costs each time that K is made; 2 * rows * columns multiply-adds per iteration.
// Rejected: one warp per row, whose sum takes five shuffles; K in registers, which leaves no room for more
// than 128 x 128; log-sum-exp in every iteration, 30 times the operations.
#include <algorithm>
#include <cmath>

#include "cuda/launch.h"
#include "cuda/sinkhorn.cuh"

namespace fc::cuda {
namespace {

constexpr double kDrift = 1e8, kRange = 1e18;

// Rows or columns of the matrix in shared memory, and the arrays that belong to them.
template <class T>
struct Lines {
  int count;
  int parts;         // in which a line is summed up
  int stride, step;  // between lines, and between the entries of a line
  bool of_columns;
  const double* weight;  // [count] in global memory
  double* potential;     // [count] absorbed
  double* scale;         // [count] u or v; while the matrix holds costs: potential + eps log weight
  T* weighted;           // [count] weight * scale
};

template <class T>
struct alignas(16) Four {
  T value[4];
};

// sum of k[o * step] * w[o] over begin <= o < end; begin is a multiple of 4.
template <class T>
__device__ double weighted_sum(const T* k, int step, const T* w, int begin, int end) {
  constexpr int kGroups = 8;
  double total = 0;
  int o = begin;
  const auto add_groups = [&](int groups) {
    T sum[4] = {};
#pragma unroll
    for (int t = 0; t < groups; ++t, o += 4) {
      const Four<T> four = *reinterpret_cast<const Four<T>*>(w + o);
#pragma unroll
      for (int q = 0; q < 4; ++q) sum[q] = fused(k[(o + q) * step], four.value[q], sum[q]);
    }
    total += static_cast<double>((sum[0] + sum[1]) + (sum[2] + sum[3]));
  };
  while (o + 4 * kGroups <= end) add_groups(kGroups);
  if (o + 4 <= end) add_groups((end - o) / 4);
  T sum = 0;
  for (; o < end; ++o) sum = fused(k[o * step], w[o], sum);
  return total + static_cast<double>(sum);
}

// The number of parts that takes the block's threads the least time.
__device__ int best_parts(int lines, int others) {
  int best = 1, least = INT32_MAX;
  for (int parts = 1; parts <= 16 && (parts == 1 || parts * lines <= kMostParts); ++parts) {
    const int rounds = (parts * lines + kThreads - 1) / kThreads;
    const int time = rounds * ((others + 4 * parts - 1) / (4 * parts) * 4 + 16);
    if (time >= least) continue;
    least = time;
    best = parts;
  }
  return best;
}

// One problem, by the block that calls.
template <class T>
class Resident {
 public:
  __device__ Resident(const Batch<T>& batch, const Task& task, int64_t p, SinkhornSchedule& schedule,
                      double* shared)
      : batch_(batch), task_(task), p_(p), schedule_(schedule), scratch_(shared) {
    const int n = batch.rows(p), m = batch.columns(p);
    double* const row_doubles = scratch_ + max(max(n, m), kMostParts);
    double* const column_doubles = row_doubles + 2 * n;
    double* end = column_doubles + 2 * m;
    if ((end - shared) % 2 != 0) ++end;
    T* const values = reinterpret_cast<T*>(end);
    width_ = m | 1;
    matrix_ = values + fours(n) + fours(m);
    rows_ = {n,           best_parts(n, m), width_, 1, false, batch.a + p * batch.n,
             row_doubles, row_doubles + n,  values};
    columns_ = {m,
                best_parts(m, n),
                1,
                width_,
                true,
                batch.b + p * batch.m,
                column_doubles,
                column_doubles + m,
                values + fours(n)};
  }

  __device__ void solve() {
    begin(rows_, task_.options.f == nullptr ? nullptr : task_.options.f + p_ * batch_.n);
    begin(columns_, task_.options.g == nullptr ? nullptr : task_.options.g + p_ * batch_.m);
    if (threadIdx.x == 0) new (&schedule_) SinkhornSchedule(task_.schedule(p_));
    __syncthreads();
    const double rho_a = task_.options.rho_a, rho_b = task_.options.rho_b;
    const bool translates = schedule_.translates(task_.options), symmetric = task_.options.symmetric;
    enum class Holds { kNothing, kCosts, kKernel };
    enum class Next { kRows, kColumns, kEvaluation };
    Holds holds = Holds::kNothing, wanted = Holds::kCosts;
    Next next = Next::kRows;
    SinkhornOrder order = SinkhornOrder::kGoOn;
    SinkhornError error{}, columns_off{};
    double eps = schedule_.eps(), lost[2] = {};
    for (;;) {
      if (holds != wanted) {
        if (holds != Holds::kCosts) fill_costs();
        if (wanted == Holds::kKernel) exponentiate(1 / eps);
        holds = wanted;
      }
      if (next == Next::kEvaluation) {
        const Outcome found = evaluate();
        const bool goes_on =
            order == SinkhornOrder::kCheck && !(found.error <= schedule_.tol()) && disappointed(found.error);
        if (!goes_on) return finish(found);
        next = Next::kRows;
        continue;
      }
      const bool of_columns = next == Next::kColumns;
      const Lines<T> lines = of_columns ? columns_ : rows_, others = of_columns ? rows_ : columns_;
      SinkhornError off{};
      bool drifted = false;
      if (holds == Holds::kCosts) {
        off = advance_from_costs(lines, others, eps);
      } else if (!advance(lines, others, eps, off, drifted)) {
        absorb(eps);
        holds = Holds::kNothing;
        wanted = Holds::kCosts;
        continue;
      }
      if (symmetric) mirror(holds == Holds::kKernel);
      if (translates) lost[of_columns ? 1 : 0] = lost_of(lines, holds == Holds::kKernel, eps);
      if (drifted) {
        absorb(eps);
        holds = Holds::kNothing;
      }
      if (symmetric) {
        error = off.plus(off);
      } else if (!of_columns) {
        // The rest of the iteration works with the values that are there.
        wanted = holds == Holds::kNothing ? Holds::kKernel : holds;
        error = off.plus(columns_off);
        next = Next::kColumns;
        continue;
      } else {
        columns_off = off;
      }
      if (translates) columns_off = columns_off.plus(translate(lost[0], lost[1]));
      next = Next::kRows;
      order = after(error);
      if (order == SinkhornOrder::kGoOn) {
        // The logarithm of a scaling, times eps, has too few digits for a potential that is small beside eps.
        if (eps <= fmin(rho_a, rho_b)) wanted = Holds::kKernel;
        continue;
      }
      wanted = Holds::kCosts;
      if (holds == Holds::kKernel) absorb(eps);
      if (order == SinkhornOrder::kNewEps) {
        eps = schedule_.eps();
        columns_off = {};
      } else {
        next = Next::kEvaluation;
      }
    }
  }

 private:
  __device__ static int thread() { return static_cast<int>(threadIdx.x); }

  __device__ void begin(const Lines<T>& lines, const double* start) {
    for (int l = thread(); l < lines.count; l += kThreads) {
      lines.potential[l] = start == nullptr ? 0.0 : start[l];
    }
  }

  // The constant that f has gained and g lost besides the potentials in memory: the plan does not change with
  // it.
  __device__ double constant_of(const Lines<T>& lines) const {
    return lines.of_columns ? -constant_ : constant_;
  }

  // Moves the best constant from the columns to the rows; returns by how much more the column sums are off.
  __device__ double translate(double lost_rows, double lost_columns) {
    const Facts& facts = task_.facts[p_];
    const double rho_b = task_.options.rho_b;
    const double more = sinkhorn_translation(task_.options.rho_a, rho_b, facts.mass[0], facts.mass[1],
                                             lost_rows, lost_columns);
    constant_ += more;
    return (facts.mass[1] + lost_columns) * fabs(expm1(more / rho_b));
  }

  // The columns become the rows, thread by thread as the rows were moved. after() comes before others read
  // them.
  __device__ void mirror(bool scaled) {
    for (int l = thread(); l < rows_.count; l += kThreads) {
      columns_.potential[l] = rows_.potential[l];
      if (!scaled) continue;
      columns_.scale[l] = rows_.scale[l];
      columns_.weighted[l] = rows_.weighted[l];
    }
  }

  // The sum that a side asks for, less its weights.
  __device__ double lost_of(const Lines<T>& lines, bool scaled, double eps) {
    const double rho = task_.rho(lines.of_columns);
    double lost = 0;
    for (int l = thread(); l < lines.count && rho < HUGE_VAL; l += kThreads) {
      const double potential = lines.potential[l] + (scaled ? eps * log(lines.scale[l]) : 0.0);
      lost += lost_by(lines.weight[l], potential + constant_of(lines), rho);
    }
    return block_sum(lost);
  }

  // The one thread's answer for all. The halves of an iteration end with block_sum(), and so does evaluate():
  // when a thread comes here, all have read the schedule, and the answer before.
  __device__ SinkhornOrder after(const SinkhornError& error) {
    FC_SHARED(SinkhornOrder, order, );
    if (threadIdx.x == 0) order = schedule_.after(error);
    __syncthreads();
    return order;
  }
  __device__ bool disappointed(double error) {
    FC_SHARED(int, go_on, );
    if (threadIdx.x == 0) go_on = schedule_.disappointed(error);
    __syncthreads();
    return go_on != 0;
  }

  // matrix = C
  __device__ void fill_costs() {
    const Costs<T> costs = costs_of(batch_, p_, false);
    for (int row = 0; row < rows_.count; row += kTileRows<T>) {
      for (int column = 0; column < columns_.count; column += kCols<T>) {
        T cost[kTileRows<T> / kSide][kCols<T> / kSide];
        cost_tile(costs, row, column, cost);
#pragma unroll
        for (int r = 0; r < kTileRows<T> / kSide; ++r) {
          const int i = row + tile_row<kTileRows<T>>(r);
#pragma unroll
          for (int c = 0; c < kCols<T> / kSide; ++c) {
            const int j = column + tile_column<T>(c);
            if (i < rows_.count && j < columns_.count) matrix_[i * width_ + j] = cost[r][c];
          }
        }
      }
    }
    __syncthreads();
  }

  // C becomes K, u and v become 1.
  __device__ void exponentiate(double inverse) {
    for (int i = thread() / 32; i < rows_.count; i += kThreads / 32) {
      for (int j = thread() % 32; j < columns_.count; j += 32) {
        T& entry = matrix_[i * width_ + j];
        entry = exponential(static_cast<T>(
            ((rows_.potential[i] - static_cast<double>(entry)) + columns_.potential[j]) * inverse));
      }
    }
    set_to_one(rows_);
    set_to_one(columns_);
    __syncthreads();
  }

  __device__ void set_to_one(const Lines<T>& lines) {
    for (int l = thread(); l < lines.count; l += kThreads) {
      lines.scale[l] = 1;
      lines.weighted[l] = static_cast<T>(lines.weight[l]);
    }
  }

  // Absorbs the scalings of both sides, when the matrix holds K no longer. The barrier at the end of
  // fill_costs() comes before anyone reads the potentials of others.
  __device__ void absorb(double eps) {
    for (int l = thread(); l < rows_.count; l += kThreads) rows_.potential[l] += eps * log(rows_.scale[l]);
    for (int l = thread(); l < columns_.count; l += kThreads) {
      columns_.potential[l] += eps * log(columns_.scale[l]);
    }
  }

  __device__ int part_length(const Lines<T>& lines, const Lines<T>& others) const {
    return static_cast<int>(fours((others.count + lines.parts - 1) / lines.parts));
  }

  // Half an iteration from K. Returns false if a sum is out of range; then nothing has changed.
  __device__ bool advance(const Lines<T>& lines, const Lines<T>& others, double eps, SinkhornError& off,
                          bool& drifted) {
    const int length = part_length(lines, others);
    for (int item = thread(); item < lines.parts * lines.count; item += kThreads) {
      const int part = item / lines.count, l = item - part * lines.count;
      scratch_[item] = weighted_sum(matrix_ + l * lines.stride, lines.step, others.weighted, part * length,
                                    min((part + 1) * length, others.count));
    }
    __syncthreads();
    bool in_range = true;
    for (int l = thread(); l < lines.count; l += kThreads) {
      double sum = scratch_[l];
      for (int part = 1; part < lines.parts; ++part) sum += scratch_[part * lines.count + l];
      in_range = in_range && sum >= 1 / kRange && sum <= kRange;
      scratch_[l] = sum;
    }
    if (!__syncthreads_and(in_range)) return false;
    const double omega = schedule_.omega(), rho = task_.rho(lines.of_columns), damp = damping(rho, eps);
    double own_off = 0, own_squares = 0;
    bool own_drifted = false;
    for (int l = thread(); l < lines.count; l += kThreads) {
      const double sum = scratch_[l], scale = lines.scale[l];
      // The error of the plan that a row pass began with, and of the one that a column pass made.
      double moved = 1 / sum, judged = 0;
      if (omega != 1 || damp != 1) {
        const double log_scale = log(scale), potential = lines.potential[l] + constant_of(lines);
        const double old = potential + eps * log_scale;
        const double log_moved = ((1 - omega) * (1 - damp) + damp) * log_scale -
                                 omega * (damp * (log_scale + log(sum)) + (1 - damp) * potential / eps);
        moved = exp(log_moved);
        judged = lines.of_columns ? potential + eps * log_moved : old;
      }
      lines.scale[l] = moved;
      lines.weighted[l] = static_cast<T>(lines.weight[l] * moved);
      const double by = off_by(lines.weight[l], sum * (lines.of_columns ? moved : scale), judged, rho);
      own_off += by;
      own_squares += task_.square_of(p_, lines.of_columns, by);
      own_drifted = own_drifted || !(moved >= 1 / kDrift && moved <= kDrift);
    }
    drifted = __syncthreads_or(own_drifted) != 0;
    off = error_of(lines, own_off, own_squares);
    return true;
  }

  // scratch[l] = log sum_o weight_o exp((f_l + g_o - C_lo) / eps), from the costs.
  __device__ void log_sums(const Lines<T>& lines, const Lines<T>& others, double eps) {
    const double inverse = 1 / eps;
    for (int o = thread(); o < others.count; o += kThreads) {
      others.scale[o] = others.potential[o] + eps * log(others.weight[o]);
    }
    __syncthreads();
    const int length = part_length(lines, others);
    for (int item = thread(); item < lines.parts * lines.count; item += kThreads) {
      const int part = item / lines.count, l = item - part * lines.count;
      const int begin = part * length, end = min(begin + length, others.count);
      const T* const cost = matrix_ + l * lines.stride;
      const auto exponent_of = [&](int o) {
        return ((lines.potential[l] - static_cast<double>(cost[o * lines.step])) + others.scale[o]) * inverse;
      };
      double top = -HUGE_VAL, sum = 0;
      for (int o = begin; o < end; ++o) {
        const double e = exponent_of(o);
        if (!(e <= top)) top = e;
      }
      for (int o = begin; o < end && !(top == -HUGE_VAL); ++o) {
        sum += static_cast<double>(exponential(static_cast<T>(exponent_of(o) - top)));
      }
      scratch_[item] = top + log(sum);
    }
    __syncthreads();
    for (int l = thread(); l < lines.count; l += kThreads) {
      double top = scratch_[l], sum = 0;
      for (int part = 1; part < lines.parts; ++part) top = fmax(top, scratch_[part * lines.count + l]);
      for (int part = 0; part < lines.parts && top > -HUGE_VAL; ++part) {
        sum += exp(scratch_[part * lines.count + l] - top);
      }
      scratch_[l] = top + log(sum);
    }
  }

  // Half an iteration from the costs; returns by how much the marginals are off.
  __device__ SinkhornError advance_from_costs(const Lines<T>& lines, const Lines<T>& others, double eps) {
    log_sums(lines, others, eps);
    const double omega = schedule_.omega(), rho = task_.rho(lines.of_columns), damp = damping(rho, eps);
    double off = 0, squares = 0;
    for (int l = thread(); l < lines.count; l += kThreads) {
      const double log_sum = scratch_[l], potential = lines.potential[l] + constant_of(lines);
      const double weight = lines.weight[l];
      const double moved = sinkhorn_allowed<T>(sinkhorn_moved(potential, log_sum, eps, omega, damp), weight);
      const double shift = lines.of_columns ? (moved - potential) / eps : 0;
      const double by =
          off_by(lines.weight[l], exp(log_sum + shift), lines.of_columns ? moved : potential, rho);
      off += by;
      squares += task_.square_of(p_, lines.of_columns, by);
      lines.potential[l] = moved - constant_of(lines);
    }
    return error_of(lines, off, squares);
  }

  // The error of a side from this thread's part of it.
  __device__ SinkhornError error_of(const Lines<T>& lines, double off, double squares) const {
    off = block_sum(off);
    if (task_.options.l2) squares = block_sum(squares);
    return task_.error_of(p_, lines.of_columns, off, squares);
  }

  // The marginals of the plan at reg and how far they are off, <P, C> and the dual; and the potentials of
  // zero weights become those that the other side implies. From the costs.
  __device__ Outcome evaluate() {
    Outcome found{0, 0, 0, 0, schedule_.iterations()};
    for (const bool of_columns : {false, true}) {
      const Lines<T> lines = of_columns ? columns_ : rows_, others = of_columns ? rows_ : columns_;
      log_sums(lines, others, task_.options.reg);
      if (!of_columns) found.transport_cost = block_sum(transport_cost());
      const double rho = task_.rho(of_columns), damp = damping(rho, task_.options.reg);
      double off = 0, squares = 0, dual = 0, mass = 0;
      for (int l = thread(); l < lines.count; l += kThreads) {
        const double weight = lines.weight[l], potential = lines.potential[l] + constant_of(lines);
        const double ratio = exp(scratch_[l]);
        const double by = off_by(weight, ratio, potential, rho);
        off += by;
        squares += task_.square_of(p_, of_columns, by);
        dual += worth(weight, potential, rho);
        mass += weight > 0 ? weight * ratio : 0;
        // This value is not read any more: a weight of 0 counts in no sum.
        if (!(weight > 0)) {
          const double implied = damp * (potential - task_.options.reg * scratch_[l]);
          lines.potential[l] = sinkhorn_allowed<T>(implied, weight) - constant_of(lines);
        }
      }
      found.error += error_of(lines, off, squares).judged;
      found.dual += block_sum(dual);
      if (!of_columns) found.mass = block_sum(mass);
    }
    return found;
  }

  // This thread's share of <P, C>, when the columns' scales are potentials with weights.
  __device__ double transport_cost() {
    const double inverse = 1 / task_.options.reg;
    double cost = 0;
    for (int i = thread() / 32; i < rows_.count; i += kThreads / 32) {
      if (!(rows_.weight[i] > 0)) continue;
      double line = 0;
      for (int j = thread() % 32; j < columns_.count; j += 32) {
        const double c = matrix_[i * width_ + j];
        const double e = ((rows_.potential[i] - c) + columns_.scale[j]) * inverse;
        line += static_cast<double>(exponential(static_cast<T>(e))) * c;
      }
      cost += rows_.weight[i] * line;
    }
    return cost;
  }

  __device__ void finish(const Outcome& found) {
    for (int l = thread(); l < rows_.count; l += kThreads) {
      task_.result.f[p_ * batch_.n + l] = rows_.potential[l] + constant_;
    }
    for (int l = thread(); l < columns_.count; l += kThreads) {
      task_.result.g[p_ * batch_.m + l] = columns_.potential[l] - constant_;
    }
    if (threadIdx.x == 0) write_outcome(task_, p_, found);
  }

  const Batch<T>& batch_;
  const Task& task_;
  const int64_t p_;
  SinkhornSchedule& schedule_;
  double* const scratch_;  // [max(kMostParts, rows, columns)]
  T* matrix_;              // [rows, width] costs or K
  int width_;
  Lines<T> rows_, columns_;
  double constant_ = 0;  // the constant that f has gained and g lost; the same in all threads
};

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksWanted<T>)
    solve_resident(Batch<T> batch, Task task, int64_t shared) {
  FC_DYNAMIC_SHARED(double, memory);
  FC_SHARED(double, schedule, [kScheduleDoubles]);
  const int64_t p = blockIdx.x;
  if (task.faults->any() || resident_bytes<T>(batch.rows(p), batch.columns(p)) > shared) return;
  Resident<T>(batch, task, p, *reinterpret_cast<SinkhornSchedule*>(schedule), memory).solve();
}

}  // namespace

template <class T>
void launch_resident(const Batch<T>& batch, const Task& task, int64_t shared) {
  const int64_t bytes = std::min(shared, resident_bytes<T>(batch.n, batch.m));
  launch(solve_resident<T>,
         {dim3(static_cast<unsigned>(batch.count)), dim3(kThreads), static_cast<size_t>(bytes),
          task.options.stream},
         batch, task, bytes);
}

template void launch_resident<float>(const Batch<float>&, const Task&, int64_t);
template void launch_resident<double>(const Batch<double>&, const Task&, int64_t);

}  // namespace fc::cuda
