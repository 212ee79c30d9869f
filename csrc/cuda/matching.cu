// For each dimension d and row i:
//     u_id = (m_scale m_d + m_step g_id) / (sqrt(v_scale v_d + v_step g_id^2) + eps)
// and for each group the `top` dimensions of largest |mean_i u_id|.
//
// The dimensions are taken in chunks, each twice as long as the one before. For a chunk
//
//   sieve         A thread has a dimension and a group, and sums the group's updates in float. If the mean
//                 of a dimension may be above the bar, the least value kept so far, by a bound of the
//                 rounding errors, the dimension joins the candidates.
//   weigh         A thread has a candidate and sums its updates in double. A mean above the bar joins the
//                 list.
//   keep_largest  A block has a group's list. It finds the list's top-th value, eight bits at a time by
//                 histograms, and the lowest dimensions of that value; and keeps everything above.
//
// Bar, candidates and lists stay on the device; the host only launches. With random data top ln 2 dimensions
// of a chunk pass, so that a list has less than twice the entries that it keeps. Some gradients go to weigh()
// right away, as all of the first chunk does: double ones, those without a history, and those with an eps so
// tiny that floats underflow.
//
// A low-rank gradient's entries are made from the generator's words: one normal number per direction,
// dimension and 16 rows; a block of the generator would give four. Sums over several directions are made in
// double in the sieve too, because cancellation in them would exceed its bound.
//
// Order of sums: the rows', 16 at a time in float, then in double. Lists are in no order, but their contents
// are exact. Cost: B D square roots and quotients, in float: a GPU made for games does 64 operations in the
// time of one in double. Bytes: g, and m and v once per group. Memory: 24 bytes per group and dimension of a
// chunk; a chunk has 2^19 of these at most (or `top` dimensions).
//
// Rejected: double on the spot if one dimension of a warp passes (a few per cent of the dimensions do, and
// with them half of the warps); sorting each chunk's means with the list (the whole of D is sorted, for a
// list of a thousandth of it).
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "core/philox.h"
#include "cuda/device_buffer.h"
#include "cuda/launch.h"
#include "cuda/matching.h"
#include "cuda/normal.cuh"
#include "cuda/pace.h"

namespace fc::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kListThreads = 512;  // of keep_largest()
constexpr int kRows = 16;          // at a time, summed in float before the sum goes on in double
constexpr int kBins = 256;
constexpr int64_t kChunk = int64_t{1} << 19;  // dimensions times groups, at most
constexpr uint32_t kStream = 4;  // of the generator: the number after those of the kinds of sketches
constexpr double kLeastEpsOfSieve = 1e-10;  // below this eps, underflow in float could change u visibly

__device__ __forceinline__ float fused(float a, float b, float c) { return __fmaf_rn(a, b, c); }
__device__ __forceinline__ double fused(double a, double b, double c) { return __fma_rn(a, b, c); }
__device__ __forceinline__ float root_of(float x) { return sqrtf(x); }
__device__ __forceinline__ double root_of(double x) { return sqrt(x); }
__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

// Not NaN, not infinite.
__device__ __forceinline__ bool is_finite(double x) { return x - x == 0; }

constexpr int64_t parts(int64_t count, int64_t part) { return (count + part - 1) / part; }

// ---- gradients, as kernels take them

template <class X>
using OnDevice = std::conditional_t<std::is_same_v<X, Half>, __half,
                                    std::conditional_t<std::is_same_v<X, BFloat16>, __nv_bfloat16, X>>;

template <class X>
struct Rows {
  const OnDevice<X>* data;  // [B, D]
  int64_t stride, step;

  explicit Rows(const DenseGradients<X>& g)
      : data(reinterpret_cast<const OnDevice<X>*>(g.rows.data)),
        stride(g.rows.stride[0]),
        step(g.rows.stride[1]) {}

  // A dimension.
  struct Column {
    const OnDevice<X>* at;
    int64_t stride;

