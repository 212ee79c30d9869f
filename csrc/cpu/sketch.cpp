// Products of long rows with random matrices that are generated on the way.
//
//   out_bc = sum over columns i of x of x_bi P_(offset + i)c
//
// rademacher   Signs are bits, so kFeatures columns of x have only 2^kFeatures different sums: these are
//              tabulated, one table per vector register, and a vector of outputs takes its sums from the
//              table by one permutation and adds them. With 16 floats per vector that is 4 columns for two
//              operations, while products take 4. Bits are made once per block of columns of x, for all rows
//              of a slab.
//
// gaussian     Normal numbers are made for a block, then multiplied: about as long as 28 rows' products with
//              them take (core/normal_rows.h). gaussian-boxmuller makes them in double, ten times as slowly.
//              They lie in strips as wide as the tile of sums, a strip in the first-level cache.
//
// sjlt         Entries are made for a block, then every row adds its numbers to the outputs that they belong
//              to: nnz additions each.
//
// srht         Per block of N: signs, a Hadamard transform in the first-level cache (log2 N additions each),
//              a gather.
//
// Rows in CSR form make the matrix's rows entry by entry, so their cost is that of their entries.
//
// Work is cut into pieces whose bounds depend on D and dim alone, summed in order: the result of a row
// depends neither on the other rows nor on the threads. Sums within a block of columns are taken in the type
// of x, over blocks in double.
//
// Rejected: flipping the sign of x for every output (an exclusive or and an addition, while the table takes
// half an operation each); fused multiply-adds with vectors of +-1 (the cost of a matrix product: 4
// operations for 4 columns).
#include "cpu/sketch.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#include "core/normal_rows.h"
#include "core/normal_simd.h"
#include "core/philox_simd.h"
#include "core/vmath.h"
#include "cpu/pack.h"

namespace fc {
namespace {

constexpr int64_t kBits = 128;           // columns that one random block gives signs
constexpr int64_t kPieceColumns = 512;   // columns of the output that a piece of work makes
constexpr int64_t kNormalColumns = 256;  // of normal numbers: a block of them stays in the second-level cache
constexpr int64_t kBlock = 192;  // columns of x between two flushes to double; whole tables for every width
constexpr int64_t kLeastBlock = 1 << 10, kMostBlock = 1 << 12;  // N of srht
constexpr int64_t kMostPieces = 32, kPieceRows = 2048;          // of the columns of x
constexpr int64_t kSlabBytes = int64_t{8} << 20;  // sums of the rows of x that are worked on together

template <class T>
T scale_of(int64_t count) {
  return static_cast<T>(1 / std::sqrt(static_cast<double>(count)));
}

// ---- sums of +-x_i, for kFeatures columns i at once

// The generic form: one column, whose sign is flipped.
template <class T>
struct Signed {
  using V = simd::Vec<T>;
  using I = typename simd::Types<T>::I;
  static constexpr int kFeatures = 1, kRows = 2, kVectors = 4;

  static V table(const T* x) { return simd::broadcast(x[0]); }
  static V look_up(V table, const uint8_t* index) {
    typedef uint8_t Bytes __attribute__((vector_size(simd::kWidth<T>)));
    Bytes bytes;
    std::memcpy(&bytes, index, sizeof(bytes));
    const I flip = __builtin_convertvector(bytes, I) << (8 * sizeof(T) - 1);
    return reinterpret_cast<V>(reinterpret_cast<I>(table) ^ flip);
  }
};

// value[i][l] = -1 where bit i of l is set, else 1.
template <class T, int kCount>
struct LaneSigns {
  alignas(64) T value[kCount][simd::kWidth<T>];
  constexpr LaneSigns() : value{} {
    for (int i = 0; i < kCount; ++i) {
      for (int l = 0; l < simd::kWidth<T>; ++l) value[i][l] = l >> i & 1 ? T(-1) : T(1);
    }
  }
};
template <class T, int kCount>
inline constexpr LaneSigns<T, kCount> kLaneSigns;

template <class T, int kCount>
simd::Vec<T> signed_sums(const T* x) {
  simd::Vec<T> sum = simd::broadcast(x[0]) * simd::load(kLaneSigns<T, kCount>.value[0]);
  for (int i = 1; i < kCount; ++i)
    sum = simd::fma<T>(simd::broadcast(x[i]), simd::load(kLaneSigns<T, kCount>.value[i]), sum);
  return sum;
}

#if defined(__AVX512F__)
template <>
struct Signed<float> {
  static constexpr int kFeatures = 4, kRows = 4, kVectors = 4;
  static simd::Vec<float> table(const float* x) { return signed_sums<float, 4>(x); }
  static simd::Vec<float> look_up(simd::Vec<float> table, const uint8_t* index) {
    const __m512i lanes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(index)));
    return (simd::Vec<float>)_mm512_permutexvar_ps(lanes, (__m512)table);
  }
};
template <>
struct Signed<double> {
  static constexpr int kFeatures = 3, kRows = 4, kVectors = 4;
  static simd::Vec<double> table(const double* x) { return signed_sums<double, 3>(x); }
  static simd::Vec<double> look_up(simd::Vec<double> table, const uint8_t* index) {
    const __m512i lanes = _mm512_cvtepu8_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(index)));
    return (simd::Vec<double>)_mm512_permutexvar_pd(lanes, (__m512d)table);
  }
};
#elif defined(__AVX2__)
template <>
struct Signed<float> {
  static constexpr int kFeatures = 3, kRows = 2, kVectors = 4;
  static simd::Vec<float> table(const float* x) { return signed_sums<float, 3>(x); }
  static simd::Vec<float> look_up(simd::Vec<float> table, const uint8_t* index) {
    const __m256i lanes = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(index)));
    return (simd::Vec<float>)_mm256_permutevar8x32_ps((__m256)table, lanes);
  }
};
#endif

#if !defined(__AVX2__)
// A byte's bits, one byte per bit, in the order of memory.
struct Spread {
  uint64_t bytes[256];
  constexpr Spread() : bytes{} {
    for (int value = 0; value < 256; ++value) {
      for (int bit = 0; bit < 8; ++bit) {
        const int place = __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__ ? bit : 7 - bit;
        bytes[value] |= static_cast<uint64_t>(value >> bit & 1) << (8 * place);
      }
    }
  }
};
inline constexpr Spread kSpread;
#endif

// index[c] |= weight where bit c is set, c < kBits.
inline void add_bits(const uint32_t* bits, uint8_t weight, uint8_t* index) {
#if defined(__AVX512F__)
  for (int half = 0; half < 2; ++half) {
    const uint64_t mask = bits[2 * half] | static_cast<uint64_t>(bits[2 * half + 1]) << 32;
    const __m512i old = _mm512_loadu_si512(index + 64 * half);
    _mm512_storeu_si512(index + 64 * half,
                        _mm512_or_si512(old, _mm512_maskz_set1_epi8(mask, static_cast<char>(weight))));
  }
#elif defined(__AVX2__)
  const __m256i spread = _mm256_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2,
                                          2, 3, 3, 3, 3, 3, 3, 3, 3);
  const __m256i which = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201u));
  const __m256i value = _mm256_set1_epi8(static_cast<char>(weight));
  for (int w = 0; w < 4; ++w) {
    const __m256i bytes = _mm256_shuffle_epi8(_mm256_set1_epi32(static_cast<int>(bits[w])), spread);
    const __m256i set = _mm256_cmpeq_epi8(_mm256_and_si256(bytes, which), which);
    __m256i* const place = reinterpret_cast<__m256i*>(index + 32 * w);
    _mm256_storeu_si256(place, _mm256_or_si256(_mm256_loadu_si256(place), _mm256_and_si256(set, value)));
  }
