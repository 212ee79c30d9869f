// The emulator: every feature against known answers under every schedule, and every planted fault found.
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <chrono>
#include <cmath>
#include <csignal>
#include <cstdlib>
#include <limits>
#include <numeric>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "cuda/launch.h"
#include "cuda/runtime.h"
#include "emulator/device_array.h"
#include "emulator/faults.h"
#include "emulator/schedules.h"

namespace {

using fc::cuda::cooperative_blocks;
using fc::cuda::launch;
using fc::cuda::Launch;
using fc::emulator::allocated_bytes;
using fc::emulator::check_schedules;
using fc::emulator::compare_schedules;
using fc::emulator::Device;
using fc::emulator::DeviceArray;
using fc::emulator::Fault;
using fc::emulator::kSchedules;
using fc::emulator::set_device;
using fc::emulator::UnderSchedule;

Launch one_block(unsigned threads, size_t shared = 0) { return {1, threads, shared}; }

// ---- Indices ----

__global__ void count_visits(int* visits) {
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  visits[block * blockDim.x * blockDim.y * blockDim.z + thread] += 1;
}

void test_every_thread_once() {
  const std::vector<std::pair<dim3, dim3>> shapes = {
      {1, 1}, {7, 97}, {{3, 2, 2}, {5, 3, 2}}, {2, 1024}, {{1, 5}, {1, 1, 64}}};
  for (const auto& [grid, block] : shapes) {
    const size_t threads = size_t{grid.x} * grid.y * grid.z * block.x * block.y * block.z;
    const auto visits = check_schedules([&, grid = grid, block = block] {
      DeviceArray<int> counts(std::vector<int>(threads, 0));
      launch(count_visits, {grid, block}, counts.data());
      return counts.values();
    });
    CHECK(visits == std::vector<int>(threads, 1));
  }
}

// ---- Shared memory and the block's barriers ----

// out[b] = the sum of the block's values, by halving in static shared memory.
template <class T>
__global__ void block_sum(const T* in, T* out) {
  FC_SHARED(T, partial, [128]);
  const unsigned i = threadIdx.x;
  partial[i] = in[blockIdx.x * blockDim.x + i];
  __syncthreads();
  for (unsigned half = 64; half > 0; half /= 2) {
    if (i < half) partial[i] += partial[i + half];
    cooperative_groups::this_thread_block().sync();
  }
  if (i == 0) out[blockIdx.x] = partial[0];
}

// out reversed in the block, through dynamic shared memory; a scalar holds the block's size.
__global__ void reverse_block(const double* in, double* out) {
  FC_DYNAMIC_SHARED(double, buffer);
  FC_SHARED(unsigned, size, );
  if (threadIdx.x == 0) size = blockDim.x;
  buffer[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = buffer[size - 1 - threadIdx.x];
}

template <class T>
void test_block_sum() {
  std::vector<T> in(5 * 128);
  for (size_t i = 0; i < in.size(); ++i) in[i] = static_cast<T>(static_cast<int>(i * 37 % 101) - 50);
  const auto out = check_schedules([&] {
    const DeviceArray<T> from(in);
    const DeviceArray<T> to(5);
    launch(block_sum<T>, {5, 128}, from.data(), to.data());
    return to.values();
  });
  for (int b = 0; b < 5; ++b)
    CHECK_EQUAL(out[b], std::accumulate(in.begin() + b * 128, in.begin() + (b + 1) * 128, T{0}));
}

void test_dynamic_shared() {
  for (const unsigned n : {1u, 7u, 97u, 1024u}) {
    std::vector<double> in(n);
    std::iota(in.begin(), in.end(), 0.5);
    const auto out = check_schedules([&] {
      const DeviceArray<double> from(in), to(n);
      launch(reverse_block, one_block(n, n * sizeof(double)), from.data(), to.data());
      return to.values();
    });
    CHECK(out == std::vector<double>(in.rbegin(), in.rend()));
  }
}

// Which of the block's predicates hold: [thread % 3 == 0], all, and none, each to each barrier with a vote.
__global__ void votes_of_block(int* out) {
  const int third = threadIdx.x % 3 == 0;
  int* mine = out + 7 * threadIdx.x;
  mine[0] = __syncthreads_count(third ? -5 : 0);
  mine[1] = __syncthreads_and(third);
  mine[2] = __syncthreads_and(1);
  mine[3] = __syncthreads_and(0);
  mine[4] = __syncthreads_or(third);
  mine[5] = __syncthreads_or(0);
  mine[6] = __syncthreads_or(2);
}

void test_barrier_votes() {
  const unsigned n = 100;
  const auto out = check_schedules([&] {
    const DeviceArray<int> results(7 * n);
    launch(votes_of_block, one_block(n), results.data());
    return results.values();
  });
  const std::array<int, 7> expected{34, 0, 1, 0, 1, 0, 1};
  for (unsigned i = 0; i < 7 * n; ++i) CHECK_EQUAL(out[i], expected[i % 7]);
}

// ---- Warps ----

template <class T>
__global__ void shuffle_all(T* out, int by, int width) {
  const T value = static_cast<T>(1000 + threadIdx.x);
  T* mine = out + 4 * threadIdx.x;
  mine[0] = __shfl_sync(~0u, value, by, width);
  mine[1] = __shfl_up_sync(~0u, value, static_cast<unsigned>(by), width);
  mine[2] = __shfl_down_sync(~0u, value, static_cast<unsigned>(by), width);
  mine[3] = __shfl_xor_sync(~0u, value, by, width);
}

template <class T>
void test_shuffles() {
  for (const int width : {32, 16, 8, 4, 2, 1}) {
    for (const int by : {0, 1, 2, 5, 16, 31}) {
      const auto out = check_schedules([&] {
        const DeviceArray<T> results(4 * 64);
        launch(shuffle_all<T>, one_block(64), results.data(), by, width);
        return results.values();
      });
      for (int t = 0; t < 64; ++t) {
        const int segment = t / width * width, at = t - segment;
        const auto value = [&](int thread) { return static_cast<T>(1000 + thread); };
        CHECK_EQUAL(out[4 * t], value(segment + by % width));
        CHECK_EQUAL(out[4 * t + 1], value(at >= by ? t - by : t));
        CHECK_EQUAL(out[4 * t + 2], value(at + by < width ? t + by : t));
        // An earlier segment of the warp may be read, a later one not.
        CHECK_EQUAL(out[4 * t + 3], value((t ^ by) < segment + width ? t ^ by : t));
      }
    }
  }
}

// Both halves of a warp, each with its own mask and number of steps.
__global__ void half_warps(int* out) {
  const bool low = threadIdx.x < 16;
  const unsigned mask = low ? 0x0000FFFFu : 0xFFFF0000u;
  int value = static_cast<int>(threadIdx.x);
  for (int step = 8; step >= (low ? 1 : 4); step /= 2) value += __shfl_xor_sync(mask, value, step);
  out[threadIdx.x] = value;
}

__global__ void warp_votes(unsigned* out) {
  const unsigned lane = threadIdx.x % 32;
  unsigned* mine = out + 6 * threadIdx.x;
  mine[0] = __ballot_sync(~0u, threadIdx.x % 3 == 0 ? -1 : 0);
  mine[1] = static_cast<unsigned>(__any_sync(~0u, lane == 31 ? 4 : 0));
  mine[2] = static_cast<unsigned>(__any_sync(~0u, 0));
  mine[3] = static_cast<unsigned>(__all_sync(~0u, 8));
  mine[4] = static_cast<unsigned>(__all_sync(~0u, lane != 31));
  mine[5] = __match_any_sync(~0u, threadIdx.x * threadIdx.x % 5);
}

__global__ void warp_reductions(int* out) {
  const int value = static_cast<int>(threadIdx.x * 7 % 64) - 20;
  const auto bits = static_cast<unsigned>(value);
  int* mine = out + 9 * threadIdx.x;
  mine[0] = __reduce_add_sync(~0u, value);
  mine[1] = __reduce_min_sync(~0u, value);
  mine[2] = __reduce_max_sync(~0u, value);
  mine[3] = static_cast<int>(__reduce_add_sync(~0u, bits));
  mine[4] = static_cast<int>(__reduce_min_sync(~0u, bits));
  mine[5] = static_cast<int>(__reduce_max_sync(~0u, bits));
  mine[6] = static_cast<int>(__reduce_and_sync(~0u, bits | 0x100u));
  mine[7] = static_cast<int>(__reduce_or_sync(~0u, bits));
  mine[8] = static_cast<int>(__reduce_xor_sync(~0u, bits));
}

// Lanes 0 to 9 only; the others are gone, which an operation that does not read them allows.
__global__ void ten_lanes(int* out) {
  if (threadIdx.x >= 10) return;
  __syncwarp();
  out[threadIdx.x] = __reduce_add_sync(~0u, 1) + 100 * __shfl_sync(~0u, static_cast<int>(threadIdx.x), 9);
}

void test_warps() {
  const auto halves = check_schedules([] {
    const DeviceArray<int> results(32);
    launch(half_warps, one_block(32), results.data());
    return results.values();
  });
  for (int t = 0; t < 32; ++t) CHECK_EQUAL(halves[t], t < 16 ? 120 : 4 * (16 + t % 4) + 24);

  const auto votes = check_schedules([] {
    const DeviceArray<unsigned> results(6 * 64);
    launch(warp_votes, one_block(64), results.data());
    return results.values();
  });
  const auto reductions = check_schedules([] {
    const DeviceArray<int> results(9 * 64);
    launch(warp_reductions, one_block(64), results.data());
    return results.values();
  });
  for (int warp = 0; warp < 2; ++warp) {
    unsigned ballot = 0, all_and = ~0u, all_or = 0, all_xor = 0, least = ~0u, most = 0;
    int sum = 0, smallest = 1000, largest = -1000;
    for (int lane = 0; lane < 32; ++lane) {
      const int t = 32 * warp + lane, value = t * 7 % 64 - 20;
      const auto bits = static_cast<unsigned>(value);
      if (t % 3 == 0) ballot |= 1u << lane;
      sum += value;
      smallest = std::min(smallest, value);
      largest = std::max(largest, value);
      least = std::min(least, bits);
      most = std::max(most, bits);
      all_and &= bits | 0x100u;
      all_or |= bits;
      all_xor ^= bits;
    }
    const std::array<unsigned, 5> expected_votes{ballot, 1, 0, 1, 0};
    const std::array<int, 9> expected{sum,
                                      smallest,
                                      largest,
                                      sum,
                                      static_cast<int>(least),
                                      static_cast<int>(most),
                                      static_cast<int>(all_and),
                                      static_cast<int>(all_or),
                                      static_cast<int>(all_xor)};
    for (int t = 32 * warp; t < 32 * warp + 32; ++t) {
      for (int k = 0; k < 5; ++k) CHECK_EQUAL(votes[6 * t + k], expected_votes[k]);
      for (int lane = 0; lane < 32; ++lane) {
        const int other = 32 * warp + lane;
        CHECK_EQUAL(votes[6 * t + 5] >> lane & 1, static_cast<unsigned>(t * t % 5 == other * other % 5));
      }
      for (int k = 0; k < 9; ++k) CHECK_EQUAL(reductions[9 * t + k], expected[k]);
    }
  }

  for (const unsigned threads : {10u, 32u}) {
    const auto ten = check_schedules([&] {
      const DeviceArray<int> results(10);
      launch(ten_lanes, one_block(threads), results.data());
      return results.values();
    });
    CHECK(ten == std::vector<int>(10, 910));
  }
}

// ---- Atomics ----

struct Atomics {
  int sum, least, most, exchanged, any, all, swapped;
  unsigned usum, uleast, umost, uexchanged, uany, uall, uswapped;
  long long lleast, lmost;
  unsigned long long ulsum, ulleast, ulmost, ulexchanged, ulany, ulall, ulswapped;
  float fsum, fexchanged;
  double dsum;
};

// Updates whose result does not depend on the order; `old` collects what atomicAdd returned.
__global__ void atomics(Atomics* a, int* old) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  const auto u = static_cast<unsigned>(i);
  const unsigned long long wide = (1ull << 40) + u;
  old[atomicAdd(&a->sum, 1)] = 1;
  atomicAdd(&a->usum, u);
  atomicAdd(&a->ulsum, wide);
  atomicAdd(&a->fsum, 0.5f);
  atomicAdd(&a->dsum, 0.25);
  atomicMin(&a->least, -i);
  atomicMax(&a->most, i);
  atomicMin(&a->uleast, ~0u - u);
  atomicMax(&a->umost, u);
  atomicMin(&a->lleast, -static_cast<long long>(wide));
  atomicMax(&a->lmost, static_cast<long long>(wide));
  atomicMin(&a->ulleast, ~0ull - wide);
  atomicMax(&a->ulmost, wide);
  atomicOr(&a->any, 1 << i % 31);
  atomicAnd(&a->all, ~(1 << i % 31));
  atomicOr(&a->uany, 1u << u % 32);
  atomicAnd(&a->uall, ~(1u << u % 32));
  atomicOr(&a->ulany, 1ull << u % 64);
  atomicAnd(&a->ulall, ~(1ull << u % 64));
  // Only one of all threads finds the first value.
  if (atomicCAS(&a->swapped, 0, 7) == 0) atomicAdd(&a->swapped, 100);
  if (atomicCAS(&a->uswapped, 0u, 7u) == 0) atomicAdd(&a->uswapped, 100u);
  if (atomicCAS(&a->ulswapped, 0ull, 7ull) == 0) atomicAdd(&a->ulswapped, 100ull);
  if (atomicExch(&a->exchanged, 5) == 0) atomicAdd(&a->sum, 1000);
  if (atomicExch(&a->uexchanged, 5u) == 0) atomicAdd(&a->usum, 1000u);
  if (atomicExch(&a->ulexchanged, 5ull) == 0) atomicAdd(&a->ulsum, 1000ull);
  if (atomicExch(&a->fexchanged, 5.0f) == 0) atomicAdd(&a->fsum, 1000.0f);
}

void test_atomics() {
  const unsigned n = 3 * 96;
  const auto run = [&] {
    // The padding is compared too.
    Atomics zero;
    std::memset(&zero, 0, sizeof zero);
    zero.uleast = ~0u;
    zero.ulleast = ~0ull;
    zero.all = -1;
    zero.uall = ~0u;
    zero.ulall = ~0ull;
    const DeviceArray<Atomics> all(std::vector<Atomics>{zero});
    const DeviceArray<int> old(std::vector<int>(n + 1000, 0));
    launch(atomics, {3, 96}, all.data(), old.data());
    const auto seen = old.values();
    CHECK(std::accumulate(seen.begin(), seen.end(), 0) == static_cast<int>(n));
    return all.values();
  };
  const Atomics a = check_schedules(run)[0];
  const unsigned long long wide = 1ull << 40, sum = n * (n - 1) / 2;
  CHECK_EQUAL(a.sum, static_cast<int>(n) + 1000);
  CHECK_EQUAL(a.usum, sum + 1000);
  CHECK_EQUAL(a.ulsum, n * wide + sum + 1000);
  CHECK_EQUAL(a.fsum, 0.5f * n + 1000);
  CHECK_EQUAL(a.dsum, 0.25 * n);
  CHECK_EQUAL(a.least, 1 - static_cast<int>(n));
  CHECK_EQUAL(a.most, static_cast<int>(n) - 1);
  CHECK_EQUAL(a.uleast, ~0u - (n - 1));
  CHECK_EQUAL(a.umost, n - 1);
  CHECK_EQUAL(a.lleast, -static_cast<long long>(wide + n - 1));
  CHECK_EQUAL(a.lmost, static_cast<long long>(wide + n - 1));
  CHECK_EQUAL(a.ulleast, ~0ull - (wide + n - 1));
  CHECK_EQUAL(a.ulmost, wide + n - 1);
  CHECK_EQUAL(a.any, 0x7FFFFFFF);
  CHECK_EQUAL(a.all, static_cast<int>(0x80000000u));
  CHECK_EQUAL(a.uany, ~0u);
  CHECK_EQUAL(a.uall, 0u);
  CHECK_EQUAL(a.ulany, ~0ull);
  CHECK_EQUAL(a.ulall, 0ull);
  CHECK_EQUAL(a.swapped, 107);
  CHECK_EQUAL(a.uswapped, 107u);
  CHECK_EQUAL(a.ulswapped, 107ull);
  CHECK_EQUAL(a.exchanged, 5);
  CHECK_EQUAL(a.uexchanged, 5u);
  CHECK_EQUAL(a.ulexchanged, 5ull);
  CHECK_EQUAL(a.fexchanged, 5.0f);

  const auto sum_floats = [] {
    const DeviceArray<float> total(std::vector<float>{0});
    launch(
        +[](float* sum) { atomicAdd(sum, 1.0f / static_cast<float>(1 + threadIdx.x)); }, one_block(1000),
        total.data());
    return total.values();
  };
  CHECK(!compare_schedules(sum_floats).difference.empty());  // rounding makes the order visible
}

// ---- The grid ----

// Each block adds its neighbours' values of the round before: wrong unless all blocks meet between rounds.
__global__ void rounds(long long* a, long long* b, int count) {
  for (int round = 0; round < count; ++round) {
    const unsigned n = gridDim.x * blockDim.x, i = blockIdx.x * blockDim.x + threadIdx.x;
    b[i] = a[(i + 1) % n] + a[(i + n - 1) % n];
    if (round % 2 == 0)
      fc::cuda::grid_sync();
    else
      cooperative_groups::this_grid().sync();
    long long* swap = a;
    a = b;
    b = swap;
  }
}

void test_grid_sync() {
  const int before = fc::emulator::resident_blocks();
  for (const int blocks : {1, 3, 5}) {
    fc::emulator::set_resident_blocks(blocks);
    CHECK_EQUAL(fc::cuda::cooperative_blocks(rounds, 64, 0), blocks);
    const size_t n = 64 * static_cast<size_t>(blocks);
    std::vector<long long> a(n), b(n);
    for (size_t i = 0; i < n; ++i) a[i] = static_cast<long long>(i * i % 11);
    Launch how{static_cast<unsigned>(blocks), 64};
    how.cooperative = true;
    const auto out = check_schedules([&] {
      const DeviceArray<long long> first(a), second(n);
      launch(rounds, how, first.data(), second.data(), 7);
      return second.values();
    });
    for (int round = 0; round < 7; ++round) {
      for (size_t i = 0; i < n; ++i) b[i] = a[(i + 1) % n] + a[(i + n - 1) % n];
      std::swap(a, b);
    }
    CHECK(out == a);

    how.grid = static_cast<unsigned>(blocks) + 1;
    const DeviceArray<long long> first(2 * n), second(2 * n);
    CHECK_THROWS(launch(rounds, how, first.data(), second.data(), 1), std::runtime_error);
    CHECK_EQUAL(cudaGetLastError(), cudaErrorCooperativeLaunchTooLarge);
  }
  fc::emulator::set_resident_blocks(before);
  CHECK_THROWS(fc::emulator::set_resident_blocks(0), std::invalid_argument);
}

// ---- Numbers ----

template <class Narrow>
bool bits_equal(Narrow x, uint16_t bits) {
  return fc::emulator::same_bits<uint16_t>(x) == bits;
}

// All 65,536 values come back; a float between two neighbours goes to the nearer one, and to the even one
// from halfway.
template <class Narrow>
void test_narrow(int infinity) {
  bool same = true, halfway = true, below = true, above = true, nan = true;
  for (int i = 0; i < 0x10000; ++i) {
    const auto bits = static_cast<uint16_t>(i);
    const auto x = static_cast<float>(fc::emulator::same_bits<Narrow>(bits));
    const int magnitude = i & 0x7FFF;
    if (magnitude > infinity) {
      nan = nan && std::isnan(x) && bits_equal(Narrow(x), 0x7FFF);
      continue;
    }
    same = same && bits_equal(Narrow(x), bits);
    if (magnitude >= infinity - 1) continue;
    const auto next = static_cast<float>(fc::emulator::same_bits<Narrow>(static_cast<uint16_t>(bits + 1)));
    const auto middle = static_cast<float>((static_cast<double>(x) + static_cast<double>(next)) / 2);
    halfway = halfway && bits_equal(Narrow(middle), static_cast<uint16_t>(bits + (bits & 1)));
    below = below && bits_equal(Narrow(std::nextafter(middle, x)), bits);
    above = above && bits_equal(Narrow(std::nextafter(middle, next)), static_cast<uint16_t>(bits + 1));
  }
  CHECK(same);
  CHECK(halfway);
  CHECK(below);
  CHECK(above);
  CHECK(nan);
  CHECK(bits_equal(Narrow(std::numeric_limits<float>::infinity()), static_cast<uint16_t>(infinity)));
  CHECK(bits_equal(Narrow(-std::numeric_limits<float>::max()), static_cast<uint16_t>(infinity | 0x8000)));
}

void test_conversions() {
  test_narrow<__half>(0x7C00);
  test_narrow<__nv_bfloat16>(0x7F80);
  CHECK(bits_equal(__float2half(1.0f), 0x3C00));
  CHECK(bits_equal(__float2half_rn(-2.0f), 0xC000));
  CHECK(bits_equal(__float2half(65519.0f), 0x7BFF));
  CHECK(bits_equal(__float2half(65520.0f), 0x7C00));
  CHECK(bits_equal(__float2half(0x1p-25f), 0));
  CHECK(bits_equal(__float2bfloat16(1.0f), 0x3F80));
  CHECK(bits_equal(__float2bfloat16_rn(-2.0f), 0xC000));
  CHECK_EQUAL(__half2float(__half(0.333251953125f)), 0.333251953125f);
  CHECK_EQUAL(__bfloat162float(__nv_bfloat16(0.333984375f)), 0.333984375f);
}

void test_intrinsics() {
  constexpr long long kLeast = std::numeric_limits<long long>::min(),
                      kMost = std::numeric_limits<long long>::max();
  const float nan = std::numeric_limits<float>::quiet_NaN();
  CHECK_EQUAL(__float2ll_rz(-2.75f), -2);
  CHECK_EQUAL(__float2ll_rz(0x1p62f), 1ll << 62);
  CHECK_EQUAL(__float2ll_rz(0x1p63f), kMost);
  CHECK_EQUAL(__float2ll_rz(-0x1p63f), kLeast);
  CHECK_EQUAL(__float2ll_rz(-1e30f), kLeast);
  CHECK_EQUAL(__float2ll_rz(nan), kLeast);
  CHECK_EQUAL(__double2ll_rz(1e15 + 0.75), 1000000000000000ll);
  CHECK_EQUAL(__double2ll_rz(1e300), kMost);
  CHECK_EQUAL(__double2ll_rz(-1e300), kLeast);

  const float a = 1 + 0x1p-12f;  // a * a is not a float: fused and separate rounding differ
  CHECK_EQUAL(__fmaf_rn(a, a, -1.0f), 0x1p-11f + 0x1p-24f);
  CHECK_EQUAL(__fsub_rn(__fmul_rn(a, a), 1.0f), 0x1p-11f);
  CHECK_EQUAL(__fadd_rn(1.0f, 0x1p-24f), 1.0f);
  const double d = 1 + 0x1p-27;
  CHECK_EQUAL(__fma_rn(d, d, -1.0), 0x1p-26 + 0x1p-54);
  CHECK_EQUAL(__dsub_rn(__dmul_rn(d, d), 1.0), 0x1p-26);
  CHECK_EQUAL(__dadd_rn(1.0, 0x1p-53), 1.0);
  CHECK_EQUAL(rsqrtf(0.25f), 2.0f);

  CHECK_EQUAL(__popc(0xF0F0F0F0u), 16);
  CHECK_EQUAL(__popcll(~0ull), 64);
  CHECK_EQUAL(__ffs(0), 0);
  CHECK_EQUAL(__ffs(8), 4);
  CHECK_EQUAL(__ffsll(1ll << 40), 41);
  CHECK_EQUAL(__clz(0), 32);
  CHECK_EQUAL(__clz(1), 31);
  CHECK_EQUAL(__clzll(0), 64);
  CHECK_EQUAL(__clzll(1), 63);
  CHECK_EQUAL(__float_as_int(1.0f), 0x3F800000);
  CHECK_EQUAL(__float_as_uint(-1.0f), 0xBF800000u);
  CHECK_EQUAL(__int_as_float(0x3F800000), 1.0f);
  CHECK_EQUAL(__uint_as_float(0xBF800000u), -1.0f);
  CHECK_EQUAL(__double_as_longlong(1.0), 0x3FF0000000000000ll);
  CHECK_EQUAL(__longlong_as_double(0x3FF0000000000000ll), 1.0);

  CHECK_EQUAL(min(-1, 1u), 1u);  // as unsigned numbers
  CHECK_EQUAL(max(-1, 1u), ~0u);
  CHECK_EQUAL(min(-1, 2), -1);
  CHECK_EQUAL(max(1ll << 40, 3ll), 1ll << 40);
  CHECK_EQUAL(max(size_t{3}, size_t{4}), size_t{4});
  CHECK_EQUAL(min(1.5f, 2.5), 1.5);
  CHECK_EQUAL(max(nan, 1.0f), 1.0f);
  CHECK_EQUAL(min(1.0f, nan), 1.0f);

  const float4 f = make_float4(1, 2, 3, 4);
  CHECK_EQUAL(__ldg(&f).w, 4.0f);
  CHECK_EQUAL(make_float2(1, 2).y, 2.0f);
  CHECK_EQUAL(make_double2(1, 2).y, 2.0);
  CHECK_EQUAL(make_int4(1, 2, 3, 4).z, 3);
  CHECK_EQUAL(make_uint4(1, 2, 3, 4).z, 3u);
  CHECK_EQUAL(alignof(float4), size_t{16});
}

// ---- The host's interface ----

void test_host() {
  int value = -1;
  CHECK_EQUAL(cudaGetDeviceCount(&value), cudaSuccess);
  CHECK_EQUAL(value, 1);
  CHECK_EQUAL(cudaGetDevice(&value), cudaSuccess);
  CHECK_EQUAL(value, 0);
  CHECK_EQUAL(cudaSetDevice(0), cudaSuccess);
  CHECK_EQUAL(cudaSetDevice(1), cudaErrorInvalidDevice);
  CHECK_EQUAL(cudaPeekAtLastError(), cudaErrorInvalidDevice);
  CHECK_EQUAL(cudaGetLastError(), cudaErrorInvalidDevice);
  CHECK_EQUAL(cudaGetLastError(), cudaSuccess);
  CHECK_EQUAL(std::string(cudaGetErrorString(cudaErrorInvalidDevice)), "invalid device ordinal");
  const std::vector<std::pair<cudaDeviceAttr, int>> attributes = {
      {cudaDevAttrMultiProcessorCount, 1},    {cudaDevAttrCooperativeLaunch, 1},
      {cudaDevAttrMemoryPoolsSupported, 1},   {cudaDevAttrMaxSharedMemoryPerBlockOptin, 166912},
      {cudaDevAttrComputeCapabilityMajor, 8}, {cudaDevAttrComputeCapabilityMinor, 0}};
  for (const auto& [attribute, expected] : attributes) {
    CHECK_EQUAL(cudaDeviceGetAttribute(&value, attribute, 0), cudaSuccess);
    CHECK_EQUAL(value, expected);
  }
  CHECK_EQUAL(cudaDeviceSynchronize(), cudaSuccess);

  cudaStream_t stream = nullptr;
  CHECK_EQUAL(cudaStreamCreate(&stream), cudaSuccess);
  CHECK_EQUAL(cudaStreamSynchronize(stream), cudaSuccess);
  std::vector<int> host{1, 2, 3, 4}, back(4);
  int *first = nullptr, *second = nullptr;
  CHECK_EQUAL(cudaMalloc(&first, 16), cudaSuccess);
  CHECK_EQUAL(cudaMallocAsync(&second, 16, stream), cudaSuccess);
  CHECK_EQUAL(cudaMemcpyAsync(first, host.data(), 16, cudaMemcpyHostToDevice, stream), cudaSuccess);
  CHECK_EQUAL(cudaMemcpyAsync(second, first, 16, cudaMemcpyDeviceToDevice, stream), cudaSuccess);
  CHECK_EQUAL(cudaMemset(second, 0xFF, 4), cudaSuccess);
  CHECK_EQUAL(cudaMemsetAsync(second + 3, 0, 4, stream), cudaSuccess);
  CHECK_EQUAL(cudaMemcpy(back.data(), second, 16, cudaMemcpyDefault), cudaSuccess);
  CHECK(back == std::vector<int>({-1, 2, 3, 0}));
  // Copies of memory that is not where the direction says, or that reaches beyond an allocation.
  CHECK_EQUAL(cudaMemcpy(first, host.data(), 16, cudaMemcpyDeviceToHost), cudaErrorInvalidValue);
  CHECK_EQUAL(cudaMemcpy(host.data(), back.data(), 16, cudaMemcpyDeviceToHost), cudaErrorInvalidValue);
  CHECK_EQUAL(cudaMemcpy(first + 1, host.data(), 16, cudaMemcpyHostToDevice), cudaErrorInvalidValue);
  CHECK_EQUAL(cudaMemset(first, 0, 17), cudaErrorInvalidValue);
  CHECK_EQUAL(cudaMemset(host.data(), 0, 4), cudaErrorInvalidValue);
  CHECK_EQUAL(cudaFree(first + 1), cudaErrorInvalidValue);
  CHECK_EQUAL(cudaFree(first), cudaSuccess);
  CHECK_EQUAL(cudaFree(first), cudaErrorInvalidValue);
  CHECK_EQUAL(cudaFreeAsync(second, stream), cudaSuccess);
  CHECK_EQUAL(cudaStreamDestroy(stream), cudaSuccess);
  CHECK_EQUAL(cudaStreamSynchronize(stream), cudaErrorInvalidResourceHandle);
  CHECK_EQUAL(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), cudaSuccess);
  CHECK_EQUAL(cudaStreamDestroy(stream), cudaSuccess);
  CHECK_EQUAL(cudaFree(nullptr), cudaSuccess);
  CHECK_EQUAL(cudaGetLastError(), cudaErrorInvalidResourceHandle);
}

