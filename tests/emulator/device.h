// CUDA's device language: qualifiers, built-in variables and types, and the intrinsics.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <string>
#include <type_traits>

#include "emulator/emulator.h"
#include "emulator/host.h"

#define __global__
#define __device__
#define __host__
#define __constant__
#define __launch_bounds__(...)
#define __forceinline__ inline __attribute__((always_inline))

// The variables of the thread that is running; the emulator sets them when it switches.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

// Vector types, aligned as on the device, where a misaligned load is a fault: the undefined-behaviour
// sanitizer reports it here.
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline double2 make_double2(double x, double y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline uint3 make_uint3(unsigned x, unsigned y, unsigned z) { return {x, y, z}; }

// CUDA's own list of argument types: a call that is ambiguous there must be ambiguous here.
#define FC_MIN_MAX(A, B, R, smaller, larger)              \
  inline R min(A a, B b) {                                \
    const R x = static_cast<R>(a), y = static_cast<R>(b); \
    return smaller;                                       \
  }                                                       \
  inline R max(A a, B b) {                                \
    const R x = static_cast<R>(a), y = static_cast<R>(b); \
    return larger;                                        \
  }
#define FC_INTEGER_MIN_MAX(A, B, R) FC_MIN_MAX(A, B, R, x<y ? x : y, x> y ? x : y)
FC_INTEGER_MIN_MAX(int, int, int)
FC_INTEGER_MIN_MAX(unsigned, unsigned, unsigned)
FC_INTEGER_MIN_MAX(int, unsigned, unsigned)
FC_INTEGER_MIN_MAX(unsigned, int, unsigned)
FC_INTEGER_MIN_MAX(long, long, long)
FC_INTEGER_MIN_MAX(unsigned long, unsigned long, unsigned long)
FC_INTEGER_MIN_MAX(long, unsigned long, unsigned long)
FC_INTEGER_MIN_MAX(unsigned long, long, unsigned long)
FC_INTEGER_MIN_MAX(long long, long long, long long)
FC_INTEGER_MIN_MAX(unsigned long long, unsigned long long, unsigned long long)
FC_INTEGER_MIN_MAX(long long, unsigned long long, unsigned long long)
FC_INTEGER_MIN_MAX(unsigned long long, long long, unsigned long long)
// A NaN gives way to the other argument.
FC_MIN_MAX(float, float, float, std::fmin(x, y), std::fmax(x, y))
FC_MIN_MAX(double, double, double, std::fmin(x, y), std::fmax(x, y))
FC_MIN_MAX(float, double, double, std::fmin(x, y), std::fmax(x, y))
FC_MIN_MAX(double, float, double, std::fmin(x, y), std::fmax(x, y))
#undef FC_INTEGER_MIN_MAX
#undef FC_MIN_MAX

// Arithmetic with the rounding in the name. The compiler is set not to fuse, so plain operators round once.
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dsub_rn(double a, double b) { return a - b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __fma_rn(double a, double b, double c) { return std::fma(a, b, c); }
inline float rsqrtf(float x) { return static_cast<float>(1.0 / std::sqrt(static_cast<double>(x))); }

namespace fc::emulator {

// Towards zero; beyond the range its end, and NaN the smallest number.
template <class Real>
long long truncate(Real x) {
  constexpr long long kSmallest = std::numeric_limits<long long>::min();
  if (!(x >= static_cast<Real>(kSmallest))) return kSmallest;
  if (x >= -static_cast<Real>(kSmallest)) return std::numeric_limits<long long>::max();
  return static_cast<long long>(x);
}

template <class To, class From>
To same_bits(From from) {
  static_assert(sizeof(To) == sizeof(From) && std::is_trivially_copyable_v<To>);
  To to;
  std::memcpy(static_cast<void*>(&to), &from, sizeof to);
  return to;
}

}  // namespace fc::emulator

inline long long __float2ll_rz(float x) { return fc::emulator::truncate(x); }
inline long long __double2ll_rz(double x) { return fc::emulator::truncate(x); }
inline int __float_as_int(float x) { return fc::emulator::same_bits<int>(x); }
inline unsigned __float_as_uint(float x) { return fc::emulator::same_bits<unsigned>(x); }
inline float __int_as_float(int x) { return fc::emulator::same_bits<float>(x); }
inline float __uint_as_float(unsigned x) { return fc::emulator::same_bits<float>(x); }
inline long long __double_as_longlong(double x) { return fc::emulator::same_bits<long long>(x); }
inline double __longlong_as_double(long long x) { return fc::emulator::same_bits<double>(x); }

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline int __clzll(long long x) { return x == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(x)); }

template <class T>
T __ldg(const T* address) {
  return *address;
}

inline void __threadfence() { fc::emulator::fence(); }
inline void __threadfence_block() {}

// Atomics: nothing comes between the two halves of a plain update, because threads switch only where they
// wait.
namespace fc::emulator {

template <class T, class Update>
__attribute__((no_sanitize("thread"))) T update(T* address, Update f) {
  touch(address, sizeof(T), Touch::atomic);
  const T old = *address;
  *address = f(old);
  return old;
}

// Integers wrap.
template <class T>
T wrapping_sum(T a, T b) {
  if constexpr (std::is_integral_v<T>) {
    using Unsigned = std::make_unsigned_t<T>;
    return static_cast<T>(static_cast<Unsigned>(a) + static_cast<Unsigned>(b));
  } else {
    return a + b;
  }
}

}  // namespace fc::emulator

#define FC_ATOMIC(name, T, result)                                           \
  inline T name(T* address, T value) {                                       \
    return fc::emulator::update(address, [value](T old) { return result; }); \
  }
FC_ATOMIC(atomicAdd, int, fc::emulator::wrapping_sum(old, value))
FC_ATOMIC(atomicAdd, unsigned, old + value)
FC_ATOMIC(atomicAdd, unsigned long long, old + value)
FC_ATOMIC(atomicAdd, float, old + value)
FC_ATOMIC(atomicAdd, double, old + value)
FC_ATOMIC(atomicMin, int, old < value ? old : value)
FC_ATOMIC(atomicMin, unsigned, old < value ? old : value)
FC_ATOMIC(atomicMin, long long, old < value ? old : value)
FC_ATOMIC(atomicMin, unsigned long long, old < value ? old : value)
FC_ATOMIC(atomicMax, int, old > value ? old : value)
FC_ATOMIC(atomicMax, unsigned, old > value ? old : value)
FC_ATOMIC(atomicMax, long long, old > value ? old : value)
FC_ATOMIC(atomicMax, unsigned long long, old > value ? old : value)
FC_ATOMIC(atomicExch, int, (static_cast<void>(old), value))
FC_ATOMIC(atomicExch, unsigned, (static_cast<void>(old), value))
FC_ATOMIC(atomicExch, unsigned long long, (static_cast<void>(old), value))
FC_ATOMIC(atomicExch, float, (static_cast<void>(old), value))
FC_ATOMIC(atomicOr, int, old | value)
FC_ATOMIC(atomicOr, unsigned, old | value)
FC_ATOMIC(atomicOr, unsigned long long, old | value)
FC_ATOMIC(atomicAnd, int, old& value)
FC_ATOMIC(atomicAnd, unsigned, old& value)
FC_ATOMIC(atomicAnd, unsigned long long, old& value)
#undef FC_ATOMIC

#define FC_ATOMIC_CAS(T)                                                                        \
  inline T atomicCAS(T* address, T expected, T value) {                                         \
    return fc::emulator::update(address, [=](T old) { return old == expected ? value : old; }); \
  }
FC_ATOMIC_CAS(int)
FC_ATOMIC_CAS(unsigned)
FC_ATOMIC_CAS(unsigned long long)
#undef FC_ATOMIC_CAS

// Barriers of the block.
inline void __syncthreads(fc::emulator::Site site = fc::emulator::Site::here()) {
  fc::emulator::block_barrier("__syncthreads", site, 0);
}
inline int __syncthreads_count(int predicate, fc::emulator::Site site = fc::emulator::Site::here()) {
  return fc::emulator::block_barrier("__syncthreads_count", site, predicate).count;
}
inline int __syncthreads_and(int predicate, fc::emulator::Site site = fc::emulator::Site::here()) {
  const fc::emulator::Votes votes = fc::emulator::block_barrier("__syncthreads_and", site, predicate);
  return votes.count == votes.threads;
}
inline int __syncthreads_or(int predicate, fc::emulator::Site site = fc::emulator::Site::here()) {
  return fc::emulator::block_barrier("__syncthreads_or", site, predicate).count != 0;
}

namespace cooperative_groups {

struct grid_group {
  void sync(fc::emulator::Site site = fc::emulator::Site::here()) const { fc::emulator::grid_sync(site); }
};
struct thread_block {
  void sync(fc::emulator::Site site = fc::emulator::Site::here()) const {
    fc::emulator::block_barrier("thread_block::sync", site, 0);
  }
};
inline grid_group this_grid() { return {}; }
inline thread_block this_thread_block() { return {}; }

}  // namespace cooperative_groups

// Operations of the warp.
namespace fc::emulator {

template <class T>
uint64_t to_word(T value) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8),
                "not a type that CUDA shuffles");
  uint64_t word = 0;
  std::memcpy(&word, &value, sizeof value);
  return word;
}