#else
  for (int byte = 0; byte < kBits / 8; ++byte) {
    uint64_t eight;
    std::memcpy(&eight, index + 8 * byte, sizeof(eight));
    eight |= kSpread.bytes[bits[byte / 4] >> (byte % 4 * 8) & 0xFF] * weight;
    std::memcpy(index + 8 * byte, &eight, sizeof(eight));
  }
#endif
}

// sum[l] += v[l].
template <class T>
void add_to(double* sum, simd::Vec<T> v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    const __m512 x = (__m512)v;
    _mm512_storeu_pd(sum, _mm512_add_pd(_mm512_loadu_pd(sum), _mm512_cvtps_pd(_mm512_castps512_ps256(x))));
    _mm512_storeu_pd(sum + 8,
                     _mm512_add_pd(_mm512_loadu_pd(sum + 8), _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1))));
    return;
  }
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4) {
    const __m256 x = (__m256)v;
    _mm256_storeu_pd(sum, _mm256_add_pd(_mm256_loadu_pd(sum), _mm256_cvtps_pd(_mm256_castps256_ps128(x))));
    _mm256_storeu_pd(sum + 4,
                     _mm256_add_pd(_mm256_loadu_pd(sum + 4), _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1))));
    return;
  }
#endif
  for (int l = 0; l < simd::kWidth<T>; ++l) sum[l] += static_cast<double>(v[l]);
}

// sum[r][c] += the products of kR rows' tables with the columns of the output from `index` on; `apart` bytes
// of it per group of columns of x, `stride` numbers of `sum` per row.
template <class T, int kR, int kC>
void add_looked_up(const simd::Vec<T>* tables, int64_t table_rows, int64_t groups, const uint8_t* index,
                   int64_t apart, double* sum, int64_t stride) {
  using V = simd::Vec<T>;
  constexpr int kW = simd::kWidth<T>;
  V total[kR][kC] = {};
  for (int64_t k = 0; k < groups; ++k) {
#pragma GCC unroll 4
    for (int c = 0; c < kC; ++c) {
#pragma GCC unroll 4
      for (int r = 0; r < kR; ++r)
        total[r][c] += Signed<T>::look_up(tables[k * table_rows + r], index + k * apart + c * kW);
    }
  }
  for (int r = 0; r < kR; ++r) {
    for (int c = 0; c < kC; ++c) add_to<T>(sum + r * stride + c * kW, total[r][c]);
  }
}

// sum[r][c] += x[r][i] p[i][c] over `count` columns of x; rows of x and of p are kApart and kWide numbers
// apart.
template <class T, int kR, int kC, int kApart, int kWide>
void add_product(const T* x, int64_t count, const T* p, double* sum, int64_t stride) {
  using V = simd::Vec<T>;
  constexpr int kW = simd::kWidth<T>;
  V total[kR][kC] = {};
  for (int64_t i = 0; i < count; ++i) {
    V value[kC];
#pragma GCC unroll 4
    for (int c = 0; c < kC; ++c) value[c] = simd::load(p + i * kWide + c * kW);
#pragma GCC unroll 16
    for (int r = 0; r < kR; ++r) {
      const V factor = simd::broadcast(x[r * kApart + i]);
#pragma GCC unroll 4
      for (int c = 0; c < kC; ++c) total[r][c] = simd::fma<T>(factor, value[c], total[r][c]);
    }
  }
  for (int r = 0; r < kR; ++r) {
    for (int c = 0; c < kC; ++c) add_to<T>(sum + r * stride + c * kW, total[r][c]);
  }
}

// ---- random numbers

// fn(row, words) for the rows [first, first + count), `words` being the four words of the row's block.
template <class Fn>
void for_words(const Projection& p, int64_t first, int64_t count, uint32_t block, Fn&& fn) {
  alignas(64) uint32_t word[4][simd::kPhiloxRows];
  for (int64_t i = 0; i < count; i += simd::kPhiloxRows) {
    simd::Words c[4];
    simd::philox_rows(p.seed, static_cast<uint64_t>(first + i), block, static_cast<uint32_t>(p.kind), c);
    for (int w = 0; w < 4; ++w) simd::store_low(c[w], word[w]);
    const int64_t here = std::min<int64_t>(simd::kPhiloxRows, count - i);
    for (int64_t r = 0; r < here; ++r) {
      const uint32_t words[4] = {word[0][r], word[1][r], word[2][r], word[3][r]};
      fn(i + r, words);
    }
  }
}

// out(row, k, value) for the normal numbers k < 4 of column block `block` of the rows [first, first + count).
template <class Out>
void for_normals(const Projection& p, int64_t first, int64_t count, uint32_t block, Out&& out) {
  for (int64_t i = 0; i < count; i += simd::kPhiloxRows) {
    simd::Words c[4];
    simd::philox_rows(p.seed, static_cast<uint64_t>(first + i), block, static_cast<uint32_t>(p.kind), c);
    alignas(64) float value[4][simd::kPhiloxRows];
    simd::normal_pairs(c[0], c[1], value[0], value[1]);
    simd::normal_pairs(c[2], c[3], value[2], value[3]);
    const int64_t here = std::min<int64_t>(simd::kPhiloxRows, count - i);
    for (int64_t r = 0; r < here; ++r) {
      for (int k = 0; k < 4; ++k) out(i + r, k, value[k][r]);
    }
  }
}

simd::NormalRows normal_rows(const Projection& p, int64_t column, int64_t columns) {
  return {p.seed, static_cast<uint32_t>(p.kind), column, columns};
}

// Takes the numbers of a row of NormalRows to an array.
struct StoreAt {
  float* to;
  template <class V>
  void operator()(int64_t column, V numbers) const {
    std::memcpy(to + column, &numbers, sizeof(numbers));
  }
};

// The entries of rows of sjlt.
class Sjlt {
 public:
  Sjlt(const Projection& p, int64_t dim) : p_(p), dim_(dim) {}

  // column[i], and sign[i] = 1 or -1, of entry e (even) of the rows [first, first + count), and of entry e +
  // 1 if there is one behind them, `apart` places on. Whole vectors are written.
  template <class T>
  void entries(int64_t e, int64_t first, int64_t count, int64_t apart, uint32_t* column, T* sign) const {
    for (int64_t i = 0; i < count; i += simd::kPhiloxRows)
      entries(e, consecutive(first + i), apart, column + i, sign + i);
  }

