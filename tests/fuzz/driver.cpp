// Runs a fuzz target over seeded random inputs of all lengths, for compilers without libFuzzer: the same
// inputs every time, or as many as FC_FUZZ_SECONDS allow from the input FC_FUZZ_FIRST on. The number of an
// input that ends the program is printed: FC_FUZZ_FIRST=number runs it again.
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <vector>

#include "check.h"
#include "core/philox.h"
#include "input.h"

namespace {

volatile long current = 0;

extern "C" void tell(int signal) {
  std::fprintf(stderr, "input %ld ends the program\n", current);
  std::signal(signal, SIG_DFL);
  std::raise(signal);
}

long number_in(const char* variable, long otherwise) {
  const char* const text = std::getenv(variable);
  return text != nullptr ? std::atol(text) : otherwise;
}

}  // namespace

TEST_PROGRAM {
  std::signal(SIGABRT, tell);
  const long seconds = number_in("FC_FUZZ_SECONDS", 0), first = number_in("FC_FUZZ_FIRST", 0);
  const long inputs = thorough ? 200000 : 1500;
  const std::time_t began = std::time(nullptr);
  for (long i = first; seconds > 0 ? std::time(nullptr) - began < seconds : i < first + inputs; ++i) {
    current = i;
    const size_t size = fc::philox4x32(1, i, 0)[0] % (i % 10 == 0 ? 4096 : 300);
    std::vector<uint8_t> bytes(size);  // on the heap, of exactly this size, so that an overrun is seen
    for (size_t at = 0; at < size; ++at) bytes[at] = static_cast<uint8_t>(fc::philox4x32(2, i, at)[0]);
    CHECK_EQUAL(LLVMFuzzerTestOneInput(bytes.data(), size), 0);
  }
  return check::verdict("fuzz");
}
