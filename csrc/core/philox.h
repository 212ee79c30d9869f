// Philox4x32-10: a counter-based random number generator (Salmon, Moraes, Dror and Shaw, "Parallel random
// numbers: as easy as 1, 2, 3", SC 2011). A stateless bijection of the 128-bit counter, keyed by 64 bits: any
// block of the stream can be computed alone, which is what makes random numbers independent of threads, tiles
// and batches.
//
// Cost: 20 32 x 32 -> 64 bit products for 128 random bits; 14 with seven rounds, the fewest that the paper
// found to pass all tests of BigCrush.
#pragma once

#include <array>
#include <cstdint>

#include "core/host_device.h"

namespace fc {

using PhiloxBlock = std::array<uint32_t, 4>;

template <int kRounds = 10>
FC_HOST_DEVICE inline PhiloxBlock philox4x32(PhiloxBlock counter, std::array<uint32_t, 2> key) {
  constexpr uint64_t kMultiplier0 = 0xD2511F53u, kMultiplier1 = 0xCD9E8D57u;
  constexpr uint32_t kWeyl0 = 0x9E3779B9u, kWeyl1 = 0xBB67AE85u;  // golden ratio and sqrt(3) - 1
  for (int round = 0; round < kRounds; ++round) {
    const uint64_t product0 = kMultiplier0 * counter[0];
    const uint64_t product1 = kMultiplier1 * counter[2];
    counter = {static_cast<uint32_t>(product1 >> 32) ^ counter[1] ^ key[0], static_cast<uint32_t>(product1),
               static_cast<uint32_t>(product0 >> 32) ^ counter[3] ^ key[1], static_cast<uint32_t>(product0)};
    key[0] += kWeyl0;
    key[1] += kWeyl1;
  }
  return counter;
}

// The block at (row, column block) of the stream of a seed: the counter is [row low, row high, block low,
// block high].
inline PhiloxBlock philox4x32(uint64_t seed, uint64_t row, uint64_t block) {
  return philox4x32({static_cast<uint32_t>(row), static_cast<uint32_t>(row >> 32),
                     static_cast<uint32_t>(block), static_cast<uint32_t>(block >> 32)},
                    {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)});
}

}  // namespace fc