// A stream is done with what precedes an event, but reports it as late as it is set to.
void test_events() {
  cudaEvent_t event = nullptr;
  CHECK_EQUAL(cudaEventCreateWithFlags(&event, 4), cudaErrorInvalidValue);
  CHECK_EQUAL(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), cudaSuccess);
  CHECK_EQUAL(cudaEventQuery(event), cudaSuccess);
  CHECK_EQUAL(cudaEventRecord(event, nullptr), cudaSuccess);
  CHECK_EQUAL(cudaEventQuery(event), cudaSuccess);
  Device slow;
  slow.event_delay = 2;
  set_device(slow);
  CHECK_EQUAL(cudaEventRecord(event, nullptr), cudaSuccess);
  cudaGetLastError();
  CHECK_EQUAL(cudaEventQuery(event), cudaErrorNotReady);
  CHECK_EQUAL(cudaEventQuery(event), cudaErrorNotReady);
  CHECK_EQUAL(cudaEventQuery(event), cudaSuccess);
  CHECK_EQUAL(cudaGetLastError(), cudaErrorNotReady);  // which CUDA keeps as an error, too
  set_device({});
  cudaStream_t gone = nullptr;
  CHECK_EQUAL(cudaStreamCreate(&gone), cudaSuccess);
  CHECK_EQUAL(cudaStreamDestroy(gone), cudaSuccess);
  CHECK_EQUAL(cudaEventRecord(event, gone), cudaErrorInvalidResourceHandle);
  CHECK_EQUAL(cudaEventDestroy(event), cudaSuccess);
  CHECK_EQUAL(cudaEventDestroy(event), cudaErrorInvalidResourceHandle);
  CHECK_EQUAL(cudaEventQuery(event), cudaErrorInvalidResourceHandle);
  cudaGetLastError();
}