    // out[r] = the entry of rows[r] for r < count, else 0.
    template <class F>
    __device__ void take(const int64_t* rows, int count, F (&out)[kRows]) const {
#pragma unroll
      for (int r = 0; r < kRows; ++r) out[r] = r < count ? static_cast<F>(widen(at[rows[r] * stride])) : F(0);
    }
  };

  __device__ Column column(int64_t d) const { return {data + d * step, stride}; }
};

// Element d of direction p.
__device__ float direction_element(uint64_t seed, uint32_t p, int64_t d) {
  const auto block = static_cast<uint64_t>(d / 4);
  const PhiloxBlock words =
      philox4x32({static_cast<uint32_t>(block), static_cast<uint32_t>(block >> 32), p, kStream},
                 {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)});
  const bool low = d % 4 < 2;
  float x, y;
  normal_pair(low ? words[0] : words[2], low ? words[1] : words[3], &x, &y);
  return d % 2 == 0 ? x : y;
}

template <class X>
struct Coefficients {
  const X* data;  // [B, q]
  int64_t stride, step, q;
  uint64_t seed;

  explicit Coefficients(const LowRankGradients<X>& g)
      : data(g.coefficients.data),
        stride(g.coefficients.stride[0]),
        step(g.coefficients.stride[1]),
        q(g.coefficients.cols()),
        seed(g.seed) {}

  struct Column {
    const Coefficients& of;
    int64_t d;
    float z;  // of direction 0

    template <class F>
    __device__ void take(const int64_t* rows, int count, F (&out)[kRows]) const {
      if (of.q == 1) {
#pragma unroll
        for (int r = 0; r < kRows; ++r)
          out[r] = r < count ? static_cast<F>(of.data[rows[r] * of.stride]) * static_cast<F>(z) : F(0);
        return;
      }
      double sum[kRows] = {};
      for (int64_t p = 0; p < of.q; ++p) {
        const double own = p == 0 ? z : direction_element(of.seed, static_cast<uint32_t>(p), d);
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          if (r < count) sum[r] += static_cast<double>(of.data[rows[r] * of.stride + p * of.step]) * own;
        }
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) out[r] = static_cast<F>(sum[r]);
    }
  };

  __device__ Column column(int64_t d) const { return {*this, d, direction_element(seed, 0, d)}; }
};

template <class X>
Rows<X> for_kernels(const DenseGradients<X>& g) {
  return Rows<X>(g);
}
template <class X>
Coefficients<X> for_kernels(const LowRankGradients<X>& g) {
  return Coefficients<X>(g);
}

// ---- updates

template <class Source, class T>
struct Problem {
  Source g;
  AdamRule rule;
  const T *m, *v;         // [D]
  const int64_t* member;  // [R]
  const int64_t* offset;  // [G + 1]
};

// Updates in one dimension, in F.
template <class F>
struct Updates {
  bool has_history;
  F m = 0, v = 0;  // m_scale m, v_scale v
  F m_step, v_step, eps;

  template <class T>
  __device__ Updates(const AdamRule& rule, const T* all_m, const T* all_v, int64_t d)
      : has_history(rule.has_history),
        m_step(static_cast<F>(rule.m_step)),
        v_step(static_cast<F>(rule.v_step)),
        eps(static_cast<F>(rule.eps)) {
    if (!has_history) return;
    m = static_cast<F>(rule.m_scale) * static_cast<F>(all_m[d]);
    v = static_cast<F>(rule.v_scale) * static_cast<F>(all_v[d]);
  }

  __device__ F operator()(F g) const {
    if (!has_history) return g;
    const F root = root_of(fused(v_step * g, g, v));
    const F u = fused(m_step, g, m) / (root + eps);
    // A square beyond float makes the sum NaN, which passes the sieve.
    return std::is_same_v<F, float> ? u + (root - root) : u;
  }
};

