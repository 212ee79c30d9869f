// The few vector operations that the kernels are written in, at the native width of the instruction set this
// file is compiled for. Plain arithmetic uses the compilers' vector extension; what it cannot say (fused
// multiply-add, conversion to 64-bit integers, compression) is spelled out per instruction set.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "core/half.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace fc::simd {

#if defined(__AVX512F__)
inline constexpr int kBytes = 64;
inline constexpr int kTileRows = 12;  // 12 x 2 accumulators of the 32 registers
inline constexpr int kDistanceRows = 12;
#elif defined(__AVX2__)
inline constexpr int kBytes = 32;
inline constexpr int kTileRows = 6;      // 6 x 2 of 16
inline constexpr int kDistanceRows = 3;  // a distance needs four more: it takes a tile in two halves
#elif defined(__aarch64__)
inline constexpr int kBytes = 16;
inline constexpr int kTileRows = 8;  // 8 x 2 of 32
inline constexpr int kDistanceRows = 8;
#else
inline constexpr int kBytes = 16;
inline constexpr int kTileRows = 4;  // 4 x 2 of 16
inline constexpr int kDistanceRows = 4;
#endif

template <class T>
struct Types;
template <>
struct Types<float> {
  typedef float V __attribute__((vector_size(kBytes)));
  typedef int32_t I __attribute__((vector_size(kBytes)));
};
template <>
struct Types<double> {
  typedef double V __attribute__((vector_size(kBytes)));
  typedef int64_t I __attribute__((vector_size(kBytes)));
};

template <class T>
using Vec = typename Types<T>::V;
typedef int64_t Fixed __attribute__((vector_size(kBytes)));  // lanes of a 64-bit fixed-point sum

template <class T>
inline constexpr int kWidth = kBytes / static_cast<int>(sizeof(T));

template <class T>
inline Vec<T> load(const T* p) {
  Vec<T> v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

template <class T>
inline void store(T* p, Vec<T> v) {
  std::memcpy(p, &v, sizeof(v));
}

// All bits are set in the first `count` lanes, none in the others.
template <class T>
inline typename Types<T>::I first_lanes(int64_t count) {
  using I = typename Types<T>::I;
  using S = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  I lanes;
  for (int i = 0; i < kWidth<T>; ++i) lanes[i] = i;
  return lanes < I{} + static_cast<S>(count);
}

// p[0], ..., p[count - 1] and then `fill`, for 0 <= count <= kWidth<T>; nothing else is read.
template <class T>
inline Vec<T> load_or(const T* p, int64_t count, T fill) {
#if defined(__AVX512F__)
  const unsigned mask = (1u << count) - 1;
  if constexpr (sizeof(T) == 4)
    return (Vec<T>)_mm512_mask_loadu_ps(_mm512_set1_ps(fill), static_cast<__mmask16>(mask), p);
  else
    return (Vec<T>)_mm512_mask_loadu_pd(_mm512_set1_pd(fill), static_cast<__mmask8>(mask), p);
#elif defined(__AVX2__)
  const auto mask = first_lanes<T>(count);
  Vec<T> v;
  if constexpr (sizeof(T) == 4)
    v = (Vec<T>)_mm256_maskload_ps(p, (__m256i)mask);
  else
    v = (Vec<T>)_mm256_maskload_pd(p, (__m256i)mask);
  return mask ? v : fill - Vec<T>{};
#else
  T lanes[kWidth<T>];
  for (int i = 0; i < kWidth<T>; ++i) lanes[i] = i < count ? p[i] : fill;
  return load(lanes);
#endif
}

// x - 0 is x whatever its sign, so this is one broadcast; 0 + x would be an addition first.
template <class T>
inline Vec<T> broadcast(T x) {
  return x - Vec<T>{};
}

template <class T>
inline Vec<T> abs(Vec<T> v) {
  using I = typename Types<T>::I;
  using S = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  const I mask = I{} + static_cast<S>(sizeof(T) == 4 ? INT32_MAX : INT64_MAX);
  return reinterpret_cast<Vec<T>>(reinterpret_cast<I>(v) & mask);
}

// a * b + c with one rounding if the instruction exists, two (SSE4.2) if it does not.
template <class T>
inline Vec<T> fma(Vec<T> a, Vec<T> b, Vec<T> c) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4)
    return (Vec<T>)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
  else
    return (Vec<T>)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4)
    return (Vec<T>)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
  else
    return (Vec<T>)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#elif defined(__aarch64__)
  if constexpr (sizeof(T) == 4)
    return (Vec<T>)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
  else
    return (Vec<T>)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