__global__ void nothing() {}

// A poorer device refuses what a real one like it refuses, and memory is freed by streams of its own device
// alone.
void test_other_devices() {
  Device device;
  device.count = 2;
  device.cooperative_launch = device.memory_pools = device.has_code = false;
  device.largest_grid_y = 3;
  device.bytes = allocated_bytes() + 100;
  set_device(device);
  int value = -1;
  CHECK_EQUAL(cudaGetDeviceCount(&value), cudaSuccess);
  CHECK_EQUAL(value, 2);
  for (const cudaDeviceAttr lacking : {cudaDevAttrCooperativeLaunch, cudaDevAttrMemoryPoolsSupported}) {
    CHECK_EQUAL(cudaDeviceGetAttribute(&value, lacking, 1), cudaSuccess);
    CHECK_EQUAL(value, 0);
  }
  cudaFuncAttributes attributes;
  CHECK_EQUAL(cudaFuncGetAttributes(&attributes, nothing), cudaErrorNoKernelImageForDevice);
  CHECK_THROWS(launch(nothing, one_block(1)), std::runtime_error);
  CHECK_EQUAL(cudaGetLastError(), cudaErrorNoKernelImageForDevice);
  void *first = nullptr, *second = nullptr;
  CHECK_EQUAL(cudaMallocAsync(&first, 60, nullptr), cudaSuccess);
  CHECK_EQUAL(cudaMallocAsync(&second, 60, nullptr), cudaErrorMemoryAllocation);
  CHECK_EQUAL(allocated_bytes(), device.bytes - 40);
  CHECK_EQUAL(cudaSetDevice(2), cudaErrorInvalidDevice);
  CHECK_EQUAL(cudaSetDevice(1), cudaSuccess);
  CHECK_EQUAL(cudaGetDevice(&value), cudaSuccess);
  CHECK_EQUAL(value, 1);
  CHECK_EQUAL(cudaFreeAsync(first, nullptr), cudaErrorInvalidValue);
  CHECK_EQUAL(cudaSetDevice(0), cudaSuccess);
  CHECK_EQUAL(cudaFreeAsync(first, nullptr), cudaSuccess);
  device.has_code = true;
  set_device(device);
  CHECK_EQUAL(cudaFuncGetAttributes(&attributes, nothing), cudaSuccess);
  launch(nothing, {{1, 3}, 1});
  CHECK_THROWS(launch(nothing, {{1, 4}, 1}), std::runtime_error);
  CHECK_EQUAL(cudaGetLastError(), cudaErrorInvalidConfiguration);
  set_device({});
}