// The sum of the group's updates in a dimension.
template <class F, class Source, class T>
__device__ double sum_of_updates(const Problem<Source, T>& p, int64_t group, int64_t d) {
  const Updates<F> update(p.rule, p.m, p.v, d);
  const auto column = p.g.column(d);
  const int64_t last = p.offset[group + 1];
  double total = 0;
  for (int64_t row = p.offset[group]; row < last; row += kRows) {
    const int count = static_cast<int>(min(last - row, int64_t{kRows}));
    F g[kRows];
    column.take(p.member + row, count, g);
    if constexpr (std::is_same_v<F, float>) {
      float sum = 0;
#pragma unroll
      for (int r = 0; r < kRows; ++r) sum += r < count ? update(g[r]) : 0.0f;
      total += sum;
    } else {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (r < count) total += update(g[r]);
      }
    }
  }
  return total;
}

// ---- lists

// The lists of each group.
struct Lists {
  int64_t top, width, chunk;   // a list has room for width = top + chunk entries
  double* value;               // [G, width]
  int64_t* at;                 // [G, width]
  unsigned long long* length;  // [G]
  double* bar;                 // [G]
  int64_t* candidate;          // [G, chunk]
  unsigned long long* found;   // [G]
  double* kept_value;          // [G, top]
  int64_t* kept_at;            // [G, top]
};

__global__ void __launch_bounds__(kThreads) clear(Lists lists, int64_t groups) {
  const int64_t group = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (group >= groups) return;
  lists.length[group] = lists.found[group] = 0;
  lists.bar[group] = -1;
}

// A place behind `*length` others for each lane of the warp that `joins`; all lanes have to call this.
__device__ unsigned long long place_in(unsigned long long* length, bool joins) {
  const unsigned lanes = __ballot_sync(~0u, joins);
  const int lane = static_cast<int>(threadIdx.x % 32);
  unsigned long long first = 0;
  if (lane == 0 && lanes != 0) first = atomicAdd(length, static_cast<unsigned long long>(__popc(lanes)));
  return __shfl_sync(~0u, first, 0) + static_cast<unsigned>(__popc(lanes & ((1u << lane) - 1)));
}

template <class Source>
__global__ void __launch_bounds__(kThreads)
    sieve(Problem<Source, float> p, Lists lists, int64_t begin, int64_t count) {
  const int64_t blocks = (count + kThreads - 1) / kThreads, group = blockIdx.x / blocks;
  const int64_t j = blockIdx.x % blocks * kThreads + threadIdx.x, d = begin + j;
  bool passes = false;
  if (j < count) {
    const double mean =
        fabs(sum_of_updates<float>(p, group, d)) / static_cast<double>(p.offset[group + 1] - p.offset[group]);
    // |u| is at most this: the share of g alone plus that of m alone; sums of kRows terms and the eight
    // roundings of each are off by so many units.
    const Updates<float> update(p.rule, p.m, p.v, d);
    const double most =
        p.rule.m_step / sqrt(p.rule.v_step) +
        fabs(static_cast<double>(update.m)) / (sqrt(static_cast<double>(update.v)) + p.rule.eps);
    passes = !(mean + (kRows + 8) * 0x1p-24 * most <= lists.bar[group] && p.v[d] >= 0);
  }
  const unsigned long long place = place_in(&lists.found[group], passes);
  if (passes) lists.candidate[group * lists.chunk + static_cast<int64_t>(place)] = d;
}