  // The same of the rows in the lanes of `row`.
  template <class T>
  void entries(int64_t e, simd::Words row, int64_t apart, uint32_t* column, T* sign) const {
    const int here = e + 1 < p_.nnz ? 2 : 1;
    simd::Words c[4];
    simd::philox_rows(p_.seed, row, static_cast<uint32_t>(e / 2), static_cast<uint32_t>(p_.kind), c);
    for (int k = 0; k < here; ++k) {
      const uint64_t begin = begin_of(e + k), width = begin_of(e + k + 1) - begin;
      const simd::Words place = (simd::multiply_low(c[2 * k], simd::Words{} + width) >> 32) + begin;
      simd::store_low(place, column + k * apart);
      store_signs(c[2 * k + 1], sign + k * apart);
    }
  }

 private:
  static simd::Words consecutive(int64_t first) {
    simd::Words row;
    for (int r = 0; r < simd::kPhiloxRows; ++r)
      row[r] = static_cast<uint64_t>(first) + static_cast<uint64_t>(r);
    return row;
  }

  uint64_t begin_of(int64_t e) const {
    return static_cast<uint64_t>(static_cast<unsigned __int128>(e) * static_cast<uint64_t>(dim_) /
                                 static_cast<uint64_t>(p_.nnz));
  }

  // The bits of 1, or of -1 if the lowest bit of a word is set.
  static void store_signs(simd::Words words, float* sign) {
    uint32_t bits[simd::kPhiloxRows];
    simd::store_low(((words & (simd::Words{} + 1)) << 31) | (simd::Words{} + 0x3F800000u), bits);
    std::memcpy(sign, bits, sizeof(bits));
  }
  static void store_signs(simd::Words words, double* sign) {
    const simd::Words bits = (words << 63) | (simd::Words{} + 0x3FF0000000000000u);
    std::memcpy(sign, &bits, sizeof(bits));
  }

  const Projection& p_;
  const int64_t dim_;
};

// Signs and chosen columns of the blocks of srht.
class Srht {
 public:
  Srht(const Projection& p, int64_t dim) : p_(p), dim_(dim), size_(kLeastBlock) {
    while (size_ < dim && size_ < kMostBlock) size_ *= 2;
  }

  int64_t size() const { return size_; }

  // The signs' bits of `count` rows from `first`, a multiple of kBits.
  void signs(int64_t first, int64_t count, uint32_t* bits) const {
    for_words(p_, first / kBits, (count + kBits - 1) / kBits, 0,
              [&](int64_t row, const uint32_t* words) { std::copy(words, words + 4, bits + 4 * row); });
  }

  // The columns [dim] of the Hadamard matrix that make the outputs of a block.
  void columns(int64_t block, int32_t* out) const {
    for (int64_t c = 0; c < dim_; c += 4) {
      const auto words =
          philox4x32({static_cast<uint32_t>(block), static_cast<uint32_t>(static_cast<uint64_t>(block) >> 32),
                      static_cast<uint32_t>(1 + c / 4), static_cast<uint32_t>(p_.kind)},
                     {static_cast<uint32_t>(p_.seed), static_cast<uint32_t>(p_.seed >> 32)});
      for (int64_t k = c; k < std::min(c + 4, dim_); ++k) {
        const int64_t from = dim_ <= size_ ? k * size_ / dim_ : 0;
        const int64_t to = dim_ <= size_ ? (k + 1) * size_ / dim_ : size_;
        out[k] = static_cast<int32_t>(
            from + static_cast<int64_t>(words[k - c] * static_cast<uint64_t>(to - from) >> 32));
      }
    }
  }

 private:
  const Projection& p_;
  const int64_t dim_;
  int64_t size_;
};

// Lane l ^ h of v in lane l.
template <class T>
simd::Vec<T> exchanged(simd::Vec<T> v, int h) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return (simd::Vec<T>)_mm512_permutexvar_ps(_mm512_xor_si512(lanes, _mm512_set1_epi32(h)), (__m512)v);
  } else {
    const __m512i lanes = _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7);
    return (simd::Vec<T>)_mm512_permutexvar_pd(_mm512_xor_si512(lanes, _mm512_set1_epi64(h)), (__m512d)v);
  }
#else
#if defined(__AVX2__)
  if constexpr (sizeof(T) == 4) {
    const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return (simd::Vec<T>)_mm256_permutevar8x32_ps((__m256)v, _mm256_xor_si256(lanes, _mm256_set1_epi32(h)));
  }
#endif
  simd::Vec<T> result;
  for (int l = 0; l < simd::kWidth<T>; ++l) result[l] = v[l ^ h];
  return result;
#endif
}

// v[i] = the sum over l of v[l] (-1)^popcount(i & l), in place, size a power of two of at least 64.
template <class T>
void hadamard(T* v, int64_t size) {
  using V = simd::Vec<T>;
  constexpr int kW = simd::kWidth<T>;
  for (int64_t begin = 0; begin < size; begin += kW) {
    V x = simd::load(v + begin);
    constexpr int kStages = kW == 16 ? 4 : kW == 8 ? 3 : kW == 4 ? 2 : 1;
    for (int stage = 0; stage < kStages; ++stage)
      x = simd::fma<T>(x, simd::load(kLaneSigns<T, kStages>.value[stage]), exchanged<T>(x, 1 << stage));
    simd::store(v + begin, x);
  }
  int64_t h = kW;
  for (; 4 * h <= size; h *= 4) {
    for (int64_t begin = 0; begin < size; begin += 4 * h) {
      for (int64_t i = begin; i < begin + h; i += kW) {
        const V a = simd::load(v + i), b = simd::load(v + i + h), c = simd::load(v + i + 2 * h),
                d = simd::load(v + i + 3 * h);
        const V e = a + b, f = a - b, g = c + d, k = c - d;
        simd::store(v + i, e + g);
        simd::store(v + i + h, f + k);
        simd::store(v + i + 2 * h, e - g);
        simd::store(v + i + 3 * h, f - k);
      }
    }
  }
  for (; h < size; h *= 2) {
    for (int64_t begin = 0; begin < size; begin += 2 * h) {
      for (int64_t i = begin; i < begin + h; i += kW) {
        const V a = simd::load(v + i), b = simd::load(v + i + h);
        simd::store(v + i, a + b);
        simd::store(v + i + h, a - b);
      }
    }
  }
}

