// Rows of the matrix of `gaussian`: normal numbers in float32, several at once.
//
// python/flashcoreset/sketch/reference.py defines them (`normals`). A random block makes eight numbers. Its
// first two rounds are shared: of their products one depends on the row alone and two on the block and the
// upper half of the row's number, which a table holds, so that rounds three to seven are left: 10 products of
// 32 bits for eight numbers. Box and Muller's formula takes a square root and 21 multiply-adds or products
// for two vectors of numbers. The words of a row are made first, the numbers of them second: either loop
// alone has shorter chains of operations in flight than both together (6 % faster on Zen 3).
//
// Rejected: the inverse of the distribution function by segments (a polynomial whose coefficients are taken
// from registers by permutations takes 1.3 times as long on Zen 3, for 4e-6 of error with eight segments of
// degree 5, and its tail needs a branch); making numbers between the multiply-adds that use others (1.05
// times as fast at most, since random blocks' products need the same units).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "core/normal.h"
#include "core/philox_simd.h"
#include "core/simd.h"

namespace fc::simd {

typedef int32_t Ints __attribute__((vector_size(kBytes)));

// a b + c, rounded once also where that takes double precision (which may differ in the last bit in one of
// 2^29 cases).
inline Vec<float> fma_once(Vec<float> a, Vec<float> b, Vec<float> c) {
#if defined(__AVX2__) || defined(__aarch64__)
  return fma<float>(a, b, c);
#elif defined(__SSE2__)
  // By intrinsics: see round_to_float in normal_simd.h.
  const auto low = [](Vec<float> v) { return _mm_cvtps_pd((__m128)v); };
  const auto high = [](Vec<float> v) { return _mm_cvtps_pd(_mm_movehl_ps((__m128)v, (__m128)v)); };
  return (Vec<float>)_mm_movelh_ps(_mm_cvtpd_ps(_mm_add_pd(_mm_mul_pd(low(a), low(b)), low(c))),
                                   _mm_cvtpd_ps(_mm_add_pd(_mm_mul_pd(high(a), high(b)), high(c))));
#else
  for (int l = 0; l < kWidth<float>; ++l) a[l] = std::fma(a[l], b[l], c[l]);
  return a;
#endif
}

// Every word, the low half of a lane of 64 bits, and the same word with its halves exchanged behind it.
inline Ints with_exchanged(Words words) {
#if defined(__AVX512BW__)
  return (Ints)_mm512_shuffle_epi8((__m512i)words,
                                   _mm512_set4_epi32(0x09080B0A, 0x0B0A0908, 0x01000302, 0x03020100));
#elif defined(__AVX2__)
  return (Ints)_mm256_shuffle_epi8(
      (__m256i)words, _mm256_setr_epi32(0x03020100, 0x01000302, 0x0B0A0908, 0x09080B0A, 0x03020100,
                                        0x01000302, 0x0B0A0908, 0x09080B0A));
#elif defined(__SSSE3__)
  return (Ints)_mm_shuffle_epi8((__m128i)words,
                                _mm_setr_epi32(0x03020100, 0x01000302, 0x0B0A0908, 0x09080B0A));
#else
  return (Ints)((words & 0xFFFFFFFFu) | (words & 0xFFFF0000u) << 16 | words << 48);
#endif
}

// x[j], y[j] = the two numbers of every lane of a[j] and b[j]. Several vectors at once hide the latencies.
template <int kCount>
inline void normal_pairs(const Ints (&a)[kCount], const Ints (&b)[kCount], Vec<float> (&x)[kCount],
                         Vec<float> (&y)[kCount]) {
  using P = NormalPolynomials;
  using V = Vec<float>;
  constexpr int32_t kOne = 1 << 23, kTwoThirds = 0x3F2AAAAB;
  const auto bits = [](V v) { return reinterpret_cast<Ints>(v); };
  const auto floats = [](Ints v) { return reinterpret_cast<V>(v); };
  V f[kCount], exponent[kCount], radius[kCount], t[kCount], square[kCount], sine[kCount], cosine[kCount];
  for (int j = 0; j < kCount; ++j) {
    const V uniform = __builtin_convertvector(a[j] & INT32_MAX, V) + broadcast(0.5f);
    const Ints places = (kTwoThirds + 32 * kOne - 1 - bits(uniform)) & -kOne;
    exponent[j] = __builtin_convertvector(places, V);
    f[j] = broadcast(1.0f) - floats(bits(uniform) + (places - 31 * kOne));
    radius[j] = broadcast(P::logarithm(P::kLogarithm - 1));
  }
  for (int k = P::kLogarithm - 2; k >= 0; --k) {
    for (int j = 0; j < kCount; ++j) radius[j] = fma_once(radius[j], f[j], broadcast(P::logarithm(k)));
  }
  for (int j = 0; j < kCount; ++j) radius[j] = square_root<float>(fma_once(f[j], radius[j], exponent[j]));
  for (int j = 0; j < kCount; ++j) {
    // 2^-31 times the number: its exponent made smaller, which an adder for whole numbers does.
    t[j] = floats(bits(__builtin_convertvector((b[j] << 1) | 1, V)) - 31 * kOne);
    square[j] = t[j] * t[j];
    sine[j] = broadcast(P::sine(P::kSine - 1));
    cosine[j] = broadcast(P::cosine(P::kCosine - 1));
  }
  for (int k = P::kSine - 2; k >= 0; --k) {
    for (int j = 0; j < kCount; ++j) sine[j] = fma_once(sine[j], square[j], broadcast(P::sine(k)));
  }
  for (int k = P::kCosine - 2; k >= 0; --k) {
    for (int j = 0; j < kCount; ++j) cosine[j] = fma_once(cosine[j], square[j], broadcast(P::cosine(k)));
  }
  for (int j = 0; j < kCount; ++j) {
    const V s = sine[j] * t[j] * radius[j];
    const V c = cosine[j] * floats(bits(radius[j]) ^ (a[j] & INT32_MIN));
    x[j] = b[j] < 0 ? c : s;
    y[j] = b[j] < 0 ? s : c;
  }
}

// Rows of the columns [first, first + columns) of the matrix, `first` a multiple of 32.
class NormalRows {
 public:
  static constexpr int64_t kMost = 512;  // columns
  // Columns that are made together: those of kPhiloxRows blocks, or the group of four that two belong to.
  static constexpr int64_t kStep = std::max(8 * kPhiloxRows, 32);