// The means of the candidates, or of all `count` dimensions.
template <class Source, class T>
__global__ void __launch_bounds__(kThreads)
    weigh(Problem<Source, T> p, Lists lists, int64_t begin, int64_t count, bool sieved, long long* refused) {
  const int64_t blocks = (count + kThreads - 1) / kThreads, group = blockIdx.x / blocks;
  const int64_t first = blockIdx.x % blocks * kThreads, j = first + threadIdx.x;
  if (sieved) count = static_cast<int64_t>(lists.found[group]);
  if (first >= count) return;
  bool joins = false;
  double value = 0;
  int64_t d = 0;
  if (j < count) {
    d = sieved ? lists.candidate[group * lists.chunk + j] : begin + j;
    value = fabs(sum_of_updates<double>(p, group, d) /
                 static_cast<double>(p.offset[group + 1] - p.offset[group]));
    bool sound = is_finite(value);
    if (p.rule.has_history) sound = sound && is_finite(p.m[d]) && is_finite(p.v[d]) && p.v[d] >= 0;
    if (!sound) atomicMin(refused, static_cast<long long>(d));
    joins = sound && value > lists.bar[group];
  }
  const auto place = static_cast<int64_t>(place_in(&lists.length[group], joins));
  if (!joins) return;
  lists.value[group * lists.width + place] = value;
  lists.at[group * lists.width + place] = d;
}

// One key of several, shared by the block.
struct Rank {
  unsigned long long key;
  unsigned left;   // which of the entries that have this key, from 1 on
  unsigned equal;  // how many have it
};

// The left-th largest of the keys that key_of(i, &key) gives for i < count. All threads of the block have to
// call this.
template <class KeyOf>
__device__ Rank find_rank(int64_t count, unsigned left, const KeyOf& key_of) {
  FC_SHARED(unsigned, histogram, [kBins]);
  FC_SHARED(Rank, shared, );
  const int t = static_cast<int>(threadIdx.x), lane = t % 32;
  unsigned long long prefix = 0, known = 0;
  Rank rank{0, left, 0};
  for (int shift = 56; shift >= 0; shift -= 8) {
    // The histogram has been read before the barrier that ended the last round, and `shared` is read before
    // the next one, which comes before anything is written to it.
    for (int b = t; b < kBins; b += kListThreads) histogram[b] = 0;
    __syncthreads();
    for (int64_t i = t; i < count; i += kListThreads) {
      unsigned long long key = 0;
      if (key_of(i, &key) && (key & known) == prefix) atomicAdd(&histogram[key >> shift & (kBins - 1)], 1u);
    }
    __syncthreads();
    if (t < 32) {
      constexpr int kOwn = kBins / 32;  // the largest first
      const int highest = kBins - 1 - lane * kOwn;
      unsigned own = 0;
      for (int b = 0; b < kOwn; ++b) own += histogram[highest - b];
      unsigned above = own;
      for (int delta = 1; delta < 32; delta *= 2) {
        const unsigned more = __shfl_up_sync(~0u, above, delta);
        if (lane >= delta) above += more;
      }
      above -= own;
      if (above < rank.left && rank.left <= above + own) {
        int b = highest;
        for (; above + histogram[b] < rank.left; --b) above += histogram[b];
        shared = {prefix | static_cast<unsigned long long>(b) << shift, rank.left - above, histogram[b]};
      }
    }
    __syncthreads();
    rank = shared;
    prefix = rank.key;
    known |= static_cast<unsigned long long>(kBins - 1) << shift;
  }
  return rank;
}

