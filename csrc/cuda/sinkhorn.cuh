// The code that the kernels of Sinkhorn share: the problems as a kernel sees them, tiles of their costs (the
// metric is found at run time, once for kDepth features: one kernel per metric would take the compiler four
// times as long), and exponents
//   (f_i + g_j - C_ij) / eps
// formed so that potentials and costs of many times eps lose nothing. Potentials are float64. In float64 the
// exponent is float64 too; for float32 each potential is split into two floats and the difference of the
// first from the cost keeps its rounding error (Knuth's two-sum), so what remains is the rounding of a number
// as small as the result: 13 operations, none of them in float64. Rejected: float64 exponents for float32
// costs, whose conversions alone take as long as 8 features' products; potentials over eps as one float,
// which at costs of 10^4 eps is off by 5e-4.
#pragma once

#include <cmath>
#include <new>
#include <type_traits>

#include "core/sinkhorn_schedule.h"
#include "cuda/sinkhorn.h"
#include "cuda/tile.cuh"

namespace fc::cuda {

// Rows of a tile, which has kCols<T> columns. Chains of features may be long.
template <class T>
inline constexpr int kTileRows = kTallRows<T, true>;

// Blocks that a multiprocessor should hold: the registers of a float64 tile leave room for one.
template <class T>
inline constexpr int kBlocksWanted = sizeof(T) == 4 ? 2 : 1;

// Static shared memory of tile_values() and of the functions below, rounded up.
template <class T>
inline constexpr size_t kStagingBytes =
    (kDepth * (kTileRows<T> + kCols<T> + 32 / sizeof(T)) + kSide * (kTileRows<T> + 1)) * sizeof(T) + 1024;

// A double as an unsigned number of the same order, so that atomicMax finds the largest; 0 is below all.
__device__ __forceinline__ unsigned long long ordered(double value) {
  const auto bits = static_cast<unsigned long long>(__double_as_longlong(value));
  return bits >> 63 != 0 ? ~bits : bits | 1ull << 63;
}
__device__ __forceinline__ double of_ordered(unsigned long long bits) {
  return __longlong_as_double(static_cast<long long>(bits >> 63 != 0 ? bits & ~(1ull << 63) : ~bits));
}

// The faults found in the data of all problems: the least position of each fault, all ones for none.
struct Faults {
  static constexpr unsigned long long kNone = ~0ull;
  unsigned long long values[2];     // in x, y: (problem * rows + row) * columns + column
  unsigned long long weights[2];    // in a, b: problem * rows + row
  unsigned long long no_weight[2];  // problem
  unsigned long long unequal_weight, overflow, small_reg;

  __host__ __device__ bool any() const {
    return values[0] != kNone || values[1] != kNone || weights[0] != kNone || weights[1] != kNone ||
           no_weight[0] != kNone || no_weight[1] != kNone || unequal_weight != kNone || overflow != kNone ||
           small_reg != kNone;
  }
};

// The facts about a problem that are known before it is solved.
struct Facts {
  unsigned long long most[2];  // ordered(): the farthest of x and of y from the first of y; costs and -costs
  double spread;               // of the costs, or a bound
  double mass[2];              // sums of a and b
};

// A pair of potentials' parts, see above.
template <class T>
struct Split;
template <>
struct alignas(8) Split<float> {
  float hi, lo;
};
template <>
struct Split<double> {
  double hi;
};

template <class T>
__device__ __forceinline__ Split<T> split(double value) {
  if constexpr (sizeof(T) == 4) {
    const float hi = static_cast<float>(value);
    // An infinite potential, which a weight of 0 makes, has no remainder.
    return {hi, hi - hi == 0 ? static_cast<float>(value - hi) : 0.0f};
  } else {
    return {value};
  }
}

// With the precision of its argument, under nvcc and elsewhere.
__device__ __forceinline__ float exponential(float x) { return expf(x); }
__device__ __forceinline__ double exponential(double x) { return exp(x); }

// (own + other - cost) * inverse; `other` may be -infinity, `own` may not.
__device__ __forceinline__ float exponent(Split<float> own, Split<float> other, float cost, float inverse) {
  const float gap = own.hi - cost, back = gap - own.hi;
  const float lost = (own.hi - (gap - back)) - (cost + back);
  return ((gap + other.hi) + ((lost + own.lo) + other.lo)) * inverse;
}
__device__ __forceinline__ double exponent(Split<double> own, Split<double> other, double cost,
                                           double inverse) {
  return ((own.hi - cost) + other.hi) * inverse;
}

// The problems as a kernel sees them: points of cosine have unit length already.
template <class T>
struct Batch {
  const T* x = nullptr;  // [count, n, d], or the costs [count, n, m]
  int64_t x_stride = 0;  // from problem to problem
  const T* y = nullptr;  // [count, m, d]
  int64_t count = 0, d = 0;
  int n = 0, m = 0;
  Form form = Form::kSquare;
  bool root = false;
  const double *a = nullptr, *b = nullptr;  // [count, n], [count, m]
  const int64_t *x_lengths = nullptr, *y_lengths = nullptr;