  NormalRows(uint64_t seed, uint32_t stream, int64_t first, int64_t columns)
      : stream_(stream),
        first_block_(static_cast<uint64_t>(first) / 8),
        steps_((columns + kStep - 1) / kStep) {
    for (int round = 0; round < kRounds; ++round) {
      key_[round][0] = static_cast<uint32_t>(seed) + static_cast<uint32_t>(round) * 0x9E3779B9u;
      key_[round][1] = static_cast<uint32_t>(seed >> 32) + static_cast<uint32_t>(round) * 0xBB67AE85u;
    }
    make_table(0);
  }

  // out(c, number) for each eight columns c - first (four with vectors of 16 bytes) of a row, `number` being
  // a vector of them; columns beyond the last one come up to a multiple of kStep.
  template <class Out>
  void row(uint64_t row, Out&& out) {
    if (static_cast<uint32_t>(row >> 32) != high_) make_table(static_cast<uint32_t>(row >> 32));
    Ints words[kMost / kStep * kBatches][4];
    make_words(static_cast<uint32_t>(row), words);
    for (int64_t batch = 0; batch < steps_ * kBatches; ++batch) {
      const Ints a[2] = {words[batch][0], words[batch][2]}, b[2] = {words[batch][1], words[batch][3]};
      Vec<float> x[2], y[2];
      normal_pairs<2>(a, b, x, y);
      const int64_t column = batch / kBatches * kStep + batch % kBatches * kColumns;
      for (int pair = 0; pair < 2; ++pair) {
        hand_out(x[pair], column + 16 * pair, out);
        hand_out(y[pair], column + 16 * pair + 8, out);
      }
    }
  }

