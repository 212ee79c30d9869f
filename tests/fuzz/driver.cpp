// Runs a fuzz target over seeded random inputs of all lengths, for compilers without libFuzzer: the same
// inputs every time.
#include <vector>

#include "check.h"
#include "core/philox.h"
#include "input.h"

TEST_PROGRAM {
  const int inputs = thorough ? 200000 : 1500;
  for (int i = 0; i < inputs; ++i) {
    const size_t size = fc::philox4x32(1, i, 0)[0] % (i % 10 == 0 ? 4096 : 300);
    std::vector<uint8_t> bytes(size);  // on the heap and no longer than it says, so that an overrun is seen
    for (size_t at = 0; at < size; ++at) bytes[at] = static_cast<uint8_t>(fc::philox4x32(2, i, at)[0]);
    CHECK_EQUAL(LLVMFuzzerTestOneInput(bytes.data(), size), 0);
  }
  return check::verdict("fuzz");
}
