// Batched Sinkhorn on the GPU: the work before and after the iterations.
//
//   inspect, weigh   check the data, and bound each problem's costs by the triangle inequality through the
//                    first column's point: points and weights are read once
//   solve            problems whose matrix fits into a block's shared memory: one block per problem
//                    (sinkhorn_resident.cu); the rest: all blocks together (sinkhorn_streaming.cu)
//   read the faults  the only time that the host waits
//   apply, plan      P_ij = a_i b_j exp((f_i + g_j - C_ij) / reg) from tiles, applied on the spot or written
//
// The lengths of a problem decide, on the device, which kernel takes it: both kernels are started if sizes
// differ, and each skips the other's problems.
//
// Rejected: one launch per problem; float32 potentials, whose rounding alone moves the marginals by 1.5e-4 if
// reg is 1e-4 of the largest cost.
#include <algorithm>
#include <limits>

#include "cuda/device_buffer.h"
#include "cuda/launch.h"
#include "cuda/pack.cuh"
#include "cuda/sinkhorn.cuh"
#include "cuda/sinkhorn.h"

namespace fc::cuda {
namespace {

// Largest difference of two masses that are to be equal, relative to the larger.
constexpr double kUnequal = 1e-4;

__device__ void lower(unsigned long long* least, int64_t at) {
  atomicMin(least, static_cast<unsigned long long>(at));
}

// faults.values and facts.most. Rows are shared out to warps: `slices` blocks per problem, blockIdx.x = p *
// slices + slice.
template <class T>
__global__ void __launch_bounds__(kThreads)
    inspect(SinkhornBatch<T> problems, int64_t slices, Facts* facts, Faults* faults) {
  constexpr int kWarps = kThreads / 32;
  const int64_t p = blockIdx.x / slices, slice = blockIdx.x % slices;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const bool points = problems.y != nullptr;
  const int64_t n = problems.x_lengths == nullptr ? problems.n : problems.x_lengths[p];
  const int64_t m = problems.y_lengths == nullptr ? problems.m : problems.y_lengths[p];
  const int64_t columns = points ? problems.d : m, stride = points ? problems.d : problems.m;
  const T* const origin = points ? problems.y + p * problems.m * stride : nullptr;
  unsigned long long most[2] = {};
  for (int64_t row = slice * kWarps + threadIdx.x / 32; row < (points ? n + m : n); row += slices * kWarps) {
    const int side = row < n ? 0 : 1;
    const int64_t at = side == 1 ? p * problems.m + row - n : problems.shared ? row : p * problems.n + row;
    const T* const in = (side == 0 ? problems.x : problems.y) + at * stride;
    double sum = 0;
    for (int64_t k = lane; k < columns; k += 32) {
      const double value = in[k];
      if (!points && value == HUGE_VAL) continue;  // a forbidden pair
      if (!is_finite(value)) {
        lower(&faults->values[side], at * stride + k);
      } else if (!points) {
        most[0] = max(most[0], ordered(value));
        most[1] = max(most[1], ordered(-value));
      } else {
        const double gap = value - static_cast<double>(origin[k]);
        sum += problems.metric == Metric::kL1 ? fabs(gap) : gap * gap;
      }
    }
    if (!points) continue;
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    most[side] = max(most[side], ordered(problems.metric == Metric::kL1 ? sum : sqrt(sum)));
  }
  for (int side = 0; side < 2; ++side) {
    // One warp at a time: whole warps run on, and one value per warp is little work for the atomics.
    for (int step = 16; step > 0; step /= 2) {
      most[side] = max(most[side], __shfl_xor_sync(0xffffffffu, most[side], step));
    }
    if (lane == 0 && most[side] != 0) atomicMax(&facts[p].most[side], most[side]);
  }
}

// The rest of facts and faults: one block per problem.
template <class T>
__global__ void __launch_bounds__(kThreads)
    weigh(SinkhornBatch<T> problems, double reg, bool balanced, Facts* facts, Faults* faults) {
  const int64_t p = blockIdx.x;
  Facts& own = facts[p];
  double mass[2];
  for (int side = 0; side < 2; ++side) {
    const int64_t* const lengths = side == 0 ? problems.x_lengths : problems.y_lengths;
    const int64_t most = side == 0 ? problems.n : problems.m, count = lengths == nullptr ? most : lengths[p];
    const double* const weights = (side == 0 ? problems.a : problems.b) + p * most;
    double sum = 0;
    for (int64_t l = threadIdx.x; l < count; l += kThreads) {
      const double weight = weights[l];
      if (!(weight >= 0) || !is_finite(weight)) lower(&faults->weights[side], p * most + l);
      sum += weight;
    }
    mass[side] = block_sum(sum);
  }
  if (threadIdx.x != 0) return;
  const bool points = problems.y != nullptr;
  double spread = of_ordered(own.most[0]) + of_ordered(own.most[1]);
  if (points && problems.metric == Metric::kCosine) spread = 2;
  if (points && problems.metric == Metric::kSqeuclidean) spread *= spread;
  own.spread = spread;
  for (int side = 0; side < 2; ++side) {
    own.mass[side] = mass[side];
    if (!(mass[side] > 0) || !is_finite(mass[side])) lower(&faults->no_weight[side], p);
  }
  if (balanced && !(fabs(mass[0] - mass[1]) <= kUnequal * fmax(mass[0], mass[1]))) {
    lower(&faults->unequal_weight, p);
  }
  const double most = static_cast<double>(std::numeric_limits<T>::max());
  // Euclidean distances are the roots of their squares.
  const bool squares = points && problems.metric == Metric::kEuclidean;
  if (!(spread <= (squares ? sqrt(most) : most))) lower(&faults->overflow, p);
  if (!(spread <= kSinkhornExponents * most * reg)) lower(&faults->small_reg, p);
}

// plain [count, lines] = potentials, weighted = potentials + reg log weight
template <class T>
__global__ void __launch_bounds__(kThreads)
    split_potentials(const double* potentials, const double* weights, int64_t count, double reg,
                     Split<T>* plain, Split<T>* weighted) {
  const int64_t l = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (l >= count) return;
  plain[l] = split<T>(potentials[l]);
  weighted[l] = split<T>(potentials[l] + reg * log(weights[l]));
}

// The arguments of the kernels that make plans: for each problem its lines and the others, [count, lines].
template <class T>
struct Plans {
  Batch<T> batch;
  bool of_columns;  // lines are columns: P^T
  double reg;
  const double* weights;     // of the lines
  const Split<T>* plain;     // of the lines
  const Split<T>* weighted;  // of the others
};

// p[r][c] = P / weight of the line, 0 beyond the problem; this thread's share of a tile.
template <class T>
__device__ void plan_tile(const Plans<T>& plans, int64_t problem, int first_line, int first_other,
                          T (&p)[kTileRows<T> / kSide][kCols<T> / kSide]) {
  const Costs<T> costs = costs_of(plans.batch, problem, plans.of_columns);
  const Split<T>* const plain = plans.plain + problem * (plans.of_columns ? plans.batch.m : plans.batch.n);
  const Split<T>* const weighted =
      plans.weighted + problem * (plans.of_columns ? plans.batch.n : plans.batch.m);
  const T inverse = static_cast<T>(1 / plans.reg);
  cost_tile(costs, first_line, first_other, p);
#pragma unroll
  for (int c = 0; c < kCols<T> / kSide; ++c) {
    const int o = first_other + tile_column<T>(c);
    const Split<T> other = o < costs.others.count ? weighted[o] : split<T>(-HUGE_VAL);
#pragma unroll
    for (int r = 0; r < kTileRows<T> / kSide; ++r) {
      const int l = first_line + tile_row<kTileRows<T>>(r);
      const bool inside = l < costs.lines.count && o < costs.others.count;
      p[r][c] = inside ? exponential(exponent(plain[l], other, p[r][c], inverse)) : T(0);
    }
  }
}

// out [count, n, m] = P: one block per tile, blockIdx.x = (problem * line tiles + tile) * other tiles + tile.
template <class T>
__global__ void __launch_bounds__(kThreads) write_plan(Plans<T> plans, double* out) {
  const int n = plans.batch.n, m = plans.batch.m;
  const int other_tiles = (m + kCols<T> - 1) / kCols<T>, tiles = (n + kTileRows<T> - 1) / kTileRows<T>;
  const int64_t problem = blockIdx.x / (static_cast<int64_t>(tiles) * other_tiles);
  const int first_line = static_cast<int>(blockIdx.x / other_tiles % tiles) * kTileRows<T>;
  const int first_other = static_cast<int>(blockIdx.x % other_tiles) * kCols<T>;
  T p[kTileRows<T> / kSide][kCols<T> / kSide];
  plan_tile(plans, problem, first_line, first_other, p);
#pragma unroll
  for (int r = 0; r < kTileRows<T> / kSide; ++r) {
    const int l = first_line + tile_row<kTileRows<T>>(r);
    if (l >= n) continue;
    const double weight = l < plans.batch.rows(problem) ? plans.weights[problem * n + l] : 0;
#pragma unroll
    for (int c = 0; c < kCols<T> / kSide; ++c) {
      const int o = first_other + tile_column<T>(c);
      if (o >= m) continue;
      // A weight of 0 makes any value 0.
      out[(problem * n + l) * m + o] = weight > 0 ? weight * static_cast<double>(p[r][c]) : 0;
    }
  }
}

// out [count, lines, k]: out_lq = weight_l sum_o (P_lo / weight_l) v_oq. One block per kTileRows lines and
// kTerms columns of v, along all others; sums of a thread's part of a tile in T, of tiles in float64.
template <class T>
__global__ void __launch_bounds__(kThreads)
    apply_plan(Plans<T> plans, const double* v, int64_t k, int64_t terms, double* out) {
  constexpr int kTerms = 4, kR = kTileRows<T> / kSide, kC = kCols<T> / kSide;
  FC_SHARED(T, v_part, [kCols<T>][kTerms]);
  const int lines = plans.of_columns ? plans.batch.m : plans.batch.n;
  const int tiles = (lines + kTileRows<T> - 1) / kTileRows<T>;
  const int64_t problem = blockIdx.x / (tiles * terms);
  const int first_line = static_cast<int>(blockIdx.x / terms % tiles) * kTileRows<T>;
  const int64_t first_term = blockIdx.x % terms * kTerms;
  const int own_lines = plans.of_columns ? plans.batch.columns(problem) : plans.batch.rows(problem);
  const int others = plans.of_columns ? plans.batch.rows(problem) : plans.batch.columns(problem);
  v += problem * (plans.of_columns ? plans.batch.n : plans.batch.m) * k;
  double sum[kR][kTerms] = {};
  for (int first_other = 0; first_other < others && first_line < own_lines; first_other += kCols<T>) {
    __syncthreads();  // everyone is done with what the last round staged
    for (int t = static_cast<int>(threadIdx.x); t < kCols<T> * kTerms; t += kThreads) {
      const int o = first_other + t / kTerms;
      const int64_t q = first_term + t % kTerms;
      v_part[t / kTerms][t % kTerms] = o < others && q < k ? static_cast<T>(v[o * k + q]) : T(0);
    }
    T p[kR][kC];
    plan_tile(plans, problem, first_line, first_other, p);
    __syncthreads();
#pragma unroll
    for (int q = 0; q < kTerms; ++q) {
      T part[kR] = {};
#pragma unroll
      for (int c = 0; c < kC; ++c) {
        const T value = v_part[tile_column<T>(c)][q];
#pragma unroll
        for (int r = 0; r < kR; ++r) part[r] = fused(p[r][c], value, part[r]);
      }
#pragma unroll
      for (int r = 0; r < kR; ++r) sum[r][q] += static_cast<double>(part[r]);
    }
  }
#pragma unroll
  for (int r = 0; r < kR; ++r) {
    const int l = first_line + tile_row<kTileRows<T>>(r);
    const double weight = l < own_lines ? plans.weights[problem * lines + l] : 0;
#pragma unroll
    for (int q = 0; q < kTerms; ++q) {
      double total = sum[r][q];
      for (int step = kSide / 2; step > 0; step /= 2) total += __shfl_xor_sync(0xffffffffu, total, step);
      if (threadIdx.x % kSide != 0 || l >= lines || first_term + q >= k) continue;
      out[(problem * lines + l) * k + first_term + q] = weight > 0 ? weight * total : 0;
    }
  }
}

// ---- the host's side

// Points as the tiles take them: those of cosine are brought to unit length, in memory of their own.
template <class T>
class Packed {
 public:
  Packed(const SinkhornBatch<T>& problems, cudaStream_t stream) {
    batch_.x = problems.x;
    batch_.y = problems.y;
    batch_.x_stride = problems.shared ? 0 : problems.n * (problems.y == nullptr ? problems.m : problems.d);
    batch_.count = problems.batch;
    batch_.d = problems.d;
    batch_.n = static_cast<int>(problems.n);
    batch_.m = static_cast<int>(problems.m);
    batch_.form = form_of(problems.metric);
    batch_.root = problems.metric == Metric::kEuclidean;
    batch_.a = problems.a;
    batch_.b = problems.b;
    batch_.x_lengths = problems.x_lengths;
    batch_.y_lengths = problems.y_lengths;
    if (problems.y == nullptr || problems.metric != Metric::kCosine) return;
    batch_.x = unit(problems.x, problems.batch * problems.n, problems.d, x_, stream);
    batch_.y = unit(problems.y, problems.batch * problems.m, problems.d, y_, stream);
  }

