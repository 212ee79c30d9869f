// Philox4x32-10 against the known answers published with the generator (Random123, kat_vectors).
#include "check.h"
#include "core/philox.h"

namespace {

void test_known_answers() {
  struct Known {
    fc::PhiloxBlock counter;
    std::array<uint32_t, 2> key;
    fc::PhiloxBlock answer;
  };
  const Known known[] = {
      {{0, 0, 0, 0}, {0, 0}, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
      {{0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff},
       {0xffffffff, 0xffffffff},
       {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
      {{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344},
       {0xa4093822, 0x299f31d0},
       {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}},
  };
  for (const Known& k : known) CHECK(fc::philox4x32(k.counter, k.key) == k.answer);
}

// The 64-bit form is the 128-bit one with the words in their documented places.
void test_seed_row_block() {
  CHECK(fc::philox4x32(0x299f31d0a4093822, 0x85a308d3243f6a88, 0x0370734413198a2e) ==
        (fc::PhiloxBlock{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}));
  CHECK(fc::philox4x32(1, 2, 3) != fc::philox4x32(1, 3, 2));
  CHECK(fc::philox4x32(1, 0, 0) != fc::philox4x32(uint64_t{1} << 32, 0, 0));
}

// Every bit is set about half of the time: 2^14 draws, six standard deviations.
void test_bits_are_balanced() {
  constexpr int kBlocks = 1 << 14;
  int ones[128] = {};
  for (int i = 0; i < kBlocks; ++i) {
    const auto block = fc::philox4x32(123, 0, i);
    for (int bit = 0; bit < 128; ++bit) ones[bit] += (block[bit / 32] >> (bit % 32)) & 1;
  }
  for (const int count : ones) CHECK(count > kBlocks / 2 - 6 * 64 && count < kBlocks / 2 + 6 * 64);
}

}  // namespace

TEST_PROGRAM {
  test_known_answers();
  test_seed_row_block();
  test_bits_are_balanced();
  return check::verdict("philox");
}