#else
  return a * b + c;
#endif
}

template <class T>
inline Vec<T> square_root(Vec<T> v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4)
    return (Vec<T>)_mm512_sqrt_ps((__m512)v);
  else
    return (Vec<T>)_mm512_sqrt_pd((__m512d)v);
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4)
    return (Vec<T>)_mm256_sqrt_ps((__m256)v);
  else
    return (Vec<T>)_mm256_sqrt_pd((__m256d)v);
#else
  for (int i = 0; i < kWidth<T>; ++i) v[i] = std::sqrt(v[i]);
  return v;
#endif
}

// a - b, by the multiply-add units if there are some: these units are idle while absolute differences are
// summed, the adders are not.
template <class T>
inline Vec<T> difference(Vec<T> a, Vec<T> b) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4)
    return (Vec<T>)_mm512_fmsub_ps((__m512)a, _mm512_set1_ps(1), (__m512)b);
  else
    return (Vec<T>)_mm512_fmsub_pd((__m512d)a, _mm512_set1_pd(1), (__m512d)b);
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4)
    return (Vec<T>)_mm256_fmsub_ps((__m256)a, _mm256_set1_ps(1), (__m256)b);
  else
    return (Vec<T>)_mm256_fmsub_pd((__m256d)a, _mm256_set1_pd(1), (__m256d)b);
#else
  return a - b;
#endif
}

// out[r] = the sum of the lanes of v[r], in one order.
template <int kRows, class T>
inline void lane_sums(const Vec<T> (&v)[kRows], T* out) {
#if defined(__AVX2__)
  if constexpr ((kRows == 8 || kRows == 4) && sizeof(T) == 4) {
    __m256 half[kRows];
    for (int r = 0; r < kRows; ++r) {
#if defined(__AVX512F__)
      half[r] = _mm256_add_ps(_mm512_castps512_ps256((__m512)v[r]), _mm512_extractf32x8_ps((__m512)v[r], 1));
#else
      half[r] = (__m256)v[r];
#endif
    }
    const __m256 low = _mm256_hadd_ps(_mm256_hadd_ps(half[0], half[1]), _mm256_hadd_ps(half[2], half[3]));
    if constexpr (kRows == 4) {
      _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(low), _mm256_extractf128_ps(low, 1)));
    } else {
      const __m256 high = _mm256_hadd_ps(_mm256_hadd_ps(half[4], half[5]), _mm256_hadd_ps(half[6], half[7]));
      _mm256_storeu_ps(out, _mm256_add_ps(_mm256_permute2f128_ps(low, high, 0x20),
                                          _mm256_permute2f128_ps(low, high, 0x31)));
    }
    return;
  }
#endif
  for (int r = 0; r < kRows; ++r) {
    T sum = v[r][0];
    for (int i = 1; i < kWidth<T>; ++i) sum += v[r][i];
    out[r] = sum;
  }
}

inline float float_of_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline float widen(BFloat16 x) { return float_of_bits(static_cast<uint32_t>(x.bits) << 16); }

// A subnormal or 0 is its significand times 2^-24. Otherwise the exponent's bias changes from 15 to 127;
// infinity and NaN have the largest exponent in both.
inline float widen(Half x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16, magnitude = x.bits & 0x7FFF;
  const float subnormal = static_cast<float>(magnitude) * 0x1p-24f;
  uint32_t bits = (magnitude << 13) + (112u << 23);
  if (magnitude < 0x0400) std::memcpy(&bits, &subnormal, sizeof(bits));
  if (magnitude >= 0x7C00) bits += 112u << 23;
  return float_of_bits(bits | sign);
}