// One block per group. Values are not negative, so their bits have the same order.
__global__ void __launch_bounds__(kListThreads) keep_largest(Lists lists) {
  FC_SHARED(unsigned long long, kept, );
  const int64_t group = blockIdx.x, top = lists.top, length = static_cast<int64_t>(lists.length[group]);
  const int t = static_cast<int>(threadIdx.x);
  double* const value = lists.value + group * lists.width;
  int64_t* const at = lists.at + group * lists.width;
  double* const kept_value = lists.kept_value + group * top;
  int64_t* const kept_at = lists.kept_at + group * top;
  const auto key_of_value = [=](int64_t i) {
    return static_cast<unsigned long long>(__double_as_longlong(value[i]));
  };
  unsigned long long least = 0, last = 0;  // keys of the value and, among equal values, of the dimension
  if (length >= top) {
    const Rank rank = find_rank(length, static_cast<unsigned>(top), [=](int64_t i, unsigned long long* key) {
      *key = key_of_value(i);
      return true;
    });
    least = rank.key;
    if (t == 0) lists.bar[group] = __longlong_as_double(static_cast<long long>(least));
    if (rank.left < rank.equal) {
      last = find_rank(length, rank.left, [=](int64_t i, unsigned long long* key) {
               *key = ~static_cast<unsigned long long>(at[i]);
               return key_of_value(i) == least;
             }).key;
    }
  }
  if (t == 0) kept = 0;
  __syncthreads();
  const int64_t rounds = (length + kListThreads - 1) / kListThreads * kListThreads;
  for (int64_t i = t; i < rounds; i += kListThreads) {
    bool stays = false;
    if (i < length) {
      const unsigned long long key = key_of_value(i);
      stays = key > least || (key == least && ~static_cast<unsigned long long>(at[i]) >= last);
    }
    const unsigned long long place = place_in(&kept, stays);
    if (!stays) continue;
    kept_value[place] = value[i];
    kept_at[place] = at[i];
  }
  __syncthreads();
  const int64_t left = min(length, top);
  for (int64_t i = t; i < top; i += kListThreads) {
    if (i < left) {
      value[i] = kept_value[i];
      at[i] = kept_at[i];
    } else {  // something was refused; a valid dimension is written all the same
      kept_value[i] = 0;
      kept_at[i] = 0;
    }
  }
  if (t == 0) {
    lists.length[group] = static_cast<unsigned long long>(left);
    lists.found[group] = 0;
  }
}

// One thread per dimension of a group.
template <class Source, class T>
__global__ void __launch_bounds__(kThreads)
    restrict_rows(Problem<Source, T> p, const int64_t* dims, int64_t top, double* u) {
  const int64_t blocks = (top + kThreads - 1) / kThreads, group = blockIdx.x / blocks;
  const int64_t j = blockIdx.x % blocks * kThreads + threadIdx.x;
  if (j >= top) return;
  const int64_t d = dims[group * top + j], last = p.offset[group + 1];
  const Updates<double> update(p.rule, p.m, p.v, d);
  const auto column = p.g.column(d);
  for (int64_t row = p.offset[group]; row < last; row += kRows) {
    const int count = static_cast<int>(min(last - row, int64_t{kRows}));
    double g[kRows];
    column.take(p.member + row, count, g);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (r < count) u[(row + r) * top + j] = update(g[r]);
    }
  }
}

// ---- history

template <class Source, class T>
struct Step {
  Source g;
  double beta1, beta2;
  const T *m, *v;         // [D]
  const int64_t* chosen;  // [rows]
  int64_t rows;
  T *new_m, *new_v;  // [D]
  long long* overflows;
};

// One thread per dimension of [begin, end).
template <class Source, class T>
__global__ void __launch_bounds__(kThreads) advance(Step<Source, T> s, int64_t begin, int64_t end) {
  const int64_t d = begin + static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (d >= end) return;
  const auto column = s.g.column(d);
  double mean = 0, square = 0;
  for (int64_t row = 0; row < s.rows; row += kRows) {
    const int count = static_cast<int>(min(s.rows - row, int64_t{kRows}));
    double g[kRows];
    column.take(s.chosen + row, count, g);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {  // rows that do not exist are 0
      mean += g[r];
      square += g[r] * g[r];
    }
  }
  mean /= static_cast<double>(s.rows);
  square /= static_cast<double>(s.rows);
  const T m = static_cast<T>(s.beta1 * static_cast<double>(s.m[d]) + (1 - s.beta1) * mean);
  const T v = static_cast<T>(s.beta2 * static_cast<double>(s.v[d]) + (1 - s.beta2) * square);
  if (!is_finite(m) || !is_finite(v)) atomicMax(s.overflows, 1LL);
  s.new_m[d] = m;
  s.new_v[d] = v;
}

// ---- directions