  const Batch<T>& batch() const { return batch_; }

 private:
  static const T* unit(const T* points, int64_t rows, int64_t d, DeviceBuffer<T>& owner,
                       cudaStream_t stream) {
    owner = DeviceBuffer<T>(rows * d, stream);
    launch_pack(TensorView<const T, 2>::compact(points, rows, d), true, owner.data(), nullptr, nullptr,
                stream);
    return owner.data();
  }

  Batch<T> batch_;
  DeviceBuffer<T> x_, y_;
};

// The first of the faults, those of values before those of sums.
template <class T>
SinkhornVerdict verdict_of(const Faults& faults, const SinkhornBatch<T>& problems) {
  SinkhornVerdict verdict;
  const auto found = [&](unsigned long long at, SinkhornVerdict::Kind kind, bool second, int64_t rows,
                         int64_t columns) {
    if (at == Faults::kNone || verdict.kind != SinkhornVerdict::kFine) return;
    const auto position = static_cast<int64_t>(at);
    verdict = {kind, second, position / columns / rows, position / columns % rows, position % columns};
  };
  const bool points = problems.y != nullptr;
  found(faults.values[0], SinkhornVerdict::kNotFinite, false, problems.n, points ? problems.d : problems.m);
  found(faults.values[1], SinkhornVerdict::kNotFinite, true, problems.m, problems.d);
  found(faults.weights[0], SinkhornVerdict::kBadWeight, false, problems.n, 1);
  found(faults.weights[1], SinkhornVerdict::kBadWeight, true, problems.m, 1);
  found(faults.no_weight[0], SinkhornVerdict::kNoWeight, false, 1, 1);
  found(faults.no_weight[1], SinkhornVerdict::kNoWeight, true, 1, 1);
  found(faults.unequal_weight, SinkhornVerdict::kUnequalWeight, false, 1, 1);
  found(faults.overflow, SinkhornVerdict::kOverflow, false, 1, 1);
  found(faults.small_reg, SinkhornVerdict::kSmallReg, false, 1, 1);
  return verdict;
}

// The shared memory that a block may have for its matrix.
template <class T>
int64_t shared_for(int64_t wanted) {
  int device = 0, most = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
        "shared memory of a block");
  const int64_t room = most - static_cast<int64_t>(kStagingBytes<T>);
  return wanted < 0 ? room : std::min(wanted, room);
}

// Potentials of both sides, split.
template <class T>
class SplitPotentials {
 public:
  SplitPotentials(const double* potentials, const double* weights, int64_t count, double reg,
                  cudaStream_t stream)
      : plain_(count, stream), weighted_(count, stream) {
    const dim3 blocks(static_cast<unsigned>((count + kThreads - 1) / kThreads));
    launch(split_potentials<T>, {blocks, dim3(kThreads), 0, stream}, potentials, weights, count, reg,
           plain_.data(), weighted_.data());
  }
  const Split<T>* plain() const { return plain_.data(); }
  const Split<T>* weighted() const { return weighted_.data(); }