void test_fewer_blocks() {
  const char* const variable = "FLASHCORESET_CUDA_BLOCKS";
  CHECK_EQUAL(cooperative_blocks(nothing, 64, 0), 3);
  for (const auto& [value, expected] : {std::pair<const char*, int>{"2", 2}, {"100", 3}, {"0", 1}}) {
    setenv(variable, value, 1);
    CHECK_EQUAL(cooperative_blocks(nothing, 64, 0), expected);
  }
  unsetenv(variable);
}

// Arguments become what the parameters are.
__global__ void converted(double* out, double a, long long b, const int c) {
  *out = a + static_cast<double>(b) + c;
}

void test_launches() {
  const DeviceArray<double> out(1);
  launch(converted, one_block(1), out.data(), 0.5f, 3u, 'a');
  CHECK_EQUAL(out.values()[0], 0.5 + 3 + 'a');
  const std::vector<Launch> wrong = {{0, 1},          {1, 0},          {1, 1025},
                                     {1, {1, 1, 65}}, {{1, 65536}, 1}, {1, {64, 32}}};
  for (const Launch& how : wrong) {
    CHECK_THROWS(launch(converted, how, out.data(), 1, 1, 1), std::runtime_error);
    CHECK_EQUAL(cudaGetLastError(), cudaErrorInvalidConfiguration);
  }
  launch(converted, one_block(1, 163 * 1024), out.data(), 1, 1, 1);
  CHECK_THROWS(launch(converted, one_block(1, 163 * 1024 + 1), out.data(), 1, 1, 1), std::runtime_error);
  CHECK_EQUAL(cudaGetLastError(), cudaErrorInvalidValue);
  CHECK_THROWS(__syncthreads(), std::logic_error);
}