  __device__ int rows(int64_t p) const { return x_lengths == nullptr ? n : static_cast<int>(x_lengths[p]); }
  __device__ int columns(int64_t p) const {
    return y_lengths == nullptr ? m : static_cast<int>(y_lengths[p]);
  }
};

// The costs of one problem, seen from its rows or from its columns: C between `lines` and `others`.
template <class T>
struct Costs {
  RowSet<T> lines, others;
  const T* matrix = nullptr;                  // null: costs of points
  int64_t line_stride = 0, other_stride = 0;  // of the matrix
  Form form = Form::kSquare;
  bool root = false;
};

template <class T>
__device__ Costs<T> costs_of(const Batch<T>& batch, int64_t p, bool from_columns) {
  RowSet<T> x{nullptr, batch.d, nullptr, batch.rows(p)}, y{nullptr, batch.d, nullptr, batch.columns(p)};
  const T* matrix = nullptr;
  if (batch.y == nullptr) {
    matrix = batch.x + p * batch.x_stride;
  } else {
    x.data = batch.x + p * batch.x_stride;
    y.data = batch.y + p * batch.m * batch.d;
  }
  if (from_columns) return {y, x, matrix, 1, batch.m, batch.form, batch.root};
  return {x, y, matrix, batch.m, 1, batch.form, batch.root};
}

// Costs that are given, for cost_tile(). Neighbouring threads have neighbouring others of a line. If lines
// are columns, these others are rows apart in memory: then threads read along the rows, and exchange the
// values.
template <class T>
__device__ void given_tile(const Costs<T>& costs, int first_line, int first_other,
                           T (&cost)[kTileRows<T> / kSide][kCols<T> / kSide]) {
  constexpr int kR = kTileRows<T> / kSide, kC = kCols<T> / kSide;
  FC_SHARED(T, exchange, [kSide][kTileRows<T> + 1]);
  const int thread = static_cast<int>(threadIdx.x);
  const bool along = costs.other_stride == 1;
#pragma unroll
  for (int r = 0; r < kR; ++r) {
    const int place = r * kThreads + thread;
    const int line = first_line + (along ? tile_row<kTileRows<T>>(r) : place % kTileRows<T>);
#pragma unroll
    for (int c = 0; c < kC; ++c) {
      const int other = first_other + tile_column<T>(c, along ? thread % kSide : place / kTileRows<T>);
      const bool inside = line < costs.lines.count && other < costs.others.count;
      const T given = inside ? costs.matrix[line * costs.line_stride + other * costs.other_stride] : T(0);
      cost[r][c] = min(given, kSinkhornForbidden<T>);
    }
  }
  if (along) return;
#pragma unroll
  for (int c = 0; c < kC; ++c) {
    __syncthreads();  // everyone has taken their values of the column before
#pragma unroll
    for (int r = 0; r < kR; ++r) {
      const int place = r * kThreads + thread;
      exchange[place / kTileRows<T>][place % kTileRows<T>] = cost[r][c];
    }
    __syncthreads();
#pragma unroll
    for (int r = 0; r < kR; ++r) cost[r][c] = exchange[thread % kSide][tile_row<kTileRows<T>>(r)];
  }
}

// cost[r][c] of this thread's pairs of a tile, see tile.cuh; beyond the sets it is any finite number.
template <class T>
__device__ void cost_tile(const Costs<T>& costs, int first_line, int first_other,
                          T (&cost)[kTileRows<T> / kSide][kCols<T> / kSide]) {
  constexpr int kR = kTileRows<T> / kSide, kC = kCols<T> / kSide;
  if (costs.matrix != nullptr) return given_tile(costs, first_line, first_other, cost);
  // Shared memory is for matrices: sums of chains stay in registers.
  tile_values_of<T, kTileRows<T>, true, false>(costs.lines, first_line, costs.others, first_other, cost,
                                               [&](auto fn) {
                                                 if (costs.form == Form::kSquare) {
                                                   fn(std::integral_constant<Form, Form::kSquare>{});
                                                 } else if (costs.form == Form::kProduct) {
                                                   fn(std::integral_constant<Form, Form::kProduct>{});
                                                 } else {
                                                   fn(std::integral_constant<Form, Form::kAbsolute>{});
                                                 }
                                               });
#pragma unroll
  for (int r = 0; r < kR; ++r) {
#pragma unroll
    for (int c = 0; c < kC; ++c) {
      if (costs.form == Form::kProduct) cost[r][c] = T(1) - cost[r][c];
      if (costs.root) cost[r][c] = static_cast<T>(sqrt(cost[r][c]));
    }
  }
}

// The sum over the block's threads, in one order.
__device__ inline double block_sum(double own) {
  FC_SHARED(double, warps, [kThreads / 32]);
  for (int step = 16; step > 0; step /= 2) own += __shfl_xor_sync(0xffffffffu, own, step);
  __syncthreads();  // of an earlier call, everyone has read the answer
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = own;
  __syncthreads();
  double sum = 0;
  for (int warp = 0; warp < kThreads / 32; ++warp) sum += warps[warp];
  return sum;
}

// Shared memory for the schedule of the problem at hand, which has a constructor.
inline constexpr int kScheduleDoubles = sizeof(SinkhornSchedule) / sizeof(double);
static_assert(sizeof(SinkhornSchedule) % sizeof(double) == 0 && alignof(SinkhornSchedule) <= alignof(double));

// The settings of a run, as its kernel gets them.
struct Task {
  SinkhornOptions options;
  SinkhornResult result;
  const Facts* facts = nullptr;  // [count]
  const Faults* faults = nullptr;
  double reach = 0;  // kSinkhornReach of the data's type