// out[i] = in[i].
inline void widen(const BFloat16* in, float* out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = widen(in[i]);
}

inline void widen(const Half* in, float* out, int64_t count) {
  int64_t i = 0;
#if defined(__AVX512F__)
  for (; i + 16 <= count; i += 16)
    _mm512_storeu_ps(out + i, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(in + i))));
#elif defined(__F16C__)
  for (; i + 8 <= count; i += 8)
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i))));
#endif
  for (; i < count; ++i) out[i] = widen(in[i]);
}

// The largest lane.
template <class T>
inline T lane_max(Vec<T> v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4)
    return _mm512_reduce_max_ps((__m512)v);
  else
    return _mm512_reduce_max_pd((__m512d)v);
#else
  T most = v[0];
  for (int i = 1; i < kWidth<T>; ++i) most = v[i] > most ? v[i] : most;
  return most;
#endif
}

// The positive part; NaN does not occur (inputs are checked to be finite).
template <class T>
inline Vec<T> positive_part(Vec<T> v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4)
    return (Vec<T>)_mm512_max_ps((__m512)v, _mm512_setzero_ps());
  else
    return (Vec<T>)_mm512_max_pd((__m512d)v, _mm512_setzero_pd());
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4)
    return (Vec<T>)_mm256_max_ps((__m256)v, _mm256_setzero_ps());
  else
    return (Vec<T>)_mm256_max_pd((__m256d)v, _mm256_setzero_pd());
#elif defined(__SSE2__)
  if constexpr (sizeof(T) == 4)
    return (Vec<T>)_mm_max_ps((__m128)v, _mm_setzero_ps());
  else
    return (Vec<T>)_mm_max_pd((__m128d)v, _mm_setzero_pd());
#else
  const Vec<T> zero{};
  return v > zero ? v : zero;
#endif
}

// Bit i is set where a[i] > b[i].
template <class T>
inline uint32_t greater_mask(Vec<T> a, Vec<T> b) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4)
    return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ);
  else
    return _mm512_cmp_pd_mask((__m512d)a, (__m512d)b, _CMP_GT_OQ);
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4)
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_GT_OQ)));
  else
    return static_cast<uint32_t>(_mm256_movemask_pd(_mm256_cmp_pd((__m256d)a, (__m256d)b, _CMP_GT_OQ)));
#elif defined(__SSE2__)
  if constexpr (sizeof(T) == 4)
    return static_cast<uint32_t>(_mm_movemask_ps(_mm_cmpgt_ps((__m128)a, (__m128)b)));
  else
    return static_cast<uint32_t>(_mm_movemask_pd(_mm_cmpgt_pd((__m128d)a, (__m128d)b)));
#else
  uint32_t mask = 0;
  for (int i = 0; i < kWidth<T>; ++i) mask |= static_cast<uint32_t>(a[i] > b[i]) << i;
  return mask;
#endif
}

#if defined(__AVX2__) && !defined(__AVX512F__)
// AVX2 has no conversion to 64-bit integers: shift the significand by the exponent. Shift counts of 64 and
// above (a negative count seen as unsigned is one) give 0, which is what both a vanishing value and the
// unused direction need. t >= 0, t < 2^63.
inline __m256i truncate_to_fixed(__m256i significand, __m256i shift) {
  return _mm256_or_si256(_mm256_sllv_epi64(significand, shift),
                         _mm256_srlv_epi64(significand, _mm256_sub_epi64(_mm256_setzero_si256(), shift)));
}
#endif

// trunc(t) of every lane, t >= 0, as 64-bit integers in lane order: kParts vectors of them.
template <class T>
inline constexpr int kParts = 8 / static_cast<int>(sizeof(T));