// Several threads of the host launch at once; each gets its own answers.
void test_host_threads() {
  std::vector<std::thread> team;
  std::vector<int> right(4, 0);
  for (int t = 0; t < 4; ++t)
    team.emplace_back([t, &right] {
      std::vector<int> in(128, t + 1);
      for (int repeat = 0; repeat < 20; ++repeat) {
        const DeviceArray<int> from(in), to(1);
        launch(block_sum<int>, {1, 128}, from.data(), to.data());
        right[t] += to.values()[0] == 128 * (t + 1);
      }
    });
  for (std::thread& thread : team) thread.join();
  CHECK(right == std::vector<int>(4, 20));
}

// ---- Schedules ----

__global__ void write_order(int* order, int* count) {
  order[atomicAdd(count, 1)] = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
}

std::vector<int> order_under(const std::string& name) {
  const UnderSchedule under(name);
  const DeviceArray<int> order(12), count(std::vector<int>{0});
  launch(write_order, {3, 4}, order.data(), count.data());
  return order.values();
}

void test_schedules() {
  const char* environment = std::getenv("FC_EMULATOR_SCHEDULE");
  CHECK_EQUAL(fc::emulator::schedule(), environment != nullptr ? environment : "forward");
  std::vector<int> forward(12);
  std::iota(forward.begin(), forward.end(), 0);
  CHECK(order_under("forward") == forward);
  CHECK(order_under("reverse") == std::vector<int>(forward.rbegin(), forward.rend()));
  const std::vector<int> first = order_under("random:1");
  CHECK(first == order_under("random:1"));
  CHECK(first != order_under("random:2"));
  CHECK(first != forward);
  CHECK(std::is_permutation(first.begin(), first.end(), forward.begin()));
  for (const char* name : {"", "backward", "random", "random:", "random:x", "random:-1"})
    CHECK_THROWS(fc::emulator::set_schedule(name), std::invalid_argument);
}