 private:
  DeviceBuffer<Split<T>> plain_, weighted_;
};

int64_t tiles_of(int64_t count, int size) { return (count + size - 1) / size; }

}  // namespace

template <class T>
SinkhornVerdict sinkhorn(const SinkhornBatch<T>& problems, const SinkhornOptions& options,
                         const SinkhornResult& result) {
  const cudaStream_t stream = options.stream;
  const DeviceBuffer<Facts> facts(problems.batch, stream);
  const DeviceBuffer<Faults> faults(1, stream);
  check(cudaMemsetAsync(facts.data(), 0, sizeof(Facts) * static_cast<size_t>(problems.batch), stream),
        "clearing device memory");
  check(cudaMemsetAsync(faults.data(), 0xff, sizeof(Faults), stream), "clearing device memory");
  const int64_t values =
      problems.y == nullptr ? problems.n * problems.m : (problems.n + problems.m) * problems.d;
  const int64_t slices = std::clamp<int64_t>(values / 16384, 1, std::max<int64_t>(4096 / problems.batch, 1));
  launch(inspect<T>, {dim3(static_cast<unsigned>(problems.batch * slices)), dim3(kThreads), 0, stream},
         problems, slices, facts.data(), faults.data());
  const bool balanced = std::isinf(options.rho_a) && std::isinf(options.rho_b);
  launch(weigh<T>, {dim3(static_cast<unsigned>(problems.batch)), dim3(kThreads), 0, stream}, problems,
         options.reg, balanced, facts.data(), faults.data());

  const Packed<T> packed(problems, stream);
  const Task task{options, result, facts.data(), faults.data(), kSinkhornReach<T>};
  const int64_t shared = shared_for<T>(options.shared_bytes);
  const bool ragged = problems.x_lengths != nullptr || problems.y_lengths != nullptr;
  const bool all_fit = resident_bytes<T>(problems.n, problems.m) <= shared;
  if (all_fit || (ragged && resident_bytes<T>(1, 1) <= shared)) {
    launch_resident(packed.batch(), task, shared);
  }
  if (!all_fit) launch_streaming(packed.batch(), task, shared);

  Faults found;
  check(cudaMemcpyAsync(&found, faults.data(), sizeof found, cudaMemcpyDeviceToHost, stream),
        "reading the result");
  check(cudaStreamSynchronize(stream), "Sinkhorn on the GPU");
  return verdict_of(found, problems);
}