template <class T>
__global__ void __launch_bounds__(kThreads)
    fill_directions(uint64_t seed, int64_t begin, uint32_t first, int64_t rows, int64_t width, T* out,
                    int64_t stride) {
  const int64_t from = begin / 4, quads = (begin % 4 + width + 3) / 4;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; at < rows * quads;
       at += step) {
    const int64_t row = at / quads, quad = at % quads;
    const auto block = static_cast<uint64_t>(from + quad);
    float four[4];
    normals(philox4x32({static_cast<uint32_t>(block), static_cast<uint32_t>(block >> 32),
                        first + static_cast<uint32_t>(row), kStream},
                       {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)}),
            four);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int64_t column = quad * 4 + k - begin % 4;
      if (column >= 0 && column < width) out[row * stride + column] = static_cast<T>(four[k]);
    }
  }
}

Launch over(int64_t blocks, cudaStream_t stream, int threads = kThreads) {
  return {grid_of(blocks), dim3(static_cast<unsigned>(threads)), 0, stream};
}

template <class Gradients, class T>
auto problem_of(const Gradients& g, const AdamRule& rule, TensorView<const T, 1> m, TensorView<const T, 1> v,
                const GroupedRows& groups) {
  const auto source = for_kernels(g);
  return Problem<std::remove_const_t<decltype(source)>, T>{
      source, rule, m.data, v.data, groups.member.data, groups.offset.data};
}

}  // namespace

template <class T>
void directions(uint64_t seed, int64_t begin, uint32_t first, TensorView<T, 2> out, cudaStream_t stream) {
  if (out.size() == 0) return;
  const int64_t blocks = parts(out.rows() * parts(out.cols() + 3, 4), kThreads);
  launch(fill_directions<T>, over(std::min(blocks, int64_t{1} << 20), stream), seed, begin, first, out.rows(),
         out.cols(), out.data, out.stride[0]);
}

template <class Gradients, class T>
void top_dimensions(const Gradients& g, const AdamRule& rule, TensorView<const T, 1> m,
                    TensorView<const T, 1> v, const GroupedRows& groups, TensorView<int64_t, 2> dims,
                    TensorView<double, 2> values, int64_t* refused, cudaStream_t stream,
                    std::function<bool()> poll, int64_t first_chunk) {
  const int64_t count = dims.rows(), top = dims.cols(), numel = g.numel();
  const auto problem = problem_of(g, rule, m, v, groups);
  using Source = std::remove_const_t<decltype(problem.g)>;
  const int64_t most = std::min(std::max(kChunk / count, top), numel), width = top + most;
  const bool sieves = std::is_same_v<T, float> && rule.has_history && rule.eps >= kLeastEpsOfSieve;
  const DeviceBuffer<double> value(checked_mul(count, width), stream), bar(count, stream);
  const DeviceBuffer<int64_t> at(checked_mul(count, width), stream),
      candidate(sieves ? checked_mul(count, most) : 0, stream);
  const DeviceBuffer<unsigned long long> length(count, stream), found(count, stream);
  const Lists lists{top,          width,         most,       value.data(),
                    at.data(),    length.data(), bar.data(), candidate.data(),
                    found.data(), values.data,   dims.data};
  // int64_t is a long, for which CUDA has no atomics.
  static_assert(sizeof(long long) == sizeof(int64_t));
  auto* const first_refused = reinterpret_cast<long long*>(refused);
  Pace pace(stream, std::move(poll));
  launch(clear, over(parts(count, kThreads), stream), lists, count);
  int64_t size = std::max(first_chunk, top);
  for (int64_t begin = 0; begin < numel; size *= 2) {
    size = std::min(size, most);
    const int64_t here = std::min(size, numel - begin);
    const bool sieved = sieves && begin > 0;
    const Launch how = over(count * parts(here, kThreads), stream);
    if constexpr (std::is_same_v<T, float>) {
      if (sieved) launch(sieve<Source>, how, problem, lists, begin, here);
    }
    launch(weigh<Source, T>, how, problem, lists, begin, here, sieved, first_refused);
    launch(keep_largest, over(count, stream, kListThreads), lists);
    begin += here;
    pace.launched(begin);
  }
}