#if defined(__AVX512F__)
// Lane i of v[j] and lane j of v[i] change places: a bit of the two numbers at a time.
template <class V, int kW>
void transpose(V (&v)[kW]) {
#pragma GCC unroll 4
  for (int h = 1; h < kW; h *= 2) {
    // Lanes of the first vector are numbered from 0, of the second from kW.
    if constexpr (kW == 16) {
      const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
      const __m512i turned = _mm512_xor_si512(lane, _mm512_set1_epi32(h)), behind = _mm512_set1_epi32(kW);
      const __mmask16 high = _mm512_test_epi32_mask(lane, _mm512_set1_epi32(h));
      const __m512i even = _mm512_mask_blend_epi32(high, lane, _mm512_add_epi32(turned, behind));
      const __m512i odd = _mm512_mask_blend_epi32(high, turned, _mm512_add_epi32(lane, behind));
#pragma GCC unroll 16
      for (int i = 0; i < kW; ++i) {
        if ((i & h) != 0) continue;
        const __m512 a = (__m512)v[i], b = (__m512)v[i + h];
        v[i] = (V)_mm512_permutex2var_ps(a, even, b);
        v[i + h] = (V)_mm512_permutex2var_ps(a, odd, b);
      }
    } else {
      const __m512i lane = _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7);
      const __m512i turned = _mm512_xor_si512(lane, _mm512_set1_epi64(h)), behind = _mm512_set1_epi64(kW);
      const __mmask8 high = _mm512_test_epi64_mask(lane, _mm512_set1_epi64(h));
      const __m512i even = _mm512_mask_blend_epi64(high, lane, _mm512_add_epi64(turned, behind));
      const __m512i odd = _mm512_mask_blend_epi64(high, turned, _mm512_add_epi64(lane, behind));
#pragma GCC unroll 8
      for (int i = 0; i < kW; ++i) {
        if ((i & h) != 0) continue;
        const __m512d a = (__m512d)v[i], b = (__m512d)v[i + h];
        v[i] = (V)_mm512_permutex2var_pd(a, even, b);
        v[i + h] = (V)_mm512_permutex2var_pd(a, odd, b);
      }
    }
  }
}
#elif defined(__AVX2__)
// Lane i of v[j] and lane j of v[i] change places.
inline void transpose(simd::Vec<float> (&v)[8]) {
  __m256 pairs[8], fours[8];
  for (int i = 0; i < 8; i += 2) {
    pairs[i] = _mm256_unpacklo_ps((__m256)v[i], (__m256)v[i + 1]);
    pairs[i + 1] = _mm256_unpackhi_ps((__m256)v[i], (__m256)v[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    for (int k = 0; k < 2; ++k) {
      fours[i + 2 * k] = _mm256_shuffle_ps(pairs[i + k], pairs[i + k + 2], 0x44);
      fours[i + 2 * k + 1] = _mm256_shuffle_ps(pairs[i + k], pairs[i + k + 2], 0xEE);
    }
  }
  for (int i = 0; i < 4; ++i) {
    v[i] = (simd::Vec<float>)_mm256_permute2f128_ps(fours[i], fours[i + 4], 0x20);
    v[i + 4] = (simd::Vec<float>)_mm256_permute2f128_ps(fours[i], fours[i + 4], 0x31);
  }
}

inline void transpose(simd::Vec<double> (&v)[4]) {
  __m256d pairs[4];
  for (int i = 0; i < 4; i += 2) {
    pairs[i] = _mm256_unpacklo_pd((__m256d)v[i], (__m256d)v[i + 1]);
    pairs[i + 1] = _mm256_unpackhi_pd((__m256d)v[i], (__m256d)v[i + 1]);
  }
  for (int i = 0; i < 2; ++i) {
    v[i] = (simd::Vec<double>)_mm256_permute2f128_pd(pairs[i], pairs[i + 2], 0x20);
    v[i + 2] = (simd::Vec<double>)_mm256_permute2f128_pd(pairs[i], pairs[i + 2], 0x31);
  }
}
#endif

// ---- rows that are mostly zeros

// Adds single entries of a long row to its sketch: lanes of a vector hold entries, and each makes the row of
// the matrix that it needs.
template <class T>
class EntrySums {
 public:
  static constexpr int kEntries = simd::kPhiloxRows;

  EntrySums(const Projection& p, int64_t dim) : p_(p), dim_(dim), sjlt_(p, dim), srht_(p, dim) {
    if (p.kind == SketchKind::kSrht) chosen_.resize(static_cast<size_t>(dim));
  }

  // sum [dim] += the products of values[r] with the rows row[r] of the matrix, r < count <= kEntries.
  void add(const int64_t* row, const T* values, int count, double* sum) {
    simd::Words lanes = {};
    for (int r = 0; r < count; ++r) lanes[r] = static_cast<uint64_t>(row[r]);
    switch (p_.kind) {
      case SketchKind::kRademacher:
        return signs(lanes, values, count, sum);
      case SketchKind::kGaussian:
        return normals(row, values, count, sum);
      case SketchKind::kGaussianBoxMuller:
        return box_muller(lanes, values, count, sum);
      case SketchKind::kSjlt:
        return sparse(lanes, values, count, sum);
      case SketchKind::kSrht:
        for (int r = 0; r < count; ++r) transformed(row[r], values[r], sum);
    }
  }

 private:
  void words(simd::Words row, int64_t block, uint32_t (&word)[4][kEntries]) const {
    simd::Words c[4];
    simd::philox_rows(p_.seed, row, static_cast<uint32_t>(block), static_cast<uint32_t>(p_.kind), c);
    for (int w = 0; w < 4; ++w) simd::store_low(c[w], word[w]);
  }

  void signs(simd::Words row, const T* values, int count, double* sum) const {
    alignas(64) uint32_t word[4][kEntries];
    for (int64_t first = 0; first < dim_; first += kBits) {
      words(row, first / kBits, word);
      for (int r = 0; r < count; ++r) {
        const double both[2] = {static_cast<double>(values[r]), -static_cast<double>(values[r])};
        for (int w = 0; w < 4; ++w) {
          double* const to = sum + first + 32 * w;
          const int here = static_cast<int>(std::clamp<int64_t>(dim_ - first - 32 * w, 0, 32));
          for (int k = 0; k < here; ++k) to[k] += both[word[w][r] >> k & 1];
        }
      }
    }
  }

  void normals(const int64_t* row, const T* values, int count, double* sum) const {
    float number[simd::NormalRows::kMost];
    for (int64_t first = 0; first < dim_; first += simd::NormalRows::kMost) {
      const int64_t here = std::min(simd::NormalRows::kMost, dim_ - first);
      auto normal = normal_rows(p_, first, here);
      for (int r = 0; r < count; ++r) {
        normal.row(static_cast<uint64_t>(row[r]), StoreAt{number});
        const double value = static_cast<double>(values[r]);
        for (int64_t c = 0; c < here; ++c) sum[first + c] += value * static_cast<double>(number[c]);
      }
    }
  }

  void box_muller(simd::Words row, const T* values, int count, double* sum) const {
    for (int64_t first = 0; first < dim_; first += 4) {
      simd::Words c[4];
      simd::philox_rows(p_.seed, row, static_cast<uint32_t>(first / 4), static_cast<uint32_t>(p_.kind), c);
      alignas(64) float number[4][kEntries];
      simd::normal_pairs(c[0], c[1], number[0], number[1]);
      simd::normal_pairs(c[2], c[3], number[2], number[3]);
      for (int64_t k = 0; k < std::min<int64_t>(4, dim_ - first); ++k) {
        for (int r = 0; r < count; ++r)
          sum[first + k] += static_cast<double>(values[r]) * static_cast<double>(number[k][r]);
      }
    }
  }

  void sparse(simd::Words row, const T* values, int count, double* sum) const {
    uint32_t column[2 * kEntries];
    T sign[2 * kEntries];
    for (int64_t e = 0; e < p_.nnz; ++e) {
      if (e % 2 == 0) sjlt_.entries(e, row, kEntries, column, sign);
      const int64_t from = e % 2 * kEntries;
      for (int r = 0; r < count; ++r)
        sum[column[from + r]] += static_cast<double>(values[r] * sign[from + r]);
    }
  }

  void transformed(int64_t row, T value, double* sum) {
    const int64_t number = row / srht_.size(), place = row % srht_.size();
    if (number != drawn_) srht_.columns(number, chosen_.data());
    drawn_ = number;
    uint32_t bits[4];
    srht_.signs(row / kBits * kBits, kBits, bits);
    const uint32_t own = bits[row % kBits / 32] >> (row % 32) & 1;
    const double both[2] = {static_cast<double>(value), -static_cast<double>(value)};
    for (int64_t c = 0; c < dim_; ++c) {
      const auto shared = static_cast<uint32_t>(chosen_[c]) & static_cast<uint32_t>(place);
      sum[c] += both[(static_cast<uint32_t>(__builtin_popcount(shared)) ^ own) & 1];
    }
  }

  const Projection& p_;
  const int64_t dim_;
  const Sjlt sjlt_;
  const Srht srht_;
  std::vector<int32_t> chosen_;
  int64_t drawn_ = -1;
};

// ---- the pieces of work

// Rows of x that are worked on together, and the pieces that its columns and those of the output are cut
// into. The cuts depend on D, dim and the offset alone.
template <class T>
class Sketcher {
 public:
  Sketcher(TensorView<const T, 2> x, const Projection& p, TensorView<T, 2> out, ThreadTeam& team)
      : x_(x), p_(p), out_(out), team_(team), dim_(out.shape[1]), sjlt_(p, dim_), srht_(p, dim_) {}

  void run() {
    const bool dense = this->dense();
    const int64_t width = this->width();
    const int64_t columns = x_.shape[1];
    // Fewer if making a piece costs little beside adding its sums up.
    const int64_t most = std::clamp((dense ? kMostPieces : kMostPieces / 4) * kPieceColumns / dim_,
                                    int64_t{1}, dense ? kMostPieces : kMostPieces / 4);
    pieces_ = std::clamp(columns / kPieceRows, int64_t{1}, most);
    piece_ = round_up((columns + pieces_ - 1) / pieces_, dense ? kBlock : kMostBlock);
    pieces_ = (columns + piece_ - 1) / piece_;
    const int64_t across = (dim_ + width - 1) / width;
    const int64_t each = dense ? 256 : 32;
    const int64_t slab =
        std::clamp(kSlabBytes / 8 / dim_ / pieces_, int64_t{4}, each * (dense ? 1 : team_.size()));
    partial_ = Buffer<double>(pieces_ * std::min(slab, x_.shape[0]) * dim_);
    for (int64_t first = 0; first < x_.shape[0]; first += slab) {
      const int64_t rows = std::min(slab, x_.shape[0] - first);
      // Rows are given to several threads only if there are not pieces enough, since each thread makes the
      // random numbers anew.
      const bool split = !dense && pieces_ < 4 * team_.size() &&
                         saturated_mul(saturated_mul(rows, columns), p_.nnz) >= ThreadTeam::kWorthwhile;
      const int64_t part =
          split ? std::min(each, (rows + team_.size() - 1) / team_.size()) : std::min(each, rows);
      const int64_t parts = (rows + part - 1) / part;
      team_.parallel_for(pieces_ * across * parts, 1, [&](int, int64_t item, int64_t) {
        const int64_t piece = item / (across * parts), column = item / parts % across * width;
        const int64_t row = item % parts * part;
        work(first + row, std::min(part, rows - row), piece, column, std::min(width, dim_ - column),
             partial_.data() + (piece * rows + row) * dim_ + column);
      });
      combine(first, rows);
    }
  }

  // sum [dim] of one row, not scaled.
  void row(int64_t number, double* sum) {
    piece_ = x_.shape[1];
    for (int64_t column = 0; column < dim_; column += width())
      work(number, 1, 0, column, std::min(width(), dim_ - column), sum + column);
  }

  double scale() const {
    return static_cast<double>(scale_of<T>(p_.kind == SketchKind::kSjlt ? p_.nnz : dim_));
  }

 private:
  bool dense() const { return p_.kind != SketchKind::kSjlt && p_.kind != SketchKind::kSrht; }
  // Columns of the output that a piece of work makes; each makes the random numbers of sparse kinds anew.
  int64_t width() const {
    if (!dense()) return dim_;
    return std::min(dim_, p_.kind == SketchKind::kRademacher ? kPieceColumns : kNormalColumns);
  }

  // sum [rows, columns of the output], rows dim_ apart, of one piece of the columns of x.
  void work(int64_t row, int64_t rows, int64_t piece, int64_t column, int64_t columns, double* sum) {
    const int64_t begin = piece * piece_, end = std::min(x_.shape[1], begin + piece_);
    for (int64_t r = 0; r < rows; ++r) std::fill(sum + r * dim_, sum + r * dim_ + columns, 0.0);
    switch (p_.kind) {
      case SketchKind::kRademacher:
        return rademacher(row, rows, begin, end, column, columns, sum);
      case SketchKind::kGaussian:
      case SketchKind::kGaussianBoxMuller:
        return gaussian(row, rows, begin, end, column, columns, sum);
      case SketchKind::kSjlt:
        return sjlt(row, rows, begin, end, sum);
      case SketchKind::kSrht:
        return srht(row, rows, begin, end, sum);
    }
  }

  void combine(int64_t first, int64_t rows) {
    const double factor = scale();
    team_.parallel_for(rows, 8, [&](int, int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        double* const sum = partial_.data() + r * dim_;
        for (int64_t piece = 1; piece < pieces_; ++piece) {
          const double* const more = partial_.data() + (piece * rows + r) * dim_;
          for (int64_t c = 0; c < dim_; ++c) sum[c] += more[c];
        }
        T* const out = out_.row(first + r);
        for (int64_t c = 0; c < dim_; ++c) out[c] = static_cast<T>(sum[c] * factor);
      }
    });
  }

  T at(int64_t row, int64_t column) const { return x_.data[row * x_.stride[0] + column * x_.stride[1]]; }

  // fn(first, kR as a constant) over rows in groups of kRows, then one by one.
  template <int kRows, class Fn>
  static void for_rows(int64_t rows, Fn&& fn) {
    int64_t r = 0;
    for (; r + kRows <= rows; r += kRows) fn(r, std::integral_constant<int, kRows>{});
    for (; r < rows; ++r) fn(r, std::integral_constant<int, 1>{});
  }

  // fn(column, kC as a constant) over the output's columns, some vectors at a time; `columns` is a multiple
  // of a vector.
  template <int kVectors, class Fn>
  static void for_vectors(int64_t columns, Fn&& fn) {
    constexpr int kW = simd::kWidth<T>;
    int64_t c = 0;
    for (; c + kVectors * kW <= columns; c += kVectors * kW) fn(c, std::integral_constant<int, kVectors>{});
    for (; c < columns; c += kW) fn(c, std::integral_constant<int, 1>{});
  }

  void rademacher(int64_t row, int64_t rows, int64_t begin, int64_t end, int64_t column, int64_t columns,
                  double* sum) {
    using S = Signed<T>;
    constexpr int kF = S::kFeatures, kR = S::kRows;
    constexpr int64_t kGroups = kBlock / kF;
    // Whole random blocks, and with them whole vectors.
    const int64_t wide = round_up(columns, kBits), apart = wide, vectors = round_up(columns, simd::kWidth<T>);
    Buffer<uint8_t> index(kGroups * apart);
    Buffer<double> room(vectors == columns && dim_ >= vectors ? 0 : rows * vectors, 0.0);
    double* const to = room.size() > 0 ? room.data() : sum;
    const int64_t stride = room.size() > 0 ? vectors : dim_;
    alignas(64) simd::Vec<T> tables[kGroups * kR];
    for (int64_t first = begin; first < end; first += kBlock) {
      const int64_t count = std::min(kBlock, end - first), groups = (count + kF - 1) / kF;
      std::fill(index.data(), index.data() + groups * apart, uint8_t{0});
      for (int64_t block = 0; block < wide / kBits; ++block) {
        for_words(p_, p_.offset + first, count, static_cast<uint32_t>(column / kBits + block),
                  [&](int64_t i, const uint32_t* words) {
                    add_bits(words, static_cast<uint8_t>(1 << (i % kF)),
                             index.data() + i / kF * apart + block * kBits);
                  });
      }
      for_rows<kR>(rows, [&](int64_t r, auto together) {
        constexpr int kHere = decltype(together)::value;
        for (int64_t k = 0; k < groups; ++k) {
          for (int t = 0; t < kHere; ++t) {
            T part[kF];
            for (int i = 0; i < kF; ++i)
              part[i] = k * kF + i < count ? at(row + r + t, first + k * kF + i) : T(0);
            tables[k * kHere + t] = S::table(part);
          }
        }
        for_vectors<S::kVectors>(vectors, [&](int64_t c, auto many) {
          add_looked_up<T, kHere, decltype(many)::value>(tables, kHere, groups, index.data() + c, apart,
                                                         to + r * stride + c, stride);
        });
      });
    }
    copy_out(room, rows, vectors, columns, sum);
  }

  static constexpr int kStripVectors = 2;
  static constexpr int64_t kStrip = kStripVectors * simd::kWidth<T>;  // outputs
  // Numbers between two strips: a row more than they have, or the same row of all would lie in one set of the
  // first-level cache.
  static constexpr int64_t kStripSize = (kBlock + 1) * kStrip;

  void gaussian(int64_t row, int64_t rows, int64_t begin, int64_t end, int64_t column, int64_t columns,
                double* sum) {
    const int64_t vectors = round_up(columns, simd::kWidth<T>);
    // As many strips as whole steps of NormalRows fill.
    Buffer<T> matrix(round_up(columns, std::max(kStrip, simd::NormalRows::kStep)) / kStrip * kStripSize);
    Buffer<T> packed(rows * kBlock);
    // [strips, rows, kStrip], so that the sums of a tile lie together: rows of the output are often powers of
    // two apart, where stores hold up loads.
    Buffer<double> sums(round_up(columns, kStrip) * rows, 0.0);
    auto normal = normal_rows(p_, column, columns);
    for (int64_t first = begin; first < end; first += kBlock) {
      const int64_t count = std::min(kBlock, end - first);
      if (p_.kind == SketchKind::kGaussian) {
        for (int64_t i = 0; i < count; ++i)
          normal.row(static_cast<uint64_t>(p_.offset + first + i), StoreInStrips{matrix.data() + i * kStrip});
      } else {
        for (int64_t c = 0; c < vectors; c += 4) {
          T* const strip = matrix.data() + c / kStrip * kStripSize + c % kStrip;
          const int64_t here = std::min<int64_t>(4, kStrip - c % kStrip);
          for_normals(p_, p_.offset + first, count, static_cast<uint32_t>((column + c) / 4),
                      [&](int64_t i, int k, float value) {
                        if (k < here) strip[i * kStrip + k] = static_cast<T>(value);
                      });
        }
      }
      for (int64_t r = 0; r < rows; ++r) copy(row + r, first, count, packed.data() + r * kBlock);
      const int64_t groups = (rows + simd::kTileRows - 1) / simd::kTileRows;
      for_vectors<kStripVectors>(vectors, [&](int64_t c, auto many) {
        for (int64_t g = 0; g < groups; ++g) {
          // As even as possible, because a tile with few rows waits for its sums.
          const int64_t r = rows * g / groups;
          with_constant<simd::kTileRows>(rows * (g + 1) / groups - r, [&](auto together) {
            add_product<T, decltype(together)::value, decltype(many)::value, kBlock, kStrip>(
                packed.data() + r * kBlock, count, matrix.data() + c / kStrip * kStripSize,
                sums.data() + c * rows + r * kStrip, kStrip);
          });
        }
      });
    }
    for (int64_t c = 0; c < columns; c += kStrip) {
      for (int64_t r = 0; r < rows; ++r) {
        const double* const from = sums.data() + c * rows + r * kStrip;
        std::copy_n(from, std::min(kStrip, columns - c), sum + r * dim_ + c);
      }
    }
  }

  // Takes the numbers of a row of NormalRows to strips of the matrix.
  struct StoreInStrips {
    T* to;  // the row's place in the first strip
    template <class V>
    void operator()(int64_t column, V numbers) const {
      constexpr int kNumbers = sizeof(V) / sizeof(float);
      typedef T Converted __attribute__((vector_size(kNumbers * sizeof(T))));
      const Converted converted = __builtin_convertvector(numbers, Converted);
      // A vector of numbers may be wider than a strip, or a part of one.
      constexpr int64_t kPart = std::min<int64_t>(kNumbers, kStrip);
      for (int64_t part = 0; part < kNumbers; part += kPart) {
        const int64_t c = column + part;
        std::memcpy(to + c / kStrip * kStripSize + c % kStrip, reinterpret_cast<const T*>(&converted) + part,
                    kPart * sizeof(T));
      }
    }
  };

  // fn(count as a constant), 1 <= count <= kMost.
  template <int kMost, class Fn>
  static void with_constant(int64_t count, Fn&& fn) {
    if constexpr (kMost > 1) {
      if (count < kMost) return with_constant<kMost - 1>(count, fn);
    }
    fn(std::integral_constant<int, kMost>{});
  }

  // Sums of whole vectors of columns, if these reach beyond the output's columns.
  void copy_out(const Buffer<double>& room, int64_t rows, int64_t vectors, int64_t columns,
                double* sum) const {
    if (room.size() == 0) return;
    for (int64_t r = 0; r < rows; ++r)
      std::copy(room.data() + r * vectors, room.data() + r * vectors + columns, sum + r * dim_);
  }

  // Sums are taken in the type of x over kSparseRows columns of it, or more for a long output, so that adding
  // them up costs little; a vector of rows at a time, one row per lane, or single rows by the same additions.
  void sjlt(int64_t row, int64_t rows, int64_t begin, int64_t end, double* sum) {
    constexpr int kW = simd::kWidth<T>;
    const int64_t together = rows >= kW / 2 ? kW : 1;
    const int64_t until_flush = std::max(kSparseRows, round_up(8 * dim_, kSparseRows));
    Buffer<uint32_t> column(kSparseRows * p_.nnz);
    Buffer<T> sign(kSparseRows * p_.nnz), sums(round_up(rows, together) * dim_, T(0));
    for (int64_t first = begin; first < end; first += kSparseRows) {
      const int64_t count = std::min(kSparseRows, end - first);
      for (int64_t e = 0; e < p_.nnz; e += 2) {
        sjlt_.entries(e, p_.offset + first, count, kSparseRows, column.data() + e * kSparseRows,
                      sign.data() + e * kSparseRows);
      }
      for (int64_t r = 0; r < rows; r += together) {
        T* const own = sums.data() + r * dim_;
        if (together == 1) {
          const T* const x = x_.data + (row + r) * x_.stride[0] + first * x_.stride[1];
          for (int64_t e = 0; e < p_.nnz; ++e) {
            for (int64_t i = 0; i < count; ++i) {
              const int64_t at = e * kSparseRows + i;
              own[column[at]] += x[i * x_.stride[1]] * sign[at];
            }
          }
          continue;
        }
        const int64_t here = std::min<int64_t>(kW, rows - r);
        for (int64_t i = 0; i < count; i += kW) {
          simd::Vec<T> values[kW];
          const int64_t several = std::min<int64_t>(kW, count - i);
          columns_of(row + r, here, first + i, several, values);
          for (int64_t e = 0; e < p_.nnz; ++e) {
            for (int64_t j = 0; j < several; ++j) {
              const int64_t at = e * kSparseRows + i + j;
              T* const to = own + column[at] * kW;
              simd::store(to, simd::load(to) + values[j] * simd::broadcast(sign[at]));
            }
          }
        }
      }
      if (first + count == end || (first + count - begin) % until_flush == 0) {
        for (int64_t r = 0; r < rows; r += together)
          flush(sums.data() + r * dim_, together, std::min(together, rows - r), sum + r * dim_);
        std::fill(sums.data(), sums.data() + sums.size(), T(0));
      }
    }
  }

  // sum[r][c] += own[c][r], where own has `together` numbers per column of the output, for rows r < rows.
  void flush(const T* own, int64_t together, int64_t rows, double* sum) const {
    int64_t c = 0;
#if defined(__AVX2__)
    constexpr int kW = simd::kWidth<T>;
    for (; together == kW && c + kW <= dim_; c += kW) {
      simd::Vec<T> v[kW];
      for (int i = 0; i < kW; ++i) v[i] = simd::load(own + (c + i) * kW);
      transpose(v);
      for (int64_t r = 0; r < rows; ++r) add_to<T>(sum + r * dim_ + c, v[r]);
    }
#endif
    for (; c < dim_; ++c) {
      for (int64_t r = 0; r < rows; ++r) sum[r * dim_ + c] += static_cast<double>(own[c * together + r]);
    }
  }

  // out[i] = x[row][first + i].
  void copy(int64_t row, int64_t first, int64_t count, T* out) const {
    if (x_.stride[1] == 1) {
      std::copy_n(x_.row(row) + first, count, out);
      return;
    }
    for (int64_t i = 0; i < count; ++i) out[i] = at(row, first + i);
  }

  // v[i][r] = x[row + r][first + i], r < rows, i < count, both at most the width of a vector; other lanes are
  // 0 or hold nothing.
  void columns_of(int64_t row, int64_t rows, int64_t first, int64_t count,
                  simd::Vec<T> (&v)[simd::kWidth<T>]) const {
    constexpr int kW = simd::kWidth<T>;
#if defined(__AVX2__)
    if (rows == kW && count == kW && x_.stride[1] == 1) {
      for (int r = 0; r < kW; ++r) v[r] = simd::load(x_.row(row + r) + first);
      transpose(v);
      return;
    }
#endif
    T lanes[kW][kW] = {};
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t i = 0; i < count; ++i) lanes[i][r] = at(row + r, first + i);
    }
    for (int i = 0; i < kW; ++i) v[i] = simd::load(lanes[i]);
  }

  // v[i] = -v[i] where bit i is set, for a multiple of 32 numbers.
  static void flip(const uint32_t* bits, int64_t size, T* v) {
    using I = typename simd::Types<T>::I;
    using S = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
    constexpr int kW = simd::kWidth<T>, kSignBit = 8 * sizeof(T) - 1;
    I places;
    for (int l = 0; l < kW; ++l) places[l] = kSignBit - l;
    const I sign = I{} + std::numeric_limits<S>::min();
    for (int64_t i = 0; i < size; i += kW) {
      const I flips = ((I{} + static_cast<S>(bits[i / 32] >> (i % 32))) << places) & sign;
      simd::store(v + i, reinterpret_cast<simd::Vec<T>>(reinterpret_cast<I>(simd::load(v + i)) ^ flips));
    }
  }

  void srht(int64_t row, int64_t rows, int64_t begin, int64_t end, double* sum) {
    const int64_t size = srht_.size();
    Buffer<T> block(size);
    Buffer<uint32_t> bits(size / 32);
    Buffer<int32_t> chosen(dim_);
    int64_t first = begin;
    while (first < end) {
      const int64_t number = (p_.offset + first) / size, from = (p_.offset + first) % size;
      const int64_t count = std::min(size - from, end - first);
      srht_.signs(number * size, size, bits.data());
      srht_.columns(number, chosen.data());
      for (int64_t r = 0; r < rows; ++r) {
        if (count < size) std::fill(block.data(), block.data() + size, T(0));
        copy(row + r, first, count, block.data() + from);
        flip(bits.data(), size, block.data());
        hadamard(block.data(), size);
        double* const own = sum + r * dim_;
        for (int64_t c = 0; c < dim_; ++c) own[c] += static_cast<double>(block[chosen[c]]);
      }
      first += count;
    }
  }

  static constexpr int64_t kSparseRows = 512;  // columns of x whose entries are made together

  const TensorView<const T, 2> x_;
  const Projection& p_;
  const TensorView<T, 2> out_;
  ThreadTeam& team_;
  const int64_t dim_;
  const Sjlt sjlt_;
  const Srht srht_;
  int64_t pieces_ = 1, piece_ = 0;
  Buffer<double> partial_;  // [pieces, rows of the slab, dim]
};

}  // namespace