 private:
  static constexpr int kRounds = 7;
  static constexpr int kColumns = std::min(2 * kPhiloxRows, 8);  // of a vector of numbers in a group
  static constexpr int kBatches = kStep / (8 * kPhiloxRows);     // of blocks in a step
  static constexpr int64_t kBlocks = kMost / 8;

  template <class Out>
  static void hand_out(Vec<float> v, int64_t column, Out&& out) {
#if defined(__AVX512F__)
    typedef float Eight __attribute__((vector_size(32)));
    out(column, (Eight)_mm512_castps512_ps256((__m512)v));
    out(column + 32, (Eight)_mm512_extractf32x8_ps((__m512)v, 1));
#else
    out(column, v);
#endif
  }

  // The first two rounds of all blocks, for rows whose numbers have this upper half.
  void make_table(uint32_t high) {
    high_ = high;
    for (int64_t i = 0; i < steps_ * kBatches * kPhiloxRows; ++i) {
      const uint64_t first = kMultiplier1 * static_cast<uint32_t>(first_block_ + static_cast<uint64_t>(i));
      const uint64_t second = kMultiplier0 * (static_cast<uint32_t>(first >> 32) ^ high ^ key_[0][0]);
      first_[i] = first;
      second_[i] = second;
      second_high_[i] = second >> 32;
    }
  }

  void make_words(uint32_t row, Ints (*out)[4]) const {
    const uint64_t product = kMultiplier0 * row;
    const uint64_t other = kMultiplier1 * (static_cast<uint32_t>(product >> 32) ^ stream_ ^ key_[0][1]);
    const Words row0 = Words{} + (static_cast<uint32_t>(other >> 32) ^ key_[1][0]), row1 = Words{} + other,
                row2 = Words{} + (static_cast<uint32_t>(product) ^ key_[1][1]);
    const Words multiplier0 = Words{} + kMultiplier0, multiplier1 = Words{} + kMultiplier1;
    for (int64_t batch = 0; batch < steps_ * kBatches; ++batch) {
      const int64_t i = batch * kPhiloxRows;
      Words c0 = load_words(first_ + i) ^ row0, c1 = row1, c2 = load_words(second_high_ + i) ^ row2,
            c3 = load_words(second_ + i);
#pragma GCC unroll 5
      for (int round = 2; round < kRounds; ++round) {
        const Words product0 = multiply_low(c0, multiplier0), product1 = multiply_low(c2, multiplier1);
        c0 = (product1 >> 32) ^ c1 ^ (Words{} + key_[round][0]);
        c2 = (product0 >> 32) ^ c3 ^ (Words{} + key_[round][1]);
        c1 = product1;
        c3 = product0;
      }
      out[batch][0] = with_exchanged(c0);
      out[batch][1] = with_exchanged(c1);
      out[batch][2] = with_exchanged(c2);
      out[batch][3] = with_exchanged(c3);
    }
  }

  static Words load_words(const uint64_t* from) {
    Words words;
    std::memcpy(&words, from, sizeof(words));
    return words;
  }

  static constexpr uint64_t kMultiplier0 = 0xD2511F53u, kMultiplier1 = 0xCD9E8D57u;

  const uint32_t stream_;
  const uint64_t first_block_;
  const int64_t steps_;
  uint64_t key_[kRounds][2];  // words, wide enough for the lanes they are compared with
  uint32_t high_ = 0;
  alignas(64) uint64_t first_[kBlocks], second_[kBlocks], second_high_[kBlocks];
};

}  // namespace fc::simd