template <class Gradients, class T>
void restrict_updates(const Gradients& g, const AdamRule& rule, TensorView<const T, 1> m,
                      TensorView<const T, 1> v, const GroupedRows& groups, TensorView<const int64_t, 2> dims,
                      TensorView<double, 2> u, cudaStream_t stream) {
  const auto problem = problem_of(g, rule, m, v, groups);
  using Source = std::remove_const_t<decltype(problem.g)>;
  launch(restrict_rows<Source, T>, over(dims.rows() * parts(dims.cols(), kThreads), stream), problem,
         dims.data, dims.cols(), u.data);
}

template <class Gradients, class T>
void update_history(const Gradients& g, double beta1, double beta2, TensorView<const T, 1> m,
                    TensorView<const T, 1> v, TensorView<const int64_t, 1> chosen, TensorView<T, 1> new_m,
                    TensorView<T, 1> new_v, int64_t* overflows, cudaStream_t stream,
                    std::function<bool()> poll, int64_t at_once) {
  const auto source = for_kernels(g);
  using Source = std::remove_const_t<decltype(source)>;
  const Step<Source, T> step{
      source,      beta1,         beta2,      m.data,     v.data,
      chosen.data, chosen.size(), new_m.data, new_v.data, reinterpret_cast<long long*>(overflows)};
  int64_t products = chosen.size();
  if constexpr (std::is_same_v<Gradients, LowRankGradients<typename Gradients::Element>>)
    products = saturated_mul(products, std::max<int64_t>(g.coefficients.cols(), 1));
  const int64_t size = std::max<int64_t>(at_once / saturated_mul(products, kThreads), 1) * kThreads;
  Pace pace(stream, std::move(poll));
  for (int64_t begin = 0; begin < g.numel(); begin += size) {
    const int64_t end = std::min(begin + size, g.numel());
    launch(advance<Source, T>, over(parts(end - begin, kThreads), stream), step, begin, end);
    pace.launched(end);
  }
}

template void directions<float>(uint64_t, int64_t, uint32_t, TensorView<float, 2>, cudaStream_t);
template void directions<double>(uint64_t, int64_t, uint32_t, TensorView<double, 2>, cudaStream_t);

#define FC_INSTANTIATE(Gradients, T)                                                                         \
  template void top_dimensions<Gradients, T>(const Gradients&, const AdamRule&, TensorView<const T, 1>,      \
                                             TensorView<const T, 1>, const GroupedRows&,                     \
                                             TensorView<int64_t, 2>, TensorView<double, 2>, int64_t*,        \
                                             cudaStream_t, std::function<bool()>, int64_t);                  \
  template void restrict_updates<Gradients, T>(                                                              \
      const Gradients&, const AdamRule&, TensorView<const T, 1>, TensorView<const T, 1>, const GroupedRows&, \
      TensorView<const int64_t, 2>, TensorView<double, 2>, cudaStream_t);                                    \
  template void update_history<Gradients, T>(const Gradients&, double, double, TensorView<const T, 1>,       \
                                             TensorView<const T, 1>, TensorView<const int64_t, 1>,           \
                                             TensorView<T, 1>, TensorView<T, 1>, int64_t*, cudaStream_t,     \
                                             std::function<bool()>, int64_t);
FC_INSTANTIATE(DenseGradients<float>, float)
FC_INSTANTIATE(DenseGradients<double>, double)
FC_INSTANTIATE(DenseGradients<Half>, float)
FC_INSTANTIATE(DenseGradients<BFloat16>, float)
FC_INSTANTIATE(LowRankGradients<float>, float)
FC_INSTANTIATE(LowRankGradients<double>, double)
#undef FC_INSTANTIATE

}  // namespace fc::cuda