inline void to_fixed(Vec<float> t, Fixed (&part)[2]) {
#if defined(__AVX512F__)
  const __m512 v = (__m512)t;
  part[0] = (Fixed)_mm512_cvttps_epi64(_mm512_castps512_ps256(v));
  part[1] = (Fixed)_mm512_cvttps_epi64(_mm512_extractf32x8_ps(v, 1));
#elif defined(__aarch64__)
  const float32x4_t v = (float32x4_t)t;
  part[0] = (Fixed)vcvtq_s64_f64(vcvt_f64_f32(vget_low_f32(v)));
  part[1] = (Fixed)vcvtq_s64_f64(vcvt_high_f64_f32(v));
#else
  part[0] = Fixed{static_cast<int64_t>(t[0]), static_cast<int64_t>(t[1])};
  part[1] = Fixed{static_cast<int64_t>(t[2]), static_cast<int64_t>(t[3])};
#endif
}

inline void to_fixed(Vec<double> t, Fixed (&part)[1]) {
#if defined(__AVX512F__)
  part[0] = (Fixed)_mm512_cvttpd_epi64((__m512d)t);
#elif defined(__AVX2__)
  const __m256i bits = (__m256i)t;
  const __m256i significand = _mm256_or_si256(_mm256_and_si256(bits, _mm256_set1_epi64x((1LL << 52) - 1)),
                                              _mm256_set1_epi64x(1LL << 52));
  part[0] = (Fixed)truncate_to_fixed(significand,
                                     _mm256_sub_epi64(_mm256_srli_epi64(bits, 52), _mm256_set1_epi64x(1075)));
#elif defined(__aarch64__)
  part[0] = (Fixed)vcvtq_s64_f64((float64x2_t)t);
#else
  part[0] = Fixed{static_cast<int64_t>(t[0]), static_cast<int64_t>(t[1])};
#endif
}

// The number of these bits: sums beyond 2^62 mean nothing, but are not undefined.
inline int64_t wrapped(uint64_t bits) { return static_cast<int64_t>(bits); }

// Exact 64-bit sums, one in each lane, of trunc(t), 0 <= t <= 2^61; the lanes together have to stay below
// 2^62.
template <class T>
struct LaneSums {
  static constexpr int64_t kMostAdds = INT64_MAX;
  Fixed part[kParts<T>];

  void add(Vec<T> t) {
    Fixed more[kParts<T>];
    to_fixed(t, more);
    for (int i = 0; i < kParts<T>; ++i) part[i] += more[i];
  }
  int64_t lane(int i) const { return part[i / (kBytes / 8)][i % (kBytes / 8)]; }
};

// The same if only the sum over the lanes is wanted.
template <class T>
struct Sum {
  static constexpr int64_t kMostAdds = INT64_MAX;
  Fixed lanes;

  void add(Vec<T> t) {
    Fixed more[kParts<T>];
    to_fixed(t, more);
    for (int i = 0; i < kParts<T>; ++i) lanes += more[i];
  }
  int64_t total() const {
    uint64_t result = 0;
    for (int i = 0; i < kBytes / 8; ++i) result += static_cast<uint64_t>(lanes[i]);
    return wrapped(result);
  }
};

#if defined(__SSE4_1__) && !defined(__AVX512F__)
// Without a conversion to 64-bit integers: t is cut into high * 2^40 + middle * 2^20 + low by adding and
// subtracting 1.5 * 2^63, 2^43 and 2^23, whose last places are 2^40, 2^20 and 1 (every difference is exact),
// and the three are summed as 32-bit integers, read off the significands. A high part is at most 2^21, so
// sums hold for kMostAdds additions.
template <>
struct LaneSums<float> {
  static constexpr int64_t kMostAdds = 512;
  typename Types<float>::I high, middle, low;

  void add(Vec<float> t) {
    using I = typename Types<float>::I;
    const Vec<float> to_high = broadcast(0x1.8p63f), to_middle = broadcast(0x1.8p43f),
                     to_low = broadcast(0x1.8p23f);
    const Vec<float> a = t + to_high, rest = t - (a - to_high);
    const Vec<float> b = rest + to_middle, last = floor(rest - (b - to_middle));
    high += reinterpret_cast<I>(a) - reinterpret_cast<I>(to_high);
    middle += reinterpret_cast<I>(b) - reinterpret_cast<I>(to_middle);
    low += reinterpret_cast<I>(last + to_low) - reinterpret_cast<I>(to_low);
  }
  int64_t lane(int i) const {
    return wrapped(static_cast<uint64_t>(high[i]) * (uint64_t{1} << 40) +
                   static_cast<uint64_t>(middle[i]) * (uint64_t{1} << 20) + static_cast<uint64_t>(low[i]));
  }