template <class T>
void sketch(TensorView<const T, 2> x, const Projection& projection, TensorView<T, 2> out, ThreadTeam& team) {
  if (x.shape[0] == 0) return;
  if (x.shape[1] == 0) {
    for (int64_t r = 0; r < x.shape[0]; ++r) std::fill_n(out.row(r), out.shape[1], T(0));
    return;
  }
  Sketcher<T>(x, projection, out, team).run();
}

template <class T>
void sketch_rows(TensorView<const int64_t, 2> indices, TensorView<const T, 3> g, const Projection& projection,
                 TensorView<T, 2> out, ThreadTeam& team) {
  const int64_t width = g.shape[2], dim = out.shape[1];
  team.parallel_for(g.shape[0], 1, [&](int, int64_t b, int64_t) {
    const TensorView<const T, 2> rows{
        g.data + b * g.stride[0], {g.shape[1], width}, {g.stride[1], g.stride[2]}};
    ThreadTeam alone(1);
    Buffer<double> total(dim, 0.0), one(dim);
    double scale = 0;
    for (int64_t t = 0; t < rows.shape[0]; ++t) {
      Projection own = projection;
      own.offset += indices(b, t) * width;
      Sketcher<T> sketcher(rows, own, out, alone);
      sketcher.row(t, one.data());
      scale = sketcher.scale();
      for (int64_t c = 0; c < dim; ++c) total[c] += one[c];
    }
    T* const to = out.row(b);
    for (int64_t c = 0; c < dim; ++c) to[c] += static_cast<T>(total[c] * scale);
  });
}