template <class T>
T from_word(uint64_t word) {
  T value;
  std::memcpy(&value, &word, sizeof value);
  return value;
}

// Which lane a shuffle reads, given its own lane and the first and last one of its segment of the warp.
template <class T, class Source>
T shuffle(unsigned mask, T value, int width, const char* operation, Site site, Source source) {
  if (width < 1 || width > warpSize || (width & (width - 1)) != 0)
    fail(std::string(operation) + ": width " + std::to_string(width) + " is not a power of two up to 32");
  const int own = lane(), first = own & ~(width - 1);
  return from_word<T>(
      warp_exchange(mask, to_word(value), source(own, first, first + width - 1), operation, site));
}

template <class T, T (*combine)(T, T)>
T reduce(unsigned mask, T value, const char* operation, Site site) {
  const Fold fold = [](uint64_t a, uint64_t b) { return to_word(combine(from_word<T>(a), from_word<T>(b))); };
  return from_word<T>(warp_fold(mask, to_word(value), fold, operation, site));
}

inline unsigned bit_and(unsigned a, unsigned b) { return a & b; }
inline unsigned bit_or(unsigned a, unsigned b) { return a | b; }
inline unsigned bit_xor(unsigned a, unsigned b) { return a ^ b; }

inline unsigned ballot(unsigned mask, bool predicate, const char* operation, Site site) {
  return reduce<unsigned, bit_or>(mask, static_cast<unsigned>(predicate) << lane(), operation, site);
}

}  // namespace fc::emulator