  __device__ double rho(bool of_columns) const { return of_columns ? options.rho_b : options.rho_a; }
  // The error of a side from what its lines are off by: see SinkhornSettings.
  __device__ SinkhornError error_of(int64_t p, bool of_columns, double sum, double squares) const {
    return options.error_of(sum, squares, facts[p].mass[of_columns ? 1 : 0]);
  }
  // What a line counts for in `squares`.
  __device__ double square_of(int64_t p, bool of_columns, double off) const {
    return options.l2 ? sinkhorn_square(off, facts[p].mass[of_columns ? 1 : 0]) : 0;
  }
  __device__ bool balanced() const { return options.rho_a == HUGE_VAL && options.rho_b == HUGE_VAL; }
  __device__ double mass(int64_t p) const {
    return sinkhorn_mass(options.rho_a, options.rho_b, facts[p].mass[0], facts[p].mass[1]);
  }
  __device__ SinkhornSchedule schedule(int64_t p) const {
    return SinkhornSchedule(options, options.f != nullptr, facts[p].spread, facts[p].mass[0],
                            facts[p].mass[1], reach);
  }
};

// lambda = rho / (rho + eps)
__device__ __forceinline__ double damping(double rho, double eps) {
  return rho == HUGE_VAL ? 1.0 : rho / (rho + eps);
}

// By how much the sum `ratio` * weight of a line of the plan is off the sum that its potential asks for.
__device__ __forceinline__ double off_by(double weight, double ratio, double potential, double rho) {
  if (!(weight > 0)) return 0;
  return weight * fabs(ratio - (rho == HUGE_VAL ? 1.0 : sinkhorn_asked(potential, rho)));
}

// The sum that a weight's potential asks for, less the weight.
__device__ __forceinline__ double lost_by(double weight, double potential, double rho) {
  return weight > 0 && rho < HUGE_VAL ? weight * expm1(-potential / rho) : 0.0;
}

// The contribution of a weight's potential to the dual.
__device__ __forceinline__ double worth(double weight, double potential, double rho) {
  if (!(weight > 0)) return 0;
  return weight * (rho == HUGE_VAL ? potential : -rho * expm1(-potential / rho));
}

// The results that a kernel holds at the end of a run, and the one thread that writes them.
struct Outcome {
  double error, dual, mass, transport_cost;
  int64_t iterations;
};
__device__ inline void write_outcome(const Task& task, int64_t p, const Outcome& found) {
  const Facts& facts = task.facts[p];
  task.result.value[p] = found.dual - task.options.reg * (found.mass - facts.mass[0] * facts.mass[1]);
  task.result.transport_cost[p] = found.transport_cost;
  task.result.error[p] = found.error;
  task.result.tol[p] = sinkhorn_tolerance(task.options.tol, task.mass(p));
  task.result.iterations[p] = found.iterations;
}

// The bytes that a block needs to solve a problem in shared memory: see sinkhorn_resident.cu.
inline constexpr int kMostParts = 512;
constexpr int64_t fours(int64_t count) { return (count + 3) / 4 * 4; }

template <class T>
__host__ __device__ int64_t resident_bytes(int64_t rows, int64_t columns) {
  const int64_t longer = rows > columns ? rows : columns;
  const int64_t doubles = (longer > kMostParts ? longer : kMostParts) + 2 * rows + 2 * columns;
  const int64_t values = fours(rows) + fours(columns) + rows * (columns | 1);
  return (doubles + doubles % 2) * 8 + values * static_cast<int64_t>(sizeof(T));
}

// Solves the problems that fit into `shared` bytes, one block per problem; on the task's stream.
template <class T>
void launch_resident(const Batch<T>& batch, const Task& task, int64_t shared);

// Solves the others, by all blocks at once.
template <class T>
void launch_streaming(const Batch<T>& batch, const Task& task, int64_t shared);

}  // namespace fc::cuda