template <class T>
void sketch_csr(const CsrRows<T>& x, const Projection& projection, TensorView<T, 2> out, ThreadTeam& team) {
  const int64_t dim = out.shape[1];
  const auto scale =
      static_cast<double>(scale_of<T>(projection.kind == SketchKind::kSjlt ? projection.nnz : dim));
  constexpr int kEntries = EntrySums<T>::kEntries;
  team.parallel_for(out.shape[0], 1, [&](int, int64_t begin, int64_t end) {
    EntrySums<T> entries(projection, dim);
    Buffer<double> sum(dim);
    for (int64_t b = begin; b < end; ++b) {
      std::fill(sum.data(), sum.data() + dim, 0.0);
      const int64_t last = x.crow(b + 1);
      for (int64_t first = x.crow(b); first < last; first += kEntries) {
        int64_t row[kEntries];
        T values[kEntries];
        const int count = static_cast<int>(std::min<int64_t>(kEntries, last - first));
        for (int r = 0; r < count; ++r) {
          row[r] = projection.offset + x.col(first + r);
          values[r] = x.values(first + r);
        }
        entries.add(row, values, count, sum.data());
      }
      T* const to = out.row(b);
      for (int64_t c = 0; c < dim; ++c) to[c] = static_cast<T>(sum[c] * scale);
    }
  });
}