inline void __syncwarp(unsigned mask = ~0u, fc::emulator::Site site = fc::emulator::Site::here()) {
  fc::emulator::reduce<unsigned, fc::emulator::bit_or>(mask, 0, "__syncwarp", site);
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = warpSize,
              fc::emulator::Site site = fc::emulator::Site::here()) {
  return fc::emulator::shuffle(mask, value, width, "__shfl_sync", site,
                               [=](int, int first, int) { return first | (source & (width - 1)); });
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize,
                 fc::emulator::Site site = fc::emulator::Site::here()) {
  return fc::emulator::shuffle(mask, value, width, "__shfl_up_sync", site, [=](int own, int first, int) {
    const int source = own - static_cast<int>(delta % warpSize);
    return source < first ? own : source;
  });
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize,
                   fc::emulator::Site site = fc::emulator::Site::here()) {
  return fc::emulator::shuffle(mask, value, width, "__shfl_down_sync", site, [=](int own, int, int last) {
    const int source = own + static_cast<int>(delta % warpSize);
    return source > last ? own : source;
  });
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = warpSize,
                  fc::emulator::Site site = fc::emulator::Site::here()) {
  return fc::emulator::shuffle(mask, value, width, "__shfl_xor_sync", site, [=](int own, int, int last) {
    const int source = own ^ (lanes % warpSize);
    return source > last ? own : source;
  });
}

inline unsigned __ballot_sync(unsigned mask, int predicate,
                              fc::emulator::Site site = fc::emulator::Site::here()) {
  return fc::emulator::ballot(mask, predicate != 0, "__ballot_sync", site);
}
inline int __any_sync(unsigned mask, int predicate, fc::emulator::Site site = fc::emulator::Site::here()) {
  return fc::emulator::ballot(mask, predicate != 0, "__any_sync", site) != 0;
}
inline int __all_sync(unsigned mask, int predicate, fc::emulator::Site site = fc::emulator::Site::here()) {
  return fc::emulator::ballot(mask, predicate == 0, "__all_sync", site) == 0;
}

// The lanes of the mask that bring the same value.
template <class T>
unsigned __match_any_sync(unsigned mask, T value, fc::emulator::Site site = fc::emulator::Site::here()) {
  unsigned same = 0;
  for (int other = 0; other < warpSize; ++other) {
    if ((mask >> other & 1) == 0) continue;
    const uint64_t theirs =
        fc::emulator::warp_exchange(mask, fc::emulator::to_word(value), other, "__match_any_sync", site);
    if (theirs == fc::emulator::to_word(value)) same |= 1u << other;
  }
  return same;
}

#define FC_REDUCE(name, T, combine)                                                             \
  inline T name(unsigned mask, T value, fc::emulator::Site site = fc::emulator::Site::here()) { \
    return fc::emulator::reduce<T, combine>(mask, value, #name, site);                          \
  }
FC_REDUCE(__reduce_add_sync, int, fc::emulator::wrapping_sum)
FC_REDUCE(__reduce_add_sync, unsigned, fc::emulator::wrapping_sum)
FC_REDUCE(__reduce_min_sync, int, min)
FC_REDUCE(__reduce_min_sync, unsigned, min)
FC_REDUCE(__reduce_max_sync, int, max)
FC_REDUCE(__reduce_max_sync, unsigned, max)
FC_REDUCE(__reduce_and_sync, unsigned, fc::emulator::bit_and)
FC_REDUCE(__reduce_or_sync, unsigned, fc::emulator::bit_or)
FC_REDUCE(__reduce_xor_sync, unsigned, fc::emulator::bit_xor)
#undef FC_REDUCE