// ---- What goes wrong ----

struct KernelError {
  unsigned thread;
};

struct CountsDestruction {
  int* count;
  ~CountsDestruction() { atomicAdd(count, 1); }
};

__global__ void throws(int* destroyed) {
  const CountsDestruction object{destroyed};
  if (threadIdx.x == 40) throw KernelError{threadIdx.x};
  __syncthreads();
}

void test_exceptions() {
  for (const char* name : kSchedules) {
    const UnderSchedule under(name);
    const DeviceArray<int> destroyed(std::vector<int>{0});
    unsigned thrower = 0;
    try {
      launch(throws, one_block(64), destroyed.data());
    } catch (const KernelError& error) {
      thrower = error.thread;
    }
    CHECK_EQUAL(thrower, 40u);
    // The threads that had started were unwound: in order, all up to the thrower.
    if (std::string(name) == "forward") CHECK_EQUAL(destroyed.values()[0], 41);
    if (std::string(name) == "reverse") CHECK_EQUAL(destroyed.values()[0], 24);
    test_block_sum<int>();  // the next launch is not disturbed
  }
  const auto nested = +[](int* out) { launch(write_global, one_block(1), out, 0); };
  const DeviceArray<int> out(1);
  CHECK_THROWS(launch(nested, one_block(1), out.data()), std::logic_error);
}