template <class T>
void sinkhorn_apply(const SinkhornBatch<T>& problems, double reg, const double* f, const double* g,
                    const double* v, int64_t k, bool transpose, double* out, cudaStream_t stream) {
  const Packed<T> packed(problems, stream);
  const SplitPotentials<T> rows(f, problems.a, problems.batch * problems.n, reg, stream);
  const SplitPotentials<T> columns(g, problems.b, problems.batch * problems.m, reg, stream);
  const Plans<T> plans{packed.batch(),
                       transpose,
                       reg,
                       transpose ? problems.b : problems.a,
                       transpose ? columns.plain() : rows.plain(),
                       transpose ? rows.weighted() : columns.weighted()};
  const int64_t terms = tiles_of(k, 4);
  const int64_t blocks = problems.batch * tiles_of(transpose ? problems.m : problems.n, kTileRows<T>) * terms;
  launch(apply_plan<T>, {dim3(static_cast<unsigned>(blocks)), dim3(kThreads), 0, stream}, plans, v, k, terms,
         out);
}

template <class T>
void sinkhorn_plan(const SinkhornBatch<T>& problems, double reg, const double* f, const double* g,
                   double* out, cudaStream_t stream) {
  const Packed<T> packed(problems, stream);
  const SplitPotentials<T> rows(f, problems.a, problems.batch * problems.n, reg, stream);
  const SplitPotentials<T> columns(g, problems.b, problems.batch * problems.m, reg, stream);
  const Plans<T> plans{packed.batch(), false, reg, problems.a, rows.plain(), columns.weighted()};
  const int64_t blocks = problems.batch * tiles_of(problems.n, kTileRows<T>) * tiles_of(problems.m, kCols<T>);
  launch(write_plan<T>, {dim3(static_cast<unsigned>(blocks)), dim3(kThreads), 0, stream}, plans, out);
}

#define FC_INSTANTIATE(T)                                                                                \
  template SinkhornVerdict sinkhorn<T>(const SinkhornBatch<T>&, const SinkhornOptions&,                  \
                                       const SinkhornResult&);                                           \
  template void sinkhorn_apply<T>(const SinkhornBatch<T>&, double, const double*, const double*,         \
                                  const double*, int64_t, bool, double*, cudaStream_t);                  \
  template void sinkhorn_plan<T>(const SinkhornBatch<T>&, double, const double*, const double*, double*, \
                                 cudaStream_t);
FC_INSTANTIATE(float)
FC_INSTANTIATE(double)
#undef FC_INSTANTIATE

}  // namespace fc::cuda
