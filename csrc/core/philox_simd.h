// Philox4x32-10 for several counter rows at once; see philox.h for the generator.
//
// A lane of 64 bits holds a word of 32; the bits above are not kept clean, because the products read the low
// half alone. Cost: 6 operations per round and vector.
#pragma once

#include <cstdint>

#include "core/philox.h"
#include "core/simd.h"

namespace fc::simd {

typedef uint64_t Words __attribute__((vector_size(kBytes)));

inline constexpr int kPhiloxRows = kBytes / 8;

// The products of the low halves.
inline Words multiply_low(Words a, Words b) {
#if defined(__AVX512F__)
  return (Words)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (Words)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
  return (Words)_mm_mul_epu32((__m128i)a, (__m128i)b);
#elif defined(__aarch64__)
  return (Words)vmull_u32(vmovn_u64((uint64x2_t)a), vmovn_u64((uint64x2_t)b));
#else
  return (a & 0xFFFFFFFFu) * (b & 0xFFFFFFFFu);
#endif
}

// c[w] = word w of the blocks of the rows `row`, one row per lane; above 32 bits lanes hold anything. `block`
// is the column block, `kind` the last word of the counter.
inline void philox_rows(uint64_t seed, Words row, uint32_t block, uint32_t kind, Words (&c)[4]) {
  c[0] = row;
  c[1] = c[0] >> 32;
  c[2] = Words{} + block;
  c[3] = Words{} + kind;
  const Words multiplier0 = Words{} + 0xD2511F53u, multiplier1 = Words{} + 0xCD9E8D57u;
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const Words product0 = multiply_low(c[0], multiplier0), product1 = multiply_low(c[2], multiplier1);
    c[0] = (product1 >> 32) ^ c[1] ^ (Words{} + key0);
    c[2] = (product0 >> 32) ^ c[3] ^ (Words{} + key1);
    c[1] = product1;
    c[3] = product0;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
}

// The same of the rows row, row + 1, ...
inline void philox_rows(uint64_t seed, uint64_t row, uint32_t block, uint32_t kind, Words (&c)[4]) {
  Words lane;
  for (int r = 0; r < kPhiloxRows; ++r) lane[r] = row + static_cast<uint64_t>(r);
  philox_rows(seed, lane, block, kind, c);
}

// The low halves of the lanes.
inline void store_low(Words words, uint32_t* out) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_cvtepi64_epi32((__m512i)words));
#else
  for (int r = 0; r < kPhiloxRows; ++r) out[r] = static_cast<uint32_t>(words[r]);
#endif
}

}  // namespace fc::simd