// The launch reports a fault whose text has all of `parts`, under every schedule.
template <class... P>
void check_fault(void (*kernel)(P...), const Launch& how, const std::vector<std::string>& parts) {
  for (const char* name : kSchedules) {
    const UnderSchedule under(name);
    const DeviceArray<int> out(std::vector<int>(1024, 0));
    std::string text = "no fault";
    try {
      launch(kernel, how, out.data());
    } catch (const Fault& fault) {
      text = fault.what();
    }
    for (const std::string& part : parts)
      check::record(text.find(part) != std::string::npos, __FILE__, __LINE__,
                    std::string(name) + ": \"" + text + "\" has \"" + part + "\"");
  }
}

void test_faults() {
  check_fault(divergent_barrier, one_block(64),
              {"thread (0, 0, 0): waits at __syncthreads", "faults.cu:5", "faults.cu:7", "thread (1, 0, 0)"});
  check_fault(exit_before_barrier, one_block(64),
              {"thread (0, 0, 0): waits at __syncthreads", "but thread (63, 0, 0) has exited"});
  check_fault(exit_before_barrier, {1, {4, 4, 4}}, {"thread (0, 0, 0)"});
  check_fault(shuffle_without_half, one_block(32),
              {"waits at __shfl_sync with mask 0xffffffff", "but thread (16, 0, 0) waits at __syncthreads"});
  check_fault(shuffle_from_exited, one_block(32),
              {"thread (15, 0, 0): waits at __shfl_down_sync", "reads lane 16"});
  check_fault(shuffle_from_exited, one_block(16), {"thread (15, 0, 0)", "reads lane 16"});
  check_fault(shuffle_outside_mask, one_block(32),
              {"thread (16, 0, 0): __shfl_sync", "its own lane 16 is not"});
  check_fault(syncwarp_without_half, one_block(32),
              {"waits at __syncwarp", "but thread (16, 0, 0) waits at __shfl_sync"});
  check_fault(grid_sync_once, {2, 64}, {"grid_sync() in a launch that is not cooperative"});
  Launch cooperative{3, 64};
  cooperative.cooperative = true;
  check_fault(block_skips_grid_sync, cooperative,
              {"block (0, 0, 0), thread (0, 0, 0): waits at grid_sync", "of block (2, 0, 0) has exited"});
  check_fault(too_much_shared, one_block(1), {"more shared memory than a block has: 65536 bytes"});

  const UnderSchedule under("forward");
  const DeviceArray<int> out(64);
  try {
    launch(shuffle_outside_mask, one_block(32), out.data());
    CHECK(false);
  } catch (const Fault& fault) {
    CHECK_EQUAL(fault.thread.x, 16u);
    CHECK_EQUAL(fault.block.x, 0u);
  }
}

// How a kernel's results differ between schedules, or the fault that comes first.
template <class... P>
std::string difference(void (*kernel)(P...), const Launch& how) {
  try {
    return compare_schedules([&] {
             const DeviceArray<int> out(std::vector<int>(128, 0));
             launch(kernel, how, out.data());
             return out.values();
           })
        .difference;
  } catch (const Fault& fault) {
    return fault.what();
  }
}