 private:
  static Vec<float> floor(Vec<float> v) {
#if defined(__AVX2__)
    return (Vec<float>)_mm256_floor_ps((__m256)v);
#else
    return (Vec<float>)_mm_floor_ps((__m128)v);
#endif
  }
};

template <>
struct Sum<float> : LaneSums<float> {
  int64_t total() const {
    uint64_t result = 0;
    for (int i = 0; i < kWidth<float>; ++i) result += static_cast<uint64_t>(lane(i));
    return wrapped(result);
  }
};
#endif

// Gathers and compression, for float: one vector of 32-bit indices goes with one of values.
#if defined(__AVX512F__)
using Indices = __m512i;
inline Indices load_indices(const uint32_t* p) { return _mm512_loadu_si512(p); }
inline Indices count_up(uint32_t first) {
  return _mm512_add_epi32(_mm512_set1_epi32(static_cast<int>(first)),
                          _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
}

// table[index] of 16 indices below 2^31.
inline Vec<float> gather(const float* table, Indices index) {
  return (Vec<float>)_mm512_i32gather_ps(index, table, 4);
}

// Writes the pairs (index[i], v[i]) of every set bit i of `mask` from position `count` on and returns the new
// count. Whole vectors are written. Compression goes through a register: to memory it is microcoded on some
// processors.
inline int64_t compress(uint32_t* index, float* value, int64_t count, uint32_t mask, Indices lanes,
                        Vec<float> v) {
  _mm512_storeu_si512(index + count, _mm512_maskz_compress_epi32(static_cast<__mmask16>(mask), lanes));
  _mm512_storeu_ps(value + count, _mm512_maskz_compress_ps(static_cast<__mmask16>(mask), (__m512)v));
  return count + __builtin_popcount(mask);
}
#elif defined(__AVX2__)
using Indices = __m256i;
inline Indices load_indices(const uint32_t* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}
inline Indices count_up(uint32_t first) {
  return _mm256_add_epi32(_mm256_set1_epi32(static_cast<int>(first)),
                          _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline Vec<float> gather(const float* table, Indices index) {
  return (Vec<float>)_mm256_i32gather_ps(table, index, 4);
}

// For every mask, the set bits' numbers in order, one byte per number: AVX2 can permute by a register but not
// compress.
struct CompressTable {
  uint64_t order[256];
  constexpr CompressTable() : order{} {
    for (int mask = 0; mask < 256; ++mask) {
      int kept = 0;
      for (int bit = 0; bit < 8; ++bit) {
        if (mask >> bit & 1) order[mask] |= static_cast<uint64_t>(bit) << (8 * kept++);
      }
    }
  }
};
inline constexpr CompressTable kCompress;

inline int64_t compress(uint32_t* index, float* value, int64_t count, uint32_t mask, Indices lanes,
                        Vec<float> v) {
  const __m256i order =
      _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(&kCompress.order[mask])));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(index + count), _mm256_permutevar8x32_epi32(lanes, order));
  _mm256_storeu_ps(value + count, _mm256_permutevar8x32_ps((__m256)v, order));
  return count + __builtin_popcount(mask);
}
#endif

// Appends (first + i, v[i]) for every set bit i of `mask` at position `count` of the two arrays and returns
// the new count. The arrays need kWidth<T> spare places behind `count`.
template <class T>
inline int64_t append(uint32_t* index, T* value, int64_t count, uint32_t mask, uint32_t first, Vec<T> v) {
#if defined(__AVX2__)
  if constexpr (sizeof(T) == 4) return compress(index, value, count, mask, count_up(first), v);
#endif
  for (; mask != 0; mask &= mask - 1) {
    const int lane = __builtin_ctz(mask);
    index[count] = first + static_cast<uint32_t>(lane);
    value[count] = v[lane];
    ++count;
  }
  return count;
}

}  // namespace fc::simd