template <class T>
void projection_matrix(const Projection& p, TensorView<T, 2> out, ThreadTeam& team) {
  const int64_t dim = out.shape[1];
  const T scale = scale_of<T>(p.kind == SketchKind::kSjlt ? p.nnz : dim);
  const Sjlt sjlt(p, dim);
  const Srht srht(p, dim);
  team.parallel_for(out.shape[0], 64, [&](int, int64_t begin, int64_t end) {
    const int64_t first = p.offset + begin, count = end - begin;
    switch (p.kind) {
      case SketchKind::kRademacher:
        for (int64_t c = 0; c < dim; c += kBits) {
          for_words(p, first, count, static_cast<uint32_t>(c / kBits), [&](int64_t i, const uint32_t* words) {
            for (int64_t k = 0; k < std::min(kBits, dim - c); ++k)
              out(begin + i, c + k) = words[k / 32] >> (k % 32) & 1 ? -scale : scale;
          });
        }
        break;
      case SketchKind::kGaussian:
        for (int64_t c = 0; c < dim; c += simd::NormalRows::kMost) {
          const int64_t here = std::min(simd::NormalRows::kMost, dim - c);
          auto normal = normal_rows(p, c, here);
          float number[simd::NormalRows::kMost];
          for (int64_t i = begin; i < end; ++i) {
            normal.row(static_cast<uint64_t>(p.offset + i), StoreAt{number});
            for (int64_t k = 0; k < here; ++k) out(i, c + k) = static_cast<T>(number[k]) * scale;
          }
        }
        break;
      case SketchKind::kGaussianBoxMuller:
        for (int64_t c = 0; c < dim; c += 4) {
          for_normals(p, first, count, static_cast<uint32_t>(c / 4), [&](int64_t i, int k, float value) {
            if (c + k < dim) out(begin + i, c + k) = static_cast<T>(value) * scale;
          });
        }
        break;
      case SketchKind::kSjlt: {
        for (int64_t i = begin; i < end; ++i) std::fill_n(out.row(i), dim, T(0));
        const int64_t apart = round_up(count, simd::kPhiloxRows);
        std::vector<uint32_t> column(static_cast<size_t>(2 * apart));
        std::vector<T> sign(column.size());
        for (int64_t e = 0; e < p.nnz; ++e) {
          if (e % 2 == 0) sjlt.entries(e, first, count, apart, column.data(), sign.data());
          for (int64_t i = 0; i < count; ++i) {
            const size_t at = static_cast<size_t>(e % 2 * apart + i);
            out(begin + i, static_cast<int64_t>(column[at])) = sign[at] * scale;
          }
        }
        break;
      }
      case SketchKind::kSrht: {
        std::vector<int32_t> chosen(static_cast<size_t>(dim));
        int64_t drawn = -1;
        for (int64_t i = 0; i < count; ++i) {
          const int64_t number = (first + i) / srht.size(), place = (first + i) % srht.size();
          if (number != drawn) srht.columns(number, chosen.data());
          drawn = number;
          uint32_t bits[4];
          srht.signs((first + i) / kBits * kBits, kBits, bits);
          const uint32_t own = bits[place % kBits / 32] >> (place % 32) & 1;
          for (int64_t c = 0; c < dim; ++c) {
            const int shared =
                __builtin_popcount(static_cast<uint32_t>(chosen[c]) & static_cast<uint32_t>(place));
            out(begin + i, c) = ((static_cast<uint32_t>(shared) ^ own) & 1) != 0 ? -scale : scale;
          }
        }
        break;
      }
    }
  });
}

#define FC_INSTANTIATE(T)                                                                               \
  template void sketch<T>(TensorView<const T, 2>, const Projection&, TensorView<T, 2>, ThreadTeam&);    \
  template void sketch_rows<T>(TensorView<const int64_t, 2>, TensorView<const T, 3>, const Projection&, \
                               TensorView<T, 2>, ThreadTeam&);                                          \
  template void sketch_csr<T>(const CsrRows<T>&, const Projection&, TensorView<T, 2>, ThreadTeam&);     \
  template void projection_matrix<T>(const Projection&, TensorView<T, 2>, ThreadTeam&);
FC_INSTANTIATE(float)
FC_INSTANTIATE(double)
#undef FC_INSTANTIATE

}  // namespace fc