void test_races() {
  CHECK(!difference(neighbour<false>, one_block(128)).empty());
  CHECK_EQUAL(difference(neighbour<true>, one_block(128)), "");
  CHECK(!difference(warp_neighbour<false>, one_block(32)).empty());
  CHECK_EQUAL(difference(warp_neighbour<true>, one_block(32)), "");
  CHECK(!difference(blocks_write<false>, {5, 1}).empty());
  CHECK_EQUAL(difference(blocks_write<true>, {5, 1}), "");
  CHECK(!difference(uninitialised_static, one_block(32)).empty());
  CHECK(!difference(uninitialised_dynamic, one_block(32, 128)).empty());
  CHECK_EQUAL(difference(lost_update<true>, {3, 64}), "");
  CHECK_EQUAL(difference(last_block<true>, {5, 64}), "");
  CHECK_EQUAL(difference(neighbouring_bytes, one_block(128)), "");
  CHECK_EQUAL(difference(lanes_in_turn<true>, one_block(32)), "");
  const auto global = compare_schedules([] { return DeviceArray<int>(5).values(); });
  CHECK(!global.difference.empty());
}

#if defined(FC_EMULATOR_RACES)
// The races that the schedules show, and those that they cannot: no thread is interrupted inside an update.
void test_race_detector() {
  check_fault(neighbour<false>, one_block(128), {"race: ", "of the shared values, which thread "});
  check_fault(warp_neighbour<false>, one_block(32), {"race: ", "of the shared values, which thread "});
  check_fault(blocks_write<false>, {5, 1},
              {"race: writes byte 0 of an array of 4096 bytes in device memory"});
  check_fault(lost_update<false>, {3, 1}, {"race: reads byte 0 of an array of 4096 bytes", "of block "});
  check_fault(lost_update<false>, one_block(64), {"race: ", " of block (0, 0, 0) writes"});
  check_fault(last_block<false>, {5, 64}, {"race: reads byte ", " of block "});
  check_fault(lanes_in_turn<false>, one_block(32), {"race: ", "of the shared value, "});
  check_fault(byte_of_word, one_block(64), {"race: ", "of the shared word, "});
  check_fault(atomic_and_plain, one_block(64), {"race: ", "atomically updates"});
}
#endif

// Runs a launch in a child process; returns whether it died, with what it wrote to standard error.
template <class Run>
std::pair<bool, std::string> dies(Run run) {
  int ends[2];
  if (pipe(ends) != 0) return {false, "no pipe"};
  const pid_t child = fork();
  if (child == 0) {
    dup2(ends[1], STDERR_FILENO);
    close(ends[0]);
    close(ends[1]);
    run();
    _exit(0);
  }
  close(ends[1]);
  std::string text;
  char buffer[4096];
  for (ssize_t bytes; (bytes = read(ends[0], buffer, sizeof buffer)) > 0;)
    text.append(buffer, static_cast<size_t>(bytes));
  close(ends[0]);
  int status = 0;
  waitpid(child, &status, 0);
  if (WIFSIGNALED(status)) text += "signal " + std::to_string(WTERMSIG(status));
  return {!WIFEXITED(status) || WEXITSTATUS(status) != 0, text};
}

void test_stack_overflow() {
  const auto deep = [] {
    const DeviceArray<int> out(1);
    launch(recurse, one_block(1), out.data(), 200);
  };
  const auto [died, text] = dies(deep);
  CHECK(died);
#if defined(__SANITIZE_ADDRESS__)
  CHECK(text.find("AddressSanitizer: stack-overflow") != std::string::npos);
#else
  CHECK(text.find("signal " + std::to_string(SIGSEGV)) != std::string::npos);
#endif
  const DeviceArray<int> out(1);
  launch(recurse, one_block(1), out.data(), 8);
  CHECK_EQUAL(out.values()[0], 36);
}

#if defined(__SANITIZE_ADDRESS__)
void check_out_of_bounds(void (*kernel)(int*, int), const char* access) {
  const auto run = [kernel](int at) {
    const DeviceArray<int> out(8);
    launch(kernel, one_block(2, 8 * sizeof(int)), out.data(), at);
  };
  for (const int at : {-1, 8}) {
    const auto [died, text] = dies([&] { run(at); });
    CHECK(died);
    CHECK(text.find("AddressSanitizer: heap-buffer-overflow") != std::string::npos);
    CHECK(text.find(access) != std::string::npos);
  }
  run(7);
}

void test_out_of_bounds() {
  check_out_of_bounds(+[](int* out, int at) { read_global(out, out, at); }, "READ of size 4");
  check_out_of_bounds(write_global, "WRITE of size 4");
  check_out_of_bounds(read_static, "READ of size 4");
  check_out_of_bounds(write_static, "WRITE of size 4");
  check_out_of_bounds(read_dynamic, "READ of size 4");
  check_out_of_bounds(write_dynamic, "WRITE of size 4");
}
#endif

// ---- Speed ----

__global__ void many_barriers(int count) {
  for (int i = 0; i < count; ++i) __syncthreads();
}
template <class Run>
double nanoseconds(double count, Run run) {
  const auto start = std::chrono::steady_clock::now();
  run();
  return std::chrono::duration<double, std::nano>(std::chrono::steady_clock::now() - start).count() / count;
}

void report_speed() {
  const UnderSchedule under("forward");
  launch(many_barriers, one_block(256), 1);
  const double wait = nanoseconds(256 * 2000.0, [] { launch(many_barriers, one_block(256), 2000); });
  const double launches = nanoseconds(1000, [] {
    for (int i = 0; i < 1000; ++i) launch(nothing, one_block(256));
  });
  std::printf("a thread's wait at a barrier: %.1f ns; a launch of 256 threads that never wait: %.1f us\n",
              wait, launches / 1000);
}

}  // namespace

TEST_PROGRAM {
  test_schedules();
  test_every_thread_once();
  test_block_sum<int>();
  test_block_sum<float>();
  test_block_sum<long long>();
  test_dynamic_shared();
  test_barrier_votes();
  test_shuffles<int>();
  test_shuffles<unsigned>();
  test_shuffles<long long>();
  test_shuffles<unsigned long long>();
  test_shuffles<float>();
  test_shuffles<double>();
  test_warps();
  test_atomics();
  test_grid_sync();
  test_conversions();
  test_intrinsics();
  test_host();
  test_events();
  test_other_devices();
  test_fewer_blocks();
  test_launches();
  test_host_threads();
  test_exceptions();
  test_faults();
  test_races();
#if defined(FC_EMULATOR_RACES)
  test_race_detector();
#endif
  test_stack_overflow();
#if defined(__SANITIZE_ADDRESS__)
  test_out_of_bounds();
#endif
  report_speed();
  return check::verdict("emulator");
}
